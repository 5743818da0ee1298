"""A task's predictor as a StableHLO program, which jax runs without this package and without the classes of the model.

The program is a function of parameters and tokens. Parameters lie beside it as safetensors and are its first argument, by name:
so they are stored once whatever the number of programs, may be placed or quantised by whoever runs it, and the program stays
small enough to look at.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from mtl_jax.core import digests, trees
from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.files import reason, write_bytes, write_json, write_text
from mtl_jax.core.staging import check_replaceable, staged
from mtl_jax.core.versions import installed
from mtl_jax.data import tokenize, units
from mtl_jax.data.batch_shape import shorter_rows
from mtl_jax.data.batches import Batch
from mtl_jax.inference import predictor_readme
from mtl_jax.inference.predict import TrainedRun, is_workdir, open_run
from mtl_jax.pretrained import language_codes
from mtl_jax.pretrained.saving import Saved, write_safetensors
from mtl_jax.tasks import Contrastive, MaskedLM, Regression, Span, Tagging, Task
from mtl_jax.training import mesh as meshes
from mtl_jax.training.forward import encode_tokens, needed_fields

log = logging.getLogger(__name__)

ABOUT, PROGRAM, PARAMETERS = "predictor.json", "model.stablehlo", "model.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")
FORMAT = 1  # of predictor.json

# (parameters by path, inputs by name) -> outputs
Program = Callable[[Mapping[str, Any], Mapping[str, Any]], jax.Array]


def write(source: str, target: str | Path, task: str, overwrite: bool) -> str:
    """Writes a task's predictor as a directory: program, parameters, tokenizer, predictor.json, README.md.

    Args:
        source: A workdir.
        target: The directory to write.
        task: The task; "": the only one of the run.
        overwrite: Whether a predictor may be replaced.

    Returns:
        A hint for opening it.

    Raises:
        UserError: The source is not a workdir, the task cannot be exported, the package flatbuffers is missing, or the target
            is not free.
    """
    serialize = _serialize()
    if not is_workdir(Path(source)):
        raise UserError(f"{source}: not the workdir of a run, and only a run's tasks have predictors; leave --stablehlo out")
    run = open_run(Path(source))
    if not task and len(run.tasks) > 1:
        raise UserError(f"--stablehlo: name by --task the task to export: {listed(each.name for each in run.tasks)}")
    chosen = run.task(task or run.tasks[0].name)
    _check(chosen)
    check_replaceable(Path(target), ABOUT, "a predictor", overwrite)
    tensors = tensors_of(run, chosen)
    names = _inputs(run, chosen)
    programs = {length: serialize(program) for length, program in lowered(run, chosen, tensors, names).items()}
    with staged(Path(target)) as staging:
        files = {length: PROGRAM if length is None else f"model-{length}.stablehlo" for length in programs}
        for length, data in programs.items():
            write_bytes(staging / files[length], data)
        write_safetensors(staging / PARAMETERS, {path: Saved(leaf, False) for path, leaf in sorted(tensors.items())})
        _tokenizer(run, chosen).save_pretrained(staging)
        about = _about(run, chosen, names)
        about["programs"] = {str(length): file for length, file in files.items() if length is not None}
        about["sha256"] = {file: digests.of_file(staging / file) for file in (*files.values(), PARAMETERS)}
        write_json(staging / ABOUT, about)
        write_text(staging / "README.md", predictor_readme.readme(run.experiment.name, chosen, about))
    return f"{target} opens with jax alone, as its README.md shows"


def _serialize() -> Callable[[Any], bytes]:
    """The function from an exported program to its bytes.

    Raises:
        UserError: The package is missing that jax needs for it.
    """
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--stablehlo needs the package flatbuffers, which is not installed; pip install 'mtl_jax[stablehlo]'"
        ) from error
    return lambda program: bytes(program.serialize())


def _check(task: Task) -> None:
    """Raises UserError where a task has no outputs for a text alone."""
    kind = f"task {task.name!r}: a {type(task).__name__}"
    if task.decodes or task.makes_tokens:
        raise UserError(f"{kind} writes texts token by token, which is not one program; leave --stablehlo out")
    if task.corrupts or isinstance(task, MaskedLM):
        raise UserError(f"{kind} has no prediction for a text; export another task")
    if task.several_texts and not isinstance(task, Contrastive):
        raise UserError(f"{kind} reads several texts of a row together, and a program reads one; leave --stablehlo out")


def tensors_of(run: TrainedRun, task: Task) -> dict[str, Any]:
    """{path: array} of the trunk and the task's head."""
    return trees.flat({"trunk": run.params["trunk"], "head": run.params["heads"][task.name]})


