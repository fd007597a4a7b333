//! Encodes a stored row as JSON directly from BSON, with exactly the documented keys in the documented order.

use bson::{RawBsonRef, RawDocument};
use metrics::counter;

use crate::MetricsError;

/// Maximum number of keys; each kind of rows has fewer.
const MAX_KEYS: usize = 32;

/// Appends the row as a JSON object with these keys in this order. Null is written for a missing key and for a value of
/// a type that no agent writes, such as a date or a nested document; a metric counts such values.
pub fn push_row(out: &mut Vec<u8>, row: &RawDocument, keys: &[&str]) -> Result<(), MetricsError> {
    let mut slots = [RawBsonRef::Null; MAX_KEYS];
    for element in row {
        let (key, value) = element?;
        if let Some(slot) = keys
            .iter()
            .position(|wanted| *wanted == key.as_str())
            .and_then(|at| slots.get_mut(at))
        {
            *slot = value;
        }
    }
    let mut separator = b'{';
    for (key, value) in keys.iter().zip(slots) {
        out.push(separator);
        separator = b',';
        out.push(b'"');
        out.extend_from_slice(key.as_bytes());
        out.extend_from_slice(b"\":");
        push_value(out, value)?;
    }
    out.push(b'}');
    Ok(())
}

fn push_value(out: &mut Vec<u8>, value: RawBsonRef<'_>) -> Result<(), serde_json::Error> {
    match value {
        // serde_json writes null for a non-finite number, and every other float with a fraction or exponent.
        RawBsonRef::Double(number) => serde_json::to_writer(out, &number),
        RawBsonRef::Int32(number) => serde_json::to_writer(out, &number),
        RawBsonRef::Int64(number) => serde_json::to_writer(out, &number),
        RawBsonRef::String(text) => serde_json::to_writer(out, text),
        RawBsonRef::Boolean(truth) => serde_json::to_writer(out, &truth),
        RawBsonRef::ObjectId(id) => serde_json::to_writer(out, &id.to_hex()),
        RawBsonRef::Null => serde_json::to_writer(out, &()),
        _ => {
            counter!("vmwatch_unreadable_values_total").increment(1);
            serde_json::to_writer(out, &())
        }
    }
}

#[cfg(test)]
mod tests {
    use bson::{DateTime, oid::ObjectId, rawdoc};
    use vmwatch_api::metrics::VM_ROW_KEYS;

    use super::*;

    #[test]
    fn row_json_has_exactly_the_documented_keys() {
        let row = rawdoc! {
            "_id": "58690637594c10403e25b049".parse::<ObjectId>().unwrap(),
            "proc": 95, "mem": 8.6, "net_outgoing": f64::NAN, "cpu_util": 0.0, "disk_read": 7_i64,
            "instance_id": "vm \"1\"", "sampled_at": DateTime::now(), "extra": "x", "disk_write": 1e16,
        };
        let mut out = Vec::new();
        push_row(&mut out, &row, &VM_ROW_KEYS).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            r#"{"net_incoming":null,"disk_write":1e+16,"mem":8.6,"net_outgoing":null,"instance_id":"vm \"1\"","cpu_util":0.0,"disk_read":7,"create_date":null,"_id":"58690637594c10403e25b049","proc":95}"#
        );
    }
}
