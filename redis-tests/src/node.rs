//! One real `vasto` process: started, awaited, killed in every way, started again on the same data and address.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::connection::Address;
use crate::eventually::eventually_within;
use crate::network::{Host, administrator_command};

/// Opening a RocksDB and, after a kill, reading its log again, on a machine that does much else.
pub const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// A stop drains connections and flushes.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// Lines of the log that are shown when a test fails.
const SHOWN_LOG_LINES: usize = 40;

/// The `vasto` binary under test: `VASTO_BIN`, else the one of the release profile.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("VASTO_BIN") {
        return PathBuf::from(path);
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = match std::env::var_os("CARGO_TARGET_DIR") {
        // cargo takes a relative folder from where it was called: the workspace.
        Some(folder) => workspace.join(folder),
        None => workspace.join("target"),
    };
    let binary = target.join("release").join("vasto");
    assert!(
        binary.exists(),
        "no {}: build it with `cargo build --release -p vasto`, or name one in VASTO_BIN",
        binary.display()
    );
    binary
}

/// A port of the loopback address that nobody listens on, below the range from which the system takes the
/// ports of outgoing connections: so it is still free when a killed process comes back to it.
pub fn free_port() -> u16 {
    const FIRST: u16 = 12_000;
    const COUNT: u16 = 18_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let process = (std::process::id().wrapping_mul(97) % u32::from(COUNT)) as u16;
    for _ in 0..COUNT {
        let offset = NEXT.fetch_add(1, Ordering::Relaxed) % COUNT;
        let port = FIRST + (process + offset) % COUNT;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
    panic!("no free port");
}

/// The address for `--listen`: loopback and a free port.
pub fn free_address() -> String {
    format!("127.0.0.1:{}", free_port())
}

/// One process and what is needed to start it again.
pub struct Node {
    /// How the process is called in messages, such as `store-1`.
    pub name: String,
    /// Where it runs, if not where the tests do.
    namespace: Option<String>,
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    log_path: PathBuf,
    running: Option<Running>,
}

struct Running {
    child: Child,
    lines: Receiver<String>,
    /// What it printed on standard output so far.
    printed: Vec<String>,
}

impl Node {
    /// Starts `vasto ARGUMENTS` and waits for its line; the log goes to `NAME.log` in `directory`.
    pub fn start<A: AsRef<str>>(name: &str, directory: &Path, arguments: &[A]) -> Node {
        let mut node = Node::launch(name, directory, arguments);
        node.wait_ready(READY_TIMEOUT);
        node
    }

    /// Starts it without waiting.
    pub fn launch<A: AsRef<str>>(name: &str, directory: &Path, arguments: &[A]) -> Node {
        Node::launch_with(name, directory, arguments, &[])
    }

    /// Starts it without waiting, in its own environment beside that of the tests.
    pub fn launch_with<A: AsRef<str>>(
        name: &str,
        directory: &Path,
        arguments: &[A],
        environment: &[(String, String)],
    ) -> Node {
        Node::launch_on(None, name, directory, arguments, environment)
    }

    /// Starts it without waiting on a host of a network of its own.
    pub fn launch_on<A: AsRef<str>>(
        host: Option<&Host>,
        name: &str,
        directory: &Path,
        arguments: &[A],
        environment: &[(String, String)],
    ) -> Node {
        let mut node = Node {
            name: name.to_owned(),
            namespace: host.map(|host| host.namespace.clone()),
            program: binary(),
            arguments: arguments.iter().map(|argument| argument.as_ref().to_owned()).collect(),
            environment: environment.to_vec(),
            log_path: directory.join(format!("{name}.log")),
            running: None,
        };
        node.launch_again();
        node
    }

    fn launch_again(&mut self) {
        assert!(self.running.is_none(), "{} is already running", self.name);
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log_path)
            .unwrap_or_else(|error| panic!("no log {}: {error}", self.log_path.display()));
        let mut command = match &self.namespace {
            // It becomes the program: the process has one id from the start.
            Some(namespace) => {
                let mut command = administrator_command("ip");
                command.args(["netns", "exec", namespace]).arg(&self.program);
                command
            }
            None => Command::new(&self.program),
        };
        let mut child = command
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", self.program.display()));
        let output = child.stdout.take().expect("standard output was asked for");
        let (sender, lines) = channel();
        // Ends with the process, whose end closes the pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        self.running = Some(Running { child, lines, printed: Vec::new() });
    }

    /// Waits for the one line that says it serves.
    pub fn wait_ready(&mut self, patience: Duration) {
        match self.try_wait_ready(patience) {
            Ok(()) => {}
            Err(reason) => panic!("{} is not ready: {reason}\n{}", self.name, self.log_tail()),
        }
    }

    pub fn try_wait_ready(&mut self, patience: Duration) -> Result<(), String> {
        let start = Instant::now();
        let running = self.running.as_mut().ok_or("it was not started")?;
        while running.printed.is_empty() {
            let rest = patience.saturating_sub(start.elapsed());
            match running.lines.recv_timeout(rest) {
                Ok(line) => running.printed.push(line),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("no line on standard output within {patience:?}"));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = running.child.wait();
                    return Err(format!("it ended: {status:?}"));
                }
            }
        }
        Ok(())
    }

    /// Everything printed on standard output since the start; it should be one line.
    pub fn printed_lines(&mut self) -> Vec<String> {
        let running = self.running.as_mut().expect("the process runs");
        running.printed.extend(running.lines.try_iter());
        running.printed.clone()
    }

    /// The line that said it serves.
    pub fn ready_line(&self) -> &str {
        let running = self.running.as_ref();
        running
            .and_then(|running| running.printed.first())
            .unwrap_or_else(|| panic!("{} has printed no line yet", self.name))
    }

    /// The word after another one in the ready line.
    fn word_after(&self, name: &str) -> Option<&str> {
        let mut words = self.ready_line().split_whitespace().skip_while(|word| *word != name);
        words.nth(1).map(|word| word.trim_end_matches([',', ';']))
    }

    /// The word after `role` in the ready line, as an address.
    fn address_after(&self, role: &str) -> SocketAddr {
        let address = self.word_after(role).and_then(|word| word.parse().ok());
        address.unwrap_or_else(|| panic!("no '{role} ADDRESS' in the line of {}: {}", self.name, self.ready_line()))
    }

    /// How a store calls itself.
    pub fn store_id(&self) -> String {
        // The first word of the line is `vasto`, the second the role, which is `store` as well.
        let line = self.ready_line();
        let id = line.split(", ").find_map(|field| field.trim().strip_prefix("store "));
        id.unwrap_or_else(|| panic!("no id in the line of {}: {line}", self.name)).to_owned()
    }

    /// Where clients connect.
    pub fn redis_address(&self) -> Address {
        Address::Tcp(self.address_after("redis"))
    }

    /// Where other processes connect.
    pub fn grpc_address(&self) -> SocketAddr {
        self.address_after("grpc")
    }

    pub fn pid(&self) -> u32 {
        self.running.as_ref().expect("the process runs").child.id()
    }

    pub fn is_running(&mut self) -> bool {
        self.running.as_mut().is_some_and(|running| matches!(running.child.try_wait(), Ok(None)))
    }

    /// Resident memory in bytes.
    pub fn resident_bytes(&self) -> u64 {
        crate::memory::resident_bytes(self.pid())
            .unwrap_or_else(|| panic!("{} is gone\n{}", self.name, self.log_tail()))
    }

    fn signal(&self, signal: Signal) {
        let running = self.running.as_ref().expect("the process runs");
        kill_process(Pid::from_child(&running.child), signal)
            .unwrap_or_else(|error| panic!("cannot signal {}: {error}", self.name));
    }

    /// kill -9, and waits until it is gone.
    pub fn kill_9(&mut self) {
        let Some(mut running) = self.running.take() else {
            return;
        };
        // The process may have ended by itself.
        let _ = running.child.kill();
        let _ = running.child.wait();
    }

    /// SIGTERM, and waits for the end.
    pub fn terminate(&mut self) -> ExitStatus {
        self.stop_with(Signal::TERM)
    }

    /// SIGINT, and waits for the end.
    pub fn interrupt(&mut self) -> ExitStatus {
        self.stop_with(Signal::INT)
    }

    fn stop_with(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.wait_for_end()
    }

    /// Sends SIGTERM and does not wait; `wait_for_end` does.
    pub fn ask_to_stop(&self) {
        self.signal(Signal::TERM);
    }

    /// Waits until the process has ended by itself.
    pub fn wait_for_end(&mut self) -> ExitStatus {
        let what = format!("{} ends\n{}", self.name, self.log_tail());
        let running = self.running.as_mut().expect("the process runs");
        let status = eventually_within(STOP_TIMEOUT, &what, || match running.child.try_wait() {
            Ok(Some(status)) => Ok(status),
            Ok(None) => Err("it still runs".to_owned()),
            Err(error) => Err(error.to_string()),
        });
        self.running = None;
        status
    }

    /// Stops it for a while as SIGSTOP does; `thaw` lets it go on.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Starts it again with the same data and address and waits for its line.
    pub fn start_again(&mut self) {
        self.launch_again();
        self.wait_ready(READY_TIMEOUT);
    }

    /// Holds from the next start on.
    pub fn set_environment(&mut self, environment: &[(String, String)]) {
        self.environment = environment.to_vec();
    }

    /// Starts it again without waiting.
    pub fn start_again_without_waiting(&mut self) {
        self.launch_again();
    }

    /// The whole log, of all its lives.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(&self.log_path).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(SHOWN_LOG_LINES)..];
        format!("--- log of {} ---\n{}\n---", self.name, tail.join("\n"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log_tail());
        }
        self.kill_9();
    }
}
