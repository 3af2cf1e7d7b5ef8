/* SPDX-License-Identifier: Apache-2.0 */
/* Frames: what is answered (ARP, ICMP echo), what is reported, and ping. */

#include "guest.h"

#define TYPE_IPV4 0x0800
#define TYPE_ARP 0x0806
#define TYPE_VLAN 0x8100
#define HEADER 14
#define FRAME_MIN 60
#define ARP_LENGTH 28
#define ARP_REQUEST 1
#define ARP_REPLY 2
#define IP_HEADER 20
#define ICMP_HEADER 8
#define ICMP 1
#define ECHO_REPLY 0
#define ECHO_REQUEST 8
#define ECHO_ID 0x5043
#define TTL 64

#define REMEMBERED 16
/* Frames taken in one go, so that input is served under a flood, too. */
#define BATCH 32

u32 own_ip;
bool report_all;
u64 frames_received, frames_sent;

static const struct mac broadcast = {{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}};

/* Frames that nobody has asked for yet: a ring, the oldest is forgotten first. */
static struct frame remembered[REMEMBERED];
static u32 remembered_first, remembered_end;

/* What ping waits for. */
static struct {
  u32 target;
  bool resolved, answered;
  struct mac mac;
  u16 sequence;
} wanted;

static u16 get16(const u8 *at) { return (u16)(at[0] << 8 | at[1]); }
static u32 get32(const u8 *at) { return (u32)get16(at) << 16 | get16(at + 2); }
static void put16(u8 *at, u16 value) {
  at[0] = (u8)(value >> 8);
  at[1] = (u8)value;
}
static void put32(u8 *at, u32 value) {
  put16(at, (u16)(value >> 16));
  put16(at + 2, (u16)value);
}
static struct mac get_mac(const u8 *at) {
  struct mac mac;
  memcpy(mac.byte, at, 6);
  return mac;
}

static u16 checksum(const u8 *data, unsigned length) {
  u32 sum = 0;
  for (unsigned i = 0; i + 1 < length; i += 2) sum += get16(data + i);
  if (length & 1) sum += (u32)data[length - 1] << 8;
  while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
  return (u16)~sum;
}

bool net_send(struct mac destination, struct mac source, u16 type, u16 vlan, u16 inline_tag, const u8 *payload,
              unsigned length) {
  u8 *frame = transmit_buffer();
  unsigned header = HEADER;
  memcpy(frame, destination.byte, 6);
  memcpy(frame + 6, source.byte, 6);
  if (inline_tag != UNTAGGED) {
    put16(frame + 12, TYPE_VLAN);
    put16(frame + 14, inline_tag);
    header += 4;
  }
  put16(frame + header - 2, type);
  if (length > FRAME_MAX - header) length = FRAME_MAX - header;
  memcpy(frame + header, payload, length);
  length += header;
  if (length < FRAME_MIN) {
    memset(frame + length, 0, FRAME_MIN - length);
    length = FRAME_MIN;
  }
  bool sent = transmit(length, vlan);
  frames_sent += sent;
  return sent;
}

static bool send_arp(u16 operation, struct mac to, u32 target_ip) {
  u8 arp[ARP_LENGTH] = {0, 1, 8, 0, 6, 4};
  put16(arp + 6, operation);
  memcpy(arp + 8, vf.netdev.byte, 6);
  put32(arp + 14, own_ip);
  if (operation == ARP_REPLY) memcpy(arp + 18, to.byte, 6);
  put32(arp + 24, target_ip);
  return net_send(to, vf.netdev, TYPE_ARP, UNTAGGED, UNTAGGED, arp, ARP_LENGTH);
}

/* True if the frame was for us, and so needs no report. */
static bool take_arp(const u8 *arp, unsigned length) {
  if (length < ARP_LENGTH || get32(arp) != 0x00010800 || get16(arp + 4) != 0x0604) return false;
  u16 operation = get16(arp + 6);
  u32 sender = get32(arp + 14);
  if (operation == ARP_REPLY && wanted.target && sender == wanted.target) {
    wanted.mac = get_mac(arp + 8);
    wanted.resolved = true;
    return true;
  }
  if (operation != ARP_REQUEST || !own_ip || get32(arp + 24) != own_ip) return false;
  send_arp(ARP_REPLY, get_mac(arp + 8), sender);
  return true;
}

