// SPDX-License-Identifier: Apache-2.0

//! The switch: one task that owns the policy and its state, and decides.
//!
//! ```text
//!  API ──put, delete──▶ ┌────────┐ ──evaluate──▶ netpolicy::SwitchState
//!  VM tasks ──attach,   │ switch │
//!   bind, ask, notice──▶│  task  │ ──job per port──▶ PF threads, vmm, store
//!  PF watch ──hints──▶  └────────┘ ◀──────end─────
//!                           └──▶ decisions ──▶ database, log, events
//! ```
//!
//! The task never waits for the PF, a vmm or a disk on a guest's behalf: what takes time is a job in the port's
//! `lane`, refusals are answered at once. It believes no vmm: a question is answered for the VM that the
//! connection belongs to, by the switch's own data; what a vmm reports moves nothing but what its own guest is believed
//! to have.
//!
//! * `objects`: switches, port groups, ports as the API edits them. `view`: as it shows them.
//! * `vms`: attaching, binding to VFs, releasing. `clean`: what is taken from a VF of a VM that is gone.
//! * `asks`: questions, and what becomes of them. `notices`: what relays tell.
//! * `upkeep`: corrections after policy changes, drift, reboots.

mod actor;
mod asks;
pub mod clean;
pub mod command;
pub mod error;
mod job;
mod lane;
pub mod link;
mod load;
mod made;
mod notices;
mod objects;
mod policy;
pub mod record;
#[cfg(test)]
mod tests;
mod upkeep;
mod view;
mod vms;
mod writer;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use api::types::Unchecked;
use netpolicy::{PfCapabilities, VfRef, VmId, VmRef};
use passthrough::{
    relay::{Notice, Question},
    sriov::{Hint, VfChange},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tracing::Span;

use self::command::{Command, KnownPf, Reply};
pub use self::{
    command::{Adapter, Leftover, Uplinks},
    error::SwitchError,
    link::{VmLink, Vmm},
    policy::Policy,
};
use crate::{
    decisions::{DecisionLog, events::EventHub},
    metrics::Metrics,
    pf::{PfHandle, PfName},
    store::Stores,
    vm::problem::chain,
};

/// Commands that wait for the task.
const QUEUE: usize = 256;

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// A vmm may take this long to confirm what was ordered; then its VM is stopped.
    pub confirm: Duration,
    /// A relay may take this long to say what became of a forwarded message.
    pub forwarded: Duration,
    /// All ports are compared with their PFs this often.
    pub compare: Duration,
    /// Hints are gathered for this long.
    pub gather: Duration,
    /// An address that a port gives up is kept for it this long, while others wait for it. Its driver may only set its list anew.
    pub offer: Duration,
    /// What is done late, to show what then happens.
    #[cfg(feature = "test-support")]
    pub late: Late,
}

/// What an agent for tests does late.
#[cfg(feature = "test-support")]
#[derive(Clone, Copy, Debug, Default)]
pub struct Late {
    /// A guest's change of its address is made on the PF after this time.
    pub address: Duration,
    /// A guest's multicast list is granted after this time.
    pub multicast: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            confirm: Duration::from_secs(5),
            forwarded: Duration::from_secs(2),
            compare: Duration::from_secs(30),
            gather: Duration::from_millis(200),
            offer: Duration::from_secs(2),
            #[cfg(feature = "test-support")]
            late: Late::default(),
        }
    }
}

/// What the switch works with.
pub struct Parts {
    /// The stores of its objects.
    pub store: Stores,
    /// The way to PFs.
    pub pf: PfHandle,
    /// Where decisions are recorded.
    pub decisions: DecisionLog,
    /// Where changes of objects are told.
    pub events: EventHub,
    /// News about interfaces, if they can be had; without them only the regular comparison finds drift.
    pub hints: Option<mpsc::Receiver<Hint>>,
    /// How long things may take.
    pub timing: Timing,
    /// Where it is counted.
    pub metrics: Metrics,
    /// Every request is granted, as if every policy accepted: shows what tests prove.
    #[cfg(feature = "test-support")]
    pub bypass: bool,
}

