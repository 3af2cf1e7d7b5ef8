/* SPDX-License-Identifier: Apache-2.0 */
/* Commands that need no VF. */

#include "guest.h"

#define ACPI_RESET 0x626
#define KEYBOARD_CONTROL 0x64

static void run_echo(void) {
  for (unsigned i = 1; i < current.count; i++) {
    if (i > 1) put_char(' ');
    put_text(current.word[i]);
  }
  put_char('\n');
}

static void run_wait(void) {
  u64 ms;
  if (!number_argument(1, 86400000, &ms)) return;
  net_wait(now_us() + ms * 1000);
  result_text("ok");
}

static void run_spin(void) {
  u64 ms;
  if (!argument(&current, 1)) {
    result_text("for ever");
    for (;;) __asm__ volatile("pause");
  }
  if (!number_argument(1, 86400000, &ms)) return;
  delay_us(ms * 1000);
  result_text("ok");
}

static void run_halt(void) {
  result_text("for ever");
  for (;;) __asm__ volatile("cli; hlt");
}

static void run_time(void) {
  result();
  put_decimal(now_us());
  put_char('\n');
}

static void run_poweroff(void) {
  result_text("ok");
  power_off();
}

static void run_reboot(void) {
  const char *how = argument(&current, 1);
  if (how && !same_text(how, "acpi") && !same_text(how, "keyboard")) {
    result_text("error not acpi or keyboard");
    return;
  }
  result_text("ok");
  if (how && same_text(how, "keyboard"))
    out8(KEYBOARD_CONTROL, 0xfe);
  else
    out8(ACPI_RESET, 1);
  for (;;) __asm__ volatile("cli; hlt");
}

static void run_triple_fault(void) {
  result_text("ok");
  triple_fault();
}

/* A port and a width in bits; false, with the error said, if one of them is none. */
static bool port_arguments(u64 *port, u64 *width) {
  if (!number_argument(1, 0xffff, port) || !number_option("width", 8, width)) return false;
  if (*width == 8 || *width == 16 || *width == 32) return true;
  result_text("error width= is not 8, 16 or 32");
  return false;
}

static void run_in(void) {
  u64 port, width;
  if (!port_arguments(&port, &width)) return;
  u32 value = width == 8 ? in8((u16)port) : width == 16 ? in16((u16)port) : in32((u16)port);
  result();
  put_text("0x");
  put_hex(value, (int)width / 4);
  put_char('\n');
}

static void run_out(void) {
  u64 port, value, width;
  if (!port_arguments(&port, &width) || !number_argument(2, ~0U, &value)) return;
  if (width == 8)
    out8((u16)port, (u8)value);
  else if (width == 16)
    out16((u16)port, (u16)value);
  else
    out32((u16)port, (u32)value);
  result_text("ok");
}

/* One instruction for all of it, which may be one exit. */
static void run_outs(void) {
  u64 port;
  const char *text = argument(&current, 2);
  if (!number_argument(1, 0xffff, &port)) return;
  size_t count = text_length(text);
  __asm__ volatile("rep outsb" : "+S"(text), "+c"(count) : "d"((u16)port) : "memory");
  put_char('\n');
  result_text("ok");
}

static void run_ins(void) {
  u8 bytes[16];
  u8 *to = bytes;
  u64 port, count;
  if (!number_argument(1, 0xffff, &port) || !number_argument(2, sizeof(bytes), &count)) return;
  size_t left = count;
  __asm__ volatile("rep insb" : "+D"(to), "+c"(left) : "d"((u16)port) : "memory");
  result();
  for (u64 i = 0; i < count; i++) put_hex(bytes[i], 2);
  put_char('\n');
}

static void run_interrupts(void) {
  static const char *const names[IRQ_KINDS] = {"transmit", "receive", "mailbox", "serial", "acpi", "change", "queue", "timer"};
  result();
  for (unsigned i = 0; i < IRQ_KINDS; i++) {
    if (i) put_char(' ');
    put_text(names[i]);
    put_char('=');
    put_decimal(interrupt_counts[i]);
  }
  put_char('\n');
}

