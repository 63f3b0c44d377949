"""Detect objects in images, videos and a webcam stream, and draw them."""

import glob
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import ColorMode, Visualizer
from PIL import Image as PILImage
from torch import nn
from tqdm import tqdm

from ..checkpoint import FCOSCheckpointer, apply_checkpoint_keys, read_info
from ..config import class_nodes
from ..files import atomic_path
from ..modeling.optimize import inference_options, optimize_for_inference
from ..modeling.tta import FCOSWithTTA
from ..visualization.detections import plain_text

logger = logging.getLogger(__name__)

# Raised by Pillow for broken and for suspiciously large files.
_UNREADABLE = (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError)
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Predictor(DefaultPredictor):
    """Detectron2's predictor with the class names and the keys of the checkpoint."""

    model: nn.Module

    def __init__(
        self, cfg: CfgNode, keep: Collection[str] = (), score_threshold: float | None = None
    ):
        """Build the model of ``cfg`` and load MODEL.WEIGHTS.

        The number of classes is the checkpoint's. Class names come from the checkpoint, else from
        the metadata of DATASETS.TEST, else they are numbers. TEST.AUG.ENABLED detects with
        test-time augmentation (:class:`FCOSWithTTA`).

        Args:
            cfg: a recipe; the keys that the checkpoint was made for override it.
            keep: keys of ``cfg`` that the checkpoint does not override.
            score_threshold: lowers the score thresholds of the model to this, if they are higher.

        Raises:
            FileNotFoundError: no such checkpoint.
            ValueError: the checkpoint is not a trained FCOS, the model only gives proposals, or
                TEST.OPTIMIZE or TEST.AUG is invalid or does not suit the model.
            RuntimeError: TEST.OPTIMIZE asks for compilation, and ``torch.compile`` does not work.
        """
        if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
            raise ValueError(
                "MODEL.META_ARCHITECTURE ProposalNetwork gives proposals, not detections to draw: "
                "train_net.py --eval-only measures their recall."
            )
        options = inference_options(cfg)
        cfg = cfg.clone()
        cfg.defrost()
        weights = cfg.MODEL.WEIGHTS
        names, num_classes, _ = read_info(weights)
        apply_checkpoint_keys(cfg, weights, training=False, keep=keep)
        for node in class_nodes(cfg).values():
            if names or num_classes:
                node.NUM_CLASSES = len(names) or num_classes
            if score_threshold is not None:
                node.SCORE_THRESH_TEST = min(node.SCORE_THRESH_TEST, score_threshold)
        if not names and len(cfg.DATASETS.TEST):
            names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("thing_classes", [])
        # Detectron2's checkpointer would accept weights without a head, so it gets none.
        cfg.MODEL.WEIGHTS = ""
        super().__init__(cfg)
        FCOSCheckpointer(self.model, cfg=self.cfg, for_inference=True).load(weights)
        if self.cfg.MODEL.CHANNELS_LAST:
            self.model.to(memory_format=torch.channels_last)
        if options:
            self.model = optimize_for_inference(self.model, **options)
        if cfg.TEST.AUG.ENABLED:
            self.model = FCOSWithTTA(cfg, self.model)
            self.aug = ResizeShortestEdge(0)  # none: each view is resized from the original image
        names = names or [str(k) for k in range(self.cfg.MODEL.FCOS.NUM_CLASSES)]
        self.metadata = Metadata().set(thing_classes=list(names))


