"""What reading and batching must know of a task: where its labels are and what shape they have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.data.formats.rows import Row


class Window(NamedTuple):
    """A row, or one of the pieces that a long row is read in.

    Attributes:
        number: Its place among the row's windows, from 0.
        tokens: i32[len], special tokens included.
        types: i32[len], token types; None where all are 0.
        words: i32[len], for texts given as words: the word's index at its first sub-word, else -1.
        offsets: i32[len, 2], where a task asks for them: the token's characters in the row's last text; (-1, -1) elsewhere.
    """

    number: int
    tokens: np.ndarray
    types: np.ndarray | None
    words: np.ndarray | None
    offsets: np.ndarray | None


class Refused(UserError):
    """Texts of which the tokenizer makes nothing.

    Attributes:
        rows: Their places among the rows, ascending; there may be more of them.
    """

    def __init__(self, rows: list[int], message: str):
        super().__init__(message)
        self.rows = rows


class Labels(Protocol):
    """The part of a task that the data floor uses; tasks.base.Task says what the names mean."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def several(self) -> str: ...
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
    def target_length(self) -> int: ...
    @property
    def leading(self) -> int: ...
    @property
    def text_columns(self) -> tuple[str, ...]: ...

    def written(self, row: Row) -> Any: ...
    def filled(self, rows: Iterable[Row], tokenizer: Any) -> Any: ...
    def fitted(self, train: Any) -> Any: ...
    def remarks(self, parts: Sequence[Any]) -> list[str]: ...
    def parse(self, row: Row) -> Any: ...
    def place(self, label: Any, window: Window) -> np.ndarray: ...
    def corrupt(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]: ...
