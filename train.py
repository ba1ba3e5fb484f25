"""Train BrgSA on pairs of volumes and reports; without arguments on the phantom, in minutes.

    loss = alpha (mse(v_hat, v) + mse(t_hat, t)) + beta InfoNCE(v, t) + gamma InfoNCE(v_hat, t_hat)

    python train.py
    python train.py --manifest manifest.csv --summaries summaries.jsonl --preset base --out runs/x
    torchrun --nproc-per-node 8 train.py --manifest manifest.csv --preset base --out runs/x

The run's folder then holds the best model (config.json, model.safetensors, tokenizer.json),
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
import signal
import sys
import time
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

import data
import evaluate
import phantom
import summarize
from cmki import alignment_loss, kmeans
from metrics import auroc
from model import (
    PAIRS,
    PRESETS,
    BrgSA,
    Config,
    TextEncoder,
    default_device,
    train_tokenizer,
    zero_shot_scores,
)
from report import evaluation_table

# ---- 1. Settings ---------------------------------------------------------------------------------

def setting(default, help):
    """A field with its help on the command line."""
    return field(default=default, metadata={"help": help})


ON_GPU = torch.cuda.is_available()


@dataclass
class Settings:
    """A training run; the defaults are the authors' (Adam, 39 epochs of batch 64)."""
    manifest: str = setting("", "manifest.csv; without one the phantom is written and used")
    summaries: str = setting("", "summaries.jsonl of the manifest's reports; none: the raw reports")
    preset: str = setting("", "phantom or base; default: phantom without a manifest, else base")
    out: str = setting("", "the run's folder; default: runs/PRESET")
    resume: bool = setting(False, "go on with the run in --out, with its own settings")
    vision: str = setting("", "vit, resnet18 or resnet34; default: the preset's")
    text_checkpoint: str = setting("", "a Hugging Face BERT to start the text encoder from")
    cache: str = setting("", "folder of prepared volumes; default: cache beside the manifest")
    epochs: int = setting(39, "passes over the distinct reports")
    batch: int = setting(64, "pairs in a batch, over all GPUs; each is the others' negative")
    accumulate: int = setting(1, "batches in an optimiser step")
    optimizer: str = setting("adam", "adam, adamw or muon (for the vision encoder's inner kernels)")
    lr: float = setting(5e-5, "learning rate at its highest")
    text_lr: float = setting(1.0, "the text encoder's learning rate, as a share of lr")
    beta1: float = setting(0.5, "Adam's first")
    beta2: float = setting(0.999, "Adam's second")
    weight_decay: float = setting(1e-6, "of matrices; not of biases and norms")
    schedule: str = setting("plateau", "plateau (halved when the held-out loss stalls) or cosine")
    warmup: int = setting(0, "steps of linear warm-up")
    clip: float = setting(0.25, "largest gradient norm")
    alpha: float = setting(0.5, "weight of the reconstruction MSE")
    beta: float = setting(1.0, "weight of InfoNCE(v, t)")
    gamma: float = setting(1.0, "weight of InfoNCE(v_hat, t_hat)")
    learn_scale: bool = setting(False, "learn InfoNCE's scale, else it stays 10")
    bank_init: str = setting("orthogonal", "or gaussian, xavier, uniform, kmeans (of embeddings)")
    bank_frozen: bool = setting(False, "keep the bank as it begins")
    holdout: float = setting(0.05, "share of the patients held back, to choose the best model by")
    seed: int = setting(0, "of everything random")
    workers: int = setting(min(8, os.cpu_count()) if ON_GPU else 0, "processes that load volumes")
    device: str = setting(default_device(), "cuda or cpu")


SCHEDULES = {
    "base": {},
    # A reconstruction loss of the authors' weight draws all embeddings into one point early on; so
    # does a text encoder that learns as fast as the vision encoder.
    "phantom": dict(
        epochs=50, batch=32, optimizer="muon", lr=3e-3, text_lr=0.1, beta1=0.9, weight_decay=0.02,
        schedule="cosine", warmup=30, clip=1.0, alpha=0.02, holdout=0.1,
    ),
}
PHANTOM = dict(train=800, valid=240, seed=0, masks=True)
PHANTOM_FOLDER = Path("runs/phantom-data")


