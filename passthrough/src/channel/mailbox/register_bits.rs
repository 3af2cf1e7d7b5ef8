// SPDX-License-Identifier: Apache-2.0

//! Bits of the VF's mailbox register and of message word 0, the same for igbvf and ixgbevf.

/// Message ready: interrupts the PF. Write only, self-clearing.
pub const REQ: u32 = 1 << 0;
/// The VF has consumed the PF's message. Write only, self-clearing.
pub const ACK: u32 = 1 << 1;
/// The VF owns the buffer. A write without this bit releases it.
pub const VFU: u32 = 1 << 2;
/// The PF owns the buffer. Read only.
pub const PFU: u32 = 1 << 3;
/// The PF wrote a message. Read only, cleared by reading.
pub const PFSTS: u32 = 1 << 4;
/// The PF consumed the VF's message. Read only, cleared by reading.
pub const PFACK: u32 = 1 << 5;
/// A reset of the PF is under way. Read only.
pub const RSTI: u32 = 1 << 6;
/// The PF's reset is done. Read only, cleared by reading.
pub const RSTD: u32 = 1 << 7;
/// The bits that reading clears.
pub const READ_TO_CLEAR: u32 = PFSTS | PFACK | RSTD;

/// VF reset, in the VF's control register.
pub const CONTROL_RST: u32 = 1 << 26;

/// Clear to send: the PF has seen this VF's reset message and will listen to others.
pub const CTS: u32 = 1 << 29;
/// The PF refused the message.
pub const NACK_MESSAGE: u32 = 1 << 30;
/// The PF accepted the message.
pub const ACK_MESSAGE: u32 = 1 << 31;
/// Opcode of a message that the PF sends on its own ("ping").
pub const PF_CONTROL: u32 = 0x0100;
/// Opcode and argument of word 0, without the bits that the PF adds.
pub const REQUEST_MASK: u32 = !(CTS | NACK_MESSAGE | ACK_MESSAGE);
