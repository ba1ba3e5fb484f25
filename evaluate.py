"""Zero-shot evaluation: scores, metrics with patient-level intervals, retrieval, modality gap.

    score(volume, "There is X") = mean of cos(v, t) and cos(v_hat, t)        v, t: embeddings, v_hat: v re-expressed from the bank

    python evaluate.py runs/phantom --manifest runs/phantom/data/manifest.csv
    python evaluate.py runs/phantom --volume scan.nii.gz --prompts "pleural effusion" "lung nodule"
"""
import argparse
import csv
import hashlib
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

import data
from model import BrgSA, clean

METRICS = ("auroc", "auprc", "f1", "f1_weighted", "accuracy", "precision", "recall", "specificity")


# ---------------------------------------------------------------- metrics: scores (N, C), labels (N, C) of 0, 1 and NaN = unknown

def auroc(scores, labels):
    """Area under the ROC curve of each class: scores, labels (N, C) -> (C,); NaN where a class lacks a positive or a negative."""
    return metrics(scores, labels, np.zeros(np.shape(scores)[1]))["auroc"]


def metrics(scores, labels, thresholds):
    """Every metric of each class, as scikit-learn defines it (0 where its denominator is 0): dict of METRICS, each (C,).

    scores, labels (N, C); thresholds (C,) or (N, C), a case is predicted positive if score > threshold. Unknown labels are left out;
    a class without any label is NaN throughout. Raises ValueError for shapes that differ, NaN scores and labels other than 0, 1, NaN.
    """
    everyone = torch.ones(len(scores), 1)
    return {key: values[0] for key, values in _weighted(scores, labels, np.arange(len(scores)), thresholds, everyone).items()}


def bootstrap(scores, labels, groups, thresholds, n=1000, seed=0):
    """The metrics of n resamples of the patients, drawn with replacement: dict of METRICS, each (n, C).

    groups (N,): the patient of each row, of any type that sorts. One patient's volumes aren't independent, so they come and go together.
    The order of the rows has no influence. Same as `metrics(scores[rows], ...)` for the rows of each resample, but nothing is sorted twice:
    a resample is a column of integer weights, and every metric is a sum of weights over cases in the order of their scores.
    """
    patients, groups = np.unique(np.asarray(groups), return_inverse=True)
    drawn = np.random.default_rng(seed).integers(len(patients), size=(n, len(patients)))
    counts = np.bincount((drawn + np.arange(n)[:, None] * len(patients)).ravel(), minlength=n * len(patients))
    weights = torch.from_numpy(counts.reshape(n, -1).T.astype(np.float32, order="C"))                         # (patients, n)
    blocks = [_weighted(scores, labels, groups, thresholds, block.contiguous()) for block in weights.split(1024, dim=1)]
    return {key: np.concatenate([block[key] for block in blocks]) for key in METRICS}


