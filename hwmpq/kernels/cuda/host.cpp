// The instructions of device.cuh as the PTX ISA describes them, in C++ for this CPU. Threads of a
// block are fibers: one runs until it waits for others. Copies behind a thread's back are made when
// they are waited for, so that a kernel that forgets to wait reads what lay there before.
#include "host.cuh"

#include <ucontext.h>

#include <cstdlib>
#include <vector>

// Binary numbers of fewer bits: sign, exponent, fraction; bias as IEEE 754 has it.
float widened(uint bits, int exponent_bits, int fraction_bits) {
  int bias = (1 << (exponent_bits - 1)) - 1;
  int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
  float fraction = (float)(bits & ((1u << fraction_bits) - 1));
  float sign = bits >> (exponent_bits + fraction_bits) & 1 ? -1.0f : 1.0f;
  if (exponent == 0) return sign * ldexpf(fraction, 1 - bias - fraction_bits);
  return sign * ldexpf(fraction + (float)(1 << fraction_bits), exponent - bias - fraction_bits);
}
// To the nearest, ties to even, of a number within the range.
ushort narrowed(float value) {
  uint wide = __float_as_uint(value), sign = wide >> 16 & 0x8000u;
  if (fabsf(value) < 6.103515625e-05f) return sign | (uint)nearbyintf(fabsf(value) * 16777216.0f);
  uint magnitude = (wide & 0x7fffffffu) - 0x38000000u;
  return sign | (magnitude + 0xfffu + (magnitude >> 13 & 1)) >> 13;
}

// -- threads -------------------------------------------------------------------------------

struct Copy { void* to; const void* from; int size; };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  std::vector<std::vector<Copy>> copies{1};
  bool done = false;
};
struct Barrier {
  int waiting = 0, phase = 0;
};
struct Warp {
  Barrier barrier;
  uint words[32][6];
  const void* rows[32];
};
Place blockIdx, threadIdx;
uchar* shared_memory;
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Barrier block_barrier;
static ucontext_t scheduler;
static void (*kernel_call)(void**);
static void** kernel_arguments;
static bool progress;

DEVICE void pause_fiber() {
  int me = threadIdx.x;
  swapcontext(&fibers[me].context, &scheduler);
  threadIdx.x = me;
}
DEVICE void wait_at(Barrier& barrier, int count) {
  progress = true;
  if (++barrier.waiting == count) {
    barrier.waiting = 0;
    ++barrier.phase;
    return;
  }
  for (int phase = barrier.phase; phase == barrier.phase;) pause_fiber();
}
void __syncthreads() { wait_at(block_barrier, (int)fibers.size()); }
DEVICE Warp& this_warp() { return warps[threadIdx.x / 32]; }
void warp_synchronize() { wait_at(this_warp().barrier, 32); }

static void run_fiber() {
  kernel_call(kernel_arguments);
  fibers[threadIdx.x].done = true;
  progress = true;
  pause_fiber();
}

// Runs a grid. 0, or 1 where threads wait for ones that never come, 2 where copies are left over.
extern "C" int run_grid(void (*kernel)(void**), void** arguments, int blocks_x, int blocks_y,
                        int threads, int shared_bytes) {
  kernel_call = kernel;
  kernel_arguments = arguments;
  std::vector<uchar> memory(shared_bytes + 16);
  for (blockIdx.y = 0; blockIdx.y < blocks_y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks_x; ++blockIdx.x) {
      memset(memory.data(), 0xff, memory.size());
      shared_memory = memory.data() + (-(uintptr_t)memory.data() & 15);
      fibers = std::vector<Fiber>(threads);
      warps = std::vector<Warp>((threads + 31) / 32);
      block_barrier = Barrier();
      for (auto& fiber : fibers) {
        fiber.stack.resize(1 << 16);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, run_fiber, 0);
      }
      int left = threads;
      for (bool down = false; left; down = !down) {  // in either order by turns
        progress = false;
        left = 0;
        for (int i = 0; i < threads; ++i) {
          int at = down ? threads - 1 - i : i;
          if (fibers[at].done) continue;
          threadIdx.x = at;
          swapcontext(&scheduler, &fibers[at].context);
          left += !fibers[at].done;
        }
        if (left && !progress) return 1;
      }
      for (auto& fiber : fibers)
        for (auto& group : fiber.copies)
          if (!group.empty()) return 2;
    }
  return 0;
}

