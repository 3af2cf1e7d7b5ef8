// SPDX-License-Identifier: Apache-2.0

//! Tests with a real device: `PORTCULLIS_TEST_VF` names the sysfs directory of a VF that is bound to
//! vfio-pci.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use devices::{
    interrupt::{MsiMessage, MsiRouter, RouteId},
    memory::{GuestMapper, HostMemory, MappingId},
    pci::{PciFunction, config},
};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{Container, Error};
use crate::{
    function::{AssignedFunction, HardwareAccess},
    hardware::{IrqKind, VfHardware},
    threads::ThreadStart,
};

const BAR0: u64 = 0xc000_0000;
const BAR3: u64 = 0xc001_0000;

type Window = (u64, Arc<dyn HostMemory>);

#[derive(Default)]
struct Windows(Mutex<Vec<Option<Window>>>);

impl Windows {
    fn count(&self) -> usize {
        self.0.lock().unwrap().iter().flatten().count()
    }
}

impl GuestMapper for Windows {
    fn map(&self, gpa: u64, memory: Arc<dyn HostMemory>) -> io::Result<MappingId> {
        let mut windows = self.0.lock().unwrap();
        windows.push(Some((gpa, memory)));
        Ok(MappingId(u32::try_from(windows.len() - 1).unwrap()))
    }
    fn unmap(&self, id: MappingId) -> io::Result<()> {
        self.0.lock().unwrap()[id.0 as usize].take().unwrap();
        Ok(())
    }
    fn forbid(&self, _start: u64, _len: u64) {}
}

struct NoRoutes;

impl MsiRouter for NoRoutes {
    fn allocate(&self) -> io::Result<RouteId> {
        Err(io::ErrorKind::OutOfMemory.into())
    }
    fn connect(&self, _: RouteId, _: &EventFd, _: MsiMessage) -> io::Result<()> {
        Ok(())
    }
    fn disconnect(&self, _: RouteId, _: &EventFd) -> io::Result<()> {
        Ok(())
    }
    fn release(&self, _: RouteId) {}
}

fn device() -> PathBuf {
    PathBuf::from(std::env::var_os("PORTCULLIS_TEST_VF").expect("PORTCULLIS_TEST_VF is not set"))
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap()
}

/// One test, because a group can be open only once.
#[test]
#[ignore = "needs a VF bound to vfio-pci"]
fn a_real_vf_is_opened_mapped_reset_and_let_go() {
    let container = Container::new(None).unwrap();
    let vf = container.open(&device()).unwrap();
    assert!(matches!(Container::new(None).unwrap().open(&device()), Err(Error::GroupBusy { .. })));
    container.map_memory(&memory()).unwrap();
    assert!(vf.request_event().unwrap().is_some());
    let _ = vf.error_event().unwrap();
    println!("BARs {:x?}", std::array::from_fn::<_, 6, _>(|bar| vf.bar(bar)));
    assert_eq!((vf.bar(0).size, vf.bar(0).mappable, vf.irq_count(IrqKind::Msix)), (0x4000, true, 3));

    let before = vf.failures();
    let mut data = [0; 4];
    vf.bar_read(0, 0x4000, &mut data);
    assert_eq!((data, vf.failures()), ([0xff; 4], before + 1), "outside of the BAR");
    vf.bar_read(0, 0x8, &mut data);
    assert_ne!(data, [0xff; 4], "STATUS");
    let outside = |offset, len| vf.map_bar(0, offset, len).err().map(|error| error.kind());
    assert_eq!(outside(0x800, 0x1000), Some(io::ErrorKind::InvalidInput));
    assert_eq!(outside(0x3000, 0x2000), Some(io::ErrorKind::InvalidInput));
    assert_eq!(vf.map_bar(1, 0, 0x1000).err().map(|e| e.kind()), Some(io::ErrorKind::Unsupported));

    let windows = Arc::new(Windows::default());
    let pci: Arc<[std::ops::Range<u64>]> = std::iter::once(0xc000_0000..0xd000_0000).collect();
    let access = HardwareAccess::new(Arc::new(vf));
    let function = AssignedFunction::new(
        "vf",
        access,
        pci,
        &[],
        windows.clone(),
        Arc::new(NoRoutes),
        &ThreadStart::default(),
    )
    .unwrap();
    function.assign_bar(0, BAR0).unwrap();
    function.assign_bar(3, BAR3).unwrap();
    let read = |offset, len: usize| {
        let mut data = [0; 4];
        function.config_read(offset, &mut data[..len]);
        u32::from_le_bytes(data)
    };
    assert_eq!(read(0, 4) & 0xffff, 0x8086, "the vendor, which a VF itself does not tell");
    let mut next = read(0x34, 1);
    let mut found = Vec::new();
    while next != 0 && found.len() < 48 {
        let at = u16::try_from(next).unwrap();
        found.push((at, read(at, 1)));
        next = read(at + 1, 1);
    }
    println!("capabilities {found:x?}");
    let msix = found.iter().find(|(_, id)| *id == 0x11).expect("MSI-X").0;
    let express = found.iter().find(|(_, id)| *id == 0x10).expect("PCI Express").0;

    function.config_write(config::COMMAND, &[6, 0]);
    assert!(windows.count() >= 2, "BAR 0 whole, and BAR 3 without table and pending bits");
    function.config_write(msix + 2, &[0, 0x80]);
    assert_eq!(read(msix + 2, 2), 0x8002);

    let start = Instant::now();
    function.config_write(express + 8, &[0, 0x80]);
    let call = start.elapsed();
    while read(0, 4) == u32::MAX {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("FLR: the vCPU's call took {call:?}, the reset {:?}", start.elapsed());
    assert!(call < Duration::from_millis(50) && start.elapsed() > Duration::from_millis(90));
    assert_eq!((windows.count(), read(4, 2), read(msix + 2, 2)), (0, 0, 2));

    function.reset_and_wait(Duration::from_secs(20)).unwrap();
    function.config_write(config::COMMAND, &[6, 0]);
    assert!(windows.count() >= 2);
    let mut status = [0xff; 4];
    assert!(function.mmio_read(BAR0 + 8, &mut status));
    assert_ne!(status, [0xff; 4]);
    function.shutdown();
    assert_eq!(windows.count(), 0);
    let open =
        std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    let open: Vec<_> = open.filter(|link| link.to_string_lossy().contains("vfio-device")).collect();
    assert!(open.is_empty(), "still open: {open:?}");
}

/// Run it without CAP_IPC_LOCK and with a small RLIMIT_MEMLOCK.
#[test]
#[ignore = "needs a VF bound to vfio-pci, and a memory lock limit below 32 MiB"]
fn a_small_memory_lock_limit_is_named() {
    let container = Container::new(None).unwrap();
    let _vf = container.open(&device()).unwrap();
    let error = container.map_memory(&memory()).unwrap_err();
    println!("{error}");
    assert!(matches!(error, Error::Memlock { needed: 0x200_0000, .. }), "{error:?}");
}
