"""Train BrgSA on pairs of volumes and reports; without arguments on the phantom, in minutes.

    loss = alpha (mse(v_hat, v) + mse(t_hat, t)) + beta InfoNCE(v, t) + gamma InfoNCE(v_hat, t_hat)

    python train.py
    python train.py --manifest manifest.csv --summaries summaries.jsonl --preset base --out runs/x
    torchrun --nproc-per-node 8 train.py --manifest manifest.csv --preset base --out runs/x

The run's folder then holds the kept model (config.json, model.safetensors, tokenizer.json),
log.jsonl, curves.png, state/ (the last model and all that exact resumption needs),
reference.safetensors (the training scans' embeddings) and evaluation/.
"""
import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import timeit
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import numpy

import data
import phantom
from data import option

# ---- 1. Settings (before torch is loaded, so that --help is quick) -------------------------------

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun


@dataclass
class Settings:
    """A training run; the defaults are the authors' (Adam, 39 epochs of batch 64)."""
    manifest: str = option("", "manifest.csv; without one the phantom is written and used")
    summaries: str = option("", "summaries.jsonl of the manifest's reports; none: the raw reports")
    preset: str = option("", "phantom or base; default: phantom without a manifest, else base")
    out: str = option("", "the run's folder; default: runs/PRESET")
    resume: bool = option(False, "go on with the run in --out, by its own settings, or begin it")
    init: str = option("", "a run or converted weights (a folder) to start from, whole")
    vision: str = option("", "vit, resnet8, resnet18 or resnet34; default: the preset's")
    vision_encoder: str = option("", "a .safetensors to start the vision encoder from, by name")
    text_checkpoint: str = option("", "a Hugging Face BERT to start the text encoder from")
    freeze: str = option(
        "", "keep an encoder as it begins, but not its projection",
        choices=("vision", "text", "both"))
    cache: str = option("", "folder of prepared volumes; default: cache beside the manifest")
    epochs: int = option(39, "passes over the distinct reports", 1)
    batch: int = option(64, "pairs in a batch, over all GPUs; each is the others' negative", 2)
    chunk: int = option(
        0, "pairs in memory at a time, each with the whole batch as negatives; 0: all", 0)
    checkpoint_activations: bool = option(
        False, "keep only what encoder blocks are given, and compute the rest again")
    compile: bool = option(False, "compile the vision encoder (torch.compile)")
    optimizer: str = option(
        "adam", "muon: AdamW, but Muon for the vision encoder's inner matrices",
        choices=("adam", "adamw", "muon"))
    lr: float = option(5e-5, "learning rate at its highest", 0, 1)
    text_lr: float = option(
        1.0, "the text encoder's learning rate, as a share of lr; 0: it stays as it begins", 0, 100)
    beta1: float = option(0.5, "Adam's first", 0, 0.9999)
    weight_decay: float = option(1e-6, "of matrices; not of biases and norms", 0, 10)
    schedule: str = option(
        "plateau", "plateau: halved if the held-out loss hasn't fallen for 5 validations",
        choices=("plateau", "cosine"))
    warmup: int = option(0, "steps of linear warm-up", 0)
    clip: float = option(0.25, "largest gradient norm", 1e-6, 1e6)
    drawing: str = option(
        "authors", "sentences of a training text: up to five, by the authors' rules, or all",
        choices=("authors", "all"))
    alpha: float = option(0.25, "weight of the reconstruction MSE", 0, 1e3)
    beta: float = option(1.0, "weight of InfoNCE(v, t)", 0, 1e3)
    gamma: float = option(1.0, "weight of InfoNCE(v_hat, t_hat)", 0, 1e3)
    learn_scale: bool = option(False, "learn InfoNCE's scale, else it stays 10")
    bank_init: str = option(
        "orthogonal", "how the bank begins; kmeans: of embeddings",
        choices=("orthogonal", "gaussian", "xavier", "uniform", "kmeans"))
    bank_frozen: bool = option(False, "keep the bank as it begins")
    holdout: float = option(
        0.05, "share of the patients held back, to choose model and prompts by", 0, 0.9)
    validate_every: int = option(1, "epochs from one validation to the next", 1)
    seed: int = option(0, "of everything random", 0, 2**31)
    workers: int = option(
        -1, "processes that load volumes; -1: up to 8 beside a GPU, else 0", -1, 256)
    precision: str = option(
        "auto", "of the encoders; auto: bfloat16 where the processor has it, float16 on other GPUs",
        choices=("auto", "float32", "bfloat16", "float16"))
    device: str = option("", "cpu, cuda or cuda:1; default: cuda where there is one")
    dry_run: bool = option(False, "say what the training takes, then stop")

    __post_init__ = data.check_options


SCHEDULES = {
    "base": {},
    # A text encoder that begins from nothing and learns draws rare sentences together: it stays.
    "phantom": dict(
        epochs=44, batch=32, optimizer="muon", lr=6e-3, text_lr=0.0, beta1=0.9, weight_decay=0.02,
        schedule="cosine", warmup=30, clip=1.0, drawing="all", holdout=0.1, validate_every=3,
    ),
}


