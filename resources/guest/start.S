/* SPDX-License-Identifier: Apache-2.0 */
/* From the PVH entry (32-bit, no paging, start info in EBX) to 64-bit C, and from interrupts to their counters. */

.intel_syntax noprefix

.set PAGE_LARGE, 0x83 /* present, writable, 2 MiB */
.set LOW_PAGES, 32 /* 64 MiB of RAM: the guest itself lies below 2 MiB */
.set WINDOW_PAGES, 8 /* 16 MiB of the PCI window, for BARs */

.section .note.pvh, "a", @note
  .long 4, 4, 18 /* XEN_ELFNOTE_PHYS32_ENTRY */
  .asciz "Xen"
  .long start32

.section .text.start, "ax"
.code32
.globl start32
start32:
  cli
  cld
  /* Memory is as the last boot left it. */
  lea edi, [bss_start]
  lea ecx, [bss_end]
  sub ecx, edi
  shr ecx, 2
  xor eax, eax
  rep stosd

  /* Identity: RAM, the start of the PCI window, ECAM, IOAPIC and local APIC. */
  lea eax, [pdpt + 3]
  mov [pml4], eax
  lea eax, [low_directory + 3]
  mov [pdpt], eax
  lea eax, [high_directory + 3]
  mov [pdpt + 3 * 8], eax
  lea edi, [low_directory]
  mov eax, PAGE_LARGE
  mov ecx, LOW_PAGES
1:
  mov [edi], eax
  add eax, 0x200000
  add edi, 8
  dec ecx
  jnz 1b
  lea edi, [high_directory]
  mov eax, 0xc0000000 + PAGE_LARGE
  mov ecx, WINDOW_PAGES
2:
  mov [edi], eax
  add eax, 0x200000
  add edi, 8
  dec ecx
  jnz 2b
  mov dword ptr [high_directory + 256 * 8], 0xe0000000 + PAGE_LARGE
  mov dword ptr [high_directory + 502 * 8], 0xfec00000 + PAGE_LARGE
  mov dword ptr [high_directory + 503 * 8], 0xfee00000 + PAGE_LARGE

  lgdt [gdt_pointer]
  lea eax, [pml4]
  mov cr3, eax
  mov eax, 0x20 /* PAE */
  mov cr4, eax
  mov ecx, 0xc0000080 /* EFER */
  rdmsr
  or eax, 0x100 /* LME */
  wrmsr
  mov eax, cr0
  or eax, 0x80000000 /* PG */
  mov cr0, eax
  .att_syntax
  ljmp $8, $start64
  .intel_syntax noprefix

.code64
start64:
  mov eax, 16
  mov ds, eax
  mov es, eax
  mov ss, eax
  lea rsp, [stack_end]
  xor ebp, ebp
  mov edi, ebx
  call guest_main
3:
  cli
  hlt
  jmp 3b

/* Without an IDT the first exception is the third one. */
.text
.globl triple_fault
triple_fault:
  lidt [no_idt]
  ud2

/* Exceptions: each pushes its number, below an error code where the CPU pushes one. */
.macro exception number, has_code=0
exception_\number:
  .if \has_code == 0
  push 0
  .endif
  push \number
  jmp exception_common
.endm
.irp number, 0, 1, 2, 3, 4, 5, 6, 7, 9, 15, 16, 18, 19, 20
  exception \number
.endr
.irp number, 8, 10, 11, 12, 13, 14, 17, 21
  exception \number, 1
.endr
exception_common:
  mov rdi, [rsp] /* number */
  mov rsi, [rsp + 8] /* error code */
  mov rdx, [rsp + 16] /* RIP */
  mov rcx, cr2
  call guest_exception

/* Interrupts are counted and ended; what they mean is looked at outside of them. */
.set INTERRUPTS, 8
.macro interrupt number
interrupt_\number:
  inc dword ptr [interrupt_counts + 4 * \number]
  push rax
  mov eax, 0xfee000b0 /* end of interrupt */
  mov dword ptr [rax], 0
  pop rax
  iretq
.endm
.irp number, 0, 1, 2, 3, 4, 5, 6, 7
  interrupt \number
.endr
.globl spurious_entry, stray_entry
stray_entry:
  push rax
  mov eax, 0xfee000b0
  mov dword ptr [rax], 0
  pop rax
  iretq
/* The vector of what is spurious can also be sent: by an adapter whose vectors were written at random. That one is in
   service (ISR, bit 255), and nothing else would come before its end is told. */
spurious_entry:
  push rax
  mov eax, 0xfee00170
  mov eax, dword ptr [rax]
  test eax, eax
  pop rax
  js stray_entry
  iretq

.section .rodata
.align 8
.globl exception_entries, interrupt_entries
exception_entries:
.irp number, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21
  .long exception_\number
.endr
interrupt_entries:
.irp number, 0, 1, 2, 3, 4, 5, 6, 7
  .long interrupt_\number
.endr
.align 8
gdt:
  .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
  .word 23
  .long gdt
no_idt:
  .word 0
  .quad 0

.section .bss
.align 4096
pml4: .skip 4096
pdpt: .skip 4096
low_directory: .skip 4096
high_directory: .skip 4096
.globl interrupt_counts
interrupt_counts: .skip 4 * INTERRUPTS

.section .bss.noinit, "aw", @nobits
.align 16
  .skip 16384
stack_end:

.section .note.GNU-stack, "", @progbits
