// SPDX-License-Identifier: Apache-2.0

//! One virtual machine: KVM, memory, boot, vCPUs, interrupt routing, event loop, sandbox, control protocol.
//!
//! [`process`] is the per-VM process's `main` and event loop; it owns a [`machine`], which is built from [`memory`],
//! [`interrupts`], a [`board`] with its devices, [`assigned`] VFIO functions, a kernel put in place by [`boot`], and
//! [`vcpu`] threads. The agent uses nothing but [`control`] and [`console`]'s file format.

pub mod assigned;
#[cfg(feature = "attacks")]
pub mod attack;
pub mod authority;
pub mod board;
pub mod boot;
pub mod console;
pub mod control;
pub mod interrupts;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod process;
pub mod sandbox;
pub mod seccomp;
pub mod vcpu;
