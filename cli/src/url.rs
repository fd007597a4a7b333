//! The address of a gateway.

use std::{fmt, net::IpAddr, str::FromStr};

use http::Uri;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

/// The URL of a gateway: `https://`, or `http://` to this machine only, because requests contain a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GatewayUrl {
    /// Scheme, host, port and path, without a final slash.
    base: String,
    host: String,
    is_encrypted: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "must be a URL such as https://vmwatch.example.com; http:// only for this machine (127.0.0.1, ::1, localhost)"
)]
pub(crate) struct InvalidGatewayUrl;

impl GatewayUrl {
    /// Whether connections use TLS.
    pub(crate) const fn is_encrypted(&self) -> bool {
        self.is_encrypted
    }

    /// The host, for the name of a context.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }
}

impl FromStr for GatewayUrl {
    type Err = InvalidGatewayUrl;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uri: Uri = text.parse().map_err(|_| InvalidGatewayUrl)?;
        let authority = uri.authority().ok_or(InvalidGatewayUrl)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let is_allowed = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => is_this_machine(host),
            _ => false,
        };
        if !is_allowed || host.is_empty() || authority.as_str().contains('@') || uri.query().is_some() {
            return Err(InvalidGatewayUrl);
        }
        Ok(Self {
            base: text.trim_end_matches('/').to_owned(),
            host: host.to_owned(),
            is_encrypted: uri.scheme_str() == Some("https"),
        })
    }
}

fn is_this_machine(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl fmt::Display for GatewayUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.base)
    }
}

impl Serialize for GatewayUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.base)
    }
}

impl<'de> Deserialize<'de> for GatewayUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_url_requires_tls_except_to_this_machine() {
        for (text, base) in [
            ("https://a.example", "https://a.example"),
            ("https://a.example:8443/x/", "https://a.example:8443/x"),
            ("https://[2001:db8::1]/", "https://[2001:db8::1]"),
            ("http://127.0.0.1:8086", "http://127.0.0.1:8086"),
            ("http://[::1]", "http://[::1]"),
            ("http://localhost/", "http://localhost"),
        ] {
            assert_eq!(
                text.parse::<GatewayUrl>().map(|url| url.to_string()).as_deref(),
                Ok(base)
            );
        }
        for bad in [
            "",
            "a.example",
            "http://a.example",
            "http://127.0.0.1.example",
            "http://localhost.example",
            "ftp://127.0.0.1",
            "https://user@a.example",
            "https://a.example/?x=1",
            "/api",
        ] {
            assert_eq!(bad.parse::<GatewayUrl>(), Err(InvalidGatewayUrl), "{bad}");
        }
    }
}
