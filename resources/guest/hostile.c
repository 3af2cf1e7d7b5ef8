/* SPDX-License-Identifier: Apache-2.0 */
/* What a guest does that is not meant well. None of it may hurt anybody but this guest. */

#include "guest.h"

#define CONTROL 0x0000
#define CONTROL_RESET 0x04000000
#define BUFFER 0x0800
#define MAILBOX 0x0c40
#define REQ 1
#define PAGE 4096
#define REGISTERS_BAR 0
#define MSIX_BAR 3

#define WINDOW 0xc0000000ULL
#define WINDOW_SIZE 0x1000000
#define ECAM 0xe0000000ULL
#define ECAM_SIZE 0x100000
#define CONFIG_ADDRESS 0xcf8
#define CONFIG_DATA 0xcfc

#define LOCAL_APIC_COMMAND 0xfee00300ULL
#define APIC_TO_SELF 0x40000

#define RX_QUEUE 0x2800
#define TX_QUEUE 0x3800
#define BASE_LOW 0x00
#define BASE_HIGH 0x04
#define LENGTH 0x08
#define HEAD 0x10
#define TAIL 0x18
#define QUEUE_CONTROL 0x28
#define ENABLE 0x02000000
#define DESCRIPTORS 64
#define VECTOR_TABLE 64

/* xorshift64*: the same seed does the same. */
static u64 state;

static u32 next(void) {
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return (u32)(state * 0x2545f4914f6cdd1dULL >> 32);
}

static u32 below(u32 bound) { return next() % bound; }

/* Values at the edges are more telling than evenly spread ones. */
static u32 value(void) {
  static const u32 edges[] = {0, 1, 2, 0xff, 0xffff, 0x7fffffff, 0x80000000, 0xfffffff0, 0xffffffff, CONTROL_RESET};
  switch (below(4)) {
  case 0: return edges[below(COUNT(edges))];
  case 1: return 1U << below(32);
  case 2: return below(0x10000);
  default: return next();
  }
}

static void access(u64 address, unsigned width, bool write) {
  u64 data = (u64)value() << 32 | value();
  if (write) {
    switch (width) {
    case 0: __asm__ volatile("movb %b0, (%1)" : : "q"(data), "r"(address) : "memory"); break;
    case 1: __asm__ volatile("movw %w0, (%1)" : : "r"(data), "r"(address) : "memory"); break;
    case 2: __asm__ volatile("movl %k0, (%1)" : : "r"(data), "r"(address) : "memory"); break;
    default: __asm__ volatile("movq %0, (%1)" : : "r"(data), "r"(address) : "memory");
    }
  } else {
    switch (width) {
    case 0: __asm__ volatile("movb (%1), %b0" : "=q"(data) : "r"(address) : "memory"); break;
    case 1: __asm__ volatile("movw (%1), %w0" : "=r"(data) : "r"(address) : "memory"); break;
    case 2: __asm__ volatile("movl (%1), %k0" : "=r"(data) : "r"(address) : "memory"); break;
    default: __asm__ volatile("movq (%1), %0" : "=r"(data) : "r"(address) : "memory");
    }
  }
}

static void set_queue(u32 queue, u64 address, u32 length, u32 head, u32 tail) {
  vf_write(queue + BASE_LOW, (u32)address);
  vf_write(queue + BASE_HIGH, (u32)(address >> 32));
  vf_write(queue + LENGTH, length);
  vf_write(queue + HEAD, head);
  vf_write(queue + QUEUE_CONTROL, ENABLE);
  vf_write(queue + TAIL, tail);
}

static void fuzz_mailbox(void) {
  u64 bar = vf.function.bar[REGISTERS_BAR];
  switch (below(8)) {
  case 0: vf_write(CONTROL, CONTROL_RESET); break;
  case 1:
  case 2: vf_write(MAILBOX, below(256)); break;
  /* A message that could be one. */
  case 3: vf_write(BUFFER, below(8) | below(4) << 16 | below(8) << 29); break;
  case 4: vf_write(MAILBOX, REQ); break;
  case 5: vf_write(BUFFER + 4 * below(16), value()); break;
  default: access(bar + below(PAGE), below(4), next() & 1);
  }
}

