"""Install Detectron2 into the environment of the Python that runs this script.

Detectron2 is not on PyPI under its own name, and building it needs PyTorch first, so it can't be
an ordinary line of requirements.txt. In this order:

1. Detectron2 can be imported already: nothing is done.
2. Upstream at a pinned commit, with its compiled operators (git and a C++ compiler are needed).
3. The sdist ``detectron2-cdo`` 0.5 from PyPI: Detectron2 v0.5's Python without its C++ sources.
   A table of exact replacements makes it run on today's PyTorch, NumPy and Pillow, and its
   compiled operators become a placeholder that says so when one is called. FCOS needs none of them.

Usage:
    python tools/install_detectron2.py [--source auto|upstream|pypi] [--sdist FILE] [--quiet]
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import html
import http.client
import importlib.util
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

UPSTREAM = (
    "https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833"
)
SDIST_PROJECT = "detectron2-cdo"
SDIST_REQUIREMENT = f"{SDIST_PROJECT}==0.5"
SDIST_FILE = "detectron2_cdo-0.5.tar.gz"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
NETWORK_TIMEOUT_S = 60
# With these pip announces an error that a tool reports in its own words.
ANNOUNCEMENTS = ("subprocess-exited-with-error", "metadata-generation-failed", "ailed building")


class InstallError(Exception):
    """A reason, in one line, why Detectron2 could not be installed."""


class Replacement(NamedTuple):
    """``old`` stands exactly ``count`` times in ``file`` and becomes ``new`` everywhere."""

    file: str
    old: str
    new: str
    count: int = 1


# NumPy 1.24 removed the aliases of Python's own types.
NUMPY_REPLACEMENTS = [
    Replacement("detectron2/data/build.py", "dtype=np.int\n", "dtype=int\n"),
    Replacement("detectron2/data/build.py", "dtype=np.int)", "dtype=int)"),
    Replacement("detectron2/data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)"),
    Replacement(
        "detectron2/evaluation/pascal_voc_evaluation.py", "astype(np.bool)", "astype(bool)", 2
    ),
    Replacement("detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)", 2),
    Replacement(
        "detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.float)", "dtype=float)", 2
    ),
    Replacement(
        "detectron2/evaluation/sem_seg_evaluation.py", "astype(np.float)", "astype(float)", 3
    ),
    Replacement("detectron2/structures/masks.py", "astype(np.bool)", "astype(bool)"),
    Replacement("detectron2/structures/masks.py", "dtype=np.bool)", "dtype=bool)"),
    Replacement("detectron2/utils/video_visualizer.py", "dtype=np.bool)", "dtype=bool)"),
    Replacement("detectron2/utils/visualizer.py", "astype(np.bool)", "astype(bool)", 3),
    # NumPy 2: copy=False is an error where a copy can't be avoided.
    Replacement("detectron2/layers/mask_ops.py", "np.array(mask, copy=False)", "np.asarray(mask)"),
]

# Pillow 10 removed the alias LINEAR.
PILLOW_REPLACEMENTS = [
    Replacement(
        "detectron2/data/transforms/transform.py", "interp=Image.LINEAR", "interp=Image.BILINEAR"
    ),
]

# setuptools no longer has pkg_resources.
SETUPTOOLS_REPLACEMENTS = [
    Replacement("detectron2/model_zoo/model_zoo.py", "import pkg_resources\n", ""),
    Replacement(
        "detectron2/model_zoo/model_zoo.py",
        "pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )",
        'os.path.join(os.path.dirname(__file__), "configs", config_path)',
    ),
]

# torch.meshgrid warns when it is not told the order of its axes.
PYTORCH_REPLACEMENTS = [
    Replacement(
        "detectron2/modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
    ),
]

# caffe2 is gone from PyTorch: without it, detectron2.export keeps what doesn't need it.
CAFFE2_REPLACEMENTS = [
    Replacement(
        "detectron2/export/__init__.py",
        "from .api import *\n",
        "try:\n"
        "    import caffe2.proto  # noqa\n"
        "except ImportError:\n"
        "    pass\n"
        "else:\n"
        "    from .api import *\n",
    ),
]

# The sdist lacks the C++ sources: the COCO evaluator falls back to the Python it is derived from,
# as upstream does today where the compiled one can't be imported.
COMPILED_CODE_REPLACEMENTS = [
    Replacement(
        "detectron2/evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "COCOeval_opt = COCOeval  # the compiled implementation is not part of this installation\n",
    ),
    Replacement("setup.py", "    ext_modules=get_extensions(),\n", ""),
    Replacement(
        "setup.py", '    cmdclass={"build_ext": torch.utils.cpp_extension.BuildExtension},\n', ""
    ),
]

# The distribution is named as Detectron2 is, its version tells that it is this one, and the model
# zoo's configs come along (setup.py looks for them in a folder that the sdist lacks).
PACKAGING_REPLACEMENTS = [
    Replacement("detectron2/__init__.py", '__version__ = "0.5"', '__version__ = "0.5+purepython"'),
    Replacement("setup.py", 'name="detectron2_cdo"', 'name="detectron2"'),
    Replacement("setup.py", '"black==21.4b2"', '"black"'),
    Replacement(
        "setup.py",
        '"detectron2.model_zoo": get_model_zoo_configs()',
        '"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]',
    ),
]

REPLACEMENTS = [
    *NUMPY_REPLACEMENTS,
    *PILLOW_REPLACEMENTS,
    *SETUPTOOLS_REPLACEMENTS,
    *PYTORCH_REPLACEMENTS,
    *CAFFE2_REPLACEMENTS,
    *COMPILED_CODE_REPLACEMENTS,
    *PACKAGING_REPLACEMENTS,
]

PLACEHOLDER_FILE = "detectron2/_C.py"
PLACEHOLDER = '''\
"""Placeholder of Detectron2's compiled operators: this is a pure-Python installation."""