def parse(argv=None):
    """Settings from the command line: what is typed, else the preset's, else the defaults.

    On --resume the run's own; what is typed besides is said to be ignored.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data.add_options(parser, Settings)
    typed = vars(parser.parse_args(argv))
    preset = typed.get("preset") or ("base" if typed.get("manifest") else "phantom")
    if preset not in SCHEDULES:
        raise ValueError(f"there is no preset '{preset}'; there are: {', '.join(SCHEDULES)}")
    own = {"preset": preset, "out": f"runs/{preset}", **typed}
    settings = Settings(**SCHEDULES[preset] | own)
    record = Path(settings.out) / "state" / "settings.json"
    if not record.exists() or settings.dry_run:
        return settings
    if not settings.resume:
        raise ValueError(
            f"{settings.out}: holds a run already; --resume goes on with it, "
            "--out names another folder"
        )
    return resumed(record, typed)


# What may change when a run goes on, since it changes where and how a step is computed alone.
FREE = ("out", "resume", "device", "workers", "chunk", "checkpoint_activations", "compile")


def resumed(record, typed):
    """The Settings in a run's settings.json, but for what may change from machine to machine."""
    try:
        settings = Settings(**json.loads(record.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{record}: damaged ({error}); the run can't be resumed") from None
    for name, value in typed.items():
        own = getattr(settings, name)
        if name in FREE:
            setattr(settings, name, value)
        elif value != own:
            print(f"--{name} {value} is ignored: the run in {settings.out} goes on with {own!r}",
                  file=sys.stderr)
    return settings


if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    parse()

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import evaluate
import summarize
from cmki import alignment_loss, kmeans
from metrics import auroc
from model import (
    BERT_CONFIG,
    PAIRS,
    PRESETS,
    BrgSA,
    Config,
    TextEncoder,
    half_type,
    pick_device,
    read_config,
    read_tokenizer,
    resize_positions,
    train_tokenizer,
)
from report import evaluation_table

# ---- 2. The loop ---------------------------------------------------------------------------------

def train(settings):
    """Train as settings say, in settings.out; True when the last step was made, else stopped."""
    run, log = Run(settings), None
    first = run.progress["step"]

    # the first process writes the run's folder, so that even the first epoch can be resumed
    if RANK == 0:
        for folder in (run.out, run.out / "state"):
            data.sweep(folder)
        record = json.dumps(asdict(settings), indent=1)
        data.write_atomically(run.out / "state" / "settings.json", record.encode())
        if not first:
            run.model.save_settings(run.out)
        log = Log(run.out / "log.jsonl", first)
        if not first:
            save_first_prompts(run)

    loader, per_epoch, steps = batches(run)  # from where the run stands
    signals, saved_at = stop_at_signal(), time.monotonic()
    bar = tqdm(range(first, steps), "train", steps, initial=first, unit="step", disable=not log)
    for step in bar:
        # one optimiser step
        lr = learning_rate(settings, step, steps) * run.progress["lr_factor"]
        training_step(run, loader, lr)
        done = run.progress["step"] = step + 1

        # every ten steps: show and log the mean losses
        last = done == steps
        if last or done % 10 == 0:
            report_step(run, log, bar, lr)

        # every so many epochs: validate, adapt the learning rate, keep the model
        validates = last or done % (per_epoch * settings.validate_every) == 0
        if validates:
            end_epoch(run, log, lr, done / per_epoch)

        # then, every 15 minutes, at a signal: save what resumption needs
        stops = any(from_all(bool(signals)))
        if log and (validates or stops or time.monotonic() - saved_at > 900):
            save_state(run)
            saved_at = time.monotonic()
        if stops:
            from_all()  # torchrun ends all where one has ended
            return False
    return True


def training_step(run, loader, lr):
    """One optimiser step; its losses join progress["losses"], lists by name.

    Where a gradient isn't finite the scaler leaves the step out, which "skipped" counts.
    """
    settings, model, losses = run.settings, run.model, run.progress["losses"]
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["share"]
    loss, parts = backward(run, *next(loader))
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    for name, value in {"total": loss, **parts, "skipped": ~norm.isfinite()}.items():
        losses.setdefault(name, []).append(value.detach())


def backward(run, volumes, texts):
    """Gradients of this process's pairs, averaged over all; returns the loss and its parts."""
    size = run.settings.chunk or len(texts)
    chunks = [(volumes[i:i + size], texts[i:i + size]) for i in range(0, len(texts), size)]
    if len(chunks) == 1:
        loss, parts = loss_of(run, embedded(run, 0, volumes, texts))
        run.scaler.scale(loss).backward()
    else:
        loss, parts = backward_in_chunks(run, chunks)
    average_gradients(run.model)
    return loss, parts


def embedded(run, number, volumes, texts):
    """v, t, v_hat, t_hat of a step's chunk of this number, at least in float32."""
    # what is dropped out depends on step and chunk alone, so that a resumed run goes on exactly
    place = run.settings.seed, run.progress["step"], RANK, number
    torch.manual_seed(int(numpy.random.SeedSequence(place).generate_state(1, "u8")[0] >> 1))
    amp = mixed_precision(run.settings)
    with torch.autocast(run.device.type, amp, amp is not None):
        embeddings = run.model(volumes.to(run.device, non_blocking=True), texts)
    return [x if x.dtype == torch.float64 else x.float() for x in embeddings]


def loss_of(run, embeddings):
    """The loss of the whole batch and its parts, from this process's embeddings."""
    settings = run.settings
    weights = settings.alpha, settings.beta, settings.gamma, run.model.scale
    if WORLD > 1:
        embeddings = map(Gathered.apply, embeddings)
    return alignment_loss(*embeddings, *weights)


class Gathered(torch.autograd.Function):
    """The rows (n, d) of every process's part of the batch, (WORLD n, d): all are negatives.

    Since each process takes the whole loss, it has its own rows' gradient whole; average_gradients
    will divide it.
    """

    @staticmethod
    def forward(ctx, x):
        rows = x.new_empty(WORLD * len(x), x.shape[1])
        dist.all_gather_into_tensor(rows, x.contiguous())
        return rows

    @staticmethod
    def backward(ctx, gradient):
        return gradient.chunk(WORLD)[RANK] * WORLD


def backward_in_chunks(run, chunks):
    """The whole batch's loss and gradients with one chunk in memory (gradient caching, Gao et al.
    2021): embed without a graph, take the loss's gradient by the embeddings, then embed each chunk
    again and hand it on. Exact, but that a ResNet's batch norm sees a chunk at a time.
    """
    with torch.no_grad():
        parts = [embedded(run, i, *chunk) for i, chunk in enumerate(chunks)]
    embeddings = [torch.cat(part).requires_grad_() for part in zip(*parts)]
    loss, values = loss_of(run, embeddings)
    run.scaler.scale(loss).backward()
    gradients = zip(*(x.grad.split(run.settings.chunk) for x in embeddings))
    for i, (chunk, gradient) in enumerate(zip(chunks, gradients)):
        pairs = [pair for pair in zip(embedded(run, i, *chunk), gradient) if pair[0].requires_grad]
        torch.autograd.backward(*zip(*pairs))
    return loss, values


def average_gradients(model):
    """Over all processes."""
    if WORLD > 1:
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        works = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
        for gradient, work in zip(gradients, works):
            work.wait()
            gradient /= WORLD


def report_step(run, log, bar, lr):
    """Show and log the mean losses since the last time; ten skipped steps in a row end the run."""
    progress, columns = run.progress, {}
    for name, values in progress["losses"].items():
        values = torch.stack([torch.as_tensor(x, device=run.device) for x in values])
        columns[name] = numpy.array(values.tolist(), float)
    progress["losses"] = {}
    skipped = columns.pop("skipped") == 1
    in_a_row = progress["skipped_in_a_row"] + len(skipped)
    progress["skipped_in_a_row"] = in_a_row if skipped.all() else 0
    if progress["skipped_in_a_row"] >= 10:
        keys = next(own_keys(run, progress["step"] - 1))
        names = [run.pairs.items[item][0][0].name for _, item in keys]
        raise ValueError(
            f"{run.out}: ten steps in a row had no finite gradient, the last with the volumes "
            f"{', '.join(names)}; --resume goes on from the last save"
        )
    steps_per_s = bar.format_dict["rate"] or 0
    means = {name: values[~skipped].mean() for name, values in columns.items() if not skipped.all()}
    means["skipped"] = int(skipped.sum())
    means["volumes_per_s"] = steps_per_s * run.batch
    means["utilisation"] = steps_per_s * run.cost["flops"] * run.batch / WORLD / run.rate
    if run.device.type == "cuda":
        means["gib"] = torch.cuda.max_memory_allocated() / 2**30
    shown = {name: means[name] for name in SHOWN if means.get(name)}
    bar.set_postfix(shown, best=progress["best"], refresh=False)
    if log:
        log.write(step=progress["step"], lr=lr, **means)


SHOWN = ("total", "skipped", "volumes_per_s", "utilisation", "gib")


def end_epoch(run, log, lr, epoch):
    """Validate; let the plateau schedule learn of it; keep the model of the lowest loss.

    A cosine keeps the last: its rate has come to 0, and the loss is flat long before.
    """
    progress, valid = run.progress, from_all(validate(run))[0]  # all agree on the rate
    if run.settings.schedule == "plateau" and valid:
        run.plateau.step(valid["loss"])
        progress["lr_factor"] *= run.optimizer.param_groups[0]["lr"] / lr
        progress["plateau"] = run.plateau.state_dict()
    if log:
        log.write(step=progress["step"], epoch=epoch, valid=valid)
        loss = valid.get("loss", 0.0)  # not the AUROC: that would take labels, and is noisier
        if run.settings.schedule == "cosine" or loss <= progress["best"]:
            progress["best"] = loss
            run.model.save_pretrained(run.out)
        plot_curves(log, run.out / "curves.png")


def validate(run):
    """{"loss", "macro_auroc", "classes"} on held-out rows: the training loss, zero-shot AUROC."""
    rows, model, settings = run.held_out, run.model, run.settings
    if not rows:
        return {}
    model.eval()
    v = evaluate.embed_volumes(model, rows, run.pairs.cache, run.device)
    t = evaluate.embed_texts(model, run.held_texts)
    v_hat, t_hat = evaluate.bridge(model, v), evaluate.bridge(model, t)
    weights = settings.alpha, settings.beta, settings.gamma, model.scale.item()
    total, n_batches = 0.0, math.ceil(len(v) / settings.batch)
    for i in range(n_batches):
        part = torch.arange(i, len(v), n_batches)
        loss, _ = alignment_loss(v[part], t[part], v_hat[part], t_hat[part], *weights)
        total += loss * len(part)
    result, classes = {"loss": float(total / len(v))}, data.classes_of(rows)
    if classes:
        prompts = evaluate.make_prompts(classes)
        scores = evaluate.score(model, v, prompts, scored_pairs(settings), v_hat)
        values = auroc(scores, data.labels_matrix(rows, classes))
        known = int(numpy.isfinite(values).sum())
        if known:
            result |= {"macro_auroc": float(numpy.nanmean(values)), "classes": known}
    model.train()
    return result


def scored_pairs(settings):
    """Without the bank's losses (plain contrastive learning) x_hat means nothing: not scored."""
    return PAIRS[:2] if settings.gamma or settings.alpha else PAIRS[:1]


def learning_rate(settings, step, steps):
    """The rate of a step, from warm-up and schedule."""
    rate = settings.lr * min(1.0, (step + 1) / max(settings.warmup, 1))
    if settings.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate


def mixed_precision(settings):
    """The type for autocast, or None, to compute in float32."""
    if settings.precision == "auto":
        return half_type(settings.device)
    return None if settings.precision == "float32" else getattr(torch, settings.precision)


def stop_at_signal():
    """A list that fills at the first Ctrl-C or SIGTERM: the loop then stops between two steps.

    The second Ctrl-C stops at once; SIGTERM comes twice where torchrun and a scheduler send it.
    """
    signals = []

    def remember(number, frame):
        signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, remember)
        signal.signal(signal.SIGTERM, remember)
    return signals


# ---- 3. What it takes ----------------------------------------------------------------------------

def costs(config, settings):
    """What a training costs, counted on tensors without values.

    "parameters"; of a pair: "activations" and "checkpointed", bytes that are kept for the backward
    pass without and with --checkpoint-activations, and "flops", there and back.
    """
    two, three = (pass_costs(config, mixed_precision(settings), n) for n in (2, 3))
    parameters = two.pop("parameters")  # what both keep of the weights isn't a pair's
    return {"parameters": parameters} | {name: three[name] - two[name] for name in two}


def pass_costs(config, amp, n):
    """costs of n pairs together, copies of the weights included."""
    with torch.device("meta"):
        model = BrgSA(config)
    model.to_empty(device="cpu")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    blocks, inside, outside, given = [*model.vision.blocks, *model.text.blocks], {}, {}, {}
    places = [outside]

    def keep(tensor):
        storage = tensor.untyped_storage()
        places[-1][storage._cdata] = storage
        return tensor

    def enter(block, inputs):
        places.append(given)
        keep(inputs[0])
        places[-1] = inside

    for block in blocks:
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(lambda *_: places.pop() and None)
    counter, same = FlopCounterMode(display=False), lambda x: x
    with FakeTensorMode(allow_non_fake_inputs=True), counter, saved_tensors_hooks(keep, same):
        volumes = torch.empty(n, 1, *config.crop, dtype=torch.int16)
        with torch.autocast("cpu", amp, amp is not None):
            embeddings = model(volumes, ["a " * config.text_length] * n)
        torch.autograd.grad(sum(x.sum() for x in embeddings), weights, allow_unused=True)

    def size(storages):
        return sum(storage.nbytes() for storage in storages.values())
    least = size(outside | given) + size(inside) // len(blocks)  # one block at a time
    return {"activations": size(inside | outside | given), "checkpointed": least,
            "flops": counter.get_total_flops(), "parameters": sum(map(torch.numel, weights))}


def matrix_rate(device, dtype, side):
    """FLOP/s of a matrix product of this side and type (None: float32) on a device."""
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    seconds = timeit.repeat(lambda: (matrix @ matrix)[0, 0].item(), number=1)
    return 2 * side**3 / min(seconds)


def foreseen(settings, config):
    """What a training will take: one line, costs, matrix_rate."""
    cost, side = costs(config, settings), 1024 if settings.device == "cpu" else 8192
    rate = matrix_rate(settings.device, mixed_precision(settings), side)
    rows, held_out = training_rows(data.read_manifest(settings.manifest), settings.holdout)
    pairs = len({row.report for row in rows})
    steps = pairs // settings.batch * settings.epochs
    flops = cost["flops"] * settings.batch
    disk = len(rows + held_out) * 2 * math.prod(config.shape) / 2**30
    memory, whole = [], settings.batch // WORLD
    for chunk, options in ((whole, ""), (min(8, whole), " by --chunk 8")):
        for kept in ("activations", "checkpointed"):
            size = (16 * cost["parameters"] + chunk * cost[kept]) / 2**30
            memory.append(f"{size:.1f}{options}")
            options += " --checkpoint-activations"
    hours, note = steps * flops / rate / WORLD / 3600, ""
    if settings.preset == "base" and not settings.text_checkpoint + settings.init:
        note = "; without --text-checkpoint BERT begins from nothing: few reports don't teach it"
    return (
        f"{cost['parameters'] / 1e6:.1f} million parameters; GiB a process for weights, gradients, "
        f"optimiser and activations: {', '.join(memory)}; {pairs} pairs an epoch, {steps} steps of "
        f"{flops / 1e12:.2f} TFLOP: {hours:.1f} hours at the "
        f"{rate / 1e12:.2f} TFLOP/s of a matrix product here; cache {disk:.1f} GiB{note}"
    ), cost, rate


# ---- 4. Set up: model and data -------------------------------------------------------------------

class Run:
    """What a training works with, from its last state where it has one, else from the beginning.

    pairs: what it learns from, `batch` at a time over all processes; held_out: rows, held_texts:
    their texts. cost: see costs; rate: FLOP/s of matrix products here. progress: the step, the
    lowest held-out loss, the losses since the log's last line, what the plateau schedule knows.
    """

    def __init__(self, settings):
        self.settings, self.out = settings, Path(settings.out)
        self.device, config = torch.device(settings.device), model_config(settings)
        line, self.cost, self.rate = foreseen(settings, config)
        if RANK == 0:
            print(line, file=sys.stderr)
        torch.manual_seed(settings.seed)
        self.pairs, self.held_out, self.held_texts = training_data(settings, config)
        self.batch = min(settings.batch, len(self.pairs)) // WORLD * WORLD
        if self.batch < 2:
            raise ValueError(
                f"{settings.manifest}: {len(self.pairs)} distinct reports to train on; at least "
                "two are needed, and one for each GPU"
            )
        state = newest_state(settings)
        self.model = new_model(settings, config, self.pairs, self.device, resuming=bool(state))
        prepare_model(self.model, settings)
        self.optimizer = make_optimizer(self.model, settings)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=0.5, patience=5)
        # float16 needs its gradients scaled; else the scaler only leaves out what isn't finite
        scaling = {} if mixed_precision(settings) == torch.float16 else UNSCALED
        self.scaler = torch.amp.GradScaler(self.device.type, **scaling)
        here = {
            "manifest_sha256": data.sha256_of(settings.manifest), "processes": WORLD,
            "device": self.device.type,
            "precision": str(mixed_precision(settings) or torch.float32)}
        self.progress = {"step": 0, "best": math.inf, "lr_factor": 1.0, "plateau": None,
                         "losses": {}, "skipped_in_a_row": 0} | here
        if state:
            self.progress |= load_state(state, self.model, self.optimizer, self.scaler)
            if self.progress["plateau"]:
                self.plateau.load_state_dict(self.progress["plateau"])
            for name, value in here.items():
                if self.progress[name] != value and RANK == 0:
                    print(f"{settings.out}: goes on, but not just as it would have: {name} was "
                          f"{self.progress[name]} and is {value}", file=sys.stderr)
            self.progress |= here


