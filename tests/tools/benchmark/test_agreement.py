"""Inputs of the benchmark, and the check that all implementations agree on them."""

import copy

import pytest
import torch

from benchmark.agreement import (
    DisagreementError,
    check_detections,
    compare_detections,
    compare_labels,
    set_candidates,
)
from benchmark.inputs import Case, detection_outputs, make_images, make_samples
from benchmark.parts import Setup, decode_jobs, match_jobs
from peers import NUM_CLASSES

CASE = Case(batch=2, height=90, width=128, boxes=12)


def test_detections_agree(pair):
    check_detections(pair, CASE, "cpu")


def test_labels_and_decoding_agree(pair):
    setup = Setup(pair, "cpu", {})
    for make_jobs in (match_jobs, decode_jobs):  # they compare before they return
        assert [x.name for x in make_jobs(setup, CASE)] == [x.name for x in pair]


def test_candidates(peers):
    """As many pairs of location and class above the threshold as were asked for."""
    ours, images = peers["fcos_d2"], make_images(CASE, "cpu")
    set_candidates([ours], images, count=50)
    logits, _, centerness = ours.detect_with_outputs(images)[1]
    scores = (logits.sigmoid() * centerness.sigmoid()[..., None]).sqrt()
    # The one at the threshold itself may go either way.
    assert abs(int((scores > 0.2).sum()) - 2 * 50) <= 1


def test_detection_outputs_hold_the_objects(peers):
    ours = peers["fcos_d2"]
    levels = detection_outputs(CASE, "cpu", ours)
    outputs = ours.bare_head(levels)
    scores = (outputs[0].sigmoid() * outputs[2].sigmoid()[..., None]).sqrt()
    counts = (scores > 0.2).flatten(1).sum(1)
    assert (counts > 12).all() and (counts <= 6 * 12).all()
    found = ours.decode(ours.grid(levels, CASE.padded), outputs, CASE.image_sizes)
    for sample, detections in zip(make_samples(CASE, "cpu"), found, strict=True):
        classes = sample["instances"].gt_classes.tolist()
        assert set(detections.pred_classes.tolist()) <= set(classes)


def test_other_weights_are_noticed(peers):
    ours, theirs = peers["fcos_d2"], peers["torchvision"]
    predictor = theirs.predictors[0]
    saved = copy.deepcopy(predictor.state_dict())
    with torch.no_grad():
        predictor.weight.mul_(1.5)
    try:
        with pytest.raises(DisagreementError, match="torchvision and fcos_d2 detect different"):
            check_detections([ours, theirs], CASE, "cpu")
    finally:
        predictor.load_state_dict(saved)
        predictor.bias.data.copy_(ours.predictors[0].bias)


def test_no_detection_is_no_agreement(peers):
    detections, _ = peers["fcos_d2"].detect_with_outputs(make_images(CASE, "cpu"))
    compare_detections("x", detections, detections, CASE.image_sizes)
    with pytest.raises(DisagreementError, match="x detects nothing"):
        compare_detections("x", detections, [x[:0] for x in detections], CASE.image_sizes)


def test_other_labels_are_noticed():
    labels = torch.full((1, 100), NUM_CLASSES)
    labels[0, :50] = 3
    other = labels.clone()
    other[0, 0] = 4
    compare_labels("x", labels, other)  # one of 50 may be rounding
    other[0, 60] = 4
    with pytest.raises(DisagreementError, match="96.1%"):  # two of 51
        compare_labels("x", labels, other)
