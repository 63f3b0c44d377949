"""Data sources by name: ``voc:PATH:SPLIT``, ``coco:JSON:IMAGES``, ``shapes:SPLIT:COUNT``."""

import errno
import logging
import os
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from .catalog import read_catalog
from .coco import read_coco
from .findings import DataError, Source, apply_policy
from .shapes import make_shapes
from .voc import read_voc

logger = logging.getLogger(__name__)

_FORMS = (
    "'voc:PATH:SPLIT' or 'voc:PATH' (a VOC folder), 'coco:ANNOTATIONS.json:IMAGE_FOLDER', "
    "'shapes:SPLIT:COUNT' (generated), or a name that Detectron2 knows"
)
_PREFIXES = ("voc:", "coco:", "shapes:")
# Sources as last read. Whether bad boxes are skipped is up to each load_records call.
_SOURCES: dict[str, Source] = {}


def register_source(name: str) -> Metadata:
    """Read a data source and register it with Detectron2 under this name.

    Each call reads the files, so that a second run in one process sees their changes;
    :func:`load_records` returns the records of the last reading.

    Returns:
        The metadata, with ``thing_classes``.

    Raises:
        DataError: an unknown form of name, or the class names can't be read. Other errors are
            raised by :func:`load_records`.
    """
    _SOURCES.pop(name, None)
    source = read_source(name)
    if not source.class_names:
        raise DataError.of(name, source.findings)
    attributes = {"thing_classes": source.class_names, **source.metadata}
    if name.startswith(_PREFIXES):
        known = MetadataCatalog.get(name).as_dict()
        if any(key in known and known[key] != value for key, value in attributes.items()):
            MetadataCatalog.remove(name)  # the files have changed: attributes can't be set twice
        if name not in DatasetCatalog.list():
            DatasetCatalog.register(name, partial(load_records, name))
    metadata = MetadataCatalog.get(name)
    metadata.set(**{k: v for k, v in attributes.items() if not hasattr(metadata, k)})
    _SOURCES[name] = source
    return metadata


def class_names(name: str) -> list[str]:
    """Return the class names of a registered source, in the order of their ids."""
    return list(MetadataCatalog.get(name).thing_classes)


def load_records(name: str, *, skip_bad_boxes: bool = False) -> list[dict]:
    """Return the records of a source; register it first if that has not been done.

    Args:
        name: as in DATASETS.
        skip_bad_boxes: log and skip boxes that are empty, inverted or outside their image, instead
            of raising an error.

    Raises:
        DataError: all errors of the source; after a correction the next call reads it again.
    """
    if name not in _SOURCES:
        register_source(name)
    source = _SOURCES[name]
    findings = apply_policy(source.findings, skip_bad_boxes)
    errors = [x for x in findings if x.severity == "error"]
    if errors:
        del _SOURCES[name]
        raise DataError.of(name, errors)
    skipped = [str(x) for x in findings if x.kind == "bad box"]
    if skipped and not source.is_logged:
        source.is_logged = True
        shown = [*skipped[:10], *(["..."] if len(skipped) > 10 else [])]
        logger.warning("%s: skipped %d bad box(es):\n  %s", name, len(skipped), "\n  ".join(shown))
    return source.records


def read_source(name: str) -> Source:
    """Read a data source; all problems become findings, bad boxes as errors.

    Detectron2's own VOC and COCO data sets are read by this package's readers, which check them
    and keep the difficult flag.
    """
    source = Source(name)
    try:
        _read(source)
    except FileNotFoundError as error:
        hint = ""
        if not name.startswith(_PREFIXES):
            root = os.getenv("DETECTRON2_DATASETS", "datasets")
            hint = f" $DETECTRON2_DATASETS is {root!r}: set it to the folder of the data sets "
            hint += "that Detectron2 knows by name."
        source.error("source", name, f"{name}: {error.filename or error} is missing.{hint}")
    except OSError as error:
        source.error("source", name, f"{name} can't be read: {error}")
    except DataError as error:
        source.error("source", name, str(error))
    return source


def _read(source: Source) -> None:
    name = source.name
    kind, _, rest = name.partition(":")
    if name.startswith(_PREFIXES) and rest:
        {"voc": _read_folder, "coco": _read_json, "shapes": _read_shapes}[kind](source, rest)
        return
    if name not in DatasetCatalog.list():
        raise DataError(f"DATASETS: {name!r} is not known. Name a source as {_FORMS}.")
    metadata = MetadataCatalog.get(name)
    source.class_names = list(metadata.get("thing_classes") or ())
    # Only Detectron2's register_pascal_voc and this package set both.
    if metadata.get("dirname") and metadata.get("year"):
        if not os.path.isdir(metadata.dirname):
            raise FileNotFoundError(errno.ENOENT, "No such folder", metadata.dirname)
        read_voc(source, Path(metadata.dirname), metadata.split)
    elif metadata.get("json_file") and metadata.get("evaluator_type") == "coco":
        read_coco(source, metadata.json_file, metadata.image_root)
    else:
        read_catalog(source)


def _read_folder(source: Source, rest: str) -> None:
    path, _, split = rest.rpartition(":")
    if not path or os.sep in split:
        path, split = rest, ""
    # Absolute, so that the name of the folder is known even if the path is ".".
    read_voc(source, Path(os.path.abspath(os.path.expanduser(path))), split or None)


def _read_json(source: Source, rest: str) -> None:
    json_file, _, image_root = (os.path.expanduser(part) for part in rest.rpartition(":"))
    if not json_file or not image_root:
        raise DataError(f"{source.name!r}: COCO data is named coco:ANNOTATIONS.json:IMAGE_FOLDER.")
    if not os.path.isdir(image_root):
        raise DataError(f"{source.name!r}: the image folder {image_root} is not there.")
    read_coco(source, json_file, image_root)


def _read_shapes(source: Source, rest: str) -> None:
    split, _, count = rest.rpartition(":")
    if not split.isidentifier() or not count.isdecimal() or int(count) < 1:
        message = "generated shapes are named shapes:SPLIT:COUNT, as in 'shapes:train:400'."
        raise DataError(f"{source.name!r}: {message}")
    datasets = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    read_voc(source, make_shapes(os.path.join(datasets, "shapes"), split, int(count)), split)
