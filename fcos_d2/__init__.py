"""FCOS as a Detectron2 extension: importing it registers the model's parts with Detectron2."""

import warnings

from .version import __version__

with warnings.catch_warnings():
    # Detectron2 and fvcore call it where they are imported, and there is nothing a user could do.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
    from . import modeling
    from .config import add_fcos_config
    from .modeling.optimize import optimize_for_inference

__all__ = ["__version__", "add_fcos_config", "modeling", "optimize_for_inference"]
