"""Checkpoint files to dictionaries of tensors, without running what a pickle says."""

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

# Where libraries keep the state dict in what they save; "model_state" is pycls', "blobs" Caffe2's.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state", "blobs")

# All that a pickle of numpy arrays needs, under NumPy's names before and since 2.0.
_HARMLESS = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
}


class _RefusedError(Exception):
    """A pickle needs the type that the message names."""


class _ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays in Python's own containers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise _RefusedError(f"{module}.{name}")
        return super().find_class(module, name)


def find_weights(path: str) -> str:
    """Return the local file of MODEL.WEIGHTS, downloaded if it is a URL.

    Raises:
        FileNotFoundError: the file is not there, or its URL can't be reached.
        ValueError: the path is empty.
    """
    if not path:
        raise ValueError("MODEL.WEIGHTS is empty: name the trained checkpoint to use.")
    try:
        local = PathManager.get_local_path(path)
    except OSError as error:  # URLError is one
        raise FileNotFoundError(_cannot_get(path, error)) from error
    if not os.path.isfile(local):
        raise FileNotFoundError(_cannot_get(path, "no such file"))
    return local


def read_checkpoint(path: str, *, lazy: bool = False) -> dict[str, Any]:
    """Read a checkpoint of PyTorch, or a ``.pkl`` of numpy arrays as Detectron2's zoo has them.

    Nothing that the file says is run: it may hold tensors, arrays and Python's own containers.

    Args:
        path: a local file.
        lazy: tensors are read from the disk when they are used, and not checked for damage.

    Raises:
        OSError: the file is not there, or may not be read.
        ValueError: the file is damaged or no checkpoint, or it needs more than that.
    """
    with open(path, "rb"):  # whether it is there and may be read
        pass
    try:
        checkpoint = _unpickle(path, lazy)
    except _RefusedError as error:
        raise ValueError(_refused(path, str(error))) from error
    except Exception as error:  # bytes at random make an unpickler raise anything at all
        reason = str(error).strip() or type(error).__name__
        raise ValueError(
            f"{path} can't be read as a checkpoint: it is damaged, incomplete or something else "
            f"({_last_line(reason)})."
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"{path} can't be read as a checkpoint: it holds a {type(checkpoint).__name__}, not a "
            "dictionary of tensors."
        )
    return dict(checkpoint)


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint, its arrays as tensors, without a leading ``module.``.

    Raises:
        ValueError: there is no tensor where one is looked for.
    """
    state = checkpoint
    for name in _WRAPPERS:
        if isinstance(checkpoint.get(name), Mapping):
            state = checkpoint[name]
            break
    tensors = {}
    for key, value in state.items():
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
            value = torch.as_tensor(value)
        if isinstance(value, Tensor):
            tensors[str(key)] = value
    if not tensors:
        raise ValueError(
            f"there is no tensor at the top of it or under {', '.join(_WRAPPERS)}: it holds "
            f"{', '.join(map(str, checkpoint)) or 'nothing'}."
        )
    # What DataParallel and DistributedDataParallel put in front.
    wrapped = all(key.startswith("module.") for key in tensors)
    return {key.removeprefix("module.") if wrapped else key: x for key, x in tensors.items()}


def _unpickle(path: str, lazy: bool) -> Any:
    if path.endswith(".pkl"):
        with open(path, "rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    is_zip = zipfile.is_zipfile(path)
    if is_zip and not lazy:
        # PyTorch does not look at the checksums that it writes.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip and lazy)
    except (pickle.UnpicklingError, RuntimeError) as error:
        # The one way to tell what was refused that PyTorch 2.1 and later share.
        needed = re.search(r"(?:GLOBAL|Unsupported class|but got) (\S+)", str(error))
        if needed:
            raise _RefusedError(needed[1]) from error
        raise


def _last_line(text: str) -> str:
    """The line of PyTorch's long messages that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Check the documentation")]
    return lines[-1].rstrip(".")


def _refused(path: str, needed: str) -> str:
    return (
        f"{path} is refused: loading it runs {needed}, and a file that says what is run can do "
        "anything to this machine. If you trust whoever made it, keep the tensors only, where it "
        "can be loaded:\n"
        f"  import torch; c = torch.load({os.path.basename(path)!r}, weights_only=False)\n"
        "  torch.save({k: c[k] for k in ('model', 'state_dict', 'meta') if k in c}, 'weights.pth')"
    )


def _cannot_get(path: str, reason: object) -> str:
    return (
        f"MODEL.WEIGHTS {path} can't be had ({reason}). Check the name or the network, or "
        "download the file by hand and name it. (Training from scratch: MODEL.WEIGHTS ''.)"
    )
