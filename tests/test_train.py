"""train.py: it learns what is there and nothing that isn't, resumes exactly, shares negatives
between processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy
import pytest
import torch
from safetensors.torch import load_file

import data
import train
from model import BrgSA

ROOT = Path(train.__file__).parent
TINY = dict(
    vision="vit",
    spacing=(4.0, 4.0, 4.0),
    shape=(24, 24, 24),
    crop=(24, 24, 24),
    patch=(12, 12, 12),
    vit_width=48,
    vit_depth=1,
    vit_heads=2,
    resnet_width=8,
    vocabulary=200,
    text_width=32,
    text_depth=1,
    text_heads=2,
    text_positions=64,
    dim=32,
    bank_size=16,
)
SCHEDULE = dict(
    epochs=4,
    batch=8,
    optimizer="adamw",
    lr=1e-3,
    beta1=0.9,
    weight_decay=0.02,
    schedule="cosine",
    warmup=4,
    clip=1.0,
    holdout=0.2,
)
SETUP = f"import sys, train; train.PRESETS['tiny'] = {TINY}; train.SCHEDULES['tiny'] = {SCHEDULE}; "


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(train.PRESETS, "tiny", TINY)
    monkeypatch.setitem(train.SCHEDULES, "tiny", SCHEDULE)


FINDINGS = {
    "effusion": (slice(0, 8), slice(16, 24), slice(0, 8)),
    "mass": (slice(16, 24), slice(0, 8), slice(16, 24)),
    "hernia": (slice(8, 16),) * 3,
}


def easy_manifest(folder, n=80, shuffle=False):
    """Noise with a bright block for each finding, and reports that say which (or of others)."""
    random = numpy.random.default_rng(0)
    present = random.random((n, 3)) < 0.5
    reports = [
        " ".join(
            [f"The scan has number {i}."]
            + [
                f"There is {name}." if has else f"No {name} is seen."
                for name, has in zip(FINDINGS, row)
            ]
        )
        for i, row in enumerate(present)
    ]
    order = random.permutation(n) if shuffle else numpy.arange(n)
    rows = []
    for i in range(n):
        hu = random.normal(-500, 100, (24, 24, 24))
        for has, place in zip(present[i], FINDINGS.values()):
            hu[place] += 500 * has
        nibabel.save(
            nibabel.Nifti1Image(hu.astype(numpy.int16), numpy.diag([-4.0, -4, 4, 1])),
            folder / f"v{i}.nii",
        )
        labels = {name: float(has) for name, has in zip(FINDINGS, present[i])}
        rows.append(
            data.Row(
                f"v{i}",
                folder / f"v{i}.nii",
                "train" if i < n * 3 // 4 else "test",
                f"p{i // 2}",
                report=reports[order[i]],
                labels=labels,
            )
        )
    data.write_manifest(rows, folder / "manifest.csv")
    summaries = [
        {
            "report_sha256": data.report_sha256(report),
            "summary": " ".join(f"There is {name}." for name, has in zip(FINDINGS, row) if has)
            or "There is no abnormality.",
        }
        for report, row in zip(reports, present)
    ]
    (folder / "summaries.jsonl").write_text(
        "".join(json.dumps(summary) + "\n" for summary in summaries)
    )
    return folder / "manifest.csv"


def run(folder, *arguments, manifest="manifest.csv", out="run"):
    return train.main(
        [
            "--manifest",
            str(folder / manifest),
            "--preset",
            "tiny",
            "--out",
            str(folder / out),
            *map(str, arguments),
        ]
    )


def process(folder, *arguments, out="run", **environment):
    command = [
        "--manifest",
        str(folder / "manifest.csv"),
        "--preset",
        "tiny",
        "--out",
        str(folder / out),
        *map(str, arguments),
    ]
    script = folder / "tiny.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SETUP}\n"
        "if __name__ == '__main__': sys.exit(train.main(sys.argv[1:]))\n"
    )
    return subprocess.Popen(
        [sys.executable, str(script), *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def macro_auroc(folder, out="run"):
    return json.loads((folder / out / "evaluation" / "metrics.json").read_text())["volume"][
        "macro"
    ]["all"]["auroc"]


def test_it_learns_from_reports_what_it_never_saw_a_label_of(tmp_path):
    easy_manifest(tmp_path)
    assert run(tmp_path, "--summaries", tmp_path / "summaries.jsonl", "--epochs", 40) == 0
    assert macro_auroc(tmp_path) > 0.8
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "log.jsonl",
        "curves.png",
        "reference.safetensors",
        "state/last.safetensors",
    ):
        assert (tmp_path / "run" / name).stat().st_size
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert (
        any({"total", "mse", "info_nce", "info_nce_hat"} <= set(line) for line in log)
        and log[-1]["valid"]["macro_auroc"] > 0.8
    )
    assert "The scan has" not in (tmp_path / "run" / "log.jsonl").read_text()
    assert len(load_file(tmp_path / "run" / "reference.safetensors")["v_hat"]) == 60


def test_the_bank_begins_from_kmeans_and_stays_where_it_is_frozen(tmp_path):
    easy_manifest(tmp_path)
    banks = {}
    for out, arguments in {
        "two": ["--bank-frozen"],
        "one": ["--bank-frozen", "--epochs", 1],
        "trained": [],
    }.items():
        assert run(tmp_path, "--epochs", 2, *arguments, "--bank-init", "kmeans", out=out) == 0
        banks[out] = load_file(tmp_path / out / "model.safetensors")["bank.weight"]
    assert torch.equal(banks["one"], banks["two"]) and not torch.equal(
        banks["one"], banks["trained"]
    )
    assert (
        banks["one"].norm(dim=1) - 1
    ).abs().max() > 0.1  # an orthogonal bank's entries all have length 1


def test_with_reports_shuffled_among_scans_it_learns_nothing(tmp_path):
    easy_manifest(tmp_path, shuffle=True)
    run(tmp_path, "--summaries", tmp_path / "summaries.jsonl", "--epochs", 40)
    assert 0.3 < macro_auroc(tmp_path) < 0.7


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, optimizer):
    easy_manifest(tmp_path)
    assert (
        process(tmp_path, "--epochs", 8, "--optimizer", optimizer, out="whole").wait() == 0
    )  # with as many threads as the others
    killed = process(tmp_path, "--epochs", 8, "--optimizer", optimizer)
    while not (tmp_path / "run" / "state" / "last.safetensors").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "run" / "reference.safetensors").exists()
    assert process(tmp_path, "--resume").wait() == 0
    for part in ("model.safetensors", "state/last.safetensors"):
        whole, resumed = load_file(tmp_path / "whole" / part), load_file(tmp_path / "run" / part)
        assert whole.keys() == resumed.keys()
        for name in whole:
            assert torch.allclose(whole[name], resumed[name], rtol=1e-3, atol=1e-4), name
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == [
        json.loads(line)["step"]
        for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    ]


def test_a_run_stopped_within_its_first_epoch_resumes_to_the_same_weights(tmp_path, monkeypatch):
    easy_manifest(tmp_path)
    arguments = "--batch", 4, "--epochs", 2
    assert run(tmp_path, *arguments, out="whole") == 0
    signals, learning_rate = [], train.learning_rate

    def stop_in_ninth_step(settings, step, steps):
        signals.extend([signal.SIGTERM] * (step == 8))
        return learning_rate(settings, step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(train, "stop_at_signal", lambda: signals)
        patch.setattr(train, "learning_rate", stop_in_ninth_step)
        assert run(tmp_path, *arguments) == 130
    assert run(tmp_path, "--resume") == 0
    whole = load_file(tmp_path / "whole" / "state" / "last.safetensors")
    resumed = load_file(tmp_path / "run" / "state" / "last.safetensors")
    for name in whole:
        assert torch.allclose(whole[name], resumed[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_resumable_run(tmp_path, number):
    easy_manifest(tmp_path, 40)
    running = process(tmp_path, "--epochs", 500)
    while not (tmp_path / "run" / "state" / "last.safetensors").exists():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.01)
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    assert (
        running.returncode == 130
        and said.strip().endswith("--resume goes on")
        and "Traceback" not in said
    )
    settings = json.loads((tmp_path / "run" / "state" / "settings.json").read_text())
    done = train.load_state(
        tmp_path / "run" / "state" / "last.safetensors", *untrained(tmp_path / "run", settings)
    )
    assert 0 < done["step"] < 500 * 3


def untrained(out, settings):
    model = BrgSA.from_pretrained(out)
    return (
        model,
        train.make_optimizer(model, train.Settings(**settings)),
        torch.amp.GradScaler("cpu", enabled=False),
    )


def test_two_processes_train_as_one_does_on_the_same_batches(tmp_path):
    easy_manifest(tmp_path)
    run(tmp_path, "--epochs", 1, "--batch", 48, out="one")  # one step
    with socket.socket() as free:  # as torchrun would start them
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        process(
            tmp_path,
            "--epochs",
            1,
            "--batch",
            48,
            out="two",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=120)
        assert rank.returncode == 0, said
    one, two = (load_file(tmp_path / out / "state" / "last.safetensors") for out in ("one", "two"))
    moved = [name for name in one if name.startswith("optimizer.") and name.endswith("exp_avg")]
    assert len(moved) > 20
    for name in moved:
        assert torch.allclose(
            one[name], two[name], rtol=1e-2, atol=1e-2 * float(one[name].abs().max())
        ), name


def test_a_hand_written_manifest_without_labels_trains_and_validates_by_its_loss(tmp_path):
    easy_manifest(tmp_path, 40)
    lines = data.read_csv(tmp_path / "manifest.csv")
    (tmp_path / "own.csv").write_text(
        "name,path,report\n"
        + "".join(f"{line['name']},{line['path']},{line['report']}\n" for line in lines)
    )
    run(tmp_path, "--epochs", 2, "--vision", "resnet18", manifest="own.csv")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert (
        set(log[-1]["valid"]) == {"loss"}
        and BrgSA.from_pretrained(tmp_path / "run").config.vision == "resnet18"
    )


def test_the_authors_optimiser_schedule_and_accumulated_batches_run(tmp_path):
    easy_manifest(tmp_path, 40)
    run(
        tmp_path,
        "--epochs",
        12,
        "--optimizer",
        "adam",
        "--schedule",
        "plateau",
        "--accumulate",
        2,
        "--learn-scale",
    )
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 12 * 3 // 2 and BrgSA.from_pretrained(tmp_path / "run").scale != 10


def test_patients_are_held_back_whole_and_the_test_split_is_never_trained_on(tmp_path):
    rows = data.read_manifest(easy_manifest(tmp_path, 40))
    train_rows, held = train.training_rows(rows, 0.2)
    assert {row.split for row in train_rows + held} == {"train"}
    assert len(held) == 6 and not {row.patient for row in held} & {
        row.patient for row in train_rows
    }


def test_every_epoch_draws_each_item_once_and_resumption_starts_where_it_stopped():
    batches = list(train.BatchKeys(10, 3, epochs=2, seed=0))
    assert len(batches) == 6 and all(
        len({item for _, item in batches[i] + batches[i + 1] + batches[i + 2]}) == 9 for i in (0, 3)
    )
    assert [epoch for batch in batches for epoch, _ in batch] == [0] * 9 + [1] * 9
    assert list(train.BatchKeys(10, 3, epochs=2, seed=0, first=4)) == batches[4:]
    halves = [list(train.BatchKeys(10, 4, epochs=1, seed=0, rank=rank, world=2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves)] == [
        sorted(batch) for batch in train.BatchKeys(10, 4, epochs=1, seed=0)
    ]


def test_the_text_encoder_has_its_own_share_of_the_learning_rate():
    model = BrgSA(train.Config(**TINY | {"windows": ((-1000, 1000),)}))
    groups = train.make_optimizer(model, train.Settings(text_lr=0.1, weight_decay=0.5)).param_groups
    text = {*model.text.parameters(), *model.text_projection.parameters()}
    assert sum(len(group["params"]) for group in groups) == sum(
        parameter.requires_grad for parameter in model.parameters()
    )
    for group in groups:
        for parameter in group["params"]:
            assert group["share"] == (0.1 if parameter in text else 1.0) and group[
                "weight_decay"
            ] == (0.5 if parameter.ndim > 1 else 0.0)


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_an_orthogonalised_matrix_keeps_its_singular_vectors_and_has_values_about_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    x = matrix / matrix.norm()
    for _ in range(5):  # the iteration as it is printed
        x = 3.4445 * x + (-4.7750 * x @ x.mT + 2.0315 * x @ x.mT @ x @ x.mT) @ x
    assert torch.allclose(train.orthogonal(matrix), x, atol=1e-4)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = u.mT @ train.orthogonal(matrix) @ vh.mT
    assert (values.diagonal() - 1).abs().max() < 0.35 and (
        values - values.diagonal().diag()
    ).abs().max() < 1e-3


@pytest.mark.parametrize("vision", ["vit", "resnet18"])
def test_muon_steps_along_all_directions_of_inner_matrices_alike_and_is_adamw_elsewhere(vision):
    moved = {}
    for optimizer in ("adamw", "muon"):
        torch.manual_seed(0)
        model = BrgSA(train.Config(**TINY | {"vision": vision}))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        sum(
            parameter.mul(torch.randn_like(parameter)).sum() for parameter in model.parameters()
        ).backward()
        train.make_optimizer(
            model, train.Settings(optimizer=optimizer, lr=0.01, weight_decay=0.0)
        ).step()
        moved[optimizer] = {
            name: parameter.detach() - before[name] for name, parameter in model.named_parameters()
        }
    for name, step in moved["muon"].items():
        if name.startswith("vision.blocks") and step.ndim > 1:
            values = torch.linalg.svdvals(step.flatten(1)) / (
                0.01 * 0.2 * max(step.flatten(1).shape) ** 0.5
            )
            assert 0.6 < values.min() and values.max() < 1.35, name
        else:
            assert torch.equal(step, moved["adamw"][name]), name


def test_schedules_warm_up_and_fall():
    settings = train.Settings(lr=1.0, warmup=10, schedule="cosine")
    rates = [train.learning_rate(settings, step, 100) for step in range(100)]
    assert (
        rates[0] == pytest.approx(0.1, abs=0.01)
        and max(rates) < 1
        and rates[50] == pytest.approx(0.5)
        and rates[-1] < 0.001
    )
    assert train.learning_rate(train.Settings(lr=1.0), 7, 100) == 1.0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--preset", "huge"], "no preset 'huge'"),
        (["--manifest", "absent.csv"], "absent.csv: no such file"),
        (["--manifest", "manifest.csv", "--vision", "swin"], "vision is 'swin'"),
        (["--manifest", "manifest.csv", "--optimizer", "sgd"], "optimizer is 'sgd'"),
        (["--manifest", "manifest.csv", "--summaries", "absent.jsonl"], "absent.jsonl"),
        (["--manifest", "silent.csv"], "no row has a report"),
        (["--manifest", "one.csv"], "at least two are needed"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    easy_manifest(tmp_path, 4)
    (tmp_path / "silent.csv").write_text("name,path\nv0,v0.nii\n")
    (tmp_path / "one.csv").write_text("name,path,report\nv0,v0.nii,Normal.\n")
    with pytest.raises((ValueError, OSError), match=said):
        train.main(
            [
                *(["--preset", "tiny"] if "--preset" not in arguments else []),
                "--out",
                "run",
                *arguments,
            ]
        )
    assert not (tmp_path / "run" / "state").exists()


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
