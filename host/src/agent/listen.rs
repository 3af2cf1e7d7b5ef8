// SPDX-License-Identifier: Apache-2.0

//! The listeners of the API: the Unix socket, and TCP on request.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, bail};
use api::{Gate, Listener, tls};
use options::{
    private_file::{self, Readers},
    token_file,
};
use rustix::fs::Gid;
use tokio::net::{TcpListener, UnixListener};

/// Options of where the API is served.
#[derive(Clone, Debug, clap::Args)]
pub struct ListenArgs {
    /// The permissions of the API's socket, in octal. A user with access to the socket may do
    /// everything.
    #[arg(long, value_name = "MODE", default_value = "0600", value_parser = mode)]
    pub socket_mode: u32,
    /// The group of the API's socket, by name or number; use it with --socket-mode 0660.
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,
    /// A TCP address to serve on besides the socket, for clients with a token (--token-file). All
    /// but loopback addresses need TLS. May be repeated.
    #[arg(long = "listen", value_name = "ADDRESS:PORT")]
    pub listen: Vec<SocketAddr>,
    /// The certificate for TCP and its intermediate certificates (PEM).
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "listen"])]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// A name by which clients may address the agent over TCP, beside its address and localhost. May be repeated.
    #[arg(long = "allowed-host", value_name = "NAME", requires = "listen")]
    pub allowed_hosts: Vec<String>,
}

/// Permissions in octal.
fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("write an octal number up to 0777, such as 0660".to_owned()),
    }
}

/// Binds all listeners.
pub(super) fn all(args: &ListenArgs, socket: &Path, tokens: Option<&Path>) -> anyhow::Result<Vec<Listener>> {
    let mut listeners = network(args, tokens)?;
    // Last, so that a client of the socket finds all listeners.
    let group = args.socket_group.as_deref().map(group).transpose()?;
    listeners.push(unix(socket, args.socket_mode, group)?.into());
    Ok(listeners)
}

fn network(args: &ListenArgs, tokens: Option<&Path>) -> anyhow::Result<Vec<Listener>> {
    if args.listen.is_empty() {
        return Ok(Vec::new());
    }
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(certificates), Some(key)) => {
            let read =
                |path: &PathBuf| fs::read(path).with_context(|| format!("{} cannot be read", path.display()));
            let key = private_file::read(key, "The private key (--tls-key)", Readers::GroupOfRoot)?;
            let acceptor = tls::acceptor(&read(certificates)?, &key);
            Some(acceptor.with_context(|| format!("Cannot use {} for TLS", certificates.display()))?)
        }
        _ => None,
    };
    let tokens = tokens.context("--listen needs --token-file: each request over TCP needs a token")?;
    let gate = Arc::new(Gate::new(token_file::read(tokens)?, args.allowed_hosts.clone()));
    let mut listeners = Vec::new();
    for address in &args.listen {
        if tls.is_none() && !address.ip().is_loopback() {
            bail!(
                "Other hosts can reach {address}, and tokens would cross the network in clear text: give \
                 --tls-cert and --tls-key, or listen on 127.0.0.1"
            );
        }
        let bound = std::net::TcpListener::bind(address)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .and_then(TcpListener::from_std)
            .with_context(|| format!("Cannot listen on {address} (--listen)"))?;
        // The port may have been left to the kernel.
        if let Ok(address) = bound.local_addr() {
            tracing::info!(%address, tls = tls.is_some(), "serves on TCP");
        }
        listeners.push(Listener::tcp(bound, Arc::clone(&gate), tls.clone()));
    }
    Ok(listeners)
}

/// A group's number. Names come from /etc/group only: the agent must not wait for a directory service.
fn group(name: &str) -> anyhow::Result<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let groups = fs::read_to_string("/etc/group").context("/etc/group cannot be read")?;
    let found = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    });
    found.with_context(|| format!("There is no group {name} in /etc/group (--socket-group)"))
}

