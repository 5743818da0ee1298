"""Where the state of a run lies: whole on every device, or cut over the devices that share the rows of a batch.

A cut leaf is gathered where a layer reads it, and its gradient is cut again at the same place (fully sharded data parallelism;
Rajbhandari et al., 2020, "ZeRO"). Cuts follow from shapes alone, so that parameters, moments, averages and references of one
shape lie alike, and nothing about them is stored: a checkpoint fits any number of devices.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtl_jax.core.errors import count
from mtl_jax.training import mesh as meshes

SMALLEST = 2**16  # numbers of a leaf that is worth cutting; a smaller one is whole on every device
SHARE = 0.8  # of a device's memory; "auto" cuts a state that needs more, because activations need the rest


def axis_to_cut(shape: tuple[int, ...], parts: int) -> int | None:
    """The largest axis of a leaf that divides into equal parts, the first of several; None: the leaf stays whole.

    Args:
        shape: Of the leaf.
        parts: The number of devices.

    >>> axis_to_cut((512, 4096), 8), axis_to_cut((510, 4095), 8), axis_to_cut((512,), 8)
    (1, None, None)
    """
    divisible = [axis for axis, size in enumerate(shape) if size and size % parts == 0]
    if parts == 1 or math.prod(shape) < SMALLEST or not divisible:
        return None
    return max(divisible, key=lambda axis: (shape[axis], -axis))


class Placement(NamedTuple):
    """How a tree of parameters, or one like it, lies on the devices.

    Attributes:
        mesh: The devices.
        cut: Whether large leaves are cut over them; else every leaf is whole on each.
    """

    mesh: Mesh
    cut: bool = False

    def of_shape(self, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of a leaf."""
        axis = axis_to_cut(shape, meshes.shards(self.mesh)) if self.cut else None
        return meshes.replicated(self.mesh) if axis is None else meshes.by_rows(self.mesh, axis)

    def of(self, tree: Any) -> Any:
        """The shardings of a tree of arrays or shapes."""
        return jax.tree.map(lambda leaf: self.of_shape(leaf.shape), tree)

    def shapes(self, tree: Any) -> Any:
        """A tree of arrays or shapes as shapes with shardings."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.of_shape(leaf.shape)), tree)

    def place(self, tree: Any) -> Any:
        """Host arrays to device arrays of the same shape; every host has the whole arrays."""
        if not self.cut:
            return meshes.place(tree, meshes.replicated(self.mesh))
        return jax.tree.map(lambda leaf: meshes.place(leaf, self.of_shape(leaf.shape)), tree)

    def moved(self, tree: Any) -> Any:
        """Device arrays, of which some lie elsewhere, to the devices; those that lie so already are not copied."""

        def move(leaf: jax.Array) -> jax.Array:
            sharding = self.of_shape(leaf.shape)
            return leaf if leaf.sharding == sharding else meshes.place(leaf, sharding)

        return jax.tree.map(move, tree)

    def whole(self, tree: Any) -> Any:
        """Device arrays to arrays that are whole on every device."""
        return jax.jit(lambda tree: tree, out_shardings=meshes.replicated(self.mesh))(tree) if self.cut else tree

    def on_host(self, tree: Any) -> Any:
        """Device arrays to host arrays, on every host: all hosts call it together."""
        if not self.cut or jax.process_count() == 1:
            return jax.device_get(tree)
        return jax.tree.map(lambda leaf: jax.device_get(self.whole(leaf).addressable_data(0)), tree)

    def constrained(self, tree: Any, leading: int = 0) -> Any:
        """Within a jitted function: the tree, laid out as of().

        Args:
            tree: Arrays.
            leading: The number of axes in front of those of the parameters, such as one over tasks; they are not cut.
        """
        if not self.cut:
            return tree

        def constrain(leaf: jax.Array) -> jax.Array:
            spec = self.of_shape(leaf.shape[leading:]).spec
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, PartitionSpec(*[None] * leading, *spec)))

        return jax.tree.map(constrain, tree)

    def gathered(self, tree: Any) -> Any:
        """Within a jitted function: the tree, whole on every device; the gradient of a cut leaf is cut."""
        return jax.tree.map(self._gather, tree) if self.cut else tree

    def boxed(self, tree: Any) -> Any:
        """Parameters of a linen module, each of which is gathered by the layer that reads it."""
        return jax.tree.map(self._box, tree) if self.cut else tree

    def _gather(self, leaf: jax.Array) -> jax.Array:
        sharding = self.of_shape(leaf.shape)
        whole = meshes.replicated(self.mesh)
        return leaf if sharding == whole else _move_p.bind(leaf, to=whole, back=sharding)

    def _box(self, leaf: jax.Array) -> Any:
        return leaf if self.of_shape(leaf.shape) == meshes.replicated(self.mesh) else Cut(leaf, self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cut(nn.meta.AxisMetadata[jax.Array]):
    """A cut parameter; linen takes it out of the box where a layer asks for it, and there it is gathered.

    Attributes:
        value: The parameter.
        placement: How it lies.
    """

    value: jax.Array
    placement: Placement = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """Of the parameter."""
        return self.value.dtype

    def unbox(self) -> jax.Array:
        return self.placement.gathered(self.value)

    def __jax_array__(self) -> jax.Array:
        return self.unbox()

    def replace_boxed(self, val: Any) -> Any:
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Cut:
        raise NotImplementedError("nn.scan and nn.vmap over layers with cut parameters")

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Cut:
        raise NotImplementedError("nn.scan and nn.vmap over layers with cut parameters")


# A sharding constraint whose transpose is another one: without it a gradient would be made whole before it is cut.
_move_p = Primitive("move")
_move_p.def_impl(lambda leaf, *, to, back: jax.lax.with_sharding_constraint(leaf, to))
_move_p.def_abstract_eval(lambda leaf, *, to, back: leaf)
ad.deflinear2(_move_p, lambda cotangent, leaf, *, to, back: [_move_p.bind(cotangent, to=back, back=to)])
mlir.register_lowering(
    _move_p,
    mlir.lower_fun(lambda leaf, *, to, back: jax.lax.with_sharding_constraint(leaf, to), multiple_results=False),
)


def _move_many(arguments: Any, axes: Any, *, to: NamedSharding, back: NamedSharding) -> Any:
    (leaves,), (axis,) = arguments, axes

    def with_axis(sharding: NamedSharding) -> NamedSharding:
        spec = [*sharding.spec, *[None] * (leaves.ndim - 1 - len(sharding.spec))]
        return NamedSharding(sharding.mesh, PartitionSpec(*spec[:axis], PartitionSpec.UNCONSTRAINED, *spec[axis:]))

    return _move_p.bind(leaves, to=with_axis(to), back=with_axis(back)), axis


batching.primitive_batchers[_move_p] = _move_many


class Decision(NamedTuple):
    """Whether a state is cut.

    Attributes:
        cut: Whether it is.
        note: A line for the log that says why; "": none.
    """

    cut: bool
    note: str = ""


def decide(choice: str, needed: int, devices: int, memory: float | None) -> Decision:
    """What a choice of Experiment.sharding means on some devices.

    "auto" cuts a state that needs more than SHARE of a device's memory where every device has all of it.

    Args:
        choice: replicated, fsdp or auto.
        needed: Bytes of state, gradients and references, if a device has all of them.
        devices: Their number.
        memory: Bytes of a device's memory; None where it is not known, as on CPUs.
    """
    if choice == "replicated":
        return Decision(False)
    need = f"state, gradients and references need {_size(needed)}"
    if devices == 1:
        return Decision(False, f"sharding {choice}: one device has everything, so nothing is cut; {need}")
    many = count(devices, "device")
    if choice == "fsdp":
        return Decision(True, f"sharding fsdp: cut over {many}; {need} in all")
    if memory is None:
        return Decision(False, f"sharding auto: replicated, because the memory of these devices is not known (CPUs); {need}")
    cut = needed > SHARE * memory
    chosen = f"fsdp over {many}" if cut else "replicated"
    return Decision(
        cut, f"sharding auto: {chosen}; {need}, {'more' if cut else 'not more'} than {SHARE:.0%} of a device's {_size(memory)}"
    )


def memory_of(device: jax.Device) -> float | None:
    """Bytes that programs can use on a device; None where it does not tell, as CPUs."""
    stats = None if device.platform == "cpu" else device.memory_stats()
    return None if not stats else stats.get("bytes_limit")


def bytes_of(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes on a device: of a leaf with a sharding those of its part."""

    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * jnp.dtype(leaf.dtype).itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _size(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
