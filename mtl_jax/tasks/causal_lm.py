"""Instructions: a decoder-only trunk learns to continue a prompt with its answer.

Shapes in names: R rows, T tokens a row, H trunk width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.core.row_texts import quoted
from mtl_jax.data import conversations
from mtl_jax.data.batches import Batch
from mtl_jax.data.conversations import Conversation
from mtl_jax.data.coverage import missing_row_reason
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.data.source import Source
from mtl_jax.data.tokenize import Encodings
from mtl_jax.models.causal_model import CausalModel, LMHead
from mtl_jax.models.trunk_output import Encoded, TrunkFacts
from mtl_jax.tasks import metrics
from mtl_jax.tasks.base import Task
from mtl_jax.tasks.losses import token_losses
from mtl_jax.tasks.reading import column
from mtl_jax.tasks.row_statistics import RowStatistics, of_texts, of_tokens

NEW_LINE = "\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLM(Task):
    """An answer for each prompt (Wei et al., 2022), learned by teacher forcing; only the answer's tokens count in the loss.

    The trunk is a decoder-only checkpoint (Llama, Qwen2, Qwen3, Gemma 3), and the head is its LM head. A row's tokens are those
    of the prompt, of the answer, and of its end; so no other task can have the source.

        CausalLM(name="answer", source="questions", column="answer", prompt="Question: {question}\\nAnswer:")

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose texts are the conversations.
        column: The column with the answer, or a list of several: the first is learned, and metrics compare with all of them.
        messages: In place of column: the source's text column, with conversations, lists of {"role": ..., "content": ...} in
            the chat template of the checkpoint's tokenizer. If the last message is an assistant's, it is the answer.
        prompt: The prompt, with columns of the row in braces. Empty: the text, and with chat off a new line after it.
        chat: Whether the prompt is a user's message in the chat template of the checkpoint's tokenizer; else it is read as it
            is.
        target_length: Most tokens of an answer, the end token included; longer ones are cut, and counted. What then remains of
            a row is the prompt's, which loses its beginning where it is longer.
        label_smoothing: Share of the target probability spread evenly over the vocabulary.
        beams: Beams of the search on test and in predictions; 1: greedy.
        dev_beams: Beams on dev while training.
        max_new_tokens: Most tokens of a generated answer; 0: target_length.
        length_penalty: Beams are compared by log-probability / length ** this; None: 1.
        metric: token_accuracy, each token after the true ones; or a metric of generated answers, as shares of 1: exact, f1 of
            words, bleu, chrf, rouge1, rouge2 or rougeL. exact and f1 ignore case, punctuation and articles, unless a true
            answer has nothing else. Answers are generated in evaluations only for these.
        hidden: Must be 0: this head has no such layer.
        vocabulary: V; filled in from the trunk, as are the next five.
        tied: Whether the head is the trunk's token table.
        cap: Soft cap on the logits, or None.
        start: Special tokens that begin a prompt.
        end: The token that ends an answer.
        padding: The token after the end.

    Examples:
        >>> task = mtl_jax.CausalLM(name="words", source="texts")
    """

    column: str = ""
    messages: str = ""
    prompt: str = ""
    chat: bool = False
    target_length: int = 64
    label_smoothing: float = 0.0
    beams: int = 1
    dev_beams: int = 1
    max_new_tokens: int = 0
    length_penalty: float | None = None
    metric: str = "token_accuracy"
    vocabulary: int = 0
    tied: bool = True
    cap: float | None = None
    start: int = 0
    end: int = -1
    padding: int = 0

    metric_names: ClassVar[tuple[str, ...]] = ("token_accuracy", *metrics.SHORT_ANSWERS, *metrics.TEXT_METRICS)
    level: ClassVar[str] = "token"
    needs: ClassVar[tuple[str, ...]] = ("tokens", "table")
    outputs: ClassVar[int] = 3
    windows: ClassVar[bool] = False
    decodes: ClassVar[bool] = True
    is_linen: ClassVar[bool] = True

    @property
    def templated(self) -> bool:
        """Whether prompts are in the tokenizer's chat template."""
        return self.chat or bool(self.messages)

    @property
    def generates(self) -> bool:
        return self.metric != "token_accuracy" or bool(self.registered_metrics)

    @property
    def scores_texts(self) -> bool:
        return self.metric != "token_accuracy"

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.column,) if self.column else ()

    @property
    def input_columns(self) -> tuple[str, ...]:
        return tuple(conversations.read_columns(self.prompt))

    def check(self) -> None:
        super().check()
        if self.hidden:
            raise UserError(f"task {self.name!r}: hidden is {self.hidden}; an LM head has no such layer, leave it at 0")
        for field, least in (("target_length", 2), ("beams", 1), ("dev_beams", 1), ("max_new_tokens", 0)):
            if getattr(self, field) < least:
                raise UserError(f"task {self.name!r}: {field} is {getattr(self, field)}; it must be at least {least}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"task {self.name!r}: label_smoothing is {self.label_smoothing}; it is a share below 1")
        if bool(self.column) == bool(self.messages):
            raise UserError(f"task {self.name!r}: give either column, that of the answers, or messages, that of conversations")
        if self.messages and self.prompt:
            raise UserError(f"task {self.name!r}: prompt is for a column of answers; conversations have their own messages")
        try:
            conversations.columns(self.prompt)
        except ValueError as error:
            problem = f"prompt {self.prompt!r} is not a text with columns in braces ({error})"
            raise UserError(f"task {self.name!r}: {problem}") from error

    def check_source(self, source: Source) -> None:
        if source.pair:
            raise UserError(
                f"task {self.name!r}: source {source.name!r} has pairs of texts; name both columns in prompt, such as "
                f'prompt="{{{source.text}}} {{{source.pair}}}", and leave pair out'
            )
        if self.messages and self.messages != source.text:
            raise UserError(
                f"task {self.name!r}: messages is {self.messages!r}; it must be the text column of source {source.name!r}, "
                f"{source.text!r}"
            )

    def on(self, trunk: TrunkFacts) -> Self:
        """The task with the tokens that begin and end its texts, and the sizes of its head.

        Raises:
            UserError: The trunk is not decoder-only, its tokenizer has no end or no chat template, or its table has no row for
                the end.
        """
        if trunk.causal is None:
            raise UserError(
                f"task {self.name!r}: a causal LM needs a decoder-only checkpoint as its trunk (Llama, Qwen2, Qwen3, Gemma 3); "
                "text-to-text tasks on other trunks are Seq2Seq"
            )
        tokens = conversations.special_tokens(trunk.tokenizer, self.templated, f"task {self.name!r}")
        vocabulary = trunk.causal.vocab_size
        if tokens.end >= vocabulary:
            reason = missing_row_reason(trunk.tokenizer, tokens.end, vocabulary, "the token table of the trunk")
            raise UserError(f"task {self.name!r}: {reason}")
        padding = trunk.tokenizer.pad_token_id
        return dataclasses.replace(
            self,
            vocabulary=vocabulary,
            tied=not trunk.head if trunk.head is not None else trunk.causal.tied,
            cap=trunk.causal.logit_cap,
            start=tokens.start,
            end=tokens.end,
            padding=padding if padding is not None and padding < vocabulary else tokens.end,
        )

    def parse(self, row: Row) -> tuple[str, ...] | None:
        """The answers; None where the row has none."""
        if self.messages:
            return conversations.parse(column(row, self.messages, self)).answers or None
        value = column(row, self.column, self)
        texts = value if isinstance(value, list) else [value]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise ValueError(f"column {self.column!r} has {quoted(value)}; a text is needed, or a list of texts")
        return tuple(text for text in texts if text is not None and text.strip()) or None

    def encode_rows(
        self, rows: Sequence[Row], source: Source, tokenizer: Any, max_length: int, cache: Path | None = None
    ) -> Encodings:
        """The tokens of prompt, answer and end of each row; types are 1 at those of answer and end, else 0.

        Raises:
            UserError: A row has no column of the prompt, or target_length leaves no room for a prompt.
            RowError: A text is not valid Unicode.
        """
        if self.target_length >= max_length:
            raise UserError(
                f"task {self.name!r}: target_length is {self.target_length}, and rows have {max_length} tokens: nothing is "
                "left for the prompt; make batch.row_length longer"
            )
        turns = [self.conversation(row, source) for row in rows]
        answers = [next(iter(turn.answers), "") for turn in turns] if self.messages else [self._answer(row) for row in rows]
        if self.templated:
            read = [conversations.rendered(tokenizer, turn.prompt, row.where) for row, turn in zip(rows, turns, strict=True)]
        else:
            read = [turn.prompt[0]["content"] for turn in turns]
        return conversations.encode(
            tokenizer,
            read,
            answers,
            end=self.end,
            start=0 if self.templated else self.start,
            max_length=max_length,
            target_length=self.target_length,
            cache=cache,
        )

    def conversation(self, row: Row, source: Source) -> Conversation:
        """The messages of a row, or its prompt as a user's only message.

        Raises:
            UserError: The row has no column of the prompt, or its messages are none.
        """
        where = f"task {self.name!r}"
        if self.messages:
            return conversations.of_row(row, self.messages, where)
        template = self.prompt or f"{{{source.text}}}{'' if self.chat else NEW_LINE}"
        return conversations.of_text(conversations.filled(template, row, where))

    def without_answer(self, row: Row, source: Source) -> Row:
        """The row as a prediction reads it: the tokens of an answer that it has would take room of the prompt."""
        if not self.messages:
            named = {source.text, *self.input_columns}
            return row if self.column in named else row._replace(columns={**row.columns, self.column: None})
        turns = self.conversation(row, source)
        if not turns.answers or turns.prompt[-1]["role"] == "assistant":
            return row
        return row._replace(columns={**row.columns, self.messages: json.dumps(list(turns.prompt))})

    def _answer(self, row: Row) -> str:
        """The answer that is learned; "" where the row has none, as in predictions. What is wrong with it, parse() says."""
        value = row.columns.get(self.column)
        value = next((text for text in value if text), "") if isinstance(value, list) else value
        return value if isinstance(value, str) and value.strip() else ""

    def window_label(self, label: Any, window: Window) -> np.ndarray:
        labels = np.full(len(window.tokens), self.missing, self.dtype)
        if window.types is not None:
            answer = np.flatnonzero(window.types[1:])
            labels[answer] = window.tokens[1:][answer]
        return labels

    def prompt_of(self, examples: Examples, number: int) -> np.ndarray:
        tokens = examples.tokens[number]
        return tokens if examples.types is None else tokens[examples.types[number] == 0]

    def module(self, dtype: Any = jnp.float32) -> LMHead:
        """The head as a module; its parameters are `params["heads"][name]`, and there are none where it is tied."""
        return LMHead(self.vocabulary, self.tied, self.cap, dtype)

    def generator(self, trunk: nn.Module) -> CausalModel:
        return CausalModel(trunk, self.module(trunk.dtype))

    def init(self, key: jax.Array, width: int) -> Any:
        table_VxH = jnp.zeros((self.vocabulary, width))
        return {} if self.tied else self.module().init(key, jnp.zeros((1, 1, width)), table_VxH)["params"]

    def apply(self, params: Any, encoded: Encoded, batch: Batch, key: jax.Array | None) -> jax.Array:
        """f32[R, T, 3]: where an answer's token follows its loss, its negative log-likelihood, and 1 if it is the likeliest.

        Raises:
            UserError: The batch has no answers.
        """
        hidden_RxTxH, table_VxH = encoded.tokens, encoded.table
        assert hidden_RxTxH is not None
        assert table_VxH is not None
        if self.name not in batch.labels:
            raise UserError(f"task {self.name!r} answers with generated text; it has no outputs for a text alone")
        labels_RxT = batch.labels[self.name]
        real_RxT = labels_RxT != self.missing
        module = self.module(hidden_RxTxH.dtype)
        outputs_RxTx3 = token_losses(
            lambda hidden_RxcxH: jnp.asarray(module.apply({"params": params}, hidden_RxcxH, table_VxH)),
            hidden_RxTxH,
            jnp.where(real_RxT, labels_RxT, 0),
            self.vocabulary,
            self.label_smoothing,
        )
        return jnp.where(real_RxT[..., None], outputs_RxTx3, 0.0)

    def loss(self, outputs: jax.Array, labels: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy in nats: sum over the answers' tokens, and their number."""
        real_RxT = labels != self.missing
        return jnp.where(real_RxT, outputs[..., 0], 0.0).sum(), real_RxT.sum().astype(jnp.float32)

    def metrics(self, outputs: Sequence[np.ndarray] | np.ndarray, examples: Examples) -> dict[str, float]:
        """Accuracy, a share of 1, and perplexity (lower is better) of the answers' tokens after the true ones."""
        labels = np.concatenate(list(examples.labels[self.name]))
        outputs_Nx3 = np.concatenate(list(outputs)).astype(np.float64)[labels != self.missing]
        perplexity = np.exp(min(float(outputs_Nx3[:, 1].mean()), 700.0))  # the largest exponent of a float
        return {"token_accuracy": float(outputs_Nx3[:, 2].mean()), "perplexity": float(perplexity)}

    def text_metrics(self, texts: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
        """Metrics of generated answers, shares of 1; a row without an answer is left out.

        Args:
            texts: The generated text of each row.
            rows: The rows.
        """
        references = [self.parse(row) for row in rows]
        pairs = [(text, reference) for text, reference in zip(texts, references, strict=True) if reference]
        if not pairs:
            return {}
        generated, targets = [text for text, _ in pairs], [reference for _, reference in pairs]
        scores = metrics.answer_scores(generated, targets, metrics.GENERATED_ANSWERS)
        scores |= metrics.text_scores(self.metric, generated, targets)
        return scores | metrics.registered_scores(self.registered_metrics, generated, targets)

    def row_statistics(self, outputs: Sequence[Any] | np.ndarray, examples: Examples) -> RowStatistics:
        if self.scores_texts:
            return of_texts(self.metric, list(outputs), [self.parse(row) for row in examples.data])
        labels = examples.labels[self.name]
        right = [np.asarray(output)[label != self.missing, 2] for output, label in zip(outputs, labels, strict=True)]
        return of_tokens(right, examples.row_of, len(examples.data))

    def signatures(self, rows: Sequence[Row]) -> dict[str, str]:
        if not metrics.family(self.metric):
            return {}
        return metrics.signatures(self.metric, [references for references in map(self.parse, rows) if references])

    def compared(self, outputs: Any, examples: Examples) -> tuple[Any, Any]:
        raise UserError(f"task {self.name!r}: registered metrics compare its generated texts")

    def describe(self, outputs: Sequence[Any], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        raise UserError(f"task {self.name!r} answers with generated text; it has no outputs for a text alone")
