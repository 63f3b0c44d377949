"""Every analysis against plain Python loops, and every fixed error against pycocotools."""

import math
import warnings

import numpy as np
import pytest

from fcos_d2.evaluation import analysis, coco_table
from fcos_d2.evaluation.analysis import ERROR_TYPES

from ..conftest import make_record, predict

CLASSES = ["cat", "dog", "fox"]


def make_data(seed, ties=False):
    """25 images of up to 6 objects, a quarter of them ignored, and detections near them or not.

    All scores differ, unless there are ``ties``; some boxes extend beyond the image.
    """
    rng = np.random.default_rng(seed)
    records, predictions = [], []
    for number in range(25):
        objects = []
        for _ in range(rng.integers(0, 7)):
            box = np.array([*rng.uniform(-20, 150, 2), *rng.uniform(10, 120, 2)])
            category, flag = int(rng.integers(3)), rng.random()
            flags = {"difficult": int(flag < 0.15), "iscrowd": int(0.15 <= flag < 0.25)}
            objects.append((category, box.tolist(), flags))
            for _ in range(rng.integers(0, 5)):
                moved = box + rng.normal(0, 10, 4) * [1, 1, 0.5, 0.5]
                moved[2:] = moved[2:].clip(3)
                other = category if rng.random() < 0.6 else int(rng.integers(3))
                predictions.append((f"{number}", other, moved.tolist()))
        box = [*rng.uniform(0, 150, 2).tolist(), *rng.uniform(5, 60, 2).tolist()]
        predictions.append((f"{number}", int(rng.integers(3)), box))
        records.append(make_record(f"{number}", *objects))
    scores = rng.permutation(len(predictions)) / len(predictions)
    scores = scores.round(2) if ties else scores
    rows = zip(predictions, scores.tolist(), strict=True)
    return records, [predict(*row, score) for row, score in rows]


def is_real(item):
    return not (item["difficult"] or item["iscrowd"])


