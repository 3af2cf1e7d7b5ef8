// SPDX-License-Identifier: Apache-2.0

//! Options that the agent shares with commands that run without one, and the files that they name.

pub mod assignable;
pub mod private_file;
pub mod token_file;
pub mod user_ids;
