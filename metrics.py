"""Scores and labels to numbers: AUROC and its kin with intervals over patients, tests, thresholds,
retrieval, the modality gap. Arrays in, numbers out.

    AUROC = share of the pairs (a positive case, a negative case) in which the positive has the
            higher score; equal scores count half

Scores (N, C) are numbers, labels (N, C) are 1, 0, or NaN where unknown, of N cases and C classes.
No other file of the project is needed.

Example:

    import numpy, metrics
    labels = numpy.array([[0, 1], [1, numpy.nan], [0, 0], [1, 1]])
    scores = numpy.array([[.1, .9], [.4, .2], [.5, .3], [.8, .7]])
    patients, thresholds = ["a", "a", "b", "c"], [.45, .5]
    samples = metrics.bootstrap(scores, labels, patients, thresholds, n=200)
    low, high = metrics.interval(samples["auroc"])
    assert metrics.auroc(scores, labels).tolist() == [0.75, 1.0] and low[0] <= 0.75 <= high[0]
"""
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

METRICS = (
    "auroc", "auprc", "f1", "f1_weighted", "accuracy", "precision", "recall", "specificity",
)


# ---- 1. The metrics of each class, plainly -------------------------------------------------------

def auroc(scores, labels):
    """Area under the ROC curve of each class: (N, C) -> (C,); NaN without both kinds of case."""
    return _by_class(_auroc, *_checked(scores, labels))


def _by_class(function, *arrays):
    """A function's values of the columns of arrays (N, C), one after another: (..., C)."""
    return np.stack(list(map(function, *map(np.transpose, arrays))), axis=-1)


def _auroc(scores, labels):
    """The Mann-Whitney statistic: each positive's rank among the negatives, summed, over pairs."""
    positives, negatives = scores[labels == 1], scores[labels == 0]
    pairs = len(positives) * len(negatives)
    return _ranks_among(negatives, positives).sum() / pairs if pairs else np.nan


def _ranks_among(others, scores):
    """How many of the others lie below each score; equal ones count half."""
    others = np.sort(others)
    below = np.searchsorted(others, scores, "left")
    not_above = np.searchsorted(others, scores, "right")
    return (below + not_above) / 2


def per_class(scores, labels, thresholds):
    """Every metric of each class, as scikit-learn defines it: dict of METRICS, each (C,).

    thresholds (C,), (N, C) or a number: a case is predicted positive if score > threshold. A ratio
    is 0 where its denominator is. Unknown labels are left out; a class without any label is NaN
    throughout, one with a NaN threshold where a threshold matters. Raises ValueError for shapes
    that differ, NaN scores and labels other than 0, 1, NaN.
    """
    scores, labels = _checked(scores, labels)
    return {
        "auroc": _by_class(_auroc, scores, labels),
        "auprc": _by_class(_average_precision, scores, labels),
        **_counted(scores, labels, thresholds, lambda cases: cases.sum(0, dtype=np.float64)),
    }


def _average_precision(scores, labels):
    """Mean over the positives of the precision if every case from their score on is predicted."""
    positives, negatives = scores[labels == 1], scores[labels == 0]
    if not len(positives):
        return 0.0 if len(negatives) else np.nan
    levels, count = np.unique(positives, return_counts=True)
    tp, fp = _at_or_above(levels, positives), _at_or_above(levels, negatives)
    # torch's sum, as in section 2, so that both give the same last digit
    return torch.from_numpy(count * tp / (tp + fp)).sum().item() / len(positives)


def _at_or_above(levels, scores):
    """How many of the scores are at each level or above it."""
    return len(scores) - np.searchsorted(np.sort(scores), levels)


def _counted(scores, labels, thresholds, count):
    """The metrics that count cases; count: cases (N, C), bool -> their number, float (..., C)."""
    thresholds = np.broadcast_to(np.asarray(thresholds, np.float64), scores.shape)
    positive, negative, predicted = labels == 1, labels == 0, scores > thresholds
    positives, negatives = count(positive), count(negative)
    tp, fp = count(positive & predicted), count(negative & predicted)
    tn, wrong, known = negatives - fp, positives - tp + fp, positives + negatives
    f1 = _ratio(2 * tp, 2 * tp + wrong)
    f1_of_negatives = _ratio(2 * tn, 2 * tn + wrong)
    out = {
        "f1": f1,
        "f1_weighted": _ratio(positives * f1 + negatives * f1_of_negatives, known),
        "accuracy": _ratio(tp + tn, known),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, positives),
        "specificity": _ratio(tn, negatives),
    }
    undefined = np.isnan(thresholds).any(0) | (known == 0)
    return {key: np.where(undefined, np.nan, value) for key, value in out.items()}


