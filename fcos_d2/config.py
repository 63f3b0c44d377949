"""Config keys that fcos_d2 adds to Detectron2's; the source of docs/configuration.md."""

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode as CN
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN

logger = logging.getLogger(__name__)

# Keys of earlier versions. A config.yaml that sets one still loads; yacs warns and ignores it.
REMOVED_KEYS = (
    "MODEL.LAZY",
    "MODEL.FCOS.STATIC_SHAPES",
    "INPUT.REDUCED_JPEG_TEST",
    "TEST.COMPILE",
)
# Registered names of earlier versions, changed because AdelaiDet and CenterMask2 have them too.
_RENAMED_BACKBONES = {"build_fcos_resnet_fpn_backbone": "build_resnet_fcos_fpn_backbone"}


# tools/config_page.py turns this function into the page: a comment that ends with a blank line is
# a heading, the comment directly above a key describes that key.
def add_fcos_config(cfg: CN) -> None:
    """Add every key that fcos_d2 reads to ``cfg`` in place, with its default value.

    Names follow Detectron2's ``MODEL.RETINANET`` and ``MODEL.RPN`` where the meaning is the same.
    """
    cfg.MODEL.FCOS = CN()

    # Model

    # Number of foreground classes. `-1` takes it from the class names of `DATASETS.TRAIN`.
    cfg.MODEL.FCOS.NUM_CLASSES = -1
    # Predict one class, `object`, whatever the classes of the data. For region proposals.
    cfg.MODEL.FCOS.CLASS_AGNOSTIC = False
    # Feature maps of the backbone that the head runs on, finest first.
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Input of P6: `p5` (output of the FPN) or `res5` (input of the FPN). Where `FPN.IN_FEATURES`
    # ends with `res4`, input of P5: `p4` or `res4`.
    cfg.MODEL.FCOS.TOP_BLOCK_IN_FEATURE = "p5"
    # Keep weights and feature maps in channels-last memory format, in training and inference.
    # Faster for half precision on GPUs. Applies to `Trainer` and `Predictor`; elsewhere call
    # `model.to(memory_format=torch.channels_last)`.
    cfg.MODEL.CHANNELS_LAST = False

    # Head

    # Number of 3x3 convolutions shared by both towers.
    cfg.MODEL.FCOS.NUM_SHARED_CONVS = 0
    # Number of 3x3 convolutions in the classification tower.
    cfg.MODEL.FCOS.NUM_CLS_CONVS = 4
    # Number of 3x3 convolutions in the box tower.
    cfg.MODEL.FCOS.NUM_BOX_CONVS = 4
    # Normalization after each of these convolutions: any name that `detectron2.layers.get_norm`
    # accepts, or `""` for none. BatchNorm variants (`BN`, `SyncBN`, `naiveSyncBN`) get one layer
    # per level, because statistics differ between levels.
    cfg.MODEL.FCOS.NORM = "GN"
    # Activation of the box regression: `relu` gives distances in strides, `exp` distances in pixels
    # (early versions of the original repository, default of mmdet).
    cfg.MODEL.FCOS.BOX_ACTIVATION = "relu"
    # Multiply the box regression by a learned scalar per level.
    cfg.MODEL.FCOS.USE_SCALE = False
    # Target of the quality branch: `centerness`, `iou` (of the predicted box with its ground truth;
    # no gradient flows to the box), or `none` for no such branch.
    cfg.MODEL.FCOS.QUALITY = "centerness"
    # Predict the quality from the classification tower instead of the box tower.
    cfg.MODEL.FCOS.CENTERNESS_ON_CLS = False
    # Initial foreground probability, set through the class bias (pi of the focal loss paper).
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01

    # Locations and matching

    # Position of a location inside its cell, in strides: cell (i, j) has its location at
    # `((j + offset) * stride, (i + offset) * stride)`. torchvision's weights need 0.
    cfg.MODEL.FCOS.LOCATION_OFFSET = 0.5
    # Distance between neighboring locations: `stride`, or `image` for the size of the padded image
    # divided by the size of the feature map, rounded down (torchvision).
    cfg.MODEL.FCOS.LOCATION_STEP = "stride"
    # Half side, in strides, of the square around a box center whose locations are positive. 0 or
    # less: the whole box.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # Bounds, in pixels, between the ranges of max(l, t, r, b) of consecutive levels. One fewer than
    # `IN_FEATURES`.
    cfg.MODEL.FCOS.SIZES_OF_INTEREST = [64, 128, 256, 512]

    # Losses

    # Alpha of the focal loss: the weight of positives; negatives have 1 - alpha.
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    # Gamma of the focal loss.
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # Box loss: `giou`, `iou` (-ln IoU, as in the paper), `diou` or `ciou`.
    cfg.MODEL.FCOS.BOX_LOSS = "giou"
    # `centerness` weights the box loss of each positive by its centerness target, as the original
    # repository does; `none` weights all positives equally.
    cfg.MODEL.FCOS.BOX_LOSS_WEIGHT = "none"

    # Inference

    # Reported score: `sqrt` of class probability times quality, or their `product` (mmdet).
    cfg.MODEL.FCOS.SCORE = "sqrt"
    # Minimum score of a candidate; `SCORE_THRESH_ON` names the score that is compared.
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.05
    # Score that the threshold applies to: `score`, the reported one, or `cls`, the class
    # probability alone (AdelaiDet, mmdet).
    cfg.MODEL.FCOS.SCORE_THRESH_ON = "score"
    # Maximum number of candidates per level before NMS. After NMS, `TEST.DETECTIONS_PER_IMAGE`.
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    # Score by which these candidates are chosen: `score` or `cls` (mmdet).
    cfg.MODEL.FCOS.TOPK_ON = "score"
    # Clip boxes to the image before NMS; `False` clips them afterwards (Detectron2, AdelaiDet).
    cfg.MODEL.FCOS.CLIP_BEFORE_NMS = True
    # IoU threshold of the class-wise NMS.
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6

    # Data

    # Skip empty and inverted boxes and boxes outside their image, and log how many, instead of
    # raising an error.
    cfg.DATASETS.SKIP_BAD_BOXES = False
    # Role of VOC's difficult objects in training: `ignore` (no classification loss at the locations
    # that the box would claim), `train` (as any object) or `drop` (background).
    cfg.INPUT.DIFFICULT = "ignore"
    # Role of COCO's crowd regions in training: `ignore` (no classification loss at the locations
    # around the region's center that it would claim, not in the whole region) or `drop`
    # (background).
    cfg.INPUT.CROWD = "ignore"
    # Jitter brightness, contrast and saturation in training, each by a random factor between
    # 1 - COLOR_JITTER and 1 + COLOR_JITTER.
    cfg.INPUT.COLOR_JITTER = 0.0
    # Decode JPEG files at 1/2, 1/4 or 1/8 of their size in training where the resize that follows
    # shrinks them at least that much. Has no effect with `INPUT.CROP`, which crops before resizing.
    cfg.INPUT.REDUCED_JPEG_TRAIN = True

    # Training

    # Batch size for which `BASE_LR`, `MAX_ITER`, `STEPS`, ... were chosen. A different
    # `IMS_PER_BATCH` scales them by the linear rule. 0 disables scaling.
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0
    # Half-precision type with `SOLVER.AMP.ENABLED`: `float16`, `bfloat16`, or `auto` for float16 on
    # CUDA and bfloat16 on the CPU.
    cfg.SOLVER.AMP.PRECISION = "auto"
    # Metric by which `model_best.pth` is chosen, the higher the better. Named as in `metrics.json`,
    # of the first test set unless it starts with the name of another (`<dataset>/bbox/AP`). For a
    # `ProposalNetwork`: `box_proposals/AR@1000`. `""` keeps no best model.
    cfg.TEST.BEST_METRIC = "bbox/AP"
    # Stop training after this many consecutive evaluations without a better `BEST_METRIC`.
    # 0 disables early stopping.
    cfg.TEST.EARLY_STOP_PATIENCE = 0
    cfg.MODEL_EMA = CN()
    # Keep an exponential moving average of the weights. Evaluations use the average, and
    # checkpoints store it as their model.
    cfg.MODEL_EMA.ENABLED = False
    # Weight of the previous average in each update; the average spans about 1 / (1 - DECAY)
    # iterations. In iteration t at most (1 + t) / (10 + t), which stays below 0.999 until 8990.
    cfg.MODEL_EMA.DECAY = 0.999

    # Evaluation and prediction

    # Optimize the model for inference in `--eval-only` and `demo.py` (not in the evaluations during
    # training): `none`, or the precision of the convolutions: `float32`, `bfloat16` or `float16`
    # (CUDA only). `+compile` after the precision (`bfloat16+compile`) also compiles backbone and
    # head: minutes at the start, faster afterwards.
    cfg.TEST.OPTIMIZE = "none"

    for key in REMOVED_KEYS:
        if key not in cfg.__dict__[CN.DEPRECATED_KEYS]:  # registering a key twice is an error
            cfg.register_deprecated_key(key)