UNSCALED = {"init_scale": 1.0, "growth_interval": 2**31 - 1}


def prepare_model(model, settings):
    """Freeze, wrap and compile parts of a model as settings say, and make all processes' alike."""
    model.bank.weight.requires_grad_(not settings.bank_frozen)
    for name in ("vision", "text"):
        if settings.freeze in (name, "both"):
            getattr(model, name).requires_grad_(False)
    if not settings.text_lr:
        model.text.requires_grad_(False)
        model.text_projection.requires_grad_(False)
    if settings.checkpoint_activations:
        checkpoint_blocks(model)
    if WORLD > 1:
        if settings.device != "cpu":  # it is for GPUs alone
            model.vision = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.vision)
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    if settings.compile:
        model.vision.compile()


def checkpoint_blocks(model):
    """Keep of each encoder block what it is given alone, and compute the rest again."""
    for block in [*model.vision.blocks, *model.text.blocks]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def model_config(settings):
    """The run's own Config where it has begun, else that of its start, else the preset's."""
    path = Path(settings.out) / "config.json"
    if newest_state(settings):
        return read_config(path)
    own = {"learn_scale": settings.learn_scale}
    if settings.init:
        return replace(read_config(Path(settings.init) / "config.json"), **own)
    if settings.vision:
        own["vision"] = settings.vision
    if settings.text_checkpoint:
        text = TextEncoder.from_huggingface(settings.text_checkpoint).config
        own |= {name: getattr(text, name) for name in BERT_CONFIG.values()}
    if not settings.text_lr or settings.freeze in ("text", "both"):
        own["text_dropout"] = 0.0  # its features are to stay as they are
    if settings.bank_init != "kmeans":
        own["bank_init"] = settings.bank_init
    if Path(settings.manifest).with_name("phantom.json").exists():
        own["trained_on"] = "phantom"
    return Config(**PRESETS[settings.preset] | own)


