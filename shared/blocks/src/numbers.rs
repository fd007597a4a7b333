//! Encodes sequences of numbers as bytes that compress well.
//!
//! Integers are replaced by their first or second differences if these are smaller, the smallest one is subtracted
//! from all, and the results are written by significance: first the lowest byte of each, then the next byte of each,
//! up to the highest byte that is not zero in one of them. Equal integers, or integers with equal differences, take no
//! byte.
//!
//! Doubles are written as such integers if each is the double nearest to a decimal with at most six digits after the
//! point; otherwise their bits are.

use crate::{
    BlockError,
    bytes::{Reader, push_signed, zigzag},
};

/// Powers of ten with which decimals are multiplied to get integers.
const SCALES: [f64; 7] = [1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6];
/// The scale of doubles that are written by their bits.
const BITS: u8 = 255;
/// Integers up to this size are exact as doubles.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// Appends a sequence of integers.
pub(crate) fn push_integers(out: &mut Vec<u8>, mut numbers: Vec<i64>) {
    let order = best_order(&numbers);
    let mut heads = [0_i64; 2];
    for head in heads.iter_mut().take(order) {
        *head = numbers.first().copied().unwrap_or(0);
        differences(&mut numbers);
    }
    let base = numbers.iter().copied().min().unwrap_or(0);
    let widest = numbers
        .iter()
        .map(|number| number.wrapping_sub(base).cast_unsigned())
        .fold(0, |all, number| all | number);
    let width = (u64::BITS - widest.leading_zeros()).div_ceil(8);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the order is at most 2, the width at most 8"
    )]
    out.push(order as u8 | (width as u8) << 2);
    for head in heads.iter().take(order) {
        push_signed(out, *head);
    }
    push_signed(out, base);
    for shift in (0..width).map(|byte| byte * 8) {
        #[expect(clippy::cast_possible_truncation, reason = "one byte at a time is written")]
        out.extend(
            numbers
                .iter()
                .map(|number| (number.wrapping_sub(base).cast_unsigned() >> shift) as u8),
        );
    }
}

/// Replaces the numbers by their differences, of which there is one fewer.
fn differences(numbers: &mut Vec<i64>) {
    let mut last = numbers.first().copied().unwrap_or(0);
    for number in numbers.iter_mut() {
        (*number, last) = (number.wrapping_sub(last), *number);
    }
    if !numbers.is_empty() {
        numbers.remove(0);
    }
}

/// Returns whether the numbers themselves (0), their first differences (1) or their second differences (2) have the
/// fewest bits.
fn best_order(numbers: &[i64]) -> usize {
    let Some((&first, rest)) = numbers.split_first() else {
        return 0;
    };
    let (mut last, mut step) = (first, 0_i64);
    let mut bits = [0_u64; 3];
    for (at, &number) in rest.iter().enumerate() {
        let first_difference = number.wrapping_sub(last);
        let second_difference = if at == 0 {
            0
        } else {
            first_difference.wrapping_sub(step)
        };
        (last, step) = (number, first_difference);
        let terms = [number.wrapping_sub(first), first_difference, second_difference];
        for (bits, term) in bits.iter_mut().zip(terms) {
            *bits += u64::from(u64::BITS - zigzag(term).leading_zeros());
        }
    }
    let [plain, first, second] = bits;
    if plain <= first && plain <= second {
        0
    } else if first <= second {
        1
    } else {
        2
    }
}

/// Reads a sequence of integers.
pub(crate) fn read_integers(reader: &mut Reader<'_>, count: usize) -> Result<Vec<i64>, BlockError> {
    let form = reader.byte()?;
    let (order, width) = (usize::from(form & 3), usize::from(form >> 2));
    if order > 2 || width > 8 || order > count {
        return Err(BlockError::Corrupt("a sequence of numbers has no valid form"));
    }
    let mut heads = [0_i64; 2];
    for head in heads.iter_mut().take(order) {
        *head = reader.signed()?;
    }
    let base = reader.signed()?;
    let written = count - order;
    let planes = reader.take(width * written)?;
    // The heads of differences are in front, so that the sums below run over the whole sequence.
    let mut numbers = Vec::with_capacity(count);
    numbers.resize(order, 0);
    match width {
        0 => numbers.resize(count, base),
        1 => numbers.extend(planes.iter().map(|byte| base.wrapping_add(i64::from(*byte)))),
        _ => {
            numbers.resize(count, 0);
            for (byte, plane) in planes.chunks_exact(written.max(1)).enumerate() {
                for (number, part) in numbers.iter_mut().skip(order).zip(plane) {
                    *number |= i64::from(*part) << (byte * 8);
                }
            }
            for number in numbers.iter_mut().skip(order) {
                *number = number.wrapping_add(base);
            }
        }
    }
    for (skipped, head) in heads.iter().enumerate().take(order).rev() {
        let mut sum = *head;
        let mut terms = numbers.iter_mut().skip(skipped);
        if let Some(first) = terms.next() {
            *first = sum;
        }
        for term in terms {
            sum = sum.wrapping_add(*term);
            *term = sum;
        }
    }
    Ok(numbers)
}

