"""mmdet's ``FCOS`` with ``FCOSHead`` (MMDetection 2.x and 3.x)."""

import ast
import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..resnet import torchvision_resnet_name

_PREDICTORS = {"cls_score": "conv_cls", "box_pred": "conv_reg", "centerness": "conv_centerness"}
_TOWERS = {"cls_tower": "cls_convs", "box_tower": "reg_convs"}
_FPN = re.compile(r"backbone\.fpn_(lateral|output)(\d)\.(norm\.)?(\w+)")
_NORMS = ("gn", "bn")

# The defaults of its recipe fcos_r50-caffe_fpn_gn-head_1x_coco.py.
_RECIPE: dict[str, Any] = {
    "data_preprocessor": {
        "mean": [102.9801, 115.9465, 122.7717],
        "std": [1.0, 1.0, 1.0],
        "bgr_to_rgb": False,
    },
    "backbone": {"style": "caffe"},
    "neck": {"relu_before_extra_convs": True},
    "bbox_head": {"norm_on_bbox": False, "centerness_on_reg": False},
}
_NO_CONFIG_NOTE = (
    "No config is in the file (meta.cfg): what its shapes don't tell is taken from the recipe "
    "fcos_r50-caffe_fpn_gn-head_1x_coco. If the model was trained with other settings, name "
    "MODEL.PIXEL_MEAN, MODEL.PIXEL_STD, INPUT.FORMAT, MODEL.RESNETS.STRIDE_IN_1X1, "
    "MODEL.FCOS.BOX_ACTIVATION (relu with norm_on_bbox), MODEL.FCOS.CENTERNESS_ON_CLS (False with "
    "centerness_on_reg) and MODEL.FCOS.NMS_THRESH_TEST (0.6 where that was set)."
)


def recognise(names: Iterable[str]) -> bool:
    """See :mod:`fcos_d2.checkpoint.libraries`."""
    return any(name.startswith("bbox_head.conv_centerness.") for name in names)


def rename(name: str, state: Mapping[str, Tensor]) -> str:
    """See :mod:`fcos_d2.checkpoint.libraries`."""
    if name.startswith("backbone.bottom_up."):
        return "backbone." + torchvision_resnet_name(name.removeprefix("backbone.bottom_up."))
    top = re.fullmatch(r"backbone\.top_block\.p([67])\.(\w+)", name)
    if top:
        number = int(top[1]) - 6 + _count("neck.lateral_convs", state)
        return f"neck.fpn_convs.{number}.conv.{top[2]}"
    fpn = _FPN.fullmatch(name)
    if fpn:
        kind, level, norm, rest = fpn.groups()
        # Counted from the finest level on; the last lateral one is of level 5.
        number = int(level) - 6 + _count("neck.lateral_convs", state)
        part = f"neck.{'lateral' if kind == 'lateral' else 'fpn'}_convs.{number}"
        return f"{part}.{_norm_name(part, state) if norm else 'conv'}.{rest}"
    part, _, rest = name.removeprefix("proposal_generator.head.").partition(".")
    if part in _TOWERS:
        return _rename_in_tower(f"bbox_head.{_TOWERS[part]}", rest, state)
    return f"bbox_head.{_PREDICTORS.get(part, part)}.{rest}"


