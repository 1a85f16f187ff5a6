//! Reads RESP2 and RESP3 replies for tests: first the exact bytes of one reply, then their meaning.
//!
//! Written apart from the gateway's encoder on purpose: a mistake there must not be repeated here.

use std::io;

/// One reply, both protocol versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Simple(Vec<u8>),
    Error(Vec<u8>),
    Integer(i64),
    Bulk(Vec<u8>),
    Nil,
    Array(Vec<Value>),
    Set(Vec<Value>),
    Push(Vec<Value>),
    Map(Vec<(Value, Value)>),
    Double(Vec<u8>),
    Boolean(bool),
    BigNumber(Vec<u8>),
    Verbatim(Vec<u8>),
}

impl Value {
    pub fn ok() -> Value {
        Value::Simple(b"OK".to_vec())
    }

    pub fn bulk(bytes: impl AsRef<[u8]>) -> Value {
        Value::Bulk(bytes.as_ref().to_vec())
    }

    /// The bytes of a text of any kind.
    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            Value::Simple(bytes)
            | Value::Error(bytes)
            | Value::Bulk(bytes)
            | Value::Double(bytes)
            | Value::BigNumber(bytes)
            | Value::Verbatim(bytes) => Some(bytes),
            Value::Integer(_)
            | Value::Nil
            | Value::Array(_)
            | Value::Set(_)
            | Value::Push(_)
            | Value::Map(_)
            | Value::Boolean(_) => None,
        }
    }

    /// The text of the reply, for messages and for replies that are known to be text.
    pub fn text(&self) -> String {
        match self.bytes() {
            Some(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            None => crate::notation::format(self),
        }
    }

    pub fn integer(&self) -> Option<i64> {
        match self {
            Value::Integer(number) => Some(*number),
            _ => None,
        }
    }

    /// The elements of an array, a set or a push; a map's keys and values in turn, as RESP2 lays them out.
    pub fn elements(&self) -> Option<Vec<Value>> {
        match self {
            Value::Array(items) | Value::Set(items) | Value::Push(items) => Some(items.clone()),
            Value::Map(pairs) => Some(pairs.iter().flat_map(|(key, value)| [key.clone(), value.clone()]).collect()),
            _ => None,
        }
    }

    /// A field of a map, as RESP2 or RESP3 show it.
    pub fn field(&self, name: &str) -> Option<Value> {
        let elements = self.elements()?;
        let mut pairs = elements.chunks_exact(2);
        pairs.find(|pair| pair[0].bytes() == Some(name.as_bytes())).map(|pair| pair[1].clone())
    }

    pub fn is_error(&self) -> bool {
        matches!(self, Value::Error(_))
    }
}

