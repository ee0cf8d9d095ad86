// A test double of libcuda.so.1, of one GPU that calls itself so: kernels are those of the emulated
// library that HWMPQ_DRIVER_DOUBLE names, and its seconds mean nothing. It keeps to what cuda.h says
// of the functions that hwmpq calls, and refuses what a driver refuses.
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <string>
#include <vector>

typedef int Status;
typedef unsigned long long Pointer;
enum { OK = 0, INVALID = 1, NO_IMAGE = 200, NOT_FOUND = 500, BUSY = 900 };
typedef int (*Run)(void**, int, int, int, int);
struct Kernel { Run run; int arguments, shared; };
struct Graph { std::vector<std::function<int()>> nodes; };
struct Event { double at = -1; };
static Graph* capturing;
static bool entered;
static double now;

static Status put(std::function<int()> work) {
  if (!entered) return INVALID;
  if (capturing) return capturing->nodes.push_back(work), OK;
  return work();
}

extern "C" {
Status cuInit(unsigned flags) { return flags; }
Status cuDriverGetVersion(int* version) { return *version = 13000, OK; }
Status cuGetErrorString(Status, const char** text) { return *text = "as the double says", OK; }
Status cuDeviceGet(int* device, int number) { return *device = 7, number; }
Status cuDeviceGetName(char* name, int size, int device) {
  return strncpy(name, "a test double", size), device == 7 ? OK : INVALID;
}
Status cuDeviceGetPCIBusId(char* name, int size, int) { return strncpy(name, "0:0", size), OK; }
Status cuDeviceGetAttribute(int* found, int which, int) {
  *found = which == 75 ? 9 : which == 76 ? 0 : which == 38 ? 4096 : 2;
  return OK;
}
Status cuDevicePrimaryCtxRetain(void** context, int device) {
  return *context = &entered, device == 7 ? OK : INVALID;
}
Status cuCtxSetCurrent(void* context) { return entered = context == &entered, OK; }
Status cuMemAlloc_v2(Pointer* found, size_t size) {
  return *found = (Pointer)aligned_alloc(256, (size + 255) & ~255ull), entered ? OK : INVALID;
}
Status cuMemFree_v2(Pointer p) { return free((void*)p), OK; }
Status cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t size, void*) {
  return capturing ? BUSY : (memcpy((void*)to, from, size), OK);
}
Status cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t size, void*) {
  return capturing ? BUSY : (memcpy(to, (void*)from, size), OK);
}
Status cuStreamCreate(void** stream, unsigned) { return *stream = &now, OK; }
Status cuStreamSynchronize(void* stream) { return capturing || stream != &now ? BUSY : OK; }
Status cuModuleLoadData(void** module, const void* image) {
  const unsigned char* bytes = (const unsigned char*)image;
  if (memcmp(bytes, "\177ELF", 4) || bytes[18] != 190) return NO_IMAGE;  // EM_CUDA
  *module = dlopen(getenv("HWMPQ_DRIVER_DOUBLE"), RTLD_NOW);
  return *module ? OK : NO_IMAGE;
}
Status cuModuleGetFunction(void** function, void* module, const char* name) {
  Run run = (Run)dlsym(module, (std::string("run_") + name).c_str());
  int* count = (int*)dlsym(module, (std::string("count_") + name).c_str());
  if (!run || !count) return NOT_FOUND;
  return *function = new Kernel{run, *count, 48 << 10}, OK;
}
Status cuFuncSetAttribute(void* function, int which, int value) {
  return ((Kernel*)function)->shared = value, which == 8 ? OK : INVALID;
}
Status cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads,
                      unsigned by, unsigned bz, unsigned shared, void*, void** given, void** extra) {
  Kernel kernel = *(Kernel*)function;
  if (z * by * bz != 1 || extra || (int)shared > kernel.shared) return INVALID;
  std::vector<void*> values;  // taken now, as a driver does
  for (int i = 0; i < kernel.arguments; ++i) values.push_back(*(void**)given[i]);
  return put([=]() mutable { return kernel.run(values.data(), x, y, threads, shared); });
}
Status cuStreamBeginCapture_v2(void*, int mode) {
  return capturing ? BUSY : (capturing = new Graph, mode <= 2 ? OK : INVALID);
}
Status cuStreamEndCapture(void*, void** graph) {
  return *graph = capturing, capturing = nullptr, *graph ? OK : INVALID;
}
Status cuGraphInstantiateWithFlags(void** whole, void* graph, Pointer flags) {
  return *whole = new Graph(*(Graph*)graph), (int)flags;
}
Status cuGraphLaunch(void* whole, void*) {
  for (auto& node : ((Graph*)whole)->nodes)
    if (int status = node()) return status;
  return ++now, OK;  // a millisecond, whatever it does
}
Status cuGraphDestroy(void* graph) { return delete (Graph*)graph, OK; }
Status cuGraphExecDestroy(void* whole) { return delete (Graph*)whole, OK; }
Status cuEventCreate(void** event, unsigned) { return *event = new Event, OK; }
Status cuEventRecord(void* event, void*) { return ((Event*)event)->at = now, OK; }
Status cuEventRecordWithFlags(void* event, void* stream, unsigned flags) {
  return flags != 1 ? INVALID : put([=] { return cuEventRecord(event, stream); });
}
Status cuEventSynchronize(void* event) { return ((Event*)event)->at < 0 ? INVALID : OK; }
Status cuEventElapsedTime(float* milliseconds, void* begin, void* end) {
  return *milliseconds = (float)(((Event*)end)->at - ((Event*)begin)->at), OK;
}
Status cuEventDestroy_v2(void* event) { return delete (Event*)event, OK; }
}
