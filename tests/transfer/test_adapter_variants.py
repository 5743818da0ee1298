"""Relatives of LoRA and prompt tuning: nothing changes at first, what is written out by hand, one of each source, merged."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import Dora, Lora, ParamRule, Pissa, PromptTuning, RsLora, Vera, adapters_only, lora_plus, pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.core.trees import flat
from mtl_jax.transfer import freezing
from mtl_jax.transfer.adapters import adapt, merge_adapters
from mtl_jax.transfer.adapters.base import Call, Layer

FIXTURES = Path(__file__).parents[1] / "pretrained" / "fixtures"
IDS = np.array([[5, 6, 7, 8, 3, 9, 0, 0], [4, 6, 9, 8, 7, 3, 5, 6]])
MASK = np.array([[1, 1, 1, 1, 1, 1, 0, 0], [1] * 8])
VARIANTS = (
    RsLora(name="rslora", rank=4, alpha=6.0),
    Dora(name="dora", rank=2, alpha=6.0),
    Pissa(name="pissa", rank=2, alpha=6.0),
    Vera(name="vera", rank=5),
)
NAMES = [adapter.name for adapter in VARIANTS]
I, O = 6, 5  # noqa: E741
LAYER = Layer("layer_0/attention/query", "dense", I, O)


@functools.cache
def trunk(family):
    checkpoint = pretrained.load(str(FIXTURES / family), head=None)
    return checkpoint.model.trunk, checkpoint.params["trunk"]


class Map:
    """A bound linear map, for calls of an adapter alone."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.kernel, self.bias = rng.normal(size=(I, O)).astype(np.float32), rng.normal(size=O).astype(np.float32)
        self.variables = {"params": {"kernel": jnp.asarray(self.kernel), "bias": jnp.asarray(self.bias)}}

    def __call__(self, x):
        return x @ self.variables["params"]["kernel"] + self.variables["params"]["bias"]

    def adapted(self, adapter, params, x):
        return adapter.around(params, Call(LAYER, self, self, (jnp.asarray(x),), {}, None))


def begun(adapter, map_, key=0):
    return adapter.start(jax.random.key(key), LAYER, map_.variables["params"])


def moved(params, seed=1):
    """Away from where they start, but for what is fixed."""
    rng = np.random.default_rng(seed)
    return {
        name: leaf if name.startswith("fixed_") else leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in params.items()
    }


X = np.random.default_rng(5).normal(size=(3, 4, I)).astype(np.float32)


def by_hand(adapter, params, map_):
    """The output in numpy, as the papers write it."""
    p, w = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}, map_.kernel.astype(np.float64)
    if isinstance(adapter, Vera):
        a, b = adapter._projection(LAYER)
        return X @ w + map_.bias + p["b"] * ((X @ a * p["d"]) @ b)
    scale = adapter.alpha / (math.sqrt(adapter.rank) if isinstance(adapter, RsLora) else adapter.rank)
    w = w - scale * p["fixed_a"] @ p["fixed_b"] if isinstance(adapter, Pissa) else w
    w = w + scale * p["a"] @ p["b"]
    if isinstance(adapter, Dora):
        w = p["magnitude"] * w / np.linalg.norm(w, axis=0)
    return X @ w + map_.bias


@pytest.mark.parametrize("adapter", VARIANTS, ids=NAMES)
def test_at_the_start_to_the_bit_then_as_by_hand_and_merged(adapter):
    map_ = Map()
    start = begun(adapter, map_)
    np.testing.assert_array_equal(map_.adapted(adapter, start, X), map_(X))
    params = moved(start)
    y = map_.adapted(adapter, params, X)
    np.testing.assert_allclose(y, by_hand(adapter, params, map_), atol=1e-5)
    assert not np.allclose(y, map_(X), atol=1e-2)
    inside = adapter.merged(params, map_.variables["params"], LAYER)
    np.testing.assert_allclose(X @ inside["kernel"] + inside["bias"], y, atol=1e-5)


