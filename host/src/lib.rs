// SPDX-License-Identifier: Apache-2.0

//! The Portcullis agent and its command line.

pub mod agent;
pub mod backend;
pub mod cgroup;
pub mod command_line;
pub mod credentials;
pub mod disks;
pub mod environment;
pub mod files;
pub mod host_pfs;
pub mod inventory;
pub mod log;
pub mod nics;
pub mod placement;
pub mod sandbox;
pub mod seed;
pub mod sim;
pub mod vm;
