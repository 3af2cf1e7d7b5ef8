// SPDX-License-Identifier: Apache-2.0

//! The Portcullis agent and its command line.

pub mod agent;
pub mod backend;
pub mod cgroup;
pub mod command_line;
pub mod console;
pub mod decisions;
pub mod environment;
pub mod files;
pub mod inventory;
mod line_rate;
pub mod log;
pub mod metrics;
pub mod pf;
pub mod sandbox;
pub mod sim;
pub mod switch;
pub mod vm;
pub mod vmm_process;