@pytest.mark.parametrize("adapter", VARIANTS, ids=NAMES)
def test_each_row_has_its_own(adapter):
    """Matrices [B, ...] and vectors [B, 1, ...], as adapters with parameters for each source get them."""
    map_ = Map()
    each = [moved(begun(adapter, map_, key), key) for key in (1, 2, 3)]
    rows = jax.tree.map(lambda *leaves: jnp.stack(leaves)[:, None] if leaves[0].ndim == 1 else jnp.stack(leaves), *each)
    y = map_.adapted(adapter, rows, X)
    for row, params in enumerate(each):
        np.testing.assert_allclose(y[row], map_.adapted(adapter, params, X[row : row + 1])[0], atol=1e-5)


def test_pissa_starts_as_the_largest_singular_vectors_of_the_kernel():
    pissa, map_ = Pissa(name="pissa", rank=2, alpha=6.0), Map()
    start = begun(pissa, map_)
    left, values, right = np.linalg.svd(map_.kernel, full_matrices=False)
    np.testing.assert_allclose(3 * start["a"] @ start["b"], left[:, :2] * values[:2] @ right[:2], atol=1e-5)
    np.testing.assert_allclose((start["a"] ** 2).sum(0), (start["b"] ** 2).sum(1), rtol=1e-5)


def test_the_length_of_dora_passes_no_gradient():
    """As the paper's section 4.3: that of A is of the numerator alone."""
    dora, map_ = VARIANTS[1], Map()
    params = moved(begun(dora, map_))
    length = np.linalg.norm(map_.kernel + 3 * params["a"] @ params["b"], axis=0)

    def fixed_length(params):
        w = params["magnitude"] * (map_.kernel + 3 * params["a"] @ params["b"]) / length
        return jnp.square(X @ w + map_.bias).sum()

    actual = jax.grad(lambda params: jnp.square(map_.adapted(dora, params, X)).sum())(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-2), actual, jax.grad(fixed_length)(params))


def test_vera_has_the_same_random_matrices_in_all_layers_of_a_size():
    vera, other = VARIANTS[3], LAYER._replace(path="layer_1/attention/value")
    jax.tree.map(np.testing.assert_array_equal, vera._projection(LAYER), vera._projection(other))
    assert not np.array_equal(dataclasses.replace(vera, projection_seed=1)._projection(LAYER)[0], vera._projection(LAYER)[0])


@pytest.fixture(scope="module")
def together():
    """BERT with all variants at once, each source its own, and with a prompt."""
    base, params = trunk("bert_rows")
    adapters = (*(dataclasses.replace(adapter, per="source") for adapter in VARIANTS), PromptTuning(name="prompt", length=3))
    module = adapt(base, adapters, sources=2)
    return module, module.add(params, jax.random.key(0))


def test_in_a_trunk(together):
    """At first the output is the trunk's; what is fixed trains by no rule; B of LoRA+ is faster."""
    module, params = together
    without = dataclasses.replace(module, adapters=module.adapters[:-1])
    source = np.array([1, 0])
    expected = module.base.apply({"params": trunk("bert_rows")[1]}, IDS, MASK).hidden
    np.testing.assert_array_equal(without.apply({"params": params}, IDS, MASK, source=source).hidden, expected)
    merged = merge_adapters(without, params, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), merged, trunk("bert_rows")[1])
    decided = flat(freezing.decide({"trunk": params, "heads": {"h": np.zeros(1)}}, lora_plus(8.0)))
    for path, rule in decided.items():
        assert rule.train == (path.startswith(("trunk/adapters/", "heads/")) and "/fixed_" not in path), path
        assert rule.rate == (8.0 if path.endswith("/b") and "adapters" in path else 1.0)
    everything = flat(freezing.trainable({"trunk": params}, [ParamRule(".*")]))
    assert {path.rpartition("/")[2] for path, trains in everything.items() if not trains} == {"fixed_a", "fixed_b"}
    assert lora_plus()[1:] == adapters_only()


