//! Which process names a query selects.

use bson::{Document, doc};

/// Maximum length of names that the kernel reports, in bytes.
const KERNEL_NAME: usize = 15;

/// Selects names: some in full, and those that begin with a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NameMatch {
    names: Vec<String>,
    prefix: Option<String>,
}

impl NameMatch {
    /// Processes with this name. The kernel cuts names after 15 bytes, so older rows of a process with a longer name have
    /// its first 15 bytes.
    pub(crate) fn exact(name: &str) -> Self {
        let mut names = vec![name.to_owned()];
        names.extend(cut(name));
        Self { names, prefix: None }
    }

    /// Processes whose name begins with this prefix, or is what the kernel leaves of it.
    pub(crate) fn prefix(prefix: &str) -> Self {
        Self {
            names: cut(prefix).into_iter().collect(),
            prefix: Some(prefix.to_owned()),
        }
    }

    pub(crate) fn matches(&self, name: &str) -> bool {
        self.names.iter().any(|selected| selected == name)
            || self
                .prefix
                .as_ref()
                .is_some_and(|prefix| name.starts_with(prefix))
    }

    /// Whether the name alone is selected, so that no other name could be.
    pub(crate) fn is_only(&self, name: &str) -> bool {
        self.prefix.is_none() && self.names.first().is_some_and(|selected| selected == name)
    }

    /// Filters for a field that is a name. A document is selected if one of the filters selects it.
    pub(crate) fn filters(&self, field: &str) -> Vec<Document> {
        let names = self.names.iter().map(|name| doc! { field: name });
        let prefix = self.prefix.iter().map(|prefix| doc! { field: range(prefix) });
        names.chain(prefix).collect()
    }

    /// Filters for a field that is an array of names.
    pub(crate) fn array_filters(&self, field: &str) -> Vec<Document> {
        let names = self.names.iter().map(|name| doc! { field: name });
        // One element must be within both bounds.
        let prefix = self.prefix.iter();
        let prefix = prefix.map(|prefix| doc! { field: { "$elemMatch": range(prefix) } });
        names.chain(prefix).collect()
    }
}

fn cut(name: &str) -> Option<String> {
    let is_cut = name.len() > KERNEL_NAME;
    is_cut
        .then(|| name.get(..KERNEL_NAME).map(str::to_owned))
        .flatten()
}

/// The bounds of all texts that begin with a prefix. Texts are sorted by their bytes, which is the order of characters.
fn range(prefix: &str) -> Document {
    let mut bounds = doc! { "$gte": prefix };
    let mut chars: Vec<char> = prefix.chars().collect();
    while let Some(last) = chars.pop() {
        if let Some(next) = (u32::from(last) + 1..=u32::from(char::MAX)).find_map(char::from_u32) {
            chars.push(next);
            bounds.insert("$lt", chars.into_iter().collect::<String>());
            break;
        }
    }
    bounds
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn long_name_also_matches_what_the_kernel_leaves_of_it() {
        let exact = NameMatch::exact("systemd-timesyncd");
        assert!(exact.matches("systemd-timesyncd") && exact.matches("systemd-timesyn"));
        assert!(!exact.matches("systemd-timesync") && !exact.matches("systemd-timesyncd2"));
        assert!(!NameMatch::exact("systemd-timesyn").matches("systemd-timesyncd"));
        let prefix = NameMatch::prefix("systemd-timesync");
        assert!(prefix.matches("systemd-timesyncd") && prefix.matches("systemd-timesyn"));
        assert!(!prefix.matches("systemd-timesya"));
    }

    proptest! {
        #[test]
        fn bounds_contain_exactly_the_texts_with_the_prefix(prefix in ".{1,4}", other in ".{0,6}", rest in ".{0,3}") {
            let bounds = range(&prefix);
            let least = bounds.get_str("$gte").unwrap();
            let within = |text: &str| least <= text && bounds.get_str("$lt").map_or(true, |end| text < end);
            let longer = format!("{prefix}{rest}");
            prop_assert!(within(&longer));
            prop_assert_eq!(within(&other), other.starts_with(&prefix));
        }
    }
}
