"""Made rows in a run: of training rows alone, the same for every order and number of processes, counted and shown."""

import dataclasses
import json
import typing
from collections import Counter

import jax
import numpy as np
import pytest
import tiny

import mtl_jax
from mtl_jax import Batching, Classification, Contrastive, MultipleChoice, Source, Tagging, UserError
from mtl_jax.augment import (
    Aeda,
    BackTranslation,
    CharacterNoise,
    Concatenate,
    Cutoff,
    Eda,
    Generate,
    MaskedNeighbours,
    MentionReplacement,
    Mix,
    NeighbourSmoothing,
    Paraphrase,
    Written,
)
from mtl_jax.core import parts
from mtl_jax.data import Augmentation, augmentations, corpus, made_rows
from mtl_jax.data.redraw import Room
from mtl_jax.data.source_batches import batches_of
from mtl_jax.pretrained import load_tokenizer
from mtl_jax.training.experiment_json import from_json, to_json
from mtl_jax.training.restore import open_run

WORDS = tiny.GOOD + tiny.BAD + tiny.OTHER
ROWS = [
    {"text": " ".join(WORDS[(3 * n + m * (1 + n % 5)) % len(WORDS)] for m in range(4 + n % 5)), "label": "ab"[n % 2]}
    for n in range(60)
]
TASK = Classification(name="c", source="s", column="label")
BATCHING = Batching(rows=4, row_length=24, examples_per_row=6)


def source(*augment, rows=ROWS, **fields):
    return Source("s", rows=rows, augment=augment, **fields)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tiny.write_bert(folder)
    return load_tokenizer(folder)


def stream_of(tokenizer, *augment, seed=0, **fields):
    return batches_of(source(*augment, **fields), TASK, tokenizer=tokenizer, batching=BATCHING, seed=seed)


def texts_of(batch):
    """{(example, tokens)} of a batch."""
    return {
        (int(batch.index[row, slot]), tuple(batch.tokens[row][batch.segments[row] == slot + 1].tolist()))
        for row in range(len(batch.tokens))
        for slot in range(batch.index.shape[1])
        if batch.index[row, slot] >= 0
    }


def test_every_pass_draws_anew_and_a_stream_resumes(tokenizer):
    stream = stream_of(tokenizer, Eda(share=1.0))
    batches = [next(stream) for _ in range(6)]
    state = stream.get_state()
    after = [next(stream) for _ in range(12)]
    stream.set_state(state)
    for batch, again in zip(after, [next(stream) for _ in range(12)], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(batch[:5], again[:5], strict=True))
        assert np.array_equal(batch.made, again.made)
    stream.close()
    by_example = {}
    for batch in batches + after:
        for example, tokens in texts_of(batch):
            by_example.setdefault(example, []).append(tokens)
    assert np.mean([len(set(versions)) > 1 for versions in by_example.values() if len(versions) > 2]) > 0.9
    made, unchanged = sum(batch.made.sum(axis=0) for batch in batches + after)
    assert made > 4 * unchanged
    plain = next(stream_of(tokenizer))
    assert plain.made is None


def test_a_draw_follows_from_the_text_and_not_from_its_place(tokenizer):
    """The same rows in another order: in the same pass each has the same made text; labels stay with their text."""

    def made(rows, seed):
        declared = source(Eda(share=1.0), rows=rows, cut_dev=0.2, cut_test=0.2)
        added = made_rows.add([declared], [TASK], corpus.read_sources([declared], [TASK]))
        data = corpus.make_corpus([declared], [TASK], added.data, tokenizer, 24)
        options = {"tokenizer": tokenizer, "token_rows": 99, "max_length": 24, "seed": 0}
        redraw = corpus.with_augmentations(data, [declared], (), added, **options).redraws["s"]
        total = len(redraw.rows)
        new, _ = redraw.made(np.arange(total), np.full(total, 3), seed)
        return {old.columns["text"]: row.columns for old, row in zip(redraw.rows, new, strict=True)}

    # Words that Eda draws are those of the rows, in sorted order.
    first, turned = made(ROWS, 0), made(ROWS[::-1], 0)
    assert first == turned != made(ROWS, 1)
    labels = {row["text"]: row["label"] for row in ROWS}
    assert all(columns["label"] == labels[text] for text, columns in first.items())
    assert sum(columns["text"] != text for text, columns in first.items()) > 0.9 * len(first)


