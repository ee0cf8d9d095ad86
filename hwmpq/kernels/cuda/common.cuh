// What kernels call that is made of the instructions before it.
struct half4 {
  half x, y, z, w;
};

template <int BYTES>
DEVICE void copy_elements(void* to, const void* from) {
  for (int i = 0; i < BYTES; ++i) ((uchar*)to)[i] = ((const uchar*)from)[i];
}

// 1, 2 or 4 bytes as the lowest of a word.
template <int BYTES>
DEVICE uint load_bytes(const void* from) {
  if (BYTES == 4) return *(const uint*)from;
  return BYTES == 2 ? *(const ushort*)from : *(const uchar*)from;
}

// BYTES of the bytes of a word, repeated.
template <int BYTES>
DEVICE void fill(void* to, uint word) {
  if (BYTES < 4)
    for (int i = 0; i < BYTES; ++i) ((uchar*)to)[i] = (uchar)(word >> (8 * i));
  else
    for (int i = 0; i < BYTES / 4; ++i) ((uint*)to)[i] = word;
}

// d (rows g and g + 8, columns 2t and 2t + 1) += four products each.
DEVICE void fma_fp32(float* d, const float* a, const float* b) {
  for (int row = 0; row < 2; ++row)
    for (int column = 0; column < 2; ++column)
      for (int k = 0; k < 4; ++k)
        d[row * 2 + column] = fmaf(a[row * 4 + k], b[column * 4 + k], d[row * 2 + column]);
}

// A thread's 16 bytes of a block of weights (four words of two or four elements) from its packed
// ones. Codes are first made unsigned by flipping their sign bit.
DEVICE void decode_word(uint* d, const uchar* s) {
  uint4 words = *(const uint4*)s;
  d[0] = words.x, d[1] = words.y, d[2] = words.z, d[3] = words.w;
}
// The sign bit of every byte's low field extended: no byte borrows from its neighbour.
DEVICE uint extend_bytes(uint x, uint sign) {
  return (((x ^ sign) | 0x80808080u) - sign) ^ 0x80808080u;
}
DEVICE void decode_s4_int8(uint* d, const uchar* s) {
  for (int i = 0; i < 4; ++i)
    d[i] = extend_bytes((((const uint*)s)[i / 2] >> (4 * (i % 2))) & 0x0f0f0f0fu, 0x08080808u);
}
DEVICE void decode_s2_int8(uint* d, const uchar* s) {
  for (int i = 0; i < 4; ++i)
    d[i] = extend_bytes((*(const uint*)s >> (2 * i)) & 0x03030303u, 0x02020202u);
}
// 1024 + u has u in the lowest bits of a binary16 number, 128 + u in those of a bfloat16 one.
DEVICE void decode_s4_fp16(uint* d, const uchar* s) {
  for (int i = 0; i < 4; ++i) {
    uint u = ((*(const uint*)s >> (4 * i)) & 0x000f000fu) ^ 0x00080008u;
    d[i] = sub_fp16x2(u | 0x64006400u, 0x64086408u);
  }
}
DEVICE void decode_s4_bf16(uint* d, const uchar* s) {
  for (int i = 0; i < 4; ++i) {
    uint u = ((*(const uint*)s >> (4 * i)) & 0x000f000fu) ^ 0x00080008u;
    d[i] = sub_bf16x2(u | 0x43004300u, 0x43084308u);
  }
}
// Bytes 0 and 2 of a word, and 1 and 3, are the elements of two words.
DEVICE void decode_s8_fp16(uint* d, const uchar* s) {
  for (int i = 0; i < 4; ++i) {
    uint u = ((((const uint*)s)[i / 2] >> (8 * (i % 2))) & 0x00ff00ffu) ^ 0x00800080u;
    d[i] = sub_fp16x2(u | 0x64006400u, 0x64806480u);
  }
}
// Eight bits and their offset are too many for a bfloat16: 2^23 + u in float, whose upper half is
// the whole number once the offset is off.
DEVICE void decode_s8_bf16(uint* d, const uchar* s) {
  for (int i = 0; i < 4; ++i) {
    uint u = ((((const uint*)s)[i / 2] >> (8 * (i % 2))) & 0x00ff00ffu) ^ 0x00800080u;
    float low = __uint_as_float(0x4b000000u | (u & 0xffu)) - 8388736.0f;
    float high = __uint_as_float(0x4b000000u | (u >> 16)) - 8388736.0f;
    d[i] = (__float_as_uint(low) >> 16) | (__float_as_uint(high) & 0xffff0000u);
  }
}
