// SPDX-License-Identifier: Apache-2.0

//! The findings about PFs, their VFs and their drivers, and about assignable functions.

use netpolicy::PfCapabilities;
use options::assignable::AssignableList;
use passthrough::family::{FAMILIES, Family};
use sriov::{FlowControl, InventoryError, PciDevice, Pf};

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
            "no adapter with SR-IOV is found: VMs can have simulated VFs",
            "enable SR-IOV in the firmware if the host has an adapter with it, or: portcullis serve --sim-pf \
             sim0=8",
        )];
    }
    let each: Vec<Vec<Finding>> = pfs.iter().map(|pf| one(host, pf)).collect();
    let failed = |finding: &Finding| finding.verdict == Verdict::Fail;
    // While one PF can be used, a VM with a VF can be booted.
    let usable = each.iter().any(|findings| !findings.iter().any(failed));
    let mut findings: Vec<Finding> = each.into_iter().flatten().collect();
    for finding in findings.iter_mut().filter(|finding| usable && failed(finding)) {
        finding.verdict = Verdict::Warn;
    }
    findings
}

/// The findings about one PF: a failure if no VM can have a VF of it.
fn one(host: &Host, pf: &Pf) -> Vec<Finding> {
    let name = pf.name();
    let Some(driver) = &pf.device.driver else {
        let fix = format!("modprobe \"$(cat /sys/bus/pci/devices/{}/modalias)\"", pf.device.bdf);
        return vec![Finding::wrong(Verdict::Fail, "pf", "it has no driver", fix).of(&name)];
    };
    let mut findings = Vec::new();
    let up = pf.interface().is_some_and(|interface| interface.admin_up);
    if up {
        findings.push(Finding::ok("pf", format!("{} with {driver}, up", pf.device.bdf)));
    } else {
        let found = format!("{} with {driver} is down: its VFs have no link", pf.device.bdf);
        findings.push(Finding::wrong(Verdict::Fail, "pf", found, format!("ip link set {name} up")));
    }
    findings.extend(flow_control(host, &name));
    let found = format!("{} of {} VFs", pf.num_vfs, pf.total_vfs);
    findings.push(match pf.num_vfs {
        0 => {
            // The second half is for a host on which no agent runs yet.
            let fix = format!(
                "portcullis pf set-vfs {name} {0} || echo {0} >/sys/bus/pci/devices/{1}/sriov_numvfs",
                pf.total_vfs.min(4),
                pf.device.bdf
            );
            Finding::wrong(Verdict::Fail, "vfs", found, fix)
        }
        _ => vfs(host, pf, found),
    });
    findings.push(enforces(&PfCapabilities::of(driver, pf.device.device)));
    findings.into_iter().map(|finding| finding.of(&name)).collect()
}

/// Whether the port obeys PAUSE frames, which no policy filters: a guest can stop the port with them. None if it has no flow
/// control.
fn flow_control(host: &Host, name: &str) -> Option<Finding> {
    const CHECK: &str = "flow_control";
    let warn = |found: String, fix: String| Some(Finding::wrong(Verdict::Warn, CHECK, found, fix));
    match (host.flow_control)(name) {
        Ok(None) => None,
        Ok(Some(FlowControl { receive: false, send: false })) => Some(Finding::ok(CHECK, "off")),
        Ok(Some(FlowControl { receive, send })) => {
            let on = [receive.then_some("rx"), send.then_some("tx")];
            let on = on.into_iter().flatten().collect::<Vec<_>>().join(" and ");
            let found = format!("on ({on}): PAUSE frames of a guest can stop the port for everybody");
            warn(found, format!("ethtool -A {name} rx off tx off"))
        }
        Err(error) => warn(format!("it cannot be read ({error})"), format!("ethtool -a {name}")),
    }
}

