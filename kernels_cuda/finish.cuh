// What products share: which inputs a block has, and the end, from a lane's sums to what is stored.
//
// Where inputs are split over blocks (gridDim.y), each writes its sums and counts up, and the last to come adds them in their
// order and sets the count back to zero. Every result is the same to the bit, whichever comes last, and nobody waits.
#pragma once
#include "ptx.cuh"

// The first of the blocks of inputs that a split has; where it ends the next begins. Of n_blocks each split has as many as the
// others, or the first ones one more. No product of these overflows 32 bits.
QT_DEVICE int begin_of(unsigned split, unsigned n_blocks) {
  unsigned each = n_blocks / gridDim.y, more = n_blocks % gridDim.y;
  return static_cast<int>(split * each + (split < more ? split : more));
}

// A lane's sums of [NT] tiles of 16 outputs and [MT] of 8 tokens, as mma has them, into sums [tokens][STRIDE], from a place on.
template <int STRIDE, class V, int NT, int MT>
QT_DEVICE void lay_down(V* sums, const V (&acc)[NT][MT][4], int token, int row) {
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[(token + 8 * m + i % 2) * STRIDE + row + 16 * n + 8 * (i / 2)] = acc[n][m][i];
}

// One output of y [tokens, n_out], plus its bias where there is one.
template <class T> QT_DEVICE void write_output(uint16_t* y, const uint16_t* bias, int n_out, int token, int n, float value) {
  value += bias ? T::value(bias[n]) : 0.0f;
  y[static_cast<size_t>(token) * n_out + n] = static_cast<uint16_t>(T::pair(value, value));
}

// of_block(token, row): the sum V of one output. store(token, n, sum) keeps the whole one of output n, of those that there are.
// Blocks are ROWS outputs (x) by TOKENS (z); flag: a word of shared memory.
// partial [splits, z, x, TOKENS, ROWS]    counters [z, x]
template <class V, int ROWS, int TOKENS, class Sum, class Store>
QT_DEVICE void finish(const Sum& of_block, const Store& store, int* flag, V* partial, int* counters, int n_tokens, int n_out) {
  const int first_token = blockIdx.z * TOKENS, first_row = blockIdx.x * ROWS;
  const int n_sums = (n_tokens - first_token < TOKENS ? n_tokens - first_token : TOKENS) * ROWS;
  const int place = blockIdx.z * gridDim.x + blockIdx.x, n_splits = gridDim.y, n_threads = blockDim.x;
  auto keep = [&](int e, V sum) {
    int n = first_row + e % ROWS;
    if (n < n_out) store(first_token + e / ROWS, n, sum);
  };
  if (n_splits == 1) {
    for (int e = threadIdx.x; e < n_sums; e += n_threads) keep(e, of_block(e / ROWS, e % ROWS));
    return;
  }
  const size_t step = static_cast<size_t>(gridDim.x) * gridDim.z * (ROWS * TOKENS);  // from one split to the next
  V* own = partial + static_cast<size_t>(place) * (ROWS * TOKENS);
  for (int e = threadIdx.x; e < n_sums; e += n_threads) own[blockIdx.y * step + e] = of_block(e / ROWS, e % ROWS);
  ptx::fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *flag = ptx::count_up(counters + place) == n_splits - 1;
    if (*flag) counters[place] = 0;
  }
  __syncthreads();
  if (!*flag) return;
  ptx::fence();
  for (int e = threadIdx.x; e < n_sums; e += n_threads) {
    V sum = 0;
    for (int split = 0; split < n_splits; split++) sum += ptx::load_fresh(own + split * step + e);
    keep(e, sum);
  }
}
