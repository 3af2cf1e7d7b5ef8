// SPDX-License-Identifier: Apache-2.0

//! The Portcullis agent and its command line.

pub mod agent;
pub mod assignable;
pub mod backend;
pub mod cgroup;
pub mod cli;
pub mod console;
pub mod decisions;
pub mod environment;
pub mod files;
pub mod inventory;
mod line_rate;
pub mod log;
pub mod metrics;
pub mod pf;
pub mod private_file;
pub mod sandbox;
pub mod sim;
pub mod small_guest;
pub mod switch;
pub mod token_file;
pub mod user_ids;
pub mod vm;
pub mod vmm_process;
