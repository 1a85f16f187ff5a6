//! One client of the load: sends its requests, reads the answers, connects again when the server goes away.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use anyhow::bail;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Sleep;

use super::arguments::{ServerSettings, Target};
use super::command::{self, Encoder, Request, Verb};
use super::reply::{self, Reply};
use super::tally::{Progress, Tally};
use super::timetable::{Sleepers, Timetable};
use super::traffic::{Outcome, Traffic};

/// A batch is cut here, so that a deep pipeline of huge values does not fill the memory.
const OUTPUT_BYTES_MAX: usize = 16 << 20;

const INPUT_BYTES_MIN: usize = 4 << 10;
const INPUT_BYTES_START_MAX: usize = 128 << 10;

const RECONNECT_PAUSE_MIN: Duration = Duration::from_millis(10);
const RECONNECT_PAUSE_MAX: Duration = Duration::from_millis(500);

/// What was due this shortly before the end was not late: a wake-up takes about as long.
const UNSENT_GRACE_NS: u64 = 1_000_000;

/// A socket of either kind.
#[derive(Debug)]
pub enum Link {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Link {
    fn poll_read(&mut self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }

    fn poll_write(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    pub async fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.write_all(bytes).await,
            Self::Unix(stream) => stream.write_all(bytes).await,
        }
    }

    pub async fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        std::future::poll_fn(|context| {
            let mut buffer = ReadBuf::new(bytes);
            ready!(self.poll_read(context, &mut buffer))?;
            Poll::Ready(Ok(buffer.filled().len()))
        })
        .await
    }
}

/// Connects and sets the connection up; within the timeout.
pub async fn connect(server: &ServerSettings, target: &Target) -> anyhow::Result<Link> {
    match tokio::time::timeout(server.timeout, connect_untimed(server, target)).await {
        Ok(result) => result,
        Err(_) => bail!("timeout"),
    }
}

async fn connect_untimed(server: &ServerSettings, target: &Target) -> anyhow::Result<Link> {
    let mut link = match target {
        Target::Tcp(address) => {
            let stream = TcpStream::connect(address.as_str()).await?;
            stream.set_nodelay(true)?;
            Link::Tcp(stream)
        }
        Target::Unix(path) => Link::Unix(UnixStream::connect(path).await?),
    };
    let mut output = Vec::new();
    let mut missing = 0;
    if server.protocol == 3 {
        command::append_words(&["HELLO", "3"], &mut output);
        missing += 1;
    }
    if server.database != 0 {
        command::append_words(&["SELECT", &server.database.to_string()], &mut output);
        missing += 1;
    }
    link.write_all(&output).await?;
    let mut input = Vec::new();
    let mut chunk = [0; 4096];
    while missing > 0 {
        match reply::parse(&input)? {
            Some((Reply::Error(text), _)) => bail!("refused: {}", String::from_utf8_lossy(text)),
            Some((Reply::Push, end)) => drop(input.drain(..end)),
            Some((_, end)) => {
                drop(input.drain(..end));
                missing -= 1;
            }
            None => match link.read(&mut chunk).await? {
                0 => bail!("closed by the server"),
                length => input.extend_from_slice(&chunk[..length]),
            },
        }
    }
    Ok(link)
}

/// What the connections of one thread share.
#[derive(Debug)]
pub struct Lane<T> {
    pub server: ServerSettings,
    pub encoder: Encoder,
    pub pipeline: usize,
    pub traffic: RefCell<T>,
    pub tally: RefCell<Tally>,
    pub progress: Arc<Progress>,
    /// Set from outside to end early.
    pub stop: Arc<AtomicBool>,
    pub start: Cell<Instant>,
    pub duration_ns: u64,
    pub timetable: Option<Timetable>,
    pub sleepers: RefCell<Sleepers>,
    /// How long a client waits after a batch with a failure in it, when failed requests are sent again.
    pub pause_after_failure: Option<Duration>,
}

impl<T: Traffic> Lane<T> {
    pub fn now_ns(&self) -> u64 {
        self.start.get().elapsed().as_nanos() as u64
    }

