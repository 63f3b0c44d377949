"""`FCOSDecoder` against a plain version, and as the inverse of the targets."""

import math

import pytest
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torchvision.ops import nms

from benchmark.measure import Job, count_operators
from fcos_d2.modeling import CenterSamplingMatcher, FCOSDecoder, compute_locations
from fcos_d2.modeling.decoder import decode_boxes, encode_boxes, nms_by_class

STRIDES = [8, 16, 32]


def make_locations(height, width):
    sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in STRIDES]
    return compute_locations(sizes, STRIDES)


def reference_decode(
    locations,
    logits,
    ltrb,
    centerness,
    size,
    *,
    thresh,
    topk,
    nms_thresh,
    best,
    report="sqrt",
    thresh_on="score",
    topk_on="score",
    clip_first=True,
):
    """One image, level by level and class by class, straight from the definition."""
    num_classes = logits.shape[1]
    candidates = []
    start = 0
    for length in locations.level_lengths:
        level = []
        for place in range(start, start + length):
            for label in range(num_classes):
                cls = torch.sigmoid(logits[place, label]).item()
                product = cls * torch.sigmoid(centerness[place]).item()
                score = product**0.5 if report == "sqrt" else product
                if (score if thresh_on == "score" else cls) > thresh:
                    level.append((score if topk_on == "score" else cls, score, place, label))
        candidates += sorted(level, key=lambda c: -c[0])[:topk]
        start += length
    rows = []
    for _, score, place, label in candidates:
        x, y = locations.points[place].tolist()
        sides = (ltrb[place] * locations.strides[place]).tolist()
        box = [x - sides[0], y - sides[1], x + sides[2], y + sides[3]]
        if clip_first:
            box = clip(box, size)
        if not clip_first or (box[2] > box[0] and box[3] > box[1]):
            rows.append([*box, score, label])
    rows = torch.tensor(rows).reshape(-1, 6)
    kept = []
    for label in range(num_classes):
        own = rows[rows[:, 5] == label]
        kept.append(own[nms(own[:, :4], own[:, 4], nms_thresh)])
    kept = torch.cat(kept)
    kept = kept[kept[:, 4].argsort(descending=True, stable=True)][:best]
    clipped = torch.tensor([[*clip(row[:4], size), *row[4:]] for row in kept.tolist()])
    clipped = clipped.reshape(-1, 6)
    return clipped[(clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])]


def clip(box, size):
    height, width = size
    return [min(max(v, 0), limit) for v, limit in zip(box, (width, height) * 2, strict=True)]


def rows_of(instances):
    return torch.cat(
        (
            instances.pred_boxes.tensor,
            instances.scores[:, None],
            instances.pred_classes[:, None].float(),
        ),
        dim=1,
    )


@pytest.mark.parametrize("num_classes", [1, 4])
@pytest.mark.parametrize("thresh, topk, best", [(0.05, 1000, 100), (0.3, 40, 10), (0.6, 5, 100)])
def test_equals_the_plain_version(num_classes, thresh, topk, best):
    """Three images of one batch, two of them smaller than the padded input."""
    locations = make_locations(100, 132)
    sizes = [(100, 132), (77, 132), (100, 90)]
    count = len(locations.points)
    logits = 2 * torch.randn(3, count, num_classes) - 2
    centerness = torch.randn(3, count)
    ltrb = 4 * torch.rand(3, count, 4) - 0.5
    ltrb = ltrb.clamp(min=0)
    decoder = FCOSDecoder(
        score_thresh=thresh, topk_candidates=topk, nms_thresh=0.5, max_detections=best
    )
    inputs = [x.clone() for x in (logits, ltrb, centerness)]
    results = decoder(locations, logits, ltrb, centerness, sizes)
    for before, after in zip(inputs, (logits, ltrb, centerness), strict=True):
        assert torch.equal(before, after)
    for index, size in enumerate(sizes):
        expected = reference_decode(
            locations,
            logits[index],
            ltrb[index],
            centerness[index],
            size,
            thresh=thresh,
            topk=topk,
            nms_thresh=0.5,
            best=best,
        )
        assert results[index].image_size == size
        torch.testing.assert_close(rows_of(results[index]), expected, rtol=1e-5, atol=1e-4)


# The rules of torchvision, Detectron2, AdelaiDet and mmdet, and one more.
RULES = {
    "torchvision": ("sqrt", "score", "score", True),
    "Detectron2": ("sqrt", "score", "score", False),
    "AdelaiDet": ("sqrt", "cls", "score", False),
    "mmdet": ("product", "cls", "cls", True),
    "other": ("product", "score", "cls", True),
}


