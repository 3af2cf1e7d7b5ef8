// SPDX-License-Identifier: Apache-2.0

//! What a VM holds of the host: choosing, claiming, preparing and giving back functions.
//!
//! ```text
//!  free ──claim──▶ claimed ──remember──▶ remembered ──bind, baseline──▶ in use
//!    ▲                │                       │                           │
//!    └────────────────┴───────── give back (after the process ended) ─────┘
//! ```
//!
//! Each step is in the store before it is done, and giving back undoes every step whether it was done or not: so
//! whatever an agent was doing when it died, the next one puts right.

use std::{thread, time::Duration};

use api::{
    problem::{Problem, ProblemCode},
    types::{Stage, UnicastMac, VmSpec},
};
use netpolicy::MacAddress;
use passthrough::{
    fail::{Point, reach},
    host::{self, Bdf, BindError, InventoryError, Pf, PfError, PortVlan, Vf, VfChange, VfSettings},
    sim::is_simulated,
};
use uuid::Uuid;

use super::{
    network,
    problem::{ToProblem, chain},
    record::{Before, Claim, ClaimedVf, macs},
};
use crate::{
    environment::Environment,
    inventory::Inventory,
    store::{Entry, Expect, StoreError},
    switch::Uplinks,
};

/// How often, and how long apart, a PF is asked whether a VF's own address went with its reset.
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

/// Chooses and claims all functions of a VM, or none.
///
/// # Errors
/// A problem that names the function and who has it, or what it lacks.
pub async fn claim(env: &Environment, vm: Uuid, spec: &VmSpec) -> Result<Vec<Held>, Problem> {
    network::attach(env, vm, spec).await?;
    if spec.adapters.is_empty() && spec.devices.is_empty() {
        return Ok(Vec::new());
    }
    let plan = network::plan(env, vm).await?;
    let _guard = env.claiming.lock().await;
    let taken: Vec<Claim> =
        env.claims.list().await.map_err(|e| e.problem())?.into_iter().map(|entry| entry.value).collect();
    let (inventory, wanted) = (env.inventory.clone(), spec.clone());
    let chosen = tokio::task::spawn_blocking(move || {
        (choose(&inventory, vm, &wanted, &taken, plan.as_deref()), taken)
    })
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
                    // What cannot be deleted now is given back when the agent starts again.
                    drop(env.claims.remove(claim.id).await);
                }
                return Err(error.problem());
            }
        }
    }
    env.inventory.keep_names(pf_names(taken.iter().chain(held.iter().map(|claim| &claim.value))));
    Ok(held)
}

/// The name of each PF with a claimed VF when the first of them was claimed.
fn pf_names<'a>(claims: impl IntoIterator<Item = &'a Claim>) -> Vec<(Bdf, String)> {
    let of_vfs = claims.into_iter().filter_map(|claim| claim.adapter.as_ref());
    of_vfs.map(|vf| (vf.pf, vf.pf_name.clone())).collect()
}

/// Has the names of PFs follow the claims that are stored.
///
/// # Errors
/// The store cannot be read.
pub async fn keep_pf_names(env: &Environment) -> Result<(), Problem> {
    let _guard = env.claiming.lock().await;
    let claims = env.claims.list().await.map_err(|e| e.problem())?;
    env.inventory.keep_names(pf_names(claims.iter().map(|claim| &claim.value)));
    Ok(())
}

