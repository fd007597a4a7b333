//! Properties that hold for any bytes: checked by `./dev fuzz` with generated input, and in the tests with the corpus.

use std::time::SystemTime;

use gateway::legacy::{python_repr::rows_to_python, read_request};
use metrics_svc::documents::Documents;
use serde_json::Value;
use vmwatch_api::{metrics::Sample, time::UtcOffset};

/// A body of the documented API: a body that is passed on to a service is one JSON object with a limit within its
/// range.
pub fn request(body: &[u8]) {
    let Some(Ok(params)) = read_request(body) else {
        return;
    };
    let params: Value = serde_json::from_slice(&params).expect("the forwarded body is JSON");
    let limit = params["limit"].as_u64().expect("with a limit");
    assert!((1..=1000).contains(&limit), "{params}");
}

/// Rows of a service's reply: they are converted to an array of as many ASCII texts.
pub fn python_repr(rows: &[u8]) {
    let Ok(rows) = std::str::from_utf8(rows) else {
        return;
    };
    let Ok(shown) = rows_to_python(rows) else { return };
    assert!(shown.is_ascii(), "{shown}");
    let shown: Vec<String> = serde_json::from_str(&shown).expect("an array of texts");
    let sent: Vec<Value> = serde_json::from_str(rows).expect("the converted rows were an array");
    assert_eq!(shown.len(), sent.len());
    assert!(
        shown.iter().all(|row| row.starts_with('{') && row.ends_with('}')),
        "{shown:?}"
    );
}

/// A message of an agent: an accepted message survives encoding and decoding, and becomes one document per row.
pub fn sample(message: &[u8]) {
    let Ok(sample) = serde_json::from_slice::<Sample>(message) else {
        return;
    };
    let encoded = serde_json::to_vec(&sample).expect("a sample encodes");
    let again: Sample = serde_json::from_slice(&encoded).expect("and decodes");
    assert_eq!(serde_json::to_vec(&again).expect("it encodes"), encoded);
    let offset: UtcOffset = "+08:00".parse().expect("an offset");
    if let Ok(documents) = Documents::from_sample(&sample, offset, SystemTime::now()) {
        assert_eq!(documents.processes.len(), sample.processes.len());
        assert_eq!(documents.vms.len(), usize::from(sample.vm.is_some()));
    }
}
