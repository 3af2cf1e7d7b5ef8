// SPDX-License-Identifier: Apache-2.0

//! A VM's directory under the run directory: control socket, console ring, log.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use protocol::Listener;
use text::is_active;
use uuid::Uuid;

use crate::console;

/// The size in bytes beyond which the log is cut.
const LOG_MAX: u64 = 256 * 1024;

/// The most bytes of the log's end that are shown.
const TAIL: u64 = 2048;

/// `RUN_DIR/vms/ID`, mode 0700 and root's: the vmm gets descriptors, never a path.
#[derive(Clone, Debug)]
pub struct VmDirectory(PathBuf);

impl VmDirectory {
    /// The directory of `vm`, which need not exist yet.
    #[must_use]
    pub fn new(run_dir: &Path, vm: Uuid) -> Self {
        Self(run_dir.join("vms").join(vm.to_string()))
    }

    /// Creates the directory, or cleans it of the socket of a former process of this VM.
    ///
    /// # Errors
    /// Those of `mkdir` and `unlink`.
    pub fn create(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.0)?;
        absent_is_fine(fs::remove_file(self.control()))
    }

    /// Path of the control socket.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    /// Binds the control socket.
    ///
    /// # Errors
    /// Those of [`Listener::bind`].
    pub fn bind(&self) -> io::Result<Listener> {
        Listener::bind(&self.control())
    }

    /// Makes an empty console ring and opens it for the vmm to write.
    ///
    /// # Errors
    /// Those of `open` and `ftruncate`.
    pub fn create_console(&self) -> io::Result<File> {
        // A new file, not a truncated one: a reader of the old one keeps it whole.
        absent_is_fine(fs::remove_file(self.console()))?;
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(self.console())?;
        file.set_len(console::FILE_LEN)?;
        Ok(file)
    }

    /// Path of the console ring.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.0.join("console")
    }

    /// Opens the log for a new process, and removes the text of former ones.
    ///
    /// # Errors
    /// Those of `open`.
    pub fn create_log(&self) -> io::Result<File> {
        absent_is_fine(fs::remove_file(self.log()))?;
        OpenOptions::new().append(true).create_new(true).mode(0o600).open(self.log())
    }

    /// Cuts the log if it has become too long. The vmm appends, so it goes on at the beginning.
    pub fn bound_log(&self) {
        let long = fs::metadata(self.log()).is_ok_and(|meta| meta.len() > LOG_MAX);
        if long && let Ok(file) = OpenOptions::new().write(true).open(self.log()) {
            // The next tick tries a failed cut again.
            drop(file.set_len(0));
        }
    }

    /// The end of the log, with the last words of a process that died.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(self.log())?;
            let len = file.metadata()?.len();
            file.seek(SeekFrom::Start(len.saturating_sub(TAIL)))?;
            let mut bytes = Vec::new();
            file.take(TAIL).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
        text.trim().replace(|c: char| is_active(c) && c != '\n', " ")
    }

    /// Removes the socket: no new connection is possible.
    ///
    /// # Errors
    /// Those of `unlink`; a missing socket is no error.
    pub fn close(&self) -> io::Result<()> {
        absent_is_fine(fs::remove_file(self.control()))
    }

    /// Removes the directory and its content.
    ///
    /// # Errors
    /// Those of `unlink`; a missing directory is no error.
    pub fn remove(&self) -> io::Result<()> {
        absent_is_fine(fs::remove_dir_all(&self.0))
    }

    fn log(&self) -> PathBuf {
        self.0.join("vmm.log")
    }
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn everything_in_it_is_private_and_the_log_is_bounded() {
        let run = tempfile::tempdir().unwrap();
        let dir = VmDirectory::new(run.path(), Uuid::new_v4());
        for _ in 0..2 {
            dir.create().unwrap();
            let _listener = dir.bind().unwrap();
            let console = dir.create_console().unwrap();
            assert_eq!(console.metadata().unwrap().len(), console::FILE_LEN);
            let mut log = dir.create_log().unwrap();
            log.write_all(&vec![b'x'; 300 * 1024]).unwrap();
            dir.bound_log();
            log.write_all(b"last \x1b[31mwords\n").unwrap();
            assert_eq!(dir.log_tail(), "last  [31mwords");
        }
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir.0), 0o700);
        assert_eq!(mode(&dir.console()), 0o600);
        assert_eq!(mode(&dir.log()), 0o600);
        dir.remove().unwrap();
        dir.remove().unwrap();
        assert!(!dir.0.exists());
    }
}
