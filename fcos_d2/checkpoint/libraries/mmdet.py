"""mmdet's ``FCOS`` with ``FCOSHead`` (MMDetection 2.x, 3.x); see the package's docstring."""

import re
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

from torch import Tensor

from ..config_text import read_sections
from ..resnet import FPN_NAME, count_blocks, torchvision_resnet_name

FEWEST_TOP_LEVELS = 1

# Current names, and those of the first versions.
_PREDICTORS = {
    "cls_score": ("conv_cls", "fcos_cls"),
    "box_pred": ("conv_reg", "fcos_reg"),
    "centerness": ("conv_centerness", "fcos_centerness"),
}
_TOWERS = {"cls_tower": "cls_convs", "box_tower": "reg_convs"}

# Configs of two of its recipes, by name.
_PLAIN = "fcos_r50-caffe_fpn_gn-head_1x_coco"
_TRICKS = "fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco"
_CAFFE = {"backbone": {"style": "caffe"}, "neck": {"relu_before_extra_convs": True}}
_PIXELS = {"std": [1.0, 1.0, 1.0], "bgr_to_rgb": False, "pad_size_divisor": 32}
_RECIPES: dict[str, dict[str, Any]] = {
    _PLAIN: {
        **_CAFFE,
        "data_preprocessor": {**_PIXELS, "mean": [102.9801, 115.9465, 122.7717]},
        "bbox_head": {"norm_on_bbox": False, "centerness_on_reg": False},
        "test_cfg": {"nms": {"iou_threshold": 0.5}},
    },
    _TRICKS: {
        **_CAFFE,
        "data_preprocessor": {**_PIXELS, "mean": [103.53, 116.28, 123.675]},
        "bbox_head": {"norm_on_bbox": True, "centerness_on_reg": True},
        "test_cfg": {"nms": {"iou_threshold": 0.6}},
    },
}
_NO_CONFIG_NOTE = (
    "There is no readable config in the file (meta.cfg): settings that shapes do not show are from "
    "the recipe {recipe}. If the model was trained with others, set MODEL.PIXEL_MEAN, "
    "MODEL.PIXEL_STD, INPUT.FORMAT, MODEL.RESNETS.STRIDE_IN_1X1, MODEL.FCOS.BOX_ACTIVATION (relu "
    "with norm_on_bbox), MODEL.FCOS.CENTERNESS_ON_CLS (False with centerness_on_reg) and "
    "MODEL.FCOS.NMS_THRESH_TEST (0.6 where that was set)."
)

# Sections of a config that are read.
_SECTIONS = ("model", "test_cfg", "data_preprocessor", "img_norm_cfg")
# Options of its model with one supported value, which is the default.
_FIXED = {
    "bbox_head.norm_cfg.num_groups": 32,
    "bbox_head.loss_cls.use_sigmoid": True,
    "neck.act_cfg": None,
    "neck.upsample_cfg.mode": "nearest",
}


def recognise(names: Iterable[str]) -> bool:
    parts = tuple(f"bbox_head.{part}." for part in _PREDICTORS["centerness"])
    return any(name.startswith(parts) for name in names)


def rename(name: str, state: Mapping[str, Tensor]) -> str:
    if name.startswith("backbone.bottom_up."):
        return "backbone." + torchvision_resnet_name(name.removeprefix("backbone.bottom_up."))
    top = re.fullmatch(r"backbone\.top_block\.p([67])\.(\w+)", name)
    if top:
        number = int(top[1]) - 6 + count_blocks("neck.lateral_convs", state)
        return f"neck.fpn_convs.{number}.conv.{top[2]}"
    fpn = FPN_NAME.fullmatch(name)
    if fpn:
        kind, level, norm, rest = fpn.groups()
        # From the finest level to level 5.
        number = int(level) - 6 + count_blocks("neck.lateral_convs", state)
        part = f"neck.{'lateral' if kind == 'lateral' else 'fpn'}_convs.{number}"
        return f"{part}.{_norm_name(part, state) if norm else 'conv'}.{rest}"
    part, _, rest = name.removeprefix("proposal_generator.head.").partition(".")
    if part in _TOWERS:
        return _rename_in_tower(f"bbox_head.{_TOWERS[part]}", rest, state)
    theirs = [f"bbox_head.{one}.{rest}" for one in _PREDICTORS.get(part, (part,))]
    return next((one for one in theirs if one in state), theirs[0])


