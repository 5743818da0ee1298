"""Losses of sentence vectors by their cosines: contrastive, ordered and squared. Pure functions, each a sum and a count.

The vectors are those of a whole batch: on a mesh of devices the program is still one, so the negatives of a text are all texts
of the global batch, whatever the number of devices.

Shapes in names: G groups (a text, its positive, its negatives), N texts a group, B texts, P pairs, H width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

EPSILON = 1e-12  # of a squared length: a vector of zeros has a gradient of zeros
NEVER = -1e9  # a logit of a candidate that is left out


def normalised(vectors: jax.Array) -> jax.Array:
    """f32, the vectors with length 1 along their last axis; zeros stay zeros."""
    vectors = vectors.astype(jnp.float32)
    return vectors * jax.lax.rsqrt(jnp.maximum(jnp.square(vectors).sum(axis=-1, keepdims=True), EPSILON))


def in_batch(
    vectors_GxNxH: jax.Array, known_GxN: jax.Array, keys_GxNx2: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Each text finds its positive among the second and later texts of all groups (van den Oord et al., 2018, InfoNCE).

    Cross-entropy in nats of scale times cosine. Left out among a text's negatives are texts equal to it or to its positive, and
    positives of texts equal to it: they are no mistakes.

    Args:
        vectors_GxNxH: Of each group the text, its positive, and N - 2 further negatives.
        known_GxN: Whether there is such a text; a group without the first two adds nothing.
        keys_GxNx2: Texts with equal keys are equal.
        scale: The inverse of the temperature.

    Returns:
        Sum of the losses over the groups, and their number, f32[].
    """
    G, N, _ = vectors_GxNxH.shape
    unit_GxNxH = normalised(vectors_GxNxH)
    anchor_GxH, candidate_CxH = unit_GxNxH[:, 0], unit_GxNxH[:, 1:].reshape(G * (N - 1), -1)
    logits_GxC = scale * jnp.matmul(anchor_GxH, candidate_CxH.T, precision="highest")
    anchor_Gx2, candidate_Cx2 = keys_GxNx2[:, 0], keys_GxNx2[:, 1:].reshape(G * (N - 1), 2)
    place_C = jnp.arange(G * (N - 1))
    target_GxC = place_C == (jnp.arange(G) * (N - 1))[:, None]
    is_positive_C = place_C % (N - 1) == 0
    same_anchor_GxC = jnp.repeat(_equal(anchor_Gx2, anchor_Gx2), N - 1, axis=1)
    equal_GxC = _equal(anchor_Gx2, candidate_Cx2) | _equal(keys_GxNx2[:, 1], candidate_Cx2) | (same_anchor_GxC & is_positive_C)
    allowed_GxC = target_GxC | (known_GxN[:, 1:].reshape(-1) & ~equal_GxC)
    logits_GxC = jnp.where(allowed_GxC, logits_GxC, NEVER)
    loss_G = jax.nn.logsumexp(logits_GxC, axis=1) - jnp.where(target_GxC, logits_GxC, 0.0).sum(axis=1)
    counted_G = known_GxN[:, 0] & known_GxN[:, 1]
    return jnp.where(counted_G, loss_G, 0.0).sum(), counted_G.sum().astype(jnp.float32)


