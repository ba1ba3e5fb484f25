"""Zero-shot evaluation: scores, metrics with patient-level intervals, retrieval, modality gap.

    score(volume, "There is X") = mean of cos(v, t) and cos(v_hat, t)        v, t: embeddings, v_hat: v re-expressed from the bank

    python evaluate.py runs/phantom --manifest runs/phantom/data/manifest.csv
    python evaluate.py runs/phantom --volume scan.nii.gz --prompts "pleural effusion" "lung nodule"
"""
import argparse
import base64
import csv
import gzip
import hashlib
import io
import json
import math
import sys
from dataclasses import replace
from html import escape
from pathlib import Path

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
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
    NaN where a class lacks a positive or a negative, or there is but one patient; 1 where the two AUROCs are equal.
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
        if len(patients) == 1:
            return np.nan
        variance = (np.bincount(index, influence[positive | negative]) ** 2).sum() * len(patients) / (len(patients) - 1)
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
    with tqdm(total=len(rows), desc="embed", unit="volume", disable=not rows, leave=False) as progress:
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


def cached_embeddings(path, weights, model, rows, cache):
    """embed_volumes, each volume once: kept in path, a .safetensors that belongs to the model with these weights (their SHA-256)."""
    keys = [f"{cache.path(row).resolve()} {cache.path(row).stat().st_mtime_ns}" for row in rows]
    known = {}
    try:
        with safe_open(path, "pt") as file:
            if file.metadata()["model"] == weights:
                known = dict(zip(json.loads(file.metadata()["keys"]), file.get_tensor("v")))
    except (FileNotFoundError, SafetensorError, KeyError, TypeError):
        pass                                                                                  # absent or of another version: made anew
    todo = [(key, row) for key, row in zip(keys, rows) if key not in known]
    for start in range(0, len(todo), 256):                                                    # saved now and then: a killed run resumes
        part_keys, part_rows = zip(*todo[start:start + 256])
        known |= zip(part_keys, embed_volumes(model, part_rows, cache, model.bank.weight.device))
        record = {"model": weights, "keys": json.dumps(list(known))}
        data.write_atomically(path, save({"v": torch.stack(list(known.values()))}, record))
    return torch.stack([known[key] for key in keys])


def zero_shot_scores(v, v_hat, t, t_hat, pairs=PAIRS[:2]):
    """Mean cosine of the pairs: v, v_hat (N, d) of volumes, t, t_hat (P, d) of prompts -> (N, P); by default cos(v, t) and cos(v_hat, t)."""
    images, texts = joint(v, v_hat, t, t_hat, pairs)
    return images @ texts.mT


def joint(v, v_hat, t, t_hat, pairs=PAIRS[:2]):
    """Unit vectors (N, D), (P, D) whose inner product is the mean cosine of the pairs: each pair's two sides, side by side."""
    unit = {name: F.normalize(x, dim=-1) / len(pairs) ** 0.5 for name, x in (("v", v), ("v_hat", v_hat), ("t", t), ("t_hat", t_hat))}
    return (torch.cat([unit[pair.split("-")[side]] for pair in pairs], dim=-1) for side in (0, 1))


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
        except (ValueError, AttributeError, TypeError) as error:
            form = '{"Lung nodule": ["There is a lung nodule", ...]}'
            raise ValueError(f"{given[0]}: can't be read as prompts ({error}); the form is {form}") from None
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
    if set(prompt) != {"positive", "negative", "combine"} or not prompt["positive"] or not all(map(clean, [name, *texts])):
        raise ValueError(f"'{name}' asks {asked or 'nothing'}")
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
    without_score, without_row = set(names) - set(scores), set(scores) - set(names)
    if without_score or without_row:
        lacking, what = (sorted(without_score), f"not in {where}") if without_score else (sorted(without_row), f"in {where} but not in the manifest")
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
    out["top_k"] = {}
    for k in (k for k in (1, 3, 5, 10) if k <= len(classes)):
        out["top_k"][f"recall@{k}"], out["top_k"][f"precision@{k}"] = top_k(scores, labels, k)
    return out


def _nanmean(values):
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(-1) / np.where(known.any(-1), known.sum(-1), np.nan)


def table(result, level="volume"):
    """The terminal's table of one level of an evaluation."""
    keys = ("auprc", "f1", "accuracy", "precision", "recall", "specificity")
    named = [(name, values["positives"], values) for name, values in result[level]["classes"].items()]
    named += [(f"macro {name} ({values['classes']} of {values['of']})", "", values) for name, values in result[level]["macro"].items()]
    width = max(len(name) for name, _, _ in named)
    lines = [f"{'per ' + level:{width}}  positive  AUROC  95 % interval " + "".join(f"{key:>13}" for key in keys)]
    for name, count, values in named:
        ends = " to ".join(f"{_percent(end):>5}" for end in values["auroc_95"])
        lines.append(f"{name:{width}}  {count:>8}  {_percent(values['auroc']):>5}  {ends:14} " + "".join(f"{_percent(values[key]):>13}" for key in keys))
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


# ---------------------------------------------------------------- heat maps

