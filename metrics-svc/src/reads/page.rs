//! Reads a page of the newest rows as JSON.

use std::time::SystemTime;

use bson::cstr;
use vmwatch_api::{
    InstanceId, PageRoom,
    metrics::{
        FILESYSTEM_ROW_KEYS, Limit, NextRows, PROCESS_ROW_KEYS, RowId, RowPage, RowPosition, Rows,
        VM_ROW_KEYS,
    },
};

use super::{Budget, Most, Newest, Only, Order, Query, Row, newest::two_hours_before};
use crate::{
    MetricsError,
    deadline::Deadline,
    documents::micros_of,
    instances::last_report,
    row_json,
    store::{RowKind, RowStore},
};

/// The `create_date` that sorts before all others.
pub(super) const FIRST_DATE: &str = "0000-01-01T00:00:00";

/// A query for a page of the newest rows of a VM.
#[derive(Debug, Clone, Copy)]
pub struct PageQuery<'a> {
    /// Which rows to read. Rows of hypervisors get the keys of VM rows.
    pub kind: RowKind,
    /// The VM whose rows to read.
    pub instance: &'a InstanceId,
    /// Only rows of processes with this name.
    pub cmd: Option<&'a str>,
    /// Maximum number of rows in the answer.
    pub limit: Limit,
    /// Only rows that come after this row in the answer, so that they are older.
    pub before: Option<&'a RowPosition>,
}

impl RowStore {
    /// Reads a page of the newest rows, newest first, as a JSON array in the documented key order.
    ///
    /// The search begins with the last two hours. If they have no rows, it continues with the two hours before the VM's
    /// last report, and then with everything older.
    pub async fn latest(&self, page: PageQuery<'_>, deadline: Deadline) -> Result<RowPage, MetricsError> {
        let columns: &[&str] = match page.kind {
            RowKind::Vm | RowKind::Hypervisor => &VM_ROW_KEYS,
            RowKind::Process => &PROCESS_ROW_KEYS,
            RowKind::Filesystem => &FILESYSTEM_ROW_KEYS,
        };
        let mut query = Query::new(page.kind, page.instance, columns).without_sums();
        if let Some(cmd) = page.cmd {
            query = query.only(Only::named(cmd));
        }
        let after = page.before.map(position_key).transpose()?;
        let limit = usize::from(page.limit.get());
        let most = Most {
            rows: limit,
            after: after
                .as_ref()
                .map(|(effective, date, id)| (*effective, date.as_str(), Some(*id))),
        };
        let mut newest = Newest::new(most, Order::Newest);
        let mut budget = Budget::of_request(self);
        let end = after.as_ref().map(|(effective, ..)| effective.saturating_add(1));
        let mut since = two_hours_before(end.unwrap_or_else(|| micros_of(SystemTime::now())));
        query.time = since..end.unwrap_or(i64::MAX);
        newest.read(self, &query, &mut budget, deadline).await?;
        if newest.is_empty()
            && end.is_none()
            && let Some(last) = last_report(self, page.kind, page.instance, deadline).await?
        {
            let before = two_hours_before(micros_of(last)).min(since);
            query.time = before..since;
            newest.read(self, &query, &mut budget, deadline).await?;
            since = before;
        }
        self.read_older(&mut newest, query, since, &mut budget, deadline)
            .await?;
        let end = newest.ended_at.map(end_position).transpose()?;
        let mut rows = newest.into_rows();
        if page.kind == RowKind::Hypervisor {
            rows.iter_mut().for_each(fill_in);
        }
        into_page(columns, limit, &rows, end)
    }
}

/// Gives the row of a hypervisor the values that the documented API requires and hypervisors do not know.
fn fill_in(row: &mut Row) {
    for key in [
        cstr!("net_incoming"),
        cstr!("disk_write"),
        cstr!("mem"),
        cstr!("net_outgoing"),
        cstr!("cpu_util"),
        cstr!("disk_read"),
    ] {
        if !matches!(row.document.get(key), Ok(Some(_))) {
            row.document.append(key, 0.0);
        }
    }
    row.document.append(cstr!("proc"), 0_i32);
}

/// Encodes as many rows as fit on a page. `end` is where the page ends in any case.
fn into_page(
    keys: &[&str],
    limit: usize,
    rows: &[Row],
    end: Option<RowPosition>,
) -> Result<RowPage, MetricsError> {
    let (json, on_page) = encode(keys, limit, rows)?;
    let last = on_page.checked_sub(1).and_then(|last| rows.get(last));
    let next = if on_page < rows.len() {
        last.map(position).transpose()?
    } else {
        end
    };
    let left = Limit::new((limit - on_page) as u64);
    Ok(RowPage {
        rows: json,
        next: left.zip(next).map(|(limit, before)| NextRows { limit, before }),
    })
}

/// Encodes as many rows as fit on a page of `limit` rows, with these keys; returns their number, too.
pub(super) fn encode(keys: &[&str], limit: usize, rows: &[Row]) -> Result<(Rows, usize), MetricsError> {
    let mut json = Vec::from(b"[");
    let mut room = PageRoom::new(limit);
    let mut on_page = 0;
    for row in rows {
        let before = json.len();
        if before > 1 {
            json.push(b',');
        }
        row_json::push_row(&mut json, &row.document, keys)?;
        if !room.take(json.len() - before) {
            json.truncate(before);
            break;
        }
        on_page += 1;
    }
    json.push(b']');
    let text = String::from_utf8(json)
        .map_err(|error| MetricsError::Io(std::io::Error::new(std::io::ErrorKind::InvalidData, error)))?;
    Ok((Rows::from_json(text)?, on_page))
}

fn position(row: &Row) -> Result<RowPosition, MetricsError> {
    let id = row.object_id().and_then(|id| RowId::new(&id.to_hex()));
    Ok(RowPosition {
        effective_us: row.effective,
        create_date: row.create_date.parse().map_err(|_| MetricsError::NoCursor)?,
        id: id.ok_or(MetricsError::NoCursor)?,
    })
}

/// The position after all rows with a later effective date than this.
fn end_position(effective: i64) -> Result<RowPosition, MetricsError> {
    let first_date = FIRST_DATE.parse().map_err(|_| MetricsError::NoCursor)?;
    Ok(RowPosition {
        effective_us: effective.saturating_add(1),
        create_date: first_date,
        id: RowId::new(&"0".repeat(24)).ok_or(MetricsError::NoCursor)?,
    })
}

fn position_key(position: &RowPosition) -> Result<(i64, String, vmwatch_blocks::RowId), MetricsError> {
    let id: bson::oid::ObjectId = position.id.as_str().parse().map_err(|_| MetricsError::NoCursor)?;
    Ok((
        position.effective_us,
        position.create_date.to_string(),
        id.bytes(),
    ))
}
