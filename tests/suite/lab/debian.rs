// SPDX-License-Identifier: Apache-2.0

//! A Debian with systemd that boots from its disk, gets its first configuration from cloud-init, is reached by SSH over a NIC,
//! and drives its VF under policy. A boot takes most of a minute in the lab, so one VM goes from the raw disk to the overlay.

use std::{
    path::PathBuf,
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use api::types::{DecisionFilter, VmAction, VmState};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{FAST, page, policy::in_group};
use crate::fixture::{
    Agent, Guest, Options,
    agent::{PATIENCE, binary},
    host,
};

/// The page's names and addresses.
const BRIDGE: &str = "br-mgmt";
const GUEST: &str = "192.168.99.2";
const MAC: &str = "02:00:00:00:0b:01";
/// The uplink of the simulated PF, and the address of the NIC under a port group.
const TAP: &str = "simtap0";
const PORT: &str = "02:00:00:00:0c:01";

/// The host's part of `docs/first-vm.md`: a directory for the page's files, and its bridge, which goes with this value.
struct Host(TempDir);

impl Host {
    fn new() -> Self {
        let host = Self(TempDir::new().unwrap());
        host.follow("true", "A network for management");
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs a section's commands, with `portcullis` for the command line.
    fn follow(&self, portcullis: &str, section: &str) {
        for block in page::blocks_of(page::FIRST_VM, section, "sh host") {
            let script = format!(
                "cd {}\nsudo() {{ \"$@\"; }}\nportcullis() {{ {portcullis} \"$@\"; }}\n{block}",
                self.0.path().display()
            );
            host::run("timeout", &["200", "bash", "-euxc", &script]);
        }
    }

    /// The page's file of a VM, with the lab's kernel and disk, and with an adapter.
    fn vm(&self, agent: &Agent) {
        let key = std::fs::read_to_string(self.path("web1-key.pub")).unwrap();
        let lab = spec(agent, "web1", &json!({ "id": "root", "path": host::DEBIAN, "format": "raw" }));
        let [file, adapter] = ["The VM", "A VF under policy"]
            .map(|section| page::blocks_of(page::FIRST_VM, section, "toml").concat());
        let mut file = file + &adapter + "mac = \"02:00:00:00:0a:01\"\n";
        for (words, others) in [
            ("KEY", key.trim().to_owned()),
            ("\"vmlinuz\"", lab["boot"]["kernel"].to_string()),
            ("\"initrd.img\"", lab["boot"]["initramfs"].to_string()),
            ("\"root=LABEL=root console=ttyS0 quiet\"", lab["boot"]["cmdline"].to_string()),
            ("path = \"web1.qcow2\"", format!("path = \"{}\"", host::DEBIAN)),
            ("format = \"qcow2\"", "format = \"raw\"".to_owned()),
            ("backing = [{ path = \"debian-12.raw\", format = \"raw\" }]\n", String::new()),
        ] {
            assert!(file.contains(words), "the page does not say {words}");
            file = file.replace(words, &others);
        }
        std::fs::write(self.path("web1.toml"), file).unwrap();
    }

    /// Installs the lab's kernel and initramfs on the disk, as Debian's packages do, and takes those of the host out of the
    /// specification's reach.
    fn install_first_kernel(&self, agent: &Agent) {
        for (file, name, link) in [
            (host::kernel(true), "vmlinuz-first", "vmlinuz"),
            (host::initramfs_for_disk(), "initrd.img-first", "initrd.img"),
        ] {
            for request in
                [format!("write {} /boot/{name}", file.display()), format!("symlink /{link} boot/{name}")]
            {
                host::run("debugfs", &["-w", "-R", &request, host::DEBIAN]);
            }
        }
        file_system_is_whole();
        for image in ["vmlinux", "initrd-for-disk"] {
            std::fs::remove_file(agent.directory().join("images").join(image)).unwrap();
        }
    }

    /// Makes a package with the same kernel under another build number, as a disk's file. Returns the length of the package.
    fn second_kernel(&self, agent: &Agent) -> u64 {
        let tree = self.path("package");
        std::fs::create_dir_all(tree.join("boot")).unwrap();
        std::fs::create_dir(tree.join("DEBIAN")).unwrap();
        let kernel = tree.join("boot/vmlinuz-second");
        let kernel = kernel.to_str().unwrap();
        std::fs::copy(host::kernel(true), kernel).unwrap();
        let script =
            format!("LC_ALL=C sed -i 's/#1 SMP/#2 SMP/g' {kernel} && LC_ALL=C grep -aq '#2 SMP' {kernel}");
        host::run("bash", &["-ec", &script]);
        let control = "Package: linux-image-second\nVersion: 2\nArchitecture: amd64\nMaintainer: tests\nDescription: a kernel\n";
        std::fs::write(tree.join("DEBIAN/control"), control).unwrap();
        let script = tree.join("DEBIAN/postinst");
        std::fs::write(&script, "#!/bin/sh\nset -e\nln -sfn boot/vmlinuz-second /vmlinuz\n").unwrap();
        host::run("chmod", &["755", script.to_str().unwrap()]);
        let file = agent.directory().join("disks/kernel.deb");
        host::run("dpkg-deb", &["-Znone", "--build", tree.to_str().unwrap(), file.to_str().unwrap()]);
        let length = std::fs::metadata(&file).unwrap().len();
        host::run("truncate", &["--size=%4096", file.to_str().unwrap()]);
        std::fs::remove_dir_all(tree).unwrap();
        length
    }

    fn try_ssh(&self, user: &str, command: &str) -> Output {
        let connection = self.path(&format!("{user}.sock"));
        Command::new("ssh")
            .arg("-i")
            .arg(self.path("web1-key"))
            .args(["-F", "none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"])
            .args(["-o", "ServerAliveInterval=20", "-o", "ServerAliveCountMax=5", "-o", "LogLevel=ERROR"])
            .args(["-o", "ConnectTimeout=20", "-o", "BatchMode=yes"])
            // One key exchange for all commands: it is most of their cost here.
            .args(["-o", "ControlMaster=auto", "-o", "ControlPersist=yes", "-o"])
            .arg(format!("ControlPath={}", connection.display()))
            .arg(format!("{user}@{GUEST}"))
            .arg(command)
            .output()
            .unwrap()
    }

    /// Runs a command as root, and returns its output.
    fn ssh(&self, command: &str) -> String {
        let output = self.try_ssh("root", command);
        assert!(output.status.success(), "{command}: {output:?}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// The guest's name of the interface with an address.
    fn interface(&self, mac: &str) -> String {
        self.ssh(&format!("basename $(dirname $(grep -l {mac} /sys/class/net/*/address))"))
    }

    /// Waits until a new boot of the guest lets root in.
    fn connect(&self) {
        // The old connection is dead, and says so only after a time-out.
        let _ = Command::new("ssh")
            .args(["-F", "none", "-O", "exit", "-o"])
            .arg(format!("ControlPath={}", self.path("root.sock").display()))
            .arg(GUEST)
            .output();
        let deadline = Instant::now() + PATIENCE * 4;
        loop {
            let output = self.try_ssh("root", "true");
            if output.status.success() {
                return;
            }
            assert!(Instant::now() < deadline, "{output:?}");
            thread::sleep(Duration::from_millis(500));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", BRIDGE]).status();
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
            "cmdline": format!("console=ttyS0 quiet {FAST}"),
        },
        "disks": [disk],
        "nics": [{ "id": "mgmt0", "bridge": BRIDGE, "mac": MAC }],
        "adapters": [{ "id": "eth0", "port_group": "web", "mac": "02:00:00:00:0a:01" }],
    })
}

/// Checks the file system on the disk, and lets the check replay its journal: a killed guest leaves one.
fn file_system_is_whole() {
    for arguments in [&["-p", host::DEBIAN], &["-fn", host::DEBIAN]] {
        let output = Command::new("e2fsck").args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
}

fn agent() -> Agent {
    let arguments = vec![format!("--interface={BRIDGE}"), format!("--sim-pf=sim0=1,tap={TAP}")];
    let agent = Agent::start_with(Options { arguments, ..Options::default() });
    let agent = in_group(agent, &json!({ "mac_changes": "reject" }));
    let switch = serde_json::from_value(json!({ "uplinks": ["sim0"] })).unwrap();
    agent.ask(agent.client.put_switch("simulated", &switch, None)).unwrap();
    group_of_nic(&agent, "reject");
    agent
}

/// Sets the policy of the NIC under a port group.
fn group_of_nic(agent: &Agent, mac_changes: &str) {
    let settings = json!({ "mac_changes": mac_changes, "vlan": { "trunk": [100] } });
    let group = serde_json::from_value(json!({ "switch": "simulated", "settings": settings })).unwrap();
    agent.ask(agent.client.put_port_group("nics", &group, None)).unwrap();
}

/// Waits for the prompt for a name.
fn login(guest: &mut Guest<'_>, what: &str) {
    let begun = Instant::now();
    guest.wait_for_within("login: ", PATIENCE * 4);
    println!("{what}: login after {:?}", begun.elapsed());
}

#[test]
fn a_debian_boots_from_its_disk_and_an_overlay_keeps_its_data_and_obeys_policy() {
    let (host_of, agent) = (Host::new(), agent());
    host_of.vm(&agent);
    let portcullis = format!("{} --socket {}/api.sock", binary().display(), agent.directory().display());
    let begun = Instant::now();
    host_of.follow(&portcullis, "The VM");
    println!("first boot: SSH after {:?}", begun.elapsed());
    host_of.connect();
    // The end of the first boot's work.
    host_of.ssh("until test -e /var/lib/cloud/instance/boot-finished; do sleep 1; done");
    // The next boots need the first one's network configuration, and a kill loses what is not on the disk.
    host_of.ssh("sync");
    host_of.ssh("grep -q '/dev/vda / ext4 rw' /proc/mounts");
    assert_eq!(
        host_of.ssh("hostname; cat /sys/block/vda/serial; echo; cat /root/first-boot"),
        "web1\nroot\nconfigured"
    );
    assert_eq!(host_of.try_ssh("alice", "id -un").stdout, b"alice\n");
    assert!(host_of.ssh("cat /sys/class/misc/hw_random/rng_available").contains("virtio_rng"));

    // udev names interfaces after their slots.
    let (vf, nic) = (host_of.interface("02:00:00:00:0a:01"), host_of.interface(MAC));
    let refused = host_of.try_ssh("root", &format!("ip link set dev {vf} address 02:00:00:00:0a:77"));
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("Cannot assign requested address"), "{refused:?}");
    let refused = host_of.try_ssh("root", &format!("ip link set dev {nic} address 02:00:00:00:0b:77"));
    assert!(!refused.status.success(), "the NIC's address, too: {refused:?}");
    let stats = agent.stats("web1");
    assert!(stats.nics["mgmt0"].refused >= 1 && stats.nics["mgmt0"].sent > 10, "{stats:?}");
    host_of.ssh("dd if=/dev/urandom of=/root/data bs=64k count=32 conv=fsync 2>/dev/null");
    let sum = host_of.ssh("sha256sum /root/data")[..64].to_owned();

    // A kill loses only what the guest had not flushed.
    let pid = agent.vm("web1").status.pid.unwrap();
    host::run("kill", &["-KILL", &pid.to_string()]);
    agent.wait_for_state("web1", VmState::Failed);
    file_system_is_whole();
    let dumped = host_of.path("data");
    let dumped = dumped.to_str().unwrap();
    host::run("debugfs", &["-R", &format!("dump /root/data {dumped}"), host::DEBIAN]);
    assert_eq!(contents(dumped), sum);

    host_of.install_first_kernel(&agent);
    on_an_overlay(&host_of, &agent, &sum);
}

/// Boots the VM again, from an overlay over its disk and with the kernel there. Enlarges the disk, installs another kernel inside,
/// and reboots into it. The VM has its data, and its base stays as it is.
fn on_an_overlay(host_of: &Host, agent: &Agent, sum: &str) {
    let package = host_of.second_kernel(agent);
    let overlay = agent.directory().join("disks/web1.qcow2");
    let overlay = overlay.to_str().unwrap();
    host::run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", host::DEBIAN, overlay]);
    let before = sectors_written();
    let disks = json!([
        {
            "id": "root", "path": "web1.qcow2", "format": "qcow2",
            "backing": [{ "path": host::DEBIAN, "format": "raw" }],
        },
        { "id": "package", "path": "kernel.deb", "format": "raw", "read_only": true, "cache": "none" },
    ]);
    // The overlay is on a file system in memory, so its pages count as the VM's.
    let limits = json!({ "memory": "1200MiB" });
    let boot = json!({ "kernel": null, "initramfs": null, "disk": "root" });
    let nics = json!([
        { "id": "mgmt0", "bridge": BRIDGE, "mac": MAC },
        { "id": "net0", "port_group": "nics", "mac": PORT },
    ]);
    let changes = json!({ "disks": disks, "boot": boot, "limits": limits, "nics": nics });
    agent.ask(agent.client.patch_vm("web1", &changes, None)).unwrap();
    agent.act("web1", VmAction::Boot).unwrap();
    let mut guest = Guest::new(agent, "web1".to_owned());
    login(&mut guest, "after a kill");
    host_of.connect();
    assert!(host_of.ssh("uname -v").starts_with("#1 "), "the kernel of the base");
    let sum_of = |file: &str| host_of.ssh(&format!("sha256sum {file}"))[..64].to_owned();
    assert_eq!(sum_of("/root/data"), sum);
    assert_eq!(host_of.ssh("cat /root/first-boot"), "configured", "once");
    host_of.ssh("dd if=/dev/urandom of=/root/data2 bs=64k count=32 conv=fsync 2>/dev/null");
    let second = sum_of("/root/data2");
    grow(host_of, agent);
    under_a_port_group(host_of, agent);
    // The device is longer than the package: whole blocks.
    host_of.ssh(&format!("head -c {package} /dev/vdb >/root/kernel.deb && dpkg -i /root/kernel.deb && sync"));
    let _ = host_of.try_ssh("root", "systemctl reboot");
    login(&mut guest, "after a reboot");
    host_of.connect();
    assert!(host_of.ssh("uname -v").starts_with("#2 "), "the kernel that was installed inside");
    assert_eq!([sum_of("/root/data"), sum_of("/root/data2")], [sum, &second]);
    let stats = agent.stats("web1").disks["root"];
    assert!(stats.reads > 100 && stats.writes > 10 && stats.flushes > 0 && stats.errors == 0, "{stats:?}");
    let _ = host_of.try_ssh("root", "systemctl poweroff");
    agent.wait_for_state("web1", VmState::Stopped);
    host::run("qemu-img", &["check", "-q", overlay]);
    assert_eq!(sectors_written(), before, "the base");
}

/// The stock driver of virtio on a NIC under a port group: frames pass, and the policy decides about its requests.
fn under_a_port_group(host_of: &Host, agent: &Agent) {
    let nic = host_of.interface(PORT);
    host::run("ip", &["address", "add", "192.168.98.1/24", "dev", TAP]);
    host::run("ip", &["link", "set", TAP, "up"]);
    host_of.ssh(&format!("ip address add 192.168.98.2/24 dev {nic} && ip link set {nic} up"));
    let answers = || {
        let greeting = "exec 3<>/dev/tcp/192.168.98.2/22 && head -c 4 <&3";
        host::run("timeout", &["60", "bash", "-ec", greeting])
    };
    assert_eq!(answers(), "SSH-");
    let other = "02:00:00:00:0c:77";
    let change = format!("ip link set dev {nic} address {other}");
    let refused = host_of.try_ssh("root", &change);
    assert!(!refused.status.success(), "{refused:?}");
    for vlan in [100, 300] {
        host_of.ssh(&format!("ip link add link {nic} name v{vlan} type vlan id {vlan}"));
        host_of.ssh(&format!("ip link set v{vlan} up"));
    }
    assert_eq!(host_of.ssh("dmesg | grep -o 'Failed to add VLAN ID [0-9]*'"), "Failed to add VLAN ID 300");
    let requests = |verdict: &str| {
        let filter = DecisionFilter {
            verdict: Some(serde_json::from_value(json!(verdict)).unwrap()),
            limit: 100,
            ..DecisionFilter::default()
        };
        let decisions = agent.ask(agent.client.decisions(&filter)).unwrap();
        let of_nic = decisions.into_iter().filter(|one| one.owner.adapter.as_deref() == Some("net0"));
        of_nic.map(|one| (one.request, one.requested.unwrap_or_default())).collect::<Vec<_>>()
    };
    let denied = requests("denied");
    for (request, value) in [("set_mac", other), ("set_vlan", "300")] {
        assert!(denied.contains(&(request.to_owned(), value.to_owned())), "{denied:?}");
    }
    assert!(requests("allowed").contains(&("set_vlan".to_owned(), "100".to_owned())));
    group_of_nic(agent, "accept");
    host_of.ssh(&change);
    // The host knows the former address of Ethernet.
    host::run("ip", &["neighbour", "flush", "dev", TAP]);
    assert_eq!(answers(), "SSH-", "from the granted address");
}

/// Enlarges the disk under the guest, and the guest's file system. The vmm has the limits of a VM that the agent boots as root.
fn grow(host_of: &Host, agent: &Agent) {
    let size = || host_of.ssh("cat /sys/block/vda/size").parse::<u64>().unwrap() * 512;
    let room = || host_of.ssh("df --output=size -B1 / | tail -1").trim().parse::<u64>().unwrap();
    let (old, before, wanted) = (size(), room(), size() + (256 << 20));
    let asked = serde_json::from_value(json!({ "disk": "root", "size": wanted })).unwrap();
    agent.ask(agent.client.resize_disk("web1", &asked)).unwrap();
    assert_eq!(size(), wanted, "it was {old}");
    host_of.ssh("resize2fs /dev/vda");
    assert!(room() > before + (200 << 20), "{before} bytes became {}", room());
}

/// The sectors that the host has written to its disk (the kernel's `Documentation/block/stat.rst`, field 7). A sum of the
/// disk's content would take most of a minute here.
fn sectors_written() -> u64 {
    host::run("sync", &[]);
    let stat = std::fs::read_to_string(format!("/sys/block/{}/stat", &host::DEBIAN[5..])).unwrap();
    stat.split_whitespace().nth(6).unwrap().parse().unwrap()
}

/// The SHA-256 sum of a file's bytes.
fn contents(path: &str) -> String {
    host::run("sha256sum", &[path])[..64].to_owned()
}
