"""The command and of_experiment(): features of all kinds of tasks, runs as sources, notes, and one implementation for both."""

import dataclasses
import doctest
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import finished_runs
import jax
import jax.numpy as jnp
import numpy as np
import own_parts
import pytest
import tiny

import mtl_jax
from mtl_jax import Classification, MaskedLM, Source, Tagging, UserError, affinity
from mtl_jax.affinity import copied_rows, pair_tables, source_models, task_features
from mtl_jax.affinity.pair_tables import NotApplicable, input_of, tables
from mtl_jax.cli import main, scripts
from mtl_jax.core import files, trees
from mtl_jax.inference.predict import open_run
from mtl_jax.training.setup import prepare
from mtl_jax.transfer import adapters

WORDS = tiny.GOOD + tiny.BAD + tiny.OTHER


def with_words(bert, data):
    """The tiny experiment, with a source of tagged words beside its two."""
    random = np.random.default_rng(0)
    texts = [random.choice(WORDS, random.integers(2, 9)).tolist() for _ in range(60)]
    rows = [{"text": text, "tags": ["N" if word in tiny.OTHER else "A" for word in text]} for text in texts]
    base = tiny.experiment(bert, data)
    tags = Tagging(name="tags", source="words", metric="token_accuracy")
    return dataclasses.replace(base, sources=(*base.sources, Source(name="words", rows=rows)), tasks=(*base.tasks, tags))


@pytest.fixture(scope="module")
def words(deep, data):
    return prepare(with_words(deep, data))


@pytest.fixture(scope="module")
def hidden(words):
    """The trunk's vectors f[length, H] of a text alone, from its token ids."""
    params = {"params": words.params["trunk"]}
    apply = jax.jit(lambda ids, mask: words.trunk.module.apply(params, ids, mask).hidden)

    def vectors(ids):
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(apply(padded, np.arange(24)[None] < len(ids)))[0, : len(ids)]

    return vectors


def test_features_are_the_means_of_the_trunks_vectors(words, hidden):
    read = affinity.features(words, rows=20, seed=1)
    assert list(read) == ["rating", "coarse", "fine", "tags"]
    for name in ("rating", "coarse"):
        arrays = read[name]
        assert arrays.features.shape == arrays.texts.shape == (20, tiny.HIDDEN)
        np.testing.assert_array_equal(arrays.text_of_row, np.arange(20))
        for number in (0, 7, 19):
            np.testing.assert_allclose(arrays.features[number], hidden(arrays.tokens[number]).mean(axis=0), atol=1e-5)
    assert read["rating"].labels.dtype == np.float64
    assert read["coarse"].labels.dtype == np.int64
    train = words.corpus.splits["train"]["ratings"]
    labels = {ids.tobytes(): label for ids, label in zip(train.tokens, train.labels["rating"], strict=True)}
    expected = [labels[ids.tobytes()] for ids in read["rating"].tokens]
    np.testing.assert_array_equal(read["rating"].labels, expected)


def test_words_have_the_vectors_of_their_first_tokens(words, hidden):
    arrays = affinity.features(words, ["tags"], rows=30)["tags"]
    assert arrays.features.shape == (30, tiny.HIDDEN)
    assert (np.diff(arrays.text_of_row) >= 0).all()
    position = 0
    whole = affinity.features(words, ["tags"], rows=1000)["tags"]
    for text, ids in enumerate(whole.tokens[:5]):
        count = len(ids) - 2  # each word is a token, between [CLS] and [SEP]
        np.testing.assert_allclose(whole.features[position : position + count], hidden(ids)[1:-1], atol=1e-5)
        np.testing.assert_array_equal(whole.text_of_row[position : position + count], text)
        tags = [tiny.WORDS[token] in tiny.OTHER for token in ids[1:-1]]
        np.testing.assert_array_equal(whole.labels[position : position + count], tags)  # A, N
        position += count


def test_layers(words):
    output, first, last = (affinity.features(words, ["coarse"], layer=n, rows=10)["coarse"].features for n in (0, 1, 2))
    np.testing.assert_allclose(last, output, atol=1e-6)
    assert np.abs(first - output).max() > 0.1
    with pytest.raises(UserError, match="layer is 3; the trunk has the layers 1 to 2, and 0 is its output"):
        affinity.features(words, layer=3)
    bag = mtl_jax.Embedding(dimension=4).module(9, jnp.float32)
    assert task_features.layers(bag) == []


