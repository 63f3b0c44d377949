"""The parts of detection that are measured: the jobs of each, fcos_d2's and those of the peers."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fcos_d2.modeling.optimize import optimize_for_inference

from .agreement import compare_detections, compare_labels
from .inputs import Case, detection_maps, make_images, make_samples, training_maps
from .measure import Job, autocast, matmul_precision
from .peers import Maps, Peer, as_instances, build_peers, ours_peer, set_candidates


@dataclasses.dataclass
class Bench:
    """What all parts share.

    Attributes:
        peers: fcos_d2 first.
        device: "cpu" or "cuda".
        depth: of the ResNet.
        precisions: of "fp32", "tf32", "bf16", for infer and train.
        compiled: whether infer and train are measured compiled as well.
    """

    peers: list[Peer]
    device: str
    depth: int
    precisions: dict[str, list[str]]
    compiled: bool = False

    def compiled_peers(self) -> list[Peer]:
        """All peers once more, with compiled backbones and heads."""
        peers = build_peers([x.name for x in self.peers[1:]], self.depth, self.device)
        for one, other in zip(peers, self.peers, strict=True):
            one.predictor.load_state_dict(other.predictor.state_dict())
            for module in one.network:
                module.compile(dynamic=True)  # as optimize_for_inference does
        return peers


@dataclasses.dataclass
class Entry:
    """A job with what tells it from the others of its part and case.

    Attributes:
        job: its name is that of the library.
        precision: "fp32", "tf32" or "bf16".
        variant: what else is special, such as "optimized"; "" for the library as it is.
        compiled: whether backbone and head are.
    """

    job: Job
    precision: str = "fp32"
    variant: str = ""
    compiled: bool = False


def match_entries(bench: Bench, case: Case) -> list[Entry]:
    """Ground truth to what the losses need of it; the grid is there."""
    samples, maps = make_samples(case, bench.device), training_maps(case, bench.device)
    entries = []
    for peer in bench.peers:
        match, (grid, targets) = peer.match, _match_inputs(peer, maps, samples, case)
        if peer.twin:
            compare_labels(peer.name, *(_labels(x, maps, samples, case) for x in (peer.twin, peer)))
        entries.append(Entry(Job(peer.name, lambda f=match, g=grid, t=targets: f(g, t))))
    return entries


def _match_inputs(peer: Peer, maps: Maps, samples: Any, case: Case) -> tuple[Any, Any]:
    return peer.grid(maps, case.padded), peer.targets(samples)


def _labels(peer: Peer, maps: Maps, samples: Any, case: Case) -> Tensor:
    grid, targets = _match_inputs(peer, maps, samples, case)
    return peer.labels(peer.match(grid, targets), targets)


def loss_entries(bench: Bench, case: Case) -> list[Entry]:
    """Outputs of the last convolutions to the losses, and back; the matches are there."""
    samples, maps = make_samples(case, bench.device), training_maps(case, bench.device)
    entries = []
    for peer in bench.peers:
        grid, targets = _match_inputs(peer, maps, samples, case)
        matches = peer.match(grid, targets)
        entries.append(Entry(_loss_job(peer, grid, maps, matches, targets)))
    return entries


def _loss_job(peer: Peer, grid: Any, maps: Maps, matches: Any, targets: Any) -> Job:
    return Job(
        peer.name,
        lambda: peer.loss(grid, maps, matches, targets).backward(),
        prepare=lambda: _forget_gradients(maps),
    )


def _forget_gradients(maps: Maps) -> tuple:
    for x in (x for level in maps for x in level):
        x.grad = None
    return ()


def outside_entries(bench: Bench, case: Case) -> list[Entry]:
    """All of a training step but backbone, head and transfer of the data: grid, match, loss."""
    samples, maps = make_samples(case, bench.device), training_maps(case, bench.device)
    return [Entry(_outside_job(peer, maps, peer.targets(samples), case)) for peer in bench.peers]


def _outside_job(peer: Peer, maps: Maps, targets: Any, case: Case) -> Job:
    def run() -> None:
        grid = peer.grid(maps, case.padded)
        peer.loss(grid, maps, peer.match(grid, targets), targets).backward()

    return Job(peer.name, run, prepare=lambda: _forget_gradients(maps))


def decode_entries(bench: Bench, case: Case) -> list[Entry]:
    """Outputs of the head to detections; the grid is there, and the outputs are fresh."""
    maps = detection_maps(case, bench.device, bench.peers[0])
    entries = []
    for peer in bench.peers:
        job = _decode_job(peer, maps, case)
        if peer.twin:
            theirs, ours = (
                as_instances(x.run(*x.prepare())) for x in (job, _decode_job(peer.twin, maps, case))
            )
            compare_detections(peer.name, ours, theirs, case.image_sizes)
        entries.append(Entry(job))
    return entries


def _decode_job(peer: Peer, maps: Maps, case: Case) -> Job:
    grid = peer.grid(maps, case.padded)

    def prepare() -> tuple:
        # Detectron2 changes them in place.
        return (peer.head_outputs(Maps(*([x.clone() for x in level] for level in maps))),)

    @torch.no_grad()
    def run(outputs: Any) -> Any:
        return peer.decode(grid, outputs, case.image_sizes)

    return Job(peer.name, run, prepare)


def train_entries(bench: Bench, case: Case) -> list[Entry]:
    """Forward, losses and backward, without the optimizer."""
    samples = make_samples(case, bench.device)
    ours = bench.peers[0]
    channels_last = ours_peer(copy.deepcopy(ours.model).to(memory_format=torch.channels_last))
    entries = []
    for compiled in [False, True][: 1 + bench.compiled]:
        peers = bench.compiled_peers() if compiled else bench.peers
        variants = [(peer, "") for peer in peers]
        if not compiled:
            variants.insert(1, (channels_last, "channels last"))
        for precision in bench.precisions["train"]:
            for peer, variant in variants:
                job = _train_job(peer, samples, precision, bench.device)
                job.countable = _is_countable(bench, compiled)
                entries.append(Entry(job, precision, variant, compiled))
    return entries


def _is_countable(bench: Bench, compiled: bool) -> bool:
    """Operators of compiled code can be counted on the device only."""
    return bench.device == "cuda" or not compiled


def _train_job(peer: Peer, samples: Any, precision: str, device: str) -> Job:
    inputs = peer.training_inputs(samples)

    def prepare() -> tuple:
        peer.set_training(True)
        peer.model.zero_grad(set_to_none=True)
        return ()

    def run() -> None:
        with matmul_precision(precision):
            with autocast(precision, device):
                loss = peer.train(inputs)
            loss.backward()

    return Job(peer.name, run, prepare)


def infer_entries(bench: Bench, case: Case) -> list[Entry]:
    """The whole model, from images at the network's size to detections."""
    images = make_images(case, bench.device)
    set_candidates(bench.peers, images)
    entries = []
    for compiled in [False, True][: 1 + bench.compiled]:
        peers = bench.compiled_peers() if compiled else bench.peers
        for precision in bench.precisions["infer"]:
            for peer in peers:
                run = _precise(peer.detect, precision, bench.device)
                job = _infer_job(peer, run, images)
                entries.append(Entry(job, precision, compiled=compiled))
            model = _optimized(bench, precision, compiled)
            run = _precise(model, precision, bench.device, mixed=False)
            job = _infer_job(bench.peers[0], run, images)
            entries.append(Entry(job, precision, "optimized", compiled))
    for entry in entries:
        entry.job.countable = _is_countable(bench, entry.compiled)
    return entries


def _optimized(bench: Bench, precision: str, compiled: bool) -> nn.Module:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = bench.peers[0].model.eval()
    return optimize_for_inference(model, dtype=dtype, compile=compiled)


def _precise(
    detect: Callable[[Any], Any], precision: str, device: str, mixed: bool = True
) -> Callable[[Any], Any]:
    """Run in a precision; a model that is in bfloat16 itself is not to be mixed."""

    @torch.no_grad()
    def run(images: Any) -> Any:
        with matmul_precision(precision), autocast(precision if mixed else "fp32", device):
            return detect(images)

    return run


def _infer_job(peer: Peer, run: Callable[[Any], Any], images: Sequence[Tensor]) -> Job:
    inputs = peer.images(images)

    def prepare() -> tuple:
        peer.set_training(False)
        return (inputs,)

    return Job(peer.name, run, prepare)


ENTRIES: dict[str, Callable[[Bench, Case], list[Entry]]] = {
    "match": match_entries,
    "loss": loss_entries,
    "decode": decode_entries,
    "train": train_entries,
    "infer": infer_entries,
}
