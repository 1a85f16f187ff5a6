//! Strings in Redis's format: a length and bytes, a small integer, or compressed bytes.

use super::{RdbError, lzf};
use crate::command::args::parse_integer;
use std::io::{self, Read};

/// The first two bits of a length's first byte.
const LENGTH_6_BITS: u8 = 0;
const LENGTH_14_BITS: u8 = 1;
const LENGTH_ENCODED: u8 = 3;
/// Whole first bytes.
const LENGTH_32_BITS: u8 = 0x80;
const LENGTH_64_BITS: u8 = 0x81;

/// What an encoded string is.
const ENCODING_INT8: u64 = 0;
const ENCODING_INT16: u64 = 1;
const ENCODING_INT32: u64 = 2;
const ENCODING_LZF: u64 = 3;

/// Texts up to this length may be kept as a small integer: `-2147483648`.
const INTEGER_TEXT_BYTES_MAX: usize = 11;
/// Redis tries to compress what is longer.
const PLAIN_BYTES_MAX: usize = 20;
/// What compression must save.
const SAVED_BYTES_MIN: usize = 4;

/// A length, or the encoding of a string in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    Plain(u64),
    Encoding(u64),
}

impl Length {
    /// The number, where no string can stand.
    pub fn number(self) -> u64 {
        match self {
            Self::Plain(number) | Self::Encoding(number) => number,
        }
    }
}

fn array<const BYTES: usize>(source: &mut impl Read) -> Result<[u8; BYTES], RdbError> {
    let mut bytes = [0; BYTES];
    source.read_exact(&mut bytes)?;
    Ok(bytes)
}

pub fn read_length(source: &mut impl Read) -> Result<Length, RdbError> {
    let [first] = array(source)?;
    let low = u64::from(first & 0x3f);
    Ok(match (first >> 6, first) {
        (LENGTH_6_BITS, _) => Length::Plain(low),
        (LENGTH_14_BITS, _) => Length::Plain(low << 8 | u64::from(array::<1>(source)?[0])),
        (LENGTH_ENCODED, _) => Length::Encoding(low),
        (_, LENGTH_32_BITS) => Length::Plain(u64::from(u32::from_be_bytes(array(source)?))),
        (_, LENGTH_64_BITS) => Length::Plain(u64::from_be_bytes(array(source)?)),
        (_, unknown) => return Err(RdbError::UnknownLength(unknown)),
    })
}

/// Reads a string of at most `bytes_max` bytes.
pub fn read_string(source: &mut impl Read, bytes_max: u64) -> Result<Vec<u8>, RdbError> {
    let decimal = |number: i32| number.to_string().into_bytes();
    match read_length(source)? {
        Length::Plain(bytes) => {
            check_length(bytes, bytes_max)?;
            read_bytes(source, bytes)
        }
        Length::Encoding(ENCODING_INT8) => Ok(decimal(i8::from_le_bytes(array(source)?).into())),
        Length::Encoding(ENCODING_INT16) => Ok(decimal(i16::from_le_bytes(array(source)?).into())),
        Length::Encoding(ENCODING_INT32) => Ok(decimal(i32::from_le_bytes(array(source)?))),
        Length::Encoding(ENCODING_LZF) => {
            let compressed_bytes = read_length(source)?.number();
            let bytes = read_length(source)?.number();
            check_length(compressed_bytes, bytes_max)?;
            let compressed = read_bytes(source, compressed_bytes)?;
            if bytes == 0 {
                // Redis takes "nothing was made", which damaged input gives too, for the nothing that was promised.
                return Ok(Vec::new());
            }
            if bytes > compressed_bytes.saturating_mul(lzf::EXPANSION_MAX) {
                return Err(RdbError::Compression);
            }
            check_length(bytes, bytes_max)?;
            let bytes = usize::try_from(bytes).map_err(|_| RdbError::Compression)?;
            lzf::decompress(&compressed, bytes).ok_or(RdbError::Compression)
        }
        Length::Encoding(unknown) => Err(RdbError::UnknownEncoding(unknown)),
    }
}

