// SPDX-License-Identifier: Apache-2.0

//! The interface through which a device raises interrupts, without knowledge of their delivery.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// A message-signalled interrupt: the write by which a PCI function raises it (PCI Local Bus 3.0, 6.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Guest-physical address of the write, in the local APIC's window on x86.
    pub address: u64,
    /// The data written.
    pub data: u32,
}

/// A route's number on the interrupt controller's side (KVM calls it GSI).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteId(pub u32);

/// Turns signals of an eventfd into message-signalled interrupts of the guest.
///
/// The vmm implements it over `KVM_IRQFD` and `KVM_SET_GSI_ROUTING`, tests by a recorder. Every call may come
/// from a vCPU thread: implementations wait only for their own short lock.
pub trait MsiRouter: Send + Sync {
    /// Reserves a route for one vector. It delivers nothing until [`connect`](Self::connect).
    ///
    /// # Errors
    /// When no route is left (`OutOfMemory`).
    fn allocate(&self) -> io::Result<RouteId>;

    /// Makes a signal of `trigger` deliver `message` from now on. A signal that is already pending in `trigger`
    /// is delivered at once. Connecting a connected route changes its message.
    ///
    /// # Errors
    /// Those of the kernel.
    fn connect(&self, route: RouteId, trigger: &EventFd, message: MsiMessage) -> io::Result<()>;

    /// Keeps signals of `trigger` pending in it until the route is connected again. Harmless if it is not
    /// connected.
    ///
    /// # Errors
    /// Those of the kernel.
    fn disconnect(&self, route: RouteId, trigger: &EventFd) -> io::Result<()>;

    /// Releases the route, which must be disconnected.
    fn release(&self, route: RouteId);
}
