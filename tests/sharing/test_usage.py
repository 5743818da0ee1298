"""Who uses which expert: the numbers against softmaxes by hand, their records in a run, and their section of the report."""

from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mtl_jax import Evaluation, Phase, PromptTuning, reporting, sharing, train
from mtl_jax.reporting import sharing_section
from mtl_jax.reporting.series import Series
from mtl_jax.sharing.shown_weights import by_task
from mtl_jax.training.metrics_log import read_metrics
from mtl_jax.training.setup import prepare
from mtl_jax.training.sharing_usage import make_usage, usage_record
from mtl_jax.transfer.adapters import ADAPTERS, adapt, routes
from mtl_jax.transfer.adapters.base import Call, Layer, Shown

# Task a is on the first source; b and c share the second. The last row is empty.
TASKS, SOURCES_OF_TASKS = ("a", "b", "c"), [0, 1, 1]
ROUTES = routes.make([("a", "first"), ("b", "second"), ("c", "second")], ["first", "second"], {})
IDS = np.arange(12).reshape(4, 3) % 7
SOURCE = jnp.array([1, 0, 1, -1])
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
FEED_FORWARD = r".*/feed_forward_out"


class ToyLayer(nn.Module):
    is_layer: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nn.Dense(4, name="feed_forward_out")(x)


class ToyTrunk(nn.Module):
    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        x = nn.Embed(7, 4, name="words")(input_ids)
        return ToyLayer(name="layer_1")(ToyLayer(name="layer_0")(x))


PLAIN = jax.jit(ToyTrunk().init)(jax.random.key(0), IDS)["params"]


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def of_tokens(weights_of_task):
    """The means over the tokens of each task's source, of weights [B, T, E] by task."""
    own = [MASK * (np.asarray(SOURCE)[:, None] == source) for source in SOURCES_OF_TASKS]
    return np.stack([(weights_of_task(k) * mask[..., None]).sum((0, 1)) / mask.sum() for k, mask in enumerate(own)])


def by_hand(part, params):
    """{(layer, name): f64[K, E]} of a few places."""
    words, first = params["words"]["embedding"], params["layer_0"]["feed_forward_out"]
    added = params[ADAPTERS]["sharing"]
    x = words[IDS]
    y = x @ first["kernel"] + first["bias"]
    at, place = added.get("layer_0", {}).get("feed_forward_out", {}), "layer_0/feed_forward_out"
    if isinstance(part, sharing.HydraLora):
        return {(place, "parts"): of_tokens(lambda k: softmax(x @ at["router"]))}
    if isinstance(part, sharing.MtlLora):
        return {(place, "parts"): softmax(at["own"]["mix"].reshape(3, 2) / 0.5)}
    if isinstance(part, sharing.MMoE):
        return {(place, "gate"): of_tokens(lambda k: softmax(y @ at["own"]["gate"][k]))}
    if isinstance(part, sharing.MMoELayers):
        gate = added["gates"]["own"]["gate"]
        return {("layer_1", "gate"): of_tokens(lambda k: softmax((x + y) @ gate[k]))}
    if isinstance(part, sharing.PLE):
        gate, shared = added["layer_0"]["own"]["gate"], added["layer_0"]["shared_gate"]
        by_task = of_tokens(lambda k: softmax(x @ gate[k])), of_tokens(lambda k: softmax(x @ shared))
        return {("layer_0", "gate"): by_task[0], ("layer_0", "shared gate"): by_task[1]}
    if isinstance(part, sharing.CrossStitch):
        return {(layer, "mix"): added[layer]["mix"] for layer in ("layer_0", "layer_1")}
    blocks = [np.linalg.norm(block) / 2**0.5 for rows in np.split(added["layer_1"]["mix"], 3) for block in np.split(rows, 3, 1)]
    return {("layer_1", "depth"): added["ends"]["own"]["depth"].reshape(3, 2), ("layer_1", "mix"): np.reshape(blocks, (3, 3))}


@pytest.mark.parametrize(
    "part",
    [
        sharing.MMoE(experts=2, width=2),
        sharing.HydraLora(rank=2, parts=2, target=FEED_FORWARD),
        sharing.MtlLora(rank=2, parts=2, target=FEED_FORWARD),
        sharing.MMoELayers(experts=2),
        sharing.PLE(levels=2, own=2),
        sharing.CrossStitch(),
        sharing.Sluice(),
    ],
    ids=lambda part: f"{type(part).__name__}-{getattr(part, 'gates', '')}",
)
def test_the_weights_are_those_by_hand(part):
    module = adapt(ToyTrunk(), (), 2, sharing=(part,), routes=ROUTES)
    rng = np.random.default_rng(0)
    params = jax.jit(module.add)(PLAIN, jax.random.key(1))
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.5, leaf.shape).astype(np.float32), params)

    def usage_of(params):
        return sharing.usage(module, params, IDS, MASK, source=SOURCE, sources_of_tasks=SOURCES_OF_TASKS)

    usage = jax.jit(usage_of)(params)
    for (layer, name), expected in by_hand(part, jax.tree.map(np.asarray, params)).items():
        np.testing.assert_allclose(usage[layer][name].means, expected, atol=1e-5)
        assert len(usage[layer][name].columns) == expected.shape[1]


def test_what_is_shown_is_checked_and_a_training_step_ignores_it():
    call = Call(Layer("layer_0", "layer"), None, lambda: None, (), {}, None)
    call.show("gate", jnp.ones((2, 3)), ["too", "few"])
    with pytest.raises(ValueError, match=r"gate at layer_0: 3 different names without '/' are needed, not \('a/b', 'c', 'd'\)"):
        call._replace(shown={}).show("gate", jnp.ones((2, 3)), ["a/b", "c", "d"])


