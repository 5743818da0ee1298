"""mtl-jax translate and mtl-jax summarize on tiny random models with real tokenizers."""

import io
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_seq2seq
import tiny_translation
from processes import CONSOLE, Process

from mtl_jax import Evaluation, Phase, decoding, pretrained, train
from mtl_jax.cli import main
from mtl_jax.inference import generate_texts
from mtl_jax.inference.predict import predict

LINES = [*tiny_seq2seq.sentences(tiny_seq2seq.ENGLISH, 40), "", "hello .", "   ", *tiny_seq2seq.sentences(["how", "are"], 3)]
LONG = "the film is good . who is the man ? " * 6


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    return tiny_seq2seq.write_marian(tmp_path_factory.mktemp("models") / "marian")


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return tiny_seq2seq.write_t5(tmp_path_factory.mktemp("models") / "t5")


@pytest.fixture
def console(monkeypatch, capsys):
    """Runs mtl-jax; returns exit code, standard output and standard error."""

    def console(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["mtl-jax", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            main.console()
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return console


def by_hand(folder: Path, text: str, **options) -> str:
    """The translation of one text, written out; padded, so that texts of all lengths share a program."""
    checkpoint = pretrained.load(str(folder))
    inputs = checkpoint.tokenizer([text], padding="max_length", max_length=tiny_seq2seq.POSITIONS)
    tokens, _ = decoding.generate(checkpoint, inputs["input_ids"], inputs["attention_mask"], **options)
    return checkpoint.tokenizer.decode(tokens[0].tolist(), skip_special_tokens=True, use_source_tokenizer=False)


def test_a_text(console, marian):
    code, out, error = console("translate", "--model", marian, "hello , how are you ?")
    assert (code, out) == (0, by_hand(marian, "hello , how are you ?") + "\n"), error
    assert len(out) > 2


def test_lines_keep_their_order_and_count_and_empty_ones_stay_empty(console, marian, tmp_path):
    (tmp_path / "in.txt").write_bytes("\r\n".join(LINES).encode("utf-8-sig"))
    files = ("--file", tmp_path / "in.txt", "--output", tmp_path / "out.txt")
    code, out, error = console("translate", "--model", marian, "--max-new-tokens", "8", "--rows", 4, *files)
    assert (code, out) == (0, ""), error
    assert f"translate {len([line for line in LINES if line.strip()])}/" in error
    found = (tmp_path / "out.txt").read_text(encoding="utf-8").split("\n")
    assert found.pop() == ""
    assert len(found) == len(LINES)
    assert [not line for line in found] == [not line.strip() for line in LINES]
    for place in (0, 7, 41, len(LINES) - 1):
        assert found[place] == by_hand(marian, LINES[place], max_new_tokens=8)
    assert sorted(os.listdir(tmp_path)) == ["in.txt", "out.txt"]
    options = ("--max-new-tokens", "8", "--rows", 4)
    _, piped, _ = console("translate", "--model", marian, *options, stdin="\n".join(LINES).encode())
    assert piped.split("\n")[:-1] == found


def test_an_empty_file(console, marian, tmp_path):
    (tmp_path / "in.txt").write_text("")
    files = ("--file", tmp_path / "in.txt", "--output", tmp_path / "out.txt")
    assert console("translate", "--model", marian, *files)[0] == 0
    assert (tmp_path / "out.txt").read_text() == ""


def test_a_long_line_is_divided_or_cut_and_either_is_said(console, marian):
    """24 positions: four sentences of five tokens, and the end, fit."""
    lines = f"hello .\n{LONG}\n".encode()
    code, out, error = console("translate", "--model", marian, "--max-new-tokens", "5", stdin=lines)
    assert code == 0, error
    assert "-: 1 line of more than 24 tokens, divided at ends of sentences: 2\n" in error
    assert "-: 2 lines with an answer that the length limit ended (--max-new-tokens): 1, 2\n" in error
    first, second = out.splitlines()
    piece = by_hand(marian, LONG[: len(LONG) // 3].strip(), max_new_tokens=5)
    assert second == " ".join([piece] * 3)
    code, out, error = console("translate", "--model", marian, "--max-new-tokens", "5", "--long", "cut", stdin=lines)
    assert "-: 1 line of more than 24 tokens, cut: 2\n" in error
    assert out.splitlines()[0] == first
    assert len(out.splitlines()[1]) < len(second)
    code, out, error = console("translate", "--model", marian, "--max-new-tokens", "5", "film " * 10_000)
    assert code == 0
    assert "1 text of more than 24 tokens, divided at ends of sentences: 1\n" in error


def test_jsonl_keeps_its_fields(console, t5, tmp_path):
    rows = [{"id": 7, "body": "the film is good .\nthe man é"}, {"id": 8, "body": " "}, {"body": "hello", "tags": ["\u2028"]}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "", lines[2]]), encoding="utf-8")
    files = ("--file", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--column", "body")
    code, _, error = console("summarize", "--model", t5, *files, "--scores")
    assert code == 0, error
    written = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")
    assert (len(written), written[3], written[5]) == (6, "", "")
    found = [json.loads(line) for line in written if line]
    assert [list(row) for row in found[1:3]] == [
        ["id", "body", "summary", "summary_score"],
        [*rows[2], "summary", "summary_score"],
    ]
    assert found[1] == rows[1] | {"summary": "", "summary_score": None}
    assert found[2] == found[3]
    assert found[2]["summary_score"] < 0
    code, out, _ = console("summarize", "--model", t5, "--column", "body", "--field", "tldr", stdin=lines[0].encode())
    assert json.loads(out) == rows[0] | {"tldr": found[0]["summary"]}


def test_several_answers_to_a_line_are_a_list(console, marian):
    code, out, error = console("translate", "--model", marian, "--num-return-sequences", "2", "--scores", stdin=b"hello\n\n")
    assert code == 0, error
    first, second = map(json.loads, out.splitlines())
    assert first["text"] == "hello"
    assert len(set(first["translation"])) == len(first["translation_score"]) == 2
    assert second == {"text": "", "translation": "", "translation_score": None}
    code, out, error = console("translate", "--model", marian, "--num-return-sequences", "2", "hello")
    assert (code, out) == (2, "")
    assert "--scores makes lines of JSON" in error


def test_samples_follow_the_seed(console, marian):
    def sample(seed):
        return console("translate", "--model", marian, "--sample", "--top-k", "0", "--seed", seed, *["hello ."] * 3)[1]

    assert sample(0) == sample(0) != sample(1)


def test_a_checkpoint_that_samples_does_not_where_the_user_says_so(console, marian, tmp_path):
    folder = shutil.copytree(marian, tmp_path / "samples")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 0, "temperature": 5.0}))
    texts = ("--num-beams", "1", "--max-new-tokens", "8", *["hello ."] * 3)
    assert len(set(console("translate", "--model", folder, *texts)[1].splitlines())) > 1
    assert (
        console("translate", "--model", folder, "--no-sample", *texts)[1] == console("translate", "--model", marian, *texts)[1]
    )