def update_names(cfg: CN) -> None:
    """Replace the registered names of earlier versions in place.

    Call it on a config read from a file of unknown age. An alias in the registry would stop
    AdelaiDet from registering its own backbone of that name.

    Raises:
        ValueError: the model was a lazy config, stored in MODEL.LAZY.
    """
    if cfg.MODEL.META_ARCHITECTURE == "LazyModel":
        raise ValueError(
            "MODEL.META_ARCHITECTURE is LazyModel: this is the config.yaml of a lazy-config run "
            "of an earlier version. Write a lazy config with that model, like "
            "configs/lazy/fcos_r50_voc.py, and use tools/lazyconfig_train_net.py."
        )
    old = cfg.MODEL.BACKBONE.NAME
    if old in _RENAMED_BACKBONES:
        cfg.MODEL.BACKBONE.NAME = _RENAMED_BACKBONES[old]
        logger.info("MODEL.BACKBONE.NAME %s was renamed to %s.", old, _RENAMED_BACKBONES[old])


def check_option(key: str, value: str, known: tuple[str, ...]) -> None:
    """Raise a ``ValueError`` if the value of a config key is not a known one."""
    if value not in known:
        raise ValueError(f"{key} is {value!r}, not one of {known}.")


def get_num_classes(cfg: CN) -> int:
    """Return ``MODEL.FCOS.NUM_CLASSES`` or, for -1, the number of classes of DATASETS.TRAIN.

    With ``MODEL.FCOS.CLASS_AGNOSTIC`` it is 1. Class names are read from Detectron2's
    ``MetadataCatalog``, which knows those of ``voc:...`` and other sources of this package after
    ``fcos_d2.data.register_source``.

    Raises:
        ValueError: -1, and the catalog has no class names.
    """
    if cfg.MODEL.FCOS.CLASS_AGNOSTIC:
        return 1
    if cfg.MODEL.FCOS.NUM_CLASSES != -1:
        return cfg.MODEL.FCOS.NUM_CLASSES
    for name in cfg.DATASETS.TRAIN:
        class_names = MetadataCatalog.get(name).get("thing_classes")
        if class_names:
            return len(class_names)
    raise ValueError(
        "MODEL.FCOS.NUM_CLASSES is -1 (take it from the data), but no class names are known for "
        f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}: set the number, or call "
        "fcos_d2.data.register_source on these names before the model is built."
    )


