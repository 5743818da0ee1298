"""Training rows that are made anew in every pass: texts change while a batch is filled, and are tokenised there.

The plan of the batches is made from the lengths of the rows as they are, with room for growth. A made row takes its place in
the batch if its tokens fit beside the others of its row, else the row stays as it is. So planning is as cheap as before, and
the worker process that fills a batch does all the work for it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.data import row_keys
from mtl_jax.data.augmentations import generator, names, problem, rows_of
from mtl_jax.data.examples import Examples, labels_of, make_examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Labels, UnreadableTexts
from mtl_jax.data.made_rows import EXAMPLES, MadeRow
from mtl_jax.data.ragged import Ragged
from mtl_jax.data.source import Augmentation, MakeRows, Source


class Room(NamedTuple):
    """The places of a packed row.

    Attributes:
        row_length: T, for tokens.
        target_length: U, for tokens of target texts.
    """

    row_length: int
    target_length: int


class Redrawn(NamedTuple):
    """The E examples of a batch that are of one source, after its augmentations.

    Attributes:
        tokens: E arrays i32[len].
        types: E arrays i32[len]; None where all are 0.
        labels: {task: [E, *label_shape], or E arrays}, as in SourceArrays.
        made: i32[E, A + 1]: 1 for each augmentation that changed the example; the last column is 1 where one should have and
            the row stayed as it was.
    """

    tokens: Ragged
    types: Ragged | None
    labels: dict[str, Any]
    made: np.ndarray


@dataclasses.dataclass(frozen=True)
class Redraw:
    """The augmentations of a source that draw in every pass, with all that they need; it travels to worker processes.

    Attributes:
        source: The source.
        tasks: Its tasks, label sets filled in.
        augmentations: Those with added = 0, in order.
        rows: Its training rows.
        row_of: i32[N], the row of each example.
        tokenizer: The run's.
        token_rows: Rows of the trunk's token table; a made text with a token beyond them is not used.
        max_length: The longest example in tokens.
        held_out: Digests of the texts of dev and test, which are never made.
    """

    source: Source
    tasks: tuple[Labels, ...]
    augmentations: tuple[Augmentation, ...]
    rows: Sequence[Row]
    row_of: np.ndarray
    tokenizer: Any
    token_rows: int
    max_length: int
    held_out: frozenset[bytes]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # makers are made again

    @functools.cached_property
    def _makers(self) -> list[MakeRows]:
        about = rows_of(self.source, self.tasks, self.rows)
        return [augmentation.maker(about) for augmentation in self.augmentations]

    @functools.cached_property
    def _single(self) -> np.ndarray:
        """bool[N]: whether an example is all of its row, not one of several windows."""
        return np.bincount(self.row_of, minlength=len(self.rows))[self.row_of] == 1

    @property
    def names(self) -> list[str]:
        """The names of the augmentations."""
        return names(self.augmentations)

    def planned(self, lengths: np.ndarray, row_length: int) -> np.ndarray:
        """i64[N], the tokens that the plan counts for examples of these lengths."""
        growth = sum(augmentation.share * augmentation.growth for augmentation in self.augmentations)
        return np.minimum(np.ceil(lengths * (1 + growth)).astype(np.int64), np.maximum(row_length, lengths))

    def made(self, examples: np.ndarray, passes: np.ndarray, seed: int) -> tuple[list[Row], np.ndarray]:
        """The rows of examples after the augmentations, and made i32[E, A + 1].

        Args:
            examples: i64[E].
            passes: i64[E], the pass in which each is drawn.
            seed: Seed of the data order.
        """
        originals = [self.rows[int(self.row_of[example])] for example in examples]
        keys = [row_keys.digest(row_keys.key(self.source, row)) for row in originals]
        rows = list(originals)
        made = np.zeros((len(rows), len(self.augmentations) + 1), np.int32)
        for place, (augmentation, make_rows) in enumerate(zip(self.augmentations, self._makers, strict=True)):
            chosen: list[int] = []
            generators: list[np.random.Generator] = []
            for index, (key, number) in enumerate(zip(keys, passes.tolist(), strict=True)):
                if not self._single[examples[index]]:
                    continue
                rng = generator(augmentation, self.source.name, place, key, [seed, number])
                if rng.random() < augmentation.share:
                    chosen.append(index)
                    generators.append(rng)
            results = make_rows([rows[index] for index in chosen], generators) if chosen else []
            for index, result in zip(chosen, results, strict=True):
                if isinstance(result, str) or problem(self.source, result, self.held_out):
                    made[index, -1] = 1
                else:
                    where = f"{originals[index].where} ({self.names[place]})"
                    rows[index], made[index, place] = result._replace(where=where), 1
        return rows, made

    def __call__(self, arrays: Any, ticket_E: np.ndarray, row_E: np.ndarray, room: Room, seed: int) -> Redrawn:
        """The examples of a batch after the augmentations.

        Args:
            arrays: SourceArrays of the source.
            ticket_E: Their tickets, as fill() explains them.
            row_E: The row of the batch that each is packed in; ascending.
            room: The places of a row.
            seed: Seed of the data order.
        """
        pass_E, example_E = np.divmod(ticket_E, len(arrays.tokens))
        rows, made = self.made(example_E, pass_E, seed)
        changed = np.flatnonzero(made[:, :-1].any(axis=1))
        new: dict[int, tuple[Examples, dict[str, Any], int]] = {}
        if len(changed):
            new = self._tokenised([rows[index] for index in changed], changed)
        fitting = self._fitting(arrays, example_E, row_E, new, room)
        for index in set(changed.tolist()) - fitting:
            made[index] = [0] * len(self.augmentations) + [1]

        def chosen(old: Any, from_new: Any) -> list[Any]:
            return [from_new(*new[e]) if e in fitting else old[int(example)] for e, example in enumerate(example_E)]

        labels: dict[str, Any] = {}
        for task in self.tasks:
            values = chosen(arrays.labels[task.name], lambda examples, labels, i, name=task.name: labels[name][i])
            ragged = task.label_level != "example"
            labels[task.name] = Ragged.of(values, task.dtype) if ragged else np.array(values, task.dtype)
        types = None
        if arrays.types is not None:
            types = Ragged.of(chosen(arrays.types, _types), np.int32)
        return Redrawn(
            Ragged.of(chosen(arrays.tokens, lambda examples, _, i: examples.tokens[i]), np.int32), types, labels, made
        )

    def _tokenised(self, rows: Sequence[Row], places: np.ndarray) -> dict[int, tuple[Examples, dict[str, Any], int]]:
        """{place: (examples, labels, the example in them)} of those rows that are one example with known tokens."""
        while True:
            try:
                examples, _ = make_examples(self.source, self.tasks, rows, self.tokenizer, self.max_length, lenient=True)
                break
            except UnreadableTexts as error:  # they stay as they were
                kept = [index for index in range(len(rows)) if index not in error.rows]
                rows, places = [rows[index] for index in kept], places[kept]
        labels = {task.name: labels_of(task, examples, self.tokenizer).labels for task in self.tasks}
        as_words = any(task.words for task in self.tasks)
        special = 0 if as_words else self.tokenizer.num_special_tokens_to_add(pair=bool(self.source.pair))
        result = {}
        for group in examples.groups():
            tokens = examples.tokens[group[0]]
            if len(group) == 1 and len(tokens) > special and int(tokens.max()) < self.token_rows:
                result[int(places[examples.row_of[group[0]]])] = (examples, labels, group[0])
        return result

    def _fitting(self, arrays: Any, example_E: np.ndarray, row_E: np.ndarray, new: Any, room: Room) -> set[int]:
        """The made examples whose rows have room for them: in each row those that grow least come first."""
        targets = [task.name for task in self.tasks if task.label_level == "target"]

        def growth(e: int) -> tuple[int, ...]:
            examples, labels, i = new[e]
            target_growth = [len(labels[name][i]) - len(arrays.labels[name][int(example_E[e])]) for name in targets]
            return len(examples.tokens[i]) - len(arrays.tokens[int(example_E[e])]), *target_growth

        lengths = np.stack([arrays.lengths, *(arrays.labels[name].lengths for name in targets)])[:, example_E]
        used: dict[int, list[int]] = {}
        for e, row in enumerate(row_E.tolist()):
            used[row] = [a + b for a, b in zip(used.get(row, [0] * len(lengths)), lengths[:, e].tolist(), strict=True)]
        most = [room.row_length, *[room.target_length] * len(targets)]
        fitting: set[int] = set()
        for e in sorted(new, key=lambda e: (growth(e), e)):
            after = [a + b for a, b in zip(used[int(row_E[e])], growth(e), strict=True)]
            if all(a <= b for a, b in zip(after, most, strict=True)):
                fitting.add(e)
                used[int(row_E[e])] = after
        return fitting


def _types(examples: Examples, labels: Any, i: int) -> np.ndarray:
    return np.zeros(len(examples.tokens[i]), np.int32) if examples.types is None else examples.types[i]


def examples(redraw: Redraw, seed: int) -> list[MadeRow]:
    """Some rows as the first pass makes them, for the log."""
    total = len(redraw.row_of)
    chosen = np.unique(np.linspace(0, total - 1, min(total, 20 * EXAMPLES)).astype(np.int64))
    rows, made = redraw.made(chosen, np.zeros(len(chosen), np.int64), seed)
    shown = []
    for example, row, of_row in zip(chosen, rows, made, strict=True):
        by = [name for name, changed in zip(redraw.names, of_row, strict=False) if changed]
        if by:
            shown.append(MadeRow(row, redraw.rows[int(redraw.row_of[example])], " and ".join(by), 0))
    return shown[:EXAMPLES]
