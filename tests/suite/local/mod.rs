//! Tests that need /dev/kvm and no adapter: VFs are simulated.

mod adapter;
mod crash;
mod demo;
mod hostile;
mod machine;
mod rest;
mod simulated_pf;
