"""Reading of checkpoint files without executing code in pickles."""

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

# Keys of the state dict in a checkpoint; "model_state" is pycls', "blobs" Caffe2's.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state", "blobs")

# Everything that a pickle of NumPy arrays needs, under the names of NumPy 1 and 2.
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED = {(module, name) for module in _MODULES for name in ("_reconstruct", "scalar")} | {
    *(("_codecs", "encode"), ("collections", "OrderedDict")),
    *(("numpy", "dtype"), ("numpy", "ndarray")),
}


class _RefusedError(Exception):
    """The type in the message is not allowed in a pickle."""


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of NumPy arrays in Python's own containers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return super().find_class(module, name)


def find_weights(path: str) -> str:
    """Return the local file of MODEL.WEIGHTS, downloaded if it is a URL.

    Raises:
        FileNotFoundError: the file does not exist, or its URL can't be reached.
        ValueError: the path is empty.
    """
    if not path:
        raise ValueError("MODEL.WEIGHTS is empty: name the trained checkpoint to use.")
    try:
        local = PathManager.get_local_path(path)
        if not os.path.isfile(local):
            raise FileNotFoundError("no such file")
    except OSError as error:  # URLError is one
        raise FileNotFoundError(
            f"MODEL.WEIGHTS {path} could not be loaded ({error}). Check the name or the network, "
            "or download the file and name it. (Training from scratch: MODEL.WEIGHTS ''.)"
        ) from error
    return local


def read_checkpoint(path: str, *, lazy: bool = False) -> dict[str, Any]:
    """Read a checkpoint of PyTorch, or a ``.pkl`` of NumPy arrays as in Detectron2's model zoo.

    No code in the file is executed: it may hold tensors, arrays and Python's own containers.

    Args:
        path: a local file.
        lazy: read tensors from the disk on use, without checking them for damage.

    Raises:
        OSError: the file does not exist or is not readable.
        ValueError: the file is damaged, is not a checkpoint or needs other types.
    """
    with open(path, "rb"):  # raises OSError
        pass
    try:
        checkpoint = _unpickle(path, lazy)
    except _RefusedError as error:
        raise ValueError(
            f"{path} is refused as an unsafe pickle: loading it would import {error}, and with it "
            "execute code of whoever made the file. If you trust them, keep only the tensors:\n"
            f"  import torch; c = torch.load({os.path.basename(path)!r}, weights_only=False)\n"
            "  torch.save({k: c[k] for k in ('model', 'state_dict', 'meta') if k in c}, "
            "'weights.pth')"
        ) from error
    except Exception as error:  # random bytes make an unpickler raise anything
        # PyTorch's messages are long and end with a link.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("Check the documentation")]
        reason = lines[-1].rstrip(".") if lines else type(error).__name__
        raise ValueError(
            f"{path} can't be read as a checkpoint: it is damaged, incomplete or of another type "
            f"({reason})."
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"{path} can't be read as a checkpoint: it holds a {type(checkpoint).__name__}, not a "
            "dictionary of tensors."
        )
    return dict(checkpoint)


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint: tensors, without a leading ``module.``.

    Raises:
        ValueError: it has no tensor.
    """
    wrapped = (checkpoint[x] for x in _WRAPPERS if isinstance(checkpoint.get(x), Mapping))
    state = next(wrapped, checkpoint)
    tensors = {}
    for key, value in state.items():
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
            value = torch.as_tensor(value)
        if isinstance(value, Tensor):
            tensors[str(key)] = value
    if not tensors:
        raise ValueError(
            f"it has no tensor at the top level or under {', '.join(_WRAPPERS)}, only: "
            f"{', '.join(map(str, checkpoint)) or 'nothing'}."
        )
    # Of DataParallel and DistributedDataParallel.
    prefix = "module." if all(key.startswith("module.") for key in tensors) else ""
    return {key.removeprefix(prefix): x for key, x in tensors.items()}


def _unpickle(path: str, lazy: bool) -> Any:
    if path.endswith(".pkl"):
        with open(path, "rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    is_zip = zipfile.is_zipfile(path)
    if is_zip and not lazy:  # PyTorch does not verify the checksums that it writes
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip and lazy)
    except (pickle.UnpicklingError, RuntimeError) as error:
        # The exception has no attribute for the refused type.
        needed = re.search(r"(?:GLOBAL|Unsupported class|but got) (\S+)", str(error))
        if needed:
            raise _RefusedError(needed[1]) from error
        raise
