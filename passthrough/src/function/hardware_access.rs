// SPDX-License-Identifier: Apache-2.0

//! Access to the hardware, which closes while it is being reset, and for good after removal.

use std::{
    io,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use devices::memory::HostMemory;
use vmm_sys_util::eventfd::EventFd;

use crate::hardware::{BarInfo, IrqKind, VfHardware};

/// The one access to the hardware of a function. While it is closed, vCPUs and the relay read all-ones: during a
/// reset, and for good once the function is gone. No other code holds the hardware, so closing it for good releases
/// the hardware.
pub struct HardwareAccess {
    state: RwLock<State>,
    bars: [BarInfo; BARS],
    msi: u32,
    msix: u32,
}

const BARS: usize = 6;

enum State {
    Open(Arc<dyn VfHardware>),
    /// The function's thread is resetting it.
    Resetting(Arc<dyn VfHardware>),
    Closed,
}

/// The result of a request for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begin {
    /// The access was open and is now closed: the caller must have the reset done.
    Begun,
    /// A reset was already under way.
    UnderWay,
    /// The hardware is gone.
    Gone,
}

impl HardwareAccess {
    /// Opens the access to `hardware`.
    #[must_use]
    pub fn new(hardware: Arc<dyn VfHardware>) -> Arc<Self> {
        Arc::new(Self {
            bars: std::array::from_fn(|index| hardware.bar(index)),
            msi: hardware.irq_count(IrqKind::Msi),
            msix: hardware.irq_count(IrqKind::Msix),
            state: RwLock::new(State::Open(hardware)),
        })
    }

    /// Runs `access` if the hardware is reachable. It stays so meanwhile, so `access` must be short.
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

    /// Reopens the access after a reset. Returns false if it was closed for good meanwhile.
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

    /// Closes the access for good. Returns the hardware, if it was there, for its last commands.
    pub(super) fn close(&self) -> Option<Arc<dyn VfHardware>> {
        match std::mem::replace(&mut *self.write(), State::Closed) {
            State::Open(hardware) | State::Resetting(hardware) => Some(hardware),
            State::Closed => None,
        }
    }

    /// Whether the hardware is reachable now.
    pub(super) fn is_open(&self) -> bool {
        matches!(&*self.read(), State::Open(_))
    }

    /// Whether the access is closed for good.
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

    /// Unsupported: only the function's thread resets the hardware.
    fn reset(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
