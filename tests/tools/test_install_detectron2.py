"""The installer of Detectron2: its replacements, its sources and its errors."""

import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import install_detectron2 as installer
from install_detectron2 import InstallError, Replacement

SCRIPT = Path(installer.__file__)
BUILD_TOOLS = ("pip", "setuptools", "wheel")


# ---------------------------------------------------------------- the replacement step


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "a.py").write_text("x = np.int(np.int(3))\ny = np.int64(3)\n")
    (tmp_path / "pkg" / "b.py").write_text("import old\n")
    return tmp_path


def test_replacements_change_exactly_their_text(tree):
    replacements = [
        Replacement("pkg/a.py", "np.int(", "int(", 2),
        Replacement("pkg/b.py", "import old\n", ""),
    ]
    installer.apply_replacements(tree, replacements)
    assert (tree / "pkg" / "a.py").read_text() == "x = int(int(3))\ny = np.int64(3)\n"
    assert (tree / "pkg" / "b.py").read_text() == ""


def test_replacements_of_one_file_are_applied_in_order(tree):
    replacements = [
        Replacement("pkg/b.py", "old", "new"),
        Replacement("pkg/b.py", "import new", "import newer"),
    ]
    installer.apply_replacements(tree, replacements)
    assert (tree / "pkg" / "b.py").read_text() == "import newer\n"


def test_absent_text_is_an_error_that_names_file_and_text(tree):
    with pytest.raises(InstallError, match=r"pkg/b\.py contains 'import gone' 0 times, not 1"):
        installer.apply_replacements(tree, [Replacement("pkg/b.py", "import gone", "")])
    assert (tree / "pkg" / "b.py").read_text() == "import old\n"


@pytest.mark.parametrize("count", [1, 3])
def test_another_count_is_an_error_that_names_file_and_text(tree, count):
    before = (tree / "pkg" / "a.py").read_text()
    with pytest.raises(InstallError, match=rf"pkg/a\.py contains 'np\.int\(' 2 times, not {count}"):
        installer.apply_replacements(tree, [Replacement("pkg/a.py", "np.int(", "int(", count)])
    assert (tree / "pkg" / "a.py").read_text() == before


def test_missing_file_is_an_error_that_names_file_and_text(tree):
    with pytest.raises(InstallError, match=r"pkg/c\.py is missing: can't replace 'old text'"):
        installer.apply_replacements(tree, [Replacement("pkg/c.py", "old text", "")])


def test_placeholder_fails_when_an_operator_is_called(tmp_path):
    path = tmp_path / "_C.py"
    path.write_text(installer.PLACEHOLDER)
    spec = importlib.util.spec_from_file_location("placeholder_of_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    assert module.has_cuda() is False
    assert "without compiled operators" in module.get_compiler_version()
    operator = module.box_iou_rotated  # taking it is no error, since modules do so on import
    with pytest.raises(NotImplementedError, match=r"detectron2\._C\.box_iou_rotated can't be"):
        operator(1, 2)
    assert not hasattr(module, "__path__")  # not taken for a package


def test_sha256(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")  # the example of FIPS 180-2
    right = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    installer.verify_sha256(path, right)
    with pytest.raises(InstallError, match=f"file has SHA-256 {right}, not 00"):
        installer.verify_sha256(path, "00" * 32)
    with pytest.raises(InstallError, match="nothing can't be read: No such file"):
        installer.verify_sha256(tmp_path / "nothing", right)


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("Cloning\nfatal: unable to access 'x'\nerror: exit 128\n", "fatal: unable to access 'x'"),
        ("error: subprocess-exited-with-error\n  a.h:3: fatal error: no b.h\nERROR: Failed\n",
         "a.h:3: fatal error: no b.h"),
        ("error: metadata-generation-failed\nImportError: no x\n", "ImportError: no x"),
        ("ERROR: No matching distribution found for x==1\n",
         "ERROR: No matching distribution found for x==1"),
        ("one\ntwo\n\n", "two"),
        ("", "it failed without output"),
    ],
)  # fmt: skip
def test_failure_line(output, line):
    assert installer.failure_line(output) == line


# ---------------------------------------------------------------- the true sdist


