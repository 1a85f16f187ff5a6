//! The keys that change while slots are given to another shard: noted after each write, taken by whoever gives, who reads the rows then.
//!
//! A slot of which nothing has been read yet is ignored. It counts as begun before the rows are read, and a writer looks whether it has begun
//! after it has written: one of the two sees the write. What was noted twice is sent once, and no place in any log is kept.

use hashbrown::HashSet;
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::Instant;
use tokio::sync::Notify;
use vasto_proto::id::ShardId;
use vasto_proto::key::decode_key;
use vasto_proto::slot::SLOT_COUNT;
use vasto_proto::topology::SlotSet;

/// What the keys that wait may take together in one shard: half a million of usual length. Above it writes of slots that leave are refused,
/// until half of it has been sent.
const NOTED_BYTES_MAX: usize = 64 << 20;
/// The part of one of many moves.
const NOTED_BYTES_MIN: usize = 1 << 20;
/// What a key takes beside its bytes.
const KEY_OVERHEAD_BYTES: usize = 48;
const WORDS: usize = SLOT_COUNT as usize / 64;

/// All moves that go out of one shard.
#[derive(Default)]
pub struct Changes {
    is_on: AtomicBool,
    /// One of them has too much noted.
    is_full: AtomicBool,
    moves: RwLock<Vec<Arc<Outbox>>>,
}

/// The keys that have changed in the slots of one move.
pub struct Outbox {
    pub target: ShardId,
    slots: SlotSet,
    /// One bit per slot of which something may have been read.
    begun: Box<[AtomicU64; WORDS]>,
    /// A flush has killed all rows: the move begins anew.
    is_flushed: AtomicBool,
    /// Nobody notes anything here any more.
    has_ended: AtomicBool,
    is_full: AtomicBool,
    bytes_max: usize,
    noted: Mutex<Noted>,
    /// Woken when there is something to take.
    pub wakes: Notify,
}

#[derive(Default)]
struct Noted {
    /// Slots of which everything has been read, and sent.
    closed: SlotSet,
    /// Of closed slots.
    ready: HashSet<Box<[u8]>>,
    /// Of slots that are being copied.
    held: HashSet<Box<[u8]>>,
    /// Of all that is here or was taken and is not sent yet.
    bytes: usize,
    /// When the first of `ready` was noted.
    since: Option<Instant>,
}

/// Keys that were taken, in their order.
#[derive(Default)]
pub struct Taken {
    pub keys: Vec<Box<[u8]>>,
    /// When the first of them was noted.
    pub since: Option<Instant>,
}

pub fn noted_bytes(key: &[u8]) -> usize {
    key.len() + KEY_OVERHEAD_BYTES
}

