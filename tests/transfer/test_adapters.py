"""Adapters in every family: nothing changes at the start, and what they compute is what is written out by hand."""

import dataclasses
import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from jitted import apply

from mtl_jax import IA3, Bottleneck, Lora, Prefix, pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.models.disentangled import DisentangledAttention
from mtl_jax.models.encoder import EmbeddingConfig, Encoder, EncoderConfig, SharedEmbedding
from mtl_jax.models.layers import Attention
from mtl_jax.models.modernbert import RotaryAttention, rotate
from mtl_jax.transfer.adapters import adapt, merge_adapters, routes

FIXTURES = Path(__file__).parents[1] / "pretrained" / "fixtures"
FAMILIES = [
    "bert_rows",
    "roberta_tokens",
    "distilbert_masked_lm",
    "electra_replaced",
    "modernbert_rows",
    "marian",
    "bart",
    "t5",
    "mpnet_masked_lm",
    "albert_rows",
    "deberta_rows",
    "deberta_masked_lm",
    "nomic_masked_lm",
    "gte_rows",
]
SELDOM = ("mpnet_masked_lm", "albert_rows", "deberta_rows", "nomic_masked_lm", "gte_rows")
# Of those whose layers are of the same make one stands for all where CI has little time.
ONE_OF_A_MAKE = ("bert_rows", "modernbert_rows", "marian", "t5", "deberta_masked_lm")
MAKES = [name if name in ONE_OF_A_MAKE else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
# Two rows; the first holds two examples and padding, the second one.
IDS = np.array([[5, 6, 7, 8, 3, 9, 0, 0], [4, 6, 9, 8, 7, 3, 5, 6]])
MASK = np.array([[1, 1, 1, 1, 1, 1, 0, 0], [1] * 8])
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 0, 0], [1] * 8])
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 0, 0], np.arange(8)])
PACKED = {"position_ids": POSITIONS, "segment_ids": SEGMENTS}

LORA = Lora(name="lora", rank=2, alpha=6.0)
IA = IA3(name="ia3")
HOULSBY, PFEIFFER = Bottleneck(name="houlsby", width=3), Bottleneck(name="pfeiffer", width=3, variant="pfeiffer")
PREFIX = Prefix(name="prefix", length=3)


@functools.cache
def trunk(family):
    checkpoint = pretrained.load(str(FIXTURES / family), head=None)
    return checkpoint.model.trunk, checkpoint.params["trunk"]


def with_adapters(family, *adapters, sources=1, moved=0.3):
    """The trunk with adapters, and its parameters; those of the adapters moved away from where they start."""
    base, params = trunk(family)
    module = adapt(base, adapters, sources)
    params = jax.jit(module.add)(params, jax.random.key(0))
    rng = np.random.default_rng(0)
    added = jax.tree.map(lambda leaf: leaf + moved * rng.normal(size=leaf.shape).astype(np.float32), params["adapters"])
    return module, params | {"adapters": added}


def bits(array):
    return np.asarray(array).tobytes()


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.long) if name in SELDOM else name for name in FAMILIES],
)
def test_at_the_start_the_output_is_the_trunk_s_to_the_bit(family):
    """Operation by operation, whether they are alone or together."""
    base, params = trunk(family)
    expected = bits(base.apply({"params": params}, IDS, MASK, **PACKED).hidden)
    for adapters in ([PFEIFFER], [LORA, IA, HOULSBY]):
        module = adapt(base, adapters)
        fresh = module.add(params, jax.random.key(0))
        assert bits(module.apply({"params": fresh}, IDS, MASK, **PACKED).hidden) == expected


