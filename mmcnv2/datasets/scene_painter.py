"""Paints the demo scenes: backgrounds, objects in them, light and shadow.

Backgrounds and surfaces are cut from photographs that scikit-image ships in its wheel,
so nothing is downloaded.
"""

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
import skimage.data

from .scene_sprites import KINDS, SCENERY, Array, Canvas, Kind, Paints, Rng, colour

SIDE = 256

# Sprites are drawn at twice their size and then reduced, which smooths their edges.
_SUPERSAMPLING = 2
_SIZES = (48, 160)
_SHADOW_REACH = 14
# An object is labelled only if this much of it can be seen, in pixels and as a share.
_MIN_AREA = 90
_MIN_VISIBLE = 0.35

_COLOUR_PHOTOS = (
    'chelsea',
    'coffee',
    'hubble_deep_field',
    'immunohistochemistry',
    'rocket',
)
_GREY_PHOTOS = ('brick', 'camera', 'coins', 'grass', 'gravel', 'moon')


@dataclass
class Scene:
    """A picture and what is in it.

    Attributes:
        picture: RGB, uint8, (SIDE, SIDE, 3).
        owners: Which object each pixel shows, counted from 1, or 0 for the
            background; uint8, (SIDE, SIDE).
        classes: The class index of each object, counted from 0.
    """

    picture: Array
    owners: Array
    classes: list[int]


@cache
def _photos() -> tuple[list[Array], list[Array]]:
    """The colour photographs, RGB, and then all of them in grey."""
    colourful = [getattr(skimage.data, name)() for name in _COLOUR_PHOTOS]
    grey = [getattr(skimage.data, name)() for name in _GREY_PHOTOS]
    grey += [cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY) for photo in colourful]
    return colourful, grey


def _pick(rng: Rng, photos: list[Array]) -> Array:
    return photos[rng.integers(len(photos))]


def _random_colour(rng: Rng, value: tuple[float, float] = (0.35, 1.0)) -> Array:
    hue, saturation = rng.uniform(0, 360), rng.uniform(0.15, 0.9)
    hsv = np.float32([[[hue, saturation, rng.uniform(*value)]]])
    return colour(*cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0])


def _cut(
    rng: Rng, photo: Array, side: int, zoom: tuple[float, float], blur: float
) -> Array:
    """Cut a random square from a photograph.

    Args:
        rng: The source of chance.
        photo: uint8, (height, width) or (height, width, 3).
        side: Side of the result.
        zoom: Least and greatest number of its pixels per pixel of the photograph.
        blur: Standard deviation, in pixels of the result, or 0 for none.

    Returns:
        The square in 0..1, (side, side) or (3, side, side).
    """
    reach = min(round(side / rng.uniform(*zoom)), *photo.shape[:2])
    y, x = (rng.integers(size - reach + 1) for size in photo.shape[:2])
    square = photo[y : y + reach, x : x + reach]
    if rng.random() < 0.5:
        square = np.ascontiguousarray(square[:, ::-1])
    how = cv2.INTER_AREA if reach > side else cv2.INTER_CUBIC
    square = cv2.resize(square, (side, side), interpolation=how)
    if blur:
        square = cv2.GaussianBlur(square, (0, 0), blur)
    square = square.transpose(2, 0, 1) if square.ndim == 3 else square
    return np.ascontiguousarray(square, np.float32) / 255


def _tinted(rng: Rng, grey: Array) -> Array:
    """Colour a grey photograph from a dark tone to a light one."""
    dark, light = _random_colour(rng, (0.05, 0.3)), _random_colour(rng, (0.6, 1.0))
    low, high = np.percentile(grey[::4, ::4], (2, 98)).astype(np.float32)
    level = np.clip((grey - low) / (high - low + 0.1), 0, 1)
    return dark + level * (light - dark)


def _surface(
    rng: Rng, side: int, zoom: tuple[float, float] = (0.5, 1.6), blur: float = 0
) -> Array:
    """A piece of one of the photographs, (3, side, side) in 0..1."""
    colourful, grey = _photos()
    if rng.random() < 0.5:
        return _cut(rng, _pick(rng, colourful), side, zoom, blur)
    # The colour photographs come last among the grey ones and need no tint.
    photo = _pick(rng, grey[: len(_GREY_PHOTOS)])
    return _tinted(rng, _cut(rng, photo, side, zoom, blur))


