//! Stores, masters and networks fail in every way while clients work; what was acknowledged must hold, and reads must never take back what they showed.
//!
//! Each test runs a load (`redis_tests::load`) whose history is checked key by key (`redis_tests::linearizability`), prints its seed and one
//! line of what it came to. `VASTO_CHAOS_SECONDS=n` lets each repeat its faults for n seconds, by default each is done once or a few times.

mod clocks;
mod company;
mod deletes;
mod detection;
mod fail_points;
mod growth;
mod handovers;
mod kills;
mod masters;
mod operation;
mod partitions;
mod replaces;
mod resizes;
mod returns;
mod sleeping_gateway;
mod storm;
mod takeovers;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis_tests::cluster::ClusterBuilder;
use redis_tests::eventually::{eventually_within, pause};
use redis_tests::history::{Event, History, Totals, surroundings};
use redis_tests::linearizability::{self, Verdict};
use redis_tests::load::{Load, LoadPlan};
use redis_tests::seed::{number_from_environment, seeded};
use redis_tests::{Address, Cluster, Connection, Node, Value};

/// The keyspace of the load.
const KEYSPACE: &str = "chaos";

/// More than stores, so that each has several.
const SHARDS: usize = 6;

/// Groups of clients; each uses keys of one shard.
const GROUPS: usize = 12;

/// Until every copy is there again after a fault, on a machine that does much else.
const RECOVERY_PATIENCE: Duration = Duration::from_secs(90);

/// Operations that succeed between two faults, so that each meets a load.
const OPERATIONS_BETWEEN: u64 = 1_000;

/// Of the keys of earlier loads about as many are read again after each round: hours of rounds make a lot of keys.
const KEPT_KEYS_MAX: usize = 5_000;

/// Violations that are shown in full.
const SHOWN_VIOLATIONS: usize = 3;

/// Whether a cluster that refuses copies fails the tests that need them. To be `true` from the day on which copies exist.
const COPIES_ARE_EXPECTED: bool = true;

/// How a keyspace is kept.
#[derive(Clone, Copy, Debug)]
struct Safety {
    copies: usize,
    min_replicas: usize,
}

/// Nothing fails over: what is down is down until it returns.
const ONE_COPY: Safety = Safety { copies: 1, min_replicas: 0 };
/// The end of the log may be lost until the old primary returns.
const TWO_COPIES: Safety = Safety { copies: 2, min_replicas: 0 };
/// Nothing may be lost; with one store down there is nobody to acknowledge a write.
const TWO_SAFE_COPIES: Safety = Safety { copies: 2, min_replicas: 1 };
/// Nothing may be lost, and one store may be down.
const THREE_COPIES: Safety = Safety { copies: 3, min_replicas: 1 };

/// Asks the running cluster, which a test must not skip silently once it should have copies.
fn copies_are_supported(cluster: &Cluster) -> bool {
    let mut connection = cluster.connect(0);
    let reply = eventually_within(RECOVERY_PATIENCE, "the master answers", || {
        let reply = connection.call(&["KEYSPACE", "CREATE", "probe", "SHARDS", "1", "COPIES", "2"]);
        // So many stores may not have come yet.
        if reply.is_error() && reply.text().contains(" are up") { Err(reply.text()) } else { Ok(reply) }
    });
    if reply.is_error() {
        let expected = COPIES_ARE_EXPECTED || std::env::var_os("VASTO_EXPECT_COPIES").is_some();
        assert!(!expected, "a second copy is refused: {}", reply.text());
        eprintln!("SKIP: a second copy is refused: {}", reply.text());
        return false;
    }
    connection.done(&["KEYSPACE", "DROP", "probe", "CONFIRM"]);
    true
}

/// How often a test does its fault: so many times, or for `VASTO_CHAOS_SECONDS`.
struct Rounds {
    start: Instant,
    done: usize,
    at_least: usize,
    time: Duration,
}

impl Rounds {
    fn new(at_least: usize) -> Rounds {
        let seconds = number_from_environment("VASTO_CHAOS_SECONDS").unwrap_or(0);
        Rounds { start: Instant::now(), done: 0, at_least, time: Duration::from_secs(seconds) }
    }

    /// Whether `VASTO_CHAOS_SECONDS` asks for more than the few rounds of every day.
    fn are_many(&self) -> bool {
        !self.time.is_zero()
    }

