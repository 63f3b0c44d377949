"""Findings as text, and their lines."""

from fcos_d2.data import Finding
from fcos_d2.data.inspection.listing import ADVICE, format_findings, json_lines


def test_lines_of_a_json_file(tmp_path):
    """Lists are found wherever they are, whatever else the file holds."""
    text = '{"info": {"x": [1, "]"]}, "b": [\n{"t": "}\\n"},\n [1], 2], "images": [], "n": 1}\n'
    (tmp_path / "x.json").write_text(text)
    assert json_lines(str(tmp_path / "x.json")) == {"b": [2, 3, 3], "images": []}


def test_text_lists_errors_first_and_not_too_much():
    findings = [Finding("warning", "same box", "b.xml", "odd", line=4)]
    findings += [Finding("error", "bad box", f"{k}.xml", "bad", line=k) for k in range(12)]
    findings += [Finding("error", "bad image", "c.jpg", "c.jpg is cut off")]
    text = format_findings(findings).splitlines()
    assert text[:2] == ["error: bad box (12)", "  0.xml:0: bad"]
    assert text[11:13] == ["  ... and 2 more", f"  -> {ADVICE['bad box']}"]
    assert text[13:16] == [
        "error: bad image (1)",
        "  c.jpg is cut off",
        f"  -> {ADVICE['bad image']}",
    ]
    assert text[16:18] == ["warning: same box (1)", "  b.xml:4: odd"]
