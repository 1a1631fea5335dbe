// y [tokens, out] = x [tokens, in] W^ᵀ + bias for few tokens, W^ of few bits; see qtool/kernels/weight_only.py for the formula.
//
// A block has 16 NT outputs and a share of the inputs. Its warps go through the blocks of codes in turns, DEPTH of them under
// way in registers, for weights are read once and need no shared memory. Weights are the A operand, 16 outputs; tokens are the 8
// columns of B, MT times, so that one token costs what eight do. Sums of a group stay in float32 and are scaled once a group:
//     acc[n, m] += scale[n] (sum_k level[n, k] x[m, k]  -  zero[n] sum_k x[m, k])
// the second sum being one more product, with a matrix of ones. Warps add up in shared memory, blocks as finish.cuh says.
#include "finish.cuh"
#include "weights.cuh"

constexpr int WARPS = 8;

// One block of codes of NT tiles, and x of MT times 8 tokens: what a lane holds while it is under way.
template <int FORMAT, int SCALE, bool ZERO, int SPAN, int NT, int MT> struct Stage {
  static constexpr int SPANS = SCALE == E4M3 ? 1 : Layout<FORMAT>::BLOCK / SPAN;
  uint32_t q[NT][Layout<FORMAT>::WORDS];
  StoredScale<SCALE> scale[NT][SPANS];
  uint32_t zero[ZERO ? NT : 1][SPANS];
  uint32_t x[MT][Layout<FORMAT>::TILES][2];
};

// SPAN: inputs whose sum is scaled at once, 32 where groups are that small, else 64.
// Of eight bits and one tile of tokens two blocks fit a multiprocessor, in 128 registers of a thread.
template <class T, int FORMAT, int SCALE, bool ZERO, int SPAN, int NT, int MT, int DEPTH>
QT_KERNEL void QT_BOUNDS(WARPS * 32, FORMAT == W8 && MT == 1 ? 2 : 1)
decode_step(const uint16_t* x, const uint32_t* codes, const void* scale, const uint16_t* zero, const float* table,
            const uint16_t* bias, uint16_t* y, float* partial, int* counters, int n_tokens, int n_out, int n_in, int n_blocks,
            int n_tiles, int group_shift, int n_groups, float alpha) {
  using L = Layout<FORMAT>;
  using S = Stage<FORMAT, SCALE, ZERO, SPAN, NT, MT>;
  constexpr int ROWS = 16 * NT, TOKENS = 8 * MT, STRIDE = ROWS + 4;  // so that a warp's writes fall on 32 banks
  QT_SHARED(float, sums);                                            // [WARPS][TOKENS][STRIDE], and a flag
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_tile = blockIdx.x * NT;
  const int begin = begin_of(blockIdx.y, n_blocks), end = begin_of(blockIdx.y + 1, n_blocks);

  Levels levels{};
  if constexpr (FORMAT == TABLE) levels = load_levels<T>(table);

  float acc[NT][MT][4] = {};
  S stages[DEPTH];

  auto load = [&](S& stage, int block) {
    if (block >= end) return;
    // Addresses are those of the first tile and how far the others lie from it, for one of each would take registers.
    const uint32_t* place = codes + (static_cast<size_t>(first_tile) * n_blocks + block) * (32 * L::WORDS);
#pragma unroll
    for (int n = 0; n < NT; n++)
      load_words<FORMAT>(stage.q[n], place + static_cast<unsigned>(n * n_blocks * 32 * L::WORDS), lane);
#pragma unroll
    for (int span = 0; span < S::SPANS; span++) {
      // The last block may reach beyond the inputs, where x is zero and any scale will do.
      int group = SCALE == E4M3 ? block : (block * L::BLOCK + span * SPAN) >> group_shift;
      group = group < n_groups ? group : n_groups - 1;
      const int index = (group * n_tiles + first_tile) * 8 + g;
#pragma unroll
      for (int n = 0; n < NT; n++) {
        constexpr int STEP = SCALE == BFLOAT ? 8 : 16;  // words of a tile
        const uint32_t* scales = static_cast<const uint32_t*>(scale) + STEP * n;
        stage.scale[n][span] = load_scale<SCALE>(scales, SCALE == E4M3 ? 2 * index + t / 2 : index);
        if constexpr (ZERO) stage.zero[n][span] = ptx::load4(reinterpret_cast<const uint32_t*>(zero) + index + 8 * n);
      }
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
      int token = 8 * m + g;
#pragma unroll
      for (int h = 0; h < L::BLOCK / 32; h++) {
        int k = block * L::BLOCK + 32 * h + 8 * t;
        uint4 v{0, 0, 0, 0};
        if (token < n_tokens && k < n_in) v = ptx::load16(x + static_cast<size_t>(token) * n_in + k);
        stage.x[m][2 * h][0] = v.x, stage.x[m][2 * h][1] = v.y;
        stage.x[m][2 * h + 1][0] = v.z, stage.x[m][2 * h + 1][1] = v.w;
      }
    }
  };

  auto multiply = [&](const S& stage) {
    constexpr int TILES = L::TILES / S::SPANS;  // of a span
#pragma unroll
    for (int span = 0; span < S::SPANS; span++) {
      float total[MT][4] = {};  // of x
      if constexpr (ZERO) {
        const uint32_t ones[4] = {T::ONES, T::ONES, T::ONES, T::ONES};
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
          for (int m = 0; m < MT; m++) T::mma(total[m], ones, stage.x[m][span * TILES + tile]);
      }
#pragma unroll
      for (int n = 0; n < NT; n++) {
        float part[MT][4] = {};
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          uint32_t a[4];
          decode<T, FORMAT>(a, stage.q[n], span * TILES + tile, levels);
          if constexpr (SCALE == E4M3) scale_weights<T>(a, stage.scale[n][span], tile / 2);
#pragma unroll
          for (int m = 0; m < MT; m++) T::mma(SCALE == E4M3 ? acc[n][m] : part[m], a, stage.x[m][span * TILES + tile]);
        }
        if constexpr (SCALE != E4M3) {
#pragma unroll
          for (int m = 0; m < MT; m++)
            add_scaled<FORMAT, SCALE, ZERO>(acc[n][m], part[m], total[m], stage.scale[n][span], stage.zero[ZERO ? n : 0][span]);
        }
      }
    }
  };

#pragma unroll
  for (int d = 0; d < DEPTH; d++) load(stages[d], begin + warp + d * WARPS);
  for (int block = begin + warp; block < end; block += DEPTH * WARPS) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      if (block + d * WARPS < end) multiply(stages[d]);
      load(stages[d], block + (d + DEPTH) * WARPS);
    }
  }

  lay_down<STRIDE>(sums, acc, warp * TOKENS + 2 * t, g);
  __syncthreads();

  auto of_block = [&](int token, int row) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums[(w * TOKENS + token) * STRIDE + row];
    return sum;
  };
  auto store = [&](int token, int n, float sum) { write_output<T>(y, bias, n_out, token, n, alpha * sum); };
  int* flag = reinterpret_cast<int*>(sums + WARPS * TOKENS * STRIDE);
  finish<float, ROWS, TOKENS>(of_block, store, flag, partial, counters, n_tokens, n_out);
}
