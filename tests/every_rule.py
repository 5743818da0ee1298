"""Every weighting rule with the options and signals that it needs, for tests over all of them."""

import inspect

import jax
import jax.numpy as jnp

from mtl_jax import weighting
from mtl_jax.weighting import RULES


def needs_target(name):
    return "target" in inspect.signature(RULES[name]).parameters


def make(name, tasks, **options):
    """The rule; one that needs a target has the first task, one that needs weights has 1 for every task."""
    parameters = inspect.signature(RULES[name]).parameters
    if needs_target(name):
        options = {"target": tasks[0]} | options
    if name in RULES and "weights" in parameters and parameters["weights"].default is inspect.Parameter.empty:
        options = {"weights": dict.fromkeys(tasks, 1.0)} | options
    return weighting.make(name, **options)


def beside_gram(gram):
    """Signals besides the Gram matrix, made from it: {field of Signals: value}."""
    return {"cross": gram, "held_out": jax.tree_util.Partial(_derivative, gram)}


def told(rule, state, rows):
    """Signals.transformed after the transform, whose new state this is."""
    return () if rule.transform.tells is None else (rule.transform.tells(state, rows),)


def after_transform(rule, gram):
    """Signals.transformed where there is a Gram matrix in place of gradients: squared lengths are told."""
    return () if rule.transform is None or rule.transform.tells is None else (jnp.diagonal(gram),)


def _derivative(gram, weights, rate):
    return -gram @ (1 - rate * jnp.stack([weights[task] for task in sorted(weights)]))
