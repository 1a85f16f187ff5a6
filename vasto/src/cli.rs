//! The command line: one struct per role, made of groups that several roles share.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::admin::AdminArguments;
use crate::bench::BenchArguments;
use crate::import::ImportArguments;
use crate::restore::RestoreArguments;

/// A database that speaks the Redis protocol, keeps its data on disk and grows while it serves.
///
/// Without a command it runs `server`: everything in one process, for redis-cli on port 6379.
#[derive(Debug, Parser)]
#[command(name = "vasto", version, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    pub role: Role,
}

#[derive(Debug, Subcommand)]
pub enum Role {
    /// Run master, stores and a gateway in one process (the default).
    Server(ServerOptions),
    /// Run a master: watches stores, creates keyspace 0 in an empty cluster, tells gateways where data is.
    Master(MasterOptions),
    /// Run a store: keeps data.
    Store(StoreOptions),
    /// Run a gateway: speaks the Redis protocol to clients.
    Gateway(GatewayOptions),
    /// Load a server and measure it.
    Bench(BenchArguments),
    /// Resize a keyspace, replace a store, show how far that is, or end it.
    ///
    /// The exit status is 0 when it was done (or has begun, without --watch), 1 when it was refused, aborted, or is not known; the reason is
    /// on the error output.
    Admin(AdminArguments),
    /// Import the strings of an RDB file, with the times at which they expire, into a running server.
    ///
    /// The file is read to its end first: a damaged one changes nothing. Values of other types are counted and reported. The exit status
    /// is 0 when everything was imported or left out by an option, 1 after an error, 3 when something of the file was not imported.
    Import(ImportArguments),
    /// Make a store's data folder of a backup.
    ///
    /// BGSAVE and SAVE leave a folder backups/NAME in the data folder of every store. Each is restored by itself, into a folder that does
    /// not exist or is empty; every file is copied and its checksum compared. The restored store has the identity of the old one: never
    /// run both.
    Restore(RestoreArguments),
}

#[derive(Clone, Debug, Args)]
pub struct ServerOptions {
    #[command(flatten)]
    pub process: ProcessOptions,

    /// Address for Redis clients; repeat it for several.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:6379", value_parser = address, value_delimiter = ',')]
    pub listen: Vec<SocketAddr>,

    /// Folder of the data; each store has a folder store-1, store-2… in it.
    #[arg(long, value_name = "FOLDER", default_value = "./data")]
    pub data: PathBuf,

    /// Number of stores; more are opened if the data folder has more.
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub stores: u16,

    /// Shards of keyspace 0, which is created at the first start [default: as many as stores].
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub shards: Option<u16>,

    #[command(flatten)]
    pub clients: ClientOptions,

    #[command(flatten)]
    pub storage: StorageOptions,
}

#[derive(Clone, Debug, Args)]
pub struct MasterOptions {
    #[command(flatten)]
    pub process: ProcessOptions,

    /// Address for stores and gateways.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7100", value_parser = address)]
    pub listen: SocketAddr,

    /// Address at which stores and gateways reach this master, if it is another than --listen: of several masters the one that leads is
    /// named by it.
    #[arg(long, value_name = "HOST:PORT", value_parser = remote_address)]
    pub advertise: Option<String>,

    /// Seconds after which a store that is down and holds the records is replaced as their holder by another store.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub replace_after: u64,

    /// Shards of keyspace 0, which is created in an empty cluster.
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub bootstrap_shards: u16,

    /// Stores that must have registered before it is created [default: as many as --bootstrap-shards].
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..))]
    pub bootstrap_stores: Option<u16>,
}

#[derive(Clone, Debug, Args)]
pub struct StoreOptions {
    #[command(flatten)]
    pub process: ProcessOptions,

    #[command(flatten)]
    pub master: MasterAddress,

    /// Address for gateways; port 0 takes a free one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0", value_parser = address)]
    pub listen: SocketAddr,

    /// Address at which gateways reach this store, if it is another than --listen.
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,

    /// Folder of the data.
    #[arg(long, value_name = "FOLDER", default_value = "./data/store-1")]
    pub data: PathBuf,

    /// The room, rack or zone that fails as one with what else is in it; copies of one shard keep apart where they can [default: not told].
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub zone: String,

    /// Words that STORES shows; separate by commas, or repeat it [default: none].
    #[arg(long, value_name = "WORD", value_delimiter = ',')]
    pub tags: Vec<String>,

    /// Threads that run commands; 0 = one per core.
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub workers: usize,

    /// Longest value.
    #[arg(long, value_name = "BYTES", default_value = "512mb")]
    pub proto_max_bulk_len: Bytes,

    #[command(flatten)]
    pub storage: StorageOptions,
}

#[derive(Clone, Debug, Args)]
pub struct GatewayOptions {
    #[command(flatten)]
    pub process: ProcessOptions,

    #[command(flatten)]
    pub master: MasterAddress,

    /// Address for Redis clients; repeat it for several.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:6379", value_parser = address, value_delimiter = ',')]
    pub listen: Vec<SocketAddr>,