def new_model(settings, config, pairs, device, resuming):
    """The model as it begins; on resumption its weights are still to be loaded."""
    if resuming:
        return BrgSA(config, read_tokenizer(settings.out)).to(device)
    if settings.init:
        return BrgSA.from_pretrained(settings.init).to(device).train()
    if settings.text_checkpoint:
        text = TextEncoder.from_huggingface(settings.text_checkpoint)
        model = BrgSA(config, text.tokenizer)
        model.text.load_state_dict(text.state_dict())
    else:
        texts = [sentence for _, text in pairs.items for sentence in text]
        model = BrgSA(config, train_tokenizer(texts, config.vocabulary))
    if settings.vision_encoder:
        load_vision(model.vision, settings.vision_encoder)
    model.to(device)
    volumes, texts = collate([pairs[0, item] for item in range(min(len(pairs), 64))])
    if config.text_pooling == "sentences":
        texts = [sentence for _, text in pairs.items for sentence in text]
        texts = texts[::math.ceil(len(texts) / 10_000)]
    model.initialise(volumes.to(device), texts)
    if settings.bank_init == "kmeans":
        model.bank.reset(first_entries(model, pairs, settings.batch, device))
    return model


def load_vision(encoder, path):
    """Start a vision encoder from a .safetensors' tensors of the same names and shapes.

    A prefix of them is passed by, positions are resized to the encoder's grid. What was loaded,
    resized and left is said; ValueError where nothing fits.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a .safetensors, or damaged ({error})") from None
    own, loaded, resized = encoder.state_dict(), {}, []
    first = next(iter(own))
    prefix = next((name.removesuffix(first) for name in tensors if name.endswith(first)), "")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    for name in own.keys() & tensors.keys():
        tensor = tensors[name]
        if name == "pos_embed" and tensor.shape != own[name].shape:
            tensor = fitted_positions(tensor, encoder.base_grid)
            resized.append(name)
        if tensor.shape == own[name].shape:
            loaded[name] = tensor
    if not loaded:
        raise ValueError(f"{path}: none of its {len(tensors)} tensors has the name and shape of "
                         f"one of the encoder's, as {first}")
    encoder.load_state_dict(loaded, strict=False)
    if RANK == 0:
        print(f"{path}: {len(loaded)} tensors loaded", file=sys.stderr)
        left, begun = tensors.keys() - loaded.keys(), own.keys() - loaded.keys()
        for names, what in ((resized, "resized"), (left, "left"), (begun, "without a start")):
            print(f"  {what}: {', '.join(sorted(names)) or 'none'}", file=sys.stderr)


def fitted_positions(positions, grid):
    """Resize a position embedding (1, 1 + N, C) from a grid of the same form, if N allows one."""
    n = positions.shape[1] - 1
    factor = (n / math.prod(grid)) ** (1 / 3)
    source = [round(size * factor) for size in grid]
    same_form = math.prod(source) == n
    return resize_positions(positions.float(), source, grid) if same_form else positions


@torch.no_grad()
def first_entries(model, pairs, batch, device):
    """Entries (bank_size, dim) to begin the bank with: k-means of the untrained embeddings.

    Of both modalities, up to two of each an entry.
    """
    size, embeddings = len(model.bank.weight), []
    items = range(min(len(pairs), 2 * size))
    for first in items[::batch]:
        volumes, texts = collate([pairs[0, item] for item in items[first:first + batch]])
        embeddings += model.encode_image(volumes.to(device)), model.encode_text(texts)
    return kmeans(torch.cat(embeddings), size)


def training_data(settings, config):
    """(training pairs, rows held back, the texts of these).

    Rank 0 prepares the volumes; those that can't be read are left out.
    """
    summaries = data.read_summaries(settings.summaries) if settings.summaries else {}
    cache = volume_cache(settings, config)
    rows, held_out = training_rows(data.read_manifest(settings.manifest), settings.holdout)
    if RANK == 0:
        data.prepare(rows + held_out, cache)
    from_all()
    rows = [row for row in rows if cache.holds(row)]
    held_out = [row for row in held_out if cache.holds(row) and row.report]
    pairs = data.ReportVolumes(
        rows, cache, summaries, config.crop, seed=settings.seed, drawing=settings.drawing)
    texts = []
    for row in held_out:
        parts = data.sentences(data.text_of(row, summaries))
        texts.append(" ".join(parts[:pairs.n_sentences]))
    return pairs, held_out, texts


def volume_cache(settings, config):
    """The cache of volumes as a model's config wants them."""
    folder = settings.cache or Path(settings.manifest).with_name("cache")
    return data.Cache.for_config(folder, config)


