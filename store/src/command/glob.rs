//! Glob patterns as KEYS and SCAN match them, odd cases included, in time linear in the key.
//!
//! A pattern is compiled into segments between its stars. The first must match at the start, the last at the end, and those in between
//! are each searched from where the one before ended: the leftmost place is always right, so nothing is tried twice.

use memchr::memmem;
use std::ops::ControlFlow;

/// Longer patterns are refused: a compiled one takes up to 64 times its bytes.
pub const PATTERN_BYTES_MAX: usize = 1 << 20;

/// Up to this many elements a segment is searched place by place; above it with one bit per element.
const PLACEWISE_ELEMENTS_MAX: usize = 64;

/// Shorter literals are searched place by place: a searcher takes more memory than all it finds is worth.
const LITERAL_BYTES_MIN: usize = 4;

/// What matches one byte.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Element {
    Byte(u8),
    Any,
    OneOf(Box<ByteSet>),
}

impl Element {
    fn matches(&self, byte: u8) -> bool {
        match self {
            Self::Byte(own) => *own == byte,
            Self::Any => true,
            Self::OneOf(set) => set.contains(byte),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct ByteSet([u64; 4]);

impl ByteSet {
    fn insert(&mut self, byte: u8) {
        self.0[usize::from(byte / 64)] |= 1 << (byte % 64);
    }

    fn contains(&self, byte: u8) -> bool {
        self.0[usize::from(byte / 64)] >> (byte % 64) & 1 == 1
    }

    fn inverted(self) -> Self {
        Self(self.0.map(|bits| !bits))
    }
}

/// Elements between two stars.
#[derive(Clone, Debug)]
struct Segment {
    elements: Vec<Element>,
    search: Search,
}

#[derive(Clone, Debug)]
enum Search {
    Literal(Box<memmem::Finder<'static>>),
    Placewise,
    Bits(Box<BitSearch>),
}

impl Segment {
    fn new(elements: Vec<Element>) -> Self {
        let literal: Option<Vec<u8>> = elements
            .iter()
            .map(|element| match element {
                Element::Byte(byte) => Some(*byte),
                Element::Any | Element::OneOf(_) => None,
            })
            .collect();
        let search = match literal {
            Some(literal) if literal.len() >= LITERAL_BYTES_MIN => {
                Search::Literal(Box::new(memmem::Finder::new(&literal).into_owned()))
            }
            Some(_) | None if elements.len() <= PLACEWISE_ELEMENTS_MAX => Search::Placewise,
            Some(_) | None => Search::Bits(Box::new(BitSearch::new(&elements))),
        };
        Self { elements, search }
    }

    fn len(&self) -> usize {
        self.elements.len()
    }

    /// Whether the segment matches all of a text of its own length.
    fn matches(&self, text: &[u8]) -> bool {
        self.elements.iter().zip(text).all(|(element, byte)| element.matches(*byte))
    }

    /// Where the leftmost match ends.
    fn find_end(&self, text: &[u8]) -> Option<usize> {
        match &self.search {
            Search::Literal(finder) => finder.find(text).map(|start| start + self.len()),
            Search::Placewise => {
                text.windows(self.len()).position(|window| self.matches(window)).map(|start| start + self.len())
            }
            Search::Bits(search) => search.find_end(text),
        }
    }
}

/// Shift-and search (Baeza-Yates & Gonnet 1992): bit i of the state says that elements 0..=i match the bytes just read.
#[derive(Clone, Debug)]
struct BitSearch {
    words: usize,
    last_bit: u64,
    /// For each byte value the elements that match it, `words` words each.
    masks: Vec<u64>,
}

impl BitSearch {
    fn new(elements: &[Element]) -> Self {
        let words = elements.len().div_ceil(64);
        let mut masks = vec![0u64; 256 * words];
        for (place, element) in elements.iter().enumerate() {
            for byte in 0..=u8::MAX {
                if element.matches(byte) {
                    masks[usize::from(byte) * words + place / 64] |= 1 << (place % 64);
                }
            }
        }
        Self { words, last_bit: 1 << ((elements.len() - 1) % 64), masks }
    }

    fn find_end(&self, text: &[u8]) -> Option<usize> {
        let mut state = vec![0u64; self.words];
        for (place, byte) in text.iter().enumerate() {
            let masks = &self.masks[usize::from(*byte) * self.words..][..self.words];
            let mut carry = 1;
            for (word, mask) in state.iter_mut().zip(masks) {
                let out = *word >> 63;
                *word = (*word << 1 | carry) & mask;
                carry = out;
            }
            if state[self.words - 1] & self.last_bit != 0 {
                return Some(place + 1);
            }
        }
        None
    }
}

/// A compiled pattern.
#[derive(Clone, Debug)]
pub struct Pattern {
    /// Without a star there is one segment, and it must match the whole text.
    first: Segment,
    middle: Vec<Segment>,
    /// `None`: the pattern has no star.
    last: Option<Segment>,
    /// Bytes that a matching text has at least.
    length_min: usize,
}

impl Pattern {
    /// `None` if the pattern is longer than [`PATTERN_BYTES_MAX`].
    pub fn new(pattern: &[u8]) -> Option<Self> {
        if pattern.len() > PATTERN_BYTES_MAX {
            return None;
        }
        let mut segments = vec![Vec::new()];
        let mut stars = 0;
        let ControlFlow::Continue(()) = parse(pattern, |part| {
            match part {
                Part::One(element) => segments.last_mut().expect("there is a first segment").push(element),
                Part::Star => {
                    stars += 1;
                    segments.push(Vec::new());
                }
            }
            ControlFlow::<std::convert::Infallible>::Continue(())
        });
        let length_min = segments.iter().map(Vec::len).sum();
        let mut segments = segments.into_iter().map(Segment::new);
        let first = segments.next().expect("there is a first segment");
        let last = if stars == 0 { None } else { segments.next_back() };
        Some(Self { first, middle: segments.filter(|segment| segment.len() > 0).collect(), last, length_min })
    }

    /// Whether one text alone matches: [`literal_prefix`].
    pub fn is_literal(&self) -> bool {
        self.last.is_none() && self.first.elements.iter().all(|element| matches!(element, Element::Byte(_)))
    }

    /// Whether the pattern matches all of `text`. As in Redis only the empty pattern matches the empty text: commands take `*` as no pattern.
    pub fn matches(&self, text: &[u8]) -> bool {
        if text.is_empty() {
            return self.length_min == 0 && self.last.is_none();
        }
        if text.len() < self.length_min {
            return false;
        }
        let (head, rest) = text.split_at(self.first.len());
        let Some(last) = &self.last else {
            return rest.is_empty() && self.first.matches(head);
        };
        let (rest, tail) = rest.split_at(rest.len() - last.len());
        if !self.first.matches(head) || !last.matches(tail) {
            return false;
        }
        let found = self.middle.iter().try_fold(rest, |rest, segment| segment.find_end(rest).map(|end| &rest[end..]));
        found.is_some()
    }
}

/// The bytes that every matching text starts with.
pub fn literal_prefix(pattern: &[u8]) -> Vec<u8> {
    let mut prefix = Vec::new();
    let _ = parse(pattern, |part| match part {
        Part::One(Element::Byte(byte)) => {
            prefix.push(byte);
            ControlFlow::Continue(())
        }
        Part::One(Element::Any | Element::OneOf(_)) | Part::Star => ControlFlow::Break(()),
    });
    prefix
}

enum Part {
    One(Element),
    Star,
}

/// Takes a pattern apart as Redis reads it, from left to right: every part but a star matches exactly one byte.
fn parse<B>(pattern: &[u8], mut visit: impl FnMut(Part) -> ControlFlow<B>) -> ControlFlow<B> {
    let mut rest = pattern;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        let part = match (byte, after) {
            (b'*', _) => Part::Star,
            (b'?', _) => Part::One(Element::Any),
            (b'[', _) => {
                let (set, after) = parse_set(after);
                rest = after;
                Part::One(Element::OneOf(Box::new(set)))
            }
            (b'\\', [escaped, after @ ..]) => {
                rest = after;
                Part::One(Element::Byte(*escaped))
            }
            (byte, _) => Part::One(Element::Byte(byte)),
        };
        visit(part)?;
    }
    ControlFlow::Continue(())
}

/// Reads what follows a `[` up to its `]`, or to the end if there is none.
fn parse_set(pattern: &[u8]) -> (ByteSet, &[u8]) {
    let (negated, mut rest) = match pattern {
        [b'^', rest @ ..] => (true, rest),
        _ => (false, pattern),
    };
    let mut set = ByteSet::default();
    rest = loop {
        rest = match rest {
            [] => break rest,
            [b'\\', escaped, after @ ..] => {
                set.insert(*escaped);
                after
            }
            [b']', after @ ..] => break after,
            [start, b'-', end, after @ ..] => {
                // Redis compares signed characters, and takes a reversed range for the same range.
                let (start, end) = (*start as i8, *end as i8);
                (start.min(end)..=start.max(end)).for_each(|byte| set.insert(byte as u8));
                after
            }
            [byte, after @ ..] => {
                set.insert(*byte);
                after
            }
        };
    };
    (if negated { set.inverted() } else { set }, rest)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn matches(pattern: &[u8], text: &[u8]) -> bool {
        Pattern::new(pattern).unwrap().matches(text)
    }

    #[test]
    fn patterns_match_as_in_redis() {
        for (pattern, text, expected) in [
            ("", "", true),
            ("", "a", false),
            ("a", "", false),
            ("**", "", false),
            ("*", "a", true),
            ("a*", "a", true),
            ("*a", "a", true),
            ("a*b*c", "aXbYc", true),
            ("a*b*c", "ac", false),
            ("ab*ba", "aba", false),
            ("a**b", "ab", true),
            ("h?llo", "hello", true),
            ("h?llo", "hllo", false),
            ("h[ae]llo", "hallo", true),
            ("h[^e]llo", "hello", false),
            ("h[a-c]llo", "hbllo", true),
            ("h[c-a]llo", "hbllo", true),
            (r"h\*llo", "h*llo", true),
            (r"h\*llo", "hello", false),
            (r"a\", r"a\", true),
            (r"[\]]", "]", true),
            (r"[\a-z]", "z", true),
            (r"[\a-z]", "m", false),
            ("[abc", "b", true),
            ("[abc", "bc", false),
            ("[", "[", false),
            ("[^", "x", true),
            ("[]", "]", false),
            ("[]a", "a", false),
            ("[^]", "x", true),
            ("[^]x", "yx", true),
            ("[a-]", "a", true),
            ("[a-", "-", true),
            ("[a-]b", "^", true),
            ("[a-]b", "b", true),
            ("[--0]", ".", true),
            (r"[\", r"\", true),
            ("*[a", "xa", true),
            ("a?c*", "abcd", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), expected, "{pattern:?} {text:?}");
        }
        assert!(matches(b"[\x80-\x7f]", b"a"), "characters are signed");
        assert!(!matches(b"[a-\xff]", b"b") && matches(b"[a-\xff]", b"\x00"));
    }

    #[test]
    fn prefixes_end_before_the_first_part_that_is_no_byte() {
        for (pattern, prefix) in [
            ("user:*", "user:"),
            ("user:?", "user:"),
            ("[a]b", ""),
            ("*", ""),
            (r"a\*b*", "a*b"),
            ("whole", "whole"),
            (r"a\", r"a\"),
        ] {
            assert_eq!(literal_prefix(pattern.as_bytes()), prefix.as_bytes(), "{pattern:?}");
        }
    }

    #[test]
    fn only_patterns_of_plain_bytes_are_literal() {
        for (pattern, literal) in [("", true), ("a", true), (r"a\*", true), ("a*", false), ("?", false), ("[a]", false)]
        {
            assert_eq!(Pattern::new(pattern.as_bytes()).unwrap().is_literal(), literal, "{pattern:?}");
        }
    }

    #[test]
    fn many_stars_take_linear_time() {
        let text = "a".repeat(100_000);
        let pattern = format!("{}b", "*a".repeat(10_000));
        assert!(!matches(pattern.as_bytes(), text.as_bytes()));
        let pattern = format!("*{}b*", "[ab]".repeat(30_000));
        assert!(!matches(pattern.as_bytes(), text.as_bytes()));
        assert!(Pattern::new(&vec![b'*'; PATTERN_BYTES_MAX + 1]).is_none());
    }

    /// Redis's algorithm, recursion and all, over the same elements.
    fn naive(pattern: &[Option<Element>], text: &[u8]) -> bool {
        match (pattern, text) {
            ([], []) => true,
            ([None, rest @ ..], _) => (0..=text.len()).any(|skipped| naive(rest, &text[skipped..])),
            ([Some(element), rest @ ..], [byte, text @ ..]) => element.matches(*byte) && naive(rest, text),
            ([Some(_), ..], []) | ([], [_, ..]) => false,
        }
    }

    fn parts(pattern: &[u8]) -> Vec<Option<Element>> {
        let mut parts = Vec::new();
        let _ = parse(pattern, |part| {
            parts.push(match part {
                Part::One(element) => Some(element),
                Part::Star => None,
            });
            ControlFlow::<()>::Continue(())
        });
        parts
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5000))]
        #[test]
        fn patterns_match_as_a_naive_model_says(pattern in r"[ab*?\[\]^\\-]{0,10}", text in "[ab\\]-]{1,8}") {
            let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
            prop_assert_eq!(matches(pattern, text), naive(&parts(pattern), text));
        }

        #[test]
        fn every_match_starts_with_the_prefix(pattern in r"[ab*?\[\\]{0,6}", text in "[ab*?]{1,6}") {
            if matches(pattern.as_bytes(), text.as_bytes()) {
                prop_assert!(text.as_bytes().starts_with(&literal_prefix(pattern.as_bytes())));
            }
        }

        #[test]
        fn long_segments_are_found_as_short_ones_are(text in "[ab]{260,300}", start in 0..130usize, length in 65..130usize) {
            let part: String = text.chars().skip(start).take(length).collect();
            prop_assert!(part.len() > PLACEWISE_ELEMENTS_MAX);
            let pattern: String = part.chars().map(|byte| if byte == 'a' { "[a]" } else { "b" }).collect();
            let segment = Segment::new(parts(pattern.as_bytes()).into_iter().flatten().collect());
            let expected = text.find(&part).map(|start| start + part.len());
            prop_assert_eq!(segment.find_end(text.as_bytes()), expected);
        }

        #[test]
        fn any_bytes_are_matched_without_a_panic(pattern in any::<Vec<u8>>(), text in any::<Vec<u8>>()) {
            let _ = matches(&pattern, &text);
        }
    }
}
