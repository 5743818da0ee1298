"""The command mtl-jax audit: what leaks from the held-out rows of an experiment into its training rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from mtl_jax.cli import scripts
from mtl_jax.core.files import write_json
from mtl_jax.core.text_lines import print_lines


def audit(
    script: Annotated[str, tyro.conf.Positional],
    /,
    near: float = 0.7,
    json: str = "",
    texts: bool = False,
) -> None:
    """Copies of held-out rows in the training rows of all sources of an experiment, and copies under another label in train.

    Prints tables of counts, and ten examples of each by file and line. Nothing is trained or written.

    Args:
        script: A script that calls mtl_jax.main; its own flags come after --.
        near: The least similarity of near copies, above 0 and at most 1: one word in ten may differ at 0.7.
        json: A file to write with the same as JSON.
        texts: Also show the texts of the examples.
    """
    from mtl_jax import audit as audits
    from mtl_jax.audit.copies import check

    check(near, "--near")
    result = audits.of_experiment(scripts.read(script, "audit"), near)
    if json:
        write_json(Path(json), result.to_json(texts))
    print_lines([result.table(texts)])
