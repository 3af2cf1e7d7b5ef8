/* SPDX-License-Identifier: Apache-2.0 */
/* One receive and one transmit queue with advanced descriptors, and the interrupts of the VF. */

#include "guest.h"

#define RX_QUEUE 0x2800
#define TX_QUEUE 0x3800
#define BASE_LOW 0x00
#define BASE_HIGH 0x04
#define LENGTH 0x08
#define SPLIT 0x0c
#define HEAD 0x10
#define TAIL 0x18
#define CONTROL 0x28
#define ENABLE 0x02000000

/* One buffer a descriptor, of 2 KiB; frames without a descriptor are dropped. */
#define SPLIT_VALUE (0x80000000U | 0x02000000U | 2)
#define RX_THRESHOLDS (16 | 8 << 8 | 1 << 16)

#define EIMS 0x1524
#define EIMC 0x1528
#define EIAC 0x152c
#define EIAM 0x1530
#define IVAR 0x1700
#define IVAR_MISC 0x1740
#define VALID 0x80U
#define ALL_VECTORS 0x7

#define TX_DATA 0x00300000U
#define TX_CONTEXT 0x00200000U
#define TX_ADVANCED 0x20000000U
#define TX_END 0x01000000U
#define TX_FCS 0x02000000U
#define TX_REPORT 0x08000000U
#define TX_VLAN 0x40000000U
#define DONE 1
#define RX_TAGGED 8

#define DESCRIPTORS 64
#define BUFFER 2048
#define TRANSMIT_US 100000

struct descriptor {
  volatile u32 word[4];
};

NOINIT static struct descriptor rx_ring[DESCRIPTORS] __attribute__((aligned(128)));
NOINIT static struct descriptor tx_ring[DESCRIPTORS] __attribute__((aligned(128)));
NOINIT static u8 rx_buffers[DESCRIPTORS][BUFFER] __attribute__((aligned(2048)));
NOINIT static u8 tx_buffer[BUFFER] __attribute__((aligned(2048)));
static u32 rx_next, tx_next;

u64 receive_ring_address(void) { return (u64)rx_ring; }
u64 transmit_ring_address(void) { return (u64)tx_ring; }

static void give(u32 index) {
  u64 address = (u64)rx_buffers[index];
  rx_ring[index].word[0] = (u32)address;
  rx_ring[index].word[1] = (u32)(address >> 32);
  rx_ring[index].word[2] = 0;
  rx_ring[index].word[3] = 0;
}

static void set_ring(u32 queue, u64 address, u32 length) {
  vf_write(queue + CONTROL, vf_read(queue + CONTROL) & ~(u32)ENABLE);
  vf_write(queue + BASE_LOW, (u32)address);
  vf_write(queue + BASE_HIGH, (u32)(address >> 32));
  vf_write(queue + LENGTH, length);
  vf_write(queue + HEAD, 0);
  vf_write(queue + TAIL, 0);
}

void queues_enable_interrupts(void) { vf_write(EIMS, ALL_VECTORS); }

void queues_start(void) {
  rx_next = tx_next = 0;
  for (u32 i = 0; i < DESCRIPTORS; i++) give(i);
  set_ring(TX_QUEUE, (u64)tx_ring, sizeof(tx_ring));
  vf_write(TX_QUEUE + CONTROL, vf_read(TX_QUEUE + CONTROL) | ENABLE);
  set_ring(RX_QUEUE, (u64)rx_ring, sizeof(rx_ring));
  vf_write(RX_QUEUE + SPLIT, SPLIT_VALUE);
  vf_write(RX_QUEUE + CONTROL, RX_THRESHOLDS | ENABLE);
  vf_write(IVAR, (VALID | IRQ_RECEIVE) | (VALID | IRQ_TRANSMIT) << 8);
  vf_write(IVAR_MISC, VALID | IRQ_MAILBOX);
  vf_write(EIAC, ALL_VECTORS);
  vf_write(EIAM, ALL_VECTORS);
  queues_enable_interrupts();
  vf_write(RX_QUEUE + TAIL, DESCRIPTORS - 1);
}

void queues_stop(void) {
  vf_write(RX_QUEUE + CONTROL, vf_read(RX_QUEUE + CONTROL) & ~(u32)ENABLE);
  vf_write(TX_QUEUE + CONTROL, vf_read(TX_QUEUE + CONTROL) & ~(u32)ENABLE);
}

u8 *transmit_buffer(void) { return tx_buffer; }

bool transmit(unsigned length, u16 vlan) {
  bool tagged = vlan != UNTAGGED;
  if (tagged) {
    struct descriptor *context = &tx_ring[tx_next];
    context->word[0] = (u32)vlan << 16 | 14 << 9;
    context->word[1] = 0;
    context->word[2] = TX_ADVANCED | TX_CONTEXT;
    context->word[3] = 0;
    tx_next = (tx_next + 1) % DESCRIPTORS;
  }
  struct descriptor *data = &tx_ring[tx_next];
  u64 address = (u64)tx_buffer;
  data->word[0] = (u32)address;
  data->word[1] = (u32)(address >> 32);
  data->word[2] = length | TX_ADVANCED | TX_DATA | TX_END | TX_FCS | TX_REPORT | (tagged ? TX_VLAN : 0);
  data->word[3] = length << 14;
  tx_next = (tx_next + 1) % DESCRIPTORS;
  barrier();
  vf_write(TX_QUEUE + TAIL, tx_next);
  u64 deadline = now_us() + TRANSMIT_US;
  for (;;) {
    u32 seen = events();
    if (data->word[3] & DONE) return true;
    if (now_us() >= deadline) return false;
    queues_enable_interrupts();
    sleep_until(deadline, seen);
  }
}

u8 *receive(unsigned *length, u16 *vlan) {
  struct descriptor *next = &rx_ring[rx_next];
  u32 status = next->word[2];
  if (!(status & DONE)) return NULL;
  *length = next->word[3] & 0xffff;
  *vlan = status & RX_TAGGED ? (u16)(next->word[3] >> 16) & 0xfff : UNTAGGED;
  return rx_buffers[rx_next];
}

void receive_done(void) {
  give(rx_next);
  barrier();
  /* All but one descriptor belong to the adapter. */
  vf_write(RX_QUEUE + TAIL, rx_next);
  rx_next = (rx_next + 1) % DESCRIPTORS;
}
