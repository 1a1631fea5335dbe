// y [tokens, out] = x [tokens, in] W^ᵀ + bias for tens to hundreds of tokens, W^ of few bits; see decode_step.cu.
//
// A block has 128 outputs, 16 MT tokens and a share of the inputs; of its four warps each has half the outputs and half the
// tokens, 4 tiles of 16 times MT of 8. x comes to shared memory by cp.async, a ring of STAGES blocks of codes wide; weights go
// from memory to registers, DEPTH blocks ahead, and are decoded there. Two warps decode the same weights: that costs less than
// shared memory would. Of a token's row in shared memory, pieces of 16 bytes change places, by 4 in odd rows, so that the eight
// lanes that read at once meet eight different ones.
#include "finish.cuh"
#include "weights.cuh"

constexpr int NT = 4, ROWS = 32 * NT, THREADS = 128;

template <class T, int FORMAT, int SCALE, bool ZERO, int SPAN, int MT, int DEPTH, int STAGES>
QT_KERNEL void QT_BOUNDS(THREADS, 1)
batch(const uint16_t* x, const uint32_t* codes, const void* scale, const uint16_t* zero, const float* table,
      const uint16_t* bias, uint16_t* y, float* partial, int* counters, int n_tokens, int n_out, int n_in, int n_blocks,
      int n_tiles, int group_shift, int n_groups, float alpha) {
  using L = Layout<FORMAT>;
  constexpr int TOKENS = 16 * MT, BLOCK = L::BLOCK, PIECES = BLOCK / 8;  // pieces of 16 bytes that a token has in a block
  constexpr int SPANS = SCALE == E4M3 ? 1 : BLOCK / SPAN, TILES = L::TILES / SPANS;
  QT_SHARED(uint16_t, ring);  // [STAGES][TOKENS][BLOCK]; at the end float [TOKENS][ROWS + 4] and a flag
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_tile = blockIdx.x * (2 * NT) + warp % 2 * NT, first_token = blockIdx.z * TOKENS;
  const bool has_tiles = first_tile < n_tiles;  // tiles come in fours
  const int begin = begin_of(blockIdx.y, n_blocks), end = begin_of(blockIdx.y + 1, n_blocks);

  Levels levels{};
  if constexpr (FORMAT == TABLE) levels = load_levels<T>(table);

  float acc[NT][MT][4] = {};
  uint32_t q[DEPTH][NT][L::WORDS] = {};

  auto load_x = [&](int block) {
    if (block < end) {
#pragma unroll 1  // addresses of all copies at once would take too many registers
      for (int i = 0; i < TOKENS * PIECES / THREADS; i++) {
        int token = (i * THREADS + threadIdx.x) / PIECES, piece = (i * THREADS + threadIdx.x) % PIECES;
        int k = block * BLOCK + 8 * piece;
        bool valid = first_token + token < n_tokens && k < n_in;
        size_t from = valid ? static_cast<size_t>(first_token + token) * n_in + k : 0;
        ptx::copy16(ring + ((block - begin) % STAGES * TOKENS + token) * BLOCK + 8 * (piece ^ token % 2 * 4), x + from, valid);
      }
    }
    ptx::commit();  // empty ones too, so that counts of commits are counts of blocks
  };
  auto load_codes = [&](uint32_t (&words)[NT][L::WORDS], int block) {
    if (!has_tiles || block >= end) return;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      size_t place = (static_cast<size_t>(first_tile + n) * n_blocks + block) * (32 * L::WORDS);
      load_words<FORMAT>(words[n], codes + place, lane);
    }
  };
  auto multiply = [&](const uint32_t (&words)[NT][L::WORDS], int block) {
    const uint16_t* stage = ring + (block - begin) % STAGES * TOKENS * BLOCK;
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
      uint32_t b[MT][TILES][2];
#pragma unroll
      for (int m = 0; m < MT; m++) {
        int token = 8 * (warp / 2 * MT + m) + g;
#pragma unroll
        for (int h = 0; h < TILES / 2; h++) {
          int piece = 4 * (span * TILES / 2 + h) + t;
          uint4 v = *reinterpret_cast<const uint4*>(stage + token * BLOCK + 8 * (piece ^ token % 2 * 4));
          b[m][2 * h][0] = v.x, b[m][2 * h][1] = v.y, b[m][2 * h + 1][0] = v.z, b[m][2 * h + 1][1] = v.w;
        }
      }
      float total[MT][4] = {};
      if constexpr (ZERO) {
        const uint32_t ones[4] = {T::ONES, T::ONES, T::ONES, T::ONES};
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
          for (int m = 0; m < MT; m++) T::mma(total[m], ones, b[m][tile]);
      }
      int group = SCALE == E4M3 ? block : (block * BLOCK + span * SPAN) >> group_shift;
      group = group < n_groups ? group : n_groups - 1;
#pragma unroll
      for (int n = 0; n < NT; n++) {
        int index = (group * n_tiles + first_tile + n) * 8 + g;
        StoredScale<SCALE> stored = load_scale<SCALE>(scale, SCALE == E4M3 ? 2 * index + t / 2 : index);
        uint32_t zeros = 0;
        if constexpr (ZERO) zeros = ptx::load4(reinterpret_cast<const uint32_t*>(zero) + index);
        float part[MT][4] = {};
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          uint32_t a[4];
          decode<T, FORMAT>(a, words[n], span * TILES + tile, levels);
          if constexpr (SCALE == E4M3) scale_weights<T>(a, stored, tile / 2);
#pragma unroll
          for (int m = 0; m < MT; m++) T::mma(SCALE == E4M3 ? acc[n][m] : part[m], a, b[m][tile]);
        }
        if constexpr (SCALE != E4M3) {
#pragma unroll
          for (int m = 0; m < MT; m++) add_scaled<FORMAT, SCALE, ZERO>(acc[n][m], part[m], total[m], stored, zeros);
        }
      }
    }
  };

#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) load_x(begin + s);
#pragma unroll
  for (int d = 0; d < DEPTH; d++) load_codes(q[d], begin + d);
  for (int first = begin; first < end; first += DEPTH) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      int block = first + d;
      if (block < end) {  // the same for all warps
        ptx::wait<STAGES - 2>();
        __syncthreads();  // x of this block is there, and all are done with the block whose place comes next
        load_x(block + STAGES - 1);
        if (has_tiles) multiply(q[d], block);
        load_codes(q[d], block + DEPTH);
      }
    }
  }
  ptx::wait<0>();
  __syncthreads();  // the ring becomes sums

  constexpr int STRIDE = ROWS + 4;
  float* sums = reinterpret_cast<float*>(ring);
  lay_down<STRIDE>(sums, acc, 8 * (warp / 2 * MT) + 2 * t, 16 * (warp % 2 * NT) + g);
  __syncthreads();
  auto of_block = [&](int token, int row) { return sums[token * STRIDE + row]; };
  auto store = [&](int token, int n, float sum) { write_output<T>(y, bias, n_out, token, n, alpha * sum); };
  int* flag = reinterpret_cast<int*>(sums + TOKENS * STRIDE);
  finish<float, ROWS, TOKENS>(of_block, store, flag, partial, counters, n_tokens, n_out);
}
