"""Heat maps: equal to their published forms, in the scan's own voxels, and checked on lesions."""
import math

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_evaluate import TINY, make_run, write_scan

import data
import evaluate
import heatmap
import report
from model import BrgSA, Config

TEXTS = ["There is lung nodule"]


def tiny_model(**settings):
    torch.manual_seed(0)
    return BrgSA(Config(**TINY | settings)).eval()


def random_hu(shape=TINY["shape"]):
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)


def score(model, v):
    """The mean of cos(v, t) and cos(v_hat, t), by definition."""
    with torch.no_grad():
        t = F.normalize(model.encode_text(TEXTS), dim=-1)
    return (F.cosine_similarity(v, t) + F.cosine_similarity(model.bridge(v), t)).sum() / 2


def as_batch(hu):
    return torch.from_numpy(hu)[None, None]


# ---- the maps

def explicit_attention(layers):
    """Attention with its whole matrix, which is appended to layers together with its gradient."""
    def attend(q, k, v, attn_mask=None, dropout_p=0.0):
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        attention = torch.softmax(scores, dim=-1)
        if attention.requires_grad:
            attention.retain_grad()
            layers.append(attention)
        return attention @ v
    return attend


def test_rollout_equals_its_published_form_with_whole_attention_matrices(monkeypatch):
    model, hu = tiny_model(), random_hu()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # so that attention is not flat
    grid, layers = heatmap.heatmap(model, hu, TEXTS), []
    with torch.no_grad():
        t = F.normalize(model.encode_text(TEXTS), dim=-1)
    monkeypatch.setattr(F, "scaled_dot_product_attention", explicit_attention(layers))
    v = model.encode_image(as_batch(hu))
    cosines = F.cosine_similarity(v, t), F.cosine_similarity(model.bridge(v), t)
    (sum(cosines) / 2).sum().backward()
    rolled = torch.eye(layers[0].shape[-1])
    for attention in layers:
        rolled = rolled + (attention * attention.grad)[0].relu().mean(0) @ rolled
    assert grid.shape == (4, 4, 3) and grid.max() > 0
    np.testing.assert_allclose(grid.ravel(), rolled[0, 1:].detach(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("vision", ["vit", "resnet8", "resnet18"])
def test_no_hook_stays_whether_the_map_is_made_or_fails(vision, monkeypatch):
    model, hu = tiny_model(vision=vision), random_hu()
    heatmap.heatmap(model, hu, TEXTS)
    monkeypatch.setattr(heatmap, "zero_shot_scores", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        heatmap.heatmap(model, hu, TEXTS)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_gradcam_of_a_mean_pooled_network_is_its_features_weighted_by_their_gradient():
    model, hu = tiny_model(vision="resnet18"), random_hu((256, 256, 240))
    grid = heatmap.heatmap(model, hu, TEXTS)
    assert grid.shape == (8, 8, 8)
    with torch.no_grad():
        features = model.vision(model.normalise(as_batch(hu)))[1][0]  # (gx, gy, gz, C)
    mean = features.mean((0, 1, 2)).requires_grad_()
    score(model, model.vision_projection(mean[None])).backward()
    expected = (features @ mean.grad).relu() / features[..., 0].numel()
    np.testing.assert_allclose(grid, expected, atol=1e-7)


def test_where_the_last_stage_is_too_coarse_an_earlier_ones_features_meet_their_own_gradient():
    model, hu = tiny_model(vision="resnet18"), random_hu()
    for block in model.vision.blocks:  # each starts as its shortcut; here they shall matter
        torch.nn.init.normal_(block.residual[-1].weight)
    with torch.no_grad():
        features = model.vision.stem(model.normalise(as_batch(hu)))
        features = model.vision.blocks[:2](features)
    features.requires_grad_()
    pooled = model.vision.blocks[2:](features).mean((2, 3, 4))
    score(model, model.vision_projection(pooled)).backward()
    grid = heatmap.heatmap(model, hu, TEXTS)
    assert grid.shape == (8, 8, 6) and grid.max() > 0
    expected = (features * features.grad)[0].sum(0).relu().detach()
    np.testing.assert_allclose(grid, expected, rtol=1e-3, atol=1e-7)


def test_the_small_resnets_map_has_cells_of_four_voxels():
    model, hu = tiny_model(vision="resnet8"), random_hu()
    grid = heatmap.heatmap(model, hu, TEXTS)
    assert grid.shape == (8, 8, 6) and grid.max() > 0
    with heatmap.record(model.vision.blocks[:1]) as stages:
        v = model.encode_image(as_batch(hu))
        stages[0].retain_grad()
    score(model, v).backward()
    expected = (stages[0] * stages[0].grad)[0].sum(0).relu().detach()
    np.testing.assert_allclose(grid, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("vision, wrong", [
    ("vit", "gradcam"), ("resnet8", "rollout"), ("resnet18", "rollout"),
])
def test_a_map_that_the_encoder_cannot_give_is_refused(vision, wrong):
    model, hu = tiny_model(vision=vision), np.zeros(TINY["shape"], np.int16)
    assert np.abs(heatmap.heatmap(model, hu, ["x"], "similarity")).max() <= 1.0001
    with pytest.raises(ValueError, match=wrong):
        heatmap.heatmap(model, hu, ["x"], wrong)


# ---- where they lie

def test_a_map_has_its_minimum_outside_the_patient():
    hu, config = np.full((32, 32, 24), -1000, np.int16), Config(**TINY)
    hu[8:24, 9:22, :16] = 0
    grid = np.random.default_rng(0).random((4, 4, 3)) + 1
    inside = heatmap.within_patient(grid, hu, config)
    least = inside.min()
    assert (inside[1:3, 1:3, :2] > least).sum() >= 7 and (inside[[0, 3]] == least).all()
    assert (inside[:, [0, 3]] == least).all() and (inside[:, :, 2] == least).all()
    empty = np.full_like(hu, -1000)  # nothing to go by
    np.testing.assert_array_equal(heatmap.within_patient(inside, empty, config), inside)


RAS = np.array([[0.9, 0, 0, -90], [0, 0.9, 0, -100], [0, 0, 2.5, -60], [0, 0, 0, 1.0]])
LPS = np.diag([-0.9, -0.9, 2.5, 1])


@pytest.mark.parametrize("affine", [RAS, LPS, RAS[[2, 0, 1, 3]]], ids=["RAS", "LPS", "permuted"])
def test_a_map_written_back_overlays_the_lesion_in_the_scans_own_voxels(tmp_path, affine):
    hu = np.full((220, 230, 70), -900, np.int16)
    hu[150:170, 60:80, 40:47] = 100
    scan, path = tmp_path / "scan.nii.gz", tmp_path / "heat.nii.gz"
    nibabel.save(nibabel.Nifti1Image(hu, affine), scan)
    volume = data.read_volume(scan)
    config = Config(spacing=(2, 2, 4), shape=(96, 80, 32), patch=(4, 4, 4))
    small = data.preprocess(
        volume.hu, volume.spacing, config.spacing, config.shape, config.hu_range)
    grid = small.reshape(24, 4, 20, 4, 8, 4).clip(-900).mean((1, 3, 5))
    heat = heatmap.to_scan(grid, volume, config)
    heatmap.write_heatmap(path, heat, volume, scan)
    written = nibabel.load(path)
    np.testing.assert_array_equal(written.affine, nibabel.load(scan).affine)
    values = written.get_fdata()
    assert values.shape == hu.shape and hu[np.unravel_index(values.argmax(), hu.shape)] == 100
    centre = np.argwhere(values > 0.5).mean(0)
    np.testing.assert_allclose(centre, [159.5, 69.5, 43], atol=1.5)
    assert values.min() >= 0 and values.max() == pytest.approx(1, abs=0.01)
    assert report.planes_png(heat, volume, "cube")[:4] == b"\x89PNG"


# ---- do they point?

def test_near_a_lesion_is_within_one_patch_along_each_axis(tmp_path):
    config = Config(**TINY | {"patch": (4, 2, 8)})
    bits = np.zeros(config.shape, np.int64)
    bits[10, 20, 12] = 1 << data.CT_RATE.index("Lung nodule")
    affine = np.diag([-8.0, -8.0, 8.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(bits, affine, dtype=np.int64), tmp_path / "mask.nii.gz")
    near = heatmap.near_lesion(tmp_path / "mask.nii.gz", "Lung nodule", config)
    expected = np.zeros(config.shape, bool)
    expected[6:15, 18:23, 4:21] = True
    np.testing.assert_array_equal(near, expected)
    assert not heatmap.near_lesion(tmp_path / "mask.nii.gz", "Lung mass", config).any()


def test_pointing_counts_maps_whose_maximum_lies_within_one_patch_of_the_lesion(
    tmp_path, monkeypatch
):
    run, manifest = make_run(tmp_path / "run", trained_on="phantom"), tmp_path / "manifest.csv"
    corners = [(6, 6, 6), (22, 6, 6), (6, 20, 16), (22, 20, 16)]
    (tmp_path / "masks").mkdir()
    rows = []
    for i, (x, y, z) in enumerate(corners):
        name = f"v{i}"
        write_scan(tmp_path / f"{name}.nii.gz", i)
        bits = np.zeros((30, 28, 24), np.int64)
        bits[x:x + 2, y:y + 2, z:z + 2] = 1 << data.CT_RATE.index("Lung nodule")
        bits[0, 0, 0] = 1 << data.CT_RATE.index("Consolidation")
        image = nibabel.Nifti1Image(bits, np.diag([-8.0, -8.0, 8.0, 1.0]), dtype=np.int64)
        nibabel.save(image, tmp_path / "masks" / f"{name}.nii.gz")
        labels = {"Lung nodule": 1.0, "Pleural effusion": float(i % 2)}
        path = tmp_path / f"{name}.nii.gz"
        rows.append(data.Row(name, path, "valid", f"p{i}", f"s{i}", labels=labels))
    data.write_manifest(rows, manifest)
    cache = data.Cache.for_config(tmp_path / "cache", BrgSA.from_pretrained(run).config)
    data.prepare(rows, cache)

    def oracle(model, hu, texts, pairs):
        """A map whose maximum is the cell of the volume's own lesion."""
        i = next(i for i, row in enumerate(rows) if (cache.read(row) == hu).all())
        grid, padding = np.zeros((4, 4, 3)), (1, 2, 0)  # 30 x 28 x 24 are padded to 32 x 32 x 24
        grid[tuple((corner + pad) // 8 for corner, pad in zip(corners[i], padding))] = 1
        return grid

    monkeypatch.setattr(heatmap, "heatmap", oracle)
    result = evaluate.evaluate(run, manifest, out=tmp_path / "out")["pointing"]["Lung nodule"]
    assert result["volumes"] == 4 and result["hit"] == 1 and result["elsewhere"] == 0
    assert 0.2 < result["chance"] < 0.7
    assert "Do heat maps point?" in (tmp_path / "out" / "report.html").read_text()
