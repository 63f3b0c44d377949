"""`optimize_for_inference`: a faster copy of a trained model with the same detections."""

import copy
import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .head import FCOSHead

logger = logging.getLogger(__name__)

# Values of TEST.OPTIMIZE apart from "none" and the suffix "+compile".
PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_TOWERS = ("share_tower", "cls_tower", "box_tower")


def optimize_for_inference(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    fold_bn: bool = True,
    compile: bool = False,
) -> nn.Module:
    """Copy a model for inference only.

    Backbone and head compute in ``dtype``, except for the convolution that predicts the classes:
    it and the decoder stay in float32, because scores rounded to half precision are often equal
    and lose their order.

    Args:
        model: an :class:`FCOS`, or another meta architecture of Detectron2 with a
            :class:`FCOSProposalGenerator`: ``ProposalNetwork`` or, in float32 only,
            ``GeneralizedRCNN``. It is not modified.
        dtype: float32, bfloat16, or float16 on CUDA.
        channels_last: convert weights, and so feature maps, to channels-last memory format.
        fold_bn: fold trained and frozen batch norms of Detectron2's ``Conv2d`` and of the head
            into the preceding convolutions. Other norms stay.
        compile: compile backbone and head at the first image with ``torch.compile``, for any batch
            and image size. On the CPU this needs a C++ compiler and Python's headers, on CUDA
            Triton. They are compiled again for a batch of one, for feature maps of height or width
            1 and, on the CPU, above the size at which PyTorch switches to another convolution: 80
            cells with 256 channels.

    Returns:
        The copy, in eval mode, without gradients.

    Raises:
        ValueError: an unsupported model, or a precision that the model or device does not support.
        RuntimeError: ``torch.compile`` does not work here.
    """
    _check_model(model, dtype)
    device = next(model.parameters()).device
    _check_precision(dtype, device)
    if compile:
        _check_compiler(device)
    model = copy.deepcopy(model).requires_grad_(False)
    if fold_bn:
        _fold_batch_norms(model)
    if dtype != torch.float32:
        _set_precision(model, dtype)
    if channels_last:
        # Images need no conversion: the first convolution outputs the format of its weights.
        model.to(memory_format=torch.channels_last)
    if compile:
        model.get_submodule("backbone").compile(dynamic=True)
        _fcos_head(model).compile(dynamic=True)
    return model.eval()


def inference_options(cfg: CfgNode) -> dict | None:
    """Parse TEST.OPTIMIZE: "none", or a precision, optionally followed by "+compile".

    Returns:
        Arguments of :func:`optimize_for_inference`, or None to leave the model as it is.

    Raises:
        ValueError: an unknown value.
    """
    value = cfg.TEST.OPTIMIZE
    if value == "none":
        return None
    name = value.removesuffix("+compile")
    if name not in PRECISIONS:
        raise ValueError(
            f"TEST.OPTIMIZE is {value!r}: set it to 'none' or one of {tuple(PRECISIONS)}, "
            "optionally followed by '+compile' ('bfloat16+compile')."
        )
    return {"dtype": PRECISIONS[name], "compile": name != value}


def _fcos_head(model: nn.Module) -> FCOSHead:
    head = getattr(getattr(model, "proposal_generator", None), "head", None)
    if not isinstance(head, FCOSHead) or not hasattr(model, "backbone"):
        raise ValueError(
            f"{type(model).__name__} cannot be optimized for inference (TEST.OPTIMIZE): it has no "
            "`backbone` or no `proposal_generator` with an FCOSHead. Pass `.module` of a model "
            "that is wrapped for distributed training."
        )
    return head


def _check_model(model: nn.Module, dtype: torch.dtype) -> None:
    _fcos_head(model)
    if dtype not in PRECISIONS.values():
        raise ValueError(f"dtype is {dtype}, not one of {tuple(PRECISIONS.values())}.")
    if hasattr(model, "roi_heads") and dtype != torch.float32:
        raise ValueError(
            f"The ROI heads of {type(model).__name__} need float32 features, not {dtype}: set "
            "TEST.OPTIMIZE to 'float32'."
        )


def _check_precision(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.float16 and device.type != "cuda":
        raise ValueError(
            f"TEST.OPTIMIZE 'float16' needs CUDA, but the model is on the {device.type}: set it to "
            "'bfloat16' or 'float32'."
        )
    if dtype == torch.bfloat16 and not _has_bfloat16(device):
        logger.warning(
            "This %s has no bfloat16 instructions: TEST.OPTIMIZE 'float32' is faster.", device.type
        )


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16; True if PyTorch does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # recent PyTorch
        features = torch.cpu.get_capabilities()
        return any(value for name, value in features.items() if name.endswith("bf16"))
    return True


def _check_compiler(device: torch.device) -> None:
    """Compile a tiny function: the only reliable test of the tools."""
    try:
        torch.compile(lambda x: x.relu() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of Dynamo, Inductor, the compiler, the linker
        raise RuntimeError(
            "torch.compile (TEST.OPTIMIZE with '+compile') does not work here. On the CPU it needs "
            "a C++ compiler (g++, or the one that the variable CXX names) and Python's headers "
            f"(python3-dev), on CUDA Triton and a C compiler. Its error: {error}"
        ) from error


def _fold_batch_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Conv2d) and _is_fixed_batch_norm(module.norm):
            _fold(module, module.norm)
            module.norm = None
    head = _fcos_head(model)
    for name in _TOWERS:
        setattr(head, name, _folded_tower(getattr(head, name)))


def _folded_tower(tower: nn.ModuleList) -> nn.ModuleList:
    """Replace a convolution and its per-level batch norms by one convolution per level."""
    layers: list[nn.Module] = []
    for layer in tower:
        if isinstance(layer, nn.ModuleList) and all(_is_fixed_batch_norm(x) for x in layer):
            conv = layers.pop()
            assert isinstance(conv, nn.Conv2d)
            layers.append(nn.ModuleList(_fold(copy.deepcopy(conv), norm) for norm in layer))
        else:
            layers.append(layer)
    return type(tower)(layers)


def _is_fixed_batch_norm(norm: nn.Module | None) -> bool:
    kinds = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)
    # Without running statistics it uses those of the batch, also in eval mode.
    return isinstance(norm, kinds) and norm.running_mean is not None


def _fold(conv: nn.Conv2d, norm: Any) -> nn.Conv2d:
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    return conv


def _set_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert backbone and head to ``dtype``; modules after a change of precision cast inputs."""
    backbone, head = model.get_submodule("backbone"), _fcos_head(model)
    for module in (backbone, head):
        module.to(dtype)
    head.cls_score.float()
    for module in (backbone, head.cls_score):
        module.register_forward_pre_hook(_cast_input)


def _cast_input(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].to(next(module.parameters()).dtype),)
