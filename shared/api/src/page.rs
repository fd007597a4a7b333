//! Limits of one page of a list, in items and in bytes.

use std::io;

use serde::Serialize;

/// Maximum size of the encoded items of a page. With its envelope, a page stays below NATS's default `max_payload` of
/// 1 MiB.
pub const PAGE_BYTES: usize = 768 * 1024;

/// The space left on a page that is being filled.
#[derive(Debug)]
pub struct PageRoom {
    items: usize,
    bytes: usize,
    empty: bool,
}

impl PageRoom {
    /// The space of an empty page: `items` items and [`PAGE_BYTES`] bytes.
    pub const fn new(items: usize) -> Self {
        Self {
            items,
            bytes: PAGE_BYTES,
            empty: true,
        }
    }

    /// Reserves space for an item of this many encoded bytes; `false` if the page is full. The first item always
    /// fits, so that a reader that follows the pages reaches the end of every list.
    #[must_use]
    pub const fn take(&mut self, bytes: usize) -> bool {
        // The comma that separates two items.
        let bytes = bytes.saturating_add(1);
        if self.items == 0 || (bytes > self.bytes && !self.empty) {
            return false;
        }
        self.items -= 1;
        self.bytes = self.bytes.saturating_sub(bytes);
        self.empty = false;
        true
    }

    /// Like [`PageRoom::take`], for an item that is not encoded yet.
    #[must_use]
    pub fn take_item(&mut self, item: &impl Serialize) -> bool {
        self.take(encoded_bytes(item))
    }

    /// The number of items that still fit.
    pub const fn items(&self) -> usize {
        self.items
    }
}

/// Returns the first page of a list, and whether more items follow.
pub fn first_page<T: Serialize>(list: impl IntoIterator<Item = T>, most: usize) -> (Vec<T>, bool) {
    let mut room = PageRoom::new(most);
    let mut page = Vec::new();
    for item in list {
        if !room.take_item(&item) {
            return (page, true);
        }
        page.push(item);
    }
    (page, false)
}

/// The encoded size of a value.
fn encoded_bytes(value: &impl Serialize) -> usize {
    let mut counter = Counter(0);
    // Flat records always encode. If encoding failed, encoding the whole reply would fail later and report the cause.
    let _ = serde_json::to_writer(&mut counter, value);
    counter.0
}

struct Counter(usize);

impl io::Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_page_by_items_and_bytes() {
        assert_eq!(first_page([1, 2, 3], 3), (vec![1, 2, 3], false));
        assert_eq!(first_page([1, 2, 3], 2), (vec![1, 2], true));
        // Each character is encoded in six bytes; two quotes are added.
        let name = "\u{1}".repeat(256);
        let (page, more) = first_page(std::iter::repeat_n(name.as_str(), 1000), 1000);
        assert!(more && page.len() == PAGE_BYTES / (6 * 256 + 3), "{}", page.len());
        let encoded = serde_json::to_vec(&page).unwrap();
        assert!(encoded.len() <= PAGE_BYTES + 1, "{}", encoded.len());
    }

    #[test]
    fn accepts_first_item_of_any_size() {
        let large = "x".repeat(PAGE_BYTES + 1);
        assert_eq!(
            first_page([large.as_str(), "y"], 10),
            (vec![large.as_str()], true)
        );
        assert_eq!(first_page(["y", large.as_str()], 10), (vec!["y"], true));
        assert_eq!(first_page::<&str>([], 10), (vec![], false));
    }
}
