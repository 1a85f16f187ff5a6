//! LCS: the longest common subsequence of two values.

use crate::shard::context::{Context, Failure};
use vasto_proto::command::Args;
use vasto_proto::error::{self, CommandError};

const LENGTH_AND_INDEXES: CommandError =
    CommandError::fixed("ERR If you want both the length and indexes, please just use IDX.");
const TOO_LONG: CommandError = CommandError::fixed("ERR String too long for LCS");
const TABLE_TOO_LARGE: CommandError =
    CommandError::fixed("ERR Insufficient memory, transient memory for LCS exceeds proto-max-bulk-len");

#[derive(Default)]
struct Options {
    length: bool,
    indexes: bool,
    match_lengths: bool,
    match_length_min: i64,
}

impl Options {
    fn parse(mut args: Args<'_>) -> Result<Self, CommandError> {
        let mut options = Self::default();
        while !args.is_empty() {
            if args.option("IDX") {
                options.indexes = true;
            } else if args.option("LEN") {
                options.length = true;
            } else if args.option("WITHMATCHLEN") {
                options.match_lengths = true;
            } else if args.len() > 1 && args.option("MINMATCHLEN") {
                options.match_length_min = args.integer()?;
            } else {
                return Err(error::SYNTAX);
            }
        }
        if options.indexes && options.length { Err(LENGTH_AND_INDEXES) } else { Ok(options) }
    }
}

/// LCS key1 key2 [LEN] [IDX] [MINMATCHLEN length] [WITHMATCHLEN]
pub fn lcs(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let (first, second) = (args.key()?, args.key()?);
    let options = Options::parse(args)?;
    let a = context.row(first)?.map(|row| row.value).unwrap_or_default();
    let b = context.row(second)?.map(|row| row.value).unwrap_or_default();
    check_size(a.len(), b.len(), context.limits().proto_max_bulk_len as u64)?;

    if options.length {
        let length = length(&a, &b);
        context.reply().integer(i64::from(length));
        return Ok(());
    }
    let table = Table::new(&a, &b);
    if !options.indexes {
        let common = table.subsequence();
        context.reply().bulk(&common);
        return Ok(());
    }
    let mut matches = table.matches();
    matches.retain(|found| options.match_length_min <= 0 || i64::from(found.length) >= options.match_length_min);
    let mut reply = context.reply();
    reply.map(2);
    reply.bulk(b"matches");
    reply.array(matches.len());
    for found in &matches {
        reply.array(if options.match_lengths { 3 } else { 2 });
        for start in [found.a_start, found.b_start] {
            reply.array(2);
            reply.integer(i64::from(start));
            reply.integer(i64::from(start + found.length - 1));
        }
        if options.match_lengths {
            reply.integer(i64::from(found.length));
        }
    }
    reply.bulk(b"len");
    reply.integer(i64::from(table.length));
    Ok(())
}

/// Redis keeps a table of 32-bit lengths and refuses one above `limit`. Ours takes a 32nd of that, but the limit bounds the time too.
fn check_size(a_length: usize, b_length: usize, limit: u64) -> Result<(), CommandError> {
    let longest = u64::from(u32::MAX) - 2;
    let (a_length, b_length) = (a_length as u64, b_length as u64);
    if a_length > longest || b_length > longest {
        return Err(TOO_LONG);
    }
    let table_bytes = (a_length + 1).checked_mul(b_length + 1).and_then(|cells| cells.checked_mul(4));
    match table_bytes {
        Some(bytes) if bytes <= limit => Ok(()),
        Some(_) | None => Err(TABLE_TOO_LARGE),
    }
}

/// Fills the table row by row, keeping one: calls `cell(row, column, from_above_is_longer)` for cells of bytes that differ.
fn fill(a: &[u8], b: &[u8], mut differ: impl FnMut(usize, usize, bool)) -> u32 {
    let mut lengths = vec![0u32; b.len() + 1];
    for (i, a_byte) in a.iter().enumerate() {
        let (mut diagonal, mut left) = (0, 0);
        for (j, b_byte) in b.iter().enumerate() {
            let above = lengths[j + 1];
            let here = if a_byte == b_byte {
                diagonal + 1
            } else {
                differ(i, j, above > left);
                above.max(left)
            };
            diagonal = above;
            left = here;
            lengths[j + 1] = here;
        }
    }
    lengths[b.len()]
}

