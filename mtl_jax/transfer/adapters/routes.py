"""Which task's parameters each row of a batch reads, where the tasks do not share all of the trunk.

The rows of a source pass the trunk once, up to the first layer with parameters of single tasks. From there on a row has as many
copies as a source has tasks at most, so tasks on sources of their own pay nothing.

Shapes in names: B rows of a batch, C copies of each, K tasks, N sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError
from mtl_jax.models.remat import is_layer


@dataclasses.dataclass(frozen=True)
class Routes:
    """The tasks of every copy of a row.

    Attributes:
        tasks: Their names, in order.
        table: [N][C], the number of the task of each copy of a source's rows.
    """

    tasks: tuple[str, ...]
    table: tuple[tuple[int, ...], ...]

    @property
    def copies(self) -> int:
        """C, the copies of a row that leave the trunk."""
        return len(self.table[0])

    def number(self, task: str) -> int:
        """The number of a task."""
        return self.tasks.index(task)

    @property
    def copy_of(self) -> tuple[tuple[str, int], ...]:
        """(task, which copy of its rows its head reads), in order."""
        return tuple(
            (name, next(of_source.index(number) for of_source in self.table if number in of_source))
            for number, name in enumerate(self.tasks)
        )

    def of(self, source_B: jax.Array, one_source: bool = False) -> Rows:
        """The tasks of the rows of a batch; a row without a source, -1, gets those of source 0, or of the one source."""
        source_B = jnp.full_like(source_B, source_B.max()) if one_source else source_B
        return Rows(self, source_B, jnp.asarray(self.table)[jnp.maximum(source_B, 0)].reshape(-1), one_source)


class Rows(NamedTuple):
    """The rows of a batch and their copies.

    Attributes:
        routes: The routes.
        source_B: i32[B], the source of each row.
        task_BC: i32[B C], the task of each copy; the copies of a row follow each other.
        one_source: Whether all rows are known to be of one source, before the program runs.
        by_row: {whole layer: which leaves of the (args, kwargs) of its call have the rows as first axis}.
    """

    routes: Routes
    source_B: jax.Array
    task_BC: jax.Array
    one_source: bool = False
    by_row: Mapping[str, tuple[bool, ...]] = MappingProxyType({})


def make(tasks: Sequence[tuple[str, str]], sources: Sequence[str], readers: Mapping[str, Sequence[str]]) -> Routes:
    """The routes of a run.

    >>> make([("movies", "sst"), ("names", "news"), ("words", "news")], ["sst", "news"], {}).table
    ((0, 0), (1, 2))

    Args:
        tasks: (name, source) of each task.
        sources: The names of the sources, in the order of their numbers.
        readers: {source without tasks: the tasks that regularisers apply to its rows}.

    Raises:
        UserError: Two tasks are applied to a source without tasks, and would read the same copy of its rows.
    """
    numbers = {name: number for number, (name, _) in enumerate(tasks)}
    by_source: dict[str, dict[int, int]] = {source: {} for source in sources}
    copy = {}
    for name, source in tasks:
        copy[name] = len(by_source[source])
        by_source[source][copy[name]] = numbers[name]
    for source, names in readers.items():
        for name in names:
            if by_source[source].setdefault(copy[name], numbers[name]) != numbers[name]:
                other = tasks[by_source[source][copy[name]]][0]
                raise UserError(
                    f"sharing: tasks {other} and {name} are both applied to the rows of source {source!r}, which pass the "
                    "trunk once: declare the same file as a second source"
                )
    copies = max(copy.values()) + 1
    firsts = [next(iter(of_source.values()), 0) for of_source in by_source.values()]
    table = tuple(
        tuple(of_source.get(number, first) for number in range(copies))
        for of_source, first in zip(by_source.values(), firsts, strict=True)
    )
    return Routes(tuple(name for name, _ in tasks), table)


def repeated(tree: Any, by_row: Sequence[bool], rows: int, copies: int) -> Any:
    """A tree with `copies` of every row, one after another.

    Args:
        tree: The arguments of a layer.
        by_row: Which of its leaves have the rows as first axis.
        rows: B; leaves with other numbers of rows have their copies already.
        copies: C.
    """
    leaves, structure = jax.tree.flatten(tree)
    changed = [
        jnp.repeat(leaf, copies, axis=0) if is_by_row and leaf.shape[0] == rows else leaf
        for leaf, is_by_row in zip(leaves, by_row, strict=True)
    ]
    return jax.tree.unflatten(structure, changed)


def by_row(tree: Any, rows: int) -> tuple[bool, ...]:
    """Which leaves of a tree have so many rows as first axis; flags of a call are leaves, too."""
    return tuple(getattr(leaf, "ndim", 0) > 0 and leaf.shape[0] == rows for leaf in jax.tree.leaves(tree))


def arguments_by_row(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, tuple[bool, ...]]:
    """Rows.by_row of a call of a trunk: which arguments of its layers change with the number of rows.

    The number of rows alone does not tell: a mask of tokens [T, T], or vectors of distances that all rows share, may have as
    many by chance. No array is computed.

    Args:
        module: The trunk, without adapters.
        args: The arguments of its call, by row.
        kwargs: Those by name.
    """
    flags: dict[str, tuple[bool, ...]] = {}
    rows = args[0].shape[0]  # a program for any number of rows has no len()
    more = rows + 1

    def record(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__" and is_layer(context.module):
            flags["/".join(context.module.path)] = by_row((args, kwargs), more)
        return next_call(*args, **kwargs)

    leaves, structure = jax.tree.flatten((args, dict(kwargs)))
    numbers = [number for number, is_array in enumerate(by_row(leaves, rows)) if is_array]
    longer = [jax.ShapeDtypeStruct((more, *leaves[number].shape[1:]), leaves[number].dtype) for number in numbers]

    def init(arrays: list[jax.Array]) -> Any:
        given = dict(zip(numbers, arrays, strict=True))
        changed = [given.get(number, leaf) for number, leaf in enumerate(leaves)]
        longer_args, longer_kwargs = jax.tree.unflatten(structure, changed)
        key = jax.random.key(0)
        return module.init({"params": key, "dropout": key}, *longer_args, **longer_kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(init, longer)
    return flags
