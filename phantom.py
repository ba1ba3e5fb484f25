"""A synthetic chest-CT benchmark on disk, in CT-RATE's layout, with 33 abnormalities.

A scan is one patient's anatomy, abnormalities drawn from what they look like on CT, and a report
that affirms just those. All follows from (seed, split, index): the same bytes for any number of
workers; a larger count extends a smaller one. HU of a voxel, for each shape that is drawn there:
hu += cover * (shape's hu - hu), cover = clip(1/2 - distance to its surface / voxel, 0, 1).

    python phantom.py --out data/phantom --train 800 --valid 200 --seed 0  # resumes a killed run
    python phantom.py --preview preview.png  # a contact sheet: each abnormality, outlined

Which abnormalities a scan has and what its report says stands in phantom_reports.py. Here: the
patient, the canvas, the normal patient on it, the abnormalities, one reconstruction, what is
written, a contact sheet.
"""
import argparse
import csv
import io
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import tomllib
from concurrent.futures import ProcessPoolExecutor
from copy import copy
from functools import cache, reduce
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
from isal import isal_zlib
from numpy import arange, array, clip, concatenate, cos, hypot, linspace, maximum, minimum, sin
from numpy.linalg import norm
from numpy.random import default_rng
from tqdm import tqdm

from data import run_command, sweep, write_atomically
from phantom_reports import (
    ABNORMALITIES,
    CT_RATE,
    CT_RATE_LT,
    LESIONS,
    LOBES,
    SIDES,
    SIGN,
    SITUATIONS,
    STATIONS,
    TECHNIQUES,
    UPPER,
    findings,
    patient_of,
    report,
)

VERSION = 5  # raise it whenever the bytes written for a seed change
DATA = tomllib.loads((Path(__file__).parent / "resources/phantom_scans.toml").read_text("utf-8"))


# ---------------------------------------------------------------------------------- the patient
# All is drawn in the mean patient, in mm: x to the left, y to the back, z up from the lowest point
# of the lungs, (0, 0) in the middle of the chest. A patient is this one with an anatomy of its own,
# stretched along the axes. Shapes are given by their signed distance, in mm, negative inside.
WIDE, DEEP, HIGH = 122, 86, 226  # half the chest's width and depth, the height of the lungs
PITCH = 21.8  # height of a vertebra with its disc
TUBES = DATA["vessels"] | DATA["airways"]


def f32(values):
    """An array of float32."""
    return np.asarray(values, np.float32)


def profile(name, at):
    """A quantity that changes along the body, at some places along it."""
    return f32(np.interp(at, *DATA["profiles"][name]))


def path(points, n=100):
    """A polyline (N, 3) as n points."""
    corners = arange(len(points))
    at = linspace(0, corners[-1], n)
    return f32([np.interp(at, corners, axis) for axis in zip(*points)]).T


def joined(tubes):
    """[(line (N, 3), radius or radii)] -> the points of all, their radii."""
    lines = [line for line, _ in tubes]
    radii = [np.broadcast_to(radius, len(line)) for line, radius in tubes]
    return concatenate(lines), concatenate(radii)


def ellipsoid(at, centre, radii, axes=np.eye(3)):
    """Signed distance, roughly, of points (x, y, z) to an ellipsoid whose axes are rows."""
    x, y, z = (place - middle for place, middle in zip(at, f32(centre)))
    squares = 0
    for (a, b, c), radius in zip(f32(axes), f32(radii)):
        squares = squares + ((x * a + y * b + z * c) / radius) ** 2
    return (np.sqrt(squares) - 1) * f32(min(radii))


def level(number):
    """Height of the middle of thoracic vertebra `number`."""
    return 236 - PITCH * (number - 1)


def spine(z):
    """y of the vertebrae's middle."""
    return 44 + 8 * (1 - ((z - 120) / 130) ** 2)


class Anatomy:
    """One patient's shapes and tissue values, from a random.Random and the scan's lesions."""

    def __init__(self, rng, lesions):
        u = rng.uniform
        self.female = rng.random() < .48
        self.scale = f32((u(.89, 1.05), u(.86, 1.07), u(.9, 1.06))) - .04 * self.female
        self.offset = f32((u(-30, 30), u(-180, -120), u(-900, 200)))  # of the scanner
        for quantity, limits in DATA["patient"].items():
            setattr(self, quantity, u(*limits))
        for name, quantity in (("Cardiomegaly", "heart_scale"), ("Atherosclerosis", "aorta_scale")):
            if name in lesions:
                setattr(self, quantity, lesions[name][0]["scale"])

    # Chest and lungs.
    def ring(self, x, y):
        """How far out (x, y) lies: 1 on the chest's inner wall where it is widest."""
        return (abs(x / WIDE) ** self.boxy + abs(y / DEEP) ** self.boxy) ** (1 / self.boxy)

    def cavity(self, x, y, z):
        """Signed distance, roughly, to the chest's inner wall."""
        return 100 * (self.ring(x, y) - profile("chest", z))

    def muscle(self, x, y, z):
        """Signed distance, roughly, to the muscles' surface."""
        return 100 * (self.ring(x, y) - profile("trunk", z)) - self.wall

    def rim(self, angle, z, out=0):
        """Points (N, 3) on the chest's inner wall, out mm outside it, at angles from the front."""
        x, y = sin(angle), -cos(angle)
        r = maximum(profile("chest", z), .3) / self.ring(x, y) + out
        return f32(np.broadcast_arrays(x * r, y * r, z)).T

    def diaphragm(self, x, y):
        """Its height: two domes, which fall towards the rim and the back."""
        deep = ((y + 12) / 75) ** 2
        right, left = (np.exp(-((x + side) / 58) ** 2 - deep) for side in (48, -48))
        return self.right_dome * right + self.left_dome * left

    def heart_distance(self, *at):
        """Signed distance, roughly, to the heart's surface."""
        centre, radii, axes = DATA["heart"].values()
        return ellipsoid(at, centre, array(radii) * self.heart_scale, axes)

    def on_heart(self, directions, lift):
        """Points on the heart's surface, lifted by a factor, in directions (N, 3) in its axes."""
        centre, radii, axes = DATA["heart"].values()
        unit = directions / norm(directions, axis=1, keepdims=True)
        return centre + unit * radii * self.heart_scale * lift @ array(axes)

    def depth(self, x, y, z):
        """How deep points lie in a lung, mm (negative: outside)."""
        chest, heart = -self.cavity(x, y, z), self.heart_distance(x, y, z) - 2
        medial = abs(x) - profile("mediastinum", y)
        basal = .8 * (z - self.diaphragm(x, y))
        return reduce(minimum, (chest, heart, medial, basal))

    def spots(self, rng, n, place, least, most=1e9):
        """n points in a lobe or on a side, least to most mm deep as far as it has such."""
        points = f32(rng.uniform((-WIDE, -DEEP, 0), (WIDE, DEEP, HIGH), (4000, 3)))
        x, y, z = points.T
        depth = self.depth(x, y, z)
        lower, middle = z < 105 + .72 * y, z < 116  # the oblique and horizontal fissures
        lobe = array(LOBES)[np.where(x < 0, np.where(lower, 2, middle), 3 + lower)]
        there = np.char.startswith(lobe, place) & (depth > 1)
        wrong = abs(depth - clip(depth, least, most))[there]
        return points[there][wrong.argsort(kind="stable")[:n]]

    # Vessels, airways, ribs.
    @property
    def aorta(self):
        """The aorta's centre line (100, 3) and radii (100,)."""
        return path(DATA["aorta"]), linspace(15.5, 11.5, 100) * self.aorta_scale

    def tree(self, side, kind):
        """A lung's tree of tubes as it winds in this patient -> points (N, 3), radii (N,)."""
        tree = shared()[side, kind]
        points = tree[:, :3]
        return points + 3 * sin(points[:, (1, 2, 0)] / 38 + self.twist), tree[:, 3]

    def rib(self, side, number):
        """Centre line (100, 3) from the spine round the chest, falling."""
        t = linspace(0, 1, 100)
        angle = SIGN[side] * (2.86 - t * (2 - .3 * max(number - 8, 0)))
        fall = min(24 + 14 * number, 64 + 3 * number)
        return self.rim(angle, level(number) + 4 - fall * t, 4.5)


