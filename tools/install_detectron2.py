"""Install Detectron2 into the environment of the Python that runs this script.

Detectron2 is not on PyPI under its own name and is built against the installed PyTorch, so
requirements.txt can't list it. In this order:

1. Detectron2 can be imported: nothing is done.
2. Upstream at a pinned commit, with its compiled operators (needs git and a C++ compiler).
3. The sdist ``detectron2-cdo`` 0.5 from PyPI: the Python of Detectron2 v0.5 without its C++
   sources. Exact replacements make it run on current PyTorch, NumPy and Pillow; a placeholder for
   the compiled operators raises an error when one is called. FCOS needs none of them.

Usage:
    python tools/install_detectron2.py [--source auto|upstream|pypi] [--sdist FILE] [--quiet]
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

UPSTREAM = (
    "https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833"
)
SDIST_PROJECT = "detectron2-cdo"
SDIST_FILE = "detectron2_cdo-0.5.tar.gz"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
DEFAULT_INDEX = "https://pypi.org/simple"
NETWORK_TIMEOUT_S = 60
PIP = [sys.executable, "-m", "pip"]  # follows the user's own configuration
# Lines in which pip announces the error of another tool.
ANNOUNCEMENTS = ("subprocess-exited-with-error", "metadata-generation-failed", "ailed building")


class InstallError(Exception):
    """A reason, in one line, why Detectron2 could not be installed."""


class Replacement(NamedTuple):
    """``old`` occurs exactly ``count`` times in ``file``; ``new`` replaces every occurrence."""

    file: str
    old: str
    new: str
    count: int = 1


# Files are relative to the package.
REPLACEMENTS = [
    # NumPy 1.24 removed the aliases of Python's own types.
    Replacement("data/build.py", "dtype=np.int\n", "dtype=int\n"),
    Replacement("data/build.py", "dtype=np.int)", "dtype=int)"),
    Replacement("data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)"),
    Replacement("evaluation/pascal_voc_evaluation.py", "astype(np.bool)", "astype(bool)", 2),
    Replacement("evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)", 2),
    Replacement("evaluation/sem_seg_evaluation.py", "dtype=np.float)", "dtype=float)", 2),
    Replacement("evaluation/sem_seg_evaluation.py", "astype(np.float)", "astype(float)", 3),
    Replacement("structures/masks.py", "astype(np.bool)", "astype(bool)"),
    Replacement("structures/masks.py", "dtype=np.bool)", "dtype=bool)"),
    Replacement("utils/video_visualizer.py", "dtype=np.bool)", "dtype=bool)"),
    Replacement("utils/visualizer.py", "astype(np.bool)", "astype(bool)", 3),
    # NumPy 2: copy=False is an error where a copy can't be avoided.
    Replacement("layers/mask_ops.py", "np.array(mask, copy=False)", "np.asarray(mask)"),
    # Pillow 10 removed the alias LINEAR.
    Replacement("data/transforms/transform.py", "interp=Image.LINEAR", "interp=Image.BILINEAR"),
    # setuptools no longer has pkg_resources.
    Replacement("model_zoo/model_zoo.py", "import pkg_resources\n", ""),
    Replacement(
        "model_zoo/model_zoo.py",
        "pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )",
        'os.path.join(os.path.dirname(__file__), "configs", config_path)',
    ),
    # torch.meshgrid warns when it is not told the order of its axes.
    Replacement(
        "modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
    ),
    # caffe2, which this module needs, is gone from PyTorch.
    Replacement("export/__init__.py", "from .api import *\n", ""),
    # The sdist lacks the C++ sources: the COCO evaluator uses pycocotools' Python instead, as
    # upstream does where the compiled one can't be imported.
    Replacement(
        "evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "COCOeval_opt = COCOeval  # the compiled implementation is not part of this installation\n",
    ),
    Replacement("../setup.py", "    ext_modules=get_extensions(),\n", ""),
    Replacement(
        "../setup.py", '    cmdclass={"build_ext": torch.utils.cpp_extension.BuildExtension},\n', ""
    ),
    # Detectron2's own name with a version that identifies this variant; and the model zoo's
    # configs, which setup.py expects in a folder that the sdist lacks.
    Replacement("__init__.py", '__version__ = "0.5"', '__version__ = "0.5+purepython"'),
    Replacement("../setup.py", 'name="detectron2_cdo"', 'name="detectron2"'),
    Replacement("../setup.py", '"black==21.4b2"', '"black"'),
    Replacement(
        "../setup.py",
        '"detectron2.model_zoo": get_model_zoo_configs()',
        '"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]',
    ),
]

PLACEHOLDER = '''\
"""Placeholder of Detectron2's compiled operators: this is a pure-Python installation."""

_REASON = "this is a pure-Python installation of Detectron2 without compiled operators"


def get_compiler_version():
    """Return the text that ``detectron2.utils.collect_env`` prints."""
    return _REASON


get_cuda_version = get_compiler_version


