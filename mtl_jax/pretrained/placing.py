"""From a file's tensors to a parameter tree: names matched, shapes checked, one tensor in memory at a time."""

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

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.models import traced
from mtl_jax.pretrained.family import Family
from mtl_jax.pretrained.lazy_tensor import LazyTensor

FLOATS = tuple(np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))

# Fields of a configuration, of encoders and of encoder-decoders, that are the length of a side of some tensor.
SIDES = (
    *("vocab_size", "decoder_vocab_size", "hidden_size", "embedding_size", "type_vocab_size", "head_size", "num_buckets"),
    *("intermediate_size", "encoder_feed_forward", "decoder_feed_forward", "num_heads", "encoder_heads", "decoder_heads"),
    "max_positions",
)
LARGEST_RATIO = 4  # of a size to the longest side in the file; a later check names the tensor that differs by less
# Sides and layers up to these are built in no time, so a later check can say more.
SMALL_SIDE, FEW_LAYERS = 2**16, 64

Sharding = jax.sharding.Sharding | Callable[[str], jax.sharding.Sharding] | None


class Placed(NamedTuple):
    """Parameters of a loaded model, and where model and file differ.

    Attributes:
        params: The tree, float32.
        unused: Names of tensors that are not parameters of the model.
        initialized: Our paths of parameters that the file does not have.
    """

    params: Any
    unused: tuple[str, ...]
    initialized: tuple[str, ...]


