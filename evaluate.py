"""Zero-shot evaluation of a run on a manifest, or on one scan.

    score(volume, "There is X") = mean of cos(v, t) and cos(v_hat, t)
    v, t: embeddings of volume and prompt; v_hat: v re-expressed from the knowledge bank

    python evaluate.py runs/phantom --manifest runs/phantom-data/manifest.csv
    python evaluate.py runs/phantom --volume scan.nii.gz --prompts "pleural effusion" "lung nodule"
"""
import argparse
import hashlib
import json
import math
import sys
from html import escape
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

import data
from cmki import bank_usage, nearest_prompts
from heatmap import heatmap, pointing, to_scan, write_heatmap
from metrics import (
    METRICS,
    auroc,
    best_thresholds,
    bootstrap,
    by_scan,
    delong,
    interval,
    linear_probe,
    map_at_k,
    modality_gap,
    nanmean,
    per_class,
    project,
    retrieval,
    split_half_thresholds,
    top_k,
)
from model import PAIRS, BrgSA, clean, default_device, joint_vectors, zero_shot_scores
from report import (
    PHANTOM_WARNING,
    evaluation_table,
    heat_figure,
    planes_png,
    report_page,
    volume_page,
    volume_table,
)

# ---- 1. Embeddings -------------------------------------------------------------------------------

