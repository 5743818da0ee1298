"""Text to text: translation, summarisation. The head is a decoder.

Shapes in names: R rows, T source tokens a row, U target tokens a row, H trunk width, V target vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.errors import UserError, listed
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.data.source import Source
from mtl_jax.data.split_texts import first_sentence
from mtl_jax.models import warm_start
from mtl_jax.models.encoder import EncoderConfig
from mtl_jax.models.seq2seq_decoder import Decoder
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig
from mtl_jax.models.trunk_output import Encoded, TrunkFacts
from mtl_jax.pretrained.locate import languages
from mtl_jax.tasks import decoders, metrics
from mtl_jax.tasks.base import Task, column
from mtl_jax.tasks.losses import token_losses

TABLES = ("trunk", "own")
BEGINNINGS = ("fresh", "encoder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2Seq(Task):
    """A text for every text (Vaswani et al., 2017): each token is learned from the true ones before it (teacher forcing).

    On an encoder-decoder checkpoint the head starts as the checkpoint's decoder. On an encoder-only checkpoint it is a fresh
    decoder, or one that starts as the encoder; on a trunk from scratch one of the same make as the trunk. Targets are tokenised
    by the trunk's tokenizer.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose texts are read.
        column: The source's column with the target text. A list there is several texts: the first one is learned, and a metric
            compares with all of them. Empty: the row has none.
        target_length: Most tokens of a target text, the end token included; longer ones are cut, and counted.
        label_smoothing: Share of the target probability spread evenly over the vocabulary.
        begin: As what a decoder on an encoder-only checkpoint begins: "fresh", with norms in front; or "encoder": its blocks,
            positions and norms are the encoder's, and cross-attention starts as self-attention (Rothe et al., 2020).
        layers: Of a fresh decoder; 0: as many as a trunk from scratch has, 3 on an encoder-only checkpoint.
        heads: Of its attention; 0: as the trunk from scratch, on an encoder-only checkpoint one for each 64 of its width.
        feed_forward: Its width inside the feed-forward part; 0: as the trunk from scratch, or 4 times the width.
        table: Of a fresh decoder: "trunk": it reads and predicts by the trunk's token table; "own": by a table of its own.
        dropout: Rate inside a decoder of the task's own on an encoder-only checkpoint; other decoders have the trunk's rates.
        beams: Beams of the search on test and in predictions; 1: greedy.
        dev_beams: Beams on dev while training.
        max_new_tokens: Most tokens of a generated text; 0: target_length.
        length_penalty: Beams are compared by log-probability / length ** this; None: as the checkpoint says, or 1.
        metric: bleu, chrf, rouge1, rouge2 or rougeL, of generated texts, as shares of 1; or token_accuracy, with true tokens
            before each.
        hidden: Must be 0: this head has a shape of its own.
        decoder: The decoder's sizes; filled in from the trunk, as are the next five.
        encoder: The sizes of the encoder that it begins as, or None.
        from_checkpoint: Whether it started as a checkpoint's decoder.
        start: Token that a decoder reads first.
        end: Token that ends a target text.
        leading: Special tokens that the tokenizer puts in front of a target text and a fresh decoder does not learn.
    """

    column: str
    target_length: int = 64
    label_smoothing: float = 0.0
    begin: str = "fresh"
    layers: int = 0
    heads: int = 0
    feed_forward: int = 0
    table: str = "trunk"
    dropout: float = 0.1
    beams: int = 5
    dev_beams: int = 1
    max_new_tokens: int = 0
    length_penalty: float | None = None
    metric: str = "bleu"
    decoder: Seq2SeqConfig | None = None
    encoder: EncoderConfig | None = None
    from_checkpoint: bool = False
    start: int = -1
    end: int = -1
    leading: int = 0

    level: ClassVar[str] = "target"
    label_level: ClassVar[str] = "target"
    decodes: ClassVar[bool] = True
    large: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("tokens", "table")
    outputs: ClassVar[int] = 3

    @property
    def metric_names(self) -> tuple[str, ...]:
        family = metrics.family(self.metric)
        return ("token_accuracy", *(family or metrics.TEXT_METRICS))

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def check(self) -> None:
        super().check()
        if self.hidden:
            raise UserError(f"task {self.name!r}: hidden is {self.hidden}; a decoder has no such layer, leave it at 0")
        for field, least in (
            ("target_length", 2),
            ("layers", 0),
            ("heads", 0),
            ("feed_forward", 0),
            ("beams", 1),
            ("dev_beams", 1),
            ("max_new_tokens", 0),
        ):
            if getattr(self, field) < least:
                raise UserError(f"task {self.name!r}: {field} is {getattr(self, field)}; it must be at least {least}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"task {self.name!r}: label_smoothing is {self.label_smoothing}; it is a share below 1")
        for field, choices in (("table", TABLES), ("begin", BEGINNINGS)):
            if getattr(self, field) not in choices:
                raise UserError(f"task {self.name!r}: {field} is {getattr(self, field)!r}; it is one of {', '.join(choices)}")

    def check_source(self, source: Source) -> None:
        if source.pair:
            raise UserError(f"task {self.name!r}: source {source.name!r} has pairs of texts; a decoder is given one text")

    def on(self, trunk: TrunkFacts) -> Self:
        """The task with its decoder's sizes, and where its texts start and end.

        Raises:
            UserError: The trunk has no tokens for that, its token table does not fit, or its tokenizer marks texts by their
                language and does not know which ones.
        """
        if codes := languages(trunk.tokenizer):
            raise UserError(
                f"task {self.name!r}: the trunk's tokenizer marks source and target by language, and nothing says which; "
                f"give src_lang and tgt_lang in the checkpoint's tokenizer_config.json; languages: {listed(codes)}"
            )
        around = trunk.tokenizer(text_target="")["input_ids"]
        if not around or around[-1] not in trunk.tokenizer.all_special_ids:
            raise UserError(
                f"task {self.name!r}: a decoder needs a trunk whose tokenizer ends texts with a token of its own, "
                "which this one does not"
            )
        if trunk.head is not None:
            decoder, start, leading = decoders.of_checkpoint(self, trunk), trunk.start, 0
            assert start is not None
            if hasattr(trunk.tokenizer, "tgt_lang") and start != around[-1]:
                raise UserError(
                    f"task {self.name!r}: the checkpoint's decoder_start_token_id is {start}; with the target "
                    f"language {trunk.tokenizer.tgt_lang} it must be {around[-1]}"
                )
        else:
            tokenizer, leading = trunk.tokenizer, len(around) - 1
            starts = (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id)
            start = next((token for token in starts if token is not None and token != around[-1]), around[-1])
            decoder = (decoders.like_the_encoder if self.begin == "encoder" else decoders.fresh)(self, trunk)
        encoder = trunk.encoder if self.begin == "encoder" else None
        return dataclasses.replace(
            self,
            decoder=decoder,
            encoder=encoder,
            from_checkpoint=trunk.head is not None,
            start=start,
            end=around[-1],
            leading=leading,
        )

    def parse(self, row: Row) -> tuple[str, ...] | None:
        """The target texts, None where there are none."""
        value = column(row, self.column, self)
        texts = value if isinstance(value, list) else [value]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise ValueError(f"column {self.column!r} holds {value!r}; a text is needed, or a list of texts")
        return tuple(text for text in texts if text is not None and text.strip()) or None

    def module(self, dtype: Any = jnp.float32) -> Decoder:
        """The head, with parameters params["heads"][name].

        Raises:
            ValueError: The task has not been put on a trunk.
        """
        if self.decoder is None:
            raise ValueError(f"task {self.name!r} has not been put on a trunk: on() does that")
        return Decoder(self.decoder, dtype)

    def init(self, key: jax.Array, width: int) -> Any:
        module = self.module()
        table_VxH = jnp.zeros((module.config.vocab_size, width))

        def whole(decoder: Decoder) -> Any:
            return decoder(jnp.zeros((1, 1), jnp.int32), decoder.source(jnp.zeros((1, 1, width)), None, None), table_VxH)

        return module.init(key, method=whole)["params"]

    def start_from(self, trunk: Any, fresh: Any) -> Any:
        return fresh if self.encoder is None else warm_start.decoder_params(fresh, trunk, self.encoder)

    def apply(self, params: Any, encoded: Encoded, batch: Batch, key: jax.Array | None) -> jax.Array:
        """f32[R, U, 3]: of each target token the loss, its negative log-likelihood, and 1 if it is the likeliest, else 0.

        Raises:
            UserError: The batch has no target texts.
        """
        hidden_RxTxH, table_VxH = encoded.tokens, encoded.table
        assert hidden_RxTxH is not None
        assert table_VxH is not None
        if self.name not in batch.labels:
            raise UserError(f"task {self.name!r} answers with generated text; it has no outputs for a text by itself")
        target_RxU, segment_RxU = batch.labels[self.name][..., 0], batch.labels[self.name][..., 1]
        real_RxU = target_RxU != self.missing
        segment_RxU = jnp.where(real_RxU, segment_RxU, 0)
        read_RxU, position_RxU = shifted(target_RxU, segment_RxU, self.start)
        module = self.module(hidden_RxTxH.dtype)
        rngs = None if key is None else {"dropout": key}

        def hidden(decoder: Decoder) -> jax.Array:
            source = decoder.source(hidden_RxTxH, (batch.segments > 0).astype(jnp.int32), batch.segments)
            output = decoder(
                jnp.where(real_RxU, read_RxU, 0),
                source,
                table_VxH,
                real_RxU.astype(jnp.int32),
                jnp.where(real_RxU, position_RxU, 0),  # padding may be longer than there are positions
                segment_RxU,
                deterministic=key is None,
            )
            return output.hidden  # its logits of all places at once are not computed, as nothing reads them

        hidden_RxUxH: Any = module.apply({"params": params}, method=hidden, rngs=rngs)
        outputs_RxUx3 = token_losses(
            lambda hidden_RxcxH: jnp.asarray(module.apply({"params": params}, hidden_RxcxH, table_VxH, method="logits")),
            hidden_RxUxH,
            jnp.where(real_RxU, target_RxU, 0),
            module.config.decoder_vocab_size,
            self.label_smoothing,
        )
        return jnp.where(real_RxU[..., None], outputs_RxUx3, 0.0)

    def loss(self, outputs: jax.Array, labels: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy in nats: sum over the target tokens, and their number."""
        real_RxU = labels[..., 0] != self.missing
        return jnp.where(real_RxU, outputs[..., 0], 0.0).sum(), real_RxU.sum().astype(jnp.float32)

    def metrics(self, outputs: Sequence[np.ndarray] | np.ndarray, examples: Examples) -> dict[str, float]:
        """Of tokens with the true ones before them: accuracy, a share of 1, and perplexity (lower is better)."""
        found_Nx3 = np.concatenate(list(outputs)).astype(np.float64)
        perplexity = np.exp(min(float(found_Nx3[:, 1].mean()), 700.0))  # what a float can still hold
        return {"token_accuracy": float(found_Nx3[:, 2].mean()), "perplexity": float(perplexity)}

    def text_metrics(self, texts: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
        """Metrics of generated texts, shares of 1; a row without a target text is left out.

        Args:
            texts: What was generated for each row.
            rows: The rows.
        """
        references = [self.parse(row) for row in rows]
        known = [(text, found) for text, found in zip(texts, references, strict=True) if found]
        return metrics.text_scores(self.metric, [text for text, _ in known], [found for _, found in known])

    def lead(self, texts: Sequence[str], rows: Sequence[Row]) -> dict[str, float] | None:
        if not metrics.family(self.metric) or not any(map(self.parse, rows)):
            return None
        return self.text_metrics([first_sentence(text) for text in texts], rows)

    def signatures(self, rows: Sequence[Row]) -> dict[str, str]:
        return metrics.signatures(self.metric, [found for found in map(self.parse, rows) if found])

    def describe(self, outputs: Sequence[Any], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        raise UserError(f"task {self.name!r} answers with generated text; it has no outputs for a text by itself")


def shifted(target_RxU: jax.Array, segment_RxU: jax.Array, start: int) -> tuple[jax.Array, jax.Array]:
    """What a decoder reads where it is to give the targets, i32[R, U], and each place's number in its own text, i32[R, U].

    Args:
        target_RxU: Target texts end to end.
        segment_RxU: The text that each token belongs to.
        start: What is read at the first place of each.
    """
    before_RxU = jnp.pad(segment_RxU, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    first_RxU = segment_RxU != before_RxU
    place_U = jnp.arange(target_RxU.shape[1])
    position_RxU = place_U - jax.lax.cummax(jnp.where(first_RxU, place_U, 0), axis=1)
    read_RxU = jnp.pad(target_RxU, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(first_RxU, start, read_RxU), position_RxU
