//! The 80-bit `long double` in which Redis adds floating-point numbers: read as `strtold` reads, written as `%.17Lf` without trailing zeros.

use rustc_apfloat::ieee::X87DoubleExtended;
use rustc_apfloat::{Float, Round};

/// Redis reads numbers shorter than its buffer only.
const TEXT_BYTES_MAX: usize = 5 * 1024 - 1;
/// Decimal places of the written form.
const DECIMALS: u32 = 17;

/// An x87 extended-precision number that is not NaN.
#[derive(Clone, Copy, Debug)]
pub struct LongDouble(X87DoubleExtended);

impl LongDouble {
    pub fn zero() -> Self {
        Self(X87DoubleExtended::ZERO)
    }

    /// Reads decimal and hexadecimal numbers and infinities; `None` for anything else, blanks, NaN, and numbers out of range (underflow to 0 included).
    pub fn parse(text: &[u8]) -> Option<Self> {
        if text.is_empty() || text.len() > TEXT_BYTES_MAX {
            return None;
        }
        let (negative, unsigned) = match text {
            [b'-', rest @ ..] => (true, rest),
            [b'+', rest @ ..] => (false, rest),
            _ => (false, text),
        };
        let magnitude = if unsigned.eq_ignore_ascii_case(b"inf") || unsigned.eq_ignore_ascii_case(b"infinity") {
            X87DoubleExtended::INFINITY
        } else {
            parse_finite(unsigned)?
        };
        Some(Self(if negative { -magnitude } else { magnitude }))
    }

    /// The sum rounded to nearest; `None` if it is NaN or infinite.
    pub fn add(self, other: Self) -> Option<Self> {
        let sum = self.0.add_r(other.0, Round::NearestTiesToEven).value;
        sum.is_finite().then_some(Self(sum))
    }

    /// The number with up to 17 decimals and neither trailing zeros nor `-0`. It must be finite.
    pub fn to_text(self) -> String {
        assert!(self.0.is_finite(), "sums are checked");
        let bits = self.0.to_bits();
        let mantissa = bits as u64;
        let exponent_field = (bits >> 64) as u16 & 0x7fff;
        // The mantissa has its leading bit written out; exponent field 0 (denormal) means the same as 1.
        let exponent = i32::from(exponent_field.max(1)) - 16383 - 63;
        let (integer, fraction) = if exponent >= 0 {
            (shifted_decimal(mantissa, exponent as u32), 0)
        } else {
            let scaled = shift_right_to_even(u128::from(mantissa) * 10u128.pow(DECIMALS), exponent.unsigned_abs());
            ((scaled / 10u128.pow(DECIMALS)).to_string(), (scaled % 10u128.pow(DECIMALS)) as u64)
        };
        let mut text = integer;
        if fraction != 0 {
            let decimals = format!("{fraction:017}");
            text.push('.');
            text.push_str(decimals.trim_end_matches('0'));
        }
        if self.0.is_negative() && text != "0" {
            text.insert(0, '-');
        }
        text
    }
}

/// Reads what `strtold` takes whole: digits with at most one dot and at least one digit, and an exponent that has digits.
fn parse_finite(unsigned: &[u8]) -> Option<X87DoubleExtended> {
    let hexadecimal = matches!(unsigned, [b'0', b'x' | b'X', ..]);
    let (digits, is_digit): (_, fn(&u8) -> bool) =
        if hexadecimal { (&unsigned[2..], u8::is_ascii_hexdigit) } else { (unsigned, u8::is_ascii_digit) };
    let mark = if hexadecimal { b'p' } else { b'e' };
    let significand_end = digits.iter().position(|byte| byte.eq_ignore_ascii_case(&mark)).unwrap_or(digits.len());
    let (significand, exponent) = digits.split_at(significand_end);
    let dots = significand.iter().filter(|byte| **byte == b'.').count();
    let well_formed = significand.iter().all(|byte| *byte == b'.' || is_digit(byte));
    if dots > 1 || significand.len() == dots || !well_formed {
        return None;
    }
    if let [_, exponent @ ..] = exponent {
        let exponent = exponent.strip_prefix(b"-").or_else(|| exponent.strip_prefix(b"+")).unwrap_or(exponent);
        if exponent.is_empty() || !exponent.iter().all(u8::is_ascii_digit) {
            return None;
        }
    }
    let mut text =
        String::from_utf8(unsigned.to_ascii_lowercase()).expect("digits, dot, sign and exponent mark are ASCII");
    if hexadecimal && exponent.is_empty() {
        text.push_str("p0");
    }
    let is_zero = significand.iter().all(|byte| matches!(byte, b'0' | b'.'));
    if is_zero {
        return Some(X87DoubleExtended::ZERO);
    }
    let value = X87DoubleExtended::from_str_r(&text, Round::NearestTiesToEven).ok()?.value;
    (value.is_finite() && !value.is_zero()).then_some(value)
}

/// `value / 2^bits`, halves to even.
fn shift_right_to_even(value: u128, bits: u32) -> u128 {
    // The scaled mantissa is below 2^121, so that further bits leave less than a half.
    if bits >= u128::BITS {
        return 0;
    }
    let quotient = value >> bits;
    let remainder = value & ((1 << bits) - 1);
    let half = 1 << (bits - 1);
    if remainder > half || remainder == half && quotient & 1 == 1 { quotient + 1 } else { quotient }
}

