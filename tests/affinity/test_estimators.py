"""Estimators against published numbers, slow equivalents written by hand, and the invariances that they promise."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes, load_digits, load_iris

import mtl_jax
from mtl_jax import UserError, affinity

CLASS_ESTIMATORS = ("logme", "h_score", "regularised_h_score", "transrate", "linear_probe", "knn", "n_leep")
NUMBER_ESTIMATORS = ("logme", "linear_probe", "knn")


@pytest.mark.parametrize(
    ("name", "load", "value"),
    [
        ("logme", load_iris, -0.16006022),
        ("logme", load_digits, 0.270277),
        ("logme", load_diabetes, -6.523564),
        ("h_score", load_iris, 1.191899),
        ("h_score", load_digits, 5.917909),
        ("regularised_h_score", load_iris, 1.17784248),
        ("regularised_h_score", load_digits, 5.851433),
        ("transrate", load_iris, 0.5894),
    ],
)
def test_published_values(name, load, value):
    assert affinity.ESTIMATORS[name](*load(return_X_y=True)) == pytest.approx(
        value, rel=2e-6, abs=1e-6 if name != "transrate" else 1e-4
    )


def test_published_values_of_source_labels():
    probabilities, labels = np.random.default_rng(0).dirichlet(np.ones(3), 150), load_iris().target
    assert affinity.leep(probabilities, labels) == pytest.approx(-1.0900718, abs=1e-7)
    assert affinity.nce(probabilities.argmax(axis=1), labels) == pytest.approx(-1.0850373, abs=1e-7)


def test_examples_of_docstrings():
    functions = [affinity.logme, affinity.leep, affinity.regret, affinity.groups, affinity.gradient_cosines]
    functions += [affinity.joint_or_sequential, affinity.register]
    for function in functions:
        tests = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs={"mtl_jax": mtl_jax})
        assert any(test.examples for test in tests), function
        for test in tests:
            assert not doctest.DocTestRunner().run(test).failed, test.name
    del affinity.ESTIMATORS._functions["spread"]


def rows(seed, count=40, width=5, classes=3, shift=1.0):
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), random.integers(0, classes, count - classes)])
    return random.normal(size=(count, width)) + shift * random.normal(size=(classes, width))[labels], labels


# Slow equivalents, from the papers.


def logme_by_fixed_point(features, targets):
    """Algorithm 1 of You et al. with full matrices, for one column of targets, until nothing changes."""
    count, width = features.shape
    alpha, beta = 1.0, 1.0
    for _ in range(2000):
        inverse = np.linalg.inv(alpha * np.eye(width) + beta * features.T @ features)
        mean = beta * inverse @ features.T @ targets
        eigenvalues = np.linalg.eigvalsh(beta * features.T @ features)
        gamma = (eigenvalues / (alpha + eigenvalues)).sum()
        error = ((features @ mean - targets) ** 2).sum()
        alpha, beta = gamma / (mean @ mean), (count - gamma) / error
    precision = alpha * np.eye(width) + beta * features.T @ features
    mean = beta * np.linalg.solve(precision, features.T @ targets)
    error = ((features @ mean - targets) ** 2).sum()
    evidence = count * np.log(beta) + width * np.log(alpha) - count * np.log(2 * np.pi) - np.linalg.slogdet(precision)[1]
    return (evidence - beta * error - alpha * mean @ mean) / 2 / count


@pytest.mark.parametrize(("count", "width"), [(40, 5), (20, 30)])
def test_logme_is_the_fixed_point_of_its_paper(count, width):
    features, labels = rows(3, count, width)
    slow = np.mean([logme_by_fixed_point(features, (labels == label) * 1.0) for label in range(3)])
    assert affinity.logme(features, labels) == pytest.approx(slow, abs=1e-6)


def test_scores_of_covariances_by_matrices():
    from sklearn.covariance import LedoitWolf

    features, labels = rows(4)
    means = np.stack([features[labels == label].mean(axis=0) for label in labels])
    between = np.cov(means, rowvar=False)
    slow = np.trace(np.linalg.inv(np.cov(features, rowvar=False)) @ between)
    assert affinity.h_score(features, labels) == pytest.approx(slow, rel=1e-9)
    shrunk = LedoitWolf().fit(features)
    slow = (1 - shrunk.shrinkage_) * np.trace(np.linalg.inv(shrunk.covariance_) @ between)
    assert affinity.regularised_h_score(features, labels) == pytest.approx(slow, rel=1e-9)


def test_transrate_by_determinants():
    features, labels = rows(5)
    centred = features - features.mean(axis=0)

    def rate(part):
        return np.log(np.linalg.det(np.eye(5) + part.T @ part / (len(part) * 1e-4))) / 2

    slow = rate(centred) - sum((labels == c).mean() * rate(centred[labels == c]) for c in range(3))
    assert affinity.transrate(features, labels) == pytest.approx(slow, rel=1e-9)


def test_leep_and_nce_by_loops():
    random = np.random.default_rng(6)
    probabilities, labels = random.dirichlet(np.ones(4), 30), random.integers(0, 3, 30)
    joint = {(y, z): sum(probabilities[i, z] for i in range(30) if labels[i] == y) / 30 for y in range(3) for z in range(4)}
    total = {z: sum(joint[y, z] for y in range(3)) for z in range(4)}
    slow = np.mean([np.log(sum(joint[labels[i], z] / total[z] * probabilities[i, z] for z in range(4))) for i in range(30)])
    assert affinity.leep(probabilities, labels) == pytest.approx(slow, rel=1e-12)
    source = probabilities.argmax(axis=1)
    slow = np.mean([np.log(np.mean(labels[source == source[i]] == labels[i])) for i in range(30)])
    assert affinity.nce(source, labels) == pytest.approx(slow, rel=1e-12)


@pytest.mark.parametrize("numbers", [False, True])
def test_the_probe_leaves_each_row_out(numbers):
    """By fitting a model without each row, for every penalty of the list."""
    from mtl_jax.affinity.probes import PENALTIES

    features, labels = rows(7, count=20)
    targets = labels[:, None] + 0.1 * features[:, :1] if numbers else np.eye(3)[labels]
    scale = (np.linalg.svd(features - features.mean(axis=0), compute_uv=False) ** 2).mean()
    scores = []
    for penalty in PENALTIES * scale:
        outputs = np.zeros_like(targets)
        for i in range(20):
            others = np.arange(20) != i
            x, y = features[others], targets[others]
            weights = np.linalg.solve(
                (x - x.mean(axis=0)).T @ (x - x.mean(axis=0)) + penalty * np.eye(5),
                (x - x.mean(axis=0)).T @ (y - y.mean(axis=0)),
            )
            outputs[i] = (features[i] - x.mean(axis=0)) @ weights + y.mean(axis=0)
        error = ((outputs - targets) ** 2).sum() / ((targets - targets.mean(axis=0)) ** 2).sum()
        scores.append(1 - error if numbers else (outputs.argmax(axis=1) == labels).mean())
    fast = affinity.linear_probe(features, targets[:, 0] if numbers else labels)
    assert fast == pytest.approx(max(scores), rel=1e-9)


def test_neighbours_by_loops():
    features, labels = rows(8)
    credit, predicted = [], []
    for i in range(40):
        distances = np.linalg.norm(features - features[i], axis=1)
        distances[i] = np.inf
        nearest = np.argsort(distances)[:4]
        counts = np.bincount(labels[nearest], minlength=3)
        credit.append((counts[labels[i]] == counts.max()) / (counts == counts.max()).sum())
        predicted.append(features[nearest, 0].mean())
    assert affinity.knn(features, labels, k=4) == pytest.approx(np.mean(credit))
    numbers = features[:, 0]
    error = ((predicted - numbers) ** 2).sum() / ((numbers - numbers.mean()) ** 2).sum()
    assert affinity.knn(features, numbers, k=4) == pytest.approx(1 - error)


def test_clusters_that_are_classes_tell_everything():
    features, labels = rows(9, count=60, shift=50.0)
    assert affinity.n_leep(features, labels, components=3) == pytest.approx(0, abs=1e-6)
    assert affinity.n_leep(features, labels, components=1) == pytest.approx(affinity.nce(labels * 0, labels))


def test_esm_is_logme_after_the_map_of_fine_tuning():
    random = np.random.default_rng(10)
    base, target = random.normal(size=(80, 6)), random.normal(size=(40, 6))
    weights, shift = random.normal(size=(6, 4)), random.normal(size=4)
    labels = random.integers(0, 2, 40)
    tuned = affinity.esm(base, base @ weights + shift, target, labels, ridge=1e-12)
    assert tuned == pytest.approx(affinity.logme(target @ weights + shift, labels), abs=1e-6)
    unchanged = affinity.esm(base, base, target, labels, ridge=1e-12)
    assert unchanged == pytest.approx(affinity.logme(target, labels), abs=1e-6)


def test_similarity_of_texts_and_tasks():
    random = np.random.default_rng(11)
    source, target = random.normal(size=(30, 8)) + 1, random.normal(size=(20, 8)) + 1
    cosine = source.mean(0) @ target.mean(0) / np.linalg.norm(source.mean(0)) / np.linalg.norm(target.mean(0))
    assert affinity.text_similarity(source, target) == pytest.approx(cosine)
    assert affinity.vocabulary_overlap([[1, 2, 2], [3]], [[2, 2], [1, 3]]) == pytest.approx(1)
    assert affinity.vocabulary_overlap([[0, 1]], [[2], [3]]) == 0
    assert affinity.vocabulary_overlap([[0]], [[0, 1]]) == pytest.approx(1 - (np.log2(4 / 3) + 0.5 * np.log2(2 / 3) + 0.5) / 2)
    fisher = {"layer": {"kernel": np.arange(6.0).reshape(3, 2), "bias": np.float32([1, 2])}}
    vector = affinity.task_embedding(fisher)
    np.testing.assert_allclose(vector, [1, 2, 2, 3])  # bias before kernel; the kernel's inputs averaged
    assert affinity.task_similarity(vector, vector) == pytest.approx(1)
    assert affinity.task_similarity([1, 0], [0, 3]) == 0
    assert affinity.task_similarity([3, 1], [1, 3]) == pytest.approx(2 * 0.75 * 0.25 / (0.75**2 + 0.25**2))


# Properties.


@given(seed=st.integers(0, 10**6), name=st.sampled_from(CLASS_ESTIMATORS))
def test_order_of_rows_and_names_of_labels_do_not_matter(seed, name):
    features, labels = rows(seed, count=24, width=4)
    random = np.random.default_rng(seed)
    estimator = affinity.ESTIMATORS[name]
    names = random.permutation(3) * 7 - 5
    assert estimator(features, names[labels]) == pytest.approx(estimator(features, labels), rel=1e-7, abs=1e-9)
    if name != "n_leep":  # its mixture starts from some rows
        order = random.permutation(24)
        assert estimator(features[order], labels[order]) == pytest.approx(estimator(features, labels), rel=1e-7, abs=1e-9)


@given(seed=st.integers(0, 10**6), name=st.sampled_from(CLASS_ESTIMATORS), width=st.sampled_from((3, 40)))
def test_rotations_do_not_matter(seed, name, width):
    features, labels = rows(seed, count=24, width=width)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
    estimator = affinity.ESTIMATORS[name]
    if name != "n_leep":  # its principal components may change their signs, and k-means its start
        assert estimator(features @ rotation, labels) == pytest.approx(estimator(features, labels), rel=1e-6, abs=1e-7)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(NUMBER_ESTIMATORS), scale=st.sampled_from((1e-4, 1e5)))
def test_the_scale_of_features_does_not_matter(seed, name, scale):
    features, labels = rows(seed, count=24, width=4)
    numbers = features[:, 0] + labels
    estimator = affinity.ESTIMATORS[name]
    for target in (labels, numbers):
        assert estimator(scale * features, target) == pytest.approx(estimator(features, target), rel=1e-6, abs=1e-7)
    for other in ("h_score", "regularised_h_score", "n_leep"):
        estimator = affinity.ESTIMATORS[other]
        assert estimator(scale * features, labels) == pytest.approx(estimator(features, labels), rel=1e-6, abs=1e-7)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_labels_that_the_features_tell_score_higher(seed):
    features, labels = rows(seed, count=60, width=4, shift=6.0)
    shuffled = np.random.default_rng(seed).permutation(labels)
    for name in CLASS_ESTIMATORS:
        assert affinity.ESTIMATORS[name](features, labels) > affinity.ESTIMATORS[name](features, shuffled), name


def test_an_affine_map_does_not_change_the_h_score():
    features, labels = rows(12)
    mapped = features @ np.random.default_rng(1).normal(size=(5, 5)) + 100
    assert affinity.h_score(mapped, labels) == pytest.approx(affinity.h_score(features, labels), rel=1e-8)


# Hard inputs.


@pytest.mark.parametrize("name", CLASS_ESTIMATORS)
def test_hard_features_give_finite_numbers(name):
    features, labels = rows(13, count=20)
    estimator = affinity.ESTIMATORS[name]
    constant = np.concatenate([features, np.full((20, 2), 7.7)], axis=1)
    wide = np.random.default_rng(2).normal(size=(20, 64))
    single = np.where(np.arange(20) == 3, 9, labels)  # a class with one row
    for values, target in [
        (constant, labels),
        (np.ones((20, 3)), labels),
        (np.zeros((20, 3)), labels),
        (wide, labels),
        (features, single),
        (features * 1e-12, labels),
        (features[:, :1], labels),
        (np.repeat(features[:1], 20, axis=0), labels),
    ]:
        assert np.isfinite(estimator(values, target))
    single_precision = estimator(features.astype(np.float32), labels.astype(np.int8))
    assert single_precision == pytest.approx(estimator(features, labels), rel=1e-3, abs=1e-4)
    assert isinstance(estimator(mtl_jax.affinity.gradient_cosines(np.eye(20)), labels), float)  # arrays of jax


def test_constant_columns_add_nothing_to_scores_of_variance():
    features, labels = rows(14)
    constant = np.concatenate([features, np.full((40, 3), 0.1)], axis=1)
    for name in ("h_score", "transrate", "linear_probe", "knn"):
        assert affinity.ESTIMATORS[name](constant, labels) == pytest.approx(affinity.ESTIMATORS[name](features, labels)), name


def test_labels_that_the_features_tell_exactly_have_a_large_evidence():
    features, _ = rows(15, count=30)
    assert 5 < affinity.logme(features, features @ np.arange(5.0)) < 100


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: affinity.logme(x, y * 0), r"logme: all 40 rows have label 0; two classes are needed"),
        (lambda x, y: affinity.logme(x, y * 0.0), r"logme: all 40 labels are 0; two values are needed"),
        (lambda x, y: affinity.logme(x, y[:-1]), r"logme: features has shape \(40, 5\) and labels \(39,\); the first number"),
        (lambda x, y: affinity.h_score(x, y * 1.0), r"h_score: labels has dtype float64; integers are needed"),
        (lambda x, y: affinity.h_score(x, y.astype(str)), r"h_score: labels has dtype <U\d+; integers are needed"),
        (lambda x, y: affinity.transrate(x[0], y), r"transrate: features has shape \(5,\); it must be \[N, H\]"),
        (lambda x, y: affinity.knn(x, y, k=40), r"knn: k is 40 and there are 40 rows"),
        (lambda x, y: affinity.linear_probe(x[:2], y[:2]), r"linear_probe: 2 rows; at least 3 are needed"),
        (lambda x, y: affinity.logme(x * np.inf, y), r"logme: row 0 of features has a number that is not finite"),
        (lambda x, y: affinity.logme(x, y / 0.0), r"logme: row 0 has a label that is not finite"),
        (lambda x, y: affinity.logme([["a"]], [0]), r"logme: features is not an array of numbers"),
        (lambda x, y: affinity.leep(x, y), r"leep: row 0 of probabilities is not a distribution"),
        (lambda x, y: affinity.nce(y[:-1], y), r"nce: source_labels has shape \(39,\) and labels \(40,\)"),
        (lambda x, y: affinity.nce(y, y * 0), r"nce: all rows have label 0; two classes are needed"),
        (
            lambda x, y: affinity.n_leep(x, y, components=41),
            r"n_leep: components is 41; it must be from 1 to the number of rows, 40",
        ),
        (lambda x, y: affinity.n_leep(x, y, variance=0), r"n_leep: variance is 0; it must be above 0"),
        (lambda x, y: affinity.esm(x, x[:-1], x, y), r"esm: source_base_features has shape \(40, 5\) and source_features"),
        (lambda x, y: affinity.esm(x, x, x[:, 1:], y), r"esm: source_base_features and base_features have 5 and 4 dimensions"),
        (lambda x, y: affinity.esm(x, x, x, y * 0), r"esm: all 40 rows have label 0"),
        (lambda x, y: affinity.esm(x, x, x, y, ridge=0), r"esm: ridge is 0; it must be above 0"),
        (
            lambda x, y: affinity.text_similarity(x, x[:, 1:]),
            r"text_similarity: source_texts and texts have 5 and 4 dimensions",
        ),
        (lambda x, y: affinity.vocabulary_overlap([[]], [[1]]), r"vocabulary_overlap: source_tokens has no token"),
        (lambda x, y: affinity.vocabulary_overlap([[1]], [[-1]]), r"vocabulary_overlap: tokens must be integers of at least 0"),
        (lambda x, y: affinity.task_embedding({}), r"task_embedding: the tree has no array"),
        (
            lambda x, y: affinity.task_embedding({"a": -x}),
            r"task_embedding: \['a'\] has a number that is negative or not finite",
        ),
        (lambda x, y: affinity.task_similarity([1], [1, 2]), r"task_similarity: embeddings have shapes \(1,\) and \(2,\)"),
        (lambda x, y: affinity.task_similarity([1], [-1]), r"task_similarity: embedding has a number that is negative"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with np.errstate(all="ignore"), pytest.raises(UserError, match=message) as caught:
        call(*rows(0))
    assert "\n" not in str(caught.value)


def test_an_estimator_of_ones_own_is_an_entry_beside_ours():
    try:

        @affinity.register("largest")
        def largest(features, labels, power=2):
            return float((features**power).max())

        assert affinity.ESTIMATORS.find("largest") is largest
        with pytest.raises(UserError, match="the name 'logme' is taken by mtl_jax's own affinity estimator"):
            affinity.register("logme")(largest)
        with pytest.raises(
            UserError, match=r"affinity estimator 'other': no estimator can read 'feature'; its parameters must"
        ):
            affinity.register("other")(lambda feature: 0.0)
        with pytest.raises(UserError, match="'none': it reads nothing"):
            affinity.register("none")(lambda: 0.0)
        with pytest.raises(UserError, match=r"unknown estimators 'logm' \(did you mean 'logme'\?\)"):
            affinity.ESTIMATORS.find("logm", "estimators")
    finally:
        affinity.ESTIMATORS._functions.pop("largest", None)


ONE_CLASS = (np.zeros((12, 3)) + np.arange(12)[:, None], np.zeros(12, np.int64))
SIGNALS = np.array([[0.5, 2.0, 3.0, 1.0], [-0.1, 1.0, 2.0, 0.5]])


@pytest.mark.parametrize(
    ("estimator", "inputs", "message"),
    [
        *(
            (name, ONE_CLASS, "two classes are needed")
            for name in ("logme", "h_score", "transrate", "linear_probe", "knn", "n_leep")
        ),
        ("leep", (np.full((12, 2), 0.5), ONE_CLASS[1]), "leep: all 12 rows have label 0; two classes are needed"),
        ("linear_probe", (np.eye(2), np.array([0, 1])), "linear_probe: 2 rows; at least 3 are needed to leave one out"),
        (
            "knn",
            (np.eye(4), np.array([0, 1, 0, 1])),
            "knn: k is 5 and there are 4 rows; k must be from 1 to one less than the rows",
        ),
        ("leep", (np.ones((3, 0)), np.array([0, 1, 0])), "leep: probabilities has shape"),
        ("tag", (SIGNALS[:, :3],), "tag: signals must have the columns cosine, two norms, and a loss above 0"),
        ("gradient_cosine", (np.zeros((0, 4)),), r"gradient_cosine: signals has shape \(0, 4\)"),
    ],
)
def test_what_cannot_be_estimated_is_one_line(estimator, inputs, message):
    with pytest.raises(UserError, match=message) as caught:
        affinity.ESTIMATORS[estimator](*inputs)
    assert "\n" not in str(caught.value)


def test_signals_of_a_run():
    """Only steps in which both have examples, finite and with a loss; no rule that compares gradients: none."""

    def record(tasks, cosine, loss=1.0):
        norms = {f"gradient_norm/{task}": float(place + 1) for place, task in enumerate(tasks)}
        losses = {f"loss/{task}": loss for task in tasks}
        return {"kind": "train", "cosines": [[cosine] * len(tasks)] * len(tasks), **norms, **losses, "gradient_norm": 9.0}

    records = [
        record("ab", 0.5),
        record("a", 1.0),
        record("ab", 0.1, 2.0),
        record("ab", np.nan),
        {"kind": "train", "loss/a": 1.0},
    ]
    signals = affinity.step_signals(records)
    assert set(signals) == {("a", "b"), ("b", "a")}
    assert signals["a", "b"].tolist() == [[0.5, 1, 2, 1], [0.1, 1, 2, 2]]
    assert affinity.gradient_cosine(signals["a", "b"]) == pytest.approx(0.3)
    assert affinity.tag(signals["b", "a"]) == pytest.approx((0.5 * 2 + 0.1 * 2 / 2) / 2)
    assert affinity.step_signals(records[-1:]) == {}
