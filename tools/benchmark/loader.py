"""Images per second of the training loader."""

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import BoxMode
from PIL import Image
from torch.nn.functional import interpolate

from fcos_d2.config import add_fcos_config
from fcos_d2.data.dataset_mapper import DetectionDatasetMapper
from fcos_d2.data.loader import TrainLoader
from peers import NUM_CLASSES, OURS

from .inputs import Case, make_samples
from .measure import Job

SHORT_EDGE = 800  # pixels that the shorter side is resized to
_NUM_FILES = 8


def loader_jobs(case: Case, folder: Path) -> list[Job]:
    """Batches of JPEG files of the case's size, resized, by three mappers in the same loader.

    The loader reads in this process, as one of its workers would. The files go into ``folder``.
    """
    records = _write_images(case, folder)
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.MODEL.FCOS.NUM_CLASSES = NUM_CLASSES
    cfg.INPUT.MIN_SIZE_TRAIN = (SHORT_EDGE,)
    mappers = []
    for reduced, variant in ((True, "reduced JPEG decoding"), (False, "full JPEG decoding")):
        cfg.INPUT.REDUCED_JPEG_TRAIN = reduced
        mappers.append((OURS, variant, DetectionDatasetMapper(cfg)))
    mappers.append(("detectron2", "DatasetMapper", DatasetMapper(cfg, is_train=True)))
    jobs = []
    for name, variant, mapper in mappers:
        batches = _batches(records, mapper, case.batch)
        run = functools.partial(next, batches)
        jobs.append(Job(name, run, variant=variant, precision="", countable=False))
    return jobs


def _batches(records: list[dict], mapper: DatasetMapper, batch_size: int) -> Iterator[list[dict]]:
    sampler = TrainingSampler(len(records), seed=0)
    return iter(TrainLoader(records, mapper, sampler=sampler, batch_size=batch_size, seed=0))


def _write_images(case: Case, folder: Path) -> list[dict]:
    """Write smooth noise with some grain, which takes as many bytes of JPEG as a photograph."""
    records = []
    generator = torch.Generator().manual_seed(0)
    shape = (case.height, case.width)
    for number, sample in enumerate(make_samples(case._replace(batch=_NUM_FILES), "cpu")):
        coarse = torch.rand(1, 3, *(max(2, side // 24) for side in shape), generator=generator)
        smooth = 255 * interpolate(coarse, size=shape, mode="bilinear", align_corners=False)[0]
        grain = 6 * torch.randn(3, *shape, generator=generator)
        pixels = (smooth + grain).clamp(0, 255).byte().permute(1, 2, 0).numpy()
        path = folder / f"{number}_{case.height}x{case.width}.jpg"
        Image.fromarray(pixels).save(path, quality=90)
        gt = sample["instances"]
        annotations = [
            {"bbox": box, "category_id": label, "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0}
            for box, label in zip(gt.gt_boxes.tensor.tolist(), gt.gt_classes.tolist(), strict=True)
        ]
        record = {"file_name": str(path), "image_id": number, "annotations": annotations}
        records.append({**record, "height": case.height, "width": case.width})
    return records
