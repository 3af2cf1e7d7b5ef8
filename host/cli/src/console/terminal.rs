// SPDX-License-Identifier: Apache-2.0

//! The user's terminal.

use std::{
    io::{self, IsTerminal, Read},
    thread,
};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::sync::mpsc;

/// A terminal that delivers keys as they are typed. Dropping this restores its former settings.
pub(super) struct Raw {
    before: Termios,
}

impl Raw {
    /// The terminal of standard input; None if standard input is not a terminal.
    pub(super) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Raw { before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

/// Keys from standard input, until its end. Nothing joins the thread that reads them: it may stay in `read` for ever.
pub(super) fn keys() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(16);
    thread::spawn(move || {
        let mut bytes = [0; 1024];
        loop {
            match io::stdin().read(&mut bytes) {
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    let keys = bytes.get(..count).unwrap_or_default().to_vec();
                    if sender.blocking_send(keys).is_err() {
                        return;
                    }
                }
            }
        }
    });
    receiver
}
