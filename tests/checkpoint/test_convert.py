"""Conversion of all libraries: recognition, statuses, errors, the file."""

import os
import re
from collections import Counter

import pytest
import torch

from fcos_d2.checkpoint import CARRIED_KEYS, Converted, convert, convert_file, status_table
from fcos_d2.checkpoint.architecture import build_cfg, expected_state
from fcos_d2.checkpoint.convert import recognise
from fcos_d2.checkpoint.libraries import LIBRARIES

SOURCES = list(LIBRARIES)


@pytest.mark.parametrize("source", SOURCES)
def test_each_library(make_state, source):
    """It is recognised, all keys are set, and the weights fill the model of the keys."""
    state = make_state(source)
    assert recognise(state) == [source]
    converted = convert(state)
    assert converted.cfg.keys() == set(CARRIED_KEYS)
    wanted = expected_state(build_cfg(converted.cfg, len(converted.class_indices)))
    got = {name: x.shape for name, x in converted.weights.items()}
    assert got == {name: x.shape for name, x in wanted.items()}


def test_a_resnet_alone_is_not_recognised(make_state):
    names = [name for name in make_state("adelaidet") if name.startswith("backbone.bottom_up.")]
    assert recognise(names) == []


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict"])
def test_wrapped_and_parallel(make_state, wrapper):
    state = make_state("torchvision")
    parallel = {f"module.{name}": x for name, x in state.items()}
    converted = convert({wrapper: parallel, "epoch": 3})
    plain = convert(state)
    assert converted.weights.keys() == plain.weights.keys()
    assert all(torch.equal(x, plain.weights[name]) for name, x in converted.weights.items())
    assert converted.original.keys() == state.keys()


def test_names_that_are_not_recognised(make_state):
    with pytest.raises(
        ValueError, match=r"not recognised.*torchvision, .*begins with a\.b, c\.d\..*--from"
    ):
        convert({"a.b": torch.zeros(1), "c.d": torch.zeros(1)})
    with pytest.raises(ValueError, match="caffe is not one of .*torchvision, .*auto"):
        convert(make_state("mmdet"), "caffe")
    with pytest.raises(ValueError, match="FCOS of detectron2 and of mmdet.*--from"):
        convert({**make_state("mmdet"), **make_state("detectron2")})
    with pytest.raises(ValueError, match="this package's own names already"):
        convert(convert(make_state("torchvision")).weights)


@pytest.mark.parametrize("source", SOURCES)
def test_named_instead_of_recognised(make_state, source):
    """Without the tensors that a library is recognised by, naming it reports them as missing."""
    marks = ("ctrness", "conv_centerness")
    state = {k: x for k, x in make_state(source).items() if not any(m in k for m in marks)}
    if source != "adelaidet":  # that one's whole head has a name of its own
        with pytest.raises(ValueError, match="not recognised"):
            convert(state)
    with pytest.raises(
        ValueError, match=r"2 tensor\(s\) do not fit.*\n  missing, centerness \(2\): "
    ):
        convert(state, source)


MISSING = "head.regression_head.conv.0.weight"
BAD = "head.regression_head.conv.3.bias"
EXTRA = ("head.mask.weight", "head.mask.bias", "neck.weight")


@pytest.fixture
def misfit(make_state):
    """A torchvision state dict with one tensor missing, one of another shape, three too many."""
    state = make_state("torchvision")
    del state[MISSING]
    state[BAD] = torch.zeros(7)
    return {**state, **{name: torch.zeros(1) for name in EXTRA}}


def test_all_misfits_are_listed(misfit):
    with pytest.raises(ValueError) as caught:
        convert(misfit)
    lines = str(caught.value).splitlines()
    assert lines[0] == "5 tensor(s) do not fit between torchvision's FCOS and ours:"
    assert lines[1:-1] == [
        "  left over, head.mask (2): head.mask.weight, head.mask.bias",
        "  left over, neck.weight (1): neck.weight",
        f"  missing, box_tower (1): {MISSING}",
        f"  wrong shape, box_tower (1): {BAD} (7,), not (256,)",
    ]
    assert "--partial" in lines[-1]


def test_partial_takes_tensors_that_fit(misfit, make_state):
    whole = convert(make_state("torchvision"))
    converted = convert(misfit, partial=True)
    gone = {
        "proposal_generator.head.box_tower.0.weight",
        "proposal_generator.head.box_tower.3.bias",
    }
    assert converted.weights.keys() == whole.weights.keys() - gone
    assert converted.cfg == whole.cfg
    counts = Counter(tensor.status for tensor in converted.tensors)
    expected = {"loaded": len(whole.tensors) - 2, "missing": 1, "wrong shape": 1, "left over": 3}
    assert counts == expected


