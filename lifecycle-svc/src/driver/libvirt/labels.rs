//! Reads the labels of VMs from their libvirt XML.
//!
//! The title of a VM becomes the label `title`. Each element below `<metadata>` that has text and no child elements
//! becomes a label: its key is the names of the elements from `<metadata>` on, without namespaces, joined by dots.
//! Attributes are ignored.
//!
//! ```text
//! <title>Ledger</title>
//! <metadata><app:info xmlns:app="…"><app:owner>ann</app:owner></app:info></metadata>      title=Ledger, info.owner=ann
//! ```
//!
//! Reading the XML takes one call per VM, which a list of VMs does not need otherwise. Therefore each list reads the XML
//! of a limited number of VMs: first of those that were never read, then of those that were read longest ago.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use roxmltree::{Document, Node};
use tracing::debug;
use uuid::Uuid;
use virt::domain::Domain;

use crate::driver::labels::FoundLabels;

/// Maximum number of VMs of which one list reads the labels, and maximum time that this takes.
const MAX_READS: usize = 200;
const MAX_TIME: Duration = Duration::from_millis(500);
/// Age at which the labels of a VM are read again. With the default interval of 5 s, the lists of this time read the
/// labels of up to 24,000 VMs.
const REFRESH: Duration = Duration::from_mins(10);
/// VMs with longer XML get no labels.
const MAX_XML: usize = 1 << 20;

/// When the labels of each VM were last read.
#[derive(Debug, Clone, Default)]
pub(super) struct LabelReads(Arc<Mutex<HashMap<Uuid, Instant>>>);

impl LabelReads {
    /// Reads the labels of those of the listed VMs that are due. The result has no entry for other VMs.
    pub(super) fn read(&self, domains: &[(Uuid, &Domain)]) -> HashMap<Uuid, FoundLabels> {
        let began = Instant::now();
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let listed: HashSet<_> = domains.iter().map(|(uuid, _)| uuid).collect();
        last.retain(|uuid, _| listed.contains(uuid));
        let mut due: Vec<_> = domains
            .iter()
            .map(|(uuid, domain)| (last.get(uuid).copied(), uuid, domain))
            .filter(|(read, ..)| read.is_none_or(|read| began.duration_since(read) >= REFRESH))
            .collect();
        due.sort_by_key(|(read, ..)| *read);
        let mut found = HashMap::new();
        for (_, uuid, domain) in due.into_iter().take(MAX_READS) {
            let now = Instant::now();
            if now.duration_since(began) > MAX_TIME {
                break;
            }
            // A VM whose XML cannot be read is tried again only after the others.
            last.insert(*uuid, now);
            match domain.get_xml_desc(0) {
                Ok(xml) => drop(found.insert(*uuid, labels_of(&xml))),
                Err(error) => {
                    debug!(instance_id = %uuid, %error, "reading the labels of a VM failed; retrying later");
                }
            }
        }
        found
    }
}

/// The labels in the XML of a VM; none if the XML cannot be parsed.
fn labels_of(xml: &str) -> FoundLabels {
    let mut labels = FoundLabels::default();
    let parsed = (xml.len() <= MAX_XML).then(|| Document::parse(xml));
    let Some(Ok(document)) = parsed else {
        labels.omitted = 1;
        return labels;
    };
    let domain = document.root_element();
    let child = |name: &str| domain.children().find(|node| node.has_tag_name(name));
    if let Some(title) = child("title").and_then(|title| text_of(&title)) {
        labels.add("title", title);
    }
    let Some(metadata) = child("metadata") else {
        return labels;
    };
    for element in metadata.descendants().filter(|node| *node != metadata) {
        if let Some(text) = text_of(&element) {
            let mut names: Vec<_> = element
                .ancestors()
                .take_while(|node| *node != metadata)
                .map(|node| node.tag_name().name())
                .collect();
            names.reverse();
            labels.add(&names.join("."), text);
        }
    }
    labels
}

/// The text of an element without child elements; `None` if it has none.
fn text_of<'a>(element: &Node<'a, '_>) -> Option<&'a str> {
    let has_elements = element.children().any(|child| child.is_element());
    let text = element.is_element().then(|| element.text()).flatten()?.trim();
    (!has_elements && !text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_title_and_metadata_elements_with_text() {
        let xml = r#"<domain type="kvm"><name>a</name><title> Ledger </title><description>no label</description>
            <metadata>
              <app:owner xmlns:app="http://app.example/">ann &amp; bob</app:owner>
              <nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
                <nova:package version="34.0.0"/>
                <nova:flavor name="m1.tiny"><nova:memory>64</nova:memory><nova:disk> </nova:disk></nova:flavor>
              </nova:instance>
              <app:owner xmlns:app="http://other.example/">second</app:owner>
              <note>two
lines</note>
            </metadata>
            <os><type>hvm</type></os></domain>"#;
        let found = labels_of(xml);
        let labels: Vec<_> = found
            .labels
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        assert_eq!(
            labels,
            [
                ("instance.flavor.memory", "64"),
                ("owner", "ann & bob"),
                ("title", "Ledger")
            ]
        );
        assert_eq!(found.omitted, 2);
    }

    #[test]
    fn damaged_or_huge_xml_gives_no_labels_and_is_counted() {
        let huge = format!("<domain><title>{}</title></domain>", "x".repeat(MAX_XML));
        let deep = format!("<domain><metadata>{}</metadata></domain>", "<a>".repeat(10_000));
        let bomb = r#"<!DOCTYPE d [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><domain><title>&b;</title></domain>"#;
        for xml in ["", "<domain>", &huge, &deep, bomb] {
            let found = labels_of(xml);
            assert_eq!((found.labels.len(), found.omitted), (0, 1), "{xml:.60}");
        }
        assert_eq!(
            labels_of("<domain><name>a</name></domain>"),
            FoundLabels::default()
        );
    }
}
