//! The limit of open files, which bounds how many clients can be served.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

/// Listeners, streams between roles, logs and what libraries open.
const OTHER_FILES: usize = 64;

/// Raises the limit as far as the system allows, and returns it.
pub fn raise_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum;
    if limit.current != wanted && setrlimit(Resource::Nofile, Rlimit { current: wanted, maximum: wanted }).is_err() {
        return count(limit.current);
    }
    count(wanted)
}

/// `None` is no limit.
fn count(limit: Option<u64>) -> usize {
    limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX)
}

/// What becomes of `maxclients` under the limit when the data may need `data_files`: at most half of all files, since
/// RocksDB closes files that it does not use. Says so if it has to be lowered, as Redis does.
pub fn fitting_maxclients(maxclients: usize, data_files: usize, limit: usize) -> usize {
    let available = limit.saturating_sub(data_files.min(limit / 2)).saturating_sub(OTHER_FILES).max(1);
    if maxclients <= available {
        return maxclients;
    }
    warn!(
        maxclients,
        lowered_to = available,
        open_files_limit = limit,
        "too few open files are allowed for maxclients"
    );
    available
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maxclients_fits_the_limit() {
        assert_eq!(fitting_maxclients(10_000, 0, 20_000), 10_000);
        assert_eq!(fitting_maxclients(10_000, 0, 1_024), 960);
        assert_eq!(fitting_maxclients(10_000, 4_096, 1_024), 448);
        assert_eq!(fitting_maxclients(10_000, 4_096, 10), 1);
        assert_eq!(fitting_maxclients(10_000, 4_096, usize::MAX), 10_000);
    }

    #[test]
    fn the_limit_can_be_raised_to_what_is_allowed() {
        let limit = raise_limit();
        assert!(limit > 0);
        assert_eq!(raise_limit(), limit);
    }
}