fn length(a: &[u8], b: &[u8]) -> u32 {
    fill(a, b, |_, _, _| {})
}

/// Equal bytes that follow each other in both values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Match {
    a_start: u32,
    b_start: u32,
    length: u32,
}

/// Which way back from each cell, one bit each: all that walking back needs.
struct Table<'v> {
    a: &'v [u8],
    b: &'v [u8],
    up: Vec<u64>,
    length: u32,
}

impl<'v> Table<'v> {
    fn new(a: &'v [u8], b: &'v [u8]) -> Self {
        let mut up = vec![0u64; (a.len() * b.len()).div_ceil(64)];
        let length = fill(a, b, |i, j, above_is_longer| {
            if above_is_longer {
                let bit = i * b.len() + j;
                up[bit / 64] |= 1 << (bit % 64);
            }
        });
        Self { a, b, up, length }
    }

    /// Walks back from the end as Redis does, over positions of equal bytes, last first.
    fn pairs(&self) -> impl Iterator<Item = (usize, usize)> {
        let (mut i, mut j) = (self.a.len(), self.b.len());
        std::iter::from_fn(move || {
            while i > 0 && j > 0 {
                if self.a[i - 1] == self.b[j - 1] {
                    i -= 1;
                    j -= 1;
                    return Some((i, j));
                }
                let bit = (i - 1) * self.b.len() + j - 1;
                if self.up[bit / 64] >> (bit % 64) & 1 == 1 { i -= 1 } else { j -= 1 }
            }
            None
        })
    }

    fn subsequence(&self) -> Vec<u8> {
        let mut common: Vec<u8> = self.pairs().map(|(i, _)| self.a[i]).collect();
        common.reverse();
        common
    }

    /// Last first.
    fn matches(&self) -> Vec<Match> {
        let mut matches: Vec<Match> = Vec::new();
        for (i, j) in self.pairs() {
            let (i, j) = (i as u32, j as u32);
            match matches.last_mut() {
                Some(last) if last.a_start == i + 1 && last.b_start == j + 1 => {
                    *last = Match { a_start: i, b_start: j, length: last.length + 1 };
                }
                Some(_) | None => matches.push(Match { a_start: i, b_start: j, length: 1 }),
            }
        }
        matches
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn matches_are_those_of_redis() {
        let table = Table::new(b"ohmytext", b"mynewtext");
        assert_eq!(table.subsequence(), b"mytext");
        assert_eq!(
            table.matches(),
            [Match { a_start: 4, b_start: 5, length: 4 }, Match { a_start: 2, b_start: 0, length: 2 }]
        );
        assert_eq!(Table::new(b"", b"x").matches(), []);
    }

    #[test]
    fn a_table_above_the_limit_is_refused_as_redis_refuses_it() {
        assert_eq!(check_size(0, 0, 4), Ok(()));
        assert_eq!(check_size(0, 1, 4), Err(TABLE_TOO_LARGE));
        assert_eq!(check_size(4_294_967_294, 1, u64::MAX), Err(TOO_LONG));
        assert_eq!(check_size(4_294_967_293, 4_294_967_293, u64::MAX), Err(TABLE_TOO_LARGE));
    }

    fn is_subsequence(part: &[u8], whole: &[u8]) -> bool {
        let mut rest = whole.iter();
        part.iter().all(|byte| rest.any(|other| other == byte))
    }

    fn naive(a: &[u8], b: &[u8]) -> usize {
        match (a, b) {
            ([x, a @ ..], [y, b @ ..]) if x == y => 1 + naive(a, b),
            ([_, a_rest @ ..], [_, b_rest @ ..]) => naive(a_rest, b).max(naive(a, b_rest)),
            _ => 0,
        }
    }

    proptest! {
        #[test]
        fn the_subsequence_is_common_and_longest(a in "[abc]{0,9}", b in "[abc]{0,9}") {
            let (a, b) = (a.as_bytes(), b.as_bytes());
            let table = Table::new(a, b);
            let common = table.subsequence();
            prop_assert_eq!(common.len(), naive(a, b));
            prop_assert_eq!(length(a, b) as usize, common.len());
            prop_assert!(is_subsequence(&common, a) && is_subsequence(&common, b));
            prop_assert_eq!(table.matches().iter().map(|found| found.length as usize).sum::<usize>(), common.len());
        }
    }
}
