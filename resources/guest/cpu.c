/* SPDX-License-Identifier: Apache-2.0 */
/* Interrupts and time of the boot processor. */

#include "guest.h"

#define LOCAL_APIC 0xfee00000ULL
#define APIC_ID 0x20
#define APIC_SPURIOUS 0xf0
#define APIC_LVT_TIMER 0x320
#define APIC_LVT_LINT0 0x350
#define APIC_TIMER_START 0x380
#define APIC_TIMER_LEFT 0x390
#define APIC_TIMER_DIVIDE 0x3e0
#define MASKED 0x10000

#define IOAPIC 0xfec00000ULL
#define SERIAL_PIN 4
#define ACPI_PIN 16

#define ACPI_EVENTS 0x620
#define ACPI_SLEEP 0x624
#define POWER_BUTTON 1

/* KVM's local APIC counts nanoseconds. */
#define APIC_TICKS_PER_US 1000
#define CALIBRATION_US 1000

struct gate {
  u16 offset_low, selector;
  u8 stack, type;
  u16 offset_middle;
  u32 offset_high, reserved;
};

extern const u32 exception_entries[22], interrupt_entries[IRQ_KINDS];
extern u8 spurious_entry[], stray_entry[];
void guest_exception(u64 number, u64 code, u64 rip, u64 address);

static struct gate idt[256];
static u64 tsc_start, tsc_per_us;

static u64 tsc(void) {
  u32 low, high;
  __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
  return (u64)high << 32 | low;
}

static void set_gate(unsigned vector, u64 entry) {
  idt[vector] = (struct gate){
      .offset_low = (u16)entry,
      .selector = 8,
      .type = 0x8e, /* present, interrupt gate */
      .offset_middle = (u16)(entry >> 16),
      .offset_high = (u32)(entry >> 32),
  };
}

static void ioapic_write(u32 index, u32 value) {
  mmio_write(IOAPIC, index);
  mmio_write(IOAPIC + 0x10, value);
}

static void connect_pin(u32 pin, unsigned kind) {
  ioapic_write(0x11 + 2 * pin, apic_id() << 24);
  ioapic_write(0x10 + 2 * pin, VECTOR_BASE + kind); /* edge, fixed, physical, unmasked */
}

u32 apic_id(void) { return mmio_read(LOCAL_APIC + APIC_ID) >> 24; }

static void calibrate(void) {
  mmio_write(LOCAL_APIC + APIC_LVT_TIMER, MASKED | (VECTOR_BASE + IRQ_TIMER));
  mmio_write(LOCAL_APIC + APIC_TIMER_DIVIDE, 0xb); /* by one */
  mmio_write(LOCAL_APIC + APIC_TIMER_START, ~0U);
  /* Before and after: what else the host does meanwhile makes waits longer, and never shorter. */
  tsc_start = tsc();
  u32 first = mmio_read(LOCAL_APIC + APIC_TIMER_LEFT), passed;
  u64 end;
  do {
    passed = first - mmio_read(LOCAL_APIC + APIC_TIMER_LEFT);
    end = tsc();
  } while (passed < CALIBRATION_US * APIC_TICKS_PER_US);
  tsc_per_us = (end - tsc_start) * APIC_TICKS_PER_US / passed;
  if (tsc_per_us == 0) tsc_per_us = 1;
  mmio_write(LOCAL_APIC + APIC_TIMER_START, 0);
  mmio_write(LOCAL_APIC + APIC_LVT_TIMER, VECTOR_BASE + IRQ_TIMER);
}

void cpu_start(void) {
  for (unsigned i = 0; i < COUNT(exception_entries); i++) set_gate(i, exception_entries[i]);
  for (unsigned i = 32; i < COUNT(idt); i++) set_gate(i, (u64)stray_entry);
  for (unsigned i = 0; i < IRQ_KINDS; i++) set_gate(VECTOR_BASE + i, interrupt_entries[i]);
  set_gate(SPURIOUS_VECTOR, (u64)spurious_entry);
  struct {
    u16 limit;
    u64 base;
  } __attribute__((packed)) pointer = {sizeof(idt) - 1, (u64)idt};
  __asm__ volatile("lidt %0" : : "m"(pointer));
  /* Nothing comes from the old interrupt controllers. */
  out8(0x21, 0xff);
  out8(0xa1, 0xff);
  mmio_write(LOCAL_APIC + APIC_LVT_LINT0, MASKED);
  mmio_write(LOCAL_APIC + APIC_SPURIOUS, 0x100 | SPURIOUS_VECTOR);
  calibrate();
  connect_pin(SERIAL_PIN, IRQ_SERIAL);
  connect_pin(ACPI_PIN, IRQ_ACPI);
  __asm__ volatile("sti");
}

u64 now_us(void) { return (tsc() - tsc_start) / tsc_per_us; }

void delay_us(u64 us) {
  u64 end = tsc() + us * tsc_per_us;
  while (tsc() < end) __asm__ volatile("pause");
}

static void check_power_button(void) {
  static u32 seen;
  if (interrupt_counts[IRQ_ACPI] == seen) return;
  seen = interrupt_counts[IRQ_ACPI];
  if (in32(ACPI_EVENTS) & POWER_BUTTON) {
    put_text("power button: powering off\n");
    power_off();
  }
}

u32 events(void) {
  u32 sum = 0;
  for (unsigned i = 0; i < IRQ_TIMER; i++) sum += interrupt_counts[i];
  return sum;
}

void sleep_until(u64 deadline_us, u32 seen) {
  check_power_button();
  u64 now = now_us();
  if (now >= deadline_us) return;
  u64 rest = deadline_us - now;
  if (rest > 4000000) rest = 4000000; /* what the timer can count; FOREVER looks around now and then */
  __asm__ volatile("cli" : : : "memory");
  if (events() == seen) {
    mmio_write(LOCAL_APIC + APIC_TIMER_START, (u32)rest * APIC_TICKS_PER_US);
    /* An interrupt between the look and the sleep is held off until the sleep, and ends it. */
    __asm__ volatile("sti; hlt; cli" : : : "memory");
    mmio_write(LOCAL_APIC + APIC_TIMER_START, 0);
  }
  __asm__ volatile("sti" : : : "memory");
}

void guest_exception(u64 number, u64 code, u64 rip, u64 address) {
  put_text("exception ");
  put_decimal(number);
  put_text(" code=0x");
  put_hex(code, 8);
  put_text(" rip=0x");
  put_hex(rip, 8);
  put_text(" address=0x");
  put_hex(address, 16);
  put_text(": powering off\n");
  power_off();
}

_Noreturn void power_off(void) {
  out8(ACPI_SLEEP, 0x34); /* SLP_EN, S5 */
  for (;;) __asm__ volatile("cli; hlt");
}