    #[command(flatten)]
    pub clients: ClientOptions,
}

#[derive(Clone, Debug, Args)]
pub struct MasterAddress {
    /// Address of the master; repeat it, or separate by commas, if there are several: one leads, the others stand by.
    #[arg(long = "master", visible_alias = "masters", value_name = "HOST:PORT", default_value = "127.0.0.1:7100", value_parser = remote_address, value_delimiter = ',')]
    pub masters: Vec<String>,
}

/// What every process has.
#[derive(Clone, Debug, Args)]
pub struct ProcessOptions {
    /// TOML file with options: keys are the names below without the dashes. Keys at its top are for every role that has
    /// such an option, keys in a section such as [store] for that role alone (beside a section [master], the option
    /// --master is spelled masters). The command line wins over the file.
    #[arg(long, value_name = "FILE", help_heading = "Process")]
    pub config: Option<PathBuf>,

    /// What to log on standard error: a level (error, warn, info, debug, trace) or a filter such as info,vasto_store=debug.
    #[arg(long, value_name = "FILTER", default_value = "info", help_heading = "Process")]
    pub log: String,

    /// Address for Prometheus, which asks for /metrics; port 0 takes a free one [default: none].
    #[arg(long, value_name = "HOST:PORT", value_parser = address, help_heading = "Process")]
    pub metrics_addr: Option<SocketAddr>,
}

/// What concerns clients: all but the first two and `databases` can also be changed with CONFIG SET.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Clients")]
pub struct ClientOptions {
    /// Unix socket for Redis clients as well [default: none].
    #[arg(long, value_name = "PATH")]
    pub unixsocket: Option<PathBuf>,

    /// Threads that serve clients; 0 = one per core.
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub workers: usize,

    /// Most connections at one time.
    #[arg(long, value_name = "COUNT", default_value_t = 10_000)]
    pub maxclients: usize,

    /// Seconds after which an idle connection is closed; 0 = never.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub timeout: u64,

    /// Seconds between TCP keep-alive probes; 0 = none.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub tcp_keepalive: u64,

    /// Longest key or value.
    #[arg(long, value_name = "BYTES", default_value = "512mb")]
    pub proto_max_bulk_len: Bytes,

    /// Most bytes of one client's commands that wait to be executed.
    #[arg(long, value_name = "BYTES", default_value = "1gb")]
    pub client_query_buffer_limit: Bytes,

    /// A connection with more unsent replies than this is not read any further.
    #[arg(long, value_name = "BYTES", default_value = "1mb")]
    pub output_buffer_limit: Bytes,

    /// Seconds after which a client that takes nothing of its replies is disconnected.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub output_stall_timeout: u64,

    /// SELECT takes numbers below this; one whose keyspace does not exist is created by its first SELECT.
    #[arg(long, value_name = "COUNT", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub databases: u32,

    /// Milliseconds after which a command that no store has answered fails.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 5000)]
    pub request_deadline_ms: u64,
}

/// What concerns data on disk and memory in front of it.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Storage")]
pub struct StorageOptions {
    /// Memory for rows that are in use, in all.
    #[arg(long, value_name = "BYTES", default_value = "256mb")]
    pub row_cache: Bytes,

    /// Memory for blocks of files, in all.
    #[arg(long, value_name = "BYTES", default_value = "256mb")]
    pub block_cache: Bytes,

    /// Memory for rows that are written and not yet in a file, in all.
    #[arg(long, value_name = "BYTES", default_value = "256mb")]
    pub write_buffer: Bytes,

    /// When a write reaches the disk for good: before it is answered, within a second, or when the system pleases. Holds for
    /// keyspaces that have no setting of their own (CONFIG SET appendfsync, KEYSPACE ALTER name FSYNC).
    #[arg(long, value_enum, default_value_t = FsyncChoice::Everysec)]
    pub fsync: FsyncChoice,

    /// Threads per store that wait for the disk.
    #[arg(long, value_name = "COUNT", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub lane_threads: u16,

    /// Threads per store that flush and compact.
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub background_jobs: u16,

    /// What flushes and compactions may write per second; 0 = no limit.
    #[arg(long, value_name = "BYTES", default_value = "0")]
    pub background_rate: Bytes,

    /// Files that each shard keeps open.
    #[arg(long, value_name = "COUNT", default_value_t = 1024, value_parser = clap::value_parser!(u16).range(16..))]
    pub max_open_files: u16,

    /// Seconds for which deletions are remembered at least.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    pub gc_grace: u64,

    /// Milliseconds by which an event time that a client gives (EVENTTIME) may be ahead of the store's clock.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 500)]
    pub max_clock_skew: u64,

    /// MB per second that each store sends of its rows at most when slots go to other shards (KEYSPACE RESIZE); 0 = no limit.
    #[arg(long, value_name = "MB", default_value_t = 64)]
    pub resize_rate: u64,

