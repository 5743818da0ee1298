"""Transfer learning: loading, freezing and learning rates by layer; adapters; regularisers; averaging and merging.

Every part also works alone on parameter trees, with plain jax and optax.
"""

from mtl_jax.core.trees import merge as merge
from mtl_jax.core.trees import split as split
from mtl_jax.transfer import adapters as adapters
from mtl_jax.transfer import averaging as averaging
from mtl_jax.transfer import merge_methods as merge_methods
from mtl_jax.transfer.accountants import pld as pld
from mtl_jax.transfer.accountants import rdp as rdp
from mtl_jax.transfer.accountants import register_accountant as register_accountant
from mtl_jax.transfer.divergences import distill as distill
from mtl_jax.transfer.divergences import distill_hidden as distill_hidden
from mtl_jax.transfer.divergences import divergence as divergence
from mtl_jax.transfer.divergences import r_drop as r_drop
from mtl_jax.transfer.freezing import ParamRule as ParamRule
from mtl_jax.transfer.freezing import decide as decide
from mtl_jax.transfer.freezing import trainable as trainable
from mtl_jax.transfer.loading import InitFrom as InitFrom
from mtl_jax.transfer.loading import load_into as load_into
from mtl_jax.transfer.optax_rules import by_rules as by_rules
from mtl_jax.transfer.optax_rules import carry as carry
from mtl_jax.transfer.optax_rules import scale_by_adam as scale_by_adam
from mtl_jax.transfer.optax_rules import scale_by_rules as scale_by_rules
from mtl_jax.transfer.param_rules import discriminative as discriminative
from mtl_jax.transfer.param_rules import layerwise as layerwise
from mtl_jax.transfer.param_rules import top_layers as top_layers
from mtl_jax.transfer.penalties import Mixout as Mixout
from mtl_jax.transfer.penalties import ewc as ewc
from mtl_jax.transfer.penalties import fisher as fisher
from mtl_jax.transfer.penalties import l2sp as l2sp
from mtl_jax.transfer.penalties import mixout as mixout
from mtl_jax.transfer.phases import Phase as Phase
from mtl_jax.transfer.phases import probe_then_finetune as probe_then_finetune
from mtl_jax.transfer.phases import setfit as setfit
from mtl_jax.transfer.phases import unfreezing as unfreezing
from mtl_jax.transfer.private import Private as Private
from mtl_jax.transfer.private import private_gradient as private_gradient
from mtl_jax.transfer.pseudo_labels import choose as choose
from mtl_jax.transfer.pseudo_labels import register_choice as register_choice
from mtl_jax.transfer.regularisers import EWC as EWC
from mtl_jax.transfer.regularisers import L2SP as L2SP
from mtl_jax.transfer.regularisers import Distillation as Distillation
from mtl_jax.transfer.regularisers import RDrop as RDrop
from mtl_jax.transfer.regularisers import Regulariser as Regulariser
from mtl_jax.transfer.unlabelled import Consistency as Consistency
from mtl_jax.transfer.unlabelled import SelfTraining as SelfTraining
from mtl_jax.transfer.unlabelled import self_training as self_training

merging = merge_methods  # its former name, which scripts may use
