// SPDX-License-Identifier: Apache-2.0

//! Opens the files that a request names: kernels, initramfs, disks.
//!
//! The agent is root, its callers need not be. The agent opens a file if it lies in a directory for that, or with the caller's
//! own rights: a thread takes on the caller's file system user and group (and no supplementary group) for the one call, so
//! that there is no moment between a check and its use.

use std::{
    fs::{self, File},
    io,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
    thread,
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, fstatfs, open, openat2},
    io::Errno,
    process::{getegid, geteuid},
};

use api::{Caller, User};

/// The purpose of opening a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A guest boots it: a regular file, for reading.
    Boot,
    /// A guest's disk: a regular file or a block device, for reading.
    ReadDisk,
    /// The same, for reading and writing.
    WriteDisk,
}

impl Purpose {
    /// The directories for this purpose, in words.
    fn directories(self) -> &'static str {
        match self {
            Self::Boot => "image directory",
            Self::ReadDisk => "image or disk directory",
            Self::WriteDisk => "disk directory",
        }
    }

    /// The agent's option for these directories.
    fn option(self) -> &'static str {
        if self == Self::WriteDisk { "--disk-dir" } else { "--image-dir" }
    }

    /// The needed right, in words.
    fn right(self) -> &'static str {
        if self == Self::WriteDisk { "writing" } else { "reading" }
    }

    /// The same as an adjective.
    fn able(self) -> &'static str {
        if self == Self::WriteDisk { "writable" } else { "readable" }
    }

    fn allows(self, kind: FileType) -> bool {
        kind == FileType::RegularFile || (self != Self::Boot && kind == FileType::BlockDevice)
    }

    fn flags(self) -> OFlags {
        if self == Self::WriteDisk { OFlags::RDWR } else { OFlags::RDONLY }
    }
}

/// Why a file cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file does not exist (or not in any of the directories, for a relative path).
    #[error(
        "There is no file {path}{}: {}check the path; relative ones are looked up in {}",
        at(*.purpose, .dirs), meant(.near), list(*.purpose, .dirs)
    )]
    Missing {
        /// The path in the request.
        path: String,
        /// The purpose of opening it.
        purpose: Purpose,
        /// The directories that were searched; none for an absolute path.
        dirs: Vec<PathBuf>,
        /// Files there with nearly this name.
        near: Vec<String>,
    },
    /// The file is opened with the rights of a user that may not read it.
    #[error(
        "The agent opens {path} with the rights of {who}, which do not allow {} it: make it {} \
         for that user, or put it into {} ({})",
        .purpose.right(), .purpose.able(), article(.purpose.directories()), .purpose.option()
    )]
    Unreadable {
        /// The path in the request.
        path: String,
        /// The purpose of opening it.
        purpose: Purpose,
        /// The caller, or the author of a part of `boot`.
        who: String,
    },
    /// The file is looked up in a directory for its purpose, and its name leads out of it.
    #[error(
        "{path} leads out of the directory {} by a link or by .., and only files in it are open to \
         every caller: copy the file, or the target of the link, into the directory",
        .dir.display()
    )]
    LeadsOut {
        /// The path in the request.
        path: String,
        /// The directory.
        dir: PathBuf,
    },
    /// The path leads through too many links, or a magic one.
    #[error(
        "{path} leads through a link to itself, through too many links, or a link of procfs: name the file itself"
    )]
    Loop {
        /// The path in the request.
        path: String,
    },
    /// The path led to another file a moment later.
    #[error("{path} was replaced while it was opened: try again")]
    Replaced {
        /// The path in the request.
        path: String,
    },
    /// The file system, or the file itself, does not allow writing.
    #[error(
        "{path} lies in a file system that is read-only for the agent: under systemd, allow the agent to write there \
         (ReadWritePaths= in a drop-in of its unit), or make the disk read_only or ephemeral"
    )]
    ReadOnly {
        /// The path in the request.
        path: String,
    },
    /// The path leads to a directory, device, pipe or socket, or to a file of procfs or its like.
    #[error("{path} is not a regular file but {what}")]
    NotRegular {
        /// The path in the request.
        path: String,
        /// The kind of file, in words.
        what: &'static str,
    },
    /// Another error.
    #[error("{path} cannot be opened")]
    Io {
        /// The path in the request.
        path: String,
        /// The cause.
        source: io::Error,
    },
}