@pytest.mark.skipif("DETECTRON2_SDIST" not in os.environ, reason="$DETECTRON2_SDIST names no sdist")
def test_table_matches_the_sdist(tmp_path):
    sdist = Path(os.environ["DETECTRON2_SDIST"])
    installer.verify_sha256(sdist, installer.SDIST_SHA256)
    root = installer.unpack_sdist(sdist, tmp_path / "source")
    installer.apply_replacements(root / "detectron2", installer.REPLACEMENTS)
    for path in [*root.glob("detectron2/**/*.py"), root / "setup.py"]:
        compile(path.read_text(encoding="utf-8"), path.name, "exec")
    # Nothing is left to replace.
    with pytest.raises(InstallError, match="0 times, not 1"):
        installer.apply_replacements(root / "detectron2", installer.REPLACEMENTS)


# ---------------------------------------------------------------- the package index


@pytest.fixture
def set_pip(monkeypatch):
    """pip without the settings of this machine; returns a function that sets an option."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return lambda option, value: monkeypatch.setenv(f"PIP_{option}", value)


@pytest.fixture
def served_sdist(tmp_path, monkeypatch):
    """A folder that is an index with a stand-in for the sdist, linked as PyPI links files."""
    content = b"stand-in"
    monkeypatch.setattr(installer, "SDIST_SHA256", hashlib.sha256(content).hexdigest())
    page = tmp_path / "index" / "detectron2-cdo" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(
        '<a href="../files/detectron2_cdo-0.4.tar.gz#sha256=1">0.4</a>\n'
        '<a data-x="&gt;1"\n href="../files/detectron2_cdo-0.5.tar.gz#sha256=2">0.5</a>\n'
    )
    files = tmp_path / "index" / "files"
    files.mkdir()
    (files / installer.SDIST_FILE).write_bytes(content)
    return tmp_path / "index"


def test_indexes_are_those_of_pip(tmp_path, set_pip):
    assert installer.index_urls(tmp_path) == [installer.DEFAULT_INDEX]
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = d\nextra-index-url = b\n  c\n")
    set_pip("CONFIG_FILE", str(config))
    assert installer.index_urls(tmp_path) == ["d", "b", "c"]
    set_pip("INDEX_URL", "e")
    assert installer.index_urls(tmp_path) == ["e", "b", "c"]


@pytest.mark.parametrize("option", ["INDEX_URL", "EXTRA_INDEX_URL"])
def test_sdist_comes_from_the_index(option, tmp_path, served_sdist, set_pip):
    set_pip("INDEX_URL", (tmp_path / "nowhere").as_uri())
    set_pip(option, served_sdist.as_uri())
    assert installer.download_sdist(tmp_path).read_bytes() == b"stand-in"


def test_sdist_with_another_hash_is_refused(tmp_path, served_sdist, set_pip):
    (served_sdist / "files" / installer.SDIST_FILE).write_bytes(b"something else")
    set_pip("INDEX_URL", served_sdist.as_uri())
    with pytest.raises(InstallError, match="has SHA-256"):
        installer.install_sdist(None, tmp_path)


def test_unreachable_index_is_named_and_a_password_is_not(tmp_path, set_pip):
    set_pip("INDEX_URL", "http://127.0.0.1:9")
    set_pip("EXTRA_INDEX_URL", "http://me:secret@127.0.0.1:9")
    with pytest.raises(InstallError, match=r"http://127\.0\.0\.1:9/detectron2-cdo/: .+") as error:
        installer.download_sdist(tmp_path)
    assert "with a password are not supported" in str(error.value)
    assert "secret" not in str(error.value)


# ---------------------------------------------------------------- the command, in an environment


def find_package(name: str) -> importlib.machinery.ModuleSpec | None:
    """Find an installed package as importlib.util.find_spec does, but leave this process alone.

    Asked for pip, setuptools' own finder gives up its distutils until the process ends, and
    importing torch.utils.cpp_extension fails.
    """
    return importlib.machinery.PathFinder.find_spec(name)


class Environment:
    """A bare virtual environment with build tools and a stand-in for PyTorch, and no network."""

    def __init__(self, folder: Path):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = folder / "venv" / "bin" / "python"
        self.modules = folder / "modules"
        self.modules.mkdir()
        for name in (*BUILD_TOOLS, "_distutils_hack"):  # the last is a part of setuptools
            package = Path(find_package(name).origin).parent
            for found in [package, *package.parent.glob(f"{name}-*.dist-info")]:
                (self.modules / found.name).symlink_to(found)
        self.add_module("torch/__init__.py", "")

    def add_module(self, name: str, text: str) -> None:
        path = self.modules / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def install(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        """Run the installer. pip has no index to ask, and a compiler seems to be there."""
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
        variables = {"PYTHONPATH": str(self.modules), "CXX": sys.executable, **offline, **variables}
        return subprocess.run(
            [self.python, SCRIPT, *arguments],
            env={**os.environ, **variables},
            cwd=self.folder,
            capture_output=True,
            text=True,
        )

    def installed(self) -> list[str]:
        site_packages = next((self.folder / "venv").glob("lib/python*/site-packages"))
        return sorted(path.name for path in site_packages.iterdir() if "__" not in path.name)


@pytest.fixture
def environment(tmp_path):
    missing = [name for name in BUILD_TOOLS if find_package(name) is None]
    if os.name == "nt" or missing or shutil.which("git") is None:
        pytest.skip("needs a POSIX system with git, and pip, setuptools and wheel installed here")
    return Environment(tmp_path)


def make_upstream(folder: Path, setup: str) -> str:
    """A git repository that looks like Detectron2's; returns its URL@COMMIT."""
    (folder / "detectron2" / "engine").mkdir(parents=True)
    (folder / "detectron2" / "__init__.py").write_text('__version__ = "9.9"\n')
    (folder / "detectron2" / "engine" / "__init__.py").write_text("")
    (folder / "setup.py").write_text(setup)

    def git(*arguments):
        user = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        command = ["git", *user, "-c", "commit.gpgsign=false", *arguments]
        result = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        return result.stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "stand-in")
    return f"{folder.as_uri()}@{git('rev-parse', 'HEAD')}"


