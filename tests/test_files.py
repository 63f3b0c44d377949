"""Names and files of results."""

import json
import re

import pytest

from fcos_d2.files import atomic_path, dataset_slug, write_json


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("voc_2007_test", "voc_2007_test"),
        ("voc:a/VOC2007:train", "voc_a_VOC2007_train"),
        ("coco:a.json:images/", "coco_a.json_images_"),
        ("../x", "_x"),
        ("...", "_"),
    ],
)
def test_slugs(name, slug):
    assert dataset_slug(name) == slug


def test_long_names_stay_short_and_apart():
    slugs = [dataset_slug(f"voc:{letter}{'/folder' * 60}:train") for letter in "ab"]
    assert slugs[0] != slugs[1]
    for slug in slugs:
        assert len(slug) <= 120 and slug.endswith("_train")
        assert re.fullmatch(r"[A-Za-z0-9._-]+", slug)


def test_names_beyond_ascii_stay_apart():
    slugs = [dataset_slug(f"voc:data/{folder}:val") for folder in ("甲", "乙", "é")]
    assert len(set(slugs)) == 3
    assert all(re.fullmatch(r"[0-9a-f]{8}_voc_data___val", slug) for slug in slugs)


def test_an_empty_name_is_refused():
    with pytest.raises(ValueError, match="empty"):
        dataset_slug(" ")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_json_has_null_for_nan_and_every_digit(tmp_path):
    target = tmp_path / "x.json"
    write_json(target, {"a": [float("nan"), 0.1 + 0.2], "b": (float("inf"), "é", None)})
    text = target.read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"a": [None, 0.30000000000000004], "b": [None, "é", None]}
