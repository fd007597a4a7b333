//! The values of a row's fields.

/// The value of one field of a row, with its type in the database.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// The row does not have the field.
    Missing,
    Null,
    Bool(bool),
    Int32(i32),
    Int64(i64),
    /// Kept bit for bit, NaN and negative zero included.
    Double(f64),
    Text(&'a str),
}

impl Value<'_> {
    /// The value as a floating-point number; `None` if it is not a number.
    #[expect(clippy::cast_precision_loss, reason = "measures need no more than 53 bits")]
    pub const fn number(&self) -> Option<f64> {
        match *self {
            Self::Double(number) => Some(number),
            Self::Int32(number) => Some(number as f64),
            Self::Int64(number) => Some(number as f64),
            _ => None,
        }
    }
}

/// The type of a value. The numbers are part of the block format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Type {
    Missing = 0,
    Null = 1,
    False = 2,
    True = 3,
    Int32 = 4,
    Int64 = 5,
    Double = 6,
    Text = 7,
}

impl Type {
    pub(crate) const ALL: [Self; 8] = [
        Self::Missing,
        Self::Null,
        Self::False,
        Self::True,
        Self::Int32,
        Self::Int64,
        Self::Double,
        Self::Text,
    ];

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// Returns whether values of this type have a content beyond their type.
    pub(crate) fn has_content(self) -> bool {
        self >= Self::Int32
    }
}

/// A value as it is kept in memory, where texts are indexes into a table. Cells compare bit for bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) kind: Type,
    /// The integer, sign-extended; the bits of the double; or the index of the text.
    pub(crate) bits: u64,
}

impl Cell {
    pub(crate) const MISSING: Self = Self {
        kind: Type::Missing,
        bits: 0,
    };

    pub(crate) const fn int64(number: i64) -> Self {
        Self {
            kind: Type::Int64,
            bits: number.cast_unsigned(),
        }
    }

    /// The cell of a value that is not a text; `text` stores a text and returns its index.
    pub(crate) fn new(value: &Value<'_>, text: impl FnOnce(&str) -> u32) -> Self {
        let (kind, bits) = match *value {
            Value::Missing => (Type::Missing, 0),
            Value::Null => (Type::Null, 0),
            Value::Bool(false) => (Type::False, 0),
            Value::Bool(true) => (Type::True, 0),
            Value::Int32(number) => (Type::Int32, i64::from(number).cast_unsigned()),
            Value::Int64(number) => (Type::Int64, number.cast_unsigned()),
            Value::Double(number) => (Type::Double, number.to_bits()),
            Value::Text(words) => (Type::Text, u64::from(text(words))),
        };
        Self { kind, bits }
    }

    /// The value of a cell; `text` returns the text with an index.
    pub(crate) fn value<'a>(self, text: impl FnOnce(usize) -> &'a str) -> Value<'a> {
        match self.kind {
            Type::Missing => Value::Missing,
            Type::Null => Value::Null,
            Type::False => Value::Bool(false),
            Type::True => Value::Bool(true),
            #[expect(clippy::cast_possible_truncation, reason = "the integer is sign-extended")]
            Type::Int32 => Value::Int32(self.bits.cast_signed() as i32),
            Type::Int64 => Value::Int64(self.bits.cast_signed()),
            Type::Double => Value::Double(f64::from_bits(self.bits)),
            #[expect(clippy::cast_possible_truncation, reason = "indexes of texts have 32 bits")]
            Type::Text => Value::Text(text(self.bits as usize)),
        }
    }
}
