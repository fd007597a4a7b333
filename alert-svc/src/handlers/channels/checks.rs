//! Rules about the secret of a channel, and the description of its changes for the audit.

use vmwatch_api::alerts::channels::{ChannelSpec, ChannelTarget, MailTls};

use crate::{
    AlertError,
    handlers::{described_change, invalid},
    seal,
    store::StoredChannel,
};

pub(super) fn check_password(spec: &ChannelSpec) -> Result<(), AlertError> {
    match &spec.target {
        ChannelTarget::Email {
            tls: MailTls::None,
            user: Some(_),
            ..
        } => Err(invalid(
            "target: a user name needs an encrypted connection, because the password would be sent in clear",
        )),
        _ => Ok(()),
    }
}

/// Refuses to keep a secret that would be sent to another receiver, or without encryption.
pub(super) fn check_receiver(before: &StoredChannel, new: &ChannelSpec) -> Result<(), AlertError> {
    let is_same = seal::receiver(&before.spec.target) == seal::receiver(&new.target);
    if is_same || before.secret.is_none() {
        return Ok(());
    }
    Err(invalid(
        "secret: the receiver changes, so give the secret again or have it forgotten",
    ))
}

/// Describes for the audit which parts of a channel change, without addresses, which may contain a secret.
pub(super) fn difference(
    old: &ChannelSpec,
    new: &ChannelSpec,
    is_new_secret: bool,
    is_forgotten: bool,
) -> String {
    let parts = [
        (old.target != new.target, "receiver"),
        (is_new_secret, "new secret"),
        (is_forgotten, "secret forgotten"),
        (
            (&old.group_by, old.group_wait_seconds) != (&new.group_by, new.group_wait_seconds),
            "groups",
        ),
        (old.repeat_seconds != new.repeat_seconds, "repeat interval"),
        (old.heartbeat_seconds != new.heartbeat_seconds, "heartbeat"),
        (old.template != new.template, "template"),
    ];
    described_change((&old.name, old.enabled), (&new.name, new.enabled), &parts)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(target: &Value) -> ChannelSpec {
        serde_json::from_value(json!({ "name": "ops", "enabled": true, "target": target })).unwrap()
    }

    fn mail(server: &str, tls: &str, to: &str) -> ChannelSpec {
        spec(&json!({
            "kind": "email", "server": server, "tls": tls, "from": "vmwatch@example.com", "to": [to], "user": "vmwatch",
        }))
    }

    fn with_secret(spec: ChannelSpec) -> StoredChannel {
        StoredChannel {
            id: "0".repeat(32),
            revision: 1,
            spec,
            secret: Some("sealed".to_owned()),
            changed_by: "ann".to_owned(),
            changed_ms: 1,
        }
    }

    #[test]
    fn secret_is_not_kept_for_another_receiver() {
        let before = with_secret(mail("mail.example.com:587", "starttls", "ops@example.com"));
        let is_kept = |new| check_receiver(&before, &new).is_ok();
        assert!(is_kept(mail(
            "mail.example.com:587",
            "starttls",
            "dev@example.com"
        )));
        assert!(!is_kept(mail(
            "evil.example.com:587",
            "starttls",
            "ops@example.com"
        )));
        assert!(!is_kept(mail("mail.example.com:587", "tls", "ops@example.com")));
        assert!(!is_kept(spec(
            &json!({ "kind": "webhook", "url": "https://example.com/" })
        )));
        let without = StoredChannel {
            secret: None,
            ..before.clone()
        };
        assert!(check_receiver(&without, &mail("other:25", "tls", "ops@example.com")).is_ok());
    }

    #[test]
    fn password_is_not_sent_in_clear() {
        assert!(check_password(&mail("mail:25", "none", "ops@example.com")).is_err());
        assert!(check_password(&mail("mail:25", "starttls", "ops@example.com")).is_ok());
    }

    #[test]
    fn audit_of_a_channel_contains_no_address() {
        let old = spec(&json!({ "kind": "webhook", "url": "https://example.com/old-token" }));
        let mut new = spec(&json!({ "kind": "webhook", "url": "https://example.com/new-token" }));
        new.enabled = false;
        assert_eq!(
            difference(&old, &new, true, false),
            "ops: disabled, receiver, new secret"
        );
    }
}