static void run_initramfs(void) {
  if (!initramfs) {
    result_text("none");
    return;
  }
  result();
  put_decimal(initramfs_size);
  put_char(' ');
  for (u64 i = 0; i < initramfs_size && i < 64; i++) {
    char c = (char)initramfs[i];
    put_char(c > ' ' && c <= '~' ? c : '.');
  }
  put_char('\n');
}

static const u8 *smbios_string(const u8 *structure, unsigned number) {
  const u8 *text = structure + structure[1];
  while (--number) text += text_length((const char *)text) + 1;
  return text;
}

static const u8 *smbios_next(const u8 *structure) {
  const u8 *at = structure + structure[1];
  while (at[0] || at[1]) at++;
  return at + 2;
}

/* The bytes of a UUID in the order of its text: the first three fields are little-endian (DSP0134, 7.2.1). */
static const u8 uuid_order[16] = {3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15};

static void put_smbios(const u8 *structure, const u8 *end) {
  for (; structure + 4 <= end && structure[0] != 127; structure = smbios_next(structure)) {
    if (structure[0] == 1) {
      put_text("uuid=");
      for (unsigned i = 0; i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10) put_char('-');
        put_hex(structure[8 + uuid_order[i]], 2);
      }
    }
    for (unsigned i = 1; structure[0] == 11 && i <= structure[4]; i++) {
      put_char('|');
      put_text((const char *)smbios_string(structure, i));
    }
  }
}

static void run_smbios(void) {
  for (const u8 *entry = (const u8 *)0xf0000; entry < (const u8 *)0x100000; entry += 16) {
    u8 sum = 0;
    if (memcmp(entry, "_SM3_", 5) != 0) continue;
    for (unsigned i = 0; i < entry[6]; i++) sum += entry[i];
    if (sum) continue;
    u32 length;
    u64 address;
    memcpy(&length, entry + 12, sizeof(length));
    memcpy(&address, entry + 16, sizeof(address));
    result();
    put_smbios((const u8 *)address, (const u8 *)address + length);
    put_char('\n');
    return;
  }
  result_text("none");
}

static void run_help(void) {
  const struct command *const tables[] = {machine_commands, vf_commands, virtio_commands, nic_commands, hostile_commands};
  for (unsigned t = 0; t < COUNT(tables); t++) {
    for (const struct command *command = tables[t]; command->name; command++) {
      put_text("  ");
      put_text(command->usage);
      put_char('\n');
    }
  }
  result_text("ok");
}

const struct command machine_commands[] = {
    {"echo", "", 0, MAX_WORDS, false, run_echo, "echo WORD..."},
    {"wait", "", 1, 1, false, run_wait, "wait MS"},
    {"spin", "", 0, 1, false, run_spin, "spin [MS]"},
    {"halt", "", 0, 0, false, run_halt, "halt"},
    {"time", "", 0, 0, false, run_time, "time"},
    {"interrupts", "", 0, 0, false, run_interrupts, "interrupts"},
    {"in", "width", 1, 1, false, run_in, "in PORT [width=8|16|32]"},
    {"out", "width", 2, 2, false, run_out, "out PORT VALUE [width=8|16|32]"},
    {"outs", "", 2, 2, false, run_outs, "outs PORT TEXT"},
    {"ins", "", 2, 2, false, run_ins, "ins PORT COUNT"},
    {"poweroff", "", 0, 0, false, run_poweroff, "poweroff"},
    {"reboot", "", 0, 1, false, run_reboot, "reboot [acpi|keyboard]"},
    {"triple-fault", "", 0, 0, false, run_triple_fault, "triple-fault"},
    {"initramfs", "", 0, 0, false, run_initramfs, "initramfs"},
    {"smbios", "", 0, 0, false, run_smbios, "smbios"},
    {"help", "", 0, 0, false, run_help, "help"},
    {0},
};
