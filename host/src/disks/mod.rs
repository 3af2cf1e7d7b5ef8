// SPDX-License-Identifier: Apache-2.0

//! The files of VMs' disks: opened with the rights of those who chose them, and locked.
//!
//! The agent never reads a disk's contents, because a guest writes them.

mod lock;
mod overlay;

use std::{
    fs::{self, File},
    io::{self, Seek as _, SeekFrom},
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
};

use api::{
    Caller,
    problem::{Problem, ProblemCode},
    types::{DiskCache, DiskFormat, DiskSpec},
};
use failpoints::{Point, reach};
use rustix::fs::{AtFlags, CWD, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, statx};

use self::lock::Use;
use crate::{
    environment::Environment,
    files::{self, FileError, Purpose},
};

/// Bytes of a sector: a disk has one at least.
const SECTOR: u64 = 512;
/// Bytes of a block without the host's cache. The last block of a file can be written only as a whole.
const BLOCK: u64 = 4096;
/// The most processes to look at for the user of a file.
const MOST_PROCESSES: usize = 4096;
/// The most descriptors of each.
const MOST_DESCRIPTORS: usize = 1024;

/// The open files of a disk.
#[derive(Debug)]
pub struct Opened {
    /// The disk's own file.
    pub file: File,
    /// Its backing files, the next one first.
    pub backing: Vec<File>,
    /// An empty file for the changes of an ephemeral disk.
    pub overlay: Option<File>,
}

/// The directories in which every caller may use disks.
#[derive(Clone, Debug, Default)]
pub struct Directories {
    /// For reading only.
    pub images: Vec<PathBuf>,
    /// For reading and writing.
    pub disks: Vec<PathBuf>,
    /// The directory for the changes of ephemeral disks.
    pub ephemeral: PathBuf,
}

impl Directories {
    /// Those of the agent.
    #[must_use]
    pub fn of(env: &Environment) -> Self {
        let (images, disks) = (env.image_dirs.clone(), env.disk_dirs.clone());
        Self { images, disks, ephemeral: env.ephemeral_dir.clone() }
    }
}

/// Opens and locks the disks of a VM, in their order, and makes files for the changes of ephemeral ones. All of `rights` must be able to use each of them. `others` are the
/// paths of disks of VMs that run, each behind its VM's name. Blocks: not for async code.
///
/// # Errors
/// A problem with the field of the first disk that cannot be used. The locks of those before it are gone then.
pub fn open_all(
    rights: &[Caller],
    dirs: &Directories,
    disks: &[DiskSpec],
    others: &[(String, String)],
) -> Result<Vec<Opened>, Problem> {
    let mut opened: Vec<(&DiskSpec, Opened)> = Vec::new();
    for (number, disk) in disks.iter().enumerate() {
        let user = |file: &File| {
            let wanted = identity(&file.metadata().ok()?);
            let is_wanted = |file: &File| file.metadata().is_ok_and(|data| identity(&data) == wanted);
            let uses = |other: &Opened| is_wanted(&other.file) || other.backing.iter().any(is_wanted);
            let own = opened.iter().find(|(_, other)| uses(other));
            if let Some((other, _)) = own {
                return Some(format!("the disk {} of the same VM", other.id));
            }
            let same = |path: &str| {
                let places = dirs.disks.iter().chain(&dirs.images).map(|dir| dir.join(path));
                let mut found = places.filter_map(|place| fs::metadata(place).ok());
                found.any(|data| identity(&data) == wanted)
            };
            let vm = others.iter().find(|(_, path)| same(path));
            vm.map(|(name, _)| format!("the VM {name}")).or_else(|| process_with(wanted))
        };
        let at = |place: String| {
            move |(code, detail)| Problem { field: Some(place.into()), ..Problem::new(code, detail) }
        };
        let read_only = disk.read_only || disk.ephemeral;
        let direct = disk.cache == DiskCache::None;
        let wanted = Wanted { path: &disk.path, format: disk.format, read_only, direct };
        let file = open(rights, dirs, wanted, user).map_err(at(format!("disks[{number}].path")))?;
        let mut backing = Vec::new();
        for (layer, spec) in disk.backing.iter().enumerate() {
            let wanted = Wanted { path: &spec.path, format: spec.format, read_only: true, direct: false };
            let place = format!("disks[{number}].backing[{layer}].path");
            backing.push(open(rights, dirs, wanted, user).map_err(at(place))?);
        }
        let overlay = disk.ephemeral.then(|| overlay::create(&dirs.ephemeral)).transpose();
        let overlay = overlay.map_err(|error| {
            let failed = (ProblemCode::EphemeralUnavailable, overlay::text(&dirs.ephemeral, &error));
            at(format!("disks[{number}].ephemeral"))(failed)
        })?;
        if overlay.is_some() {
            reach(Point::OpenOverlay);
        }
        opened.push((disk, Opened { file, backing, overlay }));
    }
    Ok(opened.into_iter().map(|(_, file)| file).collect())
}

