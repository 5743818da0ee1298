"""The metrics of a run on disk: the record of a step, metrics.jsonl and TensorBoard events, and metrics.jsonl read again."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.core.files import check_regular, number_of, parse_json, to_json, write_text, writing
from mtl_jax.core.json_shapes import list_of, mapping, number, object_of, text, whole
from mtl_jax.training.train_state import StepMetrics

log = logging.getLogger(__name__)

LOG = "metrics.jsonl"
USAGE = "sharing"  # the kind of the records on who uses which expert
USAGE_EXAMPLES = 32  # they are measured on that many dev examples of each source, the first ones
MOST_STEPS = 2**53  # a larger step number is damage

_FIRST_FIELDS = object_of({"kind": text, "step": whole})
_MATRIX = list_of(list_of(number))


def step_record(
    metrics: StepMetrics, facts: Mapping[str, Any], learning_rate: float, phase: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """The losses by name, and the record of a step in metrics.jsonl.

    Args:
        metrics: Of one run, on the host.
        facts: Counts.facts(...) after the step.
        learning_rate: Of the step.
        phase: The number of its phase.
    """
    losses = {name: float(loss) for name, loss in metrics.losses.items()}
    record: dict[str, Any] = {f"loss/{name}": loss for name, loss in losses.items()}
    record |= {f"weight/{name}": float(weight) for name, weight in metrics.weights.items()}
    record |= {f"examples/{task}": int(count) for task, count in metrics.counts.items()}
    record |= {"total": float(metrics.total), "gradient_norm": float(metrics.gradient_norm)}
    record |= {"tokens": int(metrics.seen[:, 2].sum())}
    for source, seen in facts["seen"].items():
        record |= {f"seen/{source}/{name}": seen[name] for name in ("rows", "examples", "passes")}
    for source, numbers in facts.get("augmented", {}).items():
        record |= {f"augmented/{source}/{name}": number for name, number in numbers.items()}
    if metrics.gram is not None and np.isfinite(metrics.gram).all():  # else the rule was not due
        tasks = sorted(metrics.counts)
        present = [bool(metrics.counts[task] > 0) for task in tasks]
        record |= compare_gradients(np.asarray(metrics.gram), tasks, present)
    if metrics.residual is not None and np.isfinite(metrics.residual):
        record["solver_residual"] = float(metrics.residual)
    return losses, record | {"padding": facts["padding"], "learning_rate": learning_rate, "phase": phase}


def compare_gradients(gram_KxK: np.ndarray, tasks: Sequence[str], present: Sequence[bool] | None = None) -> dict[str, Any]:
    """Norms and cosines of the task gradients, from their Gram matrix.

    Args:
        gram_KxK: Inner products of the task gradients.
        tasks: Their names, in the order of the rows.
        present: Which of them had examples; None: all.

    Returns:
        Of the present tasks: gradient_norm/TASK; cosines, their matrix as lists, in the order of the tasks; of its pairs,
        cosine_mean, cosine_min and conflicts, the share below 0 (where there is more than one task).
    """
    kept = [n for n in range(len(tasks)) if present is None or present[n]]
    gram_KxK, tasks = np.asarray(gram_KxK)[np.ix_(kept, kept)], [tasks[n] for n in kept]
    norm_K = np.sqrt(np.maximum(np.diagonal(gram_KxK).astype(np.float64), 0.0))
    cosine_KxK = gram_KxK / np.maximum(np.outer(norm_K, norm_K), np.finfo(np.float64).tiny)
    record: dict[str, Any] = {f"gradient_norm/{task}": float(norm) for task, norm in zip(tasks, norm_K, strict=True)}
    record["cosines"] = cosine_KxK.round(4).tolist()
    if len(tasks) > 1:
        pairs = cosine_KxK[np.triu_indices(len(tasks), 1)]
        record |= {"cosine_mean": float(pairs.mean()), "cosine_min": float(pairs.min()), "conflicts": float((pairs < 0).mean())}
    return record


class Logger:
    """Writes records to metrics.jsonl and TensorBoard on host 0; on other hosts it does nothing.

    Args:
        workdir: Where to write.
        step: Steps done so far. Later records, left by a process that was killed, are removed; so are damaged lines. Damaged
            lines and missing steps are reported.
        events: Whether to write TensorBoard's files, and each record at once; runs of an ablation do without.

    Raises:
        UserError: A file cannot be written; the methods raise it, too.
    """

    def __init__(self, workdir: Path, step: int, events: bool = True):
        self._path, self._failed = workdir / LOG, False
        self._file: TextIO | None = None
        self._board: Board | None = None
        if jax.process_index() != 0:
            return
        kept = [(line, record) for line, record in _valid_lines(self._path) if record["step"] <= step]
        missing = step - len({record["step"] for _, record in kept if record["kind"] == "train"})
        if missing > 0 and events:  # a run of an ablation may have ended before this step
            message = "%s: %d of the %d steps so far are not in it: curves are short, nothing else"
            log.warning(message, self._path, missing, step)
        write_text(self._path, "".join(line for line, _ in kept))
        with self._writing():
            self._file = self._path.open("a", encoding="utf-8", buffering=1 if events else -1)  # 1: each line at once
            if events:
                self._board = Board(workdir / "tensorboard", step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Appends one record: {"kind": ..., "step": ..., **values}.

        Numbers also go to TensorBoard under kind/; a matrix of numbers from -1 to 1 goes there as an image, black to white.
        """
        if self._file is None:
            return
        with self._writing():
            self._file.write(to_json({"kind": kind, "step": step, **values}) + "\n")
            for name, value in values.items() if self._board is not None else ():
                assert self._board is not None
                if isinstance(value, (int, float)):
                    self._board.scalar(f"{kind}/{name}", value, step)
                elif isinstance(value, list):
                    cells = (1 + np.clip(np.nan_to_num(np.array(value, np.float64)), -1, 1)) / 2
                    pixels = (255 * np.kron(cells, np.ones((16, 16)))).astype(np.uint8)
                    self._board.image(f"{kind}/{name}", pixels, step)

    def flush(self) -> None:
        """Writes all buffered records to disk."""
        with self._writing():
            for file in (self._file, self._board):
                if file is not None:
                    file.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        for file in (self._file, self._board):
            # After a failed write closing fails once more, with an error that the caller has had.
            with contextlib.suppress(UserError) if self._failed else contextlib.nullcontext(), self._writing():
                if file is not None:
                    file.close()
        self._file = self._board = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with writing(self._path.parent, "the same command resumes when it can be"):
                yield
        except UserError:
            self._failed = True
            raise