/// The decimal digits of `mantissa * 2^bits`.
fn shifted_decimal(mantissa: u64, bits: u32) -> String {
    if bits <= 64 {
        return (u128::from(mantissa) << bits).to_string();
    }
    const CHUNK: u64 = 10u64.pow(19);
    let mut limbs = vec![0u64; bits as usize / 64];
    let shifted = u128::from(mantissa) << (bits % 64);
    limbs.extend([shifted as u64, (shifted >> 64) as u64]);
    let mut chunks = Vec::new();
    while limbs.last().is_some() {
        let mut remainder = 0u64;
        for limb in limbs.iter_mut().rev() {
            let dividend = u128::from(remainder) << 64 | u128::from(*limb);
            *limb = (dividend / u128::from(CHUNK)) as u64;
            remainder = (dividend % u128::from(CHUNK)) as u64;
        }
        chunks.push(remainder);
        while limbs.last() == Some(&0) {
            limbs.pop();
        }
    }
    let mut text = String::with_capacity(chunks.len() * 19);
    for (index, chunk) in chunks.iter().rev().enumerate() {
        text.push_str(&if index == 0 { chunk.to_string() } else { format!("{chunk:019}") });
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn sum(a: &str, b: &str) -> String {
        let read = |text: &str| LongDouble::parse(text.as_bytes());
        let (Some(a), Some(b)) = (read(a), read(b)) else { return "not a float".into() };
        a.add(b).map_or("NaN or Infinity".into(), LongDouble::to_text)
    }

    /// What redis-server 7.0.15 answers to `SET k a` and `INCRBYFLOAT k b`.
    #[test]
    fn sums_are_those_of_redis() {
        for (a, b, expected) in [
            ("10.50", "0.1", "10.6"),
            ("5.0e3", "2.0e2", "5200"),
            ("3", "1.1", "4.1"),
            ("0.1", "0.2", "0.3"),
            ("1", "-1", "0"),
            ("-0", "-0", "0"),
            ("0", "-0.000000000000000001", "0"),
            ("0", "0.000000000000000005", "0"),
            ("0", "0.000000000000000015", "0.00000000000000002"),
            ("0", "1e-17", "0.00000000000000001"),
            ("17179869184", "1.5", "17179869185.5"),
            ("9223372036854775807", "1", "9223372036854775808"),
            ("18446744073709551615", "1", "18446744073709551616"),
            ("18446744073709551617", "0", "18446744073709551616"),
            ("0x10", "0x.8p1", "17"),
            ("0X1P3", "0", "8"),
            ("+1", ".5", "1.5"),
            ("1.", "1.e1", "11"),
            ("inf", "1", "NaN or Infinity"),
            ("-Infinity", "inf", "NaN or Infinity"),
            ("1e4932", "1e4932", "NaN or Infinity"),
            ("1e4933", "0", "not a float"),
            ("1e-5000", "0", "not a float"),
            ("1e-4950", "0", "0"),
            ("0e99999999999999999999", "7", "7"),
            ("1e99999999999999999999", "0", "not a float"),
            ("nan", "0", "not a float"),
            ("nan(1)", "0", "not a float"),
            ("", "0", "not a float"),
            (" 1", "0", "not a float"),
            ("1 ", "0", "not a float"),
            ("1e", "0", "not a float"),
            ("1e+", "0", "not a float"),
            ("0x", "0", "not a float"),
            ("0x.", "0", "not a float"),
            ("0x1p", "0", "not a float"),
            (".", "0", "not a float"),
            ("1.2.3", "0", "not a float"),
            ("--1", "0", "not a float"),
            ("1_0", "0", "not a float"),
            ("infinit", "0", "not a float"),
        ] {
            assert_eq!(sum(a, b), expected, "{a} + {b}");
        }
        assert_eq!(sum("1e4932", "0").len(), 4933);
        assert_eq!(sum("1e25", "0"), "10000000000000000000000000");
        assert_eq!(sum(&"1".repeat(TEXT_BYTES_MAX + 1), "0"), "not a float");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(text in any::<Vec<u8>>()) {
            let _ = LongDouble::parse(&text);
        }

        #[test]
        fn near_numbers_are_read_without_a_panic(text in "[-+]?(0[xX])?[0-9a-f.]{0,40}([eEpP][-+]?[0-9]{0,6})?") {
            if let Some(sum) = LongDouble::parse(text.as_bytes()).and_then(|value| value.add(LongDouble::zero())) {
                let written = sum.to_text();
                prop_assert!(LongDouble::parse(written.as_bytes()).is_some(), "{} -> {}", text, written);
            }
        }

        #[test]
        fn integers_are_exact(a in any::<i32>(), b in any::<i64>()) {
            let expected = i128::from(a) + i128::from(b);
            prop_assert_eq!(sum(&a.to_string(), &b.to_string()), expected.to_string());
        }

        #[test]
        fn shifts_are_exact(mantissa in any::<u64>(), bits in 0..64u32) {
            prop_assert_eq!(shifted_decimal(mantissa, bits), (u128::from(mantissa) << bits).to_string());
        }
    }
}
