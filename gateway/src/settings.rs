//! The gateway's settings: those it starts with, those that CONFIG SET changes, and those it only keeps because clients set them.

use crate::command::pattern;
use parking_lot::RwLock;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use vasto_proto::error::{self, CommandError};
use vasto_proto::topology::{Fsync, Settings as KeyspaceSettings};

/// What a gateway starts with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses of the RESP listeners; port 0 takes a free one.
    pub listen: Vec<SocketAddr>,
    /// Path of a Unix socket to listen on as well.
    pub unixsocket: Option<PathBuf>,
    /// Worker threads; 0 = one per core.
    pub workers: usize,
    /// Most client connections at one time.
    pub maxclients: usize,
    /// A connection idle for longer is closed; 0 = never.
    pub timeout_seconds: u64,
    /// TCP keep-alive of client connections; 0 = off.
    pub tcp_keepalive_seconds: u64,
    /// Longest argument.
    pub proto_max_bulk_len: usize,
    /// Most bytes of one client's commands that wait in the gateway.
    pub client_query_buffer_limit: usize,
    /// A connection with more unsent replies than this is not read any further.
    pub output_buffer_limit: usize,
    /// A client that takes nothing of its replies for this long is disconnected.
    pub output_stall_timeout: Duration,
    /// SELECT takes numbers below this.
    pub databases: u32,
    /// A command that no store has answered after this time fails.
    pub request_deadline: Duration,
    /// Addresses of the masters, host:port, for the commands that change keyspaces.
    pub masters: Vec<String>,
    /// Where the data of this process lies, for CONFIG GET dir; `None` in a gateway of its own.
    pub data_directory: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 6379))],
            unixsocket: None,
            workers: 0,
            maxclients: 10_000,
            timeout_seconds: 0,
            tcp_keepalive_seconds: 300,
            proto_max_bulk_len: 512 << 20,
            client_query_buffer_limit: 1 << 30,
            // Some thousand small replies: enough to keep a pipelining client busy.
            output_buffer_limit: 1 << 20,
            output_stall_timeout: Duration::from_secs(30),
            databases: 16,
            request_deadline: Duration::from_secs(5),
            masters: Vec::new(),
            data_directory: None,
        }
    }
}

/// How the text of a setting is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Bool,
    Integer {
        min: i64,
        max: i64,
    },
    /// An integer that is taken into a range instead of refused.
    Clamped {
        min: i64,
        max: i64,
    },
    /// Bytes, with the units k, kb, m, mb, g, gb.
    Memory {
        min: u64,
        max: u64,
    },
    /// Bytes, or a percentage.
    MemoryOrPercent,
    Choice(&'static [&'static str]),
    Text,
    /// Classes of keyspace events.
    Events,
    /// Numbers between 0 and 100.
    Percentiles,
    /// A hard limit, a soft limit and its seconds for each class of clients.
    BufferLimits,
}

/// What CONFIG SET of a setting does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It acts at once.
    Live(Live),
    /// It is accepted and kept; nothing here depends on it.
    Kept,
    /// It lies in the record of the connection's keyspace and is changed through the master, for all gateways.
    OfKeyspace(OfKeyspace),
    /// It says what is so and can be set to nothing else; the text says why.
    Stated(&'static str),
    /// As Redis, which cannot change it while it runs.
    Fixed,
}

/// The settings that act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Live {
    MaxClients,
    Timeout,
    TcpKeepalive,
    ProtoMaxBulkLen,
    ClientQueryBufferLimit,
    OutputBufferLimit,
    OutputStallTimeout,
    RequestDeadline,
    SlowlogLogSlowerThan,
    SlowlogMaxLen,
    LatencyTracking,
    LatencyPercentiles,
}

/// The settings of a keyspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OfKeyspace {
    Fsync,
    MinReplicas,
}

/// What the settings of a keyspace are, for CONFIG GET.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OfKeyspaceShown {
    pub fsync: Fsync,
    pub min_replicas: u32,
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub name: &'static str,
    /// The older name that Redis still knows, or empty.
    pub alias: &'static str,
    pub default: &'static str,
    pub kind: Kind,
    pub effect: Effect,
}

const INT_MAX: i64 = i32::MAX as i64;
const COUNT: Kind = Kind::Integer { min: 0, max: INT_MAX };
const LONG_COUNT: Kind = Kind::Integer { min: 0, max: i64::MAX };
const LONG_MAX: u64 = i64::MAX as u64;
const BYTES: Kind = Kind::Memory { min: 0, max: LONG_MAX };
const SUPERVISED: Kind = Kind::Choice(&["upstart", "systemd", "auto", "no"]);
const POLICIES: Kind = Kind::Choice(&[
    "volatile-lru",
    "volatile-lfu",
    "volatile-random",
    "volatile-ttl",
    "allkeys-lru",
    "allkeys-lfu",
    "allkeys-random",
    "noeviction",
]);

const fn row(name: &'static str, default: &'static str, kind: Kind, effect: Effect) -> Setting {
    Setting { name, alias: "", default, kind, effect }
}

const fn aliased(
    name: &'static str,
    alias: &'static str,
    default: &'static str,
    kind: Kind,
    effect: Effect,
) -> Setting {
    Setting { name, alias, default, kind, effect }
}