def _ratio(numerator, denominator):
    return numerator / np.maximum(denominator, 1)  # counts: where this is 0, so is the other


def _checked(scores, labels):
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} must have the same "
                         "shape (N, C)")
    if np.isnan(scores).any() or not (np.isnan(labels) | (labels == 0) | (labels == 1)).all():
        raise ValueError("scores must not be NaN; labels must be 0, 1 or NaN for unknown")
    return scores, labels


def roc_curve(scores, labels):
    """(false positive rate, recall) of one class's scores, labels (N,) at every distinct threshold.

    From (0, 0) to (1, 1); equal scores are one step.
    """
    positives, negatives = scores[labels == 1], scores[labels == 0]
    levels = np.unique(np.append(positives, negatives))[::-1]
    false_positive_rate = _at_or_above(levels, negatives) / len(negatives)
    recall = _at_or_above(levels, positives) / len(positives)
    return np.append(0, false_positive_rate), np.append(0, recall)


def top_k(scores, labels, k):
    """Strict (recall, precision) at k of a scan, averaged over scans; ties count against.

    Recall: the share of a scan's abnormalities among its k highest classes. Precision: the share of
    these k that it has. Classes with a known label are ranked within each row of scores (N, C). A
    scan without any is left out, of recall also one without an abnormality.
    """
    scores, labels = _checked(scores, labels)
    known, present = ~np.isnan(labels), labels == 1
    scores = np.where(known, scores, -np.inf)
    rank = (scores[:, None, :] >= scores[:, :, None]).sum(-1)  # 1 = best; ties share the worst
    hits = (present & (rank <= k)).sum(1)
    affected = present.any(1)
    recall = hits[affected] / present[affected].sum(1)
    precision = hits[known.any(1)] / k
    return _mean(recall), _mean(precision)


def _mean(values):
    return float(values.mean()) if len(values) else math.nan


