// SPDX-License-Identifier: Apache-2.0

//! VMs that boot the kernel on their disk. The small guest is that kernel, and shows its command line by its `echo`.

use std::{fs, io::Write as _, os::unix::fs::FileExt as _, path::Path};

use api::{
    problem::ProblemCode,
    types::{CauseCode, VmAction, VmState},
};
use serde_json::{Value, json};

use super::disks::qemu_img;
use crate::fixture::{Agent, SmallGuest, agent::binary, host};

/// The bytes of a disk.
const SIZE: u64 = 4 << 20;

/// The small guest's image, also under another name and with another first line.
fn kernel(agent: &Agent) -> Vec<u8> {
    SmallGuest::spec(agent, "unused", json!([]), "");
    fs::read(agent.directory().join("images/small-guest")).unwrap()
}

/// A kernel that writes other words at its start.
fn upgraded(kernel: &[u8]) -> Vec<u8> {
    const WORDS: &[u8] = b"portcullis small guest";
    let at = kernel.windows(WORDS.len()).position(|window| window == WORDS).unwrap();
    let mut other = kernel.to_vec();
    other[at..at + WORDS.len()].copy_from_slice(b"portcullis other guest");
    other
}

/// Makes an ext4 file system of the files below `tree` in the image `path`, from its byte `at` on.
fn ext4(tree: &Path, path: &Path, at: u64) {
    let part = path.with_extension("ext4");
    let (from, to) = (tree.to_str().unwrap(), part.to_str().unwrap());
    host::run("mke2fs", &["-q", "-F", "-t", "ext4", "-d", from, to, &format!("{}k", (SIZE - at) >> 10)]);
    let bytes = fs::read(&part).unwrap();
    fs::File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
        .write_all_at(&bytes, at)
        .unwrap();
    fs::remove_file(part).unwrap();
}

/// The files of a guest, for an image.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        for (path, bytes) in files {
            let path = tree.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        tree
    }
}

fn spec(name: &str, disk: Value, cmdline: &str) -> Value {
    json!({
        "name": name, "cpus": 1, "memory": "2MiB", "boot": { "disk": "root", "cmdline": cmdline },
        "disks": [disk],
    })
}

fn raw(path: &str) -> Value {
    json!({"id": "root", "path": path, "format": "raw"})
}

fn vmm_log(agent: &Agent, name: &str) -> String {
    let id = agent.vm(name).id;
    fs::read_to_string(agent.directory().join(format!("run/vms/{id}/vmm.log"))).unwrap()
}

/// Replaces a file in an ext4 image, as a guest's upgrade does.
fn replace(image: &Path, path: &str, bytes: &[u8]) {
    let file = image.with_extension("new");
    fs::write(&file, bytes).unwrap();
    for request in [format!("rm {path}"), format!("write {} {path}", file.display())] {
        host::run("debugfs", &["-w", "-R", &request, image.to_str().unwrap()]);
    }
}

#[test]
fn a_vm_boots_the_kernel_on_its_disk_and_an_upgrade_at_a_reboot() {
    let agent = Agent::start();
    let kernel = kernel(&agent);
    let tree = Tree::new(&[("boot/vmlinuz", &kernel), ("boot/initrd.img", b"initramfs")]);
    let image = agent.directory().join("disks/web1.raw");
    ext4(tree.0.path(), &image, 0);
    let mut guest =
        SmallGuest { guest: agent.boot(&spec("web1", raw("web1.raw"), "echo of-the-vm; initramfs")) };
    guest.guest.wait_for("portcullis small guest");
    guest.guest.wait_for("of-the-vm");
    assert_eq!(guest.result("initramfs"), "9 initramfs");
    let socket = agent.directory().join("api.sock");
    let shown =
        host::run(binary().to_str().unwrap(), &["--socket", socket.to_str().unwrap(), "vm", "show", "web1"]);
    assert!(shown.contains("installed on disk root"), "{shown}");
    guest.wait_for_ready();
    // Beside the guest, since its driver has no file system: between two of its requests nobody else writes.
    replace(&image, "/boot/vmlinuz", &upgraded(&kernel));
    assert_eq!(guest.ask("reboot"), "ok");
    guest.guest.wait_for("portcullis other guest");
    guest.wait_for_ready();
    replace(&image, "/boot/vmlinuz", &kernel);
    agent.act("web1", VmAction::Reboot).unwrap();
    guest.guest.wait_for("portcullis small guest");
    let log = vmm_log(&agent, "web1");
    assert_eq!(log.matches("Boots the kernel on a disk").count(), 1, "{log}");
}

