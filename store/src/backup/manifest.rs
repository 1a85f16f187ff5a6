//! The manifest of a backup: lines of text for people and programs, the last one a checksum over the others.
//!
//! ```text
//! vasto-backup 1
//! name 20261124T061500Z-1a2b
//! cluster 00c0ffee00c0ffee
//! store 0000abcd
//! data-format 1
//! started 1795500900
//! finished 1795500903
//! keyspace 0 epoch 1 copies 1 shards 3 name 0
//! shard 0/1 sequence 4711
//! file 8192 0123456789abcdef shards/0-1/000012.sst
//! end 0123456789abcdef
//! ```

use super::MANIFEST;
use super::restore::RestoreError;
use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Component, Path};
use std::str::FromStr;
use vasto_proto::id::{ClusterId, KeyspaceId, ShardId, ShardKey, StoreId};
use vasto_proto::rdb::crc64::crc64;
use vasto_proto::topology::KeyspaceRecord;

/// Of this text.
const VERSION: u32 = 1;
const TITLE: &str = "vasto-backup";

/// What a backup consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    pub name: String,
    pub cluster: ClusterId,
    pub store: StoreId,
    /// Of the data folder.
    pub data_format: u32,
    /// Unix seconds.
    pub started_s: u64,
    pub finished_s: u64,
    /// For people: the records themselves are files of the backup. Empty in a manifest that was read.
    pub keyspaces: Vec<KeyspaceRecord>,
    pub shards: Vec<ShardEntry>,
    pub files: Vec<FileEntry>,
}

/// A shard, and the number of the last write that its checkpoint has at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardEntry {
    pub shard: ShardKey,
    pub sequence: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEntry {
    /// Path below the backup's folder.
    pub name: String,
    pub bytes: u64,
    /// CRC-64 of the content.
    pub checksum: u64,
}

impl Manifest {
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    pub fn to_text(&self) -> String {
        let Self { name, cluster, store, data_format, started_s, finished_s, keyspaces, shards, files } = self;
        let mut text = format!("{TITLE} {VERSION}\nname {name}\ncluster {cluster}\nstore {store}\n");
        let _ = write!(text, "data-format {data_format}\nstarted {started_s}\nfinished {finished_s}\n");
        for KeyspaceRecord { id, name, epoch, copies, settings, shards, shard_count: _, operation: _, dropped } in
            keyspaces
        {
            let shards = shards.len();
            let fsync = settings.fsync.map(|fsync| format!(" fsync {fsync}")).unwrap_or_default();
            let dropped = if *dropped { " dropped" } else { "" };
            let _ = writeln!(
                text,
                "keyspace {id} epoch {epoch} copies {copies} shards {shards}{fsync}{dropped} name {name}"
            );
        }
        for ShardEntry { shard, sequence } in shards {
            let _ = writeln!(text, "shard {shard} sequence {sequence}");
        }
        for FileEntry { name, bytes, checksum } in files {
            let _ = writeln!(text, "file {bytes} {checksum:016x} {name}");
        }
        let checksum = crc64(text.as_bytes());
        let _ = writeln!(text, "end {checksum:016x}");
        text
    }

    /// Reads the manifest of the backup in a folder.
    pub fn load(folder: &Path) -> Result<Self, RestoreError> {
        let path = folder.join(MANIFEST);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Err(RestoreError::NoBackup(folder.to_owned()));
            }
            Err(source) => return Err(RestoreError::Io { path, source }),
        };
        match Self::parse(&text) {
            Ok(manifest) => Ok(manifest),
            Err(ParseError::Newer(found)) => Err(RestoreError::Newer { path, found, known: VERSION }),
            Err(ParseError::Damaged(reason)) => Err(RestoreError::Damaged { path, reason }),
        }
    }

    fn parse(text: &[u8]) -> Result<Self, ParseError> {
        let text = std::str::from_utf8(text).map_err(|_| damaged("it is no text"))?;
        let first = text.lines().next().and_then(|line| line.strip_prefix(TITLE)).unwrap_or_default();
        let version: u32 = first.trim_start().parse().map_err(|_| damaged("it does not begin as a manifest"))?;
        if version > VERSION {
            return Err(ParseError::Newer(version));
        }
        let (body, checksum) = text
            .strip_suffix('\n')
            .and_then(|text| text.rsplit_once("\nend "))
            .ok_or_else(|| damaged("its end is missing"))?;
        if u64::from_str_radix(checksum, 16) != Ok(crc64(&text.as_bytes()[..body.len() + 1])) {
            return Err(damaged("its checksum is wrong"));
        }
        let mut manifest = Self {
            name: String::new(),
            cluster: ClusterId(0),
            store: StoreId(0),
            data_format: 0,
            started_s: 0,
            finished_s: 0,
            keyspaces: Vec::new(),
            shards: Vec::new(),
            files: Vec::new(),
        };
        for line in body.lines().skip(1) {
            manifest.take(line).ok_or_else(|| damaged(&format!("it has a line '{line}'")))?;
        }
        Ok(manifest)
    }

    fn take(&mut self, line: &str) -> Option<()> {
        let (kind, rest) = line.split_once(' ')?;
        match kind {
            "name" => self.name = rest.to_owned(),
            "cluster" => self.cluster = ClusterId(u64::from_str_radix(rest, 16).ok()?),
            "store" => self.store = StoreId(u32::from_str_radix(rest, 16).ok()?),
            "data-format" => self.data_format = rest.parse().ok()?,
            "started" => self.started_s = rest.parse().ok()?,
            "finished" => self.finished_s = rest.parse().ok()?,
            "keyspace" => {}
            "shard" => self.shards.push(rest.parse().ok()?),
            "file" => self.files.push(rest.parse().ok()?),
            _ => return None,
        }
        Some(())
    }
}

