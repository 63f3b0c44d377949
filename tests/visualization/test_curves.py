"""Training curves."""

import json

import numpy as np
import pytest
from PIL import Image

from fcos_d2.visualization import plot_training_curves
from fcos_d2.visualization.curves import smooth


def write_lines(path, *lines):
    """Dicts as JSON lines, strings as they are."""
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return path


def training(iteration, loss=1.0, **more):
    """A line of training."""
    parts = {"loss_cls": loss / 2, "loss_box": loss / 4, "loss_ctr": loss / 4}
    return {"iteration": iteration, "total_loss": loss, **parts, "lr": 0.01, **more}


@pytest.mark.parametrize("lines", [(), ({"iteration": 9, "bbox/AP": 1.0},), ("{",)])
def test_no_training_is_an_error_and_leaves_no_picture(tmp_path, lines):
    path = write_lines(tmp_path / "metrics.json", *lines)
    with pytest.raises(ValueError, match=r"metrics\.json has no line of training"):
        plot_training_curves(path, tmp_path / "curves.png")
    with pytest.raises(FileNotFoundError):
        plot_training_curves(tmp_path / "none.json", tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == [path]


def test_smoothing():
    """80 points, a window of 5. A step from 0 to 1 before point 40 becomes a ramp:

    points 38 to 41 see 1, 2, 3, 4 ones of five. At the start the window has 3 points.
    """
    step = np.repeat([0.0, 1.0], 40)
    assert smooth(step)[37:43] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    ramp = np.arange(80.0)
    assert smooth(ramp)[0] == pytest.approx((0 + 1 + 2) / 3)
    ramp[10] = np.nan
    assert smooth(ramp)[10] == pytest.approx((8 + 9 + 11 + 12) / 4)
    assert smooth(np.array([3.0])) == pytest.approx([3.0])
    assert np.isnan(smooth(np.array([np.nan]))).all()


FCOS = {"fcos/num_pos": 30.0, "fcos/gt_covered": 0.9, "fcos/loss_ctr_excess": 0.1}


@pytest.mark.parametrize(
    "lines",
    [
        [training(i, 3 - i / 200, **FCOS) for i in range(19, 400, 20)]
        + [{"iteration": 399, "bbox/AP": 30.0, "bbox/AP50": 55.0, "voc/AP50_area": float("nan")}],
        [training(19)],
        [training(19, float("nan")), training(39, float("inf"))],
        [{"iteration": 5, "total_loss": 1.0}],
        [training(19), {"iteration": 19, "a/bbox/AP": 3.0, "b/bbox/AP": 4.0}],
    ],
    ids=["whole", "one line", "diverged", "bare", "two test sets"],
)
def test_the_picture(tmp_path, lines, recwarn):
    picture = tmp_path / "new" / "curves.png"
    plot_training_curves(write_lines(tmp_path / "metrics.json", *lines), picture)
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.size == (1430, 880)
        assert len(np.unique(np.asarray(image.convert("L")))) > 20  # something is drawn
    assert list(picture.parent.iterdir()) == [picture]
    assert not [str(warning.message) for warning in recwarn if "matplotlib" in warning.filename]
