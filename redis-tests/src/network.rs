//! A network of its own for the processes of one test: a namespace for each, a bridge between them, and packets that get lost on purpose.
//!
//! Needs root, `ip` and `nft`. Everything is removed when the network is dropped; what a test that was killed has left is removed by
//! the next one.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// What the names of our namespaces and links begin with; the id of the process that made them follows.
const PREFIX: &str = "vt";

/// The bridge has number 1 in the subnet, hosts follow.
const FIRST_HOST: u8 = 10;

/// Networks that tests of this process have made: each has names of its own.
static NETWORKS: AtomicU32 = AtomicU32::new(0);

#[derive(Debug)]
pub struct Network {
    name: String,
    /// The first three numbers of all addresses.
    subnet: [u8; 3],
    hosts: u8,
}

/// One host of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    pub namespace: String,
    pub address: Ipv4Addr,
}

/// What happens to packets on their way from one host to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Drop,
    /// So many of a hundred are lost.
    Lose(u8),
}

/// A program of the system's administrator, which the path of a user may not have.
pub fn administrator_command(program: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output =
        administrator_command(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}

/// As `run`, for what must work once a network could be made at all.
fn must(program: &str, arguments: &[&str]) -> String {
    run(program, arguments).unwrap_or_else(|error| panic!("{error}"))
}

impl Network {
    /// `None`, and said, where it is not permitted or a program is missing.
    pub fn new() -> Option<Network> {
        let network = Network::make();
        if let Err(reason) = &network {
            eprintln!("SKIP: no network namespaces: {reason}");
        }
        network.ok()
    }

    fn make() -> Result<Network, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("this needs root".to_owned());
        }
        run("nft", &["--version"])?;
        remove_leftovers()?;
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}n{number}", std::process::id());
        let network = Network { subnet: free_subnet()?, name, hosts: 0 };
        let bridge = network.bridge();
        run("ip", &["link", "add", &bridge, "type", "bridge"])?;
        // From here on dropping it removes what there is.
        let address = format!("{}/24", network.address(1));
        run("ip", &["addr", "add", &address, "dev", &bridge])?;
        run("ip", &["link", "set", &bridge, "up"])?;
        Ok(network)
    }

    /// As the names of all links at most 15 letters: 2, 7 of a process, 1, 2 of a network, 1, 2 of a host.
    fn bridge(&self) -> String {
        format!("{}b", self.name)
    }

    fn address(&self, number: u8) -> Ipv4Addr {
        let [first, second, third] = self.subnet;
        Ipv4Addr::new(first, second, third, number)
    }

    /// One more host, reachable from all others and from the test itself.
    pub fn add_host(&mut self) -> Host {
        let number = self.hosts;
        self.hosts += 1;
        let host = Host { namespace: format!("{}h{number}", self.name), address: self.address(FIRST_HOST + number) };
        let link = format!("{}l{number}", self.name);
        let namespace = host.namespace.as_str();
        must("ip", &["netns", "add", namespace]);
        must("ip", &["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", namespace]);
        must("ip", &["link", "set", &link, "master", &self.bridge(), "up"]);
        must("ip", &["-n", namespace, "addr", "add", &format!("{}/24", host.address), "dev", "eth0"]);
        must("ip", &["-n", namespace, "link", "set", "lo", "up"]);
        must("ip", &["-n", namespace, "link", "set", "eth0", "up"]);
        host.nft("add table inet faults");
        host.nft("add chain inet faults arriving { type filter hook input priority 0; policy accept; }");
        host
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for number in 0..self.hosts {
            // Its end in the namespace goes with it. The namespace itself stays until its last connection is closed.
            let _ = run("ip", &["link", "del", &format!("{}l{number}", self.name)]);
            let _ = run("ip", &["netns", "del", &format!("{}h{number}", self.name)]);
        }
        let _ = run("ip", &["link", "del", &self.bridge()]);
    }
}

impl Host {
    fn nft(&self, command: &str) {
        must("ip", &["netns", "exec", &self.namespace, "nft", command]);
    }

    /// From now on, for packets that come from `sender`.
    pub fn receive_with(&self, fault: Fault, sender: &Host) {
        let chance = match fault {
            Fault::Drop => String::new(),
            Fault::Lose(percent) => format!("numgen random mod 100 < {percent} "),
        };
        self.nft(&format!("add rule inet faults arriving ip saddr {} {chance}drop", sender.address));
    }

    /// Everything that arrives is taken again.
    pub fn heal(&self) {
        self.nft("flush chain inet faults arriving");
    }
}

/// Nothing gets through between the two sides.
pub fn part(one: &[&Host], other: &[&Host]) {
    for here in one {
        for there in other {
            here.receive_with(Fault::Drop, there);
            there.receive_with(Fault::Drop, here);
        }
    }
}

/// One of those that are meant for measurements of networks, so that no real network has its addresses.
fn free_subnet() -> Result<[u8; 3], String> {
    let taken = run("ip", &["-o", "-4", "addr", "show"])?;
    let start = std::process::id() as u16;
    (0..512)
        .map(|offset: u16| start.wrapping_add(offset) % 512)
        .map(|number| [198, 18 + (number / 256) as u8, (number % 256) as u8])
        .find(|[first, second, third]| !taken.contains(&format!(" {first}.{second}.{third}.")))
        .ok_or_else(|| "no subnet is free".to_owned())
}

/// What processes that are gone have left.
fn remove_leftovers() -> Result<(), String> {
    let is_left = |name: &str| {
        let Some((process, _)) = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('n')) else { return false };
        process.parse::<u32>().is_ok() && !Path::new("/proc").join(process).exists()
    };
    for line in run("ip", &["netns", "list"])?.lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        if is_left(name) {
            eprintln!("removing the namespace {name} of a test that was killed");
            // Whoever still runs in it is of that test too.
            for process in run("ip", &["netns", "pids", name]).unwrap_or_default().split_whitespace() {
                let _ = run("kill", &["-9", process]);
            }
            let _ = run("ip", &["netns", "del", name]);
        }
    }
    for line in run("ip", &["-o", "link", "show"])?.lines() {
        // NUMBER: NAME@PEER: …
        let name = line.split([' ', '@', ':']).nth(2).unwrap_or_default();
        if is_left(name) {
            let _ = run("ip", &["link", "del", name]);
        }
    }
    Ok(())
}
