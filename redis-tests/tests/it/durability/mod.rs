//! What was acknowledged is there after every end of a process, and what is damaged on disk is named, never passed over.

mod clock;
mod data_folder;
mod flipped_bits;
mod kills;
mod load;

/// Servers that are started by the hundred: little memory, few threads, and so a quick start.
const SMALL: [&str; 12] = [
    "--workers",
    "2",
    "--lane-threads",
    "2",
    "--background-jobs",
    "2",
    "--row-cache",
    "1mb",
    "--block-cache",
    "2mb",
    "--write-buffer",
    "8mb",
];

/// The options of a small server, and more.
fn small_with<'o>(more: &[&'o str]) -> Vec<&'o str> {
    SMALL.iter().chain(more).copied().collect()
}
