//! Rows as they lie in the column family `keys`: a header, then the value of a string or the summary of a collection; and which
//! of two rows wins.
//!
//! ```text
//! byte 0        kind
//! byte 1        flags: 1 = expires, 2 = was changed in place, 4 = a client gave the event time
//! bytes 2..22   stamp (ns u64 BE, origin u32 BE, sequence u64 BE)
//! 8 bytes       expires_at_ms u64 BE, only with flag 1
//! 8 bytes       written_at_ns u64 BE, only with flag 4
//! 20 bytes      version, collections only
//! rest          payload: a string's value; of a tombstone see [`covered_by`]
//! ```

use crate::slot::splitmix64;
use std::cmp::Ordering;
use thiserror::Error;

/// When and where a row was written: a total order, compared as bytes; the larger one wins.
///
/// A stamp that a shard draws has the shard's store as origin and a sequence that is never used again, so no two writes share one.
/// A stamp with an event time that a client gave depends on nothing but the write itself (see [`Stamp::given`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp {
    /// Event time, nanoseconds since 1970.
    pub ns: u64,
    /// The store that ordered the write; [`Stamp::CLIENT`] if a client gave the event time.
    pub origin: u32,
    /// A counter of that store's shard, never reused after a crash; with a client's event time, a digest of the write.
    pub sequence: u64,
}

/// Part of a given stamp's sequence: set for a deletion, so that at equal event times it wins over every value.
const DELETION_BIT: u64 = 1 << 63;

impl Stamp {
    /// Bytes of an encoded stamp.
    pub const BYTES: usize = 20;
    /// The origin of event times that clients give. No store has this id: at equal event times a store's own write wins.
    pub const CLIENT: u32 = 0;

    /// The stamp of a write whose event time a client gave: whichever store takes it, however often it is sent, it is the same. Two
    /// different writes of one event time are ordered by a digest of what they write (a deletion above all values), so that every
    /// order of arrival, on every copy, ends with the same row.
    pub fn given(ns: u64, kind: RowKind, expires_at_ms: u64, payload: &[u8]) -> Self {
        let sequence = match kind {
            RowKind::Tombstone => DELETION_BIT,
            RowKind::String => digest(expires_at_ms, payload) & !DELETION_BIT,
        };
        Self { ns, origin: Self::CLIENT, sequence }
    }

    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..8].copy_from_slice(&self.ns.to_be_bytes());
        out[8..12].copy_from_slice(&self.origin.to_be_bytes());
        out[12..].copy_from_slice(&self.sequence.to_be_bytes());
        out
    }

    /// `None` unless `bytes` is exactly [`Stamp::BYTES`] long.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        Some(Self {
            ns: u64::from_be_bytes(*bytes.first_chunk()?),
            origin: u32::from_be_bytes(*bytes[8..].first_chunk()?),
            sequence: u64::from_be_bytes(*bytes[12..].first_chunk()?),
        })
    }
}

/// A digest of a value and its expiry. Part of the format: all copies must compute the same.
fn digest(expires_at_ms: u64, payload: &[u8]) -> u64 {
    let words = payload.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    let start = splitmix64(expires_at_ms) ^ payload.len() as u64;
    words.fold(splitmix64(start), |digest, word| splitmix64(digest ^ word))
}

/// What a row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RowKind {
    /// A deletion that must still be remembered.
    Tombstone = 0,
    String = 1,
}

impl RowKind {
    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Tombstone),
            1 => Some(Self::String),
            _ => None,
        }
    }
}

/// Bytes from disk that are no row.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RowError {
    #[error("row of {0} bytes is shorter than its header")]
    TooShort(usize),
    #[error("row of unknown kind {0}")]
    UnknownKind(u8),
}

const FLAG_EXPIRES: u8 = 1;
const FLAG_CHANGED_IN_PLACE: u8 = 2;
const FLAG_GIVEN_EVENT_TIME: u8 = 4;

