"""Checkpoints: class names and keys stored with weights, other libraries' weights converted."""

from .checkpointer import FCOSCheckpointer
from .convert import Converted, convert, convert_file, status_table
from .info import CheckpointInfo, apply_checkpoint_keys, read_info
from .keys import ARCHITECTURE_KEYS, CARRIED_KEYS, FACT_KEYS, TEST_KEYS, parse_keys
from .reader import read_checkpoint

__all__ = [
    "ARCHITECTURE_KEYS",
    "CARRIED_KEYS",
    "CheckpointInfo",
    "Converted",
    "FACT_KEYS",
    "FCOSCheckpointer",
    "TEST_KEYS",
    "apply_checkpoint_keys",
    "convert",
    "convert_file",
    "status_table",
    "parse_keys",
    "read_checkpoint",
    "read_info",
]