MAKES = ["bert_rows", *(pytest.param(name, marks=pytest.mark.long) for name in ("modernbert_rows", "t5", "bart"))]


@pytest.mark.parametrize("family", MAKES)
def test_a_prompt_is_as_many_tokens_in_front(family):
    """A prompt of the vectors of three tokens is those tokens in front; the examples of a packed row have one each."""
    base, params = trunk(family)
    tokens = np.array([4, 7, 5])
    table = next(leaf for path, leaf in flat(params).items() if path.endswith("embeddings/word/embedding"))
    module = adapt(base, [PromptTuning(name="prompt", length=3)])
    params = module.add(params, jax.random.key(0))
    (start,) = flat(params["adapters"]).values()
    assert all(any(np.array_equal(row, token) for token in table) for row in start)
    params["adapters"] = jax.tree.map(lambda leaf: jnp.asarray(table)[tokens], params["adapters"])
    hidden = jax.jit(module.apply)({"params": params}, IDS, MASK).hidden
    longer = np.concatenate([np.tile(tokens, (2, 1)), IDS], axis=1)
    mask = np.concatenate([np.ones((2, 3), int), MASK], axis=1)
    positions = np.arange(11)[None] * np.ones((2, 1), int)
    expected = jax.jit(base.apply)({"params": trunk(family)[1]}, longer, mask, position_ids=positions).hidden[:, 3:]
    np.testing.assert_allclose(hidden[MASK > 0], expected[MASK > 0], atol=1e-5)

    prompts = [PromptTuning(name="prompt", length=3, examples=2)]
    if family == "modernbert_rows":
        with pytest.raises(UserError, match=r"'prompt': local layers of this trunk see their neighbours .* examples to 1"):
            adapt(base, prompts)
        return
    packed = adapt(base, prompts)
    segments, positions = np.array([[1] * 6 + [2] * 8 + [0]]), np.array([[*range(6), *range(8), 0]])
    row = np.concatenate([IDS[0, :6], IDS[1], [0]])[None]
    apply = jax.jit(packed.apply)
    actual = apply({"params": params}, row, segments > 0, position_ids=positions, segment_ids=segments).hidden[0]
    np.testing.assert_allclose(actual[:14], np.concatenate([hidden[0, :6], hidden[1]]), atol=1e-5)
    if family == "bert_rows":
        unpacked = apply({"params": params}, IDS, MASK).hidden
        np.testing.assert_allclose(unpacked[MASK > 0], hidden[MASK > 0], atol=1e-5)
        own = adapt(base, [PromptTuning(name="prompt", length=3, per="source")], 2)
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), params["adapters"])
        each = jax.jit(own.apply)({"params": params | {"adapters": stacked}}, IDS, MASK, source=np.array([1, 0])).hidden
        np.testing.assert_allclose(each[1], hidden[1], atol=1e-5)
        assert not np.allclose(each[0, 0], hidden[0, 0], atol=1e-2)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([Vera(name="v", rank=0)], "'v': rank is 0; it must be at least 1"),
        ([Vera(name="v", projection_seed=-1)], "'v': projection_seed is -1"),
        ([PromptTuning(name="p", length=0)], "'p': length is 0; it must be at least 1"),
        ([Dora(name="a", rank=1), Dora(name="b", rank=1)], "'a' and 'b' are both at layer_0/attention/value, .* one Dora"),
        ([Pissa(name="p", rank=17)], "'p': rank is 17, but layer_0/attention/value is only 16 x 16"),
    ],
)
def test_bad_input(adapters, message):
    with pytest.raises(UserError, match=message):
        adapt(trunk("bert_rows")[0], adapters)


def test_bad_input_without_a_trunk():
    with pytest.raises(UserError, match=r"'p': examples is 1, but a row has up to 12, and each needs a prompt"):
        PromptTuning(name="p").check_rows(12)
    Lora(name="lora").check_rows(12)
    with pytest.raises(UserError, match="ratio is 0"):
        lora_plus(0)
