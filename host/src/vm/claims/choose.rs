// SPDX-License-Identifier: Apache-2.0

//! Chooses the functions of a VM: the named one, or the next free VF of a PF that fits.

use api::{
    problem::{Problem, ProblemCode},
    types::{UnicastMac, VmSpec, WantedPort},
};
use services::problem::ToProblem;
use sriov::{Bdf, InventoryError, Pf, Vf};
use switch::Uplinks;
use text::chain;
use uuid::Uuid;

use crate::{
    inventory::Inventory,
    vm::{
        record::{Claim, ClaimedVf, ports},
        switch_client,
    },
};

/// Chooses all functions of a VM, none of them `taken`.
///
/// # Errors
/// A problem that names the function, and its owner or the property that it lacks.
pub(super) fn choose(
    inventory: &Inventory,
    vm: Uuid,
    spec: &VmSpec,
    taken: &[Claim],
    plan: &[Uplinks],
) -> Result<Vec<Claim>, Problem> {
    let mut named: Vec<Bdf> = Vec::new();
    for bdf in spec.ports().filter_map(|port| port.vf).chain(spec.devices.iter().copied()) {
        named.push(convert(bdf)?);
    }
    let mut claims: Vec<Claim> = Vec::new();
    // The ports of NICs come last: the guest names functions by their slots.
    let (of_nics, of_adapters): (Vec<_>, Vec<_>) = ports(vm, spec).partition(|(port, _)| port.is_nic);
    for (port, mac) in of_adapters {
        claims.push(vf_for(inventory, (vm, spec), (&port, mac), taken, plan, &claims, &named)?);
    }
    for (slot, bdf) in (claims.len()..).zip(&spec.devices) {
        let bdf = convert(*bdf)?;
        plain_device(inventory, bdf, taken)?;
        claims.push(claim_of(vm, spec, slot, bdf, None));
    }
    for (port, mac) in of_nics {
        claims.push(vf_for(inventory, (vm, spec), (&port, mac), taken, plan, &claims, &named)?);
    }
    let together: Vec<Bdf> = claims.iter().map(|claim| claim.bdf).collect();
    for claim in &mut claims {
        let backend = inventory.backend(claim.bdf).map_err(|e| e.problem())?;
        claim.group = backend.check_viable(claim.bdf, &together).map_err(|e| e.problem())?;
        let shares = |other: &&Claim| other.group.is_some() && other.group == claim.group && other.vm != vm;
        if let Some(other) = taken.iter().find(shares) {
            return Err(in_use(claim.bdf, other, claim.adapter.is_some()));
        }
    }
    Ok(claims)
}

