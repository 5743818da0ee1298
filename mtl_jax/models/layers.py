"""Layers that the models share: activations, dense layers, tables, attention, relative positions, and a task's head.

Shapes in names: B or R rows, T query tokens, S key tokens or examples a row, H hidden size, N attention heads, D size of a
head.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtl_jax.models.dropout import Dropout
from mtl_jax.models.kv_cache import KeyValue, visible_keys

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),  # Hugging Face "gelu" is the erf form
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
}


def times(x_xI: jax.Array, kernel_IxO: jax.Array) -> jax.Array:
    """x @ kernel, f[..., O]; a kernel with more than two axes, one for each row, is multiplied as by matmul."""
    if kernel_IxO.ndim != 2:
        return jnp.matmul(x_xI, kernel_IxO)
    return jnp.matmul(x_xI.reshape(-1, x_xI.shape[-1]), kernel_IxO).reshape(*x_xI.shape[:-1], -1)


class Dense(nn.Dense):
    """nn.Dense with all leading axes as one, and in bfloat16 with a cheaper gradient of the bias."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """f[..., I] to f[..., features]."""
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, w, b = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        assert x is not None
        assert w is not None
        return times_and_bias(x, w, b, self.precision)


def times_and_bias(x_xI: jax.Array, kernel_IxO: jax.Array, bias_O: jax.Array | None, precision: Any = None) -> jax.Array:
    """x @ kernel + bias, f[..., O]."""
    x_RxI = x_xI.reshape(-1, x_xI.shape[-1])
    y_RxO = lax.dot_general(x_RxI, kernel_IxO, (((1,), (0,)), ((), ())), precision=precision)
    if bias_O is not None and y_RxO.dtype == jnp.bfloat16:
        y_RxO, bias_O = _add_bias(y_RxO, bias_O), None
    y = y_RxO.reshape(*x_xI.shape[:-1], -1)
    return y if bias_O is None else y + jnp.reshape(bias_O, (1,) * (y.ndim - 1) + (-1,))


@jax.custom_jvp
def _add_bias(y_RxO: jax.Array, bias_O: jax.Array) -> jax.Array:
    return y_RxO + bias_O


@_add_bias.defjvp
def _add_bias_along(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    (y_RxO, bias_O), (y_dot_RxO, bias_dot_O) = primals, tangents
    # As a product, the gradient of the bias is one, too, and no sum over rows: on a TPU it takes a twentieth of the time.
    ones_Rx8 = jnp.ones((len(y_RxO), 8), y_RxO.dtype)
    return y_RxO + bias_O, y_dot_RxO + jnp.matmul(ones_Rx8, jnp.pad(bias_dot_O[None], ((0, 7), (0, 0))))


class Embed(nn.Embed):
    """nn.Embed that accepts a table with any number of rows, or in place of it the vectors of the tokens themselves.

    A training step can then pass only what a batch reads, while linen insists on the declared shape; a new table has
    num_embeddings rows.
    """

    def setup(self) -> None:
        given: jax.Array | None = self.get_variable("params", "embedding")
        shape = (self.num_embeddings, self.features) if given is None else given.shape
        self.embedding = self.param("embedding", self.embedding_init, shape, self.param_dtype)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """f[B, T, E] of ids i32[B, T]."""
        # Of the whole table in another dtype, forward and backward, only these rows are needed.
        return look_up(self.embedding, inputs).astype(self.dtype or self.param_dtype)


def look_up(table: jax.Array, ids_BxT: jax.Array) -> jax.Array:
    """The vectors f[B, T, E] of ids: rows of a table f[V, E], or the vectors f[B, T, E] that were given in place of it."""
    return table if table.ndim > 2 else jnp.take(table, ids_BxT, axis=0)


def attention_mask_BxTxT(attention_mask_BxT: jax.Array, segments_BxT: jax.Array | None) -> jax.Array:
    """The keys that each query may see: bool[B, T, T].

    A query sees the real tokens of its own segment. Without segments the row is one segment.

    Args:
        attention_mask_BxT: 1 at real tokens, 0 at padding.
        segments_BxT: Example number inside a packed row, or None.
    """
    visible = visible_keys(attention_mask_BxT, segments_BxT, segments_BxT)
    return jnp.broadcast_to(visible, (*attention_mask_BxT.shape, attention_mask_BxT.shape[1]))


def attend(
    q_BxTxNxD: jax.Array,
    k_BxNxSxD: jax.Array,
    v_BxNxSxD: jax.Array,
    mask_BxTxS: jax.Array,
    *,
    scale: float,
    bias_BxNxTxS: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017); scores and softmax in float32.

    Args:
        q_BxTxNxD: Queries.
        k_BxNxSxD: Keys.
        v_BxNxSxD: Values.
        mask_BxTxS: The keys that each query may see.
        scale: Factor on the queries.
        bias_BxNxTxS: Added to the scores, axes of size 1 broadcast; or None.
        dropout: A function of the probabilities, or None.

    Returns:
        f[B, T, N, D]. A query that may see no key gets the mean of all values: finite, and meaningless.
    """
    scores_BxNxTxS = jnp.einsum("btnd,bnsd->bnts", q_BxTxNxD * scale, k_BxNxSxD).astype(jnp.float32)
    if bias_BxNxTxS is not None:
        scores_BxNxTxS = scores_BxNxTxS + bias_BxNxTxS.astype(jnp.float32)
    # A finite floor keeps fully masked (padding) queries free of NaN.
    scores_BxNxTxS = jnp.where(mask_BxTxS[:, None], scores_BxNxTxS, jnp.finfo(jnp.float32).min)
    probs_BxNxTxS = jax.nn.softmax(scores_BxNxTxS, axis=-1).astype(v_BxNxSxD.dtype)
    probs_BxNxTxS = probs_BxNxTxS if dropout is None else dropout(probs_BxNxTxS)
    return jnp.einsum("bnts,bnsd->btnd", probs_BxNxTxS, v_BxNxSxD)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """How a trunk's layers are computed; models.kernels has the choices.

    Attributes:
        attend: As attend(), with the same arguments.
        norm: As LayerNorm.kernel; None: nn.LayerNorm.
        gelu: In place of ACTIVATIONS["gelu"]; None: that.
        attend_joined: As kernels.self_attend_on_tpus, for self-attention with one product in place of three; None: three.
    """

    attend: Callable[..., jax.Array] = attend
    norm: Callable[..., jax.Array | None] | None = None
    gelu: Callable[[jax.Array], jax.Array] | None = None
    attend_joined: Callable[..., jax.Array | None] | None = None

    def activation(self, name: str) -> Callable[[jax.Array], jax.Array]:
        """The activation of a name."""
        return self.gelu if name == "gelu" and self.gelu is not None else ACTIVATIONS[name]


