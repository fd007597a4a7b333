//! Compares the existing configuration of a JetStream stream or consumer with the wanted one, and determines which
//! messages a change would delete.

use std::{collections::BTreeSet, fmt, time::SystemTime};

use async_nats::jetstream::stream::{Config, Info, State};
use serde::Serialize;
use serde_json::Value;

/// Fields to which the NATS server assigns a value if they are absent.
const FILLED_IN: [&str; 6] = [
    "consumer_limits",
    "duplicate_window",
    "first_seq",
    "max_waiting",
    "name",
    "num_replicas",
];
/// Fields that only operators set; they are ignored in the comparison.
const FOREIGN: [&str; 2] = ["metadata", "placement"];

/// A configuration field whose existing value differs from the wanted one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Difference {
    field: String,
    found: Value,
    wanted: Value,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, found, wanted } = self;
        write!(f, "{field} {} -> {}", shown(found), shown(wanted))
    }
}

fn shown(value: &Value) -> String {
    if is_unset(value) {
        "unset".to_owned()
    } else {
        value.to_string()
    }
}

pub(super) fn listed(differences: &[Difference]) -> String {
    let texts: Vec<_> = differences.iter().map(Difference::to_string).collect();
    texts.join(", ")
}

/// The fields that differ between the existing and the wanted configuration.
pub(super) fn differences(
    wanted: &impl Serialize,
    found: &impl Serialize,
) -> Result<Vec<Difference>, serde_json::Error> {
    let (wanted, found) = (serde_json::to_value(wanted)?, serde_json::to_value(found)?);
    let keys = |value: &Value| -> Vec<String> {
        let object = value.as_object();
        object
            .map(|object| object.keys().cloned().collect())
            .unwrap_or_default()
    };
    let fields: BTreeSet<_> = keys(&wanted).into_iter().chain(keys(&found)).collect();
    let differs = |field: String| {
        let (wanted, found) = (wanted.get(&field), found.get(&field));
        let wanted = wanted.cloned().unwrap_or(Value::Null);
        let found = found.cloned().unwrap_or(Value::Null);
        let same = wanted == found || (is_unset(&wanted) && is_unset(&found));
        let foreign = FOREIGN.contains(&field.as_str());
        let filled_in = is_unset(&wanted) && FILLED_IN.contains(&field.as_str());
        (!same && !foreign && !filled_in).then_some(Difference { field, found, wanted })
    };
    Ok(fields.into_iter().filter_map(differs).collect())
}

/// Whether the value means "not set": a limit of 0 or -1, or an absent flag.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => matches!(number.as_i64(), Some(0 | -1)),
        Value::String(text) => text.is_empty() || text == "none",
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// The reasons why lowered limits would delete messages of a stream, one sentence for each.
pub(super) fn losses(wanted: &Config, found: &Info) -> Vec<String> {
    let State { messages, bytes, .. } = found.state;
    let (before, mut losses) = (&found.config, Vec::new());
    let counted = [
        ("max_bytes", wanted.max_bytes, before.max_bytes, bytes, "bytes"),
        (
            "max_msgs",
            wanted.max_messages,
            before.max_messages,
            messages,
            "messages",
        ),
        // The number of messages per subject is unknown, but it cannot exceed the total.
        (
            "max_msgs_per_subject",
            wanted.max_messages_per_subject,
            before.max_messages_per_subject,
            messages,
            "messages",
        ),
    ];
    for (field, limit, limit_before, held, unit) in counted {
        let lowered = limit > 0 && (limit_before <= 0 || limit < limit_before);
        if lowered && u64::try_from(limit).is_ok_and(|limit| held > limit) {
            losses.push(format!(
                "the stream holds {held} {unit}, but {field} would be {limit}"
            ));
        }
    }
    let age = SystemTime::now()
        .duration_since(found.state.first_timestamp.into())
        .unwrap_or_default();
    let lowered = !wanted.max_age.is_zero() && (before.max_age.is_zero() || wanted.max_age < before.max_age);
    if lowered && messages > 0 && age > wanted.max_age {
        losses.push(format!(
            "the stream's oldest message is {} s old, but max_age would be {} s",
            age.as_secs(),
            wanted.max_age.as_secs()
        ));
    }
    losses
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn between(wanted: &Value, found: &Value) -> String {
        listed(&differences(wanted, found).unwrap())
    }

    #[test]
    fn fields_filled_in_by_the_server_do_not_count_as_differences() {
        let wanted = json!({ "max_bytes": 5, "max_msgs": 0, "subjects": ["a"] });
        let found = json!({
            "max_bytes": 5, "max_msgs": -1, "subjects": ["a"], "duplicate_window": 120, "deny_purge": false,
            "compression": "none", "metadata": { "_nats.ver": "2.15.1" }
        });
        assert_eq!(between(&wanted, &found), "");
    }

    #[test]
    fn difference_shows_existing_and_wanted_value() {
        assert_eq!(
            between(
                &json!({ "max_bytes": 5, "duplicate_window": 7, "deny_purge": true }),
                &json!({ "max_bytes": 6, "duplicate_window": 8, "allow_rollup_hdrs": true })
            ),
            "allow_rollup_hdrs true -> unset, deny_purge unset -> true, duplicate_window 8 -> 7, max_bytes 6 -> 5"
        );
    }
}
