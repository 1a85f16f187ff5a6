//! Writes the answers of redis-server into a test script: `cargo run --release -p redis-tests --example record_script FILE`.
//!
//! Write the commands, record, then read what was recorded: an answer that surprises is worth a comment.

use anyhow::{Context, Result, anyhow};

fn main() -> Result<()> {
    for path in std::env::args().skip(1) {
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let redis = redis_tests::RedisServer::start();
        let recorded =
            redis_tests::script::record(&text, &redis.address()).map_err(|error| anyhow!("{path}: {error}"))?;
        std::fs::write(&path, recorded).with_context(|| format!("cannot write {path}"))?;
    }
    Ok(())
}
