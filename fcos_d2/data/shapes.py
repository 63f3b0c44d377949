"""Generated data set of drawn shapes, written as a VOC folder."""

import colorsys
import json
import logging
import os
import shutil
import tempfile
import xml.etree.ElementTree as ET
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .findings import DataError

logger = logging.getLogger(__name__)

SHAPE_CLASSES = ("circle", "cross", "heart", "square", "star", "triangle")
GENERATOR_VERSION = 2  # increase with every change of a pixel or a box

IMAGE_SIDE = (160, 224)  # pixels, both ends included
MIN_SIZE = 8  # longer side of the smallest object, pixels
MAX_SHARE = 0.66  # longer side of the largest object, as a share of the image's shorter side
MAX_OBJECTS = 8
EMPTY_SHARE = 0.04  # of the images
HIDDEN_DIFFICULT = 0.5  # an object is difficult if more than this share of it is hidden
HIDDEN_MAX = 0.75  # largest share of an object that may be hidden
SUPERSAMPLING = 4


@dataclass
class DrawnObject:
    """One object of a drawn image."""

    name: str
    mask: np.ndarray  # (H, W) bool: the whole silhouette inside the image, hidden parts included
    truncated: bool  # part of the silhouette is outside the image
    visible: float = 1.0  # share of the mask that no later object covers

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Tight box of the mask: continuous 0-based (x0, y0, x1, y1)."""
        xs, ys = np.flatnonzero(self.mask.any(0)), np.flatnonzero(self.mask.any(1))
        return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1

    @property
    def difficult(self) -> bool:
        """Whether most of the object is hidden."""
        return 1 - self.visible > HIDDEN_DIFFICULT


def draw_image(split: str, index: int) -> tuple[np.ndarray, list[DrawnObject]]:
    """Draw one image; the same arguments give the same pixels.

    Returns:
        image: (H, W, 3) uint8, RGB.
        objects: in drawing order, later ones in front.
    """
    # RandomState, not Generator: its streams are frozen, whatever the version of numpy.
    rng = np.random.RandomState(zlib.crc32(f"{split}/{index}".encode()))
    height, width = rng.randint(IMAGE_SIDE[0], IMAGE_SIDE[1] + 1, size=2)
    canvas = _draw_background(rng, height, width)
    objects: list[DrawnObject] = []
    count = 0 if rng.rand() < EMPTY_SHARE else 1 + rng.binomial(MAX_OBJECTS - 1, 0.35)
    for size in _draw_sizes(rng, count, min(height, width)):
        placed = _place_object(rng, size, objects, height, width)
        if placed is not None:
            drawn, coverage = placed
            canvas = _paint_object(rng, canvas, drawn, coverage)
            objects.append(drawn)
    grain = rng.normal(0, 0.012, size=(height, width, 1))
    return (np.clip(canvas + grain, 0, 1) * 255 + 0.5).astype(np.uint8), objects


def _draw_sizes(rng: np.random.RandomState, count: int, side: int) -> np.ndarray:
    """Sizes (count,) in pixels, mostly from large to small so that few objects vanish behind."""
    # Log-uniform would make a quarter of all objects smaller than 16 px; the power keeps them few.
    exponent = rng.rand(count) ** 0.4
    sizes = MIN_SIZE * (MAX_SHARE * side / MIN_SIZE) ** exponent
    order = np.argsort(-sizes * np.exp(rng.normal(0, 0.5, size=count)), kind="stable")
    return sizes[order]


def _place_object(
    rng: np.random.RandomState, size: float, earlier: list[DrawnObject], height: int, width: int
) -> tuple[DrawnObject, np.ndarray] | None:
    """Find a place where a new object hides no earlier one too much.

    Returns:
        The object and its antialiased coverage (H, W) in [0, 1]; None if no place was found.
        ``visible`` of the earlier objects is updated.
    """
    for _ in range(30):
        name = SHAPE_CLASSES[rng.randint(len(SHAPE_CLASSES))]
        outline = _make_outline(rng, name) * size
        margin = 0.25 * size if size >= 32 and rng.rand() < 0.3 else 0.0  # allowed outside
        low, high = -margin - outline.min(0), np.array([width, height]) + margin - outline.max(0)
        outline = outline + low + (high - low) * rng.rand(2)
        coverage = _rasterize(outline, height, width)
        truncated = bool((outline < 0).any() or (outline > (width, height)).any())
        drawn = DrawnObject(name, coverage >= 0.5, truncated)
        front, visible = drawn.mask, []
        for other in reversed(earlier):
            visible.append(1 - (other.mask & front).sum() / other.mask.sum())
            front = front | other.mask
        visible.reverse()
        alike = any(e.name == name and _iou(e.box, drawn.box) > 0.4 for e in earlier)
        if not alike and all(v >= 1 - HIDDEN_MAX for v in visible):
            for other, share in zip(earlier, visible, strict=True):
                other.visible = float(share)
            return drawn, coverage
    return None


def _iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Intersection over union of two (x0, y0, x1, y1) boxes."""
    w = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / total


