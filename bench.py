"""Every performance figure of the project and its evidence, each beside its peer in one run.

    python bench.py attention
    python bench.py ablation --seeds 2 --epochs 30

Compare only figures of one run: they vary with the machine and with what else it does.
"""
import argparse
import ctypes
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path


def parse(argv=None):
    """The command line's arguments."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(required=True, dest="command")

    def add(name, help, example=""):
        example = f"example: python bench.py {name} {example}"
        return commands.add_parser(name, help=help, epilog=example).add_argument

    add("preprocess", "reading and resampling of one scan beside SimpleITK")
    add("train", "a training step beside one of torch's and transformers' modules")
    option = add("evaluate", "1,000 patient resamples beside scikit-learn; one scan", "--sets 200")
    option("--sets", type=int, default=1000, help="simulated data sets for the intervals")
    option = add("summarize", "the small summarizer; the decoder beside transformers", "--small")
    option("--checkpoint", help="the small summarizer's folder; default: the one that comes along")
    option("--small", action="store_true", help="the small summarizer alone")
    add("attention", "the bank's attention beside eager torch and its fused attention")
    option = add("ablation", "summaries and bank, each alone and both", "--seeds 2 --epochs 30")
    option("--seeds", type=int, default=3)
    option("--epochs", type=int, default=12)
    option("--out", default="runs/ablation", help="the runs' folder")
    option = add("hostile", "damaged and foreign files to every reader", "--n 1000")
    option("--n", type=int, default=10_000, help="files")
    option("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    parse()  # before torch is loaded, so that it is quick

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import cmki
import data
import evaluate
import llm
import metrics
import phantom
import phantom_reports
import report
import summarize
import train
from model import BERT_CONFIG, PAIRS, BrgSA, Config, clean

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DEVICE_NAME = torch.cuda.get_device_name() if CUDA else "CPU"


def timed(call):
    """Seconds that a call takes, the GPU's work included."""
    start = time.perf_counter()
    call()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(rounds, *calls):
    """Median seconds of each of the calls, which are timed in turn."""
    return np.median([list(map(timed, calls)) for _ in range(rounds)], axis=0)


def in_new_process(call):
    """What a call, written in the names of this file, returns (JSON) in a process of its own."""
    command = [sys.executable, "-c", f"import json; from bench import *; print(json.dumps({call}))"]
    text = subprocess.check_output(command, text=True, cwd=Path(__file__).parent)
    return json.loads(text.splitlines()[-1])


def memory(key):
    """Bytes of this process's memory: "VmRSS" are those of now, "VmHWM" the most so far (Linux)."""
    return int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


