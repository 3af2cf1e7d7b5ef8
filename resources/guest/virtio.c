/* SPDX-License-Identifier: Apache-2.0 */
/* Virtio devices, and the commands that drive a disk or a source of random numbers, with one request at a time. */

#include "virtio.h"

#define READ 0
#define WRITE 1
#define FLUSH 4
#define GET_ID 8
#define DISCARD 11
#define ZEROES 13

/* A bit of the ISR status. */
#define CONFIGURATION_CHANGED 2

#define SECTOR 512
#define MOST_SECTORS 8
#define PATIENCE_US 5000000

struct header {
  u32 type, reserved;
  u64 sector;
};

struct range {
  u64 sector;
  u32 count, flags;
};

volatile struct rings rings[VIRTIO_QUEUES] __attribute__((aligned(4096)));
static volatile struct header header;
static u8 data[MOST_SECTORS * SECTOR] __attribute__((aligned(512)));
static volatile u8 status;

struct virtio device;

u64 common(u64 offset) { return device.at[COMMON] + offset; }

static void write64(u64 address, u64 value) {
  mmio_write(address, (u32)value);
  mmio_write(address + 4, (u32)(value >> 32));
}

static bool find_structures(u32 *step) {
  u8 slot = device.function.slot;
  u8 at = (u8)config_read32(slot, CAPABILITIES);
  for (int left = 48; at && left; left--) {
    u32 first = config_read32(slot, at);
    u8 kind = (u8)(first >> 24);
    u32 bar = config_read32(slot, (u16)(at + 4)) & 0xff;
    if ((u8)first == CAPABILITY_VENDOR && kind < KINDS && bar < 6 && device.function.bar[bar]) {
      device.at[kind] = device.function.bar[bar] + config_read32(slot, (u16)(at + 8));
      if (kind == NOTIFY) *step = config_read32(slot, (u16)(at + 16));
    }
    at = (u8)(first >> 8) & 0xfc;
  }
  return device.at[COMMON] && device.at[NOTIFY] && device.at[DEVICE];
}

bool virtio_reset(void) {
  mmio_write8(common(STATUS), 0);
  for (u64 end = now_us() + PATIENCE_US; now_us() < end; delay_us(100))
    if (mmio_read8(common(STATUS)) == 0) return true;
  return false;
}

static u32 offered(void) {
  mmio_write(common(DEVICE_FEATURE_SELECT), 0);
  return mmio_read(common(DEVICE_FEATURE));
}

/* Takes all that is offered, but for the features of rings; and starts the queues. */
bool virtio_start(void) {
  if (!virtio_reset()) return false;
  u32 features = offered() & 0x00ffffff;
  mmio_write8(common(STATUS), ACKNOWLEDGED);
  mmio_write(common(DRIVER_FEATURE_SELECT), 0);
  mmio_write(common(DRIVER_FEATURE), features);
  mmio_write(common(DRIVER_FEATURE_SELECT), 1);
  mmio_write(common(DRIVER_FEATURE), VERSION_1);
  mmio_write8(common(STATUS), ACKNOWLEDGED | FEATURES_OK);
  if (!(mmio_read8(common(STATUS)) & FEATURES_OK)) return false;
  memset((void *)&rings, 0, sizeof(rings));
  memset(device.sent, 0, sizeof(device.sent));
  mmio_write16(common(CONFIG_VECTOR), 0);
  for (unsigned i = 0; i < VIRTIO_QUEUES; i++) {
    mmio_write16(common(QUEUE_SELECT), (u16)i);
    if (!mmio_read16(common(QUEUE_SIZE))) break;
    mmio_write16(common(QUEUE_SIZE), ENTRIES);
    mmio_write16(common(QUEUE_VECTOR), 1);
    write64(common(QUEUE_DESCRIPTORS), (u64)rings[i].descriptors);
    write64(common(QUEUE_AVAILABLE), (u64)&rings[i].available_flags);
    write64(common(QUEUE_USED), (u64)&rings[i].used_flags);
    mmio_write16(common(QUEUE_ENABLE), 1);
  }
  mmio_write8(common(STATUS), ACKNOWLEDGED | FEATURES_OK | DRIVER_OK);
  return true;
}

bool virtio_probe(u16 kind, unsigned index) {
  u32 step = 0;
  device.present = false;
  device.kind = kind;
  memset(device.at, 0, sizeof(device.at));
  if (!pci_find(RED_HAT, FIRST_DEVICE + kind, index, IRQ_CHANGE, 2, &device.function) || !find_structures(&step) ||
      !virtio_start())
    return false;
  for (unsigned i = 0; i < VIRTIO_QUEUES; i++) {
    mmio_write16(common(QUEUE_SELECT), (u16)i);
    device.doorbell[i] = device.at[NOTIFY] + (u64)step * mmio_read16(common(QUEUE_NOTIFY));
  }
  device.present = true;
  return true;
}

