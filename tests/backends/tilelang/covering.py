"""Shapes of whole panels that cover head counts, widths and kinds of rotary keys; the fuzz has all the others."""

from __future__ import annotations

from flexmla import MLAShape

N_HEADS = (8, 9, 12, 15, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128)
DV = (64, 128, 192, 256, 320, 384, 448, 512)
D_PE = (8, 16, 32, 64)


def covering_shapes() -> list[MLAShape]:
    """Each head count, with a shared key, one key a head or something between in turn, over all widths."""
    shapes = [MLAShape(32, 1, 512, 16), MLAShape(32, 32, 512, 16), MLAShape(128, 1, 512, 64), MLAShape(12, 1, 512, 0)]
    for i, n_heads in enumerate(N_HEADS):
        divisors = [g for g in range(1, n_heads + 1) if n_heads % g == 0]
        groups = (1, divisors[len(divisors) // 2], n_heads)[i % 3]
        shapes.append(MLAShape(n_heads, groups, DV[3 * i % 8], D_PE[i % 4]))
    return sorted(set(shapes), key=lambda s: (s.n_heads, s.n_rope_heads, s.dv, s.d_pe))
