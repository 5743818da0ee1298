"""Who uses which expert: the weights that a sharing shows, as means over the tokens of each task.

Shapes in names: B rows, C copies of each, T tokens a row, K tasks, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mtl_jax.transfer.adapters import Adapted, PromptTuning
from mtl_jax.transfer.adapters.base import Shown
from mtl_jax.transfer.adapters.routes import Routes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Usage:
    """How much each task uses each expert of a layer, or each of other parts that a sharing weighs.

    Attributes:
        sums: f32[K, E], the weights, summed over the tokens of each task.
        counts: f32[K], the tokens of each task; 1 for weights that read no rows.
        columns: The names of the experts.
    """

    sums: jax.Array
    counts: jax.Array
    columns: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def means(self) -> np.ndarray:
        """f64[K, E], the mean weights; NaN for a task without tokens."""
        counts_Kx1 = np.asarray(self.counts, np.float64)[:, None]
        empty = counts_Kx1 == 0
        return np.where(empty, np.nan, np.asarray(self.sums, np.float64) / np.where(empty, 1.0, counts_Kx1))


def usage(
    module: Adapted,
    params: Mapping[str, Any],
    input_ids: jax.Array,
    attention_mask: jax.Array,
    *,
    source: jax.Array,
    sources_of_tasks: Sequence[int],
    **kwargs: Any,
) -> dict[str, dict[str, Usage]]:
    """How much each task uses each expert, on some rows.

        by_layer = mtl_jax.sharing.usage(module, params, ids, mask, source=source, sources_of_tasks=[0, 1, 1])
        by_layer["layer_0/feed_forward_out"]["gate"].means  # f64[K, E]

    Args:
        module: The trunk with its sharing.
        params: Its parameters.
        input_ids: i32[B, T].
        attention_mask: [B, T], 0 at padding.
        source: i32[B], the source of each row; -1 for a row that does not count.
        sources_of_tasks: K numbers, the source of each task.
        **kwargs: Further arguments of the trunk by name.

    Returns:
        {layer: {name: Usage}}; empty where the sharing shows nothing.
    """
    shown: dict[str, dict[str, Shown]] = {}
    module.apply({"params": params}, input_ids, attention_mask, source=source, shown=shown, **kwargs)
    return by_task(shown, module.routes, attention_mask, source, sources_of_tasks, prompt_places(module))


def prompt_places(module: Adapted) -> int:
    """How many places the prompts of a trunk have in front of every row's tokens."""
    prompts = [adapter for adapter in module.adapters if isinstance(adapter, PromptTuning)]
    return sum(prompt.examples * prompt.length for prompt in prompts)


def by_task(
    shown: Mapping[str, Mapping[str, Shown]],
    routes: Routes | None,
    mask: jax.Array,
    source: jax.Array,
    sources_of_tasks: ArrayLike,
    prompts: int = 0,
) -> dict[str, dict[str, Usage]]:
    """Weights that were shown in a pass, summed over the tokens of each task, which are those of the rows of its source.

    Prompts belong to no text, and their places do not count.

    Args:
        shown: {layer: {name: weights}}, from Adapted.apply().
        routes: The tasks of the copies of rows; None: rows have no copies.
        mask: [B, T], 0 at padding.
        source: i32[B], the source of each row.
        sources_of_tasks: i32[K], the source of each task.
        prompts: prompt_places(...) of the trunk.

    Raises:
        ValueError: The first axes of weights do not fit rows or tasks.
    """
    mask_BxT, source_K = jnp.asarray(mask).astype(jnp.float32), jnp.asarray(sources_of_tasks)
    reads_BxK = (source[:, None] == source_K).astype(jnp.float32)
    (B, T), K = mask_BxT.shape, len(source_K)
    task_BxCxK = None
    if routes is not None:
        task_BxCxK = jax.nn.one_hot(routes.of(source).task_BC.reshape(B, routes.copies), K)

    def summed(place: str, part: Shown) -> Usage:
        weights, E = part.weights.astype(jnp.float32), part.weights.shape[-1]
        if prompts and weights.ndim >= 3 and weights.shape[-2] == prompts + T:
            weights = weights[..., prompts:, :]
        rows = weights.size // (E * weights.shape[-2])
        if weights.ndim == 2 and len(weights) == K:
            return Usage(weights, jnp.ones(K), part.columns)
        if weights.ndim < 3 or rows % B or weights.shape[-2] not in (1, T):
            raise ValueError(f"weights at {place} are {part.weights.shape}, which fit neither {B} x {T} tokens nor {K} tasks")
        by_copy_BxCxTxE = jnp.broadcast_to(weights.reshape(B, -1, weights.shape[-2], E), (B, rows // B, T, E))
        counted_BxCxK = jnp.broadcast_to(reads_BxK[:, None], (B, rows // B, K))
        if task_BxCxK is not None and task_BxCxK.shape[1] == rows // B:  # else the copies of a row are the same for all tasks
            counted_BxCxK = counted_BxCxK * task_BxCxK
        sums_KxE = jnp.einsum("bck,bt,bcte->ke", counted_BxCxK, mask_BxT, by_copy_BxCxTxE, precision="highest")
        return Usage(sums_KxE, jnp.einsum("bck,bt->k", counted_BxCxK, mask_BxT, precision="highest"), part.columns)

    return {layer: {name: summed(f"{layer}: {name}", part) for name, part in names.items()} for layer, names in shown.items()}
