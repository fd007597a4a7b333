//! Decodes the messages of agents.

use std::time::SystemTime;

use async_nats::{HeaderMap, HeaderValue, jetstream::Message};
use vmwatch_api::{
    agents::{RUN_ID, RunId, SENT_AT, Sender, UTC_OFFSET},
    metrics::{CONTENT_TYPE, SAMPLE_PART_BYTES, SAMPLE_SUBJECT_PREFIX, Sample},
    time::UtcOffset,
};
use vmwatch_blocks::{SAMPLE_CONTENT_TYPE, SAMPLE_LIMITS, decode_sample};

use crate::documents::{Documents, micros_of};

/// Decodes and validates a message, or states why it is refused for good.
pub(super) fn read(message: &Message, offset: UtcOffset) -> Result<Documents, String> {
    if message.payload.len() > SAMPLE_PART_BYTES {
        return Err(format!("the message is larger than {SAMPLE_PART_BYTES} bytes"));
    }
    let sample = decode(content_type(message), &message.payload)?;
    if message.subject.strip_prefix(SAMPLE_SUBJECT_PREFIX) != Some(sample.instance_id.as_str()) {
        return Err("instance_id differs from the VM in the message's subject".to_owned());
    }
    let arrival = message
        .info()
        .map_or_else(|_| SystemTime::now(), |info| info.published.into());
    let mut documents =
        Documents::from_sample(&sample, offset, arrival).map_err(|refusal| refusal.to_string())?;
    documents.sender = message.headers.as_ref().map(|headers| sender(headers, arrival));
    Ok(documents)
}

/// Decodes the sender from the headers of a message. Headers that cannot be decoded count as missing.
fn sender(headers: &HeaderMap, arrival: SystemTime) -> Sender {
    let text = |name| headers.get(name).map(HeaderValue::as_str);
    let arrived_ms = u64::try_from(micros_of(arrival) / 1000).unwrap_or(0);
    let sent_ms = text(SENT_AT).and_then(|text| text.parse::<u64>().ok());
    Sender {
        arrived_ms,
        clock_ahead_ms: sent_ms.and_then(|sent_ms| sent_ms.checked_signed_diff(arrived_ms)),
        utc_offset: text(UTC_OFFSET).and_then(|text| text.parse().ok()),
        run_id: text(RUN_ID).and_then(RunId::from_header),
    }
}

/// The `Content-Type` of a message.
pub(super) fn content_type(message: &Message) -> Option<&str> {
    let value = message.headers.as_ref()?.get(CONTENT_TYPE)?;
    Some(value.as_str())
}

fn decode(content_type: Option<&str>, body: &[u8]) -> Result<Sample, String> {
    match content_type {
        None => serde_json::from_slice(body).map_err(|error| format!("the message is not a sample: {error}")),
        Some(SAMPLE_CONTENT_TYPE) => decode_sample(body, SAMPLE_LIMITS)
            .map_err(|error| format!("the message is not a sample: {error}")),
        Some(_) => Err(format!(
            "the Content-Type of the message is unknown; send {SAMPLE_CONTENT_TYPE}, or JSON without a Content-Type"
        )),
    }
}

#[cfg(test)]
mod tests {
    use vmwatch_blocks::{Encoder, encode_sample};

    use super::*;

    #[test]
    fn sample_is_the_same_in_either_encoding() {
        let json = r#"{"instance_id":"vm-1","create_date":"2017-01-01T21:37:59.001065","part":1,"net_incoming":0.6,"net_outgoing":5.7,"vm":{"cpu_util":0.0,"mem":8.6,"disk_read":0.0,"disk_write":128.8,"proc":95},"processes":[{"cmd":"lvmetad","pid":479,"cpu_util":0.0,"mem":0.2,"disk_read":0.0,"disk_write":0.0,"running_time":1482236515.63}]}"#;
        let sample = decode(None, json.as_bytes()).unwrap();
        let encoded = encode_sample(&sample, &mut Encoder::new().unwrap()).unwrap();
        assert_eq!(decode(Some(SAMPLE_CONTENT_TYPE), &encoded).unwrap(), sample);
        for (content_type, body) in [
            (None, encoded.as_slice()),
            (Some(SAMPLE_CONTENT_TYPE), json.as_bytes()),
            (Some("application/json"), json.as_bytes()),
        ] {
            assert!(decode(content_type, body).is_err(), "{content_type:?}");
        }
    }
}
