//! The master over gRPC on loopback, with stores and gateways that are a few lines of test.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use vasto_master::{Config, Master};
use vasto_proto::pb::directive::Kind;
use vasto_proto::pb::master_client::MasterClient;
use vasto_proto::topology::ballot::{Accepted, Answer, Holder, Request, Term, Versioned};
use vasto_proto::topology::entry::GROUP;
use vasto_proto::topology::{Entry, entry};
use vasto_proto::{PROTOCOL_VERSION, net, pb};

/// Far above what any step here takes; only a failing test waits for so long.
const PATIENCE: Duration = Duration::from_secs(20);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("waited {PATIENCE:?} for {what}"))
}

struct Running {
    address: SocketAddr,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    async fn start(config: Config) -> Running {
        let bound = Master::bind(Config { listen: "127.0.0.1:0".parse().unwrap(), ..config }).await.unwrap();
        let (address, shutdown) = (bound.address(), CancellationToken::new());
        let run = bound.run(shutdown.clone());
        #[expect(clippy::disallowed_methods, reason = "awaited in `stop`")]
        let task = tokio::spawn(async move { run.await.unwrap() });
        Running { address, shutdown, task }
    }

    async fn client(&self) -> MasterClient<Channel> {
        let endpoint = net::endpoint(&self.address.to_string()).unwrap();
        MasterClient::new(within("a connection", endpoint.connect()).await.unwrap())
    }

    async fn watch(&self) -> Watch {
        let request = pb::WatchRequest { protocol_version: PROTOCOL_VERSION };
        Watch(self.client().await.watch_topology(request).await.unwrap().into_inner())
    }

    /// Streams are open: they must not hold it up.
    async fn stop(self) {
        self.shutdown.cancel();
        within("the master to stop", self.task).await.unwrap();
    }
}

struct Watch(Streaming<pb::Topology>);

impl Watch {
    async fn until(&mut self, what: &str, condition: impl Fn(&pb::Topology) -> bool) -> pb::Topology {
        within(what, async {
            loop {
                let topology = self.0.message().await.unwrap().expect("the stream goes on");
                if condition(&topology) {
                    return topology;
                }
            }
        })
        .await
    }
}

/// What a store remembers, and its session.
#[derive(Clone, Debug, Default)]
struct Store {
    id: u32,
    cluster: u64,
    records: Vec<pb::KeyspaceRecord>,
    holder: Holder<Entry>,
}

struct Session {
    reports: mpsc::Sender<pb::StoreReport>,
    directives: Streaming<pb::Directive>,
}

impl Store {
    fn report(&self) -> pb::StoreReport {
        pb::StoreReport {
            store_id: self.id,
            address: format!("127.0.0.1:{}", 1000 + self.id),
            cluster_id: self.cluster,
            protocol_version: PROTOCOL_VERSION,
            records: self.records.clone(),
            has_records: true,
            free_disk_bytes: 1 << 40,
            failure: String::new(),
            fsync: pb::Fsync::EverySecond.into(),
            follows: Some(self.holder.promised().into()),
            group: self.holder.accepted_of(GROUP).map(Into::into),
            ..pb::StoreReport::default()
        }
    }

    async fn register(&self, master: &Running) -> Session {
        let (reports, outgoing) = mpsc::channel(8);
        reports.send(self.report()).await.unwrap();
        let response = master.client().await.register(ReceiverStream::new(outgoing)).await.unwrap();
        Session { reports, directives: response.into_inner() }
    }

    /// Carries out one directive; returns whether it did anything.
    async fn carry_out(&mut self, session: &mut Session, kind: Kind) -> bool {
        let mut answers = Vec::new();
        match kind {
            Kind::Welcome(welcome) => self.cluster = welcome.cluster_id,
            Kind::PutRecord(record) => {
                self.records.retain(|known| known.keyspace_id != record.keyspace_id);
                self.records.push(record);
            }
            Kind::Prepare(prepare) => {
                let chosen = self
                    .records
                    .iter()
                    .cloned()
                    .map(|record| Accepted { term: Term::NONE, record: Entry::Keyspace(record.try_into().unwrap()) });
                let mut answer = self.holder.answer(Request::Prepare { term: entry::term(prepare.term) });
                if let Ok(Answer::Promised { accepted, .. }) = &mut answer {
                    let known: Vec<_> = accepted.iter().map(|it| it.record.keyspace()).collect();
                    accepted.extend(chosen.filter(|it| !known.contains(&it.record.keyspace())));
                }
                answers.push((&answer).into());
            }
            Kind::Accept(accept) => {
                for entry in accept.entries {
                    let (term, record) = (entry::term(accept.term), Entry::from_message(entry).unwrap().unwrap());
                    answers.push((&self.holder.answer(Request::Accept(Accepted { term, record }))).into());
                }
            }
            Kind::HeartbeatAck(_) | Kind::Peers(_) => return false,
        }
        session.reports.send(pb::StoreReport { answers, ..self.report() }).await.unwrap();
        true
    }
}

