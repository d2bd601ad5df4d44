// Runs a CUDA kernel whose warps share nothing on a CPU: 32 threads a warp, shuffles through a barrier.
// KERNEL is a file with the kernel as TileLang wrote it.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>
using std::max;
using std::min;

#define __global__
#define __launch_bounds__(...)
#define CUDART_INF_F std::numeric_limits<float>::infinity()
using uint = unsigned int;

struct Index {
  int x, y, z;
};
struct float4 {
  float x, y, z, w;
};
struct Warp {
  std::barrier<> barrier{32};
  uint32_t values[32];
};
static thread_local Index threadIdx, blockIdx;
static thread_local Warp *warp;

static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static void cudaGridDependencySynchronize() {}
static void cudaTriggerProgrammaticLaunchCompletion() {}

template <class V> static V shuffle(V value, int from) {
  static_assert(sizeof(V) == 4);
  std::memcpy(&warp->values[threadIdx.x % 32], &value, 4);
  warp->barrier.arrive_and_wait();
  std::memcpy(&value, &warp->values[from % 32], 4);
  warp->barrier.arrive_and_wait();
  return value;
}
template <class V> static V __shfl_xor_sync(uint, V value, int mask, int) {
  return shuffle(value, (threadIdx.x % 32) ^ mask);
}
template <class V> static V __shfl_sync(uint, V value, int lane, int) { return shuffle(value, lane); }

#include KERNEL

extern "C" void run(int blocks, int rows, int warps, float *lse, float *out, const float *part, const float *part_lse,
                    const int *seq_lens, const int *starts, int capacity, int has_starts, int log_parts, int log_ways,
                    int workers) {
  for (int row = 0; row < rows; ++row)
    for (int block = 0; block < blocks; ++block)
      for (int w = 0; w < warps; ++w) {
        Warp shared;
        std::vector<std::thread> lanes;
        for (int lane = 0; lane < 32; ++lane)
          lanes.emplace_back([&, lane] {
            threadIdx = {w * 32 + lane, 0, 0};
            blockIdx = {block, row, 0};
            warp = &shared;
            decode_kernel(lse, out, part, part_lse, seq_lens, starts, rows, capacity, has_starts, log_parts, log_ways, workers);
          });
        for (auto &lane : lanes)
          lane.join();
      }
}