/// The named VF of a port, or a free one.
fn vf_for(
    inventory: &Inventory,
    (vm, spec): (Uuid, &VmSpec),
    (port, mac): (&WantedPort<'_>, UnicastMac),
    taken: &[Claim],
    plan: &[Uplinks],
    claims: &[Claim],
    named: &[Bdf],
) -> Result<Claim, Problem> {
    let fits = |pf: &Pf| {
        let name = inventory.name_for_ports(pf);
        check_pf(inventory, pf, &name)?;
        switch_client::check_uplink(plan, port.id.as_str(), &name)?;
        check_port(inventory, pf, &name, port)
    };
    let (vf, pf) = match port.vf {
        Some(bdf) => named_vf(inventory, convert(bdf)?, taken, fits)?,
        None => free_vf(inventory, taken, claims, named, fits)?,
    };
    let pf_name = inventory.name_for_ports(&pf);
    let adapter = ClaimedVf { id: port.id.clone(), pf: vf.pf, pf_name, index: vf.index, mac };
    Ok(claim_of(vm, spec, claims.len(), vf.device.bdf, Some(adapter)))
}

/// Whether the port can have a VF of a PF: NICs have VFs of simulated PFs only.
fn check_port(inventory: &Inventory, pf: &Pf, name: &str, port: &WantedPort<'_>) -> Result<(), Problem> {
    let facts = inventory.backend(pf.device.bdf).map_err(|e| e.problem())?.facts();
    match facts.no_port_of_nic.filter(|_| port.is_nic) {
        None => Ok(()),
        Some(why) => {
            let detail = format!(
                "PF {name} {why}: name a group whose switch has one as an uplink, or use an adapter."
            );
            let field = Some(format!("{}.port_group", port.field).into());
            Err(Problem { field, ..Problem::new(ProblemCode::NoFreeVf, detail) })
        }
    }
}

fn claim_of(vm: Uuid, spec: &VmSpec, slot: usize, bdf: Bdf, adapter: Option<ClaimedVf>) -> Claim {
    Claim { vm, vm_name: spec.name.to_string(), slot, bdf, group: None, adapter, before: None }
}

fn convert(bdf: api::types::Bdf) -> Result<Bdf, Problem> {
    bdf.to_string()
        .parse()
        .map_err(|error| Problem::new(ProblemCode::InvalidRequest, chain(&error as &sriov::InvalidBdf)))
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

/// Whether the agent can use a function. Without root it cannot use those of the host.
fn usable(inventory: &Inventory, bdf: Bdf) -> Result<(), Problem> {
    if !inventory.backends().leaves_out(bdf) {
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

/// Whether the host's operator lets VMs have VFs of a PF.
fn check_pf(inventory: &Inventory, pf: &Pf, name: &str) -> Result<(), Problem> {
    if inventory.assignable().pf(pf, name) {
        return Ok(());
    }
    let detail = format!(
        "VFs of PF {name} are not assignable: use a VF of another PF, or start the agent with --assignable {name}."
    );
    Err(Problem::new(ProblemCode::NotAssignable, detail))
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

/// A VF that neither a VM nor the host uses, of a PF that fits.
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
        let backend = inventory.backend(pf.device.bdf).map_err(internal)?;
        for vf in backend.vfs_of(pf.device.bdf).map_err(internal)? {
            seen += u32::from(up.is_ok());
            let bdf = vf.device.bdf;
            let group = |claim: &&Claim| claim.group.is_some() && claim.group == vf.device.iommu_group;
            let used = named.contains(&bdf)
                || mine.iter().any(|claim| claim.bdf == bdf)
                || taken.iter().any(|claim| claim.bdf == bdf)
                || taken.iter().find(group).is_some()
                || backend.check_viable(bdf, &[]).is_err()
                // The last check, because it opens the group. An unknown use counts as one.
                || backend.usage(bdf).map_or(true, |usage| usage.is_some());
            match &up {
                _ if used => {}
                Ok(()) => return Ok((vf, pf)),
                Err(problem) => down = Some(problem.clone()),
            }
        }
    }
    // Another PF's problem is no news if there is one that fits.
    Err(down.filter(|_| seen == 0).unwrap_or_else(|| {
        let cure = match inventory.backends().is_complete() {
            true => {
                "make more with `portcullis pf set-vfs`, stop a VM, or take down the host's interface of one"
            }
            false => {
                "the agent is not root and uses simulated VFs only: stop a VM, or give it more (--sim-pf)"
            }
        };
        Problem::new(ProblemCode::NoFreeVf, format!("None of {seen} VFs is free: {cure}."))
    }))
}

/// The problem of a function that is in use elsewhere on the host.
fn check_unused(inventory: &Inventory, bdf: Bdf, code: ProblemCode, what: &str) -> Result<(), Problem> {
    let usage = inventory
        .backend(bdf)
        .and_then(|backend| backend.usage(bdf))
        .map_err(|error| Problem::new(ProblemCode::Internal, chain(&error)))?;
    match usage {
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
    let backend = inventory.backend(bdf).map_err(|e| e.problem())?;
    if let Some(why) = backend.facts().no_plain_device {
        return unsupported(why);
    }
    if inventory.pf(bdf).is_ok_and(|pf| pf.num_vfs > 0) {
        return unsupported("is a PF with VFs: set their number to 0 first");
    }
    let Some(no_reset) = inventory.assignable().device(&device) else {
        let detail = format!(
            "Device {bdf} ({:04x}:{:04x}) is not assignable: use a function that is, or start the agent with --assignable \
             {bdf}.",
            device.vendor, device.device
        );
        return Err(Problem::new(ProblemCode::NotAssignable, detail));
    };
    if !no_reset && !backend.can_reset(bdf) {
        return unsupported(&format!(
            "has no reset (its directory in sysfs has no file reset), so its next user would find the state \
             and the data of the last one: use another function, or start the agent with --assignable \
             {bdf},no-reset"
        ));
    }
    check_unused(inventory, bdf, ProblemCode::DeviceInUse, "Device")
}
