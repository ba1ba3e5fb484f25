"""What several test files share: a small summarizer, trained in seconds."""

import json
import random
import sys

import pytest
import torch

import distil
from summarize import run_command


@pytest.fixture(scope="session")
def fitted(tmp_path_factory):
    """A summarizer that `fit` made in seconds, with its pairs."""
    directory = tmp_path_factory.mktemp("fit")
    words = {
        "Pleural effusion": "Fluid fills the sac.",
        "Lung nodule": "A dot is there.",
        "Emphysema": "Holes abound.",
    }
    numbers, pairs = random.Random(0), []
    for i in range(600):
        names = [name for name in words if numbers.random() < 0.5]
        pairs.append(
            (
                " ".join([f"Scan {i}.", *(words[name] for name in names), "Nothing more is said."]),
                names,
            )
        )
    lines = [
        json.dumps({"report": report, "abnormalities": names}) + "\n" for report, names in pairs
    ]
    (directory / "pairs.jsonl").write_text("".join(lines))
    f1 = distil.fit(
        directory / "pairs.jsonl",
        directory / "model",
        vocab=400,
        width=32,
        layers=2,
        heads=2,
        steps=500,
        tokens=600,
        lr=5e-3,
        dtype=torch.float32,
        device="cpu",
    )
    return directory, pairs, f1


@pytest.fixture
def command(capsys, monkeypatch):
    """A command line in this process: (main, name, *arguments) -> (status, output, error)."""

    def run(main, name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            status = run_command(main)
        except SystemExit as stop:
            status = stop.code
        return status or 0, *capsys.readouterr()

    return run