    fn another(&mut self) -> bool {
        self.done += 1;
        self.done <= self.at_least || self.start.elapsed() < self.time
    }

    /// The number of the round, from 0.
    fn number(&self) -> usize {
        self.done - 1
    }
}

/// A cluster under a load, with what was done to it.
struct Trial {
    name: String,
    cluster: Cluster,
    safety: Safety,
    /// Whether the end of a log may be missing after a failover, which is then counted.
    may_lose: bool,
    random: fastrand::Rng,
    seed: u64,
    start: Instant,
    load: Option<Load>,
    loads: usize,
    events: Vec<Event>,
    /// What keys of earlier loads held at their end: nobody has written them since.
    kept: BTreeMap<Arc<str>, Option<Vec<u8>>>,
    totals: Totals,
    breaks: u64,
    /// Operations that show a loss where losses are allowed.
    losses: usize,
    longest: Duration,
    /// Processes that were made to end by a panic.
    panics: usize,
}

impl Trial {
    /// `None`, and said, where the cluster has no such copies.
    fn begin(name: &str, builder: ClusterBuilder, safety: Safety) -> Option<Trial> {
        Trial::begin_with(name, builder, safety, SHARDS)
    }

    /// On a keyspace of so many shards.
    fn begin_with(name: &str, builder: ClusterBuilder, safety: Safety, shards: usize) -> Option<Trial> {
        let name = format!("{name}, copies {}, min-replicas {}", safety.copies, safety.min_replicas);
        let mut seeded = seeded(&name);
        let cluster = builder.gateways(2).start();
        if safety.copies > 1 && !copies_are_supported(&cluster) {
            return None;
        }
        let load_seed = seeded.random.u64(..);
        let trial = Trial {
            name,
            cluster,
            safety,
            may_lose: safety.copies > 1 && safety.min_replicas == 0,
            random: seeded.random,
            seed: load_seed,
            start: Instant::now(),
            load: None,
            loads: 0,
            events: Vec::new(),
            kept: BTreeMap::new(),
            totals: Totals::default(),
            breaks: 0,
            losses: 0,
            longest: Duration::ZERO,
            panics: 0,
        };
        create_keyspace(&trial.cluster, KEYSPACE, shards, safety);
        trial.wait_until_whole();
        Some(trial)
    }

    fn addresses(&self) -> Vec<Address> {
        (0..self.cluster.gateways.len()).map(|gateway| self.cluster.address(gateway)).collect()
    }

    fn start_load(&mut self) {
        self.start_load_at(self.addresses());
    }

    /// By these gateways alone.
    fn start_load_at(&mut self, addresses: Vec<Address>) {
        self.loads += 1;
        let plan = LoadPlan {
            addresses,
            keyspace: KEYSPACE.to_owned(),
            name: format!("l{}", self.loads),
            groups: GROUPS,
            seed: self.seed.wrapping_add(1000 * self.loads as u64),
            start: self.start,
        };
        let load = Load::start(&plan);
        load.wait_for(OPERATIONS_BETWEEN);
        self.load = Some(load);
    }

    fn load(&self) -> &Load {
        self.load.as_ref().expect("the load runs")
    }

    /// Notes what is about to be done.
    fn event(&mut self, what: impl Into<String>) {
        let event = Event { at: self.start.elapsed(), what: what.into() };
        eprintln!("  {:8.3} s  {}", event.at.as_secs_f64(), event.what);
        self.events.push(event);
    }

    /// The load goes on for a while as things are.
    fn go_on_for(&self, time: Duration) {
        pause(time);
    }

    fn go_on(&self) {
        self.load().wait_for(OPERATIONS_BETWEEN);
    }

    fn places(&self, keyspace: &str) -> Result<Vec<redis_tests::cluster::ShardPlace>, String> {
        let mut connection = Connection::try_open(&self.cluster.address(0)).map_err(|error| error.to_string())?;
        self.cluster.places(&mut connection, keyspace)
    }

    /// A store that leads one of the load's shards, by chance.
    fn some_primary(&mut self) -> usize {
        let places = eventually_within(RECOVERY_PATIENCE, "the gateway answers", || self.places(KEYSPACE));
        let primaries: Vec<usize> = places.iter().filter_map(|place| place.primary).collect();
        assert!(!primaries.is_empty(), "nobody leads: {places:?}");
        primaries[self.random.usize(..primaries.len())]
    }

