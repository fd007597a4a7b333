//! Whose request it is where proxies stand in front: what a proxy that is trusted says of its peer, and nobody else.

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use axum::http::{HeaderMap, HeaderName};
use ipnet::IpNet;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// The networks of the proxies in front; none unless given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Proxies(Vec<IpNet>);

/// A text that is no list of networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write addresses or networks with commas between them, such as 10.1.2.3,10.0.0.0/8,fd00::/8")]
pub(crate) struct InvalidProxies;

impl FromStr for Proxies {
    type Err = InvalidProxies;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let network = |part: &str| {
            let part = part.trim();
            part.parse::<IpAddr>()
                .map(IpNet::from)
                .or_else(|_| part.parse::<IpNet>())
                .map_err(|_| InvalidProxies)
        };
        text.split(',').map(network).collect::<Result<_, _>>().map(Self)
    }
}

impl Proxies {
    /// The client's address: each proxy adds its peer at the end of `X-Forwarded-For`, so that, read from the end, the
    /// first address that is no proxy's is the last that a proxy vouches for. What stands before it anybody may have
    /// written.
    pub(crate) fn client(&self, peer: SocketAddr, headers: &HeaderMap) -> IpAddr {
        let mut client = peer.ip().to_canonical();
        let lines = headers.get_all(FORWARDED_FOR).iter().rev();
        let hops = lines.flat_map(|line| line.to_str().unwrap_or_default().rsplit(','));
        for hop in hops {
            if !self.trusts(client) {
                break;
            }
            let Some(address) = address(hop) else { break };
            client = address;
        }
        client
    }

    /// Whether the peer is trusted and says that the client used HTTPS: the last word of `X-Forwarded-Proto`, since what
    /// stands before it anybody may have written.
    pub(crate) fn says_https(&self, peer: SocketAddr, headers: &HeaderMap) -> bool {
        if !self.trusts(peer.ip().to_canonical()) {
            return false;
        }
        let line = headers.get_all(FORWARDED_PROTO).iter().next_back();
        let scheme = line.and_then(|line| line.to_str().ok()?.rsplit(',').next());
        scheme.is_some_and(|scheme| scheme.trim().eq_ignore_ascii_case("https"))
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }
}

/// An address, or one with a port, as some proxies write.
fn address(hop: &str) -> Option<IpAddr> {
    let hop = hop.trim();
    let plain = hop.parse::<IpAddr>().ok();
    plain
        .or_else(|| hop.parse::<SocketAddr>().ok().map(|address| address.ip()))
        .map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn the_client_is_the_last_address_that_a_trusted_proxy_saw() {
        let proxies: Proxies = "10.0.0.0/8, 192.0.2.1,fd00::/8".parse().unwrap();
        for (peer, lines, client) in [
            // Who is no proxy says nothing about others.
            ("198.51.100.7:1", &["203.0.113.9"][..], "198.51.100.7"),
            ("10.0.0.1:1", &[], "10.0.0.1"),
            ("10.0.0.1:1", &["203.0.113.9"], "203.0.113.9"),
            ("[::ffff:10.0.0.1]:1", &["203.0.113.9"], "203.0.113.9"),
            ("10.0.0.1:1", &["203.0.113.9:4711"], "203.0.113.9"),
            ("[fd00::1]:1", &["[2001:db8::9]:4711"], "2001:db8::9"),
            // What the client itself wrote stands before what the proxies add.
            ("10.0.0.1:1", &["1.1.1.1, 203.0.113.9,192.0.2.1"], "203.0.113.9"),
            (
                "10.0.0.1:1",
                &["1.1.1.1", "203.0.113.9", "10.2.3.4"],
                "203.0.113.9",
            ),
            ("10.0.0.1:1", &["203.0.113.9, unknown"], "10.0.0.1"),
            ("10.0.0.1:1", &["203.0.113.9, 10.0.0.2, "], "10.0.0.1"),
            ("10.0.0.1:1", &["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ] {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(FORWARDED_FOR, HeaderValue::from_static(line));
            }
            let found = proxies.client(peer.parse().unwrap(), &headers);
            assert_eq!(found, client.parse::<IpAddr>().unwrap(), "{peer} {lines:?}");
        }
        let nobody = Proxies::default();
        let mut headers = HeaderMap::new();
        headers.append(FORWARDED_FOR, HeaderValue::from_static("203.0.113.9"));
        let peer = "10.0.0.1:1".parse().unwrap();
        assert_eq!(nobody.client(peer, &headers), peer.ip());
    }

    #[test]
    fn believes_the_scheme_of_a_trusted_proxy_alone() {
        let proxies: Proxies = "10.0.0.0/8".parse().unwrap();
        for (peer, lines, https) in [
            ("10.0.0.1:1", &["https"][..], true),
            ("10.0.0.1:1", &["http, HTTPS "], true),
            ("10.0.0.1:1", &["http", "https"], true),
            ("10.0.0.1:1", &["https, http"], false),
            ("10.0.0.1:1", &["http"], false),
            ("10.0.0.1:1", &[], false),
            ("198.51.100.7:1", &["https"], false),
        ] {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(FORWARDED_PROTO, HeaderValue::from_static(line));
            }
            let said = proxies.says_https(peer.parse().unwrap(), &headers);
            assert_eq!(said, https, "{peer} {lines:?}");
        }
    }

    #[test]
    fn only_networks_are_a_list_of_proxies() {
        for bad in [
            "",
            "10.0.0.0/33",
            "proxy.example",
            "10.0.0.1,",
            "10.0.0.1 10.0.0.2",
        ] {
            assert_eq!(bad.parse::<Proxies>(), Err(InvalidProxies), "{bad:?}");
        }
    }
}