# ---------------------------------------------------------------- preprocess
def bench_preprocess(arguments):
    """One scan, as a file, beside SimpleITK, which neither crops nor pads; both on all cores."""
    import SimpleITK as sitk
    hu = phantom.draw(0, "valid", 0)[0]
    for axis, size in enumerate((512, 512, 300)):  # a scan's size, its tissues and its noise
        hu = hu.take(np.arange(size) * hu.shape[axis] // size, axis)
    hu = (hu + np.random.default_rng(0).normal(0, 15, hu.shape)).astype(np.int16)
    grid = sitk.Image(239, 239, 100, sitk.sitkInt16)
    grid.SetSpacing((1.5, 1.5, 3.0))
    resample = partial(
        sitk.Resample, referenceImage=grid, transform=sitk.Transform(),
        interpolator=sitk.sitkLinear, defaultPixelValue=-1024)
    with tempfile.TemporaryDirectory() as folder:
        scan = f"{folder}/scan.nii.gz"
        nibabel.save(nibabel.Nifti1Image(hu, np.diag([-0.7, -0.7, 1.0, 1])), scan)
        own, peer, read, peer_read = medians(
            5, partial(preprocessed, scan), lambda: resample(sitk.ReadImage(scan)),
            partial(data.read_volume, scan), partial(sitk.ReadImage, scan))
    print("| 512 x 512 x 300, .nii.gz | here, s | SimpleITK, s | ratio |\n|---|---|---|---|\n"
          f"| read | {read:.3f} | {peer_read:.3f} | {read / peer_read:.2f} |\n"
          f"| read and resample | {own:.3f} | {peer:.3f} | {own / peer:.2f} |")


def preprocessed(scan):
    """A scan's file as preset base sees it."""
    volume = data.read_volume(scan)
    return data.preprocess(volume.hu, volume.spacing)


# ---------------------------------------------------------------- train
SIZES = {  # name: (what differs from preset base, pairs in a batch)
    "base": ({}, 2),
    "small": (dict(crop=(112, 112, 56), vit_width=384, vit_depth=6, vit_heads=6, text_width=384,
                   text_depth=6, text_heads=6, text_mlp=1536, dim=384), 8),
}


def bench_train(arguments):
    """Forward and backward of a step beside the same sizes and losses in others' modules."""
    print(f"A step without the optimiser; {DEVICE_NAME}\n\n| size, batch | type | here, s | "
          "peer, s | ratio | here, GiB | peer, GiB | checkpointed, s | GiB |\n" + "|---" * 9 + "|")
    for size, (_, batch) in SIZES.items():
        for dtype in ("float32", "bfloat16"):
            figures = []
            for way in ("here", "peer", "checkpointed"):
                figures.append(in_new_process(f"step_figures({size!r}, {dtype!r}, {way!r})"))
            (own, held), (peer, peer_held), (again, kept) = figures
            print(f"| {size}, {batch} | {dtype} | {own:.2f} | {peer:.2f} | {own / peer:.2f} | "
                  f"{held / 2**30:.2f} | {peer_held / 2**30:.2f} | {again:.2f} | "
                  f"{kept / 2**30:.2f} |")


def step_figures(size, dtype, way):
    """Median seconds of a step, and the bytes of memory that the process took at most."""
    if not CUDA:
        train.keep_freed_memory()
    changes, batch = SIZES[size]
    config = Config(**changes, text_dropout=0.0)
    torch.manual_seed(0)
    model = (Peer if way == "peer" else BrgSA)(config).to(DEVICE)
    if way == "checkpointed":
        train.checkpoint_blocks(model)
    volumes = torch.randint(-1000, 1000, (batch, 1, *config.crop), dtype=torch.int16)
    texts = ["a " * config.text_length] * batch

    def step():
        model.zero_grad()
        with torch.autocast(DEVICE, getattr(torch, dtype), dtype != "float32"):
            embeddings = [x.float() for x in model(volumes.to(DEVICE), texts)]
        loss, _ = cmki.alignment_loss(*embeddings)
        loss.backward()
    seconds = [timed(step) for _ in range(4)]
    peak = torch.cuda.max_memory_allocated() if CUDA else memory("VmHWM")
    return statistics.median(seconds[1:]), peak


class Peer(torch.nn.Module):
    """BrgSA of the parts that are at hand: torch's convolution and encoder, transformers' BERT."""

    def __init__(self, c):
        super().__init__()
        from transformers import BertConfig, BertModel
        self.own = BrgSA(replace(c, vit_depth=1, text_depth=1))  # projections, positions, bank
        self.patches = torch.nn.Conv3d(1, c.vit_width, c.patch, c.patch)
        layer = torch.nn.TransformerEncoderLayer(
            c.vit_width, c.vit_heads, 4 * c.vit_width, 0.0, "gelu", 1e-6, True, norm_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, c.vit_depth, enable_nested_tensor=False)
        bert = {name: getattr(c, own) for name, own in BERT_CONFIG.items()}
        self.bert = BertModel(BertConfig(attention_probs_dropout_prob=0.0, **bert))

    def forward(self, volumes, texts):
        own, cls = self.own, self.own.vision.cls_token.expand(len(texts), -1, -1)
        x = self.patches(own.normalise(volumes)).flatten(2).mT
        x = self.layers(torch.cat([cls, x], 1) + own.vision.pos_embed)
        tokens = torch.ones(len(texts), own.config.text_length, dtype=torch.long, device=x.device)
        states = self.bert(tokens, output_hidden_states=True).hidden_states
        v = own.vision_projection(own.vision.norm(x)[:, 0])
        t = own.text_projection(sum(states[-4:]).mean(1))
        bank = own.bank.weight
        return v, t, cmki.reference_attention(v, bank), cmki.reference_attention(t, bank)


# ---------------------------------------------------------------- evaluate
def bench_evaluate(arguments):
    """1,000 patient resamples beside scikit-learn; do the intervals hold the truth; one scan."""
    from sklearn import metrics as sk
    rng = np.random.default_rng(0)
    patients = np.r_[np.arange(1304), rng.integers(1304, size=3039 - 1304)]
    labels = rng.random((3039, 18)) < rng.uniform(0.03, 0.45, 18)
    scores = rng.normal(size=labels.shape) + labels

    def peer():
        drawn = rng.integers(1304, size=1304)
        rows = np.concatenate([np.flatnonzero(patients == patient) for patient in drawn])
        for label, score in zip(labels[rows].T, scores[rows].T):
            sk.roc_auc_score(label, score)
            sk.average_precision_score(label, score)
            for metric in (sk.f1_score, sk.accuracy_score, sk.precision_score, sk.recall_score):
                metric(label, score > 0.5)

    bootstrap = partial(metrics.bootstrap, scores, labels, patients, 0.5)
    seconds, one_resample = medians(10, bootstrap, peer)
    peer_seconds = 1000 * one_resample
    print("| patient resamples | bootstrap, 8 metrics, s | scikit-learn, 6 metrics, s | ratio |\n"
          f"|---|---|---|---|\n| 1,000 of 3,039 volumes x 18 classes | {seconds:.3f} | "
          f"{peer_seconds:.1f} | {peer_seconds / seconds:.0f} |")
    coverage(rng, arguments.sets)
    bench_one_scan()


def coverage(rng, sets, truth=0.8):
    """How often the 95 % interval over patients, and over volumes, holds the true AUROC."""
    distance = statistics.NormalDist().inv_cdf(truth) * 2 ** 0.5  # between two unit normals
    held = Counter()
    for _ in range(sets):
        patients = np.repeat(np.arange(300), rng.integers(1, 4, 300))  # 1 to 3 volumes each
        labels = (rng.random(300) < 0.3)[patients]
        of_patient, of_volume = rng.normal(size=300)[patients], rng.normal(size=len(patients))
        scores = distance * labels + 0.8 ** 0.5 * of_patient + 0.2 ** 0.5 * of_volume
        for unit, groups in ("patients", patients), ("volumes", np.arange(len(patients))):
            drawn = metrics.bootstrap(scores[:, None], labels[:, None], groups, 0.0)["auroc"]
            low, high = metrics.interval(drawn[:, 0])
            held[unit] += low <= truth <= high
    print(f"\n| interval over | holds the true AUROC {truth} in |\n|---|---|")
    for unit, count in held.items():
        print(f"| {unit} | {100 * count / sets:.1f} % of {sets} simulated data sets |")


def bench_one_scan():
    """evaluate.py RUN --volume from start to end: preset base, float32."""
    print("\n| evaluate.py | s | GiB at most |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        BrgSA().save_pretrained(folder)
        hu = np.random.default_rng(0).normal(-300, 300, (512, 512, 300)).astype(np.int16)
        scan = f"{folder}/scan.nii.gz"
        nibabel.save(nibabel.Nifti1Image(hu, np.diag([-0.7, -0.7, 1.25, 1])), scan)
        for options in ([], ["--heatmap", "--prompts", "lung nodule"]):
            command = [folder, "--volume", scan, *options]
            start = time.perf_counter()
            peak = in_new_process(f"evaluate.main({command}) or memory('VmHWM')")
            seconds = time.perf_counter() - start
            print(f"| --volume {' '.join(options)} | {seconds:.0f} | {peak / 2**30:.1f} |")


# ---------------------------------------------------------------- summarize
def bench_summarize(arguments):
    """The small summarizer's speed and F1; the decoder beside transformers' generate."""
    for wordings in ("usual", "held-out"):
        checkpoint = arguments.checkpoint or summarize.SMALL_CHECKPOINT
        bench_small_summarizer(checkpoint, wordings)
    if not arguments.small:
        bench_decoder()


def bench_small_summarizer(checkpoint, wordings, n=1000):
    """n phantom reports of a seed not trained on, enriched with the rare abnormalities."""
    examples = list(phantom_reports.reports(n, 77, wordings=wordings, enriched=True))
    texts = [text for text, _, _ in examples]
    start = time.perf_counter()
    model = llm.LLM.from_pretrained(checkpoint, "cpu")
    answers = [names for _, names, _, _ in sorted(summarize.answers(model, texts, 128))]
    speed = n / (time.perf_counter() - start)
    rows, summaries, against, invented = [], {}, 0, 0
    for (text, affirmed, denied), names in zip(examples, answers):
        labels = {f"label:{name}": float(name in affirmed) for name in summarize.BENCHMARK_NAMES}
        rows.append({"report": text} | labels)
        summaries[summarize.sha256(text)] = {"abnormalities": names}
        against += not denied.isdisjoint(names or ())
        invented += not set(affirmed).issuperset(names or ())
    print("\n| phantom reports | reports/s | affirms what is denied | or not named | unreadable |\n"
          f"|---|---|---|---|---|\n| {n}, {wordings} wordings | {speed:.0f} | {against / n:.1%} | "
          f"{invented / n:.1%} | {answers.count(None)} |\n")
    print(summarize.format_score(summarize.score(rows, summaries)))


def bench_decoder():
    """8 prompts of 600 tokens, 450 shared, 64 new; Qwen2.5-0.5B's sizes, bf16, 2 threads."""
    import transformers
    numbers = torch.ones(2 ** 26)
    bandwidth = numbers.nbytes / min(timed(numbers.sum) for _ in range(5))
    config = transformers.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = Path(folder, "model.safetensors").stat().st_size
        print(f"\nWeights of {size / 1e9:.2f} GB, read at {bandwidth / 1e9:.0f} GB/s: at most "
              f"{8 * bandwidth / size:.0f} tokens/s\n\n| decoder | whole, s | new tokens/s | "
              "prefill, s | decode, tokens/s | peak MiB |\n|---|---|---|---|---|---|")
        for kind in ("LLM, head shared", "LLM", "transformers"):
            prefill, whole, peak = in_new_process(f"decoder_figures({folder!r}, {kind!r})")
            print(f"| {kind} | {whole:.2f} | {8 * 64 / whole:.1f} | {prefill:.2f} | "
                  f"{8 * 63 / (whole - prefill):.1f} | {peak / 2**20:.0f} |")


def decoder_figures(folder, kind):
    """Seconds for one new token a prompt and for 64, and the process's peak memory in bytes."""
    torch.set_num_threads(2)
    prompts = torch.randint(10, 150000, (8, 600), generator=torch.Generator().manual_seed(0))
    prompts[:, :450] = prompts[0, :450]
    if kind == "transformers":
        import transformers
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        generate = partial(peer.generate, attention_mask=torch.ones_like(prompts), do_sample=False)
    else:
        generate = llm.LLM.from_pretrained(folder, "cpu").generate_ids
        generate = partial(generate, share_prefix=kind == "LLM, head shared")

    def seconds(new):
        prompts[:, 0] += 1  # another head each time: none is known from the last call
        ids = prompts if kind == "transformers" else prompts.tolist()
        return timed(lambda: list(generate(ids, max_new_tokens=new)))

    seconds(2)  # what is set up once is no cost of a prompt
    return seconds(1), min(seconds(64), seconds(64)), memory("VmHWM")


# ---------------------------------------------------------------- attention
def sdpa(x, bank):
    """softmax(x bank^T) bank by torch's own attention."""
    entries = bank[None, None]
    return F.scaled_dot_product_attention(x[None, None], entries, entries, scale=1.0)[0, 0]


WAYS = {"bank_attention": cmki.bank_attention, "eager": cmki.reference_attention, "SDPA": sdpa}


def bench_attention(arguments):
    """The bank's attention beside eager torch and F.scaled_dot_product_attention."""
    print(f"Bank of 2048 x d; {DEVICE_NAME}; FLOP: 4 N K d forward, 12 N K d with backward")
    for dtype in ("float32", "bfloat16"):
        rate = train.matrix_rate(DEVICE, getattr(torch, dtype), 8192 if CUDA else 2048)
        print(f"\n{dtype}: a matrix product runs at {rate / 1e9:.0f} GFLOP/s\n\n"
              "| d | N | way | forward, ms | of that rate | forward + backward, ms | "
              "of that rate | beside the faster peer | memory, MiB |\n" + "|---" * 9 + "|")
        # At d 256 a GPU's half precision runs the Triton pair, at 768 chunked products.
        for d, n, rounds in ((256, 10976, 7), (768, 64, 41), (768, 2744, 9), (768, 10976, 7)):
            attention_rows(n, d, rounds, dtype, rate)


def attention_rows(n, d, rounds, dtype, rate):
    """Print a row for each way with n queries; rate: of the matrix product, in FLOP/s."""
    x, bank, gradient = attention_inputs(n, d, dtype)
    calls = []
    for attend in WAYS.values():
        calls += partial(attend, x, bank), partial(forward_backward, attend, x, bank, gradient)
    medians(2, *calls)  # warms up
    forward, both = medians(rounds, *calls).reshape(-1, 2).T  # each (ways,)
    product = n * bank.numel() / rate  # seconds for N K d multiplications alone
    for i, way in enumerate(WAYS):
        peak = in_new_process(f"attention_memory({way!r}, {n}, {d}, {dtype!r})")
        print(f"| {d} | {n} | {way} | {1e3 * forward[i]:.2f} | {4 * product / forward[i]:.0%} | "
              f"{1e3 * both[i]:.2f} | {12 * product / both[i]:.0%} | "
              f"{both[i] / both[1:].min():.2f} | {peak / 2**20:.1f} |")


def attention_inputs(n, d, dtype):
    """x (n, d) and an orthogonal bank (2048, d) that want gradients; the output's gradient."""
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    x, gradient = torch.randn(2, n, d).to(DEVICE, dtype)
    bank = torch.nn.init.orthogonal_(torch.empty(2048, d)).to(DEVICE, dtype)
    return x.requires_grad_(), bank.requires_grad_(), gradient


def forward_backward(attend, x, bank, gradient):
    """One pass of a way to attend, there and back."""
    x.grad = bank.grad = None
    attend(x, bank).backward(gradient)


def attention_memory(way, n, d, dtype):
    """Peak bytes of a pass beyond inputs, output and gradients; on the CPU in a new process."""
    forward_backward(WAYS[way], *attention_inputs(8, d, dtype))  # loads what is loaded once
    x, bank, gradient = attention_inputs(n, d, dtype)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # so that no freed page counts as there already
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present
        before = memory("VmRSS")
    forward_backward(WAYS[way], x, bank, gradient)
    peak = torch.cuda.max_memory_allocated() if CUDA else memory("VmHWM")
    return peak - before - 2 * x.nbytes - bank.nbytes


# ---------------------------------------------------------------- ablation
# arm: (does it have summaries, does it have the bank's losses as the preset weighs them)
ARMS = {"contrastive": (False, False), "+ summaries": (True, False), "+ bank": (False, True),
        "+ both: BrgSA": (True, True)}


def bench_ablation(arguments):
    """Contrastive learning, with summaries, with the bank, with both, on the phantom.

    Writes a table and a picture to assets/. Every arm is scored on the same scans and resampled
    with the same patients, its seeds' AUROC averaged. Finished runs in --out are used again: so
    seeds can be added, and the same command goes on where a bench was stopped.
    """
    manifest, summaries = str(train.phantom_manifest()), train.phantom_summaries()
    rows, _ = evaluate.select_rows(manifest, "valid")
    results, pictures = defaultdict(list), {}
    for seed in range(arguments.seeds):
        for arm, (with_summaries, with_bank) in ARMS.items():
            run = Path(arguments.out, f"{clean(arm).replace(' ', '_')}-{seed}")
            texts = summaries if with_summaries else None
            command = ["--manifest", manifest, "--summaries", texts or "none", "--out", str(run)]
            command += f"--preset phantom --epochs {arguments.epochs} --seed {seed}".split()
            command += ["--resume"] if with_bank else "--resume --alpha 0 --gamma 0".split()
            if not (run / "evaluation/metrics.json").exists() and train.main(command):
                return 130  # stopped by Ctrl-C
            evaluate.evaluate(  # for all arms by the same prompts
                run, manifest, "valid", pairs=PAIRS[:1 + with_bank], summaries=texts,
                prompts_as="plain")
            results[arm].append(collect(run, rows))
            if seed == 0:
                study = evaluate.Study(run, manifest, None, None, PAIRS[:2], {})
                v = study.embed(rows)[1]
                pictures[arm] = study.texts_and_volumes(rows, v, texts)["gap_picture"]
    patients = {row.patient for row in rows}
    table = (f"{ablation_table(results)}\n\n{arguments.seeds} seeds, {arguments.epochs} epochs "
             f"each, {len(rows)} volumes of {len(patients)} patients\n")
    print(table)
    data.write_atomically("assets/ablation.md", table.encode())
    ablation_figure(pictures).savefig("assets/ablation.png", dpi=80)


def collect(run, rows):
    """A finished run -> macro AUROC of both groups of classes, (2, 1 + 2000), and the gap (4,).

    The groups are CT-RATE's classes and CT-RATE-LT's; the AUROC itself, then its resamples.
    """
    scores = evaluate.read_scores(run / "evaluation/scores.csv")
    scores, labels, _ = evaluate.join(scores, rows)
    patients = [row.patient for row in rows]
    drawn = metrics.bootstrap(scores, labels, patients, 0.0, n=2000)["auroc"]
    auroc = np.vstack([metrics.auroc(scores, labels), drawn])  # (1 + 2000, C)
    gap = json.loads((run / "evaluation/metrics.json").read_text())["gap"]
    keys = ("centroid_distance", "linear_separability")
    gap = [gap[when][key] for when in ("before", "after") for key in keys]
    return [np.nanmean(auroc[:, :18], 1), np.nanmean(auroc[:, 18:], 1)], gap


def ablation_table(results):
    """{arm: what collect returned, seed by seed} -> a Markdown table, a row an arm."""
    lines = ["| arm | CT-RATE's 18, macro AUROC | against contrastive (95 %), p | CT-RATE-LT's 15, "
             "macro AUROC | against contrastive (95 %), p | gap: centroid distance | "
             "linear separability | the same after the bank |", "|---" * 8 + "|"]
    for arm, runs in results.items():
        auroc, gap = map(np.array, zip(*runs))  # (S, 2, 1 + 2000), (S, 4)
        spread = auroc[..., 0].std(0, ddof=min(1, len(runs) - 1))
        auroc, gap = auroc.mean(0), gap.mean(0)
        if arm == "contrastive":
            peer = auroc
        line = f"| {arm} |"
        for group, other, deviation in zip(auroc, peer, spread):
            line += f" {100 * group[0]:.1f} ± {100 * deviation:.1f} | {difference(group - other)} |"
        after = f"{gap[2]:.2f}, {gap[3]:.2f}" if ARMS[arm][1] else ""
        lines.append(f"{line} {gap[0]:.2f} | {gap[1]:.2f} | {after} |")
    return "\n".join(lines)


def difference(values):
    """A difference of AUROCs and its resamples (1 + 2000,) -> it, its interval, two-sided p."""
    value, drawn = values[0], values[1:]
    if not drawn.any():
        return ""  # contrastive against itself
    low, high = 100 * metrics.interval(drawn)
    tail = 1 + min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1, 2 * tail / (1 + len(drawn)))
    return f"{100 * value:+.1f} ({low:+.1f} to {high:+.1f}), {p:.3f}"


def ablation_figure(pictures):
    """{arm: {"before", "after": (scans, texts), each (N, 2)}} -> a figure, a column an arm."""
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    grid = figure.subplots(2, len(pictures), squeeze=False)
    for column, (arm, picture) in zip(grid.T, pictures.items()):
        titles = (arm, "after the bank" if ARMS[arm][1] else "no bank")
        for axes, title, clouds in zip(column, titles, picture.values()):
            axes.set(xticks=[], yticks=[], title=title)
            if title == "no bank":
                axes.set_axis_off()
            else:
                report.draw_clouds(axes, clouds)
    grid[0, 0].legend(frameon=False)
    return figure


# ---------------------------------------------------------------- hostile files
def bench_hostile(arguments):
    """Counts of what n damaged files lead to; faults are printed and left in runs/hostile."""
    sys.path.append(str(Path(__file__).parent / "tests"))
    from hostile import hostile_outcomes
    folder = Path("runs/hostile")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before, counts, status = memory("VmHWM"), defaultdict(Counter), 0
    results = hostile_outcomes(folder, arguments.n, arguments.seed)
    for name, result in tqdm(results, "hostile", arguments.n, unit="file"):
        if result not in ("read", "refused"):
            print(f"{name}: {result}")
            result, status = "fault", 1
        counts[name][result] += 1
    print("\n| file | read | refused in one line | faults |\n|---|---|---|---|")
    for name, count in sorted(counts.items()):
        print(f"| {name} | {count['read']} | {count['refused']} | {count['fault']} |")
    grown = (memory("VmHWM") - before) / 2**20
    print(f"\nmemory beyond that of the start, at most: {grown:.0f} MiB")
    return status


# ---------------------------------------------------------------- command line
def main(argv=None):
    """The command line; returns the exit status."""
    arguments = parse(argv)
    return globals()[f"bench_{arguments.command}"](arguments)


if __name__ == "__main__":
    sys.exit(data.run_command(main))
