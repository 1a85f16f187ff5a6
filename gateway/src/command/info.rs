//! INFO: the gateway and its cluster in the sections and names of Redis, where these mean something here, and a section of our own.
//!
//! Memory is that of the process that was asked: `used_memory` is its resident set, as is `used_memory_rss`.

use super::backup::{self, StoreStatus};
use super::figures::{Figures, Walk};
use super::replication::{self, Replicas, ShardCopies};
use super::topology::automatic_failover;
use super::{Ask, Context, Next, Round, ShardRequest};
use crate::clients::unix_ms;
use crate::operation::kind_word;
use crate::process::{Memory, machine_memory};
use crate::statistics::{ERROR_WORDS, spec_of_row};
use std::fmt::{self, Write as _};
use vasto_proto::REDIS_VERSION;
use vasto_proto::command::Args;
use vasto_proto::error::CommandError;
use vasto_proto::id::ShardKey;
use vasto_proto::topology::{KeyspaceRecord, ShardRecord};

/// A part of INFO, in the order in which they are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Section {
    Server,
    Clients,
    Memory,
    Persistence,
    Stats,
    Replication,
    Cpu,
    Modules,
    CommandStats,
    ErrorStats,
    LatencyStats,
    Cluster,
    Keyspace,
    Vasto,
}

impl Section {
    /// With the words that ask for each, and whether plain INFO shows it.
    const ALL: [(Section, &'static str, bool); 14] = [
        (Section::Server, "server", true),
        (Section::Clients, "clients", true),
        (Section::Memory, "memory", true),
        (Section::Persistence, "persistence", true),
        (Section::Stats, "stats", true),
        (Section::Replication, "replication", true),
        (Section::Cpu, "cpu", true),
        (Section::Modules, "modules", true),
        (Section::CommandStats, "commandstats", false),
        (Section::ErrorStats, "errorstats", true),
        (Section::LatencyStats, "latencystats", false),
        (Section::Cluster, "cluster", true),
        (Section::Keyspace, "keyspace", true),
        (Section::Vasto, "vasto", true),
    ];

    /// What it needs of the shards.
    fn asks_shards(self) -> Option<Walk> {
        match self {
            Section::Keyspace | Section::Vasto => Some(Walk::CountKeys),
            Section::Persistence => Some(Walk::NoKeys),
            Section::Server
            | Section::Clients
            | Section::Memory
            | Section::Stats
            | Section::Replication
            | Section::Cpu
            | Section::Modules
            | Section::CommandStats
            | Section::ErrorStats
            | Section::LatencyStats
            | Section::Cluster => None,
        }
    }
}

/// The sections that the words ask for, each once and in their order.
fn sections<'a>(words: impl Iterator<Item = &'a [u8]>) -> Vec<Section> {
    let words: Vec<String> = words.map(|word| String::from_utf8_lossy(word).to_ascii_lowercase()).collect();
    let asked = |name: &str| words.iter().any(|word| word == name);
    let by_default = words.is_empty() || asked("default");
    let all = asked("all") || asked("everything");
    let chosen = Section::ALL.iter().filter(|(_, name, is_default)| all || by_default && *is_default || asked(name));
    chosen.map(|(section, _, _)| *section).collect()
}

pub fn info(context: &mut Context<'_>, args: Args<'_>) -> Result<Next, CommandError> {
    let sections = sections(args);
    let walk = sections.iter().filter_map(|section| section.asks_shards()).reduce(|one, other| match (one, other) {
        (Walk::NoKeys, Walk::NoKeys) => Walk::NoKeys,
        (Walk::CountKeys, _) | (_, Walk::CountKeys) => Walk::CountKeys,
    });
    let copies = copies_to_ask(context, &sections);
    if walk.is_some() || !copies.is_empty() {
        return Ok(Next::Ask(Box::new(Info { sections, walk, copies, figures: Figures::default(), asked: 0 })));
    }
    let text = render(context, &sections, &Answers::default());
    context.reply().verbatim(&text);
    Ok(Next::Replied)
}

/// The shards that are asked for their copies: for `replication` those of the connection's keyspace, for `vasto` all that have any.
fn copies_to_ask(context: &Context<'_>, sections: &[Section]) -> Vec<ShardKey> {
    let of_connection = sections.contains(&Section::Replication);
    let of_all = sections.contains(&Section::Vasto);
    let has_copies = |keyspace: &KeyspaceRecord| keyspace.shards.iter().any(|shard| shard.copies().nth(1).is_some());
    let is_asked = |keyspace: &&KeyspaceRecord| {
        of_connection && keyspace.id == context.session.keyspace || of_all && has_copies(keyspace)
    };
    let keyspaces = context.routing.snapshot.keyspaces.iter().filter(is_asked);
    keyspaces.flat_map(|keyspace| replication::shards_to_ask(context.routing, keyspace.id)).collect()
}

