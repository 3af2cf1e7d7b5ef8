/* SPDX-License-Identifier: Apache-2.0 */
/* Strings, numbers, addresses, and what the compiler takes for granted. */

#include "guest.h"

#define SERIAL 0x3f8

void *memcpy(void *to, const void *from, size_t count) {
  void *result = to;
  size_t eights = count / 8, rest = count % 8;
  __asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(eights) : : "memory");
  __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(rest) : : "memory");
  return result;
}

void *memset(void *to, int value, size_t count) {
  void *result = to;
  u64 pattern = 0x0101010101010101ULL * (u8)value;
  size_t eights = count / 8, rest = count % 8;
  __asm__ volatile("rep stosq" : "+D"(to), "+c"(eights) : "a"(pattern) : "memory");
  __asm__ volatile("rep stosb" : "+D"(to), "+c"(rest) : "a"(pattern) : "memory");
  return result;
}

int memcmp(const void *a, const void *b, size_t count) {
  const u8 *x = a, *y = b;
  for (size_t i = 0; i < count; i++)
    if (x[i] != y[i]) return x[i] < y[i] ? -1 : 1;
  return 0;
}

bool same_text(const char *a, const char *b) {
  while (*a && *a == *b) a++, b++;
  return *a == *b;
}

size_t text_length(const char *text) {
  size_t length = 0;
  while (text[length]) length++;
  return length;
}

bool same_mac(struct mac a, struct mac b) { return memcmp(a.byte, b.byte, 6) == 0; }

bool is_zero_mac(struct mac mac) { return same_mac(mac, (struct mac){{0}}); }

bool is_group_mac(struct mac mac) { return mac.byte[0] & 1; }

bool is_assignable_mac(struct mac mac) { return !is_zero_mac(mac) && !is_group_mac(mac); }

static int digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

bool parse_number(const char *text, u64 *value) {
  u64 base = 10, result = 0;
  if (text[0] == '0' && text[1] == 'x') {
    base = 16;
    text += 2;
  }
  if (!*text) return false;
  for (; *text; text++) {
    int next = digit(*text);
    if (next < 0 || (u64)next >= base) return false;
    u64 before = result;
    result = result * base + (u64)next;
    if (result / base != before) return false;
  }
  *value = result;
  return true;
}

bool parse_mac(const char *text, struct mac *mac) {
  for (int i = 0; i < 6; i++, text += 3) {
    int high = digit(text[0]);
    int low = high < 0 ? -1 : digit(text[1]);
    if (low < 0 || text[2] != (i < 5 ? ':' : 0)) return false;
    mac->byte[i] = (u8)(high << 4 | low);
  }
  return true;
}

bool parse_ip(const char *text, u32 *ip) {
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 part = 0;
    int digits = 0;
    for (; digit(*text) >= 0 && digit(*text) < 10 && digits < 3; text++, digits++) part = part * 10 + (u32)digit(*text);
    if (digits == 0 || part > 255 || *text != (i < 3 ? '.' : 0)) return false;
    result = result << 8 | part;
    text++;
  }
  *ip = result;
  return true;
}

void put_char(char c) { out8(SERIAL, (u8)c); }

void put_text(const char *text) {
  while (*text) put_char(*text++);
}

void put_decimal(u64 value) {
  char digits[20];
  int count = 0;
  do digits[count++] = (char)('0' + value % 10);
  while (value /= 10);
  while (count) put_char(digits[--count]);
}

void put_hex(u64 value, int digits) {
  while (digits--) put_char("0123456789abcdef"[value >> (4 * digits) & 15]);
}

void put_mac(struct mac mac) {
  for (int i = 0; i < 6; i++) {
    if (i) put_char(':');
    put_hex(mac.byte[i], 2);
  }
}

void put_ip(u32 ip) {
  for (int shift = 24; shift >= 0; shift -= 8) {
    put_decimal(ip >> shift & 255);
    if (shift) put_char('.');
  }
}
