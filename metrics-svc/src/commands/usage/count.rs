//! Counts blocks by kind, level and VM, and checks whether they are readable.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
};

use bson::{DateTime, RawBsonRef, RawDocument};
use vmwatch_blocks::{Block, Limits, MAX_ROWS};
use vmwatch_service::config::ByteSize;

use super::{Blocks, DAY, Disk, FlatRows, Growth, Size, Unreadable, UnreadableBlock, Usage, Vm};
use crate::{
    config::RetentionSettings,
    reads::{MAX_DECODED, unreadable_reason},
    store::RowKind,
};

/// Number of VMs that are printed.
const LARGEST: usize = 10;
/// Maximum number of unreadable blocks that are printed; further ones are only counted.
const MAX_UNREADABLE: usize = 100;

/// Counts blocks. Takes memory for each VM.
#[derive(Debug, Default)]
pub(super) struct Count {
    /// By kind and level.
    totals: BTreeMap<(String, i32), Total>,
    vms: HashMap<String, (u64, u64)>,
    undated: Size,
    unreadable: Unreadable,
}

#[derive(Debug, Default, Clone, Copy)]
struct Total {
    documents: u64,
    rows: u64,
    bytes: u64,
    /// Number of rows of the last 24 hours.
    rows_of_day: u64,
}

impl Count {
    /// Counts no blocks yet; `check` says whether the blocks have their content, which is then checked.
    pub(super) fn new(check: bool) -> Self {
        let mut count = Self::default();
        count.unreadable.checked = check;
        count
    }

    pub(super) fn add(&mut self, block: &RawDocument, bytes: u64, since: DateTime) {
        let text = |key| block.get_str(key).unwrap_or("unknown").to_owned();
        let rows = u64::try_from(block.get_i32("rows").unwrap_or(0)).unwrap_or(0);
        let level = block.get_i32("level").unwrap_or(-1);
        let total = self.totals.entry((text("kind"), level)).or_default();
        total.documents += 1;
        total.rows += rows;
        total.bytes += bytes;
        if block.get_datetime("from").is_ok_and(|from| from >= since) {
            total.rows_of_day += rows;
        }
        let (of_vm, rows_of_vm) = self.vms.entry(text("instance_id")).or_default();
        *of_vm += bytes;
        *rows_of_vm += rows;
        if block.get_datetime("expires").is_err() {
            self.undated.add(bytes);
        }
        if self.unreadable.checked
            && let Some(reason) = unreadable(block)
        {
            self.unreadable.blocks += 1;
            *self.unreadable.by_reason.entry(reason).or_default() += 1;
            if self.unreadable.first.len() < MAX_UNREADABLE {
                self.unreadable.first.push(UnreadableBlock {
                    id: id(block),
                    instance_id: text("instance_id"),
                    reason,
                });
            }
        }
    }

    pub(super) fn usage(self, names: Size, retention: RetentionSettings, disk: Option<ByteSize>) -> Usage {
        let growth = self.growth(names, retention);
        let blocks = |((kind, level), total): ((String, i32), Total)| Blocks {
            kind,
            level,
            documents: total.documents,
            rows: total.rows,
            bytes: total.bytes,
            bytes_per_row: ratio(total.bytes, total.rows),
        };
        let blocks: Vec<Blocks> = self.totals.into_iter().map(blocks).collect();
        let bytes = blocks.iter().map(|blocks| blocks.bytes).sum::<u64>() + names.bytes;
        let vms = self.vms.len();
        let vm = |(instance_id, (bytes, rows))| Vm {
            instance_id,
            bytes,
            rows,
        };
        let mut largest_vms: Vec<Vm> = self.vms.into_iter().map(vm).collect();
        largest_vms
            .sort_by(|a, b| (Reverse(a.bytes), &a.instance_id).cmp(&(Reverse(b.bytes), &b.instance_id)));
        largest_vms.truncate(LARGEST);
        Usage {
            bytes,
            blocks,
            process_names: names,
            flat_rows: FlatRows::default(),
            undated_blocks: self.undated,
            vms,
            largest_vms,
            unreadable: self.unreadable,
            growth,
            disk: disk.map(|ByteSize(size)| Disk {
                bytes: size,
                days_left: growth.days_left(bytes, size),
            }),
        }
    }

    fn growth(&self, names: Size, retention: RetentionSettings) -> Growth {
        let mut growth = Growth {
            final_bytes: self.undated.bytes,
            ..Growth::default()
        };
        for kind in RowKind::ALL {
            let (mut all, mut compacted) = (Total::default(), Total::default());
            for (_, total) in self.totals.iter().filter(|((name, _), _)| name == kind.name()) {
                all.merge(*total);
            }
            if let Some(total) = self.totals.get(&(kind.name().to_owned(), 1)) {
                compacted = *total;
                // The process names are stored in addition to the blocks.
                if kind == RowKind::Process {
                    compacted.bytes += names.bytes;
                }
            }
            // Rows are compacted after their hour has ended, so those blocks show what a row takes in the end.
            let measure = if compacted.rows > 0 { compacted } else { all };
            let bytes_per_day = scaled(measure.bytes, all.rows_of_day, measure.rows);
            growth.bytes_per_day += bytes_per_day;
            growth.final_bytes += scaled(bytes_per_day, retention.of(kind).as_secs(), DAY.as_secs());
        }
        growth
    }
}

impl Total {
    const fn merge(&mut self, other: Self) {
        self.documents += other.documents;
        self.rows += other.rows;
        self.bytes += other.bytes;
        self.rows_of_day += other.rows_of_day;
    }
}

