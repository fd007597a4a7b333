//! The receiver of a channel, and how its messages are made.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use crate::{bounded_text, labels::MAX_LABEL_KEY};

/// Maximum number of recipients of an e-mail.
const MAX_MAIL_RECIPIENTS: usize = 20;
/// Maximum length of a URL in bytes.
const MAX_URL: usize = 2048;
/// Maximum length of a template in bytes.
const MAX_TEMPLATE: usize = 8192;

/// The receiver of a channel's messages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ChannelTarget {
    /// E-mail through an SMTP server. The secret is the password.
    Email {
        server: SmtpServer,
        #[serde(default)]
        tls: MailTls,
        from: EmailAddress,
        #[serde(deserialize_with = "mail_recipients")]
        to: Vec<EmailAddress>,
        /// User name at the SMTP server; `None` if it needs none.
        #[serde(
            default,
            skip_serializing_if = "Option::is_none",
            deserialize_with = "mail_user"
        )]
        user: Option<String>,
    },
    /// The JSON that Alertmanager sends to webhooks, version 4. The secret signs it.
    Webhook { url: ReceiverUrl },
    /// An Alertmanager. The URL is its address without `/api/v2/alerts`. The secret is a bearer token.
    Alertmanager { url: ReceiverUrl },
}

impl ChannelTarget {
    /// The name of the kind on the wire.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Email { .. } => "email",
            Self::Webhook { .. } => "webhook",
            Self::Alertmanager { .. } => "alertmanager",
        }
    }
}

fn mail_recipients<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<EmailAddress>, D::Error> {
    let to = Vec::deserialize(deserializer)?;
    if (1..=MAX_MAIL_RECIPIENTS).contains(&to.len()) {
        Ok(to)
    } else {
        Err(D::Error::custom("must list 1 to 20 addresses"))
    }
}

fn mail_user<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let rule = "must be a text of at most 256 bytes";
    bounded_text(deserializer, rule, |text| text.len() <= 256).map(Some)
}

/// How the connection to an SMTP server is encrypted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum MailTls {
    /// The connection begins without TLS and must change to it (STARTTLS).
    #[default]
    Starttls,
    /// The connection begins with TLS.
    Tls,
    /// Not encrypted. It is refused together with a user name.
    None,
}

/// The address of an SMTP server: `host:port`, or `[IPv6 address]:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmtpServer {
    pub host: String,
    pub port: u16,
}

impl SmtpServer {
    const RULE: &str = "must be host:port";
}

impl FromStr for SmtpServer {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (host, port) = text.rsplit_once(':').ok_or(Self::RULE)?;
        let port: u16 = port.parse().map_err(|_| Self::RULE)?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let is_host = match bare {
            Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
            None => {
                (1..=253).contains(&host.len())
                    && host
                        .bytes()
                        .all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
            }
        };
        if port == 0 || !is_host {
            return Err(Self::RULE);
        }
        Ok(Self {
            host: bare.unwrap_or(host).to_owned(),
            port,
        })
    }
}

impl fmt::Display for SmtpServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl Serialize for SmtpServer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SmtpServer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = bounded_text(deserializer, Self::RULE, |_| true)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// An e-mail address of at most 254 bytes: a local part and a domain, without spaces, control characters and angle brackets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(max_length = 254))]
pub struct EmailAddress(String);

impl EmailAddress {
    const RULE: &str = "must be an e-mail address such as ops@example.com";

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn allows(text: &str) -> bool {
        let is_plain =
            |letter: char| !letter.is_whitespace() && !letter.is_control() && !"<>,;\"()".contains(letter);
        let parts = text.rsplit_once('@');
        text.len() <= 254
            && text.chars().all(is_plain)
            && parts.is_some_and(|(local, domain)| {
                !local.is_empty() && !local.contains('@') && !domain.is_empty()
            })
    }
}

impl<'de> Deserialize<'de> for EmailAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(Self)
    }
}

