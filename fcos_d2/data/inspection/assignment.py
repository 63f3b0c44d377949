"""Training locations of the objects of a data set, computed by the matcher without any image.

An object without a location is never learned, whatever the schedule: the share of the others is
the best possible recall of the FCOS paper, section 4.1. It depends only on the boxes, the scale of
the images and the levels.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_backbone
from detectron2.structures import Boxes, Instances
from tqdm import tqdm

from ...modeling.locations import Locations, compute_locations
from ...modeling.matcher import CenterSamplingMatcher
from ...modeling.proposal_generator import FCOSProposalGenerator
from ..boxes import SIZES, box_xywh, box_xyxy, size_of_area
from ..dataset_mapper import training_role

_MAX_LOCATIONS = 1 << 21  # matched at a time
_COLUMNS = ["image_id", "index", "category_id", "size", "scaled_width", "scaled_height"]
_COLUMNS += ["positives", "level", "expected_level", "candidates"]


class Assignment(NamedTuple):
    """Training locations of the objects of a data set, at one scale of its images.

    Attributes:
        objects: one row per trained object (not ignored, not dropped), in the order of the records:
            ``image_id``; ``index`` in the record's annotations; ``category_id``; ``size`` ("small",
            "medium", "large" by the area in the original image); ``scaled_width``,
            ``scaled_height`` in pixels of the network's input; ``positives``, its number of
            locations; ``level``, the one with most of them ("" if none); ``expected_level``, the
            one whose range holds half the longer side; ``candidates``, its number of locations if
            no other object claimed them.
        levels: one row per level, finest first: ``stride``, ``positives``, and ``objects`` with
            most of their locations there.
        ambiguous: number of locations that are candidates of several objects.
        num_locations: number of positive locations.
        image_scale: how the images are resized, in words.
    """

    objects: pd.DataFrame
    levels: pd.DataFrame
    ambiguous: int
    num_locations: int
    image_scale: str


class ImageAssignment(NamedTuple):
    """Training locations of the objects of one image.

    Attributes:
        boxes: (M, 4) XYXY pixels of the network's input, clipped to the image; without those of
            dropped objects.
        indices: (M,) position of each box in the record's annotations.
        ignored: (M,) bool.
        points: (P, 2) locations (x, y) in pixels of the network's input.
        levels: (P,) level of each location, 0 for the finest.
        box_of_point: (P,) row in ``boxes``, of an ignored box too.
        level_names: name of each level.
        strides: stride of each level.
    """

    boxes: np.ndarray
    indices: np.ndarray
    ignored: np.ndarray
    points: np.ndarray
    levels: np.ndarray
    box_of_point: np.ndarray
    level_names: list[str]
    strides: list[int]


class _Rule(NamedTuple):
    """The parts of a model that decide about its training locations."""

    level_names: list[str]
    strides: list[int]
    matcher: CenterSamplingMatcher
    location_offset: float
    location_step: str
    size_divisibility: int


class _Image(NamedTuple):
    """The objects of one record at the network's scale; ``size`` is (height, width)."""

    record: dict
    size: tuple[int, int]
    indices: np.ndarray  # (M,) in the record's annotations
    boxes: np.ndarray  # (M, 4) float32
    ignored: np.ndarray  # (M,) bool


def assignment_table(
    records: Sequence[dict], cfg: CfgNode, *, min_size: int | None = None
) -> Assignment:
    """Match the objects of a data set to locations, as training with ``cfg`` does.

    Only ``width`` and ``height`` of the images are used. They are resized as
    :func:`training_resize` says, each padded alone, without flips and crops.

    Args:
        records: Detectron2 dataset dicts; boxes without an area in their image count as objects
            without a location.
        cfg: a recipe; its DATASETS is not used.
        min_size: length of the shorter edge in pixels; None takes the recipe's.

    Raises:
        ValueError: the recipe's levels don't fit together.
    """
    rule = _rule_of(cfg)
    resize = training_resize(cfg, min_size)
    images = [_scale(record, cfg, resize) for record in records]
    rows: dict[int, list[tuple]] = {}  # by image
    per_level, ambiguous = np.zeros(len(rule.strides), dtype=int), 0
    with tqdm(total=len(images), desc="Matching", delay=3, disable=None) as progress:
        for locations, batch in _batches(images, rule):
            positives, candidates, shared = _count([images[i] for i in batch], locations, rule)
            ends = np.cumsum([len(images[i].boxes) for i in batch])[:-1]
            parts = np.split(positives, ends), np.split(candidates, ends)
            for i, counts, passed in zip(batch, *parts, strict=True):
                rows[i] = _object_rows(images[i], rule, counts, passed)
            per_level += positives.sum(0)
            ambiguous += shared
            progress.update(len(batch))
    objects = pd.DataFrame([row for i in sorted(rows) for row in rows[i]], columns=_COLUMNS)
    most = [int((objects["level"] == name).sum()) for name in rule.level_names]
    levels = pd.DataFrame(
        {"stride": rule.strides, "positives": per_level, "objects": most},
        index=pd.Index(rule.level_names, name="level"),
    )
    scale = describe_scale(cfg, min_size)
    return Assignment(objects, levels, ambiguous, int(per_level.sum()), scale)


