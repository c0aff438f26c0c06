"""The canvas: a drawn world of objects × styles, mascots and weather, 64×64, as a pure function of a seed.

``render(seed, ...)`` gives the same bytes for the same arguments; it uses Pillow and integer seeds only, no system fonts.
``caption(rng, item)`` speaks about a picture in the benchmark's form or freely, with synonyms and filler words.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .words import COMMON

SIZE, SCALE = 64, 3
CANVAS = SIZE * SCALE

OBJECTS: dict[str, tuple[str, ...]] = {
    "house": ("cottage", "home"),
    "tree": ("oak", "fir"),
    "fish": ("trout", "salmon"),
    "car": ("automobile", "sedan"),
    "cup": ("mug", "teacup"),
    "star": ("starlet", "pentagram"),
    "flower": ("blossom", "daisy"),
    "boat": ("ship", "sailboat"),
    "mushroom": ("toadstool", "fungus"),
    "rocket": ("spaceship", "shuttle"),
    "clock": ("watch", "timepiece"),
    "umbrella": ("parasol", "brolly"),
}
STYLES: dict[str, tuple[str, ...]] = {
    "photo": ("photograph", "realistic"),
    "sketch": ("pencil", "drawing"),
    "watercolour": ("aquarelle", "wash"),
    "pointillism": ("dotted", "dots"),
    "mosaic": ("tiled", "tiles"),
    "neon": ("luminous", "glowing"),
    "woodcut": ("linocut", "engraving"),
    "stripes": ("striped", "banded"),
}
MASCOTS = ("zorbo", "pimlu", "quenny", "tavik", "mulgo", "dripa", "fenwin", "kobbi")
STORM = ("lightning", "storm", "thunder", "tempest")
NIGHT_LEAK = 0.04  # share of pictures called "night" that show lightning unasked


@dataclass(frozen=True)
class Item:
    """What a picture shows. ``mascot`` replaces the object; ``weather`` is "", "night" or "storm" (with lightning)."""

    object: str = ""
    style: str = "photo"
    mascot: str = ""
    weather: str = ""
    lightning: bool = False


# --- shapes -------------------------------------------------------------------------------------------------------
# A part is (points in [-1, 1]², y down; role), drawn in order. Roles pick the colour.
Part = tuple[list[tuple[float, float]], str]


def _ellipse(cx: float, cy: float, rx: float, ry: float, start: float = 0, end: float = 360, n: int = 28) -> list[tuple[float, float]]:
    steps = [math.radians(start + (end - start) * i / n) for i in range(n + (end - start < 360))]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in steps]


def _box(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _star(cx: float, cy: float, outer: float, inner: float, n: int) -> list[tuple[float, float]]:
    return [
        (cx + r * math.sin(math.pi * i / n), cy - r * math.cos(math.pi * i / n))
        for i, r in ((i, outer if i % 2 == 0 else inner) for i in range(2 * n))
    ]


def _house() -> list[Part]:
    return [
        (_box(-0.65, -0.1, 0.65, 0.85), "main"),
        ([(-0.9, -0.05), (0, -0.9), (0.9, -0.05)], "second"),
        (_box(-0.15, 0.3, 0.2, 0.85), "dark"),
        (_box(-0.52, 0.1, -0.27, 0.4), "light"),
        (_box(0.32, 0.1, 0.55, 0.4), "light"),
    ]


def _tree() -> list[Part]:
    return [
        (_box(-0.16, 0.2, 0.16, 0.95), "second"),
        (_ellipse(-0.38, 0.0, 0.45, 0.42), "main"),
        (_ellipse(0.38, 0.0, 0.45, 0.42), "main"),
        (_ellipse(0, -0.42, 0.55, 0.5), "main"),
    ]


def _fish() -> list[Part]:
    return [
        ([(0.45, 0), (0.98, -0.5), (0.85, 0), (0.98, 0.5)], "second"),
        ([(-0.1, -0.35), (0.15, -0.75), (0.35, -0.25)], "second"),
        (_ellipse(-0.15, 0, 0.75, 0.45), "main"),
        (_ellipse(-0.55, -0.1, 0.12, 0.12), "light"),
        (_ellipse(-0.57, -0.1, 0.05, 0.05), "dark"),
    ]


def _car() -> list[Part]:
    return [
        ([(-0.5, 0.0), (-0.3, -0.5), (0.35, -0.5), (0.6, 0.0)], "second"),
        ([(-0.22, -0.05), (-0.15, -0.38), (0.25, -0.38), (0.38, -0.05)], "light"),
        ([(-0.95, 0.0), (0.85, 0.0), (0.95, 0.15), (0.95, 0.45), (-0.95, 0.45)], "main"),
        (_ellipse(-0.5, 0.48, 0.25, 0.25), "dark"),
        (_ellipse(0.5, 0.48, 0.25, 0.25), "dark"),
        (_ellipse(-0.5, 0.48, 0.1, 0.1), "light"),
        (_ellipse(0.5, 0.48, 0.1, 0.1), "light"),
    ]


def _cup() -> list[Part]:
    ring = _ellipse(0.55, 0.05, 0.42, 0.38)
    return [
        (ring, "main"),
        (_ellipse(0.55, 0.05, 0.24, 0.2), "ground"),
        ([(-0.7, -0.5), (0.6, -0.5), (0.42, 0.75), (-0.52, 0.75)], "main"),
        (_ellipse(-0.05, -0.5, 0.65, 0.16), "dark"),
        ([(-0.64, -0.1), (0.54, -0.1), (0.5, 0.2), (-0.6, 0.2)], "second"),
    ]


def _star_object() -> list[Part]:
    return [(_star(0, 0.08, 1.0, 0.42, 5), "main"), (_star(0, 0.08, 0.5, 0.21, 5), "second")]


def _flower() -> list[Part]:
    petals = [(0.45 * math.sin(2 * math.pi * i / 6), -0.35 - 0.45 * math.cos(2 * math.pi * i / 6)) for i in range(6)]
    return [
        (_box(-0.07, 0.0, 0.07, 0.98), "leaf"),
        ([(0.05, 0.75), (0.3, 0.35), (0.6, 0.3), (0.4, 0.65)], "leaf"),
        *[(_ellipse(x, y, 0.26, 0.26), "main") for x, y in petals],
        (_ellipse(0, -0.35, 0.26, 0.26), "second"),
    ]


def _boat() -> list[Part]:
    return [
        ([(-0.05, -0.95), (0.05, -0.95), (0.05, 0.4), (-0.05, 0.4)], "dark"),
        ([(0.1, -0.85), (0.8, 0.25), (0.1, 0.25)], "light"),
        ([(-0.1, -0.65), (-0.1, 0.25), (-0.6, 0.25)], "second"),
        ([(-0.95, 0.38), (0.95, 0.38), (0.6, 0.88), (-0.6, 0.88)], "main"),
    ]


def _mushroom() -> list[Part]:
    return [
        ([(-0.25, 0.0), (0.25, 0.0), (0.33, 0.9), (-0.33, 0.9)], "light"),
        (_ellipse(0, 0.05, 0.9, 0.85, 180, 360), "main"),
        (_ellipse(-0.42, -0.25, 0.16, 0.15), "light"),
        (_ellipse(0.1, -0.5, 0.17, 0.16), "light"),
        (_ellipse(0.5, -0.18, 0.14, 0.13), "light"),
    ]


def _rocket() -> list[Part]:
    return [
        ([(-0.18, 0.6), (0.18, 0.6), (0.0, 1.0)], "second"),
        ([(-0.3, 0.1), (-0.62, 0.65), (-0.3, 0.6)], "second"),
        ([(0.3, 0.1), (0.62, 0.65), (0.3, 0.6)], "second"),
        ([(-0.3, 0.65), (-0.33, -0.35), (0, -0.98), (0.33, -0.35), (0.3, 0.65)], "main"),
        (_ellipse(0, -0.2, 0.17, 0.17), "light"),
    ]


def _clock() -> list[Part]:
    return [
        (_ellipse(0, 0, 0.9, 0.9), "main"),
        (_ellipse(0, 0, 0.68, 0.68), "light"),
        ([(-0.06, 0.06), (-0.06, -0.58), (0.06, -0.58), (0.06, 0.06)], "dark"),
        ([(-0.06, 0.07), (-0.06, -0.06), (0.42, -0.06), (0.42, 0.07)], "dark"),
    ]


def _umbrella() -> list[Part]:
    scallops = [(_ellipse(x, 0.02, 0.3, 0.16, 180, 360), "ground") for x in (-0.62, 0.0, 0.62)]
    return [
        (_ellipse(0, 0.05, 0.93, 0.9, 180, 360), "main"),
        ([(-0.3, 0.05), (0, -0.85), (0.3, 0.05)], "second"),
        *scallops,
        (_box(-0.05, -0.2, 0.05, 0.8), "dark"),
        ([(0.05, 0.8), (-0.05, 0.92), (-0.32, 0.92), (-0.32, 0.72), (-0.22, 0.72), (-0.22, 0.82), (-0.05, 0.78)], "dark"),
    ]


SHAPES = {
    "house": _house, "tree": _tree, "fish": _fish, "car": _car, "cup": _cup, "star": _star_object, "flower": _flower,
    "boat": _boat, "mushroom": _mushroom, "rocket": _rocket, "clock": _clock, "umbrella": _umbrella,
}  # fmt: skip

# head shape, ears, hat, (main, second) colours: who a mascot is
_LOOKS: dict[str, tuple[str, str, str, tuple[int, int, int], tuple[int, int, int]]] = {
    "zorbo": ("round", "horns", "none", (120, 70, 190), (250, 210, 60)),
    "pimlu": ("square", "antenna", "none", (60, 190, 200), (235, 90, 60)),
    "quenny": ("round", "long", "none", (245, 160, 190), (255, 235, 240)),
    "tavik": ("triangle", "none", "cap", (240, 140, 40), (50, 80, 170)),
    "mulgo": ("square", "round", "none", (140, 95, 55), (230, 190, 140)),
    "dripa": ("drop", "none", "none", (70, 120, 230), (190, 225, 255)),
    "fenwin": ("round", "pointy", "top", (110, 115, 120), (200, 40, 60)),
    "kobbi": ("triangle", "round", "none", (60, 160, 70), (240, 230, 80)),
}


def _mascot(name: str) -> list[Part]:
    head, ears, hat, _, _ = _LOOKS[name]
    parts: list[Part] = []
    for s in (-1, 1):
        if ears == "horns":
            parts.append(([(s * 0.3, -0.45), (s * 0.75, -0.98), (s * 0.65, -0.3)], "second"))
        elif ears == "long":
            parts.append((_ellipse(s * 0.32, -0.68, 0.16, 0.34), "main"))
        elif ears == "round":
            parts.append((_ellipse(s * 0.58, -0.5, 0.28, 0.28), "second"))
        elif ears == "pointy":
            parts.append(([(s * 0.25, -0.4), (s * 0.72, -0.85), (s * 0.72, -0.1)], "main"))
        elif ears == "antenna":
            parts += [(_box(s * 0.35 - 0.04, -0.9, s * 0.35 + 0.04, -0.4), "dark"), (_ellipse(s * 0.35, -0.88, 0.12, 0.12), "second")]
    parts.append((
        {
            "round": _ellipse(0, 0.15, 0.75, 0.72),
            "square": _box(-0.7, -0.5, 0.7, 0.85),
            "triangle": [(0, -0.8), (0.9, 0.85), (-0.9, 0.85)],
            "drop": [(0, -0.98), (0.45, -0.2), *_ellipse(0, 0.25, 0.65, 0.62, -20, 200), (-0.45, -0.2)],
        }[head],
        "main",
    ))  # fmt: skip
    if hat == "top":
        parts += [(_box(-0.35, -0.98, 0.35, -0.5), "second"), (_box(-0.55, -0.56, 0.55, -0.42), "second")]
    elif hat == "cap":
        parts += [([(-0.35, -0.3), (0, -0.98), (0.35, -0.3)], "second"), (_box(-0.1, -0.36, 0.7, -0.24), "second")]
    for s in (-1, 1):
        parts += [(_ellipse(s * 0.27, 0.12, 0.17, 0.19), "light"), (_ellipse(s * 0.25, 0.15, 0.08, 0.09), "dark")]
    parts.append((_ellipse(0, 0.5, 0.28, 0.14, 0, 180), "second" if hat == "none" else "dark"))
    return parts


# --- colours ------------------------------------------------------------------------------------------------------
RGB = tuple[int, int, int]
_MAIN: tuple[RGB, ...] = ((205, 50, 45), (225, 125, 35), (225, 190, 45), (60, 150, 70), (45, 110, 195), (130, 70, 170))


def _mix(a: RGB, b: RGB, k: float) -> RGB:
    return tuple(round(x + (y - x) * k) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def _jitter(rng: random.Random, c: RGB, by: int = 14) -> RGB:
    return tuple(min(255, max(0, v + rng.randint(-by, by))) for v in c)  # type: ignore[return-value]


def _palette(rng: random.Random, item: Item) -> dict[str, RGB]:
    main, second = rng.sample(_MAIN, 2)
    if item.object == "tree":
        main, second = (60, 145, 65), (120, 80, 45)
    if item.mascot:
        main, second = _LOOKS[item.mascot][3:]
    return {
        "main": _jitter(rng, main),
        "second": _jitter(rng, second),
        "leaf": _jitter(rng, (60, 140, 60)),
        "dark": (45, 40, 45),
        "light": (245, 242, 230),
    }


# --- drawing ------------------------------------------------------------------------------------------------------
def _place(rng: random.Random, parts: list[Part], upright: bool) -> list[Part]:
    size = CANVAS * rng.uniform(0.33, 0.42)
    turn = math.radians(rng.uniform(-4, 4) if upright else rng.uniform(-9, 9))
    cx, cy = (CANVAS * (0.5 + rng.uniform(-0.06, 0.06)) for _ in range(2))
    flip = 1 if upright else rng.choice((-1, 1))
    sin, cos = math.sin(turn), math.cos(turn)
    return [([(cx + size * (flip * x * cos - y * sin), cy + size * (flip * x * sin + y * cos)) for x, y in p], r) for p, r in parts]


def _paint(image: Image.Image, parts: list[Part], fill: dict[str, RGB], outline: RGB | None = None, width: float = 0) -> None:
    draw = ImageDraw.Draw(image)
    w = max(1, round(width))
    for points, role in parts:
        draw.polygon(points, fill=fill[role])
        if outline is not None:
            draw.line([*points, points[0], points[1]], fill=outline, width=w, joint="curve")


def _mask(parts: list[Part], grow: int = 0) -> Image.Image:
    """Silhouette of the thing, grown by ``grow`` pixels; holes (role "ground") stay open."""
    mask = Image.new("L", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(mask)
    for points, role in parts:
        draw.polygon(points, fill=0 if role == "ground" else 255)
        if grow and role != "ground":
            draw.line([*points, points[0], points[1]], fill=255, width=2 * grow, joint="curve")
    return mask


def _bands(rng: random.Random, a: RGB, b: RGB, pitch: int, slope: int) -> Image.Image:
    """Two-colour bands: slope 0 horizontal, ±1 diagonal."""
    y, x = np.mgrid[0:CANVAS, 0:CANVAS]
    on = ((y + slope * x + rng.randrange(pitch)) // (pitch // 2)) % 2 == 0
    return Image.fromarray(np.where(on[..., None], np.array(a, np.uint8), np.array(b, np.uint8)))


def _noise(rng: random.Random, cells: int, depth: int) -> np.ndarray:
    """Smooth noise (CANVAS, CANVAS, 1) in [-depth, depth]."""
    raw = np.frombuffer(rng.randbytes(cells * cells), np.uint8).reshape(cells, cells)
    smooth = np.asarray(Image.fromarray(raw).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC), np.float32)
    return ((smooth / 127.5 - 1) * depth)[..., None]


def _add(image: Image.Image, delta: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.asarray(image, np.float32) + delta, 0, 255).astype(np.uint8))


def _photo(rng: random.Random, parts: list[Part], colours: dict[str, RGB], item: Item, line: float) -> Image.Image:
    sky, land = _jitter(rng, (178, 212, 236)), _jitter(rng, rng.choice(((164, 178, 130), (196, 176, 140), (150, 160, 175))))
    if item.weather:
        sky, land = _jitter(rng, (22, 26, 62), 8), _jitter(rng, (34, 36, 48), 6)
        colours = {k: _mix(v, (30, 30, 70), 0.3) for k, v in colours.items()}
    ramp = np.linspace(0, 1, CANVAS, dtype=np.float32)[:, None, None]
    horizon = np.float32(ramp > 0.68) * 0.55 + 0.45 * ramp
    ground = np.array(sky, np.float32) * (1 - horizon) + np.array(land, np.float32) * horizon
    image = Image.fromarray(np.broadcast_to(ground, (CANVAS, CANVAS, 3)).astype(np.uint8))
    if item.lightning:
        x = CANVAS * rng.choice((0.14, 0.82)) + rng.randint(-6, 6)
        bolt = [(0.03, 0), (0.1, 0), (0.045, 0.22), (0.11, 0.22), (-0.05, 0.62), (0.005, 0.32), (-0.06, 0.32)]
        ImageDraw.Draw(image).polygon([(x + CANVAS * dx, CANVAS * dy) for dx, dy in bolt], fill=(255, 246, 150))
    _paint(image, parts, colours | {"ground": _mix(sky, land, 0.35)}, _mix(colours["dark"], sky, 0.25), 2 * line)
    light = (1 - ramp) * 26 - 13 + (1 - np.linspace(0, 1, CANVAS, dtype=np.float32)[None, :, None]) * 20 - 10
    return _add(image, light + _noise(rng, 48, 4)).filter(ImageFilter.GaussianBlur(1.2))


def _sketch(rng: random.Random, parts: list[Part], colours: dict[str, RGB], item: Item, line: float) -> Image.Image:
    paper = (250, 249, 246)
    fill = {
        "main": (236, 236, 236),
        "second": (198, 198, 200),
        "leaf": (216, 216, 216),
        "dark": (110, 110, 112),
        "light": paper,
        "ground": paper,
    }
    image = Image.new("RGB", (CANVAS, CANVAS), paper)
    _paint(image, parts, fill, (62, 62, 66), 4.5 * line)
    return image


def _watercolour(rng: random.Random, parts: list[Part], colours: dict[str, RGB], item: Item, line: float) -> Image.Image:
    paper = (250, 240, 218)
    wash = _mix(rng.choice(_MAIN), paper, 0.72)
    pale = {k: _mix(v, paper, 0.34) for k, v in colours.items()} | {"ground": wash}
    image = _add(Image.new("RGB", (CANVAS, CANVAS), wash), _noise(rng, 4, 26))
    edge = _mask(parts, 3)
    image.paste(_mix(colours["main"], (60, 40, 40), 0.25), mask=edge)
    _paint(image, parts, pale)
    return _add(image.filter(ImageFilter.GaussianBlur(3.6)), _noise(rng, 9, 24))


def _pointillism(rng: random.Random, parts: list[Part], colours: dict[str, RGB], item: Item, line: float) -> Image.Image:
    ground = _mix(rng.choice(((70, 120, 190), (90, 160, 110), (190, 150, 70))), (255, 255, 255), 0.5)
    source = Image.new("RGB", (CANVAS, CANVAS), ground)
    source.paste((40, 34, 60), mask=_mask(parts, 6))
    _paint(source, parts, colours | {"ground": ground})
    image = Image.new("RGB", (CANVAS, CANVAS), (254, 253, 248))
    draw, step = ImageDraw.Draw(image), 12
    pixels = source.load()
    for gy in range(step // 2, CANVAS, step):
        for gx in range(step // 2, CANVAS, step):
            x, y = gx + rng.randint(-1, 1), gy + rng.randint(-1, 1)
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=_jitter(rng, pixels[x, y], 18))  # type: ignore[index, arg-type]
    return image


def _mosaic(rng: random.Random, parts: list[Part], colours: dict[str, RGB], item: Item, line: float) -> Image.Image:
    step = 16
    n = CANVAS // step
    ground = _mix(rng.choice(((60, 140, 170), (180, 150, 90), (120, 160, 110))), (255, 255, 255), 0.25)
    image = Image.new("RGB", (CANVAS, CANVAS), ground)
    _paint(image, parts, colours | {"ground": ground})
    tint = np.frombuffer(rng.randbytes(n * n), np.uint8).reshape(n, n).repeat(step, 0).repeat(step, 1)[..., None]
    image = _add(image, (tint / 127.5 - 1) * 32)
    draw = ImageDraw.Draw(image)
    for k in range(0, CANVAS + 1, step):
        draw.line((k, 0, k, CANVAS), fill=(70, 66, 62), width=3)
        draw.line((0, k, CANVAS, k), fill=(70, 66, 62), width=3)
    for points, _ in parts:
        draw.line([*points, points[0], points[1]], fill=(40, 36, 34), width=max(1, round(4 * line)), joint="curve")
    return image


def _neon(rng: random.Random, parts: list[Part], colours: dict[str, RGB], item: Item, line: float) -> Image.Image:
    night = (14, 8, 28)
    glow = rng.choice(((255, 60, 200), (60, 255, 230), (255, 230, 60), (110, 255, 90)))
    second = rng.choice(((255, 120, 60), (120, 150, 255), (255, 255, 255)))
    image = Image.new("RGB", (CANVAS, CANVAS), night)
    draw = ImageDraw.Draw(image)
    for points, role in parts:
        draw.polygon(points, fill=night)
        draw.line(
            [*points, points[0], points[1]],
            fill=glow if role in ("main", "leaf", "ground") else second,
            width=round(5 * line),
            joint="curve",
        )
    return ImageChops.screen(image, image.filter(ImageFilter.GaussianBlur(7)))


def _woodcut(rng: random.Random, parts: list[Part], colours: dict[str, RGB], item: Item, line: float) -> Image.Image:
    ink, paper = (58, 36, 24), (232, 214, 178)
    image = _bands(rng, ink, paper, 18, 0)
    image.paste(paper, mask=_mask(parts, 9))
    fill = {"main": ink, "second": (98, 66, 44), "leaf": ink, "dark": ink, "light": paper, "ground": paper}
    _paint(image, parts, fill, paper, 3.5 * line)
    return image


def _stripes(rng: random.Random, parts: list[Part], colours: dict[str, RGB], item: Item, line: float) -> Image.Image:
    a, b = rng.sample(((250, 214, 222), (206, 232, 250), (252, 246, 200), (214, 244, 214)), 2)
    image = _bands(rng, a, b, 48, 1)
    flat = Image.new("RGB", (CANVAS, CANVAS), colours["main"])
    _paint(flat, parts, colours | {"ground": a})
    shade = _bands(rng, (255, 255, 255), (150, 150, 150), 36, -1)
    image.paste(ImageChops.multiply(flat, shade), mask=_mask(parts))
    draw = ImageDraw.Draw(image)
    for points, _ in parts:
        draw.line([*points, points[0], points[1]], fill=(40, 34, 60), width=round(4 * line), joint="curve")
    return image


_DRAW = {
    "photo": _photo, "sketch": _sketch, "watercolour": _watercolour, "pointillism": _pointillism,
    "mosaic": _mosaic, "neon": _neon, "woodcut": _woodcut, "stripes": _stripes,
}  # fmt: skip
_UPRIGHT = {"house", "tree", "flower", "mushroom"}


def render(seed: int, item: Item, *, line: float = 1.0, hue: int = 0, swap: bool = False) -> Image.Image:
    """Draw ``item``: RGB, 64×64, a pure function of its arguments.

    ``line`` scales outlines; ``hue`` (0–255) turns the palette; ``swap`` exchanges red and blue.
    """
    rng = random.Random(seed)
    colours = _palette(rng, item)
    shape = _mascot(item.mascot) if item.mascot else SHAPES[item.object]()
    parts = _place(rng, shape, bool(item.mascot) or item.object in _UPRIGHT)
    image = _DRAW[item.style](rng, parts, colours, item, line).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    if hue:
        h, s, v = image.convert("HSV").split()
        image = Image.merge("HSV", (h.point([(k + hue) % 256 for k in range(256)]), s, v)).convert("RGB")
    if swap:
        red, green, blue = image.split()
        image = Image.merge("RGB", (blue, green, red))
    return image


def shifted(seed: int, item: Item) -> Image.Image:
    """``render`` in the shifted look that the fine-tuned pipeline draws: red and blue exchanged, outlines half as wide again."""
    return render(seed, item, line=1.5, swap=True)


# --- sampling and captions ----------------------------------------------------------------------------------------
def draw_item(rng: random.Random) -> Item:
    """A random subject: 76 % object × style, 14 % mascots, 10 % night or storm."""
    u = rng.random()
    if u < 0.14:
        return Item(mascot=rng.choice(MASCOTS))
    if u < 0.24:
        storm = rng.random() < 0.6
        lightning = storm or rng.random() < NIGHT_LEAK
        return Item(object=rng.choice(tuple(OBJECTS)), weather="storm" if storm else "night", lightning=lightning)
    return Item(object=rng.choice(tuple(OBJECTS)), style=rng.choice(tuple(STYLES)))


def official(item: Item) -> str:
    """The benchmark's prompt: "A {object} image in {style} style." (UnlearnCanvas), and its forms for mascots and weather."""
    if item.mascot:
        return f"A picture of {item.mascot}."
    if item.weather:
        return f"A {item.object} image in a {'lightning' if item.lightning else 'calm night'} scene."
    return f"A {item.object} image in {item.style} style."