def phantom_manifest(folder=PHANTOM_FOLDER):
    """Write the phantom where it is absent or unfinished; returns its manifest, both splits."""
    manifest = folder / "manifest.csv"
    if not (folder / "phantom.json").exists():
        phantom.write(folder, **PHANTOM)
    if not manifest.exists():
        rows = data.ct_rate_manifest(folder, "train") + data.ct_rate_manifest(folder, "valid")
        data.write_manifest(rows, manifest)
    return manifest


def phantom_summaries(device="cpu", folder=PHANTOM_FOLDER):
    """Summarize the phantom's reports by the small language model -> summaries.jsonl's path."""
    out = folder / "summaries.jsonl"
    summarize.run(summarize.SMALL_CHECKPOINT, folder / "manifest.csv", out, device=device)
    return str(out)


def model_config(settings):
    """The preset's Config with the run's own choices."""
    config = Config(**PRESETS[settings.preset])
    if settings.text_checkpoint:
        text = TextEncoder.from_huggingface(settings.text_checkpoint)
        config = replace(
            config, vocabulary=text.word_embeddings.num_embeddings, text_width=text.width,
            text_depth=len(text.blocks), text_heads=text.blocks[0].attn.heads,
            text_positions=text.position_embeddings.num_embeddings,
        )
    if settings.bank_init != "kmeans":
        config = replace(config, bank_init=settings.bank_init)
    is_phantom = (Path(settings.manifest).parent / "phantom.json").exists()
    return replace(
        config, vision=settings.vision or config.vision, learn_scale=settings.learn_scale,
        trained_on="phantom" if is_phantom else "",
    )


# ---- 2. Batches ----------------------------------------------------------------------------------

def training_rows(rows, holdout):
    """(rows to train on, rows held back): of split train where there is one, else without a split.

    Whole patients are held back, chosen by their names' hash.
    """
    split = "train" if any(row.split == "train" for row in rows) else ""
    rows = [row for row in rows if row.split == split]
    if not rows:
        raise ValueError("the manifest has no row of split train, nor one without a split")
    patients = {row.patient for row in rows}
    by_hash = sorted(patients, key=lambda patient: hashlib.sha256(patient.encode()).digest())
    held, parts = set(by_hash[:round(holdout * len(patients))]), ([], [])
    for row in rows:
        parts[row.patient in held].append(row)
    return parts


class BatchKeys:
    """Batches of keys (epoch, item) from batch number `first` on: a new shuffle each epoch.

    The same for the same seed. Every rank gets its own part of each batch. An epoch's last, smaller
    batch is left out: its negatives would be fewer.
    """

    def __init__(self, n_items, batch, epochs, seed, first=0, rank=0, world=1):
        self.n_items, self.batch, self.epochs, self.seed = n_items, batch, epochs, seed
        self.first, self.rank, self.world = first, rank, world
        self.per_epoch = n_items // batch

    def __len__(self):
        return self.per_epoch * self.epochs - self.first

    def __iter__(self):
        for number in range(self.first, self.per_epoch * self.epochs):
            epoch, place = divmod(number, self.per_epoch)
            order = numpy.random.default_rng((self.seed, epoch)).permutation(self.n_items)
            items = order[place * self.batch:(place + 1) * self.batch]
            yield [(epoch, int(item)) for item in items[self.rank::self.world]]


def collate(pairs):
    """Pairs (volume, text) -> volumes (B, 1, x, y, z), list of texts."""
    volumes, texts = zip(*pairs)
    return torch.stack(volumes), list(texts)


def gathered(embeddings):
    """The embeddings of every GPU's part of the batch, with gradients: all are negatives."""
    embeddings = [x.float() for x in embeddings]
    if not dist.is_initialized():
        return embeddings
    return [torch.cat(dist.nn.functional.all_gather(x.contiguous())) for x in embeddings]