def plain_iou(a, b, crowd=False):
    """IoU of two XYWH boxes; with a crowd, the share of ``a`` in it."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / (a[2] * a[3] if crowd else a[2] * a[3] + b[2] * b[3] - both)


def objects_of(records, image_id):
    return next(x["annotations"] for x in records if x["image_id"] == image_id)


def plain_match(records, predictions, threshold=0.5):
    """{prediction's number: (object's index or -1, IoU, outcome)}, best score first."""
    order = {record["image_id"]: i for i, record in enumerate(records)}

    def rank(n):
        return -predictions[n]["score"], order[predictions[n]["image_id"]], n

    taken, result = set(), {}
    for n in sorted(range(len(predictions)), key=rank):
        found = predictions[n]
        best, choice = (False, threshold), (-1, 0.0, "fp")
        for i, item in enumerate(objects_of(records, found["image_id"])):
            crowd = bool(item["iscrowd"])
            free = crowd or (found["image_id"], i) not in taken
            iou = plain_iou(found["bbox"], item["bbox"], crowd)
            if found["category_id"] != item["category_id"] or not free or iou < threshold:
                continue
            if (is_real(item), iou) >= best:  # a real object goes before any ignored one
                best = (is_real(item), iou)
                choice = (i, iou, "tp" if is_real(item) else "ignored")
        taken.add((found["image_id"], choice[0]))
        result[n] = choice
    return result


def plain_errors(records, predictions):
    """{number of a wrong prediction: (error, index of the object that it is about or None)}."""
    errors = {}
    for n, (*_, outcome) in plain_match(records, predictions).items():
        if outcome != "fp":
            continue
        found = predictions[n]
        own, other = (0.0, None), (0.0, None)
        for i, item in enumerate(objects_of(records, found["image_id"])):
            pair = (plain_iou(found["bbox"], item["bbox"]), i)
            if is_real(item) and item["category_id"] == found["category_id"]:
                own = max(own, pair, key=lambda x: x[0])
            elif is_real(item):
                other = max(other, pair, key=lambda x: x[0])
        if 0.1 <= own[0] < 0.5:
            errors[n] = ("localisation", own[1])
        elif other[0] >= 0.5:
            errors[n] = ("classification", other[1])
        elif own[0] >= 0.5:
            errors[n] = ("duplicate", own[1])
        elif other[0] < 0.1:
            errors[n] = ("background", None)
        else:
            errors[n] = ("both", other[1])
    return errors


def plain_missed(records, predictions):
    """(image, index) of the objects that nothing takes, and nothing to be corrected points at."""
    matches, errors = plain_match(records, predictions), plain_errors(records, predictions)
    reached = {(predictions[n]["image_id"], i) for n, (i, *_) in matches.items()}
    for n, (error, i) in errors.items():
        if error in ("classification", "localisation"):
            reached.add((predictions[n]["image_id"], i))
    everything = ((x["image_id"], i, y) for x in records for i, y in enumerate(x["annotations"]))
    return {(image, i) for image, i, y in everything if is_real(y) and (image, i) not in reached}


def fixed(records, predictions, kind):
    """The data with one kind of error fixed in it, to be measured by pycocotools."""
    matches, errors = plain_match(records, predictions), plain_errors(records, predictions)
    out = {n for n, (*_, outcome) in matches.items() if outcome == "fp"}
    found = {(predictions[n]["image_id"], i) for n, (i, *_) in matches.items()}
    if kind == "missed":
        return without(records, plain_missed(records, predictions)), predictions
    if kind == "false negatives":
        keys = {(x["image_id"], i) for x in records for i, _ in enumerate(x["annotations"])}
        ignored = {(a, i) for a, i in keys if not is_real(objects_of(records, a)[i])}
        return without(records, keys - found - ignored), predictions
    if kind != "false positives":
        out = {n for n in out if errors[n][0] == kind}
    kept = {n: x for n, x in enumerate(predictions) if n not in out}
    if kind in ("classification", "localisation"):
        for n in sorted(out, key=lambda n: -predictions[n]["score"]):
            key = (predictions[n]["image_id"], errors[n][1])
            if key not in found:
                # The object's class and box: one of them is right already, or right enough.
                truth = objects_of(records, key[0])[key[1]]
                kept[n] = predict(
                    key[0], truth["category_id"], truth["bbox"], predictions[n]["score"]
                )
                found.add(key)
    return records, list(kept.values())


def without(records, keys):
    """The records without the objects (image, index)."""
    kept = [
        [y for i, y in enumerate(x["annotations"]) if (x["image_id"], i) not in keys]
        for x in records
    ]
    return [{**x, "annotations": items} for x, items in zip(records, kept, strict=True)]


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.75])
def test_matching(threshold):
    records, predictions = make_data(6, ties=True)
    expected = plain_match(records, predictions, threshold)
    table = analysis.match_detections(records, predictions, CLASSES, iou_thresh=threshold)
    assert table["score"].tolist() == [predictions[n]["score"] for n in expected]
    truth, iou, outcome = map(list, zip(*expected.values(), strict=True))
    assert table["truth"].tolist() == truth and table["outcome"].tolist() == outcome
    np.testing.assert_allclose(table["iou"], iou, atol=1e-12)
    assert set(table["outcome"]) == {"tp", "fp", "ignored"}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_errors_by_class_and_size(seed):
    """Bounds 32^2 and 96^2 of the object's area, or of the detection's for "background"."""
    records, predictions = make_data(seed)
    by_class, by_size = np.zeros((2, 3, 6), dtype=int)

    def add(category, box, error):
        column, area = ERROR_TYPES.index(error), box[2] * box[3]
        by_class[category, column] += 1
        by_size[int(area >= 32**2) + int(area >= 96**2), column] += 1

    for n, (error, i) in plain_errors(records, predictions).items():
        found = predictions[n]
        about = found if i is None else objects_of(records, found["image_id"])[i]
        add(found["category_id"], about["bbox"], error)
    for image_id, i in plain_missed(records, predictions):
        item = objects_of(records, image_id)[i]
        add(item["category_id"], item["bbox"], "missed")
    assert (by_class.sum(axis=0) > 0).all()
    result = analysis.error_breakdown(records, predictions, CLASSES)
    assert result.counts.columns.tolist() == list(ERROR_TYPES)
    assert result.counts.index.tolist() == CLASSES
    assert result.by_size.index.tolist() == ["small", "medium", "large"]
    np.testing.assert_array_equal(result.counts, by_class)
    np.testing.assert_array_equal(result.by_size, by_size)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fixing_an_error_gains_what_pycocotools_finds(seed):
    """AP50 + dAP is COCO's AP50 of the data in which the error does not exist."""
    records, predictions = make_data(seed)
    result = analysis.error_breakdown(records, predictions, CLASSES)
    table, _ = coco_table(records, predictions, CLASSES)
    assert result.AP50 == pytest.approx(table["AP50"], abs=1e-9)
    for kind in (*ERROR_TYPES, "false positives", "false negatives"):
        table, _ = coco_table(*fixed(records, predictions, kind), CLASSES)
        assert result.AP50 + result.dap.loc[kind, "dAP"] == pytest.approx(table["AP50"], abs=1e-6)
        assert table["AP50"] > result.AP50


