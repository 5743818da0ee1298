"""Greedy search, sampling and beam search on the device: steps until every row is done or the cache is full.

Beams are not moved in the cache: a beam that continues another one reads that beam's entries (ancestry). All beams of a row
share the keys and values of the source.

Shapes in names: B rows, K beams, T source tokens, S positions of the cache.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.decoding.config import GenerationConfig, TracedOptions
from mtl_jax.decoding.logits import Vocabulary, project
from mtl_jax.decoding.state import State, enlarged, initial
from mtl_jax.decoding.steps import beam_step, plain_step
from mtl_jax.models.encoder_decoder import Seq2Seq
from mtl_jax.models.kv_cache import KeyValue
from mtl_jax.models.seq2seq_decoder import Source


@functools.partial(jax.jit, static_argnames=("model", "config", "positions"))
def begin(
    model: Seq2Seq,
    params: Any,
    vocabulary: Vocabulary,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    keys: jax.Array,
    real: jax.Array,
    traced: TracedOptions,
    *,
    config: GenerationConfig,
    positions: int,
) -> tuple[Source, State]:
    """Encodes the rows and searches until all are done, or the cache is full.

    Args:
        model: Encoder and decoder.
        params: {"trunk": ..., "head": ...}.
        vocabulary: From logits.prepare().
        input_ids: i32[B, T].
        attention_mask: [B, T].
        keys: u32[B, 2], key data for drawing.
        real: bool[B], False for rows that only fill the batch.
        traced: The traced options, from config.split_options().
        config: The static options, from config.split_options().
        positions: S.

    Returns:
        The source as the decoder reads it, and the state.
    """
    variables = {"params": params}
    hidden = model.apply(variables, input_ids, attention_mask, method="encode").hidden  # type: ignore[union-attr]
    source: Any = model.apply(variables, hidden, attention_mask, method="source")
    state = initial(model, config, positions, real, keys)
    return source, _until(model, params, vocabulary, source, state, config, traced)


@functools.partial(jax.jit, static_argnames=("model", "config", "positions"))
def resume(
    model: Seq2Seq,
    params: Any,
    vocabulary: Vocabulary,
    source: Source,
    state: State,
    traced: TracedOptions,
    *,
    config: GenerationConfig,
    positions: int,
) -> State:
    """Continues a search with a longer cache; arguments and result as in begin()."""
    return _until(model, params, vocabulary, source, enlarged(state, config, positions), config, traced)


@functools.partial(jax.jit, static_argnames="length")
def pad_source(source: Source, length: int) -> Source:
    """The source, padded to so many tokens."""
    more = length - source.real.shape[1]

    def widen(x: KeyValue) -> KeyValue:
        return jax.tree.map(lambda x_BxNxTxD: jnp.pad(x_BxNxTxD, ((0, 0), (0, 0), (0, more), (0, 0))), x)

    return Source(tuple(map(widen, source.layers)), jnp.pad(source.real, ((0, 0), (0, more))), None)


def _until(
    model: Seq2Seq,
    params: Any,
    vocabulary: Vocabulary,
    source: Source,
    state: State,
    config: GenerationConfig,
    traced: TracedOptions,
) -> State:
    """Takes steps until all rows are done, the cache is full, or the sequences have the greatest length."""
    K, positions = state.ancestry.shape[1:]
    choose = beam_step if config.num_beams > 1 else plain_step
    scale = model.head.config.logit_scale  # type: ignore[union-attr]

    def body(state: State) -> State:
        position = state.length - 1
        last_BxK = jnp.take(state.tokens, position, axis=-1)
        # A single beam reads all entries, so it needs no ancestry.
        output: Any = model.apply(
            {"params": params},
            last_BxK,
            source,
            cache=state.cache,
            step=position,
            ancestry=state.ancestry if K > 1 else None,
            method="decode",
        )
        logits_BxKxW = project(output.hidden, vocabulary, scale)
        return choose(state._replace(cache=output.cache), logits_BxKxW, config, traced)

    def unfinished(state: State) -> jax.Array:
        return state.active.any() & (state.length < config.length) & (state.length <= positions)

    return jax.lax.while_loop(unfinished, body, state)