    pub fn is_over(&self, now_ns: u64) -> bool {
        now_ns >= self.duration_ns || self.stop.load(Ordering::Relaxed)
    }

    /// Answers of one batch may take this much room; a guess for the first buffer.
    fn input_bytes(&self) -> usize {
        self.pipeline
            .saturating_mul(self.encoder.request_bytes_max())
            .clamp(INPUT_BYTES_MIN, INPUT_BYTES_START_MAX)
            .next_power_of_two()
    }
}

/// One client over all its connections.
#[derive(Debug)]
pub struct Client<T> {
    lane: Rc<Lane<T>>,
    /// Its place among the clients of its thread, and among all.
    index: usize,
    number: u64,
    target_index: usize,
    /// Commands of the timetable that were sent.
    sent: u64,
    /// The traffic has no more requests.
    exhausted: bool,
}

impl<T: Traffic> Client<T> {
    pub fn new(lane: Rc<Lane<T>>, index: usize, number: u64) -> Self {
        let target_index = number as usize % lane.server.targets.len();
        Self { lane, index, number, target_index, sent: 0, exhausted: false }
    }

    pub async fn connect(&self) -> anyhow::Result<Link> {
        connect(&self.lane.server, &self.lane.server.targets[self.target_index]).await
    }

    /// Works until there is nothing more to send; `link` is the first connection, if it could be made.
    pub async fn run(mut self, mut link: Option<Link>) {
        let lane = Rc::clone(&self.lane);
        loop {
            let connected = match link.take() {
                Some(link) => link,
                None => match self.connect_again().await {
                    Some(link) => {
                        // What was under way may have to be sent again.
                        self.exhausted = false;
                        link
                    }
                    None => break,
                },
            };
            Progress::add(&lane.progress.connections, 1);
            let mut session = Session::new(&mut self, connected);
            let ended = std::future::poll_fn(|context| session.poll(context)).await;
            session.abandon();
            Progress::subtract(&lane.progress.connections, 1);
            match ended {
                Ended::Finished => break,
                Ended::Lost(reason) => {
                    *lane.tally.borrow_mut().lost_connections.entry(reason).or_default() += 1;
                    self.target_index = (self.target_index + 1) % lane.server.targets.len();
                }
            }
        }
        if let Some(timetable) = &lane.timetable {
            let end_ns = lane.now_ns().min(lane.duration_ns).saturating_sub(UNSENT_GRACE_NS);
            let due = timetable.due_count_of(self.index as u64, end_ns);
            if !self.exhausted {
                lane.tally.borrow_mut().unsent += due.saturating_sub(self.sent);
            }
        }
    }

    async fn connect_again(&mut self) -> Option<Link> {
        let lane = Rc::clone(&self.lane);
        let lost_at = Instant::now();
        let mut pause = RECONNECT_PAUSE_MIN;
        while !lane.is_over(lane.now_ns()) {
            match self.connect().await {
                Ok(link) => {
                    lane.tally.borrow_mut().reconnects += 1;
                    return Some(link);
                }
                Err(_) if lost_at.elapsed() > lane.server.reconnect_for => {
                    lane.tally.borrow_mut().clients_given_up += 1;
                    return None;
                }
                Err(_) => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RECONNECT_PAUSE_MAX);
                    self.target_index = (self.target_index + 1) % lane.server.targets.len();
                }
            }
        }
        None
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Finished,
    Lost(String),
}

#[derive(Debug)]
struct Pending {
    request: Request,
    /// When it was sent, or was due by the timetable.
    since_ns: u64,
}

/// One connection of a client, as a state machine: fill, write, read, until nothing moves.
struct Session<'a, T> {
    client: &'a mut Client<T>,
    lane: Rc<Lane<T>>,
    link: Link,
    output: Vec<u8>,
    written: usize,
    /// `input[parsed..filled]` was read and not yet understood.
    input: Vec<u8>,
    parsed: usize,
    filled: usize,
    pending: VecDeque<Pending>,
    /// Since when the server owes an answer and gave none.
    waiting_since_ns: u64,
    watchdog: Pin<Box<Sleep>>,
    watchdog_is_set: bool,
    pause: Option<Pin<Box<Sleep>>>,
}

