//! Tests that need /dev/kvm and no adapter: VFs are simulated.

mod adapter;
mod demo;
mod hostile;
mod machine;
mod rest;
mod sandbox;
mod simulated_pf;
