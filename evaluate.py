"""Zero-shot evaluation: a run and a manifest, or one scan, to scores, metrics and a page.

    score(volume, "There is X") = (cos(v, t) + cos(v_hat, t)) / 2

v, t: embeddings of the volume and the prompt; v_hat: v re-expressed from the knowledge bank.

    python evaluate.py runs/phantom --manifest runs/phantom-data/manifest.csv
    python evaluate.py runs/phantom --volume scan.nii.gz --prompts "pleural effusion" "lung nodule"
"""
import argparse
import hashlib
import json
import math
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

import data
from data import option

# ---- options (before torch is loaded, so that --help is quick)

BOTH_FORMS = ("v-t", "v_hat-t")  # the paper's pairs
READOUTS = ("plain", "contrast", "context", "prototype")


@dataclass
class Options:
    """The choices of an evaluation, the same in Python and on the command line."""
    benchmark: str = option(None, "which classes; default: the manifest's", choices=data.BENCHMARKS)
    prompts: list = option(
        None, "abnormalities, or one .json ({name: [prompts]}) or .txt (a name a line)", nargs="+")
    negative: bool = option(False, 'subtract the score of "There is no X"')
    prompts_as: str = option(
        None, 'what scans are compared with: "There is X" (plain, the paper\'s), less half of '
        '"There is no abnormality" (contrast), likewise what it adds to training summaries '
        "(context), training summaries with X less those without (prototype); default: the run's",
        choices=READOUTS)
    pairs: list = option(
        BOTH_FORMS, "the cosines that are averaged", nargs="+",
        choices=(*BOTH_FORMS, "v-t_hat", "v_hat-t_hat"))
    threshold: str = option(
        "split-half", "from the other half of the patients (split-half), from another split's "
        "scores.csv, a number, or from the very labels that are scored (oracle; flattering)")
    protocol: str = option(
        "", "authors: their way, for a table beside theirs: thresholds at the point of the ROC "
        "curve nearest to (0, 1), which flatters, z-scored ranks, 5,000 resamples of volumes",
        choices=("authors",))
    compare: Path = option(None, "another model's scores.csv: DeLong's test")
    probe: Path = option(
        None, "a manifest: train a linear classifier on its split train, as a supervised yardstick")
    summaries: Path = option(
        None, "summaries.jsonl: the texts for retrieval and the gap, instead of the reports")
    cache: Path = option(
        None, "folder of the preprocessed volumes; default: cache, beside the manifest")
    device: str = option(None, "cpu, cuda or cuda:1; default: cuda where there is one")

    __post_init__ = data.check_options


def parse(argv=None):
    """The command line's arguments; of Options those that are typed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", nargs="?", type=Path,
        help="folder of a trained model: config.json, model.safetensors, tokenizer.json")
    add("--manifest", help="evaluate these volumes")
    add("--volume", type=Path, help="rank the findings of this one scan (.nii, .nii.gz, .npz)")
    add("--scores", type=Path,
        help="evaluate this scores.csv, of any model, with the manifest's labels; needs no run")
    add("--split", help="the manifest's, or all; default: test or valid where there is one, or all")
    add("--embed", action="store_true",
        help="only write the manifest's embeddings to --out, a .safetensors")
    add("--heatmap", nargs="?", const="default",
        choices=["default", "similarity", "rollout", "gradcam"],
        help="with --volume: maps in the scan's own space and a page, in --out; "
             "default: rollout (ViT), gradcam (CNN)")
    add("--out", type=Path,
        help="folder of the results; default: evaluation, in the run (with --volume: none)")
    add("--json", action="store_true", help="print JSON instead of a table")
    data.add_options(parser, Options)
    a = parser.parse_args(argv)
    one_of_both = bool(a.volume) != bool(a.manifest)
    has_scores = a.run or a.scores and a.manifest
    if not one_of_both or not has_scores or a.embed and not (a.manifest and a.out):
        parser.error(
            "RUN with --manifest or with --volume, or --scores with --manifest, is needed; "
            "with --embed also --out"
        )
    return a


if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    parse()

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm import tqdm

import metrics
import report
from heatmap import heatmap, pointing, to_scan, write_heatmap
from model import (
    PAIRS,
    BrgSA,
    bank_usage,
    clean,
    half_type,
    joint_vectors,
    nearest_prompts,
    pick_device,
    zero_shot_scores,
)

# ---- embeddings

def place():
    """This process's number and the number of all that train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.inference_mode()
