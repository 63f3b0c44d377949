"""The preparation of VOC with tiny stand-ins for the tarballs and a server on this machine."""

import errno
import hashlib
import importlib.util
import io
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).resolve().parents[2] / "datasets" / "prepare_voc.py"
_SPEC = importlib.util.spec_from_file_location("prepare_voc", _SCRIPT)
voc = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(voc)

XML = """<annotation>
<object><name>dog</name><difficult>1</difficult></object>
<object><name>cat</name><difficult>0</difficult></object>
<object><name>dog</name></object>
</annotation>"""


def write_tarball(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content.encode()))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def mirror(tmp_path):
    """A folder with two tarballs of 2007 and one of 2012."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    return folder


@pytest.fixture
def tarballs(mirror):
    """Their table, as voc.TARBALLS is the table of the official ones."""
    table = []
    for year, name, splits in (
        (2007, "trainval.tar", ("train", "val", "trainval")),
        (2007, "test.tar", ("test",)),
        (2012, "2012.tar", ("train", "val", "trainval")),
    ):
        top = f"VOCdevkit/VOC{year}"
        files = {f"{top}/ImageSets/Main/{split}.txt": f"{name}\n" for split in splits}
        files[f"{top}/Annotations/{name}.xml"] = XML
        files[f"{top}/JPEGImages/{name}.jpg"] = "0123456789" * 2000
        table.append(voc.Tarball(year, name, write_tarball(mirror / name, files), splits))
    return tuple(table)


class Server:
    """Serves a folder; `ranges` says whether it knows them, `cut` after how many bytes it hangs up.

    `seen` lists the Range header of each request.
    """

    def __init__(self, folder):
        self.ranges, self.cut, self.seen = True, None, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self, folder / self.path.lstrip("/"))

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, handler, path):
        asked = handler.headers["Range"]
        self.seen.append(asked)
        if not path.is_file():
            return handler.send_error(404)
        content = path.read_bytes()
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0
        if start >= len(content):
            return handler.send_error(416)
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        handler.wfile.write(content[start : self.cut])


@pytest.fixture
def server(mirror, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(mirror)
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def root(tmp_path):
    return tmp_path / "datasets"


def splits_of(folder):
    return sorted(path.stem for path in (folder / "ImageSets" / "Main").iterdir())


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_official_tarballs():
    assert [voc.tarball_url(tarball, None) for tarball in voc.TARBALLS] == [
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtrainval_06-Nov-2007.tar",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtest_06-Nov-2007.tar",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    ]
    assert all(re.fullmatch("[0-9a-f]{32}", tarball.md5) for tarball in voc.TARBALLS)


@pytest.mark.parametrize("form", ["{}", "file://{}", "{}/"])
def test_folder_as_mirror(mirror, tarballs, root, form):
    """The two tarballs of 2007 become one folder, and the mirror stays as it is."""
    before = names_in(mirror)
    folder = voc.prepare(2007, root, form.format(mirror), tarballs)
    assert folder == root / "VOC2007"
    assert splits_of(folder) == ["test", "train", "trainval", "val"]
    assert len(names_in(folder / "JPEGImages")) == 2
    assert names_in(root) == ["VOC2007"]
    assert names_in(mirror) == before
    voc.prepare(2012, root, form.format(mirror), tarballs)
    assert names_in(root) == ["VOC2007", "VOC2012"]


def test_description(mirror, tarballs, root):
    """Two images with a difficult dog, a dog and a cat each: 4 dogs, 2 of them difficult."""
    text = voc.describe(voc.prepare(2007, root, str(mirror), tarballs))
    rows = [line.split() for line in text.splitlines()]
    assert ["trainval", "1", "images"] in rows
    assert ["test", "1", "images"] in rows
    assert rows[-3:] == [["cat", "2", "0"], ["dog", "4", "2"], ["all", "6", "2"]]


def test_already_prepared(mirror, tarballs, root, capsys):
    folder = voc.prepare(2007, root, str(mirror), tarballs)
    (folder / "mine.txt").touch()
    capsys.readouterr()
    assert voc.prepare(2007, root, "http://127.0.0.1:1/nowhere", tarballs) == folder
    assert "already prepared: nothing to do" in capsys.readouterr().out
    assert (folder / "mine.txt").exists()


def test_unfinished_folder_is_not_touched(mirror, tarballs, root):
    main = root / "VOC2007" / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (main / "train.txt").touch()
    with pytest.raises(voc.PrepareError, match="has no split val, trainval, test: move it away"):
        voc.prepare(2007, root, str(mirror), tarballs)
    assert splits_of(root / "VOC2007") == ["train"]


def test_download_keeps_the_tarballs_for_another_time(server, tarballs, root):
    folder = voc.prepare(2007, root, server.url, tarballs)
    assert splits_of(folder) == ["test", "train", "trainval", "val"]
    assert names_in(root / "downloads") == ["test.tar", "trainval.tar"]
    folder.rename(root / "elsewhere")
    voc.prepare(2007, root, server.url, tarballs)
    assert server.seen == [None, None]


def test_broken_connection_then_resume(server, mirror, tarballs, root):
    server.cut = 5000
    size = (mirror / "2012.tar").stat().st_size
    with pytest.raises(voc.PrepareError, match=f"broke after 5000 of {size} bytes. Run this again"):
        voc.prepare(2012, root, server.url, tarballs)
    assert names_in(root) == ["downloads"]
    assert names_in(root / "downloads") == ["2012.tar.part"]
    server.cut = None
    voc.prepare(2012, root, server.url, tarballs)
    assert server.seen == [None, "bytes=5000-"]
    content = (root / "downloads" / "2012.tar").read_bytes()
    assert content == (mirror / "2012.tar").read_bytes()
    assert names_in(root) == ["VOC2012", "downloads"]


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_part_of_an_earlier_download(server, mirror, tarballs, root, knows_ranges):
    """A complete part is asked for no more (416); a server without ranges sends all of it again."""
    server.ranges = knows_ranges
    (root / "downloads").mkdir(parents=True)
    content = (mirror / "2012.tar").read_bytes() if knows_ranges else b"x" * 5000
    (root / "downloads" / "2012.tar.part").write_bytes(content)
    voc.prepare(2012, root, server.url, tarballs)
    assert server.seen == [f"bytes={len(content)}-"]


def test_wrong_download_is_removed(server, mirror, tarballs, root):
    (mirror / "2012.tar").write_bytes(b"<html>Moved</html>" * 100)
    with pytest.raises(voc.PrepareError, match=f"not {tarballs[2].md5}: the download was removed"):
        voc.prepare(2012, root, server.url, tarballs)
    assert names_in(root) == ["downloads"] and names_in(root / "downloads") == []


def test_wrong_tarball_of_a_mirror_is_kept(mirror, tarballs, root):
    (mirror / "2012.tar").write_bytes(b"something else")
    with pytest.raises(voc.PrepareError, match=r"2012\.tar has the md5 .* Delete or replace it"):
        voc.prepare(2012, root, str(mirror), tarballs)
    assert (mirror / "2012.tar").read_bytes() == b"something else"
    assert names_in(root) == []


def test_interrupted_unpacking_leaves_nothing(mirror, tarballs, root, monkeypatch):
    extract = tarfile.TarFile.extract

    def stop_at_the_image(self, member, *args, **options):
        if member.name.endswith(".jpg"):
            raise KeyboardInterrupt
        extract(self, member, *args, **options)

    monkeypatch.setattr(tarfile.TarFile, "extract", stop_at_the_image)
    with pytest.raises(KeyboardInterrupt):
        voc.prepare(2007, root, str(mirror), tarballs)
    assert names_in(root) == []
    monkeypatch.undo()
    voc.prepare(2007, root, str(mirror), tarballs)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"VOCdevkit/VOC2012/../../../evil.txt": ""}, "can't be unpacked"),
        ({"README": "nothing else"}, "2012.tar has no VOCdevkit/VOC2012"),
        (None, r"2012\.tar can't be unpacked"),
    ],
)
def test_unsafe_or_other_tarball(mirror, root, files, said):
    path = mirror / "2012.tar"
    path.write_bytes(b"x" * 2000)
    md5 = write_tarball(path, files) if files else voc.md5_of(path)
    with pytest.raises(voc.PrepareError, match=said):
        voc.prepare(2012, root, str(mirror), (voc.Tarball(2012, "2012.tar", md5, ("train",)),))
    assert names_in(root) == []
    assert not list(root.parent.rglob("evil.txt"))


# The command


def run(capsys, *arguments):
    """Exit status and the lines of stderr."""
    status = voc.main(list(arguments))
    return status, capsys.readouterr().err.splitlines()


def test_command(mirror, tarballs, root, monkeypatch, capsys):
    monkeypatch.setattr(voc.prepare, "__defaults__", (None, tarballs))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    assert voc.main(["--mirror", str(mirror)]) == 0
    output = capsys.readouterr().out
    assert all(f"VOC{year} is prepared." in output for year in (2007, 2012))
    assert names_in(root) == ["VOC2007", "VOC2012"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "is neither a folder nor an http"),
        ("empty", "VOCtrainval_06-Nov-2007.tar is missing"),
    ],
)
def test_command_with_a_useless_mirror(tmp_path, root, capsys, name, said):
    (tmp_path / "empty").mkdir()
    mirror = tmp_path / name
    status, lines = run(capsys, "--year", "2007", "--root", str(root), "--mirror", str(mirror))
    assert status == 1 and len(lines) == 1
    assert lines[0].startswith("prepare_voc: ") and said in lines[0] and str(mirror) in lines[0]


@pytest.mark.parametrize("path", ["http://127.0.0.1:1", "https://127.0.0.1:1/voc"])
def test_command_without_network(root, capsys, monkeypatch, path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    status, lines = run(capsys, "--year", "2012", "--root", str(root), "--mirror", path)
    assert status == 1 and len(lines) == 1
    assert "can't be reached" in lines[0] and "refused" in lines[0]


def test_command_when_the_server_lacks_the_file(server, root, capsys):
    status, lines = run(capsys, "--year", "2012", "--root", str(root), "--mirror", server.url)
    assert (status, len(lines)) == (1, 1)
    assert "the server answered 404 Not Found" in lines[0]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), (1, "{root}: No space left on device.")),
        (KeyboardInterrupt(), (130, "interrupted. Run it again to resume.")),
    ],
)
def test_command_that_is_stopped(root, capsys, monkeypatch, error, expected):
    def stop(*args):
        raise error

    monkeypatch.setattr(voc, "prepare", stop)
    status, (line,) = run(capsys, "--root", str(root))
    assert (status, line) == (expected[0], "prepare_voc: " + expected[1].format(root=root))