def test_adapters_do_nothing_before_training(words, deep, data):
    adapted = dataclasses.replace(with_words(deep, data), adapters=(mtl_jax.Lora(name="lora", rank=2),))
    plain = affinity.features(words, ["fine"], rows=10)["fine"].features
    np.testing.assert_allclose(affinity.features(adapted, ["fine"], rows=10)["fine"].features, plain, atol=1e-6)
    module = adapters.adapt(words.trunk.module, [mtl_jax.Lora(name="lora", rank=2)])
    trunk = task_features.make_trunk(module, module.add(words.params["trunk"], jax.random.key(0)), 1)
    assert trunk.params.keys() >= {"adapters", "layer_0"}


def mean_loss(words, trunk, task, params, head, batches):
    sums = []
    for batch in batches:
        output = trunk.encode(params, batch._replace(labels={}))
        sums.append(task.loss(task.apply(head, output, batch, None), batch.labels[task.name], batch))
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def test_a_head_is_fitted_and_a_task_is_a_vector(words):
    """The embedding against the mean of squared gradients, example by example."""
    tasks = {task.name: task for task in words.corpus.tasks}
    trunk = task_features.before_training(words)
    embed = source_models.make_embed(trunk)
    vectors = {}
    for name in ("tags", "coarse"):
        task = tasks[name]
        examples = task_features.sample(task, words.corpus.splits["train"][task.source], 6, 0)
        batches = task_features.labelled_batches(task, examples, words.experiment.batch)
        fresh = words.params["heads"][name]
        head = source_models.fit_head(task, fresh, batches, task_features.encoded(trunk, batches))
        before, after = (mean_loss(words, trunk, task, trunk.params, params, batches) for params in (fresh, head))
        assert after < 0.5 * before
        vectors[name] = embed(task, head, examples, words.experiment.batch)
    single = dataclasses.replace(words.experiment.batch, packed=False, rows=1)
    gradient = jax.jit(jax.grad(lambda params, batch: mean_loss(words, trunk, task, params, head, [batch])))
    gradients = [gradient(trunk.params, batch) for batch in task_features.labelled_batches(task, examples, single)]
    squares = {path: 0.0 for path in trees.flat(trunk.params) if not path.endswith("embedding")}
    for path in squares:
        squares[path] = np.mean([np.asarray(trees.flat(gradient)[path]) ** 2 for gradient in gradients], axis=0)
    np.testing.assert_allclose(vectors["coarse"], affinity.task_embedding(squares), rtol=1e-3, atol=1e-12)
    assert 0 < affinity.task_similarity(vectors["coarse"], vectors["tags"]) < 1


