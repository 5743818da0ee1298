"""Names of persons, places and organisations, from a tagging run of the user's or from a registered function."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from mtl_jax.audit.deidentification import Names
from mtl_jax.audit.recognisers import need
from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.core.files import shown
from mtl_jax.core.parts import Registry
from mtl_jax.tasks import Tagging
from mtl_jax.tasks.bio import entities, is_bio
from mtl_jax.tasks.label_names import shown_labels

NAME_KINDS = ("person", "place", "organisation")
# {type of a tagging run's entities, in lower case: type here}
TYPES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("per", "pers", "person"), "person"),
        **dict.fromkeys(("loc", "location", "gpe", "place", "geo-loc", "facility", "fac"), "place"),
        **dict.fromkeys(("org", "organisation", "organization", "corporation", "company", "group"), "organisation"),
    }
)
SIZES = ("sm", "md", "lg", "trf")  # in names of spaCy's models, the better one last
_WORDS = re.compile(r"[@#]?\w+(?:[-'\u2019.]\w+)*|[^\w\s]")


def people_of(model: Any, task: str, types: Mapping[str, str] = TYPES) -> Names:
    """A function for people=, which returns the names that a tagging run finds.

    Args:
        model: mtl_jax.load_model(WORKDIR) of the run.
        task: Its tagging task with tags such as B-person and I-person.
        types: {the run's type in lower case: "person", "place", "organisation" or another}; others are left out. The run's type
            is that of its tags, or, where types has not that one, its name in label_names.

    Raises:
        UserError: The task is unknown, is not a tagging task with entities, or has none of these types.
    """
    chosen = model.run.task(task)
    if not isinstance(chosen, Tagging) or not is_bio(chosen.labels):
        raise UserError(f"people: task {task!r} is not a tagging task with entities; name one whose tags are B-TYPE and I-TYPE")
    kinds = _kinds(chosen.labels, chosen.shown_labels, types)
    if not kinds:
        tags = listed(label for label in chosen.labels if label != "O")
        raise UserError(f"people: task {task!r} tags none of the types {listed(types)}, but {tags}")
    label_of = dict(zip(chosen.shown_labels, chosen.labels, strict=True))

    def names(texts: Sequence[str]) -> list[list[tuple[int, int, str]]]:
        places = [[match.span() for match in _WORDS.finditer(text)] for text in texts]
        filled = [index for index, words in enumerate(places) if words]
        answers = model.predict(task, [[texts[index][start:end] for start, end in places[index]] for index in filled])
        result: list[list[tuple[int, int, str]]] = [[] for _ in texts]
        for index, answer in zip(filled, answers, strict=True):
            if "error" in answer:
                raise UserError(f"people: text {index + 1} cannot be read by task {task!r} ({answer['error']})")
            for entity in entities([label_of.get(tag, "O") for tag in answer["tags"]]):
                if entity.type in kinds:
                    first, last = places[index][entity.start], places[index][entity.end - 1]
                    result[index].append((first[0], last[1], kinds[entity.type]))
        return result

    return names


def _kinds(labels: Iterable[str], shown: Iterable[str], types: Mapping[str, str]) -> dict[str, str]:
    """{type of the tags: kind}, by the type itself, else by its name; types of neither are left out."""
    kinds: dict[str, str] = {}
    for label, name in zip(labels, shown, strict=True):
        kind = types.get(label[2:].lower()) or types.get(name.removeprefix("B-").lower())
        if label.startswith("B-") and kind:
            kinds[label[2:]] = kind
    return kinds


def presidio_engine() -> Any:
    """presidio's AnalyzerEngine for English texts, with the best spaCy model that is installed.

    presidio by itself downloads a model that it lacks, and leaves organisations out. Here nothing is downloaded, and
    organisations are looked for.

    Raises:
        UserError: presidio is not installed, or no English model of spaCy.
    """
    try:
        analyzer, engines = (need(f"presidio_analyzer{part}", "names by presidio") for part in ("", ".nlp_engine"))
        spacy_util = need("spacy.util", "names by presidio")
    except UserError as error:
        raise UserError("names by presidio need the package presidio-analyzer, which is not installed") from error
    models = sorted(name for name in spacy_util.get_installed_models() if name.startswith("en_"))
    if not models:
        raise UserError("names by presidio need an English model of spaCy, such as en_core_web_lg, and none is installed")
    largest = max(models, key=lambda name: next((size for size, part in enumerate(SIZES) if f"_{part}" in name), -1))
    configuration = dict(engines.NlpEngineProvider().nlp_configuration)
    configuration["models"] = [{"lang_code": "en", "model_name": largest}]
    of_names = configuration["ner_model_configuration"]
    ignored = [label for label in of_names["labels_to_ignore"] if label != "ORGANIZATION"]
    configuration["ner_model_configuration"] = {**of_names, "labels_to_ignore": ignored}
    return analyzer.AnalyzerEngine(nlp_engine=engines.NlpEngineProvider(nlp_configuration=configuration).create_engine())


def presidio() -> Names:
    """The names that Microsoft's presidio finds in English texts.

    Raises:
        UserError: As presidio_engine().
    """
    engine = presidio_engine()
    kinds = {"PERSON": "person", "LOCATION": "place", "ORGANIZATION": "organisation"}

    def names(texts: Sequence[str]) -> list[list[tuple[int, int, str]]]:
        results = [engine.analyze(text=text, language="en", entities=list(kinds)) for text in texts]
        return [[(found.start, found.end, kinds[found.entity_type]) for found in of_text] for of_text in results]

    return names


# Functions without arguments that make a function for people=: what `names` may name beside a run.
NAMES: Registry[Callable[[], Names]] = Registry("recogniser of names", {"presidio": presidio})
register_names = NAMES.register


class TaggingRun(NamedTuple):
    """A tagging task of a run.

    Attributes:
        workdir: The run's workdir.
        task: The task.
    """

    workdir: Path
    task: str


def tagging_run(text: str, where: str) -> TaggingRun:
    """The run and task that a text names: "WORKDIR" for a run with one task that tags names, or "WORKDIR:TASK".

    Raises:
        UserError: It is not a workdir, or its run has no such task. The line begins with `where`.
    """
    workdir, task = Path(text), ""
    if not workdir.is_dir() and ":" in text:
        before, _, task = text.rpartition(":")
        workdir = Path(before)
    if not (workdir / "data.json").is_file():
        problem = "is neither the workdir of a tagging run nor a registered recogniser of names"
        raise UserError(f"{where} is {shown(text)!r}, which {problem} ({listed(NAMES)})")
    try:
        tasks = json.loads((workdir / "data.json").read_text(encoding="utf-8"))["tasks"]
        taggers = {name: _types(values) for name, values in tasks.items() if is_bio(values.get("labels", ()))}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where}: {shown(workdir / 'data.json')} is not what mtl_jax wrote") from error
    if task and task not in taggers:
        raise unknown(f"tagging task with entities in {where}:", task, taggers)
    if not taggers:
        raise UserError(f"{where}: the run in {shown(workdir)} has no tagging task with entities, but {listed(tasks)}")
    chosen = [name for name, types in taggers.items() if types and task in ("", name)]
    if not chosen:
        tags = listed(label for name in ([task] if task else taggers) for label in tasks[name]["labels"] if label != "O")
        who = f"task {task!r} does not tag" if task else "no task tags"
        advice = "name another run, or register mtl_jax.audit.people_of with types of your own (register_names)"
        raise UserError(f"{where}: {who} persons, places or organisations there, but {tags}; {advice}")
    if len(chosen) > 1:
        choices = " or ".join(f"{shown(workdir)}:{name}" for name in chosen)
        raise UserError(f"{where}: several tasks tag persons, places or organisations there; write {choices}")
    return TaggingRun(workdir, chosen[0])


def _types(values: Mapping[str, Any]) -> set[str]:
    """The kinds of names that a task's label set has."""
    return set(_kinds(values["labels"], shown_labels(values["labels"], values.get("label_names", {})), TYPES).values())


def check_names(text: str, where: str) -> None:
    """Raises UserError unless a text names a registered recogniser of names, or a tagging run."""
    if text not in NAMES:
        tagging_run(text, where)


def names_by(text: str, where: str) -> Names:
    """The function for people= that a text names: a registered one, or one from a tagging run, which is opened.

    Raises:
        UserError: There is none, or the run cannot be opened.
    """
    if text in NAMES:
        return NAMES[text]()
    run = tagging_run(text, where)
    import mtl_jax  # a run is opened by the public door, as a script opens it: models stand above this package

    return people_of(mtl_jax.load_model(run.workdir), run.task)