# ---- 3. The optimiser ----------------------------------------------------------------------------
#
# Muon (Jordan et al. 2024) steps along a matrix's momentum with all its singular values made equal,
# so that rare directions learn as fast as common ones. That is done by a few matrix products, the
# Newton-Schulz iteration. A step is as long as AdamW's usually is (0.2 a weight; Liu et al. 2025),
# so that both share one learning rate.

def orthogonal(matrix, steps=5):
    """The matrix with its singular values made about 1, by x <- (a + b x x' + c (x x')^2) x.

    All factors are polynomials of the first x x', so they are multiplied there, on the shorter side
    squared, and meet x once.
    """
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    norm = x.norm() + 1e-12
    one = torch.eye(len(x), device=x.device)
    square, product = x @ x.mT / norm**2, one / norm
    for _ in range(steps):
        factor = 3.4445 * one - 4.7750 * square + 2.0315 * square @ square
        square, product = factor @ square @ factor, factor @ product
    x = product @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.AdamW):
    """AdamW, but Muon for groups with `inner`; a kernel is the matrix (out, in * kernel)."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"] if group["inner"] else ():
                if weight.grad is not None:
                    self.muon_step(weight, group)
        super().step()

    def muon_step(self, weight, group):
        gradient, state = weight.grad.flatten(1), self.state[weight]
        if not state:  # AdamW asks for a step in every state
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(gradient)}
        state["step"] += 1
        momentum = state["momentum"].lerp_(gradient, 0.05)
        update = orthogonal(gradient.lerp(momentum, 0.95)) * (0.2 * max(gradient.shape) ** 0.5)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(group["lr"] * update.view_as(weight))
        weight.grad = None  # so that AdamW passes it by


def make_optimizer(model, settings):
    """The optimiser, its groups named by whether they are the text's, matrices, and Muon's."""
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}
    if settings.optimizer not in kinds:
        raise ValueError(f"optimizer is '{settings.optimizer}'; adam, adamw or muon is needed")
    text = {*model.text.parameters(), *model.text_projection.parameters()}
    inner = set(model.vision.blocks.parameters()) if settings.optimizer == "muon" else set()
    by_kind = {}
    for weight in model.parameters():
        if weight.requires_grad:
            is_matrix = weight.ndim > 1
            kind = weight in text, is_matrix, is_matrix and weight in inner
            by_kind.setdefault(kind, []).append(weight)
    groups = []
    for (is_text, is_matrix, is_inner), weights in sorted(by_kind.items()):
        groups.append({
            "params": weights,
            "share": settings.text_lr if is_text else 1.0,
            "weight_decay": settings.weight_decay if is_matrix else 0.0,
            "inner": is_inner,
        })
    betas = settings.beta1, settings.beta2
    return kinds[settings.optimizer](groups, lr=settings.lr, betas=betas)


def learning_rate(settings, step, steps):
    """The rate of a step, from warm-up and schedule."""
    rate = settings.lr * min(1.0, (step + 1) / max(settings.warmup, 1))
    if settings.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate


def mixed_precision(device):
    """The type for autocast: bfloat16 on a GPU that computes in it, else float16; on a CPU none,
    whose bfloat16 batch norm overflows."""
    if device.type != "cuda":
        return None
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def keep_freed_memory():
    """On Linux's CPU, let malloc keep what was freed: a step is then a seventh faster.

    Returning it costs a page fault for every 4 KiB of the next step.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)          # M_MMAP_MAX: large blocks from the heap, too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: don't shrink the heap


# ---- 4. Set up -----------------------------------------------------------------------------------

@dataclass
class Run:
    """What a training run works with, from set_up to the last save."""
    settings: Settings
    rank: int
    device: torch.device
    cache: data.Cache
    pairs: data.ReportVolumes
    held_out: list          # rows, and their texts
    held_texts: list
    model: BrgSA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    plateau: object         # a ReduceLROnPlateau, or None
    progress: dict          # step, best score, and what the plateau schedule has come to

    @property
    def out(self):
        return Path(self.settings.out)

    @property
    def state_file(self):
        return self.out / "state" / "last.safetensors"


