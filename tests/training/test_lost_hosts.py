"""A host that is killed: what the others print, and that they end with code 75; the filter of the runtime's lines."""

import os
import signal
import time

import pytest
import tiny
from test_distributed import start_pair

from mtl_jax.training import lost_hosts
from mtl_jax.training.metrics_log import read_metrics

SERVICE = (
    b"E1130 08:25:17.229767   23312 coordination_service.cc:1549] Use error polling to propagate the following error to all "
    b"tasks: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n%s\nThe tasks have crashed.\n"
)
CLIENT = b"F1130 08:25:17.24 1 client.h:80] Terminating process because the JAX distributed service detected fatal errors.\n"
OTHER = b"W1130 08:25:17.24 1 hlo_pass.cc:80] a warning about something else\n"


@pytest.fixture
def pipe():
    """A filter, and what it has passed on."""
    source, target = os.pipe()
    os.set_blocking(source, False)

    def passed() -> bytes:
        try:
            return os.read(source, 1 << 16)
        except BlockingIOError:
            return b""

    yield lost_hosts.Filter(target), passed
    os.close(source)
    os.close(target)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [(SERVICE % b"1" + CLIENT, "host 1"), (SERVICE % b"3\n12", "host 3, 12"), (CLIENT, "host 0"), (OTHER, ""), (b"", "")],
)
def test_lost_hosts_are_named(text, hosts):
    assert lost_hosts.lost(text) == hosts


def test_lines_about_a_lost_host_are_kept_back_and_all_others_pass_at_once(pipe):
    lines, passed = pipe
    lines.feed(OTHER + b"half a li", 0.0)
    assert passed() == OTHER + b"half a li"
    lines.feed(b"ne\n" + SERVICE % b"1", 1.0)
    lines.feed(b"*** Check failure stack trace: ***\n", 2.0)
    assert passed() == b"ne\n"
    assert lost_hosts.lost(lines.kept) == "host 1"
    lines.expire(5.0)
    assert passed() == b""
    lines.expire(1.0 + lost_hosts.HOLD + 1.0)  # no abort followed
    assert passed() == SERVICE % b"1" + b"*** Check failure stack trace: ***\n"
    lines.feed(OTHER, 30.0)
    assert passed() == OTHER


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_host_is_killed_the_other_ends_with_one_line_and_code_75(tmp_path, victim):
    tiny.write_bert(tmp_path / "bert", layers=1)
    tiny.write_data(tmp_path / "data")
    pair = start_pair(tmp_path, tmp_path / "run", "--phases.1.steps", "4000")
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and sum(record["kind"] == "train" for record in read_metrics(tmp_path / "run")) > 12):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    killed = time.monotonic()
    pair[victim].send_signal(signal.SIGKILL)
    output, _ = pair[1 - victim].communicate()
    assert time.monotonic() - killed < lost_hosts.HEARTBEAT + 15
    assert pair[1 - victim].returncode == lost_hosts.EXIT_AGAIN
    expected = f"error: host {victim} has ended without a word; start the same command again on every host, and the run resumes"
    assert output.splitlines()[-1] == expected
    assert "coordination_service" not in output
    pair[victim].communicate()
