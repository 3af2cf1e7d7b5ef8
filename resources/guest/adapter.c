/* SPDX-License-Identifier: Apache-2.0 */
/* Commands that drive the VF, and frames. */

#include "guest.h"

#define STATUS 0x0008
#define LINK_UP 2
#define FRAME_TYPE 0x88b5 /* for local experiments (IEEE 802) */

static void put_address(const char *name, struct mac mac) {
  put_text(name);
  put_mac(mac);
}

static bool mac_argument(unsigned index, struct mac *mac) {
  const char *text = argument(&current, index);
  if (text && parse_mac(text, mac)) return true;
  result_text("error not a MAC address");
  return false;
}

static void run_probe(void) {
  u64 index = 0;
  if (argument(&current, 1) && !number_argument(1, 31, &index)) return;
  if (!vf_probe((unsigned)index)) {
    result_text("none");
    return;
  }
  result();
  put_hex(vf.function.vendor, 4);
  put_char(':');
  put_hex(vf.function.device, 4);
  put_text(" slot=");
  put_decimal(vf.function.slot);
  put_text(" bar0=0x");
  put_hex(vf.function.bar[0], 8);
  put_text(" bar3=0x");
  put_hex(vf.function.bar[3], 8);
  put_char('\n');
}

/* How a reset, or something with one in it, came out, and the address that the guest has now. */
static void result_reset(enum outcome outcome) {
  result();
  put_text(outcome_text(outcome));
  put_address(" mac=", vf.netdev);
  put_address(" reply=", vf.perm);
  put_char('\n');
}

static void run_reset(void) { result_reset(vf_reset()); }
static void run_up(void) { result_reset(vf_up()); }
static void run_down(void) { result_reset(vf_down()); }
static void run_down_up(void) {
  enum outcome outcome = vf_down();
  result_reset(outcome == OK ? vf_up() : outcome);
}

static void run_mac(void) {
  result();
  put_mac(vf.netdev);
  put_char('\n');
}

static void run_set_mac(void) {
  struct mac mac;
  if (mac_argument(1, &mac)) result_outcome(vf_set_mac(mac));
}

/* The times of at most this many messages. */
#define TIMED 1000

static void run_time_mac(void) {
  static u32 times[TIMED];
  struct mac macs[2];
  u64 count, granted = 0;
  if (!mac_argument(1, &macs[0]) || !mac_argument(2, &macs[1]) || !number_option("count", 100, &count)) return;
  if (count == 0 || count > TIMED) {
    result_text("error count from 1 to 1000");
    return;
  }
  for (unsigned n = 0; n < count; n++) {
    u64 begun = now_us();
    granted += vf_set_mac(macs[n % 2]) == OK;
    /* Sorted from the start: the median is in the middle. */
    u32 time = (u32)(now_us() - begun);
    unsigned at = n;
    for (; at > 0 && times[at - 1] > time; at--) times[at] = times[at - 1];
    times[at] = time;
  }
  result();
  put_text("granted=");
  put_decimal(granted);
  put_text(" us=");
  put_decimal(times[0]);
  put_char('/');
  put_decimal(times[count / 2]);
  put_char('/');
  put_decimal(times[count - 1]);
  put_char('\n');
}

static void run_mac_filter(void) {
  const char *what = argument(&current, 1);
  struct mac mac = {{0}};
  if (same_text(what, "clear"))
    result_outcome(vf_filter(1, mac));
  else if (!same_text(what, "add"))
    result_text("error not add or clear");
  else if (mac_argument(2, &mac))
    result_outcome(vf_filter(2, mac));
}

static void run_vlan(void) {
  const char *what = argument(&current, 1);
  u64 vid;
  bool add = same_text(what, "add");
  if (!add && !same_text(what, "del"))
    result_text("error not add or del");
  else if (number_argument(2, 0xffff, &vid))
    result_outcome(vf_vlan(add, (u16)vid));
}

static void run_multicast(void) {
  struct mac list[30];
  unsigned count = 0;
  for (; count < COUNT(list) && argument(&current, count + 1); count++)
    if (!mac_argument(count + 1, &list[count])) return;
  result_outcome(vf_multicast(list, count));
}

static void run_frame_size(void) {
  u64 size;
  if (number_argument(1, ~0U, &size)) result_outcome(vf_frame_size((u32)size));
}

static void run_promiscuous(void) {
  static const char *const modes[] = {"off", "unicast", "multicast", "all"};
  const char *wanted = argument(&current, 1);
  for (unsigned mode = 0; mode < COUNT(modes); mode++) {
    if (!same_text(modes[mode], wanted)) continue;
    result_outcome(vf_promiscuous(mode));
    return;
  }
  result_text("error not off, unicast, multicast or all");
}