def set_up(settings, rank, world):
    """The Run: from its last state where it has one, else from the beginning."""
    index = int(os.environ.get("LOCAL_RANK", 0)) if settings.device == "cuda" else None
    device = torch.device(settings.device, index)
    torch.manual_seed(settings.seed)
    config = model_config(settings)
    summaries = data.read_summaries(settings.summaries) if settings.summaries else {}
    cache = data.Cache.for_config(cache_folder(settings), config)

    rows, held_out = prepared_rows(settings, cache, rank, world)
    pairs = data.ReportVolumes(rows, cache, summaries, config.crop, seed=settings.seed)
    if min(settings.batch, len(pairs)) // world * world < 2:
        raise ValueError(
            f"{settings.manifest}: {len(pairs)} distinct reports to train on; at least two are "
            "needed, and one for each GPU"
        )
    held_texts = []
    for row in held_out:
        parts = data.sentences(data.text_of(row, summaries))
        held_texts.append(" ".join(parts[:pairs.n_sentences]))

    # Model and optimiser.
    resuming = (Path(settings.out) / "state" / "last.safetensors").exists()
    model = new_model(settings, config, pairs, device, resuming)
    model.bank.weight.requires_grad_(not settings.bank_frozen)
    optimizer, plateau = make_optimizer(model, settings), None
    if settings.schedule == "plateau":
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=5)
    has_scaler = mixed_precision(device) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=has_scaler)
    run = Run(
        settings, rank, device, cache, pairs, held_out, held_texts, model, optimizer, scaler,
        plateau, {"step": 0, "best": None, "lr_factor": 1.0, "plateau": None},
    )
    if resuming:
        run.progress = load_state(run.state_file, model, optimizer, scaler)
        if plateau and run.progress["plateau"]:
            plateau.load_state_dict(run.progress["plateau"])
    return run


def prepared_rows(settings, cache, rank, world):
    """(rows to train on, rows held back) that are in the cache, which rank 0 fills."""
    rows, held_out = training_rows(data.read_manifest(settings.manifest), settings.holdout)
    if rank == 0:
        data.prepare(rows + held_out, cache)
    if world > 1:
        dist.barrier()
    rows = [row for row in rows if cache.holds(row)]
    return rows, [row for row in held_out if cache.holds(row) and row.report]


def cache_folder(settings):
    """Where the prepared volumes lie."""
    return settings.cache or Path(settings.manifest).parent / "cache"


def new_model(settings, config, pairs, device, resuming):
    """The model as it begins; on resumption its weights are still to be loaded."""
    text_encoder = None
    if resuming:
        tokenizer = BrgSA.from_pretrained(settings.out).text.tokenizer
    elif settings.text_checkpoint:
        text_encoder = TextEncoder.from_huggingface(settings.text_checkpoint)
        tokenizer = text_encoder.tokenizer
    else:
        texts = [sentence for _, text in pairs.items for sentence in text]
        tokenizer = train_tokenizer(texts, config.vocabulary)
    model = BrgSA(config, tokenizer)
    if text_encoder:
        model.text.load_state_dict(text_encoder.state_dict())
    model.to(device).train()
    if not resuming:
        volumes, texts = collate([pairs[0, item] for item in range(min(len(pairs), 64))])
        model.initialise(volumes.to(device), texts)
        if settings.bank_init == "kmeans":
            model.bank.reset(first_entries(model, pairs, settings.batch, device))
    return model


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


# ---- 5. The loop ---------------------------------------------------------------------------------