const NO_PASSWORDS: Effect = Effect::Stated("passwords are not supported; keep the port away from strangers");
const ALWAYS_LOGGED: Effect = Effect::Stated("every write is logged; the log cannot be switched off");

/// Every setting that CONFIG GET knows, in the order of names.
pub const SETTINGS: &[Setting] = &[
    row("acllog-max-len", "128", LONG_COUNT, Effect::Kept),
    row("active-defrag-cycle-max", "25", Kind::Integer { min: 1, max: 99 }, Effect::Kept),
    row("active-defrag-cycle-min", "1", Kind::Integer { min: 1, max: 99 }, Effect::Kept),
    row("active-defrag-ignore-bytes", "104857600", Kind::Memory { min: 1, max: LONG_MAX }, Effect::Kept),
    row("active-defrag-max-scan-fields", "1000", Kind::Integer { min: 1, max: i64::MAX }, Effect::Kept),
    row("active-defrag-threshold-lower", "10", Kind::Integer { min: 0, max: 1000 }, Effect::Kept),
    row("active-defrag-threshold-upper", "100", Kind::Integer { min: 0, max: 1000 }, Effect::Kept),
    row("active-expire-effort", "1", Kind::Integer { min: 1, max: 10 }, Effect::Kept),
    row("activedefrag", "no", Kind::Bool, Effect::Kept),
    row("activerehashing", "yes", Kind::Bool, Effect::Kept),
    row("aof-use-rdb-preamble", "yes", Kind::Bool, Effect::Kept),
    row("appendfsync", "everysec", Kind::Choice(&["everysec", "always", "no"]), Effect::OfKeyspace(OfKeyspace::Fsync)),
    row("appendonly", "yes", Kind::Bool, ALWAYS_LOGGED),
    row("auto-aof-rewrite-min-size", "67108864", BYTES, Effect::Kept),
    row("auto-aof-rewrite-percentage", "100", COUNT, Effect::Kept),
    row("bind", "", Kind::Text, Effect::Fixed),
    aliased("busy-reply-threshold", "lua-time-limit", "5000", LONG_COUNT, Effect::Kept),
    row(
        "client-output-buffer-limit",
        "normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60",
        Kind::BufferLimits,
        Effect::Kept,
    ),
    row(
        "client-query-buffer-limit",
        "1073741824",
        Kind::Memory { min: 1 << 20, max: LONG_MAX },
        Effect::Live(Live::ClientQueryBufferLimit),
    ),
    row("cluster-enabled", "no", Kind::Bool, Effect::Fixed),
    row("crash-log-enabled", "yes", Kind::Bool, Effect::Kept),
    row("crash-memcheck-enabled", "yes", Kind::Bool, Effect::Kept),
    row("daemonize", "no", Kind::Bool, Effect::Fixed),
    row("databases", "16", COUNT, Effect::Fixed),
    row("dbfilename", "", Kind::Text, Effect::Fixed),
    row("dir", "", Kind::Text, Effect::Fixed),
    row("dynamic-hz", "yes", Kind::Bool, Effect::Kept),
    aliased("hash-max-listpack-entries", "hash-max-ziplist-entries", "512", LONG_COUNT, Effect::Kept),
    aliased("hash-max-listpack-value", "hash-max-ziplist-value", "64", BYTES, Effect::Kept),
    row("hll-sparse-max-bytes", "3000", BYTES, Effect::Kept),
    row("hz", "10", Kind::Clamped { min: 1, max: 500 }, Effect::Kept),
    row("io-threads", "1", Kind::Integer { min: 1, max: 128 }, Effect::Fixed),
    row("io-threads-do-reads", "no", Kind::Bool, Effect::Fixed),
    row("jemalloc-bg-thread", "yes", Kind::Bool, Effect::Kept),
    row("latency-monitor-threshold", "0", LONG_COUNT, Effect::Kept),
    row("latency-tracking", "yes", Kind::Bool, Effect::Live(Live::LatencyTracking)),
    row("latency-tracking-info-percentiles", "50 99 99.9", Kind::Percentiles, Effect::Live(Live::LatencyPercentiles)),
    row("lazyfree-lazy-eviction", "no", Kind::Bool, Effect::Kept),
    row("lazyfree-lazy-expire", "no", Kind::Bool, Effect::Kept),
    row("lazyfree-lazy-server-del", "no", Kind::Bool, Effect::Kept),
    row("lazyfree-lazy-user-del", "no", Kind::Bool, Effect::Kept),
    row("lazyfree-lazy-user-flush", "no", Kind::Bool, Effect::Kept),
    row("lfu-decay-time", "1", COUNT, Effect::Kept),
    row("lfu-log-factor", "10", COUNT, Effect::Kept),
    row("list-compress-depth", "0", COUNT, Effect::Kept),
    aliased(
        "list-max-listpack-size",
        "list-max-ziplist-size",
        "-2",
        Kind::Integer { min: i32::MIN as i64, max: INT_MAX },
        Effect::Kept,
    ),
    row("logfile", "", Kind::Text, Effect::Fixed),
    row("loglevel", "notice", Kind::Choice(&["debug", "verbose", "notice", "warning"]), Effect::Kept),
    row("maxclients", "10000", Kind::Integer { min: 1, max: u32::MAX as i64 }, Effect::Live(Live::MaxClients)),
    row("maxmemory", "0", Kind::Memory { min: 0, max: u64::MAX }, Effect::Kept),
    row("maxmemory-clients", "0", Kind::MemoryOrPercent, Effect::Kept),
    row("maxmemory-eviction-tenacity", "10", Kind::Integer { min: 0, max: 100 }, Effect::Kept),
    row("maxmemory-policy", "noeviction", POLICIES, Effect::Kept),
    row("maxmemory-samples", "5", Kind::Integer { min: 1, max: INT_MAX }, Effect::Kept),
    aliased("min-replicas-max-lag", "min-slaves-max-lag", "10", COUNT, Effect::Kept),
    aliased("min-replicas-to-write", "min-slaves-to-write", "0", COUNT, Effect::OfKeyspace(OfKeyspace::MinReplicas)),
    row("no-appendfsync-on-rewrite", "no", Kind::Bool, Effect::Kept),
    row("notify-keyspace-events", "", Kind::Events, Effect::Kept),
    row("oom-score-adj", "no", Kind::Choice(&["no", "yes", "relative", "absolute"]), Effect::Kept),
    row(
        "output-buffer-limit",
        "1048576",
        Kind::Memory { min: 16 << 10, max: LONG_MAX },
        Effect::Live(Live::OutputBufferLimit),
    ),
    row("output-stall-timeout", "30", Kind::Integer { min: 1, max: INT_MAX }, Effect::Live(Live::OutputStallTimeout)),
    row("port", "6379", Kind::Integer { min: 0, max: 65535 }, Effect::Fixed),
    row("protected-mode", "no", Kind::Bool, Effect::Kept),
    row(
        "proto-max-bulk-len",
        "536870912",
        Kind::Memory { min: 1 << 20, max: LONG_MAX },
        Effect::Live(Live::ProtoMaxBulkLen),
    ),
    row("rdb-save-incremental-fsync", "yes", Kind::Bool, Effect::Kept),
    row("rdbchecksum", "yes", Kind::Bool, Effect::Fixed),
    row("rdbcompression", "yes", Kind::Bool, Effect::Kept),
    row("repl-backlog-size", "1048576", Kind::Memory { min: 1, max: LONG_MAX }, Effect::Kept),
    row("repl-backlog-ttl", "3600", LONG_COUNT, Effect::Kept),
    row("repl-disable-tcp-nodelay", "no", Kind::Bool, Effect::Kept),
    row("repl-diskless-sync", "yes", Kind::Bool, Effect::Kept),
    row("repl-diskless-sync-delay", "5", COUNT, Effect::Kept),
    aliased(
        "repl-ping-replica-period",
        "repl-ping-slave-period",
        "10",
        Kind::Integer { min: 1, max: INT_MAX },
        Effect::Kept,
    ),
    row("repl-timeout", "60", Kind::Integer { min: 1, max: INT_MAX }, Effect::Kept),
    aliased("replica-priority", "slave-priority", "100", COUNT, Effect::Kept),
    aliased("replica-read-only", "slave-read-only", "yes", Kind::Bool, Effect::Kept),
    aliased("replica-serve-stale-data", "slave-serve-stale-data", "yes", Kind::Bool, Effect::Kept),
    aliased("replicaof", "slaveof", "", Kind::Text, Effect::Fixed),
    row("request-deadline-ms", "5000", Kind::Integer { min: 1, max: INT_MAX }, Effect::Live(Live::RequestDeadline)),
    row("requirepass", "", Kind::Text, NO_PASSWORDS),
    row("sanitize-dump-payload", "no", Kind::Choice(&["no", "yes", "clients"]), Effect::Kept),
    row("save", "", Kind::Text, Effect::Stated("every write is logged; there are no save points")),
    row("set-max-intset-entries", "512", LONG_COUNT, Effect::Kept),
    row("set-proc-title", "no", Kind::Bool, Effect::Fixed),
    row(
        "slowlog-log-slower-than",
        "10000",
        Kind::Integer { min: -1, max: i64::MAX },
        Effect::Live(Live::SlowlogLogSlowerThan),
    ),
    row("slowlog-max-len", "128", LONG_COUNT, Effect::Live(Live::SlowlogMaxLen)),
    row("stop-writes-on-bgsave-error", "yes", Kind::Bool, Effect::Kept),
    row("stream-node-max-bytes", "4096", BYTES, Effect::Kept),
    row("stream-node-max-entries", "100", LONG_COUNT, Effect::Kept),
    row("supervised", "no", SUPERVISED, Effect::Fixed),
    row("tcp-backlog", "511", COUNT, Effect::Fixed),
    row("tcp-keepalive", "300", COUNT, Effect::Live(Live::TcpKeepalive)),
    row("timeout", "0", COUNT, Effect::Live(Live::Timeout)),
    row("tls-port", "0", Kind::Integer { min: 0, max: 0 }, Effect::Stated("TLS is not supported")),
    row("tracking-table-max-keys", "1000000", LONG_COUNT, Effect::Kept),
    row("unixsocket", "", Kind::Text, Effect::Fixed),
    row("unixsocketperm", "0", COUNT, Effect::Fixed),
    aliased("zset-max-listpack-entries", "zset-max-ziplist-entries", "128", LONG_COUNT, Effect::Kept),
    aliased("zset-max-listpack-value", "zset-max-ziplist-value", "64", BYTES, Effect::Kept),
];

