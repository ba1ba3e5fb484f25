"""The evaluation on small real files: a tiny model, volumes as NIfTI, scores, single scans."""
import contextlib
import io
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import data
import evaluate
import metrics
import model as model_file
import report
from model import BrgSA, Config

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    spacing=(8.0, 8.0, 8.0), shape=(32, 32, 24), crop=(32, 32, 24), patch=(8, 8, 8),
    vit_width=24, vit_depth=2, vit_heads=2, resnet_width=4, vocabulary=512,
    text_width=16, text_depth=2, text_heads=2, text_positions=64, dim=16, bank_size=32,
)
CLASSES = ["Lung nodule", "Pleural effusion", "Pneumothorax"]


# ---- what the tests of heat maps and of the report use as well

def make_run(folder, **settings):
    torch.manual_seed(0)
    BrgSA(Config(**TINY | settings)).save_pretrained(folder)
    return folder


def write_scan(path, seed, affine=np.diag([-8.0, -8.0, 8.0, 1.0]), shape=(30, 28, 24)):
    rng = np.random.default_rng(seed)
    hu = np.full(shape, -1000, np.int16)
    inside = hu[4:-4, 4:-4]
    inside[:] = rng.integers(-100, 100, inside.shape)
    nibabel.save(nibabel.Nifti1Image(hu, affine), path)


def make_bench(folder):
    """A run and a manifest of 24 volumes of 12 scans of 8 patients, in a folder."""
    rng, rows = np.random.default_rng(0), []
    for scan in range(12):
        labels = dict(zip(CLASSES, (rng.random(3) < 0.5).astype(float)))
        for reconstruction in range(2):
            path = folder / f"valid_{scan}_{reconstruction}.nii.gz"
            write_scan(path, (scan, reconstruction))
            rows.append(data.Row(
                path.name.removesuffix(".nii.gz"), path, "valid", f"p{scan % 8}", f"s{scan}",
                f"There is finding {scan}.", labels=labels,
            ))
    data.write_manifest(rows, folder / "manifest.csv")
    return make_run(folder / "run"), folder / "manifest.csv"


