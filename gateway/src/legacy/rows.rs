//! Collects the rows of an answer of the documented API. That API has no paging, so the pages that a service sends over
//! the bus are joined here.

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

/// A page as a service sends it. The rows, and the changed parameters for the next page, are not decoded.
#[derive(Deserialize)]
struct Page<'a> {
    #[serde(borrow)]
    rows: &'a RawValue,
    #[serde(borrow, default)]
    next: Option<&'a RawValue>,
}

/// Reads all pages of rows and joins them into one JSON array. The request's deadline covers all pages together.
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

/// Appends the elements of a JSON array to another JSON array that has no closing bracket yet.
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

/// Parameters for the next page: the parameters of this page, with the changes in `next` applied.
fn next_params(params: &[u8], next: &RawValue) -> Result<Vec<u8>, serde_json::Error> {
    let mut fields: BTreeMap<String, &RawValue> = serde_json::from_slice(params)?;
    fields.extend(serde_json::from_str::<BTreeMap<String, &RawValue>>(next.get())?);
    serde_json::to_vec(&fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_all_pages_are_joined_into_one_array() {
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
    fn next_page_parameters_replace_those_of_the_previous_page() {
        let next = RawValue::from_string(r#"{"limit":7,"before":{"id":"x"}}"#.to_owned()).unwrap();
        let params = next_params(br#"{"instance_id":"vm-1","limit":10}"#, &next).unwrap();
        assert_eq!(
            String::from_utf8(params).unwrap(),
            r#"{"before":{"id":"x"},"instance_id":"vm-1","limit":7}"#
        );
    }
}
