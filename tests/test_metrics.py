"""The numbers: metrics, intervals, tests, thresholds, retrieval and the modality gap, against
scikit-learn and plain definitions."""

import math
import time
import warnings

import numpy as np
import pytest

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


@pytest.mark.parametrize("seed", range(5))
def test_every_metric_equals_scikit_learn_with_ties_unknown_labels_and_one_class_columns(
    seed,
):
    scores, labels, _ = cases(seed)
    thresholds = np.array([0.4, 0.0, 0.0, 0.4, 0.0, 1.0, -9.0])
    ours, theirs = (
        metrics.per_class(scores, labels, thresholds),
        by_scikit_learn(scores, labels, thresholds),
    )
    for key in metrics.METRICS:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-12, err_msg=key)
    np.testing.assert_array_equal(metrics.auroc(scores, labels), ours["auroc"])


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
            np.testing.assert_allclose(
                samples[key][i], expected[key], rtol=0, atol=1e-12, err_msg=key
            )


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
    scores = (
        labels + np.repeat(rng.normal(size=(150, 1)), 4, axis=0) + 0.3 * rng.normal(size=(600, 1))
    )
    widths = [
        np.diff(
            metrics.interval(metrics.bootstrap(scores, labels, g, [0.0])["auroc"]), axis=0
        ).item()
        for g in (patients, np.arange(600))
    ]
    assert widths[0] > 1.6 * widths[1]


@pytest.mark.parametrize("seed", range(20))
def test_the_rank_formula_and_the_bootstraps_histogram_are_equal_to_the_last_bit(seed):
    scores, labels, _ = cases(seed)
    np.testing.assert_array_equal(
        metrics.auroc(scores, labels), metrics.per_class(scores, labels, np.zeros(7))["auroc"]
    )


def test_the_roc_curve_is_scikit_learns():
    sk = pytest.importorskip("sklearn.metrics")
    scores, labels, _ = cases(3)
    known = ~np.isnan(labels[:, 0])
    expected = sk.roc_curve(labels[known, 0], scores[known, 0], drop_intermediate=False)[:2]
    np.testing.assert_allclose(metrics.roc_curve(scores[:, 0], labels[:, 0]), expected, atol=1e-12)


def test_an_interval_ignores_resamples_where_the_metric_is_undefined():
    samples = np.r_[np.linspace(0, 1, 101), [np.nan] * 50][:, None] * [1.0, np.nan]
    np.testing.assert_allclose(metrics.interval(samples), [[0.025, np.nan], [0.975, np.nan]])


@pytest.mark.parametrize(
    "scores, labels, why",
    [
        (np.zeros((3, 2)), np.zeros((3, 1)), "same shape"),
        (np.full((3, 1), np.nan), np.zeros((3, 1)), "NaN"),
        (np.zeros((3, 1)), np.full((3, 1), 2.0), "0, 1"),
    ],
)
def test_metrics_refuse_what_they_cannot_score(scores, labels, why):
    with pytest.raises(ValueError, match=why):
        metrics.per_class(scores, labels, np.zeros(scores.shape[1]))


def naive_delong(a, b, y):
    """DeLong, DeLong and Clarke-Pearson 1988, equations 4 to 6, by the pairs."""

    def kernel(s):
        above, below = s[y == 1][:, None], s[y == 0]
        return (above > below) + 0.5 * (above == below)

    k = [kernel(a), kernel(b)]
    s10, s01 = np.cov([x.mean(1) for x in k]), np.cov([x.mean(0) for x in k])
    s = s10 / (y == 1).sum() + s01 / (y == 0).sum()
    z = (k[0].mean() - k[1].mean()) / math.sqrt(s[0, 0] + s[1, 1] - 2 * s[0, 1])
    return math.erfc(abs(z) / math.sqrt(2))


def test_delong_equals_its_published_equations_and_agrees_with_a_bootstrap():
    rng = np.random.default_rng(3)
    y = (rng.random(400) < 0.3).astype(float)
    a, b = np.round(rng.normal(size=400) + y, 1), np.round(rng.normal(size=400) + 0.7 * y, 1)
    p = metrics.delong(a, b, y)
    assert p == pytest.approx(naive_delong(a, b, y), abs=1e-12) and p == pytest.approx(
        metrics.delong(b, a, y)
    )
    pair = np.stack([a, b], 1)
    samples = metrics.bootstrap(pair, np.stack([y, y], 1), np.arange(400), [0.0, 0.0], n=4000)[
        "auroc"
    ]
    difference = samples[:, 0] - samples[:, 1]
    z = np.subtract(*metrics.auroc(pair, np.stack([y, y], 1))) / difference.std()
    assert p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), rel=0.15)
    assert metrics.delong(a, b, y, groups=np.arange(400)) == pytest.approx(
        p, rel=0.1
    )  # one case a patient: the same test
    twice = np.repeat(np.arange(400), 2)
    assert metrics.delong(a[twice], b[twice], y[twice], groups=twice) == pytest.approx(
        metrics.delong(a, b, y, groups=np.arange(400))
    )
    assert metrics.delong(a, 2 * a, y) == 1 and math.isnan(metrics.delong(a, b, np.zeros(400)))


