"""Scores and labels to numbers: AUROC and its kin with intervals over patients, thresholds, tests,
retrieval, the modality gap. Arrays in, numbers out.

    AUROC = share of (positive, negative) pairs in which the positive scores higher, ties half
          = (sum of the positives' ranks - P (P + 1) / 2) / (P N)

Scores (N, C) are numbers, labels (N, C) are 0, 1, or NaN where unknown; N cases, C classes. This
file needs nothing of the project, so copy it.

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

import numpy as np
import torch
import torch.nn.functional as F

METRICS = (
    "auroc", "auprc", "f1", "f1_weighted", "accuracy", "precision", "recall", "specificity",
)

# ---- 1. One number a class -----------------------------------------------------------------------

def auroc(scores, labels):
    """Area under the ROC curve of each class: (N, C) -> (C,); NaN without both kinds of case."""
    scores, labels = _checked(scores, labels)
    return np.array([_auroc(s, y) for s, y in zip(scores.T, labels.T)])


def _auroc(scores, labels):
    positive, negative = scores[labels == 1], scores[labels == 0]
    P, N = len(positive), len(negative)
    if P == 0 or N == 0:
        return np.nan
    ranks = mean_ranks(np.concatenate([positive, negative]))
    return (ranks[:P].sum() - P * (P + 1) / 2) / (P * N)


def mean_ranks(values):
    """Ranks from 1 of values (N,); equal values share the mean of theirs."""
    ordered = np.sort(values)
    below = np.searchsorted(ordered, values, "left")
    up_to = np.searchsorted(ordered, values, "right")
    return (below + 1 + up_to) / 2


def per_class(scores, labels, thresholds):
    """Every metric of each class, as scikit-learn defines it: dict of METRICS, each (C,).

    thresholds (C,) or (N, C): a case is predicted positive if score > threshold. 0 where a ratio's
    denominator is 0; unknown labels are left out; a class without any label is NaN throughout.
    Raises ValueError for shapes that differ, NaN scores and labels other than 0, 1, NaN.
    """
    once = torch.ones(len(scores), 1)
    values = _weighted(scores, labels, np.arange(len(scores)), thresholds, once)
    return {key: value[0] for key, value in values.items()}


def roc_curve(scores, labels):
    """(false positive rate, recall) of one class's scores, labels (N,) at every distinct threshold.

    From (0, 0) to (1, 1); equal scores are one step.
    """
    known = ~np.isnan(labels)
    scores, labels = scores[known], labels[known]
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.flatnonzero(np.r_[np.diff(scores[order]) != 0, True])
    hits = np.cumsum(labels[order])[last_of_ties]
    false_alarms = last_of_ties + 1 - hits
    return np.r_[0, false_alarms / (labels == 0).sum()], np.r_[0, hits / labels.sum()]


def _checked(scores, labels):
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    if scores.ndim != 2 or scores.shape != labels.shape:
        shapes = f"scores {scores.shape} and labels {labels.shape}"
        raise ValueError(f"{shapes} must have the same shape (N, C)")
    if np.isnan(scores).any() or not (np.isnan(labels) | (labels == 0) | (labels == 1)).all():
        raise ValueError("scores must not be NaN; labels must be 0, 1 or NaN for unknown")
    return scores, labels


# ---- 2. Intervals over patients ------------------------------------------------------------------
#
# A resample draws patients with replacement; their cases come and go together. It is a column of
# integer weights, and every metric is a sum of weights over the cases in the order of their scores:
# so all resamples are done at once and nothing is sorted twice.

def bootstrap(scores, labels, groups, thresholds, n=1000, seed=0):
    """The metrics of n resamples of the patients: dict of METRICS, each (n, C).

    groups (N,): the patient of each case, of any type that sorts; the order of the cases has no
    influence. The same as per_class of each resample's cases, to rounding.
    """
    patients, groups = np.unique(np.asarray(groups), return_inverse=True)
    drawn = np.random.default_rng(seed).integers(len(patients), size=(n, len(patients)))
    cells = drawn + np.arange(n)[:, None] * len(patients)
    counts = np.bincount(cells.ravel(), minlength=n * len(patients)).reshape(n, -1)
    weights = torch.from_numpy(counts.T.astype(np.float32, order="C"))              # (patients, n)
    blocks = {key: [] for key in METRICS}
    for block in weights.split(1024, dim=1):
        values = _weighted(scores, labels, groups, thresholds, block.contiguous())
        for key in METRICS:
            blocks[key].append(values[key])
    return {key: np.concatenate(parts) for key, parts in blocks.items()}


def _weighted(scores, labels, groups, thresholds, weights):
    """The metrics with group g counted weights[g, i] times: weights (G, n) -> dict of (n, C)."""
    scores, labels = _checked(scores, labels)
    thresholds = np.broadcast_to(np.asarray(thresholds, np.float64), scores.shape)
    positive, negative, predicted = labels == 1, labels == 0, scores > thresholds
    rows = torch.from_numpy(np.asarray(groups, np.int64))

    def total(cases):
        """Weight of the cases (N, C) of each class: (n, C)."""
        per_group = torch.zeros(len(weights), cases.shape[1])
        per_group.index_add_(0, rows, torch.from_numpy(cases.astype(np.float32)))
        return (weights.T @ per_group).double().numpy()

    positives, negatives = total(positive), total(negative)
    known = positives + negatives
    tp, fp = total(positive & predicted), total(negative & predicted)
    fn, tn = positives - tp, negatives - fp
    f1 = _ratio(2 * tp, 2 * tp + fp + fn)
    f1_of_negatives = _ratio(2 * tn, 2 * tn + fp + fn)
    out = {
        "f1": f1,
        "f1_weighted": _ratio(positives * f1 + negatives * f1_of_negatives, known),
        "accuracy": _ratio(tp + tn, known),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, positives),
        "specificity": _ratio(tn, negatives),
    }
    no_threshold = np.isnan(thresholds).any(0)
    out = {key: np.where(no_threshold, np.nan, value) for key, value in out.items()}
    out |= {"auroc": np.empty(known.shape), "auprc": np.empty(known.shape)}
    for c in range(scores.shape[1]):
        areas = _weighted_areas(scores[:, c], positive[:, c], negative[:, c], rows, weights)
        out["auroc"][:, c], out["auprc"][:, c] = areas
    out["auroc"][(positives == 0) | (negatives == 0)] = np.nan
    return {key: np.where(known == 0, np.nan, out[key]) for key in METRICS}


def _weighted_areas(scores, positive, negative, rows, weights):
    """AUROC and average precision of one class, (n,) each.

    Every positive counts the negatives below it, and the cases not below it. Both change at
    positives alone, so the cases are first tallied between the positives' K distinct scores.
    """
    levels = np.unique(scores[positive])

    def tally(cases, side):
        """Weights of the cases between the levels: (K + 1, n)."""
        bins = np.searchsorted(levels, scores[cases], side)
        order = np.argsort(bins, kind="stable")
        starts = torch.from_numpy(np.searchsorted(bins[order], np.arange(len(levels) + 1)))
        ordered = rows[torch.from_numpy(cases)][order]
        return F.embedding_bag(ordered, weights, starts, mode="sum")

    at_level = tally(positive, "left")[:-1].double()                                        # (K, n)
    up_to_bin = tally(negative, "right").cumsum(0, dtype=torch.float64)
    below, negatives = up_to_bin[:-1], up_to_bin[-1]
    not_above = below
    if np.isin(scores[negative], levels).any():
        not_above = tally(negative, "left").cumsum(0, dtype=torch.float64)[:-1]
    positives = at_level.sum(0)
    positives_from = positives - at_level.cumsum(0) + at_level
    area = (at_level * (below + not_above)).sum(0) / (2 * positives * negatives)
    predicted = positives_from + negatives - below
    precision = (at_level * positives_from / predicted.clamp(min=1)).sum(0)
    return area.numpy(), (precision / positives.clamp(min=1)).numpy()


def _ratio(numerator, denominator):
    out = np.zeros_like(numerator)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)


def interval(samples, level=0.95):
    """Percentile interval of samples (n, ...) along the first axis: (2, ...); NaN is left out."""
    samples = np.asarray(samples)
    ends = np.full((2, *samples.shape[1:]), np.nan)
    usable = ~np.isnan(samples).all(axis=0)
    percents = [50 - 50 * level, 50 + 50 * level]
    ends[:, usable] = np.nanpercentile(samples[:, usable], percents, axis=0)
    return ends


def nanmean(values):
    """Mean along the last axis without NaN; NaN where all are."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(-1) / np.where(known.any(-1), known.sum(-1), np.nan)


