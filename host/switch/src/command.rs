// SPDX-License-Identifier: Apache-2.0

//! The commands to the switch's task.

use std::sync::Arc;

use api::types::{Name, ObjectRef, PortGroupSpec, PortSpec, SwitchSpec};
use netpolicy::{Change, MacAddress, PfCapabilities, PortId, VfRef, VmId, VmRef};
use passthrough::relay::{GuestRequest, RelayEvent};
use services::pf::PfName;
use sriov::VfChange;
use tokio::{sync::oneshot, time::Instant};

use super::{error::SwitchError, intake::LinkId, vmm_client::Vmm};

pub(super) type Reply<T> = oneshot::Sender<Result<T, SwitchError>>;

/// An adapter as a VM's specification has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapter {
    /// Its name in the VM.
    pub id: String,
    /// The port group; None for the default one.
    pub group: Option<String>,
    /// The initial address.
    pub mac: MacAddress,
}

/// A PF and its capabilities.
#[derive(Clone, Debug)]
pub struct KnownPf {
    /// The PF.
    pub pf: PfName,
    /// The settings that it can enforce; None if the PF does not say.
    pub capabilities: Option<PfCapabilities>,
}

/// The PFs from which an adapter's VF may come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplinks {
    /// The adapter.
    pub adapter: String,
    /// The port group's switch, for messages.
    pub switch: String,
    /// Names of PFs that are uplinks of the switch and can enforce the port's policy.
    pub pfs: Vec<String>,
    /// The MTU that the port's policy allows.
    pub mtu: u16,
    /// Why other uplinks of the switch cannot be used, by name.
    pub unfit: Vec<(String, String)>,
}

/// The leftovers to scrub from a VF before its next tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// The adapter.
    pub adapter: String,
    /// The VF.
    pub vf: VfRef,
    /// The address that the PF has for it.
    pub effective_mac: MacAddress,
    /// The changes, in their order. The first is the VF's reset.
    pub changes: Vec<Change>,
}

pub(super) enum Command {
    // Objects. `by` is the caller, as records name it.
    ListSwitches {
        reply: Reply<Vec<api::types::Switch>>,
    },
    PutSwitch {
        name: Name,
        spec: SwitchSpec,
        expect: Option<u64>,
        by: String,
        reply: Reply<api::Put<api::types::Switch>>,
    },
    DeleteSwitch {
        switch: ObjectRef,
        expect: Option<u64>,
        by: String,
        reply: Reply<()>,
    },
    ListGroups {
        reply: Reply<Vec<api::types::PortGroup>>,
    },
    PutGroup {
        name: Name,
        spec: PortGroupSpec,
        expect: Option<u64>,
        by: String,
        reply: Reply<api::Put<api::types::PortGroup>>,
    },
    DeleteGroup {
        group: ObjectRef,
        expect: Option<u64>,
        by: String,
        reply: Reply<()>,
    },
    ListPorts {
        reply: Reply<Vec<api::types::Port>>,
    },
    PutPort {
        port: ObjectRef,
        spec: PortSpec,
        expect: Option<u64>,
        by: String,
        reply: Reply<api::types::Port>,
    },
    // VMs.
    Attach {
        vm: VmRef,
        adapters: Vec<Adapter>,
        reply: Reply<()>,
    },
    Detach {
        vm: VmId,
        reply: Reply<()>,
    },
    Plan {
        vm: VmId,
        pfs: Vec<KnownPf>,
        reply: Reply<Vec<Uplinks>>,
    },
    Bind {
        vm: VmId,
        adapter: String,
        vf: VfRef,
        bdf: String,
        capabilities: PfCapabilities,
        reply: Reply<Vec<VfChange>>,
    },
    /// The PF now has the changes that `Bind` returned.
    Programmed {
        vf: VfRef,
    },
    Connected {
        vm: VmId,
        vmm: Arc<dyn Vmm>,
        link: LinkId,
    },
    Disconnected {
        vm: VmId,
    },
    Release {
        vm: VmId,
        adapter: String,
        reply: Reply<Option<Leftover>>,
    },
    Released {
        vm: VmId,
        adapter: String,
        reply: Reply<()>,
    },
    // The guests, by the connections of their VMs.
    Rebooted {
        vm: VmId,
        link: LinkId,
        done: oneshot::Sender<()>,
    },
    Request {
        vm: VmId,
        link: LinkId,
        adapter: String,
        id: u64,
        guest_request: GuestRequest,
    },
    RelayEvent {
        vm: VmId,
        link: LinkId,
        adapter: String,
        event: RelayEvent,
        done: oneshot::Sender<()>,
    },
    // The host.
    PfsKnown {
        pfs: Vec<KnownPf>,
    },
    Overdue {
        port: PortId,
    },
    DeferredTooLong {
        port: PortId,
        since: Instant,
    },
    #[cfg(test)]
    Settle {
        reply: oneshot::Sender<()>,
    },
}
