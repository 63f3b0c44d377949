"""Class names and keys in a checkpoint, and configs that follow them."""

import pytest
import torch
from detectron2.modeling import build_model

from fcos_d2.checkpoint import (
    ARCHITECTURE_KEYS,
    CARRIED_KEYS,
    FACT_KEYS,
    FCOSCheckpointer,
    apply_checkpoint_keys,
    convert_file,
    read_info,
)
from fcos_d2.checkpoint.keys import collect_keys

NAMES = ["circle", "square", "star"]
CARRIED = {
    "MODEL.PIXEL_MEAN": [1.0, 2.0, 3.0],
    "INPUT.FORMAT": "RGB",
    "MODEL.FCOS.LOCATION_OFFSET": 0.0,
    "MODEL.FCOS.NUM_CLS_CONVS": 4,
    "MODEL.FCOS.SIZES_OF_INTEREST": (1, 2, 3, 4),
    "MODEL.FCOS.SCORE": "product",
    "TEST.DETECTIONS_PER_IMAGE": 7,
}


def save(path, **content):
    torch.save({"model": {"a": torch.zeros(1)}, **content}, path)
    return str(path)


@pytest.fixture
def path(tmp_path):
    """A checkpoint that carries some keys of each group."""
    return save(tmp_path / "a.pth", cfg=CARRIED)


def changed(cfg, before):
    """The keys whose value is another one now."""
    old, new = collect_keys(before, CARRIED_KEYS), collect_keys(cfg, CARRIED_KEYS)
    return {key for key in CARRIED_KEYS if old[key] != new[key]}


@pytest.mark.parametrize("training", [False, True])
def test_training_takes_only_the_facts(tiny_cfg, path, training):
    before = tiny_cfg.clone()
    apply_checkpoint_keys(tiny_cfg, path, training=training)
    keys = CARRIED.keys() & set(FACT_KEYS) if training else CARRIED.keys()
    assert changed(tiny_cfg, before) == keys and len(keys) == (3 if training else 7)
    assert tiny_cfg.MODEL.PIXEL_MEAN == [1.0, 2.0, 3.0]
    sizes = [64, 128, 256, 512] if training else [1, 2, 3, 4]
    assert tiny_cfg.MODEL.FCOS.SIZES_OF_INTEREST == sizes


def test_keys_set_by_hand_stay(tiny_cfg, path, info_log):
    before = tiny_cfg.clone()
    keep = ["MODEL.FCOS.SCORE", "INPUT.FORMAT", "SOLVER.MAX_ITER"]
    apply_checkpoint_keys(tiny_cfg, path, training=False, keep=keep)
    assert changed(tiny_cfg, before) == CARRIED.keys() - {"MODEL.FCOS.SCORE", "INPUT.FORMAT"}
    (record,) = info_log.records  # all in one message
    assert f"MODEL.WEIGHTS {path} was made for:" in record.message
    assert "\n  MODEL.FCOS.LOCATION_OFFSET 0.0 (recipe: 0.5)" in record.message
    assert "\n  MODEL.FCOS.SCORE product (kept, as set by hand: sqrt)" in record.message
    assert record.message.count("\n") == len(CARRIED)


def test_equal_keys_are_not_logged(tiny_cfg, tmp_path, info_log):
    carried = collect_keys(tiny_cfg, FACT_KEYS + ARCHITECTURE_KEYS)
    path = save(tmp_path / "same.pth", cfg=carried)
    before = tiny_cfg.clone()
    apply_checkpoint_keys(tiny_cfg, path, training=False)
    assert tiny_cfg == before and not info_log.records


@pytest.mark.parametrize("content", [{}, {"cfg": "a text, as Caffe2 has it"}])
def test_a_file_without_keys_changes_nothing(tiny_cfg, tmp_path, content):
    before = tiny_cfg.clone()
    apply_checkpoint_keys(tiny_cfg, save(tmp_path / "a.pth", **content), training=False)
    apply_checkpoint_keys(tiny_cfg, "", training=True)
    assert tiny_cfg == before


