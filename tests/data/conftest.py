"""A small VOC folder, made to measure."""

import json

import pytest
from PIL import Image


class VocFolder:
    """Writes a VOC folder, image by image."""

    def __init__(self, path):
        self.path = path
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (path / part).mkdir(parents=True)

    def xml(self, name):
        return self.path / "Annotations" / f"{name}.xml"

    def add_image(self, file_name="a.jpg", size=(60, 40), exif_orientation=None):
        """Size is (width, height) of the stored pixels, before any rotation."""
        image = Image.new("RGB", size)
        exif = Image.Exif()
        if exif_orientation is not None:
            exif[0x0112] = exif_orientation
        image.save(self.path / "JPEGImages" / file_name, exif=exif)

    def add_xml(self, name, objects=(), size=(60, 40), filename=None, head="<annotation>"):
        """Each object is (name, "xmin ymin xmax ymax") or that and its difficult."""
        lines = [head, f"<filename>{filename or name + '.jpg'}</filename>"]
        if size is not None:
            lines.append(f"<size><width>{size[0]}</width><height>{size[1]}</height></size>")
        for label, corners, *difficult in objects:
            lines.append(f"<object><name>{label}</name>")
            lines += [f"<difficult>{value}</difficult>" for value in difficult]
            tags = zip(("xmin", "ymin", "xmax", "ymax"), corners.split(), strict=False)
            box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
            lines.append(f"<bndbox>{box}</bndbox></object>")
        self.xml(name).write_text("\n".join([*lines, "</annotation>"]))

    def add(self, name, objects=(), **options):
        """An image and its annotation."""
        self.add_image(f"{name}.jpg")
        self.add_xml(name, objects, **options)

    def add_split(self, split, text):
        path = self.path / "ImageSets" / "Main" / f"{split}.txt"
        path.write_text(text)
        return path


@pytest.fixture
def make_voc(tmp_path):
    """Makes an empty VOC folder of a name."""
    return lambda name="mine": VocFolder(tmp_path / name)


@pytest.fixture
def voc(make_voc):
    return make_voc()


@pytest.fixture
def make_coco(tmp_path):
    """Writes a COCO file and its images; returns the source's name."""

    def make(images=None, annotations=(), categories=None, write_images=True):
        if images is None:
            images = [{"id": 7, "file_name": "a.jpg", "width": 60, "height": 40}]
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for image in images if write_images else ():
            Image.new("RGB", (image["width"], image["height"])).save(folder / image["file_name"])
        if categories is None:
            categories = [{"id": 90, "name": "zebra"}, {"id": 3, "name": "car"}]
        path = tmp_path / "annotations.json"
        content = {"images": images, "annotations": list(annotations), "categories": categories}
        path.write_text(json.dumps(content))
        return f"coco:{path}:{folder}"

    return make
