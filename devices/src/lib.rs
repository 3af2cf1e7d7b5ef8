// SPDX-License-Identifier: Apache-2.0

//! Buses and devices of a virtual machine.
//!
//! This crate does not know KVM: devices give eventfds to an [`interrupt::MsiRouter`] for
//! interrupts and to [`doorbell::Doorbells`] for guests' writes, and map guest-physical memory
//! through [`memory::GuestMapper`]. Its only `unsafe` code is the [`memory::HostMemory`] contract, and a borrowed
//! descriptor in [`pci::vectors`].
//!
//! Every device is called by `&self` from any vCPU thread, with a lock as small as its registers.
//! [`device::Device`] has its duties towards the machine, which knows no device by its kind.

pub mod acpi;
pub mod bus;
pub mod device;
pub mod doorbell;
pub mod i8042;
pub mod interrupt;
pub mod io_thread;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod serial;
pub mod smbios;