/// Carries out directives until all hold a record and know their cluster.
async fn join(stores: &mut [Store], sessions: &mut [Session]) {
    within("all stores to join", async {
        while stores.iter().any(|store| store.cluster == 0 || store.records.is_empty()) {
            for (store, session) in stores.iter_mut().zip(&mut *sessions) {
                let next = tokio::time::timeout(Duration::from_millis(20), session.next()).await;
                if let Ok(kind) = next {
                    store.carry_out(session, kind.unwrap()).await;
                }
            }
        }
    })
    .await;
}

impl Session {
    async fn next(&mut self) -> Result<Kind, Status> {
        let directive = within("a directive", self.directives.message()).await?;
        Ok(directive.expect("the session goes on").kind.unwrap())
    }

    async fn refusal(&mut self) -> Status {
        loop {
            if let Err(status) = self.next().await {
                return status;
            }
        }
    }
}

#[tokio::test]
async fn a_cluster_begins_loses_its_master_and_gets_another() {
    let config = Config { bootstrap_shards: 3, ..Config::default() };
    let master = Running::start(config.clone()).await;
    let mut watch = master.watch().await;
    watch.until("the first snapshot", |topology| topology.waiting_for.starts_with("0 of 3 stores")).await;

    let mut stores: Vec<Store> = (1..=3).map(|id| Store { id, ..Store::default() }).collect();
    let mut sessions = Vec::new();
    for store in &stores {
        sessions.push(store.register(&master).await);
    }
    join(&mut stores, &mut sessions).await;
    // The record is confirmed by all.
    for (store, session) in stores.iter().zip(&sessions) {
        session.reports.send(store.report()).await.unwrap();
    }
    let served = watch.until("keyspace 0", |topology| !topology.keyspaces.is_empty()).await;
    assert_eq!((served.waiting_for.as_str(), served.keyspaces[0].shards.len()), ("", 3));
    assert_eq!(served.keyspaces[0], stores[0].records[0]);

    master.stop().await;
    let master = Running::start(config).await;
    let mut watch = master.watch().await;
    let _session = stores[1].register(&master).await;
    let again = watch.until("the adopted record", |topology| !topology.keyspaces.is_empty()).await;
    assert_eq!((again.cluster_id, &again.keyspaces), (served.cluster_id, &served.keyspaces));
    assert_eq!(again.stores.iter().filter(|store| store.up).count(), 1);

    let stranger = Store { id: 9, cluster: 5, ..Store::default() };
    let status = stranger.register(&master).await.refusal().await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    let ours = format!("{:016x}", served.cluster_id);
    assert!(status.message().contains("0000000000000005") && status.message().contains(&ours), "{status}");
    master.stop().await;
}

#[tokio::test]
async fn a_silent_store_and_an_ended_one_are_down() {
    let master = Running::start(Config { silence_max: Duration::from_millis(600), ..Config::default() }).await;
    let mut store = Store { id: 7, ..Store::default() };
    let mut session = store.register(&master).await;
    join(std::slice::from_mut(&mut store), std::slice::from_mut(&mut session)).await;
    let mut watch = master.watch().await;
    let is_up = |topology: &pb::Topology| topology.stores.iter().any(|store| store.store_id == 7 && store.up);
    // It says no more from here on, but its stream is open.
    watch.until("silence noticed", |topology| !is_up(topology) && !topology.keyspaces.is_empty()).await;
    session.reports.send(store.report()).await.unwrap();
    watch.until("the store up", is_up).await;
    drop(session);
    watch.until("the end noticed", |topology| !is_up(topology)).await;
    master.stop().await;
}

#[tokio::test]
async fn a_watcher_that_does_not_read_holds_up_nobody() {
    let master = Running::start(Config::default()).await;
    let _idle = master.watch().await;
    let mut store = Store { id: 1, ..Store::default() };
    let mut session = store.register(&master).await;
    join(std::slice::from_mut(&mut store), std::slice::from_mut(&mut session)).await;
    for round in 0..2_000u64 {
        let free_disk_bytes = if round % 2 == 0 { 1 << 30 } else { 1 << 40 };
        session.reports.send(pb::StoreReport { free_disk_bytes, ..store.report() }).await.unwrap();
        // Each report is answered, else the session would be ended for not reading.
        session.next().await.unwrap();
    }
    let mut watch = master.watch().await;
    watch.until("the present state", |topology| topology.version > 1_000).await;
    master.stop().await;
}

