"""Check that fcos_d2 and a peer do the same work: without that, times can't be compared."""

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from peers import NUM_CLASSES, Peer

from .inputs import Case, make_images

# Rounding decides a few: areas that are equal in float32, an IoU at the threshold.
_MIN_SHARE = 0.98
_SCORE_THRESH = 0.2  # of all libraries
_CANDIDATES = 900


class DisagreementError(RuntimeError):
    """A peer and fcos_d2 give different results on the same inputs with the same weights."""


@torch.no_grad()
def set_candidates(
    peers: Sequence[Peer], samples: Sequence[dict], count: int = _CANDIDATES
) -> None:
    """Shift the class bias of all peers so that an image has ``count`` candidates.

    Candidates are pairs of location and class with a score above the threshold. Random weights
    give tens of thousands, unlike trained ones.
    """
    logits, _, centerness = peers[0].detect_with_outputs(samples)[1]
    # Distance of each logit to the threshold; infinite where the centerness alone is below it.
    distance = (_SCORE_THRESH**2 / centerness.sigmoid()).logit()[..., None] - logits
    distance = distance.nan_to_num(torch.inf).flatten()
    shift = distance.kthvalue(min(count * len(samples), len(distance))).values
    both = [x for peer in peers for x in (peer, peer.counterpart) if x is not None]
    for bias in {id(x.model): x.predictors[0].bias for x in both}.values():
        bias += shift


def check_detections(peers: Sequence[Peer], case: Case, device: str) -> None:
    """Compare the detections of each peer with those of fcos_d2 under the same rules.

    Raises:
        DisagreementError: they differ, or nothing is detected.
    """
    samples = make_images(case, device)
    set_candidates(peers, samples)
    for peer in peers[1:]:
        ours, theirs = (x.detect_with_outputs(samples)[0] for x in (peer.counterpart, peer))
        compare_detections(peer.name, ours, theirs, case.image_sizes)


def compare_detections(
    name: str,
    ours: Sequence[Instances],
    theirs: Sequence[Instances],
    image_sizes: Sequence[tuple[int, int]],
) -> None:
    """Compare detections per image; boxes are clipped first, as not all libraries do it.

    Raises:
        DisagreementError: they differ, or nothing is detected.
    """
    for got, wanted, size in zip(ours, theirs, image_sizes, strict=True):
        if not len(wanted):
            raise DisagreementError(f"{name} detects nothing: no comparison is possible.")
        share = min(_share_found(got, wanted, size), _share_found(wanted, got, size))
        if share < _MIN_SHARE:
            raise DisagreementError(
                f"{name} and fcos_d2 detect different objects with the same weights: "
                f"{len(wanted)} and {len(got)}, {share:.1%} of which are the same."
            )


def compare_labels(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Compare the labels (N, L) assigned to the locations.

    Raises:
        DisagreementError: they differ at more than a few of the positives.
    """
    positive = (ours < NUM_CLASSES) | (theirs < NUM_CLASSES)
    share = 1 - int((ours != theirs).sum()) / max(1, int(positive.sum()))
    if share < _MIN_SHARE:
        raise DisagreementError(
            f"{name} and fcos_d2 match the same ground truth differently: {share:.1%} of the "
            "positive locations are the same."
        )


def _share_found(some: Instances, others: Instances, size: tuple[int, int]) -> float:
    """Share of detections with an equal among the others: class, score to 1e-3, box to 1 pixel."""
    if not len(some):
        return 0.0
    one, other = (Boxes(x.pred_boxes.tensor.clone()) for x in (some, others))
    one.clip(size)
    other.clip(size)
    same = some.pred_classes[:, None] == others.pred_classes
    same &= (some.scores[:, None] - others.scores).abs() < 1e-3
    same &= ((one.tensor[:, None] - other.tensor).abs() < 1).all(2)
    return same.any(1).float().mean().item()