def options(
    checkpoint: Mapping[str, Any], state: Mapping[str, Tensor], architecture: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Take the options from the config in the file, or else from a recipe.

    Raises:
        ValueError: an option that this package does not support.
    """
    recipe = _recipe(state)
    config, notes = _read_config(checkpoint)
    if "model" not in config:
        notes.append(_NO_CONFIG_NOTE.format(recipe=recipe))
    model = config.get("model", _RECIPES[recipe])
    _check_model(model, architecture)
    head = _section(model, "bbox_head")
    keys = {
        **_input_options(config, model, recipe, notes),
        "MODEL.RESNETS.STRIDE_IN_1X1": _section(model, "backbone").get("style") == "caffe",
        "MODEL.FCOS.BOX_ACTIVATION": "relu" if head.get("norm_on_bbox") else "exp",
        "MODEL.FCOS.CENTERNESS_ON_CLS": not head.get("centerness_on_reg"),
        "MODEL.FCOS.SCORE": "product",
        "MODEL.FCOS.SCORE_THRESH_ON": "cls",
        "MODEL.FCOS.TOPK_ON": "cls",
        **_top_options(_section(model, "neck")),
        **_test_options(config, model, notes),
    }
    return keys, notes


def class_names(checkpoint: Mapping[str, Any], num_outputs: int) -> list[str]:
    meta = _section(checkpoint, "meta")
    dataset = _section(meta, "dataset_meta") or meta  # 3.x, 2.x
    names = dataset.get("classes") or dataset.get("CLASSES") or ()
    return [names] if isinstance(names, str) else [str(name) for name in names]  # a single class


def _rename_in_tower(tower: str, rest: str, state: Mapping[str, Tensor]) -> str:
    """Return their name in ``tower``; ``rest`` is ours: index in the sequence, [level,] tensor."""
    norm = _norm_name(f"{tower}.0", state)
    number, *level, kind = rest.split(".")
    index, place = divmod(int(number), 3 if norm else 2)
    if place == 0 and not level:
        return f"{tower}.{index}.conv.{kind}"
    # It has one batch norm for all levels, we have one per level.
    if place == 1 and bool(level) == (norm == "bn"):
        return f"{tower}.{index}.{norm}.{kind}"
    return f"{tower}.{rest}"


def _norm_name(part: str, state: Mapping[str, Tensor]) -> str:
    return next((norm for norm in ("gn", "bn") if f"{part}.{norm}.weight" in state), "")


def _recipe(state: Mapping[str, Tensor]) -> str:
    """Return the recipe that tensors show: only one of them has biases before norms."""
    first = "bbox_head.cls_convs.0"
    return _TRICKS if _norm_name(first, state) and f"{first}.conv.bias" in state else _PLAIN


def _read_config(checkpoint: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the sections of the config and a remark on the unreadable parts of them."""
    meta = _section(checkpoint, "meta")
    text = meta.get("cfg") or meta.get("config")  # 3.x, 2.x
    config, unread = read_sections(text if isinstance(text, str) else "", _SECTIONS)
    return config, [f"Unreadable in its config, so ignored: {', '.join(unread)}."] if unread else []


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _type(section: Mapping[str, Any], default: str) -> str:
    """Return the name of a section's class without its modules."""
    return str(section.get("type", default)).rpartition(".")[2]


def _check_model(model: Mapping[str, Any], architecture: Mapping[str, Any]) -> None:
    neck, head = _section(model, "neck"), _section(model, "bbox_head")
    head_type = _type(head, "FCOSHead")
    levels = architecture["MODEL.FCOS.IN_FEATURES"]
    strides = [2 ** int(level[1:]) for level in levels]
    their_strides = head.get("strides", strides)
    lacks_relu = "p7" in levels and not neck.get("relu_before_extra_convs")
    is_lateral = neck.get("add_extra_convs") == "on_lateral"
    problems = {
        f"its bbox_head is a {head_type}": head_type != "FCOSHead",
        "its neck computes P7 without a ReLU on P6 (relu_before_extra_convs)": lacks_relu,
        "its neck computes P6 from a lateral convolution (add_extra_convs)": is_lateral,
        f"its strides are {their_strides}, not {strides}": their_strides != strides,
    }
    for path, wanted in _FIXED.items():
        *sections, option = path.split(".")
        value = reduce(_section, sections, model).get(option, wanted)
        problems[f"its {path} is {value}, not {wanted}"] = value != wanted
    found = [problem for problem, exists in problems.items() if exists]
    if found:
        raise ValueError(f"its config is of an FCOS that is not supported: {'; '.join(found)}.")


def _top_options(neck: Mapping[str, Any]) -> dict[str, Any]:
    """Return the input of P6, or nothing if only shapes show it."""
    source = neck.get("add_extra_convs")
    if not source:
        return {}
    if source is True:  # early 2.x had a second option
        source = "on_input" if neck.get("extra_convs_on_inputs", True) else "on_output"
    return {"MODEL.FCOS.TOP_BLOCK_IN_FEATURE": "p5" if source == "on_output" else "res5"}


def _input_options(
    config: Mapping[str, Any], model: Mapping[str, Any], recipe: str, notes: list[str]
) -> dict[str, Any]:
    # In 3.x in the model or beside it, in 2.x beside it under another name.
    found = _section(model, "data_preprocessor") or _section(config, "data_preprocessor")
    if not found and "img_norm_cfg" in config:
        norm = config["img_norm_cfg"]
        found = {**norm, "bgr_to_rgb": norm.get("to_rgb", True), "pad_size_divisor": 32}
    if not (found.get("mean") and found.get("std")):
        found = _RECIPES[recipe]["data_preprocessor"]
        notes.append(
            "The config in the file has no mean and std of pixels: those of the recipe "
            f"{recipe} are used (MODEL.PIXEL_MEAN, MODEL.PIXEL_STD, INPUT.FORMAT)."
        )
    divisor = found.get("pad_size_divisor", 1)
    if divisor != 32:
        notes.append(
            f"It pads images to multiples of {divisor} pixels (pad_size_divisor), this package to "
            "multiples of 32: predictions near the padding differ."
        )
    return {
        "MODEL.PIXEL_MEAN": [float(x) for x in found["mean"]],
        "MODEL.PIXEL_STD": [float(x) for x in found["std"]],
        "INPUT.FORMAT": "RGB" if found.get("bgr_to_rgb") else "BGR",
    }


def _test_options(
    config: Mapping[str, Any], model: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    # Beside the model early in 2.x; the section there in 3.x has none of these keys.
    found = _section(model, "test_cfg") or _section(config, "test_cfg")
    nms = _section(found, "nms")
    nms_type, min_size = _type(nms, "nms"), found.get("min_bbox_size", 0)
    if nms_type != "nms":
        notes.append(f"Its {nms_type} is replaced by plain NMS.")
    if nms.get("class_agnostic"):
        notes.append("Its class_agnostic NMS is replaced by class-wise NMS.")
    if min_size:
        notes.append(f"Its min_bbox_size {min_size} is replaced by 0: only empty boxes drop out.")
    return {
        "MODEL.FCOS.SCORE_THRESH_TEST": float(found.get("score_thr", 0.05)),
        "MODEL.FCOS.TOPK_CANDIDATES_TEST": int(found.get("nms_pre", 1000)),
        "MODEL.FCOS.NMS_THRESH_TEST": float(nms.get("iou_threshold", nms.get("iou_thr", 0.5))),
        "TEST.DETECTIONS_PER_IMAGE": int(found.get("max_per_img", 100)),
    }