enum ParseError {
    Newer(u32),
    Damaged(String),
}

fn damaged(reason: &str) -> ParseError {
    ParseError::Damaged(reason.to_owned())
}

impl FromStr for ShardEntry {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let parse = || {
            let (shard, sequence) = text.split_once(" sequence ")?;
            let (keyspace, shard) = shard.split_once('/')?;
            let shard = ShardKey { keyspace: KeyspaceId(keyspace.parse().ok()?), shard: ShardId(shard.parse().ok()?) };
            Some(Self { shard, sequence: sequence.parse().ok()? })
        };
        parse().ok_or(())
    }
}

impl FromStr for FileEntry {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let parse = || {
            let mut parts = text.splitn(3, ' ');
            let (bytes, checksum, name) = (parts.next()?, parts.next()?, parts.next()?);
            // Whoever wrote it: nothing outside of the folder is touched.
            let is_inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
            let name = Some(name).filter(|name| is_inside && !name.is_empty())?.to_owned();
            Some(Self { name, bytes: bytes.parse().ok()?, checksum: u64::from_str_radix(checksum, 16).ok()? })
        };
        parse().ok_or(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn example() -> Manifest {
        let shard = |number| ShardKey { keyspace: KeyspaceId(3), shard: ShardId(number) };
        Manifest {
            name: "20261124T061500Z-1a2b".to_owned(),
            cluster: ClusterId(0xc0ffee),
            store: StoreId(0xabcd),
            data_format: 1,
            started_s: 1_795_500_900,
            finished_s: 1_795_500_903,
            keyspaces: Vec::new(),
            shards: vec![
                ShardEntry { shard: shard(0), sequence: 4711 },
                ShardEntry { shard: shard(1), sequence: u64::MAX },
            ],
            files: vec![FileEntry {
                name: "shards/3-0/a file".to_owned(),
                bytes: 8192,
                checksum: 0x0123_4567_89ab_cdef,
            }],
        }
    }

    fn reason(text: &[u8]) -> String {
        match Manifest::parse(text) {
            Ok(_) => "fine".to_owned(),
            Err(ParseError::Newer(version)) => format!("newer {version}"),
            Err(ParseError::Damaged(reason)) => reason,
        }
    }

    fn sealed(body: &str) -> Vec<u8> {
        format!("{body}end {:016x}\n", crc64(body.as_bytes())).into_bytes()
    }

    #[test]
    fn a_manifest_comes_back() {
        let manifest = example();
        assert!(matches!(Manifest::parse(manifest.to_text().as_bytes()), Ok(read) if read == manifest));
        let stores = [StoreId(1), StoreId(2)];
        let described = Manifest {
            keyspaces: vec![KeyspaceRecord::new(KeyspaceId(3), "three", &stores).unwrap()],
            ..manifest.clone()
        };
        let text = described.to_text();
        assert!(text.contains("\nkeyspace 3 epoch 1 copies 1 shards 2 name three\n"), "{text}");
        assert!(matches!(Manifest::parse(text.as_bytes()), Ok(read) if read == manifest));
    }

    #[test]
    fn every_cut_and_every_flip_is_noticed() {
        let text = example().to_text().into_bytes();
        for at in 0..text.len() {
            assert_ne!(reason(&text[..at]), "fine", "cut at {at}");
            let mut flipped = text.clone();
            flipped[at] ^= 1;
            assert_ne!(reason(&flipped), "fine", "flip at {at}");
        }
    }

    #[test]
    fn what_is_no_manifest_is_named() {
        assert_eq!(reason(b"vasto-backup 2\nwhatever"), "newer 2");
        assert_eq!(reason(b"hello\n"), "it does not begin as a manifest");
        assert_eq!(reason(b"vasto-backup 1\nname x\n"), "its end is missing");
        for line in ["file 1 0 ../../etc/passwd", "file 1 0 /etc/passwd", "file 1 0 ", "file x 0 a", "shard 1", "odd 1"]
        {
            let text = sealed(&format!("vasto-backup 1\n{line}\n"));
            assert_eq!(reason(&text), format!("it has a line '{line}'"));
        }
    }
}
