"""From a file's tensors to a parameter tree: names found, shapes checked, one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

from mtl_jax.core.errors import UserError
from mtl_jax.pretrained.family import Family
from mtl_jax.pretrained.lazy_tensor import LazyTensor

FLOATS = tuple(np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))

Sharding = jax.sharding.Sharding | Callable[[str], jax.sharding.Sharding] | None


class Placed(NamedTuple):
    """Parameters, and what was out of the ordinary.

    Attributes:
        params: The tree, float32.
        unused: Names of tensors that found no place.
        initialized: Our paths of parameters that the file does not have.
    """

    params: Any
    unused: tuple[str, ...]
    initialized: tuple[str, ...]


def shapes(family: Family, model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Our paths and shapes, from the module itself."""
    return traverse_util.flatten_dict(jax.eval_shape(lambda: _init(family, model, 0)), sep="/")


# Sizes that are a side of some tensor, of encoders and of encoder-decoders.
SIDES = (
    *("vocab_size", "decoder_vocab_size", "hidden_size", "embedding_size", "type_vocab_size", "head_size", "num_buckets"),
    *("intermediate_size", "encoder_feed_forward", "decoder_feed_forward", "num_heads", "encoder_heads", "decoder_heads"),
    "max_positions",
)
FAR = 4  # times as large as any side in the file: no mistake of one size for another
SOON, FEW = 2**16, 64  # sides and layers that take no time to build, so that a later check can say more


def check_sizes(config: Any, raw: Mapping[str, Any], tensors: Mapping[str, LazyTensor], where: str) -> None:
    """Refuses sizes that the file is far from, before a model of such sizes is built.

    Args:
        config: The sizes.
        raw: config.json, which they are from.
        tensors: The file's tensors.
        where: config.json's name, for errors.

    Raises:
        UserError: There are more layers than the file has tensors, or a size is far beyond the longest side of any tensor.
    """
    layers = sum(getattr(config, name, 0) for name in ("num_layers", "encoder_layers", "decoder_layers"))
    layers += len(getattr(config, "global_layers", ()))
    if layers > max(FEW, len(tensors)):
        raise UserError(f"{where}: it asks for {layers} layers, but the file has {len(tensors)} tensors")
    longest = max((side for tensor in tensors.values() if 0 not in tensor.shape for side in tensor.shape), default=0)
    computed = getattr(config, "positions", "learned") != "learned"
    for name in SIDES[:-1] if computed else SIDES:
        value = getattr(config, name, None) or 0
        if value > max(SOON, FAR * longest):
            theirs = next((key for key, read in raw.items() if type(read) is int and read == value), name)
            raise UserError(f"{where}: {theirs} is {value}, but no tensor of the file has a side longer than {longest}")


def unwrap(
    family: Family, config: Any, paths: Mapping[str, Any], tensors: Mapping[str, LazyTensor], where: str
) -> tuple[dict[str, LazyTensor], str]:
    """Finds what stands before the trunk's names in a file.

    Files of a class with a head have the base model's prefix there, files of a base model nothing, and files from
    training scripts often a wrapper's name before either ("module.").

    Returns:
        The tensors without a wrapper's name, and the prefix of trunk and pooler: family.prefix or "".

    Raises:
        UserError: Nothing in the file looks like this family's trunk.
    """
    wanted = [name for path in paths if path.startswith("trunk/") for name in family.names(path, config)]
    before = _before(wanted, tensors)
    for name in wanted:
        found = before.get(name, [])
        for prefix in (family.prefix, "", *found):
            if prefix in found:
                wrapper = prefix.removesuffix(family.prefix)
                return {key.removeprefix(wrapper): tensor for key, tensor in tensors.items()}, prefix.removeprefix(wrapper)
    raise UserError(f"{where}: no tensor of a {family.model_types[0]} model in it ({family.prefix}{wanted[0]} is missing)")


def _before(wanted: list[str], tensors: Mapping[str, LazyTensor]) -> dict[str, list[str]]:
    """{wanted name: what stands before it in the names of tensors that end in it}, in one pass over the file."""
    found: dict[str, list[str]] = {name: [] for name in wanted}
    depths = {name.count(".") + 1 for name in wanted}
    for tensor in tensors:
        for depth in depths:
            parts = tensor.rsplit(".", depth)
            name = ".".join(parts[-depth:])
            if name in found and len(parts) >= depth:
                found[name].append(tensor.removesuffix(name))
    return found


def with_tying(family: Family, config: Any, tensors: Mapping[str, LazyTensor], prefix: str) -> Any:
    """The configuration with `tied` false where the file has an output weight that is not the token table."""
    if not config.tied:
        return config
    path = family.table(config)
    table = _first([name if path.startswith("head/") else prefix + name for name in family.names(path, config)], tensors)
    output = _first(list(family.untied), tensors)
    if table is None or output is None:
        return config
    same = tensors[table].shape == tensors[output].shape and _equal(tensors[table].read(), tensors[output].read())
    return config if same else dataclasses.replace(config, tied=False)


