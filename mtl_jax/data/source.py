"""The declaration of a source: where its rows come from, which columns hold texts, and how splits are made."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from tyro.conf import Suppress

from mtl_jax.core.configuration import Configuration
from mtl_jax.core.parts import Part

SPLITS = ("train", "dev", "test")
NAMED = ("csv", "tsv", "conll", "parallel")  # formats whose columns a Source can name
# {split: the fields of a Source that give its rows: a path, or rows of the script}
FIELDS = {"train": ("path", "rows"), "dev": ("dev_path", "dev_rows"), "test": ("test_path", "test_rows")}

COPIES = ("report", "drop", "fail")  # what to do about copies of held-out rows


class ScriptRows:
    """Rows that a script gives a Source in place of a path; or only their record, in a Source read from config.json.

    Two are equal if they hold the same object, or the same record.

    Attributes:
        values: A list of dicts, a pandas DataFrame, a datasets.Dataset, or a function that returns an iterator of dicts; None
            where only the record is known.
        record: {"rows": their number, "sha256": of their columns}; None before formats.script_rows.record() has read them.
    """

    def __init__(self, values: Any, record: dict[str, Any] | None = None):
        self.values, self.record = values, record

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScriptRows) or self.values is not other.values:
            return False
        return self.values is not None or self.record == other.record

    def __hash__(self) -> int:
        return hash(str(self.record)) if self.values is None else id(self.values)

    def __repr__(self) -> str:
        return "<rows of a script>" if self.record is None else f"<{self.record['rows']} rows of a script>"


class TextColumns(NamedTuple):
    """The columns of a source that a change of its texts concerns.

    Attributes:
        text: The column with the text, or with its words.
        texts: All columns with texts that a model reads: the text, the second text, the context of questions, and
            the columns of a prompt.
        targets: Columns with target texts; a list there is several texts, not words.
        word_labels: Columns with a label for each word of the text.
        context: The column to which the characters of answers refer.
        unlabelled: For each of word_labels the values of a row that mean "no label"; empty: none.
    """

    text: str
    texts: tuple[str, ...]
    targets: tuple[str, ...] = ()
    word_labels: tuple[str, ...] = ()
    context: str = "context"
    unlabelled: tuple[tuple[str, ...], ...] = ()

    def no_label(self, column: str) -> tuple[str, ...]:
        """The values of a column of word labels that mean "no label"."""
        return dict(zip(self.word_labels, self.unlabelled, strict=False)).get(column, ())


# From rows (formats.rows.Row) to (the changed row, or the UserError that says why it cannot be read; what is counted) of each.
EditRows = Callable[[Sequence[Any]], list[tuple[Any, Mapping[str, int]]]]


@dataclasses.dataclass(frozen=True)
class RowEdit(Part, abc.ABC):
    """Base of a change of a source's rows when they are read, such as mtl_jax.audit.Deidentify.

    A subclass is a frozen dataclass. All splits are changed, before rows are compared and divided.
    """

    door: ClassVar[str] = "row edit"

    def check(self, where: str) -> None:
        """Raises UserError where a field makes no sense, before any row is read; `where` begins the line."""

    @abc.abstractmethod
    def editor(self, columns: TextColumns) -> EditRows:
        """The function that changes rows, which is made once for a source; the same rows must always give the same."""


class AugmentedRows(NamedTuple):
    """What an augmentation knows of the source whose rows it makes.

    Attributes:
        source: The source.
        columns: Its columns with texts, targets and labels of words.
        tasks: Its tasks (data.labels.Labels), without what they learn from the data.
        rows: Its training rows (formats.rows.Row).
    """

    source: Source
    columns: TextColumns
    tasks: tuple[Any, ...]
    rows: Sequence[Any]


# From training rows and a generator of random numbers for each, to a new row of each, or the reason why none was made.
MakeRows = Callable[[Sequence[Any], Sequence[np.random.Generator]], list[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation(Part, abc.ABC):
    """Base of what makes training rows from training rows, such as mtl_jax.augment.Eda.

    A subclass is a frozen dataclass. It sees training rows only. What it makes of a row follows from the seed, the pass and the
    row's text, so neither the order of rows nor the number of worker processes matters.

    Attributes:
        share: The share of the training rows of which it makes one.
        added: 0: a made row stands in place of its row, and every pass draws anew. Else so many rows are made of a row before
            training and added to the training rows.
        seed: Seed of what is made, beside that of the data order. Rows that are added follow from this seed alone.
    """

    share: float = 0.5
    added: int = 0
    seed: int = 0

    door: ClassVar[str] = "augmentation"
    # Levels of labels (Task.label_level) that stay right beside the changed texts; "answer" stands for places in the text.
    keeps: ClassVar[tuple[str, ...]] = ("example",)
    # Whether every pass can draw anew. Else rows are added before training: where a model makes them.
    in_passes: ClassVar[bool] = True
    # Whether a made row has texts of other rows than its own.
    joins_rows: ClassVar[bool] = False
    # The mean length that is added to a made text, as a share of the row's: rows of a batch are packed with that room.
    growth: ClassVar[float] = 0.0

    def check(self, where: str) -> None:
        """Raises UserError where a field makes no sense, before any row is read; `where` begins the line."""

    @abc.abstractmethod
    def maker(self, source: AugmentedRows) -> MakeRows:
        """The function that makes rows. It is made once for a source, and once more in each worker process."""


GivenRows = ScriptRows | Any | None  # whatever ScriptRows takes; a Source keeps it as ScriptRows


@dataclasses.dataclass(frozen=True)
class Canaries(Configuration):
    """Rows of random words among a source's training rows.

    Attributes:
        count: How many different ones are planted; 0: none.
        repeats: How often each is planted.
        words: Random words of its text; of its target text, where a task writes texts.
        seed: Seed of the words, and of the rows that give the other columns.

    Examples:
        >>> mtl_jax.Source("mails", "mails.csv", canaries=mtl_jax.Canaries(count=20, repeats=4)).canaries.count
        20
    """

    count: int = 0
    repeats: int = 1
    words: int = 8
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Source(Configuration):
    """Rows with a text and any number of other columns.

    Attributes:
        name: The source's name; tasks refer to it.
        path: The training rows, or all rows if dev or test are split off from them. A local file, "data:REST"
            ($MTL_JAX_DATA/REST) or "pip:ASSET/MEMBER"; a name with .gz is unpacked; * and ? in a local or data: path match
            several files, read in sorted order. Or `tfds:NAME[/CONFIG][:VERSION][#SPLIT]`, a TFDS builder, or
            `hf:ORG/NAME[/CONFIG][#SPLIT]`, a data set of the hub (`hf:./DIR`: written by save_to_disk); SPLIT as in
            `train[:80%]`, by default train.
        dev_path: The dev rows, all of them; empty: split off from path.
        test_path: The test rows, all of them; empty: split off from path.
        format: Format of files: one of these, or one of the script's (mtl_jax.data.register_format). csv: quoted. tsv: never
            quoted. lines: see pattern. jsonl: an object a line, nested columns are "a.b". conll: a word a line, columns between
            tabs or spaces, a blank line after a sentence. parallel: several files of one length, named as in
            "train.{en,fr}.gz". squad: SQuAD 1.1 or 2.0 JSON, columns id, question, context, answers, title.
        pattern: For lines: a regular expression with a named group for each column; it must match every line.
        columns: Names of the columns: of csv and tsv without header, of conll, and of parallel files, whose default names are
            the parts between the braces.
        text: The column with the text.
        pair: The column with a second text; empty: none.
        id: A column whose values must differ within a split; empty: none, except for the ids of a squad file.
        lenient: Leave out rows that cannot be read, count them and log the first; false: such a row is an error.
        cut_dev: Share of the distinct texts that becomes dev if there is no dev_path.
        cut_test: Share of the distinct texts that becomes test if there is no test_path.
        cut_seed: Seed of that split. It is not the run's seed, so that runs with different seeds have the same splits.
        group: The column that names a row's document. All rows of a document are in one split, so that no document is both
            learned from and tested on. Empty: each text is split off alone.
        group_pattern: A regular expression for the part of that column that names the document.
        time: The column with the time of a row: numbers, or ISO dates, among which a year may stand alone. The oldest rows
            become train, then dev, and the newest test; rows of one time stay together. Empty: a hash of the text or document
            decides.
        limit: Use at most so many rows of each split, 0 for all: to try a script. They are sampled by a hash of cut_seed and
            text, so that all classes occur; label sets are those of all rows.
        limit_train: Use at most so many training rows, sampled as for limit, 0 for all: to measure training on few rows, on
            the same dev and test.
        copies: What a run does about training rows that are copies of held-out rows, of this source or another: with the same
            letters and digits, or near. report: it counts them in its log and in data.json. drop: it leaves them out. fail: it
            does not start, and names ten. Rows of one text, case and spaces aside, are dropped in any case.
        near: The least similarity of near copies; at 0.7, one word in ten may differ.
        deidentify: How e-mail addresses, names and the like are replaced when rows are read, in all splits; None: not at all.
        canaries: Rows of random words among the training rows, to measure what the model remembers.
        augment: What makes training rows from training rows, one after another; dev and test stay as they are.
        rows: In place of path, rows that the script has: a list of dicts, a pandas DataFrame, a datasets.Dataset, or a function
            without arguments that returns an iterator of dicts and is called for every pass. Values are texts, lists of words,
            numbers, None or answers. Not a flag.
        dev_rows: In place of dev_path, rows that the script has.
        test_rows: In place of test_path, rows that the script has.

    Examples:
        >>> source = mtl_jax.Source("reviews", rows=[{"text": "Works.", "stars": 5}, {"text": "Broke.", "stars": 1}])
        >>> mtl_jax.Source("pairs", "train.jsonl", dev_path="dev.jsonl", format="jsonl", text="premise", pair="hypothesis").pair
        'hypothesis'
    """

    name: str
    path: str = ""
    dev_path: str = ""
    test_path: str = ""
    format: str = "csv"
    pattern: str = ""
    columns: tuple[str, ...] = ()
    text: str = "text"
    pair: str = ""
    id: str = ""
    lenient: bool = False
    cut_dev: float = 0.1
    cut_test: float = 0.1
    cut_seed: int = 0
    group: str = ""
    group_pattern: str = ".+"
    time: str = ""
    limit: int = 0
    limit_train: int = 0
    copies: str = "report"
    near: float = 0.7
    deidentify: RowEdit | None = None
    canaries: Canaries = Canaries()
    augment: tuple[Augmentation, ...] = ()
    rows: Annotated[GivenRows, Suppress] = None
    dev_rows: Annotated[GivenRows, Suppress] = None
    test_rows: Annotated[GivenRows, Suppress] = None

    def __post_init__(self) -> None:
        for _, field in FIELDS.values():
            value = getattr(self, field)
            if value is not None and not isinstance(value, ScriptRows):
                object.__setattr__(self, field, ScriptRows(value))

    def script_rows(self, split: str) -> ScriptRows | None:
        """The rows of a split that the script gave; None where a path names them, or where they are split off from train."""
        rows: ScriptRows | None = getattr(self, FIELDS[split][1])
        return rows

    def place(self, split: str) -> str:
        """Where the rows of a split are from, for error lines; "" where they are split off from train."""
        path, rows = FIELDS[split]
        return f"{rows} of source {self.name}" if getattr(self, rows) is not None else str(getattr(self, path))