fn choose(
    inventory: &Inventory,
    vm: Uuid,
    spec: &VmSpec,
    taken: &[Claim],
    plan: Option<&[Uplinks]>,
) -> Result<Vec<Claim>, Problem> {
    let mut named: Vec<Bdf> = Vec::new();
    for bdf in spec.adapters.iter().filter_map(|adapter| adapter.vf).chain(spec.devices.iter().copied()) {
        named.push(convert(bdf)?);
    }
    let mut claims: Vec<Claim> = Vec::new();
    for (slot, (adapter, (_, mac))) in spec.adapters.iter().zip(macs(vm, spec)).enumerate() {
        let fits = |pf: &Pf| network::check_uplink(plan, adapter.id.as_str(), &inventory.name_for_ports(pf));
        let (vf, pf) = match adapter.vf {
            Some(bdf) => named_vf(inventory, convert(bdf)?, taken, fits)?,
            None => free_vf(inventory, taken, &claims, &named, fits)?,
        };
        let pf_name = inventory.name_for_ports(&pf);
        let adapter = ClaimedVf { id: adapter.id.clone(), pf: vf.pf, pf_name, index: vf.index, mac };
        claims.push(claim_of(vm, spec, slot, vf.device.bdf, Some(adapter)));
    }
    for (slot, bdf) in (claims.len()..).zip(&spec.devices) {
        let bdf = convert(*bdf)?;
        plain_device(inventory, bdf, taken)?;
        claims.push(claim_of(vm, spec, slot, bdf, None));
    }
    let together: Vec<Bdf> = claims.iter().map(|claim| claim.bdf).collect();
    for claim in &mut claims {
        claim.group = inventory.check_viable(claim.bdf, &together).map_err(|e| e.problem())?;
        let shares = |other: &&Claim| other.group.is_some() && other.group == claim.group && other.vm != vm;
        if let Some(other) = taken.iter().find(shares) {
            return Err(in_use(claim.bdf, other, claim.adapter.is_some()));
        }
    }
    Ok(claims)
}

fn claim_of(vm: Uuid, spec: &VmSpec, slot: usize, bdf: Bdf, adapter: Option<ClaimedVf>) -> Claim {
    Claim { vm, vm_name: spec.name.to_string(), slot, bdf, group: None, adapter, before: None }
}

fn convert(bdf: api::types::Bdf) -> Result<Bdf, Problem> {
    bdf.to_string()
        .parse()
        .map_err(|error| Problem::new(ProblemCode::InvalidRequest, chain(&error as &host::InvalidBdf)))
}

fn in_use(bdf: Bdf, owner: &Claim, is_vf: bool) -> Problem {
    let (code, what) =
        if is_vf { (ProblemCode::VfInUse, "VF") } else { (ProblemCode::DeviceInUse, "Device") };
    let why = match owner.group {
        Some(group) if owner.bdf != bdf => format!(" by way of {} in its IOMMU group {group}", owner.bdf),
        _ => String::new(),
    };
    Problem::new(
        code,
        format!(
            "{what} {bdf} belongs to the VM {}{why}: stop that VM, or use another function.",
            owner.vm_name
        ),
    )
}

/// An agent that is not root cannot use the host's own functions.
fn usable(inventory: &Inventory, bdf: Bdf) -> Result<(), Problem> {
    if inventory.has_hardware() || is_simulated(bdf) {
        return Ok(());
    }
    let detail = format!(
        "The agent is not root and cannot use {bdf}, a function of the host: run the agent as root, or use a \
         simulated VF (--sim-pf)."
    );
    Err(Problem::new(ProblemCode::VfioUnavailable, detail))
}

fn named_vf(
    inventory: &Inventory,
    bdf: Bdf,
    taken: &[Claim],
    fits: impl Fn(&Pf) -> Result<(), Problem>,
) -> Result<(Vf, Pf), Problem> {
    usable(inventory, bdf)?;
    let vf = inventory.vf(bdf).map_err(|e| e.problem())?;
    let pf = inventory.pf(vf.pf).map_err(|e| e.problem())?;
    if let Some(owner) = taken.iter().find(|claim| claim.bdf == bdf) {
        return Err(in_use(bdf, owner, true));
    }
    require_up(&pf)?;
    fits(&pf)?;
    check_unused(inventory, bdf, ProblemCode::VfInUse, "VF")?;
    Ok((vf, pf))
}

