//! The end-to-end tests, one binary: linked once, and its tests share the two cores.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed, and where is in the message")]

mod backup;
mod chaos;
mod clients;
mod commands;
mod databases;
mod differential;
mod durability;
mod event_times;
mod faults;
mod import;
mod keyspaces;
mod known_differences;
mod limits;
mod masters;
mod operations;
mod process;
mod protocol;
mod restart;
mod scan;
mod settings;
mod tidy;
mod time_to_live;
mod verification;
