//! How fast a store gives rows away: a rate that all its moves share, lowered while batches of clients take much longer than they did before.

use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Batches take much longer: so many times what they took while nothing moved …
const SLOW_TIMES: u64 = 3;
/// … and so much more: less nobody notices.
const SLOW_MORE_NS: u64 = 100_000;
/// A step down, and up; the least part of the rate that is left, so that a move ends some day.
const DOWN: f64 = 0.8;
const UP: f64 = 1.05;
const SHARE_MIN: f64 = 0.125;
/// A second of a low rate is cut into so many steps.
const STEPS_A_SECOND: u64 = 10;
/// What one measured batch weighs in the means.
const NOW_WEIGHT: u64 = 16;
const BEFORE_WEIGHT: u64 = 128;
/// One batch counts as at most so many times the mean: a thread that was put aside once says little.
const OUTLIER_TIMES: u64 = 16;

pub struct Pace {
    /// 0 = without limit.
    bytes_per_second: u64,
    /// Moves that go on.
    moves: AtomicUsize,
    /// What a batch took lately, and while nothing moved: means, 0 = not known.
    now_ns: AtomicU64,
    before_ns: AtomicU64,
    measured: AtomicU64,
    turn: Mutex<Turn>,
}

struct Turn {
    /// When what was let through so far has had its time.
    free_at: Instant,
    /// The part of the rate that is used.
    share: f64,
    /// Batches that were measured when it was looked last.
    measured: u64,
}

impl Pace {
    /// 0 = without limit.
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second,
            moves: AtomicUsize::new(0),
            now_ns: AtomicU64::new(0),
            before_ns: AtomicU64::new(0),
            measured: AtomicU64::new(0),
            turn: Mutex::new(Turn { free_at: Instant::now(), share: 1.0, measured: 0 }),
        }
    }

    /// A move begins; it ends when what is returned is dropped.
    pub fn begin(&self) -> Moving<'_> {
        self.moves.fetch_add(1, Ordering::Relaxed);
        Moving(self)
    }

    /// A batch of a client took so long; asked of one in some.
    pub fn ran(&self, took: Duration) {
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        // Two at a time may lose one of them: a mean can do without.
        let add = |mean: &AtomicU64, weight: u64| {
            let old = mean.load(Ordering::Relaxed);
            let took = if old == 0 { took } else { took.min(old * OUTLIER_TIMES) };
            let new = if old == 0 { took } else { old - old / weight + took / weight };
            mean.store(new.max(1), Ordering::Relaxed);
        };
        add(&self.now_ns, NOW_WEIGHT);
        if self.moves.load(Ordering::Relaxed) == 0 {
            add(&self.before_ns, BEFORE_WEIGHT);
        }
        self.measured.fetch_add(1, Ordering::Relaxed);
    }

    fn is_slow(&self) -> bool {
        let (now, before) = (self.now_ns.load(Ordering::Relaxed), self.before_ns.load(Ordering::Relaxed));
        before > 0 && now > SLOW_TIMES * before && now > before + SLOW_MORE_NS
    }

    /// What may be sent at once, of so many bytes at most, if the rate is to be kept over short times too.
    pub fn step_bytes(&self, bytes_max: usize) -> usize {
        let steps = usize::try_from(self.bytes_per_second / STEPS_A_SECOND).unwrap_or(usize::MAX);
        if self.bytes_per_second == 0 { bytes_max } else { steps.min(bytes_max) }
    }

    /// How long to wait before so many bytes more are sent.
    pub fn wait_for(&self, bytes: usize) -> Duration {
        if self.bytes_per_second == 0 {
            return Duration::ZERO;
        }
        let now = Instant::now();
        let mut turn = self.turn.lock();
        let measured = self.measured.load(Ordering::Relaxed);
        // Nobody is slowed down who is not there.
        let is_slow = measured != turn.measured && self.is_slow();
        turn.measured = measured;
        turn.share = if is_slow { (turn.share * DOWN).max(SHARE_MIN) } else { (turn.share * UP).min(1.0) };
        let start = turn.free_at.max(now);
        turn.free_at = start + Duration::from_secs_f64(bytes as f64 / (self.bytes_per_second as f64 * turn.share));
        start - now
    }

    /// The part of the rate that is used.
    pub fn share(&self) -> f64 {
        self.turn.lock().share
    }
}

/// One move.
pub struct Moving<'p>(&'p Pace);

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        self.0.moves.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_share_a_rate_and_slow_batches_lower_it() {
        let pace = Pace::new(1_000_000);
        (0..1000).for_each(|_| pace.ran(Duration::from_micros(50)));
        let moving = pace.begin();
        pace.wait_for(1_000_000);
        let wait = pace.wait_for(0);
        assert!(wait > Duration::from_millis(500) && wait <= Duration::from_secs(1), "{wait:?}");
        assert_eq!(pace.share(), 1.0);
        for _ in 0..100 {
            pace.ran(Duration::from_millis(2));
            pace.wait_for(0);
        }
        assert_eq!(pace.share(), SHARE_MIN);
        for _ in 0..100 {
            pace.wait_for(0);
        }
        assert_eq!(pace.share(), 1.0, "when nobody sends anything it rises again");
        drop(moving);
        assert_eq!(Pace::new(0).wait_for(usize::MAX), Duration::ZERO);
        assert_eq!(
            (Pace::new(0).step_bytes(500_000), pace.step_bytes(500_000), pace.step_bytes(50_000)),
            (500_000, 100_000, 50_000)
        );
    }
}
