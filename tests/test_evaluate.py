"""The evaluation's entry points on small real files: a tiny model, volumes written as NIfTI, scores, tables, single scans."""
import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import data
import evaluate
from model import BrgSA, Config

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(spacing=(8.0, 8.0, 8.0), shape=(32, 32, 24), crop=(32, 32, 24), patch=(8, 8, 8), vit_width=24, vit_depth=2, vit_heads=2, resnet_width=4,
            vocabulary=512, text_width=16, text_depth=2, text_heads=2, text_positions=64, dim=16, bank_size=32)
CLASSES = ["Lung nodule", "Pleural effusion", "Pneumothorax"]


def make_run(folder, **settings):
    torch.manual_seed(0)
    BrgSA(Config(**TINY | settings)).save_pretrained(folder)
    return folder


def write_scan(path, seed, affine=np.diag([-8.0, -8.0, 8.0, 1.0]), shape=(30, 28, 24)):
    rng = np.random.default_rng(seed)
    hu = np.full(shape, -1000, np.int16)
    hu[4:-4, 4:-4] = rng.integers(-100, 100, (shape[0] - 8, shape[1] - 8, shape[2]))
    nibabel.save(nibabel.Nifti1Image(hu, affine), path)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A run and a manifest of 24 volumes of 12 scans of 8 patients."""
    folder = tmp_path_factory.mktemp("bench")
    rng, rows = np.random.default_rng(0), []
    for scan in range(12):
        labels = dict(zip(CLASSES, (rng.random(3) < 0.5).astype(float)))
        for reconstruction in range(2):
            name = f"valid_{scan}_{reconstruction}"
            write_scan(folder / f"{name}.nii.gz", (scan, reconstruction))
            rows.append(data.Row(name, folder / f"{name}.nii.gz", "valid", f"p{scan % 8}", f"s{scan}", f"There is finding {scan}.", labels=labels))
    data.write_manifest(rows, folder / "manifest.csv")
    return make_run(folder / "run"), folder / "manifest.csv"


def command(*arguments):
    return subprocess.run([sys.executable, "evaluate.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_scores_and_metrics_that_agree_with_its_table(bench, tmp_path):
    run, manifest = bench
    done = command(run, "--manifest", manifest, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "metrics.json").read_text())
    scores = evaluate.read_scores(tmp_path / "scores.csv")
    rows = data.read_manifest(manifest)
    array, labels, classes = evaluate.join(scores, rows)
    assert classes == CLASSES and array.shape == (24, 3)
    for name, expected in zip(CLASSES, evaluate.auroc(array, labels)):
        assert result["volume"]["classes"][name]["auroc"] == pytest.approx(expected)
        assert f"{100 * expected:.1f}" in next(line for line in done.stdout.splitlines() if line.startswith(name))
    assert result["volume"]["macro"]["CT-RATE"]["classes"] == 2 and result["volume"]["macro"]["CT-RATE-LT"]["of"] == 1
    assert (result["volumes"], result["scans"], result["patients"]) == (24, 12, 8)
    assert result["scan"]["classes"]["Lung nodule"]["positives"] == result["volume"]["classes"]["Lung nodule"]["positives"] / 2


def test_scores_are_the_mean_of_the_two_cosines_of_the_paper(bench):
    run, manifest = bench
    model = BrgSA.from_pretrained(run)
    rows = data.read_manifest(manifest)[:3]
    cache = data.Cache(manifest.parent / "cache", model.config.spacing, model.config.shape, model.config.hu_range)
    rows, _ = data.prepare(rows, cache)
    v = evaluate.embed_volumes(model, rows, cache)
    scores = evaluate.score(model, v, evaluate.make_prompts(CLASSES))
    with torch.no_grad():
        for i, row in enumerate(rows):
            one = model.encode_image(torch.from_numpy(np.array(cache.read(row)))[None, None])
            for c, name in enumerate(CLASSES):
                t = model.encode_text([f"There is {name}"])
                cos = torch.cosine_similarity
                assert scores[i, c] == pytest.approx(((cos(one, t) + cos(model.bridge(one), t)) / 2).item(), abs=1e-5)


def test_embeddings_are_computed_once_and_again_when_the_weights_change(bench, tmp_path, monkeypatch):
    _, manifest = bench
    run = make_run(tmp_path / "run")
    calls = []
    inner = evaluate.embed_volumes
    monkeypatch.setattr(evaluate, "embed_volumes", lambda model, rows, *rest: calls.append(len(rows)) or inner(model, rows, *rest))
    first = evaluate.evaluate(run, manifest)
    second = evaluate.evaluate(run, manifest, prompts=["Lung nodule", "Empyema"])
    assert calls == [24] and first["prompts_sha256"] != second["prompts_sha256"]
    model = BrgSA.from_pretrained(run)
    model.vision_projection.bias.data += 1
    model.save_pretrained(run)
    evaluate.evaluate(run, manifest)
    assert calls == [24, 24]


def test_joining_is_by_name_whatever_the_order_and_names_the_first_ten_without_a_partner(bench, tmp_path):
    rows = data.read_manifest(bench[1])
    scores = {row.name: {name: i + c / 10 for c, name in enumerate(CLASSES)} for i, row in enumerate(rows)}
    backwards = dict(reversed(scores.items()))
    for one, two in zip(evaluate.join(scores, rows), evaluate.join(backwards, rows)):
        np.testing.assert_array_equal(one, two)
    with pytest.raises(ValueError, match=r"12 volumes are not in the scores: valid_0_0, .*, \.\.\."):
        evaluate.join({row.name: scores[row.name] for row in rows[1::2]}, rows)
    with pytest.raises(ValueError, match="1 volumes are in the scores but not in the manifest: stranger"):
        evaluate.join(scores | {"stranger": scores[rows[0].name]}, rows)


def test_a_score_file_comes_back_to_the_last_bit_and_a_bad_one_is_refused(tmp_path):
    scores = np.random.default_rng(0).normal(size=(3, 2))
    evaluate.write_scores(tmp_path / "scores.csv", ["a", "b", "c"], ["x", "y, z"], scores)
    assert evaluate.read_scores(tmp_path / "scores.csv")["b"] == {"x": scores[1, 0], "y, z": scores[1, 1]}
    for content, why in (("name,x\na,1\na,2\n", "row 3: 'a' stands twice"), ("name,x\na,nan\n", "row 2: 'a' has a score"), ("name,x\na,\n", "row 2"),
                         ("x\n1\n", "name"), ("name,x\n", "no scores")):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(ValueError, match=why):
            evaluate.read_scores(tmp_path / "bad.csv")


def test_prompts_from_files_are_ensembled_and_negatives_subtracted(bench, tmp_path):
    model = BrgSA.from_pretrained(bench[0])
    v = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    (tmp_path / "prompts.json").write_text(json.dumps({"Lung nodule": ["There is lung nodule", "A round opacity"], "Empyema": "Pus in the pleura"}))
    assert list(evaluate.make_prompts(None, [str(tmp_path / "prompts.json")])) == ["Lung nodule", "Empyema"]
    ensemble = evaluate.make_prompts(["Lung nodule", "Pneumothorax"], [str(tmp_path / "prompts.json")])
    scores = evaluate.score(model, v, ensemble)
    single = [evaluate.score(model, v, evaluate.make_prompts(None, [str(f)]))[:, 0] for f in _files(tmp_path, "There is lung nodule", "A round opacity")]
    np.testing.assert_allclose(scores[:, 0], np.mean(single, axis=0), atol=1e-6)
    assert list(ensemble) == ["Lung nodule", "Pneumothorax"] and ensemble["Pneumothorax"]["positive"] == ["There is Pneumothorax"]
    against = evaluate.make_prompts(["Lung nodule"], negative=True)
    plain, without = evaluate.make_prompts(["Lung nodule"]), {"x": {"positive": ["There is no Lung nodule"], "negative": [], "combine": "mean"}}
    np.testing.assert_allclose(evaluate.score(model, v, against), evaluate.score(model, v, plain) - evaluate.score(model, v, without), atol=1e-6)


def _files(folder, *texts):
    for i, text in enumerate(texts):
        (folder / f"{i}.json").write_text(json.dumps({"x": text}))
        yield folder / f"{i}.json"


def test_rad_chestcts_calcification_is_the_larger_of_the_two_scores(bench):
    model = BrgSA.from_pretrained(bench[0])
    v = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    one = evaluate.score(model, v, evaluate.make_prompts(["Calcification"]))[:, 0]
    both = evaluate.score(model, v, evaluate.make_prompts(["Arterial wall calcification", "Coronary artery wall calcification"]))
    np.testing.assert_allclose(one, both.max(1), atol=1e-6)


def test_each_pair_can_be_selected(bench):
    model = BrgSA.from_pretrained(bench[0])
    v = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    asked = evaluate.make_prompts(CLASSES)
    each = [evaluate.score(model, v, asked, [pair]) for pair in evaluate.PAIRS]
    np.testing.assert_allclose(evaluate.score(model, v, asked, evaluate.PAIRS), np.mean(each, axis=0), atol=1e-6)
    assert len({scores.tobytes() for scores in each}) == 4


def test_one_scan_is_ranked_with_its_place_among_the_training_scans(bench, tmp_path):
    run, manifest = make_run(tmp_path / "run", trained_on="phantom"), bench[1]
    scan = manifest.parent / "valid_3_1.nii.gz"
    without = command(run, "--volume", scan, "--prompts", "pleural effusion", "lung nodule")
    assert without.returncode == 0 and "no percentile" in without.stdout and "knows nothing about patients" in without.stdout
    v = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    model = BrgSA.from_pretrained(run)
    save_file({"v": v, "v_hat": evaluate.bridge(model, v)}, run / "reference.safetensors")
    done = json.loads(command(run, "--volume", scan, "--json").stdout)
    assert len(done["findings"]) == 33 and "knows nothing about patients" in done["warning"] and done["reference_scans"] == 40
    places = [finding["percentile"] for finding in done["findings"]]
    assert places == sorted(places, reverse=True) and 0 <= places[-1] and places[0] <= 100
    finding = done["findings"][0]
    theirs = evaluate.score(model, v, evaluate.make_prompts([finding["abnormality"]]))
    assert finding["percentile"] == pytest.approx(100 * (theirs < finding["score"]).mean())


def test_a_benchmark_says_which_classes_are_asked_for_and_a_class_without_labels_is_shown_as_such(bench, tmp_path):
    result = evaluate.evaluate(*bench, out=tmp_path, benchmark="ct-rate-lt")
    assert list(result["volume"]["classes"]) == data.CT_RATE_LT
    assert result["volume"]["macro"]["CT-RATE-LT"]["classes"] == 1 and result["volume"]["macro"]["CT-RATE-LT"]["of"] == 15
    line = next(line for line in evaluate.table(result).splitlines() if line.startswith("Empyema"))
    assert line.split()[1:3] == ["0", "-"]


def test_a_bad_volume_is_skipped_and_listed_and_never_replaced(bench, tmp_path):
    run, manifest = bench
    lines = manifest.read_text().splitlines()
    bad = tmp_path / "manifest.csv"
    bad.write_text("\n".join([lines[0], *(line.replace(",valid_", f",{manifest.parent}/valid_", 1) for line in lines[1:]),
                              lines[1].replace("valid_0_0", "broken")]) + "\n")
    (tmp_path / "broken.nii.gz").write_text("no image")
    result = evaluate.evaluate(run, bad, out=tmp_path / "out")
    assert result["volumes"] == 24 and [name for name, _ in result["skipped"]] == ["broken"]
    assert "broken" not in evaluate.read_scores(tmp_path / "out" / "scores.csv")


@pytest.mark.parametrize("arguments, why", [
    (["--volume", "absent.nii.gz"], "no such file"), (["--manifest", "absent.csv"], "no such file"), (["--manifest", "M", "--split", "nowhere"], "nowhere"),
    (["--manifest", "M", "--prompts", "bad.json"], "bad.json"), (["--manifest", "M", "--prompts", "absent.txt"], "absent.txt"),
])
def test_bad_input_gets_one_line_and_exit_status_2(bench, tmp_path, arguments, why):
    (tmp_path / "bad.json").write_text('{"a": {"positve": []}}')
    arguments = [bench[1] if a == "M" else tmp_path / a if a.endswith((".json", ".txt", ".gz", ".csv")) else a for a in arguments]
    done = command(bench[0], *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and why in done.stderr and done.stderr.startswith("evaluate.py: error: ")


def test_a_run_without_weights_gets_one_line_and_exit_status_2(tmp_path):
    done = command(tmp_path, "--volume", "scan.nii.gz")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "config.json" in done.stderr
