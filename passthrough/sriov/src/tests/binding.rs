// SPDX-License-Identifier: Apache-2.0

use super::*;

const VF: &str = "0000:01:10.0";

fn binding(fake: &FakeSysfs) -> PreviousBinding {
    fake.sysfs().current_binding(bdf(VF)).unwrap()
}

fn bound(driver: Option<&str>, driver_override: Option<&str>) -> PreviousBinding {
    PreviousBinding { driver: driver.map(str::to_owned), driver_override: driver_override.map(str::to_owned) }
}

#[test]
fn to_vfio_and_back() {
    let (_dir, fake) = machine(1);
    let sysfs = fake.sysfs();
    let before = sysfs.bind_vfio(bdf(VF)).unwrap();
    assert_eq!(before, bound(Some("igbvf"), None));
    assert_eq!(binding(&fake), bound(Some("vfio-pci"), Some("vfio-pci")));
    sysfs.restore(bdf(VF), &before).unwrap();
    assert_eq!(binding(&fake), before);
}

/// If the PF's VFs are not probed, a driver only takes a VF whose override names it.
#[test]
fn back_to_a_driver_where_vfs_are_not_probed() {
    let (_dir, fake) = machine(0);
    let sysfs = fake.sysfs();
    sysfs.set_num_vfs(bdf("0000:01:00.0"), 1, Some(false)).unwrap();
    assert_eq!(sysfs.bind_vfio(bdf(VF)).unwrap(), bound(None, None));
    sysfs.restore(bdf(VF), &bound(Some("igbvf"), None)).unwrap();
    assert_eq!(binding(&fake), bound(Some("igbvf"), None));
    sysfs.restore(bdf(VF), &bound(None, None)).unwrap();
    assert_eq!(binding(&fake), bound(None, None));
}

#[test]
fn what_holds_already_is_left_alone() {
    let (_dir, fake) = machine(1);
    let sysfs = fake.sysfs();
    sysfs.bind_vfio(bdf(VF)).unwrap();
    fake.take_writes();
    assert_eq!(sysfs.bind_vfio(bdf(VF)).unwrap(), bound(Some("vfio-pci"), Some("vfio-pci")));
    sysfs.restore(bdf(VF), &bound(Some("vfio-pci"), Some("vfio-pci"))).unwrap();
    assert_eq!(fake.take_writes(), []);
}

/// A crash may follow every step (here: the next step fails). The whole operation can be repeated, or
/// undone.
#[test]
fn each_step_may_be_the_last() {
    for attribute in ["driver_override", "unbind", "drivers_probe"] {
        let (_dir, fake) = machine(1);
        let sysfs = fake.sysfs();
        let before = sysfs.current_binding(bdf(VF)).unwrap();
        fake.fail_next(attribute, libc::EIO);
        sysfs.bind_vfio(bdf(VF)).unwrap_err();
        sysfs.bind_vfio(bdf(VF)).unwrap();

        fake.fail_next(attribute, libc::EIO);
        sysfs.restore(bdf(VF), &before).unwrap_err();
        sysfs.restore(bdf(VF), &before).unwrap();
        assert_eq!(binding(&fake), before, "{attribute}");

        fake.fail_next(attribute, libc::EIO);
        sysfs.bind_vfio(bdf(VF)).unwrap_err();
        sysfs.restore(bdf(VF), &before).unwrap();
        assert_eq!(binding(&fake), before, "{attribute}, given up");
    }
}

#[test]
fn a_missing_driver_is_noticed_before_anything_changes() {
    let (_dir, fake) = machine(1);
    let sysfs = fake.sysfs();
    fake.unload_driver("vfio-pci");
    let error = sysfs.bind_vfio(bdf(VF)).unwrap_err();
    assert!(error.to_string().contains("modprobe vfio-pci"), "{error}");
    assert_eq!(fake.take_writes(), []);
    assert_eq!(binding(&fake), bound(Some("igbvf"), None));

    fake.load_driver("vfio-pci");
    let before = sysfs.bind_vfio(bdf(VF)).unwrap();
    fake.unload_driver("igbvf");
    let error = sysfs.restore(bdf(VF), &before).unwrap_err();
    assert!(error.to_string().contains("modprobe igbvf"), "{error}");
}

#[test]
fn a_driver_that_does_not_take_the_device() {
    let (_dir, fake) = machine(1);
    fake.fail_next("drivers_probe", libc::EINVAL);
    let error = fake.sysfs().bind_vfio(bdf(VF)).unwrap_err();
    let BindError::NotTaken { has: None, source: Some(source), .. } = &error else { panic!("{error:?}") };
    assert_eq!(source.raw_os_error(), Some(libc::EINVAL));
    assert!(error.to_string().contains("has no driver"), "{error}");
}

/// The kernel asks a function's driver to prepare for its reset, and igbvf can then wait for ever.
#[test]
fn only_a_function_that_no_driver_of_the_host_has_is_reset() {
    let (_dir, fake) = machine(1);
    let sysfs = fake.sysfs();
    let error = sysfs.reset(bdf(VF)).unwrap_err();
    assert!(matches!(&error, BindError::HasDriver { driver, .. } if driver == "igbvf"), "{error:?}");
    assert_eq!(fake.take_writes(), []);
    sysfs.bind_vfio(bdf(VF)).unwrap();
    fake.take_writes();
    sysfs.reset(bdf(VF)).unwrap();
}

#[test]
fn a_device_that_is_gone() {
    let (_dir, fake) = machine(1);
    let sysfs = fake.sysfs();
    let before = sysfs.bind_vfio(bdf(VF)).unwrap();
    sysfs.set_num_vfs(bdf("0000:01:00.0"), 0, None).unwrap();
    assert!(matches!(sysfs.restore(bdf(VF), &before), Err(BindError::NoDevice(_))));
    assert!(matches!(sysfs.bind_vfio(bdf(VF)), Err(BindError::NoDevice(_))));
    assert!(matches!(sysfs.reset(bdf(VF)), Err(BindError::NoDevice(_))));
}
