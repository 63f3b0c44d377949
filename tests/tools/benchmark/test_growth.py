"""Growth of the cost: the cases and the plot."""

import pytest
from PIL import Image

from benchmark import growth
from benchmark.inputs import Case
from benchmark.parts import Setup


@pytest.mark.parametrize(
    ("axis", "first", "last"),
    [
        ("boxes", Case(2, 512, 512, 1), Case(2, 512, 512, 2000)),
        ("side", Case(2, 256, 256, 20), Case(2, 2048, 2048, 20)),
        ("batch", Case(1, 512, 512, 20), Case(32, 512, 512, 20)),
    ],
)
def test_one_thing_grows_at_a_time(axis, first, last):
    cases = [case for _, case in growth.growth_cases(axis)]
    assert (cases[0], cases[-1]) == (first, last)


def test_measure_and_plot(tmp_path, monkeypatch, peers):
    values = {"boxes": (1, 5), "side": (64, 96), "batch": (1, 2)}
    monkeypatch.setattr(growth, "_VALUES", values)
    monkeypatch.setattr(growth, "_BASE", Case(1, 64, 64, 4))
    setup = Setup([peers["fcos_d2"], peers["torchvision"]], "cpu", {})
    rows = growth.measure_growth(setup, rounds=2)
    assert len(rows) == 3 * 3 * 2 * 2  # parts, axes, values, names
    assert {x["name"] for x in rows} == {"fcos_d2", "torchvision"}
    assert all(0 < x["min_ms"] <= x["median_ms"] <= x["max_ms"] for x in rows)
    growth.plot_growth(rows, tmp_path / "growth.png")
    picture = Image.open(tmp_path / "growth.png")
    assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 100