_REASON = "this is a pure-Python installation of Detectron2 without compiled operators"


def get_compiler_version():
    """What ``detectron2.utils.collect_env`` prints."""
    return _REASON


def get_cuda_version():
    """What ``detectron2.utils.collect_env`` prints."""
    return _REASON


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


def apply_replacements(root: Path, replacements: Iterable[Replacement]) -> None:
    """Apply each replacement, in order, to the files below ``root``.

    Raises:
        InstallError: a file is missing, or doesn't hold the old text exactly ``count`` times.
    """
    for file, old, new, count in replacements:
        path = Path(root) / file
        if not path.is_file():
            raise InstallError(f"{file} is missing: can't replace {old!r} in it")
        text = path.read_text(encoding="utf-8")
        found = text.count(old)
        if found != count:
            raise InstallError(f"{file} holds {old!r} {found} times, not {count}: not replaced")
        path.write_text(text.replace(old, new), encoding="utf-8")


def add_placeholder(root: Path) -> None:
    """Write the stand-in for ``detectron2._C`` below ``root``.

    Raises:
        InstallError: there is such a file already.
    """
    path = Path(root) / PLACEHOLDER_FILE
    if path.exists():
        raise InstallError(f"{PLACEHOLDER_FILE} is there already: a placeholder would hide it")
    path.write_text(PLACEHOLDER, encoding="utf-8")


def verify_sha256(path: Path, expected: str) -> None:
    """Compare a file's SHA-256 with ``expected`` (hexadecimal).

    Raises:
        InstallError: they differ, or the file can't be read.
    """
    try:
        found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InstallError(f"{path} can't be read: {error.strerror}") from error
    if found != expected:
        raise InstallError(f"{path} has SHA-256 {found}, not {expected}: not installed")


def unpack_sdist(sdist: Path, folder: Path) -> Path:
    """Unpack a ``.tar.gz`` source distribution and return the one folder that it holds."""
    # Python 3.11.4 brought the filter; the archive's hash was verified in any case.
    options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **options)
    (root,) = Path(folder).iterdir()
    return root


def run(command: list[str], cwd: Path, timeout: float | None = None) -> str:
    """Run a command that can't ask anything and return what it wrote.

    Raises:
        InstallError: it failed or took longer than ``timeout`` seconds; with the line that says so.
    """
    # No prompt for a password, and messages in the language that failure_line reads.
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
        raise InstallError(f"{command[0]} gave no answer in {timeout:.0f} s") from error
    if result.returncode != 0:
        raise InstallError(failure_line(result.stdout))
    return result.stdout


