"""train.py: it learns what is there and nothing that isn't, resumes exactly, shares negatives
between processes.
"""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy
import pytest
import torch
import torch.distributed.nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import evaluate
import train
from model import BrgSA, Config

ROOT = Path(train.__file__).parent
TINY = dict(
    vision="vit", spacing=(4.0, 4.0, 4.0), shape=(24, 24, 24), crop=(24, 24, 24),
    patch=(12, 12, 12), vit_width=48, vit_depth=1, vit_heads=2, resnet_width=8,
    vocabulary=200, text_width=32, text_depth=1, text_heads=2, text_mlp=128, text_positions=64,
    text_dropout=0.0, dim=32, bank_size=16)
SCHEDULE = dict(
    epochs=4, batch=8, optimizer="adamw", lr=1e-3, beta1=0.9, weight_decay=0.02,
    schedule="cosine", warmup=4, clip=1.0, drawing="all", holdout=0.2, precision="float32")
SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import train
train.PRESETS["tiny"] = {TINY}
train.SCHEDULES["tiny"] = {SCHEDULE}
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(train.PRESETS, "tiny", TINY)
    monkeypatch.setitem(train.SCHEDULES, "tiny", SCHEDULE)


FINDINGS = {
    "effusion": (slice(0, 8), slice(16, 24), slice(0, 8)),
    "mass": (slice(16, 24), slice(0, 8), slice(16, 24)),
    "hernia": (slice(8, 16), slice(8, 16), slice(8, 16)),
}


def easy_manifest(folder, n=80, shuffle=False):
    """Noise with a bright block for each finding, and reports that say which.

    Shuffled, the reports are of other scans.
    """
    random = numpy.random.default_rng(0)
    present = random.random((n, 3)) < 0.5
    reports, summaries = [], []
    for i in range(n):
        report = [f"The scan has number {i}."]
        for name, has in zip(FINDINGS, present[i]):
            report.append(f"There is {name}." if has else f"No {name} is seen.")
        summary = [f"There is {name}." for name, has in zip(FINDINGS, present[i]) if has]
        reports.append(" ".join(report))
        summaries.append({"report_sha256": data.report_sha256(reports[i]),
                          "summary": " ".join(summary) or "There is no abnormality."})
    order = random.permutation(n) if shuffle else numpy.arange(n)
    rows = []
    for i in range(n):
        hu = random.normal(-500, 100, (24, 24, 24))
        for has, place in zip(present[i], FINDINGS.values()):
            hu[place] += 500 * has
        path = folder / f"v{i}.nii"
        affine = numpy.diag([-4.0, -4, 4, 1])
        nibabel.save(nibabel.Nifti1Image(hu.astype(numpy.int16), affine), path)
        labels = {name: float(has) for name, has in zip(FINDINGS, present[i])}
        split = "train" if i < n * 3 // 4 else "test"
        report = reports[order[i]]
        rows.append(data.Row(f"v{i}", path, split, f"p{i // 2}", report=report, labels=labels))
    data.write_manifest(rows, folder / "manifest.csv")
    lines = [json.dumps(summary) + "\n" for summary in summaries]
    (folder / "summaries.jsonl").write_text("".join(lines))
    return folder / "manifest.csv"


def command(folder, arguments, manifest="manifest.csv", out="run"):
    arguments = ["--manifest", folder / manifest, "--preset", "tiny", "--out", folder / out,
                 *arguments]
    return list(map(str, arguments))


def run(folder, *arguments, **names):
    return train.main(command(folder, arguments, **names))


def process(folder, *arguments, out="run", **environment):
    script = folder / "tiny.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), *command(folder, arguments, out=out)],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def read_log(folder, out="run"):
    return [json.loads(line) for line in (folder / out / "log.jsonl").read_text().splitlines()]


def macro_auroc(folder, out="run"):
    metrics = json.loads((folder / out / "evaluation" / "metrics.json").read_text())
    return metrics["volume"]["macro"]["all"]["auroc"]