def test_every_kind_of_task_gets_what_applies_to_it(words, monkeypatch):
    monkeypatch.setattr("mtl_jax.affinity.experiment_affinity.prepare", lambda experiment: words)
    result = affinity.of_experiment(words.experiment, rows=24, resamples=5)
    assert list(result.rankings) == ["rating", "coarse", "fine", "tags"]
    assert list(result.rankings["coarse"]) == ["leep", "nce", "text_similarity", "vocabulary_overlap", "task_similarity"]
    assert list(result.rankings["rating"]) == ["text_similarity", "vocabulary_overlap", "task_similarity"]
    assert [estimate.source for estimate in result.rankings["coarse"]["leep"]] == ["fine"]
    assert set(result.untrained["rating"]) == {"logme", "linear_probe", "knn"}
    assert set(result.untrained["tags"]) == set(affinity.ESTIMATORS) - {
        *("leep", "nce", "esm", "text_similarity", "vocabulary_overlap", "task_similarity"),
        *("grad_tag", "gradient_cosine", "tag"),
    }
    for ranking in result.rankings["tags"].values():
        assert {estimate.source for estimate in ranking} == {"rating", "coarse", "fine"}
    notes = "\n".join(result.notes)
    assert (
        "n_leep, esm: coarse, fine, tags, rating: no finished run by --runs, and before training the features are the" in notes
    )
    assert "leep, nce: rating: Regression has no probabilities of classes" in notes
    assert "tags for coarse, tags for fine, coarse for tags, fine for tags: one labels texts, the other words" in notes
    assert (
        "h_score, regularised_h_score, transrate, n_leep, leep, nce: rating: labels has dtype float64; integers are needed"
        in notes
    )
    low_and_high = [(e.low, e.value, e.high) for e in result.rankings["fine"]["vocabulary_overlap"]]
    assert all(low <= value <= high for low, value, high in low_and_high)
    assert np.isnan(result.rankings["fine"]["task_similarity"][0].low)  # nothing of it is an array over rows
    assert result.rows["tags"] == 24
    assert {"features", "heads", "embeddings", "logme"} <= result.seconds.keys()
    for target, advice in result.advice.items():
        assert advice.source == next(iter(affinity.mean_places([*result.rankings[target].values()])))
    assert result.advice["coarse"].source == "fine"  # it has the same texts, and is first in every ranking
    assert result.copies["fine"] == {"coarse": affinity.SourceCopies({}, result.copies["fine"]["coarse"].of, same_rows=True)}
    assert affinity.table(result).startswith("copies: ")
    assert "copies: fine labels the rows of coarse" in affinity.table(result).splitlines()
    assert json.loads(files.to_json(result.as_json()))["rankings"]["coarse"]["leep"][0]["source"] == "fine"


