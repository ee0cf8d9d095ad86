// Instructions of NVIDIA chips (PTX ISA 8.0 and later, compute capability 8.0 and later).
#define DEVICE static __device__ __forceinline__
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;

// A binary16 number in memory; arithmetic is done in float.
struct half {
  ushort bits;
  half() = default;
  __device__ __forceinline__ explicit half(float value) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  }
  __device__ __forceinline__ operator float() const {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
};

DEVICE uint shared_address(const void* p) { return (uint)__cvta_generic_to_shared(p); }

// Copies BYTES (4, 8 or 16) from global to shared memory, behind the thread's back.
template <int BYTES>
DEVICE void copy_async(void* to, const void* from) {
  if (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from),
                 "n"(BYTES)
                 : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of this thread's last groups of copies are under way.
template <int PENDING>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 16-byte matrices; lane i names row i % 8 of matrix i / 8.
DEVICE void load_matrices(uint* d, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16 x 8, of the warp) += a (16 rows of 32 bytes) . b (8 columns of 32 bytes).
#define PRODUCT(NAME, TYPE, LETTER, SHAPE, TYPES)                                        \
  DEVICE void NAME(TYPE* d, const uint* a, const uint* b) {                              \
    asm volatile("mma.sync.aligned." SHAPE ".row.col." TYPES                             \
                 " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                \
                 : "+" LETTER(d[0]), "+" LETTER(d[1]), "+" LETTER(d[2]), "+" LETTER(d[3]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));    \
  }
PRODUCT(mma_fp16, float, "f", "m16n8k16", "f32.f16.f16.f32")
PRODUCT(mma_bf16, float, "f", "m16n8k16", "f32.bf16.bf16.f32")
PRODUCT(mma_int8, int, "r", "m16n8k32", "s32.u8.s8.s32")
#if __CUDA_ARCH__ >= 890
PRODUCT(mma_e4m3, float, "f", "m16n8k32", "f32.e4m3.e4m3.f32")
PRODUCT(mma_e5m2, float, "f", "m16n8k32", "f32.e5m2.e5m2.f32")
#endif

DEVICE void warp_synchronize() { __syncwarp(); }
// The value of the thread of the warp whose number differs in a bit.
DEVICE float across(float value, int bit) { return __shfl_xor_sync(0xffffffffu, value, bit); }

// Two 16-bit floats in a word, less two others.
DEVICE uint sub_fp16x2(uint a, uint b) {
  uint d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEVICE uint sub_bf16x2(uint a, uint b) {
  uint d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xbf80bf80u), "r"(a));
  return d;
}