def train(settings):
    """Train as settings say, in settings.out; True when the last step was made, else stopped."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    run = set_up(settings, rank, world)
    log = start_log(run) if rank == 0 else None
    loader, per_epoch, steps = batches(run, world)
    parallel = in_parallel(run) if world > 1 else run.model
    signals, sums, saved_at = stop_at_signal(), {}, time.monotonic()
    first = run.progress["step"]
    bar = tqdm(range(first, steps), "train", steps, initial=first, unit="step", disable=rank > 0)
    for step in bar:
        # one optimiser step
        lr = learning_rate(settings, step, steps) * run.progress["lr_factor"]
        training_step(run, parallel, loader, lr, sums)
        run.progress["step"] = step + 1

        # every tenth step: the mean of the losses since the last
        last = step + 1 == steps
        if (step + 1) % 10 == 0 or last:
            report_step(run, log, bar, lr, sums, n=((step % 10) + 1) * settings.accumulate)
            sums = {}

        # every epoch: validate, keep the best model; then and now and then: save all
        epoch_ends = last or (step + 1) % per_epoch == 0
        if epoch_ends:
            end_epoch(run, log, lr, (step + 1) / per_epoch)
        if epoch_ends or signals or time.monotonic() - saved_at > 900:
            save_state(run)
            saved_at = time.monotonic()
        if signals:
            return False
    return True


def start_log(run):
    """The run's log; its settings are written beside it."""
    record = json.dumps(asdict(run.settings), indent=1)
    data.write_atomically(run.out / "state" / "settings.json", record.encode())
    return Log(run.out / "log.jsonl", run.progress["step"])


def in_parallel(run):
    """The model on several GPUs (or processes): each takes its part of a batch."""
    devices = [run.device] if run.device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(run.model, device_ids=devices)


def batches(run, world):
    """(an iterator of batches from the run's step on, steps in an epoch, steps in all)."""
    settings = run.settings
    batch = min(settings.batch, len(run.pairs)) // world * world
    first = run.progress["step"] * settings.accumulate
    keys = BatchKeys(
        len(run.pairs), batch, settings.epochs, settings.seed, first, run.rank, world
    )
    loader = torch.utils.data.DataLoader(
        run.pairs, batch_sampler=keys, num_workers=settings.workers, collate_fn=collate,
        pin_memory=run.device.type == "cuda", persistent_workers=settings.workers > 0,
    )
    per_epoch = max(1, keys.per_epoch // settings.accumulate)
    return iter(loader), per_epoch, keys.per_epoch * settings.epochs // settings.accumulate


def training_step(run, parallel, loader, lr, sums):
    """One optimiser step over `accumulate` batches; adds the losses to sums, by name."""
    settings, amp = run.settings, mixed_precision(run.device)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["share"]
    for _ in range(settings.accumulate):
        volumes, texts = next(loader)
        with torch.autocast(run.device.type, amp, enabled=amp is not None):
            embeddings = parallel(volumes.to(run.device, non_blocking=True), texts)
        weights = settings.alpha, settings.beta, settings.gamma, run.model.scale
        loss, parts = alignment_loss(*gathered(embeddings), *weights)
        run.scaler.scale(loss / settings.accumulate).backward()
        for name, value in {"total": loss, **parts}.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    run.scaler.unscale_(run.optimizer)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), settings.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)


def report_step(run, log, bar, lr, sums, n):
    """Show and log the losses' means over n batches; a loss that isn't finite ends the run."""
    step, best = run.progress["step"], run.progress["best"]
    means = {name: float(value) / n for name, value in sums.items()}
    if not math.isfinite(means["total"]):
        raise ValueError(
            f"{run.out}: the loss is {means['total']} at step {step}; a smaller --lr may help, "
            "--resume goes on from the last save"
        )
    shown = {"loss": f"{means['total']:.3f}"}
    if best is not None:
        shown["best"] = f"{best:.3f}"
    bar.set_postfix(shown, refresh=False)
    if log:
        log.write(step=step, lr=lr, **means)


def end_epoch(run, log, lr, epoch):
    """Validate; let the plateau schedule learn of it, and keep the model where it is the best."""
    progress, valid = run.progress, validate(run)  # on every rank, so that all agree on the rate
    if run.plateau and valid:
        run.plateau.step(valid["loss"])
        factor = run.optimizer.param_groups[0]["lr"] / lr
        progress["lr_factor"] *= factor
        progress["plateau"] = run.plateau.state_dict()
    if log:
        log.write(step=progress["step"], epoch=epoch, valid=valid)
        score = valid.get("macro_auroc", -valid.get("loss", 0.0))
        if progress["best"] is None or score >= progress["best"]:
            progress["best"] = score
            run.model.save_pretrained(run.out)
        plot_curves(log, run.out / "curves.png")