def test_it_learns_from_reports_what_it_never_saw_a_label_of(tmp_path):
    easy_manifest(tmp_path)
    assert run(tmp_path, "--summaries", tmp_path / "summaries.jsonl", "--epochs", 40) == 0
    assert macro_auroc(tmp_path) > 0.8
    for name in ("config.json", "model.safetensors", "tokenizer.json", "log.jsonl", "curves.png",
                 "reference.safetensors", "state/last.safetensors"):
        assert (tmp_path / "run" / name).stat().st_size
    log = read_log(tmp_path)
    assert any({"total", "mse", "info_nce", "info_nce_hat"} <= set(line) for line in log)
    assert log[-1]["valid"]["macro_auroc"] > 0.8
    assert "The scan has" not in (tmp_path / "run" / "log.jsonl").read_text()
    reference, texts = evaluate.read_reference(tmp_path / "run" / "reference.safetensors")
    assert len(reference["v_hat"]) == 60 and texts["classes"] == list(FINDINGS)
    assert reference["t_first"].shape == (3, 32)
    allowed = {"There is no abnormality.", *(f"There is {name}." for name in FINDINGS)}
    kept = {sentence for text in texts["summaries"] for sentence in data.sentences(text)}
    assert kept <= allowed and len(kept) > 2  # summaries, not reports


def test_the_bank_begins_from_kmeans_and_stays_where_it_is_frozen(tmp_path):
    easy_manifest(tmp_path)
    runs = {"two": ["--bank-frozen"], "one": ["--bank-frozen", "--epochs", 1], "trained": []}
    banks = {}
    for out, arguments in runs.items():
        assert run(tmp_path, "--epochs", 2, *arguments, "--bank-init", "kmeans", out=out) == 0
        banks[out] = load_file(tmp_path / out / "model.safetensors")["bank.weight"]
    assert torch.equal(banks["one"], banks["two"])
    assert not torch.equal(banks["one"], banks["trained"])
    lengths = banks["one"].norm(dim=1)
    assert (lengths - 1).abs().max() > 0.1  # all entries of an orthogonal bank have length 1


def test_with_reports_shuffled_among_scans_it_learns_nothing(tmp_path):
    easy_manifest(tmp_path, shuffle=True)
    run(tmp_path, "--summaries", tmp_path / "summaries.jsonl", "--epochs", 40)
    assert 0.3 < macro_auroc(tmp_path) < 0.7


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, optimizer):
    easy_manifest(tmp_path)
    arguments = "--epochs", 8, "--optimizer", optimizer
    whole = process(tmp_path, *arguments, out="whole")  # with as many threads as the others
    assert whole.wait() == 0
    killed = process(tmp_path, *arguments)
    while not (tmp_path / "run" / "state" / "last.safetensors").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    torn = tmp_path / "run" / "state" / f".last.safetensors.{killed.pid}.tmp"
    torn.write_text("what a kill within a save leaves")
    assert not (tmp_path / "run" / "reference.safetensors").exists()
    assert process(tmp_path, "--resume").wait() == 0
    for part in ("model.safetensors", "state/last.safetensors"):
        assert_close(load_file(tmp_path / "whole" / part), load_file(tmp_path / "run" / part))
    assert steps(tmp_path, "run") == steps(tmp_path, "whole")
    assert not torn.exists()


def assert_close(weights, others):
    assert weights.keys() == others.keys()
    for name in weights:
        assert torch.allclose(weights[name], others[name], rtol=1e-3, atol=1e-4), name


def steps(folder, out):
    return [line["step"] for line in read_log(folder, out)]


