"""Training rows that are made anew in every pass: texts change while a batch is filled, and are tokenised there.

The plan of the batches is made from the lengths of the rows as they are, with room for growth. A made row takes its place in
the batch if its tokens fit beside the others of its row, else the row stays as it is. So planning is as cheap as before, and
the worker process that fills a batch does all the work for it.

A row that is read as several texts, such as a pair to be compared or a question with its choices, is made once for all of its
examples, which are in consecutive places of the batch: all of them change, or none. A row that is read in several windows stays
as it is, because its windows are in different batches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.data import row_keys, units
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
    def _sizes(self) -> np.ndarray:
        """i64[rows]: how many examples a row has."""
        return np.bincount(self.row_of, minlength=len(self.rows))

    @functools.cached_property
    def _reader(self) -> Labels | None:
        """The task that reads a row as several texts, if there is one."""
        return units.reader(self.tasks)

    @functools.cached_property
    def _together(self) -> np.ndarray:
        """bool[N]: whether all examples of an example's row are beside it: not where a row is read in several windows."""
        return (self._sizes[self.row_of] == 1) | (self._reader is not None)

    @property
    def divided(self) -> int:
        """How many rows are read in several windows, and so are not made anew."""
        return len(np.unique(self.row_of[~self._together]))

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
            examples: i64[E], of different rows or passes.
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
                if not self._together[examples[index]]:
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
        group_E = self._groups(example_E, pass_E, row_E)
        first_G, size_G = np.unique(group_E, return_index=True, return_counts=True)[1:]
        rows, made = self.made(example_E[first_G], pass_E[first_G], seed)
        changed = np.flatnonzero(made[:, :-1].any(axis=1))
        new: dict[int, tuple[Examples, dict[str, Any], range]] = {}
        if len(changed):
            new = self._tokenised([rows[group] for group in changed], changed, size_G)
        fitting = self._fitting(arrays, example_E, first_G, row_E, new, room)
        for group in set(changed.tolist()) - fitting:
            made[group] = [0] * len(self.augmentations) + [1]
        place_E = np.arange(len(group_E)) - first_G[group_E]

        def chosen(old: Any, from_new: Any) -> list[Any]:
            values = []
            for example, group, place in zip(example_E.tolist(), group_E.tolist(), place_E.tolist(), strict=True):
                if group in fitting:
                    examples, labels, those = new[group]
                    values.append(from_new(examples, labels, those[place]))
                else:
                    values.append(old[example])
            return values

        labels: dict[str, Any] = {}
        for task in self.tasks:
            values = chosen(arrays.labels[task.name], lambda examples, labels, i, name=task.name: labels[name][i])
            ragged = task.label_level != "example"
            labels[task.name] = Ragged.of(values, task.dtype) if ragged else np.array(values, task.dtype)
        types = None
        if arrays.types is not None:
            types = Ragged.of(chosen(arrays.types, _types), np.int32)
        tokens = Ragged.of(chosen(arrays.tokens, lambda examples, _, i: examples.tokens[i]), np.int32)
        return Redrawn(tokens, types, labels, made[group_E])

    def _groups(self, example_E: np.ndarray, pass_E: np.ndarray, row_E: np.ndarray) -> np.ndarray:
        """i64[E], ascending from 0: the examples of a batch that are of one row, if it is read as several texts."""
        if self._reader is None:
            return np.arange(len(example_E))
        of_KxE = np.stack([row_E, pass_E, self.row_of[example_E]])
        begins = (np.diff(of_KxE, axis=1) != 0).any(axis=0) | (np.diff(example_E) != 1)
        return np.cumsum(np.concatenate([[0], begins]))

    def _tokenised(
        self, rows: Sequence[Row], places: np.ndarray, sizes: np.ndarray
    ) -> dict[int, tuple[Examples, dict[str, Any], range]]:
        """{place: (examples, labels, those of the row)} of the rows that have as many examples as before, with known tokens.

        Args:
            rows: The rows.
            places: The place of each.
            sizes: The number of examples that the row of a place has.
        """
        while True:
            try:
                examples, _ = make_examples(self.source, self.tasks, rows, self.tokenizer, self.max_length, lenient=True)
                break
            except UnreadableTexts as error:  # they stay as they were
                kept = [index for index in range(len(rows)) if index not in error.rows]
                rows, places = [rows[index] for index in kept], places[kept]
        labels = {task.name: labels_of(task, examples, self.tokenizer).labels for task in self.tasks}
        result = {}
        for group in examples.groups():
            row = int(examples.row_of[group[0]])
            place = int(places[row])
            tokens = [examples.tokens[i] for i in group]
            known = max(int(of_text.max(initial=0)) for of_text in tokens) < self.token_rows
            if len(group) == sizes[place] and known and self._has_texts(rows[row], tokens):
                result[place] = (examples, labels, group)
        return result

    def _has_texts(self, row: Row, tokens: Sequence[np.ndarray]) -> bool:
        """Whether every text of a row has tokens beside the special ones, or is empty in the row itself, too."""
        if any(task.words for task in self.tasks):
            return all(len(of_text) > 0 for of_text in tokens)
        texts: Sequence[Any] = [True] if self._reader is None else self._reader.texts_of(row, self.source)
        pair = bool(self.source.pair) if self._reader is None else isinstance(texts[0], tuple)
        special = self.tokenizer.num_special_tokens_to_add(pair=pair)
        # As in make_examples(): a row may lack the text.
        asked = [bool(text[0] if isinstance(text, tuple) else text) for text in texts]
        return all(len(of_text) > special or not needed for of_text, needed in zip(tokens, asked, strict=True))

    def _fitting(
        self, arrays: Any, example_E: np.ndarray, first_G: np.ndarray, row_E: np.ndarray, new: Any, room: Room
    ) -> set[int]:
        """The made groups whose rows have room for them: in each row those that grow least come first.

        Args:
            arrays: SourceArrays of the source.
            example_E: The examples.
            first_G: The place of the first example of each group.
            row_E: The row of the batch of each example.
            new: The made groups, as _tokenised() returns them.
            room: The places of a row.
        """
        targets = [task.name for task in self.tasks if task.label_level == "target"]
        kinds = [arrays.lengths, *(arrays.labels[name].lengths for name in targets)]
        lengths = np.add.reduceat([of_kind[example_E] for of_kind in kinds], first_G, axis=1).T.tolist()
        row_G = row_E[first_G].tolist()
        used: dict[int, list[int]] = {}
        for row, of_group in zip(row_G, lengths, strict=True):
            used[row] = [a + b for a, b in zip(used.get(row, [0] * len(kinds)), of_group, strict=True)]
        growth: dict[int, list[int]] = {}
        for group, (examples, labels, those) in new.items():
            texts = [examples.tokens, *(labels[name] for name in targets)]
            after = [sum(len(of_kind[i]) for i in those) for of_kind in texts]
            growth[group] = [a - b for a, b in zip(after, lengths[group], strict=True)]
        most = [room.row_length, *[room.target_length] * len(targets)]
        fitting: set[int] = set()
        for group in sorted(new, key=lambda group: (growth[group], group)):
            after = [a + b for a, b in zip(used[row_G[group]], growth[group], strict=True)]
            if all(a <= b for a, b in zip(after, most, strict=True)):
                fitting.add(group)
                used[row_G[group]] = after
        return fitting


def _types(examples: Examples, labels: Any, i: int) -> np.ndarray:
    return np.zeros(len(examples.tokens[i]), np.int32) if examples.types is None else examples.types[i]


def examples(redraw: Redraw, seed: int) -> list[MadeRow]:
    """Some rows as the first pass makes them, for the log."""
    firsts = np.unique(redraw.row_of, return_index=True)[1]  # the first example of each row
    chosen = firsts[np.unique(np.linspace(0, len(firsts) - 1, min(len(firsts), 20 * EXAMPLES)).astype(np.int64))]
    rows, made = redraw.made(chosen, np.zeros(len(chosen), np.int64), seed)
    shown = []
    for example, row, of_row in zip(chosen, rows, made, strict=True):
        by = [name for name, changed in zip(redraw.names, of_row, strict=False) if changed]
        if by:
            shown.append(MadeRow(row, redraw.rows[int(redraw.row_of[example])], " and ".join(by), 0))
    return shown[:EXAMPLES]
