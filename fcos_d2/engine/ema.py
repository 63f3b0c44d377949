"""`ModelEma`: exponential moving average of the weights of a model in training."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class ModelEma:
    """Exponential moving average of a model's weights over the iterations.

    Parameters and floating-point buffers (running statistics of BatchNorm) are averaged, other
    buffers are copied. After t updates the next one has the decay min(``decay``,
    (1 + t) / (10 + t)), the rule of ``num_updates`` in TensorFlow's ``ExponentialMovingAverage``:
    a short run does not end with the weights that it began with. Steps skipped by ``GradScaler``
    still count: excluding them needs a host-device sync per step.

    Not PyTorch's ``AveragedModel``: it starts from the weights after the first update, and reads
    its count of updates back from the device.

    Args:
        model: not wrapped for distributed training, and on its device; its tensors may change in
            place, but not be replaced.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self._model = model
        self._decay = decay
        self.reset()

    def reset(self) -> None:
        """Start from the current weights of the model."""
        self.num_updates = 0
        # Shares the model's memory, except for its extra state; too slow to call per step.
        self._current = self._model.state_dict()
        self._average = {key: x.clone() for key, x in self._current.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights of an iteration, without a host-device sync."""
        decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
        pairs = [(x, self._current[key]) for key, x in self._average.items()]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([x for x, _ in floats], [x for _, x in floats], 1 - decay)
        for x, current in pairs:
            if not x.is_floating_point():
                x.copy_(current)
        self.num_updates += 1

    def weights(self) -> dict[str, Tensor]:
        """Return the average, named as in the model's ``state_dict``; updates change it."""
        return dict(self._average)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the average inside the block, and its own weights back afterwards."""
        raw = {key: x.clone() for key, x in self._current.items()}
        self._set_model(self._average)
        try:
            yield
        finally:
            self._set_model(raw)

    def state_dict(self) -> dict[str, Any]:
        """Return ``num_updates`` and ``raw``, the weights that the optimizer continues with.

        The average itself is the model of the checkpoint.
        """
        return {"num_updates": self.num_updates, "raw": dict(self._current)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the average from the model, and load :meth:`state_dict` into it and the model."""
        self.reset()
        self.num_updates = state["num_updates"]
        self._model.load_state_dict(state["raw"])

    @torch.no_grad()
    def _set_model(self, weights: Mapping[str, Tensor]) -> None:
        # In place: DDP and the optimizer refer to the tensors.
        for key, x in self._current.items():
            x.copy_(weights[key])


def resume_ema(ema: ModelEma | None, state: Mapping[str, Any] | None, model: nn.Module) -> None:
    """Resume from a checkpoint that was loaded into the model, saved with or without an average.

    Args:
        ema: of ``model``; None without MODEL_EMA.ENABLED.
        state: :meth:`ModelEma.state_dict` in the checkpoint; None if it was saved without.
        model: gets the weights that the optimizer continues with.
    """
    if state is None:
        if ema is not None:
            logger.warning(
                "MODEL_EMA.ENABLED: the checkpoint was saved without averaged weights, so the "
                "average starts from its weights."
            )
            ema.reset()
    elif ema is None:
        logger.warning(
            "MODEL_EMA.ENABLED is off, but the checkpoint holds averaged weights: training "
            "continues from its raw weights, as without averaging, and the average is lost."
        )
        model.load_state_dict(state["raw"])
    else:
        ema.load_state_dict(state)
