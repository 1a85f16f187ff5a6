//! The eras that led to what a copy holds, and where in its own log another copy's position lies. Pure.
//!
//! Every primary notes the beginning of its era in its log, in front of everything that it writes; copies take the note over with the rows. So
//! a copy's history always tells of exactly those eras of which it has something, and two copies that have a position in common have all
//! before it in common.

use vasto_proto::id::Epoch;
use vasto_proto::topology::{Era, Position};

/// Eras that are remembered: a copy that comes back with an older one is copied anew.
const ERAS_MAX: usize = 256;

/// One era.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub era: Era,
    /// The log that its primary wrote.
    pub log: u64,
    /// The last sequence number of that log before the era; the entry itself is the next.
    pub start: u64,
    /// Stamps drawn in the era are above this event time, those drawn in what led to it are not.
    pub floor_ns: u64,
    /// Where the primary stood then.
    pub parent: Option<Position>,
}

/// Oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    entries: Vec<Entry>,
}

/// What a follower's position is to a leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Everything up to this number of the leader's own log; `led`: it is of an era that it led itself.
    At { sequence: u64, led: bool },
    /// The leader had it as a follower: it is behind the batch of its log that carries this position or the last one before.
    Carried,
    /// The follower has more, behind this position at the latest (`None`: it cannot be told where).
    Ahead { common: Option<Position> },
}

const ENTRY_BYTES: usize = Position::BYTES + 8 + 8 + 1 + Position::BYTES;