/// The bytes for which the file system of a disk's file has room. None if the file cannot be found. Blocks: not for async
/// code.
#[must_use]
pub fn room(dirs: &Directories, path: &str) -> Option<u64> {
    let places = dirs.disks.iter().map(|dir| dir.join(path));
    let stat = places.chain([PathBuf::from(path)]).find_map(|place| rustix::fs::statvfs(place).ok())?;
    // The process of a VM is no root: it has none of the room that is reserved for root.
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

type Failed = (ProblemCode, String);

fn identity(data: &fs::Metadata) -> (u64, u64) {
    (data.dev(), data.ino())
}

/// One file to open.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    path: &'a str,
    format: DiskFormat,
    read_only: bool,
    /// The host's page cache is bypassed.
    direct: bool,
}

/// Opens and locks one file. `user` names another user of a file, in words.
fn open(
    rights: &[Caller],
    dirs: &Directories,
    disk: Wanted<'_>,
    user: impl Fn(&File) -> Option<String>,
) -> Result<File, Failed> {
    let (purpose, usage) =
        if disk.read_only { (Purpose::ReadDisk, Use::Read) } else { (Purpose::WriteDisk, Use::Write) };
    let mut searched = dirs.disks.clone();
    if disk.read_only {
        searched.extend(dirs.images.iter().cloned());
    }
    let mut file = files::open_for_all(rights, purpose, &searched, disk.path).map_err(|error| {
        let code = match error {
            FileError::Missing { .. } => ProblemCode::DiskNotFound,
            _ => ProblemCode::DiskUnreadable,
        };
        (code, text::chain(&error))
    })?;
    let failed = |error: &io::Error| {
        (ProblemCode::DiskUnreadable, format!("The disk {} cannot be used: {error}.", disk.path))
    };
    lock::lock(&file, usage).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => (ProblemCode::DiskInUse, in_use(disk, user(&file))),
        _ => failed(&error),
    })?;
    reach(Point::OpenLocked);
    let size = file.seek(SeekFrom::End(0)).map_err(|error| failed(&error))?;
    if disk.format == DiskFormat::Raw && size < SECTOR {
        let detail = format!(
            "The disk {} has {size} bytes, less than a sector: make it longer (truncate --size=8G {}).",
            disk.path, disk.path
        );
        return Err((ProblemCode::DiskInvalid, detail));
    }
    if disk.direct {
        if disk.format == DiskFormat::Raw && !size.is_multiple_of(BLOCK) {
            let detail = format!(
                "The disk {} has {size} bytes, and without the host's cache it needs a multiple of {BLOCK}: make it longer \
                 (truncate --size=%{BLOCK} {}), or leave out cache.",
                disk.path, disk.path
            );
            return Err((ProblemCode::DiskInvalid, detail));
        }
        let flags = fcntl_getfl(&file).map_err(|error| failed(&error.into()))?;
        fcntl_setfl(&file, flags | OFlags::DIRECT).map_err(|error| {
            let detail = format!(
                "The file system of the disk {} cannot bypass the host's cache ({error}): leave out cache, or move the file.",
                disk.path
            );
            (ProblemCode::DiskInvalid, detail)
        })?;
    }
    Ok(file)
}

