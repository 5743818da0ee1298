"""One task's layers on top of the shared trunk."""

from __future__ import annotations

import flax.linen as nn
import jax

from mtl_jax.models.dropout import Dropout
from mtl_jax.models.layers import Dense


class Head(nn.Module):
    """Linear layer, or one hidden ReLU layer before it.

    Attributes:
        outputs: O, numbers per example.
        hidden: Width of the hidden layer; 0 for none.
        dropout: Rate on the input vector.
    """

    outputs: int
    hidden: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, pooled_RxSxH: jax.Array, deterministic: bool = True) -> jax.Array:
        """Maps f32[R, S, H] to f32[R, S, O]; dropout needs an rng named "dropout" unless deterministic."""
        x = Dropout(self.dropout)(pooled_RxSxH, deterministic=deterministic)
        if self.hidden:
            x = nn.relu(Dense(self.hidden, name="hidden")(x))
        return Dense(self.outputs, name="output")(x)
