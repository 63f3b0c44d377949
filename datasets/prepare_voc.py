"""Download, verify and unpack PASCAL VOC 2007 and 2012 where Detectron2 expects them."""

import argparse
import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

OFFICIAL = "http://host.robots.ox.ac.uk/pascal/VOC"
CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte


class Tarball(NamedTuple):
    """An official archive and the splits in it."""

    year: int
    name: str
    md5: str
    splits: tuple[str, ...]


TARBALLS = (
    Tarball(
        2007,
        "VOCtrainval_06-Nov-2007.tar",
        "c52e279531787c972589f7e41ab4ae64",
        ("train", "val", "trainval"),
    ),
    Tarball(2007, "VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f", ("test",)),
    Tarball(
        2012,
        "VOCtrainval_11-May-2012.tar",
        "6cd6e144f989b92b3379bac3b3de84fd",
        ("train", "val", "trainval"),
    ),
)


class PrepareError(Exception):
    """A problem and its remedy, in one line."""


def prepare(
    year: int, root: Path, mirror: str | None = None, tarballs: Sequence[Tarball] = TARBALLS
) -> Path:
    """Create ``<root>/VOC<year>`` from the tarballs of a year, unless it exists.

    The folder is complete when it appears.

    Args:
        year: 2007 or 2012.
        root: the folder that Detectron2 reads as $DETECTRON2_DATASETS.
        mirror: folder or URL (file, http, https) with the tarballs; None is the official server.
            Downloaded tarballs are kept in ``<root>/downloads``.
        tarballs: all archives.

    Returns:
        The folder.

    Raises:
        PrepareError: a tarball is missing, broken or unreachable, or the folder is incomplete.
    """
    folder = root / f"VOC{year}"
    wanted = [tarball for tarball in tarballs if tarball.year == year]
    if folder.exists():
        _check_prepared(folder, wanted)
        print(f"{folder} is already prepared: nothing to do.")
        return folder
    root.mkdir(parents=True, exist_ok=True)
    paths = [obtain(tarball, root / "downloads", mirror) for tarball in wanted]
    unpack(paths, folder)
    print(f"{folder} is prepared.")
    if paths[0].parent == root / "downloads":
        print(f"Its tarballs in {paths[0].parent} are no longer needed.")
    return folder


def _check_prepared(folder: Path, tarballs: Sequence[Tarball]) -> None:
    splits = [split for tarball in tarballs for split in tarball.splits]
    missing = [s for s in splits if not (folder / "ImageSets" / "Main" / f"{s}.txt").is_file()]
    if missing:
        raise PrepareError(
            f"{folder} exists, but has no split {', '.join(missing)}: move it away or delete it, "
            "then run this again."
        )


def obtain(tarball: Tarball, downloads: Path, mirror: str | None) -> Path:
    """Return the path of a verified tarball, from a folder or downloaded into ``downloads``."""
    source = _mirror_folder(mirror)
    path = (source or downloads) / tarball.name
    if path.is_file():
        found = md5_of(path)
        if found != tarball.md5:
            raise PrepareError(
                f"{path} has the md5 {found}, not {tarball.md5}: it is broken or another file. "
                "Delete or replace it, then run this again."
            )
        return path
    if source:
        raise PrepareError(f"{path} is missing: the mirror must contain {tarball.name}.")
    downloads.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    url = tarball_url(tarball, mirror)
    download(url, part)
    found = md5_of(part)
    if found != tarball.md5:
        part.unlink()
        raise PrepareError(
            f"{url} has the md5 {found}, not {tarball.md5}: the download was removed. Run this "
            "again, or try another --mirror."
        )
    return part.rename(path)


def _mirror_folder(mirror: str | None) -> Path | None:
    """Return the folder of a mirror; None for a server."""
    scheme = urlsplit(mirror).scheme if mirror else "http"
    if scheme in ("http", "https"):
        return None
    if scheme == "file":
        folder = Path(urllib.request.url2pathname(urlsplit(mirror).path))
    else:
        folder = Path(mirror).expanduser()
    if not folder.is_dir():
        raise PrepareError(
            f"The mirror {mirror} is neither a folder nor an http:// or https:// URL."
        )
    return folder


def tarball_url(tarball: Tarball, mirror: str | None) -> str:
    """Return the address of a tarball on a mirror, or on the official server."""
    base = mirror.rstrip("/") if mirror else f"{OFFICIAL}/voc{tarball.year}"
    return f"{base}/{tarball.name}"