/// The text of a lock that another user of the file holds.
fn in_use(disk: Wanted<'_>, user: Option<String>) -> String {
    let user = user.unwrap_or_else(|| "another process".to_owned());
    let cure = if disk.read_only {
        "end that use, or give the VM a copy"
    } else {
        "end that use, give the VM a copy, or make the disk read_only or ephemeral for all its users"
    };
    format!("The disk {} is in use by {user}: {cure}.", disk.path)
}

/// A process that has the file open, in words: a lock does not name its owner (`F_OFD_GETLK`). None if the agent may not look
/// at it, as under systemd.
fn process_with(wanted: (u64, u64)) -> Option<String> {
    let own = std::process::id();
    let pids =
        fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != own).take(MOST_PROCESSES).find_map(|pid: u32| {
        let mut fds = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten().take(MOST_DESCRIPTORS);
        // Without a wait for the server of a network file system.
        let flags = AtFlags::STATX_DONT_SYNC;
        let wanted_fd = |path: PathBuf| {
            let data = statx(CWD, path, flags, StatxFlags::INO).ok()?;
            let device = rustix::fs::makedev(data.stx_dev_major, data.stx_dev_minor);
            (device == wanted.0 && data.stx_ino == wanted.1).then_some(())
        };
        fds.find_map(|fd| wanted_fd(fd.path()))?;
        let program = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Some(format!("process {pid} ({})", program.trim()))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use api::User;

    use super::*;

    struct Place {
        root: tempfile::TempDir,
        dirs: Directories,
    }

    fn place() -> Place {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().canonicalize().unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        for dir in ["images", "disks", "home"] {
            fs::create_dir(path.join(dir)).unwrap();
        }
        for (name, size, mode) in [
            ("images/base", 4096, 0o600),
            ("disks/web1", 4096, 0o600),
            ("disks/short", 511, 0o600),
            ("home/root-only", 4096, 0o600),
            ("home/readable", 4096, 0o644),
            ("home/open", 4096, 0o666),
        ] {
            let file = File::create(path.join(name)).unwrap();
            file.set_len(size).unwrap();
            file.set_permissions(fs::Permissions::from_mode(mode)).unwrap();
        }
        let dirs = Directories {
            images: vec![path.join("images")],
            disks: vec![path.join("disks")],
            ephemeral: path.join("ephemeral"),
        };
        Place { root, dirs }
    }

    fn me() -> Caller {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Caller::User(User { uid, gid, pid: None })
    }

    fn stranger() -> Caller {
        Caller::User(User { uid: 65_534, gid: 65_534, pid: None })
    }

    fn disk(path: &str, read_only: bool) -> DiskSpec {
        serde_json::from_value(serde_json::json!({
            "id": "root", "path": path, "format": "raw", "read_only": read_only,
        }))
        .unwrap()
    }

    fn outcome(place: &Place, callers: &[Caller], path: &str, read_only: bool) -> String {
        let path =
            path.replace("HOME", place.root.path().canonicalize().unwrap().join("home").to_str().unwrap());
        match open_all(callers, &place.dirs, &[disk(&path, read_only)], &[]) {
            Ok(_) => "ok".into(),
            Err(problem) => {
                assert_eq!(problem.field.as_deref(), Some("disks[0].path"), "{problem}");
                problem.code.as_str().to_owned()
            }
        }
    }

    #[test]
    fn directories_are_open_to_all_and_elsewhere_rights_decide() {
        let place = place();
        let token = Caller::Token("ci".into());
        for (path, read_only, everybody) in [
            ("web1", false, "ok"),
            ("web1", true, "ok"),
            ("base", true, "ok"),
            ("base", false, "disk_not_found"),
            ("absent", true, "disk_not_found"),
            ("short", false, "disk_invalid"),
        ] {
            for caller in [me(), token.clone()] {
                assert_eq!(
                    outcome(&place, std::slice::from_ref(&caller), path, read_only),
                    everybody,
                    "{path} for {caller:?}"
                );
            }
        }
        assert_eq!(outcome(&place, &[token], "HOME/open", true), "disk_unreadable");
        assert_eq!(outcome(&place, &[me()], "HOME/root-only", false), "ok");
        assert_eq!(outcome(&place, &[me()], "HOME", false), "disk_unreadable", "a directory");
        assert_eq!(outcome(&place, &[me()], "/dev/null", false), "disk_unreadable", "no block device");
        if !rustix::process::geteuid().is_root() {
            eprintln!("not root: opening with other users' rights is not tested");
            return;
        }
        for (path, read_only, expect) in [
            ("HOME/root-only", true, "disk_unreadable"),
            ("HOME/readable", true, "ok"),
            ("HOME/readable", false, "disk_unreadable"),
            ("HOME/open", false, "ok"),
        ] {
            assert_eq!(outcome(&place, &[stranger()], path, read_only), expect, "{path}");
            assert_eq!(
                outcome(&place, &[me(), stranger()], path, read_only),
                expect,
                "{path}: all must have the right"
            );
        }
    }

    #[test]
    fn an_ephemeral_disk_needs_the_rights_of_reading_and_has_a_file_without_a_name() {
        let place = place();
        let ephemeral = |path: &str| DiskSpec { ephemeral: true, ..disk(path, false) };
        let open = |caller: Caller, path: &str| {
            let path = path
                .replace("HOME", place.root.path().canonicalize().unwrap().join("home").to_str().unwrap());
            open_all(&[caller], &place.dirs, &[ephemeral(&path)], &[])
        };
        let base = open(me(), "base").expect("a base in an image directory");
        let again = open(Caller::Token("ci".into()), "base").expect("shared");
        let write = |file: &File| std::os::unix::fs::FileExt::write_all_at(file, b"x", 0);
        for Opened { file, overlay, .. } in base.iter().chain(&again) {
            write(file).expect_err("the base is only read");
            let overlay = overlay.as_ref().unwrap();
            write(overlay).unwrap();
            let data = overlay.metadata().unwrap();
            assert_eq!((data.nlink(), data.mode() & 0o777), (0, 0o600));
            let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(overlay));
            let link =
                rustix::fs::linkat(CWD, name, CWD, place.root.path().join("name"), AtFlags::SYMLINK_FOLLOW);
            assert_eq!(link, Err(rustix::io::Errno::NOENT), "it never gets a name");
        }
        assert_eq!(fs::metadata(&place.dirs.ephemeral).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::read_dir(&place.dirs.ephemeral).unwrap().count(), 0);
        assert!(open_all(&[me()], &place.dirs, &[disk("web1", true)], &[]).unwrap()[0].overlay.is_none());
        if rustix::process::geteuid().is_root() {
            open(stranger(), "HOME/readable").expect("no right to write");
            assert_eq!(open(stranger(), "HOME/root-only").unwrap_err().code, ProblemCode::DiskUnreadable);
        }
    }

    #[test]
    fn a_disk_in_use_names_its_user_and_a_failure_keeps_no_lock() {
        let place = place();
        let disks = [disk("web1", false), DiskSpec { id: "data".parse().unwrap(), ..disk("web1", false) }];
        let problem = open_all(&[me()], &place.dirs, &disks, &[]).unwrap_err();
        assert!(problem.detail.contains("the disk root of the same VM"), "{problem}");
        assert_eq!((problem.code, problem.field.as_deref()), (ProblemCode::DiskInUse, Some("disks[1].path")));
        let files =
            open_all(&[me()], &place.dirs, &disks[..1], &[]).expect("the failure has released its locks");
        let path = place.dirs.disks[0].join("web1");
        let mut holder =
            std::process::Command::new("sleep").arg("60").stdin(File::open(&path).unwrap()).spawn().unwrap();
        let detail = |others: &[(String, String)]| {
            open_all(&[me()], &place.dirs, &disks[..1], others).unwrap_err().detail
        };
        let detail_of_process = detail(&[]);
        assert!(
            detail_of_process.contains(&format!("process {} (sleep)", holder.id())),
            "{detail_of_process}"
        );
        for path in ["web1".to_owned(), path.display().to_string()] {
            assert!(detail(&[("alice".into(), path)]).contains("is in use by the VM alice"));
        }
        holder.kill().unwrap();
        holder.wait().unwrap();
        drop(files);
        assert_eq!(outcome(&place, &[me()], "web1", true), "ok");
    }
}
