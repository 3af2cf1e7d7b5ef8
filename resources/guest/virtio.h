/* SPDX-License-Identifier: Apache-2.0 */
/* A virtio device by its PCI transport (Virtual I/O Device 1.2, 4.1): one at a time. */

#ifndef PORTCULLIS_GUEST_VIRTIO_H
#define PORTCULLIS_GUEST_VIRTIO_H

#include "guest.h"

#define RED_HAT 0x1af4
#define FIRST_DEVICE 0x1040
#define NIC 1
#define DISK 2
#define ENTROPY 4

#define CAPABILITIES 0x34
#define CAPABILITY_VENDOR 9
enum { COMMON = 1, NOTIFY, ISR, DEVICE, KINDS };

/* The common configuration structure. */
#define DEVICE_FEATURE_SELECT 0x00
#define DEVICE_FEATURE 0x04
#define DRIVER_FEATURE_SELECT 0x08
#define DRIVER_FEATURE 0x0c
#define CONFIG_VECTOR 0x10
#define STATUS 0x14
#define QUEUE_SELECT 0x16
#define QUEUE_SIZE 0x18
#define QUEUE_VECTOR 0x1a
#define QUEUE_ENABLE 0x1c
#define QUEUE_NOTIFY 0x1e
#define QUEUE_DESCRIPTORS 0x20
#define QUEUE_AVAILABLE 0x28
#define QUEUE_USED 0x30

#define ACKNOWLEDGED 3
#define FEATURES_OK 8
#define DRIVER_OK 4
#define NEEDS_RESET 0x40
#define VERSION_1 1 /* in the upper half */

#define NEXT 1
#define DEVICE_WRITES 2
#define INDIRECT 4

#define ENTRIES 16
#define VIRTIO_QUEUES 3

struct descriptor {
  u64 address;
  u32 length;
  u16 flags, next;
};

struct rings {
  struct descriptor descriptors[ENTRIES];
  u16 available_flags, available_index, available[ENTRIES], used_event;
  u8 padding[90];
  u16 used_flags, used_index;
  struct {
    u32 head, length;
  } used[ENTRIES];
  u16 available_event;
} __attribute__((aligned(64)));

extern volatile struct rings rings[VIRTIO_QUEUES];

/* The device that was found last. */
struct virtio {
  bool present;
  u16 kind;
  struct function function;
  u64 at[KINDS];
  u64 doorbell[VIRTIO_QUEUES];
  /* Requests that were made available. */
  u16 sent[VIRTIO_QUEUES];
};

extern struct virtio device;

/* The address of a register of the common structure. */
u64 common(u64 offset);
/* Finds the `index`-th device of a kind, and starts it. */
bool virtio_probe(u16 kind, unsigned index);
/* Waits until the device has let go of the rings. */
bool virtio_reset(void);
/* Resets it; takes all features that are offered, but for those of rings; and starts the queues. */
bool virtio_start(void);
void virtio_set(unsigned queue, unsigned index, u64 address, u32 length, u16 flags);
void virtio_ring(unsigned queue);
/* Makes the request at descriptor `head` available. */
void virtio_offer(unsigned queue, u16 head);
/* Sends the request at descriptor 0, and waits for it. */
bool virtio_send(unsigned queue);

#endif
