//! Finds the commands in a client's bytes: multibulk and inline, resumable at any byte, with Redis's limits and error texts.
//!
//! Nothing is allocated from a header's promise: only what has arrived is kept, by the connection.

use vasto_proto::command::args::parse_integer;

/// Longest inline command and longest header line, as in Redis (`PROTO_INLINE_MAX_SIZE`).
pub const INLINE_BYTES_MAX: usize = 64 << 10;
/// Most words of one command, as in Redis (`INT_MAX`).
const WORDS_MAX: i64 = i32::MAX as i64;
/// Ranges kept allocated between commands; a longer command's are given back.
const RANGES_KEPT: usize = 1024;

/// Start and end of a word in its buffer.
type Range = (u32, u32);

/// The words of one command, slices of the input.
#[derive(Clone, Copy, Debug)]
pub struct CommandLine<'a> {
    bytes: &'a [u8],
    ranges: &'a [Range],
}

impl<'a> CommandLine<'a> {
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Word 0 is the command's name.
    pub fn word(&self, index: usize) -> &'a [u8] {
        let (start, end) = self.ranges[index];
        &self.bytes[start as usize..end as usize]
    }

    /// The words from `first` on.
    pub fn words_from(&self, first: usize) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let bytes = self.bytes;
        self.ranges[first.min(self.ranges.len())..]
            .iter()
            .map(move |(start, end)| &bytes[*start as usize..*end as usize])
    }
}

/// What a look at the input found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scan {
    /// More bytes are needed.
    Incomplete,
    /// A command; its words are in [`Scanner::line`], its bytes are the first `consumed`.
    Ready { consumed: usize },
    /// Nothing to run (an empty line, `*0`, `*-1`) in the first `consumed` bytes.
    Skip { consumed: usize },
    /// The text after `ERR Protocol error: `; the connection is answered and closed.
    Invalid(String),
}

/// Progress inside one command; the input must begin at the same command at each call until it is complete.
#[derive(Debug, Default)]
pub struct Scanner {
    /// Bytes of the command that are understood.
    position: usize,
    /// Bulk strings still to come; `None` before the header.
    bulks_left: Option<u32>,
    /// Length of the bulk string whose header is read.
    bulk_bytes: Option<usize>,
    ranges: Vec<Range>,
    /// Words of an inline command, unquoted.
    inline: Option<Vec<u8>>,
}

/// Finds the end of a header line. `Ok(None)`: more bytes are needed.
fn header_end(input: &[u8], from: usize, too_big: &str) -> Result<Option<usize>, String> {
    let rest = &input[from..];
    match memchr::memchr(b'\r', &rest[..rest.len().min(INLINE_BYTES_MAX + 1)]) {
        Some(length) if from + length + 2 <= input.len() => Ok(Some(from + length)),
        Some(_) => Ok(None),
        None if rest.len() > INLINE_BYTES_MAX => Err(too_big.to_owned()),
        None => Ok(None),
    }
}

impl Scanner {
    /// Looks at `input`, which begins at a command.
    pub fn scan(&mut self, input: &[u8], bulk_bytes_max: usize) -> Scan {
        if self.position == 0 {
            self.ranges.clear();
            self.ranges.shrink_to(RANGES_KEPT);
            self.inline = None;
            if input.is_empty() {
                return Scan::Incomplete;
            }
            if input[0] != b'*' {
                return self.scan_inline(input);
            }
        }
        match self.scan_multibulk(input, bulk_bytes_max) {
            Ok(scan) => scan,
            Err(text) => Scan::Invalid(text),
        }
    }

    /// The words of the command that [`Scan::Ready`] announced; `input` is the same as then.
    pub fn line<'a>(&'a self, input: &'a [u8]) -> CommandLine<'a> {
        CommandLine { bytes: self.inline.as_deref().unwrap_or(input), ranges: &self.ranges }
    }

    /// Length of the bulk string that is under way, if its header is read.
    pub fn bulk_under_way(&self) -> Option<usize> {
        self.bulk_bytes
    }

    fn finish(&mut self) -> usize {
        let consumed = self.position;
        self.position = 0;
        self.bulks_left = None;
        self.bulk_bytes = None;
        consumed
    }

