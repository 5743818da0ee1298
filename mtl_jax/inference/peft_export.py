"""Writes the adapters of a run as a PEFT directory, which opens on the checkpoint that the run started from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax import pretrained, trunks
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.inference.predict import TrainedRun
from mtl_jax.pretrained import text_classifier
from mtl_jax.pretrained.checkpoint import Checkpoint
from mtl_jax.sharing.task_adapters import TaskAdapters
from mtl_jax.tasks import CausalLM, Contrastive, Seq2Seq, Span, Tagging, Task
from mtl_jax.tasks.text_head import TextTask
from mtl_jax.transfer.adapters import ADAPTERS, Adapted, adapt, save_peft
from mtl_jax.transfer.adapters.adapting import OfSource
from mtl_jax.transfer.adapters.base import RUN, Adapter, Inserted
from mtl_jax.transfer.adapters.of_task import owner_of, params_at

HEADS: dict[type[Task], str] = {
    Tagging: "token_classification",
    Span: "question_answering",
    Seq2Seq: trunks.DECODER,
    CausalLM: trunks.CAUSAL,
}


def write(run: TrainedRun, source: str, target: str | Path, task: Task | None, overwrite: bool) -> str:
    """Writes a run's adapters, with the head of a task if asked: of tagging, a span, or a text classifier of the family.

    Args:
        run: The run.
        source: Its name, for errors.
        target: The directory to write.
        task: The task whose adapters and head are written; None: the adapters that all tasks share.
        overwrite: Whether a PEFT directory may be replaced.

    Returns:
        A hint for opening it.

    Raises:
        UserError: The run has no adapters, or more than its adapters has trained; PEFT has no form for an adapter; or the
            target is not free.
    """
    checkpoint = checkpoint_of(run, source, task)
    base = run.experiment.trunk.path  # type: ignore[attr-defined]
    classifier = task if isinstance(task, TextTask) and task.classifier is not None else None
    whole = classifier is not None or isinstance(task, Tagging | Span)
    save_peft(target, checkpoint, base=base, head=whole, overwrite=overwrite)
    first = f" {base} is written as a directory by mtl-jax convert." if base.startswith(("pip:", "gguf:")) else ""
    without = ""
    if isinstance(task, TextTask | Contrastive) and classifier is None:
        without = f" PEFT has no form for the head of {task.name}, which reads the mean of the tokens: it is not in it."
    kind = "AutoModelForCausalLM" if isinstance(task, CausalLM) else "model"
    model = f"{kind} of {base}" if classifier is None else f"AutoModelForSequenceClassification of {base}"
    model += "" if classifier is None else f" with num_labels={classifier.outputs}"
    return f"{target} opens on its base: PeftModel.from_pretrained({model}, {str(target)!r}).{first}{without}"


def checkpoint_of(run: TrainedRun, source: str, task: Task | None) -> Checkpoint:
    """The checkpoint that a run started from, with the run's adapters and the head of a task in it.

    Raises:
        UserError: As for write().
    """
    declared: Any = run.experiment.trunk
    if not isinstance(declared, trunks.Pretrained) or declared.fresh:
        raise UserError(f"{source}: its trunk is from no checkpoint, and a PEFT directory opens on one")
    classifier = task if isinstance(task, TextTask) and task.classifier is not None else None
    kind = text_classifier.KIND if classifier is not None else None if task is None else HEADS.get(type(task))
    if isinstance(task, Seq2Seq) and not task.from_checkpoint:
        raise UserError(f"task {task.name!r}: its decoder is from no checkpoint, and a PEFT directory opens on one")
    labels: Any = task.shown_labels if isinstance(task, Tagging) else None
    labels = labels if classifier is None else classifier.shown_labels or classifier.outputs
    base = pretrained.load(declared.path, head=kind, labels=labels)
    model: Any = base.model
    params = dict(base.params)
    changes: dict[str, Any] = {}
    trunk = {name: tree for name, tree in run.params["trunk"].items() if name != ADAPTERS}
    _check_unchanged(trunk, base.params["trunk"], source, "trunk")
    module = run.trunk.module
    if isinstance(module, Adapted):
        place = run.source_index(task.name) if task is not None else None
        parts = [_part_of(run, source, module, inserted, task, place) for inserted in module.adapters]
        adapted, added = adapt(model.trunk, [adapter for adapter, _ in parts]), {part.name: tree for part, tree in parts}
        changes["trunk"], params["trunk"] = OfSource(adapted), {**trunk, ADAPTERS: added}
    if isinstance(task, Seq2Seq):
        head = run.params["heads"][task.name]
        _check_unchanged(
            {name: tree for name, tree in head.items() if name != ADAPTERS}, base.params["head"], source, "decoder"
        )
        changes["head"], params["head"] = task.module(), head
    elif isinstance(task, CausalLM):
        _check_unchanged(run.params["heads"][task.name], base.params.get("head", {}), source, "LM head")
    elif classifier is not None:
        params |= text_classifier.scaled(run.params["heads"][classifier.name], classifier.output_scale)
    elif task is not None and kind is not None:
        params["head"] = _token_head(base, run.params["heads"][task.name], task)
    # A pooler that has trained is not that of the base: it is stored, as a layer that has taken up an adapter is.
    pooler = ("pooler/dense",) if classifier is not None and "pooler" in params else ()
    return dataclasses.replace(base, model=model.clone(**changes), params=params, merged=pooler)


def _part_of(
    run: TrainedRun, source: str, module: Adapted, inserted: Inserted, task: Task | None, place: int | None
) -> tuple[Adapter, Any]:
    """An adapter as one of all rows, and its parameters; of a sharing by adapters that of the task.

    Raises:
        UserError: PEFT has no form for the sharing, or it is not said whose adapter is written.
    """
    adapter = inserted.adapter if isinstance(inserted, TaskAdapters) else inserted
    if not isinstance(adapter, Adapter):
        raise UserError(
            f"{source}: its tasks share the trunk by {type(adapter).__name__}, for which PEFT has no form; leave --peft out"
        )
    tree: dict[str, Any] = {}
    for layer in module.where[inserted.name]:
        owner = owner_of(module, inserted, layer)
        if owner != RUN and task is None:
            raise UserError(
                f"adapter {adapter.name!r}: each {owner} has its own; say by --task of which task it is to be written"
            )
        params = params_at(module, inserted, run.params["trunk"][ADAPTERS], layer, place, None if task is None else task.name)
        tree |= {f"{layer.path}/{name}": leaf for name, leaf in params.items()}
    return dataclasses.replace(adapter, name=inserted.name, per=RUN), trees.nested(tree)


def _check_unchanged(trained: Mapping[str, Any], base: Mapping[str, Any], source: str, part: str) -> None:
    loaded = trees.flat(base)
    for path, leaf in trees.flat(trained).items():
        if path not in loaded or not np.array_equal(np.asarray(leaf), np.asarray(loaded[path])):
            raise UserError(
                f"{source}: {path} of its {part} is not that of the checkpoint, so more than adapters has trained, and a PEFT "
                "directory has adapters only; leave --peft out"
            )


def _token_head(base: Checkpoint, layers: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """The single layer of a task's head under its name in the class of transformers."""
    names = list(base.params["head"])
    if set(layers) != {"output"} or len(names) != 1 or layers["output"].keys() != base.params["head"][names[0]].keys():
        raise UserError(
            f"task {task.name!r}: its head is not the single linear layer of the class of transformers; leave --task out"
        )
    return {names[0]: layers["output"]}
