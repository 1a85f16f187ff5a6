//! The client connections of this gateway, as CLIENT LIST, CLIENT KILL and CLIENT PAUSE see them from any worker.

use dashmap::DashMap;
use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use vasto_proto::command::table::Command;

use crate::statistics;

/// Milliseconds since 1970.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).expect("the year is before 584,000,000")
}

/// What CLIENT SETNAME and CLIENT SETINFO said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientNames {
    pub name: Vec<u8>,
    pub library_name: Vec<u8>,
    pub library_version: Vec<u8>,
}

/// One connection, shared between its worker and those who list or kill it.
#[derive(Debug)]
pub struct ClientRecord {
    pub id: u64,
    /// As CLIENT LIST shows it: `ip:port`, or `path:0` on a Unix socket.
    pub peer_address: String,
    pub local_address: String,
    pub is_unix: bool,
    pub created_at_ms: u64,
    names: Mutex<ClientNames>,
    /// 0 = none yet, else 1 + the row's index.
    last_command: AtomicU32,
    last_interaction_ms: AtomicU64,
    /// The name.
    keyspace: Mutex<String>,
    protocol_version: AtomicU8,
    /// Commands queued by MULTI; -1 = no transaction.
    queued_commands: AtomicI32,
    pub no_evict: AtomicBool,
    pub no_touch: AtomicBool,
    query_bytes: AtomicUsize,
    output_bytes: AtomicUsize,
    is_blocked: AtomicBool,
    reads_from_replicas: AtomicBool,
    is_killed: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl ClientRecord {
    pub fn new(id: u64, peer_address: String, local_address: String, is_unix: bool) -> Self {
        let now_ms = unix_ms();
        Self {
            id,
            peer_address,
            local_address,
            is_unix,
            created_at_ms: now_ms,
            names: Mutex::default(),
            last_command: AtomicU32::new(0),
            last_interaction_ms: AtomicU64::new(now_ms),
            keyspace: Mutex::new("0".to_owned()),
            protocol_version: AtomicU8::new(2),
            queued_commands: AtomicI32::new(-1),
            no_evict: AtomicBool::new(false),
            no_touch: AtomicBool::new(false),
            query_bytes: AtomicUsize::new(0),
            output_bytes: AtomicUsize::new(0),
            is_blocked: AtomicBool::new(false),
            reads_from_replicas: AtomicBool::new(false),
            is_killed: AtomicBool::new(false),
            waker: Mutex::default(),
        }
    }

    pub fn names(&self) -> ClientNames {
        self.names.lock().clone()
    }

    pub fn change_names(&self, change: impl FnOnce(&mut ClientNames)) {
        change(&mut self.names.lock());
    }

    /// The command that runs now or ran last.
    pub fn set_last_command(&self, command: Command) {
        self.last_command.store(1 + statistics::row(command) as u32, Ordering::Relaxed);
    }

    /// Name of the command that runs now or ran last, `container|sub` for a subcommand.
    pub fn last_command_name(&self) -> &'static str {
        match self.last_command.load(Ordering::Relaxed) {
            0 => "NULL",
            place => statistics::spec_of_row(place as usize - 1).name,
        }
    }

    /// The client sent or received something.
    pub fn touch(&self, now_ms: u64) {
        self.last_interaction_ms.store(now_ms, Ordering::Relaxed);
    }

    pub fn last_interaction_ms(&self) -> u64 {
        self.last_interaction_ms.load(Ordering::Relaxed)
    }

    pub fn set_keyspace(&self, name: &str) {
        name.clone_into(&mut self.keyspace.lock());
    }

    /// A number for what Redis knows as a database.
    pub fn keyspace(&self) -> String {
        self.keyspace.lock().clone()
    }

    /// 2 or 3.
    pub fn set_protocol_version(&self, version: u8) {
        self.protocol_version.store(version, Ordering::Relaxed);
    }

    pub fn protocol_version(&self) -> u8 {
        self.protocol_version.load(Ordering::Relaxed)
    }

    /// `None` = no transaction.
    pub fn set_queued_commands(&self, count: Option<usize>) {
        let count = count.map_or(-1, |count| i32::try_from(count).unwrap_or(i32::MAX));
        self.queued_commands.store(count, Ordering::Relaxed);
    }

    /// -1 = no transaction.
    pub fn queued_commands(&self) -> i32 {
        self.queued_commands.load(Ordering::Relaxed)
    }

