"""`CenterSamplingMatcher` against plain loops written from the definition."""

import itertools
import math
import random

import pytest
import torch
from detectron2.structures import Boxes, Instances

from benchmark.measure import Job, count_operators, peak_memory_cpu
from fcos_d2.modeling import CenterSamplingMatcher, compute_locations, matcher

STRIDES = [8, 16, 32, 64, 128]
BOUNDS = [64, 128, 256, 512]
NUM_CLASSES = 7


def make_locations(height, width, offset=0.5):
    sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in STRIDES]
    return compute_locations(sizes, STRIDES, offset)


def make_instances(boxes, classes=None, ignore=None, size=(512, 512)):
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    count = len(instances.gt_boxes)
    instances.gt_classes = torch.tensor([0] * count if classes is None else classes).long()
    if ignore is not None:
        instances.gt_ignore = torch.tensor(ignore, dtype=torch.bool)
    return instances


def reference_match(locations, boxes, classes, ignore, radius):
    """Label and box index of each location, straight from the definition, in Python floats."""
    ranges = list(zip([0, *BOUNDS], [*BOUNDS, math.inf], strict=True))
    level_of = [k for k, n in enumerate(locations.level_lengths) for _ in range(n)]
    labels, indices = [], []
    for (x, y), level in zip(locations.points.tolist(), level_of, strict=True):
        candidates = []
        for index, (x0, y0, x1, y1) in enumerate(boxes):
            sides = (x - x0, y - y0, x1 - x, y1 - y)
            half = radius * STRIDES[level] if radius > 0 else math.inf
            center_x, center_y = (x0 + x1) / 2, (y0 + y1) / 2
            low, high = ranges[level]
            if (
                min(sides) > 0
                and max(abs(x - center_x), abs(y - center_y)) < half
                and low <= max(sides) <= high
            ):
                candidates.append((ignore[index], (x1 - x0) * (y1 - y0), index))
        if candidates:
            is_ignored, _, index = min(candidates)
            labels.append(-1 if is_ignored else classes[index])
            indices.append(index)
        else:
            labels.append(NUM_CLASSES)
            indices.append(-1)
    return labels, indices


def random_boxes(rng, count, height, width, fractional):
    """Boxes of all sizes, some reaching out of the image, some equal, some of width 0."""
    boxes = []
    for _ in range(count):
        if boxes and rng.random() < 0.1:
            boxes.append(rng.choice(boxes))
            continue
        w, h = (math.exp(rng.uniform(0, math.log(1.5 * side))) for side in (width, height))
        x, y = rng.uniform(-w / 2, width - w / 2), rng.uniform(-h / 2, height - h / 2)
        box = [x, y, x + w, y + h]
        if not fractional:
            # Multiples of 4 put sides and centres onto locations and bounds, where strictness
            # counts.
            grid = rng.choice([1, 4])
            box = [round(v / grid) * grid for v in box]
        boxes.append(torch.tensor(box, dtype=torch.float32).tolist())
    return boxes


def test_equals_plain_loops_on_200_random_cases():
    """0 to 60 boxes, four image sizes, integer and fractional boxes, radius 0 and 1.5, offsets."""
    rng = random.Random(0)
    settings = itertools.product(
        [(64, 96), (130, 200), (224, 160), (333, 500)], [True, False], [0.0, 1.5], range(13)
    )
    cases = [*settings][:200]
    assert len(cases) == 200
    positives = 0
    for number, ((height, width), fractional, radius, _) in enumerate(cases):
        count = rng.choice([0, 1, 2, 5, 20, 60])
        boxes = random_boxes(rng, count, height, width, fractional)
        classes = [rng.randrange(NUM_CLASSES) for _ in boxes]
        ignore = [rng.random() < 0.2 for _ in boxes]
        locations = make_locations(height, width, offset=0.5 if number % 5 else 0.0)
        matcher = CenterSamplingMatcher(
            num_classes=NUM_CLASSES, radius=radius, sizes_of_interest=BOUNDS
        )
        got = matcher(locations, [make_instances(boxes, classes, ignore)])
        labels, indices = reference_match(locations, boxes, classes, ignore, radius)
        assert got.labels[0].tolist() == labels
        assert got.gt_inds[0].tolist() == indices
        positives += sum(0 <= x < NUM_CLASSES for x in labels)
    assert positives > 5_000  # the cases are not empty


