"""Where a zero-shot score comes from: heat maps of a volume, brought to the scan's own space.

    similarity    cos(cell, prompt)
    rollout       the CLS token's row of the product over the layers of I + A, where     (ViT)
                  A = mean over heads of relu(attention * its gradient)
    gradcam       relu(sum over channels of feature * its gradient)                      (CNN)

Example:

    import data
    from heatmap import heatmap, to_scan, write_heatmap
    from model import BrgSA
    model = BrgSA.from_pretrained("runs/phantom")
    config = model.config
    volume = data.read_volume("scan.nii.gz")
    hu = data.preprocess(volume.hu, volume.spacing, config.spacing, config.shape, config.hu_range)
    grid = heatmap(model, hu, ["There is pleural effusion"])    # (gx, gy, gz)
    heat = to_scan(grid, volume, config)                        # (X, Y, Z), 0 to 1
    write_heatmap("heat.nii.gz", heat, volume, "scan.nii.gz")

    python evaluate.py runs/phantom --volume scan.nii.gz --heatmap
    python evaluate.py runs/phantom --volume scan.nii.gz --heatmap similarity
"""
import gzip
import math
from contextlib import ExitStack, contextmanager

import nibabel
import numpy as np
import torch
import torch.nn.functional as F

import data
from model import PAIRS, zero_shot_scores


@torch.no_grad()
def heatmap(model, hu, texts, method=None, pairs=PAIRS[:2]):
    """Where a preprocessed volume hu (X, Y, Z) supports the prompts `texts`: a map (gx, gy, gz).

    method: "similarity", "rollout" (the default of a ViT) or "gradcam" (the default of a CNN);
    ValueError for one that the encoder can't give. Outside the patient's bounding box there is no
    finding: cells there have the map's minimum.
    """
    vision = model.config.vision
    by_gradient = "rollout" if vision == "vit" else "gradcam"
    method = method or by_gradient
    if method not in ("similarity", by_gradient):
        raise ValueError(f"no '{method}' map for the vision encoder '{vision}'; "
                         f"similarity or {by_gradient} can be had")
    volume = torch.from_numpy(np.array(hu))[None, None].to(model.bank.weight.device)
    t = F.normalize(model.encode_text(texts), dim=-1).mean(0, keepdim=True)  # (1, d)

    if method == "similarity":
        grid = similarity(model, volume, t)
    elif method == "rollout":
        layers = [block.attn for block in model.vision.blocks]
        with (
            record([layer.qkv for layer in layers]) as qkvs,  # each (1, N, 3 C)
            record([layer.proj for layer in layers], inputs=True) as outputs,  # each (1, N, C)
        ):
            gradients = score_gradients(model, volume, t, pairs, outputs)
        layers = [(qkv[0], gradient[0]) for qkv, gradient in zip(qkvs, gradients)]
        row = rollout(layers, model.config.vit_heads)  # (1 + N,), the first is the CLS token's
        grid = row[1:].view([size // step for size, step in zip(hu.shape, model.config.patch)])
    else:
        with record(model.vision.blocks) as stages:  # each (1, C, gx, gy, gz)
            gradients = score_gradients(model, volume, t, pairs, stages)
        grid = gradcam(stages, gradients)
    return within_patient(grid.cpu().numpy(), hu, model.config)


@torch.enable_grad()
def score_gradients(model, volume, t, pairs, recorded):
    """Embed a volume and score it; the score's gradient by each of the tensors recorded then."""
    v = model.encode_image(volume)
    score = zero_shot_scores(v, model.bridge(v), t, model.bridge(t), pairs)  # (1, 1)
    return torch.autograd.grad(score.sum(), recorded)


@contextmanager
def record(modules, inputs=False):
    """A list that fills with each module's output, or its input; hooks go when the block ends."""
    tensors = []

    def hook(module, arguments, output):
        tensors.append(arguments[0] if inputs else output)

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(hook))
        yield tensors


# ---- the three maps

def similarity(model, volume, t):
    """Cosine of each cell's projected feature with the prompt t (1, d): (gx, gy, gz)."""
    _, features = model.vision(model.normalise(volume))  # (1, gx, gy, gz, C)
    features = F.normalize(model.vision_projection(features), dim=-1)  # (1, gx, gy, gz, d)
    return (features @ F.normalize(t, dim=-1)[0])[0]


def rollout(layers, heads):
    """Attention rolled out over the layers, weighted by gradients (Chefer et al. 2021): (N,).

    layers: of each, first to last, qkv (N, 3 C) and the gradient of the attention's output (N, C).
    Of the product of all I + A only the CLS token's row is wanted, so this row goes through the
    layers from the last to the first, and at most 256 rows of any attention are in memory.
    """
    tokens = len(layers[0][0])
    row = F.one_hot(torch.tensor(0), tokens).to(layers[0][0])
    for qkv, gradient in reversed(layers):
        q, k, v = qkv.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)  # each (heads, N, C / heads)
        gradient = gradient.unflatten(1, (heads, -1)).transpose(0, 1)  # (heads, N, C / heads)
        step = torch.zeros_like(row)
        for part in row.nonzero()[:, 0].split(256):
            attention = torch.softmax(q[:, part] @ k.mT / q.shape[-1] ** 0.5, dim=-1)
            its_gradient = gradient[:, part] @ v.mT  # (heads, rows, N), as attention
            step += row[part] @ (attention * its_gradient).relu().mean(0)
        row = row + step
    return row