def random_predictions():
    """One image of 90 x 120 padded to 100 x 132, 3 classes."""
    generator = torch.Generator().manual_seed(3)
    locations = make_locations(100, 132)
    count = len(locations.points)
    logits = 2 * torch.randn(1, count, 3, generator=generator) - 3
    quality = 2 * torch.randn(1, count, generator=generator)
    return locations, logits, 4 * torch.rand(1, count, 4, generator=generator), quality, [(90, 120)]


def decode_by_rule(name):
    """Few enough candidates a level are kept, 30, that what they are ranked by matters."""
    report, thresh_on, topk_on, clip_first = RULES[name]
    decoder = FCOSDecoder(
        score=report,
        score_thresh=0.5,
        score_thresh_on=thresh_on,
        topk_candidates=30,
        topk_on=topk_on,
        nms_thresh=0.5,
        max_detections=100,
        clip_before_nms=clip_first,
    )
    return rows_of(decoder(*random_predictions())[0])


@pytest.mark.parametrize("name", RULES)
def test_score_rules_equal_the_plain_version(name):
    report, thresh_on, topk_on, clip_first = RULES[name]
    locations, logits, ltrb, quality, (size,) = random_predictions()
    expected = reference_decode(
        locations,
        logits[0],
        ltrb[0],
        quality[0],
        size,
        thresh=0.5,
        topk=30,
        nms_thresh=0.5,
        best=100,
        report=report,
        thresh_on=thresh_on,
        topk_on=topk_on,
        clip_first=clip_first,
    )
    assert len(expected) > 10
    torch.testing.assert_close(decode_by_rule(name), expected, rtol=1e-5, atol=1e-4)


def test_score_rules_differ():
    """The rules keep different detections, so the test above can tell them apart."""
    found = {tuple(decode_by_rule(name).flatten().tolist()) for name in RULES}
    assert len(found) == len(RULES)


def test_boxes_of_other_classes_and_images_do_not_meet():
    """Boxes far out of the image, not clipped before NMS.

    Moved apart by the largest coordinate + 1, 1001, the box (-880, -880, 20, 20) of class 1 would
    lie on the box (100, 100, 1000, 1000) of class 0, at IoU 0.91.
    """
    locations = compute_locations([(16, 16)], [8])

    def decode(num_images, *found):
        logits = torch.full((num_images, 256, 3), -9.0)
        ltrb = torch.zeros(num_images, 256, 4)
        for image, place, label, logit, sides in found:
            logits[image, place, label] = logit
            ltrb[image, place] = torch.tensor(sides) / 8
        decoder = FCOSDecoder(clip_before_nms=False)
        quality = torch.full((num_images, 256), 9.0)
        results = decoder(locations, logits, ltrb, quality, [(128, 128)] * num_images)
        return [len(x) for x in results]

    high, low = [20.0, 20, 880, 880], [884.0, 884, 16, 16]
    assert decode(1, (0, 255, 0, 3.0, high), (0, 0, 1, 2.0, low)) == [2]
    assert decode(2, (0, 255, 2, 3.0, high), (1, 0, 0, 2.0, low)) == [1, 1]


def test_without_quality_the_score_is_the_class_probability():
    locations = compute_locations([(1, 1)], [8])
    logits = torch.tensor(0.3).logit().view(1, 1, 1)
    (result,) = FCOSDecoder()(locations, logits, torch.full((1, 1, 4), 0.4), None, [(8, 8)])
    assert result.scores.tolist() == pytest.approx([0.3], abs=1e-6)


def test_numbers_that_are_not_finite_are_no_candidates():
    locations = compute_locations([(1, 3)], [8])
    logits = torch.tensor([math.nan, 3.0, 3.0]).view(1, 3, 1)
    quality = torch.tensor([[3.0, math.nan, 3.0]])
    (result,) = FCOSDecoder()(locations, logits, torch.full((1, 3, 4), 0.4), quality, [(8, 24)])
    assert len(result) == 1
    assert result.pred_boxes.get_centers().tolist() == [[20, 4]]


def test_options_that_are_not_known():
    for key in ("score", "score_thresh_on", "topk_on"):
        with pytest.raises(ValueError, match=f"MODEL.FCOS.{key.upper()} is 'x'"):
            FCOSDecoder(**{key: "x"})