@pytest.mark.parametrize(("seed", "threshold"), [(0, 0.0), (1, 0.4), (2, 0.7)])
def test_confusion_against_loops(seed, threshold):
    records, predictions = make_data(seed)
    expected, taken = np.zeros((4, 4), dtype=int), set()
    for found in sorted(predictions, key=lambda x: -x["score"]):
        if found["score"] < threshold:
            continue
        best, choice = (), None
        for i, item in enumerate(objects_of(records, found["image_id"])):
            iou = plain_iou(found["bbox"], item["bbox"], item["iscrowd"])
            free = item["iscrowd"] or (found["image_id"], i) not in taken
            if iou >= 0.5 and free:
                same = item["category_id"] == found["category_id"]
                if (is_real(item), same, iou) > best:
                    best, choice = (is_real(item), same, iou), i
        if choice is None:
            expected[3, found["category_id"]] += 1
            continue
        taken.add((found["image_id"], choice))
        item = objects_of(records, found["image_id"])[choice]
        if is_real(item):
            expected[item["category_id"], found["category_id"]] += 1
    for record in records:
        for i, item in enumerate(record["annotations"]):
            if is_real(item) and (record["image_id"], i) not in taken:
                expected[item["category_id"], 3] += 1
    matrix = analysis.confusion_matrix(records, predictions, CLASSES, score_thresh=threshold)
    np.testing.assert_array_equal(matrix, expected)
    confused = matrix[:3, :3].sum() - np.trace(matrix)
    assert min(np.trace(matrix), confused, matrix[3].sum(), matrix[:, 3].sum()) > 0


def test_calibration_against_loops():
    records, predictions = make_data(3)
    outcomes = plain_match(records, predictions)
    kept = [(predictions[n]["score"], x == "tp") for n, (*_, x) in outcomes.items() if x[0] != "i"]
    table, ece = analysis.calibration(records, predictions, CLASSES, bins=4)
    gap = 0.0
    for k, row in enumerate(table.itertuples()):
        inside = [x for x in kept if k / 4 <= x[0] < (k + 1) / 4]
        score, precision = (sum(column) / len(inside) for column in zip(*inside, strict=True))
        assert row.count == len(inside) and (row.low, row.high) == (k / 4, (k + 1) / 4)
        assert (row.mean_score, row.precision) == pytest.approx((score, precision))
        gap += len(inside) / len(kept) * abs(precision - score)
    assert ece == pytest.approx(gap) and gap > 0.1