def download(url: str, part: Path) -> None:
    """Download into the file ``part``, resuming an earlier download.

    Raises:
        PrepareError: the server can't be reached, or the connection broke; ``part`` is kept.
    """
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            return  # nothing left to send: the md5 tells whether the file is complete
        raise PrepareError(f"{url}: the server answered {error.code} {error.reason}.") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise PrepareError(
            f"{url} can't be reached ({reason}): check the network, or use a --mirror."
        ) from error
    with response:
        # A server without support for ranges answers 200 with the whole file.
        start = have if response.status == 206 else 0
        total = start + int(response.headers["Content-Length"] or 0)
        with open(part, "ab" if start else "wb") as file:
            _copy(response, file, start, total, part.stem)
    size = part.stat().st_size
    if size < total:
        raise PrepareError(
            f"{url}: the connection broke after {size} of {total} bytes. Run this again to resume."
        )


def _copy(response: BinaryIO, file: BinaryIO, start: int, total: int, title: str) -> None:
    """Copy until the end or until the connection breaks."""
    bar = tqdm(
        total=total or None, initial=start, unit="B", unit_scale=True, desc=title, disable=None
    )
    with bar:
        while True:
            try:
                chunk = response.read(CHUNK)
            except (ConnectionError, TimeoutError, http.client.HTTPException):
                return  # the caller checks the size
            if not chunk:
                return
            file.write(chunk)
            bar.update(len(chunk))


def md5_of(path: Path) -> str:
    """Return the MD5 of a file in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(tarballs: Sequence[Path], folder: Path) -> None:
    """Unpack ``VOCdevkit/<folder.name>`` of all tarballs into one folder, completely or not at all.

    Raises:
        PrepareError: a tarball is broken or unsafe, or has other content.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for path in tarballs:
            try:
                with tarfile.open(path) as archive:
                    members = tqdm(
                        archive, unit=" files", desc=f"Unpacking {path.name}", disable=None
                    )
                    for member in members:
                        archive.extract(member, temporary, filter="data")
            except (tarfile.TarError, EOFError) as error:
                raise PrepareError(f"{path} can't be unpacked ({error}).") from error
        unpacked = temporary / "VOCdevkit" / folder.name
        if not unpacked.is_dir():
            names = ", ".join(path.name for path in tarballs)
            raise PrepareError(f"{names} has no VOCdevkit/{folder.name}.")
        unpacked.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def describe(folder: Path) -> str:
    """Return the number of images per split, and of objects and difficult ones per class."""
    lines, names = [], set()
    for split in ("train", "val", "trainval", "test"):
        path = folder / "ImageSets" / "Main" / f"{split}.txt"
        if path.is_file():
            images = path.read_text().split()
            names.update(images)
            lines.append(f"  {split:<10}{len(images):>8} images")
    objects, difficult = Counter(), Counter()
    for name in names:
        path = folder / "Annotations" / f"{name}.xml"
        for thing in ET.parse(path).iter("object") if path.is_file() else ():
            label = thing.findtext("name")
            objects[label] += 1
            difficult[label] += thing.findtext("difficult") == "1"
    lines.append(f"  {'class':<14}{'objects':>9}{'difficult':>11}")
    rows = [(label, objects[label], difficult[label]) for label in sorted(objects)]
    rows.append(("all", objects.total(), difficult.total()))
    lines += [f"  {label:<14}{count:>9}{hard:>11}" for label, count, hard in rows]
    return "\n".join([f"{folder}:", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--year", type=int, nargs="+", choices=(2007, 2012), default=[2007, 2012])
    parser.add_argument(
        "--root",
        default=os.getenv("DETECTRON2_DATASETS", "datasets"),
        help="folder for VOC2007 and VOC2012 (default: $DETECTRON2_DATASETS, else datasets)",
    )
    parser.add_argument(
        "--mirror", help="folder with the tarballs, or its http(s):// or file:// URL"
    )
    args = parser.parse_args(argv)
    root = Path(args.root).expanduser()
    try:
        for year in args.year:
            print(describe(prepare(year, root, args.mirror)))
    except KeyboardInterrupt:
        print("prepare_voc: interrupted. Run it again to resume.", file=sys.stderr)
        return 130
    except PrepareError as error:
        print(f"prepare_voc: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = error.filename or root
        print(f"prepare_voc: {where}: {error.strerror or error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