def has_cuda():
    """No operator was compiled for CUDA. PyTorch's own CUDA operators don't depend on this."""
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing_operator(*args, **kwargs):
        raise NotImplementedError(
            f"detectron2._C.{name} can't be called: {_REASON}. "
            "Install Detectron2 from its own repository, with a C++ compiler, to use it."
        )

    return missing_operator
'''


def apply_replacements(root: Path, replacements: list[Replacement]) -> None:
    """Apply the replacements, in order, to the files below ``root``.

    Raises:
        InstallError: a file is missing, or does not contain the old text exactly ``count`` times.
    """
    for file, old, new, count in replacements:
        path = root / file
        if not path.is_file():
            raise InstallError(f"{file} is missing: can't replace {old!r} in it")
        text = path.read_text(encoding="utf-8")
        if text.count(old) != count:
            raise InstallError(f"{file} contains {old!r} {text.count(old)} times, not {count}")
        path.write_text(text.replace(old, new), encoding="utf-8")


def verify_sha256(path: Path, expected: str) -> None:
    """Raise InstallError unless the file has this SHA-256 (hexadecimal)."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InstallError(f"{path} can't be read: {error.strerror}") from error
    if found != expected:
        raise InstallError(f"{path} has SHA-256 {found}, not {expected}: not installed")


def unpack_sdist(sdist: Path, folder: Path) -> Path:
    """Unpack a ``.tar.gz`` source distribution and return its top folder."""
    # The filter is new in Python 3.11.4; the archive's hash is verified in any case.
    options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **options)
    (root,) = folder.iterdir()
    return root


def run(command: list[str], cwd: Path, timeout: float | None = None) -> str:
    """Run a command without prompts and return its output.

    Raises:
        InstallError: it failed, or took longer than ``timeout`` seconds.
    """
    # English messages, for failure_line.
    settings = {"GIT_TERMINAL_PROMPT": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "LANGUAGE": "en"}
    try:
        result = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"{command[0]} did not answer within {timeout:.0f} s") from error
    if result.returncode != 0:
        raise InstallError(failure_line(result.stdout))
    return result.stdout


def failure_line(output: str) -> str:
    """Return the line of a failed command's output that explains the failure best."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for mark in ("fatal error: ", "fatal: ", "error: "):
        for line in lines:
            if mark in line.lower() and not any(text in line for text in ANNOUNCEMENTS):
                return line
    return lines[-1] if lines else "it failed without output"


def build_and_install(requirement: str, work: Path) -> None:
    """Build a wheel from a folder or URL, then install it with its requirements.

    A failed build leaves the environment as it was. The build is not isolated: Detectron2's
    setup.py imports PyTorch.
    """
    options = ["--no-deps", "--no-build-isolation", "-w", "wheels"]
    run([*PIP, "wheel", *options, requirement], work)
    (wheel,) = (work / "wheels").glob("*.whl")
    run([*PIP, "install", str(wheel)], work)


def install_upstream(upstream: str, work: Path) -> None:
    """Compile and install Detectron2 from ``URL@COMMIT`` of a git repository."""
    if shutil.which("git") is None:
        raise InstallError("git is not installed")
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        raise InstallError("no C++ compiler (c++, g++, clang++ or $CXX) is installed")
    url = upstream.rpartition("@")[0]
    run(["git", "ls-remote", url, "HEAD"], work, timeout=NETWORK_TIMEOUT_S)
    say(f"compiling {upstream}; this takes some minutes")
    build_and_install(f"git+{upstream}", work)


def read_url(url: str) -> bytes:
    """Return the content of a URL."""
    with urllib.request.urlopen(url, timeout=NETWORK_TIMEOUT_S) as response:
        return response.read()


def index_urls(work: Path) -> list[str]:
    """Return the package indexes that pip is configured to use."""
    settings: dict[str, str] = {}
    for line in run([*PIP, "config", "list"], work).splitlines():  # sorted: the environment first
        key, _, value = line.partition("=")
        settings.setdefault(key.rpartition(".")[2], ast.literal_eval(value))
    extra = settings.get("extra-index-url", "")
    return [settings.get("index-url", DEFAULT_INDEX), *extra.split()]


def download_sdist(work: Path) -> Path:
    """Download the sdist from the first package index that has it.

    ``pip download`` would run the sdist's setup.py, and pip since 26.3 rejects its metadata.
    """
    reasons = []
    for index in index_urls(work):
        page = f"{index.rstrip('/')}/{SDIST_PROJECT}/"
        if "@" in page:
            reasons.append("indexes with a password are not supported")
            continue
        try:
            text = read_url(f"{page}index.html" if page.startswith("file:") else page).decode()
            link = re.search(rf"""href\s*=\s*["']([^"'#]+{re.escape(SDIST_FILE)})[#"']""", text)
            if link is None:
                raise OSError(f"no {SDIST_FILE} there")
            path = work / SDIST_FILE
            path.write_bytes(read_url(urllib.parse.urljoin(page, html.unescape(link[1]))))
        except (OSError, ValueError) as error:
            reasons.append(f"{page}: {error}")
            continue
        return path
    raise InstallError("it can't be downloaded: " + "; ".join(reasons))


def install_sdist(sdist: Path | None, work: Path) -> None:
    """Patch the sdist of Detectron2 v0.5, downloaded if None, and install it as pure Python."""
    sdist = sdist or download_sdist(work)
    verify_sha256(sdist, SDIST_SHA256)
    root = unpack_sdist(sdist, work / "source")
    apply_replacements(root / "detectron2", REPLACEMENTS)
    (root / "detectron2" / "_C.py").write_text(PLACEHOLDER, encoding="utf-8")
    say(f"applied {len(REPLACEMENTS)} replacements to {SDIST_FILE}, building a wheel")
    build_and_install(str(root), work)


def find_detectron2() -> tuple[str, str] | None:
    """Return the version and folder of the installed Detectron2; None if there is none.

    Raises:
        InstallError: it is installed, but importing it fails.
    """
    # In a new process, which sees packages just installed; in an empty folder, so that no
    # ./detectron2 is mistaken for an installation.
    code = (
        "import importlib.util, json\n"
        "spec = importlib.util.find_spec('detectron2')\n"
        "if spec is None or spec.origin is None: print('null'); raise SystemExit\n"
        "import detectron2, detectron2.engine\n"
        "print(json.dumps([str(detectron2.__version__), spec.origin]))"
    )
    with tempfile.TemporaryDirectory() as empty:
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=empty, capture_output=True, text=True
        )
    if result.returncode != 0:
        reason = (result.stderr.strip() or f"exit status {result.returncode}").splitlines()[-1]
        raise InstallError(
            f"the installed Detectron2 can't be imported ({reason}); remove it with "
            f"`{sys.executable} -m pip uninstall detectron2`, then run this again"
        )
    found = json.loads(result.stdout.splitlines()[-1])
    return found and (found[0], str(Path(found[1]).parent))


def check_requirements() -> None:
    """Raise InstallError unless this environment has everything that the build needs."""
    if importlib.util.find_spec("torch") is None:
        raise InstallError(
            f"PyTorch is not installed in {sys.prefix}, and Detectron2 is built against it: "
            f"first run `{sys.executable} -m pip install -r requirements.txt`"
        )
    for name in ("pip", "setuptools", "wheel"):
        if importlib.util.find_spec(name) is None:
            raise InstallError(f"the build needs {name}, not installed in {sys.prefix}")


def install(source: str, upstream: str, sdist: Path | None) -> None:
    """Install from the first source that works.

    Raises:
        InstallError: none did; with all reasons.
    """
    check_requirements()
    reasons = []
    for attempt in ("upstream", "pypi") if source == "auto" else (source,):
        name = f"upstream ({upstream})"
        if attempt == "pypi":
            name = f"the sdist ({sdist or SDIST_FILE + ' of the package index'})"
        say(f"trying {name}")
        try:
            with tempfile.TemporaryDirectory(prefix="install_detectron2_") as work:
                if attempt == "upstream":
                    install_upstream(upstream, Path(work))
                else:
                    install_sdist(sdist, Path(work))
            return
        except InstallError as error:
            say(f"could not install {name}: {error}")
            reasons.append(f"{name}: {error}")
    if sdist is None:
        reasons.append(f"without a network, download {SDIST_FILE} elsewhere and use --sdist FILE")
    raise InstallError("; ".join(reasons))


def say(message: str) -> None:
    """Print one line of progress at once."""
    print(f"install_detectron2: {message}", flush=True)


def get_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Install Detectron2 for this Python: nothing if it can be imported, else "
        "upstream at a pinned commit, else the pure Python of v0.5 from PyPI."
    )
    add = parser.add_argument
    sources = ("auto", "upstream", "pypi")
    add("--source", choices=sources, default="auto", help="auto (default): upstream, then pypi")
    add("--upstream", default=UPSTREAM, metavar="URL@COMMIT", help="default: %(default)s")
    sdist = f"a downloaded {SDIST_FILE}, for machines without a network; upstream is not tried"
    add("--sdist", type=Path, metavar="FILE", help=sdist)
    add("--quiet", action="store_true", help="print nothing if Detectron2 can be imported already")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = get_parser().parse_args(arguments)
    try:
        found = find_detectron2()
        if found is not None:
            if not options.quiet:
                say(f"Detectron2 {found[0]} is installed already ({found[1]})")
            return 0
        say("Detectron2 can't be imported in this environment")
        sdist = options.sdist and options.sdist.resolve()
        install("pypi" if sdist else options.source, options.upstream, sdist)
        found = find_detectron2()
        if found is None:
            raise InstallError("pip installed it, but Detectron2 still can't be found")
    except InstallError as error:
        print(f"install_detectron2: Detectron2 was not installed. {error}", file=sys.stderr)
        return 1
    say(f"installed Detectron2 {found[0]} ({found[1]})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
