"""Teachers of distillation: models that a run imitates, opened and checked against the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import pretrained, trunks
from mtl_jax.core.errors import UserError, count, listed
from mtl_jax.data.batches import Batch
from mtl_jax.data.coverage import Tables
from mtl_jax.tasks import Tagging, Task
from mtl_jax.training import restore
from mtl_jax.training.forward import NO_SAVINGS, Savings, apply_heads, encode_tokens, needed_fields
from mtl_jax.transfer.regularisers import FIELD, Distillation
from mtl_jax.trunks import Pretrained, Trunk


class Teacher(NamedTuple):
    """A model that is imitated.

    Attributes:
        module: Its trunk; of a tagger's checkpoint the model with its head.
        tasks: Its tasks; none where only its vectors are imitated.
        params: {"trunk": ..., "heads": {task: ...}} on the first device; of a tagger's checkpoint the parameters of module.
        width: H, the size of its vectors.
        tables: The rows of its embedding tables.
        tagger: Whether module itself returns the logits of its only task.
        savings: How it saves memory.
    """

    module: Any
    tasks: tuple[Task, ...]
    params: Any
    width: int
    tables: Tables
    tagger: bool = False
    savings: Savings = NO_SAVINGS

    def outputs(self, params: Any, batch: Batch, names: Sequence[str]) -> dict[str, jax.Array]:
        """{task: outputs} of some tasks, without dropout.

        Args:
            params: Its parameters, on the run's devices.
            batch: The rows.
            names: The tasks.
        """
        if self.tagger:
            output = self.module.apply(
                {"params": self.savings.gathered(params)},
                batch.tokens,
                (batch.segments > 0).astype(jnp.int32),
                token_type_ids=batch.types,
                position_ids=batch.positions,
                segment_ids=batch.segments,
            )
            return {names[0]: output.logits}
        chosen = tuple(task for task in self.tasks if task.name in names)
        encoded = encode_tokens(self.module, needed_fields(chosen), self.savings)(params["trunk"], batch, None, None)
        return apply_heads(chosen, params["heads"], encoded, batch, None, self.savings)

    def hidden(self, params: Any, batch: Batch) -> jax.Array:
        """f[R, T, H], the trunk's vectors of all tokens, without dropout; arguments as for outputs()."""
        vectors = encode_tokens(self.module, ("tokens",), self.savings)(params["trunk"], batch, None, None).tokens
        assert vectors is not None
        return vectors


def open_teacher(
    regulariser: Distillation,
    trunk: Trunk,
    tasks: Mapping[str, Task],
    row_length: int,
    texts: Sequence[str],
    dtype: Any,
    *,
    packed: bool = True,
) -> Teacher:
    """Opens a teacher and checks that it can read the student's rows.

    Args:
        regulariser: Names it.
        trunk: The student's trunk.
        tasks: The student's tasks.
        row_length: Tokens of a row.
        texts: Some texts, on which the tokenizers are compared.
        dtype: Compute dtype.
        packed: Whether the rows are packed.

    Raises:
        UserError: It is neither a finished run nor a checkpoint that can be imitated; it has another vocabulary, takes
            shorter rows only, or does not keep the examples of packed rows apart.
    """
    folder, where = Path(regulariser.teacher), f"{FIELD}: teacher of {regulariser.name}"
    owner = f"the teacher of {regulariser.name}"
    if not restore.is_workdir(folder) and regulariser.of == "hidden":
        bare = trunks.build(Pretrained(regulariser.teacher), (), dtype)
        width = trunks.width(bare)
        teacher = Teacher(bare.module, (), {"trunk": bare.params}, width, trunks.tables(bare, owner))
        tokenizer, longest = bare.tokenizer, bare.max_length
    elif not restore.is_workdir(folder) and (folder / "config.json").exists():
        teacher, tokenizer = _tagger(regulariser, tasks, where, owner, dtype)
        longest = getattr(teacher.module.trunk.config, "max_length", None) or trunks.UNBOUNDED
    else:
        run = restore.open_finished(folder, where)
        width = trunks.width(run.trunk)
        teacher = Teacher(run.trunk.module, run.tasks, run.params, width, trunks.tables(run.trunk, owner))
        tokenizer, longest = run.trunk.tokenizer, run.trunk.max_length
        if packed:
            trunks.check_packed(run.trunk, row_length, owner)
    check_vocabulary(trunk.tokenizer, tokenizer, texts, f"{where}, {regulariser.teacher},")
    if longest < row_length:
        raise UserError(
            f"{where}, {regulariser.teacher}, takes rows of {count(longest, 'token')}, but batch.row_length is {row_length}"
        )
    return teacher


