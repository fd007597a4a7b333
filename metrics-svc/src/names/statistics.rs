//! Statistics of the processes that had one name within a day (UTC), and their encoding.
//!
//! ```text
//! version ─ CRC-32 of the rest ─ for each name, 31 bytes in little-endian order:
//!     first and last date (u32, milliseconds of the day) ─ hours (24 bits) ─ processes (u32) ─ CPU ─ memory (f64)
//! ```

/// The version of the encoding, its first byte.
const VERSION: u8 = 1;
/// Length of version and checksum.
const HEAD: usize = 5;
/// Length of the statistics of one name.
const LENGTH: usize = 31;
/// A day in milliseconds.
const DAY: u32 = 86_400_000;
/// The bits of all hours.
const ALL_HOURS: u32 = (1 << 24) - 1;

/// Why statistics cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StatisticsError {
    #[error("the statistics of process names are corrupt: {0}")]
    Corrupt(&'static str),
    #[error("the statistics of process names have version {0}, which is newer than this program")]
    NewerVersion(u8),
}

/// Hours of a day (UTC), one bit each; hour 0 is the lowest bit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Hours(u32);

impl Hours {
    pub(crate) const ALL: Self = Self(ALL_HOURS);

    /// The hours that a range of milliseconds of the day touches.
    pub(crate) fn touched(from_ms: i64, to_ms: i64) -> Self {
        let day = i64::from(DAY);
        let (from, to) = (from_ms.clamp(0, day), to_ms.clamp(0, day));
        let hours = (0..24).filter(|hour| {
            let start = i64::from(*hour) * 3_600_000;
            from < start + 3_600_000 && start < to
        });
        Self(hours.fold(0, |mask, hour: u32| mask | 1 << hour))
    }

    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub(crate) const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) const fn count(self) -> u32 {
        self.0.count_ones()
    }

    pub(crate) const fn contains(self, hour: u32) -> bool {
        self.0 >> hour & 1 == 1
    }

    /// The first and the last hour; `None` if there are none.
    pub(crate) const fn ends(self) -> Option<(u32, u32)> {
        if self.is_empty() {
            return None;
        }
        Some((self.0.trailing_zeros(), self.0.ilog2()))
    }
}

/// Statistics of the processes that had one name within a day. Merging is idempotent: rows may be counted repeatedly.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Statistics {
    /// First and last effective date, in milliseconds since the start of the day.
    pub(crate) first_ms: u32,
    pub(crate) last_ms: u32,
    pub(crate) hours: Hours,
    /// Greatest number of such processes in one sample.
    pub(crate) processes: u32,
    /// Greatest CPU and memory usage of one such process.
    pub(crate) cpu_util: f64,
    pub(crate) mem: f64,
}

impl Statistics {
    /// Statistics of one row. `at_ms` is its effective date in milliseconds since the start of the day.
    pub(crate) fn of_row(at_ms: u32, cpu_util: f64, mem: f64) -> Self {
        let at_ms = at_ms.min(DAY - 1);
        Self {
            first_ms: at_ms,
            last_ms: at_ms,
            hours: Hours(1 << (at_ms / 3_600_000)),
            processes: 1,
            cpu_util: cpu_util.max(0.0),
            mem: mem.max(0.0),
        }
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.first_ms = self.first_ms.min(other.first_ms);
        self.last_ms = self.last_ms.max(other.last_ms);
        self.hours = self.hours.or(other.hours);
        self.processes = self.processes.max(other.processes);
        self.cpu_util = self.cpu_util.max(other.cpu_util);
        self.mem = self.mem.max(other.mem);
    }

    fn push(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.first_ms.to_le_bytes());
        out.extend_from_slice(&self.last_ms.to_le_bytes());
        let [low, middle, high, _] = self.hours.0.to_le_bytes();
        out.extend_from_slice(&[low, middle, high]);
        out.extend_from_slice(&self.processes.to_le_bytes());
        out.extend_from_slice(&self.cpu_util.to_le_bytes());
        out.extend_from_slice(&self.mem.to_le_bytes());
    }

    fn read(bytes: &[u8; LENGTH]) -> Self {
        let mut rest = bytes.as_slice();
        let first_ms = u32::from_le_bytes(take(&mut rest));
        let last_ms = u32::from_le_bytes(take(&mut rest));
        let [low, middle, high] = take(&mut rest);
        Self {
            first_ms,
            last_ms,
            hours: Hours(u32::from_le_bytes([low, middle, high, 0])),
            processes: u32::from_le_bytes(take(&mut rest)),
            cpu_util: f64::from_le_bytes(take(&mut rest)),
            mem: f64::from_le_bytes(take(&mut rest)),
        }
    }

    fn is_valid(&self) -> bool {
        let is_usage = |number: f64| number.is_finite() && number >= 0.0;
        let bit = |at_ms: u32| self.hours.contains(at_ms / 3_600_000);
        self.first_ms <= self.last_ms
            && self.last_ms < DAY
            && bit(self.first_ms)
            && bit(self.last_ms)
            && self.processes > 0
            && is_usage(self.cpu_util)
            && is_usage(self.mem)
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (taken, left) = rest.split_first_chunk::<N>().unwrap_or((&[0; N], &[]));
    *rest = left;
    *taken
}