/// Place in [`SETTINGS`].
fn find(name: &[u8]) -> Option<usize> {
    SETTINGS.iter().position(|setting| {
        name.eq_ignore_ascii_case(setting.name.as_bytes())
            || (!setting.alias.is_empty() && name.eq_ignore_ascii_case(setting.alias.as_bytes()))
    })
}

/// What a CONFIG SET changes: values that were checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Places in [`SETTINGS`] and their new texts.
    here: Vec<(usize, String)>,
    pub of_keyspace: KeyspaceSettings,
}

/// The live settings: texts for CONFIG GET, numbers for the hot path.
#[derive(Debug)]
pub struct Settings {
    /// By place in [`SETTINGS`].
    texts: RwLock<Vec<String>>,
    maxclients: AtomicUsize,
    timeout_seconds: AtomicU64,
    tcp_keepalive_seconds: AtomicU64,
    proto_max_bulk_len: AtomicUsize,
    client_query_buffer_limit: AtomicUsize,
    output_buffer_limit: AtomicUsize,
    output_stall_timeout_seconds: AtomicU64,
    request_deadline_ms: AtomicU64,
    slowlog_log_slower_than_us: AtomicI64,
    slowlog_max_len: AtomicUsize,
    latency_tracking: AtomicUsize,
}

