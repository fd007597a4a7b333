//! Reads all rows of a time range in pages, oldest first.

use vmwatch_api::{
    metrics::RowId,
    rows::{ExportPosition, RowExportPage, RowExportQuery, RowFilter},
};

use super::{
    Budget, Most, Newest, Only, Order, Query, Row,
    page::{FIRST_DATE, encode},
};
use crate::{
    MetricsError,
    deadline::Deadline,
    store::{RowKind, RowStore},
};

/// Maximum number of rows on a page. Usually the size of a message limits a page to fewer.
const PAGE_ROWS: usize = 4096;

impl RowStore {
    /// Reads a page of the rows of a time range, oldest first. It ends early when the request has decoded as much as it
    /// may, so a page that is not the last one may have no rows.
    pub(crate) async fn export(
        &self,
        query: &RowExportQuery,
        deadline: Deadline,
    ) -> Result<RowExportPage, MetricsError> {
        let kind = RowKind::from(query.kind);
        let columns = query.kind.export_keys();
        let only = match &query.filter {
            None => Only::All,
            Some(RowFilter::Name(name)) => Only::named(name.as_str()),
            Some(RowFilter::Pid(pid)) => Only::Pid(*pid),
        };
        let mut wanted = Query::new(kind, &query.instance_id, columns)
            .oldest_first()
            .without_sums()
            .within_ms(query.range.from_ms(), query.range.to_ms())
            .only(only);
        let after = query.after.as_ref().map(key).transpose()?;
        if let Some((effective, ..)) = after {
            wanted.time.start = wanted.time.start.max(effective);
        }
        let most = Most {
            rows: PAGE_ROWS,
            after,
        };
        let mut found = Newest::new(most, Order::Oldest);
        let mut budget = Budget::of_request(self);
        found.read(self, &wanted, &mut budget, deadline).await?;
        let end = found.ended_at.map(beginning_of).transpose()?;
        let is_full = found.is_full();
        let rows = found.into_rows();
        let (json, on_page) = encode(columns, PAGE_ROWS, &rows)?;
        let next = if on_page < rows.len() || is_full && end.is_none() {
            let last = on_page.checked_sub(1).and_then(|last| rows.get(last));
            last.map(position).transpose()?
        } else {
            end
        };
        Ok(RowExportPage { rows: json, next })
    }
}

fn key(position: &ExportPosition) -> Result<super::RowKey<'_>, MetricsError> {
    let id: bson::oid::ObjectId = position.id.as_str().parse().map_err(|_| MetricsError::NoCursor)?;
    Ok((position.effective_us, &position.create_date, Some(id.bytes())))
}

fn position(row: &Row) -> Result<ExportPosition, MetricsError> {
    let id = row.object_id().and_then(|id| RowId::new(&id.to_hex()));
    Ok(ExportPosition {
        effective_us: row.effective,
        create_date: row.create_date.clone(),
        id: id.ok_or(MetricsError::NoCursor)?,
    })
}

/// The position before all rows with this effective date.
fn beginning_of(effective: i64) -> Result<ExportPosition, MetricsError> {
    Ok(ExportPosition {
        effective_us: effective,
        create_date: FIRST_DATE.to_owned(),
        id: RowId::new(&"0".repeat(24)).ok_or(MetricsError::NoCursor)?,
    })
}
