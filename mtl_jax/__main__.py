"""python -m mtl_jax: the console entry mtl-jax, where its script is not on the path."""

from mtl_jax.cli.main import console

console()
