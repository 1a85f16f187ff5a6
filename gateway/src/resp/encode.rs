//! Turns packed replies into RESP2 or RESP3. `redis-protocol` writes the rarer kinds and is the oracle of the tests. Written here:
//! - bulk strings, the hot path: it fills the buffer with zeros first and takes two logarithms for a length;
//! - integers: it counts their digits by a floating-point logarithm, which is one too many just below the powers of ten above 2^53
//!   (999999999999999999 came out with a NUL behind it);
//! - aggregates, a header line and their elements: its maps would lose Redis's order of fields.

use crate::session::Protocol;
use redis_protocol::resp2::encode::encode_borrowed as encode2;
use redis_protocol::resp2::types::BorrowedFrame as Frame2;
use redis_protocol::resp3::encode::complete::encode_borrowed as encode3;
use redis_protocol::resp3::types::{BorrowedFrame as Frame3, VerbatimStringFormat};
use vasto_proto::command::Reply;

/// What a client gets for a reply that this gateway could not read: a store of another version.
const MALFORMED: &[u8] = b"-ERR the store sent a malformed reply\r\n";

/// Room for what stands around the bytes of a bulk string.
const LENGTH_LINE_BYTES: usize = 16;

/// Appends one whole packed reply.
pub fn encode(packed: &[u8], mut protocol: Protocol, out: &mut Vec<u8>) {
    let start = out.len();
    let mut rest = packed;
    let mut left = 1u64;
    while left > 0 {
        left -= 1;
        match Reply::take(&mut rest) {
            Some(Reply::Protocol(version)) => {
                protocol = if version == 3 { Protocol::Resp3 } else { Protocol::Resp2 };
                left += 1;
            }
            Some(reply) => left += element(reply, protocol, out),
            None => {
                out.truncate(start);
                out.extend_from_slice(MALFORMED);
                return;
            }
        }
    }
}

/// Appends one level and returns how many replies follow inside it.
fn element(reply: Reply<'_>, protocol: Protocol, out: &mut Vec<u8>) -> u64 {
    let resp3 = protocol == Protocol::Resp3;
    match reply {
        Reply::Bulk(bytes) => bulk(bytes, out),
        Reply::Ok => out.extend_from_slice(b"+OK\r\n"),
        Reply::Integer(value) => integer(value, out),
        Reply::Null if resp3 => frame3(&Frame3::Null, out),
        Reply::Null => frame2(&Frame2::Null, out),
        Reply::NullArray if resp3 => frame3(&Frame3::Null, out),
        Reply::NullArray => out.extend_from_slice(b"*-1\r\n"),
        Reply::Simple(text) => frame2(&Frame2::SimpleString(text), out),
        Reply::Error(text) => error(text, out),
        Reply::Double(data) if resp3 => frame3(&Frame3::Double { data, attributes: None }, out),
        Reply::Double(value) => bulk(value.to_string().as_bytes(), out),
        Reply::Boolean(data) if resp3 => frame3(&Frame3::Boolean { data, attributes: None }, out),
        Reply::Boolean(value) => integer(i64::from(value), out),
        Reply::Verbatim(data) if resp3 => {
            frame3(&Frame3::VerbatimString { data, format: VerbatimStringFormat::Text, attributes: None }, out);
        }
        Reply::Verbatim(text) => bulk(text, out),
        Reply::Array(count) => return header(b'*', count, count as u64, out),
        Reply::Set(count) => return header(if resp3 { b'~' } else { b'*' }, count, count as u64, out),
        Reply::Map(count) if resp3 => return header(b'%', count, 2 * count as u64, out),
        Reply::Map(count) => return header(b'*', 2 * count, 2 * count as u64, out),
        Reply::Protocol(_) => unreachable!("taken by the caller"),
    }
    0
}

