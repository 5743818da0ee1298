"""Rows that models write: by commands, models and runs, kept where they are similar and where a classifier agrees."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import mtl_jax
from mtl_jax import Classification, Source, Tagging, UserError
from mtl_jax.augment import BackTranslation, Generate, Paraphrase, writers
from mtl_jax.core.row_texts import hiding
from mtl_jax.data import augmentations, corpus, made_rows
from mtl_jax.data.formats.rows import Row

TASK = Classification(name="c", source="s", column="label")
WORDS = ["good", "bad", "fine", "poor", "great", "sad"]
ROWS = [{"text": f"one {word} film", "label": "ab"[n % 2]} for n, word in enumerate(WORDS)]


def program(line):
    """A command that writes for each line what the expression makes of it."""
    return (sys.executable, "-c", f"import sys\nfor line in sys.stdin:\n    line = line.rstrip()\n    print({line})")


def made(augmentation, rows=ROWS, pair=""):
    source = Source("s", rows=[], pair=pair)
    about = augmentations.rows_of(source, [TASK], [Row(row, f"f:{n}") for n, row in enumerate(rows)])
    return augmentation.maker(about)(about.rows, [np.random.default_rng(n) for n in range(len(rows))])


def test_there_and_back_by_commands():
    back = BackTranslation(
        forward_command=program("line.upper() if 'sad' not in line else ''"),
        back_command=program("'the ' + line.lower()"),
        encoder="",
    )
    rows = made(back, [*ROWS, ROWS[0] | {"label": "c"}])
    assert [row if isinstance(row, str) else row.columns["text"] for row in rows] == [
        *(f"the {row['text']}" for row in ROWS[:-1]),
        "empty",
        "the one good film",
    ]
    assert rows[-1].columns["label"] == "c"
    pairs = made(back, [{"text": "a\nb", "other": "c", "label": "a"}, {"text": "a", "other": "sad", "label": "b"}], "other")
    assert pairs[0].columns == {"text": "the a b", "other": "the c", "label": "a"}
    assert pairs[1] == "empty"


def test_commands_that_fail_are_one_line():
    where = "source 's': BackTranslation: forward_command: "
    for command, line in (
        ((sys.executable, "-c", "import sys; sys.exit('no such language')"), r"ended with exit code 1 \(no such language\)"),
        ((sys.executable, "-c", "print('a')"), "wrote 1 line for 6 texts; it must write one for each, in order"),
        ((sys.executable, "-c", "import sys; sys.stdout.buffer.write(bytes([255, 10]) * 6)"), "wrote what is not UTF-8"),
    ):
        with pytest.raises(UserError, match=f"{where}.*{line}"):
            made(BackTranslation(forward_command=command, back_command=command, encoder=""))
    with hiding(True), pytest.raises(UserError, match=r"ended with exit code 1 \(\)"):
        made(Paraphrase(model_command=(sys.executable, "-c", "import sys; sys.exit('a text')"), encoder=""))
    # Arguments are those of the program, and no shell reads them.
    echo = (*program("line + sys.argv[1]"), "; exit 1 $HOME")
    assert made(Paraphrase(model_command=echo, encoder=""))[0].columns["text"] == "one good film; exit 1 $HOME"


def test_models_get_their_texts_in_one_order_and_one_seed(monkeypatch):
    calls = []
    monkeypatch.setattr(writers.pretrained, "load", lambda path: path)

    def translate(model, texts, *, seed, **options):
        calls.append((model, tuple(texts), seed, options))
        return [f"{text} ." for text in texts]

    monkeypatch.setattr(mtl_jax, "translate", translate)
    options = {"forward": "en-de", "back": "de-en", "language": "en", "pivot": "de", "encoder": "", "max_new_tokens": 9}
    assert made(BackTranslation(**options))[0].columns["text"] == "one good film . ."
    (first, texts, seed, given), (second, *_) = calls
    assert (first, second, texts) == ("en-de", "de-en", tuple(sorted(row["text"] for row in ROWS)))
    search = {"do_sample": True, "top_p": 0.9, "num_beams": 1, "max_new_tokens": 9}
    assert given == {**search, "source_language": "en", "target_language": "de"}
    about = augmentations.rows_of(Source("s", rows=[]), [TASK], [Row(row, "f") for row in ROWS[::-1]])
    generators = [np.random.default_rng(n) for n in range(len(ROWS))][::-1]
    BackTranslation(**options, top_p=0.0).maker(about)(about.rows, generators)
    assert calls[2][1:3] == (texts, seed)
    assert calls[2][3]["do_sample"] is False


@pytest.fixture
def classifier(tmp_path, monkeypatch):
    """A run that finds label a in texts with good, fine or great, and is not sure of great."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data.json").write_text("{}", encoding="utf-8")

    def predict(task, rows, top_k):
        found = [[word in row["words"] for word in ("good", "fine", "great")] for row in rows]
        return [{"top": [{"label": "b A"[2 * any(f)], "probability": 0.6 if f[2] else 0.95}]} for f in found]

    task = dataclasses.replace(TASK, name="judge", labels=("a", "b"), label_names={"a": "A"})
    run = SimpleNamespace(tasks=[task], task=lambda name: task, source=lambda name: Source("x", rows=[], text="words"))
    monkeypatch.setattr(mtl_jax, "load_model", lambda path: SimpleNamespace(run=run, predict=predict))
    return str(tmp_path / "run")