/// Whether the VFs can be given to VMs, and their drivers' mailbox is one that the relay speaks.
fn vfs(host: &Host, pf: &Pf, found: String) -> Finding {
    let vfs = match host.sysfs.vfs_of(pf.device.bdf) {
        Ok(vfs) => vfs,
        Err(error) => {
            let fix = format!("ls -l /sys/bus/pci/devices/{}/virtfn*  # and try again", pf.device.bdf);
            return Finding::wrong(Verdict::Fail, "vfs", error.to_string(), fix);
        }
    };
    if vfs.iter().any(|vf| Family::of(vf.device.vendor, vf.device.device).is_none()) {
        let known: Vec<&str> = FAMILIES.iter().map(|family| family.driver).collect();
        let found =
            format!("{found} with an unsupported mailbox: VMs can have them as `devices`, without policy");
        let fix = format!("use an adapter with VFs of the driver {}", known.join(" or "));
        return Finding::wrong(Verdict::Warn, "vfs", found, fix);
    }
    let together: Vec<_> = vfs.iter().map(|vf| vf.device.bdf).collect();
    let mut barred = Vec::new();
    for vf in &vfs {
        let Some(group) = vf.device.iommu_group else { continue };
        // Without groups the IOMMU is off, which is a finding of its own.
        let Ok(Some(group_of)) = host.sysfs.iommu_group(vf.device.bdf) else { continue };
        let alien = group_of
            .members
            .iter()
            .find(|member| member.bdf().is_none_or(|bdf| !together.contains(&bdf)) && !member.is_harmless());
        barred
            .extend(alien.map(|alien| format!("IOMMU group {group} of {} contains {alien}", vf.device.bdf)));
    }
    let Some(first) = barred.first() else { return Finding::ok("vfs", found) };
    let (verdict, many) = match barred.len() == vfs.len() {
        true => (Verdict::Fail, "none".to_owned()),
        false => (Verdict::Warn, format!("all but {}", barred.len())),
    };
    let found = format!("{found}, of which {many} can be given to a VM: {first}");
    let fix = "put the adapter into a slot of its own, or enable ACS in the firmware";
    Finding::wrong(verdict, "vfs", found, fix)
}

/// The settings of policies that the PF's driver can enforce.
fn enforces(can: &PfCapabilities) -> Finding {
    let all = [
        (can.spoof_check, "forged_transmits=reject"),
        (can.access_vlan, "vlan=access"),
        (can.trunk_vlans > 0, "vlan=trunk"),
        (can.max_tx_rate.is_some(), "rate"),
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

/// The findings about the functions of the host that VMs may have: use by the host, and a missing reset between two
/// VMs.
pub(super) fn assignable(host: &Host, list: &AssignableList) -> Vec<Finding> {
    let one = |(device, no_reset): (PciDevice, bool)| {
        let bdf = device.bdf;
        let finding = match (host.sysfs.usage(bdf), host.sysfs.can_reset(bdf), no_reset) {
            (Ok(Some(usage)), ..) => {
                let fix = format!("{} before a VM gets it", usage.cure());
                Finding::wrong(Verdict::Warn, "assignable", format!("it is used by {usage}"), fix)
            }
            (Err(error), ..) => {
                let fix = format!("ls -l /sys/bus/pci/devices/{bdf}/  # and try again");
                Finding::wrong(Verdict::Warn, "assignable", error.to_string(), fix)
            }
            (Ok(None), true, _) => Finding::ok("assignable", "VMs can have it, and it is reset between them"),
            (Ok(None), false, true) => {
                let found = "it has no reset: each VM that gets it finds the state and data of the last one";
                Finding::wrong(
                    Verdict::Warn,
                    "assignable",
                    found,
                    "use another function if VMs must not trust each other",
                )
            }
            (Ok(None), false, false) => {
                let fix =
                    format!("portcullis serve --assignable {bdf},no-reset  # its state passes from VM to VM");
                Finding::wrong(Verdict::Warn, "assignable", "it has no reset, so no VM gets it", fix)
            }
        };
        finding.of(&bdf.to_string())
    };
    // The findings about PFs report an unreadable sysfs.
    list.devices(&host.sysfs).unwrap_or_default().into_iter().map(one).collect()
}
