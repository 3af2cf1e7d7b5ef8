// SPDX-License-Identifier: Apache-2.0

//! The state of a function that the guest's driver can change: command, BARs, MSI, MSI-X, power.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use devices::{
    interrupt::MsiRouter,
    pci::{
        bar::{BarError, Bars},
        config,
        msi::Msi,
        msix::{Msix, Transition},
    },
};

use super::{FunctionError, capabilities::Capabilities, config_space::ConfigSpace, windows::Windows};
use crate::{
    hardware::{IrqKind, VfHardware},
    token_bucket::{Rate, TokenBucket},
};

/// The command bits that the guest can set. I/O space is not among them: there are no I/O BARs.
const COMMAND_BITS: u16 = config::COMMAND_MEMORY
    | config::COMMAND_BUS_MASTER
    | config::COMMAND_PARITY
    | config::COMMAND_SERR
    | config::COMMAND_INTX_DISABLE;

/// Power management control and status: offset in the capability.
const PM_CONTROL: u16 = 4;
const PM_CAPABILITIES: u16 = 0x01ff;
const PM_STATE: u16 = 3;
/// The function keeps its registers from D3hot to D0, because the power state is only emulated.
const PM_NO_SOFT_RESET: u16 = 1 << 3;
const EXPRESS_DEVICE_CONTROL: u16 = 8;
const EXPRESS_FLR: u16 = 1 << 15;
const ADVANCED_CONTROL: u16 = 4;
const ADVANCED_FLR: u8 = 1;
/// The most interrupt failures of the hardware to log.
const LOGGED_FAILURES: u64 = 8;

/// Changes of the hardware's interrupts that are made at once. The function's thread makes later ones, at this rate. A change costs
/// the host more than the time of the vCPU: vectors of its processors, entries of the IOMMU, locks of the kernel that other processes
/// wait for. Drivers change them a few times for each vector, at their start.
const IRQ_CHANGES: Rate = Rate { burst: 64, period: Duration::from_millis(125) };

/// The function's work after a configuration write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// Function level reset.
    Reset,
    /// The function's thread changes the hardware's interrupts.
    IrqsLater,
}

/// Interrupts of the hardware: their kind and the number of vectors.
type Irqs = Option<(IrqKind, usize)>;

pub(super) struct Registers {
    capabilities: Capabilities,
    space: ConfigSpace,
    pub(super) bars: Bars,
    msi: Option<Msi>,
    pub(super) msix: Option<Msix>,
    pub(super) windows: Windows,
    command: u16,
    /// 0 for D0, 3 for D3hot. Only emulated: in D3hot nothing is decoded, but the hardware stays on.
    power_state: u16,
    /// The interrupts that the hardware signals now.
    irqs: Irqs,
    /// Those that the guest has turned on.
    wanted_irqs: Irqs,
    /// The function's thread is to follow the guest.
    irqs_late: bool,
    irq_changes: TokenBucket,
    began: Instant,
    failures: u64,
}

impl Registers {
    pub(super) fn new(
        hardware: &dyn VfHardware,
        capabilities: Capabilities,
        bars: Bars,
        windows: Windows,
        router: &Arc<dyn MsiRouter>,
    ) -> Result<Self, FunctionError> {
        let space = ConfigSpace::new(hardware, &capabilities)?;
        let msi = capabilities.msi.map(|(_, shape)| Msi::new(shape, router.clone())).transpose();
        let msix = capabilities.msix.map(|location| Msix::new(location.vectors, router.clone())).transpose();
        let mut registers = Self {
            space,
            bars,
            msi: msi.map_err(FunctionError::Vectors)?,
            msix: msix.map_err(FunctionError::Vectors)?,
            windows,
            command: 0,
            power_state: 0,
            irqs: None,
            wanted_irqs: None,
            irqs_late: false,
            irq_changes: TokenBucket::new(IRQ_CHANGES),
            began: Instant::now(),
            failures: 0,
            capabilities,
        };
        if let Some(at) = registers.capabilities.power_management {
            // Hide PME, which nothing could deliver, and D1 and D2.
            let mut data = [0; 2];
            hardware.config_read(at + 2, &mut data);
            registers.space.set(at + 2, &(u16::from_le_bytes(data) & PM_CAPABILITIES).to_le_bytes());
            registers.space.set(at + 6, &[0; 2]);
        }
        registers.refresh();
        Ok(registers)
    }

    /// Reads configuration space.
    pub(super) fn config_read(&self, hardware: &dyn VfHardware, offset: u16, data: &mut [u8]) {
        self.space.read(hardware, offset, data);
        // The pending bits change without a write.
        if let Some((at, msi)) = self.msi_at(offset) {
            let mut header = [0; 4];
            let keep = usize::from(at.saturating_add(2).saturating_sub(offset)).min(data.len()).min(4);
            for (to, from) in header.iter_mut().zip(data.iter()).take(keep) {
                *to = *from;
            }
            msi.read(offset - at, data);
            for (to, from) in data.iter_mut().zip(header).take(keep) {
                *to = from;
            }
        }
    }

