"""The numbers: metrics, intervals, tests, thresholds, retrieval and the modality gap, against
scikit-learn and plain definitions."""
import math
import time
import warnings

import numpy as np
import pytest
import torch

import metrics


def cases(seed=0, n=120, c=7):
    """Random scores with many ties, labels with unknowns.

    Column 1 has no positive, 2 no negative, 3 a constant score, 4 no label.
    """
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, c)) < 0.3).astype(float)
    scores = np.round(rng.normal(size=(n, c)) + labels, 1)
    labels[rng.random((n, c)) < 0.1] = np.nan
    labels[:, 1] *= 0
    labels[:, 2] = labels[:, 2] * 0 + 1
    scores[:, 3] = 0.4
    labels[:, 4] = np.nan
    return scores, labels, rng.integers(n // 3, size=n)


def by_scikit_learn(scores, labels, thresholds):
    sk = pytest.importorskip("sklearn.metrics")
    out = {key: np.full(scores.shape[1], np.nan) for key in metrics.METRICS}
    for c in range(scores.shape[1]):
        known = ~np.isnan(labels[:, c])
        if not known.any():
            continue
        y, s = labels[known, c].astype(int), scores[known, c]
        predicted = (s > thresholds[c]).astype(int)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out["auroc"][c] = sk.roc_auc_score(y, s) if 0 < y.sum() < len(y) else np.nan
            out["auprc"][c] = sk.average_precision_score(y, s)
            out["f1"][c] = sk.f1_score(y, predicted, zero_division=0)
            out["f1_weighted"][c] = sk.f1_score(y, predicted, average="weighted", zero_division=0)
            out["accuracy"][c] = sk.accuracy_score(y, predicted)
            out["precision"][c] = sk.precision_score(y, predicted, zero_division=0)
            out["recall"][c] = sk.recall_score(y, predicted, zero_division=0)
            out["specificity"][c] = sk.recall_score(y, predicted, pos_label=0, zero_division=0)
    return out


# ---- one number a class

@pytest.mark.parametrize("seed", range(5))
def test_every_metric_equals_scikit_learn_with_ties_unknown_labels_and_one_class_columns(seed):
    scores, labels, _ = cases(seed)
    thresholds = np.array([0.4, 0.0, 0.0, 0.4, 0.0, 1.0, -9.0])
    values = metrics.per_class(scores, labels, thresholds)
    expected = by_scikit_learn(scores, labels, thresholds)
    assert tuple(values) == metrics.METRICS
    for key in metrics.METRICS:
        np.testing.assert_allclose(values[key], expected[key], rtol=0, atol=1e-12, err_msg=key)
    np.testing.assert_array_equal(metrics.auroc(scores, labels), values["auroc"])


def test_auroc_is_the_share_of_pairs_in_the_right_order_with_ties_as_half():
    scores, labels, _ = cases(1)
    s, y = scores[:, 0], labels[:, 0]
    above, below = s[y == 1][:, None], s[y == 0]
    pairs = (above > below) + 0.5 * (above == below)
    assert metrics.auroc(scores, labels)[0] == pytest.approx(pairs.mean(), abs=1e-14)


@pytest.mark.parametrize("scores, labels, why", [
    (np.zeros((3, 2)), np.zeros((3, 1)), "same shape"),
    (np.full((3, 1), np.nan), np.zeros((3, 1)), "NaN"),
    (np.zeros((3, 1)), np.full((3, 1), 2.0), "0, 1"),
])
def test_metrics_refuse_what_they_cannot_score(scores, labels, why):
    with pytest.raises(ValueError, match=why):
        metrics.per_class(scores, labels, np.zeros(scores.shape[1]))
    with pytest.raises(ValueError, match=why):
        metrics.bootstrap(scores, labels, np.arange(3), np.zeros(scores.shape[1]))


def test_the_roc_curve_is_scikit_learns_before_any_point_is_dropped():
    sk = pytest.importorskip("sklearn.metrics")
    scores, labels, _ = cases(3)
    for c in (0, 3, 5):  # column 3 is one step
        known = ~np.isnan(labels[:, c])
        expected = sk.roc_curve(labels[known, c], scores[known, c], drop_intermediate=False)
        x, y = metrics.roc_curve(scores[:, c], labels[:, c])
        np.testing.assert_allclose((x, y), expected[:2], rtol=0, atol=1e-15)
        assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)