static bool take_ip(struct mac source, const u8 *ip, unsigned length) {
  if (length < IP_HEADER || ip[0] != 0x45 || ip[9] != ICMP || !own_ip || get32(ip + 16) != own_ip) return false;
  unsigned total = get16(ip + 2);
  if (total > length || total < IP_HEADER + ICMP_HEADER) return false;
  const u8 *icmp = ip + IP_HEADER;
  unsigned icmp_length = total - IP_HEADER;
  if (checksum(ip, IP_HEADER) || checksum(icmp, icmp_length)) return false;
  if (icmp[0] == ECHO_REPLY) {
    if (get16(icmp + 4) == ECHO_ID && get16(icmp + 6) == wanted.sequence && get32(ip + 12) == wanted.target)
      wanted.answered = true;
    return true;
  }
  if (icmp[0] != ECHO_REQUEST) return false;
  NOINIT static u8 reply[FRAME_MAX];
  memcpy(reply, ip, total);
  put32(reply + 12, own_ip);
  put32(reply + 16, get32(ip + 12));
  reply[8] = TTL;
  put16(reply + 10, 0);
  put16(reply + 10, checksum(reply, IP_HEADER));
  reply[IP_HEADER] = ECHO_REPLY;
  put16(reply + IP_HEADER + 2, 0);
  put16(reply + IP_HEADER + 2, checksum(reply + IP_HEADER, icmp_length));
  net_send(source, vf.netdev, TYPE_IPV4, UNTAGGED, UNTAGGED, reply, total);
  return true;
}

void put_frame(const struct frame *frame) {
  put_mac(frame->source);
  put_char('>');
  put_mac(frame->destination);
  put_text(" type=0x");
  put_hex(frame->type, 4);
  if (frame->vlan != UNTAGGED) {
    put_text(" vlan=");
    put_decimal(frame->vlan);
  }
  put_text(" len=");
  put_decimal(frame->length);
  put_text(" text=");
  put_text(frame->text);
  put_char('\n');
}

static void report(const struct frame *frame) {
  put_text("rx ");
  put_frame(frame);
  remembered[remembered_end++ % REMEMBERED] = *frame;
  if (remembered_end - remembered_first > REMEMBERED) remembered_first++;
}

static void take(const u8 *data, unsigned length, u16 vlan) {
  frames_received++;
  if (length < HEADER || length > FRAME_MAX) return;
  struct frame frame = {.destination = get_mac(data), .source = get_mac(data + 6), .vlan = vlan, .length = length};
  unsigned header = HEADER;
  frame.type = get16(data + 12);
  if (frame.type == TYPE_VLAN && length >= HEADER + 4) {
    frame.vlan = get16(data + 14) & 0xfff;
    frame.type = get16(data + 16);
    header += 4;
  }
  const u8 *payload = data + header;
  unsigned rest = length - header;
  bool ours = same_mac(frame.destination, vf.netdev) || same_mac(frame.destination, broadcast);
  bool served = ours && frame.type == TYPE_ARP && take_arp(payload, rest);
  served = served || (ours && frame.type == TYPE_IPV4 && take_ip(frame.source, payload, rest));
  if (served && !report_all) return;
  for (unsigned i = 0; i < rest && i + 1 < sizeof(frame.text) && payload[i] >= ' ' && payload[i] < 127; i++)
    frame.text[i] = (char)payload[i];
  report(&frame);
}

void net_serve(void) {
  if (!vf.present || !vf.up) return;
  unsigned length;
  u16 vlan;
  u8 *data;
  for (int left = BATCH; left && (data = receive(&length, &vlan)); left--) {
    take(data, length, vlan);
    receive_done();
  }
}

