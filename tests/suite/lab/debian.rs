// SPDX-License-Identifier: Apache-2.0

//! A Debian with systemd that boots from its disk, gets its first configuration from cloud-init, is reached by SSH over a NIC,
//! and drives its VF under policy.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use api::types::{VmAction, VmState};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::policy::in_group;
use crate::fixture::{Agent, Guest, Options, agent::PATIENCE, host};

const BRIDGE: &str = "br-mgmt";
const HOST: &str = "192.168.99.1/24";
const GUEST: &str = "192.168.99.2";
const MAC: &str = "02:00:00:00:0b:01";

/// A bridge of the lab's host.
struct Bridge;

impl Bridge {
    fn new() -> Self {
        host::run("ip", &["link", "add", BRIDGE, "type", "bridge"]);
        host::run("ip", &["address", "add", HOST, "dev", BRIDGE]);
        host::run("ip", &["link", "set", BRIDGE, "up"]);
        Self
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", BRIDGE]).status();
    }
}

/// A key for SSH, and the connection that it opens.
struct Ssh(TempDir);

impl Ssh {
    fn new() -> Self {
        let ssh = Self(TempDir::new().unwrap());
        let key = ssh.key();
        host::run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", key.to_str().unwrap()]);
        ssh
    }

    fn key(&self) -> PathBuf {
        self.0.path().join("key")
    }

    fn public(&self) -> String {
        std::fs::read_to_string(self.key().with_extension("pub")).unwrap().trim().to_owned()
    }

    fn try_run(&self, user: &str, command: &str) -> Output {
        let connection = self.0.path().join(format!("{user}.sock"));
        Command::new("ssh")
            .arg("-i")
            .arg(self.key())
            .args(["-F", "none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"])
            .args(["-o", "LogLevel=ERROR", "-o", "ConnectTimeout=20", "-o", "BatchMode=yes"])
            // One key exchange for all commands: it is most of their cost here.
            .args(["-o", "ControlMaster=auto", "-o", "ControlPersist=yes", "-o"])
            .arg(format!("ControlPath={}", connection.display()))
            .arg(format!("{user}@{GUEST}"))
            .arg(command)
            .output()
            .unwrap()
    }

