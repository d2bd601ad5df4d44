"""What is done to a tile of scores between the two GEMMs: parts added up, multipliers, cap."""

from typing import Any, NamedTuple

import tilelang.language as T

# an element sent to the same place of a CTA's shared memory, whose barrier counts the bytes
SEND = """
template <typename Barrier>
__device__ __forceinline__ void flexmla_send(float value, float *place, Barrier &barrier, int rank) {
  unsigned there, counter;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"((unsigned)__cvta_generic_to_shared(place)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(counter) : "r"((unsigned)__cvta_generic_to_shared(&barrier)), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
               :: "r"(there), "r"(__float_as_uint(value)), "r"(counter) : "memory");
}
"""


class Exchange(NamedTuple):
    """Where the parts of a cluster's scores meet.

    Attributes:
        scores_sh: float32 `[2, parts, block_n, queries]`: of this tile and the next.
        arrived: two barriers, to each of which one thread arrives, and the bytes of all parts.
        part: which this CTA is.
        thread: of the consumers.
    """

    scores_sh: Any
    arrived: Any
    part: Any
    thread: Any


@T.macro
def add_parts(spec, exchange, s, step):
    """Adds up the scores of all parts, in their order, so that every CTA of the cluster has the same bits.

    A CTA sends scores of the next tile but one only after it has got those of the next one from all the others, who
    send them once they have read this tile's: two buffers are enough.
    """
    scores_sh = exchange.scores_sh
    arrived = exchange.arrived
    side = step % 2
    if exchange.thread == 0:
        T.mbarrier_arrive_expect_tx(arrived[side], 4 * spec.parts * spec.block_n * spec.queries)
    for rank in T.unroll(spec.parts):
        for i, h in T.Parallel(spec.block_n, spec.queries):
            T.call_extern(
                "handle", "flexmla_send", s[i, h], T.address_of(scores_sh[side, exchange.part, i, h]), arrived[side],
                rank,
            )  # fmt: skip
    T.mbarrier_wait_parity(arrived[side], (step // 2) & 1)
    for i, h in T.Parallel(spec.block_n, spec.queries):
        s[i, h] = scores_sh[side, 0, i, h]
    for r in T.unroll(1, spec.parts):
        for i, h in T.Parallel(spec.block_n, spec.queries):
            s[i, h] += scores_sh[side, r, i, h]


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
    """`tanh(inner_scale * s)`, to a few float32 ulps of 1."""
    for i, h in T.Parallel(spec.block_n, spec.queries):
        s[i, h] = 1.0 - 2.0 / (1.0 + T.exp2(s[i, h] * (inner_scale * 2.8853900817779268)))
