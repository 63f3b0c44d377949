"""The command line of check_dataset."""

import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "check_dataset.py"


@pytest.fixture
def add(make_voc):
    """Add an image of 160x120 to a new folder or to one made before; returns the source."""
    folders = {}

    def add(folder, objects, name="a", color="gray"):
        voc = folders[folder] if folder in folders else folders.setdefault(folder, make_voc(folder))
        voc.add(name, objects, color, image_size=(160, 120))
        return voc.source()

    return add


@pytest.fixture
def main(monkeypatch):
    """The tool's main, in this process: importing it all takes seconds."""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import check_dataset

    return check_dataset.main


SHAPES = ("--config-file", str(ROOT / "configs" / "FCOS_Shapes.yaml"))


def test_clean_data(main, add, capsys):
    """The box of 80x60 is found at 160 (the recipe's) as it is: 4 or more locations of P3."""
    train = add("train", [("car", "41 31 120 90")])
    val = add("val", [("car", "41 31 120 90")], color="red")
    assert main([train, val, *SHAPES]) == 0
    text = capsys.readouterr().out
    assert f"{train}: 1 images, 1 objects" in text and f"{val}: 1 images, 1 objects" in text
    assert "100.00 % of 1 objects have a location (coverage)" in text
    assert text.endswith("0 errors, 0 warnings\n")


def test_warnings_leave_the_status_0_and_errors_do_not(main, add, tmp_path, capsys):
    train = add("train", [("car", "41 31 120 90"), ("car", "3 3 6 6")])
    val = add("val", [("car", "41 31 120 90")])
    assert main([train, val, *SHAPES]) == 0
    text = capsys.readouterr().out
    # The picture is in both; 4x4 at 160/120 is 5.3x5.3, around (5.3, 5.3): P3 has (4, 4).
    assert "warning: same picture in two sources (1)" in text
    assert "warning: below the finest stride (1)" in text and text.endswith("2 warnings\n")
    assert "5.3x5.3 px in the network's input, 1 locations, stride 8" in text
    add("train", [("car", "50 31 40 90")])
    assert main([train, *SHAPES]) == 1
    text = capsys.readouterr().out
    assert (
        "error: bad box (1)" in text and f"{tmp_path}/train/Annotations/a.xml:4: object 1" in text
    )
    assert main([train, *SHAPES, "DATASETS.SKIP_BAD_BOXES", "True"]) == 1  # no object is left
    assert "warning: bad box (1)" in capsys.readouterr().out


def test_json_overlays_and_sources_of_the_recipe(main, add, tmp_path, capsys):
    """4x3 at 17..20, 9..11 has its centre at (18, 9.5) and is smaller than the grid: none."""
    train = add("train", [("car", "41 31 120 90"), ("dog", "17 9 20 11")])
    add("train", [("car", "1 1 60 60")], name="b", color="red")
    options = [*SHAPES, "--json", tmp_path / "out.json", "--overlays", tmp_path / "pictures"]
    options += ["--min-size", "120", "DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", "()"]
    assert main([*map(str, options)]) == 0
    printed = capsys.readouterr().out.splitlines()
    content = json.loads((tmp_path / "out.json").read_text())
    assert (content["errors"], content["warnings"]) == (0, len(content["findings"]))
    kinds = [x["kind"] for x in content["findings"]]
    assert kinds == ["no training location", "coverage", "coverage"]
    assert content["findings"][0]["file"] == str(tmp_path / "train" / "Annotations" / "a.xml")
    assert content["findings"][0]["line"] == 6
    assert set(content["advice"]) == set(kinds)
    source = content["sources"][train]
    assert source["images"] == 2 and source["class_names"] == ["car", "dog"]
    assert [x["objects"] for x in source["classes"]] == [2, 1]
    assignment = source["assignment"]
    assert assignment["image_scale"] == "shorter edge 120 px, longer at most 240"
    assert [x["coverage"] for x in assignment["class"]] == [100, 0]
    assert [x["level"] for x in assignment["levels"]] == ["p3", "p4", "p5", "p6", "p7"]
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [x.name[-6:] for x in pictures] == ["_a.png", "_b.png"]
    # The one with an object that has no location first.
    assert printed[-2:] == [str(x) for x in pictures]
    assert Image.open(pictures[0]).size[0] == 640


def test_classes_that_do_not_suit_the_recipe(main, add, capsys):
    train = add("train", [("car", "41 31 120 90")])
    assert main([train, *SHAPES, "MODEL.FCOS.NUM_CLASSES", "7"]) == 1
    assert "MODEL.FCOS.NUM_CLASSES is 7, but" in capsys.readouterr().out
    assert main([train, *SHAPES, "INPUT.DIFFICULT", "skip"]) == 1
    assert "INPUT.DIFFICULT is 'skip', not one of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config-file", "nowhere.yaml"], "nowhere.yaml"),
        (["INPUT.MIN_SIZ", "3"], "MIN_SIZ"),
        (["DATASETS.TRAIN", "()"], "no SOURCE is named"),
        (["--min-size", "0"], "--min-size is 0"),
    ],
)
def test_usage_error_is_one_line(main, capsys, arguments, said):
    assert main(arguments) == 2
    streams = capsys.readouterr()
    assert not streams.out
    assert streams.err.splitlines()[-1].startswith("check_dataset: ")
    assert said in streams.err


def test_source_that_is_not_there(main, tmp_path, capsys):
    name = f"voc:{tmp_path}/nowhere"
    assert main([name]) == 1
    text = capsys.readouterr().out
    assert text == (
        f"error: source (1)\n  {name!r}: the folder {tmp_path}/nowhere is not there.\n\n"
        "1 error, 0 warnings\n"
    )