static void put_sectors(void) {
  put_text(" sectors=");
  put_decimal(mmio_read(device.at[DEVICE]) | (u64)mmio_read(device.at[DEVICE] + 4) << 32);
}

static void probe(u16 kind) {
  u64 index = 0;
  if (argument(&current, 1) && !number_argument(1, 31, &index)) return;
  if (!virtio_probe(kind, (unsigned)index)) {
    result_text("none");
    return;
  }
  result();
  put_text("slot=");
  put_decimal(device.function.slot);
  put_text(" features=0x");
  put_hex(offered(), 8);
  if (kind == DISK) put_sectors();
  put_char('\n');
}

static void run_disk_probe(void) { probe(DISK); }

void virtio_set(unsigned queue, unsigned index, u64 address, u32 length, u16 flags) {
  rings[queue].descriptors[index].address = address;
  rings[queue].descriptors[index].length = length;
  rings[queue].descriptors[index].flags = flags;
  rings[queue].descriptors[index].next = (u16)(index + 1);
}

static void set(unsigned index, u64 address, u32 length, u16 flags) { virtio_set(0, index, address, length, flags); }

void virtio_ring(unsigned queue) { mmio_write16(device.doorbell[queue], (u16)queue); }

static void ring(void) { virtio_ring(0); }

void virtio_offer(unsigned queue, u16 head) {
  rings[queue].available[device.sent[queue] % ENTRIES] = head;
  barrier();
  rings[queue].available_index = ++device.sent[queue];
  barrier();
  virtio_ring(queue);
}

static void offer(void) { virtio_offer(0, 0); }

/* The time for a request. It goes on while the machine is paused. */
static u64 patience_us = PATIENCE_US;

bool virtio_send(unsigned queue) {
  u16 before = rings[queue].used_index;
  virtio_offer(queue, 0);
  for (u64 end = now_us() + patience_us; now_us() < end;) {
    u32 seen = events();
    if (rings[queue].used_index != before) return true;
    if (mmio_read8(common(STATUS)) & NEEDS_RESET) return false;
    sleep_until(end, seen);
  }
  return false;
}

static bool ready(u16 kind) {
  if (device.present && device.kind == kind) return true;
  result_text(kind == DISK ? "error no disk: disk-probe first" : "error no source of random numbers");
  return false;
}

static void disk_header(u32 type, u64 sector) {
  header = (struct header){.type = type, .sector = sector};
  status = 0xff;
  set(0, (u64)&header, sizeof(header), NEXT);
}

/* A request with `length` bytes of data. */
static const char *disk_request(u32 type, u64 sector, u32 length, bool device_writes) {
  disk_header(type, sector);
  unsigned last = 1;
  if (length) set(last++, (u64)data, length, device_writes ? NEXT | DEVICE_WRITES : NEXT);
  set(last, (u64)&status, 1, DEVICE_WRITES);
  if (!virtio_send(0)) return "timeout";
  return status == 0 ? "ok" : status == 1 ? "io-error" : status == 2 ? "unsupported" : "no-status";
}

static bool sectors(u64 *sector, u64 *count) {
  if (!ready(DISK) || !number_argument(1, ~0ULL, sector) || !number_option("count", 1, count)) return false;
  if (*count >= 1 && *count <= MOST_SECTORS) return true;
  result_text("error count= from 1 to 8");
  return false;
}

/* The printable beginning of each sector, with a bar between. */
static void run_disk_read(void) {
  u64 sector, count;
  if (!sectors(&sector, &count)) return;
  memset(data, 0xee, sizeof(data));
  const char *outcome = disk_request(READ, sector, (u32)count * SECTOR, true);
  result();
  put_text(outcome);
  for (u64 i = 0; i < count && same_text(outcome, "ok"); i++) {
    put_char(i ? '|' : ' ');
    for (const u8 *c = data + i * SECTOR; *c >= ' ' && *c <= '~'; c++) put_char((char)*c);
  }
  put_char('\n');
}

/* Fills each sector with the text, and zeroes behind it. */
static void run_disk_write(void) {
  u64 sector, count;
  if (!sectors(&sector, &count)) return;
  const char *text = argument(&current, 2);
  size_t length = text_length(text);
  if (length >= SECTOR) length = SECTOR - 1;
  u64 patience;
  if (!number_option("patience", PATIENCE_US / 1000000, &patience)) return;
  memset(data, 0, sizeof(data));
  for (u64 i = 0; i < count; i++) memcpy(data + i * SECTOR, text, length);
  patience_us = patience * 1000000;
  result_text(disk_request(WRITE, sector, (u32)count * SECTOR, false));
  patience_us = PATIENCE_US;
}

