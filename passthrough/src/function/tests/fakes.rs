// SPDX-License-Identifier: Apache-2.0

//! A function made of memory, and a router and a mapper that keep records.

use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use devices::{
    interrupt::{MsiMessage, MsiRouter, RouteId},
    memory::{GuestMapper, HostMemory, MappingId},
};
use vmm_sys_util::eventfd::EventFd;

use crate::hardware::{BarInfo, IrqKind, VfHardware};

pub(super) const VECTORS: u32 = 3;
/// BAR `n` of the fake is at this "host address" times n + 1.
pub(super) const HOST: u64 = 0x1_0000_0000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Call {
    Config(u16, Vec<u8>),
    BarWrite(usize, u64, Vec<u8>),
    Enable(IrqKind, usize),
    Disable(IrqKind),
    /// A reset, with the number of windows at that moment.
    Reset(usize),
}

pub(super) struct Fake {
    pub(super) config: Mutex<Vec<u8>>,
    pub(super) calls: Mutex<Vec<Call>>,
    pub(super) triggers: Mutex<Vec<EventFd>>,
    pub(super) reset_time: Duration,
    pub(super) refuse_reset: Mutex<Option<io::ErrorKind>>,
    pub(super) mapper: Arc<Mapper>,
    pub(super) map_calls: Mutex<Vec<(usize, Range<u64>)>>,
    /// The memory enable bit of the hardware.
    decoding: AtomicBool,
}

/// A VF like an 82576's: 16 KiB of registers in BAR 0, MSI-X in BAR 3 with other things in the same BAR, and a
/// little BAR 5.
pub(super) fn bars() -> [BarInfo; 6] {
    let mut bars = [BarInfo::default(); 6];
    let wide = BarInfo { size: 0x4000, is_64bit: true, mappable: true, ..BarInfo::default() };
    bars[0] = wide;
    bars[3] = wide;
    bars[5] = BarInfo { size: 0x100, ..BarInfo::default() };
    bars[2] = BarInfo { size: 0x20, io: true, ..BarInfo::default() };
    bars
}

pub(super) fn config() -> Vec<u8> {
    let mut config = vec![0; 4096];
    let mut put = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x86, 0x80, 0xca, 0x10]);
    put(4, &[0, 0, 0x10, 0]);
    put(0x0e, &[0x80]);
    put(0x34, &[0x40]);
    put(0x3d, &[1]);
    // Power management with PME and D1; MSI (8 messages, 64-bit, masks); CompactPCI hot swap; MSI-X; Express with FLR;
    // a list that loops back.
    put(0x40, &[0x01, 0x50, 0x03, 0xfa, 0, 0, 0, 0]);
    put(0x50, &[0x05, 0x68, 0x86, 0x01]);
    put(0x68, &[0x06, 0x70, 0x55, 0x55]);
    put(0x70, &[0x11, 0xa0, 2, 0, 3, 0, 0, 0, 3, 0x20, 0, 0]);
    put(0xa0, &[0x10, 0xb0, 2, 0, 0, 0, 0, 0x10]);
    // A second power management, a second Express without FLR: real functions have neither.
    put(0xb0, &[0x01, 0xc0, 0x03, 0xfa, 0, 0, 0, 0]);
    put(0xc0, &[0x10, 0x40, 2, 0, 0, 0, 0, 0]);
    // Error reporting → ARI → serial number → SR-IOV.
    put(0x100, &0x1401_0001u32.to_le_bytes());
    put(0x140, &0x1501_000eu32.to_le_bytes());
    put(0x144, &[0x77; 12]);
    put(0x150, &0x1601_0003u32.to_le_bytes());
    put(0x154, &[0x99; 8]);
    put(0x160, &0x0001_0010u32.to_le_bytes());
    config
}

impl Fake {
    pub(super) fn new(mapper: Arc<Mapper>) -> Self {
        Self {
            config: Mutex::new(config()),
            calls: Mutex::default(),
            triggers: Mutex::default(),
            reset_time: Duration::ZERO,
            refuse_reset: Mutex::default(),
            mapper,
            map_calls: Mutex::default(),
            decoding: AtomicBool::new(false),
        }
    }

    fn call(&self, call: Call) {
        self.calls.lock().unwrap().push(call);
    }