def by_scan(values, scans):
    """(N, C) values of volumes -> (S, C), the mean over each scan's reconstructions.

    scans (N,): the scan of each volume. The scans come in the order of their first volume.
    """
    _, first, index = np.unique(np.asarray(scans), return_index=True, return_inverse=True)
    sums = np.zeros((len(first), values.shape[1]))
    np.add.at(sums, index, values)
    return (sums / np.bincount(index)[:, None])[np.argsort(first)]


def delong(scores_a, scores_b, labels, groups=None):
    """DeLong's test that two models have the same AUROC: scores, labels (N,) -> two-sided p.

    (N, C) -> (C,). With groups (N,), the patients, the variance is that of Obuchowski's extension
    to clustered data (Biometrics 53, 1997). NaN where a class lacks a positive or a negative, or
    there is but one patient; 1 where the two AUROCs are equal.
    """
    scores_a, scores_b = np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)
    labels = np.asarray(labels, np.float64)
    if labels.ndim == 2:
        columns = zip(scores_a.T, scores_b.T, labels.T)
        return np.array([delong(a, b, y, groups) for a, b, y in columns])
    positive, negative = labels == 1, labels == 0
    m, n = positive.sum(), negative.sum()
    if m == 0 or n == 0:
        return np.nan
    above_a, below_a = placements(scores_a, positive, negative)
    above_b, below_b = placements(scores_b, positive, negative)
    of_positives, of_negatives = above_a - above_b, below_a - below_b
    difference = of_positives.mean()
    if groups is None:
        variance = sum(
            np.var(part, ddof=1) / len(part) if len(part) > 1 else np.inf
            for part in (of_positives, of_negatives)
        )
    else:
        influence = np.zeros(len(labels))
        influence[positive] = (of_positives - difference) / m
        influence[negative] = (of_negatives - difference) / n
        known = positive | negative
        patients, index = np.unique(np.asarray(groups)[known], return_inverse=True)
        if len(patients) == 1:
            return np.nan
        of_patients = np.bincount(index, influence[known])
        variance = (of_patients**2).sum() * len(patients) / (len(patients) - 1)
    if abs(difference) < 1e-12:
        return 1.0
    return math.erfc(abs(difference) / math.sqrt(2 * variance)) if variance > 0 else 0.0


