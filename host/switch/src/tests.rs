// SPDX-License-Identifier: Apache-2.0

//! The switch's task with a PF in memory, and vmms that follow the test's script.

mod binding;
mod catalog;
mod fixture;
mod guest_requests;
mod reconcile;
