"""Where a zero-shot score comes from: heat maps, brought to the scan's own space."""
import gzip
from dataclasses import replace

import nibabel
import numpy as np
import torch
import torch.nn.functional as F

import data
from model import PAIRS, zero_shot_scores


def heatmap(model, hu, texts, method=None, pairs=PAIRS[:2]):
    """Where a preprocessed volume hu (X, Y, Z) supports the prompts `texts`: (gx, gy, gz), one value a patch.

    "similarity": cosine of each patch's projected feature with the prompts. "rollout" (ViT; the default there): attention weighted by the
    score's positive gradient, rolled out over the layers (Chefer et al. 2021). "gradcam" (CNN; the default there): features times their
    gradient (HiResCAM, Draelos and Carin 2020; at the last stage it is Grad-CAM, Selvaraju et al. 2017) of the deepest stage that still has
    eight cells along each axis, else of the first. Outside the patient's bounding box (HU > -300) there is no finding: the map's minimum.
    """
    vit = model.config.vision == "vit"
    own = "rollout" if vit else "gradcam"
    method = method or own
    if method not in ("similarity", own):
        raise ValueError(f"no '{method}' map for the vision encoder '{model.config.vision}'; similarity or {own} can be had")
    volumes = torch.as_tensor(np.array(hu))[None, None].to(model.bank.weight.device)
    with torch.no_grad():
        t = F.normalize(model.encode_text(texts), dim=-1).mean(0, keepdim=True)
        t_hat = model.bridge(t)
        if method == "similarity":
            patches = F.normalize(model.vision_projection(model.vision(model.normalise(volumes))[1]), dim=-1)
            return within_patient((patches @ F.normalize(t, dim=-1)[0])[0].cpu().numpy(), hu, model.config)
    seen, hooks = [], []
    if method == "rollout":
        for block in model.vision.blocks:
            hooks.append(block.attn.qkv.register_forward_hook(lambda module, args, output: seen.append([output])))
            hooks.append(block.attn.proj.register_forward_pre_hook(lambda module, args: seen[-1].append(args[0])))
    else:
        hooks += [block.register_forward_hook(lambda module, args, output: seen.append([None, output])) for block in model.vision.blocks]
    try:
        with torch.enable_grad():
            v = model.encode_image(volumes)
            total = zero_shot_scores(v, model.bridge(v), t, t_hat, pairs).sum()
            gradients = torch.autograd.grad(total, [output for _, output in seen])
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        if method == "rollout":
            grid = tuple(size // step for size, step in zip(volumes.shape[2:], model.config.patch))
            layers = [(qkv[0], gradient[0]) for (qkv, _), gradient in zip(seen, gradients)]
            return within_patient(rollout(layers, model.config.vit_heads)[1:].view(grid).cpu().numpy(), hu, model.config)
        stage = [i for i, (_, output) in enumerate(seen) if min(output.shape[2:]) >= 8 or output.shape == seen[0][1].shape][-1]
        return within_patient((seen[stage][1] * gradients[stage])[0].sum(0).relu().cpu().numpy(), hu, model.config)                 # (gx, gy, gz)


def patient_box(hu):
    """Slices (3,) of the bounding box of what is denser than -300 HU in hu (X, Y, Z); the whole where nothing is."""
    dense = np.asarray(hu) > -300
    lines = [np.flatnonzero(dense.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return tuple(slice(line[0], line[-1] + 1) if len(line) else slice(0, size) for line, size in zip(lines, dense.shape))


def within_patient(grid, hu, config):
    """A map (gx, gy, gz) with its minimum at the cells that lie outside the patient's box."""
    keep = grid.copy()
    for axis, (box, stride, offset) in enumerate(zip(patient_box(hu), *cells(grid, replace(config, shape=hu.shape)))):
        centres = np.arange(grid.shape[axis]) * stride + offset
        np.moveaxis(keep, axis, 0)[(centres < box.start - stride / 2) | (centres > box.stop - 1 + stride / 2)] = grid.min()
    return keep


def rollout(layers, heads, rows=256):
    """The CLS token's row of the product of (I + A_l) over the layers, A_l = mean over heads of relu(attention * its gradient): (N,).

    layers: of each, qkv (N, 3 C) and the gradient of the attention's output (N, C), first to last. As only one row is wanted, it goes
    through the layers from the last to the first, and of an attention matrix (N, N) only `rows` rows are ever there.
    """
    out = F.one_hot(torch.tensor(0), len(layers[0][0])).to(layers[0][0])
    for qkv, gradient in reversed(layers):
        q, k, v = qkv.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)                                                   # (heads, N, C / heads)
        gradient = gradient.unflatten(1, (heads, -1)).transpose(0, 1)
        step = torch.zeros_like(out)
        for part in out.nonzero()[:, 0].split(rows):
            attention = torch.softmax(q[:, part] @ k.mT / q.shape[-1] ** 0.5, dim=-1)
            step += out[part] @ (attention * (gradient[:, part] @ v.mT)).relu().mean(0)
        out = out + step
    return out


def cells(grid, config):
    """Where a map's cells lie in the preprocessed volume: voxels from one centre to the next, and the first centre, each (3,)."""
    if config.vision == "vit":
        return np.array(config.patch), (np.array(config.patch) - 1) / 2
    return 2 ** np.ceil(np.log2(np.divide(config.shape, grid.shape))), np.zeros(3)        # strided, padded convolutions start at voxel 0


def to_scan(grid, volume, config):
    """A heat map (gx, gy, gz) of the preprocessed volume, brought linearly to the voxels of the Volume it came from: 0 to 1, (X, Y, Z).

    Inverse of data.preprocess; voxels that it cropped away get 0.
    """
    weights = []
    for size, step, step_out, shape, stride, offset, n in zip(volume.hu.shape, volume.spacing, config.spacing, config.shape, *cells(grid, config), grid.shape):
        resampled = max(1, round(size * step / step_out))
        kept = min(resampled, shape)
        position = np.arange(size) * step / step_out - (resampled - kept) // 2 + (shape - kept) // 2            # voxel of the preprocessed
        weight = np.maximum(0, 1 - np.abs(np.clip((position - offset) / stride, 0, n - 1)[:, None] - np.arange(n)))
        weights.append((weight * ((position > -0.5) & (position < shape - 0.5))[:, None]).astype(np.float32))
    heat = np.einsum("xi,yj,zk,ijk->xyz", *weights, (grid - grid.min()).astype(np.float32), optimize=True)
    return heat / (heat.max() or 1)                                                   # scaled here: the map's maximum may lie in the padding


def write_heatmap(path, heat, volume, source):
    """Write a map (X, Y, Z) of a Volume as .nii.gz on the voxels of its source file, with that file's own affine and axes."""
    affine = volume.affine
    if not str(source).endswith(".npz"):
        affine = nibabel.load(source).affine
        turn = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("LPS"), nibabel.io_orientation(affine))
        heat = nibabel.orientations.apply_orientation(heat, turn)
    image = nibabel.Nifti1Image(np.round(255 * heat).astype(np.uint8), affine)
    image.header.set_slope_inter(1 / 255, 0)
    data.write_atomically(path, gzip.compress(image.to_bytes(), 3))
