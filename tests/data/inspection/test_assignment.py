"""Assignment: hand-computed boxes, plain loops, and the loader and the model itself."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import BoxMode

from fcos_d2.data import DetectionDatasetMapper
from fcos_d2.data.boxes import SIZES
from fcos_d2.data.inspection.assignment import (
    assign_image,
    assignment_table,
    describe_scale,
    summarize_assignment,
    training_resize,
)

CLASSES = ["car", "dog", "cat"]
COLUMNS = ["coverage", "objects", "positives_mean", "positives_median"]


def make_object(box, category=0, **flags):
    return {
        "bbox": [float(x) for x in box],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": category,
        **flags,
    }


def make_record(*objects, image_id="a", size=(64, 64)):
    """Size is (width, height)."""
    objects = [x if isinstance(x, dict) else make_object(x) for x in objects]
    record = {"file_name": f"{image_id}.jpg", "image_id": image_id, "annotations": objects}
    return {**record, "width": size[0], "height": size[1]}


@pytest.fixture
def cfg(tiny_cfg):
    """Images as they are, so that boxes are those of the records."""
    tiny_cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    return tiny_cfg


def test_boxes_by_hand(cfg):
    """An image of 64x64 has P3 locations at 4, 12, 20, ... in x and y.

    16..32 square: centre 24, half-side of the central square 12; locations 20 and 28 are inside the
    box (12 and 36 are not): 2 x 2. All distances are below 64, so P3; on P4, locations 24, distance
    8 to all sides, is below its range (64), and so on.
    9..11 square: no location lies between 9 and 11 (4 and 12 do not): none.
    Wide and flat, 8..56 x 29..35: between 29 and 35 there is no location (28, 36): none.
    """
    record = make_record((16, 16, 32, 32), make_object((9, 9, 11, 11), 1), (8, 29, 56, 35))
    table = assignment_table([record], cfg)
    objects = table.objects
    assert objects["positives"].tolist() == objects["candidates"].tolist() == [4, 0, 0]
    assert objects["level"].tolist() == ["p3", "", ""]
    assert objects["expected_level"].tolist() == ["p3", "p3", "p3"]
    assert objects["category_id"].tolist() == [0, 1, 0]
    assert objects["index"].tolist() == [0, 1, 2]
    assert objects["scaled_width"].tolist() == [16, 2, 48]
    assert objects["scaled_height"].tolist() == [16, 2, 6]
    assert (table.num_locations, table.ambiguous) == (4, 0)
    assert table.levels.index.tolist() == ["p3", "p4", "p5", "p6", "p7"]
    assert table.levels["stride"].tolist() == [8, 16, 32, 64, 128]
    assert table.levels["positives"].tolist() == [4, 0, 0, 0, 0]
    assert table.levels["objects"].tolist() == [1, 0, 0, 0, 0]


def test_the_scale_moves_an_object_to_another_level(cfg):
    """A box of 80x80 at 56..136 in an image of 192: half its side is 40, on P3 (up to 64).

    At a shorter edge of 384 it is 160 wide: half of it is 80, P4 (64 to 128). P4 locations at 8,
    24, ..., the centre 192 +- 24: 184 and 200 in both axes (168 and 216 are 24 away, not less).
    Distances there: 192 - 112 = 80, plus 8: 88 at most. On P3 of 376, 388, ... +- 12 no location
    has all distances up to 64.
    """
    cfg.INPUT.MAX_SIZE_TRAIN = 1333
    record = make_record((56, 56, 136, 136), size=(192, 192))
    assert assignment_table([record], cfg).objects["level"].tolist() == ["p3"]
    (row,) = assignment_table([record], cfg, min_size=384).objects.to_dict("records")
    assert (row["scaled_width"], row["positives"], row["level"]) == (160, 4, "p4")


def test_same_boxes_and_ambiguous_locations(cfg):
    """Of equal boxes the earlier takes all; 4 locations are inside both, 4 inside a third, too.

    The third, 16..40 square, has its centre at 28 and the locations 20, 28, 36 (12 and 44 are
    outside): 9 candidates, of which the 4 of the smaller boxes (20 and 28) are theirs.
    """
    record = make_record((16, 16, 32, 32), (16, 16, 32, 32), (16, 16, 40, 40))
    table = assignment_table([record], cfg)
    assert table.objects["positives"].tolist() == [4, 0, 5]
    assert table.objects["candidates"].tolist() == [4, 4, 9]
    assert (table.ambiguous, table.num_locations) == (4, 9)


def test_objects_that_are_not_trained(cfg):
    box = (16, 16, 32, 32)
    record = make_record(
        make_object(box), make_object(box, difficult=1), make_object((40, 40, 56, 56), iscrowd=1)
    )
    table = assignment_table([record], cfg)
    assert table.objects["index"].tolist() == [0]
    assert (table.num_locations, table.ambiguous) == (4, 0)
    cfg.INPUT.DIFFICULT = "train"
    table = assignment_table([record], cfg)
    assert table.objects["index"].tolist() == [0, 1]
    assert table.objects["positives"].tolist() == [4, 0]
    cfg.INPUT.DIFFICULT = cfg.INPUT.CROWD = "drop"
    assert assign_image(record, cfg).indices.tolist() == [0]


def test_ignored_object_takes_no_location(cfg):
    """A smaller ignored box inside a real one leaves it its locations, but keeps the others.

    The real one, 8..48, has its centre at 28 and 20, 28, 36 in both axes; the ignored one, 8..24,
    12 and 20, of which (20, 20) is the real one's.
    """
    record = make_record((8, 8, 48, 48), make_object((8, 8, 24, 24), difficult=1))
    assert assignment_table([record], cfg).objects["positives"].tolist() == [9]
    image = assign_image(record, cfg)
    assert image.ignored.tolist() == [False, True]
    counts = np.bincount(image.box_of_point, minlength=2)
    assert counts.tolist() == [9, 3]


def test_box_outside_the_image_and_none_at_all(cfg):
    table = assignment_table([make_record((70, 10, 90, 30)), make_record(image_id="b")], cfg)
    assert table.objects["positives"].tolist() == [0]
    table = assignment_table([], cfg)
    assert len(table.objects) == table.num_locations == table.ambiguous == 0
    assert table.levels["positives"].tolist() == [0] * 5
    summary = summarize_assignment(table, CLASSES)
    assert summary["class"]["objects"].tolist() == [0, 0, 0]
    assert summary["class"]["coverage"].isna().all()


def random_records(seed, count=12, most=8):
    """Images of several sizes; integer boxes, so that ends of ranges and equal areas occur."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        width, height = rng.integers(60, 500, 2)
        low = rng.integers(-10, (width, height), (rng.integers(0, most), 2))
        sides = rng.integers(1, 2 ** rng.integers(2, 9, (len(low), 2)))
        boxes = np.concatenate([low, low + sides], axis=1)
        boxes = [*boxes.tolist(), *(boxes + (1, 2, 3, 4)).tolist()]
        objects = [
            make_object(box, int(rng.integers(3)), difficult=int(rng.random() < 0.2))
            for box in boxes
        ]
        records.append(make_record(*objects, image_id=number, size=(int(width), int(height))))
    return records


