/* Runs compiled kernels where there is no TVM runtime: `guest LIBRARY`.

   stdin: calls. Of each the int64 numbers of its arguments and of the bytes of the function's name,
   the name; then of every argument the int64 numbers type code (DLPack), bits of an element,
   elements, bytes of memory (elements and a margin behind them), then that memory. stdout: of each
   call the memory of its last argument after it. Exit status 3 when a kernel refuses its arguments.
   The functions that a kernel asks of TVM's runtime are at the top: one thread, memory from malloc.
   Sources: tvm/ffi/c_api.h (TVMFFIAny), dlpack.h (DLTensor), tvm/runtime/c_backend_api.h. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TENSOR = 7, CPU = 1, MOST_ARGUMENTS = 16 };
typedef struct { void *data; int32_t device, id, ndim; uint8_t code, bits; uint16_t lanes;
                 int64_t *shape, *strides; uint64_t offset; } Tensor;
typedef struct { int32_t type, padding; void *pointer; } Any;
typedef struct { void *sync; int32_t tasks; } Parallel;

void *TVMBackendAllocWorkspace(int type, int id, uint64_t size, int code, int bits) {
  return aligned_alloc(64, (size + 63) / 64 * 64);
}
int TVMBackendFreeWorkspace(int type, int id, void *memory) { free(memory); return 0; }
int TVMBackendParallelLaunch(int (*task)(int, Parallel *, void *), void *data, int tasks) {
  Parallel group = {NULL, tasks > 0 ? tasks : 2};
  for (int i = 0; i < group.tasks; i++)
    if (task(i, &group, data)) return -1;
  return 0;
}
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *text) {
  fprintf(stderr, "%s: %s\n", kind, text);
}
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; i++) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

static void need(int fine, const char *what) {
  if (!fine) { fprintf(stderr, "%s\n", what); exit(2); }
}

static void take(void *data, size_t size) {
  need(data && fread(data, 1, size, stdin) == size, "a call is cut off");
}

static void run(void *library, int64_t count, int64_t length) {
  char name[128] = "__tvm_ffi_";
  size_t prefix = strlen(name);
  need(count > 0 && count <= MOST_ARGUMENTS, "too many arguments, or none");
  need(length < (int64_t)(sizeof name - prefix), "too long a name");
  take(name + prefix, length);
  int (*kernel)(void *, Any *, int32_t, Any *) = dlsym(library, name);
  need(kernel != NULL, "no such kernel in the library");

  Tensor tensors[MOST_ARGUMENTS];
  Any arguments[MOST_ARGUMENTS], result = {0, 0, NULL};
  int64_t head[4], sizes[MOST_ARGUMENTS], strides[] = {1};
  for (int i = 0; i < count; i++) {
    take(head, sizeof head);
    void *data = aligned_alloc(64, (head[3] + 64) / 64 * 64);
    take(data, head[3]);
    sizes[i] = head[2];
    tensors[i] = (Tensor){data, CPU, 0, 1, head[0], head[1], 1, &sizes[i], strides, 0};
    arguments[i] = (Any){TENSOR, 0, &tensors[i]};
  }
  if (kernel(NULL, arguments, count, &result)) exit(3);
  fwrite(tensors[count - 1].data, 1, head[3], stdout);
  fflush(stdout);  /* the next one may crash; nothing is freed, which could show this one's faults */
}

int main(int count, char **words) {
  need(count == 2, "usage: guest LIBRARY");
  void *library = dlopen(words[1], RTLD_NOW);
  need(library != NULL, library ? "" : dlerror());
  static const char *names[] = {"TVMBackendAllocWorkspace", "TVMBackendFreeWorkspace",
                                "TVMBackendParallelLaunch"};
  void *ours[] = {TVMBackendAllocWorkspace, TVMBackendFreeWorkspace, TVMBackendParallelLaunch};
  for (int i = 0; i < 3; i++) {  /* a library may call them through variables of these names */
    char name[64];
    snprintf(name, sizeof name, "__%s", names[i]);
    void **variable = dlsym(library, name);
    if (variable) *variable = ours[i];
  }
  int64_t call[2];
  while (fread(call, sizeof call, 1, stdin) == 1) run(library, call[0], call[1]);
  return 0;
}
