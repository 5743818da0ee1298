"""How a command that needs a script's experiment stops the script where it would train."""

from __future__ import annotations

import contextvars
from typing import Any

# Whether a script is run only up to its first call of mtl_jax.train or mtl_jax.ablate.
until_train: contextvars.ContextVar[bool] = contextvars.ContextVar("until_train", default=False)


class Read(BaseException):
    """Ends a script at its call of main(), where its experiment is known. Not an Exception, so that scripts do not catch it."""

    def __init__(self, experiment: Any, has_hooks: bool = False, distributed: str = ""):
        super().__init__()
        self.experiment, self.has_hooks, self.distributed = experiment, has_hooks, distributed
