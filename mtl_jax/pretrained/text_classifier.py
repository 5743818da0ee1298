"""The text classifier of a checkpoint's family, without its trunk: from a text's vector to logits.

It is the pooler and the head of the family's class for sequence classification in transformers, so a trained one is written
into such a checkpoint as it is. Which vector of a text it reads, the family says: that of its first token, that of its last
one, or the mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.models.causal_model import ScoreHead
from mtl_jax.models.modernbert import MeanPooler
from mtl_jax.pretrained import families, locate
from mtl_jax.pretrained.checkpoint import head_kind, load
from mtl_jax.pretrained.family import Family
from mtl_jax.pretrained.tensor_files import read_json

KIND = "sequence_classification"
OUTPUT_LAYERS = ("classifier", "score")  # names of the layer with an output for each label
WHERE = "config.json of the trunk"


class TextClassifier(nn.Module):
    """Logits f32[..., O] of texts; parameters {["pooler",] "head"}, named as in models.checkpoint_heads.EncoderModel.

    Attributes:
        head: A head over rows, as the family builds it.
        pooler: The pooler in front of it, or None.
    """

    head: nn.Module
    pooler: nn.Module | None = None

    def __call__(self, vectors: jax.Array, deterministic: bool = True) -> jax.Array:
        """The logits of vectors f[..., H]; dropout needs an rng named "dropout" unless deterministic."""
        hidden_Nx1xH = vectors.reshape(-1, 1, vectors.shape[-1])  # rows of one token, which is the one that is read
        if isinstance(self.head, ScoreHead):
            logits_NxO = self.head(hidden_Nx1xH[:, 0], deterministic)
        else:
            mask_Nx1 = jnp.ones(hidden_Nx1xH.shape[:2], jnp.int32)
            pooled_NxH = None if self.pooler is None else self.pooler(hidden_Nx1xH, mask_Nx1)
            mask = {"attention_mask": mask_Nx1} if getattr(self.head, "reads_mask", False) else {}
            logits_NxO = self.head(hidden_Nx1xH, pooled_NxH, None, deterministic, **mask)
        return logits_NxO.reshape(*vectors.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class FamilyClassifier:
    """A declaration of a TextClassifier, from which a run's files build it again.

    Attributes:
        config: The config.json of the checkpoint.
        dropout: Every dropout rate in it; None: those of config.json.
    """

    config: dict[str, Any]
    dropout: float | None = None

    @property
    def family(self) -> Family:
        """The checkpoint's family."""
        return families.of(self.config, WHERE)

    @property
    def reads(self) -> str:
        """The vector of a text that it reads: first, last, or mean; "" for all of them."""
        return self.family.text_vector(self.family.config(self.config, WHERE))

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that config.json names, in order; () where it names none."""
        names = self.config.get("id2label") or {}
        return tuple(str(names.get(str(number), "")) for number in range(len(names)))

    def module(self, outputs: int) -> TextClassifier:
        """The classifier of `outputs` labels; it computes in float32."""
        sizes = with_dropout(self.family.config(self.config, WHERE), self.dropout)
        model: Any = self.family.build(dataclasses.replace(sizes, num_labels=outputs), KIND, jnp.float32)
        pooler = getattr(model, "pooler", None)
        return TextClassifier(model.head, None if isinstance(pooler, MeanPooler) else pooler)


def with_dropout(sizes: Any, dropout: float | None) -> Any:
    """The sizes of a model with every dropout rate set, unless it is None."""
    if dropout is None:
        return sizes
    return dataclasses.replace(sizes, **{field.name: dropout for field in dataclasses.fields(sizes) if "dropout" in field.name})


def declared(raw: Mapping[str, Any] | None, dropout: float | None) -> FamilyClassifier:
    """The classifier of a checkpoint's family.

    Args:
        raw: Its config.json; None for a trunk from scratch.
        dropout: As in FamilyClassifier.

    Raises:
        UserError: The trunk is from scratch, transformers has no such class for its family, or it reads more than one vector.
    """
    if raw is None:
        raise UserError("the trunk is from scratch, and the classifier of a family needs a checkpoint")
    family = families.of(raw, WHERE)
    if KIND not in family.heads.values():
        raise UserError(f"checkpoints of the family {family.model_types[0]} have no classifier here")
    classifier = FamilyClassifier(dict(raw), dropout)
    if not classifier.reads:
        raise UserError(
            f"the classifier of this {family.model_types[0]} checkpoint reads every token of a text, as its config.json says, "
            "and a head reads one vector of it"
        )
    return classifier


def parameters(path: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a checkpoint has of its family's classifier: pooler, or pooler and head; {} where it has none.

    Args:
        path: The checkpoint, as for pretrained.load.
        raw: Its config.json.

    Raises:
        UserError: The checkpoint cannot be loaded.
    """
    family = families.of(raw, WHERE)
    kind = head_kind(family.heads, read_json(locate.locate(path), "config.json"), path)
    module = FamilyClassifier(dict(raw)).module(1)
    if kind != KIND and module.pooler is None:
        return {}
    checkpoint = load(path, head=KIND if kind == KIND else None)
    parts = {name: tree for name, tree in checkpoint.params.items() if name in ("pooler", "head")}
    return trees.nested({name: leaf for name, leaf in trees.flat(parts).items() if name not in checkpoint.initialized})


def outputs(params: Mapping[str, Any]) -> int:
    """The number of outputs of a classifier with such parameters; 0 where the output layer is not among them."""
    sizes = [leaf.shape[-1] for path, leaf in trees.flat(params).items() if path.split("/")[-2] in OUTPUT_LAYERS]
    return sizes[0] if sizes else 0


def begin(fresh: Any, loaded: Mapping[str, Any], columns: Sequence[int] | None, scale: float = 1.0) -> dict[str, Any]:
    """The parameters of a classifier that begins as that of a checkpoint.

    Args:
        fresh: Its parameters, freshly initialised.
        loaded: The result of parameters().
        columns: The output of the checkpoint that becomes each of its outputs; None: the output layer stays fresh.
        scale: The checkpoint's outputs are divided by it.
    """
    leaves = trees.flat(loaded)
    result = {}
    for path, leaf in trees.flat(fresh).items():
        is_output = path.split("/")[-2] in OUTPUT_LAYERS
        if path not in leaves or (is_output and columns is None):
            result[path] = leaf
            continue
        array = np.asarray(leaves[path])
        array = array[..., list(columns)] / np.float32(scale) if is_output and columns is not None else array
        result[path] = jnp.array(array, leaf.dtype)  # a copy: the step donates its buffers
    return trees.nested(result)


def scaled(params: Any, scale: float) -> Any:
    """The parameters with outputs that are multiplied by a number."""
    leaves = trees.flat(params)
    factors = {path: np.float32(scale if path.split("/")[-2] in OUTPUT_LAYERS else 1.0) for path in leaves}
    return trees.nested({path: np.asarray(leaf) * factors[path] for path, leaf in leaves.items()})