    fn scan_multibulk(&mut self, input: &[u8], bulk_bytes_max: usize) -> Result<Scan, String> {
        let mut left = match self.bulks_left {
            Some(left) => left,
            None => {
                let Some(end) = header_end(input, 0, "too big mbulk count string")? else {
                    return Ok(Scan::Incomplete);
                };
                let count = parse_integer(&input[1..end]).filter(|count| *count <= WORDS_MAX);
                let count = count.ok_or("invalid multibulk length")?;
                self.position = end + 2;
                if count <= 0 {
                    return Ok(Scan::Skip { consumed: self.finish() });
                }
                count as u32
            }
        };
        while left > 0 {
            let bulk_bytes = match self.bulk_bytes {
                Some(bytes) => bytes,
                None => {
                    self.bulks_left = Some(left);
                    let Some(end) = header_end(input, self.position, "too big bulk count string")? else {
                        return Ok(Scan::Incomplete);
                    };
                    if input[self.position] != b'$' {
                        return Err(format!("expected '$', got '{}'", char::from(input[self.position])));
                    }
                    let bytes =
                        parse_integer(&input[self.position + 1..end]).and_then(|bytes| usize::try_from(bytes).ok());
                    let bytes = bytes.filter(|bytes| *bytes <= bulk_bytes_max).ok_or("invalid bulk length")?;
                    self.position = end + 2;
                    bytes
                }
            };
            let end = self.position + bulk_bytes;
            if input.len() < end + 2 {
                self.bulks_left = Some(left);
                self.bulk_bytes = Some(bulk_bytes);
                return Ok(Scan::Incomplete);
            }
            self.ranges.push((self.position as u32, end as u32));
            self.position = end + 2;
            self.bulk_bytes = None;
            left -= 1;
        }
        Ok(Scan::Ready { consumed: self.finish() })
    }

    fn scan_inline(&mut self, input: &[u8]) -> Scan {
        let Some(newline) = memchr::memchr(b'\n', input) else {
            return if input.len() > INLINE_BYTES_MAX {
                Scan::Invalid("too big inline request".to_owned())
            } else {
                Scan::Incomplete
            };
        };
        let line = &input[..newline];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let consumed = newline + 1;
        match split_words(line) {
            None => Scan::Invalid("unbalanced quotes in request".to_owned()),
            Some((_, ranges)) if ranges.is_empty() => Scan::Skip { consumed },
            Some((words, ranges)) => {
                self.inline = Some(words);
                self.ranges = ranges;
                Scan::Ready { consumed }
            }
        }
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c)
}

/// Splits an inline command into words as Redis does (`sdssplitargs`): double quotes with escapes, single quotes with `\'`.
/// A closing quote must be followed by a blank or the end. `None`: quotes are unbalanced.
fn split_words(line: &[u8]) -> Option<(Vec<u8>, Vec<Range>)> {
    // A NUL ends the line, since Redis reads it as a C string.
    let line = &line[..memchr::memchr(0, line).unwrap_or(line.len())];
    let (mut words, mut ranges) = (Vec::with_capacity(line.len()), Vec::new());
    let mut at = 0;
    loop {
        while at < line.len() && is_space(line[at]) {
            at += 1;
        }
        if at == line.len() {
            return Some((words, ranges));
        }
        let start = words.len() as u32;
        while at < line.len() && !is_space(line[at]) {
            match line[at] {
                b'"' => at = take_double_quoted(line, at + 1, &mut words)?,
                b'\'' => at = take_single_quoted(line, at + 1, &mut words)?,
                byte => {
                    words.push(byte);
                    at += 1;
                    continue;
                }
            }
            if at < line.len() && !is_space(line[at]) {
                return None;
            }
        }
        ranges.push((start, words.len() as u32));
    }
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).map(|digit| digit as u8)
}

/// Returns the position behind the closing quote.
fn take_double_quoted(line: &[u8], mut at: usize, words: &mut Vec<u8>) -> Option<usize> {
    loop {
        match *line.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' if line.get(at + 1) == Some(&b'x') && line.len() > at + 3 => {
                match (hex_digit(line[at + 2]), hex_digit(line[at + 3])) {
                    (Some(high), Some(low)) => {
                        words.push(high * 16 + low);
                        at += 4;
                    }
                    (Some(_) | None, _) => {
                        words.push(b'x');
                        at += 2;
                    }
                }
            }
            b'\\' if at + 1 < line.len() => {
                words.push(match line[at + 1] {
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'b' => 0x08,
                    b'a' => 0x07,
                    other => other,
                });
                at += 2;
            }
            byte => {
                words.push(byte);
                at += 1;
            }
        }
    }
}

