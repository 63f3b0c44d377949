"""FCOS as a Detectron2 extension: importing it registers the model's parts with Detectron2."""

__version__ = "0.1.0"

from . import modeling
from .config import add_fcos_config
from .modeling.optimize import optimize_for_inference

__all__ = ["add_fcos_config", "modeling", "optimize_for_inference"]
