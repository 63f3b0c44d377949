"""The libraries whose FCOS checkpoints can be read, one module each.

Every module has the same functions and one constant:

- ``recognise(names)``: whether tensors of these names are of the library's FCOS.
- ``rename(name, state)``: the library's name of our tensor ``name`` in its state dict ``state``; if
  it has no such tensor, any name that is not in ``state``.
- ``options(checkpoint, state, architecture)``: the ``FACT_KEYS`` and ``TEST_KEYS`` that neither
  names nor shapes show and that differ from this package's defaults, and a list of remarks for the
  user. ``checkpoint`` is the content of the file, ``architecture`` the result of
  :func:`~fcos_d2.checkpoint.architecture.infer_architecture`.
- ``class_names(checkpoint, num_outputs)``: names of the class predictor's outputs; empty if
  unknown.
- ``FEWEST_TOP_LEVELS``: number of P6 and P7 that a network with any of them has at least.

Names, defaults and rules are facts about the libraries; none of their code is here.
"""

from types import ModuleType

from . import adelaidet, detectron2, mmdet, torchvision

LIBRARIES: dict[str, ModuleType] = {
    "torchvision": torchvision,
    "detectron2": detectron2,
    "adelaidet": adelaidet,
    "mmdet": mmdet,
}
