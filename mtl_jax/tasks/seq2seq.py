"""Text to text: translation, summarisation. The head is a decoder.

Shapes in names: R rows, T source tokens a row, U target tokens a row, H trunk width, V target vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.core.parts import ONLY_IF_SET
from mtl_jax.core.row_texts import quoted
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.data.source import Source
from mtl_jax.data.split_texts import first_sentence
from mtl_jax.models import warm_start
from mtl_jax.models.encoder import EncoderConfig
from mtl_jax.models.encoder_decoder import Seq2Seq as EncoderDecoder
from mtl_jax.models.seq2seq_decoder import Decoder
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig
from mtl_jax.models.trunk_output import Encoded, TrunkFacts
from mtl_jax.tasks import decoders, metrics
from mtl_jax.tasks.base import Task
from mtl_jax.tasks.losses import token_losses
from mtl_jax.tasks.reading import column
from mtl_jax.tasks.row_statistics import RowStatistics, of_texts, of_tokens
from mtl_jax.transfer.adapters import ADAPTERS, Adapter
from mtl_jax.transfer.adapters.adapted_decoder import adapt_decoder, add_to_decoder, check_adapters

TABLES = ("trunk", "own")
BEGINNINGS = ("fresh", "encoder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2Seq(Task):
    """A target text for each text (Vaswani et al., 2017), learned by teacher forcing: each token after the true ones before it.

    On an encoder-decoder checkpoint the head starts as the checkpoint's decoder. On an encoder-only checkpoint it is a new
    decoder, or one that starts as the encoder; on a trunk from scratch a new one of the trunk's architecture. Targets are
    tokenised by the trunk's tokenizer.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose texts are read.
        source_language: The code of the texts' language where the tokenizer marks languages (mBART, M2M100, NLLB), such as
            "deu_Latn"; "": the one of its files.
        target_language: The same of the target texts.
        column: The source's column with the target text, or a list of several: the first one is learned, and metrics compare
            with all of them. Empty: the row has none.
        target_length: Most tokens of a target text, the end token included; longer ones are cut, and counted.
        label_smoothing: Share of the target probability spread evenly over the vocabulary.
        begin: How a decoder on an encoder-only checkpoint is initialised: "fresh": at random, with norms in front; "encoder":
            blocks, positions and norms are the encoder's, and cross-attention starts as self-attention (Rothe et al., 2020).
        layers: Blocks of a new decoder; 0: as many as a trunk from scratch has, 3 on an encoder-only checkpoint.
        heads: Its attention heads; 0: as many as a trunk from scratch has, on an encoder-only checkpoint width / 64.
        feed_forward: Its width inside the feed-forward part; 0: the same as in a trunk from scratch, else 4 times its width.
        table: The token table of a new decoder, for reading and predicting: "trunk": the trunk's; "own": its own.
        dropout: Rate inside a new decoder on an encoder-only checkpoint; other decoders have the trunk's rates.
        beams: Beams of the search on test and in predictions; 1: greedy.
        dev_beams: Beams on dev while training.
        max_new_tokens: Most tokens of a generated text; 0: target_length.
        length_penalty: Beams are compared by log-probability / length ** this; None: the checkpoint's, else 1.
        metric: bleu, chrf, rouge1, rouge2 or rougeL of generated texts, as shares of 1; or token_accuracy, each token after the
            true ones.
        hidden: Must be 0: this head has no such layer.
        adapters: Adapters inside the decoder, which adapters_only(decoders=(name,)) trains with the rest of it frozen.
        decoder: The decoder's sizes; filled in from the trunk, as are the next five.
        encoder: The sizes of the encoder that it starts as, or None.
        from_checkpoint: Whether it starts as a checkpoint's decoder.
        start: Token that a decoder reads first.
        end: Token that ends a target text.
        leading: Special tokens that the tokenizer puts in front of a target text and that a new decoder does not learn.

    Examples:
        >>> task = mtl_jax.Seq2Seq(name="summary", source="articles", column="summary", target_length=64)
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
    source_language: str = dataclasses.field(default="", metadata=ONLY_IF_SET)
    target_language: str = dataclasses.field(default="", metadata=ONLY_IF_SET)
    adapters: tuple[Adapter, ...] = dataclasses.field(default=(), metadata=ONLY_IF_SET)
    decoder: Seq2SeqConfig | None = None
    encoder: EncoderConfig | None = None
    from_checkpoint: bool = False
    start: int = -1
    end: int = -1
    leading: int = 0

    level: ClassVar[str] = "target"
    outputs: ClassVar[int] = 3

    @property
    def metric_names(self) -> tuple[str, ...]:
        family = metrics.family(self.metric)
        return ("token_accuracy", *(family or metrics.TEXT_METRICS))

    @property
    def scores_texts(self) -> bool:
        return self.metric != "token_accuracy"

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def languages(self) -> tuple[str, str]:
        return self.source_language, self.target_language

    def check(self) -> None:
        super().check()
        if self.hidden:
            raise UserError(f"task {self.name!r}: hidden is {self.hidden}; a decoder has no such layer, leave it at 0")
        new_decoder = {"layers": 0, "heads": 0, "feed_forward": 0}
        for field, least in ({"target_length": 2} | new_decoder | {"beams": 1, "dev_beams": 1, "max_new_tokens": 0}).items():
            if getattr(self, field) < least:
                raise UserError(f"task {self.name!r}: {field} is {getattr(self, field)}; it must be at least {least}")
        try:
            check_adapters(self.adapters)
        except UserError as error:
            raise UserError(f"task {self.name!r}: {error}") from error
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"task {self.name!r}: label_smoothing is {self.label_smoothing}; it is a share below 1")
        for field, choices in (("table", TABLES), ("begin", BEGINNINGS)):
            if getattr(self, field) not in choices:
                raise UserError(f"task {self.name!r}: {field} is {getattr(self, field)!r}; it is one of {', '.join(choices)}")

    def check_source(self, source: Source) -> None:
        if source.pair:
            raise UserError(f"task {self.name!r}: source {source.name!r} has pairs of texts; a decoder reads one text")

    def on(self, trunk: TrunkFacts) -> Self:
        """The task with its decoder's sizes, and the tokens that start and end its texts.

        Raises:
            UserError: The trunk has no such tokens, its token table does not fit, or languages are not set or unknown.
        """
        if trunk.causal is not None:
            raise UserError(
                f"task {self.name!r}: the trunk is a decoder-only checkpoint, which continues texts itself: take CausalLM in "
                "place of Seq2Seq"
            )
        trunk = trunk._replace(tokenizer=decoders.with_languages(self, trunk.tokenizer))
        special = trunk.tokenizer(text_target="")["input_ids"]
        if not special or special[-1] not in trunk.tokenizer.all_special_ids:
            raise UserError(
                f"task {self.name!r}: a decoder needs a trunk whose tokenizer ends texts with a special token, "
                "and this one's does not"
            )
        if trunk.head is not None:
            if self.target_language:  # as transformers shifts targets: the decoder reads their last token first
                trunk = trunk._replace(start=special[-1])
            decoder, start, leading = decoders.checkpoint_decoder(self, trunk), trunk.start, 0
            assert start is not None
            if hasattr(trunk.tokenizer, "tgt_lang") and start != special[-1]:
                raise UserError(
                    f"task {self.name!r}: the checkpoint's decoder_start_token_id is {start}; with the target "
                    f"language {trunk.tokenizer.tgt_lang} it must be {special[-1]}"
                )
        else:
            tokenizer, leading = trunk.tokenizer, len(special) - 1
            starts = (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id)
            start = next((token for token in starts if token is not None and token != special[-1]), special[-1])
            decoder = (decoders.encoder_as_decoder if self.begin == "encoder" else decoders.new_decoder)(self, trunk)
        encoder = trunk.encoder if self.begin == "encoder" else None
        self._with_adapters(decoder)
        return dataclasses.replace(
            self,
            decoder=decoder,
            encoder=encoder,
            from_checkpoint=trunk.head is not None,
            start=start,
            end=special[-1],
            leading=leading,
        )

    def parse(self, row: Row) -> tuple[str, ...] | None:
        """The target texts; None where the row has none."""
        value = column(row, self.column, self)
        texts = value if isinstance(value, list) else [value]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise ValueError(f"column {self.column!r} has {quoted(value)}; a text is needed, or a list of texts")
        return tuple(text for text in texts if text is not None and text.strip()) or None

    @property
    def is_linen(self) -> bool:
        return True

    def module(self, dtype: Any = jnp.float32) -> Decoder:
        """The head as a module; its parameters are `params["heads"][name]`.

        Raises:
            ValueError: The task has not been put on a trunk.
        """
        if self.decoder is None:
            raise ValueError(f"task {self.name!r} has not been put on a trunk; call on() first")
        return self._with_adapters(self.decoder, dtype)

    def _with_adapters(self, config: Seq2SeqConfig, dtype: Any = jnp.float32) -> Decoder:
        try:
            return adapt_decoder(Decoder(config, dtype), self.adapters)
        except UserError as error:
            raise UserError(f"task {self.name!r}: {error}") from error

    def generator(self, trunk: nn.Module) -> EncoderDecoder:
        return EncoderDecoder(trunk, self.module(trunk.dtype))

    def init(self, key: jax.Array, width: int) -> Any:
        module = self.module()
        table_VxH = jnp.zeros((module.config.vocab_size, width))

        def run(decoder: Decoder) -> Any:
            return decoder(jnp.zeros((1, 1), jnp.int32), decoder.source(jnp.zeros((1, 1, width)), None, None), table_VxH)

        return self.from_head(module.init(key, method=run)["params"], key)

    def from_head(self, head: Any, key: jax.Array) -> Any:
        return add_to_decoder(self.module(), head, key)

    def start_from(self, trunk: Any, fresh: Any) -> Any:
        if self.encoder is None:
            return fresh
        own = {name: tree for name, tree in fresh.items() if name != ADAPTERS}
        added = {name: tree for name, tree in fresh.items() if name == ADAPTERS}
        return {**warm_start.decoder_params(own, trunk, self.encoder), **added}

    def apply(self, params: Any, encoded: Encoded, batch: Batch, key: jax.Array | None) -> jax.Array:
        """f32[R, U, 3]: for each target token its loss, its negative log-likelihood, and 1 if it is the likeliest, else 0.

        Raises:
            UserError: The batch has no target texts.
        """
        hidden_RxTxH, table_VxH = encoded.tokens, encoded.table
        assert hidden_RxTxH is not None
        assert table_VxH is not None
        if self.name not in batch.labels:
            raise UserError(f"task {self.name!r} answers with generated text; it has no outputs for a text alone")
        target_RxU, segment_RxU = batch.labels[self.name][..., 0], batch.labels[self.name][..., 1]
        real_RxU = target_RxU != self.missing
        segment_RxU = jnp.where(real_RxU, segment_RxU, 0)
        input_RxU, position_RxU = shift_right(target_RxU, segment_RxU, self.start)
        module = self.module(hidden_RxTxH.dtype)
        rngs = None if key is None else {"dropout": key}

        def hidden(decoder: Decoder) -> jax.Array:
            source = decoder.source(hidden_RxTxH, (batch.segments > 0).astype(jnp.int32), batch.segments)
            output = decoder(
                jnp.where(real_RxU, input_RxU, 0),
                source,
                table_VxH,
                real_RxU.astype(jnp.int32),
                jnp.where(real_RxU, position_RxU, 0),  # padding may be longer than there are positions
                segment_RxU,
                deterministic=key is None,
            )
            return output.hidden  # its logits are not read, so they are not computed: all of them would be large

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
        """Accuracy, a share of 1, and perplexity (lower is better) of tokens after the true ones."""
        outputs_Nx3 = np.concatenate(list(outputs)).astype(np.float64)
        perplexity = np.exp(min(float(outputs_Nx3[:, 1].mean()), 700.0))  # the largest exponent of a float
        return {"token_accuracy": float(outputs_Nx3[:, 2].mean()), "perplexity": float(perplexity)}

    def text_metrics(self, texts: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
        """Metrics of generated texts, shares of 1; a row without a target text is left out.

        Args:
            texts: The generated text of each row.
            rows: The rows.
        """
        references = [self.parse(row) for row in rows]
        pairs = [(text, reference) for text, reference in zip(texts, references, strict=True) if reference]
        generated, targets = [text for text, _ in pairs], [reference for _, reference in pairs]
        scores = metrics.text_scores(self.metric, generated, targets)
        return scores | metrics.registered_scores(self.registered_metrics, generated, targets)

    def row_statistics(self, outputs: Sequence[Any] | np.ndarray, examples: Examples) -> RowStatistics:
        if not self.scores_texts:
            right = [np.asarray(output)[:, 2] for output in outputs]
            return of_tokens(right, examples.row_of, len(examples.data))
        return of_texts(self.metric, list(outputs), [self.parse(row) for row in examples.data])

    def lead(self, texts: Sequence[str], rows: Sequence[Row]) -> dict[str, float] | None:
        if not metrics.family(self.metric) or not any(map(self.parse, rows)):
            return None
        return self.text_metrics([first_sentence(text) for text in texts], rows)

    def signatures(self, rows: Sequence[Row]) -> dict[str, str]:
        return metrics.signatures(self.metric, [references for references in map(self.parse, rows) if references])

    def describe(self, outputs: Sequence[Any], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        raise UserError(f"task {self.name!r} answers with generated text; it has no outputs for a text alone")


def shift_right(target_RxU: jax.Array, segment_RxU: jax.Array, start: int) -> tuple[jax.Array, jax.Array]:
    """The decoder's inputs for teacher forcing, i32[R, U], and each token's position in its text, i32[R, U].

    Args:
        target_RxU: Target texts end to end.
        segment_RxU: The text that each token belongs to.
        start: The first input of each text.
    """
    before_RxU = jnp.pad(segment_RxU, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    first_RxU = segment_RxU != before_RxU
    index_U = jnp.arange(target_RxU.shape[1])
    position_RxU = index_U - jax.lax.cummax(jnp.where(first_RxU, index_U, 0), axis=1)
    input_RxU = jnp.pad(target_RxU, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(first_RxU, start, input_RxU), position_RxU