PLAIN = Kernels()


class Attention(nn.Module):
    """Multi-head attention with its four projections.

    attention(x, mask, deterministic) is self-attention. With the keys_values of another sequence as source it is
    cross-attention, and with a cache as source it is incremental decoding.

    Attributes:
        num_heads: N.
        head_size: D.
        dtype: Compute dtype.
        init: Initialiser of the kernels.
        dropout: Rate on the attention probabilities.
        use_bias: Whether the projections have biases.
        scale: Factor on the queries; None is D ** -0.5.
        hidden_size: H, the width of the output; None is N * D.
        query_init: Initialiser of the query kernel; None is init.
        kernels: How scores and probabilities are computed.
    """

    num_heads: int
    head_size: int
    dtype: Any
    init: Any
    dropout: float = 0.0
    use_bias: bool = True
    scale: float | None = None
    hidden_size: int | None = None
    query_init: Any = None
    kernels: Kernels = PLAIN

    def setup(self) -> None:
        dense = functools.partial(Dense, use_bias=self.use_bias, dtype=self.dtype)
        inner = self.num_heads * self.head_size
        self.query = dense(inner, kernel_init=self.query_init or self.init)
        self.key = dense(inner, kernel_init=self.init)
        self.value = dense(inner, kernel_init=self.init)
        self.output = dense(self.hidden_size or inner, kernel_init=self.init)
        self.drop = Dropout(self.dropout)

    def keys_values(self, x_BxSxH: jax.Array) -> KeyValue:
        """Keys and values f[B, N, S, D] of a sequence f[B, S, H]."""
        key, value = (self._heads(dense(x_BxSxH)).swapaxes(1, 2) for dense in (self.key, self.value))
        return KeyValue(key, value)

    def __call__(
        self,
        x_BxTxH: jax.Array,
        mask_BxTxS: jax.Array,
        deterministic: bool,
        *,
        source: KeyValue | None = None,
        bias_BxNxTxS: jax.Array | None = None,
    ) -> jax.Array:
        """f[B, T, H] to f[B, T, H]; keys and values are the source's, or x's own if source is None."""
        drops = self.dropout > 0.0 and not deterministic
        scale = self.head_size**-0.5 if self.scale is None else self.scale
        plain_self = source is None and bias_BxNxTxS is None and not drops and not self.is_initializing()
        if self.kernels.attend_joined is not None and plain_self:
            project = functools.partial(self._projections, x_BxTxH)
            out_BxTxH = self.kernels.attend_joined(project, mask_BxTxS, x_BxTxH.shape[1], self.num_heads, self.head_size, scale)
            if out_BxTxH is not None:
                return self.output(out_BxTxH)
        if source is None:
            source = self.keys_values(x_BxTxH)
        out_BxTxNxD = self.kernels.attend(
            self._heads(self.query(x_BxTxH)),
            source.key,
            source.value,
            mask_BxTxS,
            scale=scale,
            bias_BxNxTxS=bias_BxNxTxS,
            dropout=functools.partial(self.drop, deterministic=False) if drops else None,
        )
        return self.output(out_BxTxNxD.reshape(*x_BxTxH.shape[:-1], -1))

    def _projections(self, x_BxTxH: jax.Array) -> jax.Array:
        """Queries, keys and values side by side f[B, T, 3 N D], from one product with the three kernels side by side."""
        params = [dense.variables["params"] for dense in (self.query, self.key, self.value)]
        kernel = jnp.concatenate([part["kernel"] for part in params], axis=1)
        bias = jnp.concatenate([part["bias"] for part in params]) if self.use_bias else None
        given: Any = self.query.promote_dtype(x_BxTxH, kernel, bias, dtype=self.dtype)
        return times_and_bias(*given)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.num_heads, self.head_size)


