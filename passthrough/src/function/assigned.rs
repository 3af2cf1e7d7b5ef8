// SPDX-License-Identifier: Apache-2.0

//! The assigned function: the calls of the bus, the vmm and the guest's vCPUs.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use devices::{
    interrupt::MsiRouter,
    memory::GuestMapper,
    pci::{
        DecodedBars, PciFunction,
        bar::{BarError, BarLayout, Bars},
    },
};

use super::{
    FunctionError, FunctionStats, HardwareAccess, ResetError, TrappedRange,
    capabilities::Capabilities,
    counters::Counters,
    hardware_access::Begin,
    layout::{Layout, Target},
    registers::{Effect, Registers},
    thread::{Command, Commands, Worker},
    windows::Windows,
};
use crate::{
    hardware::VfHardware,
    threads::{ThreadKind, ThreadStart},
};

/// State shared by vCPUs and the function's thread.
pub(super) struct Shared {
    name: String,
    access: Arc<HardwareAccess>,
    layout: Layout,
    registers: Mutex<Registers>,
    counters: Counters,
}

impl Shared {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn access(&self) -> &HardwareAccess {
        &self.access
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(super) fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A hardware function, real or simulated, as a PCI function of the guest.
pub struct AssignedFunction {
    shared: Arc<Shared>,
    commands: Commands,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl AssignedFunction {
    /// Puts a function in front of the hardware behind `access`, and starts its thread.
    ///
    /// `name` (the host's PCI address) is for log lines. BARs decode only inside of `windows`, guest-physical ranges
    /// without guest memory. `traps` and the MSI-X ranges never become windows.
    ///
    /// # Errors
    /// [`FunctionError`].
    pub fn new(
        name: &str,
        access: Arc<HardwareAccess>,
        windows: Arc<[Range<u64>]>,
        traps: &[TrappedRange],
        mapper: Arc<dyn GuestMapper>,
        router: Arc<dyn MsiRouter>,
        threads: &ThreadStart,
    ) -> Result<Self, FunctionError> {
        let hardware = access.as_ref();
        let capabilities = Capabilities::scan(hardware)?;
        if capabilities.msi.is_none() && capabilities.msix.is_none() {
            return Err(FunctionError::NoInterrupts);
        }
        // I/O BARs are hidden: a function that needs them in a guest is older than MSI-X.
        let infos =
            std::array::from_fn(|bar| Some(hardware.bar(bar)).filter(|bar| !bar.io).unwrap_or_default());
        let layouts = infos.map(|info: crate::hardware::BarInfo| {
            let layout =
                BarLayout { size: info.size, is_64bit: info.is_64bit, prefetchable: info.prefetchable };
            (info.size > 0).then_some(layout)
        });
        let layout = Layout::new(&infos, capabilities.msix.as_ref(), traps)?;
        for (bar, range) in layout.trapped() {
            if let Some(start) = hardware.bar_address(bar) {
                mapper.forbid(start.saturating_add(range.start), range.end - range.start);
            }
        }
        let mut pieces = Vec::new();
        for (bar, range) in layout.mapped() {
            let memory = hardware
                .map_bar(bar, range.start, range.end - range.start)
                .map_err(|source| FunctionError::MapBar { bar, source })?;
            pieces.push((bar, range.start, memory));
        }
        let bars = Bars::new(layouts, windows)?;
        let registers = Registers::new(hardware, capabilities, bars, Windows::new(mapper, pieces), &router)?;
        let counters = Counters::new(hardware);
        let shared =
            Shared { name: name.to_owned(), access, layout, registers: Mutex::new(registers), counters };
        let shared = Arc::new(shared);
        let (commands, receiver) = mpsc::channel();
        let worker = Worker::new(shared.clone(), receiver);
        let thread = threads
            // The kernel shows 15 bytes of the name.
            .spawn(ThreadKind::Function, format!("fn {name}"), move || worker.run())
            .map_err(FunctionError::Thread)?;
        Ok(Self { shared, commands, thread: Mutex::new(Some(thread)) })
    }

    /// The memory BARs, for the code that assigns their addresses.
    #[must_use]
    pub fn bars(&self) -> Vec<(usize, BarLayout)> {
        self.shared.registers().bars.layouts().collect()
    }

    /// Assigns the address that a BAR has at power-on, before the vCPUs run.
    ///
    /// # Errors
    /// [`BarError`] for an address at which it cannot decode.
    pub fn assign_bar(&self, bar: usize, address: u64) -> Result<(), BarError> {
        self.shared.registers().assign_bar(bar, address)
    }

    /// The access to the hardware, for the relay.
    #[must_use]
    pub fn access(&self) -> Arc<HardwareAccess> {
        self.shared.access.clone()
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> FunctionStats {
        self.shared.counters.snapshot()
    }

    /// Starts a function reset, as the guest's FLR does: BARs and command are 0 afterwards. Returns at once; all
    /// reads are all-ones until the reset ends. Does nothing while one is under way.
    pub fn request_reset(&self) {
        if self.shared.access.begin_reset() == Begin::Begun {
            // Sending fails only after the thread has ended, and then the access is closed for good.
            let _ = self.commands.send(Command::GuestReset);
        }
    }

    /// Resets function and registers to the state at power-on, with the BARs at their assigned addresses, and waits.
    /// Not for vCPU threads. After `Ok`, no DMA of the old boot happens.
    ///
    /// # Errors
    /// [`ResetError`]; guest memory must then not be reused while the function is open.
    pub fn reset_and_wait(&self, timeout: Duration) -> Result<(), ResetError> {
        self.shared.access.begin_reset();
        let (done, outcome) = mpsc::sync_channel(1);
        self.commands.send(Command::PowerOn(done)).map_err(|_| ResetError::Gone)?;
        match outcome.recv_timeout(timeout) {
            Ok(result) => result,
            Err(mpsc::RecvTimeoutError::Timeout) => Err(ResetError::Timeout(timeout)),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(ResetError::Gone),
        }
    }

    /// Gives up the hardware, which is gone or which its host wants back. From now on the function reads all-ones,
    /// has no windows and raises no interrupts. The function's thread closes the hardware itself soon after.
    pub fn lose(&self) {
        let hardware = self.shared.access.close();
        let mut registers = self.shared.registers();
        if let Err(error) = registers.windows.close() {
            tracing::error!(device = self.shared.name, %error, "Cannot remove a window of a lost PCI function");
        }
        // Closing the device ends its interrupts. This only keeps them from the guest at once.
        registers.reset(false);
        drop(registers);
        let _ = self.commands.send(Command::Release(hardware));
    }

    /// Whether the function was lost or shut down.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.shared.access.is_closed()
    }

    /// Calls [`lose`](Self::lose) and waits for the thread, at most until a reset under way ends.
    pub fn shutdown(&self) {
        self.lose();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(device = self.shared.name, "The thread of a PCI function had panicked");
        }
    }

