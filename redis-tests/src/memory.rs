//! Reads what a process occupies, from /proc.

/// The resident memory of a process in bytes; `None` when it is gone.
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_process_occupies_something() {
        assert!(super::resident_bytes(std::process::id()).is_some_and(|bytes| bytes > 100_000));
    }
}
