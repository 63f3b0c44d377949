"""Sources by name: what is registered, read, checked and refused."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, register_pascal_voc

from fcos_d2.data import DataError, class_names, load_records, register_source

# VOC folders


def test_voc_source(make_voc):
    voc = make_voc("VOC2012")
    voc.add("a", [("car", "11 6 30 20", 1)])
    voc.add("b")
    voc.add_split("train", "a\n")
    name = voc.source("train")
    metadata = register_source(name)
    assert metadata is MetadataCatalog.get(name)
    assert class_names(name) == list(CLASS_NAMES) == metadata.thing_classes
    assert (metadata.evaluator_type, metadata.year) == ("pascal_voc", 2012)
    assert (metadata.dirname, metadata.split) == (str(voc.path), "train")
    (record,) = load_records(name)
    assert record["annotations"][0]["bbox"] == [10, 5, 30, 20]
    assert record["annotations"][0]["difficult"] == 1
    assert DatasetCatalog.get(name) == [record]


def test_voc_source_without_split_takes_every_annotation(voc):
    voc.add("b", [("car", "1 1 9 9")])
    voc.add("a")
    name = voc.source()
    assert register_source(name).split is None
    assert [record["image_id"] for record in load_records(name)] == ["a", "b"]


@pytest.mark.parametrize("prefix", ["", "./", "~/"])
@pytest.mark.parametrize("suffix", ["", "/"])
def test_forms_of_the_path(make_voc, tmp_path, monkeypatch, prefix, suffix):
    voc = make_voc("VOC2007")
    voc.add("a", [("car", "1 1 9 9")])
    voc.add_split("train", "a\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    name = f"voc:{prefix}../{tmp_path.name}/VOC2007{suffix}:train"
    assert len(register_source(name).thing_classes) == 20
    assert load_records(name)[0]["file_name"] == str(voc.image("a"))


def test_voc_folder_as_working_folder(make_voc, tmp_path, monkeypatch):
    """The folder's name decides about the class names, so "." has to be looked up."""
    voc = make_voc("VOC2012")
    voc.add("a", [("car", "1 1 9 9")])
    voc.add_split(tmp_path.name, "a\n")
    monkeypatch.chdir(voc.path)
    metadata = register_source(f"voc:.:{tmp_path.name}")
    assert (len(metadata.thing_classes), metadata.year) == (20, 2012)


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="the folder .*/nowhere is not there"):
        register_source(f"voc:{tmp_path}/nowhere:train")
    assert f"voc:{tmp_path}/nowhere:train" not in DatasetCatalog.list()


def test_second_registration_sees_changed_files(voc):
    """A run keeps the records of its start; the next one in the same process reads again."""
    voc.add("a", [("car", "1 1 9 9")])
    name = voc.source()
    metadata, records = register_source(name), load_records(name)
    assert register_source(name) is metadata
    voc.add("b", [("bus", "1 1 9 9")])
    assert load_records(name) == records
    assert (class_names(name), len(load_records(name))) == (["car"], 1)
    assert register_source(name).thing_classes == class_names(name) == ["bus", "car"]
    assert [x["annotations"][0]["category_id"] for x in load_records(name)] == [1, 0]


def test_source_can_be_registered_again_after_an_error(voc):
    voc.add("a")
    with pytest.raises(DataError, match="names no class"):
        register_source(voc.source())
    assert voc.source() not in DatasetCatalog.list()
    voc.add("a", [("car", "1 1 9 9"), ("car", "9 9 1 1")])
    assert register_source(voc.source()).thing_classes == ["car"]
    with pytest.raises(DataError, match="DATASETS.SKIP_BAD_BOXES"):
        load_records(voc.source())
    voc.add_xml("a", [("car", "1 1 9 9")])
    assert len(load_records(voc.source())) == 1


def test_skipping_bad_boxes_is_up_to_each_call(voc, caplog):
    voc.add("a", [("car", "1 1 9 9"), ("car", "9 9 1 1")])
    name = voc.source()
    for _ in range(2):
        with pytest.raises(DataError, match="DATASETS.SKIP_BAD_BOXES"):
            load_records(name)
        caplog.clear()
        (record,) = load_records(name, skip_bad_boxes=True)
        assert load_records(name, skip_bad_boxes=True) == [record]
        assert len(record["annotations"]) == 1
        assert caplog.text.count("skipped 1 bad box(es)") == 1


@pytest.mark.parametrize("evaluator", [{"evaluator_type": "pascal_voc"}, {}])
def test_voc_names_of_detectron2_keep_difficult(make_voc, tmp_path, evaluator):
    voc = make_voc("VOC2007")
    voc.add("a", [("car", "1 1 9 9", 1), ("dog", "1 1 9 9", 0)])
    voc.add("b")
    voc.add_split("trainval", "a\nb\n")
    name = f"{tmp_path}_voc_2007_trainval"
    register_pascal_voc(name, str(voc.path), "trainval", 2007)
    MetadataCatalog.get(name).set(**evaluator)
    theirs = DatasetCatalog.get(name)
    assert "difficult" not in theirs[0]["annotations"][0]
    assert register_source(name).thing_classes == list(CLASS_NAMES)
    record, _ = load_records(name)
    assert [x["difficult"] for x in record["annotations"]] == [1, 0]
    assert [x["bbox"] for x in record["annotations"]] == [
        x["bbox"] for x in theirs[0]["annotations"]
    ]


# Other names


@pytest.mark.parametrize(
    "name", ["voc_2008_trainval", "voc", "voc:", "VOC2007", "yolo:a:b", "", "shapes"]
)
def test_unknown_name_lists_the_forms(name):
    with pytest.raises(DataError, match="is not known. Name a source as 'voc:PATH:SPLIT'") as error:
        register_source(name)
    assert isinstance(error.value, ValueError)
    assert repr(name) in str(error.value)
    assert all(form in str(error.value) for form in ("coco:", "shapes:SPLIT:COUNT"))
    assert name not in DatasetCatalog.list()


@pytest.mark.parametrize("name", ["shapes:train", "shapes:train:0", "shapes:../x:5", "shapes::5"])
def test_misspelt_shapes(name):
    with pytest.raises(DataError, match="shapes:SPLIT:COUNT"):
        register_source(name)