def nanmean(values):
    """Mean along the last axis without NaN; NaN where all are."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(-1) / np.where(known.any(-1), known.sum(-1), np.nan)


def by_scan(values, scans):
    """(N, C) values of volumes -> (S, C), the mean over each scan's reconstructions.

    scans (N,): the scan of each volume. The scans come in the order of their first volume.
    """
    _, first, index = np.unique(scans, return_index=True, return_inverse=True)
    sums = np.zeros((len(first), values.shape[1]))
    np.add.at(sums, index, values)
    return (sums / np.bincount(index)[:, None])[np.argsort(first)]


# ---- 2. Their intervals: resamples of the patients -----------------------------------------------
#
# A resample draws patients with replacement; their cases come and go together, since one patient's
# volumes aren't independent. A case that is drawn twice counts twice, so a resample is a column of
# integer weights, and the metrics of section 1 are sums of weights. All resamples are done at once.

def bootstrap(scores, labels, groups, thresholds, n=1000, seed=0):
    """The metrics of n resamples of the patients: dict of METRICS, each (n, C).

    groups (N,): the patient of each case, of any type that sorts; the order of the cases has no
    influence. The same as per_class of the cases of each resample, to rounding.
    """
    scores, labels = _checked(scores, labels)
    patients, groups = np.unique(groups, return_inverse=True)
    drawn = np.random.default_rng(seed).integers(len(patients), size=(n, len(patients)))
    counts = np.stack([np.bincount(line, minlength=len(patients)) for line in drawn], axis=1)
    return _weighted(scores, labels, thresholds, torch.from_numpy(counts[groups]).float())


def _weighted(scores, labels, thresholds, weights):
    """per_class with each case counted as often as its line of weights (N, n) says: (n, C)."""

    def total(cases):
        return (weights.T @ torch.from_numpy(cases).float()).double().numpy()

    auroc, auprc = _by_class(partial(_weighted_areas, weights), scores, labels)  # each (n, C)
    return {"auroc": auroc, "auprc": auprc, **_counted(scores, labels, thresholds, total)}


def _weighted_areas(weights, scores, labels):
    """AUROC and average precision of one class: (2, n).

    Both are sums over the positives. So the cases are tallied between the K distinct scores of
    these ("levels"), and the tallies summed up from the lowest, for all resamples at once.
    """
    positive, negative = labels == 1, labels == 0
    levels = np.unique(scores[positive])

    def tally(cases, side):
        """Weights of the cases between the levels; side: where those at a level go: (K + 1, n)."""
        cases = np.flatnonzero(cases)
        bins = np.searchsorted(levels, scores[cases], side)
        order = np.argsort(bins)
        starts = torch.from_numpy(np.searchsorted(bins[order], np.arange(len(levels) + 1)))
        return F.embedding_bag(torch.from_numpy(cases[order]), weights, starts, mode="sum")

    count = tally(positive, "left")[:-1].double()  # (K, n)
    ties = tally(negative & np.isin(scores, levels), "left")[:-1]
    up_to = tally(negative, "right").cumsum(0, dtype=torch.float64)
    below, negatives = up_to[:-1], up_to[-1]
    positives = count.sum(0)
    area = (count * (2 * below + ties)).sum(0) / (2 * positives * negatives)
    tp = positives - count.cumsum(0) + count
    fp = negatives - below
    average_precision = (count * tp / (tp + fp).clamp(min=1)).sum(0) / positives.clamp(min=1)
    average_precision[positives + negatives == 0] = math.nan
    return torch.stack([area, average_precision]).numpy()


def interval(samples):
    """The middle 95 % of samples (n, ...) along the first axis: (2, ...); NaN is left out."""
    samples = np.asarray(samples)
    ends = np.full((2, *samples.shape[1:]), np.nan)
    usable = ~np.isnan(samples).all(axis=0)
    ends[:, usable] = np.nanpercentile(samples[:, usable], [2.5, 97.5], axis=0)
    return ends


# ---- 3. Two models on the same cases -------------------------------------------------------------

def delong(scores_a, scores_b, labels, groups=None):
    """DeLong's test that two models have the same AUROC: scores, labels (N,) -> two-sided p.

    (N, C) -> (C,). With groups (N,), the patients, the variance is that of Obuchowski's extension
    to clustered data (Biometrics 53, 1997). NaN where a class lacks a positive or a negative, or
    there is but one patient; 1 where the two AUROCs are equal.
    """
    if labels.ndim == 2:
        return _by_class(partial(delong, groups=groups), scores_a, scores_b, labels)
    positive, negative = labels == 1, labels == 0
    if not positive.any() or not negative.any():
        return np.nan
    shift = placements(scores_a, labels) - placements(scores_b, labels)  # (N,)
    difference = shift[positive].mean()
    if groups is None:
        variance = _variance_of_mean(shift[positive]) + _variance_of_mean(shift[negative])
    else:
        influence = (shift - difference) / np.where(positive, positive.sum(), negative.sum())
        known = positive | negative
        patients, index = np.unique(np.asarray(groups)[known], return_inverse=True)
        if len(patients) == 1:
            return np.nan
        of_patients = np.bincount(index, influence[known])
        variance = (of_patients**2).sum() * len(patients) / (len(patients) - 1)
    if abs(difference) < 1e-12:
        return 1.0
    return math.erfc(abs(difference) / math.sqrt(2 * variance)) if variance > 0 else 0.0


def _variance_of_mean(values):
    return np.var(values, ddof=1) / len(values) if len(values) > 1 else np.inf


def placements(scores, labels):
    """The share of the opposite cases that are on the right side of each case: (N,) -> (N,).

    Ties count half; NaN where the label is. The mean over the positives, or over the negatives, is
    the AUROC.
    """
    positives, negatives = scores[labels == 1], scores[labels == 0]
    shares = np.full(len(scores), np.nan)
    shares[labels == 1] = _ranks_among(negatives, positives) / len(negatives)
    shares[labels == 0] = 1 - _ranks_among(positives, negatives) / len(positives)
    return shares


# ---- 4. Thresholds -------------------------------------------------------------------------------

def best_thresholds(scores, labels):
    """The threshold of each class with the largest recall + specificity: (N, C) -> (C,).

    NaN without both kinds of case. Fitted on the very labels that are then scored, as is common in
    the field, it flatters (evaluate.py --threshold oracle).
    """
    return _by_class(_youden, scores, labels)


def nearest_thresholds(scores, labels):
    """The threshold of each class whose point of the ROC curve is nearest to (0, 1), as (N, C) ->
    (C,): the authors' choice, of equal ones the highest. NaN without both kinds of case."""
    return _by_class(_nearest, scores, labels)


