"""Adapters: a few parameters added inside any trunk, whose code does not change.

Each works alone with linen's apply and optax, as adapt() shows, and in Experiment(adapters=...), where parameter rules decide
what trains; adapters_only() makes the usual rules.
"""

from mtl_jax.transfer.adapters.adapted import ADAPTERS as ADAPTERS
from mtl_jax.transfer.adapters.adapted import Adapted as Adapted
from mtl_jax.transfer.adapters.adapted_checkpoint import adapters_of as adapters_of
from mtl_jax.transfer.adapters.adapted_checkpoint import add_adapters as add_adapters
from mtl_jax.transfer.adapters.adapting import adapt as adapt
from mtl_jax.transfer.adapters.adapting import as_module as as_module
from mtl_jax.transfer.adapters.adapting import check as check
from mtl_jax.transfer.adapters.adapting import notes as notes
from mtl_jax.transfer.adapters.base import Adapter as Adapter
from mtl_jax.transfer.adapters.base import Call as Call
from mtl_jax.transfer.adapters.base import Layer as Layer
from mtl_jax.transfer.adapters.base import Params as Params
from mtl_jax.transfer.adapters.bottleneck import Bottleneck as Bottleneck
from mtl_jax.transfer.adapters.combining import combine as combine
from mtl_jax.transfer.adapters.combining import merged as merged
from mtl_jax.transfer.adapters.combining import only as only
from mtl_jax.transfer.adapters.combining import weighted as weighted
from mtl_jax.transfer.adapters.ia3 import IA3 as IA3
from mtl_jax.transfer.adapters.lora import Lora as Lora
from mtl_jax.transfer.adapters.low_rank import Dora as Dora
from mtl_jax.transfer.adapters.low_rank import Pissa as Pissa
from mtl_jax.transfer.adapters.low_rank import RsLora as RsLora
from mtl_jax.transfer.adapters.low_rank import Vera as Vera
from mtl_jax.transfer.adapters.of_task import merge_adapters as merge_adapters
from mtl_jax.transfer.adapters.of_task import own_parts as own_parts
from mtl_jax.transfer.adapters.peft_files import load_peft as load_peft
from mtl_jax.transfer.adapters.peft_files import save_peft as save_peft
from mtl_jax.transfer.adapters.prefix import Prefix as Prefix
from mtl_jax.transfer.adapters.prompt_tuning import PromptTuning as PromptTuning
from mtl_jax.transfer.adapters.stacks import OwnParts as OwnParts
from mtl_jax.transfer.adapters.stacks import is_own as is_own
from mtl_jax.transfer.param_rules import adapters_only as adapters_only
from mtl_jax.transfer.param_rules import bitfit as bitfit
from mtl_jax.transfer.param_rules import lora_plus as lora_plus
