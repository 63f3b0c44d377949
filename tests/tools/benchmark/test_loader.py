"""The loaders that are compared read the same."""

import torch

from benchmark.inputs import Case
from benchmark.loader import SHORT_EDGE, loader_jobs


def test_loaders_read_the_same_images(tmp_path):
    jobs = loader_jobs(Case(batch=2, height=60, width=80, boxes=3), tmp_path)
    assert [(x.name, x.variant) for x in jobs] == [
        ("fcos_d2", "reduced JPEG decoding"),
        ("fcos_d2", "full JPEG decoding"),
        ("detectron2", "DatasetMapper"),
    ]
    reduced, full, theirs = ([x.run() for _ in range(2)] for x in jobs)
    ids = [[x["image_id"] for batch in batches for x in batch] for batches in (reduced, theirs)]
    assert ids[0] == ids[1]
    for one, other in zip(full[0], theirs[0], strict=True):
        assert min(one["image"].shape[1:]) == SHORT_EDGE
        assert torch.equal(one["image"], other["image"])
        torch.testing.assert_close(*(x["instances"].gt_boxes.tensor for x in (one, other)))


def test_images_are_photo_like(tmp_path):
    loader_jobs(Case(batch=1, height=375, width=500, boxes=0), tmp_path)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    # VOC's files of this size have about 100 KB; flat colour would have 5, noise 300.
    assert all(40_000 < size < 200_000 for size in sizes)
