"""Train BrgSA on pairs of volumes and reports; without arguments on the phantom, from nothing to a zero-shot table in minutes.

    loss = alpha (mse(v_hat, v) + mse(t_hat, t)) + beta InfoNCE(v, t) + gamma InfoNCE(v_hat, t_hat)

    python train.py
    python train.py --manifest manifest.csv --summaries summaries.jsonl --preset base --out runs/ct-rate
    torchrun --nproc-per-node 8 train.py --manifest manifest.csv --preset base --out runs/ct-rate

The run's folder then holds the best model (config.json, model.safetensors, tokenizer.json), log.jsonl, curves.png, state/ (the last
model and all that exact resumption needs), reference.safetensors (the training scans' embeddings) and evaluation/.
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
from model import PAIRS, PRESETS, BrgSA, Config, TextEncoder, train_tokenizer, zero_shot_scores
from report import evaluation_table


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """A training run; the defaults are the authors' (REFERENCE: Adam, 39 epochs of batch 64)."""
    manifest: str = setting("", "manifest.csv; without one the phantom is written and used")
    summaries: str = setting("", "summaries.jsonl of the manifest's reports, the texts; none: the raw reports are. The phantom's are written by summarize.py")
    preset: str = setting("", f"of model and schedule: {', '.join(PRESETS)}; default: phantom without a manifest, else base")
    out: str = setting("", "the run's folder; default: runs/PRESET")
    resume: bool = setting(False, "go on with the run in --out, with its own settings; begin it where there is none")
    vision: str = setting("", "vit, resnet18 or resnet34; default: the preset's")
    text_checkpoint: str = setting("", "a Hugging Face BERT's folder to start the text encoder from")
    cache: str = setting("", "the folder of prepared volumes; default: cache beside the manifest")
    epochs: int = setting(39, "passes over the distinct reports")
    batch: int = setting(64, "pairs in a batch, over all GPUs; each is the others' negative")
    accumulate: int = setting(1, "batches in an optimiser step")
    optimizer: str = setting("adam", "adam, adamw or muon (AdamW, but Muon for the vision encoder's inner matrices and kernels)")
    lr: float = setting(5e-5, "learning rate at its highest")
    text_lr: float = setting(1.0, "the text encoder's learning rate, as a share of lr")
    beta1: float = setting(0.5, "Adam's first")
    beta2: float = setting(0.999, "Adam's second")
    weight_decay: float = setting(1e-6, "of matrices; not of biases and norms")
    schedule: str = setting("plateau", "plateau (halved when the held-out loss has not fallen for 5 epochs) or cosine")
    warmup: int = setting(0, "steps of linear warm-up")
    clip: float = setting(0.25, "largest gradient norm")
    alpha: float = setting(0.5, "weight of the reconstruction MSE")
    beta: float = setting(1.0, "weight of InfoNCE(v, t)")
    gamma: float = setting(1.0, "weight of InfoNCE(v_hat, t_hat)")
    learn_scale: bool = setting(False, "learn InfoNCE's scale, else it stays 10")
    bank_init: str = setting("orthogonal", "how the bank begins: orthogonal, gaussian, xavier, uniform, or kmeans of the first embeddings")
    bank_frozen: bool = setting(False, "keep the bank as it begins")
    holdout: float = setting(0.05, "share of the training patients held back to choose the best model by")
    seed: int = setting(0, "of everything random")
    workers: int = setting(min(8, os.cpu_count()) if torch.cuda.is_available() else 0, "processes that load volumes")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")


SCHEDULES = {
    "base": {},
    # a reconstruction loss of the authors' weight draws all embeddings into one point early on; so does a text encoder that learns as fast as the vision encoder
    "phantom": dict(epochs=50, batch=32, optimizer="muon", lr=3e-3, text_lr=0.1, beta1=0.9, weight_decay=0.02, schedule="cosine", warmup=30, clip=1.0, alpha=0.02,
                    holdout=0.1),
}
PHANTOM = dict(train=800, valid=240, seed=0, masks=True)
PHANTOM_FOLDER = Path("runs/phantom-data")
SUMMARIZER = Path(__file__).parent / "checkpoints" / "summarizer"