// -- instructions --------------------------------------------------------------------------

void copy_later(void* to, const void* from, int size) {
  if ((uintptr_t)to % size || (uintptr_t)from % size) abort();
  fibers[threadIdx.x].copies.back().push_back({to, from, size});
}
void copy_commit() { fibers[threadIdx.x].copies.emplace_back(); }
void copy_until(int pending) {
  auto& groups = fibers[threadIdx.x].copies;
  while ((int)groups.size() > pending + 1) {
    for (auto& copy : groups.front()) memcpy(copy.to, copy.from, copy.size);
    groups.erase(groups.begin());
  }
}

float across(float value, int bit) {
  Warp& warp = this_warp();
  int lane = threadIdx.x % 32;
  warp.words[lane][0] = __float_as_uint(value);
  warp_synchronize();
  float other = __uint_as_float(warp.words[lane ^ bit][0]);
  warp_synchronize();
  return other;
}
void load_matrices(uint* d, const void* row) {
  Warp& warp = this_warp();
  int lane = threadIdx.x % 32;
  warp.rows[lane] = row;
  warp_synchronize();
  for (int i = 0; i < 4; ++i)
    memcpy(d + i, (const uchar*)warp.rows[i * 8 + lane / 4] + lane % 4 * 4, 4);
  warp_synchronize();
}

// Element k of a row of a, or of a column of b, from the words that the warp's lanes hold.
template <int SIZE>
DEVICE uint element(const Warp& warp, int line, int k, int first) {
  int per_word = 4 / SIZE, word = k / (4 * per_word), lane = line % 8 * 4 + k / per_word % 4;
  int index = first ? first + word : word * 2 + line / 8;
  return warp.words[lane][index] >> (k % per_word * SIZE * 8) & (SIZE == 2 ? 0xffffu : 0xffu);
}
template <class SUM, int SIZE, class A, class B>
DEVICE void product(SUM* d, const uint* a, const uint* b, A left, B right) {
  Warp& warp = this_warp();
  int lane = threadIdx.x % 32;
  memcpy(warp.words[lane], a, 16);
  memcpy(warp.words[lane] + 4, b, 8);
  warp_synchronize();
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 32 / SIZE; ++k)
      d[i] += left(element<SIZE>(warp, lane / 4 + i / 2 * 8, k, 0)) *
              right(element<SIZE>(warp, lane % 4 * 2 + i % 2, k, 4));
  warp_synchronize();
}
DEVICE float fp16_value(uint bits) { return widened(bits, 5, 10); }
DEVICE float e5m2_value(uint bits) { return widened(bits, 5, 2); }
DEVICE float e4m3_value(uint bits) { return widened(bits, 4, 3); }
DEVICE int u8_value(uint bits) { return (int)bits; }
DEVICE int s8_value(uint bits) { return (int8_t)bits; }
void mma_fp16(float* d, const uint* a, const uint* b) {
  product<float, 2>(d, a, b, fp16_value, fp16_value);
}
void mma_bf16(float* d, const uint* a, const uint* b) {
  product<float, 2>(d, a, b, bfloat, bfloat);
}
void mma_int8(int* d, const uint* a, const uint* b) {
  product<int, 1>(d, a, b, u8_value, s8_value);
}
void mma_e4m3(float* d, const uint* a, const uint* b) {
  product<float, 1>(d, a, b, e4m3_value, e4m3_value);
}
void mma_e5m2(float* d, const uint* a, const uint* b) {
  product<float, 1>(d, a, b, e5m2_value, e5m2_value);
}