def test_a_masked_lm_is_a_source_of_texts(data, tmp_path):
    tiny.write_bert(tmp_path, layers=1)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")) | {"mask_token": "[UNK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tasks = (MaskedLM(name="mlm", source="ratings"), Classification(name="coarse", source="questions", column="coarse"))
    prepared = prepare(tiny.experiment(tmp_path, data, tasks=tasks))
    built = tables(prepared, ["embedding"], ["coarse"], rows=10, layer=0, runs=(), seed=0)
    assert built.arrays["mlm"].labels is None
    assert input_of("source_texts", "mlm", "coarse", built).shape == (10, tiny.HIDDEN)
    for name, message in (
        ("source_embedding", "mlm: no head of a MaskedLM can be fitted to features alone"),
        ("source_gradients", "mlm: an example of a MaskedLM has no cross-entropy or squared error of its own"),
        ("probabilities", "mlm: MaskedLM has no probabilities of classes"),
    ):
        with pytest.raises(NotApplicable, match=message):
            input_of(name, "mlm", "coarse", built)
    with pytest.raises(NotApplicable, match="mlm: the labels of MaskedLM are neither classes nor numbers"):
        input_of("labels", "coarse", "mlm", built)


def test_runs_are_sources_with_features_of_their_own(bert, data, workdir):
    experiment = tiny.experiment(bert, data)
    names = ["logme", "leep", "esm", "linear_probe", "n_leep", "grad_tag", "tag"]
    result = affinity.of_experiment(experiment, "fine", names, rows=40, runs=[workdir], resamples=4, layer=1)
    ranking = result.rankings["fine"]
    assert list(ranking) == names[:-1]
    assert (
        "tag: rating for fine, coarse for fine: no run by --runs has both tasks under a rule that compares" in result.notes[-1]
    )
    assert {estimate.source for estimate in ranking["logme"]} == {"rating", "coarse"}
    assert {estimate.source for estimate in ranking["grad_tag"]} == {"rating", "coarse"}  # one run has all three
    assert np.isnan(ranking.pop("grad_tag")[0].low)
    assert all(estimate.low <= estimate.high for estimates in ranking.values() for estimate in estimates)
    model = mtl_jax.load_model(workdir)
    arrays = affinity.features(experiment, ["fine"], rows=40)["fine"]
    answers = model.predict("coarse", [" ".join(tiny.WORDS[i] for i in ids[1:-1]) for ids in arrays.tokens], top_k=2)
    probabilities = [
        [{top["label"]: top["probability"] for top in answer["top"]}[label] for label in ("HUM", "LOC")] for answer in answers
    ]
    leep = {estimate.source: estimate.value for estimate in ranking["leep"]}["coarse"]
    assert affinity.leep(probabilities, arrays.labels) == pytest.approx(leep, abs=1e-4)
    [line] = [line for line in result.notes if line.startswith("leep")]
    assert line == "leep: rating: Regression has no probabilities of classes"


def console(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mtl-jax", *arguments])
    try:
        main.console()
    except SystemExit as stopped:
        return stopped.code, capsys.readouterr()
    return 0, capsys.readouterr()


OWN = """
from mtl_jax import affinity

@affinity.register("longest")
def longest(source_tokens, tokens):
    '''Minus the difference of the longest texts.'''
    return -abs(max(map(len, source_tokens)) - max(map(len, tokens)))
"""


def test_the_command_and_the_function_are_one(bert, data, tmp_path, monkeypatch, capsys):
    (tmp_path / "bert").symlink_to(bert)
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    monkeypatch.setenv("TINY", str(tmp_path))
    flags = ["--target", "rating", "--rows", "32", "--estimators", "longest", "text_similarity", "logme", "--json"]
    written = tmp_path / "affinity.json"
    try:
        command = ["affinity", tiny.__file__, "--import", str(tmp_path / "mine.py"), *flags, str(written), "--", "--seed", "3"]
        code, output = console(monkeypatch, capsys, *command)
        assert code == 0, output.err
        result = affinity.of_experiment(
            tiny.experiment(bert, data, seed=3), "rating", ["longest", "text_similarity", "logme"], rows=32
        )
    finally:
        affinity.ESTIMATORS._functions.pop("longest", None)
    stored = json.loads(written.read_text(encoding="utf-8"))
    for field in ("rankings", "places", "untrained", "advice", "notes", "rows"):
        assert stored[field] == json.loads(files.to_json(result.as_json()))[field], field
    assert "| target rating" in output.out
    assert "logme: coarse, fine: no finished run by --runs" in output.out
    assert "--only rating --init-from.path runs/" in output.out
    assert f"everything is in {written}" in output.out
    first, second = result.advice["rating"].flags
    for flags, only in ((first, (result.advice["rating"].source,)), (second, ("rating",))):
        with scripts.given(shlex.split(flags)):
            assert scripts.read(tiny.__file__).only == only
    joint = affinity.advise("rating", "fine", 10, 20)
    with scripts.given(shlex.split(joint.flags[0])):
        assert scripts.read(tiny.__file__).only == ("rating", "fine")
    source_of = {"rating": "ratings", "coarse": "questions", "fine": "questions"}
    by_weights, by_shares = affinity.starting_points("rating", {"fine": 0.0, "coarse": 0.25}, source_of)
    with scripts.given(shlex.split(by_weights)):
        read = scripts.read(tiny.__file__)
        assert (read.weighting, read.weights) == ("fixed", {"rating": 1.0, "fine": 1.0, "coarse": 0.75})
    with scripts.given(shlex.split(by_shares)):
        batch = scripts.read(tiny.__file__).batch
        assert (batch.mixture, batch.shares) == ("fixed", {"ratings": 1.0, "questions": 1.0})
    assert affinity.starting_points("rating", {"fine": 0.0, "coarse": 0.5}, source_of) == ()


def rows_of(*texts):
    """Examples of a source, as far as copies are looked for in them."""
    return SimpleNamespace(data=[SimpleNamespace(columns=columns, where="") for columns in texts])


def test_copies_between_tasks_are_named():
    """Texts of pairs one by one, the closest kind of each row; held-out rows of the target, but not those of the source."""
    long = "the old man and the sea is a film of a man and a fish"
    train = {
        "pairs": rows_of({"a": "A good film !", "b": "who"}, {"a": long, "b": "it rains"}, {"a": "so", "b": "what"}),
        "single": rows_of({"a": "the sea"}, {"a": "IT  RAINS"}),
    }
    test = {
        "pairs": rows_of({"a": "the sea", "b": "x"}),
        "single": rows_of({"a": "a good film"}, {"a": long.replace("old", "young")}),
    }
    sources = [Source(name="pairs", path="p", text="a", pair="b"), Source(name="single", path="s", text="a")]
    tasks = {"nli": "pairs", "topic": "single", "mood": "single"}
    copies = affinity.source_copies(sources, tasks, {"train": train, "test": test}, ["topic", "nli"])
    assert copies["topic"]["nli"] == affinity.SourceCopies({"exact": 1, "letters": 1, "near": 0}, 3)
    assert copies["topic"]["mood"].same_rows
    assert copies["nli"]["topic"] == affinity.SourceCopies({"exact": 2, "letters": 0, "near": 0}, 2)
    lines = copied_rows.lines(copies)
    assert lines[0] == "copies: 2 of 3 training rows of nli have a text of topic (1 exact, 1 letters)"
    assert lines[-1] == "copies: such a source looks better than it is; mtl-jax audit SCRIPT shows the rows"
    assert copied_rows.lines({}) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--estimators", "logmee"], "unknown estimator 'logmee' (did you mean 'logme'?)"),
        (["--target", "fin"], "unknown task 'fin' (did you mean 'fine'?); choices: rating, coarse, fine"),
        (["--rows", "0"], "rows is 0; it must be at least 1"),
        (["--resamples", "-1"], "resamples is -1; it must not be negative"),
        (["--runs", "nowhere"], "--runs: nowhere is not the workdir of a run"),
        (["--json", "nowhere/affinity.json"], "--json nowhere/affinity.json: name a file in a directory that exists"),
        (
            ["--models", "2"],
            "models is 2: groups need the gains of grad_tag for every target; give a finished run of all tasks",
        ),
        (["--", "--only", "fine"], "the experiment has one task, fine; a source and a target are needed"),
    ],
)
def test_bad_flags_are_one_line(bert, data, tmp_path, monkeypatch, capsys, flags, message):
    (tmp_path / "bert").symlink_to(bert)
    (tmp_path / "data").symlink_to(data)
    monkeypatch.setenv("TINY", str(tmp_path))
    code, output = console(monkeypatch, capsys, "affinity", tiny.__file__, *flags)
    assert (code, output.err.count("error:")) == (2, 1)
    assert message in output.err