SETUP = (
    "from setuptools import find_packages, setup\n"
    "setup(name='detectron2', version='9.9', packages=find_packages())\n"
)


def test_importable_detectron2_is_left_alone(environment):
    environment.add_module("detectron2/__init__.py", '__version__ = "1.2"')
    environment.add_module("detectron2/engine.py", "")
    result = environment.install()
    assert (result.returncode, result.stderr) == (0, "")
    (line,) = result.stdout.splitlines()
    assert "Detectron2 1.2 is installed already" in line
    result = environment.install("--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_broken_detectron2_is_not_replaced_but_reported(environment):
    environment.add_module("detectron2/__init__.py", "raise ImportError('undefined symbol: xyz')")
    result = environment.install()
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert "undefined symbol: xyz" in line and "pip uninstall detectron2" in line


def test_missing_pytorch_is_one_clear_line(environment):
    shutil.rmtree(environment.modules / "torch")
    result = environment.install()
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "PyTorch is not installed" in line and "-m pip install -r requirements.txt" in line


def test_neither_source_reachable_is_one_clear_line(environment):
    nowhere = (environment.folder / "nowhere").as_uri()
    result = environment.install(
        "--upstream", f"{nowhere}@abc", PIP_NO_INDEX="0", PIP_INDEX_URL=nowhere
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("install_detectron2: Detectron2 was not installed.")
    assert f"{nowhere}@abc" in line and "does not appear to be a git repository" in line
    assert f"{nowhere}/detectron2-cdo/: " in line and "No such file or directory" in line
    assert "--sdist FILE" in line
    assert environment.installed() == []


def test_upstream_is_built_and_installed(environment):
    upstream = make_upstream(environment.folder / "mirror", SETUP)
    result = environment.install("--upstream", upstream)
    assert (result.returncode, result.stderr) == (0, "")
    assert "installed Detectron2 9.9" in result.stdout.splitlines()[-1]
    assert environment.installed() == ["detectron2", "detectron2-9.9.dist-info"]


def test_failed_build_falls_back_with_its_reason_and_leaves_nothing(environment):
    failing = "import sys\nsys.exit('fatal error: Python.h: No such file or directory')\n"
    upstream = make_upstream(environment.folder / "mirror", failing)
    result = environment.install("--upstream", upstream)
    assert result.returncode == 1
    assert "trying the sdist" in result.stdout
    (line,) = result.stderr.splitlines()
    assert "fatal error: Python.h: No such file" in line
    assert environment.installed() == []


def test_missing_compiler_is_the_reason_to_fall_back(environment):
    folder = environment.folder / "bin"
    folder.mkdir()
    (folder / "git").symlink_to(shutil.which("git"))
    result = environment.install("--source", "upstream", PATH=str(folder), CXX="no-such-compiler")
    assert result.returncode == 1
    assert "no C++ compiler" in result.stderr


def test_local_sdist_with_another_hash_is_refused(environment):
    sdist = environment.folder / "detectron2_cdo-0.5.tar.gz"
    sdist.write_bytes(b"not the sdist")
    result = environment.install("--sdist", str(sdist))
    assert result.returncode == 1
    assert "trying upstream" not in result.stdout
    (line,) = result.stderr.splitlines()
    assert f"{sdist} has SHA-256" in line and installer.SDIST_SHA256 in line
    assert environment.installed() == []
