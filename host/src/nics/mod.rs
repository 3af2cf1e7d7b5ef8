// SPDX-License-Identifier: Apache-2.0

//! The interfaces of VMs' NICs: taps on bridges, taps and macvtaps.
//!
//! A tap that the agent makes lives as long as its files are open, that is, as long as the vmm. So
//! nothing is left behind, whichever process ends first.

mod tap;

use std::{fs, fs::File, io, os::unix::fs::MetadataExt as _, path::Path, path::PathBuf};

use api::{
    problem::{Problem, ProblemCode},
    types::{NicInterface, NicSpec, UnicastMac, VmSpec},
};
use failpoints::{Point, reach};
use netpolicy::MacAddress;
use rustix::fs::{FlockOperation, flock};
use sriov::join_bridge;
use switch::Uplinks;
use uuid::Uuid;

use self::tap::Way;
use crate::vm::record::generated_nic_mac;

const INTERFACES: &str = "/sys/class/net";
const TUN: &str = "/dev/net/tun";
/// The kernel's flag of a tap in `tun_flags` (`IFF_TAP`).
const IS_TAP: u32 = 2;
/// The MTU of an interface without the attribute `mtu`, and of a port group's NIC whose specification has none.
const MTU: u16 = 1500;

/// The open interface of a NIC.
#[derive(Debug)]
pub struct Opened {
    /// Its address.
    pub mac: UnicastMac,
    /// Its MTU.
    pub mtu: u16,
    /// A file for each pair of queues. None for a NIC of a port group.
    pub queues: Vec<File>,
    /// The lock of an existing interface. It is held as long as the queues are open.
    pub lock: Option<File>,
}

/// The name of the tap that the agent makes for NIC `number` of a VM on a bridge. It is different for each VM.
#[must_use]
pub fn tap_name(vm: Uuid, number: usize) -> String {
    let [a, b, c, d, e, ..] = *vm.as_bytes();
    format!("pc{a:02x}{b:02x}{c:02x}{d:02x}{e:02x}n{number}")
}

/// The address of a NIC, from the specification or derived from the VM's id. None if the NIC has the address of its
/// macvtap interface.
#[must_use]
pub fn address(vm: Uuid, nic: &NicSpec) -> Option<UnicastMac> {
    let generated = || match nic.interface() {
        Some(NicInterface::Macvtap(_)) => None,
        _ => Some(generated_nic_mac(vm, &nic.id)),
    };
    nic.mac.or_else(generated)
}

/// The interface of the host that carries the frames of NIC `number`.
#[must_use]
pub fn interface(vm: Uuid, number: usize, nic: &NicSpec) -> Option<String> {
    match nic.interface()? {
        NicInterface::Bridge(_) => Some(tap_name(vm, number)),
        NicInterface::Tap(name) | NicInterface::Macvtap(name) => Some(name.to_owned()),
    }
}

/// Opens the interfaces of a VM's NICs, in their order. `allowed` are the interfaces that VMs may use, and `plan` has the MTUs
/// of port groups. Blocks: not for async code.
///
/// # Errors
/// A problem with the field of the first NIC that cannot be used. The taps of the NICs before it are removed.
pub fn open_all(
    allowed: &[String],
    plan: &[Uplinks],
    vm: Uuid,
    spec: &VmSpec,
) -> Result<Vec<Opened>, Problem> {
    let open = |(number, nic): (usize, &NicSpec)| {
        let Some(interface) = nic.interface() else {
            return of_group(plan, vm, number, nic);
        };
        let at = |(code, detail): Failed| {
            let field = format!("nics[{number}].{}", interface.kind());
            Problem { field: Some(field.into()), ..Problem::new(code, detail) }
        };
        if !allowed.iter().any(|name| name == interface.name()) {
            let detail = format!(
                "VMs may not use the interface {0}: start the agent with --interface {0}.",
                interface.name()
            );
            return Err(at((ProblemCode::InterfaceNotAllowed, detail)));
        }
        open(vm, number, nic, interface).map_err(at)
    };
    spec.nics.iter().enumerate().map(open).collect()
}

