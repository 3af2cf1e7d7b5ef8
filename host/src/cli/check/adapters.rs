//! PFs, and what each can do.

use netpolicy::PfCapabilities;
use passthrough::{
    host::{InventoryError, Pf},
    mailbox::layout::{FAMILIES, Layout},
};

use super::{Finding, Host, Verdict};

pub(super) fn all(host: &Host, pfs: Result<Vec<Pf>, InventoryError>) -> Vec<Finding> {
    let pfs = match pfs {
        Ok(pfs) => pfs,
        Err(error) => {
            return vec![Finding::wrong(
                Verdict::Fail,
                "pf",
                format!("PFs cannot be read ({error})"),
                "mount -t sysfs sysfs /sys",
            )];
        }
    };
    if pfs.is_empty() {
        return vec![Finding::wrong(
            Verdict::Warn,
            "pf",
            "no adapter that makes VFs is found: VMs can have simulated ones",
            "enable SR-IOV in the firmware if there is one, or: portcullis serve --sim-pf sim0=8",
        )];
    }
    pfs.iter().flat_map(|pf| one(host, pf)).collect()
}

fn one(host: &Host, pf: &Pf) -> Vec<Finding> {
    let name = pf.name();
    let Some(driver) = &pf.device.driver else {
        let fix = format!("modprobe the adapter's driver; lspci -k -s {} names it", pf.device.bdf);
        return vec![Finding::wrong(Verdict::Fail, "pf", "it has no driver", fix).of(&name)];
    };
    let mut findings = Vec::new();
    let up = pf.interface().is_some_and(|interface| interface.admin_up);
    if up {
        findings.push(Finding::ok("pf", format!("{} with {driver}, up", pf.device.bdf)));
    } else {
        let found = format!("{} with {driver} is down: its VFs have no link", pf.device.bdf);
        findings.push(Finding::wrong(Verdict::Warn, "pf", found, format!("ip link set {name} up")));
    }
    let found = format!("{} of {} VFs", pf.num_vfs, pf.total_vfs);
    findings.push(match pf.num_vfs {
        0 => {
            let fix = format!(
                "portcullis pf set-vfs {name} {0}, or without an agent: echo {0} > /sys/bus/pci/devices/{1}/sriov_numvfs",
                pf.total_vfs.min(4),
                pf.device.bdf
            );
            Finding::wrong(Verdict::Warn, "vfs", found, fix)
        }
        _ => vfs(host, pf, found),
    });
    findings.push(enforces(&PfCapabilities::of(driver, pf.device.device)));
    findings.into_iter().map(|finding| finding.of(&name)).collect()
}

/// Whether the VFs can be given to VMs, and their drivers' mailbox is one that the relay speaks.
fn vfs(host: &Host, pf: &Pf, found: String) -> Finding {
    let vfs = match host.sysfs.vfs_of(pf.device.bdf) {
        Ok(vfs) => vfs,
        Err(error) => return Finding::wrong(Verdict::Warn, "vfs", error.to_string(), "try again"),
    };
    let together: Vec<_> = vfs.iter().map(|vf| vf.device.bdf).collect();
    for vf in &vfs {
        if Layout::of(vf.device.vendor, vf.device.device).is_none() {
            let known: Vec<&str> = FAMILIES.iter().map(|layout| layout.driver).collect();
            let found = format!(
                "{found}, whose mailbox Portcullis does not speak: they can be `devices`, without policy"
            );
            let fix = format!("use an adapter whose VFs are driven by {}", known.join(" or "));
            return Finding::wrong(Verdict::Warn, "vfs", found, fix);
        }
        let Some(group) = vf.device.iommu_group else { continue };
        // Without groups the IOMMU is off, which is told by itself.
        if let Ok(Some(group_of)) = host.sysfs.iommu_group(vf.device.bdf) {
            let alien = group_of.members.iter().find(|member| {
                member.bdf().is_none_or(|bdf| !together.contains(&bdf)) && !member.is_harmless()
            });
            if let Some(alien) = alien {
                let found = format!(
                    "{found}; IOMMU group {group} of {} has {} of the host in it",
                    vf.device.bdf, alien.name
                );
                let fix = "put the adapter into a slot of its own, or enable ACS in the firmware";
                return Finding::wrong(Verdict::Fail, "vfs", found, fix);
            }
        }
    }
    Finding::ok("vfs", found)
}

/// What policies can ask of the PF's driver.
fn enforces(can: &PfCapabilities) -> Finding {
    let all = [
        (can.spoof_check, "forged_transmits=reject"),
        (can.access_vlan, "vlan=access"),
        (can.trunk_vlans > 0, "vlan=trunk"),
        (can.max_tx_rate, "rate"),
        (can.link_state, "blocked"),
        (can.multicast_promiscuous, "promiscuous=multicast"),
        (can.unicast_promiscuous, "promiscuous=accept"),
    ];
    let of = |wanted: bool| -> Vec<&str> {
        all.iter().filter(|(is, _)| *is == wanted).map(|(_, name)| *name).collect()
    };
    Finding::ok(
        "policy",
        format!("{} enforces {}; not {}", can.driver, of(true).join(", "), of(false).join(", ")),
    )
}
