"""Hugging Face checkpoints in and out, without PyTorch."""

from mtl_jax.pretrained.checkpoint import Checkpoint as Checkpoint
from mtl_jax.pretrained.checkpoint import load as load
from mtl_jax.pretrained.locate import load_tokenizer as load_tokenizer
from mtl_jax.pretrained.saving import save as save
