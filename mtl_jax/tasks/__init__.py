"""Task kinds: one file each with head, loss and metrics."""

from mtl_jax.tasks.base import Task as Task
from mtl_jax.tasks.causal_lm import CausalLM as CausalLM
from mtl_jax.tasks.classification import Classification as Classification
from mtl_jax.tasks.contrastive import Contrastive as Contrastive
from mtl_jax.tasks.list_ranking import Ranking as Ranking
from mtl_jax.tasks.masked_lm import MaskedLM as MaskedLM
from mtl_jax.tasks.metrics import register_metric as register_metric
from mtl_jax.tasks.multilabel import Multilabel as Multilabel
from mtl_jax.tasks.multiple_choice import MultipleChoice as MultipleChoice
from mtl_jax.tasks.ordinal import Ordinal as Ordinal
from mtl_jax.tasks.regression import Regression as Regression
from mtl_jax.tasks.row_statistics import RowStatistics as RowStatistics
from mtl_jax.tasks.seq2seq import Seq2Seq as Seq2Seq
from mtl_jax.tasks.span import Span as Span
from mtl_jax.tasks.tagging import Tagging as Tagging
