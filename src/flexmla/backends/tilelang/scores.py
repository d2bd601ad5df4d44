"""What is done to a tile of scores between the two GEMMs: parts added up, multipliers, cap."""

from typing import Any, NamedTuple

import tilelang.language as T

THREADS = 128  # that hold a tile of scores
LOG2E = 1.4426950408889634
# By what power of two a probability may outgrow 1 before its query's maximum moves, and all that was added up shrinks.
# Any number near the largest score would do in the maximum's place: it enters output, sums and LSE alike.
SLACK = 8.0

# A barrier that also tells whether any of its threads says so.
ANY = """
__device__ __forceinline__ int flexmla_any(int barrier, int threads, int mine) {
  int any;
  asm volatile("{.reg .pred p, q; setp.ne.s32 p, %3, 0; bar.red.or.pred q, %1, %2, p; selp.s32 %0, 1, 0, q;}"
               : "=r"(any) : "r"(barrier), "r"(threads), "r"(mine) : "memory");
  return any;
}
"""

# A thread sends its registers of a tile of scores to the same thread of every other CTA of the cluster, four at once,
# and adds up what it gets. st.async tells the receiver's barrier how many bytes came: TileLang has no such store.
ADD_PARTS = """
template <int PARTS, int REGISTERS, int THREADS, typename Barrier>
__device__ __forceinline__ void flexmla_add_parts(float *scores, float *buffer, Barrier &barrier, int part, int phase) {
  float4 *got = reinterpret_cast<float4 *>(buffer);
  constexpr int QUADS = REGISTERS / 4;
  const int thread = threadIdx.x;
  const unsigned base = __cvta_generic_to_shared(got), counter = __cvta_generic_to_shared(&barrier);
  if (thread == 0) barrier.arrive_and_expect_tx((PARTS - 1) * THREADS * REGISTERS * 4);
#pragma unroll
  for (int step = 1; step < PARTS; ++step) {
    const int rank = (part + step) % PARTS;
    // a part's place at its receiver: how many ranks it is behind
    unsigned there, theirs;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(base), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(counter), "r"(rank));
#pragma unroll
    for (int i = 0; i < QUADS; ++i)
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                   :: "r"(there + 16 * (((step - 1) * QUADS + i) * THREADS + thread)), "f"(scores[4 * i]),
                      "f"(scores[4 * i + 1]), "f"(scores[4 * i + 2]), "f"(scores[4 * i + 3]), "r"(theirs) : "memory");
  }
  barrier.wait(phase);
  asm volatile("" ::: "memory");  // nothing of what came is read before
#pragma unroll
  for (int i = 0; i < QUADS; ++i) {
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int rank = 0; rank < PARTS; ++rank) {  // in the same order in every CTA: the same bits
      const int step = (part - rank + PARTS) % PARTS;
      float4 other = make_float4(scores[4 * i], scores[4 * i + 1], scores[4 * i + 2], scores[4 * i + 3]);
      if (step != 0) other = got[((step - 1) * QUADS + i) * THREADS + thread];
      sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
    }
    scores[4 * i] = sum.x, scores[4 * i + 1] = sum.y, scores[4 * i + 2] = sum.z, scores[4 * i + 3] = sum.w;
  }
}
"""


class Exchange(NamedTuple):
    """Where the parts of a cluster's scores meet.

    Attributes:
        scores_sh: float32 `[2, parts - 1, block_n * queries]`: of this tile and the next.
        arrived: two barriers, to each of which one thread arrives, and the bytes of the other parts.
        part: which this CTA is.
    """

    scores_sh: Any
    arrived: Any
    part: Any


@T.macro
def add_parts(spec, exchange, s, step):
    """Adds up the scores of all parts; every CTA of the cluster has the same bits.

    A CTA sends scores of the next tile but one only after it has got those of the next one from all the others, who
    send them once they have read this tile's: two buffers are enough.
    """
    side = step % 2
    registers = spec.block_n * spec.queries // THREADS
    for i, h in T.Parallel(spec.block_n, spec.queries):
        # a thread's first score, as wgmma shares them out: from there on lie all that it holds
        if i % 16 < 8 and h < 8 and h % 2 == 0:
            T.call_extern(
                "handle", f"flexmla_add_parts<{spec.parts}, {registers}, {THREADS}>", T.address_of(s[i, h]),
                T.address_of(exchange.scores_sh[side, 0, 0]), exchange.arrived[side], exchange.part, (step // 2) & 1,
            )  # fmt: skip


@T.macro
def scale_scores(spec, scale_sh, s, stage, group):
    """Multiplies each score by its token's and head's `score_scale`."""
    per = spec.n_heads // spec.scale_heads
    head0 = group * spec.block_h
    for i, h in T.Parallel(spec.block_n, spec.queries):
        # of padding queries, whose scores nobody reads, any that is there
        key = T.min((head0 + h // spec.q_len) // per - head0 // per, spec.scales - 1)
        s[i, h] *= scale_sh[stage, i, key]


@T.macro
def cap_scores(spec, s, inner_scale):
    """`tanh(inner_scale * s)`; by its series where 1 is so much larger that little would be left of it."""
    for i, h in T.Parallel(spec.block_n, spec.queries):
        x = s[i, h] * inner_scale
        y = x * x
        near = x * (1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
        s[i, h] = T.if_then_else(y < 0.0625, near, 1.0 - 2.0 / (1.0 + T.exp2(x * 2.8853900817779268)))
