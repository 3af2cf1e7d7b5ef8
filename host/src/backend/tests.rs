// SPDX-License-Identifier: Apache-2.0

use api::ProblemCode;
use simnic::{pf_bdf, vf_bdf};
use sriov::{VFIO_PCI, fake::FakeSysfs};
use store::{MemoryStore, Stores};

use super::*;
use crate::sim::{Simulated, Start};

const PF: Bdf = Bdf::new(0, 1, 0, 0).unwrap();
const VF: Bdf = Bdf::new(0, 1, 0x10, 0).unwrap();

/// A host's sysfs and both backends of an agent. The simulated PF sim0 has no process.
struct Both {
    sysfs: FakeSysfs,
    backends: Backends,
    _dir: tempfile::TempDir,
}

impl Both {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sysfs = FakeSysfs::new(dir.path().join("sys"));
        sysfs.add_igb(PF, "eth0");
        sysfs.sysfs().set_num_vfs(PF, 2, None).unwrap();
        let store = Stores::on_one_host(Arc::new(MemoryStore::default()));
        let start = Start::new(dir.path(), None, Vec::new());
        let simulated = Simulated::load(&store, &["sim0=2".parse().unwrap()], start).await.unwrap();
        let mut backends = Backends::default();
        backends.add(Hardware::new(sysfs.sysfs()));
        backends.add(Simulation::new(simulated));
        Self { sysfs, backends, _dir: dir }
    }

    fn of(&self, bdf: Bdf) -> Arc<dyn FunctionBackend> {
        Arc::clone(self.backends.of(bdf).unwrap())
    }

    fn driver(&self, bdf: Bdf) -> Option<String> {
        self.sysfs.sysfs().device(bdf).unwrap().driver
    }
}

#[tokio::test]
async fn an_address_has_one_backend_or_none() {
    let both = Both::new().await;
    for (address, simulated) in [
        ("0000:01:10.0", Some(false)),
        ("ffff:ff:1f.7", Some(false)),
        ("10000:e1:00.0", Some(false)),
        ("7fffffff:00:00.0", Some(false)),
        ("80000000:00:00.0", None),
        ("f519ffff:01:00.0", None),
        ("f51a0000:01:00.0", Some(true)),
        ("f51a00ff:ff:1f.7", Some(true)),
        ("f51a0100:01:00.0", None),
        ("ffffffff:ff:1f.7", None),
    ] {
        let bdf: Bdf = address.parse().unwrap();
        let owners = both.backends.usable().filter(|backend| backend.owns(bdf)).count();
        assert_eq!(owners, usize::from(simulated.is_some()), "{address}");
        match both.backends.of(bdf) {
            Ok(backend) => assert_eq!(Some(backend.facts().shown_as_simulated), simulated, "{address}"),
            Err(error) => {
                assert!(simulated.is_none(), "{address}");
                assert!(matches!(error, InventoryError::NoDevice(no) if no == bdf), "{error}");
            }
        }
    }
}

#[tokio::test]
async fn an_agent_without_root_still_describes_functions_of_backends_that_need_it() {
    let mut both = Both::new().await;
    let usable = |both: &Both| both.backends.usable().flat_map(|b| b.pfs().unwrap()).count();
    assert_eq!((usable(&both), both.backends.is_complete(), both.backends.leaves_out(VF)), (2, true, false));
    both.backends.leave_out_those_of_root();
    assert_eq!((usable(&both), both.backends.is_complete(), both.backends.leaves_out(VF)), (1, false, true));
    assert!(!both.backends.leaves_out(vf_bdf(0, 0).unwrap()));
    assert!(!both.backends.leaves_out("80000000:00:00.0".parse().unwrap()), "it has no backend at all");
    assert_eq!(both.of(VF).vf(VF).unwrap().pf, PF);
}