def failure_line(output: str) -> str:
    """The line of a failed command's output that says most about why."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for mark in ("fatal error: ", "fatal: ", "error: "):
        for line in lines:
            if mark in line.lower() and not any(text in line for text in ANNOUNCEMENTS):
                return line
    return lines[-1] if lines else "it failed without a word"


def pip(*arguments: str, cwd: Path) -> str:
    """Run this interpreter's pip, which follows the user's own configuration."""
    return run([sys.executable, "-m", "pip", *arguments], cwd)


def build_and_install(requirement: str, work: Path) -> None:
    """Build a wheel in ``work`` from a folder or URL, then install it with what it requires.

    Building apart from installing leaves the environment as it was when the build fails. The build
    is not isolated because Detectron2's setup.py imports the PyTorch that it will run with.
    """
    wheels = work / "wheels"
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), requirement, cwd=work)
    (wheel,) = wheels.glob("*.whl")
    pip("install", str(wheel), cwd=work)


def install_upstream(upstream: str, work: Path) -> None:
    """Compile and install Detectron2 from ``URL@COMMIT`` of a git repository."""
    url, _, commit = upstream.rpartition("@")
    if not url or not commit:
        raise InstallError(f"{upstream!r} is not URL@COMMIT")
    if shutil.which("git") is None:
        raise InstallError("git is not installed")
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")
    if not any(shutil.which(name.split()[0]) for name in compilers if name):
        raise InstallError("no C++ compiler (c++, g++, clang++ or $CXX) is installed")
    run(["git", "ls-remote", url, "HEAD"], work, timeout=NETWORK_TIMEOUT_S)
    say(f"compiling {upstream}; this takes some minutes")
    build_and_install(f"git+{upstream}", work)


def pip_settings() -> dict[str, str]:
    """The user's settings of pip, from its files and from the environment, by option name."""
    sections = ("global.", "install.", ":env:.")  # in the order in which pip lets them win
    lines = [line.partition("=") for line in pip("config", "list", cwd=Path.cwd()).splitlines()]
    return {
        key.removeprefix(section): ast.literal_eval(value)
        for section in sections
        for key, _, value in lines
        if key.startswith(section)
    }


def default_index() -> str:
    """The index that this pip asks where its settings name none, as its help states it."""
    stated = re.search(r"\(default\s+(\S+?)\)", pip("install", "--help", cwd=Path.cwd()))
    if stated is None:
        raise InstallError("pip does not say which index it uses: set it with pip's index-url")
    return stated.group(1)


def pages_of_links(settings: dict[str, str]) -> list[str]:
    """URLs of the pages and folders where pip would look for the sdist, in pip's order."""
    pages = [
        Path(place).resolve().as_uri() if Path(place).exists() else place
        for place in settings.get("find-links", "").split()
    ]
    if settings.get("no-index", "").lower() not in ("1", "true", "yes", "on"):
        indexes = (settings.get("index-url") or default_index()).split()
        indexes += settings.get("extra-index-url", "").split()
        pages += [f"{index.rstrip('/')}/{SDIST_PROJECT}/" for index in indexes]
    return pages


def read_url(url: str, settings: dict[str, str]) -> bytes:
    """Fetch a URL with the certificates, the proxy and the password that pip would use."""
    parts = urllib.parse.urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl())
    if user:
        token = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    context = ssl.create_default_context(cafile=settings.get("cert"))
    handlers = [urllib.request.HTTPSHandler(context=context)]
    if "proxy" in settings:
        proxy = settings["proxy"]
        handlers.append(urllib.request.ProxyHandler({"http": proxy, "https": proxy}))
    with urllib.request.build_opener(*handlers).open(request, timeout=NETWORK_TIMEOUT_S) as answer:
        return answer.read()


def find_sdist_url(page: str, settings: dict[str, str]) -> str:
    """The sdist's URL on a page of an index or in a folder (``file:`` URL).

    Raises:
        OSError: the page can't be read.
        LookupError: the sdist is not on it.
    """
    if page.startswith("file:"):
        folder = Path(urllib.request.url2pathname(urllib.parse.urlsplit(page).path))
        if (folder / SDIST_FILE).is_file():
            return (folder / SDIST_FILE).as_uri()
        page = f"{page.rstrip('/')}/index.html"
    text = read_url(page, settings).decode("utf-8", "replace")
    for href in re.findall(r"""<a\s[^>]*?href\s*=\s*["']([^"']+)["']""", text, re.IGNORECASE):
        url = urllib.parse.urldefrag(urllib.parse.urljoin(page, html.unescape(href))).url
        if url.rpartition("/")[2] == SDIST_FILE:
            return url
    raise LookupError(f"no {SDIST_FILE} there")


