"""Every sharing against a hand-written forward pass of one row for one task, and where its parameters are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mtl_jax import sharing
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.models.encoder import EmbeddingConfig, Encoder, EncoderConfig, EncoderOutput, SharedEmbedding
from mtl_jax.sharing.experts import smooth_step
from mtl_jax.transfer.adapters import ADAPTERS, IA3, Adapted, Bottleneck, Lora, adapt, merge_adapters, notes, routes

CONFIG = EncoderConfig(30, 8, 2, 2, 16, 8, type_vocab_size=0, dropout=0.0, attention_dropout=0.0)
WIDTH, LAYERS, TASKS = CONFIG.hidden_size, CONFIG.num_layers, 3
# Task 0 is on the first source; tasks 1 and 2 share the second.
ROUTES = routes.make([("a", "first"), ("b", "second"), ("c", "second")], ["first", "second"], {})
IDS = jnp.arange(24).reshape(6, 4)
SOURCE = jnp.array([1, 0, 1, 1, 0, -1])
KEY = jax.random.key(1)
# (row, which of its copies, task)
CASES = ((0, 0, 1), (0, 1, 2), (1, 0, 0), (2, 1, 2), (4, 0, 0))
ALL = (
    sharing.TaskAdapters(adapter=Lora(name="task", rank=2)),
    sharing.TaskAdapters(adapter=Bottleneck(name="task", width=3)),
    sharing.MMoE(experts=2, width=3),
    sharing.MMoE(experts=2, width=3, gates="task"),
    sharing.CGC(shared=2, own=1, width=3),
    sharing.DSelectK(experts=4, selected=2, width=3),
    sharing.DSelectK(experts=4, selected=2, width=3, gates="task"),
    sharing.MtlLora(rank=2, parts=2),
    sharing.HydraLora(rank=2, parts=2),
    sharing.MoeLora(rank=2, parts=2),
    sharing.MoeLora(rank=2, parts=2, gates="token"),
    sharing.TopLayers(own=1),
    sharing.TopLayers(own=2),
    sharing.CrossStitch(),
    sharing.CrossStitch(layers=1),
    sharing.Sluice(),
    sharing.MMoELayers(experts=2, layers=2),
    sharing.MMoELayers(experts=2, layers=1, gates="task"),
    sharing.PLE(levels=1),
    sharing.PLE(levels=2, shared=1, own=2),
    sharing.PLE(levels=2, gates="task"),
    sharing.HyperFormer(width=3, embedding=4),
    sharing.Pal(width=4, heads=2),
)
# The other forms of a kind, such as gates that read no tokens, are long.
LONG = {1, 3, 6, 10, 12, 14, 17, 18, 20}
CHOICES = [
    pytest.param(part, id=f"{number}-{type(part).__name__}", marks=[pytest.mark.long] if number in LONG else [])
    for number, part in enumerate(ALL)
]


@pytest.fixture(scope="module")
def plain() -> dict:
    return jax.jit(Encoder(CONFIG).init)(jax.random.key(0), IDS)["params"]


def shared(part: sharing.Sharing, tasks: routes.Routes = ROUTES) -> Adapted:
    return adapt(Encoder(CONFIG), (), 2, sharing=(part,), routes=tasks)


def noisy(params: dict) -> dict:
    """All parameters of a sharing changed, so that no 0 hides what it does."""
    generator = np.random.default_rng(2)
    return params | {
        ADAPTERS: jax.tree.map(lambda leaf: leaf + generator.normal(0, 0.3, leaf.shape).astype(np.float32), params[ADAPTERS])
    }


PLAIN = jax.jit(Encoder(CONFIG).apply)


def copies_of(module: Adapted, params: dict, source: jax.Array = SOURCE) -> jax.Array:
    """The outputs [rows, copies, T, H]."""
    hidden = module.apply({"params": params}, IDS, source=source).hidden
    return hidden.reshape(len(IDS), module.copies, *hidden.shape[1:])


@pytest.mark.parametrize("part", CHOICES)
def test_a_sharing_equals_a_forward_pass_by_hand(part, plain):
    module = shared(part)
    params = jax.jit(module.add)(plain, KEY)
    copies = jax.jit(lambda params, source: copies_of(module, params, source))
    # It begins as the plain trunk.
    hidden = copies(params, SOURCE)
    expected = PLAIN({"params": plain}, IDS).hidden
    np.testing.assert_allclose(hidden, jnp.broadcast_to(expected[:, None], hidden.shape), atol=1e-5)
    params = noisy(params)
    hidden = copies(params, SOURCE)
    in_numpy, ids = jax.tree.map(np.asarray, params), np.asarray(IDS)
    for row, copy, task in CASES:
        number = copy if module.copies <= 2 else task
        expected = by_hand(part, in_numpy, ids[row : row + 1], task)
        np.testing.assert_allclose(hidden[row, min(number, module.copies - 1)], expected[0], atol=3e-5)
    if isinstance(part, sharing.TopLayers):  # what a pass over rows of one source does in another way
        rows = jnp.array([0, 2, 3])
        apply = jax.jit(lambda: module.apply({"params": params}, IDS[rows], source=SOURCE[rows], one_source=True).hidden)
        np.testing.assert_allclose(apply().reshape(hidden[rows].shape), hidden[rows], atol=1e-5)
    # Whatever the sources of the rows beside it are.
    after = copies(params, SOURCE.at[1:].set(jnp.array([1, 0, 0, 1, 0])))
    np.testing.assert_allclose(hidden[0], after[0], atol=1e-5)


def test_tasks_on_sources_of_their_own_pass_once(plain):
    """Nothing is copied, and the output begins as the trunk's: bit for bit where no columns are mixed."""
    apart = routes.make([("a", "first"), ("b", "second")], ["first", "second"], {})
    for part in (ALL[4], ALL[11]):
        module = shared(part, apart)
        assert (module.copies, module.through, module.first_copied) == (1, 1, None)
        hidden = jax.jit(lambda module=module: module.apply({"params": module.add(plain, KEY)}, IDS, source=SOURCE).hidden)()
        expected = jax.jit(lambda: Encoder(CONFIG).apply({"params": plain}, IDS).hidden)()
        np.testing.assert_allclose(hidden, expected, rtol=0, atol=0 if part is ALL[4] else 1e-6)