def place(
    family: Family,
    model: nn.Module,
    config: Any,
    tensors: Mapping[str, LazyTensor],
    prefix: str,
    where: str,
    *,
    head_from_file: bool = True,
    new_head: bool = False,
    new_labels: bool = False,
    allow_missing: bool = False,
    sharding: Sharding = None,
    seed: int = 0,
) -> Placed:
    """Reads every parameter of a module.

    Args:
        family: The checkpoint's family.
        model: The module.
        config: Its configuration.
        tensors: The file's tensors.
        prefix: What stands before the names of trunk and pooler in the file.
        where: The checkpoint's name, for errors.
        head_from_file: Whether the file's head is of the module's kind; else none of its tensors belong to it, but for those
            that the base model has too.
        new_head: Whether parameters of the head may be missing: they are initialised.
        new_labels: Whether they may also have another shape, because the number of labels is another.
        allow_missing: Whether any parameter may be missing.
        sharding: Where the parameters go, for all or by our path; None is the default device.
        seed: Of what is initialised.

    Raises:
        UserError: A tensor is missing, or its shape or type does not fit.
    """
    expected = shapes(family, model)
    found: dict[str, str] = {}
    missing: list[str] = []
    lost: dict[str, str] = {}  # missing and not allowed to be: tensor name -> our path
    for path, shape in expected.items():
        of_head = path.startswith("head/")
        names = [name if of_head else prefix + name for name in family.names(path, config)]
        # BART's decoder is part of the head here, and of the base model in the file.
        of_base = not of_head or bool(family.prefix and names[0].startswith(family.prefix))
        name = _first(names, tensors) if head_from_file or of_base else None
        if name is not None and of_head and new_labels and _shape(path, tensors[name]) != shape.shape:
            name = None
        if name is not None:
            found[path] = name
            _check(path, name, tensors[name], shape.shape, where)
        elif path not in family.defaults:
            missing.append(path)
            # BERT's pooler is no part of the trunk: a checkpoint may come without it.
            if not (allow_missing or (of_head and new_head) or path.startswith("pooler/")):
                lost[names[0]] = path
    if lost:
        raise _missing(lost, where)
    fresh = _fresh(family, model, missing, seed)
    placed: dict[str, Any] = {}
    for path, shape in expected.items():
        if path in found:
            array: Any = _read(path, tensors[found[path]])
        elif path in fresh:
            array = fresh[path]
        else:
            array = np.full(shape.shape, family.defaults[path], np.float32)
        at = sharding(path) if callable(sharding) else sharding
        # Waiting frees the host's copy before the next tensor is read.
        placed[path] = jax.block_until_ready(jax.device_put(array, at))
    used = set(found.values())
    unused = [name for name in tensors if name not in used and not re.fullmatch(family.ignored, name)]
    return Placed(traverse_util.unflatten_dict(placed, sep="/"), tuple(sorted(unused)), tuple(missing))


def _init(family: Family, model: nn.Module, seed: int) -> Any:
    ids = jnp.zeros((1, 1), jnp.int32)
    others: dict[str, Any] = dict.fromkeys(family.inputs, ids)
    return model.init(jax.random.key(seed), ids, **others)["params"]


def _fresh(family: Family, model: nn.Module, paths: list[str], seed: int) -> dict[str, jax.Array]:
    """Freshly initialised parameters. Jitted, so that only what is asked for is computed."""
    if not paths:
        return {}

    def some() -> dict[str, jax.Array]:
        whole = traverse_util.flatten_dict(_init(family, model, seed), sep="/")
        return {path: whole[path] for path in paths}

    return jax.jit(some)()


def _shape(path: str, tensor: LazyTensor) -> tuple[int, ...]:
    return tensor.shape[::-1] if path.endswith("/kernel") else tensor.shape


def _check(path: str, name: str, tensor: LazyTensor, shape: tuple[int, ...], where: str) -> None:
    if _shape(path, tensor) != shape:
        file_shape = shape[::-1] if path.endswith("/kernel") else shape
        raise UserError(f"{where}: {name} has shape {tensor.shape}, but config.json asks for {file_shape}")
    if tensor.dtype not in FLOATS:
        raise UserError(f"{where}: {name} has the type {tensor.dtype}; only float checkpoints are read, no quantised ones")


def _missing(lost: Mapping[str, str], where: str) -> UserError:
    shown = 5
    names = ", ".join(f"{name} (our {path})" for name, path in [*lost.items()][:shown])
    more = f" and {len(lost) - shown} more" if len(lost) > shown else ""
    of_head = all(path.startswith("head/") for path in lost.values())
    hint = "head=None loads the trunk alone" if of_head else "fetch the file again, or allow_missing=True initialises them"
    return UserError(f"{where}: missing tensors: {names}{more}; {hint}")


def _read(path: str, tensor: LazyTensor) -> np.ndarray:
    array = tensor.read()
    # PyTorch keeps linear weights as [out, in]; embeddings lie the same way in both.
    return np.array(array.T if path.endswith("/kernel") else array, np.float32, order="C")


def _first(names: list[str], tensors: Mapping[str, LazyTensor]) -> str | None:
    return next((name for name in names if name in tensors), None)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    rows = 4096  # a comparison of whole tables would need as much memory again
    return all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))