@pytest.mark.parametrize("radius", [0.0, 1.5])
def test_steps_of_the_image_equal_plain_loops(radius):
    """Images that P6 and P7 do not divide, so that their locations are less than a stride apart."""
    rng = random.Random(2)
    matched = [0] * 5
    for height, width in [(416, 480), (352, 544), (288, 160), (96, 736)]:
        sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in STRIDES]
        locations = compute_locations(sizes, STRIDES, 0.0, image_size=(height, width))
        boxes = random_boxes(rng, 30, 2 * height, 2 * width, fractional=False)
        classes = [rng.randrange(NUM_CLASSES) for _ in boxes]
        matcher = CenterSamplingMatcher(
            num_classes=NUM_CLASSES, radius=radius, sizes_of_interest=BOUNDS
        )
        got = matcher(locations, [make_instances(boxes, classes)])
        expected = reference_match(locations, boxes, classes, [False] * 30, radius)
        assert (got.labels[0].tolist(), got.gt_inds[0].tolist()) == expected
        for level, labels in enumerate(got.labels[0].split(locations.level_lengths)):
            matched[level] += (labels < NUM_CLASSES).sum().item()
    assert min(matched) > 0  # every level took part


def test_class_agnostic():
    locations = make_locations(64, 64)
    instances = make_instances([[0, 0, 30, 30], [30, 30, 64, 64]], [2, 6], [False, True])
    matcher = CenterSamplingMatcher(
        num_classes=1, radius=1.5, sizes_of_interest=BOUNDS, class_agnostic=True
    )
    got = matcher(locations, [instances])
    assert (got.labels[got.gt_inds == 0] == 0).all()
    assert (got.labels[got.gt_inds == 1] == -1).all()
    assert (got.labels[got.gt_inds == -1] == 1).all()
    assert instances.gt_classes.tolist() == [2, 6]


@pytest.mark.parametrize("radius", [1.0, 2.5])
def test_other_radii_equal_plain_loops(radius):
    rng = random.Random(1)
    for _ in range(10):
        boxes = random_boxes(rng, 12, 200, 264, fractional=True)
        classes = [rng.randrange(NUM_CLASSES) for _ in boxes]
        locations = make_locations(200, 264)
        matcher = CenterSamplingMatcher(
            num_classes=NUM_CLASSES, radius=radius, sizes_of_interest=BOUNDS
        )
        got = matcher(locations, [make_instances(boxes, classes)])
        expected = reference_match(locations, boxes, classes, [False] * 12, radius)
        assert (got.labels[0].tolist(), got.gt_inds[0].tolist()) == expected


@pytest.mark.parametrize("radius", [0.0, 1.5])
def test_a_batch_equals_its_images(radius):
    """Images with many, no and one box: indices go on from image to image."""
    rng = random.Random(2)
    images = [make_instances(random_boxes(rng, n, 224, 160, True)) for n in (30, 0, 1, 8)]
    locations = make_locations(224, 160)
    matcher = CenterSamplingMatcher(
        num_classes=NUM_CLASSES, radius=radius, sizes_of_interest=BOUNDS
    )
    batch = matcher(locations, images)
    start = 0
    for row, image in enumerate(images):
        alone = matcher(locations, [image])
        assert torch.equal(batch.labels[row], alone.labels[0])
        own = alone.gt_inds[0]
        assert torch.equal(batch.gt_inds[row], torch.where(own >= 0, own + start, own))
        start += len(image)
    assert len(batch.gt_boxes) == start


def test_no_box_in_the_batch_is_all_background():
    matches = CenterSamplingMatcher(num_classes=2, radius=1.5, sizes_of_interest=BOUNDS)(
        make_locations(64, 64), [make_instances([]), make_instances([])]
    )
    assert (matches.labels == 2).all() and (matches.gt_inds == -1).all()
    assert matches.gt_boxes.shape == (0, 4)