    /// The calls since the last time.
    pub(super) fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

impl VfHardware for Fake {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let offset = usize::from(offset);
        data.copy_from_slice(&self.config.lock().unwrap()[offset..offset + data.len()]);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        if offset == 4 {
            // Windows must go before memory is disabled and come after it is enabled.
            let decoding = self.decoding.swap(data[0] & 2 != 0, Ordering::SeqCst);
            let changed = decoding != (data[0] & 2 != 0);
            assert!(
                !changed || self.mapper.windows().is_empty(),
                "windows of a function that does not decode"
            );
        }
        self.call(Call::Config(offset, data.to_vec()));
    }
    fn bar(&self, index: usize) -> BarInfo {
        bars()[index]
    }
    fn bar_read(&self, index: usize, offset: u64, data: &mut [u8]) {
        assert!(offset + data.len() as u64 <= bars()[index].size);
        data.fill(0x10 + index as u8);
    }
    fn bar_write(&self, index: usize, offset: u64, data: &[u8]) {
        assert!(offset + data.len() as u64 <= bars()[index].size);
        self.call(Call::BarWrite(index, offset, data.to_vec()));
    }
    fn map_bar(&self, index: usize, offset: u64, len: u64) -> io::Result<Arc<dyn HostMemory>> {
        assert!(bars()[index].mappable && offset + len <= bars()[index].size);
        self.map_calls.lock().unwrap().push((index, offset..offset + len));
        Ok(Arc::new(Piece { address: HOST * (index as u64 + 1) + offset, len }))
    }
    fn bar_address(&self, index: usize) -> Option<u64> {
        Some(HOST * (index as u64 + 1))
    }
    fn irq_count(&self, kind: IrqKind) -> u32 {
        match kind {
            IrqKind::Msi => 8,
            IrqKind::Msix => VECTORS,
        }
    }
    fn enable_irqs(&self, kind: IrqKind, triggers: &[EventFd]) -> io::Result<()> {
        *self.triggers.lock().unwrap() = triggers.iter().map(|t| t.try_clone().unwrap()).collect();
        self.call(Call::Enable(kind, triggers.len()));
        Ok(())
    }
    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()> {
        self.call(Call::Disable(kind));
        Ok(())
    }
    fn reset(&self) -> io::Result<()> {
        self.call(Call::Reset(self.mapper.windows().len()));
        std::thread::sleep(self.reset_time);
        self.refuse_reset.lock().unwrap().map_or(Ok(()), |kind| Err(kind.into()))
    }
}

/// Not memory: an address that is never accessed in these tests.
struct Piece {
    address: u64,
    len: u64,
}

// SAFETY: not upheld, and not needed: the fake mapper only looks at the numbers.
unsafe impl HostMemory for Piece {
    fn address(&self) -> u64 {
        self.address
    }
    fn len(&self) -> u64 {
        self.len
    }
}

type Window = (u64, Arc<dyn HostMemory>);

/// Windows by guest-physical address, with their host addresses.
#[derive(Default)]
pub(super) struct Mapper {
    state: Mutex<(u32, BTreeMap<MappingId, Window>)>,
    pub(super) forbidden: Mutex<Vec<Range<u64>>>,
}

impl Mapper {
    /// Guest-physical address, host address, length.
    pub(super) fn windows(&self) -> Vec<(u64, u64, u64)> {
        let state = self.state.lock().unwrap();
        let mut windows: Vec<_> =
            state.1.values().map(|(gpa, memory)| (*gpa, memory.address(), memory.len())).collect();
        windows.sort_unstable();
        windows
    }
}

impl GuestMapper for Mapper {
    fn map(&self, gpa: u64, memory: Arc<dyn HostMemory>) -> io::Result<MappingId> {
        let host = memory.address()..memory.address() + memory.len();
        for forbidden in self.forbidden.lock().unwrap().iter() {
            assert!(host.end <= forbidden.start || forbidden.end <= host.start, "forbidden page mapped");
        }
        let mut state = self.state.lock().unwrap();
        let overlaps =
            |(old, memory): &Window| *old < gpa + (host.end - host.start) && gpa < old + memory.len();
        if state.1.values().any(overlaps) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        state.0 += 1;
        let id = MappingId(state.0);
        state.1.insert(id, (gpa, memory));
        Ok(id)
    }
    fn unmap(&self, id: MappingId) -> io::Result<()> {
        self.state.lock().unwrap().1.remove(&id).expect("unmapped twice");
        Ok(())
    }
    fn forbid(&self, start: u64, len: u64) {
        self.forbidden.lock().unwrap().push(start..start + len);
    }
}

#[derive(Default)]
pub(super) struct Router {
    pub(super) routes: Mutex<BTreeMap<RouteId, Option<MsiMessage>>>,
}

impl Router {
    pub(super) fn connected(&self) -> Vec<u32> {
        self.routes.lock().unwrap().values().flatten().map(|message| message.data).collect()
    }
}

impl MsiRouter for Router {
    fn allocate(&self) -> io::Result<RouteId> {
        let mut routes = self.routes.lock().unwrap();
        let id = RouteId(routes.len() as u32);
        routes.insert(id, None);
        Ok(id)
    }
    fn connect(&self, route: RouteId, _trigger: &EventFd, message: MsiMessage) -> io::Result<()> {
        self.routes.lock().unwrap().insert(route, Some(message));
        Ok(())
    }
    fn disconnect(&self, route: RouteId, _trigger: &EventFd) -> io::Result<()> {
        self.routes.lock().unwrap().insert(route, None);
        Ok(())
    }
    fn release(&self, route: RouteId) {
        assert_eq!(self.routes.lock().unwrap().remove(&route), Some(None), "released while connected");
    }
}
