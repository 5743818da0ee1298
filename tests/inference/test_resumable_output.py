import contextlib
import json
import os
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.core.digests import of_directory
from mtl_jax.core.errors import UserError
from mtl_jax.inference.generate_texts import ITEM
from mtl_jax.inference.resumable_output import Journal, check_writable, part_of

MADE_FROM = {"input": "a" * 64, "model": "b" * 64, "num_beams": 4}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.txt"


def test_what_is_added_is_found_again_and_the_output_comes_at_the_end(output):
    output.write_text("earlier\n")
    journal = Journal(output, MADE_FROM)
    journal.add(3, {"texts": ["la \u2028 ville"]})
    journal.close()
    again = Journal(output, MADE_FROM)
    assert again.done == {3: {"texts": ["la \u2028 ville"]}}
    again.add(0, None)
    assert output.read_text() == "earlier\n"
    again.finish(["x", "", "é"])
    assert output.read_text(encoding="utf-8") == "x\n\né\n"
    assert os.listdir(output.parent) == ["out.txt"]


@given(st.integers(0, 400), st.sampled_from([b"", b"\0\0\0", b"[2, ", b"\xff\n"]))
def test_a_process_may_be_killed_after_any_byte(tmp_path_factory, kept, rest):
    """What was written whole before the cut is there, nothing else, and adding goes on behind it."""
    output = tmp_path_factory.mktemp("cut") / "out.txt"
    journal = Journal(output, MADE_FROM)
    for number in range(5):
        journal.add(number, {"text": f"{number} ü"})
    journal.close()
    data = part_of(output).read_bytes()
    begun = data.index(b"\n") + 1
    cut = data[: begun + kept]
    part_of(output).write_bytes(cut + rest)
    again = Journal(output, MADE_FROM)
    assert list(again.done) == list(range(cut[begun:].count(b"\n")))
    again.add(9, "more")
    done = dict(again.done)
    again.close()
    with contextlib.closing(Journal(output, MADE_FROM)) as last:
        assert last.done == done


def test_two_processes_do_not_write_one_output(output):
    journal = Journal(output, MADE_FROM)
    journal.add(0, "x")
    before = part_of(output).read_bytes()
    with pytest.raises(UserError, match=r"out\.txt\.part: another process is writing this output"):
        Journal(output, MADE_FROM)
    assert part_of(output).read_bytes() == before
    journal.close()
    Journal(output, MADE_FROM).close()


def test_what_was_made_from_something_else_is_not_gone_on_with(output):
    journal = Journal(output, MADE_FROM)
    journal.add(0, "x")
    journal.close()
    before = part_of(output).read_bytes()
    with pytest.raises(UserError, match=r"out\.txt\.part: .* other values of input, num_beams \(4 then, 5 now\); repeat that"):
        Journal(output, MADE_FROM | {"num_beams": 5, "input": "c" * 64})
    assert part_of(output).read_bytes() == before


def test_nothing_done_yet_is_nothing_to_lose(output):
    Journal(output, MADE_FROM).close()
    assert not part_of(output).exists()
    part_of(output).write_text(json.dumps({"partial": True, **MADE_FROM}) + "\n[0, ")
    journal = Journal(output, MADE_FROM | {"num_beams": 5})
    journal.add(0, "x")
    journal.close()
    assert json.loads(part_of(output).read_text().splitlines()[0])["num_beams"] == 5


def test_another_file_in_the_place_of_the_partial_one_is_left_alone(output):
    part_of(output).write_text("my notes\n")
    with pytest.raises(UserError, match="not the partial output of an interrupted command"):
        Journal(output, MADE_FROM)
    assert part_of(output).read_text() == "my notes\n"