def test_a_16_px_box_gets_4_locations():
    """Box 8..24 x 8..24 on P3 (stride 8, half-side 12): locations at 12 and 20 in x and in y.

    On P4 (stride 16) the location (8, 8) is on the box's corner, not strictly inside, (24, 24) too.
    """
    matcher = CenterSamplingMatcher(num_classes=1, radius=1.5, sizes_of_interest=BOUNDS)
    locations = make_locations(64, 64)
    matches = matcher(locations, [make_instances([[8, 8, 24, 24]])])
    points = locations.points[matches.labels[0] == 0]
    assert sorted(points.tolist()) == [[12, 12], [12, 20], [20, 12], [20, 20]]


def test_both_ends_of_a_range_are_included():
    """Box 0..68 x 0..68: at P3's location (4, 36), max(l, t, r, b) is 68 - 4 = 64, P3's bound.

    P3 takes it, and P4 takes locations from 64 on. (Radius 0, so that only the range decides.)
    """
    matcher = CenterSamplingMatcher(num_classes=1, radius=0, sizes_of_interest=BOUNDS)
    locations = make_locations(80, 80)
    labels = matcher(locations, [make_instances([[0, 0, 68, 68]])]).labels[0]
    on_p3 = (locations.points == torch.tensor([4.0, 36.0])).all(1) & (locations.strides == 8)
    assert labels[on_p3].tolist() == [0]
    # On P4 the location (8, 40) has r = 60: below the range.
    on_p4 = (locations.points == torch.tensor([8.0, 40.0])).all(1) & (locations.strides == 16)
    assert labels[on_p4].tolist() == [1]


def test_area_is_exact():
    """Areas 16 * 16 = 256 and 15.8 * 16 = 252.8: both ~1e8 in float32 when taken from 1e8."""
    matcher = CenterSamplingMatcher(num_classes=1, radius=1.5, sizes_of_interest=BOUNDS)
    matches = matcher(make_locations(64, 64), [make_instances([[8, 8, 24, 24], [8, 8, 23.8, 24]])])
    assert set(matches.gt_inds.unique().tolist()) == {-1, 1}


def test_of_equal_areas_the_earlier_box_wins():
    matcher = CenterSamplingMatcher(num_classes=2, radius=1.5, sizes_of_interest=BOUNDS)
    boxes = [[8, 8, 24, 24], [8, 8, 24, 24]]
    matches = matcher(make_locations(64, 64), [make_instances(boxes, [1, 0])])
    assert set(matches.gt_inds.unique().tolist()) == {-1, 0}
    assert set(matches.labels.unique().tolist()) == {2, 1}


def test_an_ignored_box_yields_to_any_other():
    """The ignored box is smaller, and still the larger one keeps the location (12, 12).

    On P3 the box 0..40 claims 12, 20 and 28 in x and y, the ignored box 0..16 claims 4 and 12.
    """
    matcher = CenterSamplingMatcher(num_classes=1, radius=1.5, sizes_of_interest=BOUNDS)
    large, small = [[0, 0, 40, 40]], [[0, 0, 16, 16]]
    locations = make_locations(64, 64)
    alone = matcher(locations, [make_instances(large)])
    both = matcher(locations, [make_instances(large + small, ignore=[False, True])])
    assert torch.equal(both.labels == 0, alone.labels == 0)
    ignored = locations.points[both.labels[0] == -1].tolist()
    assert sorted(ignored) == [[4, 4], [4, 12], [12, 4]]


def test_bounds_have_to_increase():
    with pytest.raises(ValueError, match="SIZES_OF_INTEREST.*increasing"):
        CenterSamplingMatcher(num_classes=1, radius=1.5, sizes_of_interest=[64, 64])


