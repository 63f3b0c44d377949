"""The libraries whose FCOS can be read, one module each.

Every module has the same functions, and a number:

- ``recognise(names)``: whether tensors of these names are of the library's FCOS.
- ``rename(name, state)``: the library's name of our tensor ``name``, in its state dict ``state``.
  Of a tensor that it does not have, any name that ``state`` lacks.
- ``options(checkpoint, state, architecture)``: the ``FACT_KEYS`` and ``TEST_KEYS`` that neither
  names nor shapes tell, as the library computes them, and a list of remarks for whoever reads the
  file. ``checkpoint`` is the whole file's content, ``architecture`` what
  :func:`~fcos_d2.checkpoint.architecture.infer_architecture` found.
- ``class_names(checkpoint, num_outputs)``: the names of the class predictor's outputs, as far as
  the library says; else an empty list.
- ``FEWEST_TOP_LEVELS``: how many of P6 and P7 its networks have that have any.

Names, defaults and rules are facts about the libraries; no code of theirs is here.
"""

from types import ModuleType

from . import adelaidet, detectron2, mmdet, torchvision

LIBRARIES: dict[str, ModuleType] = {
    "torchvision": torchvision,
    "detectron2": detectron2,
    "adelaidet": adelaidet,
    "mmdet": mmdet,
}