def _background(rng: Rng) -> Array:
    """One surface, or two that meet at a wavy horizon."""
    zoom = (0.6, 2.0)
    blur = rng.uniform(0.4, 1.8) if rng.random() < 0.5 else 0
    ground = _surface(rng, SIDE, zoom, blur)
    if rng.random() < 0.45:
        far = _surface(rng, SIDE, zoom, blur + 2)
        x = np.linspace(0, 2 * np.pi, SIDE, dtype=np.float32)
        wave = np.sin(rng.uniform(0.4, 1.5) * x + rng.uniform(0, 6))
        line = SIDE * rng.uniform(0.25, 0.6) + rng.uniform(0, 12) * wave
        above = np.clip(line - np.arange(SIDE)[:, None], 0, 1).astype(np.float32)
        ground += above * (far - ground)
    contrast, level = rng.uniform(0.6, 1.0), rng.uniform(0.35, 0.6)
    return np.clip((ground - ground.mean()) * contrast + level, 0, 1)


def _paints(rng: Rng, side: int, ground: Array) -> Paints:
    """Random colours, with a grain from a photograph or all of one as the surface."""
    base = _random_colour(rng)
    ink = _random_colour(rng, (0.05, 0.35)) * 0.7 + base * 0.15
    accent = _random_colour(rng, (0.75, 1.0)) * 0.6 + 0.35
    draw = rng.random()
    if draw < 0.15:  # camouflage
        skin = _camouflage(rng, side, ground)
    elif draw < 0.3:
        skin = _surface(rng, side)
    else:
        grain = _cut(rng, _pick(rng, _photos()[1]), side, (0.5, 1.6), blur=0)
        skin = base * (1 + rng.uniform(0.3, 1.0) * (grain - grain.mean()))
    return Paints(np.clip(skin, 0, 1), ink, accent)


def _camouflage(rng: Rng, side: int, ground: Array) -> Array:
    """A piece of the background, enlarged and a little brighter or darker."""
    reach = SIDE // 4
    y, x = rng.integers(SIDE - reach, size=2)
    patch = ground[:, y : y + reach, x : x + reach] * rng.uniform(0.8, 1.25)
    return np.stack([cv2.resize(plane, (side, side)) for plane in patch])