def download_sdist(work: Path) -> Path:
    """Fetch the sdist from wherever pip is configured to look, and verify its hash.

    ``pip download`` would run the sdist's setup.py, and pip since 26.3 refuses what that declares
    (a URL among its optional requirements) although only the sources are wanted.

    Raises:
        InstallError: it could not be had anywhere, with the reason of each place.
    """
    settings = pip_settings()
    reasons = []
    for page in pages_of_links(settings):
        try:
            content = read_url(find_sdist_url(page, settings), settings)
        except (OSError, LookupError, ValueError, http.client.HTTPException) as error:
            reasons.append(f"{re.sub('//[^/]*@', '//', page)}: {error}")
            continue
        path = work / SDIST_FILE
        path.write_bytes(content)
        verify_sha256(path, SDIST_SHA256)
        return path
    raise InstallError("it can't be downloaded: " + "; ".join(reasons or ["no index is set"]))


def install_sdist(sdist: Path | None, work: Path) -> None:
    """Make Detectron2 v0.5 run on today's libraries and install it as pure Python.

    Args:
        sdist: the source distribution, downloaded where this is None.
        work: a folder for temporary files.
    """
    if sdist is None:
        sdist = download_sdist(work)
    else:
        verify_sha256(sdist, SDIST_SHA256)
    root = unpack_sdist(sdist, work / "source")
    apply_replacements(root, REPLACEMENTS)
    add_placeholder(root)
    say(f"applied {len(REPLACEMENTS)} replacements to {SDIST_REQUIREMENT}, building a wheel")
    build_and_install(str(root), work)


def find_detectron2() -> tuple[str, str] | None:
    """The version and folder of an installed Detectron2 that works, None where there is none.

    Raises:
        InstallError: it is installed, but importing it fails.
    """
    # A process of its own: packages installed a moment ago are seen, and nothing stays imported.
    # Its folder is an empty one, so that no ./detectron2 is mistaken for an installation.
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
    return None if found is None else (found[0], str(Path(found[1]).parent))


def check_requirements() -> None:
    """Raise InstallError unless this environment has what building Detectron2 takes."""
    if importlib.util.find_spec("torch") is None:
        raise InstallError(
            f"PyTorch is not installed in {sys.prefix}, and Detectron2 builds on it: "
            f"first run `{sys.executable} -m pip install -r requirements.txt`"
        )
    missing = [
        name for name in ("pip", "setuptools", "wheel") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise InstallError(
            f"building Detectron2 needs {' and '.join(missing)}, not installed in {sys.prefix}"
        )


def install(source: str, upstream: str, sdist: Path | None) -> None:
    """Install from the first source that works, saying why the others did not.

    Raises:
        InstallError: none of them did; with all the reasons.
    """
    check_requirements()
    attempts = []
    if source in ("auto", "upstream"):
        attempts.append((f"upstream ({upstream})", lambda work: install_upstream(upstream, work)))
    if source in ("auto", "pypi"):
        name = f"the sdist ({sdist or SDIST_REQUIREMENT + ' of the package index'})"
        attempts.append((name, lambda work: install_sdist(sdist, work)))
    reasons = []
    for name, attempt in attempts:
        say(f"trying {name}")
        try:
            with tempfile.TemporaryDirectory(prefix="install_detectron2_") as work:
                attempt(Path(work))
            return
        except InstallError as error:
            say(f"could not install {name}: {error}")
            reasons.append(f"{name}: {error}")
    if sdist is None:
        reasons.append(f"without a network, --sdist FILE takes a copy of {SDIST_REQUIREMENT}")
    raise InstallError("; ".join(reasons))


def say(message: str) -> None:
    """Print one line of progress at once."""
    print(f"install_detectron2: {message}", flush=True)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Install Detectron2 for this Python: nothing if it can be imported, else "
        "upstream at a pinned commit, else the pure Python of v0.5 from PyPI."
    )
    parser.add_argument(
        "--source",
        choices=("auto", "upstream", "pypi"),
        default="auto",
        help="auto (default): upstream, then pypi",
    )
    parser.add_argument(
        "--upstream",
        default=UPSTREAM,
        metavar="URL@COMMIT",
        help="another git repository or commit to compile (default: %(default)s)",
    )
    parser.add_argument(
        "--sdist",
        type=Path,
        metavar="FILE",
        help=f"a downloaded sdist of {SDIST_REQUIREMENT}, for machines without a network; "
        "upstream is not tried",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no line when Detectron2 can be imported already"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        found = find_detectron2()
        if found is not None:
            if not options.quiet:
                say(f"Detectron2 {found[0]} is installed already ({found[1]})")
            return 0
        say("Detectron2 can't be imported in this environment")
        if options.sdist is not None:
            install("pypi", options.upstream, options.sdist.resolve())
        else:
            install(options.source, options.upstream, None)
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