    /// Every shard has a primary that is up, and as many replicas as it shall have.
    fn wait_until_whole(&self) {
        wait_until_whole(&self.cluster, KEYSPACE, self.safety);
    }

    /// Stops the load, reads everything back, checks it, and says what it came to.
    fn check(&mut self) {
        let load = self.load.take().expect("the load runs");
        let until = self.start.elapsed();
        let mut history = load.stop();
        let address = self.cluster.address(0);
        let found = history.read_back(&address, KEYSPACE, self.start);
        self.judge(&history);
        for (event, next) in self.events.iter().zip(self.events.iter().skip(1).map(Some).chain([None])) {
            let end = next.map_or(until, |next| next.at);
            let unavailable = history.unavailable(event.at, end);
            self.longest = self.longest.max(unavailable);
            if event.at < until {
                let milliseconds = |share| history.quantile(event.at, end, share).as_secs_f64() * 1000.0;
                eprintln!(
                    "  {}: a key was unavailable for {:.2} s; p50 {:.2} ms, p99 {:.2} ms",
                    event.what,
                    unavailable.as_secs_f64(),
                    milliseconds(0.5),
                    milliseconds(0.99)
                );
            }
        }
        let totals = history.totals();
        self.totals.operations += totals.operations;
        self.totals.done += totals.done;
        self.totals.not_executed += totals.not_executed;
        self.totals.unknown += totals.unknown;
        self.breaks += history.breaks;
        self.check_kept(&address);
        self.kept.extend(found);
        self.events.clear();
    }

    /// Keys of earlier loads are as they were left: no later fault took them back.
    fn check_kept(&mut self, address: &Address) {
        let count = self.kept.len().max(1);
        let mut chosen: Vec<Arc<str>> = self.kept.keys().cloned().collect();
        chosen.retain(|_| self.random.usize(..count) < KEPT_KEYS_MAX);
        let mut again =
            History { keys: chosen.into_iter().map(|key| (key, Vec::new())).collect(), ..History::default() };
        let found = again.read_back(address, KEYSPACE, self.start);
        let changed: Vec<String> = found
            .iter()
            .filter(|(key, value)| self.kept[*key] != **value)
            .map(|(key, value)| format!("{key} held {:?}, now {value:?}", self.kept[key]))
            .collect();
        assert!(changed.is_empty(), "{} keys changed by themselves:\n{}", changed.len(), changed.join("\n"));
    }

    fn judge(&mut self, history: &History) {
        let unexpected = &history.unexpected;
        assert!(unexpected.is_empty(), "{} answers that no client should see: {:?}", unexpected.len(), unexpected[0]);
        if self.may_lose {
            self.count_losses(history);
            return;
        }
        let wrong = wrong(history, &self.events);
        let shown = wrong.iter().take(SHOWN_VIOLATIONS).cloned().collect::<Vec<_>>().join("\n\n");
        assert!(wrong.is_empty(), "{}: {} of {} keys are wrong\n{shown}", self.name, wrong.len(), history.keys.len());
    }

    /// Where losses are allowed they are told: what was away for good, or until the old primary returned.
    fn count_losses(&mut self, history: &History) {
        for (key, operations) in &history.keys {
            let operations = linearizability::sorted(operations);
            let losses = linearizability::violations(&operations);
            if let Some(first) = losses.first()
                && self.losses == 0
            {
                eprintln!("the first loss, of {key}:\n{}", surroundings(&operations, *first, &self.events));
            }
            self.losses += losses.len();
        }
    }

    /// The line of the whole trial.
    fn end(mut self) -> Totals {
        if self.load.is_some() {
            self.check();
        }
        let Totals { operations, not_executed, unknown, .. } = self.totals;
        let losses = match self.losses {
            0 => String::new(),
            losses => format!(", {losses} show a loss"),
        };
        eprintln!(
            "chaos: {}: {operations} operations, {not_executed} refused, {unknown} unknown, {} connections broke{losses}, a key was \
             unavailable for {:.2} s at most",
            self.name,
            self.breaks,
            self.longest.as_secs_f64()
        );
        let panics: usize = self.cluster.nodes().map(|node| panics_of(node)).sum();
        if panics != self.panics {
            let logs: Vec<String> =
                self.cluster.nodes().filter(|node| panics_of(node) > 0).map(|node| node.log()).collect();
            panic!("{panics} processes panicked, {} were made to:\n{}", self.panics, logs.join("\n"));
        }
        self.totals
    }
}

