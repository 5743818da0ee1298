"""What a checkpoint omits comes back, beside heads that have no parameters."""

import numpy as np

from mtl_jax.training import frozen_params


def test_heads_without_parameters_come_back():
    """A contrastive task without a projection has such a head, and the whole trunk can be frozen beside it."""
    trunk = {"trunk": {"layer_0": {"kernel": np.arange(6.0).reshape(2, 3)}}}
    params = {**trunk, "heads": {"sim": {}, "label": {"kernel": np.ones((3, 2))}}}
    trains = {"trunk": {"layer_0": {"kernel": False}}, "heads": {"sim": {}, "label": {"kernel": True}}}
    hashes = frozen_params.untrained_hashes([trains], params, trunk)
    assert list(hashes) == ["trunk/layer_0/kernel"]
    omitted = frozen_params.omit(params, hashes)
    assert omitted == {"heads": params["heads"]}
    source = frozen_params.TrunkSource(lambda: trunk, "somewhere")
    restored = frozen_params.restore(omitted, hashes, source, lambda _, array: array)
    assert restored["heads"].keys() == {"sim", "label"}
    np.testing.assert_array_equal(restored["trunk"]["layer_0"]["kernel"], trunk["trunk"]["layer_0"]["kernel"])