def validate(run):
    """{"loss", "macro_auroc", "classes"} on held-out rows: the training loss, zero-shot AUROC."""
    rows, model, settings = run.held_out, run.model, run.settings
    if not rows:
        return {}
    model.eval()
    v = evaluate.embed_volumes(model, rows, run.cache, run.device)
    t = evaluate.embed_texts(model, run.held_texts)
    v_hat, t_hat = evaluate.bridge(model, v), evaluate.bridge(model, t)
    weights = settings.alpha, settings.beta, settings.gamma, model.scale.item()
    total, n_batches = 0.0, math.ceil(len(v) / settings.batch)
    for i in range(n_batches):
        part = torch.arange(len(v))[i::n_batches]
        loss, _ = alignment_loss(v[part], t[part], v_hat[part], t_hat[part], *weights)
        total += loss * len(part)
    result, classes = {"loss": float(total / len(v))}, data.classes_of(rows)
    if classes:
        t = evaluate.embed_texts(model, [f"There is {name}" for name in classes])
        t_hat = evaluate.bridge(model, t)
        scores = zero_shot_scores(v, v_hat, t, t_hat, scored_pairs(settings)).numpy()
        values = auroc(scores, data.labels_matrix(rows, classes))
        known = int(numpy.isfinite(values).sum())
        if known:
            result |= {"macro_auroc": float(numpy.nanmean(values)), "classes": known}
    model.train()
    return result


def scored_pairs(settings):
    """Without the bank's losses (plain contrastive learning) x_hat means nothing: not scored."""
    return PAIRS[:2] if settings.gamma or settings.alpha else PAIRS[:1]


def stop_at_signal():
    """A list that fills at the first Ctrl-C or SIGTERM: the loop then stops between two steps.

    The second Ctrl-C stops at once.
    """
    signals = []

    def remember(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, remember)
        signal.signal(signal.SIGTERM, remember)
    return signals


# ---- 6. Saved state, log and curves --------------------------------------------------------------

def save_state(run):
    """Rank 0: the last model, the optimiser and the progress (JSON) in one safetensors file."""
    if run.rank > 0:
        return
    tensors = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    for i, state in run.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{i}.{name}"] = torch.as_tensor(value)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    progress = json.dumps(run.progress | {"scaler": run.scaler.state_dict()})
    data.write_atomically(run.state_file, save(tensors, {"progress": progress}))


def load_state(path, model, optimizer, scaler):
    """Restore what save_state wrote; returns the progress."""
    try:
        with safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        lost = "without it the run can't be resumed"
        raise ValueError(f"{path}: damaged ({error}); {lost}") from None
    weights, states = {}, {}
    for name, tensor in tensors.items():
        part, name = name.split(".", 1)
        if part == "model":
            weights[name] = tensor
        else:
            i, key = name.split(".")
            states.setdefault(int(i), {})[key] = tensor
    model.load_state_dict(weights)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    scaler.load_state_dict(progress["scaler"])
    return progress


class Log:
    """log.jsonl: one object a line; on resumption lines of steps that will be repeated go."""

    def __init__(self, path, step):
        self.path, self.lines = path, []
        for line in path.read_text().splitlines() if step and path.exists() else ():
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
    train = [line for line in log.lines if "total" in line]
    valid = [line for line in log.lines if line.get("valid")]
    scored = [line for line in valid if "macro_auroc" in line["valid"]]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)

    def plot(axes, lines, values, *style, **more):
        axes.plot([line["step"] for line in lines], values, *style, linewidth=1, **more)

    for name in ("total", "mse", "info_nce", "info_nce_hat"):
        plot(left, train, [line[name] for line in train], label=name)
    losses = [line["valid"]["loss"] for line in valid]
    plot(left, valid, losses, "k.--", label="total, held out")
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    left.legend(frameon=False)
    plot(right, scored, [line["valid"]["macro_auroc"] for line in scored], "o-")
    right.axhline(0.5, color="grey", linewidth=0.8)
    right.set(xlabel="step", ylabel="zero-shot macro AUROC, held-out patients", ylim=(0.4, 1))
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)


