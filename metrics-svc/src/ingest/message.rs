//! Decodes the messages of agents and of lifecycle-svc. The subject of a message says which of them sent it.

use std::time::SystemTime;

use async_nats::{HeaderMap, HeaderValue, jetstream::Message};
use vmwatch_api::{
    agents::{RUN_ID, RunId, SENT_AT, Sender, UTC_OFFSET},
    events::{UnstoredEvent, UnstoredReason},
    hypervisor_samples::{HYPERVISOR_SAMPLE_BYTES, HYPERVISOR_SAMPLE_SUBJECT_PREFIX, HypervisorSample},
    metrics::{CONTENT_TYPE, SAMPLE_PART_BYTES, SAMPLE_SUBJECT_PREFIX, Sample},
    time::UtcOffset,
};
use vmwatch_blocks::{SAMPLE_CONTENT_TYPE, SAMPLE_LIMITS, decode_sample};

use super::expired;
use crate::{
    documents::{Documents, Refusal, millis_of},
    row_retention::RowRetention,
};

const OTHER_VM: &str = "instance_id differs from the VM in the message's subject";

/// Why a message is refused for good.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) reason: String,
    /// The live event about the refusal; `None` if the time of the sample is not the reason.
    pub(super) event: Option<UnstoredEvent>,
}

impl From<String> for Refused {
    fn from(reason: String) -> Self {
        Self { reason, event: None }
    }
}

/// The VM in the subject of an agent's or a hypervisor's sample; `None` for any other subject.
pub(super) fn instance_of(subject: &str) -> Option<&str> {
    subject
        .strip_prefix(SAMPLE_SUBJECT_PREFIX)
        .or_else(|| subject.strip_prefix(HYPERVISOR_SAMPLE_SUBJECT_PREFIX))
}

/// Decodes and validates a message, and removes the rows that are past their retention.
pub(super) fn read(
    message: &Message,
    offset: UtcOffset,
    retention: &RowRetention,
) -> Result<Documents, Refused> {
    let arrival = message
        .info()
        .map_or_else(|_| SystemTime::now(), |info| info.published.into());
    match message.subject.strip_prefix(HYPERVISOR_SAMPLE_SUBJECT_PREFIX) {
        Some(instance) => read_of_hypervisor(instance, message, offset, arrival, retention),
        None => read_of_agent(message, offset, arrival, retention),
    }
}

fn read_of_hypervisor(
    instance: &str,
    message: &Message,
    offset: UtcOffset,
    arrival: SystemTime,
    retention: &RowRetention,
) -> Result<Documents, Refused> {
    if message.payload.len() > HYPERVISOR_SAMPLE_BYTES {
        return Err(format!("the message is larger than {HYPERVISOR_SAMPLE_BYTES} bytes").into());
    }
    let sample: HypervisorSample = serde_json::from_slice(&message.payload)
        .map_err(|error| format!("the message is not a sample of a hypervisor: {error}"))?;
    if instance != sample.instance_id.as_str() {
        return Err(OTHER_VM.to_owned().into());
    }
    let mut documents =
        Documents::from_hypervisor_sample(&sample, offset, arrival).map_err(|refusal| refusal.to_string())?;
    expired::remove(&mut documents, &sample.instance_id, retention, arrival);
    Ok(documents)
}

fn read_of_agent(
    message: &Message,
    offset: UtcOffset,
    arrival: SystemTime,
    retention: &RowRetention,
) -> Result<Documents, Refused> {
    if message.payload.len() > SAMPLE_PART_BYTES {
        return Err(format!("the message is larger than {SAMPLE_PART_BYTES} bytes").into());
    }
    let sample = decode(content_type(message), &message.payload)?;
    if message.subject.strip_prefix(SAMPLE_SUBJECT_PREFIX) != Some(sample.instance_id.as_str()) {
        return Err(OTHER_VM.to_owned().into());
    }
    let mut documents = Documents::from_sample(&sample, offset, arrival)
        .map_err(|refusal| refused(&sample, &refusal, arrival))?;
    expired::remove(&mut documents, &sample.instance_id, retention, arrival);
    documents.sender = Some(sender(message.headers.as_ref(), arrival));
    Ok(documents)
}

fn refused(sample: &Sample, refusal: &Refusal, arrival: SystemTime) -> Refused {
    let event = match refusal {
        Refusal::Ahead(at) => Some(UnstoredEvent {
            instance_id: sample.instance_id.clone(),
            at_ms: millis_of(*at),
            arrived_ms: millis_of(arrival),
            reason: UnstoredReason::Ahead,
        }),
        _ => None,
    };
    Refused {
        reason: refusal.to_string(),
        event,
    }
}

/// Decodes the sender from the headers of a message. Headers that cannot be decoded count as missing.
fn sender(headers: Option<&HeaderMap>, arrival: SystemTime) -> Sender {
    let text = |name| headers?.get(name).map(HeaderValue::as_str);
    let arrived_ms = millis_of(arrival);
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