/// How often a process has ended by a panic.
fn panics_of(node: &Node) -> usize {
    node.log().matches("panicked").count()
}

/// The keys that no order of the operations explains, each with what happened around the first answer that does not fit.
fn wrong(history: &History, events: &[Event]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (key, operations) in &history.keys {
        let operations = linearizability::sorted(operations);
        let (operation, what) = match linearizability::check(&operations) {
            Verdict::Linearizable(_) => continue,
            Verdict::Violation { operation, possible } => (operation, format!("may have held {possible:?} and then")),
            Verdict::Undecided { operation } => (operation, "has a history too tangled to decide".to_owned()),
        };
        wrong.push(format!("{key} {what}:\n{}", surroundings(&operations, operation, events)));
    }
    wrong.extend(history.check_counters());
    wrong
}

/// Creates it with strict leases, and waits until all gateways know it.
fn create_keyspace(cluster: &Cluster, name: &str, shards: usize, safety: Safety) {
    let shards = shards.to_string();
    let mut command = vec!["KEYSPACE", "CREATE", name, "SHARDS", &shards];
    let (copies, replicas) = (safety.copies.to_string(), safety.min_replicas.to_string());
    if safety.copies > 1 {
        command.extend(["COPIES", &copies, "MIN-REPLICAS", &replicas, "STRICT", "yes"]);
    }
    let mut connection = cluster.connect(0);
    connection.done(&command);
    for gateway in 0..cluster.gateways.len() {
        let mut connection = cluster.connect(gateway);
        redis_tests::eventually!(60 s, "the gateway knows it", connection.call(&["SELECT", name]) == Value::ok());
    }
}

/// Every shard has a primary that is up, and as many replicas as it shall have, all of which follow: one that has only been named cannot
/// take over.
fn wait_until_whole(cluster: &Cluster, keyspace: &str, safety: Safety) {
    let mut connection = None;
    eventually_within(RECOVERY_PATIENCE, "every copy is there", || {
        // The gateway may be restarted meanwhile.
        let mut open = match connection.take() {
            Some(open) => open,
            None => Connection::try_open(&cluster.address(0)).map_err(|error| error.to_string())?,
        };
        let places = cluster.places(&mut open, keyspace)?;
        let info = open.try_call(&["KEYSPACE", "INFO", keyspace]).map_err(|error| error.to_string())?;
        connection = Some(open);
        let behind = shards_without(&info, safety.copies - 1);
        if !behind.is_empty() {
            return Err(format!("shards {behind:?} lack replicas in sync: {info:?}"));
        }
        let whole = places
            .iter()
            .all(|place| place.primary.is_some() && place.is_up && place.replicas.len() == safety.copies - 1);
        if whole { Ok(()) } else { Err(format!("{places:?}")) }
    });
}

/// The shards that have fewer replicas in sync, by the answer of KEYSPACE INFO.
fn shards_without(info: &Value, replicas: usize) -> Vec<usize> {
    let shards = info.field("layout").and_then(|layout| layout.elements()).unwrap_or_default();
    let in_sync = |shard: &Value| {
        let followers = shard.field("followers").and_then(|followers| followers.elements()).unwrap_or_default();
        let is =
            |follower: &Value, name: &str, text: &str| follower.field(name).is_some_and(|value| value.text() == text);
        followers.iter().filter(|follower| is(follower, "role", "replica") && is(follower, "state", "in sync")).count()
    };
    let missing = shards.iter().enumerate().filter(|(_, shard)| in_sync(shard) < replicas);
    missing.map(|(number, _)| number).collect()
}

/// Asks for this store as the shard's primary until it is: a copy may have to catch up first.
fn make_primary(cluster: &Cluster, keyspace: &str, shard: usize, store: usize) {
    let mut connection = cluster.connect(0);
    let (number, id) = (shard.to_string(), cluster.store_id(store));
    eventually_within(RECOVERY_PATIENCE, &format!("store-{store} leads shard {shard}"), || {
        let places = cluster.places(&mut connection, keyspace)?;
        if places[shard].primary == Some(store) && places[shard].is_up {
            return Ok(());
        }
        let reply = connection.call(&["KEYSPACE", "FAILOVER", keyspace, "SHARD", &number, "TO", id]);
        Err(format!("{}, {:?}", reply.text(), places[shard]))
    });
}
