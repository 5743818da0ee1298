"""Greedy search, sampling and beam search on the device: steps until every row is done or the cache is full.

Beams stay where they are in the cache: a beam that goes on from another one looks at that one's entries (ancestry). Keys and
values of the source are kept once for all beams of a row.

Shapes in names: B rows, K beams, T source tokens, S places of the cache.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.decoding import logits as vocabularies
from mtl_jax.decoding.config import GenerationConfig, Numbers
from mtl_jax.decoding.logits import Vocabulary
from mtl_jax.decoding.state import State, first, grown
from mtl_jax.decoding.steps import beam_step, plain_step
from mtl_jax.models.encoder_decoder import Seq2Seq
from mtl_jax.models.kv_cache import KeyValue
from mtl_jax.models.seq2seq_decoder import Source


@functools.partial(jax.jit, static_argnames=("model", "config", "places"))
def begin(
    model: Seq2Seq,
    params: Any,
    vocabulary: Vocabulary,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    keys: jax.Array,
    real: jax.Array,
    numbers: Numbers,
    *,
    config: GenerationConfig,
    places: int,
) -> tuple[Source, State]:
    """Encodes the rows and searches until all are done, or the cache is full.

    Args:
        model: Encoder and decoder.
        params: {"trunk": ..., "head": ...}.
        vocabulary: From vocabulary.prepare().
        input_ids: i32[B, T].
        attention_mask: [B, T].
        keys: u32[B, 2].
        real: bool[B], false for rows that only fill the batch.
        numbers: The options' numbers.
        config: The options, from config.divided().
        places: S.

    Returns:
        What the decoder sees of the source, and the state.
    """
    variables = {"params": params}
    hidden = model.apply(variables, input_ids, attention_mask, method="encode").hidden  # type: ignore[union-attr]
    source: Any = model.apply(variables, hidden, attention_mask, method="source")
    state = first(model, config, places, real, keys)
    return source, _until(model, params, vocabulary, source, state, config, numbers)


@functools.partial(jax.jit, static_argnames=("model", "config", "places"))
def go_on(
    model: Seq2Seq,
    params: Any,
    vocabulary: Vocabulary,
    source: Source,
    state: State,
    numbers: Numbers,
    *,
    config: GenerationConfig,
    places: int,
) -> State:
    """Searches on with a longer cache; arguments and result as in begin()."""
    return _until(model, params, vocabulary, source, grown(state, config, places), config, numbers)


@functools.partial(jax.jit, static_argnames="length")
def widened(source: Source, length: int) -> Source:
    """The same source with padding up to so many tokens."""
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
    numbers: Numbers,
) -> State:
    """Step by step until all rows are done, the cache is full, or the sequences are as long as they may be."""
    K, places = state.ancestry.shape[1:]
    choose = beam_step if config.num_beams > 1 else plain_step
    scale = model.head.config.logit_scale  # type: ignore[union-attr]

    def body(state: State) -> State:
        place = state.length - 1
        last_BxK = jnp.take(state.tokens, place, axis=-1)
        # One beam sees all that there is.
        output: Any = model.apply(
            {"params": params},
            last_BxK,
            source,
            cache=state.cache,
            step=place,
            ancestry=state.ancestry if K > 1 else None,
            method="decode",
        )
        logits_BxKxW = vocabularies.logits(output.hidden, vocabulary, scale)
        return choose(state._replace(cache=output.cache), logits_BxKxW, config, numbers)

    def unfinished(state: State) -> jax.Array:
        return state.open.any() & (state.length < config.length) & (state.length <= places)

    return jax.lax.while_loop(unfinished, body, state)