def program(*arguments, file="evaluate.py"):
    command = [sys.executable, file, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def command(*arguments):
    """evaluate.py in this process, which spares the imports."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(sys, "argv", ["evaluate.py", *map(str, arguments)]),
    ):
        status = data.run_command(evaluate.main)
    return subprocess.CompletedProcess(arguments, status or 0, out.getvalue(), err.getvalue())


class Page(HTMLParser):
    """Checks that every element is closed and collects what would be fetched."""
    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open += [tag] if tag not in self.VOID else []
        self.fetched += [value for key, value in attributes if key in ("src", "href", "srcset")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return make_bench(tmp_path_factory.mktemp("bench"))


# ---- scores

def test_the_command_writes_scores_and_metrics_that_agree_with_its_table(bench, tmp_path):
    run, manifest = bench
    done = program(run, "--manifest", manifest, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "metrics.json").read_text())
    scores = evaluate.read_scores(tmp_path / "scores.csv")
    array, labels, classes = evaluate.join(scores, data.read_manifest(manifest))
    assert classes == CLASSES and array.shape == (24, 3)
    by_class, macro = result["volume"]["classes"], result["volume"]["macro"]
    for name, expected in zip(CLASSES, metrics.auroc(array, labels)):
        assert by_class[name]["auroc"] == pytest.approx(expected)
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert f"{100 * expected:.1f}" in line
    assert macro["CT-RATE"]["classes"] == 2 and macro["CT-RATE-LT"]["of"] == 1
    assert (result["volumes"], result["scans"], result["patients"]) == (24, 12, 8)
    scan = result["scan"]["classes"]["Lung nodule"]
    assert scan["positives"] == by_class["Lung nodule"]["positives"] / 2


def test_scores_are_the_mean_of_the_two_cosines_of_the_paper(bench):
    run, manifest = bench
    model = BrgSA.from_pretrained(run)
    cache = data.Cache.for_config(manifest.parent / "cache", model.config)
    rows, _ = data.prepare(data.read_manifest(manifest)[:3], cache)
    v = evaluate.embed_volumes(model, rows, cache)
    scores = evaluate.score(model, v, evaluate.make_prompts(CLASSES))
    cos = torch.cosine_similarity
    with torch.no_grad():
        for i, row in enumerate(rows):
            one = model.encode_image(torch.from_numpy(np.array(cache.read(row)))[None, None])
            for c, name in enumerate(CLASSES):
                t = model.encode_text([f"There is {name}"])
                expected = (cos(one, t) + cos(model.bridge(one), t)) / 2
                assert scores[i, c] == pytest.approx(expected.item(), abs=1e-5)


def test_embeddings_are_computed_once_and_again_when_the_weights_change(
    bench, tmp_path, monkeypatch
):
    _, manifest = bench
    run = make_run(tmp_path / "run")
    calls = []
    inner = evaluate.embed_volumes

    def counted(model, rows, *rest):
        calls.append(len(rows))
        return inner(model, rows, *rest)

    monkeypatch.setattr(evaluate, "embed_volumes", counted)
    first = evaluate.evaluate(run, manifest)
    second = evaluate.evaluate(run, manifest, prompts=["Lung nodule", "Empyema"])
    assert calls == [24] and first["prompts_sha256"] != second["prompts_sha256"]
    model = BrgSA.from_pretrained(run)
    model.vision_projection.bias.data += 1
    model.save_pretrained(run)
    evaluate.evaluate(run, manifest)
    assert calls == [24, 24]


def test_the_order_of_texts_has_no_influence_on_their_embeddings(bench):
    model = BrgSA.from_pretrained(bench[0])
    texts = [f"finding {i} {'x ' * (i % 7)}" for i in range(150)]
    torch.testing.assert_close(
        evaluate.embed_texts(model, texts[::-1]).flip(0), evaluate.embed_texts(model, texts),
        atol=0, rtol=0,
    )


def test_joining_is_by_name_whatever_the_order_and_names_the_first_ten_without_a_partner(bench):
    rows = data.read_manifest(bench[1])
    scores = {}
    for i, row in enumerate(rows):
        scores[row.name] = {name: i + c / 10 for c, name in enumerate(CLASSES)}
    backwards = dict(reversed(scores.items()))
    for one, two in zip(evaluate.join(scores, rows), evaluate.join(backwards, rows)):
        np.testing.assert_array_equal(one, two)
    why = r"12 volumes are not in the scores: valid_0_0, .*, \.\.\."
    with pytest.raises(ValueError, match=why):
        evaluate.join({row.name: scores[row.name] for row in rows[1::2]}, rows)
    stranger = {"stranger": scores[rows[0].name]}
    why = "1 volumes are in the scores but not in the manifest: stranger"
    with pytest.raises(ValueError, match=why):
        evaluate.join(scores | stranger, rows)


def test_a_score_file_comes_back_to_the_last_bit_and_a_bad_one_is_refused(tmp_path):
    scores = np.random.default_rng(0).normal(size=(3, 2))
    evaluate.write_scores(tmp_path / "scores.csv", ["a", "b", "c"], ["x", "y, z"], scores)
    read = evaluate.read_scores(tmp_path / "scores.csv")
    assert read["b"] == {"x": scores[1, 0], "y, z": scores[1, 1]}
    bad = {
        "name,x\na,1\na,2\n": "row 3: 'a' stands twice",
        "name,x\na,nan\n": "row 2: 'a' has a score",
        "name,x\na,\n": "row 2",
        "x\n1\n": "name",
        "name,x\n": "no scores",
    }
    for content, why in bad.items():
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(ValueError, match=why):
            evaluate.read_scores(tmp_path / "bad.csv")


def test_prompts_from_files_are_ensembled_and_negatives_subtracted(bench, tmp_path):
    model = BrgSA.from_pretrained(bench[0])
    v = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))

    def scores_of(classes, given=None, negative=False):
        prompts = evaluate.make_prompts(classes, given, negative)
        return evaluate.score(model, v, prompts)

    def file(name, content):
        (tmp_path / name).write_text(json.dumps(content))
        return [str(tmp_path / name)]

    texts = ["There is lung nodule", "A round opacity"]
    both = file("prompts.json", {"Lung nodule": texts, "Empyema": "Pus in the pleura"})
    assert list(evaluate.make_prompts(None, both)) == ["Lung nodule", "Empyema"]
    ensemble = evaluate.make_prompts(["Lung nodule", "Pneumothorax"], both)
    assert list(ensemble) == ["Lung nodule", "Pneumothorax"]
    assert ensemble["Pneumothorax"]["positive"] == ["There is Pneumothorax"]
    scores = evaluate.score(model, v, ensemble)
    single = [scores_of(None, file("one.json", {"x": text}))[:, 0] for text in texts]
    np.testing.assert_allclose(scores[:, 0], np.mean(single, axis=0), atol=1e-6)

    against = scores_of(["Lung nodule"], negative=True)
    negative = scores_of(None, file("no.json", {"x": "There is no Lung nodule"}))
    np.testing.assert_allclose(against, scores_of(["Lung nodule"]) - negative, atol=1e-6)


def test_rad_chestcts_calcification_is_the_larger_of_the_two_scores(bench):
    model = BrgSA.from_pretrained(bench[0])
    v = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    one = evaluate.score(model, v, evaluate.make_prompts(["Calcification"]))[:, 0]
    parts = ["Arterial wall calcification", "Coronary artery wall calcification"]
    both = evaluate.score(model, v, evaluate.make_prompts(parts))
    np.testing.assert_allclose(one, both.max(1), atol=1e-6)


SUMMARIES = [
    "There is no abnormality.", "There is lung nodule. There is mass.", "There is mass.",
    "There is Lung nodule."]


@pytest.mark.parametrize("pairs", [["v-t", "v_hat-t"], ["v_hat-t_hat"]])
def test_each_way_to_read_out_is_what_it_says(bench, pairs):
    model = BrgSA.from_pretrained(bench[0])
    v = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), dim=-1)

    def u(*texts):
        t = evaluate.embed_texts(model, texts)
        return F.normalize(evaluate.bridge(model, t) if "v_hat-t_hat" in pairs else t, dim=-1)

    nodule, half = u("There is Lung nodule"), u("There is no abnormality") / 2
    added = u(*(f"{text} There is Lung nodule." for text in SUMMARIES)) - u(*SUMMARIES)
    known = u(*SUMMARIES[1::2]).mean(0) - u(*SUMMARIES[::2]).mean(0)
    expected = {
        "plain": nodule, "contrast": nodule - half,
        "context": F.normalize(added.mean(0), dim=-1) - half,
        "prototype": F.normalize(known, dim=-1) - half}
    prompts = evaluate.make_prompts(["Lung nodule"])
    for way, t in expected.items():
        v_hat = F.normalize(evaluate.bridge(model, v), dim=-1)
        images = [v_hat if pair.startswith("v_hat") else v for pair in pairs]
        t = F.normalize(t.reshape(-1), dim=0)
        cosines = sum(image @ t for image in images) / len(pairs)
        scores = evaluate.score(model, v, prompts, pairs, None, way, SUMMARIES)
        np.testing.assert_allclose(scores[:, 0], cosines, atol=1e-5)
    # a name that no summary holds is read in context
    new = evaluate.make_prompts(["Empyema"])
    ways = [evaluate.score(model, v, new, pairs, None, way, SUMMARIES)
            for way in ("prototype", "context")]
    np.testing.assert_array_equal(*ways)


def test_all_ways_stand_side_by_side_and_summaries_are_needed_for_two(bench, tmp_path):
    manifest, run = bench[1], make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="run: has no training summaries for --prompts-as context"):
        evaluate.evaluate(run, manifest, prompts_as="context")
    result = evaluate.evaluate(run, manifest)
    assert list(result["readouts"]) == ["plain", "contrast"]
    model = BrgSA.from_pretrained(run)
    v = torch.zeros(1, 16)
    tensors = {"v": v, "v_hat": v.clone(), "t_first": torch.randn(3, 16)}
    texts = {"summaries": SUMMARIES, "classes": CLASSES}
    texts = {name: json.dumps(value) for name, value in texts.items()}
    save_file(tensors, run / "reference.safetensors", texts)
    for way in evaluate.READOUTS:
        result = evaluate.evaluate(run, manifest, prompts_as=way)
        for name, value in result["readouts"][way].items():
            assert value == pytest.approx(result["volume"]["macro"][name]["auroc"])
    t = F.normalize(evaluate.embed_texts(model, [f"There is {name}" for name in CLASSES]), dim=-1)
    cosines = (t @ t.T)[~torch.eye(len(CLASSES)).bool()]
    assert result["prompt_cosines"]["after"] == pytest.approx(cosines.mean().item(), abs=1e-6)
    page = (run / "evaluation/report.html").read_text()
    assert "prompts as prototype" in page and "Are the prompts told apart?" in page

    # by default as the run has chosen, as the authors do, or without what it needs
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompts_as": "prototype"}))
    assert evaluate.evaluate(run, manifest)["prompts_as"] == "prototype"
    assert evaluate.evaluate(run, manifest, protocol="authors")["prompts_as"] == "plain"
    save_file(tensors, run / "reference.safetensors")
    assert evaluate.evaluate(run, manifest)["prompts_as"] == "contrast"
    save_file(tensors, run / "reference.safetensors", {"summaries": "{1"})
    with pytest.raises(ValueError, match="reference.safetensors: its metadata is damaged"):
        evaluate.evaluate(run, manifest)


def test_the_pairs_to_choose_from_are_the_models():
    (item,) = [item for item in evaluate.fields(evaluate.Options) if item.name == "pairs"]
    assert item.metadata["choices"] == model_file.PAIRS and item.default == model_file.PAIRS[:2]


def test_each_pair_can_be_selected(bench):
    model = BrgSA.from_pretrained(bench[0])
    v = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    prompts = evaluate.make_prompts(CLASSES)
    each = [evaluate.score(model, v, prompts, [pair]) for pair in model_file.PAIRS]
    together = evaluate.score(model, v, prompts, model_file.PAIRS)
    np.testing.assert_allclose(together, np.mean(each, axis=0), atol=1e-6)
    assert len({scores.tobytes() for scores in each}) == 4


# ---- one scan

def test_one_scan_is_ranked_with_its_place_among_the_training_scans(bench, tmp_path):
    run, manifest = make_run(tmp_path / "run", trained_on="phantom"), bench[1]
    scan = manifest.parent / "valid_3_1.nii.gz"
    without = command(run, "--volume", scan, "--prompts", "pleural effusion", "lung nodule")
    assert without.returncode == 0 and "no percentile" in without.stdout
    assert "knows nothing about patients" in without.stdout
    v = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    model = BrgSA.from_pretrained(run)
    save_file({"v": v, "v_hat": evaluate.bridge(model, v)}, run / "reference.safetensors")
    done = json.loads(command(run, "--volume", scan, "--json").stdout)
    assert len(done["findings"]) == 33 and done["reference_scans"] == 40
    assert "knows nothing about patients" in done["warning"]
    places = [finding["percentile"] for finding in done["findings"]]
    assert places == sorted(places, reverse=True) and 0 <= places[-1] and places[0] <= 100
    finding = done["findings"][0]
    others = evaluate.score(model, v, evaluate.make_prompts([finding["abnormality"]]))
    assert finding["percentile"] == pytest.approx(100 * (others < finding["score"]).mean())


@pytest.mark.parametrize("vision", ["vit", "resnet18"])
def test_one_scans_page_and_maps_are_written_for_the_named_prompts(tmp_path, vision):
    run, affine = make_run(tmp_path / "run", vision=vision), np.diag([8.0, 8.0, 8.0, 1.0])
    write_scan(tmp_path / "scan.nii.gz", 0, affine)
    out = tmp_path / "out"
    done = command(
        run, "--volume", tmp_path / "scan.nii.gz", "--prompts", "lung nodule", "--heatmap",
        "--out", out, "--json",
    )
    assert done.returncode == 0, done.stderr
    (finding,) = json.loads(done.stdout)["findings"]
    image = nibabel.load(finding["heatmap"])
    assert image.shape == (30, 28, 24) and (image.affine == affine).all()
    files = sorted(path.name for path in out.iterdir())
    assert files == ["lung_nodule.nii.gz", "lung_nodule.png", "report.html"]
    assert len(Page((out / "report.html").read_text()).fetched) == 1


# ---- what is evaluated, and what is refused

def test_scans_whose_names_differ_after_a_dot_have_folders_of_their_own(tmp_path):
    run = make_run(tmp_path / "run", vision="resnet18")
    for number in (3, 4):
        write_scan(tmp_path / f"1.2.{number}.nii.gz", number)
        done = command(run, "--volume", tmp_path / f"1.2.{number}.nii.gz", "--heatmap")
        assert done.returncode == 0, done.stderr
        assert (run / "evaluation" / f"1.2.{number}" / "report.html").exists()


def test_a_benchmark_says_which_classes_are_scored_and_one_without_labels_is_shown_as_such(
    bench, tmp_path
):
    result = evaluate.evaluate(*bench, out=tmp_path, benchmark="ct-rate-lt")
    assert list(result["volume"]["classes"]) == data.CT_RATE_LT
    macro = result["volume"]["macro"]["CT-RATE-LT"]
    assert macro["classes"] == 1 and macro["of"] == 15
    lines = report.table(result).splitlines()
    line = next(line for line in lines if line.startswith("Empyema"))
    assert line.split()[1:3] == ["0", "-"]


def test_a_bad_volume_is_skipped_and_listed_and_never_replaced(bench, tmp_path):
    run, manifest = bench
    rows = data.read_manifest(manifest)
    (tmp_path / "broken.nii.gz").write_text("no image")
    settings = vars(rows[0]) | {"name": "broken", "path": tmp_path / "broken.nii.gz"}
    data.write_manifest([*rows, data.Row(**settings)], tmp_path / "manifest.csv")
    result = evaluate.evaluate(run, tmp_path / "manifest.csv", out=tmp_path / "out")
    assert result["volumes"] == 24 and [name for name, _ in result["skipped"]] == ["broken"]
    assert "broken" not in evaluate.read_scores(tmp_path / "out" / "scores.csv")


@pytest.mark.parametrize("arguments, why", [
    (["--volume", "absent.nii.gz"], "no such file"),
    (["--manifest", "absent.csv"], "no such file"),
    (["--manifest", "M", "--split", "nowhere"], "nowhere"),
    (["--manifest", "M", "--prompts", "bad.json"], "bad.json"),
    (["--manifest", "M", "--prompts", "?!"], "asks nothing"),
    (["--manifest", "M", "--prompts", "word.json"], "'Nodule' the model reads no word"),
    (["--manifest", "M", "--device", "foo"], "no device 'foo'"),
    (["--manifest", "M", "--prompts", "absent.txt"], "absent.txt"),
])
def test_bad_input_gets_one_line_and_exit_status_2(bench, tmp_path, arguments, why):
    (tmp_path / "bad.json").write_text('{"a": {"positve": []}}')
    (tmp_path / "word.json").write_text('{"a": "Nodule"}')
    typed = []
    for argument in arguments:
        is_file = argument.endswith((".json", ".txt", ".gz", ".csv"))
        typed.append(tmp_path / argument if is_file else argument)
    done = command(bench[0], *[bench[1] if argument == "M" else argument for argument in typed])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and why in done.stderr
    assert done.stderr.startswith("evaluate.py: error: ") and not done.stdout


def test_a_run_without_weights_gets_one_line_and_exit_status_2(tmp_path):
    done = program(tmp_path, "--volume", "scan.nii.gz")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "config.json" in done.stderr


def test_a_damaged_file_of_embeddings_or_training_scans_is_named(bench, tmp_path):
    run, scan = make_run(tmp_path / "run"), bench[1].parent / "valid_0_0.nii.gz"
    (run / "reference.safetensors").write_text("damaged")
    done = command(run, "--volume", scan)
    assert done.returncode == 2 and "reference.safetensors: damaged" in done.stderr
    for tensors in ({"a": torch.ones(3)}, {"v": torch.ones(3, 16), "v_hat": torch.ones(3, 5)}):
        save_file(tensors, run / "reference.safetensors")
        done = command(run, "--volume", scan)
        assert done.returncode == 2 and "safetensors: is not this model's" in done.stderr
    (run / "embeddings.safetensors").write_text("damaged")
    done = command(run, "--manifest", bench[1], "--out", tmp_path / "out")
    assert done.returncode == 2 and "embeddings.safetensors: damaged" in done.stderr


def test_a_manifest_without_labels_or_reports_is_scored_all_the_same(bench, tmp_path):
    rows = [data.Row(row.name, row.path) for row in data.read_manifest(bench[1])[:3]]
    data.write_manifest(rows, tmp_path / "manifest.csv")
    done = command(bench[0], "--manifest", tmp_path / "manifest.csv", "--out", tmp_path / "out")
    assert done.returncode == 0 and "no labels" in done.stdout, done.stderr
    scores = evaluate.read_scores(tmp_path / "out" / "scores.csv")
    assert len(scores[rows[0].name]) == 33
    Page((tmp_path / "out" / "report.html").read_text())


# ---- scores of another model, thresholds of another split, a linear probe

def test_a_scores_file_of_any_model_is_evaluated_without_a_run_and_its_order_has_no_influence(
    bench, tmp_path
):
    result = evaluate.evaluate(*bench, out=tmp_path)
    expected = json.loads(evaluate.to_json(result))
    head, *lines = (tmp_path / "scores.csv").read_text().splitlines()
    (tmp_path / "turned.csv").write_text("\n".join([head, *reversed(lines)]) + "\n")
    arguments = "--manifest", bench[1], "--out", tmp_path / "again", "--json"
    done = command("--scores", tmp_path / "turned.csv", *arguments)
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert again["volume"] == expected["volume"] and again["scan"] == expected["scan"]
    (tmp_path / "short.csv").write_text("\n".join([head, *lines[:-1]]) + "\n")
    done = command("--scores", tmp_path / "short.csv", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert lines[-1].split(",")[0] in done.stderr


def with_splits(manifest, path, split_of):
    """Copy a manifest, each row with the split that split_of(row) says; -> the rows."""
    rows = data.read_manifest(manifest)
    rows = [data.Row(**vars(row) | {"split": split_of(row)}) for row in rows]
    data.write_manifest(rows, path)
    return rows


def test_thresholds_come_from_another_split_only_if_its_patients_are_others(bench, tmp_path):
    run, manifest = bench[0], tmp_path / "manifest.csv"
    rows = with_splits(bench[1], manifest, lambda row: "valid" if row.patient < "p4" else "tune")
    tuned = tmp_path / "tune" / "scores.csv"
    evaluate.evaluate(run, manifest, "tune", tuned.parent)
    result = evaluate.evaluate(run, manifest, "valid", tmp_path / "valid", threshold=tuned)

    def joined(split):
        scores = evaluate.read_scores(tmp_path / split / "scores.csv")
        return evaluate.join(scores, [row for row in rows if row.split == split])

    thresholds = metrics.best_thresholds(*joined("tune")[:2])
    scores, labels, classes = joined("valid")
    expected = metrics.per_class(scores, labels, thresholds)["f1"]
    for c, name in enumerate(classes):
        assert result["volume"]["classes"][name]["f1"] == pytest.approx(expected[c])
    with pytest.raises(ValueError, match="other patients"):
        own = tmp_path / "valid" / "scores.csv"
        evaluate.evaluate(run, manifest, "valid", tmp_path / "x", threshold=own)


def test_the_authors_protocol_is_theirs(bench, tmp_path):
    done = command(bench[0], "--manifest", bench[1], "--protocol", "authors", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["threshold"] == "authors" and "as the authors choose them" in (
        tmp_path / "report.html").read_text()
    rows = data.read_manifest(bench[1])
    scores, labels, _ = evaluate.join(evaluate.read_scores(tmp_path / "scores.csv"), rows)
    thresholds = metrics.nearest_thresholds(scores, labels)
    samples = metrics.bootstrap(scores, labels, np.arange(len(rows)), thresholds, n=5000)
    ends = metrics.interval(samples["auroc"])  # (2, C)
    macro, classes = result["volume"]["macro"]["CT-RATE"], result["volume"]["classes"]
    assert classes["Lung nodule"]["auroc_95"] == pytest.approx(ends[:, 0])
    assert macro["auroc_95"] == pytest.approx(ends[:, :2].mean(1))  # the third is of CT-RATE-LT
    f1 = metrics.per_class(scores, labels, thresholds)["f1_weighted"]
    assert macro["f1_weighted"] == pytest.approx(f1[:2].mean())
    ranked = (scores - scores.mean(0)) / scores.std(0)
    recall, _ = metrics.top_k(ranked, labels, 1)
    _, precision = metrics.top_k(ranked, labels, 3)
    assert result["volume"]["top_k"]["recall@1"] == pytest.approx(recall)
    assert result["volume"]["top_k"]["precision@3"] == pytest.approx(precision)


def test_a_threshold_may_be_a_number(bench, tmp_path):
    rows = data.read_manifest(bench[1])
    names, labels = [row.name for row in rows], data.labels_matrix(rows, CLASSES)
    evaluate.write_scores(tmp_path / "scores.csv", names, CLASSES, 0.1 + 0.2 * labels)
    command = {"run": None, "manifest": bench[1], "scores": tmp_path / "scores.csv"}
    f1 = {}
    for threshold in ("0.2", "0.05"):
        result = evaluate.evaluate(**command, threshold=threshold)
        f1[threshold] = result["volume"]["macro"]["CT-RATE"]["f1"]
    assert f1["0.2"] == 1 > f1["0.05"]
    with pytest.raises(ValueError, match="--threshold is nan"):
        evaluate.evaluate(**command, threshold="nan")


def test_a_model_beside_itself_differs_by_nothing_and_beside_a_better_one_by_what_it_lacks(
    bench, tmp_path
):
    evaluate.evaluate(*bench, out=tmp_path)
    same = evaluate.evaluate(*bench, out=tmp_path, compare=tmp_path / "scores.csv")["compare"]
    assert same["macro_difference"] == 0 and same["macro_difference_95"] == [0, 0]
    assert {values["p"] for values in same["classes"].values()} == {1.0}
    rows = data.read_manifest(bench[1])
    names, labels = [row.name for row in rows], data.labels_matrix(rows, CLASSES)
    evaluate.write_scores(tmp_path / "perfect.csv", names, CLASSES, labels)
    better = evaluate.evaluate(*bench, out=tmp_path, compare=tmp_path / "perfect.csv")["compare"]
    assert better["macro_difference_95"][1] < 0
    for values in better["classes"].values():
        assert values["other"] == 1 and 0 <= values["p"] < 0.1


def test_the_linear_probe_learns_what_is_linear_and_bears_unknown_labels():
    rng = np.random.default_rng(0)
    x, direction = rng.normal(size=(600, 16)), rng.normal(size=(16, 3))
    labels = (x @ direction > 0.5).astype(float)
    known = np.where(rng.random(labels.shape) < 0.2, np.nan, labels)
    known[:, 2] = np.nan
    v_train, v, patients = torch.from_numpy(x[:400]), torch.from_numpy(x[400:]), np.arange(400) // 2
    scores = metrics.linear_probe(v_train, known[:400], patients, v)
    reached = metrics.auroc(scores, labels[400:])
    assert (reached[:2] > 0.97).all() and reached[2] == 0.5


def test_the_probe_stands_beside_the_zero_shot_and_never_trains_on_an_evaluated_patient(
    bench, tmp_path, monkeypatch
):
    manifest = tmp_path / "manifest.csv"
    rows = with_splits(bench[1], manifest, lambda row: "train" if row.patient < "p5" else "valid")
    again = next(row for row in rows if row.name == "valid_5_0")
    again = data.Row(**vars(again) | {"split": "train", "name": "again"})
    data.write_manifest([*rows, again], manifest)
    seen, inner = [], metrics.linear_probe

    def recorded(v, labels, patients, new):
        seen.extend(patients)
        return inner(v, labels, patients, new)

    monkeypatch.setattr(metrics, "linear_probe", recorded)
    result = evaluate.evaluate(bench[0], manifest, out=tmp_path / "out", probe=manifest)
    assert set(seen) == {"p0", "p1", "p2", "p3", "p4"}
    assert 0 <= result["volume"]["macro"]["CT-RATE"]["probe_auroc"] <= 1
    assert "linear probe" in (tmp_path / "out" / "report.html").read_text()


def test_embeddings_are_written_with_their_names(bench, tmp_path):
    path = tmp_path / "e.safetensors"
    done = command(bench[0], "--embed", "--manifest", bench[1], "--out", path)
    assert done.returncode == 0, done.stderr
    with safe_open(path, "pt") as file:
        names = [row.name for row in data.read_manifest(bench[1])]
        assert json.loads(file.metadata()["names"]) == names
        assert file.get_tensor("v").shape == file.get_tensor("v_hat").shape == (24, 16)


# ---- the data sets, end to end

def write_table(path, header, lines):
    path.parent.mkdir(exist_ok=True)
    data.write_csv(path, [header, *lines])


def make_manifest(dataset, root, split):
    out = root / "manifest.csv"
    done = program(
        "manifest", "--dataset", dataset, "--root", root, "--split", split, "--out", out,
        file="data.py",
    )
    assert done.returncode == 0, done.stderr
    return out


def test_a_synthetic_rad_chestct_runs_end_to_end(tmp_path):
    rng = np.random.default_rng(0)
    columns = [
        "calcification*heart", "nodulegr1cm*left_upper", "nodule*right_lung",
        "pacemaker_or_defib*heart", "coronary_artery_disease*heart",
    ]
    lines = []
    for i in range(12):
        name = f"trn{i:05d}"
        ct = rng.integers(-1000, 400, (30, 40, 40)).astype(np.int16)
        np.savez(tmp_path / f"{name}.npz", ct=ct)
        lines.append([name, *(rng.integers(2) for _ in columns)])
    file = "imgtest_Abnormality_and_Location_Labels.csv"
    write_table(tmp_path / file, ["NoteAcc_DEID", *columns], lines)
    manifest, out = make_manifest("rad-chestct", tmp_path, "test"), tmp_path / "out"
    run = make_run(tmp_path / "run", spacing=(1.0, 1.0, 1.0))
    result = evaluate.evaluate(run, manifest, out=out, benchmark="rad-chestct")
    by_class = result["volume"]["classes"]
    assert len(by_class) == 16 and by_class["Calcification"]["positives"] > 0
    assert result["volume"]["macro"]["all"]["of"] == 16
    everything = evaluate.evaluate(run, manifest, out=out)
    assert "Coronary artery disease" in everything["volume"]["classes"]
    Page((out / "report.html").read_text())

    # all three splits at once, as the authors evaluate
    for part, part_lines in (("train", lines[:5]), ("valid", lines[5:8]), ("test", lines[8:])):
        file = f"img{part}_Abnormality_and_Location_Labels.csv"
        write_table(tmp_path / file, ["NoteAcc_DEID", *columns], part_lines)
    manifest = make_manifest("rad-chestct", tmp_path, "all")
    result = evaluate.evaluate(
        run, manifest, "all", out=out, benchmark="rad-chestct", protocol="authors")
    assert (result["split"], result["volumes"]) == ("all", 12)
    assert evaluate.evaluate(run, manifest, out=out)["volumes"] == 4  # the test split


def test_a_synthetic_ct_rate_lt_runs_end_to_end(tmp_path):
    """Labels of the 18 and of the rare 15 in two files, one scan in the first alone."""
    rng, names = np.random.default_rng(0), []
    for i in range(16):
        names.append(f"valid_{i // 2}_a_{i % 2 + 1}")
        path = tmp_path / "valid_fixed" / names[i][:-4] / names[i][:-2] / f"{names[i]}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_scan(path, i)
    files = [f"{name}.nii.gz" for name in names]
    reports = [[file, f"Nodule {i // 2}.", "Not given."] for i, file in enumerate(files)]
    metadata = [[file, 1, 0, "[8.0, 8.0]", 8.0] for file in files]
    labels = [[file, *rng.integers(2, size=18)] for file in files]
    rare_labels = [[file, *rng.integers(2, size=15)] for file in files[:-2]]
    texts, tables = tmp_path / "radiology_text_reports", tmp_path / "multi_abnormality_labels"
    write_table(
        texts / "validation_reports.csv", ["VolumeName", "Findings_EN", "Impressions_EN"], reports)
    write_table(
        tmp_path / "metadata" / "validation_metadata.csv",
        ["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"], metadata)
    write_table(tables / "valid_predicted_labels.csv", ["VolumeName", *data.CT_RATE], labels)
    write_table(tables / "ct_rate_lt_labels.csv", ["VolumeName", *data.CT_RATE_LT], rare_labels)
    manifest, run = make_manifest("ct-rate", tmp_path, "valid"), make_run(tmp_path / "run")
    rows = data.read_manifest(manifest)

    for benchmark, known in (("ct-rate", 16), ("ct-rate-lt", 14)):
        classes, out = data.BENCHMARKS[benchmark], tmp_path / benchmark
        result = evaluate.evaluate(run, manifest, out=out, benchmark=benchmark)
        assert list(result["volume"]["classes"]) == classes
        assert result["volumes"] == 16 and result["scans"] == 8
        first = [row.labels.get(classes[0], math.nan) for row in rows]
        assert np.sum(~np.isnan(first)) == known
        positives = result["volume"]["classes"][classes[0]]["positives"]
        assert positives == np.nansum(first) > 0
        (macro,) = result["volume"]["macro"].values()
        assert macro["of"] == len(classes) and 0 < macro["auroc"] < 1
        Page((out / "report.html").read_text())
