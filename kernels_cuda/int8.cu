// Eight-bit products in whole numbers, and the rounding of tokens for them; see qtool/kernels/int8.py.
#include "finish.cuh"
#include "weights.cuh"

constexpr int THREADS = 128, NT = 4, ROWS = 32 * NT, BLOCK = 128, PIECES = BLOCK / 16;

// y [tokens, out] = x_scale w_scale (xq wqᵀ - x_zero w_colsum) + bias.
//
// A block has 128 outputs and 16 MT tokens; of its four warps each has half of either. Both matrices come to shared memory by
// cp.async, a ring of STAGES places of 128 inputs. A lane reads 16 neighbours at once, inputs 16 t .. 16 t + 15 of each 64, and
// takes them as words of two products: the order of inputs is free as long as x and w share it. Pieces of 16 bytes change
// places by 4 in odd rows, so that the eight lanes that read at once meet eight different ones.
template <class T, int MT, int STAGES>
QT_KERNEL void QT_BOUNDS(THREADS, 1)
int8_product(const int8_t* x, const int8_t* w, const float* x_scale, const float* w_scale, const uint16_t* bias,
             const int* x_zero, const int* w_colsum, uint16_t* y, int* partial, int* counters, int n_tokens, int n_out,
             int n_in) {
  constexpr int TOKENS = 16 * MT, PLACE = (ROWS + TOKENS) * BLOCK;
  QT_SHARED(int8_t, ring);  // [STAGES][ROWS of w, then TOKENS of x][BLOCK]; at the end int [TOKENS][ROWS + 4] and a flag
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * ROWS, first_token = blockIdx.z * TOKENS, n_blocks = (n_in + BLOCK - 1) / BLOCK;
  const int begin = begin_of(blockIdx.y, n_blocks), end = begin_of(blockIdx.y + 1, n_blocks);

  auto load = [&](int block) {
    if (block < end) {
      int8_t* place = ring + (block - begin) % STAGES * PLACE;
#pragma unroll
      for (int i = 0; i < (ROWS + TOKENS) * PIECES / THREADS; i++) {
        int row = (i * THREADS + threadIdx.x) / PIECES, piece = (i * THREADS + threadIdx.x) % PIECES;
        int k = block * BLOCK + 16 * piece, n = first_row + row, token = first_token + row - ROWS;
        bool is_weight = row < ROWS, valid = k < n_in && (is_weight ? n < n_out : token < n_tokens);
        const int8_t* from = is_weight ? w + static_cast<size_t>(n) * n_in + k : x + static_cast<size_t>(token) * n_in + k;
        ptx::copy16(place + row * BLOCK + 16 * (piece ^ row % 2 * 4), valid ? from : x, valid);
      }
    }
    ptx::commit();
  };
  auto piece_of = [&](const int8_t* place, int row, int h) {
    return *reinterpret_cast<const uint4*>(place + row * BLOCK + 16 * ((4 * h + t) ^ row % 2 * 4));
  };

  int acc[NT][MT][4] = {};
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) load(begin + s);
  for (int block = begin; block < end; block++) {
    ptx::wait<STAGES - 2>();
    __syncthreads();  // this block is there, and all are done with the one whose place comes next
    load(block + STAGES - 1);
    const int8_t* place = ring + (block - begin) % STAGES * PLACE;
#pragma unroll
    for (int h = 0; h < BLOCK / 64; h++) {
      uint4 b[MT];
#pragma unroll
      for (int m = 0; m < MT; m++) b[m] = piece_of(place, ROWS + 8 * (warp / 2 * MT + m) + g, h);
#pragma unroll
      for (int n = 0; n < NT; n++) {
        int row = 16 * (warp % 2 * NT + n) + g;
        uint4 upper = piece_of(place, row, h), lower = piece_of(place, row + 8, h);
        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y}, second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
        for (int m = 0; m < MT; m++) {
          ptx::mma_int8(acc[n][m], first, {b[m].x, b[m].y});
          ptx::mma_int8(acc[n][m], second, {b[m].z, b[m].w});
        }
      }
    }
  }
  ptx::wait<0>();
  __syncthreads();  // the ring becomes sums

  constexpr int STRIDE = ROWS + 4;
  int* sums = reinterpret_cast<int*>(ring);
  lay_down<STRIDE>(sums, acc, 8 * (warp / 2 * MT) + 2 * t, 16 * (warp % 2 * NT) + g);
  __syncthreads();
  auto of_block = [&](int token, int row) { return sums[token * STRIDE + row]; };
  auto store = [&](int token, int n, int sum) {
    if (x_zero) sum -= x_zero[token] * w_colsum[n];
    write_output<T>(y, bias, n_out, token, n, static_cast<float>(sum) * (x_scale[token] * w_scale[n]));
  };
  finish<int, ROWS, TOKENS>(of_block, store, sums + TOKENS * STRIDE, partial, counters, n_tokens, n_out);
}

