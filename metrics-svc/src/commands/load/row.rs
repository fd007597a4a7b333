//! Parses the rows of an export.

use bson::{Bson, Document, RawDocumentBuf};
use vmwatch_api::{
    InstanceId,
    time::{CreateDate, UtcOffset},
};
use vmwatch_blocks::RowIdentity;

use crate::{
    documents::{micros_of, row_id},
    store::RowKind,
};

/// A row of an export.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) kind: RowKind,
    pub(super) instance: InstanceId,
    /// Time of `create_date`, Unix microseconds.
    pub(super) at: i64,
    pub(super) document: RawDocumentBuf,
}

/// Parses a JSON object into a row with the documented fields, and adds an `_id` if the row has none.
pub(super) fn parse(object: &[u8], offset: UtcOffset) -> Result<Row, String> {
    let json: serde_json::Value =
        serde_json::from_slice(object).map_err(|error| format!("it is not JSON: {error}"))?;
    let bson = Bson::try_from(json).map_err(|error| format!("it is not Extended JSON: {error}"))?;
    let Bson::Document(mut row) = bson else {
        return Err("it is not a JSON object".to_owned());
    };
    let text = |key: &str| {
        row.get_str(key)
            .map_err(|_| format!("`{key}` is missing or not a string"))
    };
    let instance: InstanceId = text("instance_id")?
        .parse()
        .map_err(|error| format!("instance_id {error}"))?;
    let date: CreateDate = text("create_date")?
        .parse()
        .map_err(|error| format!("create_date {error}"))?;
    let (kind, identity) = if row.contains_key("pid") {
        let started = number(&row, "running_time").unwrap_or(0.0);
        let pid = match row.get("pid") {
            Some(Bson::Int32(pid)) => u32::try_from(*pid).ok(),
            Some(Bson::Int64(pid)) => u32::try_from(*pid).ok(),
            _ => None,
        };
        let pid = pid.ok_or("`pid` is not a process id")?;
        (RowKind::Process, RowIdentity::Process { pid, started })
    } else if row.contains_key("proc") {
        (RowKind::Vm, RowIdentity::Vm)
    } else {
        return Err(
            "it is neither a process row, because it has no `pid`, nor a VM row, because it has no `proc`"
                .to_owned(),
        );
    };
    let moment = date
        .moment(offset)
        .map_err(|error| format!("create_date {error}"))?;
    let at = micros_of(moment);
    if !row.contains_key("_id") {
        let second = at.div_euclid(1_000_000);
        row.insert("_id", row_id(instance.as_str(), date.as_str(), second, identity));
    }
    let document = RawDocumentBuf::try_from(&row).map_err(|error| error.to_string())?;
    Ok(Row {
        kind,
        instance,
        at,
        document,
    })
}

fn number(row: &Document, key: &str) -> Option<f64> {
    match row.get(key)? {
        Bson::Double(number) => Some(*number),
        Bson::Int32(number) => Some(f64::from(*number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<(RowKind, Document), String> {
        let row = parse(line.as_bytes(), "+08:00".parse().unwrap())?;
        Ok((row.kind, row.document.try_into().unwrap()))
    }

    #[test]
    fn loaded_rows_keep_ids_and_types_of_the_export() {
        let line = r#"{"_id":{"$oid":"58690637594c10403e25b049"},"instance_id":"vm","create_date":"2017-01-01T21:37:59.680873","proc":95,"mem":{"$numberDouble":"8.0"}}"#;
        let (kind, row) = read(line).unwrap();
        assert_eq!(kind, RowKind::Vm);
        assert_eq!(
            row.get_object_id("_id").unwrap().to_hex(),
            "58690637594c10403e25b049"
        );
        assert_eq!(
            (row.get_i32("proc").unwrap(), row.get_f64("mem").unwrap()),
            (95, 8.0)
        );
    }

    #[test]
    fn loaded_row_without_id_gets_the_id_that_ingestion_would_give() {
        let line = r#"{"instance_id":"vm-1","create_date":"2017-01-01T21:37:59.001065","proc":95}"#;
        let (_, row) = read(line).unwrap();
        assert_eq!(
            row.get_object_id("_id").unwrap().to_hex(),
            "586906378b3cb134ee7c3336"
        );
    }

    #[test]
    fn object_that_is_no_row_is_rejected_with_reason() {
        for (line, reason) in [
            ("{", "it is not JSON"),
            ("[1]", "it is not a JSON object"),
            (
                r#"{"create_date":"2017-01-01T21:37:59.001065","proc":1}"#,
                "`instance_id` is missing",
            ),
            (
                r#"{"instance_id":"a.b","create_date":"2017-01-01T21:37:59.001065","proc":1}"#,
                "instance_id must",
            ),
            (
                r#"{"instance_id":"a","create_date":"2017-1-01T21:37:58.999841","proc":1}"#,
                "create_date must",
            ),
            (
                r#"{"instance_id":"a","create_date":"2017-01-01T21:37:59.001065"}"#,
                "it is neither",
            ),
            (
                r#"{"instance_id":"a","create_date":"2017-01-01T21:37:59.001065","pid":"1"}"#,
                "`pid`",
            ),
        ] {
            let error = read(line).unwrap_err();
            assert!(error.starts_with(reason), "{line}: {error}");
        }
    }
}