fn require_up(pf: &Pf) -> Result<(), Problem> {
    let cure = match pf.interface() {
        Some(interface) if interface.admin_up => return Ok(()),
        Some(interface) => {
            format!("is down, so its VFs have no link: run `ip link set {} up`", interface.name)
        }
        None => "has no network interface: load its driver".to_owned(),
    };
    Err(Problem::new(ProblemCode::PfDown, format!("PF {} {cure}.", pf.name())))
}

/// A VF that nobody has, no VM and not the host either, of a PF that fits.
fn free_vf(
    inventory: &Inventory,
    taken: &[Claim],
    mine: &[Claim],
    named: &[Bdf],
    fits: impl Fn(&Pf) -> Result<(), Problem>,
) -> Result<(Vf, Pf), Problem> {
    let internal = |error: InventoryError| Problem::new(ProblemCode::Internal, chain(&error));
    let mut down = None;
    let mut seen = 0;
    for pf in inventory.pfs().map_err(internal)? {
        let up = fits(&pf).and_then(|()| require_up(&pf));
        for vf in inventory.vfs_of(pf.device.bdf).map_err(internal)? {
            seen += 1;
            let bdf = vf.device.bdf;
            let group = |claim: &&Claim| claim.group.is_some() && claim.group == vf.device.iommu_group;
            let used = named.contains(&bdf)
                || mine.iter().any(|claim| claim.bdf == bdf)
                || taken.iter().any(|claim| claim.bdf == bdf)
                || taken.iter().find(group).is_some()
                || inventory.check_viable(bdf, &[]).is_err()
                // Last, since it opens the group. A use that cannot be found out is one.
                || inventory.usage(bdf).map_or(true, |usage| usage.is_some());
            match &up {
                _ if used => {}
                Ok(()) => return Ok((vf, pf)),
                Err(problem) => down = Some(problem.clone()),
            }
        }
    }
    Err(down.unwrap_or_else(|| {
        let cure = match inventory.has_hardware() {
            true => {
                "make more with `portcullis pf set-vfs`, stop a VM, or take down the host's interface of one"
            }
            false => {
                "the agent is not root and uses simulated ones only: stop a VM, or give it more (--sim-pf)"
            }
        };
        Problem::new(ProblemCode::NoFreeVf, format!("None of {seen} VFs is free: {cure}."))
    }))
}

/// The problem of a function that something else uses, unseen by the administrator who names it.
fn check_unused(inventory: &Inventory, bdf: Bdf, code: ProblemCode, what: &str) -> Result<(), Problem> {
    let usage = inventory.usage(bdf).map_err(|error| Problem::new(ProblemCode::Internal, chain(&error)))?;
    match usage.filter(|usage| !usage.is_visible()) {
        None => Ok(()),
        Some(usage) => {
            let cure = usage.cure();
            Err(Problem::new(
                code,
                format!("{what} {bdf} is used by {usage}: {cure}, or use another function."),
            ))
        }
    }
}

fn plain_device(inventory: &Inventory, bdf: Bdf, taken: &[Claim]) -> Result<(), Problem> {
    let unsupported = |why: &str| Err(Problem::new(ProblemCode::DeviceUnsupported, format!("{bdf} {why}.")));
    usable(inventory, bdf)?;
    let device = inventory.device(bdf).map_err(|error| match error {
        InventoryError::NoDevice(_) => Problem::new(ProblemCode::DeviceNotFound, chain(&error)),
        other => other.problem(),
    })?;
    if let Some(owner) = taken.iter().find(|claim| claim.bdf == bdf) {
        return Err(in_use(bdf, owner, false));
    }
    if device.is_network() && inventory.vf(bdf).is_ok() {
        return unsupported(
            "is a network VF and must be under a policy: name it as the \"vf\" of an adapter",
        );
    }
    if device.class >> 16 == 0x06 {
        return unsupported("is a bridge: name the device behind it");
    }
    if is_simulated(bdf) {
        return unsupported("is simulated: name its VFs as the \"vf\" of an adapter");
    }
    if inventory.pf(bdf).is_ok_and(|pf| pf.num_vfs > 0) {
        return unsupported("is a PF with VFs: set their number to 0 first");
    }
    if device.is_network() || device.driver.as_deref() == Some(host::VFIO_PCI) {
        check_unused(inventory, bdf, ProblemCode::DeviceInUse, "Device")?;
    }
    Ok(())
}

