"""TensorBoard's event files, written where they are called for, so that an error of the disk is one of the caller's."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import numpy as np


class Board:
    """An event file. (tensorboardX's SummaryWriter writes in a thread and a queue, which a full disk leaves hanging.)

    Args:
        folder: Where to; made if it is not there.
        purge_step: Events from this step on, of an earlier process, are not to be shown.

    Raises:
        OSError: It cannot be written; so do the other functions.
    """

    def __init__(self, folder: Path, purge_step: int):
        from tensorboardX.proto.event_pb2 import SessionLog  # imported late: it takes a while
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # As TensorBoard looks for them.
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
        """Puts everything on disk that was written so far."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write(Event(wall_time=time.time(), **fields).SerializeToString())
