//! A cursor over a command's arguments, so that handlers read them by meaning and never by index.

use crate::batch::Arguments;
use crate::error::{self, CommandError};

/// The arguments of one command, without its name.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    rest: Arguments<'a>,
}

impl<'a> Args<'a> {
    pub fn new(arguments: Arguments<'a>) -> Self {
        Self { rest: arguments }
    }

    /// Arguments left.
    pub fn len(&self) -> usize {
        self.rest.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next argument as bytes; a syntax error if there is none.
    pub fn bytes(&mut self) -> Result<&'a [u8], CommandError> {
        self.rest.next().ok_or(error::SYNTAX)
    }

    /// The next argument as a key.
    pub fn key(&mut self) -> Result<&'a [u8], CommandError> {
        self.bytes()
    }

    /// The next argument as a 64-bit integer, as strictly as Redis reads it.
    pub fn integer(&mut self) -> Result<i64, CommandError> {
        parse_integer(self.bytes()?).ok_or(error::NOT_AN_INTEGER)
    }

    /// The next argument, which stays where it is.
    pub fn peek(&self) -> Option<&'a [u8]> {
        let mut ahead = self.rest;
        ahead.next()
    }

    /// Takes the next argument if it is this word in any case.
    pub fn option(&mut self, word: &str) -> bool {
        match self.peek() {
            Some(argument) if argument.eq_ignore_ascii_case(word.as_bytes()) => {
                self.rest.next();
                true
            }
            Some(_) | None => false,
        }
    }

    /// A syntax error if anything is left.
    pub fn end(&self) -> Result<(), CommandError> {
        if self.is_empty() { Ok(()) } else { Err(error::SYNTAX) }
    }
}

impl<'a> Iterator for Args<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.rest.next()
    }
}

/// Reads a 64-bit integer as Redis does: no sign but `-`, no blanks, no leading zeros, no `-0`.
pub fn parse_integer(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text.split_first()? {
        (b'-', digits) => (true, digits),
        _ => (false, text),
    };
    match digits {
        [b'0'] => return (!negative).then_some(0),
        [b'1'..=b'9', ..] if digits.len() <= 19 => {}
        _ => return None,
    }
    let mut value = 0u64;
    for digit in digits {
        if !digit.is_ascii_digit() {
            return None;
        }
        value = value.checked_mul(10)?.checked_add(u64::from(digit - b'0'))?;
    }
    if negative { 0i64.checked_sub_unsigned(value) } else { i64::try_from(value).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_read_as_strictly_as_redis_reads_them() {
        for (text, value) in [
            ("0", Some(0)),
            ("-1", Some(-1)),
            ("9223372036854775807", Some(i64::MAX)),
            ("-9223372036854775808", Some(i64::MIN)),
            ("9223372036854775808", None),
            ("-9223372036854775809", None),
            ("18446744073709551616", None),
            ("99999999999999999999", None),
            ("", None),
            ("-", None),
            ("-0", None),
            ("+1", None),
            (" 1", None),
            ("1 ", None),
            ("01", None),
            ("1.0", None),
            ("0x1", None),
        ] {
            assert_eq!(parse_integer(text.as_bytes()), value, "{text:?}");
        }
    }
}
