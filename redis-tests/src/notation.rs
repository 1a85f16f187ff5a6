//! redis-cli's notation: how a person types a command and how redis-cli shows a reply.

use crate::resp::Value;

/// Splits a typed line into arguments, quotes and escapes as in redis-cli; `None` when quotes are unbalanced.
pub fn split(line: &str) -> Option<Vec<Vec<u8>>> {
    let bytes = line.as_bytes();
    let mut arguments = Vec::new();
    let mut position = 0;
    loop {
        while bytes.get(position).is_some_and(u8::is_ascii_whitespace) {
            position += 1;
        }
        if position == bytes.len() {
            return Some(arguments);
        }
        let mut argument = Vec::new();
        while let Some(byte) = bytes.get(position) {
            match byte {
                b'"' => position = double_quoted(bytes, position + 1, &mut argument)?,
                b'\'' => position = single_quoted(bytes, position + 1, &mut argument)?,
                byte if byte.is_ascii_whitespace() => break,
                byte => {
                    argument.push(*byte);
                    position += 1;
                }
            }
        }
        arguments.push(argument);
    }
}

/// Reads up to the closing quote; gives the position after it.
fn double_quoted(bytes: &[u8], mut position: usize, argument: &mut Vec<u8>) -> Option<usize> {
    loop {
        match bytes.get(position)? {
            b'"' => return Some(position + 1),
            b'\\' => {
                let escaped = *bytes.get(position + 1)?;
                let code = bytes
                    .get(position + 2..position + 4)
                    .filter(|_| escaped == b'x')
                    .and_then(|digits| std::str::from_utf8(digits).ok())
                    .and_then(|digits| u8::from_str_radix(digits, 16).ok());
                if let Some(code) = code {
                    argument.push(code);
                    position += 4;
                    continue;
                }
                argument.push(match escaped {
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'b' => 0x08,
                    b'a' => 0x07,
                    other => other,
                });
                position += 2;
            }
            byte => {
                argument.push(*byte);
                position += 1;
            }
        }
    }
}

fn single_quoted(bytes: &[u8], mut position: usize, argument: &mut Vec<u8>) -> Option<usize> {
    loop {
        match bytes.get(position)? {
            b'\'' => return Some(position + 1),
            b'\\' if bytes.get(position + 1) == Some(&b'\'') => {
                argument.push(b'\'');
                position += 2;
            }
            byte => {
                argument.push(*byte);
                position += 1;
            }
        }
    }
}

/// In double quotes, with escapes for what does not print.
pub fn quote(bytes: &[u8]) -> String {
    let mut quoted = String::from("\"");
    for byte in bytes {
        match byte {
            b'\\' | b'"' => {
                quoted.push('\\');
                quoted.push(*byte as char);
            }
            b'\n' => quoted.push_str("\\n"),
            b'\r' => quoted.push_str("\\r"),
            b'\t' => quoted.push_str("\\t"),
            0x07 => quoted.push_str("\\a"),
            0x08 => quoted.push_str("\\b"),
            0x20..=0x7e => quoted.push(*byte as char),
            other => quoted.push_str(&format!("\\x{other:02x}")),
        }
    }
    quoted.push('"');
    quoted
}

/// As it is where that is unmistakable, quoted otherwise.
pub fn quote_if_needed(bytes: &[u8]) -> String {
    let plain =
        !bytes.is_empty() && bytes.iter().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\'' | b'\\'));
    if plain { String::from_utf8_lossy(bytes).into_owned() } else { quote(bytes) }
}

/// A reply as redis-cli shows it in a terminal, without the last line end.
pub fn format(value: &Value) -> String {
    format_indented(value, "")
}

/// `indent` stands before every line but the first. Replies of tests are nested a few levels deep at most.
fn format_indented(value: &Value, indent: &str) -> String {
    match value {
        Value::Simple(text) => printable(text),
        Value::Error(text) => format!("(error) {}", printable(text)),
        Value::Integer(number) => format!("(integer) {number}"),
        Value::Bulk(bytes) => quote(bytes),
        Value::Nil => "(nil)".to_owned(),
        Value::Double(text) => format!("(double) {}", printable(text)),
        Value::Boolean(true) => "(true)".to_owned(),
        Value::Boolean(false) => "(false)".to_owned(),
        Value::BigNumber(text) | Value::Verbatim(text) => printable(text),
        Value::Array(items) => format_items(items, ')', "(empty array)", indent),
        Value::Set(items) => format_items(items, '~', "(empty set)", indent),
        Value::Push(items) => format_items(items, ')', "(empty push)", indent),
        Value::Map(pairs) => {
            if pairs.is_empty() {
                return "(empty hash)".to_owned();
            }
            let width = pairs.len().to_string().len();
            let inner = format!("{indent}{}", " ".repeat(width + 2));
            let lines: Vec<String> = pairs
                .iter()
                .enumerate()
                .map(|(index, (key, value))| {
                    format!(
                        "{:width$}# {} => {}",
                        index + 1,
                        format_indented(key, &inner),
                        format_indented(value, &inner)
                    )
                })
                .collect();
            lines.join(&format!("\n{indent}"))
        }
    }
}

fn format_items(items: &[Value], separator: char, empty: &str, indent: &str) -> String {
    if items.is_empty() {
        return empty.to_owned();
    }
    let width = items.len().to_string().len();
    let inner = format!("{indent}{}", " ".repeat(width + 2));
    let lines: Vec<String> = items
        .iter()
        .enumerate()
        .map(|(index, item)| format!("{:width$}{separator} {}", index + 1, format_indented(item, &inner)))
        .collect();
    lines.join(&format!("\n{indent}"))
}

/// Statuses and errors are text; a byte that is none would be lost, so it is shown escaped.
fn printable(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(|letter| letter.is_control() && letter != '\n') => text.to_owned(),
        _ => bytes.escape_ascii().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_split_as_redis_cli_does() {
        let table: &[(&str, Option<&[&[u8]]>)] = &[
            ("  GET   a ", Some(&[b"GET", b"a"])),
            (r#"SET "a b" '\x00'"#, Some(&[b"SET", b"a b", b"\\x00"])),
            (r#""\x00\xff\n\r\t\a\b\"\\\q""#, Some(&[b"\x00\xff\n\r\t\x07\x08\"\\q"])),
            (r"'it\'s'", Some(&[b"it's"])),
            (r#""""#, Some(&[b""])),
            ("", Some(&[])),
            ("\"open", None),
            ("'open", None),
        ];
        for (line, expected) in table {
            let expected: Option<Vec<Vec<u8>>> =
                expected.map(|arguments| arguments.iter().map(|argument| argument.to_vec()).collect());
            assert_eq!(split(line), expected, "{line}");
        }
    }

    #[test]
    fn replies_are_shown_as_redis_cli_does() {
        let nested = Value::Array(vec![
            Value::Integer(1),
            Value::Array(vec![Value::bulk("a"), Value::Nil]),
            Value::Map(vec![(Value::bulk("k"), Value::Array(vec![]))]),
        ]);
        assert_eq!(format(&nested), "1) (integer) 1\n2) 1) \"a\"\n   2) (nil)\n3) 1# \"k\" => (empty array)");
        let ten = Value::Array((1..=10).map(Value::Integer).collect());
        assert!(format(&ten).starts_with(" 1) (integer) 1\n 2) (integer) 2\n"));
        assert_eq!(format(&Value::bulk(b"\x00\"\n")), r#""\x00\"\n""#);
    }
}
