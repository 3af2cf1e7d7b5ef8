// SPDX-License-Identifier: Apache-2.0

//! A file of the host, with or without the host's page cache.

use std::{fs::File, io};

use rustix::fs::{OFlags, fcntl_getfl};
use vm_memory::VolatileSlice;

use super::transfer;
use crate::queue::{length, part, write_bytes};

/// The alignment of offsets, lengths and addresses for accesses without the page cache (open(2), O_DIRECT): a page. Devices with
/// longer logical blocks (from Linux 6.15 on) fail such accesses.
pub(super) const BLOCK: u64 = 4096;
const BLOCK_LEN: usize = 4096;
/// The most bytes that a copy holds at once.
const CHUNK: u64 = 1 << 20;

/// An open file. All accesses come from one thread, so a block that is read, changed and written is not changed by another
/// access meanwhile.
#[derive(Debug)]
pub(super) struct HostFile {
    pub(super) file: File,
    /// The file is open with O_DIRECT.
    direct: bool,
}

impl HostFile {
    /// Takes an open file.
    ///
    /// # Errors
    /// Those of reading its flags.
    pub(super) fn new(file: File) -> io::Result<Self> {
        let direct = fcntl_getfl(&file)?.contains(OFlags::DIRECT);
        Ok(Self { file, direct })
    }

    /// Whether the host's page cache is bypassed.
    pub(super) fn is_direct(&self) -> bool {
        self.direct
    }

    /// Fills all of `buffers` with the file's bytes from `offset` on.
    ///
    /// # Errors
    /// Those of the file. `UnexpectedEof` at its end: part of the buffers is filled.
    pub(super) fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        if !self.direct || is_aligned(offset, buffers) {
            return transfer::read(&self.file, offset, buffers);
        }
        let mut copy = Copy::of(offset, length(buffers));
        for chunk in Chunk::all(offset, length(buffers)) {
            let blocks = copy.blocks(chunk.blocks_len());
            let filled = transfer::read_some(&self.file, chunk.first_block, blocks.into())?;
            // The file may end within its last block.
            let data = copy.inside(&chunk, filled).ok_or(io::ErrorKind::UnexpectedEof)?;
            write_bytes(&part(buffers, chunk.done, chunk.len), data);
        }
        Ok(())
    }

    /// Writes all of `buffers` to the file from `offset` on. A direct file gets longer by whole blocks.
    ///
    /// # Errors
    /// Those of the file; part of the data may be written.
    pub(super) fn write(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        if !self.direct || is_aligned(offset, buffers) {
            return transfer::write(&self.file, offset, buffers);
        }
        let mut copy = Copy::of(offset, length(buffers));
        for chunk in Chunk::all(offset, length(buffers)) {
            let count = chunk.blocks_len();
            let blocks = copy.blocks(count);
            // Only the first and the last block can have other contents, which stay.
            let first = (chunk.skip > 0).then_some(0);
            let last = (chunk.skip + chunk.len < count).then_some(count - BLOCK);
            for at in first.into_iter().chain(last) {
                let from = usize::try_from(at).unwrap_or(usize::MAX);
                let (_, bytes) = blocks.split_at_mut_checked(from).unwrap_or_default();
                let bytes = bytes.chunks_mut(BLOCK_LEN).next().unwrap_or_default();
                bytes.fill(0);
                transfer::read_some(&self.file, chunk.first_block.saturating_add(at), bytes.into())?;
            }
            let mut data = copy.inside_mut(&chunk);
            for buffer in part(buffers, chunk.done, chunk.len) {
                let Some((to, rest)) = data.split_at_mut_checked(buffer.len()) else { break };
                buffer.copy_to(to);
                data = rest;
            }
            transfer::write(&self.file, chunk.first_block, &[copy.blocks(count).into()])?;
        }
        Ok(())
    }

    /// Writes bytes to the file.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub(super) fn write_bytes(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        use std::os::unix::fs::FileExt as _;
        if !self.direct {
            return self.file.write_all_at(bytes, offset);
        }
        let mut bytes = bytes.to_vec();
        self.write(offset, &[bytes.as_mut_slice().into()])
    }
}

fn is_aligned(offset: u64, buffers: &[VolatileSlice<'_>]) -> bool {
    offset.is_multiple_of(BLOCK)
        && buffers.iter().all(|buffer| {
            let address = buffer.ptr_guard().as_ptr().addr() as u64;
            address.is_multiple_of(BLOCK) && (buffer.len() as u64).is_multiple_of(BLOCK)
        })
}

/// A part of a transfer, and the blocks that it lies in.
struct Chunk {
    /// The bytes of the transfer before it.
    done: u64,
    len: u64,
    /// The offset of its first block in the file.
    first_block: u64,
    /// Its own offset behind that.
    skip: u64,
}

impl Chunk {
    /// The parts of a transfer, each but the first one from a block's begin.
    fn all(offset: u64, len: u64) -> impl Iterator<Item = Self> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let at = offset.checked_add(done).filter(|_| done < len)?;
            let skip = at % BLOCK;
            let chunk = Self { done, len: (CHUNK - skip).min(len - done), first_block: at - skip, skip };
            done += chunk.len;
            Some(chunk)
        })
    }

    /// The bytes of its blocks.
    fn blocks_len(&self) -> u64 {
        (self.skip + self.len).next_multiple_of(BLOCK)
    }
}

