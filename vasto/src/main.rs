//! The one binary of Vasto: all roles in one process, or each on its own, and the benchmark.

mod bench;
mod cli;
mod config;
mod local;
mod open_files;
mod ready;
mod role;
mod stop;
mod telemetry;

use std::process::ExitCode;

use cli::Role;

/// Faster than the system's allocator on the hot path, and it gives memory back.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vasto: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<ExitCode> {
    match config::parse(std::env::args_os().collect())? {
        Role::Server(options) => role::server::run(options)?,
        Role::Master(options) => role::master::run(options)?,
        Role::Store(options) => role::store::run(options)?,
        Role::Gateway(options) => role::gateway::run(options)?,
        Role::Bench(arguments) => return bench::run(arguments),
    }
    Ok(ExitCode::SUCCESS)
}
