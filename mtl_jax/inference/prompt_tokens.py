"""Prompts of decoder-only models as token ids: those of a checkpoint, and those of a run's task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtl_jax.data import conversations, coverage
from mtl_jax.data.conversations import SpecialTokens
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.tokenize import RowError
from mtl_jax.tasks import CausalLM
from mtl_jax.training.restore import TrainedRun

NO_LIMIT = 10**9  # tokens; tokenizers without a limit report 10**30
Encode = Callable[[Sequence[str], int | None], list[np.ndarray]]


def of_checkpoint(tokenizer: Any, vocab_size: int, special: SpecialTokens, chat: bool, where: str) -> Encode:
    """The function TextModel.encode for prompts.

    Args:
        tokenizer: A transformers tokenizer.
        vocab_size: Rows of the model's token table.
        special: The tokens around its texts.
        chat: Whether a text is a user's message in the tokenizer's chat template.
        where: The checkpoint's name, for errors.

    Returns:
        (texts, most tokens or None) -> i32[length] token ids of each; a longer one loses its beginning, but no special token.
        Raises RowError for texts with a token that the model has no row for.
    """

    def encode(texts: Sequence[str], max_length: int | None = None) -> list[np.ndarray]:
        if not texts:
            return []
        if chat:
            texts = [conversations.rendered(tokenizer, conversations.of_text(text).prompt, where) for text in texts]
        encodings = conversations.encode(
            tokenizer,
            texts,
            [""] * len(texts),
            end=special.end,
            start=0 if chat else special.start,
            max_length=max_length or NO_LIMIT,
            target_length=2,
        )
        return within_table(list(encodings.tokens), tokenizer, vocab_size)

    return encode


def of_run(run: TrainedRun, task: CausalLM) -> Encode:
    """The function TextModel.encode for a causal LM: texts are what the task's source has in its text column.

    Args:
        run: The run.
        task: Its task.
    """
    source, length = run.source(task.name), run.experiment.batch.row_length

    def encode(texts: Sequence[str], max_length: int | None = None) -> list[np.ndarray]:
        rows = [Row({source.text: text}, f"text {number}") for number, text in enumerate(texts, start=1)]
        encodings = task.encode_rows(rows, source, run.trunk.tokenizer, min(max_length, length) if max_length else NO_LIMIT)
        return within_table(list(encodings.tokens), run.trunk.tokenizer, task.vocabulary)

    return encode


def within_table(arrays: list[np.ndarray], tokenizer: Any, vocab_size: int) -> list[np.ndarray]:
    """The token ids of texts, all of which a model has a row for.

    Args:
        arrays: i32[length] of each text.
        tokenizer: Their tokenizer.
        vocab_size: Rows of the model's token table.

    Raises:
        RowError: An id is beyond the table, for which jax would read NaN.
    """
    if refused := coverage.out_of_range(arrays, vocab_size):
        token = next(iter(refused.values()))
        raise RowError([*refused], coverage.missing_row_reason(tokenizer, token, vocab_size, "the model's token table"))
    return arrays
