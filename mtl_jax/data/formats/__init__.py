"""Readers: a function from a file to rows for each format."""

from mtl_jax.data.formats.conll import read_conll
from mtl_jax.data.formats.json_files import read_jsonl, read_squad
from mtl_jax.data.formats.text_files import read_csv, read_lines, read_parallel, read_tsv

READERS = {
    "csv": read_csv,
    "tsv": read_tsv,
    "lines": read_lines,
    "jsonl": read_jsonl,
    "conll": read_conll,
    "parallel": read_parallel,
    "squad": read_squad,
}