@pytest.mark.long
def test_worker_processes_make_the_same(tokenizer):
    batches = []
    for workers in (0, 2):
        batching = dataclasses.replace(BATCHING, workers=workers)
        stream = batches_of(source(Eda()), TASK, tokenizer=tokenizer, batching=batching)
        batches.append([next(stream) for _ in range(8)])
        stream.close()
    for one, two in zip(*batches, strict=True):
        assert np.array_equal(one.tokens, two.tokens)
        assert np.array_equal(one.made, two.made)


def test_rows_are_full_and_never_too_long(tokenizer):
    """What does not fit beside the others of its row stays as it was, and is counted."""
    stream = stream_of(tokenizer, Aeda(share=1.0, most=1.0))
    batches = [next(stream) for _ in range(10)]
    stream.close()
    redraw = stream._plan.sources[0].redraw
    assert redraw.planned(np.array([4, 20, 24]), 24).tolist() == [6, 24, 24]
    assert all((batch.segments > 0).sum(axis=1).max() <= 24 for batch in batches)
    made, unchanged = sum(batch.made.sum(axis=0) for batch in batches)
    assert 0 < unchanged < made
    arrays, tickets = stream._plan.sources[0], np.arange(12)
    rows = np.repeat([0, 1], 6)
    no_room = redraw(arrays, tickets, rows, Room(1, 1), 0)
    assert no_room.made[:, 0].sum() == 0
    assert [list(a) for a in no_room.tokens] == [list(arrays.tokens[n]) for n in range(12)]