    /// Writes configuration space.
    pub(super) fn config_write(&mut self, hardware: &dyn VfHardware, offset: u16, data: &[u8]) -> Effect {
        let end = offset.saturating_add(u16::try_from(data.len()).unwrap_or(u16::MAX));
        let touched = offset..end;
        let touches = |start: u16, len: u16| touched.start < start.saturating_add(len) && start < touched.end;
        let mut effect = Effect::None;
        let mut copy = [0; 4];
        if data.is_empty() || !usize::from(offset).is_multiple_of(data.len()) {
            return Effect::None;
        }
        let Some(place) = copy.get_mut(..data.len()) else { return Effect::None };
        place.copy_from_slice(data);
        let data = place;

        if touches(config::COMMAND, 2) {
            let value = self.space.merged_word(config::COMMAND, offset, data);
            self.write_command(hardware, value);
        }
        if touches(config::BAR0, config::BARS_END - config::BAR0) {
            self.bars.write(offset - config::BAR0, data);
            self.sync_windows();
        }
        if touches(config::INTERRUPT_LINE, 1)
            && let Some(line) = data.first().filter(|_| offset == config::INTERRUPT_LINE)
        {
            self.space.set(config::INTERRUPT_LINE, &[*line]);
        }
        if let Some(transition) = self.write_msi(&touched, data) {
            effect = self.follow(hardware, IrqKind::Msi, transition);
        }
        if let Some(control) = self.capabilities.msix.map(|msix| msix.capability + 2)
            && touches(control, 2)
        {
            let value = self.space.merged_word(control, offset, data);
            if let Some(transition) = self.msix.as_mut().map(|msix| msix.write_control(value)) {
                effect = self.follow(hardware, IrqKind::Msix, transition);
            }
        }
        if let Some(control) = self.capabilities.power_management.map(|at| at + PM_CONTROL)
            && touches(control, 1)
        {
            let asked = self.space.merged_word(control, offset, data) & PM_STATE;
            // D1 and D2 are optional: a request for a missing state changes nothing.
            if matches!(asked, 0 | 3) {
                self.power_state = asked;
                self.follow_decode();
            }
        }
        if let Some((at, flr)) = self.capabilities.express {
            let high = at + EXPRESS_DEVICE_CONTROL + 1;
            if let Some(byte) = byte_at(data, offset, high)
                && u16::from(*byte) << 8 & EXPRESS_FLR != 0
            {
                *byte &= !((EXPRESS_FLR >> 8) as u8);
                if flr {
                    effect = Effect::Reset;
                }
            }
        }
        if let Some((at, flr)) = self.capabilities.advanced
            && let Some(byte) = byte_at(data, offset, at + ADVANCED_CONTROL)
        {
            if flr && *byte & ADVANCED_FLR != 0 {
                effect = Effect::Reset;
            }
            *byte &= !ADVANCED_FLR;
        }
        self.space.forward(hardware, offset, data);
        self.refresh();
        effect
    }

    /// Removes all paths to and from the hardware: windows, interrupts, DMA.
    ///
    /// # Errors
    /// When a window stays; the rest is still done.
    pub(super) fn quiesce(&mut self, hardware: &dyn VfHardware) -> std::io::Result<()> {
        let result = self.windows.clear();
        (self.wanted_irqs, self.irqs_late) = (None, false);
        self.stop_irqs(hardware);
        hardware.config_write(config::COMMAND, &0u16.to_le_bytes());
        result
    }

    /// Restores the state after a reset of the function or, with `power_on`, of the machine.
    pub(super) fn reset(&mut self, power_on: bool) {
        if power_on {
            self.bars.power_on();
        } else {
            self.bars.clear();
        }
        (self.command, self.power_state) = (0, 0);
        (self.wanted_irqs, self.irqs_late) = (None, false);
        if let Some(msi) = &mut self.msi {
            msi.reset();
        }
        if let Some(msix) = &mut self.msix {
            msix.reset();
        }
        self.space.set(config::INTERRUPT_LINE, &[0]);
        self.refresh();
    }

    fn stop_irqs(&mut self, hardware: &dyn VfHardware) {
        if let Some((kind, _)) = self.irqs.take()
            && let Err(error) = hardware.disable_irqs(kind)
        {
            self.failed("disabled", kind, &error);
        }
    }

    /// Assigns the power-on address of a BAR.
    pub(super) fn assign_bar(&mut self, bar: usize, address: u64) -> Result<(), BarError> {
        self.bars.assign(bar, address)?;
        self.sync_windows();
        self.refresh();
        Ok(())
    }

    fn write_command(&mut self, hardware: &dyn VfHardware, value: u16) {
        let value = value & COMMAND_BITS;
        let was = std::mem::replace(&mut self.command, value);
        let gone = was & !value & config::COMMAND_MEMORY != 0;
        // Remove windows before the hardware stops decoding, and make them after it decodes: in between, KVM
        // would find pages that fault.
        if gone {
            self.follow_decode();
        }
        if was != value {
            hardware.config_write(config::COMMAND, &value.to_le_bytes());
        }
        self.follow_decode();
    }