impl<'a, T: Traffic> Session<'a, T> {
    fn new(client: &'a mut Client<T>, link: Link) -> Self {
        let lane = Rc::clone(&client.lane);
        Self {
            input: vec![0; lane.input_bytes()],
            pending: VecDeque::with_capacity(lane.pipeline.min(1024)),
            watchdog: Box::pin(tokio::time::sleep(lane.server.timeout)),
            client,
            lane,
            link,
            output: Vec::new(),
            written: 0,
            parsed: 0,
            filled: 0,
            waiting_since_ns: 0,
            watchdog_is_set: false,
            pause: None,
        }
    }

    /// Settles what will get no answer any more.
    fn abandon(&mut self) {
        let mut traffic = self.lane.traffic.borrow_mut();
        self.lane.tally.borrow_mut().lost_requests += self.pending.len() as u64;
        for pending in self.pending.drain(..) {
            traffic.settle(&pending.request, Outcome::Lost);
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Ended> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(context));
                self.pause = None;
            }
            self.fill();
            if self.pending.is_empty() && self.may_finish() {
                return Poll::Ready(Ended::Finished);
            }
            if let Err(error) = self.flush(context) {
                return Poll::Ready(Ended::Lost(error.kind().to_string()));
            }
            match self.receive(context) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(reason)) => return Poll::Ready(Ended::Lost(reason)),
                Poll::Pending => break,
            }
        }
        if self.lane.timetable.is_some() {
            self.lane.sleepers.borrow_mut().remember(self.client.index, context.waker());
        }
        self.watch(context)
    }

    /// Appends requests to the output: a whole batch when the one before is answered, or what is due.
    fn fill(&mut self) {
        let lane = &self.lane;
        let Some(timetable) = &lane.timetable else {
            if self.pending.is_empty() && !self.client.exhausted {
                let now_ns = lane.now_ns();
                if lane.is_over(now_ns) {
                    self.client.exhausted = true;
                } else {
                    self.append(lane.pipeline, |_| now_ns);
                }
            }
            return;
        };
        let now_ns = lane.now_ns();
        let timetable = *timetable;
        let index = self.client.index as u64;
        let due = timetable.due_count_of(index, now_ns).saturating_sub(self.client.sent);
        let room = lane.pipeline.saturating_sub(self.pending.len()).min(usize::try_from(due).unwrap_or(usize::MAX));
        if room > 0 && !self.client.exhausted && !lane.is_over(now_ns) {
            self.append(room, |nth| timetable.due_ns(index, nth));
        }
    }

    fn append(&mut self, room: usize, since_ns: impl Fn(u64) -> u64) {
        let lane = &self.lane;
        if self.pending.is_empty() {
            self.waiting_since_ns = lane.now_ns();
        }
        let mut traffic = lane.traffic.borrow_mut();
        for _ in 0..room {
            if self.output.len() >= OUTPUT_BYTES_MAX {
                return;
            }
            let Some(request) = traffic.next(self.client.number) else {
                self.client.exhausted = true;
                return;
            };
            lane.encoder.append(&request, &mut self.output);
            self.pending.push_back(Pending { request, since_ns: since_ns(self.client.sent) });
            self.client.sent += 1;
        }
    }

    fn may_finish(&self) -> bool {
        self.client.exhausted || self.lane.is_over(self.lane.now_ns())
    }

    fn flush(&mut self, context: &mut Context<'_>) -> std::io::Result<()> {
        while self.written < self.output.len() {
            match self.link.poll_write(context, &self.output[self.written..]) {
                Poll::Ready(Ok(0)) => return Err(std::io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(length)) => {
                    self.written += length;
                    self.lane.tally.borrow_mut().bytes_sent += length as u64;
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(()),
            }
        }
        self.output.clear();
        self.written = 0;
        Ok(())
    }

    /// Reads once and settles the answers that are complete.
    fn receive(&mut self, context: &mut Context<'_>) -> Poll<Result<(), String>> {
        if self.filled == self.input.len() {
            self.make_room();
        }
        let mut buffer = ReadBuf::new(&mut self.input[self.filled..]);
        if let Err(error) = ready!(self.link.poll_read(context, &mut buffer)) {
            return Poll::Ready(Err(error.kind().to_string()));
        }
        let length = buffer.filled().len();
        if length == 0 {
            return Poll::Ready(Err("closed by the server".into()));
        }
        self.filled += length;
        Poll::Ready(self.settle_answers(length))
    }

    fn make_room(&mut self) {
        self.input.copy_within(self.parsed..self.filled, 0);
        self.filled -= self.parsed;
        self.parsed = 0;
        if self.filled > self.input.len() / 2 {
            self.input.resize(self.input.len() * 2, 0);
        }
    }

    fn settle_answers(&mut self, length: usize) -> Result<(), String> {
        let lane = &self.lane;
        let now_ns = lane.now_ns();
        let mut traffic = lane.traffic.borrow_mut();
        let mut tally = lane.tally.borrow_mut();
        tally.bytes_received += length as u64;
        let (mut answers, mut errors) = (0, 0);
        while self.parsed < self.filled {
            let parsed = reply::parse(&self.input[self.parsed..self.filled]).map_err(|error| error.to_string())?;
            let Some((reply, end)) = parsed else { break };
            self.parsed += end;
            if reply == Reply::Push {
                continue;
            }
            let Some(Pending { request, since_ns }) = self.pending.pop_front() else {
                return Err("answer without a question".into());
            };
            let outcome = outcome(request.verb, reply);
            match outcome {
                Outcome::Answered(reply) => {
                    answers += 1;
                    tally.misses += u64::from(reply == Reply::Nil);
                    tally.succeeded(request.verb, now_ns.saturating_sub(since_ns));
                }
                Outcome::Failed(text) => {
                    errors += 1;
                    tally.failed(text);
                }
                Outcome::Lost => unreachable!("an answer was read"),
            }
            traffic.settle(&request, outcome);
        }
        if self.parsed == self.filled {
            self.parsed = 0;
            self.filled = 0;
        }
        if answers > 0 {
            Progress::add(&lane.progress.answers, answers);
        }
        if errors > 0 {
            Progress::add(&lane.progress.errors, errors);
            self.pause = lane.pause_after_failure.map(|pause| Box::pin(tokio::time::sleep(pause)));
        }
        self.waiting_since_ns = now_ns;
        Ok(())
    }

    /// Pending, or lost when the server has owed an answer for too long.
    ///
    /// The timer runs on and is looked at when it fires, instead of being set anew for each batch.
    fn watch(&mut self, context: &mut Context<'_>) -> Poll<Ended> {
        if self.watchdog_is_set && !self.watchdog.is_elapsed() {
            return Poll::Pending;
        }
        self.watchdog_is_set = true;
        while self.watchdog.as_mut().poll(context).is_ready() {
            let timeout = self.lane.server.timeout;
            let mut next_look = timeout;
            if !self.pending.is_empty() {
                let waited = Duration::from_nanos(self.lane.now_ns().saturating_sub(self.waiting_since_ns));
                if waited >= timeout {
                    return Poll::Ready(Ended::Lost("timeout".into()));
                }
                next_look = timeout - waited;
            }
            // A millisecond more, the grain of the timers.
            self.watchdog.as_mut().reset(tokio::time::Instant::now() + next_look + Duration::from_millis(1));
        }
        Poll::Pending
    }
}

/// Whether a reply answers such a command.
fn outcome(verb: Verb, reply: Reply<'_>) -> Outcome<'_> {
    match (verb, reply) {
        (_, Reply::Error(text)) => Outcome::Failed(text),
        (Verb::Get, Reply::Bulk(_) | Reply::Nil)
        | (Verb::Set | Verb::SetZero, Reply::Simple(b"OK"))
        | (Verb::Incr, Reply::Integer(_)) => Outcome::Answered(reply),
        (
            Verb::Get | Verb::Set | Verb::SetZero | Verb::Incr,
            Reply::Simple(_) | Reply::Integer(_) | Reply::Bulk(_) | Reply::Nil | Reply::Push | Reply::Other,
        ) => Outcome::Failed(b"(unfitting) reply of a type that does not fit the command"),
    }
}
