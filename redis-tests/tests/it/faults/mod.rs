//! Disks that are full, fail or are slow: nothing acknowledged is lost, errors say what is known, and service comes back by itself.
//!
//! A full disk is a small tmpfs, failing and slow syncs are injected by strace. Where a machine permits neither, the tests say so and pass.

mod damaged_shard;
mod full_disk;
mod syncs;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use redis_tests::node::free_address;
use redis_tests::{Connection, Node, Value, eventually};

/// `vasto server` on a folder; its log lies in `directory`.
fn start_server(directory: &Path, data: &Path, options: &[&str]) -> Node {
    let listen = free_address();
    let data = data.to_str().unwrap();
    let arguments = [&["server", "--listen", &listen, "--data", data][..], options].concat();
    let node = Node::start("server", directory, &arguments);
    redis_tests::cluster::wait_until_serving(&node.redis_address());
    node
}

/// A file system of its own in memory, gone when dropped.
pub(crate) struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// None where it is not permitted, which is said.
    pub(crate) fn mount(path: &Path, megabytes: u32) -> Option<SmallDisk> {
        std::fs::create_dir(path).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={megabytes}m"), "tmpfs"])
            .arg(path)
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(SmallDisk { path: path.to_owned() }),
            Ok(output) => {
                eprintln!("SKIP: no tmpfs can be mounted: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(error) => {
                eprintln!("SKIP: no tmpfs can be mounted: {error}");
                None
            }
        }
    }

    /// Takes every byte that is left; the file.
    pub(crate) fn fill(&self) -> PathBuf {
        let path = self.path.join("rest");
        let mut file = File::create(&path).unwrap();
        let block = vec![b'r'; 1 << 20];
        let mut size = block.len();
        while size > 0 {
            if file.write_all(&block[..size]).is_err() {
                size /= 2;
            }
        }
        path
    }

    /// A file that takes space until it is removed.
    fn ballast(&self, megabytes: usize) -> PathBuf {
        let path = self.path.join("ballast");
        std::fs::write(&path, vec![b'b'; megabytes << 20]).unwrap();
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Whoever still uses it is about to end.
        let _ = Command::new("umount").arg("--lazy").arg(&self.path).status();
    }
}

/// strace at a running process, injecting faults until it is dropped.
struct Injection {
    strace: Child,
    record: PathBuf,
}

impl Injection {
    /// `fault` as in `--inject=fdatasync:FAULT`. None where it is not permitted, which is said.
    fn attach(node: &Node, directory: &Path, fault: &str) -> Option<Injection> {
        let record = directory.join("strace");
        let messages = directory.join("strace.messages");
        let strace = Command::new("strace")
            .args(["-f", "-e", "trace=fdatasync", "-e", &format!("inject=fdatasync:{fault}"), "-o"])
            .arg(&record)
            .args(["-p", &node.pid().to_string()])
            .stdin(Stdio::null())
            .stderr(File::create(&messages).unwrap())
            .spawn();
        let mut strace = match strace {
            Ok(strace) => strace,
            Err(error) => {
                eprintln!("SKIP: no strace: {error}");
                return None;
            }
        };
        let mut ended = false;
        eventually!("strace is attached or ends", {
            ended = strace.try_wait().unwrap().is_some();
            ended || std::fs::read_to_string(&messages).unwrap().contains("attached")
        });
        if ended {
            let reason = std::fs::read_to_string(&messages).unwrap();
            eprintln!("SKIP: strace may not attach: {}", reason.trim());
            return None;
        }
        Some(Injection { strace, record })
    }

    /// How many calls were meddled with.
    fn injected(&self) -> usize {
        let record = std::fs::read_to_string(&self.record).unwrap_or_default();
        record.matches("(INJECTED)").count() + record.matches("(DELAYED)").count()
    }
}

impl Drop for Injection {
    fn drop(&mut self) {
        let _ =
            rustix::process::kill_process(rustix::process::Pid::from_child(&self.strace), rustix::process::Signal::INT);
        let _ = self.strace.wait();
    }
}

/// What `key:NUMBER` holds: nothing that could be compressed.
fn value_of(number: usize, bytes: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(number as u64);
    std::iter::repeat_with(|| random.u8(..)).take(bytes).collect()
}

fn check_values(connection: &mut Connection, numbers: &[usize], bytes: usize) {
    for number in numbers {
        let key = format!("key:{number}");
        assert_eq!(connection.call(&["GET", &key]), Value::bulk(value_of(*number, bytes)), "{key}");
    }
}
