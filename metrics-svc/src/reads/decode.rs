//! Decodes the rows of a block that a query selects.

use bson::{RawDocumentBuf, oid::ObjectId, raw::CStr};
use metrics::counter;
use tracing::warn;
use vmwatch_blocks::{Block, BlockError, Column, Value};

use super::{Budget, Only, Order, Query, Row};
use crate::blocks::StoredBlock;

/// The rows of a block that a query selects.
pub(super) enum Decoded {
    Rows(Vec<Row>),
    /// Decoding the block would exceed the budget.
    OverBudget,
}

/// How many of a block's rows to decode.
#[derive(Debug, Clone, Copy)]
pub(super) struct First {
    /// Number of rows to decode, from the beginning in the order of the query. All rows with the effective date of the
    /// last one are decoded too.
    pub(super) rows: usize,
    /// An effective date whose rows are decoded in any case.
    pub(super) and_at: Option<i64>,
}

/// Decodes the rows that the query selects; with `only_first`, only some of them. An unreadable block is counted and
/// logged, and has no rows.
pub(super) fn decode(
    stored: &StoredBlock<'_>,
    query: &Query<'_>,
    only_first: Option<First>,
    budget: &mut Budget,
) -> Decoded {
    match rows(stored, query, only_first, budget) {
        Ok(rows) => Decoded::Rows(rows),
        Err(BlockError::TooLarge) if !budget.is_largest() => Decoded::OverBudget,
        Err(error) => {
            counter!("vmwatch_blocks_unreadable_total", "reason" => unreadable_reason(error)).increment(1);
            warn!(
                instance_id = %query.instance, block = ?stored.id, %error,
                "a block of stored rows is unreadable; its rows are missing in answers"
            );
            Decoded::Rows(Vec::new())
        }
    }
}

/// Why a block is unreadable, in metrics and in the output of commands.
pub(crate) const fn unreadable_reason(error: BlockError) -> &'static str {
    match error {
        BlockError::Corrupt(_) => "corrupt",
        BlockError::NewerVersion(_) => "newer version",
        BlockError::TooLarge => "too large",
    }
}

fn rows(
    stored: &StoredBlock<'_>,
    query: &Query<'_>,
    only_first: Option<First>,
    budget: &mut Budget,
) -> Result<Vec<Row>, BlockError> {
    let mut block = Block::open(stored.data, budget.limits())?;
    if block.kind() != query.kind.in_blocks() {
        return Err(BlockError::Corrupt("it has rows of another kind"));
    }
    let mut rows = block.rows_within(query.time.clone());
    if !rows.is_empty() {
        select(&mut rows, &mut block, &query.only)?;
        if query.no_sums {
            let sums = block.column("processes")?;
            rows.retain(|row| matches!(sums.get(*row), Value::Missing));
        }
    }
    if let Some(only) = only_first {
        let (mut others, mut tied) = (Vec::new(), Vec::new());
        for row in rows {
            let is_tied = Some(block.effective(row)) == only.and_at;
            if is_tied { &mut tied } else { &mut others }.push(row);
        }
        first(&mut others, only.rows, |row| match query.order {
            Order::Newest => block.effective(row).saturating_neg(),
            Order::Oldest => block.effective(row),
        });
        others.append(&mut tied);
        rows = others;
    }
    let mut decoded = Vec::with_capacity(rows.len());
    if !rows.is_empty() {
        let ids = block.ids(query.instance.as_str())?;
        let mut columns = Vec::with_capacity(query.columns.len());
        for name in query.columns {
            if let Ok(key) = <&CStr>::try_from(*name) {
                columns.push((key, block.column(name)?));
            }
        }
        for row in rows {
            let (create_date, id) = (block.create_date(row), ids.get(row));
            decoded.push(Row {
                effective: block.effective(row),
                document: document(query, &create_date, ObjectId::from_bytes(id), &columns, row),
                create_date,
                id: Some(id),
            });
        }
    }
    budget.set_left(block.bytes_left());
    Ok(decoded)
}

/// Keeps the rows of the selected processes.
fn select(rows: &mut Vec<usize>, block: &mut Block<'_>, only: &Only) -> Result<(), BlockError> {
    match only {
        Only::All => {}
        Only::Names(names) => {
            let cmd = block.column("cmd")?;
            rows.retain(|row| matches!(cmd.get(*row), Value::Text(cmd) if names.matches(cmd)));
        }
        Only::Pid(pid) => {
            let pids = block.column("pid")?;
            rows.retain(|row| match pids.get(*row) {
                Value::Int32(found) => u32::try_from(found) == Ok(*pid),
                Value::Int64(found) => found == i64::from(*pid),
                _ => false,
            });
        }
    }
    Ok(())
}

/// Keeps the `most` rows with the smallest keys, and all that have the same key as the last of them.
fn first(rows: &mut Vec<usize>, most: usize, key: impl Fn(usize) -> i64) {
    if rows.len() <= most {
        return;
    }
    let Some(last) = most.checked_sub(1) else {
        rows.clear();
        return;
    };
    let mut keys: Vec<i64> = rows.iter().map(|row| key(*row)).collect();
    let last = *keys.select_nth_unstable(last).1;
    rows.retain(|row| key(*row) <= last);
}

fn document(
    query: &Query<'_>,
    create_date: &str,
    id: ObjectId,
    columns: &[(&CStr, Column)],
    row: usize,
) -> RawDocumentBuf {
    let mut document = RawDocumentBuf::new();
    document.append(bson::cstr!("_id"), id);
    document.append(bson::cstr!("instance_id"), query.instance.as_str());
    document.append(bson::cstr!("create_date"), create_date);
    for (key, column) in columns {
        match column.get(row) {
            Value::Missing => {}
            Value::Null => document.append(key, bson::RawBson::Null),
            Value::Bool(truth) => document.append(key, truth),
            Value::Int32(number) => document.append(key, number),
            Value::Int64(number) => document.append(key, number),
            Value::Double(number) => document.append(key, number),
            Value::Text(text) => document.append(key, text),
        }
    }
    document
}
