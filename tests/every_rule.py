"""Every weighting rule with the options and signals that it needs, for tests over all of them."""

import jax
import jax.numpy as jnp

from mtl_jax import weighting


def needs_target(name):
    return "target" in weighting.required_options(name)


def make(name, tasks, **options):
    """The rule; one that needs a target has the first task, one that needs weights has 1 for every task."""
    needed = {"target": tasks[0], "weights": dict.fromkeys(tasks, 1.0)}
    return weighting.make(name, **{option: needed[option] for option in weighting.required_options(name)} | options)


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
