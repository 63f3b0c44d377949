"""The `MODEL.FCOS.*` keys (and the few solver, input and data set keys that FCOS recipes need)."""

from detectron2.config import CfgNode as CN
from detectron2.data import MetadataCatalog

# The names of the keys follow Detectron2's RETINANET and RPN nodes wherever they mean the same.


def add_fcos_config(cfg: CN) -> None:
    """Add the default values of every key that fcos_d2 reads to ``cfg``, in place."""
    # Keep weights, and so feature maps, channel after channel at each pixel (NHWC): faster
    # convolutions on GPUs with half precision. For Trainer and Predictor; elsewhere call
    # model.to(memory_format=torch.channels_last).
    cfg.MODEL.CHANNELS_LAST = False
    # A model as a Detectron2 lazy config, in YAML text; set by a --config-file that ends in .py.
    cfg.MODEL.LAZY = ""

    cfg.MODEL.FCOS = CN()
    # Number of foreground classes; -1 takes it from the class names of DATASETS.TRAIN.
    cfg.MODEL.FCOS.NUM_CLASSES = -1
    # Feature maps of the backbone that the head runs on, finest first.
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # What P6 is computed from: "p5" (the output of the FPN) or "res5" (its input). Where
    # FPN.IN_FEATURES ends with res4, what P5 is computed from: "p4" or "res4".
    cfg.MODEL.FCOS.TOP_BLOCK_IN_FEATURE = "p5"

    # Head. 3x3 convolutions that both towers share, then those of each.
    cfg.MODEL.FCOS.NUM_SHARED_CONVS = 0
    cfg.MODEL.FCOS.NUM_CLS_CONVS = 4
    cfg.MODEL.FCOS.NUM_BOX_CONVS = 4
    # Normalisation after each of them: any name that detectron2.layers.get_norm knows, "" is none.
    # Batch norms ("BN", "SyncBN", "naiveSyncBN") are one a level: levels differ in statistics.
    cfg.MODEL.FCOS.NORM = "GN"
    # How the regression becomes distances: "relu" in strides, or "exp" in pixels (as the original
    # repository did at first, and mmdet does by default).
    cfg.MODEL.FCOS.BOX_ACTIVATION = "relu"
    # Multiply the regression of each level by a learned scalar.
    cfg.MODEL.FCOS.USE_SCALE = False
    # What the extra branch predicts: "centerness", "iou" (of the predicted box with its ground
    # truth), or "none" for no such branch.
    cfg.MODEL.FCOS.QUALITY = "centerness"
    # Predict it from the classification tower instead of the box tower.
    cfg.MODEL.FCOS.CENTERNESS_ON_CLS = False
    # One class, "object", whatever the classes of the data: for region proposals.
    cfg.MODEL.FCOS.CLASS_AGNOSTIC = False
    # Foreground probability that the class bias starts at (pi of the focal loss paper).
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01

    # Assignment. A location is at ((j + offset) * stride, (i + offset) * stride).
    cfg.MODEL.FCOS.LOCATION_OFFSET = 0.5
    # Distance between two locations: "stride", or "image" for the size of the padded image divided
    # by that of the feature map, rounded down, as torchvision has it.
    cfg.MODEL.FCOS.LOCATION_STEP = "stride"
    # Half-side, in strides, of the square around a box centre that is positive; <= 0: whole box.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # Bounds in pixels between the levels' ranges of max(l, t, r, b); one fewer than IN_FEATURES.
    cfg.MODEL.FCOS.SIZES_OF_INTEREST = [64, 128, 256, 512]

    # Losses.
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # "giou", "iou" (-ln IoU, as in the paper), "diou" or "ciou".
    cfg.MODEL.FCOS.BOX_LOSS = "giou"
    # "none" or "centerness" (each positive weighted by its centerness target).
    cfg.MODEL.FCOS.BOX_LOSS_WEIGHT = "none"

    # Give every tensor of the losses a size that does not depend on the data, as a CUDA graph needs
    # it: nothing waits for the device, and nothing is logged beside the losses.
    cfg.MODEL.FCOS.STATIC_SHAPES = False

    # Inference. The score that is reported: "sqrt" of class times quality, or their "product".
    cfg.MODEL.FCOS.SCORE = "sqrt"
    # Candidates need more than this, in what SCORE_THRESH_ON says: "score", the one that is
    # reported, or "cls", the class probability alone (AdelaiDet, mmdet).
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.05
    cfg.MODEL.FCOS.SCORE_THRESH_ON = "score"
    # Best candidates kept per level before NMS, by "score" or by "cls" (mmdet). (After NMS:
    # TEST.DETECTIONS_PER_IMAGE.)
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.FCOS.TOPK_ON = "score"
    # Clip boxes to the image before NMS; False does it afterwards (Detectron2, AdelaiDet).
    cfg.MODEL.FCOS.CLIP_BEFORE_NMS = True
    # IoU threshold of the class-wise NMS.
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6

    # Half precision under SOLVER.AMP.ENABLED: "float16", "bfloat16", or "auto" for float16 on CUDA
    # and bfloat16 on the CPU.
    cfg.SOLVER.AMP.PRECISION = "auto"

    # Batch size that BASE_LR, MAX_ITER, STEPS, ... were chosen for. Another IMS_PER_BATCH scales
    # them by the linear rule; 0 switches the rule off.
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0

    # What training does with objects marked difficult (VOC): "ignore", "train" or "drop".
    cfg.INPUT.DIFFICULT = "ignore"
    # What training does with crowd regions (COCO): "ignore" or "drop".
    cfg.INPUT.CROWD = "ignore"

    # Change brightness, contrast and saturation in training, each by a factor drawn from
    # 1 - COLOR_JITTER to 1 + COLOR_JITTER.
    cfg.INPUT.COLOR_JITTER = 0.0

    # Decode JPEG files at 1/2, 1/4 or 1/8 of their size where the resizing that follows makes them
    # at least that much smaller.
    cfg.INPUT.REDUCED_JPEG_TRAIN = True
    cfg.INPUT.REDUCED_JPEG_TEST = False

    # Prepare the model for inference (--eval-only, demo.py; not the evaluations during training):
    # "none", or the precision of its convolutions: "float32", "bfloat16" or "float16" (CUDA).
    cfg.TEST.OPTIMIZE = "none"
    # Compile it as well: minutes at the start, faster afterwards.
    cfg.TEST.COMPILE = False
    # Detectron2's TEST.AUG.* (views of an image, for --eval-only and demo.py; not the evaluations
    # during training): its default sizes suit INPUT.MIN_SIZE_TEST 800, recipes set their own.
    # What the evaluations of a training are compared by, the more the better; the weights of the
    # best are kept as model_best.pth. As metrics.json names it; with several test sets the first's,
    # or "<dataset>/bbox/AP". "" keeps none. (A ProposalNetwork: "box_proposals/AR@1000".)
    cfg.TEST.BEST_METRIC = "bbox/AP"
    # Stop training after so many evaluations in a row without a better BEST_METRIC; 0: never.
    cfg.TEST.EARLY_STOP_PATIENCE = 0

    # Average the weights exponentially over the iterations. Evaluations use the average, and
    # checkpoints hold it as their model.
    cfg.MODEL_EMA = CN()
    cfg.MODEL_EMA.ENABLED = False
    # Share of the average that an iteration keeps: over about 1 / (1 - DECAY) iterations. Less in
    # the first ones: (1 + t) / (10 + t) after t, which is below 0.999 up to iteration 8990.
    cfg.MODEL_EMA.DECAY = 0.999

    # Skip boxes that are empty, inverted or outside their image, with a count, instead of an error.
    cfg.DATASETS.SKIP_BAD_BOXES = False


def get_num_classes(cfg: CN) -> int:
    """Return ``MODEL.FCOS.NUM_CLASSES``, or for -1 the number of classes of DATASETS.TRAIN.

    With ``MODEL.FCOS.CLASS_AGNOSTIC`` it is 1.

    The class names are those that Detectron2's ``MetadataCatalog`` holds: of every data set that
    Detectron2 knows by name, and of the others (``voc:...``) once ``fcos_d2.data.register_source``
    has read them, as ``train_net.py`` does.

    Raises:
        ValueError: -1, and no class names to count.
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