def loops(record, radius=1.5, strides=(8, 16, 32, 64, 128), bounds=(64, 128, 256, 512)):
    """Candidates and winners of each real box, level by level, and shared locations, one by one."""
    width, height = record["width"], record["height"]
    boxes = []
    for item in record["annotations"]:
        x0, y0, x1, y1 = item["bbox"]
        boxes.append((max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)))
    real = [k for k, item in enumerate(record["annotations"]) if not item["difficult"]]
    candidates, wins, shared = {k: 0 for k in real}, {}, 0
    padded = [math.ceil(side / 32) * 32 for side in (height, width)]
    for level, stride in enumerate(strides):
        low = 0 if level == 0 else bounds[level - 1]
        high = bounds[level] if level < len(bounds) else math.inf
        for i in range(math.ceil(padded[0] / stride)):
            for j in range(math.ceil(padded[1] / stride)):
                x, y = (j + 0.5) * stride, (i + 0.5) * stride
                found = []
                for k in real:
                    x0, y0, x1, y1 = boxes[k]
                    sides = (x - x0, y - y0, x1 - x, y1 - y)
                    near = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2)) < radius * stride
                    if min(sides) > 0 and (near or radius <= 0) and low <= max(sides) <= high:
                        found.append(((x1 - x0) * (y1 - y0), k))
                        candidates[k] += 1
                shared += len(found) > 1
                if found:
                    key = (min(found)[1], level)
                    wins[key] = wins.get(key, 0) + 1
    return candidates, wins, shared


