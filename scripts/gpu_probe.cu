// What gpu_probe.py asks of a GPU; ptx.cuh of kernels_cuda/ stands before it.
// Registers of one warp in and out, as they are: a [32][4], b [32][2], c [32][4].
extern "C" __global__ void fragment_half(const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = threadIdx.x;
  uint32_t ra[4], rb[2];
  float rc[4] = {0, 0, 0, 0};
  for (int i = 0; i < 4; ++i) ra[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[lane * 2 + i];
  ptx::mma_half(rc, ra, rb);
  for (int i = 0; i < 4; ++i) c[lane * 4 + i] = rc[i];
}
extern "C" __global__ void fragment_bfloat(const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = threadIdx.x;
  uint32_t ra[4], rb[2];
  float rc[4] = {0, 0, 0, 0};
  for (int i = 0; i < 4; ++i) ra[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[lane * 2 + i];
  ptx::mma_bfloat(rc, ra, rb);
  for (int i = 0; i < 4; ++i) c[lane * 4 + i] = rc[i];
}
extern "C" __global__ void fragment_int8(const uint32_t* a, const uint32_t* b, int* c) {
  const int lane = threadIdx.x;
  uint32_t ra[4], rb[2];
  int rc[4] = {0, 0, 0, 0};
  for (int i = 0; i < 4; ++i) ra[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[lane * 2 + i];
  ptx::mma_int8(rc, ra, rb);
  for (int i = 0; i < 4; ++i) c[lane * 4 + i] = rc[i];
}
extern "C" __global__ void nothing(float* unused) {}

// Rates: each warp runs `turns` times four independent products; what comes out is written, so that nothing is left out.
#define RATE(NAME, INSTRUCTION)                                                                                       \
  extern "C" __global__ void NAME(int* out, int turns) {                                                              \
    int c[4][4] = {};                                                                                                 \
    uint32_t a[4], b[2];                                                                                              \
    for (int i = 0; i < 4; ++i) a[i] = threadIdx.x * 2654435761u + i;                                                 \
    for (int i = 0; i < 2; ++i) b[i] = threadIdx.x * 40503u + i;                                                      \
    for (int turn = 0; turn < turns; ++turn)                                                                          \
      _Pragma("unroll") for (int k = 0; k < 4; ++k)                                                                   \
          asm volatile(INSTRUCTION " {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"                              \
                       : "+r"(c[k][0]), "+r"(c[k][1]), "+r"(c[k][2]), "+r"(c[k][3])                                   \
                       : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                           \
    int sum = 0;                                                                                                      \
    for (int k = 0; k < 4; ++k) sum += c[k][0] ^ c[k][1] ^ c[k][2] ^ c[k][3];                                         \
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;                                                                 \
  }
RATE(rate_int8, "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32")
RATE(rate_int4, "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32")
RATE(rate_binary_and, "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc")
RATE(rate_binary_xor, "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.xor.popc")

extern "C" __global__ void rate_bfloat(int* out, int turns) {
  float c[4][4] = {};
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = 0x3f803f80u + threadIdx.x;  // near 1
  for (int i = 0; i < 2; ++i) b[i] = 0x3f003f00u + threadIdx.x;
  for (int turn = 0; turn < turns; ++turn)
    _Pragma("unroll") for (int k = 0; k < 4; ++k) ptx::mma_bfloat(c[k], a, b);
  float sum = 0;
  for (int k = 0; k < 4; ++k) sum += c[k][0] + c[k][1] + c[k][2] + c[k][3];
  out[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<int>(sum);
}
