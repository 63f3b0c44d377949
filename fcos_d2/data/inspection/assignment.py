"""Which objects get training locations, how many, and on which level: the matcher's own answer.

An object without a location (1 - BPR, the best possible recall of the FCOS paper, section 4.1) is
one that the model never learns, whatever the schedule. It depends on the boxes, the scale of the
images and the levels alone, so it is known before any training.
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
from ..boxes import SIZES, box_xywh, size_of_area
from ..dataset_mapper import training_role

# Locations matched at a time.
_MAX_LOCATIONS = 1 << 21


class Assignment(NamedTuple):
    """What the matcher gives the objects of a data set at one scale of its images.

    Attributes:
        objects: one row an object that is trained (not ignored, not dropped), in the order of the
            records: ``image_id``; ``index`` in the record's annotations; ``category_id``; ``size``
            ("small", "medium", "large" by the area in the original image, COCO's bounds);
            ``scaled_width``, ``scaled_height`` in pixels of the network's input; ``positives``,
            the locations that learn it; ``level``, the one with most of them ("" without any);
            ``expected_level``, the one whose range holds half the longer side, the distance from
            the centre; ``candidates``, the locations that pass the test for it, those that a
            smaller object takes away included.
        levels: one row a level, finest first: ``stride``, ``positives``, and ``objects``, those
            with most of their locations there.
        ambiguous: locations that pass the test for more than one object.
        num_locations: locations that learn an object.
        image_scale: how the images are resized, in words.
    """

    objects: pd.DataFrame
    levels: pd.DataFrame
    ambiguous: int
    num_locations: int
    image_scale: str


class ImageAssignment(NamedTuple):
    """The locations that learn something in one image.

    Attributes:
        boxes: (M, 4) XYXY pixels of the network's input, clipped to the image; what is dropped
            in training is left out.
        indices: (M,) place of each box in the record's annotations.
        ignored: (M,) bool.
        points: (P, 2) locations (x, y) in pixels of the network's input.
        levels: (P,) level of each location, 0 for the finest.
        box_of_point: (P,) row in ``boxes``; it may be an ignored one.
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
    """What of a model decides about its training locations."""

    level_names: list[str]
    strides: list[int]
    matcher: CenterSamplingMatcher
    location_offset: float
    location_step: str
    size_divisibility: int


class _Image(NamedTuple):
    """The objects of one record at the network's scale."""

    record: dict
    size: tuple[int, int]  # (height, width) after resizing
    indices: np.ndarray  # (M,) in the record's annotations
    boxes: np.ndarray  # (M, 4) float32
    ignored: np.ndarray  # (M,) bool


def assignment_table(
    records: Sequence[dict], cfg: CfgNode, *, min_size: int | None = None
) -> Assignment:
    """Match the objects of a data set to locations, as training with ``cfg`` would.

    Images are not read: ``width`` and ``height`` of the records are enough. They are resized as
    :func:`training_resize` says, each padded alone; flips are left out, and of crops what they cut
    off.

    Args:
        records: Detectron2 dataset dicts; boxes that are wholly outside their image or have no
            area count as objects without a location.
        cfg: a recipe; DATASETS is not looked at.
        min_size: length of the shorter edge in pixels; None takes the recipe's.

    Raises:
        ValueError: the recipe's levels don't fit together.
    """
    rule = _rule_of(cfg)
    resize = training_resize(cfg, min_size)
    images = [_scale(record, cfg, resize) for record in records]
    positives, candidates, ambiguous = _count_locations(images, rule)
    objects = _object_table(images, rule, positives, candidates)
    per_level = np.concatenate(positives or [np.zeros((0, len(rule.strides)), int)])
    levels = pd.DataFrame(
        {
            "stride": rule.strides,
            "positives": per_level.sum(0),
            "objects": [int((objects["level"] == name).sum()) for name in rule.level_names],
        },
        index=pd.Index(rule.level_names, name="level"),
    )
    scale = describe_scale(cfg, min_size)
    return Assignment(objects, levels, ambiguous, int(per_level.sum()), scale)


def summarize_assignment(
    assignment: Assignment, class_names: Sequence[str]
) -> dict[str, pd.DataFrame]:
    """Summarize the objects of each size, class and level.

    Returns:
        Under "size", "class" and "level" a table with a row for each: ``coverage`` (percent of the
        objects with a location, nan without objects), ``objects``, ``positives_mean`` and
        ``positives_median`` (locations an object). An object counts for the level whose range
        holds half its longer side, whether it got a location or not.
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
    box, place = _match([image], locations, rule, with_ignored=True)
    return ImageAssignment(
        image.boxes,
        image.indices,
        image.ignored,
        locations.points[place].numpy(),
        locations.level_of(place).numpy(),
        box.numpy(),
        rule.level_names,
        rule.strides,
    )


def training_resize(cfg: CfgNode, min_size: int | None = None) -> T.ResizeShortestEdge:
    """Return the loader's resizing with one size: ``min_size``, or what suits the recipe.

    That is the middle of INPUT.MIN_SIZE_TRAIN, of an even number of sizes the lower of two. Where
    crops are resized to it, objects come out as large as if whole images were resized to it over
    the share that is cropped, on average (INPUT.CROP.TYPE "relative" or "relative_range").
    """
    size, max_size = _network_size(cfg, min_size)
    return T.ResizeShortestEdge(size, max_size, "choice")


def describe_scale(cfg: CfgNode, min_size: int | None = None) -> str:
    """Say in words what :func:`training_resize` does."""
    size, max_size = _network_size(cfg, min_size)
    if size == 0:
        return "images as they are"
    text = f"shorter edge {size} px, longer at most {max_size}"
    sizes = sorted(set(cfg.INPUT.MIN_SIZE_TRAIN))
    if min_size is not None or (len(sizes) == 1 and not cfg.INPUT.CROP.ENABLED):
        return text
    span = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
    share = _crop_share(cfg)
    crops = f" of crops of {share:.0%} of the sides on average" if share else ", crops left out"
    return f"{text} (INPUT.MIN_SIZE_TRAIN: {span}{crops if cfg.INPUT.CROP.ENABLED else ''})"


def _network_size(cfg: CfgNode, min_size: int | None) -> tuple[int, int]:
    """Return the shorter edge in the network and the limit of the longer one."""
    if min_size is not None:
        return min_size, cfg.INPUT.MAX_SIZE_TRAIN
    share = _crop_share(cfg) or 1
    return round(_middle_size(cfg) / share), round(cfg.INPUT.MAX_SIZE_TRAIN / share)


def _crop_share(cfg: CfgNode) -> float | None:
    """Return the mean share of the sides that is cropped; None without such crops."""
    crop = cfg.INPUT.CROP
    if not crop.ENABLED or not crop.TYPE.startswith("relative"):
        return None
    share = sum(crop.SIZE) / 2
    return (share + 1) / 2 if crop.TYPE == "relative_range" else share


def _middle_size(cfg: CfgNode) -> int:
    sizes = sorted(cfg.INPUT.MIN_SIZE_TRAIN)
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        return (sizes[0] + sizes[-1]) // 2
    return sizes[(len(sizes) - 1) // 2]


# Rules by the text of cfg.MODEL: a backbone takes a second to build, and pictures ask one by one.
_RULES: dict[str, _Rule] = {}


def _rule_of(cfg: CfgNode) -> _Rule:
    """Build the recipe's parts as training does, on the CPU, and keep those without weights."""
    key = cfg.MODEL.dump()
    if key not in _RULES:
        cfg = cfg.clone()
        cfg.defrost()
        # The locations of an object don't depend on the classes, which may not be known.
        cfg.MODEL.FCOS.NUM_CLASSES = -1
        cfg.MODEL.FCOS.CLASS_AGNOSTIC = True
        cfg.MODEL.DEVICE = "cpu"
        with torch.random.fork_rng(devices=[]):  # weights are drawn, to no purpose
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
    """Resize the boxes of a record, as the loader does."""
    height, width = record["height"], record["width"]
    # It looks at the size alone.
    transform = resize.get_transform(np.broadcast_to(np.uint8(0), (height, width, 3)))
    size = (getattr(transform, "new_h", height), getattr(transform, "new_w", width))
    roles = [
        training_role(x, cfg.INPUT.DIFFICULT, cfg.INPUT.CROWD)
        for x in record.get("annotations", ())
    ]
    indices = np.array([i for i, role in enumerate(roles) if role != "drop"], dtype=int)
    boxes = np.array([box_xywh(record["annotations"][i]) for i in indices]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = transform.apply_box(boxes).reshape(-1, 4).clip(0, size[::-1] * 2)
    ignored = np.array([roles[i] == "ignore" for i in indices], dtype=bool)
    return _Image(record, size, indices, boxes.astype(np.float32), ignored)


def _locations(rule: _Rule, size: tuple[int, int]) -> Locations:
    """Return the grid over an image of ``size`` (height, width), padded alone."""
    divisor = max(rule.size_divisibility, 1)
    padded = tuple(-(-side // divisor) * divisor for side in size)
    # Each halving of a feature map rounds up.
    maps = [tuple(-(-side // stride) for side in padded) for stride in rule.strides]
    image_size = padded if rule.location_step == "image" else None
    return compute_locations(maps, rule.strides, offset=rule.location_offset, image_size=image_size)


def _batches(
    images: Sequence[_Image], rule: _Rule
) -> Iterator[tuple[Locations, list[tuple[int, _Image]]]]:
    """Yield images that share a grid, with their numbers; those without objects are left out."""
    groups = defaultdict(list)
    for number, image in enumerate(images):
        if len(image.boxes):
            locations = _locations(rule, image.size)
            key = (*locations.level_sizes, *locations.level_steps)
            groups[key].append((number, image))
    for group in groups.values():
        locations = _locations(rule, group[0][1].size)
        count = max(1, _MAX_LOCATIONS // len(locations.points))
        for start in range(0, len(group), count):
            yield locations, group[start : start + count]


def _count_locations(
    images: Sequence[_Image], rule: _Rule
) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Count for each box of each image its positives (M, V) and its candidates (M,).

    Returns:
        Both, and the number of ambiguous locations in all images.
    """
    num_levels = len(rule.strides)
    positives = [np.zeros((len(x.boxes), num_levels), dtype=int) for x in images]
    candidates = [np.zeros(len(x.boxes), dtype=int) for x in images]
    ambiguous = 0
    with tqdm(total=len(images), desc="Matching", delay=3, disable=None) as progress:
        for locations, batch in _batches(images, rule):
            chosen = [image for _, image in batch]
            box, place = _match(chosen, locations, rule)
            ends = np.cumsum([len(image.boxes) for image in chosen])
            cell = box * num_levels + locations.level_of(place)
            totals = torch.bincount(cell, minlength=int(ends[-1]) * num_levels)
            counts = np.split(totals.view(-1, num_levels).numpy(), ends[:-1])
            trained = [_instances(image, ~image.ignored) for image in chosen]
            passed, claims = rule.matcher.count_candidates(locations, trained)
            ambiguous += int((claims > 1).sum())
            passed = passed.split([len(x) for x in trained])
            for (number, image), count, tested in zip(batch, counts, passed, strict=True):
                positives[number] = count
                candidates[number][~image.ignored] = tested.numpy()
            progress.update(len(batch))
    return positives, candidates, ambiguous


def _match(
    images: Sequence[_Image], locations: Locations, rule: _Rule, with_ignored: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positive locations of images: box, counted over all images, and place in grid."""
    matches = rule.matcher(locations, [_instances(image) for image in images])
    positive = matches.labels < rule.matcher.num_classes
    if not with_ignored:
        positive &= matches.labels >= 0
    image, place = positive.nonzero(as_tuple=True)
    return matches.gt_inds[image, place], place


def _instances(image: _Image, chosen: np.ndarray | slice = slice(None)) -> Instances:
    """Return the chosen objects of an image in the form that the matcher takes."""
    instances = Instances(image.size)
    instances.gt_boxes = Boxes(torch.from_numpy(image.boxes[chosen]))
    instances.gt_classes = torch.zeros(len(instances), dtype=torch.int64)
    instances.gt_ignore = torch.from_numpy(image.ignored[chosen])
    return instances


def _object_table(
    images: Sequence[_Image],
    rule: _Rule,
    positives: Sequence[np.ndarray],
    candidates: Sequence[np.ndarray],
) -> pd.DataFrame:
    """One row an object that is trained."""
    rows = []
    for image, counts, passed in zip(images, positives, candidates, strict=True):
        sides = image.boxes[:, 2:] - image.boxes[:, :2]
        for k in (~image.ignored).nonzero()[0]:
            annotation = image.record["annotations"][image.indices[k]]
            width, height = box_xywh(annotation)[2:]
            total = int(counts[k].sum())
            rows.append(
                {
                    "image_id": image.record["image_id"],
                    "index": int(image.indices[k]),
                    "category_id": annotation["category_id"],
                    "size": size_of_area([width * height])[0],
                    "scaled_width": float(sides[k, 0]),
                    "scaled_height": float(sides[k, 1]),
                    "positives": total,
                    "level": rule.level_names[counts[k].argmax()] if total else "",
                    "expected_level": rule.level_names[_expected_level(sides[k], rule)],
                    "candidates": int(passed[k]),
                }
            )
    columns = ["image_id", "index", "category_id", "size", "scaled_width", "scaled_height"]
    columns += ["positives", "level", "expected_level", "candidates"]
    return pd.DataFrame(rows, columns=columns)


def _expected_level(sides: np.ndarray, rule: _Rule) -> int:
    """Return the finest level whose range holds half the longer side."""
    ends = [end for _, end in rule.matcher.ranges]
    return int(np.searchsorted(ends, sides.max() / 2))


def _summary(
    objects: pd.DataFrame, group: pd.Series, rows: Sequence[str], name: str
) -> pd.DataFrame:
    """Coverage and positives of the objects of each group."""
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
