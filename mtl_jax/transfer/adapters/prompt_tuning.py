"""Prompt tuning: learned vectors in front of the token vectors of every example.

Shapes in names: B rows, T tokens a row, P length of the prompt, S examples a row, E width of the token vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError
from mtl_jax.models.layers import look_up
from mtl_jax.transfer.adapters.base import Adapter, Call, Layer, Params

WORDS, ROOT = "words", "root"  # kinds of layers: where tokens become vectors, and the whole module
STEP = "step"  # in memos: this pass is a step of decoding


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning(Adapter):
    """A prompt of learned vectors in front of each example's tokens (Lester et al. 2021, section 2).

    Parameters: prompt f32[P, E], which starts as the vectors of tokens drawn from the trunk's table. The prompt has the
    positions 0 to P - 1 and token type 0, and the tokens follow it; the vectors of the prompt are cut from the trunk's output,
    so heads read those of the tokens only. It changes the output from the start, and every example is P tokens longer.

    Attributes:
        length: P.
        examples: S, the most examples of a row: batch.examples_per_row, or 1 where batch.packed is false. Each has a prompt,
            so that a row is S P tokens longer.
        keep: Whether the prompt's vectors stay in front of the trunk's output, so that heads read them, as in PEFT.

    Examples:
        >>> experiment = dataclasses.replace(EXPERIMENT, adapters=(mtl_jax.PromptTuning(name="prompt"),))
    """

    length: int = 8
    examples: int = 1
    keep: bool = False

    order: ClassVar[int] = 4
    alone: ClassVar[bool] = True

    @property
    def added_tokens(self) -> int:
        return self.length

    def check(self) -> None:
        super().check()
        for field in ("length", "examples"):
            if getattr(self, field) < 1:
                raise UserError(f"adapter {self.name!r}: {field} is {getattr(self, field)}; it must be at least 1")

    def check_rows(self, examples: int) -> None:
        if self.keep:
            raise UserError(
                f"adapter {self.name!r}: keep is for models that PEFT has trained; the heads of tasks read texts only"
            )
        if self.examples != examples:
            raise UserError(
                f"adapter {self.name!r}: examples is {self.examples}, but a row has up to {examples}, and each needs a prompt: "
                f"set examples to {examples}, or batch.packed to false and examples to 1"
            )

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        if self.examples > 1 and any(layer.kind == "rotary" for layer in layers.values()):
            raise UserError(
                f"adapter {self.name!r}: local layers of this trunk see their neighbours in the row only, and the prompts of "
                f"{self.examples} examples are not: set batch.packed to false and examples to 1"
            )
        return self.matching(layers, "embeddings(/word)?", (WORDS,))

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {"prompt": 0.02 * jax.random.normal(key, (self.length, layer.outputs))}

    def start(self, key: jax.Array, layer: Layer, trunk: Params) -> dict[str, jax.Array]:
        table_VxE = trunk["embedding" if "embedding" in trunk else "word/embedding"]
        return {"prompt": table_VxE[jax.random.choice(key, len(table_VxE), (self.length,))]}

    def around(self, params: Params, call: Call) -> Any:
        return self._make_room(call) if call.layer.kind == ROOT else self._fill(params["prompt"], call)

    def _make_room(self, call: Call) -> Any:
        """The whole module on rows with S P more tokens in front; a trunk's output without them."""
        given = dict(zip(("input_ids", "attention_mask"), call.args, strict=False)) | dict(call.kwargs)
        if given.get("past") is not None:  # the cache has the prompt
            call.memo[STEP] = True
            return call()
        ids_BxT = given["input_ids"]
        rows, added = ids_BxT.shape[0], self.examples * self.length
        mask_BxT, positions_BxT, types_BxT, segments_BxT = (
            given.get(name) for name in ("attention_mask", "position_ids", "token_type_ids", "segment_ids")
        )
        mask_BxT = jnp.ones_like(ids_BxT) if mask_BxT is None else mask_BxT
        positions_BxT = jnp.arange(ids_BxT.shape[1])[None] if positions_BxT is None else positions_BxT
        types_BxT = jnp.zeros_like(ids_BxT) if types_BxT is None else types_BxT
        example = jnp.repeat(jnp.arange(1, self.examples + 1), self.length)
        # Without segments a row has one example, and the other prompts are padding.
        visible = example == 1 if segments_BxT is None else jnp.ones_like(example)

        def with_front(front: jax.Array, row: jax.Array) -> jax.Array:
            row = jnp.broadcast_to(row, (rows, row.shape[1]))
            return jnp.concatenate([jnp.broadcast_to(front.astype(row.dtype), (rows, added)), row], axis=1)

        given |= {
            "attention_mask": with_front(visible, mask_BxT),
            "position_ids": with_front(jnp.tile(jnp.arange(self.length), self.examples), positions_BxT + self.length),
            "token_type_ids": with_front(jnp.zeros_like(example), types_BxT),
            "segment_ids": None if segments_BxT is None else with_front(example, segments_BxT),
        }
        ids = with_front(jnp.zeros_like(example), ids_BxT)
        mask = given.pop("attention_mask")
        del given["input_ids"]
        output = call.next(ids, mask, **given)
        if getattr(output, "cache", None) is not None:  # of rows with one example: without the other prompts
            cache = jax.tree.map(lambda x: jnp.concatenate([x[:, :, : self.length], x[:, :, added:]], axis=2), output.cache)
            output = output._replace(cache=cache)
        return output if self.keep else output._replace(hidden=output.hidden[:, added:])

    def _fill(self, prompt: jax.Array, call: Call) -> Any:
        """The vectors of the row's tokens, with the prompt of every example in front."""
        if call.memo.get(STEP):
            return call()
        ids_BxT, *rest = call.args
        prompt_BxPxE = jnp.broadcast_to(prompt, (ids_BxT.shape[0], *prompt.shape[-2:]))
        front = jnp.tile(prompt_BxPxE, (1, self.examples, 1))
        added = front.shape[1]
        if not rest:
            row_BxTxE = call.next(ids_BxT[:, added:], **call.kwargs)
            return jnp.concatenate([front.astype(row_BxTxE.dtype), row_BxTxE], axis=1)
        table, *rest = rest  # an encoder that gives its token table, or the vectors in place of it
        row_BxTxE = look_up(table, ids_BxT[:, added:])
        return call.next(ids_BxT, jnp.concatenate([front.astype(row_BxTxE.dtype), row_BxTxE], axis=1), *rest, **call.kwargs)
