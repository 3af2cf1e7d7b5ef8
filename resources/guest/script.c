/* SPDX-License-Identifier: Apache-2.0 */
/* The language: splits lines into commands, checks them against the tables, runs them; input from the serial port. */

#include "guest.h"

#define SERIAL 0x3f8
#define INTERRUPT_ENABLE 1
#define LINE_STATUS 5
#define DATA_READY 1

#define LINE 2048
#define INPUT 4096

/* hvm_start_info (xen/include/public/arch-x86/hvm/start_info.h), as far as it is of use. */
struct start_info {
  u32 magic, version, flags, modules;
  u64 module_list, command_line;
};

/* hvm_modlist_entry, the same. */
struct module {
  u64 address, size;
};

/* The guest's image is in memory alone: what the host has loaded stays where it is. */
const u8 *initramfs;
u64 initramfs_size;

struct words current;

/* Input that was not looked at. What does not fit stays in the port, and the sender waits. */
static char input[INPUT];
static u32 input_first, input_end;
static volatile bool input_arrived;

char *argument(const struct words *words, unsigned index) {
  for (unsigned i = 0; i < words->count; i++) {
    bool is_option = false;
    for (const char *c = words->word[i]; *c; c++) is_option |= *c == '=';
    if (!is_option && index-- == 0) return words->word[i];
  }
  return NULL;
}

char *option(const struct words *words, const char *name) {
  size_t length = text_length(name);
  for (unsigned i = 1; i < words->count; i++) {
    char *word = words->word[i];
    if (text_length(word) > length && memcmp(word, name, length) == 0 && word[length] == '=') return word + length + 1;
  }
  return NULL;
}

bool number_option(const char *name, u64 otherwise, u64 *value) {
  const char *text = option(&current, name);
  *value = otherwise;
  if (!text || parse_number(text, value)) return true;
  result();
  put_text("error ");
  put_text(name);
  put_text("= is no number\n");
  return false;
}

bool number_argument(unsigned index, u64 most, u64 *value) {
  const char *text = argument(&current, index);
  if (text && parse_number(text, value) && *value <= most) return true;
  result_text("error not a number, or too large");
  return false;
}

void result(void) {
  char *word;
  for (unsigned i = 0; (word = argument(&current, i)); i++) {
    if (i) put_char(' ');
    put_text(word);
  }
  put_text(": ");
}

void result_text(const char *text) {
  result();
  put_text(text);
  put_char('\n');
}

void result_outcome(enum outcome outcome) { result_text(outcome_text(outcome)); }

static const struct command *find(const char *name) {
  const struct command *const tables[] = {machine_commands, vf_commands, virtio_commands, nic_commands, hostile_commands};
  for (unsigned t = 0; t < COUNT(tables); t++)
    for (const struct command *command = tables[t]; command->name; command++)
      if (same_text(command->name, name)) return command;
  return NULL;
}

/* Whether a word NAME=VALUE is in the blank-separated list of names. */
static bool known(const char *list, const char *word) {
  size_t length = 0;
  while (word[length] != '=') length++;
  while (*list) {
    size_t item = 0;
    while (list[item] && list[item] != ' ') item++;
    if (item == length && memcmp(list, word, length) == 0) return true;
    list += item + (list[item] == ' ');
  }
  return false;
}

static bool fits(const struct command *command) {
  unsigned arguments = 0;
  while (argument(&current, arguments)) arguments++;
  arguments--;
  if (arguments < command->least || arguments > command->most) return false;
  for (unsigned i = 1; i < current.count; i++) {
    const char *c = current.word[i];
    while (*c && *c != '=') c++;
    if (*c && !known(command->options, current.word[i])) return false;
  }
  return true;
}

/* Splits at blanks outside of quotes, which go. */
static bool split(char *text) {
  current.count = 0;
  for (;;) {
    while (*text == ' ' || *text == '\t' || *text == '\r') text++;
    if (!*text) return true;
    if (current.count == MAX_WORDS) return false;
    current.word[current.count++] = text;
    char *to = text;
    bool quoted = false;
    for (; *text && (quoted || (*text != ' ' && *text != '\t' && *text != '\r')); text++) {
      if (*text == '"')
        quoted = !quoted;
      else
        *to++ = *text;
    }
    if (*text) text++;
    *to = 0;
  }
}

static void run(char *text) {
  if (!split(text)) {
    put_text("error: more than 40 words\n");
    return;
  }
  if (!current.count) return;
  const struct command *command = find(current.word[0]);
  if (!command) {
    current.count = 1;
    result_text("error unknown command; try help");
  } else if (!fits(command)) {
    result();
    put_text("error usage: ");
    put_text(command->usage);
    put_char('\n');
  } else if (command->needs_vf && !vf.present) {
    result_text("error no VF");
  } else {
    command->run();
  }
}

/* Commands are separated by semicolons outside of quotes and by line ends. */
void script_run(const char *text) {
  static char line[LINE];
  size_t length = 0;
  bool quoted = false, cut = false;
  for (;; text++) {
    bool end = !*text || *text == '\n' || (*text == ';' && !quoted);
    if (!end) {
      quoted ^= *text == '"';
      if (length + 1 < LINE)
        line[length++] = *text;
      else
        cut = true;
      continue;
    }
    line[length] = 0;
    if (cut)
      put_text("error: command too long\n");
    else
      run(line);
    length = 0;
    quoted = cut = false;
    if (!*text) return;
  }
}

void serve_input(void) {
  while (input_end - input_first < INPUT && in8(SERIAL + LINE_STATUS) & DATA_READY) {
    input[input_end++ % INPUT] = (char)in8(SERIAL);
    input_arrived = true;
  }
}

/* A line without its end; false if there is no whole line yet. One that is too long is left out. */
static bool next_line(char *line) {
  static size_t length;
  while (input_first != input_end) {
    char c = input[input_first++ % INPUT];
    bool end = c == '\n' || c == '\r';
    if (!end) {
      if (length < LINE) line[length] = c;
      length += length < LINE;
      continue;
    }
    bool whole = length < LINE;
    if (!whole) put_text("error: line too long\n");
    line[whole ? length : 0] = 0;
    length = 0;
    return true;
  }
  return false;
}

static _Noreturn void interact(void) {
  static char line[LINE];
  for (;;) {
    input_arrived = false;
    while (next_line(line)) script_run(line);
    net_wait_for(&input_arrived, FOREVER);
  }
}

_Noreturn void guest_main(const struct start_info *info);

void guest_main(const struct start_info *info) {
  cpu_start();
  out8(SERIAL + INTERRUPT_ENABLE, 1); /* received data */
  if (info->modules) {
    const struct module *module = (const struct module *)info->module_list;
    initramfs = (const u8 *)module->address;
    initramfs_size = module->size;
  }
  put_text("portcullis small guest\n");
  script_run("probe");
  script_run((const char *)info->command_line);
  put_text("ready\n");
  interact();
}
