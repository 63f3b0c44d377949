"""What the meta architecture asks of a config and of the data."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN

from .lazy import NUM_CLASSES

# Objects that FCOS trains neither as an object nor as background.
_IGNORED = ("INPUT.DIFFICULT", "INPUT.CROWD")


def class_nodes(cfg: CfgNode) -> dict[str, CfgNode]:
    """Return the nodes, by name, whose NUM_CLASSES is the number of classes of the data."""
    nodes = {"MODEL.FCOS": cfg.MODEL.FCOS}
    if _has_roi_heads(cfg):
        nodes["MODEL.ROI_HEADS"] = cfg.MODEL.ROI_HEADS
    return nodes


def set_num_classes(cfg: CfgNode, source: str, class_names: Sequence[str]) -> None:
    """Check that the model is for as many classes as the data has; -1 takes the number from them.

    Args:
        cfg: not frozen; MODEL.FCOS.NUM_CLASSES is set, and MODEL.ROI_HEADS.NUM_CLASSES in a model
            with ROI heads.
        source: name of the data set.
        class_names: its classes.

    Raises:
        ValueError: another number, with the key to set.
    """
    count = len(class_names)
    for name, node in class_nodes(cfg).items():
        key, advice = f"{name}.NUM_CLASSES", f"it to {count}, or to -1 to take it from the data"
        if cfg.MODEL.LAZY:
            key, advice = NUM_CLASSES, f"{NUM_CLASSES}={count}"
        if node.NUM_CLASSES not in (-1, count):
            raise ValueError(
                f"{key} is {node.NUM_CLASSES}, but {source} has {count} classes "
                f"({', '.join(class_names)}): set {advice}."
            )
        node.NUM_CLASSES = count


def check_training(cfg: CfgNode) -> None:
    """Check that the meta architecture can be trained on what the data loader gives.

    Raises:
        ValueError: ROI heads, which would train ignored objects as real ones, or which need masks
            or keypoints.
    """
    if not _has_roi_heads(cfg):
        return
    name = cfg.MODEL.META_ARCHITECTURE
    for key in _IGNORED:
        if cfg.INPUT[key.split(".")[1]] == "ignore":
            raise ValueError(
                f"{key} is 'ignore', but the ROI heads of MODEL.META_ARCHITECTURE {name} know no "
                "ignored objects and would be trained on them: set it to 'drop'."
            )
    for key in ("MASK_ON", "KEYPOINT_ON"):
        if cfg.MODEL[key]:
            raise ValueError(
                f"MODEL.{key} is True, but the data sets of this package hold boxes only: set it "
                "to False."
            )


def _has_roi_heads(cfg: CfgNode) -> bool:
    meta_arch = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return isinstance(meta_arch, type) and issubclass(meta_arch, GeneralizedRCNN)