def program_of(run: TrainedRun, task: Task) -> Program:
    """The function that is exported: from tensors_of() and the tokens i32[B, T] of texts to a task's outputs.

    Each text has a row: its tokens, then padding (or padding first) where attention_mask is 0. The outputs are f32[B, O], or
    f32[B, T, O] of a task that reads tokens: those of predict() before describe().
    """
    encode = encode_tokens(run.trunk.module, needed_fields((task,)), one_source=True)
    place = run.source_index(task.name)

    def program(tensors: Mapping[str, Any], inputs: Mapping[str, Any]) -> jax.Array:
        params = {"head": {}, **trees.nested(tensors)}
        tokens_BxT, mask_BxT = inputs["input_ids"], (inputs["attention_mask"] > 0).astype(jnp.int32)
        B = tokens_BxT.shape[0]
        batch = Batch(
            tokens=tokens_BxT,
            segments=mask_BxT,
            positions=(jnp.cumsum(mask_BxT, axis=1) - 1) * mask_BxT,
            index=jnp.zeros((B, 1), jnp.int32),
            source=jnp.full((B,), place, jnp.int32),
            labels={},
            types=inputs.get("token_type_ids"),
        )
        encoded = encode(params["trunk"], batch, None, None)
        outputs = task.apply(params["head"], encoded.read_by(task.name), batch, None).astype(jnp.float32)
        return outputs[:, 0] if task.level == "example" else outputs

    return program


def lowered(run: TrainedRun, task: Task, tensors: Mapping[str, Any], names: Sequence[str]) -> dict[int | None, Any]:
    """{None: the exported program, for any number of texts and tokens}; or {tokens: a program} where a length must be known.

    Raises:
        UserError: jax cannot export the program.
    """
    program = jax.jit(program_of(run, task))
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in tensors.items()}

    def export(*shape: Any) -> Any:
        inputs = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
        return jax.export.export(program, platforms=PLATFORMS)(shapes, inputs)

    # A module may raise anything where a size is not a number: DeBERTa makes tables of distances on the host.
    try:
        return {None: export(*jax.export.symbolic_shape("b, t"))}
    except Exception as error:
        log.info("task %s: one program for all lengths cannot be made (%s), so there is one for each", task.name, reason(error))
    longest = _row_length(run, task)
    try:
        return {length: export(*jax.export.symbolic_shape("b"), length) for length in (*shorter_rows(longest), longest)}
    except Exception as error:
        raise UserError(f"task {task.name!r}: jax cannot export its program ({reason(error)})") from error


def _row_length(run: TrainedRun, task: Task) -> int:
    """Most tokens of a text, as in training: rows of several texts are divided among them."""
    return run.experiment.batch.row_length // units.size(run.tasks_of_same_source(task.name))


def _reads(run: TrainedRun, task: Task) -> str:
    """What the tokenizer is given for a row: "text", "pair" or "words"."""
    if any(other.words for other in run.tasks_of_same_source(task.name)):
        return "words"
    return "pair" if run.source(task.name).pair and not task.several_texts else "text"


def _inputs(run: TrainedRun, task: Task) -> tuple[str, ...]:
    """The names of the program's inputs, as tokenizers of transformers call them."""
    types = _reads(run, task) == "pair" and "token_type_ids" in run.trunk.tokenizer.model_input_names
    return ("input_ids", "attention_mask", *(("token_type_ids",) if types else ()))


def _tokenizer(run: TrainedRun, task: Task) -> Any:
    """The tokenizer as it reads the task's texts."""
    languages = (other.languages[0] for other in run.tasks_of_same_source(task.name))
    return language_codes.marked(copy.deepcopy(run.trunk.tokenizer), next(filter(None, languages), ""), "")


def _about(run: TrainedRun, task: Task, names: Sequence[str]) -> dict[str, Any]:
    """The contents of predictor.json, without its files."""
    tokenizer, reads = run.trunk.tokenizer, _reads(run, task)
    about: dict[str, Any] = {
        "format": FORMAT,
        "run": run.experiment.name,
        "step": run.step,
        "task": task.name,
        "kind": type(task).__name__,
        "reads": reads,
        "columns": [name for name in (run.source(task.name).text, run.source(task.name).pair) if name],
        "labels": list(task.shown_labels),
        "inputs": dict.fromkeys(names, "int32[b, t]"),
        "output": f"float32[b, {task.outputs}]" if task.level == "example" else f"float32[b, t, {task.outputs}]",
        "row_length": _row_length(run, task),
        "fast_tokenizer": bool(getattr(tokenizer, "is_fast", False)),
        "parameters": PARAMETERS,
        "program": PROGRAM,
        "platforms": list(PLATFORMS),
        "dtype": str(np.dtype(meshes.compute_dtype(run.experiment.dtype))),
        "versions": {"jax": jax.__version__, "mtl_jax": installed("mtl_jax")},
    }
    if reads == "words":
        about["space_before_words"] = tokenize.splits_at_spaces(tokenizer)
    if isinstance(task, Regression):
        about["scale"] = task.scale
    if isinstance(task, Tagging):
        about["outside"] = "O" if "O" in task.labels else None
    if isinstance(task, Span):
        about |= {"max_answer": task.max_answer, "no_answer_threshold": task.no_answer_threshold}
    return about
