"""Files of lines, standard input and standard output."""

import io
import os
import sys
from pathlib import Path

import pytest

from mtl_jax.core.errors import UserError
from mtl_jax.core.text_lines import STANDARD_INPUT, lines_of, print_lines, read_bytes


def test_lines_are_written_as_they_are_read(monkeypatch, tmp_path):
    lines = ["été", "", "\u2028x", " y"]
    with (tmp_path / "out").open("w", encoding="ascii") as out:  # whatever the terminal's encoding is
        monkeypatch.setattr(sys, "stdout", out)
        print_lines(lines)
    assert lines_of(read_bytes(str(tmp_path / "out")), "out") == lines


def test_no_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input is closed; give a text, or --file"):
        read_bytes(STANDARD_INPUT)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(UserError, match=r"standard output: cannot be written \(No space left on device\)"):
            print_lines(["a"])


def test_a_reader_that_has_ended(monkeypatch):
    """And no other error when the process ends and Python writes what is left."""
    read, write = os.pipe()
    os.close(read)
    with io.TextIOWrapper(open(write, "wb")) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(UserError, match=r"standard output: cannot be written \(Broken pipe\)"):
            print_lines(["a"] * 100_000)
