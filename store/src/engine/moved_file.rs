//! Files of rows that are written beside a database, to be taken into it as they are.

use super::EngineError;
use rocksdb::{Options, SstFileWriter};
use std::fs;
use std::path::{Path, PathBuf};

/// What these files are called in the folder of a database until they are taken in; those that were not go when it is opened.
pub const EXTENSION: &str = "moved";

/// Where such files are written, and how. It holds nothing of the database.
pub struct MovedFiles {
    pub(super) options: Options,
    pub(super) folder: PathBuf,
}

/// A file that is being written.
pub struct MovedFileWriter<'f> {
    writer: SstFileWriter<'f>,
    file: MovedFile,
}

/// A file that is written and on the disk. It goes with this, unless it was taken in.
pub struct MovedFile {
    path: PathBuf,
}

impl MovedFiles {
    /// Begins a file; it must get a row.
    pub fn begin(&self) -> Result<MovedFileWriter<'_>, EngineError> {
        let file = MovedFile { path: self.folder.join(format!("{:016x}.{EXTENSION}", fastrand::u64(..))) };
        let writer = SstFileWriter::create(&self.options);
        writer.open(&file.path)?;
        Ok(MovedFileWriter { writer, file })
    }
}

impl MovedFileWriter<'_> {
    /// Adds a row; its physical key lies behind those before.
    pub fn put(&mut self, key: &[u8], row: &[u8]) -> Result<(), EngineError> {
        Ok(self.writer.put(key, row)?)
    }

    pub fn finish(mut self) -> Result<MovedFile, EngineError> {
        self.writer.finish()?;
        Ok(self.file)
    }
}

impl MovedFile {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for MovedFile {
    fn drop(&mut self) {
        // Once taken in it has another name. What cannot be removed goes with the next opening.
        let _ = fs::remove_file(&self.path);
    }
}
