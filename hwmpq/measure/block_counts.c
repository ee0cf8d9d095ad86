/* QEMU plugin: how often the blocks of instructions of one library ran.

   -plugin block_counts.so,library=NAME,out=FILE   (user mode)
   When the program ends, FILE gets a line for every block that ran and lies in a mapped file of
   that name: how often, then the bytes of each instruction in hexadecimal digits.
   QEMU's own header is in no Debian package, so what is used of it is declared here.
   Source: QEMU 7.2, include/qemu/qemu-plugin.h (plugin API version 1). */
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t Id;
typedef struct { const char *target; struct { int least, current; } version; bool system;
                 int cpus, most_cpus; } Info;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum { ADD_U64 = 0 };
void qemu_plugin_register_vcpu_tb_trans_cb(Id, void (*)(Id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
void qemu_plugin_register_atexit_cb(Id, void (*)(Id, void *), void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const unsigned char *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

typedef struct Block { uint64_t count, address; char *text; struct Block *next; } Block;
static Block *blocks;
static const char *library, *out;

static void translated(Id id, struct qemu_plugin_tb *tb) {
  size_t count = qemu_plugin_tb_n_insns(tb), size = 1;
  for (size_t i = 0; i < count; i++)
    size += 2 * qemu_plugin_insn_size(qemu_plugin_tb_get_insn(tb, i)) + 1;
  Block *block = malloc(sizeof *block);
  char *to = malloc(size);
  *block = (Block){0, qemu_plugin_tb_vaddr(tb), to, blocks};
  blocks = block;
  for (size_t i = 0; i < count; i++) {
    struct qemu_plugin_insn *one = qemu_plugin_tb_get_insn(tb, i);
    const unsigned char *bytes = qemu_plugin_insn_data(one);
    *to++ = ' ';
    for (size_t j = 0; j < qemu_plugin_insn_size(one); j++) to += sprintf(to, "%02x", bytes[j]);
  }
  *to = 0;
  qemu_plugin_register_vcpu_tb_exec_inline(tb, ADD_U64, &block->count, 1);
}

static void ended(Id id, void *unused) {
  FILE *maps = fopen("/proc/self/maps", "r"), *to = fopen(out, "w");
  char line[4352];
  uint64_t begin, end;
  size_t length = strlen(library);
  while (maps && to && fgets(line, sizeof line, maps)) {
    line[strcspn(line, "\n")] = 0;
    size_t size = strlen(line);
    if (size < length || strcmp(line + size - length, library)) continue;
    if (sscanf(line, "%" SCNx64 "-%" SCNx64, &begin, &end) != 2) continue;
    for (Block *b = blocks; b; b = b->next)
      if (b->count && begin <= b->address && b->address < end)
        fprintf(to, "%" PRIu64 "%s\n", b->count, b->text);
  }
  if (maps) fclose(maps);
  if (to) fclose(to);
}

__attribute__((visibility("default"))) int qemu_plugin_install(
    Id id, const Info *info, int count, char **words) {
  for (int i = 0; i < count; i++) {
    if (!strncmp(words[i], "library=", 8)) library = strdup(words[i] + 8);
    if (!strncmp(words[i], "out=", 4)) out = strdup(words[i] + 4);
  }
  if (!library || !out) return 1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, ended, NULL);
  return 0;
}
