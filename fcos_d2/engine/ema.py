"""`ModelEma`: the exponential moving average of the weights of a model that is being trained."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class ModelEma:
    """Average of a model's weights over its iterations, the last ones counting most.

    Parameters and floating-point buffers (the running statistics of batch norms) are averaged;
    other buffers are copied. PyTorch's ``AveragedModel`` would average those too, and has no decay
    that grows.

    With t updates done, the next one has the decay min(``decay``, (1 + t) / (10 + t)), the rule of
    ``num_updates`` in TensorFlow's ``ExponentialMovingAverage``: the average is over about the last
    ninth of the iterations until it is over 1 / (1 - ``decay``) of them, so that a short run does
    not end with the weights it began with.

    An iteration whose optimizer step float16 passes over counts as any other: the weights that
    stayed as they were are averaged once more. To leave it out, each step would wait for the
    device.

    Args:
        model: not wrapped for distributed training, and on its device; its tensors may be changed,
            not replaced.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self._model = model
        self._decay = decay
        self.reset()

    def reset(self) -> None:
        """Start from the weights that the model has now."""
        self.num_updates = 0
        # Shares the model's memory but for its settings; making it takes its time.
        self._current = self._model.state_dict()
        # clone() keeps the memory format.
        self._average = {key: x.clone() for key, x in self._current.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of an iteration, in one operation and without a wait."""
        decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
        pairs = [(x, self._current[key]) for key, x in self._average.items()]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*floats, strict=True)), 1 - decay)
        for x, current in pairs:
            if not x.is_floating_point():
                x.copy_(current)
        self.num_updates += 1

    def weights(self) -> dict[str, Tensor]:
        """Return the average, named as in the model's ``state_dict``; it goes on changing."""
        return dict(self._average)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the average to the model inside the block, and its own weights back at the end."""
        raw = {key: x.clone() for key, x in self._current.items()}
        self._set_model(self._average)
        try:
            yield
        finally:
            self._set_model(raw)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside :meth:`weights`: ``num_updates`` and ``raw``.

        The latter are the weights that the optimizer goes on with, named as in the model.
        """
        return {"num_updates": self.num_updates, "raw": dict(self._current)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave; the model holds the average, and then its own."""
        self.reset()
        self.num_updates = state["num_updates"]
        self._model.load_state_dict(state["raw"])

    @torch.no_grad()
    def _set_model(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into the model's tensors, which others (DDP, the optimizer) refer to."""
        for key, x in self._current.items():
            x.copy_(weights[key])


def resume_ema(ema: ModelEma | None, state: Mapping[str, Any] | None, model: nn.Module) -> None:
    """Go on from a checkpoint whose weights the model has, with or without an average.

    Args:
        ema: of ``model``; None if MODEL_EMA.ENABLED is off.
        state: of the average that the checkpoint has for its weights; None if it has none.
        model: gets the weights that the optimizer goes on with.
    """
    if state is None:
        if ema is not None:
            logger.warning(
                "MODEL_EMA.ENABLED: the checkpoint was saved without an average of weights, so the "
                "average starts from the weights of the checkpoint."
            )
            ema.reset()
    elif ema is None:
        logger.warning(
            "MODEL_EMA.ENABLED is off, but the checkpoint holds averaged weights: training goes on "
            "from the weights beside them that are not averaged, as it would have without an "
            "average, and the average is lost."
        )
        model.load_state_dict(state["raw"])
    else:
        ema.load_state_dict(state)
