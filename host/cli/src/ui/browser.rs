// SPDX-License-Identifier: Apache-2.0

//! Opens a browser.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use uuid::Uuid;

/// A file that leads to the link. Dropping this removes it.
#[derive(Debug)]
pub(super) struct Way(PathBuf);

impl Drop for Way {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.0));
    }
}

/// Opens a browser where there is a display, and not for root: browsers refuse that, for good reasons. The browser's
/// command line has a file of this user, and not the link itself, because every user of this host can read command lines.
pub(super) fn open(url: &str) -> Option<Way> {
    let display = ["DISPLAY", "WAYLAND_DISPLAY"].iter().any(|name| std::env::var_os(name).is_some());
    if !display || rustix::process::geteuid().is_root() {
        return None;
    }
    let way = write(url).ok()?;
    let mut command = Command::new("xdg-open");
    command.arg(&way.0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().ok()?;
    // `xdg-open` ends once the browser has the file; reaped so that it does not stay as a zombie.
    std::thread::spawn(move || drop(child.wait()));
    Some(way)
}

/// Writes the file, in a directory that is removed with the user's session if there is one.
fn write(url: &str) -> io::Result<Way> {
    let directory = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let way = Way(directory.join(format!("portcullis-ui-{}.html", Uuid::new_v4().simple())));
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&way.0)?;
    // The address has digits, dots and hexadecimal only, so that HTML needs no escapes.
    writeln!(
        file,
        "<!doctype html><meta http-equiv=\"refresh\" content=\"0;url={url}\"><title>Portcullis</title>"
    )?;
    Ok(way)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn the_link_is_in_a_private_file_that_goes() {
        let way = write("http://127.0.0.1:1/#0123").unwrap();
        let path = way.0.clone();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(fs::read_to_string(&path).unwrap().contains("url=http://127.0.0.1:1/#0123\""));
        drop(way);
        assert!(!path.exists());
    }
}