def expand_inputs(patterns: Iterable[str]) -> list[Path]:
    """List the images of files, folders and glob patterns, each once.

    Raises:
        FileNotFoundError: an item without an image.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        if os.path.isdir(pattern):
            names = sorted(p for p in Path(pattern).iterdir() if _is_image(p))
        elif os.path.isfile(pattern):
            names = [Path(pattern)]
        else:
            names = [Path(p) for p in sorted(glob.glob(pattern, recursive=True)) if _is_image(p)]
        if not names:
            raise FileNotFoundError(
                f"--input {pattern}: no such file, or a folder or pattern without an image "
                f"({', '.join(IMAGE_SUFFIXES)})."
            )
        found.update(dict.fromkeys(names))
    return list(found)


def predict_images(
    predictor: Predictor, paths: Sequence[Path], output_dir: Path, threshold: float
) -> list[Path]:
    """Draw the detections of each image into ``output_dir``.

    An image that can't be read is logged and skipped.

    Args:
        predictor: with its class names.
        paths: of the images.
        output_dir: created if missing.
        threshold: minimum score of the drawn detections.

    Returns:
        The files written, named after the images; later images of the same name get a number.
    """
    written: list[Path] = []
    taken: set[str] = set()
    for path in tqdm(paths, unit="image"):
        try:
            image = read_image(str(path), format="BGR")
        except _UNREADABLE as error:
            logger.error("Skipped %s: it can't be read as an image (%s).", path, error)
            continue
        instances = above_threshold(predictor(image)["instances"], threshold)
        visualizer = Visualizer(image[:, :, ::-1], predictor.metadata)
        with plain_text():
            picture = visualizer.draw_instance_predictions(instances)
        target = output_dir / _free_name(path, taken)
        _write_image(target, picture.get_image()[:, :, ::-1])
        written.append(target)
    return written


def draw_video(
    predictor: Predictor, capture: cv2.VideoCapture, threshold: float
) -> Iterator[np.ndarray]:
    """Yield the frames of an opened video, BGR, with their detections drawn."""
    visualizer = VideoVisualizer(predictor.metadata, ColorMode.IMAGE)
    while True:
        success, frame = capture.read()
        if not success:
            return
        instances = above_threshold(predictor(frame)["instances"], threshold)
        with plain_text():
            picture = visualizer.draw_instance_predictions(frame[:, :, ::-1], instances)
        yield np.ascontiguousarray(picture.get_image()[:, :, ::-1])


def predict_video(predictor: Predictor, path: str, output_dir: Path, threshold: float) -> Path:
    """Draw the detections of a video file into ``output_dir/<name>.mp4``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no frame of it can be read.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--video-input {path}: no such file.")
    capture = cv2.VideoCapture(path)
    rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
    count = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT))) or None
    target = output_dir / f"{Path(path).stem}.mp4"
    writer = None
    with atomic_path(target) as temporary:
        try:
            for frame in tqdm(draw_video(predictor, capture, threshold), total=count, unit="frame"):
                if writer is None:
                    size, codec = (frame.shape[1], frame.shape[0]), cv2.VideoWriter.fourcc(*"mp4v")
                    writer = cv2.VideoWriter(str(temporary), codec, rate, size)
                writer.write(frame)
        finally:
            capture.release()
            if writer is not None:
                writer.release()
        if writer is None:
            raise ValueError(f"--video-input {path}: no frame of it can be read.")
    return target


def show_webcam(predictor: Predictor, threshold: float) -> None:
    """Draw the detections of the first camera in a window until Esc is pressed.

    Raises:
        RuntimeError: no camera, or OpenCV without window support.
    """
    capture = cv2.VideoCapture(0)
    if not capture.isOpened():
        raise RuntimeError("--webcam: no camera can be opened.")
    try:
        for frame in draw_video(predictor, capture, threshold):
            try:
                cv2.imshow("fcos_d2", frame)
            except cv2.error as error:
                raise RuntimeError(
                    "--webcam needs OpenCV with window support: pip uninstall "
                    "opencv-python-headless, then pip install opencv-python."
                ) from error
            if cv2.waitKey(1) == 27:
                return
    finally:
        capture.release()


def above_threshold(instances: Instances, threshold: float) -> Instances:
    """Return the detections with at least this score, on the CPU."""
    return instances[instances.scores >= threshold].to("cpu")


def _is_image(path: str | Path) -> bool:
    return str(path).lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(path)


def _free_name(path: Path, taken: set[str]) -> str:
    name, number = f"{path.stem}.png", 1
    while name in taken:
        number += 1
        name = f"{path.stem}_{number}.png"
    taken.add(name)
    return name


def _write_image(target: Path, image: np.ndarray) -> None:
    with atomic_path(target) as temporary:
        if not cv2.imwrite(str(temporary), image):
            raise OSError(f"{target} can't be written.")
