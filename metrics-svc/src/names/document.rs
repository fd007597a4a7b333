//! The document of one VM and day.

use std::collections::BTreeMap;

use bson::{Binary, Bson, DateTime, Document, RawBsonRef, RawDocument, doc, spec::BinarySubtype};

use super::{
    MAX_NAMES, OTHER_NAMES,
    statistics::{self, Statistics, StatisticsError},
};
use crate::blocks::Expires;

/// A stored document.
pub(crate) struct StoredNames<'a> {
    /// Start of the day, Unix milliseconds.
    pub(crate) day_ms: i64,
    names: Vec<&'a str>,
    statistics: Vec<Statistics>,
    /// Whether names are stored as [`OTHER_NAMES`], or were left out by an older version.
    pub(crate) is_full: bool,
    expires: Expires,
}

impl<'a> StoredNames<'a> {
    pub(crate) fn from_document(document: &'a RawDocument) -> Result<Self, StatisticsError> {
        let lacks_field = |_| StatisticsError::Corrupt("a field is missing");
        let names = document.get_array("names").map_err(lacks_field)?;
        let names = names.into_iter().map(|name| match name {
            Ok(RawBsonRef::String(name)) => Ok(name),
            _ => Err(StatisticsError::Corrupt("a name is not a text")),
        });
        let names = names.collect::<Result<Vec<_>, _>>()?;
        let bytes = document.get_binary("statistics").map_err(lacks_field)?.bytes;
        let expires = document.get_datetime("expires").ok();
        Ok(Self {
            day_ms: document
                .get_datetime("day")
                .map_err(lacks_field)?
                .timestamp_millis(),
            statistics: statistics::decode(bytes, names.len())?,
            names,
            is_full: document.get_datetime("full").is_ok(),
            expires: expires.map_or(Expires::Never, |at| Expires::At(at.timestamp_millis())),
        })
    }

    /// The names in their order, with their statistics.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&'a str, Statistics)> {
        self.names.iter().copied().zip(self.statistics.iter().copied())
    }
}

/// The names of one VM and day.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct NamesOfDay {
    pub(crate) names: BTreeMap<String, Statistics>,
    /// Whether names are stored as [`OTHER_NAMES`], or were left out by an older version.
    pub(crate) is_full: bool,
    pub(crate) expires: Expires,
}

impl NamesOfDay {
    pub(crate) fn of_stored(stored: &StoredNames<'_>) -> Self {
        let names = stored.iter();
        Self {
            names: names
                .map(|(name, statistics)| (name.to_owned(), statistics))
                .collect(),
            is_full: stored.is_full,
            expires: stored.expires,
        }
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.is_full |= other.is_full;
        self.expires = self.expires.max(other.expires);
        for (name, statistics) in &other.names {
            let is_kept = name == OTHER_NAMES || self.names.contains_key(name) || has_room(&self.names, 0);
            self.is_full |= !is_kept;
            let name = if is_kept { name } else { OTHER_NAMES };
            if let Some(own) = self.names.get_mut(name) {
                own.merge(statistics);
            } else {
                self.names.insert(name.to_owned(), *statistics);
            }
        }
    }

    /// The fields of the document that depend on the rows, without the names themselves.
    pub(super) fn fields(&self, day_ms: i64) -> Document {
        let bytes = statistics::encode(self.names.values());
        let subtype = BinarySubtype::Generic;
        let mut fields = doc! { "statistics": Binary { subtype, bytes } };
        if self.is_full {
            fields.insert("full", DateTime::from_millis(day_ms));
        }
        if let Expires::At(at_ms) = self.expires {
            fields.insert("expires", DateTime::from_millis(at_ms));
        }
        fields
    }

    /// The sorted names.
    pub(super) fn sorted(&self) -> Bson {
        self.names.keys().collect::<Vec<_>>().into()
    }
}

/// Whether a VM and day with these names, and with this number of further ones, may have one more.
pub(super) fn has_room(names: &BTreeMap<String, Statistics>, more: usize) -> bool {
    names.len() + more < MAX_NAMES + usize::from(names.contains_key(OTHER_NAMES))
}

#[cfg(test)]
mod tests {
    use bson::RawDocumentBuf;

    use super::*;

    const GOLDEN: &str = include_str!("../../../tests/golden/forms/process-names.json");
    const DAY_MS: i64 = 1_483_228_800_000;

    #[test]
    fn stored_names_match_golden_file_and_unknown_fields_are_ignored() {
        let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
        let Bson::Document(mut golden) = Bson::try_from(golden).unwrap() else {
            panic!("the golden file is not a document");
        };
        golden.insert("of_a_newer_version", 1);
        let raw = RawDocumentBuf::try_from(&golden).unwrap();
        let names = NamesOfDay::of_stored(&StoredNames::from_document(&raw).unwrap());
        assert_eq!(names.names.keys().collect::<Vec<_>>(), ["bash", "nginx"]);
        let nginx = &names.names["nginx"];
        assert_eq!(
            (nginx.first_ms, nginx.last_ms, nginx.hours.count()),
            (60_000, 7_260_000, 2)
        );
        assert_eq!((nginx.processes, nginx.cpu_util, nginx.mem), (3, 12.5, 0.5));
        assert!(names.is_full);
        let fields = names.fields(DAY_MS);
        for key in ["statistics", "full", "expires"] {
            assert_eq!(fields.get(key), golden.get(key), "{key}");
        }
        assert_eq!(Some(&names.sorted()), golden.get("names"));
    }

    #[test]
    fn names_beyond_the_limit_are_merged_into_one() {
        let of = |range: std::ops::Range<u32>| NamesOfDay {
            names: range
                .map(|number| (format!("name-{number}"), Statistics::of_row(number, 1.0, 1.0)))
                .collect(),
            ..NamesOfDay::default()
        };
        let most = u32::try_from(MAX_NAMES).unwrap();
        let mut day = of(0..most - 1);
        day.merge(&of(0..1));
        day.merge(&of(most..most + 1));
        assert_eq!((day.names.len(), day.is_full), (MAX_NAMES, false));
        for _ in 0..2 {
            day.merge(&of(most + 7..most + 9));
            assert_eq!((day.names.len(), day.is_full), (MAX_NAMES + 1, true));
            let other = &day.names[OTHER_NAMES];
            assert_eq!((other.first_ms, other.last_ms), (most + 7, most + 8));
        }
        let mut again = NamesOfDay::default();
        again.merge(&day);
        assert_eq!(again, day, "the name of the others takes no room");
    }
}