/// Returns the position behind the closing quote.
fn take_single_quoted(line: &[u8], mut at: usize, words: &mut Vec<u8>) -> Option<usize> {
    loop {
        match *line.get(at)? {
            b'\'' => return Some(at + 1),
            b'\\' if line.get(at + 1) == Some(&b'\'') => {
                words.push(b'\'');
                at += 2;
            }
            byte => {
                words.push(byte);
                at += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;
    use proptest::prelude::*;
    use redis_protocol::resp2::{encode::extend_encode, types::BytesFrame};

    const BULK_MAX: usize = 512 << 20;

    fn words(input: &[u8]) -> Vec<Vec<u8>> {
        let mut scanner = Scanner::default();
        match scanner.scan(input, BULK_MAX) {
            Scan::Ready { .. } => scanner.line(input).words_from(0).map(<[u8]>::to_vec).collect(),
            other => panic!("{other:?} for {}", input.escape_ascii()),
        }
    }

    #[test]
    fn inline_commands_are_split_as_redis_splits_them() {
        assert_eq!(words(b"SET a b\r\n"), [b"SET".to_vec(), b"a".to_vec(), b"b".to_vec()]);
        assert_eq!(words(b"  SET \"a b\" 'it\\'s'\n"), [b"SET".to_vec(), b"a b".to_vec(), b"it's".to_vec()]);
        assert_eq!(words(b"x \"\\x41\\n\\q\"\n"), [b"x".to_vec(), b"A\nq".to_vec()]);
        assert_eq!(words(b"x \"\"\n"), [b"x".to_vec(), b"".to_vec()]);
        assert_eq!(words(b"a\"b\"\n"), [b"ab".to_vec()]);
    }

    #[test]
    fn what_redis_refuses_is_refused_in_its_words() {
        let long = vec![b'a'; INLINE_BYTES_MAX + 1];
        let mut long_count = b"*".to_vec();
        long_count.extend(&long);
        for (input, text) in [
            (b"*x\r\n".as_slice(), "invalid multibulk length"),
            (b"*2147483648\r\n", "invalid multibulk length"),
            (b"*1\r\n$-1\r\n", "invalid bulk length"),
            (b"*1\r\n$536870913\r\n", "invalid bulk length"),
            (b"*1\r\n!3\r\n", "expected '$', got '!'"),
            (b"SET \"a\n", "unbalanced quotes in request"),
            (b"SET 'a'b\n", "unbalanced quotes in request"),
            (&long, "too big inline request"),
            (&long_count, "too big mbulk count string"),
        ] {
            let scan = Scanner::default().scan(input, BULK_MAX);
            assert_eq!(scan, Scan::Invalid(text.to_owned()), "{}", input[..input.len().min(40)].escape_ascii());
        }
    }

    #[test]
    fn empty_requests_are_skipped() {
        for input in [b"*0\r\n".as_slice(), b"*-1\r\n", b"\r\n", b"\n", b"   \r\n"] {
            assert_eq!(Scanner::default().scan(input, BULK_MAX), Scan::Skip { consumed: input.len() });
        }
    }

    proptest! {
        /// The oracle: what `redis-protocol` encodes is found again, delivered in any pieces.
        #[test]
        fn encoded_commands_are_found_in_any_pieces(
            command in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 1..6),
            cuts in prop::collection::vec(1usize..7, 0..60),
        ) {
            let frame = BytesFrame::Array(command.iter().map(|word| BytesFrame::BulkString(word.clone().into())).collect());
            let mut encoded = BytesMut::new();
            extend_encode(&mut encoded, &frame, false).unwrap();
            let mut scanner = Scanner::default();
            let (mut end, mut cuts) = (0, cuts.into_iter());
            loop {
                match scanner.scan(&encoded[..end], BULK_MAX) {
                    Scan::Incomplete => {
                        prop_assert!(end < encoded.len());
                        end = (end + cuts.next().unwrap_or(1)).min(encoded.len());
                    }
                    Scan::Ready { consumed } => {
                        prop_assert_eq!(consumed, encoded.len());
                        let found: Vec<Vec<u8>> = scanner.line(&encoded).words_from(0).map(<[u8]>::to_vec).collect();
                        prop_assert_eq!(found, command);
                        break;
                    }
                    other => prop_assert!(false, "{:?}", other),
                }
            }
        }

        #[test]
        fn any_bytes_are_survived(input in any::<Vec<u8>>()) {
            let mut scanner = Scanner::default();
            for end in 0..=input.len() {
                if scanner.scan(&input[..end], BULK_MAX) != Scan::Incomplete {
                    break;
                }
            }
        }
    }
}