# What all patients share: textures, and the trees of the lungs' vessels and airways.
def smooth_noise(size, sigma, seed):
    """Periodic noise (size^3), mean 0, variance 1, correlated over about sigma voxels."""
    white = default_rng(seed).standard_normal((size,) * 3)
    squares = np.fft.fftfreq(size) ** 2
    k2 = squares[:, None, None] + squares[:, None] + squares
    spectrum = np.fft.fftn(white) * np.exp(-2 * (math.pi * sigma) ** 2 * k2)
    noise = np.fft.ifftn(spectrum).real
    return f32((noise - noise.mean()) / noise.std())


def foam(n, cell, seed):
    """Walls (1) of a periodic foam of n^3 cells (0), each about `cell` voxels wide: lobules."""
    size = n * cell
    at = np.indices((size,) * 3, np.float32)
    seeds = np.argwhere(np.ones((n, n, n))) + default_rng(seed).uniform(.15, .85, (n ** 3, 3))
    first = second = f32(size)  # distances to the two nearest seeds
    for point in f32(cell * seeds)[..., None, None, None]:
        offset = (at - point + size / 2) % size - size / 2
        distance = norm(offset, axis=0)
        second = minimum(second, maximum(first, distance))
        first = minimum(first, distance)
    return clip(1.3 - second + first, 0, 1)


def grow(start, leaves, radius, thinner):
    """Tubes from a point (3,) to leaves (N, 3), thinner after each fork -> [(M, 4): point, radius].

    Run half the way to the leaves' middle, halve the leaves, go on to each half.
    """
    end = (start + leaves.mean(0)) / 2 if len(leaves) > 1 else leaves[0]
    tubes = [path([(*start, radius), (*end, radius)], 2 + int(norm(end - start) / 2.5))]
    if len(leaves) > 1:
        longest = np.ptp(leaves, 0).argmax()
        ordered = leaves[leaves[:, longest].argsort()]
        for half in np.array_split(ordered, 2):
            tubes += grow(end, half, radius * thinner, thinner)
    return tubes


@cache
def shared():
    """Textures by name, white noise, and the mean patient's trees by (side, kind)."""
    parts = {"fine": smooth_noise(64, 2, 1), "coarse": smooth_noise(64, 5, 2)}
    parts["cells"] = foam(6, 7, 3)
    parts["noise"] = default_rng(4).standard_normal(6_000_000, np.float32)
    rng, mean = default_rng(5), Anatomy(random.Random("mean"), {})
    for side, (kind, tree) in product(SIDES, DATA["trees"].items()):
        leaves = mean.spots(rng, tree["leaves"], side, 5)
        root = array(tree["root"]) * (SIGN[side], 1, 1)
        parts[side, kind] = concatenate(grow(root, leaves, tree["radius"], tree["thinner"]))
    return parts


# ---------------------------------------------------------------------------------- the canvas
IN_LUNG = True  # paint only where there is lung
ALL = slice(None)


