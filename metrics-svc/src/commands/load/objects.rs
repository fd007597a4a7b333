//! Splits an export into its JSON objects: JSON Lines, or one array of objects as `mongoexport --jsonArray` writes it.
//! Holds one object in memory at a time.

use std::io::{self, BufRead, Chain, Cursor, Read};

use vmwatch_service::config::ByteSize;

/// Maximum length of an object in bytes; a row of the documented API has about 350.
const MAX_OBJECT: usize = 64 * 1024;
/// Number of bytes at the beginning of an export by which its format is recognised.
const HEAD: u64 = 512;
/// The first bytes of compressed files: gzip, zstd, xz, bzip2, zip.
const COMPRESSED: [&[u8]; 5] = [
    &[0x1f, 0x8b],
    &[0x28, 0xb5, 0x2f, 0xfd],
    &[0xfd, b'7', b'z', b'X', b'Z'],
    b"BZh",
    b"PK\x03\x04",
];

/// Why an export cannot be loaded at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unsupported {
    #[error(
        "it is compressed; unpack it and load its content, for example `gunzip --stdout FILE | vmwatch-metrics load -`"
    )]
    Compressed,
    #[error(
        "it is binary, like the BSON files of mongodump; load what mongoexport writes: JSON Lines, or one JSON array"
    )]
    Binary,
    #[error(
        "it is UTF-16 text; convert it to UTF-8, for example `iconv --from-code UTF-16 FILE | vmwatch-metrics load -`"
    )]
    Utf16,
    #[error(
        "its objects span several lines; JSON Lines have one object per line, so export without `--pretty`, or as one \
         array with `--jsonArray`"
    )]
    Pretty,
    #[error(
        "it looks like CSV; export without `--type=csv`, because load needs JSON Lines or one JSON array"
    )]
    Csv,
    #[error("it is not JSON; load needs JSON Lines (one object per line) or one array of objects")]
    NotJson,
}

/// The form of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// One object per line.
    Lines,
    /// One array of objects.
    Array,
    /// The array has ended.
    Ended,
}

/// Reads the objects of an export.
pub(super) struct Objects<R> {
    input: Chain<Cursor<Vec<u8>>, R>,
    form: Form,
    number: u64,
    object: Vec<u8>,
}

/// The number of a line or of an element of the array, from 1, and its text or why it is not an object.
pub(super) type Numbered<'a> = (u64, Result<&'a [u8], String>);

impl<R: BufRead> Objects<R> {
    /// Recognises the format of an export by its first bytes.
    pub(super) fn open(mut input: R) -> io::Result<Result<Self, Unsupported>> {
        let mut head = Vec::new();
        input.by_ref().take(HEAD).read_to_end(&mut head)?;
        if head.starts_with(&[0xef, 0xbb, 0xbf]) {
            head.drain(..3);
        }
        let objects = form_of(&head).map(|form| Self {
            input: Cursor::new(head).chain(input),
            form,
            number: 0,
            object: Vec::new(),
        });
        Ok(objects)
    }