def placements(scores, positive, negative):
    """The shares of negatives below each positive and of positives above each negative."""
    above, below = np.sort(scores[positive]), np.sort(scores[negative])

    def share_below(values, ordered):
        left, right = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
        return (left + right) / (2 * len(ordered))
    return share_below(scores[positive], below), 1 - share_below(scores[negative], above)


def top_k(scores, labels, k):
    """Strict (recall, precision) at k per scan, averaged over scans; ties count against.

    Recall: the share of a scan's abnormalities among its k highest classes; precision: the share of
    these k that it has. Classes with a known label are ranked within each row of scores (N, C); a
    scan without any is left out, of recall also one without an abnormality.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    some_known = ~np.isnan(labels).all(1)
    scores, labels = scores[some_known], labels[some_known]
    ranked = np.where(np.isnan(labels), -np.inf, scores)
    rank = (ranked[:, None, :] >= ranked[:, :, None]).sum(-1)  # 1 = best; ties share the worst
    present = labels == 1
    hits, affected = (present & (rank <= k)).sum(1), present.any(1)
    recall, precision = math.nan, math.nan
    if affected.any():
        recall = float((hits[affected] / present[affected].sum(1)).mean())
    if len(hits):
        precision = float((hits / k).mean())
    return recall, precision


# ---- 3. Thresholds -------------------------------------------------------------------------------

def best_thresholds(scores, labels):
    """The threshold of each class with the largest recall + specificity: (N, C) -> (C,).

    NaN without both kinds of case. Fitted on the very labels that are then scored, as is common in
    the field, it flatters (evaluate.py --threshold oracle).
    """
    return np.array([_youden(s, y) for s, y in zip(scores.T, labels.T)])


def _youden(scores, labels):
    positive, negative = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    if not len(positive) or not len(negative):
        return np.nan
    levels = np.unique(np.concatenate([positive, negative]))
    between = (levels[:-1] + levels[1:]) / 2
    cuts = np.concatenate([[levels[0] - 1e-6], between])
    specificity = np.searchsorted(negative, cuts, "right") / len(negative)
    missed = np.searchsorted(positive, cuts, "right") / len(positive)
    return cuts[np.argmax(specificity - missed)]


def split_half_thresholds(scores, labels, groups, seed=0):
    """Thresholds (N, C) for each case from the patients of the other half: none sees its own label.

    The halves are drawn for each class with its positive patients in equal parts. NaN for a class
    with too few patients to split.
    """
    patients, index = np.unique(np.asarray(groups), return_inverse=True)
    rng, out = np.random.default_rng(seed), np.empty(np.shape(scores))
    for c in range(out.shape[1]):
        affected = np.bincount(index, labels[:, c] == 1) > 0
        order = rng.permutation(len(patients))
        order = order[np.argsort(affected[order], kind="stable")]  # healthy first, both shuffled
        half = np.empty(len(patients), int)
        half[order] = np.arange(len(patients)) % 2
        for side in (0, 1):
            judged = half[index] == side
            out[judged, c] = _youden(scores[~judged, c], labels[~judged, c])
    return out


# ---- 4. Retrieval and the modality gap -----------------------------------------------------------

def _unit(x, dtype=torch.float32):
    return F.normalize(torch.as_tensor(x).to(dtype), dim=-1)


def retrieval(v, t, items=None, ks=(1, 5, 10, 50, 100)):
    """Recall@k and median rank both ways between volumes v (N, d) and their reports t (N, d).

    By cosine, ties counted against. items (N,): which report each row has; rows of one report
    (reconstructions) are all right for each other, and it is one candidate.
    """
    v, t = _unit(v), _unit(t)
    items = np.arange(len(v)) if items is None else np.asarray(items)
    _, first, index = np.unique(items, return_index=True, return_inverse=True)
    index, reports = torch.from_numpy(index), t[first]                                      # (R, d)
    to_report, to_volume = [], []
    for rows in torch.arange(len(v)).split(1024):
        similarity = v[rows] @ reports.T
        own = similarity.gather(1, index[rows, None])
        to_report.append((similarity >= own).sum(1))  # counts itself: 1 = best
    for rows in torch.arange(len(reports)).split(1024):
        similarity = reports[rows] @ v.T
        right = index[None] == rows[:, None]
        best = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)
        to_volume.append(((similarity >= best) & ~right).sum(1) + 1)
    return {
        "volume_to_report": _rank_statistics(torch.cat(to_report), len(reports), ks),
        "report_to_volume": _rank_statistics(torch.cat(to_volume), len(v), ks),
    }


def _rank_statistics(ranks, candidates, ks):
    ranks = ranks.double()
    out = {f"recall@{k}": float((ranks <= k).double().mean()) for k in ks}
    return out | {"median_rank": float(np.median(ranks)), "candidates": candidates}


def map_at_k(v, labels, groups, ks=(1, 5, 10, 50)):
    """Mean average precision from volume to volume: v (N, d), labels (N, C), groups (N,) patients.

    A volume is right if it shares an affirmed abnormality. Queries are the volumes with one that
    another patient shares; the candidates are the other patients' volumes. AP@k = sum over the
    right ranks i <= k of precision@i, over min(k, right volumes). "chance": the share of right
    candidates.
    """
    v = _unit(v)
    present = torch.from_numpy((np.asarray(labels) == 1).astype(np.float32))
    patient = torch.from_numpy(np.unique(np.asarray(groups), return_inverse=True)[1])
    deepest, chance = min(max(ks), len(v)), []
    scores = {k: [] for k in ks}
    for rows in torch.arange(len(v)).split(1024):
        other = patient[rows, None] != patient[None]
        right = (present[rows] @ present.T > 0) & other
        some = right.any(1)
        rows, other, right = rows[some], other[some], right[some]
        similarity = (v[rows] @ v.T).masked_fill(~other, -math.inf)
        hit = right.gather(1, similarity.topk(deepest, dim=1).indices).double()
        precision = hit.cumsum(1) / torch.arange(1, deepest + 1)
        chance.append(right.sum(1) / other.sum(1))
        for k in ks:
            scores[k].append((hit * precision)[:, :k].sum(1) / right.sum(1).clamp(max=k))
    out = {f"map@{k}": torch.cat(values) for k, values in scores.items()}
    out["chance"] = torch.cat(chance)
    return {key: float(values.mean()) if len(values) else math.nan for key, values in out.items()}


def modality_gap(v, t):
    """How far image embeddings v (N, d) and text embeddings t (N, d), row by row, lie apart.

    L2-normalised: "centroid_distance"; "linear_separability", the held-out accuracy of telling
    image from text, 0.5 = no gap; "cosine_pairs", "cosine_nonpairs": the mean cosine of each.
    """
    v, t = _unit(v, torch.float64), _unit(t, torch.float64)
    n, pairs = len(v), (v * t).sum()
    nonpairs = math.nan
    if n > 1:
        nonpairs = float((v.sum(0) @ t.sum(0) - pairs) / (n * (n - 1)))
    return {
        "centroid_distance": float((v.mean(0) - t.mean(0)).norm()),
        "linear_separability": linear_separability(v, t),
        "cosine_pairs": float(pairs / n),
        "cosine_nonpairs": nonpairs,
    }


def linear_separability(v, t):
    """Held-out accuracy of a ridge classifier that tells v (N, d) from t (N, d), in two folds.

    A pair is never in both folds.
    """
    fold, right = torch.arange(len(v)) % 2, []
    for held_out in (0, 1):
        train, test = fold != held_out, fold == held_out
        x = torch.cat([v[train], t[train]])
        y = torch.cat([torch.ones(len(x) // 2), -torch.ones(len(x) // 2)]).to(x)
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
    half = np.unique(np.asarray(patients), return_inverse=True)[1] % 2
    fitted, held_out = half == 0, half == 1

    def trial(strength):
        scores = _ridge_scores(x[fitted], labels[fitted], x[held_out], strength)
        return np.nan_to_num(nanmean(auroc(scores, labels[held_out])))

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
