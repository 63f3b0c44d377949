"""A `DetectionCheckpointer` that keeps class names, writes whole files and reads torchvision's."""

import logging
import os
import pickle
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from ..files import atomic_path
from .torchvision import convert_torchvision_resnet, is_torchvision_resnet

logger = logging.getLogger(__name__)

_UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError)


class FCOSCheckpointer(DetectionCheckpointer):
    """Save and load checkpoints of fcos_d2; see :meth:`save` and :meth:`load`."""

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        class_names: Sequence[str] = (),
        for_inference: bool = False,
        **kwargs,
    ):
        """Take the arguments of ``DetectionCheckpointer`` and two more.

        Args:
            model: an FCOS.
            save_dir: folder to save to.
            class_names: of the data; saved with the weights, compared with those that are loaded.
            for_inference: refuse weights that training starts from.
            kwargs: see ``DetectionCheckpointer``.
        """
        super().__init__(model, save_dir, **kwargs)
        self.class_names = list(class_names)
        self.for_inference = for_inference
        self._fine_tune = False
        self._path = ""

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name.pth`` with the class names in it; a file is there whole or not at all."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), "class_names": self.class_names}
        data.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with atomic_path(path) as temporary:
            torch.save(data, temporary)
        self.tag_last_checkpoint(f"{name}.pth")

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint of Detectron2 or of this package, or a torchvision ResNet.

        Training that starts from a checkpoint of other classes (``checkpointables=[]``, as
        ``resume_or_load`` says it) keeps everything but the class predictor.

        Raises:
            FileNotFoundError: the file is not there, or its URL can't be reached.
            ValueError: it is no checkpoint, or of another network; to resume or to detect, it has
                other classes; to detect, it has no head.
        """
        local = find_weights(path) if path or self.for_inference else path
        self._fine_tune = checkpointables is not None and not self.for_inference
        self._path = path
        return super().load(local, checkpointables)

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            checkpoint = super()._load_file(filename)
        except _UNREADABLE as error:
            raise ValueError(f"{filename} can't be read as a checkpoint: {error}") from error
        weights = checkpoint["model"]
        saved = list(checkpoint.get("class_names", []))
        if saved and self.class_names and saved != self.class_names:
            if not self._fine_tune:
                raise ValueError(_other_classes(filename, saved, self.class_names))
            logger.warning(
                "%s was trained on %d other classes: its class predictor is left out.",
                filename,
                len(saved),
            )
            weights = {k: v for k, v in weights.items() if ".cls_score." not in k}
        if is_torchvision_resnet(weights):
            weights = self._place_resnet(weights, filename)
        if self.for_inference and not any(k.startswith("proposal_generator.") for k in weights):
            raise ValueError(
                f"{filename} holds no FCOS head, only what training starts from. Name a trained "
                "checkpoint: MODEL.WEIGHTS OUTPUT_DIR/model_final.pth."
            )
        return {**checkpoint, "model": weights}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        """Load the weights; to resume or to detect, all of them have to be there and to fit."""
        incompatible = super()._load_model(checkpoint)
        misfits = [key for key, *_ in incompatible.incorrect_shapes]
        unset = {*incompatible.missing_keys, *misfits}
        if not self.model.state_dict().keys() - unset:
            raise ValueError(f"{self._path} holds nothing that has a place in this model.")
        if unset and not self._fine_tune:
            listed = ", ".join(sorted(unset)[:5])
            raise ValueError(
                f"{self._path} is of another network: {len(unset)} tensors of the model are not in "
                f"it or have another shape ({listed}, ...). Is --config-file the one that it was "
                "trained with?"
            )
        return incompatible

    def _place_resnet(self, state_dict: dict[str, Any], filename: str) -> dict[str, Any]:
        renamed, unused = convert_torchvision_resnet(state_dict)
        own = self.model.state_dict()
        stem = [key for key in own if key.endswith("stem.conv1.weight")]
        if len(stem) != 1:
            raise ValueError(f"{filename} is a torchvision ResNet, but the model has none.")
        prefix = stem[0][: -len("stem.conv1.weight")]
        placed = {prefix + key: tensor for key, tensor in renamed.items()}
        for key, tensor in placed.items():
            if key not in own or own[key].shape != tensor.shape:
                wanted = tuple(own[key].shape) if key in own else "not there"
                raise ValueError(
                    f"{filename} is a torchvision ResNet of another shape: its {key} is "
                    f"{tuple(tensor.shape)}, the model's is {wanted}. Is MODEL.RESNETS right?"
                )
        missing = [key for key in own if key.startswith(prefix) and key not in placed]
        logger.info(
            "Read torchvision's ResNet from %s (tensors):\n%s\n  not used: %s\n  "
            "not in the file, so as they were initialised: %s",
            filename,
            "\n".join(f"  loaded {part}: {n}" for part, n in _count_stages(renamed)),
            ", ".join(unused) or "none",
            ", ".join(key[len(prefix) :] for key in missing) or "none",
        )
        return placed


def read_class_names(path: str) -> list[str]:
    """Return the class names in a checkpoint; an empty list where it holds none."""
    try:
        checkpoint = torch.load(
            find_weights(path), map_location="cpu", weights_only=True, mmap=True
        )
    except (RuntimeError, pickle.UnpicklingError):  # Detectron2's own .pkl files are not torch's
        return []
    return list(checkpoint.get("class_names", []))


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


def _count_stages(names: Iterable[str]) -> list[tuple[str, int]]:
    return sorted(Counter(name.split(".")[0] for name in names).items())


def _cannot_get(path: str, reason: object) -> str:
    return (
        f"MODEL.WEIGHTS {path} can't be had ({reason}). Check the name or the network, or "
        "download the file by hand and name it. (Training from scratch: MODEL.WEIGHTS ''.)"
    )


def _other_classes(filename: str, saved: list[str], wanted: list[str]) -> str:
    return (
        f"{filename} was trained on other classes than the data has.\n"
        f"  checkpoint ({len(saved)}): {', '.join(saved)}\n"
        f"  data ({len(wanted)}): {', '.join(wanted)}\n"
        "Use data with the checkpoint's classes in its order (a classes.txt in a VOC folder names "
        "them), or start a new training."
    )
