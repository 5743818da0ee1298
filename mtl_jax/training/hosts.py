"""The hosts of one run: they compare their facts before the first step, and an error on one of them ends all.

Collective work waits for every host, for ever if one of them is elsewhere, and gives wrong results without an error if one of
them has other numbers. So hosts compare their facts before any collective work. They talk through the key-value store of jax's
coordination service, which needs no devices: hosts whose programs or devices differ can talk, too.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax._src.distributed import global_state  # jax has no public access to the store

from mtl_jax.core import digests
from mtl_jax.core.errors import Interrupted, UserError, listed
from mtl_jax.core.files import reason, writing
from mtl_jax.training import lost_hosts
from mtl_jax.training import workdir as workdirs

log = logging.getLogger(__name__)

T = TypeVar("T")
Facts = Sequence[tuple[str, Any]]  # (name, JSON-able value, or fields with values), the facts that explain most first

SLICE = 30  # seconds of waiting for a host before a line says so
GRACE = 5.0  # seconds in which a host may raise its own error before another host's ends it
SEEN_WITHIN = 15.0  # seconds in which a file that one host wrote must be visible to the others
_POLL = 0.5
_LONGEST = 100  # characters of a value that an error shows

# In errors of collective work whose other side may be lost.
_PEERS = re.compile("gloo|nccl|connection|unavailable|peer", re.IGNORECASE)

_exchanges = itertools.count()  # names of exchanges; all hosts do the same exchanges in the same order


def is_distributed() -> bool:
    """Whether this process trains together with others."""
    return global_state.client is not None and global_state.num_processes > 1


def index() -> int:
    """This host's number; unlike jax.process_index() it starts no devices."""
    return global_state.process_id if is_distributed() else 0


def gather(value: Any) -> list[Any]:
    """The JSON-able values of all hosts, on every host; they may be of any size."""
    if not is_distributed():
        return [value]
    prefix = f"mtl_jax/{next(_exchanges)}"
    _store().key_value_set(f"{prefix}/{index()}", json.dumps(value))
    return [json.loads(_get(f"{prefix}/{host}", host)) for host in range(global_state.num_processes)]


def make_and_compare(make: Callable[[], T], facts: Callable[[T], Facts]) -> T:
    """make(), once all hosts have made it and agree on its facts.

    Args:
        make: Work without anything collective in it.
        facts: The facts that must be the same on all hosts; not called where there is one.

    Raises:
        UserError: On all hosts: `make` failed on one of them, or they differ.
    """
    if not is_distributed():
        return make()
    result: T | None = None
    known_facts: Facts = []
    failure: BaseException | None = None
    try:
        result = make()
        known_facts = json.loads(json.dumps(facts(result)))
    except BaseException as error:  # whatever it is, the other hosts must learn of it
        failure = error
    answers = gather({"error": None if failure is None else _error_line(failure), "digest": digests.of_json(known_facts)})
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    problem = failures([answer["error"] for answer in answers])
    if problem:
        raise UserError(problem) from failure
    _compare(known_facts, [answer["digest"] for answer in answers])
    return result  # type: ignore[return-value]  # nothing failed


def check_same(facts: Facts) -> None:
    """Compares the facts of the hosts.

    Raises:
        UserError: On all hosts: they differ.
    """
    if is_distributed():
        _compare(json.loads(json.dumps(facts)), gather(digests.of_json(facts)))


def _compare(facts: Facts, digests: Sequence[str]) -> None:
    if len(set(digests)) > 1:
        raise UserError(difference(gather(facts)))


def failures(errors: Sequence[str | None]) -> str:
    """A line that names the first error and its hosts; "" where no host failed.

    Args:
        errors: The error of each host; None: none.
    """
    failed = [host for host, error in enumerate(errors) if error is not None]
    if not failed:
        return ""
    first = errors[failed[0]] or ""
    if len(set(errors)) == 1:
        return first
    same = [host for host in failed if errors[host] == first]
    others = f" (host {listed(host for host in failed if host not in same)}: another error)" if len(failed) > len(same) else ""
    return f"host {listed(same)}: {first}{others}"