def test_top_k_counts_what_is_right_and_ties_count_against():
    scores = np.array([[0.9, 0.8, 0.1], [0.5, 0.5, 0.1], [0.9, 0.8, 0.7]])
    labels = np.array([[1, 0, 1], [1, 0, 0], [0, np.nan, 0]])
    # At 1: one of two, then a tie that isn't in the first place; the third has no abnormality.
    assert metrics.top_k(scores, labels, 1) == pytest.approx((0.25, 1 / 3))
    assert metrics.top_k(scores, labels, 2) == pytest.approx((0.75, (0.5 + 0.5 + 0) / 3))


def test_top_k_leaves_out_scans_without_a_label_and_is_nan_where_none_is_left():
    scores, labels = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[1, 0], [np.nan, np.nan]])
    assert metrics.top_k(scores, labels, 1) == (1, 1)
    assert np.isnan(metrics.top_k(scores, labels * np.nan, 1)).all()


# ---- intervals

@pytest.mark.parametrize("seed", range(20))
def test_the_bootstraps_weighted_sums_equal_the_plain_metrics_to_the_last_bit(seed):
    scores, labels, _ = cases(seed)
    if seed % 2:
        scores += np.random.default_rng(seed).normal(size=scores.shape)  # without ties
    thresholds = np.array([0.4, 0.0, 0.0, 0.4, 0.0, np.nan, -9.0])
    plain = metrics.per_class(scores, labels, thresholds)
    weighted = metrics._weighted(scores, labels, thresholds, torch.ones(len(scores), 1))
    for key in metrics.METRICS:
        np.testing.assert_array_equal(weighted[key][0], plain[key], err_msg=key)


@pytest.mark.parametrize("seed", range(2))
def test_each_bootstrap_sample_equals_the_metrics_of_its_resampled_rows(seed):
    scores, labels, patients = cases(seed)
    names = np.unique(patients)
    thresholds = np.full(7, 0.3)
    samples = metrics.bootstrap(scores, labels, patients, thresholds, n=20, seed=seed)
    drawn = np.random.default_rng(seed).integers(len(names), size=(20, len(names)))
    for i, resample in enumerate(drawn):
        rows = np.concatenate([np.flatnonzero(patients == names[p]) for p in resample])
        expected = by_scikit_learn(scores[rows], labels[rows], thresholds)
        for key in metrics.METRICS:
            sample = samples[key][i]
            np.testing.assert_allclose(sample, expected[key], rtol=0, atol=1e-12, err_msg=key)


def test_shuffling_the_rows_changes_no_metric_and_no_interval():
    scores, labels, patients = cases()
    groups = np.array([f"patient_{p}" for p in patients])
    order = np.random.default_rng(1).permutation(len(scores))
    one = metrics.bootstrap(scores, labels, groups, np.zeros(7), n=50)
    two = metrics.bootstrap(scores[order], labels[order], groups[order], np.zeros(7), n=50)
    for key in metrics.METRICS:
        np.testing.assert_allclose(one[key], two[key], rtol=0, atol=1e-12)


def test_the_interval_of_a_patient_bootstrap_is_wider_than_that_of_volumes_taken_as_independent():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(150), 4)
    labels = np.repeat(rng.random((150, 1)) < 0.4, 4, axis=0).astype(float)
    of_patients = np.repeat(rng.normal(size=(150, 1)), 4, axis=0)
    scores = labels + of_patients + 0.3 * rng.normal(size=(600, 1))
    widths = []
    for groups in (patients, np.arange(600)):
        samples = metrics.bootstrap(scores, labels, groups, [0.0])["auroc"]
        widths.append(np.diff(metrics.interval(samples), axis=0).item())
    assert widths[0] > 1.6 * widths[1]


def test_an_interval_ignores_resamples_where_the_metric_is_undefined():
    samples = np.r_[np.linspace(0, 1, 101), [np.nan] * 50][:, None] * [1.0, np.nan]
    np.testing.assert_allclose(metrics.interval(samples), [[0.025, np.nan], [0.975, np.nan]])


