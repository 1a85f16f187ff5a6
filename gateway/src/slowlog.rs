//! The log of slow commands: bounded in entries, and each entry in bytes.

use crate::clients::{ClientRecord, unix_ms};
use crate::settings::Settings;
use parking_lot::Mutex;
use std::collections::VecDeque;

/// Words of a command line that an entry keeps; the last one then says how many more there were.
const WORDS_MAX: usize = 32;
/// Bytes of a word that an entry keeps.
const WORD_BYTES_MAX: usize = 128;

/// One slow command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub id: u64,
    /// Unix time in seconds.
    pub at: u64,
    pub duration_us: u64,
    /// The command line, cut as Redis cuts it.
    pub words: Vec<Vec<u8>>,
    pub client_address: String,
    pub client_name: Vec<u8>,
}

#[derive(Debug, Default)]
struct Entries {
    /// Never reset, so that a reader sees a new entry by its id.
    next_id: u64,
    /// The newest first.
    latest: VecDeque<Entry>,
}

/// The slow commands of this gateway, the newest first.
#[derive(Debug, Default)]
pub struct Slowlog {
    entries: Mutex<Entries>,
}

impl Slowlog {
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes a command if it took as long as the settings call slow. `words` yields the whole command line, its name first; it is asked
    /// only then.
    pub fn observe<'a, W>(
        &self,
        settings: &Settings,
        duration_us: u64,
        words: impl FnOnce() -> W,
        client: &ClientRecord,
    ) where
        W: IntoIterator<Item = &'a [u8]>,
    {
        let Ok(threshold_us) = u64::try_from(settings.slowlog_log_slower_than_us()) else {
            return;
        };
        if duration_us < threshold_us {
            return;
        }
        let mut words = cut(words().into_iter());
        redact(&mut words);
        let (at, client_name) = (unix_ms() / 1000, client.names().name);
        let entries = &mut *self.entries.lock();
        let id = entries.next_id;
        entries.next_id += 1;
        entries.latest.push_front(Entry {
            id,
            at,
            duration_us,
            words,
            client_address: client.peer_address.clone(),
            client_name,
        });
        entries.latest.truncate(settings.slowlog_max_len());
    }

    /// The newest entries, `None` = all.
    pub fn latest(&self, count: Option<usize>) -> Vec<Entry> {
        self.entries.lock().latest.iter().take(count.unwrap_or(usize::MAX)).cloned().collect()
    }

    pub fn len(&self) -> usize {
        self.entries.lock().latest.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn reset(&self) {
        self.entries.lock().latest.clear();
    }
}

fn cut<'a>(mut words: impl Iterator<Item = &'a [u8]>) -> Vec<Vec<u8>> {
    let mut kept: Vec<&[u8]> = words.by_ref().take(WORDS_MAX).collect();
    let more = words.count();
    if more > 0 {
        kept.pop();
    }
    let mut kept: Vec<Vec<u8>> = kept.into_iter().map(cut_word).collect();
    if more > 0 {
        kept.push(format!("... ({} more arguments)", more + 1).into_bytes());
    }
    kept
}

/// Passwords do not belong into a log.
fn redact(words: &mut [Vec<u8>]) {
    let is = |word: &Vec<u8>, text: &str| word.eq_ignore_ascii_case(text.as_bytes());
    let secret = match words {
        [name, secret @ ..] if is(name, "auth") => secret,
        [name, options @ ..] if is(name, "hello") => match options.iter().position(|word| is(word, "auth")) {
            // The user's name and the password.
            Some(auth) => {
                let end = options.len().min(auth + 3);
                &mut options[auth + 1..end]
            }
            None => return,
        },
        [name, set, pairs @ ..] if is(name, "config") && is(set, "set") => {
            for pair in pairs.chunks_exact_mut(2).filter(|pair| is(&pair[0], "requirepass")) {
                pair[1] = b"(redacted)".to_vec();
            }
            return;
        }
        _ => return,
    };
    secret.iter_mut().for_each(|word| *word = b"(redacted)".to_vec());
}

fn cut_word(word: &[u8]) -> Vec<u8> {
    let mut kept = word[..word.len().min(WORD_BYTES_MAX)].to_vec();
    if word.len() > WORD_BYTES_MAX {
        kept.extend_from_slice(format!("... ({} more bytes)", word.len() - WORD_BYTES_MAX).as_bytes());
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Config;

    #[test]
    fn command_lines_are_cut_as_redis_cuts_them() {
        let line = |count: usize| cut(std::iter::repeat_n(b"a".as_slice(), count));
        assert_eq!(line(32), vec![b"a".to_vec(); 32]);
        let longer = line(40);
        assert_eq!((longer.len(), longer[31].as_slice()), (32, b"... (9 more arguments)".as_slice()));
        assert_eq!(cut_word(&[b'x'; 128]).len(), 128);
        assert!(cut_word(&[b'x'; 200]).ends_with(b"xx... (72 more bytes)"));
    }

    #[test]
    fn passwords_are_not_kept() {
        for (line, kept) in [
            ("AUTH secret", "AUTH (redacted)"),
            ("auth me secret", "auth (redacted) (redacted)"),
            ("hello 3 AUTH me secret SETNAME x", "hello 3 AUTH (redacted) (redacted) SETNAME x"),
            ("hello 3 auth", "hello 3 auth"),
            ("hello 3 auth me", "hello 3 auth (redacted)"),
            ("config set hz 1 REQUIREPASS secret", "config set hz 1 REQUIREPASS (redacted)"),
            ("config get requirepass", "config get requirepass"),
            ("get auth", "get auth"),
        ] {
            let mut words: Vec<Vec<u8>> = line.split(' ').map(|word| word.as_bytes().to_vec()).collect();
            redact(&mut words);
            assert_eq!(String::from_utf8_lossy(&words.join(b" ".as_slice())), kept);
        }
    }

    #[test]
    fn only_slow_commands_are_kept_and_not_too_many() {
        let settings = Settings::new(&Config::default());
        settings.set(&[("slowlog-max-len", "2"), ("slowlog-log-slower-than", "100")]).expect("valid");
        let (slowlog, client) = (Slowlog::new(), ClientRecord::new(1, "127.0.0.1:5".into(), String::new(), false));
        for duration_us in [99, 100, 101, 102] {
            slowlog.observe(&settings, duration_us, || [b"get".as_slice(), b"k"], &client);
        }
        let kept: Vec<(u64, u64)> = slowlog.latest(None).iter().map(|entry| (entry.id, entry.duration_us)).collect();
        assert_eq!(kept, [(2, 102), (1, 101)]);
        assert_eq!(slowlog.latest(Some(1)).len(), 1);
        settings.set(&[("slowlog-log-slower-than", "-1")]).expect("valid");
        slowlog.reset();
        slowlog.observe(&settings, u64::MAX, || [b"get".as_slice()], &client);
        assert!(slowlog.is_empty());
    }
}
