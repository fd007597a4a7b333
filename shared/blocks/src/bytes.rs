//! Reads and writes the integers of the block format.

use crate::BlockError;

/// Appends an unsigned integer in groups of seven bits, lowest first; the high bit of a byte says that another follows.
#[expect(clippy::cast_possible_truncation, reason = "only the low seven bits are kept")]
pub(crate) fn push_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Appends a signed integer; numbers near zero are short.
pub(crate) fn push_signed(out: &mut Vec<u8>, number: i64) {
    push_varint(out, zigzag(number));
}

/// Maps signed integers to unsigned ones so that numbers near zero stay small.
pub(crate) const fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)).cast_unsigned()
}

const fn unzigzag(number: u64) -> i64 {
    (number >> 1).cast_signed() ^ -(number & 1).cast_signed()
}

/// Reads bytes from the front of a slice.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn take(&mut self, length: usize) -> Result<&'a [u8], BlockError> {
        let (taken, rest) = self
            .0
            .split_at_checked(length)
            .ok_or(BlockError::Corrupt("it ends too early"))?;
        self.0 = rest;
        Ok(taken)
    }

    pub(crate) fn byte(&mut self) -> Result<u8, BlockError> {
        let (byte, rest) = self
            .0
            .split_first()
            .ok_or(BlockError::Corrupt("it ends too early"))?;
        self.0 = rest;
        Ok(*byte)
    }

    pub(crate) fn varint(&mut self) -> Result<u64, BlockError> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let part = u64::from(byte & 0x7f);
            if part << shift >> shift != part {
                break;
            }
            number |= part << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(BlockError::Corrupt("an integer is too long"))
    }

    pub(crate) fn signed(&mut self) -> Result<i64, BlockError> {
        self.varint().map(unzigzag)
    }

    /// Reads a size or a count, which must not exceed `most`.
    pub(crate) fn size(&mut self, most: usize) -> Result<usize, BlockError> {
        usize::try_from(self.varint()?)
            .ok()
            .filter(|size| *size <= most)
            .ok_or(BlockError::TooLarge)
    }

    pub(crate) fn text(&mut self, most: usize) -> Result<&'a str, BlockError> {
        let length = self.size(most)?;
        str::from_utf8(self.take(length)?).map_err(|_| BlockError::Corrupt("a text is not UTF-8"))
    }

    pub(crate) fn end(self) -> Result<(), BlockError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(BlockError::Corrupt("it has bytes that do not belong to it"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_round_trip() {
        let mut bytes = Vec::new();
        let numbers = [0, 1, -1, 63, -64, 64, i64::MAX, i64::MIN];
        for number in numbers {
            push_signed(&mut bytes, number);
        }
        push_varint(&mut bytes, u64::MAX);
        let mut reader = Reader(&bytes);
        for number in numbers {
            assert_eq!(reader.signed(), Ok(number));
        }
        assert_eq!(reader.varint(), Ok(u64::MAX));
        assert_eq!(reader.end(), Ok(()));
        assert_eq!(
            Reader(&[0xff; 10]).varint(),
            Err(BlockError::Corrupt("an integer is too long"))
        );
        assert_eq!(
            Reader(&[0x80]).varint(),
            Err(BlockError::Corrupt("it ends too early"))
        );
    }
}
