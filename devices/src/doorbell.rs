// SPDX-License-Identifier: Apache-2.0

//! Doorbells: a guest's write signals a device, without an exit of the vCPU to this process.

use std::io;

use vmm_sys_util::eventfd::EventFd;

use crate::device::Space;

/// A register: writes that match signal an eventfd. The written value is lost. Reads and other
/// writes reach the device as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Doorbell {
    /// The bus.
    pub space: Space,
    /// The address on the bus. The device decodes it, too.
    pub address: u64,
    /// The writes that match.
    pub ring: Ring,
}

/// The writes that ring a doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ring {
    /// Any value of any length.
    Any,
    /// This value of one byte.
    Byte(u8),
    /// This value of two bytes.
    Word(u16),
    /// This value of four bytes.
    Dword(u32),
    /// This value of eight bytes, in memory only.
    Qword(u64),
}

/// Makes and removes doorbells.
///
/// The vmm implements it over `KVM_IOEVENTFD`, tests by a recorder. Every call may come from a vCPU
/// thread.
pub trait Doorbells: Send + Sync {
    /// Lets writes to `doorbell` signal `event`, which must be non-blocking, and stay open until
    /// [`Self::disconnect`].
    ///
    /// # Errors
    /// `AlreadyExists` if another doorbell matches the same writes; else those of the kernel.
    fn connect(&self, doorbell: Doorbell, event: &EventFd) -> io::Result<()>;

    /// Undoes [`Self::connect`]. After the return no write signals `event`; a signal from before
    /// stays in it.
    ///
    /// # Errors
    /// `NotFound` if there is no such doorbell; else those of the kernel.
    fn disconnect(&self, doorbell: Doorbell, event: &EventFd) -> io::Result<()>;
}
