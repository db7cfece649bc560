"""The things that stand in the demo scenes, each drawn upright on a canvas of its own.

A class is told by its silhouette and by its texture. Colours are drawn at random, and
the texture of one class may turn up on a piece of scenery, so no single cue suffices.
Canvas coordinates run from -1 to 1 on both axes, x to the right and y down. Colours
come first in all arrays, (3, height, width), which NumPy works through much faster.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import cv2
import numpy as np

Array = np.ndarray
Rng = np.random.Generator

# cv2 takes polygon corners as integers with this many fractional bits.
_SUBPIXEL_BITS = 4


@dataclass
class Paints:
    """What a sprite is painted with: two flat colours and a surface, all in 0..1.

    Attributes:
        skin: The surface that covers most of the sprite, (3, side, side).
        ink: The darker colour of patterns and outlines, (3, 1, 1).
        accent: The lighter colour of spots and trimmings, (3, 1, 1).
    """

    skin: Array
    ink: Array
    accent: Array


def colour(*rgb: float) -> Array:
    """A colour as the canvas takes it, (3, 1, 1)."""
    return np.float32(rgb).reshape(3, 1, 1)


class Canvas:
    """A square that gathers colour and coverage, part by part.

    Args:
        paints: The paints; their skin gives the side of the square.

    Attributes:
        rgb: Colours in 0..1, (3, side, side).
        alpha: Coverage in 0..1, (side, side).
        u: The x coordinate of each pixel, (side, side).
        v: The y coordinate of each pixel, (side, side).
    """

    def __init__(self, paints: Paints) -> None:
        self.paints = paints
        self.side = paints.skin.shape[1]
        self.rgb = paints.skin.copy()
        self.alpha = np.zeros((self.side, self.side), np.float32)
        axis = (np.arange(self.side, dtype=np.float32) + 0.5) * (2 / self.side) - 1
        self.u, self.v = np.meshgrid(axis, axis)

    def _pixels(self, points: Array) -> Array:
        # A pixel's centre has whole-numbered coordinates in cv2.
        pixels = (np.asarray(points) + 1) * (self.side / 2) - 0.5
        return np.rint(pixels * 2**_SUBPIXEL_BITS).astype(np.int32)

    def polygon(self, points: Array) -> Array:
        """Coverage of a filled polygon."""
        mask = np.zeros((self.side, self.side), np.uint8)
        cv2.fillPoly(mask, [self._pixels(points)], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
        return mask.astype(np.float32) / 255

    def stroke(self, points: Array, width: float) -> Array:
        """Coverage of an open line through the points."""
        mask = np.zeros((self.side, self.side), np.uint8)
        thick = max(1, round(width * self.side / 2))
        line = [self._pixels(points)]
        cv2.polylines(mask, line, False, 255, thick, cv2.LINE_AA, _SUBPIXEL_BITS)
        return mask.astype(np.float32) / 255

    def disc(self, x: float, y: float, rx: float, ry: float | None = None) -> Array:
        """Coverage of a disc, or of an ellipse where ``ry`` is given."""
        return self.discs([(x, y, rx, rx if ry is None else ry)])

    def discs(self, ellipses: Iterable[tuple[float, float, float, float]]) -> Array:
        """Coverage of ellipses, each given by its centre and its two radii."""
        mask = np.zeros((self.side, self.side), np.uint8)
        for x, y, rx, ry in ellipses:
            left, top, right, low = self._pixels([x, y, x + rx, y + ry]).tolist()
            shape = ((left, top), (right - left, low - top), 0, 0, 360)
            cv2.ellipse(mask, *shape, 255, -1, cv2.LINE_AA, _SUBPIXEL_BITS)
        return mask.astype(np.float32) / 255

    def add(self, part: Array, paint: Array) -> None:
        """Put an opaque part over what is there."""
        self.tint(part, paint)
        self.alpha = np.maximum(self.alpha, part)

    def tint(self, weight: Array, paint: Array) -> None:
        """Blend a colour in, and leave the coverage as it is."""
        self.rgb += weight * (paint - self.rgb)


def rounded(points: Array, times: int = 3) -> Array:
    """Cut the corners of a closed polygon (Chaikin)."""
    points = np.asarray(points, np.float32)
    for _ in range(times):
        after = np.roll(points, -1, axis=0)
        cut = np.stack([0.75 * points + 0.25 * after, 0.25 * points + 0.75 * after], 1)
        points = cut.reshape(-1, 2)
    return points


def _band(phase: Array, width: float) -> Array:
    """Soft lines where ``phase`` crosses whole numbers; ``width`` is in periods."""
    distance = np.abs(phase - np.rint(phase))
    return np.clip(1.5 - 2 * distance / width, 0, 1)


# Textures: weights in 0..1 with which ink goes over the skin.


def scales(canvas: Canvas, rng: Rng) -> Array:
    count = rng.uniform(4.5, 7.5)
    row = np.floor(canvas.u * count)
    along = canvas.u * count - row
    across = canvas.v * count + 0.5 * (row % 2)
    across -= np.floor(across) + 0.5
    reach = np.hypot(along, 1.3 * across)
    return np.clip(1 - np.abs(reach - 0.72) / 0.22, 0, 1) * 0.8 + 0.3 * (reach > 0.72)


def veins(canvas: Canvas, rng: Rng) -> Array:
    count, slant = rng.uniform(4, 7), rng.uniform(0.5, 1.0)
    side = _band((canvas.u - slant * np.abs(canvas.v)) * count, 0.22)
    middle = np.clip(2 - np.abs(canvas.v) / 0.03, 0, 1)
    return np.maximum(side * 0.8, middle)


def knit(canvas: Canvas, rng: Rng) -> Array:
    count = rng.uniform(4, 6)
    column = canvas.u * count
    lean = np.abs(column - np.rint(column))
    stitch = _band(canvas.v * count * 1.4 + lean * 1.6, 0.45) * 0.7
    return np.maximum(stitch, _band(column + 0.5, 0.16) * 0.8)


def wood(canvas: Canvas, rng: Rng) -> Array:
    x, y = rng.uniform(-1.5, 1.5), rng.uniform(-0.8, 0.8)
    wave = 0.06 * np.sin(5 * canvas.u + rng.uniform(0, 6)) + 0.03 * canvas.rgb[0]
    ring = np.hypot(0.22 * (canvas.u - x), canvas.v - y + wave)
    phase = ring * rng.uniform(5, 9)
    return 0.75 * (phase - np.floor(phase)) ** 2


def spots(canvas: Canvas, rng: Rng) -> Array:
    count = rng.integers(14, 24)
    places, radii = rng.uniform(-1, 1, (count, 2)), rng.uniform(0.06, 0.15, count)
    return canvas.discs((x, y, r, r) for (x, y), r in zip(places, radii, strict=True))


TEXTURES = (scales, veins, knit, wood, spots)


def fish(canvas: Canvas, rng: Rng) -> None:
    ink, accent = canvas.paints.ink, canvas.paints.accent
    tall, tail = rng.uniform(0.34, 0.52), rng.uniform(0.3, 0.5)
    ray = _band(canvas.u * 2 + canvas.v * 7, 0.35)
    fin_colour = accent + ray * 0.6 * (ink - accent)
    root = [(-0.3, -0.1), (-0.3, 0.1)]
    fins = [
        [root[0], (-0.95, -tail), (-0.8, 0.0), (-0.95, tail), root[1]],
        [(0.3, -0.8 * tall), (-0.1, -tall - 0.3), (-0.4, -tall - 0.1), (-0.25, -0.2)],
        [(0.1, 0.8 * tall), (-0.15, tall + 0.22), (-0.3, tall), (-0.15, 0.2)],
    ]
    for fin in fins:
        canvas.add(canvas.polygon(rounded(fin, 2)), fin_colour)

    upper = [(0.92, -0.05), (0.68, -0.8 * tall), (0.15, -1.1 * tall), (-0.5, -0.1)]
    outline = [*upper, *[(x, -y) for x, y in reversed(upper)]]
    body = canvas.polygon(rounded(outline))
    canvas.add(body, canvas.paints.skin)
    head = np.clip((canvas.u - 0.36 + 0.5 * canvas.v**2) * 40, 0, 1)
    canvas.tint(body * (1 - head) * scales(canvas, rng), ink)
    canvas.tint(body * np.clip(canvas.v / tall, 0, 1) * 0.5, accent)
    gill = [(0.34, -0.24), (0.26, -0.1), (0.25, 0.1), (0.33, 0.24)]
    canvas.tint(body * canvas.stroke(gill, 0.05), ink)
    _eye(canvas, 0.6, -0.12, 0.11)


def _eye(canvas: Canvas, x: float, y: float, radius: float) -> None:
    canvas.tint(canvas.disc(x, y, radius), colour(1.0, 0.98, 0.92))
    canvas.tint(canvas.disc(x + 0.02, y, 0.6 * radius), colour(0.06, 0.05, 0.07))
    glint = canvas.disc(x + 0.05, y - 0.03, 0.22 * radius)
    canvas.tint(glint, colour(1.0, 1.0, 1.0))


def leaf(canvas: Canvas, rng: Rng) -> None:
    ink, accent = canvas.paints.ink, canvas.paints.accent
    wide, teeth = rng.uniform(0.42, 0.62), rng.integers(7, 12)
    depth = rng.choice([0.0, 0.07, 0.16])
    t = np.linspace(0, 1, 97)
    edge = wide * np.sin(np.pi * t**0.8) ** 0.75 * (1.1 - 0.3 * t)
    edge *= 1 - depth * ((t * teeth) % 1)
    x = 1.55 * t - 0.62
    outline = np.concatenate([np.stack([x, -edge], 1), np.stack([x, edge], 1)[::-1]])
    stem = [(-0.95, rng.uniform(-0.15, 0.15)), (-0.8, 0.02), (-0.5, 0.0)]
    canvas.add(canvas.stroke(stem, 0.075), ink)

    blade = canvas.polygon(outline)
    canvas.add(blade, canvas.paints.skin)
    turn = np.clip(np.abs(canvas.v) / wide + 0.5 * canvas.u, 0, 1)
    canvas.tint(blade * turn * rng.uniform(0.1, 0.6), accent)
    canvas.tint(blade * veins(canvas, rng) * 0.8, ink)
    under = np.clip(canvas.v * 60, 0, 1)
    canvas.tint(blade * under * 0.18, colour(0, 0, 0))


def mushroom(canvas: Canvas, rng: Rng) -> None:
    ink, accent = canvas.paints.ink, canvas.paints.accent
    tall, waist = rng.uniform(0.6, 0.9), rng.uniform(0.14, 0.26)
    foot = 0.15 + tall * 0.85
    right = [(waist, 0.0), (0.9 * waist, 0.3 * foot), (1.9 * waist, 0.9 * foot)]
    stalk = [*right, (1.2 * waist, 1.08 * foot)]
    outline = [*stalk, *[(-x, y) for x, y in reversed(stalk)]]
    pale = 0.25 * canvas.paints.skin + 0.75 * colour(0.95, 0.9, 0.8)
    part = canvas.polygon(rounded(outline))
    canvas.add(part, pale)
    fibre = _band(canvas.u * 9 + 0.3 * np.sin(6 * canvas.v), 0.4)
    canvas.tint(part * fibre * 0.25, ink)
    ring = canvas.disc(0, 0.3 * foot, 1.5 * waist, 0.07)
    canvas.add(ring, pale)

    brim = rng.uniform(-0.02, 0.12)
    high, wide = rng.uniform(0.7, 0.95), rng.uniform(0.75, 0.93)
    gills = canvas.disc(0, brim, 0.86 * wide, 0.17)
    canvas.add(gills, 0.55 * pale)
    canvas.tint(gills * _band(canvas.u * 11, 0.5) * 0.5, ink)
    half = [(wide, brim + 0.1), (wide, brim - 0.25), (0.62 * wide, brim - high)]
    dome = [*half, *[(-x, y) for x, y in reversed(half)], (0, brim + 0.02)]
    cap = canvas.polygon(rounded(dome))
    canvas.add(cap, canvas.paints.skin)
    canvas.tint(cap * spots(canvas, rng), accent)


def butterfly(canvas: Canvas, rng: Rng) -> None:
    ink = canvas.paints.ink
    spread, droop = rng.uniform(0.8, 0.95), rng.uniform(0.6, 0.9)
    fore = [(0.02, -0.3), (0.4, -0.85), (spread, -0.85), (0.9, -0.2), (0.45, 0.1)]
    hind = [(0.02, -0.1), (0.6, -0.05), (0.75, 0.4), (0.45, droop), (0.1, 0.45)]
    wings = np.zeros_like(canvas.alpha)
    for wing in (hind, fore):
        half = canvas.polygon(rounded([*wing, (0.02, 0.15)]))
        wings = np.maximum(wings, np.maximum(half, half[:, ::-1]))
    canvas.add(wings, canvas.paints.skin)

    x = np.abs(canvas.u)
    angle = np.arctan2(canvas.v + 0.05, x + 0.02)
    canvas.tint(wings * _band(angle * rng.uniform(2.5, 4), 0.16) * 0.85, ink)
    depth = cv2.distanceTransform((wings > 0.5).astype(np.uint8), cv2.DIST_L2, 3)
    border = np.clip(2 - depth / canvas.side * 2 / rng.uniform(0.06, 0.11), 0, 1)
    canvas.tint(wings * border, ink)
    _wing_spots(canvas, wings, rng)

    for side in (-1, 1):
        feeler = [(0.02 * side, -0.35), (0.1 * side, -0.62), (0.24 * side, -0.86)]
        canvas.add(canvas.stroke(feeler, 0.04), ink * 0.6)
        canvas.add(canvas.disc(0.24 * side, -0.87, 0.045), ink * 0.6)
    canvas.add(canvas.disc(0, 0.08, 0.085, 0.5), ink * 0.6)


def _wing_spots(canvas: Canvas, wings: Array, rng: Rng) -> None:
    border = [(0.8, -0.7), (0.82, -0.45), (0.78, -0.22), (0.66, 0.2), (0.6, 0.42)]
    eyes, pupils = [], []
    for x, y in [(0.52, -0.5), (0.42, 0.3)]:
        radius = rng.uniform(0.1, 0.17)
        eyes.append((x, y, radius, radius))
        pupils.append((x, y, radius / 2, radius / 2))
    for x, y in border:
        radius = rng.uniform(0.04, 0.07)
        eyes.append((x, y, radius, radius))
    half = canvas.discs(eyes) - canvas.discs(pupils)
    canvas.tint(wings * np.maximum(half, half[:, ::-1]), canvas.paints.accent)


def mug(canvas: Canvas, rng: Rng) -> None:
    ink, accent = canvas.paints.ink, canvas.paints.accent
    wide, foot, top = rng.uniform(0.5, 0.64), rng.uniform(0.75, 1.0), -0.62
    middle = -0.22
    # The handle is a ring, so there is a hole to see through.
    reach = rng.uniform(0.2, 0.3)
    ear = middle + wide
    grip = canvas.disc(ear, 0.08, reach + 0.17, 0.48)
    hole = canvas.disc(ear, 0.08, reach, 0.3)
    canvas.add(grip * (1 - hole), accent)

    outline = [(-wide, top), (-foot * wide, 0.78), (-0.8 * foot * wide, 0.9)]
    outline += [(-x, y) for x, y in reversed(outline)]
    body = canvas.polygon([(x + middle, y) for x, y in outline])
    canvas.add(body, canvas.paints.skin)
    stripe = _band(canvas.v * rng.uniform(1.2, 2.4), 0.5)
    canvas.tint(body * stripe * rng.uniform(0, 0.9), accent)
    canvas.tint(body * knit(canvas, rng), ink)

    canvas.add(canvas.disc(middle, top, wide, 0.2), accent)
    drink = colour(0.28, 0.16, 0.09) * rng.uniform(0.6, 1.8)
    canvas.tint(canvas.disc(middle, top + 0.015, wide - 0.08, 0.14), drink)


def star(canvas: Canvas, rng: Rng) -> None:
    arms, inner = rng.choice([5, 5, 5, 6]), rng.uniform(0.46, 0.6)
    angle = np.arange(2 * arms) * np.pi / arms - np.pi / 2
    reach = np.where(np.arange(2 * arms) % 2, inner, 1.02)
    outline = np.stack([reach * np.cos(angle), reach * np.sin(angle)], 1)
    body = canvas.polygon(rounded(outline, 3))
    canvas.add(body, canvas.paints.skin)
    canvas.tint(body * wood(canvas, rng), canvas.paints.ink)
    depth = cv2.distanceTransform((body > 0.5).astype(np.uint8), cv2.DIST_L2, 3)
    rim = np.clip(2 - depth / canvas.side * 2 / 0.035, 0, 1)
    canvas.tint(body * rim * 0.7, canvas.paints.ink)

    for x in (-0.16, 0.12):
        _eye(canvas, x, -0.08, 0.1)
    t = np.linspace(0.15, 0.85, 9) * np.pi
    smile = np.stack([0.2 * np.cos(t), 0.04 + 0.2 * np.sin(t)], 1)
    canvas.tint(canvas.stroke(smile, 0.06), colour(0.1, 0.05, 0.05))


def scenery(canvas: Canvas, rng: Rng) -> None:
    """A pebble, a tile or a ring that belongs to no class."""
    corners = rng.integers(4, 10)
    angle = np.sort(rng.uniform(0, 2 * np.pi / corners, corners))
    angle += np.arange(corners) * 2 * np.pi / corners
    reach = rng.uniform(0.55, 0.95, corners)
    outline = np.stack([reach * np.cos(angle), reach * np.sin(angle)], 1)
    body = canvas.polygon(rounded(outline, rng.integers(0, 4)))
    if rng.random() < 0.25:
        body = body * (1 - canvas.disc(0, 0, rng.uniform(0.2, 0.35)))
    canvas.add(body, canvas.paints.skin)
    if rng.random() < 0.5:
        texture = TEXTURES[rng.integers(len(TEXTURES))]
        canvas.tint(body * texture(canvas, rng), canvas.paints.ink)


@dataclass(frozen=True)
class Kind:
    """A class of the data set.

    Attributes:
        draw: Draws one on a canvas.
        tilt: The greatest angle, in degrees, by which it leans either way.
        colour: The colour that stands for the class in figures, RGB.
    """

    draw: Callable[[Canvas, Rng], None]
    tilt: float
    colour: tuple[int, int, int]


KINDS = {
    'fish': Kind(fish, 60, (66, 133, 244)),
    'leaf': Kind(leaf, 180, (52, 168, 83)),
    'mushroom': Kind(mushroom, 40, (219, 68, 55)),
    'butterfly': Kind(butterfly, 90, (171, 71, 188)),
    'mug': Kind(mug, 30, (255, 138, 48)),
    'star': Kind(star, 40, (250, 202, 40)),
}
SCENERY = Kind(scenery, 180, (0, 0, 0))
