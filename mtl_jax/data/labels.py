"""The part of a task that reading and batching use: the level, shape and dtype of its labels, and how they are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from mtl_jax.core import row_texts
from mtl_jax.core.errors import UserError
from mtl_jax.core.parts import origin_of
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import Source

if TYPE_CHECKING:
    from mtl_jax.models.trunk_output import TrunkFacts

# Levels of labels that are arrays with an entry for each token.
TOKEN_LEVELS = ("word", "token")


class Window(NamedTuple):
    """A row, or one of the pieces that a long row is read in.

    Attributes:
        number: Its number among the row's windows, from 0.
        tokens: i32[len], special tokens included.
        types: i32[len], token types; None where all are 0.
        words: i32[len], for texts read as words: the word's index at its first sub-word, else -1.
        offsets: i32[len, 2], where a task needs them: the token's characters in the row's last text; (-1, -1) elsewhere.
    """

    number: int
    tokens: np.ndarray
    types: np.ndarray | None
    words: np.ndarray | None
    offsets: np.ndarray | None


class UnreadableTexts(UserError):
    """Texts that the tokenizer cannot encode.

    Attributes:
        rows: The indices of their rows, ascending; there may be more such rows.
    """

    def __init__(self, rows: list[int], message: str):
        super().__init__(message)
        self.rows = rows


def label_problem(task: Labels, error: Exception) -> str:
    """Why a task refuses a label. Where texts of rows are left out, that of a script's task is too: it may quote one."""
    quotes = row_texts.are_hidden() and origin_of(type(task)) is not None
    return row_texts.why(error) if quotes else str(error)


class Labels(Protocol):
    """The part of tasks.base.Task that this package uses; Task explains the names."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def shown_labels(self) -> tuple[str, ...]: ...
    @property
    def conflict_advice(self) -> str: ...
    @property
    def label_level(self) -> str: ...
    @property
    def label_shape(self) -> tuple[int, ...]: ...
    @property
    def missing(self) -> float: ...
    @property
    def dtype(self) -> type[np.generic]: ...
    @property
    def words(self) -> bool: ...
    @property
    def windows(self) -> bool: ...
    @property
    def stride(self) -> int: ...
    @property
    def needs_offsets(self) -> bool: ...
    @property
    def corrupts(self) -> bool: ...
    @property
    def makes_tokens(self) -> bool: ...
    @property
    def target_length(self) -> int: ...
    @property
    def leading(self) -> int: ...
    @property
    def languages(self) -> tuple[str, str]: ...
    @property
    def text_columns(self) -> tuple[str, ...]: ...
    @property
    def input_columns(self) -> tuple[str, ...]: ...
    @property
    def unit_size(self) -> int: ...
    @property
    def several_texts(self) -> bool: ...
    @property
    def whole_batch(self) -> bool: ...

    def on(self, trunk: TrunkFacts) -> Any: ...
    def raw_label(self, row: Row) -> Any: ...
    def filled(self, rows: Iterable[Row], tokenizer: Any) -> Any: ...
    def fitted(self, train: Any) -> Any: ...
    def remarks(self, parts: Sequence[Any]) -> list[str]: ...
    def parse(self, row: Row) -> Any: ...
    def texts_of(self, row: Row, source: Source) -> Sequence[str | tuple[str, str]]: ...
    def encode_rows(
        self, rows: Sequence[Row], source: Source, tokenizer: Any, max_length: int, cache: Path | None = None
    ) -> Any: ...
    def unit_key(self, row: Row) -> str: ...
    def window_label(self, label: Any, window: Window) -> np.ndarray: ...
    def corrupt(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]: ...