/// Remembers what the function is, binds it to vfio-pci and sets its baseline on the PF.
///
/// # Errors
/// The function may be anywhere between before and after: give it back.
pub async fn prepare(
    env: &Environment,
    held: &mut Held,
    mut enter: impl FnMut(Stage) + Send,
) -> Result<(), Problem> {
    enter(Stage::BindingFunction);
    let before = blocking(env, held, remember).await?;
    reach(Point::ClaimRead);
    store_before(env, held, before).await?;
    reach(Point::ClaimRemembered);
    let before = blocking(env, held, bind).await?;
    reach(Point::BaselineBegun);
    store_before(env, held, before).await?;
    enter(Stage::SettingPolicy);
    match &held.value.adapter {
        Some(vf) if network::bind(env, held, vf).await? => Ok(()),
        _ => blocking(env, held, baseline).await,
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

/// Runs `step` where it may block.
async fn blocking<T: Send + 'static>(
    env: &Environment,
    held: &Held,
    step: fn(&Host, &Claim) -> Result<T, Problem>,
) -> Result<T, Problem> {
    let host = Host { inventory: env.inventory.clone(), open_pf: env.open_pf.clone() };
    let claim = held.value.clone();
    tokio::task::spawn_blocking(move || step(&host, &claim))
        .await
        .map_err(|error| Problem::new(ProblemCode::Internal, chain(&error)))?
}

struct Host {
    inventory: Inventory,
    open_pf: crate::environment::OpenPf,
}

impl Host {
    fn settings(&self, vf: &ClaimedVf) -> Result<VfSettings, PfError> {
        (self.open_pf)(vf.pf)?.read(vf.index)
    }
}

fn remember(host: &Host, claim: &Claim) -> Result<Before, Problem> {
    let binding = host.inventory.current_binding(claim.bdf).map_err(|e| e.problem())?;
    let settings = match &claim.adapter {
        Some(vf) => Some(host.settings(vf).map_err(|e| e.problem())?),
        None => None,
    };
    Ok(Before { binding, settings })
}

fn bind(host: &Host, claim: &Claim) -> Result<Before, Problem> {
    let internal = || Problem::new(ProblemCode::Internal, "A function was bound before it was remembered.");
    let mut before = claim.before.clone().ok_or_else(internal)?;
    host.inventory.bind_vfio(claim.bdf).map_err(|e| e.problem())?;
    let (Some(vf), Some(settings)) = (&claim.adapter, before.settings.take()) else { return Ok(before) };
    if settings.mac.is_none() {
        before.settings = Some(settings);
        return Ok(before);
    }
    // Whose choice the address was shows when the VF is reset. The PF's driver learns of that by an interrupt.
    let mut after = settings.clone();
    if host.inventory.reset(claim.bdf).is_ok() {
        for _ in 0..RESET_POLLS {
            after = host.settings(vf).map_err(|e| e.problem())?;
            if after.mac.is_none() {
                break;
            }
            thread::sleep(RESET_POLL);
        }
    }
    before.settings = Some(settings.without_own_mac(&after));
    Ok(before)
}

fn baseline(host: &Host, claim: &Claim) -> Result<(), Problem> {
    let Some(vf) = &claim.adapter else { return Ok(()) };
    let mut pf = (host.open_pf)(vf.pf).map_err(|e| e.problem())?;
    let now = pf.read(vf.index).map_err(|e| e.problem())?;
    let mut changes = Vec::new();
    // A driver that knows no trust gives none.
    if now.trust.is_some() {
        changes.push(VfChange::Trust(false));
    }
    changes.push(VfChange::SpoofCheck(true));
    if now.vlan.id != 0 {
        changes.push(VfChange::Vlan(PortVlan::default()));
    }
    changes.push(VfChange::Mac(Some(address(vf.mac))));
    pf.apply(vf.index, &changes).map_err(|e| e.problem())
}

fn address(mac: UnicastMac) -> MacAddress {
    MacAddress::new(mac.octets())
}

/// Gives back what a VM holds; its process must have ended. Returns what could not be given back: those claims stay,
/// and are tried again at the VM's next boot or deletion and when the agent starts.
pub async fn give_back(
    env: &Environment,
    held: Vec<Held>,
    mut enter: impl FnMut(Stage) + Send,
) -> Vec<(Held, Problem)> {
    let mut kept = Vec::new();
    // The last one first, as they were taken.
    for claim in held.into_iter().rev() {
        let done = give_one_back(env, &claim, &mut enter).await;
        if let Err(problem) = done {
            tracing::error!(vm = %claim.value.vm_name, function = %claim.value.bdf, "cannot give a function back: {problem}");
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
    // Before anything else: it is still bound to vfio-pci, which cleaning needs.
    network::clean_vf(env, claim).await?;
    reach(Point::ReleaseCleaned);
    enter(Stage::ReturningFunction);
    if claim.value.before.is_some() {
        blocking(env, claim, restore).await?;
    }
    network::unbind(env, claim).await?;
    reach(Point::ReleaseUnbound);
    env.claims.remove(claim.id).await.map_err(|e| e.problem())?;
    reach(Point::ReleaseUnclaimed);
    // It is given back; a name that is kept for longer does no harm.
    drop(keep_pf_names(env).await);
    Ok(())
}

fn restore(host: &Host, claim: &Claim) -> Result<(), Problem> {
    let Some(before) = &claim.before else { return Ok(()) };
    if !host.inventory.has_device(claim.bdf) {
        return Ok(());
    }
    // What the tenant left in the function. Where there is no reset the driver's own initialisation must do; a function that
    // has its driver already, or still, had no tenant, or was reset before.
    if let Err(error) = host.inventory.reset(claim.bdf) {
        tracing::debug!(function = %claim.bdf, "no reset: {error}");
    }
    reach(Point::ReleaseReset);
    let returned = host.inventory.current_binding(claim.bdf).is_ok_and(|now| {
        now.driver == before.binding.driver && now.driver.is_some_and(|driver| driver != host::VFIO_PCI)
    });
    let mut first = None;
    if let (Some(vf), Some(settings)) = (&claim.adapter, &before.settings) {
        first = restore_settings(host, vf, settings, returned).err();
    }
    reach(Point::ReleaseSettings);
    // The driver is put back even if the PF did not take its settings.
    match host.inventory.restore(claim.bdf, &before.binding) {
        Ok(()) | Err(BindError::NoDevice(_)) => reach(Point::ReleaseRestored),
        Err(error) => first = first.or(Some(error.problem())),
    }
    first.map_or(Ok(()), Err)
}

/// Sets what the VF had before. `returned`: the host's driver has the VF again, from an attempt before this one.
fn restore_settings(
    host: &Host,
    vf: &ClaimedVf,
    settings: &VfSettings,
    returned: bool,
) -> Result<(), Problem> {
    let mut pf = match (host.open_pf)(vf.pf) {
        Ok(pf) => pf,
        Err(PfError::NoInterface { .. } | PfError::Inventory(_)) => return Ok(()),
        Err(error) => return Err(error.problem()),
    };
    let mut settings = settings.clone();
    if returned && settings.mac.is_none() {
        // The driver has chosen an address meanwhile; without it the host's interface would be dead.
        settings.mac = pf.read(vf.index).map_err(|e| e.problem())?.mac;
    }
    match host::restore(&mut *pf, vf.index, &settings) {
        Ok(()) => Ok(()),
        Err(error) if matches!(*error.source, PfError::NoVf { .. }) => Ok(()),
        Err(error) => Err(error.problem()),
    }
}
