//! Which shards a command goes to, and how their answers become one. Pure.

pub(crate) mod merge;
pub(crate) mod plan;
