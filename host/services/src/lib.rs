// SPDX-License-Identifier: Apache-2.0

//! What the agent's tasks share: the threads of PFs, the processes of VMs, the record of decisions,
//! metrics, and the problems of the API.

pub mod console;
pub mod decisions;
pub mod line_rate;
pub mod metrics;
pub mod pf;
pub mod problem;
pub mod vmm_process;