/// What was asked for.
#[derive(Default)]
struct Answers {
    figures: Figures,
    saves: StoreStatus,
    /// `None`: the shard did not answer.
    copies: Vec<(ShardKey, Option<ShardCopies>)>,
}

/// Asks every shard for its figures; one that fails is counted, and INFO answers all the same.
#[derive(Debug)]
struct Info {
    sections: Vec<Section>,
    walk: Option<Walk>,
    copies: Vec<ShardKey>,
    figures: Figures,
    /// Requests for the figures; those about copies and backups come behind them.
    asked: usize,
}

impl Ask for Info {
    fn start(&mut self, context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        let mut requests = Vec::new();
        if let Some(walk) = self.walk {
            (self.figures, requests) = Figures::ask(context, walk);
        }
        self.asked = requests.len();
        self.copies = copies_to_ask(context, &self.sections);
        requests.extend(self.copies.iter().map(|shard| replication::ask(*shard)));
        if self.sections.contains(&Section::Persistence) {
            requests.extend(backup::one_shard_each(context).iter().map(backup::ask_status));
        }
        Ok(requests)
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        let (figures, rest) = answers.split_at(self.asked.min(answers.len()));
        let (copies, saves) = rest.split_at(self.copies.len().min(rest.len()));
        self.figures.take(figures);
        let answers = Answers {
            figures: std::mem::take(&mut self.figures),
            saves: StoreStatus::of_all(saves),
            copies: self.copies.iter().zip(copies).map(|(key, copies)| (*key, ShardCopies::parse(copies))).collect(),
        };
        let text = render(context, &self.sections, &answers);
        context.reply().verbatim(&text);
        Ok(Round::Done)
    }
}

/// The text of INFO while it grows.
#[derive(Default)]
struct Text(String);

impl Text {
    fn section(&mut self, title: &str) {
        if !self.0.is_empty() {
            self.0.push_str("\r\n");
        }
        let _ = write!(self.0, "# {title}\r\n");
    }

    fn field(&mut self, name: impl fmt::Display, value: impl fmt::Display) {
        let _ = write!(self.0, "{name}:{value}\r\n");
    }

    fn zeros(&mut self, names: &[&str]) {
        names.iter().for_each(|name| self.field(name, 0));
    }

    /// A number of bytes, and again for people.
    fn bytes(&mut self, name: &str, bytes: u64) {
        self.field(name, bytes);
        self.field(format_args!("{name}_human"), human(bytes));
    }
}

/// Bytes as Redis writes them for people: two decimals and a unit of 1024.
fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["K", "M", "G", "T", "P"];
    if bytes < 1024 {
        return format!("{bytes}B");
    }
    let mut amount = bytes as f64 / 1024.0;
    let mut unit = 0;
    while amount >= 1024.0 && unit + 1 < UNITS.len() {
        amount /= 1024.0;
        unit += 1;
    }
    format!("{amount:.2}{}", UNITS[unit])
}

fn render(context: &Context<'_>, sections: &[Section], answers: &Answers) -> String {
    let Answers { figures, saves, copies } = answers;
    let mut text = Text::default();
    for section in sections {
        match section {
            Section::Server => server(&mut text, context),
            Section::Clients => clients(&mut text, context),
            Section::Memory => memory(&mut text, context),
            Section::Persistence => persistence(&mut text, figures, *saves),
            Section::Stats => stats(&mut text, context),
            Section::Replication => replication(&mut text, context, copies),
            Section::Cpu => cpu(&mut text),
            Section::Modules => text.section("Modules"),
            Section::CommandStats => command_stats(&mut text, context),
            Section::ErrorStats => error_stats(&mut text, context),
            Section::LatencyStats => latency_stats(&mut text, context),
            Section::Cluster => {
                text.section("Cluster");
                text.field("cluster_enabled", 0);
            }
            Section::Keyspace => keyspace(&mut text, figures),
            Section::Vasto => vasto(&mut text, context, figures, copies),
        }
    }
    text.0
}