def test_options_that_change_nothing_are_named(console, marian):
    code, _, error = console(
        *(
            "translate",
            "--model",
            marian,
            "--num-beams",
            "1",
            "--top-p",
            "0.5",
            "--top-k",
            "3",
            "--length-penalty",
            "2",
            "hello",
        )
    )
    assert code == 0
    assert "--top-k, --top-p changes nothing without --sample\n" in error
    assert "--length-penalty changes nothing with one beam\n" in error


def test_a_line_of_which_the_vocabulary_knows_nothing_stays_empty(console, marian):
    """A zero-width space is no blank, but no token either."""
    code, out, error = console("translate", "--model", marian, "--output", "-", stdin="\u200b\nhello .\n".encode())
    assert code == 0, error
    assert "-: 1 line of which the vocabulary knows nothing, left empty: 1\n" in error
    first, second = out.splitlines()
    assert (first, second) == ("", by_hand(marian, "hello ."))


def test_the_user_goes_before_the_task_and_the_task_before_the_checkpoint(console, t5, monkeypatch):
    """What the search is given: T5's task_specific_params, and on top of them what was said."""
    seen = []
    real = decoding.generate_all
    monkeypatch.setattr(decoding, "generate_all", lambda *given, **named: (seen.append(given), real(*given, **named))[1])
    assert console("summarize", "--model", t5, "the film")[0] == 0
    assert (
        console("summarize", "--model", t5, "--num-beams", "1", "--prefix", "", "--early-stopping", "never", "the film")[0] == 0
    )
    (_, _, sources, config), (_, _, bare, said) = seen
    assert (config.num_beams, config.max_length, config.early_stopping) == (4, 12, True)
    assert (said.num_beams, said.max_length, said.early_stopping) == (1, 12, "never")
    tokenizer = pretrained.load_tokenizer(t5)
    assert sources[0].tolist() == tokenizer("summarize: the film")["input_ids"]
    assert bare[0].tolist() == tokenizer("the film")["input_ids"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a translation task and a classification task."""
    folder = tmp_path_factory.mktemp("pairs")
    tiny_translation.write_data(folder)
    experiment = tiny_translation.experiment(folder, phases=(Phase("everything", steps=2),), evaluation=Evaluation(every=2))
    train(experiment, folder / "run")
    return folder / "run"


def test_a_run_translates_as_it_predicts(console, run):
    texts = ["the small dog sees the cat", "", "red fish"]
    code, out, error = console("translate", "--model", run, stdin="\n".join(texts).encode())
    assert code == 0, error
    predicted = predict(run, "translation", texts)
    assert out.split("\n") == [predicted[0]["text"], "", predicted[2]["text"], ""]
    assert len(predicted[0]["text"]) > 2
    _, short, _ = console("translate", "--model", run, "--max-length", "4", "--num-beams", "1", texts[0])
    assert len(short) < len(predicted[0]["text"])
    for flags, message in (
        (("--task", "translatoin"), "unknown task that writes texts 'translatoin' (did you mean 'translation'?); choices: "),
        (("--task", "long"), "unknown task that writes texts 'long'"),
        (("--target-language", "fr"), "a run has no choice of languages"),
        (("--dtype", "bfloat16"), "which computes in the dtype of its training"),
        (("--max-source-tokens", "49"), "the model has 48 positions"),
    ):
        code, out, error = console("translate", "--model", run, *flags, "the dog")
        assert (code, out) == (2, "")
        assert message in error


def test_a_run_that_writes_no_texts_says_what_it_does(console, workdir):
    code, _, error = console("translate", "--model", workdir, "the dog")
    assert code == 2
    assert "no task of this run writes texts; its tasks are rating, coarse, fine" in error


BAD = [
    (["--model", "{marian}", ""], b"", "text 1 is empty; give a text, or --file"),
    (["--model", "{marian}", "a", " "], b"", "text 2 is empty"),
    (["--model", "{marian}", "a", "--file", "{dir}/in.txt"], b"", "give a text, or --file, not both"),
    (["--model", "{marian}", "a", "--column", "text"], b"", "give a text, or --column, not both"),
    (["--model", "{marian}", "--file", "{dir}/none.txt"], b"", "none.txt: No such file or directory"),
    (["--model", "{marian}", "--file", "{dir}"], b"", "Is a directory"),
    (["--model", "{marian}"], b"fine\nbad \xff byte\n", "-:2: not UTF-8 (invalid start byte)"),
    (["--model", "{marian}", "--column", "text"], b'{"text": "x"}\nhello\n', "-:2: not JSON"),
    (
        ["--model", "{marian}", "--column", "text"],
        b'{"text": "x", "n": ' + b"1" * 5000 + b"}",
        "-:1: not JSON (Exceeds the limit",
    ),
    (["--model", "{marian}", "--column", "text"], b'["text"]\n', "-:1: a JSON object is needed, not a list"),
    (["--model", "{marian}", "--column", "text"], b"null\n", "-:1: a JSON object is needed, not null"),
    (["--model", "{marian}", "--column", "text"], b'{"text": null}\n', "-:1: 'text' is null, not a text; the object has text"),
    (["--model", "{marian}", "--column", "text"], b'{"text": true}\n', "-:1: 'text' is true, not a text"),
    (["--model", "{marian}", "--column", "text"], b'{"text": 1.5}\n', "-:1: 'text' is a number, not a text"),
    (["--model", "{marian}", "--column", "text"], b'{"text": {"a": 1}}\n', "-:1: 'text' is an object, not a text"),
    (["--model", "{marian}", "--column", "text"], b"{}\n", "-:1: 'text' is missing; the object has none (choose"),
    (["--model", "{marian}", "--column", "text"], b'{"body": "x"}\n', "-:1: 'text' is missing; the object has body"),
    (
        ["--model", "{marian}", "--column", "text"],
        b'{"text": ["x"]}\n',
        "-:1: 'text' is a list, not a text; the object has text",
    ),
    (["--model", "{marian}", "--column", "text"], b'{"text": "\\ud800"}\n', "-:1: no valid Unicode"),
    (["--model", "{marian}", "--column", "text"], b'{"text": "x", "n": ["\\udfff"]}\n', "-:1: no valid Unicode"),
    (["--model", "{marian}", "--column", "text"], b'{"text": "x", "translation": 1}\n', "there is a 'translation' already"),
    (
        ["--model", "{bert}", "hello"],
        b"",
        "cannot generate texts; a checkpoint of marian, bart, mbart, pegasus, m2m_100, t5, mt5, umt5 is needed",
    ),
    (["--model", "{dir}", "hello"], b"", "config.json is missing"),
    (["--model", "/nowhere", "hello"], b"", "/nowhere: no such file or directory"),
    (["--model", "Helsinki-NLP/opus-mt-en-fr", "hello"], b"", "pass a local directory with the checkpoint's files instead"),
    (["--model", "{marian}", "--num-beams", "0", "hello"], b"", "num_beams is 0"),
    (["--model", "{marian}", "--max-length", "1", "hello"], b"", "max_length is 1"),
    (["--model", "{marian}", "--max-new-tokens", "0", "hello"], b"", "max_new_tokens is 0"),
    (["--model", "{marian}", "--rows", "0", "hello"], b"", "--rows is 0; it must be at least 1"),
    (
        ["--model", "{marian}", "--max-source-tokens", "25", "hello"],
        b"",
        "is 25; the model has 24 positions",
    ),
    (["--model", "{marian}", "--max-source-tokens", "1", "hello"], b"", "1 token leaves no room for the text"),
    (["--model", "{marian}", "--max-source-tokens", "1", "--long", "cut", "hello"], b"", "1 token leaves no room for the text"),
    (["--model", "{marian}", "--seed", "9" * 20, "hello"], b"", "it must be at least 0 and below 2^63"),
    (
        ["--model", "{marian}", "--sample", "--num-beams", "3", "--num-return-sequences", "5", "--scores", "hello"],
        b"",
        "num_return_sequences is 5, more than num_beams, 3: ask for more beams",
    ),
    (["--model", "{marian}", "--task", "x", "hello"], b"", "is not the workdir of a run; leave the flag out"),
    (["--model", "{marian}", "--target-language", "de", "hello"], b"", "--target-language de: it is fr; leave it out"),
    (
        ["--model", "{t5}", "hello"],
        b"",
        "--target-language (en to de, en to fr), or give a --prefix",
    ),
    (["--model", "{marian}", "--output", "{dir}/in.txt", "--file", "{dir}/in.txt"], b"", "the output is the input"),
    (["--model", "{marian}", "--output", "{dir}/no/out.txt", "hello"], b"", "there is no directory"),
    (["--model", "{marian}", "--output", "/proc/out.txt", "hello"], b"", "/proc/out.txt: cannot be written"),
    (["--model", "{marian}", "--output", "{dir}", "hello"], b"", "a directory; the output must be a file"),
]


@pytest.mark.parametrize(("arguments", "stdin", "message"), BAD, ids=[f"{i}: {message}" for i, (*_, message) in enumerate(BAD)])
def test_bad_input_is_one_line_and_earlier_output_is_kept(
    console, marian, t5, bert, tmp_path, monkeypatch, arguments, stdin, message
):
    monkeypatch.setenv("MTL_JAX_OFFLINE", "1")
    (tmp_path / "in.txt").write_text("hello\n")
    (tmp_path / "out.txt").write_text("earlier\n")
    names = {"marian": marian, "t5": t5, "bert": bert, "dir": tmp_path}
    arguments = [argument.format(**names) for argument in arguments]
    output = [] if "--output" in arguments else ["--output", tmp_path / "out.txt"]
    code, out, error = console("translate", *arguments, *output, stdin=stdin)
    assert (code, out) == (2, "")
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert (tmp_path / "out.txt").read_text() == "earlier\n"
    assert (tmp_path / "in.txt").read_text() == "hello\n"
    assert sorted(os.listdir(tmp_path)) == ["in.txt", "out.txt"]


def finished_lines(part: Path) -> int:
    return part.read_bytes().count(b"\n") - 1 if part.exists() else 0


def signal_at(process: Process, part: Path, lines: int, number: int) -> None:
    """Sends a signal as soon as so many lines are done."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if finished_lines(part) >= lines:
            process.send_signal(number)
            return
        time.sleep(0.001)
    raise AssertionError(f"the process ended or hung before line {lines}: {process.communicate()}")


def test_a_killed_process_goes_on_and_the_output_is_that_of_one_that_was_not(marian, tmp_path):
    """Killed outright, stopped politely, and then left alone; an earlier output stays until the end."""
    texts = [*tiny_seq2seq.sentences(tiny_seq2seq.ENGLISH, 200, seed=1), "", LONG, *LINES]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    output, part = tmp_path / "out.txt", tmp_path / "out.txt.part"
    output.write_text("earlier\n")

    def command(output):
        files = ("--file", tmp_path / "in.txt", "--output", output)
        return Process("translate", "--model", marian, *files, "--rows", 3, code=CONSOLE, apart=True)

    process = command(output)
    signal_at(process, part, 20, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert output.read_text() == "earlier\n"
    before = finished_lines(part)
    part.write_bytes(part.read_bytes()[:-7])  # as if it had been killed within a line

    process = command(output)
    signal_at(process, part, before + 20, signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 75, error
    assert "out.txt.part; the same command resumes it" in error.splitlines()[-1]
    assert output.read_text() == "earlier\n"
    assert finished_lines(part) < len(texts)

    whole = command(tmp_path / "whole.txt")
    process = command(output)
    for each in (process, whole):
        _, error = each.communicate()
        assert each.returncode == 0, error
    assert output.read_bytes() == (tmp_path / "whole.txt").read_bytes()
    assert output.read_bytes().count(b"\n") == len(texts)
    assert not part.exists()


def test_asked_to_stop_when_all_is_done(monkeypatch):
    """Then there is nothing to stop, and nothing to do again."""
    answer = decoding.Answer(0, (np.array([5]),), (-1.0,), (True,))
    monkeypatch.setattr(decoding, "generate_all", lambda *given, **named: iter([answer]))
    model = SimpleNamespace(model=None, params=None, decode=lambda tokens: "le chat")
    plan, config = generate_texts.Plan([np.array([3])], [0], [], []), decoding.resolve({"decoder_start_token_id": 0}, None)
    (found,) = generate_texts.generate(model, plan, config, 1, rows=1, stopped=lambda: True)
    assert found.texts == ("le chat",)


@pytest.mark.parametrize("score", [math.nan, -math.inf, math.inf])
def test_a_score_that_is_not_finite_is_never_printed(console, marian, monkeypatch, score):
    """A damaged model: the text is empty, and what else is asked for keeps its answer."""
    found = [decoding.Answer(i, (np.array([5]),), (score if i else -1.0,), (True,)) for i in range(2)]
    monkeypatch.setattr(decoding, "generate_all", lambda *given, **named: iter(found))
    code, output, error = console("translate", "--model", marian, "--scores", "a film", "the song")
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in output.splitlines())
    assert code == 0
    assert (second["translation"], second["translation_score"]) == ("", None)
    assert (first["translation_score"], bool(first["translation"])) == (-1.0, True)
    assert "1 text left empty, as the model's output is not finite: 2" in error


def test_a_line_with_a_token_beyond_the_table_is_left_empty(console, tmp_path):
    marian = tiny_seq2seq.write_marian(tmp_path / "marian")
    known = json.loads((marian / "vocab.json").read_text(encoding="utf-8"))
    known["▁the"] = 500
    (marian / "vocab.json").write_text(json.dumps(known), encoding="utf-8")
    (tmp_path / "in.txt").write_text("a film\nthe film\na song\n")
    code, output, error = console("translate", "--model", marian, "--file", tmp_path / "in.txt")
    assert code == 0
    assert [bool(line) for line in output.splitlines()] == [True, False, True]
    assert "1 line left empty, the first because the token '▁the' has the id 500, but the model's token table" in error
    code, output, error = console("translate", "--model", marian, "the film")
    assert (code, output) == (2, "")


def test_other_options_do_not_go_on_with_what_was_interrupted(console, marian, tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("\n".join(LINES), encoding="utf-8")
    (tmp_path / "out.txt").write_text("earlier\n")
    real = decoding.generate_all

    def interrupted(*given, **named):
        for number, answer in enumerate(real(*given, **named)):
            if number == 5:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(decoding, "generate_all", interrupted)
    command = ("translate", "--model", marian, "--file", tmp_path / "in.txt", "--output", tmp_path / "out.txt")
    assert console(*command)[0] == 75
    monkeypatch.setattr(decoding, "generate_all", real)
    code, _, error = console(*command, "--num-beams", "3")
    assert code == 2
    assert "num_beams (2 then, 3 now); repeat that command to resume it, or delete the file to start anew" in error
    assert (tmp_path / "out.txt").read_text() == "earlier\n"
    assert console(*command)[0] == 0


def test_texts_of_another_language_do_not_resume(console, tmp_path, monkeypatch):
    mbart = tiny_seq2seq.write_mbart(tmp_path / "mbart", "MBartTokenizer")
    (tmp_path / "in.txt").write_text("\n".join(LINES[:3]), encoding="utf-8")
    real = decoding.generate_all

    def interrupted(*given, **named):
        yield next(real(*given, **named))
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "generate_all", interrupted)
    files = ("--file", tmp_path / "in.txt", "--output", tmp_path / "out.txt")
    command = ("translate", "--model", mbart, *files, "--target-language", "fr_XX", "--source-language")
    assert console(*command, "de_DE")[0] == 75
    monkeypatch.setattr(decoding, "generate_all", real)
    code, _, error = console(*command, "en_XX")
    assert code == 2
    assert 'had other values of source_language ("de_DE" then, "en_XX" now); repeat' in error
    assert console(*command, "de_DE")[0] == 0