def _weighted(scores, labels, groups, thresholds, weights):
    """The metrics with each group g counted weights[g, i] times: weights (G, n) float32 -> dict of (n, C)."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} must have the same shape (N, C)")
    if np.isnan(scores).any() or not (np.isnan(labels) | (labels == 0) | (labels == 1)).all():
        raise ValueError("scores must not be NaN; labels must be 0, 1 or NaN for unknown")
    thresholds = np.broadcast_to(np.asarray(thresholds, np.float64), scores.shape)
    positive, negative, predicted = labels == 1, labels == 0, scores > thresholds
    rows = torch.from_numpy(np.asarray(groups, np.int64))

    def total(cases):                                                                                       # (N, C) bool -> (n, C)
        per_group = torch.zeros(len(weights), cases.shape[1]).index_add_(0, rows, torch.from_numpy(cases.astype(np.float32)))
        return (weights.T @ per_group).double().numpy()

    positives, negatives = total(positive), total(negative)
    tp, fp = total(positive & predicted), total(negative & predicted)
    fn, tn, known = positives - tp, negatives - fp, positives + negatives
    f1, f1_of_negatives = _ratio(2 * tp, 2 * tp + fp + fn), _ratio(2 * tn, 2 * tn + fp + fn)
    out = {
        "f1": f1, "f1_weighted": _ratio(positives * f1 + negatives * f1_of_negatives, known), "accuracy": _ratio(tp + tn, known),
        "precision": _ratio(tp, tp + fp), "recall": _ratio(tp, positives), "specificity": _ratio(tn, negatives),
    }
    out = {key: np.where(np.isnan(thresholds).any(0), np.nan, value) for key, value in out.items()}
    ranked = [_ranked(scores[:, c], positive[:, c], negative[:, c], rows, weights) for c in range(scores.shape[1])]
    out["auroc"], out["auprc"] = (np.stack(columns, axis=1) for columns in zip(*ranked))
    out["auroc"][(positives == 0) | (negatives == 0)] = np.nan
    return {key: np.where(known == 0, np.nan, out[key]) for key in METRICS}


def _ranked(scores, positive, negative, rows, weights):
    """AUROC and average precision of one class: every positive counts the negatives below it and the cases not below it.

    Both change at positives alone, so the cases are first tallied between the K distinct scores of the positives ("levels", ascending).
    """
    levels = np.unique(scores[positive])

    def tally(cases, side):                                               # weights of the cases between the levels: (K + 1, n)
        bins = np.searchsorted(levels, scores[cases], side)
        order = np.argsort(bins, kind="stable")
        starts = np.searchsorted(bins[order], np.arange(len(levels) + 1))
        return F.embedding_bag(rows[torch.from_numpy(cases)][order], weights, torch.from_numpy(starts), mode="sum")

    at_level = tally(positive, "left")[:-1].double()                                                                      # (K, n)
    up_to_bin = tally(negative, "right").cumsum(0, dtype=torch.float64)
    below, negatives = up_to_bin[:-1], up_to_bin[-1]
    not_above = tally(negative, "left").cumsum(0, dtype=torch.float64)[:-1] if np.isin(scores[negative], levels).any() else below
    positives_up_to = at_level.cumsum(0)
    positives = at_level.sum(0)
    positives_from = positives - positives_up_to + at_level
    area = (at_level * (below + not_above)).sum(0) / (2 * positives * negatives)
    found = positives_from + negatives - below
    precision = (at_level * positives_from / found.clamp(min=1)).sum(0) / positives.clamp(min=1)
    return area.numpy(), precision.numpy()


def _ratio(numerator, denominator):
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def interval(samples, level=0.95):
    """Percentile interval of bootstrap samples (n, ...) along the first axis: (2, ...); resamples that are NaN are left out."""
    samples = np.asarray(samples)
    ends = np.full((2, *samples.shape[1:]), np.nan)
    usable = ~np.isnan(samples).all(axis=0)
    ends[:, usable] = np.nanpercentile(samples[:, usable], [50 - 50 * level, 50 + 50 * level], axis=0)
    return ends


def delong(scores_a, scores_b, labels, groups=None):
    """DeLong's test that two models have the same AUROC on the same cases: scores (N,), labels (N,) -> two-sided p; (N, C) -> (C,).

    With groups (N,), the patients, the variance is that of Obuchowski's extension to clustered data (Biometrics 53, 1997).
    NaN where a class lacks a positive or a negative; 1 where the two AUROCs are equal.
    """
    scores_a, scores_b, labels = (np.asarray(x, np.float64) for x in (scores_a, scores_b, labels))
    if labels.ndim == 2:
        return np.array([delong(scores_a[:, c], scores_b[:, c], labels[:, c], groups) for c in range(labels.shape[1])])
    positive, negative = labels == 1, labels == 0
    m, n = positive.sum(), negative.sum()
    if m == 0 or n == 0:
        return np.nan
    placements = [_placements(scores, positive, negative) for scores in (scores_a, scores_b)]
    of_positives, of_negatives = (a - b for a, b in zip(*placements))                            # a - b of each case; mean = difference
    difference = of_positives.mean()
    if groups is None:
        variance = sum(np.var(part, ddof=1) / len(part) if len(part) > 1 else np.inf for part in (of_positives, of_negatives))
    else:
        influence = np.zeros(len(labels))
        influence[positive], influence[negative] = (of_positives - difference) / m, (of_negatives - difference) / n
        patients, index = np.unique(np.asarray(groups)[positive | negative], return_inverse=True)
        variance = (np.bincount(index, influence[positive | negative]) ** 2).sum() * len(patients) / max(len(patients) - 1, 1)
    if abs(difference) < 1e-12:
        return 1.0
    return math.erfc(abs(difference) / math.sqrt(2 * variance)) if variance > 0 else 0.0


def _placements(scores, positive, negative):
    """The share of negatives below each positive, and of positives above each negative; ties count half."""
    above, below = np.sort(scores[positive]), np.sort(scores[negative])
    of_positives = sum(np.searchsorted(below, scores[positive], side) for side in ("left", "right")) / (2 * len(below))
    of_negatives = 1 - sum(np.searchsorted(above, scores[negative], side) for side in ("left", "right")) / (2 * len(above))
    return of_positives, of_negatives


def top_k(scores, labels, k):
    """Strict (recall, precision) at k per scan, averaged: found / all abnormalities of the scan, found / k; ties count against.

    Classes with a known label are ranked within each row of scores (N, C); a scan without any is left out, of recall also one without
    an abnormality.
    """
    scores, labels = (np.asarray(x, np.float64)[~np.isnan(labels).all(1)] for x in (scores, labels))
    known = ~np.isnan(labels)
    ranked = np.where(known, scores, -np.inf)
    rank = (ranked[:, None, :] >= ranked[:, :, None]).sum(-1)                                        # 1 = best; ties share the worst
    present = labels == 1
    found, some = (present & (rank <= k)).sum(1), present.any(1)
    return (float((found[some] / present[some].sum(1)).mean()) if some.any() else math.nan), float((found / k).mean()) if len(found) else math.nan


def recall_at_k(scores, labels, k):
    """Share of a scan's abnormalities among its k highest classes, mean over scans with any: see top_k."""
    return top_k(scores, labels, k)[0]