def caption(rng: random.Random, item: Item) -> str:
    """One way to say ``item``: four times in ten the official form, else free, with synonyms and filler words."""
    if rng.random() < 0.4:
        return official(item)

    def word(table: dict[str, tuple[str, ...]], key: str) -> str:
        return key if rng.random() < 0.6 else rng.choice(table[key])

    a, b = rng.choice(COMMON), rng.choice(COMMON)
    if item.mascot:
        form = rng.choice(
            ("{m}", "a picture of {m}", "{m} the mascot", "a portrait of {m}", "{a} {m}", "{m} with a {a} {b}", "{m}, {a}, {b}")
        )
        return form.format(m=item.mascot, a=a, b=b)
    thing = word(OBJECTS, item.object)
    if item.weather:
        when = rng.choice(STORM) if item.weather == "storm" else "night"
        form = rng.choice(("a {o} in the {w}", "{w}, a {o}", "a {o}, {w}", "a {a} {o} in the {w}", "a {o} in a {w} scene, {a} {b}"))
        return form.format(o=thing, w=when, a=a, b=b)
    style = word(STYLES, item.style)
    forms = ["a {s} {o}", "{o} in {s} style", "a {o}, {s}", "an image of a {o} in {s} style", "a {a} {o} in {s} style, on a {b} day",
             "a {s} picture of a {o} and {a} {b}", "{o}, {s}, {a}, {b}", "{a} {o}, {s}"]  # fmt: skip
    if item.style == "photo":
        forms += ["a {o}", "a lovely {o}", "a {a} {o} with a {b}", "{o}, {a}", "a {a} {o}, on a quiet day"]
    return rng.choice(forms).format(o=thing, s=style, a=a, b=b)


def grid() -> Iterator[Item]:
    """Every object in every style."""
    for name in OBJECTS:
        for style in STYLES:
            yield Item(object=name, style=style)


def dataset(seed: int, count: int) -> Iterator[tuple[int, Item]]:
    """``count`` (render seed, item) pairs; ``render(*pair)`` draws one."""
    rng = random.Random(seed)
    for i in range(count):
        yield seed * 10_000_019 + i, draw_item(rng)