impl History {
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.entries.len() * ENTRY_BYTES);
        for entry in &self.entries {
            let start = Position { era: entry.era, sequence: entry.start };
            out.extend_from_slice(&start.to_bytes());
            out.extend_from_slice(&entry.log.to_be_bytes());
            out.extend_from_slice(&entry.floor_ns.to_be_bytes());
            out.push(u8::from(entry.parent.is_some()));
            out.extend_from_slice(&entry.parent.unwrap_or_default().to_bytes());
        }
        out
    }

    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (entries, rest) = bytes.as_chunks::<ENTRY_BYTES>();
        let entry = |bytes: &[u8; ENTRY_BYTES]| {
            let (start, rest) = bytes.split_at(Position::BYTES);
            let (log, rest) = rest.split_first_chunk::<8>()?;
            let (floor_ns, rest) = rest.split_first_chunk::<8>()?;
            let (has_parent, parent) = rest.split_first()?;
            let Position { era, sequence: start } = Position::from_bytes(start)?;
            let parent = Position::from_bytes(parent).filter(|_| *has_parent != 0);
            let (log, floor_ns) = (u64::from_be_bytes(*log), u64::from_be_bytes(*floor_ns));
            Some(Entry { era, log, start, floor_ns, parent })
        };
        let entries = entries.iter().map(entry).collect::<Option<Vec<_>>>()?;
        rest.is_empty().then_some(Self { entries })
    }

    pub fn last(&self) -> Option<&Entry> {
        self.entries.last()
    }

    pub fn push(&mut self, entry: Entry) {
        self.entries.push(entry);
        let surplus = self.entries.len().saturating_sub(ERAS_MAX);
        self.entries.drain(..surplus);
    }

    /// Forgets the eras behind one: the copy has given up what it had of them.
    pub fn cut(&mut self, last: Era) {
        self.entries.retain(|entry| entry.era <= last);
    }

    /// The era that a primary which begins to lead now begins.
    pub fn next_era(&self, epoch: Epoch) -> Era {
        let opened = self.entries.iter().filter(|entry| entry.era.epoch == epoch).map(|entry| entry.era.opened).max();
        Era { epoch, opened: opened.unwrap_or(0) + 1 }
    }

    /// Whether this copy began an era under the epoch, in the log that it has.
    pub fn has_led(&self, log: u64, epoch: Epoch) -> bool {
        self.entries.iter().any(|entry| entry.log == log && entry.era.epoch == epoch)
    }

    /// Where a copy stands whose log is `log`: its own last number if it led last, else what it noted with the rows.
    pub fn position(&self, log: Option<u64>, noted: Option<Position>, latest: u64) -> Option<Position> {
        match self.last() {
            Some(last) if Some(last.log) == log && noted.is_none_or(|noted| noted.era < last.era) => {
                Some(Position { era: last.era, sequence: latest })
            }
            Some(_) | None => noted,
        }
    }

    /// The end of era number `index` in this history.
    fn end(&self, index: usize, now: Position) -> u64 {
        let next = self.entries.get(index + 1).and_then(|next| next.parent);
        next.filter(|parent| parent.era == self.entries[index].era).map_or(now.sequence, |parent| parent.sequence)
    }

    /// What another copy's position is to this one, which stands at `now` and writes the log `log`.
    pub fn place(&self, log: u64, now: Position, other: Position) -> Place {
        let Some(index) = self.entries.iter().rposition(|entry| entry.era <= other.era) else {
            return Place::Ahead { common: None };
        };
        let entry = self.entries[index];
        let end = Position { era: entry.era, sequence: self.end(index, now) };
        if entry.era != other.era || other.sequence > end.sequence {
            return Place::Ahead { common: Some(end) };
        }
        if entry.log == log {
            return Place::At { sequence: other.sequence, led: true };
        }
        match self.entries.get(index + 1) {
            Some(next) if next.log == log && next.parent == Some(other) => {
                Place::At { sequence: next.start, led: false }
            }
            Some(_) | None => Place::Carried,
        }
    }

    /// Above which event time stamps are of eras behind this one; `None` if there is none.
    pub fn floor_behind(&self, era: Era) -> Option<u64> {
        self.entries.iter().find(|entry| entry.era > era).map(|entry| entry.floor_ns)
    }

    /// The last position that this copy, which stands at `now`, has in common with one whose history reaches to `other` at least: not
    /// behind either's end of that era. `None` if it knows nothing of it.
    pub fn common(&self, now: Position, other: Position) -> Option<Position> {
        let index = self.entries.iter().rposition(|entry| entry.era == other.era)?;
        Some(Position { era: other.era, sequence: other.sequence.min(self.end(index, now)) })
    }

    /// Up to where in its own log `log` everything is of the position's era or before; `None` if another wrote that era.
    pub fn own_sequence(&self, log: u64, position: Position) -> Option<u64> {
        let is_own = self.entries.iter().any(|entry| entry.era == position.era && entry.log == log);
        is_own.then_some(position.sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(epoch: u64, opened: u64, sequence: u64) -> Position {
        Position { era: Era { epoch: Epoch(epoch), opened }, sequence }
    }

    fn history(entries: &[(u64, u64, u64, u64, Option<Position>)]) -> History {
        let mut history = History::default();
        for (epoch, opened, log, start, parent) in entries {
            let era = Era { epoch: Epoch(*epoch), opened: *opened };
            history.push(Entry { era, log: *log, start: *start, floor_ns: 10 * start, parent: *parent });
        }
        history
    }

    #[test]
    fn a_position_is_found_in_the_log_or_known_to_be_ahead() {
        // Log 7 led twice, then log 8, whose copy had come to 7's 90, began at its own 300 and restarted at 400.
        let history = history(&[
            (1, 1, 7, 0, None),
            (1, 2, 7, 50, Some(at(1, 1, 50))),
            (3, 1, 8, 300, Some(at(1, 2, 90))),
            (3, 2, 8, 400, Some(at(3, 1, 400))),
        ]);
        let now = at(3, 2, 500);
        let place = |position| history.place(8, now, position);
        assert_eq!(place(at(3, 2, 450)), Place::At { sequence: 450, led: true });
        assert_eq!(place(at(3, 1, 350)), Place::At { sequence: 350, led: true });
        assert_eq!(place(at(1, 2, 90)), Place::At { sequence: 300, led: false });
        assert_eq!(place(at(1, 2, 80)), Place::Carried);
        assert_eq!(place(at(1, 1, 50)), Place::Carried);
        // The power took the end of an era.
        assert_eq!(place(at(3, 1, 401)), Place::Ahead { common: Some(at(3, 1, 400)) });
        assert_eq!(place(at(1, 2, 91)), Place::Ahead { common: Some(at(1, 2, 90)) });
        assert_eq!(place(at(3, 2, 501)), Place::Ahead { common: Some(now) });
        // Eras of which nobody here has heard.
        assert_eq!(place(at(1, 3, 5)), Place::Ahead { common: Some(at(1, 2, 90)) });
        assert_eq!(place(at(9, 1, 5)), Place::Ahead { common: Some(now) });
        assert_eq!(place(at(0, 1, 5)), Place::Ahead { common: None });
        let floors =
            [(1, 1), (1, 3), (3, 1), (3, 2)].map(|(epoch, opened)| history.floor_behind(at(epoch, opened, 0).era));
        assert_eq!(floors, [Some(500), Some(3000), Some(4000), None]);
        assert_eq!(history.next_era(Epoch(3)), Era { epoch: Epoch(3), opened: 3 });
        assert_eq!(history.next_era(Epoch(4)), Era { epoch: Epoch(4), opened: 1 });
        assert_eq!(History::from_bytes(&history.to_bytes()), Some(history.clone()));
        assert_eq!(History::from_bytes(&history.to_bytes()[1..]), None);
    }

    #[test]
    fn an_old_primary_finds_what_only_it_has() {
        // It restarted once more than the new primary has heard of.
        let own = history(&[(1, 1, 7, 0, None), (1, 2, 7, 95, Some(at(1, 1, 95)))]);
        let now = at(1, 2, 99);
        let common = own.common(now, at(1, 1, 90)).unwrap();
        assert_eq!((common, own.own_sequence(7, common)), (at(1, 1, 90), Some(90)));
        // The other has come no further than it says, and neither has this one.
        assert_eq!(own.common(now, at(1, 1, 97)), Some(at(1, 1, 95)));
        assert_eq!(own.common(now, at(4, 1, 1)), None);
        assert_eq!(own.own_sequence(8, common), None);
    }

    #[test]
    fn who_led_last_stands_at_the_end_of_its_own_log() {
        let own = history(&[(1, 1, 7, 0, None)]);
        assert_eq!(own.position(Some(7), None, 40), Some(at(1, 1, 40)));
        // Pinned when it stopped.
        assert_eq!(own.position(Some(7), Some(at(1, 1, 38)), 40), Some(at(1, 1, 38)));
        // A copy of it.
        assert_eq!(own.position(Some(8), Some(at(1, 1, 12)), 900), Some(at(1, 1, 12)));
        assert_eq!(own.position(Some(8), None, 900), None);
        assert_eq!(History::default().position(None, None, 5), None);
    }
}
