//! The clock of leases: goes on while the process is stopped and while the machine sleeps.

use rustix::time::{ClockId, clock_gettime};
#[cfg(test)]
use std::collections::VecDeque;

/// `CLOCK_BOOTTIME`.
#[derive(Debug, Default)]
pub struct BootClock {
    #[cfg(test)]
    stops: parking_lot::Mutex<Stops>,
}

/// What a test makes of the process: one that was stopped for a while.
#[cfg(test)]
#[derive(Debug, Default)]
struct Stops {
    ahead_ns: u64,
    /// How much is passed over at each of a thread's next readings.
    planned_ns: VecDeque<u64>,
    planned_by: Option<std::thread::ThreadId>,
}

impl BootClock {
    /// Nanoseconds since the machine was started.
    pub fn now_ns(&self) -> u64 {
        let now = clock_gettime(ClockId::Boottime);
        let now_ns = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        #[cfg(test)]
        let now_ns = now_ns + self.passed_over_ns();
        now_ns
    }

    #[cfg(test)]
    fn passed_over_ns(&self) -> u64 {
        let mut stops = self.stops.lock();
        if stops.planned_by == Some(std::thread::current().id()) {
            stops.ahead_ns += stops.planned_ns.pop_front().unwrap_or_default();
        }
        stops.ahead_ns
    }

    /// Has the process stop before the reading of this thread that comes after `readings` others of it.
    #[cfg(test)]
    pub fn stop_after(&self, readings: usize, stopped_ns: u64) {
        let mut stops = self.stops.lock();
        stops.planned_by = Some(std::thread::current().id());
        stops.planned_ns = std::iter::repeat_n(0, readings).chain([stopped_ns]).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_goes_forward_and_tests_stop_it() {
        let clock = BootClock::default();
        let first = clock.now_ns();
        assert!(first > 0);
        clock.stop_after(1, 3_600_000_000_000);
        assert!(clock.now_ns() - first < 3_600_000_000_000);
        assert!(clock.now_ns() - first >= 3_600_000_000_000);
    }
}