/// Reads over a string.
pub fn skip_string(source: &mut impl Read) -> Result<(), RdbError> {
    let bytes = match read_length(source)? {
        Length::Plain(bytes) => bytes,
        Length::Encoding(ENCODING_INT8) => 1,
        Length::Encoding(ENCODING_INT16) => 2,
        Length::Encoding(ENCODING_INT32) => 4,
        Length::Encoding(ENCODING_LZF) => {
            let compressed_bytes = read_length(source)?.number();
            read_length(source)?;
            compressed_bytes
        }
        Length::Encoding(unknown) => return Err(RdbError::UnknownEncoding(unknown)),
    };
    skip_bytes(source, bytes)
}

/// Reads over so many bytes.
pub fn skip_bytes(source: &mut impl Read, bytes: u64) -> Result<(), RdbError> {
    let skipped = io::copy(&mut source.take(bytes), &mut io::sink())?;
    if skipped == bytes { Ok(()) } else { Err(RdbError::Ended) }
}

fn check_length(bytes: u64, bytes_max: u64) -> Result<(), RdbError> {
    if bytes <= bytes_max { Ok(()) } else { Err(RdbError::TooLong { bytes, bytes_max }) }
}

/// Grows with what comes, not with what was promised.
fn read_bytes(source: &mut impl Read, bytes: u64) -> Result<Vec<u8>, RdbError> {
    let mut out = Vec::new();
    source.take(bytes).read_to_end(&mut out)?;
    if out.len() as u64 == bytes { Ok(out) } else { Err(RdbError::Ended) }
}

/// How long the string at the start of `bytes` says it will be when it is decompressed; `None` if it is not compressed, or says what it
/// cannot be.
pub fn promised_bytes(mut bytes: &[u8]) -> Option<u64> {
    if read_length(&mut bytes).ok()? != Length::Encoding(ENCODING_LZF) {
        return None;
    }
    let compressed_bytes = read_length(&mut bytes).ok()?.number();
    let promised = read_length(&mut bytes).ok()?.number();
    let is_possible =
        compressed_bytes <= bytes.len() as u64 && promised <= compressed_bytes.saturating_mul(lzf::EXPANSION_MAX);
    is_possible.then_some(promised)
}

pub fn write_length(length: usize, out: &mut Vec<u8>) {
    if length < 1 << 6 {
        out.push(length as u8);
    } else if length < 1 << 14 {
        out.extend_from_slice(&[LENGTH_14_BITS << 6 | (length >> 8) as u8, length as u8]);
    } else if let Ok(length) = u32::try_from(length) {
        out.push(LENGTH_32_BITS);
        out.extend_from_slice(&length.to_be_bytes());
    } else {
        out.push(LENGTH_64_BITS);
        out.extend_from_slice(&(length as u64).to_be_bytes());
    }
}

/// Appends a string in the form that redis-server 7 chooses for it.
pub fn write_string(value: &[u8], out: &mut Vec<u8>) {
    if value.len() <= INTEGER_TEXT_BYTES_MAX
        && let Some(number) = parse_integer(value)
        && let Ok(number) = i32::try_from(number)
    {
        write_integer(number, out);
        return;
    }
    if value.len() > PLAIN_BYTES_MAX
        && let Some(compressed) = lzf::compress(value, value.len() - SAVED_BYTES_MIN)
    {
        out.push(LENGTH_ENCODED << 6 | ENCODING_LZF as u8);
        write_length(compressed.len(), out);
        write_length(value.len(), out);
        out.extend_from_slice(&compressed);
        return;
    }
    write_length(value.len(), out);
    out.extend_from_slice(value);
}

