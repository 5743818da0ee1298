"""Teachers: models that others learn from, opened and compared with the run that they teach."""

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
from mtl_jax.tasks import Tagging, Task
from mtl_jax.training import restore
from mtl_jax.training.forward import apply_heads, encode_tokens, needed_fields
from mtl_jax.transfer.regularisers import FIELD, Distillation
from mtl_jax.trunks import Pretrained, Trunk


class Teacher(NamedTuple):
    """A model that is imitated.

    Attributes:
        module: Its trunk; of a tagger's checkpoint the model with its head.
        tasks: Its tasks; none where only its vectors are wanted.
        params: {"trunk": ..., "heads": {task: ...}} on the first device; of a checkpoint what module takes.
        width: H, the size of its vectors.
        tagger: Whether module gives the logits of its only task itself.
    """

    module: Any
    tasks: tuple[Task, ...]
    params: Any
    width: int
    tagger: bool = False

    def outputs(self, params: Any, batch: Batch, names: Sequence[str]) -> dict[str, jax.Array]:
        """{task: outputs} of some tasks, without dropout.

        Args:
            params: Its parameters, on the run's devices.
            batch: The rows.
            names: The tasks.
        """
        if self.tagger:
            real = (batch.segments > 0).astype(jnp.int32)
            types, own = batch.types, {"position_ids": batch.positions, "segment_ids": batch.segments}
            return {names[0]: self.module.apply({"params": params}, batch.tokens, real, token_type_ids=types, **own).logits}
        chosen = tuple(task for task in self.tasks if task.name in names)
        encoded = encode_tokens(self.module, needed_fields(chosen))(params["trunk"], batch, None, None)
        return apply_heads(chosen, params["heads"], encoded, batch, None)

    def hidden(self, params: Any, batch: Batch) -> jax.Array:
        """f[R, T, H], the last vectors of all tokens, without dropout; arguments as for outputs()."""
        vectors = encode_tokens(self.module, ("tokens",))(params["trunk"], batch, None, None).tokens
        assert vectors is not None
        return vectors


def open_teacher(
    kind: Distillation, trunk: Trunk, tasks: Mapping[str, Task], row_length: int, texts: Sequence[str], dtype: Any
) -> Teacher:
    """Opens a teacher and finds out whether it reads what the student reads.

    Args:
        kind: Names it.
        trunk: The student's trunk.
        tasks: The student's tasks.
        row_length: Tokens of a row.
        texts: Some texts, on which the tokenizers are compared.
        dtype: Compute dtype.

    Raises:
        UserError: It is no finished run, nor a checkpoint that can teach this; it has another vocabulary or takes shorter rows.
    """
    folder, where = Path(kind.teacher), f"{FIELD}: teacher of {kind.name}"
    if not restore.is_workdir(folder) and kind.of == "hidden":
        bare = trunks.build(Pretrained(kind.teacher), (), dtype)
        params = {"trunk": bare.params}
        found, tokenizer = Teacher(bare.module, (), params, trunks.width(bare, bare.params)), bare.tokenizer
    elif not restore.is_workdir(folder) and (folder / "config.json").exists():
        found, tokenizer = _tagger(kind, tasks, where, dtype)
    else:
        run = restore.open_finished(folder, where)
        width = trunks.width(run.trunk, run.params["trunk"])
        found, tokenizer = Teacher(run.trunk.module, run.tasks, run.params, width), run.trunk.tokenizer
    check_vocabulary(trunk.tokenizer, tokenizer, texts, f"{where}, {kind.teacher},")
    longest = getattr((found.module.trunk if found.tagger else found.module).config, "max_length", None)
    if longest is not None and longest < row_length:
        raise UserError(
            f"{where}, {kind.teacher}, takes rows of {count(longest, 'token')}, but batch.row_length is {row_length}"
        )
    return found


def _tagger(kind: Distillation, tasks: Mapping[str, Task], where: str, dtype: Any) -> tuple[Teacher, Any]:
    """A token classifier's checkpoint as the teacher of a tagging task. (Its heads of texts cannot read packed rows.)"""
    checkpoint = pretrained.load(kind.teacher, dtype=dtype)
    if checkpoint.head != "token_classification" or len(kind.tasks) != 1 or not isinstance(tasks[kind.tasks[0]], Tagging):
        raise UserError(
            f"{where}: outputs of a checkpoint, {kind.teacher}, can be imitated where it is a token classifier and tasks names "
            "the one tagging task that it has; else give the workdir of a finished run, or imitate its vectors (of hidden)"
        )
    task = dataclasses.replace(tasks[kind.tasks[0]], labels=checkpoint.labels)  # type: ignore[call-arg]
    return Teacher(checkpoint.model, (task,), checkpoint.params, 0, tagger=True), checkpoint.tokenizer


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
            f"{where} has another vocabulary than this run's trunk ({len(other.get_vocab())} and "
            f"{count(len(own.get_vocab()), 'token')}): take one of the same"
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
        raise UserError(f"{where} has no task of this run (it has {listed(theirs)}; here are {listed(tasks)})")
    for name in names:
        own, other = tasks[name], theirs.get(name)
        if not own.compared_as:
            raise UserError(f"{FIELD}: {kind.name}: outputs of a {type(own).__name__} such as {name!r} cannot be imitated")
        if other is None:
            raise UserError(f"{where} has no task {name!r}; it has {listed(theirs)}")
        if type(own) is not type(other):
            raise UserError(f"{where} has {name!r} as {type(other).__name__}, and here it is {type(own).__name__}")
        if own.labels != other.labels:
            raise UserError(
                f"{where} has another label set for {name!r}: {listed(other.labels)} there, {listed(own.labels)} here"
            )
        if getattr(own, "scale", None) != getattr(other, "scale", None):
            raise UserError(f"{where} has another scale for {name!r}: {other.scale} there, {own.scale} here")  # type: ignore[attr-defined]
    return names
