//! What administrators set of channels. The types have the JSON of the types of the bus; a test compares them.

use serde::{Deserialize, Serialize};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema},
};
use vmwatch_api::alerts::channels::MailTls;

use super::closed;
use crate::rest::extract::Number;

/// The receiver of a channel's messages.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(in crate::rest) struct ChannelTarget(Target);

impl PartialSchema for ChannelTarget {
    fn schema() -> RefOr<Schema> {
        closed(Target::schema())
    }
}

impl ToSchema for ChannelTarget {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        Target::schemas(schemas);
    }
}

/// The receiver of a channel's messages.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum Target {
    /// E-mail through an SMTP server. The secret is the password.
    Email {
        /// Address of the SMTP server.
        #[schema(max_length = 261, pattern = "^.+:[0-9]+$", example = "mail.example.com:587")]
        server: String,
        /// How the connection is encrypted. `none` is refused together with a user name. Default: `starttls`.
        #[serde(default)]
        tls: MailTls,
        /// Address of the sender.
        #[schema(max_length = 254, example = "vmwatch@example.com")]
        from: String,
        /// Addresses of the recipients.
        #[schema(min_items = 1, max_items = 20, example = json!(["ops@example.com"]))]
        to: Vec<String>,
        /// User name at the SMTP server. Default: none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schema(max_length = 256)]
        user: Option<String>,
    },
    /// A URL to which the JSON of Alertmanager's webhooks is sent (version 4). The secret signs it.
    Webhook {
        #[schema(
            max_length = 2048,
            pattern = "^https?://",
            example = "https://example.com/hook"
        )]
        url: String,
    },
    /// An Alertmanager. The URL is its address without `/api/v2/alerts`. The secret is a bearer token.
    Alertmanager {
        #[schema(
            max_length = 2048,
            pattern = "^https?://",
            example = "http://alertmanager.example.com:9093"
        )]
        url: String,
    },
}

/// What administrators set of a channel, except its secret.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct ChannelSpec {
    /// Name of the channel: 1 to 128 bytes without control characters and without space at its ends.
    #[schema(min_length = 1, max_length = 128)]
    name: String,
    /// Whether the channel sends its messages. The messages of a disabled channel wait.
    enabled: bool,
    target: ChannelTarget,
    /// What the alerts of a message have in common: `vm`, `rule`, or `label:` and the key of a label. Without any, a
    /// message contains all alerts that wait.
    #[serde(default)]
    #[schema(max_items = 8, example = json!(["vm"]))]
    group_by: Vec<String>,
    /// For how many seconds the first alert of a message waits for others. Default: 0.
    #[serde(default = "no_wait")]
    #[schema(value_type = u32, maximum = 3600, default = 0)]
    group_wait_seconds: Number<0, 3600>,
    /// Interval in seconds at which alerts that are still firing are sent again. Default: they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(inline)]
    repeat_seconds: Option<Number<300, 604_800>>,
    /// Interval in seconds of messages that say that vmwatch works, on whose absence the receiver can alert. Default:
    /// none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(inline)]
    heartbeat_seconds: Option<Number<10, 86_400>>,
    /// Template of the text, in the language of Jinja. Default: a text that names VM, condition and culprit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 8192)]
    template: Option<String>,
}

const fn no_wait() -> Number<0, 3600> {
    Number::LEAST
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vmwatch_api::alerts::channels;

    use super::*;

    #[test]
    fn channels_have_the_json_of_the_bus() {
        for target in [
            json!({
                "kind": "email", "server": "mail.example.com:587", "tls": "tls", "from": "vmwatch@example.com",
                "to": ["ops@example.com"], "user": "vmwatch",
            }),
            json!({ "kind": "webhook", "url": "https://example.com/" }),
            json!({ "kind": "alertmanager", "url": "https://example.com/" }),
        ] {
            let channel = json!({
                "name": "ops", "enabled": true, "target": target, "group_by": ["vm", "label:env"], "group_wait_seconds": 5,
                "repeat_seconds": 300, "heartbeat_seconds": 60, "template": "{{ alerts }}",
            });
            let given: ChannelSpec = serde_json::from_value(channel.clone()).unwrap();
            let spec: channels::ChannelSpec = super::super::checked("", &given).unwrap();
            assert_eq!(serde_json::to_value(spec).unwrap(), channel);
        }
        let short = json!({ "name": "ops", "enabled": true, "target": { "kind": "webhook", "url": "https://example.com/" } });
        let given: ChannelSpec = serde_json::from_value(short.clone()).unwrap();
        let spec: channels::ChannelSpec = super::super::checked("", &given).unwrap();
        assert_eq!(spec, serde_json::from_value(short).unwrap());
    }
}