    /// Bytes read that are no whole command yet.
    pub fn set_query_bytes(&self, bytes: usize) {
        self.query_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Bytes of replies that the client has not taken yet.
    pub fn set_output_bytes(&self, bytes: usize) {
        self.output_bytes.store(bytes, Ordering::Relaxed);
    }

    pub fn query_bytes(&self) -> usize {
        self.query_bytes.load(Ordering::Relaxed)
    }

    pub fn output_bytes(&self) -> usize {
        self.output_bytes.load(Ordering::Relaxed)
    }

    /// A command that waits (WAIT) holds it up.
    pub fn set_blocked(&self, is_blocked: bool) {
        self.is_blocked.store(is_blocked, Ordering::Relaxed);
    }

    pub fn is_blocked(&self) -> bool {
        self.is_blocked.load(Ordering::Relaxed)
    }

    /// READONLY.
    pub fn set_reads_from_replicas(&self, reads_from_replicas: bool) {
        self.reads_from_replicas.store(reads_from_replicas, Ordering::Relaxed);
    }

    /// Asks the connection to close; its own worker does it.
    pub fn kill(&self) {
        self.is_killed.store(true, Ordering::Release);
        self.wake();
    }

    pub fn is_killed(&self) -> bool {
        self.is_killed.load(Ordering::Acquire)
    }

    /// Whom [`ClientRecord::kill`] and [`ClientRecord::wake`] wake. The connection looks at [`ClientRecord::is_killed`] after it has
    /// registered, so that no kill falls in between.
    pub fn register_waker(&self, waker: &Waker) {
        let mut slot = self.waker.lock();
        if !slot.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *slot = Some(waker.clone());
        }
    }

    pub fn wake(&self) {
        let waker = self.waker.lock().clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn flags(&self) -> String {
        let mut flags = String::new();
        for (is_set, letter) in [
            (self.queued_commands() >= 0, 'x'),
            (self.is_blocked(), 'b'),
            (self.is_killed(), 'A'),
            (self.is_unix, 'U'),
            (self.reads_from_replicas.load(Ordering::Relaxed), 'r'),
            (self.no_evict.load(Ordering::Relaxed), 'e'),
            (self.no_touch.load(Ordering::Relaxed), 'T'),
        ] {
            if is_set {
                flags.push(letter);
            }
        }
        if flags.is_empty() {
            flags.push('N');
        }
        flags
    }

    /// One line of CLIENT LIST, without its end. The fields are those of Redis; what has no meaning here is 0, and the descriptor -1.
    pub fn line(&self, now_ms: u64) -> String {
        let seconds = |since_ms: u64| now_ms.saturating_sub(since_ms) / 1000;
        let names = self.names();
        let (query_bytes, output_bytes) = (self.query_bytes(), self.output_bytes());
        format!(
            "id={} addr={} laddr={} fd=-1 name={} age={} idle={} flags={} db={} sub=0 psub=0 ssub=0 multi={} qbuf={query_bytes} qbuf-free=0 \
             argv-mem=0 multi-mem=0 rbs=0 rbp=0 obl={output_bytes} oll=0 omem=0 tot-mem={} events=r cmd={} user=default redir=-1 resp={} \
             lib-name={} lib-ver={}",
            self.id,
            self.peer_address,
            self.local_address,
            Text(&names.name),
            seconds(self.created_at_ms),
            seconds(self.last_interaction_ms()),
            self.flags(),
            self.keyspace(),
            self.queued_commands(),
            query_bytes + output_bytes,
            self.last_command_name(),
            self.protocol_version(),
            Text(&names.library_name),
            Text(&names.library_version),
        )
    }
}

/// Names hold printable ASCII only.
struct Text<'a>(&'a [u8]);

impl fmt::Display for Text<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&String::from_utf8_lossy(self.0))
    }
}

/// Which commands CLIENT PAUSE holds up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PauseMode {
    /// Commands that write.
    Write,
    /// All commands.
    All,
}

/// A pause that is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    pub until: Instant,
    pub mode: PauseMode,
}

/// All client connections of this gateway.
#[derive(Debug)]
pub struct Clients {
    records: DashMap<u64, Arc<ClientRecord>>,
    count: AtomicUsize,
    next_id: AtomicU64,
    started: Instant,
    /// 0 = no pause, else milliseconds since `started` when it ends, times two, plus one for [`PauseMode::All`].
    pause: AtomicU64,
}

impl Default for Clients {
    fn default() -> Self {
        Self::new()
    }
}