/// Memory for whole blocks, at an aligned address.
struct Copy {
    bytes: Vec<u8>,
    start: usize,
}

impl Copy {
    fn of(offset: u64, len: u64) -> Self {
        let blocks = (offset % BLOCK).saturating_add(len).min(CHUNK).next_multiple_of(BLOCK);
        let bytes = vec![0; usize::try_from(blocks + BLOCK).unwrap_or_default()];
        let start = bytes.as_ptr().align_offset(usize::try_from(BLOCK).unwrap_or(1));
        Self { bytes, start }
    }

    /// The first `count` bytes.
    fn blocks(&mut self, count: u64) -> &mut [u8] {
        let end = self.start.saturating_add(usize::try_from(count).unwrap_or(usize::MAX));
        self.bytes.get_mut(self.start..end).unwrap_or_default()
    }

    /// The bytes of a chunk, if `filled` bytes of the blocks have them all.
    fn inside(&mut self, chunk: &Chunk, filled: usize) -> Option<&[u8]> {
        let (from, len) = (usize::try_from(chunk.skip).ok()?, usize::try_from(chunk.len).ok()?);
        self.bytes.get(self.start..)?.get(..filled)?.get(from..from.checked_add(len)?)
    }

    fn inside_mut(&mut self, chunk: &Chunk) -> &mut [u8] {
        let from = usize::try_from(chunk.skip).unwrap_or(usize::MAX);
        self.blocks(chunk.skip + chunk.len).get_mut(from..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::OpenOptions,
        os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    };

    use proptest::prelude::*;
    use tempfile::TempDir;
    use vm_memory::{GuestAddress, GuestMemoryBackend as _};

    use super::*;
    use crate::{GuestMemory, queue::fill};

    const MEMORY: usize = 4 << 20;

    /// A file with these bytes, twice: without the host's cache, and with it.
    fn files(bytes: &[u8]) -> (TempDir, HostFile, File) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, bytes).unwrap();
        let mut options = OpenOptions::new();
        let plain = options.read(true).write(true).open(&path).unwrap();
        let direct = options.custom_flags(libc::O_DIRECT).open(&path).unwrap();
        let direct = HostFile::new(direct).unwrap();
        assert!(direct.is_direct() && !HostFile::new(plain.try_clone().unwrap()).unwrap().is_direct());
        (directory, direct, plain)
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

        /// Any offset, and buffers of any lengths at any addresses.
        #[test]
        fn any_range_moves_without_the_hosts_cache(
            offset in prop_oneof![0..20_000_u64, Just(4096), Just(8192), Just((1 << 20) - 512)],
            lengths in prop::collection::vec(prop_oneof![1..9000_usize, Just(4096), Just(8192), Just(1_200_000)], 1..4),
            gap in prop_oneof![Just(0_usize), 1..5000_usize],
        ) {
            let old = pattern(6 << 20);
            let (_directory, direct, plain) = files(&old);
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
            let (mut buffers, mut at, mut data) = (Vec::new(), gap, Vec::new());
            for (number, len) in lengths.iter().enumerate() {
                let bytes = vec![u8::try_from(number + 1).unwrap(); *len];
                fill(&memory, at as u64, &bytes);
                buffers.push(memory.get_slice(GuestAddress(at as u64), *len).unwrap());
                data.extend(bytes);
                at += len + gap;
            }
            direct.write(offset, &buffers).unwrap();
            let mut expected = old;
            let from = usize::try_from(offset).unwrap();
            expected[from..from + data.len()].copy_from_slice(&data);
            prop_assert!(contents(&plain) == expected);
            plain.write_all_at(&pattern(data.len()), offset).unwrap();
            plain.sync_all().unwrap();
            direct.read(offset, &buffers).unwrap();
            let mut read = Vec::new();
            for buffer in &buffers {
                let mut bytes = vec![0; buffer.len()];
                buffer.copy_to(&mut bytes);
                read.extend(bytes);
            }
            prop_assert!(read == pattern(data.len()));
        }
    }

    #[test]
    fn the_end_of_a_file_may_be_within_a_block() {
        let (_directory, direct, plain) = files(&pattern(10_000));
        let mut bytes = vec![0; 1000];
        direct.read(9000, &[bytes.as_mut_slice().into()]).unwrap();
        assert!(bytes == pattern(10_000)[9000..]);
        let error = direct.read(9001, &[bytes.as_mut_slice().into()]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        direct.write_bytes(9990, &[7; 100]).unwrap();
        let expected = [&pattern(9990)[..], &[7; 100], &[0; 3 * 4096 - 10_090]].concat();
        assert!(contents(&plain) == expected, "whole blocks");
    }
}
