// SPDX-License-Identifier: Apache-2.0

//! The way to the hardware, which can be closed while it is being reset, and for good.

use std::{
    io,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use devices::memory::HostMemory;
use vmm_sys_util::eventfd::EventFd;

use crate::hardware::{BarInfo, IrqKind, VfHardware};

/// Hardware behind a gate. Whoever reaches the function through it (vCPUs, the relay) sees all-ones while it is
/// being reset, and forever once it is gone; nobody else holds the hardware, so that closing the gate lets go of it.
pub struct HardwareAccess {
    state: RwLock<State>,
    bars: [BarInfo; BARS],
    msi: u32,
    msix: u32,
}

const BARS: usize = 6;

enum State {
    Open(Arc<dyn VfHardware>),
    /// The function's thread resets it.
    Resetting(Arc<dyn VfHardware>),
    Closed,
}

/// What asking for a reset led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begin {
    /// The gate was open and is not any more: the caller has to see to the reset.
    Begun,
    /// A reset was already under way.
    UnderWay,
    /// The hardware is gone.
    Gone,
}

impl HardwareAccess {
    /// An open gate before `hardware`.
    #[must_use]
    pub fn new(hardware: Arc<dyn VfHardware>) -> Arc<Self> {
        Arc::new(Self {
            bars: std::array::from_fn(|index| hardware.bar(index)),
            msi: hardware.irq_count(IrqKind::Msi),
            msix: hardware.irq_count(IrqKind::Msix),
            state: RwLock::new(State::Open(hardware)),
        })
    }

    /// Runs `access` if the gate is open; it cannot close meanwhile, so `access` must be short.
    pub(super) fn with<T>(&self, access: impl FnOnce(&dyn VfHardware) -> T) -> Option<T> {
        match &*self.read() {
            State::Open(hardware) => Some(access(hardware.as_ref())),
            State::Resetting(_) | State::Closed => None,
        }
    }

    pub(super) fn begin_reset(&self) -> Begin {
        let mut state = self.write();
        match std::mem::replace(&mut *state, State::Closed) {
            State::Open(hardware) => {
                *state = State::Resetting(hardware);
                Begin::Begun
            }
            State::Resetting(hardware) => {
                *state = State::Resetting(hardware);
                Begin::UnderWay
            }
            State::Closed => Begin::Gone,
        }
    }

    /// The hardware, for the thread that resets it.
    pub(super) fn resetting(&self) -> Option<Arc<dyn VfHardware>> {
        match &*self.read() {
            State::Resetting(hardware) => Some(hardware.clone()),
            State::Open(_) | State::Closed => None,
        }
    }

    /// Opens the gate after a reset; false if it was closed for good meanwhile.
    pub(super) fn end_reset(&self) -> bool {
        let mut state = self.write();
        match std::mem::replace(&mut *state, State::Closed) {
            State::Open(hardware) | State::Resetting(hardware) => {
                *state = State::Open(hardware);
                true
            }
            State::Closed => false,
        }
    }

    /// Closes the gate for good. The hardware is returned if it was there: for its last orders.
    pub(super) fn close(&self) -> Option<Arc<dyn VfHardware>> {
        match std::mem::replace(&mut *self.write(), State::Closed) {
            State::Open(hardware) | State::Resetting(hardware) => Some(hardware),
            State::Closed => None,
        }
    }

    /// Whether the hardware can be reached now.
    pub(super) fn is_open(&self) -> bool {
        matches!(&*self.read(), State::Open(_))
    }

    /// Whether the gate is closed for good.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(&*self.read(), State::Closed)
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "PCI function is being reset or gone")
}

impl VfHardware for HardwareAccess {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if self.with(|hardware| hardware.config_read(offset, data)).is_none() {
            data.fill(0xff);
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.with(|hardware| hardware.config_write(offset, data));
    }

    fn bar(&self, index: usize) -> BarInfo {
        self.bars.get(index).copied().unwrap_or_default()
    }

    fn bar_read(&self, index: usize, offset: u64, data: &mut [u8]) {
        if self.with(|hardware| hardware.bar_read(index, offset, data)).is_none() {
            data.fill(0xff);
        }
    }

    fn bar_write(&self, index: usize, offset: u64, data: &[u8]) {
        self.with(|hardware| hardware.bar_write(index, offset, data));
    }

    fn map_bar(&self, index: usize, offset: u64, len: u64) -> io::Result<Arc<dyn HostMemory>> {
        self.with(|hardware| hardware.map_bar(index, offset, len)).unwrap_or_else(|| Err(closed()))
    }

    fn bar_address(&self, index: usize) -> Option<u64> {
        self.with(|hardware| hardware.bar_address(index)).flatten()
    }

    fn irq_count(&self, kind: IrqKind) -> u32 {
        match kind {
            IrqKind::Msi => self.msi,
            IrqKind::Msix => self.msix,
        }
    }

    fn enable_irqs(&self, kind: IrqKind, triggers: &[EventFd]) -> io::Result<()> {
        self.with(|hardware| hardware.enable_irqs(kind, triggers)).unwrap_or_else(|| Err(closed()))
    }

    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()> {
        self.with(|hardware| hardware.disable_irqs(kind)).unwrap_or_else(|| Err(closed()))
    }

    /// Never through the gate: a reset belongs to the function's thread.
    fn reset(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
