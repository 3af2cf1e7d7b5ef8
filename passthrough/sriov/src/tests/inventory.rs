// SPDX-License-Identifier: Apache-2.0

use super::*;

#[test]
fn a_pf_is_described() {
    let (_dir, fake) = machine(2);
    let pfs = fake.sysfs().pfs().unwrap();
    assert_eq!(pfs.len(), 1);
    let pf = &pfs[0];
    assert_eq!(pf.device.bdf, bdf("0000:01:00.0"));
    assert_eq!((pf.device.vendor, pf.device.device, pf.device.class), (0x8086, 0x10c9, 0x02_0000));
    assert_eq!(pf.device.driver.as_deref(), Some("igb"));
    assert_eq!((pf.total_vfs, pf.num_vfs, pf.autoprobe), (7, 2, Some(true)));
    assert_eq!((pf.name().as_str(), pf.interface().unwrap().index), ("eth0", 2));
    assert_eq!(pf.interface().unwrap().mac.as_deref(), Some("52:54:00:12:34:56"));
    assert!(pf.is_up());

    fake.set_interface_up(bdf("0000:01:00.0"), "eth0", false);
    let pf = fake.sysfs().pf_by_name("eth0").unwrap();
    assert!(!pf.is_up());
    assert!(!pf.interface().unwrap().admin_up);
}

/// The number is the one in `virtfnN`, which need not follow the order of the addresses.
#[test]
fn the_number_of_a_vf_comes_from_its_pf() {
    let (dir, fake) = machine(2);
    let pf = dir.path().join("bus/pci/devices/0000:01:00.0");
    std::fs::rename(pf.join("virtfn0"), pf.join("swap")).unwrap();
    std::fs::rename(pf.join("virtfn1"), pf.join("virtfn0")).unwrap();
    std::fs::rename(pf.join("swap"), pf.join("virtfn1")).unwrap();
    let sysfs = fake.sysfs();
    let vf = sysfs.vf(bdf("0000:01:10.0")).unwrap();
    assert_eq!((vf.index, vf.pf), (1, bdf("0000:01:00.0")));
    let numbers: Vec<_> =
        sysfs.vfs_of(bdf("0000:01:00.0")).unwrap().iter().map(|vf| (vf.index, vf.device.bdf)).collect();
    assert_eq!(numbers, [(0, bdf("0000:01:10.2")), (1, bdf("0000:01:10.0"))]);

    std::fs::remove_file(pf.join("virtfn1")).unwrap();
    assert!(matches!(sysfs.vf(bdf("0000:01:10.0")), Err(InventoryError::Orphan { .. })));
    assert_eq!(sysfs.vfs().unwrap().len(), 1);
}

#[test]
fn ten_and_more_vfs_are_sorted_by_number() {
    let (_dir, fake) = machine(7);
    let numbers: Vec<_> =
        fake.sysfs().vfs_of(bdf("0000:01:00.0")).unwrap().iter().map(|vf| vf.index).collect();
    assert_eq!(numbers, (0..7).collect::<Vec<_>>());
}

#[test]
fn other_devices_are_told_apart() {
    let (_dir, fake) = machine(1);
    let sysfs = fake.sysfs();
    let nvme = sysfs.device(bdf("0000:02:00.0")).unwrap();
    assert_eq!((nvme.driver.as_deref(), nvme.iommu_group, nvme.is_network()), (Some("nvme"), Some(2), false));
    assert!(matches!(sysfs.pf(bdf("0000:02:00.0")), Err(InventoryError::NotPf(_))));
    assert!(matches!(sysfs.vf(bdf("0000:02:00.0")), Err(InventoryError::NotVf(_))));
    for check in [
        sysfs.device(bdf("0000:09:00.0")).err(),
        sysfs.pf(bdf("0000:09:00.0")).err(),
        sysfs.vf(bdf("0000:09:00.0")).err(),
    ] {
        assert!(matches!(check, Some(InventoryError::NoDevice(_))), "{check:?}");
    }
    assert!(matches!(sysfs.pf_by_name("eth7"), Err(InventoryError::NoSuchInterface(_))));
    assert_eq!(sysfs.pf_by_name("0000:01:00.0").unwrap().name(), "eth0");
}

