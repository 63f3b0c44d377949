"""`SavedSettings`: a module whose settings are part of its state dict."""

import json
from typing import Any

import torch
from torch import Tensor, nn

# fvcore's Checkpointer drops a tensor whose shape differs from the model's: the length is fixed.
_LENGTH = 512


class SavedSettings(nn.Module):
    """A module that saves the settings its weights depend on beside the weights.

    Tensor shapes do not show, for example, whether locations are at the centre or the corner of
    their cells. The attributes named by ``saved_settings`` (JSON values) are PyTorch's extra state
    of the module. A state dict that lacks them, or a buffer of the module, leaves them unchanged
    and is still complete.
    """

    saved_settings: tuple[str, ...] = ()

    def get_extra_state(self) -> Tensor:
        """Return the settings, see :func:`encode_settings`."""
        return encode_settings({name: getattr(self, name) for name in self.saved_settings})

    def set_extra_state(self, state: Tensor) -> None:
        """Set the settings that ``state`` holds."""
        for name, value in decode_settings(state).items():
            if name in self.saved_settings and value is not None:
                setattr(self, name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # As in Detectron2's FrozenBatchNorm2d: an older state dict misses nothing.
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        for name, buffer in self.named_buffers(recurse=False):
            state_dict.setdefault(f"{prefix}{name}", buffer)
        super()._load_from_state_dict(state_dict, prefix, *args)


def encode_settings(settings: dict[str, Any]) -> Tensor:
    """Return ``settings`` as JSON text in (512,) uint8.

    fvcore's Checkpointer accepts only tensors.
    """
    text = json.dumps(settings).encode().ljust(_LENGTH)
    if len(text) > _LENGTH:
        raise ValueError(f"The settings {settings} are longer than {_LENGTH} bytes.")
    return torch.tensor(list(text), dtype=torch.uint8, device="cpu")


def decode_settings(state: Tensor) -> dict[str, Any]:
    """Return the settings that :func:`encode_settings` made ``state`` from."""
    return json.loads(bytes(state.tolist()))
