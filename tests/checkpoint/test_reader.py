"""Reading of files: content, damage, and pickles that are refused and not executed."""

import argparse
import os
import pickle

import numpy as np
import pytest
import torch

from fcos_d2.checkpoint.reader import read_checkpoint, unwrap


class Trap:
    """Unpickling makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_tensors_come_back(tmp_path):
    content = {"model": {"a": torch.arange(6.0).view(2, 3)}, "iteration": 7, "names": ["x", "y"]}
    torch.save(content, tmp_path / "a.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("a.pth", "old.pth"):
        for lazy in (False, True):
            got = read_checkpoint(str(tmp_path / name), lazy=lazy)
            assert torch.equal(got["model"]["a"], content["model"]["a"])
            assert got["iteration"] == 7 and got["names"] == ["x", "y"]


def test_a_pickle_of_arrays(tmp_path):
    content = {"model": {"a": np.arange(6.0), "b": np.float32(2)}, "__author__": "somebody"}
    for protocol in (2, 4):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        got = read_checkpoint(str(path))
        assert got["__author__"] == "somebody"
        assert got["model"]["a"].tolist() == [0, 1, 2, 3, 4, 5] and got["model"]["b"] == 2


def test_a_pickle_that_python_2_wrote(tmp_path):
    """As in Caffe2: str is bytes there, NumPy's modules have their old names."""
    content = b"(dp0\nS'conv1_w'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\n"
    content += b"p3\n(I0\ntS'b'\ntRp4\n(I1\n(I2\ntcnumpy\ndtype\np5\n(S'f4'\nI0\nI1\ntRp6\n(I3\n"
    content += b"S'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x00\\x00\\x80?\\x00\\x00\\x00@'\ntbs."
    (tmp_path / "R-50.pkl").write_bytes(content)
    assert read_checkpoint(str(tmp_path / "R-50.pkl"))["conv1_w"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("name", ["evil.pth", "evil.pkl", "raw.pth"])
@pytest.mark.parametrize("lazy", [False, True])
def test_unsafe_pickles_are_refused_and_not_executed(tmp_path, name, lazy):
    path, ran = tmp_path / name, tmp_path / "ran"
    content = {"model": {"a": Trap(ran)}}
    if name == "evil.pth":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError) as caught:
        read_checkpoint(str(path), lazy=lazy)
    message = str(caught.value)
    assert str(path) in message and "mkdir" in message and "is refused" in message
    assert f"torch.load({name!r}, weights_only=False)" in message
    assert not ran.exists()
    pickle.loads(pickle.dumps(Trap(ran)))
    assert ran.exists()  # the trap works


def test_the_advice_for_a_refused_file_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=0.1)}, "run.pth")
    with pytest.raises(ValueError, match=r"import argparse\.Namespace") as caught:
        read_checkpoint("run.pth")
    first, second = str(caught.value).splitlines()[1:]
    exec(f"{first.strip()}\n{second.strip()}", {})
    assert torch.equal(read_checkpoint("weights.pth")["model"]["a"], torch.ones(2))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated", b"\x80\x02}q\x00X", b"\x00" * 99]
)
def test_a_file_that_is_not_a_checkpoint(tmp_path, content, suffix):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    for lazy in (False, True):
        with pytest.raises(ValueError, match=rf"bad\{suffix} can't be read as a checkpoint"):
            read_checkpoint(str(path), lazy=lazy)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file(tmp_path, zipped, share):
    path = tmp_path / "half.pth"
    state = {f"layer{k}.weight": torch.randn(16, 16) for k in range(8)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"half\.pth can't be read as a checkpoint"):
        read_checkpoint(str(path))


def test_a_changed_byte_in_a_tensor(tmp_path):
    path = tmp_path / "flipped.pth"
    torch.save({"a": torch.full((1000,), 3.0)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((8,), 3.0).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped\.pth can't be read .*checksum of .*data/0"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("content", [torch.zeros(2), [1, 2], "text"])
def test_other_objects_and_no_file(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"holds a {type(content).__name__}, not a dictionary"):
        read_checkpoint(str(tmp_path / "a.pth"))
    with pytest.raises(FileNotFoundError):
        read_checkpoint(str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize("wrapper", ["", "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_state_dict_is_found(wrapper, prefix):
    state = {f"{prefix}a.weight": torch.zeros(2), f"{prefix}b.module.bias": np.ones(3)}
    found = unwrap({wrapper: state, "epoch": 3} if wrapper else state)
    assert list(found) == ["a.weight", "b.module.bias"]
    assert all(isinstance(x, torch.Tensor) for x in found.values())


def test_a_submodule_named_module():
    state = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert list(unwrap(state)) == ["module.a", "b"]


def test_no_tensor_in_it():
    with pytest.raises(ValueError, match="no tensor at the top level .*only: epoch, optimizer"):
        unwrap({"epoch": 3, "optimizer": {}})