def test_a_run_stopped_within_its_first_epoch_resumes_and_logs_the_mean_loss(tmp_path, monkeypatch):
    easy_manifest(tmp_path)
    arguments = "--batch", 4, "--epochs", 2
    assert run(tmp_path, *arguments, out="whole") == 0

    # a signal in the ninth of an epoch's twelve steps, before the first line of the log
    signals, learning_rate = [], train.learning_rate

    def stop_in_ninth_step(settings, step, steps):
        signals.extend([signal.SIGTERM] * (step == 8))
        return learning_rate(settings, step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(train, "stop_at_signal", lambda: signals)
        patch.setattr(train, "learning_rate", stop_in_ninth_step)
        assert run(tmp_path, *arguments) == 130
    assert read_log(tmp_path) == []
    assert run(tmp_path, "--resume") == 0
    for part in ("model.safetensors", "state/last.safetensors"):
        assert_close(load_file(tmp_path / "whole" / part), load_file(tmp_path / "run" / part))
    assert steps(tmp_path, "run") == steps(tmp_path, "whole")
    totals = [line["total"] for line in read_log(tmp_path) if "total" in line]
    whole = [line["total"] for line in read_log(tmp_path, "whole") if "total" in line]
    assert totals == pytest.approx(whole, rel=1e-4)  # the first, too, is the mean of ten steps


@pytest.mark.parametrize("number, workers", [(signal.SIGINT, 2), (signal.SIGTERM, 0)])
def test_ctrl_c_leaves_a_resumable_run(tmp_path, number, workers):
    easy_manifest(tmp_path, 40)
    running = process(tmp_path, "--epochs", 500, "--workers", workers)
    while not (tmp_path / "run" / "state" / "last.safetensors").exists():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.01)
    os.killpg(running.pid, number)  # as a terminal does: to the loader's processes, too
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert said.strip().endswith("--resume goes on") and "Traceback" not in said
    settings = json.loads((tmp_path / "run" / "state" / "settings.json").read_text())
    model = BrgSA.from_pretrained(tmp_path / "run")
    optimizer = train.make_optimizer(model, train.Settings(**settings))
    scaler = torch.amp.GradScaler("cpu", **train.UNSCALED)
    path = tmp_path / "run" / "state" / "last.safetensors"
    assert 0 < train.load_state(path, model, optimizer, scaler)["step"] < 500 * 3


class SharedBatchNorm(torch.nn.BatchNorm3d):
    """What SyncBatchNorm does in training, on a CPU, where it can't: statistics over processes."""

    def forward(self, x):
        moments = torch.stack([x.mean((0, 2, 3, 4)), x.square().mean((0, 2, 3, 4))])
        if train.WORLD > 1:
            moments = torch.distributed.nn.functional.all_reduce(moments) / train.WORLD
        mean, square = moments[:, :, None, None, None]
        x = (x - mean) / (square - mean.square() + self.eps).sqrt()
        return x * self.weight[:, None, None, None] + self.bias[:, None, None, None]


def gradients(chunk=0, checkpointed=False, dropout=0.0, vision="vit"):
    """A step's loss and gradients for eight pairs, shared with other processes: {name: tensor}."""
    torch.manual_seed(0)
    model = BrgSA(Config(**TINY | {
        "vit_depth": 2, "text_dropout": dropout, "vision": vision, "resnet_width": 4})).double()
    for module in model.vision.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.__class__ = SharedBatchNorm
            torch.nn.init.ones_(module.weight)
    if checkpointed:
        train.checkpoint_blocks(model)
    model.scale.requires_grad_()
    random = torch.Generator().manual_seed(1)
    volumes = torch.randint(-1000, 1000, (8, 1, 24, 24, 24), generator=random)
    texts = [f"word {'and more ' * i}" for i in range(8)]
    settings = train.Settings(chunk=chunk, precision="float32", device="cpu")
    run = SimpleNamespace(
        settings=settings, model=model, device=torch.device("cpu"), progress={"step": 0},
        scaler=torch.amp.GradScaler("cpu", enabled=False))
    part = slice(train.RANK, None, train.WORLD)
    loss, _ = train.backward(run, volumes[part], texts[part])
    return {"loss": loss.detach()} | {name: x.grad for name, x in model.named_parameters()}


@pytest.mark.parametrize("chunk, checkpointed", [(3, False), (1, False), (0, True), (5, True)])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_chunks_and_checkpoints_give_the_same_loss_and_gradients(chunk, checkpointed, dropout):
    same = gradients(chunk, dropout=dropout)
    if not dropout:
        same = gradients()  # what is dropped out depends on the chunk
    for name, gradient in gradients(chunk, checkpointed, dropout).items():
        assert torch.allclose(gradient, same[name], rtol=0, atol=1e-12), name
    if not dropout:
        assert all(gradient.abs().max() > 0 for gradient in same.values())


