// SPDX-License-Identifier: Apache-2.0

//! Every fuzz target in one libFuzzer program, so that one link serves all of them: `PORTCULLIS_FUZZ_TARGET` names the target.

#![no_main]

use std::sync::LazyLock;

/// The body of a target: takes any bytes, and asserts laws that must hold for them.
type Body = fn(&[u8]);

/// The targets. `tests/fuzz` reads their names from the lines of this table.
const TARGETS: &[(&str, Body)] = &[
    // The codec of mailbox messages: a guest's writes into its mailbox.
    ("mailbox_words", passthrough::family::igb::fuzz::fuzz_words),
    // The same for ixgbevf, with replies of the PF.
    ("mailbox_words_ixgbe", passthrough::family::ixgbe::fuzz::fuzz_words),
    // The mailbox's registers: any accesses of a guest, and the relay's work between them.
    ("mailbox_registers", passthrough::channel::mailbox::fuzz::fuzz_registers),
    // Packets that a taken-over vmm can send to the agent, and packets of the agent.
    ("control", protocol::fuzz::fuzz_packet),
    // Packets between the simulated adapter's VFs and its PF.
    ("sim_packets", simnic::fuzz::fuzz_packet),
    // The simulated PF: any messages and frames of its VFs.
    ("sim_pf", simnic::fuzz::fuzz_pf),
    // The descriptors and packets that a guest can give the simulated VF to send.
    ("sim_transmit", |data| {
        let _ = simnic::fuzz::fuzz_transmit(data);
    }),
    // A guest's accesses to an assigned function: configuration space and BARs.
    ("function_accesses", passthrough::function::fuzz::fuzz_accesses),
    // The capability lists of an assigned function, as hardware may have them.
    ("function_capabilities", passthrough::function::fuzz::fuzz_capabilities),
    // A virtio device's registers and rings: any accesses of a guest, and the thread's work between them.
    ("virtio_transport", virtio::fuzz::fuzz_transport),
    // The same for a disk, with requests.
    ("virtio_block", virtio::fuzz::fuzz_block),
    // A NIC's queues over a wire whose frames come back.
    ("virtio_net", virtio::fuzz::fuzz_net),
    // Images in the format qcow2, after a script of requests.
    ("qcow2", virtio::disk::qcow2::fuzz::fuzz_image),
    // Disks that a VM boots from: partitions, file systems, boot entries.
    ("boot_disk", boot_disk::fuzz::fuzz_disk),
    // Kernel images: headers of bzImage and ELF.
    ("kernel", vmm::boot::fuzz::fuzz_kernel),
    // Request bodies of a client of the API.
    ("rest_bodies", api::router::fuzz::fuzz_body),
];

static BODY: LazyLock<Body> = LazyLock::new(|| {
    let name = std::env::var("PORTCULLIS_FUZZ_TARGET").unwrap_or_default();
    let found = TARGETS.iter().find(|(target, _)| *target == name);
    found
        .unwrap_or_else(|| {
            panic!("PORTCULLIS_FUZZ_TARGET names no target: {name:?}; tests/fuzz --list has them")
        })
        .1
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| (*BODY)(data));