#[tokio::test]
async fn the_name_of_a_simulated_pf_stays_its_own() {
    let both = Both::new().await;
    let find = |name: &str| both.backends.pf_by_interface(name);
    assert_eq!((find("eth0").unwrap(), find("sim0").unwrap()), (PF, pf_bdf(0).unwrap()));
    both.sysfs.rename_interface(PF, "eth0", "sim0");
    assert_eq!(find("sim0").unwrap(), pf_bdf(0).unwrap());
    assert!(matches!(find("eth0"), Err(InventoryError::NoSuchInterface(name)) if name == "eth0"));
}

#[tokio::test]
async fn the_scrub_of_hardware_leaves_a_vf_with_another_driver_alone() {
    let both = Both::new().await;
    let (backend, sysfs) = (both.of(VF), both.sysfs.sysfs());
    assert_eq!(both.driver(VF).as_deref(), Some("igbvf"));
    assert!(!backend.take_for_scrub(VF).unwrap());
    assert_eq!(both.driver(VF).as_deref(), Some("igbvf"));
    sysfs.restore(VF, &PreviousBinding::default()).unwrap();
    for _ in 0..2 {
        assert!(backend.take_for_scrub(VF).unwrap());
        assert_eq!(both.driver(VF).as_deref(), Some(VFIO_PCI));
    }
    let gone = Bdf::new(0, 9, 0, 0).unwrap();
    assert!(matches!(backend.take_for_scrub(gone), Err(BindError::NoDevice(_))));
}

#[tokio::test]
async fn a_vmm_opens_hardware_by_its_group_alone() {
    let both = Both::new().await;
    let backend = both.of(VF);
    let device = backend.machine_device(VF, Some(7)).unwrap();
    assert_eq!(device.backend, DeviceBackend::Vfio { group: 7 });
    assert!(device.connection.is_none());
    assert_eq!(backend.machine_device(VF, None).unwrap_err().code, ProblemCode::Internal);
}

#[tokio::test]
async fn a_pf_has_as_many_vfs_as_its_backend_allows() {
    let both = Both::new().await;
    for pf in [PF, pf_bdf(0).unwrap()] {
        let backend = both.of(pf);
        let before = backend.pf(pf).unwrap();
        let problem = backend.set_num_vfs(&before, 100).await.unwrap_err();
        assert_eq!(problem.code, ProblemCode::TooManyVfs);
        assert!(problem.detail.contains("100"), "{problem}");
        backend.set_num_vfs(&before, before.num_vfs.into()).await.unwrap();
        assert_eq!(backend.pf(pf).unwrap(), before);
    }
    // Hardware can do without VFs, a simulated PF cannot.
    let (hardware, simulated) = (both.of(PF), both.of(pf_bdf(0).unwrap()));
    hardware.set_num_vfs(&hardware.pf(PF).unwrap(), 0).await.unwrap();
    let sim0 = simulated.pf(pf_bdf(0).unwrap()).unwrap();
    for wrong in [0, 100_000] {
        let problem = simulated.set_num_vfs(&sim0, wrong).await.unwrap_err();
        assert!(problem.detail.contains(&format!("not {wrong}.")), "{problem}");
    }
}

#[tokio::test]
async fn a_simulated_function_needs_no_driver() {
    let both = Both::new().await;
    let (vf, gone) = (vf_bdf(0, 1).unwrap(), vf_bdf(0, 2).unwrap());
    let backend = both.of(vf);
    assert!(backend.has(vf) && !backend.has(gone));
    assert_eq!(backend.binding(vf).unwrap(), PreviousBinding::default());
    assert_eq!(backend.check_viable(vf, &[]).unwrap(), None);
    assert!(backend.take_for_scrub(vf).unwrap());
    backend.bind(vf).unwrap();
    for result in
        [backend.binding(gone).map(drop), backend.bind(gone), backend.take_for_scrub(gone).map(drop)]
    {
        assert!(matches!(result, Err(BindError::NoDevice(_))));
    }
}