static void run_message(void) {
  u32 words[16], reply[16];
  unsigned count = 0;
  u64 value, reply_words;
  if (!number_option("reply", 1, &reply_words)) return;
  for (; count < COUNT(words) && argument(&current, count + 1); count++) {
    if (!number_argument(count + 1, ~0U, &value)) return;
    words[count] = (u32)value;
  }
  if (reply_words > COUNT(reply)) reply_words = COUNT(reply);
  enum outcome outcome = vf_post(words, count);
  if (outcome != OK) {
    result_text(outcome == TIMEOUT ? "no-ack" : outcome_text(outcome));
    return;
  }
  outcome = reply_words ? vf_reply(reply, (unsigned)reply_words) : OK;
  if (outcome != OK) {
    result_text(outcome == TIMEOUT ? "no-reply" : outcome_text(outcome));
    return;
  }
  result();
  put_text("ok");
  for (unsigned i = 0; i < reply_words; i++) {
    put_text(" 0x");
    put_hex(reply[i], 8);
  }
  put_char('\n');
}

static bool register_argument(u64 *offset) {
  if (!number_argument(1, vf.function.size[0] - 4, offset)) return false;
  if (*offset % 4 == 0) return true;
  result_text("error not a multiple of 4");
  return false;
}

static void result_word(u32 value) {
  result();
  put_text("0x");
  put_hex(value, 8);
  put_char('\n');
}

static void run_read(void) {
  u64 offset;
  if (register_argument(&offset)) result_word(vf_read((u32)offset));
}

static void run_write(void) {
  u64 offset, value;
  if (!register_argument(&offset) || !number_argument(2, ~0U, &value)) return;
  vf_write((u32)offset, (u32)value);
  result_text("ok");
}

static void run_config(void) {
  u64 offset, value;
  if (!number_argument(1, 0xfc, &offset)) return;
  if (!argument(&current, 2)) {
    result_word(config_read32(vf.function.slot, (u16)offset));
    return;
  }
  if (!number_argument(2, ~0U, &value)) return;
  config_write32(vf.function.slot, (u16)offset, (u32)value);
  result_text("ok");
}

static void run_link(void) { result_text(vf_read(STATUS) & LINK_UP ? "up" : "down"); }

static void run_frames(void) {
  result();
  put_text("sent=");
  put_decimal(frames_sent);
  put_text(" received=");
  put_decimal(frames_received);
  put_char('\n');
}

static void run_address(void) {
  const char *text = argument(&current, 1);
  if (!parse_ip(text, &own_ip)) {
    result_text("error not an IPv4 address");
    return;
  }
  result_text("ok");
}

static void run_report(void) {
  const char *what = argument(&current, 1);
  report_all = same_text(what, "all");
  result_text(report_all || same_text(what, "others") ? "ok" : "error not all or others");
}

static bool is_up(void) {
  if (!vf.up) result_text("error down; say up first");
  return vf.up;
}

/* Options of a frame. False, with the error said, if one of them is wrong. */
static bool pattern_options(struct pattern *pattern) {
  const char *src = option(&current, "src"), *dst = option(&current, "dst");
  u64 type, vlan;
  *pattern = (struct pattern){.text = option(&current, "text")};
  pattern->has_source = src;
  pattern->has_destination = dst;
  pattern->has_type = option(&current, "type");
  pattern->has_vlan = option(&current, "vlan");
  if (!number_option("type", FRAME_TYPE, &type) || !number_option("vlan", UNTAGGED, &vlan)) return false;
  if ((src && !parse_mac(src, &pattern->source)) || (dst && !parse_mac(dst, &pattern->destination))) {
    result_text("error src= or dst= is no MAC address");
    return false;
  }
  pattern->type = (u16)type;
  pattern->vlan = (u16)vlan;
  return true;
}

static void run_send(void) {
  struct pattern pattern;
  u64 tag, length, count;
  NOINIT static u8 payload[FRAME_MAX];
  if (!is_up() || !pattern_options(&pattern)) return;
  if (!number_option("tag", UNTAGGED, &tag) || !number_option("len", 0, &length) || !number_option("count", 1, &count))
    return;
  if (!pattern.has_destination) {
    result_text("error dst= is missing");
    return;
  }
  size_t text = pattern.text ? text_length(pattern.text) : 0;
  if (text > sizeof(payload)) text = sizeof(payload);
  if (length > sizeof(payload)) length = sizeof(payload);
  memset(payload, 0, sizeof(payload));
  if (text) memcpy(payload, pattern.text, text);
  if (length < text) length = text;
  u64 sent = 0;
  struct mac source = pattern.has_source ? pattern.source : vf.netdev;
  for (; sent < count; sent++) {
    if (!net_send(pattern.destination, source, pattern.type, pattern.vlan, (u16)tag, payload, (unsigned)length)) break;
    if (count > 1) net_serve();
  }
  result();
  put_text(sent == count ? "ok" : "timeout");
  put_text(" sent=");
  put_decimal(sent);
  put_char('\n');
}

