"""Draw training_curves.png, detections.png and report.html of a run into its output folder."""

import argparse
import logging
import sys
from collections.abc import Sequence

from fcos_d2.visualization.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, print the files written, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="OUTPUT_DIR of a run")
    output_dir = parser.parse_args(arguments).output_dir
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fcos_d2").setLevel(logging.INFO)  # progress
    try:
        for path in write_report(output_dir):
            print(path)
    except (OSError, ValueError) as error:
        print("report:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
