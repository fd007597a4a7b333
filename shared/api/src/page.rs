//! Limits the size of one page of a list, both in items and in bytes.

use std::io;

use serde::Serialize;

/// Maximum size of the encoded items of one page of a list. Including its envelope, a reply with such a page is smaller
/// than 1 MiB, the default `max_payload` of NATS.
pub const PAGE_BYTES: usize = 768 * 1024;

/// The remaining space on a page of a list while items are added.
#[derive(Debug)]
pub struct PageRoom {
    items: usize,
    bytes: usize,
    empty: bool,
}

impl PageRoom {
    /// Returns the space of an empty page: at most `items` items and [`PAGE_BYTES`] bytes.
    pub const fn new(items: usize) -> Self {
        Self {
            items,
            bytes: PAGE_BYTES,
            empty: true,
        }
    }

    /// Reserves space for an item of the given encoded size; returns `false` if the page is full. The first item always
    /// fits, whatever its size, so a client that requests page after page always reaches the end of the list.
    #[must_use]
    pub const fn take(&mut self, bytes: usize) -> bool {
        // One byte is added for the comma between two items.
        let bytes = bytes.saturating_add(1);
        if self.items == 0 || (bytes > self.bytes && !self.empty) {
            return false;
        }
        self.items -= 1;
        self.bytes = self.bytes.saturating_sub(bytes);
        self.empty = false;
        true
    }

    /// Like [`PageRoom::take`], but computes the encoded size of the item first.
    #[must_use]
    pub fn take_item(&mut self, item: &impl Serialize) -> bool {
        self.take(encoded_bytes(item))
    }

    /// The number of items that still fit on the page.
    pub const fn items(&self) -> usize {
        self.items
    }
}

/// Returns the first page of a list and whether further items remain.
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

/// The size of a value encoded as JSON.
fn encoded_bytes(value: &impl Serialize) -> usize {
    let mut counter = Counter(0);
    // Encoding into the byte counter cannot fail for the types in use. If it did, encoding the whole reply would fail
    // as well and report the cause.
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
    fn page_is_limited_in_items_and_in_bytes() {
        assert_eq!(first_page([1, 2, 3], 3), (vec![1, 2, 3], false));
        assert_eq!(first_page([1, 2, 3], 2), (vec![1, 2], true));
        // The control character U+0001 takes six bytes in JSON; the quotes add two bytes.
        let name = "\u{1}".repeat(256);
        let (page, more) = first_page(std::iter::repeat_n(name.as_str(), 1000), 1000);
        assert!(more && page.len() == PAGE_BYTES / (6 * 256 + 3), "{}", page.len());
        let encoded = serde_json::to_vec(&page).unwrap();
        assert!(encoded.len() <= PAGE_BYTES + 1, "{}", encoded.len());
    }

    #[test]
    fn first_item_of_a_page_may_have_any_size() {
        let large = "x".repeat(PAGE_BYTES + 1);
        assert_eq!(
            first_page([large.as_str(), "y"], 10),
            (vec![large.as_str()], true)
        );
        assert_eq!(first_page(["y", large.as_str()], 10), (vec!["y"], true));
        assert_eq!(first_page::<&str>([], 10), (vec![], false));
    }
}