def heatmap(model, hu, texts, method=None, pairs=PAIRS[:2]):
    """Where a preprocessed volume hu (X, Y, Z) supports the prompts `texts`: (gx, gy, gz), one value a patch.

    "similarity": cosine of each patch's projected feature with the prompts. "rollout" (ViT; the default there): attention weighted by the
    score's positive gradient, rolled out over the layers (Chefer et al. 2021). "gradcam" (CNN; the default there): features times their
    gradient (HiResCAM, Draelos and Carin 2020; at the last stage it is Grad-CAM, Selvaraju et al. 2017) of the deepest stage that still has
    eight cells along each axis, else of the first. Outside the patient's bounding box (HU > -300) there is no finding: the map's minimum.
    """
    vit = model.config.vision == "vit"
    own = "rollout" if vit else "gradcam"
    method = method or own
    if method not in ("similarity", own):
        raise ValueError(f"no '{method}' map for the vision encoder '{model.config.vision}'; similarity or {own} can be had")
    volumes = torch.as_tensor(np.array(hu))[None, None].to(model.bank.weight.device)
    with torch.no_grad():
        t = F.normalize(model.encode_text(texts), dim=-1).mean(0, keepdim=True)
        t_hat = model.bridge(t)
        if method == "similarity":
            patches = F.normalize(model.vision_projection(model.vision(model.normalise(volumes))[1]), dim=-1)
            return within_patient((patches @ F.normalize(t, dim=-1)[0])[0].cpu().numpy(), hu, model.config)
    seen, hooks = [], []
    if method == "rollout":
        for block in model.vision.blocks:
            hooks.append(block.attn.qkv.register_forward_hook(lambda module, args, output: seen.append([output])))
            hooks.append(block.attn.proj.register_forward_pre_hook(lambda module, args: seen[-1].append(args[0])))
    else:
        hooks += [block.register_forward_hook(lambda module, args, output: seen.append([None, output])) for block in model.vision.blocks]
    try:
        with torch.enable_grad():
            v = model.encode_image(volumes)
            total = zero_shot_scores(v, model.bridge(v), t, t_hat, pairs).sum()
            gradients = torch.autograd.grad(total, [output for _, output in seen])
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        if method == "rollout":
            grid = tuple(size // step for size, step in zip(volumes.shape[2:], model.config.patch))
            layers = [(qkv[0], gradient[0]) for (qkv, _), gradient in zip(seen, gradients)]
            return within_patient(rollout(layers, model.config.vit_heads)[1:].view(grid).cpu().numpy(), hu, model.config)
        stage = [i for i, (_, output) in enumerate(seen) if min(output.shape[2:]) >= 8 or output.shape == seen[0][1].shape][-1]
        return within_patient((seen[stage][1] * gradients[stage])[0].sum(0).relu().cpu().numpy(), hu, model.config)                 # (gx, gy, gz)


def patient_box(hu):
    """Slices (3,) of the bounding box of what is denser than -300 HU in hu (X, Y, Z); the whole where nothing is."""
    dense = np.asarray(hu) > -300
    lines = [np.flatnonzero(dense.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return tuple(slice(line[0], line[-1] + 1) if len(line) else slice(0, size) for line, size in zip(lines, dense.shape))


def within_patient(grid, hu, config):
    """A map (gx, gy, gz) with its minimum at the cells that lie outside the patient's box."""
    keep = grid.copy()
    for axis, (box, stride, offset) in enumerate(zip(patient_box(hu), *cells(grid, replace(config, shape=hu.shape)))):
        centres = np.arange(grid.shape[axis]) * stride + offset
        np.moveaxis(keep, axis, 0)[(centres < box.start - stride / 2) | (centres > box.stop - 1 + stride / 2)] = grid.min()
    return keep


def rollout(layers, heads, rows=256):
    """The CLS token's row of the product of (I + A_l) over the layers, A_l = mean over heads of relu(attention * its gradient): (N,).

    layers: of each, qkv (N, 3 C) and the gradient of the attention's output (N, C), first to last. As only one row is wanted, it goes
    through the layers from the last to the first, and of an attention matrix (N, N) only `rows` rows are ever there.
    """
    out = F.one_hot(torch.tensor(0), len(layers[0][0])).to(layers[0][0])
    for qkv, gradient in reversed(layers):
        q, k, v = qkv.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)                                                   # (heads, N, C / heads)
        gradient = gradient.unflatten(1, (heads, -1)).transpose(0, 1)
        step = torch.zeros_like(out)
        for part in out.nonzero()[:, 0].split(rows):
            attention = torch.softmax(q[:, part] @ k.mT / q.shape[-1] ** 0.5, dim=-1)
            step += out[part] @ (attention * (gradient[:, part] @ v.mT)).relu().mean(0)
        out = out + step
    return out


def cells(grid, config):
    """Where a map's cells lie in the preprocessed volume: voxels from one centre to the next, and the first centre, each (3,)."""
    if config.vision == "vit":
        return np.array(config.patch), (np.array(config.patch) - 1) / 2
    return 2 ** np.ceil(np.log2(np.divide(config.shape, grid.shape))), np.zeros(3)        # strided, padded convolutions start at voxel 0


def to_scan(grid, volume, config):
    """A heat map (gx, gy, gz) of the preprocessed volume, brought linearly to the voxels of the Volume it came from: 0 to 1, (X, Y, Z).

    Inverse of data.preprocess; voxels that it cropped away get 0.
    """
    weights = []
    for size, step, step_out, shape, stride, offset, n in zip(volume.hu.shape, volume.spacing, config.spacing, config.shape, *cells(grid, config), grid.shape):
        resampled = max(1, round(size * step / step_out))
        kept = min(resampled, shape)
        position = np.arange(size) * step / step_out - (resampled - kept) // 2 + (shape - kept) // 2            # voxel of the preprocessed
        weight = np.maximum(0, 1 - np.abs(np.clip((position - offset) / stride, 0, n - 1)[:, None] - np.arange(n)))
        weights.append((weight * ((position > -0.5) & (position < shape - 0.5))[:, None]).astype(np.float32))
    heat = np.einsum("xi,yj,zk,ijk->xyz", *weights, (grid - grid.min()).astype(np.float32), optimize=True)
    return heat / (heat.max() or 1)                                                   # scaled here: the map's maximum may lie in the padding


def write_heatmap(path, heat, volume, source):
    """Write a map (X, Y, Z) of a Volume as .nii.gz on the voxels of its source file, with that file's own affine and axes."""
    affine = volume.affine
    if not str(source).endswith(".npz"):
        affine = nibabel.load(source).affine
        turn = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("LPS"), nibabel.io_orientation(affine))
        heat = nibabel.orientations.apply_orientation(heat, turn)
    image = nibabel.Nifti1Image(np.round(255 * heat).astype(np.uint8), affine)
    image.header.set_slope_inter(1 / 255, 0)
    data.write_atomically(path, gzip.compress(image.to_bytes(), 3))


def planes_png(heat, volume, title=""):
    """PNG bytes: axial, coronal and sagittal plane of a Volume through the maximum of its map (X, Y, Z), as a radiologist hangs them."""
    at, hu, (dx, dy, dz) = np.unravel_index(heat.argmax(), heat.shape), volume.hu, volume.spacing
    cuts = [((slice(None), slice(None), at[2]), dy / dx, at[0], at[1], "upper"), ((slice(None), at[1]), dz / dx, at[0], at[2], "lower"),
            ((at[0],), dz / dy, at[1], at[2], "lower")]
    figure = Figure(figsize=(9, 3.1), facecolor="black")
    for axes, (cut, aspect, column, row, origin) in zip(figure.subplots(1, 3), cuts):
        axes.imshow(hu[cut].T, cmap="gray", vmin=-1000, vmax=400, aspect=aspect, origin=origin)
        axes.imshow(heat[cut].T, cmap="inferno", vmin=0, vmax=1, alpha=0.6 * heat[cut].T, aspect=aspect, origin=origin)
        axes.plot(column, row, "+", color="cyan", markersize=12)
        axes.axis("off")
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.9 if title else 0.995, 0.01)
    figure.suptitle(title, color="white", fontsize=10)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=90)
    return png.getvalue()


