"""Tasks with head="family" beside the classes of transformers, in the way of parity.py.

python tests/pretrained/parity_heads.py prints the table: class x largest difference of the logits in both directions.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import parity
import parity_llama  # noqa: F401
import tiny

from mtl_jax import Batching, Classification, Experiment, Phase, Pretrained, Source, trunks
from mtl_jax.core.trees import flat
from mtl_jax.data.batches import Batch
from mtl_jax.inference import export
from mtl_jax.inference.predict import TrainedRun
from mtl_jax.training.forward import apply_head, encode_tokens, needed_fields
from mtl_jax.training.train_state import init_params

torch, transformers = parity.torch, parity.transformers
END = "ForSequenceClassification"
LABELS = ("no", "perhaps", "yes")
TEXTS = [np.arange(6, 13), np.arange(20, 25), np.arange(30, 39)]  # two in the first row, one in the second
Case = tuple[str, dict[str, Any]]
CASES: list[Case] = [
    # With those of parity_llama. EuroBERT's reads every token, unless config.json says otherwise.
    *((family, {}) for family in parity.FAMILIES if hasattr(transformers, family + END) and family != "EuroBert"),
    ("EuroBert", {"classifier_pooling": "bos"}),
    ("EuroBert", {"classifier_pooling": "mean", "mlp_bias": True}),
    ("DebertaV2", parity.DEBERTA_V2),
    ("ModernBert", {"classifier_pooling": "mean"}),
    ("ModernBert", parity.MODERN_BIASES),
]


def name_of(case: Case) -> str:
    return parity.name_of((case[0], case[0] + END, None, case[1]))


def packed() -> Batch:
    """The texts in two rows of 14 tokens."""
    tokens, segments, positions = np.zeros((3, 2, 14), np.int32)
    for row, begin, segment, text in ((0, 0, 1, TEXTS[0]), (0, 7, 2, TEXTS[1]), (1, 0, 1, TEXTS[2])):
        place = (row, slice(begin, begin + len(text)))
        tokens[place], segments[place], positions[place] = text, segment, np.arange(len(text))
    index = np.array([[0, 1], [2, -1]], np.int32)
    return Batch(tokens, segments, positions, np.zeros(2, np.int32), index, {}, np.zeros_like(tokens))


def ours(run: TrainedRun) -> np.ndarray:
    """The run's outputs for the texts, f32[3, O], in label units."""
    (task,), batch = run.tasks, packed()

    def outputs(params: Any) -> Any:
        encoded = encode_tokens(run.trunk.module, needed_fields(run.tasks))(params["trunk"], batch, None, None)
        return apply_head(task, params["heads"][task.name], encoded, batch, None)

    with jax.default_matmul_precision("highest"):
        found = np.asarray(jax.jit(outputs, compiler_options=parity.QUICKLY)(run.params))
    return found[[0, 0, 1], [0, 1, 0]] * task.output_scale


def theirs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([model(torch.from_numpy(text[None])).logits.numpy() for text in TEXTS])


def begun(folder: Path, task: Any) -> TrainedRun:
    """A run of a task on a checkpoint, before its first step."""
    declared = Pretrained(str(folder))
    trunk = trunks.build(declared, (), np.float32)
    task = task.on(trunks.facts(trunk))
    trunk = trunks.with_classifier(trunk)
    experiment = Experiment(
        name="tiny",
        trunk=declared,
        sources=(Source("texts", rows=[{"text": "a", "label": "no"}]),),
        tasks=(task,),
        phases=(Phase("everything", steps=1),),
        batch=Batching(row_length=14),
    )
    return TrainedRun(experiment, (task,), trunk, init_params(trunk, (task,), 0), 1, None)


def changed(run: TrainedRun) -> TrainedRun:
    """The run with other parameters, as if it had trained."""
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda leaf: np.asarray(leaf) + np.float32(0.05) * rng.normal(size=leaf.shape).astype("f4"), run.params
    )
    return run._replace(params=moved)


def exported(run: TrainedRun, folder: Path) -> None:
    """Writes the run as mtl-jax convert would, whose workdir has nothing but its trunk."""
    workdir = folder.with_name("workdir")
    workdir.mkdir()
    trunks.save(run.trunk, workdir / "trunk")
    (workdir / "config.json").write_text("{}")
    (workdir / "data.json").write_text(json.dumps({"sources": {}, "tasks": {}}))
    opened, export.open_run = export.open_run, lambda path: run
    try:
        export.convert(workdir, folder, task=run.tasks[0].name)
    finally:
        export.open_run = opened


def with_tokenizer(folder: Path) -> None:
    tiny.write_bert(folder.with_name("bert"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder.with_name("bert") / file, folder)


class Compared(NamedTuple):
    """The largest differences of the logits in both directions, and whether the head comes back to the bit."""

    inwards: float
    outwards: float
    same: bool


def both_ways(case: Case, folder: Path, task: Any = None) -> Compared:
    """Their model as the beginning of a run, and the run, with other parameters, as their model again."""
    family, changes = case
    task = task or Classification(name="mood", source="texts", labels=LABELS, head="family")
    model = parity.reference(family, family + END, {**changes, "num_labels": task.outputs})
    model.save_pretrained(folder / "theirs")
    with_tokenizer(folder / "theirs")
    run = begun(folder / "theirs", task)
    inwards = np.abs(ours(run) - theirs(model)).max()
    run = changed(run)
    exported(run, folder / "ours")
    back = parity.opened_without_a_word(folder / "ours", family + END)
    outwards = np.abs(ours(run) - theirs(back)).max()
    again = begun(folder / "ours", task)
    before, after = flat(run.params), flat(again.params)
    return Compared(float(inwards), float(outwards), all(np.array_equal(before[path], after[path]) for path in before))


if __name__ == "__main__":
    print("| transformers class | largest difference in | out | in again to the bit |\n|---|---|---|---|")
    for one in CASES:
        with tempfile.TemporaryDirectory() as at:
            found = both_ways(one, Path(at))
            print(f"| {name_of(one)} | {found.inwards:.1e} | {found.outwards:.1e} | {found.same} |", flush=True)
