"""Every performance figure of the project, each beside its peer in one run.

    python bench.py preprocess        python bench.py attention        python bench.py summarize
    python bench.py evaluate          python bench.py ablation
"""
import argparse
import statistics
import time
from pathlib import Path


def bench_preprocess(arguments):
    """A 512 x 512 x 300 scan to 256 x 256 x 128 at 1.5 x 1.5 x 3 mm beside SimpleITK's resampling, both on all cores."""
    import numpy as np
    import SimpleITK as sitk

    import data
    hu = np.asfortranarray(np.random.default_rng(0).integers(-1000, 1000, (512, 512, 300)).astype(np.int16))
    image = sitk.GetImageFromArray(hu.T)
    image.SetSpacing((0.7, 0.7, 1.0))
    size, spacing = [round(n * s / t) for n, s, t in zip(hu.shape, image.GetSpacing(), (1.5, 1.5, 3.0))], (1.5, 1.5, 3.0)

    def peer():  # the resampling alone; cropping and padding are left out in its favour
        return sitk.Resample(image, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), spacing, image.GetDirection(), -1024)

    ours, theirs = (statistics.median(times) for times in zip(*[(timed(lambda: data.preprocess(hu, (0.7, 0.7, 1.0))), timed(peer)) for _ in range(7)]))
    print(f"512 x 512 x 300 to 256 x 256 x 128: {ours:.3f} s; SimpleITK: {theirs:.3f} s; ratio {theirs / ours:.2f}")


def bench_evaluate(arguments):
    """1,000 patient resamples of CT-RATE's validation set beside the same by scikit-learn, and whether the intervals hold the truth."""
    import numpy as np
    from sklearn import metrics as sk

    import metrics
    rng = np.random.default_rng(0)
    patients = np.r_[np.arange(1304), rng.integers(1304, size=3039 - 1304)]
    labels = (rng.random((3039, 18)) < rng.uniform(0.03, 0.45, 18)).astype(float)
    scores, thresholds = rng.normal(size=labels.shape) + labels, np.full(18, 0.5)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        metrics.bootstrap(scores, labels, patients, thresholds)
        times.append(time.perf_counter() - start)
    ours = sorted(times)[2]
    start, peer_resamples = time.perf_counter(), 10
    for _ in range(peer_resamples):
        rows = np.concatenate([np.flatnonzero(patients == p) for p in rng.integers(1304, size=1304)])
        for y, s in zip(labels[rows].T, scores[rows].T):
            predicted = s > 0.5
            for metric in (sk.roc_auc_score, sk.average_precision_score):
                metric(y, s)
            for metric in (sk.f1_score, sk.accuracy_score, sk.precision_score, sk.recall_score):
                metric(y, predicted)
    peer = (time.perf_counter() - start) * 1000 / peer_resamples
    print(f"1,000 patient resamples, 3,039 volumes x 18 classes, 8 metrics: {ours:.3f} s; scikit-learn's loop, 6 metrics: {peer:.1f} s, "
          f"measured on {peer_resamples}; ratio {peer / ours:.0f}")

    truth, sets, held = 0.8, arguments.sets, {"patients": 0, "volumes": 0}
    shift = statistics.NormalDist().inv_cdf(truth) * 2 ** 0.5                    # AUROC of two unit normals that lie `shift` apart
    for _ in range(sets):
        groups = np.repeat(np.arange(300), rng.integers(1, 4, 300))                               # one to three volumes a patient
        y = (rng.random(300) < 0.3)[groups].astype(float)
        s = shift * y + 0.8 ** 0.5 * rng.normal(size=300)[groups] + 0.2 ** 0.5 * rng.normal(size=len(groups))
        for unit, index in (("patients", groups), ("volumes", np.arange(len(groups)))):
            low, high = metrics.interval(metrics.bootstrap(s[:, None], y[:, None], index, [0.0])["auroc"])[:, 0]
            held[unit] += low <= truth <= high
    for unit, count in held.items():
        print(f"the 95 % bootstrap interval over {unit} holds the true AUROC {truth} in {100 * count / sets:.1f} % of {sets} simulated data sets")
    bench_one_scan()