/// Binds the API's socket, with its permissions from its first moment. Replaces a stale socket, but not a live one.
pub(super) fn unix(socket: &Path, mode: u32, group: Option<u32>) -> anyhow::Result<UnixListener> {
    let at = || format!("Cannot create the API's socket {} (--socket)", socket.display());
    if let Some(dir) = socket.parent() {
        fs::create_dir_all(dir).with_context(at)?;
    }
    match fs::symlink_metadata(socket) {
        Ok(found) if !found.file_type().is_socket() => bail!(
            "{} exists and is not a socket: remove it, or choose another path with --socket",
            socket.display()
        ),
        _ => {}
    }
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        bail!(
            "Another process serves on {}: stop it, or choose another socket with --socket",
            socket.display()
        );
    }
    // Made under a name of its own, then moved, so that no other user can connect before. The group comes before the mode,
    // which would otherwise admit the agent's own group.
    let fresh = socket.with_extension(format!("{}.new", std::process::id()));
    drop(fs::remove_file(&fresh));
    let listener = bind_private(&fresh).with_context(at)?;
    let placed = group
        .map_or(Ok(()), |group| {
            rustix::fs::chown(&fresh, None, Some(Gid::from_raw(group))).map_err(io::Error::from)
        })
        .and_then(|()| fs::set_permissions(&fresh, fs::Permissions::from_mode(mode)))
        .and_then(|()| fs::rename(&fresh, socket));
    if placed.is_err() {
        drop(fs::remove_file(&fresh));
    }
    placed.with_context(at)?;
    Ok(listener)
}

/// Binds a socket that only the agent may use yet, under a name that no client knows.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[tokio::test]
    async fn the_socket_has_the_mode_and_the_group_that_it_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        let own = rustix::process::getegid().as_raw();
        for (mode, group) in [(0o600, None), (0o660, Some(own))] {
            let listener = unix(&socket, mode, group).unwrap();
            let metadata = fs::metadata(&socket).unwrap();
            assert_eq!((metadata.mode() & 0o777, metadata.gid()), (mode, own));
            drop(listener);
        }
        if rustix::process::geteuid().is_root() {
            drop(unix(&socket, 0o660, Some(12_345)).unwrap());
            assert_eq!(fs::metadata(&socket).unwrap().gid(), 12_345);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no other name stays");
    }

    #[tokio::test]
    async fn only_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes");
        fs::write(&path, "precious").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for occupied in [&path, &link, &dir.path().to_owned()] {
            let error = unix(occupied, 0o600, None).unwrap_err().to_string();
            assert!(error.contains("not a socket") && error.contains("--socket"), "{error}");
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        let socket = dir.path().join("api.sock");
        drop(unix(&socket, 0o600, None).unwrap());
        let living = unix(&socket, 0o600, None).unwrap();
        assert!(unix(&socket, 0o600, None).unwrap_err().to_string().contains("Another process"));
        drop(living);
    }

    #[test]
    fn groups_and_modes_are_read() {
        assert_eq!((group("root").unwrap(), group("42").unwrap()), (0, 42));
        assert!(group("no such group").unwrap_err().to_string().contains("--socket-group"));
        assert_eq!((mode("0660"), mode("600")), (Ok(0o660), Ok(0o600)));
        for wrong in ["888", "1777", "rw", ""] {
            assert!(mode(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn tcp_has_a_token_always_and_tls_beyond_this_host() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        fs::write(&path, format!("ci:{}", "x".repeat(40))).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let args = |address: &str| ListenArgs {
            socket_mode: 0o600,
            socket_group: None,
            listen: vec![address.parse().unwrap()],
            tls_cert: None,
            tls_key: None,
            allowed_hosts: Vec::new(),
        };
        assert_eq!(network(&args("127.0.0.1:0"), Some(&path)).unwrap().len(), 1);
        let error = network(&args("127.0.0.1:0"), None).unwrap_err().to_string();
        assert!(error.contains("--token-file"), "{error}");
        let error = network(&args("0.0.0.0:0"), Some(&path)).unwrap_err().to_string();
        assert!(error.contains("--tls-cert"), "{error}");

        let key = dir.path().join("key.pem");
        fs::write(&key, "a key").unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
        let with_tls = ListenArgs { tls_cert: Some(path.clone()), tls_key: Some(key), ..args("0.0.0.0:0") };
        let error = network(&with_tls, Some(&path)).unwrap_err().to_string();
        assert!(error.contains("--tls-key") && error.contains("chmod 600"), "{error}");
    }
}