static void run_expect(void) {
  struct pattern pattern;
  struct frame frame;
  u64 ms;
  if (!is_up() || !number_argument(1, 3600000, &ms) || !pattern_options(&pattern)) return;
  if (!net_expect(&pattern, now_us() + ms * 1000, &frame)) {
    result_text("none");
    return;
  }
  result();
  put_frame(&frame);
}

static void run_forget(void) {
  net_forget();
  result_text("ok");
}

static void run_ping(void) {
  u32 target;
  u64 count, size, interval, timeout;
  if (!is_up()) return;
  if (!parse_ip(argument(&current, 1), &target)) {
    result_text("error not an IPv4 address");
    return;
  }
  if (!own_ip) {
    result_text("error no address of its own; say address first");
    return;
  }
  if (!number_option("count", 3, &count) || !number_option("size", 56, &size) ||
      !number_option("interval", 10, &interval) || !number_option("timeout", 500, &timeout))
    return;
  if (size > 1472) size = 1472;
  struct ping ping = net_ping(target, (unsigned)count, (unsigned)size, interval * 1000, timeout * 1000);
  result();
  put_text("sent=");
  put_decimal(ping.sent);
  put_text(" received=");
  put_decimal(ping.received);
  put_text(" lost=");
  put_decimal(ping.sent - ping.received);
  if (!ping.resolved) put_text(" no-arp-reply");
  if (ping.received) {
    put_text(" us=");
    put_decimal(ping.least_us);
    put_char('/');
    put_decimal(ping.sum_us / ping.received);
    put_char('/');
    put_decimal(ping.most_us);
  }
  put_char('\n');
}

const struct command vf_commands[] = {
    {"probe", "", 0, 1, false, run_probe, "probe [INDEX]"},
    {"reset", "", 0, 0, true, run_reset, "reset"},
    {"up", "", 0, 0, true, run_up, "up"},
    {"down", "", 0, 0, true, run_down, "down"},
    {"down-up", "", 0, 0, true, run_down_up, "down-up"},
    {"mac", "", 0, 0, true, run_mac, "mac"},
    {"set-mac", "", 1, 1, true, run_set_mac, "set-mac MAC"},
    {"time-mac", "count", 2, 2, true, run_time_mac, "time-mac MAC MAC [count=N]"},
    {"mac-filter", "", 1, 2, true, run_mac_filter, "mac-filter add MAC | mac-filter clear"},
    {"vlan", "", 2, 2, true, run_vlan, "vlan add|del VID"},
    {"multicast", "", 0, 30, true, run_multicast, "multicast [MAC]..."},
    {"frame-size", "", 1, 1, true, run_frame_size, "frame-size BYTES"},
    {"promiscuous", "", 1, 1, true, run_promiscuous, "promiscuous off|unicast|multicast|all"},
    {"message", "reply", 1, 16, true, run_message, "message WORD... [reply=WORDS]"},
    {"read", "", 1, 1, true, run_read, "read OFFSET"},
    {"write", "", 2, 2, true, run_write, "write OFFSET VALUE"},
    {"config", "", 1, 2, true, run_config, "config OFFSET [VALUE]"},
    {"link", "", 0, 0, true, run_link, "link"},
    {"frames", "", 0, 0, false, run_frames, "frames"},
    {"address", "", 1, 1, false, run_address, "address IP"},
    {"report", "", 1, 1, false, run_report, "report all|others"},
    {"send", "dst src type vlan tag text len count", 0, 0, true, run_send,
     "send dst=MAC [src=MAC] [type=N] [vlan=VID] [tag=TCI] [text=TEXT] [len=BYTES] [count=N]"},
    {"expect", "dst src type vlan text", 1, 1, true, run_expect,
     "expect MS [dst=MAC] [src=MAC] [type=N] [vlan=VID] [text=TEXT]"},
    {"forget", "", 0, 0, false, run_forget, "forget"},
    {"ping", "count size interval timeout", 1, 1, true, run_ping,
     "ping IP [count=N] [size=BYTES] [interval=MS] [timeout=MS]"},
    {0},
};
