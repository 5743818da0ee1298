"""Kernels of accelerators, run as ordinary programs, against the plain form."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.core.errors import UserError
from mtl_jax.models import kernels, layers, norms, over_rows, tpu_attention, tpu_norm
from mtl_jax.models.encoder import Encoder, EncoderConfig
from mtl_jax.models.layers import Dense, Embed, Kernels

B, T, N, D = 2, 16, 4, 32
H = N * D


class _Device:
    platform = "tpu"


class _Mesh:
    """As much of a mesh as the choice of kernels reads."""

    def __init__(self):
        self.devices, self.shape, self.size = np.array([_Device()]), {"data": 1}, 1


CPU = jax.make_mesh((1,), ("data",))


def _inputs(key, *shapes):
    return [jax.random.normal(part, shape) for part, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)]


def test_attention_of_packed_rows_with_padding():
    """With the gradients of queries, keys and values, also at padding, whose queries see no key or only some."""
    segments = jnp.array([[1] * 5 + [2] * 7 + [0] * 4, [1] * 3 + [2] * 12 + [0]])
    mask = layers.attention_mask_BxTxT((segments > 0).astype(jnp.int32), segments)
    assert not mask[0, -1].any()
    q, k, v, weights = _inputs(jax.random.key(0), (B, T, N, D), (B, N, T, D), (B, N, T, D), (B, T, N, D))

    def both(attend, **options):
        def loss(q, k, v):
            out = attend(q, k, v, mask, scale=D**-0.5, **options)
            return (out * weights).sum(), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    expected, found = both(layers.attend), both(kernels.attend_on_tpus, interpret=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), found, expected)


def test_rows_of_different_lengths_and_several_groups_of_heads():
    """Cross-attention, with heads of 64; a row too long for one step has a step for every group."""
    q, k, v = _inputs(jax.random.key(0), (1, 288, 4, 64), (1, 4, 32, 64), (1, 4, 32, 64))
    mask = jnp.ones((1, 1, 32), bool).at[0, 0, 20:].set(False)
    found = kernels.attend_on_tpus(q, k, v, mask, scale=0.1, interpret=True)
    np.testing.assert_allclose(found, layers.attend(q, k, v, mask, scale=0.1), atol=3e-6)


def test_a_layer_norm():
    x, scale, bias, weights = _inputs(jax.random.key(0), (2, 24, 128), (128,), (128,), (2, 24, 128))

    def loss(norm):
        return lambda x, scale, bias: (norm(x, scale, bias) * weights).sum()

    plain = norms.layer_norm(1e-5, jnp.float32, "norm")
    expected = jax.grad(
        loss(lambda x, scale, bias: plain.apply({"params": {"scale": scale, "bias": bias}}, x)), argnums=(0, 1, 2)
    )(x, scale, bias)
    found = jax.grad(
        loss(lambda x, scale, bias: kernels.norm_on_tpus(x, scale, bias, 1e-5, interpret=True)), argnums=(0, 1, 2)
    )(x, scale, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), found, expected)
    assert kernels.norm_on_tpus(x[..., :100], scale[:100], bias[:100], 1e-5) is None


def test_gelu_in_bfloat16_is_the_erf_form_to_its_rounding():
    x = jnp.linspace(-20, 20, 4001)
    y, slope = jax.vmap(jax.value_and_grad(kernels._logistic_gelu))(x)
    exact = jax.vmap(jax.value_and_grad(layers.ACTIVATIONS["gelu"]))(x)
    np.testing.assert_allclose(y, exact[0], atol=2.6e-5)
    np.testing.assert_allclose(slope, exact[1], atol=3e-4)
    np.testing.assert_array_equal(kernels.gelu_in_bfloat16(x), layers.ACTIVATIONS["gelu"](x))


def test_the_gradients_of_a_bias_and_a_table_in_bfloat16():
    x, ids = jnp.linspace(-1, 1, 2 * 3 * 6).reshape(2, 3, 6).astype(jnp.bfloat16), jnp.array([[1, 2, 1]])
    for ours, theirs, inputs in (
        (Dense(5, dtype=jnp.bfloat16), nn.Dense(5, dtype=jnp.bfloat16), x),
        (Embed(4, 8, dtype=jnp.bfloat16), nn.Embed(4, 8, dtype=jnp.bfloat16), ids),
    ):
        params = theirs.init(jax.random.key(0), inputs)
        found, expected = (
            jax.grad(lambda params, module=module, x=inputs: module.apply(params, x).astype(jnp.float32).sum())(params)
            for module in (ours, theirs)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02), found, expected)


def test_what_a_kernel_does_not_compute_stays_plain():
    sizes = [(128, 128, 12, 32), (512, 512, 12, 64), (16, 16, 4, 128)]
    assert all(tpu_attention.fits(*size) for size in sizes)
    # A head does not divide the lanes; a group of heads is not whole; rows that are too long, or no whole tiles.
    sizes = [(128, 128, 12, 80), (128, 128, 3, 32), (1024, 1024, 12, 64), (20, 20, 12, 64)]
    assert not any(tpu_attention.fits(*size) for size in sizes)
    assert [tpu_norm.fits(*size) for size in ((8192, 768), (8192, 312), (12, 768))] == [True, False, False]
    q, k = jnp.ones((1, 16, 4, 32), jnp.bfloat16), jnp.ones((1, 4, 16, 32), jnp.bfloat16)
    mask = jnp.ones((1, 16, 16), bool)
    for attend in (kernels.attend_on_tpus, kernels.attend_with_cudnn):
        for options in ({"dropout": lambda probs: probs}, {"bias_BxNxTxS": jnp.zeros((1, 4, 16, 16))}):
            if attend is kernels.attend_with_cudnn and "dropout" not in options:
                continue  # cuDNN adds a bias itself
            found = attend(q, k, k, mask, scale=1.0, **options)
            np.testing.assert_array_equal(found, layers.attend(q, k, k, mask, scale=1.0, **options))


class TestChoice:
    module = Encoder(EncoderConfig(20, H, 1, N, 2 * H, 32, attention_dropout=0.0), jnp.bfloat16)

    def test_by_the_devices_of_the_mesh(self):
        assert kernels.chosen("auto", CPU) == layers.PLAIN
        assert kernels.with_kernels(self.module, "auto", _Mesh()).kernels.norm is not None
        assert kernels.with_kernels(self.module, "plain", _Mesh()).kernels == layers.PLAIN
        assert self.module.kernels == layers.PLAIN

    def test_refusals(self):
        with pytest.raises(UserError, match="unknown kernels 'fast'; choices: plain, fused, auto"):
            kernels.chosen("fast", CPU)
        with pytest.raises(UserError, match="there are none for cpu; they are for gpu, tpu"):
            kernels.chosen("fused", CPU)
        drops = self.module.clone(config=dataclasses.replace(self.module.config, attention_dropout=0.1))
        with pytest.raises(UserError, match="no dropout on attention probabilities"):
            kernels.with_kernels(drops, "fused", _Mesh())

    def test_an_encoder_with_kernels_has_the_parameters_and_the_output_of_one_without(self):
        fused = Kernels(
            attend=lambda *args, **options: kernels.attend_on_tpus(*args, **options, interpret=True),
            norm=lambda *args: kernels.norm_on_tpus(*args, interpret=True),
            attend_joined=lambda *args: kernels.self_attend_on_tpus(*args, interpret=True),
        )
        plain = self.module.clone(dtype=jnp.float32)
        ids, mask = jnp.arange(32).reshape(2, 16) % 20, jnp.ones((2, 16), jnp.int32).at[1, 9:].set(0)
        params = jax.jit(plain.init)(jax.random.key(0), ids)

        @jax.jit
        def pull(params):
            outs = [module.apply(params, ids, mask).hidden * mask[..., None] for module in (plain.clone(kernels=fused), plain)]
            return outs

        gradients = jax.jit(jax.jacrev(lambda params: [jnp.sin(out).sum() for out in pull(params)]))(params)
        np.testing.assert_allclose(*pull(params), atol=2e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *gradients)


def test_over_the_devices_of_a_mesh_of_runs_and_rows():
    """Every device has its rows, and the gradients of vectors are sums over all; of rows that do not divide it has all."""
    mesh = jax.make_mesh((2, 2), ("run", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    by_rows = over_rows.over_rows_of(mesh)

    def loss(scale, x):
        normed = kernels.norm_on_tpus(x, scale, scale, 1e-5, by_rows, interpret=True)
        mask = jnp.ones((len(x), 1, 16), bool)
        attended = kernels.self_attend_on_tpus(
            lambda: jnp.concatenate([normed] * 3, axis=-1), mask, 16, 4, 32, 0.2, by_rows, interpret=True
        )
        return jnp.sin(attended).sum()

    def plain(scale, x):
        normed = norms.layer_norm(1e-5, jnp.float32, "n").apply({"params": {"scale": scale, "bias": scale}}, x)
        heads = normed.reshape(len(x), 16, 4, 32)
        keys = heads.swapaxes(1, 2)
        return jnp.sin(layers.attend(heads, keys, keys, jnp.ones((len(x), 1, 16), bool), scale=0.2)).sum()

    scales, x, _ = _inputs(jax.random.key(0), (2, 128), (4, 16, 128), (1,))
    for rows in (4, 3):
        found, expected = (
            jax.jit(jax.vmap(jax.grad(function), in_axes=(0, None), spmd_axis_name="run"))(scales, x[:rows])
            for function in (loss, plain)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
