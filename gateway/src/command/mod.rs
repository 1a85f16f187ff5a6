//! The commands that the gateway answers itself, and the table that leads from a row to its handler.

pub mod backup;
pub mod client;
pub mod compaction;
pub mod config;
pub mod connection;
pub mod container;
pub mod context;
pub mod figures;
pub mod info;
pub mod introspection;
pub mod keyspaces;
pub mod memory;
pub mod operations;
pub mod pattern;
pub mod replication;
pub mod scan;
pub mod server;
pub mod slowlog;
pub mod topology;
pub mod transaction;
pub mod verification;

#[cfg(test)]
pub(crate) mod harness;
#[cfg(test)]
pub use harness::show;

pub use context::{Ask, Context, Next, Round, ShardRequest};

use vasto_proto::command::Args;
use vasto_proto::command::table::GatewayCommand;
use vasto_proto::error::CommandError;

/// Runs one command; its arguments come without its name (both words of a subcommand). A handler that fails has written no reply.
pub type Handler = fn(&mut Context<'_>, Args<'_>) -> Result<Next, CommandError>;

macro_rules! handlers {
    ($($variant:ident $name:literal $arity:literal [$($flag:ident)*] ($first:literal $last:literal $step:literal) $route:ident$(($merge:ident))?
        $module:ident::$function:ident $group:literal $since:literal $summary:literal;)*) => {
        &[$($module::$function),*]
    };
}

/// By [`GatewayCommand`].
pub const HANDLERS: &[Handler] = vasto_proto::gateway_commands!(handlers);

/// The function that the command's row names.
pub fn handler(command: GatewayCommand) -> Handler {
    HANDLERS[command as usize]
}