# ---------------------------------------------------------------- pages: one file each, without network, scripts or other files

STYLE = """
:root{--ink:#1c2430;--soft:#66707d;--line:#dde2e8;--blue:#2563b0;--orange:#c8641b;--pale:#dbe7f5}
*{box-sizing:border-box} body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:#fff;max-width:68rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0} h2{font-size:1.15rem;margin:2rem 0 .5rem;border-bottom:2px solid var(--line)}
p{max-width:46rem} small,.soft{color:var(--soft)} .note{background:#fdf1e0;padding:.5rem .8rem;border-left:4px solid var(--orange)}
.wide{overflow-x:auto} table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .5rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap} th:first-child,td:first-child{text-align:left}
tr.macro{font-weight:600;background:#f4f6f9} .big{display:flex;flex-wrap:wrap;gap:.6rem 2.5rem} .big b{font-size:2rem;display:block;line-height:1.2}
.bar{position:relative;display:block;width:9rem;height:.9rem;background:linear-gradient(var(--line),var(--line)) 50%/1px 100% no-repeat #f4f6f9}
.bar i,.bar b{position:absolute;top:.2rem;height:.5rem;background:#8db4de} .bar b{top:0;height:.9rem;width:3px;margin-left:-1px;background:var(--blue)}
.bar b.probe{background:var(--orange)} .grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:.8rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr));gap:1rem} figure{margin:0;font-size:.8rem;break-inside:avoid}
svg,img{width:100%;height:auto;display:block} code{font-size:.78rem;overflow-wrap:anywhere} dt{font-weight:600} dd{margin:0 0 .3rem}
@media print{body{max-width:none;padding:0;font-size:11px}h2{break-after:avoid}tr{break-inside:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def page(title, *parts):
    """One self-contained HTML page."""
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n")


def html_table(head, lines, macro=()):
    """Cells are HTML; the lines whose number is in `macro` are set apart."""
    body = "".join(f"<tr{' class=macro' if i in macro else ''}>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for i, line in enumerate(lines))
    return f"<div class=wide><table><thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead><tbody>{body}</tbody></table></div>"


def _bar(value, ends, probe=None):
    if math.isnan(value):
        return ""
    low, high = (100 * end for end in ends)
    marks = f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i><b style="left:{100 * value:.1f}%"></b>'
    if probe is not None and not math.isnan(probe):
        marks += f'<b class=probe style="left:{100 * probe:.1f}%"></b>'
    return f"<span class=bar>{marks}</span>"


def metrics_table(result):
    """The volume level's classes and macro means, AUROC as bars with their intervals."""
    probe = "probe" in result
    keys = ("auprc", "f1", "f1_weighted", "accuracy", "precision", "recall", "specificity")
    head = ["", "positive", "AUROC", "95 % interval", "0 <small>(chance ½)</small> 1", *(["linear probe"] if probe else []), *keys]
    macros, classes = result["volume"]["macro"], result["volume"]["classes"]
    named = [(f"macro {name} ({values['classes']} of {values['of']})", "", values) for name, values in macros.items()]
    lines = []
    for name, count, values in named + [(name, values["positives"], values) for name, values in classes.items()]:
        lines.append([escape(name), count, f"<b>{_percent(values['auroc'])}</b>", "–".join(map(_percent, values["auroc_95"])),
                      _bar(values["auroc"], values["auroc_95"], values.get("probe_auroc")),
                      *([_percent(values["probe_auroc"])] if probe else []), *(_percent(values[key]) for key in keys)])
    return html_table(head, lines, range(len(named)))


