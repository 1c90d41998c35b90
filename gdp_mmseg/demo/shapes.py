"""Pictures of a small semantic segmentation data set, drawn at random.

One to three shapes lie on a cluttered ground, under bars and leaves. Texture
is drawn without regard to the class, and the hues of the classes overlap, with
each other and with the ground: colour suggests a class, the outline decides.

Letters in shapes: S, the image side in pixels; P, points of an outline.
Images are RGB in [0, 1] until they are complete. Lengths are in units of
S / 128, so that a picture has the same look at every size.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

CLASSES: tuple[str, ...] = ('background', 'disc', 'ring', 'cross')
BORDER = 255

_OVERSAMPLING = 4
# Least share of an object in the frame, and least share of it that stays
# visible. Below, an outline would no longer tell its class.
_MIN_IN_FRAME = 0.6
_MIN_VISIBLE = 0.6
# Least distance in RGB from the mean colour that is covered, so that edges
# can be seen.
_MIN_CONTRAST = 0.45
_TRIES = 12
# Width of a class's hues, in turns. The classes are a third of a turn apart,
# so neighbours overlap.
_HUE_REACH = 0.2
_ANY_HUE = (0.0, 1.0)

Floats = NDArray[np.floating]
Bytes = NDArray[np.uint8]
Rng = np.random.Generator

# ---------------------------------------------------------------- outlines


def _polygon(radii: list[float], start: float) -> Floats:
    """Return the corners at equal angles and given radii, (P, 2)."""
    angle = start + np.arange(len(radii)) * 2 * np.pi / len(radii)
    corners = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    corners *= np.array(radii)[:, None]
    return corners.astype(np.float32)


def _cross(half_length: float, half_width: float) -> Floats:
    """Return the corners of a plus sign, (12, 2)."""
    a, b = half_length, half_width
    arm = np.array([[a, -b], [a, b], [b, b]])
    turn = np.array([[0, 1], [-1, 0]])
    arms = [arm @ np.linalg.matrix_power(turn, k) for k in range(4)]
    return np.concatenate(arms).astype(np.float32)


# Outline and hole (or None) of each class for radius 1. The scales bring the
# areas near each other, else the disc would own the data set.
_CIRCLE = _polygon([1.0] * 72, 0.0)
_OUTLINES: dict[str, tuple[Floats, Floats | None]] = {
    'disc': (_CIRCLE, None),
    'ring': (1.15 * _CIRCLE, 0.58 * _CIRCLE),
    'cross': (_cross(1.25, 0.39), None),
}


def _blob(rng: Rng) -> Floats:
    """Return a lobed outline that belongs to no class, (48, 2)."""
    angle = np.arange(48) * 2 * np.pi / 48
    radius = np.ones(48)
    for wave, most in ((2, 0.4), (3, 0.35), (4, 0.15)):
        height = rng.uniform(most / 2, most)
        phase = rng.uniform(0, 2 * np.pi)
        radius += height * np.cos(wave * angle + phase)
    return _polygon(radius.tolist(), 0.0)


def _place(points: Floats, centre: Floats, scale: Floats,
           angle: float) -> Floats:
    """Scale, turn and move the points (P, 2); centre and scale are (2,)."""
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]], dtype=np.float32)
    return (points * scale) @ turn + centre


def _coverage(size: int,
              filled: list[Floats],
              hole: Floats | None = None) -> Floats:
    """Return the covered share of each pixel, (S, S), of some polygons."""
    large = Image.new('L', (size * _OVERSAMPLING, ) * 2)
    draw = ImageDraw.Draw(large)
    for points in filled:
        draw.polygon((points * _OVERSAMPLING).ravel().tolist(), fill=255)
    if hole is not None:
        draw.polygon((hole * _OVERSAMPLING).ravel().tolist(), fill=0)
    return np.asarray(large.reduce(_OVERSAMPLING), dtype=np.float32) / 255


# ---------------------------------------------------------------- textures


def _smooth_noise(rng: Rng, size: int, cells: int) -> Floats:
    """Return noise in [0, 1] with about ``cells`` bumps a side, (S, S)."""
    coarse = rng.random((cells + 2, cells + 2), dtype=np.float32)
    large = Image.fromarray(coarse).resize((size, size),
                                           Image.Resampling.BICUBIC)
    noise: Floats = np.asarray(large)
    low, high = float(noise.min()), float(noise.max())
    return (noise - low) / max(high - low, 1e-6)  # one cell may be flat


def _pattern(rng: Rng, size: int) -> Floats:
    """Return stripes, checks, noise, a gradient or dots in [0, 1], (S, S)."""
    kind = rng.choice(['stripes', 'checks', 'noise', 'gradient', 'dots'])
    if kind == 'noise':
        return _smooth_noise(rng, size, int(rng.integers(10, 24)))
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    x, y = _grid(size)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    period = rng.uniform(7, 14)
    u = np.cos(2 * np.pi * along / period + phase)
    v = np.cos(2 * np.pi * across / period + phase)
    # The slope of 1.5 is that of an edge about one pixel wide.
    wave: Floats = {
        'stripes': 1.5 * u,
        'checks': 3 * u * v,
        'gradient': (along - 64 * np.cos(phase)) / 100,
        'dots': 1.5 * (u + v - 0.7)
    }[str(kind)]
    pattern: Floats = np.clip(0.5 + wave, 0, 1)
    return pattern


def _grid(size: int) -> tuple[Floats, Floats]:
    """Return x and y of the pixel centres in units, each (S, S)."""
    axis = ((np.arange(size) + 0.5) * (128 / size)).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _colour(rng: Rng,
            saturation: tuple[float, float],
            value: tuple[float, float],
            hues: tuple[float, float] = _ANY_HUE) -> Floats:
    """Draw an RGB colour of some hues, (3,)."""
    hue, s, v = (rng.uniform(*span) for span in (hues, saturation, value))
    ramp = np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    colour: Floats = v * (1 - s + s * np.clip(ramp, 0, 1))
    return colour.astype(np.float32)


def _blend(pattern: Floats, low: Floats, high: Floats) -> Floats:
    """Colour a pattern (S, S) from ``low`` to ``high``, (S, S, 3)."""
    return low + pattern[..., None] * (high - low)


def _two_colours(
    rng: Rng,
    behind: Floats,
    hues: tuple[float, float] = _ANY_HUE,
) -> tuple[Floats, Floats]:
    """Draw two colours, (3,) each, that stand out from a third."""
    while True:  # at least a tenth of the draws pass, whatever is behind
        low = _colour(rng, (0.25, 0.9), (0.3, 1.0), hues)
        high = _colour(rng, (0.1, 0.8), (0.3, 1.0), hues)
        high = low + rng.uniform(0.35, 0.8) * (high - low)
        if np.linalg.norm((low + high) / 2 - behind) >= _MIN_CONTRAST:
            return low, high


def _texture(
    rng: Rng,
    size: int,
    behind: Floats,
    hues: tuple[float, float] = _ANY_HUE,
) -> Floats:
    """Draw a texture, (S, S, 3), that stands out from a colour (3,)."""
    low, high = _two_colours(rng, behind, hues)
    return _blend(_pattern(rng, size), low, high)


# ------------------------------------------------------------------- scene


@dataclass
class _Scene:
    """A picture while it is painted.

    Args:
        image (Floats): colours, (S, S, 3).
        owner (Bytes): number of the topmost object at each pixel, 0 where
            there is none, (S, S).
        classes (list[int]): class index of each owner.
    """
    image: Floats
    owner: Bytes
    classes: list[int] = field(default_factory=lambda: [0])

    @property
    def size(self) -> int:
        """Image side S in pixels."""
        return len(self.owner)

    @property
    def unit(self) -> float:
        """Pixels per unit of length."""
        return self.size / 128

    def colour_under(self, alpha: Floats) -> Floats:
        """Return the mean colour under a coverage (S, S), as (3,)."""
        total = max(float(alpha.sum()), 1e-6)  # it may miss the frame
        return np.tensordot(alpha, self.image, 2) / total

    def paint_(self, alpha: Floats, texture: Floats, owner: int) -> None:
        """Lay a texture with a soft shadow over the picture, in place.

        Args:
            alpha (Floats): coverage, (S, S).
            texture (Floats): colours, (S, S, 3), or one colour, (3,).
            owner (int): number of the object, 0 for what is background.
        """
        soft = Image.fromarray((255 * alpha).astype(np.uint8)).filter(
            ImageFilter.GaussianBlur(2.5 * self.unit))
        shadow = np.asarray(soft, dtype=np.float32) / 255
        self.image *= 1 - 0.4 * shadow[..., None]
        self.image += alpha[..., None] * (texture - self.image)
        self.owner[alpha >= 0.5] = owner


def _ground(rng: Rng, size: int) -> _Scene:
    """Return a scene of soft noise, faint pattern, lines and blobs."""
    tones = [_colour(rng, (0.05, 0.45), (0.3, 0.9)) for _ in range(3)]
    image = _blend(_smooth_noise(rng, size, 3), tones[0], tones[1])
    veil = _smooth_noise(rng, size, 8)[..., None]
    image += 0.5 * veil * (tones[2] - image)
    image += 0.1 * (_pattern(rng, size) - 0.5)[..., None]
    image += 0.16 * (_smooth_noise(rng, size, 40) - 0.5)[..., None]
    scene = _Scene(image.astype(np.float32), np.zeros((size, size), np.uint8))
    for _ in range(rng.integers(2, 6)):
        _add_line_(scene, rng)
    for _ in range(rng.integers(2, 7)):
        _add_blob_(scene, rng)
    return scene


def _add_line_(scene: _Scene, rng: Rng) -> None:
    """Draw one thin stroke on the ground, in place."""
    bar = _bar(rng, rng.uniform(0, 128, 2), rng.uniform(0.4, 1.1))
    alpha = _coverage(scene.size, [scene.unit * bar])
    colour = _colour(rng, (0.0, 0.6), (0.1, 1.0))
    scene.image += 0.6 * alpha[..., None] * (colour - scene.image)


def _add_blob_(scene: _Scene, rng: Rng) -> None:
    """Put one distractor, labelled background, on the ground, in place."""
    radius = rng.uniform(2.5, 6.5, 2)
    points = _place(
        _blob(rng), rng.uniform(0, 128, 2), radius, rng.uniform(0, 2 * np.pi))
    alpha = _coverage(scene.size, [scene.unit * points])
    colour = _two_colours(rng, scene.colour_under(alpha))[0]
    scene.paint_(alpha, colour, owner=0)


def _bar(rng: Rng, through: Floats, half_width: float) -> Floats:
    """Return a bar of random angle that crosses the frame, (4, 2)."""
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float32)
    scale = np.array([200, half_width])
    return _place(corners, through, scale, rng.uniform(0, 2 * np.pi))


def _add_object_(scene: _Scene, rng: Rng) -> None:
    """Put one object of a random class on top, in place.

    A picture may be too full for it; a picture without any object never is.
    """
    label = int(rng.integers(1, len(CLASSES)))
    outline, hole = _OUTLINES[CLASSES[label]]
    tries = 0
    while tries < _TRIES or len(scene.classes) == 1:
        tries += 1
        centre = rng.uniform(12, 116, 2)
        radius = rng.uniform(24, 40)
        scale = radius * np.array([1, rng.uniform(0.85, 1)])
        angle = rng.uniform(0, 2 * np.pi)
        placed = [
            None if points is None else scene.unit *
            _place(points, centre, scale, angle) for points in (outline, hole)
        ]
        assert placed[0] is not None  # for mypy: every class has an outline
        alpha = _coverage(scene.size, [placed[0]], placed[1])
        if _hides(scene, alpha) or not _in_frame(placed, alpha):
            continue
        hue = label / (len(CLASSES) - 1)
        texture = _texture(rng, scene.size, scene.colour_under(alpha),
                           (hue - _HUE_REACH, hue + _HUE_REACH))
        x, y = _grid(scene.size)
        light = ((centre[0] - x) + (centre[1] - y)) / radius
        texture = texture * (1 + 0.1 * np.clip(light, -2, 2))[..., None]
        scene.classes.append(label)
        scene.paint_(alpha, texture, owner=len(scene.classes) - 1)
        return


def _hides(scene: _Scene, alpha: Floats) -> bool:
    """Tell whether a coverage (S, S) leaves too little of some object."""
    areas = np.bincount(scene.owner.ravel(), minlength=len(scene.classes))
    left = np.bincount(scene.owner[alpha < 0.5], minlength=len(areas))
    return bool(np.any(left[1:] < _MIN_VISIBLE * areas[1:]))


def _in_frame(placed: list[Floats | None], alpha: Floats) -> bool:
    """Tell whether enough of an outline (minus hole) is in the frame."""
    areas = [0.0 if points is None else _area(points) for points in placed]
    return float(alpha.sum()) >= _MIN_IN_FRAME * (areas[0] - areas[1])


def _area(points: Floats) -> float:
    """Return the area of a simple polygon (P, 2), the shoelace formula."""
    x, y = points.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def _add_occluder_(scene: _Scene, rng: Rng) -> None:
    """Lay a bar or a twig, labelled background, across an object, in place.

    Nothing is laid where every try would hide too much of some object.
    """
    ys, xs = np.nonzero(scene.owner)
    for _ in range(_TRIES):
        pick = rng.integers(len(ys))
        through = np.array([xs[pick], ys[pick]]) / scene.unit
        if rng.random() < 0.5:
            pieces = [_bar(rng, through, rng.uniform(2.0, 4.5))]
        else:
            pieces = _twig(rng, through)
        alpha = _coverage(scene.size, [scene.unit * piece for piece in pieces])
        if not _hides(scene, alpha):
            behind = scene.colour_under(alpha)
            scene.paint_(alpha, _texture(rng, scene.size, behind), owner=0)
            return


def _twig(rng: Rng, through: Floats) -> list[Floats]:
    """Return a twig with pointed leaves on both sides, each (P, 2)."""
    along = rng.uniform(0, 2 * np.pi)
    step = np.array([np.cos(along), np.sin(along)])
    t = np.linspace(0, np.pi, 10)
    half = np.stack([t / np.pi, 0.26 * np.sin(t)], axis=1)
    leaf = np.concatenate([half, half[::-1] * [1, -1]]).astype(np.float32)
    stem = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float32)
    reach = rng.uniform(26, 44)
    pieces = [_place(stem, through, np.array([reach, 1.1]), along)]
    for place in np.arange(-reach, reach, rng.uniform(11, 14)):
        for side in (-1, 1):
            angle = along + side * rng.uniform(0.6, 1.1)
            length = rng.uniform(14, 19)
            pieces.append(
                _place(leaf, through + place * step,
                       np.array([length, length]), angle))
    return pieces


def draw(rng: Rng, size: int) -> tuple[Bytes, Bytes]:
    """Return one picture, (S, S, 3), and its labels, (S, S)."""
    scene = _ground(rng, size)
    for _ in range(rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3])):
        _add_object_(scene, rng)
    for _ in range(rng.choice(3, p=[0.5, 0.4, 0.1])):
        _add_occluder_(scene, rng)
    image = (scene.image - 0.5) * rng.uniform(0.8, 1.15) + 0.5
    image += rng.uniform(-0.08, 0.08)
    image += rng.normal(0, rng.uniform(0.005, 0.03), image.shape)
    pixels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    return pixels, _labels(scene)


def _labels(scene: _Scene) -> Bytes:
    """Return class indices with the border of VOC between owners, (S, S)."""
    owner = scene.owner
    border = np.zeros(owner.shape, dtype=bool)
    down, right = owner[1:] != owner[:-1], owner[:, 1:] != owner[:, :-1]
    border[1:] |= down
    border[:-1] |= down
    border[:, 1:] |= right
    border[:, :-1] |= right
    labels = np.array(scene.classes, dtype=np.uint8)[owner]
    labels[border] = BORDER
    return labels
