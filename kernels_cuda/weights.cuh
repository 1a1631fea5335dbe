// Weights of few bits: from words in fragment order (qtool/kernels/fragments.py) to the A operand of mma.m16n8k16.
#pragma once
#include "ptx.cuh"

// What T, a kernel's 16 bits, can do. A float of T's bits and a code below it are their sum where the float's last bit
// counts one: 1024 of float16 with 10 bits, 128 of bfloat16 with 7.
struct F16 {
  static constexpr uint32_t MAGIC = 0x6400, MINUS_MAGIC = 0xE400, ONES = 0x3C003C00;
  static QT_DEVICE uint32_t pair(float low, float high) { return ptx::half_pair(low, high); }
  static QT_DEVICE uint32_t fma(uint32_t a, uint32_t b, uint32_t c) { return ptx::half_fma(a, b, c); }
  static QT_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_half(c, a, b); }
  static QT_DEVICE float value(uint32_t bits) { return ptx::half_to_float(bits); }
};
struct BF16 {
  static constexpr uint32_t MAGIC = 0x4300, MINUS_MAGIC = 0xC300, ONES = 0x3F803F80;
  static QT_DEVICE uint32_t pair(float low, float high) { return ptx::bfloat_pair(low, high); }
  static QT_DEVICE uint32_t fma(uint32_t a, uint32_t b, uint32_t c) { return ptx::bfloat_fma(a, b, c); }
  static QT_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_bfloat(c, a, b); }
  static QT_DEVICE float value(uint32_t bits) { return ptx::bits_to_float(bits << 16); }
};

// Formats: bits of a code; TABLE, four bits that name one of 16 levels.
constexpr int W2 = 2, W3 = 3, W4 = 4, W8 = 8, TABLE = 16;
// Scales: of groups in bfloat16 or float32, applied to sums; of 16 inputs in E4M3, applied to weights.
enum Scale { BFLOAT, FLOAT, E4M3 };

template <int FORMAT> struct Layout {
  static constexpr int BLOCK = FORMAT == W2 || FORMAT == W3 ? 128 : 64;  // inputs of a block
  static constexpr int WORDS = FORMAT == W8 ? 8 : FORMAT == W3 ? 6 : 4;  // that a lane holds of it
  static constexpr int TILES = BLOCK / 16;                               // products along a block
};

// The words of one lane of the block at `block`.
template <int FORMAT> QT_DEVICE void load_words(uint32_t (&q)[Layout<FORMAT>::WORDS], const uint32_t* block, int lane) {
  uint4 v = ptx::load_once(block + 4 * lane);
  q[0] = v.x, q[1] = v.y, q[2] = v.z, q[3] = v.w;
  if constexpr (FORMAT == W3) {
    uint2 rest = ptx::load_once8(block + 128 + 2 * lane);
    q[4] = rest.x, q[5] = rest.y;
  }
  if constexpr (FORMAT == W8) {
    uint4 rest = ptx::load_once(block + 128 + 4 * lane);
    q[4] = rest.x, q[5] = rest.y, q[6] = rest.z, q[7] = rest.w;
  }
}

// 16 levels in T, their lower and their upper bytes, for prmt.
struct Levels {
  uint32_t low[4], high[4];
};

template <class T> QT_DEVICE Levels load_levels(const float* table) {
  Levels levels;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint4 four = ptx::load16(table + 4 * i);
    uint32_t a = T::pair(ptx::bits_to_float(four.x), ptx::bits_to_float(four.y));
    uint32_t b = T::pair(ptx::bits_to_float(four.z), ptx::bits_to_float(four.w));
    levels.low[i] = ptx::prmt(a, b, 0x6420);
    levels.high[i] = ptx::prmt(a, b, 0x7531);
  }
  return levels;
}

// Bytes of four codes, of which `codes` has the lower three bits in each nibble and `choice` the fourth.
QT_DEVICE uint32_t look_up(const uint32_t (&bytes)[4], uint32_t codes, uint32_t choice) {
  return ptx::prmt(ptx::prmt(bytes[0], bytes[1], codes), ptx::prmt(bytes[2], bytes[3], codes), choice);
}