/// A NIC of a port group has no files: its frames pass through its VF.
fn of_group(plan: &[Uplinks], vm: Uuid, number: usize, nic: &NicSpec) -> Result<Opened, Problem> {
    let internal = || Problem::new(ProblemCode::Internal, "A NIC has neither an interface nor a port.");
    let mac = address(vm, nic).ok_or_else(internal)?;
    let most = plan.iter().find(|port| port.adapter == nic.id.as_str()).ok_or_else(internal)?.mtu;
    let mtu = nic.mtu.unwrap_or(MTU.min(most));
    if mtu > most {
        let group = nic.port_group.as_ref().map(ToString::to_string).unwrap_or_default();
        let detail = format!(
            "The port group {group} allows an MTU of {most}, and that of the NIC is {mtu}: lower `mtu`, or raise the group's."
        );
        let field = Some(format!("nics[{number}].mtu").into());
        return Err(Problem { field, ..Problem::new(ProblemCode::InterfaceUnusable, detail) });
    }
    Ok(Opened { mac, mtu, queues: Vec::new(), lock: None })
}

type Failed = (ProblemCode, String);

fn missing(interface: NicInterface<'_>) -> Failed {
    let (name, kind) = (interface.name(), interface.kind());
    let cure = match interface {
        NicInterface::Bridge(_) => format!("ip link add {name} type bridge && ip link set {name} up"),
        NicInterface::Tap(_) => format!("ip tuntap add {name} mode tap vnet_hdr"),
        NicInterface::Macvtap(_) => format!("ip link add link UPLINK name {name} type macvtap mode bridge"),
    };
    let detail = if index(name).is_some() {
        format!("The interface {name} is no {kind}: name it under its own kind, or name another interface.")
    } else {
        format!("There is no {kind} called {name} on the host: make it (`{cure}`).")
    };
    (ProblemCode::InterfaceNotFound, detail)
}

fn unusable(interface: NicInterface<'_>, cause: impl std::fmt::Display, cure: &str) -> Failed {
    let detail = format!("The {} {} cannot be used ({cause}): {cure}.", interface.kind(), interface.name());
    (ProblemCode::InterfaceUnusable, detail)
}

fn attribute(name: &str, attribute: &str) -> Option<String> {
    fs::read_to_string(Path::new(INTERFACES).join(name).join(attribute))
        .ok()
        .map(|text| text.trim().to_owned())
}

fn index(name: &str) -> Option<u32> {
    attribute(name, "ifindex")?.parse().ok()
}

/// The MTU of a NIC on an interface. It is at most the MTU of the interface, which would lose longer frames.
fn mtu(nic: &NicSpec, interface: NicInterface<'_>) -> Result<u16, Failed> {
    let most = attribute(interface.name(), "mtu").and_then(|mtu| mtu.parse().ok()).unwrap_or(MTU);
    match nic.mtu {
        Some(wanted) if wanted > most => {
            let cause = format!("its MTU is {most}, and that of the NIC {wanted}");
            Err(unusable(interface, cause, "lower `mtu`, or raise that of the interface"))
        }
        wanted => Ok(wanted.unwrap_or(most)),
    }
}

fn open(vm: Uuid, number: usize, nic: &NicSpec, interface: NicInterface<'_>) -> Result<Opened, Failed> {
    match interface {
        NicInterface::Bridge(bridge) => on_bridge(vm, number, nic, interface, bridge),
        NicInterface::Tap(name) => {
            let flags = attribute(name, "tun_flags").ok_or_else(|| missing(interface))?;
            let flags = u32::from_str_radix(flags.trim_start_matches("0x"), 16).unwrap_or_default();
            if flags & IS_TAP == 0 {
                let cure = "make a tap (`ip tuntap add … mode tap vnet_hdr`)";
                return Err(unusable(interface, "it is a tun interface", cure));
            }
            let mac = address(vm, nic).ok_or_else(|| missing(interface))?;
            existing(nic, interface, Path::new(TUN), mac)
        }
        NicInterface::Macvtap(name) => {
            if !Path::new(INTERFACES).join(name).join("macvtap").is_dir() {
                return Err(missing(interface));
            }
            let node = macvtap_node(name).ok_or_else(|| {
                let cure = "make the node that /sys/class/net/NAME/macvtap/tapN/dev describes, as udev does";
                unusable(interface, "its device node /dev/tapN is missing or another device", cure)
            })?;
            let own = attribute(name, "address").and_then(|mac| mac.parse::<UnicastMac>().ok());
            let own = own.ok_or_else(|| missing(interface))?;
            if nic.mac.is_some_and(|mac| mac != own) {
                let cure = "leave out mac, or give the interface that address (`ip link set … address`)";
                return Err(unusable(interface, format!("its address is {own}"), cure));
            }
            existing(nic, interface, &node, own)
        }
    }
}

