"""The model of FCOS_R50_VOC.yaml in Python; data, input, schedule and test are that recipe's.

Of the recipe's MODEL node only WEIGHTS and DEVICE count. On the command line KEY VALUE pairs change
what the recipe has, and ``model.x.y=value`` what is here.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, ResNet
from detectron2.modeling.backbone import BasicStem

from fcos_d2.modeling import (
    FCOS,
    CenterSamplingMatcher,
    FCOSDecoder,
    FCOSHead,
    FCOSProposalGenerator,
    TopBlock,
)

recipe = "../FCOS_R50_VOC.yaml"

strides = [8, 16, 32, 64, 128]

model = L(FCOS)(
    backbone=L(FPN)(
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
