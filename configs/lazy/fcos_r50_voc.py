"""FCOS_R50_VOC.yaml as a lazy config, for tools/lazyconfig_train_net.py.

The model, the data, the schedule and the optimizer are those of the yaml recipe. A key can be
overridden on the command line (``train.max_iter=100``), or in another file that imports this one.
Two rules of train_net.py do not apply: the class count is not taken from the data, and another
batch size does not scale the learning rate and the schedule.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.modeling import ResNet
from detectron2.modeling.backbone import BasicStem
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler

from fcos_d2.data import DetectionDatasetMapper, build_train_loader, class_names, get_records
from fcos_d2.evaluation import DetectionEvaluator
from fcos_d2.modeling import (
    FCOS,
    CenterSamplingMatcher,
    FCOSDecoder,
    FCOSHead,
    FCOSProposalGenerator,
    ResNetFPN,
    TopBlock,
)

strides = [8, 16, 32, 64, 128]

model = L(FCOS)(
    backbone=L(ResNetFPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=True, norm="FrozenBN"),
            out_features=["res3", "res4", "res5"],
            freeze_at=2,
        ),
        in_features="${.bottom_up.out_features}",
        out_channels=256,
        top_block=L(TopBlock)(
            in_channels="${..out_channels}",
            out_channels="${..out_channels}",
            in_feature="p5",
            levels=["p6", "p7"],
        ),
    ),
    proposal_generator=L(FCOSProposalGenerator)(
        in_features=["p3", "p4", "p5", "p6", "p7"],
        strides=strides,
        head=L(FCOSHead)(
            input_shape=[
                L(ShapeSpec)(channels="${.....backbone.out_channels}", stride=stride)
                for stride in strides
            ],
            num_classes=20,
        ),
        matcher=L(CenterSamplingMatcher)(
            num_classes="${..head.num_classes}", radius=1.5, sizes_of_interest=[64, 128, 256, 512]
        ),
        decoder=L(FCOSDecoder)(),
    ),
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)

dataloader = dict(
    train=L(build_train_loader)(
        # "voc:FOLDER:SPLIT", "coco:JSON:IMAGES", ... as in DATASETS.TRAIN; several in a list
        dataset=L(get_records)(names="voc_2007_trainval"),
        mapper=L(DetectionDatasetMapper)(
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length=[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
                    max_size=1333,
                    sample_style="choice",
                ),
                L(T.RandomFlip)(),
            ],
            image_format="${model.input_format}",
            reduced_jpeg=True,
        ),
        total_batch_size=16,
        seed="${train.seed}",
        num_workers=4,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_records)(names="voc_2007_test"),
        mapper=L(DetectionDatasetMapper)(
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
            image_format="${model.input_format}",
            is_train=False,
        ),
        num_workers=4,
    ),
    evaluator=L(DetectionEvaluator)(
        dataset_name="${..test.dataset.names}",
        records="${..test.dataset}",
        class_names=L(class_names)(name="${..dataset_name}"),
    ),
)

optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),  # params.model is set later
    lr=0.01,
    momentum=0.9,
    weight_decay=1e-4,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=500 / 7500,  # as a share of train.max_iter
    warmup_factor=1e-3,
    warmup_method="linear",
)

train = dict(
    output_dir="./output/fcos_r50_voc",
    init_checkpoint="detectron2://ImageNetPretrained/MSRA/R-50.pkl",
    max_iter=7500,  # 24 epochs of 5011 images
    seed=1,
    device="cuda",
    amp=dict(enabled=False, precision="auto"),  # as SOLVER.AMP
    ema=dict(enabled=False, decay=0.999),  # as MODEL_EMA
    clip_grad_norm=10.0,  # for each parameter by itself, as SOLVER.CLIP_GRADIENTS; 0 is off
    checkpointer=dict(period=1500, max_to_keep=100),
    eval_period=1500,
    log_period=20,
)
