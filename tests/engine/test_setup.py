"""From the command line to a checked config."""

import os

import pytest
import torch
from detectron2.modeling import build_model

from fcos_d2.checkpoint import FCOSCheckpointer
from fcos_d2.data import DataError, load_records
from fcos_d2.engine import load_cfg, setup
from fcos_d2.visualization.report import write_report


def test_classes_come_from_the_data(make_args):
    cfg = setup(make_args())
    assert cfg.MODEL.FCOS.NUM_CLASSES == 2
    assert os.path.exists(os.path.join(cfg.OUTPUT_DIR, "config.yaml"))


def test_the_dumped_config_is_the_one_that_was_used(make_args):
    cfg = setup(make_args("SOLVER.REFERENCE_IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.3"))
    again = load_cfg(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), [])
    assert again.SOLVER == cfg.SOLVER and again.MODEL.FCOS == cfg.MODEL.FCOS
    assert cfg.SOLVER.BASE_LR == 0.3  # set by hand
    assert cfg.SOLVER.WARMUP_ITERS == 2 * load_cfg(make_args().config_file, []).SOLVER.WARMUP_ITERS


def test_wrong_number_of_classes(make_args, tmp_path):
    with pytest.raises(ValueError, match="NUM_CLASSES is 20, .*2 classes.*set it to 2"):
        setup(make_args("MODEL.FCOS.NUM_CLASSES", "20"))
    assert not (tmp_path / "out").exists()


def test_other_classes_in_the_test_set(make_args, write_voc_folder, tmp_path):
    other = write_voc_folder(tmp_path / "other", classes=("ball", "cone"))
    with pytest.raises(ValueError, match="(?s)same classes.*ball, box.*ball, cone.*classes.txt"):
        setup(make_args("DATASETS.TEST", f"('voc:{other}:train',)"))


def test_unknown_source(make_args):
    with pytest.raises(ValueError, match="nobody_knows_this"):
        setup(make_args("DATASETS.TRAIN", "('nobody_knows_this',)"))


def test_no_source(make_args):
    with pytest.raises(ValueError, match="DATASETS.TRAIN is empty: name a source"):
        setup(make_args("DATASETS.TRAIN", "()"))
    with pytest.raises(ValueError, match="DATASETS.TEST is empty: name a source"):
        setup(make_args("DATASETS.TEST", "()", eval_only=True))


def test_evaluation_does_not_need_the_training_data(make_args):
    assert setup(make_args("DATASETS.TRAIN", "('voc:gone:train',)", eval_only=True))


def test_bad_data_is_found_before_the_output_folder_is_touched(make_args, voc_folder, tmp_path):
    (voc_folder / "JPEGImages" / "002.jpg").unlink()
    with pytest.raises(DataError, match="(?s)002.xml: the image is missing"):
        setup(make_args())
    assert not (tmp_path / "out").exists()


def test_a_report_does_not_change_what_training_accepts(make_args, voc_folder):
    """The report is drawn from the data as the run skipped it; the next run refuses it."""
    path = voc_folder / "Annotations" / "002.xml"
    path.write_text(path.read_text().replace("<xmin>", "<xmin>9"))
    cfg = setup(make_args("DATASETS.SKIP_BAD_BOXES", "True"))
    assert write_report(cfg.OUTPUT_DIR)
    assert len(load_records(cfg.DATASETS.TRAIN[0], skip_bad_boxes=True)) == 6
    with pytest.raises(DataError, match=r"002.xml: object 1 \(ball\): box .* is inverted"):
        setup(make_args(output="second"))


def test_unknown_key(make_args):
    with pytest.raises((KeyError, AssertionError), match="NO_SUCH_KEY"):
        setup(make_args("MODEL.FCOS.NO_SUCH_KEY", "1"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_logged_once(caplog):
    cfg = load_cfg("", [])
    assert cfg.MODEL.DEVICE == "cpu"
    assert [r.message for r in caplog.records] == ["No CUDA device: running on the CPU."]


def test_early_messages_are_in_the_log_file(make_args, tmp_path):
    """Twice in one process, as in a notebook: each run's log has its own lines, once."""
    for name in ("one", "two"):
        setup(make_args(output=name))
        text = (tmp_path / name / "log.txt").read_text()
        assert text.count("learning rate 0.01, ") == 1
        assert text.count("6 images") == 1  # the training set is the test set


@pytest.fixture
def earlier_run(make_args, tmp_path):
    """A checkpoint of a run in its output folder, of a recipe with other keys."""
    cfg = load_cfg(make_args().config_file, make_args().opts)
    cfg.MODEL.FCOS.NUM_CLASSES = 2
    cfg.MODEL.PIXEL_MEAN = [1.0, 2.0, 3.0]
    cfg.MODEL.FCOS.USE_SCALE = True
    model = build_model(cfg)
    FCOSCheckpointer(model, str(tmp_path / "run"), class_names=["ball", "box"], cfg=cfg).save("a")
    return str(tmp_path / "run" / "a.pth")


def test_training_from_weights_takes_the_keys_that_they_need(make_args, earlier_run, tmp_path):
    cfg = setup(make_args("MODEL.WEIGHTS", earlier_run))
    assert cfg.MODEL.PIXEL_MEAN == [1.0, 2.0, 3.0]
    assert not cfg.MODEL.FCOS.USE_SCALE
    assert f"MODEL.WEIGHTS {earlier_run} was made for:" in (tmp_path / "out/log.txt").read_text()


def test_evaluation_takes_all_keys_except_those_on_the_command_line(make_args, earlier_run):
    cfg = setup(make_args("MODEL.WEIGHTS", earlier_run, eval_only=True))
    assert cfg.MODEL.PIXEL_MEAN == [1.0, 2.0, 3.0] and cfg.MODEL.FCOS.USE_SCALE
    by_hand = ("MODEL.PIXEL_MEAN", "[4.0, 5.0, 6.0]")
    cfg = setup(make_args("MODEL.WEIGHTS", earlier_run, *by_hand, eval_only=True))
    assert cfg.MODEL.PIXEL_MEAN == [4.0, 5.0, 6.0] and cfg.MODEL.FCOS.USE_SCALE


@pytest.mark.parametrize("eval_only", [False, True])
def test_a_resumed_run_takes_its_own_keys(make_args, earlier_run, eval_only):
    """MODEL.WEIGHTS, from which it started, is not needed any more."""
    gone = ("MODEL.WEIGHTS", "gone.pth")
    cfg = setup(make_args(*gone, output="run", resume=True, eval_only=eval_only))
    assert cfg.MODEL.PIXEL_MEAN == [1.0, 2.0, 3.0] and cfg.MODEL.FCOS.USE_SCALE
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS gone.pth could not be loaded"):
        setup(make_args(*gone, output="other", resume=True, eval_only=eval_only))


def test_weights_that_can_not_be_read_stop_before_the_output_folder(make_args, tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"bad\.pth can't be read as a checkpoint"):
        setup(make_args("MODEL.WEIGHTS", str(tmp_path / "bad.pth")))
    assert not (tmp_path / "out").exists()
