// SPDX-License-Identifier: Apache-2.0

//! The codec of mailbox messages: what a guest can write into its mailbox.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| passthrough::mailbox::fuzz::fuzz_words(data));
