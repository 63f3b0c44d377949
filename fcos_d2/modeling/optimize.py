"""`optimize_for_inference`: a copy of a trained model that detects the same, faster."""

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
    """Copy a model for inference alone.

    The backbone and the head compute in ``dtype``, all but the last convolution of the classes: it
    and the decoder stay in float32. Scores rounded to half precision are often equal, so that their
    order is lost.

    Args:
        model: an :class:`FCOS`, or another of Detectron2's meta architectures with a
            :class:`FCOSProposalGenerator`: a ``ProposalNetwork``, or a ``GeneralizedRCNN``, whose
            ROI heads take float32 alone. It is not changed.
        dtype: float32, bfloat16, or float16 on CUDA.
        channels_last: keep weights and feature maps channel after channel at each pixel; False
            leaves the weights as they lie.
        fold_bn: make batch norms, trained and frozen ones, part of the convolutions before them:
            those of Detectron2's ``Conv2d`` and those of the head. Other norms stay.
        compile: compile backbone and head at the first image, for any number of images and any
            size, by ``torch.compile``. On the CPU that needs a C++ compiler and Python's headers,
            on CUDA Triton. It is compiled again for a batch of one, for feature maps that are one
            cell high or wide and, on the CPU, where a feature map passes the size from which
            PyTorch has another convolution for it: 80 cells with 256 channels.

    Returns:
        The copy, in eval mode; its parameters have no gradients.

    Raises:
        ValueError: another model, or a precision that is unknown or that does not work there.
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
        # The images need no hook: a convolution takes the memory format of its weights.
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
            f"A {type(model).__name__} can't be optimized for inference (TEST.OPTIMIZE): it has no "
            "`backbone` or no `proposal_generator` with an FCOSHead. A model wrapped for "
            "distributed training is its `.module`."
        )
    return head


def _check_model(model: nn.Module, dtype: torch.dtype) -> None:
    _fcos_head(model)
    if dtype not in PRECISIONS.values():
        raise ValueError(f"dtype is {dtype}, not one of {tuple(PRECISIONS.values())}.")
    if hasattr(model, "roi_heads") and dtype != torch.float32:
        raise ValueError(
            f"The ROI heads of a {type(model).__name__} take features of float32, not {dtype}: set "
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
    """Whether it computes in bfloat16; True where PyTorch does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # recent PyTorch
        features = torch.cpu.get_capabilities()
        return any(value for name, value in features.items() if name.endswith("bf16"))
    return True


def _check_compiler(device: torch.device) -> None:
    """Compile something small: nothing else says for sure that the tools are there."""
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
    """A convolution and the batch norm of each level become one convolution a level."""
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
    # Without statistics it takes those of the batch, in eval mode too.
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
    """Put backbone and head into ``dtype``; what follows another precision casts its input."""
    backbone, head = model.get_submodule("backbone"), _fcos_head(model)
    for module in (backbone, head):
        module.to(dtype)
    head.cls_score.float()
    for module in (backbone, head.cls_score):
        module.register_forward_pre_hook(_cast_input)


def _cast_input(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].to(next(module.parameters()).dtype),)
