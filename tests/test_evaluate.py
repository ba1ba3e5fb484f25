"""The evaluation's entry points on small real files: a tiny model, volumes written as NIfTI, scores, tables, single scans."""
import contextlib
import io
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import data
import evaluate
import heatmap
import metrics
import model as model_file
import report
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


def program(*arguments):
    return subprocess.run([sys.executable, "evaluate.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


def command(*arguments):
    """The same in this process, which spares the imports."""
    out, err = io.StringIO(), io.StringIO()
    name = mock.patch.object(sys, "argv", ["evaluate.py"])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), name:
        status = evaluate.main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, status or 0, out.getvalue(), err.getvalue())


def test_the_command_writes_scores_and_metrics_that_agree_with_its_table(bench, tmp_path):
    run, manifest = bench
    done = program(run, "--manifest", manifest, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "metrics.json").read_text())
    scores = evaluate.read_scores(tmp_path / "scores.csv")
    rows = data.read_manifest(manifest)
    array, labels, classes = evaluate.join(scores, rows)
    assert classes == CLASSES and array.shape == (24, 3)
    for name, expected in zip(CLASSES, metrics.auroc(array, labels)):
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
    each = [evaluate.score(model, v, asked, [pair]) for pair in model_file.PAIRS]
    np.testing.assert_allclose(evaluate.score(model, v, asked, model_file.PAIRS), np.mean(each, axis=0), atol=1e-6)
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
    line = next(line for line in report.table(result).splitlines() if line.startswith("Empyema"))
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
    (["--manifest", "M", "--prompts", "bad.json"], "bad.json"), (["--manifest", "M", "--prompts", "?!"], "asks nothing"), (["--manifest", "M", "--prompts", "absent.txt"], "absent.txt"),
])
def test_bad_input_gets_one_line_and_exit_status_2(bench, tmp_path, arguments, why):
    (tmp_path / "bad.json").write_text('{"a": {"positve": []}}')
    arguments = [bench[1] if a == "M" else tmp_path / a if a.endswith((".json", ".txt", ".gz", ".csv")) else a for a in arguments]
    done = command(bench[0], *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and why in done.stderr and done.stderr.startswith("evaluate.py: error: ")
    assert not done.stdout


def test_a_run_without_weights_gets_one_line_and_exit_status_2(tmp_path):
    done = program(tmp_path, "--volume", "scan.nii.gz")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "config.json" in done.stderr


def test_a_scores_file_of_any_model_is_evaluated_without_a_run_and_its_order_has_no_influence(bench, tmp_path):
    result = evaluate.evaluate(*bench, out=tmp_path)
    head, *lines = (tmp_path / "scores.csv").read_text().splitlines()
    (tmp_path / "turned.csv").write_text("\n".join([head, *reversed(lines)]) + "\n")
    done = command("--scores", tmp_path / "turned.csv", "--manifest", bench[1], "--out", tmp_path / "again", "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert again["volume"] == json.loads(evaluate.to_json(result["volume"])) and again["scan"] == json.loads(evaluate.to_json(result["scan"]))
    (tmp_path / "short.csv").write_text("\n".join([head, *lines[:-1]]) + "\n")
    done = command("--scores", tmp_path / "short.csv", "--manifest", bench[1])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and lines[-1].split(",")[0] in done.stderr


def test_thresholds_come_from_another_split_only_if_its_patients_are_others(bench, tmp_path):
    rows = data.read_manifest(bench[1])
    moved = [data.Row(**{**vars(row), "split": "valid" if int(row.patient[1:]) < 4 else "tune"}) for row in rows]
    data.write_manifest(moved, tmp_path / "manifest.csv")
    evaluate.evaluate(bench[0], tmp_path / "manifest.csv", "tune", tmp_path / "tune")
    result = evaluate.evaluate(bench[0], tmp_path / "manifest.csv", "valid", tmp_path / "valid", threshold=tmp_path / "tune" / "scores.csv")
    tuned, labels, classes = evaluate.join(evaluate.read_scores(tmp_path / "tune" / "scores.csv"), [row for row in moved if row.split == "tune"])
    scores, truth, _ = evaluate.join(evaluate.read_scores(tmp_path / "valid" / "scores.csv"), [row for row in moved if row.split == "valid"])
    expected = metrics.per_class(scores, truth, metrics.best_thresholds(tuned, labels))
    for c, name in enumerate(classes):
        assert result["volume"]["classes"][name]["f1"] == pytest.approx(expected["f1"][c])
    with pytest.raises(ValueError, match="other patients"):
        evaluate.evaluate(bench[0], tmp_path / "manifest.csv", "valid", tmp_path / "x", threshold=tmp_path / "valid" / "scores.csv")


def test_a_model_beside_itself_differs_by_nothing_and_beside_a_better_one_by_what_it_lacks(bench, tmp_path):
    evaluate.evaluate(*bench, out=tmp_path)
    same = evaluate.evaluate(*bench, out=tmp_path, compare=tmp_path / "scores.csv")["compare"]
    assert same["macro_difference"] == 0 and same["macro_difference_95"] == [0, 0] and {c["p"] for c in same["classes"].values()} == {1.0}
    rows = data.read_manifest(bench[1])
    evaluate.write_scores(tmp_path / "perfect.csv", [row.name for row in rows], CLASSES, [list(row.labels.values()) for row in rows])
    better = evaluate.evaluate(*bench, out=tmp_path, compare=tmp_path / "perfect.csv")["compare"]
    assert better["macro_difference_95"][1] < 0 and all(c["other"] == 1 and 0 <= c["p"] < 0.1 for c in better["classes"].values())


def test_the_linear_probe_learns_what_is_linear_and_bears_unknown_labels():
    rng = np.random.default_rng(0)
    x, direction = rng.normal(size=(600, 16)), rng.normal(size=(16, 3))
    labels = (x @ direction > 0.5).astype(float)
    known = np.where(rng.random(labels.shape) < 0.2, np.nan, labels)
    known[:, 2] = np.nan
    scores = metrics.linear_probe(torch.from_numpy(x[:400]), known[:400], np.arange(400) // 2, torch.from_numpy(x[400:]))
    reached = metrics.auroc(scores, labels[400:])
    assert (reached[:2] > 0.97).all() and reached[2] == 0.5


def test_the_probe_stands_beside_the_zero_shot_and_never_trains_on_an_evaluated_patient(bench, tmp_path, monkeypatch):
    rows = data.read_manifest(bench[1])
    data.write_manifest([data.Row(**{**vars(row), "split": "train" if row.patient in ("p0", "p1", "p2", "p3", "p4") else "valid"}) for row in rows]
                        + [data.Row(**{**vars(row), "split": "train", "name": "again"}) for row in rows if row.name == "valid_5_0"], tmp_path / "manifest.csv")
    seen, inner = [], metrics.linear_probe
    monkeypatch.setattr(evaluate, "linear_probe", lambda v, y, patients, new: seen.extend(patients) or inner(v, y, patients, new))
    result = evaluate.evaluate(bench[0], tmp_path / "manifest.csv", out=tmp_path / "out", probe=tmp_path / "manifest.csv")
    assert set(seen) == {"p0", "p1", "p2", "p3", "p4"} and 0 <= result["volume"]["macro"]["CT-RATE"]["probe_auroc"] <= 1
    assert "linear probe" in (tmp_path / "out" / "report.html").read_text()


def test_embeddings_are_written_with_their_names(bench, tmp_path):
    done = command(bench[0], "--embed", "--manifest", bench[1], "--out", tmp_path / "e.safetensors")
    assert done.returncode == 0, done.stderr
    with safe_open(tmp_path / "e.safetensors", "pt") as file:
        assert json.loads(file.metadata()["names"]) == [row.name for row in data.read_manifest(bench[1])]
        assert file.get_tensor("v").shape == file.get_tensor("v_hat").shape == (24, 16)


class Page(HTMLParser):
    """Checks that every element is closed and collects what would be fetched."""
    VOID = {"meta", "img", "br", "rect", "path", "polyline", "circle"}

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open += [tag] if tag not in self.VOID else []
        self.fetched += [value for key, value in attributes if key in ("src", "href", "srcset")]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_whole_page_that_fetches_nothing_and_shows_every_class(bench, tmp_path):
    result = evaluate.evaluate(*bench, out=tmp_path, compare=None)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.fetched and all(link.startswith("data:image/png;base64,") for link in page.fetched) and "@import" not in text and "url(" not in text
    assert all(name in text for name in [*CLASSES, "Retrieval", "Modality gap", "Most wrong", result["model_sha256"], result["prompts_sha256"]])
    assert result["retrieval"]["volume_to_report"]["candidates"] == 12 and set(result["gap"]) == {"before", "after"}
    assert "finding 3" not in text                                                                     # no report's text


def test_a_manifest_without_labels_or_reports_is_scored_all_the_same(bench, tmp_path):
    data.write_manifest([data.Row(row.name, row.path) for row in data.read_manifest(bench[1])[:3]], tmp_path / "manifest.csv")
    done = command(bench[0], "--manifest", tmp_path / "manifest.csv", "--out", tmp_path / "out")
    assert done.returncode == 0 and "no labels" in done.stdout, done.stderr
    assert len(next(iter(evaluate.read_scores(tmp_path / "out" / "scores.csv").values()))) == 33
    Page((tmp_path / "out" / "report.html").read_text())


def explicit_attention(kept):
    def attend(q, k, v, attn_mask=None):
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        attention = torch.softmax(scores if attn_mask is None else scores.masked_fill(~attn_mask, -math.inf), dim=-1)
        if attention.requires_grad:
            attention.retain_grad()
            kept.append(attention)
        return attention @ v
    return attend


def test_rollout_equals_its_published_form_with_whole_attention_matrices(monkeypatch):
    torch.manual_seed(0)
    model = BrgSA(Config(**TINY)).eval()
    hu = np.random.default_rng(0).integers(-1000, 1000, TINY["shape"]).astype(np.int16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)                                                                                  # so that attention is not flat
        t = F.normalize(model.encode_text(["There is lung nodule"]), dim=-1)
    ours, kept = heatmap.heatmap(model, hu, ["There is lung nodule"]), []
    monkeypatch.setattr(F, "scaled_dot_product_attention", explicit_attention(kept))
    v = model.encode_image(torch.from_numpy(hu)[None, None])
    ((F.cosine_similarity(v, t) + F.cosine_similarity(model.bridge(v), t)) / 2).sum().backward()
    rolled = torch.eye(kept[0].shape[-1])
    for attention in kept:
        rolled = rolled + (attention * attention.grad)[0].relu().mean(0) @ rolled
    assert ours.shape == (4, 4, 3) and ours.max() > 0
    np.testing.assert_allclose(ours.ravel(), rolled[0, 1:].detach(), rtol=1e-4, atol=1e-9)
    assert not any(block.attn.qkv._forward_hooks or block.attn.proj._forward_pre_hooks for block in model.vision.blocks)


def test_gradcam_of_a_mean_pooled_network_is_its_features_weighted_by_their_gradient():
    torch.manual_seed(0)
    model = BrgSA(Config(**TINY | {"vision": "resnet18"})).eval()
    hu = np.random.default_rng(0).integers(-1000, 1000, (256, 256, 240)).astype(np.int16)
    ours = heatmap.heatmap(model, hu, ["There is lung nodule"])
    assert ours.shape == (8, 8, 8)
    with torch.no_grad():
        features = model.vision(model.normalise(torch.from_numpy(hu)[None, None]))[1][0]                                  # (gx, gy, gz, C)
        t = F.normalize(model.encode_text(["There is lung nodule"]), dim=-1)
    mean = features.mean((0, 1, 2)).requires_grad_()
    v = model.vision_projection(mean[None])
    ((F.cosine_similarity(v, t) + F.cosine_similarity(model.bridge(v), t)) / 2).sum().backward()
    expected = (features @ mean.grad).relu() / features[..., 0].numel()
    np.testing.assert_allclose(ours, expected, atol=1e-7)


def test_a_map_has_its_minimum_outside_the_patient():
    hu, config = np.full((32, 32, 24), -1000, np.int16), Config(**TINY)
    hu[8:24, 9:22, :16] = 0
    kept = heatmap.within_patient(np.random.default_rng(0).random((4, 4, 3)) + 1, hu, config)
    assert (kept[1:3, 1:3, :2] > kept.min()).sum() >= 7 and (kept[[0, 3]] == kept.min()).all()
    assert (kept[:, [0, 3]] == kept.min()).all() and (kept[:, :, 2] == kept.min()).all()
    np.testing.assert_array_equal(heatmap.within_patient(kept, np.full_like(hu, -1000), config), kept)  # an empty scan: nothing to go by


def test_where_the_last_stage_is_too_coarse_an_earlier_ones_features_are_each_weighted_by_their_own_gradient():
    torch.manual_seed(0)
    model = BrgSA(Config(**TINY | {"vision": "resnet18"})).eval()
    for block in model.vision.blocks:  # each starts as its shortcut; here they shall matter
        torch.nn.init.normal_(block.residual[-1].weight)
    hu = np.random.default_rng(0).integers(-1000, 1000, TINY["shape"]).astype(np.int16)
    with torch.no_grad():
        features = model.vision.blocks[:2](model.vision.stem(model.normalise(torch.from_numpy(hu)[None, None])))
        t = F.normalize(model.encode_text(["There is lung nodule"]), dim=-1)
    features.requires_grad_()
    v = model.vision_projection(model.vision.blocks[2:](features).mean((2, 3, 4)))
    ((F.cosine_similarity(v, t) + F.cosine_similarity(model.bridge(v), t)) / 2).sum().backward()
    ours = heatmap.heatmap(model, hu, ["There is lung nodule"])
    assert ours.shape == (8, 8, 6) and ours.max() > 0
    np.testing.assert_allclose(ours, (features * features.grad)[0].sum(0).relu().detach(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("vision, wrong", [("vit", "gradcam"), ("resnet18", "rollout")])
def test_a_map_that_the_encoder_cannot_give_is_refused(vision, wrong):
    model = BrgSA(Config(**TINY | {"vision": vision})).eval()
    hu = np.zeros(TINY["shape"], np.int16)
    assert np.abs(heatmap.heatmap(model, hu, ["x"], "similarity")).max() <= 1.0001
    with pytest.raises(ValueError, match=wrong):
        heatmap.heatmap(model, hu, ["x"], wrong)


RAS = np.array([[0.9, 0, 0, -90], [0, 0.9, 0, -100], [0, 0, 2.5, -60], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("affine", [RAS, np.diag([-0.9, -0.9, 2.5, 1]), RAS[[2, 0, 1, 3]]], ids=["RAS", "LPS", "permuted"])
def test_a_map_written_back_overlays_the_lesion_in_the_scans_own_voxels(tmp_path, affine):
    hu = np.full((220, 230, 70), -900, np.int16)
    hu[150:170, 60:80, 40:47] = 100
    nibabel.save(nibabel.Nifti1Image(hu, affine), tmp_path / "scan.nii.gz")
    volume, config = data.read_volume(tmp_path / "scan.nii.gz"), Config(spacing=(2, 2, 4), shape=(96, 80, 32), patch=(4, 4, 4))
    small = data.preprocess(volume.hu, volume.spacing, config.spacing, config.shape, config.hu_range)
    grid = small.reshape(24, 4, 20, 4, 8, 4).clip(-900).mean((1, 3, 5))
    heat = heatmap.to_scan(grid, volume, config)
    heatmap.write_heatmap(tmp_path / "heat.nii.gz", heat, volume, tmp_path / "scan.nii.gz")
    written = nibabel.load(tmp_path / "heat.nii.gz")
    np.testing.assert_array_equal(written.affine, nibabel.load(tmp_path / "scan.nii.gz").affine)
    assert written.shape == hu.shape
    inside = np.unravel_index(written.get_fdata().argmax(), hu.shape)
    assert hu[inside] == 100
    centre = np.array(np.nonzero(written.get_fdata() > 0.5)).mean(1)
    np.testing.assert_allclose(centre, [159.5, 69.5, 43], atol=1.5)
    assert written.get_fdata().min() >= 0 and written.get_fdata().max() == pytest.approx(1, abs=0.01)
    assert report.planes_png(heat, volume, "cube")[:4] == b"\x89PNG"


@pytest.mark.parametrize("vision", ["vit", "resnet18"])
def test_one_scans_page_and_maps_are_written_for_the_named_prompts(tmp_path, vision):
    run = make_run(tmp_path / "run", vision=vision)
    write_scan(tmp_path / "scan.nii.gz", 0, np.diag([8.0, 8.0, 8.0, 1.0]))
    done = command(run, "--volume", tmp_path / "scan.nii.gz", "--prompts", "lung nodule", "--heatmap", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    (finding,) = json.loads(done.stdout)["findings"]
    image = nibabel.load(finding["heatmap"])
    assert image.shape == (30, 28, 24) and (image.affine == np.diag([8.0, 8.0, 8.0, 1.0])).all()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["lung_nodule.nii.gz", "lung_nodule.png", "report.html"]
    assert len(Page((tmp_path / "out" / "report.html").read_text()).fetched) == 1


def test_a_synthetic_rad_chestct_runs_end_to_end(tmp_path):
    rng = np.random.default_rng(0)
    columns = ["calcification*heart", "nodulegr1cm*left_upper", "nodule*right_lung", "pacemaker_or_defib*heart", "coronary_artery_disease*heart"]
    lines = ["NoteAcc_DEID," + ",".join(columns)]
    for i in range(12):
        name = f"trn{i:05d}"
        np.savez(tmp_path / f"{name}.npz", ct=rng.integers(-1000, 400, (30, 40, 40)).astype(np.int16))
        lines.append(f"{name}," + ",".join(str(rng.integers(2)) for _ in columns))
    (tmp_path / "imgtest_Abnormality_and_Location_Labels.csv").write_text("\n".join(lines) + "\n")
    made = subprocess.run([sys.executable, "data.py", "manifest", "--dataset", "rad-chestct", "--root", tmp_path, "--split", "test", "--out",
                           tmp_path / "manifest.csv"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    run = make_run(tmp_path / "run", spacing=(1.0, 1.0, 1.0))
    result = evaluate.evaluate(run, tmp_path / "manifest.csv", out=tmp_path / "out", benchmark="rad-chestct")
    assert len(result["volume"]["classes"]) == 16 and result["volume"]["classes"]["Calcification"]["positives"] > 0
    assert result["volume"]["macro"]["all"]["of"] == 16
    everything = evaluate.evaluate(run, tmp_path / "manifest.csv", out=tmp_path / "out", benchmark=None)
    assert "Coronary artery disease" in everything["volume"]["classes"]
    Page((tmp_path / "out" / "report.html").read_text())


def test_a_synthetic_ct_rate_lt_runs_end_to_end(tmp_path):
    """Labels of the 18 and of the rare 15 in two files, one scan in the first alone; only a benchmark's own classes are scored."""
    rng, names = np.random.default_rng(0), [f"valid_{i // 2}_a_{i % 2 + 1}" for i in range(16)]
    for name in names:
        folder = tmp_path / "valid_fixed" / name[:-4] / name[:-2]
        folder.mkdir(parents=True, exist_ok=True)
        write_scan(folder / f"{name}.nii.gz", names.index(name))
    tables = {"radiology_text_reports/validation_reports.csv": (["VolumeName", "Findings_EN", "Impressions_EN"], lambda i: [f"Nodule {i // 2}.", "Not given."]),
              "metadata/validation_metadata.csv": (["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"], lambda i: [1, 0, "[8.0, 8.0]", 8.0]),
              "multi_abnormality_labels/valid_predicted_labels.csv": (["VolumeName", *data.CT_RATE], lambda i: rng.integers(2, size=18)),
              "multi_abnormality_labels/ct_rate_lt_labels.csv": (["VolumeName", *data.CT_RATE_LT], lambda i: rng.integers(2, size=15))}
    for file, (header, values) in tables.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        kept = names[:-2] if "lt_labels" in file else names
        (tmp_path / file).write_text("\n".join(",".join(f'"{value}"' for value in line) for line in
                                               [header, *([f"{name}.nii.gz", *values(i)] for i, name in enumerate(kept))]) + "\n")
    made = subprocess.run([sys.executable, "data.py", "manifest", "--dataset", "ct-rate", "--root", tmp_path, "--split", "valid", "--out",
                           tmp_path / "manifest.csv"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    run = make_run(tmp_path / "run")
    for benchmark, classes, known in (("ct-rate", data.CT_RATE, 16), ("ct-rate-lt", data.CT_RATE_LT, 14)):
        result = evaluate.evaluate(run, tmp_path / "manifest.csv", out=tmp_path / benchmark, benchmark=benchmark)
        assert list(result["volume"]["classes"]) == classes and result["volumes"] == 16 and result["scans"] == 8
        rows = data.read_manifest(tmp_path / "manifest.csv")
        assert sum(not math.isnan(row.labels.get(classes[0], math.nan)) for row in rows) == known
        positives = sum(row.labels.get(classes[0]) == 1 for row in rows)
        assert result["volume"]["classes"][classes[0]]["positives"] == positives > 0
        (macro,) = result["volume"]["macro"].values()
        assert macro["of"] == len(classes) and 0 < macro["auroc"] < 1
        Page((tmp_path / benchmark / "report.html").read_text())


def test_pointing_counts_maps_whose_maximum_lies_within_one_patch_of_the_lesion(tmp_path, monkeypatch):
    run, rows = make_run(tmp_path / "run", trained_on="phantom"), []
    (tmp_path / "masks").mkdir()
    corners = [(6, 6, 6), (22, 6, 6), (6, 20, 16), (22, 20, 16)]
    for i, (x, y, z) in enumerate(corners):
        write_scan(tmp_path / f"v{i}.nii.gz", i)
        bits = np.zeros((30, 28, 24), np.int64)
        bits[x:x + 2, y:y + 2, z:z + 2] = 1 << data.CT_RATE.index("Lung nodule")
        bits[0, 0, 0] = 1 << data.CT_RATE.index("Consolidation")
        nibabel.save(nibabel.Nifti1Image(bits, np.diag([-8.0, -8.0, 8.0, 1.0]), dtype=np.int64), tmp_path / "masks" / f"v{i}.nii.gz")
        rows.append(data.Row(f"v{i}", tmp_path / f"v{i}.nii.gz", "valid", f"p{i}", f"s{i}", labels={"Lung nodule": 1.0, "Pleural effusion": float(i % 2)}))
    data.write_manifest(rows, tmp_path / "manifest.csv")

    def oracle(model, hu, texts, pairs):
        i = next(i for i, row in enumerate(rows) if (np.asarray(hu) == np.asarray(reference[row.name])).all())
        grid = np.zeros((4, 4, 3))
        grid[tuple((corner + pad) // 8 for corner, pad in zip(corners[i], (1, 2, 0)))] = 1                      # 30 x 28 x 24 padded to 32 x 32 x 24
        return grid
    study = evaluate.Study(run, tmp_path / "manifest.csv", None, "cpu", model_file.PAIRS[:2], evaluate.make_prompts(["Lung nodule"]))
    study.embed(rows)
    reference = {row.name: study.cache.read(row) for row in rows}
    monkeypatch.setattr(heatmap, "heatmap", oracle)
    result = evaluate.evaluate(run, tmp_path / "manifest.csv", out=tmp_path / "out")["pointing"]["Lung nodule"]
    assert result["volumes"] == 4 and result["hit"] == 1 and result["elsewhere"] == 0 and 0.2 < result["chance"] < 0.7
    assert "Do heat maps point?" in (tmp_path / "out" / "report.html").read_text()
