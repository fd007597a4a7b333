//! Rules for the retention of rows by the labels of their VM.

use std::{str::FromStr, time::Duration};

use vmwatch_api::{
    labels::{HYPERVISOR_LABEL, InvalidLabelKey, InvalidLabelValue, LabelKey, LabelValue},
    vms::LabelFilter,
};
use vmwatch_service::config::{InvalidSpan, Span};

use crate::row_kind::RowKind;

/// Maximum number of rules, because each block of rows is compared with them.
const MAX_RULES: usize = 64;
/// The shortest and the longest retention: the limits of the settings without labels.
const LIMITS: [Duration; 2] = [Duration::from_secs(1), Duration::from_hours(24 * 18_250)];

/// Rules for the retention of rows. The first rule that matches a VM and a kind of rows applies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RetentionRules(Vec<RetentionRule>);

/// The retention of rows of VMs that have a label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RetentionRule {
    pub(crate) label: LabelFilter,
    /// The kind of rows; `None` means all. Rows of filesystems are kept like those of their VM.
    pub(crate) kind: Option<RowKind>,
    pub(crate) keep: Duration,
}

/// Why a text is not a list of rules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRules {
    /// A rule lacks its label or its time.
    #[error(
        "the rule `{0}` must be a label and a time, such as env=prod:365d; :vm or :process between them limits it to one kind of rows"
    )]
    Form(String),
    /// The key of the label is not valid.
    #[error("the rule `{0}`: {1}")]
    Key(String, InvalidLabelKey),
    /// The value of the label is not valid.
    #[error("the rule `{0}`: {1}")]
    Value(String, InvalidLabelValue),
    /// The retention is not a duration.
    #[error("the rule `{0}`: {1}")]
    Time(String, InvalidSpan),
    /// The retention is too short or too long.
    #[error("the rule `{0}`: the time must be from 1s to 18250d")]
    Range(String),
    /// There are too many rules.
    #[error("there are more than {MAX_RULES} rules")]
    TooMany,
}

impl RetentionRules {
    /// The rules for rows of this kind, in the order in which they apply.
    pub(crate) fn of(&self, kind: RowKind) -> impl Iterator<Item = &RetentionRule> {
        let applies = move |rule: &&RetentionRule| rule.kind.is_none_or(|of| of == kind.retained_as());
        self.0.iter().filter(applies)
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromStr for RetentionRules {
    type Err = InvalidRules;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let texts = text.split(',').map(str::trim).filter(|text| !text.is_empty());
        let rules: Vec<_> = texts.map(str::parse).collect::<Result<_, _>>()?;
        if rules.len() > MAX_RULES {
            return Err(InvalidRules::TooMany);
        }
        Ok(Self(rules))
    }
}

impl FromStr for RetentionRule {
    type Err = InvalidRules;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidRules::Form(text.to_owned());
        // The value of a label may contain colons.
        let (label, keep) = text.rsplit_once(':').ok_or_else(invalid)?;
        let (label, kind) = match label.rsplit_once(':') {
            Some((label, "vm")) => (label, Some(RowKind::Vm)),
            Some((label, "process")) => (label, Some(RowKind::Process)),
            _ => (label, None),
        };
        let label: LabelFilter = label.parse().map_err(|_| invalid())?;
        if !label.key.starts_with(HYPERVISOR_LABEL) {
            let key = label.key.parse::<LabelKey>();
            key.map_err(|error| InvalidRules::Key(text.to_owned(), error))?;
        }
        if let Some(value) = &label.value {
            let value = value.parse::<LabelValue>();
            value.map_err(|error| InvalidRules::Value(text.to_owned(), error))?;
        }
        let keep: Span = keep
            .parse()
            .map_err(|error| InvalidRules::Time(text.to_owned(), error))?;
        let [shortest, longest] = LIMITS;
        if !(shortest..=longest).contains(&keep.0) {
            return Err(InvalidRules::Range(text.to_owned()));
        }
        Ok(Self {
            label,
            kind,
            keep: keep.0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_in_their_order() {
        let rules: RetentionRules = "env=prod:365d, env=prod:process:90d,hv/title=a:b:process:7d, team:5m,"
            .parse()
            .unwrap();
        let read: Vec<_> = rules
            .0
            .iter()
            .map(|rule| (rule.label.to_string(), rule.kind, rule.keep.as_secs()))
            .collect();
        let expected = [
            ("env=prod", None, 365 * 86_400),
            ("env=prod", Some(RowKind::Process), 90 * 86_400),
            ("hv/title=a:b", Some(RowKind::Process), 7 * 86_400),
            ("team", None, 300),
        ];
        assert_eq!(
            read,
            expected.map(|(label, kind, keep)| (label.to_owned(), kind, keep))
        );
        let of_vms: Vec<_> = rules.of(RowKind::Vm).map(|rule| rule.keep.as_secs()).collect();
        assert_eq!(of_vms, [365 * 86_400, 300]);
        assert!(rules.of(RowKind::Filesystem).eq(rules.of(RowKind::Vm)));
    }

    #[test]
    fn invalid_rule_is_named_with_the_reason() {
        for (text, rule, reason) in [
            ("team:1d,env=prod", "env=prod", "must be a label and a time"),
            ("=prod:1d", "=prod:1d", "must be a label and a time"),
            ("env=prod:a year", "env=prod:a year", "write a whole number"),
            ("env=prod:0s", "env=prod:0s", "from 1s to 18250d"),
            ("env=prod:18251d", "env=prod:18251d", "from 1s to 18250d"),
            ("my env=prod:1d", "my env=prod:1d", "a label key must"),
            ("env=a\u{7}:1d", "env=a\u{7}:1d", "a label value must"),
        ] {
            let error = text.parse::<RetentionRules>().unwrap_err().to_string();
            assert!(
                error.contains(&format!("`{rule}`")) && error.contains(reason),
                "{text}: {error}"
            );
        }
        let many = "a:1d,".repeat(MAX_RULES + 1);
        assert_eq!(many.parse::<RetentionRules>(), Err(InvalidRules::TooMany));
    }
}
