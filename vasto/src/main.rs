//! The one binary of Vasto: all roles in one process, or each on its own, and the tools.

mod admin;
mod bench;
mod cli;
mod config;
mod import;
mod local;
mod open_files;
mod ready;
mod restore;
mod role;
mod stop;
mod telemetry;

use std::process::ExitCode;

use cli::Role;

/// Faster than the system's allocator on the hot path, and it gives memory back.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    abort_on_panic();
    // Points at which tests end a process; without the variable they do nothing.
    let _scenario = std::env::var_os("FAILPOINTS").map(|_| fail::FailScenario::setup());
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vasto: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A thread that panicked would leave a process that answers some of its clients and not the others. Ending it is safer: what was
/// acknowledged is in the log, and whoever watches the process starts it again.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

fn run() -> anyhow::Result<ExitCode> {
    match config::parse(std::env::args_os().collect())? {
        Role::Server(options) => role::server::run(options)?,
        Role::Master(options) => role::master::run(options)?,
        Role::Store(options) => role::store::run(options)?,
        Role::Gateway(options) => role::gateway::run(options)?,
        Role::Bench(arguments) => return bench::run(arguments),
        Role::Import(arguments) => return import::run(arguments),
        Role::Admin(arguments) => return admin::run(arguments),
        Role::Restore(arguments) => restore::run(&arguments)?,
    }
    Ok(ExitCode::SUCCESS)
}
