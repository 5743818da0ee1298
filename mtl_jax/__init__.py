"""Multi-task and transfer learning for NLP in JAX.

A script builds an Experiment and calls main(experiment); train(experiment, workdir) is the same from Python.
"""

from mtl_jax import decoding as decoding
from mtl_jax import pretrained as pretrained
from mtl_jax import report as report
from mtl_jax import tasks as tasks
from mtl_jax import transfer as transfer
from mtl_jax import weighting as weighting
from mtl_jax.ablation.ablate import ablate as ablate
from mtl_jax.cli.main import main as main
from mtl_jax.cli.main import run as run
from mtl_jax.core.configuration import show_in_one_line as _show_in_one_line
from mtl_jax.core.errors import Interrupted as Interrupted
from mtl_jax.core.errors import UserError as UserError
from mtl_jax.data.batches import Batching as Batching
from mtl_jax.data.source import Source as Source
from mtl_jax.experiment import Checkpoints as Checkpoints
from mtl_jax.experiment import Evaluation as Evaluation
from mtl_jax.experiment import Experiment as Experiment
from mtl_jax.experiment import Phase as Phase
from mtl_jax.tasks import Classification as Classification
from mtl_jax.tasks import MaskedLM as MaskedLM
from mtl_jax.tasks import Multilabel as Multilabel
from mtl_jax.tasks import Regression as Regression
from mtl_jax.tasks import Seq2Seq as Seq2Seq
from mtl_jax.tasks import Span as Span
from mtl_jax.tasks import Tagging as Tagging
from mtl_jax.training.loop import train as train
from mtl_jax.transfer import EWC as EWC
from mtl_jax.transfer import L2SP as L2SP
from mtl_jax.transfer import Distillation as Distillation
from mtl_jax.transfer import Mixout as Mixout
from mtl_jax.transfer import ParamRule as ParamRule
from mtl_jax.transfer import RDrop as RDrop
from mtl_jax.transfer.adapters import IA3 as IA3
from mtl_jax.transfer.adapters import Bottleneck as Bottleneck
from mtl_jax.transfer.adapters import Lora as Lora
from mtl_jax.transfer.adapters import Prefix as Prefix
from mtl_jax.transfer.adapters import adapters_only as adapters_only
from mtl_jax.transfer.adapters import bitfit as bitfit
from mtl_jax.transfer.loading import InitFrom as InitFrom
from mtl_jax.transfer.optimizer import Optimizer as Optimizer
from mtl_jax.trunks import Embedding as Embedding
from mtl_jax.trunks import Pretrained as Pretrained
from mtl_jax.trunks import Transformer as Transformer

_show_in_one_line()
