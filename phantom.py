"""A synthetic chest-CT benchmark on disk, in CT-RATE's own layout: volumes, reports, metadata and labels of 33 abnormalities.

Each scan = one patient's anatomy + abnormalities drawn from what they look like on CT + a radiologist-like report that affirms just those.
Everything follows from (seed, split, scan index): same seed, same bytes, for any number of workers; a larger count extends a smaller one.

    python phantom.py --out data/phantom --train 800 --valid 200 --seed 0       # write it (an interrupted run goes on where it stopped)
    python phantom.py --preview preview.png                                     # a contact sheet: one example of each abnormality, marked

Four parts, top to bottom: what is found (`findings`), what is said (`report`), what is seen (`draw`), what is written (`write`).
"""
import argparse
import csv
import io
import json
import math
import multiprocessing
import os
import random
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from phantom_reports import (LOBES, LOWER, UPPER, ABNORMALITIES, CT_RATE, CT_RATE_LT, LESIONS, SITUATIONS, STATIONS, SIGN, SIDES, TECHNIQUES, findings, patient_of, report)

VERSION = 1  # raise it whenever the bytes written for a seed change

# ------------------------------------------------------------------------------------------------ what is seen: the patient
# Coordinates are the patient's, in mm: x to the left, y to the back, z up from the lowest point of the lungs, (0, 0) in the middle of the
# chest. Arrays are (Z, Y, X) float32 in HU. A signed distance is negative inside; a voxel's coverage is clip(1/2 - distance / voxel, 0, 1).
def _periodic_noise(size, sigma, seed):
    """Smooth periodic noise (size^3), mean 0, variance 1, correlated over about sigma voxels."""
    spectrum = np.fft.rfftn(np.random.default_rng(seed).standard_normal((size,) * 3, dtype=np.float32))
    k2 = sum(np.ix_(*(f**2 for f in (np.fft.fftfreq(size), np.fft.fftfreq(size), np.fft.rfftfreq(size)))))
    noise = np.fft.irfftn(spectrum * np.exp(-2 * (math.pi * sigma)**2 * k2), s=(size,) * 3, axes=(0, 1, 2)).astype(np.float32)
    return (noise - noise.mean()) / noise.std()


def _periodic_cells(size, cell, seed):
    """Walls of a periodic foam (size^3, 1 on a wall, 0 inside a cell of about `cell` voxels): secondary lobules, honeycomb."""
    n = size // cell
    seeds = np.random.default_rng(seed).uniform(.15, .85, (n, n, n, 3)).astype(np.float32)
    at = np.indices((size,) * 3, dtype=np.float32) / cell
    home, (first, second) = np.floor(at).astype(int), np.full((2,) + (size,) * 3, 9, np.float32)  # distances to the two nearest seeds
    for step in np.ndindex(3, 3, 3):
        near = home + (np.array(step) - 1)[:, None, None, None]
        distance = np.sqrt(sum((near[i] + seeds[..., i][tuple(near % n)] - at[i])**2 for i in range(3)))
        second[:] = np.minimum(second, np.maximum(first, distance))
        first[:] = np.minimum(first, distance)
    return np.clip(1.3 - (second - first) * cell, 0, 1)