    /// Seconds within which the copies of each shard are compared once, slowly; 0 = only when KEYSPACE VERIFY asks.
    #[arg(long, value_name = "SECONDS", default_value_t = 86400)]
    pub verify_interval: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FsyncChoice {
    Always,
    Everysec,
    No,
}

/// An amount of memory: a number, perhaps with one of Redis's units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub usize);

/// As in redis.conf: `k` is 1000, `kb` is 1024.
const UNITS: [(&str, u64); 8] = [
    ("kb", 1 << 10),
    ("mb", 1 << 20),
    ("gb", 1 << 30),
    ("k", 1_000),
    ("m", 1_000_000),
    ("g", 1_000_000_000),
    ("b", 1),
    ("", 1),
];

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        let digits = lower.trim_end_matches(|character: char| !character.is_ascii_digit());
        let unit = UNITS.iter().find(|(name, _)| *name == &lower[digits.len()..]);
        let bytes = unit.and_then(|(_, factor)| digits.parse::<u64>().ok()?.checked_mul(*factor));
        let bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok());
        bytes.map(Bytes).ok_or_else(|| "not an amount such as 100mb, 2gb or 65536".to_owned())
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// An address to listen on; a host name means its first address.
fn address(text: &str) -> Result<SocketAddr, String> {
    let resolved = text.to_socket_addrs().map_err(|error| format!("not an address HOST:PORT ({error})"));
    resolved?.next().ok_or_else(|| "the host has no address".to_owned())
}

/// An address to connect to; its host is looked up at each connection.
pub fn remote_address(text: &str) -> Result<String, String> {
    let port =
        text.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse::<u16>().ok());
    port.map(|_| text.to_owned()).ok_or_else(|| "not an address HOST:PORT".to_owned())
}

#[cfg(test)]
mod tests {

    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent_and_every_option_is_explained() {
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        for role in command.get_subcommands() {
            for command in std::iter::once(role).chain(role.get_subcommands()) {
                assert!(command.get_about().is_some(), "{}", command.get_name());
                for argument in command.get_arguments() {
                    assert!(argument.get_help().is_some(), "{} --{}", command.get_name(), argument.get_id());
                }
            }
        }
    }

    #[test]
    fn amounts_have_redis_units() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("65536", Some(65_536)),
            ("1k", Some(1_000)),
            ("1kb", Some(1_024)),
            ("256MB", Some(256 << 20)),
            ("2g", Some(2_000_000_000)),
            ("7b", Some(7)),
            ("", None),
            ("mb", None),
            ("-1", None),
            ("1.5gb", None),
            ("1tb", None),
            ("99999999999gb", None),
        ] {
            assert_eq!(text.parse::<Bytes>().ok(), bytes.map(Bytes), "{text}");
        }
    }

    /// The help states defaults; what the libraries take by themselves is the same.
    #[test]
    fn defaults_are_those_of_the_libraries() {
        let Cli { role: Role::Server(options) } = Cli::try_parse_from(["vasto", "server"]).unwrap() else {
            panic!("server was asked for");
        };
        let (clients, gateway) = (options.clients, vasto_gateway::Config::default());
        assert_eq!(options.listen, gateway.listen);
        assert_eq!((clients.workers, clients.maxclients), (gateway.workers, gateway.maxclients));
        assert_eq!(clients.timeout, gateway.timeout_seconds);
        assert_eq!(clients.tcp_keepalive, gateway.tcp_keepalive_seconds);
        assert_eq!(clients.proto_max_bulk_len.0, gateway.proto_max_bulk_len);
        assert_eq!(clients.client_query_buffer_limit.0, gateway.client_query_buffer_limit);
        assert_eq!(clients.output_buffer_limit.0, gateway.output_buffer_limit);
        assert_eq!(clients.output_stall_timeout, gateway.output_stall_timeout.as_secs());
        assert_eq!(clients.databases, gateway.databases);
        assert_eq!(u128::from(clients.request_deadline_ms), gateway.request_deadline.as_millis());
        let (storage, store) = (options.storage, vasto_store::Config::default());
        assert_eq!(storage.row_cache.0, store.memory.row_cache_bytes);
        assert_eq!(storage.block_cache.0, store.memory.block_cache_bytes);
        assert_eq!(storage.write_buffer.0, store.memory.write_buffer_bytes);
        assert_eq!(usize::from(storage.lane_threads), store.lane_threads);
        assert_eq!(i32::from(storage.background_jobs), store.background_jobs);
        assert_eq!(storage.background_rate.0 as u64, store.background_bytes_per_second);
        assert_eq!(i32::from(storage.max_open_files), store.max_open_files);
        assert_eq!(storage.gc_grace, store.gc_grace.as_secs());
        assert_eq!(u128::from(storage.max_clock_skew), store.max_clock_skew.as_millis());
        assert_eq!(storage.resize_rate * 1_000_000, store.resize_bytes_per_second);
        assert_eq!(storage.verify_interval, store.verify_interval.as_secs());
        assert_eq!((storage.fsync, store.fsync), (FsyncChoice::Everysec, vasto_store::Fsync::EverySecond));
    }
}