def _youden(scores, labels):
    cuts, specificity, missed = _cuts(scores, labels)
    return cuts[np.argmax(specificity - missed)]


def _nearest(scores, labels):
    cuts, specificity, missed = _cuts(scores, labels)
    distance = np.hypot(1 - specificity, missed)[::-1]
    return cuts[::-1][np.argmin(distance)]


def _cuts(scores, labels):
    """The thresholds (T,) that matter to a class; at each the specificity and the miss rate."""
    positive, negative = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    if not len(positive) or not len(negative):
        return np.full((3, 1), np.nan)
    levels = np.unique(np.append(positive, negative))
    between = (levels[:-1] + levels[1:]) / 2
    cuts = np.r_[levels[0] - 1e-6, between, levels[-1]]
    specificity = np.searchsorted(negative, cuts, "right") / len(negative)
    missed = np.searchsorted(positive, cuts, "right") / len(positive)
    return cuts, specificity, missed


def split_half_thresholds(scores, labels, groups, seed=0):
    """Thresholds (N, C) for each case from the patients of the other half: none sees its own label.

    The halves are drawn for each class with its positive patients in equal parts. NaN for a class
    with too few patients to split.
    """
    patients, index = np.unique(groups, return_inverse=True)
    rng, out = np.random.default_rng(seed), np.empty(scores.shape)
    for c in range(scores.shape[1]):
        affected = np.bincount(index, labels[:, c] == 1) > 0
        order = rng.permutation(len(patients))
        order = order[np.argsort(affected[order], kind="stable")]  # healthy first, both shuffled
        even = (np.argsort(order) % 2 == 0)[index]  # by the patient's place in that order
        for judged in (even, ~even):
            out[judged, c] = _youden(scores[~judged, c], labels[~judged, c])
    return out


# ---- 5. Retrieval and the modality gap -----------------------------------------------------------

def _unit(x, dtype=torch.float32):
    return F.normalize(torch.as_tensor(x).to(dtype), dim=-1)


def retrieval(v, t, items=None):
    """Recall@k and median rank both ways between volumes v (N, d) and their reports t (N, d).

    By cosine, ties counted against. items (N,): which report each row has; rows of one report
    (reconstructions) are all right for each other, and it is one candidate.
    """
    v, t = _unit(v), _unit(t)
    items = np.arange(len(v)) if items is None else items
    _, first, report = np.unique(items, return_index=True, return_inverse=True)
    report, t = torch.from_numpy(report), t[first]  # (N,), (R, d)
    reports = torch.arange(len(t))
    return {
        "volume_to_report": _search(v, t, report, reports),
        "report_to_volume": _search(t, v, reports, report),
    }


def _search(queries, candidates, query_items, candidate_items):
    """Of each query the rank of its best candidate of the same item, 1 = first, as statistics."""
    ranks = []
    for rows in torch.arange(len(queries)).split(1024):
        similarity = queries[rows] @ candidates.T
        right = query_items[rows, None] == candidate_items
        best = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)
        ranks.append(((similarity >= best) & ~right).sum(1) + 1)
    ranks = torch.cat(ranks)
    out = {f"recall@{k}": _mean((ranks <= k).double()) for k in (1, 5, 10, 50, 100)}
    return out | {"median_rank": float(np.median(ranks)), "candidates": len(candidates)}


def map_at_k(v, labels, groups, ks=(1, 5, 10, 50)):
    """Mean average precision from volume to volume: v (N, d), labels (N, C), groups (N,) patients.

    A volume is right if it shares an affirmed abnormality. Queries are the volumes with one that
    another patient shares; the candidates are the other patients' volumes. AP@k = sum over the
    right ranks i <= k of precision@i, over min(k, right volumes). "chance": the share of right
    candidates.
    """
    v = _unit(v)
    present = torch.from_numpy(np.asarray(labels) == 1).float()
    patient = torch.from_numpy(np.unique(groups, return_inverse=True)[1])
    deepest = min(max(ks), len(v))
    hits, n_right, chance = [], [], []
    for rows in torch.arange(len(v)).split(1024):
        other = patient[rows, None] != patient
        right = (present[rows] @ present.T > 0) & other
        some = right.any(1)
        rows, other, right = rows[some], other[some], right[some]
        similarity = (v[rows] @ v.T).masked_fill(~other, -math.inf)
        hits.append(right.gather(1, similarity.topk(deepest, dim=1).indices).double())
        n_right.append(right.sum(1))
        chance.append(right.sum(1) / other.sum(1))
    hits, n_right = torch.cat(hits), torch.cat(n_right)
    precision = hits.cumsum(1) / torch.arange(1, deepest + 1)
    out = {}
    for k in ks:
        out[f"map@{k}"] = _mean((hits * precision)[:, :k].sum(1) / n_right.clamp(max=k))
    return out | {"chance": _mean(torch.cat(chance))}


