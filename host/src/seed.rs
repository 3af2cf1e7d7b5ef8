// SPDX-License-Identifier: Apache-2.0

//! The disk with the texts that cloud-init reads at a boot: a NoCloud seed.
//!
//! cloud-init takes a FAT file system with the label CIDATA for its data source, and reads the files `user-data`, `meta-data` and
//! `network-config` in its root directory. The first two must exist (cloud-init's documentation, "NoCloud").

use std::{
    fs::File,
    io::{self, Cursor, Write as _},
    os::unix::fs::FileExt as _,
};

use api::types::{CloudInitSpec, MAX_SEED_TEXT, MAX_USER_DATA, Name, Secret};
use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};
use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create},
    io::Errno,
};
use uuid::Uuid;

/// The bytes of the image.
const SIZE: usize = 1 << 20;
// The tables of FAT12 need less than the other half.
const _: () = assert!(MAX_USER_DATA + 2 * MAX_SEED_TEXT <= SIZE / 2);
/// The label by which cloud-init finds the file system, as long as FAT has it.
const LABEL: [u8; 11] = *b"CIDATA     ";
/// The file system's number: always the same, as all of the image is.
const VOLUME: u32 = 0x4349_4441;
/// The part of the image that is written, or left out, at once: a page.
const PART: usize = 4096;
/// The longest label of a host name in bytes (RFC 1123, 2.1).
const MAX_LABEL: usize = 63;

/// Makes the seed of a VM, as a file in memory that cannot be changed any more. The same texts give the same bytes.
///
/// # Errors
/// Those of making a file in memory.
pub fn seed(vm: Uuid, name: &Name, texts: &CloudInitSpec) -> io::Result<File> {
    sealed("cidata", &image(vm, name, texts)?)
}

/// A file in memory with these bytes, which cannot be changed any more. Pages of zeroes take no memory.
///
/// # Errors
/// Those of `memfd_create(2)`, and of writing.
pub fn sealed(name: &str, bytes: &[u8]) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Some hosts take no other one (`vm.memfd_noexec`), and kernels before 6.3 do not know the flag.
    let file = match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => memfd_create(name, flags)?,
        made => made?,
    };
    let file = File::from(file);
    file.set_len(bytes.len() as u64)?;
    for (part, at) in bytes.chunks(PART).zip((0..).step_by(PART)) {
        if part.iter().any(|byte| *byte != 0) {
            file.write_all_at(part, at)?;
        }
    }
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file)
}

fn image(vm: Uuid, name: &Name, texts: &CloudInitSpec) -> io::Result<Vec<u8>> {
    let text = |secret: &Option<Secret>| secret.as_ref().map(|secret| secret.reveal().to_owned());
    let mut image = Cursor::new(vec![0; SIZE]);
    let options = FormatVolumeOptions::new().volume_label(LABEL).volume_id(VOLUME).fat_type(FatType::Fat12);
    fatfs::format_volume(&mut image, options)?;
    let volume = FileSystem::new(&mut image, FsOptions::new())?;
    for (file, text) in [
        ("user-data", Some(text(&texts.user_data).unwrap_or_default())),
        ("meta-data", Some(text(&texts.meta_data).unwrap_or_else(|| meta_data(vm, name)))),
        ("network-config", text(&texts.network_config)),
    ] {
        if let Some(text) = text {
            volume.root_dir().create_file(file)?.write_all(text.as_bytes())?;
        }
    }
    volume.unmount()?;
    Ok(image.into_inner())
}

/// The text for a VM whose specification has none. It is the same at each boot: cloud-init takes another `instance-id` for a new
/// machine, and does all the work of a first boot again.
fn meta_data(vm: Uuid, name: &Name) -> String {
    let host =
        if is_host_name(name.as_str()) { format!("local-hostname: \"{name}\"\n") } else { String::new() };
    format!("instance-id: \"{vm}\"\n{host}")
}