def _make_outline(rng: np.random.RandomState, name: str) -> np.ndarray:
    """Outline (P, 2) of a shape, stretched and rotated; the longer side of its box is 1."""
    if name == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float)
    elif name == "cross":
        arm = 0.34
        corner = np.array([(1, -arm), (1, arm), (arm, arm)])
        turn = np.array([(0, -1), (1, 0)])
        points = np.concatenate([corner @ np.linalg.matrix_power(turn, k).T for k in range(4)])
    elif name == "heart":
        t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        points = np.stack([16 * np.sin(t) ** 3, -y], axis=1)
    else:
        corners = {"circle": 72, "star": 10, "triangle": 3}[name]
        angle = 2 * np.pi * np.arange(corners) / corners
        radius = np.where(np.arange(corners) % 2, 0.42, 1.0) if name == "star" else 1.0
        points = np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)
    points[:, 0] *= np.exp(rng.uniform(-0.15, 0.15))
    turn = np.deg2rad(rng.uniform(-35, 35) if name == "heart" else rng.uniform(0, 360))
    points = points @ np.array([(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))])
    return points / np.ptp(points, axis=0).max()


def _rasterize(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """Share (H, W) of each pixel that a polygon covers."""
    scale = SUPERSAMPLING
    image = Image.new("L", (int(width) * scale, int(height) * scale))
    # A corner of the polygon names a pixel of the fine grid, whose center is half a pixel further.
    corners = np.rint(outline * scale - 0.5).astype(int)
    ImageDraw.Draw(image).polygon([tuple(map(int, xy)) for xy in corners], fill=255)
    return np.asarray(image.reduce(scale), dtype=float) / 255


def _paint_object(
    rng: np.random.RandomState, canvas: np.ndarray, drawn: DrawnObject, coverage: np.ndarray
) -> np.ndarray:
    """Paint a textured shape with a soft shadow and a darker rim onto the (H, W, 3) canvas."""
    height, width = drawn.mask.shape
    size = np.sqrt(drawn.mask.sum())
    base = _pick_color(rng, drawn.name, canvas[drawn.mask].mean(0))
    accent = np.clip(base * rng.uniform(0.55, 0.8) + rng.choice([0.0, 0.3]), 0, 1)
    field = _draw_field(rng, height, width, period=float(np.clip(size / 4, 4, 24)))
    paint = base + (accent - base) * field[..., None] * rng.uniform(0.3, 1.0)
    rim = _blur(coverage, max(1.0, 0.05 * size))
    paint = paint * (0.45 + 0.55 * np.clip(rim, 0, 1))[..., None]
    shift = max(1, int(round(0.05 * size)))
    shadow = np.zeros_like(coverage)
    shadow[shift:, shift:] = coverage[:-shift, :-shift]
    canvas = canvas * (1 - 0.4 * _blur(shadow, max(1.0, 0.05 * size)))[..., None]
    return canvas + (paint - canvas) * coverage[..., None]


def _pick_color(rng: np.random.RandomState, name: str, behind: np.ndarray) -> np.ndarray:
    """A vivid RGB color in [0, 1] from the class's range of hues, unlike the one behind it.

    With random hues a network takes far longer to tell classes apart, by the outline alone.
    """
    sector = 1 / len(SHAPE_CLASSES)
    for _ in range(20):
        hue = (SHAPE_CLASSES.index(name) + rng.uniform(0.2, 0.8)) * sector
        color = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.5, 0.95), rng.uniform(0.6, 1.0)))
        if np.linalg.norm(color - behind) > 0.45:
            break
    return color


def _draw_background(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """A muted texture (H, W, 3), floats in [0, 1]."""
    hue, value = rng.rand(), rng.uniform(0.25, 0.85)
    base = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.05, 0.35), value))
    other = (hue + rng.uniform(-0.15, 0.15)) % 1.0
    shade = np.clip(value + rng.choice([-1, 1]) * rng.uniform(0.1, 0.25), 0.15, 0.95)
    accent = np.array(colorsys.hsv_to_rgb(other, rng.uniform(0.05, 0.4), shade))
    pattern = _draw_field(rng, height, width, period=float(rng.uniform(10, 40)))
    clouds = _draw_clouds(rng, height, width, cells=4)
    field = 0.5 * pattern + 0.5 * clouds
    light = 1 + 0.25 * (_draw_clouds(rng, height, width, cells=2) - 0.5)
    return np.clip((base + (accent - base) * field[..., None]) * light[..., None], 0, 1)


