/* SPDX-License-Identifier: Apache-2.0 */
/* The small guest: what its parts know of each other. */

#ifndef GUEST_H
#define GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
/* Neither loaded nor cleared: whoever uses it writes first. */
#define NOINIT __attribute__((section(".bss.noinit")))

/* --- ports and memory-mapped registers ------------------------------------------------------------------------- */

static inline void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void out16(u16 port, u16 value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static inline void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 in8(u16 port) {
  u8 value;
  __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
  return value;
}
static inline u16 in16(u16 port) {
  u16 value;
  __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
  return value;
}
static inline u32 in32(u16 port) {
  u32 value;
  __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
  return value;
}
/* A plain move each: what the compiler would make of a volatile access may be more than an emulator knows. */
static inline u32 mmio_read(u64 address) {
  u32 value;
  __asm__ volatile("movl (%1), %0" : "=r"(value) : "r"(address) : "memory");
  return value;
}
static inline void mmio_write(u64 address, u32 value) {
  __asm__ volatile("movl %0, (%1)" : : "r"(value), "r"(address) : "memory");
}
static inline u8 mmio_read8(u64 address) {
  u8 value;
  __asm__ volatile("movb (%1), %0" : "=q"(value) : "r"(address) : "memory");
  return value;
}
static inline u16 mmio_read16(u64 address) {
  u16 value;
  __asm__ volatile("movw (%1), %0" : "=r"(value) : "r"(address) : "memory");
  return value;
}
static inline void mmio_write8(u64 address, u8 value) {
  __asm__ volatile("movb %0, (%1)" : : "q"(value), "r"(address) : "memory");
}
static inline void mmio_write16(u64 address, u16 value) {
  __asm__ volatile("movw %0, (%1)" : : "r"(value), "r"(address) : "memory");
}
static inline void barrier(void) { __asm__ volatile("" : : : "memory"); }

/* --- text.c: strings, numbers, addresses ----------------------------------------------------------------------- */

struct mac {
  u8 byte[6];
};

/* The compiler calls these, too. */
void *memcpy(void *to, const void *from, size_t count);
void *memset(void *to, int value, size_t count);
int memcmp(const void *a, const void *b, size_t count);
bool same_text(const char *a, const char *b);
size_t text_length(const char *text);
bool same_mac(struct mac a, struct mac b);
bool is_zero_mac(struct mac mac);
bool is_group_mac(struct mac mac);
/* What igbvf takes for an adapter's address: neither zero nor a group. */
bool is_assignable_mac(struct mac mac);

/* Decimal, or hexadecimal after 0x. */
bool parse_number(const char *text, u64 *value);
bool parse_mac(const char *text, struct mac *mac);
/* In host byte order. */
bool parse_ip(const char *text, u32 *ip);

void put_char(char c);
void put_text(const char *text);
void put_decimal(u64 value);
void put_hex(u64 value, int digits);
void put_mac(struct mac mac);
void put_ip(u32 ip);

/* --- cpu.c: interrupts and time -------------------------------------------------------------------------------- */

/* Numbers in interrupt_counts and, from VECTOR_BASE on, vectors. The first three are the VF's, numbered as igbvf does;
   change and queue are a virtio device's. */
enum { IRQ_TRANSMIT, IRQ_RECEIVE, IRQ_MAILBOX, IRQ_SERIAL, IRQ_ACPI, IRQ_CHANGE, IRQ_QUEUE, IRQ_TIMER, IRQ_KINDS };
#define VECTOR_BASE 0x40
#define SPURIOUS_VECTOR 0xff

extern volatile u32 interrupt_counts[IRQ_KINDS];

void cpu_start(void);
u64 now_us(void);
/* Busy, as drivers' udelay. */
void delay_us(u64 us);
/* Interrupts so far, but for the timer's. */
u32 events(void);
/* Sleeps until something interrupts that is not counted in `seen`, or until the time has come. */
void sleep_until(u64 deadline_us, u32 seen);
#define FOREVER (~0ULL)
u32 apic_id(void);
_Noreturn void power_off(void);
_Noreturn void triple_fault(void);

/* --- pci.c ----------------------------------------------------------------------------------------------------- */

/* A PCI function that is driven. */
struct function {
  u8 slot;
  u16 vendor, device;
  u64 bar[6];
  u64 size[6];
};

u32 config_read32(u8 slot, u16 offset);
void config_write32(u8 slot, u16 offset, u32 value);
/* The `index`-th 82576 or i350 VF of the bus: placed, enabled, and with MSI-X vectors as above. */
bool pci_find_vf(unsigned index, struct function *function);
/* The `index`-th function with these ids: placed, enabled, and with `vectors` MSI-X vectors from `first` on. */
bool pci_find(u16 vendor, u16 device, unsigned index, unsigned first, unsigned vectors, struct function *function);

/* --- vf.c: the VF as igbvf drives it --------------------------------------------------------------------------- */

enum outcome { OK, NACK, TIMEOUT, NOT_SENT, STILL_RESETTING };
const char *outcome_text(enum outcome outcome);

struct vf {
  bool present;
  unsigned index;
  struct function function;
  /* hw.mac.addr: what was asked for last. perm_addr: of the last reset's reply. netdev: what `ip link` would show. */
  struct mac mac, perm, netdev;
  /* Queues are set up. */
  bool up;
  bool was_reset;
  /* Mailbox status bits that were read, and so cleared; retries left before a mailbox is given up (0: it was). */
  u32 cached, retries;
};

extern struct vf vf;

bool vf_probe(unsigned index);
u32 vf_read(u32 offset);
void vf_write(u32 offset, u32 value);
enum outcome vf_post(const u32 *words, unsigned count);
enum outcome vf_reply(u32 *words, unsigned count);
/* Posts, and says what word 0 of the reply means. */
enum outcome vf_call(const u32 *words, unsigned count, unsigned reply_words);
/* igbvf_reset: reset, restore the address, take over what came of it. */
enum outcome vf_reset(void);
enum outcome vf_set_mac(struct mac mac);
enum outcome vf_filter(unsigned info, struct mac mac);
enum outcome vf_vlan(bool add, u16 vid);
enum outcome vf_multicast(const struct mac *list, unsigned count);
enum outcome vf_frame_size(u32 size);
enum outcome vf_promiscuous(unsigned mode);
/* Queues and interrupts as at `ip link set up`, with a reset before if there was none. */
enum outcome vf_up(void);
enum outcome vf_down(void);

/* --- queues.c -------------------------------------------------------------------------------------------------- */

#define FRAME_MAX 1536
#define UNTAGGED 0xffff

void queues_start(void);
void queues_stop(void);
/* The buffer of the next frame. */
u8 *transmit_buffer(void);
/* Sends it, and waits until it is gone. `vlan` is for the adapter to insert. */
bool transmit(unsigned length, u16 vlan);
/* A frame, or NULL. It stays until receive_done. */
u8 *receive(unsigned *length, u16 *vlan);
void receive_done(void);
void queues_enable_interrupts(void);
u64 receive_ring_address(void);
u64 transmit_ring_address(void);

/* --- net.c ----------------------------------------------------------------------------------------------------- */

/* A frame as it is reported and remembered. */
struct frame {
  struct mac source, destination;
  u16 type, vlan;
  unsigned length;
  char text[49];
};

/* What a frame must be like. A field counts if its flag is set. */
struct pattern {
  bool has_source, has_destination, has_type, has_vlan;
  struct mac source, destination;
  u16 type, vlan;
  const char *text;
};

struct ping {
  unsigned sent, received;
  bool resolved;
  u64 least_us, most_us, sum_us;
};

extern u32 own_ip;
extern bool report_all;
extern u64 frames_received, frames_sent;

/* Serves the receive queue: answers ARP and echo requests, reports and remembers other frames. */
void net_serve(void);
void net_wait(u64 deadline_us);
/* Waits until a condition holds, which is looked at after all that happens. False if the deadline came first. */
bool net_wait_for(const volatile bool *condition, u64 deadline_us);
bool net_send(struct mac destination, struct mac source, u16 type, u16 vlan, u16 inline_tag, const u8 *payload,
              unsigned length);
/* Waits for a frame, among those not yet asked for first. */
bool net_expect(const struct pattern *pattern, u64 deadline_us, struct frame *found);
void net_forget(void);
void put_frame(const struct frame *frame);
struct ping net_ping(u32 target, unsigned count, unsigned size, u64 interval_us, u64 timeout_us);

/* --- script.c: the language ------------------------------------------------------------------------------------ */

#define MAX_WORDS 40

struct words {
  unsigned count;
  char *word[MAX_WORDS];
};

/* The n-th word without '=', from 1 on; 0 is the command. NULL if there are not as many. */
char *argument(const struct words *words, unsigned index);
/* The value of a word NAME=VALUE, or NULL. */
char *option(const struct words *words, const char *name);
/* The n-th word as a number of at most `most`. False, with the error said, if it is none. */
bool number_argument(unsigned index, u64 most, u64 *value);
/* A number, or `otherwise` if there is no such option. False, with the error said, if it is none. */
bool number_option(const char *name, u64 otherwise, u64 *value);
/* Begins a result line: the command and its arguments, then a colon. */
void result(void);
void result_text(const char *text);
void result_outcome(enum outcome outcome);
/* The initramfs, if the host has loaded one. */
extern const u8 *initramfs;
extern u64 initramfs_size;
void script_run(const char *text);
void serve_input(void);

/* The words of the command that is being done. */
extern struct words current;

struct command {
  const char *name;
  /* Options that it knows, separated by blanks. */
  const char *options;
  u8 least, most;
  bool needs_vf;
  void (*run)(void);
  const char *usage;
};

extern const struct command machine_commands[], vf_commands[], virtio_commands[], nic_commands[], hostile_commands[];

#endif