def shapes(family: Family, model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a module's parameters by our paths, from the module itself."""
    return trees.flat(traced.shapes(model, family.inputs)[1]["params"])


def check_sizes(config: Any, raw: Mapping[str, Any], tensors: Mapping[str, LazyTensor], where: str) -> None:
    """Refuses sizes far beyond those of the file's tensors, before a model of such sizes is built.

    Args:
        config: The model's configuration.
        raw: The config.json that it was read from.
        tensors: The file's tensors.
        where: config.json's name, for errors.

    Raises:
        UserError: The model has more layers than the file has tensors, or a size is far beyond the longest side of any tensor.
    """
    layers = sum(getattr(config, name, 0) for name in ("num_layers", "encoder_layers", "decoder_layers"))
    layers += len(getattr(config, "global_layers", ()))
    if layers > max(FEW_LAYERS, len(tensors)):
        raise UserError(f"{where}: it asks for {layers} layers, but the file has {len(tensors)} tensors")
    longest = max((side for tensor in tensors.values() if 0 not in tensor.shape for side in tensor.shape), default=0)
    computed = getattr(config, "positions", "learned") != "learned"
    for name in SIDES[:-1] if computed else SIDES:
        value = getattr(config, name, None) or 0
        if value > max(SMALL_SIDE, LARGEST_RATIO * longest):
            field = next((key for key, number in raw.items() if type(number) is int and number == value), name)
            raise UserError(f"{where}: {field} is {value}, but no tensor of the file has a side longer than {longest}")


def unwrap(
    family: Family, config: Any, paths: Mapping[str, Any], tensors: Mapping[str, LazyTensor], where: str
) -> tuple[dict[str, LazyTensor], str]:
    """Finds the prefix of the trunk's names in a file, and takes a wrapper's name off.

    Files of a class with a head have the base model's prefix before the trunk's names, files of a base model have none, and
    files of training scripts often have a wrapper's name ("module.") before either.

    Args:
        family: The checkpoint's family.
        config: The model's configuration.
        paths: Our paths of the model's parameters.
        tensors: The file's tensors.
        where: The checkpoint's name, for errors.

    Returns:
        The tensors without a wrapper's name, and the prefix of trunk and pooler: family.prefix or "".

    Raises:
        UserError: No tensor of the file has a name of this family's trunk.
    """
    trunk_names = [name for path in paths if path.startswith("trunk/") for name in family.names(path, config)]
    prefixes = _prefixes(trunk_names, tensors)
    for name in trunk_names:
        candidates = prefixes.get(name, [])
        for prefix in (family.prefix, "", *candidates):
            if prefix in candidates:
                wrapper = prefix.removesuffix(family.prefix)
                return {key.removeprefix(wrapper): tensor for key, tensor in tensors.items()}, prefix.removeprefix(wrapper)
    raise UserError(f"{where}: no tensor of a {family.model_types[0]} model in it ({family.prefix}{trunk_names[0]} is missing)")


def _prefixes(names: list[str], tensors: Mapping[str, LazyTensor]) -> dict[str, list[str]]:
    """For each wanted name, the prefixes of the tensors whose names end in it; in one pass over the file."""
    prefixes: dict[str, list[str]] = {name: [] for name in names}
    depths = {name.count(".") + 1 for name in names}
    for tensor in tensors:
        for depth in depths:
            parts = tensor.rsplit(".", depth)
            name = ".".join(parts[-depth:])
            if name in prefixes and len(parts) >= depth:
                prefixes[name].append(tensor.removesuffix(name))
    return prefixes


def with_tying(family: Family, config: Any, tensors: Mapping[str, LazyTensor], prefix: str) -> Any:
    """The configuration, with `tied` false where the file's output weight differs from its token table."""
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
    """Reads the parameters of a module from a file's tensors.

    Args:
        family: The checkpoint's family.
        model: The module.
        config: Its configuration.
        tensors: The file's tensors.
        prefix: Prefix of the names of trunk and pooler in the file.
        where: The checkpoint's name, for errors.
        head_from_file: Whether the file's head is of the module's kind. If not, the module's head takes only those tensors from
            the file that belong to the base model there.
        new_head: Whether parameters of the head may be missing from the file; they are then initialised.
        new_labels: Whether they may also have another shape in the file, because the number of labels differs.
        allow_missing: Whether any parameter may be missing from the file.
        sharding: The sharding of all parameters, or a function from our path to it; None is the default device.
        seed: Seed of initialised parameters.

    Raises:
        UserError: A tensor is missing, or its shape or type does not fit.
    """
    expected = shapes(family, model)
    tensor_of: dict[str, str] = {}  # our path -> tensor name
    missing: list[str] = []
    required: dict[str, str] = {}  # missing, but may not be: tensor name -> our path
    for path, shape in expected.items():
        in_head = path.startswith("head/")
        names = [name if in_head else prefix + name for name in family.names(path, config)]
        # BART's decoder is part of the head here, and of the base model in the file.
        in_base = not in_head or bool(family.prefix and names[0].startswith(family.prefix))
        name = _first(names, tensors) if head_from_file or in_base else None
        if name is not None and in_head and new_labels and _shape(path, tensors[name]) != shape.shape:
            name = None
        if name is not None:
            tensor_of[path] = name
            _check(path, name, tensors[name], shape.shape, where)
        elif path not in family.defaults:
            missing.append(path)
            # BERT's pooler is not a part of the trunk: a checkpoint may lack it.
            if not (allow_missing or (in_head and new_head) or path.startswith("pooler/")):
                required[names[0]] = path
    if required:
        raise _missing(required, where)
    fresh = _fresh(family, model, missing, seed)
    placed: dict[str, Any] = {}
    for path, shape in expected.items():
        if path in tensor_of:
            array: Any = _read(path, tensors[tensor_of[path]])
        elif path in fresh:
            array = fresh[path]
        else:
            array = np.full(shape.shape, family.defaults[path], np.float32)
        target = sharding(path) if callable(sharding) else sharding
        # Waiting frees the host's copy before the next tensor is read.
        placed[path] = jax.block_until_ready(jax.device_put(array, target))
    used = set(tensor_of.values())
    unused = [name for name in tensors if name not in used and not re.fullmatch(family.ignored, name)]
    return Placed(trees.nested(placed), tuple(sorted(unused)), tuple(missing))


def _init(family: Family, model: nn.Module, seed: int) -> Any:
    ids = jnp.zeros((1, 1), jnp.int32)
    further_inputs: dict[str, Any] = dict.fromkeys(family.inputs, ids)
    return model.init(jax.random.key(seed), ids, **further_inputs)["params"]


def _fresh(family: Family, model: nn.Module, paths: list[str], seed: int) -> dict[str, jax.Array]:
    """Freshly initialised parameters. Jitted, so that only the requested ones are computed."""
    if not paths:
        return {}

    def initialise() -> dict[str, jax.Array]:
        params = trees.flat(_init(family, model, seed))
        return {path: params[path] for path in paths}

    return jax.jit(initialise)()


def _shape(path: str, tensor: LazyTensor) -> tuple[int, ...]:
    return tensor.shape[::-1] if path.endswith("/kernel") else tensor.shape


def _check(path: str, name: str, tensor: LazyTensor, shape: tuple[int, ...], where: str) -> None:
    if _shape(path, tensor) != shape:
        file_shape = shape[::-1] if path.endswith("/kernel") else shape
        raise UserError(f"{where}: {name} has shape {tensor.shape}, but config.json asks for {file_shape}")
    if tensor.dtype not in FLOATS:
        raise UserError(f"{where}: {name} has the type {tensor.dtype}; only float checkpoints are read, not quantised ones")


def _missing(required: Mapping[str, str], where: str) -> UserError:
    shown = 5
    names = ", ".join(f"{name} (our {path})" for name, path in [*required.items()][:shown])
    more = f" and {len(required) - shown} more" if len(required) > shown else ""
    in_head = all(path.startswith("head/") for path in required.values())
    hint = "head=None loads the trunk alone" if in_head else "fetch the file again, or initialise them with allow_missing=True"
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
