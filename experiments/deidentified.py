"""What de-identification finds, and what training on de-identified texts costs.

    python experiments/deidentified.py
    python experiments/deidentified.py --parts cost --seeds 0 1 2 3 4

Three parts, in this order: a tagger of names is trained on WNUT17 and Tweebank (experiments/social_ner.py, fewer steps);
`planted`: identifiers of twelve types are planted into sentences of mails (AESLC, those without digits, @ and addresses) and
looked for; `names`: names of the test sets of WNUT17 and Tweebank are looked for; `cost`: emotion of tweets (TweetEval) is
learned by a small embedding from texts as they are, masked, and with surrogates, which are written once by
mtl_jax.deidentify. Runs are workdirs in WORKDIR: started again, the script resumes.
The tables are also in WORKDIR/table.md; no text is in any of them. MTL_JAX_DATA names a folder with aeslc/, wnut17/,
tweebank/ and tweeteval/; planting needs pip install 'mtl_jax[deidentify]'. Where spaCy's small English model or presidio is
installed, it is measured beside ours.

One core of a 2-core CPU, seed 0 of the tagger (WNUT17 44.2, Tweebank 57.4 entity F1), in percent. Planted: F1 of e-mail, url,
ip, iban and user 100, card 97, date 96, id 88, telephone 72 (numbers with extensions, and ones that no country has given out);
recall of persons 92. presidio 2.2 with spaCy's small model: e-mail and iban 100, card 89, ip 85, url 72, telephone 70, id 48,
date 14 (it takes today for one), user 0; recall of persons 86. Names: F1 of persons 67 on WNUT17 and 76 on Tweebank, where
presidio and spaCy's small model, of other texts, have 27 and 37. Cost, mean ± standard deviation of seeds 0, 1, 2:

| trained on texts   | tested on these   | tested as they are   |
|--------------------|-------------------|----------------------|
| as they are        | 56.2 ± 1.4        | 56.2 ± 1.4           |
| mask               | 55.7 ± 0.2        | 55.5 ± 0.4           |
| surrogate          | 56.2 ± 0.3        | 56.0 ± 0.5           |

All tables are in docs/audit.md.
"""

import dataclasses
import json
import logging
import random
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tabulate
import tyro
from social_ner import EXPERIMENT as NER
from tweeteval import EXPERIMENT as TWEETS

import mtl_jax
from mtl_jax import Batching, Embedding, Evaluation, Experiment, Optimizer, Phase, Source, UserError, audit
from mtl_jax.audit.person_names import NAME_KINDS, TYPES, presidio_engine
from mtl_jax.core import assets
from mtl_jax.core.errors import unknown
from mtl_jax.core.files import number_of
from mtl_jax.data.splits import read

Place = tuple[int, int, str]  # first character, the one after the last, type
Finder = Callable[[Sequence[str]], Sequence[Iterable[Place]]]

PARTS = ("planted", "names", "cost")
TASK = "emotion"
WAYS = ("as they are", "mask", "surrogate")
PRESIDIO = {  # its types; those of a country's numbers, such as US_SSN, are ids
    "EMAIL_ADDRESS": "email",
    "PHONE_NUMBER": "telephone",
    "URL": "url",
    "IP_ADDRESS": "ip",
    "IBAN_CODE": "iban",
    "CREDIT_CARD": "card",
    "DATE_TIME": "date",
    "PERSON": "person",
    "LOCATION": "place",
    "ORGANIZATION": "organisation",
}
SENTENCES = 4  # of a mail
CARRIERS = ("Please use {} for this.", "It was {} in the last message.", "We have {} on our list, and nothing else.")
DATES = ("%Y-%m-%d", "%m/%d/%Y", "%d.%m.%Y", "%B %d, %Y", "%d %b %Y", "%d/%m/%y", "%A, %B %d", "%b. %d %Y")
OTHERS = ("at 10:45", "for $1,250.75", "by 12.5 percent", "version 2.10.4", "all 1600 people", "on page 117", "room 4-12")