def test_top_k_counts_what_is_found_and_ties_count_against():
    scores = np.array([[0.9, 0.8, 0.1], [0.5, 0.5, 0.1], [0.9, 0.8, 0.7]])
    labels = np.array([[1, 0, 1], [1, 0, 0], [0, np.nan, 0]])
    # At 1: one of two, then a tie not in the first place; the third has no abnormality.
    assert metrics.top_k(scores, labels, 1) == pytest.approx((0.25, 1 / 3))
    assert metrics.top_k(scores, labels, 2) == pytest.approx((0.75, (0.5 + 0.5 + 0) / 3))


def test_the_best_threshold_maximises_recall_plus_specificity():
    scores, labels, _ = cases(2)
    thresholds = metrics.best_thresholds(scores, labels)
    best = metrics.per_class(scores, labels, np.nan_to_num(thresholds))
    for cut in np.unique(scores[:, 0]):
        other = metrics.per_class(scores, labels, np.full(7, cut))
        assert (
            other["recall"][0] + other["specificity"][0]
            <= best["recall"][0] + best["specificity"][0] + 1e-12
        )
    assert np.isnan(thresholds[[1, 2, 4]]).all()


def test_a_split_half_threshold_never_depends_on_the_patient_that_it_judges():
    scores, labels, patients = cases(4, n=90, c=5)
    thresholds = metrics.split_half_thresholds(scores, labels, patients)
    for patient in np.unique(patients)[:8]:
        mine = patients == patient
        changed = scores.copy()
        changed[mine] += 100
        np.testing.assert_array_equal(
            metrics.split_half_thresholds(changed, labels, patients)[mine], thresholds[mine]
        )
    assert np.isnan(
        metrics.per_class(scores, labels, thresholds)["f1"][1]
    )  # no positive: no threshold, said as such


def test_retrieval_of_a_perfect_and_of_a_blind_model():
    rng = np.random.default_rng(0)
    v = rng.normal(size=(300, 16))
    reports = np.arange(300) // 2  # two reconstructions a report
    t = v[reports * 2]
    perfect = metrics.retrieval(v + 0.01 * rng.normal(size=v.shape), t, reports)
    assert (
        perfect["volume_to_report"]["recall@1"] > 0.45
        and perfect["report_to_volume"]["recall@1"] == 1
    )
    assert perfect["volume_to_report"]["candidates"] == 150
    blind = metrics.retrieval(np.ones((300, 4)), np.ones((300, 4)), reports)
    assert blind["volume_to_report"]["recall@100"] == 0  # all tied: no credit
    chance = metrics.retrieval(v, rng.normal(size=v.shape))
    assert (
        chance["volume_to_report"]["recall@10"] == pytest.approx(10 / 300, abs=0.03)
        and 110 < chance["report_to_volume"]["median_rank"] < 190
    )


def test_map_at_k_equals_its_definition_and_never_counts_the_same_patient():
    rng = np.random.default_rng(1)
    v, labels, patients = (
        rng.normal(size=(40, 8)),
        (rng.random((40, 4)) < 0.3).astype(float),
        np.arange(40) // 2,
    )
    unit = v / np.linalg.norm(v, axis=1, keepdims=True)
    expected = []
    for i in range(40):
        others = [j for j in np.argsort(-(unit @ unit[i])) if patients[j] != patients[i]]
        right = np.array([(labels[j] * labels[i]).any() for j in others])
        if right.any():
            precision = right.cumsum() / np.arange(1, len(right) + 1)
            expected.append((precision * right)[:5].sum() / min(5, right.sum()))
    assert metrics.map_at_k(v, labels, patients, ks=(5,))["map@5"] == pytest.approx(
        np.mean(expected), abs=1e-6
    )


def test_the_modality_gap_is_full_for_apart_clusters_and_none_for_one_cloud():
    rng = np.random.default_rng(0)
    cloud, other = rng.normal(size=(2, 400, 16))
    apart = metrics.modality_gap(cloud + 4, other - 4)
    assert (
        apart["linear_separability"] == 1
        and apart["centroid_distance"] > 1.5
        and apart["cosine_pairs"] < -0.5
    )
    same = metrics.modality_gap(cloud, cloud)
    assert (
        same["linear_separability"] == 0.5
        and same["centroid_distance"] < 1e-9
        and same["cosine_pairs"] == pytest.approx(1)
    )
    assert same["cosine_nonpairs"] == pytest.approx(0, abs=0.01)
    assert metrics.modality_gap(cloud, other)["linear_separability"] == pytest.approx(0.5, abs=0.08)


def test_the_projection_shows_the_gap_on_its_first_axis():
    rng = np.random.default_rng(0)
    a, b = metrics.project(rng.normal(size=(50, 16)) + 2, rng.normal(size=(50, 16)) - 2)
    assert a.shape == (50, 2) and (a[:, 0].min() > b[:, 0].max() or a[:, 0].max() < b[:, 0].min())


def test_a_thousand_resamples_of_the_ct_rate_validation_set_take_less_than_a_second_of_two_cores():
    rng = np.random.default_rng(0)
    patients = np.r_[np.arange(1304), rng.integers(1304, size=3039 - 1304)]
    labels = (rng.random((3039, 18)) < 0.2).astype(float)
    times = []
    for _ in range(3):
        start = time.process_time()
        metrics.bootstrap(rng.normal(size=labels.shape) + labels, labels, patients, np.zeros(18))
        times.append(time.process_time() - start)
    assert min(times) < 2.0  # CPU seconds, which a busy machine doesn't stretch