def test_perfect_predictions_give_back_every_covered_box():
    """Targets of the matcher, put in as predictions, come out as the boxes, at IoU over 0.99."""
    generator = torch.Generator().manual_seed(0)
    covered_boxes = 0
    for _ in range(20):
        size = (256, 320)
        corner = torch.rand(12, 2, generator=generator) * torch.tensor([280.0, 220])
        extent = 6 + torch.rand(12, 2, generator=generator) * 120
        boxes = torch.cat((corner, corner + extent), dim=1)
        boxes = boxes.minimum(torch.tensor([320.0, 256, 320, 256]))
        gt = Instances(size, gt_boxes=Boxes(boxes), gt_classes=torch.arange(12) % 5)
        locations = make_locations(*size)
        matches = CenterSamplingMatcher(num_classes=5, radius=1.5, sizes_of_interest=[64, 128])(
            locations, [gt]
        )
        logits = torch.full((1, len(locations.points), 5), -20.0)
        ltrb = torch.zeros(1, len(locations.points), 4)
        place = (matches.labels[0] < 5).nonzero().squeeze(1)
        matched = matches.gt_inds[0, place]
        logits[0, place, matches.labels[0, place]] = 5.0
        ltrb[0, place] = encode_boxes(
            locations.points[place], locations.strides[place], matches.gt_boxes[matched]
        )
        centerness = torch.zeros(1, len(locations.points))
        # Equal boxes of one class suppress each other, others must not.
        decoder = FCOSDecoder(nms_thresh=0.999)
        (result,) = decoder(locations, logits, ltrb, centerness, [size])
        iou = pairwise_iou(gt.gt_boxes, result.pred_boxes)
        iou[gt.gt_classes[:, None] != result.pred_classes] = 0
        covered = matched.unique()
        assert (iou[covered].max(dim=1).values > 0.99).all()
        covered_boxes += len(covered)
    assert covered_boxes > 150


def test_decode_inverts_encode():
    points = torch.rand(50, 2) * 100
    strides = torch.tensor([8.0, 16.0]).repeat(25)
    boxes = torch.cat((points - 30 * torch.rand(50, 2), points + 30 * torch.rand(50, 2)), dim=1)
    again = decode_boxes(points, strides, encode_boxes(points, strides, boxes))
    torch.testing.assert_close(again, boxes, rtol=1e-5, atol=1e-4)


def test_nothing_above_the_threshold_has_every_field():
    locations = make_locations(32, 32)
    count = len(locations.points)
    results = FCOSDecoder()(
        locations,
        torch.full((2, count, 3), -20.0),
        torch.ones(2, count, 4),
        torch.zeros(2, count),
        [(32, 32), (32, 30)],
    )
    for result in results:
        assert len(result) == 0
        assert result.pred_boxes.tensor.shape == (0, 4)
        assert result.scores.shape == result.pred_classes.shape == (0,)


def test_threshold_is_on_the_reported_score():
    """Class 0.09, centerness 1: the score is sqrt(0.09) = 0.3, above 0.29 and not above 0.31."""
    locations = compute_locations([(1, 1)], [8])
    logits = torch.tensor(0.09).logit().view(1, 1, 1)
    inputs = (locations, logits, torch.full((1, 1, 4), 0.4), torch.full((1, 1), 40.0), [(8, 8)])
    (kept,) = FCOSDecoder(score_thresh=0.29)(*inputs)
    assert kept.scores.tolist() == pytest.approx([0.3], abs=1e-6)
    assert len(FCOSDecoder(score_thresh=0.31)(*inputs)[0]) == 0


def test_ties_never_return_more_than_the_limit():
    """All 16 x 16 locations have the same score and boxes that do not meet."""
    locations = compute_locations([(16, 16)], [8])
    (result,) = FCOSDecoder(max_detections=7)(
        locations,
        torch.zeros(1, 256, 1),
        torch.full((1, 256, 4), 0.4),
        torch.zeros(1, 256),
        [(128, 128)],
    )
    assert len(result) == 7
    (result,) = FCOSDecoder(topk_candidates=9)(
        locations,
        torch.zeros(1, 256, 1),
        torch.full((1, 256, 4), 0.4),
        torch.zeros(1, 256),
        [(128, 128)],
    )
    assert len(result) == 9


def test_boxes_outside_the_image_are_dropped():
    """A 16 x 16 image padded to 16 x 32: short boxes beyond x = 16 clip to nothing."""
    locations = compute_locations([(2, 4)], [8])
    (result,) = FCOSDecoder()(
        locations,
        torch.full((1, 8, 1), 3.0),
        torch.full((1, 8, 4), 0.4),
        torch.zeros(1, 8),
        [(16, 16)],
    )
    assert len(result) == 4
    assert result.pred_boxes.tensor.max() <= 16