# ----------------------------------------------------------------------------------------------------------------- the parts

def phantom_manifest(folder=PHANTOM_FOLDER):
    """Write the phantom where it is absent or unfinished; returns its manifest, train and valid together."""
    manifest = folder / "manifest.csv"
    if not (folder / "phantom.json").exists():
        phantom.write(folder, **PHANTOM)
    if not manifest.exists():
        data.write_manifest(data.ct_rate_manifest(folder, "train") + data.ct_rate_manifest(folder, "valid"), manifest)
    return manifest


def phantom_summaries(device="cpu", folder=PHANTOM_FOLDER):
    """Summarize the phantom's reports with its own small language model, those not yet done; returns summaries.jsonl's path."""
    summarize.run(SUMMARIZER, folder / "manifest.csv", folder / "summaries.jsonl", device=device)
    return str(folder / "summaries.jsonl")


def training_rows(rows, holdout):
    """(rows to train on, rows held back): of split train where there is one; whole patients, chosen by their names' hash."""
    rows = [row for row in rows if row.split == "train"] or [row for row in rows if row.split == ""]
    if not rows:
        raise ValueError("the manifest has no row of split train, nor one without a split")
    patients = sorted({row.patient for row in rows}, key=lambda patient: hashlib.sha256(patient.encode()).digest())
    held = set(patients[:round(holdout * len(patients))])
    return [row for row in rows if row.patient not in held], [row for row in rows if row.patient in held]


class BatchKeys:
    """The batches of keys (epoch, item) from batch number `first` on: a new shuffle each epoch, the same for the same seed.

    Every rank gets its own part of each batch. An epoch's last, smaller batch is left out: its negatives would be fewer.
    """

    def __init__(self, n_items, batch, epochs, seed, first=0, rank=0, world=1):
        self.n_items, self.batch, self.epochs, self.seed, self.first, self.rank, self.world = n_items, batch, epochs, seed, first, rank, world
        self.per_epoch = n_items // batch

    def __len__(self):
        return self.per_epoch * self.epochs - self.first

    def __iter__(self):
        for number in range(self.first, self.per_epoch * self.epochs):
            epoch, place = divmod(number, self.per_epoch)
            order = numpy.random.default_rng((self.seed, epoch)).permutation(self.n_items)
            items = order[place * self.batch:(place + 1) * self.batch][self.rank::self.world]
            yield [(epoch, int(item)) for item in items]


def collate(pairs):
    volumes, texts = zip(*pairs)
    return torch.stack(volumes), list(texts)


@torch.no_grad()
def first_entries(model, pairs, batch, device):
    """Entries (bank_size, dim) to begin the bank with: k-means of the untrained model's embeddings of both modalities, up to two of each an entry."""
    size = len(model.bank.weight)
    items = range(min(len(pairs), 2 * size))
    parts = (collate([pairs[0, item] for item in items[i:i + batch]]) for i in items[::batch])
    embeddings = [x for volumes, texts in parts for x in (model.encode_image(volumes.to(device)), model.encode_text(texts))]
    return kmeans(torch.cat(embeddings), size)


def gathered(embeddings):
    """The embeddings of every GPU's part of the batch, gradients included, so that all are negatives."""
    if not dist.is_initialized():
        return embeddings
    return [torch.cat(dist.nn.functional.all_gather(x.contiguous())) for x in embeddings]


def learning_rate(settings, step, steps):
    warm = min(1.0, (step + 1) / max(settings.warmup, 1))
    return settings.lr * warm * (0.5 * (1 + math.cos(math.pi * step / steps)) if settings.schedule == "cosine" else 1.0)


def mixed_precision(device):
    """The type for autocast: bfloat16 on a GPU that computes in it, else float16; on a CPU none, whose bfloat16 batch norm overflows."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return None


def keep_freed_memory():
    """On Linux's CPU, let malloc keep what was freed: returning it after each step costs a page fault for every 4 KiB of the next."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)          # M_MMAP_MAX: large blocks from the heap, too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: don't shrink the heap


