// SPDX-License-Identifier: Apache-2.0

//! The guest's serial output as a bounded log in a file that outlives agent and vmm.
//!
//! A ring: one header page that begins with the count of bytes ever written (little-endian `u64`), then
//! [`RING`] bytes of data; byte number *n* lies at `4096 + n % RING`. Data are written before the count, so a reader
//! that sees the count sees the bytes. Writing never waits for a reader.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use vmm_sys_util::eventfd::EventFd;

/// Bytes of the header page.
pub const HEADER: u64 = 4096;
/// Bytes of output that are kept.
pub const RING: u64 = 1 << 20;

/// Signals the event loop that the console has grown.
#[derive(Debug)]
pub struct Watch {
    written: AtomicU64,
    /// Whether the event loop waits. A signal without a waiter would cost a system call per character.
    wanted: AtomicBool,
    grown: EventFd,
}

impl Watch {
    /// Bytes ever written.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    /// Requests one signal of [`Watch::event`] at the next output.
    pub fn want(&self) {
        self.wanted.store(true, Ordering::SeqCst);
    }

    /// Becomes readable after the output that [`Watch::want`] requested.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.grown
    }
}

/// The writing end. The serial port owns it.
pub struct Console {
    file: File,
    watch: Arc<Watch>,
    failed: bool,
}

impl Console {
    /// Makes a console on `file`, which the agent has given its full size.
    ///
    /// # Errors
    /// Those of `eventfd`.
    pub fn new(file: File) -> io::Result<Self> {
        let grown = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let watch = Watch { written: AtomicU64::new(0), wanted: AtomicBool::new(false), grown };
        Ok(Self { file, watch: Arc::new(watch), failed: false })
    }

    /// The event loop's end.
    #[must_use]
    pub fn watch(&self) -> Arc<Watch> {
        Arc::clone(&self.watch)
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut at = self.watch.written();
        for chunk in bytes.chunks(usize::try_from(RING).unwrap_or(usize::MAX)) {
            let start = at % RING;
            let room = usize::try_from(RING - start).unwrap_or(usize::MAX);
            let (first, rest) = chunk.split_at(chunk.len().min(room));
            let result = self
                .file
                .write_all_at(first, HEADER + start)
                .and_then(|()| self.file.write_all_at(rest, HEADER))
                .and_then(|()| {
                    at += chunk.len() as u64;
                    self.file.write_all_at(&at.to_le_bytes(), 0)
                });
            // The guest goes on without a log. It has no way to learn of the error, and must not be able to fill the
            // host's log.
            if let Err(error) = result
                && !std::mem::replace(&mut self.failed, true)
            {
                tracing::error!(%error, "Cannot write the console file; output is lost from now on");
            }
        }
        self.watch.written.store(at, Ordering::Release);
        if self.watch.wanted.swap(false, Ordering::SeqCst) {
            // If the counter is full, the event loop's wake-up is already pending.
            let _ = self.watch.grown.write(1);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(file: &File, from: u64, len: usize) -> Vec<u8> {
        (from..from + len as u64)
            .map(|n| {
                let mut byte = [0];
                file.read_exact_at(&mut byte, HEADER + n % RING).unwrap();
                byte[0]
            })
            .collect()
    }

    #[test]
    fn output_wraps_and_the_count_goes_on() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(HEADER + RING).unwrap();
        let mut console = Console::new(file.try_clone().unwrap()).unwrap();
        console.write_all(&vec![b'.'; usize::try_from(RING).unwrap() - 3]).unwrap();
        console.write_all(b"abcdef").unwrap();
        assert_eq!(console.watch().written(), RING + 3);
        assert_eq!(ring(&file, RING - 3, 6), b"abcdef");
        let mut count = [0; 8];
        file.read_exact_at(&mut count, 0).unwrap();
        assert_eq!(u64::from_le_bytes(count), RING + 3);
        assert_eq!(file.metadata().unwrap().len(), HEADER + RING);
    }

    #[test]
    fn a_watcher_is_told_once() {
        let file = tempfile::tempfile().unwrap();
        let mut console = Console::new(file).unwrap();
        let watch = console.watch();
        console.write_all(b"x").unwrap();
        assert!(watch.event().read().is_err(), "no signal was requested");
        watch.want();
        console.write_all(b"yz").unwrap();
        console.write_all(b"!").unwrap();
        assert_eq!(watch.event().read().unwrap(), 1);
        assert_eq!(watch.written(), 4);
    }
}
