// SPDX-License-Identifier: Apache-2.0

//! Tests in the nested lab: real VFIO, the real igb PF driver, Debian's kernel with its own igbvf in the guest.

mod beside_qemu;
mod block_device;
mod boot;
mod boot_time;
mod crash;
mod debian;
mod devices;
mod errors;
mod failing_writes;
mod guest_networking;
mod life_cycle;
mod others;
mod page;
mod policy;
mod sandbox;
mod simulated;
mod tables;

use serde_json::{Value, json};

use crate::fixture::{Agent, Guest, host};

const CMDLINE: &str = "console=ttyS0 quiet panic=-1 portcullis.noecho";

/// For tests of other things than the boot. An emulated processor spends a quarter of a guest's boot on decompressing
/// its kernel, on moving it to a random address and on mitigations of faults that it does not have, and a quarter on tests
/// of the kernel's own ciphers, on splitting its pages by their rights, and on parts that no test uses.
const FAST: &str = "mitigations=off nokaslr rodata=off cryptomgr.notests initcall_blacklist=crypto_kdf108_init,\
    jent_mod_init,bpf_tcp_ca_kfunc_init,bpf_dummy_struct_ops_init,init_encrypted,\
    trace_eval_init";

/// A VM that boots Debian's kernel into busybox, without any device, fast.
fn bare_spec(agent: &Agent, name: &str) -> Value {
    json!({
        "name": name,
        "cpus": 1,
        "memory": "256MiB",
        "boot": {
            "kernel": agent.link_image("vmlinux", &host::kernel(true)),
            "initramfs": agent.link_image("initrd", &host::initramfs()),
            "cmdline": format!("{CMDLINE} {FAST}"),
        },
    })
}

/// Makes the VM of a specification boot as Debian's does: from the compressed kernel, with its defaults.
fn as_debian_does(agent: &Agent, spec: &mut Value) {
    spec["boot"]["kernel"] = json!(agent.link_image("vmlinuz", &host::kernel(false)));
    spec["boot"]["cmdline"] = json!(CMDLINE);
}

/// The same with one adapter on `vf`.
fn spec(agent: &Agent, name: &str, vf: &str) -> Value {
    let mut spec = bare_spec(agent, name);
    spec["adapters"] = json!([{ "id": "eth0", "vf": vf }]);
    spec
}

const WAIT_FOR_LINK: &str =
    "for i in $(seq 200); do [ $(cat /sys/class/net/eth0/carrier) = 1 ] && break; sleep 0.05; done";

/// Gives the guest's interface an address and waits for its link.
fn configure(guest: &mut Guest<'_>, address: &str) {
    guest.must("ip link set eth0 up");
    guest.must(&format!("ip addr add {address}/24 dev eth0"));
    guest.must(WAIT_FOR_LINK);
}

/// Checks that no ping is lost.
fn ping(guest: &mut Guest<'_>, target: &str, count: u32) {
    let text = guest.must(&format!("ping -q -c {count} -i 0.05 -W 5 {target}"));
    assert!(text.contains(" 0% packet loss"), "{text}");
}
