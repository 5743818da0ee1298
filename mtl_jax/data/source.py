"""TODO."""

from __future__ import annotations

import dataclasses

from mtl_jax.core.configuration import Configuration
from mtl_jax.data.formats import READERS


@dataclasses.dataclass(frozen=True)
class Source(Configuration):
    """Rows with a text and any number of other columns.

    Attributes:
        name: The source's name; tasks refer to it.
        path: The training rows, or all rows if dev or test are cut from them. A local file, "data:REST" ($MTL_JAX_DATA/REST) or
            "pip:ASSET/MEMBER"; a name with .gz is unpacked; * and ? in a local or data: path stand for several files, read in
            sorted order. Or "tfds:NAME[/CONFIG][:VERSION][#SPLIT]", a TFDS builder, or "hf:ORG/NAME[/CONFIG][#SPLIT]", a data
            set of the hub ("hf:./DIR": what save_to_disk wrote); SPLIT as in "train[:80%]", left out: train.
        dev_path: The dev rows, all of them; empty: cut from path.
        test_path: The test rows, all of them; empty: cut from path.
        format: Of files. csv: quoted. tsv: never quoted. lines: see pattern. jsonl: an object a line, nested columns are "a.b".
            conll: a word a line, columns between tabs or spaces, a blank line after a sentence. parallel: files side by side,
            named as in "train.{en,fr}.gz". squad: SQuAD 1.1 or 2.0 JSON, columns id, question, context, answers, title.
        pattern: For lines: a regular expression with a named group for each column; it must match every line.
        columns: Names of the columns: of csv and tsv without header, of conll, and of parallel files whose columns are not to
            be called as the parts between the braces.
        text: The column that holds the text.
        pair: The column that holds a second text; empty: there is none.
        id: A column in which no value may stand twice in a split; empty: none, but the ids of a squad file.
        lenient: Leave out rows that cannot be read, count them and log the first; false: such a row is an error.
        cut_dev: Share of the distinct texts that becomes dev where there is no dev_path.
        cut_test: Share of the distinct texts that becomes test where there is no test_path.
        cut_seed: Seed of that cut. Apart from the run's seed, so that runs with other seeds see the same splits.
        group: The column that names the document a row comes from: rows of one document are cut into one split, so that no
            document is both learned from and tested on. Empty: every text is cut by itself.
        group_pattern: A regular expression for the part of that column which names the document.
        limit: Use at most so many rows of each split, 0 for all: to try a script out. They are drawn by a hash of cut_seed and
            text, so that they are of all classes; label sets are those of all rows.
        limit_train: Use at most so many training rows, drawn as for limit, 0 for all: to see what few are worth, on the same
            dev and test.
    """

    name: str
    path: str
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
    limit: int = 0
    limit_train: int = 0


FORMATS = tuple(READERS)


SPLITS = ("train", "dev", "test")


NAMED = ("csv", "tsv", "conll", "parallel")  # formats whose columns an experiment can name
