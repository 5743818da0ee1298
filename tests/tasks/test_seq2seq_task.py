import dataclasses

import jax
import numpy as np
import packing
import pytest
import tiny
import tiny_translation
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax import Batching, Embedding, Pretrained, Seq2Seq
from mtl_jax.core.errors import UserError
from mtl_jax.data.batches import eval_batches
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source_arrays import source_arrays
from mtl_jax.data.stream import single_phase, stream
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.tasks import losses
from mtl_jax.tasks.seq2seq import shift_right
from mtl_jax.training import results
from mtl_jax.training.setup import prepare


@pytest.fixture(scope="module")
def bert(deep):
    return deep


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    tiny_translation.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(pairs):
    return prepare(tiny_translation.experiment(pairs))


def shifted_by_hand(targets, segments, start):
    read, position = np.zeros_like(targets), np.zeros_like(targets)
    for r, u in np.ndindex(targets.shape):
        first = u == 0 or segments[r, u] != segments[r, u - 1]
        read[r, u] = start if first else targets[r, u - 1]
        position[r, u] = 0 if first else position[r, u - 1] + 1
    return read, position


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 4))
def test_each_text_is_read_one_place_later(lengths, padding):
    segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])[None]
    targets = np.arange(10, 10 + segments.size)[None]
    read, position = jax.jit(shift_right, static_argnums=2)(targets, segments, 7)
    for found, expected in zip((read, position), shifted_by_hand(targets, segments, 7), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_target_texts_stand_beside_their_sources(prepared):
    """Every text of the training rows, read back out of the batches."""
    train, (task, _) = prepared.corpus.splits["train"]["pairs"], prepared.corpus.tasks
    tokenizer, found = prepared.trunk.tokenizer, {}
    for batch in eval_batches([train], prepared.experiment.batch, prepared.corpus.tasks):
        tokens, segments = batch.labels["translation"][..., 0], batch.labels["translation"][..., 1]
        assert batch.labels["translation"].shape == (8, 24, 2)
        np.testing.assert_array_equal(tokens == -1, segments == -1)
        for r, s in zip(*np.nonzero(batch.index >= 0), strict=True):
            found[int(batch.index[r, s])] = tokens[r][segments[r] == s + 1]
    assert sorted(found) == list(range(len(train.tokens)))
    assert any(row.columns["translation"] is None for row in train.data)
    for i, row in enumerate(train.data):
        if row.columns["translation"] is None:
            assert not len(found[i])
        else:
            assert found[i][-1] == task.end
            assert tokenizer.decode(found[i], skip_special_tokens=True) == row.columns["translation"]


@pytest.mark.parametrize("places", [24, 32, 100])
def test_rows_are_full_by_whichever_text_is_longer(prepared, places):
    batching = dataclasses.replace(prepared.experiment.batch, target_length=places)
    part = source_arrays(prepared.corpus.splits["train"]["pairs"], prepared.corpus.tasks)
    room = part.packing_lengths(batching)
    targets = part.labels["translation"].lengths
    np.testing.assert_array_equal(
        room, [max(s, int(np.ceil(t * 32 / places))) for s, t in zip(part.lengths, targets, strict=True)]
    )
    data = stream(prepared.corpus, batching, 0, single_phase(batching, 10))
    for _ in range(10):
        batch = next(data)
        assert batch.labels["translation"].shape == (8, places, 2)
        # No text is lost: the end of each text that has one.
        ends = (batch.labels["translation"][..., 0] == prepared.corpus.tasks[0].end).sum()
        labelled = {part.first_id + i for i in np.flatnonzero(targets)}
        assert ends == sum(int(i) in labelled for i in batch.index.ravel())
    data.close()


@pytest.mark.parametrize("places", [24, 100])
def test_chosen_examples_have_room_for_their_targets(prepared, places):
    """As in a round of self-training, which reads some examples of a source alone."""
    batching = dataclasses.replace(prepared.experiment.batch, target_length=places)
    part = source_arrays(prepared.corpus.splits["train"]["pairs"], prepared.corpus.tasks)
    chosen = np.flatnonzero(part.labels["translation"].lengths)[::2]
    np.testing.assert_array_equal(part.only(chosen).packing_lengths(batching), part.packing_lengths(batching)[chosen])
    data = stream(prepared.corpus, batching, 0, single_phase(batching, 10))
    data.keep({"pairs": chosen}, before=())
    for _ in range(10):
        batch = next(data)
        ends = (batch.labels["translation"][..., 0] == prepared.corpus.tasks[0].end).sum()
        assert ends == sum(int(i) - part.first_id in chosen for i in batch.index.ravel())
    data.close()


def test_packing_changes_nothing(pairs):
    packing.assert_packing_changes_nothing(prepare(tiny_translation.experiment(pairs)))


def test_packing_changes_nothing_with_rows_of_another_length(pairs, monkeypatch):
    for name in ("PACKED", "UNPACKED"):
        monkeypatch.setattr(packing, name, dataclasses.replace(getattr(packing, name), target_length=26))
    packing.assert_packing_changes_nothing(prepare(tiny_translation.experiment(pairs)))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_by_hand(prepared, smoothing):
    """Each text by itself, all logits at once, a log softmax."""
    task = dataclasses.replace(prepared.corpus.tasks[0], label_smoothing=smoothing)
    module, trunk, params = task.module(), prepared.trunk.module, prepared.params
    batch = packing.whole(prepared, packing.PACKED)
    head, table = params["heads"]["translation"], params["trunk"]["embeddings"]["word"]["embedding"]
    apply = jax.jit(trunk.apply)
    hidden = apply(
        {"params": params["trunk"]},
        batch.tokens,
        batch.segments > 0,
        position_ids=batch.positions,
        segment_ids=batch.segments,
    ).hidden
    outputs = np.asarray(jax.jit(task.apply)(head, Encoded(tokens=hidden, table=table), batch, None))

    @jax.jit
    def logits_of(source, read):
        encoded = apply({"params": params["trunk"]}, source).hidden
        return module.apply({"params": head}, encoded, read, method=lambda m, x, y: m(y, m.source(x, None, None), table)).logits

    texts = 0
    for r, s in list(zip(*np.nonzero(batch.index >= 0), strict=True))[:8]:
        source = batch.tokens[r][batch.segments[r] == s + 1][None]
        mine = batch.labels["translation"][r, :, 1] == s + 1
        target = batch.labels["translation"][r, mine, 0]
        if not len(target):
            continue
        texts += 1
        logits = np.asarray(logits_of(source, np.array([[task.start, *target[:-1]]]))[0], np.float64)
        log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        own = -log[np.arange(len(target)), target]
        loss = (1 - smoothing) * own - smoothing * log.mean(axis=1)
        right = log.argmax(axis=1) == target
        np.testing.assert_allclose(outputs[r, mine], np.stack([loss, own, right], axis=1), atol=1e-4)
    assert texts > 5
    found, count = task.loss(outputs, batch.labels["translation"], batch)
    np.testing.assert_allclose(found, outputs[..., 0].sum(), rtol=1e-5)
    assert count == (batch.labels["translation"][..., 0] >= 0).sum()


def test_logits_of_a_few_places_at_a_time(prepared, monkeypatch):
    """The same numbers and gradient; and no array of the program has R * U * V numbers."""
    task, batch = (
        prepared.corpus.tasks[0],
        packing.whole(prepared, dataclasses.replace(packing.PACKED, rows=40, target_length=25)),
    )
    params = prepared.params
    table = params["trunk"]["embeddings"]["word"]["embedding"]
    hidden = jax.random.normal(jax.random.key(0), (*batch.tokens.shape, 16))

    def loss(head, hidden, table):
        outputs = task.apply(head, Encoded(tokens=hidden, table=table), batch, None)
        return task.loss(outputs, batch.labels["translation"], batch)[0]

    def gradients():
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(params["heads"]["translation"], hidden, table)

    whole = jax.jit(gradients)()
    R, U, V = *batch.labels["translation"].shape[:2], len(table)
    memory = {U: jax.jit(gradients).lower().compile().memory_analysis().temp_size_in_bytes}
    for chunk in (1, 7, 24):
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", R * V * chunk)
        # Not the function of before: what was traced for that is kept.
        found = jax.jit(lambda: gradients()).lower().compile()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), whole, found())
        memory[chunk] = found.memory_analysis().temp_size_in_bytes
    assert memory[1] < memory[7] < memory[U]
    assert memory[U] - memory[1] > 4 * R * U * V


