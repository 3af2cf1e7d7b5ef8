// SPDX-License-Identifier: Apache-2.0

//! The adapter's work on a frame before it is sent: checksums and segmentation. Pure.
//!
//! All lengths come from the guest. A frame with impossible lengths is not sent.

/// The most segments of one packet: 64 KiB in the smallest segments of any stack.
pub(super) const MAX_SEGMENTS: usize = 1024;
const IPV6_HEADER: usize = 40;
const IPV4_HEADER: usize = 20;

/// The protocol above IP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Transport {
    #[default]
    Udp,
    Tcp,
    Sctp,
}

/// The work in a context descriptor and the first data descriptor of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Offload {
    /// Bytes before the IP header.
    pub(super) mac_len: usize,
    pub(super) ip_len: usize,
    pub(super) transport_len: usize,
    pub(super) ipv4: bool,
    pub(super) transport: Transport,
    pub(super) ip_checksum: bool,
    pub(super) transport_checksum: bool,
    /// Payload of each segment; None for one frame.
    pub(super) segment: Option<usize>,
}

/// Calls `send` for each frame of the packet. None if the lengths are impossible; some frames may have been sent by
/// then.
pub(super) fn frames(packet: &mut [u8], offload: &Offload, send: &mut dyn FnMut(&[u8])) -> Option<()> {
    let Some(size) = offload.segment else {
        finish(packet, offload, 0)?;
        send(packet);
        return Some(());
    };
    let header_len = offload.transport_start() + offload.transport_len;
    let (header, payload) = packet.split_at_checked(header_len)?;
    let minimum = match offload.transport {
        Transport::Tcp => 20,
        Transport::Udp => 8,
        Transport::Sctp => return None,
    };
    if size == 0 || payload.len().div_ceil(size) > MAX_SEGMENTS || offload.transport_len < minimum {
        return None;
    }
    let last = payload.len().div_ceil(size).saturating_sub(1);
    let mut frame = Vec::with_capacity(header_len + size.min(payload.len()));
    // Without payload there is still one segment.
    for index in 0..=last {
        let start = index * size;
        let body = payload.get(start..payload.len().min(start + size))?;
        frame.clear();
        frame.extend_from_slice(header);
        frame.extend_from_slice(body);
        number(&mut frame, offload, index, start, index == last)?;
        let length = u32::try_from(offload.transport_len + body.len()).ok()?;
        finish(&mut frame, offload, length)?;
        send(&frame);
    }
    Some(())
}

impl Offload {
    fn transport_start(&self) -> usize {
        self.mac_len + self.ip_len
    }
}

/// Sets lengths, numbers and flags of one segment.
fn number(frame: &mut [u8], offload: &Offload, index: usize, start: usize, last: bool) -> Option<()> {
    let ip_start = offload.mac_len;
    let transport = offload.transport_start();
    let after_mac = frame.len().checked_sub(ip_start)?;
    if offload.ipv4 {
        (offload.ip_len >= IPV4_HEADER).then_some(())?;
        put(frame, ip_start + 2, u16::try_from(after_mac).ok()?)?;
        let id = get(frame, ip_start + 4)?.wrapping_add(u16::try_from(index).ok()?);
        put(frame, ip_start + 4, id)?;
    } else {
        (offload.ip_len >= IPV6_HEADER).then_some(())?;
        put(frame, ip_start + 4, u16::try_from(after_mac - IPV6_HEADER).ok()?)?;
    }
    if offload.transport == Transport::Udp {
        let length = frame.len().checked_sub(transport)?;
        return put(frame, transport + 4, u16::try_from(length).ok()?);
    }
    let number = frame.get_mut(transport + 4..)?.first_chunk_mut::<4>()?;
    *number = u32::from_be_bytes(*number).wrapping_add(u32::try_from(start).ok()?).to_be_bytes();
    let flags = frame.get_mut(transport + 13)?;
    if !last {
        // FIN and PSH belong to the last segment.
        *flags &= !0x09;
    }
    if index > 0 {
        // CWR belongs to the first segment.
        *flags &= !0x80;
    }
    Some(())
}

