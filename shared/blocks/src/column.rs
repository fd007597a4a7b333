//! Encodes the values of one column, and reads them back.

use std::sync::Arc;

use crate::{
    BlockError,
    bytes::{Reader, push_varint},
    numbers::{push_doubles, push_integers, read_doubles, read_integers},
    value::{Cell, Type},
};

/// Says that the values of a column have different types.
const MIXED: u8 = 255;

/// Appends values. If all have one type, only that type is written; otherwise the type of each value is.
pub(crate) fn push_cells(out: &mut Vec<u8>, cells: &[Cell], texts: &[Arc<str>]) {
    let first = cells.first().map_or(Type::Missing, |cell| cell.kind);
    let types = if cells.iter().all(|cell| cell.kind == first) {
        out.push(first as u8);
        vec![first]
    } else {
        out.push(MIXED);
        out.extend(cells.iter().map(|cell| cell.kind as u8));
        let used = |kind: &Type| cells.iter().any(|cell| cell.kind == *kind);
        Type::ALL.into_iter().filter(used).collect()
    };
    for kind in types.into_iter().filter(|kind| kind.has_content()) {
        let bits = cells
            .iter()
            .filter(|cell| cell.kind == kind)
            .map(|cell| cell.bits);
        match kind {
            Type::Double => push_doubles(out, &bits.collect::<Vec<_>>()),
            Type::Text => push_texts(out, bits, texts),
            _ => push_integers(out, bits.map(u64::cast_signed).collect()),
        }
    }
}

/// Appends texts: each different text once, sorted, and then the index of each value's text.
fn push_texts(out: &mut Vec<u8>, values: impl Iterator<Item = u64>, texts: &[Arc<str>]) {
    let values: Vec<usize> = values.filter_map(|index| usize::try_from(index).ok()).collect();
    // The index of each text in the block, if it is used.
    let mut places = vec![None; texts.len()];
    let mut used: Vec<(&str, usize)> = Vec::new();
    for index in &values {
        if let (Some(place @ None), Some(text)) = (places.get_mut(*index), texts.get(*index)) {
            *place = Some(0);
            used.push((text, *index));
        }
    }
    used.sort_unstable();
    push_varint(out, used.len() as u64);
    for (text, _) in &used {
        push_varint(out, text.len() as u64);
    }
    for (number, (text, index)) in (0..).zip(&used) {
        out.extend_from_slice(text.as_bytes());
        if let Some(place) = places.get_mut(*index) {
            *place = Some(number);
        }
    }
    let place = |index: &usize| places.get(*index).copied().flatten().unwrap_or(0);
    push_integers(out, values.iter().map(place).collect());
}

/// The different texts of a column.
#[derive(Debug, Clone, Default)]
pub(crate) struct Texts {
    all: String,
    /// The end of each text in `all`.
    ends: Vec<usize>,
}

impl Texts {
    pub(crate) fn get(&self, index: usize) -> &str {
        let start = index.checked_sub(1).and_then(|last| self.ends.get(last));
        let end = self.ends.get(index).copied().unwrap_or(0);
        self.all.get(start.copied().unwrap_or(0)..end).unwrap_or("")
    }

    pub(crate) const fn len(&self) -> usize {
        self.ends.len()
    }

    fn read(reader: &mut Reader<'_>, most: usize) -> Result<Self, BlockError> {
        let mut texts = Self::default();
        let count = reader.size(most)?;
        let mut end = 0;
        for _ in 0..count {
            // Each length takes a byte, so the number of texts is bounded by the bytes that are there.
            end += reader.size(reader.0.len())?;
            texts.ends.push(end);
        }
        let all =
            str::from_utf8(reader.take(end)?).map_err(|_| BlockError::Corrupt("a text is not UTF-8"))?;
        if texts.ends.iter().any(|end| !all.is_char_boundary(*end)) {
            return Err(BlockError::Corrupt("a text is not UTF-8"));
        }
        all.clone_into(&mut texts.all);
        Ok(texts)
    }
}

/// Reads values.
pub(crate) fn read_cells(reader: &mut Reader<'_>, count: usize) -> Result<(Vec<Cell>, Texts), BlockError> {
    let unknown = BlockError::Corrupt("a value has an unknown type");
    let code = reader.byte()?;
    if code != MIXED {
        let kind = Type::from_code(code).ok_or(unknown)?;
        let (contents, texts) = read_contents(reader, kind, count)?;
        let cells = contents.into_iter().map(|bits| Cell { kind, bits });
        return Ok((cells.collect(), texts));
    }
    let mut cells = Vec::with_capacity(count);
    let mut counts = [0_usize; Type::ALL.len()];
    for code in reader.take(count)? {
        let kind = Type::from_code(*code).ok_or(unknown)?;
        if let Some(count) = counts.get_mut(usize::from(*code)) {
            *count += 1;
        }
        cells.push(Cell { kind, bits: 0 });
    }
    let mut all_texts = Texts::default();
    for (kind, count) in Type::ALL.into_iter().zip(counts) {
        if count == 0 || !kind.has_content() {
            continue;
        }
        let (contents, texts) = read_contents(reader, kind, count)?;
        let values = cells.iter_mut().filter(|cell| cell.kind == kind);
        for (cell, bits) in values.zip(contents) {
            cell.bits = bits;
        }
        if kind == Type::Text {
            all_texts = texts;
        }
    }
    Ok((cells, all_texts))
}

/// Reads the contents of values of one type, as the bits of cells.
fn read_contents(reader: &mut Reader<'_>, kind: Type, count: usize) -> Result<(Vec<u64>, Texts), BlockError> {
    match kind {
        Type::Double => Ok((read_doubles(reader, count)?, Texts::default())),
        Type::Int32 | Type::Int64 => {
            let numbers = read_integers(reader, count)?;
            if kind == Type::Int32 && numbers.iter().any(|number| i32::try_from(*number).is_err()) {
                return Err(BlockError::Corrupt("a number is outside the range of its type"));
            }
            Ok((
                numbers.into_iter().map(i64::cast_unsigned).collect(),
                Texts::default(),
            ))
        }
        Type::Text => {
            let texts = Texts::read(reader, count)?;
            let indexes: Vec<u64> = read_integers(reader, count)?
                .into_iter()
                .map(i64::cast_unsigned)
                .collect();
            if indexes.iter().any(|index| *index >= texts.ends.len() as u64) {
                return Err(BlockError::Corrupt("a text is missing"));
            }
            Ok((indexes, texts))
        }
        _ => Ok((vec![0; count], Texts::default())),
    }
}
