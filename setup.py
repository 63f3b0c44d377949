"""Metadata and dependencies of fcos_d2; the settings of tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Read ``__version__`` as text: importing the package would need Detectron2 already."""
    text = (ROOT / "fcos_d2" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('fcos_d2/__init__.py has no line __version__ = "..."')
    return match.group(1)


def read_description() -> str:
    """The README; empty in a checkout that lacks it."""
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


# Detectron2 itself is missing here on purpose. It is not on PyPI under its name (what is called
# so there is nobody's promise), and it is built against the PyTorch that is installed already.
# tools/install_detectron2.py installs it.
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
    # Playwright drives the browser that the report is tested in, where there is one.
    "dev": ["playwright", "pytest", "ruff"],
    # Detectron2 draws and rotates with cv2, but four distributions bring that module
    # (opencv-python, -headless, -contrib-...) and they overwrite each other's files. Whoever has
    # Detectron2 has one of them, so none is forced on them. `make` and a new environment take this
    # one, which needs no libGL and serves servers and desktops alike.
    "opencv": ["opencv-python-headless"],
    # What it takes to build Detectron2, and what upstream and v0.5 require when they are installed.
    # They are here to be locked in requirements.txt, so that Detectron2 changes no locked version;
    # the head of that file tells how it is made again from this one (add --upgrade for news).
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
    package_data={"fcos_d2.visualization.report": ["*.j2"]},
    python_requires=">=3.10",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
