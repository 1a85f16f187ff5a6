//! A clock that a test sets, for one process: a page of C that is preloaded into it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::cluster::temporary_directory;
use crate::connection::Connection;

/// A time of day of its own for one server.
pub struct Clock {
    /// What `shifted_clock.c` reads: seconds, as the machine lays out a number.
    shift: File,
    /// For the process that shall have this clock.
    pub environment: Vec<(String, String)>,
    _directory: TempDir,
}

impl Clock {
    /// The right time at first. `None`, and said, where there is no C compiler.
    pub fn new() -> Option<Clock> {
        let directory = temporary_directory();
        let library = compile(directory.path())?;
        let path = directory.path().join("shift");
        fs::write(&path, 0_i64.to_ne_bytes()).expect("a temporary file can be written");
        let environment = [("LD_PRELOAD", &library), ("SHIFTED_CLOCK", &path)]
            .map(|(name, path)| (name.to_owned(), path.to_str().expect("a temporary path is UTF-8").to_owned()))
            .to_vec();
        let shift = File::options().write(true).open(&path).expect("the file was just written");
        Some(Clock { shift, environment, _directory: directory })
    }

    /// Seconds from the right time on. In place: the server has the file mapped.
    pub fn set(&self, seconds: i64) {
        self.shift.write_all_at(&seconds.to_ne_bytes(), 0).expect("the file is open for writing");
    }
}

fn compile(folder: &Path) -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/shifted_clock.c");
    let library = folder.join("shifted_clock.so");
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).output();
    match compiled {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Some(library)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            eprintln!("skipped: no C compiler here");
            None
        }
        Err(error) => panic!("cannot run cc: {error}"),
    }
}

/// By how much the server's clock is behind that of the test.
pub fn seconds_behind(connection: &mut Connection) -> i64 {
    let time = connection.done(&["TIME"]).elements().expect("TIME answers an array");
    let seconds: i64 = time[0].text().parse().expect("seconds are a number");
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("it is after 1970").as_secs() as i64;
    now - seconds
}
