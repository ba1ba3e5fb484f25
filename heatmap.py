"""Where a zero-shot score comes from: heat maps, brought to the scan's own space.

    ViT: attention times its gradient of the score, rolled out over layers (Chefer et al. 2021)
    CNN: features times their gradient of the score (HiResCAM, Draelos and Carin 2020)

    volume, model = data.read_volume("scan.nii.gz"), BrgSA.from_pretrained("runs/phantom")
    config = model.config
    hu = data.preprocess(volume.hu, volume.spacing, config.spacing, config.shape, config.hu_range)
    grid = heatmap(model, hu, ["There is pleural effusion"])            # (gx, gy, gz)
    write_heatmap("where.nii.gz", to_scan(grid, volume, config), volume, "scan.nii.gz")
"""
import contextlib
import gzip
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import torch
import torch.nn.functional as F

import data
from model import PAIRS, zero_shot_scores


def heatmap(model, hu, texts, method=None, pairs=PAIRS[:2]):
    """Where a preprocessed volume hu (X, Y, Z) supports the prompts `texts`: (gx, gy, gz).

    method: "rollout" (a ViT's default), "gradcam" (a CNN's), or "similarity", the cosine of each
    patch's projected feature with the prompts. Outside the patient's bounding box (HU > -300) there
    is no finding: the map's minimum. Raises ValueError for a method that the encoder lacks.
    """
    own = "rollout" if model.config.vision == "vit" else "gradcam"
    if method not in (None, "similarity", own):
        encoder = f"the vision encoder '{model.config.vision}'"
        raise ValueError(f"no '{method}' map for {encoder}; similarity or {own} can be had")
    volumes = torch.as_tensor(np.array(hu))[None, None].to(model.bank.weight.device)
    with torch.no_grad():
        t = F.normalize(model.encode_text(texts), dim=-1).mean(0, keepdim=True)          # (1, d)
        t_hat = model.bridge(t)

    def score():
        v = model.encode_image(volumes)
        return zero_shot_scores(v, model.bridge(v), t, t_hat, pairs).sum()

    if method == "similarity":
        grid = similarity(model, volumes, t)
    elif own == "rollout":
        grid = vit_map(model, score)
        grid = grid.view([n // step for n, step in zip(hu.shape, model.config.patch)])
    else:
        grid = cnn_map(model, score)
    return within_patient(grid.cpu().numpy(), hu, model.config)


@torch.no_grad()
def similarity(model, volumes, t):
    """Cosine of each patch's projected feature with t (1, d): (gx, gy, gz)."""
    _, patches = model.vision(model.normalise(volumes))
    patches = F.normalize(model.vision_projection(patches), dim=-1)[0]
    return patches @ F.normalize(t, dim=-1)[0]


@contextlib.contextmanager
def hooked(hooks):
    """Hooks that are removed at the end."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def vit_map(model, score):
    """Attention rollout of a ViT for score(), which embeds the volume: one value a patch (N,)."""
    qkvs, outputs, hooks = [], [], []

    def record_qkv(module, args, output):
        qkvs.append(output)

    def record_attention_output(module, args):
        outputs.append(args[0])

    for block in model.vision.blocks:
        hooks.append(block.attn.qkv.register_forward_hook(record_qkv))
        hooks.append(block.attn.proj.register_forward_pre_hook(record_attention_output))
    with hooked(hooks), torch.enable_grad():
        gradients = torch.autograd.grad(score(), outputs)
    with torch.no_grad():
        layers = [(qkv[0], gradient[0]) for qkv, gradient in zip(qkvs, gradients)]
        return rollout(layers, model.config.vit_heads)[1:]


def rollout(layers, heads, rows=256):
    """The CLS token's row (N,) of the product of (I + A_l) over the layers.

    A_l = mean over heads of relu(attention * its gradient). layers: of each, qkv (N, 3 C) and the
    gradient of the attention's output (N, C), first to last. As only one row is wanted, it goes
    through the layers from the last to the first, and of an attention matrix (N, N) only `rows`
    rows are ever there.
    """
    out = F.one_hot(torch.tensor(0), len(layers[0][0])).to(layers[0][0])
    for qkv, gradient in reversed(layers):
        q, k, v = qkv.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)     # (heads, N, C / heads)
        gradient = gradient.unflatten(1, (heads, -1)).transpose(0, 1)
        step = torch.zeros_like(out)
        for part in out.nonzero()[:, 0].split(rows):
            attention = torch.softmax(q[:, part] @ k.mT / q.shape[-1] ** 0.5, dim=-1)
            step += out[part] @ (attention * (gradient[:, part] @ v.mT)).relu().mean(0)
        out = out + step
    return out


def cnn_map(model, score):
    """HiResCAM of a CNN for score(): (gx, gy, gz).

    Of the deepest stage that still has eight cells along each axis, else of the first; at the last
    stage it would be Grad-CAM (Selvaraju et al. 2017).
    """
    outputs = []

    def record_output(module, args, output):
        outputs.append(output)

    hooks = [block.register_forward_hook(record_output) for block in model.vision.blocks]
    with hooked(hooks), torch.enable_grad():
        gradients = torch.autograd.grad(score(), outputs)
    deepest = 0
    for i, output in enumerate(outputs):
        if min(output.shape[2:]) >= 8 or output.shape == outputs[0].shape:
            deepest = i
    return (outputs[deepest] * gradients[deepest])[0].detach().sum(0).relu()


# ---- where a map's cells lie ---------------------------------------------------------------------

def cells(grid, config):
    """Voxels from one cell's centre to the next, and the first centre, each (3,)."""
    if config.vision == "vit":
        return np.array(config.patch), (np.array(config.patch) - 1) / 2
    # Strided, padded convolutions start at voxel 0 and halve sizes, rounding up.
    return 2 ** np.ceil(np.log2(np.divide(config.shape, grid.shape))), np.zeros(3)


def patient_box(hu):
    """Slices (3,) of the bounding box of what is denser than -300 HU; all where nothing is."""
    dense, box = np.asarray(hu) > -300, []
    for axis, size in enumerate(dense.shape):
        others = tuple({0, 1, 2} - {axis})
        line = np.flatnonzero(dense.any(others))
        box.append(slice(line[0], line[-1] + 1) if len(line) else slice(0, size))
    return tuple(box)


def within_patient(grid, hu, config):
    """A map (gx, gy, gz) with its minimum at the cells that lie outside the patient's box."""
    out = grid.copy()
    steps, offsets = cells(grid, replace(config, shape=hu.shape))
    for axis, (box, step, offset) in enumerate(zip(patient_box(hu), steps, offsets)):
        centres = np.arange(grid.shape[axis]) * step + offset
        outside = (centres < box.start - step / 2) | (centres > box.stop - 1 + step / 2)
        np.moveaxis(out, axis, 0)[outside] = grid.min()
    return out


def to_scan(grid, volume, config):
    """A map (gx, gy, gz) brought linearly to the voxels of its Volume: 0 to 1, (X, Y, Z).

    Inverse of data.preprocess; voxels that it cropped away get 0.
    """
    weights, (steps, offsets) = [], cells(grid, config)
    for axis, size in enumerate(volume.hu.shape):
        shape, n = config.shape[axis], grid.shape[axis]
        spacing, spacing_out = volume.spacing[axis], config.spacing[axis]
        resampled = max(1, round(size * spacing / spacing_out))
        cropped = min(resampled, shape)
        cut, padding = (resampled - cropped) // 2, (shape - cropped) // 2
        # Each voxel's place in the preprocessed volume, and in the grid.
        position = np.arange(size) * spacing / spacing_out - cut + padding
        place = np.clip((position - offsets[axis]) / steps[axis], 0, n - 1)
        weight = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(n)))             # (size, n)
        inside = (position > -0.5) & (position < shape - 0.5)
        weights.append((weight * inside[:, None]).astype(np.float32))
    positive = (grid - grid.min()).astype(np.float32)
    heat = np.einsum("xi,yj,zk,ijk->xyz", *weights, positive, optimize=True)
    return heat / (heat.max() or 1)  # scaled here: the map's maximum may lie in the padding