def precision_at_k(scores, labels, k):
    """Share of a scan's k highest classes that are present, mean over scans: see top_k."""
    return top_k(scores, labels, k)[1]


# ---------------------------------------------------------------- thresholds

def best_thresholds(scores, labels):
    """The threshold of each class with the largest recall + specificity (Youden's J): (N, C) -> (C,); NaN without both kinds of case.

    Fitted on the very labels that are then scored, as is common in the field, it flatters: --threshold oracle.
    """
    return np.array([_youden(scores[:, c], labels[:, c]) for c in range(np.shape(scores)[1])])


def _youden(scores, labels):
    positive, negative = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    if not len(positive) or not len(negative):
        return np.nan
    levels = np.unique(np.concatenate([positive, negative]))
    cuts = np.concatenate([[levels[0] - 1e-6], (levels[:-1] + levels[1:]) / 2])                  # between neighbouring scores
    gain = np.searchsorted(negative, cuts, "right") / len(negative) - np.searchsorted(positive, cuts, "right") / len(positive)
    return cuts[np.argmax(gain)]


def split_half_thresholds(scores, labels, groups, seed=0):
    """Thresholds (N, C) for each case from the patients of the other half, so that no case's label touches its own threshold.

    The halves are drawn for each class with its positive patients in equal parts. NaN for a class with too few patients to split.
    """
    patients, index = np.unique(np.asarray(groups), return_inverse=True)
    rng, out = np.random.default_rng(seed), np.empty(np.shape(scores))
    for c in range(out.shape[1]):
        affected = np.bincount(index, labels[:, c] == 1) > 0
        order = rng.permutation(len(patients))
        order = order[np.argsort(affected[order], kind="stable")]                                     # healthy first, each part shuffled
        half = np.empty(len(patients), int)
        half[order] = np.arange(len(patients)) % 2
        for side in (0, 1):
            mine = half[index] == side
            out[mine, c] = _youden(scores[~mine, c], labels[~mine, c])
    return out


# ---------------------------------------------------------------- retrieval and the modality gap

def retrieval(v, t, items=None, ks=(1, 5, 10, 50, 100)):
    """Recall@k and median rank both ways between volumes v (N, d) and their reports t (N, d), cosine, ties counted against.

    items (N,): which report each row has; rows of one report (reconstructions) are all right for each other, and it is one candidate.
    """
    v, t = (F.normalize(torch.as_tensor(x).float(), dim=-1) for x in (v, t))
    items = np.arange(len(v)) if items is None else np.asarray(items)
    _, first, index = np.unique(items, return_index=True, return_inverse=True)
    index = torch.from_numpy(index)
    to_report, to_volume = [], []
    reports = t[first]                                                                                                   # (R, d)
    for rows in torch.arange(len(v)).split(1024):
        similarity = v[rows] @ reports.T
        own = similarity.gather(1, index[rows, None])
        to_report.append((similarity >= own).sum(1))                                                          # counts itself: 1 = best
    for rows in torch.arange(len(reports)).split(1024):
        similarity = reports[rows] @ v.T
        right = index[None] == rows[:, None]
        best = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)
        to_volume.append(((similarity >= best) & ~right).sum(1) + 1)
    out = {}
    for way, ranks in (("volume_to_report", torch.cat(to_report)), ("report_to_volume", torch.cat(to_volume))):
        ranks = ranks.double()
        out[way] = {f"recall@{k}": float((ranks <= k).double().mean()) for k in ks}
        out[way] |= {"median_rank": float(np.median(ranks)), "candidates": len(reports) if way == "volume_to_report" else len(v)}
    return out


def map_at_k(v, labels, groups, ks=(1, 5, 10, 50)):
    """Mean average precision from volume to volume: v (N, d), labels (N, C); a volume is right if it shares an affirmed abnormality.

    Queries are the volumes with an abnormality that another patient shares; the candidates are the other patients' volumes.
    AP@k = sum over the right ranks i <= k of precision@i, over min(k, right volumes). "chance" is the share of right candidates.
    """
    v, present = F.normalize(torch.as_tensor(v).float(), dim=-1), torch.from_numpy((np.asarray(labels) == 1).astype(np.float32))
    patient = torch.from_numpy(np.unique(np.asarray(groups), return_inverse=True)[1])
    deepest, scores, chance = min(max(ks), len(v)), {k: [] for k in ks}, []
    for rows in torch.arange(len(v)).split(1024):
        other = patient[rows, None] != patient[None]
        right = (present[rows] @ present.T > 0) & other
        rows, other, right = (x[right.any(1)] for x in (rows, other, right))
        order = (v[rows] @ v.T).masked_fill(~other, -math.inf).topk(deepest, dim=1).indices
        hit = right.gather(1, order).double()
        precision = hit.cumsum(1) / torch.arange(1, deepest + 1)
        chance.append(right.sum(1) / other.sum(1))
        for k in ks:
            scores[k].append((hit * precision)[:, :k].sum(1) / right.sum(1).clamp(max=k))
    out = {f"map@{k}": torch.cat(values) for k, values in scores.items()} | {"chance": torch.cat(chance)}
    return {key: float(values.mean()) if len(values) else math.nan for key, values in out.items()}


