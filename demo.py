"""Draw detections: python demo.py --config-file FILE --input a.jpg dir/ '*.png' --output out/."""

import argparse
from pathlib import Path

from detectron2.utils.logger import setup_logger

from fcos_d2.engine.predict import (
    Predictor,
    expand_inputs,
    predict_images,
    predict_video,
    show_webcam,
)
from fcos_d2.engine.setup import RunConfig


def get_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description="Draw the detections of a trained FCOS.")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="yaml recipe")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", help="images, folders of images, glob patterns")
    source.add_argument("--video-input", metavar="FILE", help="a video file")
    source.add_argument("--webcam", action="store_true", help="the first camera, in a window")
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder to write")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="minimum score of drawn detections"
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="KEY VALUE pairs over the config; TEST.OPTIMIZE bfloat16 makes it faster",
    )
    return parser


def main() -> None:
    """Build the predictor and run it on the input."""
    args = get_parser().parse_args()
    setup_logger(name="fcos_d2")
    paths = expand_inputs(args.input or [])
    run = RunConfig(args.config_file, args.opts)
    predictor = Predictor(run.cfg, keep=run.overrides, score_threshold=args.threshold)
    if args.webcam:
        show_webcam(predictor, args.threshold)
    elif args.video_input:
        print(f"Wrote {predict_video(predictor, args.video_input, args.output, args.threshold)}")
    else:
        written = predict_images(predictor, paths, args.output, args.threshold)
        print(f"Wrote {len(written)} of {len(paths)} images to {args.output}")


if __name__ == "__main__":
    main()
