// SPDX-License-Identifier: Apache-2.0

//! One virtual machine: KVM, memory, boot, vCPUs, interrupt routing, event loop, sandbox.
//!
//! [`process`] is the `main` and the event loop of the process of one VM. It owns a [`machine`],
//! which is built from [`memory`], [`interrupts`], [`doorbells`], a [`board`] with its devices and
//! their [`io_threads`], [`passthrough_devices`], a kernel that [`boot`] puts in place, and
//! [`vcpu`] threads. [`placement`] has the host's CPUs and memory for it. [`agent_client`] carries
//! relays' requests to the agent.
//!
//! The crate [`protocol`] has the messages between the agent and this process. The agent also knows
//! the format of [`console`]'s file and, of [`sandbox`], whether the host has Landlock. It
//! dispatches to [`process::main`] before any of its own code runs. The process of a simulated PF
//! confines itself with [`sandbox`] and [`seccomp`].

pub mod agent_client;
#[cfg(feature = "attacks")]
pub mod attack;
pub mod bars;
pub mod board;
pub mod boot;
pub mod console;
pub mod doorbells;
pub mod interrupts;
pub mod io_threads;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod passthrough_devices;
pub mod placement;
pub mod process;
pub mod sandbox;
pub mod seccomp;
pub mod vcpu;
