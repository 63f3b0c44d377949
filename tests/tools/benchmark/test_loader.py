"""The loaders that are compared read the same."""

import torch

from benchmark.inputs import Case
from benchmark.loader import SHORT_EDGE, loader_entries


def test_loaders_read_the_same_images(tmp_path):
    entries = loader_entries(Case(batch=2, height=60, width=80, boxes=3), tmp_path)
    assert [(x.job.name, x.variant) for x in entries] == [
        ("fcos_d2", "reduced JPEG decoding"),
        ("fcos_d2", "full JPEG decoding"),
        ("detectron2", "DatasetMapper"),
    ]
    reduced, full, theirs = ([x.job.run() for _ in range(2)] for x in entries)
    assert [x["image_id"] for batch in reduced for x in batch] == [
        x["image_id"] for batch in theirs for x in batch
    ]
    for one, other in zip(full[0], theirs[0], strict=True):
        assert min(one["image"].shape[1:]) == SHORT_EDGE
        assert torch.equal(one["image"], other["image"])
        boxes = [x["instances"].gt_boxes.tensor for x in (one, other)]
        torch.testing.assert_close(*boxes)


def test_images_are_photo_like(tmp_path):
    loader_entries(Case(batch=1, height=375, width=500, boxes=0), tmp_path)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    # VOC's files of this size have about 100 KB; flat colour would have 5, noise 300.
    assert all(40_000 < size < 200_000 for size in sizes)
