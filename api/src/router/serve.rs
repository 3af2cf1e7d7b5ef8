//! Serving on a Unix socket.

use std::{io, time::Duration};

use axum::{Router, extract::connect_info::Connected, serve::IncomingStream};
use tokio::{net::UnixListener, sync::oneshot};

use crate::Caller;

/// How long requests may go on after the order to end (console streams would go on for ever).
const GRACE: Duration = Duration::from_secs(2);

/// The process at the other end of a connection; None if the kernel did not tell.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub Option<Caller>);

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let caller =
            stream.io().peer_cred().map(|cred| Caller { uid: cred.uid(), gid: cred.gid(), pid: cred.pid() });
        Peer(caller.inspect_err(|error| tracing::warn!(%error, "no credentials of an API client")).ok())
    }
}

/// Serves until `end` completes, then lets requests finish for two seconds.
///
/// # Errors
/// None at present: `accept` is tried again after errors.
pub async fn serve(
    listener: UnixListener,
    router: Router,
    end: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let (told, ending) = oneshot::channel();
    let graceful = axum::serve(listener, router.into_make_service_with_connect_info::<Peer>())
        .with_graceful_shutdown(async move {
            end.await;
            let _ = told.send(());
        })
        .into_future();
    tokio::select! {
        result = graceful => result,
        () = async { let _ = ending.await; tokio::time::sleep(GRACE).await } => Ok(()),
    }
}