def bench_one_scan():
    """`evaluate.py RUN --volume` from its start to its end: preset `base`, a scan of 512 x 512 x 300 voxels, the 33 prompts."""
    import os
    import subprocess
    import sys
    import tempfile

    import nibabel
    import numpy as np

    from model import BrgSA
    with tempfile.TemporaryDirectory() as folder:
        BrgSA().save_pretrained(folder)
        hu = np.random.default_rng(0).normal(-300, 300, (512, 512, 300)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(hu, np.diag([-0.7, -0.7, 1.25, 1])), f"{folder}/scan.nii.gz")
        for extra in ((), ("--heatmap", "--prompts", "lung nodule")):
            start = time.perf_counter()
            child = subprocess.Popen([sys.executable, "evaluate.py", folder, "--volume", f"{folder}/scan.nii.gz", *extra], stdout=subprocess.DEVNULL)
            peak = os.wait4(child.pid, 0)[2].ru_maxrss
            print(f"evaluate.py --volume {' '.join(extra)}: {time.perf_counter() - start:.0f} s, {peak / 2**20:.1f} GiB at most, float32, {os.cpu_count()} cores")


QWEN_05B = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu",
            "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
DECODER = """
import json, sys, time, torch
torch.set_num_threads(2)
directory, ours, new, prompts = sys.argv[1], sys.argv[2] == "ours", int(sys.argv[3]), json.load(open(sys.argv[4]))
if ours:
    import summarize
    llm = summarize.LLM.from_pretrained(directory, "cpu")
    def generate(prompts, n, share):
        llm.shared = (), None
        return [row for _, row in sorted(llm.generate_ids(prompts, n, share_prefix=share))]
else:
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    def generate(prompts, n, share):
        ids = torch.tensor(prompts)
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)[:, ids.shape[1]:].tolist()
def seconds(n, share):
    start = time.perf_counter()
    rows = generate(prompts, n, share)
    assert all(len(row) == n for row in rows)
    return time.perf_counter() - start
generate(prompts[:2], 2, True)
times = {}
for share in (True, False) if ours else (False,):
    first, whole = seconds(1, share), min(seconds(new, share) for _ in range(2))
    times["shared head" if share else "no shared head"] = {"prefill": first, "whole": whole}
peak = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print(json.dumps({"times": times, "peak MiB": peak / 1024}))
"""


