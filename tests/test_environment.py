"""On what numbers were measured."""

import os
import subprocess
from pathlib import Path

import pytest

from fcos_d2 import environment

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def head(monkeypatch):
    """The commit of this checkout."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # inside of a hook of git
    if not (ROOT / ".git").exists():
        pytest.skip("the tests are not in a checkout of git")
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_that_of_the_checkout(head):
    assert environment.describe_environment("cpu")["commit"].rstrip("+") == head[:12]


def test_the_commit_of_a_project_around_is_not_taken_for_it(head, monkeypatch):
    """A package in a folder of another checkout, as in its .venv; here that is tests/data."""
    monkeypatch.setattr(environment, "__file__", str(ROOT / "tests" / "data" / "environment.py"))
    assert environment.describe_environment("cpu")["commit"] is None


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.describe_environment("cpu")["commit"] is None
