// SPDX-License-Identifier: Apache-2.0

//! The switch: one task that owns the policy and its state, and decides.
//!
//! ```text
//!  API ──put, delete──▶  ┌────────┐ ──evaluate──▶ netpolicy::SwitchState
//!  VM tasks ──attach, ─▶ │ switch │
//!    bind, release       │  task  │ ──job per port──▶ PF threads, vmms, store
//!  vmms ─request, event▶ │        │ ◀──────end─────
//!  PF watch ──hints──▶   └────────┘
//!                            └──▶ decisions ──▶ database, log, events
//! ```
//!
//! The task never waits for the PF, a vmm or a disk on a guest's behalf. Slow work is a job in the
//! `port_queue`; denials are answered at once. The task trusts no vmm. A request counts for the VM
//! of its connection, and the switch's own data decide it. An event grants nothing, and affects
//! ports of its own VM only.
//!
//! * `catalog`: switches, port groups and ports as the API edits them. `view`: as it shows them.
//! * `binding`: attaching, binding to VFs, releasing.
//! * `verdict_source`: verdicts. `guest_requests`: requests and their completion. `relay_events`: events from relays.
//! * `reconcile`: corrections after policy changes, and of drift. `reboot`: reboots of guests.
//! * `vmm_connection`: connections of the VMs' processes. `intake`: their messages.

mod actor;
mod binding;
mod catalog;
pub mod command;
mod commit;
pub mod error;
mod guest_requests;
mod intake;
mod journal;
mod made;
mod policy;
mod port_queue;
mod reboot;
mod reconcile;
pub mod record;
mod relay_events;
mod startup;
#[cfg(test)]
mod tests;
mod verdict_source;
mod view;
pub mod vmm_client;
mod vmm_connection;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use api::types::Unchecked;
use netpolicy::{PfCapabilities, VfRef, VmId, VmRef};
use services::{
    decisions::{DecisionLog, events::EventHub},
    metrics::Metrics,
    pf::{PfHandle, PfName},
};
use sriov::{Hint, VfChange};
use store::Stores;
use text::chain;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tracing::Span;

pub use self::{
    command::{Adapter, Leftover, Uplinks},
    error::SwitchError,
    intake::Intake,
    policy::Policy,
    verdict_source::VerdictSource,
    vmm_client::{VmLink, Vmm},
};
use self::{
    command::{Command, KnownPf, Reply},
    intake::LinkId,
};

/// The most commands that wait for the task.
const QUEUE: usize = 256;

/// The time limits of the switch.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// The longest wait for a vmm to confirm a command. If that command revokes a right, the VM is
    /// then stopped.
    pub confirm: Duration,
    /// The longest time for which a vmm may defer revocations to its guest's next reset. After it the VM is
    /// stopped. None for no limit.
    pub deferred: Option<Duration>,
    /// The longest wait for a relay's event about a forwarded message.
    pub forwarded: Duration,
    /// The interval between comparisons of all ports with their PFs.
    pub compare: Duration,
    /// The time from the first hint to the comparison that covers all hints in between.
    pub gather: Duration,
    /// The time from the release of an address by one port to its offer to the ports that wait for it. Until then a
    /// driver that only sets its list again gets the address back.
    pub offer: Duration,
    /// Delays of work, to show the effects of late work.
    #[cfg(feature = "test-support")]
    pub late: Late,
}

/// Delays in an agent for tests.
#[cfg(feature = "test-support")]
#[derive(Clone, Copy, Debug, Default)]
pub struct Late {
    /// The delay of a guest's address change on the PF.
    pub address: Duration,
    /// The delay before a guest's multicast list is granted.
    pub multicast: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            confirm: Duration::from_secs(5),
            deferred: None,
            forwarded: Duration::from_secs(2),
            compare: Duration::from_secs(30),
            gather: Duration::from_millis(200),
            offer: Duration::from_secs(2),
            #[cfg(feature = "test-support")]
            late: Late::default(),
        }
    }
}

/// The dependencies of the switch.
pub struct Parts {
    /// The stores of its objects.
    pub store: Stores,
    /// The handle of the PFs.
    pub pf: PfHandle,
    /// The log of decisions.
    pub decisions: DecisionLog,
    /// The hub for events about objects.
    pub events: EventHub,
    /// Events of interfaces, if available. Without them only the regular comparison finds drift.
    pub hints: Option<mpsc::Receiver<Hint>>,
    /// The time limits.
    pub timing: Timing,
    /// The metrics that count its work.
    pub metrics: Metrics,
    /// The source of its verdicts.
    pub verdict_source: VerdictSource,
}

