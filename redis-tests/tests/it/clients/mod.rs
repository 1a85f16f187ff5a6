//! Stock clients over the wire, as their users use them.

use redis_tests::Address;

mod fred_client;
mod redis_benchmark;
mod redis_cli;
mod redis_py;
mod redis_rs;

/// The port for programs that take one.
fn port(address: &Address) -> u16 {
    match address {
        Address::Tcp(address) => address.port(),
        Address::Unix(path) => panic!("{} has no port", path.display()),
    }
}