def test_ranking_against_loops():
    records, predictions = make_data(4)
    expected = []
    for place, record in enumerate(records):
        image, real = record["image_id"], sum(map(is_real, record["annotations"]))
        chosen = [x for x in predictions if x["image_id"] == image and x["score"] >= 0.3]
        outcomes = [x for *_, x in plain_match([record], chosen).values()]
        tp, fp = outcomes.count("tp"), outcomes.count("fp")
        wrong = fp + real - tp
        f1 = 2 * tp / (2 * tp + wrong) if tp + wrong else 1.0
        expected.append((f1, -wrong, place, image, tp, fp, real - tp))
    table = analysis.rank_images(records, predictions, CLASSES, score_thresh=0.3)
    rows = table[["image_id", "tp", "fp", "fn"]].itertuples(index=False, name=None)
    assert list(rows) == [row[3:] for row in sorted(expected)]


def test_best_threshold_against_loops():
    """Every score is tried as the threshold on the predictions themselves."""
    records, predictions = make_data(5)
    for k, curve in enumerate(analysis.precision_recall(records, predictions, CLASSES)):
        real = sum(is_real(y) for x in records for y in x["annotations"] if y["category_id"] == k)
        tried = []
        for threshold in {x["score"] for x in predictions if x["category_id"] == k}:
            rows = [x for x in predictions if x["category_id"] == k and x["score"] >= threshold]
            outcomes = [x for *_, x in plain_match(records, rows).values()]
            tp, fp = outcomes.count("tp"), outcomes.count("fp")
            tried.append((2 * tp / (tp + fp + real), threshold))
        assert (curve.best_f1, curve.best_threshold) == pytest.approx(max(tried))
        assert curve.num_ground_truth == real > 5


def test_curves_against_pycocotools():
    """AP50 per class is the mean of the curve's highest precision at 101 recalls."""
    records, predictions = make_data(7, ties=True)
    curves = analysis.precision_recall(records, predictions, CLASSES)
    _, rows = coco_table(records, predictions, CLASSES)
    for curve, row in zip(curves, rows, strict=True):
        points = [
            max(curve.precision[curve.recall >= recall - 1e-9], default=0)
            for recall in np.linspace(0, 1, 101)
        ]
        assert 100 * np.mean(points) == pytest.approx(row["AP50"], abs=1e-9)
        assert row["AP50"] > 5


def one_image(objects, found):
    """The record of objects (class, box) and predictions (class, box, score) on it."""
    return [make_record("a", *objects)], [predict("a", *row) for row in found]


@pytest.mark.parametrize(("height", "expected"), [(30, "localisation"), (90, "classification")])
def test_the_first_error_that_is_true(height, expected):
    """A dog, found, and a cat predicted with exactly its box: IoU 1 with the dog.

    Where the real cat is 30 high, its IoU of 0.3 makes the error one of localisation before one of
    class. Where it is 90 high and found, IoU 0.9, it is one of class before it is a duplicate.
    """
    box, cat = [0, 0, 100, 100], [0, 0, 100, height]
    found = [(1, box, 0.9), (0, box, 0.7)]
    if height == 90:
        found.append((0, cat, 0.8))
    counts = analysis.error_breakdown(*one_image([(0, cat), (1, box)], found), CLASSES).counts
    assert counts.sum().to_dict() == dict.fromkeys(ERROR_TYPES, 0) | {expected: 1}


def test_a_score_on_an_edge_belongs_to_the_bin_above():
    """Tenths are compared as they are written: 0.3 is not below 3 * 0.1 = 0.30000000000000004."""
    found = [(0, [0, 0, 9, 9], k / 10) for k in range(11)]
    table = analysis.calibration(*one_image([], found), CLASSES).table
    assert table["count"].tolist() == [1] * 9 + [2]


@pytest.mark.parametrize("value", [0, -0.5, 1.5, math.nan])
def test_an_iou_that_is_none(value):
    with pytest.raises(ValueError, match=f"iou_thresh is {value}"):
        analysis.match_detections([], [], CLASSES, iou_thresh=value)
    with pytest.raises(ValueError, match=f"iou_thresh is {value}"):
        analysis.confusion_matrix([], [], CLASSES, score_thresh=0.5, iou_thresh=value)


