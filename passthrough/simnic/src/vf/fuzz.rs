// SPDX-License-Identifier: Apache-2.0

//! The body of a fuzz target: see [`crate::fuzz`].

use super::{
    descriptor::{Context, Transmit},
    offload::{self, MAX_SEGMENTS},
};

/// A context and a data descriptor, and their packet: no sent frame is longer than the packet, there are no more frames
/// than segments allowed, and a success sends all of the payload. Returns the number of frames sent.
pub fn fuzz_transmit(data: &[u8]) -> usize {
    let Some((context, rest)) = data.split_first_chunk() else { return 0 };
    let Some((piece, packet)) = rest.split_first_chunk() else { return 0 };
    let mut contexts = [Context::default(); 2];
    if let Transmit::Context { index, context } = Transmit::parse(*context)
        && let Some(slot) = contexts.get_mut(index)
    {
        *slot = context;
    }
    let Transmit::Data(piece) = Transmit::parse(*piece) else { return 0 };
    let (_, offload) = piece.command.resolve(&contexts);
    let mut packet = packet.to_vec();
    let whole = packet.len();
    let head = offload.mac_len + offload.ip_len + offload.transport_len;
    let (mut sent, mut payload) = (0, 0);
    let done = offload::frames(&mut packet, &offload, &mut |frame| {
        sent += 1;
        assert!(frame.len() <= whole, "{} of {whole} bytes", frame.len());
        payload += frame.len().saturating_sub(head);
    });
    assert!(sent <= MAX_SEGMENTS);
    if done.is_some() {
        assert_eq!(payload, whole.saturating_sub(head), "{offload:?}");
        assert!(sent == 1 || offload.segment.is_some());
    }
    sent
}