/// Encodes the statistics of names, in the order of the names.
pub(crate) fn encode<'a>(statistics: impl Iterator<Item = &'a Statistics>) -> Vec<u8> {
    let mut bytes = vec![VERSION, 0, 0, 0, 0];
    for one in statistics {
        one.push(&mut bytes);
    }
    let (head, rest) = bytes.split_at_mut(HEAD);
    if let Some(checksum) = head.get_mut(1..) {
        checksum.copy_from_slice(&crc32fast::hash(rest).to_le_bytes());
    }
    bytes
}

/// Decodes the statistics of this number of names.
pub(crate) fn decode(bytes: &[u8], names: usize) -> Result<Vec<Statistics>, StatisticsError> {
    let mut rest = bytes;
    match take(&mut rest) {
        [VERSION] => {}
        [0] => return Err(StatisticsError::Corrupt("the version is missing")),
        [newer] => return Err(StatisticsError::NewerVersion(newer)),
    }
    let checksum = u32::from_le_bytes(take(&mut rest));
    if checksum != crc32fast::hash(rest) {
        return Err(StatisticsError::Corrupt("the checksum is wrong"));
    }
    let (statistics, []) = rest.as_chunks::<LENGTH>() else {
        return Err(StatisticsError::Corrupt("the length is wrong"));
    };
    if statistics.len() != names {
        return Err(StatisticsError::Corrupt("they belong to another number of names"));
    }
    let statistics: Vec<_> = statistics.iter().map(Statistics::read).collect();
    if statistics.iter().all(Statistics::is_valid) {
        Ok(statistics)
    } else {
        Err(StatisticsError::Corrupt("a value is out of range"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row() -> impl Strategy<Value = Statistics> {
        (0..DAY, 0.0..6_553_600.0, 0.0..100.0)
            .prop_map(|(at_ms, cpu_util, mem)| Statistics::of_row(at_ms, cpu_util, mem))
    }

    fn merged(rows: &[Statistics]) -> Statistics {
        let mut all = rows[0];
        for row in rows {
            all.merge(row);
        }
        all
    }

    proptest! {
        #[test]
        fn statistics_can_be_decoded_after_encoding(
            days in prop::collection::vec(prop::collection::vec(row(), 1..9), 0..20)
        ) {
            let statistics: Vec<_> = days.iter().map(|rows| merged(rows)).collect();
            let bytes = encode(statistics.iter());
            prop_assert_eq!(bytes.len(), HEAD + LENGTH * statistics.len());
            prop_assert_eq!(decode(&bytes, statistics.len()), Ok(statistics));
        }

        #[test]
        fn statistics_do_not_depend_on_order_or_repetition(rows in prop::collection::vec(row(), 1..20)) {
            let mut other = rows.clone();
            other.reverse();
            other.extend_from_slice(&rows);
            prop_assert_eq!(merged(&other), merged(&rows));
        }

        #[test]
        fn damaged_statistics_are_rejected(rows in prop::collection::vec(row(), 1..5), at in 0_usize..1000, bit in 0..8_u8) {
            let mut bytes = encode(rows.iter());
            let at = at % bytes.len();
            bytes[at] ^= 1_u8 << bit;
            prop_assert!(decode(&bytes, rows.len()).is_err());
        }

        #[test]
        fn any_bytes_are_decoded_or_rejected(bytes: Vec<u8>, names in 0_usize..5) {
            let _ = decode(&bytes, names);
        }
    }

    #[test]
    fn statistics_of_newer_version_or_other_length_are_rejected() {
        let row = Statistics::of_row(3_600_000, 5.0, 1.0);
        let mut bytes = encode([row].iter());
        assert!(matches!(decode(&bytes, 2), Err(StatisticsError::Corrupt(_))));
        assert!(matches!(
            decode(&bytes[..HEAD], 1),
            Err(StatisticsError::Corrupt(_))
        ));
        assert!(matches!(decode(&[], 0), Err(StatisticsError::Corrupt(_))));
        bytes[0] = VERSION + 1;
        assert_eq!(decode(&bytes, 1), Err(StatisticsError::NewerVersion(VERSION + 1)));
        // The checksum is right, but no process can have run before it ran first.
        let invalid = Statistics { last_ms: 0, ..row };
        let bytes = encode([invalid].iter());
        assert_eq!(
            decode(&bytes, 1),
            Err(StatisticsError::Corrupt("a value is out of range"))
        );
    }

    #[test]
    fn hours_are_those_that_a_range_touches() {
        let hour = 3_600_000;
        assert_eq!(Hours::touched(-5, 25 * hour), Hours::ALL);
        assert_eq!(Hours::touched(hour, 2 * hour).ends(), Some((1, 1)));
        assert_eq!(Hours::touched(hour - 1, 2 * hour + 1).ends(), Some((0, 2)));
        assert_eq!(Hours::touched(30 * hour, 40 * hour).ends(), None);
        assert_eq!(Hours::touched(23 * hour, 24 * hour).count(), 1);
    }
}