def test_outputs_that_cannot_be_are_found_out_before_the_work(tmp_path):
    (tmp_path / "in.txt").write_text("x")
    (tmp_path / "link.txt").symlink_to("in.txt")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for output, message in (
        (tmp_path / "in.txt", "the output is the input"),
        (tmp_path / "link.txt", "the output is the input"),
        (tmp_path / "folder", "a directory; the output must be a file"),
        (tmp_path / "absent" / "out.txt", "there is no directory"),
        (tmp_path / "in.txt" / "out.txt", "there is no directory"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/proc/out.txt"), "cannot be written"),
        (Path("/dev/null"), "not a regular file"),
    ):
        with pytest.raises(UserError, match=message):
            check_writable(str(output), [str(tmp_path / "in.txt")])
    with pytest.raises(UserError, match="the output is the input"):
        check_writable(str(tmp_path / "out.txt"), [str(tmp_path / "out.txt.part")])
    assert (tmp_path / "in.txt").read_text() == "x"
    assert check_writable(str(tmp_path / "new.txt"), []) == Path(os.path.realpath(tmp_path / "new.txt"))
    assert sorted(os.listdir(tmp_path)) == ["folder", "in.txt", "link.txt", "pipe"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "out.txt").symlink_to("there/real.txt")
    Journal(check_writable(str(tmp_path / "out.txt"), []), MADE_FROM).finish(["x"])
    assert (tmp_path / "there" / "real.txt").read_text() == "x\n"
    assert (tmp_path / "out.txt").is_symlink()


def test_a_directory_and_the_same_in_an_archive_have_one_digest_until_a_byte_changes(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\0" * 100)
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for file in (tmp_path / "model").iterdir():
            archive.write(file, f"m/{file.name}")
    found = of_directory(tmp_path / "model")
    assert of_directory(zipfile.Path(tmp_path / "model.zip", "m/")) == found
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\0" * 99 + b"\1")
    assert of_directory(tmp_path / "model") != found


@pytest.mark.parametrize(
    "line",
    [
        b"null",
        b"3",
        b"[]",
        b"[1]",
        b"[1, 2]",
        b'[1, "x"]',
        b"[true, {}]",
        b"[-1, {}]",
        b"[1, {}, 2]",
        b'{"1": {}}',
        b"[" * 100_000,
    ]
    + [json.dumps([1, item]).encode() for item in ({"texts": "x"}, {"texts": [1], "scores": [0.5], "ended": True})]
    + [b'[1, {"texts": ["x"], "scores": "low", "ended": true}]', b'[1, {"texts": ["x"], "ended": true}]', b'["1", {}]'],
)
def test_items_of_another_shape_are_made_again(output, line):
    """They and what follows them: nobody knows what happened to the file."""
    good = {"texts": ["x"], "scores": [-0.5], "ended": True}
    with contextlib.closing(Journal(output, MADE_FROM, ITEM)) as journal:
        journal.add(0, good)
        journal.add(2, good)
    lines = part_of(output).read_bytes().splitlines(keepends=True)
    part_of(output).write_bytes(b"".join([*lines[:2], line + b"\n", *lines[2:]]))
    with contextlib.closing(Journal(output, MADE_FROM, ITEM)) as again:
        assert again.done == {0: good}


@pytest.mark.parametrize(
    "line", [b'{"partial": true', b'{"partial": true, "a": [', b'{"partial": true}}', b'{"partial": true, 3}']
)
def test_a_first_line_that_is_damaged_is_not_taken_for_ours(output, line):
    part_of(output).write_bytes(line + b'\n[0, {"texts": ["x"]}]\n')
    with pytest.raises(UserError, match="not the partial output of an interrupted command"):
        Journal(output, MADE_FROM)


def test_scores_that_are_not_finite_are_strict_json(output):
    with contextlib.closing(Journal(output, MADE_FROM, ITEM)) as journal:
        journal.add(0, {"texts": ["x"], "scores": [float("-inf")], "ended": True})
    for line in part_of(output).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    with contextlib.closing(Journal(output, MADE_FROM, ITEM)) as again:
        assert again.done[0]["scores"] == ["-inf"]
