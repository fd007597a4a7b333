//! Collects the names of one VM and day from process rows.

use std::collections::{BTreeMap, HashMap};

use bson::{RawBsonRef, RawDocument};

use vmwatch_api::metrics::OTHER_PROCESSES;

use super::{MAX_NAME, NamesOfDay, OTHER_NAMES, Statistics, document::has_room};
use crate::vm_row::number;

/// The fields of a process row that names are collected from.
#[derive(Clone, Copy)]
struct NamedRow<'a> {
    /// Effective date, Unix microseconds.
    effective: i64,
    /// Rows of one sample have the same `create_date`.
    create_date: &'a str,
    name: &'a str,
    cpu_util: f64,
    mem: f64,
    /// Number of processes that the row describes.
    processes: u32,
}

/// Collects names. Its memory is bounded, because the number of names of a day is.
pub(crate) struct Collector<'a> {
    day_ms: i64,
    /// The names that the day has already.
    known: &'a BTreeMap<String, Statistics>,
    /// Number of names that the day does not have yet.
    new: usize,
    places: HashMap<String, usize>,
    statistics: Vec<Statistics>,
    pub(crate) is_full: bool,
    samples: HashMap<String, u32>,
    /// Number of processes by sample and name.
    counts: HashMap<(u32, usize), u32>,
}

impl<'a> Collector<'a> {
    /// Creates a collector for the day that begins at this time in Unix milliseconds.
    pub(crate) fn new(day_ms: i64, known: &'a BTreeMap<String, Statistics>) -> Self {
        Self {
            day_ms,
            known,
            new: 0,
            places: HashMap::new(),
            statistics: Vec::new(),
            is_full: false,
            samples: HashMap::new(),
            counts: HashMap::new(),
        }
    }

    /// Adds a stored row with the fields `cmd`, `cpu_util`, `mem` and `processes`, like [`Collector::add`]. A summed row
    /// counts as many processes as it sums. The row `other processes` is skipped, because it has no process name.
    pub(crate) fn add_stored(&mut self, effective: i64, create_date: &str, row: &RawDocument) {
        let value = |key: &str| row.get(key).ok().flatten();
        let sum = value("processes");
        let processes = match sum {
            Some(RawBsonRef::Int32(count)) => u32::try_from(count).unwrap_or(1).max(1),
            Some(RawBsonRef::Int64(count)) => u32::try_from(count).unwrap_or(1).max(1),
            _ => 1,
        };
        if let Some(RawBsonRef::String(name)) = value("cmd")
            && (sum.is_none() || name != OTHER_PROCESSES)
        {
            self.add(&NamedRow {
                effective,
                create_date,
                name,
                cpu_util: value("cpu_util").and_then(number).unwrap_or(0.0),
                mem: value("mem").and_then(number).unwrap_or(0.0),
                processes,
            });
        }
    }

    /// Adds a row of the day. A row must not be added twice before [`Collector::end_samples`].
    fn add(&mut self, row: &NamedRow<'_>) {
        let at_ms = row.effective.div_euclid(1000).saturating_sub(self.day_ms);
        let Ok(at_ms) = u32::try_from(at_ms) else { return };
        if row.name.is_empty() {
            return;
        }
        let of_row = Statistics::of_row(at_ms, row.cpu_util, row.mem);
        let name = self.kept_name(row.name);
        let place = if let Some(place) = self.places.get(name) {
            *place
        } else {
            self.places.insert(name.to_owned(), self.statistics.len());
            self.statistics.push(of_row);
            self.statistics.len() - 1
        };
        if let Some(statistics) = self.statistics.get_mut(place) {
            statistics.merge(&of_row);
        }
        let sample = if let Some(sample) = self.samples.get(row.create_date) {
            *sample
        } else {
            let sample = u32::try_from(self.samples.len()).unwrap_or(u32::MAX);
            self.samples.insert(row.create_date.to_owned(), sample);
            sample
        };
        let count = self.counts.entry((sample, place)).or_default();
        *count = count.saturating_add(row.processes);
    }