/// A disk with a GPT: an EFI system partition with a boot loader entry, and an ext4 file system at 2 MiB with another kernel.
fn gpt(esp: &[u8], path: &Path, root: &Tree) {
    const FIRST: u64 = 2048;
    let mut disk = vec![0; 2 << 20];
    disk[446 + 4] = 0xee;
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[512..520].copy_from_slice(b"EFI PART");
    for (at, value) in [(72, 2_u32), (80, 128), (84, 128)] {
        disk[512 + at..516 + at].copy_from_slice(&value.to_le_bytes());
    }
    let esp_kind = 0x3bc9_3ec9_a000_4bba_11d2_f81f_c12a_7328_u128;
    let linux_kind = 0xe47d_47d8_693d_798e_4772_8483_0fc6_3daf_u128;
    let half = SIZE / 2 / 512;
    for (slot, (kind, first, last)) in
        [(linux_kind, half, SIZE / 512 - 1), (esp_kind, FIRST, FIRST + esp.len() as u64 / 512 - 1)]
            .iter()
            .enumerate()
    {
        let at = 1024 + 128 * slot;
        disk[at..at + 16].copy_from_slice(&kind.to_le_bytes());
        disk[at + 32..at + 40].copy_from_slice(&first.to_le_bytes());
        disk[at + 40..at + 48].copy_from_slice(&last.to_le_bytes());
    }
    let at = usize::try_from(FIRST * 512).unwrap();
    disk[at..at + esp.len()].copy_from_slice(esp);
    fs::write(path, disk).unwrap();
    ext4(root.0.path(), path, SIZE / 2);
}

/// A FAT file system of 1 MiB.
fn fat(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut image = std::io::Cursor::new(vec![0; 1 << 20]);
    fatfs::format_volume(&mut image, fatfs::FormatVolumeOptions::new()).unwrap();
    let volume = fatfs::FileSystem::new(&mut image, fatfs::FsOptions::new()).unwrap();
    for (path, bytes) in files {
        let mut directory = volume.root_dir();
        let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
        for parent in parents.split('/').filter(|parent| !parent.is_empty()) {
            directory = directory.create_dir(parent).unwrap();
        }
        directory.create_file(name).unwrap().write_all(bytes).unwrap();
    }
    volume.unmount().unwrap();
    image.into_inner()
}

/// The entry's own words come first.
#[test]
fn the_entry_on_an_efi_system_partition_comes_first_in_raw_files_and_over_a_chain() {
    let agent = Agent::start();
    let kernel = kernel(&agent);
    let entry = "title Small guest\nlinux /EFI/small\ninitrd /EFI/initramfs\noptions echo of-the-entry;\n";
    let esp = fat(&[("loader/entries/small.conf", entry.as_bytes()), ("EFI/small", &kernel)]);
    // `create_dir` opens a directory that exists, so that the second file of it can follow.
    let esp = with_file(esp, "EFI/initramfs", b"in the ESP");
    let image = agent.directory().join("images/base.raw");
    gpt(&esp, &image, &Tree::new(&[("boot/vmlinuz", &upgraded(&kernel))]));
    let disks = agent.directory().join("disks");
    fs::copy(&image, disks.join("web1.raw")).unwrap();
    let (overlay, base) = (disks.join("web1.qcow2"), image.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, overlay.to_str().unwrap()]);
    let backing = json!([{"path": "base.raw", "format": "raw"}]);
    for (name, disk) in [
        ("raw", raw("web1.raw")),
        ("qcow2", json!({"id": "root", "path": "web1.qcow2", "format": "qcow2", "backing": backing})),
        ("ephemeral", json!({"id": "root", "path": "base.raw", "format": "raw", "ephemeral": true})),
    ] {
        let mut guest = SmallGuest { guest: agent.boot(&spec(name, disk, "echo of-the-vm; initramfs")) };
        assert!(guest.guest.wait_for("of-the-entry").contains("portcullis small guest"), "{name}");
        guest.guest.wait_for("of-the-vm");
        assert_eq!(guest.result("initramfs"), "10 in.the.ESP");
        guest.wait_for_ready();
        let log = vmm_log(&agent, name);
        assert!(log.contains("partition 2 (for boot loaders), FAT") && log.contains("Small guest"), "{log}");
        // Writes that are in the overlay only, and not flushed there: the guest removes the entry's partition.
        guest.ask("disk-probe");
        assert_eq!(guest.ask("disk-write 2 gone count=1"), "ok");
        let first = guest.ask("disk-read 2");
        assert_eq!(first, "ok gone", "{name}");
        assert_eq!(guest.ask("reboot"), "ok");
        agent.wait_for_state(name, VmState::Failed);
        let cause = agent.vm(name).status.cause.unwrap();
        assert_eq!(cause.code, CauseCode::MachineFailed, "{name}: {cause:?}");
        assert!(cause.detail.contains("The disk root boots no kernel"), "{name}: {}", cause.detail);
        assert!(cause.detail.contains("No kernel was found"), "{name}: {}", cause.detail);
    }
}

