"""Metadata and dependencies of fcos_d2. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Read ``__version__`` from the source: importing the package would require Detectron2."""
    text = (ROOT / "fcos_d2" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('fcos_d2/version.py has no line __version__ = "..."')
    return match.group(1)


def read_description() -> str:
    """Return the text of README.md, or "" in a checkout without it."""
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


# Detectron2 itself is not listed: the PyPI package of that name is unofficial, and Detectron2 is
# built against the installed PyTorch. tools/install_detectron2.py installs it.
INSTALL_REQUIRES = [
    "torch>=2.3",
    "torchvision>=0.18",
    "fvcore>=0.1.5",
    "jinja2",
    "numpy",
    "omegaconf>=2.1",
    "pillow>=9.1",
    "pycocotools>=2.0.2",
    "matplotlib>=3.6",
    "pandas>=2",
    "pyyaml",
    "tabulate",
    "tqdm",
    "yacs>=0.1.8",
]

EXTRAS_REQUIRE = {
    # Playwright drives the browser in which the report is tested, where one is installed.
    "dev": ["import-linter", "mypy", "playwright", "pytest", "pytest-cov", "ruff"],
    "docs": ["mkdocs"],
    # Detectron2 needs cv2, but four distributions provide that module (opencv-python, -headless,
    # -contrib-...) and overwrite each other's files. An environment with Detectron2 already has one
    # of them. `make` and new environments use this one, which works without libGL.
    "opencv": ["opencv-python-headless"],
    # Build and runtime requirements of Detectron2 (upstream and v0.5). Listed here to be locked in
    # requirements.txt, so that installing Detectron2 changes no locked version. The first lines of
    # that file show the command that regenerates it (add --upgrade for newer versions).
    "detectron2": [
        "setuptools",
        "wheel",
        "ninja",
        "black",
        "cloudpickle",
        "future",
        "fvcore>=0.1.5,<0.1.6",
        "hydra-core>=1.1",
        "iopath>=0.1.7,<0.1.10",
        "omegaconf>=2.1,<2.4",
        "packaging",
        "pydot",
        "tensorboard",
        "termcolor>=1.1",
    ],
}

setup(
    name="fcos_d2",
    version=read_version(),
    description="FCOS, an anchor-free one-stage object detector, as a Detectron2 extension",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=("fcos_d2", "fcos_d2.*")),
    package_data={"fcos_d2": ["py.typed"], "fcos_d2.visualization.report": ["*.j2"]},
    python_requires=">=3.10",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