def orthogonal(matrix, steps=5):
    """The matrix with its singular values made about 1: the Newton-Schulz iteration of Jordan et al. 2024, x <- (a + b x x' + c (x x')^2) x.

    All its factors are polynomials of the first x x', so they are multiplied there, on the shorter side squared, and meet x once.
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
    """AdamW, but groups with `inner` learn along their orthogonalised momentum (Jordan et al. 2024), so that rare directions learn as fast as common ones.

    A convolution's weight is the matrix (out, in * kernel). A step is as long as AdamW's usually is (0.2 a weight; Liu et al. 2025), so both share one rate.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in (weight for weight in group["params"] if group["inner"] and weight.grad is not None):
                gradient = weight.grad.flatten(1)
                state = self.state[weight]
                if not state:
                    state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(gradient)}  # AdamW asks for a step in every state
                state["step"] += 1
                momentum = state["momentum"].lerp_(gradient, 0.05)
                update = orthogonal(gradient.lerp(momentum, 0.95)) * (0.2 * max(gradient.shape) ** 0.5)
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update.view_as(weight))
                weight.grad = None  # AdamW passes it by
        super().step()


def make_optimizer(model, settings):
    text = {*model.text.parameters(), *model.text_projection.parameters()}
    inner = {parameter for parameter in model.vision.blocks.parameters() if parameter.ndim > 1} if settings.optimizer == "muon" else set()
    groups = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter in text, parameter.ndim > 1, parameter in inner), []).append(parameter)
    groups = [{"params": parameters, "share": settings.text_lr if of_text else 1.0, "weight_decay": settings.weight_decay if matrices else 0.0, "inner": is_inner}
              for (of_text, matrices, is_inner), parameters in sorted(groups.items())]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}.get(settings.optimizer)
    if kind is None:
        raise ValueError(f"optimizer is '{settings.optimizer}'; adam, adamw or muon is needed")
    return kind(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2))


def validate(model, rows, texts, cache, settings, device):
    """{"loss", "macro_auroc", "classes"} on held-out rows: the training loss in batches, zero-shot AUROC of every class that has both."""
    if not rows:
        return {}
    model.eval()
    v, t = evaluate.embed_volumes(model, rows, cache, device), evaluate.embed_texts(model, texts)
    v_hat, t_hat = evaluate.bridge(model, v), evaluate.bridge(model, t)
    parts = [torch.arange(len(v))[i::math.ceil(len(v) / settings.batch)] for i in range(math.ceil(len(v) / settings.batch))]
    loss = sum(alignment_loss(v[i], t[i], v_hat[i], t_hat[i], settings.alpha, settings.beta, settings.gamma, model.scale.item())[0] * len(i)
               for i in parts) / len(v)
    result = {"loss": float(loss)}
    classes = list(dict.fromkeys(name for row in rows for name in row.labels))
    if classes:
        prompts = evaluate.embed_texts(model, [f"There is {name}" for name in classes])
        scores = zero_shot_scores(v, v_hat, prompts, evaluate.bridge(model, prompts), scoring(settings))
        values = auroc(scores.numpy(), numpy.array([[row.labels.get(name, numpy.nan) for name in classes] for row in rows]))
        if numpy.isfinite(values).any():
            result |= {"macro_auroc": float(numpy.nanmean(values)), "classes": int(numpy.isfinite(values).sum())}
    model.train()
    return result


def scoring(settings):
    """Without the bank's losses (alpha = gamma = 0: plain contrastive learning) x_hat means nothing and isn't scored."""
    return PAIRS[:2] if settings.gamma or settings.alpha else PAIRS[:1]


# -------------------------------------------------------------------------------------------------------------- saved state

def save_state(path, model, optimizer, scaler, progress):
    """The last model, the optimiser and the progress (JSON) in one safetensors file, atomically."""
    tensors = {f"model.{name}": tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": torch.as_tensor(value).cpu().contiguous() for name, value in state.items()}
    progress = {"progress": json.dumps(progress | {"scaler": scaler.state_dict()})}
    data.write_atomically(path, save(tensors, progress))


def load_state(path, model, optimizer, scaler):
    """Restore what save_state wrote; returns the progress."""
    try:
        with safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); without it the run can't be resumed") from None
    model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    states = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            states.setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    scaler.load_state_dict(progress["scaler"])
    return progress


