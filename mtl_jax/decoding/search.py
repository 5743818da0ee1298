"""Greedy search, sampling and beam search on the device: steps until every row is done or the cache is full.

Beams are not moved in the cache: a beam that continues another one reads that beam's entries (ancestry). All beams of a row
share the keys and values of the source or prompt.

Shapes in names: B rows, K beams, T source tokens, S positions of the cache.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.decoding import processors
from mtl_jax.decoding.config import GenerationConfig, TracedOptions
from mtl_jax.decoding.logits import Generator, Vocabulary, project
from mtl_jax.decoding.state import State, beams, enlarged, initial
from mtl_jax.decoding.steps import beam_step, plain_step


@functools.partial(jax.jit, static_argnames=("model", "config", "positions"))
def begin(
    model: Generator,
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
) -> tuple[Any, State]:
    """Reads the rows and searches until all are done, or the cache is full.

    Args:
        model: The model.
        params: {"trunk": ..., "head": ...}.
        vocabulary: From logits.prepare().
        input_ids: i32[B, T]; of decoder-only models the last column is real.
        attention_mask: [B, T].
        keys: u32[B, 2], key data for drawing.
        real: bool[B], False for rows that only fill the batch.
        traced: The traced options, from config.split_options().
        config: The static options, from config.split_options().
        positions: S.

    Returns:
        The source as the steps read it, and the state.
    """
    read: Any = model.apply(
        {"params": params}, input_ids, attention_mask, positions=positions, beams=beams(config), method="prefill"
    )
    source, cache, start_B = read
    prompt = None
    if start_B is not None and processors.reads_tokens(config):
        begun_BxT = jnp.cumsum(attention_mask, axis=1) > 0  # as in transformers, padding in front is not penalised
        prompt = jnp.where(begun_BxT, input_ids, -1)[:, :-1]
    state = initial(config, positions, real, keys, cache, start_B, prompt)
    return source, _until(model, params, vocabulary, source, state, config, traced)


@functools.partial(jax.jit, static_argnames=("model", "config", "positions"))
def resume(
    model: Generator,
    params: Any,
    vocabulary: Vocabulary,
    source: Any,
    state: State,
    traced: TracedOptions,
    *,
    config: GenerationConfig,
    positions: int,
) -> State:
    """Continues a search with a longer cache; arguments and result as in begin()."""
    return _until(model, params, vocabulary, source, enlarged(state, config, positions), config, traced)


@functools.partial(jax.jit, static_argnames="length")
def pad_source(source: Any, length: int) -> Any:
    """The source, padded to so many tokens."""
    return source.padded(length)


def _until(
    model: Generator,
    params: Any,
    vocabulary: Vocabulary,
    source: Any,
    state: State,
    config: GenerationConfig,
    traced: TracedOptions,
) -> State:
    """Takes steps until all rows are done, the cache is full, or the sequences have the greatest length."""
    K, positions = state.ancestry.shape[1:]
    choose = beam_step if config.num_beams > 1 else plain_step

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
        logits_BxKxW = project(output.hidden, vocabulary, model.logit_scale, model.logit_cap)
        return choose(state._replace(cache=output.cache), logits_BxKxW, config, traced)

    def unfinished(state: State) -> jax.Array:
        return state.active.any() & (state.length < config.length) & (state.length <= positions)

    return jax.lax.while_loop(unfinished, body, state)