def write_heatmap(path, heat, volume, source):
    """Write a map (X, Y, Z) of a Volume as .nii.gz, with its source file's own affine and axes."""
    affine, orientations = volume.affine, nibabel.orientations
    if not str(source).endswith(".npz"):
        affine = nibabel.load(source).affine
        lps, own = orientations.axcodes2ornt("LPS"), orientations.io_orientation(affine)
        heat = orientations.apply_orientation(heat, orientations.ornt_transform(lps, own))
    image = nibabel.Nifti1Image(np.round(255 * heat).astype(np.uint8), affine)
    image.header.set_slope_inter(1 / 255, 0)
    data.write_atomically(path, gzip.compress(image.to_bytes(), 3))


# ---- do heat maps point? -------------------------------------------------------------------------

POINTED_AT = ("Lung nodule", "Lung mass", "Pleural effusion", "Consolidation")


def pointing(model, cache, rows, masks, prompts, pairs=PAIRS[:2], most=25):
    """How often a map's maximum lies within one patch of the lesion, of the phantom's volumes.

    masks: folder of lesion masks (NAME.nii.gz, bit k = the k-th of the 33); prompts: {class:
    prompt}, of evaluate.make_prompts. For each class of POINTED_AT, {"volumes", "hit", "chance",
    "elsewhere"}: chance is the mean share of the body's box that lies so near, elsewhere the share
    of hits of another volume's map.
    """
    rows = [row for row in rows if (Path(masks) / f"{row.name}.nii.gz").exists()]
    out = {}
    for name in POINTED_AT:
        affected = [row for row in rows if row.labels.get(name) == 1][:most]
        if name not in prompts or not affected:
            continue
        hits, chances, elsewhere, last = [], [], [], None
        for row in affected:
            near = near_lesion(Path(masks) / f"{row.name}.nii.gz", name, model.config)
            hu = cache.read(row)
            grid = heatmap(model, hu, prompts[name]["positive"], pairs=pairs)
            peak = peak_voxel(grid, hu.shape, model.config)
            hits.append(near[peak])
            chances.append(near[patient_box(hu)].mean())
            if last:
                elsewhere.append(near[last])
            last = peak
        out[name] = {
            "volumes": len(hits), "hit": float(np.mean(hits)), "chance": float(np.mean(chances)),
            "elsewhere": float(np.mean(elsewhere)) if elsewhere else float("nan"),
        }
    return out


def near_lesion(mask, name, config):
    """Voxels (X, Y, Z) of the preprocessed volume within one patch of a lesion of this name."""
    drawn = data.read_volume(mask)
    bit = (data.CT_RATE + data.CT_RATE_LT).index(name)
    lesion = 1000 * (drawn.hu.astype(np.int64) >> bit & 1).astype(np.int16)
    lesion = data.preprocess(lesion, drawn.spacing, config.spacing, config.shape, (0, 1000))
    near = torch.from_numpy(lesion)[None].float()
    for axis, step in enumerate(config.patch):  # a box's maximum, axis by axis
        size, padding = [1, 1, 1], [0, 0, 0]
        size[axis], padding[axis] = 2 * step + 1, step
        near = F.max_pool3d(near, size, 1, padding)
    return near[0].numpy() > 100


def peak_voxel(grid, shape, config):
    """The voxel of the preprocessed volume at the centre of a map's highest cell."""
    step, offset = cells(grid, config)
    cell = np.array(np.unravel_index(grid.argmax(), grid.shape))
    return tuple(np.minimum(cell * step + offset, np.array(shape) - 1).astype(int))
