"""Configs as Python source: values that are read, and code that is not executed."""

import pytest

from fcos_d2.checkpoint.config_text import read_sections


def test_constants_and_containers():
    text = """
import os
model = dict(a=1, b=[1.5, (None, True)], c={'d': -2, 3: 'x'}, e=dict())
other = dict(a=2)
unused.name = 3
"""
    expected = {"a": 1, "b": [1.5, [None, True]], "c": {"d": -2, 3: "x"}, "e": {}}
    assert read_sections(text, ["model"]) == ({"model": expected}, [])
    both, _ = read_sections(text, ["model", "other", "missing"])
    assert both.keys() == {"model", "other"}


def test_the_last_assignment_counts():
    assert read_sections("a = dict(x=1)\na = dict(y=2)", ["a"])[0] == {"a": {"y": 2}}


def test_only_a_type_may_be_a_name():
    text = "a = dict(type=Head, b=dict(type=heads.Head, size=size, types=Head))"
    assert read_sections(text, ["a"]) == (
        {"a": {"type": "Head", "b": {"type": "heads.Head"}}},
        ["a.b.size", "a.b.types"],
    )


@pytest.mark.parametrize(
    "value", ["float('inf')", "[1, (2, inf)]", "dict(1)", "f()", "{[]}", "x + 1", "{f(): 1}"]
)
def test_unreadable_values_are_skipped(value):
    text = f"a = dict(b=dict(x={value}, y=1), z=2)"
    assert read_sections(text, ["a"]) == ({"a": {"b": {"y": 1}, "z": 2}}, ["a.b.x"])


@pytest.mark.parametrize("text", ["a = dict(x=1, **b)", "a = {'x': 1, **b}"])
def test_the_entries_of_another_dictionary(text):
    assert read_sections(text, ["a"]) == ({"a": {"x": 1}}, ["a.**"])


def test_an_unhashable_key():
    assert read_sections("a = {'x': 1, (1, [2]): 3}", ["a"]) == ({"a": {"x": 1}}, ["a.(1, [2])"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a = f()",
        "a = 1",
        "a = (",
        "\0",
        "(" * 5000,
        "_base_ = './b.py'\na = dict(x=1)",
        "a: dict = dict(x=1)",
    ],
)
def test_nothing_to_read(text):
    assert read_sections(text, ["a"]) == ({}, [])


def test_nothing_is_executed(tmp_path):
    path = tmp_path / "ran"
    call = f"open({str(path)!r}, 'w')"
    read_sections(f"{call}\na = dict(x={call}, type={call})\na[{call}] = 1", ["a"])
    assert not path.exists()
