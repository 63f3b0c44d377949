"""Training loader with batches that repeat exactly, also after a resume."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetFromList
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from .dataset_mapper import DetectionDatasetMapper
from .sources import load_records


class TrainLoader:
    """Endless batches of this rank; batch k is the same wherever training starts.

    Detectron2's loader restarts its stream after a resume, and groups images by aspect ratio after
    reading them. Here indices are grouped, so that a resumed run skips images without reading them,
    and each image's augmentation has its own seed, so that the number of workers has no effect.
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
        """
        Args:
            records: dataset dicts, with ``width`` and ``height``.
            mapper: record to input of the model; its randomness comes from ``numpy.random``.
            sampler: endless stream of indices into ``records`` for this rank, the same each time
                it is iterated.
            batch_size: images per batch of this rank.
            seed: of the augmentation.
            group_by_aspect_ratio: put only wide or only tall images into a batch.
            num_workers: processes that read images; 0 reads them in the main process.
        """
        self.start_iter = 0  # set by the trainer when it resumes
        self.dataset = _SeededDataset(DatasetFromList(records, copy=False), mapper, seed)
        self.sampler = sampler
        self.batch_size = batch_size
        self.is_wide = [group_by_aspect_ratio and x["width"] > x["height"] for x in records]
        self.num_workers = num_workers

    def __iter__(self) -> Iterator[list[dict]]:
        """Yield batches from ``start_iter`` on, whose value is taken at the first ``next``."""
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

    def __init__(self, records: Sequence[dict], mapper: Callable[[dict], dict], seed: int):
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


def get_records(
    names: str | Sequence[str], *, skip_bad_boxes: bool = False, filter_empty: bool = False
) -> list[dict]:
    """Return the records of data sources, which are registered if they have not been.

    Args:
        names: of one source or several, as in DATASETS.TRAIN.
        skip_bad_boxes: see :func:`load_records`.
        filter_empty: drop images without an object other than crowd regions.

    Returns:
        The records of all sources, in order.

    Raises:
        ValueError: a source that can't be used (:class:`DataError`), or no image is left.
    """
    names = [names] if isinstance(names, str) else list(names)
    records = [x for name in names for x in load_records(name, skip_bad_boxes=skip_bad_boxes)]
    if filter_empty:
        records = filter_images_with_only_crowd_annotations(records)
    if not records:
        suffix = " with an object" if filter_empty else ""
        raise ValueError(f"No image{suffix} in {', '.join(names)}.")
    return records


def _train_loader_from_config(cfg: CfgNode) -> dict:
    return {
        "dataset": get_records(
            cfg.DATASETS.TRAIN,
            skip_bad_boxes=cfg.DATASETS.SKIP_BAD_BOXES,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        ),
        "mapper": DetectionDatasetMapper(cfg),
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "seed": cfg.SEED,
        "sampler": cfg.DATALOADER.SAMPLER_TRAIN,
        "repeat_threshold": cfg.DATALOADER.REPEAT_THRESHOLD,
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
    }


@configurable(from_config=_train_loader_from_config)
def build_train_loader(
    dataset: list[dict],
    *,
    mapper: Callable[[dict], dict],
    total_batch_size: int,
    seed: int = -1,
    sampler: str = "TrainingSampler",
    repeat_threshold: float = 0.0,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
) -> TrainLoader:
    """Build the loader of training batches, from a config or from explicit arguments.

    Args:
        dataset: records, see :func:`get_records`.
        mapper: record to input of the model.
        total_batch_size: images per batch over all ranks.
        seed: of sampling and augmentation; negative draws one.
        sampler: "TrainingSampler" or "RepeatFactorTrainingSampler".
        repeat_threshold: frequency below which the latter repeats the images of a class.
        aspect_ratio_grouping: put only wide or only tall images into a batch.
        num_workers: processes per rank that read images.

    Raises:
        ValueError: a batch that the ranks can't share, or another sampler.
    """
    world_size = comm.get_world_size()
    if total_batch_size < world_size or total_batch_size % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {total_batch_size} is the batch size over all ranks: it must "
            f"be a multiple of their number, {world_size}."
        )
    seed = seed if seed >= 0 else comm.shared_random_seed()
    return TrainLoader(
        dataset,
        mapper,
        sampler=_build_sampler(sampler, dataset, repeat_threshold, seed),
        batch_size=total_batch_size // world_size,
        seed=seed,
        group_by_aspect_ratio=aspect_ratio_grouping,
        num_workers=num_workers,
    )


def _build_sampler(
    name: str, dataset: list[dict], repeat_threshold: float, seed: int
) -> Iterable[int]:
    if name == "TrainingSampler":
        return TrainingSampler(len(dataset), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, repeat_threshold
        )
        return RepeatFactorTrainingSampler(factors, seed=seed)
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; it must be 'TrainingSampler' or "
        "'RepeatFactorTrainingSampler'."
    )
