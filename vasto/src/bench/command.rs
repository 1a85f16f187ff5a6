//! The commands of the load and how they look on the wire.

use super::value::Values;

/// As many digits as redis-benchmark gives its keys.
const KEY_DIGITS_MIN: usize = 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Get,
    Set,
    /// SET to the number zero, from which counters start.
    SetZero,
    Incr,
}

/// One command, as much of it as must be remembered until its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub verb: Verb,
    pub key: u64,
    /// Of a write: the version that it writes. Of a checked GET: the version that was acknowledged when it was sent.
    pub version: u32,
}

/// Writes requests as arrays of bulks.
#[derive(Clone, Debug)]
pub struct Encoder {
    get: Vec<u8>,
    set: Vec<u8>,
    incr: Vec<u8>,
    key_prefix: String,
    key_digits: usize,
    values: Values,
}

impl Encoder {
    pub fn new(key_prefix: &str, keys: u64, values: Values) -> Self {
        let key_digits = digits(keys - 1).max(KEY_DIGITS_MIN);
        let key_length = key_prefix.len() + key_digits;
        // All that comes before the number of the key.
        let head = |count: u32, name: &str| {
            format!("*{count}\r\n${}\r\n{name}\r\n${key_length}\r\n{key_prefix}", name.len()).into_bytes()
        };
        Self {
            get: head(2, "GET"),
            set: head(3, "SET"),
            incr: head(2, "INCR"),
            key_prefix: key_prefix.to_owned(),
            key_digits,
            values,
        }
    }

    pub fn key_name(&self, key: u64) -> String {
        format!("{}{key:0width$}", self.key_prefix, width = self.key_digits)
    }

    /// An upper bound of what one request or its answer takes, to size buffers.
    pub fn request_bytes_max(&self) -> usize {
        self.set.len() + self.key_digits + self.values.size.max() + 32
    }

    pub fn append(&self, request: &Request, output: &mut Vec<u8>) {
        output.extend_from_slice(match request.verb {
            Verb::Get => &self.get,
            Verb::Set | Verb::SetZero => &self.set,
            Verb::Incr => &self.incr,
        });
        append_padded(request.key, self.key_digits, output);
        match request.verb {
            Verb::Get | Verb::Incr => output.extend_from_slice(b"\r\n"),
            Verb::SetZero => output.extend_from_slice(b"\r\n$1\r\n0\r\n"),
            Verb::Set => {
                let length = self.values.length(request.key, request.version) as u64;
                output.extend_from_slice(b"\r\n$");
                append_padded(length, digits(length), output);
                output.extend_from_slice(b"\r\n");
                self.values.append(request.key, request.version, output);
                output.extend_from_slice(b"\r\n");
            }
        }
    }
}

/// Appends a command of plain words, for the set-up of a connection.
pub fn append_words(words: &[&str], output: &mut Vec<u8>) {
    output.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        output.extend_from_slice(format!("${}\r\n{word}\r\n", word.len()).as_bytes());
    }
}

fn digits(number: u64) -> usize {
    number.checked_ilog10().map_or(1, |log| log as usize + 1)
}

/// Appends the last `width` digits of a number: 10 ns, a tenth of what `write!` takes.
fn append_padded(mut number: u64, width: usize, output: &mut Vec<u8>) {
    let start = output.len();
    output.resize(start + width, b'0');
    for digit in output[start..].iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    fn encoded(verb: Verb, key: u64, keys: u64, size: &str) -> String {
        let values = Values { seed: 1, size: size.parse().unwrap() };
        let mut output = Vec::new();
        Encoder::new("k:", keys, values).append(&Request { verb, key, version: 1 }, &mut output);
        String::from_utf8_lossy(&output).into_owned()
    }

    #[test]
    fn requests_are_arrays_of_bulks() {
        assert_eq!(encoded(Verb::Get, 42, 100, "1"), "*2\r\n$3\r\nGET\r\n$14\r\nk:000000000042\r\n");
        assert_eq!(encoded(Verb::Incr, 0, 100, "1"), "*2\r\n$4\r\nINCR\r\n$14\r\nk:000000000000\r\n");
        assert_eq!(encoded(Verb::SetZero, 7, 8, "9"), "*3\r\n$3\r\nSET\r\n$14\r\nk:000000000007\r\n$1\r\n0\r\n");
        assert_eq!(encoded(Verb::Set, 7, 8, "0"), "*3\r\n$3\r\nSET\r\n$14\r\nk:000000000007\r\n$0\r\n\r\n");
    }

    #[test]
    fn a_large_key_space_takes_more_digits() {
        let line = encoded(Verb::Get, 9_999_999_999_999, 10_000_000_000_000, "1");
        assert_eq!(line, "*2\r\n$3\r\nGET\r\n$15\r\nk:9999999999999\r\n");
    }

    #[test]
    fn the_length_of_a_value_is_its_header() {
        let values = Values { seed: 1, size: "95-105".parse().unwrap() };
        let encoder = Encoder::new("", 10, values);
        for key in 0..10 {
            let mut output = Vec::new();
            encoder.append(&Request { verb: Verb::Set, key, version: 1 }, &mut output);
            let length = values.length(key, 1);
            let head = format!("*3\r\n$3\r\nSET\r\n$12\r\n{key:012}\r\n${length}\r\n");
            assert!(output.starts_with(head.as_bytes()));
            assert_eq!(output.len(), head.len() + length + 2);
        }
    }
}