    fn follow_decode(&mut self) {
        self.bars.set_memory_enabled(self.command & config::COMMAND_MEMORY != 0 && self.power_state == 0);
        self.sync_windows();
    }

    fn sync_windows(&mut self) {
        if let Err(error) = self.windows.sync(&self.bars) {
            self.failures = self.failures.saturating_add(1);
            if self.failures <= LOGGED_FAILURES {
                tracing::error!(%error, "Cannot remove a window of a PCI function");
            }
        }
    }

    fn write_msi(&mut self, touched: &Range<u16>, data: &[u8]) -> Option<Transition> {
        let (at, shape) = self.capabilities.msi?;
        let body = at + 2..at + shape.size();
        if touched.start >= body.end || touched.end <= body.start {
            return None;
        }
        // A dword at the capability's start also covers its header, which ignores writes.
        let offset = touched.start.saturating_sub(at);
        self.msi.as_mut().map(|msi| msi.write(offset, data))
    }

    fn follow(&mut self, hardware: &dyn VfHardware, kind: IrqKind, transition: Transition) -> Effect {
        match transition {
            Transition::None => return Effect::None,
            Transition::Disabled if self.wanted_irqs.is_some_and(|(wanted, _)| wanted == kind) => {
                self.wanted_irqs = None;
            }
            Transition::Disabled => return Effect::None,
            // One kind is on at a time.
            Transition::Enabled(count) => self.wanted_irqs = Some((kind, count)),
        }
        if self.irqs_late {
            // The thread finds the guest's last word.
            return Effect::None;
        }
        if self.irq_changes.take(self.began.elapsed()) {
            self.change_irqs(hardware);
            return Effect::None;
        }
        self.irqs_late = true;
        Effect::IrqsLater
    }

    /// The wait until the function's thread may follow the guest's last change of interrupts; None if it has none to make.
    pub(super) fn irqs_due(&self) -> Option<Duration> {
        let now = self.began.elapsed();
        self.irqs_late.then(|| self.irq_changes.ready_at(now).saturating_sub(now))
    }

    /// Follows the guest's last change of interrupts, on the function's thread.
    pub(super) fn follow_late(&mut self, hardware: &dyn VfHardware) {
        if std::mem::take(&mut self.irqs_late) && self.irqs != self.wanted_irqs {
            self.irq_changes.take(self.began.elapsed());
            self.change_irqs(hardware);
        }
    }

    /// Makes the interrupts of the hardware those that the guest has turned on.
    fn change_irqs(&mut self, hardware: &dyn VfHardware) {
        // A changed count means a new set of vectors.
        self.stop_irqs(hardware);
        let Some((kind, count)) = self.wanted_irqs else { return };
        let triggers = match kind {
            IrqKind::Msi => self.msi.as_ref().map(Msi::triggers),
            IrqKind::Msix => self.msix.as_ref().map(Msix::triggers),
        };
        let triggers = triggers.and_then(|triggers| triggers.get(..count)).unwrap_or_default();
        match hardware.enable_irqs(kind, triggers) {
            Ok(()) => self.irqs = Some((kind, count)),
            Err(error) => self.failed("enabled", kind, &error),
        }
    }

    fn failed(&mut self, what: &str, kind: IrqKind, error: &std::io::Error) {
        self.failures = self.failures.saturating_add(1);
        if self.failures <= LOGGED_FAILURES {
            tracing::warn!(?kind, %error, "Interrupts of a PCI function cannot be {what}");
        }
    }

    /// Brings the image in line with the registers.
    fn refresh(&mut self) {
        self.space.set(config::COMMAND, &self.command.to_le_bytes());
        let mut bars = [0; (config::BARS_END - config::BAR0) as usize];
        self.bars.read(0, &mut bars);
        self.space.set(config::BAR0, &bars);
        if let (Some((at, shape)), Some(msi)) = (self.capabilities.msi, &self.msi) {
            let mut image = [0; 24];
            msi.read(0, &mut image);
            let body = image.get(2..usize::from(shape.size())).unwrap_or_default();
            self.space.set(at + 2, body);
        }
        if let (Some(location), Some(msix)) = (self.capabilities.msix, &self.msix) {
            self.space.set(location.capability + 2, &msix.control().to_le_bytes());
        }
        if let Some(at) = self.capabilities.power_management {
            let control = self.power_state | PM_NO_SOFT_RESET;
            self.space.set(at + PM_CONTROL, &control.to_le_bytes());
        }
    }

    fn msi_at(&self, offset: u16) -> Option<(u16, &Msi)> {
        let (at, shape) = self.capabilities.msi?;
        (at..at + shape.size()).contains(&offset).then_some(())?;
        Some((at, self.msi.as_ref()?))
    }
}

/// The byte of a write at `offset` that addresses `target`.
fn byte_at(data: &mut [u8], offset: u16, target: u16) -> Option<&mut u8> {
    data.get_mut(usize::from(target.checked_sub(offset)?))
}