def test_notes_say_what_is_shared_and_from_where_on_rows_are_copied(plain):
    module = shared(sharing.TopLayers(own=1))
    params = jax.jit(module.add)(plain, KEY)
    size = sum(leaf.size for leaf in jax.tree.leaves(plain["layer_1"]))
    assert notes(module, params) == [
        f"sharing: TopLayers at 1 layer, {3 * size:,} parameters, {size} of them each task's own",
        "sharing: 2 copies of each row pass from layer_1 on",
    ]


def test_gradients_reach_the_parameters_of_the_task_alone(plain):
    module = shared(sharing.CGC(shared=1, own=1, width=3))
    params = noisy(jax.jit(module.add)(plain, KEY))

    def loss(added):
        hidden = module.apply({"params": params | {ADAPTERS: added}}, IDS, source=SOURCE).hidden.reshape(6, 2, 4, 8)
        return (hidden[0, 1] ** 2).sum() + hidden[0, 1, 0, 0]  # what task 2 reads of row 0

    for path, leaf in trees.flat(jax.jit(jax.grad(loss))(params[ADAPTERS])).items():
        if "/own/" in path:
            by_task = np.abs(leaf.reshape(TASKS, -1)).sum(axis=1)
            assert by_task[2] > 0, path
            assert not by_task[:2].any(), path


@pytest.mark.parametrize("part", [sharing.TaskAdapters(adapter=IA3(name="task")), ALL[0], ALL[12]])
def test_a_task_can_be_merged_into_a_plain_trunk(part, plain):
    module = shared(part)
    params = noisy(jax.jit(module.add)(plain, KEY))
    merged = merge_adapters(module, params, task="c")
    hidden = PLAIN({"params": merged}, IDS).hidden
    np.testing.assert_allclose(hidden[0], jax.jit(lambda: copies_of(module, params))()[0, 1], atol=1e-5)


def test_what_cannot_be_merged_says_so(plain):
    module = shared(sharing.MMoE())
    with pytest.raises(UserError, match="sharing is MMoE, and transformers has no class for a trunk with it"):
        merge_adapters(module, jax.jit(module.add)(plain, KEY), task="a")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (sharing.MMoE(experts=0), "sharing: experts of MMoE is 0; it must be at least 1"),
        (sharing.MMoE(gates="tokens"), "gates of MMoE"),
        (sharing.DSelectK(experts=6), "experts of DSelectK is 6; it must be a power of two"),
        (sharing.DSelectK(experts=2, selected=3), "selected of DSelectK is 3, more than its 2 experts"),
        (sharing.TopLayers(own=0), "own of TopLayers is 0"),
        (sharing.Pal(width=10, heads=4), "width of Pal is 10, which its 4 heads do not divide"),
        (sharing.MtlLora(temperature=0.0), "temperature of MtlLora is 0"),
        (sharing.TaskAdapters(adapter=Lora(name="task", rank=0)), "rank is 0"),
    ],
)
def test_a_wrong_field_is_one_line(part, message):
    with pytest.raises(UserError, match=message):
        part.check()