    /// What [`Objects::next`] counts.
    pub(super) const fn unit(&self) -> &'static str {
        match self.form {
            Form::Lines => "line",
            Form::Array | Form::Ended => "element",
        }
    }

    /// Reads the next object.
    pub(super) fn next(&mut self) -> io::Result<Option<Numbered<'_>>> {
        match self.form {
            Form::Lines => self.line(),
            Form::Array => self.element(),
            Form::Ended => self.rest(),
        }
    }

    fn line(&mut self) -> io::Result<Option<Numbered<'_>>> {
        loop {
            self.object.clear();
            let most = u64::try_from(MAX_OBJECT).unwrap_or(u64::MAX).saturating_add(1);
            if self
                .input
                .by_ref()
                .take(most)
                .read_until(b'\n', &mut self.object)?
                == 0
            {
                return Ok(None);
            }
            self.number += 1;
            if !self.object.ends_with(b"\n") && self.object.len() > MAX_OBJECT {
                self.skip_while(|byte| byte != b'\n')?;
                self.consume_one()?;
            }
            if !self.object.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some((self.number, self.object())));
            }
        }
    }

    fn element(&mut self) -> io::Result<Option<Numbered<'_>>> {
        // The first element follows the bracket, the others a comma.
        let first = self.skip_while(|byte| byte.is_ascii_whitespace() || matches!(byte, b',' | b'['))?;
        self.number += 1;
        match first {
            Some(b'{') => self.read_object()?,
            Some(b']') => {
                self.consume_one()?;
                self.form = Form::Ended;
                return self.rest();
            }
            Some(_) => {
                self.skip_while(|byte| !matches!(byte, b'{' | b']'))?;
                let reason = "it is not a JSON object".to_owned();
                return Ok(Some((self.number, Err(reason))));
            }
            None => {
                self.form = Form::Ended;
                let reason = "the array is not closed, so the export is incomplete".to_owned();
                return Ok(Some((self.number, Err(reason))));
            }
        }
        Ok(Some((self.number, self.object())))
    }

    /// Reads an object up to its closing brace. Of one that is too long, only as much is kept as shows that.
    fn read_object(&mut self) -> io::Result<()> {
        self.object.clear();
        let mut nesting = Nesting::default();
        loop {
            let buffer = self.input.fill_buf()?;
            let end = buffer.iter().position(|byte| nesting.ends_with(*byte));
            let length = end.map_or(buffer.len(), |end| end + 1);
            let room = (MAX_OBJECT + 1).saturating_sub(self.object.len());
            let kept = buffer.get(..length.min(room)).unwrap_or_default();
            self.object.extend_from_slice(kept);
            self.input.consume(length);
            if end.is_some() || length == 0 {
                return Ok(());
            }
        }
    }

    /// Reports what follows the array.
    fn rest(&mut self) -> io::Result<Option<Numbered<'_>>> {
        if self.skip_while(|byte| byte.is_ascii_whitespace())?.is_none() {
            return Ok(None);
        }
        self.skip_while(|_| true)?;
        let reason = "other text follows the array; load one array, or JSON Lines".to_owned();
        Ok(Some((self.number, Err(reason))))
    }

    /// Skips bytes, and returns the first that is not skipped.
    fn skip_while(&mut self, skip: impl Fn(u8) -> bool) -> io::Result<Option<u8>> {
        loop {
            let buffer = self.input.fill_buf()?;
            let found = buffer.iter().position(|byte| !skip(*byte));
            let (length, byte) = (buffer.len(), found.and_then(|at| buffer.get(at)).copied());
            self.input.consume(found.unwrap_or(length));
            if byte.is_some() || length == 0 {
                return Ok(byte);
            }
        }
    }

    fn consume_one(&mut self) -> io::Result<()> {
        let has_more = !self.input.fill_buf()?.is_empty();
        self.input.consume(usize::from(has_more));
        Ok(())
    }

    fn object(&self) -> Result<&[u8], String> {
        if self.object.len() > MAX_OBJECT {
            let most = ByteSize(u64::try_from(MAX_OBJECT).unwrap_or(u64::MAX));
            return Err(format!("it is longer than {most}; a row has some hundred bytes"));
        }
        Ok(&self.object)
    }
}

fn form_of(head: &[u8]) -> Result<Form, Unsupported> {
    if COMPRESSED.iter().any(|magic| head.starts_with(magic)) {
        return Err(Unsupported::Compressed);
    }
    if head.starts_with(&[0xfe, 0xff]) || head.starts_with(&[0xff, 0xfe]) {
        return Err(Unsupported::Utf16);
    }
    if head.contains(&0) {
        return Err(Unsupported::Binary);
    }
    let text = head.trim_ascii_start();
    let mut lines = text.split(|byte| *byte == b'\n');
    let line = lines.next().unwrap_or_default().trim_ascii_end();
    match text.first() {
        Some(b'[') => Ok(Form::Array),
        Some(b'{') if line == b"{" => Err(Unsupported::Pretty),
        None | Some(b'{') => Ok(Form::Lines),
        Some(_) if line.contains(&b',') || line.contains(&b'\t') => Err(Unsupported::Csv),
        Some(_) => Err(Unsupported::NotJson),
    }
}

