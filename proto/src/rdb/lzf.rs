//! LZF, the compression of strings in Redis's format.
//!
//! ```text
//! 000LLLLL                     L + 1 literal bytes follow
//! LLLooooo oooooooo            L + 2 bytes from o + 1 bytes back
//! 111ooooo LLLLLLLL oooooooo   L + 9 bytes from o + 1 bytes back
//! ```
//!
//! The compressor chooses as the one in redis-server does (liblzf 3 with a table of 2^16 places, "very fast"), so that DUMP answers the
//! same bytes: where it hashes, where it looks, and even where it stops looking are part of the format for us.

use std::cell::RefCell;

const HASH_PLACES: usize = 1 << 16;
const LITERALS_MAX: usize = 1 << 5;
const DISTANCE_MAX: usize = 1 << 13;
const MATCH_BYTES_MAX: usize = (1 << 8) + (1 << 3);
/// Bytes that are compared before the end of the input is looked at again.
const UNROLLED_BYTES: usize = 16;
/// A hash takes three bytes, and a match needs them.
const INPUT_BYTES_MIN: usize = 4;

/// The most that one byte of compressed data can become: three bytes make 264.
pub const EXPANSION_MAX: u64 = MATCH_BYTES_MAX as u64 / 3;

fn place(bytes: &[u8]) -> usize {
    let hash = u32::from(bytes[0]) << 16 | u32::from(bytes[1]) << 8 | u32::from(bytes[2]);
    (hash >> 8).wrapping_sub(hash.wrapping_mul(5)) as usize % HASH_PLACES
}

/// What is written so far: the last run of literals is open, and the byte that will say its length is there already.
struct Output {
    bytes: Vec<u8>,
    bytes_max: usize,
    literals: usize,
}

impl Output {
    fn start_run(&mut self) {
        self.literals = 0;
        self.bytes.push(0);
    }

    fn end_run(&mut self) {
        if self.literals == 0 {
            self.bytes.pop();
        } else {
            let head = self.bytes.len() - self.literals - 1;
            self.bytes[head] = (self.literals - 1) as u8;
        }
    }

    fn literal(&mut self, byte: u8) {
        self.bytes.push(byte);
        self.literals += 1;
        if self.literals == LITERALS_MAX {
            self.end_run();
            self.start_run();
        }
    }
}

thread_local! {
    /// Where each hash was seen last; all 0 = never between two calls. To make and clear 256 KiB anew costs more than to compress a short
    /// value.
    static SEEN: RefCell<Box<[u32]>> = RefCell::new(vec![0; HASH_PLACES].into());
}

/// Compresses; `None` if the result would not fit in `bytes_max` bytes, nearly: like Redis it gives up some bytes early.
pub fn compress(input: &[u8], bytes_max: usize) -> Option<Vec<u8>> {
    if input.len() < INPUT_BYTES_MIN || u32::try_from(input.len()).is_err() {
        return None;
    }
    SEEN.with_borrow_mut(|seen| {
        let compressed = compress_with(seen, input, bytes_max);
        if input.len() < HASH_PLACES {
            input.windows(3).for_each(|bytes| seen[place(bytes)] = 0);
        } else {
            seen.fill(0);
        }
        compressed
    })
}

/// `seen` is all 0 at first. A match at the very start of the input looks like that too; Redis does not use it either.
fn compress_with(seen: &mut [u32], input: &[u8], bytes_max: usize) -> Option<Vec<u8>> {
    let mut out = Output { bytes: Vec::new(), bytes_max, literals: 0 };
    out.start_run();
    let hashes_end = input.len() - 2;
    let mut at = 0;
    while at < hashes_end {
        let slot = &mut seen[place(&input[at..])];
        let candidate = std::mem::replace(slot, at as u32) as usize;
        let is_match =
            candidate > 0 && at - candidate <= DISTANCE_MAX && input[candidate..candidate + 3] == input[at..at + 3];
        if !is_match {
            if out.bytes.len() >= out.bytes_max {
                return None;
            }
            out.literal(input[at]);
            at += 1;
            continue;
        }
        out.end_run();
        if out.bytes.len() + 4 >= out.bytes_max {
            return None;
        }
        let bytes = match_bytes(input, candidate, at);
        let distance = at - candidate - 1;
        // A match has three bytes at least; two are not counted.
        let length = bytes - 2;
        if length < 7 {
            out.bytes.push((length << 5 | distance >> 8) as u8);
        } else {
            out.bytes.push((7 << 5 | distance >> 8) as u8);
            out.bytes.push((length - 7) as u8);
        }
        out.bytes.push(distance as u8);
        out.start_run();
        at += bytes;
        if at >= hashes_end {
            break;
        }
        // Of all that a match covers only its last two places are remembered.
        for covered in at - 2..at {
            seen[place(&input[covered..])] = covered as u32;
        }
    }
    if out.bytes.len() + 3 > out.bytes_max {
        return None;
    }
    input[at..].iter().for_each(|byte| out.literal(*byte));
    out.end_run();
    Some(out.bytes)
}

/// How many bytes are alike at two places; the first three are known to be.
fn match_bytes(input: &[u8], candidate: usize, at: usize) -> usize {
    let differs = |length: usize| input[candidate + length] != input[at + length];
    // Two short of the end of the input, which the first bytes may pass all the same: so Redis counts.
    let bytes_max = (input.len() - at - 2).min(MATCH_BYTES_MAX);
    let mut length = 2;
    if bytes_max > UNROLLED_BYTES {
        for _ in 0..UNROLLED_BYTES {
            length += 1;
            if differs(length) {
                return length;
            }
        }
    }
    loop {
        length += 1;
        if length >= bytes_max || differs(length) {
            return length;
        }
    }
}