/// What stands before a row's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: RowKind,
    pub stamp: Stamp,
    /// Unix time in milliseconds; 0 = never.
    pub expires_at_ms: u64,
    /// APPEND and SETRANGE leave a string that OBJECT ENCODING calls `raw` whatever its length.
    pub changed_in_place: bool,
    /// When the row was written, if a client gave its event time; 0 = at its event time. See [`Header::written_ns`].
    pub written_at_ns: u64,
}

impl Header {
    /// Most bytes of a string's or tombstone's header.
    pub const BYTES_MAX: usize = 2 + Stamp::BYTES + 8 + 8;

    /// Bytes that the header takes.
    pub fn encoded_bytes(&self) -> usize {
        2 + Stamp::BYTES + 8 * (usize::from(self.expires_at_ms != 0) + usize::from(self.written_at_ns != 0))
    }

    /// Appends the header; the payload follows it.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        let mut flags = 0;
        if self.expires_at_ms != 0 {
            flags |= FLAG_EXPIRES;
        }
        if self.changed_in_place {
            flags |= FLAG_CHANGED_IN_PLACE;
        }
        if self.written_at_ns != 0 {
            flags |= FLAG_GIVEN_EVENT_TIME;
        }
        out.push(self.kind as u8);
        out.push(flags);
        out.extend_from_slice(&self.stamp.to_bytes());
        if self.expires_at_ms != 0 {
            out.extend_from_slice(&self.expires_at_ms.to_be_bytes());
        }
        if self.written_at_ns != 0 {
            out.extend_from_slice(&self.written_at_ns.to_be_bytes());
        }
    }

    /// Splits a row into header and payload.
    pub fn decode(row: &[u8]) -> Result<(Self, &[u8]), RowError> {
        let too_short = || RowError::TooShort(row.len());
        let (&[kind, flags], rest) = row.split_first_chunk::<2>().ok_or_else(too_short)?;
        let kind = RowKind::from_byte(kind).ok_or(RowError::UnknownKind(kind))?;
        let (stamp, mut rest) = rest.split_at_checked(Stamp::BYTES).ok_or_else(too_short)?;
        let stamp = Stamp::from_bytes(stamp).ok_or_else(too_short)?;
        let mut number_with = |flag: u8| {
            if flags & flag == 0 {
                return Ok(0);
            }
            let (bytes, after) = rest.split_first_chunk::<8>().ok_or_else(too_short)?;
            rest = after;
            Ok(u64::from_be_bytes(*bytes))
        };
        let (expires_at_ms, written_at_ns) = (number_with(FLAG_EXPIRES)?, number_with(FLAG_GIVEN_EVENT_TIME)?);
        let changed_in_place = flags & FLAG_CHANGED_IN_PLACE != 0;
        Ok((Self { kind, stamp, expires_at_ms, changed_in_place, written_at_ns }, rest))
    }

    /// Whether a reader at `now_ms` sees the row: neither deleted nor expired. A row lives up to and including its
    /// millisecond, as in Redis (`now > when` is expired).
    pub fn is_alive(&self, now_ms: u64) -> bool {
        self.kind != RowKind::Tombstone && (self.expires_at_ms == 0 || now_ms <= self.expires_at_ms)
    }

    /// When the row was written, by the clock of its shard. For a row with a client's event time that says nothing about it.
    pub fn written_ns(&self) -> u64 {
        if self.written_at_ns == 0 { self.stamp.ns } else { self.written_at_ns }
    }

    /// What compaction leaves of an expired row: a tombstone of the same stamp, which no older row comes back over.
    pub fn buried(&self) -> Self {
        Self { kind: RowKind::Tombstone, expires_at_ms: 0, changed_in_place: false, ..*self }
    }
}

/// Last writer wins, between two rows of one key as [`Header::decode`] gives them: the greater one stays. `Equal`: they are the same
/// write, even if it came to two stores at two times.
///
/// A total order, so keeping the greatest is commutative, associative and idempotent. The stamps decide. Rows of one stamp are one
/// write, or what compaction made of it when it had expired: the tombstone wins, since whoever made it saw the row dead. What follows
/// is reached only if two digests of [`Stamp::given`] collide, and keeps the order total then.
pub fn precedence(a: (&Header, &[u8]), b: (&Header, &[u8])) -> Ordering {
    fn rank<'r>((header, payload): (&Header, &'r [u8])) -> (Stamp, bool, u64, bool, &'r [u8]) {
        let is_tombstone = header.kind == RowKind::Tombstone;
        // What a tombstone carries says nothing of the key: see `covered_by`.
        let payload = if is_tombstone { &[] } else { payload };
        (header.stamp, is_tombstone, header.expires_at_ms, header.changed_in_place, payload)
    }
    rank(a).cmp(&rank(b))
}

