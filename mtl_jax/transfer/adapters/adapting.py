"""Adds adapters to a module: checks, notes, and a module with adapters inside another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, count, listed
from mtl_jax.transfer.adapters.adapted import ADAPTERS, Adapted
from mtl_jax.transfer.adapters.base import COMMON, RUN, WHOLE, Adapter, Inserted, Layer
from mtl_jax.transfer.adapters.prefix import Prefix
from mtl_jax.transfer.adapters.routes import Routes
from mtl_jax.transfer.adapters.stacks import is_own


def adapt(
    module: nn.Module,
    adapters: Sequence[Adapter],
    sources: int = 1,
    *,
    sharing: Sequence[Inserted] = (),
    routes: Routes | None = None,
    owners: tuple[int, ...] = (),
) -> Adapted:
    """A trunk with adapters: an encoder, a decoder-only trunk, or the encoder of Marian, BART, T5.

    With optax alone:

        checkpoint = mtl_jax.pretrained.load("path", head=None)
        module = adapt(checkpoint.model.trunk, [Lora(name="lora", rank=8)])
        params = module.add(checkpoint.params["trunk"], jax.random.key(0))
        frozen, added = params, params["adapters"]
        optimizer = optax.adam(1e-3)
        state = optimizer.init(added)

        def loss(added):
            return objective(module.apply({"params": {**frozen, "adapters": added}}, ids, mask).hidden)

        updates, state = optimizer.update(jax.grad(loss)(added), state, added)
        added = optax.apply_updates(added, updates)

    Args:
        module: The trunk: a linen module with the attention of models.layers or models.modernbert, and nn.Dense.
        adapters: The adapters.
        sources: Number of sources, for adapters with parameters for each source.
        sharing: How the tasks share the trunk, if not all of it.
        routes: The tasks of the rows of every source, if adapters or the sharing have parameters of single tasks.
        owners: As in Adapted.

    Raises:
        UserError: A field is refused, two adapters have one name, or one has no layer in the module.
    """
    check(adapters)
    for part in sharing:
        routes = None if routes is None else part.routes(routes)
    adapted = Adapted(module, (*adapters, *sharing), sources, routes, owners)
    check_alone(adapters, adapted.where)  # where raises if an adapter has no layer
    if not adapted.has_parts_of_tasks:
        adapted = dataclasses.replace(adapted, routes=None)
    for part in sharing:
        by_task = [adapter.name for adapter in adapters if adapted.by_task(adapter)]
        if by_task and adapted.routes is not None and part.through(adapted.routes) != adapted.routes.copies:
            raise UserError(
                f"adapter {by_task[0]!r}: per is task, and in the sharing {type(part).__name__} the copies of a row are of "
                "experts, not of tasks: choose per run or source"
            )
    adapted.first_copied  # noqa: B018  raises if parameters of single tasks are in no layer
    whole = {layer.path for part in sharing for layer in adapted.where[part.name] if layer.kind == WHOLE}
    for adapter in adapters:
        inside = [layer.path for layer in adapted.where[adapter.name] if adapted.enclosing(layer.path) in whole]
        if inside:
            raise UserError(
                f"adapter {adapter.name!r} would be at {listed(inside)}, in layers of which the sharing has copies: choose "
                "other layers for one of them"
            )
    return adapted


def check_alone(adapters: Sequence[Adapter], where: Mapping[str, Sequence[Layer]]) -> None:
    """Raises UserError if two adapters are at one layer, and are of a kind of which it has at most one."""
    at_layer: dict[str, str] = {}
    for adapter in adapters:
        for layer in where[adapter.name] if adapter.alone else ():
            if layer.path in at_layer:
                raise UserError(
                    f"adapters {at_layer[layer.path]!r} and {adapter.name!r} are both at {layer.path}, and a layer has at most "
                    f"one {type(adapter).__name__}: give one of them another target"
                )
            at_layer[layer.path] = adapter.name


def check(adapters: Sequence[Adapter]) -> None:
    """Checks adapters without a trunk.

    Args:
        adapters: The adapters.

    Raises:
        UserError: One line that names the adapter.
    """
    names = [adapter.name for adapter in adapters]
    for adapter in adapters:
        if names.count(adapter.name) > 1:
            raise UserError(f"adapter names must differ: {adapter.name!r} stands twice")
        if not adapter.name or not adapter.name.replace("-", "_").isidentifier() or not adapter.name.isascii():
            raise UserError(f"adapter name {adapter.name!r}: use letters, digits, '_' and '-' only, a letter first")
        adapter.check()
    prefixes = [adapter.name for adapter in adapters if isinstance(adapter, Prefix)]
    if len(prefixes) > 1:
        raise UserError(f"adapters {listed(prefixes)} are all prefixes: declare one, as long as they are together")


def notes(adapted: Adapted, params: Mapping[str, Any]) -> list[str]:
    """A line for each adapter with its numbers of layers and parameters, and what shares them.

    Args:
        adapted: The trunk.
        params: Its parameters, with {"adapters": ...}.
    """
    lines = []
    for adapter in adapted.adapters:
        leaves = trees.flat(params[ADAPTERS][adapter.name])
        size = sum(leaf.size for leaf in leaves.values())
        of_tasks = sum(leaf.size for path, leaf in leaves.items() if is_own(path))
        places = [layer for layer in adapted.where[adapter.name] if layer.kind != COMMON]
        what = f"{type(adapter).__name__} at {count(len(places), 'layer')}, {count(size, 'parameter')}"
        if isinstance(adapter, Adapter):
            kind = "task" if adapted.by_task(adapter) else "source"
            shared = (
                "for all rows alike" if adapter.per == RUN else f"for each of {count(adapted.stacked(adapter), kind)} its own"
            )
            lines.append(f"adapter {adapter.name}: {what}, {shared}")
        else:
            tasks = 1 if adapted.routes is None else len(adapted.routes.tasks)
            lines.append(f"sharing: {what}, {count(of_tasks // tasks, 'of them', 'of them')} each task's own")
            if adapted.through > 1:
                lines.append(f"sharing: {adapted.through} copies of each row pass from {adapted.first_copied} on")
    return lines


class OfSource(nn.Module):
    """A trunk with adapters as a linen module, for use inside a module without sources: all rows are of one source.

    Attributes:
        adapted: The trunk.
        source: The number of the source.
        task: The task whose copy of the rows is wanted, where they have several.
    """

    adapted: Adapted
    source: int = 0
    task: str = ""

    @property
    def config(self) -> Any:
        """The trunk's sizes."""
        return self.adapted.config

    @property
    def dtype(self) -> Any:
        """The compute dtype of the trunk."""
        return self.adapted.dtype

    def __call__(self, input_ids: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """The trunk's output; the arguments are those of the trunk."""
        rows_B = jnp.full(input_ids.shape[:1], self.source)
        output = self.adapted.apply({"params": self.variables["params"]}, input_ids, *args, source=rows_B, **kwargs)
        copy_of = dict(self.adapted.copy_of)
        if not copy_of:
            return output
        return output._replace(hidden=output.hidden[copy_of[self.task] :: self.adapted.copies])


def as_module(trunk: nn.Module | Adapted, source: int, task: str) -> nn.Module:
    """A trunk for use inside another linen module: itself, or, if it has adapters, the trunk with those of one task's rows."""
    return OfSource(trunk, source, task) if isinstance(trunk, Adapted) else trunk