/// A link that goes silent without an end, like a partition: both ends find out by themselves, though neither has anything to say.
#[tokio::test]
async fn both_ends_of_a_silent_link_give_it_up() {
    let master = Running::start(Config::default()).await;
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = proxy.local_addr().unwrap().to_string();
    let opening = async {
        let (gateway, _) = proxy.accept().await.unwrap();
        (gateway, TcpStream::connect(master.address).await.unwrap())
    };
    let connecting = net::endpoint(&address).unwrap();
    let (channel, (mut gateway, mut upstream)) = tokio::join!(connecting.connect(), opening);
    let mut watch = {
        let request = pb::WatchRequest { protocol_version: PROTOCOL_VERSION };
        let mut client = MasterClient::new(channel.unwrap());
        let forwarding = tokio::io::copy_bidirectional(&mut gateway, &mut upstream);
        tokio::select! {
            ended = forwarding => panic!("the link ended: {ended:?}"),
            watch = async {
                let mut watch = client.watch_topology(request).await.unwrap().into_inner();
                watch.message().await.unwrap().expect("a first snapshot");
                watch
            } => watch,
        }
    };
    // From here on nothing is forwarded, and nobody is told.
    let gave_up = async {
        let mut heard = [0; 1024];
        while upstream.read(&mut heard).await.is_ok_and(|bytes| bytes > 0) {}
    };
    let (ended, ()) = within("both ends to give up", async { tokio::join!(watch.message(), gave_up) }).await;
    ended.unwrap_err();
    drop(gateway);
    master.stop().await;
}

/// One leads, the other shows what stores tell it and names the leader; when the leader has gone the other takes over.
#[tokio::test]
async fn the_second_master_stands_by_and_takes_over() {
    let masters = [Running::start(Config::default()).await, Running::start(Config::default()).await];
    let mut store = Store { id: 1, ..Store::default() };
    let mut session = store.register(&masters[0]).await;
    join(std::slice::from_mut(&mut store), std::slice::from_mut(&mut session)).await;
    let addresses = masters.each_ref().map(|master| master.address.to_string());

    let led_by = |store: &Store, leader: usize| pb::StoreReport {
        leader_heard_ms: Some(0),
        leader: addresses[leader].clone(),
        masters: addresses.to_vec(),
        ..store.report()
    };
    let mut second = store.register(&masters[1]).await;
    second.reports.send(led_by(&store, 0)).await.unwrap();
    let mut watch = masters[1].watch().await;
    let heard = watch
        .until("the leader heard of", |topology| topology.leadership.as_ref().unwrap().address == addresses[0])
        .await;
    let leadership = heard.leadership.unwrap();
    assert_eq!((leadership.is_own, leadership.standbys.as_slice()), (false, &addresses[1..]));
    assert_eq!(heard.keyspaces, store.records);
    let create = pb::CreateKeyspaceRequest {
        protocol_version: PROTOCOL_VERSION,
        name: "a".to_owned(),
        ..pb::CreateKeyspaceRequest::default()
    };
    let status = masters[1].client().await.create_keyspace(create.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted, "{status}");
    assert!(status.message().contains(&format!("the master at {} leads", addresses[0])), "{status}");

    // The first leader is heard no more.
    second.reports.send(store.report()).await.unwrap();
    watch.until("nobody heard of", |topology| topology.leadership.as_ref().unwrap().address != addresses[0]).await;
    let [first, master] = masters;
    let mut client = master.client().await;
    let mut creating = std::pin::pin!(async move { client.create_keyspace(create).await });
    let created = within("the keyspace", async {
        loop {
            tokio::select! {
                created = &mut creating => match created {
                    Ok(created) => return created.into_inner(),
                    Err(status) => panic!("{status}"),
                },
                kind = second.next() => {
                    let kind = kind.unwrap();
                    if !store.carry_out(&mut second, kind).await {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        second.reports.send(store.report()).await.unwrap();
                    }
                }
            }
        }
    })
    .await;
    assert_eq!(created.record.unwrap().name, "a");
    // What the first one hears now makes it step back.
    let mut watch = first.watch().await;
    session.reports.send(led_by(&store, 1)).await.unwrap();
    let heard = watch
        .until("the first steps back", |topology| topology.leadership.as_ref().unwrap().address == addresses[1])
        .await;
    assert!(!heard.leadership.unwrap().is_own);
    first.stop().await;
    master.stop().await;
}

#[tokio::test]
async fn other_protocol_versions_are_refused() {
    let master = Running::start(Config::default()).await;
    let request = pb::WatchRequest { protocol_version: PROTOCOL_VERSION + 2 };
    let status = master.client().await.watch_topology(request).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let (reports, outgoing) = mpsc::channel(1);
    let report = pb::StoreReport { protocol_version: PROTOCOL_VERSION + 2, ..Store::default().report() };
    reports.send(report).await.unwrap();
    let response = master.client().await.register(ReceiverStream::new(outgoing)).await.unwrap();
    let status = Session { reports, directives: response.into_inner() }.refusal().await;
    assert!(status.message().contains("protocol version"), "{status}");
    master.stop().await;
}
