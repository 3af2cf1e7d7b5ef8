/* SPDX-License-Identifier: Apache-2.0 */
/* Finding functions on bus 0, and giving them addresses and vectors. */

#include "guest.h"

#define CONFIG_ADDRESS 0xcf8
#define CONFIG_DATA 0xcfc
#define SLOTS 32

#define COMMAND 0x04
#define COMMAND_MEMORY 0x2
#define COMMAND_MASTER 0x4
#define BAR0 0x10
#define CAPABILITIES 0x34
#define CAPABILITY_MSIX 0x11
#define MSIX_ENABLE 0x80000000
#define MSIX_ALL_MASKED 0x40000000

/* Each slot has a piece of the PCI window of its own: nobody else places anything there. */
#define WINDOW 0xc0000000ULL
#define WINDOW_OF_SLOT 0x80000ULL

#define INTEL 0x8086
#define VF_82576 0x10ca
#define VF_I350 0x1520
#define VECTORS 3
#define MESSAGE_ADDRESS 0xfee00000

static void select(u8 slot, u16 offset) {
  out32(CONFIG_ADDRESS, 0x80000000 | (u32)slot << 11 | (offset & 0xfc));
}

u32 config_read32(u8 slot, u16 offset) {
  select(slot, offset);
  return in32(CONFIG_DATA);
}

void config_write32(u8 slot, u16 offset, u32 value) {
  select(slot, offset);
  out32(CONFIG_DATA, value);
}

/* Sizes and places the memory BARs. They do not decode meanwhile. */
static bool place(struct function *function) {
  u64 at = WINDOW + WINDOW_OF_SLOT * function->slot, end = at + WINDOW_OF_SLOT;
  for (u16 i = 0; i < 6; i++) {
    u16 offset = (u16)(BAR0 + 4 * i);
    config_write32(function->slot, offset, ~0U);
    u32 low = config_read32(function->slot, offset);
    if (low == 0 || low & 1) continue;
    bool wide = (low & 6) == 4;
    u64 mask = 0xffffffff00000000ULL | (low & ~15U);
    if (wide) {
      config_write32(function->slot, (u16)(offset + 4), ~0U);
      mask = (u64)config_read32(function->slot, (u16)(offset + 4)) << 32 | (low & ~15U);
    }
    u64 size = ~mask + 1;
    at = (at + size - 1) & ~(size - 1);
    if (size == 0 || at + size > end) return false;
    config_write32(function->slot, offset, (u32)at);
    if (wide) config_write32(function->slot, (u16)(offset + 4), (u32)(at >> 32));
    function->bar[i] = at;
    function->size[i] = size;
    at += size;
    i = (u16)(i + wide);
  }
  return true;
}

static bool set_vectors(const struct function *function, unsigned first, unsigned vectors) {
  u8 at = (u8)config_read32(function->slot, CAPABILITIES);
  for (int left = 48; at && left; left--) {
    u32 header = config_read32(function->slot, at);
    if ((u8)header != CAPABILITY_MSIX) {
      at = (u8)(header >> 8) & 0xfc;
      continue;
    }
    u32 table = config_read32(function->slot, (u16)(at + 4));
    u64 bar = (table & 7) < 6 ? function->bar[table & 7] : 0;
    if (!bar || (header >> 16 & 0x7ff) + 1 < vectors) return false;
    config_write32(function->slot, at, header | MSIX_ENABLE | MSIX_ALL_MASKED);
    for (u32 i = 0; i < vectors; i++) {
      u64 entry = bar + (table & ~7U) + 16 * i;
      mmio_write(entry, MESSAGE_ADDRESS | apic_id() << 12);
      mmio_write(entry + 4, 0);
      mmio_write(entry + 8, VECTOR_BASE + first + i);
      mmio_write(entry + 12, 0);
    }
    config_write32(function->slot, at, (header | MSIX_ENABLE) & ~MSIX_ALL_MASKED);
    return true;
  }
  return false;
}

static bool enable(struct function *function, unsigned first, unsigned vectors) {
  u32 command = config_read32(function->slot, COMMAND) & 0xffff & ~(u32)(COMMAND_MEMORY | COMMAND_MASTER);
  config_write32(function->slot, COMMAND, command);
  if (!place(function)) return false;
  config_write32(function->slot, COMMAND, command | COMMAND_MEMORY | COMMAND_MASTER);
  return function->bar[0] && set_vectors(function, first, vectors);
}

bool pci_find_vf(unsigned index, struct function *function) {
  for (u8 slot = 0; slot < SLOTS; slot++) {
    u32 ids = config_read32(slot, 0);
    u16 vendor = (u16)ids, device = (u16)(ids >> 16);
    if (vendor != INTEL || (device != VF_82576 && device != VF_I350) || index-- != 0) continue;
    *function = (struct function){.slot = slot, .vendor = vendor, .device = device};
    return enable(function, IRQ_TRANSMIT, VECTORS);
  }
  return false;
}

bool pci_find(u16 vendor, u16 device, unsigned index, unsigned first, unsigned vectors, struct function *function) {
  for (u8 slot = 0; slot < SLOTS; slot++) {
    if (config_read32(slot, 0) != ((u32)device << 16 | vendor) || index-- != 0) continue;
    *function = (struct function){.slot = slot, .vendor = vendor, .device = device};
    return enable(function, first, vectors);
  }
  return false;
}
