// Runs a CUDA kernel whose warps share nothing on a CPU: 32 threads a warp, shuffles through a barrier.
// KERNEL is a file with the kernel as TileLang wrote it, and `run`, which calls it through `for_each_warp`.
#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
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

// What every lane passes, for `read` to look at.
template <class V, class Read> static auto exchange(V value, Read read) {
  static_assert(sizeof(V) == 4);
  std::memcpy(&warp->values[threadIdx.x % 32], &value, 4);
  warp->barrier.arrive_and_wait();
  auto result = read(warp->values);
  warp->barrier.arrive_and_wait();
  return result;
}
template <class V> static V shuffle(V value, int from) {
  return exchange(value, [&](const uint32_t *values) {
    V result;
    std::memcpy(&result, &values[from % 32], 4);
    return result;
  });
}
template <class V> static V __shfl_xor_sync(uint, V value, int mask, int) {
  return shuffle(value, (threadIdx.x % 32) ^ mask);
}
template <class V> static V __shfl_sync(uint, V value, int lane, int) { return shuffle(value, lane); }
template <class V> static V __shfl_up_sync(uint, V value, int by, int) {
  int lane = threadIdx.x % 32;
  return shuffle(value, lane < by ? lane : lane - by);
}
static uint __ballot_sync(uint, bool vote) {
  return exchange(int(vote), [](const uint32_t *votes) {
    uint bits = 0;
    for (int lane = 0; lane < 32; ++lane)
      bits |= votes[lane] << lane;
    return bits;
  });
}
static int __popc(uint bits) { return std::popcount(bits); }
static int __reduce_add_sync(uint, int value) {
  return exchange(value, [](const uint32_t *values) { return int(std::accumulate(values, values + 32, 0u)); });
}

template <class Call> static void for_each_warp(int width, int height, int warps, Call call) {
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x)
      for (int w = 0; w < warps; ++w) {
        Warp shared;
        std::vector<std::thread> lanes;
        for (int lane = 0; lane < 32; ++lane)
          lanes.emplace_back([&, lane] {
            threadIdx = {w * 32 + lane, 0, 0};
            blockIdx = {x, y, 0};
            warp = &shared;
            call();
          });
        for (auto &lane : lanes)
          lane.join();
      }
}

#include KERNEL
