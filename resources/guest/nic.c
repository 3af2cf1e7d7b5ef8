/* SPDX-License-Identifier: Apache-2.0 */
/* Commands that drive a virtio NIC with one pair of queues, one frame at a time. */

#include "virtio.h"

enum { RECEIVE, TRANSMIT, CONTROL };

#define HEADER 12
#define ADDRESSES 12
#define TYPE 12
#define MINIMUM 60
#define BUFFERS 8
#define BUFFER 2048
#define LINK 6
#define MTU 10
#define TAG 4

#define CLASS_RECEIVE 0
#define CLASS_ADDRESS 1
#define CLASS_VLAN 2
#define SET_LISTS 0
#define SET_ADDRESS 1

static u8 buffers[BUFFERS][BUFFER] __attribute__((aligned(64)));
static u8 frame[BUFFER] __attribute__((aligned(64)));
static volatile u8 answer;
static u16 taken;

static bool ready(void) {
  if (device.present && device.kind == NIC) return true;
  result_text("error no NIC: nic-probe first");
  return false;
}

static void give(unsigned number) {
  virtio_set(RECEIVE, number, (u64)buffers[number], BUFFER, DEVICE_WRITES);
  virtio_offer(RECEIVE, (u16)number);
}

static void give_all(void) {
  taken = 0;
  for (unsigned i = 0; i < BUFFERS; i++) give(i);
}

static struct mac own(void) {
  struct mac mac;
  for (unsigned i = 0; i < 6; i++) mac.byte[i] = mmio_read8(device.at[DEVICE] + i);
  return mac;
}

static void run_nic_probe(void) {
  u64 index = 0;
  if (argument(&current, 1) && !number_argument(1, 31, &index)) return;
  if (!virtio_probe(NIC, (unsigned)index)) {
    result_text("none");
    return;
  }
  give_all();
  result();
  put_text("slot=");
  put_decimal(device.function.slot);
  put_text(" mac=");
  put_mac(own());
  put_text(" mtu=");
  put_decimal(mmio_read8(device.at[DEVICE] + MTU) | mmio_read8(device.at[DEVICE] + MTU + 1) << 8);
  put_char('\n');
}

static bool mac_argument(unsigned index, struct mac *mac) {
  const char *text = argument(&current, index);
  if (text && parse_mac(text, mac)) return true;
  result_text("error not an address");
  return false;
}

/* A frame with a text. `source` is the NIC's own address, if there is no such option. `vlan` adds a tag. */
static void run_nic_send(void) {
  struct mac to, from = own();
  u64 vlan;
  if (!ready() || !mac_argument(1, &to) || !number_option("vlan", 0, &vlan)) return;
  const char *text = argument(&current, 2), *source = option(&current, "source");
  if (source && !parse_mac(source, &from)) {
    result_text("error source= is no address");
    return;
  }
  size_t length = text_length(text);
  memset(frame, 0, sizeof(frame));
  memcpy(frame + HEADER, to.byte, 6);
  memcpy(frame + HEADER + 6, from.byte, 6);
  u8 *type = frame + HEADER + TYPE;
  if (vlan) {
    type[0] = 0x81;
    type[2] = (u8)(vlan >> 8);
    type[3] = (u8)vlan;
    type += TAG;
  }
  /* Local experimental EtherType (IEEE 802). */
  type[0] = 0x88;
  type[1] = 0xb5;
  memcpy(type + 2, text, length);
  length += TYPE + 2 + (vlan ? TAG : 0);
  virtio_set(TRANSMIT, 0, (u64)frame, HEADER + (u32)(length < MINIMUM ? MINIMUM : length), 0);
  result_text(virtio_send(TRANSMIT) ? "ok" : "timeout");
}

