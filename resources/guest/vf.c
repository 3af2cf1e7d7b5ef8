/* SPDX-License-Identifier: Apache-2.0 */
/* The VF's mailbox and registers, step by step as Linux' igbvf (6.12) uses them, with its bounds and its conclusions. */

#include "guest.h"

#define CONTROL 0x0000
#define CONTROL_RESET 0x04000000
#define BUFFER 0x0800
#define MAILBOX 0x0c40
#define EICS_MASK 0x7
#define INTERRUPT_CLEAR 0x1528

#define REQ 0x01
#define ACKED 0x02
#define OWNED 0x04
#define PF_STATUS 0x10
#define PF_ACK 0x20
#define PF_RESET 0xc0 /* going on, or done */
#define READ_TO_CLEAR 0xb0

#define WORD_CTS 0x20000000U
#define WORD_NACK 0x40000000U
#define WORD_ACK 0x80000000U

#define MSG_RESET 1U
#define MSG_SET_MAC 2U
#define MSG_MULTICAST 3U
#define MSG_VLAN 4U
#define MSG_FRAME_SIZE 5U
#define MSG_PROMISCUOUS 6U
#define INFO(value) ((u32)(value) << 16)

#define RETRIES 2000
#define RETRY_US 500
#define BUFFER_TRIES 11
#define RESET_TRIES 200
#define RESET_TRY_US 5
#define RESET_REPLY_US 10000

struct vf vf;

const char *outcome_text(enum outcome outcome) {
  switch (outcome) {
  case OK: return "ok";
  case NACK: return "nack";
  case TIMEOUT: return "timeout";
  case NOT_SENT: return "not-sent";
  default: return "still-resetting";
  }
}

bool vf_probe(unsigned index) {
  vf = (struct vf){.index = index};
  vf.present = pci_find_vf(index, &vf.function);
  return vf.present;
}

u32 vf_read(u32 offset) { return mmio_read(vf.function.bar[0] + offset); }

void vf_write(u32 offset, u32 value) { mmio_write(vf.function.bar[0] + offset, value); }

static u32 mailbox_status(void) {
  u32 value = vf_read(MAILBOX) | vf.cached;
  vf.cached |= value & READ_TO_CLEAR;
  return value;
}

static bool mailbox_check(u32 mask) {
  bool set = mailbox_status() & mask;
  vf.cached &= ~mask;
  return set;
}

static bool take_buffer(void) {
  for (int i = 0; i < BUFFER_TRIES; i++) {
    if (i) delay_us(1000);
    vf_write(MAILBOX, OWNED);
    if (mailbox_status() & OWNED) return true;
  }
  return false;
}

static bool poll(u32 mask) {
  for (u32 i = 0; i < vf.retries; i++) {
    if (mailbox_check(mask)) return true;
    delay_us(RETRY_US);
  }
  /* The mailbox counts as dead until the next reset. */
  vf.retries = 0;
  return false;
}

enum outcome vf_post(const u32 *words, unsigned count) {
  if (!vf.retries || !take_buffer()) return NOT_SENT;
  mailbox_check(PF_ACK);
  mailbox_check(PF_STATUS);
  for (unsigned i = 0; i < count; i++) vf_write(BUFFER + 4 * i, words[i]);
  vf_write(MAILBOX, REQ);
  return poll(PF_ACK) ? OK : TIMEOUT;
}

enum outcome vf_reply(u32 *words, unsigned count) {
  if (!poll(PF_STATUS)) return TIMEOUT;
  if (!take_buffer()) return NOT_SENT;
  for (unsigned i = 0; i < count; i++) words[i] = vf_read(BUFFER + 4 * i);
  vf_write(MAILBOX, ACKED);
  return OK;
}

enum outcome vf_call(const u32 *words, unsigned count, unsigned reply_words) {
  u32 reply[16];
  enum outcome outcome = vf_post(words, count);
  if (outcome == OK) outcome = vf_reply(reply, reply_words);
  if (outcome != OK) return outcome;
  return reply[0] & WORD_ACK && !(reply[0] & WORD_NACK) ? OK : NACK;
}

