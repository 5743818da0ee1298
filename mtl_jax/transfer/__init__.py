"""What moves, how fast, and what stays: rules on parameter paths, and the phases and rules that the literature describes."""

from mtl_jax.transfer.freezing import ParamRule as ParamRule
from mtl_jax.transfer.freezing import decide as decide
from mtl_jax.transfer.freezing import merge as merge
from mtl_jax.transfer.freezing import split as split
from mtl_jax.transfer.freezing import trainable as trainable
from mtl_jax.transfer.layers import discriminative as discriminative
from mtl_jax.transfer.layers import layerwise as layerwise
from mtl_jax.transfer.layers import top_layers as top_layers
from mtl_jax.transfer.moving import by_rules as by_rules
from mtl_jax.transfer.moving import scale_by_rules as scale_by_rules
from mtl_jax.transfer.phases import Phase as Phase
from mtl_jax.transfer.phases import probe_then_finetune as probe_then_finetune
from mtl_jax.transfer.phases import unfreezing as unfreezing
