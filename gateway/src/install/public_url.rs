//! The URL at which VMs and browsers reach the gateway.

use std::{net::IpAddr, str::FromStr};

use axum::http::uri::Authority;

/// A URL of a scheme, a host and optionally a port. It consists of letters, digits and the characters `.-:/[]`, so it can
/// be written into a shell script without escaping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PublicUrl(String);

/// The setting is not a URL that VMs may install the agent from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "must be a URL such as https://vmwatch.example.com or https://vmwatch.example.com:8443, without a path; http:// is \
     allowed only for localhost and loopback addresses"
)]
pub(crate) struct InvalidPublicUrl;

impl PublicUrl {
    /// The URL without a slash at its end.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PublicUrl {
    type Err = InvalidPublicUrl;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.strip_suffix('/').unwrap_or(text);
        let (scheme, authority) = text.split_once("://").ok_or(InvalidPublicUrl)?;
        // The root user of each VM runs a script from this URL, so it must come over TLS.
        let allowed = match scheme {
            "https" => is_authority(authority),
            "http" => is_authority(authority) && is_loopback(authority),
            _ => false,
        };
        allowed.then(|| Self(text.to_owned())).ok_or(InvalidPublicUrl)
    }
}

/// Whether the text is a host and optionally a port, without a user name.
fn is_authority(text: &str) -> bool {
    let plain = text
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte));
    let Ok(authority) = text.parse::<Authority>() else {
        return false;
    };
    let port = text.strip_prefix(authority.host()).unwrap_or(text);
    let is_port = |port: &str| port.parse::<u16>().is_ok_and(|port| port > 0);
    let valid_port = port.is_empty() || port.strip_prefix(':').is_some_and(is_port);
    plain && !authority.host().is_empty() && valid_port
}

fn is_loopback(authority: &str) -> bool {
    let Ok(authority) = authority.parse::<Authority>() else {
        return false;
    };
    let host = authority.host();
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || address
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_url_must_use_tls_unless_its_host_is_loopback() {
        for (text, url) in [
            ("https://vmwatch.example.com", "https://vmwatch.example.com"),
            ("https://vmwatch.example.com/", "https://vmwatch.example.com"),
            ("https://10.0.0.1:8443", "https://10.0.0.1:8443"),
            ("https://[2001:db8::1]:8443", "https://[2001:db8::1]:8443"),
            ("http://127.0.0.1:8086", "http://127.0.0.1:8086"),
            ("http://[::1]:8086", "http://[::1]:8086"),
            ("http://localhost", "http://localhost"),
        ] {
            assert_eq!(text.parse::<PublicUrl>().unwrap().as_str(), url);
        }
        for bad in [
            "",
            "vmwatch.example.com",
            "http://vmwatch.example.com",
            "http://10.0.0.1:8086",
            "http://localhost.example.com",
            "http://127.0.0.1@example.com",
            "ftp://127.0.0.1",
            "https://",
            "https://:443",
            "https://a:0",
            "https://a:99999",
            "https://a:b",
            "https://user@a",
            "https://a/path",
            "https://a?query",
            "https://a'$(reboot)'",
            "https://a b",
            "https://a//",
        ] {
            assert_eq!(bad.parse::<PublicUrl>(), Err(InvalidPublicUrl), "{bad}");
        }
    }
}
