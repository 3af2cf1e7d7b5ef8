// SPDX-License-Identifier: Apache-2.0

//! The functions of the host that a VM holds: choosing, claiming, preparing and releasing them.
//!
//! ```text
//!  free ──claim──▶ claimed ──remember──▶ remembered ──bind, baseline──▶ in use
//!    ▲                │                       │                           │
//!    └────────────────┴────────── release (after the process ended) ──────┘
//! ```
//!
//! Each step is stored before it is done, and the release undoes every step, whether it was done or
//! not. So the next agent can clean up, at whichever step the former one died.

mod choose;

use std::{sync::Arc, thread, time::Duration};

use api::{
    problem::{Problem, ProblemCode},
    types::{Stage, VmSpec},
};
use failpoints::{Point, reach};
use services::problem::ToProblem;
use sriov::{Bdf, BindError, PfError, VfSettings};
use store::{Entry, Expect, StoreError};
use text::chain;
use uuid::Uuid;

use super::{
    record::{Before, Claim, ClaimedVf},
    switch_client,
};
use crate::{
    backend::{Facts, FunctionBackend},
    environment::Environment,
};

/// Reads of a PF, and the time between them, to see whether a reset removed the VF's own address.
const RESET_POLLS: u32 = 10;
const RESET_POLL: Duration = Duration::from_millis(50);

/// A claim with its id and revision.
pub type Held = Entry<Claim>;

/// The claims of a VM, in the order of its functions.
///
/// # Errors
/// Those of the store.
pub async fn of_vm(env: &Environment, vm: Uuid) -> Result<Vec<Held>, StoreError> {
    let mut held: Vec<Held> =
        env.claims.list().await?.into_iter().filter(|claim| claim.value.vm == vm).collect();
    held.sort_by_key(|claim| claim.value.slot);
    Ok(held)
}

/// The first of these functions with a backend that has a property.
///
/// # Errors
/// A function has no backend.
pub(super) fn first_with(
    env: &Environment,
    held: &[Held],
    property: impl Fn(&Facts) -> bool,
) -> Result<Option<Bdf>, Problem> {
    for bdf in held.iter().map(|claim| claim.value.bdf) {
        if property(env.inventory.backend(bdf).map_err(|e| e.problem())?.facts()) {
            return Ok(Some(bdf));
        }
    }
    Ok(None)
}

/// Chooses and claims all functions of a VM, or none.
///
/// # Errors
/// A problem that names the function, and its owner or the property that it lacks.
pub async fn claim(env: &Environment, vm: Uuid, spec: &VmSpec) -> Result<Vec<Held>, Problem> {
    switch_client::attach(env, vm, spec).await?;
    if spec.functions() == 0 {
        return Ok(Vec::new());
    }
    let plan = switch_client::plan(env, vm).await?;
    let _guard = env.claiming.lock().await;
    let taken: Vec<Claim> =
        env.claims.list().await.map_err(|e| e.problem())?.into_iter().map(|entry| entry.value).collect();
    let (inventory, wanted) = (env.inventory.clone(), spec.clone());
    let chosen =
        tokio::task::spawn_blocking(move || (choose::choose(&inventory, vm, &wanted, &taken, &plan), taken))
            .await
            .map_err(|error| Problem::new(ProblemCode::Internal, chain(&error)))?;
    let (chosen, taken) = (chosen.0?, chosen.1);
    reach(Point::ClaimChosen);
    let mut held: Vec<Held> = Vec::new();
    for claim in chosen {
        let (id, name) = (Uuid::new_v4(), claim.bdf.to_string());
        match env.claims.put(id, &name, &claim, Expect::Absent).await {
            Ok(revision) => {
                held.push(Entry { id, name, revision, value: claim });
                reach(Point::ClaimStored);
            }
            Err(error) => {
                for claim in held {
                    // A claim that cannot be deleted now is released when the agent starts again.
                    drop(env.claims.remove(claim.id).await);
                }
                return Err(error.problem());
            }
        }
    }
    env.inventory.keep_names(pf_names(taken.iter().chain(held.iter().map(|claim| &claim.value))));
    Ok(held)
}

/// The name that each PF had when the first of its claimed VFs was claimed.
fn pf_names<'a>(claims: impl IntoIterator<Item = &'a Claim>) -> Vec<(Bdf, String)> {
    let of_vfs = claims.into_iter().filter_map(|claim| claim.adapter.as_ref());
    of_vfs.map(|vf| (vf.pf, vf.pf_name.clone())).collect()
}