class Board:
    """An event file. (tensorboardX's SummaryWriter writes in a thread and a queue, and hangs when the disk is full.)

    Args:
        folder: Its directory; made if it is missing.
        purge_step: TensorBoard hides an earlier process's events from this step on.

    Raises:
        OSError: It cannot be written; the methods raise it, too.
    """

    def __init__(self, folder: Path, purge_step: int):
        from tensorboardX.proto.event_pb2 import SessionLog  # imported late: it takes a while
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard looks for files of this name.
        self._file = RecordWriter(str(folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"))
        self._write(file_version="brain.Event:2")
        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """A number at a step."""
        from tensorboardX.proto.summary_pb2 import Summary

        self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))

    def image(self, name: str, pixels_HxW: np.ndarray, step: int) -> None:
        """A grey image u8 at a step."""
        from tensorboardX import summary

        self._write(step=step, summary=summary.image(name, pixels_HxW, dataformats="HW"))

    def flush(self) -> None:
        """Writes all buffered events to disk."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write(Event(wall_time=time.time(), **fields).SerializeToString())


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in order, NaN and infinities as floats. Damaged lines are reported.

    Raises:
        UserError: It cannot be read.
    """
    return [{name: _parsed(name, value) for name, value in record.items()} for _, record in _valid_lines(workdir / LOG)]


def _parsed(name: str, value: Any) -> Any:
    return number_of(value) if value is None or (isinstance(value, str) and name != "kind") else value


def _valid_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line, record) of each valid line. The unfinished last line of a killed process is ignored; damaged ones are reported."""
    if not path.exists():
        return []
    check_regular(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    valid, damaged = [], []
    for line_number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            record = parse_json(line.decode())
        except (ValueError, RecursionError):
            record = None
        if _problem(record):
            damaged.append(line_number)
        else:
            valid.append((line.decode() + "\n", record))
    if damaged:
        lines = f"{len(damaged)} line{'s' if len(damaged) > 1 else ''}"
        log.warning("%s: %s not what mtl_jax wrote, from line %d on; left out", path, lines, damaged[0])
    return valid


def _problem(record: Any) -> str:
    """The first fault of a record; "" where it has none."""
    if problem := _FIRST_FIELDS(record) or ("" if 0 <= record["step"] < MOST_STEPS else "step is not one"):
        return problem
    if problem := _MATRIX(record.get("cosines", [])):
        return problem
    return mapping(number)({name: value for name, value in record.items() if name not in ("kind", "cosines")})
