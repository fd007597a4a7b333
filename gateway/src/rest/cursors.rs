//! Cursors of paged lists. A cursor marks the end of a page; the client sends it back to get the next page.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{ObjectBuilder, RefOr, Schema, Type},
};
use vmwatch_api::{
    alerts::{AlertPosition, channels::MessagePosition},
    audit::AuditCursor,
    lifecycle::OperationPosition,
    metrics::RowId,
    processes::{EventPosition, ProcessEventKind, TablePosition},
    rows::ExportPosition,
};

const RULE: &str = "must be the `next` value of the previous page";

/// Cursor in a list of operations: request time and id of the last operation on the page.
#[derive(Debug)]
pub(super) struct OperationCursor(pub(super) OperationPosition);

/// Cursor in a process table: time of the table, and id of the last row on the page.
#[derive(Debug)]
pub(super) struct TableCursor(pub(super) TablePosition);

/// Cursor in a list of process events: time and kind of the last event, and pid and start time of its process.
#[derive(Debug)]
pub(super) struct EventCursor(pub(super) EventPosition);

/// Cursor in the audit log: a position in each of the two streams of audit records.
#[derive(Debug)]
pub(super) struct AuditPosition(pub(super) AuditCursor);

/// Cursor in an export of rows: effective date, `create_date` and id of the last row on the page.
#[derive(Debug)]
pub(super) struct RowCursor(pub(super) ExportPosition);

/// Cursor in a list of alerts: beginning and id of the last alert on the page.
#[derive(Debug)]
pub(super) struct AlertCursor(pub(super) AlertPosition);

/// Cursor in a list of messages: creation time and id of the last message on the page.
#[derive(Debug)]
pub(super) struct MessageCursor(pub(super) MessagePosition);

/// OpenAPI schema of a cursor. Every string that matches the pattern must be a valid cursor.
pub(super) fn cursor_schema(pattern: &str) -> RefOr<Schema> {
    ObjectBuilder::new()
        .schema_type(Type::String)
        .pattern(Some(pattern))
        .description(Some("Opaque cursor that marks the end of a page."))
        .into()
}

impl OperationCursor {
    const PATTERN: &str = "^[0-9]{1,20}\\.[0-9a-f]{32}$";

    fn read(text: &str) -> Option<Self> {
        let (moment, id) = text.split_once('.')?;
        Some(Self(OperationPosition {
            requested_at_ms: number(moment)?,
            id: id.parse().ok()?,
        }))
    }
}

impl AlertCursor {
    const PATTERN: &str = OperationCursor::PATTERN;

    fn read(text: &str) -> Option<Self> {
        let (since, id) = text.split_once('.')?;
        Some(Self(AlertPosition {
            since_ms: number(since)?,
            id: id.parse().ok()?,
        }))
    }
}

impl MessageCursor {
    const PATTERN: &str = OperationCursor::PATTERN;

    fn read(text: &str) -> Option<Self> {
        let (created, id) = text.split_once('.')?;
        Some(Self(MessagePosition {
            created_ms: number(created)?,
            id: id.parse().ok()?,
        }))
    }
}

impl TableCursor {
    const PATTERN: &str = "^[0-9]{1,20}\\.[0-9a-f]{24}$";

    fn read(text: &str) -> Option<Self> {
        let (moment, id) = text.split_once('.')?;
        Some(Self(TablePosition {
            at_ms: number(moment)?,
            id: RowId::new(id)?,
        }))
    }
}

impl EventCursor {
    const PATTERN: &str = "^[0-9]{1,20}\\.(started|ended)\\.[0-9]{1,20}\\.[0-9]{1,20}$";

    fn read(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let position = EventPosition {
            at_ms: number(parts.next()?)?,
            kind: match parts.next()? {
                "started" => ProcessEventKind::Started,
                "ended" => ProcessEventKind::Ended,
                _ => return None,
            },
            pid: u32::try_from(number(parts.next()?)?).unwrap_or(u32::MAX),
            started_ms: number(parts.next()?)?,
        };
        parts.next().is_none().then_some(Self(position))
    }
}

