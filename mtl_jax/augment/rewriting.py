"""Rows that models write: by translation to another language and back, in other words, or from a label alone.

Rows are made before training. Labels of words and answers cannot follow such texts, so these are for labels of whole texts.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from mtl_jax.augment import similar_rows as similar
from mtl_jax.augment import writers
from mtl_jax.augment.writers import Write
from mtl_jax.core.errors import UserError, count, listed, unknown
from mtl_jax.core.files import shown
from mtl_jax.data.augmentations import check_shares
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import Augmentation, AugmentedRows, MakeRows
from mtl_jax.tasks import Classification

log = logging.getLogger(__name__)

EMPTY = "empty"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewriting(Augmentation, abc.ABC):
    """Base of augmentations in which models write texts; a made row with another meaning is left out.

    Attributes:
        share: As in all augmentations.
        added: As in all augmentations; at least 1.
        seed: As in all augmentations.
        top_p: Tokens are drawn from the fewest whose probabilities sum to this, so that several rows from one differ; 0: the
            likeliest text is taken.
        max_new_tokens: The most tokens of a written text; 0: the model's setting.
        similarity: The least cosine of the vectors of a text and its new text, by `encoder`.
        encoder: minilm, or a path as for mtl-jax audit --embeddings. Empty: meanings are not compared.
    """

    share: float = 1.0
    added: int = 1
    top_p: float = 0.9
    max_new_tokens: int = 0
    similarity: float = 0.7
    encoder: str = "minilm"

    in_passes: ClassVar[bool] = False

    def check(self, where: str) -> None:
        check_shares(self, where, "top_p")
        similar.check(where, self.similarity)
        if self.max_new_tokens < 0:
            raise UserError(f"{where}: max_new_tokens is {self.max_new_tokens}; it must be a number of tokens, or 0")

    @property
    def search(self) -> dict[str, Any]:
        """The options of the search, as arguments of mtl_jax.translate."""
        drawn = {"do_sample": True, "top_p": self.top_p, "num_beams": 1} if self.top_p else {"do_sample": False}
        return {**drawn, **({"max_new_tokens": self.max_new_tokens} if self.max_new_tokens else {})}

    @abc.abstractmethod
    def writer(self, source: AugmentedRows) -> Write:
        """A function from texts to new texts; models are opened now."""

    def maker(self, source: AugmentedRows) -> MakeRows:
        write, keep = self.writer(source), similar.keep_similar(source, self.encoder, self.similarity)

        def make(rows: Sequence[Row], generators: Sequence[np.random.Generator]) -> list[Row | str]:
            places = [(row, name) for row in range(len(rows)) for name in source.columns.texts if rows[row].columns.get(name)]
            texts = [_text(rows[row].columns[name]) for row, name in places]
            # The least of the draws of all rows: their order does not count.
            seed = min((int(rng.integers(2**31)) for rng in generators), default=0)
            changed: list[dict[str, str]] = [{} for _ in rows]
            for (row, name), text in zip(places, write(texts, seed) if texts else [], strict=True):
                changed[row][name] = text
            made: list[Row | str] = [
                row._replace(columns={**row.columns, **new}, words=None) if all(new.values()) else EMPTY
                for row, new in zip(rows, changed, strict=True)
            ]
            return keep(rows, made)

        return make


def _text(value: Any) -> str:
    return value if isinstance(value, str) else " ".join(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackTranslation(Rewriting):
    """Texts are translated to another language and back (Sennrich et al., 2016; as augmentation Xie et al., 2020).

    A translator is an encoder-decoder checkpoint, a run of ours, or a command that gets a text a line on standard input and
    writes a line for each.

    Attributes:
        share: As in all augmentations.
        added: As in all augmentations; at least 1.
        seed: As in all augmentations.
        top_p: As in Rewriting, in both directions.
        max_new_tokens: As in Rewriting.
        similarity: As in Rewriting.
        encoder: As in Rewriting.
        forward: The translator to the other language: a checkpoint, or a workdir.
        back: The translator back.
        forward_command: In place of forward: a program and its arguments. No shell runs it.
        back_command: In place of back.
        language: The language of the texts, for checkpoints of many languages; it must agree with what a checkpoint says.
        pivot: The other language.

    References:
        https://arxiv.org/abs/1511.06709, https://arxiv.org/abs/1904.12848

    Examples:
        >>> models = {"forward": "Helsinki-NLP/opus-mt-en-de", "back": "Helsinki-NLP/opus-mt-de-en"}
        >>> back_translation = mtl_jax.augment.BackTranslation(**models)
        >>> source = mtl_jax.Source("reviews", "reviews.csv", augment=(back_translation,))
    """

    forward: str = ""
    back: str = ""
    forward_command: tuple[str, ...] = ()
    back_command: tuple[str, ...] = ()
    language: str = ""
    pivot: str = ""

    def check(self, where: str) -> None:
        super().check(where)
        writers.check(where, "forward", self.forward, self.forward_command)
        writers.check(where, "back", self.back, self.back_command)
        (reads, pivot), (reads_back, writes) = writers.languages(self.forward), writers.languages(self.back)
        language, other = self.language[:2].lower(), self.pivot[:2].lower()
        for field, actual, expected, what in (
            ("forward", reads, language, "reads"),
            ("forward", pivot, other, "writes"),
            ("back", reads_back, other or pivot, "reads"),
            ("back", writes, language or reads, "writes"),
        ):
            if actual and expected and actual != expected:
                path = shown(self.forward if field == "forward" else self.back)
                raise UserError(f"{where}: {field} {path} {what} {actual}, and it must be {expected}; name another translator")

    def writer(self, source: AugmentedRows) -> Write:
        where = f"source {source.source.name!r}: BackTranslation"
        forward = self._translator(self.forward, self.forward_command, self.language, self.pivot, f"{where}: forward_command")
        back = self._translator(self.back, self.back_command, self.pivot, self.language, f"{where}: back_command")

        def write(texts: Sequence[str], seed: int | Sequence[int]) -> list[str]:
            pivots = forward(texts, seed)
            written = dict(zip(dict.fromkeys(filter(None, pivots)), _of_some(back, pivots, seed), strict=True))
            return [written.get(text, "") for text in pivots]

        return write

    def _translator(self, model: str, command: Sequence[str], source: str, target: str, where: str) -> Write:
        if command:
            return writers.by_command(command, where)
        return writers.by_model(model, {**self.search, "source_language": source, "target_language": target})


def _of_some(write: Write, texts: Sequence[str], seed: int | Sequence[int]) -> list[str]:
    """The new text of each different text that is not empty."""
    some = list(dict.fromkeys(filter(None, texts)))
    return write(some, seed) if some else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paraphrase(Rewriting):
    """Texts are written in other words by an encoder-decoder that paraphrases.

    Attributes:
        share: As in all augmentations.
        added: As in all augmentations; at least 1.
        seed: As in all augmentations.
        top_p: As in Rewriting.
        max_new_tokens: As in Rewriting.
        similarity: As in Rewriting.
        encoder: As in Rewriting.
        model: A checkpoint, or the workdir of a run.
        model_command: In place of model: a program and its arguments, as for BackTranslation.
        prefix: A text in front of every text, such as "paraphrase: ".

    Examples:
        >>> paraphrase = mtl_jax.augment.Paraphrase(model="runs/paraphrases", similarity=0.8)
        >>> source = mtl_jax.Source("reviews", "reviews.csv", augment=(paraphrase,))
    """

    model: str = ""
    model_command: tuple[str, ...] = ()
    prefix: str = ""

    def check(self, where: str) -> None:
        super().check(where)
        writers.check(where, "model", self.model, self.model_command)

    def writer(self, source: AugmentedRows) -> Write:
        if self.model_command:
            command = writers.by_command(self.model_command, f"source {source.source.name!r}: Paraphrase: model_command")
            return lambda texts, seed: command([f"{self.prefix}{text}" for text in texts], seed)
        return writers.by_model(self.model, {**self.search, "prefix": self.prefix})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Rewriting):
    """A model writes a text from a label, and a classifier decides whether it fits (as in Anaby-Tavor et al., 2020).

    The model gets `prompt`, filled from the columns of a training row; the text that it writes replaces the row's text. It is
    kept if the classifier gives the row's label at least the probability `confidence`. The model can be a run that was trained
    to write texts from labels, or a decoder-only checkpoint, which continues the prompt until a line ends. The classifier can
    be a run that was trained on the same few rows.

    Each row has a draw of its own, so rows with the same prompt get different texts. It follows from the entry's seed and the
    row's text. With top_p 0 a prompt has one text, its likeliest, and the log says how many different ones there can be.

    Attributes:
        share: As in all augmentations.
        added: As in all augmentations; at least 1.
        seed: As in all augmentations.
        top_p: As in Rewriting; for each row.
        max_new_tokens: As in Rewriting.
        similarity: The least cosine of the row's text and the new one; by default any.
        encoder: As in Rewriting; needed for a similarity.
        model: A checkpoint, encoder-decoder or decoder-only, or the workdir of a run.
        model_command: In place of model: a program and its arguments, as for BackTranslation; it gets the prompt of each row.
        prompt: The input of the model, with names of columns in braces, such as "{label}".
        task: The classification task of this experiment whose label must be right; empty: the only one of the source.
        classifier: The workdir of a run with a classification task, or WORKDIR:TASK if it has several.
        confidence: The least probability of the label.

    References:
        https://arxiv.org/abs/1911.03118

    Examples:
        >>> generate = mtl_jax.augment.Generate(model="runs/writer", prompt="{label}", classifier="runs/few")
        >>> source = mtl_jax.Source("reviews", "reviews.csv", augment=(generate,))
        >>> prompt = "Reviews of films, all of them {label}:\\n- {text}\\n-"
        >>> generate = mtl_jax.augment.Generate(model="gguf:gemma3-270m", prompt=prompt, classifier="runs/few")
    """

    similarity: float = -1.0
    encoder: str = ""
    model: str = ""
    model_command: tuple[str, ...] = ()
    prompt: str = "{label}"
    task: str = ""
    classifier: str = ""
    confidence: float = 0.9

    def check(self, where: str) -> None:
        super().check(where)
        check_shares(self, where, "confidence")
        writers.check(where, "model", self.model, self.model_command)
        if not self.classifier:
            raise UserError(
                f"{where}: classifier is empty; name a run with a classification task, which chooses the texts to keep"
            )
        if not writers.is_run(self._classifier[0]):
            raise UserError(f"{where}: classifier {shown(self.classifier)} is not the workdir of a run")
        try:
            self.prompt.format_map({})
        except KeyError:
            pass
        except (ValueError, IndexError, AttributeError) as error:
            raise UserError(f"{where}: prompt {shown(self.prompt)!r} is not a text with names of columns in braces") from error

    @property
    def _classifier(self) -> tuple[str, str]:
        """The workdir and the task of the classifier."""
        if writers.is_run(self.classifier) or ":" not in self.classifier:
            return self.classifier, ""
        workdir, _, task = self.classifier.rpartition(":")
        return workdir, task

    def writer(self, source: AugmentedRows) -> Write:
        if self.model_command:
            where = f"source {source.source.name!r}: Generate: model_command"
            return writers.by_command(self.model_command, where, each=True)
        return writers.by_prompts(self.model, self.search)

    def maker(self, source: AugmentedRows) -> MakeRows:
        where = f"source {source.source.name!r}: Generate"
        task = self._task(source, where)
        write, agrees = self.writer(source), self._agrees(source, task, where)
        keep = similar.keep_similar(source, self.encoder, self.similarity)
        if self.model and not self.top_p:
            most, asked = len({self._prompt(row, where) for row in source.rows}), len(source.rows) * self.added
            if most < asked:
                made_of = f"at most {count(most, 'different text')} for {count(asked, 'row')}"
                log.warning("%s: top_p is 0, so a prompt has one text: %s; raise top_p", where, made_of)

        def make(rows: Sequence[Row], generators: Sequence[np.random.Generator]) -> list[Row | str]:
            seeds = [int(rng.integers(2**31)) for rng in generators]  # one for each row, so that equal prompts differ
            texts = write([self._prompt(row, where) for row in rows], seeds) if rows else []
            made: list[Row | str] = [
                row._replace(columns={**row.columns, source.columns.text: text}) if text else EMPTY
                for row, text in zip(rows, texts, strict=True)
            ]
            return keep(rows, agrees(made))

        return make

    def _task(self, source: AugmentedRows, where: str) -> Classification:
        tasks = {task.name: task for task in source.tasks if isinstance(task, Classification)}
        if self.task and self.task not in tasks:
            raise unknown(f"classification task of {where}:", self.task, tasks)
        if len(tasks) != 1 and not self.task:
            raise UserError(f"{where}: the source has {listed(tasks)} as classification tasks; name one by task")
        if source.source.pair:
            raise UserError(f"{where}: the source has pairs of texts, and one text is written; leave it out")
        return tasks[self.task or next(iter(tasks))]

    def _prompt(self, row: Row, where: str) -> str:
        try:
            return self.prompt.format_map(row.columns)
        except KeyError as error:
            raise unknown(f"column in prompt of {where}:", str(error.args[0]), row.columns) from error

    def _agrees(
        self, source: AugmentedRows, task: Classification, where: str
    ) -> Callable[[Sequence[Row | str]], list[Row | str]]:
        """The function that keeps rows if the classifier gives their label enough probability."""
        import mtl_jax  # opened by the public door: models stand above this package

        workdir, name = self._classifier
        model = mtl_jax.load_model(workdir)
        tasks = [other.name for other in model.run.tasks if isinstance(other, Classification)]
        if (name and name not in tasks) or (not name and len(tasks) != 1):
            raise UserError(
                f"{where}: classifier {shown(self.classifier)} has {listed(tasks)} as classification tasks; name one"
            )
        chosen = name or tasks[0]
        judge, text = model.run.task(chosen), model.run.source(chosen).text
        shown_label = dict(zip(judge.labels, judge.shown_labels, strict=True))

        def agrees(made: Sequence[Row | str]) -> list[Row | str]:
            rows = [(place, row) for place, row in enumerate(made) if not isinstance(row, str)]
            inputs = [{text: _text(row.columns[source.columns.text])} for _, row in rows]
            answers = model.predict(chosen, inputs, top_k=1) if inputs else []
            result = list(made)
            for (place, row), answer in zip(rows, answers, strict=True):
                if "error" in answer:
                    result[place] = answer["error"]
                elif answer["top"][0]["label"] != shown_label.get(str(task.raw_label(row))):
                    result[place] = "of another label by the classifier"
                elif answer["top"][0]["probability"] < self.confidence:
                    result[place] = "not sure by the classifier"
            return result

        return agrees
