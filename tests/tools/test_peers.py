"""All implementations do the same work with the same weights."""

import sys

import pytest
import torch

from benchmark.inputs import Case, make_samples, training_outputs
from peers import build_peers, random_checkpoint, why_missing

CASE = Case(batch=2, height=90, width=128, boxes=12)


def loss_of(peer):
    """The loss of the same outputs and ground truth, after its backward pass, and the outputs."""
    outputs, samples = training_outputs(CASE, "cpu"), make_samples(CASE, "cpu")
    grid, ground_truth = peer.grid(outputs, CASE.padded), peer.ground_truth(samples)
    loss = peer.loss(grid, outputs, peer.match(grid, ground_truth), ground_truth)
    loss.backward()
    return loss.detach(), outputs


def test_the_same_weights_are_trained(pair):
    """As many weights get a gradient, in the backbone and in the whole model."""
    counts = []
    for peer in pair:
        peer.set_training(True)
        peer.model.zero_grad()
        sum(peer.losses(peer.inputs(make_samples(CASE, "cpu"))).values()).backward()
        for module in (peer.model.backbone, peer.model):
            trained = [x for x in module.parameters() if x.grad is not None]
            counts.append(sum(x.numel() for x in trained))
    assert counts[:2] == counts[2:] and 0 < counts[0] < counts[1]


def test_losses_and_gradients_equal_torchvisions(peers):
    """The other two divide by something else: a moving average, the sum of centerness."""
    theirs = peers["torchvision"]
    results = [
        [loss, *(x.grad for level in outputs for x in level)]
        for loss, outputs in map(loss_of, (theirs, theirs.counterpart))
    ]
    assert results[0][0] > 0 and results[0][1].abs().max() > 0
    torch.testing.assert_close(*results)


def test_losses_reach_all_outputs(pair):
    logits, ltrb, centerness = zip(*loss_of(pair[1])[1], strict=True)
    assert all(x.grad.abs().max() > 0 for x in logits)
    assert all(any(x.grad.abs().max() > 0 for x in maps) for maps in (ltrb, centerness))


@pytest.mark.parametrize("name", ["fcos_d2", "torchvision"])
def test_steps_together_equal_the_whole_model(peers, name):
    """Bare head, grid and decoding give what the model gives; so do matching and loss."""
    peer = peers[name]
    samples = make_samples(CASE, "cpu")
    convolved = []
    hooks = [
        x.register_forward_hook(lambda module, inputs, y: convolved.append(y))
        for x in peer.predictors
    ]
    peer.set_training(True)
    whole = sum(peer.losses(peer.inputs(samples)).values())
    for hook in hooks:
        hook.remove()
    # Each predictor ran once per level; torchvision runs all levels of the class predictor first.
    by_channels = [[x for x in convolved if x.shape[1] == n] for n in (20, 4, 1)]
    outputs = list(zip(*by_channels, strict=True))
    outputs = [type(training_outputs(CASE, "cpu")[0])(*x) for x in outputs]
    grid, ground_truth = peer.grid(outputs, CASE.padded), peer.ground_truth(samples)
    loss = peer.loss(grid, outputs, peer.match(grid, ground_truth), ground_truth)
    torch.testing.assert_close(loss, whole)


def test_levels_have_the_sizes_of_the_network(peers):
    features = peers["fcos_d2"].model.backbone(torch.zeros(1, 3, *CASE.padded))
    assert [tuple(x.shape[-2:]) for x in features.values()] == CASE.level_sizes


def test_missing_libraries(monkeypatch):
    monkeypatch.delitem(sys.modules, "peers.adelaidet", raising=False)
    for name in ("adet", "adet.config"):
        monkeypatch.setitem(sys.modules, name, None)  # can't be imported
    assert "AdelaiDet is not installed: install it" in why_missing("adelaidet")
    assert not why_missing("torchvision")
    with pytest.raises(ImportError):
        build_peers(["adelaidet"], 18, "cpu")
    with pytest.raises(ValueError, match="mmdet can't be run here"):
        random_checkpoint("mmdet", 3)
