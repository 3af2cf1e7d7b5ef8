// SPDX-License-Identifier: Apache-2.0

//! The switch's task with a PF in memory and vmms that do what the test says.

mod asks;
mod fixture;
mod objects;
mod upkeep;
mod vms;