def from_all(value=None):
    """Every process's value, once all have come to this point, however long that takes."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value, hosts())
    return values


@cache
def hosts():
    """The processes' group by way of their CPUs, which may wait for days."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def training_rows(rows, holdout):
    """(rows to train on, rows held back): of split train where there is one, else without a split.

    Whole patients are held back, chosen by their names' hash.
    """
    named = [row for row in rows if row.split == "train"]
    rows = named or [row for row in rows if not row.split]
    if not rows:
        raise ValueError("the manifest has no row of split train, nor one without a split")
    patients = {row.patient for row in rows}
    by_hash = sorted(patients, key=lambda patient: hashlib.sha256(patient.encode()).digest())
    held, parts = set(by_hash[:round(holdout * len(patients))]), ([], [])
    for row in rows:
        parts[row.patient in held].append(row)
    return parts


def batches(run):
    """(an iterator of batches from the run's step on, steps in an epoch, steps in all)."""
    keys, per_epoch = own_keys(run, run.progress["step"]), len(run.pairs) // run.batch
    loader = torch.utils.data.DataLoader(
        run.pairs, batch_sampler=keys, num_workers=loader_workers(run), collate_fn=collate,
        pin_memory=run.device.type == "cuda", worker_init_fn=leave_signals_to_parent,
    )
    return iter(loader), per_epoch, per_epoch * run.settings.epochs


