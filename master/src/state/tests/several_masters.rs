//! Several masters, stores that come and go, and everything between them lost or late: nothing that was chosen is lost or doubled.

use std::collections::VecDeque;

use super::*;

mod resizes;

const MASTERS: usize = 3;
const STORES_MAX: u32 = 5;

/// What is under way between one master and one store, each way in order.
struct Wire {
    session: SessionId,
    reports: VecDeque<Report>,
    directives: VecDeque<Action>,
}

struct Cluster {
    masters: Vec<State>,
    disks: BTreeMap<u32, Disk>,
    /// What each store says of its copies.
    statuses: BTreeMap<u32, Vec<ShardStatus>>,
    /// Which leader a store has heard last, and when.
    heard: BTreeMap<u32, (Term, String, Duration)>,
    wires: BTreeMap<(usize, u32), Wire>,
    next: u64,
    now: Duration,
    confirmed: Vec<KeyspaceRecord>,
    refused: BTreeMap<RequestId, String>,
    /// What was ever chosen, as far as anybody knew.
    chosen: BTreeMap<(KeyspaceId, Epoch), KeyspaceRecord>,
    groups: BTreeMap<u64, HolderGroup>,
    leaders: BTreeSet<Term>,
}

impl Cluster {
    fn new(disks: BTreeMap<u32, Disk>) -> Self {
        let mut cluster = Self {
            masters: Vec::new(),
            disks,
            statuses: BTreeMap::new(),
            heard: BTreeMap::new(),
            wires: BTreeMap::new(),
            next: 0,
            now: Duration::ZERO,
            confirmed: Vec::new(),
            refused: BTreeMap::new(),
            chosen: BTreeMap::new(),
            groups: BTreeMap::new(),
            leaders: BTreeSet::new(),
        };
        cluster.masters = (0..MASTERS).map(|_| cluster.new_master()).collect();
        cluster
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn new_master(&mut self) -> State {
        let life = self.number();
        // Holders that are away are replaced soon; three of the first four stores begin, so that no two sets of them are apart.
        let limits = Limits { replace_after: Duration::from_secs(4), ..limits(2, 3) };
        State::new(limits, format!("master-{life}:1"), life)
    }

    fn report(&mut self, master: usize, store: u32) {
        if !self.wires.contains_key(&(master, store)) {
            let session = SessionId(self.number());
            let wire = Wire { session, reports: VecDeque::new(), directives: VecDeque::new() };
            self.wires.insert((master, store), wire);
        }
        let mut report = self.disks[&store].report(store);
        report.shards = self.statuses.get(&store).cloned().unwrap_or_default();
        if let Some((term, leader, at)) = self.heard.get(&store).filter(|(term, ..)| *term >= report.ballot.follows) {
            report.ballot.follows = *term;
            report.ballot.leader_heard = Some(self.now.saturating_sub(*at));
            report.ballot.leader.clone_from(leader);
        }
        self.wires.get_mut(&(master, store)).unwrap().reports.push_back(report);
    }

    /// The oldest report that is under way arrives.
    fn deliver_report(&mut self, master: usize, store: u32) {
        let Some(wire) = self.wires.get_mut(&(master, store)) else { return };
        let Some(report) = wire.reports.pop_front() else { return };
        let session = wire.session;
        self.apply(master, Event::reported(session, report));
    }

    fn deliver_directives(&mut self, master: usize, store: u32, count: usize) {
        let Some(wire) = self.wires.get_mut(&(master, store)) else { return };
        let count = count.min(wire.directives.len());
        for action in wire.directives.drain(..count).collect::<Vec<_>>() {
            let disk = self.disks.get_mut(&store).unwrap();
            let leader = match &action {
                Action::Acknowledge => self.masters[master].term(),
                Action::Prepare(term) => Some(*term),
                _ => None,
            };
            if let Some(term) = leader.filter(|term| *term >= disk.holder.promised()) {
                self.heard.insert(store, (term, self.masters[master].address().to_owned(), self.now));
            }
            disk.carry_out(action);
        }
    }

    fn apply(&mut self, master: usize, event: Event) {
        for effect in self.masters[master].apply(event, self.now) {
            let wire = self.wires.iter_mut().find(|((of, _), wire)| *of == master && wire.session == effect.session);
            match (wire, effect.action) {
                (Some((key, _)), Action::Refuse(Refusal::Replaced { .. })) => {
                    let key = *key;
                    self.wires.remove(&key);
                }
                (Some((_, wire)), action) => wire.directives.push_back(action),
                // Lost with its session.
                (None, _) => {}
            }
        }
        self.look(master);
    }

    /// A whole exchange with some stores, nothing lost.
    fn round(&mut self, master: usize, stores: u32) {
        for store in (1..=STORES_MAX).filter(|store| stores & 1 << store != 0) {
            if self.disks.contains_key(&store) {
                self.report(master, store);
                let reports = self.wires[&(master, store)].reports.len();
                (0..reports).for_each(|_| self.deliver_report(master, store));
                self.deliver_directives(master, store, usize::MAX);
            }
        }
    }

    fn lose_session(&mut self, master: usize, store: u32) {
        if let Some(wire) = self.wires.remove(&(master, store)) {
            if self.heard.get(&store).is_some_and(|(_, leader, _)| leader == self.masters[master].address()) {
                self.heard.remove(&store);
            }
            self.apply(master, Event::SessionEnded { session: wire.session });
        }
    }

    fn restart(&mut self, master: usize) {
        (1..=STORES_MAX).for_each(|store| drop(self.wires.remove(&(master, store))));
        self.masters[master] = self.new_master();
    }

    /// Notes what this master knows to be chosen, and compares it with what is known.
    fn look(&mut self, master: usize) {
        let state = &mut self.masters[master];
        self.leaders.extend(state.term());
        for (request, result) in state.take_answers() {
            match result {
                Ok(record) => self.confirmed.push(record),
                Err(error) => drop(self.refused.insert(request, error.to_string())),
            }
        }
        let adopted = state.leadership.records().filter(|(_, is_chosen)| *is_chosen).map(|(record, _)| record);
        let known = state.records.values().map(|known| &known.record);
        for record in adopted.chain(known).chain(self.disks.values().flat_map(|disk| disk.records.values())) {
            let first = self.chosen.entry((record.id, record.epoch)).or_insert_with(|| record.clone());
            assert!(!first.contradicts(record), "two records of one epoch: {first:?} {record:?}");
        }
        if let Some(group) = state.leadership.group() {
            let first = self.groups.entry(group.version).or_insert_with(|| group.clone());
            assert_eq!(first, group, "two groups of one version");
        }
    }

    /// Everybody lives and hears each other, until one leads and all stores keep the same; returns who leads.
    fn heal(&mut self) -> usize {
        for (master, store) in self.wires.keys().copied().collect::<Vec<_>>() {
            self.lose_session(master, store);
        }
        for _ in 0..200 {
            self.now += at_ms(250);
            for master in 0..MASTERS {
                self.round(master, u32::MAX);
            }
            let leaders: Vec<usize> = (0..MASTERS).filter(|master| self.masters[*master].term().is_some()).collect();
            let first = self.disks.values().next().unwrap();
            let is_done = |state: &State| {
                state.leadership.is_settled()
                    && state.leadership.records().all(|(record, _)| first.records.get(&record.id) == Some(record))
            };
            let are_equal = first.cluster != ClusterId(0) && self.disks.values().all(|disk| disk == first);
            if let [leader] = leaders[..]
                && are_equal
                && is_done(&self.masters[leader])
            {
                return leader;
            }
        }
        panic!("nobody leads in the end");
    }
}

#[derive(Clone, Debug)]
enum Move {
    Round {
        master: usize,
        stores: u32,
    },
    Report {
        master: usize,
        store: u32,
    },
    Arrives {
        master: usize,
        store: u32,
    },
    CarriesOut {
        master: usize,
        store: u32,
        count: usize,
    },
    SessionLost {
        master: usize,
        store: u32,
    },
    MasterRestarts(usize),
    /// The clock goes on for all; one of the masters notices by itself.
    TimePasses {
        master: usize,
        ms: u64,
    },
    Alter {
        master: usize,
        fsync: Fsync,
    },
    Create {
        master: usize,
        name: u8,
    },
    Drop {
        master: usize,
        name: u8,
    },
    StoreJoins,
}

fn a_move() -> impl Strategy<Value = Move> {
    let (master, store) = (|| 0..MASTERS, || 1..=STORES_MAX);
    prop_oneof![
        12 => (master(), 0u32..64).prop_map(|(master, stores)| Move::Round { master, stores }),
        4 => (master(), store()).prop_map(|(master, store)| Move::Report { master, store }),
        4 => (master(), store()).prop_map(|(master, store)| Move::Arrives { master, store }),
        4 => (master(), store(), 1usize..4)
            .prop_map(|(master, store, count)| Move::CarriesOut { master, store, count }),
        2 => (master(), store()).prop_map(|(master, store)| Move::SessionLost { master, store }),
        1 => master().prop_map(Move::MasterRestarts),
        6 => (master(), 0u64..1_500).prop_map(|(master, ms)| Move::TimePasses { master, ms }),
        2 => (master(), prop::sample::select(Fsync::ALL.to_vec()))
            .prop_map(|(master, fsync)| Move::Alter { master, fsync }),
        2 => (master(), 0u8..3).prop_map(|(master, name)| Move::Create { master, name }),
        1 => (master(), 0u8..3).prop_map(|(master, name)| Move::Drop { master, name }),
        1 => Just(Move::StoreJoins),
    ]
}

fn run(disks: BTreeMap<u32, Disk>, moves: Vec<Move>) {
    let mut cluster = Cluster::new(disks);
    let mut may_be_dropped: BTreeSet<String> = BTreeSet::new();
    for step in moves {
        cluster.now += at_ms(1);
        let request = RequestId(cluster.number());
        let is_there = |cluster: &Cluster, store: &u32| cluster.disks.contains_key(store);
        match step {
            Move::Round { master, stores } => cluster.round(master, stores),
            Move::Report { master, store } if is_there(&cluster, &store) => cluster.report(master, store),
            Move::Report { .. } => {}
            Move::Arrives { master, store } => cluster.deliver_report(master, store),
            Move::CarriesOut { master, store, count } => cluster.deliver_directives(master, store, count),
            Move::SessionLost { master, store } => cluster.lose_session(master, store),
            Move::MasterRestarts(master) => cluster.restart(master),
            Move::TimePasses { master, ms } => {
                cluster.now += at_ms(ms);
                cluster.apply(master, Event::TimePassed);
            }
            Move::Alter { master, fsync } => {
                let changes = Settings { fsync: Some(fsync), ..Settings::default() };
                let alteration = Alteration { name: "0".to_owned(), changes, copies: None, expected_epoch: None };
                cluster.apply(master, Event::AlterRequested { request, alteration });
            }
            Move::Create { master, name } => {
                let (name, settings) = (format!("k{name}"), Settings::default());
                let creation = Creation { name, shards: Some(2), copies: 1, settings, may_exist: false };
                cluster.apply(master, Event::CreateRequested { request, creation });
            }
            Move::Drop { master, name } => {
                let name = format!("k{name}");
                may_be_dropped.insert(name.clone());
                cluster.apply(master, Event::DropRequested { request, name });
            }
            Move::StoreJoins => {
                let next = cluster.disks.len() as u32 + 1;
                if next <= STORES_MAX {
                    cluster.disks.insert(next, Disk::default());
                }
            }
        }
    }
    let leader = cluster.heal();
    let records: BTreeMap<KeyspaceId, KeyspaceRecord> =
        cluster.masters[leader].leadership.records().map(|(record, _)| (record.id, record.clone())).collect();
    for (id, epoch) in cluster.chosen.keys() {
        assert!(records[id].epoch >= *epoch, "what was chosen is lost");
    }
    for record in &cluster.confirmed {
        let last = &records[&record.id];
        let is_kept = last.epoch > record.epoch || last == record || last.dropped && record.dropped;
        assert!(is_kept, "what was answered is lost: {record:?}, {last:?}");
        let may_be_gone = record.dropped || may_be_dropped.contains(&record.name);
        assert!(may_be_gone || !last.dropped, "it was never to be dropped: {record:?}");
    }
    let living: Vec<&str> = records.values().filter(|it| !it.dropped).map(|it| it.name.as_str()).collect();
    let names: BTreeSet<&str> = living.iter().copied().collect();
    assert_eq!(names.len(), living.len(), "a name twice");
    if std::env::var_os("VASTO_SHOW").is_some() {
        let (leaders, groups) = (cluster.leaders.len(), cluster.groups.len());
        eprintln!(
            "{leaders} leaders, {groups} groups, {} records, {} answers",
            cluster.chosen.len(),
            cluster.confirmed.len()
        );
    }
}

proptest! {
    #[test]
    fn nothing_chosen_is_lost_or_doubled_in_a_new_cluster(moves in prop::collection::vec(a_move(), 0..200)) {
        run(blank(1..=4), moves);
    }

    #[test]
    fn nothing_is_lost_when_a_cluster_gets_its_first_term(moves in prop::collection::vec(a_move(), 0..120)) {
        let (_, mut disks) = bootstrapped(2, 3);
        for disk in disks.values_mut() {
            (disk.holder, disk.answers) = (Holder::default(), Vec::new());
        }
        run(disks, moves);
    }

    #[test]
    fn nothing_chosen_is_lost_or_doubled_while_the_group_changes(moves in prop::collection::vec(a_move(), 0..200)) {
        let (_, disks) = bootstrapped(1, 1);
        run(disks, moves);
    }
}