static void mac_words(u32 *words, struct mac mac) {
  const u8 *b = mac.byte;
  words[0] = (u32)b[0] | (u32)b[1] << 8 | (u32)b[2] << 16 | (u32)b[3] << 24;
  words[1] = (u32)b[4] | (u32)b[5] << 8;
}

/* e1000_rar_set_vf: who is refused falls back to the address of the last reset. */
static enum outcome set_address(struct mac mac) {
  u32 words[3] = {MSG_SET_MAC};
  mac_words(words + 1, mac);
  vf.mac = mac;
  enum outcome outcome = vf_call(words, 3, 3);
  if (outcome == NACK) vf.mac = vf.perm;
  return outcome;
}

/* e1000_reset_hw_vf */
static enum outcome reset_hardware(void) {
  vf.up = false;
  vf_write(CONTROL, CONTROL_RESET);
  int tries = RESET_TRIES;
  while (mailbox_check(PF_RESET) && --tries) delay_us(RESET_TRY_US);
  if (!tries) return STILL_RESETTING;
  vf.retries = RETRIES;
  u32 words[3] = {MSG_RESET};
  enum outcome outcome = vf_post(words, 1);
  if (outcome != OK) return outcome;
  delay_us(RESET_REPLY_US);
  outcome = vf_reply(words, 3);
  if (outcome != OK) return outcome;
  vf.perm = (struct mac){{0}};
  if (words[0] == (MSG_RESET | WORD_NACK)) return NACK;
  if (words[0] != (MSG_RESET | WORD_ACK)) return STILL_RESETTING;
  for (int i = 0; i < 6; i++) vf.perm.byte[i] = (u8)(words[1 + i / 4] >> 8 * (i % 4));
  return OK;
}

enum outcome vf_reset(void) {
  enum outcome outcome = reset_hardware();
  if (outcome == OK && !vf.was_reset) {
    /* igbvf_probe */
    vf.was_reset = true;
    vf.mac = vf.perm;
  }
  if (is_assignable_mac(vf.mac)) set_address(vf.mac);
  if (is_assignable_mac(vf.mac)) vf.netdev = vf.mac;
  return outcome;
}

enum outcome vf_set_mac(struct mac mac) {
  enum outcome outcome = set_address(mac);
  if (same_mac(vf.mac, mac)) vf.netdev = mac;
  return outcome;
}

enum outcome vf_filter(unsigned info, struct mac mac) {
  u32 words[3] = {MSG_SET_MAC | INFO(info)};
  mac_words(words + 1, mac);
  return vf_call(words, 3, 3);
}

enum outcome vf_vlan(bool add, u16 vid) {
  u32 words[2] = {MSG_VLAN | INFO(add), vid};
  return vf_call(words, 2, 2);
}

enum outcome vf_multicast(const struct mac *list, unsigned count) {
  u32 words[16] = {MSG_MULTICAST | INFO(count)};
  for (unsigned i = 0; i < count && i < 30; i++) {
    u32 hash = ((u32)list[i].byte[4] >> 4 | (u32)list[i].byte[5] << 4) & 0xfff;
    words[1 + i / 2] |= hash << 16 * (i % 2);
  }
  return vf_call(words, 16, 1);
}

enum outcome vf_frame_size(u32 size) {
  u32 words[2] = {MSG_FRAME_SIZE, size};
  return vf_call(words, 2, 1);
}

enum outcome vf_promiscuous(unsigned mode) {
  u32 words[1] = {MSG_PROMISCUOUS | INFO(mode)};
  return vf_call(words, 1, 1);
}

enum outcome vf_up(void) {
  if (!vf.was_reset || !vf.retries) {
    enum outcome outcome = vf_reset();
    if (outcome != OK) return outcome;
  }
  /* igbvf_set_rx_mode, igbvf_configure_rx: what is refused here is refused silently. */
  vf_multicast(NULL, 0);
  vf_filter(1, (struct mac){{0}});
  queues_start();
  enum outcome outcome = vf_frame_size(1522);
  vf.up = true;
  return outcome == NACK ? OK : outcome;
}

enum outcome vf_down(void) {
  queues_stop();
  vf_write(INTERRUPT_CLEAR, EICS_MASK);
  vf.up = false;
  return vf_reset();
}
