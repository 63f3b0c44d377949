"""README and docs: commands parse, files and keys exist, links work, generated text is current."""

import argparse
import ast
import importlib
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.config import LazyConfig, get_cfg
from omegaconf import OmegaConf
from torch.distributed.run import get_args_parser as get_torchrun_parser

from fcos_d2 import add_fcos_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("datasets/*.md"), *ROOT.glob("docs/**/*.md")],
    key=lambda path: path.parts,
)
PAGES = [page for page in PAGES if not page.is_symlink() and page.name != "CHANGELOG.md"]
# Commands that are not this repository's.
SHELL = {
    "cd fcos_d2",
    "git clone '<this repository>'",
    "pip install -e .",
    "source .venv/bin/activate",
}


def blocks(page, language):
    """The text of each fenced block of a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands():
    """(page, words) of every command in bash blocks and in inline code."""
    found = {}
    for page in PAGES:
        lines = "".join(blocks(page, "bash")).replace("\\\n", " ").replace("<this", "'<this")
        lines = lines.replace("repository>", "repository>'").splitlines()
        inline = r"`((?:python|make|pytest|torchrun) [^`]+)`"
        lines += re.findall(inline, page.read_text(encoding="utf-8"))
        for line in lines:
            words = shlex.split(line, comments=True)
            if words:
                found.setdefault(shlex.join(words), (page.relative_to(ROOT).as_posix(), words))
    return list(found.values())


COMMANDS = commands()


class Parsed(Exception):
    """Raised in place of running a command once its arguments are parsed."""


def parse_script(script, arguments, monkeypatch):
    """Run a script up to the end of its argument parsing; return the namespace."""
    path = ROOT / script
    assert path.exists(), script

    def stop_after(parse):
        def parse_and_stop(*args, **kwargs):
            raise Parsed(parse(*args, **kwargs))

        return parse_and_stop

    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)
        monkeypatch.setattr(argparse.ArgumentParser, name, stop_after(parse))
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    with pytest.raises(Parsed) as parsed:
        runpy.run_path(str(path), run_name="__main__")
    return parsed.value.args[0]


def check_keys(config_file, options):
    """Load a recipe and override keys: an unknown key or a value of another type is an error."""
    cfg = get_cfg()
    add_fcos_config(cfg)
    if config_file and not config_file.startswith("output/"):  # the config.yaml of a run
        cfg.merge_from_file(str(ROOT / config_file))
    cfg.merge_from_list(options)


def check_lazy_keys(config_file, options):
    cfg = LazyConfig.load(str(ROOT / config_file))
    LazyConfig.apply_overrides(cfg.copy(), options)
    for option in options:
        parent, name = option.split("=")[0].rsplit(".", 1)
        node = OmegaConf.select(cfg, parent)
        assert node is not None, option
        if name not in node:
            assert name in inspect.signature(node["_target_"]).parameters, option


@pytest.mark.parametrize("page, words", COMMANDS, ids=[" ".join(x[1][:3]) for x in COMMANDS])
def test_command(page, words, monkeypatch):
    while re.match(r"[A-Z_]+=", words[0]):  # variables of the environment
        words = words[1:]
    if shlex.join(words) in SHELL or words[0] == "export":
        return
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    elif words[0] == "pytest":
        paths = [word for word in words[1:] if word not in ("-s", "-m", "not slow")]
        assert all((ROOT / path).exists() for path in paths)
    elif words[0] in ("python", "torchrun"):
        script, arguments = words[1], words[2:]
        if words[0] == "torchrun":
            args = get_torchrun_parser().parse_args(words[1:])
            script, arguments = args.training_script, args.training_script_args
        args = parse_script(script, arguments, monkeypatch)
        options = getattr(args, "opts", None) or dotted_pairs(arguments)
        config_file = getattr(args, "config_file", None) or ""
        check = check_lazy_keys if config_file.endswith(".py") else check_keys
        check(config_file, options)
        if hasattr(args, "plan"):
            assert (ROOT / args.plan).exists()
    else:
        pytest.fail(f"{page}: unknown command {shlex.join(words)}")


def dotted_pairs(arguments):
    """KEY VALUE pairs among other arguments."""
    pairs = zip(arguments, arguments[1:], strict=False)
    return [x for pair in pairs if re.match(r"[A-Z_]+\.[A-Z_.]+$", pair[0]) for x in pair]


SNIPPETS = [(page, code) for page in PAGES for code in blocks(page, "python")]


@pytest.mark.parametrize("page, code", SNIPPETS, ids=lambda x: getattr(x, "stem", ""))
def test_python_snippet(page, code):
    cfg = get_cfg()
    add_fcos_config(cfg)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names)
        elif isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("cfg."):
            eval(ast.unparse(node.targets[0]), {"cfg": cfg})  # the key exists


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        assert "://" in link or (page.parent / link).exists(), link


def test_code_names():
    """Keys, files and tools that the text names exist."""
    cfg = get_cfg()
    add_fcos_config(cfg)
    for page in PAGES:
        text = page.read_text(encoding="utf-8").split("## Removed keys")[0]
        for key in re.findall(r"`((?:MODEL|INPUT|TEST|SOLVER|DATASETS)(?:\.[A-Z_0-9]+)+)\b", text):
            node = cfg
            for name in key.split("."):
                assert name in node, f"{page.name}: {key}"
                node = node[name]
        for path in re.findall(r"`((?:configs|tools|fcos_d2|tests|datasets)/[\w./]+)`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        for recipe in re.findall(r"`((?:lazy/)?\w*(?:FCOS|fcos)_\w+\.(?:yaml|py))`", text):
            assert (ROOT / "configs" / recipe).exists(), f"{page.name}: {recipe}"


def test_configuration_page_is_current():
    module = runpy.run_path(str(ROOT / "tools" / "config_page.py"))
    page = module["build_page"](module["SOURCE"].read_text(encoding="utf-8"))
    assert module["PAGE"].read_text(encoding="utf-8") == page, "run python tools/config_page.py"


def test_configuration_page_needs_a_comment_for_each_key():
    build_page = runpy.run_path(str(ROOT / "tools" / "config_page.py"))["build_page"]
    source = (
        "REMOVED_KEYS = ()\ndef add_fcos_config(cfg):\n    # H\n\n    # First.\n    cfg.A = 1\n"
    )
    assert (
        "## H\n\n| key | default | meaning |\n|---|---|---|\n| `A` | `1` | First. |"
        in build_page(source)
    )
    with pytest.raises(ValueError, match="line 7: B.C has no comment"):
        build_page(source + "    cfg.B.C = 2\n")


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_site_builds_without_dead_links(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "configuration" / "index.html").is_file()
