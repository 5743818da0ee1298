"""Prompts of decoder-only models: their padding, and generation options that count them.

Shapes in names: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtl_jax.core.errors import UserError, count
from mtl_jax.decoding import config as configs
from mtl_jax.decoding.config import GenerationConfig
from mtl_jax.pretrained.tensor_files import Location


def padded_left(ids_BxT: np.ndarray, mask_BxT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose last column is real: each is rotated, so that what follows its last real token stands in front.

    Args:
        ids_BxT: i32, the prompts.
        mask_BxT: 1 at real tokens.

    Raises:
        UserError: A row has no real token.

    >>> padded_left(np.array([[5, 6, 0], [0, 7, 8]]), np.array([[1, 1, 0], [0, 1, 1]]))[0].tolist()
    [[0, 5, 6], [0, 7, 8]]
    """
    real_BxT = mask_BxT.astype(bool)
    empty = np.flatnonzero(~real_BxT.any(axis=1))
    if len(empty):
        raise UserError(f"row {int(empty[0])} of input_ids has no real token; a prompt needs at least one")
    after_B = real_BxT[:, ::-1].argmax(axis=1)
    columns_BxT = (np.arange(ids_BxT.shape[1]) - after_B[:, None]) % ids_BxT.shape[1]
    return tuple(np.take_along_axis(array, columns_BxT, axis=1) for array in (ids_BxT, mask_BxT))  # type: ignore[return-value]


def resolve(raw: Mapping[str, Any], location: Location | None, tokens: int, call: Mapping[str, Any]) -> GenerationConfig:
    """config.resolve() for prompts of so many tokens, padding included: max_length and min_length count them.

    In the result the start token stands for the prompt.

    Args:
        raw: The parsed config.json.
        location: The checkpoint's directory; None: without generation_config.json.
        tokens: T.
        call: Options of the call.

    Raises:
        UserError: As config.resolve(), or max_length leaves no room after the prompt.
    """
    call = {**call, "decoder_start_token_id": 0}  # not read: each row begins with the last token of its prompt
    config = configs.resolve(raw, location, **call)
    changes: dict[str, Any] = {}
    if config.max_new_tokens is None:
        changes["max_new_tokens"] = config.max_length - tokens
        if changes["max_new_tokens"] < 1:
            raise UserError(
                f"max_length is {config.max_length}, and the prompts have {count(tokens, 'token')}, padding included: nothing "
                "can be generated; give max_new_tokens"
            )
    if config.min_new_tokens is None:
        changes["min_new_tokens"] = max(config.min_length - tokens, 0)
    if tokens > 1:  # transformers forces it as the very first token of a row
        changes["forced_bos_token_id"] = None
    return dataclasses.replace(config, **changes)