/* The next frame of the type that nic-send has: its sender, its text and its tag. */
static void run_nic_receive(void) {
  u64 ms;
  if (!ready() || !number_option("ms", 2000, &ms)) return;
  for (u64 end = now_us() + ms * 1000;;) {
    u32 seen = events();
    if (rings[RECEIVE].used_index == taken) {
      if (now_us() >= end) break;
      sleep_until(end, seen);
      continue;
    }
    unsigned number = rings[RECEIVE].used[taken++ % ENTRIES].head % BUFFERS;
    const u8 *bytes = buffers[number] + HEADER;
    const u8 *type = bytes + TYPE;
    bool tagged = type[0] == 0x81 && type[1] == 0;
    if (tagged) type += TAG;
    bool wanted = type[0] == 0x88 && type[1] == 0xb5;
    if (wanted) {
      struct mac from;
      memcpy(from.byte, bytes + 6, 6);
      result();
      put_mac(from);
      put_char(' ');
      for (const u8 *c = type + 2; *c >= ' ' && *c <= '~'; c++) put_char((char)*c);
      if (tagged) {
        put_text(" vlan=");
        put_decimal((u64)(bytes[TYPE + 2] & 15) << 8 | bytes[TYPE + 3]);
      }
      put_char('\n');
    }
    give(number);
    if (wanted) return;
  }
  result_text("nothing");
}

/* A request of the control queue. */
static const char *control(u8 class, u8 command, const u8 *bytes, unsigned length) {
  frame[0] = class;
  frame[1] = command;
  memcpy(frame + 2, bytes, length);
  answer = 0xff;
  virtio_set(CONTROL, 0, (u64)frame, 2 + length, NEXT);
  virtio_set(CONTROL, 1, (u64)&answer, 1, DEVICE_WRITES);
  if (!virtio_send(CONTROL)) return "timeout";
  return answer == 0 ? "ok" : answer == 1 ? "refused" : "no-answer";
}

static void run_nic_mac(void) {
  struct mac mac;
  if (ready() && mac_argument(1, &mac)) result_text(control(CLASS_ADDRESS, SET_ADDRESS, mac.byte, 6));
}

static void run_nic_vlan(void) {
  u64 id;
  if (!ready() || !number_argument(2, 65535, &id)) return;
  const u8 bytes[] = {(u8)id, (u8)(id >> 8)};
  result_text(control(CLASS_VLAN, same_text(argument(&current, 1), "add") ? 0 : 1, bytes, 2));
}

/* The lists of further unicast and of multicast addresses: of one address each, or none. */
static void run_nic_lists(void) {
  u8 bytes[2 * (4 + 6)] = {0};
  unsigned length = 0;
  if (!ready()) return;
  for (unsigned i = 1; i <= 2; i++) {
    struct mac mac;
    bool one = !same_text(argument(&current, i), "-");
    if (one && !mac_argument(i, &mac)) return;
    bytes[length] = one;
    length += 4;
    if (one) memcpy(bytes + length, mac.byte, 6);
    if (one) length += 6;
  }
  result_text(control(CLASS_ADDRESS, SET_LISTS, bytes, length));
}

static void run_nic_link(void) {
  if (!ready()) return;
  result();
  put_text(mmio_read8(device.at[DEVICE] + LINK) & 1 ? "up mac=" : "down mac=");
  put_mac(own());
  put_char('\n');
}

static void run_nic_promiscuous(void) {
  const u8 on = same_text(argument(&current, 1), "on");
  if (ready()) result_text(control(CLASS_RECEIVE, 0, &on, 1));
}

/* --- faults of a driver: after each, the device needs a reset, or loses the frame --- */

static unsigned victim;

