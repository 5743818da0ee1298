"""Masked language modelling: predict hidden tokens from the others, to adapt a trunk to unlabelled texts.

Shapes in names: R rows, T tokens a row, S examples a row, P hidden tokens a row at most, H trunk width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax.core.errors import UserError
from mtl_jax.data.batches import Batch
from mtl_jax.data.coverage import missing_row_reason
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.models.checkpoint_heads import MaskedLMHead
from mtl_jax.models.dropout import Dropout
from mtl_jax.models.trunk_output import Encoded, TrunkFacts
from mtl_jax.tasks.base import Task
from mtl_jax.tasks.row_statistics import RowStatistics, of_tokens

MASKED, RANDOM = 0.8, 0.1  # shares of the chosen tokens; the others are not changed


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM(Task):
    """The hidden tokens of every text (Devlin et al., 2019), chosen anew in every pass over the source (Liu et al., 2019).

    A share of each text's tokens is chosen; of these 80 % become the mask token, 10 % a random token, 10 % stay. In evaluation
    the same tokens are chosen every time. A long text is divided into windows. The output layer is the trunk's token table.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose texts it learns. No other task can have that source, because its texts are changed.
        rate: Share of a text's tokens that are chosen, at least one token; special tokens are never chosen.
        mask: Id of the mask token; filled in from the trunk's tokenizer, as are the next two.
        vocabulary: Number of ids, without those that the trunk's token table has no row for.
        special: Ids that are never chosen.
        hidden: Must be 0: this head has no such layer.
        dropout: Dropout rate in front of the head.
        metric: The main metric: accuracy.

    Examples:
        >>> task = mtl_jax.MaskedLM(name="words", source="texts")
    """

    rate: float = 0.15
    mask: int = -1
    vocabulary: int = 0
    special: tuple[int, ...] = ()
    metric: str = "accuracy"

    metric_names: ClassVar[tuple[str, ...]] = ("accuracy",)
    level: ClassVar[str] = "token"
    needs: ClassVar[tuple[str, ...]] = ("tokens", "table")
    outputs: ClassVar[int] = 2

    def check(self) -> None:
        super().check()
        if not 0 < self.rate <= 1:
            raise UserError(f"task {self.name!r}: rate is {self.rate}; it must be above 0 and at most 1")
        if self.hidden:
            raise UserError(f"task {self.name!r}: hidden is {self.hidden}; a masked LM's head has no such layer, leave it at 0")

    def on(self, trunk: TrunkFacts) -> Self:
        return dataclasses.replace(self, vocabulary=trunk.table[0])

    def filled(self, rows: Iterable[Row], tokenizer: Any) -> Self:
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"task {self.name!r}: masked LM needs a trunk whose tokenizer has a mask token, and this one's does not"
            )
        vocabulary, mask = min(len(tokenizer), self.vocabulary or len(tokenizer)), tokenizer.mask_token_id
        if mask >= vocabulary:
            raise UserError(
                f"task {self.name!r}: {missing_row_reason(tokenizer, mask, vocabulary, 'the token table of the trunk')}"
            )
        special = tuple(sorted(token for token in tokenizer.all_special_ids if token < vocabulary))
        return dataclasses.replace(self, mask=mask, vocabulary=vocabulary, special=special)

    def parse(self, row: Row) -> None:
        return None

    def corrupt(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The trunk's input, i32[len], and labels, i32[len]: the ids of the chosen tokens, -1 at all others."""
        labels = np.full_like(tokens, self.missing)
        candidates = np.flatnonzero(~np.isin(tokens, self.special))
        if not len(candidates):
            return tokens, labels
        chosen = rng.choice(candidates, max(1, round(self.rate * len(candidates))), replace=False)
        labels[chosen] = tokens[chosen]
        fate = rng.random(len(chosen))
        random = rng.integers(self.vocabulary - len(self.special), size=len(chosen))
        for special in self.special:  # ascending: from a number among the other tokens to an id
            random += random >= special
        tokens = tokens.copy()
        tokens[chosen] = np.where(fate < MASKED, self.mask, np.where(fate < MASKED + RANDOM, random, labels[chosen]))
        return tokens, labels

    def max_hidden(self, length: int, examples: int) -> int:
        """P, the most tokens of a row that are hidden: sum of max(1, round(rate * n)) <= rate * T + S over texts of n tokens.

        Args:
            length: T.
            examples: S.
        """
        most = math.floor(self.rate * length + 1e-6) + examples
        return min(length, -(-most // 8) * 8)

    def init(self, key: jax.Array, width: int) -> Any:
        table_VxH = jnp.zeros((self.vocabulary, width))
        # Not head.init: this name belongs to the head's initialiser.
        head, vectors_1x1xH = self._head(width, jnp.float32), jnp.zeros((1, 1, width))
        return nn.Module.init(head, key, vectors_1x1xH, None, table_VxH, True)["params"]

    def _head(self, width: int, dtype: Any) -> MaskedLMHead:
        return MaskedLMHead(self.vocabulary, width, "gelu", 1e-12, dtype, nn.initializers.normal(0.02))

    def apply(self, params: Any, encoded: Encoded, batch: Batch, key: jax.Array | None) -> jax.Array:
        """f32[R, T, 2]: of a hidden token its negative log-likelihood, and 1 if it is predicted, else 0; elsewhere (0, -1).

        Logits are computed for P tokens a row, not for all T.

        Raises:
            UserError: The batch has no labels, so none of its tokens is hidden; or the token table does not fit.
        """
        assert encoded.tokens is not None
        assert encoded.table is not None
        if self.name not in batch.labels:
            raise UserError(self._no_prediction)
        labels_RxT, H = batch.labels[self.name], encoded.tokens.shape[-1]
        if encoded.table.shape[0] < self.vocabulary or encoded.table.shape[1] != H:
            raise UserError(
                f"task {self.name!r}: masked LM needs a token table of {self.vocabulary} x {H}, by tokenizer and trunk; this "
                f"trunk's is {encoded.table.shape[0]} x {encoded.table.shape[1]}"
            )
        hidden_RxT = labels_RxT != self.missing
        P = self.max_hidden(labels_RxT.shape[1], batch.index.shape[1])
        index_RxP = jnp.argsort(~hidden_RxT, axis=1, stable=True)[:, :P]  # hidden tokens first
        x_RxPxH = jnp.take_along_axis(encoded.tokens, index_RxP[..., None], axis=1)
        if key is not None:
            dropout = Dropout(self.dropout, deterministic=False)
            x_RxPxH = jnp.asarray(dropout.apply({}, x_RxPxH, rngs={"dropout": key}))
        table_VxH = encoded.table[: self.vocabulary]
        head = self._head(H, encoded.tokens.dtype)
        logits_RxPxV = jnp.asarray(head.apply({"params": params}, x_RxPxH, None, table_VxH, True), jnp.float32)
        target_RxP = jnp.maximum(jnp.take_along_axis(labels_RxT, index_RxP, axis=1), 0)
        loss_RxP = optax.softmax_cross_entropy_with_integer_labels(logits_RxPxV, target_RxP)
        right_RxP = (logits_RxPxV.argmax(axis=-1) == target_RxP).astype(jnp.float32)
        # Back to the tokens: the n-th hidden token of a row has the n-th of the P results.
        nth_RxT = jnp.maximum(jnp.cumsum(hidden_RxT, axis=1) - 1, 0)
        result_RxTx2 = jnp.take_along_axis(jnp.stack([loss_RxP, right_RxP], axis=-1), nth_RxT[..., None], axis=1)
        return jnp.where(hidden_RxT[..., None], result_RxTx2, jnp.array([0.0, -1.0]))

    def logits(self, params: Any, hidden_BxTxH: jax.Array, table_VxH: jax.Array) -> jax.Array:
        """f32[B, T, V]: of every token over the vocabulary, for a look at the words that fit.

        Args:
            params: The head's.
            hidden_BxTxH: The trunk's vectors.
            table_VxH: The trunk's token table.
        """
        head = self._head(hidden_BxTxH.shape[-1], hidden_BxTxH.dtype)
        logits = head.apply({"params": params}, hidden_BxTxH, None, table_VxH[: self.vocabulary], True)
        return jnp.asarray(logits, jnp.float32)

    def loss(self, outputs: jax.Array, labels: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Negative log-likelihood in nats: sum over the hidden tokens, and their number."""
        hidden_RxT = labels != self.missing
        return jnp.where(hidden_RxT, outputs[..., 0], 0.0).sum(), hidden_RxT.sum().astype(jnp.float32)

    def metrics(self, outputs: Sequence[np.ndarray] | np.ndarray, examples: Examples) -> dict[str, float]:
        """Accuracy, a share of 1, and perplexity (lower is better), both over the hidden tokens only."""
        outputs_Nx2 = np.concatenate(list(outputs)).astype(np.float64)
        outputs_Nx2 = outputs_Nx2[outputs_Nx2[:, 1] >= 0]
        perplexity = np.exp(min(float(outputs_Nx2[:, 0].mean()), 700.0))  # the largest exponent of a float
        return {"accuracy": float(outputs_Nx2[:, 1].mean()), "perplexity": float(perplexity)}

    def row_statistics(self, outputs: Sequence[np.ndarray] | np.ndarray, examples: Examples) -> RowStatistics:
        right = [np.asarray(output)[np.asarray(output)[:, 1] >= 0, 1] for output in outputs]
        return of_tokens(right, examples.row_of, len(examples.data))

    def describe(self, outputs: Sequence[np.ndarray], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        raise UserError(self._no_prediction)

    @property
    def _no_prediction(self) -> str:
        return f"task {self.name!r} is a masked LM, which hides tokens at random: it has no prediction for a text"