def test_generated_texts_are_kept_where_a_classifier_agrees(classifier):
    words = program(
        "{'a good': 'such a good film', 'a fine': 'a sad one', 'a great': 'great', 'b bad': 'how bad'}.get(line, '')"
    )
    rows = made(Generate(model_command=words, prompt="{label} {word}", classifier=classifier), [
        {"text": "x", "label": label, "word": word}
        for label, word in (("a", "good"), ("a", "fine"), ("a", "great"), ("b", "bad"), ("b", "sad"))
    ])  # fmt: skip
    assert [row if isinstance(row, str) else row.columns["text"] for row in rows] == [
        "such a good film",
        "of another label by the classifier",
        "not sure by the classifier",
        "how bad",
        "empty",
    ]
    rows = [row | {"text": f"{row['text']} {n}"} for n, row in enumerate(ROWS * 9)]
    source = Source("s", rows=rows, augment=(Generate(model_command=program("''"), classifier=classifier),))
    with pytest.raises(UserError, match=r"source 's': Generate made no row that can be trained on \(\d+ empty\)"):
        made_rows.add([source], [TASK], corpus.read_sources([source], [TASK]))
    with pytest.raises(UserError, match="unknown column in prompt of source 's': Generate: 'lable'"):
        made(Generate(model_command=words, prompt="{lable}", classifier=classifier))
    with pytest.raises(UserError, match="has judge as classification tasks; name one"):
        made(Generate(model_command=words, classifier=f"{classifier}:other"))
    with pytest.raises(UserError, match="unknown classification task of source 's': Generate: 'd'"):
        made(Generate(model_command=words, classifier=classifier, task="d"))


def test_a_decoder_only_checkpoint_continues_the_prompt_until_a_line_ends(tmp_path, classifier, monkeypatch):
    import tiny_decoder

    tiny_decoder.write_llama(tmp_path / "llama")
    path = tmp_path / "llama" / "tokenizer.json"
    path.write_text(path.read_text().replace('"film"', '"\\n"'))
    calls, generate = [], mtl_jax.generate

    def answer(model, texts, **options):
        calls.append(options)
        written = generate(model, texts, **options)
        assert all(isinstance(text, str) for text in written)
        return ["so fine" for _ in written]

    monkeypatch.setattr(mtl_jax, "generate", answer)
    prompt = "the {label} :\n- {text}\n-"
    written = made(Generate(model=str(tmp_path / "llama"), prompt=prompt, classifier=classifier, max_new_tokens=6))
    assert [row.columns["text"] for row in written[::2]] == ["so fine"] * 3
    ends = {tiny_decoder.WORDS.index(word) for word in ("[SEP]", "film")}
    assert set(calls[0]["eos_token_id"]) == ends
    assert calls[0]["max_new_tokens"] == 6


GENERATED = [{"text": f"one film of {n}", "label": ["good", "bad"][n % 2]} for n in range(20)]


def texts_from_labels(rows, **options):
    """The different texts that Generate adds, by a prompt that is the same for all rows of a label."""
    entry = Generate(prompt="the {label}", **options)
    source = Source("s", rows=[])
    about = augmentations.rows_of(source, [TASK], [Row(row, f"f:{n}") for n, row in enumerate(rows)])
    return {made.row.columns["text"] for made in made_rows.make(source, about, [entry], frozenset(), {})}


def test_each_row_has_a_draw_of_its_own(tmp_path, classifier, monkeypatch, caplog):
    """It follows from the row: not from its place, nor from the rows that are made at once."""
    import tiny_decoder

    tiny_decoder.write_llama(tmp_path / "llama")
    monkeypatch.setattr(Generate, "_agrees", lambda self, *about: list)
    options = {"model": str(tmp_path / "llama"), "classifier": classifier, "max_new_tokens": 6}
    texts = texts_from_labels(GENERATED, **options)
    assert len(texts) > 15
    assert len(texts_from_labels(GENERATED, **options, seed=1) & texts) < 5
    assert texts < texts_from_labels(GENERATED, **options, added=2)
    monkeypatch.setattr(made_rows, "AT_ONCE", 7)
    assert texts_from_labels(GENERATED[::-1], **options) == texts
    assert "top_p" not in caplog.text
    assert len(texts_from_labels(GENERATED, **options, top_p=0.0)) <= 2
    (line,) = [record.message for record in caplog.records if "top_p" in record.message]
    assert line == (
        "source 's': Generate: top_p is 0, so a prompt has one text: at most 2 different texts for 20 rows; raise top_p"
    )


