"""A `DetectionCheckpointer` with class names, whole files and other libraries' weights."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..files import atomic_path
from .convert import convert, recognise, status_table
from .info import keys_to_save
from .reader import find_weights, read_checkpoint, unwrap
from .resnet import is_torchvision_resnet, torchvision_resnet_name

logger = logging.getLogger(__name__)


class FCOSCheckpointer(DetectionCheckpointer):
    """Save and load checkpoints of fcos_d2; see :meth:`save` and :meth:`load`."""

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        class_names: Sequence[str] = (),
        cfg: CfgNode | None = None,
        for_inference: bool = False,
        get_weights: Callable[[], dict[str, Tensor]] | None = None,
        **kwargs,
    ):
        """Take the arguments of ``DetectionCheckpointer`` and four more.

        Args:
            model: an FCOS.
            save_dir: folder to save to.
            class_names: of the data; saved with the weights, compared with those that are loaded.
            cfg: of the run; what the weights need of it is saved with them.
            for_inference: refuse weights that training starts from.
            get_weights: gives the weights to save, in place of the model's own: their average.
            kwargs: see ``DetectionCheckpointer``.
        """
        super().__init__(model, save_dir, **kwargs)
        self.class_names = list(class_names)
        self.cfg = cfg
        self.for_inference = for_inference
        self._get_weights = get_weights or self.model.state_dict
        self._last_saved: tuple[str, dict[str, Any]] | None = None
        self._fine_tune = False
        self._path = ""

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name.pth``, with class names and keys in it; it is there whole or not at all."""
        if not self.save_dir or not self.save_to_disk:
            return
        state = {key: value.state_dict() for key, value in self.checkpointables.items()}
        self.save_weights(name, **state, **kwargs)
        self.tag_last_checkpoint(f"{name}.pth")
        self._last_saved = name, kwargs

    def save_weights(self, name: str, **kwargs: Any) -> None:
        """Write ``name.pth`` as :meth:`save` does, without what training goes on from.

        The last checkpoint, which a run is resumed from, stays the one it was.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self._get_weights(), "class_names": self.class_names}
        if self.cfg is not None:
            data["cfg"] = keys_to_save(self.cfg)
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with atomic_path(path) as temporary:
            torch.save(data, temporary)

    @property
    def last_iteration(self) -> int | None:
        """Iteration of the last checkpoint that this object saved, if it was told."""
        return self._last_saved[1].get("iteration") if self._last_saved else None

    def save_again(self) -> None:
        """Write the last checkpoint once more, as things stand now."""
        name, kwargs = self._last_saved
        self.save(name, **kwargs)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint of Detectron2, of this package, of another library's FCOS, or a ResNet.

        Other libraries' are converted as :func:`fcos_d2.checkpoint.convert` does, ResNets are
        torchvision's or those of Detectron2's zoo.

        Training that starts from a checkpoint of other classes (``checkpointables=[]``, as
        ``resume_or_load`` says it) keeps everything but the class predictor.

        Raises:
            FileNotFoundError: the file is not there, or its URL can't be reached.
            ValueError: it is no checkpoint, of another network, or needs more than tensors; to
                resume or to detect, it has other classes; to detect, it has no head.
        """
        local = find_weights(path) if path or self.for_inference else path
        self._fine_tune = checkpointables is not None and not self.for_inference
        self._path = path
        return super().load(local, checkpointables)

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = read_checkpoint(filename)
        if filename.endswith((".pkl", ".pyth")):
            # Detectron2's and pycls' own formats, in a file that is known now to do no harm.
            checkpoint = super()._load_file(filename)
        try:
            weights = unwrap(checkpoint)
            if recognise(weights):
                checkpoint = self._convert(checkpoint)
                weights = checkpoint["model"]
        except ValueError as error:
            raise ValueError(f"{filename}: {error}") from error
        weights = self._without_other_classes(weights, checkpoint.get("class_names"), filename)
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

    def _convert(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        converted = convert(checkpoint)
        logger.info(
            "%s is of %s. Its tensors:\n%s%s",
            self._path,
            converted.source,
            status_table(converted.tensors),
            "".join(f"\n{note}" for note in converted.notes),
        )
        return {"model": converted.weights, "class_names": converted.class_names}

    def _without_other_classes(
        self, weights: dict[str, Tensor], saved: Sequence[str] | None, filename: str
    ) -> dict[str, Tensor]:
        """Leave out a class predictor of other classes than the data's; only to start from."""
        saved = list(saved or ())
        if not saved or not self.class_names or saved == self.class_names:
            return weights
        if not self._fine_tune:
            raise ValueError(_other_classes(filename, saved, self.class_names))
        logger.warning(
            "%s was trained on %d other classes: its class predictor is left out.",
            filename,
            len(saved),
        )
        return {k: v for k, v in weights.items() if ".cls_score." not in k}

    def _place_resnet(self, state: dict[str, Tensor], filename: str) -> dict[str, Tensor]:
        """Find the tensors of the model's ResNet in a torchvision one, complete or partial."""
        own = self.model.state_dict()
        stem = [key for key in own if key.endswith("stem.conv1.weight")]
        if len(stem) != 1:
            raise ValueError(f"{filename} is a torchvision ResNet, but the model has none.")
        prefix = stem[0].removesuffix("stem.conv1.weight")
        names = {
            key: torchvision_resnet_name(key.removeprefix(prefix))
            for key in own
            if key.startswith(prefix)
        }
        used = set(names.values())
        left = [k for k in state if k not in used and not k.endswith("num_batches_tracked")]
        # The model may end before layer4; of the layers that it has nothing may be left.
        layers = {name.split(".")[0] for name in used if name.startswith("layer")}
        misfits = [name for name in left if name.split(".")[0] in layers]
        misfits += [n for k, n in names.items() if n in state and state[n].shape != own[k].shape]
        if misfits:
            raise ValueError(
                f"{filename} is a torchvision ResNet of another shape: {len(misfits)} tensors have "
                f"no place in the model ({', '.join(misfits[:3])}, ...). Is MODEL.RESNETS right?"
            )
        placed = {key: name for key, name in names.items() if name in state}
        counts = Counter(key.removeprefix(prefix).split(".")[0] for key in placed)
        logger.info(
            "Read torchvision's ResNet from %s (tensors):\n%s\n  not used: %s\n  "
            "not in the file, so as they were initialised: %s",
            filename,
            "\n".join(f"  loaded {part}: {n}" for part, n in sorted(counts.items())),
            ", ".join(left) or "none",
            ", ".join(key.removeprefix(prefix) for key in names if key not in placed) or "none",
        )
        return {key: state[name] for key, name in placed.items()}


def _other_classes(filename: str, saved: list[str], wanted: list[str]) -> str:
    return (
        f"{filename} was trained on other classes than the data has.\n"
        f"  checkpoint ({len(saved)}): {', '.join(saved)}\n"
        f"  data ({len(wanted)}): {', '.join(wanted)}\n"
        "Use data with the checkpoint's classes in its order (a classes.txt in a VOC folder names "
        "them), or start a new training."
    )