impl Settings {
    pub fn new(config: &Config) -> Self {
        let mut texts: Vec<String> = SETTINGS.iter().map(|setting| setting.default.to_owned()).collect();
        let addresses: Vec<String> = config.listen.iter().map(|address| address.ip().to_string()).collect();
        let unixsocket = config.unixsocket.as_ref().map(|path| path.display().to_string());
        for (name, text) in [
            ("bind", addresses.join(" ")),
            ("port", config.listen.first().map_or(0, SocketAddr::port).to_string()),
            ("unixsocket", unixsocket.unwrap_or_default()),
            ("dir", config.data_directory.clone().unwrap_or_default()),
            ("maxclients", config.maxclients.to_string()),
            ("timeout", config.timeout_seconds.to_string()),
            ("tcp-keepalive", config.tcp_keepalive_seconds.to_string()),
            ("proto-max-bulk-len", config.proto_max_bulk_len.to_string()),
            ("client-query-buffer-limit", config.client_query_buffer_limit.to_string()),
            ("output-buffer-limit", config.output_buffer_limit.to_string()),
            ("output-stall-timeout", config.output_stall_timeout.as_secs().to_string()),
            ("databases", config.databases.to_string()),
            ("request-deadline-ms", config.request_deadline.as_millis().to_string()),
        ] {
            texts[find(name.as_bytes()).expect("the names above stand in the table")] = text;
        }
        let settings = Self {
            texts: RwLock::new(Vec::new()),
            maxclients: AtomicUsize::new(0),
            timeout_seconds: AtomicU64::new(0),
            tcp_keepalive_seconds: AtomicU64::new(0),
            proto_max_bulk_len: AtomicUsize::new(0),
            client_query_buffer_limit: AtomicUsize::new(0),
            output_buffer_limit: AtomicUsize::new(0),
            output_stall_timeout_seconds: AtomicU64::new(0),
            request_deadline_ms: AtomicU64::new(0),
            slowlog_log_slower_than_us: AtomicI64::new(0),
            slowlog_max_len: AtomicUsize::new(0),
            latency_tracking: AtomicUsize::new(0),
        };
        for (setting, text) in SETTINGS.iter().zip(&texts) {
            settings.enact(setting, text);
        }
        *settings.texts.write() = texts;
        settings
    }

    /// Replaces the port that CONFIG GET names: the one that was bound is known only then.
    pub fn set_bound_port(&self, port: u16) {
        self.texts.write()[find(b"port").expect("a row")] = port.to_string();
    }

    pub fn maxclients(&self) -> usize {
        self.maxclients.load(Ordering::Relaxed)
    }

    /// `None` = idle connections stay.
    pub fn timeout(&self) -> Option<Duration> {
        Some(self.timeout_seconds.load(Ordering::Relaxed)).filter(|seconds| *seconds > 0).map(Duration::from_secs)
    }

    /// `None` = off.
    pub fn tcp_keepalive(&self) -> Option<Duration> {
        Some(self.tcp_keepalive_seconds.load(Ordering::Relaxed)).filter(|seconds| *seconds > 0).map(Duration::from_secs)
    }

    pub fn proto_max_bulk_len(&self) -> usize {
        self.proto_max_bulk_len.load(Ordering::Relaxed)
    }

    pub fn client_query_buffer_limit(&self) -> usize {
        self.client_query_buffer_limit.load(Ordering::Relaxed)
    }

