"""All implementations do the same work with the same weights."""

import copy
import sys

import pytest
import torch

from benchmark.agreement import (
    DisagreementError,
    check_detections,
    compare_detections,
    compare_labels,
)
from benchmark.inputs import Case, detection_maps, make_images, make_samples, training_maps
from benchmark.parts import Bench, decode_entries, match_entries
from benchmark.peers import (
    NUM_CLASSES,
    as_instances,
    build_peers,
    set_candidates,
    why_missing,
)

CASE = Case(batch=2, height=90, width=128, boxes=12)


@pytest.fixture(scope="module")
def built():
    """All peers that are installed, by name."""
    names = ["torchvision", "detectron2", "adelaidet"]
    return {x.name: x for x in build_peers([x for x in names if not why_missing(x)], 18, "cpu")}


@pytest.fixture(params=["torchvision", "detectron2", "adelaidet"])
def pair(request, built):
    """fcos_d2 and one peer."""
    reason = why_missing(request.param)
    if reason:
        pytest.skip(reason)
    return [built["fcos_d2"], built[request.param]]


def test_detections_agree(pair):
    check_detections(pair, CASE, "cpu")


def test_labels_and_decoding_agree(pair):
    bench = Bench(pair, "cpu", 18, {})
    for entries in (match_entries, decode_entries):  # they compare before they return
        assert [x.job.name for x in entries(bench, CASE)] == [x.name for x in pair]


def test_the_same_is_trained(pair):
    """As many weights get a gradient, in the backbone and in all."""
    counts = []
    for peer in pair:
        peer.set_training(True)
        peer.model.zero_grad()
        peer.train(peer.training_inputs(make_samples(CASE, "cpu"))).backward()
        for module in (peer.model.backbone, peer.model):
            trained = [x for x in module.parameters() if x.grad is not None]
            counts.append(sum(x.numel() for x in trained))
    assert counts[:2] == counts[2:] and 0 < counts[0] < counts[1]


def test_losses_and_gradients_are_torchvisions(built):
    """The other two divide by something else: a moving average, the sum of centerness."""
    samples, results = make_samples(CASE, "cpu"), []
    for peer in (built["torchvision"], built["torchvision"].twin):
        maps = training_maps(CASE, "cpu")
        grid, targets = peer.grid(maps, CASE.padded), peer.targets(samples)
        loss = peer.loss(grid, maps, peer.match(grid, targets), targets)
        loss.backward()
        results.append([loss.detach(), *(x.grad for level in maps for x in level)])
    assert results[0][0] > 0 and results[0][1].abs().max() > 0
    torch.testing.assert_close(*results)


def test_losses_reach_all_maps(pair):
    samples, maps = make_samples(CASE, "cpu"), training_maps(CASE, "cpu")
    peer = pair[1]
    grid, targets = peer.grid(maps, CASE.padded), peer.targets(samples)
    peer.loss(grid, maps, peer.match(grid, targets), targets).backward()
    assert all(x.grad.abs().max() > 0 for x in maps.logits)
    assert all(any(x.grad.abs().max() > 0 for x in part) for part in (maps.ltrb, maps.quality))


def test_level_sizes_are_those_of_the_network(built):
    ours = built["fcos_d2"]
    features = ours.model.backbone(torch.zeros(1, 3, *CASE.padded))
    assert [tuple(x.shape[-2:]) for x in features.values()] == CASE.level_sizes


def test_candidates(built):
    """As many pairs of location and class above the threshold as were asked for."""
    ours = built["fcos_d2"]
    images = make_images(CASE, "cpu")
    set_candidates([ours], images, count=50)
    outputs = []
    head = ours.model.proposal_generator.head
    hook = head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    ours.detect(ours.images(images))
    hook.remove()
    logits, _, quality = outputs[0]
    scores = (logits.sigmoid() * quality.sigmoid()[..., None]).sqrt()
    # The one at the threshold itself may go either way.
    assert abs(int((scores > 0.2).sum()) - 2 * 50) <= 1


def test_detection_maps_hold_the_objects(built):
    ours = built["fcos_d2"]
    maps = detection_maps(CASE, "cpu", ours)
    outputs = ours.head_outputs(maps)
    scores = (outputs[0].sigmoid() * outputs[2].sigmoid()[..., None]).sqrt()
    counts = (scores > 0.2).flatten(1).sum(1)
    assert (counts > 12).all() and (counts <= 6 * 12).all()
    samples = make_samples(CASE, "cpu")
    found = as_instances(ours.decode(ours.grid(maps, CASE.padded), outputs, CASE.image_sizes))
    for sample, detections in zip(samples, found, strict=True):
        assert set(detections.pred_classes.tolist()) <= set(sample.classes.tolist())


def test_other_weights_are_noticed(built):
    peer = built["torchvision"]
    saved = copy.deepcopy(peer.predictor.state_dict())
    with torch.no_grad():
        peer.predictor.weight.mul_(1.5)
    try:
        with pytest.raises(DisagreementError, match="torchvision and fcos_d2 detect different"):
            check_detections([built["fcos_d2"], peer], CASE, "cpu")
    finally:
        peer.predictor.load_state_dict(saved)
        set_candidates([built["fcos_d2"], peer], make_images(CASE, "cpu"))


def test_no_detection_is_no_agreement(built):
    ours = built["fcos_d2"]
    ours.set_training(False)
    detections = as_instances(ours.detect(ours.images(make_images(CASE, "cpu"))))
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


def test_why_a_peer_is_missing(monkeypatch):
    for name in ("adet", "adet.config"):
        monkeypatch.setitem(sys.modules, name, None)  # can't be imported
    assert "AdelaiDet is not installed: install it" in why_missing("adelaidet")
    assert not why_missing("torchvision")
