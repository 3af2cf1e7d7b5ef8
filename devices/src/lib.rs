// SPDX-License-Identifier: Apache-2.0

//! Buses and devices of a virtual machine.
//!
//! This crate knows no KVM: interrupts are eventfds handed to an [`interrupt::MsiRouter`], guest-physical memory
//! is reached through [`memory::GuestMapper`]. It has no `unsafe` code but the [`memory::HostMemory`] contract.
//!
//! Every device is `&self`, called from any vCPU thread, with a lock as small as its registers.

pub mod acpi;
pub mod bus;
pub mod i8042;
pub mod interrupt;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod serial;
