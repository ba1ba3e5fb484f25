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
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

import data
from heatmap import cells, heatmap, patient_box, to_scan, write_heatmap
from metrics import (METRICS, nanmean, auroc, best_thresholds, bootstrap, by_scan, delong, interval, linear_probe, map_at_k, modality_gap, per_class, project, retrieval,
                     split_half_thresholds, top_k)
from model import PAIRS, BrgSA, clean, default_device, joint_vectors, zero_shot_scores
from report import PHANTOM_WARNING, evaluation_table, heat_figure, planes_png, report_page, volume_page, volume_table

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


def describe_scores(scores, labels, classes, patients, threshold="split-half", n=1000, seed=0):
    """All metrics with 95 % patient-bootstrap intervals, per class and macro, as a dict that is JSON but for NaN.

    threshold: "split-half", "oracle", or thresholds (C,). Macro means are of the classes with both positive and negative cases, whose
    count stands beside them: of CT-RATE's 18 and of CT-RATE-LT's 15 apart where all classes are among these, else of all.
    """
    if isinstance(threshold, str):
        threshold = split_half_thresholds(scores, labels, patients) if threshold == "split-half" else best_thresholds(scores, labels)
    point, samples = per_class(scores, labels, threshold), bootstrap(scores, labels, patients, threshold, n, seed)
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
                {key: nanmean(point[key][columns]).item() for key in METRICS}, {key: nanmean(samples[key][:, columns]) for key in METRICS})}
    out["top_k"] = {}
    for k in (k for k in (1, 3, 5, 10) if k <= len(classes)):
        out["top_k"][f"recall@{k}"], out["top_k"][f"precision@{k}"] = top_k(scores, labels, k)
    return out


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
    """A manifest's rows of a split; by default of "test" or "valid" where there is one, else all. -> rows, the split's name or "all"."""
    rows = data.read_manifest(manifest, split)
    split = split or next((name for name in ("test", "valid") if any(row.split == name for row in rows)), None)
    return [row for row in rows if split in (None, row.split)], split or "all"


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
        out["retrieval"] = retrieval(*joint_vectors(v, v_hat, t, t_hat, self.pairs), [texts[i] for i in told]) | out.get("retrieval", {})
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
    drawn = [nanmean(bootstrap(s, labels, patients, np.zeros(len(shared)))["auroc"]) for s in (scores, theirs)]           # the same resamples
    columns = zip(shared, ours.tolist(), others.tolist(), p.tolist())
    return {"with": str(path), "classes": {name: {"auroc": a, "other": b, "p": q} for name, a, b, q in columns},
            "macro_difference": nanmean(ours - others).item(), "macro_difference_95": interval(drawn[0] - drawn[1]).tolist()}


def add_probe(result, study, manifest, rows, v, labels, classes):
    """Put the AUROC of a linear classifier, trained on another manifest's frozen embeddings and labels, beside the zero-shot one."""
    patients = {row.patient for row in rows}
    train = data.read_manifest(manifest)
    train = [row for row in train if row.split == "train"] or train
    train, v_train, _ = study.embed([row for row in train if row.patient not in patients])
    y = np.array([[row.labels.get(name, np.nan) for name in classes] for row in train])
    s = linear_probe(v_train, y, [row.patient for row in train], v)
    supervised = describe_scores(s, labels, classes, [row.patient for row in rows])
    for part in ("classes", "macro"):
        for name, values in result["volume"][part].items():
            values |= {key: supervised[part][name][key.removeprefix("probe_")] for key in ("probe_auroc", "probe_auroc_95")}
    result["probe"] = {"manifest": str(manifest), "volumes": len(train)}


def both_levels(scores, labels, classes, rows, threshold):
    """describe_scores at volume level and, each scan the mean of its reconstructions, at scan level."""
    scans = [f"{row.patient}/{row.scan}" for row in rows]
    patients = dict(zip(scans, (row.patient for row in rows)))                                                     # in the order of by_scan
    return {"volume": describe_scores(scores, labels, classes, [row.patient for row in rows], threshold),
            "scan": describe_scores(by_scan(scores, scans), np.round(by_scan(labels, scans)), classes, list(patients.values()), threshold)}


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