def test_metrics_by_hand():
    task = Seq2Seq(name="t", source="s", column="c")
    outputs = [np.array([[9, np.log(2), 1], [9, np.log(8), 0]]), np.zeros((0, 3)), np.array([[9, np.log(4), 1]])]
    assert task.metrics(outputs, None) == {"token_accuracy": pytest.approx(2 / 3), "perplexity": pytest.approx(4.0)}


def test_the_first_sentence_is_what_a_writer_is_compared_with(prepared):
    """Of rows with a target. Where texts are measured by tokens there is nothing to compare."""
    task = Seq2Seq(name="t", source="s", column="c", metric="rouge1")
    rows = [Row({"c": "one two"}, "1"), Row({"c": None}, "2"), Row({"c": ["nine", "five six"]}, "3")]
    texts = ["One two three four. Nine", "five six", "Five six! One two."]
    assert task.lead(texts, rows)["rouge1"] == pytest.approx((2 / 3 + 1) / 2)  # 2 of 4 and 2 of 2; all of the nearest
    assert dataclasses.replace(task, metric="token_accuracy").lead(texts, rows) is None
    assert task.lead(texts[1:2], rows[1:2]) is None

    corpus, sources = prepared.corpus, prepared.experiment.sources
    found = results.compute_baselines(corpus, sources, "constant", None)
    rows = corpus.splits["test"]["pairs"].data
    expected = corpus.tasks[0].text_metrics([row.columns["text"] for row in rows], rows)
    assert found["translation"] == {"lead": expected}
    assert list(found["long"]) == ["constant"]
    assert results.compute_baselines(corpus, sources, "none", None) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "blue"}, "unknown metric of task 't': 'blue' .did you mean 'bleu'.*"),
        ({"beams": 0}, "task 't': beams is 0; it must be at least 1"),
        ({"target_length": 1}, "task 't': target_length is 1; it must be at least 2"),
        ({"label_smoothing": 1.0}, "task 't': label_smoothing is 1.0; it is a share below 1"),
        ({"hidden": 3}, "task 't': hidden is 3; a decoder has no such layer, leave it at 0"),
        ({"begin": "decoder"}, "task 't': begin is 'decoder'; it is one of fresh, encoder"),
        ({"table": "mine"}, "task 't': table is 'mine'; it is one of trunk, own"),
    ],
)
def test_fields_that_make_no_sense(change, message):
    with pytest.raises(UserError, match=message):
        Seq2Seq(**({"name": "t", "source": "s", "column": "c"} | change)).check()


