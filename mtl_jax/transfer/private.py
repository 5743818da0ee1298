"""Differentially private gradients: each row's gradient is clipped, Gaussian noise is added to their sum.

Abadi et al., 2016, https://arxiv.org/abs/1607.00133. The functions work in any training loop; accountants.py has the epsilon of
the steps.

Shapes in names: R rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.core import trees
from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import UserError, count
from mtl_jax.transfer import accountants

LEAST_SECRET = 16  # bytes


@dataclasses.dataclass(frozen=True)
class Private(Configuration):
    """Differentially private training: what is learned hardly depends on any one row.

    Attributes:
        clip: The largest norm of one row's gradient, over everything that trains; 0: training is not private.
        noise: The standard deviation of the noise over clip, the noise multiplier. 0: it is solved for epsilon; without
            epsilon, gradients are clipped only, and nothing is guaranteed.
        epsilon: The budget. With noise, the run ends before it is exceeded; else it is what the whole run spends. 0: none.
        delta: The probability with which the guarantee may fail; below one over the rows of every source.
        micro_batch: Rows whose gradients are in memory at once; a multiple of the devices that divides batch.rows.
        accountant: rdp: by Renyi divergences, which needs no package; pld: by privacy loss distributions, whose epsilon is
            smaller, with the package dp-accounting; or one of the script's (mtl_jax.transfer.register_accountant).
        secret: A file of at least 16 random bytes, from which noise and drawn rows follow. Empty: they follow from the seed,
            and the guarantee holds only against those who do not know it.

    Examples:
        >>> mtl_jax.Optimizer(private=mtl_jax.Private(clip=1.0, epsilon=8.0)).private.epsilon
        8.0
    """

    clip: float = 0.0
    noise: float = 0.0
    epsilon: float = 0.0
    delta: float = 1e-5
    micro_batch: int = 16
    accountant: str = "rdp"
    secret: str = ""


def check(private: Private) -> None:
    """Raises UserError if a field of Private is out of range."""
    for field in ("clip", "noise", "epsilon"):
        value = getattr(private, field)
        if not 0 <= value < math.inf:
            raise UserError(f"optimizer.private.{field} is {value}; it must be finite and not negative")
    if not private.clip:
        field = next((field for field in ("noise", "epsilon", "secret") if getattr(private, field)), "")
        if field:
            raise UserError(f"optimizer.private.{field} needs optimizer.private.clip, the largest norm of one row's gradient")
        return
    if not 0 < private.delta < 1:
        raise UserError(f"optimizer.private.delta is {private.delta}; it is a probability, above 0 and below 1")
    if private.micro_batch < 1:
        raise UserError(f"optimizer.private.micro_batch is {private.micro_batch}; it must be at least 1")
    accountants.check(private.accountant)


def secret_of(private: Private) -> bytes:
    """The bytes that noise and drawn rows follow from; b"" where they follow from the seed.

    Raises:
        UserError: The file cannot be read, or is too short.
    """
    if not private.secret:
        return b""
    try:
        value = Path(private.secret).read_bytes()
    except OSError as error:
        raise UserError(f"optimizer.private.secret {private.secret}: cannot be read ({error.strerror})") from error
    if len(value) < LEAST_SECRET:
        raise UserError(
            f"optimizer.private.secret {private.secret}: it has {count(len(value), 'byte')}; write at least {LEAST_SECRET} "
            "random ones, by head -c 32 /dev/urandom"
        )
    return value


def seed_of(private: Private, seed: int, purpose: str, size: int) -> int:
    """The seed of a purpose, from the secret and the run's seed; without a secret the run's seed itself.

    Args:
        private: Private training.
        seed: The run's.
        purpose: "noise" or "rows".
        size: Bytes of the result.
    """
    value = secret_of(private)
    if not value:
        return seed
    digest = hashlib.blake2b(f"{purpose} {seed}".encode(), key=hashlib.sha256(value).digest(), digest_size=size)
    return int.from_bytes(digest.digest(), "big")


def clipped(gradient: Any, clip: float) -> Any:
    """One row's gradient, scaled down to a norm of at most `clip`; zeros where it is not finite.

    Args:
        gradient: A tree of arrays.
        clip: The largest norm, over all leaves together.
    """
    norm = trees.norm(gradient)
    scale = jnp.where(norm > clip, clip / jnp.maximum(norm, clip), 1.0)
    # A row that is not finite has no norm to clip: added as it is, it alone would decide the sum.
    return jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(norm), leaf * scale, 0.0), gradient)


def noisy(total: Any, key: jax.Array, deviation: float) -> Any:
    """A tree with independent Gaussian noise added to every number.

    Args:
        total: The sum of clipped gradients.
        key: A PRNG key that is used for nothing else.
        deviation: The standard deviation of the noise; 0: none is added.
    """
    if not deviation:
        return total
    leaves, treedef = jax.tree.flatten(total)
    keys = jax.random.split(key, len(leaves))
    added = [
        leaf + deviation * jax.random.normal(leaf_key, leaf.shape, leaf.dtype)
        for leaf, leaf_key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, added)


def private_gradient(row_gradients: Any, key: jax.Array, *, clip: float, noise: float, expected: float) -> Any:
    """The private mean of rows' gradients: clipped, summed, with noise, over the expected number of rows.

    Args:
        row_gradients: A tree of arrays f[R, ...]; the rows must be drawn independently, each with one probability.
        key: A PRNG key that is used for nothing else.
        clip: The largest norm of one row's gradient.
        noise: The standard deviation of the noise over clip.
        expected: The expected number of rows of a batch. It replaces R, which depends on the rows that were drawn.

    Returns:
        A tree like the gradient of one row.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from mtl_jax.transfer import private_gradient
        >>> rows = {"w": jnp.array([[3.0, 4.0], [0.3, 0.4]])}
        >>> private_gradient(rows, jax.random.key(0), clip=1.0, noise=0.0, expected=2.0)["w"].tolist()
        [0.45..., 0.6...]
    """
    total = jax.tree.map(lambda leaf: leaf.sum(axis=0), jax.vmap(lambda gradient: clipped(gradient, clip))(row_gradients))
    return jax.tree.map(lambda leaf: leaf / expected, noisy(total, key, noise * clip))
