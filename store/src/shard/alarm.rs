//! Wakes the thread that closes shards and opens them again.

use parking_lot::{Condvar, Mutex};
use std::time::Instant;

#[derive(Debug, Default)]
pub struct Alarm {
    state: Mutex<State>,
    rung: Condvar,
}

#[derive(Debug, Default)]
struct State {
    rung: bool,
    stopped: bool,
}

/// Why a wait is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// Somebody rang, or it is time.
    Work,
    Stop,
}

impl Alarm {
    /// A shard failed.
    pub fn ring(&self) {
        self.state.lock().rung = true;
        self.rung.notify_one();
    }

    pub fn stop(&self) {
        self.state.lock().stopped = true;
        self.rung.notify_one();
    }

    /// Waits until somebody rings, or until the given time.
    pub fn wait(&self, until: Option<Instant>) -> Woken {
        let mut state = self.state.lock();
        loop {
            if state.stopped {
                return Woken::Stop;
            }
            if std::mem::take(&mut state.rung) {
                return Woken::Work;
            }
            match until {
                Some(until) if Instant::now() >= until => return Woken::Work,
                Some(until) => drop(self.rung.wait_until(&mut state, until)),
                None => self.rung.wait(&mut state),
            }
        }
    }
}
