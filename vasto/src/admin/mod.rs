//! `vasto admin`: resizes a keyspace, replaces a store, shows how far that is, ends it.

mod client;
mod status;
mod watch;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Subcommand;

use client::{Answer, Client};
use watch::{Screen, Watch};

/// The command line of `vasto admin`.
#[derive(Clone, Debug, clap::Args)]
#[command(disable_help_subcommand = true)]
pub struct AdminArguments {
    /// Address of a gateway.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:6379", value_parser = crate::cli::remote_address, global = true)]
    address: String,

    /// Seconds without an answer after which it gives up.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, global = true)]
    timeout: u64,

    #[command(subcommand)]
    action: Action,
}

#[derive(Clone, Debug, Subcommand)]
enum Action {
    /// Give a keyspace another number of shards while it serves.
    Resize {
        /// The keyspace.
        name: String,
        /// How many shards it shall have, 1 to 1024.
        shards: u32,
        /// Show how far it is until it is done, and end with status 1 if it is aborted. Ending the command ends nothing else.
        #[arg(long)]
        watch: bool,
    },
    /// Give the copies that a store has of a keyspace to another store.
    Replace {
        /// The keyspace.
        name: String,
        /// The store, as STORES shows it; it may be lost if there are other copies.
        #[arg(long, value_name = "ID")]
        store: String,
        /// The store that gets the copies [default: those that are best].
        #[arg(long, value_name = "ID")]
        with: Option<String>,
        /// Show how far it is until it is done, and end with status 1 if it is aborted. Ending the command ends nothing else.
        #[arg(long)]
        watch: bool,
    },
    /// Show how far a resize or a replacement is, or how the last one ended.
    Status {
        /// The keyspace.
        name: String,
        /// Show it until it is done, and end with status 1 if it is aborted.
        #[arg(long)]
        watch: bool,
    },
    /// End a resize or a replacement as if it had not begun.
    Abort {
        /// The keyspace.
        name: String,
    },
}

pub fn run(arguments: AdminArguments) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    runtime.block_on(administer(arguments))?;
    Ok(ExitCode::SUCCESS)
}

async fn administer(arguments: AdminArguments) -> anyhow::Result<()> {
    let mut client = Client::new(arguments.address, Duration::from_secs(arguments.timeout));
    let mut screen = Screen::new(std::io::stdout(), std::io::stdout().is_terminal());
    let (name, operation) = match arguments.action {
        Action::Resize { name, shards, watch } => {
            let shards = shards.to_string();
            let id = begin(&mut client, &["KEYSPACE", "RESIZE", &name, "SHARDS", &shards]).await?;
            (name, watch.then_some(Some(id)))
        }
        Action::Replace { name, store, with, watch } => {
            let mut words = vec!["KEYSPACE", "REPLACE", &name, "STORE", &store];
            words.extend(with.iter().flat_map(|with| ["WITH", with]));
            let id = begin(&mut client, &words).await?;
            (name, watch.then_some(Some(id)))
        }
        Action::Status { name, watch } => {
            if !watch {
                let answer = client.ask(&["KEYSPACE", "STATUS", &name]).await?;
                return print(&status::described(&answer));
            }
            (name, Some(None))
        }
        Action::Abort { name } => {
            client.ask(&["KEYSPACE", "ABORT", &name]).await?;
            return print("aborted");
        }
    };
    match operation {
        Some(operation) => Watch::new(name, operation).until_the_end(&mut client, &mut screen).await,
        None => Ok(()),
    }
}

/// Has an operation begin, and says which.
async fn begin(client: &mut Client, words: &[&str]) -> anyhow::Result<i64> {
    let answer = client.ask(words).await?;
    let Answer::Number(id) = answer else { anyhow::bail!("the answer is no number of an operation: {answer:?}") };
    print(&format!("operation {id} has begun"))?;
    Ok(id)
}

fn print(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{text}").context("print the answer")
}
