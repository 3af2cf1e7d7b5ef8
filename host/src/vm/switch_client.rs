// SPDX-License-Identifier: Apache-2.0

//! A VM's adapters at the switch, for the VM's task and its claims.

use std::sync::Arc;

use api::{
    problem::{Problem, ProblemCode},
    types::{UnicastMac, VmSpec, WantedPort},
};
use failpoints::{Point, reach};
use netpolicy::{MacAddress, Name, VfRef, VmId, VmRef};
use services::problem::ToProblem;
use services::vmm_process::Connection;
use sriov::VfChange;
use switch::{Adapter, Uplinks, VmLink};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{
    claims::Held,
    record::{ClaimedVf, ports},
};
use crate::environment::Environment;
use crate::vm::scrub::{ScrubVf, clean};

/// Makes the VM's ports match its adapters: creates, changes and removes those that differ.
///
/// # Errors
/// No such port group, or an address is in use.
pub async fn attach(env: &Environment, vm: Uuid, spec: &VmSpec) -> Result<(), Problem> {
    let name = Name::new(spec.name.to_string())
        .map_err(|error| Problem::new(ProblemCode::InvalidRequest, error.to_string()))?;
    let adapter = |(port, mac): (WantedPort<'_>, UnicastMac)| Adapter {
        id: port.id.to_string(),
        group: port.port_group.map(ToString::to_string),
        mac: MacAddress::new(mac.octets()),
    };
    let adapters: Vec<Adapter> = ports(vm, spec).map(adapter).collect();
    let vm = VmRef { id: VmId(vm), name };
    env.policy.switch.attach(vm, adapters).await.map_err(|error| error.problem())
}

/// Deletes the ports of a deleted VM.
///
/// # Errors
/// A port still has a VF, or the store fails.
pub async fn detach(env: &Environment, vm: Uuid) -> Result<(), Problem> {
    env.policy.switch.detach(VmId(vm)).await.map_err(|error| error.problem())
}

/// The PFs from which the VFs of an attached VM's adapters may come.
///
/// # Errors
/// The PFs cannot be read.
pub async fn plan(env: &Environment, vm: Uuid) -> Result<Vec<Uplinks>, Problem> {
    env.policy.switch.plan(VmId(vm)).await.map_err(|error| error.problem())
}

/// Whether an adapter may have a VF of a PF.
///
/// # Errors
/// A problem with the reason, and the setting's name if the PF cannot enforce one.
pub(super) fn check_uplink(plan: &[Uplinks], adapter: &str, pf: &str) -> Result<(), Problem> {
    let Some(uplinks) = plan.iter().find(|uplinks| uplinks.adapter == adapter) else {
        return Ok(());
    };
    if uplinks.pfs.iter().any(|name| name == pf) {
        return Ok(());
    }
    let unfit = uplinks.unfit.iter().find(|(name, _)| name == pf);
    Err(match unfit {
        Some((_, why)) => {
            Problem::new(ProblemCode::PolicyUnenforceable, format!("Adapter {adapter} on PF {pf}: {why}"))
        }
        None => Problem::new(
            ProblemCode::NoFreeVf,
            format!(
                "PF {pf} is not an uplink of the switch {} of adapter {adapter}: add it there, or use \
                 another VF.",
                uplinks.switch
            ),
        ),
    })
}

fn vf(claimed: &ClaimedVf) -> VfRef {
    VfRef { pf: claimed.pf_name.clone(), index: claimed.index.into() }
}

/// Binds a claimed VF to its port and programs the PF.
///
/// # Errors
/// The PF cannot enforce the policy, or refuses.
pub(super) async fn bind(env: &Environment, held: &Held, claimed: &ClaimedVf) -> Result<(), Problem> {
    let policy = &env.policy;
    let (vm, vf, bdf) = (VmId(held.value.vm), vf(claimed), held.value.bdf.to_string());
    let changes: Vec<VfChange> = policy
        .switch
        .bind(vm, claimed.id.as_str(), vf.clone(), bdf)
        .await
        .map_err(|error| error.problem())?;
    reach(Point::BaselineAttached);
    policy.switch.program(&vf, changes).await.map_err(|error| error.problem())?;
    reach(Point::BaselineMade);
    Ok(())
}

/// Scrubs a VF before it is unbound. The process of its tenant must have ended.
///
/// # Errors
/// The PF did not confirm the scrub: the VF must get no other tenant.
pub(super) async fn clean_vf(env: &Environment, held: &Held) -> Result<(), Problem> {
    let Some(claimed) = &held.value.adapter else { return Ok(()) };
    let left = env.policy.switch.release(VmId(held.value.vm), claimed.id.as_str()).await;
    let Some(left) = left.map_err(|error| error.problem())? else { return Ok(()) };
    let bdf = held.value.bdf;
    let Some(backend) = env.inventory.backend_of_present(bdf) else { return Ok(()) };
    let taking = Arc::clone(backend);
    let taken = tokio::task::spawn_blocking(move || taking.take_for_scrub(bdf));
    let taken = taken.await.map_err(|error| Problem::new(ProblemCode::Internal, error.to_string()))?;
    if !taken.map_err(|error| error.problem())? {
        tracing::warn!(vf = %bdf, "not scrubbed after its last tenant: the host has bound it to another driver");
        return Ok(());
    }
    let vf = ScrubVf { backend: Arc::clone(backend), bdf };
    clean(env.policy.switch.pf(), vf, &left).await.map_err(|error| error.problem())
}

/// Reports that a VF is released.
///
/// # Errors
/// The store fails.
pub(super) async fn unbind(env: &Environment, held: &Held) -> Result<(), Problem> {
    let Some(claimed) = &held.value.adapter else { return Ok(()) };
    match env.policy.switch.released(VmId(held.value.vm), claimed.id.as_str()).await {
        Ok(()) => Ok(()),
        // The claim was never attached, or its VM was forgotten: no VF is bound.
        Err(switch::SwitchError::NotFound(_)) => Ok(()),
        Err(error) => Err(error.problem()),
    }
}

/// The VM's process is connected. The switch sends a reason to `stop` if the VM must not go on.
pub(super) async fn connected(
    env: &Environment,
    vm: Uuid,
    connection: &Connection,
    stop: &mpsc::Sender<String>,
) {
    let link = VmLink::new(connection.clone(), stop.clone());
    let intake = env.policy.switch.connected(VmId(vm), Arc::new(link)).await;
    connection.attach(Box::new(intake)).await;
}

/// The VM's process is disconnected.
pub(super) async fn disconnected(env: &Environment, vm: Uuid) {
    env.policy.switch.disconnected(VmId(vm)).await;
}