def summarize_assignment(
    assignment: Assignment, class_names: Sequence[str]
) -> dict[str, pd.DataFrame]:
    """Summarize the objects per size, class and level.

    Returns:
        Under "size", "class" and "level" a table with columns ``coverage`` (percent of the objects
        with a location, nan without objects), ``objects``, ``positives_mean`` and
        ``positives_median`` (locations per object). An object belongs to its expected level.
    """
    objects = assignment.objects
    classes = objects["category_id"].map(dict(enumerate(class_names)))
    levels = list(assignment.levels.index)
    return {
        "size": _summary(objects, objects["size"], SIZES, "size"),
        "class": _summary(objects, classes, class_names, "class"),
        "level": _summary(objects, objects["expected_level"], levels, "level"),
    }


def assign_image(record: dict, cfg: CfgNode, *, min_size: int | None = None) -> ImageAssignment:
    """Match the objects of one record; arguments as in :func:`assignment_table`."""
    rule = _rule_of(cfg)
    image = _scale(record, cfg, training_resize(cfg, min_size))
    locations = _locations(rule, image.size)
    matches = rule.matcher(locations, [_instances(image)])
    points = (matches.gt_inds[0] >= 0).nonzero()[:, 0]
    return ImageAssignment(
        image.boxes,
        image.indices,
        image.ignored,
        locations.points[points].numpy(),
        locations.level_of(points).numpy(),
        matches.gt_inds[0, points].numpy(),
        rule.level_names,
        rule.strides,
    )


def training_resize(cfg: CfgNode, min_size: int | None = None) -> T.ResizeShortestEdge:
    """Return the loader's resize with a single size: ``min_size``, or the recipe's.

    The recipe's is the middle of INPUT.MIN_SIZE_TRAIN (of an even number of sizes the lower of
    two), divided by the mean share of the sides that INPUT.CROP.TYPE "relative" or
    "relative_range" keeps: crops are resized to it, which enlarges the objects as much.
    """
    return T.ResizeShortestEdge(*_network_size(cfg, min_size), "choice")


def describe_scale(cfg: CfgNode, min_size: int | None = None) -> str:
    """Describe :func:`training_resize` in words."""
    size, max_size = _network_size(cfg, min_size)
    if size == 0:
        return "images as they are"
    text = f"shorter edge {size} px, longer at most {max_size}"
    sizes = sorted(set(cfg.INPUT.MIN_SIZE_TRAIN))
    if min_size is not None or (len(sizes) == 1 and not cfg.INPUT.CROP.ENABLED):
        return text
    span = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
    share = _crop_share(cfg)
    crops = f" of crops of {share:.0%} of the sides on average" if share else ", without crops"
    return f"{text} (INPUT.MIN_SIZE_TRAIN: {span}{crops if cfg.INPUT.CROP.ENABLED else ''})"