def test_a_sharing_that_does_not_fit_the_trunk_is_one_line():
    with pytest.raises(UserError, match="sharing: own of TopLayers is 3, but the trunk has only 2 layers"):
        shared(sharing.TopLayers(own=3))
    bag = SharedEmbedding(EmbeddingConfig(10, 4))
    with pytest.raises(UserError, match="sharing: own of TopLayers: the trunk has no layers"):
        adapt(bag, (), 2, sharing=(sharing.TopLayers(),), routes=ROUTES)
    with pytest.raises(UserError, match="sharing 'sharing' finds no place in this trunk"):
        adapt(bag, (), 2, sharing=(sharing.MMoE(),), routes=ROUTES)
    with pytest.raises(UserError, match=r"adapter 'lora' would be at .*in layers of which the sharing has copies"):
        adapt(Encoder(CONFIG), (Lora(name="lora"),), 2, sharing=(sharing.TopLayers(),), routes=ROUTES)


def test_adapters_of_tasks_stand_beside_copies_by_task_alone(plain):
    lora = Lora(name="lora", rank=2, target="layer_0/attention/query", per="task")
    with pytest.raises(UserError, match="adapter 'lora': per is task, and in the sharing MMoELayers the copies"):
        adapt(Encoder(CONFIG), (lora,), 2, sharing=(sharing.MMoELayers(experts=3),), routes=ROUTES)
    module = adapt(Encoder(CONFIG), (lora,), 2, sharing=(sharing.TopLayers(own=1),), routes=ROUTES)
    hidden = jax.jit(lambda: copies_of(module, module.add(plain, KEY)))()
    np.testing.assert_allclose(hidden[:, 0], PLAIN({"params": plain}, IDS).hidden, atol=1e-5)


class Distances(nn.Module):
    """A trunk of one layer, which gets a matrix [T, T] that all rows share."""

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, *, position_ids=None, segment_ids=None, deterministic=True):
        x = nn.Embed(30, WIDTH, name="word")(input_ids)
        distances = jnp.arange(input_ids.shape[1])
        return EncoderOutput(OneLayer(name="layer_0")(x, distances[:, None] - distances[None]))


class OneLayer(nn.Module):
    is_layer = True

    @nn.compact
    def __call__(self, x, distances_TxT):
        return nn.Dense(WIDTH)(jnp.einsum("ts,bsh->bth", distances_TxT.astype(x.dtype), x))


@pytest.mark.parametrize("part", [sharing.MMoE(experts=2, target=".*"), sharing.TopLayers(), sharing.CrossStitch()])
@pytest.mark.parametrize("rows", [4, 2])
def test_what_all_rows_share_is_not_taken_for_rows(part, rows):
    """Also where there are as many rows, or rows with their copies, as tokens in a row."""
    ids, source = IDS[:rows], SOURCE[:rows]
    module = adapt(Distances(), (), 2, sharing=(part,), routes=ROUTES)
    params = jax.jit(Distances().init)(jax.random.key(0), ids)["params"]
    hidden = jax.jit(lambda: module.apply({"params": module.add(params, KEY)}, ids, source=source).hidden)()
    expected = jax.jit(Distances().apply)({"params": params}, ids).hidden
    np.testing.assert_allclose(hidden, jnp.repeat(expected, module.copies, axis=0), atol=1e-5)


def test_rows_without_labels_read_the_copy_of_the_task_that_is_applied_to_them():
    tasks, sources = [("a", "first"), ("b", "second"), ("c", "second")], ["first", "second", "more"]
    assert routes.make(tasks, sources, {"more": ["c"]}).table == ((0, 0), (1, 2), (2, 2))
    with pytest.raises(UserError, match="tasks a and b are both applied to the rows of source 'more'"):
        routes.make(tasks, sources, {"more": ["a", "b"]})


# By hand: one row, one task, numpy.


def by_hand(part: sharing.Sharing, params: dict, ids: np.ndarray, task: int) -> np.ndarray:
    """The trunk's layers one after another, for one task."""
    mask = np.ones((1, 4, 4), bool)
    added = params[ADAPTERS]["sharing"]
    tables = params["embeddings"]
    x = norm(tables["norm"], tables["word"]["embedding"][ids] + tables["position"]["embedding"][None, :4])
    if isinstance(part, sharing.CrossStitch | sharing.Sluice):
        return columns(part, params, x, mask)[task]
    if isinstance(part, sharing.PLE):
        return progressive(part, params, x, mask)[task]
    if isinstance(part, sharing.MMoELayers):
        return layer_experts(part, params, x, mask, task)
    for number in range(LAYERS):
        name = f"layer_{number}"
        if isinstance(part, sharing.TopLayers) and name in added:
            x = whole_layer(stack(added[name]["own"], task), x, mask)
        else:
            x = layer(part, params, added, name, x, mask, task)
    return x