@dataclasses.dataclass(frozen=True)
class Study:
    """What is measured.

    Attributes:
        parts: planted, names, cost.
        ways: Of `cost`: texts as they are, mask, surrogate.
        seeds: Seeds of the runs of `cost`.
        ner_steps: Steps of the tagger of names.
        steps: Steps of a run of `cost`.
        mails: Number of mails with a planted identifier.
        limit: Rows read from each source; 0: all.
        workdir: The directory with the runs.
    """

    parts: tuple[str, ...] = PARTS
    ways: tuple[str, ...] = WAYS
    seeds: tuple[int, ...] = (0, 1, 2)
    ner_steps: int = 150
    steps: int = 300
    mails: int = 600
    limit: int = 0
    workdir: str = "runs/deidentified"


class Texts(NamedTuple):
    """Texts and the places that are to be found in each."""

    texts: list[str]
    places: list[list[Place]]


def plant(mails: int, seed: int = 0) -> Texts:
    """Mails with one identifier each, of twelve types in turn, and one number that is none.

    Args:
        mails: Their number.
        seed: Of the sentences and identifiers.
    """
    from faker import Faker

    with assets.locate("data:aeslc/dev.jsonl").open(encoding="utf-8") as file:
        bodies = [json.loads(line)["source"] for line in file]
    sentences = [part.strip() for body in bodies for part in re.split(r"(?<=[.?!])\s+|\n+", body)]
    sentences = [text for text in sentences if 5 <= len(text.split()) <= 25 and not re.search(r"[\d@]|www|http", text)]
    faker, rng = Faker("en_US"), random.Random(seed)
    faker.seed_instance(seed)
    makers: dict[str, Callable[[], str]] = {
        "email": faker.email,
        "telephone": faker.phone_number,
        "url": faker.uri,
        "ip": lambda: rng.choice([faker.ipv4, faker.ipv6])(),
        "iban": faker.iban,
        "card": faker.credit_card_number,
        "date": lambda: faker.date_object().strftime(rng.choice(DATES)),
        "user": lambda: f"@{faker.user_name()}",
        "id": lambda: rng.choice([faker.ssn(), faker.uuid4(), faker.bothify("??######"), faker.bothify("##-???-####")]),
        "person": faker.name,
        "place": faker.city,
        "organisation": faker.company,
    }
    texts, places = [], []
    for number in range(mails):
        kind = list(makers)[number % len(makers)]
        value = makers[kind]().replace("\n", " ")
        before, after = rng.choice(CARRIERS).split("{}")
        parts = [*rng.sample(sentences, SENTENCES), f"That is {rng.choice(OTHERS)}."]
        rng.shuffle(parts)
        head = " ".join([*parts[: rng.randrange(len(parts) + 1)], before])
        texts.append(f"{head}{value}{after} {' '.join(parts[len(parts) // 2 :])}")
        places.append([(len(head), len(head) + len(value), kind)])
    return Texts(texts, places)


def annotated(task: str, limit: int) -> Texts:
    """The sentences of a test set with their persons, places and organisations."""
    source = next(source for source in NER.sources if source.name == task)
    texts, places = [], []
    for row in read(dataclasses.replace(source, limit=limit)).rows["test"]:
        words = row.columns["text"]
        starts = [sum(len(word) + 1 for word in words[:index]) for index in range(len(words))]
        entities = mtl_jax.tasks.bio.entities([tag or "O" for tag in row.columns["entities"]])
        texts.append(" ".join(words))
        places.append(
            [
                (starts[entity.start], starts[entity.end - 1] + len(words[entity.end - 1]), TYPES[entity.type.lower()])
                for entity in entities
                if entity.type.lower() in TYPES
            ]
        )
    return Texts(texts, places)