impl Clients {
    pub fn new() -> Self {
        Self {
            records: DashMap::new(),
            count: AtomicUsize::new(0),
            next_id: AtomicU64::new(1),
            started: Instant::now(),
            pause: AtomicU64::new(0),
        }
    }

    /// Notes a new connection and gives it its id.
    pub fn register(&self, peer_address: String, local_address: String, is_unix: bool) -> Arc<ClientRecord> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let record = Arc::new(ClientRecord::new(id, peer_address, local_address, is_unix));
        self.records.insert(id, Arc::clone(&record));
        self.count.fetch_add(1, Ordering::Relaxed);
        record
    }

    /// Forgets a connection that has closed.
    pub fn remove(&self, id: u64) {
        if self.records.remove(&id).is_some() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Connections now.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    pub fn get(&self, id: u64) -> Option<Arc<ClientRecord>> {
        self.records.get(&id).map(|record| Arc::clone(&record))
    }

    /// All connections in the order of their ids.
    pub fn all(&self) -> Vec<Arc<ClientRecord>> {
        let mut all: Vec<_> = self.records.iter().map(|record| Arc::clone(&record)).collect();
        all.sort_unstable_by_key(|record| record.id);
        all
    }

    /// Starts a pause, or lengthens and widens the one that is on: a pause never shrinks but by [`Clients::unpause`].
    pub fn pause(&self, duration: Duration, mode: PauseMode) {
        let now = Instant::now();
        let asked_ms = (now.duration_since(self.started).saturating_add(duration)).as_millis();
        // The top bit is lost to the mode; what is above is for ever.
        let asked_ms = u64::try_from(asked_ms).unwrap_or(u64::MAX).min(u64::MAX >> 2);
        let (mut until_ms, mut mode) = (asked_ms, mode);
        if let Some(running) = self.pause_state() {
            until_ms = until_ms.max(self.pause.load(Ordering::Acquire) >> 1);
            mode = mode.max(running.mode);
        }
        self.pause.store((until_ms << 1) | u64::from(mode == PauseMode::All), Ordering::Release);
    }

    pub fn unpause(&self) {
        self.pause.store(0, Ordering::Release);
    }

    /// The pause that is on; one atomic read when there is none.
    pub fn pause_state(&self) -> Option<Pause> {
        let packed = self.pause.load(Ordering::Acquire);
        if packed == 0 {
            return None;
        }
        // A pause too long for the clock is one of a hundred years.
        const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
        let until = self.started + Duration::from_millis(packed >> 1).min(CENTURY);
        if until <= Instant::now() {
            // Only the pause that has ended is cleared, not one that began meanwhile.
            let _ = self.pause.compare_exchange(packed, 0, Ordering::AcqRel, Ordering::Relaxed);
            return None;
        }
        let mode = if packed & 1 == 1 { PauseMode::All } else { PauseMode::Write };
        Some(Pause { until, mode })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_grows_and_never_shrinks_until_unpaused() {
        let clients = Clients::new();
        assert_eq!(clients.pause_state(), None);
        clients.pause(Duration::from_secs(100), PauseMode::All);
        let first = clients.pause_state().expect("paused");
        clients.pause(Duration::from_secs(10), PauseMode::Write);
        assert_eq!(clients.pause_state(), Some(first));
        clients.pause(Duration::from_secs(200), PauseMode::Write);
        let longer = clients.pause_state().expect("paused");
        assert!(longer.until > first.until && longer.mode == PauseMode::All);
        clients.pause(Duration::from_millis(u64::MAX), PauseMode::Write);
        assert!(clients.pause_state().is_some());
        clients.unpause();
        assert_eq!(clients.pause_state(), None);
        clients.pause(Duration::ZERO, PauseMode::All);
        assert_eq!(clients.pause_state(), None);
    }

    #[test]
    fn ids_grow_and_a_removed_client_is_gone() {
        let clients = Clients::new();
        let first = clients.register("127.0.0.1:1".into(), "127.0.0.1:6379".into(), false);
        let second = clients.register("/tmp/s:0".into(), "/tmp/s:0".into(), true);
        assert!(first.id < second.id && clients.count() == 2);
        clients.remove(first.id);
        clients.remove(first.id);
        assert_eq!((clients.count(), clients.all().len()), (1, 1));
        assert!(second.line(unix_ms()).contains(" flags=U "));
        second.set_reads_from_replicas(true);
        assert!(second.line(unix_ms()).contains(" flags=Ur "));
        second.kill();
        assert!(second.is_killed());
    }
}