/// The row that stays when two encoded rows of one key meet, at a hand-over or a repair. Of two records of one write the one that was
/// written later stays, so that it is remembered for long enough; bytes that are no row lose.
pub fn newer<'a>(a: &'a [u8], b: &'a [u8]) -> &'a [u8] {
    let order = match (Header::decode(a), Header::decode(b)) {
        (Ok((one, payload)), Ok((other, other_payload))) => {
            precedence((&one, payload), (&other, other_payload)).then(one.written_at_ns.cmp(&other.written_at_ns))
        }
        (Ok(_), Err(_)) => Ordering::Greater,
        (Err(_), Ok(_)) => Ordering::Less,
        (Err(_), Err(_)) => Ordering::Equal,
    };
    match order.then_with(|| a.cmp(b)) {
        Ordering::Less => b,
        Ordering::Equal | Ordering::Greater => a,
    }
}

/// The stamp that a tombstone carries: it deleted nothing that was alive, and this is the row it lies over (zero: none). Such a deletion
/// must be remembered, or an older write that comes later would survive it, but whoever watches the key sees no change.
pub fn covered_by(header: &Header, payload: &[u8]) -> Option<Stamp> {
    if header.kind == RowKind::Tombstone { Stamp::from_bytes(payload) } else { None }
}

