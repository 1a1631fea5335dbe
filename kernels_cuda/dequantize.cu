// W^ [out, in] in 16 bits, for products of so many tokens that decoding once and torch's own product are faster.
// A warp decodes one block of codes of one tile of 16 outputs; each lane writes 8 neighbours of two rows at once.
#include "weights.cuh"

template <class T, int FORMAT, int SCALE, bool ZERO>
QT_KERNEL void QT_BOUNDS(256, 1)
dequantize(const uint32_t* codes, const void* scale, const uint16_t* zero, const float* table, uint16_t* w, int n_out, int n_in,
           int n_blocks, int n_tiles, int group_shift, int n_groups, float alpha) {
  using L = Layout<FORMAT>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, tile = blockIdx.x;
  const int block = blockIdx.y * 8 + threadIdx.x / 32;
  if (block >= n_blocks) return;
  Levels levels{};
  if constexpr (FORMAT == TABLE) levels = load_levels<T>(table);
  uint32_t q[L::WORDS];
  load_words<FORMAT>(q, codes + (static_cast<size_t>(tile) * n_blocks + block) * (32 * L::WORDS), lane);
#pragma unroll
  for (int h = 0; h < L::BLOCK / 32; h++) {
    int k = block * L::BLOCK + 32 * h + 8 * t;
    if (k >= n_in) continue;
    int group = SCALE == E4M3 ? block : k >> group_shift;
    int index = (group * n_tiles + tile) * 8 + g;
    StoredScale<SCALE> stored = load_scale<SCALE>(scale, SCALE == E4M3 ? 2 * index + t / 2 : index);
    uint32_t zeros = 0;
    if constexpr (ZERO) zeros = ptx::load4(reinterpret_cast<const uint32_t*>(zero) + index);
    uint32_t a[2][4];  // of both products of this half
    decode<T, FORMAT>(a[0], q, 2 * h, levels);
    decode<T, FORMAT>(a[1], q, 2 * h + 1, levels);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float of_row, shift = 0;
      if constexpr (SCALE == E4M3) of_row = e4m3_scale(stored, h, r);
      else of_row = scale_of<SCALE>(stored, r);
      if constexpr (ZERO) shift = zero_of<FORMAT>(zeros, r);
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        uint32_t levels_of = a[i / 2][2 * (i % 2) + r];
        float low = (T::value(levels_of & 0xFFFF) - shift) * (of_row * alpha);
        float high = (T::value(levels_of >> 16) - shift) * (of_row * alpha);
        pairs[i] = T::pair(low, high);
      }
      int n = 16 * tile + 8 * r + g;
      if (n < n_out) *reinterpret_cast<uint4*>(w + static_cast<size_t>(n) * n_in + k) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }
}