@pytest.mark.parametrize("radius", [1.5, 0.0])
def test_equals_plain_loops(cfg, radius):
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = radius
    records = random_records(seed=3, count=6)
    table = assignment_table(records, cfg)
    shared, levels, row = 0, [0] * 5, 0
    for record in records:
        candidates, wins, more = loops(record, radius)
        shared += more
        for k in candidates:
            mine = [wins.get((k, level), 0) for level in range(5)]
            levels = [a + b for a, b in zip(levels, mine, strict=True)]
            found = table.objects.iloc[row]
            assert (found["image_id"], found["index"]) == (record["image_id"], k)
            assert (found["candidates"], found["positives"]) == (candidates[k], sum(mine))
            name = f"p{3 + mine.index(max(mine))}" if sum(mine) else ""
            assert found["level"] == name
            row += 1
    assert row == len(table.objects) > 20
    assert table.ambiguous == shared > 0
    assert table.levels["positives"].tolist() == levels
    assert table.num_locations == sum(levels)


def test_batches_change_nothing(cfg, monkeypatch):
    records = random_records(seed=5)
    table = assignment_table(records, cfg)
    monkeypatch.setattr("fcos_d2.data.inspection.assignment._MAX_LOCATIONS", 1)
    one_by_one = assignment_table(records, cfg)
    pd.testing.assert_frame_equal(table.objects, one_by_one.objects)
    assert table[2:] == one_by_one[2:]
    again = [np.bincount(assign_image(r, cfg).box_of_point, minlength=20) for r in records]
    for row in table.objects.to_dict("records"):
        assert again[row["image_id"]][row["index"]] == row["positives"]


# As in training


@pytest.mark.parametrize("step", ["stride", "image"])
def test_equals_the_model_in_training(tiny_cfg, step):
    """Boxes from the loader's mapper, grid and matching of the built model, image by image."""
    tiny_cfg.MODEL.FCOS.LOCATION_STEP = step
    tiny_cfg.INPUT.MIN_SIZE_TRAIN = (97,)
    tiny_cfg.INPUT.MAX_SIZE_TRAIN = 150
    tiny_cfg.INPUT.RANDOM_FLIP = "none"
    records = random_records(seed=8, count=5)
    mapper, model = DetectionDatasetMapper(tiny_cfg), build_model(tiny_cfg)
    for record in records:
        # A box outside its image is an error of the data.
        record["annotations"] = [x for x in record["annotations"] if min(x["bbox"][2:]) > 0]
        size = (record["height"], record["width"])
        transform = training_resize(tiny_cfg).get_transform(np.zeros((*size, 3), np.uint8))
        scaled = (transform.new_h, transform.new_w)
        instances = mapper._instances(record["annotations"], [transform], scaled)
        images = model.preprocess_image([{"image": torch.zeros(3, *scaled)}])
        with torch.no_grad():
            features = model.backbone(images.tensor)
            generator = model.proposal_generator
            locations = generator.predict(images, features).locations
        matches = generator.matcher(locations, [instances])
        positive = (matches.labels[0] < 3).nonzero()[:, 0]
        mine = assign_image(record, tiny_cfg)
        assert mine.boxes.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(mine.boxes), matches.gt_boxes)
        assert mine.ignored.tolist() == matches.gt_ignore.tolist()
        assert mine.points.tolist() == locations.points[positive].tolist()
        assert mine.levels.tolist() == locations.level_of(positive).tolist()
        assert mine.box_of_point.tolist() == matches.gt_inds[0, positive].tolist()


@pytest.mark.parametrize(
    ("sizes", "sampling", "middle"),
    [
        ((800,), "choice", 800),
        ((480, 640, 800), "choice", 640),
        ((800, 640, 704, 672), "choice", 672),  # 640, 672, 704, 800: the lower of two
        ((480, 801), "range", 640),
    ],
)
def test_scale_of_the_recipe(cfg, sizes, sampling, middle):
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = sizes, sampling
    cfg.INPUT.MAX_SIZE_TRAIN = 1333
    transform = training_resize(cfg).get_transform(np.zeros((100, 150, 3), np.uint8))
    assert (transform.new_h, transform.new_w) == (middle, round(middle * 1.5))
    assert describe_scale(cfg).startswith(f"shorter edge {middle} px, longer at most 1333")
    transform = training_resize(cfg, 50).get_transform(np.zeros((100, 150, 3), np.uint8))
    assert (transform.new_h, transform.new_w) == (50, 75)
    assert describe_scale(cfg, 50) == "shorter edge 50 px, longer at most 1333"