@pytest.mark.parametrize(
    "family", [name if name == "bert_rows" else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
)
def test_compiled_at_the_start_the_output_is_the_trunk_s_but_for_rounding(family):
    """XLA adds up a norm's mean in the order that suits what it is fused with."""
    base, params = trunk(family)
    module = adapt(base, [LORA, IA, HOULSBY])
    run = lambda module, params: module.apply({"params": params}, IDS, MASK, **PACKED).hidden  # noqa: E731
    actual = jax.jit(functools.partial(run, module))(module.add(params, jax.random.key(0)))
    np.testing.assert_allclose(actual, jax.jit(functools.partial(run, base))(params), atol=1e-6)


def test_dropout_of_the_trunk_is_not_disturbed():
    base, params = trunk("bert_rows")
    module = adapt(base, [Lora(name="lora", dropout=0.5, target=".*")])
    rngs = {"dropout": jax.random.key(1)}
    actual, expected = (
        m.apply({"params": p}, IDS, MASK, deterministic=False, rngs=rngs).hidden
        for m, p in ((module, module.add(params, jax.random.key(0))), (base, params))
    )
    assert bits(actual) == bits(expected)
    still = adapt(base.clone(config=dataclasses.replace(base.config, dropout=0.0, attention_dropout=0.0)), module.adapters)
    with pytest.raises(ValueError, match='needs an rng named "dropout"'):
        still.apply({"params": module.add(params, jax.random.key(0))}, IDS, deterministic=False)


def written_out(family, layer):
    """The trunk with its linear maps and attentions replaced by functions of (layer's path, module, its call, arguments)."""
    base, params = trunk(family)

    def intercept(call, args, kwargs, context):
        if context.method_name != "__call__" or not isinstance(context.module, (nn.Dense, Attention, RotaryAttention)):
            return call(*args, **kwargs)
        return layer("/".join(context.module.path), context.module, call, *args, **kwargs)

    with nn.intercept_methods(intercept):
        return base.apply({"params": params}, IDS, MASK, **PACKED).hidden


def at(params, name, path):
    """An adapter's parameters at a layer; None where it has none."""
    tree = params["adapters"][name]
    for part in path.split("/"):
        tree = tree.get(part, {})
    return tree if tree and not isinstance(next(iter(tree.values())), dict) else None


def real(hidden):
    return np.asarray(hidden)[MASK.astype(bool)]


@pytest.mark.parametrize("family", MAKES)
def test_lora_is_a_product_of_two_matrices_beside_the_kernel(family):
    module, params = with_adapters(family, LORA)

    def layer(path, map_, call, x, *rest, **kwargs):
        own = at(params, "lora", path)
        if own is None:
            return call(x, *rest, **kwargs)
        kernel = trunk(family)[1]
        for part in path.split("/"):
            kernel = kernel[part]
        assert path.endswith(("query", "value", "query_key_value"))
        return x @ (kernel["kernel"] + 6.0 / 2 * own["a"] @ own["b"]) + kernel.get("bias", 0)

    actual = module.apply({"params": params}, IDS, MASK, **PACKED).hidden
    np.testing.assert_allclose(real(actual), real(written_out(family, layer)), atol=1e-5)
    assert not np.allclose(real(actual), real(module.base.apply({"params": trunk(family)[1]}, IDS, MASK, **PACKED).hidden))


@pytest.mark.parametrize("family", MAKES)
def test_ia3_multiplies_keys_values_and_the_inside_of_the_feed_forward_part(family):
    module, params = with_adapters(family, IA)

    def layer(path, map_, call, x, *rest, **kwargs):
        own = at(params, "ia3", path)
        if path.endswith("feed_forward_out"):
            return call(x * own["scale"])
        if path.endswith("attention/query_key_value"):
            query, key, value = np.split(np.asarray(call(x)), 3, axis=-1)
            return np.concatenate([query, key * own["key"], value * own["value"]], axis=-1)
        if path.endswith(("attention/key", "attention/value")):
            return call(x) * own["scale"]
        assert own is None
        return call(x, *rest, **kwargs)

    actual = module.apply({"params": params}, IDS, MASK, **PACKED).hidden
    np.testing.assert_allclose(real(actual), real(written_out(family, layer)), atol=1e-5)


@pytest.mark.parametrize("adapter", [HOULSBY, PFEIFFER])
@pytest.mark.parametrize("family", MAKES)
def test_a_bottleneck_follows_the_parts_of_a_block(family, adapter):
    module, params = with_adapters(family, adapter)
    behind = {"houlsby": ("attention/output", "feed_forward_out"), "pfeiffer": ("feed_forward_out",)}[adapter.variant]

    def layer(path, map_, call, x, *rest, **kwargs):
        y = call(x, *rest, **kwargs)
        if not path.endswith(behind):
            return y
        own = at(params, adapter.name, path)
        inner = jax.nn.gelu(y @ own["down_kernel"] + own["down_bias"], approximate=False)
        return y + inner @ own["up_kernel"] + own["up_bias"]

    actual = module.apply({"params": params}, IDS, MASK, **PACKED).hidden
    np.testing.assert_allclose(real(actual), real(written_out(family, layer)), atol=1e-5)


@pytest.mark.parametrize("family", MAKES)
def test_a_prefix_is_more_keys_and_values_which_everything_sees(family):
    """Attention as a sum over the row's keys and the prefix's, each with its exponential."""
    module, params = with_adapters(family, PREFIX)

    def attend(q, k, v, mask, bias, own, scale):
        scores = np.einsum("btnd,bsnd->bnts", q, k) * scale + bias
        weights = np.exp(scores) * mask[:, None]
        extra = np.exp(np.einsum("btnd,pnd->bntp", q, own["key"]) * scale)
        total = np.einsum("bnts,bsnd->btnd", weights, v) + np.einsum("bntp,pnd->btnd", extra, own["value"])
        return total / np.moveaxis(weights.sum(-1) + extra.sum(-1), 1, 2)[..., None]

    def layer(path, attention, call, x, *rest, source=None, bias_BxNxTxS=None, **kwargs):
        if isinstance(attention, nn.Dense):
            return call(x, *rest)
        own = at(params, "prefix", path)
        mask = np.broadcast_to(rest[0], (2, 8, 8))
        bias = 0 if bias_BxNxTxS is None else bias_BxNxTxS
        if isinstance(attention, RotaryAttention):
            maps = trunk(family)[1]
            for part in path.split("/"):
                maps = maps[part]
            N, D = attention.config.num_heads, attention.config.head_size
            joined, output = maps["query_key_value"], maps["output"]
            joined_BxTx3H = x @ joined["kernel"] + joined.get("bias", 0)
            q, k, v = (part.reshape(2, 8, N, D) for part in jnp.split(joined_BxTx3H, 3, axis=-1))
            out = attend(rotate(q, rest[1]), rotate(k, rest[1]), v, mask, 0, own, D**-0.5)
            return jnp.asarray(out.reshape(2, 8, -1)) @ output["kernel"] + output.get("bias", 0)
        source = attention.keys_values(x) if source is None else source
        q = attention.query(x).reshape(2, 8, attention.num_heads, attention.head_size)
        scale = attention.head_size**-0.5 if attention.scale is None else attention.scale
        if isinstance(attention, DisentangledAttention):
            bias = attention.distance_scores(q, source.key, kwargs["distances_UxH"], True)
        out = attend(q, *(part.swapaxes(1, 2) for part in source), mask, bias, own, scale)
        return attention.output(jnp.asarray(out.reshape(2, 8, -1)))

    actual = module.apply({"params": params}, IDS, MASK, **PACKED).hidden
    np.testing.assert_allclose(real(actual), real(written_out(family, layer)), atol=2e-5)


@pytest.mark.parametrize("family", MAKES)
def test_with_a_prefix_padding_stays_unseen(family):
    module, params = with_adapters(family, PREFIX)
    other = np.where(MASK, IDS, 9)
    a, b = (module.apply({"params": params}, ids, MASK, position_ids=POSITIONS).hidden for ids in (IDS, other))
    np.testing.assert_array_equal(real(a), real(b))


@pytest.mark.parametrize("family", MAKES)
def test_each_row_has_the_adapters_of_its_source(family):
    """Against adapters that all share, with the parameters of one source after another; an empty row gets some."""
    each = [type(a)(**{**vars(a), "per": "source"}) for a in (LORA, IA, HOULSBY, PREFIX)]
    module, params = with_adapters(family, *each, sources=3)
    apply = jax.jit(module.apply)
    actual = apply({"params": params}, IDS, MASK, source=np.array([2, 0]), **PACKED).hidden
    shared = adapt(module.base, (LORA, IA, HOULSBY, PREFIX))
    apply_shared = jax.jit(shared.apply)
    like = jax.eval_shape(lambda: shared.add(trunk(family)[1], jax.random.key(0)))["adapters"]
    for row, source in ((0, 2), (1, 0)):
        own = jax.tree.map(lambda stack, leaf, s=source: stack.reshape(3, *leaf.shape)[s], params["adapters"], like)
        expected = apply_shared({"params": params | {"adapters": own}}, IDS, MASK, **PACKED).hidden
        np.testing.assert_allclose(actual[row][MASK[row] > 0], expected[row][MASK[row] > 0], atol=1e-5)
    empty = apply({"params": params}, IDS, MASK, source=np.array([-1, 0]), **PACKED).hidden
    assert np.isfinite(real(empty)).all()
    with pytest.raises(ValueError, match="needs the source of every row"):
        module.apply({"params": params}, IDS, MASK)


def test_vectors_of_several_sources_stay_vectors():
    """Weight decay goes by the number of dimensions; a scale that starts at 1 must not be pulled to 0."""
    _, params = with_adapters("bert_rows", IA3(name="ia3", per="source"), sources=3, moved=0)
    assert {leaf.shape for leaf in jax.tree.leaves(params["adapters"])} == {(3 * 16,), (3 * 24,)}


def test_the_order_of_declaration_changes_nothing():
    adapters = (PREFIX, HOULSBY, IA, Lora(name="lora", rank=2, target=".*"))
    module, params = with_adapters("modernbert_rows", *adapters)
    turned = adapt(module.base, adapters[::-1])
    actual, expected = (m.apply({"params": params}, IDS, MASK, **PACKED).hidden for m in (turned, module))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("family", MAKES)
def test_merged_into_the_kernels(family):
    """LoRA and IA3 together, shared and of one source; IA3 also scales biases."""
    base, _ = trunk(family)
    lora = Lora(name="lora", rank=2, target=".*/(query|key|value|query_key_value|output|feed_forward_.*)")
    module, params = with_adapters(family, IA, lora)
    merged = merge_adapters(module, params)
    assert jax.tree.structure(merged) == jax.tree.structure(trunk(family)[1])
    actual = apply(base, merged, IDS, MASK, **PACKED).hidden
    np.testing.assert_allclose(real(actual), real(apply(module, params, IDS, MASK, **PACKED).hidden), atol=1e-5)

    each = [Lora(name="lora", rank=2, per="source"), IA3(name="ia3", per="source")]
    module, params = with_adapters(family, *each, sources=2)
    actual = apply(base, merge_adapters(module, params, 1), IDS, MASK, **PACKED).hidden
    expected = apply(module, params, IDS, MASK, source=np.array([1, 1]), **PACKED).hidden
    np.testing.assert_allclose(real(actual), real(expected), atol=1e-5)
    with pytest.raises(UserError, match="adapter 'lora': each source has its own"):
        merge_adapters(module, params)


def test_only_lora_and_ia3_can_be_merged():
    for adapter in (HOULSBY, PREFIX):
        module, params = with_adapters("bert_rows", LORA, adapter)
        with pytest.raises(
            UserError, match=f"adapter '{adapter.name}' is a {type(adapter).__name__}, which cannot be put into"
        ):
            merge_adapters(module, params)


def test_lora_dropout_keeps_the_mean():
    """At a linear map of zeros: what is left is the change, from inputs that are dropped or divided by what is kept."""
    from mtl_jax.transfer.adapters.base import Call, Layer

    lora = Lora(name="lora", rank=1, alpha=1.0, dropout=0.25)
    params = {"a": jnp.ones((1, 1)), "b": jnp.ones((1, 1))}
    layer, x = Layer("layer", "dense", 1, 1), jnp.full((100, 100, 1), 3.0)
    y = lora.around(params, Call(layer, None, jnp.zeros_like, (x,), {}, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(y), [0.0, 4.0])
    np.testing.assert_allclose(y.mean(), 3.0, atol=0.1)
    np.testing.assert_array_equal(lora.around(params, Call(layer, None, jnp.zeros_like, (x,), {}, None)), x)


@pytest.mark.parametrize("adapter", [LORA, PREFIX, *(pytest.param(a, marks=pytest.mark.long) for a in (IA, HOULSBY, PFEIFFER))])
def test_alone_with_optax(adapter):
    """As adapt() says: no experiment, no loop of ours."""
    base, pretrained_params = trunk("bert_rows")
    module = adapt(base, [adapter])
    params = module.add(pretrained_params, jax.random.key(0))
    added = params["adapters"]
    optimizer = optax.adam(1e-2)
    state = optimizer.init(added)
    target = jax.random.normal(jax.random.key(1), (16,))

    @jax.jit
    def loss(added):
        hidden = module.apply({"params": {**params, "adapters": added}}, IDS, MASK, **PACKED).hidden
        return ((hidden[1].mean(0) - target) ** 2).mean()

    before = float(loss(added))
    for _ in range(20):
        updates, state = optimizer.update(jax.grad(loss)(added), state, added)
        added = optax.apply_updates(added, updates)
    assert loss(added) < 0.95 * before


def test_init_is_the_module_s_own_with_adapters_beside():
    base, _ = trunk("bert_rows")
    module = adapt(base, [LORA])
    actual = module.init(jax.random.key(3), IDS)["params"]
    expected = base.init(jax.random.key(3), IDS)["params"]
    added = traverse_util.flatten_dict(actual.pop("adapters"), sep="/")
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert {path.rpartition("/")[0] for path in added} == {
        f"lora/layer_{n}/attention/{name}" for n in range(base.config.num_layers) for name in ("query", "value")
    }
    with pytest.raises(ValueError, match="no adapters"):
        module.apply({"params": expected}, IDS)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (
            [Lora(name="lora", target=".*/qurey")],
            r"'lora' finds no place .*'\.\*/qurey' matches no layer; there are layer_N/attention/key, .*layer_N/feed_forward",
        ),
        ([Lora(name="lora", target="(")], r"'lora': '\(' is not a regular expression"),
        ([Lora(name="lora", rank=0)], "'lora': rank is 0; it must be at least 1"),
        ([Lora(name="lora", rank=17)], "'lora': rank is 17, but layer_0/attention/value is only 16 x 16"),
        ([Lora(name="lora", dropout=1.0)], r"'lora': dropout is 1\.0"),
        ([LORA, IA3(name="lora")], "adapter names must differ: 'lora' stands twice"),
        ([Lora(name="")], "adapter name ''"),
        ([Lora(name="a/b")], "adapter name 'a/b'"),
        ([Lora(name="lora", per="head")], "unknown per of adapter 'lora': 'head'"),
        ([Bottleneck(name="b", width=0)], "'b': width is 0"),
        ([Bottleneck(name="b", variant="pfeifer")], r"unknown variant of adapter 'b': 'pfeifer' \(did you mean 'pfeiffer'\?\)"),
        ([Bottleneck(name="b", activation="gleu")], "unknown activation of adapter 'b': 'gleu'"),
        ([Prefix(name="p", length=0)], "'p': length is 0"),
        ([Prefix(name="p"), Prefix(name="q")], "p, q are all prefixes"),
    ],
)
def test_bad_input(adapters, message):
    with pytest.raises(UserError, match=message):
        adapt(trunk("bert_rows")[0], adapters)