static void fuzz_registers(void) {
  u64 size = vf.function.size[REGISTERS_BAR];
  u32 offset = below((u32)size) & ~3U;
  if (next() & 1) offset = (next() & 1 ? RX_QUEUE : TX_QUEUE) + 4 * below(16);
  vf_write(offset, value());
}

/* An interrupt that the guest could not survive (NMI, INIT, an exception's vector) would end the run, and tell nothing. */
static void fuzz_vectors(void) {
  u64 bar = vf.function.bar[MSIX_BAR];
  if (!bar) return;
  u32 offset = below((u32)vf.function.size[MSIX_BAR]) & ~3U;
  if (next() & 1) offset = 4 * below(16);
  u32 data = offset % 16 == 8 ? 0x80 | (value() & 0x7f) : value();
  mmio_write(bar + offset, data);
}

/* Every page of every BAR, in every width, also across pages. */
static void fuzz_bars(void) {
  unsigned index = next() & 1 ? REGISTERS_BAR : MSIX_BAR;
  u64 bar = vf.function.bar[index];
  if (!bar) return;
  u32 page = below((u32)(vf.function.size[index] / PAGE)), offset = below(PAGE);
  u64 at = (u64)page * PAGE + offset;
  if (at + 8 > vf.function.size[index]) return;
  if (index == MSIX_BAR && at < VECTOR_TABLE)
    fuzz_vectors();
  else
    access(bar + at, below(4), next() & 1);
}

/* Descriptors of all kinds in a ring that is one, with buffers in the other ring or where no memory is. */
static void fuzz_descriptors(void) {
  static const u64 places[] = {0xfee00000, 0xc0000000, 0x1fffff, 0x100000000000ULL, 0xffffffffffffffff};
  bool send = next() & 1;
  u64 ring = send ? transmit_ring_address() : receive_ring_address();
  u32 *words = (u32 *)ring;
  for (u32 i = 1 + below(8); i; i--) {
    u32 *descriptor = words + 4 * below(DESCRIPTORS);
    u64 buffer = send && next() & 1 ? receive_ring_address() + below(64) : places[below(COUNT(places))];
    descriptor[0] = (u32)buffer;
    descriptor[1] = (u32)(buffer >> 32);
    /* Mostly an advanced one, of data or a context. */
    descriptor[2] = below(4) ? (value() & 0xdf0fffff) | 0x20000000 | (2 + below(2)) << 20 : value();
    descriptor[3] = value();
  }
  barrier();
  u32 length = send && !below(4) ? value() & 0xfff80 : 16 * DESCRIPTORS;
  set_queue(send ? TX_QUEUE : RX_QUEUE, ring, length, below(DESCRIPTORS + 2), below(2 * DESCRIPTORS));
}

static void fuzz_config(void) {
  /* Mostly the VF, sometimes the bridge or an empty slot. */
  u8 slot = below(8) ? vf.function.slot : (u8)below(32);
  u32 function = below(8) ? 0 : below(8), bus = below(8) ? 0 : below(256);
  out32(CONFIG_ADDRESS, 0x80000000 | bus << 16 | (u32)slot << 11 | function << 8 | (below(256) & 0xfc));
  u16 port = (u16)(CONFIG_DATA + below(4));
  switch (below(6)) {
  case 0: out8(port, (u8)value()); break;
  case 1: out16(port, (u16)value()); break;
  case 2: out32(port, value()); break;
  case 3: in8(port); break;
  case 4: in16(port); break;
  default: in32(port);
  }
}

static void fuzz_memory(void) {
  u64 address = next() & 1 ? WINDOW + below(WINDOW_SIZE - 8) : ECAM + below(ECAM_SIZE - 8);
  access(address, below(4), next() & 1);
}

/* Not those that end the run, or that KVM itself serves. */
static bool spared(u32 port) {
  return port < 0x100 || (port >= 0x3f8 && port < 0x400) || (port >= 0x4d0 && port < 0x4d2) ||
         (port >= 0x620 && port < 0x628) || (port >= 0xcf8 && port < 0xd00);
}