def test_rows_without_room_for_the_longest_target(pairs):
    with pytest.raises(UserError, match=r"task 'translation': target_length is 24, but rows have room for 20 target tokens"):
        prepare(tiny_translation.experiment(pairs, batch=Batching(rows=8, row_length=20)))


def test_long_targets_are_cut_counted_and_shown(pairs):
    experiment = tiny_translation.experiment(pairs)
    short = dataclasses.replace(experiment.tasks[0], target_length=3)
    found = prepare(dataclasses.replace(experiment, tasks=(short,)))
    lengths = found.corpus.splits["train"]["pairs"].labels["translation"].lengths
    assert lengths.max() == 3
    (note,) = [note for note in found.notes if "cut to 3 tokens" in note]
    assert note.startswith("task translation: ")
    targets = found.corpus.splits["train"]["pairs"].labels["translation"]
    assert all(target[-1] == found.corpus.tasks[0].end for target in targets if len(target))


def test_a_trunk_whose_tokenizer_ends_no_text(pairs):
    with pytest.raises(UserError, match="a decoder needs a trunk whose tokenizer ends texts with a special token"):
        prepare(tiny_translation.experiment(pairs, trunk=Embedding(100, 8)))


@pytest.mark.parametrize("places", [pytest.param(24, marks=pytest.mark.long), 70])
def test_a_fresh_decoder_on_an_encoder_checkpoint(pairs, shallow, places, monkeypatch):
    """It has as many positions as a target text, whatever the rows have."""
    for name in ("PACKED", "UNPACKED"):
        monkeypatch.setattr(packing, name, dataclasses.replace(getattr(packing, name), target_length=places))
    found = prepare(tiny_translation.experiment(pairs, trunk=Pretrained(str(shallow))))
    task = found.corpus.tasks[0]
    assert (task.start, task.end, task.leading) == (2, 3, 1)  # [CLS] and [SEP]
    targets = found.corpus.splits["train"]["pairs"].labels["translation"]
    assert all(target[-1] == 3 and target[0] != 2 for target in targets if len(target))
    tasks = tuple(dataclasses.replace(task, dropout=0.0) for task in tiny_translation.experiment(pairs).tasks)
    still = tiny_translation.experiment(pairs, trunk=Pretrained(str(shallow), dropout=0.0), tasks=tasks)
    packing.assert_packing_changes_nothing(prepare(still))


