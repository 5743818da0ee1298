"""Hugging Face checkpoints without PyTorch."""

from mtl_jax.pretrained.checkpoint import Checkpoint as Checkpoint
from mtl_jax.pretrained.checkpoint import load as load
from mtl_jax.pretrained.checkpoint import load_tokenizer as load_tokenizer