    /// A connection with more unsent replies is not read any further.
    pub fn output_buffer_limit(&self) -> usize {
        self.output_buffer_limit.load(Ordering::Relaxed)
    }

    /// A client that takes nothing of its replies for this long is disconnected.
    pub fn output_stall_timeout(&self) -> Duration {
        Duration::from_secs(self.output_stall_timeout_seconds.load(Ordering::Relaxed))
    }

    pub fn request_deadline(&self) -> Duration {
        Duration::from_millis(self.request_deadline_ms.load(Ordering::Relaxed))
    }

    /// Negative = no command is slow.
    pub fn slowlog_log_slower_than_us(&self) -> i64 {
        self.slowlog_log_slower_than_us.load(Ordering::Relaxed)
    }

    pub fn slowlog_max_len(&self) -> usize {
        self.slowlog_max_len.load(Ordering::Relaxed)
    }

    pub fn latency_tracking(&self) -> bool {
        self.latency_tracking.load(Ordering::Relaxed) != 0
    }

    /// The percentiles that INFO latencystats shows.
    pub fn latency_percentiles(&self) -> Vec<f64> {
        self.text("latency-tracking-info-percentiles").split(' ').filter_map(|number| number.parse().ok()).collect()
    }

    /// The value of a setting of the table as CONFIG GET shows it.
    pub fn text(&self, name: &str) -> String {
        find(name.as_bytes()).map(|place| self.texts.read()[place].clone()).unwrap_or_default()
    }

    fn texts_with(&self, shown: OfKeyspaceShown) -> Vec<String> {
        let mut texts = self.texts.read().clone();
        for (setting, text) in SETTINGS.iter().zip(&mut texts) {
            match setting.effect {
                Effect::OfKeyspace(OfKeyspace::Fsync) => shown.fsync.word().clone_into(text),
                Effect::OfKeyspace(OfKeyspace::MinReplicas) => *text = shown.min_replicas.to_string(),
                Effect::Live(_) | Effect::Kept | Effect::Stated(_) | Effect::Fixed => {}
            }
        }
        texts
    }

    /// Names and values that CONFIG GET answers: a name as it was asked, or all names that match a pattern; each once. `shown` are
    /// those of the keyspace of whoever asks.
    pub fn get(
        &self,
        asked: impl IntoIterator<Item = impl AsRef<[u8]>>,
        shown: OfKeyspaceShown,
    ) -> Vec<(Vec<u8>, String)> {
        let texts = self.texts_with(shown);
        let mut found: Vec<(Vec<u8>, String)> = Vec::new();
        let mut add = |name: &[u8], text: &String| {
            if !found.iter().any(|(known, _)| known.eq_ignore_ascii_case(name)) {
                found.push((name.to_vec(), text.clone()));
            }
        };
        for asked in asked {
            let asked = asked.as_ref();
            if !asked.iter().any(|byte| matches!(byte, b'*' | b'?' | b'[')) {
                if let Some(place) = find(asked) {
                    add(asked, &texts[place]);
                }
                continue;
            }
            for (setting, text) in SETTINGS.iter().zip(texts.iter()) {
                for name in [setting.name, setting.alias] {
                    if !name.is_empty() && pattern::matches_in_any_case(asked, name.as_bytes()) {
                        add(name.as_bytes(), text);
                    }
                }
            }
        }
        found
    }

    /// Changes all of the settings or, when one is refused, none.
    pub fn set<N: AsRef<[u8]>, V: AsRef<[u8]>>(&self, pairs: &[(N, V)]) -> Result<(), CommandError> {
        self.make(self.check(pairs)?);
        Ok(())
    }

    /// What the pairs change, if all of them may be set.
    pub fn check<N: AsRef<[u8]>, V: AsRef<[u8]>>(&self, pairs: &[(N, V)]) -> Result<Changes, CommandError> {
        let mut chosen: Vec<(usize, &[u8], String)> = Vec::with_capacity(pairs.len());
        for (name, value) in pairs {
            let (name, value) = (name.as_ref(), value.as_ref());
            let place = find(name).ok_or_else(|| unknown(name))?;
            if SETTINGS[place].effect == Effect::Fixed {
                return Err(refused(name, "can't set immutable config"));
            }
            if chosen.iter().any(|(_, known, _)| known.eq_ignore_ascii_case(name)) {
                return Err(refused(name, "duplicate parameter"));
            }
            chosen.push((place, name, String::from_utf8_lossy(value).into_owned()));
        }
        let texts = self.texts.read();
        let mut changes = Changes::default();
        for (place, name, value) in chosen {
            let (setting, current) = (&SETTINGS[place], &texts[place]);
            let shown = name.to_ascii_lowercase();
            let text = read(setting.kind, &value, current).map_err(|reason| refused(&shown, &reason))?;
            if let Effect::Stated(reason) = setting.effect
                && text != *current
            {
                return Err(refused(&shown, reason));
            }
            match setting.effect {
                Effect::OfKeyspace(OfKeyspace::Fsync) => changes.of_keyspace.fsync = Fsync::from_word(text.as_bytes()),
                Effect::OfKeyspace(OfKeyspace::MinReplicas) => changes.of_keyspace.min_replicas = text.parse().ok(),
                Effect::Live(_) | Effect::Kept | Effect::Stated(_) | Effect::Fixed => changes.here.push((place, text)),
            }
        }
        Ok(changes)
    }