def bench_summarize(arguments):
    """The decoder beside transformers' generate on random weights of Qwen2.5-0.5B's dimensions; the small summarizer on phantom reports it wasn't trained on."""
    import json
    import subprocess
    import sys
    import tempfile

    import distil
    import phantom_reports
    import summarize
    import torch
    if arguments.pairs:
        with open(arguments.pairs, "w", encoding="utf-8") as file:
            for sentence, names in distil.summarizer_pairs(800_000):
                file.write(json.dumps({"report": sentence, "abnormalities": names}) + "\n")
        return print(f"{arguments.pairs}: 800,000 pairs")
    directory = Path(arguments.checkpoint)
    print("small summarizer, 1,000 phantom reports of a seed not trained on, enriched with the rare abnormalities")
    for wordings in ("usual", "held-out"):
        triples = list(phantom_reports.reports(1000, 77, wordings=wordings, enriched=True))
        start, llm = time.perf_counter(), summarize.LLM.from_pretrained(directory, "cpu")
        found = {i: names for i, names, _, _ in summarize.answers(llm, [report for report, _, _ in triples], batch_size=128)}
        elapsed = time.perf_counter() - start
        rows = [{"report": report, **{f"label:{name}": str(int(name in names)) for name in summarize.BENCHMARK_NAMES}} for report, names, _ in triples]
        table = summarize.score(rows, {summarize.sha256(triples[i][0]): {"abnormalities": names} for i, names in found.items()})
        denied = sum(bool(set(found[i] or ()) & no) for i, (_, _, no) in enumerate(triples)) / len(triples)
        wrong = sum(bool(set(found[i] or ()) - set(yes)) for i, (_, yes, _) in enumerate(triples)) / len(triples)
        print(f"\n{wordings} wordings: {1000 / elapsed:.0f} reports/s; {denied:.1%} of reports have an abnormality affirmed that they deny, {wrong:.1%} one that they deny or "
              f"don't name; {sum(names is None for names in found.values())} unreadable answers\n{summarize.format_score(table)}")
    if arguments.small:
        return None

    numbers = torch.ones(2 ** 28 // 4)
    bandwidth = max(numbers.numel() * 4 / timed(numbers.sum) for _ in range(5)) / 1e9
    generator = torch.Generator().manual_seed(0)
    head = torch.randint(10, 150000, (450,), generator=generator).tolist()
    prompts = [head + torch.randint(10, 150000, (150,), generator=generator).tolist() for _ in range(8)]
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        shapes = summarize.Config.from_dict(QWEN_05B).shapes()
        weights = {name: (torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in shapes.items()}
        size = sum(weight.numel() * 2 for weight in weights.values())
        summarize.save_file(weights, directory / "model.safetensors", {"format": "pt"})
        del weights
        (directory / "config.json").write_text(json.dumps(QWEN_05B))
        (directory / "prompts.json").write_text(json.dumps(prompts))
        results = {}
        for name in ("ours", "transformers"):
            command = [sys.executable, "-c", DECODER, str(directory), name, "64", str(directory / "prompts.json")]
            results[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.splitlines()[-1])
    print(f"\nQwen2.5-0.5B's dimensions, bf16, 2 threads, 8 prompts of 600 tokens (450 shared), 64 new; weights {size / 1e9:.2f} GB, memory read at {bandwidth:.0f} GB/s: "
          f"at most {8 * bandwidth * 1e9 / size:.0f} tokens/s by reading the weights once a step")
    for name, result in results.items():
        for kind, t in result["times"].items():
            print(f"{name:13s} {kind:15s} whole {t['whole']:6.2f} s = {512 / t['whole']:6.1f} new tokens/s; prefill {t['prefill']:6.2f} s = {4800 / t['prefill']:6.0f} prompt tokens/s; "
                  f"decode {504 / (t['whole'] - t['prefill']):6.1f} tokens/s; peak {result['peak MiB']:.0f} MiB")
    peer, ours = results["transformers"]["times"]["no shared head"], results["ours"]["times"]
    decode = lambda t: t["whole"] - t["prefill"]
    print(f"ratios: whole {peer['whole'] / ours['shared head']['whole']:.2f}; decode without a shared head {decode(peer) / decode(ours['no shared head']):.2f}")


def attention_ways():
    """The three ways to softmax(x bank^T) bank by name."""
    import torch.nn.functional as F

    import cmki
    return {"ours": cmki.bank_attention, "eager": cmki.reference_attention,
            "SDPA": lambda x, bank: F.scaled_dot_product_attention(x[None, None], bank[None, None], bank[None, None], scale=1.0)[0, 0]}


def attention_inputs(n, dtype, size=2048, dim=768):
    """x (n, dim), an orthogonal bank (size, dim), both requiring gradients, and the gradient of the output; on CUDA where there is one."""
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x, bank, g = torch.randn(n, dim), torch.nn.init.orthogonal_(torch.empty(size, dim)), torch.randn(n, dim)
    x, bank, g = (a.to(device, getattr(torch, dtype)) for a in (x, bank, g))
    return x.requires_grad_(), bank.requires_grad_(), g


def attention_memory(way, n, dtype):
    """Print the peak bytes of one forward + backward pass beyond inputs, output and their gradients; on CPU for a process of its own."""
    import ctypes

    import torch
    attend = attention_ways()[way]
    x, bank, g = attention_inputs(8, dtype)
    attend(x, bank).backward(g)  # what libraries load once is no cost of the pass
    x, bank, g = attention_inputs(n, dtype)
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # so that no freed page is counted as there already
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets VmHWM to the present
        before = status_bytes("VmRSS")
    out = attend(x, bank)
    out.backward(g)
    peak = torch.cuda.max_memory_allocated() if x.is_cuda else status_bytes("VmHWM")
    print(peak - before - sum(a.nbytes for a in (out, x.grad, bank.grad)))


def status_bytes(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":")) * 1024


def bench_attention(arguments):
    """bank_attention beside the two lines in eager torch and F.scaled_dot_product_attention: time, share of the matrix rate, memory."""
    import subprocess
    import sys

    import torch
    from torch.nn.attention import SDPBackend
    ways, cuda = attention_ways(), torch.cuda.is_available()
    synchronise = torch.cuda.synchronize if cuda else lambda: None
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"Attention over a bank of 2048 x 768; {name}; medians, the three ways in turn; FLOP/s: 4 N K d forward, 12 N K d with backward")
    for dtype in ("float32", "bfloat16"):
        a, b = (torch.randn(8192 if cuda else 2048, 8192 if cuda else 2048).to("cuda" if cuda else "cpu", getattr(torch, dtype)) for _ in range(2))
        rate = 2 * len(a) ** 3 / min(timed(lambda: (a @ b, synchronise())) for _ in range(10))
        x, bank, _ = attention_inputs(64, dtype)
        backend = SDPBackend(torch._fused_sdp_choice(x[None, None], bank[None, None], bank[None, None])).name
        print(f"\n{dtype}: matrix product {rate / 1e9:.0f} GFLOP/s; SDPA takes its {backend} backend\n\n"
              "| N | way | forward ms | GFLOP/s | of the rate | forward + backward ms | GFLOP/s | of the rate | against the faster peer | memory MiB |\n"
              "|---|---|---|---|---|---|---|---|---|---|")
        for n, rounds in (64, 41), (2744, 9), (10976, 7):
            x, bank, g = attention_inputs(n, dtype)
            times = {way: ([], []) for way in ways}
            for i in range(rounds + 2):  # the first two warm up
                for way, attend in ways.items():
                    x.grad = bank.grad = None
                    synchronise()
                    start = time.perf_counter()
                    out = attend(x, bank)
                    synchronise()
                    middle = time.perf_counter()
                    out.backward(g)
                    synchronise()
                    if i >= 2:
                        times[way][0].append(middle - start)
                        times[way][1].append(time.perf_counter() - start)
                    del out
            median = {way: [statistics.median(t) for t in pair] for way, pair in times.items()}
            faster = min(median["eager"][1], median["SDPA"][1])
            for way, (forward, both) in median.items():
                command = [sys.executable, "-c", f"import bench; bench.attention_memory({way!r}, {n}, {dtype!r})"]
                memory = int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent).stdout)
                flops = n * 2048 * 768 / 1e9
                print(f"| {n} | {way} | {1e3 * forward:.2f} | {4 * flops / forward:.0f} | {4e9 * flops / forward / rate:.0%} | {1e3 * both:.2f} | "
                      f"{12 * flops / both:.0f} | {12e9 * flops / both / rate:.0%} | {both / faster:.2f} | {memory / 2 ** 20:.1f} |", flush=True)


