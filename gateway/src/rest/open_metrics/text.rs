//! Writes metrics in the text format of OpenMetrics 1.0, compressed while they are written, so that the whole text is
//! never in memory.

use std::{
    fmt::Write as _,
    io::{self, Read, Write as _},
    iter,
};

use bytes::{Buf, Bytes};
use flate2::{Compression, read::GzDecoder, write::GzEncoder};

/// Media type of the text.
pub(super) const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Size of the parts in which the text is compressed and decompressed.
const PART: usize = 64 * 1024;

/// A family of metrics.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    /// Name of the family, which ends with the unit if there is one.
    pub(super) name: &'static str,
    /// Type of the family: `gauge` or `info`.
    pub(super) kind: &'static str,
    /// Unit of the values; empty if they have none.
    pub(super) unit: &'static str,
    pub(super) help: &'static str,
}

/// A text that is being written.
pub(super) struct Text {
    part: String,
    gzip: GzEncoder<Vec<u8>>,
    family: Family,
}

impl Family {
    pub(super) const fn gauge(name: &'static str, unit: &'static str, help: &'static str) -> Self {
        Self {
            name,
            kind: "gauge",
            unit,
            help,
        }
    }
}

impl Text {
    /// Begins a text with its first family.
    pub(super) fn new(first: Family) -> Self {
        let mut text = Self {
            part: String::with_capacity(PART + 1024),
            gzip: GzEncoder::new(Vec::new(), Compression::fast()),
            family: first,
        };
        text.begin(first);
        text
    }

    /// Begins a family. All of its samples must follow before the next family begins.
    pub(super) fn begin(&mut self, family: Family) {
        let Family {
            name,
            kind,
            unit,
            help,
        } = family;
        // Writing to a string cannot fail.
        let _ = writeln!(self.part, "# TYPE {name} {kind}");
        if !unit.is_empty() {
            let _ = writeln!(self.part, "# UNIT {name} {unit}");
        }
        let _ = writeln!(self.part, "# HELP {name} {help}");
        self.family = family;
    }

    /// Writes a sample of the family. `labels` are encoded labels, separated by commas.
    pub(super) fn sample(&mut self, labels: &str, value: f64) -> io::Result<()> {
        let suffix = if self.family.kind == "info" { "_info" } else { "" };
        let name = self.family.name;
        // Writing to a string cannot fail.
        let _ = if labels.is_empty() {
            writeln!(self.part, "{name}{suffix} {value}")
        } else {
            writeln!(self.part, "{name}{suffix}{{{labels}}} {value}")
        };
        if self.part.len() >= PART {
            self.gzip.write_all(self.part.as_bytes())?;
            self.part.clear();
        }
        Ok(())
    }

    /// Ends the text, and returns it compressed.
    pub(super) fn finish(mut self) -> io::Result<Bytes> {
        self.part.push_str("# EOF\n");
        self.gzip.write_all(self.part.as_bytes())?;
        let mut compressed = self.gzip.finish()?;
        compressed.shrink_to_fit();
        Ok(compressed.into())
    }
}

/// Adds a label to encoded labels.
pub(super) fn push_label(labels: &mut String, name: &str, value: &str) {
    if !labels.is_empty() {
        labels.push(',');
    }
    labels.push_str(name);
    labels.push_str("=\"");
    for character in value.chars() {
        match character {
            '\\' => labels.push_str("\\\\"),
            '"' => labels.push_str("\\\""),
            '\n' => labels.push_str("\\n"),
            // Parsers written in C or Go may take it for the end of the text.
            '\0' => labels.push('\u{fffd}'),
            other => labels.push(other),
        }
    }
    labels.push('"');
}

/// Decompresses a text part by part, for clients that do not accept gzip.
pub(super) fn plain(gzip: Bytes) -> impl Iterator<Item = io::Result<Bytes>> {
    let mut text = GzDecoder::new(gzip.reader());
    iter::from_fn(move || {
        let mut part = vec![0; PART];
        match text.read(&mut part) {
            Ok(0) => None,
            Ok(length) => {
                part.truncate(length);
                Some(Ok(part.into()))
            }
            Err(error) => Some(Err(error)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_types_units_and_an_end() {
        let mut text = Text::new(Family::gauge("a_bytes", "bytes", "Some bytes."));
        text.sample("", 1.5).unwrap();
        text.begin(Family {
            kind: "info",
            ..Family::gauge("b", "", "Names.")
        });
        text.sample("name=\"x\"", 1.0).unwrap();
        let parts = plain(text.finish().unwrap()).map(Result::unwrap);
        assert_eq!(
            String::from_utf8(parts.collect::<Vec<_>>().concat()).unwrap(),
            "# TYPE a_bytes gauge\n# UNIT a_bytes bytes\n# HELP a_bytes Some bytes.\na_bytes 1.5\n\
             # TYPE b info\n# HELP b Names.\nb_info{name=\"x\"} 1\n# EOF\n"
        );
    }

    #[test]
    fn long_text_is_the_same_after_decompression() {
        let mut text = Text::new(Family::gauge("a", "", "A."));
        for number in 0..50_000 {
            text.sample(&format!("number=\"{number}\""), f64::from(number))
                .unwrap();
        }
        let gzip = text.finish().unwrap();
        let parts: Vec<_> = plain(gzip.clone()).map(Result::unwrap).collect();
        assert!(parts.len() > 10 && parts.iter().all(|part| part.len() <= PART));
        let whole = parts.concat();
        assert!(gzip.len() < whole.len() / 2, "{} {}", gzip.len(), whole.len());
        assert!(whole.ends_with(b"a{number=\"49999\"} 49999\n# EOF\n"));
        let cut = gzip.slice(..gzip.len() / 2);
        assert!(plain(cut).any(|part| part.is_err()));
    }

    #[test]
    fn label_values_are_escaped() {
        for (value, encoded) in [
            ("", r#"x="""#),
            (r#"say "hi""#, r#"x="say \"hi\"""#),
            ("two\nlines", r#"x="two\nlines""#),
            (r"C:\new", r#"x="C:\\new""#),
            ("数据库 🚀", "x=\"数据库 🚀\""),
            ("a\0b", "x=\"a\u{fffd}b\""),
            ("}, # {", r#"x="}, # {""#),
        ] {
            let mut labels = String::new();
            push_label(&mut labels, "x", value);
            assert_eq!(labels, encoded);
            push_label(&mut labels, "y", "");
            assert_eq!(labels, format!("{encoded},y=\"\""));
        }
    }
}
