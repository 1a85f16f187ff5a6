//! What the system says of this process's memory. Roles that share a process share these figures.

/// Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// What of it is in memory, now and at its most.
    pub resident: u64,
    pub peak: u64,
    /// The part that is no file's.
    pub anonymous: u64,
    /// Swapped out.
    pub swapped: u64,
}

impl Memory {
    pub fn read() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let figure = |name| kilobytes(&status, name);
        let resident = figure("VmRSS").unwrap_or(0);
        Self {
            resident,
            peak: figure("VmHWM").unwrap_or(0).max(resident),
            anonymous: figure("RssAnon").unwrap_or(0),
            swapped: figure("VmSwap").unwrap_or(0),
        }
    }
}

/// Bytes of memory that the machine has.
pub fn machine_memory() -> u64 {
    kilobytes(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemTotal").unwrap_or(0)
}

/// Bytes of a `name: n kB` line.
fn kilobytes(file: &str, name: &str) -> Option<u64> {
    let line = file.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_system_are_read() {
        let status = "Name:\tvasto\nVmHWM:\t   2048 kB\nVmRSS:\t    1024 kB\nThreads:\t3\n";
        assert_eq!(kilobytes(status, "VmRSS"), Some(1 << 20));
        assert_eq!((kilobytes(status, "Threads"), kilobytes(status, "VmSwap")), (None, None));
        let memory = Memory::read();
        assert!(memory.resident > 1 << 20 && memory.peak >= memory.resident, "{memory:?}");
    }
}