/// Encodes a command as an array of bulk strings.
pub fn command<A: AsRef<[u8]>>(arguments: &[A]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", arguments.len()).into_bytes();
    for argument in arguments {
        let argument = argument.as_ref();
        bytes.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
        bytes.extend_from_slice(argument);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

/// Finds the end of one reply in a growing buffer; goes on where it stopped when more bytes have come.
#[derive(Debug)]
pub struct ReplyScanner {
    position: usize,
    /// Elements still to come; a counter instead of recursion, so that nesting costs nothing.
    pending: u64,
}

impl Default for ReplyScanner {
    fn default() -> Self {
        ReplyScanner { position: 0, pending: 1 }
    }
}

impl ReplyScanner {
    /// The length of the reply, or `None` while it is incomplete.
    pub fn scan(&mut self, buffer: &[u8]) -> io::Result<Option<usize>> {
        while self.pending > 0 {
            let Some((line, after)) = line(buffer, self.position) else {
                return Ok(None);
            };
            let (kind, rest) =
                line.split_first().ok_or_else(|| malformed("an empty line where a reply should begin"))?;
            match kind {
                b'+' | b'-' | b':' | b'_' | b',' | b'#' | b'(' => self.pending -= 1,
                b'$' | b'=' | b'!' => {
                    let length = number(rest)?;
                    if length >= 0 {
                        let end = after + length as usize + 2;
                        if buffer.len() < end {
                            return Ok(None);
                        }
                        if &buffer[end - 2..end] != b"\r\n" {
                            return Err(malformed("a bulk string does not end with CR LF"));
                        }
                        self.position = end;
                        self.pending -= 1;
                        continue;
                    }
                    self.pending -= 1;
                }
                b'*' | b'~' | b'>' => {
                    self.pending -= 1;
                    self.pending += number(rest)?.max(0) as u64;
                }
                b'%' => {
                    self.pending -= 1;
                    self.pending += 2 * number(rest)?.max(0) as u64;
                }
                // Attributes stand in front of a reply and are none themselves.
                b'|' => self.pending += 2 * number(rest)?.max(0) as u64,
                other => {
                    return Err(malformed(&format!(
                        "a reply begins with the byte {other:#04x}: {}",
                        String::from_utf8_lossy(line)
                    )));
                }
            }
            self.position = after;
        }
        Ok(Some(self.position))
    }
}

/// The line that begins at `start`, without CR LF, and the position after it.
fn line(buffer: &[u8], start: usize) -> Option<(&[u8], usize)> {
    let length = buffer[start..].windows(2).position(|pair| pair == b"\r\n")?;
    Some((&buffer[start..start + length], start + length + 2))
}

fn number(digits: &[u8]) -> io::Result<i64> {
    std::str::from_utf8(digits)
        .ok()
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(|| malformed(&format!("not a number: {}", String::from_utf8_lossy(digits))))
}

fn malformed(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed reply: {message}"))
}

/// An aggregate whose elements are still being read.
struct Unfinished {
    kind: u8,
    missing: u64,
    items: Vec<Value>,
}

impl Unfinished {
    fn finish(self) -> Option<Value> {
        Some(match self.kind {
            b'*' => Value::Array(self.items),
            b'~' => Value::Set(self.items),
            b'>' => Value::Push(self.items),
            b'%' => {
                let mut pairs = Vec::with_capacity(self.items.len() / 2);
                let mut items = self.items.into_iter();
                while let (Some(key), Some(value)) = (items.next(), items.next()) {
                    pairs.push((key, value));
                }
                Value::Map(pairs)
            }
            // What an attribute says about the reply is not compared by meaning, only byte for byte.
            _ => return None,
        })
    }
}

/// The meaning of exactly one complete reply.
pub fn parse(raw: &[u8]) -> io::Result<Value> {
    let mut open: Vec<Unfinished> = Vec::new();
    let mut position = 0;
    loop {
        let (line, after) = line(raw, position).ok_or_else(|| malformed("it ends too early"))?;
        let (kind, rest) = line.split_first().ok_or_else(|| malformed("an empty line"))?;
        position = after;
        let mut value = match kind {
            b'+' => Some(Value::Simple(rest.to_vec())),
            b'-' => Some(Value::Error(rest.to_vec())),
            b':' => Some(Value::Integer(number(rest)?)),
            b'_' => Some(Value::Nil),
            b',' => Some(Value::Double(rest.to_vec())),
            b'#' => Some(Value::Boolean(rest == b"t")),
            b'(' => Some(Value::BigNumber(rest.to_vec())),
            b'$' | b'=' | b'!' => {
                let length = number(rest)?;
                if length < 0 {
                    Some(Value::Nil)
                } else {
                    let end = after + length as usize;
                    let bytes = raw.get(after..end).ok_or_else(|| malformed("a bulk string ends too early"))?.to_vec();
                    position = end + 2;
                    Some(match kind {
                        b'$' => Value::Bulk(bytes),
                        b'!' => Value::Error(bytes),
                        // "txt:" in front says only how to show it.
                        _ => Value::Verbatim(bytes.get(4..).unwrap_or_default().to_vec()),
                    })
                }
            }
            b'*' | b'~' | b'>' | b'%' | b'|' => {
                let count = number(rest)?;
                if count < 0 {
                    Some(Value::Nil)
                } else {
                    let missing = count as u64 * if matches!(kind, b'%' | b'|') { 2 } else { 1 };
                    let aggregate = Unfinished { kind: *kind, missing, items: Vec::new() };
                    if missing == 0 {
                        aggregate.finish()
                    } else {
                        open.push(aggregate);
                        None
                    }
                }
            }
            other => return Err(malformed(&format!("it begins with the byte {other:#04x}"))),
        };
        while let Some(finished) = value.take() {
            let Some(parent) = open.last_mut() else {
                return if position == raw.len() { Ok(finished) } else { Err(malformed("bytes follow it")) };
            };
            parent.items.push(finished);
            parent.missing -= 1;
            if parent.missing == 0 {
                value = open.pop().and_then(Unfinished::finish);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Value {
        Value::bulk(text)
    }

    #[test]
    fn every_kind_of_reply_is_understood() {
        let table: &[(&[u8], Value)] = &[
            (b"+OK\r\n", Value::ok()),
            (b"-ERR no\r\n", Value::Error(b"ERR no".to_vec())),
            (b":-7\r\n", Value::Integer(-7)),
            (b"$3\r\na\r\n\r\n", bulk("a\r\n")),
            (b"$-1\r\n", Value::Nil),
            (b"*-1\r\n", Value::Nil),
            (b"_\r\n", Value::Nil),
            (b"*0\r\n", Value::Array(vec![])),
            (b"*2\r\n*1\r\n$1\r\na\r\n:2\r\n", Value::Array(vec![Value::Array(vec![bulk("a")]), Value::Integer(2)])),
            (b"%1\r\n+k\r\n*0\r\n", Value::Map(vec![(Value::Simple(b"k".to_vec()), Value::Array(vec![]))])),
            (b"~1\r\n#t\r\n", Value::Set(vec![Value::Boolean(true)])),
            (b",1.5\r\n", Value::Double(b"1.5".to_vec())),
            (b"=6\r\ntxt:hi\r\n", Value::Verbatim(b"hi".to_vec())),
            (b"|1\r\n+a\r\n:1\r\n:5\r\n", Value::Integer(5)),
        ];
        for (raw, expected) in table {
            assert_eq!(&parse(raw).unwrap(), expected, "{}", raw.escape_ascii());
            // However it is cut, the end is found at the same place, and a following reply is left alone.
            let mut scanner = ReplyScanner::default();
            for length in 0..raw.len() {
                assert_eq!(scanner.scan(&raw[..length]).unwrap(), None, "{}", raw.escape_ascii());
            }
            let mut more = raw.to_vec();
            more.extend_from_slice(b"+next\r\n");
            assert_eq!(scanner.scan(&more).unwrap(), Some(raw.len()));
        }
    }

    #[test]
    fn nesting_does_not_recurse() {
        let mut raw = b"*1\r\n".repeat(1_000_000);
        raw.extend_from_slice(b":1\r\n");
        assert_eq!(ReplyScanner::default().scan(&raw).unwrap(), Some(raw.len()));
    }

    #[test]
    fn what_is_no_reply_is_an_error() {
        for raw in [&b"\r\n"[..], b"hello\r\n", b"$x\r\n", b"$1\r\nabc"] {
            assert!(ReplyScanner::default().scan(raw).is_err(), "{}", raw.escape_ascii());
        }
    }

    #[test]
    fn a_command_is_an_array_of_bulk_strings() {
        assert_eq!(command(&["GET", "a\r"]), b"*2\r\n$3\r\nGET\r\n$2\r\na\r\r\n");
    }
}
