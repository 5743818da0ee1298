"""Colours are for people: in files and pipes, and where NO_COLOR is set, there are none."""

import io
import logging

import pytest

from mtl_jax.core import log_lines


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "no_color", "expected"),
    [
        (Terminal(), "", "\033[31merror:\033[0m"),
        (Terminal(), "1", "error:"),
        (io.StringIO(), "", "error:"),
        (None, "", "error:"),
    ],
)
def test_painted(monkeypatch, stream, no_color, expected):
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("NO_COLOR", no_color)
    assert log_lines.painted("error:", log_lines.RED) == expected


@pytest.fixture(scope="module")
def a_command_ran():
    log_lines.to_stderr()


def test_a_command_in_a_fixture_leaves_nothing_to_the_tests(a_command_ran):
    logger = logging.getLogger("mtl_jax")
    assert (logger.handlers, logger.level, logger.propagate) == ([], logging.NOTSET, True)