/// The handle of the switch. The task ends with its last handle.
#[derive(Clone, Debug)]
pub struct SwitchHandle {
    commands: mpsc::Sender<(Span, Command)>,
    pf: PfHandle,
    unchecked: watch::Receiver<UncheckedPorts>,
}

/// The ports that cannot be compared with their PF, by VM and adapter.
pub type UncheckedPorts = BTreeMap<(VmId, String), Unchecked>;

impl SwitchHandle {
    /// Reads what is in the store, puts right what a former agent left undone, and starts the task.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn start(parts: Parts) -> Result<Self, SwitchError> {
        let (commands, inbox) = mpsc::channel(QUEUE);
        let pf = parts.pf.clone();
        let pfs = known(&pf).await.unwrap_or_else(|error| {
            tracing::error!("The host's PFs cannot be read: {error}");
            Vec::new()
        });
        let (ports, unchecked) = watch::channel(UncheckedPorts::new());
        actor::start(parts, pfs, inbox, commands.downgrade(), ports).await?;
        Ok(Self { commands, pf, unchecked })
    }

    /// Why a port of a VM cannot be compared with its PF; None if it can. Does not wait for the switch.
    #[must_use]
    pub fn unchecked(&self, vm: VmId, adapter: &str) -> Option<Unchecked> {
        let ports = self.unchecked.borrow();
        // Nearly always empty, and the key is owned.
        if ports.is_empty() {
            return None;
        }
        ports.get(&(vm, adapter.to_owned())).cloned()
    }

    async fn call<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, SwitchError> {
        let (reply, answer) = oneshot::channel();
        self.tell(command(reply)).await;
        answer.await.map_err(|_| SwitchError::Closed)?
    }

    async fn tell(&self, command: Command) {
        // Whoever waits for an answer sees that there is none.
        drop(self.commands.send((Span::current(), command)).await);
    }

    /// A VM's adapters get ports. Those that have one keep it.
    ///
    /// # Errors
    /// No such port group, an address is in use, or the store fails: none of the VM's new ports is there then.
    pub async fn attach(&self, vm: VmRef, adapters: Vec<Adapter>) -> Result<(), SwitchError> {
        self.call(|reply| Command::Attach { vm, adapters, reply }).await
    }

    /// A VM is gone: its ports too. Its VFs have been released.
    ///
    /// # Errors
    /// A port has a VF, or the store fails.
    pub async fn detach(&self, vm: VmId) -> Result<(), SwitchError> {
        self.call(|reply| Command::Detach { vm, reply }).await
    }

    /// From which PFs the VFs of an attached VM's adapters may come.
    ///
    /// # Errors
    /// The PFs cannot be read.
    pub async fn plan(&self, vm: VmId) -> Result<Vec<Uplinks>, SwitchError> {
        let pfs = known(&self.pf).await?;
        self.call(|reply| Command::Plan { vm, pfs, reply }).await
    }

    /// An adapter gets a VF, which has nothing of an earlier tenant. Returns what the PF must be programmed to before the guest
    /// starts: [`program`](Self::program) does it.
    ///
    /// # Errors
    /// No such port, the VF is another port's, its PF no uplink of the port's switch, or it cannot enforce the policy.
    pub async fn bind(
        &self,
        vm: VmId,
        adapter: &str,
        vf: VfRef,
        bdf: String,
    ) -> Result<Vec<VfChange>, SwitchError> {
        let capabilities = self.capabilities(&vf.pf).await?;
        let adapter = adapter.to_owned();
        self.call(|reply| Command::Bind { vm, adapter, vf, bdf, capabilities, reply }).await
    }

    /// Makes changes on the PF, all or none. What is off and shall be stays untouched: drivers refuse even to be told
    /// that there is no rate limit while their link is down.
    ///
    /// # Errors
    /// The PF's.
    pub async fn program(&self, vf: &VfRef, changes: Vec<VfChange>) -> Result<(), SwitchError> {
        let failed = |error| SwitchError::Pf(chain(&error));
        let shown = self.pf.read(&vf.pf).await.map_err(failed)?;
        let shown = u16::try_from(vf.index).ok().and_then(|index| shown.get(&index));
        let off = |change: &VfChange| {
            matches!(change, VfChange::Vlan(_) | VfChange::TxRate { .. } | VfChange::Link(_))
                && shown.is_some_and(|shown| change.holds(shown))
        };
        let changes = changes.into_iter().filter(|change| !off(change)).collect();
        self.pf.apply(vf, changes).await.map_err(failed)?;
        self.tell(Command::Programmed { vf: vf.clone() }).await;
        Ok(())
    }

    async fn capabilities(&self, pf: &str) -> Result<PfCapabilities, SwitchError> {
        self.pf.capabilities(pf).await.map_err(|error| SwitchError::Pf(chain(&error)))
    }

    /// The VM's process can be talked to. Before any of its questions and notices.
    pub async fn connected(&self, vm: VmId, vmm: Arc<dyn Vmm>) {
        self.tell(Command::Connected { vm, vmm }).await;
    }

    /// The VM's process cannot be talked to for now.
    pub async fn disconnected(&self, vm: VmId) {
        self.tell(Command::Disconnected { vm }).await;
    }

    /// The guest begins again, on the VFs that it has. Returns when that may be forgotten: the next agent would know of it.
    pub async fn rebooted(&self, vm: VmId) {
        let (done, noted) = oneshot::channel();
        self.tell(Command::Rebooted { vm, done }).await;
        drop(noted.await);
    }

    /// A question of a VM's process; the answer goes to the process that is [connected](Self::connected).
    pub async fn ask(&self, vm: VmId, adapter: String, id: u64, question: Question) {
        self.tell(Command::Ask { vm, adapter, id, question }).await;
    }

    /// A notice of a VM's process. Returns when it may be forgotten there.
    pub async fn notice(&self, vm: VmId, adapter: String, notice: Notice) {
        let (done, recorded) = oneshot::channel();
        self.tell(Command::Notice { vm, adapter, notice, done }).await;
        drop(recorded.await);
    }

    /// The VM's process has ended: what must be taken from the adapter's VF; None if the port has none. From now on nothing
    /// is changed for the guest. Ends with [`released`](Self::released).
    ///
    /// # Errors
    /// The task has ended.
    pub async fn release(&self, vm: VmId, adapter: &str) -> Result<Option<Leftover>, SwitchError> {
        let adapter = adapter.to_owned();
        self.call(|reply| Command::Release { vm, adapter, reply }).await
    }

    /// The adapter's VF is clean and its port has it no more.
    ///
    /// # Errors
    /// The store fails.
    pub async fn released(&self, vm: VmId, adapter: &str) -> Result<(), SwitchError> {
        let adapter = adapter.to_owned();
        self.call(|reply| Command::Released { vm, adapter, reply }).await
    }

    /// The threads of PFs.
    #[must_use]
    pub fn pf(&self) -> &PfHandle {
        &self.pf
    }

    #[cfg(test)]
    pub(crate) async fn settle(&self) {
        let (reply, settled) = oneshot::channel();
        self.tell(Command::Settle { reply }).await;
        settled.await.unwrap();
    }
}

/// A PF may take this long to say what it can do: more than the process of a simulated one may for an answer.
const CAPABILITIES: Duration = Duration::from_secs(3);

/// The host's PFs with what each can do. One that does not answer is waited for once, whatever else it is asked.
async fn known(pf: &PfHandle) -> Result<Vec<KnownPf>, SwitchError> {
    let list: Vec<PfName> = pf.list().await.map_err(|error| SwitchError::Pf(chain(&error)))?;
    let asked: Vec<_> = list
        .into_iter()
        .map(|found| {
            let (pf, name) = (pf.clone(), found.name.clone());
            let capabilities =
                tokio::spawn(async move { timeout(CAPABILITIES, pf.capabilities(&name)).await });
            (found, capabilities)
        })
        .collect();
    let mut known = Vec::with_capacity(asked.len());
    for (pf, capabilities) in asked {
        let capabilities = capabilities.await.ok().and_then(Result::ok).and_then(Result::ok);
        known.push(KnownPf { pf, capabilities });
    }
    Ok(known)
}