// The sum (or, of MAX, the largest) of value over the block's 256 threads, for all of them; room: 8 floats of shared memory.
constexpr int TOKEN_THREADS = 256;
template <bool MAX> QT_DEVICE float over_block(float value, float* room) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) {
    float other = ptx::shuffle_xor(value, mask);
    value = MAX ? fmaxf(value, other) : value + other;
  }
  __syncthreads();  // room may still be read
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
  __syncthreads();
  value = room[0];
#pragma unroll
  for (int i = 1; i < TOKEN_THREADS / 32; i++) value = MAX ? fmaxf(value, room[i]) : value + room[i];
  return value;
}

// Codes of one token, its scale and its zero point, in its own range; NORM: after x / sqrt(mean x² + eps) · gain. A block has
// one token and keeps it in shared memory, so that it is read once.
template <class T, bool SYMMETRIC, bool NORM>
QT_KERNEL void QT_BOUNDS(TOKEN_THREADS, 1)
quantize_tokens(const uint16_t* x, const uint16_t* gain, int8_t* codes, float* scales, int* zeros, int n_in, float eps) {
  QT_SHARED(uint4, shared);  // 8 floats, then [in] of T
  float* room = reinterpret_cast<float*>(shared);
  uint4* row = shared + 2;
  const size_t first = static_cast<size_t>(blockIdx.x) * n_in;
  const int n_pieces = n_in / 8;  // each thread writes and reads the same pieces
  float squares = 0, lowest = 0, highest = 0;  // ranges hold zero
  auto see = [&](uint32_t pair) {
    float low = T::value(pair & 0xFFFF), high = T::value(pair >> 16);
    squares += low * low + high * high;
    lowest = fminf(lowest, fminf(low, high)), highest = fmaxf(highest, fmaxf(low, high));
  };
  for (int i = threadIdx.x; i < n_pieces; i += TOKEN_THREADS) {
    uint4 v = ptx::load16(x + first + 8 * i);
    see(v.x), see(v.y), see(v.z), see(v.w);
    row[i] = v;
  }
  if constexpr (NORM) {
    const float factor = 1.0f / sqrtf(over_block<false>(squares, room) / n_in + eps);
    lowest = highest = 0;
    auto normalized = [&](uint32_t pair, uint32_t gains) {
      pair = T::pair(T::value(pair & 0xFFFF) * factor, T::value(pair >> 16) * factor);
      pair = T::pair(T::value(pair & 0xFFFF) * T::value(gains & 0xFFFF), T::value(pair >> 16) * T::value(gains >> 16));
      see(pair);
      return pair;
    };
    for (int i = threadIdx.x; i < n_pieces; i += TOKEN_THREADS) {
      uint4 v = row[i], of = ptx::load16(gain + 8 * i);
      row[i] = {normalized(v.x, of.x), normalized(v.y, of.y), normalized(v.z, of.z), normalized(v.w, of.w)};
    }
  }
  highest = over_block<true>(highest, room);
  lowest = -over_block<true>(-lowest, room);

  float scale, zero = 0;  // as IntegerGrid.fit of qtool/formats/integer.py has them, in the same steps
  if constexpr (SYMMETRIC) {
    scale = fmaxf(-lowest, highest) / 127.5f;
  } else {
    float span = highest - lowest;
    if (span > 0) zero = fminf(fmaxf(rintf(-lowest / span * 256.0f - 0.5f), 0.0f), 255.0f);
    scale = fmaxf(highest / (255.0f - zero + 0.5f), -lowest / (zero + 0.5f)) * 255.5f / 255.5f;
  }
  if (!(scale > 0)) scale = 1;
  auto code = [&](uint32_t bits) {
    float q = rintf(T::value(bits & 0xFFFF) / scale) + (SYMMETRIC ? 0.0f : zero - 128.0f);
    return static_cast<uint32_t>(static_cast<int>(fminf(fmaxf(q, -128.0f), 127.0f))) & 0xFF;
  };
  auto four = [&](uint32_t a, uint32_t b) { return code(a) | code(a >> 16) << 8 | code(b) << 16 | code(b >> 16) << 24; };
  for (int i = threadIdx.x; i < n_pieces; i += TOKEN_THREADS) {
    uint4 v = row[i];
    *reinterpret_cast<uint2*>(codes + first + 8 * i) = {four(v.x, v.y), four(v.z, v.w)};
  }
  if (threadIdx.x == 0) {
    scales[blockIdx.x] = scale;
    zeros[blockIdx.x] = SYMMETRIC ? 0 : static_cast<int>(zero) - 128;
  }
}