class Log:
    """log.jsonl: one object a line; on resumption the lines of steps that will be repeated are dropped."""

    def __init__(self, path, step):
        self.path = path
        lines = path.read_text().splitlines() if step and path.exists() else []
        self.lines = [line for line in map(_json, lines) if line and line["step"] <= step]
        data.write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())

    def write(self, **line):
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def _json(line):
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(line)


def plot_curves(log, path):
    """Loss and its parts over the steps, the held-out loss and the zero-shot macro AUROC beside them, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    train = [line for line in log.lines if "total" in line]
    valid = [line for line in log.lines if "valid" in line and line["valid"]]
    for name in train[0] if train else ():
        if name in ("total", "mse", "info_nce", "info_nce_hat"):
            left.plot([line["step"] for line in train], [line[name] for line in train], label=name, linewidth=1)
    left.plot([line["step"] for line in valid], [line["valid"]["loss"] for line in valid], "k.--", label="total, held out", linewidth=1)
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    left.legend(frameon=False)
    scored = [line for line in valid if "macro_auroc" in line["valid"]]
    right.plot([line["step"] for line in scored], [line["valid"]["macro_auroc"] for line in scored], "o-")
    right.axhline(0.5, color="grey", linewidth=0.8)
    right.set(xlabel="step", ylabel="zero-shot macro AUROC, held-out patients", ylim=(0.4, 1))
    path.with_suffix(".tmp.png").unlink(missing_ok=True)
    figure.savefig(path.with_suffix(".tmp.png"), dpi=110)
    os.replace(path.with_suffix(".tmp.png"), path)


# --------------------------------------------------------------------------------------------------------------- the loop

def train(settings):
    """Train as settings say, in settings.out; returns True when the last step was made, False when stopped before."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(settings.device, int(os.environ.get("LOCAL_RANK", 0)) if settings.device == "cuda" else None)
    torch.manual_seed(settings.seed)
    out, state_file = Path(settings.out), Path(settings.out) / "state" / "last.safetensors"

    # data
    summaries = data.read_summaries(settings.summaries) if settings.summaries else {}
    config = model_config(settings)
    cache = data.Cache(settings.cache or Path(settings.manifest).parent / "cache", config.spacing, config.shape, config.hu_range)
    rows, held_out = training_rows(data.read_manifest(settings.manifest), settings.holdout)
    if rank == 0:
        data.prepare(rows + held_out, cache)
    if world > 1:
        dist.barrier()
    rows, held_out = [row for row in rows if cache.holds(row)], [row for row in held_out if cache.holds(row) and row.report]
    pairs = data.ReportVolumes(rows, cache, summaries, config.crop, seed=settings.seed)
    batch = min(settings.batch, len(pairs)) // world * world
    if batch < 2:
        raise ValueError(f"{settings.manifest}: {len(pairs)} distinct reports to train on; at least two are needed, and one for each GPU")
    texts = [" ".join(data.sentences(summaries.get(data.report_sha256(row.report), row.report))[:pairs.n_sentences]) for row in held_out]

    # model
    if state_file.exists():
        text_encoder, tokenizer = None, BrgSA.from_pretrained(out).text.tokenizer
    elif settings.text_checkpoint:
        text_encoder = TextEncoder.from_huggingface(settings.text_checkpoint)
        tokenizer = text_encoder.tokenizer
    else:
        text_encoder, tokenizer = None, train_tokenizer((sentence for _, text in pairs.items for sentence in text), config.vocabulary)
    model = BrgSA(config, tokenizer)
    if text_encoder:
        model.text.load_state_dict(text_encoder.state_dict())
    model.to(device).train()
    if not state_file.exists():
        volumes, first_texts = collate([pairs[0, item] for item in range(min(len(pairs), 64))])
        model.initialise(volumes.to(device), first_texts)
        if settings.bank_init == "kmeans":
            model.bank.reset(first_entries(model, pairs, settings.batch, device))
    model.bank.weight.requires_grad_(not settings.bank_frozen)
    optimizer = make_optimizer(model, settings)
    amp = mixed_precision(device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=5) if settings.schedule == "plateau" else None
    progress = {"step": 0, "best": None, "lr_factor": 1.0, "plateau": None}
    if state_file.exists():
        progress = load_state(state_file, model, optimizer, scaler)
        if plateau and progress["plateau"]:
            plateau.load_state_dict(progress["plateau"])
    parallel = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None) if world > 1 else model

    # steps
    if rank == 0:
        data.write_atomically(out / "state" / "settings.json", json.dumps(asdict(settings), indent=1).encode())
    keys = BatchKeys(len(pairs), batch, settings.epochs, settings.seed, progress["step"] * settings.accumulate, rank, world)
    loader = iter(torch.utils.data.DataLoader(pairs, batch_sampler=keys, num_workers=settings.workers, collate_fn=collate,
                                              pin_memory=device.type == "cuda", persistent_workers=settings.workers > 0))
    per_epoch = max(1, keys.per_epoch // settings.accumulate)
    steps = keys.per_epoch * settings.epochs // settings.accumulate
    log = Log(out / "log.jsonl", progress["step"]) if rank == 0 else None
    stop = stop_at_signal()
    sums, saved_at = {}, time.monotonic()
    bar = tqdm(range(progress["step"], steps), initial=progress["step"], total=steps, desc="train", unit="step", disable=rank > 0)
    for step in bar:
        lr = learning_rate(settings, step, steps) * progress["lr_factor"]
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]
        for _ in range(settings.accumulate):
            volumes, batch_texts = next(loader)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                embeddings = parallel(volumes.to(device, non_blocking=True), batch_texts)
            embeddings = gathered([x.float() for x in embeddings])
            loss, parts = alignment_loss(*embeddings, settings.alpha, settings.beta, settings.gamma, model.scale)
            scaler.scale(loss / settings.accumulate).backward()
            for name, value in {"total": loss, **parts}.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        progress["step"] = step + 1

        epoch_ends, last = (step + 1) % per_epoch == 0, step + 1 == steps
        if (step + 1) % 10 == 0 or last:
            n = ((step % 10) + 1) * settings.accumulate
            means = {name: float(value) / n for name, value in sums.items()}
            if not math.isfinite(means["total"]):
                raise ValueError(f"{out}: the loss is {means['total']} at step {step + 1}; a smaller --lr may help, --resume goes on from the last save")
            bar.set_postfix({"loss": f"{means['total']:.3f}"} | ({"best": f"{progress['best']:.3f}"} if progress["best"] is not None else {}), refresh=False)
            if rank == 0:
                log.write(step=step + 1, lr=lr, **means)
            sums = {}
        if epoch_ends or last:
            # every rank validates, so that all agree on the learning rate
            valid = validate(model, held_out, texts, cache, settings, device)
            if plateau and valid:
                plateau.step(valid["loss"])
                progress |= {"lr_factor": optimizer.param_groups[0]["lr"] / lr * progress["lr_factor"], "plateau": plateau.state_dict()}
            if rank == 0:
                log.write(step=step + 1, epoch=(step + 1) / per_epoch, valid=valid)
                score = valid.get("macro_auroc", -valid.get("loss", 0.0))
                if progress["best"] is None or score >= progress["best"]:
                    progress["best"] = score
                    model.save_pretrained(out)
                plot_curves(log, out / "curves.png")
        if rank == 0 and (epoch_ends or last or stop or time.monotonic() - saved_at > 900):
            save_state(state_file, model, optimizer, scaler, progress)
            saved_at = time.monotonic()
        if stop:
            return False
    return True