def _network_size(cfg: CfgNode, min_size: int | None) -> tuple[int, int]:
    """Return the shorter edge in the network and the limit of the longer one."""
    if min_size is not None:
        return min_size, cfg.INPUT.MAX_SIZE_TRAIN
    sizes, share = sorted(cfg.INPUT.MIN_SIZE_TRAIN), _crop_share(cfg) or 1
    middle = sizes[(len(sizes) - 1) // 2]
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        middle = (sizes[0] + sizes[-1]) // 2
    return round(middle / share), round(cfg.INPUT.MAX_SIZE_TRAIN / share)


def _crop_share(cfg: CfgNode) -> float | None:
    """Return the mean share of the sides that is cropped; None without such crops."""
    crop = cfg.INPUT.CROP
    if not crop.ENABLED or not crop.TYPE.startswith("relative"):
        return None
    share = sum(crop.SIZE) / 2
    return (share + 1) / 2 if crop.TYPE == "relative_range" else share


# Rules by the text of cfg.MODEL: building a backbone takes a second, and pictures need it one by
# one.
_RULES: dict[str, _Rule] = {}


def _rule_of(cfg: CfgNode) -> _Rule:
    """Build the recipe's parts on the CPU as training does, and keep those without weights."""
    key = cfg.MODEL.dump()
    if key not in _RULES:
        cfg = cfg.clone()
        cfg.defrost()
        # Locations don't depend on the classes, which may not be known.
        cfg.MODEL.FCOS.NUM_CLASSES = -1
        cfg.MODEL.FCOS.CLASS_AGNOSTIC = True
        cfg.MODEL.DEVICE = "cpu"
        with torch.random.fork_rng(devices=[]):  # the weights are not used
            backbone = build_backbone(cfg)
            generator = FCOSProposalGenerator(cfg, backbone.output_shape())
        _RULES[key] = _Rule(
            list(generator.in_features),
            list(generator.strides),
            generator.matcher,
            generator.location_offset,
            generator.location_step,
            backbone.size_divisibility,
        )
    return _RULES[key]


def _scale(record: dict, cfg: CfgNode, resize: T.ResizeShortestEdge) -> _Image:
    """Resize the boxes of a record as the loader does."""
    height, width = record["height"], record["width"]
    # Only the shape of the array is used.
    transform = resize.get_transform(np.broadcast_to(np.uint8(0), (height, width, 3)))
    size = (getattr(transform, "new_h", height), getattr(transform, "new_w", width))
    annotations = record.get("annotations", ())
    roles = [training_role(x, cfg.INPUT.DIFFICULT, cfg.INPUT.CROWD) for x in annotations]
    indices = np.array([i for i, role in enumerate(roles) if role != "drop"], dtype=int)
    boxes = np.array([box_xyxy(annotations[i]) for i in indices]).reshape(-1, 4)
    boxes = transform.apply_box(boxes).reshape(-1, 4).clip(0, size[::-1] * 2)
    ignored = np.array([roles[i] == "ignore" for i in indices], dtype=bool)
    return _Image(record, size, indices, boxes.astype(np.float32), ignored)


def _locations(rule: _Rule, size: tuple[int, int]) -> Locations:
    """Return the grid over an image of ``size`` (height, width), padded alone."""
    divisor = max(rule.size_divisibility, 1)
    height, width = (-(-side // divisor) * divisor for side in size)
    # Each halving of a feature map rounds up.
    maps = [(-(-height // stride), -(-width // stride)) for stride in rule.strides]
    image_size = (height, width) if rule.location_step == "image" else None
    return compute_locations(maps, rule.strides, offset=rule.location_offset, image_size=image_size)


def _batches(images: Sequence[_Image], rule: _Rule) -> Iterator[tuple[Locations, list[int]]]:
    """Yield the indices of images with objects in groups that share a grid."""
    groups = defaultdict(list)
    for i, image in enumerate(images):
        if len(image.boxes):
            locations = _locations(rule, image.size)
            grid = (*locations.level_sizes, *locations.level_steps)
            groups[grid].append(i)
    for group in groups.values():
        locations = _locations(rule, images[group[0]].size)
        count = max(1, _MAX_LOCATIONS // len(locations.points))
        for start in range(0, len(group), count):
            yield locations, group[start : start + count]


def _count(
    images: Sequence[_Image], locations: Locations, rule: _Rule
) -> tuple[np.ndarray, np.ndarray, int]:
    """Match images that share a grid, with M boxes in all.

    Returns:
        Positives (M, V) and candidates (M,) of each box, 0 for ignored ones, and the number of
        ambiguous locations.
    """
    instances = [_instances(image) for image in images]
    matches = rule.matcher(locations, instances)
    is_trained = ~matches.gt_ignore
    is_positive = (matches.labels >= 0) & (matches.gt_inds >= 0)
    image, point = is_positive.nonzero(as_tuple=True)
    num_levels = len(rule.strides)
    cell = matches.gt_inds[image, point] * num_levels + locations.level_of(point)
    positives = torch.bincount(cell, minlength=len(is_trained) * num_levels)
    candidates = torch.zeros(len(is_trained), dtype=torch.int64)
    candidates[is_trained], claims = rule.matcher.count_candidates(
        locations, [x[~x.gt_ignore] for x in instances]
    )
    return positives.view(-1, num_levels).numpy(), candidates.numpy(), int((claims > 1).sum())


def _instances(image: _Image) -> Instances:
    instances = Instances(image.size)
    instances.gt_boxes = Boxes(torch.from_numpy(image.boxes))
    instances.gt_classes = torch.zeros(len(image.boxes), dtype=torch.int64)
    instances.gt_ignore = torch.from_numpy(image.ignored)
    return instances


def _object_rows(
    image: _Image, rule: _Rule, positives: np.ndarray, candidates: np.ndarray
) -> list[tuple]:
    """Return the rows of an image's trained objects."""
    rows = []
    ends = [end for _, end in rule.matcher.ranges]
    for k in (~image.ignored).nonzero()[0]:
        annotation = image.record["annotations"][image.indices[k]]
        width, height = box_xywh(annotation)[2:]
        scaled = image.boxes[k, 2:] - image.boxes[k, :2]
        total = int(positives[k].sum())
        rows.append(
            (
                image.record["image_id"],
                int(image.indices[k]),
                annotation["category_id"],
                size_of_area([width * height])[0],
                *map(float, scaled),
                total,
                rule.level_names[positives[k].argmax()] if total else "",
                rule.level_names[np.searchsorted(ends, scaled.max() / 2)],
                int(candidates[k]),
            )
        )
    return rows


def _summary(
    objects: pd.DataFrame, group: pd.Series, rows: Sequence[str], name: str
) -> pd.DataFrame:
    """Return coverage and positives of the objects of each group."""
    positives = objects["positives"].astype(float).groupby(group.to_numpy())
    covered = (objects["positives"] > 0).astype(float).groupby(group.to_numpy())
    index = pd.Index(list(rows), name=name)
    return pd.DataFrame(
        {
            "coverage": (100 * covered.mean()).reindex(index),
            "objects": covered.size().reindex(index, fill_value=0).astype(int),
            "positives_mean": positives.mean().reindex(index),
            "positives_median": positives.median().reindex(index),
        },
        index=index,
    )