def bucket_of_distance(num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every distance 0 .. max_distance: i32[max_distance + 1].

    Each of the first half of the buckets has one distance. The others grow with the logarithm of the distance, and the last one
    has all distances from max_distance on (Raffel et al. 2020, section 2.1). It is a table, so that the rounding of a compiled
    logarithm cannot move a distance to another bucket.

    Args:
        num_buckets: Number of buckets on one side of the query.
        max_distance: Larger than num_buckets / 2.
    """
    exact = num_buckets // 2
    distance = np.arange(exact, max_distance + 1, dtype=np.float32)
    share = np.log(distance / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    grown = exact + (share * np.float32(num_buckets - exact)).astype(np.int32)
    return np.concatenate([np.arange(exact), np.minimum(grown, num_buckets - 1)]).astype(np.int32)


def relative_buckets(relative_positions: jax.Array, bidirectional: bool, num_buckets: int, max_distance: int) -> jax.Array:
    """Bucket of each relative position, key minus query: i32 of the same shape.

    Args:
        relative_positions: i32, any shape.
        bidirectional: If True, keys before and after a query have half of the buckets each; if False (decoders), all keys after
            the query, which it does not see, are in bucket 0.
        num_buckets: Number of buckets.
        max_distance: All distances from this one on share a bucket.
    """
    if bidirectional:
        num_buckets //= 2
        after = jnp.where(relative_positions > 0, num_buckets, 0)
        distance = jnp.abs(relative_positions)
    else:
        after = jnp.zeros_like(relative_positions)
        distance = jnp.maximum(-relative_positions, 0)
    return after + jnp.asarray(bucket_of_distance(num_buckets, max_distance))[jnp.minimum(distance, max_distance)]


class RelativeBias(nn.Module):
    """T5's position bias: a learned number per head and bucket of relative positions, added to attention scores.

    Attributes:
        num_heads: N.
        num_buckets: Rows of the table.
        max_distance: As for relative_buckets.
        bidirectional: True in encoders.
        embedding_init: Initialiser of the table.
    """

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool
    embedding_init: Any = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, query_positions_BxT: jax.Array, key_positions_BxS: jax.Array) -> jax.Array:
        """The bias f32[B, N, T, S] between positions i32[B, T] and i32[B, S]."""
        relative_BxTxS = key_positions_BxS[:, None, :] - query_positions_BxT[:, :, None]
        buckets_BxTxS = relative_buckets(relative_BxTxS, self.bidirectional, self.num_buckets, self.max_distance)
        table = nn.Embed(self.num_buckets, self.num_heads, embedding_init=self.embedding_init, name="table")
        return jnp.moveaxis(table(buckets_BxTxS), -1, 1)


class Head(nn.Module):
    """A task's head: a linear layer, or one hidden ReLU layer before it.

    Attributes:
        outputs: O, numbers per example or token.
        hidden: Width of the hidden layer; 0 for none.
        dropout: Rate on the input vector.
    """

    outputs: int
    hidden: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, pooled_RxSxH: jax.Array, deterministic: bool = True) -> jax.Array:
        """Maps f32[R, S, H] to f32[R, S, O]; dropout needs an rng named "dropout" unless deterministic."""
        x = Dropout(self.dropout)(pooled_RxSxH, deterministic=deterministic)
        if self.hidden:
            x = nn.relu(Dense(self.hidden, name="hidden")(x))
        return Dense(self.outputs, name="output")(x)
