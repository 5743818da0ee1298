"""The state of a search between two steps.

Shapes in names: B rows, K beams, S positions of the cache, L = S + 1 positions of a target.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.decoding.config import GenerationConfig
from mtl_jax.models.encoder_decoder import Seq2Seq
from mtl_jax.models.kv_cache import KeyValue

WORST = -1e9  # added to the score of a beam that does not count, as in transformers


class State(NamedTuple):
    """The state of a search.

    Attributes:
        length: i32[], tokens so far, the start token included.
        tokens: i32[B, K, L], tokens of the running beams.
        scores: f32[B, K], summed scores of the running beams, best first.
        ended: bool[B, K], whether a running beam has an end token; for greedy search and sampling.
        finished: i32[B, K, L], tokens of the finished sequences, best first; for beam search, and so are the next four.
        finished_scores: f32[B, K], their scores over their penalised lengths.
        lengths: i32[B, K], tokens after the start token; for greedy search and sampling, those of the running beams.
        is_finished: bool[B, K], whether there is a finished sequence.
        reached_end: bool[B, K], whether it has an end token; else the limit cut it. For all kinds of search.
        active: bool[B], rows whose search is not done.
        ancestry: i32[B, K, S], see models.encoder_decoder.Seq2Seq.decode.
        cache: Keys and values of the running beams.
        keys: u32[B, 2], key data for drawing, one key a row.
    """

    length: jax.Array
    tokens: jax.Array
    scores: jax.Array
    ended: jax.Array
    finished: jax.Array
    finished_scores: jax.Array
    lengths: jax.Array
    is_finished: jax.Array
    reached_end: jax.Array
    active: jax.Array
    ancestry: jax.Array
    cache: tuple[KeyValue, ...]
    keys: jax.Array


def beams(config: GenerationConfig) -> int:
    """K: the beams of beam search, or the sequences that are drawn for each row."""
    return config.num_beams if config.num_beams > 1 else config.num_return_sequences


def _padding(config: GenerationConfig) -> int:
    return config.beam_padding if config.num_beams > 1 else config.padding


def initial(model: Seq2Seq, config: GenerationConfig, positions: int, active_B: jax.Array, keys_Bx2: jax.Array) -> State:
    """The state before the first step. All beams of a row are equal then, so only one of them counts."""
    B, K = len(active_B), beams(config)
    tokens = jnp.full((B, K, positions + 1), _padding(config), jnp.int32).at[..., 0].set(config.start)
    return State(
        length=jnp.ones((), jnp.int32),
        tokens=tokens,
        scores=jnp.zeros((B, K)).at[:, 1:].set(WORST if config.num_beams > 1 else 0.0),
        ended=jnp.zeros((B, K), bool),
        finished=tokens,
        finished_scores=jnp.full((B, K), WORST),
        lengths=jnp.zeros((B, K), jnp.int32),
        is_finished=jnp.zeros((B, K), bool),
        reached_end=jnp.zeros((B, K), bool),
        active=active_B,
        ancestry=jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32)[:, None], (B, K, positions)),
        cache=model.init_cache(B, positions, K),
        keys=keys_Bx2,
    )


def enlarged(state: State, config: GenerationConfig, positions: int) -> State:
    """The state with a cache of so many positions."""
    K, more = state.ancestry.shape[1], positions - state.ancestry.shape[2]

    def widen(x_BxKxL: jax.Array) -> jax.Array:
        return jnp.pad(x_BxKxL, ((0, 0), (0, 0), (0, more)), constant_values=_padding(config))

    self_BxKxS = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32)[:, None], (*state.ancestry.shape[:2], more))
    return state._replace(
        tokens=widen(state.tokens),
        finished=widen(state.finished),
        ancestry=jnp.concatenate([state.ancestry, self_BxKxS], axis=-1),
        cache=jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more * K), (0, 0))), state.cache),
    )
