"""Builds and opens trunks, and checks a user's own before training: how it is called, and that it keeps examples apart.

Shapes in names: R rows, T tokens a row, H width of the vectors.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.files import shown
from mtl_jax.core.parts import origin_of
from mtl_jax.models.remat import has_layers
from mtl_jax.transfer.adapters import Adapted
from mtl_jax.trunks.base import Trunk, TrunkConfig

ARGUMENTS = ("attention_mask", "position_ids", "segment_ids", "deterministic")  # of a module's call, beside input_ids
CHECKED_TOKENS = 12  # of a row in which two examples are compared with themselves in other rows
NOISE = 0.1  # added to initial parameters: a layer that starts at 0 would hide what it passes on
TOLERANCE = {"float32": 1e-3, "float64": 1e-3}  # share of the largest number; lower precision rounds more
LOW_PRECISION = 5e-2


def build(config: TrunkConfig, texts: Sequence[str], dtype: Any, *, decodes: bool = False) -> Trunk:
    """Loads or creates the trunk.

    Args:
        config: The declaration.
        texts: Training texts, from which the vocabulary of a trunk from scratch is made.
        dtype: Compute dtype.
        decodes: Whether a checkpoint's decoder is loaded, if it has one.

    Raises:
        UserError: The checkpoint cannot be loaded, a size of a trunk from scratch is out of range, or a user's module cannot be
            called as a trunk.
    """
    config.check()
    return _declared(config, config.build(texts, dtype, decodes=decodes))


def reopen(config: TrunkConfig, folder: Path, dtype: Any) -> Trunk:
    """Opens a trunk that save() wrote; params is None, because the run's checkpoint has them.

    Args:
        config: The declaration.
        folder: The folder "trunk" of a workdir.
        dtype: Compute dtype.

    Raises:
        UserError: A file is damaged, or a user's module cannot be called as a trunk.
    """
    return _declared(config, config.reopen(folder, dtype))


def check_remat(trunk: Trunk, remat: str) -> None:
    """Checks that a trunk has layers that the backward pass can compute again.

    Args:
        trunk: The trunk, with or without adapters.
        remat: As Experiment.remat.

    Raises:
        UserError: It has none.
    """
    module = trunk.module.base if isinstance(trunk.module, Adapted) else trunk.module
    if remat != "none" and not has_layers(module):
        raise UserError(
            f"remat is {remat!r}, but the trunk {_name(trunk)} has no layers that say so: set is_layer = True in the class of "
            "the linen module of one layer, or leave remat at none"
        )


def _declared(config: TrunkConfig, trunk: Trunk) -> Trunk:
    trunk = trunk._replace(declared=config)
    if trunk.is_users:
        _check_call(trunk)
    return trunk


def _check_call(trunk: Trunk) -> None:
    """Checks that a module has the arguments, the parameters and the output of a trunk.

    Raises:
        UserError: It has not; names the class and its file.
    """
    name, module = _name(trunk), trunk.module
    if not isinstance(module, nn.Module):
        raise UserError(f"{name}: module() returned {type(module).__name__}; it must return a flax.linen.Module")
    call = f"{name}: the call of {type(module).__name__}"
    arguments = inspect.signature(type(module).__call__).parameters
    by_name = any(argument.kind == inspect.Parameter.VAR_KEYWORD for argument in arguments.values())
    missing = [argument for argument in ARGUMENTS if argument not in arguments and not by_name]
    if missing:
        raise UserError(f"{call} lacks {listed(missing)}; its arguments are input_ids, {listed(ARGUMENTS)}")
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [a.name for a in list(arguments.values())[2:] if a.default is inspect.Parameter.empty and a.kind in named]
    if required:
        raise UserError(f"{call} requires {listed(required)}; give every argument but input_ids a default")
    ids = jnp.zeros((2, 3), jnp.int32)
    output, variables = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), ids))
    shape = getattr(getattr(output, "hidden", None), "shape", None)
    if shape is None or len(shape) != 3 or shape[:2] != ids.shape:
        problem = f"returns {type(output).__name__} without hidden" if shape is None else f"returns hidden of shape {shape}"
        raise UserError(f"{call} {problem} for input_ids of shape {ids.shape}; hidden must be f[B, T, H]")
    others = [collection for collection in variables if collection != "params"]
    if others:
        raise UserError(f"{call} makes {listed(others)}; a trunk has only params, so use layers without other variables")


def check_packed(trunk: Trunk, row_length: int, owner: str = "") -> None:
    """Checks that a user's trunk keeps the examples of a packed row apart; our own do, as tests show.

    With random parameters, two short examples are read in several rows: in either order, beside another example, and alone
    beside padding. The vectors of an example must be the same in all of them.

    Args:
        trunk: The trunk, with or without adapters, which are left out.
        row_length: Tokens of a row.
        owner: Whose trunk it is, for the error; "" for that of the run.

    Raises:
        UserError: The vectors of an example change with the rest of its row.
    """
    size = min(CHECKED_TOKENS, row_length) // 3
    if not trunk.is_users or not size:
        return
    module: Any = trunk.module.base if isinstance(trunk.module, Adapted) else trunk.module
    if getattr(module, "dtype", None) is not None:
        module = module.clone(dtype=jnp.float32)
    first, second, other = _texts(len(trunk.tokenizer), size)
    rows = [[first, second], [other, second], [second, first], [second]]
    places = [{"first": 0, "second": 1}, {"second": 1}, {"second": 0, "first": 1}, {"second": 0}]
    ids_RxT, positions_RxT, segments_RxT = _packed(rows, 3 * size)
    key, noise_key = jax.random.split(jax.random.key(0))

    def vectors(key: jax.Array, noise_key: jax.Array) -> jax.Array:
        params = module.init(key, ids_RxT)
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(noise_key, len(leaves))
        noisy = [leaf + NOISE * jax.random.normal(k, leaf.shape, leaf.dtype) for leaf, k in zip(leaves, keys, strict=True)]
        mask_RxT = (segments_RxT > 0).astype(jnp.int32)
        named = {"position_ids": positions_RxT, "segment_ids": segments_RxT, "deterministic": True}
        return module.apply(jax.tree.unflatten(structure, noisy), ids_RxT, mask_RxT, **named).hidden

    with jax.default_matmul_precision("highest"):
        hidden_RxTxH = np.asarray(jax.jit(vectors)(key, noise_key))
    tolerance = TOLERANCE.get(str(hidden_RxTxH.dtype), LOW_PRECISION)
    for text in ("first", "second"):
        copies = [hidden_RxTxH[r, size * at[text] : size * (at[text] + 1)] for r, at in enumerate(places) if text in at]
        stacked = np.stack(copies).astype(np.float64)
        if np.ptp(stacked, axis=0).max() > tolerance * np.abs(stacked).max():
            whose = f"{owner}, {_name(trunk)}" if owner else f"the trunk {_name(trunk)}"
            raise UserError(
                f"{whose}: the vectors of an example change with the rest of its packed row: respect segment_ids, position_ids "
                "and attention_mask in the module, or set batch.packed to False (--batch.no-packed)"
            )


def _texts(vocab_size: int, size: int) -> np.ndarray:
    """i32[3, size]: three texts of random tokens, without the first two ids, which may be special."""
    return np.random.default_rng(0).integers(min(2, vocab_size - 1), vocab_size, (3, size)).astype(np.int32)


def _packed(rows: Sequence[Sequence[np.ndarray]], length: int) -> np.ndarray:
    """i32[3, R, length]: token ids, positions and segments of texts, one after another in each row."""
    packed = np.zeros((3, len(rows), length), np.int32)
    for row, texts in enumerate(rows):
        begin = 0
        for segment, ids in enumerate(texts, start=1):
            packed[:, row, begin : begin + len(ids)] = ids, np.arange(len(ids)), np.full(len(ids), segment)
            begin += len(ids)
    return packed


def _name(trunk: Trunk) -> str:
    origin = origin_of(type(trunk.declared))
    return f"{type(trunk.declared).__name__}{f' of {shown(origin.file)}' if origin else ''}"
