//! Lets the heavy tests run one after the other: two cores carry one cluster under load, not six.

use std::sync::{Mutex, MutexGuard, PoisonError};

static HEAVY: Mutex<()> = Mutex::new(());

/// Held by a test for as long as it keeps the machine busy.
pub fn heavy() -> MutexGuard<'static, ()> {
    // A heavy test that failed says nothing about the next one.
    HEAVY.lock().unwrap_or_else(PoisonError::into_inner)
}