/// Opens an existing interface. No other process may have it open, because the two would share its frames.
fn existing(
    nic: &NicSpec,
    interface: NicInterface<'_>,
    node: &Path,
    mac: UnicastMac,
) -> Result<Opened, Failed> {
    let name = interface.name();
    let mtu = mtu(nic, interface)?;
    let lock =
        File::open(Path::new(INTERFACES).join(name).join("ifindex")).map_err(|_| missing(interface))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Err(unusable(interface, "another VM uses it", "stop that VM, or name another interface"));
    }
    reach(Point::NicLocked);
    let queues = queues(node, name, nic.queues, Way::Existing).map_err(|error| {
        let (cause, cure) = why(&error);
        unusable(interface, cause, cure)
    })?;
    reach(Point::NicOpened);
    Ok(Opened { mac, mtu, queues, lock: Some(lock) })
}

/// Makes a tap on a bridge.
fn on_bridge(
    vm: Uuid,
    number: usize,
    nic: &NicSpec,
    interface: NicInterface<'_>,
    bridge: &str,
) -> Result<Opened, Failed> {
    let is_bridge = Path::new(INTERFACES).join(bridge).join("bridge").is_dir();
    let bridge_index = index(bridge).filter(|_| is_bridge).ok_or_else(|| missing(interface))?;
    let mac = address(vm, nic).ok_or_else(|| missing(interface))?;
    let mtu_of_nic = mtu(nic, interface)?;
    let mtu_of_bridge = attribute(bridge, "mtu").and_then(|mtu| mtu.parse().ok()).unwrap_or(MTU);
    if let Some(owner) = holder(bridge, mac) {
        let cause = format!("{owner} has the address {mac}");
        return Err(unusable(interface, cause, "choose another `mac`"));
    }
    let name = tap_name(vm, number);
    let queues = queues(Path::new(TUN), &name, nic.queues, Way::New).map_err(|error| {
        let cure = match error.raw_os_error() {
            Some(libc::EBUSY) => format!("an interface of this name exists: `ip link delete {name}`"),
            _ => "load the module tun, and run the agent as root or with CAP_NET_ADMIN".to_owned(),
        };
        unusable(interface, format!("no tap {name}: {error}"), &cure)
    })?;
    reach(Point::NicMade);
    let own =
        index(&name).ok_or_else(|| unusable(interface, format!("the tap {name} is gone"), "try again"))?;
    join_bridge(bridge_index, own, MacAddress::new(mac.octets()), mtu_of_bridge.into()).map_err(|error| {
        unusable(
            interface,
            text::chain(&error),
            "check that the bridge takes another port (`ip link`, `bridge fdb`)",
        )
    })?;
    Ok(Opened { mac, mtu: mtu_of_nic, queues, lock: None })
}

/// The interface with the address `mac`, among a bridge and its ports. A second interface with that address would
/// get frames of the first.
fn holder(bridge: &str, mac: UnicastMac) -> Option<String> {
    let ports = fs::read_dir(Path::new(INTERFACES).join(bridge).join("brif")).into_iter().flatten().flatten();
    let ports = ports.filter_map(|port| port.file_name().into_string().ok());
    let mut names = [bridge.to_owned()].into_iter().chain(ports);
    names.find(|name| attribute(name, "address").and_then(|own| own.parse().ok()) == Some(mac))
}

fn queues(node: &Path, name: &str, count: u8, way: Way) -> io::Result<Vec<File>> {
    // Only the first queue makes the interface.
    let way_of = |number| if number == 0 { way } else { Way::Existing };
    (0..count).map(|number| tap::queue(node, name, count > 1, way_of(number))).collect()
}