/// Appends a sequence of doubles, given by their bits.
pub(crate) fn push_doubles(out: &mut Vec<u8>, bits: &[u64]) {
    let scale = bits.iter().try_fold(0, |scale, bits| scale_of(*bits, scale));
    let decimals = scale.and_then(|scale| {
        let decimals = bits.iter().map(|bits| decimal(*bits, scale));
        Some((scale, decimals.collect::<Option<Vec<i64>>>()?))
    });
    let (scale, numbers) =
        decimals.unwrap_or_else(|| (BITS, bits.iter().map(|bits| bits.cast_signed()).collect()));
    out.push(scale);
    push_integers(out, numbers);
}

/// The smallest scale from `least` on with which the double is a decimal.
fn scale_of(bits: u64, least: u8) -> Option<u8> {
    if bits == 0 {
        return Some(least);
    }
    (least..=6).find(|scale| decimal(bits, *scale).is_some())
}

/// The integer from which [`double`] makes this double.
fn decimal(bits: u64, scale: u8) -> Option<i64> {
    let scaled = (f64::from_bits(bits) * SCALES.get(usize::from(scale))?).round();
    // NaN does not pass either.
    if !(-EXACT..=EXACT).contains(&scaled) {
        return None;
    }
    #[expect(clippy::cast_possible_truncation, reason = "the range was checked")]
    let integer = scaled as i64;
    (double(integer, *SCALES.get(usize::from(scale))?) == bits).then_some(integer)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "the encoder checked that the double is exact"
)]
fn double(integer: i64, scale: f64) -> u64 {
    (integer as f64 / scale).to_bits()
}

/// Reads a sequence of doubles, as their bits.
pub(crate) fn read_doubles(reader: &mut Reader<'_>, count: usize) -> Result<Vec<u64>, BlockError> {
    let scale = reader.byte()?;
    let numbers = read_integers(reader, count)?.into_iter();
    if scale == BITS {
        return Ok(numbers.map(i64::cast_unsigned).collect());
    }
    let scale = *SCALES
        .get(usize::from(scale))
        .ok_or(BlockError::Corrupt("a sequence of numbers has no valid form"))?;
    // Most measures are zero most of the time, and a division is slow.
    Ok(numbers
        .map(|integer| if integer == 0 { 0 } else { double(integer, scale) })
        .collect())
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn integers(numbers: &[i64]) -> Vec<u8> {
        let mut out = Vec::new();
        push_integers(&mut out, numbers.to_vec());
        let mut reader = Reader(&out);
        assert_eq!(read_integers(&mut reader, numbers.len()), Ok(numbers.to_vec()));
        assert_eq!(reader.end(), Ok(()));
        out
    }

    fn doubles(numbers: &[f64]) -> Vec<u8> {
        let bits: Vec<u64> = numbers.iter().map(|number| number.to_bits()).collect();
        let mut out = Vec::new();
        push_doubles(&mut out, &bits);
        let mut reader = Reader(&out);
        assert_eq!(read_doubles(&mut reader, bits.len()), Ok(bits));
        assert_eq!(reader.end(), Ok(()));
        out
    }

    #[test]
    fn sequences_with_equal_differences_take_no_byte_per_number() {
        assert!(integers(&[7; 1000]).len() <= 3);
        assert!(integers(&(0..1000).map(|at| at * 60).collect::<Vec<_>>()).len() <= 5);
        assert!(integers(&(0..1000).map(|at| at * at).collect::<Vec<_>>()).len() <= 6);
        assert!(doubles(&[12.3; 1000]).len() <= 5);
    }

    #[test]
    fn decimal_fractions_take_no_more_bytes_than_integers() {
        let tenths: Vec<f64> = (0..250).map(|at| f64::from(at * at % 251) / 10.0).collect();
        // Differences of such integers need two bytes, and the doubles themselves eight.
        assert!(doubles(&tenths).len() <= 2 * 250 + 8);
        assert!(doubles(&[1_482_236_515.63, 1_482_236_600.123_456]).len() < 16);
    }

    #[test]
    fn special_doubles_keep_their_bits() {
        let payload = f64::from_bits(0x7ff8_0000_dead_beef);
        doubles(&[
            0.0,
            -0.0,
            f64::NAN,
            payload,
            f64::INFINITY,
            f64::MIN_POSITIVE,
            f64::MAX,
            0.1 + 0.2,
        ]);
        doubles(&[-0.0]);
        doubles(&[9_007_199_254_740_993.0, 0.1]);
        doubles(&[]);
    }

    proptest! {
        #[test]
        fn any_integers_round_trip(numbers in vec(any::<i64>(), 0..50), small in vec(-300_i64..300, 0..50)) {
            integers(&numbers);
            integers(&small);
        }

        #[test]
        fn any_doubles_round_trip(bits in vec(any::<u64>(), 0..20), tenths in vec(any::<i32>(), 0..50)) {
            doubles(&bits.into_iter().map(f64::from_bits).collect::<Vec<_>>());
            doubles(&tenths.into_iter().map(|tenth| f64::from(tenth) / 10.0).collect::<Vec<_>>());
        }
    }
}
