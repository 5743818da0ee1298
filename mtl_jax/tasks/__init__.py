"""Task kinds: one file each with head, loss and metrics."""

from mtl_jax.tasks.base import Task as Task
from mtl_jax.tasks.classification import Classification as Classification
from mtl_jax.tasks.regression import Regression as Regression

# What an experiment may hold: a new kind is added here.
AnyTask = Classification | Regression