/* The size now, and whether the device has reported another configuration since the last time. */
static void run_disk_size(void) {
  if (!ready(DISK)) return;
  bool changed = mmio_read8(device.at[ISR]) & CONFIGURATION_CHANGED;
  result();
  put_text(changed ? "changed" : "same");
  put_sectors();
  put_char('\n');
}

static void run_disk_flush(void) {
  if (ready(DISK)) result_text(disk_request(FLUSH, 0, 0, false));
}

static void run_disk_serial(void) {
  if (!ready(DISK)) return;
  memset(data, 0, SECTOR);
  const char *outcome = disk_request(GET_ID, 0, 20, true);
  result();
  put_text(outcome);
  put_char(' ');
  put_text((const char *)data);
  put_char('\n');
}

static void run_range(u32 type) {
  u64 sector, count;
  if (!ready(DISK) || !number_argument(1, ~0ULL, &sector) || !number_option("count", 1, &count)) return;
  struct range range = {.sector = sector, .count = (u32)count};
  memcpy(data, &range, sizeof(range));
  result_text(disk_request(type, 0, sizeof(range), false));
}

static void run_disk_discard(void) { run_range(DISCARD); }
static void run_disk_zero(void) { run_range(ZEROES); }

/* Requests of one sector one after the other, each with a flush if wanted. */
static void run_disk_time(void) {
  u64 count, flush;
  const char *what = argument(&current, 1);
  u32 type = same_text(what, "write") ? WRITE : READ;
  if (!ready(DISK) || !number_option("count", 100, &count) || !number_option("flush", 0, &flush)) return;
  u64 begun = now_us(), done = 0;
  for (; done < count; done++) {
    if (!same_text(disk_request(type, done % 8, SECTOR, type == READ), "ok")) break;
    if (flush && !same_text(disk_request(FLUSH, 0, 0, false), "ok")) break;
  }
  u64 time = now_us() - begun;
  result();
  put_text("done=");
  put_decimal(done);
  put_text(" us=");
  put_decimal(done ? time / done : 0);
  put_char('\n');
}

static void run_random(void) {
  u64 count;
  if (!number_argument(1, sizeof(data), &count)) return;
  /* It has no configuration of its own: the structure is there, and empty. */
  if ((!device.present || device.kind != ENTROPY) && !virtio_probe(ENTROPY, 0)) {
    result_text("none");
    return;
  }
  memset(data, 0, sizeof(data));
  set(0, (u64)data, (u32)count, DEVICE_WRITES);
  if (!virtio_send(0)) {
    result_text("timeout");
    return;
  }
  result();
  for (u64 i = 0; i < count && i < 32; i++) put_hex(data[i], 2);
  put_char('\n');
}

/* --- faults of a driver: after each, the device needs a reset, or fails the request --- */