def test_a_thousand_resamples_of_the_ct_rate_validation_set_take_less_than_a_second_of_two_cores():
    rng = np.random.default_rng(0)
    patients = np.r_[np.arange(1304), rng.integers(1304, size=3039 - 1304)]
    labels = (rng.random((3039, 18)) < 0.2).astype(float)
    times = []
    for _ in range(3):
        scores = rng.normal(size=labels.shape) + labels
        start = time.process_time()
        metrics.bootstrap(scores, labels, patients, np.zeros(18))
        times.append(time.process_time() - start)
    assert min(times) < 2.0  # CPU seconds, which a busy machine doesn't stretch


# ---- two models

def naive_delong(a, b, y):
    """DeLong, DeLong and Clarke-Pearson 1988, equations 4 to 6, by the pairs."""
    kernels = []
    for s in (a, b):
        above, below = s[y == 1][:, None], s[y == 0]
        kernels.append((above > below) + 0.5 * (above == below))
    s10 = np.cov([kernel.mean(1) for kernel in kernels])
    s01 = np.cov([kernel.mean(0) for kernel in kernels])
    s = s10 / (y == 1).sum() + s01 / (y == 0).sum()
    difference = kernels[0].mean() - kernels[1].mean()
    z = difference / math.sqrt(s[0, 0] + s[1, 1] - 2 * s[0, 1])
    return math.erfc(abs(z) / math.sqrt(2))


def two_models():
    rng = np.random.default_rng(3)
    y = (rng.random(400) < 0.3).astype(float)
    a = np.round(rng.normal(size=400) + y, 1)
    b = np.round(rng.normal(size=400) + 0.7 * y, 1)
    return a, b, y


def test_delong_equals_its_published_equations():
    a, b, y = two_models()
    p = metrics.delong(a, b, y)
    assert p == pytest.approx(naive_delong(a, b, y), abs=1e-12)
    assert p == pytest.approx(metrics.delong(b, a, y))
    assert metrics.delong(a, 2 * a, y) == 1
    assert math.isnan(metrics.delong(a, b, np.zeros(400)))


def test_delong_agrees_with_a_bootstrap():
    a, b, y = two_models()
    scores, labels = np.stack([a, b], 1), np.stack([y, y], 1)
    samples = metrics.bootstrap(scores, labels, np.arange(400), [0.0, 0.0], n=4000)["auroc"]
    spread = (samples[:, 0] - samples[:, 1]).std()
    z = np.subtract(*metrics.auroc(scores, labels)) / spread
    p = math.erfc(abs(z) / math.sqrt(2))
    assert metrics.delong(a, b, y) == pytest.approx(p, rel=0.15)


def test_delong_over_patients_is_not_fooled_by_cases_that_are_there_twice():
    a, b, y = two_models()
    once = metrics.delong(a, b, y, groups=np.arange(400))
    assert once == pytest.approx(metrics.delong(a, b, y), rel=0.1)  # one case a patient
    twice = np.repeat(np.arange(400), 2)
    assert metrics.delong(a[twice], b[twice], y[twice], groups=twice) == pytest.approx(once)


# ---- thresholds

def test_the_best_threshold_maximises_recall_plus_specificity():
    scores, labels, _ = cases(2)
    thresholds = metrics.best_thresholds(scores, labels)
    best = metrics.per_class(scores, labels, np.nan_to_num(thresholds))
    best = best["recall"][0] + best["specificity"][0]
    for cut in np.unique(scores[:, 0]):
        other = metrics.per_class(scores, labels, np.full(7, cut))
        assert other["recall"][0] + other["specificity"][0] <= best + 1e-12
    assert np.isnan(thresholds[[1, 2, 4]]).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_authors_threshold_is_the_point_of_scikit_learns_curve_nearest_to_the_corner(seed):
    curves = pytest.importorskip("sklearn.metrics")
    scores, labels, _ = cases(seed)
    thresholds = metrics.nearest_thresholds(scores, labels)
    found = metrics.per_class(scores, labels, np.nan_to_num(thresholds))
    for c in range(7):
        known = ~np.isnan(labels[:, c])
        if len(np.unique(labels[known, c])) < 2:
            assert np.isnan(thresholds[c])
            continue
        fpr, tpr, cuts = curves.roc_curve(
            labels[known, c], scores[known, c], drop_intermediate=False)
        best = np.argmin(fpr**2 + (1 - tpr)**2)
        assert found["recall"][c] == pytest.approx(tpr[best])
        assert found["specificity"][c] == pytest.approx(1 - fpr[best])


