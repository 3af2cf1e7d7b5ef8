// SPDX-License-Identifier: Apache-2.0

//! One simulated PF: its files, and starting and stopping its process.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use services::vmm_process::isolate;
use simnic::{SimPf, pf};
use sriov::PfError;

use super::{SimError, SimPfRecord, Start};
use crate::sandbox;

/// The longest time that a process may take to stop.
const STOP: Duration = Duration::from_secs(2);

/// A simulated PF.
pub(super) struct Adapter {
    pub(super) name: String,
    pub(super) record: SimPfRecord,
    start: Start,
    process: Mutex<Running>,
}

/// Locked while the process is started or stopped.
#[derive(Default)]
struct Running {
    /// Says to the thread that waits for the process that its end was ordered.
    told: Arc<AtomicBool>,
    /// Stopped for good: another `Adapter` may have its place.
    retired: bool,
}

impl Adapter {
    pub(super) fn new(start: &Start, name: &str, record: &SimPfRecord) -> Self {
        Self {
            name: name.to_owned(),
            record: record.clone(),
            start: start.clone(),
            process: Mutex::default(),
        }
    }

    fn process(&self) -> MutexGuard<'_, Running> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The path of its process's socket. The number names it, because the PF's name may be too long
    /// for a socket's path.
    pub(super) fn socket(&self) -> PathBuf {
        self.start.dir.join(format!("{}.sock", self.record.number))
    }

    fn log(&self) -> PathBuf {
        self.start.dir.join(format!("{}.log", self.record.number))
    }

    fn failed(&self, source: PfError) -> SimError {
        SimError::Start { name: self.name.clone(), source }
    }

    /// Connects, and starts the process first if there is none.
    pub(super) fn open(&self) -> Result<SimPf, SimError> {
        let mut process = self.process();
        if process.retired {
            return Err(SimError::Retired { name: self.name.clone() });
        }
        match SimPf::connect(&self.socket()) {
            Err(error) if nobody_listens(&error) => {}
            // An agent died while it changed the number of VFs.
            Ok(pf) if pf.about().vfs != self.record.vfs => self.end(&process),
            result => return result.map_err(|source| SimError::Unusable { name: self.name.clone(), source }),
        }
        process.told = self.spawn()?;
        let pf = SimPf::connect(&self.socket()).map_err(|source| self.failed(source))?;
        tracing::info!(pf = self.name, vfs = self.record.vfs, pid = pf.about().pid, "simulated PF started");
        Ok(pf)
    }

    fn spawn(&self) -> Result<Arc<AtomicBool>, SimError> {
        let tap = match &self.record.tap {
            Some(tap) => Some(pf::open_tap(tap).map_err(|source| SimError::Tap {
                name: self.name.clone(),
                tap: tap.clone(),
                source,
            })?),
            None => None,
        };
        let at = |path: PathBuf| move |source| SimError::Directory { path, source };
        remove(&self.socket());
        let listener = pf::listen(&self.socket()).map_err(at(self.socket()))?;
        remove(&self.log());
        let log = OpenOptions::new().append(true).create_new(true).mode(0o600).open(self.log());
        let log = log.map_err(at(self.log()))?;
        let user = self.start.first_user.and_then(|first| first.checked_add(self.record.number.into()));
        let sandbox = serde_json::to_string(&sandbox::spec(user, &self.start.off));
        let mut command = Command::new(&self.start.program.path);
        command
            .args(&self.start.program.arguments)
            .args([&self.name, &self.record.vfs.to_string()])
            .arg(if tap.is_some() { "tap" } else { "-" })
            .arg(sandbox.map_err(|error| at(self.socket())(error.into()))?)
            .env_clear()
            .current_dir("/")
            .stdin(listener)
            .stdout(tap.map_or_else(Stdio::null, Stdio::from))
            .stderr(log);
        isolate(&mut command);
        let told = Arc::new(AtomicBool::new(false));
        let started = command.spawn().and_then(|mut child| {
            let (name, told) = (self.name.clone(), Arc::clone(&told));
            // This thread alone waits for the process.
            thread::Builder::new().name("sim-pf-end".into()).spawn(move || match child.wait() {
                Ok(_) if told.load(Ordering::Acquire) => tracing::info!(pf = name, "simulated PF stopped"),
                Ok(status) => tracing::error!(
                    pf = name,
                    "the process of a simulated PF ended ({status}): VMs lose their adapters on it; the \
                     agent starts it again when it is needed"
                ),
                Err(error) => tracing::warn!(pf = name, "cannot wait for its process: {error}"),
            })
        });
        match started {
            Ok(_) => Ok(told),
            Err(source) => {
                remove(&self.socket());
                Err(self.failed(PfError::Io { pf: self.name.clone(), source }))
            }
        }
    }

    /// Ends the process, if there is one, and removes its files. No process is started afterwards.
    pub(super) fn stop(&self) {
        let mut process = self.process();
        process.retired = true;
        self.end(&process);
    }

    fn end(&self, process: &Running) {
        process.told.store(true, Ordering::Release);
        let stopped = match SimPf::connect(&self.socket()) {
            Ok(mut pf) => pf.stop().is_ok() && gone(&self.socket()),
            Err(error) => nobody_listens(&error),
        };
        if stopped {
            remove(&self.socket());
            remove(&self.log());
        } else {
            tracing::error!(pf = self.name, "the process of a simulated PF does not stop: kill it");
        }
    }
}

fn nobody_listens(error: &PfError) -> bool {
    matches!(error, PfError::Io { source, .. }
        if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused))
}

/// Waits until no process listens at `socket`; false if one still does after `STOP`.
fn gone(socket: &Path) -> bool {
    let end = Instant::now() + STOP;
    while Instant::now() < end {
        match SimPf::connect(socket) {
            Err(error) if nobody_listens(&error) => return true,
            _ => thread::sleep(Duration::from_millis(5)),
        }
    }
    false
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!("{} cannot be removed: {error}", path.display());
        }
        _ => {}
    }
}
