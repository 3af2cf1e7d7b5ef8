//! The way to the host's PFs: one thread that may wait for the kernel, and a handle for those that may not.
//!
//! One thread is enough: the kernel makes all changes of network interfaces one after the other anyway. Whoever asks
//! waits as long as it takes; who has less time lets the answer come later and undoes it then.

pub mod watch;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::mpsc,
    thread,
};

use netpolicy::{PfCapabilities, VfRef};
use passthrough::host::{ApplyError, InventoryError, PfControl, PfError, VfChange, VfSettings};
use tokio::sync::oneshot;

use crate::{environment::OpenPf, inventory::Inventory};

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

/// A PF as the switch knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PfName {
    /// Its interface, or its address where it has none.
    pub name: String,
    /// Whether its interface is set up.
    pub up: bool,
}

/// The PFs of a host. Called on the thread only, where it may block.
pub trait Pfs: Send + 'static {
    /// Those that there are now.
    ///
    /// # Errors
    /// The inventory cannot be read.
    fn list(&mut self) -> Result<Vec<PfName>, PfError>;

    /// The way to one of them.
    ///
    /// # Errors
    /// There is no such PF, or no way to it.
    fn open(&mut self, name: &str) -> Result<Box<dyn PfControl>, PfError>;
}

/// The PFs of a host and simulated ones, whatever leads to each.
pub struct HostPfs {
    inventory: Inventory,
    open: OpenPf,
}

impl HostPfs {
    /// PFs found in `inventory` and opened by `open`.
    #[must_use]
    pub fn new(inventory: Inventory, open: OpenPf) -> Self {
        Self { inventory, open }
    }
}

impl Pfs for HostPfs {
    fn list(&mut self) -> Result<Vec<PfName>, PfError> {
        let name = |pf: passthrough::host::Pf| PfName {
            name: pf.name(),
            up: pf.interface().is_some_and(|interface| interface.admin_up),
        };
        Ok(self.inventory.pfs()?.into_iter().map(name).collect())
    }

    fn open(&mut self, name: &str) -> Result<Box<dyn PfControl>, PfError> {
        (self.open)(self.inventory.pf_by_name(name)?.device.bdf)
    }
}

/// Why a PF did not do it.
#[derive(Debug, thiserror::Error)]
pub enum PfFailure {
    /// It cannot be asked or read.
    #[error(transparent)]
    Pf(#[from] PfError),
    /// It did not make the changes; they are undone, as far as the error says.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The thread has ended.
    #[error("The agent no longer controls PFs: it is about to end")]
    Closed,
}

type Reply<T> = oneshot::Sender<Result<T, PfFailure>>;

enum Command {
    List { reply: Reply<Vec<PfName>> },
    Capabilities { pf: String, reply: Reply<PfCapabilities> },
    Read { pf: String, reply: Reply<BTreeMap<u16, VfSettings>> },
    Apply { vf: VfRef, changes: Vec<VfChange>, reply: Reply<()> },
}

/// The handle of the thread, which ends with its last handle.
#[derive(Clone, Debug)]
pub struct PfHandle(mpsc::Sender<Command>);

impl PfHandle {
    /// Starts the thread.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn start(pfs: impl Pfs) -> io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let thread = Thread { pfs: Box::new(pfs), open: HashMap::new() };
        thread::Builder::new().name("pf".into()).spawn(move || thread.run(&inbox))?;
        Ok(Self(commands))
    }

    async fn call<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, PfFailure> {
        let (reply, answer) = oneshot::channel();
        self.0.send(command(reply)).map_err(|_| PfFailure::Closed)?;
        answer.await.map_err(|_| PfFailure::Closed)?
    }

    /// The PFs that there are now.
    ///
    /// # Errors
    /// See [`PfFailure`].
    pub async fn list(&self) -> Result<Vec<PfName>, PfFailure> {
        self.call(|reply| Command::List { reply }).await
    }

    /// What a PF can enforce.
    ///
    /// # Errors
    /// See [`PfFailure`].
    pub async fn capabilities(&self, pf: &str) -> Result<PfCapabilities, PfFailure> {
        let pf = pf.to_owned();
        self.call(|reply| Command::Capabilities { pf, reply }).await
    }

    /// What a PF has set for its VFs.
    ///
    /// # Errors
    /// See [`PfFailure`].
    pub async fn read(&self, pf: &str) -> Result<BTreeMap<u16, VfSettings>, PfFailure> {
        let pf = pf.to_owned();
        self.call(|reply| Command::Read { pf, reply }).await
    }

    /// Makes all changes and reads them back, or undoes them: see [`PfControl::apply`]. They are made even if the
    /// caller no longer waits.
    ///
    /// # Errors
    /// See [`PfFailure`].
    pub async fn apply(&self, vf: &VfRef, changes: Vec<VfChange>) -> Result<(), PfFailure> {
        if changes.is_empty() {
            return Ok(());
        }
        let vf = vf.clone();
        self.call(|reply| Command::Apply { vf, changes, reply }).await
    }
}

struct Thread {
    pfs: Box<dyn Pfs>,
    open: HashMap<String, Box<dyn PfControl>>,
}

impl Thread {
    fn run(mut self, inbox: &mpsc::Receiver<Command>) {
        // A reply that nobody waits for any more is no error.
        while let Ok(command) = inbox.recv() {
            match command {
                Command::List { reply } => {
                    let list = self.pfs.list().map_err(PfFailure::from);
                    // Ways to PFs that are gone lead nowhere, and their names may be others' soon.
                    if let Ok(list) = &list {
                        self.open.retain(|name, _| list.iter().any(|pf| pf.name == *name));
                    }
                    drop(reply.send(list));
                }
                Command::Capabilities { pf, reply } => {
                    drop(reply.send(self.with(&pf, |control| Ok(control.capabilities()?))));
                }
                Command::Read { pf, reply } => {
                    drop(reply.send(self.with(&pf, |control| Ok(control.read_all()?))));
                }
                Command::Apply { vf, changes, reply } => {
                    drop(reply.send(self.apply(&vf, &changes)));
                }
            }
        }
    }

    fn apply(&mut self, vf: &VfRef, changes: &[VfChange]) -> Result<(), PfFailure> {
        self.with(&vf.pf, |control| {
            let gone = || PfError::NoVf { pf: vf.pf.clone(), vf: u16::MAX };
            let number = u16::try_from(vf.index).map_err(|_| gone())?;
            Ok(control.apply(number, changes)?)
        })
    }

    fn with<T>(
        &mut self,
        pf: &str,
        work: impl FnOnce(&mut dyn PfControl) -> Result<T, PfFailure>,
    ) -> Result<T, PfFailure> {
        let mut control = match self.open.remove(pf) {
            Some(control) => control,
            None => self.pfs.open(pf)?,
        };
        let result = work(&mut *control);
        if !lost(&result) {
            self.open.insert(pf.to_owned(), control);
        }
        result
    }
}

/// Whether the way to the PF must be found again.
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
