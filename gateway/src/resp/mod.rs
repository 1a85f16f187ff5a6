//! RESP: finding commands in what clients send, and writing replies. The only user of crate `redis-protocol`.

pub(crate) mod encode;
pub(crate) mod scanner;
