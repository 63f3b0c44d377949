"""Checkpoints: class names inside, other libraries' weights read into this model."""

from .checkpointer import FCOSCheckpointer, read_class_names
from .torchvision import convert_torchvision_resnet, is_torchvision_resnet

__all__ = [
    "FCOSCheckpointer",
    "convert_torchvision_resnet",
    "is_torchvision_resnet",
    "read_class_names",
]