fn read_line(path: &str) -> String {
    std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

fn server(text: &mut Text, context: &Context<'_>) {
    let shared = context.shared;
    let uptime = shared.started.elapsed().as_secs();
    let kernel = [
        read_line("/proc/sys/kernel/ostype"),
        read_line("/proc/sys/kernel/osrelease"),
        std::env::consts::ARCH.to_owned(),
    ];
    let executable = std::env::current_exe().map(|path| path.display().to_string()).unwrap_or_default();
    let micros = shared.started_at.elapsed().unwrap_or_default();
    let started_us = shared.started_at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    text.section("Server");
    text.field("redis_version", REDIS_VERSION);
    text.field("redis_git_sha1", "00000000");
    text.field("redis_git_dirty", 0);
    text.field("redis_build_id", 0);
    text.field("redis_mode", "standalone");
    text.field("os", kernel.join(" "));
    text.field("arch_bits", usize::BITS);
    text.field("multiplexing_api", "epoll");
    text.field("process_id", std::process::id());
    text.field("process_supervised", "no");
    text.field("run_id", &shared.run_id);
    text.field("tcp_port", shared.settings.text("port"));
    text.field("server_time_usec", (started_us + micros).as_micros());
    text.field("uptime_in_seconds", uptime);
    text.field("uptime_in_days", uptime / 86400);
    text.field("hz", shared.settings.text("hz"));
    text.field("configured_hz", shared.settings.text("hz"));
    text.field("lru_clock", (unix_ms() / 1000) & 0xff_ffff);
    text.field("executable", executable);
    text.field("config_file", "");
    text.field("io_threads_active", 0);
    text.field("vasto_version", env!("CARGO_PKG_VERSION"));
}

fn clients(text: &mut Text, context: &Context<'_>) {
    let all = context.shared.clients.all();
    let largest =
        |of: fn(&crate::clients::ClientRecord) -> usize| all.iter().map(|client| of(client)).max().unwrap_or(0);
    text.section("Clients");
    text.field("connected_clients", context.shared.clients.count());
    text.field("cluster_connections", 0);
    text.field("maxclients", context.shared.settings.maxclients());
    text.field("client_recent_max_input_buffer", largest(|client| client.query_bytes()));
    text.field("client_recent_max_output_buffer", largest(|client| client.output_bytes()));
    text.field("blocked_clients", all.iter().filter(|client| client.is_blocked()).count());
    text.zeros(&["tracking_clients", "clients_in_timeout_table"]);
}

fn memory(text: &mut Text, context: &Context<'_>) {
    let Memory { resident, peak, .. } = Memory::read();
    let settings = &context.shared.settings;
    text.section("Memory");
    text.bytes("used_memory", resident);
    text.bytes("used_memory_rss", resident);
    text.bytes("used_memory_peak", peak);
    text.field("used_memory_peak_perc", format_args!("{:.2}%", resident as f64 * 100.0 / peak.max(1) as f64));
    text.field("used_memory_startup", context.shared.started_with.resident);
    text.bytes("total_system_memory", machine_memory());
    text.bytes("used_memory_lua", 0);
    text.bytes("used_memory_scripts", 0);
    text.bytes("maxmemory", settings.text("maxmemory").parse().unwrap_or(0));
    text.field("maxmemory_policy", settings.text("maxmemory-policy"));
    text.field("mem_fragmentation_ratio", "1.00");
    text.field("mem_fragmentation_bytes", 0);
    text.field(
        "mem_clients_normal",
        context.shared.clients.all().iter().map(|client| client.query_bytes() + client.output_bytes()).sum::<usize>(),
    );
    text.field("mem_allocator", "mimalloc");
    text.zeros(&["active_defrag_running", "lazyfree_pending_objects", "lazyfreed_objects"]);
}

fn persistence(text: &mut Text, figures: &Figures, saves: StoreStatus) {
    text.section("Persistence");
    text.zeros(&["loading", "async_loading", "rdb_changes_since_last_save"]);
    text.field("rdb_bgsave_in_progress", u8::from(saves.is_running));
    text.field("rdb_last_save_time", saves.last_done_s);
    text.field("rdb_last_bgsave_status", if saves.has_failed { "err" } else { "ok" });
    text.field("rdb_last_bgsave_time_sec", -1);
    text.field("rdb_current_bgsave_time_sec", -1);
    text.field("rdb_saves", 0);
    text.field("aof_enabled", 1);
    text.zeros(&["aof_rewrite_in_progress", "aof_rewrite_scheduled"]);
    text.field("aof_last_rewrite_time_sec", -1);
    text.field("aof_current_rewrite_time_sec", -1);
    text.field("aof_last_bgrewrite_status", "ok");
    // A shard that cannot be asked cannot be written to.
    text.field("aof_last_write_status", if figures.unreachable() == 0 { "ok" } else { "err" });
    // Every write is in the log of its shard before it is answered.
    text.field("aof_buffer_length", 0);
    // Shards with writes that no sync has covered yet, and syncs that took longer than a second.
    text.field("aof_pending_bio_fsync", figures.keyspaces.iter().map(|keyspace| keyspace.unsynced).sum::<usize>());
    text.field("aof_delayed_fsync", figures.sum("slow_syncs"));
}

fn stats(text: &mut Text, context: &Context<'_>) {
    let figures = context.shared.statistics.figures();
    let rates = context.shared.statistics.rates();
    text.section("Stats");
    text.field("total_connections_received", figures.connections_received);
    text.field("total_commands_processed", figures.commands_processed());
    text.field("instantaneous_ops_per_sec", rates.commands.round());
    text.field("total_net_input_bytes", figures.input_bytes);
    text.field("total_net_output_bytes", figures.output_bytes);
    text.zeros(&["total_net_repl_input_bytes", "total_net_repl_output_bytes"]);
    text.field("instantaneous_input_kbps", format_args!("{:.2}", rates.input_bytes / 1024.0));
    text.field("instantaneous_output_kbps", format_args!("{:.2}", rates.output_bytes / 1024.0));
    text.field("rejected_connections", figures.connections_rejected);
    text.zeros(&[
        "sync_full",
        "sync_partial_ok",
        "sync_partial_err",
        "expired_keys",
        "evicted_keys",
        "evicted_clients",
    ]);
    text.zeros(&[
        "keyspace_hits",
        "keyspace_misses",
        "pubsub_channels",
        "pubsub_patterns",
        "pubsubshard_channels",
        "latest_fork_usec",
    ]);
    text.zeros(&[
        "total_forks",
        "migrate_cached_sockets",
        "tracking_total_keys",
        "tracking_total_items",
        "unexpected_error_replies",
    ]);
    text.field("total_error_replies", figures.error_replies());
}

/// As a master's: the keyspace's primaries together, and as its slaves the stores with other copies.
fn replication(text: &mut Text, context: &Context<'_>, copies: &[(ShardKey, Option<ShardCopies>)]) {
    let keyspace = context.session.keyspace;
    let of_keyspace: Vec<_> = copies.iter().filter(|(key, _)| key.keyspace == keyspace).cloned().collect();
    let replicas = Replicas::new(context.routing, &of_keyspace);
    text.section("Replication");
    text.field("role", "master");
    text.field("connected_slaves", replicas.stores.len());
    if let Some(record) = context.routing.snapshot.keyspace(keyspace)
        && record.settings.min_replicas() > 0
    {
        text.field("min_slaves_good_slaves", CopiesOfKeyspace::new(record, context, copies).in_sync);
    }
    for (number, store) in replicas.stores.iter().enumerate() {
        let state = if store.is_online { "online" } else { "send_bulk" };
        let (ip, port, offset, lag) = (&store.ip, &store.port, store.offset, store.lag.as_secs());
        text.field(
            format_args!("slave{number}"),
            format_args!("ip={ip},port={port},state={state},offset={offset},lag={lag}"),
        );
    }
    text.field("master_failover_state", "no-failover");
    text.field("master_replid", replication::replication_id(context.routing.snapshot.cluster));
    text.field("master_replid2", "0".repeat(40));
    text.field("master_repl_offset", replicas.offset);
    text.field("second_repl_offset", -1);
    // Followers that were away get what they lack from the logs of the primaries, not from a buffer of one size.
    text.zeros(&["repl_backlog_active", "repl_backlog_size", "repl_backlog_first_byte_offset", "repl_backlog_histlen"]);
}

/// The copies of one keyspace in numbers: its weakest shard counts.
struct CopiesOfKeyspace {
    /// On stores that are up, the primary's included; copies that are being made do not count.
    present: usize,
    /// Replicas that have all but what is on its way.
    in_sync: usize,
    lag_ms: u128,
    vacant: usize,
    /// Too few replicas follow some shard for the keyspace's `min-replicas`.
    writes_wait: bool,
}

impl CopiesOfKeyspace {
    fn new(record: &KeyspaceRecord, context: &Context<'_>, asked: &[(ShardKey, Option<ShardCopies>)]) -> Self {
        // One that is being filled has no replicas yet, and one that is being emptied needs none.
        let serving = &record.shards[..usize::from(record.shard_count()).min(record.shards.len())];
        let counts = |shard: &ShardRecord, store| shard.primary == store || shard.replicas.contains(&store);
        let present = |shard: &ShardRecord| {
            shard.copies().filter(|store| counts(shard, *store) && context.routing.is_up(*store)).count()
        };
        let mut copies = Self {
            present: serving.iter().map(present).min().unwrap_or_default(),
            in_sync: usize::MAX,
            lag_ms: 0,
            vacant: serving.iter().filter(|shard| shard.is_vacant()).count(),
            writes_wait: false,
        };
        for (number, shard) in serving.iter().enumerate() {
            let is_it = |key: &ShardKey| key.keyspace == record.id && usize::from(key.shard.0) == number;
            let answer = asked.iter().find(|(key, _)| is_it(key)).and_then(|(_, answer)| answer.as_ref());
            let in_sync = answer.map_or(0, |answer| answer.in_sync(shard));
            copies.in_sync = copies.in_sync.min(in_sync);
            let lags = answer.into_iter().flat_map(|answer| &answer.followers).map(|follower| follower.lag.as_millis());
            copies.lag_ms = lags.fold(copies.lag_ms, u128::max);
        }
        copies.writes_wait = copies.in_sync < record.settings.min_replicas() as usize;
        copies
    }
}

/// The unit of the times in `/proc/self/stat`: the kernel gives user space hundredths of a second on every architecture that we run on.
const TICKS_PER_SECOND: f64 = 100.0;

fn cpu(text: &mut Text) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The second field, the name, may hold blanks; behind its closing bracket, utime is the 12th field and the others follow.
    let fields: Vec<&str> =
        stat.rsplit_once(')').map(|(_, rest)| rest.split_ascii_whitespace().collect()).unwrap_or_default();
    let seconds =
        |place: usize| fields.get(place).and_then(|ticks| ticks.parse::<f64>().ok()).unwrap_or(0.0) / TICKS_PER_SECOND;
    text.section("CPU");
    for (name, place) in
        [("used_cpu_sys", 12), ("used_cpu_user", 11), ("used_cpu_sys_children", 14), ("used_cpu_user_children", 13)]
    {
        text.field(name, format_args!("{:.6}", seconds(place)));
    }
}