/// An `http` or `https` URL of at most 2,048 bytes without user name and password. It may contain a secret in its path, so
/// only administrators see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(max_length = 2048))]
pub struct ReceiverUrl(String);

impl ReceiverUrl {
    const RULE: &str = "must be an http or https URL without user name and password";

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn allows(text: &str) -> bool {
        let rest = text
            .strip_prefix("https://")
            .or_else(|| text.strip_prefix("http://"));
        let is_printable = |letter: char| letter.is_ascii_graphic();
        text.len() <= MAX_URL
            && text.chars().all(is_printable)
            && rest.is_some_and(|rest| {
                let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
                !host.is_empty() && !host.contains('@')
            })
    }
}

impl<'de> Deserialize<'de> for ReceiverUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(Self)
    }
}

/// The template of a message's text, in the language of Jinja; at most 8,192 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(max_length = 8192))]
pub struct Template(String);

impl Template {
    const RULE: &str = "must be a text of at most 8192 bytes";

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for Template {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, |text| text.len() <= MAX_TEMPLATE).map(Self)
    }
}

/// A property by which alerts are grouped: `vm`, `rule`, or `label:` and the key of a label.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum GroupKey {
    Vm,
    Rule,
    Label(String),
}

impl GroupKey {
    const RULE: &str = "must be vm, rule, or label: and the key of a label";

    fn allows(key: &str) -> bool {
        // The labels of hypervisors begin with `hv/`.
        (1..=MAX_LABEL_KEY + 3).contains(&key.len()) && !key.contains(char::is_control)
    }
}

impl FromStr for GroupKey {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match (text, text.strip_prefix("label:")) {
            ("vm", _) => Ok(Self::Vm),
            ("rule", _) => Ok(Self::Rule),
            (_, Some(key)) if Self::allows(key) => Ok(Self::Label(key.to_owned())),
            _ => Err(Self::RULE),
        }
    }
}

impl fmt::Display for GroupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm => f.write_str("vm"),
            Self::Rule => f.write_str("rule"),
            Self::Label(key) => write!(f, "label:{key}"),
        }
    }
}

impl Serialize for GroupKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GroupKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = bounded_text(deserializer, Self::RULE, |_| true)?;
        text.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_match_golden_json() {
        for golden in [
            r#"{"kind":"email","server":"mail.example.com:587","tls":"starttls","from":"vmwatch@example.com","to":["ops@example.com"]}"#,
            r#"{"kind":"webhook","url":"https://example.com/hook?x=1"}"#,
            r#"{"kind":"alertmanager","url":"http://10.0.0.5:9093"}"#,
        ] {
            let target: ChannelTarget = serde_json::from_str(golden).unwrap();
            assert_eq!(serde_json::to_string(&target).unwrap(), golden);
            assert!(golden.contains(target.kind()));
        }
    }

    #[test]
    fn texts_beyond_their_rules_are_rejected() {
        for url in [
            "ftp://x",
            "https://",
            "https://user:pass@host/",
            "https://a b/",
            "//host",
        ] {
            assert!(!ReceiverUrl::allows(url), "{url}");
        }
        for address in [
            "ops",
            "@example.com",
            "ops@",
            "a b@c",
            "<a@b>",
            "a@b\r\nBcc: c@d",
            "a@b@c",
        ] {
            assert!(!EmailAddress::allows(address), "{address}");
        }
        for server in ["mail", "mail:0", "mail:70000", ":25", "a/b:25", "[::1:25"] {
            assert!(server.parse::<SmtpServer>().is_err(), "{server}");
        }
        let server: SmtpServer = "[::1]:25".parse().unwrap();
        assert_eq!(
            (server.host.as_str(), server.to_string()),
            ("::1", "[::1]:25".to_owned())
        );
        for key in ["", "label:", "host", "Label:x", "label:\0"] {
            assert!(key.parse::<GroupKey>().is_err(), "{key}");
        }
        let key: GroupKey = "label:hv/os".parse().unwrap();
        assert_eq!(key.to_string(), "label:hv/os");
    }
}