    /// The name under which a name is kept: itself, or [`OTHER_NAMES`] beyond the limits.
    fn kept_name<'b>(&mut self, name: &'b str) -> &'b str {
        if self.places.contains_key(name) {
            return name;
        }
        let is_new = !self.known.contains_key(name);
        if name.len() > MAX_NAME || is_new && name != OTHER_NAMES && !has_room(self.known, self.new) {
            self.is_full = true;
            return OTHER_NAMES;
        }
        self.new += usize::from(is_new && name != OTHER_NAMES);
        name
    }

    /// Ends the samples whose rows were added, so that their processes are counted.
    pub(crate) fn end_samples(&mut self) {
        for ((_, place), count) in self.counts.drain() {
            if let Some(statistics) = self.statistics.get_mut(place) {
                statistics.processes = statistics.processes.max(count);
            }
        }
        self.samples.clear();
    }

    /// Forgets how many processes the samples had, because their rows are added again.
    pub(crate) fn forget_samples(&mut self) {
        self.counts.clear();
        self.samples.clear();
    }

    /// The names of the rows that were added.
    pub(crate) fn finish(mut self) -> NamesOfDay {
        self.end_samples();
        let Self {
            places, statistics, ..
        } = self;
        let names = places
            .into_iter()
            .filter_map(|(name, place)| Some((name, *statistics.get(place)?)));
        NamesOfDay {
            names: names.collect(),
            is_full: self.is_full,
            ..NamesOfDay::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use bson::rawdoc;

    use super::*;
    use crate::names::MAX_NAMES;

    const DAY_MS: i64 = 1_483_228_800_000;

    fn row<'a>(minute: i64, name: &'a str, create_date: &'a str, cpu_util: f64) -> NamedRow<'a> {
        NamedRow {
            effective: (DAY_MS + minute * 60_000) * 1000,
            create_date,
            name,
            cpu_util,
            mem: 0.5,
            processes: 1,
        }
    }

    #[test]
    fn statistics_are_of_all_rows_with_the_name() {
        let known = BTreeMap::new();
        let mut names = Collector::new(DAY_MS, &known);
        for (minute, name, sample, cpu_util) in [
            (61, "worker", "a", 3.0),
            (61, "worker", "a", 9.0),
            (61, "bash", "a", 1.0),
            (130, "worker", "b", 5.0),
            (5, "worker", "c", 0.0),
        ] {
            names.add(&row(minute, name, sample, cpu_util));
        }
        let found = names.finish();
        assert_eq!(found.names.keys().collect::<Vec<_>>(), ["bash", "worker"]);
        let worker = &found.names["worker"];
        assert_eq!((worker.first_ms, worker.last_ms), (5 * 60_000, 130 * 60_000));
        assert_eq!((worker.hours.ends(), worker.hours.count()), (Some((0, 2)), 3));
        assert_eq!((worker.processes, worker.cpu_util, worker.mem), (2, 9.0, 0.5));
        assert!(!found.is_full);
    }

    #[test]
    fn summed_rows_count_their_processes() {
        let known = BTreeMap::new();
        let mut names = Collector::new(DAY_MS, &known);
        for row in [
            rawdoc! { "cmd": "sh", "cpu_util": 80.0, "mem": 0.0, "processes": 1200 },
            rawdoc! { "cmd": "sh", "cpu_util": 1.0, "mem": 0.5 },
            rawdoc! { "cmd": "make", "cpu_util": 2.0, "mem": 0.0, "processes": null },
            rawdoc! { "cmd": OTHER_PROCESSES, "cpu_util": 2.0, "mem": 0.0, "processes": 7 },
        ] {
            names.add_stored(DAY_MS * 1000, "a", &row);
        }
        let found = names.finish().names;
        let counts: Vec<_> = found
            .iter()
            .map(|(name, of_name)| (name.as_str(), of_name.processes))
            .collect();
        assert_eq!(counts, [("make", 1), ("sh", 1201)]);
    }

    #[test]
    fn sample_that_is_read_again_is_counted_once() {
        let known = BTreeMap::new();
        let mut names = Collector::new(DAY_MS, &known);
        for _ in 0..2 {
            names.forget_samples();
            names.add(&row(1, "worker", "a", 1.0));
            names.add(&row(1, "worker", "a", 1.0));
        }
        names.end_samples();
        names.add(&row(1, "worker", "a", 1.0));
        assert_eq!(names.finish().names["worker"].processes, 2);
    }

    #[test]
    fn names_beyond_the_limits_are_merged_into_one_and_known_names_are_kept() {
        let known_name = ("known".to_owned(), Statistics::of_row(0, 1.0, 1.0));
        let known = BTreeMap::from([known_name]);
        let mut names = Collector::new(DAY_MS, &known);
        for number in 0..MAX_NAMES + 6 {
            let sample = if number % 2 == 0 { "a" } else { "b" };
            names.add(&row(2, &format!("name-{number}"), sample, 1.0));
        }
        names.add(&row(1, "known", "a", 1.0));
        names.add(&row(3, "one more", "b", 4.0));
        let found = names.finish();
        // The day has the known name and all others but one, and the seven and one that follow are merged.
        assert_eq!(found.names.len(), MAX_NAMES + 1);
        assert!(found.is_full && found.names.contains_key("known"));
        let other = &found.names[OTHER_NAMES];
        assert_eq!((other.first_ms, other.last_ms), (2 * 60_000, 3 * 60_000));
        assert_eq!((other.processes, other.cpu_util), (5, 4.0));

        // A later pass merges further names, and none takes the room of another.
        let mut known = known;
        known.extend(found.names);
        let mut names = Collector::new(DAY_MS, &known);
        names.add(&row(1, "yet another", "c", 1.0));
        let found = names.finish();
        assert_eq!(found.names.keys().collect::<Vec<_>>(), [OTHER_NAMES]);

        let known = BTreeMap::new();
        let mut names = Collector::new(DAY_MS, &known);
        names.add(&row(1, &"x".repeat(MAX_NAME + 1), "a", 1.0));
        names.add(&row(1, "", "a", 1.0));
        let found = names.finish();
        assert_eq!(found.names.keys().collect::<Vec<_>>(), [OTHER_NAMES]);
        assert!(found.is_full);
    }
}
