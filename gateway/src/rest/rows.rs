//! REST route that exports the stored rows of a VM as JSON Lines or CSV, page by page.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::value::RawValue;
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    InstanceId,
    metrics::Rows,
    processes::ProcessName,
    rows::{RowExport, RowExportQuery, RowFilter, RowKind},
    wire::{Fault, FaultKind},
};

use super::{
    caller::Caller,
    cursors::RowCursor,
    extract::{Number, Path, Query},
    problem::Problem,
    range::range,
    samples::accepted,
    time::Timestamp,
};
use crate::Gateway;

/// Header with the value of `cursor` for the next page. The body has no place for it in CSV.
const NEXT_CURSOR: HeaderName = HeaderName::from_static("x-next-cursor");
const JSON_LINES: &str = "application/x-ndjson";
const CSV: &str = "text/csv";

/// Format in which rows are exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum RowFormat {
    /// Each line is a JSON object.
    JsonLines,
    /// The answer has comma-separated values (RFC 4180); only the first page has a header line.
    Csv,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct RowsQuery {
    /// Which rows to return: those of the VM, of its processes or of its filesystems, or those that its hypervisor measured
    /// of the VM. Default: those of the VM.
    #[serde(default)]
    #[param(value_type = Option<RowKind>)]
    kind: RowKind,
    /// Start of the time range. Default: one hour before its end.
    from: Option<Timestamp>,
    /// End of the time range. Default: now.
    to: Option<Timestamp>,
    /// Return only rows of processes with exactly this name; not together with `pid`.
    name: Option<ProcessName>,
    /// Return only rows of processes with this pid; not together with `name`.
    #[param(inline)]
    pid: Option<Number<0, { u32::MAX as u64 }>>,
    /// Format of the answer. Default: determined by the `Accept` header, or JSON Lines.
    format: Option<RowFormat>,
    /// The `X-Next-Cursor` header of the previous page; requires the same `kind`, `from`, `to`, `name` and `pid`.
    cursor: Option<RowCursor>,
}

impl RowsQuery {
    fn filter(&self) -> Result<Option<RowFilter>, Problem> {
        let filter = match (&self.name, self.pid) {
            (None, None) => return Ok(None),
            (Some(name), None) => RowFilter::Name(name.clone()),
            (None, Some(pid)) => RowFilter::Pid(u32::try_from(pid.get()).unwrap_or(u32::MAX)),
            (Some(_), Some(_)) => {
                return Err(Problem::contradictory("query: give either name or pid, not both"));
            }
        };
        match self.kind {
            RowKind::Process => Ok(Some(filter)),
            RowKind::Vm | RowKind::Filesystem | RowKind::Hypervisor => Err(Problem::contradictory(
                "query: name and pid select processes, so they require kind=process",
            )),
        }
    }
}

/// Export stored rows
///
/// Returns a page of the rows in the time range as they are stored, oldest first, with the keys of the API of 2017; rows
/// of VMs also have the measures that only this API has, and only this API has rows of filesystems and of hypervisors. While the answer has the header `X-Next-Cursor`, there are more:
/// request the next page with it as `cursor`. A page may have few rows or none without being the last. The pages, one
/// after another, are one JSON Lines or CSV file. In CSV, a null is empty, and a text that a spreadsheet would take for a formula begins with an apostrophe.
#[utoipa::path(
    get, path = "/vms/{instance_id}/rows", tag = "vms", operation_id = "vm_rows",
    params(("instance_id" = InstanceId, Path, description = "VM id"), RowsQuery),
    responses(
        (status = OK, description = "a page of rows",
         headers(("X-Next-Cursor" = RowCursor, description = "The value of `cursor` for the next page; absent on the last page.")),
         content((String = "application/x-ndjson"), (String = "text/csv"))),
        (status = UNPROCESSABLE_ENTITY, response = super::openapi::Contradictory),
    ),
)]
pub(super) async fn rows(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(query): Query<RowsQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let filter = query.filter()?;
    let range = range(query.from, query.to)?;
    let is_first = query.cursor.is_none();
    let request = RowExportQuery {
        instance_id,
        kind: query.kind,
        filter,
        range,
        after: query.cursor.map(|cursor| cursor.0),
    };
    let page = caller.ask::<RowExport>(&gateway, &request).await?;
    let (media_type, text) = match query.format.unwrap_or_else(|| preferred(&headers)) {
        RowFormat::JsonLines => (JSON_LINES, json_lines(&page.rows)),
        RowFormat::Csv => (CSV, csv(&page.rows, query.kind, is_first)),
    };
    let text = text.map_err(|error| {
        Fault::new(FaultKind::Internal, "an internal error occurred; it was logged").caused_by(error)
    })?;
    let mut response = ([(header::CONTENT_TYPE, media_type)], text).into_response();
    let next = page.next.map(|next| RowCursor(next).to_string());
    let next = next.and_then(|next| HeaderValue::from_str(&next).ok());
    response
        .headers_mut()
        .extend(next.map(|next| (NEXT_CURSOR, next)));
    Ok(response)
}

