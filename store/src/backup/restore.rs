//! Makes a data folder of a backup: every file is copied and its checksum compared; the folder appears when it is whole.

use super::CHUNK_BYTES;
use super::manifest::{FileEntry, Manifest};
use crate::node;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;
use vasto_proto::rdb::crc64::Crc64;

/// Why nothing was restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    #[error("{0} is not empty")]
    NotEmpty(PathBuf),
    #[error("{0} is no finished backup: it has no manifest")]
    NoBackup(PathBuf),
    #[error("{path} has version {found}; this program knows {known} and older")]
    Newer { path: PathBuf, found: u32, known: u32 },
    #[error("{path} is damaged: {reason}")]
    Damaged { path: PathBuf, reason: String },
    #[error("{0} is in the way: it is left of a restore that did not end; remove it")]
    Leftover(PathBuf),
    #[error("cannot use {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> RestoreError + use<> {
    let path = path.to_owned();
    move |source| RestoreError::Io { path, source }
}

/// Makes `data`, which must not exist or be empty, of the backup in `from`. Files are copied, never linked: what the restored store does
/// leaves the backup as it is.
pub fn restore(from: &Path, data: &Path) -> Result<Manifest, RestoreError> {
    let manifest = Manifest::load(from)?;
    if manifest.data_format > node::FORMAT_VERSION {
        let (path, found, known) = (from.to_owned(), manifest.data_format, node::FORMAT_VERSION);
        return Err(RestoreError::Newer { path, found, known });
    }
    let data = std::path::absolute(data).map_err(at(data))?;
    match fs::read_dir(&data).map(|mut entries| entries.next().is_some()) {
        Ok(true) => return Err(RestoreError::NotEmpty(data)),
        Ok(false) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(RestoreError::Io { path: data, source }),
    }
    // What is missing or cut is found before anything is written.
    for file in &manifest.files {
        check_size(&from.join(&file.name), file)?;
    }
    let (Some(parent), Some(name)) = (data.parent(), data.file_name()) else {
        return Err(RestoreError::NotEmpty(data));
    };
    fs::create_dir_all(parent).map_err(at(parent))?;
    let mut unfinished = name.to_owned();
    unfinished.push(".restoring");
    let unfinished = parent.join(unfinished);
    match fs::create_dir(&unfinished) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(RestoreError::Leftover(unfinished)),
        Err(source) => return Err(RestoreError::Io { path: unfinished, source }),
    }
    let filled = fill(&manifest, from, &unfinished).and_then(|()| {
        // An empty folder gives way.
        fs::rename(&unfinished, &data).map_err(at(&data))?;
        sync_folder(parent)
    });
    match filled {
        Ok(()) => Ok(manifest),
        Err(error) => {
            let _ = fs::remove_dir_all(&unfinished);
            Err(error)
        }
    }
}

fn damaged(path: &Path, reason: String) -> RestoreError {
    RestoreError::Damaged { path: path.to_owned(), reason }
}

fn check_size(path: &Path, file: &FileEntry) -> Result<(), RestoreError> {
    match fs::metadata(path) {
        Ok(found) if found.len() == file.bytes => Ok(()),
        Ok(found) => Err(damaged(path, format!("it has {} bytes instead of {}", found.len(), file.bytes))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(damaged(path, "it is missing".to_owned())),
        Err(source) => Err(RestoreError::Io { path: path.to_owned(), source }),
    }
}

fn fill(manifest: &Manifest, from: &Path, folder: &Path) -> Result<(), RestoreError> {
    // A store makes these at its start; a backup without shards has no file that would.
    let mut folders = vec![folder.to_owned(), folder.join("records"), folder.join("shards")];
    for file in &manifest.files {
        let target = folder.join(&file.name);
        let parent = target.parent().expect("it is below the folder").to_owned();
        if !folders.contains(&parent) {
            folders.push(parent);
        }
    }
    for path in &folders {
        fs::create_dir_all(path).map_err(at(path))?;
    }
    let mut chunk = vec![0; CHUNK_BYTES];
    for file in &manifest.files {
        copy(&from.join(&file.name), &folder.join(&file.name), file, &mut chunk)?;
    }
    folders.iter().try_for_each(|folder| sync_folder(folder))
}

fn copy(source: &Path, target: &Path, file: &FileEntry, chunk: &mut [u8]) -> Result<(), RestoreError> {
    let mut reader = File::open(source).map_err(at(source))?;
    let mut writer = File::create(target).map_err(at(target))?;
    let mut crc = Crc64::default();
    loop {
        let length = reader.read(chunk).map_err(at(source))?;
        if length == 0 {
            break;
        }
        crc.update(&chunk[..length]);
        writer.write_all(&chunk[..length]).map_err(at(target))?;
    }
    if crc.value() != file.checksum {
        return Err(damaged(source, "its checksum is wrong".to_owned()));
    }
    writer.sync_all().map_err(at(target))
}

fn sync_folder(folder: &Path) -> Result<(), RestoreError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(at(folder))
}