/// The reason why an existing interface cannot be opened, and the cure.
fn why(error: &io::Error) -> (String, &'static str) {
    match error.raw_os_error() {
        Some(libc::EBUSY) => {
            ("another process has it open".to_owned(), "end that process, or name another interface")
        }
        Some(libc::EINVAL) => (
            "it was made for another number of queues".to_owned(),
            "make it with `multi_queue` exactly if the NIC has several queues",
        ),
        Some(libc::EPERM) => {
            ("it belongs to another user".to_owned(), "run the agent as its owner or with CAP_NET_ADMIN")
        }
        _ => (error.to_string(), "let the agent open its device node"),
    }
}

/// The device node of a macvtap interface, `/dev/tapN`.
fn macvtap_node(name: &str) -> Option<PathBuf> {
    let node = PathBuf::from(format!("/dev/tap{}", index(name)?));
    let kernel = fs::read_dir(Path::new(INTERFACES).join(name).join("macvtap")).ok()?.flatten().next()?;
    let numbers = fs::read_to_string(kernel.path().join("dev")).ok()?;
    let (major, minor) = numbers.trim().split_once(':')?;
    let wanted = rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?);
    // A stale node at this path could be another device.
    (fs::metadata(&node).ok()?.rdev() == wanted).then_some(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(nic: serde_json::Value) -> VmSpec {
        serde_json::from_value(serde_json::json!({
            "name": "web1", "memory": "2MiB", "boot": { "kernel": "k" }, "nics": [nic],
        }))
        .unwrap()
    }

    #[test]
    fn interfaces_are_those_that_the_operator_allows() {
        let check = |allowed: &[&str], nic: serde_json::Value| {
            let allowed: Vec<String> = allowed.iter().map(|name| (*name).to_owned()).collect();
            let problem = open_all(&allowed, &[], Uuid::nil(), &spec(nic)).unwrap_err();
            (problem.code, problem.field.unwrap().into_string())
        };
        let (lo, none) = (|kind: &str| serde_json::json!({ "id": "n", kind: "lo" }), "pcnone0");
        for kind in ["bridge", "tap", "macvtap"] {
            let field = format!("nics[0].{kind}");
            assert_eq!(check(&[none], lo(kind)), (ProblemCode::InterfaceNotAllowed, field.clone()));
            assert_eq!(
                check(&["lo"], lo(kind)),
                (ProblemCode::InterfaceNotFound, field.clone()),
                "it is none"
            );
            let absent = serde_json::json!({ "id": "n", kind: none });
            assert_eq!(check(&[none], absent), (ProblemCode::InterfaceNotFound, field));
        }
    }

    #[test]
    fn the_mtu_of_a_nic_is_at_most_that_of_its_port_group() {
        let plan = |mtu| Uplinks {
            adapter: "n".to_owned(),
            switch: "default".to_owned(),
            pfs: Vec::new(),
            mtu,
            unfit: Vec::new(),
        };
        let open = |most: u16, wanted: Option<u16>| {
            let nic = serde_json::json!({ "id": "n", "port_group": "web", "mtu": wanted });
            open_all(&[], &[plan(most)], Uuid::nil(), &spec(nic)).map(|nics| nics[0].mtu)
        };
        assert_eq!(open(9000, None).unwrap(), 1500);
        assert_eq!(open(1400, None).unwrap(), 1400);
        assert_eq!(open(9000, Some(9000)).unwrap(), 9000);
        let problem = open(1500, Some(1501)).unwrap_err();
        assert_eq!(
            (problem.code, problem.field.as_deref()),
            (ProblemCode::InterfaceUnusable, Some("nics[0].mtu"))
        );
    }

    #[test]
    fn names_and_addresses_never_change() {
        let vm = Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
        assert_eq!(tap_name(vm, 7), "pc0123456789n7");
        let nic = spec(serde_json::json!({ "id": "eth0", "bridge": "br0" })).nics.remove(0);
        let mac = address(vm, &nic).unwrap();
        assert_eq!(mac.to_string(), "7e:53:90:4b:bd:42");
        assert_ne!(
            mac,
            crate::vm::record::generated_mac(vm, nic.id.as_str()),
            "that of an adapter with this id"
        );
        let macvtap = spec(serde_json::json!({ "id": "eth0", "macvtap": "mv0" })).nics.remove(0);
        assert_eq!(address(vm, &macvtap), None, "the interface has one");
    }
}
