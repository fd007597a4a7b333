//! Reads the client's address, and the scheme and host of its request, from the forwarding headers of trusted proxies.
//! Forwarding headers from any other peer are ignored.

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use axum::http::{HeaderMap, HeaderName};
use ipnet::IpNet;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Networks of the trusted proxies; empty by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Proxies(Vec<IpNet>);

/// The setting is not a list of IP addresses and networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be comma-separated IP addresses or networks, such as 10.1.2.3,10.0.0.0/8,fd00::/8")]
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
    /// The client's address. Each proxy appends the address of its peer to `X-Forwarded-For`, so the last address that
    /// is not a trusted proxy was added by a trusted proxy. Clients can forge everything before that address.
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

    /// Whether a trusted proxy reports that the client used HTTPS.
    pub(crate) fn reports_https(&self, peer: SocketAddr, headers: &HeaderMap) -> bool {
        self.last_value(peer, headers, &FORWARDED_PROTO)
            .is_some_and(|scheme| scheme.eq_ignore_ascii_case("https"))
    }

    /// The host to which the client sent its request, as a trusted proxy reports it. It includes the port unless that
    /// is the scheme's default.
    pub(crate) fn forwarded_host<'a>(&self, peer: SocketAddr, headers: &'a HeaderMap) -> Option<&'a str> {
        self.last_value(peer, headers, &FORWARDED_HOST)
    }

    /// Whether the peer is a trusted proxy.
    pub(crate) fn is_trusted(&self, peer: SocketAddr) -> bool {
        self.trusts(peer.ip().to_canonical())
    }

    /// The last value of a forwarding header that a trusted proxy sent. Proxies append to lists of values, so clients
    /// can forge everything before the last value.
    fn last_value<'a>(&self, peer: SocketAddr, headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
        if !self.is_trusted(peer) {
            return None;
        }
        let line = headers.get_all(name).iter().next_back()?.to_str().ok()?;
        let last = line.rsplit(',').next()?.trim();
        (!last.is_empty()).then_some(last)
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }
}

/// Parses an address of `X-Forwarded-For`, to which some proxies append a port.
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
    fn client_address_is_last_address_added_by_trusted_proxy() {
        let proxies: Proxies = "10.0.0.0/8, 192.0.2.1,fd00::/8".parse().unwrap();
        for (peer, lines, client) in [
            // Forwarding headers of a peer that is not a trusted proxy are ignored.
            ("198.51.100.7:1", &["203.0.113.9"][..], "198.51.100.7"),
            ("10.0.0.1:1", &[], "10.0.0.1"),
            ("10.0.0.1:1", &["203.0.113.9"], "203.0.113.9"),
            ("[::ffff:10.0.0.1]:1", &["203.0.113.9"], "203.0.113.9"),
            ("10.0.0.1:1", &["203.0.113.9:4711"], "203.0.113.9"),
            ("[fd00::1]:1", &["[2001:db8::9]:4711"], "2001:db8::9"),
            // Proxies append their peer's address after any value that the client sent itself.
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
        let none = Proxies::default();
        let mut headers = HeaderMap::new();
        headers.append(FORWARDED_FOR, HeaderValue::from_static("203.0.113.9"));
        let peer = "10.0.0.1:1".parse().unwrap();
        assert_eq!(none.client(peer, &headers), peer.ip());
    }

    #[test]
    fn forwarded_scheme_is_trusted_only_from_trusted_proxy() {
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
            let said = proxies.reports_https(peer.parse().unwrap(), &headers);
            assert_eq!(said, https, "{peer} {lines:?}");
        }
    }

    #[test]
    fn forwarded_host_is_last_value_from_trusted_proxy() {
        let proxies: Proxies = "10.0.0.0/8".parse().unwrap();
        for (peer, lines, host) in [
            ("10.0.0.1:1", &["vm.example"][..], Some("vm.example")),
            ("10.0.0.1:1", &["vm.example:8443"], Some("vm.example:8443")),
            ("10.0.0.1:1", &["[2001:db8::1]:80"], Some("[2001:db8::1]:80")),
            ("[::ffff:10.0.0.1]:1", &["vm.example"], Some("vm.example")),
            ("10.0.0.1:1", &["forged.example, vm.example "], Some("vm.example")),
            (
                "10.0.0.1:1",
                &["forged.example,x", "other.example,vm.example"],
                Some("vm.example"),
            ),
            ("10.0.0.1:1", &["vm.example,"], None),
            ("10.0.0.1:1", &["forged.example", ""], None),
            ("10.0.0.1:1", &["vm\u{e9}.example"], None),
            ("10.0.0.1:1", &[], None),
            ("198.51.100.7:1", &["vm.example"], None),
        ] {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(FORWARDED_HOST, HeaderValue::from_str(line).unwrap());
            }
            let found = proxies.forwarded_host(peer.parse().unwrap(), &headers);
            assert_eq!(found, host, "{peer} {lines:?}");
        }
    }

    #[test]
    fn invalid_trusted_proxy_networks_are_rejected() {
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