def ours(people: Any, recognisers: Sequence[str] | None = None) -> Finder:
    """What mtl_jax.audit finds, of places that overlap the one that counts."""

    def find(texts: Sequence[str]) -> list[list[Place]]:
        deidentified = audit.deidentify_texts(texts, mode="mask", recognisers=recognisers, people=people)
        return [[(place.start, place.end, place.type) for place in places] for _, places in deidentified]

    return find


def presidio(kinds: Sequence[str]) -> dict[str, Finder]:
    """presidio looking for some types in English texts, where it is installed; of places that overlap, the surest one.

    Args:
        kinds: The types; id stands for all those that PRESIDIO does not have.
    """
    try:
        engine = presidio_engine()
        logging.getLogger("tldextract").setLevel(logging.CRITICAL)  # else a traceback where the network cannot be reached
    except UserError as error:
        print(f"presidio is left out: {error}")
        return {}

    def of_text(text: str) -> list[Place]:
        places: list[Place] = []
        found_places = engine.analyze(text=text, language="en")
        for found in sorted(found_places, key=lambda found: (-found.score, found.start - found.end)):
            kind = PRESIDIO.get(found.entity_type, "id")
            if kind in kinds and all(found.end <= start or end <= found.start for start, end, _ in places):
                places.append((found.start, found.end, kind))
        return places

    return {"presidio": lambda texts: [of_text(text) for text in texts]}


def peers() -> dict[str, Finder]:
    """Other recognisers of names that are installed."""
    finders = presidio(NAME_KINDS)
    try:
        import spacy

        model = spacy.load(next(name for name in spacy.util.get_installed_models() if name.startswith("en_core_web_sm")))
        finders["spaCy small"] = lambda texts: [
            [(e.start_char, e.end_char, TYPES[e.label_.lower()]) for e in doc.ents if e.label_.lower() in TYPES]
            for doc in model.pipe(texts)
        ]
    except (ImportError, StopIteration):
        print("spaCy's en_core_web_sm is not installed and left out")
    return finders


def measured(finder: Finder, data: Texts, kinds: Sequence[str], *, only_recall: Sequence[str] = ()) -> list[list[str]]:
    """Rows of (type, places, precision, recall, F1, share of their characters found as anything), in percent.

    Args:
        finder: What looks.
        data: The texts.
        kinds: The types.
        only_recall: Types of which the texts have places that are not named.
    """
    guesses = [list(places) for places in finder(data.texts)]
    rows = []
    for kind in kinds:
        gold = {(i, *place) for i, places in enumerate(data.places) for place in places if place[2] == kind}
        guessed = {(i, *place) for i, places in enumerate(guesses) for place in places if place[2] == kind}
        right, covered = len(gold & guessed), 0
        for i, start, end, _ in gold:
            covered += len({c for a, b, _ in guesses[i] for c in range(max(a, start), min(b, end))})
        recall = right / max(len(gold), 1)
        precision = right / max(len(guessed), 1)
        f1 = 2 * precision * recall / max(precision + recall, 1e-9)
        share = covered / max(sum(end - start for _, start, end, _ in gold), 1)
        unknown_precision = kind in only_recall
        numbers = ["" if unknown_precision else _percent(precision), _percent(recall)]
        rows.append([kind, str(len(gold)), *numbers, "" if unknown_precision else _percent(f1), _percent(share)])
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def tagger(study: Study) -> Experiment:
    """The tagger of names."""
    phases = (Phase("everything", steps=study.ner_steps),)
    sources = tuple(dataclasses.replace(source, limit=study.limit) for source in NER.sources)
    return dataclasses.replace(NER, only=("wnut17", "tweebank"), phases=phases, sources=sources)