class _Easel:
    """A scene in the making."""

    def __init__(self, rng: Rng) -> None:
        self.rng = rng
        self.ground = _background(rng)
        self.picture = self.ground.copy()
        self.owners = np.zeros((SIDE, SIDE), np.uint8)
        # Pixels of each object as placed and as still seen; the first is nobody's.
        self.areas = self.seen = np.zeros(1, int)
        self.classes: list[int] = []
        self.anchor = rng.uniform(0.2, 0.8, 2) * SIDE
        angle = rng.uniform(-0.8, 0.8) * np.pi / 2
        self.light = np.float32([np.sin(angle), -np.cos(angle)])

    def place(self, kind: Kind, class_index: int | None = None) -> None:
        """Put one thing at a random place, unless it hides too much of the others.

        Args:
            kind: What to draw.
            class_index: Its class, or None for scenery, which is not labelled.
        """
        rng = self.rng
        size = np.exp(rng.uniform(*np.log(_SIZES)))
        side = round(size * _SUPERSAMPLING)
        canvas = Canvas(_paints(rng, side, self.ground))
        kind.draw(canvas, rng)
        x0, y0, rgb, alpha = self._project(canvas, size, kind.tilt)
        solid = alpha > 0.5
        height, width = alpha.shape
        window = np.s_[y0 : y0 + height, x0 : x0 + width]

        owners = self.owners[window]
        seen = self.seen - np.bincount(owners[solid], minlength=len(self.seen))
        enough = np.maximum(self.areas * _MIN_VISIBLE, _MIN_AREA)
        if solid.sum() < _MIN_AREA or (seen < enough)[1:].any():
            return
        owners[solid] = 0
        self.seen = seen
        if class_index is not None:
            self.classes.append(class_index)
            owners[solid] = len(self.classes)
            self.seen = np.append(seen, solid.sum())
            self.areas = np.append(self.areas, solid.sum())
        self._paste(window, rgb, alpha, size)

    def _project(
        self, canvas: Canvas, size: float, tilt: float
    ) -> tuple[int, int, Array, Array]:
        """Turn, lean and flip a sprite, and bring it to the scene's resolution.

        Returns:
            The left and the top of a window that holds the sprite and its shadow,
            and the sprite's colours, premultiplied, and coverage in that window.
        """
        rng = self.rng
        angle = np.deg2rad(rng.uniform(-tilt, tilt))
        turn = np.array(
            [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        )
        stretch = np.array([rng.choice([-1, 1]) * rng.uniform(0.8, 1), 1])
        corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * stretch
        corners = corners + rng.uniform(-0.12, 0.12, (4, 2))
        centre = self._spot(size)
        quad = corners @ turn.T * (size / 2) + centre

        low = np.floor(quad.min(axis=0) - _SHADOW_REACH).astype(int).clip(0)
        high = np.ceil(quad.max(axis=0) + _SHADOW_REACH).astype(int).clip(max=SIDE)
        width, height = map(int, high - low)
        edge = canvas.side
        source = np.float32([(0, 0), (edge, 0), (edge, edge), (0, edge)])
        target = ((quad - low) * _SUPERSAMPLING).astype(np.float32)
        warp = cv2.getPerspectiveTransform(source, target)
        sprite = np.concatenate([canvas.rgb * canvas.alpha, canvas.alpha[None]])
        sprite = cv2.merge((sprite * 255 + 0.5).astype(np.uint8))
        fine = (width * _SUPERSAMPLING, height * _SUPERSAMPLING)
        sprite = cv2.warpPerspective(sprite, warp, fine)
        sprite = cv2.resize(sprite, (width, height), interpolation=cv2.INTER_AREA)
        sprite = np.float32(cv2.split(sprite)) / 255
        return int(low[0]), int(low[1]), sprite[:3], sprite[3]

    def _spot(self, size: float) -> Array:
        """Choose a centre: anywhere, or often beside the last such, to overlap."""
        if self.rng.random() < 0.5:
            self.anchor = self.rng.uniform(0.08, 0.92, 2) * SIDE
            return self.anchor
        beside = self.anchor + self.rng.uniform(-0.65, 0.65, 2) * size
        return beside.clip(0.08 * SIDE, 0.92 * SIDE)

    def _paste(self, window: tuple, rgb: Array, alpha: Array, size: float) -> None:
        """Paint a sprite over the picture, lit from one side and casting a shadow."""
        shift = -self.light * min(0.1 * size, 7)
        move = np.float32([[1, 0, shift[0]], [0, 1, shift[1]]])
        shadow = cv2.warpAffine(alpha, move, alpha.shape[::-1])
        shadow = cv2.GaussianBlur(shadow, (0, 0), 1 + 0.03 * size)
        view = self.picture[(slice(None), *window)]
        view *= (1 - 0.5 * shadow) * (1 - alpha)
        view += rgb * self._relief(alpha, size)

    def _relief(self, alpha: Array, size: float) -> Array:
        """How brightly each pixel is lit if the outline bulges like a cushion."""
        depth = cv2.distanceTransform((alpha > 0.5).astype(np.uint8), cv2.DIST_L2, 3)
        bulge = np.sqrt(np.minimum(depth / (0.2 * size), 1))
        bulge = cv2.GaussianBlur(bulge, (0, 0), 0.5 + 0.025 * size)
        slope_y, slope_x = np.gradient(bulge)
        facing = -(slope_x * self.light[0] + slope_y * self.light[1]) * size
        return 1 + np.clip(0.12 * facing, -0.45, 0.35)

    def finished(self) -> Scene:
        """Add the light that falls off across the picture and the camera's noise."""
        rng = self.rng
        axis = np.linspace(-1, 1, SIDE, dtype=np.float32)
        slope = axis[None, :] * self.light[0] + axis[:, None] * self.light[1]
        glow = rng.uniform(0.85, 1.15) * (1 + rng.uniform(0, 0.2) * slope)
        noise = rng.standard_normal((SIDE, SIDE), np.float32) * rng.uniform(0, 0.02)
        picture = np.clip(self.picture * glow + noise, 0, 1) * 255 + 0.5
        return Scene(cv2.merge(picture.astype(np.uint8)), self.owners, self.classes)


def paint_scene(rng: Rng) -> Scene:
    """Paint one scene.

    Args:
        rng: The only source of chance.

    Returns:
        The scene, with objects labelled where they can be seen.
    """
    easel = _Easel(rng)
    kinds = list(KINDS.values())
    objects = rng.integers(3, 10)
    for _ in range(objects):
        if rng.random() < 0.3:
            easel.place(SCENERY)
        index = int(rng.integers(len(kinds)))
        easel.place(kinds[index], index)
    return easel.finished()