def test_other_keys_are_ignored(tiny_cfg, tmp_path):
    """A file can't set keys that are unrelated to weights, such as an output folder."""
    before = tiny_cfg.clone()
    carried = {"OUTPUT_DIR": "/elsewhere", "MODEL.LAZY": "_target_: os.system", "NO.SUCH": 1}
    apply_checkpoint_keys(tiny_cfg, save(tmp_path / "a.pth", cfg=carried), training=False)
    assert tiny_cfg == before


def test_a_value_of_another_type(tiny_cfg, tmp_path):
    path = save(tmp_path / "a.pth", cfg={"INPUT.FORMAT": "RGB", "MODEL.PIXEL_MEAN": "grey"})
    before = tiny_cfg.clone()
    with pytest.raises(ValueError, match=r"a\.pth has a key that can't be used: .*PIXEL_MEAN"):
        apply_checkpoint_keys(tiny_cfg, path, training=True)
    assert tiny_cfg == before


def test_another_librarys_file_has_the_keys_that_its_converted_file_has(
    tiny_cfg, make_state, tmp_path
):
    torch.save(make_state("torchvision"), tmp_path / "a.pth")
    convert_file(tmp_path / "a.pth", tmp_path / "b.pth")
    infos, cfgs = [], []
    for name in ("a.pth", "b.pth"):
        cfgs.append(tiny_cfg.clone())
        apply_checkpoint_keys(cfgs[-1], str(tmp_path / name), training=False)
        infos.append(read_info(str(tmp_path / name)))
    assert cfgs[0] == cfgs[1] != tiny_cfg
    assert infos[0] == infos[1]
    assert infos[0].num_classes == 4 and infos[0].class_names == []
    assert cfgs[0].MODEL.FCOS.LOCATION_STEP == "image" and cfgs[0].INPUT.FORMAT == "RGB"


def test_another_librarys_file_that_does_not_fit(make_state, tmp_path):
    state = make_state("mmdet")
    state["bbox_head.mask.weight"] = torch.zeros(1)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: 1 tensor\(s\) do not fit .*\n.*bbox_head\.mask"):
        read_info(str(tmp_path / "a.pth"))


def test_our_own_checkpoints_build_the_network_that_they_are_of(tiny_cfg, tmp_path):
    """Saved by one recipe, used with another."""
    model = build_model(tiny_cfg)
    FCOSCheckpointer(model, str(tmp_path), class_names=NAMES, cfg=tiny_cfg).save("a")
    path = str(tmp_path / "a.pth")
    info = read_info(path)
    assert info.class_names == NAMES and info.num_classes == 3
    assert info.cfg.keys() == {*FACT_KEYS, *ARCHITECTURE_KEYS}
    other = tiny_cfg.clone()
    other.MODEL.RESNETS.NORM, other.MODEL.FPN.OUT_CHANNELS = "FrozenBN", 256
    other.MODEL.FCOS.NUM_CLS_CONVS, other.MODEL.FCOS.USE_SCALE = 4, True
    other.MODEL.FCOS.SCORE_THRESH_TEST = 0.3  # is the recipe's to say
    apply_checkpoint_keys(other, path, training=False)
    FCOSCheckpointer(build_model(other), for_inference=True).load(path)
    assert other.MODEL.FCOS.SCORE_THRESH_TEST == 0.3
    other.MODEL.FCOS.SCORE_THRESH_TEST = tiny_cfg.MODEL.FCOS.SCORE_THRESH_TEST
    assert other == tiny_cfg


def test_training_may_go_on_with_another_quality(tiny_cfg, tmp_path):
    """The branch is the same for centerness and IoU; the recipe says which it is trained on."""
    path = save(tmp_path / "a.pth", cfg={"MODEL.FCOS.QUALITY": "centerness"})
    tiny_cfg.MODEL.FCOS.QUALITY = "iou"
    apply_checkpoint_keys(tiny_cfg, path, training=True)
    assert tiny_cfg.MODEL.FCOS.QUALITY == "iou"
    apply_checkpoint_keys(tiny_cfg, path, training=False)
    assert tiny_cfg.MODEL.FCOS.QUALITY == "centerness"
