"""Generates tokens: greedy search, beam search and sampling, with the semantics of transformers 5."""

from mtl_jax.decoding.config import GenerationConfig as GenerationConfig
from mtl_jax.decoding.config import resolve as resolve
from mtl_jax.decoding.generate import Answer as Answer
from mtl_jax.decoding.generate import fit_to_model as fit_to_model
from mtl_jax.decoding.generate import generate as generate
from mtl_jax.decoding.generate import generate_all as generate_all
from mtl_jax.decoding.generate import require_generator as require_generator
from mtl_jax.decoding.logits import prepare as prepare