/// `bytes × part ÷ whole`, or 0 if the whole is 0.
fn scaled(bytes: u64, part: u64, whole: u64) -> u64 {
    let scaled = (u128::from(bytes) * u128::from(part)).checked_div(u128::from(whole));
    u64::try_from(scaled.unwrap_or(0)).unwrap_or(u64::MAX)
}

/// Why a block is unreadable; `None` if it is readable.
fn unreadable(block: &RawDocument) -> Option<&'static str> {
    let limits = Limits {
        rows: MAX_ROWS,
        bytes: MAX_DECODED,
    };
    let Ok(data) = block.get_binary("data") else {
        return Some("corrupt");
    };
    Block::open(data.bytes, limits).err().map(unreadable_reason)
}

/// The `_id` of a block as text; the hexadecimal digits of a binary one.
fn id(block: &RawDocument) -> String {
    match block.get("_id") {
        Ok(Some(RawBsonRef::Binary(id))) => id.bytes.iter().fold(String::new(), |mut text, byte| {
            // Writing to a text cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        }),
        Ok(Some(RawBsonRef::String(id))) => id.to_owned(),
        other => format!("{other:?}"),
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "the result is rounded when it is printed"
)]
fn ratio(bytes: u64, rows: u64) -> f64 {
    if rows == 0 {
        0.0
    } else {
        bytes as f64 / rows as f64
    }
}

#[cfg(test)]
mod tests {
    use bson::{Binary, RawDocumentBuf, rawdoc, spec::BinarySubtype};
    use vmwatch_blocks::{Encoder, Kind, Rows};

    use std::time::Duration;

    use super::{super::text, *};

    const RETENTION: RetentionSettings = RetentionSettings {
        vms: Duration::from_hours(240),
        processes: Duration::from_hours(240),
    };

    /// The document of a block with one VM row.
    fn block(instance: &str, level: i32, from: i64, damage: impl Fn(&mut Vec<u8>)) -> RawDocumentBuf {
        let mut rows = Rows::new(Kind::Vm, instance, 0);
        rows.push("2017-01-01T21:37:59.001065", None, None, []).unwrap();
        let mut bytes = Encoder::new().unwrap().encode(&rows).pop().unwrap().bytes;
        damage(&mut bytes);
        let subtype = BinarySubtype::Generic;
        rawdoc! {
            "_id": Binary { subtype, bytes: vec![0x0a, 0xff] }, "instance_id": instance, "kind": "vm",
            "level": level, "from": DateTime::from_millis(from), "rows": 1, "data": Binary { subtype, bytes },
        }
    }

    fn checked(blocks: &[RawDocumentBuf], bytes: u64) -> Count {
        let mut count = Count::new(true);
        for block in blocks {
            count.add(block, bytes, DateTime::from_millis(5));
        }
        count
    }

    #[test]
    fn usage_counts_bytes_by_kind_and_vm() {
        let blocks = [
            block("vm-1", 0, 0, |_| {}),
            block("vm-1", 1, 9, |_| {}),
            block("vm-2", 0, 9, |_| {}),
        ];
        let usage = checked(&blocks, 100).usage(Size::default(), RETENTION, Some(ByteSize(1000)));
        assert_eq!((usage.bytes, usage.vms), (300, 2));
        let kinds = usage.blocks.iter();
        let kinds: Vec<_> = kinds
            .map(|kind| (kind.level, kind.documents, kind.rows, kind.bytes))
            .collect();
        assert_eq!(kinds, [(0, 2, 2, 200), (1, 1, 1, 100)]);
        let vms: Vec<_> = usage
            .largest_vms
            .iter()
            .map(|vm| (vm.instance_id.as_str(), vm.bytes))
            .collect();
        assert_eq!(vms, [("vm-1", 200), ("vm-2", 100)]);
        assert_eq!(usage.unreadable.blocks, 0);
        // Two rows a day of 100 bytes, for ten days, and the undated blocks.
        let growth = Growth {
            bytes_per_day: 200,
            final_bytes: 2300,
        };
        assert_eq!(usage.growth, growth);
        assert_eq!(usage.disk.unwrap().days_left, Some(3));
        let text = text::of(&usage);
        assert!(text.contains("days until it is full"), "{text}");
    }

    #[test]
    fn unreadable_blocks_are_listed_with_id_and_reason() {
        let blocks = [
            block("vm-1", 0, 0, |bytes| bytes[12] ^= 1),
            block("vm-1", 0, 0, |bytes| bytes.truncate(bytes.len() - 1)),
            block("vm-2", 0, 0, |_| {}),
        ];
        let usage = checked(&blocks, 100).usage(Size::default(), RETENTION, None);
        assert_eq!(usage.unreadable.by_reason, BTreeMap::from([("corrupt", 2)]));
        let first = &usage.unreadable.first[0];
        assert_eq!((first.id.as_str(), first.instance_id.as_str()), ("0aff", "vm-1"));
        let text = text::of(&usage);
        assert!(text.contains("0aff"), "{text}");
    }

    #[test]
    fn disk_larger_than_final_size_is_never_full() {
        let growth = Growth {
            bytes_per_day: 10,
            final_bytes: 300,
        };
        for (bytes, disk, days) in [(100, 300, None), (100, 299, Some(19)), (300, 200, Some(0))] {
            assert_eq!(growth.days_left(bytes, disk), days);
        }
    }
}