/// Decompresses into exactly `length` bytes; `None` if the input is damaged or makes another number of them.
pub fn decompress(input: &[u8], length: usize) -> Option<Vec<u8>> {
    // What was promised is made room for step by step, as it comes.
    let mut out: Vec<u8> = Vec::with_capacity(length.min(input.len().saturating_mul(4)));
    let mut rest = input;
    while let Some((&control, after)) = rest.split_first() {
        rest = after;
        let control = usize::from(control);
        if control < LITERALS_MAX {
            let (literals, after) = rest.split_at_checked(control + 1)?;
            if literals.len() > length - out.len() {
                return None;
            }
            out.extend_from_slice(literals);
            rest = after;
            continue;
        }
        let mut bytes = (control >> 5) + 2;
        if control >> 5 == 7 {
            bytes += usize::from(*rest.split_off_first()?);
        }
        let distance = ((control & 0x1f) << 8 | usize::from(*rest.split_off_first()?)) + 1;
        if bytes > length - out.len() {
            return None;
        }
        let start = out.len().checked_sub(distance)?;
        if distance >= bytes {
            out.extend_from_within(start..start + bytes);
        } else {
            // It repeats what it makes.
            for from in start..start + bytes {
                out.push(out[from]);
            }
        }
    }
    (out.len() == length).then_some(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// What redis-server 7.0.15 made of these; `DUMP` shows it behind the two lengths.
    #[test]
    fn the_compressor_chooses_as_redis_does() {
        for (input, expected) in GOLDEN {
            let compressed = compress(input, input.len() - 4);
            assert_eq!(compressed.as_deref(), *expected, "{}", input.escape_ascii());
        }
    }

    const GOLDEN: &[(&[u8], Option<&[u8]>)] = &[
        (b"aaaaaaaaaaaaaaaaaaaaa", Some(b"\x01aa\xe0\x0a\x00")),
        (b"abcabcabcabcabcabcabcabc", Some(b"\x03abca\xe0\x0a\x02\x00c")),
        (b"hello hello hello hello", Some(b"\x06hello h\xe0\x05\x05\x01lo")),
        (b"no repetition here, at all!", None),
        (b"abababababababababababababababababababc", Some(b"\x02aba\xe0\x19\x01\x01bc")),
        (
            b"012345678901234567890123456789x01234567890123456789",
            Some(b"\x0a01234567890\xe0\x0a\x09\x00x\xe0\x0a\x14\x009"),
        ),
        (
            b"aaaaaaaaaabbbbbbbbbbaaaaaaaaaabbbbbbbbbb",
            Some(b"\x01aa\xc0\x00\x00b\xe0\x00\x00\xc0\x11\xe0\x01\x13\x01bb"),
        ),
        (
            b"to be, or not to be, that is the question: to be or not",
            Some(b"\x0eto be, or not t\x80\x0d\x06that is \x07\x0ae question:\x80\x1c`)\x01ot"),
        ),
        (b"abcdefghijklmnopqrstuvwxyzabcdefghijklmnopq", Some(b"\x1aabcdefghijklmnopqrstuvwxyza\xe0\x05\x19\x01pq")),
        (b"abcabdabeabfabgabhabiabjabkablabmabcabdabe", None),
    ];

    #[test]
    fn a_bomb_makes_no_more_than_it_says() {
        let mut bomb = vec![0, b'a'];
        for _ in 0..1000 {
            bomb.extend_from_slice(&[0xe0, 0xff, 0]);
        }
        assert_eq!(decompress(&bomb, 1 + 264 * 1000).unwrap().len(), 264_001);
        assert_eq!(decompress(&bomb, 264_000), None);
        assert_eq!(decompress(&bomb, usize::MAX), None);
    }

    #[test]
    fn damaged_input_is_refused() {
        for input in [&b"\x02ab"[..], b"\x20", b"\xe0\x01", b"\xe0", b"\x00a\x20\x05", b"\x20\x00", b""] {
            assert_eq!(decompress(input, 3), None, "{}", input.escape_ascii());
        }
    }

    fn compressible() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            any::<Vec<u8>>(),
            prop::collection::vec(0u8..3, 0..3000),
            (prop::collection::vec(any::<u8>(), 1..40), 1usize..400).prop_map(|(part, count)| part.repeat(count)),
            (any::<u8>(), 0usize..70_000).prop_map(|(byte, count)| vec![byte; count]),
        ]
    }

    #[test]
    fn a_value_leaves_nothing_behind_for_the_next() {
        let (long, short) = (b"abcdefgh".repeat(10_000), b"abcdefgh".repeat(4));
        let expected = compress(&short, 100);
        for input in [&long[..], &short, &long[..60_000], &[7; 70_000]] {
            compress(input, input.len());
            assert_eq!(compress(&short, 100), expected);
        }
        SEEN.with_borrow(|seen| assert!(seen.iter().all(|place| *place == 0)));
    }

    proptest! {
        #[test]
        fn what_is_compressed_comes_back(input in compressible(), room in 0usize..100) {
            let bytes_max = input.len().saturating_sub(room);
            if let Some(compressed) = compress(&input, bytes_max) {
                prop_assert!(compressed.len() <= bytes_max);
                prop_assert_eq!(decompress(&compressed, input.len()), Some(input));
            }
        }

        #[test]
        fn any_input_is_refused_or_makes_what_it_says(input in any::<Vec<u8>>(), length in 0usize..5000) {
            if let Some(out) = decompress(&input, length) {
                prop_assert_eq!(out.len(), length);
                prop_assert!(length as u64 <= EXPANSION_MAX * input.len() as u64);
            }
        }
    }
}
