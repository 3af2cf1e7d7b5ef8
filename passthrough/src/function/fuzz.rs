// SPDX-License-Identifier: Apache-2.0

//! Bodies of fuzz targets, which take any bytes and assert laws. Property tests run them too.
#![allow(clippy::panic, reason = "a broken law is to end the fuzzer")]

use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use devices::{
    interrupt::{MsiMessage, MsiRouter, RouteId},
    memory::{GuestMapper, HostMemory, MappingId},
    pci::{PciFunction, config},
};
use vmm_sys_util::eventfd::EventFd;

use super::{AssignedFunction, BarHandler, FunctionError, HardwareAccess, TrappedRange};
use crate::hardware::{BarInfo, IrqKind, VfHardware};

/// Ranges for BARs.
const WINDOWS: [Range<u64>; 2] = [0xc000_0000..0xe000_0000, 0x40_0000_0000..0x80_0000_0000];
const PAGE: u64 = 0x1000;
/// BAR `n` is at this "host address" times n + 1, above every size of a BAR.
const HOST: u64 = 1 << 40;
/// The relay's range of BAR 0.
const MAILBOX: Range<u64> = 0..PAGE;
/// Longer than any step takes.
const PATIENCE: Duration = Duration::from_secs(5);

/// Capabilities of [`Hardware::new`].
const MSI: u16 = 0x50;
const MSIX: u16 = 0x70;
const EXPRESS: u16 = 0xa0;
const SRIOV: Range<u16> = 0x160..0x1a0;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A function made of memory that checks for forbidden writes.
struct Hardware {
    config: Vec<u8>,
    bars: [BarInfo; 6],
    vectors: u32,
    /// Bytes of BARs and of configuration space that the guest must not write.
    guarded: Vec<(usize, Range<u64>)>,
    guarded_config: Vec<Range<u16>>,
}

impl Hardware {
    /// A VF like an 82576's: registers in BAR 0, MSI-X in BAR 3 among other things, a small BAR 5, and both visible and
    /// hidden capabilities.
    fn new() -> Self {
        let wide = BarInfo { size: 0x4000, is_64bit: true, mappable: true, ..BarInfo::default() };
        let mut bars = [BarInfo::default(); 6];
        (bars[0], bars[3]) = (wide, wide);
        bars[2] = BarInfo { size: 0x20, io: true, ..BarInfo::default() };
        bars[5] = BarInfo { size: 0x100, ..BarInfo::default() };
        let mut config = vec![0; 4096];
        let mut put =
            |offset: u16, bytes: &[u8]| config[usize::from(offset)..][..bytes.len()].copy_from_slice(bytes);
        put(0, &[0x86, 0x80, 0xca, 0x10]);
        put(4, &[0, 0, 0x10, 0]);
        put(0x34, &[0x40]);
        put(0x40, &[0x01, 0x50, 0x03, 0xfa]);
        put(MSI, &[0x05, 0x68, 0x86, 0x01]);
        put(0x68, &[0x06, 0x70, 0x55, 0x55]);
        put(MSIX, &[0x11, 0xa0, 2, 0, 3, 0, 0, 0, 3, 0x20, 0, 0]);
        put(EXPRESS, &[0x10, 0, 2, 0, 0, 0, 0, 0x10]);
        put(0x100, &0x1401_0001_u32.to_le_bytes());
        put(0x140, &0x1601_0003_u32.to_le_bytes());
        put(SRIOV.start, &0x0001_0010_u32.to_le_bytes());
        Hardware {
            config,
            bars,
            vectors: 3,
            // The mailbox; the table and the pending bits of MSI-X.
            guarded: vec![(0, MAILBOX), (3, 0..0x30), (3, 0x2000..0x2008)],
            guarded_config: vec![0x10..0x28, MSI + 1..MSI + 0x18, MSIX + 1..MSIX + 4, SRIOV],
        }
    }
}

