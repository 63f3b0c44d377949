"""`TrainLoader`: exact repetition, whatever the workers and wherever it starts."""

import itertools

import numpy as np
import pytest
from detectron2.data.samplers import TrainingSampler

from fcos_d2.data.loader import TrainLoader, build_train_loader

# Half of them wide, half tall.
RECORDS = [{"image_id": k, "width": 10 + k % 2, "height": 10} for k in range(11)]


def draw(record):
    """A mapper that shows what it was given and a random number."""
    return record["image_id"], np.random.rand()


def make_loader(**options):
    options = {"batch_size": 2, "seed": 3, **options}
    return TrainLoader(RECORDS, draw, sampler=TrainingSampler(11, seed=3), **options)


def take(loader, count):
    return list(itertools.islice(loader, count))


def test_a_later_start_gives_the_same_batches():
    whole = take(make_loader(), 30)
    resumed = make_loader()
    resumed.start_iter = 12
    assert take(resumed, 18) == whole[12:]


def test_the_start_can_be_set_after_iter():
    """As SimpleTrainer does in old versions: it calls iter() when it is made."""
    loader = make_loader()
    iterator = iter(loader)
    loader.start_iter = 5
    assert next(iterator) == take(make_loader(), 6)[5]


def test_workers_change_nothing():
    assert take(make_loader(num_workers=2), 12) == take(make_loader(), 12)


def test_seeds_and_draws_differ():
    numbers = [x for batch in take(make_loader(), 30) for _, x in batch]
    assert len(set(numbers)) == 60
    other = [x for batch in take(make_loader(seed=4), 30) for _, x in batch]
    assert not set(numbers) & set(other)


def test_global_random_state_is_left_alone():
    np.random.seed(0)
    expected = np.random.rand(2)
    np.random.seed(0)
    first = np.random.rand()
    take(make_loader(), 3)
    assert [first, np.random.rand()] == expected.tolist()


def test_batches_hold_one_orientation():
    for batch in take(make_loader(), 40):
        assert len({image_id % 2 for image_id, _ in batch}) == 1
    mixed = take(make_loader(group_by_aspect_ratio=False), 40)
    assert any(len({image_id % 2 for image_id, _ in batch}) == 2 for batch in mixed)


def test_every_image_is_drawn_once_an_epoch():
    batches = take(make_loader(group_by_aspect_ratio=False, batch_size=11), 3)
    for batch in batches:
        assert sorted(image_id for image_id, _ in batch) == list(range(11))


@pytest.fixture
def cfg(tiny_cfg, monkeypatch):
    records = [{**r, "file_name": "x", "annotations": []} for r in RECORDS]
    monkeypatch.setattr("fcos_d2.data.loader.load_records", lambda name, skip_bad_boxes: records)
    return tiny_cfg


def test_filter_leaves_nothing(cfg):
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    with pytest.raises(ValueError, match="No image with an object in shapes:train:400"):
        build_train_loader(cfg)


def test_unknown_sampler(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "Nobody"
    with pytest.raises(ValueError, match="SAMPLER_TRAIN is 'Nobody'"):
        build_train_loader(cfg)


def test_repeat_factor_sampler(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.1
    loader = build_train_loader(cfg)
    batch = next(loader._index_batches())
    assert len(batch) == cfg.SOLVER.IMS_PER_BATCH


def test_batch_that_ranks_cannot_share(cfg, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="multiple of their number, 3"):
        build_train_loader(cfg)