def test_a_split_half_threshold_never_depends_on_the_patient_that_it_judges():
    scores, labels, patients = cases(4, n=90, c=5)
    thresholds = metrics.split_half_thresholds(scores, labels, patients)
    for patient in np.unique(patients)[:8]:
        judged = patients == patient
        changed = scores.copy()
        changed[judged] += 100
        again = metrics.split_half_thresholds(changed, labels, patients)
        np.testing.assert_array_equal(again[judged], thresholds[judged])
    f1 = metrics.per_class(scores, labels, thresholds)["f1"]
    assert np.isnan(f1[1])  # no positive: no threshold, and that is said


# ---- retrieval and the modality gap

def test_retrieval_of_a_perfect_and_of_a_blind_model():
    rng = np.random.default_rng(0)
    v = rng.normal(size=(300, 16))
    reports = np.arange(300) // 2  # two reconstructions a report
    t = v[reports * 2]
    perfect = metrics.retrieval(v + 0.01 * rng.normal(size=v.shape), t, reports)
    assert perfect["volume_to_report"]["recall@1"] > 0.45
    assert perfect["report_to_volume"]["recall@1"] == 1
    assert perfect["volume_to_report"]["candidates"] == 150
    assert perfect["report_to_volume"]["candidates"] == 300
    blind = metrics.retrieval(np.ones((300, 4)), np.ones((300, 4)), reports)
    assert blind["volume_to_report"]["recall@100"] == 0  # all tied: no credit
    chance = metrics.retrieval(v, rng.normal(size=v.shape))
    assert chance["volume_to_report"]["recall@10"] == pytest.approx(10 / 300, abs=0.03)
    assert 110 < chance["report_to_volume"]["median_rank"] < 190


def test_map_at_k_equals_its_definition_and_never_counts_the_same_patient():
    rng = np.random.default_rng(1)
    v = rng.normal(size=(40, 8))
    labels = (rng.random((40, 4)) < 0.3).astype(float)
    patients = np.arange(40) // 2
    unit = v / np.linalg.norm(v, axis=1, keepdims=True)
    expected = []
    for i in range(40):
        nearest = np.argsort(-(unit @ unit[i]))
        others = nearest[patients[nearest] != patients[i]]
        right = (labels[others] * labels[i]).any(1)
        if right.any():
            precision = right.cumsum() / np.arange(1, len(right) + 1)
            expected.append((precision * right)[:5].sum() / min(5, right.sum()))
    value = metrics.map_at_k(v, labels, patients, ks=(5,))["map@5"]
    assert value == pytest.approx(np.mean(expected), abs=1e-6)


def test_the_modality_gap_is_full_for_apart_clusters_and_none_for_one_cloud():
    rng = np.random.default_rng(0)
    cloud, other = rng.normal(size=(2, 400, 16))
    apart = metrics.modality_gap(cloud + 4, other - 4)
    assert apart["linear_separability"] == 1
    assert apart["centroid_distance"] > 1.5
    assert apart["cosine_pairs"] < -0.5
    same = metrics.modality_gap(cloud, cloud)
    assert same["linear_separability"] == 0.5
    assert same["centroid_distance"] < 1e-9
    assert same["cosine_pairs"] == pytest.approx(1)
    assert same["cosine_nonpairs"] == pytest.approx(0, abs=0.01)
    assert metrics.modality_gap(cloud, other)["linear_separability"] == pytest.approx(0.5, abs=0.08)


def test_the_projection_shows_the_gap_on_its_first_axis():
    rng = np.random.default_rng(0)
    a, b = metrics.project(rng.normal(size=(50, 16)) + 2, rng.normal(size=(50, 16)) - 2)
    assert a.shape == (50, 2)
    assert a[:, 0].min() > b[:, 0].max() or a[:, 0].max() < b[:, 0].min()