@pytest.mark.parametrize("radius", [0.0, 1.5, 40.0])
@pytest.mark.parametrize("pairs", [1, 100, 4000])
def test_chunks_change_nothing(radius, pairs, monkeypatch):
    """A pair, a few boxes and rows, or many of them at a time."""
    rng = random.Random(5)
    images = [make_instances(random_boxes(rng, n, 160, 224, True)) for n in (7, 0, 5)]
    locations = make_locations(160, 224)
    matcher_of_all = CenterSamplingMatcher(
        num_classes=NUM_CLASSES, radius=radius, sizes_of_interest=BOUNDS
    )
    expected = matcher_of_all(locations, images)
    monkeypatch.setattr(matcher, "_MAX_PAIRS", pairs)
    got = matcher_of_all(locations, images)
    assert (expected.gt_inds >= 0).any()
    assert torch.equal(got.labels, expected.labels)
    assert torch.equal(got.gt_inds, expected.gt_inds)


def many_boxes(count, height, width):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    boxes = torch.cat((corner, corner + 400 * torch.rand(count, 2, generator=generator)), 1)
    return make_instances(boxes.tolist())


@pytest.mark.parametrize("strides, bounds", [(STRIDES, BOUNDS), ([4], [])])
def test_memory_of_whole_boxes_is_bounded(strides, bounds):
    """Below 64 MiB beside what is returned (16 bytes a location), whatever comes.

    With all levels the windows are bounded by the ranges; with one level each box can claim all
    512 x 2048 cells of an image of 2048 x 8192. 3000 boxes would have 3e9 pairs.
    """
    height, width = (2048, 8192) if len(strides) == 1 else (1024, 2048)
    sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in strides]
    locations = compute_locations(sizes, strides)
    gt = [many_boxes(3000 if len(strides) > 1 else 3, height, width)]
    match = CenterSamplingMatcher(num_classes=1, radius=0, sizes_of_interest=bounds)
    returned = 16 * len(locations.points)
    assert peak_memory_cpu(Job("match", lambda: match(locations, gt))) - returned < 64 * 2**20


def test_memory_grows_with_the_boxes_and_not_with_boxes_times_locations():
    """4 images of 800 x 1333 with 200 boxes: 18 million pairs would take 18 MiB as bits alone.

    What is returned, twice 4 x 22,300 int64, is 1.4 MiB of the peak.
    """
    locations = make_locations(800, 1333)
    gt = [many_boxes(200, 800, 1333) for _ in range(4)]
    match = CenterSamplingMatcher(num_classes=1, radius=1.5, sizes_of_interest=BOUNDS)
    assert peak_memory_cpu(Job("match", lambda: match(locations, gt))) < 8 * 2**20


@pytest.mark.parametrize("radius", [0.0, 1.5])
def test_nothing_waits_for_the_device(radius):
    locations = make_locations(128, 160)
    gt = [many_boxes(20, 128, 160) for _ in range(2)]
    match = CenterSamplingMatcher(num_classes=1, radius=radius, sizes_of_interest=BOUNDS)
    syncs, kernels = count_operators(Job("match", lambda: match(locations, gt)))
    assert syncs == 0
    # As many for more boxes and larger images, and two more for each image.
    locations = make_locations(512, 512)
    gt = [many_boxes(50, 512, 512) for _ in range(4)]
    assert count_operators(Job("match", lambda: match(locations, gt))) == (0, kernels + 4)


def test_the_geometry_of_each_grid_is_its_own():
    """One matcher on grids of other sizes, strides and steps, one after the other and again."""
    match = CenterSamplingMatcher(num_classes=1, radius=1.5, sizes_of_interest=[64])
    gt = [make_instances([[3, 5, 60, 50]])]
    grids = [
        compute_locations([(8, 8), (4, 4)], [8, 16]),
        compute_locations([(8, 8), (4, 4)], [16, 32]),
        compute_locations([(8, 8), (4, 4)], [8, 16], image_size=(56, 56)),
        compute_locations([(8, 8), (4, 4)], [8, 16], offset=0.0),
        compute_locations([(16, 8), (8, 4)], [8, 16]),
    ]
    for grid in [*grids, *grids]:
        fresh = CenterSamplingMatcher(num_classes=1, radius=1.5, sizes_of_interest=[64])
        assert torch.equal(match(grid, gt).gt_inds, fresh(grid, gt).gt_inds)
