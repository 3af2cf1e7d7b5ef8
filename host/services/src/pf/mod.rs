// SPDX-License-Identifier: Apache-2.0

//! Access to the host's PFs: threads that may wait for the kernel, and a handle for callers that
//! may not.
//!
//! Each PF has a thread that executes its commands in order. The kernel makes all changes of
//! network interfaces one after the other, so one thread would be enough for it. But the process of
//! a simulated PF may be in a guest's hands, and must not hold up the commands for other PFs. The
//! thread starts with the first command and ends when the PF is gone, after the commands before. It
//! may complete them beside the thread of a PF that has its name by then.
//!
//! Calls have no timeout. Callers with a deadline must roll back late successes.

pub mod watch;

use std::{
    collections::{BTreeMap, HashMap},
    fmt, io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
};

use netpolicy::{PfCapabilities, VfRef};
use sriov::{ApplyError, Bdf, InventoryError, PfControl, PfError, VfChange, VfSettings};
use tokio::sync::oneshot;

#[cfg(any(test, feature = "test-support"))]
pub mod fake;
#[cfg(test)]
mod tests;

/// Most PFs that have a thread for new commands at the same time: more than a host has.
const MAX_PFS: usize = 256;

/// A PF as the switch knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PfName {
    /// Its interface, or its address where it has none.
    pub name: String,
    /// Whether its interface is set up.
    pub up: bool,
}

/// The PFs of a host. Only the threads call it, where it may block.
pub trait Pfs: Send + Sync + 'static {
    /// The PFs that exist now. Does not ask them, because one may not answer.
    ///
    /// # Errors
    /// The inventory cannot be read.
    fn list(&self) -> Result<Vec<PfName>, PfError>;

    /// The address of the PF that has this name now. Names can change, and move to another PF.
    ///
    /// # Errors
    /// There is no such PF.
    fn address(&self, name: &str) -> Result<Bdf, PfError>;

    /// Opens control of a PF.
    ///
    /// # Errors
    /// There is no such PF, or it cannot be opened.
    fn open(&self, name: &str) -> Result<Box<dyn PfControl>, PfError>;
}

/// Why a PF did not complete a command.
#[derive(Debug, thiserror::Error)]
pub enum PfFailure {
    /// The PF cannot be asked or read.
    #[error(transparent)]
    Pf(#[from] PfError),
    /// The PF did not make the changes. They are rolled back, as far as the error says.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The PF would need a thread beyond the limit.
    #[error("More than {MAX_PFS} PFs are in use at once: try again")]
    TooMany,
    /// Its thread cannot be started.
    #[error("Cannot start a thread for the PF: try again when the host has fewer threads")]
    Thread(#[source] io::Error),
    /// The threads have ended.
    #[error("The agent no longer controls PFs: it is about to end")]
    Closed,
}

type Reply<T> = oneshot::Sender<Result<T, PfFailure>>;

/// A command to the thread of a PF.
enum Command {
    Capabilities { reply: Reply<PfCapabilities> },
    Read { reply: Reply<BTreeMap<u16, VfSettings>> },
    Apply { vf: VfRef, changes: Vec<VfChange>, reply: Reply<()> },
}

/// The handle of the threads, which end with the last handle.
#[derive(Clone)]
pub struct PfHandle(Arc<Threads>);

struct Threads {
    pfs: Arc<dyn Pfs>,
    lists: mpsc::Sender<Reply<Vec<PfName>>>,
    /// The number of threads of PFs that were started.
    started: AtomicU64,
    /// By the PF's name.
    of_pfs: Mutex<HashMap<String, Inbox>>,
}

/// The way to a PF's thread, which ends when this is dropped.
struct Inbox {
    /// Tells the threads of one name apart.
    generation: u64,
    commands: mpsc::Sender<Command>,
}

impl fmt::Debug for PfHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PfHandle").finish_non_exhaustive()
    }
}

impl Threads {
    fn of_pfs(&self) -> MutexGuard<'_, HashMap<String, Inbox>> {
        self.of_pfs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a command to a PF's thread, and starts the thread if there is none. Returns the thread's generation.
    fn tell(&self, pf: &str, command: Command) -> Result<u64, PfFailure> {
        let mut threads = self.of_pfs();
        let command = match threads.get(pf) {
            None => command,
            Some(thread) => match thread.commands.send(command) {
                Ok(()) => return Ok(thread.generation),
                // The thread has panicked.
                Err(mpsc::SendError(command)) => command,
            },
        };
        if threads.len() >= MAX_PFS {
            return Err(PfFailure::TooMany);
        }
        let (commands, inbox) = mpsc::channel();
        let thread = Thread { pf: pf.to_owned(), pfs: Arc::clone(&self.pfs), control: None };
        let started = thread::Builder::new().name("pf".into()).spawn(move || thread.run(&inbox));
        started.map_err(PfFailure::Thread)?;
        commands.send(command).map_err(|_| PfFailure::Closed)?;
        let generation = self.started.fetch_add(1, Ordering::Relaxed);
        threads.insert(pf.to_owned(), Inbox { generation, commands });
        Ok(generation)
    }

    /// Ends the thread of a PF that is gone. A PF that came back meanwhile has a thread of its own, which goes on.
    fn end(&self, pf: &str, generation: u64) {
        self.of_pfs().retain(|name, inbox| name != pf || inbox.generation != generation);
    }
}