def gradcam(stages, gradients):
    """Positive part of features times their gradient (HiResCAM, Draelos and Carin 2020).

    At the last stage it is Grad-CAM (Selvaraju et al. 2017). It is taken of the deepest stage that
    still has eight cells along each axis, else of the first.
    """
    for features, gradient in zip(stages, gradients):
        if min(features.shape[2:]) >= 8 or features.shape == stages[0].shape:
            grid = (features * gradient)[0].sum(0).relu()
    return grid


# ---- where the cells of a map lie

def patient_box(hu):
    """Three slices: the bounding box of what is denser than -300 HU; the whole where nothing is."""
    dense = np.asarray(hu) > -300
    dense |= not dense.any()
    box = []
    for axis in range(3):
        others = tuple({0, 1, 2} - {axis})
        lines = np.flatnonzero(dense.any(others))
        box.append(slice(lines[0], lines[-1] + 1))
    return tuple(box)


def within_patient(grid, hu, config):
    """A map (gx, gy, gz) with its minimum in the cells that lie outside the patient's box."""
    inside, where = [], cells(grid, hu.shape, config)
    for n, box, stride, offset in zip(grid.shape, patient_box(hu), *where):
        centre, reach = np.arange(n) * stride + offset, stride / 2
        inside.append((centre >= box.start - reach) & (centre <= box.stop - 1 + reach))
    inside = np.ix_(*inside)
    out = np.full_like(grid, grid.min())
    out[inside] = grid[inside]
    return out


def cells(grid, shape, config):
    """Voxels of a volume of this shape from cell centre to cell centre, and the first centre."""
    if config.vision == "vit":
        patch = np.array(config.patch)
        return patch, (patch - 1) / 2
    halved = np.ceil(np.log2(np.divide(shape, grid.shape)))
    return 2 ** halved, np.zeros(3)  # strided, padded convolutions start at voxel 0


def to_scan(grid, volume, config):
    """A map (gx, gy, gz) brought linearly to the voxels of its Volume: (X, Y, Z), 0 to 1.

    Inverse of data.preprocess; voxels that it cropped away get 0.
    """
    weights = []
    axes = zip(volume.hu.shape, volume.spacing, config.spacing, config.shape, grid.shape,
               *cells(grid, config.shape, config))
    for size, spacing, spacing_out, shape, n, stride, offset in axes:
        resampled = max(1, round(size * spacing / spacing_out))
        cropped = int((resampled - shape) / 2)  # at the lower end; below 0 where it was padded
        # where each voxel of the scan lies: in voxels of the preprocessed volume, then in cells
        voxel = np.arange(size) * spacing / spacing_out - cropped
        cell = np.clip((voxel - offset) / stride, 0, n - 1)
        weight = np.maximum(0, 1 - np.abs(cell[:, None] - np.arange(n)))  # (size, n)
        weight[(voxel <= -0.5) | (voxel >= shape - 0.5)] = 0
        weights.append(weight.astype(np.float32))
    grid = (grid - grid.min()).astype(np.float32)
    heat = np.einsum("xi,yj,zk,ijk->xyz", *weights, grid, optimize=True)
    return heat / (heat.max() or 1)  # scaled here: the map's maximum may lie in the padding