@pytest.mark.parametrize(
    ("kind", "size", "words"),
    [
        (
            "relative_range",
            [0.6, 0.6],
            "shorter edge 220 px, longer at most 300 (INPUT.MIN_SIZE_TRAIN: 176 of crops of 80% of "
            "the sides on average)",
        ),
        (
            "relative",
            [0.5, 0.5],
            "shorter edge 352 px, longer at most 480 (INPUT.MIN_SIZE_TRAIN: 176 of crops of 50% of "
            "the sides on average)",
        ),
        (
            "absolute",
            [400, 400],
            "shorter edge 176 px, longer at most 240 (INPUT.MIN_SIZE_TRAIN: 176, without crops)",
        ),
    ],
)
def test_scale_of_crops_is_that_of_the_loader(cfg, kind, size, words):
    """The mean scale of 200 draws of the loader's augmentations, within 6 %.

    Shares from 0.6 to 1 have the mean 0.8, and 176 / 0.8 = 220; of the shorter side of a crop the
    mean is a little less than that, and the limit of the longer side holds more often.
    """
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, kind, size
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (176,), 240
    assert describe_scale(cfg) == words
    assert describe_scale(cfg, 50) == "shorter edge 50 px, longer at most 240"
    np.random.seed(0)
    augmentations = DetectionDatasetMapper(cfg, is_train=True).augmentations
    image = np.zeros((375, 500, 3), np.uint8)
    scales = []
    for _ in range(200):
        transforms = T.AugmentationList(augmentations)(T.AugInput(image))
        resize = next(x for x in transforms.transforms if isinstance(x, T.ResizeTransform))
        scales.append(resize.new_h / resize.h)
    expected = training_resize(cfg).get_transform(image).new_h / 375
    assert np.mean(scales) == pytest.approx(expected, rel=0.06)


def test_other_levels(cfg):
    record = make_record((9, 9, 15, 15), (16, 16, 32, 32))
    state = torch.get_rng_state()
    table = assignment_table([record], cfg)
    assert torch.equal(state, torch.get_rng_state())
    assert table.objects["positives"].tolist() == [1, 4]
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FCOS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.FCOS.SIZES_OF_INTEREST = [32, 64, 128]
    table = assignment_table([record], cfg)
    assert table.levels["stride"].tolist() == [4, 8, 16, 32]
    # Locations 10 and 14 of P2 are inside 9..15.
    assert table.objects["positives"].tolist()[0] == 4
    cfg.MODEL.FCOS.SIZES_OF_INTEREST = [64, 128]
    with pytest.raises(ValueError, match="need 3 bounds in MODEL.FCOS.SIZES_OF_INTEREST"):
        assignment_table([record], cfg)


# Summary


def test_summary_by_hand(cfg):
    """Three cars of 16x16 with 4, 4 and, for it equals another, 0; a dog of 2x2 with none.

    Cars: coverage 2 of 3, mean 8 / 3, median 4. All are small: 2 of 4 covered, mean 2, median
    (0 + 4) / 2.
    """
    box = (16, 16, 32, 32)
    records = [
        make_record(box, box, make_object((9, 9, 11, 11), 1)),
        make_record(box, image_id="b"),
    ]
    summary = summarize_assignment(assignment_table(records, cfg), CLASSES)
    assert list(summary) == ["size", "class", "level"]
    assert all(list(table.columns) == COLUMNS for table in summary.values())
    classes = summary["class"]
    assert classes.index.tolist() == CLASSES
    assert classes["objects"].tolist() == [3, 1, 0]
    assert classes.loc["car"].tolist() == pytest.approx([200 / 3, 3, 8 / 3, 4])
    assert classes.loc["dog"].tolist() == [0, 1, 0, 0]
    assert math.isnan(classes.loc["cat", "coverage"])
    assert summary["size"].index.tolist() == list(SIZES)
    assert summary["size"].loc["small"].tolist() == [50, 4, 2, 2]
    assert summary["size"]["objects"].tolist() == [4, 0, 0]
    assert summary["level"].loc["p3"].tolist() == [50, 4, 2, 2]
    assert summary["level"]["objects"].tolist() == [4, 0, 0, 0, 0]