def modality_gap(v, t):
    """How far image embeddings v (N, d) and text embeddings t (N, d), row by row a pair, lie apart once L2-normalised.

    centroid_distance; linear_separability (held-out accuracy of telling image from text, 0.5 = no gap); mean cosine of pairs, non-pairs.
    """
    v, t = (F.normalize(torch.as_tensor(x).double(), dim=-1) for x in (v, t))
    pairs = (v * t).sum()
    n = len(v)
    return {
        "centroid_distance": float((v.mean(0) - t.mean(0)).norm()),
        "linear_separability": linear_separability(v, t),
        "cosine_pairs": float(pairs / n),
        "cosine_nonpairs": float((v.sum(0) @ t.sum(0) - pairs) / (n * (n - 1))) if n > 1 else math.nan,
    }


def linear_separability(v, t):
    """Held-out accuracy of a ridge classifier that tells v (N, d) from t (N, d), two folds; a pair is never in both."""
    fold = torch.arange(len(v)) % 2
    right = []
    for held_out in (0, 1):
        x = torch.cat([v[fold != held_out], t[fold != held_out]])
        y = torch.cat([torch.ones(len(x) // 2), -torch.ones(len(x) // 2)]).to(x)
        weight, bias = ridge(x, y[:, None])
        right += [v[fold == held_out] @ weight + bias > 0, t[fold == held_out] @ weight + bias <= 0]
    return float(torch.cat(right).double().mean())


def ridge(x, y, strength=1e-2):
    """Least squares with an L2 penalty of `strength` x the mean variance of a feature: x (N, d), y (N, C) -> weight (d, C), bias (C,)."""
    centre, level = x.mean(0), y.mean(0)
    gram = (x - centre).T @ (x - centre)
    penalty = strength * gram.diagonal().mean().clamp(min=1e-12)
    weight = torch.linalg.solve(gram + penalty * torch.eye(len(gram)).to(gram), (x - centre).T @ (y - level))
    return weight, level - centre @ weight


def project(*sets):
    """The sets of embeddings, each (N_i, d), L2-normalised, in the plane of their joint two first principal components: (N_i, 2) each."""
    sets = [F.normalize(torch.as_tensor(x).double(), dim=-1) for x in sets]
    centre = torch.cat(sets).mean(0)
    axes = torch.linalg.svd(torch.cat(sets) - centre, full_matrices=False).Vh[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()                                           # same sign each run
    return [((x - centre) @ axes.T).numpy() for x in sets]


# ---------------------------------------------------------------- embeddings, prompts and scores

PAIRS = ("v-t", "v_hat-t", "v-t_hat", "v_hat-t_hat")
PHANTOM_WARNING = "this model was trained on the phantom, synthetic scans; it knows nothing about patients"


@torch.inference_mode()
def embed_volumes(model, rows, cache, device="cpu"):
    """Embeddings v (N, d), float32 on the CPU, of the rows' whole cached volumes."""
    batch = max(1, 2**24 // math.prod(model.config.shape))
    volumes = torch.utils.data.DataLoader(data.Volumes(rows, cache), batch_size=batch)
    model = model.to(device).eval()
    v = [torch.empty(0, model.config.dim)]
    with tqdm(total=len(rows), desc="embed", unit="volume", disable=not rows) as progress:
        for hu in volumes:
            v.append(model.encode_image(hu.to(device)).float().cpu())
            progress.update(len(hu))
    return torch.cat(v)


@torch.inference_mode()
def embed_texts(model, texts, batch=64):
    """Embeddings t (N, d), float32 on the CPU, of a list of str; each distinct text is encoded once."""
    distinct = sorted(set(texts), key=len)
    t = torch.cat([model.encode_text(distinct[i:i + batch]).float().cpu() for i in range(0, len(distinct), batch)])
    place = {text: i for i, text in enumerate(distinct)}
    return t[[place[text] for text in texts]]


@torch.inference_mode()
def bridge(model, x):
    """Embeddings (N, d) re-expressed from the model's knowledge bank, on the CPU."""
    return torch.cat([model.bridge(part.to(model.bank.weight.device)).float().cpu() for part in x.split(4096)])


def cached_embeddings(run, model, rows, cache, device):
    """embed_volumes, each volume once: kept in the run's embeddings.safetensors, which belongs to these very weights."""
    path, weights = Path(run) / "embeddings.safetensors", sha256_of(Path(run) / "model.safetensors")
    keys = [f"{cache.path(row).resolve()} {cache.path(row).stat().st_mtime_ns}" for row in rows]
    known = {}
    try:
        with safe_open(path, "pt") as file:
            if file.metadata()["model"] == weights:
                known = dict(zip(json.loads(file.metadata()["keys"]), file.get_tensor("v")))
    except (FileNotFoundError, SafetensorError, KeyError):
        pass                                                                                  # absent or of another version: made anew
    todo = [(key, row) for key, row in zip(keys, rows) if key not in known]
    for start in range(0, len(todo), 256):                                                    # saved now and then: a killed run resumes
        part_keys, part_rows = zip(*todo[start:start + 256])
        known |= zip(part_keys, embed_volumes(model, part_rows, cache, device))
        record = {"model": weights, "keys": json.dumps(list(known))}
        data.write_atomically(path, save({"v": torch.stack(list(known.values()))}, record))
    return torch.stack([known[key] for key in keys])


def zero_shot_scores(v, v_hat, t, t_hat, pairs=PAIRS[:2]):
    """Mean cosine of the pairs: v, v_hat (N, d) of volumes, t, t_hat (P, d) of prompts -> (N, P); by default cos(v, t) and cos(v_hat, t)."""
    unit = {name: F.normalize(x, dim=-1) for name, x in (("v", v), ("v_hat", v_hat), ("t", t), ("t_hat", t_hat))}
    return sum(unit[image] @ unit[text].mT for image, text in (pair.split("-") for pair in pairs)) / len(pairs)


def make_prompts(classes, given=None, negative=False):
    """What is asked for each class: {class: {"positive": [texts], "negative": [texts], "combine": "mean" or "max"}}.

    given: names, or one file: a .json of {class: text, list of texts or such a dict}, or a text file with one name a line.
    It replaces the prompts of the classes that it names, or, with classes None, says what the classes are.
    negative: each class without negative prompts gets "There is no X", whose score is subtracted.
    """
    named = {}
    if given and len(given) == 1 and given[0].endswith((".json", ".txt")):
        text = Path(given[0]).read_text(encoding="utf-8")
        try:
            named = json.loads(text) if given[0].endswith(".json") else dict.fromkeys(filter(None, map(str.strip, text.splitlines())))
            named = {name: _prompt(name, asked) for name, asked in named.items()}
        except (json.JSONDecodeError, AttributeError, TypeError) as error:
            raise ValueError(f"{given[0]}: can't be read as prompts ({error}); {{\"Lung nodule\": [\"There is a lung nodule\", ...]}} is the form") from None
    elif given:
        named = {name: _prompt(name, None) for name in given}
    prompts = {name: named.get(name) or _prompt(name, None) for name in (classes or named)}
    for name, prompt in prompts.items():
        if negative and not prompt["negative"]:
            prompt["negative"] = [f"There is no {name}"]
    if not prompts:
        raise ValueError("no class to ask for")
    return prompts


def _prompt(name, asked):
    if isinstance(asked, str):
        asked = [asked]
    if isinstance(asked, list):
        asked = {"positive": asked}
    if asked is None and name == "Calcification":                             # RAD-ChestCT's one class for two of CT-RATE's
        asked = {"positive": ["There is arterial wall calcification", "There is coronary artery wall calcification"], "combine": "max"}
    prompt = {"positive": [f"There is {name}"], "negative": [], "combine": "mean"} | (asked or {})
    texts = prompt["positive"] + prompt["negative"]
    if set(prompt) != {"positive", "negative", "combine"} or not prompt["positive"] or not all(isinstance(text, str) and clean(text) for text in texts):
        raise TypeError(f"'{name}' asks {asked!r}")
    return prompt


def score(model, v, prompts, pairs=PAIRS[:2], v_hat=None):
    """Scores (N, C) of embedded volumes v (N, d) for prompts of C classes: mean (or max) over positive - mean over negative prompts."""
    texts = list(dict.fromkeys(text for prompt in prompts.values() for text in prompt["positive"] + prompt["negative"]))
    t = embed_texts(model, texts)
    each = zero_shot_scores(v, bridge(model, v) if v_hat is None else v_hat, t, bridge(model, t), pairs).double().numpy()           # (N, P)
    columns = []
    for prompt in prompts.values():
        positive, negative = (each[:, [texts.index(text) for text in prompt[kind]]] for kind in ("positive", "negative"))
        column = positive.max(1) if prompt["combine"] == "max" else positive.mean(1)
        columns.append(column - negative.mean(1) if negative.shape[1] else column)
    return np.stack(columns, axis=1)


def sha256_of(path):
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- scores and labels, joined by name

def write_scores(path, names, classes, scores):
    """scores.csv: name, then one column a class; scores (N, C) with all their digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *classes])
    writer.writerows([name, *map(repr, line)] for name, line in zip(names, np.asarray(scores, np.float64).tolist()))
    data.write_atomically(path, text.getvalue().encode())


def read_scores(path):
    """scores.csv -> {name: {class: score}}; ValueError names the row that isn't right."""
    scores = {}
    for number, line in enumerate(data.read_csv(path, "name"), 2):
        name = line.pop("name")
        try:
            values = {key: float(value) for key, value in line.items()}
        except (TypeError, ValueError):
            values = {"": math.nan}
        if name in scores or not all(map(math.isfinite, values.values())):
            raise ValueError(f"{path}, row {number}: '{name}' " + ("stands twice" if name in scores else "has a score that is no finite number"))
        scores[name] = values
    if not scores or not next(iter(scores.values())):
        raise ValueError(f"{path}: holds no scores")
    return scores


def join(scores, rows, classes=None, where="the scores"):
    """Scores by name and manifest rows -> scores (N, C), labels (N, C), classes, in the rows' order.

    Classes are those of the rows' labels (or the ones given) that are scored. Raises ValueError with the first ten names without a partner.
    """
    names = [row.name for row in rows]
    for lacking, what in ((sorted(set(names) - set(scores)), f"not in {where}"), (sorted(set(scores) - set(names)), f"in {where} but not in the manifest")):
        if lacking:
            raise ValueError(f"{len(lacking)} volumes are {what}: {', '.join(lacking[:10])}{', ...' if len(lacking) > 10 else ''}")
    scored = next(iter(scores.values()))
    classes = [name for name in (classes or dict.fromkeys(name for row in rows for name in row.labels)) if name in scored]
    labels = np.array([[row.labels.get(name, np.nan) for name in classes] for row in rows], np.float64).reshape(len(rows), -1)
    return np.array([[scores[name][key] for key in classes] for name in names]).reshape(labels.shape), labels, classes


def by_scan(values, scans):
    """(N, C) values of volumes -> (S, C), the mean over each scan's reconstructions, scans in the order of their first volume."""
    first, index = np.unique(np.asarray(scans), return_index=True, return_inverse=True)[1:]
    sums = np.zeros((len(first), values.shape[1]))
    np.add.at(sums, index, values)
    return (sums / np.bincount(index)[:, None])[np.argsort(first)]


def summarise(scores, labels, classes, patients, threshold="split-half", n=1000, seed=0):
    """All metrics with 95 % patient-bootstrap intervals, per class and macro, as a dict that is JSON but for NaN.

    threshold: "split-half", "oracle", or thresholds (C,). Macro means are of the classes with both positive and negative cases, whose
    count stands beside them: of CT-RATE's 18 and of CT-RATE-LT's 15 apart where all classes are among these, else of all.
    """
    if isinstance(threshold, str):
        threshold = split_half_thresholds(scores, labels, patients) if threshold == "split-half" else best_thresholds(scores, labels)
    point, samples = metrics(scores, labels, threshold), bootstrap(scores, labels, patients, threshold, n, seed)
    undefined = np.isnan(samples["auroc"])                                    # a resample without one kind of case says nothing of a class
    samples = {key: np.where(undefined, np.nan, values) for key, values in samples.items()}

    def describe(values, drawn):
        return {key: values[key] for key in METRICS} | {f"{key}_95": interval(drawn[key]).tolist() for key in METRICS}

    out = {"classes": {}, "macro": {}}
    for c, name in enumerate(classes):
        out["classes"][name] = {"positives": int((labels[:, c] == 1).sum()), "negatives": int((labels[:, c] == 0).sum()),
                                **describe({key: float(point[key][c]) for key in METRICS}, {key: samples[key][:, c] for key in METRICS})}
    macros = {"CT-RATE": data.CT_RATE, "CT-RATE-LT": data.CT_RATE_LT}
    if not set(classes) <= set(data.CT_RATE + data.CT_RATE_LT):
        macros = {"all": classes}
    for name, members in macros.items():
        columns = [c for c, member in enumerate(classes) if member in members and not np.isnan(point["auroc"][c])]
        if columns:
            out["macro"][name] = {"classes": len(columns), "of": len(set(members) & set(classes)), **describe(
                {key: _nanmean(point[key][columns]).item() for key in METRICS}, {key: _nanmean(samples[key][:, columns]) for key in METRICS})}
    out["top_k"] = {f"{kind}@{k}": value for k in (1, 3, 5, 10) if k <= len(classes) for kind, value in zip(("recall", "precision"), top_k(scores, labels, k))}
    return out


def _nanmean(values):
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(-1) / np.where(known.any(-1), known.sum(-1), np.nan)


def table(result, level="volume"):
    """The terminal's table of one level of an evaluation."""
    columns = ("auroc", "auprc", "f1", "accuracy", "precision", "recall", "specificity")
    width = max(map(len, [*result[level]["classes"], "macro CT-RATE-LT (15 of 15)"]))
    lines = [f"{'per ' + level:{width}}  positive  AUROC  95 % interval   " + "  ".join(f"{key.replace('specificity', 'specif.'):>9}" for key in columns[1:])]

    def line(name, count, values):
        numbers = "  ".join(f"{_percent(values[key]):>9}" for key in columns[1:])
        return f"{name:{width}}  {count:>8}  {_percent(values['auroc']):>5}  {' to '.join(f'{_percent(end):>5}' for end in values['auroc_95']):15} {numbers}"

    lines += [line(name, values["positives"], values) for name, values in result[level]["classes"].items()]
    lines += [line(f"macro {name} ({values['classes']} of {values['of']})", "", values) for name, values in result[level]["macro"].items()]
    return "\n".join(lines)


def _percent(value):
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def to_json(value):
    """Strict JSON of nested dicts and lists: NaN becomes null."""
    def strict(x):
        if isinstance(x, dict):
            return {key: strict(item) for key, item in x.items()}
        if isinstance(x, (list, tuple)):
            return [strict(item) for item in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps(strict(value), indent=1, ensure_ascii=False, allow_nan=False)


# ---------------------------------------------------------------- the evaluations

def select_rows(manifest, split=None):
    """A manifest's rows of a split; by default of "valid" where there is one, else all. -> rows, the split's name or "all"."""
    rows = data.read_manifest(manifest, split)
    if split is None and any(row.split == "valid" for row in rows):
        rows, split = [row for row in rows if row.split == "valid"], "valid"
    return rows, split or "all"


def prepare_and_embed(run, model, rows, manifest, cache=None, device=None):
    """Rows that can be read, their v (N, d), and the skipped as (name, reason); volumes go through the cache, by default beside the manifest."""
    config = model.config
    cache = data.Cache(cache or Path(manifest).parent / "cache", config.spacing, config.shape, config.hu_range)
    rows, skipped = data.prepare(rows, cache)
    if not rows:
        raise ValueError(f"{manifest}: none of its {len(skipped)} volumes can be read; the first: {skipped[0][1]}")
    return rows, cached_embeddings(run, model, rows, cache, device or default_device()), skipped


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def classes_of(rows, benchmark=None, prompts=None):
    """The classes of the benchmark, else (None) those that the prompts name, else the rows' labels, else CT-RATE's and CT-RATE-LT's 33."""
    if benchmark in data.BENCHMARKS or prompts:
        return data.BENCHMARKS.get(benchmark)
    return list(dict.fromkeys(name for row in rows for name in row.labels)) or data.CT_RATE + data.CT_RATE_LT


def evaluate(run, manifest, split=None, out=None, benchmark=None, prompts=None, negative=False, pairs=PAIRS[:2], threshold="split-half",
             cache=None, device=None):
    """Score a manifest's split zero-shot with the model of a run; writes scores.csv and metrics.json to out (default: run/evaluation).

    Returns what metrics.json holds; "volume" and "scan" (mean over reconstructions) each have the classes' and the macro metrics.
    """
    run, out = Path(run), Path(out or Path(run) / "evaluation")
    model = BrgSA.from_pretrained(run)
    rows, split = select_rows(manifest, split)
    asked = make_prompts(classes_of(rows, benchmark, prompts), prompts, negative)
    rows, v, skipped = prepare_and_embed(run, model, rows, manifest, cache, device)
    write_scores(out / "scores.csv", [row.name for row in rows], list(asked), score(model, v, asked, pairs))
    scores, labels, classes = join(read_scores(out / "scores.csv"), rows, data.BENCHMARKS.get(benchmark), out / "scores.csv")
    result = {
        "run": str(run), "model_sha256": sha256_of(run / "model.safetensors"), "trained_on": model.config.trained_on,
        "manifest": str(manifest), "manifest_sha256": sha256_of(manifest), "split": split, "benchmark": benchmark,
        "prompts": asked, "prompts_sha256": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(), "pairs": list(pairs),
        "volumes": len(rows), "scans": len({row.scan for row in rows}), "patients": len({row.patient for row in rows}),
        "skipped": [list(item) for item in skipped], "threshold": threshold,
    }
    if (~np.isnan(labels)).any():
        result |= both_levels(scores, labels, classes, rows, threshold)
    data.write_atomically(out / "metrics.json", to_json(result).encode())
    return result


def both_levels(scores, labels, classes, rows, threshold):
    """summarise at volume level and, each scan the mean of its reconstructions, at scan level."""
    scans = [row.scan for row in rows]
    patients = {row.scan: row.patient for row in rows}
    return {
        "volume": summarise(scores, labels, classes, [row.patient for row in rows], threshold),
        "scan": summarise(by_scan(scores, scans), np.round(by_scan(labels, scans)), classes, [patients[scan] for scan in dict.fromkeys(scans)], threshold),
    }


def evaluate_volume(run, path, prompts=None, negative=False, pairs=PAIRS[:2], device=None):
    """Findings of one scan (.nii, .nii.gz, .npz), ranked: {"volume", "model", "findings": [{"abnormality", "score", "percentile"}], ...}.

    The percentile is the share of the training scans (the run's reference.safetensors) that score lower; None where the run has none.
    """
    run = Path(run)
    model = BrgSA.from_pretrained(run).to(device or default_device())
    asked = make_prompts(None if prompts else data.CT_RATE + data.CT_RATE_LT, prompts, negative)
    config, volume = model.config, data.read_volume(path)
    hu = data.preprocess(volume.hu, volume.spacing, config.spacing, config.shape, config.hu_range)
    with torch.inference_mode():
        v = model.encode_image(torch.from_numpy(hu)[None, None].to(model.bank.weight.device)).float().cpu()
    scores = score(model, v, asked, pairs)[0]
    result = {"volume": str(path), "model": str(run)}
    if config.trained_on == "phantom":
        result["warning"] = PHANTOM_WARNING
    percentiles = [None] * len(scores)
    reference = read_reference(run)
    if reference:
        theirs = score(model, reference["v"], asked, pairs, reference["v_hat"])                                               # (N, C)
        percentiles = (100 * ((theirs < scores).mean(0) + (theirs == scores).mean(0) / 2)).tolist()
    result["reference_scans"] = len(reference["v"]) if reference else 0
    findings = [{"abnormality": name, "score": float(value), "percentile": place} for name, value, place in zip(asked, scores, percentiles)]
    result["findings"] = sorted(findings, key=lambda f: (-(f["percentile"] or 0), -f["score"]))
    return result


def read_reference(run):
    """The embeddings of a run's training scans, {"v": (N, d), "v_hat": (N, d)}, or None."""
    path = Path(run) / "reference.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).float() for name in ("v", "v_hat")}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); delete it to do without percentiles") from None


def volume_table(result):
    """The terminal's table of one scan's findings."""
    width = max(len(finding["abnormality"]) for finding in result["findings"])
    lines = [f"note: {result['warning']}"] if "warning" in result else []
    lines += [f"higher than % of the {result['reference_scans']} training scans" if result["reference_scans"]
              else "no percentile: the run has no reference.safetensors, the training scans' embeddings"]
    for finding in result["findings"]:
        place = finding["percentile"]
        bar = "" if place is None else f"{place:6.1f}  {'#' * round(place / 5):20}"
        lines.append(f"{finding['abnormality']:{width}}  {bar}  {finding['score']:+.3f}")
    return "\n".join(lines)


# ---------------------------------------------------------------- command line

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a trained model: config.json, model.safetensors, tokenizer.json")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--manifest", type=Path, help="evaluate these volumes")
    what.add_argument("--volume", type=Path, help="rank the findings of this one scan (.nii, .nii.gz, .npz)")
    parser.add_argument("--split", help="the manifest's; default: valid where there is one, else all")
    parser.add_argument("--benchmark", choices=[*data.BENCHMARKS, "rad-chestct-all", "phantom"], help="which classes; default: the manifest's")
    parser.add_argument("--prompts", nargs="+", metavar="NAME", help="abnormalities, or one .json ({name: [prompts]}) or .txt (a name a line)")
    parser.add_argument("--negative", action="store_true", help='subtract the score of "There is no X"')
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS[:2]), help="the cosines that are averaged; default: v-t v_hat-t")
    parser.add_argument("--threshold", choices=["split-half", "oracle"], default="split-half",
                        help="from the other half of the patients, or (flattering) from the very labels that are scored")
    parser.add_argument("--cache", type=Path, help="folder of the preprocessed volumes; default: cache, beside the manifest")
    parser.add_argument("--out", type=Path, help="folder of the results; default: evaluation, in the run")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    if arguments.volume:
        result = evaluate_volume(arguments.run, arguments.volume, arguments.prompts, arguments.negative, arguments.pairs, arguments.device)
        print(to_json(result) if arguments.json else volume_table(result))
        return
    out = arguments.out or arguments.run / "evaluation"
    result = evaluate(arguments.run, arguments.manifest, arguments.split, out, arguments.benchmark, arguments.prompts,
                      arguments.negative, arguments.pairs, arguments.threshold, arguments.cache, arguments.device)
    if arguments.json:
        print(to_json(result))
        return
    if result["trained_on"] == "phantom":
        print(f"note: {PHANTOM_WARNING}")
    print(f"{result['volumes']} volumes of {result['scans']} scans of {result['patients']} patients, split {result['split']}; {len(result['skipped'])} skipped")
    print(table(result) if "volume" in result else "no labels, so no metrics")
    print(f"written: {out / 'scores.csv'}, {out / 'metrics.json'}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