def own_keys(run, first):
    """The keys of this process's batches from number `first` on."""
    settings = run.settings
    return batch_keys(len(run.pairs), run.batch, settings.epochs, settings.seed, first, RANK, WORLD)


def loader_workers(run):
    """How many processes load volumes: as many as are asked for and as shared memory holds."""
    wanted, shared = run.settings.workers, Path("/dev/shm")
    if wanted == -1:
        wanted = min(8, os.cpu_count()) if run.device.type == "cuda" else 0
    if not wanted or not shared.exists():
        return wanted
    each = 2 * 2 * math.prod(run.model.config.crop) * run.batch // WORLD  # two batches of int16
    each *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = shutil.disk_usage(shared).free
    if wanted * each > free and RANK == 0:
        print(f"{shared}: {free / 2**30:.1f} GiB are free and {wanted} loader workers want "
              f"{wanted * each / 2**30:.1f} (docker's --shm-size); {free // each} are used",
              file=sys.stderr)
    return min(wanted, free // each)


def leave_signals_to_parent(worker):
    """Loader workers end with their parent, not by Ctrl-C or SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def batch_keys(n_items, batch, epochs, seed, first=0, rank=0, world=1):
    """Yield batches of keys (epoch, item) from batch number `first` on: a new shuffle each epoch.

    The same for the same seed. Every rank gets its own part of each batch. An epoch's last, smaller
    batch is left out: its negatives would be fewer.
    """
    per_epoch = n_items // batch
    for number in range(first, per_epoch * epochs):
        epoch, place = divmod(number, per_epoch)
        order = numpy.random.default_rng((seed, epoch)).permutation(n_items)
        items = order[place * batch:(place + 1) * batch]
        yield [(epoch, int(item)) for item in items[rank::world]]


def collate(pairs):
    """Pairs (volume, text) -> (volumes (B, 1, x, y, z), list of texts)."""
    volumes, texts = zip(*pairs)
    return torch.stack(volumes), list(texts)


# ---- 5. The optimiser ----------------------------------------------------------------------------

def make_optimizer(model, settings):
    """The optimiser over named groups: texts learn at their own rate, only matrices decay."""
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}
    text = {*model.text.parameters(), *model.text_projection.parameters()}
    inner = set(model.vision.blocks.parameters()) if settings.optimizer == "muon" else set()
    # in this order, by which a saved state numbers the parameters
    names = "vectors", "matrices", "inner matrices", "text vectors", "text matrices"
    members = {name: [] for name in names}
    for parameter in model.parameters():
        name = "matrices" if parameter.ndim > 1 else "vectors"
        if parameter in text:
            name = f"text {name}"
        elif parameter in inner and name == "matrices":
            name = "inner matrices"
        if parameter.requires_grad:
            members[name].append(parameter)

    groups = []
    for name, parameters in members.items():
        if parameters:
            groups.append({
                "name": name,
                "params": parameters,
                "share": settings.text_lr if name.startswith("text") else 1.0,
                "weight_decay": 0.0 if name.endswith("vectors") else settings.weight_decay,
            })
    more = {"lr": settings.lr, "betas": (settings.beta1, 0.999)}
    if settings.device.startswith("cuda") and settings.optimizer != "muon":
        more["fused"] = True
    return kinds[settings.optimizer](groups, **more)


# ---- 6. Muon -------------------------------------------------------------------------------------
#
# Muon (Jordan et al. 2024) steps along a matrix's momentum with all its singular values made equal,
# so that rare directions learn as fast as common ones. A few matrix products do that, the
# Newton-Schulz iteration, instead of a decomposition. A step is as long as AdamW's usually is (0.2
# a weight; Liu et al. 2025), so that both share one learning rate.

def orthogonal(matrix):
    """The matrix with its singular values made about 1, by x <- (a + b x x' + c (x x')^2) x.

    All factors are polynomials of the first x x', so they are multiplied there, on the shorter side
    squared, and meet x once.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    norm = x.norm() + 1e-12
    one = torch.eye(len(x), device=x.device)
    square, product = x @ x.mT / norm**2, one / norm
    for _ in range(5):
        factor = 3.4445 * one - 4.7750 * square + 2.0315 * square @ square
        square, product = factor @ square @ factor, factor @ product
    x = product @ x
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """AdamW, but Muon for the group "inner matrices"."""

    @torch.no_grad()
    def step(self):
        """Update all weights from their gradients."""
        for group in self.param_groups:
            if group["name"] == "inner matrices":
                for weight in group["params"]:
                    self.muon_step(weight, group["lr"], group["weight_decay"])
        super().step()

    def muon_step(self, weight, lr, weight_decay):
        """Update one weight; a convolution's is the matrix (out, in * kernel)."""
        if weight.grad is None:
            return
        gradient = weight.grad.flatten(1)
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())  # AdamW asks for it in every state
            state["momentum"] = torch.zeros_like(gradient)
        state["step"] += 1
        momentum = state["momentum"].lerp_(gradient, 0.05)
        update = orthogonal(gradient.lerp(momentum, 0.95)) * (0.2 * max(gradient.shape) ** 0.5)
        weight.mul_(1 - lr * weight_decay).sub_(lr * update.view_as(weight))
        weight.grad = None  # AdamW passes it by


