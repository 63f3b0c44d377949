"""Batches of training inputs that repeat exactly, also after a resume."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from detectron2.data import DatasetFromList
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from .dataset_mapper import DetectionDatasetMapper
from .sources import load_records


class TrainLoader:
    """Endless batches of this rank; batch k is the same whenever and wherever training starts.

    Detectron2's loader starts its stream anew after a resume, and groups images by aspect ratio
    after they were read. Here the grouping is done on indices, so that a resumed run skips what
    was trained on without reading it, and each image's augmentation draws from a seed of its own,
    so that the number of workers changes nothing.
    """

    def __init__(
        self,
        records: list[dict],
        mapper: Callable[[dict], dict],
        *,
        sampler: Iterable[int],
        batch_size: int,
        seed: int,
        group_by_aspect_ratio: bool = True,
        num_workers: int = 0,
    ):
        """Keep what is needed to start at any iteration.

        Args:
            records: dataset dicts, with ``width`` and ``height``.
            mapper: record to input of the model; its randomness comes from ``numpy.random``.
            sampler: an endless stream of indices into ``records`` for this rank, the same each
                time that it is iterated.
            batch_size: images in a batch of this rank.
            seed: of the augmentation.
            group_by_aspect_ratio: put only wide or only tall images into a batch.
            num_workers: processes that read images; 0 reads them in this one.
        """
        self.start_iter = 0  # set by the trainer when it resumes
        self.dataset = _SeededDataset(DatasetFromList(records, copy=False), mapper, seed)
        self.sampler = sampler
        self.batch_size = batch_size
        self.is_wide = [group_by_aspect_ratio and x["width"] > x["height"] for x in records]
        self.num_workers = num_workers

    def __iter__(self) -> Iterator[list[dict]]:
        """Yield the batches from iteration ``start_iter`` on, as it is at the first ``next``."""
        batches = itertools.islice(self._index_batches(), self.start_iter, None)
        yield from DataLoader(
            self.dataset, batch_sampler=batches, num_workers=self.num_workers, collate_fn=list
        )

    def _index_batches(self) -> Iterator[list[tuple[int, int]]]:
        """Yield batches of (index, number of the draw over all ranks)."""
        groups: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        for draw, index in enumerate(self.sampler):
            group = groups[self.is_wide[index]]
            group.append((index, draw * comm.get_world_size() + comm.get_rank()))
            if len(group) == self.batch_size:
                yield group[:]
                group.clear()


class _SeededDataset(Dataset):
    """Map the record of (index, draw) with numpy's generator seeded by the draw."""

    def __init__(self, records: Dataset, mapper: Callable[[dict], dict], seed: int):
        self.records = records
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, draw = key
        state = np.random.get_state()
        np.random.seed([self.seed % 2**32, draw % 2**32])
        try:
            return self.mapper(self.records[index])
        finally:
            np.random.set_state(state)


def build_train_loader(cfg) -> TrainLoader:
    """Build the loader of ``cfg.DATASETS.TRAIN``, whose sources are registered already.

    Raises:
        ValueError: no image is left to train on, a batch that the ranks can't share, or a sampler
            other than TrainingSampler and RepeatFactorTrainingSampler.
    """
    records = [record for name in cfg.DATASETS.TRAIN for record in load_records(name)]
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        records = filter_images_with_only_crowd_annotations(records)
    if not records:
        raise ValueError(f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} holds no image to train on.")
    world_size = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < world_size or cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is the batch of all ranks: it has to "
            f"be a multiple of their number, {world_size}."
        )
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    return TrainLoader(
        records,
        DetectionDatasetMapper(cfg),
        sampler=_build_sampler(cfg, records, seed),
        batch_size=cfg.SOLVER.IMS_PER_BATCH // world_size,
        seed=seed,
        group_by_aspect_ratio=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def _build_sampler(cfg, records: list[dict], seed: int) -> Iterable[int]:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return TrainingSampler(len(records), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        return RepeatFactorTrainingSampler(factors, seed=seed)
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; it has to be 'TrainingSampler' or "
        "'RepeatFactorTrainingSampler'."
    )