@pytest.mark.parametrize("adapter", [LORA, IA, HOULSBY, PREFIX])
def test_an_embedding_has_no_place_for_adapters(adapter):
    with pytest.raises(UserError, match=f"adapter '{adapter.name}' finds no place in this trunk: it has no layers"):
        adapt(SharedEmbedding(EmbeddingConfig(10, 4)), [adapter])


def test_tasks_of_one_source_have_adapters_of_their_own():
    """Rows of the second source are there twice, each with the adapter of one of its tasks."""
    module = Encoder(EncoderConfig(12, 8, 2, 2, 16, 8, type_vocab_size=0))
    ids, source = jnp.arange(12).reshape(3, 4), jnp.array([0, 1, 1])
    params = jax.jit(module.init)(jax.random.key(0), ids)["params"]
    lora = Lora(name="lora", rank=2, per="task")
    tasks = routes.make([("a", "first"), ("b", "second"), ("c", "second")], ["first", "second"], {})
    adapted = adapt(module, [lora], 2, routes=tasks)
    added = jax.tree.map(lambda leaf: leaf + 0.1, jax.jit(adapted.add)(params, jax.random.key(1)))
    hidden = apply(adapted, added, ids, source=source).hidden.reshape(3, 2, 4, 8)
    alone = adapt(module, [dataclasses.replace(lora, per="run")])
    for row, copy, task in ((0, 0, 0), (1, 0, 1), (1, 1, 2), (2, 0, 1), (2, 1, 2)):
        of_task = added | {"adapters": jax.tree.map(lambda leaf, n=task: leaf[n], added["adapters"])}
        expected = apply(alone, of_task, ids[row : row + 1]).hidden[0]
        np.testing.assert_allclose(hidden[row, copy], expected, atol=2e-6)