@torch.inference_mode()
def embed_volumes(model, rows, cache, device="cpu"):
    """Embeddings v (N, d), float32 on the CPU, of the rows' whole cached volumes."""
    batch = max(1, 2**24 // math.prod(model.config.shape))
    volumes = torch.utils.data.DataLoader(data.Volumes(rows, cache), batch_size=batch)
    model, v = model.to(device).eval(), [torch.empty(0, model.config.dim)]
    with tqdm(total=len(rows), desc="embed", unit="volume", disable=not rows, leave=False) as bar:
        for hu in volumes:
            v.append(model.encode_image(hu.to(device)).float().cpu())
            bar.update(len(hu))
    return torch.cat(v)


@torch.inference_mode()
def embed_texts(model, texts, batch=64):
    """Embeddings t (N, d), float32 on the CPU, of a list of str; each distinct text once."""
    distinct, t = sorted(sorted(set(texts)), key=len), []
    for i in range(0, len(distinct), batch):
        t.append(model.encode_text(distinct[i:i + batch]).float().cpu())
    place = {text: i for i, text in enumerate(distinct)}
    return torch.cat(t)[[place[text] for text in texts]]


@torch.inference_mode()
def bridge(model, x):
    """Embeddings (N, d) re-expressed from the model's knowledge bank, on the CPU."""
    device = model.bank.weight.device
    return torch.cat([model.bridge(part.to(device)).float().cpu() for part in x.split(4096)])


def cached_embeddings(path, weights, model, rows, cache):
    """embed_volumes, each volume once: kept in a .safetensors for the weights with this SHA-256."""
    files = [cache.path(row) for row in rows]
    keys = [f"{file.resolve()} {file.stat().st_mtime_ns}" for file in files]
    known = {}
    try:
        with safe_open(path, "pt") as file:
            if file.metadata()["model"] == weights:
                known = dict(zip(json.loads(file.metadata()["keys"]), file.get_tensor("v")))
    except (FileNotFoundError, SafetensorError, KeyError, TypeError):
        pass  # absent or of another version: made anew
    todo = [(key, row) for key, row in zip(keys, rows) if key not in known]
    for start in range(0, len(todo), 256):  # saved now and then: a killed run resumes
        part_keys, part_rows = zip(*todo[start:start + 256])
        v = embed_volumes(model, part_rows, cache, model.bank.weight.device)
        known |= zip(part_keys, v)
        record = {"model": weights, "keys": json.dumps(list(known))}
        content = save({"v": torch.stack(list(known.values()))}, record)
        data.write_atomically(path, content)
    return torch.stack([known[key] for key in keys])


# ---- 2. Prompts and scores -----------------------------------------------------------------------

PROMPT = {"positive": [], "negative": [], "combine": "mean"}
# RAD-ChestCT's one class for two of CT-RATE's.
CALCIFICATION = PROMPT | {
    "positive": [
        "There is arterial wall calcification", "There is coronary artery wall calcification",
    ],
    "combine": "max",
}


def make_prompts(classes, given=None, negative=False):
    """What is asked for each class: {class: {"positive": [...], "negative": [...], "combine"}}.

    combine: "mean" or "max" over the positive prompts. given: names, or one file: a .json of
    {class: text, list of texts or such a dict}, or a text file with one name a line. It replaces
    the prompts of the classes that it names, or, with classes None, says what the classes are.
    negative: each class without negative prompts gets "There is no X", whose score is subtracted.
    """
    named = {}
    if given and len(given) == 1 and given[0].endswith((".json", ".txt")):
        text = Path(given[0]).read_text(encoding="utf-8")
        try:
            if given[0].endswith(".json"):
                asked = json.loads(text)
            else:
                asked = dict.fromkeys(filter(None, map(str.strip, text.splitlines())))
            named = {name: _prompt(name, entry) for name, entry in asked.items()}
        except (ValueError, AttributeError, TypeError) as error:
            form = '{"Lung nodule": ["There is a lung nodule", ...]}'
            reason = f"can't be read as prompts ({error}); the form is {form}"
            raise ValueError(f"{given[0]}: {reason}") from None
    elif given:
        named = {name: _prompt(name, None) for name in given}
    prompts = {name: named.get(name) or _prompt(name, None) for name in classes or named}
    for name, prompt in prompts.items():
        if negative and not prompt["negative"]:
            prompt["negative"] = [f"There is no {name}"]
    if not prompts:
        raise ValueError("no class to ask for")
    return prompts


def _prompt(name, asked):
    """The prompt of a class from a text, a list of texts, a dict, or None for the usual one."""
    prompt = PROMPT | {"positive": [f"There is {name}"]}
    if asked is None and name == "Calcification":
        prompt = CALCIFICATION
    elif isinstance(asked, (str, list)):
        prompt = prompt | {"positive": [asked] if isinstance(asked, str) else asked}
    elif asked:
        prompt = prompt | asked
    texts = prompt["positive"] + prompt["negative"]
    is_whole = set(prompt) == set(PROMPT) and prompt["positive"]
    if not is_whole or not all(map(clean, [name, *texts])):
        raise ValueError(f"'{name}' asks {asked or 'nothing'}")
    return dict(prompt)


def score(model, v, prompts, pairs=PAIRS[:2], v_hat=None):
    """Scores (N, C) of embedded volumes v (N, d) for the prompts of C classes.

    The mean (or maximum) over a class's positive prompts less the mean over its negative ones.
    """
    texts = []
    for prompt in prompts.values():
        texts += prompt["positive"] + prompt["negative"]
    t = embed_texts(model, texts)
    v_hat = bridge(model, v) if v_hat is None else v_hat
    each = zero_shot_scores(v, v_hat, t, bridge(model, t), pairs).double().numpy()    # (N, P)
    columns, first = [], 0
    for prompt in prompts.values():
        middle = first + len(prompt["positive"])
        last = middle + len(prompt["negative"])
        positive = each[:, first:middle]
        column = positive.max(1) if prompt["combine"] == "max" else positive.mean(1)
        if last > middle:
            column = column - each[:, middle:last].mean(1)
        columns.append(column)
        first = last
    return np.stack(columns, axis=1)


# ---- 3. Scores and labels, joined by name --------------------------------------------------------

def write_scores(path, names, classes, scores):
    """scores.csv: name, then one column a class; scores (N, C) with all their digits."""
    lines = [["name", *classes]]
    for name, line in zip(names, np.asarray(scores, np.float64).tolist()):
        lines.append([name, *map(repr, line)])
    data.write_csv(path, lines)


def read_scores(path):
    """scores.csv -> {name: {class: score}}; ValueError names the row that isn't right."""
    scores = {}
    for number, line in enumerate(data.read_csv(path, "name"), 2):
        name = line.pop("name")
        try:
            values = {key: float(value) for key, value in line.items()}
        except (TypeError, ValueError):
            values = {"": math.nan}
        if name in scores:
            raise ValueError(f"{path}, row {number}: '{name}' stands twice")
        if not all(map(math.isfinite, values.values())):
            raise ValueError(f"{path}, row {number}: '{name}' has a score that is no finite number")
        scores[name] = values
    if not scores or not next(iter(scores.values())):
        raise ValueError(f"{path}: holds no scores")
    return scores


def join(scores, rows, classes=None, where="the scores"):
    """Scores by name and manifest rows -> scores (N, C), labels (N, C), classes, in row order.

    Classes are those given, else of the rows' labels, that are scored. Raises ValueError with the
    first ten names without a partner.
    """
    names = {row.name for row in rows}
    for lacking, what in (
        (names - set(scores), f"not in {where}"),
        (set(scores) - names, f"in {where} but not in the manifest"),
    ):
        if lacking:
            first = ", ".join(sorted(lacking)[:10]) + (", ..." if len(lacking) > 10 else "")
            raise ValueError(f"{len(lacking)} volumes are {what}: {first}")
    scored = next(iter(scores.values()))
    classes = [name for name in classes or data.classes_of(rows) if name in scored]
    values = np.empty((len(rows), len(classes)))
    for row, line in zip(rows, values):
        line[:] = [scores[row.name][name] for name in classes]
    return values, data.labels_matrix(rows, classes), classes


def describe_scores(scores, labels, classes, patients, threshold="split-half", n=1000, seed=0):
    """All metrics with 95 % intervals over patients, per class and macro, as a dict.

    threshold: "split-half", "oracle", or thresholds (C,). Macro means are of the classes with both
    positive and negative cases, whose count stands beside them: of CT-RATE's 18 and of CT-RATE-LT's
    15 apart where all classes are among these, else of all.
    """
    if isinstance(threshold, str) and threshold == "split-half":
        threshold = split_half_thresholds(scores, labels, patients)
    elif isinstance(threshold, str):
        threshold = best_thresholds(scores, labels)
    point = per_class(scores, labels, threshold)
    samples = bootstrap(scores, labels, patients, threshold, n, seed)
    undefined = np.isnan(samples["auroc"])  # a resample without one kind of case says nothing
    samples = {key: np.where(undefined, np.nan, values) for key, values in samples.items()}

    def with_intervals(values, drawn):
        ends = {f"{key}_95": interval(drawn[key]).tolist() for key in METRICS}
        return {key: float(values[key]) for key in METRICS} | ends

    out = {"classes": {}, "macro": {}, "top_k": {}}
    for c, name in enumerate(classes):
        counts = {"positives": int((labels[:, c] == 1).sum())}
        counts |= {"negatives": int((labels[:, c] == 0).sum())}
        values = {key: value[c] for key, value in point.items()}
        drawn = {key: value[:, c] for key, value in samples.items()}
        out["classes"][name] = counts | with_intervals(values, drawn)
    for name, members in macro_groups(classes).items():
        of = [c for c, member in enumerate(classes) if member in members]
        columns = [c for c in of if not np.isnan(point["auroc"][c])]
        if columns:
            counts = {"classes": len(columns), "of": len(of)}
            values = {key: nanmean(value[columns]) for key, value in point.items()}
            drawn = {key: nanmean(value[:, columns]) for key, value in samples.items()}
            out["macro"][name] = counts | with_intervals(values, drawn)
    for k in (1, 3, 5, 10):
        if k <= len(classes):
            recall, precision = top_k(scores, labels, k)
            out["top_k"] |= {f"recall@{k}": recall, f"precision@{k}": precision}
    return out


def macro_groups(classes):
    """Which classes are averaged together."""
    if set(classes) <= set(data.CT_RATE + data.CT_RATE_LT):
        return {"CT-RATE": data.CT_RATE, "CT-RATE-LT": data.CT_RATE_LT}
    return {"all": classes}


def both_levels(scores, labels, classes, rows, threshold):
    """describe_scores per volume and, each scan the mean of its reconstructions, per scan."""
    volume_patients = [row.patient for row in rows]
    scans = [f"{row.patient}/{row.scan}" for row in rows]
    scan_patients = list(dict(zip(scans, volume_patients)).values())  # in the order of by_scan
    scan_scores, scan_labels = by_scan(scores, scans), np.round(by_scan(labels, scans))
    return {
        "volume": describe_scores(scores, labels, classes, volume_patients, threshold),
        "scan": describe_scores(scan_scores, scan_labels, classes, scan_patients, threshold),
    }


def to_json(value):
    """Strict JSON of nested dicts and lists: NaN becomes null."""
    def strict(x):
        if isinstance(x, dict):
            return {key: strict(item) for key, item in x.items()}
        if isinstance(x, (list, tuple)):
            return list(map(strict, x))
        return None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps(strict(value), indent=1, ensure_ascii=False, allow_nan=False)


def sha256_of(path):
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- 4. A manifest -------------------------------------------------------------------------------

def select_rows(manifest, split=None):
    """A manifest's rows of a split -> rows, the split's name or "all".

    By default of "test" or "valid" where there is one, else all.
    """
    rows = data.read_manifest(manifest, split)
    splits = {row.split for row in rows}
    split = split or next((name for name in ("test", "valid") if name in splits), None)
    return [row for row in rows if split in (None, row.split)], split or "all"


def classes_asked(rows, benchmark, prompts):
    """The benchmark's classes, else None where prompts name them, else the labels', else the 33."""
    if benchmark or prompts:
        return data.BENCHMARKS.get(benchmark)
    return data.classes_of(rows) or data.CT_RATE + data.CT_RATE_LT


def evaluate(
    run, manifest, split=None, out=None, benchmark=None, prompts=None, negative=False,
    pairs=PAIRS[:2], threshold="split-half", cache=None, device=None, scores=None, compare=None,
    probe=None, summaries=None,
):
    """Score a manifest's split zero-shot; writes scores.csv, metrics.json and report.html to out.

    With scores, a scores.csv of any model, nothing is computed from volumes and run may be None.
    threshold: split-half, oracle, or the scores.csv of another split of the manifest. compare:
    another model's scores.csv. probe: a manifest with labels to train a linear classifier on (its
    split train where it has one). summaries: summaries.jsonl, the texts for retrieval and the gap
    instead of reports. Returns what metrics.json holds; "volume" and "scan" (mean over
    reconstructions) each have the classes' and the macro metrics.
    """
    rows, split = select_rows(manifest, split)
    out = Path(out or Path(run or Path(scores).parent) / "evaluation")
    result = {
        "run": str(run or scores), "manifest": str(manifest),
        "manifest_sha256": sha256_of(manifest), "split": split, "benchmark": benchmark,
    }
    skipped, study = [], None
    if scores is None:
        asked = make_prompts(classes_asked(rows, benchmark, prompts), prompts, negative)
        study = Study(run, manifest, cache, device, pairs, asked)
        rows, v, skipped = study.embed(rows)
        scores = out / "scores.csv"
        names = [row.name for row in rows]
        write_scores(scores, names, list(asked), score(study.model, v, asked, pairs))
        result |= study.describe(v) | study.texts_and_volumes(rows, v, summaries)
        masks = Path(manifest).parent / "masks"
        if study.model.config.trained_on == "phantom" and masks.is_dir():
            result["pointing"] = pointing(study.model, study.cache, rows, masks, asked, pairs)
    asked = data.BENCHMARKS.get(benchmark)
    values, labels, classes = join(read_scores(scores), rows, asked, scores)
    result |= {
        "volumes": len(rows), "scans": len({row.scan for row in rows}),
        "patients": len({row.patient for row in rows}),
        "skipped": list(map(list, skipped)), "threshold": str(threshold),
    }
    if not np.isnan(labels).all():
        if threshold not in ("split-half", "oracle"):
            threshold = thresholds_from(threshold, manifest, rows, classes)
        result |= both_levels(values, labels, classes, rows, threshold)
        if probe and study:
            add_probe(result, study, probe, rows, v, labels, classes)
        if compare:
            result["compare"] = comparison(values, labels, classes, rows, compare)
    page = report_page(result, values, labels, classes, rows, study)
    data.write_atomically(out / "report.html", page.encode())
    result.pop("gap_picture", None)
    data.write_atomically(out / "metrics.json", to_json(result).encode())
    return result


class Study:
    """A run's model, where its volumes are cached, and what is asked of it."""

    def __init__(self, run, manifest, cache, device, pairs, asked):
        self.run, self.manifest, self.pairs, self.asked = Path(run), manifest, pairs, asked
        self.model = BrgSA.from_pretrained(run).to(device or default_device())
        self.weights = sha256_of(self.run / "model.safetensors")
        folder = cache or Path(manifest).parent / "cache"
        self.cache = data.Cache.for_config(folder, self.model.config)

    def embed(self, rows):
        """Rows that can be read, their v (N, d), and the skipped as (name, reason)."""
        rows, skipped = data.prepare(rows, self.cache)
        if not rows:
            first = f"none of its {len(skipped)} volumes can be read; the first: {skipped[0][1]}"
            raise ValueError(f"{self.manifest}: {first}")
        path = self.run / "embeddings.safetensors"
        return rows, cached_embeddings(path, self.weights, self.model, rows, self.cache), skipped

    def describe(self, v):
        """What metrics.json says of the model and of the question; v (N, d) are the volumes."""
        prompts = json.dumps(self.asked, sort_keys=True).encode()
        out = {
            "model_sha256": self.weights, "trained_on": self.model.config.trained_on,
            "prompts": self.asked, "prompts_sha256": hashlib.sha256(prompts).hexdigest(),
            "pairs": list(self.pairs),
        }
        if any("hat" in pair for pair in self.pairs):
            out["bank"] = self.bank(v)
        return out

    def bank(self, v, n=10):
        """How the volumes use the bank, and the prompts nearest to its n most used entries."""
        bank, texts = self.model.bank, []
        for prompt in self.asked.values():
            texts += prompt["positive"]
        usage = bank_usage(bank, v.to(bank.weight.device))
        t = embed_texts(self.model, texts).to(bank.weight.device)
        prompts, weight = nearest_prompts(bank, t, texts), usage.pop("weight")
        most = []
        for share, entry in zip(*(values.tolist() for values in weight.topk(min(n, len(weight))))):
            most.append({"entry": entry, "share": share, "prompts": prompts[entry]})
        return {"size": len(weight), **usage, "most_used": most}

    def texts_and_volumes(self, rows, v, summaries=None):
        """Retrieval, and the modality gap before and after the bank, of the rows with a text."""
        summaries = data.read_summaries(summaries) if summaries else {}
        texts = [data.text_of(row, summaries) for row in rows]
        with_text = [i for i, text in enumerate(texts) if clean(text)]
        labels, out = data.labels_matrix(rows, list(rows[0].labels)), {}
        if (labels == 1).any():
            by_volume = map_at_k(v, labels, [row.patient for row in rows])
            out["retrieval"] = {"volume_to_volume": by_volume}
        texts = [texts[i] for i in with_text]
        if len(set(texts)) < 2:
            return out
        v, t = v[with_text], embed_texts(self.model, texts)
        v_hat, t_hat = bridge(self.model, v), bridge(self.model, t)
        images, prompts = joint_vectors(v, v_hat, t, t_hat, self.pairs)
        out["retrieval"] = retrieval(images, prompts, texts) | out.get("retrieval", {})
        out["gap"] = {"before": modality_gap(v, t), "after": modality_gap(v_hat, t_hat)}
        few = np.random.default_rng(0).permutation(len(texts))[:400]
        out["gap_picture"] = {
            "before": project(v[few], t[few]), "after": project(v_hat[few], t_hat[few]),
        }
        return out


def thresholds_from(path, manifest, rows, classes):
    """Thresholds (C,) fitted on another split's scores.csv, whose labels are in the manifest."""
    scores = read_scores(path)
    others = [row for row in data.read_manifest(manifest) if row.name in scores]
    shared = {row.patient for row in others} & {row.patient for row in rows}
    if shared:
        names = f"patients {', '.join(sorted(shared)[:10])} are among those evaluated"
        raise ValueError(f"{path}: {names}; other patients or --threshold oracle are needed")
    values, labels, _ = join(scores, others, classes, path)
    return best_thresholds(values, labels)


def comparison(scores, labels, classes, rows, path):
    """This model beside another's scores.csv on the same cases.

    AUROC of both, DeLong's p over patients, the macro difference with its interval.
    """
    others, _, shared = join(read_scores(path), rows, classes, path)
    columns = [classes.index(name) for name in shared]
    scores, labels, patients = scores[:, columns], labels[:, columns], [row.patient for row in rows]
    this, other = auroc(scores, labels), auroc(others, labels)
    p, drawn = delong(scores, others, labels, patients), []
    for values in (scores, others):  # the same resamples
        samples = bootstrap(values, labels, patients, np.zeros(len(shared)))
        drawn.append(nanmean(samples["auroc"]))
    table = {}
    for name, a, b, q in zip(shared, this.tolist(), other.tolist(), p.tolist()):
        table[name] = {"auroc": a, "other": b, "p": q}
    return {
        "with": str(path), "classes": table, "macro_difference": nanmean(this - other).item(),
        "macro_difference_95": interval(drawn[0] - drawn[1]).tolist(),
    }


def add_probe(result, study, manifest, rows, v, labels, classes):
    """Put the AUROC of a linear classifier of frozen embeddings beside the zero-shot one.

    It is trained on another manifest's embeddings and labels, never on an evaluated patient's.
    """
    patients = {row.patient for row in rows}
    train = data.read_manifest(manifest)
    train = [row for row in train if row.split == "train"] or train
    train, v_train, _ = study.embed([row for row in train if row.patient not in patients])
    y = data.labels_matrix(train, classes)
    scores = linear_probe(v_train, y, [row.patient for row in train], v)
    supervised = describe_scores(scores, labels, classes, [row.patient for row in rows])
    for part in ("classes", "macro"):
        for name, values in result["volume"][part].items():
            probe = supervised[part][name]
            values |= {"probe_auroc": probe["auroc"], "probe_auroc_95": probe["auroc_95"]}
    result["probe"] = {"manifest": str(manifest), "volumes": len(train)}


# ---- 5. One scan ---------------------------------------------------------------------------------

def evaluate_volume(
    run, path, prompts=None, negative=False, pairs=PAIRS[:2], device=None, out=None, method=None
):
    """Findings of one scan (.nii, .nii.gz, .npz), ranked: {"volume", "model", "findings", ...}.

    A finding is {"abnormality", "score", "percentile"}; the percentile is the share of the training
    scans (the run's reference.safetensors) that score lower, None where the run has none. With out,
    a folder: report.html and, of the named prompts or else of the first three findings, a heat map
    in the scan's own space.
    """
    model = BrgSA.from_pretrained(run).to(device or default_device())
    asked = make_prompts(None if prompts else data.CT_RATE + data.CT_RATE_LT, prompts, negative)
    config, volume = model.config, data.read_volume(path)
    hu = data.preprocess(volume.hu, volume.spacing, config.spacing, config.shape, config.hu_range)
    with torch.inference_mode():
        batch = torch.from_numpy(hu)[None, None].to(model.bank.weight.device)
        v = model.encode_image(batch).float().cpu()
    scores = score(model, v, asked, pairs)[0]
    result = {"volume": str(path), "model": str(run)}
    if config.trained_on == "phantom":
        result["warning"] = PHANTOM_WARNING
    percentiles, reference = [None] * len(scores), read_reference(run)
    if reference:
        theirs = score(model, reference["v"], asked, pairs, reference["v_hat"])        # (N, C)
        below, equal = (theirs < scores).mean(0), (theirs == scores).mean(0)
        percentiles = (100 * (below + equal / 2)).tolist()
    result["reference_scans"] = len(reference["v"]) if reference else 0
    findings = []
    for name, value, place in zip(asked, scores, percentiles):
        findings.append({"abnormality": name, "score": float(value), "percentile": place})
    findings.sort(key=lambda finding: (-(finding["percentile"] or 0), -finding["score"]))
    result["findings"] = findings
    if out:
        figures = []
        for finding in findings[:None if prompts else 3]:
            name = finding["abnormality"]
            file = Path(out) / f"{clean(name).replace(' ', '_')}.nii.gz"
            grid = heatmap(model, hu, asked[name]["positive"], method, pairs)
            heat = to_scan(grid, volume, config)
            write_heatmap(file, heat, volume, path)
            png = planes_png(heat, volume, name)
            data.write_atomically(str(file).replace(".nii.gz", ".png"), png)
            finding["heatmap"] = str(file)
            figures.append(heat_figure(png, escape(str(file))))
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
        mend = "delete it to do without percentiles"
        raise ValueError(f"{path}: damaged ({error}); {mend}") from None


# ---- 6. Command line -----------------------------------------------------------------------------

def embed(run, manifest, out, split=None, cache=None, device=None):
    """Write the embeddings v, v_hat (N, d) of a manifest's volumes -> how many.

    Their names stand in the file's metadata ("names", JSON).
    """
    study = Study(run, manifest, cache, device, PAIRS[:2], None)
    rows, v, _ = study.embed(data.read_manifest(manifest, split))
    names = {"names": json.dumps([row.name for row in rows])}
    data.write_atomically(out, save({"v": v, "v_hat": bridge(study.model, v)}, names))
    return len(rows)


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, nargs="?", help="the folder of a trained model")
    add("--manifest", type=Path, help="evaluate these volumes")
    add("--volume", type=Path, help="rank the findings of this one scan (.nii, .nii.gz, .npz)")
    add("--scores", type=Path,
        help="evaluate this scores.csv, of any model, with the manifest's labels; needs no run")
    add("--split", help="the manifest's; default: test or valid where there is one, else all")
    add("--benchmark", choices=data.BENCHMARKS, help="which classes; default: the manifest's")
    add("--prompts", nargs="+", metavar="NAME",
        help="abnormalities, or one .json ({name: [prompts]}) or .txt (a name a line)")
    add("--negative", action="store_true", help='subtract the score of "There is no X"')
    add("--pairs", nargs="+", choices=PAIRS, default=PAIRS[:2],
        help="the cosines that are averaged; default: v-t v_hat-t")
    add("--threshold", default="split-half",
        help="from the other half of the patients (split-half), another split's scores.csv, or the "
        "very labels that are scored (oracle; flattering)")
    add("--compare", type=Path, metavar="SCORES", help="another model's scores.csv: DeLong's test")
    add("--probe", type=Path, metavar="MANIFEST",
        help="train a linear classifier on its split train, as a supervised yardstick")
    add("--summaries", type=Path, help="texts for retrieval and the gap, instead of the reports")
    add("--embed", action="store_true",
        help="only write the manifest's embeddings to --out, a .safetensors")
    add("--heatmap", nargs="?", const="default",
        choices=["default", "similarity", "rollout", "gradcam"],
        help="with --volume: maps in the scan's own space and a page, in --out")
    add("--cache", type=Path, help="the preprocessed volumes; default: cache, beside the manifest")
    add("--out", type=Path, help="default: evaluation, in the run (with --volume: none)")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def command(argv=None):
    """Run the command line."""
    parser = make_parser()
    a = parser.parse_args(argv)
    asks_something = bool(a.volume) != bool(a.manifest) and (a.run or a.scores and a.manifest)
    if not asks_something or a.embed and not (a.manifest and a.out):
        needed = "RUN with --manifest or with --volume, or --scores with --manifest, is needed"
        parser.error(f"{needed}; with --embed also --out")
    if a.embed:
        n = embed(a.run, a.manifest, a.out, a.split, a.cache, a.device)
        print(f"{a.out}: embeddings of {n} volumes")
    elif a.volume:
        out, method = a.out, None if a.heatmap == "default" else a.heatmap
        if a.heatmap and not out:
            out = a.run / "evaluation" / a.volume.name.split(".")[0]
        result = evaluate_volume(
            a.run, a.volume, a.prompts, a.negative, a.pairs, a.device, out, method
        )
        written = f"\nwritten: {out / 'report.html'} and heat maps beside it" if out else ""
        print(to_json(result) if a.json else volume_table(result) + written)
    else:
        out = a.out or (a.run or a.scores.parent) / "evaluation"
        result = evaluate(
            a.run, a.manifest, a.split, out, a.benchmark, a.prompts, a.negative, a.pairs,
            a.threshold, a.cache, a.device, a.scores, a.compare, a.probe, a.summaries,
        )
        written = f"\nwritten: {out / 'report.html'}, metrics.json and scores.csv beside it"
        print(to_json(result) if a.json else evaluation_table(result) + written)


def main(argv=None):
    """Run the command line; its exit status."""
    return data.run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