def tweets(study: Study, way: str) -> Path:
    """The directory with the tweets of TASK in one of WAYS, and their labels; written once.

    Args:
        study: The study; its tagger is trained.
        way: One of WAYS.
    """
    folder = Path(study.workdir) / "texts" / way.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        for part in ("labels", "text"):
            file = assets.locate(f"data:tweeteval/{TASK}/{split}_{part}.txt")
            target = folder / f"{split}_{part}.txt"
            if target.exists():
                continue
            if part == "text" and way != WAYS[0]:
                names = f"{study.workdir}/ner:wnut17"
                print(f"{way} {split}: {mtl_jax.deidentify(str(file), target, mode=way, names=names, format='lines')}")
            else:
                target.write_bytes(file.read_bytes())
    return folder


def emotions(study: Study, folder: Path, seed: int) -> Experiment:
    """Emotion of tweets, learned by a small embedding from the texts in a directory."""
    source = Source(
        name=TASK,
        path=f"{folder}/train_{{text,labels}}.txt",
        dev_path=f"{folder}/val_{{text,labels}}.txt",
        test_path=f"{folder}/test_{{text,labels}}.txt",
        format="parallel",
        limit=study.limit,
    )
    return dataclasses.replace(
        TWEETS,
        name="emotions",
        trunk=Embedding(dimension=100),
        sources=(source,),
        only=(TASK,),
        phases=(Phase("everything", steps=study.steps),),
        optimizer=Optimizer(name="adam", learning_rate=3e-3),
        batch=Batching(rows=32, row_length=64),
        evaluation=Evaluation(every=50),
        seed=seed,
    )


def run(study: Study) -> str:
    """Trains what is not trained, measures, and returns the tables.

    Raises:
        UserError: A part is unknown, or a package or data set is missing.
    """
    for part in study.parts:
        if part not in PARTS:
            raise unknown("parts", part, PARTS)
    for way in study.ways:
        if way not in WAYS:
            raise unknown("ways", way, WAYS)
    folder = Path(study.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    mtl_jax.train(tagger(study), folder / "ner")
    tables = []
    head = ["type", "places", "precision", "recall", "F1", "characters found"]
    model = mtl_jax.load_model(folder / "ner")
    if "planted" in study.parts:
        data = plant(study.mails)
        kinds = list(dict.fromkeys(place[2] for places in data.places for place in places))
        finders = {"ours": ours(audit.people_of(model, "wnut17")), **presidio(kinds)}
        rows = [
            [name, *row] for name, finder in finders.items() for row in measured(finder, data, kinds, only_recall=NAME_KINDS)
        ]
        tables.append(("Planted in mails", ["by", *head], rows))
    if "names" in study.parts:
        for task in ("wnut17", "tweebank"):
            data = annotated(task, study.limit)
            finders = {"our tagger": ours(audit.people_of(model, task), ()), **peers()}
            rows = [[name, *row] for name, finder in finders.items() for row in measured(finder, data, NAME_KINDS)]
            tables.append((f"Names in {task}", ["by", *head], rows))
    if "cost" in study.parts:
        tables.append(
            ("Emotion of tweets, macro-F1", ["trained on texts", "tested on these", "tested as they are"], cost(study))
        )
    text = "\n\n".join(
        f"{name}\n\n{tabulate.tabulate(rows, head, 'github', disable_numparse=True)}" for name, head, rows in tables
    )
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    return text


def cost(study: Study) -> list[list[str]]:
    """A row for each way: the metric on test rows of the same kind, and on test rows as they are; mean over seeds."""
    rows = []
    plain = f"{tweets(study, WAYS[0])}/test_{{text,labels}}.txt"
    for way in study.ways:
        folder, same, raw = tweets(study, way), [], []
        for seed in study.seeds:
            workdir = Path(study.workdir) / f"{way.replace(' ', '_')}-{seed}"
            results = mtl_jax.train(emotions(study, folder, seed), workdir)["tasks"][TASK]
            same.append(100 * number_of(results["test"][results["metric"]]))
            raw.append(100 * mtl_jax.evaluate(workdir, TASK, plain)[results["metric"]])
        rows.append([way, _cell(same), _cell(raw)])
    return rows


def _cell(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    mtl_jax.run(lambda: print(run(tyro.cli(Study, description=__doc__))))
