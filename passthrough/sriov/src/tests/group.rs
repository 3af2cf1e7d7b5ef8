// SPDX-License-Identifier: Apache-2.0

use super::*;

fn check(fake: &FakeSysfs, device: &str, together: &[&str]) -> Result<IommuGroup, ViabilityError> {
    let together: Vec<_> = together.iter().map(|text| bdf(text)).collect();
    fake.sysfs().check_viable(bdf(device), &together)
}

#[test]
fn a_vf_alone_in_its_group_is_viable() {
    let (_dir, fake) = machine(1);
    let group = check(&fake, "0000:01:10.0", &[]).unwrap();
    assert_eq!(group.number, 20);
    assert_eq!(group.members.len(), 1);
}

#[test]
fn a_shared_group_is_viable_when_all_of_it_is_given_or_harmless() {
    let (_dir, fake) = machine(0);
    let error = check(&fake, "0000:05:01.0", &[]).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("IOMMU group 4 of 0000:05:01.0 is not viable: 0000:05:02.0 (e1000) is used"),
        "{text}"
    );
    assert!(text.contains("0000:04:00.0 (pcieport), 0000:05:01.0 (e1000), 0000:05:02.0 (e1000)"), "{text}");
    assert!(text.contains("vfio-pci"), "{text}");
    let ViabilityError::NotViable { blocking, .. } = error else { panic!("{error:?}") };
    assert_eq!(blocking.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(), ["0000:05:02.0"]);

    check(&fake, "0000:05:01.0", &["0000:05:02.0"]).unwrap();

    fake.sysfs().bind_vfio(bdf("0000:05:02.0")).unwrap();
    check(&fake, "0000:05:01.0", &[]).unwrap();
}

#[test]
fn which_drivers_are_in_the_way() {
    for (driver, harmless) in [
        (None, true),
        (Some("vfio-pci"), true),
        (Some("mlx5_vfio_pci"), true),
        (Some("pcieport"), true),
        (Some("pci-stub"), true),
        (Some("e1000e"), false),
        (Some("uio_pci_generic"), false),
    ] {
        let member = GroupMember { name: "0000:05:02.0".to_owned(), driver: driver.map(str::to_owned) };
        assert_eq!(member.is_harmless(), harmless, "{driver:?}");
    }
}

/// Members that are not on PCI count too.
#[test]
fn a_platform_device_is_in_the_way() {
    let (dir, fake) = machine(1);
    let device = dir.path().join("devices/platform/dma0");
    std::fs::create_dir_all(&device).unwrap();
    std::os::unix::fs::symlink("/nowhere/bus/platform/drivers/dw_dmac", device.join("driver")).unwrap();
    std::os::unix::fs::symlink(&device, dir.path().join("kernel/iommu_groups/20/devices/dma0")).unwrap();
    let text = check(&fake, "0000:01:10.0", &[]).unwrap_err().to_string();
    assert!(text.contains("dma0 (dw_dmac)"), "{text}");
}

#[test]
fn without_an_iommu_or_interrupt_remapping() {
    let (dir, fake) = machine(1);
    let error = check(&fake, "0000:00:1f.0", &[]).unwrap_err();
    assert!(matches!(error, ViabilityError::NoIommu(_)));
    assert!(error.to_string().contains("intel_iommu=on"), "{error}");

    fake.set_interrupt_chip("PCI-MSI-0000:00:1f.2");
    assert_eq!(fake.sysfs().interrupt_remapping().unwrap(), InterruptRemapping::Off);
    let error = check(&fake, "0000:01:10.0", &[]).unwrap_err();
    assert!(matches!(error, ViabilityError::InterruptRemappingOff(_)));

    let parameters = dir.path().join("module/vfio_iommu_type1/parameters");
    std::fs::create_dir_all(&parameters).unwrap();
    std::fs::write(parameters.join("allow_unsafe_interrupts"), "Y\n").unwrap();
    check(&fake, "0000:01:10.0", &[]).unwrap();
    std::fs::write(parameters.join("allow_unsafe_interrupts"), "N\n").unwrap();
    check(&fake, "0000:01:10.0", &[]).unwrap_err();

    fake.set_interrupt_chip("IO-APIC");
    assert_eq!(fake.sysfs().interrupt_remapping().unwrap(), InterruptRemapping::Unknown);
    check(&fake, "0000:01:10.0", &[]).unwrap();
}