# ---- 7. Saved state, log and curves --------------------------------------------------------------

def newest_state(settings):
    """The file of a run's last state, or None; the one before is there, too."""
    files = [Path(settings.out) / "state" / name for name in STATES]
    return next(filter(Path.exists, files), None)


STATES = ("last.safetensors", "previous.safetensors")


def save_state(run):
    """The last model, the optimiser and the progress (JSON) in one safetensors file, atomically."""
    tensors = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    for i, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in state.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    losses = {name: list(map(float, values)) for name, values in run.progress["losses"].items()}
    progress = run.progress | {"losses": losses, "scaler": run.scaler.state_dict()}
    path, previous = (run.out / "state" / name for name in STATES)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # from where the tensors are: no second copy of all is in memory
    save_file(tensors, temporary, {"progress": json.dumps(progress)})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    if path.exists():
        os.replace(path, previous)
    os.replace(temporary, path)


def first_prompts(settings):
    """Where the prompts' embeddings from before the training are kept."""
    return Path(settings.out) / "state" / "first.safetensors"


def save_first_prompts(run):
    """Embed the held-out rows' classes as prompts by the model as it begins."""
    classes = data.classes_of(run.held_out)
    if classes:
        t = evaluate.embed_texts(run.model.eval(), [f"There is {name}" for name in classes])
        run.model.train()
        content = save({"t_first": t}, {"classes": json.dumps(classes)})
        data.write_atomically(first_prompts(run.settings), content)


def load_state(path, model, optimizer, scaler):
    """Restore what save_state wrote; returns the progress."""
    weights, states = {}, {}
    try:
        with safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
            for key in file.keys():
                part, name = key.split(".", 1)
                if part == "model":
                    weights[name] = file.get_tensor(key)
                else:
                    i, name = name.split(".")
                    states.setdefault(int(i), {})[name] = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged ({error}); delete it, and the run goes on from the state before, "
            "if there is one"
        ) from None
    model.load_state_dict(weights)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})
    scaler.load_state_dict(progress["scaler"])
    return progress


class Log:
    """log.jsonl: one object a line; on resumption lines of steps that will be repeated go."""

    def __init__(self, path, step):
        self.path, self.lines = path, []
        path.touch()
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut off
                line = json.loads(line)
                if line["step"] <= step:
                    self.lines.append(line)
        content = "".join(json.dumps(line) + "\n" for line in self.lines)
        data.write_atomically(path, content.encode())

    def write(self, **line):
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def plot_curves(log, path):
    """The losses over the steps, and the zero-shot macro AUROC of held-out patients, as a PNG."""
    lines = [line | line.get("valid", {}) for line in log.lines]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)

    def plot(axes, name, label=None, style="-"):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*numpy.reshape(points, (-1, 2)).T, style, linewidth=1, label=label)

    for name in ("total", "mse", "info_nce", "info_nce_hat"):
        plot(left, name, name)
    plot(left, "loss", "total, held out", "k.--")
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    left.legend(frameon=False)
    plot(right, "macro_auroc", style="o-")
    right.axhline(0.5, color="grey", linewidth=0.8)
    right.set(xlabel="step", ylabel="zero-shot macro AUROC, held-out patients", ylim=(0.4, 1))
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)


# ---- 8. The phantom, and what comes after the training -------------------------------------------

PHANTOM = dict(train=1600, valid=240, masks=True)
PHANTOM_FOLDER = Path("runs/phantom-data")


def phantom_manifest():
    """Write the phantom where it is absent or unfinished; returns its manifest, both splits."""
    manifest = PHANTOM_FOLDER / "manifest.csv"
    if not manifest.with_name("phantom.json").exists():
        phantom.write(PHANTOM_FOLDER, **PHANTOM)
    if not manifest.exists():
        rows = data.ct_rate_manifest(PHANTOM_FOLDER, "train")
        data.write_manifest(rows + data.ct_rate_manifest(PHANTOM_FOLDER, "valid"), manifest)
    return manifest


