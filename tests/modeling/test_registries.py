"""The names that fcos_d2 registers, beside those of other Detectron2 extensions."""

import subprocess
import sys

import pytest

# Registry and names, from the repositories on GitHub.
OTHERS = [
    # aim-uofa/AdelaiDet, commit 3672122
    ("META_ARCH", "BlendMask CondInst OneStageDetector OneStageRCNN SOLOv2"),
    ("PROPOSAL_GENERATOR", "BAText FCOS FCPose MEInst"),
    ("ROI_HEADS", "TextHead"),
    (
        "BACKBONE",
        "build_fcos_dla_fpn_backbone build_fcos_resnet_bifpn_backbone "
        "build_fcos_resnet_fpn_backbone build_fcos_vovnet_fpn_backbone build_mnv2_backbone "
        "build_resnet_interval_backbone build_resnet_lpf_backbone build_vovnet_backbone "
        "build_vovnet_fpn_backbone",
    ),
    # youngwanLEE/centermask2, commit 6adabd6, and youngwanLEE/vovnet-detectron2, commit b81c813;
    # what is above is not repeated
    ("ROI_HEADS", "CenterROIHeads"),
    ("BACKBONE", "build_fcos_mobilenetv2_fpn_backbone build_mobilenetv2_fpn_backbone"),
    # xingyizhou/CenterNet2, commit bfc8b72
    ("META_ARCH", "CenterNetDetector"),
    ("PROPOSAL_GENERATOR", "CenterNet"),
    ("ROI_HEADS", "CustomCascadeROIHeads CustomROIHeads"),
    (
        "BACKBONE",
        "build_dla_backbone build_dla_fpn3_backbone build_dla_fpn5_backbone build_dlaup_backbone "
        "build_p35_fcos_dla_bifpn_backbone build_p35_fcos_resnet_bifpn_backbone "
        "build_p35_resnet_fpn_backbone build_p37_dla_bifpn_backbone "
        "build_p37_fcos_dla_bifpn_backbone build_p67_res2net_fpn_backbone "
        "build_p67_resnet_fpn_backbone build_res2net_backbone build_res2net_bifpn_backbone "
        "build_resnet_bifpn_backbone build_retinanet_dla_fpn_backbone",
    ),
    # facebookresearch/detectron2, commit 02b5c4e, projects/
    ("META_ARCH", "PanopticDeepLab TensorMask"),
    ("PROPOSAL_GENERATOR", "TridentRPN"),
    (
        "ROI_HEADS",
        "DensePoseROIHeads PointRendROIHeads TridentRes5ROIHeads TridentStandardROIHeads",
    ),
    (
        "BACKBONE",
        "build_hrfpn_backbone build_pose_hrnet_backbone build_resnet_deeplab_backbone "
        "build_trident_resnet_backbone",
    ),
]

SCRIPT = """
from detectron2.config import get_cfg
from detectron2.modeling import (
    BACKBONE_REGISTRY, META_ARCH_REGISTRY, PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY,
    build_model,
)

registries = dict(
    BACKBONE=BACKBONE_REGISTRY, META_ARCH=META_ARCH_REGISTRY, ROI_HEADS=ROI_HEADS_REGISTRY,
    PROPOSAL_GENERATOR=PROPOSAL_GENERATOR_REGISTRY,
)
for kind, names in {others!r}:
    for name in names.split():
        registries[kind]._do_register(name, lambda *args: 1 / 0)
before = {{kind: {{name for name, _ in x}} for kind, x in registries.items()}}
import fcos_d2
from fcos_d2.engine import load_cfg
for kind, registry in registries.items():
    print(kind, *sorted({{name for name, _ in registry}} - before[kind]))
cfg = load_cfg("configs/FCOS_Shapes.yaml", "MODEL.FCOS.NUM_CLASSES 3 MODEL.DEVICE cpu".split())
cfg.MODEL.BACKBONE.NAME = "build_fcos_resnet_fpn_backbone"  # in a config of an earlier version
print(type(build_model(cfg).backbone).__name__)
"""


@pytest.mark.slow
def test_other_libraries_may_be_imported_first(pytestconfig):
    """Registering a name twice is an error, so none of ours is among theirs in either order."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT.format(others=OTHERS)],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "BACKBONE build_resnet_fcos_fpn_backbone",
        "META_ARCH FCOS",
        "ROI_HEADS",
        "PROPOSAL_GENERATOR FCOSProposalGenerator",
        "ResNetFPN",
    ]
