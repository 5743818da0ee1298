import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mtl_jax.models.layers import Dense, times


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 3, 4, 6)])
def test_a_product_by_rows_is_the_product(shape):
    """With the gradients of both, and the parameters of nn.Dense."""
    x = jax.random.normal(jax.random.key(0), shape)
    params = nn.Dense(7).init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, Dense(7).init(jax.random.key(1), x))

    def loss(module, params, x):
        return jnp.sin(module.apply(params, x)).sum()

    found, expected = (
        jax.jit(jax.grad(loss, argnums=(1, 2)), static_argnums=0)(module, params, x) for module in (Dense(7), nn.Dense(7))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    kernel = params["params"]["kernel"]
    np.testing.assert_allclose(times(x, kernel), x @ kernel, atol=1e-6)


def test_kernels_of_each_row():
    x, kernels = jax.random.normal(jax.random.key(0), (2, 3, 6)), jax.random.normal(jax.random.key(1), (2, 6, 7))
    np.testing.assert_allclose(times(x, kernels), np.stack([x[0] @ kernels[0], x[1] @ kernels[1]]), atol=1e-5)


@pytest.mark.parametrize("vectorised", [False, True])
def test_the_gradient_of_a_kernel_is_one_product_of_matrices(vectorised):
    """Not a sum over two axes, for which XLA's CPU backend transposes: that is what it is for."""

    def gradient(x, kernel):
        return jax.grad(lambda kernel: jnp.sin(Dense(7, use_bias=False).apply({"params": {"kernel": kernel}}, x)).sum())(kernel)

    function = jax.vmap(gradient, in_axes=(0, None)) if vectorised else gradient
    x = jnp.ones((5, 2, 3, 6) if vectorised else (2, 3, 6))
    text = jax.jit(function).lower(x, jnp.ones((6, 7))).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all(line.split("contracting_dims = ")[1].split("]")[0].count(",") == 0 for line in products), products