    /// The BAR, and the offset in it, of an access of `len` bytes at `gpa`.
    fn decode(&self, gpa: u64, len: usize) -> Option<(usize, u64)> {
        let (bar, offset) = self.shared.registers().bars.decode(gpa, len)?;
        self.shared.counters.bar(bar, offset);
        Some((bar, offset))
    }
}

impl Drop for AssignedFunction {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl PciFunction for AssignedFunction {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.shared.counters.config();
        data.fill(0xff);
        self.shared.access.with(|hardware| self.shared.registers().config_read(hardware, offset, data));
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.shared.counters.config();
        let effect =
            self.shared.access.with(|hardware| self.shared.registers().config_write(hardware, offset, data));
        match effect {
            Some(Effect::Reset) => self.request_reset(),
            // Sending fails only after the thread has ended, and then the hardware is gone.
            Some(Effect::IrqsLater) => drop(self.commands.send(Command::FollowIrqs)),
            Some(Effect::None) | None => {}
        }
    }

    fn decoded(&self) -> DecodedBars {
        let registers = self.shared.registers();
        std::array::from_fn(|bar| registers.bars.decoded(bar))
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let Some((bar, offset)) = self.decode(gpa, data.len()) else { return false };
        data.fill(0xff);
        let Some(found) = self.shared.layout.find(bar, offset, data.len()) else { return true };
        let inside = offset - found.range.start;
        match &found.target {
            Target::Hardware { .. } => self.shared.access.bar_read(bar, offset, data),
            // Not inside the access: the handler may use it itself.
            Target::Handler(handler) => {
                if self.shared.access.is_open() {
                    handler.read(inside, data);
                }
            }
            Target::MsixTable | Target::MsixPending => {
                let pending = matches!(found.target, Target::MsixPending);
                self.shared.access.with(|_| match &self.shared.registers().msix {
                    Some(msix) if pending => msix.pba_read(inside, data),
                    Some(msix) => msix.table_read(inside, data),
                    None => {}
                });
            }
        }
        true
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        let Some((bar, offset)) = self.decode(gpa, data.len()) else { return false };
        let Some(found) = self.shared.layout.find(bar, offset, data.len()) else { return true };
        let inside = offset - found.range.start;
        match &found.target {
            Target::Hardware { .. } => self.shared.access.bar_write(bar, offset, data),
            Target::Handler(handler) => {
                if self.shared.access.is_open() {
                    handler.write(inside, data);
                }
            }
            Target::MsixTable => {
                self.shared.access.with(|_| {
                    if let Some(msix) = &mut self.shared.registers().msix {
                        msix.table_write(inside, data);
                    }
                });
            }
            Target::MsixPending => {}
        }
        true
    }
}