class Canvas:
    """A reconstruction being drawn, or a box of it.

    Fields [X, Y, Z] float32: hu; lung: share of a voxel that is lung; depth in a lung, mm; cavity:
    signed distance to the chest's inner wall; mask: cover of the abnormality being drawn.
    x [X, 1, 1], y [1, Y, 1], z [1, 1, Z]: a voxel's place in the mean patient.
    """

    def __init__(self, body, how):
        self.body = body
        self.spacing = f32((how.xy, how.xy, how.dz))
        edge = -(how.pixels - 1) / 2 * how.xy
        self.origin = f32((edge, edge + 6, -28))
        self.step = self.spacing / body.scale
        self.vox = self.step.prod() ** (1 / 3)
        shape = how.pixels, how.pixels, int(276 / self.step[2])
        axes = []
        for first, step, n in zip(self.origin / body.scale, self.step, shape):
            axes.append(first + step * f32(arange(n)))
        self.see(np.zeros((5, *shape), np.float32), axes)

    def see(self, fields, axes):
        """Be a box: its fields, the coordinates along its axes."""
        self.fields, self.axes = fields, axes
        self.hu, self.lung, self.depth, self.cavity, self.mask = fields
        self.x, self.y, self.z = self.at = np.ix_(*axes)
        return self

    def part(self, *where):
        """A box of the canvas, given as slices; what is painted there is painted here."""
        axes = [axis[k] for axis, k in zip(self.axes, where)]
        return copy(self).see(self.fields[:, *where], axes)

    def box(self, centre, reach):
        """The part up to reach mm (a number, or three) from a point and a voxel around it."""
        where = []
        for axis, middle, mm in zip(self.axes, centre, np.broadcast_to(reach, 3)):
            mm = mm + self.vox
            where.append(slice(*axis.searchsorted((middle - mm, middle + mm))))
        return self.part(*where)

    def heart(self, reach=0):
        """The part with the heart and so many mm around it, the signed distance to it there."""
        part = self.box(DATA["heart"]["centre"], 60 * self.body.heart_scale + reach)
        return part, self.body.heart_distance(*part.at)

    def tube(self, points, radii):
        """A chain of spheres -> the part that holds it, the signed distance there."""
        radii = np.broadcast_to(f32(radii), len(points))
        low, high = points.min(0), points.max(0)
        part = self.box((low + high) / 2, (high - low) / 2 + radii.max())
        distance = np.full(part.hu.shape, 99, np.float32)
        # Leave out spheres that are closer than half a radius to the one before.
        ways = norm(np.diff(points, axis=0, prepend=-999), axis=1)
        apart = np.diff(np.cumsum(2 * ways / radii) // 1, prepend=0) > 0
        at = f32(points - [axis[0] for axis in part.axes])[apart] / self.step
        radii = minimum(radii, 2 * radii - self.vox / 2)[apart]  # thinner than a voxel: in part
        sizes = (radii / self.vox).astype(int)
        for size in np.unique(sizes):  # spheres of like size together
            some = sizes == size
            reach = ((radii[some].max() + self.vox / 2) / self.step + .5).astype(int)
            squares = index = np.zeros(some.sum(), np.float32)
            for k, n in enumerate(distance.shape):  # axis by axis: (spheres, voxels along it, ...)
                centre = at[some, k].reshape(-1, *[1] * (k + 1))
                around = f32(arange(-reach[k], reach[k] + 1))
                place = clip(np.rint(centre) + around, 0, n - 1)
                squares = squares[..., None] + ((place - centre) * self.step[k]) ** 2
                index = index[..., None] * f32(n) + place
            surface = np.sqrt(squares) - radii[some, None, None, None]
            near = surface < self.vox / 2
            minimum.at(distance.reshape(-1), index[near].astype(int), surface[near])
        return part, distance

    def texture(self, name, mm, shift=0):
        """A shared texture, mm per voxel of it; fixed to the patient, not to the grid."""
        tile = shared()[name]
        for k in (0, 2, 1):  # the quickest order
            place = np.rint(self.axes[k] / mm).astype(int) + shift
            tile = tile.take(place, k, mode="wrap")
        return tile

    # Painting.
    def cover(self, distance, edge=0):
        """Share of a voxel inside a surface; edge: over how many mm it blurs."""
        return clip(.5 - distance / (self.vox + edge), 0, 1)

    def paint(self, distance, hu, in_lung=False, edge=0):
        """Fill a shape, given by the signed distance to its surface."""
        near = distance < (self.vox + edge) / 2  # nothing changes elsewhere
        cover, before = self.cover(distance[near], edge), self.hu[near]
        if in_lung:
            cover *= self.lung[near]
        if np.ndim(hu):
            hu = hu[near]
        self.hu[near] = before + cover * (hu - before)
        self.mask[near] = maximum(self.mask[near], cover)

    def haze(self, cover, rise):
        """Raise the density of lung, vessels staying visible."""
        cover = cover * self.lung
        self.hu += minimum(cover * rise, maximum(20 - self.hu, 0))
        maximum(self.mask, cover, out=self.mask)

    def stroke(self, points, radii, hu, in_lung=False):
        """Fill a chain of spheres."""
        part, distance = self.tube(points, radii)
        part.paint(distance, hu, in_lung)

    def bone(self, distance):
        """Fill a bone: a cortex of 2 mm around marrow."""
        self.paint(distance, self.body.cortex)
        self.paint(distance + 2.2, self.body.marrow, edge=1)


# ------------------------------------------------------------------------------ the normal patient
# From the trunk to the airways; what is drawn later covers what was there.
def trunk(c):
    """Skin, fat, muscle, lungs with their oblique fissures, mediastinal fat."""
    body = c.body
    c.cavity[:], c.depth[:] = body.cavity(*c.at), body.depth(*c.at)
    muscle = body.muscle(*c.at)
    c.hu[:] = -1000
    for distance, hu in (
        (muscle - body.fat_layer, 10),
        (muscle - body.fat_layer + 2, body.fat),
        (muscle, body.muscles),
        (c.cavity + 1, body.fat + 6),
    ):
        c.hu += c.cover(distance) * (hu - c.hu)
    tissue = body.lung + body.gradient * c.y + 8 * c.texture("fine", 2.5)
    fissure = abs(c.z - 105 - .72 * c.y)
    tissue += 90 * clip(1 - fissure / c.vox, 0, 1)
    c.lung[:] = c.cover(-c.depth)
    c.hu += c.lung * (tissue - c.hu)


def organs(c):
    """A woman's breasts, the heart, the organs below the diaphragm."""
    body = c.body
    for sign in SIGN.values() if body.female else ():
        centre, radii = (sign * 66, -104, 95), body.breast * array((66, 27, 58))
        part = c.box(centre, radii)
        breast, chest = ellipsoid(part.at, centre, radii), body.muscle(*part.at)
        part.paint(maximum(breast, -chest), body.fat)
        part.paint(maximum(breast + 12, 3 - chest), 0, edge=8)  # glands
    part, heart = c.heart()
    part.paint(heart, body.blood + 2)
    for hu, centre, radii in DATA["organs"].values():
        part = c.box(centre, radii)
        below = maximum(part.cavity, part.z - body.diaphragm(part.x, part.y)) + 4
        part.paint(maximum(ellipsoid(part.at, centre, radii), below), hu)


def skeleton(c):
    """Ribs, sternum, clavicles, scapulae; discs and vertebrae with their arches and processes."""
    tubes = [(c.body.rib(*which), 4.3) for which in product(SIDES, range(1, 12))]
    for sign, (radius, points) in product(SIGN.values(), DATA["bones"]):
        tubes.append((path(points) * f32((sign, 1, 1)), radius))
    part, distance = c.tube(*joined(tubes))
    part.bone(distance)

    part = c.box((0, 75, 0), (32, 40, 999))
    dx, dy = abs(part.x), part.y - spine(part.z)
    discs = column(part)
    part.paint(discs, 85)
    middle = PITCH * abs((part.z - level(1)) / PITCH % 1 - .5)  # mm from a disc's middle
    canal = hypot(dx, dy - 22)
    arch = maximum(abs(canal - 11) - 2.8, 4 - middle)
    spinous = reduce(maximum, (dx - 3, abs(dy - 38) - 8, 5 - middle))
    wings = reduce(maximum, (dx - 32, 9 - dx, abs(dy - 25 - .15 * dx) - 4, 6 - middle))
    part.bone(reduce(minimum, (maximum(discs, 2.4 - middle), arch, spinous, wings)))
    part.paint(canal - 8, 22)


def column(part):
    """Signed distance, roughly, to the column of the vertebrae's bodies and discs."""
    return 15 * (hypot(part.x / 17, (part.y - spine(part.z)) / 14) - 1)


def vessels(c):
    """The great vessels and the esophagus; the trees of the lungs' arteries and veins."""
    body = c.body
    tubes = [(path(points), radius) for radius, points in DATA["vessels"].values()]
    part, distance = c.tube(*joined([body.aorta, *tubes]))
    part.paint(distance, body.blood)
    inside = distance < 99
    part.lung[inside] *= 1 - part.cover(distance[inside])
    trees = [body.tree(*which) for which in product(SIDES, ("artery", "vein"))]
    c.stroke(*joined(trees), body.blood - 4, IN_LUNG)


def airways(c):
    """Walls, then lumens, of trachea and bronchi as far as they show."""
    trees = [c.body.tree(side, "airway") for side in SIDES]
    central = [(path(points), radius) for radius, points in DATA["airways"].values()]
    for tubes, in_lung in ((trees, IN_LUNG), (central, False)):
        points, radii = joined(tubes)
        points, radii = points[radii > 1.6], radii[radii > 1.6]
        c.stroke(points, 1.05 * radii + .7, 0, in_lung)
        c.stroke(points, radii, -960, in_lung)


# ------------------------------------------------------------------------------ the abnormalities
# One function each, in the order in which they are drawn: it draws one lesion with a pen, and what
# it paints goes into the abnormality's mask. The docstrings say what it looks like on CT.
class Pen(Canvas):
    """The canvas while one lesion is drawn: with random numbers, and what LESIONS says of it.

    That is some of side, lobe, size in mm, n, what. r: half the size. hilum: the lung's root.
    """

    def __init__(self, canvas, lesion):
        vars(self).update(vars(canvas) | lesion)
        self.r = lesion.get("size", 0) / self.body.scale.mean() / 2
        self.size = 2 * self.r
        self.sign = SIGN.get(lesion.get("side"))
        self.rng = default_rng([int(share * 2**32) for share in lesion["place"]])
        self.uniform, self.normal = self.rng.uniform, self.rng.standard_normal
        self.shift = self.rng.integers(64)  # of its textures

    @property
    def half(self):
        """The part with the lesion's side of the chest."""
        return self.box((99 * self.sign, 0, 0), (96, 999, 999))

    @property
    def hilum(self):
        return f32((36 * self.sign, 9, 131))

    def lump(self, centre, radii, rough, axes=np.eye(3)):
        """An ellipsoid with an uneven surface -> its part, the signed distance there."""
        part = self.box(centre, max(radii) * (1 + 2 * rough))
        bumps = rough * np.mean(radii) * part.texture("fine", 2.5, self.shift)
        return part, ellipsoid(part.at, centre, radii, axes) + bumps

    def blob(self, rough, least, most=1e9):
        """A lump of the lesion's size, so deep in its lobe -> centre, part, signed distance."""
        centre = self.body.spots(self.rng, 1, self.lobe, least, most)[0]
        axes = np.linalg.qr(self.normal((3, 3)))[0]
        return centre, *self.lump(centre, self.r * self.uniform(.8, 1.15, 3), rough, axes)


# Diffuse.
def mosaic_attenuation_pattern(pen):
    """Patches of lung a little denser beside patches a little emptier."""
    half = pen.half
    patches = half.texture("coarse", 3, 17) + .3 * half.texture("fine", 3, 5)
    half.haze(clip(.5 + 3 * patches, 0, 1), 165)
    half.hu -= 45 * half.lung


def emphysema(pen):
    """Holes without walls, mostly in the upper lobe, in lung that is thinned out."""
    half, spots = pen.half, pen.body.spots
    half.hu -= 35 * half.lung * clip((half.z - 80) / 90, 0, 1)
    upper, anywhere = spots(pen.rng, pen.n, pen.lobe, 3), spots(pen.rng, pen.n // 4, pen.side, 3)
    points = concatenate((upper, anywhere))
    pen.stroke(points, pen.r * pen.uniform(.5, 1, len(points)), -980, IN_LUNG)


def interlobular_septal_thickening(pen):
    """Thickened walls of the secondary lobules, below the pleura and at the bases."""
    half = pen.half
    outer = clip(1.25 - half.depth / 26, .1, 1) * clip(1.4 - half.z / 200, .2, 1)
    half.haze(outer * half.texture("cells", 2.6, 9), 480)


def pulmonary_fibrosis(pen):
    """Honeycomb cysts and reticulation in a rind below the pleura, thickest at the bases."""
    half = pen.half
    basal = pen.size * clip(1.15 - half.z / 180, .12, 1)
    rind = half.depth - basal * (1 + .35 * half.texture("fine", 3))
    half.paint(rind, 780 * half.texture("cells", 1.5, 4) - 840, IN_LUNG, 5)


def lung_opacity(pen):
    """Ground glass: a denser cloud in which vessels stay visible."""
    _, part, cloud = pen.blob(.3, pen.uniform(6, 16))
    part.haze(part.cover(cloud, 5), pen.uniform(210, 340))


def sleeves(pen, extent, least, wall):
    """Thick walls round the airways up to extent mm from the hilum; least: of their radii."""
    points, radii = pen.body.tree(pen.side, "airway")
    near = norm(points - pen.hilum, axis=1) < extent
    points, radii = points[near], maximum(radii[near], least)
    pen.stroke(points, radii + pen.size, wall, IN_LUNG)
    pen.stroke(points, radii, -960, IN_LUNG)


def peribronchial_thickening(pen):
    """Soft sleeves around the central bronchi."""
    sleeves(pen, 62, 0, -200)


def bronchial_thickening(pen):
    """Thick walls of the segmental bronchi, far into the lung."""
    sleeves(pen, 105, 1.9, 45)


def bronchiectasis(pen):
    """Wide bronchi that don't taper, with walls, running into the periphery of a lobe."""
    lines = []
    for tip in pen.body.spots(pen.rng, 9, pen.lobe, 9, 26):
        start, bend = pen.hilum + array(((.3,), (.6,))) * (tip - pen.hilum)
        lines.append(path((start, bend + pen.uniform(-7, 7, 3), tip)))
    points = concatenate(lines)
    radii = pen.r * (.9 + .2 * sin(arange(len(points)) / 4))
    pen.stroke(points, radii + 1.9, 10, IN_LUNG)
    pen.stroke(points, radii, -960, IN_LUNG)


# Focal.
def lung_cyst(pen):
    """A round hole with a thin wall."""
    _, part, hole = pen.blob(0, min(pen.r + 2, 15))
    part.paint(hole - 1.3, -300, IN_LUNG)
    part.paint(hole, -990, IN_LUNG)


def pulmonary_fibrotic_sequela(pen):
    """Irregular strands from the pleura towards the hilum, and a pleural cap."""
    points = pen.body.spots(pen.rng, 60, pen.lobe, 1, 6)
    up = -1 if pen.lobe in UPPER else 1  # at the apex, or at the base
    centre = points[(up * points[:, 2]).argmin()]
    way = pen.hilum - centre
    strand = centre + linspace(0, pen.size / norm(way), 5)[:, None] * way
    for _ in range(6):
        pen.stroke(path(strand + 5 * pen.normal((5, 3))), pen.uniform(1.1, 2.1), 0, IN_LUNG)
    part, ball = pen.lump(centre, (20, 20, 20), .1)
    part.paint(maximum(ball, part.depth - 5), 15, IN_LUNG)


def pneumonia(pen):
    """Patchy: several dense cores in one cloud of ground glass, with tree-in-bud around."""
    centre, part, cloud = pen.blob(.3, 8, 22)
    part.haze(part.cover(cloud, 6), pen.uniform(220, 320))
    for core in centre + pen.normal((4, 3)) * .5 * pen.r:
        part, distance = pen.lump(core, pen.r * pen.uniform(.32, .5, 3), .3)
        part.paint(distance, 20, IN_LUNG, 3)
    pen.stroke(centre + pen.normal((36, 3)) * pen.r, 2.2, -80, IN_LUNG)


def consolidation(pen):
    """Filled lung at the pleura, with air bronchograms that run towards the hilum."""
    centre, part, distance = pen.blob(.22, 5, .3 * pen.size)
    part.paint(distance, pen.uniform(25, 50), IN_LUNG, 2)
    way = pen.hilum - centre
    way *= .8 * pen.r / norm(way)
    for middle in centre + pen.normal((5, 3)) * .4 * pen.r:
        pen.stroke(path((middle - way, middle + way)), 1.9, -850, IN_LUNG)


def atelectasis(pen):
    """Plates, mostly level, above the diaphragm; or an airless wedge beside spine or heart."""
    if pen.what == "lobar":
        centre, radii = DATA["collapsed"][pen.lobe]
        part, wedge = pen.lump(centre, pen.size * array(radii), .1)
        part.paint(wedge, pen.uniform(30, 55), IN_LUNG, 1)
        return
    for x, y, z in pen.body.spots(pen.rng, 3, pen.lobe, 8):
        centre = x, y, min(z, pen.body.diaphragm(x, y) + pen.uniform(10, 34))
        axes = np.linalg.qr(np.eye(3) + pen.uniform(-.3, .3, (3, 3)))[0]
        part, plate = pen.lump(centre, (1.2 * pen.r, .8 * pen.r, 3), .02, axes)
        part.paint(plate, pen.uniform(-80, 20), IN_LUNG)


def tuberculosis(pen):
    """A thick-walled cavity with satellites, strands to the apex, calcified granulomas."""
    centre, part, wall = pen.blob(.1, 10)
    around = centre + pen.normal((50, 3)) * (1.1 * pen.r + 5)
    pen.stroke(around, pen.uniform(1.6, 3.4, 50), 10, IN_LUNG)
    for way in pen.normal((5, 3)) + (0, 0, 1.2):
        pen.stroke(path((centre, centre + 18 * way)), 1.2, 0, IN_LUNG)
    part.paint(wall, 40, IN_LUNG)
    part.paint(wall + .37 * pen.r + 1.5, -940, IN_LUNG)
    pen.stroke(around[:5], 2, 600, IN_LUNG)


def lung_nodule(pen):
    """A small round shadow of soft tissue, now and then of calcium."""
    _, part, nodule = pen.blob(.07, min(pen.r + 2, 14))
    part.paint(nodule, pen.rng.choice((10, 25, 40, 40, 55, 70, 300)), IN_LUNG)


def lung_mass(pen):
    """Large, lobulated and spiculated, with a darker core."""
    centre, part, mass = pen.blob(.16, .35 * pen.size)
    for ray in pen.normal((14, 3)):
        tip = centre + 1.4 * pen.r * ray / norm(ray)
        pen.stroke(path((centre, tip)), 1.1, 0, IN_LUNG)
    part.paint(mass, 42, IN_LUNG)
    part.paint(mass + .55 * pen.r, 18, IN_LUNG, 3)


# Pleural.
def pleural_effusion(pen):
    """Fluid that has sunk to the back: a crescent, thickest at the base."""
    half = pen.half
    back = pen.size * clip(.45 + .75 * half.y / DEEP, 0, 1.1)
    thick = back * clip(1.25 - half.z / (80 + 2 * pen.size), 0, 1)
    half.paint(half.depth - thick + 2, pen.uniform(2, 18), IN_LUNG)


def pneumothorax(pen):
    """Air without vessels outside a fine pleural line; thickest in front and at the apex."""
    half = pen.half
    front = clip(.45 - .8 * half.y / DEEP, 0, 1.2) + clip(half.z / 75 - 2.2, 0, .9)
    gap = 3 - half.cavity - pen.size * front
    half.paint(abs(gap) - .8, -150, IN_LUNG)
    half.paint(gap + .8, -1000, IN_LUNG)


def empyema(pen):
    """A lens of thick fluid behind thick pleura, with gas; it does not follow gravity."""
    u, size = pen.uniform, pen.size
    angle, z = pen.sign * u(1.2, 2.5), u(.3, .55) * HIGH
    centre = pen.body.rim(angle, z, .1 * size)
    part, lens = pen.lump(centre, array((.8, .8, 1.2)) * size, .02)
    part.paint(lens, 65, IN_LUNG)
    part.paint(maximum(lens + 5.5, part.cavity + 6), u(22, 34), IN_LUNG)
    inside = pen.body.rim(angle, z, -.35 * size)
    pen.stroke(inside + u(-.25, .25, (9, 3)) * size, u(2, 4, 9), -900)


def pleural_calcification(pen):
    """Plaques of calcium on the inside of the chest wall."""
    u, normal = pen.uniform, pen.normal
    for _ in range(4):
        angle = u(.9, 2.6) + .002 * pen.size * normal(90)
        z = u(.2, .65) * HIGH + .2 * pen.size * normal(90)
        plaque = pen.body.rim(pen.sign * angle, z, -2)
        pen.stroke(plaque, u(1.4, 2.6, 90), u(450, 800))


# Mediastinal.
def cardiomegaly(pen):
    """A wide heart, drawn with the anatomy."""
    part, heart = pen.heart()
    part.paint(heart, pen.body.blood + 2)


def pericardial_effusion(pen):
    """Water around the heart outside a layer of epicardial fat, deeper behind and below."""
    part, heart = pen.heart(30)
    outer = heart - 3 - pen.size * clip(1 + part.y / 140, .4, 1.15)
    above = pen.body.diaphragm(part.x, part.y) + 3 - part.z
    fluid = reduce(maximum, (outer, 3 - heart, part.cavity + 2, above))
    part.paint(fluid, pen.uniform(4, 16))
    fat = part.cover(maximum(heart - 3, -heart))
    part.hu += fat * (-85 - part.hu)


def hiatal_hernia(pen):
    """Stomach behind the heart: a wall around food and fat, usually with a gas-fluid level."""
    r, u = pen.r, pen.uniform
    centre = (10, 31, 38 + .55 * r) + u(-4, 4, 3)
    part, wall = pen.lump(centre, r * array((1.1, .85, .9)), .02)
    part.paint(wall, 45)
    part.paint(wall + 4.5, u(5, 30))
    part.paint(maximum(wall + 4.5, part.y - centre[1] + u(-.2, .7) * r), -900)


def lymphadenopathy(pen):
    """One to three enlarged oval nodes at one station."""
    x, y, z = STATIONS[pen.what]
    centre = (pen.sign * x if pen.what == "axillary" else x, y, z) + pen.uniform(-3, 3, 3)
    for smaller in (1, .7, .6)[:pen.rng.integers(1, 4)]:
        part, node = pen.lump(centre, smaller * pen.r * pen.uniform(.75, 1.1, 3), .05)
        part.paint(node, pen.uniform(36, 58))
        centre = centre + pen.normal(3) * pen.r


def plaques(pen, n, size, thick):
    """n calcified plaques of some mm in the wall of the aortic arch and the descending aorta."""
    line, radii = pen.body.aorta
    tangents = np.gradient(line, axis=0)
    for start in pen.rng.integers(22, 90, n):
        i = minimum(start + pen.rng.integers(0, size // 3, 40), 99)
        outwards = np.cross(tangents[i], pen.normal(3) + .3 * pen.normal((40, 3)))
        outwards *= (radii[i] / norm(outwards, axis=1))[:, None]
        pen.stroke(line[i] + outwards, pen.uniform(*thick), pen.uniform(500, 1000))


def atherosclerosis(pen):
    """A wide aorta with soft plaque inside its wall and coarse calcified plaques on it."""
    line, radii = pen.body.aorta
    pen.stroke(line, radii - 1, 12)
    pen.stroke(line, radii - pen.size * (.6 + .4 * sin(arange(100) / 2)), pen.body.blood + 6)
    plaques(pen, 26, 26, (1.8, 2.8))


def arterial_wall_calcification(pen):
    """Calcified plaques in the aorta's wall."""
    plaques(pen, pen.n, int(pen.size), (1.2, 2))


def coronary_artery_wall_calcification(pen):
    """Dashes of calcium along an artery's course on the heart."""
    line = pen.body.on_heart(path(DATA["coronaries"][pen.what]), 1.03)
    start = pen.rng.integers(0, 50)
    dashes = line[start:start + int(pen.size)]
    dashes = dashes[sin(.4 * arange(len(dashes))) > -.6]
    pen.stroke(dashes, pen.uniform(1.7, 2.6), pen.uniform(550, 1000))


def pericardial_calcification(pen):
    """Plates of calcium around the heart."""
    for ray in pen.normal((5, 3)) - (0, 0, .5):
        plate = ray / norm(ray) + pen.normal((110, 3)) * .26
        radii = pen.size * pen.uniform(.3, .55, 110)
        pen.stroke(pen.body.on_heart(plate, 1.07), radii, pen.uniform(500, 900))


def pneumomediastinum(pen):
    """Streaks of air along trachea, great vessels and heart, outside the lungs."""
    streaks = []
    for name in pen.rng.choice(DATA["dissected"], 26):
        radius, line = TUBES[name]
        start, angle = pen.rng.integers(0, 80), pen.uniform(0, 6.3) + .08 * arange(20)
        away = (radius + pen.uniform(2, 6)) * array((cos(angle), sin(angle), 0 * angle))
        streaks.append(path(line)[start:start + 20] + away.T)
    points = concatenate(streaks)
    points = points[pen.body.depth(*points.T) < 1]
    pen.stroke(points, pen.size * pen.uniform(.3, .55, len(points)), -940)


# Bony.
def osteophyte(pen):
    """Beaks of bone at the front and side corners of two neighbouring end plates."""
    disc = level(int(pen.what[1:]) + .5)
    for sign, up in product((pen.sign,) if pen.sign else (-1, 1), (-1, 1)):
        base = array((sign * 13, spine(disc) - 9, disc + 3.5 * up))
        tip = base + array((.85 * sign, -.85, -.55 * up)) * pen.size
        pen.stroke(path((base, tip)), linspace(4.6, 2.2, 100), 600)


def spondylosis(pen):
    """A narrowed disc between dense end plates."""
    disc = level(int(pen.what[1:]) + .5)
    part = pen.box((0, spine(disc), disc), (20, 17, 8))
    height = abs(part.z - disc)
    part.paint(maximum(column(part) - 2, height - 6.5), 1.1 * pen.body.cortex)
    part.paint(maximum(column(part), height - 1.3), pen.rng.choice((70, -300)))


def rib_fracture(pen):
    """A gap, the far end stepped inwards or outwards, some callus and a haematoma below it."""
    line = pen.body.rib(pen.side, pen.rib)
    i = pen.rng.integers(30, 65)
    out = line[i] * (1, 1, 0) / norm(line[i, :2])
    pen.stroke(line[i:i + 9], 7.5, pen.body.muscles)
    pen.stroke(line[i - 1:i + 4] - 5 * out, 7.5, 60)
    step = out * pen.size * pen.rng.choice((-1, 1)) * linspace(1, 0, 8)[:, None]
    part, distance = pen.tube(line[i + 1:i + 9] + step, 4.3)
    part.bone(distance)
    pen.stroke(line[i - 3:i], 5.5, 350)


# Foreign.
def medical_material(pen):
    """Metal or plastic, denser than bone."""
    for radius, hu, points in DATA["devices"][pen.what]:
        pen.stroke(path(points), radius, hu)


NORMAL = organs, skeleton, vessels, airways
SPOKEN = {name.replace("_", " ").capitalize(): value for name, value in globals().items()}
ABNORMAL = {name: SPOKEN[name] for name in SPOKEN if name in ABNORMALITIES}


# ------------------------------------------------------------------------------ one reconstruction
# A scan has one to three: the same patient in other voxels, with other noise, in other axes.
def patient(seed, split, index, lesions):
    """The patient of a scan; the second scan of a patient has the same anatomy."""
    number, _ = patient_of(seed, split, index)
    return Anatomy(random.Random(f"anatomy {seed} {split} {number}"), lesions)


def reconstructions(seed, split, index):
    """How a scan's one to three volumes are made: in-plane size, spacing in mm, noise in HU, ..."""
    rng = random.Random(f"acquisition {seed} {split} {index}")
    body = patient(seed, split, index, {})
    width = 2 * WIDE * body.scale[0] * (1 + (body.wall + body.fat_layer) / 100)
    pixels = rng.randint(112, 128)
    xy = round(float(width + rng.uniform(8, 34)) / pixels, 3)
    steps = rng.choice(DATA["scanner"]["steps"])
    slices = DATA["scanner"]["slices"]
    thickness = dict.fromkeys(rng.sample(slices, len(slices)))
    count = rng.choices((1, 2, 3), (85, 12, 3))[0]
    return [SimpleNamespace(
        pixels=pixels,
        xy=xy,
        dz=dz,
        steps=steps,
        noise=rng.uniform(8, 24),
        kernel=rng.choice(("soft", "sharp")),
        intercept=rng.choice((-1024, -1024, -8192)),
        roll=rng.randrange(1_000_000),  # where its noise begins in the shared noise
    ) for dz in list(thickness)[:count]]


def drawn(body, how, lesions):
    """Draw a patient and the lesions -> canvas in whole HU, masks: abnormality -> bool array."""
    c, masks = Canvas(body, how), {}
    for start in range(0, how.pixels, 8):  # in slabs, whose temporaries stay small
        trunk(c.part(slice(start, start + 8), ALL, ALL))
    for part in NORMAL:
        part(c)
    for name, abnormality in ABNORMAL.items():
        if name in lesions:
            c.mask[:] = 0
            for lesion in lesions[name]:
                abnormality(Pen(c, lesion))
            masks[name] = c.mask > .5
    # The scanner's noise: white through a sharp kernel, correlated in-plane through a soft one.
    noise = shared()["noise"][how.roll:][:c.hu.size].reshape(c.hu.shape)
    for k, plane in enumerate(c.hu):
        white = noise[k]
        if how.kernel == "soft":
            white = .65 * white + .53 * (noise[k - 1] + np.roll(white, 1, 0))
        plane[:] = np.rint(clip(plane + how.noise * white, -1024, 3071))
    return c, masks


def draw(seed, split, index, reconstruction=0, lesions=None):
    """Draw one reconstruction of a scan, just as `write` does.

    lesions: abnormality -> list of lesions, instead of the scan's own (see findings).
    Returns hu int16 [X, Y, Z] as stored, affine (4, 4) to RAS mm, spacing (x, y, z) in mm, the
    lesions, masks: abnormality -> bool [X, Y, Z].
    """
    scan = seed, split, index
    lesions = findings(*scan) if lesions is None else lesions
    how = reconstructions(*scan)[reconstruction]
    c, masks = drawn(patient(*scan, lesions), how, lesions)
    # From LPS, as drawn, to the stored axes, -1 where backwards.
    steps, to_ras = array(how.steps), array((-1, -1, 1))
    flips = tuple(slice(None, None, step) for step in steps)
    extent = c.spacing * (array(c.hu.shape) - 1)
    affine = np.diag((*(to_ras * steps * c.spacing), 1.))
    affine[:3, 3] = to_ras * (c.origin + c.body.offset + (steps < 0) * extent)
    masks = {name: mask[flips] for name, mask in masks.items()}
    return c.hu.astype(np.int16)[flips], affine, c.spacing, lesions, masks


# ---------------------------------------------------------------------------------- what is written
SUFFIX = {1: "", 2: "_fixed"}  # of the folders of each of CT-RATE's releases
LONG = {"train": "train", "valid": "validation"}
TABLES = DATA["tables"] | {  # place below the root -> columns after the volume's name
    "multi_abnormality_labels/{split}_predicted_labels.csv": CT_RATE,
    "multi_abnormality_labels/ct_rate_lt_labels.csv": CT_RATE_LT,
}


def scan_name(seed, split, index):
    """CT-RATE's name of a scan: split, patient, scan of that patient (a, b)."""
    number, second = patient_of(seed, split, index)
    return f"{split}_{number + 1}_{'ab'[second]}"


def volume_path(name, release=2):
    """A volume's place below the root: train_fixed/train_1/train_1_a/train_1_a_1.nii.gz.

    name is the file's, without .nii.gz.
    """
    split, number, scan, _ = name.split("_")
    patient = f"{split}_{number}"
    return Path(split + SUFFIX[release], patient, f"{patient}_{scan}", name + ".nii.gz")


def nifti(voxels, affine):
    """The bytes of a .nii.gz: the same for the same input (no time, no file name)."""
    image = nib.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    return isal_zlib.compress(image.to_bytes(), 1, 31)  # three times as fast as zlib


def write_scan(job):
    """Write the volumes (and masks) of a scan that are not there yet."""
    out, scan, release, masks = job
    for k, how in enumerate(reconstructions(*scan)):
        name = f"{scan_name(*scan)}_{k + 1}"
        volume, mask = out / volume_path(name, release), out / f"masks/{name}.nii.gz"
        if volume.exists() and (mask.exists() or not masks):
            continue
        hu, affine, _, _, drawn_masks = draw(*scan, k)
        if masks:
            bits = np.zeros(hu.shape, np.int64)
            for abnormality, where in drawn_masks.items():
                bits[where] |= 1 << ABNORMALITIES.index(abnormality)
            write_atomically(mask, nifti(bits, affine))
        if release == 1:  # raw values; neither rescale nor spacing in the header
            hu = hu - np.int16(how.intercept)
            affine = np.diag(np.sign(np.diag(affine)))
        write_atomically(volume, nifti(hu, affine))


def table_rows(scan, release):
    """Yield for each volume of a scan its row in each of TABLES."""
    rng = random.Random("report {} {} {}".format(*scan))
    text = [rng.choice(SITUATIONS), rng.choice(TECHNIQUES)]
    lesions = findings(*scan)
    text += [part or "Not given." for part in report(lesions, rng)]
    labels = [int(name in lesions) for name in CT_RATE]
    rare = [int(name in lesions) for name in CT_RATE_LT]
    sex = "F" if patient(*scan, lesions).female else "M"
    for k, how in enumerate(reconstructions(*scan)):
        name, intercept = f"{scan_name(*scan)}_{k + 1}.nii.gz", how.intercept if release == 1 else 0
        metadata = ["Phantom", how.kernel, sex, 1, intercept, f"[{how.xy}, {how.xy}]", how.dz]
        yield [[name, *row] for row in (text, metadata, labels, rare)]


def write_tables(out, seed, counts, release):
    """Reports, metadata and labels of all volumes."""
    tables = {}
    for split, n in counts.items():
        paths = [path.format(split=split, long=LONG[split]) for path in TABLES]
        for path, columns in zip(paths, TABLES.values()):
            tables.setdefault(path, [["VolumeName", *columns]])
        for index in range(n):
            for rows in table_rows((seed, split, index), release):
                for path, row in zip(paths, rows):
                    tables[path].append(row)
    for path, rows in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_atomically(out / path, text.getvalue().encode())


def check_folder(out, settings):
    """ValueError where a folder holds a phantom, finished or begun, of other settings."""
    for path in (out / "phantom.begun.json", out / "phantom.json"):
        if path.exists():
            try:
                stamp = json.loads(path.read_text())
                other = {key: stamp.get(key) for key in settings}
            except (ValueError, AttributeError, RecursionError):
                other = "unknown settings"
            if other != settings:
                raise ValueError(
                    f"{path}: holds a phantom of {other}, not {settings}; "
                    "choose another --out or delete it"
                )


def write(out, train, valid, seed=0, release=2, workers=None, masks=False):
    """Write `train` and `valid` scans below `out` in CT-RATE's layout.

    What is there already stays, so the same call finishes a killed run; phantom.json comes last.
    release 2: HU and true spacing in the files; 1: raw values that need the metadata's rescale and
    spacing. masks: also masks/<volume>.nii.gz of the valid split, int64, bit k set where
    ABNORMALITIES[k] was drawn. ValueError: bad counts, or `out` holds a phantom of another seed,
    release or version.
    """
    out, counts = Path(out), {"train": train, "valid": valid}
    if release not in SUFFIX or min(train, valid) < 0 or train + valid == 0:
        raise ValueError(
            "release must be 1 or 2, the counts 0 or more, not both 0: "
            f"got release {release}, train {train}, valid {valid}"
        )
    settings = {"version": VERSION, "seed": seed, "release": release}
    check_folder(out, settings)
    for folder in {temporary.parent for temporary in out.rglob(".*.tmp")}:
        sweep(folder)  # of what a killed run left half written
    begun = out / "phantom.begun.json"
    write_atomically(begun, json.dumps(settings).encode())
    jobs = []
    for split, n in counts.items():
        masked = masks and split == "valid"
        jobs += [(out, (seed, split, index), release, masked) for index in range(n)]
    scans = written(jobs, min(workers or os.cpu_count() or 1, len(jobs)))
    for _ in tqdm(scans, "phantom", len(jobs), unit="scan", mininterval=1):
        pass
    write_tables(out, seed, counts, release)
    stamp = json.dumps(settings | counts | {"masks": masks}) + "\n"
    write_atomically(out / "phantom.json", stamp.encode())
    begun.unlink()
    return out


def written(jobs, workers):
    """Write the scans; yields after each."""
    if workers == 1:
        yield from map(write_scan, jobs)
        return
    # Fork where it is safe: workers need nothing but numpy; to import the caller may be slow.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ignore = signal.SIGINT, signal.SIG_IGN  # Ctrl-C is this process's to hear
    with ProcessPoolExecutor(workers, context, signal.signal, ignore) as pool:
        yield from pool.map(write_scan, jobs, chunksize=4)


# ---------------------------------------------------------------------------------- a contact sheet
NORMAL_VIEWS = ["Normal, lung window", "Normal, soft tissue"]


def example(seed, k, name, axis):
    """An otherwise normal patient with one abnormality, cut across an axis where it is widest.

    Returns (image (rows, columns) in HU, mask of the lesion, height of a pixel / its width).
    """
    rng = random.Random(f"preview {seed} {name}")
    lesions = LESIONS[name](rng) if name in LESIONS else []
    for lesion in lesions:
        lesion["place"] = [rng.random() for _ in range(3)]
    scan, lesions = (seed, "preview", k), {name: lesions}
    c, masks = drawn(patient(*scan, lesions), reconstructions(*scan)[0], lesions)
    mask = masks.get(name, np.zeros(c.hu.shape, bool))
    across, down = [other for other in range(3) if other != axis]
    at = mask.sum((across, down)).argmax() or c.hu.shape[axis] // 2
    return c.hu.take(at, axis).T, mask.take(at, axis).T, c.spacing[down] / c.spacing[across]


def preview(path, seed=0):
    """Write a PNG with two normal patients and an example of each abnormality, outlined."""
    from matplotlib.figure import Figure

    figure = Figure((21, 16), facecolor="black")
    axes = figure.subplots(5, 7).flat
    for k, (axis, name) in enumerate(zip(axes, [*NORMAL_VIEWS, *ABNORMALITIES])):
        window, cut = DATA["views"].get(name, ("lung", 2))
        black, white = DATA["windows"][window]
        image, inside, aspect = example(seed, k, name, cut)
        style = {"cmap": "gray", "vmin": black, "vmax": white, "interpolation": "bicubic"}
        origin = "upper" if cut == 2 else "lower"
        axis.imshow(image, aspect=aspect, origin=origin, **style)
        if inside.any():
            axis.contour(inside, [.5], colors="#ffd400", linewidths=.6)
        axis.set_title(name, color="white", fontsize=13)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=72)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="example: python phantom.py --out data/phantom --train 800 --valid 200 --seed 0",
    )
    parser.add_argument("--out", help="folder to write the benchmark to")
    for name, default, text in (
        ("--train", 800, "training scans (800)"),
        ("--valid", 200, "test scans, of other patients (200)"),
        ("--seed", 0, "of everything (0)"),
        ("--release", 2, "CT-RATE's, whose conventions to follow: 1 raw values, 2 HU (2)"),
        ("--workers", None, "processes (all cores)"),
    ):
        parser.add_argument(name, type=int, default=default, help=text)
    parser.add_argument("--masks", action="store_true", help="also the test split's lesion masks")
    parser.add_argument("--preview", metavar="FILE.png", help="write a contact sheet")
    o = parser.parse_args(arguments)
    if not o.out and not o.preview:
        raise ValueError("give --out DIR, --preview FILE.png, or both")
    if o.workers is not None and o.workers < 1:
        raise ValueError(f"--workers must be 1 or more, got {o.workers}")
    if o.preview:
        preview(o.preview, o.seed)
    if o.out:
        write(o.out, o.train, o.valid, o.seed, o.release, o.workers, o.masks)


if __name__ == "__main__":
    sys.exit(run_command(main))
