"""Jobs of each part of detection, for fcos_d2 and the peers."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fcos_d2.modeling.optimize import optimize_for_inference
from peers import LevelOutputs, Peer

from .agreement import compare_detections, compare_labels, set_candidates
from .inputs import Case, detection_outputs, make_images, make_samples, training_outputs
from .loader import loader_jobs
from .measure import Job, precision_context

OUTSIDE = "outside backbone and head"


@dataclasses.dataclass
class Setup:
    """Models and settings of all parts."""

    peers: list[Peer]  # fcos_d2 first
    device: str  # "cpu" or "cuda"
    precisions: dict[str, list[str]]  # for infer and train, of "fp32", "tf32", "bf16"
    compiled: bool = False  # measure infer and train compiled as well
    folder: Path | None = None  # for temporary files

    def variants(self) -> list[tuple[bool, list[Peer]]]:
        """Return the peers as they are and, if asked for, once more with compiled networks."""
        if not self.compiled:
            return [(False, self.peers)]
        peers = copy.deepcopy(self.peers)
        for module in (x for peer in peers for x in (peer.model.backbone, peer.head)):
            module.compile(dynamic=True)  # as optimize_for_inference does
        return [(False, self.peers), (True, peers)]


def match_jobs(setup: Setup, case: Case) -> list[Job]:
    """From ground truth to the inputs of the losses."""
    samples, outputs = make_samples(case, setup.device), training_outputs(case, setup.device)
    jobs = []
    for peer in setup.peers:
        grid, ground_truth = peer.grid(outputs, case.padded), peer.ground_truth(samples)
        if peer.counterpart:
            labels = [_labels(x, outputs, samples, case) for x in (peer.counterpart, peer)]
            compare_labels(peer.name, *labels)
        jobs.append(Job(peer.name, lambda f=peer.match, g=grid, t=ground_truth: f(g, t)))
    return jobs


def _labels(peer: Peer, outputs: list[LevelOutputs], samples: list[dict], case: Case) -> Any:
    ground_truth = peer.ground_truth(samples)
    return peer.labels(peer.match(peer.grid(outputs, case.padded), ground_truth), ground_truth)


def loss_jobs(setup: Setup, case: Case) -> list[Job]:
    """From outputs of the last convolutions to the losses and their gradients."""
    samples, outputs = make_samples(case, setup.device), training_outputs(case, setup.device)
    return [_loss_job(peer, outputs, samples, case, with_matching=False) for peer in setup.peers]


def _loss_job(
    peer: Peer, outputs: list[LevelOutputs], samples: list[dict], case: Case, with_matching: bool
) -> Job:
    ground_truth = peer.ground_truth(samples)
    given_grid = peer.grid(outputs, case.padded)
    given_matches = peer.match(given_grid, ground_truth)

    def prepare() -> tuple:
        for x in (x for level in outputs for x in level):
            x.grad = None
        return ()

    def run() -> None:
        grid = peer.grid(outputs, case.padded) if with_matching else given_grid
        matches = peer.match(grid, ground_truth) if with_matching else given_matches
        peer.loss(grid, outputs, matches, ground_truth).backward()

    return Job(peer.name, run, prepare, variant=OUTSIDE if with_matching else "")


def decode_jobs(setup: Setup, case: Case) -> list[Job]:
    """From outputs of the head to detections."""
    outputs = detection_outputs(case, setup.device, setup.peers[0])
    jobs = []
    for peer in setup.peers:
        job = _decode_job(peer, outputs, case)
        if peer.counterpart:
            ours = _decode_job(peer.counterpart, outputs, case)
            got = peer.counterpart.as_instances(ours.run(*ours.prepare()))
            wanted = peer.as_instances(job.run(*job.prepare()))
            compare_detections(peer.name, got, wanted, case.image_sizes)
        jobs.append(job)
    return jobs


def _decode_job(peer: Peer, outputs: list[LevelOutputs], case: Case) -> Job:
    grid = peer.grid(outputs, case.padded)

    def prepare() -> tuple:
        # Copies: Detectron2 changes them in place.
        return (peer.bare_head([LevelOutputs(*(x.clone() for x in level)) for level in outputs]),)

    @torch.no_grad()
    def run(head_outputs: Any) -> Any:
        return peer.decode(grid, head_outputs, case.image_sizes)

    return Job(peer.name, run, prepare)


def train_jobs(setup: Setup, case: Case) -> list[Job]:
    """Forward, losses and backward, without the optimizer."""
    samples = make_samples(case, setup.device)
    channels_last = copy.deepcopy(setup.peers[0])
    channels_last.model.to(memory_format=torch.channels_last)
    jobs = []
    for compiled, peers in setup.variants():
        variants = [(peer, "") for peer in peers]
        if not compiled:
            variants.insert(1, (channels_last, "channels last"))
        for precision in setup.precisions["train"]:
            for peer, variant in variants:
                job = _train_job(peer, samples, precision, setup.device)
                job.variant, job.compiled = variant, compiled
                jobs.append(job)
    return jobs


def outside_jobs(setup: Setup, case: Case) -> list[Job]:
    """All of a training step but backbone and head: grid, matching, losses, their gradients."""
    samples, outputs = make_samples(case, setup.device), training_outputs(case, setup.device)
    return [_loss_job(peer, outputs, samples, case, with_matching=True) for peer in setup.peers]


def _train_job(peer: Peer, samples: Sequence[dict], precision: str, device: str) -> Job:
    inputs = peer.inputs(samples)

    def prepare() -> tuple:
        peer.set_training(True)
        peer.model.zero_grad(set_to_none=True)
        return ()

    def run() -> None:
        with precision_context(precision, device):
            loss = sum(peer.losses(inputs).values())
        with precision_context(precision, device, autocast=False):
            loss.backward()

    return Job(peer.name, run, prepare, precision=precision)


def infer_jobs(setup: Setup, case: Case) -> list[Job]:
    """From images at the network's size to detections."""
    samples = make_images(case, setup.device)
    set_candidates(setup.peers, samples)
    ours = setup.peers[0]
    jobs = []
    for compiled, peers in setup.variants():
        for precision in setup.precisions["infer"]:
            for peer in peers:
                jobs.append(_infer_job(peer, peer.detect, samples, precision, setup.device))
                jobs[-1].compiled = compiled
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            model = optimize_for_inference(ours.model.eval(), dtype=dtype, compile=compiled)
            job = _infer_job(
                ours, lambda x, m=model: m(*x), samples, precision, setup.device, autocast=False
            )
            job.variant, job.compiled = "optimized", compiled
            jobs.append(job)
    return jobs


def _infer_job(
    peer: Peer,
    detect: Callable[[tuple], Any],
    samples: Sequence[dict],
    precision: str,
    device: str,
    autocast: bool = True,
) -> Job:
    inputs = peer.inputs(samples)

    def prepare() -> tuple:
        peer.set_training(False)
        return (inputs,)

    @torch.no_grad()
    def run(inputs: tuple) -> Any:
        with precision_context(precision, device, autocast):
            return detect(inputs)

    return Job(peer.name, run, prepare, precision=precision)


# Jobs of one function are timed in turns.
JOBS: dict[str, tuple[Callable[[Setup, Case], list[Job]], ...]] = {
    "match": (match_jobs,),
    "loss": (loss_jobs,),
    "decode": (decode_jobs,),
    "train": (train_jobs, outside_jobs),
    "infer": (infer_jobs,),
    "loader": (lambda setup, case: loader_jobs(case, setup.folder),),
}
