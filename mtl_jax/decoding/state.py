"""What a search knows between two steps.

Shapes in names: B rows, K beams, S places of the cache, L = S + 1 places of a target.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.decoding.config import GenerationConfig
from mtl_jax.models.encoder_decoder import Seq2Seq
from mtl_jax.models.kv_cache import KeyValue

WORST = -1e9  # the score of a beam that is not there yet, as in transformers: added, not put in its place


class State(NamedTuple):
    """A search under way.

    Attributes:
        length: i32[], tokens so far, the start token included.
        tokens: i32[B, K, L], of the running beams.
        scores: f32[B, K], their summed scores, best first.
        ended: bool[B, K]; greedy search and sampling: the beam has its end token.
        found: i32[B, K, L], finished sequences of beam search, best first.
        found_scores: f32[B, K], over their penalised lengths.
        found_lengths: i32[B, K], tokens after the start token.
        full: bool[B, K], whether there is such a sequence.
        by_end: bool[B, K], whether it has its end token; else it is cut.
        open: bool[B], rows that are not done.
        ancestry: i32[B, K, S], see models.encoder_decoder.Seq2Seq.decode.
        cache: Keys and values of the beams.
        keys: u32[B, 2], key data for each row's draws.
    """

    length: jax.Array
    tokens: jax.Array
    scores: jax.Array
    ended: jax.Array
    found: jax.Array
    found_scores: jax.Array
    found_lengths: jax.Array
    full: jax.Array
    by_end: jax.Array
    open: jax.Array
    ancestry: jax.Array
    cache: tuple[KeyValue, ...]
    keys: jax.Array


def beams(config: GenerationConfig) -> int:
    """K: beams of beam search, or the sequences that are drawn for a row."""
    return config.num_beams if config.num_beams > 1 else config.num_return_sequences


def _padding(config: GenerationConfig) -> int:
    return config.beam_padding if config.num_beams > 1 else config.padding


def first(model: Seq2Seq, config: GenerationConfig, places: int, open_B: jax.Array, keys_Bx2: jax.Array) -> State:
    """The state before the first step; all beams of a row are the same then, so that only one of them counts."""
    B, K = len(open_B), beams(config)
    tokens = jnp.full((B, K, places + 1), _padding(config), jnp.int32).at[..., 0].set(config.start)
    return State(
        length=jnp.ones((), jnp.int32),
        tokens=tokens,
        scores=jnp.zeros((B, K)).at[:, 1:].set(WORST if config.num_beams > 1 else 0.0),
        ended=jnp.zeros((B, K), bool),
        found=tokens,
        found_scores=jnp.full((B, K), WORST),
        found_lengths=jnp.zeros((B, K), jnp.int32),
        full=jnp.zeros((B, K), bool),
        by_end=jnp.zeros((B, K), bool),
        open=open_B,
        ancestry=jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32)[:, None], (B, K, places)),
        cache=model.init_cache(B, places, K),
        keys=keys_Bx2,
    )


def grown(state: State, config: GenerationConfig, places: int) -> State:
    """The same with room for so many tokens in the cache."""
    K, more = state.ancestry.shape[1], places - state.ancestry.shape[2]

    def widen(x_BxKxL: jax.Array) -> jax.Array:
        return jnp.pad(x_BxKxL, ((0, 0), (0, 0), (0, more)), constant_values=_padding(config))

    own_BxKxS = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32)[:, None], (*state.ancestry.shape[:2], more))
    return state._replace(
        tokens=widen(state.tokens),
        found=widen(state.found),
        ancestry=jnp.concatenate([state.ancestry, own_BxKxS], axis=-1),
        cache=jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more * K), (0, 0))), state.cache),
    )
