import pytest

from mtl_jax import ParamRule
from mtl_jax.core.errors import UserError
from mtl_jax.transfer import layerwise, probe_then_finetune, top_layers, unfreezing


def test_one_layer_more_at_every_step():
    phases = unfreezing(100, at=range(20, 80, 20), layers=2, decay=0.5, learning_rate=1e-3)
    assert [(phase.name, phase.steps) for phase in phases] == [("heads", 20), ("top_1", 20), ("top_2", 20), ("top_3", 40)]
    assert [phase.rules for phase in phases] == [top_layers(count, layers=2, decay=0.5) for count in range(4)]
    assert phases[-1].rules == layerwise(0.5, layers=2)
    assert {phase.learning_rate for phase in phases} == {1e-3}


def test_layers_that_come_at_once_and_from_the_start():
    assert [(phase.name, phase.steps) for phase in unfreezing(50, at=[0, 0, 30], layers=6)] == [("top_2", 30), ("top_3", 20)]
    assert [(phase.name, phase.steps) for phase in unfreezing(50, at=[], layers=6)] == [("heads", 50)]


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ([10, 50], "layer 2 from the top is to train after step 50, but there are 50 steps"),
        ([-1], "layer 1 from the top is to train after step -1"),
        ([20, 10], "steps go up from layer to layer, but at is 20, 10"),
        ([1, 2, 3, 4], "at has 4 steps; 2 layers and the embeddings take 3 at most"),
    ],
)
def test_unfreezing_at_steps_that_make_no_sense(at, message):
    with pytest.raises(UserError, match=message):
        unfreezing(50, at, layers=2)


def test_linear_probing_then_fine_tuning():
    probe, finetune = probe_then_finetune(30, 60, probe_rate=1e-3, rate=2e-5, rules=layerwise(0.9, layers=2))
    assert (probe.steps, probe.learning_rate, finetune.steps, finetune.learning_rate) == (30, 1e-3, 60, 2e-5)
    assert probe.rules == (ParamRule("heads/.*"), ParamRule("trunk/.*", train=False))
    assert finetune.rules == layerwise(0.9, layers=2)
    with pytest.raises(UserError, match=r"rate is 0\.001; it must be lower than probe_rate, which is 0\.001"):
        probe_then_finetune(30, 60, probe_rate=1e-3, rate=1e-3)