def test_partial_without_a_class_predictor(make_state):
    state = {k: x for k, x in make_state("detectron2").items() if "cls_score" not in k}
    converted = convert(state, partial=True, class_names=["a", "b"])
    assert converted.class_names == ["a", "b"] and converted.num_outputs == 0
    assert not any("cls_score" in name for name in converted.weights)


def test_rows_of_weight_and_bias_that_differ_in_number(make_state):
    state = {**make_state("detectron2"), "head.cls_score.bias": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"wrong shape, cls_score \(1\): .*cls_score.bias \(5,\)"):
        convert(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": ["a", "b"]}, "has 3 outputs, but there are 2 class names: name 3 "),
        # An override of the architecture is compared with the tensors.
        (
            {"overrides": {"MODEL.FCOS.NUM_CLS_CONVS": 3}},
            r"missing, cls_tower \(4\): head\.cls_subnet\.6\.weight",
        ),
        ({"overrides": {"MODEL.RESNETS.DEPTH": 51}}, "network of its keys can't be built.*51"),
    ],
)
def test_options_that_do_not_fit(make_state, options, message):
    with pytest.raises(ValueError, match=message):
        convert(make_state("detectron2"), **options)


def test_the_status_table(misfit):
    lines = status_table(convert(misfit, partial=True).tensors).splitlines()
    headers = re.split(r"\s{2,}", lines[0].strip())
    assert headers == ["tensors", "loaded", "filled", "missing", "wrong shape", "left over"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    # Four convolutions with norm, weight and bias each; one is missing, one has another shape.
    assert rows["cls_tower"] == ["16"] and rows["box_tower"] == ["14", "1", "1"]
    assert rows["fpn"] == ["12"] and rows["top_block"] == ["4"] and rows["stem"] == ["5"]
    assert rows["head.mask"] == ["2"] and rows["neck.weight"] == ["1"]
    loaded = sum(int(row[0]) for group, row in rows.items() if "." not in group and group != "all")
    assert rows["all"] == [str(loaded), "1", "1", "3"]


@pytest.fixture
def files(make_state, tmp_path):
    state = make_state("torchvision")
    torch.save({"model": state}, tmp_path / "a.pth")
    return tmp_path / "a.pth", tmp_path / "out" / "b.pth", state


def test_the_file_that_is_written(files):
    src, dst, state = files
    converted = convert_file(src, dst, class_names=["a", "b", "c"])
    assert isinstance(converted, Converted)
    content = torch.load(dst, weights_only=True)
    assert content.keys() == {"model", "class_names", "cfg", "source"}
    assert content["class_names"] == ["a", "b", "c"] and content["source"] == "torchvision"
    assert content["cfg"] == converted.cfg
    assert content["model"].keys() == converted.weights.keys()
    ours = content["model"]["proposal_generator.head.cls_score.weight"]
    assert torch.equal(ours, state["head.classification_head.cls_logits.weight"][1:])


def test_a_failure_leaves_the_old_file_and_nothing_else(files, monkeypatch):
    src, dst, _ = files
    dst.parent.mkdir()
    dst.write_bytes(b"old")
    whole = src.read_bytes()
    src.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.pth can't be read"):
        convert_file(src, dst)
    src.write_bytes(whole)

    def fail(content, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        convert_file(src, dst)
    assert dst.read_bytes() == b"old"
    assert os.listdir(dst.parent) == ["b.pth"]


def test_an_error_names_the_file_and_writes_nothing(files):
    src, dst, state = files
    torch.save({k: x for k, x in state.items() if "layer2.1" not in k}, src)
    with pytest.raises(ValueError, match=r"a\.pth: 10 tensor\(s\) do not fit") as caught:
        convert_file(src, dst)
    assert "backbone.body.layer2.1.conv2.weight" in str(caught.value)
    assert not dst.parent.exists()


def test_invalid_file_names(files):
    src, dst, _ = files
    link = src.with_name("link.pth")
    link.symlink_to(src)
    before = src.read_bytes()
    for same in (src, link, src.parent / "out" / ".." / "a.pth"):
        with pytest.raises(ValueError, match="is the file to convert: name another"):
            convert_file(src, same)
    with pytest.raises(ValueError, match=r"needs the suffix \.pth"):
        convert_file(src, dst.with_suffix(".pkl"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such file"):
        convert_file(src.with_name("nowhere.pth"), dst)
    assert src.read_bytes() == before and not dst.exists()