bool net_wait_for(const volatile bool *condition, u64 deadline_us) {
  for (;;) {
    u32 seen = events();
    unsigned length;
    u16 vlan;
    serve_input();
    net_serve();
    if (*condition) return true;
    if (now_us() >= deadline_us) return false;
    if (vf.present && vf.up) {
      queues_enable_interrupts();
      if (receive(&length, &vlan)) continue;
    }
    sleep_until(deadline_us, seen);
  }
}

void net_wait(u64 deadline_us) {
  static const bool never = false;
  net_wait_for(&never, deadline_us);
}

static bool matches(const struct pattern *pattern, const struct frame *frame) {
  return (!pattern->has_source || same_mac(pattern->source, frame->source)) &&
         (!pattern->has_destination || same_mac(pattern->destination, frame->destination)) &&
         (!pattern->has_type || pattern->type == frame->type) &&
         (!pattern->has_vlan || pattern->vlan == frame->vlan) &&
         (!pattern->text || same_text(pattern->text, frame->text));
}

bool net_expect(const struct pattern *pattern, u64 deadline_us, struct frame *found) {
  for (;;) {
    u32 seen = events(), before = remembered_end;
    while (remembered_first != remembered_end) {
      *found = remembered[remembered_first++ % REMEMBERED];
      if (matches(pattern, found)) return true;
    }
    serve_input();
    net_serve();
    if (remembered_end != before) continue;
    if (now_us() >= deadline_us) return false;
    unsigned length;
    u16 vlan;
    queues_enable_interrupts();
    if (!receive(&length, &vlan)) sleep_until(deadline_us, seen);
  }
}

void net_forget(void) { remembered_first = remembered_end; }

static bool resolve(u32 target, u64 timeout_us) {
  wanted.target = target;
  wanted.resolved = false;
  for (int tries = 0; tries < 3 && !wanted.resolved; tries++) {
    if (!send_arp(ARP_REQUEST, broadcast, target)) return false;
    net_wait_for(&wanted.resolved, now_us() + timeout_us);
  }
  return wanted.resolved;
}

static bool send_echo(u32 target, u16 sequence, unsigned size) {
  NOINIT static u8 packet[FRAME_MAX];
  unsigned total = IP_HEADER + ICMP_HEADER + size;
  memset(packet, 0, IP_HEADER + ICMP_HEADER);
  packet[0] = 0x45;
  put16(packet + 2, (u16)total);
  packet[8] = TTL;
  packet[9] = ICMP;
  put32(packet + 12, own_ip);
  put32(packet + 16, target);
  put16(packet + 10, checksum(packet, IP_HEADER));
  u8 *icmp = packet + IP_HEADER;
  icmp[0] = ECHO_REQUEST;
  put16(icmp + 4, ECHO_ID);
  put16(icmp + 6, sequence);
  for (unsigned i = 0; i < size; i++) icmp[ICMP_HEADER + i] = (u8)i;
  put16(icmp + 2, checksum(icmp, ICMP_HEADER + size));
  return net_send(wanted.mac, vf.netdev, TYPE_IPV4, UNTAGGED, UNTAGGED, packet, total);
}

struct ping net_ping(u32 target, unsigned count, unsigned size, u64 interval_us, u64 timeout_us) {
  struct ping ping = {.least_us = ~0ULL};
  static u16 sequence;
  ping.resolved = resolve(target, timeout_us);
  for (; ping.sent < count; ping.sent++) {
    if (!ping.resolved) continue;
    wanted.sequence = ++sequence;
    wanted.answered = false;
    u64 start = now_us();
    if (!send_echo(target, sequence, size)) continue;
    if (net_wait_for(&wanted.answered, start + timeout_us)) {
      u64 took = now_us() - start;
      ping.received++;
      ping.sum_us += took;
      if (took < ping.least_us) ping.least_us = took;
      if (took > ping.most_us) ping.most_us = took;
    }
    if (ping.sent + 1 < count && interval_us) net_wait(start + interval_us);
  }
  wanted.target = 0;
  return ping;
}