def test_a_command_gets_the_prompt_of_each_row(classifier, monkeypatch):
    monkeypatch.setattr(Generate, "_agrees", lambda self, *about: list)
    command = (sys.executable, "-c", "import sys\nfor n, line in enumerate(sys.stdin): print(line.strip(), n)")
    texts = texts_from_labels(GENERATED, model_command=command, classifier=classifier)
    assert texts == {f"the {'bad' if n < 10 else 'good'} {n}" for n in range(20)}


def test_tokens_that_end_a_line():
    """As words, as letters of byte-level BPE, and as bytes of a vocabulary that falls back to them."""
    words = models.WordLevel({"[UNK]": 0, "a": 1, "\n": 2, "\n\n": 3, "b\n": 4}, unk_token="[UNK]")
    letters = models.BPE({"a": 0, "\u010a": 1, "\u010a\u010a": 2, "\u0120": 3}, [("\u010a", "\u010a")])
    fallback = models.BPE({"<unk>": 0, "<0x0A>": 1, "<0x41>": 2}, [], unk_token="<unk>", byte_fallback=True)
    kinds = ((words, None), (letters, decoders.ByteLevel()), (fallback, decoders.ByteFallback()))
    found = []
    for model, decoder in kinds:
        tokenizer = Tokenizer(model)
        if decoder is not None:
            tokenizer.decoder = decoder
        found.append(writers.line_ends(PreTrainedTokenizerFast(tokenizer_object=tokenizer)))
    assert found == [[2, 3], [1, 2], [1]]


def test_bad_input_is_one_line(tmp_path, classifier):
    for name, source, target in (("en-de", "en", "de"), ("de-en", "deu", "eng"), ("fr-en", "fr_XX", "en_XX")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
        languages = {"source_lang": source, "target_lang": target}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(languages), encoding="utf-8")
    (tmp_path / "empty").mkdir()
    there, back, other, empty = (str(tmp_path / name) for name in ("en-de", "de-en", "fr-en", "empty"))
    program = (sys.executable,)
    for wrong, words in (
        (BackTranslation(forward=there, back=other), r"back .*fr-en reads fr, and it must be de; name another translator"),
        (BackTranslation(forward=there, back=back, language="fr"), r"forward .*en-de reads en, and it must be fr"),
        (BackTranslation(forward=there, back_command=program, pivot="fr"), r"forward .*en-de writes de, and it must be fr"),
        (BackTranslation(forward=there), "back or back_command must write the texts, and neither is given"),
        (BackTranslation(forward=there, forward_command=program, back=back), "forward or forward_command .* both are given"),
        (BackTranslation(forward=empty, back=back), "empty is neither a checkpoint nor the workdir of a run"),
        (BackTranslation(forward_command=("no-such-program",), back=back), "there is no program no-such-program"),
        (Paraphrase(model_command="python x.py"), "model_command is the text 'python x.py'; it must be a tuple"),
        (Paraphrase(model=there, top_p=2), "top_p is 2; it must be at least 0"),
        (Paraphrase(model=there, similarity=1.5), "similarity is 1.5; it must be a cosine"),
        (Paraphrase(model=there, max_new_tokens=-1), "max_new_tokens is -1"),
        (Paraphrase(model=there, added=0), "added is 0, but a model makes its rows"),
        (Generate(model=there), "classifier is empty; name a run with a classification task"),
        (Generate(model=there, classifier=empty), "classifier .*empty is not the workdir of a run"),
        (Generate(model=there, classifier=classifier, confidence=7), "confidence is 7; it must be at least 0"),
        (
            Generate(model=there, classifier=classifier, prompt="{label"),
            r"prompt '\{label' is not a text with names of columns",
        ),
    ):
        source = Source("s", rows=[], augment=(wrong,))
        with pytest.raises(UserError, match=rf"source 's': augment.0 \(\w+\): .*{words}"):
            augmentations.check([source], [TASK])
    augmentations.check([Source("s", rows=[], augment=(BackTranslation(forward=there, back=back),))], [TASK])
    source = Source("s", rows=[], augment=(Paraphrase(model=there),))
    with pytest.raises(UserError, match=r"\(Paraphrase\) does not fit task 't', a Tagging with labels of words"):
        augmentations.check([source], [Tagging(name="t", source="s")])
