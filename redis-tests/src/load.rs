//! Clients that run SET, GET, DEL, INCR and APPEND against each other on shared keys and record all of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::connection::{Address, Connection};
use crate::eventually::pause;
use crate::history::{Action, History, Operation, Outcome, open_in, outcome_of};

/// Keys with one hash tag, so that they lie in one shard, and used by the same clients: those of other shards never wait for this one.
const KEYS_PER_GROUP: usize = 4;

/// As many as share each key.
const CLIENTS_PER_GROUP: usize = 3;

/// A key whose history has so many operations is left as it is, to be read at the end, and another one is begun.
const OPERATIONS_PER_KEY: u32 = 300;

/// As many SETs, DELs and APPENDs of unknown outcome a key may have: the check goes through their orders.
const UNKNOWN_PER_KEY: u32 = 3;

/// Between two operations of a client: on two cores the servers shall have time to answer within their leases.
const PAUSE_MICROSECONDS_MAX: u64 = 4_000;

/// Longer than a gateway takes to answer that it cannot: its deadline is 5 s, what is held back of an answer 5 s more.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);

/// Between two attempts to connect.
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);

/// What a load shall be.
#[derive(Clone, Debug)]
pub struct LoadPlan {
    /// Clients of one group take them in turn.
    pub addresses: Vec<Address>,
    pub keyspace: String,
    /// What the keys begin with: two loads with one name would share them.
    pub name: String,
    pub groups: usize,
    pub seed: u64,
    /// What times count from.
    pub start: Instant,
}

/// Clients that run until they are stopped.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    clients: Vec<JoinHandle<History>>,
}

impl Load {
    pub fn start(plan: &LoadPlan) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let numbers = Arc::new(AtomicU64::new(1));
        let mut clients = Vec::new();
        for group in 0..plan.groups {
            let group = Arc::new(Group::new(format!("{}:{group}", plan.name)));
            for place in 0..CLIENTS_PER_GROUP {
                let number = clients.len() as u32;
                let client = Client {
                    number,
                    address: plan.addresses[place % plan.addresses.len()].clone(),
                    keyspace: plan.keyspace.clone(),
                    group: group.clone(),
                    random: fastrand::Rng::with_seed(plan.seed.wrapping_add(u64::from(number))),
                    start: plan.start,
                    stop: stop.clone(),
                    done: done.clone(),
                    numbers: numbers.clone(),
                    history: History::default(),
                };
                clients.push(std::thread::spawn(move || client.run()));
            }
        }
        Load { stop, done, clients }
    }

    /// Operations that succeeded so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Waits until so many more have.
    pub fn wait_for(&self, more: u64) {
        let goal = self.done() + more;
        crate::eventually!(90 s, format!("{more} more operations succeed"), self.done() >= goal);
    }

    pub fn stop(self) -> History {
        self.stop.store(true, Ordering::Relaxed);
        let mut history = History::default();
        for client in self.clients {
            history.absorb(client.join().expect("clients do not panic"));
        }
        history
    }
}

/// The kinds of keys: a text and a number cannot be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    /// SET, DEL and INCR.
    Number,
    /// INCR only: nothing hides a count.
    Counter,
}

const KINDS: [Kind; KEYS_PER_GROUP] = [Kind::Text, Kind::Text, Kind::Number, Kind::Counter];

struct Group {
    tag: String,
    places: [Place; KEYS_PER_GROUP],
}

/// Where one key after the other is used.
#[derive(Default)]
struct Place {
    generation: AtomicU32,
    operations: AtomicU32,
    unknown: AtomicU32,
}

impl Group {
    fn new(tag: String) -> Group {
        Group { tag, places: Default::default() }
    }

    fn key(&self, place: usize) -> (Arc<str>, u32) {
        let generation = self.places[place].generation.load(Ordering::Acquire);
        (format!("{{{}}}:{place}:{generation}", self.tag).into(), generation)
    }

    /// Counts an operation; a key that has had enough is followed by the next one.
    fn note(&self, place: usize, generation: u32, operation: &Operation) {
        if KINDS[place] == Kind::Counter {
            return;
        }
        let is_unknown = operation.outcome == Outcome::Unknown && operation.action.is_write();
        let place = &self.places[place];
        let unknown = place.unknown.fetch_add(u32::from(is_unknown), Ordering::Relaxed) + u32::from(is_unknown);
        let operations = place.operations.fetch_add(1, Ordering::Relaxed) + 1;
        if (unknown >= UNKNOWN_PER_KEY || operations >= OPERATIONS_PER_KEY)
            && place
                .generation
                .compare_exchange(generation, generation + 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        {
            place.unknown.store(0, Ordering::Relaxed);
            place.operations.store(0, Ordering::Relaxed);
        }
    }
}

struct Client {
    number: u32,
    address: Address,
    keyspace: String,
    group: Arc<Group>,
    random: fastrand::Rng,
    start: Instant,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    /// No two values of a load are the same.
    numbers: Arc<AtomicU64>,
    history: History,
}

impl Client {
    fn run(mut self) -> History {
        let mut connection: Option<Connection> = None;
        while !self.stop.load(Ordering::Relaxed) {
            let Some(open) = connection.as_mut() else {
                connection = open_in(&self.address, &self.keyspace).ok();
                match connection.as_mut() {
                    // A connection without the timeout would wait for longer, no more.
                    Some(open) => drop(open.set_reply_timeout(REPLY_TIMEOUT)),
                    None => pause(RECONNECT_PAUSE),
                }
                continue;
            };
            let place = self.random.usize(..KEYS_PER_GROUP);
            let (key, generation) = self.group.key(place);
            let action = self.action(KINDS[place]);
            let command = action.words(&key);
            let invoked = self.start.elapsed();
            let reply = open.try_call(&command);
            let completed = self.start.elapsed();
            let outcome = match reply {
                Ok(reply) => outcome_of(&action, &reply).unwrap_or_else(|text| {
                    self.history.unexpected.push(text);
                    Outcome::Unknown
                }),
                Err(_) => {
                    self.history.breaks += 1;
                    connection = None;
                    Outcome::Unknown
                }
            };
            let operation = Operation { key, client: self.number, action, invoked, completed, outcome };
            self.group.note(place, generation, &operation);
            self.done.fetch_add(u64::from(operation.is_done()), Ordering::Relaxed);
            self.history.add(operation);
            pause(Duration::from_micros(self.random.u64(..PAUSE_MICROSECONDS_MAX)));
        }
        self.history
    }

    fn action(&mut self, kind: Kind) -> Action {
        let chance = self.random.u8(..100);
        let number = || self.numbers.fetch_add(1, Ordering::Relaxed);
        match kind {
            Kind::Text => match chance {
                0..30 => Action::Set(format!("v{}", number()).into_bytes()),
                30..55 => Action::Append(format!("+{}", number()).into_bytes()),
                55..65 => Action::Delete,
                _ => Action::Get,
            },
            Kind::Number => match chance {
                // Far enough apart that no count reaches the next one.
                0..15 => Action::Set((number() * 1_000_000).to_string().into_bytes()),
                15..60 => Action::Increment,
                60..70 => Action::Delete,
                _ => Action::Get,
            },
            Kind::Counter => match chance {
                0..70 => Action::Increment,
                _ => Action::Get,
            },
        }
    }
}
