"""Prompts of a decoder-only checkpoint: their tokens, and the command from a file to a file."""

import json
import sys

import finished_runs
import pytest
import tiny
import tiny_decoder

from mtl_jax import CausalLM, Phase, Pretrained, Source, decoding, generate, pretrained
from mtl_jax.cli import main
from mtl_jax.core.errors import UserError
from mtl_jax.inference import answer_prompts
from mtl_jax.inference.text_kinds import GENERATE
from mtl_jax.inference.text_model import TextRequest, from_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder") / "llama"
    tiny_decoder.write_llama(folder)
    return folder


def words(model, texts, length=None):
    vocabulary = tiny_decoder.WORDS
    return [" ".join(vocabulary[token] for token in ids) for ids in model.encode(texts, length)]


def test_tokens_of_prompts_and_of_messages(llama):
    plain = from_checkpoint(str(llama), TextRequest(GENERATE.task))
    assert words(plain, ["who is the man"]) == ["[CLS] who is the man"]
    assert words(plain, ["who is the man"], 3) == ["[CLS] the man"]  # a longer one loses its beginning
    assert (plain.max_source, plain.max_positions) == (64, None)
    chat = from_checkpoint(str(llama), TextRequest(GENERATE.task, chat=True))
    assert words(chat, ["who is the man"]) == ["[USER] who is the man [END] [BOT]"]
    ends = [tiny_decoder.WORDS[token] for token in chat.setting.options["eos_token_id"]]
    assert ends == ["[END]"]
    assert plain.identity() != chat.identity()


def test_from_a_file_to_a_file(llama, tmp_path, monkeypatch, capsys):
    """The answers are those of decoding.generate; what is done is done when the command is started again."""
    rows = [{"who": "man", "id": 1}, {"who": "woman", "id": 2}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [rows[0]]) + "\n" + json.dumps(rows[1]) + "\n")
    command = ["generate", "--model", str(llama), "--file", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    command += ["--prompt", "who is the {who} ?", "--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["mtl-jax", *command])
    main.console()
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert lines[1] == ""
    checkpoint = pretrained.load(str(llama))
    inputs = checkpoint.tokenizer(["who is the man ?", "who is the woman ?"], return_tensors="np")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    end = checkpoint.tokenizer.eos_token_id
    tokens, _ = decoding.generate(checkpoint, ids, mask, max_new_tokens=4, eos_token_id=[end], pad_token_id=0)
    answers = [checkpoint.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in tokens]
    expected = [row | {"answer": " ".join(answer.split())} for row, answer in zip(rows, answers, strict=True)]
    assert [json.loads(line) for line in (lines[0], lines[2])] == expected


def test_objects_have_the_text_that_was_given(llama):
    """Not the prompt around it, as those of a file."""
    options = {"prompt": "who is the {text} ?", "max_new_tokens": 2}
    answers = generate(str(llama), ["man", ""], scores=True, **options)
    assert [answer["text"] for answer in answers] == ["man", ""]
    assert generate(str(llama), ["man", ""], **options) == [answer["answer"] for answer in answers]


def test_texts_with_seeds_of_their_own_are_drawn_apart(llama):
    """An answer follows from the text and its seed, whichever texts are beside it."""
    texts, seeds = ["the man", "the man", "who is the film", "the man", ""], [3, 2**40 + 3, 3, 5, 3]
    options = {"do_sample": True, "max_new_tokens": 8}
    answers = generate(str(llama), texts, seed=seeds, **options)
    assert len(set(answers)) == 5
    assert generate(str(llama), texts[::-1], seed=seeds[::-1], **options) == answers[::-1]
    assert generate(str(llama), texts[1:2] * 3, seed=[seeds[1]] * 3, **options) == answers[1:2] * 3
    with pytest.raises(UserError, match="seed: 2 seeds for 1 text; give one for each, or one for all"):
        generate(str(llama), ["the man"], seed=[1, 2])
    with pytest.raises(UserError, match="--seed is -1"):
        generate(str(llama), ["the man"], seed=[-1])


def test_a_prompt_of_a_run_that_is_cut_is_reported(llama, tmp_path, caplog):
    task = CausalLM(name="answer", source="pairs", column="answer", target_length=3)
    changes = {"sources": (Source("pairs", rows=tiny_decoder.rows()),), "tasks": (task,), "trunk": Pretrained(str(llama))}
    changes |= {"phases": (Phase("everything", 1),)}
    finished_runs.write(tmp_path / "run", tiny.experiment("", "", **changes))
    generate(tmp_path / "run", ["good film", "good film " * 20], max_new_tokens=2)
    assert "1 text of more than 24 tokens, cut: 2" in caplog.text


def test_one_line_for_prompts_that_do_not_fit(llama, tmp_path):
    with pytest.raises(UserError, match=r"in\.jsonl:2: --prompt: the row has 3 in column 'b', which prompt names"):
        answer_prompts.prompts("{a} {b}", [None, {"a": "x", "b": 3}], ["", "x"], "in.jsonl")
    with pytest.raises(UserError, match=r"--prompt '\{a' is not a text with columns in braces"):
        answer_prompts.columns("{a")
    tiny_decoder.write_llama(tmp_path / "no", chat=False)
    with pytest.raises(UserError, match="has no chat template"):
        from_checkpoint(str(tmp_path / "no"), TextRequest(GENERATE.task, chat=True))