static void fuzz_ports(void) {
  u32 port = next() & 1 ? below(0x10000) : below(0x1000);
  if (spared(port) || spared(port + 3) || port > 0xfffc) return;
  switch (below(4)) {
  case 0: out8((u16)port, (u8)value()); break;
  case 1: out16((u16)port, (u16)value()); break;
  case 2: out32((u16)port, value()); break;
  default: in32((u16)port);
  }
}

static const struct {
  const char *name;
  bool needs_vf;
  void (*step)(void);
} targets[] = {
    {"mailbox", true, fuzz_mailbox},         {"registers", true, fuzz_registers}, {"vectors", true, fuzz_vectors},
    {"descriptors", true, fuzz_descriptors}, {"bars", true, fuzz_bars},           {"config", true, fuzz_config},
    {"memory", false, fuzz_memory},          {"ports", false, fuzz_ports},
};

static void fuzz_once(unsigned first, unsigned count, u64 seed, u64 steps) {
  state = seed + 0x9e3779b97f4a7c15ULL;
  if (!state) state = 1;
  vf.up = false;
  for (u64 i = 0; i < steps; i++) targets[first + below(count)].step();
}

static void run_fuzz(void) {
  const char *what = argument(&current, 1);
  u64 seed, steps, runs;
  if (!number_option("seed", 1, &seed) || !number_option("steps", 1000, &steps) || !number_option("runs", 1, &runs))
    return;
  unsigned first = 0, count = COUNT(targets);
  if (!same_text(what, "all")) {
    while (first < COUNT(targets) && !same_text(targets[first].name, what)) first++;
    if (first == COUNT(targets)) {
      result_text("error not mailbox, registers, vectors, descriptors, bars, config, memory, ports or all");
      return;
    }
    count = 1;
  }
  if (targets[first].needs_vf && !vf.present) {
    result_text("error no VF");
    return;
  }
  bool had_vf = vf.present, lost = false;
  u64 done = 0;
  while (done < runs && !lost) {
    fuzz_once(first, count, seed + done++, steps);
    /* BARs and vectors may be anywhere now. */
    if (had_vf) vf_probe(vf.index);
    lost = had_vf && !vf.present;
  }
  result();
  put_text("ok steps=");
  put_decimal(done * steps);
  put_text(lost ? " lost\n" : "\n");
}

/* Rings where no memory is, at its end, and across the end of the address space. */
static void hostile_rings(void) {
  static const u64 places[] = {0x1ff000,           0xfee00000,         0xc0000000,        0x100000000000ULL,
                               0xffffffffffffff80, 0x7fffffffffffff80, 0xfffffffffffff000};
  for (unsigned i = 0; i < COUNT(places); i++) {
    set_queue(TX_QUEUE, places[i], 0xfff80, 0, 1000);
    set_queue(RX_QUEUE, places[i], 0xfff80, 0, 1000);
    delay_us(2000);
  }
}

static void hostile_indices(void) {
  static const u32 indices[] = {DESCRIPTORS, DESCRIPTORS + 1, 0x7fff, 0xffff, 0xffffffff};
  for (unsigned i = 0; i < COUNT(indices); i++) {
    set_queue(TX_QUEUE, transmit_ring_address(), 16 * DESCRIPTORS, indices[i], 0);
    set_queue(TX_QUEUE, transmit_ring_address(), 16 * DESCRIPTORS, 0, indices[i]);
    set_queue(RX_QUEUE, receive_ring_address(), 16 * DESCRIPTORS, 0, indices[i]);
    delay_us(2000);
  }
}

static void fill_ring(u64 address, u64 buffer, u32 command) {
  u32 *words = (u32 *)address;
  for (unsigned i = 0; i < DESCRIPTORS; i++) {
    words[4 * i] = (u32)buffer;
    words[4 * i + 1] = (u32)(buffer >> 32);
    words[4 * i + 2] = command;
    words[4 * i + 3] = 0x3fff << 14;
  }
  barrier();
}

