//! The commands: their table, their arguments and their replies.

pub mod args;
pub mod reply;
pub mod spec;
pub mod table;

pub use args::Args;
pub use reply::{Reply, ReplyWriter};
pub use spec::{CommandSpec, Flags, Keys, Merge, Route};