static void far_index(void) {
  rings[victim].available_index = (u16)(device.sent[victim] + 1000);
  virtio_ring(victim);
}
static void far_head(void) { virtio_offer(victim, 40000); }
static void outside(void) {
  virtio_set(victim, 9, 0x7fff00000000ULL, 100, victim == RECEIVE ? DEVICE_WRITES : 0);
  virtio_offer(victim, 9);
}
static void wrapped(void) {
  virtio_set(victim, 9, ~0ULL - 50, 100, victim == RECEIVE ? DEVICE_WRITES : 0);
  virtio_offer(victim, 9);
}
static void endless(void) {
  virtio_set(victim, 9, (u64)frame, 100, victim == RECEIVE ? NEXT | DEVICE_WRITES : NEXT);
  rings[victim].descriptors[9].next = 9;
  virtio_offer(victim, 9);
}
static void empty(void) {
  virtio_set(victim, 9, (u64)frame, 0, 0);
  virtio_offer(victim, 9);
}
static void wrong_way(void) {
  virtio_set(victim, 9, (u64)frame, 100, victim == RECEIVE ? 0 : DEVICE_WRITES);
  virtio_offer(victim, 9);
}
static void huge(void) {
  for (unsigned i = 8; i < ENTRIES - 1; i++)
    virtio_set(victim, i, 0x1000, 0xffffffff, victim == RECEIVE ? NEXT | DEVICE_WRITES : NEXT);
  virtio_offer(victim, 8);
}
/* A header of segments that makes no sense, before bytes that are no frame. */
static void bad_header(void) {
  memset(frame, 0xff, 200);
  virtio_set(victim, 9, (u64)frame, 200, victim == RECEIVE ? DEVICE_WRITES : 0);
  virtio_offer(victim, 9);
}
static void many_addresses(void) {
  static const u8 lists[] = {0xff, 0xff, 0xff, 0xff, 1, 2, 3};
  control(CLASS_ADDRESS, 0, lists, sizeof(lists));
}
static void moved_rings(void) {
  mmio_write16(common(QUEUE_SELECT), (u16)victim);
  mmio_write(common(QUEUE_USED), 0x7fff0000);
  mmio_write16(common(QUEUE_SIZE), 3);
  virtio_ring(victim);
}
static void reset_in_flight(void) {
  virtio_set(victim, 9, (u64)frame, 100, victim == RECEIVE ? DEVICE_WRITES : 0);
  virtio_offer(victim, 9);
  mmio_write8(common(STATUS), 0);
}

static void (*const faults[])(void) = {
    far_index, far_head, outside,    wrapped,        endless,     empty,
    wrong_way, huge,     bad_header, many_addresses, moved_rings, reset_in_flight,
};

/* On each queue; the device is as good as new after a reset. */
static void run_nic_hostile(void) {
  if (!ready()) return;
  unsigned alive = 0;
  static const u8 off = 0;
  for (victim = RECEIVE; victim <= CONTROL; victim++)
    for (unsigned i = 0; i < COUNT(faults); i++) {
      faults[i]();
      delay_us(1000);
      if (virtio_start() && same_text(control(CLASS_RECEIVE, 0, &off, 1), "ok")) alive++;
    }
  if (virtio_start()) give_all();
  result();
  put_text(alive == 3 * COUNT(faults) ? "ok faults=" : "dead after some of faults=");
  put_decimal(3 * COUNT(faults));
  put_char('\n');
}

const struct command nic_commands[] = {
    {"nic-probe", "", 0, 1, false, run_nic_probe, "nic-probe [INDEX]"},
    {"nic-send", "source vlan", 2, 2, false, run_nic_send, "nic-send MAC TEXT [source=MAC] [vlan=N]"},
    {"nic-receive", "ms", 0, 0, false, run_nic_receive, "nic-receive [ms=2000]"},
    {"nic-mac", "", 1, 1, false, run_nic_mac, "nic-mac MAC"},
    {"nic-vlan", "", 2, 2, false, run_nic_vlan, "nic-vlan add|remove N"},
    {"nic-lists", "", 2, 2, false, run_nic_lists, "nic-lists UNICAST|- MULTICAST|-"},
    {"nic-link", "", 0, 0, false, run_nic_link, "nic-link"},
    {"nic-promiscuous", "", 1, 1, false, run_nic_promiscuous, "nic-promiscuous on|off"},
    {"nic-hostile", "", 0, 0, false, run_nic_hostile, "nic-hostile"},
    {0},
};