impl VfHardware for Hardware {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let offset = usize::from(offset);
        data.copy_from_slice(&self.config[offset..offset + data.len()]);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        let end = offset + u16::try_from(data.len()).unwrap_or(u16::MAX);
        for guarded in &self.guarded_config {
            assert!(
                end <= guarded.start || guarded.end <= offset,
                "{offset:#x} of configuration space written"
            );
        }
    }
    fn bar(&self, index: usize) -> BarInfo {
        self.bars[index]
    }
    fn bar_read(&self, index: usize, offset: u64, data: &mut [u8]) {
        assert!(offset + data.len() as u64 <= self.bars[index].size, "outside of BAR {index}");
        data.fill(0x5a);
    }
    fn bar_write(&self, index: usize, offset: u64, data: &[u8]) {
        let end = offset + data.len() as u64;
        assert!(end <= self.bars[index].size, "outside of BAR {index}");
        for (bar, guarded) in &self.guarded {
            let apart = *bar != index || end <= guarded.start || guarded.end <= offset;
            assert!(apart, "{offset:#x} of BAR {index} written");
        }
    }
    fn map_bar(&self, index: usize, offset: u64, len: u64) -> io::Result<Arc<dyn HostMemory>> {
        let end = offset.checked_add(len);
        assert!(self.bars[index].mappable && end.is_some_and(|end| end <= self.bars[index].size));
        assert!(len > 0 && offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE), "{offset:#x} {len:#x}");
        Ok(Arc::new(Piece { address: HOST * (index as u64 + 1) + offset, len }))
    }
    fn irq_count(&self, kind: IrqKind) -> u32 {
        match kind {
            IrqKind::Msi => 8,
            IrqKind::Msix => self.vectors,
        }
    }
    fn enable_irqs(&self, kind: IrqKind, triggers: &[EventFd]) -> io::Result<()> {
        assert!(triggers.len() <= self.irq_count(kind) as usize, "{} of {kind:?}", triggers.len());
        Ok(())
    }
    fn disable_irqs(&self, _: IrqKind) -> io::Result<()> {
        Ok(())
    }
    fn reset(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Not memory: an address that is never accessed here.
struct Piece {
    address: u64,
    len: u64,
}

// SAFETY: not upheld, and not needed: `Mapper` only looks at the numbers.
unsafe impl HostMemory for Piece {
    fn address(&self) -> u64 {
        self.address
    }
    fn len(&self) -> u64 {
        self.len
    }
}

/// A window: its guest-physical address, and its host address range.
type Window = (u64, Range<u64>);

/// Windows, and the last id.
#[derive(Default)]
struct Mapper(Mutex<(u32, BTreeMap<MappingId, Window>)>);

impl Mapper {
    fn windows(&self) -> Vec<Window> {
        lock(&self.0).1.values().cloned().collect()
    }
}

impl GuestMapper for Mapper {
    fn map(&self, gpa: u64, memory: Arc<dyn HostMemory>) -> io::Result<MappingId> {
        let mut state = lock(&self.0);
        let end = gpa + memory.len();
        if state.1.values().any(|(old, host)| *old < end && gpa < old + (host.end - host.start)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        state.0 += 1;
        let id = MappingId(state.0);
        state.1.insert(id, (gpa, memory.address()..memory.address() + memory.len()));
        Ok(id)
    }
    fn unmap(&self, id: MappingId) -> io::Result<()> {
        assert!(lock(&self.0).1.remove(&id).is_some(), "unmapped twice");
        Ok(())
    }
    fn forbid(&self, _: u64, _: u64) {}
}

#[derive(Default)]
struct Router(Mutex<BTreeMap<RouteId, bool>>);

impl MsiRouter for Router {
    fn allocate(&self) -> io::Result<RouteId> {
        let mut routes = lock(&self.0);
        let id = RouteId(u32::try_from(routes.len()).unwrap_or(u32::MAX));
        routes.insert(id, false);
        Ok(id)
    }
    fn connect(&self, route: RouteId, _: &EventFd, _: MsiMessage) -> io::Result<()> {
        assert!(lock(&self.0).insert(route, true).is_some(), "a route that was not allocated");
        Ok(())
    }
    fn disconnect(&self, route: RouteId, _: &EventFd) -> io::Result<()> {
        assert!(lock(&self.0).insert(route, false).is_some(), "a route that was not allocated");
        Ok(())
    }
    fn release(&self, route: RouteId) {
        assert_eq!(lock(&self.0).remove(&route), Some(false), "released while connected");
    }
}

/// The relay's page, which gets only its own accesses.
struct Page;

impl BarHandler for Page {
    fn read(&self, offset: u64, data: &mut [u8]) {
        assert!(offset + data.len() as u64 <= MAILBOX.end);
        data.fill(0);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        assert!(offset + data.len() as u64 <= MAILBOX.end);
    }
}

struct Bench {
    function: AssignedFunction,
    mapper: Arc<Mapper>,
}

impl Bench {
    fn new(hardware: Hardware, traps: &[TrappedRange]) -> Result<Self, FunctionError> {
        let (mapper, router) = (Arc::new(Mapper::default()), Arc::new(Router::default()));
        let access = HardwareAccess::new(Arc::new(hardware));
        let function = AssignedFunction::new(
            "fuzz",
            access,
            Arc::from(WINDOWS),
            traps,
            mapper.clone(),
            router,
            &crate::threads::ThreadStart::default(),
        )?;
        Ok(Bench { function, mapper })
    }

    fn read(&self, offset: u16, len: usize) -> u32 {
        let mut data = [0; 4];
        self.function.config_read(offset, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    /// Asserts that every window belongs to a BAR at the address in the registers, while memory is enabled, and to no
    /// trapped range.
    fn check_windows(&self, bars: &[BarInfo; 6], trapped: &[(usize, Range<u64>)]) {
        let windows = self.mapper.windows();
        assert!(
            windows.is_empty() || self.read(config::COMMAND, 2) & 2 != 0,
            "windows without memory enable"
        );
        for (gpa, host) in windows {
            let (bar, len) = (host.start / HOST - 1, host.end - host.start);
            let (index, offset) = (usize::try_from(bar).unwrap_or(6), host.start % HOST);
            assert!(WINDOWS.iter().any(|window| window.start <= gpa && gpa + len <= window.end));
            for (bar, range) in trapped {
                let pages = range.start / PAGE * PAGE..range.end.div_ceil(PAGE) * PAGE;
                let apart = *bar != index || offset + len <= pages.start || pages.end <= offset;
                assert!(apart, "{range:#x?} of BAR {bar} is mapped");
            }
            let register = config::BAR0 + u16::try_from(index).unwrap_or(0) * 4;
            let low = u64::from(self.read(register, 4) & !0xf);
            let high = if bars[index].is_64bit { u64::from(self.read(register + 4, 4)) } else { 0 };
            assert_eq!(gpa, (high << 32 | low) + offset, "a window that is not where BAR {index} is");
        }
    }
}

/// A guest's accesses to configuration space and BARs. Whatever the guest writes, no trapped range is mapped, and no
/// forbidden write reaches the hardware.
pub fn fuzz_accesses(data: &[u8]) {
    let hardware = Hardware::new();
    let (bars, guarded) = (hardware.bars, hardware.guarded.clone());
    let traps = [TrappedRange { bar: 0, range: MAILBOX, handler: Arc::new(Page) }];
    let bench = match Bench::new(hardware, &traps) {
        Ok(bench) => bench,
        Err(error) => panic!("{error}"),
    };
    for (bar, address) in [(0, WINDOWS[0].start), (3, WINDOWS[1].start), (5, WINDOWS[0].start + 0x10_0000)] {
        if let Err(error) = bench.function.assign_bar(bar, address) {
            panic!("{error}");
        }
    }
    // Each step is checked against all windows. More steps would find no more.
    for step in data.chunks_exact(8).take(512) {
        let [kind, low, high, size, v0, v1, v2, v3] = *step else { return };
        let value = u32::from_le_bytes([v0, v1, v2, v3]);
        let len = 1 << (size % 4);
        match kind % 8 {
            // Mostly effective registers, and addresses close to each other.
            0..=3 => {
                let offset = match low % 4 {
                    0 => config::COMMAND,
                    1 => config::BAR0 + u16::from(high % 6) * 4,
                    2 => MSI + u16::from(high % 0x60),
                    _ => u16::from_le_bytes([low, high]) % 4096,
                };
                let len = len.min(4);
                let offset = offset & !(u16::try_from(len).unwrap_or(4) - 1);
                let near = 0xc000_0000 | (value & 0x0001_f00f);
                let value = if kind >= 128 && low % 4 == 1 { near } else { value };
                // The end of a guest's reset has no fixed time. Kind `6` is a reset that is waited for.
                let value = if (EXPRESS + 8..EXPRESS + 12).contains(&(offset & !3)) { 0 } else { value };
                bench.function.config_write(offset, &value.to_le_bytes()[..len]);
                bench.read(offset, len);
            }
            4 | 5 => {
                let gpa = match high % 4 {
                    0 => WINDOWS[0].start + u64::from(value & 0x1_ffff),
                    1 => WINDOWS[1].start + u64::from(value & 0x7fff),
                    _ => u64::from(value) << (low % 32),
                };
                let mut bytes = [v0, v1, v2, v3, v3, v2, v1, v0];
                let hit = bench.function.mmio_write(gpa, &bytes[..len]);
                assert_eq!(bench.function.mmio_read(gpa, &mut bytes[..len]), hit, "read and written alike");
            }
            6 if low < 16 => {
                if let Err(error) = bench.function.reset_and_wait(PATIENCE) {
                    panic!("{error}");
                }
                assert_eq!(bench.read(config::COMMAND, 2) & 7, 0, "reset");
            }
            _ => {}
        }
        bench.check_windows(&bars, &guarded);
    }
    bench.function.lose();
    assert_eq!((bench.mapper.windows().len(), bench.read(0, 4)), (0, u32::MAX), "lost");
}

/// Hardware with any capability lists in its configuration space: the guest's view of them ends, and trapped ranges
/// stay trapped.
pub fn fuzz_capabilities(data: &[u8]) {
    let mut hardware = Hardware::new();
    hardware.guarded_config.clear();
    hardware.guarded.clear();
    let Some((&[vectors, kinds, sizes], patches)) = data.split_first_chunk() else { return };
    hardware.vectors = u32::from(vectors);
    for (index, bar) in hardware.bars.iter_mut().enumerate() {
        // The lists cannot see the sizes, so one for all is enough.
        let size = 0x10 << (sizes % 20);
        if kinds >> index & 1 != 0 {
            *bar = BarInfo { size, mappable: size >= PAGE, ..BarInfo::default() };
        }
    }
    for patch in patches.chunks_exact(6) {
        let [low, high, value @ ..] = patch else { return };
        // Mostly the first 256 bytes.
        let offset = if high % 4 == 0 { u16::from_le_bytes([*low, high / 4]) } else { u16::from(*low) };
        let offset = usize::from((offset % 4096) & !3);
        hardware.config[offset..offset + 4].copy_from_slice(value);
    }
    let bars = hardware.bars;
    let Ok(bench) = Bench::new(hardware, &[]) else { return };
    // Walk the list as a guest's driver does.
    let (mut at, mut seen) = (bench.read(0x34, 1) & 0xfc, 0);
    let mut msix = None;
    while at != 0 {
        assert!((0x40..0x100).contains(&at), "a capability at {at:#x}");
        seen += 1;
        assert!(seen <= 48, "a list without end");
        let offset = u16::try_from(at).unwrap_or(0);
        if bench.read(offset, 1) == 0x11 {
            msix = Some(offset);
        }
        at = bench.read(offset + 1, 1) & 0xfc;
    }
    let (mut at, mut seen) = (0x100, 0);
    while at != 0 {
        assert!((0x100..0x1000).contains(&at), "an extended capability at {at:#x}");
        seen += 1;
        assert!(seen <= 480, "an extended list without end");
        let header = bench.read(u16::try_from(at).unwrap_or(0), 4);
        assert!(!matches!(header & 0xffff, 0xe | 0xf | 0x10 | 0x13 | 0x15 | 0x1b), "{header:#x} is shown");
        at = header >> 20 & 0xffc;
    }
    let mut trapped = Vec::new();
    if let Some(offset) = msix {
        let count = u64::from(bench.read(offset + 2, 2) & 0x7ff) + 1;
        let place = |at: u16, len: u64| {
            let value = bench.read(offset + at, 4);
            let (bar, start) = ((value & 7) as usize, u64::from(value & !7));
            let inside = bars.get(bar).is_some_and(|info| !info.io && start + len <= info.size);
            assert!(inside, "MSI-X at {start:#x} of BAR {bar}");
            (bar, start..start + len)
        };
        trapped.extend([place(4, count * 16), place(8, count.div_ceil(64) * 8)]);
    }
    for (n, (bar, _)) in bench.function.bars().into_iter().enumerate() {
        // Below 16 MiB each.
        let _ = bench.function.assign_bar(bar, WINDOWS[0].start + n as u64 * 0x100_0000);
    }
    bench.function.config_write(config::COMMAND, &2_u16.to_le_bytes());
    bench.check_windows(&bars, &trapped);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seeds(target: &str) -> Vec<Vec<u8>> {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target);
        std::fs::read_dir(dir).unwrap().map(|entry| std::fs::read(entry.unwrap().path()).unwrap()).collect()
    }

    #[test]
    fn the_seeds_hold() {
        let (accesses, capabilities) = (seeds("function_accesses"), seeds("function_capabilities"));
        assert!(!accesses.is_empty() && !capabilities.is_empty());
        accesses.iter().for_each(|seed| fuzz_accesses(seed));
        capabilities.iter().for_each(|seed| fuzz_capabilities(seed));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_bodies_hold(data in prop::collection::vec(any::<u8>(), 0..600)) {
            fuzz_accesses(&data);
            fuzz_capabilities(&data);
        }
    }
}