fn command_stats(text: &mut Text, context: &Context<'_>) {
    text.section("Commandstats");
    for (row, figures) in context.shared.statistics.figures().commands.iter().enumerate() {
        if figures.calls == 0 && figures.rejected == 0 {
            continue;
        }
        let per_call = figures.micros as f64 / figures.calls.max(1) as f64;
        text.field(
            format_args!("cmdstat_{}", spec_of_row(row).name),
            format_args!(
                "calls={},usec={},usec_per_call={per_call:.2},rejected_calls={},failed_calls={}",
                figures.calls, figures.micros, figures.rejected, figures.failed
            ),
        );
    }
}

fn error_stats(text: &mut Text, context: &Context<'_>) {
    text.section("Errorstats");
    for (word, count) in ERROR_WORDS.iter().zip(context.shared.statistics.figures().errors) {
        if count > 0 {
            text.field(format_args!("errorstat_{word}"), format_args!("count={count}"));
        }
    }
}

fn latency_stats(text: &mut Text, context: &Context<'_>) {
    text.section("Latencystats");
    if !context.shared.settings.latency_tracking() {
        return;
    }
    let percentiles = context.shared.settings.latency_percentiles();
    for (row, figures) in context.shared.statistics.figures().commands.iter().enumerate() {
        if figures.calls == 0 {
            continue;
        }
        let shown: Vec<String> = percentiles
            .iter()
            .map(|percentile| format!("p{percentile}={:.3}", figures.percentile_micros(*percentile) as f64))
            .collect();
        text.field(format_args!("latency_percentiles_usec_{}", spec_of_row(row).name), shown.join(","));
    }
}