impl PfHandle {
    /// Starts the thread that lists PFs. Those of single PFs start when they are needed.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn start(pfs: impl Pfs) -> io::Result<Self> {
        let pfs: Arc<dyn Pfs> = Arc::new(pfs);
        let (lists, inbox) = mpsc::channel::<Reply<Vec<PfName>>>();
        let listed = Arc::clone(&pfs);
        thread::Builder::new().name("pf-list".into()).spawn(move || {
            while let Ok(reply) = inbox.recv() {
                drop(reply.send(listed.list().map_err(PfFailure::from)));
            }
        })?;
        Ok(Self(Arc::new(Threads { pfs, lists, started: AtomicU64::default(), of_pfs: Mutex::default() })))
    }

    async fn call<T>(&self, pf: &str, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, PfFailure> {
        let (reply, answer) = oneshot::channel();
        let generation = self.0.tell(pf, command(reply))?;
        let result = answer.await.map_err(|_| PfFailure::Closed)?;
        if is_gone(&result) {
            self.0.end(pf, generation);
        }
        result
    }

    /// The PFs that exist now. Threads of other PFs end: another PF may soon have such a name.
    ///
    /// # Errors
    /// See [`PfFailure`].
    pub async fn list(&self) -> Result<Vec<PfName>, PfFailure> {
        let (reply, answer) = oneshot::channel();
        self.0.lists.send(reply).map_err(|_| PfFailure::Closed)?;
        let list = answer.await.map_err(|_| PfFailure::Closed)??;
        self.0.of_pfs().retain(|name, _| list.iter().any(|pf| pf.name == *name));
        Ok(list)
    }

    /// The settings that a PF can enforce.
    ///
    /// # Errors
    /// See [`PfFailure`].
    pub async fn capabilities(&self, pf: &str) -> Result<PfCapabilities, PfFailure> {
        self.call(pf, |reply| Command::Capabilities { reply }).await
    }

    /// The settings that a PF has for its VFs.
    ///
    /// # Errors
    /// See [`PfFailure`].
    pub async fn read(&self, pf: &str) -> Result<BTreeMap<u16, VfSettings>, PfFailure> {
        self.call(pf, |reply| Command::Read { reply }).await
    }

    /// Makes all changes and reads them back, or rolls them back: see [`PfControl::apply`]. The
    /// changes are made even if the caller no longer waits.
    ///
    /// # Errors
    /// See [`PfFailure`].
    pub async fn apply(&self, vf: &VfRef, changes: Vec<VfChange>) -> Result<(), PfFailure> {
        if changes.is_empty() {
            return Ok(());
        }
        let pf = vf.pf.clone();
        let vf = vf.clone();
        self.call(&pf, |reply| Command::Apply { vf, changes, reply }).await
    }
}

/// The state of a PF's thread.
struct Thread {
    pf: String,
    pfs: Arc<dyn Pfs>,
    /// The open control of the PF, with the address of that PF.
    control: Option<(Bdf, Box<dyn PfControl>)>,
}

impl Thread {
    fn run(mut self, inbox: &mpsc::Receiver<Command>) {
        while let Ok(command) = inbox.recv() {
            self.obey(command);
        }
    }

    fn obey(&mut self, command: Command) {
        // A dropped receiver of the reply is no error. Nobody needs what a caller has given up to read: a PF that does not
        // answer would take its time for each of them.
        match command {
            Command::Capabilities { reply } if reply.is_closed() => {}
            Command::Read { reply } if reply.is_closed() => {}
            Command::Capabilities { reply } => {
                drop(reply.send(self.with(|control| Ok(control.capabilities()?))));
            }
            Command::Read { reply } => {
                drop(reply.send(self.with(|control| Ok(control.read_all()?))));
            }
            Command::Apply { vf, changes, reply } => {
                drop(reply.send(self.apply(&vf, &changes)));
            }
        }
    }

    fn apply(&mut self, vf: &VfRef, changes: &[VfChange]) -> Result<(), PfFailure> {
        self.with(|control| {
            let gone = || PfError::NoVf { pf: vf.pf.clone(), vf: u16::MAX };
            let number = u16::try_from(vf.index).map_err(|_| gone())?;
            Ok(control.apply(number, changes)?)
        })
    }

    fn with<T>(
        &mut self,
        work: impl FnOnce(&mut dyn PfControl) -> Result<T, PfFailure>,
    ) -> Result<T, PfFailure> {
        let address = self.pfs.address(&self.pf)?;
        let mut control = match self.control.take() {
            Some((of, control)) if of == address => control,
            _ => self.pfs.open(&self.pf)?,
        };
        let result = work(&mut *control);
        if !lost(&result) {
            self.control = Some((address, control));
        }
        result
    }
}

/// Whether there is no such PF.
fn is_gone<T>(result: &Result<T, PfFailure>) -> bool {
    use InventoryError::{NoDevice, NoSuchInterface, NotPf};
    matches!(result, Err(PfFailure::Pf(PfError::Inventory(NoDevice(_) | NotPf(_) | NoSuchInterface(_)))))
}

/// Whether control of the PF must be opened again.
fn lost<T>(result: &Result<T, PfFailure>) -> bool {
    let error = match result {
        Err(PfFailure::Pf(error)) => error,
        Err(PfFailure::Apply(error)) => &error.source,
        _ => return false,
    };
    matches!(
        error,
        PfError::NoInterface { .. }
            | PfError::Io { .. }
            | PfError::Protocol { .. }
            | PfError::Inventory(
                InventoryError::NoDevice(_)
                    | InventoryError::NotPf(_)
                    | InventoryError::NoSuchInterface(_)
                    | InventoryError::Sysfs(_)
            )
    )
}
