//! Reads the flat collections, which other software has filled. The effective date of their rows is `create_date`.

use std::time::{Duration, SystemTime};

use bson::{Document, RawBsonRef, RawDocument, RawDocumentBuf, doc};
use mongodb::{Collection, Cursor};
use vmwatch_api::time::{CreateDate, UtcOffset};

use super::{Only, Order, Query, Row, micros_of_date};
use crate::{MetricsError, database::find, deadline::Deadline, documents::SAMPLED_AT};

/// The first and the last times that are distinguished: some days within the years 0 and 9999.
const FIRST_MICROS: i64 = -62_167_000_000_000_000;
const LAST_MICROS: i64 = 253_402_000_000_000_000;

/// The part of a flat collection's rows that is read.
#[derive(Debug, Clone, Copy)]
pub(super) enum Dates<'a> {
    /// All rows within the time of the query.
    Within,
    /// The rows with this date that come after this `_id` in the order of the query.
    Tied(&'a str, bson::oid::ObjectId),
}

/// Finds flat rows of the query in its order; at most `most` if that is not zero.
pub(super) async fn open(
    rows: &Collection<RawDocumentBuf>,
    offset: UtcOffset,
    query: &Query<'_>,
    dates: Dates<'_>,
    most: usize,
    deadline: Deadline,
) -> Result<Cursor<RawDocumentBuf>, MetricsError> {
    let direction = match query.order {
        Order::Newest => -1,
        Order::Oldest => 1,
    };
    let mut wanted = doc! { "instance_id": 1, "create_date": 1 };
    if query.durable {
        wanted.insert(SAMPLED_AT, 1);
    }
    wanted.extend(query.columns.iter().map(|name| ((*name).to_owned(), 1.into())));
    let find_rows = rows
        .find(filter(query, dates, offset))
        .projection(wanted)
        .sort(doc! { "create_date": direction, "_id": direction })
        .limit(i64::try_from(most).unwrap_or(i64::MAX))
        .batch_size(if most == 0 {
            1000
        } else {
            u32::try_from(most).unwrap_or(1000)
        })
        .max_time(deadline.left()?);
    find(rows, find_rows).await
}

fn filter(query: &Query<'_>, dates: Dates<'_>, offset: UtcOffset) -> Document {
    let mut filter = doc! { "instance_id": query.instance.as_str() };
    match &query.only {
        Only::All => {}
        Only::Names(names) => {
            let mut filters = names.filters("cmd");
            match filters.pop() {
                Some(only) if filters.is_empty() => filter.extend(only),
                last => drop(filter.insert("$or", filters.into_iter().chain(last).collect::<Vec<_>>())),
            }
        }
        Only::Pid(pid) => drop(filter.insert("pid", i64::from(*pid))),
    }
    match dates {
        Dates::Within => {
            let (from, to) = (text(query.time.start, offset), text(query.time.end, offset));
            filter.insert("create_date", doc! { "$gte": from, "$lt": to });
        }
        Dates::Tied(date, id) => {
            filter.insert("create_date", date);
            let comes_after = match query.order {
                Order::Newest => "$lt",
                Order::Oldest => "$gt",
            };
            filter.insert("_id", doc! { comes_after: id });
        }
    }
    filter
}

/// The smallest text of a date at or after this time in Unix microseconds.
fn text(micros: i64, offset: UtcOffset) -> String {
    if micros < FIRST_MICROS {
        return String::new();
    }
    let since = Duration::from_micros(micros.unsigned_abs());
    let moment = match micros {
        ..0 => SystemTime::UNIX_EPOCH.checked_sub(since),
        0..LAST_MICROS => SystemTime::UNIX_EPOCH.checked_add(since),
        _ => None,
    };
    // No text of a date sorts after this one, so a moment after the year 9999 includes all rows.
    let Some(moment) = moment else {
        return "9999-12-31T24".to_owned();
    };
    let date = CreateDate::at(moment, offset);
    let date = date.as_str();
    // A date without a fraction sorts before the same date with one.
    date.strip_suffix(".000000").unwrap_or(date).to_owned()
}

/// Takes a row from a cursor.
pub(super) fn row(document: &RawDocument, offset: UtcOffset) -> Result<Row, MetricsError> {
    let date = document.get("create_date")?.and_then(RawBsonRef::as_str);
    let date = date.unwrap_or_default();
    let id = document.get("_id")?.and_then(RawBsonRef::as_object_id);
    Ok(Row {
        effective: micros_of_date(date, offset).unwrap_or(i64::MIN),
        create_date: date.to_owned(),
        id: id.map(|id| id.bytes()),
        document: document.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_time_ranges_sort_like_dates() {
        let offset: UtcOffset = "+08:00".parse().unwrap();
        let at = |date: &str| micros_of_date(date, offset).unwrap();
        for date in [
            "2017-01-01T21:37:59.001065",
            "1969-12-31T23:59:59.999999",
            "2017-01-01T21:37:59",
        ] {
            assert_eq!(text(at(date), offset), date);
        }
        assert_eq!(
            text(at("2017-01-01T21:37:59.000000"), offset),
            "2017-01-01T21:37:59"
        );
        assert!(text(i64::MIN, offset).as_str() < "0000-01-01T00:00:00");
        assert!(text(i64::MAX, offset).as_str() > "9999-12-31T00:00:00");
    }
}