static void far_index(void) {
  rings[0].available_index = (u16)(device.sent[0] + 1000);
  ring();
}
static void far_head(void) {
  disk_header(READ, 0);
  rings[0].available[device.sent[0] % ENTRIES] = 40000;
  barrier();
  rings[0].available_index = ++device.sent[0];
  ring();
}
static void outside(void) {
  disk_header(READ, 0);
  set(1, 0x7fff00000000ULL, SECTOR, NEXT | DEVICE_WRITES);
  set(2, (u64)&status, 1, DEVICE_WRITES);
  offer();
}
static void wrapped(void) {
  disk_header(WRITE, 0);
  set(1, ~0ULL - 100, SECTOR, NEXT);
  set(2, (u64)&status, 1, DEVICE_WRITES);
  offer();
}
static void in_window(void) {
  disk_header(READ, 0);
  set(1, device.at[COMMON], SECTOR, NEXT | DEVICE_WRITES);
  set(2, (u64)&status, 1, DEVICE_WRITES);
  offer();
}
static void endless(void) {
  disk_header(READ, 0);
  set(1, (u64)data, SECTOR, NEXT | DEVICE_WRITES);
  rings[0].descriptors[1].next = 1;
  offer();
}
static void huge(void) {
  disk_header(READ, 0);
  for (unsigned i = 1; i < ENTRIES - 1; i++) set(i, 0x1000, 0xffffffff, NEXT | DEVICE_WRITES);
  set(ENTRIES - 1, (u64)&status, 1, DEVICE_WRITES);
  offer();
}
static void indirect_in_indirect(void) {
  set(1, (u64)&rings[0].descriptors[1], sizeof(struct descriptor), INDIRECT);
  set(0, (u64)&rings[0].descriptors[1], sizeof(struct descriptor), INDIRECT);
  offer();
}
static void no_status(void) {
  disk_header(WRITE, 0);
  rings[0].descriptors[0].flags = 0;
  offer();
}
static void backwards(void) {
  set(0, (u64)&status, 1, NEXT | DEVICE_WRITES);
  set(1, (u64)&header, sizeof(header), 0);
  offer();
}
static void reset_in_flight(void) {
  disk_header(READ, 0);
  set(1, (u64)data, sizeof(data), NEXT | DEVICE_WRITES);
  set(2, (u64)&status, 1, DEVICE_WRITES);
  offer();
  mmio_write8(common(STATUS), 0);
}
static void rings_outside(void) {
  virtio_reset();
  mmio_write8(common(STATUS), ACKNOWLEDGED);
  mmio_write(common(DRIVER_FEATURE_SELECT), 1);
  mmio_write(common(DRIVER_FEATURE), VERSION_1);
  mmio_write8(common(STATUS), ACKNOWLEDGED | FEATURES_OK);
  mmio_write16(common(QUEUE_SELECT), 0);
  write64(common(QUEUE_USED), 0x7fff00000000ULL);
  mmio_write16(common(QUEUE_ENABLE), 1);
  mmio_write8(common(STATUS), ACKNOWLEDGED | FEATURES_OK | DRIVER_OK);
  ring();
}
static void moved_rings(void) {
  write64(common(QUEUE_USED), 0);
  mmio_write16(common(QUEUE_SIZE), 3);
  offer();
}
/* The pending bits of MSI-X among them, with a vector that is masked. */
static void all_registers(void) {
  for (u32 offset = 0; offset < 0x4000; offset += 4) mmio_read(device.function.bar[0] + offset);
  mmio_write(device.function.bar[0] + 0x2000 + 12, 1);
  for (u32 offset = 0x3000; offset < 0x3010; offset += 4) mmio_read(device.function.bar[0] + offset);
  mmio_write(device.function.bar[0] + 0x2000 + 12, 0);
}
static void queues_that_are_not_there(void) {
  for (u32 i = 0; i < 0x400; i++) mmio_write16(device.at[NOTIFY] + 2 * i, (u16)i);
  for (u32 i = 0; i < 0x10000; i += 0x101) {
    mmio_write16(common(QUEUE_SELECT), (u16)i);
    mmio_write16(common(QUEUE_VECTOR), (u16)(i + 7));
    mmio_write16(common(QUEUE_ENABLE), 1);
  }
}

static void (*const faults[])(void) = {
    far_index, far_head,  outside,   wrapped,         in_window,     endless,     huge, indirect_in_indirect,
    no_status, backwards, reset_in_flight, rings_outside, moved_rings, queues_that_are_not_there,
    all_registers,
};

static void run_disk_hostile(void) {
  if (!ready(DISK)) return;
  unsigned alive = 0;
  for (unsigned i = 0; i < COUNT(faults); i++) {
    faults[i]();
    delay_us(2000);
    /* The device is as good as new after a reset. */
    if (virtio_start() && same_text(disk_request(READ, 0, SECTOR, true), "ok")) alive++;
  }
  result();
  put_text(alive == COUNT(faults) ? "ok faults=" : "dead after some of faults=");
  put_decimal(COUNT(faults));
  put_char('\n');
}

const struct command virtio_commands[] = {
    {"disk-probe", "", 0, 1, false, run_disk_probe, "disk-probe [INDEX]"},
    {"disk-read", "count", 1, 1, false, run_disk_read, "disk-read SECTOR [count=1]"},
    {"disk-write", "count patience", 2, 2, false, run_disk_write,
     "disk-write SECTOR TEXT [count=1] [patience=5]"},
    {"disk-size", "", 0, 0, false, run_disk_size, "disk-size"},
    {"disk-flush", "", 0, 0, false, run_disk_flush, "disk-flush"},
    {"disk-serial", "", 0, 0, false, run_disk_serial, "disk-serial"},
    {"disk-discard", "count", 1, 1, false, run_disk_discard, "disk-discard SECTOR [count=1]"},
    {"disk-zero", "count", 1, 1, false, run_disk_zero, "disk-zero SECTOR [count=1]"},
    {"disk-time", "count flush", 1, 1, false, run_disk_time, "disk-time read|write [count=100] [flush=0]"},
    {"disk-hostile", "", 0, 0, false, run_disk_hostile, "disk-hostile"},
    {"random", "", 1, 1, false, run_random, "random BYTES"},
    {0},
};