def class_nodes(cfg: CN) -> dict[str, CN]:
    """Return the nodes with a NUM_CLASSES for the classes of the data, by name."""
    nodes = {"MODEL.FCOS": cfg.MODEL.FCOS}
    if _has_roi_heads(cfg):
        nodes["MODEL.ROI_HEADS"] = cfg.MODEL.ROI_HEADS
    return nodes


def set_num_classes(cfg: CN, source: str, class_names: Sequence[str]) -> None:
    """Set each NUM_CLASSES that is -1 to the number of classes of the data, and check the others.

    Args:
        cfg: not frozen.
        source: name of the data set.
        class_names: its classes.

    Raises:
        ValueError: another number.
    """
    count = len(class_names)
    for name, node in class_nodes(cfg).items():
        if node.NUM_CLASSES not in (-1, count):
            raise ValueError(
                f"{name}.NUM_CLASSES is {node.NUM_CLASSES}, but {source} has {count} classes "
                f"({', '.join(class_names)}): set it to {count}, or to -1 to take it from the data."
            )
        node.NUM_CLASSES = count


def check_training(cfg: CN) -> None:
    """Check that the meta architecture can be trained on the data loader's output.

    Raises:
        ValueError: ROI heads, which do not support ignored objects, or which need masks or
            keypoints.
    """
    if not _has_roi_heads(cfg):
        return
    name = cfg.MODEL.META_ARCHITECTURE
    for key in ("INPUT.DIFFICULT", "INPUT.CROWD"):
        if cfg.INPUT[key.split(".")[1]] == "ignore":
            raise ValueError(
                f"{key} is 'ignore', but the ROI heads of MODEL.META_ARCHITECTURE {name} do "
                "not support ignored objects and would be trained on them: set it to 'drop'."
            )
    for key in ("MASK_ON", "KEYPOINT_ON"):
        if cfg.MODEL[key]:
            raise ValueError(
                f"MODEL.{key} is True, but the data sets of this package hold boxes only: set it "
                "to False."
            )


def _has_roi_heads(cfg: CN) -> bool:
    meta_arch = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return isinstance(meta_arch, type) and issubclass(meta_arch, GeneralizedRCNN)