/// Makes the inventory keep the PF names of the stored claims.
///
/// # Errors
/// The store cannot be read.
pub async fn keep_pf_names<P>(env: &Environment<P>) -> Result<(), Problem> {
    let _guard = env.claiming.lock().await;
    let claims = env.claims.list().await.map_err(|e| e.problem())?;
    env.inventory.keep_names(pf_names(claims.iter().map(|claim| &claim.value)));
    Ok(())
}

/// Stores the present state of the function, binds it to vfio-pci and sets its baseline on the PF.
///
/// # Errors
/// The function may be in any state between before and after: release it with [`give_back`].
pub async fn prepare(
    env: &Environment,
    held: &mut Held,
    mut enter: impl FnMut(Stage) + Send,
) -> Result<(), Problem> {
    enter(Stage::BindingFunction);
    let backend = Arc::clone(env.inventory.backend(held.value.bdf).map_err(|e| e.problem())?);
    let before = blocking(&backend, held, remember).await?;
    reach(Point::ClaimRead);
    store_before(env, held, before).await?;
    reach(Point::ClaimRemembered);
    let before = blocking(&backend, held, bind).await?;
    reach(Point::BaselineBegun);
    store_before(env, held, before).await?;
    enter(Stage::SettingPolicy);
    match &held.value.adapter {
        Some(vf) => switch_client::bind(env, held, vf).await,
        None => Ok(()),
    }
}

async fn store_before(env: &Environment, held: &mut Held, before: Before) -> Result<(), Problem> {
    if held.value.before.as_ref() == Some(&before) {
        return Ok(());
    }
    held.value.before = Some(before);
    let put = env.claims.put(held.id, &held.name, &held.value, Expect::Revision(held.revision));
    held.revision = put.await.map_err(|e| e.problem())?;
    Ok(())
}

/// Runs `step` of a claim with its backend on a thread that may block.
async fn blocking<T: Send + 'static>(
    backend: &Arc<dyn FunctionBackend>,
    held: &Held,
    step: fn(&dyn FunctionBackend, &Claim) -> Result<T, Problem>,
) -> Result<T, Problem> {
    let (backend, claim) = (Arc::clone(backend), held.value.clone());
    tokio::task::spawn_blocking(move || step(&*backend, &claim))
        .await
        .map_err(|error| Problem::new(ProblemCode::Internal, chain(&error)))?
}

/// The present settings of a VF.
fn settings_of(backend: &dyn FunctionBackend, vf: &ClaimedVf) -> Result<VfSettings, PfError> {
    backend.open_pf(vf.pf)?.read(vf.index)
}

fn remember(backend: &dyn FunctionBackend, claim: &Claim) -> Result<Before, Problem> {
    let binding = backend.binding(claim.bdf).map_err(|e| e.problem())?;
    let settings = match &claim.adapter {
        Some(vf) => Some(settings_of(backend, vf).map_err(|e| e.problem())?),
        None => None,
    };
    Ok(Before { binding, settings })
}

fn bind(backend: &dyn FunctionBackend, claim: &Claim) -> Result<Before, Problem> {
    let internal = || Problem::new(ProblemCode::Internal, "A function was bound before it was recorded.");
    let mut before = claim.before.clone().ok_or_else(internal)?;
    backend.bind(claim.bdf).map_err(|e| e.problem())?;
    let (Some(vf), Some(settings)) = (&claim.adapter, before.settings.take()) else { return Ok(before) };
    if settings.mac.is_none() {
        before.settings = Some(settings);
        return Ok(before);
    }
    // A reset shows the origin of the address: the VF's own choice goes with it. The PF's driver
    // learns of the reset by an interrupt.
    let mut after = settings.clone();
    if backend.reset(claim.bdf).is_ok() {
        for _ in 0..RESET_POLLS {
            after = settings_of(backend, vf).map_err(|e| e.problem())?;
            if after.mac.is_none() {
                break;
            }
            thread::sleep(RESET_POLL);
        }
    }
    before.settings = Some(settings.without_own_mac(&after));
    Ok(before)
}