def modality_gap(v, t):
    """How far image embeddings v (N, d) and text embeddings t (N, d), row by row, lie apart.

    L2-normalised: "centroid_distance"; "linear_separability", the held-out accuracy of telling
    image from text, 0.5 = no gap; "cosine_pairs", "cosine_nonpairs": the mean cosine of each.
    """
    v, t = _unit(v, torch.float64), _unit(t, torch.float64)
    n, pairs = len(v), (v * t).sum()
    nonpairs = v.sum(0) @ t.sum(0) - pairs
    return {
        "centroid_distance": float((v.mean(0) - t.mean(0)).norm()),
        "linear_separability": linear_separability(v, t),
        "cosine_pairs": float(pairs / n),
        "cosine_nonpairs": float(nonpairs / (n * (n - 1) or math.nan)),
    }


def linear_separability(v, t):
    """Held-out accuracy of a ridge classifier that tells v (N, d) from t (N, d), in two folds.

    A pair is never in both folds.
    """
    even, right = torch.arange(len(v)) % 2 == 0, []
    for test in (even, ~even):
        x = torch.cat([v[~test], t[~test]])
        y = x.new_tensor([1, -1]).repeat_interleave(len(x) // 2)
        weight, bias = ridge(x, y[:, None])
        right += [v[test] @ weight + bias > 0, t[test] @ weight + bias <= 0]
    return float(torch.cat(right).double().mean())


def ridge(x, y, strength=1e-2):
    """Least squares with an L2 penalty: x (N, d), y (N, C) -> weight (d, C), bias (C,).

    The penalty is `strength` times the mean variance of a feature.
    """
    centre, level = x.mean(0), y.mean(0)
    gram = (x - centre).T @ (x - centre)
    penalty = strength * gram.diagonal().mean().clamp(min=1e-12)
    regular = gram + penalty * torch.eye(len(gram)).to(gram)
    weight = torch.linalg.solve(regular, (x - centre).T @ (y - level))
    return weight, level - centre @ weight


def linear_probe(v_train, labels, patients, v):
    """Ridge classifiers of L2-normalised embeddings v_train (M, d), labels (M, C) -> (N, C).

    v (N, d) is scored. The penalty is the one with the best macro AUROC on half of the training
    patients (M,) when fitted on the other half.
    """
    x, new = F.normalize(v_train, dim=-1).double(), F.normalize(v, dim=-1).double()
    half = np.unique(patients, return_inverse=True)[1] % 2 == 0

    def trial(strength):
        scores = _ridge_scores(x[half], labels[half], x[~half], strength)
        return np.nan_to_num(nanmean(auroc(scores, labels[~half])))

    return _ridge_scores(x, labels, new, max((1e-2, 0.1, 1, 10, 100), key=trial))


def _ridge_scores(x, labels, new, strength):
    """Scores (N, C) of `new` by classifiers of x, labels; classes known for the same x: one fit."""
    out = np.zeros((len(new), labels.shape[1]))
    masks, which = np.unique(~np.isnan(labels), axis=1, return_inverse=True)
    for i, mask in enumerate(masks.T):
        if mask.any():
            classes = which.ravel() == i
            y = torch.from_numpy(labels[mask][:, classes])
            weight, bias = ridge(x[torch.from_numpy(mask)], y, strength)
            out[:, classes] = (new @ weight + bias).numpy()
    return out


def project(*sets):
    """Sets of embeddings (N_i, d), L2-normalised, in the plane of their joint first two principal
    components: (N_i, 2) each, with the same signs on every run."""
    sets = [_unit(x, torch.float64) for x in sets]
    centre = torch.cat(sets).mean(0)
    axes = torch.linalg.svd(torch.cat(sets) - centre, full_matrices=False).Vh[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return [((x - centre) @ axes.T).numpy() for x in sets]