def difference(facts: Sequence[Facts]) -> str:
    """A line about the first fact in which a host differs from host 0.

    Args:
        facts: Those of each host, not all the same.
    """
    for number, host in ((number, host) for number, host in enumerate(facts) if host != facts[0]):
        for (name, first), (other_name, other) in itertools.zip_longest(facts[0], host, fillvalue=("", None)):
            if name != other_name:
                return _differs(number, name or other_name, json.dumps(first), json.dumps(other), facts)
            for field, first_value, other_value in workdirs.differences(first, other, name):
                return _differs(number, field, first_value, other_value, facts)
    raise ValueError("all hosts have the same facts")


def _differs(host: int, field: str, first: str, other: str, facts: Sequence[Facts]) -> str:
    others = sum(host_facts != facts[0] for host_facts in facts) - 1
    more = f" ({others} more differ{'s' if others == 1 else ''} from host 0)" if others else ""
    return (
        f"host {host} has {field} {_shortened(other)}, host 0 has {_shortened(first)}{more}: start the same command on every "
        "host, with the same files and versions"
    )


def check_shared(folder: Path) -> None:
    """Checks that all hosts see the files that host 0 writes into an existing directory.

    Raises:
        UserError: On all hosts: one of them does not.
    """
    if not is_distributed():
        return
    name = gather(f".shared-{secrets.token_hex(8)}")[0]
    with contextlib.ExitStack() as stack:
        if index() == 0:
            with writing(folder):
                (folder / name).touch()
            stack.callback((folder / name).unlink, missing_ok=True)
        gather("written")
        deadline = time.monotonic() + SEEN_WITHIN
        while not (visible := (folder / name).exists()) and time.monotonic() < deadline:
            time.sleep(_POLL)
        blind = [host for host, sees in enumerate(gather(visible)) if not sees]
    if blind:
        raise UserError(
            f"{folder}: host {listed(blind)} does not see the files that host 0 writes there; --workdir must be shared by all"
        )


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Within the context an error on one host ends all of them with its line, also those that wait in collective work."""
    if not is_distributed():
        yield
        return
    key, ended = f"mtl_jax/{next(_exchanges)}/failed", threading.Event()
    threading.Thread(target=_end_with_others, args=(key, ended), daemon=True).start()
    try:
        yield
    except Interrupted:  # all hosts agree on the step and raise it
        raise
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and _PEERS.search(str(error)):
            time.sleep(lost_hosts.HEARTBEAT + GRACE)  # where a host is lost, this process ends in the meantime
        report = {"host": index(), "error": _error_line(error), "code": 2 if isinstance(error, UserError) else 1}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host was first
            _store().key_value_set(key, json.dumps(report))
        raise
    finally:
        ended.set()


def _end_with_others(key: str, ended: threading.Event) -> None:
    """Ends this process when another host reports an error. Nothing else ends a main thread that waits in the runtime."""
    while not ended.wait(_POLL):
        try:
            report = json.loads(_store().key_value_try_get(key))
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the service has ended, and jax ends the process itself
        if ended.wait(GRACE):
            return
        print(f"error: host {report['host']}: {report['error']}", file=sys.stderr, flush=True)
        threading.Timer(2 * GRACE, os._exit, [report["code"]]).start()
        jax.distributed.shutdown()  # the host that failed waits for it
        os._exit(report["code"])


def _store() -> Any:
    return global_state.client


def _get(key: str, host: int) -> str:
    waited = 0
    while True:
        try:
            return _store().blocking_key_value_get(key, 1000 * SLICE)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                time.sleep(2 * GRACE)  # where another host has failed, its error ends this process in the meantime
                raise UserError(f"host {host} cannot be reached any more ({reason(error)})") from error
            waited += SLICE
            log.warning("waiting for host %d for %d s", host, waited)


def _error_line(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {reason(error)}"


def _shortened(value: str) -> str:
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