/// Switchdev adapters have their VFs' representors below the PF too.
#[test]
fn representors_are_no_interfaces_of_a_pf() {
    let (dir, fake) = machine(0);
    let net = dir.path().join("bus/pci/devices/0000:01:00.0/net");
    for (name, port) in [("a0", "pf0vf0\n"), ("b0", "p0\n")] {
        std::fs::create_dir(net.join(name)).unwrap();
        for (attribute, value) in [("ifindex", "9\n"), ("flags", "0x1003\n"), ("phys_port_name", port)] {
            std::fs::write(net.join(name).join(attribute), value).unwrap();
        }
    }
    let pf = fake.sysfs().pf(bdf("0000:01:00.0")).unwrap();
    assert_eq!(pf.interfaces.iter().map(|i| i.name.as_str()).collect::<Vec<_>>(), ["b0", "eth0"]);
}

#[test]
fn the_number_of_vfs_changes_from_and_to_none() {
    let (_dir, fake) = machine(0);
    let (sysfs, pf) = (fake.sysfs(), bdf("0000:01:00.0"));
    sysfs.set_num_vfs(pf, 3, Some(false)).unwrap();
    assert_eq!(sysfs.vfs().unwrap().len(), 3);
    assert_eq!(sysfs.vf(bdf("0000:01:10.0")).unwrap().device.driver, None, "autoprobe was switched off");
    assert!(matches!(sysfs.set_num_vfs(pf, 2, None), Err(VfCountError::NotZero { current: 3, .. })));
    sysfs.set_num_vfs(pf, 3, None).unwrap();
    sysfs.set_num_vfs(pf, 0, None).unwrap();
    assert_eq!(sysfs.vfs().unwrap().len(), 0);
    sysfs.set_num_vfs(pf, 1, Some(true)).unwrap();
    assert_eq!(sysfs.vf(bdf("0000:01:10.0")).unwrap().device.driver.as_deref(), Some("igbvf"));
}

#[test]
fn a_number_of_vfs_that_cannot_be() {
    let (_dir, fake) = machine(0);
    let (sysfs, pf) = (fake.sysfs(), bdf("0000:01:00.0"));
    let text = sysfs.set_num_vfs(pf, 8, None).unwrap_err().to_string();
    assert!(text.contains("at most 7 VFs, not 8"), "{text}");
    assert!(fake.take_writes().is_empty());

    type Expected = fn(&VfCountError) -> bool;
    let answers: [(i32, Expected); 4] = [
        (libc::EBUSY, |e| matches!(e, VfCountError::Busy(_))),
        (libc::ENOENT, |e| matches!(e, VfCountError::Unsupported { .. })),
        (libc::ERANGE, |e| matches!(e, VfCountError::TooMany { .. })),
        (libc::ENOMEM, |e| matches!(e, VfCountError::Sysfs(_))),
    ];
    for (number, expected) in answers {
        fake.fail_next("sriov_numvfs", number);
        let error = sysfs.set_num_vfs(pf, 1, None).unwrap_err();
        assert!(expected(&error), "{number}: {error:?}");
    }
    std::fs::remove_file(sysfs.device_dir(pf).join("driver")).unwrap();
    assert!(matches!(sysfs.set_num_vfs(pf, 1, None), Err(VfCountError::NoDriver(_))));
}

#[test]
fn a_function_has_the_node_that_the_kernel_knows() {
    let (_dir, fake) = machine(1);
    let (sysfs, vf) = (fake.sysfs(), bdf("0000:01:10.0"));
    assert_eq!(sysfs.numa_node(vf).unwrap(), None, "a kernel without NUMA");
    for (number, node) in [(-1, None), (0, Some(0)), (1023, Some(1023))] {
        fake.set_numa_node(vf, number);
        assert_eq!(sysfs.numa_node(vf).unwrap(), node);
    }
    fake.set_numa_node(vf, -7);
    assert!(sysfs.numa_node(vf).is_err());
}