def test_two_records_of_one_image():
    with pytest.raises(ValueError, match="two of the records have the image id 'a'"):
        analysis.rank_images([{"image_id": "a"}] * 2, [], CLASSES, score_thresh=0.5)


def test_a_threshold_other_than_one_half():
    """IoU 0.6 and 0.3 with the cat: right and poor at 0.5; poor and background at 0.7 and 0.4."""
    found = [(0, [0, 0, 100, height], height / 100) for height in (60, 30)]
    data = *one_image([(0, [0, 0, 100, 100])], found), CLASSES
    at_half = analysis.error_breakdown(*data)
    assert (at_half.AP50, at_half.counts.loc["cat", "localisation"]) == (pytest.approx(100), 1)
    strict = analysis.error_breakdown(*data, foreground_iou=0.7, background_iou=0.4)
    assert strict.AP50 == 0
    expected = dict.fromkeys(ERROR_TYPES, 0) | {"localisation": 1, "background": 1}
    assert strict.counts.loc["cat"].to_dict() == expected


@pytest.mark.parametrize("images", ["none", "no objects", "ignored", "objects"])
@pytest.mark.parametrize("found", [False, True])
def test_little_data_gives_tables_without_warnings(images, found):
    """Tables keep their columns and types where there is nothing to put in them."""
    box, flags = [0, 0, 50, 50], {"difficult": int(images == "ignored")}
    objects = [] if images == "no objects" else [(1, box, flags)]
    records = [] if images == "none" else [make_record(7, *objects)]
    data = records, [predict(7, 1, box, 0.5)] if found and records else [], CLASSES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matches, objects = analysis.match_detections(*data), analysis.ground_truth(records, CLASSES)
        curves, errors = analysis.precision_recall(*data), analysis.error_breakdown(*data)
        matrix, ranking = (
            f(*data, score_thresh=0.5) for f in (analysis.confusion_matrix, analysis.rank_images)
        )
        table, ece = analysis.calibration(*data)
    for key in ("x", "y", "w", "h", "area", "score", "iou"):
        assert matches[key].dtype == np.float64, key
    assert matches["truth"].dtype.kind == matches["category_id"].dtype.kind == "i"
    outcome = {"ignored": "ignored", "objects": "tp"}.get(images, "fp")
    assert matches["outcome"].tolist() == [outcome] * len(data[1])
    assert "image_id" in matches
    assert objects["ignored"].dtype == bool and objects["area"].dtype == np.float64
    assert [x.num_ground_truth for x in curves] == [0, int(images == "objects"), 0]
    assert math.isnan(curves[0].best_f1)
    assert images != "objects" or curves[1].best_f1 == float(found)
    assert matrix.shape == (4, 4) and matrix.dtype.kind == "i"
    assert matrix.sum() == int(images == "objects" or (found and images == "no objects"))
    assert errors.counts.shape == errors.by_size.shape == (3, 6) and errors.dap.shape == (8, 1)
    assert errors.counts.to_numpy().dtype.kind == errors.by_size.to_numpy().dtype.kind == "i"
    assert math.isnan(errors.AP50) if images != "objects" else errors.AP50 == 100 * found
    missed, wrong = images == "objects" and not found, images == "no objects" and found
    assert errors.counts.loc["dog"].tolist() == [0, 0, 0, 0, int(wrong), int(missed)]
    assert errors.counts.to_numpy().sum() == missed + wrong
    assert ranking.columns.tolist() == ["image_id", "tp", "fp", "fn", "f1"]
    assert ranking["f1"].tolist() == [float(not missed and not wrong)] * len(records)
    assert len(table) == 10
    # Without a detection that counts there is nothing to be calibrated.
    assert math.isnan(ece) == (not found or images in ("none", "ignored"))