def test_runs_that_do_not_fit(bert, data, workdir):
    experiment = tiny.experiment(bert, data)
    with pytest.raises(UserError, match="both have the task 'rating'; name one of them"):
        affinity.of_experiment(experiment, "fine", ["logme"], rows=8, runs=[workdir, workdir])
    others = tuple(dataclasses.replace(task, name=f"my_{task.name}") for task in experiment.tasks)
    with pytest.raises(
        UserError, match="has the tasks rating, coarse, fine; none of them is one of my_rating, my_coarse, my_fine"
    ):
        affinity.of_experiment(dataclasses.replace(experiment, tasks=others), "my_fine", ["logme"], rows=8, runs=[workdir])
    trunk = mtl_jax.Embedding(dimension=8)
    with pytest.raises(UserError, match="has another vocabulary than the trunk of the experiment"):
        affinity.of_experiment(tiny.experiment(bert, data, trunk=trunk), "fine", ["logme"], rows=8, runs=[workdir])


def test_an_estimator_must_return_a_number(words, monkeypatch):
    monkeypatch.setattr("mtl_jax.affinity.experiment_affinity.prepare", lambda experiment: words)
    try:
        affinity.register("whole")(lambda texts: texts)
        result = affinity.of_experiment(words.experiment, "fine", ["whole"], rows=8)
    finally:
        affinity.ESTIMATORS._functions.pop("whole", None)
    assert result.notes == ["whole: fine: it returned a ndarray; an estimator must return one number"]


def test_examples_of_docstrings(bert, data):
    names = {"mtl_jax": mtl_jax, "EXPERIMENT": tiny.experiment(bert, data)}
    for function in (affinity.features, affinity.of_experiment):
        [test] = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs=dict(names))
        assert not doctest.DocTestRunner().run(test).failed


def test_the_example_of_an_own_estimator(tmp_path, monkeypatch, capsys):
    script = str(own_parts.FOLDER / "estimator.py")
    flags = ["--estimators", "proxy_a_distance", "text_similarity", "--rows", "32", "--resamples", "4"]
    try:
        code, output = console(monkeypatch, capsys, "affinity", script, *flags, "--", *own_parts.data_flags(tmp_path / "data"))
        estimator = affinity.ESTIMATORS["proxy_a_distance"]
    finally:
        affinity.ESTIMATORS._functions.pop("proxy_a_distance", None)
        sys.modules.pop("two_tasks", None)
    assert code == 0, output.err
    assert "| proxy_a_distance" in output.out
    random = np.random.default_rng(0)
    texts = random.normal(size=(60, 4))
    assert estimator(texts, texts + 100) == -2
    assert estimator(random.normal(size=(60, 4)), texts) > -1