def stop_at_signal():
    """A list that fills at the first Ctrl-C or SIGTERM, so that the loop stops between two steps; the second Ctrl-C stops at once."""
    signals = []

    def remember(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, remember)
        signal.signal(signal.SIGTERM, remember)
    return signals


def model_config(settings):
    """The preset's Config with the run's own choices."""
    config = Config(**PRESETS[settings.preset])
    if settings.text_checkpoint:
        text = TextEncoder.from_huggingface(settings.text_checkpoint)
        config = replace(config, vocabulary=text.word_embeddings.num_embeddings, text_width=text.width, text_depth=len(text.blocks),
                         text_heads=text.blocks[0].attn.heads, text_positions=text.position_embeddings.num_embeddings)
    return replace(config, vision=settings.vision or config.vision, learn_scale=settings.learn_scale,
                   bank_init=config.bank_init if settings.bank_init == "kmeans" else settings.bank_init,
                   trained_on="phantom" if (Path(settings.manifest).parent / "phantom.json").exists() else "")


def save_reference(settings):
    """reference.safetensors: the training scans' embeddings by the best model, against which one scan's scores are ranked."""
    model = BrgSA.from_pretrained(settings.out).to(settings.device)
    cache = data.Cache(settings.cache or Path(settings.manifest).parent / "cache", model.config.spacing, model.config.shape, model.config.hu_range)
    rows = [row for row in training_rows(data.read_manifest(settings.manifest), 0.0)[0] if cache.holds(row)]
    v = evaluate.embed_volumes(model, rows, cache, settings.device)
    data.write_atomically(Path(settings.out) / "reference.safetensors", save({"v": v, "v_hat": evaluate.bridge(model, v)}))


