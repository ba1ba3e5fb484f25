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
import sys
import tomllib
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import cache, cached_property, partial, reduce
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import nibabel as nib
import numpy as np
from numpy import (
    arange,
    array,
    broadcast_to,
    clip,
    concatenate,
    cos,
    exp,
    float32,
    hypot,
    linspace,
    maximum,
    minimum,
    sin,
    sqrt,
    stack,
)
from numpy.linalg import norm
from numpy.random import default_rng
from tqdm import tqdm

from phantom_reports import (
    ABNORMALITIES,
    CT_RATE,
    CT_RATE_LT,
    LESIONS,
    LOBES,
    LOWER,
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

VERSION = 2  # raise it whenever the bytes written for a seed change
DATA = tomllib.loads((Path(__file__).parent / "resources/phantom_scans.toml").read_text("utf-8"))


# ---------------------------------------------------------------------------------- the patient
# Coordinates are the patient's, in mm: x to the left, y to the back, z up from the lowest point of
# the lungs, (0, 0) in the middle of the chest. Shapes are given by their signed distance, in mm,
# negative inside. A patient is the mean one of resources/phantom_scans.toml, stretched, with tissue
# values, curvatures and twists of their own.
LINES = DATA["lines"] | DATA["vessels"] | DATA["airways"]


def f32(values):
    """An array of float32."""
    return np.asarray(values, float32)


def profile(name, at):
    """A quantity of the mean patient that changes along the body, at some places along it."""
    return f32(np.interp(at, *DATA["profiles"][name]))


def path(points, step=1.5, smooth=0):
    """Resample a polyline (N, 3) every step mm; smooth: round its corners over so many mm."""
    points = f32(points)
    lengths = norm(np.diff(points, axis=0), axis=1)
    along = concatenate(([0], np.cumsum(lengths)))
    at = arange(0, along[-1] + step, step)
    line = stack([np.interp(at, along, axis) for axis in points.T], 1)
    if smooth:
        n = int(smooth / step) | 1
        padded = np.pad(line, ((n // 2, n // 2), (0, 0)), "edge")
        line = stack([np.convolve(axis, np.ones(n) / n, "valid") for axis in padded.T], 1)
    return f32(line)


class Anatomy:
    """One patient's shapes and tissue values, from a random.Random and the scan's lesions."""

    def __init__(self, rng, lesions):
        u = rng.uniform
        self.female = rng.random() < .48
        size = u(.93, 1.05) - .05 * self.female
        self.a = 122 * size * u(.95, 1.04)  # half the chest's width
        self.b = 86 * size * u(.92, 1.07)  # half its depth
        self.top = 226 * size * u(.95, 1.05)  # height of the lungs
        self.scale = f32((self.a / 122, self.b / 86, self.top / 226))
        self.boxy = u(2.1, 2.7)
        self.roll = math.radians(rng.gauss(0, 3))  # of the patient on the table
        self.wall = u(13, 18)  # of muscle
        self.fat = u(4, 20)  # under the skin
        self.breast = self.female * u(.6, 1.1)
        self.lobed = [u(-.06, .06) for _ in range(4)]  # waves of the fat
        self.dome = {"right": u(48, 66), "left": u(40, 58)}
        least = .96 if "Cardiomegaly" in lesions else .84
        self.heart_scale = u(least, 1.06) * enlarged(lesions, "Cardiomegaly")
        self.aorta_scale = u(.88, 1.08) * enlarged(lesions, "Atherosclerosis")
        self.kyphosis = u(2, 14)
        self.bone_age = u(.7, 1.15)  # a factor of the density of bone
        tissues = {tissue: u(*limits) for tissue, limits in DATA["hu"].items()}
        self.hu = SimpleNamespace(**tissues)
        self.hu.bone *= self.bone_age
        self.hu.cortex *= self.bone_age
        self.table = u(8, 22), u(-260, -60), rng.random() < .9  # gap, HU, is it in the picture?
        self.twist = f32([u(-5, 5) for _ in range(6)]).reshape(3, 2)  # of vessels and airways
        self.offset = f32((u(-30, 30), u(-180, -120), u(-900, 200)))  # of the scanner

    def at(self, *points):
        """Points of the mean patient -> this patient's, (N, 3)."""
        return f32(points) * self.scale

    # Chest and lungs.
    def radius(self, x, y, z):
        """Distance of the chest's inner wall from the body's axis, towards (x, y), at height z."""
        r = hypot(x, y) + 1e-3
        across, deep = abs(x) / r / self.a, abs(y) / r / self.b
        outline = (across ** self.boxy + deep ** self.boxy) ** (-1 / self.boxy)
        height = z / self.top
        return profile("width", height) * outline + profile("apex", height) * (y / r)

    def front(self, z):
        """y just before the sternum's middle."""
        return -self.radius(*f32((0, -1)), f32(z)) - 7

    def layers(self, x, y, z):
        """Signed distances to the skin and to the muscles' surface; how thick the muscles are."""
        r = hypot(x, y) + 1e-3
        side, back, height = (x / r) ** 2, y / r, z / self.top
        wall = self.wall * (1 + .9 * exp(-((back - .9) / .14) ** 2) + .25 * side ** 2)
        chest = profile("taper", height) * self.radius(x, y, float32(.35 * self.top))
        muscle = r - wall - chest - profile("shoulders", height) * side
        angle = np.arctan2(x, y)
        waves = 1 + sum(w * cos((n + 2) * angle) for n, w in enumerate(self.lobed))
        return muscle - self.fat * waves * (1.1 - .25 * back), muscle, wall

    def diaphragm(self, x, y):
        """Its height: two domes, which fall towards the rim and the back."""
        rim = clip(hypot(x / self.a, y / self.b), 0, 1.1)
        right = 1 / (1 + exp(clip(x / 12, -30, 30)))
        dome = self.dome["left"] + right * (self.dome["right"] - self.dome["left"])
        bulge = 8 * exp(-((abs(x) - 62) ** 2 + (y + 10) ** 2) / 2000)
        return dome * (1 - rim ** 3) - clip(y, 0, None) * .12 + bulge

    def mediastinum(self, y, z):
        """Half the width between the lungs without the heart."""
        width = profile("mediastinum", y / self.b)
        return width * profile("mediastinum_height", z / self.top) * self.scale[0]

    def depth(self, points):
        """How deep points (N, 3) lie in a lung, mm (negative: outside)."""
        x, y, z = f32(points).T
        centre, radii, axes = self.heart
        heart = sqrt((((points - centre) @ axes.T / radii) ** 2).sum(-1)) - 1
        chest = self.radius(x, y, z) - hypot(x, y)
        medial = abs(x) - self.mediastinum(y, z)
        basal = .8 * (z - self.diaphragm(x, y))
        return minimum.reduce((chest, medial, basal, heart * radii.min()))

    def lobe(self, points):
        """The lobe that each of points (N, 3) lies in or would lie in."""
        x, y, z = (points / self.scale).T
        lower, middle = z < 105 + 62 * y / 86, z < 116  # the oblique and horizontal fissures
        number = np.where(x < 0, np.where(lower, 2, middle), 3 + lower)
        return array(LOBES)[number]

    def hilum(self, point):
        """The root of the lung that a point lies in."""
        return self.at((math.copysign(36, point[0]), 9, 131))[0]

    def spots(self, rng, n, margin, place, most=1e9):
        """n points in a lobe or on a side, margin to most mm deep as far as it has such."""
        high = self.a, self.b, self.top
        points = f32(rng.uniform((-self.a, -self.b, 0), high, (1500 + 8 * n, 3)))
        depth = self.depth(points)
        there = np.char.startswith(self.lobe(points), place) & (depth > 1)
        points, depth = points[there], depth[there]
        good = (depth >= margin) & (depth <= most)
        deepest = np.argsort(-minimum(depth, most))
        order = concatenate((np.flatnonzero(good), deepest[~good[deepest]]))
        return points[order[:n]]

    # Heart, vessels, airways.
    @cached_property
    def heart(self):
        """Centre, radii and axes (rows) of the heart's ellipsoid."""
        mean = DATA["heart"]
        radii = array(mean["radii"]) * self.heart_scale * self.scale.mean()
        return mean["centre"] * self.scale, radii, f32(mean["axes"])

    def in_heart(self, points, lift=1):
        """Points in units of the heart's radii -> patient's; lift: a factor of their distance."""
        centre, radii, axes = self.heart
        return centre + (points * radii * lift) @ axes

    def on_heart(self, directions, lift):
        """Points on the heart's surface, lifted by a factor, in directions (N, 3) in its axes."""
        unit = directions / norm(directions, axis=1, keepdims=True)
        return self.in_heart(unit, lift)

    def line(self, name):
        """Centre line (N, 3) of a vessel or of an airway outside the lungs."""
        return path(self.at(*LINES[name]["points"]), 2, LINES[name]["smooth"])

    @cached_property
    def aorta(self):
        """Centre line (N, 3) and radii (N,)."""
        line = self.line("long_aorta" if self.aorta_scale >= 1.12 else "aorta")
        taper = f32(15.5 - 4 * linspace(0, 1, len(line)))
        return line, taper * self.scale.mean() * self.aorta_scale

    def tree(self, side, kind):
        """A lung's tree of tubes as it winds in this patient -> points (N, 3), radii (N,)."""
        tree = shared()[side, kind]
        points = tree[:, :3] * self.scale
        wave = sin(points[:, (1, 2, 0)] / 38 + self.twist[:, 0]) * self.twist[:, 1]
        peripheral = clip((abs(points[:, :1]) - 25) / 40, 0, 1)
        return points + wave * peripheral, tree[:, 3] * self.scale.mean()

    def bronchi(self, side):
        """A lung's airways as far as they stay in it -> points (N, 3), radii (N,)."""
        points, radii = self.tree(side, "airway")
        root = norm(points - points[0], axis=1) < 12
        clear = (self.depth(points) > 1) | root
        return points[clear], radii[clear]

    # Bones.
    def level(self, number):
        """Height of the middle of thoracic vertebra `number`."""
        return self.top * (1.045 - .0965 * (number - 1))

    @property
    def pitch(self):
        """Height of a vertebra with its disc."""
        return .0965 * self.top

    def disc(self, name):
        """Height of the disc below a vertebra such as "T7"."""
        return self.level(int(name[1:])) - .5 * self.pitch

    def spine(self, z):
        """y of the vertebrae's middle."""
        return .63 * self.b + self.kyphosis * (1 - ((z - 120) / 130) ** 2) - 4

    def rib(self, side, number):
        """Centre line (80, 3) from spine to cartilage: round the chest, falling, then rising."""
        t = linspace(0, 1, 80, dtype=float32)
        back, end = math.radians(164), math.radians(26 + 18 * max(number - 7, 0))
        angle = back + t * (end - back)
        x, y = SIGN[side] * sin(angle), -cos(angle)
        fall = min(24 + 14 * number, 64 + 3 * number) * minimum(t / .8, 1) ** 1.15
        drop = fall - 55 * clip(t - .82, 0, 1)
        z = self.level(number) + 4 - drop * self.scale[2]
        r = maximum(self.radius(x, y, z), .3 * self.a) + 4.5
        return np.c_[x * r, y * r, z]

    def corner(self, pixels, xy):
        """The first voxel's centre of a reconstruction, LPS mm, before the scanner's offset."""
        edge = -(pixels - 1) / 2 * xy
        return f32((edge, edge + 6, -.13 * self.top))


def enlarged(lesions, name):
    """How large an organ is with the lesions, 1 without."""
    return lesions[name][0]["scale"] if name in lesions else 1


# What all patients share: textures, and the trees of the lungs' vessels and airways.
def periodic_noise(size, sigma, seed):
    """Smooth noise (size^3), mean 0, variance 1, correlated over about sigma voxels."""
    white = default_rng(seed).standard_normal((size,) * 3, dtype=float32)
    full, half = np.fft.fftfreq(size) ** 2, np.fft.rfftfreq(size) ** 2
    k2 = full[:, None, None] + full[:, None] + half
    spectrum = np.fft.rfftn(white) * exp(-2 * (math.pi * sigma) ** 2 * k2)
    noise = f32(np.fft.irfftn(spectrum, s=white.shape, axes=(0, 1, 2)))
    return (noise - noise.mean()) / noise.std()


def periodic_cells(size, cell, seed):
    """Walls of a foam (size^3; 1: wall, 0: inside), cells of about `cell` voxels: lobules."""
    n = size // cell
    seeds = f32(default_rng(seed).uniform(.15, .85, (n, n, n, 3)))
    seeds = seeds.transpose(3, 0, 1, 2)
    at = np.indices((size,) * 3, dtype=float32) / cell
    home = np.floor(at).astype(int)
    first = second = f32(9)  # distances to the two nearest seeds
    for step in np.ndindex(3, 3, 3):
        near = home + np.reshape(step, (3, 1, 1, 1)) - 1
        offset = near + seeds[:, *(near % n)] - at
        distance = f32(norm(offset, axis=0))
        second = minimum(second, maximum(first, distance))
        first = minimum(first, distance)
    return clip(1.3 - (second - first) * cell, 0, 1)


def grow(root, leaves, radius, exponent):
    """A tree of tubes from a root (3,) to its leaves (N, 3) -> (M, 4): x, y, z, radius.

    Halve the leaves, run to between each half, go on; the fewer leaves, the thinner the tube.
    """
    pieces, todo = [], [(f32(root), leaves, radius)]
    while todo:
        start, group, r0 = todo.pop()
        centre = group.mean(0)
        end = start + (.5 if len(group) > 1 else 1) * (centre - start)
        way = end - start
        r1 = radius * (len(group) / len(leaves)) ** (1 / exponent)
        t = linspace(0, 1, max(2, int(norm(way) / 2)), dtype=float32)[:, None]
        bend = sin(math.pi * t) * np.cross(way, (.1, .2, .1)) * .4
        pieces.append(concatenate((start + t * way + bend, r0 + t * (r1 - r0)), 1))
        if len(group) > 1:
            longest = np.linalg.svd(group - centre, full_matrices=False)[2][0]
            side = (group - centre) @ longest
            upper = side > (np.median(side) if len(group) > 2 else 0)
            todo += [(end, group[upper], r1), (end, group[~upper], r1)]
    return f32(concatenate(pieces))


@cache
def shared():
    """Textures by name, white noise, and the mean patient's trees by (side, kind)."""
    parts = {"fine": periodic_noise(64, 2, 1), "coarse": periodic_noise(64, 5, 2)}
    parts["cells"] = periodic_cells(63, 7, 3)
    parts["noise"] = default_rng(4).standard_normal(6_000_000, dtype=float32)
    rng, mean = default_rng(5), Anatomy(random.Random("mean"), {})
    vars(mean).update(DATA["body"], scale=np.ones(3, float32))
    for side, (kind, tree) in product(SIDES, DATA["trees"].items()):
        leaves = mean.spots(rng, tree["leaves"], 5, side)
        root = array(tree["root"]) * (SIGN[side], 1, 1)
        parts[side, kind] = grow(root, leaves, tree["radius"], tree["exponent"])
    return parts


# ---------------------------------------------------------------------------------- the canvas
# Arrays are (Z, Y, X) float32.
IN_LUNG = "in lung"  # paint only where there is lung
NO_LUNG = "no lung"  # where it is painted, there is lung no more


class Shape(NamedTuple):
    """A box of the canvas (slices; or flat indices) and the signed distance in it to a surface."""

    where: tuple
    distance: np.ndarray

    def shrunk(self, mm):
        return Shape(self.where, self.distance + mm)

    def cut(self, *distances):
        """The part that lies inside other surfaces too."""
        return Shape(self.where, inside_all(self.distance, *distances))


def inside_all(*distances):
    """The signed distance to what several surfaces have in common."""
    return reduce(maximum, distances)


def joined(tubes):
    """[(line (N, 3), radius or radii)] -> the points of all, their radii."""
    lines = [line for line, _ in tubes]
    radii = [broadcast_to(radius, len(line)) for line, radius in tubes]
    return concatenate(lines), concatenate(radii)


class Canvas:
    """A reconstruction being drawn: HU, the lungs' coverage, distances to what bounds them."""

    def __init__(self, body, how):
        pixels, xy, dz = how.pixels, how.xy, how.dz
        self.body = body
        self.name, self.masks = None, {}  # the abnormality being drawn; each one's voxels
        self.spacing = xy, xy, dz
        self.vox = (xy * xy * dz) ** (1 / 3)
        self.shape = int(1.22 * body.top / dz), pixels, pixels
        self.origin = body.corner(pixels, xy)
        # Patient's coordinates: x, y (Y, X) of each in-plane pixel, z (Z, 1, 1) of each slice.
        x, y = self.origin[:2, None] + xy * arange(pixels, dtype=float32)
        y = y[:, None]
        self.cos, self.sin = math.cos(body.roll), math.sin(body.roll)
        self.x, self.y = self.cos * x + self.sin * y, self.cos * y - self.sin * x
        slices = dz * arange(self.shape[0], dtype=float32)
        self.z = (self.origin[2] + slices)[:, None, None]
        # depth in a lung; signed distances to chest cavity and skin; height above the diaphragm
        fields = np.empty((6, *self.shape), float32)
        self.hu, self.lung, self.depth, self.cavity, self.skin, self.dome = fields
        self.scratch = np.full(math.prod(self.shape), 1e3, float32)

    def grid(self, points):
        """Patient's points (N, 3) or (3,) -> fractional (x, y, z) indices."""
        x, y, z = f32(points).T
        turned = stack((self.cos * x - self.sin * y, self.sin * x + self.cos * y, z), -1)
        return (turned - self.origin) / f32(self.spacing)

    # Boxes and shapes.
    def box(self, centre, reach):
        """Slices round a point; x, y (Y, X) and z (Z, 1, 1) there, relative to the point."""
        x, y, z = broadcast_to(f32(reach), 3) + self.vox
        half = array((max(x, y), max(x, y), z)) / self.spacing
        at, size = self.grid(centre), self.shape[::-1]
        first = clip(np.ceil(at - half).astype(int), 0, size)
        last = clip(np.floor(at + half).astype(int) + 1, 0, size)
        where = tuple(slice(*ends) for ends in zip(first[::-1], last[::-1]))
        dx, dy = self.x[where[1:]] - centre[0], self.y[where[1:]] - centre[1]
        return where, (dx, dy, self.z[where[0]] - centre[2])

    def part(self, where):
        """Views of the coordinates and fields in a box, and its texture."""
        part = SimpleNamespace(where=where, texture=partial(self.texture, where))
        part.z = self.z[where[0]]
        part.x, part.y = self.x[where[1:]], self.y[where[1:]]
        for field in ("hu", "lung", "depth", "cavity", "skin", "dome"):
            setattr(part, field, getattr(self, field)[where])
        return part

    def ellipsoid(self, centre, radii, axes=None, reach=0):
        """An ellipsoid whose axes are the rows of `axes`; reach widens its box."""
        radii = broadcast_to(f32(radii), 3)
        if axes is None:
            where, (dx, dy, dz) = self.box(centre, radii + reach)
            offsets = dx[None], dy[None], dz
        else:
            where, (dx, dy, dz) = self.box(centre, radii.max() + reach)
            offsets = [(dx * x + dy * y)[None] + dz * z for x, y, z in axes]
        squares = [(offset / radius) ** 2 for offset, radius in zip(offsets, radii)]
        k = sqrt(sum(squares))
        slope = sqrt(sum(square / radius ** 2 for square, radius in zip(squares, radii)))
        return Shape(where, k * (k - 1) / (slope + 1e-6))

    def tube(self, points, radii, tall=1.):
        """A chain of spheres, stretched along z where tall > 1, as flat indices; some may recur."""
        radii = broadcast_to(f32(radii), len(points))
        radii = minimum(radii, 2 * radii - self.vox / 2)  # thinner than a voxel: covers it in part
        at, reach = self.grid(points), radii + self.vox / 2
        there = ((at > -2) & (at < array(self.shape[::-1]) + 1)).all(1) & (reach > 0)
        at, radii, reach = at[there], radii[there], reach[there]
        spacing = f32(self.spacing) / (1, 1, tall)
        size = (reach / self.vox + .5).astype(int)
        indices, distances = [np.zeros(0, int)], [np.zeros(0, float32)]
        for n in np.unique(size):  # spheres of like size together
            some = size == n
            steps = (reach[some].max() / spacing + .5).astype(int)
            index, distance = self.spheres(at[some], radii[some], spacing, steps)
            near = distance < self.vox / 2
            indices.append(index[near])
            distances.append(distance[near])
        # A voxel near several spheres has the least of its distances.
        index = concatenate(indices)
        minimum.at(self.scratch, index, concatenate(distances))
        distance = self.scratch[index]
        self.scratch[index] = 1e3
        return Shape(index, distance)

    def spheres(self, at, radii, spacing, steps):
        """Flat indices of the voxels up to `steps` from each centre, distances to its sphere."""
        squares, places = [], []
        for axis in (2, 1, 0):
            centre = at[:, axis, None]
            place = np.rint(centre).astype(int) + arange(-steps[axis], steps[axis] + 1)
            square = (f32(place - centre) * float32(spacing[axis])) ** 2
            shape = [len(at), 1, 1, 1]
            shape[3 - axis] = -1
            squares.append(square.reshape(shape))
            places.append(place.reshape(shape))
        index = np.ravel_multi_index(places, self.shape, mode="clip")
        return index, sqrt(sum(squares)) - radii[:, None, None, None]

    def texture(self, where, name, mm, shift=0):
        """A shared texture, mm per voxel of it, in a box; fixed to the patient, not the grid."""
        tile, index = shared()[name], []
        for axis, part in enumerate(where):
            voxels = arange(self.shape[axis])[part]
            at = self.origin[2 - axis] + self.spacing[2 - axis] * voxels
            at = at / mm + shift * (axis + 1)
            index.append(np.round(at).astype(int) % len(tile))
        return tile[np.ix_(*index)]

    # Painting.
    def cover(self, distance, edge=0):
        """Share of a voxel inside a surface; edge: over how many mm it blurs."""
        return clip(.5 - distance / (self.vox + edge), 0, 1)

    def paint(self, shape, hu, lung=None, edge=0, mark=True):
        """Fill a shape; mark: note it in the mask of the abnormality being drawn."""
        self.blend(shape.where, self.cover(shape.distance, edge), hu, lung, mark)

    def stroke(self, points, radii, hu, lung=None, strength=1, tall=1., mark=True):
        """Fill a chain of spheres; hu: a value, or a function of the signed distance."""
        where, distance = self.tube(points, radii, tall)
        hu = hu(distance) if callable(hu) else hu
        self.blend(where, self.cover(distance) * strength, hu, lung, mark, .4)

    def blend(self, where, cover, hu, lung=None, mark=True, level=.5):
        """Blend towards hu by coverage; lung: IN_LUNG, NO_LUNG or None, which leaves it alone."""
        volume, lungs = view(self.hu, where), view(self.lung, where)
        if lung == IN_LUNG:
            cover = cover * lungs[where]
        elif lung == NO_LUNG:
            lungs[where] *= 1 - cover
        volume[where] += cover * (hu - volume[where])
        if mark:
            self.note(where, cover, level)

    def note(self, where, cover, level=.5):
        """Add the voxels with more than a level of coverage to the abnormality's mask."""
        if self.name:
            mask = self.masks.setdefault(self.name, np.zeros(self.shape, bool))
            view(mask, where)[where] |= cover > level

    def bone(self, distance):
        """HU across a bone: a cortex of 2 mm around marrow."""
        hu = self.body.hu
        return hu.cortex + self.cover(distance + 2.2, 1) * (hu.bone - hu.cortex)


def view(field, where):
    """The field for slices, its flat view for flat indices."""
    return field if isinstance(where, tuple) else field.reshape(-1)


# ------------------------------------------------------------------------------ the normal patient
# From the trunk to the airways; what is drawn later covers what was there.
def trunk(c):
    """Skin, fat, muscle, lungs and mediastinal fat; in slabs whose temporaries stay small."""
    c.heart = c.ellipsoid(*c.body.heart, 30)
    c.depth.fill(1e3)
    c.depth[c.heart.where] = c.heart.distance - 2
    for start in range(0, c.shape[0], 32):
        slab(c, slice(start, start + 32))
    for sign in (-1, 1):
        soft_parts(c, sign)


def slab(c, k):
    """The trunk in slices k, and the fields of the canvas there."""
    body, x, y, z, value = c.body, c.x, c.y, c.z[k], c.body.hu
    skin, muscle, wall = body.layers(x, y, z)
    cavity = hypot(x, y) + 1e-3 - body.radius(x, y, z)
    dome = z - body.diaphragm(x, y)
    depth = minimum(-cavity, abs(x) - body.mediastinum(y, z))
    depth = minimum(minimum(depth, .8 * dome), c.depth[k])
    # From the air outside inwards: skin, fat under it, muscles with fat between them, the chest.
    hu = c.cover(skin) * 1060 - 1050
    hu += c.cover(skin + 2) * (value.fat - 10)
    between = clip(1 - abs(muscle + .5 * wall + 2) / 3.5, 0, 1) * (cavity > 6)
    hu += c.cover(muscle) * (value.muscle - value.fat - 75 * between)
    hu += c.cover(cavity + 1) * (value.fat + 6 - hu)
    # Lungs, with their oblique fissures.
    grain = c.texture(np.s_[k, :, :], "fine", 2.5)
    tissue = value.lung + value.gradient * y + 8 * grain
    fissure = abs(z - (105 + 62 * y / body.b) * body.scale[2])
    tissue += 90 * clip(1 - fissure / c.vox, 0, 1)
    lung = c.cover(-depth)
    hu += lung * (tissue - hu)
    c.hu[k], c.lung[k], c.depth[k] = hu, lung, depth
    c.cavity[k], c.skin[k], c.dome[k] = cavity, skin, dome


def soft_parts(c, sign):
    """Axillary fat; a breast: fat with glands in it."""
    body, fat = c.body, c.body.hu.fat
    armpit = sign * .98 * body.a, 0, .84 * body.top
    c.paint(c.ellipsoid(armpit, (22, 30, 34), reach=4), fat + 8, edge=4)
    if not body.breast:
        return
    front = .04 * body.b - body.b - body.wall - .4 * body.fat
    centre = array((sign * 68 * body.scale[0], front, .42 * body.top))
    where, distance = c.ellipsoid(centre, array((66, 27, 58)) * body.breast, reach=2)
    c.blend(where, c.cover(distance, 2) * (c.skin[where] > -6), fat)
    where, distance = c.ellipsoid(centre - (0, 8, 0), array((34, 15, 30)) * body.breast, reach=8)
    glands = (c.skin[where] > -6) * (c.texture(where, "fine", 3) > -.2)
    c.blend(where, c.cover(distance, 8) * .8 * glands, 20)


def organs(c):
    """Heart, liver, spleen, stomach."""
    body, hu, x, y = c.body, c.body.hu, c.x, c.y
    c.paint(c.heart, hu.blood + 2)
    highest = max(body.dome.values()) + 14
    last = min(c.shape[0], int((highest - c.origin[2]) / c.spacing[2]))
    below = c.part(np.s_[:last, :, :])
    abdomen = Shape(below.where, maximum(below.cavity, below.dome) + 4)
    c.paint(abdomen.cut(x - 38 - .35 * y - .1 * below.z, y - 62), hu.liver)
    c.paint(abdomen.cut(58 - x, 12 - y), hu.liver - 6)  # spleen
    centre, radii = body.at((52, -18, 18), (30, 34, 26))
    stomach = c.ellipsoid(centre, radii)
    there = c.part(stomach.where)
    stomach = stomach.cut(there.dome + 4)
    c.paint(stomach, 38)
    c.paint(stomach.shrunk(5).cut(there.y - centre[1] + 8), -900)  # gas above fluid


def table(c):
    """What the patient lies on: hollow, a little curved."""
    gap, hu, visible = c.body.table
    if not visible:
        return
    lowest = c.y[c.skin[c.shape[0] // 3] < 0].max()
    back = float(lowest) + gap
    first = max(0, int(c.grid((0, back - 30, 0))[1]))
    rows = c.part(np.s_[:, first:, :])
    top = abs(rows.y - back + (rows.x / 60) ** 2 * 2.5)
    c.blend(rows.where, c.cover(top - 2) * (rows.skin > 0), hu)


def skeleton(c):
    """Ribs with their cartilage, sternum, clavicles, scapulae."""
    body, top, bone, cartilage = c.body, c.body.top, [], []
    for side, number in product(SIDES, range(1, 12)):
        line = body.rib(side, number)
        end = 77 if number > 7 else 64  # of its 80 points
        bone.append(line[:end])
        cartilage.append(line[end:])
    c.stroke(concatenate(cartilage), 4.4, 95, tall=1.4)
    c.stroke(concatenate(bone), 4.2, c.bone, tall=1.35)
    z = arange(.36, .9, .012) * top
    front = body.front(z)
    sternum = [np.c_[0 * z + x, front, z] for x in (-10, -4, 4, 10)]
    c.stroke(concatenate(sternum), 4.6, c.bone)
    y = front[-1]
    clavicle = array(((16, y + 6, .92 * top), (60, y + 4, .985 * top), (125, 5, 1.03 * top)))
    for sign in (-1, 1):
        c.stroke(path(clavicle * (sign, 1, 1), 2, 20), 5.2, c.bone)
    # The scapulae: thin triangles behind the ribs, with a thicker lateral border.
    low, t = array((94, 74, .5 * top)), linspace(0, 1, 22)[:, None]
    for sign, spread in product((-1, 1), linspace(0, 1, 5)):
        high = array((84 + 44 * spread, 76 - 34 * spread, .94 * top))
        blade = (low + t * (high - low)) * (sign * body.scale[0], body.scale[1], 1)
        c.stroke(blade, 2.2 + 2 * (spread == 1), c.bone)


def vertebrae(c):
    """Bodies with end plates, discs, canal, arches with their processes."""
    body, pitch, middle = c.body, c.body.pitch, .63 * c.body.b + 16
    where, (dx, dy, _) = c.box((0, middle, 0), (42, 66, 0))
    where = slice(None), *where[1:]
    dx, dy = abs(dx[None]), dy[None] + .63 * body.b + 16 - body.spine(c.z)
    phase = ((c.z - body.level(1)) / pitch + .5) % 1 - .5  # 0: a vertebra's middle, +-.5: a disc's
    width = 15.5 + 3 * (1 - c.z / body.top)
    column = (sqrt((dx / width) ** 2 + (dy / (.8 * width)) ** 2) - 1) * .88 * width
    c.column, c.behind = Shape(where, column), dy  # for the lesions
    c.paint(c.column, 85)  # discs
    vertebra = c.column.cut((abs(phase) - .39) * pitch)
    c.paint(vertebra, c.bone(vertebra.distance))
    # Behind the bodies: an arch round the canal, with its processes.
    canal = dy - .8 * width - 9
    ring = abs(hypot(dx, canal) - 11) - 2.8
    arch = maximum(ring, (abs(phase + .1) - .27) * pitch)
    falling = abs((phase + .3 + .012 * canal + .5) % 1 - .5)
    spinous = inside_all(dx - 2.8, abs(canal - 24) - 14, (falling - .27) * pitch)
    wing = abs(canal - 3 - .15 * dx) - 4
    transverse = inside_all(dx - 32, 9 - dx, wing, (abs(phase) - .25) * pitch)
    posterior = minimum(minimum(arch, spinous), transverse)
    c.paint(Shape(where, posterior), c.bone(posterior))
    c.paint(Shape(where, hypot(dx, canal) - 8), 22)


def vessels(c):
    """The great vessels and the esophagus; the trees of the lungs' arteries and veins."""
    body, blood = c.body, c.body.hu.blood
    line, radii = body.aorta
    tubes = [(line[::3], radii[::3])]
    for name, vessel in DATA["vessels"].items():
        step = 2 if vessel["radius"] > 6 else 1
        tubes.append((body.line(name)[::step], vessel["radius"] * body.scale.mean()))
    c.stroke(*joined(tubes), blood, NO_LUNG)
    trees = [body.tree(*which) for which in product(SIDES, ("artery", "vein"))]
    c.stroke(*joined(trees), blood - 4, IN_LUNG)


def airways(c):
    """Walls, then lumens, of trachea and bronchi as far as they show."""
    body, tubes = c.body, [c.body.bronchi(side) for side in SIDES]
    for name, airway in DATA["airways"].items():
        tubes.append((body.line(name), airway["radius"] * float(body.scale.mean())))
    points, radii = joined(tubes)
    points, radii = points[radii > 1.6], radii[radii > 1.6]
    c.stroke(points, radii + .7 + .05 * radii, 0)
    c.stroke(points, radii, -960)


# ------------------------------------------------------------------------------ the abnormalities
# One function each: it draws one lesion with a pen, and what it paints goes into the abnormality's
# mask. The docstrings say what it looks like on CT.
class Pen(Canvas):
    """The canvas while one lesion is drawn: with random numbers, and what LESIONS says of it.

    That is some of side, lobe, size in mm, n, what.
    """

    def __init__(self, canvas, name, lesion):
        vars(self).update(vars(canvas) | lesion)
        self.name = name
        self.sign = SIGN.get(lesion.get("side"))
        rng = default_rng([int(share * 2**32) for share in lesion["place"]])
        self.uniform, self.normal, self.integers = rng.uniform, rng.standard_normal, rng.integers
        self.rng = rng

    @property
    def half(self):
        """Views of the lesion's side of the chest."""
        middle = int(self.grid((0, 0, 0))[0]) + 1
        right, left = np.s_[:, :, :middle], np.s_[:, :, middle:]
        return self.part(right if self.side == "right" else left)

    def site(self, margin, most=1e9):
        """A point in the lesion's lobe, margin to most mm deep."""
        return self.body.spots(self.rng, 1, margin, self.lobe, most)[0]

    def lump(self, centre, radii, rough, axes=None):
        """An ellipsoid with an uneven surface; rough: by which share of its radius."""
        radii = broadcast_to(f32(radii), 3)
        shape = self.ellipsoid(centre, radii, axes, 2 * rough * float(radii.max()))
        bumps = self.texture(shape.where, "fine", 2.5, self.integers(64))
        return shape.shrunk(rough * float(radii.mean()) * bumps)

    def blob(self, margin, spread, rough, most=1e9, tilted=False):
        """A lump of the lesion's size in its lobe -> radius, centre, shape."""
        r, centre = self.size / 2, self.site(margin, most)
        radii, axes = r * self.uniform(*spread, 3), None
        if tilted:
            axes = f32(np.linalg.qr(self.normal((3, 3)))[0])
        return r, centre, self.lump(centre, radii, rough, axes)

    def scatter(self, centre, n, spread, radii, hu, mark=True):
        """Small round shadows around a point: satellites, tree-in-bud."""
        points = centre + self.normal((n, 3)) * spread
        self.stroke(points, self.uniform(*radii, n), hu, IN_LUNG, mark=mark)

    def haze(self, part, rise, cover, level=.5):
        """Raise the density of a part, vessels staying visible; cover goes into the mask."""
        part.hu += minimum(rise, maximum(20 - part.hu, 0))
        self.note(part.where, cover, level)

    def ground_glass(self, shape, rise, edge):
        """Denser lung in which vessels stay visible."""
        part = self.part(shape.where)
        cover = self.cover(shape.distance, edge) * part.lung
        self.haze(part, cover * rise, cover)


# Diffuse.
def mosaic_attenuation_pattern(pen):
    """Patches of lung a little denser beside patches a little emptier."""
    half = pen.half
    coarse, fine = half.texture("coarse", 3, 17), half.texture("fine", 3, 5)
    pattern = clip(.5 + 3 * (coarse + .3 * fine), 0, 1) * half.lung
    half.hu += 165 * pattern - 45 * half.lung
    pen.note(half.where, pattern)


def emphysema(pen):
    """Holes without walls, mostly in the upper lobe, in lung that is thinned out."""
    half, body, n = pen.half, pen.body, pen.n
    half.hu -= 35 * half.lung * clip((half.z - .35 * body.top) / 90, 0, 1)
    upper = body.spots(pen.rng, int(.75 * n), 3, pen.lobe)
    anywhere = body.spots(pen.rng, int(.25 * n), 3, pen.side)
    points = concatenate((upper, anywhere))
    radii = pen.size / 2 * pen.uniform(.5, 1, len(points))
    pen.stroke(points, radii, -985, IN_LUNG, strength=.9)


def interlobular_septal_thickening(pen):
    """Thickened walls of the secondary lobules, below the pleura and at the bases."""
    half = pen.half
    outer = clip(1.25 - half.depth / 26, .1, 1)
    weight = outer * clip(1.4 - 1.1 * half.z / pen.body.top, .2, 1) * half.lung
    walls = half.texture("cells", 2.6, 9) * weight
    pen.haze(half, walls * 460 + weight * 30, walls, .35)


def pulmonary_fibrosis(pen):
    """Honeycomb cysts and reticulation in a rind below the pleura, thickest at the bases."""
    half = pen.half
    basal = clip(1.15 - 1.25 * half.z / pen.body.top, .12, 1)
    thick = basal * pen.size * (1 + .35 * half.texture("fine", 3))
    honeycomb = -840 + 780 * half.texture("cells", 1.5, 4)
    pen.paint(Shape(half.where, half.depth - thick), honeycomb, IN_LUNG, 5)


def sleeves(pen, extent, least, wall, lumen, strength):
    """Thick walls round the airways up to extent mm from the hilum; least: of their radii."""
    points, radii = pen.body.bronchi(pen.side)
    near = norm(points - points[0], axis=1) < extent
    points, radii = points[near], maximum(radii[near], least)
    pen.stroke(points, radii + pen.size, wall, IN_LUNG, strength)
    pen.stroke(points, radii, lumen, mark=False)


def peribronchial_thickening(pen):
    """Soft sleeves around the central bronchi."""
    sleeves(pen, 62, 0, -60, -960, .75)


def bronchial_thickening(pen):
    """Thick walls of the segmental bronchi, far into the lung."""
    sleeves(pen, 105, 1.9, 45, -950, 1)


def bronchiectasis(pen):
    """Wide bronchi that don't taper, with walls, running into the periphery of a lobe."""
    hilum, lines, tubes = pen.body.bronchi(pen.side)[0][0], [], []
    for way in pen.body.spots(pen.rng, 9, 9, pen.lobe, 26) - hilum:
        bend = hilum + .6 * way + pen.uniform(-7, 7, 3)
        lines.append(path((hilum + .3 * way, bend, hilum + way), smooth=9))
    for line in lines:
        beads = 1 + .2 * sin(arange(len(line)) / 2.2)
        tubes.append((line, pen.size / 2 * pen.uniform(.75, 1.1) * beads))
    points, radii = joined(tubes)
    pen.stroke(points, radii + 1.9, 10, IN_LUNG)
    pen.stroke(points, radii, -960, IN_LUNG)


# Focal.
def lung_nodule(pen):
    """A small round shadow of soft tissue, now and then of calcium."""
    _, _, shape = pen.blob(min(pen.size / 2 + 2, 14), (.85, 1.1), .07)
    soft, calcified = pen.uniform(10, 70), pen.uniform(150, 400)
    pen.paint(shape, pen.rng.choice((soft, calcified), p=(.85, .15)), IN_LUNG)


def lung_mass(pen):
    """Large, lobulated and spiculated, with a darker core."""
    r, centre, shape = pen.blob(.35 * pen.size, (.85, 1.1), .16)
    spicules = []
    for ray in pen.normal((14, 3)) * r:
        tip = centre + ray / norm(ray) * r * pen.uniform(1.2, 1.6)
        spicules.append(path((centre, tip)))
    pen.stroke(concatenate(spicules), 1.1, 0, IN_LUNG)
    pen.paint(shape, 42 + 8 * pen.texture(shape.where, "fine", 3), IN_LUNG)
    pen.paint(shape.shrunk(.55 * r), 18, edge=3, mark=False)


def lung_opacity(pen):
    """Ground glass: a denser cloud in which vessels stay visible."""
    margin = pen.uniform(6, 16)
    _, _, shape = pen.blob(margin, (.7, 1.15), .3, tilted=True)
    pen.ground_glass(shape, pen.uniform(210, 340), 5)


def consolidation(pen):
    """Filled lung at the pleura, with air bronchograms that run towards the hilum."""
    r, centre, shape = pen.blob(5, (.75, 1.15), .22, .3 * pen.size, tilted=True)
    pen.paint(shape, pen.uniform(25, 50), IN_LUNG, 2)
    away = centre - pen.body.hilum(centre)
    away = away / (norm(away) + 1)
    for _ in range(pen.integers(3, 7)):
        inner = centre - away * .9 * r + pen.normal(3) * .25 * r
        outer = centre + away * .6 * r + pen.normal(3) * .45 * r
        pen.stroke(path((inner, outer)), pen.uniform(1.5, 2.3), -850, IN_LUNG, mark=False)


def pneumonia(pen):
    """Patchy: several dense cores in one cloud of ground glass, with tree-in-bud around."""
    r, centre = pen.size / 2, pen.site(8, 22)
    cloud = pen.lump(centre, 1.15 * r, .3)
    pen.ground_glass(cloud, pen.uniform(220, 320), 6)
    for core in centre + pen.normal((4, 3)) * .5 * r:
        pen.paint(pen.lump(core, r * pen.uniform(.28, .45), .3), 20, IN_LUNG, 3)
    pen.scatter(centre, 36, r, (1.6, 2.8), -80)


def tuberculosis(pen):
    """A thick-walled cavity with satellites, strands to the apex, calcified granulomas."""
    r, centre = pen.size / 2, pen.site(10)
    pen.scatter(centre, 45, 1.1 * r + 5, (1.6, 3.4), 10)
    for _ in range(5):
        end = centre + (pen.normal(3) + (0, 0, 1.2)) * 18
        pen.stroke(path((centre, end), smooth=6), 1.2, 0, IN_LUNG)
    cavity = pen.lump(centre, r, .1)
    pen.paint(cavity, 40, IN_LUNG)
    pen.paint(cavity.shrunk(pen.uniform(.32, .42) * r + 1.5), -940, mark=False)
    pen.scatter(centre, 5, 1.2 * r, (1.6, 2.6), 600)


def lung_cyst(pen):
    """A round hole with a thin wall."""
    r = pen.size / 2
    hole = pen.ellipsoid(pen.site(min(r + 2, 15)), r * pen.uniform(.85, 1.1, 3), reach=4)
    pen.paint(hole.shrunk(-1.3), -150, IN_LUNG)
    pen.paint(hole, -990, IN_LUNG)


def atelectasis(pen):
    """Some plates, mostly level, above the diaphragm; or an airless wedge."""
    u, size = pen.uniform, pen.size
    if pen.what == "lobar":
        return wedge(pen)
    for _ in range(pen.integers(1, 4)):
        x, y, z = pen.site(8)
        point = x, y, min(z, pen.body.diaphragm(x, y) + u(10, 34))
        level = np.eye(3)[[1, 2, 0]]
        axes = np.linalg.qr(level + u(-.35, .35, (3, 3)))[0].T
        plate = pen.lump(f32(point), (u(2.2, 4), .6 * size, .38 * size), .02, f32(axes))
        pen.paint(plate, u(-80, 20), IN_LUNG)


def wedge(pen):
    """Airless lung between spine and diaphragm, or on the heart's border."""
    half, size, (k, n, m) = pen.half, pen.size, pen.body.scale
    x, y, z = abs(half.x), half.y, half.z
    if pen.lobe in LOWER:
        medial = .6 * (x - 30 * k) - .6 * (y - 48 * n)
        distance = medial[None] + .55 * (z - 52 * m) - .35 * size + 8
    else:
        medial = .6 * (x - 52 * k) + .6 * (y + 34 * n)
        distance = maximum(medial[None] - .2 * size, abs(z - 84 * m) - .35 * size)
    distance = distance + 5 * half.texture("fine", 2.5, pen.integers(64))
    pen.paint(Shape(half.where, distance), pen.uniform(30, 55), IN_LUNG, 1)


def pulmonary_fibrotic_sequela(pen):
    """Irregular strands from the pleura towards the hilum, and a pleural cap."""
    u, normal = pen.uniform, pen.normal
    points = pen.body.spots(pen.rng, 60, 1, pen.lobe, 6)
    up = -1 if pen.lobe in UPPER else 1  # at the apex, or at the base
    centre = points[np.argsort(up * points[:, 2])[pen.integers(0, 8)]]
    hilum = pen.body.hilum(centre)
    reach = pen.size / norm(hilum - centre)
    for _ in range(pen.integers(4, 8)):
        start, knots = centre + normal(3) * 9, []
        for t in (0, .35, .7, 1):
            way = t * reach * u(.6, 1) * (hilum - start)
            knots.append(start + way + normal(3) * 5 * (t > 0))
        pen.stroke(path(knots, smooth=5), u(1.1, 2.1), 0, IN_LUNG)
    ball = pen.ellipsoid(centre, 20)
    pen.paint(ball.cut(pen.depth[ball.where] - u(3, 6)), 15, IN_LUNG)
    pen.scatter(centre, 2, 8, (1.5, 2.2), 500, mark=False)


# Pleural.
def pleural_effusion(pen):
    """Fluid that has sunk to the back: a crescent, thickest at the base."""
    half, size = pen.half, pen.size
    back = clip(.45 + .75 * (half.y / pen.body.b), 0, 1.1)[None]
    thick = size * back * clip(1.25 - half.z / (.35 + .009 * size) / pen.body.top, 0, 1)
    fluid = pen.cover(minimum(half.depth, -half.cavity) - thick)
    pen.blend(half.where, fluid * half.lung * (thick > 1), pen.uniform(2, 18), NO_LUNG)


def pneumothorax(pen):
    """Air without vessels outside a fine pleural line; thickest in front and at the apex."""
    half = pen.half
    x, y, where, lung = half.x, half.y, half.where, half.lung.copy()
    front = clip(.45 - .8 * y / (hypot(x, y) + 1), 0, 1.2)[None]
    thick = pen.size * (front + clip(half.z / pen.body.top - .72, 0, .3) * 3)
    gap, there = -half.cavity - thick, thick > 3
    half.hu += (1 - pen.cover(gap) * lung * there) * lung * 30  # the lung has shrunk
    line = clip(1 - abs(gap) / pen.vox, 0, 1)
    pen.blend(where, line * lung * there * .6, -150, mark=False)
    pen.blend(where, pen.cover(gap + 1.2) * lung * there, -1000, NO_LUNG)


def empyema(pen):
    """A lens of thick fluid behind thick pleura, with gas; it does not follow gravity."""
    u, size = pen.uniform, pen.size
    angle, z = math.radians(u(70, 145)), float32(pen.body.top * u(.3, .55))
    x, y = f32((pen.sign * math.sin(angle), -math.cos(angle)))  # outwards
    r = float(pen.body.radius(x, y, z)) - .3 * size
    centre = array((x * r, y * r, z), float)
    axes = f32(((x, y, 0), (-y, x, 0), (0, 0, 1)))
    lens = pen.ellipsoid(centre, (.62 * size, .95 * size, 1.2 * size), axes, 3)
    there = pen.part(lens.where)
    rind = lens.cut(there.cavity + 1)
    pen.blend(lens.where, pen.cover(rind.distance) * (there.lung > .02), 65, NO_LUNG)
    pen.paint(lens.shrunk(5.5).cut(there.cavity + 6), u(22, 34), mark=False)
    bubbles = centre + u(-1, 1, (9, 3)) * size * (.25, .25, .6) - (0, .25 * size, 0)
    pen.stroke(bubbles, u(2, 5, 9), -900, mark=False)


def pleural_calcification(pen):
    """Plaques of calcium on the inside of the chest wall."""
    u = pen.uniform
    for _ in range(pen.integers(2, 5)):
        angle, z = math.radians(u(50, 150)), u(.2, .65) * pen.body.top
        arc, up = pen.size / 2 * u(.6, 1) * u(-1, 1, (2, 90))
        angle, z = angle + arc / 105, f32(z + up)
        x, y = pen.sign * sin(angle), -cos(angle)
        r = pen.body.radius(x, y, z) - 2
        pen.stroke(np.c_[x * r, y * r, z], u(1.4, 2.6, 90), u(450, 800))


# Mediastinal.
def cardiomegaly(pen):
    """A wide heart, drawn with the anatomy."""
    pen.note(pen.heart.where, pen.cover(pen.heart.distance))


def pericardial_effusion(pen):
    """Water around the heart outside a layer of epicardial fat, deeper behind and below."""
    box, fat = pen.part(pen.heart.where), pen.heart.shrunk(-4)
    thick = pen.size * clip(.75 + .35 * (box.y + 24) / 50, .4, 1.15)
    fluid = pen.cover(inside_all(fat.distance - thick, box.cavity + 2, 3 - box.dome))
    pen.blend(box.where, fluid, pen.uniform(4, 16), NO_LUNG, mark=False)
    pen.note(box.where, fluid * (1 - pen.cover(fat.distance)))
    pen.paint(fat, -85, mark=False)
    pen.paint(pen.heart, pen.body.hu.blood, mark=False)


def pericardial_calcification(pen):
    """Plates of calcium around the heart."""
    for _ in range(pen.integers(4, 7)):
        point = pen.normal(3) + (0, 0, -.5)
        plate = point / norm(point) + pen.normal((110, 3)) * .26
        radii = pen.size * pen.uniform(.3, .55, 110)
        pen.stroke(pen.body.on_heart(plate, 1.07), radii, pen.uniform(500, 900))


def hiatal_hernia(pen):
    """Stomach behind the heart: a wall around food and fat, usually with a gas-fluid level."""
    u, r, body = pen.uniform, pen.size / 2, pen.body
    centre = (10, .36 * body.b, body.dome["left"] + .55 * r) + u(-4, 4, 3)
    wall = pen.ellipsoid(centre, r * array((1.1, .85, .9)))
    lumen = wall.shrunk(4.5)
    pen.paint(wall, 45, NO_LUNG)
    pen.paint(lumen, u(5, 30))
    level = pen.part(wall.where).y - centre[1] + u(-.2, .35) * r
    if pen.rng.random() < .75:
        pen.paint(lumen.cut(level), -900)


def lymphadenopathy(pen):
    """One to three enlarged oval nodes at one station."""
    u, (x, y, z) = pen.uniform, STATIONS[pen.what]
    x = x * pen.sign if pen.what == "axillary" else x
    centre, offset = pen.body.at((x, y, z))[0] + u(-3, 3, 3), 0
    for k in range(pen.integers(1, 4)):
        r = pen.size / 2
        if k:  # a smaller neighbour
            r *= u(.5, .8)
            offset = u(-1, 1, 3) * 1.2 * r * (1, .6, 1.4)
        node = pen.ellipsoid(centre + offset, r * u(.75, 1, 3) + (0, 0, .15 * r))
        pen.paint(node, u(36, 58), NO_LUNG)


def plaques(pen, n, size, radii):
    """n calcified plaques in the wall of the aortic arch and the descending aorta."""
    u, (line, aorta_radii) = pen.uniform, pen.body.aorta
    for _ in range(n):
        i = pen.integers(int(.22 * len(line)), int(.9 * len(line)))
        run = slice(i, i + max(2, int(size * u(.5, 1) / 2)))
        along = line[min(i + 1, len(line) - 1)] - line[i - 1]
        across, up = np.linalg.svd(along[None] / norm(along))[2][1:]
        start = u(0, 2 * math.pi)
        arc = start + linspace(-.3, .3, 5)[:, None, None] * u(.5, 1.5)
        points = line[run] + aorta_radii[run, None] * (cos(arc) * across + sin(arc) * up)
        pen.stroke(points.reshape(-1, 3), u(*radii), u(500, 1000))


def arterial_wall_calcification(pen):
    """Calcified plaques in the aorta's wall."""
    plaques(pen, pen.n, pen.size, (1.2, 2))


def atherosclerosis(pen):
    """A wide, long aorta with soft plaque inside its wall and coarse calcified plaques on it."""
    line, radii = pen.body.aorta
    wall = pen.tube(line, radii)
    pen.paint(wall.shrunk(1), 12, mark=False)
    lumen = radii - pen.size * (.6 + .4 * sin(arange(len(line)) / 4))
    pen.stroke(line, lumen, pen.body.hu.blood + 6, mark=False)
    plaques(pen, 26, 26, (1.8, 2.8))
    pen.note(wall.where, -wall.distance, 0)


def coronary_artery_wall_calcification(pen):
    """Dashes of calcium along an artery's course on the heart."""
    u, (start, end) = pen.uniform, array(DATA["coronaries"][pen.what])
    t = linspace(0, 1, 40)[:, None]
    points = path(pen.body.on_heart(start * (1 - t) + end * t, 1.03), 1)
    first = pen.integers(0, max(1, min(18, len(points) - 12)))
    part = points[first:first + pen.size]
    dashes = sin(arange(len(part)) * .5 + u(0, 6)) > -.6
    pen.stroke(part[dashes], u(1.7, 2.6), u(550, 1000))


def pneumomediastinum(pen):
    """Streaks of air along trachea, great vessels and heart, outside the lungs."""
    u, integers, body, aorta = pen.uniform, pen.integers, pen.body, pen.body.aorta[0]
    guides = [(body.line("trachea"), 11), (body.line("esophagus"), 9)]
    guides += [(body.line("superior_vena_cava"), 10), (aorta[:len(aorta) // 2], 17)]
    for _ in range(26):
        guide, off = guides[integers(len(guides))]
        start = integers(0, max(1, len(guide) - 12))
        part = guide[start:start + integers(10, 26)]
        angle = u(0, 6.3) + arange(len(part)) * .06
        streak = part + np.c_[cos(angle), sin(angle), 0 * angle] * (off + u(0, 4))
        pen.stroke(streak[body.depth(streak) < 1], pen.size * u(.3, .55), -940)
    front = body.on_heart(pen.normal((60, 3)) * .4 + (0, -1, .6), 1.06)
    pen.stroke(front[body.depth(front) < 3], pen.size * .45, -920)


# Bony.
def osteophyte(pen):
    """Beaks of bone at the front and side corners of two neighbouring end plates."""
    body, signs = pen.body, (-1, 1) if pen.side == "both" else (pen.sign,)
    for sign, up in product(signs, (-1, 1)):
        z = body.disc(pen.what) + up * .16 * body.pitch
        base = array((sign * 13, body.spine(z) - 9, z))
        tip = base + array((sign * .75, -.75, -up * .5)) * pen.size * 1.15
        beak = path((base, tip), 1)
        pen.stroke(beak, linspace(4.6, 2.2, len(beak)), 620 * body.bone_age, NO_LUNG)


def spondylosis(pen):
    """A narrowed disc between dense end plates."""
    body, z = pen.body, pen.z - pen.body.disc(pen.what)
    plates = pen.column.shrunk(-2).cut(abs(z) - .3 * body.pitch)
    pen.paint(plates, body.hu.cortex * 1.1)
    disc = pen.column.cut(abs(z - .08 * pen.behind) - pen.uniform(.8, 1.6))
    pen.paint(disc, pen.rng.choice((70, -300)), mark=False)


def rib_fracture(pen):
    """A gap, the far end stepped inwards or outwards, some callus and a haematoma below it."""
    line = pen.body.rib(pen.side, pen.rib)
    i = int(pen.uniform(.3, .6) * len(line))
    out = line[i] * (1, 1, 0) / norm(line[i, :2])
    step = out * pen.size * pen.rng.choice((-1, 1), p=(.6, .4))
    pen.stroke(line[i:i + 9], 7.5, pen.body.hu.muscle, mark=False)
    pen.stroke(line[i - 1:i + 3] - out * 5, 7.5, 60, NO_LUNG)
    far = line[i + 1:i + 9] + step * linspace(1, 0, 8)[:, None] * 1.1
    pen.stroke(far, 4.3, pen.bone, NO_LUNG, tall=1.35)
    pen.stroke(line[i - 2:i] + step * .3, 5.5, 350)


# Foreign.
def medical_material(pen):
    """Metal or plastic, denser than bone; most along courses of resources/phantom_scans.toml."""
    if "sternotomy" in pen.what:  # loops of wire
        for z in linspace(.45, .86, pen.integers(5, 7)) * pen.body.top:
            pen.stroke((0, pen.body.front(z), z) + ring(40, (15, 8, 3)), 1.2, 2600)
    elif "valve" in pen.what:  # in the root of the aorta
        pen.stroke(pen.body.aorta[0][3] + ring(60, (13, 5, 13)), 2.2, 2800)
    for word, device in DATA["devices"].items():
        if word in pen.what:
            line = course(pen, device)
            for radius, hu, mark, *offset in device["strokes"]:
                pen.stroke(line + offset, radius, hu, mark=mark)


def ring(n, radii):
    """n points (n, 3) of a ring about the y axis that lies aslant."""
    angle = linspace(0, 2 * math.pi, n)
    return stack((cos(angle), sin(angle), sin(angle)), 1) * radii


def course(pen, device):
    """The points (N, 3) along which a device runs."""
    body, mirror, pieces = pen.body, (pen.sign, 1, 1), []
    for kind, *numbers in device["course"]:
        if kind == "point":
            piece = body.at(numbers)
        elif kind == "side":
            piece = body.at(numbers) * mirror
        elif kind == "heart":
            piece = body.in_heart(array([numbers]))
        elif kind == "chest":
            share, mm = array(numbers).reshape(2, 1, 3)
            piece = (share * (body.a, body.b, body.top) + mm) * mirror
        elif kind == "can":
            *radii, hu = numbers
            piece = under_skin(pen)
            pen.paint(pen.ellipsoid(piece[0], radii), hu)
        else:
            piece, first = body.line(kind), numbers[0]
            piece = piece[first if first >= 1 else int(first * len(piece)):]
        pieces.append(piece)
    points = concatenate(pieces)
    if "above" in device:
        points = points[points[:, 2] > device["above"] * body.top]
    return path(points, *device["smooth"]) if "smooth" in device else points


def under_skin(pen):
    """A point (1, 3) under the skin at the front of the chest, below a clavicle."""
    for r in range(60, 190):
        point = array((pen.sign * .55 * r, -.83 * r, .83 * pen.body.top))
        i, j, _ = np.rint(pen.grid(point)).astype(int)
        inside = 0 <= i < pen.shape[2] and 0 <= j < pen.shape[1]
        if not inside or pen.skin[0, j, i] > -12:
            break
    return point[None]


def spoken(function):
    """A function's name in words."""
    return function.__name__.replace("_", " ")


NORMAL = trunk, organs, table, skeleton, vertebrae, vessels, airways
ABNORMAL = (  # in the order in which they are drawn; named as in ABNORMALITIES
    mosaic_attenuation_pattern, emphysema, interlobular_septal_thickening, pulmonary_fibrosis,
    lung_opacity, peribronchial_thickening, bronchial_thickening, bronchiectasis, lung_cyst,
    pulmonary_fibrotic_sequela, pneumonia, consolidation, atelectasis, tuberculosis, lung_nodule,
    lung_mass, pleural_effusion, pneumothorax, empyema, pleural_calcification, cardiomegaly,
    pericardial_effusion, hiatal_hernia, lymphadenopathy, atherosclerosis,
    arterial_wall_calcification, coronary_artery_wall_calcification, pericardial_calcification,
    pneumomediastinum, osteophyte, spondylosis, rib_fracture, medical_material)


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
    width = 2 * (body.a + 1.35 * body.wall + 1.15 * body.fat) + rng.uniform(8, 34)
    pixels = min(128, max(112, round(width / rng.uniform(2.6, 3.1))))
    xy = round(min(3.2, max(2.6, width / pixels)), 3)
    axes = rng.choice(DATA["scanner"]["axes"])
    slices, weights = DATA["scanner"]["slices"]
    others = rng.sample(slices, 5)
    first = rng.choices(slices, weights)[0]
    thickness = [first] + [t for t in others if t != first and t >= 1.5]
    count = rng.choices((1, 2, 3), (85, 12, 3))[0]
    return [SimpleNamespace(
        pixels=pixels,
        xy=xy,
        dz=dz,
        axes=axes,
        noise=rng.uniform(8, 24),
        kernel=rng.choice(("soft", "sharp")),
        intercept=rng.choice((-1024, -1024, -8192)),
        roll=rng.randrange(1_000_000),  # where its noise begins in the shared noise
    ) for dz in thickness[:count]]


def draw(seed, split, index, reconstruction=0, lesions=None, masks=True):
    """Draw one reconstruction of a scan, just as `write` does.

    lesions: abnormality -> list of lesions, instead of the scan's own (see findings).
    Returns hu int16 [X, Y, Z] as stored, affine (4, 4) to RAS mm, spacing (x, y, z) in mm, the
    lesions, masks: abnormality -> bool [X, Y, Z].
    """
    scan = seed, split, index
    lesions = findings(*scan) if lesions is None else lesions
    how = reconstructions(*scan)[reconstruction]
    c = drawn(patient(*scan, lesions), how, lesions, masks)
    flips, affine = orientation(c, how.axes)
    stored = {name: mask.T[flips] for name, mask in c.masks.items()}
    return c.hu.astype(np.int16).T[flips], affine, c.spacing, lesions, stored


def drawn(body, how, lesions, masks):
    """The canvas with a patient, the lesions and noise on it, in whole HU."""
    c = Canvas(body, how)
    for part in NORMAL:
        part(c)
    for abnormality in ABNORMAL:
        name = spoken(abnormality).capitalize()
        for lesion in lesions.get(name, ()):
            abnormality(Pen(c, name if masks else None, lesion))
    # The scanner's noise: white through a sharp kernel, correlated in-plane through a soft one.
    noise, layers = shared()["noise"], [(0, 1)]  # by how many voxels it is shifted, weight
    if how.kernel == "soft":
        layers = [(0, .65), (1, .53), (how.pixels, .53)]
    for shift, weight in layers:
        start = how.roll + shift
        c.hu += how.noise * weight * noise[start:start + c.hu.size].reshape(c.shape)
    c.hu = np.rint(clip(c.hu, -1024, 3071))
    return c


def orientation(c, axes):
    """Flips of an array [X, Y, Z] in LPS that store it along axes such as "RAS"; its affine."""
    steps = array([1 if code in "LPS" else -1 for code in axes])
    flips = tuple(slice(None, None, step) for step in steps)
    extent = c.spacing * (array(c.shape[::-1]) - 1)
    corner = c.origin + c.body.offset + (1 - steps) / 2 * extent
    to_ras = array((-1, -1, 1))
    affine = np.diag((*(to_ras * steps * c.spacing), 1.))
    affine[:3, 3] = to_ras * corner
    return flips, affine


# ---------------------------------------------------------------------------------- what is written
SUFFIX = {1: "", 2: "_fixed"}  # of the folders of each of CT-RATE's releases
LONG = {"train": "train", "valid": "validation"}
TABLES = DATA["tables"] | {  # place below the root -> columns after the volume's name
    "multi_abnormality_labels/{split}_predicted_labels.csv": CT_RATE,
    "multi_abnormality_labels/ct_rate_lt_labels.csv": CT_RATE_LT,
}
OWN = (  # temporary files of this program, below the root
    ".phantom.*.tmp",
    "train*/**/.*.tmp",
    "valid*/**/.*.tmp",
    "masks/.*.tmp",
    "metadata/.*.tmp",
    "*_reports/.*.tmp",
    "*_labels/.*.tmp",
)


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


def write_atomically(path, content):
    """Write bytes to a temporary name beside path, sync, rename: a killed run leaves old or new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def nifti(voxels, affine):
    """The bytes of a .nii.gz: the same for the same input (no time, no file name)."""
    image = nib.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return packer.compress(image.to_bytes()) + packer.flush()


def write_scan(job):
    """Write the volumes (and masks) of a scan that are not there yet."""
    out, scan, release, masks = job
    for k, how in enumerate(reconstructions(*scan)):
        name = f"{scan_name(*scan)}_{k + 1}"
        volume, mask = out / volume_path(name, release), out / f"masks/{name}.nii.gz"
        if volume.exists() and (mask.exists() or not masks):
            continue
        hu, affine, _, _, drawn = draw(*scan, k, masks=masks)
        if masks:
            bits = np.zeros(hu.shape, np.int64)
            for abnormality, where in drawn.items():
                bits |= where.astype(np.int64) << ABNORMALITIES.index(abnormality)
            write_atomically(mask, nifti(bits, affine))
        if release == 1:  # raw values; neither rescale nor spacing in the header
            hu = hu - np.int16(how.intercept)
            affine = np.diag(np.sign(np.diag(affine)))
        write_atomically(volume, nifti(hu, affine))


def table_rows(scan, release):
    """Yield for each volume of a scan its row in each of TABLES."""
    seed, split, index = scan
    rng = random.Random(f"report {seed} {split} {index}")
    text = [rng.choice(SITUATIONS), rng.choice(TECHNIQUES)]
    lesions = findings(*scan)
    text += [part or "Not given." for part in report(lesions, rng)]
    labels = [int(name in lesions) for name in CT_RATE]
    rare = [int(name in lesions) for name in CT_RATE_LT]
    body = patient(*scan, lesions)
    for k, how in enumerate(reconstructions(*scan)):
        name, xy = f"{scan_name(*scan)}_{k + 1}.nii.gz", how.xy
        intercept = how.intercept if release == 1 else 0
        corner = body.corner(how.pixels, xy) + body.offset
        position = str([round(float(at), 3) for at in corner])
        metadata = ["Phantom", how.kernel, "F" if body.female else "M", 1, intercept]
        metadata += [f"[{xy}, {xy}]", how.dz, position, "[1, 0, 0, 0, 1, 0]"]
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
            stamp = json.loads(path.read_text())
            other = {key: stamp.get(key) for key in settings}
            if other != settings:
                raise ValueError(
                    f"{path}: holds a phantom of {other}, not {settings}; "
                    "choose another --out or delete it"
                )


def sweep(out):
    """Delete what a killed run left half written; what other programs write there stays."""
    for pattern in OWN:
        for temporary in out.glob(pattern):
            temporary.unlink(missing_ok=True)


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
    sweep(out)
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
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(write_scan, jobs, chunksize=4)


# ---------------------------------------------------------------------------------- a contact sheet
NORMAL_VIEWS = ["Normal, lung window", "Normal, soft tissue"]


def example(seed, k, name, plane):
    """An otherwise normal patient with one abnormality, cut where it is widest.

    plane: 0 axial, 1 coronal, 2 sagittal. Returns (image (rows, columns) in HU, mask of the
    lesion, height of a pixel / its width).
    """
    rng = random.Random(f"preview {seed} {name}")
    lesions = LESIONS[name](rng) if name in LESIONS else []
    for lesion in lesions:
        lesion["place"] = [rng.random() for _ in range(3)]
    scan, lesions = (seed, "preview", k), {name: lesions}
    c = drawn(patient(*scan, lesions), reconstructions(*scan)[0], lesions, True)
    mask = c.masks.get(name, np.zeros(c.shape, bool))
    down, across = [axis for axis in range(3) if axis != plane]
    at = mask.sum((down, across)).argmax() if mask.any() else c.shape[0] // 2
    return c.hu.take(at, plane), mask.take(at, plane), c.spacing[2 - down] / c.spacing[2 - across]


def preview(path, seed=0):
    """Write a PNG with two normal patients and an example of each abnormality, outlined."""
    from matplotlib.figure import Figure

    figure = Figure((21, 16), facecolor="black")
    axes = figure.subplots(5, 7).flat
    for k, (axis, name) in enumerate(zip(axes, [*NORMAL_VIEWS, *ABNORMALITIES])):
        window, plane = DATA["views"].get(name, ("lung", 0))
        black, white = DATA["windows"][window]
        image, inside, aspect = example(seed, k, name, plane)
        style = {"cmap": "gray", "vmin": black, "vmax": white, "interpolation": "bicubic"}
        origin = "lower" if plane else "upper"
        axis.imshow(image, aspect=aspect, origin=origin, **style)
        if inside.any():
            grown = inside.astype(int)
            for shift, way in product((-2, 2), (0, 1)):
                grown += np.roll(inside, shift, way)
            axis.contour(grown > 0, [.5], colors="#ffd400", linewidths=.6)
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


def run_command(main):
    """Run a command line's main() -> exit status; bad input is 2 and one line on standard error."""
    try:
        return main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run_command(main))