fn at(purpose: Purpose, dirs: &[PathBuf]) -> String {
    if dirs.is_empty() { String::new() } else { format!(" in any {}", purpose.directories()) }
}

fn article(noun: &str) -> String {
    let article = if noun.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {noun}")
}

fn meant(near: &[String]) -> String {
    if near.is_empty() {
        String::new()
    } else {
        format!("did you mean {}? Otherwise ", api::missing::or(near))
    }
}

/// The most entries of each image directory to read for a message.
const MOST_IMAGES: usize = 1000;

/// Files with nearly this name. Every caller may use them, so their names disclose nothing. Other directories are not read.
fn near_images(dirs: &[PathBuf], path: &str) -> Vec<String> {
    let entries =
        dirs.iter().filter_map(|dir| fs::read_dir(dir).ok()).flat_map(|entries| entries.take(MOST_IMAGES));
    let files = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
    let names = files.filter_map(|entry| entry.file_name().into_string().ok());
    api::missing::near(path, names.filter(|name| !name.starts_with('.')))
}

fn list(purpose: Purpose, dirs: &[PathBuf]) -> String {
    if dirs.is_empty() {
        let (kind, _) = purpose.directories().rsplit_once(' ').unwrap_or_default();
        return format!("the {kind} directories ({})", purpose.option());
    }
    dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Opens `path`, if each of `callers` may do so; there must be at least one caller. Blocks: not for async code.
///
/// # Errors
/// See [`FileError`].
pub fn open_for_all(
    callers: &[Caller],
    purpose: Purpose,
    dirs: &[PathBuf],
    path: &str,
) -> Result<File, FileError> {
    let identity = |file: &File| fstat(file).map(|stat| (stat.st_dev, stat.st_ino)).ok();
    let mut first: Option<File> = None;
    for caller in callers {
        let file = open_for(caller, purpose, dirs, path)?;
        match &first {
            None => first = Some(file),
            Some(first) if identity(first).is_some() && identity(first) == identity(&file) => {}
            Some(_) => return Err(FileError::Replaced { path: path.to_owned() }),
        }
    }
    first.ok_or_else(|| FileError::Unreadable { path: path.to_owned(), purpose, who: "nobody".to_owned() })
}

/// Opens `path` on behalf of `caller`. Blocks: not for async code.
/// A caller with a token is not a user of this host, and gets files of `dirs` only.
///
/// # Errors
/// See [`FileError`].
pub fn open_for(caller: &Caller, purpose: Purpose, dirs: &[PathBuf], path: &str) -> Result<File, FileError> {
    let wanted = Path::new(path);
    if !wanted.is_absolute() {
        for dir in dirs {
            match beneath(purpose, dir, wanted) {
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(Errno::XDEV) => {
                    return Err(FileError::LeadsOut { path: path.to_owned(), dir: dir.clone() });
                }
                found => return finish(found, purpose, path, caller),
            }
        }
        return Err(FileError::Missing {
            path: path.to_owned(),
            purpose,
            dirs: dirs.to_vec(),
            near: near_images(dirs, path),
        });
    }
    let mut left = None;
    for dir in dirs {
        // A path with `..` only seems to lie in the directory.
        let inside = wanted.strip_prefix(dir).ok().filter(|rest| {
            !rest.as_os_str().is_empty() && rest.components().all(|part| matches!(part, Component::Normal(_)))
        });
        match inside.map(|rest| beneath(purpose, dir, rest)) {
            // A link that leads out of the directory does not belong to it: the caller's own rights decide.
            None => {}
            Some(Err(Errno::XDEV)) => left = Some(dir),
            Some(found) => return finish(found, purpose, path, caller),
        }
    }
    with_own_rights(caller, purpose, wanted, path).map_err(|error| match (error, left) {
        // The link is the cause: its author expected the directory's rule.
        (FileError::Unreadable { path, .. }, Some(dir)) => FileError::LeadsOut { path, dir: dir.clone() },
        (error, _) => error,
    })
}

/// Opens an absolute path with the rights of the caller alone.
fn with_own_rights(caller: &Caller, purpose: Purpose, wanted: &Path, path: &str) -> Result<File, FileError> {
    let io = |source: io::Error| FileError::Io { path: path.to_owned(), source };
    let Caller::User(user) = caller else {
        return Err(FileError::Unreadable { path: path.to_owned(), purpose, who: caller.to_string() });
    };
    if user.uid == geteuid().as_raw() {
        let found = regular(purpose, CWD, wanted, ResolveFlags::NO_MAGICLINKS);
        return finish(found, purpose, path, caller);
    }
    let (user, target) = (*user, wanted.to_owned());
    let found = thread::Builder::new()
        .name("open-as-caller".into())
        .spawn(move || {
            become_for_files(user)?;
            regular(purpose, CWD, &target, ResolveFlags::NO_MAGICLINKS)
        })
        .map_err(io)?
        .join()
        .unwrap_or(Err(Errno::FAULT));
    finish(found, purpose, path, caller)
}

/// The file at a path.
enum Found {
    File(OwnedFd),
    Other(&'static str),
}

fn beneath(purpose: Purpose, dir: &Path, path: &Path) -> Result<Found, Errno> {
    let dir = open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    regular(purpose, dir, path, ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS)
}

/// File systems (`statfs(2)`) with regular files that are no files: a read asks the kernel, as often as not about the process
/// that opened the file, and that would be the agent. procfs, sysfs, debugfs, tracefs, cgroup 1 and 2, securityfs, configfs,
/// bpf, pstore, efivarfs, binfmt_misc, SELinux.
const PSEUDO: [u32; 13] = [
    0x9fa0,
    0x6265_6572,
    0x6462_6720,
    0x7472_6163,
    0x0027_e0eb,
    0x6367_7270,
    0x7363_6673,
    0x6265_6570,
    0xcafe_4a11,
    0x6165_676c,
    0xde5e_81e4,
    0x4249_4e4d,
    0xf97c_ff8c,
];

/// Opens a file of a kind that its purpose allows. The kind is checked before the file is opened, because opening a pipe waits
/// for its writer, and opening a device may do anything.
fn regular(
    purpose: Purpose,
    dir: impl std::os::fd::AsFd,
    path: &Path,
    resolve: ResolveFlags,
) -> Result<Found, Errno> {
    let found = openat2(dir, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?;
    let kind = FileType::from_raw_mode(fstat(&found)?.st_mode);
    if !purpose.allows(kind) {
        return Ok(Found::Other(describe(kind)));
    }
    let system = fstatfs(&found)?.f_type;
    if PSEUDO.iter().any(|pseudo| i64::from(*pseudo) == system) {
        return Ok(Found::Other("a view of the kernel"));
    }
    // The very file that was checked, even if its name leads to another one by now. The kernel checks its permissions here.
    let name = format!("/proc/thread-self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&found));
    // Does not wait for a process with a lease on the file (fcntl(2)).
    let flags = purpose.flags() | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    open(name, flags, Mode::empty()).map(Found::File)
}

fn finish(
    found: Result<Found, Errno>,
    purpose: Purpose,
    path: &str,
    caller: &Caller,
) -> Result<File, FileError> {
    let path = path.to_owned();
    match found {
        Ok(Found::File(fd)) => Ok(fd.into()),
        Ok(Found::Other(what)) => Err(FileError::NotRegular { path, what }),
        Err(Errno::NOENT | Errno::NOTDIR) => {
            Err(FileError::Missing { path, purpose, dirs: Vec::new(), near: Vec::new() })
        }
        Err(Errno::ACCESS | Errno::PERM) => {
            Err(FileError::Unreadable { path, purpose, who: caller.to_string() })
        }
        Err(Errno::ROFS) => Err(FileError::ReadOnly { path }),
        Err(Errno::LOOP) => Err(FileError::Loop { path }),
        Err(error) => Err(FileError::Io { path, source: error.into() }),
    }
}

fn describe(kind: FileType) -> &'static str {
    match kind {
        FileType::Directory => "a directory",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        _ => "something else",
    }
}

/// Gives the calling thread the caller's rights on files, and no more. The thread must end afterwards.
///
/// Sets the file system ids, not the real or effective ones: with those the caller could signal the thread, and so end the
/// agent. Changing them from 0 also takes CAP_DAC_OVERRIDE and its like from the thread (capabilities(7)).
fn become_for_files(caller: User) -> Result<(), Errno> {
    if geteuid().is_root() {
        rustix::thread::set_thread_groups(&[])?;
    } else if getegid().as_raw() != caller.gid {
        return Err(Errno::PERM);
    }
    // SAFETY: plain system calls on numbers; they change this thread's credentials only.
    unsafe { libc::setfsgid(caller.gid) };
    // SAFETY: as above.
    unsafe { libc::setfsuid(caller.uid) };
    // The calls report no error; a call with an impossible id returns the id that is set.
    // SAFETY: as above.
    let gid = unsafe { libc::setfsgid(libc::gid_t::MAX) };
    // SAFETY: as above.
    let uid = unsafe { libc::setfsuid(libc::uid_t::MAX) };
    if u32::try_from(gid) == Ok(caller.gid) && u32::try_from(uid) == Ok(caller.uid) {
        Ok(())
    } else {
        Err(Errno::PERM)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::Read,
        os::unix::{fs::PermissionsExt, fs::symlink, net::UnixListener},
    };

    use super::*;

    struct Place {
        _dir: tempfile::TempDir,
        root: PathBuf,
        images: PathBuf,
    }

    fn place() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let images = root.join("images");
        fs::create_dir(&images).unwrap();
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
        for (name, mode) in [("images/kernel", 0o600), ("secret", 0o600), ("public", 0o644)] {
            fs::write(root.join(name), name).unwrap();
            fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        Place { _dir: dir, root, images }
    }

    fn me() -> Caller {
        Caller::User(User { uid: geteuid().as_raw(), gid: getegid().as_raw(), pid: None })
    }

    const STRANGER: Caller = Caller::User(User { uid: 65_534, gid: 65_534, pid: None });

    /// Checks the result of opening: the file's text, or the name of the error.
    fn check(place: &Place, caller: &Caller, path: &str, expect: &str) {
        let path = path.replace("ROOT", place.root.to_str().unwrap());
        let got = match open_for(caller, Purpose::Boot, std::slice::from_ref(&place.images), &path) {
            Ok(mut file) => {
                let mut text = String::new();
                file.read_to_string(&mut text).unwrap();
                text
            }
            Err(FileError::Missing { .. }) => "missing".into(),
            Err(FileError::Unreadable { .. }) => "unreadable".into(),
            Err(FileError::NotRegular { what, .. }) => what.into(),
            Err(FileError::Io { source, .. }) => source.to_string(),
            Err(FileError::Replaced { .. }) => "replaced".to_owned(),
            Err(FileError::ReadOnly { .. }) => "read-only".to_owned(),
            Err(FileError::LeadsOut { .. }) => "leads out".to_owned(),
            Err(FileError::Loop { .. }) => "loop".to_owned(),
        };
        assert_eq!(got, expect, "{path} for {caller:?}");
    }

    #[test]
    fn image_directories_serve_everybody_and_nothing_outside_of_them() {
        let place = place();
        symlink("../secret", place.images.join("out")).unwrap();
        symlink("kernel", place.images.join("in")).unwrap();
        symlink("../images/kernel", place.images.join("round")).unwrap();
        symlink("self", place.images.join("self")).unwrap();
        for caller in [me(), STRANGER, Caller::Token("ci".into())] {
            check(&place, &caller, "kernel", "images/kernel");
            check(&place, &caller, "in", "images/kernel");
            check(&place, &caller, "ROOT/images/kernel", "images/kernel");
            check(&place, &caller, "absent", "missing");
            check(&place, &caller, "kernel/x", "missing");
            check(&place, &caller, "../secret", "leads out");
            check(&place, &caller, "out", "leads out");
            check(&place, &caller, "round", "leads out");
            check(&place, &caller, "self", "loop");
            check(&place, &caller, "ROOT/images/self", "loop");
        }
        check(&place, &Caller::Token("ci".into()), "ROOT/images/out", "leads out");
        let error = open_for(&me(), Purpose::Boot, std::slice::from_ref(&place.images), "out")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("link") && error.contains("copy") && !error.contains("with the rights"),
            "{error}"
        );
    }

    #[test]
    fn elsewhere_the_caller_s_own_rights_decide() {
        let place = place();
        check(&place, &me(), "ROOT/secret", "secret");
        check(&place, &me(), "ROOT/absent", "missing");
        check(&place, &me(), "ROOT/public", "public");
        // A token is not a user of this host.
        check(&place, &Caller::Token("ci".into()), "ROOT/public", "unreadable");
        if !geteuid().is_root() {
            check(&place, &STRANGER, "ROOT/public", "unreadable");
            eprintln!("not root: opening with other users' rights is not tested");
            return;
        }
        check(&place, &STRANGER, "ROOT/public", "public");
        check(&place, &STRANGER, "ROOT/secret", "unreadable");
        check(&place, &STRANGER, "ROOT/images/../secret", "unreadable");
        symlink("../secret", place.images.join("out")).unwrap();
        check(&place, &STRANGER, "ROOT/images/out", "leads out");
        check(&place, &me(), "ROOT/images/out", "secret");
        // The thread with the stranger's rights is gone: the agent's own are as before.
        check(&place, &me(), "ROOT/secret", "secret");
        // Only root's supplementary groups would give access.
        fs::set_permissions(place.root.join("secret"), fs::Permissions::from_mode(0o040)).unwrap();
        check(&place, &STRANGER, "ROOT/secret", "unreadable");
    }

    #[test]
    fn only_regular_files_are_opened() {
        let place = place();
        let _socket = UnixListener::bind(place.root.join("socket")).unwrap();
        rustix::fs::mknodat(CWD, place.root.join("pipe"), FileType::Fifo, Mode::from(0o666), 0).unwrap();
        check(&place, &me(), "ROOT/images", "a directory");
        check(&place, &me(), "ROOT/socket", "a socket");
        check(&place, &me(), "ROOT/pipe", "a pipe");
        check(&place, &me(), "/dev/null", "a device");
        check(&place, &me(), "/proc/self/fd/0", "loop");
    }

    /// A thread with the caller's rights is still the agent's: the caller may not read procfs's view of the agent.
    #[test]
    fn nothing_of_the_agent_itself_is_opened() {
        let place = place();
        symlink("/proc/self/maps", place.images.join("maps")).unwrap();
        symlink("/proc/self/maps", place.root.join("maps")).unwrap();
        for caller in [me(), STRANGER] {
            if !geteuid().is_root() && caller == STRANGER {
                continue;
            }
            for path in
                ["/proc/self/maps", "/proc/self/status", "/proc/thread-self/stat", "/proc/self/task/../maps"]
            {
                check(&place, &caller, path, "a view of the kernel");
            }
            check(&place, &caller, "ROOT/maps", "a view of the kernel");
            check(&place, &caller, "ROOT/images/maps", "a view of the kernel");
            check(&place, &caller, "/sys/kernel/mm/transparent_hugepage/enabled", "a view of the kernel");
            for path in
                ["/proc/self/root/etc/passwd", "/proc/self/cwd/Cargo.toml", "/proc/self/exe", "/dev/fd/0"]
            {
                let refused = open_for(&caller, Purpose::Boot, &[], path).unwrap_err();
                // The kernel decides which of both comes first.
                assert!(
                    matches!(refused, FileError::Unreadable { .. } | FileError::Loop { .. }),
                    "{path}: {refused}"
                );
            }
        }
        // A name in an image directory is not even followed.
        check(&place, &me(), "maps", "leads out");
    }

    #[test]
    fn files_of_other_vms_are_those_of_the_agent() {
        let place = place();
        let directory = place.root.join("run");
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(directory.join("console"), "secret").unwrap();
        symlink("../run/console", place.images.join("console")).unwrap();
        let token = Caller::Token("ci".into());
        check(&place, &token, "ROOT/run/console", "unreadable");
        check(&place, &token, "ROOT/images/console", "leads out");
        if geteuid().is_root() {
            check(&place, &STRANGER, "ROOT/run/console", "unreadable");
            check(&place, &STRANGER, "ROOT/images/console", "leads out");
        }
    }

    #[test]
    fn who_has_a_lease_on_a_file_does_not_hold_up_the_agent() {
        /// `asm-generic/fcntl.h`; libc does not have it.
        const F_SETSIG: i32 = 10;
        let place = place();
        let path = place.root.join("leased");
        fs::write(&path, "leased").unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        // SAFETY: a plain call on a descriptor that is open; it changes no memory. The signal that says that the lease is
        // to be broken is SIGURG in place of SIGIO, which would end the process.
        let own_signal =
            unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&file), F_SETSIG, libc::SIGURG) };
        assert_eq!(own_signal, 0);
        // SAFETY: as above.
        let leased =
            unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&file), libc::F_SETLEASE, libc::F_WRLCK) };
        assert_eq!(leased, 0, "{}", io::Error::last_os_error());
        let begun = std::time::Instant::now();
        check(&place, &me(), "ROOT/leased", &io::Error::from_raw_os_error(libc::EAGAIN).to_string());
        assert!(begun.elapsed() < std::time::Duration::from_secs(5));
    }
}