def test_the_guide_runs(bert, data):
    """Every Python block of the page, one after another, and every name in it."""
    page = (Path(__file__).parents[2] / "docs" / "affinity.md").read_text(encoding="utf-8")
    names = {"EXPERIMENT": tiny.experiment(bert, data)}
    try:
        for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
            exec(compile(block, "affinity.md", "exec"), names)
    finally:
        affinity.ESTIMATORS._functions.pop("length_match", None)
    assert names["grouping"].optimal
    rows = re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(affinity.ESTIMATORS)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "adapter", [mtl_jax.Lora(name="lora", rank=2), mtl_jax.PromptTuning(name="prompt", length=2)], ids=lambda part: part.name
)
def test_features_have_the_adapters_that_init_from_loads(deep, data, tmp_path, adapter, layer):
    plain = tiny.experiment(deep, data)
    adapted = dataclasses.replace(plain, adapters=(adapter,), batch=dataclasses.replace(plain.batch, packed=False))
    finished_runs.write(tmp_path / "run", adapted)
    init = mtl_jax.InitFrom(str(tmp_path / "run"), subtree="trunk")
    loaded = dataclasses.replace(adapted, init_from=init)
    features = affinity.features(loaded, ["fine"], rows=6, layer=layer)["fine"].features
    without = affinity.features(adapted, ["fine"], rows=6, layer=layer)["fine"].features
    assert np.abs(features - without).max() > 0.01

    # As of the finished run's own trunk.
    run = open_run(tmp_path / "run")
    trunk = task_features.make_trunk(run.trunk.module, run.params["trunk"], layer)
    task, corpus = task_features.task_of(prepare(adapted), "fine"), prepare(adapted).corpus
    examples = task_features.sample(task, corpus.splits["train"][task.source], 6, 0)
    batches = task_features.labelled_batches(task, examples, adapted.batch)
    expected = task_features.read(task, examples, batches, task_features.encoded(trunk, batches), 6, 0).features
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_parts_of_tasks_that_init_from_loads_are_left_out_in_a_line(deep, data, tmp_path, caplog):
    own = dataclasses.replace(tiny.experiment(deep, data), sharing=mtl_jax.sharing.TopLayers(own=1))
    finished_runs.write(tmp_path / "run", own)
    loaded = dataclasses.replace(own, init_from=mtl_jax.InitFrom(str(tmp_path / "run")))
    with caplog.at_level("INFO"):
        trunk = task_features.before_training(prepare(loaded))
    assert "adapters" not in trunk.params
    assert f"without sharing of {tmp_path / 'run'}, which are of single sources or tasks" in caplog.text


def test_a_new_prompt_is_left_out_in_a_line(deep, data, caplog):
    prompt = mtl_jax.PromptTuning(name="prompt", length=2)
    plain = tiny.experiment(deep, data)
    with caplog.at_level("INFO"):
        task_features.before_training(
            prepare(dataclasses.replace(plain, adapters=(prompt,), batch=dataclasses.replace(plain.batch, packed=False)))
        )
    assert "without its new prompt, which changes the output before it trains" in caplog.text


def test_gradients_are_of_one_program_for_a_run_and_of_rows_by_seed(bert, data, workdir, monkeypatch):
    made = []

    def make_linear_rows(trunk, seed=0):
        made.append(seed)
        return lambda task, head, batches: np.zeros((2, 3), np.float32)

    monkeypatch.setattr(pair_tables, "make_linear_rows", make_linear_rows)
    prepared = prepare(tiny.experiment(bert, data))
    built = tables(prepared, ["gradients"], ["fine"], rows=6, layer=0, runs=[workdir], seed=5)
    assert set(built.gradients) == {("rating", "fine"), ("coarse", "fine")}
    assert made == [5]
