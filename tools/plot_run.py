"""Draw training_curves.png and detections.png of a run's output folder again."""

import argparse
import logging
import sys
from collections.abc import Sequence

from fcos_d2.visualization import plot_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, print where the pictures are, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="OUTPUT_DIR of a run")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        pictures = plot_run(parser.parse_args(arguments).output_dir)
    except (OSError, ValueError) as error:
        print("plot_run:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    for picture in pictures:
        print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