    /// Runs a command as root, and returns its output.
    fn run(&self, command: &str) -> String {
        let output = self.try_run("root", command);
        assert!(output.status.success(), "{command}: {output:?}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Waits until a new boot of the guest lets root in.
    fn connect(&self) {
        // The old connection is dead, and says so only after a time-out.
        for user in ["root", "tester"] {
            let socket = self.0.path().join(format!("{user}.sock"));
            let _ = Command::new("ssh")
                .args(["-F", "none", "-O", "exit", "-o"])
                .arg(format!("ControlPath={}", socket.display()))
                .arg(GUEST)
                .output();
        }
        let deadline = Instant::now() + PATIENCE * 4;
        loop {
            let output = self.try_run("root", "true");
            if output.status.success() {
                return;
            }
            assert!(Instant::now() < deadline, "{output:?}");
            thread::sleep(Duration::from_millis(500));
        }
    }
}

fn spec(agent: &Agent, name: &str, disk: &Value) -> Value {
    json!({
        "name": name,
        "cpus": 1,
        "memory": "512MiB",
        "entropy": true,
        "boot": {
            "kernel": agent.link_image("vmlinux", &host::kernel(true)),
            "initramfs": agent.link_image("initrd-for-disk", &host::initramfs_for_disk()),
            "cmdline": "console=ttyS0 quiet mitigations=off nokaslr",
        },
        "disks": [disk],
        "nics": [{ "id": "mgmt0", "bridge": BRIDGE, "mac": MAC }],
        "adapters": [{ "id": "eth0", "port_group": "web", "mac": "02:00:00:00:0a:01" }],
    })
}

/// The first configuration: a user, a key for it and for root, an address, and a mark of each time that it is made.
fn cloud_init(key: &str) -> Value {
    let user_data = format!(
        "#cloud-config\n\
         disable_root: false\n\
         ssh_genkeytypes: [ed25519]\n\
         users:\n  \
           - {{name: root, ssh_authorized_keys: [{key}]}}\n  \
           - {{name: tester, shell: /bin/bash, ssh_authorized_keys: [{key}]}}\n\
         runcmd: ['echo once >>/root/first-boot']\n"
    );
    let network = format!(
        "version: 2\nethernets:\n  mgmt:\n    match: {{macaddress: '{MAC}'}}\n    addresses: [{GUEST}/24]\n"
    );
    json!({ "user_data": user_data, "network_config": network })
}

/// Checks the file system on the disk, and lets the check replay its journal: a killed guest leaves one.
fn file_system_is_whole() {
    for arguments in [&["-p", host::DEBIAN], &["-fn", host::DEBIAN]] {
        let output = Command::new("e2fsck").args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
}

fn agent() -> Agent {
    let arguments = vec![format!("--interface={BRIDGE}")];
    let agent = Agent::start_with(Options { arguments, ..Options::default() });
    in_group(agent, &json!({ "mac_changes": "reject" }))
}

/// Waits for the prompt for a name.
fn login(guest: &mut Guest<'_>, what: &str) {
    let begun = Instant::now();
    guest.wait_for_within("login: ", PATIENCE * 4);
    println!("{what}: login after {:?}", begun.elapsed());
}

#[test]
fn a_debian_boots_from_its_disk_keeps_its_data_and_obeys_policy() {
    let (_bridge, ssh, agent) = (Bridge::new(), Ssh::new(), agent());
    let raw = json!({ "id": "root", "path": host::DEBIAN, "format": "raw" });
    let mut debian = spec(&agent, "web1", &raw);
    debian["cloud_init"] = cloud_init(&ssh.public());
    let mut guest = agent.boot(&debian);
    login(&mut guest, "first boot");
    ssh.connect();
    // The last work of the first boot.
    ssh.run(
        "cloud-init status --wait >/dev/null; mountpoint -q / && grep -q '/dev/vda / ext4 rw' /proc/mounts",
    );
    assert_eq!(ssh.run("hostname; cat /sys/block/vda/serial; cat /root/first-boot"), "web1\nroot\nonce");
    assert_eq!(ssh.try_run("tester", "id -un").stdout, b"tester\n");
    assert!(ssh.run("cat /sys/class/misc/hw_random/rng_available").contains("virtio_rng"));

    // udev names interfaces after their slots.
    let with = |mac: &str| ssh.run(&format!("basename $(dirname $(grep -l {mac} /sys/class/net/*/address))"));
    let (vf, nic) = (with("02:00:00:00:0a:01"), with(MAC));
    let refused = ssh.try_run("root", &format!("ip link set dev {vf} address 02:00:00:00:0a:77"));
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("Cannot assign requested address"), "{refused:?}");
    let refused = ssh.try_run("root", &format!("ip link set dev {nic} address 02:00:00:00:0b:77"));
    assert!(!refused.status.success(), "the NIC's address, too: {refused:?}");
    let stats = agent.stats("web1");
    assert!(stats.nics["mgmt0"].refused >= 1 && stats.nics["mgmt0"].sent > 10, "{stats:?}");
    ssh.run("dd if=/dev/urandom of=/root/data bs=64k count=32 conv=fsync 2>/dev/null");
    let sum = ssh.run("sha256sum /root/data");

    // A kill loses only what the guest had not flushed.
    let pid = agent.vm("web1").status.pid.unwrap();
    host::run("kill", &["-KILL", &pid.to_string()]);
    agent.wait_for_state("web1", VmState::Failed);
    file_system_is_whole();
    agent.act("web1", VmAction::Boot).unwrap();
    guest.begin_anew();
    login(&mut guest, "after a kill");
    ssh.connect();
    assert_eq!(
        ssh.run("sha256sum /root/data; cat /root/first-boot"),
        format!("{sum}\nonce"),
        "configured once"
    );
    let _ = ssh.try_run("root", "systemctl poweroff");
    agent.wait_for_state("web1", VmState::Stopped);
    file_system_is_whole();
}

#[test]
fn a_debian_on_an_overlay_leaves_its_base_as_it_is() {
    let (_bridge, agent) = (Bridge::new(), agent());
    let overlay = agent.directory().join("disks/web2.qcow2");
    let overlay = overlay.to_str().unwrap();
    host::run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", host::DEBIAN, overlay]);
    let before = contents(Path::new(host::DEBIAN));
    let disk = json!({
        "id": "root", "path": "web2.qcow2", "format": "qcow2", "backing": [{ "path": host::DEBIAN, "format": "raw" }],
    });
    let mut guest = agent.boot(&spec(&agent, "web2", &disk));
    log_in(&mut guest);
    guest.must("dd if=/dev/urandom of=/root/data2 bs=64k count=32 conv=fsync 2>/dev/null");
    let sum = guest.must("sha256sum /root/data2");
    guest.type_line("reboot");
    log_in(&mut guest);
    assert_eq!(guest.must("sha256sum /root/data2"), sum);
    let stats = agent.stats("web2").disks["root"];
    assert!(stats.reads > 100 && stats.writes > 10 && stats.flushes > 0 && stats.errors == 0, "{stats:?}");
    agent.act("web2", VmAction::Stop).unwrap();
    host::run("qemu-img", &["check", "-q", overlay]);
    assert_eq!(contents(Path::new(host::DEBIAN)), before);
}

/// Logs in on the console, and leaves a shell without echo.
fn log_in(guest: &mut Guest<'_>) {
    login(guest, "on an overlay");
    guest.type_line("root");
    guest.wait_for("# ");
    // The prompt in two parts: the echo of this line is none.
    guest.type_line("bind 'set enable-bracketed-paste off'; stty -echo cols 1000; PS1='guest''# '");
    guest.wait_for("guest# ");
}

/// A sum of a file's bytes.
fn contents(path: &Path) -> String {
    host::run("sha256sum", &[path.to_str().unwrap()])
}