# ------------------------------------------------------------------------------------------------------------ command line

def parse(argv=None):
    """Settings from the command line: what is typed, else the preset's, else the defaults; on --resume the run's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for item in fields(Settings):
        kind = {"action": "store_true"} if item.type is bool else {"type": item.type, "metavar": item.type.__name__.upper()}
        default = "" if item.default in ("", False, MISSING) else f" (default {item.default})"
        parser.add_argument(f"--{item.name.replace('_', '-')}", default=argparse.SUPPRESS, help=item.metadata["help"] + default, **kind)
    typed = vars(parser.parse_args(argv))
    preset = typed.get("preset") or ("base" if typed.get("manifest") else "phantom")
    if preset not in PRESETS:
        raise ValueError(f"there is no preset '{preset}'; there are: {', '.join(PRESETS)}")
    settings = Settings(**{**SCHEDULES[preset], "preset": preset, "out": f"runs/{preset}", **typed})
    record = Path(settings.out) / "state" / "settings.json"
    if settings.resume and record.exists():
        kept = {name: typed[name] for name in ("out", "device", "workers", "resume") if name in typed}
        return Settings(**{**json.loads(record.read_text()), **kept})
    if record.exists() and not settings.resume:
        raise ValueError(f"{settings.out}: holds a run already; --resume goes on with it, --out names another folder")
    return settings


def main(argv=None):
    settings = parse(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():  # the others wait while rank 0 prepares volumes, which may take long
        dist.init_process_group("nccl" if settings.device == "cuda" else "gloo", timeout=timedelta(hours=24))
    if settings.device == "cpu":
        keep_freed_memory()
    if not settings.manifest:
        settings.manifest = str(PHANTOM_FOLDER / "manifest.csv")
        if rank == 0:
            phantom_manifest()
        if world > 1:
            dist.barrier()
        if not settings.summaries:
            settings.summaries = phantom_summaries(settings.device)
    if settings.summaries == "none":
        settings.summaries = ""
    data.read_manifest(settings.manifest)  # what is wrong with it is said before anything is written
    if not train(settings):
        print(f"stopped; python train.py --out {settings.out} --resume goes on", file=sys.stderr)
        return 130
    if rank == 0:
        save_reference(settings)
        finish(settings)
    return 0


def finish(settings):
    """Evaluate the best model on the manifest's test split, where it has one with labels, and say where to look."""
    splits = {row.split for row in data.read_manifest(settings.manifest) if row.labels}
    split = next((name for name in ("test", "valid", "validation") if name in splits), None)
    if split:
        result = evaluate.evaluate(settings.out, settings.manifest, split, Path(settings.out) / "evaluation", pairs=scoring(settings),
                                   cache=settings.cache or None, device=settings.device, summaries=settings.summaries or None)
        print(evaluation_table(result))
    print(f"\nthe model, its curves and its log: {settings.out}/   " + (f"the evaluation: {settings.out}/evaluation/report.html" if split else "")
          + f"\none scan: python evaluate.py {settings.out} --volume scan.nii.gz")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: stopped; the same command with --resume goes on", file=sys.stderr)
        sys.exit(130)
