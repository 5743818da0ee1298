"""What moves and what stays, what is added and what is held on to: freezing, adapters, regularisers, Mixout."""

from mtl_jax.transfer.distillation import distill as distill
from mtl_jax.transfer.distillation import distill_hidden as distill_hidden
from mtl_jax.transfer.divergence import divergence as divergence
from mtl_jax.transfer.ewc import ewc as ewc
from mtl_jax.transfer.ewc import fisher as fisher
from mtl_jax.transfer.freezing import ParamRule as ParamRule
from mtl_jax.transfer.freezing import merge as merge
from mtl_jax.transfer.freezing import split as split
from mtl_jax.transfer.freezing import trainable as trainable
from mtl_jax.transfer.l2sp import l2sp as l2sp
from mtl_jax.transfer.mixout import Mixout as Mixout
from mtl_jax.transfer.mixout import mixout as mixout
from mtl_jax.transfer.r_drop import r_drop as r_drop
from mtl_jax.transfer.regularisers import EWC as EWC
from mtl_jax.transfer.regularisers import L2SP as L2SP
from mtl_jax.transfer.regularisers import Distillation as Distillation
from mtl_jax.transfer.regularisers import RDrop as RDrop
