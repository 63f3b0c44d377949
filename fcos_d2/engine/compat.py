"""Workarounds for Detectron2 v0.5 and v0.6; main needs none of them.

To drop them, delete this file, derive ``Trainer`` from ``DefaultTrainer`` and call
``comm.create_local_process_group``.
"""

from detectron2.engine import DefaultTrainer
from detectron2.utils import comm


class ResumableTrainer(DefaultTrainer):
    """``DefaultTrainer`` with the optimizer's state in its checkpoints.

    Without it, a resumed run starts with zero momentum. Needed up to v0.6.
    """

    def state_dict(self) -> dict:
        """Return the state of the trainer, its hooks and the training step."""
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the result of :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])


def create_local_process_group(num_processes: int) -> None:
    """Let ``comm.get_local_rank`` work in processes that Detectron2 did not launch.

    Up to v0.6 there is no public way, and nothing that FCOS calls asks for the local rank.
    """
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(num_processes)