/// Finds the end of a JSON object.
#[derive(Debug, Default)]
struct Nesting {
    depth: u32,
    in_text: bool,
    escaped: bool,
}

impl Nesting {
    /// Takes the next byte, and returns whether it closes the object.
    const fn ends_with(&mut self, byte: u8) -> bool {
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' if self.in_text => self.escaped = true,
            b'"' => self.in_text = !self.in_text,
            b'{' if !self.in_text => self.depth = self.depth.saturating_add(1),
            b'}' if !self.in_text => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;

    type Found = (u64, Result<String, String>);

    /// The objects of an export that arrives in pieces of this length.
    fn objects_in_pieces(text: &[u8], piece: usize) -> Vec<Found> {
        let input = BufReader::with_capacity(piece, text);
        let mut objects = Objects::open(input).unwrap().unwrap();
        let mut found = Vec::new();
        while let Some((number, object)) = objects.next().unwrap() {
            let object = object.map(|object| String::from_utf8_lossy(object.trim_ascii()).into_owned());
            found.push((number, object));
        }
        found
    }

    fn objects(text: &str) -> Vec<Found> {
        let found = objects_in_pieces(text.as_bytes(), 1 << 16);
        assert_eq!(objects_in_pieces(text.as_bytes(), 1), found, "{text}");
        found
    }

    fn good(number: u64, text: &str) -> Found {
        (number, Ok(text.to_owned()))
    }

    #[test]
    fn lines_and_arrays_are_split_into_objects() {
        assert_eq!(
            objects("\n{\"a\":1}\r\n\n{}"),
            [good(2, "{\"a\":1}"), good(4, "{}")]
        );
        let nested = "{\"a\":{\"b\":\"}\\\"{\"},\n \"c\":[{}]}";
        assert_eq!(
            objects(&format!(" [{nested},\n{{}}\n]\n")),
            [good(1, nested), good(2, "{}")]
        );
        assert_eq!(objects("\u{feff}{}"), [good(1, "{}")]);
        for empty in ["", "\n", "[]", "[\n]\n"] {
            assert_eq!(objects(empty), [], "{empty:?}");
        }
    }

    #[test]
    fn incomplete_and_foreign_elements_are_reported() {
        for (text, reason) in [
            ("[{},", "the array is not closed"),
            ("[{}] {}", "other text follows"),
            ("[1, {}]", "it is not a JSON object"),
        ] {
            let found = objects(text);
            let reported = found
                .iter()
                .any(|(_, object)| object.as_ref().is_err_and(|error| error.starts_with(reason)));
            assert!(reported, "{text}: {found:?}");
        }
    }

    #[test]
    fn object_that_is_too_long_is_skipped() {
        let long = format!("{{\"a\":\"{}\"}}", "x".repeat(3 * MAX_OBJECT));
        for text in [format!("{long}\n{{}}"), format!("[{long},{{}}]")] {
            let found = objects_in_pieces(text.as_bytes(), 1 << 16);
            assert_eq!(found.len(), 2);
            let reason = found[0].1.clone().unwrap_err();
            assert!(reason.starts_with("it is longer than 64KiB"), "{reason}");
            assert_eq!(found[1], good(2, "{}"));
        }
    }

    #[test]
    fn other_formats_are_recognised() {
        let bson = [0x2f, 0, 0, 0, 7, b'_', b'i', b'd', 0];
        for (bytes, reason) in [
            (&[0x1f, 0x8b, 8, 0][..], Unsupported::Compressed),
            (&bson, Unsupported::Binary),
            (&[0x6d, 0xe2, 0x99, 0x81, 0], Unsupported::Binary),
            (&[0xff, 0xfe, b'{', 0], Unsupported::Utf16),
            (b"{\n  \"a\": 1\n}\n", Unsupported::Pretty),
            (b"_id,instance_id\n1,vm-1\n", Unsupported::Csv),
            (b"nothing\n", Unsupported::NotJson),
        ] {
            let found = Objects::open(bytes).unwrap();
            assert_eq!(found.err(), Some(reason));
        }
    }
}