/// The handle of the switch. The task ends with the last handle and [`Intake`].
#[derive(Clone, Debug)]
pub struct SwitchHandle {
    commands: mpsc::Sender<(Span, Command)>,
    /// The number of connections so far.
    links: Arc<AtomicU64>,
    pf: PfHandle,
    unchecked: watch::Receiver<UncheckedPorts>,
}

/// The ports that cannot be compared with their PF, by VM and adapter.
pub type UncheckedPorts = BTreeMap<(VmId, String), Unchecked>;

impl SwitchHandle {
    /// Loads the state from the store, completes work that a former agent left, and starts the
    /// task.
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
        Ok(Self { commands, links: Arc::default(), pf, unchecked })
    }

    /// The reason why a port of a VM cannot be compared with its PF; None if it can. Does not wait
    /// for the switch.
    #[must_use]
    pub fn unchecked(&self, vm: VmId, adapter: &str) -> Option<Unchecked> {
        let ports = self.unchecked.borrow();
        // The map is nearly always empty, and a look-up needs an owned key.
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
        // If the task has ended, the caller sees that its reply channel is closed.
        drop(self.commands.send((Span::current(), command)).await);
    }

    /// Gives ports to a VM's adapters. An adapter that already has a port keeps it.
    ///
    /// # Errors
    /// No such port group, an address is in use, or the store fails. The VM then gets none of the
    /// new ports.
    pub async fn attach(&self, vm: VmRef, adapters: Vec<Adapter>) -> Result<(), SwitchError> {
        self.call(|reply| Command::Attach { vm, adapters, reply }).await
    }

    /// Deletes the ports of a VM that is gone. Its VFs must have been released.
    ///
    /// # Errors
    /// A port has a VF, or the store fails.
    pub async fn detach(&self, vm: VmId) -> Result<(), SwitchError> {
        self.call(|reply| Command::Detach { vm, reply }).await
    }

    /// The PFs from which the VFs of an attached VM's adapters may come.
    ///
    /// # Errors
    /// The PFs cannot be read.
    pub async fn plan(&self, vm: VmId) -> Result<Vec<Uplinks>, SwitchError> {
        let pfs = known(&self.pf).await?;
        self.call(|reply| Command::Plan { vm, pfs, reply }).await
    }

    /// Gives an adapter a VF, which must have no leftovers of an earlier tenant. Returns the
    /// changes that [`program`](Self::program) must make on the PF before the guest starts.
    ///
    /// # Errors
    /// No such port, another port has the VF, its PF is no uplink of the port's switch, or its PF
    /// cannot enforce the policy.
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

    /// Makes changes on the PF, all or none. Leaves out a VLAN, rate or link state that the VF
    /// already has: while the link is down, drivers refuse even a command that sets no rate limit.
    ///
    /// # Errors
    /// Those of the PF.
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

    /// Notes that the VM's process is connected. Returns the receiver of its requests and events.
    /// The responses go to `vmm`.
    pub async fn connected(&self, vm: VmId, vmm: Arc<dyn Vmm>) -> Intake {
        let link = LinkId(self.links.fetch_add(1, Ordering::Relaxed).wrapping_add(1));
        self.tell(Command::Connected { vm, vmm, link }).await;
        Intake::new(vm, link, self.commands.clone())
    }

    /// The receiver of the newest connection of all.
    #[cfg(any(test, feature = "test-support"))]
    pub fn newest_intake(&self, vm: VmId) -> Intake {
        let link = LinkId(self.links.load(Ordering::Relaxed));
        Intake::new(vm, link, self.commands.clone())
    }

    /// Notes that the VM's process is disconnected for now.
    pub async fn disconnected(&self, vm: VmId) {
        self.tell(Command::Disconnected { vm }).await;
    }

    /// Closes the adapter's port after the end of the VM's process: the switch makes no changes for
    /// the guest until [`released`](Self::released). Returns the leftovers to scrub from the VF;
    /// None if the port has no VF.
    ///
    /// # Errors
    /// The task has ended.
    pub async fn release(&self, vm: VmId, adapter: &str) -> Result<Option<Leftover>, SwitchError> {
        let adapter = adapter.to_owned();
        self.call(|reply| Command::Release { vm, adapter, reply }).await
    }

    /// Takes the scrubbed VF from the adapter's port.
    ///
    /// # Errors
    /// The store fails.
    pub async fn released(&self, vm: VmId, adapter: &str) -> Result<(), SwitchError> {
        let adapter = adapter.to_owned();
        self.call(|reply| Command::Released { vm, adapter, reply }).await
    }

    /// The handle of the PFs' threads.
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

/// The longest wait for a PF's capabilities: more than the process of a simulated PF may take to
/// respond.
const CAPABILITIES: Duration = Duration::from_secs(3);

/// The host's PFs with their capabilities. It queries the PFs concurrently, so that all silent ones together cost
/// one timeout.
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