fn bulk(bytes: &[u8], out: &mut Vec<u8>) {
    out.reserve(bytes.len() + LENGTH_LINE_BYTES);
    out.push(b'$');
    out.extend_from_slice(itoa::Buffer::new().format(bytes.len()).as_bytes());
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

fn integer(value: i64, out: &mut Vec<u8>) {
    out.push(b':');
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
    out.extend_from_slice(b"\r\n");
}

fn frame2(frame: &Frame2<'_>, out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + frame.encode_len(false), 0);
    encode2(&mut out[start..], frame, false).expect("the buffer has the length that the frame asked for");
}

fn frame3(frame: &Frame3<'_>, out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + frame.encode_len(false), 0);
    encode3(&mut out[start..], frame, false).expect("the buffer has the length that the frame asked for");
}

/// Error texts may quote what a client sent, which need not be UTF-8: Redis sends the bytes as they are, on one line.
pub fn error(text: &[u8], out: &mut Vec<u8>) {
    out.push(b'-');
    out.extend(text.iter().map(|byte| if matches!(byte, b'\r' | b'\n') { b' ' } else { *byte }));
    out.extend_from_slice(b"\r\n");
}

fn header(kind: u8, count: usize, elements: u64, out: &mut Vec<u8>) -> u64 {
    out.push(kind);
    out.extend_from_slice(itoa::Buffer::new().format(count).as_bytes());
    out.extend_from_slice(b"\r\n");
    elements
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_proto::command::ReplyWriter;

    fn both(write: impl Fn(&mut ReplyWriter<'_>)) -> (String, String) {
        let mut packed = Vec::new();
        write(&mut ReplyWriter::new(&mut packed));
        let text = |protocol| {
            let mut out = Vec::new();
            encode(&packed, protocol, &mut out);
            String::from_utf8(out).unwrap()
        };
        (text(Protocol::Resp2), text(Protocol::Resp3))
    }

    #[test]
    fn each_kind_of_reply_is_written_as_redis_writes_it() {
        let same = |text: &str| (text.to_owned(), text.to_owned());
        assert_eq!(both(|reply| reply.ok()), same("+OK\r\n"));
        assert_eq!(both(|reply| reply.simple("PONG")), same("+PONG\r\n"));
        assert_eq!(both(|reply| reply.integer(-7)), same(":-7\r\n"));
        assert_eq!(both(|reply| reply.bulk(b"a\r\nb")), same("$4\r\na\r\nb\r\n"));
        assert_eq!(both(|reply| reply.bulk(b"")), same("$0\r\n\r\n"));
        assert_eq!(both(|reply| reply.error("ERR a\r\nb")), same("-ERR a  b\r\n"));
        assert_eq!(both(|reply| reply.null()), ("$-1\r\n".into(), "_\r\n".into()));
        assert_eq!(both(|reply| reply.null_array()), ("*-1\r\n".into(), "_\r\n".into()));
        assert_eq!(both(|reply| reply.boolean(true)), (":1\r\n".into(), "#t\r\n".into()));
        assert_eq!(both(|reply| reply.verbatim("hi")), ("$2\r\nhi\r\n".into(), "=6\r\ntxt:hi\r\n".into()));
        let map = |reply: &mut ReplyWriter<'_>| {
            reply.map(1);
            reply.bulk(b"k");
            reply.array(0);
        };
        assert_eq!(both(map), ("*2\r\n$1\r\nk\r\n*0\r\n".into(), "%1\r\n$1\r\nk\r\n*0\r\n".into()));
    }

    #[test]
    fn integers_beside_the_powers_of_ten_have_no_byte_too_many() {
        for power in 0..19 {
            for value in [10i64.pow(power) - 1, 10i64.pow(power), -10i64.pow(power), 1 - 10i64.pow(power)] {
                assert_eq!(both(|reply| reply.integer(value)).0, format!(":{value}\r\n"));
            }
        }
        assert_eq!(both(|reply| reply.integer(i64::MIN)).0, format!(":{}\r\n", i64::MIN));
    }

    #[test]
    fn bulk_strings_are_those_of_the_oracle() {
        for length in [0, 1, 9, 10, 99, 100, 999, 1000, 65_536, 1_000_000] {
            let bytes = vec![b'x'; length];
            let mut expected = Vec::new();
            frame2(&Frame2::BulkString(&bytes), &mut expected);
            let mut out = Vec::new();
            bulk(&bytes, &mut out);
            assert_eq!(out, expected, "{length} bytes");
        }
    }

    #[test]
    fn a_malformed_reply_is_one_error() {
        let mut out = Vec::new();
        encode(b"*\x02\0\0\0O", Protocol::Resp2, &mut out);
        assert_eq!(out, MALFORMED);
    }
}
