"""The network: importing this package registers it with Detectron2."""

from .backbone import ResNetFPN, TopBlock, build_resnet_fcos_fpn_backbone
from .decoder import FCOSDecoder
from .head import FCOSHead
from .locations import Locations, compute_locations
from .losses import fcos_losses
from .matcher import CenterSamplingMatcher, Matches
from .meta_arch import FCOS
from .optimize import optimize_for_inference
from .proposal_generator import FCOSProposalGenerator
from .tta import FCOSWithTTA

__all__ = [
    "CenterSamplingMatcher",
    "FCOS",
    "FCOSDecoder",
    "FCOSHead",
    "FCOSProposalGenerator",
    "FCOSWithTTA",
    "Locations",
    "Matches",
    "ResNetFPN",
    "TopBlock",
    "build_resnet_fcos_fpn_backbone",
    "compute_locations",
    "fcos_losses",
    "optimize_for_inference",
]
