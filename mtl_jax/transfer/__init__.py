"""What moves and what stays: freezing; what is added: adapters."""

from mtl_jax.transfer.freezing import ParamRule as ParamRule
from mtl_jax.transfer.freezing import merge as merge
from mtl_jax.transfer.freezing import split as split
from mtl_jax.transfer.freezing import trainable as trainable