fn keyspace(text: &mut Text, figures: &Figures) {
    text.section("Keyspace");
    let mut keyspaces: Vec<_> = figures.keyspaces.iter().filter(|keyspace| keyspace.sum("keys") > 0).collect();
    // Databases by their numbers, as in Redis, then the others.
    keyspaces.sort_by_key(|keyspace| (keyspace.name.parse::<u32>().unwrap_or(u32::MAX), &keyspace.name));
    for keyspace in keyspaces {
        let (keys, expires, avg_ttl) = (keyspace.sum("keys"), keyspace.sum("expires"), keyspace.avg_ttl());
        text.field(
            format_args!("db{}", keyspace.name),
            format_args!("keys={keys},expires={expires},avg_ttl={avg_ttl}"),
        );
    }
}

fn vasto(text: &mut Text, context: &Context<'_>, figures: &Figures, copies: &[(ShardKey, Option<ShardCopies>)]) {
    let snapshot = &context.routing.snapshot;
    let chosen = snapshot.keyspace(context.session.keyspace);
    text.section("Vasto");
    text.field("vasto_cluster", snapshot.cluster);
    text.field("vasto_topology_version", snapshot.version);
    text.field("vasto_waiting_for", &snapshot.waiting_for);
    let leadership = &snapshot.leadership;
    let holders: Vec<String> = leadership.group.members.iter().map(ToString::to_string).collect();
    text.field("vasto_term", leadership.term);
    text.field("vasto_master", &leadership.address);
    text.field("vasto_standby_masters", leadership.standbys.join(","));
    text.field("vasto_holder_group", leadership.group.version);
    text.field("vasto_holders", holders.join(","));
    text.field("vasto_automatic_failover", automatic_failover(&leadership.group));
    text.field("vasto_keyspace", chosen.map_or("", |keyspace| &keyspace.name));
    text.field("vasto_stores", snapshot.stores.len());
    text.field("vasto_stores_up", snapshot.stores.iter().filter(|store| store.up).count());
    text.field("vasto_keyspaces", snapshot.keyspaces.len());
    let operations = snapshot.keyspaces.iter().filter_map(KeyspaceRecord::active_operation).count();
    text.field("vasto_operations", operations);
    text.field("vasto_shards", figures.shards());
    text.field("vasto_shards_unreachable", figures.unreachable());
    text.field("vasto_row_cache_bytes", figures.sum_of_stores("row_cache_bytes"));
    text.field("vasto_block_cache_bytes", figures.sum_of_stores("block_cache_bytes"));
    for keyspace in &figures.keyspaces {
        let fsync = snapshot.keyspace(keyspace.id).map(|record| snapshot.fsync(record)).unwrap_or_default();
        let dbsize = if keyspace.keys_exact && keyspace.unreachable == 0 { "exact" } else { "estimate" };
        let _ = write!(
            text.0,
            "vasto_keyspace_{}:id={},shards={},fsync={fsync},dbsize={dbsize}",
            keyspace.name, keyspace.id, keyspace.shards
        );
        if let Some(record) = snapshot.keyspace(keyspace.id) {
            let CopiesOfKeyspace { present, in_sync, lag_ms, vacant, writes_wait } =
                CopiesOfKeyspace::new(record, context, copies);
            let (wished, min_replicas) = (record.copies, record.settings.min_replicas());
            let yes_or_no = |is_so: bool| if is_so { "yes" } else { "no" };
            let (strict, writes_wait) = (yes_or_no(record.settings.strict()), yes_or_no(writes_wait));
            let _ = write!(
                text.0,
                ",copies={wished},copies_present={present},min_replicas={min_replicas},strict={strict},\
                 replicas_in_sync={in_sync},lag_ms={lag_ms},vacant_shards={vacant},writes_wait_for_a_replica={writes_wait}"
            );
            let _ = match record.active_operation() {
                Some(operation) => {
                    let (kind, phase) = (kind_word(operation.kind), operation.phase.word());
                    write!(text.0, ",operation={kind},phase={phase}")
                }
                None => write!(text.0, ",operation=none"),
            };
        }
        for (name, sum) in keyspace.sums() {
            let _ = write!(text.0, ",{name}={sum}");
        }
        text.0.push_str("\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::harness::{Harness, packed};
    use crate::statistics::Statistics;
    use vasto_proto::command::table::{Command, StoreCommand};

    fn figures(request: &ShardRequest) -> Vec<u8> {
        let keys = 10 * (1 + i64::from(request.target.shard.0));
        packed(|reply| {
            reply.array(1);
            reply.map(5);
            for (name, value) in
                [("keys", keys), ("keys_exact", 1), ("expires", 2), ("avg_ttl", 1000 * keys), ("disk_bytes", 7)]
            {
                reply.bulk(name.as_bytes());
                reply.integer(value);
            }
        })
    }

    #[test]
    fn sections_are_chosen_as_redis_chooses_them() {
        let chosen = |words: &[&str]| sections(words.iter().map(|word| word.as_bytes()));
        assert_eq!(chosen(&["CLUSTER", "server", "cluster"]), [Section::Server, Section::Cluster]);
        assert_eq!(chosen(&["nosuch"]), []);
        assert_eq!(chosen(&["all"]).len(), Section::ALL.len());
        assert_eq!(chosen(&[]), chosen(&["default"]));
        assert!(!chosen(&[]).contains(&Section::CommandStats));
        assert!(chosen(&["default", "commandstats"]).contains(&Section::CommandStats));
    }

    #[test]
    fn what_needs_no_shard_asks_none() {
        let mut harness = Harness::new();
        assert_eq!(harness.run("INFO cluster"), r##"txt:"# Cluster\r\ncluster_enabled:0\r\n""##);
        assert_eq!(harness.run("INFO nosuch"), r#"txt:"""#);
        let server = harness.run("INFO server clients memory stats cpu");
        for field in [
            "redis_version:7.0.15\\r\\n",
            "redis_mode:standalone",
            "arch_bits:64",
            "tcp_port:6379",
            "connected_clients:1",
            "blocked_clients:0",
            "used_memory:",
            "used_cpu_user:",
            "# Stats",
        ] {
            assert!(server.contains(field), "{field} in {server}");
        }
    }

    #[test]
    fn figures_of_shards_are_added_up_and_a_missing_shard_is_counted() {
        let mut harness = Harness::new();
        let text = harness.run_with("INFO keyspace vasto", &mut figures);
        assert!(
            text.contains(
                "# Keyspace\\r\\ndb0:keys=60,expires=6,avg_ttl=20000\\r\\ndbusers:keys=10,expires=2,avg_ttl=10000\\r\\n"
            ),
            "{text}"
        );
        assert!(text.contains("vasto_stores:2\\r\\nvasto_stores_up:1\\r\\nvasto_keyspaces:2\\r\\nvasto_operations:0\\r\\nvasto_shards:4\\r\\nvasto_shards_unreachable:0\\r\\n"), "{text}");
        assert!(
            text.contains(
                "vasto_keyspace_0:id=0,shards=3,fsync=everysec,dbsize=exact,copies=1,copies_present=0,min_replicas=0,strict=yes,replicas_in_sync=0,lag_ms=0,vacant_shards=0,writes_wait_for_a_replica=no,operation=none,keys=60,expires=6,disk_bytes=21\\r\\n"
            ),
            "{text}"
        );
        let text = harness.run_with("INFO", &mut |request| match request.target.shard.0 {
            1 => packed(|reply| reply.error("CLUSTERDOWN x")),
            _ => figures(request),
        });
        assert!(text.contains("aof_last_write_status:err\\r\\n"), "{text}");
        assert!(text.contains("vasto_shards_unreachable:1\\r\\n"), "{text}");
        assert!(text.contains("vasto_keyspace_0:id=0,shards=3,fsync=everysec,dbsize=estimate,copies=1,"), "{text}");
        assert!(text.contains(",keys=40,"), "{text}");
    }

    #[test]
    fn replication_is_that_of_a_master_with_the_stores_of_the_copies_as_its_slaves() {
        let mut harness = Harness::new();
        let shard = |followers: &'static [(i64, i64, i64)]| {
            move |request: &ShardRequest| match request.command {
                StoreCommand::InternalReplication => packed(|reply| {
                    reply.array(5);
                    reply.bulk(b"primary");
                    [1, 1, 10].into_iter().for_each(|number| reply.integer(number));
                    reply.array(followers.len());
                    for (store, in_sync, applied) in followers {
                        reply.array(5);
                        [*store, 1, *in_sync, *applied, 1_500_000].into_iter().for_each(|number| reply.integer(number));
                    }
                }),
                _ => figures(request),
            }
        };
        let text = harness.run_with("INFO replication", &mut shard(&[]));
        let expected = format!(
            "txt:\"# Replication\\r\\nrole:master\\r\\nconnected_slaves:0\\r\\nmaster_failover_state:no-failover\\r\\nmaster_replid:{}\\r\\n",
            replication::replication_id(harness.routing.snapshot.cluster)
        );
        assert!(text.starts_with(&expected), "{text}");
        assert!(text.contains("master_repl_offset:30\\r\\nsecond_repl_offset:-1\\r\\nrepl_backlog_active:0"), "{text}");
        let mut snapshot = vasto_proto::topology::Snapshot::clone(&harness.routing.snapshot);
        let users = &mut snapshot.keyspaces[1];
        users.copies = 2;
        users.settings.min_replicas = Some(1);
        users.shards[0].replicas = vec![vasto_proto::id::StoreId(0xa)];
        harness.session.keyspace = users.id;
        harness.routing = crate::routing::Routing::new(std::sync::Arc::new(snapshot));
        let text = harness.run_with("INFO replication vasto", &mut shard(&[(0xa, 1, 8)]));
        let slaves = "connected_slaves:1\\r\\nmin_slaves_good_slaves:1\\r\\nslave0:ip=10.0.0.10,port=7201,state=online,offset=8,lag=1\\r\\n";
        assert!(text.contains(slaves) && text.contains("master_repl_offset:10\\r\\n"), "{text}");
        let copies = "vasto_keyspace_users:id=5,shards=1,fsync=everysec,dbsize=exact,copies=2,copies_present=1,min_replicas=1,strict=yes,\
                      replicas_in_sync=1,lag_ms=1500,vacant_shards=0,writes_wait_for_a_replica=no,";
        assert!(text.contains(copies), "{text}");
        let text = harness.run_with("INFO replication vasto", &mut shard(&[(0xa, 0, 8)]));
        assert!(text.contains("min_slaves_good_slaves:0") && text.contains("state=send_bulk"), "{text}");
        assert!(
            text.contains("replicas_in_sync=0,lag_ms=1500,vacant_shards=0,writes_wait_for_a_replica=yes"),
            "{text}"
        );
        let mut snapshot = vasto_proto::topology::Snapshot::clone(&harness.routing.snapshot);
        let users = snapshot.keyspaces[1].begin_resize(2, vec![vasto_proto::id::StoreId(0xa)]).expect("possible");
        snapshot.keyspaces[1] = users;
        harness.routing = crate::routing::Routing::new(std::sync::Arc::new(snapshot));
        let text = harness.run_with("INFO vasto", &mut shard(&[(0xa, 0, 8)]));
        assert!(text.contains("vasto_operations:1\\r\\n"), "{text}");
        assert!(text.contains("writes_wait_for_a_replica=yes,operation=resize,phase=copy,"), "{text}");
    }

    #[test]
    fn backups_are_those_that_every_store_has() {
        let mut harness = Harness::new();
        let mut last_done_s = 300;
        let text = harness.run_with("INFO persistence", &mut |request| {
            if request.command != StoreCommand::InternalSaves {
                return figures(request);
            }
            last_done_s -= 100;
            packed(|reply| {
                reply.map(3);
                for (name, value) in [("in_progress", 1), ("last_done", last_done_s), ("failed", 0)] {
                    reply.bulk(name.as_bytes());
                    reply.integer(value);
                }
            })
        });
        let fields = "rdb_bgsave_in_progress:1\\r\\nrdb_last_save_time:100\\r\\nrdb_last_bgsave_status:ok\\r\\n";
        assert!(text.contains(fields), "{text}");
    }

    #[test]
    fn commands_and_errors_are_counted() {
        let mut harness = Harness::new();
        let get = Command::Store(StoreCommand::Get);
        for micros in [1, 3, 8] {
            harness.shared.statistics.command(get, micros, micros == 8);
        }
        harness.shared.statistics.rejected(get);
        harness.shared.statistics.error(b"WRONGTYPE x");
        let text = harness.run("INFO commandstats errorstats latencystats stats");
        for line in [
            "cmdstat_get:calls=3,usec=12,usec_per_call=4.00,rejected_calls=1,failed_calls=1\\r\\n",
            "errorstat_WRONGTYPE:count=1\\r\\n",
            "latency_percentiles_usec_get:p50=4.000,p99=16.000,p99.9=16.000\\r\\n",
            "total_commands_processed:3\\r\\n",
            "total_error_replies:1\\r\\n",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
        harness.shared.statistics = Statistics::new();
        assert!(harness.run("INFO stats").contains("total_commands_processed:0\\r\\n"));
    }

    #[test]
    fn bytes_are_written_for_people_as_redis_does() {
        for (bytes, text) in
            [(0, "0B"), (1023, "1023B"), (32768, "32.00K"), (2029768, "1.94M"), (25325268992, "23.59G")]
        {
            assert_eq!(human(bytes), text);
        }
    }
}
