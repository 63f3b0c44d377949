"""`FCOSCheckpointer`: class names and keys in checkpoints, other libraries' weights, safe files."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..files import atomic_path
from .convert import convert, recognise, status_table
from .info import keys_to_save
from .keys import is_setting, state_facts
from .reader import find_weights, read_checkpoint, unwrap
from .resnet import is_torchvision_resnet, rename_torchvision_resnet

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
        **kwargs: Any,
    ):
        """Extend ``DetectionCheckpointer`` by four arguments.

        Args:
            model: an FCOS.
            save_dir: folder to save to.
            class_names: of the data; saved, and compared with those of loaded checkpoints.
            cfg: of the run. The keys that the weights need are saved. The model keeps the settings
                of its config, which :func:`apply_checkpoint_keys` adapts to a checkpoint; without
                ``cfg`` it takes those of a loaded checkpoint.
            for_inference: refuse weights without a trained head.
            get_weights: returns the weights to save instead of the model's: their average.
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
        """Write ``name.pth``, with class names and keys, atomically."""
        if not self.save_dir or not self.save_to_disk:
            return
        state = {key: value.state_dict() for key, value in self.checkpointables.items()}
        self.save_weights(name, **state, **kwargs)
        self.tag_last_checkpoint(f"{name}.pth")
        self._last_saved = name, kwargs

    def save_weights(self, name: str, **kwargs: Any) -> None:
        """Write ``name.pth`` as :meth:`save` does, but without the state of the training.

        A run is still resumed from the last checkpoint before.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data: dict[str, Any] = {"model": self._get_weights(), "class_names": self.class_names}
        if self.cfg is not None:
            data["cfg"] = keys_to_save(self.cfg)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with atomic_path(path) as temporary:
            torch.save({**data, **kwargs}, temporary)

    @property
    def last_iteration(self) -> int | None:
        """Iteration of the last checkpoint that this object saved, if known."""
        return self._last_saved[1].get("iteration") if self._last_saved else None

    def save_again(self) -> None:
        """Overwrite the last checkpoint with the current state."""
        assert self._last_saved is not None
        name, kwargs = self._last_saved
        self.save(name, **kwargs)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint of Detectron2, of this package, of another library's FCOS, or a ResNet.

        Other libraries' FCOS is converted, see :func:`fcos_d2.checkpoint.convert`. A ResNet is one
        of torchvision or of Detectron2's model zoo.

        Training that starts from a checkpoint of other classes (``checkpointables=[]``, as in
        ``resume_or_load``) loads everything but the class predictor.

        Raises:
            FileNotFoundError: the file does not exist, or its URL can't be reached.
            ValueError: it is not a checkpoint, is of another network or needs more than tensors;
                when resuming or for inference, it has other classes; for inference, it has no head.
        """
        local = find_weights(path) if path or self.for_inference else path
        self._fine_tune = checkpointables is not None and not self.for_inference
        self._path = path
        return super().load(local, checkpointables)

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = read_checkpoint(filename)
        if filename.endswith((".pkl", ".pyth")):
            # Formats of Detectron2 and pycls; read_checkpoint() has found the file harmless.
            checkpoint = super()._load_file(filename)
        try:
            weights = unwrap(checkpoint)
            if recognise(weights):
                checkpoint = self._convert(checkpoint)
                weights = checkpoint["model"]
        except ValueError as error:
            raise ValueError(f"{filename}: {error}") from error
        weights = self._drop_other_classes(weights, checkpoint.get("class_names"), filename)
        if is_torchvision_resnet(weights):
            weights = rename_torchvision_resnet(weights, self.model.state_dict(), filename)
        if self.for_inference and not any(k.startswith("proposal_generator.") for k in weights):
            raise ValueError(
                f"{filename} has no FCOS head: it is only for training to start from. Name a "
                "trained checkpoint: MODEL.WEIGHTS OUTPUT_DIR/model_final.pth."
            )
        return {**checkpoint, "model": weights}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        """Load the weights, which must be complete and fit unless training starts from them."""
        if self.cfg is not None:
            checkpoint["model"] = self._drop_settings(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        misfits = [key for key, *_ in incompatible.incorrect_shapes]
        unset = {*incompatible.missing_keys, *misfits}
        if all(key in unset or is_setting(key) for key in self.model.state_dict()):
            raise ValueError(f"{self._path} has no tensor that fits this model.")
        if unset and not self._fine_tune:
            raise ValueError(
                f"{self._path} is of another network: {len(unset)} tensors of the model are "
                f"missing in it or have another shape ({', '.join(sorted(unset)[:5])}, ...). Is "
                "--config-file the one that it was trained with?"
            )
        return incompatible

    def _drop_settings(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the settings, with a warning if they differ from the model's."""
        own = state_facts(self.model.state_dict())
        lines = [
            f"\n  {key} {own[key]} (checkpoint: {value})"
            for key, value in state_facts(weights).items()
            if own.get(key, value) != value
        ]
        if lines:
            logger.warning(
                "The model keeps settings of its config that differ from those of %s:%s",
                self._path,
                "".join(lines),
            )
        return {name: x for name, x in weights.items() if not is_setting(name)}

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

    def _drop_other_classes(
        self, weights: dict[str, Tensor], saved: Sequence[str] | None, filename: str
    ) -> dict[str, Tensor]:
        """Drop a class predictor of other classes than the data's if training starts from it."""
        saved = list(saved or ())
        if not saved or not self.class_names or saved == self.class_names:
            return weights
        if not self._fine_tune:
            raise ValueError(
                f"{filename} was trained on other classes than those of the data.\n"
                f"  checkpoint ({len(saved)}): {', '.join(saved)}\n"
                f"  data ({len(self.class_names)}): {', '.join(self.class_names)}\n"
                "Use data with the checkpoint's classes in its order (a classes.txt in a VOC "
                "folder names them), or start a new training."
            )
        logger.warning(
            "%s was trained on %d other classes: its class predictor is not loaded.",
            filename,
            len(saved),
        )
        return {k: v for k, v in weights.items() if ".cls_score." not in k}