/* Buffers outside of memory, on both queues. */
static void hostile_buffers(void) {
  static const u64 places[] = {0xfee00000, 0xc0000000, 0x100000000000ULL, 0xffffffffffffffff};
  for (unsigned i = 0; i < COUNT(places); i++) {
    fill_ring(transmit_ring_address(), places[i], 0x2b300000 | 1000);
    set_queue(TX_QUEUE, transmit_ring_address(), 16 * DESCRIPTORS, 0, DESCRIPTORS - 1);
    fill_ring(receive_ring_address(), places[i], 0);
    set_queue(RX_QUEUE, receive_ring_address(), 16 * DESCRIPTORS, 0, DESCRIPTORS - 1);
    delay_us(2000);
  }
}

/* A packet that never ends: a full ring, again and again, without an end of packet. */
static void hostile_endless(void) {
  fill_ring(transmit_ring_address(), receive_ring_address(), 0x20300000 | 0xffff);
  set_queue(TX_QUEUE, transmit_ring_address(), 16 * DESCRIPTORS, 0, 0);
  for (u32 round = 0; round < 1000; round++) vf_write(TX_QUEUE + TAIL, round % 2 ? DESCRIPTORS - 1 : DESCRIPTORS / 2);
}

/* Messages faster than anybody could want them, without waiting for an answer. */
static void hostile_messages(void) {
  for (u32 i = 0; i < 2000; i++) {
    vf_write(BUFFER, 2);
    vf_write(BUFFER + 4, 0x02 | i << 8);
    vf_write(MAILBOX, REQ);
  }
}

static void hostile_resets(void) {
  for (u32 i = 0; i < 200; i++) vf_write(CONTROL, CONTROL_RESET);
}

/* All widths, also across registers and pages, and as strings. */
static void hostile_widths(void) {
  u64 bar = vf.function.bar[REGISTERS_BAR];
  for (u32 offset = MAILBOX - 8; offset < MAILBOX + 8; offset++)
    for (unsigned width = 0; width < 4; width++) access(bar + offset, width, offset & 1);
  for (u32 offset = PAGE - 8; offset < PAGE; offset++)
    for (unsigned width = 0; width < 4; width++) access(bar + offset, width, offset & 1);
  u64 to = bar + BUFFER, from = receive_ring_address(), count = 64;
  __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
  from = bar + BUFFER, to = receive_ring_address(), count = 8;
  __asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
}

/* The vector of spurious interrupts, as an adapter sends it whose vectors were written at random. */
static void hostile_spurious(void) { mmio_write(LOCAL_APIC_COMMAND, APIC_TO_SELF | SPURIOUS_VECTOR); }

static const struct {
  const char *name;
  void (*run)(void);
} deeds[] = {
    {"rings", hostile_rings},       {"indices", hostile_indices},   {"buffers", hostile_buffers},
    {"endless", hostile_endless},   {"messages", hostile_messages}, {"resets", hostile_resets},
    {"widths", hostile_widths},     {"spurious", hostile_spurious},
};

static void run_hostile(void) {
  const char *what = argument(&current, 1);
  for (unsigned i = 0; i < COUNT(deeds); i++) {
    if (!same_text(deeds[i].name, what)) continue;
    vf.up = false;
    deeds[i].run();
    result_text("ok");
    return;
  }
  result_text("error not rings, indices, buffers, endless, messages, resets, widths or spurious");
}

static void run_babble(void) {
  u64 lines;
  if (!number_argument(1, 1000000, &lines)) return;
  for (u64 i = 0; i < lines; i++) {
    put_text("babble ");
    put_decimal(i);
    put_char('\n');
  }
  result_text("ok");
}

const struct command hostile_commands[] = {
    {"fuzz", "seed steps runs", 1, 1, false, run_fuzz,
     "fuzz mailbox|registers|vectors|descriptors|bars|config|memory|ports|all [seed=N] [steps=N] [runs=N]"},
    {"hostile", "", 1, 1, true, run_hostile,
     "hostile rings|indices|buffers|endless|messages|resets|widths|spurious"},
    {"babble", "", 1, 1, false, run_babble, "babble LINES"},
    {0},
};