def roc_svg(scores, labels):
    """ROC curve of one class, thinned to at most some 100 points."""
    labels, scores = labels[~np.isnan(labels)], scores[~np.isnan(labels)]
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.r_[np.diff(scores[order]) != 0, True])
    found = np.cumsum(labels[order])[last]
    x, y = np.r_[0, (last + 1 - found) / (labels == 0).sum()], np.r_[0, found / labels.sum()]
    keep = np.unique(np.r_[np.arange(0, len(x), max(1, len(x) // 100)), len(x) - 1])
    points = " ".join(f"{100 * x[i]:.1f},{100 - 100 * y[i]:.1f}" for i in keep)
    return ('<svg viewBox="-2 -2 104 104"><rect width="100" height="100" fill="#f8f9fb" stroke="#dde2e8"/>'
            '<path d="M0 100L100 0" stroke="#c5ccd5" stroke-dasharray="2"/>'
            f'<polyline points="{points}" fill="none" stroke="#2563b0" stroke-width="1.8"/></svg>')


def gap_svg(images, texts):
    """Scatter picture of two sets of points in the plane: images blue, texts orange."""
    both = np.array(images + texts)
    low, size = both.min(0), max(np.ptp(both, axis=0).max(), 1e-9)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.1" fill="{colour}" fill-opacity=".55"/>'
            for points, colour in ((images, "#2563b0"), (texts, "#c8641b")) for x, y in (np.array(points) - low) * (150 / size)]
    height = 8 + 150 * np.ptp(both, axis=0)[1] / size
    return f'<svg viewBox="-4 -4 158 {height:.0f}"><rect x="-4" y="-4" width="158" height="158" fill="#f8f9fb"/>{"".join(dots)}</svg>'


def most_wrong(scores, labels, classes, rows, n=3):
    """The n worst misses and n worst false alarms, one a class and scan: (row number, class number, share of the opposite cases ranked wrong).

    Classes that the model knows count more (times AUROC): an error of a class at chance says nothing.
    """
    known, cases = auroc(scores, labels), {1: [], 0: []}
    for c in np.flatnonzero(~np.isnan(known)):
        places = _placements(scores[:, c], labels[:, c] == 1, labels[:, c] == 0)
        for truth, place in ((1, places[0]), (0, places[1])):
            worst = np.argmin(place)
            cases[truth].append((known[c] * (1 - place[worst]), np.flatnonzero(labels[:, c] == truth)[worst], c, 1 - place[worst]))
    chosen, scans = [], set()
    for truth in (1, 0):
        for _, i, c, wrong in sorted(cases[truth], reverse=True):
            if rows[i].scan not in scans and sum(labels[j, d] == truth for j, d, _ in chosen) < n:
                scans.add(rows[i].scan)
                chosen.append((i, c, wrong))
    return chosen


def heat_figure(png, caption):
    """A figure with an embedded PNG; the caption is HTML."""
    return f'<figure><img alt="heat map" src="data:image/png;base64,{base64.b64encode(png).decode()}"><figcaption>{caption}</figcaption></figure>'


def report_page(result, scores, labels, classes, rows, study=None):
    """report.html of an evaluation; the heat maps of the most wrong scans need the study's model."""
    parts = [f"<p class=note>Note: {PHANTOM_WARNING}.</p>" if result.get("trained_on") == "phantom" else "",
             f"<p>{result['volumes']} volumes of {result['scans']} scans of {result['patients']} patients, split {escape(result['split'])}; "
             f"{len(result['skipped'])} volumes skipped.</p>"]
    if "volume" in result:
        parts += [*_headline(result), "<h2>Zero-shot diagnosis</h2>", metrics_table(result), *_explain(result), "<h2>ROC curves</h2><div class=grid>"]
        for c, (name, values) in enumerate(result["volume"]["classes"].items()):
            if not math.isnan(values["auroc"]):
                caption = f"<figcaption>{escape(name)} <b>{_percent(values['auroc'])}</b></figcaption>"
                parts.append(f"<figure>{roc_svg(scores[:, c], labels[:, c])}{caption}</figure>")
        parts.append("</div>")
    parts += [*_compare(result), *_retrieval(result), *_gap(result), *_pointing(result)]
    if study and "volume" in result:
        parts += ["<h2>Most wrong</h2><div class=pair>", *wrong_figures(scores, labels, classes, rows, study), "</div>"]
    about = ("run", "model_sha256", "manifest", "manifest_sha256", "benchmark", "prompts_sha256", "pairs", "threshold")
    about = [f"<dt>{key.replace('_', ' ')}</dt><dd><code>{escape(str(result[key]))}</code></dd>" for key in about if result.get(key)]
    parts += ["<h2>What was evaluated</h2><dl>", *about, "</dl>"]
    return page("BrgSA: zero-shot evaluation", *parts)


def _headline(result):
    yield "<div class=big>"
    for name, values in result["volume"]["macro"].items():
        per_scan = result["scan"]["macro"].get(name, {}).get("auroc", math.nan)
        yield (f"<div><b>{_percent(values['auroc'])}</b>macro AUROC, {name}, {values['classes']} of {values['of']} classes<br>"
               f"<small>95 % interval {' to '.join(map(_percent, values['auroc_95']))}; per scan {_percent(per_scan)}</small></div>")
    yield "</div>"


def _explain(result):
    how = {"split-half": "the other half of the patients", "oracle": "the very labels that are scored, which flatters"}
    probe = "; orange: a linear classifier trained on the labels of other patients" if "probe" in result else ""
    yield (f"<p class=soft>In per cent, per volume. Bars: AUROC with its 95 % interval over 1,000 resamples of patients{probe}. "
           f"Thresholds come from {how.get(result['threshold'], escape(result['threshold']))}. "
           "A class that lacks positive or negative cases has no AUROC and is left out of the mean.</p>")
    top = result["scan"]["top_k"]
    yield html_table(["of a scan's highest classes", *top], [["per scan", *map(_percent, top.values())]])


def _compare(result):
    if "compare" in result:
        other = result["compare"]
        yield (f"<h2>Beside {escape(other['with'])}</h2><p>Macro AUROC difference {100 * other['macro_difference']:+.1f} "
               f"(95 % interval {' to '.join(f'{100 * end:+.1f}' for end in other['macro_difference_95'])}); p: DeLong's test over patients.</p>")
        lines = [[escape(name), _percent(c["auroc"]), _percent(c["other"]), f"{c['p']:.2g}"] for name, c in other["classes"].items()]
        yield html_table(["", "this", "other", "p"], lines)


def _retrieval(result):
    if "retrieval" in result:
        yield "<h2>Retrieval</h2>"
        for way, values in result["retrieval"].items():
            cells = [f"{value:g}" if key in ("median_rank", "candidates") else _percent(value) for key, value in values.items()]
            yield html_table(["", *(key.replace("_", " ") for key in values)], [[way.replace("_", " "), *cells]])
        yield ("<p class=soft>Recall in per cent, by the same cosines as the scores. Volume to volume: right is another patient's volume that "
               "shares an abnormality.</p>")


def _gap(result):
    if "gap" in result:
        yield "<h2>Modality gap</h2><div class=pair>"
        for when, what in (("before", "before the bank (v, t)"), ("after", "after it (v_hat, t_hat)")):
            numbers = ", ".join(f"{key.replace('_', ' ')} {value:.2f}" for key, value in result["gap"][when].items())
            yield f"<figure>{gap_svg(*result['gap_picture'][when])}<figcaption>{what}: {numbers}</figcaption></figure>"
        yield ('</div><p class=soft>Two principal components; <span style="color:#2563b0">volumes</span>, <span style="color:#c8641b">texts</span>. '
               "Separability: held-out accuracy of telling one from the other, 0.5 = no gap.</p>")


def _pointing(result):
    if result.get("pointing"):
        lines = [[escape(name), p["volumes"], *(_percent(p[key]) for key in ("hit", "chance", "elsewhere"))] for name, p in result["pointing"].items()]
        yield "<h2>Do heat maps point?</h2><p>How often, in per cent, a map's maximum lies within one patch of the drawn lesion.</p>"
        yield html_table(["", "volumes", "this volume's map", "chance", "another volume's map"], lines)


def wrong_figures(scores, labels, classes, rows, study):
    """The most wrong scans, each with the heat map of the abnormality that was missed or seen."""
    for i, c, wrong in most_wrong(scores, labels, classes, rows):
        volume = rows[i].read()
        grid = heatmap(study.model, study.cache.read(rows[i]), study.asked[classes[c]]["positive"], pairs=study.pairs)
        kind = "missed: scored below {} % of the scans without it" if labels[i, c] else "false alarm: scored above {} % of the scans with it"
        caption = f"<b>{escape(classes[c])}</b>, {kind.format(_percent(wrong))}<br><code>{escape(rows[i].name)}</code>"
        yield heat_figure(planes_png(to_scan(grid, volume, study.model.config), volume), caption)


def volume_page(result, figures=()):
    """report.html of one scan: the ranked findings and the heat maps' figures."""
    lines = [[escape(finding["abnormality"]), "–" if finding["percentile"] is None else f"{finding['percentile']:.0f}",
              "" if finding["percentile"] is None else _bar(finding["percentile"] / 100, [0, finding["percentile"] / 100]), f"{finding['score']:+.3f}"]
             for finding in result["findings"]]
    ranked = f"Findings ranked by their place among the scores of {result['reference_scans']} training scans."
    return page(f"BrgSA: {Path(result['volume']).name}", f"<p class=note>Note: {result['warning']}.</p>" if "warning" in result else "",
                f"<p>{ranked if result['reference_scans'] else 'No percentile: the run lacks its training scans.'} A research tool, not a medical device.</p>",
                html_table(["", "higher than %", "", "score"], lines), "<h2>Where</h2><div class=pair>", *figures, "</div>",
                f"<h2>Model</h2><p><code>{escape(result['model'])}</code></p>")


# ---------------------------------------------------------------- the evaluations

def select_rows(manifest, split=None):
    """A manifest's rows of a split; by default of "test" or "valid" where there is one, else all. -> rows, the split's name or "all"."""
    rows = data.read_manifest(manifest, split)
    split = split or next((name for name in ("test", "valid") if any(row.split == name for row in rows)), None)
    return [row for row in rows if split in (None, row.split)], split or "all"


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def classes_of(rows, benchmark=None, prompts=None):
    """The classes of the benchmark, else (None) those that the prompts name, else the rows' labels, else CT-RATE's and CT-RATE-LT's 33."""
    if benchmark in data.BENCHMARKS or prompts:
        return data.BENCHMARKS.get(benchmark)
    return list(dict.fromkeys(name for row in rows for name in row.labels)) or data.CT_RATE + data.CT_RATE_LT


def evaluate(run, manifest, split=None, out=None, benchmark=None, prompts=None, negative=False, pairs=PAIRS[:2], threshold="split-half",
             cache=None, device=None, scores=None, compare=None, probe=None, summaries=None):
    """Score a manifest's split zero-shot with the model of a run; writes scores.csv, metrics.json and report.html to out.

    With scores, a scores.csv of any model, nothing is computed from volumes and run may be None. threshold: split-half, oracle, or the
    scores.csv of another split of the manifest. compare: another model's scores.csv. probe: a manifest with labels to train a linear
    classifier on (its split train where it has one). summaries: summaries.jsonl, the texts for retrieval and the gap instead of reports.
    Returns what metrics.json holds; "volume" and "scan" (mean over reconstructions) each have the classes' and the macro metrics.
    """
    rows, split = select_rows(manifest, split)
    result = {"run": str(run or scores), "manifest": str(manifest), "manifest_sha256": sha256_of(manifest), "split": split, "benchmark": benchmark}
    out, skipped, study = Path(out or Path(run or Path(scores).parent) / "evaluation"), [], None
    if scores is None:
        asked = make_prompts(classes_of(rows, benchmark, prompts), prompts, negative)
        study = Study(run, manifest, cache, device, pairs, asked)
        rows, v, skipped = study.embed(rows)
        scores = out / "scores.csv"
        write_scores(scores, [row.name for row in rows], list(asked), score(study.model, v, asked, pairs))
        result |= study.describe() | study.texts_and_volumes(rows, v, summaries)
        masks = Path(manifest).parent / "masks"
        if study.model.config.trained_on == "phantom" and masks.is_dir():
            result["pointing"] = study.pointing(rows, masks)
    scored = read_scores(scores)
    s, labels, classes = join(scored, rows, data.BENCHMARKS.get(benchmark), scores)
    result |= {"volumes": len(rows), "scans": len({row.scan for row in rows}), "patients": len({row.patient for row in rows}),
               "skipped": [list(item) for item in skipped], "threshold": str(threshold)}
    if (~np.isnan(labels)).any():
        if threshold not in ("split-half", "oracle"):
            threshold = thresholds_from(threshold, manifest, rows, classes)
        result |= both_levels(s, labels, classes, rows, threshold)
        if probe and study:
            add_probe(result, study, probe, rows, v, labels, classes)
        if compare:
            result["compare"] = comparison(s, join(read_scores(compare), rows, classes, compare), labels, classes, rows, compare)
    data.write_atomically(out / "report.html", report_page(result, s, labels, classes, rows, study).encode())
    result.pop("gap_picture", None)
    data.write_atomically(out / "metrics.json", to_json(result).encode())
    return result


class Study:
    """A run's model, where its volumes are cached, and what is asked of it."""

    def __init__(self, run, manifest, cache, device, pairs, asked):
        self.run, self.manifest, self.pairs, self.asked = Path(run), Path(manifest), pairs, asked
        self.model = BrgSA.from_pretrained(run).to(device or default_device())
        self.weights = sha256_of(self.run / "model.safetensors")
        config = self.model.config
        self.cache = data.Cache(cache or self.manifest.parent / "cache", config.spacing, config.shape, config.hu_range)

    def embed(self, rows):
        """Rows that can be read, their v (N, d), and the skipped as (name, reason)."""
        rows, skipped = data.prepare(rows, self.cache)
        if not rows:
            raise ValueError(f"{self.manifest}: none of its {len(skipped)} volumes can be read; the first: {skipped[0][1]}")
        return rows, cached_embeddings(self.run / "embeddings.safetensors", self.weights, self.model, rows, self.cache), skipped

    def describe(self):
        """What metrics.json says of the model and of the question."""
        return {"model_sha256": self.weights, "trained_on": self.model.config.trained_on, "prompts": self.asked,
                "prompts_sha256": hashlib.sha256(json.dumps(self.asked, sort_keys=True).encode()).hexdigest(), "pairs": list(self.pairs)}

    def pointing(self, rows, masks, names=("Lung nodule", "Lung mass", "Pleural effusion", "Consolidation"), most=25):
        """Do heat maps point? Of the phantom's volumes with a lesion of a name, the share whose map has its maximum within one patch of it.

        masks: folder of the phantom's lesion masks (NAME.nii.gz, bit k = the k-th of the 33). "chance" is the mean share of the body's
        bounding box that lies within one patch of the lesion; "elsewhere" the share for the map of another volume with such a lesion.
        """
        config, kinds, out = self.model.config, data.CT_RATE + data.CT_RATE_LT, {}
        rows = [row for row in rows if (Path(masks) / f"{row.name}.nii.gz").exists()]
        for name in (name for name in names if name in self.asked):
            hits, chances, others, last = [], [], [], None
            for row in [row for row in rows if row.labels.get(name) == 1][:most]:
                drawn = data.read_volume(Path(masks) / f"{row.name}.nii.gz")
                lesion = 1000 * (drawn.hu.astype(np.int64) >> kinds.index(name) & 1).astype(np.int16)
                lesion = data.preprocess(lesion, drawn.spacing, config.spacing, config.shape, (0, 1000))
                near = torch.from_numpy(lesion)[None].float()
                for axis, step in enumerate(config.patch):                                                    # a box's maximum, axis by axis
                    near = F.max_pool3d(near, [2 * step + 1 if i == axis else 1 for i in range(3)], 1, [step if i == axis else 0 for i in range(3)])
                near = near[0].numpy() > 100
                hu = self.cache.read(row)
                grid = heatmap(self.model, hu, self.asked[name]["positive"], pairs=self.pairs)
                stride, offset = cells(grid, config)
                at = tuple(np.minimum(np.array(np.unravel_index(grid.argmax(), grid.shape)) * stride + offset, np.array(hu.shape) - 1).astype(int))
                hits.append(near[at])
                chances.append(near[patient_box(hu)].mean())
                others += [near[last]] if last else []
                last = at
            if hits:
                out[name] = {"volumes": len(hits)} | {key: float(np.mean(values or math.nan)) for key, values in
                                                      (("hit", hits), ("chance", chances), ("elsewhere", others))}
        return out

    def texts_and_volumes(self, rows, v, summaries=None):
        """Retrieval, the modality gap before and after the bank, and its picture, of the rows that have a text."""
        summaries = data.read_summaries(summaries) if summaries else {}
        texts = [summaries.get(data.report_sha256(row.report), row.report) for row in rows]
        told = [i for i, text in enumerate(texts) if clean(text)]
        labels = np.array([[row.labels.get(name, np.nan) for name in rows[0].labels] for row in rows]).reshape(len(rows), -1)
        out = {}
        if (labels == 1).any():
            out["retrieval"] = {"volume_to_volume": map_at_k(v, labels, [row.patient for row in rows])}
        if len({texts[i] for i in told}) < 2:
            return out
        v, t = v[told], embed_texts(self.model, [texts[i] for i in told])
        v_hat, t_hat = bridge(self.model, v), bridge(self.model, t)
        out["retrieval"] = retrieval(*joint(v, v_hat, t, t_hat, self.pairs), [texts[i] for i in told]) | out.get("retrieval", {})
        out["gap"] = {"before": modality_gap(v, t), "after": modality_gap(v_hat, t_hat)}
        few = np.random.default_rng(0).permutation(len(told))[:400]
        out["gap_picture"] = {name: [np.round(points, 3).tolist() for points in project(a[few], b[few])]
                              for name, a, b in (("before", v, t), ("after", v_hat, t_hat))}
        return out


def thresholds_from(path, manifest, rows, classes):
    """Thresholds (C,) fitted on another split's scores.csv, whose labels are in the same manifest."""
    scores = read_scores(path)
    others = [row for row in data.read_manifest(manifest) if row.name in scores]
    shared = {row.patient for row in others} & {row.patient for row in rows}
    if shared:
        raise ValueError(f"{path}: patients {', '.join(sorted(shared)[:10])} are among those evaluated; other patients or --threshold oracle are needed")
    return best_thresholds(*join(scores, others, classes, path)[:2])


def comparison(scores, joined, labels, classes, rows, path):
    """This model beside another on the same cases: AUROC of both, DeLong's p over patients, the macro difference with its interval."""
    theirs, _, shared = joined
    mine = [classes.index(name) for name in shared]
    scores, labels, patients = scores[:, mine], labels[:, mine], [row.patient for row in rows]
    ours, others, p = auroc(scores, labels), auroc(theirs, labels), delong(scores, theirs, labels, patients)
    drawn = [_nanmean(bootstrap(s, labels, patients, np.zeros(len(shared)))["auroc"]) for s in (scores, theirs)]           # the same resamples
    columns = zip(shared, ours.tolist(), others.tolist(), p.tolist())
    return {"with": str(path), "classes": {name: {"auroc": a, "other": b, "p": q} for name, a, b, q in columns},
            "macro_difference": _nanmean(ours - others).item(), "macro_difference_95": interval(drawn[0] - drawn[1]).tolist()}


def add_probe(result, study, manifest, rows, v, labels, classes):
    """Put the AUROC of a linear classifier, trained on another manifest's frozen embeddings and labels, beside the zero-shot one."""
    patients = {row.patient for row in rows}
    train = data.read_manifest(manifest)
    train = [row for row in train if row.split == "train"] or train
    train, v_train, _ = study.embed([row for row in train if row.patient not in patients])
    y = np.array([[row.labels.get(name, np.nan) for name in classes] for row in train])
    s = linear_probe(v_train, y, [row.patient for row in train], v)
    supervised = summarise(s, labels, classes, [row.patient for row in rows])
    for part in ("classes", "macro"):
        for name, values in result["volume"][part].items():
            values |= {key: supervised[part][name][key.removeprefix("probe_")] for key in ("probe_auroc", "probe_auroc_95")}
    result["probe"] = {"manifest": str(manifest), "volumes": len(train)}


def linear_probe(v_train, labels, patients, v):
    """Ridge classifiers on L2-normalised embeddings: v_train (M, d), labels (M, C), NaN = unknown -> scores (N, C) of v (N, d).

    The penalty is the one with the best macro AUROC on half of the training patients when fitted on the other half.
    """
    x, new = F.normalize(v_train, dim=-1).double(), F.normalize(v, dim=-1).double()
    held_out = torch.from_numpy(np.unique(np.asarray(patients), return_inverse=True)[1] % 2 == 1)

    def fit(x, labels, new, strength):
        out = np.zeros((len(new), labels.shape[1]))
        masks, which = np.unique(~np.isnan(labels), axis=1, return_inverse=True)                  # classes known for the same volumes: one fit
        for i, mask in enumerate(masks.T):
            if mask.any():
                weight, bias = ridge(x[mask], torch.from_numpy(labels[mask][:, which.ravel() == i]), strength)
                out[:, which.ravel() == i] = (new @ weight + bias).numpy()
        return out

    def trial(strength):
        return np.nan_to_num(_nanmean(auroc(fit(x[~held_out], labels[~held_out], x[held_out], strength), labels[held_out])))

    return fit(x, labels, new, max((1e-2, 0.1, 1, 10, 100), key=trial))


def both_levels(scores, labels, classes, rows, threshold):
    """summarise at volume level and, each scan the mean of its reconstructions, at scan level."""
    scans = [f"{row.patient}/{row.scan}" for row in rows]
    patients = dict(zip(scans, (row.patient for row in rows)))                                                     # in the order of by_scan
    return {"volume": summarise(scores, labels, classes, [row.patient for row in rows], threshold),
            "scan": summarise(by_scan(scores, scans), np.round(by_scan(labels, scans)), classes, list(patients.values()), threshold)}


def evaluate_volume(run, path, prompts=None, negative=False, pairs=PAIRS[:2], device=None, out=None, method=None):
    """Findings of one scan (.nii, .nii.gz, .npz), ranked: {"volume", "model", "findings": [{"abnormality", "score", "percentile"}], ...}.

    The percentile is the share of the training scans (the run's reference.safetensors) that score lower; None where the run has none.
    With out, a folder: report.html and, of the named prompts or else of the first three findings, a heat map in the scan's own space.
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
    if out:
        figures = []
        for finding in result["findings"][:None if prompts else 3]:
            name = finding["abnormality"]
            heat = to_scan(heatmap(model, hu, asked[name]["positive"], method, pairs), volume, config)
            finding["heatmap"] = str(Path(out) / f"{clean(name).replace(' ', '_')}.nii.gz")
            write_heatmap(finding["heatmap"], heat, volume, path)
            png = planes_png(heat, volume, name)
            data.write_atomically(finding["heatmap"].replace(".nii.gz", ".png"), png)
            figures.append(heat_figure(png, escape(finding["heatmap"])))
        data.write_atomically(Path(out) / "report.html", volume_page(result, figures).encode())
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


def evaluation_table(result):
    """What the terminal shows of an evaluation."""
    lines = [f"note: {PHANTOM_WARNING}"] if result.get("trained_on") == "phantom" else []
    lines += [f"{result['volumes']} volumes of {result['scans']} scans of {result['patients']} patients, split {result['split']}; {len(result['skipped'])} skipped"]
    lines += [table(result) if "volume" in result else "no labels, so no metrics"]
    for name, values in result.get("scan", {}).get("macro", {}).items():
        probe = f"; of a linear probe, per volume: {_percent(result['volume']['macro'][name]['probe_auroc'])}" if "probe" in result else ""
        lines.append(f"macro AUROC per scan, {name}: {_percent(values['auroc'])}{probe}")
    if "compare" in result:
        ends = " to ".join(f"{100 * end:+.1f}" for end in result["compare"]["macro_difference_95"])
        lines.append(f"macro AUROC difference to {result['compare']['with']}: {100 * result['compare']['macro_difference']:+.1f} ({ends})")
    for name, point in result.get("pointing", {}).items():
        lines.append(f"heat maps of {name.lower()} point at it in {_percent(point['hit'])} % of {point['volumes']} volumes; chance {_percent(point['chance'])} %")
    return "\n".join(lines)


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

def embed(run, manifest, out, split=None, cache=None, device=None):
    """Write the embeddings v, v_hat (N, d) of a manifest's volumes, their names in the metadata ("names", JSON); -> how many."""
    study = Study(run, manifest, cache, device, PAIRS[:2], None)
    rows, v, _ = study.embed(data.read_manifest(manifest, split))
    data.write_atomically(out, save({"v": v, "v_hat": bridge(study.model, v)}, {"names": json.dumps([row.name for row in rows])}))
    return len(rows)


def command(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="the folder of a trained model: config.json, model.safetensors, tokenizer.json")
    parser.add_argument("--manifest", type=Path, help="evaluate these volumes")
    parser.add_argument("--volume", type=Path, help="rank the findings of this one scan (.nii, .nii.gz, .npz)")
    parser.add_argument("--scores", type=Path, help="evaluate this scores.csv, of any model, with the manifest's labels; needs no run")
    parser.add_argument("--split", help="the manifest's; default: test or valid where there is one, else all")
    parser.add_argument("--benchmark", choices=[*data.BENCHMARKS, "rad-chestct-all", "phantom"], help="which classes; default: the manifest's")
    parser.add_argument("--prompts", nargs="+", metavar="NAME", help="abnormalities, or one .json ({name: [prompts]}) or .txt (a name a line)")
    parser.add_argument("--negative", action="store_true", help='subtract the score of "There is no X"')
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS[:2], help="the cosines that are averaged; default: v-t v_hat-t")
    parser.add_argument("--threshold", default="split-half", help="from the other half of the patients (split-half), from another split's "
                        "scores.csv, or from the very labels that are scored (oracle; flattering)")
    parser.add_argument("--compare", type=Path, metavar="SCORES", help="another model's scores.csv: DeLong's test")
    parser.add_argument("--probe", type=Path, metavar="MANIFEST", help="train a linear classifier on its split train, as a supervised yardstick")
    parser.add_argument("--summaries", type=Path, help="summaries.jsonl: the texts for retrieval and the gap, instead of the reports")
    parser.add_argument("--embed", action="store_true", help="only write the manifest's embeddings to --out, a .safetensors")
    parser.add_argument("--heatmap", nargs="?", const="default", choices=["default", "similarity", "rollout", "gradcam"],
                        help="with --volume: maps in the scan's own space and a page, in --out; default: rollout (ViT), gradcam (CNN)")
    parser.add_argument("--cache", type=Path, help="folder of the preprocessed volumes; default: cache, beside the manifest")
    parser.add_argument("--out", type=Path, help="folder of the results; default: evaluation, in the run (with --volume: none)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args(argv)
    if bool(a.volume) == bool(a.manifest) or not (a.run or a.scores and a.manifest) or a.embed and not (a.manifest and a.out):
        parser.error("RUN with --manifest or with --volume, or --scores with --manifest, is needed; with --embed also --out")
    if a.embed:
        print(f"{a.out}: embeddings of {embed(a.run, a.manifest, a.out, a.split, a.cache, a.device)} volumes")
    elif a.volume:
        out = a.out or (a.run / "evaluation" / a.volume.name.split(".")[0] if a.heatmap else None)
        result = evaluate_volume(a.run, a.volume, a.prompts, a.negative, a.pairs, a.device, out, None if a.heatmap == "default" else a.heatmap)
        print(to_json(result) if a.json else volume_table(result) + (f"\nwritten: {out / 'report.html'} and heat maps beside it" if out else ""))
    else:
        out = a.out or (a.run or a.scores.parent) / "evaluation"
        result = evaluate(a.run, a.manifest, a.split, out, a.benchmark, a.prompts, a.negative, a.pairs, a.threshold, a.cache, a.device,
                          a.scores, a.compare, a.probe, a.summaries)
        print(to_json(result) if a.json else evaluation_table(result) + f"\nwritten: {out / 'report.html'}, metrics.json and scores.csv beside it")


def main(argv=None):
    """Run the command; its exit status, 2 with one line on standard error where the input is wrong."""
    try:
        command(argv)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