def write_heatmap(path, heat, volume, source):
    """Write a map (X, Y, Z) of a Volume as .nii.gz, with the affine and axes of its source file."""
    affine = volume.affine
    if not str(source).endswith(".npz"):
        affine = nibabel.load(source).affine
        lps, own = nibabel.orientations.axcodes2ornt("LPS"), nibabel.io_orientation(affine)
        turn = nibabel.orientations.ornt_transform(lps, own)
        heat = nibabel.orientations.apply_orientation(heat, turn)
    image = nibabel.Nifti1Image(np.round(255 * heat).astype(np.uint8), affine)
    image.header.set_slope_inter(1 / 255, 0)
    data.write_atomically(path, gzip.compress(image.to_bytes(), 3))


# ---- do heat maps point? The phantom's lesions are known

LESIONS = ("Lung nodule", "Lung mass", "Pleural effusion", "Consolidation")


def pointing(model, cache, rows, masks, prompts, pairs):
    """Of at most 25 rows with a lesion: {lesion: {"volumes", "hit", "chance", "elsewhere"}}.

    "hit" is the share whose map has its maximum within one patch of the lesion, "chance" the mean
    share of the patient's box that lies within one patch of it, "elsewhere" the share of hits by
    the map of another volume with such a lesion. masks: folder with NAME.nii.gz, where bit k marks
    the k-th of the 33 abnormalities; prompts: as evaluate.make_prompts gives them.
    """
    result = {}
    rows = [row for row in rows if (masks / f"{row.name}.nii.gz").exists()]
    for name in LESIONS:
        nears, peaks, chances = [], [], []
        affected = [row for row in rows if row.labels.get(name) == 1 and name in prompts]
        for row in affected[:25]:
            hu = cache.read(row)
            grid = heatmap(model, hu, prompts[name]["positive"], pairs=pairs)
            peaks.append(peak_voxel(grid, hu, model.config))
            nears.append(near_lesion(masks / f"{row.name}.nii.gz", name, model.config))
            chances.append(nears[-1][patient_box(hu)].mean())
        if affected:
            hits = [near[peak] for near, peak in zip(nears, peaks)]
            elsewhere = [near[peak] for near, peak in zip(nears[1:], peaks)]
            result[name] = {
                "volumes": len(hits),
                "hit": float(np.mean(hits)),
                "chance": float(np.mean(chances)),
                "elsewhere": float(np.mean(elsewhere or math.nan)),
            }
    return result


def near_lesion(path, name, config):
    """Voxels of the preprocessed volume within a patch of the mask's lesion `name`: (X, Y, Z)."""
    mask = data.read_volume(path)
    bit = (data.CT_RATE + data.CT_RATE_LT).index(name)
    lesion = 1000 * (mask.hu.astype(np.int64) >> bit & 1).astype(np.int16)
    lesion = data.preprocess(lesion, mask.spacing, config.spacing, config.shape, (0, 1000))
    near = torch.from_numpy(lesion).float()
    for reach in reversed(config.patch):  # maximum over z, then y, then x, each put first
        near = F.max_pool1d(near, 2 * reach + 1, 1, reach).permute(2, 0, 1)
    return near.numpy() > 100


def peak_voxel(grid, hu, config):
    """Voxel (x, y, z) of hu (X, Y, Z) at the centre of the map's largest cell."""
    stride, offset = cells(grid, hu.shape, config)
    cell = np.unravel_index(grid.argmax(), grid.shape) * stride + offset
    return tuple(np.minimum(cell, np.array(hu.shape) - 1).astype(int))
