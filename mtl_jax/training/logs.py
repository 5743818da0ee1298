"""What a run says while it runs: metrics.jsonl, TensorBoard events; the progress line is progress.Progress."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from mtl_jax.progress import Progress as Progress
from mtl_jax.training.evaluation import for_json


class Logger:
    """Writes records to metrics.jsonl and TensorBoard on host 0; elsewhere does nothing.

    Args:
        workdir: Where to write.
        step: Steps done so far: records after it, left by a process that was killed, are removed.
        events: Whether to write TensorBoard's files, and each record at once; hundreds of runs do without.
    """

    def __init__(self, workdir: Path, step: int, events: bool = True):
        self._file: TextIO | None = None
        self._board: Any = None
        if jax.process_index() != 0:
            return
        path = workdir / "metrics.jsonl"
        kept = [line for line in _lines(path) if _step(line) <= step]
        part = path.with_name(path.name + ".part")  # whole or not at all: a kill here must not cost the history
        part.write_text("".join(kept), encoding="utf-8")
        part.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1 if events else -1)  # 1: whole lines, at once
        if events:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Appends one record: {"kind": ..., "step": ..., **values}.

        Numbers also go to TensorBoard under kind/; a matrix of numbers from -1 to 1 does as an image, black to white.
        """
        if self._file is None:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **for_json(values)}) + "\n")
        for name, value in values.items() if self._board is not None else ():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{kind}/{name}", value, step)
            elif isinstance(value, list):
                cells = (1 + np.clip(value, -1, 1)) / 2
                pixels = (255 * np.kron(cells, np.ones((16, 16)))).astype(np.uint8)
                self._board.add_image(f"{kind}/{name}", pixels, step, dataformats="HW")

    def flush(self) -> None:
        """Puts everything on disk that was written so far."""
        if self._file is not None:
            self._file.flush()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in order."""
    return [json.loads(line) for line in _lines(workdir / "metrics.jsonl")]


def _lines(path: Path) -> list[str]:
    """Whole lines only: a process that was killed may have left half a one."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _step(line: str) -> int:
    return json.loads(line)["step"]


def compare_gradients(gram_KxK: np.ndarray, tasks: Sequence[str], present: Sequence[bool] | None = None) -> dict[str, Any]:
    """What the Gram matrix tells for free.

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
