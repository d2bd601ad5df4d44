"""How an output `[width, queries]` in wgmma's registers becomes a tile `[queries, width]` in shared memory."""

import tilelang.language as T

from ...tiling import PANEL

# Threads 0 to 127 hold the output as wgmma m64nNk16 leaves it: a warp has 16 columns of every panel. With two blocks of
# 8 queries these are four 8 by 8 matrices, which stmatrix stores transposed, 16 bytes for each row of the tile;
# swizzled, these meet no bank twice.
TRANSPOSE = """
template <int QUERIES, int PANELS, typename Element>
__device__ __forceinline__ void flexmla_transpose(const float *output, Element *tile) {
  const int warp = threadIdx.x / 32, matrix = threadIdx.x % 32 / 8, row = threadIdx.x % 8;
  const int run = (2 * warp + matrix % 2) ^ row;
  const unsigned at = __cvta_generic_to_shared(tile) + 128 * (matrix / 2 * 8 + row) + 16 * run;
#pragma unroll
  for (int panel = 0; panel < PANELS; ++panel) {
#pragma unroll
    for (int query = 0; query < QUERIES; query += 16) {
      const float *held = output + panel * (QUERIES / 2) + query / 2;
      unsigned pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Element pair[2] = {Element(held[2 * i]), Element(held[2 * i + 1])};
        memcpy(&pairs[i], pair, sizeof(pair));
      }
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                   :: "r"(at + 128 * (panel * QUERIES + query)), "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]),
                      "r"(pairs[3]) : "memory");
    }
  }
}
"""


@T.macro
def transpose(spec, o, out_sh):
    """Puts the output of the consumer warpgroup of `few_heads` into `out_sh`, rounded to its dtype.

    The tile lies as TMA and wgmma want it: panels of 64 columns after each other, and in each row of a panel its eight
    runs of 16 bytes swizzled by the row.
    """
    for i, h in T.Parallel(spec.out, spec.queries):
        # a thread's first element: from there on lie all that it holds
        if i // PANEL == 0 and i % 16 < 8 and h < 8 and h % 2 == 0:
            T.call_extern(
                "handle", f"flexmla_transpose<{spec.queries}, {spec.out // PANEL}>", T.address_of(o[i, h]),
                T.address_of(out_sh[0, 0]),
            )  # fmt: skip
