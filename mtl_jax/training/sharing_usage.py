"""Who uses which expert while a run trains: measured on a few dev examples of each task, the same at every evaluation."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mtl_jax.data.batches import Batch, eval_batches
from mtl_jax.data.examples import Examples
from mtl_jax.sharing.shown_weights import Usage, by_task, prompt_places
from mtl_jax.training import mesh as meshes
from mtl_jax.training.evaluation import Apply, outputs_of_batches
from mtl_jax.training.forward import encode_tokens
from mtl_jax.training.metrics_log import USAGE_EXAMPLES
from mtl_jax.training.prepared import Prepared
from mtl_jax.transfer.adapters import Adapted
from mtl_jax.transfer.adapters.base import Adapter, Shown

DIGITS = 4


def make_usage(prepared: Prepared) -> Apply | None:
    """A jitted function to {layer: {name: Usage}} of a batch; None for a run whose sharing shows nothing.

    Args:
        prepared: The run.
    """
    module, tasks = prepared.trunk.module, prepared.corpus.tasks
    if not isinstance(module, Adapted) or all(isinstance(part, Adapter) for part in module.adapters):
        return None
    # Without remat, under which what is shown could not be read here.
    encode: Any = encode_tokens(module, (), prepared.savings._replace(remat="none"))
    places = {name: part.place for name, part in prepared.corpus.splits["dev"].items()}
    source_K = np.array([places[task.source] for task in tasks], np.int32)

    def usage(params: Any, batch: Batch, table: jax.Array | None) -> dict[str, dict[str, Usage]]:
        shown: dict[str, dict[str, Shown]] = {}
        encode(params["trunk"], batch, None, None, shown=shown)
        return by_task(shown, module.routes, batch.segments > 0, batch.source, source_K, prompt_places(module))

    apply: Any = jax.jit(usage, out_shardings=meshes.replicated(prepared.mesh))
    first = next(iter(eval_batches(_examples(prepared), prepared.experiment.batch)))
    return apply if apply.eval_shape(prepared.params, first, None) else None


def usage_record(apply: Apply, params: Any, prepared: Prepared) -> dict[str, float]:
    """The record of an evaluation in metrics.jsonl: {"LAYER/NAME/TASK/COLUMN": mean weight}.

    Args:
        apply: make_usage(...).
        params: The model's parameters.
        prepared: The run.
    """
    batches = eval_batches(_examples(prepared), prepared.experiment.batch)
    parts = [jax.device_get(output) for _, output in outputs_of_batches(apply, params, None, batches, prepared.mesh)]
    by_layer: dict[str, dict[str, Usage]] = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *parts)
    layers = list(prepared.trunk.module.layers)
    return {
        f"{layer}/{name}/{task.name}/{column}": round(float(value), DIGITS)
        for layer in sorted(by_layer, key=layers.index)
        for name, part in by_layer[layer].items()
        for task, values in zip(prepared.corpus.tasks, part.means, strict=True)
        for column, value in zip(part.columns, values, strict=True)
    }


def _examples(prepared: Prepared) -> list[Examples]:
    """The first dev examples of each source, without labels."""

    def first(part: Examples) -> Examples:
        tokens, types = part.tokens[:USAGE_EXAMPLES], None if part.types is None else part.types[:USAGE_EXAMPLES]
        rows = None if part.rows is None else part.rows[:USAGE_EXAMPLES]
        return part._replace(tokens=tokens, types=types, rows=rows, words=None, offsets=None, labels={})

    return [first(part) for part in prepared.corpus.splits["dev"].values()]
