//! Replies between store and gateway: a packed, typed form that the gateway turns into RESP2 or RESP3.
//!
//! One byte of type, then: `+` simple and `-` error and `$` bulk and `=` verbatim text: u32 length, bytes; `:` i64; `,` f64;
//! `#` one byte; `_` null; `0` null array (RESP2 `*-1`); `O` the simple string OK; `*` `~` u32 count, then the elements; `%` u32 count of
//! pairs, then keys and values in turn; `P` one byte, the RESP version from the next reply on. Integers little endian.

/// Deepest nesting of a reply; ours nest four deep (COMMAND DOCS).
pub const REPLY_DEPTH_MAX: usize = 16;

/// Writes packed replies.
#[derive(Debug)]
pub struct ReplyWriter<'a> {
    out: &'a mut Vec<u8>,
}

impl<'a> ReplyWriter<'a> {
    pub fn new(out: &'a mut Vec<u8>) -> Self {
        Self { out }
    }

    fn text(&mut self, kind: u8, bytes: &[u8]) {
        self.out.push(kind);
        crate::batch::write_bytes(self.out, bytes);
    }

    fn count(&mut self, kind: u8, count: usize) {
        self.out.push(kind);
        let count = u32::try_from(count).expect("a reply has fewer than 2^32 elements");
        self.out.extend_from_slice(&count.to_le_bytes());
    }

    /// The simple string `OK`.
    pub fn ok(&mut self) {
        self.out.push(b'O');
    }

    pub fn simple(&mut self, text: &str) {
        self.text(b'+', text.as_bytes());
    }

    /// An error; `text` starts with its code word (`ERR …`).
    pub fn error(&mut self, text: &str) {
        self.text(b'-', text.as_bytes());
    }

    pub fn integer(&mut self, value: i64) {
        self.out.push(b':');
        self.out.extend_from_slice(&value.to_le_bytes());
    }

    /// A double in RESP3, its text as a bulk string in RESP2.
    pub fn double(&mut self, value: f64) {
        self.out.push(b',');
        self.out.extend_from_slice(&value.to_le_bytes());
    }

    /// A boolean in RESP3, 1 or 0 in RESP2.
    pub fn boolean(&mut self, value: bool) {
        self.out.extend_from_slice(&[b'#', u8::from(value)]);
    }

    pub fn bulk(&mut self, bytes: &[u8]) {
        self.text(b'$', bytes);
    }

    /// Verbatim text (`txt`) in RESP3, a bulk string in RESP2.
    pub fn verbatim(&mut self, text: &str) {
        self.text(b'=', text.as_bytes());
    }

    /// Null; `$-1` in RESP2.
    pub fn null(&mut self) {
        self.out.push(b'_');
    }

    /// Null; `*-1` in RESP2.
    pub fn null_array(&mut self) {
        self.out.push(b'0');
    }

    /// Starts an array; exactly `count` replies follow.
    pub fn array(&mut self, count: usize) {
        self.count(b'*', count);
    }

    /// Starts a set, an array in RESP2; exactly `count` replies follow.
    pub fn set(&mut self, count: usize) {
        self.count(b'~', count);
    }

    /// Starts a map, a flat array in RESP2; exactly `count` keys and values in turn follow.
    pub fn map(&mut self, count: usize) {
        self.count(b'%', count);
    }

    /// Has what follows encoded in this RESP version, 2 or 3: HELLO inside a transaction. Counts as no reply.
    pub fn protocol(&mut self, version: u8) {
        self.out.extend_from_slice(&[b'P', version]);
    }

    /// Appends a reply that is packed already.
    pub fn packed(&mut self, reply: &[u8]) {
        self.out.extend_from_slice(reply);
    }
}

/// One level of a packed reply.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reply<'a> {
    Ok,
    Simple(&'a [u8]),
    Error(&'a [u8]),
    Integer(i64),
    Double(f64),
    Boolean(bool),
    Bulk(&'a [u8]),
    Verbatim(&'a [u8]),
    Null,
    NullArray,
    Array(usize),
    Set(usize),
    /// Number of pairs.
    Map(usize),
    /// RESP version from the next reply on; the reply itself follows.
    Protocol(u8),
}

impl<'a> Reply<'a> {
    /// Takes the next reply, or the head of an aggregate whose elements follow, off `bytes`; `None` if malformed or at the end.
    pub fn take(bytes: &mut &'a [u8]) -> Option<Self> {
        let (&kind, rest) = bytes.split_first()?;
        *bytes = rest;
        Some(match kind {
            b'O' => Self::Ok,
            b'_' => Self::Null,
            b'0' => Self::NullArray,
            b'+' => Self::Simple(take_text(bytes)?),
            b'-' => Self::Error(take_text(bytes)?),
            b'$' => Self::Bulk(take_text(bytes)?),
            b'=' => Self::Verbatim(take_text(bytes)?),
            b':' => Self::Integer(i64::from_le_bytes(take_chunk(bytes)?)),
            b',' => Self::Double(f64::from_le_bytes(take_chunk(bytes)?)),
            b'P' => Self::Protocol(take_chunk::<1>(bytes)?[0]),
            b'#' => Self::Boolean(take_chunk::<1>(bytes)? != [0]),
            b'*' => Self::Array(u32::from_le_bytes(take_chunk(bytes)?) as usize),
            b'~' => Self::Set(u32::from_le_bytes(take_chunk(bytes)?) as usize),
            b'%' => Self::Map(u32::from_le_bytes(take_chunk(bytes)?) as usize),
            _ => return None,
        })
    }

    /// Takes one whole reply, aggregates with all their elements, off `bytes` and returns its packed form.
    pub fn take_whole(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
        let all = *bytes;
        let mut left = 1u64;
        while left > 0 {
            left -= 1;
            left += match Self::take(bytes)? {
                Self::Array(count) | Self::Set(count) => count as u64,
                Self::Map(count) => 2 * count as u64,
                Self::Protocol(_) => 1,
                Self::Ok
                | Self::Simple(_)
                | Self::Error(_)
                | Self::Integer(_)
                | Self::Double(_)
                | Self::Boolean(_)
                | Self::Bulk(_)
                | Self::Verbatim(_)
                | Self::Null
                | Self::NullArray => 0,
            };
        }
        Some(&all[..all.len() - bytes.len()])
    }
}

fn take_chunk<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (chunk, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*chunk)
}

fn take_text<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = u32::from_le_bytes(take_chunk(bytes)?) as usize;
    let (text, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn replies_round_trip() {
        let mut out = Vec::new();
        let mut writer = ReplyWriter::new(&mut out);
        writer.map(1);
        writer.bulk(b"k");
        writer.array(2);
        writer.integer(-5);
        writer.null();
        writer.ok();
        let mut bytes = out.as_slice();
        assert_eq!(Reply::take_whole(&mut bytes).map(<[u8]>::len), Some(out.len() - 1));
        assert_eq!(Reply::take(&mut bytes), Some(Reply::Ok));
        assert_eq!(Reply::take(&mut bytes), None);
    }

    proptest! {
        #[test]
        fn bytes_from_the_network_never_panic(bytes in any::<Vec<u8>>()) {
            let _ = Reply::take_whole(&mut bytes.as_slice());
        }
    }
}