def test_a_decoder_that_begins_as_the_encoder(pairs, bert):
    plain = tiny_translation.experiment(pairs).tasks
    tasks = (dataclasses.replace(plain[0], begin="encoder", dropout=0.0), plain[1])
    found = prepare(tiny_translation.experiment(pairs, trunk=Pretrained(str(bert), dropout=0.0), tasks=tasks))
    task, params = found.corpus.tasks[0], found.params
    sizes = task.decoder
    assert (sizes.decoder_layers, sizes.decoder_heads, sizes.max_positions) == (tiny.LAYERS, tiny.HEADS, 25)
    for name in ("attention", "cross_attention"):
        ours, theirs = params["heads"]["translation"]["layer_0"][name], params["trunk"]["layer_0"]["attention"]
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    packing.assert_packing_changes_nothing(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 9}, f"layers is 9; the encoder has {tiny.LAYERS}"),
        ({"heads": 2}, "heads is 2; it is the encoder's, leave it out"),
        ({"table": "own"}, "table is 'own'; such a decoder reads the trunk's table: leave it out"),
        ({"max_new_tokens": 300}, "texts of 300 tokens and a start are longer than the encoder's"),
    ],
)
def test_what_it_takes_from_the_encoder(pairs, bert, change, message):
    task = dataclasses.replace(tiny_translation.experiment(pairs).tasks[0], begin="encoder", **change)
    with pytest.raises(UserError, match=f"task 'translation': begin is \"encoder\", but {message}"):
        prepare(tiny_translation.experiment(pairs, trunk=Pretrained(str(bert)), tasks=(task,)))


def test_a_trunk_from_scratch_of_another_make_is_no_such_encoder(pairs):
    task = dataclasses.replace(tiny_translation.experiment(pairs).tasks[0], begin="encoder")
    with pytest.raises(UserError, match="this trunk is not a checkpoint of BERT, RoBERTa, XLM-R, DistilBERT or ELECTRA"):
        prepare(tiny_translation.experiment(pairs, tasks=(task,)))


def test_target_texts_of_a_row():
    task = Seq2Seq(name="t", source="s", column="c")
    for value, expected in (
        ("le chat", ("le chat",)),
        (None, None),
        ("  ", None),
        ([], None),
        (["le chat", None, "un chat"], ("le chat", "un chat")),
    ):
        assert task.parse(Row({"c": value}, "file:1")) == expected
    with pytest.raises(ValueError, match=r"column 'c' has \[\['le'\]\]; a text is needed, or a list of texts"):
        task.parse(Row({"c": [["le"]]}, "file:1"))
    with pytest.raises(UserError, match=r"file:1: source 's' has no column 'c' for task 't'; columns: d"):
        task.parse(Row({"d": "x"}, "file:1"))