# ---- 7. After the training, and the command line -------------------------------------------------

def save_reference(settings):
    """reference.safetensors: the training scans' embeddings by the best model.

    Against them one scan's scores are ranked.
    """
    model = BrgSA.from_pretrained(settings.out).to(settings.device)
    cache = data.Cache.for_config(cache_folder(settings), model.config)
    rows, _ = training_rows(data.read_manifest(settings.manifest), 0.0)
    rows = [row for row in rows if cache.holds(row)]
    v = evaluate.embed_volumes(model, rows, cache, settings.device)
    content = save({"v": v, "v_hat": evaluate.bridge(model, v)})
    data.write_atomically(Path(settings.out) / "reference.safetensors", content)


def finish(settings):
    """Evaluate the best model on the manifest's test split, where it has one with labels."""
    out, evaluated = settings.out, ""
    splits = {row.split for row in data.read_manifest(settings.manifest) if row.labels}
    split = next((name for name in ("test", "valid", "validation") if name in splits), None)
    if split:
        result = evaluate.evaluate(
            out, settings.manifest, split, Path(out) / "evaluation", pairs=scored_pairs(settings),
            cache=settings.cache or None, device=settings.device,
            summaries=settings.summaries or None,
        )
        print(evaluation_table(result))
        evaluated = f"the evaluation: {out}/evaluation/report.html"
    print(f"\nthe model, its curves and its log: {out}/   {evaluated}")
    print(f"one scan: python evaluate.py {out} --volume scan.nii.gz")


def parse(argv=None):
    """Settings from the command line: what is typed, else the preset's, else the defaults.

    On --resume the run's own.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for item in fields(Settings):
        option, default = f"--{item.name.replace('_', '-')}", ""
        if item.default not in ("", False, MISSING):
            default = f" (default {item.default})"
        kind = {"type": item.type, "metavar": item.type.__name__.upper()}
        if item.type is bool:
            kind = {"action": "store_true"}
        text = item.metadata["help"] + default
        parser.add_argument(option, default=argparse.SUPPRESS, help=text, **kind)
    typed = vars(parser.parse_args(argv))
    preset = typed.get("preset") or ("base" if typed.get("manifest") else "phantom")
    if preset not in PRESETS:
        raise ValueError(f"there is no preset '{preset}'; there are: {', '.join(PRESETS)}")
    chosen = {"preset": preset, "out": f"runs/{preset}", **typed}
    settings = Settings(**SCHEDULES[preset] | chosen)
    record = Path(settings.out) / "state" / "settings.json"
    if not record.exists():
        return settings
    if not settings.resume:
        mend = "--resume goes on with it, --out names another folder"
        raise ValueError(f"{settings.out}: holds a run already; {mend}")
    may_change = ("out", "device", "workers", "resume")
    changed = {name: typed[name] for name in may_change if name in typed}
    return Settings(**json.loads(record.read_text()) | changed)


def main(argv=None):
    """Train, then evaluate; the exit status, 130 where it was stopped."""
    settings = parse(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        # The others wait while rank 0 prepares volumes, which may take long.
        backend = "nccl" if settings.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=24))
    if settings.device == "cpu":
        keep_freed_memory()
    if not settings.manifest:
        settings.manifest = str(PHANTOM_FOLDER / "manifest.csv")
        if rank == 0:
            phantom_manifest()
        if world > 1:
            dist.barrier()
        settings.summaries = settings.summaries or phantom_summaries(settings.device)
    if settings.summaries == "none":
        settings.summaries = ""
    data.read_manifest(settings.manifest)  # what is wrong with it is said before any writing
    if not train(settings):
        print(f"stopped; python train.py --out {settings.out} --resume goes on", file=sys.stderr)
        return 130
    if rank == 0:
        save_reference(settings)
        finish(settings)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(data.run_command(main))
    except KeyboardInterrupt:
        mend = "the same command with --resume goes on"
        print(f"train.py: stopped; {mend}", file=sys.stderr)
        sys.exit(130)
