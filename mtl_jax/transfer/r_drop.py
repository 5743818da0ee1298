"""R-Drop: two passes with different dropout are to say the same."""

from __future__ import annotations

import jax

from mtl_jax.transfer.divergence import NUMBER, divergence


def r_drop(first: jax.Array, second: jax.Array, kind: str = "softmax") -> jax.Array:
    """1/2 (KL(P1 || P2) + KL(P2 || P1)) of two passes' outputs f[..., O], f32[...].

    Liang et al., 2021, https://arxiv.org/abs/2106.14448; for numbers the squared difference, as there for STS-B.

    Args:
        first: Outputs of the first pass.
        second: Outputs of the second.
        kind: As in divergence().
    """
    if kind == NUMBER:
        return divergence(kind, first, second)
    return (divergence(kind, first, second) + divergence(kind, second, first)) / 2
