// SPDX-License-Identifier: Apache-2.0

//! The host side against a real kernel and adapter, for the nested lab: `resources/lab/run --igbvf --vfs 2 --
//! target/debug/examples/host-lab`.
//!
//! Prints one line per check and ends with status 1 if any failed. It removes VFs and takes the PF down: run it only
//! in the lab.

#![allow(clippy::print_stdout, clippy::expect_used)] // A program for people, whose failures may stop it.

use std::{
    error::Error,
    fmt::Debug,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use netpolicy::MacAddress;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sriov::{
    BindError, Hint, InterruptRemapping, Monitor, NetlinkPf, PfControl, PfError, PortVlan, PreviousBinding,
    Sysfs, TagProtocol, VfChange, VfCountError, VfLink, ViabilityError, restore,
};

/// Counts failures.
struct Checks {
    failed: u32,
}

impl Checks {
    fn that(&mut self, what: &str, holds: bool, seen: impl Debug) {
        println!("{} {what}: {seen:?}", if holds { "ok    " } else { "FAILED" });
        self.failed += u32::from(!holds);
    }

    fn error<T, E: Error>(&mut self, what: &str, result: Result<T, E>, expected: impl Fn(&E) -> bool) {
        match result {
            Ok(_) => self.that(what, false, "no error"),
            Err(e) => {
                let holds = expected(&e);
                let mut text = e.to_string();
                let mut source = e.source();
                while let Some(inner) = source {
                    text = format!("{text}: {inner}");
                    source = inner.source();
                }
                self.that(what, holds, text);
            }
        }
    }
}

fn main() -> ExitCode {
    let mut checks = Checks { failed: 0 };
    // The argument is the address of a VF that a process has open through VFIO.
    if let Some(bdf) = std::env::args().nth(1) {
        let bdf = bdf.parse().expect("a PCI address");
        let started = Instant::now();
        let result = Sysfs::default().restore(bdf, &PreviousBinding::default());
        checks.error("a VF in use", result, |e| matches!(e, BindError::NotReleased { .. }));
        println!("       in {:?}", started.elapsed());
        return if checks.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    if let Err(e) = run(&mut checks) {
        checks.that("ran to its end", false, &e);
    }
    if checks.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default()
}

fn vf_line(index: u16) -> String {
    let mark = format!("vf {index} ");
    ip("link show eth0").lines().find(|line| line.contains(&mark)).unwrap_or("").trim().to_owned()
}

fn run(checks: &mut Checks) -> Result<(), Box<dyn Error>> {
    let sysfs = Sysfs::default();
    let (pf_bdf, vf_bdf, second) =
        ("0000:01:00.0".parse()?, "0000:01:10.0".parse()?, "0000:01:10.2".parse()?);
    let mac = MacAddress::new([2, 0, 0, 0, 0, 0x11]);

    let pf = sysfs.pf(pf_bdf)?;
    checks.that("the PF", pf.name() == "eth0" && pf.total_vfs == 7 && pf.num_vfs == 2 && pf.is_up(), &pf);
    checks.that("there is one PF", sysfs.pfs()?.len() == 1, ());
    let vfs = sysfs.vfs()?;
    let numbers: Vec<_> = vfs.iter().map(|vf| (vf.index, vf.device.bdf)).collect();
    checks.that("the VFs", numbers == [(0, vf_bdf), (1, second)], &vfs);

    let remapping = sysfs.interrupt_remapping()?;
    checks.that("interrupt remapping", remapping == InterruptRemapping::On, remapping);
    let group = sysfs.check_viable(vf_bdf, &[])?;
    checks.that("the VF's group", group.members.len() == 1, &group);
    let e1000: Vec<_> = (0..=0xff)
        .filter_map(|bus| sriov::Bdf::new(0, bus, 1, 0))
        .filter(|bdf| sysfs.device(*bdf).is_ok_and(|d| d.device == 0x100e))
        .collect();
    for bdf in e1000 {
        checks.error("a group that is not viable", sysfs.check_viable(bdf, &[]), |e| {
            matches!(e, ViabilityError::NotViable { blocking, .. } if blocking.iter().any(|m| m.driver.as_deref() == Some("e1000")))
        });
    }

    let mut control = NetlinkPf::open(&sysfs, pf_bdf)?;
    println!("       capabilities: {:?}", control.capabilities()?);
    let remembered = control.read(0)?;
    let expected = remembered.spoof_check == Some(true) && remembered.trust == Some(false);
    checks.that("the VF's settings", expected, &remembered);
    println!("       {}", vf_line(0));

    // The second VF gets an address from the administrator, so that both cases are tested.
    let pinned = MacAddress::new([2, 0, 0, 0, 0, 0x22]);
    control.apply(1, &[VfChange::Mac(Some(pinned))])?;
    for (bdf, index) in [(vf_bdf, 0), (second, 1)] {
        let started = Instant::now();
        let before = sysfs.current_binding(bdf)?;
        sysfs.bind_vfio(bdf)?;
        let bound = sysfs.current_binding(bdf)?;
        println!("       {before:?} in {:?}", started.elapsed());
        checks.that("bound to vfio-pci", bound.driver.as_deref() == Some("vfio-pci"), &bound);
        let shown = control.read(index)?.mac;
        sysfs.reset(bdf)?;
        let after = control.read(index)?;
        println!("       VF {index}: {shown:?}, after a reset {:?}", after.mac);
        let refined = remembered.clone().without_own_mac(&after);
        checks.that(
            "a reset keeps the administrator's address only",
            after.mac == (index == 1).then_some(pinned),
            refined.mac,
        );
    }

    let fresh = control.read(0)?;
    for change in [
        VfChange::Mac(Some(mac)),
        VfChange::SpoofCheck(false),
        VfChange::Trust(true),
        VfChange::Vlan(PortVlan { id: 7, qos: 3, protocol: TagProtocol::Dot1Q }),
        VfChange::TxRate { min: 0, max: 100 },
    ] {
        let started = Instant::now();
        let result = control.apply(0, &[change]);
        println!("       {change} in {:?}", started.elapsed());
        checks.that(&change.to_string(), result.is_ok(), result.err());
    }
    let line = vf_line(0);
    let all = ["02:00:00:00:00:11", "vlan 7, qos 3", "100Mbps", "spoof checking off", "trust on"];
    checks.that("ip link shows it all", all.iter().all(|text| line.contains(text)), &line);

    let set = control.read(0)?;
    checks.error("link state", control.apply(0, &[VfChange::Link(VfLink::Disable)]), |e| {
        matches!(*e.source, PfError::Unsupported { .. })
    });
    let other = VfChange::Mac(Some(pinned));
    let series = [other, VfChange::Trust(false), VfChange::Link(VfLink::Disable)];
    checks.error("undone", control.apply(0, &series), |e| e.not_undone.is_empty() && e.change == series[2]);
    let now = control.read(0)?;
    checks.that("all is as before", now == set, &now);
    let multicast = VfChange::Mac(Some(MacAddress::new([1, 0, 0x5e, 0, 0, 1])));
    checks.error("a multicast address", control.apply(0, &[multicast]), |e| {
        matches!(*e.source, PfError::Refused { .. })
    });
    let service = VfChange::Vlan(PortVlan { id: 7, qos: 0, protocol: TagProtocol::Dot1Ad });
    checks.error("802.1ad", control.apply(0, &[service]), |e| {
        matches!(*e.source, PfError::Unsupported { .. } | PfError::Refused { .. })
    });
    checks.error("a minimum rate", control.apply(0, &[VfChange::TxRate { min: 10, max: 100 }]), |e| {
        matches!(*e.source, PfError::Refused { .. } | PfError::Unsupported { .. } | PfError::NotTaken { .. })
    });
    checks.error("no such VF (read)", control.read(6), |e| matches!(e, PfError::NoVf { .. }));
    checks.error("no such VF (set)", control.set(6, VfChange::Trust(true)), |e| {
        matches!(e, PfError::Refused { .. })
    });

    let mut monitor = Monitor::open()?;
    checks.that("no news yet", monitor.hints()?.is_empty(), ());
    ip("link set eth0 down");
    let seen = monitor_saw(&mut monitor, |hint| matches!(hint, Hint::Changed { up: false, .. }));
    checks.that("news of the PF going down", seen.is_some(), seen);
    checks.error(
        "a rate while the PF is down",
        control.apply(0, &[VfChange::TxRate { min: 0, max: 50 }]),
        |e| matches!(*e.source, PfError::Refused { .. }),
    );
    checks.that("the PF is seen to be down", !sysfs.pf(pf_bdf)?.is_up(), ());
    let down = control.read(0)?;
    println!("       while the PF is down: {down:?}");
    ip("link set eth0 up");
    let seen = monitor_saw(&mut monitor, |hint| matches!(hint, Hint::Changed { up: true, .. }));
    checks.that("news of the PF coming up", seen.is_some(), seen);
    let deadline = Instant::now() + Duration::from_secs(15);
    while !sysfs.pf(pf_bdf)?.is_up() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
    }

    // No events are read while they pile up.
    let batch = "link set dev lo mtu 60000\nlink set dev lo mtu 65536\n".repeat(1000);
    std::fs::write("/tmp/host-lab.batch", batch)?;
    ip("-batch /tmp/host-lab.batch");
    checks.that("lost events are reported", monitor.hints()? == [Hint::All], ());
    ip("link set dev lo mtu 65535");
    let seen = monitor_saw(&mut monitor, |hint| matches!(hint, Hint::Changed { index: 1, .. }));
    checks.that("and the next news come again", seen.is_some(), seen);

    let mut times: Vec<_> = (0..100u8)
        .map(|last| {
            let started = Instant::now();
            let result = control.apply(0, &[VfChange::Mac(Some(MacAddress::new([2, 0, 0, 0, 1, last])))]);
            (started.elapsed(), result.is_ok())
        })
        .collect();
    times.sort();
    checks.that("100 changes of the address", times.iter().all(|(_, ok)| *ok), ());
    println!("       median {:?}, 99th percentile {:?}", times.get(50), times.get(98));

    restore(&mut control, 0, &fresh)?;
    let now = control.read(0)?;
    checks.that("the VF's settings are restored", now == fresh, &now);
    let igbvf = PreviousBinding { driver: Some("igbvf".to_owned()), driver_override: None };
    for bdf in [vf_bdf, second] {
        sysfs.restore(bdf, &igbvf)?;
        let bound = sysfs.current_binding(bdf)?;
        checks.that("back at igbvf", bound == igbvf, &bound);
    }
    std::thread::sleep(Duration::from_millis(500));
    println!("       {}\n       {}", vf_line(0), vf_line(1));
    checks.that("igbvf chose an address again", control.read(0)?.mac.is_some(), control.read(0)?.mac);
    checks.that("the administrator's is still there", control.read(1)?.mac == Some(pinned), ());

    checks.error("2 VFs to 3", sysfs.set_num_vfs(pf_bdf, 3, None), |e| {
        matches!(e, VfCountError::NotZero { .. })
    });
    checks.error("8 VFs", sysfs.set_num_vfs(pf_bdf, 8, None), |e| matches!(e, VfCountError::TooMany { .. }));
    sysfs.bind_vfio(vf_bdf)?;
    sysfs.set_num_vfs(pf_bdf, 0, None)?;
    checks.error("restoring a missing VF", sysfs.restore(vf_bdf, &igbvf), |e| {
        matches!(e, BindError::NoDevice(_))
    });
    checks.error("reading a missing VF", control.read(0), |e| matches!(e, PfError::NoVf { .. }));
    sysfs.set_num_vfs(pf_bdf, 3, Some(false))?;
    let drivers: Vec<_> = sysfs.vfs()?.into_iter().map(|vf| vf.device.driver).collect();
    checks.that("3 VFs without drivers", drivers == [None, None, None], &drivers);
    sysfs.bind_vfio(vf_bdf)?;
    sysfs.restore(vf_bdf, &igbvf)?;
    let bound = sysfs.current_binding(vf_bdf)?;
    checks.that("a driver without autoprobe", bound == igbvf, &bound);
    sysfs.restore(vf_bdf, &PreviousBinding::default())?;
    let bound = sysfs.current_binding(vf_bdf)?;
    checks.that("and none again", bound == PreviousBinding::default(), &bound);
    Ok(())
}

/// Waits up to 10 s for a hint.
fn monitor_saw(monitor: &mut Monitor, wanted: impl Fn(&Hint) -> bool) -> Option<Hint> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        let left = Timespec::try_from(deadline - Instant::now()).ok()?;
        poll(&mut [PollFd::new(monitor, PollFlags::IN)], Some(&left)).ok()?;
        if let Some(hint) = monitor.hints().ok()?.into_iter().find(&wanted) {
            return Some(hint);
        }
    }
    None
}
