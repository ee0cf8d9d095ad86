// What device.cuh declares, for this CPU: host.cpp does it.
#include <math.h>
#include <stdint.h>
#include <string.h>
#define DEVICE static inline
#define __global__
#define __launch_bounds__(...)
#define __restrict__
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;

struct int4 { int x, y, z, w; };
struct uint4 { uint x, y, z, w; };
struct float4 { float x, y, z, w; };
struct ushort4 { ushort x, y, z, w; };
DEVICE int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
DEVICE uint4 make_uint4(uint x, uint y, uint z, uint w) { return {x, y, z, w}; }
DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
DEVICE ushort4 make_ushort4(int x, int y, int z, int w) {
  return {(ushort)x, (ushort)y, (ushort)z, (ushort)w};
}
template <class T>
DEVICE T min(T a, T b) { return b < a ? b : a; }
template <class T>
DEVICE T max(T a, T b) { return a < b ? b : a; }
DEVICE float __uint_as_float(uint bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
DEVICE uint __float_as_uint(float value) {
  uint bits;
  memcpy(&bits, &value, 4);
  return bits;
}

float widened(uint bits, int exponent_bits, int fraction_bits);
ushort narrowed(float value);
struct half {
  ushort bits;
  half() = default;
  explicit half(float value) : bits(narrowed(value)) {}
  operator float() const { return widened(bits, 5, 10); }
};
DEVICE float bfloat(uint bits) { return __uint_as_float(bits << 16); }
DEVICE uint sub_fp16x2(uint a, uint b) {
  half low, high, x, y;
  low.bits = (ushort)a, high.bits = (ushort)(a >> 16), x.bits = (ushort)b, y.bits = b >> 16;
  return half((float)low - (float)x).bits | (uint)half((float)high - (float)y).bits << 16;
}
DEVICE uint sub_bf16x2(uint a, uint b) {  // of numbers whose difference is a bfloat16 one
  uint low = __float_as_uint(bfloat(a & 0xffffu) - bfloat(b & 0xffffu));
  return low >> 16 | (__float_as_uint(bfloat(a >> 16) - bfloat(b >> 16)) & 0xffff0000u);
}

struct Place { int x, y, z; };
extern Place blockIdx, threadIdx;
extern uchar* shared_memory;
void __syncthreads();
void warp_synchronize();
float across(float value, int bit);
void copy_later(void* to, const void* from, int size);
void copy_commit();
void copy_until(int pending);
template <int BYTES>
DEVICE void copy_async(void* to, const void* from) { copy_later(to, from, BYTES); }
template <int PENDING>
DEVICE void copy_wait() { copy_until(PENDING); }
void load_matrices(uint* d, const void* row);
void mma_fp16(float* d, const uint* a, const uint* b);
void mma_bf16(float* d, const uint* a, const uint* b);
void mma_int8(int* d, const uint* a, const uint* b);
void mma_e4m3(float* d, const uint* a, const uint* b);
void mma_e5m2(float* d, const uint* a, const uint* b);