def same_class(
    vectors_BxH: jax.Array, class_B: jax.Array, known_B: jax.Array, keys_Bx2: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Each text finds the others of its class among all texts (Khosla et al., 2020, supervised contrastive learning).

    The mean over a text's positives of their cross-entropies in nats. Equal texts are not compared. A text without another one
    of its class adds nothing.

    Args:
        vectors_BxH: The texts.
        class_B: The class of each.
        known_B: Whether it has one.
        keys_Bx2: Texts with equal keys are equal.
        scale: The inverse of the temperature.

    Returns:
        Sum of the losses over texts, and their number, f32[].
    """
    unit_BxH = normalised(vectors_BxH)
    other_BxB = known_B[:, None] & known_B & ~_equal(keys_Bx2, keys_Bx2)
    logits_BxB = jnp.where(other_BxB, scale * jnp.matmul(unit_BxH, unit_BxH.T, precision="highest"), NEVER)
    positive_BxB = other_BxB & (class_B[:, None] == class_B)
    log_share_BxB = logits_BxB - jax.nn.logsumexp(logits_BxB, axis=1, keepdims=True)
    positives_B = positive_BxB.sum(axis=1)
    loss_B = -jnp.where(positive_BxB, log_share_BxB, 0.0).sum(axis=1) / jnp.maximum(positives_B, 1)
    return loss_B.sum(), (positives_B > 0).sum().astype(jnp.float32)


def ordered(cosine_P: jax.Array, score_P: jax.Array, known_P: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """CoSENT (Su, 2022): log(1 + sum of exp(scale (cos_b - cos_a)) over all pairs a, b with a higher score of a).

    It asks for the order of the scores alone, which is what Spearman's correlation measures.

    Args:
        cosine_P: The cosine of each pair of texts.
        score_P: Its score.
        known_P: Whether it has one.
        scale: The inverse of the temperature.

    Returns:
        The loss of the batch times the number of pairs, and that number, f32[].
    """
    higher_PxP = known_P[:, None] & known_P & (score_P[:, None] > score_P)
    terms_PxP = jnp.where(higher_PxP, scale * (cosine_P - cosine_P[:, None]), NEVER)
    count = known_P.sum().astype(jnp.float32)
    return jnp.logaddexp(0.0, jax.nn.logsumexp(terms_PxP)) * count, count


def ordered_classes(
    vectors_BxH: jax.Array, class_B: jax.Array, known_B: jax.Array, keys_Bx2: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """CoSENT of all pairs of texts: those of one class are closer than those of two. As same_class() otherwise."""
    cosine_BxB, pair_BxB, same_BxB = _class_pairs(vectors_BxH, class_B, known_B, keys_Bx2)
    # The sum over pairs of pairs is a product of two sums.
    same = jax.nn.logsumexp(jnp.where(pair_BxB & same_BxB, -scale * cosine_BxB, NEVER))
    different = jax.nn.logsumexp(jnp.where(pair_BxB & ~same_BxB, scale * cosine_BxB, NEVER))
    count = known_B.sum().astype(jnp.float32)
    return jnp.logaddexp(0.0, same + different) * count, count


def squared(cosine_P: jax.Array, target_P: jax.Array, known_P: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squared difference of cosine and target: sum over the known pairs, and their number, f32[]."""
    error_P = jnp.where(known_P, cosine_P - jnp.where(known_P, target_P, 0.0), 0.0)
    return jnp.square(error_P).sum(), known_P.sum().astype(jnp.float32)


def squared_classes(
    vectors_BxH: jax.Array, class_B: jax.Array, known_B: jax.Array, keys_Bx2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """squared() of all pairs of texts, with target 1 for those of one class and 0 for those of two (Tunstall et al., 2022).

    Both kinds of pairs count half, as where as many are drawn of each. As same_class() otherwise.
    """
    cosine_BxB, pair_BxB, same_BxB = _class_pairs(vectors_BxH, class_B, known_B, keys_Bx2)
    error_BxB = jnp.square(cosine_BxB - same_BxB)
    means = [
        jnp.where(kind_BxB, error_BxB, 0.0).sum() / jnp.maximum(kind_BxB.sum(), 1)
        for kind_BxB in (pair_BxB & same_BxB, pair_BxB & ~same_BxB)
    ]
    count = known_B.sum().astype(jnp.float32)
    return (means[0] + means[1]) / 2 * count, count


def _class_pairs(
    vectors_BxH: jax.Array, class_B: jax.Array, known_B: jax.Array, keys_Bx2: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cosines of all pairs of texts, whether a pair counts, and whether it is of one class, [B, B]."""
    unit_BxH = normalised(vectors_BxH)
    cosine_BxB = jnp.matmul(unit_BxH, unit_BxH.T, precision="highest")
    return cosine_BxB, known_B[:, None] & known_B & ~_equal(keys_Bx2, keys_Bx2), class_B[:, None] == class_B


def _equal(keys_Ax2: jax.Array, keys_Cx2: jax.Array) -> jax.Array:
    return (keys_Ax2[:, None] == keys_Cx2[None]).all(axis=-1)