impl RowCursor {
    const PATTERN: &str = "^-?[0-9]{1,20}\\.([0-9]{14}|[0-9]{20})\\.[0-9a-f]{24}$";

    fn read(text: &str) -> Option<Self> {
        let (effective, rest) = text.split_once('.')?;
        let (date, id) = rest.split_once('.')?;
        let (sign, digits) = match effective.strip_prefix('-') {
            Some(digits) => (-1, digits),
            None => (1, effective),
        };
        let micros = i64::try_from(number(digits)?).unwrap_or(i64::MAX);
        Some(Self(ExportPosition {
            effective_us: sign * micros,
            create_date: date_of(date)?,
            id: RowId::new(id)?,
        }))
    }
}

/// Writes 14 or 20 digits as a `create_date`.
fn date_of(digits: &str) -> Option<String> {
    if !matches!(digits.len(), 14 | 20) || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let mut date = String::with_capacity(26);
    for (index, digit) in digits.chars().enumerate() {
        let mark = match index {
            4 | 6 => Some('-'),
            8 => Some('T'),
            10 | 12 => Some(':'),
            14 => Some('.'),
            _ => None,
        };
        date.extend(mark);
        date.push(digit);
    }
    Some(date)
}

impl AuditPosition {
    const PATTERN: &str = "^[0-9]{1,20}-[0-9]{1,20}$";

    fn read(text: &str) -> Option<Self> {
        let (authenticated, unauthenticated) = text.split_once('-')?;
        Some(Self(AuditCursor {
            authenticated: number(authenticated)?,
            unauthenticated: number(unauthenticated)?,
        }))
    }
}

/// Parses a number of at most 20 digits. A number above the maximum of `u64` becomes that maximum.
fn number(digits: &str) -> Option<u64> {
    let fits = (1..=20).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
    fits.then(|| digits.parse().unwrap_or(u64::MAX))
}

impl fmt::Display for RowCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.create_date.chars().filter(char::is_ascii_digit);
        let date: String = digits.collect();
        write!(f, "{}.{date}.{}", self.0.effective_us, self.0.id.as_str())
    }
}

impl Serialize for OperationCursor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}.{}", self.0.requested_at_ms, self.0.id))
    }
}

impl Serialize for AlertCursor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}.{}", self.0.since_ms, self.0.id))
    }
}

impl Serialize for MessageCursor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}.{}", self.0.created_ms, self.0.id))
    }
}

impl Serialize for TableCursor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}.{}", self.0.at_ms, self.0.id.as_str()))
    }
}

impl Serialize for EventCursor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let EventPosition {
            at_ms,
            kind,
            pid,
            started_ms,
        } = self.0;
        let kind = match kind {
            ProcessEventKind::Started => "started",
            ProcessEventKind::Ended => "ended",
        };
        serializer.collect_str(&format_args!("{at_ms}.{kind}.{pid}.{started_ms}"))
    }
}

impl Serialize for AuditPosition {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for AuditPosition {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::read(&String::deserialize(deserializer)?).ok_or_else(|| D::Error::custom(RULE))
    }
}

impl PartialSchema for AuditPosition {
    fn schema() -> RefOr<Schema> {
        cursor_schema(Self::PATTERN)
    }
}

impl ToSchema for AuditPosition {}

impl<'de> Deserialize<'de> for OperationCursor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::read(&String::deserialize(deserializer)?).ok_or_else(|| D::Error::custom(RULE))
    }
}

impl<'de> Deserialize<'de> for AlertCursor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::read(&String::deserialize(deserializer)?).ok_or_else(|| D::Error::custom(RULE))
    }
}

impl<'de> Deserialize<'de> for MessageCursor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::read(&String::deserialize(deserializer)?).ok_or_else(|| D::Error::custom(RULE))
    }
}

