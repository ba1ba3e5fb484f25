"""bench.py is run by hand; here its commands, and what the ablation makes of finished runs."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bench
import data
import evaluate

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("preprocess", "evaluate", "summarize", "attention", "ablation", "hostile")


def run(*arguments):
    command = [sys.executable, "bench.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_command_says_what_it_measures():
    done = run("--help")
    assert done.returncode == 0, done.stderr
    assert all(f"    {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main([command, "--help"])
    assert exit.value.code == 0
    assert f"example: python bench.py {command}" in capsys.readouterr().out


def test_a_call_in_a_new_process_returns_its_value():
    call = "print('a word before') or [timed(int) >= 0, 1]"
    assert bench.in_new_process(call) == [True, 1]


def made_up_run(folder, rows, separation, rng):
    """A finished run with scores that tell positives from negatives by `separation`."""
    classes = data.CT_RATE + data.CT_RATE_LT
    labels = np.array([[row.labels[name] for name in classes] for row in rows])
    scores = rng.normal(size=labels.shape) + separation * labels
    gap = {"centroid_distance": 1.5, "linear_separability": 1.0}
    evaluation = folder / "evaluation"
    evaluate.write_scores(evaluation / "scores.csv", [row.name for row in rows], classes, scores)
    gaps = {"gap": {"before": gap, "after": gap | {"centroid_distance": 0.25}}}
    (evaluation / "metrics.json").write_text(json.dumps(gaps))
    return folder


def cells_of(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_ablations_table_and_picture_come_from_finished_runs(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        labels = {name: float(rng.random() < 0.3) for name in data.CT_RATE + data.CT_RATE_LT}
        row = data.Row(f"{i}", Path(f"{i}.nii.gz"), patient=f"{i // 2}", labels=labels)
        rows.append(row)
    results, pictures = {}, {}
    for arm, separation in zip(bench.ARMS, (0, 1, 0, 2)):
        runs = [made_up_run(tmp_path / f"{arm}-{seed}", rows, separation, rng) for seed in (0, 1)]
        results[arm] = [bench.collect(run, rows) for run in runs]
        clouds = rng.normal(size=(2, 50, 2)).tolist()
        pictures[arm] = {"before": clouds, "after": clouds}

    head, _, *lines = bench.ablation_table(results).splitlines()
    cells = [cells_of(line) for line in lines]
    assert {len(line) for line in cells} == {len(cells_of(head))}
    assert [line[0] for line in cells] == list(bench.ARMS)
    assert cells[0][2] == cells[0][4] == "" and cells[0][5:] == ["1.50", "1.00", ""]
    assert cells[3][5:] == ["1.50", "1.00", "0.25, 1.00"]
    macro = [float(line[1].split(" ")[0]) for line in cells]
    assert macro[3] > macro[1] > 65 and abs(macro[0] - 50) < 5
    for line in (cells[1], cells[3]):  # truly better: the interval is above 0, p is small
        assert "(+" in line[2] and line[2].endswith(" 0.001")

    figure = bench.ablation_figure(pictures)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [*bench.ARMS, "no bank", "no bank", "after the bank", "after the bank"]