    /// Makes the changes of this gateway; those of the keyspace are the master's.
    pub fn make(&self, changes: Changes) {
        let mut texts = self.texts.write();
        for (place, text) in changes.here {
            self.enact(&SETTINGS[place], &text);
            texts[place] = text;
        }
    }

    /// Brings a valid text to where it acts.
    fn enact(&self, setting: &Setting, text: &str) {
        let Effect::Live(live) = setting.effect else {
            return;
        };
        let number = || text.parse::<i64>().unwrap_or(i64::MAX);
        let count = || usize::try_from(number()).unwrap_or(usize::MAX);
        let long = || u64::try_from(number()).unwrap_or(u64::MAX);
        match live {
            Live::MaxClients => self.maxclients.store(count(), Ordering::Relaxed),
            Live::Timeout => self.timeout_seconds.store(long(), Ordering::Relaxed),
            Live::TcpKeepalive => self.tcp_keepalive_seconds.store(long(), Ordering::Relaxed),
            Live::ProtoMaxBulkLen => self.proto_max_bulk_len.store(count(), Ordering::Relaxed),
            Live::ClientQueryBufferLimit => self.client_query_buffer_limit.store(count(), Ordering::Relaxed),
            Live::OutputBufferLimit => self.output_buffer_limit.store(count(), Ordering::Relaxed),
            Live::OutputStallTimeout => self.output_stall_timeout_seconds.store(long(), Ordering::Relaxed),
            Live::RequestDeadline => self.request_deadline_ms.store(long(), Ordering::Relaxed),
            Live::SlowlogLogSlowerThan => self.slowlog_log_slower_than_us.store(number(), Ordering::Relaxed),
            Live::SlowlogMaxLen => self.slowlog_max_len.store(count(), Ordering::Relaxed),
            Live::LatencyTracking => self.latency_tracking.store(usize::from(text == "yes"), Ordering::Relaxed),
            // Read only by INFO, from its text.
            Live::LatencyPercentiles => {}
        }
    }
}

fn unknown(name: &[u8]) -> CommandError {
    let name = error::printed(name);
    let text = format!("ERR Unknown option or number of arguments for CONFIG SET - '{name}'");
    error::single_line(&text).into_owned().into()
}

fn refused(name: &[u8], reason: &str) -> CommandError {
    let name = error::printed(name);
    let text = format!("ERR CONFIG SET failed (possibly related to argument '{name}') - {reason}");
    error::single_line(&text).into_owned().into()
}

/// The canonical text of a value, or why it is none.
fn read(kind: Kind, value: &str, current: &str) -> Result<String, String> {
    match kind {
        Kind::Text => Ok(value.to_owned()),
        Kind::Bool => match value.to_ascii_lowercase().as_str() {
            word @ ("yes" | "no") => Ok(word.to_owned()),
            _ => Err("argument must be 'yes' or 'no'".to_owned()),
        },
        Kind::Integer { min, max } => in_range(read_integer(value)?, min, max),
        Kind::Clamped { min, max } => {
            in_range(read_integer(value)?, 0, INT_MAX)?;
            Ok(read_integer(value)?.clamp(min, max).to_string())
        }
        Kind::Memory { min, max } => {
            let bytes = read_memory(value).ok_or("argument must be a memory value")?;
            if !(min..=max).contains(&bytes) {
                return Err(format!("argument must be between {min} and {max} inclusive"));
            }
            Ok(bytes.to_string())
        }
        Kind::MemoryOrPercent => {
            let (number, is_percent) = value.strip_suffix('%').map_or((value, false), |number| (number, true));
            let number = if is_percent { number.parse::<u64>().ok() } else { read_memory(number) };
            match number {
                None => Err("argument must be a memory or percent value".to_owned()),
                Some(percent) if is_percent && percent > 100 => {
                    Err("percentage argument must be less or equal to 100".to_owned())
                }
                Some(percent) if is_percent => Ok(format!("{percent}%")),
                Some(bytes) => Ok(bytes.to_string()),
            }
        }
        Kind::Choice(words) => match words.iter().find(|word| word.eq_ignore_ascii_case(value)) {
            Some(word) => Ok((*word).to_owned()),
            None => Err(format!("argument(s) must be one of the following: {}", words.join(", "))),
        },
        Kind::Events => read_events(value),
        Kind::Percentiles => read_percentiles(value),
        Kind::BufferLimits => read_buffer_limits(value, current),
    }
}

fn read_integer(value: &str) -> Result<i64, String> {
    vasto_proto::command::args::parse_integer(value.as_bytes())
        .ok_or_else(|| "argument couldn't be parsed into an integer".to_owned())
}

fn in_range(number: i64, min: i64, max: i64) -> Result<String, String> {
    if (min..=max).contains(&number) {
        Ok(number.to_string())
    } else {
        Err(format!("argument must be between {min} and {max} inclusive"))
    }
}