fn preferred(headers: &HeaderMap) -> RowFormat {
    let known = accepted(headers, |essence| match essence {
        CSV => Some(RowFormat::Csv),
        JSON_LINES | "application/jsonl" => Some(RowFormat::JsonLines),
        _ => None,
    });
    known.unwrap_or(RowFormat::JsonLines)
}

fn json_lines(rows: &Rows) -> serde_json::Result<String> {
    let rows: Vec<&RawValue> = serde_json::from_str(rows.as_json())?;
    let mut out = String::new();
    for row in rows {
        out.push_str(row.get());
        out.push('\n');
    }
    Ok(out)
}

/// A row whose values are the texts of the JSON, in the order in which the service has written them.
#[derive(Deserialize)]
#[serde(transparent)]
struct Cells<'a>(#[serde(borrow)] std::collections::HashMap<&'a str, &'a RawValue>);

fn csv(rows: &Rows, kind: RowKind, with_header: bool) -> serde_json::Result<String> {
    let keys = kind.export_keys();
    let mut out = String::new();
    if with_header {
        out.push_str(&keys.join(","));
        out.push_str("\r\n");
    }
    let rows: Vec<Cells<'_>> = serde_json::from_str(rows.as_json())?;
    for Cells(row) in rows {
        for (index, key) in keys.iter().enumerate() {
            if index > 0 {
                out.push(',');
            }
            match row.get(key).map_or("null", |value| value.get()) {
                "null" => {}
                text if text.starts_with('"') => push_text(&mut out, &serde_json::from_str::<String>(text)?),
                number => out.push_str(number),
            }
        }
        out.push_str("\r\n");
    }
    Ok(out)
}

/// Writes a text as a cell. Guests choose the names of their processes, so a text that a spreadsheet would take for a formula
/// gets an apostrophe before it.
fn push_text(out: &mut String, text: &str) {
    let is_formula = text.starts_with(['=', '+', '-', '@', '\t', '\r', '\n']);
    let mark = if is_formula { "'" } else { "" };
    if text.contains([',', '"', '\r', '\n']) {
        out.extend(["\"", mark, &text.replace('"', "\"\""), "\""]);
    } else {
        out.extend([mark, text]);
    }
}

#[cfg(test)]
mod tests {
    use vmwatch_api::metrics::PROCESS_ROW_KEYS;

    use super::*;

    #[test]
    fn csv_cells_are_quoted_and_never_formulas() {
        for (text, cell) in [
            ("nginx", "nginx"),
            ("a,b", "\"a,b\""),
            ("say \"hi\"", "\"say \"\"hi\"\"\""),
            ("two\r\nlines", "\"two\r\nlines\""),
            ("=1+1", "'=1+1"),
            ("@x,y", "\"'@x,y\""),
            ("-e", "'-e"),
            ("\tx", "'\tx"),
            ("kworker/0:1-mm", "kworker/0:1-mm"),
            ("", ""),
        ] {
            let mut out = String::new();
            push_text(&mut out, text);
            assert_eq!(out, cell, "{text:?}");
        }
    }

    #[test]
    fn csv_has_values_of_each_row_in_the_order_of_the_header() {
        let rows = r#"[{"net_incoming":0.6,"shutdown_time":null,"mem":-1e-7,"net_outgoing":5.0,"cmd":"a\"b","pid":479,"instance_id":"vm-1","disk_write":0.0,"disk_read":0.0,"create_date":"2017-01-01T21:37:59.001065","_id":"58690637594c10403e25b048","cpu_util":12345678901234567890,"running_time":1482236516.07}]"#;
        let rows = Rows::from_json(rows.to_owned()).unwrap();
        let line = "0.6,,-1e-7,5.0,\"a\"\"b\",479,vm-1,0.0,0.0,2017-01-01T21:37:59.001065,58690637594c10403e25b048,12345678901234567890,1482236516.07\r\n";
        assert_eq!(csv(&rows, RowKind::Process, false).unwrap(), line);
        let with_header = csv(&rows, RowKind::Process, true).unwrap();
        assert_eq!(with_header, format!("{}\r\n{line}", PROCESS_ROW_KEYS.join(",")));
        assert!(
            json_lines(&rows)
                .unwrap()
                .ends_with("\"running_time\":1482236516.07}\n")
        );
    }
}