def _draw_field(rng: np.random.RandomState, height: int, width: int, period: float) -> np.ndarray:
    """A pattern (H, W) in [0, 1]: slope, clouds, stripes, checks or dots of a period in pixels."""
    kind = rng.choice(["slope", "clouds", "stripes", "checks", "dots"])
    if kind == "clouds":
        return _draw_clouds(rng, height, width, cells=max(2, int(min(height, width) / period)))
    turn = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width]
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    if kind == "slope":
        return (u - u.min()) / np.ptp(u)
    wave_u, wave_v = np.sin(2 * np.pi * u / period), np.sin(2 * np.pi * v / period)
    wave = {"stripes": wave_u, "checks": wave_u * wave_v, "dots": wave_u + wave_v - 1}[kind]
    return np.clip(0.5 + 2 * wave, 0, 1)  # steep, not hard: an edge about a pixel or two wide


def _draw_clouds(rng: np.random.RandomState, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth noise (H, W) in [0, 1] over a grid of cells, with a finer layer on top."""
    total = np.zeros((height, width))
    for weight, n in ((0.7, cells), (0.3, 3 * cells)):
        grid = Image.fromarray(rng.rand(n + 1, n + 1).astype(np.float32))
        total += weight * np.asarray(
            grid.resize((int(width), int(height)), Image.Resampling.BICUBIC)
        )
    return np.clip(total, 0, 1)


def _blur(field: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of a field (H, W) in [0, 1], the radius in pixels."""
    image = Image.fromarray((np.clip(field, 0, 1) * 255 + 0.5).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(float(radius))), dtype=float) / 255


def make_shapes(root: str | os.PathLike, split: str, count: int) -> Path:
    """Write ``count`` drawn images as the VOC folder ``<root>/<split>_<count>``, once.

    The folder is complete when it appears, so several processes may call this together.

    Args:
        root: folder of all generated splits, created if missing.
        split: any name; it seeds the generator. A larger count of a split adds images.
        count: number of images.

    Returns:
        The folder.

    Raises:
        DataError: the folder exists, but this version of the generator did not write it.
    """
    root = Path(root)
    target = root / f"{split}_{count}"
    recipe = {"generator": "fcos_d2 shapes", "version": GENERATOR_VERSION}
    recipe.update(split=split, count=count)
    if target.exists():
        _check_recipe(target, recipe)
        return target
    root.mkdir(parents=True, exist_ok=True)
    logger.info("Drawing %d images of shapes into %s", count, target)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=root))
    try:
        _write_folder(partial, split, count, recipe)
        partial.chmod(0o755)
        try:
            partial.rename(target)
        except OSError:
            _check_recipe(target, recipe)  # another process was faster
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _check_recipe(folder: Path, recipe: dict) -> None:
    try:
        found = json.loads((folder / "shapes.json").read_text())
    except (OSError, ValueError):
        found = None
    if found != recipe:
        raise DataError(
            f"{folder} was not written by this version of the shapes generator (its shapes.json "
            f"says {found}, needed is {recipe}). Delete the folder, and it is drawn again."
        )


def _write_folder(folder: Path, split: str, count: int, recipe: dict) -> None:
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    names = [f"{split}_{index:05d}" for index in range(count)]
    for index, name in enumerate(names):
        image, objects = draw_image(split, index)
        path = folder / "JPEGImages" / f"{name}.jpg"
        Image.fromarray(image).save(path, quality=92, subsampling=0)
        annotation = _make_annotation(name, image.shape, objects)
        annotation.write(folder / "Annotations" / f"{name}.xml", encoding="utf-8")
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{n}\n" for n in names))
    (folder / "classes.txt").write_text("".join(f"{n}\n" for n in SHAPE_CLASSES))
    (folder / "shapes.json").write_text(json.dumps(recipe, indent=1) + "\n")


def _make_annotation(
    name: str, shape: tuple[int, ...], objects: list[DrawnObject]
) -> ET.ElementTree:
    """Return a VOC annotation; its boxes count pixels from 1 and include both ends."""
    root = ET.Element("annotation")
    _add(root, filename=f"{name}.jpg")
    height, width, depth = shape
    _add(ET.SubElement(root, "size"), height=height, width=width, depth=depth)
    for drawn in objects:
        element = ET.SubElement(root, "object")
        truncated, difficult = int(drawn.truncated), int(drawn.difficult)
        _add(element, name=drawn.name, truncated=truncated, difficult=difficult)
        x0, y0, x1, y1 = drawn.box
        _add(ET.SubElement(element, "bndbox"), xmin=x0 + 1, ymin=y0 + 1, xmax=x1, ymax=y1)
    ET.indent(root, " ")
    return ET.ElementTree(root)


def _add(element: ET.Element, **texts: object) -> None:
    for tag, text in texts.items():
        ET.SubElement(element, tag).text = str(text)
