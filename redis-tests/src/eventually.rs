//! Waits for a condition instead of for a time.

use std::time::{Duration, Instant};

/// Long enough for a busy machine with two cores, short enough to notice a hang.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The pause between two looks: short against any patience, long enough to leave the cores to the servers.
const PAUSE: Duration = Duration::from_millis(10);

/// Calls `attempt` until it returns `Ok` and gives its value; panics with the last error when `patience` is over.
pub fn eventually_within<T, E: std::fmt::Display>(
    patience: Duration,
    what: &str,
    mut attempt: impl FnMut() -> Result<T, E>,
) -> T {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(last) if start.elapsed() > patience => {
                panic!("not within {patience:?}: {what}: {last}")
            }
            Err(_) => pause(PAUSE),
        }
    }
}

/// The one place where a thread sleeps: between two looks, or between two bytes that shall arrive apart.
#[expect(clippy::disallowed_methods, reason = "these threads are the tests' own and have nothing else to do")]
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// Waits until the condition holds: `eventually!("the key is gone", connection.call(&["EXISTS", "k"]) == Value::Integer(0))`.
/// A number of seconds may stand in front.
#[macro_export]
macro_rules! eventually {
    ($seconds:literal s, $what:expr, $condition:expr) => {
        $crate::eventually::eventually_within(std::time::Duration::from_secs($seconds), &$what, || {
            if $condition { Ok(()) } else { Err("the condition does not hold") }
        })
    };
    ($what:expr, $condition:expr) => {
        $crate::eventually::eventually_within($crate::eventually::PATIENCE, &$what, || {
            if $condition { Ok(()) } else { Err("the condition does not hold") }
        })
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_for_the_condition() {
        let mut looks = 0;
        eventually!("three looks", {
            looks += 1;
            looks == 3
        });
    }

    #[test]
    #[should_panic(expected = "the moon: the last error")]
    fn gives_up_with_the_last_error() {
        eventually_within::<(), _>(Duration::from_millis(30), "the moon", || Err("the last error"));
    }
}