/// Whether a VM's name is a host name, too (RFC 1123, 2.1).
fn is_host_name(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    name.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, process::Command};

    use proptest::prelude::*;

    use super::*;

    const VM: Uuid = Uuid::from_u128(0x6b1e_3f9e_7f1d_4a53_9d5e_0d6e_5a1c_2b3a);

    fn texts(user: Option<&str>, meta: Option<&str>, network: Option<&str>) -> CloudInitSpec {
        let secret = |text: Option<&str>| text.map(|text| Secret::new(text.to_owned()));
        CloudInitSpec { user_data: secret(user), meta_data: secret(meta), network_config: secret(network) }
    }

    fn of(texts: &CloudInitSpec) -> File {
        seed(VM, &"web1".parse().unwrap(), texts).unwrap()
    }

    fn bytes(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; SIZE];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// The names and contents of the files, by another reader of the bytes.
    fn files(image: Vec<u8>) -> Vec<(String, String)> {
        let volume = FileSystem::new(Cursor::new(image), FsOptions::new()).unwrap();
        assert_eq!(volume.volume_label(), "CIDATA");
        assert_eq!(volume.read_volume_label_from_root_dir().unwrap().as_deref(), Some("CIDATA"));
        let entries = volume.root_dir().iter().map(Result::unwrap).map(|entry| {
            let mut text = String::new();
            entry.to_file().read_to_string(&mut text).unwrap();
            (entry.file_name(), text)
        });
        entries.collect()
    }

    fn owned(files: &[(&str, &str)]) -> Vec<(String, String)> {
        files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn the_seed_has_the_files_that_cloud_init_reads() {
        let meta = "instance-id: \"6b1e3f9e-7f1d-4a53-9d5e-0d6e5a1c2b3a\"\nlocal-hostname: \"web1\"\n";
        for (texts, expect) in [
            (texts(Some("u"), None, None), vec![("user-data", "u"), ("meta-data", meta)]),
            (
                texts(None, None, Some("n")),
                vec![("user-data", ""), ("meta-data", meta), ("network-config", "n")],
            ),
            (
                texts(Some("u"), Some("m"), Some("")),
                vec![("user-data", "u"), ("meta-data", "m"), ("network-config", "")],
            ),
        ] {
            assert_eq!(files(bytes(&of(&texts))), owned(&expect));
        }
    }

    #[test]
    fn only_a_host_name_becomes_one() {
        for (name, expect) in [
            ("web1", true),
            ("web-1.example", true),
            ("1", true),
            ("web_1", false),
            ("web-", false),
            ("web1.", false),
            ("a..b", false),
            ("a.-b", false),
        ] {
            let meta = meta_data(VM, &name.parse().unwrap());
            assert_eq!(meta.contains("local-hostname"), expect, "{name}: {meta}");
        }
    }

    #[test]
    fn the_same_texts_give_the_same_bytes_and_no_process_can_change_them() {
        let texts = texts(Some("u"), None, Some("n"));
        let (first, second) = (of(&texts), of(&texts));
        assert!(bytes(&first) == bytes(&second));
        assert_eq!(first.write_all_at(b"x", 0).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        for size in [0, SIZE as u64 * 2] {
            assert_eq!(first.set_len(size).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        }
        assert!(fcntl_add_seals(&first, SealFlags::FUTURE_WRITE).is_err());
        // Pages of zeroes have no memory.
        let blocks = std::os::unix::fs::MetadataExt::blocks(&first.metadata().unwrap());
        assert!(blocks * 512 < 128 << 10, "{blocks} blocks");
    }

    /// The program of dosfstools finds no fault, if it is there.
    #[test]
    fn other_programs_read_the_seed() {
        let large = "x".repeat(MAX_USER_DATA);
        let small = "y".repeat(MAX_SEED_TEXT);
        let image = bytes(&of(&texts(Some(&large), Some(&small), Some(&small))));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed");
        std::fs::write(&path, &image).unwrap();
        match Command::new("fsck.fat").arg("-vn").arg(&path).output() {
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
            Err(error) => eprintln!("fsck.fat is not tried: {error}"),
        }
        // Of util-linux, as udev makes /dev/disk/by-label.
        match Command::new("blkid").args(["-p", "-o", "value", "-s", "LABEL"]).arg(&path).output() {
            Ok(output) => assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "CIDATA"),
            Err(error) => eprintln!("blkid is not tried: {error}"),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_texts_are_read_back(
            user in prop::option::of("(?s).{0,3000}"),
            meta in "(?s).{0,3000}",
            network in prop::option::of("(?s).{0,3000}"),
        ) {
            let found = files(bytes(&of(&texts(user.as_deref(), Some(&meta), network.as_deref()))));
            let mut expect = owned(&[("user-data", user.as_deref().unwrap_or("")), ("meta-data", &meta)]);
            expect.extend(network.map(|text| ("network-config".to_owned(), text)));
            prop_assert_eq!(found, expect);
        }
    }
}