impl Changes {
    /// Whether anything is to be noted. Somebody who begins a move waits for all who hold stripes: they see it from then on.
    pub fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    /// Notes physical keys whose rows were written just now, under the locks of their stripes.
    pub fn wrote<'k>(&self, keys: impl Iterator<Item = &'k [u8]>) {
        // Behind the write: see above.
        fence(Ordering::SeqCst);
        let moves = self.moves.read();
        for key in keys {
            let Some((slot, _)) = decode_key(key) else { continue };
            for outbox in moves.iter().filter(|outbox| outbox.slots.contains(slot)) {
                if outbox.note(slot, key) {
                    self.is_full.store(true, Ordering::Relaxed);
                }
            }
        }
    }

    /// A flush was written just now, under the locks of all stripes.
    pub fn flushed(&self) {
        for outbox in self.moves.read().iter() {
            outbox.is_flushed.store(true, Ordering::SeqCst);
            outbox.wakes.notify_one();
        }
    }

    /// Whether some slots take no writes now.
    pub fn is_full(&self) -> bool {
        self.is_full.load(Ordering::Relaxed)
    }

    /// Whether so much of a slot's move has changed that more must wait.
    pub fn refuses(&self, slot: u16) -> bool {
        let is_full = |outbox: &Arc<Outbox>| outbox.is_full.load(Ordering::Relaxed) && outbox.slots.contains(slot);
        self.moves.read().iter().any(is_full)
    }

    /// Begins to note what changes in slots, one of so many moves of the shard; one to the same target that was there ends. The caller passes through all stripes before it
    /// relies on it.
    pub fn begin(&self, target: ShardId, slots: SlotSet, moves_count: usize) -> Arc<Outbox> {
        let outbox = Arc::new(Outbox {
            target,
            slots,
            begun: Box::new([const { AtomicU64::new(0) }; WORDS]),
            is_flushed: AtomicBool::new(false),
            has_ended: AtomicBool::new(false),
            is_full: AtomicBool::new(false),
            bytes_max: (NOTED_BYTES_MAX / moves_count.max(1)).max(NOTED_BYTES_MIN),
            noted: Mutex::default(),
            wakes: Notify::new(),
        });
        let mut moves = self.moves.write();
        moves.retain(|other| {
            let stays = other.target != target;
            if !stays {
                other.has_ended.store(true, Ordering::SeqCst);
                other.wakes.notify_one();
            }
            stays
        });
        moves.push(Arc::clone(&outbox));
        self.is_on.store(true, Ordering::SeqCst);
        self.relieve(&moves);
        outbox
    }

    pub fn end(&self, outbox: &Arc<Outbox>) {
        let mut moves = self.moves.write();
        outbox.has_ended.store(true, Ordering::SeqCst);
        moves.retain(|other| !Arc::ptr_eq(other, outbox));
        self.is_on.store(!moves.is_empty(), Ordering::SeqCst);
        self.relieve(&moves);
    }

    /// The caller holds the moves for itself: nobody notes anything meanwhile.
    fn relieve(&self, moves: &[Arc<Outbox>]) {
        let is_full = moves.iter().any(|outbox| outbox.is_full.load(Ordering::Relaxed));
        self.is_full.store(is_full, Ordering::Relaxed);
    }

    /// What was taken of so many bytes has been sent.
    pub fn sent(&self, outbox: &Outbox, bytes: usize) {
        let mut noted = outbox.noted.lock();
        noted.bytes = noted.bytes.saturating_sub(bytes);
        let is_relieved = noted.bytes <= outbox.bytes_max / 2 && outbox.is_full.swap(false, Ordering::Relaxed);
        drop(noted);
        if is_relieved {
            self.relieve(&self.moves.write());
        }
    }

    /// Forgets what was noted and what has begun, if a flush says so: the move begins anew.
    pub fn begins_anew(&self, outbox: &Outbox) -> bool {
        if !outbox.is_flushed.swap(false, Ordering::SeqCst) {
            return false;
        }
        let mut noted = outbox.noted.lock();
        outbox.begun.iter().for_each(|word| word.store(0, Ordering::SeqCst));
        *noted = Noted::default();
        outbox.is_full.store(false, Ordering::Relaxed);
        drop(noted);
        self.relieve(&self.moves.write());
        true
    }
}

impl Outbox {
    /// Whether that was too much.
    fn note(&self, slot: u16, key: &[u8]) -> bool {
        if self.begun[usize::from(slot / 64)].load(Ordering::SeqCst) >> (slot % 64) & 1 == 0 {
            return false;
        }
        let mut noted = self.noted.lock();
        let is_ready = noted.closed.contains(slot);
        let keys = if is_ready { &mut noted.ready } else { &mut noted.held };
        if keys.contains(key) {
            return false;
        }
        keys.insert(key.into());
        noted.bytes += noted_bytes(key);
        if is_ready && noted.since.is_none() {
            noted.since = Some(Instant::now());
            self.wakes.notify_one();
        }
        let is_full = noted.bytes > self.bytes_max;
        if is_full {
            self.is_full.store(true, Ordering::Relaxed);
        }
        is_full
    }

    /// Rows of these slots are read from here on.
    pub fn open(&self, slots: &[u16]) {
        for slot in slots {
            self.begun[usize::from(slot / 64)].fetch_or(1 << (slot % 64), Ordering::SeqCst);
        }
        fence(Ordering::SeqCst);
    }

    /// All rows of these slots were sent as they were: what has changed since may follow.
    pub fn close(&self, slots: &[u16]) {
        let mut noted = self.noted.lock();
        let Noted { closed, ready, held, since, .. } = &mut *noted;
        slots.iter().for_each(|slot| closed.insert(*slot));
        ready.extend(held.extract_if(|key| decode_key(key).is_some_and(|(slot, _)| closed.contains(slot))));
        if !ready.is_empty() {
            since.get_or_insert_with(Instant::now);
        }
    }