/// Reads bytes as Redis does: digits, then a unit in any case; `k` is a thousand, `kb` is 1024. Too much is the most there is.
pub fn read_memory(value: &str) -> Option<u64> {
    let digits = value.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = value.split_at(digits);
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" => 1000,
        "kb" => 1 << 10,
        "m" => 1_000_000,
        "mb" => 1 << 20,
        "g" => 1_000_000_000,
        "gb" => 1 << 30,
        _ => return None,
    };
    let number = if number.is_empty() { 0 } else { number.parse().unwrap_or(u64::MAX) };
    Some(number.saturating_mul(factor))
}

/// Classes of events in the order that CONFIG GET shows them; all together they are `A`.
const EVENT_CLASSES: &str = "g$lshzxetd";
/// Shown only without `A`, as Redis does.
const EVENT_NEW_KEY: char = 'n';
const EVENT_OPTIONS: &str = "KEm";

fn read_events(value: &str) -> Result<String, String> {
    if !value.chars().all(|letter| {
        letter == 'A' || letter == EVENT_NEW_KEY || EVENT_CLASSES.contains(letter) || EVENT_OPTIONS.contains(letter)
    }) {
        return Err("Invalid event class character. Use 'Ag$lshzxeKEtmdn'.".to_owned());
    }
    let mut text = String::new();
    if value.contains('A') || EVENT_CLASSES.chars().all(|class| value.contains(class)) {
        text.push('A');
    } else {
        text.extend(EVENT_CLASSES.chars().filter(|class| value.contains(*class)));
        text.extend(value.contains(EVENT_NEW_KEY).then_some(EVENT_NEW_KEY));
    }
    text.extend(EVENT_OPTIONS.chars().filter(|option| value.contains(*option)));
    Ok(text)
}

fn read_percentiles(value: &str) -> Result<String, String> {
    let mut text = String::new();
    for word in value.split_ascii_whitespace() {
        match word.parse::<f64>() {
            Ok(number) if (0.0..=100.0).contains(&number) => {
                if !text.is_empty() {
                    text.push(' ');
                }
                let _ = write!(text, "{number}");
            }
            Ok(_) => {
                return Err("latency-tracking-info-percentiles parameters should sit between [0.0,100.0]".to_owned());
            }
            Err(_) => return Err("Invalid latency-tracking-info-percentiles parameters".to_owned()),
        }
    }
    Ok(text)
}

fn read_buffer_limits(value: &str, current: &str) -> Result<String, String> {
    let words: Vec<&str> = value.split_ascii_whitespace().collect();
    if !words.len().is_multiple_of(4) {
        return Err("Wrong number of arguments in buffer limit configuration.".to_owned());
    }
    let mut rows: Vec<String> = current.split(' ').collect::<Vec<_>>().chunks(4).map(|row| row.join(" ")).collect();
    for limits in words.chunks(4) {
        let class = match limits[0].to_ascii_lowercase().as_str() {
            "normal" => "normal",
            "slave" | "replica" => "slave",
            "pubsub" => "pubsub",
            _ => return Err("Invalid client class specified in buffer limit configuration.".to_owned()),
        };
        let (hard, soft, seconds) = (read_memory(limits[1]), read_memory(limits[2]), limits[3].parse::<u32>());
        let (Some(hard), Some(soft), Ok(seconds)) = (hard, soft, seconds) else {
            return Err("Error in hard, soft or soft_seconds setting in buffer limit configuration.".to_owned());
        };
        let row = rows.iter_mut().find(|row| row.starts_with(class)).expect("each class has its row from the start");
        *row = format!("{class} {hard} {soft} {seconds}");
    }
    Ok(rows.join(" "))
}