def _tagger(regulariser: Distillation, tasks: Mapping[str, Task], where: str, owner: str, dtype: Any) -> tuple[Teacher, Any]:
    """A token classifier's checkpoint as the teacher of a tagging task. (Other heads cannot read packed rows.)"""
    checkpoint = pretrained.load(regulariser.teacher, dtype=dtype)
    if (
        checkpoint.head != "token_classification"
        or len(regulariser.tasks) != 1
        or not isinstance(tasks[regulariser.tasks[0]], Tagging)
    ):
        raise UserError(
            f"{where}: outputs of a checkpoint, {regulariser.teacher}, can be imitated only where it is a token classifier and "
            "tasks names one tagging task; else give the workdir of a finished run, or imitate its vectors (of hidden)"
        )
    task = tasks[regulariser.tasks[0]]
    if checkpoint.labels != task.shown_labels:  # a model that convert wrote has the labels' names
        task = dataclasses.replace(task, labels=checkpoint.labels, label_names={})  # type: ignore[call-arg]
    tables = trunks.tables_of(checkpoint.model.trunk.config, owner)
    return Teacher(checkpoint.model, (task,), checkpoint.params, 0, tables, tagger=True), checkpoint.tokenizer


def check_vocabulary(tokenizer: Any, other: Any, texts: Sequence[str], where: str) -> None:
    """Raises UserError unless two tokenizers give the same tokens.

    Args:
        tokenizer: This run's, of transformers.
        other: The other model's.
        texts: Some texts to compare them on.
        where: The other model, for errors.
    """
    if tokenizer.get_vocab() != other.get_vocab():
        raise UserError(
            f"{where} has another vocabulary than this run's trunk ({len(other.get_vocab())} and "
            f"{count(len(tokenizer.get_vocab()), 'token')}): choose one with the same tokenizer"
        )
    for text in texts:
        if tokenizer(text, verbose=False)["input_ids"] != other(text, verbose=False)["input_ids"]:
            raise UserError(
                f"{where} divides {text[:60]!r} into other tokens than this run's trunk: choose one with the same tokenizer"
            )


def tasks_to_imitate(regulariser: Distillation, teacher: Teacher, tasks: Mapping[str, Task]) -> list[str]:
    """The tasks in which the student imitates the teacher's outputs.

    Args:
        regulariser: The distillation, of logits.
        teacher: Its teacher.
        tasks: The student's tasks.

    Raises:
        UserError: There is none, or the teacher has another label set or scale.
    """
    where = f"{FIELD}: teacher of {regulariser.name}, {regulariser.teacher},"
    taught = {task.name: task for task in teacher.tasks}
    names = list(regulariser.tasks) or [name for name, task in tasks.items() if name in taught and task.compared_as]
    if not names and (both := [name for name in tasks if name in taught]):
        raise UserError(
            f"{FIELD}: {regulariser.name}: outputs of a {type(tasks[both[0]]).__name__} such as {both[0]!r} cannot be imitated"
        )
    if not names:
        raise UserError(f"{where} has no task of this run (it has {listed(taught)}; this run has {listed(tasks)})")
    for name in names:
        task, teacher_task = tasks[name], taught.get(name)
        if not task.compared_as:
            raise UserError(
                f"{FIELD}: {regulariser.name}: outputs of a {type(task).__name__} such as {name!r} cannot be imitated"
            )
        if teacher_task is None:
            raise UserError(f"{where} has no task {name!r}; it has {listed(taught)}")
        if type(task) is not type(teacher_task):
            raise UserError(f"{where} has {name!r} as {type(teacher_task).__name__}, and this run as {type(task).__name__}")
        if task.labels != teacher_task.labels:
            labels = f"{listed(teacher_task.labels)}, and this run has {listed(task.labels)}"
            raise UserError(f"{where} has another label set for {name!r}: {labels}")
        scales = [getattr(of_model, "scale", None) for of_model in (teacher_task, task)]
        if scales[0] != scales[1]:
            raise UserError(f"{where} has another scale for {name!r}: {scales[0]}, and this run has {scales[1]}")
    return names