def stack(tree: dict, number: int, count: int = TASKS) -> dict:
    """One of several parameter trees that lie in one; vectors are side by side."""
    return jax.tree.map(lambda leaf: leaf.reshape(count, -1)[number] if leaf.ndim == 1 else leaf[number], tree)


def whole_layer(params: dict, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return layer(None, {"layer": params}, {}, "layer", x, mask, 0)


def dense(params: dict, x: np.ndarray) -> np.ndarray:
    return x @ params["kernel"] + params["bias"]


def norm(params: dict, x: np.ndarray) -> np.ndarray:
    return normed(x, CONFIG.layer_norm_eps) * params["scale"] + params["bias"]


def normed(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def attention(q, k, v, mask):
    scores = np.einsum("btnd,bsnd->bnts", q, k) / q.shape[-1] ** 0.5
    return np.einsum("bnts,bsnd->btnd", softmax(np.where(mask[:, None], scores, -np.inf)), v)


def layer(part, params, added, name, x, mask, task):
    """A post-norm layer whose linear maps are changed by the sharing."""
    of_layer, entry = params[name], x

    def changed(path: str, x: np.ndarray) -> np.ndarray:
        of_path = of_layer
        for key in path.split("/"):
            of_path = of_path[key]
        y = dense(of_path, x)
        at = added.get(name, {})
        for key in path.split("/"):
            at = at.get(key, {})
        return change(part, added, at, x, y, entry, task) if at else y

    q, k, v = (changed(f"attention/{key}", x).reshape(1, 4, 2, 4) for key in ("query", "key", "value"))
    attended = attention(q, k, v, mask).reshape(x.shape)
    x = norm(of_layer["attention_norm"], x + changed("attention/output", attended))
    inner = gelu(changed("feed_forward_in", x))
    return norm(of_layer["feed_forward_norm"], x + changed("feed_forward_out", inner))


def gelu(x):
    return x * (1 + scipy.special.erf(x / 2**0.5)) / 2


def change(part, added, at, x, y, entry, task):
    """The output of a linear map with what the sharing adds to it."""
    own = stack(at.get("own", {}), task)
    if isinstance(part, sharing.TaskAdapters) and isinstance(part.adapter, Lora):
        return y + 8.0 * x @ own["a"] @ own["b"]  # alpha 16 / rank 2
    if isinstance(part, sharing.TaskAdapters):
        return y + gelu(y @ own["down_kernel"] + own["down_bias"]) @ own["up_kernel"] + own["up_bias"]
    if isinstance(part, sharing.HyperFormer):
        network = added["network"]
        embedding = np.concatenate([stack(network["own"], task)["task"], at["place"]])
        h = np.maximum(embedding @ network["project_in"], 0) @ network["project_out"]
        u = gelu(y @ (h @ network["down"]).reshape(WIDTH, 3)) @ (h @ network["up"]).reshape(3, WIDTH)
        return y + normed(u, 1e-6) * (h @ network["scale"]) + h @ network["shift"]
    if isinstance(part, sharing.Pal):
        ends = stack(added["projections"]["own"], task)
        z = entry @ ends["down"]
        q, k, v = ((z @ own[name]).reshape(1, 4, 2, 2) for name in ("query", "key", "value"))
        return y + gelu(attention(q, k, v, np.ones((1, 4, 4), bool)).reshape(z.shape) @ ends["up"])
    if isinstance(part, sharing.MtlLora):
        mix = softmax(own["mix"] / part.temperature)
        parts = at["b"].reshape(2, 2, -1)
        return y + 4.0 * sum(mix[n] * x @ at["a"] @ own["transform"] @ parts[n] for n in range(2))
    if isinstance(part, sharing.HydraLora | sharing.MoeLora):
        down = [at["a"]] * 2 if isinstance(part, sharing.HydraLora) else [at["a"][:, :2], at["a"][:, 2:]]
        router = x @ at["router"] if isinstance(part, sharing.HydraLora) else own["gate"]
        router = softmax(x @ own["gate"] if isinstance(part, sharing.MoeLora) and part.gates == "token" else router)
        parts = at["b"].reshape(2, 2, -1)
        return y + 4.0 * sum(router[..., n : n + 1] * (x @ down[n] @ parts[n]) for n in range(2))
    experts = [expert(at, "", n, part.width) for n in range(part.shared_experts)]
    experts += [expert(own, "own_", n, part.width) for n in range(part.own_experts)]
    weights = gate_by_hand(part, own, y)
    return y + sum(weights[..., n : n + 1] * function(y) for n, function in enumerate(experts))


def expert(params, prefix, number, width):
    inside = slice(number * width, (number + 1) * width)
    down, bias = params[f"{prefix}down_kernel"][:, inside], params[f"{prefix}down_bias"][inside]
    up, up_bias = params[f"{prefix}up_kernel"][inside], params[f"{prefix}up_bias"][number]
    return lambda y: gelu(y @ down + bias) @ up + up_bias


def gate_by_hand(part, own, y):
    def read(leaf):
        return y @ leaf if part.gates == "token" else np.broadcast_to(leaf, (1, 4, leaf.size))

    if not isinstance(part, sharing.DSelectK):
        return softmax(read(own["gate"]))
    bits = np.asarray(smooth_step(read(own["code"]), part.gamma)).reshape(1, 4, 2, 2)  # two selectors of two bits
    by_code = [(1 - bits[..., 0]) * (1 - bits[..., 1]), bits[..., 0] * (1 - bits[..., 1])]
    by_code += [(1 - bits[..., 0]) * bits[..., 1], bits[..., 0] * bits[..., 1]]
    return np.einsum("bts,btse->bte", softmax(read(own["selector"])), np.stack(by_code, axis=-1))


def columns(part, params, x, mask):
    added = params[ADAPTERS]["sharing"]
    streams, outputs = [x] * TASKS, []
    for number in range(LAYERS):
        name = f"layer_{number}"
        if name not in added:
            streams = [whole_layer(params[name], stream, mask) for stream in streams]
            continue
        streams = [whole_layer(stack(added[name]["columns"], k), stream, mask) for k, stream in enumerate(streams)]
        if isinstance(part, sharing.CrossStitch):
            mix = added[name]["mix"]
            streams = [sum(mix[k, j] * streams[j] for j in range(TASKS)) for k in range(TASKS)]
        else:
            halves = [half for stream in streams for half in np.split(stream, 2, axis=-1)]
            halves = [sum(added[name]["mix"][i, j] * halves[j] for j in range(6)) for i in range(6)]
            streams = [np.concatenate(halves[2 * k : 2 * k + 2], axis=-1) for k in range(TASKS)]
        outputs.append(streams)
    if isinstance(part, sharing.Sluice):
        depth = added["ends"]["own"]["depth"].reshape(TASKS, -1)
        streams = [sum(depth[k, n] * layer[k] for n, layer in enumerate(outputs)) for k in range(TASKS)]
    return streams


def weights_of(part, gate, x):
    return softmax(x @ gate if part.gates == "token" else np.broadcast_to(gate, (1, 4, gate.size)))


def layer_experts(part, params, x, mask, task):
    added = params[ADAPTERS]["sharing"]
    results, gate = None, stack(added["gates"]["own"], task)["gate"]
    for number in range(LAYERS):
        name = f"layer_{number}"
        if name not in added:
            x = whole_layer(params[name], x, mask)
            continue
        results = [x] * part.experts if results is None else results
        results = [whole_layer(stack(added[name]["experts"], e, part.experts), y, mask) for e, y in enumerate(results)]
    weights = weights_of(part, gate, x)  # x entered the first of the experts' layers
    return sum(weights[..., e : e + 1] * y for e, y in enumerate(results))


def progressive(part, params, x, mask):
    added = params[ADAPTERS]["sharing"]
    own, E = part.own, TASKS * part.own + part.shared
    streams = shared_stream = None
    for number in range(LAYERS):
        name = f"layer_{number}"
        if name not in added:
            x = whole_layer(params[name], x, mask)
            continue
        if streams is None:
            streams, shared_stream = [x] * TASKS, x
        inputs = [streams[e // own] if e < TASKS * own else shared_stream for e in range(E)]
        results = [whole_layer(stack(added[name]["experts"], e, E), y, mask) for e, y in enumerate(inputs)]
        mixed = []
        for k in range(TASKS):
            read = [*results[k * own : (k + 1) * own], *results[TASKS * own :]]
            weights = weights_of(part, stack(added[name]["own"], k)["gate"], streams[k])
            mixed.append(sum(weights[..., n : n + 1] * y for n, y in enumerate(read)))
        if "shared_gate" in added[name]:
            weights = weights_of(part, added[name]["shared_gate"], shared_stream)
            shared_stream = sum(weights[..., e : e + 1] * y for e, y in enumerate(results))
        streams = mixed
    return streams
