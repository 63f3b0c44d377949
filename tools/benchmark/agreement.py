"""Whether fcos_d2 and a peer do the same work: a comparison of times means nothing otherwise."""

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .inputs import Case, make_images
from .peers import NUM_CLASSES, Peer, as_instances, set_candidates

# Rounding decides a few: areas that float32 can't tell apart, an IoU at the threshold.
_LEAST = 0.98


class DisagreementError(RuntimeError):
    """A peer and fcos_d2 give different results on the same inputs with the same weights."""


@torch.no_grad()
def check_detections(peers: Sequence[Peer], case: Case, device: str) -> None:
    """Compare whole inference of each peer with fcos_d2's under the same rules.

    Raises:
        DisagreementError: they differ, or nothing is detected.
    """
    images = make_images(case, device)
    set_candidates(peers, images)
    for peer in peers[1:]:
        results = []
        for x in (peer.twin, peer):
            x.set_training(False)
            results.append(as_instances(x.detect(x.images(images))))
        compare_detections(peer.name, *results, case.image_sizes)


def compare_detections(
    name: str,
    ours: Sequence[Instances],
    theirs: Sequence[Instances],
    image_sizes: Sequence[tuple[int, int]],
) -> None:
    """Compare detections image by image; boxes are clipped first, as not everybody does it.

    Raises:
        DisagreementError: they differ, or nothing is detected.
    """
    for got, wanted, size in zip(ours, theirs, image_sizes, strict=True):
        if not len(wanted):
            raise DisagreementError(f"{name} detects nothing: no comparison is possible.")
        share = min(_found(got, wanted, size), _found(wanted, got, size))
        if share < _LEAST:
            raise DisagreementError(
                f"{name} and fcos_d2 detect different objects with the same weights: "
                f"{len(wanted)} and {len(got)}, {share:.1%} of which are the same."
            )


def compare_labels(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Compare the labels (N, L) that the ground truth gives.

    Raises:
        DisagreementError: they differ at more than a few of the positives.
    """
    positive = (ours < NUM_CLASSES) | (theirs < NUM_CLASSES)
    share = 1 - int((ours != theirs).sum()) / max(1, int(positive.sum()))
    if share < _LEAST:
        raise DisagreementError(
            f"{name} and fcos_d2 match the same ground truth differently: {share:.1%} of the "
            "positive locations are the same."
        )


def _found(some: Instances, others: Instances, size: tuple[int, int]) -> float:
    """Share of some detections that are among the others: class, score to 1e-3, box to 1 pixel."""
    if not len(some):
        return 0.0
    one, other = (_clipped(x, size) for x in (some, others))
    same = some.pred_classes[:, None] == others.pred_classes
    same &= (some.scores[:, None] - others.scores).abs() < 1e-3
    same &= ((one[:, None] - other).abs() < 1).all(2)
    return same.any(1).float().mean().item()


def _clipped(detections: Instances, size: tuple[int, int]) -> Tensor:
    boxes = Boxes(detections.pred_boxes.tensor.clone())
    boxes.clip(size)
    return boxes.tensor