@pytest.mark.parametrize("limit", [1, 5, 100])
@pytest.mark.parametrize("spread", [20.0, 2000.0])
@pytest.mark.parametrize("count", [0, 1, 300, 400])
def test_nms_by_class(limit, spread, count):
    """Against torchvision's NMS of each class alone.

    Boxes close to each other leave fewer than the limit, so that all of them are tested; spread
    ones reach it after a few. All have negative coordinates, and many scores are equal.
    """
    generator = torch.Generator().manual_seed(0)
    corner = spread * torch.rand(count, 2, generator=generator) - 50
    boxes = torch.cat((corner, corner + 10 + 30 * torch.rand(count, 2, generator=generator)), 1)
    scores = torch.randint(1, 100, (count,), generator=generator) / 100
    scores = scores.sort(descending=True).values
    classes = torch.randint(0, 3, (count,), generator=generator)
    own = [
        rows[nms(boxes[rows], scores[rows], 0.5)]
        for rows in map(lambda k: (classes == k).nonzero().squeeze(1), range(3))
    ]
    own = torch.cat(own).sort().values  # of equal scores the first
    expected = own[scores[own].argsort(descending=True, stable=True)][:limit]
    assert torch.equal(nms_by_class(boxes, scores, classes, 0.5, limit), expected)


def test_more_candidates_than_a_level_may_have():
    """In a batch each image and level has its own limit; ties at it go to the first location.

    Two levels of 8 x 8 and 4 x 4, 20 candidates each: all scores of the second image are equal.
    """
    generator = torch.Generator().manual_seed(1)
    locations = compute_locations([(8, 8), (4, 4)], [8, 16])
    logits = torch.randn(2, 80, 2, generator=generator)
    logits[1] = 2.0
    ltrb, quality = torch.full((2, 80, 4), 0.1), torch.zeros(2, 80)
    sizes = [(64, 64)] * 2
    decoder = FCOSDecoder(topk_candidates=20, score_thresh=0.0, max_detections=200)
    first, second = decoder(locations, logits, ltrb, quality, sizes)
    expected = []
    for start, end in ((0, 64), (64, 80)):
        score = (logits[0, start:end].sigmoid() * 0.5).sqrt().flatten()
        expected += score.sort(descending=True).values[:20].tolist()
    assert first.scores.tolist() == pytest.approx(sorted(expected, reverse=True))
    # The first 10 locations of each level, both classes.
    centers = second.pred_boxes.get_centers()
    wanted = torch.cat((locations.points[:10], locations.points[64:74])).repeat_interleave(2, 0)
    torch.testing.assert_close(centers, wanted)


@pytest.mark.parametrize("clip_first", [True, False])
def test_one_class_that_is_not_finite_hides_no_other(clip_first):
    locations = compute_locations([(1, 3)], [8])
    logits = torch.tensor([[[math.nan, 3.0], [2.0, math.inf], [3.0, 1.0]]])
    ltrb = torch.full((1, 3, 4), 0.4)
    ltrb[0, 2] = math.nan
    decoder = FCOSDecoder(clip_before_nms=clip_first)
    (result,) = decoder(locations, logits, ltrb, torch.zeros(1, 3), [(8, 24)])
    x = result.pred_boxes.get_centers()[:, 0].tolist()
    found = sorted(zip(x, result.pred_classes.tolist(), strict=True))
    # An infinite logit is a probability of 1.
    assert found == [(4.0, 1), (12.0, 0), (12.0, 1)]


def test_waits_for_the_device():
    """A few a batch, and one an image, where each has its own NMS, as on the CPU.

    That path also asks, where there are many candidates, whether a level has too many.
    """

    def waits(num_images):
        generator = torch.Generator().manual_seed(0)
        locations = make_locations(100, 132)
        count = len(locations.points)
        inputs = (
            2 * torch.randn(num_images, count, 3, generator=generator) - 2,
            4 * torch.rand(num_images, count, 4, generator=generator),
            torch.randn(num_images, count, generator=generator),
            [(100, 132)] * num_images,
        )
        syncs, _ = count_operators(Job("decode", lambda: FCOSDecoder()(locations, *inputs)))
        return syncs

    assert waits(8) - waits(4) == 4
    assert waits(1) <= 7
    assert waits(8) <= 14