def options(
    checkpoint: Mapping[str, Any], state: Mapping[str, Tensor], architecture: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """See :mod:`fcos_d2.checkpoint.libraries`: from the config in the file, else the recipe's.

    Raises:
        ValueError: the config asks for what this package's FCOS does not compute.
    """
    config = _read_config(checkpoint)
    model = config.get("model", _RECIPE)
    notes = [] if "model" in config else [_NO_CONFIG_NOTE]
    _check_model(model, architecture)
    head = _section(model, "bbox_head")
    extra = _section(model, "neck").get("add_extra_convs")
    keys = {
        **_input_options(config, model, notes),
        "MODEL.RESNETS.STRIDE_IN_1X1": _section(model, "backbone").get("style") == "caffe",
        "MODEL.FCOS.LOCATION_OFFSET": 0.5,
        "MODEL.FCOS.LOCATION_STEP": "stride",
        "MODEL.FCOS.BOX_ACTIVATION": "relu" if head.get("norm_on_bbox") else "exp",
        "MODEL.FCOS.QUALITY": "centerness",
        "MODEL.FCOS.CENTERNESS_ON_CLS": not head.get("centerness_on_reg"),
        "MODEL.FCOS.SCORE": "product",
        "MODEL.FCOS.SCORE_THRESH_ON": "cls",
        "MODEL.FCOS.TOPK_ON": "cls",
        "MODEL.FCOS.CLIP_BEFORE_NMS": True,
        **_test_options(config, model, notes),
    }
    if extra:
        keys["MODEL.FCOS.TOP_BLOCK_IN_FEATURE"] = "p5" if extra == "on_output" else "res5"
    return keys, notes


def class_names(checkpoint: Mapping[str, Any], num_slots: int) -> list[str]:
    """See :mod:`fcos_d2.checkpoint.libraries`: those in the file's ``meta``."""
    meta = _meta(checkpoint)
    dataset = meta.get("dataset_meta")
    names = meta.get("CLASSES")  # of 2.x
    if isinstance(dataset, Mapping):
        names = dataset.get("classes") or dataset.get("CLASSES")
    if isinstance(names, str):  # a single class
        names = [names]
    return [str(name) for name in names or ()]


def _rename_in_tower(tower: str, rest: str, state: Mapping[str, Tensor]) -> str:
    """``tower`` is theirs, ``rest`` ours: a number in the sequence, in it maybe a level, a kind."""
    norm = _norm_name(f"{tower}.0", state)
    number, *level, kind = rest.split(".")
    index, place = divmod(int(number), 3 if norm else 2)
    if place == 0 and not level:
        return f"{tower}.{index}.conv.{kind}"
    # Its batch norm is one for all levels, ours are one a level.
    if place == 1 and bool(level) == (norm == "bn"):
        return f"{tower}.{index}.{norm}.{kind}"
    return f"{tower}.{rest}"


def _norm_name(part: str, state: Mapping[str, Tensor]) -> str:
    return next((norm for norm in _NORMS if f"{part}.{norm}.weight" in state), "")


def _count(part: str, state: Mapping[str, Tensor]) -> int:
    numbers = re.findall(rf"^{re.escape(part)}\.(\d+)\.", "\n".join(state), re.MULTILINE)
    return 1 + max(map(int, numbers), default=-1)


def _meta(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = checkpoint.get("meta")
    return meta if isinstance(meta, Mapping) else {}


def _read_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Read the dictionaries that the config's text assigns, without running it."""
    meta = _meta(checkpoint)
    text = meta.get("cfg") or meta.get("config")  # 3.x, 2.x
    config = {}
    try:
        statements = ast.parse(text).body if isinstance(text, str) else []
        for statement in statements:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                with contextlib.suppress(ValueError):
                    config[statement.targets[0].id] = _value(statement.value)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # not the text of a config
        return {}
    return {name: value for name, value in config.items() if isinstance(value, dict)}


def _value(node: ast.expr) -> Any:
    """What an expression of constants and containers says, ``dict(key=...)`` included.

    Raises:
        ValueError: it is another expression.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {word.arg: _value(word.value) for word in node.keywords}
    if isinstance(node, ast.Dict):
        keys = [ast.literal_eval(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(_value, node.values), strict=True))
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    return ast.literal_eval(node)


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _check_model(model: Mapping[str, Any], architecture: Mapping[str, Any]) -> None:
    neck, head = _section(model, "neck"), _section(model, "bbox_head")
    levels = architecture["MODEL.FCOS.IN_FEATURES"]
    strides = [2 ** int(level[1:]) for level in levels]
    problems = []
    if head.get("type", "FCOSHead") != "FCOSHead":
        problems.append(f"its bbox_head is a {head['type']}")
    if "p7" in levels and not neck.get("relu_before_extra_convs"):
        problems.append("its neck computes P7 without a ReLU on P6 (relu_before_extra_convs)")
    if neck.get("add_extra_convs") == "on_lateral":
        problems.append("its neck computes P6 from a lateral convolution (add_extra_convs)")
    if head.get("strides", strides) != strides:
        problems.append(f"its strides are {head['strides']}, not {strides}")
    if problems:
        raise ValueError(f"the config in it is not that of an FCOS as here: {'; '.join(problems)}.")


def _input_options(
    config: Mapping[str, Any], model: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    # 3.x has it in the model or beside it, 2.x beside it under another name.
    found = _section(model, "data_preprocessor") or _section(config, "data_preprocessor")
    if not found and "img_norm_cfg" in config:
        norm = config["img_norm_cfg"]
        found = {**norm, "bgr_to_rgb": norm.get("to_rgb", True)}
    if not (found.get("mean") and found.get("std")):
        found = _RECIPE["data_preprocessor"]
        notes.append(
            "The config in the file has no mean and std of pixels: those of the recipe are taken "
            "(MODEL.PIXEL_MEAN, MODEL.PIXEL_STD, INPUT.FORMAT)."
        )
    return {
        "MODEL.PIXEL_MEAN": [float(x) for x in found["mean"]],
        "MODEL.PIXEL_STD": [float(x) for x in found["std"]],
        "INPUT.FORMAT": "RGB" if found.get("bgr_to_rgb") else "BGR",
    }


def _test_options(
    config: Mapping[str, Any], model: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    # Beside the model early in 2.x; what is there in 3.x has none of these keys.
    found = _section(model, "test_cfg") or _section(config, "test_cfg")
    nms = _section(found, "nms")
    if nms.get("type", "nms") != "nms":
        notes.append(f"Its {nms['type']} is replaced by plain NMS.")
    return {
        "MODEL.FCOS.SCORE_THRESH_TEST": float(found.get("score_thr", 0.05)),
        "MODEL.FCOS.TOPK_CANDIDATES_TEST": int(found.get("nms_pre", 1000)),
        "MODEL.FCOS.NMS_THRESH_TEST": float(nms.get("iou_threshold", 0.5)),
        "TEST.DETECTIONS_PER_IMAGE": int(found.get("max_per_img", 100)),
    }
