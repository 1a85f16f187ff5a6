//! Runs one phase of the benchmark: threads, their connections, the start at one moment, progress, the early end.

use std::cell::{Cell, RefCell};
use std::io::{IsTerminal, Write};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::Context;
use futures_util::StreamExt;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;

use super::arguments::ServerSettings;
use super::command::Encoder;
use super::connection::{Client, Lane};
use super::ledger::share;
use super::tally::{Progress, Tally};
use super::timetable::{self, Sleepers, Timetable};
use super::traffic::Traffic;

/// Connections that one thread opens at the same time: a listening queue of 128 takes them without loss.
const CONNECTS_IN_FLIGHT_MAX: usize = 100;

const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// How the requests of a phase are sent; which ones they are is the traffic's part.
#[derive(Clone, Debug)]
pub struct Phase {
    pub name: &'static str,
    pub server: ServerSettings,
    pub encoder: Encoder,
    pub clients: usize,
    pub threads: usize,
    pub pipeline: usize,
    pub rate: Option<f64>,
    pub duration: Option<Duration>,
    /// Requests in all, where known, for the progress line.
    pub requests: Option<u64>,
    pub pause_after_failure: Option<Duration>,
    pub shows_progress: bool,
}

impl Phase {
    /// Runs the traffic of each thread to its end; one runtime per thread, nothing is shared but the counters.
    ///
    /// Must not be called from within a runtime. The first Ctrl-C sets `stop`, the second ends the process.
    pub fn run<T: Traffic + Send + 'static>(
        &self,
        traffics: Vec<T>,
        stop: &Arc<AtomicBool>,
    ) -> anyhow::Result<(Tally, Vec<T>)> {
        assert_eq!(traffics.len(), self.threads, "each thread has its traffic");
        let barrier = Arc::new(Barrier::new(self.threads + 1));
        // Nothing is ever sent: the receiver sees the end when the last thread drops its sender.
        let (alive, all_ended) = mpsc::channel::<()>(1);
        let mut handles = Vec::new();
        let mut progress = Vec::new();
        let mut pacers = Vec::new();
        for (thread, traffic) in traffics.into_iter().enumerate() {
            let worker = Worker {
                phase: self.clone(),
                thread,
                progress: Arc::default(),
                stop: Arc::clone(stop),
                pacer: Arc::default(),
                barrier: Arc::clone(&barrier),
            };
            progress.push(Arc::clone(&worker.progress));
            pacers.push(Arc::clone(&worker.pacer));
            let alive = alive.clone();
            let builder = std::thread::Builder::new().name(format!("bench-{thread}"));
            handles.push(builder.spawn(move || {
                let result = worker.run(traffic);
                drop(alive);
                result
            })?);
        }
        drop(alive);
        barrier.wait();
        let start = Instant::now();
        let over = Arc::new(AtomicBool::new(false));
        let pacer = self.rate.map(|rate| {
            let over = Arc::clone(&over);
            std::thread::spawn(move || timetable::pace(rate, start, &over, &pacers))
        });
        self.watch(all_ended, &progress, stop)?;
        over.store(true, Ordering::Relaxed);
        if let Some(pacer) = pacer {
            pacer.thread().unpark();
            pacer.join().expect("the pacer does not panic");
        }
        let mut sum = Tally::default();
        let mut traffics = Vec::new();
        for handle in handles {
            let (tally, traffic) = handle.join().expect("a thread of the load does not panic")?;
            sum.merge(tally);
            traffics.push(traffic);
        }
        Ok((sum, traffics))
    }

    /// Shows the progress and hears Ctrl-C until all threads have ended.
    fn watch(
        &self,
        mut all_ended: mpsc::Receiver<()>,
        progress: &[Arc<Progress>],
        stop: &Arc<AtomicBool>,
    ) -> anyhow::Result<()> {
        let runtime = Builder::new_current_thread().enable_all().build().context("start a runtime")?;
        let shows = self.shows_progress && std::io::stderr().is_terminal();
        runtime.block_on(async {
            let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + PROGRESS_INTERVAL, PROGRESS_INTERVAL);
            let mut before = 0;
            loop {
                tokio::select! {
                    _ = all_ended.recv() => break,
                    _ = tick.tick(), if shows => before = self.show(progress, before),
                    result = tokio::signal::ctrl_c() => {
                        result.context("listen for Ctrl-C")?;
                        if stop.swap(true, Ordering::Relaxed) {
                            std::process::exit(130);
                        }
                    }
                }
            }
            if shows {
                // Makes room for what is printed next.
                write!(std::io::stderr(), "\r\x1b[K").ok();
            }
            Ok(())
        })
    }

    fn show(&self, progress: &[Arc<Progress>], before: u64) -> u64 {
        let sum = |counter: fn(&Progress) -> &std::sync::atomic::AtomicU64| -> u64 {
            progress.iter().map(|progress| Progress::read(counter(progress))).sum()
        };
        let answers = sum(|progress| &progress.answers);
        let errors = sum(|progress| &progress.errors);
        let connections = sum(|progress| &progress.connections);
        let share = match self.requests {
            Some(requests) if requests > 0 => format!("{:3.0} %", (answers + errors) as f64 * 100.0 / requests as f64),
            Some(_) | None => "     ".into(),
        };
        // A terminal that went away is no reason to stop measuring.
        write!(
            std::io::stderr(),
            "\r{:9} {share} {:>10} ops/s {answers:>12} answers {errors:>6} errors {connections:>6} connections\x1b[K",
            self.name,
            answers - before,
        )
        .ok();
        answers
    }
}