/// The image with another file.
fn with_file(image: Vec<u8>, path: &str, bytes: &[u8]) -> Vec<u8> {
    let mut image = std::io::Cursor::new(image);
    let volume = fatfs::FileSystem::new(&mut image, fatfs::FsOptions::new()).unwrap();
    volume.root_dir().create_file(path).unwrap().write_all(bytes).unwrap();
    volume.unmount().unwrap();
    image.into_inner()
}

#[test]
fn a_disk_without_a_kernel_is_refused_with_the_places() {
    let agent = Agent::start();
    let directory = agent.directory().join("disks");
    fs::write(directory.join("empty.raw"), vec![0; 1 << 20]).unwrap();
    let mut locked = vec![0; 1 << 20];
    locked[..6].copy_from_slice(b"LUKS\xba\xbe");
    fs::write(directory.join("locked.raw"), locked).unwrap();
    ext4(Tree::new(&[("etc/motd", b"no kernel")]).0.path(), &directory.join("data.raw"), 0);
    for (name, expect) in [
        ("empty", &["the whole disk: no file system that is known"][..]),
        ("locked", &["an encrypted volume (LUKS) is not supported"]),
        (
            "data",
            &[
                "the whole disk, ext4, boot loader entries: there is no",
                "Debian's links: there is no /vmlinuz",
            ],
        ),
    ] {
        agent.create(&spec(name, raw(&format!("{name}.raw")), "")).unwrap();
        let problem = agent.act(name, VmAction::Boot).unwrap_err();
        assert_eq!(problem.code, ProblemCode::NoKernelOnDisk, "{problem:?}");
        for words in expect.iter().chain(&["The disk root boots no kernel", "boot.kernel"]) {
            assert!(problem.detail.contains(words), "{words}: {}", problem.detail);
        }
        let status = agent.vm(name).status;
        assert!(status.state.is_at_rest() && status.pid.is_none());
        assert_eq!(status.cause.unwrap().problem, Some(ProblemCode::NoKernelOnDisk));
    }
}

#[test]
fn a_kernel_that_cannot_be_loaded_is_named_with_its_place() {
    let agent = Agent::start();
    let tree = Tree::new(&[("vmlinuz", b"no kernel")]);
    ext4(tree.0.path(), &agent.directory().join("disks/web1.raw"), 0);
    agent.create(&spec("web1", raw("web1.raw"), "")).unwrap();
    let problem = agent.act("web1", VmAction::Boot).unwrap_err();
    let words = "The kernel /vmlinuz on the disk root (the whole disk, ext4) cannot be loaded: The kernel is";
    assert!(problem.detail.contains(words), "{}", problem.detail);
}

#[test]
fn a_reboot_without_a_kernel_ends_the_vm_with_the_cause() {
    let agent = Agent::start();
    let tree = Tree::new(&[("boot/vmlinuz", &kernel(&agent))]);
    let path = agent.directory().join("disks/web1.raw");
    ext4(tree.0.path(), &path, 0);
    let mut guest = SmallGuest { guest: agent.boot(&spec("web1", raw("web1.raw"), "")) };
    guest.wait_for_ready();
    guest.ask("disk-probe");
    // The superblock of the file system.
    assert_eq!(guest.ask("disk-write 2 destroyed count=2"), "ok");
    let problem = agent.act("web1", VmAction::Reboot).unwrap_err();
    assert_eq!(problem.code, ProblemCode::NoKernelOnDisk, "{problem:?}");
    agent.wait_for_state("web1", VmState::Failed);
    let cause = agent.vm("web1").status.cause.unwrap();
    assert!(cause.detail.contains("no file system that is known"), "{}", cause.detail);
}