PART = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
import torch.distributed.nn
import train
import test_train
torch.distributed.init_process_group("gloo")
gradients = test_train.gradients(int(sys.argv[1]), vision=sys.argv[3])
if train.RANK == 0:
    for name in gradients:
        gradients[name] = gradients[name].contiguous()
    test_train.save_file(gradients, sys.argv[2])
torch.distributed.destroy_process_group()
"""


def torchrun(folder, script, *arguments):
    (folder / "part.py").write_text(script)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(folder / "part.py"), *map(str, arguments)],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("vision, chunk", [("vit", 3), ("resnet8", 0)])  # chunks of 3 and 1
def test_two_processes_and_their_chunks_give_the_gradients_of_one(tmp_path, vision, chunk):
    running = torchrun(tmp_path, PART, chunk, tmp_path / "two.safetensors", vision)
    _, said = running.communicate(timeout=240)
    assert running.returncode == 0, said
    two = load_file(tmp_path / "two.safetensors")
    for name, gradient in gradients(vision=vision).items():
        assert torch.allclose(gradient, two[name], rtol=0, atol=1e-12), name


def test_two_processes_train_validate_stop_together_and_go_on(tmp_path, capsys):
    easy_manifest(tmp_path)
    arguments = command(tmp_path, ["--epochs", 400, "--vision", "resnet8"])
    running = torchrun(tmp_path, SCRIPT, *arguments)
    state = tmp_path / "run" / "state" / "last.safetensors"
    while not state.exists():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.05)
    first, second = sorted(children(running.pid))
    os.kill(second, signal.SIGTERM)
    time.sleep(0.3)
    with contextlib.suppress(ProcessLookupError):  # it may have stopped with the other
        os.kill(first, signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert "--resume goes on" in said and "line" not in said.split("torch/distributed")[0], said
    step = json.loads(read_metadata(state)["progress"])["step"]
    settings = json.loads((tmp_path / "run" / "state" / "settings.json").read_text())
    settings["epochs"] = step // 6 + 2
    (tmp_path / "run" / "state" / "settings.json").write_text(json.dumps(settings))
    resumed = torchrun(tmp_path, SCRIPT, *command(tmp_path, ["--resume"]))
    _, said = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, said
    assert "valid" in read_log(tmp_path)[-1]
    assert (tmp_path / "run" / "evaluation" / "metrics.json").exists()
    assert run(tmp_path, "--resume") == 0
    assert "just as it would have: processes was 2 and is 1" in capsys.readouterr().err


def children(pid):
    return map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def read_metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_ten_kills_at_random_moments_change_no_bit(tmp_path, workers):
    easy_manifest(tmp_path)
    arguments = "--epochs", 150, "--workers", workers, "--resume"
    assert process(tmp_path, *arguments, out="whole").wait() == 0
    random, kills = numpy.random.default_rng(workers), 0
    while True:
        running = process(tmp_path, *arguments)
        try:
            running.communicate(timeout=random.uniform(5, 14) if kills < 10 else None)
            break
        except subprocess.TimeoutExpired:
            running.kill()
            running.communicate()
            kills += 1
    assert running.returncode == 0 and kills > 5
    one, other = (load_file(tmp_path / out / "state/last.safetensors") for out in ("whole", "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_steps_without_a_finite_gradient_are_left_out_and_ten_in_a_row_end_the_run(
        tmp_path, monkeypatch):
    easy_manifest(tmp_path, 40)
    loss_of, bad = train.loss_of, {4, *range(20, 40)}

    def sometimes_nan(run, embeddings):
        loss, parts = loss_of(run, embeddings)
        return loss * (float("nan") if run.progress["step"] in bad else 1.0), parts

    monkeypatch.setattr(train, "loss_of", sometimes_nan)
    with pytest.raises(ValueError, match=r"ten steps in a row .* v\d+, v\d+.*; --resume"):
        run(tmp_path, "--epochs", 20)
    log = [line for line in read_log(tmp_path) if "total" in line]
    assert [line["skipped"] for line in log] == [1, 0]
    state = load_file(tmp_path / "run" / "state" / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())
    bad.clear()
    assert run(tmp_path, "--resume") == 0


@pytest.mark.parametrize("vision", ["vit", "resnet8", "resnet18"])
def test_every_tensor_of_a_step_is_on_the_models_device(vision):
    """Two devices in one operation fail; as if a GPU were there, on one without values."""
    with torch.device("meta"):
        model = BrgSA(Config(**TINY | {"vision": vision, "text_dropout": 0.1}))
    volumes = torch.empty(4, 1, 24, 24, 24, dtype=torch.int16, device="meta")
    run = SimpleNamespace(settings=train.Settings(), model=model)
    embeddings = model(volumes, ["one word", "two words", "three", "four"])
    loss, _ = train.loss_of(run, embeddings)
    loss.backward()
    for name, weight in model.named_parameters():
        assert not weight.requires_grad or weight.grad.device.type == "meta", name


def test_a_training_starts_from_a_run_and_keeps_what_is_frozen(tmp_path):
    easy_manifest(tmp_path, 40)
    run(tmp_path, "--epochs", 1, out="first")
    first = load_file(tmp_path / "first" / "model.safetensors")
    for part, names in {"vision": ["vision."], "both": ["vision.", "text."]}.items():
        run(tmp_path, "--epochs", 1, "--init", tmp_path / "first", "--freeze", part, out=part)
        for name, weight in load_file(tmp_path / part / "model.safetensors").items():
            if name != "scale":
                assert torch.equal(weight, first[name]) == name.startswith(tuple(names)), name


def test_a_frozen_text_encoder_drops_nothing_out(tmp_path):
    easy_manifest(tmp_path, 40)
    for arguments in (["--text-lr", 0], ["--freeze", "text"], []):
        settings = train.parse(command(tmp_path, arguments))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(train.PRESETS, "tiny", TINY | {"text_dropout": 0.3})
            assert train.model_config(settings).text_dropout == (0.0 if arguments else 0.3)


def test_projections_begin_from_features_without_dropout():
    torch.manual_seed(0)
    model = BrgSA(Config(**TINY | {"text_dropout": 0.5, "text_pooling": "sentences"}))
    texts = ["There is mass.", "There is hernia.", "No effusion."] * 4
    model.initialise(torch.zeros(2, 1, 24, 24, 24), texts)
    t = model.eval().encode_text(texts)
    assert t.mean(0).abs().max() < 1e-4 and t.norm(dim=1).max() < 10
    assert model.train().text.training


def test_a_vision_encoder_is_loaded_by_name_its_positions_resized(tmp_path, capsys):
    torch.manual_seed(0)
    source = BrgSA(Config(**TINY | {"crop": (48, 48, 48), "shape": (48, 48, 48)})).vision
    weights = {f"visual.{name}": tensor for name, tensor in source.state_dict().items()}
    weights["visual.head.weight"] = torch.zeros(3)
    weights["visual.norm.weight"] = torch.zeros(7)
    save_file(weights, tmp_path / "vit.safetensors")
    encoder = BrgSA(Config(**TINY)).vision
    start = encoder.norm.weight.clone()
    train.load_vision(encoder, tmp_path / "vit.safetensors")
    said = capsys.readouterr().err
    assert "resized: pos_embed\n  left: head.weight, norm.weight\n" in said
    assert "without a start: norm.weight" in said
    own, loaded = source.state_dict(), encoder.state_dict()
    assert torch.equal(loaded["blocks.0.mlp.fc1.weight"], own["blocks.0.mlp.fc1.weight"])
    assert torch.equal(encoder.norm.weight, start)
    assert torch.equal(loaded["pos_embed"][:, 0], own["pos_embed"][:, 0])
    means = own["pos_embed"][:, 1:].unflatten(1, (2, 2, 2) * 2).mean((2, 4, 6)).flatten(1, 3)
    assert loaded["pos_embed"].shape == (1, 9, 48) and means.shape == (1, 8, 48)
    assert torch.allclose(loaded["pos_embed"][:, 1:], means, atol=1e-5)
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="bad.safetensors: not a .safetensors"):
        train.load_vision(encoder, tmp_path / "bad.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="none of its 1 tensors"):
        train.load_vision(encoder, tmp_path / "other.safetensors")


class Kept:
    """A tensor that is kept for a backward pass, as long as it is kept."""
    now = most = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Kept.now += tensor.nbytes
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self):
        Kept.now -= self.tensor.nbytes


@pytest.mark.parametrize("chunk, share", [(1, 1 / 8), (2, 1 / 4), (0, 1)])
def test_a_step_in_chunks_keeps_a_chunks_share_of_the_activations(chunk, share):
    most = []
    for size in (0, chunk):
        Kept.most = Kept.now
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            gradients(size)
        most.append(Kept.most)
    assert share <= most[1] / most[0] < share + 0.15  # the weights themselves are in both


def test_what_a_step_costs_is_what_a_step_keeps(tmp_path, capsys):
    config = Config(**TINY | {"vit_depth": 12, "text_depth": 12, "vit_width": 96})
    settings = train.Settings(precision="float32", device="cpu")
    cost, model, kept = train.costs(config, settings), BrgSA(config), {}
    volumes, texts = torch.zeros(2, 1, 24, 24, 24), ["a " * 97, "a " * 97]

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    sizes = []
    for n in (1, 2):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = model(volumes[:n], texts[:n])
        sizes.append(sum(storage.nbytes() for storage in kept.values()))
        kept.clear()
        del out
    assert cost["activations"] == pytest.approx(sizes[1] - sizes[0], rel=0.02)
    assert cost["parameters"] == sum(weight.numel() for weight in model.parameters()) - 1  # scale
    assert cost["flops"] == pytest.approx(6 * cost["parameters"], rel=20)
    assert cost["checkpointed"] < cost["activations"] / 4
    easy_manifest(tmp_path)
    assert run(tmp_path, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "million parameters" in said and "48 pairs an epoch, 24 steps" in said
    assert not (tmp_path / "run").exists()
    assert "begins from nothing" not in said and "by --chunk 8 --checkpoint-activations" in said


def test_a_full_gpu_is_one_line_with_what_needs_less(tmp_path, monkeypatch):
    def full(settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    easy_manifest(tmp_path, 40)
    monkeypatch.setattr(train, "train", full)
    with pytest.raises(ValueError, match="memory is full; .* 0.0 --checkpoint-activations, 0.0 by"):
        run(tmp_path)


def test_loader_workers_are_as_many_as_shared_memory_holds(monkeypatch, capsys):
    run = SimpleNamespace(
        settings=train.Settings(workers=8), device=torch.device("cpu"), batch=64,
        model=SimpleNamespace(config=Config()))
    usage = SimpleNamespace(free=2**32)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: usage)
    assert train.loader_workers(run) == 2  # base's two batches of 64 are 1.4 GB
    assert "4.0 GiB are free and 8 loader workers want 10.7" in capsys.readouterr().err
    usage.free = 2**36
    assert train.loader_workers(run) == 8


def test_the_state_before_the_last_one_stays(tmp_path):
    easy_manifest(tmp_path, 40)
    run(tmp_path, "--epochs", 3)
    newest, before = (tmp_path / "run" / "state" / name for name in train.STATES)
    steps = [json.loads(read_metadata(path)["progress"])["step"] for path in (newest, before)]
    assert steps == [9, 6]
    whole = load_file(newest)
    newest.unlink()  # as a kill between two renamings leaves it
    assert run(tmp_path, "--resume") == 0
    assert all(torch.equal(whole[name], tensor) for name, tensor in load_file(newest).items())


def test_a_hand_written_manifest_without_labels_trains_and_validates_by_its_loss(tmp_path):
    easy_manifest(tmp_path, 40)
    lines = ["name,path,report"]
    for line in data.read_csv(tmp_path / "manifest.csv"):
        lines.append(f"{line['name']},{line['path']},{line['report']}")
    (tmp_path / "own.csv").write_text("\n".join(lines))
    run(tmp_path, "--epochs", 2, "--vision", "resnet18", manifest="own.csv")
    assert set(read_log(tmp_path)[-1]["valid"]) == {"loss"}
    assert BrgSA.from_pretrained(tmp_path / "run").config.vision == "resnet18"


def test_the_authors_optimiser_schedule_and_a_learnt_scale_run(tmp_path):
    easy_manifest(tmp_path, 40)
    run(tmp_path, "--epochs", 6, "--optimizer", "adam", "--schedule", "plateau",
        "--chunk", 3, "--learn-scale", "--validate-every", 2)
    assert read_log(tmp_path)[-1]["step"] == 6 * 3
    assert [line["step"] for line in read_log(tmp_path) if "valid" in line] == [6, 12, 18]
    assert BrgSA.from_pretrained(tmp_path / "run").scale != 10


def test_patients_are_held_back_whole_and_the_test_split_is_never_trained_on(tmp_path):
    rows = data.read_manifest(easy_manifest(tmp_path, 40))
    train_rows, held = train.training_rows(rows, 0.2)
    assert {row.split for row in train_rows + held} == {"train"}
    patients = {row.patient for row in train_rows}
    assert len(held) == 6 and not [row for row in held if row.patient in patients]


def test_every_epoch_draws_each_item_once_and_resumption_starts_where_it_stopped():
    batches = list(train.batch_keys(10, 3, epochs=2, seed=0))
    keys = [key for batch in batches for key in batch]
    assert len(batches) == 6 and len(set(keys)) == 18
    assert [epoch for epoch, _ in keys] == [0] * 9 + [1] * 9
    assert list(train.batch_keys(10, 3, epochs=2, seed=0, first=4)) == batches[4:]
    whole = train.batch_keys(10, 4, epochs=1, seed=0)
    first = train.batch_keys(10, 4, epochs=1, seed=0, rank=0, world=2)
    second = train.batch_keys(10, 4, epochs=1, seed=0, rank=1, world=2)
    for batch, half, other in zip(whole, first, second, strict=True):
        assert sorted(half + other) == sorted(batch)


def test_the_text_encoder_has_its_own_share_of_the_learning_rate():
    model = BrgSA(train.Config(**TINY | {"windows": ((-1000, 1000),)}))
    groups = train.make_optimizer(model, train.Settings(text_lr=0.1, weight_decay=0.5)).param_groups
    text = {*model.text.parameters(), *model.text_projection.parameters()}
    names = [group["name"] for group in groups]
    assert names == ["vectors", "matrices", "text vectors", "text matrices"]
    n_trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert sum(len(group["params"]) for group in groups) == n_trained
    for group in groups:
        for parameter in group["params"]:
            assert group["share"] == (0.1 if parameter in text else 1.0)
            assert group["weight_decay"] == (0.5 if parameter.ndim > 1 else 0.0)


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_an_orthogonalised_matrix_keeps_its_singular_vectors_and_has_values_about_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    x = matrix / matrix.norm()
    for _ in range(5):  # the iteration as it is printed
        x = 3.4445 * x + (-4.7750 * x @ x.mT + 2.0315 * x @ x.mT @ x @ x.mT) @ x
    assert torch.allclose(train.orthogonal(matrix), x, atol=1e-4)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = u.mT @ train.orthogonal(matrix) @ vh.mT
    assert (values.diagonal() - 1).abs().max() < 0.35
    assert (values - values.diagonal().diag()).abs().max() < 1e-3


@pytest.mark.parametrize("vision", ["vit", "resnet18"])
def test_muon_steps_along_all_directions_of_inner_matrices_alike_and_is_adamw_elsewhere(vision):
    moved = {}
    for optimizer in ("adamw", "muon"):
        torch.manual_seed(0)
        model = BrgSA(train.Config(**TINY | {"vision": vision}))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        total = sum((weight * torch.randn_like(weight)).sum() for weight in model.parameters())
        total.backward()
        settings = train.Settings(optimizer=optimizer, lr=0.01, weight_decay=0.0)
        train.make_optimizer(model, settings).step()
        after = dict(model.named_parameters())
        moved[optimizer] = {name: after[name].detach() - before[name] for name in before}
    for name, step in moved["muon"].items():
        if name.startswith("vision.blocks") and step.ndim > 1:
            matrix = step.flatten(1)
            values = torch.linalg.svdvals(matrix) / (0.01 * 0.2 * max(matrix.shape) ** 0.5)
            assert 0.6 < values.min() and values.max() < 1.35, name
        else:
            assert torch.equal(step, moved["adamw"][name]), name


def test_schedules_warm_up_and_fall():
    settings = train.Settings(lr=1.0, warmup=10, schedule="cosine")
    rates = [train.learning_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, abs=0.01) and rates[50] == pytest.approx(0.5)
    assert max(rates) < 1 and rates[-1] < 0.001
    assert train.learning_rate(train.Settings(lr=1.0), 7, 100) == 1.0


@pytest.mark.parametrize("arguments, said", [
    (["--preset", "huge"], "no preset 'huge'"),
    (["--manifest", "absent.csv"], "absent.csv: no such file"),
    (["--manifest", "manifest.csv", "--vision", "swin"], "vision can't be 'swin'; one of vit"),
    (["--chunk", "-1"], "--chunk is -1; a number from 0 "),
    (["--holdout", "-0.5"], "--holdout is -0.5; a number from 0 to 0.9"),
    (["--lr", "nan"], "--lr is nan"),
    (["--batch", "1"], "--batch is 1"),
    (["--device", "foo"], "no device 'foo'"),
    (["--device", "cuda:77"], "no device 'cuda:77'"),
    (["--manifest", "manifest.csv", "--summaries", "absent.jsonl"], "absent.jsonl"),
    (["--manifest", "silent.csv"], "no row has a report"),
    (["--manifest", "one.csv"], "at least two are needed"),
])
def test_bad_settings_are_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    easy_manifest(tmp_path, 4)
    (tmp_path / "silent.csv").write_text("name,path\nv0,v0.nii\n")
    (tmp_path / "one.csv").write_text("name,path,report\nv0,v0.nii,Normal.\n")
    with pytest.raises((ValueError, OSError), match=said):
        train.main(["--preset", "tiny", "--out", "run", *arguments])  # of two, the later counts
    assert not (tmp_path / "run" / "state").exists()


@pytest.mark.parametrize("arguments", [
    ["--optimizer", "sgd"], ["--schedule", "cosin"], ["--epochs", "many"], ["--freeze", "none"]])
def test_choices_are_those_of_a_list(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *arguments)
    assert stop.value.code == 2 and f"argument {arguments[0]}: invalid" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_resuming_says_what_it_ignores(tmp_path, capsys):
    easy_manifest(tmp_path, 20)
    run(tmp_path, "--epochs", 1)
    with open(tmp_path / "manifest.csv", "a") as manifest:
        manifest.write("one more,v0.nii\n")
    assert run(tmp_path, "--resume", "--lr", 0.5) == 0
    said = capsys.readouterr().err
    assert f"--lr 0.5 is ignored: the run in {tmp_path / 'run'} goes on with 0.001" in said
    assert "goes on, but not just as it would have: manifest_sha256 was" in said
    (tmp_path / "run" / "state" / "settings.json").write_text('{"epochs": "two"}')
    with pytest.raises(ValueError, match="settings.json: damaged"):
        run(tmp_path, "--resume")


def test_a_finished_run_is_not_overwritten(tmp_path):
    easy_manifest(tmp_path, 20)
    run(tmp_path, "--epochs", 1)
    with pytest.raises(ValueError, match="holds a run already"):
        run(tmp_path, "--epochs", 1)
    assert run(tmp_path, "--resume") == 0
    state = tmp_path / "run" / "state" / "last.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        run(tmp_path, "--resume")


def test_the_way_to_read_prompts_is_chosen_by_what_held_out_summaries_affirm(tmp_path, capsys):
    summaries = ["There is mass.", "There is no abnormality.", "There is hernia. There is mass."]
    affirmed = numpy.array([[0, 1], [0, 0], [1, 1]])  # hernia, mass
    for best in evaluate.READOUTS:
        scores = dict.fromkeys(evaluate.READOUTS, -affirmed) | {best: affirmed}
        study = SimpleNamespace(
            run=tmp_path, model=SimpleNamespace(config=Config()), prompts={},
            score=lambda v, way: scores[way])
        train.choose_prompts(study, torch.zeros(3, 4), summaries)
        assert list(study.prompts) == ["There is hernia.", "There is mass."]
        assert json.loads((tmp_path / "config.json").read_text())["prompts_as"] == best
        assert f"'{best}': 100.0" in capsys.readouterr().out
