// SPDX-License-Identifier: Apache-2.0

//! Measures a guest's disk and network from inside of the guest, at the request of a test.
//!
//! `guest-meter PORT` serves the port on all addresses. A connection carries one request, a line:
//!
//! ```text
//! disk PATH read|write sequential|random BYTES DEPTH MILLISECONDS   response: OPERATIONS NANOSECONDS
//! send MILLISECONDS                                                 response: bytes for that time
//! take                                                              bytes until the client's end; response: BYTES NANOSECONDS
//! ```
//!
//! Requests to the disk pass the guest's page cache by (`O_DIRECT`). `DEPTH` threads have one request in flight each. A write
//! destroys the disk's contents.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Read, Seek, SeekFrom, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::fs::OFlags;

/// The alignment that `O_DIRECT` asks of buffers, offsets and lengths, in bytes: a page is enough for each device.
const ALIGNMENT: usize = 4096;
/// Bytes of one call for the network.
const PORTION: usize = 128 << 10;

/// The order of the requests to a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Sequential,
    Random,
}

/// A series of requests to a disk.
struct Series {
    file: File,
    write: bool,
    order: Order,
    /// Bytes of a request.
    len: usize,
    /// The number of requests that fit on the disk.
    places: u64,
    /// The next place of a sequential series.
    next: AtomicU64,
    duration: Duration,
}

impl Series {
    fn new(words: &[&str]) -> (Self, usize) {
        let &[path, direction, order, len, depth, milliseconds] = words else {
            panic!("disk takes six words")
        };
        let write = match direction {
            "read" => false,
            "write" => true,
            other => panic!("what is {other}?"),
        };
        let order = match order {
            "sequential" => Order::Sequential,
            "random" => Order::Random,
            other => panic!("what is {other}?"),
        };
        let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap();
        let mut file = OpenOptions::new().read(true).write(write).custom_flags(flags).open(path).unwrap();
        let len: usize = len.parse().unwrap();
        assert!(len.is_multiple_of(ALIGNMENT) && len > 0, "{len} is no multiple of {ALIGNMENT}");
        let places = file.seek(SeekFrom::End(0)).unwrap() / len as u64;
        assert!(places > 0, "{path} is too short");
        let duration = Duration::from_millis(milliseconds.parse().unwrap());
        let series = Self { file, write, order, len, places, next: AtomicU64::new(0), duration };
        (series, depth.parse().unwrap())
    }

    /// One thread's part: requests one after the other until the time is over. Returns their number.
    fn part(&self, seed: u64, start: &Barrier) -> u64 {
        let mut memory = vec![0x5a; self.len + ALIGNMENT];
        let begin = memory.as_ptr().align_offset(ALIGNMENT);
        let buffer = &mut memory[begin..begin + self.len];
        let (mut random, mut count) = (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, 0);
        start.wait();
        let end = Instant::now() + self.duration;
        while Instant::now() < end {
            let place = if self.order == Order::Sequential {
                self.next.fetch_add(1, Ordering::Relaxed)
            } else {
                // Marsaglia's xorshift64.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random
            };
            let offset = place % self.places * self.len as u64;
            if self.write {
                self.file.write_all_at(buffer, offset).unwrap();
            } else {
                self.file.read_exact_at(buffer, offset).unwrap();
            }
            count += 1;
        }
        count
    }
}

fn disk(words: &[&str]) -> String {
    let (series, depth) = Series::new(words);
    let start = Barrier::new(depth + 1);
    let (count, took) = thread::scope(|scope| {
        let (series, start) = (&series, &start);
        let threads: Vec<_> =
            (1..=depth).map(|seed| scope.spawn(move || series.part(seed as u64, start))).collect();
        start.wait();
        let begun = Instant::now();
        let count: u64 = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
        (count, begun.elapsed())
    });
    format!("{count} {}", took.as_nanos())
}

fn send(stream: &mut TcpStream, duration: Duration) {
    let portion = vec![0x5a; PORTION];
    let end = Instant::now() + duration;
    while Instant::now() < end && stream.write_all(&portion).is_ok() {}
}

/// Takes bytes until the client's end. The time begins with the first of them.
fn take(input: &mut impl Read) -> String {
    let mut portion = vec![0; PORTION];
    let mut bytes = input.read(&mut portion).unwrap();
    let begun = Instant::now();
    loop {
        match input.read(&mut portion).unwrap() {
            0 => return format!("{bytes} {}", begun.elapsed().as_nanos()),
            more => bytes += more,
        }
    }
}

fn serve(mut stream: TcpStream) {
    let mut input = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    input.read_line(&mut line).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    let response = match words.as_slice() {
        ["disk", rest @ ..] => disk(rest),
        ["send", milliseconds] => {
            send(&mut stream, Duration::from_millis(milliseconds.parse().unwrap()));
            return;
        }
        ["take"] => take(&mut input),
        other => panic!("what is {other:?}?"),
    };
    writeln!(stream, "{response}").unwrap();
}

fn main() {
    let port: u16 = std::env::args().nth(1).expect("usage: guest-meter PORT").parse().expect("a port");
    let listener = TcpListener::bind(("0.0.0.0", port)).unwrap();
    for stream in listener.incoming() {
        // A thread for each request: a panic ends the request, not the program.
        drop(thread::spawn(|| serve(stream.unwrap())).join());
    }
}