impl<'de> Deserialize<'de> for TableCursor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::read(&String::deserialize(deserializer)?).ok_or_else(|| D::Error::custom(RULE))
    }
}

impl<'de> Deserialize<'de> for EventCursor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::read(&String::deserialize(deserializer)?).ok_or_else(|| D::Error::custom(RULE))
    }
}

impl<'de> Deserialize<'de> for RowCursor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let rule = "must be the X-Next-Cursor header of the previous page";
        Self::read(&String::deserialize(deserializer)?).ok_or_else(|| D::Error::custom(rule))
    }
}

impl PartialSchema for RowCursor {
    fn schema() -> RefOr<Schema> {
        cursor_schema(Self::PATTERN)
    }
}

impl PartialSchema for OperationCursor {
    fn schema() -> RefOr<Schema> {
        cursor_schema(Self::PATTERN)
    }
}

impl PartialSchema for AlertCursor {
    fn schema() -> RefOr<Schema> {
        cursor_schema(Self::PATTERN)
    }
}

impl PartialSchema for MessageCursor {
    fn schema() -> RefOr<Schema> {
        cursor_schema(Self::PATTERN)
    }
}

impl PartialSchema for TableCursor {
    fn schema() -> RefOr<Schema> {
        cursor_schema(Self::PATTERN)
    }
}

impl PartialSchema for EventCursor {
    fn schema() -> RefOr<Schema> {
        cursor_schema(Self::PATTERN)
    }
}

impl ToSchema for AlertCursor {}
impl ToSchema for MessageCursor {}
impl ToSchema for OperationCursor {}
impl ToSchema for TableCursor {}
impl ToSchema for EventCursor {}
impl ToSchema for RowCursor {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_can_be_decoded_after_encoding() {
        let operation = "1483277879001.00112233445566778899aabbccddeeff";
        let table = "1483277879001.58690637594c10403e25b048";
        let event = "1483277879001.ended.479.1482236515630";
        assert_eq!(
            serde_json::to_value(OperationCursor::read(operation)).unwrap(),
            operation
        );
        assert_eq!(
            serde_json::to_value(AlertCursor::read(operation)).unwrap(),
            operation
        );
        assert_eq!(
            serde_json::to_value(MessageCursor::read(operation)).unwrap(),
            operation
        );
        assert_eq!(serde_json::to_value(TableCursor::read(table)).unwrap(), table);
        assert_eq!(serde_json::to_value(EventCursor::read(event)).unwrap(), event);
        for row in [
            "1483277879001065.20170101213759001065.58690637594c10403e25b048",
            "-1.00000101000000.000000000000000000000000",
        ] {
            assert_eq!(RowCursor::read(row).unwrap().to_string(), row);
        }
        assert_eq!(serde_json::to_value(AuditPosition::read("12-3")).unwrap(), "12-3");
    }

    #[test]
    fn invalid_cursors_are_rejected() {
        for bad in [
            "",
            ".",
            "1",
            "1.",
            "+1.58690637594c10403e25b048",
            "1.58690637594C10403E25B048",
        ] {
            assert!(TableCursor::read(bad).is_none(), "{bad}");
            assert!(OperationCursor::read(bad).is_none(), "{bad}");
            assert!(AlertCursor::read(bad).is_none(), "{bad}");
            assert!(MessageCursor::read(bad).is_none(), "{bad}");
        }
        for bad in [
            "1.20170101213759.5869",
            "1.2017.58690637594c10403e25b048",
            "--1.20170101213759.58690637594c10403e25b048",
        ] {
            assert!(RowCursor::read(bad).is_none(), "{bad}");
        }
        for bad in [
            "1.died.1.1",
            "1.ended.1",
            "1.ended.1.1.1",
            "1.ended..1",
            "1.ended.-1.1",
        ] {
            assert!(EventCursor::read(bad).is_none(), "{bad}");
        }
    }
}