def _path(points, step=1.5, smooth=0):
    """Resample a polyline (N, 3) every `step` mm; smooth > 0 rounds its corners over about that many mm."""
    points = np.asarray(points, np.float32)
    along = np.concatenate(([0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))))
    at = np.arange(0, along[-1] + step, step)
    out = np.stack([np.interp(at, along, points[:, i]) for i in range(3)], 1)
    if smooth:
        n = int(smooth / step) | 1
        padded = np.concatenate((np.repeat(out[:1], n // 2, 0), out, np.repeat(out[-1:], n // 2, 0)))
        out = np.stack([np.convolve(padded[:, i], np.ones(n) / n, "valid") for i in range(3)], 1)
    return out.astype(np.float32)


def _grow(root, leaves, radius, exponent):
    """A tree of tubes from a root (3,) to its leaves (N, 3): split these in two, run to between them, go on -> (M, 4: x, y, z, r)."""
    total, pieces, todo = len(leaves), [], [(np.asarray(root, np.float32), leaves, radius)]
    while todo:
        start, group, r0 = todo.pop()
        centre = group.mean(0)
        end = start + (.5 if len(group) > 1 else 1) * (centre - start)
        r1 = radius * (len(group) / total)**(1 / exponent)
        t = np.linspace(0, 1, max(2, int(np.linalg.norm(end - start) / 2)), dtype=np.float32)[:, None]
        bend = np.sin(math.pi * t) * np.cross(end - start, (.1, .2, .1)) * .4
        pieces.append(np.concatenate((start + t * (end - start) + bend, r0 + t * (r1 - r0)), 1))
        if len(group) > 1:
            side = (group - centre) @ np.linalg.svd(group - centre, full_matrices=False)[2][0]
            upper = side > np.median(side) if len(group) > 2 else side > 0
            todo += [(end, group[upper], r1), (end, group[~upper], r1)]
    return np.concatenate(pieces).astype(np.float32)


class Anatomy:
    """One patient's shapes and tissue values; all fields vary from patient to patient."""

    def __init__(self, rng, found):
        u = rng.uniform
        self.female = rng.random() < .48
        size = u(.93, 1.05) - .05 * self.female
        self.a, self.b, self.top = 122 * size * u(.95, 1.04), 86 * size * u(.92, 1.07), 226 * size * u(.95, 1.05)
        self.scale = np.array((self.a / 122, self.b / 86, self.top / 226), np.float32)  # of the anatomy below, written for a mean patient
        self.boxy, self.roll, _ = u(2.1, 2.7), math.radians(rng.gauss(0, 3)), u(-6, 6)  # (an unused draw: the bytes of a seed depend on it)
        self.wall, self.fat, self.breast = u(13, 18), u(4, 20), self.female * u(.6, 1.1)
        self.lobed = [u(-.06, .06) for _ in range(4)]
        self.dome = {"right": u(48, 66), "left": u(40, 58)}
        cardiomegaly, aorta = found.get("Cardiomegaly"), found.get("Atherosclerosis")
        self.heart_scale = u(.96, 1.06) * cardiomegaly[0]["scale"] if cardiomegaly else u(.84, 1.06)
        self.aorta_scale = u(.88, 1.08) * (aorta[0]["scale"] if aorta else 1)
        self.kyphosis, self.bone_age = u(2, 14), u(.7, 1.15)
        self.hu = {"muscle": u(45, 62), "fat": u(-112, -92), "blood": u(34, 48), "lung": u(-875, -815), "liver": u(45, 64),
                   "bone": u(120, 230) * self.bone_age, "cortex": u(520, 760) * self.bone_age, "gradient": u(.15, .5)}
        self.table = u(8, 22), u(-260, -60), rng.random() < .9
        self.twist = np.array([u(-5, 5) for _ in range(12)], np.float32).reshape(3, 4)
        self.offset = np.array((u(-30, 30), u(-180, -120), u(-900, 200)), np.float32)  # of the scanner's coordinates

    def radius(self, x, y, z):
        """Distance of the chest cavity's inner wall from the body's axis, in the direction of (x, y), at height z."""
        r, height = np.hypot(x, y) + 1e-3, z / self.top
        outline = ((np.abs(x) / r / self.a)**self.boxy + (np.abs(y) / r / self.b)**self.boxy)**(-1 / self.boxy)
        width = np.interp(height, (-.4, 0, .3, .5, .68, .82, .93, .99, 1.03), (.95, 1, 1, .96, .86, .7, .46, .24, -.3)).astype(np.float32)
        back = np.interp(height, (.55, .8, .95), (0, 9, 14)).astype(np.float32)  # the apices lie towards the back
        return width * outline + back * (y / r)

    def diaphragm(self, x, y):
        rim = np.clip(np.hypot(x / self.a, y / self.b), 0, 1.1)
        right = 1 / (1 + np.exp(np.clip(x / 12, -30, 30)))
        height = self.dome["left"] + right * (self.dome["right"] - self.dome["left"])
        return height * (1 - rim**3) - np.clip(y, 0, None) * .12 + 8 * np.exp(-((np.abs(x) - 62)**2 + (y + 10)**2) / 2000)

    def mediastinum(self, y, z):
        """Half the width between the lungs without the heart."""
        width = np.interp(y / self.b, (-1, -.75, -.45, -.1, .25, .5, .8, 1.1), (5, 7, 20, 31, 30, 23, 24, 30)).astype(np.float32)
        return width * np.interp(z / self.top, (0, .3, .6, .8, 1), (.75, .85, 1, .95, .8)).astype(np.float32) * self.scale[0]

    def spine(self, z):
        return .63 * self.b + self.kyphosis * (1 - ((z - 120) / 130)**2) - 4

    def level(self, number):
        """Height of thoracic vertebra `number`."""
        return self.top * (1.045 - .0965 * (number - 1))

    def heart(self):
        """Centre, radii and axes (rows) of the heart's ellipsoid."""
        axes = np.array(((.78, -.5, -.37), (.55, .83, .05), (.28, -.24, .93)), np.float32)
        return np.array((17, -24, 84)) * self.scale, np.array((59, 45, 43)) * self.heart_scale * self.scale.mean(), axes

    def depth(self, points):
        """How deep points (N, 3) lie in a lung, mm (negative: outside)."""
        x, y, z = np.asarray(points, np.float32).T
        centre, radii, axes = self.heart()
        heart = np.sqrt(((((points - centre) @ axes.T) / radii)**2).sum(-1)) - 1
        walls = self.radius(x, y, z) - np.hypot(x, y), np.abs(x) - self.mediastinum(y, z), .8 * (z - self.diaphragm(x, y))
        return np.minimum.reduce((*walls, heart * radii.min()))

    def lobe(self, points):
        x, y, z = (np.asarray(points) / self.scale).T
        right = np.where(z < 105 + 62 * y / 86, LOBES[2], np.where(z < 116, LOBES[1], LOBES[0]))
        return np.where(x < 0, right, np.where(z < 105 + 62 * y / 86, LOBES[4], LOBES[3]))

    def at(self, *points):
        """Points written for the mean patient -> this patient's, (N, 3)."""
        return np.array(points, np.float32) * self.scale

    def hilum(self, point):
        return self.at((math.copysign(36, point[0]), 9, 131))[0]

    def spots(self, rng, n, margin, lobe=None, side=None, most=1e9):
        """n points in a lung (a lobe or a side of it), at least `margin` mm deep where the lobe has such, and at most `most`."""
        points = rng.uniform((-self.a, -self.b, 0), (self.a, self.b, self.top), (1500 + 8 * n, 3)).astype(np.float32)
        depth = self.depth(points)
        inside = (depth > 1) & (self.lobe(points) == lobe if lobe else (points[:, 0] < 0) == (side == "right"))
        points, depth = points[inside], depth[inside]
        good = np.flatnonzero((depth >= margin) & (depth <= most))
        order = np.concatenate((good, np.setdiff1d(np.argsort(-np.minimum(depth, most)), good, assume_unique=True)))
        return points[order[:n]]

    def aorta(self):
        s = 1 if self.aorta_scale < 1.12 else 1.12  # an atherosclerotic aorta is elongated too
        return self.at((4, -16, 96), (-10, -20, 125), (-12, -20, 148), (-4, -14, 168 * s), (12, 4, 174 * s), (24, 24, 168 * s),
                       (27 * s, 36, 150), (26 * s, 40, 120), (22 * s, 43, 85), (17, 44, 45), (10, 44, -40))

    def ribs(self):
        """(side, number) -> centre line (N, 3) from spine to cartilage, and the share of it that is bone."""
        out, t, back = {}, np.linspace(0, 1, 80, dtype=np.float32), math.radians(164)
        for side, number in ((side, number) for side in SIDES for number in range(1, 12)):
            angle = back + t * (math.radians(26 if number < 8 else 26 + 18 * (number - 7)) - back)
            x, y = SIGN[side] * np.sin(angle), -np.cos(angle)
            drop = min(24 + 14 * number, 64 + 3 * number) * np.minimum(t / .8, 1)**1.15 - 55 * np.clip(t - .82, 0, 1)
            z = self.level(number) + 4 - drop * self.scale[2]
            r = np.maximum(self.radius(x, y, z), .3 * self.a) + 4.5
            out[side, number] = np.stack((x * r, y * r, z), 1), .97 if number > 7 else .8
        return out


_shared = {}


def shared():
    """What all patients of a process share: textures, vessel and airway trees of the mean patient (their shapes then vary by patient)."""
    if not _shared:
        _shared.update(fine=_periodic_noise(64, 2, 1), coarse=_periodic_noise(64, 5, 2), cells=_periodic_cells(63, 7, 3),
                       noise=np.random.default_rng(4).standard_normal(6_000_000, dtype=np.float32))
        mean, rng = Anatomy(random.Random("mean"), {}), np.random.default_rng(5)
        mean.scale, mean.boxy, mean.dome, mean.heart_scale = np.ones(3, np.float32), 2.4, {"right": 57, "left": 49}, .95
        mean.a, mean.b, mean.top = 122, 86, 226
        for side, sign in SIGN.items():
            artery, vein, airway = (mean.spots(rng, n, 5, side=side) for n in (360, 240, 44))
            _shared[side] = {"artery": _grow((sign * 36, 8, 136), artery, 6.6, 3.6), "vein": _grow((sign * 26, 14, 112), vein, 5.6, 3.6),
                             "airway": _grow((sign * 34, 9, 131), airway, 4.4, 2.5)}
    return _shared


class Canvas:
    """A reconstruction being drawn: hu (Z, Y, X), the lungs' coverage and depth, masks of the lesions if kept."""

    def __init__(self, body, pixels, xy, dz, keep_masks):
        self.body, self.spacing, self.masks = body, (xy, xy, dz), {} if keep_masks else None
        self.shape = (int(1.22 * body.top / dz), pixels, pixels)
        self.origin, self.vox = self.corner(body, pixels, xy), float((xy * xy * dz)**(1 / 3))
        steps = xy * np.arange(pixels, dtype=np.float32)
        gx, gy = self.origin[0] + steps, self.origin[1] + steps[:, None]
        self.cos, self.sin = math.cos(body.roll), math.sin(body.roll)
        self.x, self.y = self.cos * gx + self.sin * gy, self.cos * gy - self.sin * gx  # patient's coordinates of each in-plane pixel
        self.z = (self.origin[2] + dz * np.arange(self.shape[0], dtype=np.float32))[:, None, None]
        self.scratch = np.full(math.prod(self.shape), 1e3, np.float32)
        self.trunk()
        self.organs()
        self.skeleton()
        self.vertebrae()
        self.vessels()
        self.airways()

    @staticmethod
    def corner(body, pixels, xy):
        """The first voxel's centre in LPS mm, before the scanner's offset."""
        return np.array((-(pixels - 1) / 2 * xy, -(pixels - 1) / 2 * xy + 6, -.13 * body.top), np.float32)

    def grid(self, points):
        """Patient's points (..., 3) -> fractional (x, y, z) indices."""
        x, y, z = np.moveaxis(np.asarray(points, np.float32), -1, 0)
        turned = np.stack((self.cos * x - self.sin * y, self.sin * x + self.cos * y, z), -1)
        return (turned - self.origin) / np.array(self.spacing, np.float32)

    def box(self, centre, reach):
        """Slices around a point and the patient's coordinates in it, relative to the point: (dx (Y, X), dy (Y, X), dz (Z, 1, 1))."""
        at, (x, y, z) = self.grid(centre), np.broadcast_to(np.asarray(reach, np.float32), 3) + self.vox
        half = np.array((max(x, y), max(x, y), z)) / self.spacing if x != y else np.array((x, y, z)) / self.spacing
        first, last = np.ceil(at - half).astype(int), np.floor(at + half).astype(int) + 1
        where = tuple(slice(max(0, min(n, first[i])), max(0, min(n, last[i]))) for i, n in zip((2, 1, 0), self.shape))
        return where, (self.x[where[1:]] - centre[0], self.y[where[1:]] - centre[1], self.z[where[0]] - centre[2])

    def ellipsoid(self, centre, radii, axes=None, reach=0):
        """Slices and signed distance (mm) to an ellipsoid whose axes are the rows of `axes`; reach widens the box."""
        radii = np.broadcast_to(np.asarray(radii, np.float32), 3)
        where, (dx, dy, dz) = self.box(centre, (radii.max() if axes is not None else radii) + reach)
        if axes is None:
            parts = [dx[None] / radii[0], dy[None] / radii[1], dz / radii[2]]
        else:
            parts = [((dx * axis[0] + dy * axis[1])[None] + dz * axis[2]) / r for axis, r in zip(axes, radii)]
        squares = [part * part for part in parts]
        k = np.sqrt(squares[0] + squares[1] + squares[2])
        slope = np.sqrt(squares[0] / radii[0]**2 + squares[1] / radii[1]**2 + squares[2] / radii[2]**2)
        return where, k * (k - 1) / (slope + 1e-6)

    def half(self, side):
        """The box of one side of the chest."""
        middle = int(self.grid((0, 0, 0))[0]) + 1
        return slice(None), slice(None), slice(0, middle) if side == "right" else slice(middle, None)

    def texture(self, where, tile, mm, shift=0):
        """A periodic tile of `shared()`, mm per its voxel, over a box; fixed to the patient, not to the grid."""
        tile, at = shared()[tile], [np.arange(n)[s] for s, n in zip(where, self.shape)]
        at = [(self.origin[2 - i] + self.spacing[2 - i] * at[i]) / mm + shift * (i + 1) for i in range(3)]
        index = [np.round(at[i]).astype(int) % tile.shape[i] for i in range(3)]
        return tile[np.ix_(*index)]

    def cover(self, distance, edge=0):
        return np.clip(.5 - distance / (self.vox + edge), 0, 1)

    def paint(self, where, cover, hu, name=None, lung=None):
        """Blend a box towards hu; lung=True confines it to lung, False takes it from the lung, None leaves the lung's coverage alone."""
        if lung:
            cover = cover * self.lung[where]
        elif lung is False:
            self.lung[where] *= 1 - cover
        self.hu[where] += cover * (hu - self.hu[where])
        self.note(name, where, cover)

    def note(self, name, where, cover, level=.5):
        if name and self.masks is not None:
            self.masks.setdefault(name, np.zeros(self.shape, bool))[where] |= cover > level

    def tube(self, points, radii, tall=1.):
        """Flat indices of the voxels near a chain of spheres, stretched along z where tall > 1 (duplicates possible); signed distances."""
        radii = np.broadcast_to(np.asarray(radii, np.float32), len(points))
        radii = np.minimum(radii, 2 * radii - self.vox / 2)  # thinner than a voxel: coverage 2 r / voxel at the centre
        at, spacing = self.grid(points), np.array(self.spacing, np.float32) / (1, 1, tall)
        reach, limit = radii + self.vox / 2, np.array(self.shape[::-1])
        keep = ((at > -2) & (at < limit + 1)).all(1) & (reach > 0)
        at, radii, reach = at[keep], radii[keep], reach[keep]
        size, indices, distances = (reach / self.vox + .5).astype(int), [np.zeros(0, int)], [np.zeros(0, np.float32)]
        for n in np.unique(size):  # spheres of like size together
            some = size == n
            steps = [np.arange(-k, k + 1) for k in (reach[some].max() / spacing + .5).astype(int)]
            index = [np.rint(at[some, i, None]).astype(int) + steps[i] for i in range(3)]
            x, y, z = (((index[i] - at[some, i, None]).astype(np.float32) * np.float32(spacing[i]))**2 for i in range(3))
            distance = np.sqrt(z[:, :, None, None] + y[:, None, :, None] + x[:, None, None, :]) - radii[some, None, None, None]
            x, y, z = (np.clip(index[i], 0, limit[i] - 1) for i in range(3))
            flat = (z * (self.shape[1] * self.shape[2]))[:, :, None, None] + (y * self.shape[2])[:, None, :, None] + x[:, None, None, :]
            near = distance < self.vox / 2
            indices.append(flat[near])
            distances.append(distance[near])
        index = np.concatenate(indices)
        np.minimum.at(self.scratch, index, np.concatenate(distances))
        distance = self.scratch[index]
        self.scratch[index] = 1e3
        return index, distance

    def stroke(self, points, radii, hu, name=None, lung=None, strength=1, tall=1.):
        """Draw a chain of spheres; lung as in paint. hu: a value, or a function of the signed distance."""
        index, distance = self.tube(points, radii, tall)
        cover, flat, lungs = self.cover(distance) * strength, self.hu.reshape(-1), self.lung.reshape(-1)
        if lung:
            cover = cover * lungs[index]
        elif lung is False:
            lungs[index] = lungs[index] * (1 - cover)
        flat[index] += cover * ((hu(distance) if callable(hu) else hu) - flat[index])
        if name and self.masks is not None:
            self.masks.setdefault(name, np.zeros(self.shape, bool)).reshape(-1)[index[cover > .4]] = True

    # The normal patient --------------------------------------------------------------------------
    def trunk(self):
        """Skin, fat, muscle, lungs and mediastinal fat; in slabs whose temporaries stay small."""
        self.hu, self.lung, self.depth, self.cavity, self.dome, self.skin = np.empty((6,) + self.shape, np.float32)
        body, fat = self.body, self.body.hu["fat"]
        self.heart_box, self.heart = self.ellipsoid(*body.heart(), 30)
        self.depth.fill(1e3)
        self.depth[self.heart_box] = self.heart - 2
        for start in range(0, self.shape[0], 32):
            self._slab(slice(start, start + 32))
        for sign in (-1, 1):  # axillary fat, breasts
            self.paint(*self._ball((sign * .98 * body.a, 0, .84 * body.top), (22, 30, 34), 4), fat + 8)
            if body.breast:
                front = np.array((sign * 68 * body.scale[0], .04 * body.b - body.b - body.wall - .4 * body.fat, .42 * body.top))
                where, cover = self._ball(front, np.array((66, 27, 58)) * body.breast, 2)
                self.paint(where, cover * (self.skin[where] > -6), fat)
                where, cover = self._ball(front - (0, 8, 0), np.array((34, 15, 30)) * body.breast, 8)
                self.paint(where, cover * .8 * (self.skin[where] > -6) * (self.texture(where, "fine", 3) > -.2), 20)

    def _slab(self, k):
        body, x, y, z, value = self.body, self.x, self.y, self.z[k], self.body.hu
        r = np.hypot(x, y) + 1e-3
        side, back = (x / r)**2, y / r
        cavity = r - body.radius(x, y, z)  # signed distance to the chest cavity
        # Muscle is as wide as the chest below and has shoulders above, fat goes round it.
        upper = np.interp(z / body.top, (.45, .75, 1, 1.1), (0, 10, 16, 10)).astype(np.float32)
        taper = np.interp(z / body.top, (.6, .95, 1.1), (1, .93, .85)).astype(np.float32)
        wall = body.wall * (1 + .9 * np.exp(-((back - .9) / .14)**2) + .25 * side**2)
        waves = 1 + sum(w * np.cos((n + 2) * np.arctan2(x, y)) for n, w in enumerate(body.lobed))
        inside = (r - wall) - taper * body.radius(x, y, np.float32(.35 * body.top)) - upper * side
        skin = inside - body.fat * waves * (1.1 - .25 * back)
        hu = self.cover(skin) * 1060 - 1050
        hu += self.cover(skin + 2) * (value["fat"] - 10)
        between = np.clip(1 - np.abs(inside + .5 * wall + 2) / 3.5, 0, 1) * (cavity > 6)  # fat between muscles
        hu += self.cover(inside) * (value["muscle"] - value["fat"] - 75 * between)
        hu += self.cover(cavity + 1) * (value["fat"] + 6 - hu)
        dome = z - body.diaphragm(x, y)
        depth = np.minimum(np.minimum(-cavity, np.abs(x) - body.mediastinum(y, z)), .8 * dome)
        depth = np.minimum(depth, self.depth[k])
        tissue = (value["lung"] + value["gradient"] * y) + 8 * self.texture((k, slice(None), slice(None)), "fine", 2.5)
        tissue += 90 * np.clip(1 - np.abs(z - (105 + 62 * y / body.b) * body.scale[2]) / self.vox, 0, 1)  # oblique fissures
        lung = self.cover(-depth)
        hu += lung * (tissue - hu)
        self.hu[k], self.lung[k], self.depth[k], self.cavity[k], self.dome[k], self.skin[k] = hu, lung, depth, cavity, dome, skin

    def _ball(self, centre, radii, edge):
        where, distance = self.ellipsoid(centre, radii, reach=edge)
        return where, self.cover(distance, edge)

    def organs(self):
        """Heart, liver, spleen, stomach; the table."""
        body, hu, x, y = self.body, self.body.hu, self.x, self.y
        self.paint(self.heart_box, self.cover(self.heart), hu["blood"] + 2)
        last = min(self.shape[0], int((max(body.dome.values()) + 14 - self.origin[2]) / self.spacing[2]))
        below = (slice(0, last), slice(None), slice(None))
        inner = np.maximum(self.cavity[below], self.dome[below]) + 4  # signed distance to the abdominal cavity
        liver, spleen = np.maximum(x - 38 - .35 * y - .1 * self.z[below], y - 62), np.maximum(58 - x, 12 - y)
        self.paint(below, self.cover(np.maximum(inner, liver)), hu["liver"])
        self.paint(below, self.cover(np.maximum(inner, spleen)), hu["liver"] - 6)
        centre, radii = body.at((52, -18, 18), (30, 34, 26))
        where, distance = self.ellipsoid(centre, radii)
        distance = np.maximum(distance, self.dome[where] + 4)
        self.paint(where, self.cover(distance), 38)
        self.paint(where, self.cover(np.maximum(distance + 5, y[where[1:]] - centre[1] + 8)), -900)  # gas above fluid
        gap, value, there = body.table
        if there:
            back = float(y[self.skin[self.shape[0] // 3] < 0].max()) + gap
            rows = slice(max(0, int(self.grid((0, back - 30, 0))[1])), self.shape[1])
            top = np.abs(y[rows] - back + (x[rows] / 60)**2 * 2.5)
            self.hu[:, rows] += self.cover(top - 2) * (value - self.hu[:, rows]) * (self.skin[:, rows] > 0)

    def bone(self, distance):
        """HU across a bone: a cortex of 2 mm around marrow."""
        return self.body.hu["cortex"] + self.cover(distance + 2.2, 1) * (self.body.hu["bone"] - self.body.hu["cortex"])

    def skeleton(self):
        """Ribs with their cartilage, sternum, clavicles, scapulae."""
        body, self.ribs = self.body, self.body.ribs()
        self.stroke(np.concatenate([line[int(share * len(line)):] for line, share in self.ribs.values()]), 4.4, 95, tall=1.4)
        self.stroke(np.concatenate([line[:int(share * len(line))] for line, share in self.ribs.values()]), 4.2, self.bone, tall=1.35)
        z = np.arange(.36, .9, .012) * body.top
        front = -body.radius(np.float32(0), np.float32(-1), z.astype(np.float32)) - 7
        self.stroke(np.concatenate([np.stack((0 * z + dx, front, z), 1) for dx in (-10, -4, 4, 10)]), 4.6, self.bone)
        for sign in (-1, 1):
            clavicle = (16, front[-1] + 6, .92 * body.top), (60, front[-1] + 4, .985 * body.top), (125, 5, 1.03 * body.top)
            self.stroke(_path(np.array(clavicle) * (sign, 1, 1), 2, 20), 5.2, self.bone)
            t = np.linspace(0, 1, 22)[:, None]
            for spread in np.linspace(0, 1, 5):  # the scapula: a thin triangle behind the ribs, with a thicker lateral border
                low, high = np.array((94, 74, .5 * body.top)), np.array((84 + 44 * spread, 76 - 34 * spread, .94 * body.top))
                blade = (low + t * (high - low)) * (sign * body.scale[0], body.scale[1], 1)
                self.stroke(blade, 2.2 + 2 * (spread == 1), self.bone)

    def vertebrae(self):
        """Bodies with end plates, discs, canal, arches; self.spine and self.pitch (mm per level) are for the lesions."""
        body, z = self.body, self.z
        self.pitch = pitch = .0965 * body.top
        where, (dx, dy, _) = self.box((0, .63 * body.b + 16, 0), (42, 66, 0))
        where = (slice(None),) + where[1:]
        dx, dy = dx[None], dy[None] + .63 * body.b + 16 - body.spine(z)
        phase = ((z - body.level(1)) / pitch + .5) % 1 - .5  # 0 at a vertebra's middle, +-.5 in a disc
        width = 15.5 + 3 * (1 - z / body.top)
        plane = (np.sqrt((dx / width)**2 + (dy / (.8 * width))**2) - 1) * .88 * width
        self.paint(where, self.cover(plane), 85)  # discs
        vertebra = np.maximum(plane, (np.abs(phase) - .39) * pitch)
        self.paint(where, self.cover(vertebra), self.bone(vertebra))
        spot = dy - .8 * width - 9
        arch = np.maximum(np.abs(np.hypot(dx, spot) - 11) - 2.8, (np.abs(phase + .1) - .27) * pitch)
        spinous = np.maximum(np.maximum(np.abs(dx) - 2.8, np.abs(spot - 24) - 14),
                             (np.abs((phase + .3 + .012 * spot + .5) % 1 - .5) - .27) * pitch)
        transverse = np.maximum(np.maximum(np.abs(dx) - 32, np.abs(spot - 3 - .15 * np.abs(dx)) - 4), (np.abs(phase) - .25) * pitch)
        posterior = np.minimum(np.minimum(arch, spinous), np.maximum(transverse, 9 - np.abs(dx)))
        self.paint(where, self.cover(posterior), self.bone(posterior))
        self.paint(where, self.cover(np.hypot(dx, spot) - 8), 22)
        self.spine = where, plane, dy

    def vessels(self):
        """The great vessels and the esophagus; the trees of the lungs' arteries and veins."""
        body, blood, size = self.body, self.body.hu["blood"], self.body.scale.mean()
        self.aorta = _path(body.aorta(), 2, 24)
        self.aorta_radius = (15.5 - 4 * np.linspace(0, 1, len(self.aorta))).astype(np.float32) * size * body.aorta_scale
        self.esophagus = _path(body.at((2, 24, 250), (6, 27, 170), (3, 29, 130), (8, 27, 80), (14, 20, 48), (28, 5, 36)), 2, 20)
        self.svc = _path(body.at((-38, -16, 214), (-22, -14, 182), (-23, -13, 150), (-22, -10, 112)), 2, 12)
        tubes = [(self.aorta[::3], self.aorta_radius[::3]), (self.svc[::2], 8.5 * size), (self.esophagus[::2], 7 * size)]
        for radius, *points in ((11.5, (12, -34, 104), (13, -20, 128), (20, -2, 140), (42, 10, 140)),  # pulmonary trunk
                                (10.5, (12, -20, 130), (-8, -6, 134), (-38, 4, 134)), (6.5, (40, -14, 214), (8, -20, 188), (-20, -15, 178)),
                                (6, (-8, -12, 174), (-22, 2, 250)), (4.5, (4, -4, 176), (18, 4, 250)), (5, (18, 10, 174), (34, 12, 250)),
                                (7.5, (-30, 18, 112), (0, 12, 102), (30, 18, 112)), (3.5, (-4, 40, -20), (-5, 44, 150), (-16, 10, 160)),
                                (11, (-18, 0, 20), (-18, -4, 60))):
            tubes.append((_path(body.at(*points), 2, 14)[::1 + (radius > 6)], radius * size))
        radii = np.concatenate([np.broadcast_to(np.float32(r), len(p)) for p, r in tubes])
        self.stroke(np.concatenate([p for p, _ in tubes]), radii, blood, lung=False)
        trees = [self._tree(side, kind) for side in SIDES for kind in ("artery", "vein")]
        self.stroke(np.concatenate([p for p, _ in trees]), np.concatenate([r for _, r in trees]), blood - 4, lung=True)

    def _tree(self, side, kind):
        """A shared tree as it winds in this patient -> points (N, 3), radii (N,)."""
        body, tree = self.body, shared()[side][kind]
        points, phase, bend = tree[:, :3] * body.scale, body.twist[:, 0], body.twist[:, 1]
        wave = np.sin(points[:, (1, 2, 0)] / 38 + phase)
        points = points + wave * bend * np.clip((np.abs(points[:, :1]) - 25) / 40, 0, 1)
        return points, tree[:, 3] * body.scale.mean()

    def airways(self):
        """Walls, then lumens, of trachea and bronchi as far as they show."""
        body, self.airway = self.body, {}
        self.trachea = _path(body.at((0, 6, 262), (0, 10, 190), (-1, 15, 153)), 2)
        mains = [_path(body.at((-1, 15, 153), *ends), 2) for ends in (((-18, 12, 141), (-34, 9, 131)), ((18, 14, 139), (36, 9, 131)))]
        central = [(line, np.full(len(line), radius) * body.scale.mean()) for line, radius in zip((self.trachea, *mains), (8.6, 6.2, 6.2))]
        for side in SIDES:
            points, radii = self._tree(side, "airway")
            clear = (body.depth(points) > 1) | (np.linalg.norm(points - points[0], axis=1) < 12)
            self.airway[side] = points[clear], radii[clear]
        points, radii = (np.concatenate(parts) for parts in zip(*central, *self.airway.values()))
        points, radii = points[radii > 1.6], radii[radii > 1.6]
        self.stroke(points, radii + .7 + .05 * radii, 0)
        self.stroke(points, radii, -960)


# ------------------------------------------------------------------------------------------------ what is seen: the abnormalities
# One function each, (canvas, rng, lesion, name): draws one lesion and notes its mask under `name`.
def _rough(c, rng, centre, radii, rough, axes=None):
    """Slices and signed distance to an ellipsoid with an uneven surface (rough: a share of its radius)."""
    radii = np.broadcast_to(np.asarray(radii, np.float32), 3)
    where, distance = c.ellipsoid(centre, radii, axes, 2 * rough * float(radii.max()))
    return where, distance + rough * float(radii.mean()) * c.texture(where, "fine", 2.5, rng.integers(64))


def _focus(c, rng, lesion, margin, spread, rough, most=1e9, tilted=False):
    """A rough ellipsoid in a lesion's lobe, margin to most mm deep -> radius, centre, slices, signed distance."""
    r, centre = lesion["size"] / 2, c.body.spots(rng, 1, margin, lesion["lobe"], most=most)[0]
    radii = r * rng.uniform(*spread, 3)
    axes = np.linalg.qr(rng.standard_normal((3, 3)))[0].astype(np.float32) if tilted else None
    return r, centre, *_rough(c, rng, centre, radii, rough, axes)


def _scatter(c, rng, centre, n, spread, radii, hu, name):
    """n small round shadows around a point: satellites, tree-in-bud."""
    points = centre + rng.standard_normal((n, 3)) * spread
    c.stroke(points, rng.uniform(*radii, n), hu, name, lung=True)


def _haze(c, where, cover, rise, name):
    """Ground glass: density rises, vessels stay visible."""
    cover = cover * c.lung[where]
    c.hu[where] += np.minimum(cover * rise, np.maximum(20 - c.hu[where], 0))
    c.note(name, where, cover)


def nodule(c, rng, lesion, name):
    _, _, where, distance = _focus(c, rng, lesion, min(lesion["size"] / 2 + 2, 14), (.85, 1.1), .07)
    c.paint(where, c.cover(distance), rng.choice((rng.uniform(10, 70), rng.uniform(150, 400)), p=(.85, .15)), name, lung=True)


def mass(c, rng, lesion, name):
    """Lobulated and spiculated, with a darker core."""
    r, centre, where, distance = _focus(c, rng, lesion, .35 * lesion["size"], (.85, 1.1), .16)
    rays = rng.standard_normal((14, 3)) * r
    spicules = [_path((centre, centre + ray / np.linalg.norm(ray) * r * rng.uniform(1.2, 1.6))) for ray in rays]
    c.stroke(np.concatenate(spicules), 1.1, 0, name, lung=True)
    c.paint(where, c.cover(distance), 42 + 8 * c.texture(where, "fine", 3), name, lung=True)
    c.paint(where, c.cover(distance + .55 * r, 3), 18)


def opacity(c, rng, lesion, name):
    _, _, where, distance = _focus(c, rng, lesion, rng.uniform(6, 16), (.7, 1.15), .3, tilted=True)
    _haze(c, where, c.cover(distance, 5), rng.uniform(210, 340), name)


def consolidation(c, rng, lesion, name):
    """Filled lung with air bronchograms, at the pleura."""
    r, centre, where, distance = _focus(c, rng, lesion, 5, (.75, 1.15), .22, .3 * lesion["size"], tilted=True)
    c.paint(where, c.cover(distance, 2), rng.uniform(25, 50), name, lung=True)
    away = centre - c.body.hilum(centre)
    away = away / (np.linalg.norm(away) + 1)
    for _ in range(rng.integers(3, 7)):
        ends = centre - away * .9 * r + rng.standard_normal(3) * .25 * r, centre + away * .6 * r + rng.standard_normal(3) * .45 * r
        c.stroke(_path(ends), rng.uniform(1.5, 2.3), -850, lung=True)


def pneumonia(c, rng, lesion, name):
    """Patchy: several dense cores in one cloud of ground glass, with tree-in-bud around."""
    r, centre = lesion["size"] / 2, c.body.spots(rng, 1, 8, lesion["lobe"], most=22)[0]
    where, distance = _rough(c, rng, centre, 1.15 * r, .3)
    _haze(c, where, c.cover(distance, 6), rng.uniform(220, 320), name)
    for core in centre + rng.standard_normal((4, 3)) * .5 * r:
        where, distance = _rough(c, rng, core, r * rng.uniform(.28, .45), .3)
        c.paint(where, c.cover(distance, 3), 20, name, lung=True)
    _scatter(c, rng, centre, 36, r, (1.6, 2.8), -80, name)


def tuberculosis(c, rng, lesion, name):
    """A thick-walled cavity with satellite nodules, a calcified granuloma and strands to the apex."""
    r, centre = lesion["size"] / 2, c.body.spots(rng, 1, 10, lesion["lobe"])[0]
    _scatter(c, rng, centre, 45, 1.1 * r + 5, (1.6, 3.4), 10, name)
    for _ in range(5):
        c.stroke(_path((centre, centre + (rng.standard_normal(3) + (0, 0, 1.2)) * 18), smooth=6), 1.2, 0, name, lung=True)
    where, distance = _rough(c, rng, centre, r, .1)
    c.paint(where, c.cover(distance), 40, name, lung=True)
    c.paint(where, c.cover(distance + rng.uniform(.32, .42) * r + 1.5), -940)
    _scatter(c, rng, centre, 5, 1.2 * r, (1.6, 2.6), 600, name)


def cyst(c, rng, lesion, name):
    r = lesion["size"] / 2
    where, distance = c.ellipsoid(c.body.spots(rng, 1, min(r + 2, 15), lesion["lobe"])[0], r * rng.uniform(.85, 1.1, 3), reach=4)
    c.paint(where, c.cover(distance - 1.3), -150, name, lung=True)
    c.paint(where, c.cover(distance), -990, lung=True)


def atelectasis(c, rng, lesion, name):
    """Some plates, mostly level; or an airless wedge between spine and diaphragm, or on the heart's border."""
    size = lesion["size"]
    if lesion["what"] == "linear":
        for _ in range(rng.integers(1, 4)):
            point = c.body.spots(rng, 1, 8, lesion["lobe"])[0]
            point[2] = min(point[2], c.body.diaphragm(point[0], point[1]) + rng.uniform(10, 34))
            tilt = np.linalg.qr(np.eye(3)[[1, 2, 0]] + rng.uniform(-.35, .35, (3, 3)))[0].T.astype(np.float32)
            where, distance = _rough(c, rng, point, (rng.uniform(2.2, 4), .6 * size, .38 * size), .02, tilt)
            c.paint(where, c.cover(distance), rng.uniform(-80, 20), name, lung=True)
        return
    where, (k, n, m) = c.half(lesion["side"]), c.body.scale
    x, y, z = np.abs(c.x[where[1:]]), c.y[where[1:]], c.z
    if lesion["lobe"] in LOWER:
        wedge = (.6 * (x - 30 * k) - .6 * (y - 48 * n))[None] + .55 * (z - 52 * m) - .35 * size + 8
    else:
        wedge = np.maximum((.6 * (x - 52 * k) + .6 * (y + 34 * n))[None] - .2 * size, np.abs(z - 84 * m) - .35 * size)
    wedge = wedge + 5 * c.texture(where, "fine", 2.5, rng.integers(64))
    c.paint(where, c.cover(wedge, 1), rng.uniform(30, 55), name, lung=True)


def sequela(c, rng, lesion, name):
    """Irregular strands from the pleura towards the hilum, and a pleural cap."""
    points = c.body.spots(rng, 60, 1, lesion["lobe"], most=6)
    centre = points[np.argsort((-1 if lesion["lobe"] in UPPER else 1) * points[:, 2])[rng.integers(0, 8)]]
    hilum = c.body.hilum(centre)
    reach = lesion["size"] / np.linalg.norm(hilum - centre)
    for _ in range(rng.integers(4, 8)):
        start = centre + rng.standard_normal(3) * 9
        knots = [start + t * reach * rng.uniform(.6, 1) * (hilum - start) + rng.standard_normal(3) * 5 * (t > 0) for t in (0, .35, .7, 1)]
        c.stroke(_path(knots, smooth=5), rng.uniform(1.1, 2.1), 0, name, lung=True)
    where, distance = c.ellipsoid(centre, 20)
    c.paint(where, c.cover(np.maximum(distance, c.depth[where] - rng.uniform(3, 6))), 15, name, lung=True)
    _scatter(c, rng, centre, 2, 8, (1.5, 2.2), 500, None)


def emphysema(c, rng, lesion, name):
    """Holes without walls, mostly in the upper lobe, in lung that is thinned out."""
    where, n = c.half(lesion["side"]), lesion["n"]
    c.hu[where] -= 35 * c.lung[where] * np.clip((c.z - .35 * c.body.top) / 90, 0, 1)
    points = c.body.spots(rng, int(.75 * n), 3, lesion["lobe"]), c.body.spots(rng, int(.25 * n), 3, side=lesion["side"])
    points = np.concatenate(points)
    c.stroke(points, lesion["size"] / 2 * rng.uniform(.5, 1, len(points)), -985, name, lung=True, strength=.9)


def mosaic(c, rng, lesion, name):
    where = c.half(lesion["side"])
    pattern = np.clip(.5 + 3 * (c.texture(where, "coarse", 3, 17) + .3 * c.texture(where, "fine", 3, 5)), 0, 1) * c.lung[where]
    c.hu[where] += 165 * pattern - 45 * c.lung[where]
    c.note(name, where, pattern)


def septal(c, rng, lesion, name):
    """Thickened walls of the secondary lobules, below the pleura and at the bases."""
    where = c.half(lesion["side"])
    weight = np.clip(1.25 - c.depth[where] / 26, .1, 1) * np.clip(1.4 - 1.1 * c.z / c.body.top, .2, 1) * c.lung[where]
    walls = c.texture(where, "cells", 2.6, 9) * weight
    c.hu[where] += np.minimum(walls * 460 + weight * 30, np.maximum(20 - c.hu[where], 0))
    c.note(name, where, walls, .35)


def fibrosis(c, rng, lesion, name):
    """Honeycomb cysts and reticulation in a rind below the pleura, thickest at the bases."""
    where = c.half(lesion["side"])
    thick = np.clip(1.15 - 1.25 * c.z / c.body.top, .12, 1) * lesion["size"] * (1 + .35 * c.texture(where, "fine", 3))
    c.paint(where, c.cover(c.depth[where] - thick, 5), -840 + 780 * c.texture(where, "cells", 1.5, 4), name, lung=True)


def airway_walls(c, rng, lesion, name):
    """Soft sleeves around the central bronchi, or thick walls along the segmental ones, far into the lung."""
    central = name == "Peribronchial thickening"
    extent, least, wall, lumen, strength = (62, 0, -60, -960, .75) if central else (105, 1.9, 45, -950, 1)
    points, radii = c.airway[lesion["side"]]
    near = np.linalg.norm(points - points[0], axis=1) < extent
    points, radii = points[near], np.maximum(radii[near], least)
    c.stroke(points, radii + lesion["size"], wall, name, lung=True, strength=strength)
    c.stroke(points, radii, lumen)


def bronchiectasis(c, rng, lesion, name):
    """Wide bronchi that don't taper, with walls, running into the periphery of a lobe."""
    hilum = c.airway[lesion["side"]][0][0]
    ways = c.body.spots(rng, 9, 9, lesion["lobe"], most=26) - hilum
    lines = [_path((hilum + .3 * way, hilum + .6 * way + rng.uniform(-7, 7, 3), hilum + way), smooth=9) for way in ways]
    radii = [lesion["size"] / 2 * rng.uniform(.75, 1.1) * (1 + .2 * np.sin(np.arange(len(line)) / 2.2)) for line in lines]
    lines, radii = np.concatenate(lines), np.concatenate(radii)
    c.stroke(lines, radii + 1.9, 10, name, lung=True)
    c.stroke(lines, radii, -960, lung=True)


def effusion(c, rng, lesion, name):
    """Fluid that has sunk to the back: a crescent, thickest at the base."""
    where, size = c.half(lesion["side"]), lesion["size"]
    back = np.clip(.45 + .75 * (c.y[where[1:]] / c.body.b), 0, 1.1)[None]
    thick = size * back * np.clip(1.25 - c.z / (.35 + .009 * size) / c.body.top, 0, 1)
    cover = c.cover(np.minimum(c.depth[where], -c.cavity[where]) - thick) * c.lung[where] * (thick > 1)
    c.paint(where, cover, rng.uniform(2, 18), name, lung=False)


def empyema(c, rng, lesion, name):
    """A lens of thick fluid behind thick pleura, with gas; it does not follow gravity."""
    angle, size = math.radians(rng.uniform(70, 145)), lesion["size"]
    z = np.float32(c.body.top * rng.uniform(.3, .55))
    out = np.array((SIGN[lesion["side"]] * math.sin(angle), -math.cos(angle), 0), np.float32)
    centre = out * (float(c.body.radius(out[0], out[1], z)) - .3 * size) + np.array((0, 0, z))
    axes = np.stack((out, (-out[1], out[0], 0), (0, 0, 1))).astype(np.float32)
    where, distance = c.ellipsoid(centre, (.62 * size, .95 * size, 1.2 * size), axes, 3)
    c.paint(where, c.cover(np.maximum(distance, c.cavity[where] + 1)) * (c.lung[where] > .02), 65, name, lung=False)
    c.paint(where, c.cover(np.maximum(distance + 5.5, c.cavity[where] + 6)), rng.uniform(22, 34))
    bubbles = centre + rng.uniform(-1, 1, (9, 3)) * size * (.25, .25, .6) - np.array((0, .25 * size, 0))
    c.stroke(bubbles, rng.uniform(2, 5, 9), -900)


def pneumothorax(c, rng, lesion, name):
    """Air without vessels between chest wall and a fine pleural line; thickest at the front and the apex."""
    where = c.half(lesion["side"])
    x, y, lung = c.x[where[1:]], c.y[where[1:]], c.lung[where].copy()
    front = np.clip(.45 - .8 * y / (np.hypot(x, y) + 1), 0, 1.2)[None]
    thick = lesion["size"] * (front + np.clip(c.z / c.body.top - .72, 0, .3) * 3)
    gap, there = -c.cavity[where] - thick, thick > 3
    c.hu[where] += (1 - c.cover(gap) * lung * there) * lung * 30
    c.paint(where, np.clip(1 - np.abs(gap) / c.vox, 0, 1) * lung * there * .6, -150)
    c.paint(where, c.cover(gap + 1.2) * lung * there, -1000, name, lung=False)


def pleural_calcification(c, rng, lesion, name):
    for _ in range(rng.integers(2, 5)):
        angle, z = math.radians(rng.uniform(50, 150)), rng.uniform(.2, .65) * c.body.top
        arc, up = lesion["size"] / 2 * rng.uniform(.6, 1) * rng.uniform(-1, 1, (2, 90))
        angle, z = angle + arc / 105, (z + up).astype(np.float32)
        x, y = SIGN[lesion["side"]] * np.sin(angle), -np.cos(angle)
        r = c.body.radius(x, y, z) - 2
        c.stroke(np.stack((x * r, y * r, z), 1), rng.uniform(1.4, 2.6, 90), rng.uniform(450, 800), name)


def lymph_nodes(c, rng, lesion, name):
    x, y, z = STATIONS[lesion["what"]]
    centre = c.body.at((x * SIGN[lesion["side"]] if lesion["what"] == "axillary" else x, y, z))[0] + rng.uniform(-3, 3, 3)
    for k in range(rng.integers(1, 4)):
        r = lesion["size"] / 2 * (1 if k == 0 else rng.uniform(.5, .8))
        place = centre + (rng.uniform(-1, 1, 3) * 1.2 * r * (1, .6, 1.4) if k else 0)
        where, distance = c.ellipsoid(place, r * rng.uniform(.75, 1, 3) + (0, 0, .15 * r))
        c.paint(where, c.cover(distance), rng.uniform(36, 58), name, lung=False)


def hernia(c, rng, lesion, name):
    """Stomach behind the heart: a wall around food and fat, usually with a gas-fluid level."""
    r = lesion["size"] / 2
    centre = np.array((10, .36 * c.body.b, c.body.dome["left"] + .55 * r)) + rng.uniform(-4, 4, 3)
    where, distance = c.ellipsoid(centre, r * np.array((1.1, .85, .9)))
    c.paint(where, c.cover(distance), 45, name, lung=False)
    c.paint(where, c.cover(distance + 4.5), rng.uniform(5, 30))
    level = c.y[where[1:]] - centre[1] + rng.uniform(-.2, .35) * r
    if rng.random() < .75:
        c.paint(where, c.cover(np.maximum(distance + 4.5, level)), -900)


def enlarged_heart(c, rng, lesion, name):
    c.note(name, c.heart_box, c.cover(c.heart))  # drawn with the anatomy


def pericardial_effusion(c, rng, lesion, name):
    """Water around the heart outside a layer of epicardial fat, deeper behind and below."""
    where = c.heart_box
    thick = lesion["size"] * np.clip(.75 + .35 * (c.y[where[1:]] + 24) / 50, .4, 1.15)
    fluid = c.cover(np.maximum(np.maximum(c.heart - 4 - thick, c.cavity[where] + 2), 3 - c.dome[where]))
    c.paint(where, fluid, rng.uniform(4, 16), lung=False)
    c.note(name, where, fluid * (1 - c.cover(c.heart - 4)))
    c.paint(where, c.cover(c.heart - 4), -85)
    c.paint(where, c.cover(c.heart), c.body.hu["blood"])


def _on_heart(c, directions, lift):
    centre, radii, axes = c.body.heart()
    return centre + (directions / np.linalg.norm(directions, axis=1, keepdims=True) * radii * lift) @ axes


def pericardial_calcification(c, rng, lesion, name):
    for _ in range(rng.integers(4, 7)):
        point = rng.standard_normal(3) + (0, 0, -.5)
        spread = point / np.linalg.norm(point) + rng.standard_normal((110, 3)) * .26
        c.stroke(_on_heart(c, spread, 1.07), lesion["size"] * rng.uniform(.3, .55, 110), rng.uniform(500, 900), name)


def coronary(c, rng, lesion, name):
    """Dashes of calcium along an artery's course on the heart."""
    start, end = np.array({"LAD": ((-.35, -.5, .8), (.75, -.55, .35)), "LCX": ((-.35, -.1, .9), (.1, .9, .45)),
                           "RCA": ((-.6, -.75, .3), (-.55, .1, -.85))}[lesion["what"]])
    t = np.linspace(0, 1, 40)[:, None]
    points = _path(_on_heart(c, start * (1 - t) + end * t, 1.03), 1)
    first = rng.integers(0, max(1, min(18, len(points) - 12)))
    part = points[first:first + lesion["size"]]
    dashes = part[np.sin(np.arange(len(part)) * .5 + rng.uniform(0, 6)) > -.6]
    c.stroke(dashes, rng.uniform(1.7, 2.6), rng.uniform(550, 1000), name)


def aortic_calcification(c, rng, lesion, name, radii=(1.2, 2)):
    """Calcified plaques in the wall of the aortic arch and the descending aorta."""
    for _ in range(lesion["n"]):
        i = rng.integers(int(.22 * len(c.aorta)), int(.9 * len(c.aorta)))
        run = slice(i, i + max(2, int(lesion["size"] * rng.uniform(.5, 1) / 2)))
        along = c.aorta[min(i + 1, len(c.aorta) - 1)] - c.aorta[i - 1]
        u, v = np.linalg.svd(along[None] / np.linalg.norm(along))[2][1:]
        arc = rng.uniform(0, 2 * math.pi) + np.linspace(-.3, .3, 5)[:, None, None] * rng.uniform(.5, 1.5)
        points = c.aorta[run] + c.aorta_radius[run, None] * (np.cos(arc) * u + np.sin(arc) * v)
        c.stroke(points.reshape(-1, 3), rng.uniform(*radii), rng.uniform(500, 1000), name)


def atherosclerosis(c, rng, lesion, name):
    """A wide, long aorta with soft plaque inside its wall and coarse calcified plaques on it."""
    index, distance = c.tube(c.aorta, c.aorta_radius)
    flat = c.hu.reshape(-1)
    flat[index] += c.cover(distance + 1) * (12 - flat[index])
    lumen = c.aorta_radius - lesion["size"] * (.6 + .4 * np.sin(np.arange(len(c.aorta)) / 4))
    c.stroke(c.aorta, lumen, c.body.hu["blood"] + 6)
    aortic_calcification(c, rng, {"n": 26, "size": 26}, name, (1.8, 2.8))
    if c.masks is not None:
        c.masks[name].reshape(-1)[index[distance < 0]] = True


def pneumomediastinum(c, rng, lesion, name):
    """Streaks of air along trachea, great vessels and heart, outside the lungs."""
    guides = [(c.trachea, 11), (c.esophagus, 9), (c.svc, 10), (c.aorta[:len(c.aorta) // 2], 17)]
    for _ in range(26):
        guide, off = guides[rng.integers(len(guides))]
        start = rng.integers(0, max(1, len(guide) - 12))
        part, angle = guide[start:start + rng.integers(10, 26)], rng.uniform(0, 6.3) + np.arange(26) * .06
        outside = part + np.stack((np.cos(angle), np.sin(angle), 0 * angle), 1)[:len(part)] * (off + rng.uniform(0, 4))
        c.stroke(outside[c.body.depth(outside) < 1], lesion["size"] * rng.uniform(.3, .55), -940, name)
    front = _on_heart(c, rng.standard_normal((60, 3)) * .4 + (0, -1, .6), 1.06)
    c.stroke(front[c.body.depth(front) < 3], lesion["size"] * .45, -920, name)


def osteophyte(c, rng, lesion, name):
    """Beaks of bone at the front and side corners of two neighbouring end plates."""
    edge = c.body.level(int(lesion["what"][1:])) - .5 * c.pitch
    for sign in (-1, 1) if lesion["side"] == "both" else (SIGN[lesion["side"]],):
        for up in (-1, 1):
            z = edge + up * .16 * c.pitch
            base = np.array((sign * 13, c.body.spine(z) - 9, z))
            beak = _path((base, base + np.array((sign * .75, -.75, -up * .5)) * lesion["size"] * 1.15), 1)
            c.stroke(beak, np.linspace(4.6, 2.2, len(beak)), 620 * c.body.bone_age, name, lung=False)


def spondylosis(c, rng, lesion, name):
    """A narrowed disc between dense end plates."""
    where, plane, dy = c.spine
    z = c.z - (c.body.level(int(lesion["what"][1:])) - .5 * c.pitch)
    c.paint(where, c.cover(np.maximum(plane - 2, np.abs(z) - .3 * c.pitch)), c.body.hu["cortex"] * 1.1, name)
    disc = np.maximum(plane, np.abs(z - .08 * dy) - rng.uniform(.8, 1.6))
    c.paint(where, c.cover(disc), rng.choice((70, -300)))


def rib_fracture(c, rng, lesion, name):
    """A gap, the far end stepped inwards or outwards, some callus and a haematoma below it."""
    line, _ = c.ribs[lesion["side"], lesion["rib"]]
    i = int(rng.uniform(.3, .6) * len(line))
    out = line[i] * (1, 1, 0) / np.linalg.norm(line[i, :2])
    step = out * lesion["size"] * rng.choice((-1, 1), p=(.6, .4))
    c.stroke(line[i:i + 9], 7.5, c.body.hu["muscle"])
    c.stroke(line[i - 1:i + 3] - out * 5, 7.5, 60, name, lung=False)
    far = line[i + 1:i + 9] + step * np.linspace(1, 0, 8)[:, None] * 1.1
    c.stroke(far, 4.3, c.bone, name, lung=False, tall=1.35)
    c.stroke(line[i - 2:i] + step * .3, 5.5, 350, name)


def _under_skin(c, sign):
    """A point under the skin at the front of the chest, below a clavicle."""
    for r in range(60, 190):
        point = np.array((sign * .55 * r, -.83 * r, .83 * c.body.top))
        i, j, _ = np.rint(c.grid(point)).astype(int)
        if not (0 <= i < c.shape[2] and 0 <= j < c.shape[1]) or c.skin[0, j, i] > -12:
            break
    return point


def _implant(c, sign, vein, name, pacemaker):
    """A pacemaker with its lead, or a port with its catheter."""
    can = _under_skin(c, sign)
    where, distance = c.ellipsoid(can, (23, 8, 20) if pacemaker else (12, 8, 12))
    c.paint(where, c.cover(distance), 3000 if pacemaker else 1500, name)
    centre, radii, axes = c.body.heart()
    end = centre + (np.array(((.0, -.3, -.3), (.6, -.4, -.4))) * radii) @ axes if pacemaker else vein[-1:]
    c.stroke(_path(np.concatenate(([can], vein, end)), 1, 12), 1.5 if pacemaker else 1.7, 2400 if pacemaker else 1200, name)


def device(c, rng, lesion, name):
    body, what, sign = c.body, lesion["what"], SIGN[lesion["side"]]
    angle = np.linspace(0, 2 * math.pi, 40 if "sternotomy" in what else 60)
    x, y = np.cos(angle), np.sin(angle)
    if "pacemaker" in what or "port" in what:
        vein = np.concatenate((body.at((sign * 70, -30, 206), (sign * 42, -16, 214)), c.svc[len(c.svc) // 3:]))
        _implant(c, sign, vein, name, "pacemaker" in what)
    elif "venous" in what:
        c.stroke(_path(np.concatenate((body.at((-42, -12, 250), (-40, -16, 214)), c.svc[8:])), 1, 8), 1.7, 1500, name)
    elif "sternotomy" in what:
        for z in np.linspace(.45, .86, rng.integers(5, 7)) * body.top:
            front = -body.radius(np.float32(0), np.float32(-1), np.float32(z)) - 7
            c.stroke(np.stack((15 * x, front + 8 * y, z + 3 * y), 1), 1.2, 2600, name)
    elif "endotracheal" in what:
        tube = c.trachea[c.trachea[:, 2] > .8 * body.top]
        for line, radius, hu, mark in ((tube, 6, 350, name), (tube, 4, -940, None), (tube + (5, 0, 0), 1, 1800, name)):
            c.stroke(line, radius, hu, mark)
    elif "valve" in what:
        c.stroke(c.aorta[3] + np.stack((13 * x, 5 * y, 13 * y), 1), 2.2, 2800, name)
    elif "chest tube" in what:
        tube = _path(((sign * (body.a + 22), 10, .38 * body.top), (sign * (body.a - 4), 25, .45 * body.top),
                      (sign * .8 * body.a, .55 * body.b, .6 * body.top), (sign * .45 * body.a, .5 * body.b, .8 * body.top)), 1.5, 30)
        for line, radius, hu, mark in ((tube, 5, 500, name), (tube, 2.8, -950, None), (tube + (0, 4, 0), .9, 2000, name)):
            c.stroke(line, radius, hu, mark)
    else:
        c.stroke(np.concatenate((c.esophagus, _path(body.at((28, 5, 36), (48, -10, 22)), 2))), 2.2, 900, name)


DRAW = {  # in the order in which they are drawn: diffuse, focal, pleural, mediastinal, bony, foreign
    "Mosaic attenuation pattern": mosaic, "Emphysema": emphysema, "Interlobular septal thickening": septal, "Pulmonary fibrosis": fibrosis,
    "Lung opacity": opacity, "Peribronchial thickening": airway_walls, "Bronchial thickening": airway_walls,
    "Bronchiectasis": bronchiectasis, "Lung cyst": cyst, "Pulmonary fibrotic sequela": sequela, "Pneumonia": pneumonia,
    "Consolidation": consolidation, "Atelectasis": atelectasis, "Tuberculosis": tuberculosis, "Lung nodule": nodule, "Lung mass": mass,
    "Pleural effusion": effusion, "Pneumothorax": pneumothorax, "Empyema": empyema, "Pleural calcification": pleural_calcification,
    "Cardiomegaly": enlarged_heart, "Pericardial effusion": pericardial_effusion, "Hiatal hernia": hernia, "Lymphadenopathy": lymph_nodes,
    "Atherosclerosis": atherosclerosis, "Arterial wall calcification": aortic_calcification,
    "Coronary artery wall calcification": coronary, "Pericardial calcification": pericardial_calcification,
    "Pneumomediastinum": pneumomediastinum, "Osteophyte": osteophyte, "Spondylosis": spondylosis, "Rib fracture": rib_fracture,
    "Medical material": device}


def _body(seed, split, index, found):
    return Anatomy(random.Random(f"anatomy {seed} {split} {patient_of(seed, split, index)[0]}"), found)


def reconstructions(seed, split, index):
    """The reconstructions of a scan (one to three): pixels, spacing in mm, noise in HU, kernel, axes, stored rescale."""
    rng = random.Random(f"acquisition {seed} {split} {index}")
    body = _body(seed, split, index, {})
    width = 2 * (body.a + 1.35 * body.wall + 1.15 * body.fat) + rng.uniform(8, 34)
    pixels = min(128, max(112, round(width / rng.uniform(2.6, 3.1))))
    xy = round(min(3.2, max(2.6, width / pixels)), 3)
    axes = rng.choice(("LPS", "LPS", "LPS", "RAS", "LAS", "RPS", "LPI"))
    others = rng.sample((1., 1.5, 2., 2.5, 3.), 5)
    first = rng.choices((1., 1.5, 2., 2.5, 3.), (3, 7, 28, 32, 30))[0]
    thickness = [first] + [t for t in others if t != first and t >= 1.5]
    return [{"pixels": pixels, "xy": xy, "dz": thickness[i], "noise": rng.uniform(8, 24), "kernel": rng.choice(("soft", "sharp")),
             "axes": axes, "intercept": rng.choice((-1024, -1024, -8192)), "roll": rng.randrange(1_000_000)}
            for i in range(rng.choices((1, 2, 3), (85, 12, 3))[0])]


def draw(seed, split, index, reconstruction=0, found=None, masks=True):
    """Draw one reconstruction of a scan, just as `write` does.

    Returns (hu int16 [X, Y, Z] as stored, affine (4, 4) to RAS mm, spacing (x, y, z) in mm, findings, masks: name -> bool [X, Y, Z]).
    found overrides the scan's findings (the same patient with other abnormalities).
    """
    found = findings(seed, split, index) if found is None else found
    how = reconstructions(seed, split, index)[reconstruction]
    body = _body(seed, split, index, found)
    c = Canvas(body, how["pixels"], how["xy"], how["dz"], masks)
    for name, function in DRAW.items():
        for lesion in found.get(name, ()):
            function(c, np.random.default_rng([int(p * 2**32) for p in lesion["place"]]), lesion, name)
    volume, noise = c.hu, shared()["noise"]
    for shift, weight in ((0, 1),) if how["kernel"] == "sharp" else ((0, .65), (1, .53), (how["pixels"], .53)):
        start = how["roll"] + shift
        volume += (how["noise"] * weight) * noise[start:start + volume.size].reshape(volume.shape)
    volume = np.rint(np.clip(volume, -1024, 3071, out=volume), out=volume).astype(np.int16)
    forward = np.array([code in "LPS" for code in how["axes"]])
    flips = tuple(slice(None, None, 1 if code else -1) for code in forward)
    corner = c.origin + body.offset + np.where(forward, 0, c.spacing * (np.array(volume.shape[::-1]) - 1))
    to_ras = np.array((-1, -1, 1))
    affine = np.diag((*(to_ras * np.where(forward, 1, -1) * c.spacing), 1.))
    affine[:3, 3] = to_ras * corner
    return volume.T[flips], affine, c.spacing, found, {name: mask.T[flips] for name, mask in (c.masks or {}).items()}


# ------------------------------------------------------------------------------------------------ what is written
SUFFIX = {1: "", 2: "_fixed"}  # of the folders of each of CT-RATE's releases
LONG = {"train": "train", "valid": "validation"}
TABLES = {  # path below the root -> columns; {} is the split
    "radiology_text_reports/{}_reports.csv": ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"],
    "metadata/{}_metadata.csv": ["VolumeName", "Manufacturer", "ConvolutionKernel", "PatientSex", "RescaleSlope", "RescaleIntercept",
                                 "XYSpacing", "ZSpacing", "ImagePositionPatient", "ImageOrientationPatient"]}


def scan_name(seed, split, index):
    """CT-RATE's name of a scan: split, patient, scan of that patient (a, b)."""
    patient, second = patient_of(seed, split, index)
    return f"{split}_{patient + 1}_{'ab'[second]}"


def volume_path(name, release=2):
    """A volume's place below the root, from its name without .nii.gz: train_fixed/train_1/train_1_a/train_1_a_1.nii.gz."""
    split, patient, scan, _ = name.split("_")
    return Path(split + SUFFIX[release], f"{split}_{patient}", f"{split}_{patient}_{scan}", name + ".nii.gz")


def _atomic(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _nifti(array, affine):
    """The bytes of a .nii.gz: the same for the same input (no time, no file name)."""
    header = nib.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_qform(affine, 1)
    header.set_sform(affine, 1)
    header.set_xyzt_units("mm")
    header.set_slope_inter(1, 0)
    header["vox_offset"] = 352
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return packer.compress(header.binaryblock + bytes(4)) + packer.compress(array.tobytes(order="F")) + packer.flush()


def _write_scan(job):
    """Write the volumes (and masks) of a scan that are not there yet."""
    out, seed, split, index, release, masks = job
    for k, how in enumerate(reconstructions(seed, split, index)):
        name = f"{scan_name(seed, split, index)}_{k + 1}"
        path, mask_path = out / volume_path(name, release), out / "masks" / f"{name}.nii.gz"
        masked = masks and split == "valid"
        if path.exists() and (mask_path.exists() or not masked):
            continue
        hu, affine, _, _, drawn = draw(seed, split, index, k, masks=masked)
        if masked:
            bits = sum((mask.astype(np.int64) << ABNORMALITIES.index(name) for name, mask in drawn.items()), np.zeros(hu.shape, np.int64))
            _atomic(mask_path, _nifti(bits, affine))
        if release == 1:  # raw values; neither rescale nor spacing in the header
            hu = hu - np.int16(how["intercept"])
            affine = np.diag((*np.sign(np.diag(affine)[:3]), 1.))
        _atomic(path, _nifti(hu, affine))
    return len(reconstructions(seed, split, index))


def _csv(path, header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    _atomic(path, text.getvalue().encode())


def _write_tables(out, seed, counts, release):
    """Reports, metadata and labels of all volumes."""
    rare = []
    for split, n in counts.items():
        texts, metadata, labels = [], [], []
        for index in range(n):
            rng, found = random.Random(f"report {seed} {split} {index}"), findings(seed, split, index)
            body = _body(seed, split, index, found)
            text = [rng.choice(SITUATIONS), rng.choice(TECHNIQUES), *(part or "Not given." for part in report(found, rng))]
            for k, how in enumerate(reconstructions(seed, split, index)):
                name, xy = f"{scan_name(seed, split, index)}_{k + 1}.nii.gz", how["xy"]
                position = [round(float(p), 3) for p in Canvas.corner(body, how["pixels"], xy) + body.offset]
                texts.append([name, *text])
                metadata.append([name, "Phantom", how["kernel"], "F" if body.female else "M", 1, how["intercept"] if release == 1 else 0,
                                 f"[{xy}, {xy}]", how["dz"], str(position), "[1, 0, 0, 0, 1, 0]"])
                labels.append([name, *(int(a in found) for a in CT_RATE)])
                rare.append([name, *(int(a in found) for a in CT_RATE_LT)])
        for (path, columns), rows in zip(TABLES.items(), (texts, metadata)):
            _csv(out / path.format(LONG[split]), columns, rows)
        _csv(out / f"multi_abnormality_labels/{split}_predicted_labels.csv", ["VolumeName", *CT_RATE], labels)
    _csv(out / "multi_abnormality_labels/ct_rate_lt_labels.csv", ["VolumeName", *CT_RATE_LT], rare)


def write(out, train, valid, seed=0, release=2, workers=None, masks=False):
    """Write `train` and `valid` scans below `out` in CT-RATE's layout; what is there already stays: the same call finishes a killed run.

    release 2: HU and true spacing in the files; release 1: raw values that need the metadata's rescale and spacing. masks: also
    masks/<volume>.nii.gz of the valid split, int64, bit k set where abnormality ABNORMALITIES[k] was drawn. phantom.json comes last.
    Raises ValueError where `out` holds a phantom of another seed, release or version.
    """
    out = Path(out)
    stamp, begun, settings = out / "phantom.json", out / "phantom.begun.json", {"version": VERSION, "seed": seed, "release": release}
    if release not in SUFFIX or train < 0 or valid < 0 or train + valid == 0:
        raise ValueError(f"release must be 1 or 2, the counts 0 or more, not both 0: got release {release}, train {train}, valid {valid}")
    for path in (begun, stamp):
        if path.exists():
            other = {key: json.loads(path.read_text()).get(key) for key in settings}
            if other != settings:
                raise ValueError(f"{path}: holds a phantom of {other}, not {settings}; choose another --out or delete it")
    for partial in out.rglob(".*.part"):  # left by a killed run
        partial.unlink()
    _atomic(begun, json.dumps(settings).encode())
    counts = {"train": train, "valid": valid}
    jobs = [(out, seed, split, index, release, masks) for split, n in counts.items() for index in range(n)]
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    with tqdm(total=len(jobs), desc="phantom", unit="scan", mininterval=1) as bar:
        if workers == 1:
            for job in jobs:
                _write_scan(job)
                bar.update()
        else:  # fork where it is safe: workers need nothing but numpy, and importing the caller again may be slow
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            with ProcessPoolExecutor(workers, mp_context=context) as pool:
                for _ in pool.map(_write_scan, jobs, chunksize=4):
                    bar.update()
    _write_tables(out, seed, counts, release)
    _atomic(stamp, (json.dumps(settings | counts | {"masks": masks}) + "\n").encode())
    begun.unlink()
    return out


# ------------------------------------------------------------------------------------------------ a contact sheet
LUNG, SOFT, BONE = (-1300, 200), (-180, 240), (-600, 1300)  # windows: HU of black and white
VIEWS = {"Medical material": (BONE, 1), "Osteophyte": (BONE, 1), "Rib fracture": (BONE, 2), "Spondylosis": (BONE, 0),
         "Emphysema": (LUNG, 1)}  # window and plane: 0 sagittal, 1 coronal, 2 axial; the others axial
VIEWS |= {name: (SOFT, 2) for name in (
    "Normal, soft tissue", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion", "Hiatal hernia", "Lymphadenopathy",
    "Coronary artery wall calcification", "Pleural effusion", "Empyema", "Atherosclerosis", "Pericardial calcification",
    "Pleural calcification")}


def preview(path, seed=0):
    """Write a PNG with one example of each abnormality in an otherwise normal patient, outlined, after two normal patients."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(5, 7, figsize=(21, 16), facecolor="black")
    for k, (axis, name) in enumerate(zip(axes.flat, ["Normal, lung window", "Normal, soft tissue", *ABNORMALITIES])):
        rng = random.Random(f"preview {seed} {name}")
        lesions = LESIONS[name](rng) if name in LESIONS else []
        found = {name: [lesion | {"place": tuple(rng.random() for _ in range(3))} for lesion in lesions]}
        hu, affine, spacing, _, masks = draw(seed, "preview", k, found=found)
        to_lps = tuple(slice(None, None, step) for step in np.where(np.diag(affine)[:3] * (-1, -1, 1) > 0, 1, -1))
        hu, mask = hu[to_lps], masks.get(name, np.zeros(hu.shape, bool))[to_lps]
        (black, white), plane = VIEWS.get(name, (LUNG, 2))
        at = int(np.argmax(mask.sum(tuple({0, 1, 2} - {plane})))) if lesions else hu.shape[2] // 2
        image, outline = np.take(hu, at, plane).T, np.take(mask, at, plane).T
        aspect = (spacing[2] / spacing[1], spacing[2] / spacing[0], 1)[plane]
        axis.imshow(image, cmap="gray", vmin=black, vmax=white, aspect=aspect, interpolation="bicubic",
                    origin="upper" if plane == 2 else "lower")
        if outline.any():
            grown = sum(np.roll(outline, shift, way) for way in (0, 1) for shift in (-2, 2)) + outline > 0
            axis.contour(grown, [.5], colors="#ffd400", linewidths=.6)
        axis.set_title(name, color="white", fontsize=13)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=72, facecolor="black")
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     epilog="example: python phantom.py --out data/phantom --train 800 --valid 200 --seed 0")
    parser.add_argument("--out", help="folder to write the benchmark to")
    parser.add_argument("--train", type=int, default=800, help="training scans (800)")
    parser.add_argument("--valid", type=int, default=200, help="test scans, of other patients (200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--release", type=int, default=2, help="CT-RATE's release whose conventions to follow: 1 raw values, 2 HU (2)")
    parser.add_argument("--workers", type=int, help="processes (all cores)")
    parser.add_argument("--masks", action="store_true", help="also write the test split's lesion masks")
    parser.add_argument("--preview", metavar="FILE.png", help="write a contact sheet of all abnormalities")
    options = parser.parse_args(arguments)
    try:
        if not options.out and not options.preview:
            raise ValueError("give --out DIR, --preview FILE.png, or both")
        if options.workers is not None and options.workers < 1:
            raise ValueError(f"--workers must be 1 or more, got {options.workers}")
        if options.preview:
            preview(options.preview, options.seed)
        if options.out:
            write(options.out, options.train, options.valid, options.seed, options.release, options.workers, options.masks)
    except (ValueError, OSError) as error:
        print(f"phantom.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