    /// Takes what may be sent.
    pub fn take(&self) -> Taken {
        let mut noted = self.noted.lock();
        let (ready, since) = (std::mem::take(&mut noted.ready), noted.since.take());
        drop(noted);
        let mut keys: Vec<Box<[u8]>> = ready.into_iter().collect();
        keys.sort_unstable();
        Taken { keys, since }
    }

    /// Keys that nobody has taken, and when the first of those was noted that may be sent.
    pub fn waiting(&self) -> (usize, Option<Instant>) {
        let noted = self.noted.lock();
        (noted.ready.len() + noted.held.len(), noted.since)
    }

    /// Whether writes to its slots are refused, since too much of them has changed.
    pub fn is_full(&self) -> bool {
        self.is_full.load(Ordering::Relaxed)
    }

    /// Another move to the same target took the place of this one, or nobody gives any more.
    pub fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(slot: u16, key: &str) -> Vec<u8> {
        [&slot.to_be_bytes()[..], key.as_bytes()].concat()
    }

    fn taken(outbox: &Outbox) -> Vec<Vec<u8>> {
        outbox.take().keys.into_iter().map(Vec::from).collect()
    }

    #[test]
    fn what_changes_behind_the_beginning_of_its_slot_is_taken_once_and_in_order() {
        let changes = Changes::default();
        assert!(!changes.is_on());
        let outbox = changes.begin(ShardId(3), [1, 2, 3].into_iter().collect(), 1);
        assert!(changes.is_on());
        let write = |keys: &[Vec<u8>]| changes.wrote(keys.iter().map(Vec::as_slice));
        write(&[key(1, "early"), key(7, "of another")]);
        outbox.open(&[1, 2]);
        write(&[key(2, "b"), key(1, "c"), key(1, "a"), key(3, "early"), key(1, "c")]);
        assert_eq!((taken(&outbox), outbox.waiting().0), (vec![], 3), "nothing of a slot that is being copied");
        outbox.close(&[1]);
        assert_eq!((taken(&outbox), outbox.waiting().0), (vec![key(1, "a"), key(1, "c")], 1));
        write(&[key(1, "c")]);
        outbox.close(&[2]);
        assert!(outbox.waiting().1.is_some());
        assert_eq!(taken(&outbox), [key(1, "c"), key(2, "b")]);
        changes.end(&outbox);
        assert!(!changes.is_on() && outbox.has_ended());
    }

    #[test]
    fn too_much_refuses_writes_of_its_slots_until_half_is_sent() {
        let changes = Changes::default();
        let outbox = changes.begin(ShardId(3), [1].into_iter().collect(), usize::MAX);
        outbox.open(&[1]);
        outbox.close(&[1]);
        let mut number = 0;
        while !changes.is_full() {
            number += 1;
            assert!(number < 1_000_000);
            changes.wrote(std::iter::once(key(1, &format!("key:{number}")).as_slice()));
        }
        assert!(changes.refuses(1) && !changes.refuses(2));
        let keys = outbox.take().keys;
        assert_eq!(keys.len(), number);
        assert!(changes.is_full(), "it is not sent yet");
        let bytes: usize = keys.iter().map(|key| noted_bytes(key)).sum();
        assert!(bytes > NOTED_BYTES_MIN && bytes < NOTED_BYTES_MIN + 200);
        changes.sent(&outbox, bytes / 4);
        assert!(changes.refuses(1));
        changes.sent(&outbox, bytes / 2);
        assert!(!changes.is_full() && !changes.refuses(1));
    }

    #[test]
    fn a_flush_lets_a_move_begin_anew_and_a_newer_move_ends_an_older_one() {
        let changes = Changes::default();
        let outbox = changes.begin(ShardId(3), [1].into_iter().collect(), 1);
        outbox.open(&[1]);
        outbox.close(&[1]);
        changes.wrote(std::iter::once(key(1, "a").as_slice()));
        assert!(!changes.begins_anew(&outbox));
        changes.flushed();
        assert!(changes.begins_anew(&outbox) && !changes.begins_anew(&outbox));
        changes.wrote(std::iter::once(key(1, "a").as_slice()));
        assert_eq!(outbox.waiting(), (0, None), "nothing of it was read yet");
        let newer = changes.begin(ShardId(3), [1].into_iter().collect(), 1);
        assert!(outbox.has_ended() && !newer.has_ended());
        changes.end(&outbox);
        assert!(changes.is_on(), "the newer one goes on");
        changes.end(&newer);
        assert!(!changes.is_on());
    }
}
