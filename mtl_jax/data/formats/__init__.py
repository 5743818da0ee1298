"""How files become rows: a reader for each format."""

from mtl_jax.data.formats.conll import read_conll
from mtl_jax.data.formats.delimited import read_csv, read_tsv
from mtl_jax.data.formats.jsonl import read_jsonl
from mtl_jax.data.formats.parallel import read_parallel
from mtl_jax.data.formats.pattern import read_lines
from mtl_jax.data.formats.squad import read_squad

READERS = {
    "csv": read_csv,
    "tsv": read_tsv,
    "lines": read_lines,
    "jsonl": read_jsonl,
    "conll": read_conll,
    "parallel": read_parallel,
    "squad": read_squad,
}