/// Whether an element row of a collection counts. `collection` is the collection's row in `keys` and its version, the stamp that
/// created it; `element` is the element's row and the version in its key. Deleting a collection is thus one tombstone, and elements
/// that arrive late for an earlier life of the key stay dead.
pub fn is_element_alive(collection: Option<(&Header, Stamp)>, element: (&Header, Stamp), now_ms: u64) -> bool {
    let (header, version) = element;
    collection.is_some_and(|(owner, current)| owner.is_alive(now_ms) && current == version) && header.is_alive(now_ms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn any_header() -> impl Strategy<Value = Header> {
        let stamp = (any::<u64>(), any::<u32>(), any::<u64>());
        (any::<bool>(), stamp, any::<u64>(), any::<bool>(), any::<u64>()).prop_map(
            |(string, (ns, origin, sequence), expires_at_ms, changed_in_place, written_at_ns)| Header {
                kind: if string { RowKind::String } else { RowKind::Tombstone },
                stamp: Stamp { ns, origin, sequence },
                expires_at_ms,
                changed_in_place,
                written_at_ns,
            },
        )
    }

    fn encoded(header: &Header, payload: &[u8]) -> Vec<u8> {
        let mut row = Vec::new();
        header.encode_into(&mut row);
        row.extend_from_slice(payload);
        row
    }

    /// The clock in the tests of merging: some rows have expired by then, some have not.
    const NOW_MS: u64 = 50;

    /// Rows that meet: few event times, so that equal ones are frequent, given by clients or drawn by stores; values that expire and
    /// that do not; tombstones; and expired rows as compaction leaves them.
    fn meeting_rows() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let given = (1..4u64, any::<bool>(), 0..3u8, 0..3u64, 1..4u64).prop_map(
            |(ns, deletes, value, expires_at_ms, written_at_ns)| {
                let covered = Stamp { ns: u64::from(value), origin: 1, sequence: 1 };
                let (kind, expires_at_ms, payload) = match (deletes, value) {
                    (true, 0) => (RowKind::Tombstone, 0, vec![]),
                    (true, _) => (RowKind::Tombstone, 0, covered.to_bytes().to_vec()),
                    (false, _) => (RowKind::String, 40 * expires_at_ms, vec![value]),
                };
                let stamp = Stamp::given(ns, kind, expires_at_ms, &payload);
                (Header { kind, stamp, expires_at_ms, changed_in_place: false, written_at_ns }, payload)
            },
        );
        // A sequence is used once: what was written under it follows from it.
        let drawn = (1..4u64, 1..3u32, 1..6u64).prop_map(|(ns, origin, sequence)| {
            let stamp = Stamp { ns, origin, sequence };
            let kind = if sequence.is_multiple_of(3) { RowKind::Tombstone } else { RowKind::String };
            let expires_at_ms = if sequence % 3 == 1 { 40 } else { 0 };
            let payload = if kind == RowKind::String { vec![sequence as u8] } else { vec![] };
            (Header { kind, stamp, expires_at_ms, changed_in_place: false, written_at_ns: 0 }, payload)
        });
        let row = (prop_oneof![given, drawn], any::<bool>()).prop_map(|((header, payload), compacted)| {
            let is_expired = header.kind == RowKind::String && !header.is_alive(NOW_MS);
            if compacted && is_expired { encoded(&header.buried(), &[]) } else { encoded(&header, &payload) }
        });
        prop::collection::vec(row, 1..10)
    }

    fn merged<'r>(rows: impl IntoIterator<Item = &'r Vec<u8>>) -> &'r [u8] {
        rows.into_iter().map(Vec::as_slice).reduce(newer).unwrap()
    }

    /// What a client reads of a row.
    fn seen(row: &[u8]) -> Option<&[u8]> {
        let (header, payload) = Header::decode(row).unwrap();
        header.is_alive(NOW_MS).then_some(payload)
    }

    proptest! {
        #[test]
        fn a_header_round_trips(header in any_header(), payload in any::<Vec<u8>>()) {
            let row = encoded(&header, &payload);
            prop_assert!(row.len() <= Header::BYTES_MAX + payload.len());
            prop_assert_eq!(row.len(), header.encoded_bytes() + payload.len());
            prop_assert_eq!(Header::decode(&row), Ok((header, payload.as_slice())));
        }

        #[test]
        fn decoding_never_panics(bytes in any::<Vec<u8>>()) {
            let _ = Header::decode(&bytes);
        }

        #[test]
        fn stamps_compare_as_their_bytes(a in any_header(), b in any_header()) {
            prop_assert_eq!(a.stamp.cmp(&b.stamp), a.stamp.to_bytes().cmp(&b.stamp.to_bytes()));
        }

        #[test]
        fn the_winner_depends_neither_on_the_order_of_arrival_nor_on_duplicates(
            (rows, shuffled) in meeting_rows().prop_flat_map(|rows| (Just(rows.clone()), Just(rows).prop_shuffle())),
            again in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let winner = merged(&rows);
            let duplicates: Vec<Vec<u8>> = again.iter().map(|index| index.get(&rows).clone()).collect();
            prop_assert_eq!(merged(shuffled.iter().chain(&duplicates)), winner);
            // Nobody sees a difference if other copies have compacted other rows.
            let buried: Vec<Vec<u8>> = rows.iter().map(|row| {
                let (header, _) = Header::decode(row).unwrap();
                if header.is_alive(NOW_MS) { row.clone() } else { encoded(&header.buried(), &[]) }
            }).collect();
            prop_assert_eq!(seen(merged(&buried)), seen(winner));
        }

        #[test]
        fn merging_is_commutative_associative_and_idempotent(rows in prop::array::uniform3(prop_oneof![
            4 => meeting_rows().prop_map(|rows| rows[0].clone()),
            1 => any::<Vec<u8>>(),
        ])) {
            let [a, b, c] = [rows[0].as_slice(), &rows[1], &rows[2]];
            prop_assert_eq!(newer(a, a), a);
            prop_assert_eq!(newer(a, b), newer(b, a));
            prop_assert_eq!(newer(newer(a, b), c), newer(a, newer(b, c)));
        }

        /// Rows of a collection and of its elements arrive in any order; what counts in the end is the same.
        #[test]
        fn elements_live_and_die_with_the_version_of_their_collection(
            (writes, shuffled) in prop::collection::vec((any::<bool>(), 1..5u64, any::<bool>(), 1..9u64), 1..12)
                .prop_flat_map(|writes| (Just(writes.clone()), Just(writes).prop_shuffle())),
        ) {
            let stamp = |ns| Stamp { ns, origin: 1, sequence: ns };
            let header = |ns, deletes| Header {
                kind: if deletes { RowKind::Tombstone } else { RowKind::String },
                stamp: stamp(ns),
                expires_at_ms: 0,
                changed_in_place: false,
                written_at_ns: 0,
            };
            let apply = |writes: &[(bool, u64, bool, u64)]| {
                let mut collection: Option<Header> = None;
                let mut elements: BTreeMap<u64, Header> = BTreeMap::new();
                for (is_element, version, deletes, ns) in writes {
                    let row = if *is_element { header(10 + ns, *deletes) } else { header(*version, version.is_multiple_of(2)) };
                    let stays = |old: Header| {
                        if precedence((&old, &[]), (&row, &[])) == Ordering::Less { row } else { old }
                    };
                    if *is_element {
                        let kept = elements.get(version).map_or(row, |old| stays(*old));
                        elements.insert(*version, kept);
                    } else {
                        collection = Some(collection.map_or(row, stays));
                    }
                }
                let owner = collection.as_ref().map(|row| (row, row.stamp));
                let alive = |(version, row): (&u64, &Header)| is_element_alive(owner, (row, stamp(*version)), NOW_MS);
                let counted: Vec<u64> = elements.iter().filter(|entry| alive(*entry)).map(|(version, _)| *version).collect();
                (collection, counted)
            };
            let (owner, counted) = apply(&writes);
            prop_assert_eq!(apply(&shuffled), (owner, counted.clone()));
            let version = owner.filter(|row| row.is_alive(NOW_MS)).map(|row| row.stamp.ns);
            prop_assert!(counted.iter().all(|counted| Some(*counted) == version));
        }
    }

    #[test]
    fn a_deletion_wins_over_values_of_its_event_time_and_a_store_over_both() {
        let value = Stamp::given(7, RowKind::String, 0, b"v");
        let deletion = Stamp::given(7, RowKind::Tombstone, 0, b"");
        let drawn = Stamp { ns: 7, origin: 1, sequence: 0 };
        assert!(value < deletion && deletion < drawn && drawn < Stamp::given(8, RowKind::String, 0, b"v"));
    }

    #[test]
    fn what_a_tombstone_covers_does_not_make_it_another_deletion() {
        let stamp = Stamp::given(7, RowKind::Tombstone, 0, b"");
        let tombstone =
            Header { kind: RowKind::Tombstone, stamp, expires_at_ms: 0, changed_in_place: false, written_at_ns: 9 };
        let covered = Stamp { ns: 3, origin: 1, sequence: 2 };
        let payload = covered.to_bytes();
        assert_eq!(precedence((&tombstone, &payload), (&tombstone, b"")), Ordering::Equal);
        assert_eq!(covered_by(&tombstone, &payload), Some(covered));
        assert_eq!(covered_by(&tombstone, b""), None);
        assert_eq!(covered_by(&Header { kind: RowKind::String, ..tombstone }, &payload), None);
    }

    /// As every store that ever ran has computed them.
    #[test]
    fn given_stamps_never_change() {
        let sequence =
            |expires_at_ms, payload: &[u8]| Stamp::given(1, RowKind::String, expires_at_ms, payload).sequence;
        let different = [
            sequence(0, b""),
            sequence(1, b""),
            sequence(0, b"\0"),
            sequence(0, b"12345678"),
            sequence(0, b"123456789"),
        ];
        assert_eq!(different, GOLDEN_SEQUENCES);
    }

    const GOLDEN_SEQUENCES: [u64; 5] = [
        0x2706_dd2f_4d19_7e6f,
        0x5e41_ab08_7439_611e,
        0x44e5_b981_00c6_7fb0,
        0x340a_9ae2_8204_4b10,
        0x6d3a_494e_14d5_307c,
    ];
}