PLAIN = [word for word in WORDS if word not in "?."]  # without the marks that Aeda puts in
PAIRS = [
    {
        "text": " ".join(PLAIN[(n * 7 + m * (n % 8 + 1)) % len(PLAIN)] for m in range(4 + n % 5)),
        "other": f"{PLAIN[n % len(PLAIN)]} {PLAIN[n // len(PLAIN)]} film",
        "no": "" if n % 3 else "who is",
    }
    for n in range(60)
]
CONTRASTIVE = Contrastive(name="c", source="s", negatives=("no",))
CHOICES = [row | {"right": str(n % 2)} for n, row in enumerate(PAIRS)]
CHOICE = MultipleChoice(name="c", source="s", choices=("other", "no", "more"), column="right")
SEVERAL = {
    "contrastive": (CONTRASTIVE, PAIRS, "other"),
    "choices": (CHOICE, [row | {"no": "who is", "more": ""} for row in CHOICES], ""),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_row_of_several_texts_is_made_whole(tokenizer, kind):
    """A pair with its negative, and a question with its choices: all examples of a row are from the made row, or none."""
    task, rows, pair = SEVERAL[kind]
    batching = Batching(rows=4, row_length=90, examples_per_row=9)

    def batches(*augment):
        stream = batches_of(source(*augment, rows=rows, pair=pair), task, tokenizer=tokenizer, batching=batching)
        made = [next(stream) for _ in range(20)]
        stream.close()
        return made

    def examples(batch):
        """{example: [(tokens, label)]} of a batch, in order."""
        found = {}
        for row, slot in zip(*np.nonzero(batch.index >= 0), strict=True):
            tokens = batch.tokens[row][batch.segments[row] == slot + 1].tolist()
            found.setdefault(int(batch.index[row, slot]), []).append((tokens, batch.labels["c"][row, slot].tolist()))
        return found

    plain = {example: versions[0] for batch in batches() for example, versions in examples(batch).items()}
    marks = {tokenizer.unk_token_id, *tokenizer.convert_tokens_to_ids(["?", "."])}
    changed = counted = unchanged = 0
    for batch in batches(Aeda(share=1.0)):
        found = examples(batch)
        for example, versions in found.items():
            for number, (tokens, label) in enumerate(versions):
                old_tokens, old_label = plain[example]
                assert [token for token in tokens if token not in marks] == old_tokens
                assert label[:2] == old_label[:2]
                first = example - example % 3
                changed += any(found[n][number][0] != plain[n][0] for n in range(first, first + 3))
                if kind == "choices":
                    end = tokens.index(tokenizer.sep_token_id)
                    assert tokens[:end] == found[first][number][0][:end]  # the same question
        assert not (batch.made % 3).any()
        counted, unchanged = counted + batch.made[:, 0].sum(), unchanged + batch.made[:, 1].sum()
    assert changed == counted > 4 * unchanged


def test_several_texts_without_room_stay_as_they_were(tokenizer):
    batching = Batching(rows=4, row_length=90, examples_per_row=9)
    declared = source(Aeda(share=1.0), rows=PAIRS, pair="other")
    stream = batches_of(declared, CONTRASTIVE, tokenizer=tokenizer, batching=batching)
    next(stream)
    stream.close()
    arrays = stream._plan.sources[0]
    for tickets, room in ((np.arange(12), 1), (np.array([0, 1, 2, 4, 3, 5, 6, 7]), 90)):
        found = arrays.redraw(arrays, tickets, np.zeros(len(tickets), int), Room(room, 1), 0)
        kept = slice(None) if room == 1 else slice(3, None)  # out of their order, or not all of a row
        assert [list(tokens) for tokens in found.tokens][kept] == [list(arrays.tokens[n]) for n in tickets][kept]
        assert found.made[kept].tolist() == [[0, 1]] * len(found.made[kept])


def test_rows_in_several_windows_are_counted_in_the_log(tokenizer):
    """They stay as they are; all of them, here."""
    rows = [{"text": f"{row['text']} " * 9, "tags": "O " * (9 * len(row["text"].split()))} for row in PAIRS]
    declared, task = source(Aeda(share=1.0), rows=rows), Tagging(name="t", source="s")
    added = made_rows.add([declared], [task], corpus.read_sources([declared], [task]))
    data = corpus.make_corpus([declared], [task], added.data, tokenizer, 24)
    options = {"tokenizer": tokenizer, "token_rows": 99, "max_length": 24, "seed": 0}
    notes = corpus.with_augmentations(data, [declared], (), added, **options).notes
    total = len(added.data["s"].rows["train"])
    assert f"source s: {total} of {total} rows are read in several windows and stay as they are" in notes


@pytest.fixture
def planted():
    """An augmentation of a script's own, which records what it sees, and always makes the text of a dev row."""
    with parts.forgotten():

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Plant(Augmentation):
            seen: typing.ClassVar[list[str]] = []
            text: str = ""

            def maker(self, source):
                def make(rows, generators):
                    self.seen.extend(row.columns["text"] for row in rows)
                    return [row._replace(columns={**row.columns, "text": self.text}) for row in rows]

                return make

        yield Plant


def test_nothing_is_made_of_dev_or_test_and_none_of_their_texts(planted, tokenizer):
    read = corpus.read_sources([source()], [TASK])["s"].rows
    held_out = {row.columns["text"] for split in ("dev", "test") for row in read[split]}
    dev = read["dev"][0].columns["text"]
    with pytest.raises(UserError, match=r"source 's': Plant made no row that can be trained on \(\d+ held out\)"):
        stream_of(tokenizer, planted(share=1.0, added=1, text=dev.upper()))
    stream = stream_of(tokenizer, planted(share=1.0, text=dev), Aeda(share=0.5))
    batch = next(stream)
    stream.close()
    assert planted.seen
    assert not held_out & set(planted.seen)
    assert batch.made[:, 0].sum() == 0 < batch.made[:, 1].sum() < batch.made[:, 2].sum()
    assert dev not in {row.columns["text"] for row in read["train"]}


def test_added_rows_stand_behind_the_others_and_are_counted(tokenizer):
    declared = source(Aeda(share=0.5, added=2), Cutoff(share=1.0, added=1, cut=0.2), Eda())
    added = made_rows.add([declared], [TASK], corpus.read_sources([declared], [TASK]))
    plain = corpus.read_sources([source()], [TASK])["s"]
    train, digests = added.data["s"].rows["train"], added.data["s"].text_digests["train"]
    assert [row.columns for row in train[: len(plain.rows["train"])]] == [row.columns for row in plain.rows["train"]]
    assert len(train) == len(digests) == len(set(digests))
    assert added.data["s"].rows["dev"] == corpus.read_sources([declared], [TASK])["s"].rows["dev"]
    numbers = added.counts["s"]
    assert sum(n["made"] for n in numbers.values()) == len(train) - len(plain.rows["train"])
    assert numbers.keys() == {"Aeda", "Cutoff"}
    data = corpus.make_corpus([declared], [TASK], added.data, tokenizer, 24)
    options = {"tokenizer": tokenizer, "token_rows": 99, "max_length": 24, "seed": 0}
    data = corpus.with_augmentations(data, [declared], (), added, **options)
    assert data.describe()["augmented"] == {"s": {"added": numbers, "in_passes": ["Eda"]}}
    shown = [note for note in data.notes if " -> " in note]
    assert 10 < len(shown) <= 20
    assert all(note.startswith(("source s: Aeda of ", "source s: Cutoff of ", "source s: Eda of ")) for note in shown), shown
    assert train[len(plain.rows["train"])].where.endswith(" (Aeda 1)")


def test_augmentations_of_the_run_and_config_json():
    plain = tiny.experiment("bert", "data")
    assert "augment" not in to_json(plain)
    assert "augment" not in to_json(plain)["sources"][0]
    own = dataclasses.replace(plain.sources[0], augment=(Eda(share=0.25),))
    experiment = dataclasses.replace(plain, sources=(own, *plain.sources[1:]), augment=(Aeda(added=1),))
    values = json.loads(json.dumps(to_json(experiment)))
    assert values["sources"][0]["augment"][0] | {"kind": "Eda", "share": 0.25} == values["sources"][0]["augment"][0]
    assert from_json(values) == experiment
    every_kind = (Eda(), Aeda(), CharacterNoise(), Cutoff(), Concatenate(), MentionReplacement(), Written(path="a", added=2))
    models = (MaskedNeighbours(model="m"), BackTranslation(forward_command=("f", "-x"), back="b"), Paraphrase(model="p"))
    every_kind = (*every_kind, *models, Generate(model="m", classifier="c"))
    everything = dataclasses.replace(plain, augment=every_kind, regularisers=(Mix(at="hidden", layer=1), NeighbourSmoothing()))
    assert from_json(json.loads(json.dumps(to_json(everything)))) == everything
    assert augmentations.names(augmentations.of_source(own, experiment.augment)) == ["Eda", "Aeda"]
    assert augmentations.names((Aeda(), Eda(), Aeda())) == ["Aeda_0", "Eda", "Aeda_2"]
    with pytest.raises(UserError, match=r"augment.0 \(Aeda\): most is 3; it must be"):
        augmentations.check([own], plain.tasks, [Aeda(most=3)])
    planted = dataclasses.replace(own, canaries=mtl_jax.Canaries(count=1))
    with pytest.raises(UserError, match="has canaries, which must stay as they are"):
        augmentations.check([planted], plain.tasks)


def test_tags_in_batches_are_those_of_the_made_words(tokenizer):
    rows = [
        {"text": f"{good} man {other} city was {other}", "tags": ["O", "B-X", "O", "B-Y", "O", "O"]}
        for good in tiny.GOOD + tiny.BAD
        for other in tiny.OTHER[:5]
    ]
    task = Tagging(name="t", source="s")
    stream = batches_of(source(Eda(share=1.0), rows=rows), task, tokenizer=tokenizer, batching=BATCHING)
    batch = next(stream)
    labels = dict(zip(stream._plan.tasks[0].labels, range(9), strict=False))
    stream.close()
    vocabulary = tokenizer.get_vocab()
    assert batch.made[:, 0].sum() > 5
    tagged = Counter(zip(batch.tokens.ravel().tolist(), batch.labels["t"].ravel().tolist(), strict=True))
    words = {"B-X": "man", "B-Y": "city"}
    for tag, word in words.items():
        assert {token for token, label in tagged if label == labels[tag]} == {vocabulary[word]}


@pytest.mark.long
def test_a_run_that_is_stopped_ends_like_one_that_is_not(tmp_path):
    """Rows of every pass, added rows and mixing: the same parameters, and the same records of every step."""
    tiny.write_bert(tmp_path / "bert")
    tiny.write_data(tmp_path / "data")
    plain = tiny.experiment(tmp_path / "bert", tmp_path / "data", only=("rating",), regularisers=(Mix(at="hidden", layer=1),))
    ratings = dataclasses.replace(plain.sources[0], augment=(Eda(), Aeda(share=0.3, added=1)))
    experiment = dataclasses.replace(plain, sources=(ratings, *plain.sources[1:]))

    def stop(step, record):
        if step == 7:
            raise RuntimeError("stop")

    whole = mtl_jax.train(experiment, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stop"):
        mtl_jax.train(experiment, tmp_path / "parts", hooks=mtl_jax.Hooks(after_metrics=stop))
    resumed = mtl_jax.train(experiment, tmp_path / "parts")
    assert resumed["augmented"] == whole["augmented"]
    assert whole["augmented"]["ratings"]["Eda"] > 50
    for file in ("metrics.jsonl", "data.json"):
        assert (tmp_path / "parts" / file).read_text() == (tmp_path / "whole" / file).read_text()
    assert len(json.loads((tmp_path / "whole" / "data.json").read_text())["augmented"]["ratings"]["added"]) == 1
    runs = [open_run(tmp_path / name, "last") for name in ("whole", "parts")]
    assert all(np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(run.params) for run in runs), strict=True))