/// What one thread of the load needs.
struct Worker {
    phase: Phase,
    thread: usize,
    progress: Arc<Progress>,
    stop: Arc<AtomicBool>,
    pacer: Arc<Notify>,
    barrier: Arc<Barrier>,
}

impl Worker {
    fn run<T: Traffic + 'static>(self, traffic: T) -> anyhow::Result<(Tally, T)> {
        let runtime = match Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
            Ok(runtime) => runtime,
            Err(error) => {
                self.barrier.wait();
                return Err(error).context("start a runtime");
            }
        };
        runtime.block_on(self.drive(traffic))
    }

    async fn drive<T: Traffic + 'static>(self, traffic: T) -> anyhow::Result<(Tally, T)> {
        let Phase { threads, clients, rate, .. } = self.phase;
        let own_clients = share(clients as u64, threads as u64, self.thread as u64);
        let lane = Rc::new(Lane {
            server: self.phase.server,
            encoder: self.phase.encoder,
            pipeline: self.phase.pipeline,
            traffic: RefCell::new(traffic),
            tally: RefCell::default(),
            progress: self.progress,
            stop: self.stop,
            start: Cell::new(Instant::now()),
            duration_ns: self.phase.duration.map_or(u64::MAX, |duration| duration.as_nanos() as u64),
            timetable: rate.map(|rate| Timetable::new(rate, threads as u64, self.thread as u64, own_clients)),
            sleepers: RefCell::new(Sleepers::new(own_clients as usize)),
            pause_after_failure: self.phase.pause_after_failure,
        });
        let connected = futures_util::stream::iter(0..own_clients)
            .map(|index| {
                let number = self.thread as u64 + index * threads as u64;
                let client = Client::new(Rc::clone(&lane), index as usize, number);
                async move {
                    let link = client.connect().await.ok();
                    (client, link)
                }
            })
            .buffer_unordered(CONNECTS_IN_FLIGHT_MAX)
            .collect::<Vec<_>>()
            .await;
        self.barrier.wait();
        lane.start.set(Instant::now());
        let mut clients = JoinSet::new();
        for (client, link) in connected {
            clients.spawn_local(client.run(link));
        }
        // Ends with the clients; the pacing never ends by itself.
        tokio::select! {
            _ = clients.join_all() => {}
            _ = wake_sleepers(&lane, &self.pacer), if rate.is_some() => {}
        }
        lane.tally.borrow_mut().elapsed = lane.start.get().elapsed();
        let lane = Rc::into_inner(lane).expect("all clients have ended");
        Ok((lane.tally.into_inner(), lane.traffic.into_inner()))
    }
}

async fn wake_sleepers<T: Traffic>(lane: &Lane<T>, pacer: &Notify) {
    let timetable = lane.timetable.expect("only called with a rate");
    loop {
        pacer.notified().await;
        let now_ns = lane.now_ns();
        let mut sleepers = lane.sleepers.borrow_mut();
        if lane.is_over(now_ns) {
            sleepers.wake_all();
        } else {
            sleepers.wake_due(timetable.due_count(now_ns));
        }
    }
}