def phantom_summaries(device="cpu"):
    """Summarize the phantom's reports by the small language model -> summaries.jsonl's path."""
    manifest, out = PHANTOM_FOLDER / "manifest.csv", PHANTOM_FOLDER / "summaries.jsonl"
    summarize.run(summarize.SMALL_CHECKPOINT, manifest, out, device=device)
    return str(out)


def save_reference(settings):
    """reference.safetensors, of the kept model: what one scan is ranked among, and read against.

    The training scans' embeddings; the summaries (never the reports) of those learnt from; the
    prompts' embeddings before the training. Then the way to read prompts is chosen.
    """
    study = evaluate.Study(settings.out, settings.manifest, settings.cache, settings.device,
                           scored_pairs(settings), {})  # on every process
    rows, held_out = training_rows(data.read_manifest(settings.manifest), settings.holdout)
    summaries = data.read_summaries(settings.summaries) if settings.summaries else {}
    summary_of = {}
    for row in rows + held_out:
        summary_of[row.name] = summaries.get(data.report_sha256(row.report))
    both, v, _ = study.embed(rows + held_out)  # which the linear probe reads again
    if RANK > 0:
        return
    tensors, texts = evaluate.read_reference(first_prompts(settings))
    texts["summaries"] = sorted({summary_of[row.name] for row in rows} - {None})
    tensors |= {"v": v, "v_hat": evaluate.bridge(study.model, v)}
    content = save(tensors, {name: json.dumps(value) for name, value in texts.items()})
    data.write_atomically(Path(settings.out) / "reference.safetensors", content)

    patients = {row.patient for row in held_out}
    held = [i for i, row in enumerate(both) if row.patient in patients and summary_of[row.name]]
    if held:
        study.texts = texts
        choose_prompts(study, v[held], [summary_of[both[i].name] for i in held])


def choose_prompts(study, v, summaries):
    """Choose on held-out volumes v (N, d) how prompts are read by default, for config.json.

    Without labels: the volumes' summaries say what is there. A finding's AUROC counts as often as
    they affirm it, since that of few is known badly.
    """
    statements = [set(data.sentences(summary)) for summary in summaries]
    names = sorted(set().union(*statements) - {"There is no abnormality."})
    if not names:
        return
    labels = numpy.array([numpy.isin(names, list(parts)) for parts in statements], float)
    values, counts = {}, labels.sum(0)
    for name in names:
        study.prompts[name] = {"positive": [name], "negative": [], "combine": "mean"}
    for way in evaluate.READOUTS:
        known = numpy.nan_to_num(auroc(study.score(v, way), labels))
        values[way] = round(100 * float(known @ counts / counts.sum()), 1)
    config = study.model.config
    config.prompts_as = max(values, key=values.get)
    content = json.dumps(asdict(config), indent=1).encode()
    data.write_atomically(study.run / "config.json", content)
    print(f"prompts are read as {config.prompts_as}: mean AUROC of what the summaries of "
          f"{len(v)} held-out volumes affirm: {values}")


def finish(settings):
    """Evaluate the kept model on the manifest's test split, where it has one with labels."""
    out = settings.out
    labelled = {row.split for row in data.read_manifest(settings.manifest) if row.labels}
    splits = [name for name in ("test", "valid", "validation") if name in labelled]
    probe = settings.manifest if {"train", ""} & labelled else None
    if splits:
        result = evaluate.evaluate(
            out, settings.manifest, splits[0], pairs=scored_pairs(settings), cache=settings.cache,
            device=settings.device, summaries=settings.summaries, probe=probe,
        )
        print(f"{evaluation_table(result)}\n\nthe evaluation: {out}/evaluation/report.html")
    print(f"the model, its curves and its log: {out}/\n"
          f"one scan: python evaluate.py {out} --volume scan.nii.gz")


# ---- 9. Command line -----------------------------------------------------------------------------

def keep_freed_memory():
    """On Linux's CPU, let malloc keep what was freed: a step is then a seventh faster.

    Returning it costs a page fault for every 4 KiB of the next step.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)          # M_MMAP_MAX: large blocks from the heap, too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: don't shrink the heap


def set_device(settings):
    """Choose the device, and what is global to it and to all processes."""
    settings.device = pick_device(settings.device, os.environ.get("LOCAL_RANK"))
    on_gpu = settings.device != "cpu"
    if on_gpu:
        torch.cuda.set_device(settings.device)
        torch.set_float32_matmul_precision("high")  # TF32, for what isn't in half precision
    else:
        keep_freed_memory()
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
        hosts()


def main(argv=None):
    """Train, then evaluate; the exit status, 130 where it was stopped."""
    settings = parse(argv)
    set_device(settings)
    if not settings.manifest:
        settings.manifest = str(PHANTOM_FOLDER / "manifest.csv")
        if RANK == 0:
            phantom_manifest()
            if not settings.summaries:
                phantom_summaries(settings.device)
        from_all()
        settings.summaries = settings.summaries or str(PHANTOM_FOLDER / "summaries.jsonl")
    if settings.summaries == "none":
        settings.summaries = ""
    data.read_manifest(settings.manifest)  # what is wrong with it is said before any writing
    if settings.dry_run:
        print(foreseen(settings, model_config(settings))[0])
        return 0
    try:
        done = train(settings)
    except torch.OutOfMemoryError:
        line, _, _ = foreseen(settings, model_config(settings))
        raise ValueError(f"the GPU's memory is full; {line}") from None
    if done:
        save_reference(settings)
    if WORLD > 1:
        dist.destroy_process_group()
    if not done:
        print(f"stopped; python train.py --out {settings.out} --resume goes on", file=sys.stderr)
    elif RANK == 0:
        finish(settings)
    return 0 if done else 130


if __name__ == "__main__":
    sys.exit(data.run_command(main))