// Registers a0 .. a3 of product `tile` of a block: codes less half their range, exact in T, or levels.
template <class T, int FORMAT>
QT_DEVICE void decode(uint32_t (&a)[4], const uint32_t (&q)[Layout<FORMAT>::WORDS], int tile, const Levels& levels) {
  constexpr uint32_t OR_AND = 0xEA;  // (a & b) | c
  constexpr uint32_t ONE = T::ONES;
  if constexpr (FORMAT == TABLE) {  // nibbles in the order a0.lower, a0.upper, a1.lower, ...
    uint32_t codes = q[tile] & 0x77777777, choice = 0x32103210 | (q[tile] >> 1 & 0x44444444);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t low = look_up(levels.low, codes >> 16 * half, choice >> 16 * half);
      uint32_t high = look_up(levels.high, codes >> 16 * half, choice >> 16 * half);
      a[2 * half] = ptx::prmt(low, high, 0x5140);
      a[2 * half + 1] = ptx::prmt(low, high, 0x7362);
    }
  } else if constexpr (FORMAT == W8) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t word = q[2 * tile + i / 2];
      if constexpr (T::MAGIC == F16::MAGIC) {
        uint32_t magic = ptx::prmt(word, 0x64646464, i % 2 ? 0x4342 : 0x4140);  // 1024 + code
        a[i] = T::fma(magic, ONE, 0xE480E480);                                   // - 1152
      } else {  // 2^23 + code in float32, for bfloat16 has no bit that counts one above 128
        float low = ptx::bits_to_float(ptx::prmt(word, 0x4B000000, i % 2 ? 0x7442 : 0x7440));
        float high = ptx::bits_to_float(ptx::prmt(word, 0x4B000000, i % 2 ? 0x7443 : 0x7441));
        a[i] = T::pair(low - 8388736.0f, high - 8388736.0f);
      }
    }
  } else {
    constexpr uint32_t PAIR = 0x00010001;
    constexpr uint32_t MAGIC = T::MAGIC * PAIR, MINUS = (T::MINUS_MAGIC + (1 << (FORMAT - 1))) * PAIR;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t sum;
      if constexpr (FORMAT == W4) {
        sum = ptx::lop3<OR_AND>(q[tile] >> 4 * i, 0xF * PAIR, MAGIC);
      } else {
        int field = 4 * (tile % 2) + i;
        sum = ptx::lop3<OR_AND>(q[tile / 2] >> 2 * field, 3 * PAIR, MAGIC);
        if constexpr (FORMAT == W3) {
          int bit = 4 * (tile % 4) + i;  // of the third bits; it goes to bit 2
          uint32_t third = bit < 2 ? q[4 + tile / 4] << (2 - bit) : q[4 + tile / 4] >> (bit - 2);
          sum = ptx::lop3<OR_AND>(third, 4 * PAIR, sum);
        }
      }
      a[i] = T::fma(sum, ONE, MINUS);
    }
  }
}

// Scales of one group for a lane, rows g and g + 8, as they are stored: [groups][tiles][8][2].
template <int SCALE> struct StoredScale {
  uint32_t bits[SCALE == FLOAT ? 2 : 1];
};

template <int SCALE> QT_DEVICE StoredScale<SCALE> load_scale(const void* scale, int index) {
  StoredScale<SCALE> stored;
  if constexpr (SCALE == FLOAT) {
    uint2 v = ptx::load8(static_cast<const uint2*>(scale) + index);
    stored.bits[0] = v.x, stored.bits[1] = v.y;
  } else {
    stored.bits[0] = ptx::load4(static_cast<const uint32_t*>(scale) + index);
  }
  return stored;
}

// The scale of row g + 8 r.
template <int SCALE> QT_DEVICE float scale_of(const StoredScale<SCALE>& stored, int r) {
  if constexpr (SCALE == FLOAT) return ptx::bits_to_float(stored.bits[r]);
  return ptx::bits_to_float(r ? stored.bits[0] & 0xFFFF0000 : stored.bits[0] << 16);
}

// The zero point of row g + 8 r, less half the range of whole numbers, for so decode() gives them.
template <int FORMAT> QT_DEVICE float zero_of(uint32_t zeros, int r) {
  float zero = ptx::half_to_float(r ? zeros >> 16 : zeros);
  return FORMAT == TABLE ? zero : zero - (1 << (FORMAT - 1));
}

// acc += scale (part - zero total) of the sums of one group, rows g and g + 8.
template <int FORMAT, int SCALE, bool ZERO>
QT_DEVICE void add_scaled(float (&acc)[4], const float (&part)[4], const float (&total)[4], const StoredScale<SCALE>& stored,
                          uint32_t zeros) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float sum = part[i];
    if constexpr (ZERO) sum -= zero_of<FORMAT>(zeros, i / 2) * total[i];
    acc[i] += scale_of<SCALE>(stored, i / 2) * sum;
  }
}

// E4M3 is float16 with three bits of the mantissa and an exponent that is 8 less, in other places: of half h and row g + 8 r.
QT_DEVICE float e4m3_scale(const StoredScale<E4M3>& stored, int h, int r) {
  uint32_t byte = stored.bits[0] >> (16 * h + 8 * r);
  return ptx::half_to_float((byte & 0x80) << 8 | (byte & 0x7F) << 7) * 256.0f;
}

// Weights of half h times their scales: at most two bits times four, exact in T.
template <class T> QT_DEVICE void scale_weights(uint32_t (&a)[4], const StoredScale<E4M3>& stored, int h) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float scale = e4m3_scale(stored, h, i % 2);
    a[i] = T::fma(a[i], T::pair(scale, scale), 0x80008000);
  }
}
