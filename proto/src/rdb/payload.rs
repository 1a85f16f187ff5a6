//! DUMP payloads: a type byte, the value, the version of the format, a checksum over all of it.

use super::crc64::crc64;
use super::string::{promised_bytes, read_string, write_string};
use super::{Kind, RdbError, TYPE_MAX_OF_VERSION_10, VERSION};
use thiserror::Error;

const TYPE_STRING: u8 = 0;
const VERSION_BYTES: usize = 2;
const CHECKSUM_BYTES: usize = 8;

/// The payload of a string, byte for byte that of redis-server 7.0.
pub fn dump_string(value: &[u8]) -> Vec<u8> {
    let mut out = vec![TYPE_STRING];
    write_string(value, &mut out);
    out.extend_from_slice(&VERSION.to_le_bytes());
    let checksum = crc64(&out);
    out.extend_from_slice(&checksum.to_le_bytes());
    out
}

/// Why a payload is not restored.
#[derive(Debug, Error)]
pub enum PayloadError {
    #[error("its version or checksum is wrong")]
    Footer,
    #[error("its value is damaged")]
    Value(#[from] RdbError),
    #[error("{0} is no type of value")]
    UnknownType(u8),
    #[error("it holds a {0}")]
    OtherKind(Kind),
}

/// A payload whose footer is right, and which says that it holds a string.
#[derive(Clone, Copy, Debug)]
pub struct StringPayload<'p> {
    /// Behind the type byte. The footer belongs to it: Redis too reads on into it when a length says so.
    string: &'p [u8],
}

impl<'p> StringPayload<'p> {
    pub fn open(payload: &'p [u8]) -> Result<Self, PayloadError> {
        let (body, checksum) = payload.split_last_chunk::<CHECKSUM_BYTES>().ok_or(PayloadError::Footer)?;
        let (_, version) = body.split_last_chunk::<VERSION_BYTES>().ok_or(PayloadError::Footer)?;
        if u16::from_le_bytes(*version) > VERSION || crc64(body) != u64::from_le_bytes(*checksum) {
            return Err(PayloadError::Footer);
        }
        let (&kind, string) = payload.split_first().ok_or(PayloadError::Footer)?;
        match Kind::of(kind).filter(|_| kind <= TYPE_MAX_OF_VERSION_10) {
            Some(Kind::String) => Ok(Self { string }),
            Some(other) => Err(PayloadError::OtherKind(other)),
            None => Err(PayloadError::UnknownType(kind)),
        }
    }

    /// The string of a payload whose footer nobody looked at: for a guess at what it costs.
    pub fn peek(payload: &'p [u8]) -> Option<Self> {
        let (&kind, string) = payload.split_first()?;
        (kind == TYPE_STRING).then_some(Self { string })
    }

    /// How long the value will be if it is compressed: what must be asked for before it is made.
    pub fn promised_bytes(&self) -> Option<u64> {
        promised_bytes(self.string)
    }

    /// The value; what follows it is nobody's concern, as in Redis.
    pub fn value(mut self) -> Result<Vec<u8>, PayloadError> {
        // No limit is needed: plain bytes are here already, and of compressed ones the caller has seen the promise.
        Ok(read_string(&mut self.string, u64::MAX)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn sealed(body: &[u8], version: u16) -> Vec<u8> {
        let mut out = [body, &version.to_le_bytes()].concat();
        let checksum = crc64(&out);
        out.extend_from_slice(&checksum.to_le_bytes());
        out
    }

    fn value(payload: &[u8]) -> Result<Vec<u8>, PayloadError> {
        StringPayload::open(payload)?.value()
    }

    /// Answered by redis-server 7.0.15.
    #[test]
    fn payloads_are_those_of_redis() {
        assert_eq!(dump_string(b"10"), b"\x00\xc0\n\n\x00n\x9fWE\x0e\xaec\xbb");
        assert_eq!(value(b"\x00\xc0\n\n\x00n\x9fWE\x0e\xaec\xbb").unwrap(), b"10");
        let list = b"\x12\x01\x02\n\n\x00\x00\x00\x01\x00\x81a\x02\xff\n\x00\t\xb9\xed\xf5\x94\xde\xd9\x95";
        assert!(matches!(value(list), Err(PayloadError::OtherKind(Kind::List))));
    }

    #[test]
    fn what_redis_refuses_is_refused_and_what_it_takes_is_taken() {
        for version in [0, 9, 10] {
            assert_eq!(value(&sealed(b"\0\x03abc", version)).unwrap(), b"abc");
        }
        for payload in [&sealed(b"\0\x03abc", 11)[..], &sealed(b"\0\x03abc", 256), b"", b"123456789"] {
            assert!(matches!(value(payload), Err(PayloadError::Footer)), "{}", payload.escape_ascii());
        }
        // The version is the type then: 10, a list.
        assert!(matches!(value(&sealed(b"", 8)), Err(PayloadError::UnknownType(8))));
        for (body, expected) in [
            (&b"\0\x03abcdef"[..], Some(&b"abc"[..])),
            (b"\0\xc3\x04\x03\x02abc", Some(b"abc")),
            (b"\0\xc3\xc4\xc3\x02abc", Some(b"abc")),
            (b"\0\xc3\x04\x00\x02abc", Some(b"")),
            (b"\0\xc3\x00\x00", Some(b"")),
            (b"\0\xc3\x00\x03\x02abc", None),
            (b"\0\xc3\x04\x05\x02abc", None),
            (b"\0\x0dab", None),
            (b"\0\xc4\x01", None),
            (b"\0\x82\0\0\0\x03abc", None),
        ] {
            assert_eq!(value(&sealed(body, 10)).ok().as_deref(), expected, "{}", body.escape_ascii());
        }
        let into_the_footer = sealed(b"\0\x0cab", 10);
        assert_eq!(value(&into_the_footer).unwrap(), into_the_footer[2..]);
    }

    proptest! {
        #[test]
        fn a_value_comes_back(value in any::<Vec<u8>>(), count in 1usize..50) {
            let value = value.repeat(count);
            let payload = dump_string(&value);
            prop_assert_eq!(StringPayload::open(&payload).unwrap().value().unwrap(), value);
        }

        #[test]
        fn a_flipped_bit_is_always_noticed(value in any::<Vec<u8>>(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut payload = dump_string(&value);
            let at = at.index(payload.len());
            payload[at] ^= 1 << bit;
            prop_assert!(matches!(StringPayload::open(&payload), Err(PayloadError::Footer)));
        }

        #[test]
        fn hostile_payloads_never_panic(body in any::<Vec<u8>>(), version in 0u16..=10) {
            let body = [&[0][..], &body].concat();
            let payload = sealed(&body, version);
            let opened = StringPayload::open(&payload).unwrap();
            let _ = opened.promised_bytes();
            let _ = opened.value();
        }
    }
}
