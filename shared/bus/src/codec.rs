//! Encodes and decodes request parameters and reply envelopes.

use vmwatch_api::wire::{Envelope, Fault, FaultKind};

/// Decodes request parameters. The fault names the invalid field and the violated rule, but never repeats the input.
pub(super) fn decode<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    let mut json = serde_json::Deserializer::from_slice(body);
    serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner().to_string();
        // `serde_json` appends a position within the NATS message. It is removed because the caller did not write that
        // message.
        let rule = inner
            .rsplit_once(" at line ")
            .map_or(inner.as_str(), |(rule, _)| rule);
        let text = if path == "." {
            rule.to_owned()
        } else {
            format!("{path} {rule}")
        };
        Fault::new(FaultKind::Invalid, text.replace('`', ""))
    })
}

pub(super) fn encode<T: serde::Serialize>(envelope: &Envelope<T>) -> Result<Vec<u8>, Fault> {
    serde_json::to_vec(envelope)
        .map_err(|error| Fault::new(FaultKind::Internal, "the reply could not be encoded").caused_by(error))
}

pub(super) fn fault_bytes(fault: &Fault) -> Vec<u8> {
    // Encoding cannot fail, because a fault has only text and number fields.
    serde_json::to_vec(&Envelope::<()>::fault(fault)).unwrap_or_default()
}

pub(super) fn bytes_of(outcome: Result<Vec<u8>, Fault>) -> Vec<u8> {
    outcome.unwrap_or_else(|fault| fault_bytes(&fault))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmwatch_api::metrics::Latest;

    #[test]
    fn decoding_error_names_field_and_rule_but_not_the_input() {
        for (body, text) in [
            (
                r#"{"instance_id":{"$gt":"hunter2"}}"#,
                "instance_id must be 1 to 64 characters",
            ),
            (
                r#"{"instance_id":"a","limit":0}"#,
                "limit must be an integer from 1 to 1000",
            ),
            (r#"{"limit":1}"#, "missing field instance_id"),
        ] {
            let fault = decode::<Latest>(body.as_bytes()).unwrap_err();
            assert!(fault.message.starts_with(text), "{}", fault.message);
            assert!(!fault.message.contains("hunter2") && !fault.message.contains("line"));
        }
    }
}