/// Sets checksums. `length` is the length that the driver left out of the pseudo header's sum.
fn finish(frame: &mut [u8], offload: &Offload, length: u32) -> Option<()> {
    if offload.ip_checksum && offload.ipv4 {
        (offload.ip_len >= IPV4_HEADER).then_some(())?;
        let header = frame.get(offload.mac_len..offload.transport_start())?;
        // The field counts: drivers leave 0 there, or a value that compensates for headers in between.
        let sum = fold(sum(header));
        put(frame, offload.mac_len + 10, !sum)?;
    }
    if offload.transport_checksum {
        let start = offload.transport_start();
        let body = frame.get(start..)?;
        match offload.transport {
            Transport::Sctp => {
                frame.get_mut(start + 8..start + 12)?.fill(0);
                let crc = crc32c(frame.get(start..)?);
                frame.get_mut(start + 8..start + 12)?.copy_from_slice(&crc.to_le_bytes());
            }
            Transport::Tcp => {
                let sum = fold(sum(body).saturating_add(length));
                put(frame, start + 16, !sum)?;
            }
            Transport::Udp => {
                let sum = !fold(sum(body).saturating_add(length));
                // Zero would mean that there is no checksum.
                put(frame, start + 6, if sum == 0 { u16::MAX } else { sum })?;
            }
        }
    }
    Some(())
}

fn get(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*frame.get(at..)?.first_chunk()?))
}

fn put(frame: &mut [u8], at: usize, value: u16) -> Option<()> {
    *frame.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}

/// The sum of big-endian words. It has room for 64 KiB of them.
fn sum(bytes: &[u8]) -> u32 {
    let (words, rest) = bytes.as_chunks::<2>();
    let sum = words.iter().fold(0u32, |sum, word| sum.wrapping_add(u16::from_be_bytes(*word).into()));
    sum.wrapping_add(rest.first().map_or(0, |byte| u32::from(*byte) << 8))
}

fn fold(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    // Folding twice leaves 16 bits.
    u16::try_from((once & 0xffff) + (once >> 16)).unwrap_or(u16::MAX)
}