@pytest.fixture(scope="module")
def run(shallow, data, tmp_path_factory):
    """Four steps with an evaluation after every second one."""
    experiment = tiny.experiment(
        shallow,
        data,
        only=("rating", "coarse"),
        sharing=sharing.MMoE(experts=2, width=2),
        phases=(Phase("everything", steps=4),),
        evaluation=Evaluation(every=2, baseline="none"),
    )
    folder = tmp_path_factory.mktemp("run") / "experts"
    train(experiment, folder)
    return experiment, folder


def usage_records(folder):
    return [record for record in read_metrics(folder) if record["kind"] == "sharing"]


def test_every_evaluation_has_a_record(run):
    _, folder = run
    first, last = usage_records(folder)
    assert [first["step"], last["step"]] == [2, 4]
    names = [f"layer_0/feed_forward_out/gate/{task}/expert {n}" for task in ("rating", "coarse") for n in (1, 2)]
    assert list(last) == ["kind", "step", *names]
    assert last[names[0]] + last[names[1]] == pytest.approx(1, abs=2e-4)
    assert 0.3 < last[names[0]] != first[names[0]]  # gates begin equal, and learn


def test_a_resumed_run_has_each_record_once(run, tmp_path):
    experiment, folder = run
    tiny.cut(folder, tmp_path / "resumed", 2)
    train(experiment, tmp_path / "resumed")
    assert usage_records(tmp_path / "resumed") == usage_records(folder)


def test_the_report_has_the_section(run, tmp_path):
    _, folder = run
    page = reporting.report(folder, output=tmp_path / "report").read_text()
    assert '<h2 id="experts-title">Who uses which expert</h2>' in page
    assert 'role="img" aria-label="layer_0/feed_forward_out: gate"' in page
    assert "at step 4, by layer: the mean over the tokens of at most 32 dev examples" in page
    assert "Largest: rating expert" in page
    assert ">coarse - expert 2<" in page  # a row of the panel over time
    assert {"experts.png", "experts-over-time.png"} <= {path.name for path in (tmp_path / "report" / "figures").iterdir()}


def test_places_of_many_layers_and_tasks():
    def curve(*values):
        return Series(np.array([2, 4]), np.array(values))

    curves = {
        f"sharing/layer_{n}/mix/{task}/{column}": curve(0.5, n / 20 if task == column else -0.1)
        for n in range(14)
        for task in TASKS
        for column in TASKS
    }
    places = sharing_section.places({"dev/a": curve(1, 1), **curves}, dict.fromkeys(TASKS, "accuracy"))
    assert [place.title for place in places] == [f"layer_{n}: mix" for n in range(14)]
    assert places[4].last_KxE.tolist() == [[0.2, -0.1, -0.1], [-0.1, 0.2, -0.1], [-0.1, -0.1, 0.2]]
    assert places[4].difference == pytest.approx(0.3)
    figure = sharing_section._last("experts", "", places, "")
    assert figure.choice == "layer"
    assert figure.panels[0].remark == "Largest of another task: a b (-0.10), b a (-0.10), c a (-0.10)."


def test_hard_sharing_and_one_without_gates_show_nothing():
    prepared = SimpleNamespace(trunk=SimpleNamespace(module=ToyTrunk()), corpus=SimpleNamespace(tasks=()))
    assert make_usage(prepared) is None
    module = adapt(ToyTrunk(), (), 2, sharing=(sharing.TopLayers(),), routes=ROUTES)
    params = jax.eval_shape(lambda: module.add(PLAIN, jax.random.key(1)))

    def usage_of(params):
        return sharing.usage(module, params, IDS, MASK, source=SOURCE, sources_of_tasks=SOURCES_OF_TASKS)

    assert jax.eval_shape(usage_of, params) == {}


@pytest.mark.parametrize("examples", [1, 2])
def test_the_places_of_prompts_do_not_count(examples):
    """As if the weights of the prompts were not there, and whatever the number of tasks and places."""
    weights = np.random.default_rng(0).random((4, 3 + 2 * examples, 2)).astype(np.float32)
    columns = ("one", "two")

    def of(weights, prompts):
        shown = {"layer": {"gate": Shown(jnp.asarray(weights), columns)}}
        return by_task(shown, None, MASK, SOURCE, SOURCES_OF_TASKS, prompts)["layer"]["gate"].means

    np.testing.assert_array_equal(of(weights, 2 * examples), of(weights[:, 2 * examples :], 0))
    with pytest.raises(ValueError, match="which fit neither 4 x 3 tokens nor 3 tasks"):
        of(weights, 0)


def test_a_run_with_a_prompt_and_gates_by_token(shallow, data):
    experiment = tiny.experiment(
        shallow,
        data,
        adapters=(PromptTuning(name="prompt", length=2, examples=1),),
        sharing=sharing.MMoE(experts=2, width=2),
    )
    prepared = prepare(replace(experiment, batch=replace(experiment.batch, packed=False)))
    apply = make_usage(prepared)
    assert apply is not None
    record = usage_record(apply, prepared.params, prepared)
    sums = {}
    for path, weight in record.items():
        row = path.rpartition("/")[0]
        sums[row] = sums.get(row, 0) + weight
    assert sums == pytest.approx(dict.fromkeys(sums, 1.0), abs=1e-3)
