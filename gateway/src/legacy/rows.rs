//! Collects the rows of a documented answer. The documented API has no paging, so all pages from the bus are joined
//! here.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;
use vmwatch_api::{
    MethodInfo,
    wire::{Envelope, Fault},
};
use vmwatch_bus::Context;

use super::unreadable;
use crate::Gateway;

/// A page as a service sends it; rows and the next page's parameters stay undecoded.
#[derive(Deserialize)]
struct Page<'a> {
    #[serde(borrow)]
    rows: &'a RawValue,
    #[serde(borrow, default)]
    next: Option<&'a RawValue>,
}

/// Reads all pages, as one JSON array. The request's deadline covers all of them together.
pub(super) async fn read_all(
    gateway: &Gateway,
    info: &MethodInfo,
    context: &Context,
    params: Vec<u8>,
) -> Result<String, Fault> {
    let mut params = Bytes::from(params);
    let mut rows = String::new();
    loop {
        let reply = gateway.bus.forward(info, context, params.clone()).await?;
        let envelope: Envelope<Page<'_>> = serde_json::from_slice(&reply).map_err(unreadable)?;
        let page = envelope.into_result()?;
        append(&mut rows, page.rows.get());
        let Some(next) = page.next else {
            rows.push(']');
            return Ok(rows);
        };
        params = next_params(&params, next).map_err(unreadable)?.into();
    }
}

/// Appends the elements of a JSON array to an array that is not closed yet.
fn append(all: &mut String, array: &str) {
    let elements = array.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let elements = elements.unwrap_or_default();
    match (all.is_empty(), elements.is_empty()) {
        (true, _) => all.push('['),
        (false, false) => all.push(','),
        (false, true) => {}
    }
    all.push_str(elements);
}

/// The parameters of the next page: those of this page, with the changes in `next` applied.
fn next_params(params: &[u8], next: &RawValue) -> Result<Vec<u8>, serde_json::Error> {
    let mut fields: BTreeMap<String, &RawValue> = serde_json::from_slice(params)?;
    fields.extend(serde_json::from_str::<BTreeMap<String, &RawValue>>(next.get())?);
    serde_json::to_vec(&fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_the_elements_of_pages() {
        for (pages, whole) in [
            (&["[]"][..], "["),
            (&[r#"[{"a":1}]"#], r#"[{"a":1}"#),
            (
                &[r#"[{"a":1},{"a":2}]"#, "[]", r#"[{"a":3}]"#],
                r#"[{"a":1},{"a":2},{"a":3}"#,
            ),
        ] {
            let mut all = String::new();
            for page in pages {
                append(&mut all, page);
            }
            assert_eq!(all, whole);
        }
    }

    #[test]
    fn applies_the_changes_for_the_next_page() {
        let next = RawValue::from_string(r#"{"limit":7,"before":{"id":"x"}}"#.to_owned()).unwrap();
        let params = next_params(br#"{"instance_id":"vm-1","limit":10}"#, &next).unwrap();
        assert_eq!(
            String::from_utf8(params).unwrap(),
            r#"{"before":{"id":"x"},"instance_id":"vm-1","limit":7}"#
        );
    }
}