/// The Castagnoli polynomial, reflected (RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(
            crc ^ u32::from(*byte),
            |crc, _| {
                if crc & 1 != 0 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 }
            },
        )
    })
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Ethernet, IPv4 and TCP as a driver passes them: no IP checksum, and in TCP's the pseudo header's sum (without
    /// length if `segmented`).
    fn tcp(payload: usize, segmented: bool) -> Vec<u8> {
        let mut packet = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
        let total = if segmented { 0 } else { u16::try_from(40 + payload).unwrap() };
        packet.extend([0x45, 0]);
        packet.extend(total.to_be_bytes());
        packet.extend([0xff, 0xff, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let mut pseudo = sum(&[10, 0, 0, 1, 10, 0, 0, 2, 0, 6]);
        if !segmented {
            pseudo += u32::try_from(20 + payload).unwrap();
        }
        packet.extend([0x12, 0x34, 0x56, 0x78, 0xff, 0xff, 0xff, 0x00, 0, 0, 0, 9, 0x50, 0x99, 0x20, 0]);
        packet.extend(fold(pseudo).to_be_bytes());
        packet.extend([0, 0]);
        packet.extend((0..payload).map(|byte| (byte * 7) as u8));
        packet
    }

    fn offload(segment: Option<usize>) -> Offload {
        Offload {
            mac_len: 14,
            ip_len: 20,
            transport_len: 20,
            ipv4: true,
            transport: Transport::Tcp,
            ip_checksum: true,
            transport_checksum: true,
            segment,
        }
    }

    fn sent(mut packet: Vec<u8>, offload: &Offload) -> Option<Vec<Vec<u8>>> {
        let mut sent = Vec::new();
        frames(&mut packet, offload, &mut |frame| sent.push(frame.to_vec()))?;
        Some(sent)
    }

    /// Checks a frame like a receiver.
    fn verify(frame: &[u8]) {
        let ip = &frame[14..34];
        assert_eq!(fold(sum(ip)), 0xffff, "IP checksum");
        assert_eq!(usize::from(get(frame, 16).unwrap()), frame.len() - 14, "IP length");
        let length = u32::try_from(frame.len() - 34).unwrap();
        let pseudo = sum(&ip[12..20]) + 6 + length;
        assert_eq!(fold(sum(&frame[34..]) + pseudo), 0xffff, "TCP checksum");
    }

    #[test]
    fn one_frame_gets_its_checksums() {
        for payload in [0, 1, 100, 1460] {
            let sent = sent(tcp(payload, false), &offload(None)).unwrap();
            assert_eq!(sent.len(), 1);
            verify(&sent[0]);
        }
    }

    proptest! {
        #[test]
        fn segments_put_together_are_the_packet(payload in 0..9000usize, size in 200..2000usize) {
            let packet = tcp(payload, true);
            let sent = sent(packet.clone(), &offload(Some(size))).unwrap();
            prop_assert_eq!(sent.len(), payload.div_ceil(size).max(1));
            let mut together = Vec::new();
            for (index, frame) in sent.iter().enumerate() {
                verify(frame);
                prop_assert!(frame.len() <= 54 + size);
                let number = u32::from_be_bytes(*frame[38..].first_chunk().unwrap());
                prop_assert_eq!(number, 0xffff_ff00u32.wrapping_add(together.len() as u32));
                prop_assert_eq!(get(frame, 18).unwrap(), 0xffffu16.wrapping_add(index as u16));
                let flags = (if index == 0 { 0x80 } else { 0 }) | 0x10
                    | (if index + 1 == sent.len() { 0x09 } else { 0 });
                prop_assert_eq!(frame[47], flags);
                together.extend_from_slice(&frame[54..]);
            }
            prop_assert_eq!(&together[..], &packet[54..]);
        }

        #[test]
        fn nonsense_is_harmless(mut packet in proptest::collection::vec(any::<u8>(), 0..300), mac_len in 0..128usize,
                                ip_len in 0..512usize, transport_len in 0..256usize, ipv4: bool, kind in 0..3,
                                ip_checksum: bool, transport_checksum: bool, segment in proptest::option::of(0..400usize)) {
            let transport = [Transport::Udp, Transport::Tcp, Transport::Sctp][kind as usize];
            let offload =
                Offload { mac_len, ip_len, transport_len, ipv4, transport, ip_checksum, transport_checksum, segment };
            let (mut count, mut bytes) = (0, 0);
            frames(&mut packet, &offload, &mut |frame| (count, bytes) = (count + 1, bytes + frame.len()));
            prop_assert!(count <= MAX_SEGMENTS && bytes <= 301 * 301);
        }
    }

    #[test]
    fn udp_ipv6_and_sctp() {
        // UDP over IPv6: a sum of zero is sent as all ones.
        let mut packet = vec![0; 14 + 40 + 8];
        packet[54 + 6..54 + 8].copy_from_slice(&[0xff, 0xff]);
        let udp = Offload { mac_len: 14, ip_len: 40, transport_checksum: true, ..Offload::default() };
        assert_eq!(sent(packet, &udp).unwrap()[0][60..62], [0xff, 0xff]);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let sctp = Offload { mac_len: 14, ip_len: 20, transport: Transport::Sctp, ..udp };
        let frame = &sent(vec![7; 60], &sctp).unwrap()[0];
        let mut zeroed = frame[34..].to_vec();
        zeroed[8..12].fill(0);
        assert_eq!(frame[42..46], crc32c(&zeroed).to_le_bytes());
        assert!(sent(vec![7; 44], &sctp).is_none());
    }
}