ARMS = {"contrastive": ("none", False), "+ summaries": ("", False), "+ bank": ("none", True), "+ both: BrgSA": ("", True)}  # summaries; the bank's losses, as the preset weighs them


def bench_ablation(arguments):
    """Four arms on the phantom, each seed and budget the same: AUROC, modality gap and its picture; a table and a PNG in assets/.

    Differences are paired: every arm is scored on the same scans and resampled with the same patients, its seeds' AUROC averaged.
    Finished runs in --out are used again, so that more seeds can be added and a stopped bench goes on.
    """
    import json

    import numpy as np
    from matplotlib.figure import Figure

    import data
    import evaluate
    import metrics
    import train
    from model import PAIRS, clean
    manifest, summaries = str(train.phantom_manifest()), train.phantom_summaries()
    rows, _ = evaluate.select_rows(manifest, "valid")
    groups = {"CT-RATE's 18": slice(0, 18), "CT-RATE-LT's 15": slice(18, 33)}
    auroc, draws, gaps, pictures = {}, {}, {}, {}
    for seed in range(arguments.seeds):
        for arm, (told, bank) in ARMS.items():
            out = Path(arguments.out) / f"{clean(arm).replace(' ', '_')}-{seed}"
            if not (out / "evaluation" / "metrics.json").exists():
                command = ["--manifest", manifest, "--summaries", told or summaries, "--preset", "phantom", *(() if bank else ("--alpha", "0", "--gamma", "0")),
                           "--epochs", str(arguments.epochs), "--seed", str(seed), "--out", str(out), "--resume"]
                if train.main(command):
                    return print("stopped; the same command goes on")
            scores, labels, classes = evaluate.join(evaluate.read_scores(out / "evaluation" / "scores.csv"), rows)
            patients = [row.patient for row in rows]
            values = metrics.auroc(scores, labels)
            drawn = metrics.bootstrap(scores, labels, patients, np.zeros(len(classes)), n=2000)["auroc"]
            for name, part in groups.items():
                auroc.setdefault((arm, name), []).append(np.nanmean(values[part]))
                draws.setdefault((arm, name), []).append(np.nanmean(drawn[:, part], 1))
            result = json.loads((out / "evaluation" / "metrics.json").read_text())
            gaps.setdefault(arm, []).append(result["gap"])
            if seed == 0:
                study = evaluate.Study(out, manifest, None, None, PAIRS[:2], {})
                v = study.embed(rows)[1]
                pictures[arm] = study.texts_and_volumes(rows, v, None if told == "none" else summaries)["gap_picture"]

    percent = lambda values: f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1 if len(values) > 1 else 0):.1f}"
    lines = [f"| arm | {' | '.join(f'{name}, macro AUROC | against contrastive (95 %), p' for name in groups)} | gap: centroid distance | "
             "linear separability | the same after the bank |", "|---" * 8 + "|"]
    for arm, (_, bank) in ARMS.items():
        cells = []
        for name in groups:
            difference = np.mean(draws[arm, name], 0) - np.mean(draws["contrastive", name], 0)
            low, high = metrics.interval(difference)
            p = min(1.0, 2 * min((1 + (difference <= 0).sum()), (1 + (difference >= 0).sum())) / (1 + len(difference)))
            cells += [percent(auroc[arm, name]), "" if arm == "contrastive" else
                      f"{100 * (np.mean(auroc[arm, name]) - np.mean(auroc['contrastive', name])):+.1f} ({100 * low:+.1f} to {100 * high:+.1f}), {p:.3f}"]
        gap = lambda when, key: np.mean([result[when][key] for result in gaps[arm]])
        cells += [f"{gap('before', 'centroid_distance'):.2f}", f"{gap('before', 'linear_separability'):.2f}",
                  f"{gap('after', 'centroid_distance'):.2f}, {gap('after', 'linear_separability'):.2f}" if bank else ""]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + f"\n\n{arguments.seeds} seeds, {arguments.epochs} epochs each, {len(rows)} volumes of {len(set(patients))} patients\n"
    print(text)
    data.write_atomically(Path("assets/ablation.md"), text.encode())

    figure = Figure(figsize=(13, 3.6 * 2), layout="constrained")
    for column, (arm, picture) in enumerate(pictures.items()):
        for line, when in enumerate(("before", "after")):
            axes = figure.add_subplot(2, len(pictures), line * len(pictures) + column + 1)
            axes.set(xticks=[], yticks=[], aspect="equal", title=arm if when == "before" else "after the bank", adjustable="datalim")
            if when == "after" and not ARMS[arm][1]:
                axes.set_axis_off()
                axes.set_title("no bank", color="grey")
                continue
            for points, colour, label in zip(picture[when], ("#2563b0", "#c8641b"), ("scans", "texts")):
                axes.scatter(*np.array(points).T, s=9, c=colour, alpha=0.55, linewidths=0, label=label)
            if line == column == 0:
                axes.legend(frameon=False)
    figure.savefig("assets/ablation.png", dpi=80)


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("preprocess", help="resampling of one scan beside SimpleITK")
    command.set_defaults(run=bench_preprocess)
    command = commands.add_parser("evaluate", help="patient bootstrap: speed beside scikit-learn, and coverage of its intervals")
    command.add_argument("--sets", type=int, default=1000, help="simulated data sets for the coverage")
    command.set_defaults(run=bench_evaluate)
    command = commands.add_parser("summarize", help="the decoder beside transformers' generate; the small summarizer's F1 and speed")
    command.add_argument("--checkpoint", default="checkpoints/summarizer")
    command.add_argument("--small", action="store_true", help="the small summarizer alone")
    command.add_argument("--pairs", metavar="FILE", help="write the pairs that the small summarizer is trained on, and nothing else")
    command.set_defaults(run=bench_summarize)
    command = commands.add_parser("attention", help="the bank's attention beside eager torch and F.scaled_dot_product_attention")
    command.set_defaults(run=bench_attention)
    command = commands.add_parser("ablation", help="plain contrastive learning, with summaries, with the bank, with both, on the phantom")
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--epochs", type=int, default=12)
    command.add_argument("--out", default="runs/ablation")
    command.set_defaults(run=bench_ablation)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