/// Releases the claims of a VM; its process must have ended. Returns the claims that failed. They
/// stay, and are tried again at the VM's next boot or deletion and when the agent starts.
pub async fn give_back(
    env: &Environment,
    held: Vec<Held>,
    mut enter: impl FnMut(Stage) + Send,
) -> Vec<(Held, Problem)> {
    let mut kept = Vec::new();
    // In the reverse order of claiming.
    for claim in held.into_iter().rev() {
        let done = give_one_back(env, &claim, &mut enter).await;
        if let Err(problem) = done {
            tracing::error!(vm = %claim.value.vm_name, function = %claim.value.bdf, "cannot release a function: {problem}");
            kept.push((claim, problem));
        }
    }
    kept
}

async fn give_one_back(
    env: &Environment,
    claim: &Held,
    enter: &mut (impl FnMut(Stage) + Send),
) -> Result<(), Problem> {
    if claim.value.adapter.is_some() {
        enter(Stage::CleaningFunction);
    }
    // Scrub first: that needs the binding to vfio-pci.
    switch_client::clean_vf(env, claim).await?;
    reach(Point::ReleaseCleaned);
    enter(Stage::ReturningFunction);
    // A function that is gone, or of a backend that this agent does not have, has nothing to restore.
    if claim.value.before.is_some()
        && let Some(backend) = env.inventory.backend_of_present(claim.value.bdf)
    {
        blocking(backend, claim, restore).await?;
    }
    switch_client::unbind(env, claim).await?;
    reach(Point::ReleaseUnbound);
    env.claims.remove(claim.id).await.map_err(|e| e.problem())?;
    reach(Point::ReleaseUnclaimed);
    // The claim is released. A name that is kept for longer does no harm.
    drop(keep_pf_names(env).await);
    Ok(())
}

fn restore(backend: &dyn FunctionBackend, claim: &Claim) -> Result<(), Problem> {
    let Some(before) = &claim.before else { return Ok(()) };
    // Reset the function, because its tenant may have left state in it. Where there is no reset,
    // the driver's own initialisation must do. A function that already has its driver, or still has
    // it, had no tenant or was reset before.
    if let Err(error) = backend.reset(claim.bdf) {
        match backend.can_reset(claim.bdf) {
            true => tracing::debug!(function = %claim.bdf, "no reset: {error}"),
            false => tracing::warn!(
                function = %claim.bdf,
                vm = claim.vm_name,
                "a function without a reset leaves its VM: its next user finds its state and data"
            ),
        }
    }
    reach(Point::ReleaseReset);
    let returned = backend.binding(claim.bdf).is_ok_and(|now| {
        now.driver == before.binding.driver && now.driver.is_some_and(|driver| driver != sriov::VFIO_PCI)
    });
    // A failure leaves the function with vfio-pci. The host's driver would get the VF with the tenant's
    // address and VLAN, and the next attempt would take that address for one that the driver has chosen.
    if let (Some(vf), Some(settings)) = (&claim.adapter, &before.settings) {
        restore_settings(backend, vf, settings, returned)?;
    }
    reach(Point::ReleaseSettings);
    match backend.restore(claim.bdf, &before.binding) {
        Ok(()) | Err(BindError::NoDevice(_)) => {
            reach(Point::ReleaseRestored);
            Ok(())
        }
        Err(error) => Err(error.problem()),
    }
}

/// Restores the VF's former settings. `returned`: the host's driver already has the VF again, from
/// an earlier attempt.
fn restore_settings(
    backend: &dyn FunctionBackend,
    vf: &ClaimedVf,
    settings: &VfSettings,
    returned: bool,
) -> Result<(), Problem> {
    let mut pf = match backend.open_pf(vf.pf) {
        Ok(pf) => pf,
        Err(PfError::NoInterface { .. } | PfError::Inventory(_)) => return Ok(()),
        Err(error) => return Err(error.problem()),
    };
    let mut settings = settings.clone();
    if returned && settings.mac.is_none() {
        // The driver has chosen an address meanwhile. Without it the host's interface would be
        // dead.
        settings.mac = pf.read(vf.index).map_err(|e| e.problem())?.mac;
    }
    match sriov::restore(&mut *pf, vf.index, &settings) {
        Ok(()) => Ok(()),
        Err(error) if matches!(*error.source, PfError::NoVf { .. }) => Ok(()),
        Err(error) => Err(error.problem()),
    }
}
