"""Teachers: models that others learn from, opened and compared with the run that they teach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mtl_jax import trunks
from mtl_jax.data.batches import Batch
from mtl_jax.errors import UserError
from mtl_jax.tasks import Task
from mtl_jax.training import runs
from mtl_jax.training.step import apply_heads, encode_tokens, needs
from mtl_jax.transfer.regularisers import FIELD, Distillation
from mtl_jax.trunks import Pretrained, Trunk


class Teacher(NamedTuple):
    """A model that is imitated.

    Attributes:
        module: Its trunk.
        tasks: Its tasks; none where it is a bare checkpoint.
        params: {"trunk": ..., "heads": {task: ...}} on the first device.
        width: H, the size of its vectors.
    """

    module: Any
    tasks: tuple[Task, ...]
    params: Any
    width: int

    def outputs(self, params: Any, batch: Batch, names: Sequence[str]) -> dict[str, jax.Array]:
        """{task: outputs} of some tasks, without dropout.

        Args:
            params: Its parameters, on the run's devices.
            batch: The rows.
            names: The tasks.
        """
        chosen = tuple(task for task in self.tasks if task.name in names)
        encoded = encode_tokens(self.module, needs(chosen))(params["trunk"], batch, None, None)
        return apply_heads(chosen, params["heads"], encoded, batch, None)

    def hidden(self, params: Any, batch: Batch) -> jax.Array:
        """f[R, T, H], the last vectors of all tokens, without dropout; arguments as for outputs()."""
        vectors = encode_tokens(self.module, ("tokens",))(params["trunk"], batch, None, None).tokens
        assert vectors is not None
        return vectors


def open_teacher(kind: Distillation, trunk: Trunk, row_length: int, texts: Sequence[str], dtype: Any) -> Teacher:
    """Opens a teacher and finds out whether it reads what the student reads.

    Args:
        kind: Names it.
        trunk: The student's trunk.
        row_length: Tokens of a row.
        texts: Some texts, on which the tokenizers are compared.
        dtype: Compute dtype.

    Raises:
        UserError: It is no finished run, or, where its vectors are wanted, no checkpoint either; it has another vocabulary or
            takes shorter rows.
    """
    folder, where = Path(kind.teacher), f"{FIELD}: teacher of {kind.name}"
    tasks: tuple[Task, ...] = ()
    if kind.of == "hidden" and not runs.is_workdir(folder):
        other = trunks.build(Pretrained(kind.teacher), (), dtype)
        params, longest = {"trunk": other.params}, other.max_length
    else:
        run = runs.open_finished(folder, where)
        other, params, tasks = run.trunk, run.params, run.tasks
        longest = getattr(other.module.config, "max_length", None) or trunks.UNBOUNDED
    check_vocabulary(trunk.tokenizer, other.tokenizer, texts, f"{where}, {kind.teacher},")
    if longest < row_length:
        raise UserError(f"{where}, {kind.teacher}, takes rows of {longest} tokens, but batch.row_length is {row_length}")
    return Teacher(other.module, tasks, params, trunks.width(other, params["trunk"]))


def check_vocabulary(own: Any, other: Any, texts: Sequence[str], where: str) -> None:
    """Raises UserError unless two tokenizers give the same tokens.

    Args:
        own: A transformers tokenizer.
        other: Another one.
        texts: Some texts to compare them on.
        where: Whose the other one is.
    """
    if own.get_vocab() != other.get_vocab():
        raise UserError(
            f"{where} has another vocabulary than this run's trunk ({len(other.get_vocab())} and {len(own.get_vocab())} "
            "tokens): take one of the same"
        )
    for text in texts:
        if own(text, verbose=False)["input_ids"] != other(text, verbose=False)["input_ids"]:
            raise UserError(f"{where} divides {text[:60]!r} into other tokens than this run's trunk: take one of the same")


def tasks_to_imitate(kind: Distillation, teacher: Teacher, tasks: Mapping[str, Task]) -> list[str]:
    """The tasks whose outputs a teacher is imitated in.

    Args:
        kind: The distillation, of logits.
        teacher: Its teacher.
        tasks: The student's tasks.

    Raises:
        UserError: There are none, or the teacher has another label set.
    """
    where = f"{FIELD}: teacher of {kind.name}, {kind.teacher},"
    theirs = {task.name: task for task in teacher.tasks}
    names = list(kind.tasks) or [name for name, task in tasks.items() if name in theirs and task.compared_as]
    if not names:
        raise UserError(f"{where} has no task of this run (it has {', '.join(theirs) or 'none'}; here are {', '.join(tasks)})")
    for name in names:
        own, other = tasks[name], theirs.get(name)
        if not own.compared_as:
            raise UserError(f"{FIELD}: {kind.name}: outputs of a {type(own).__name__} such as {name!r} cannot be imitated")
        if other is None:
            raise UserError(f"{where} has no task {name!r}; it has {', '.join(theirs)}")
        if type(own) is not type(other):
            raise UserError(f"{where} has {name!r} as {type(other).__name__}, and here it is {type(own).__name__}")
        if own.labels != other.labels:
            raise UserError(
                f"{where} has another label set for {name!r}: {', '.join(other.labels)} there, {', '.join(own.labels)} here"
            )
        if getattr(own, "scale", None) != getattr(other, "scale", None):
            raise UserError(f"{where} has another scale for {name!r}: {other.scale} there, {own.scale} here")  # type: ignore[attr-defined]
    return names
