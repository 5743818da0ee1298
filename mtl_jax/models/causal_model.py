"""Decoder-only models: a trunk like models.llama.Llama with a head over tokens or rows, and what decoding asks of it.

Shapes in names: B rows, T tokens, H hidden size, V vocabulary, K beams, S positions of the steps in a cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.dropout import Dropout
from mtl_jax.models.kv_cache import KeyValue
from mtl_jax.models.layers import Dense
from mtl_jax.models.llama import CausalOutput, Past
from mtl_jax.models.trunk_output import token_table


class Prompt(NamedTuple):
    """What decoding knows of the prompts; the same at every step.

    Attributes:
        real: [B, T], 1 at the tokens that the steps may see: all but the last, which the first step reads again.
        start: i32[B], the position of the last token.
    """

    real: jax.Array
    start: jax.Array

    def padded(self, length: int) -> Prompt:
        """Itself: the cache holds the prompt's keys, so its length is that of the cache."""
        return self


class LMHead(nn.Module):
    """Logits f32[B, T, V] of the next token.

    Attributes:
        vocab_size: V.
        tied: Whether the token table is the output matrix; else the head has its own.
        cap: c of a soft cap c tanh(x / c) on the logits; None: none.
        dtype: Compute dtype.
        initializer_range: Standard deviation of a freshly initialised matrix.
    """

    vocab_size: int
    tied: bool
    cap: float | None = None
    dtype: Any = jnp.float32
    initializer_range: float = 0.02

    def setup(self) -> None:
        if not self.tied:
            init = nn.initializers.normal(self.initializer_range)
            self.lm_head = Dense(self.vocab_size, use_bias=False, dtype=self.dtype, kernel_init=init)

    def __call__(self, hidden_BxTxH: jax.Array, table_VxH: jax.Array) -> jax.Array:
        """The logits; `table_VxH` is the trunk's token table."""
        if self.tied:
            table_VxH = table_VxH.astype(self.dtype)
            logits = jnp.einsum("bth,vh->btv", hidden_BxTxH, table_VxH, preferred_element_type=jnp.float32)
        else:
            logits = self.lm_head(hidden_BxTxH).astype(jnp.float32)
        return logits if self.cap is None else self.cap * jnp.tanh(logits / self.cap)

    def projection(self, table_VxH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Kernel f[H, V] and bias f32[V] of the logits before the cap."""
        kernel_HxV = table_VxH.T if self.tied else self.lm_head.variables["params"]["kernel"]
        return kernel_HxV.astype(self.dtype), jnp.zeros(self.vocab_size)


class ScoreHead(nn.Module):
    """A linear layer: labels of rows from their last tokens, or of every token.

    Attributes:
        num_labels: Outputs.
        per_token: Whether every token gets logits f[B, T, num_labels], with a bias; else the row f[B, num_labels], without.
        dtype: Compute dtype.
        dropout: Rate in front.
        initializer_range: Standard deviation of a freshly initialised kernel.
    """

    num_labels: int
    per_token: bool
    dtype: Any = jnp.float32
    dropout: float = 0.0
    initializer_range: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        x = Dropout(self.dropout)(x, deterministic=deterministic)
        init = nn.initializers.normal(self.initializer_range)
        return Dense(self.num_labels, use_bias=self.per_token, dtype=self.dtype, kernel_init=init, name="score")(x)


class CausalModel(nn.Module):
    """A decoder-only trunk with a head; parameters {"trunk"[, "head"]}.

    Attributes:
        trunk: A module with the call signature of models.llama.Llama.
        head: An LM head, one over labels, or None.
        pad_token_id: The head over rows reads each row's last token that is not padding. None: its last real token.
    """

    trunk: nn.Module
    head: LMHead | ScoreHead | None = None
    pad_token_id: int | None = None

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> CausalOutput:
        """The trunk's hidden states f[B, T, H] and the head's logits; arguments as for models.llama.Llama."""
        hidden_BxTxH = self.trunk(
            input_ids, attention_mask, position_ids=position_ids, segment_ids=segment_ids, deterministic=deterministic
        ).hidden
        if self.head is None:
            return CausalOutput(hidden_BxTxH)
        if isinstance(self.head, LMHead):
            return CausalOutput(hidden_BxTxH, logits=self.head(hidden_BxTxH, self._table()))
        if self.head.per_token:
            return CausalOutput(hidden_BxTxH, logits=self.head(hidden_BxTxH, deterministic))
        last_B = self._last(input_ids, attention_mask)
        pooled_BxH = jnp.take_along_axis(hidden_BxTxH, last_B[:, None, None], axis=1)[:, 0]
        return CausalOutput(hidden_BxTxH, pooled_BxH, self.head(pooled_BxH, deterministic))

    def _last(self, ids_BxT: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
        """i32[B], the column that a head over rows reads, as in transformers."""
        if self.pad_token_id is not None:
            real_BxT = ids_BxT != self.pad_token_id
        else:
            real_BxT = jnp.ones_like(ids_BxT) if attention_mask is None else attention_mask
        return jnp.argmax(real_BxT * jnp.arange(ids_BxT.shape[1]), axis=1)

    @property
    def logit_scale(self) -> float:
        """Factor on the trunk's output before the logits."""
        return 1.0

    @property
    def logit_cap(self) -> float | None:
        """Soft cap on the logits."""
        return self._lm_head().cap

    @property
    def vocabulary(self) -> int:
        """V, the tokens that can be generated."""
        return self._lm_head().vocab_size

    @property
    def most_generated(self) -> int | None:
        """The most tokens of a generated text; None: any number, as rotations have no table."""
        return None

    def prefill(
        self, input_ids: jax.Array, attention_mask: jax.Array, positions: int, beams: int
    ) -> tuple[Prompt, tuple[KeyValue, ...], jax.Array]:
        """Reads the prompts, whose last column is real.

        Args:
            input_ids: i32[B, T].
            attention_mask: [B, T], 1 at real tokens.
            positions: S.
            beams: K.

        Returns:
            The prompt; the cache, with room for S steps of K beams after the prompt; and the tokens i32[B] that the first step
            reads.
        """
        position_ids = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
        output = self.trunk(input_ids, attention_mask, position_ids=position_ids, keep_cache=True)
        added = output.cache[0].key.shape[2] - input_ids.shape[1]  # vectors that an adapter puts in front of the tokens
        real = jnp.pad(attention_mask.at[:, -1].set(0), ((0, 0), (added, 0)), constant_values=1)
        room = ((0, 0), (0, 0), (0, positions * beams), (0, 0))
        cache = jax.tree.map(lambda x_BxMxTxD: jnp.pad(x_BxMxTxD, room), output.cache)
        return Prompt(real, position_ids[:, -1] + added), cache, input_ids[:, -1]

    def decode(
        self, tokens: jax.Array, source: Prompt, *, cache: Any, step: jax.Array | int, ancestry: jax.Array | None = None
    ) -> CausalOutput:
        """The vectors after the next tokens i32[B, K] of K beams, and the cache with them; ancestry as in Past."""
        past = Past(cache, source.real, source.start, step, ancestry)
        output: CausalOutput = self.trunk(tokens, past=past)
        return output

    def projection(self) -> tuple[jax.Array, jax.Array]:
        """Kernel f[H, V] and bias f32[V] of the logits before the cap."""
        return self._lm_head().projection(self._table())

    def _table(self) -> jax.Array:
        return token_table(self.trunk.variables["params"])

    def _lm_head(self) -> LMHead:
        if not isinstance(self.head, LMHead):
            raise ValueError("this model has no head that predicts tokens")
        return self.head
