//! `vasto restore`: makes a store's data folder of a backup that BGSAVE or SAVE made.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;

/// The command line of `vasto restore`.
#[derive(Clone, Debug, clap::Args)]
pub struct RestoreArguments {
    /// Folder of one store's backup: DATA/backups/NAME.
    #[arg(long, value_name = "FOLDER")]
    from: PathBuf,

    /// Data folder to make: what `vasto store --data` is given; for `vasto server --data DATA` it is DATA/store-1, DATA/store-2…
    #[arg(long, value_name = "FOLDER")]
    data: PathBuf,
}

pub fn run(arguments: &RestoreArguments) -> anyhow::Result<()> {
    let RestoreArguments { from, data } = arguments;
    let restored = vasto_store::restore(from, data);
    let manifest = restored.with_context(|| format!("cannot restore {}; nothing was changed", from.display()))?;
    let vasto_store::BackupManifest { name, store, shards, files, .. } = &manifest;
    let (shards, files, bytes) = (shards.len(), files.len(), manifest.bytes());
    writeln!(
        std::io::stdout(),
        "restored store {store} from backup {name} into {}: {shards} shards, {files} files, {bytes} bytes",
        data.display()
    )
    .context("print the result")
}
