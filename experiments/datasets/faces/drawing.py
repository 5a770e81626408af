"""Cartoon faces that show all 40 attributes by conventions, which say nothing about people.

Faces are drawn at half the size of CelebA's images, 109 rows of 89 pixels. All lengths are pixels of that size, measured from
the middle of the face, right and down. Both halves of a face are drawn at once by the distance from its axis. Coverages are
in 0..1, with edges a pixel wide; arrays of one number per face have shape (N, 1, 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import uniform_filter

from experiments.datasets.layouts.celeba import ATTRIBUTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

ROWS, COLUMNS = 109, 89
MIDDLE = (50, 44)  # row and column of the middle of the face, up to SHIFT
SHIFT = 2.0
MARGIN = 3  # of windows, for SHIFT and soft edges
BLUR = 9  # side of the square over which a blurry face is averaged
NOISE = 0.03  # largest, of pixels in 0..1
SKINS = ((0.42, 0.27, 0.20), (0.90, 0.70, 0.58))  # darkest and lightest
NEUTRAL_HAIR = (0.72, 0.30, 0.10)  # of a face without an attribute that names a colour
HAIRS = {
    "Black_Hair": (0.06, 0.05, 0.06),
    "Blond_Hair": (0.90, 0.78, 0.42),
    "Brown_Hair": (0.34, 0.20, 0.10),
    "Gray_Hair": (0.62, 0.63, 0.66),
}


def draw(labels: NDArray[np.bool_], generator: np.random.Generator) -> NDArray[np.uint8]:
    """Draw faces with given attributes; place, skin, background and other properties are random, and independent of these.

    Args:
        labels: Shape (N, 40).
        generator: Random generator. The number of draws does not depend on the labels.

    Returns:
        Shape (N, 109, 89, 3).
    """
    canvas = Canvas(labels, generator)
    noise = generator.random(canvas.pixels.shape, dtype=np.float32)
    for layer in (_behind, _body, _head, _skin, _hair, _eyes, _nose, _beard, _mouth, _worn):
        layer(canvas)
    blurry = labels[:, ATTRIBUTES.index("Blurry")]
    canvas.pixels[blurry] = uniform_filter(canvas.pixels[blurry], (0, 0, BLUR, BLUR), mode="nearest")
    pixels = (canvas.pixels + NOISE * (2 * noise - 1)).clip(0, 1) * 255
    return np.ascontiguousarray(pixels.round().astype(np.uint8).transpose(0, 2, 3, 1))


class Canvas:
    """Images of N faces that are painted part by part; ``canvas["Bald"]`` is that attribute as 0 or 1, shape (N, 1, 1)."""

    def __init__(self, labels: NDArray[np.bool_], generator: np.random.Generator) -> None:
        count = len(labels)
        self.labels = labels.astype(np.float32)

        def uniform(low: float, high: float, *shape: int) -> Array:
            return generator.uniform(low, high, (count, *shape)).astype(np.float32)

        self.row = MIDDLE[0] + uniform(-SHIFT, SHIFT, 1, 1)
        self.column = MIDDLE[1] + uniform(-SHIFT, SHIFT, 1, 1)
        self.size = uniform(0.95, 1.05, 1, 1)  # of eyes, nose and mouth
        self.light = uniform(-0.12, 0.12, 1, 1)  # from the left or from the right
        self.background = uniform(0.15, 0.85, 3)
        self.shirt = uniform(0.1, 0.9, 3)
        self.iris = uniform(0.1, 0.5, 3)
        dark, light = np.array(SKINS, dtype=np.float32)
        skin = dark + uniform(0, 1, 1) * (light - dark)
        pale = self["Pale_Skin"][:, 0]
        self.skin = skin + 0.85 * pale * (np.array((0.99, 0.96, 0.97), dtype=np.float32) - skin)
        self.hair = self._colour_of_hair() + uniform(-0.04, 0.04, 1)
        self.pixels = np.empty((count, 3, ROWS, COLUMNS), dtype=np.float32)
        self.pixels[...] = self.background[:, :, None, None]

    def __getitem__(self, attribute: str) -> Array:
        return self.labels[:, ATTRIBUTES.index(attribute), None, None]

    def window(self, top: float, bottom: float, reach: float) -> Window:
        """Return the part of the images between two heights, up to a distance from the axis."""
        rows = slice(max(0, int(MIDDLE[0] + top) - MARGIN), min(ROWS, int(MIDDLE[0] + bottom) + MARGIN + 1))
        columns = slice(max(0, int(MIDDLE[1] - reach) - MARGIN), min(COLUMNS, int(MIDDLE[1] + reach) + MARGIN + 1))
        return Window(self, rows, columns)

    def _colour_of_hair(self) -> Array:
        """Return the mean of the colours that attributes name."""
        named = self.labels[:, [ATTRIBUTES.index(name) for name in HAIRS]]
        count = named.sum(1, keepdims=True)
        mean = named @ np.array(list(HAIRS.values()), dtype=np.float32) / np.maximum(count, 1)
        return np.where(count > 0, mean, np.array(NEUTRAL_HAIR, dtype=np.float32))


class Window:
    """A part of the images with its coordinates.

    Attributes:
        y: Distance below the middle of the face. Shape (N, h, 1).
        x: Distance to its right. Shape (N, 1, w).
        side: Distance from its axis. Shape (N, 1, w).
    """

    def __init__(self, canvas: Canvas, rows: slice, columns: slice) -> None:
        self.pixels = canvas.pixels[:, :, rows, columns]
        self.y = np.arange(ROWS, dtype=np.float32)[rows, None] - canvas.row
        self.x = np.arange(COLUMNS, dtype=np.float32)[columns] - canvas.column
        self.side = np.abs(self.x)

    def paint(self, coverage: Array, colour: Array | tuple[float, float, float]) -> None:
        """Cover the window with a colour of shape (3,) or (N, 3)."""
        tint = np.atleast_2d(np.asarray(colour, dtype=np.float32))[:, :, None, None]
        change = tint - self.pixels
        change *= coverage[:, None]
        self.pixels += change

    def ellipse(self, y: Array | float, side: Array | float, tall: Array | float, wide: Array | float) -> Array:
        """Return the coverage of an ellipse on each side, from its middle and half its height and width."""
        radius = np.sqrt(((self.y - y) / tall) ** 2 + ((self.side - side) / wide) ** 2)
        return _soft((1 - radius) * np.minimum(tall, wide, dtype=np.float32))

    def curve(self, y: Array | float, thick: Array | float, side: float, reach: Array | float) -> Array:
        """Return the coverage of a line at the heights ``y``, from half its thickness and half its length."""
        return _soft(thick - np.abs(self.y - y)) * _soft(reach - np.abs(self.side - side))

    def box(self, y: float, side: float, tall: float, wide: Array | float) -> Array:
        """Return the coverage of a rectangle on each side, from its middle and half its height and width."""
        return self.curve(y, tall, side, wide)


def _soft(depth: Array) -> Array:
    """Return the coverage of pixels, given the depth of their middle inside a shape."""
    coverage: Array = (depth + np.float32(0.5)).clip(0, 1)
    return coverage


def _behind(c: Canvas) -> None:
    everywhere = c.window(-60, 60, 60)
    everywhere.pixels *= 1 - 0.15 * everywhere.y[:, None] / ROWS
    top = c.window(-41, 29, 29)
    top.paint(top.ellipse(-6, 0, 35, 29), c.hair)
    w = c.window(-17, 41, 38)
    straight = c["Straight_Hair"] * w.box(14, 27.5, 27, 6)
    wave = 2.5 * np.sin(0.75 * w.y)
    wavy = c["Wavy_Hair"] * _soft(7 - np.abs(w.side - 28 - wave)) * _soft(25 - np.abs(w.y - 8))
    w.paint(np.maximum(straight, wavy), c.hair)
    w.paint(0.45 * straight * _soft(0.4 - np.abs((w.side + 1) % 4 - 2)), 0.35 * c.hair)
    w.paint(0.45 * wavy * _soft(0.6 - np.abs((w.y + 0.6 * w.side) % 5 - 2.5)), 0.35 * c.hair)


def _body(c: Canvas) -> None:
    w = c.window(20, 60, 60)
    w.paint(w.box(35, 0, 17, 10 + 5 * c["Male"]), 0.88 * c.skin)
    w.paint(_soft(w.y - 36 - 0.22 * (40 - w.side).clip(0, 30) + 6) * _soft(w.side - 46 + w.y), c.shirt)
    neck = c.window(38, 46, 14)
    line = 40 + 3 - 0.03 * neck.side**2
    beads = neck.curve(line, 1.7, 0, 14) * (0.55 + 0.45 * np.cos(1.9 * neck.x))
    neck.paint(c["Wearing_Necklace"] * beads, (0.98, 0.86, 0.25))
    tie = c.window(44, 60, 6)
    tie.paint(c["Wearing_Necktie"] * _soft(2.5 + 0.22 * (tie.y - 44) - tie.side) * _soft(tie.y - 44), (0.75, 0.05, 0.12))


def _outline(c: Canvas, w: Window, grow: float = 0.0) -> Array:
    """Coverage of the face, an ellipse: below its middle squarer for Male, wider for Chubby; slim for Oval_Face."""
    tall = 30 + 3.5 * c["Oval_Face"] + grow
    wide = 23 - 2 * c["Oval_Face"] + grow
    low = (w.y > 0).astype(np.float32)
    power = 2 + low * (1.2 * c["Male"])
    half = wide * (1 - np.minimum(np.abs(w.y) / tall, 1) ** power) ** (1 / power)
    bulge = 4.5 * c["Chubby"] * np.exp(-(((w.y - 15) / 9) ** 2))
    return _soft(half + bulge - w.side) * _soft(tall - np.abs(w.y))


def _head(c: Canvas) -> None:
    ears = c.window(-5, 15, 28)
    ears.paint(ears.ellipse(1, 23.5, 6, 3.5), 0.93 * c.skin)
    ears.paint(c["Wearing_Earrings"] * ears.ellipse(10.5, 25.5, 3.4, 3.0), (1.0, 0.85, 0.1))
    chin = c.window(26, 42, 18)
    second = chin.ellipse(30, 0, 8.5, 15)
    chin.paint(c["Double_Chin"] * second, 0.5 * c.skin)
    chin.paint(c["Double_Chin"] * chin.ellipse(28.5, 0, 8, 14), 0.97 * c.skin)
    face = c.window(-34, 36, 29)
    outline = _outline(c, face)
    face.paint(_outline(c, face, 0.8), 0.7 * c.skin)
    face.paint(outline, c.skin)
    face.pixels *= 1 + (c.light * outline * face.x / 23)[:, None]


def _skin(c: Canvas) -> None:
    old = 1 - c["Young"]
    forehead = c.window(-19, -11, 13)
    lines = np.maximum(forehead.curve(-17.5, 0.5, 0, 11), forehead.curve(-14.5, 0.5, 0, 12))
    forehead.paint(0.8 * old * lines, 0.4 * c.skin)
    folds = c.window(8, 18, 15)
    folds.paint(old * _soft(0.6 - np.abs(folds.side - 5.5 - 0.7 * (folds.y - 7))) * folds.box(12.5, 9, 5.5, 9), 0.4 * c.skin)
    cheeks = c.window(1, 17, 22)
    hollow = cheeks.curve(13 - 0.5 * (cheeks.side - 15), 1.2, 16, 4.5)
    bone = cheeks.curve(6 - 0.5 * (cheeks.side - 15), 1.3, 16, 4.5)
    cheeks.paint(0.5 * c["High_Cheekbones"] * hollow, 0.5 * c.skin)
    cheeks.paint(0.7 * c["High_Cheekbones"] * bone, (1.0, 0.95, 0.85))
    cheeks.paint(0.6 * c["Rosy_Cheeks"] * cheeks.ellipse(9.5, 15, 4, 4), (0.95, 0.25, 0.35))


def _hair(c: Canvas) -> None:
    w = c.window(-43, -8, 31)
    cap = w.ellipse(-6, 0, 35, 27)
    temples = 7 * c["Receding_Hairline"] * _soft((w.side - 4) / 3) + 2 * c["Receding_Hairline"]
    w.paint(cap * _soft(-21.5 - temples + 0.03 * w.side**2 - w.y), c.hair)
    crown = w.ellipse(-33, 0, 13, 17)
    w.paint(c["Bald"] * crown * w.ellipse(-6, 0, 35, 29), c.skin)
    fringe = -11.5 + 1.5 * np.cos(1.2 * w.x)
    w.paint(c["Bangs"] * _soft(fringe - w.y) * w.box(-17, 0, 8, 15), 0.9 * c.hair)
    sides = c.window(-8, 14, 24)
    sides.paint(c["Sideburns"] * sides.box(3, 20.5, 9, 2.2), 0.3 * c.hair)


def _eyes(c: Canvas) -> None:
    w = c.window(-14, 8, 20)
    side = w.side - 10
    arch = 1.8 - 4.5 * (1 - (side / 6) ** 2)
    brow = -7.5 + c["Arched_Eyebrows"] * arch
    w.paint(w.curve(brow, 0.9 + 1.3 * c["Bushy_Eyebrows"], 10, 6), 0.25 * c.hair)
    w.paint(0.75 * c["Heavy_Makeup"] * w.ellipse(-2.5, 10, 5, 6.8), (0.45, 0.15, 0.60))
    w.paint(0.9 * c["Bags_Under_Eyes"] * w.curve(4.5 - 0.06 * side**2, 1.0, 10, 5.5), 0.35 * c.skin)
    tall = (3.6 - 1.9 * c["Narrow_Eyes"]) * c.size
    lid = w.ellipse(-1, 10, tall + 0.8, 6.0)
    eye = w.ellipse(-1, 10, tall, 5.2)
    w.paint(lid, 0.35 * c.skin)
    w.paint(eye, (0.97, 0.97, 0.97))
    fair = c["Attractive"][:, 0]
    w.paint(eye * w.ellipse(-1, 10, 2.6, 2.6), c.iris + fair * (np.array((0.0, 0.75, 0.80), dtype=np.float32) - c.iris))
    w.paint(eye * w.ellipse(-1, 10, 1.2, 1.2), (0.02, 0.02, 0.02))
    lashes = _soft(1.1 - np.abs(w.y + 2.5 + 0.7 * (w.side - 14))) * w.box(-4, 16.5, 4, 2.6)
    w.paint(c["Attractive"] * lashes, (0.02, 0.02, 0.02))


def _nose(c: Canvas) -> None:
    w = c.window(-2, 14, 9)
    big, pointy = c["Big_Nose"], c["Pointy_Nose"]
    width = (1.2 + (0.2 + 0.35 * big) * (w.y + 2).clip(0, 9)) * c.size
    bridge = _soft(width - w.side) * _soft(9 - w.y) * _soft(w.y + 2)
    w.paint(0.8 * bridge, 0.8 * c.skin)
    w.paint(w.ellipse(7.5, 2.2 + 3.3 * big, 1.1 + 0.5 * big, 1.1 + 0.9 * big), 0.4 * c.skin)
    tip = _soft(0.55 * (13 - w.y) - w.side) * _soft(w.y - 7)
    w.paint(pointy * tip, 0.62 * c.skin)
    w.paint(pointy * w.curve(3, 5, 0, 0.6), (1.0, 0.97, 0.92))


def _beard(c: Canvas) -> None:
    w = c.window(6, 36, 26)
    dark = 0.3 * c.hair
    face = _outline(c, w)
    near = w.ellipse(17, 0, 11, 15)
    stubble = 0.5 + 0.5 * np.sin(2.1 * w.x) * np.sin(2.1 * w.y)
    w.paint(0.75 * c["5_o_Clock_Shadow"] * face * near * stubble, (0.10, 0.12, 0.16))
    jaw = face * _soft(w.y - 9) * (1 - w.ellipse(8, 0, 20, 17.5))
    w.paint(0.9 * (1 - c["No_Beard"]) * jaw, dark)
    w.paint(0.95 * c["Goatee"] * w.ellipse(26.5, 0, 3.6, 4.5), dark)
    w.paint(0.95 * c["Mustache"] * w.curve(13 + 0.02 * w.side**2, 1.5, 0, 9), dark)


def _mouth(c: Canvas) -> None:
    w = c.window(10, 26, 13)
    smile, gap = c["Smiling"], c["Mouth_Slightly_Open"]
    half = (8 + 2.5 * smile) * c.size
    bend = (w.side / 8) ** 2
    middle = 18.5 + smile * (1.5 - 2.6 * bend) + (1 - smile) * 0.6 * bend
    taper = np.sqrt((1 - (w.side / half) ** 2).clip(0, 1))
    thick = (1.5 + 1.5 * c["Big_Lips"] + 1.8 * gap) * taper
    lips = _soft(thick - np.abs(w.y - middle)) * _soft(half - w.side)
    red = c["Wearing_Lipstick"][:, 0]
    natural = c.skin * np.array((0.80, 0.48, 0.50), dtype=np.float32)
    w.paint(lips, natural + red * (np.array((0.90, 0.02, 0.18), dtype=np.float32) - natural))
    inside = _soft((1.8 * gap + 0.3) * taper - np.abs(w.y - middle)) * _soft(half - 1.5 - w.side)
    w.paint((0.5 + 0.5 * gap) * inside, (0.15, 0.02, 0.04))
    teeth = _soft(0.8 * taper - np.abs(w.y - middle + 0.9)) * _soft(half - 3 - w.side)
    w.paint(gap * teeth, (0.97, 0.97, 0.94))


def _worn(c: Canvas) -> None:
    w = c.window(-10, 9, 21)
    radius = np.sqrt((w.y + 1) ** 2 + (w.side - 10) ** 2)
    frame = np.maximum(_soft(1.1 - np.abs(radius - 8)), w.box(-2, 0, 0.8, 3))
    w.paint(c["Eyeglasses"] * frame, (0.03, 0.03, 0.05))
    hat = c.window(-52, -25, 36)
    crown = hat.box(-40, 0, 12, 25)
    brim = hat.box(-28, 0, 2, 34)
    hat.paint(c["Wearing_Hat"] * np.maximum(crown, brim), c.shirt)
    hat.paint(c["Wearing_Hat"] * hat.box(-32, 0, 2, 25), 1 - c.shirt)