def embed_volumes(model, rows, cache, device="cpu"):
    """Embeddings v (N, d), float32 on the CPU, of the rows' whole cached volumes.

    A GPU computes them in 16 bits. The processes of a training, which call this together, each do
    their share of the rows.
    """
    rank, world = place()
    on_gpu = torch.device(device).type == "cuda"
    half = half_type(device) if on_gpu else None
    batch = max(1, 2**24 // math.prod(model.config.shape))
    own = data.Volumes(rows[rank::world], cache)
    loader = torch.utils.data.DataLoader(
        own, batch, num_workers=on_gpu * min(8, os.cpu_count()), pin_memory=on_gpu)
    model = model.to(device).eval()
    v = [torch.empty(0, model.config.dim, device=device)]
    for volumes in tqdm(loader, "embed", unit="volume", unit_scale=batch, leave=False):
        with torch.autocast("cuda", half, on_gpu):
            v.append(model.encode_image(volumes.to(device, non_blocking=True)).float())
    v = torch.cat(v)
    if world > 1:
        every = torch.zeros(len(rows), v.shape[1], device=device)
        every[rank::world] = v
        dist.all_reduce(every)
        v = every
    return v.cpu()


@torch.inference_mode()
def embed_texts(model, texts, batch=64):
    """Embeddings t (N, d), float32 on the CPU, of texts; each distinct one is encoded once."""
    distinct = sorted(sorted(set(texts)), key=len)  # neighbours of like length share a batch
    t = {}
    for start in range(0, len(distinct), batch):
        part = distinct[start:start + batch]
        t |= zip(part, model.encode_text(part).float().cpu())
    return torch.stack([t[text] for text in texts])


@torch.inference_mode()
def bridge(model, x):
    """Embeddings x (N, d) re-expressed from the model's knowledge bank, on the CPU."""
    device = model.bank.weight.device
    return torch.cat([model.bridge(part.to(device)).float().cpu() for part in x.split(4096)])


# ---- prompts and scores

def make_prompts(classes, given=None, negative=False):
    """Prompts by class: {name: {"positive": texts, "negative": texts, "combine": "mean" or "max"}}.

    given: names, or one file: a .json of {name: text, list of texts or such a dict}, or a .txt with
    one name a line. It replaces the prompts of the classes that it names; with classes None it says
    what the classes are. negative: a class without negative prompts gets "There is no X".
    """
    named = _read_prompts(given) if given else {}
    prompts = {}
    for name in classes or named:
        prompts[name] = prompt = named.get(name) or _make_prompt(name)
        if negative and not prompt["negative"]:
            prompt["negative"] = [f"There is no {name}"]
    if not prompts:
        raise ValueError("no class to ask for")
    return prompts


def _read_prompts(given):
    path = Path(given[0])
    if len(given) > 1 or path.suffix not in (".json", ".txt"):
        return {name: _make_prompt(name) for name in given}
    try:
        text = path.read_text(encoding="utf-8")
        names = filter(None, map(str.strip, text.splitlines()))
        named = json.loads(text) if path.suffix == ".json" else dict.fromkeys(names)
        if not named:
            raise ValueError("no class is named")
        return {name: _make_prompt(name, wanted) for name, wanted in named.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        form = 'the form is {"Lung nodule": ["There is a lung nodule", ...]}'
        raise ValueError(f"{path}: can't be read as prompts ({error}); {form}") from None


def _make_prompt(name, wanted=None):
    prompt = {"positive": [f"There is {name}"], "negative": [], "combine": "mean"}
    if wanted is None and name == "Calcification":  # RAD-ChestCT's one class for two of CT-RATE's
        parts = ("arterial wall calcification", "coronary artery wall calcification")
        prompt |= {"positive": [f"There is {part}" for part in parts], "combine": "max"}
    elif isinstance(wanted, dict):
        prompt |= wanted
    elif wanted is not None:
        prompt["positive"] = [wanted] if isinstance(wanted, str) else wanted
    texts = [name, *prompt["positive"], *prompt["negative"]]
    if len(prompt) > 3 or not prompt["positive"] or not all(map(clean, texts)):
        raise ValueError(f"'{name}' asks {wanted or 'nothing'}")
    return prompt


def load(run, device, prompts):
    """A run's model; ValueError where its text encoder reads nothing of one of the prompts."""
    model = BrgSA.from_pretrained(run).to(pick_device(device))
    for prompt in prompts.values():
        for text in prompt["positive"] + prompt["negative"]:
            if not model.text.clean(text):
                raise ValueError(f"of the prompt '{text}' the model reads no word; use a sentence")
    return model


def prompt_vectors(embed, texts, way="plain", summaries=()):
    """What scans are compared with for each text: (P, d); embed: list of str -> unit vectors.

    With t = embed and S the summaries of the training reports; no way uses a label:

        plain      t(text), as in the paper
        contrast   t(text) - t0, where t0 is half of t("There is no abnormality")
        context    unit(mean over up to 64 of S of t(S + text) - t(S)) - t0
        prototype  unit(mean t of those of S that hold the text - mean t of the others) - t0;
                   context for a text that none or all of them hold

    The half was chosen on the phantom of another seed (docs/RESULTS.md).
    """
    if way == "plain":
        return embed(texts)
    none = embed(["There is no abnormality"]) / 2
    if way == "contrast":
        return embed(texts) - none
    some = summaries[::math.ceil(len(summaries) / 64)]
    alone, vectors = embed(some), []
    whole = embed(summaries) if way == "prototype" else None
    statements = [set(map(clean, data.sentences(summary))) for summary in summaries]
    for text in texts:
        holds = torch.tensor([clean(text) in parts for parts in statements])
        if way == "prototype" and holds.any() and not holds.all():
            vectors.append(whole[holds].mean(0) - whole[~holds].mean(0))
        else:
            vectors.append((embed([f"{summary} {text}." for summary in some]) - alone).mean(0))
    return F.normalize(torch.stack(vectors), dim=-1) - none


def readout(options, config, summaries):
    """The one of READOUTS that is asked for, else plain by the authors' protocol, else the run's.

    Of a run without its summaries contrast, where it has chosen a way that needs them.
    """
    if options.prompts_as or options.protocol:
        return options.prompts_as or "plain"
    needs = config.prompts_as in READOUTS[2:]
    return "contrast" if needs and not summaries else config.prompts_as


def score(model, v, prompts, pairs=PAIRS[:2], v_hat=None, way="plain", summaries=()):
    """Scores (N, C) of volumes v (N, d): mean or max of positive less mean of negative prompts.

    way, summaries: as for prompt_vectors.
    """
    prompts = prompts.values()
    texts = [text for prompt in prompts for text in prompt["positive"] + prompt["negative"]]
    texts = list(dict.fromkeys(texts))

    def embed(texts):
        return F.normalize(embed_texts(model, texts), dim=-1)

    def embed_hat(texts):
        return F.normalize(bridge(model, embed_texts(model, texts)), dim=-1)
    t = prompt_vectors(embed, texts, way, summaries)
    t_hat = t
    if any(pair.endswith("t_hat") for pair in pairs):
        t_hat = prompt_vectors(embed_hat, texts, way, summaries)
    v_hat = bridge(model, v) if v_hat is None else v_hat
    cosines = zero_shot_scores(v, v_hat, t, t_hat, pairs).double().numpy()  # (N, P)
    if not np.isfinite(cosines).all():
        raise ValueError("the model gives scores that are no finite numbers; its weights are bad")
    by_text = dict(zip(texts, cosines.T))
    columns = []
    for prompt in prompts:
        combine = np.max if prompt["combine"] == "max" else np.mean
        column = combine([by_text[text] for text in prompt["positive"]], axis=0)
        if prompt["negative"]:
            column = column - np.mean([by_text[text] for text in prompt["negative"]], axis=0)
        columns.append(column)
    return np.stack(columns, axis=1)


# ---- scores and labels, joined by name

def write_scores(path, names, classes, scores):
    """Write scores.csv: name, then one column a class; scores (N, C) with all their digits."""
    lines = np.asarray(scores, np.float64).tolist()
    lines = [[name, *line] for name, line in zip(names, lines)]
    data.write_csv(path, [["name", *classes], *lines])


def read_scores(path):
    """scores.csv -> {name: {class: score}}; ValueError names the row that isn't right."""
    scores = {}
    for number, line in enumerate(data.read_csv(path, "name"), 2):
        name = line.pop("name")
        where = f"{path}, row {number}: '{name}'"
        if name in scores:
            raise ValueError(f"{where} stands twice")
        try:
            scores[name] = {key: float(value) for key, value in line.items()}
        except (TypeError, ValueError):
            scores[name] = {"": math.nan}
        if not all(map(math.isfinite, scores[name].values())):
            raise ValueError(f"{where} has a score that is no finite number")
    if not scores or not scores[name]:
        raise ValueError(f"{path}: holds no scores")
    return scores


def join(scores, rows, classes=None, where="the scores"):
    """Scores by name and manifest rows -> scores (N, C), labels (N, C) in the rows' order, classes.

    Classes are those of the rows' labels (or the ones given) that are scored. ValueError with the
    first ten names that have no partner.
    """
    names = [row.name for row in rows]
    _refuse(set(names) - set(scores), f"not in {where}")
    _refuse(set(scores) - set(names), f"in {where} but not in the manifest")
    classes = [name for name in classes or data.classes_of(rows) if name in scores[names[0]]]
    labels = data.labels_matrix(rows, classes)
    joined = np.empty(labels.shape)
    for line, name in zip(joined, names):
        line[:] = [scores[name][key] for key in classes]
    return joined, labels, classes


def _refuse(names, what):
    if names:
        first = ", ".join(sorted(names)[:10]) + ", ..." * (len(names) > 10)
        raise ValueError(f"{len(names)} volumes are {what}: {first}")


# ---- what the scores are worth

def describe_scores(scores, labels, classes, patients, threshold="split-half", n=1000, seed=0):
    """All metrics with 95 % intervals (bootstrap over patients), per class and macro, as a dict.

    threshold: "split-half", "oracle", thresholds (C,), or "authors" for all that Options.protocol
    says. A macro mean is over the classes with both positive and negative cases, whose count stands
    beside it: over CT-RATE's 18 and over CT-RATE-LT's 15 apart where all classes are among these,
    else over all. The authors' macro interval is the mean of the classes' interval ends.
    """
    authors, ranked = isinstance(threshold, str) and threshold == "authors", scores
    if authors:
        patients, n = np.arange(len(scores)), 5000
        ranked = (scores - scores.mean(0)) / np.maximum(scores.std(0), 1e-12)
    if isinstance(threshold, str):
        threshold = fitted_thresholds(threshold, scores, labels, patients)
    point = metrics.per_class(scores, labels, threshold)
    samples = metrics.bootstrap(scores, labels, patients, threshold, n, seed)
    lacking = np.isnan(samples["auroc"])  # a resample without one kind of case says nothing

    def describe(columns):
        values, ends = {}, {}
        for key in metrics.METRICS:
            drawn = np.where(lacking, np.nan, samples[key])[:, columns]
            values[key] = metrics.nanmean(point[key][columns]).item()
            interval = metrics.interval(drawn if authors else metrics.nanmean(drawn)[:, None])
            ends[f"{key}_95"] = metrics.nanmean(interval).tolist()
        return values | ends

    out = {"classes": {}, "macro": {}, "top_k": {}}
    positives, negatives = (labels == 1).sum(0).tolist(), (labels == 0).sum(0).tolist()
    for c, name in enumerate(classes):
        counts = {"positives": positives[c], "negatives": negatives[c]}
        out["classes"][name] = counts | describe([c])
    for name, members in class_groups(classes).items():
        known = [c for c in members if not np.isnan(point["auroc"][c])]
        if known:
            out["macro"][name] = {"classes": len(known), "of": len(members)} | describe(known)
    for k in (1, 3, 5, 10):
        if k <= len(classes):
            recall, precision = metrics.top_k(ranked, labels, k)
            out["top_k"] |= {f"recall@{k}": recall, f"precision@{k}": precision}
    return out


def class_groups(classes):
    """Which classes a macro mean is over, as numbers, by name: CT-RATE's, CT-RATE-LT's, else all.
    """
    groups = {"CT-RATE": data.CT_RATE, "CT-RATE-LT": data.CT_RATE_LT}
    if not set(classes) <= set(data.CT_RATE + data.CT_RATE_LT):
        groups = {"all": classes}
    numbers = {}
    for name, group in groups.items():
        numbers[name] = [c for c, member in enumerate(classes) if member in group]
    return numbers


def fitted_thresholds(way, scores, labels, patients):
    """Thresholds by their name: (C,), or (N, C) where each case has its own."""
    if way == "split-half":
        return metrics.split_half_thresholds(scores, labels, patients)
    fit = metrics.best_thresholds if way == "oracle" else metrics.nearest_thresholds
    return fit(scores, labels)


def both_levels(scores, labels, classes, rows, threshold):
    """describe_scores per volume and, each scan the mean of its reconstructions, per scan."""
    patients = [row.patient for row in rows]
    scans = [f"{row.patient}/{row.scan}" for row in rows]
    of_scans = metrics.by_scan(scores, scans), np.round(metrics.by_scan(labels, scans))
    scan_patients = list(dict(zip(scans, patients)).values())  # in the order of by_scan
    return {
        "volume": describe_scores(scores, labels, classes, patients, threshold),
        "scan": describe_scores(*of_scans, classes, scan_patients, threshold),
    }


def thresholds_for(options, manifest, rows, classes):
    """What describe_scores takes as threshold."""
    threshold = options.protocol or options.threshold
    if threshold in ("split-half", "oracle", "authors"):
        return threshold
    try:
        value = float(str(threshold))
    except ValueError:
        return thresholds_from(Path(threshold), manifest, rows, classes)
    if not math.isfinite(value):
        raise ValueError(f"--threshold is {value}; a finite number is needed")
    return np.full(len(classes), value)


def thresholds_from(path, manifest, rows, classes):
    """Thresholds (C,) that fit another split's scores.csv, with the labels of the manifest."""
    scores = read_scores(path)
    others = [row for row in data.read_manifest(manifest) if row.name in scores]
    shared = {row.patient for row in others}
    shared &= {row.patient for row in rows}
    if shared:
        first = ", ".join(sorted(shared)[:10])
        raise ValueError(
            f"{path}: patients {first} are among those evaluated; "
            "other patients or --threshold oracle are needed"
        )
    scores, labels, _ = join(scores, others, classes, path)
    return metrics.best_thresholds(scores, labels)


def compare_scores(scores, labels, classes, rows, path):
    """This model beside another's scores.csv, on the same cases.

    AUROC of both and DeLong's p over patients of each class; the difference of the macro AUROCs
    with its 95 % interval over the same resamples of patients.
    """
    other, _, shared = join(read_scores(path), rows, classes, path)
    columns = [classes.index(name) for name in shared]
    scores, labels = scores[:, columns], labels[:, columns]
    patients = [row.patient for row in rows]
    values = {
        "auroc": metrics.auroc(scores, labels),
        "other": metrics.auroc(other, labels),
        "p": metrics.delong(scores, other, labels, patients),
    }
    by_class, drawn = {}, []
    for c, name in enumerate(shared):
        by_class[name] = {key: float(column[c]) for key, column in values.items()}
    for each in (scores, other):
        samples = metrics.bootstrap(each, labels, patients, np.zeros(len(shared)))
        drawn.append(metrics.nanmean(samples["auroc"]))
    return {
        "with": str(path),
        "classes": by_class,
        "macro_difference": metrics.nanmean(values["auroc"] - values["other"]).item(),
        "macro_difference_95": metrics.interval(drawn[0] - drawn[1]).tolist(),
    }


def add_probe(result, study, manifest, rows, v, labels):
    """Put the AUROC of a linear classifier beside the zero-shot one in result["volume"].

    It is trained on the embeddings and labels of another manifest's split train (of all its rows
    where there is none), without the patients of the rows (N) with v (N, d), labels (N, C).
    """
    patients, classes = [row.patient for row in rows], list(result["volume"]["classes"])
    train = data.read_manifest(manifest)
    train = [row for row in train if row.split == "train"] or train
    train, v_train, _ = study.embed([row for row in train if row.patient not in set(patients)])
    known = data.labels_matrix(train, classes)
    scores = metrics.linear_probe(v_train, known, [row.patient for row in train], v)
    supervised = describe_scores(scores, labels, classes, patients)
    for part in ("classes", "macro"):
        for name, values in supervised[part].items():
            probe = {"probe_auroc": values["auroc"], "probe_auroc_95": values["auroc_95"]}
            result["volume"][part][name] |= probe
    result["probe"] = {"manifest": str(manifest), "volumes": len(train)}


# ---- a run and a manifest

def evaluate(run, manifest, split=None, out=None, scores=None, **options):
    """Score a manifest's split zero-shot with the model of a run -> what metrics.json holds.

    Writes scores.csv, metrics.json and report.html to out (default: evaluation, in the run). With
    scores, a scores.csv of any model, nothing is computed from volumes and run may be None.
    options: see Options. Of the result, "volume" and "scan" (the mean over a scan's
    reconstructions) each hold the metrics of the classes and the macro means.
    """
    options = Options(**options)
    rows, split = select_rows(manifest, split)
    out = Path(out or Path(run or Path(scores).parent) / "evaluation")
    result = {
        "run": str(run or scores),
        "manifest": str(manifest),
        "manifest_sha256": data.sha256_of(manifest),
        "split": split,
        "benchmark": options.benchmark,
    }

    # from volumes to scores
    study, skipped = None, []
    if scores is None:
        prompts = prompts_for(options, rows)
        study = Study(run, manifest, options.cache, options.device, options.pairs, prompts)
        rows, v, skipped = study.embed(rows)
        way = readout(options, study.model.config, study.texts["summaries"])
        values = study.score(v, way)
        result["prompts_as"] = way
        scores = out / "scores.csv"
        write_scores(scores, [row.name for row in rows], prompts, values)
        result |= study.describe(rows, v, options.summaries)

    # from scores to metrics
    benchmark = data.BENCHMARKS.get(options.benchmark)
    values, labels, classes = join(read_scores(scores), rows, benchmark, scores)
    result |= {
        "volumes": len(rows),
        "scans": len({row.scan for row in rows}),
        "patients": len({row.patient for row in rows}),
        "skipped": skipped,
        "threshold": str(options.protocol or options.threshold),
    }
    if (~np.isnan(labels)).any():
        threshold = thresholds_for(options, manifest, rows, classes)
        result |= both_levels(values, labels, classes, rows, threshold)
        if study:
            result["readouts"] = study.readouts(v, labels, classes)
        if options.probe and study:
            add_probe(result, study, options.probe, rows, v, labels)
        if options.compare:
            result["compare"] = compare_scores(values, labels, classes, rows, options.compare)

    page = report.report_page(result, values, labels, rows, study)
    data.write_atomically(out / "report.html", page.encode())
    for picture in ("gap_picture", "prompts_picture"):
        result.pop(picture, None)
    data.write_atomically(out / "metrics.json", to_json(result).encode())
    return result


def prompts_for(options, rows=()):
    """Prompts for the benchmark's classes, else those of options.prompts, else of the rows' labels.

    Where there is nothing of these, for the 33 of CT-RATE and CT-RATE-LT.
    """
    classes = data.BENCHMARKS.get(options.benchmark)
    if not classes and not options.prompts:
        classes = data.classes_of(rows) or data.CT_RATE + data.CT_RATE_LT
    return make_prompts(classes, options.prompts, options.negative)


def select_rows(manifest, split=None):
    """A manifest's rows of a split, and its name; by default "test" or "valid", else all rows."""
    rows = data.read_manifest(manifest, None if split == "all" else split)
    for name in () if split else ("test", "valid"):
        chosen = [row for row in rows if row.split == name]
        if chosen:
            return chosen, name
    return rows, split or "all"


def to_json(value):
    """Strict JSON of nested dicts and lists: NaN becomes null."""
    strict = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(strict, indent=1, ensure_ascii=False)


class Study:
    """A run's model, the cache of its volumes beside the manifest, and the prompts put to it."""

    def __init__(self, run, manifest, cache, device, pairs, prompts):
        self.run, self.manifest = Path(run), Path(manifest)
        self.pairs, self.prompts = pairs, prompts
        self.model = load(run, device, prompts)
        self.weights = data.sha256_of(self.run / "model.safetensors")
        folder = cache or self.manifest.parent / "cache"
        self.cache = data.Cache.for_config(folder, self.model.config)
        self.reference, self.texts = read_reference(self.run / "reference.safetensors")

    def score(self, v, way):
        """Scores (N, C) of volumes v (N, d) by one of READOUTS."""
        summaries = self.texts["summaries"]
        if not summaries and way in READOUTS[2:]:
            raise ValueError(f"{self.run}: has no training summaries for --prompts-as {way}; "
                             "a training on summaries keeps them in reference.safetensors")
        return score(self.model, v, self.prompts, self.pairs, None, way, summaries)

    def readouts(self, v, labels, classes):
        """Macro AUROC of volumes v (N, d) by each possible readout: {way: {group: value}}."""
        columns, values = [list(self.prompts).index(name) for name in classes], {}
        for way in READOUTS if self.texts["summaries"] else READOUTS[:2]:
            auroc = metrics.auroc(self.score(v, way)[:, columns], labels)
            values[way] = {}
            for name, members in class_groups(classes).items():
                values[way][name] = metrics.nanmean(auroc[members]).item()
        return values

    def embed(self, rows):
        """The rows whose volumes can be read, their v (N, d), and the skipped as (name, reason).

        The run's embeddings.safetensors keeps each volume's v by the SHA-256 of the weights.
        """
        rows, skipped = data.prepare(rows, self.cache)
        if not rows:
            raise ValueError(
                f"{self.manifest}: none of its {len(skipped)} volumes can be read; "
                f"the first: {skipped[0][1]}"
            )
        path = self.run / "embeddings.safetensors"
        known = read_tensors(path)
        rank, world = place()
        if world > 1:
            dist.barrier()  # before the first process writes
        keys = []
        for row in rows:
            file = self.cache.path(row)
            keys.append(f"{self.weights} {file.resolve()} {file.stat().st_mtime_ns}")
        todo = [(key, row) for key, row in zip(keys, rows) if key not in known]
        for start in range(0, len(todo), 256):  # saved now and then: a killed run resumes
            new_keys, new_rows = zip(*todo[start:start + 256])
            device = self.model.bank.weight.device
            known |= zip(new_keys, embed_volumes(self.model, new_rows, self.cache, device))
            if rank == 0:
                data.write_atomically(path, save(known))
        return rows, torch.stack([known[key] for key in keys]), skipped

    def describe(self, rows, v, summaries=None):
        """What metrics.json says of the model, and of what it makes of volumes and texts."""
        prompts = json.dumps(self.prompts, sort_keys=True).encode()
        result = {
            "model_sha256": self.weights,
            "trained_on": self.model.config.trained_on,
            "prompts": self.prompts,
            "prompts_sha256": hashlib.sha256(prompts).hexdigest(),
            "pairs": list(self.pairs),
        }
        result |= self.texts_and_volumes(rows, v, summaries) | self.prompt_cosines()
        if any("hat" in pair for pair in self.pairs):
            result["bank"] = self.bank_entries(v)
        masks = self.manifest.parent / "masks"
        if self.model.config.trained_on == "phantom" and masks.is_dir():
            result["pointing"] = pointing(
                self.model, self.cache, rows, masks, self.prompts, self.pairs)
        return result

    def texts_and_volumes(self, rows, v, summaries=None):
        """Retrieval, the modality gap before and after the bank, and its picture, as a dict.

        The text of a row is its report's summary where there is one, else the report.
        """
        out = {}
        labels = data.labels_matrix(rows, rows[0].labels)
        if (labels == 1).any():
            precision = metrics.map_at_k(v, labels, [row.patient for row in rows])
            out["retrieval"] = {"volume_to_volume": precision}
        summaries = data.read_summaries(summaries) if summaries else {}
        texts = [data.text_of(row, summaries) for row in rows]
        with_text = [i for i, text in enumerate(texts) if self.model.text.clean(text)]
        texts = [texts[i] for i in with_text]
        if len(set(texts)) < 2:
            return out
        v, t = v[with_text], embed_texts(self.model, texts)
        v_hat, t_hat = bridge(self.model, v), bridge(self.model, t)
        vectors = joint_vectors(v, v_hat, t, t_hat, self.pairs)
        out["retrieval"] = metrics.retrieval(*vectors, texts) | out.get("retrieval", {})
        few = np.random.default_rng(0).permutation(len(texts))[:400]
        gap, picture = {}, {}
        for when, images, reports in (("before", v, t), ("after", v_hat, t_hat)):
            gap[when] = metrics.modality_gap(images, reports)
            points = metrics.project(images[few], reports[few])
            picture[when] = [np.round(side, 3).tolist() for side in points]
        return out | {"gap": gap, "gap_picture": picture}

    def prompt_cosines(self):
        """How alike the training's classes' prompts are: mean cosine of two, and all as a picture.

        Before the training, too, where the run's reference knows.
        """
        classes = self.texts["classes"] or list(self.prompts)
        t = {"after": embed_texts(self.model, [f"There is {name}" for name in classes])}
        if "t_first" in self.reference:
            t = {"before": self.reference["t_first"], **t}
        means, matrices = {}, {}
        for when, vectors in t.items():
            unit = F.normalize(vectors, dim=-1)
            matrices[when] = cosines = (unit @ unit.mT).numpy()
            means[when] = float(cosines[~np.eye(len(cosines), dtype=bool)].mean())
        return {"prompt_cosines": means, "prompts_picture": (classes, matrices)}

    def bank_entries(self, v):
        """How volumes v (N, d) use the knowledge bank, and the ten entries that they use most."""
        bank = self.model.bank
        prompts = [text for prompt in self.prompts.values() for text in prompt["positive"]]
        nearest = nearest_prompts(bank, embed_texts(self.model, prompts), prompts)
        usage = bank_usage(bank, v)
        shares, entries = usage.pop("weight").sort(descending=True)
        usage |= {"size": len(entries), "most_used": []}
        for i, share in zip(entries[:10].tolist(), shares.tolist()):
            entry = {"entry": i, "share": share, "prompts": nearest[i]}
            usage["most_used"].append(entry)
        return usage


def read_reference(path):
    """A run's reference.safetensors: its tensors, and {"summaries", "classes"}, lists of str.

    All are empty where there is none. ValueError where it is damaged.
    """
    tensors, texts = read_tensors(path), {"summaries": [], "classes": []}
    if tensors:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            texts |= {name: json.loads(metadata[name]) for name in texts if name in metadata}
            lists = [texts["summaries"], texts["classes"]]
            if not all(isinstance(text, str) for texts in lists for text in texts):
                raise ValueError("a list of texts is needed")
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: its metadata is damaged ({error}); delete it, the training "
                             "writes it") from None
    return tensors, texts


def read_tensors(path):
    """The tensors of a .safetensors by name: {} where there is none; ValueError where damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        return {}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); delete it, it can be done without") from None


# ---- one scan

def evaluate_volume(run, path, out=None, method=None, **options):
    """Rank the findings of one scan (.nii, .nii.gz, .npz): {"volume", "model", "findings", ...}.

    A finding is {"abnormality", "score", "percentile"}; the percentile is the share of the training
    scans (the run's reference.safetensors) that score lower, None where the run has none. With out,
    a folder: report.html and, of the named prompts or else of the first three findings, a heat map
    in the scan's own space. options: prompts, negative, pairs and device of Options.
    """
    options = Options(**options)
    prompts = prompts_for(options)
    model = load(run, options.device, prompts)
    config, volume = model.config, data.read_volume(path)
    hu = data.preprocess(volume.hu, volume.spacing, config.spacing, config.shape, config.hu_range)
    with torch.inference_mode():
        one = torch.from_numpy(hu)[None, None].to(model.bank.weight.device)  # (1, 1, X, Y, Z)
        v = model.encode_image(one).float().cpu()
    file = Path(run) / "reference.safetensors"
    reference, texts = read_reference(file)
    way = readout(options, config, texts["summaries"]), texts["summaries"]
    scores = score(model, v, prompts, options.pairs, None, *way)[0]
    result = {"volume": str(path), "model": str(run)}
    if config.trained_on == "phantom":
        result["warning"] = report.PHANTOM_WARNING
    result["problems"] = data.volume_problems(volume)

    # rank
    percentiles, others = [None] * len(scores), []
    if reference:
        for name in ("v", "v_hat"):
            if name not in reference or reference[name].shape[1:] != v.shape[1:]:
                raise ValueError(f"{file}: is not this model's; delete it, the training writes it")
        others = score(
            model, reference["v"], prompts, options.pairs, reference["v_hat"], *way)  # (N, C)
        lower, equal = (others < scores).mean(0), (others == scores).mean(0)
        percentiles = (100 * (lower + equal / 2)).tolist()
    findings = []
    for name, value, percentile in zip(prompts, scores.tolist(), percentiles):
        findings.append({"abnormality": name, "score": value, "percentile": percentile})
    findings.sort(key=lambda finding: (-(finding["percentile"] or 0), -finding["score"]))
    result |= {"reference_scans": len(others), "findings": findings}

    # show where
    if out:
        pictures = []
        for finding in findings[:None if options.prompts else 3]:
            name = finding["abnormality"]
            grid = heatmap(model, hu, prompts[name]["positive"], method, options.pairs)
            heat = to_scan(grid, volume, config)
            file = Path(out) / clean(name).replace(" ", "_")
            finding["heatmap"] = f"{file}.nii.gz"
            write_heatmap(finding["heatmap"], heat, volume, path)
            pictures.append(report.planes_png(heat, volume, name))
            data.write_atomically(f"{file}.png", pictures[-1])
        page = report.volume_page(result, pictures)
        data.write_atomically(Path(out) / "report.html", page.encode())
    return result


# ---- command line

def embed(run, manifest, out, split=None, cache=None, device=None):
    """Write the embeddings v, v_hat (N, d) of a manifest's volumes -> their number.

    Their names stand in the metadata ("names", JSON).
    """
    study = Study(run, manifest, cache, device, PAIRS[:2], {})
    rows, v, _ = study.embed(data.read_manifest(manifest, split))
    names = json.dumps([row.name for row in rows])
    content = save({"v": v, "v_hat": bridge(study.model, v)}, {"names": names})
    data.write_atomically(out, content)
    return len(rows)


def main(argv=None):
    a = parse(argv)
    names = {item.name for item in fields(Options)}
    options = {name: value for name, value in vars(a).items() if name in names}
    if a.embed:
        place = {name: options.get(name) for name in ("cache", "device")}
        count = embed(a.run, a.manifest, a.out, a.split, **place)
        print(f"{a.out}: embeddings of {count} volumes")
        return 0
    folder = (a.run or a.scores.parent) / "evaluation"
    if a.volume:
        name = re.sub(r"(?i)\.(nii(\.gz)?|npz)$", "", a.volume.name)
        out = a.out or (folder / name if a.heatmap else None)
        method = None if a.heatmap == "default" else a.heatmap
        result = evaluate_volume(a.run, a.volume, out, method, **options)
        table, written = report.volume_table(result), " and heat maps"
    else:
        out = a.out or folder
        result = evaluate(a.run, a.manifest, a.split, out, a.scores, **options)
        table, written = report.evaluation_table(result), ", metrics.json and scores.csv"
    print(to_json(result) if a.json else table)
    if out and not a.json:
        print(f"written: {out / 'report.html'}{written} beside it")
    return 0


if __name__ == "__main__":
    sys.exit(data.run_command(main))
