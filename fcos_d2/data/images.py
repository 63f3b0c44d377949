"""Image files, decoded in full or at a fraction of their size."""

import numpy as np
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import Image


def reduction(resize: T.Transform) -> int:
    """Return the largest of 1, 2, 4, 8 by which an image can be reduced before ``resize``.

    The reduced image is not smaller than the output of ``resize``.
    """
    if not isinstance(resize, T.ResizeTransform):
        return 1
    fraction = min(resize.h / resize.new_h, resize.w / resize.new_w)
    return next(factor for factor in (8, 4, 2, 1) if factor <= max(fraction, 1))


def read_image(record: dict, image_format: str, factor: int = 1) -> np.ndarray:
    """Read the image of a record as Detectron2 does, upright by its EXIF orientation.

    Args:
        record: ``file_name``, and ``height`` and ``width`` of the full image.
        image_format: order of the channels.
        factor: 1, 2, 4 or 8: reduction by the JPEG decoder, which saves most of its work. Sides
            are rounded up. Other formats are decoded in full.

    Returns:
        (H, W, C) uint8.

    Raises:
        SizeMismatchError: the file has another size than the record.
    """
    if factor == 1:
        image = utils.read_image(record["file_name"], format=image_format)
        utils.check_image_size(record, image)
        return image
    with PathManager.open(record["file_name"], "rb") as file:
        image = Image.open(file)
        full_size = image.size
        image.draft(image.mode, (full_size[0] // factor, full_size[1] // factor))
        reduced = image.size != full_size
        # Detectron2's own, which differs from Pillow's where the tag is broken.
        image = utils._apply_exif_orientation(image)
        image = utils.convert_PIL_to_numpy(image, image_format)
    if reduced:
        expected = {key: -(-record[key] // factor) for key in ("height", "width")}
        utils.check_image_size({**record, **expected}, image)
    else:
        utils.check_image_size(record, image)
    return image