fn write_integer(number: i32, out: &mut Vec<u8>) {
    let head = |encoding: u64| LENGTH_ENCODED << 6 | encoding as u8;
    if let Ok(small) = i8::try_from(number) {
        out.push(head(ENCODING_INT8));
        out.extend_from_slice(&small.to_le_bytes());
    } else if let Ok(small) = i16::try_from(number) {
        out.push(head(ENCODING_INT16));
        out.extend_from_slice(&small.to_le_bytes());
    } else {
        out.push(head(ENCODING_INT32));
        out.extend_from_slice(&number.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn written(value: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        write_string(value, &mut out);
        out
    }

    #[test]
    fn strings_are_written_as_redis_writes_them() {
        for (value, expected) in [
            (&b""[..], &b"\x00"[..]),
            (b"abc", b"\x03abc"),
            (b"0", b"\xc0\x00"),
            (b"-128", b"\xc0\x80"),
            (b"128", b"\xc1\x80\x00"),
            (b"-32768", b"\xc1\x00\x80"),
            (b"32768", b"\xc2\x00\x80\x00\x00"),
            (b"-2147483648", b"\xc2\x00\x00\x00\x80"),
            (b"2147483648", b"\x0a2147483648"),
            (b"007", b"\x03007"),
            (b"+1", b"\x02+1"),
            (b"aaaaaaaaaaaaaaaaaaaa", b"\x14aaaaaaaaaaaaaaaaaaaa"),
            (b"aaaaaaaaaaaaaaaaaaaaa", b"\xc3\x06\x15\x01aa\xe0\x0a\x00"),
        ] {
            assert_eq!(written(value), expected, "{}", value.escape_ascii());
        }
    }

    #[test]
    fn lengths_take_the_shortest_form() {
        for (length, expected) in [
            (63, &[63][..]),
            (64, &[0x40, 64]),
            (16_383, &[0x7f, 0xff]),
            (16_384, &[0x80, 0, 0, 0x40, 0]),
            (u32::MAX as usize, &[0x80, 0xff, 0xff, 0xff, 0xff]),
            (1 << 32, &[0x81, 0, 0, 0, 1, 0, 0, 0, 0]),
        ] {
            let mut out = Vec::new();
            write_length(length, &mut out);
            assert_eq!(out, expected);
            assert_eq!(read_length(&mut out.as_slice()).unwrap(), Length::Plain(length as u64));
        }
        assert!(matches!(read_length(&mut &[0x82, 0][..]), Err(RdbError::UnknownLength(0x82))));
    }

    #[test]
    fn promises_are_not_believed() {
        // 2^60 bytes are promised in each.
        let promise = [&[0x81, 0x10][..], &[0; 7]].concat();
        let plain = [&promise[..], b"abc"].concat();
        assert!(matches!(read_string(&mut plain.as_slice(), u64::MAX), Err(RdbError::Ended)));
        let compressed = [b"\xc3\x04", &promise[..], b"\x02abc"].concat();
        assert!(matches!(read_string(&mut compressed.as_slice(), u64::MAX), Err(RdbError::Compression)));
        assert_eq!(promised_bytes(&compressed), None);
        assert!(matches!(read_string(&mut &b"\x05abcde"[..], 4), Err(RdbError::TooLong { bytes: 5, bytes_max: 4 })));
    }

    fn any_value() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            any::<Vec<u8>>(),
            any::<i64>().prop_map(|number| number.to_string().into_bytes()),
            (-40_000i64..40_000).prop_map(|number| number.to_string().into_bytes()),
            (prop::collection::vec(any::<u8>(), 1..20), 1usize..2000).prop_map(|(part, count)| part.repeat(count)),
        ]
    }

    proptest! {
        #[test]
        fn a_string_comes_back(value in any_value(), behind in any::<Vec<u8>>()) {
            let bytes = [written(&value), behind.clone()].concat();
            let mut source = bytes.as_slice();
            prop_assert_eq!(read_string(&mut source, u64::MAX).unwrap(), value);
            prop_assert_eq!(source, behind.as_slice());
            let mut source = bytes.as_slice();
            skip_string(&mut source).unwrap();
            prop_assert_eq!(source, behind.as_slice());
        }

        #[test]
        fn any_bytes_are_a_string_or_an_error(bytes in any::<Vec<u8>>()) {
            let read = read_string(&mut bytes.as_slice(), 1 << 20);
            if read.is_ok() {
                prop_assert!(skip_string(&mut bytes.as_slice()).is_ok());
            }
        }

        #[test]
        fn damage_is_noticed_or_harmless(value in any_value(), at in any::<prop::sample::Index>(), flip in 1u8..) {
            let mut bytes = written(&value);
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            let _ = read_string(&mut bytes.as_slice(), 1 << 24);
            let _ = promised_bytes(&bytes);
        }
    }
}