/// The table of settings as Markdown, for the documentation.
pub fn document() -> String {
    let mut text = String::from("| setting | default | CONFIG SET |\n|---|---|---|\n");
    for setting in SETTINGS {
        let alias = if setting.alias.is_empty() { String::new() } else { format!(" (`{}`)", setting.alias) };
        let default = if setting.default.is_empty() { String::from("empty") } else { format!("`{}`", setting.default) };
        let effect = match setting.effect {
            Effect::Live(_) => "acts at once",
            Effect::Kept => "accepted and kept, without effect",
            Effect::Stated(reason) => reason,
            Effect::OfKeyspace(_) => "acts at once on the keyspace of the connection, wherever it is",
            Effect::Fixed => "fixed at start",
        };
        let _ = writeln!(text, "| `{}`{alias} | {default} | {effect} |", setting.name);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(settings: &Settings, line: &str) -> String {
        let words: Vec<&str> = line.split('|').collect();
        let pairs: Vec<(&str, &str)> = words.chunks(2).map(|pair| (pair[0], pair[1])).collect();
        settings.set(&pairs).map_or_else(|error| error.text().to_owned(), |()| "OK".to_owned())
    }

    #[test]
    fn defaults_are_canonical_and_names_unique_and_sorted() {
        let names: Vec<&str> = SETTINGS.iter().map(|setting| setting.name).collect();
        assert!(names.is_sorted());
        for setting in SETTINGS {
            assert_eq!(
                read(setting.kind, setting.default, setting.default).as_deref(),
                Ok(setting.default),
                "{}",
                setting.name
            );
        }
        for (place, setting) in SETTINGS.iter().enumerate() {
            assert_eq!(find(setting.name.as_bytes()), Some(place));
            assert!(setting.alias.is_empty() || find(setting.alias.as_bytes()) == Some(place));
        }
    }

    /// As redis-server 7.0.15 answers.
    #[test]
    fn values_are_checked_as_redis_checks_them() {
        let settings = Settings::new(&Config::default());
        let failed = |name: &str, reason: &str| {
            format!("ERR CONFIG SET failed (possibly related to argument '{name}') - {reason}")
        };
        for (line, answer) in [
            ("hz|20", "OK".to_owned()),
            ("foo|bar", "ERR Unknown option or number of arguments for CONFIG SET - 'foo'".to_owned()),
            ("hz|abc", failed("hz", "argument couldn't be parsed into an integer")),
            ("HZ|abc", failed("hz", "argument couldn't be parsed into an integer")),
            ("hz|10|HZ|11", failed("HZ", "duplicate parameter")),
            ("timeout|-1", failed("timeout", "argument must be between 0 and 2147483647 inclusive")),
            ("activedefrag|maybe", failed("activedefrag", "argument must be 'yes' or 'no'")),
            ("maxmemory|1xb", failed("maxmemory", "argument must be a memory value")),
            ("maxmemory|-1", failed("maxmemory", "argument must be a memory value")),
            (
                "loglevel|foo",
                failed("loglevel", "argument(s) must be one of the following: debug, verbose, notice, warning"),
            ),
            ("DAEMONIZE|no", failed("DAEMONIZE", "can't set immutable config")),
            (
                "proto-max-bulk-len|1",
                failed("proto-max-bulk-len", "argument must be between 1048576 and 9223372036854775807 inclusive"),
            ),
            (
                "notify-keyspace-events|foo",
                failed("notify-keyspace-events", "Invalid event class character. Use 'Ag$lshzxeKEtmdn'."),
            ),
            ("requirepass|", "OK".to_owned()),
            ("save|", "OK".to_owned()),
            ("appendonly|yes|appendfsync|everysec", "OK".to_owned()),
            (
                "APPENDFSYNC|sometimes",
                failed("appendfsync", "argument(s) must be one of the following: everysec, always, no"),
            ),
        ] {
            assert_eq!(set(&settings, line), answer, "{line}");
        }
        assert!(set(&settings, "requirepass|secret").contains("passwords are not supported"));
    }

    #[test]
    fn values_are_shown_in_their_canonical_form() {
        let settings = Settings::new(&Config::default());
        for (line, name, shown) in [
            ("hz|1000", "hz", "500"),
            ("hz|0", "hz", "1"),
            ("maxmemory|1gb", "maxmemory", "1073741824"),
            ("maxmemory|10k", "maxmemory", "10000"),
            ("maxmemory|", "maxmemory", "0"),
            ("maxmemory|99999999999999999999", "maxmemory", "18446744073709551615"),
            ("notify-keyspace-events|KEA", "notify-keyspace-events", "AKE"),
            ("notify-keyspace-events|$g", "notify-keyspace-events", "g$"),
            ("maxmemory-clients|5%", "maxmemory-clients", "5%"),
            ("latency-tracking-info-percentiles|50 99.50", "latency-tracking-info-percentiles", "50 99.5"),
            (
                "client-output-buffer-limit|replica 256mb 64mb 60 normal 1mb 0 0",
                "client-output-buffer-limit",
                "normal 1048576 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60",
            ),
            ("list-max-ziplist-size|5", "list-max-listpack-size", "5"),
        ] {
            assert_eq!(set(&settings, line), "OK", "{line}");
            assert_eq!(settings.text(name), shown, "{line}");
        }
    }

    #[test]
    fn one_refused_value_changes_nothing() {
        let settings = Settings::new(&Config::default());
        assert!(set(&settings, "timeout|7|maxclients|0").starts_with("ERR CONFIG SET failed"));
        assert_eq!(settings.timeout(), None);
        assert_eq!(set(&settings, "timeout|7|maxclients|5|proto-max-bulk-len|1mb"), "OK");
        assert_eq!((settings.timeout(), settings.maxclients()), (Some(Duration::from_secs(7)), 5));
        assert_eq!(settings.proto_max_bulk_len(), 1 << 20);
    }

    #[test]
    fn names_and_patterns_are_found_in_any_case_and_once() {
        let settings = Settings::new(&Config::default());
        let names = |asked: &[&str]| -> Vec<String> {
            settings
                .get(asked, OfKeyspaceShown::default())
                .into_iter()
                .map(|(name, _)| String::from_utf8(name).expect("text"))
                .collect()
        };
        assert_eq!(names(&["HZ", "hz", "Timeout", "h?", "nosuch"]), ["HZ", "Timeout"]);
        assert_eq!(names(&["LIST-max*"]), ["list-max-listpack-size", "list-max-ziplist-size"]);
        assert!(names(&["*"]).len() > SETTINGS.len());
    }

    #[test]
    fn the_document_names_every_setting() {
        let text = document();
        assert!(SETTINGS.iter().all(|setting| text.contains(&format!("| `{}`", setting.name))));
    }
}
