"""Generate docs/configuration.md from fcos_d2/config.py: python tools/config_page.py."""

import argparse
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "fcos_d2" / "config.py"
PAGE = ROOT / "docs" / "configuration.md"

INTRODUCTION = """\
<!-- Generated from fcos_d2/config.py by tools/config_page.py: edit the comments there. -->
# Configuration

Recipes are Detectron2 yaml files; `configs/` has one per data set and backbone, all based on
`configs/Base-FCOS.yaml`. `KEY VALUE` pairs at the end of a command override the recipe:

```bash
python train_net.py --config-file configs/FCOS_R50_VOC.yaml SOLVER.IMS_PER_BATCH 8 SEED 2
```

In Python, `fcos_d2.add_fcos_config(cfg)` adds the keys to the result of Detectron2's `get_cfg()`.
The tables list the keys that fcos_d2 adds. Detectron2's keys keep their meaning; those of other
models, such as `MODEL.RETINANET`, have no effect. A run writes its complete configuration to
`OUTPUT_DIR/config.yaml`, which is itself a recipe.
"""
FOOTER = """\
## Removed keys

A config.yaml of an earlier version that sets one of these keys still loads; the key is ignored with
a warning: {}.
"""


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(build_page(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"Wrote {PAGE.relative_to(ROOT)}")


def build_page(source: str) -> str:
    """Turn the source of config.py into Markdown, one table per heading.

    Raises:
        ValueError: a key without a comment, or before the first heading.
    """
    tree = ast.parse(source)
    lines = source.splitlines()
    page, section = [INTRODUCTION], ""
    for key, default, line in _keys(tree):
        heading, meaning = _comments(lines, line)
        if not meaning or not (heading or section):
            raise ValueError(f"config.py, line {line}: {key} has no comment or no heading above it")
        if heading:
            section = heading
            page.append(f"## {section}\n\n| key | default | meaning |\n|---|---|---|")
        meaning = meaning.replace("|", r"\|")
        page.append(f"| `{key}` | `{default}` | {meaning} |")
    removed = ", ".join(f"`{key}`" for key in _removed(tree))
    return "\n".join(page).replace(" |\n## ", " |\n\n## ") + "\n\n" + FOOTER.format(removed)


def _keys(tree: ast.Module) -> list[tuple[str, str, int]]:
    """Return (key, default as Python source, line number) of each key, in order."""
    functions = [x for x in tree.body if isinstance(x, ast.FunctionDef)]
    body = next(x for x in functions if x.name == "add_fcos_config").body
    keys = []
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value) != "CN()":
            key = ast.unparse(node.targets[0]).removeprefix("cfg.")
            keys.append((key, ast.unparse(node.value).replace("'", '"'), node.lineno))
    return keys


def _removed(tree: ast.Module) -> tuple[str, ...]:
    node = next(x for x in tree.body if ast.unparse(x).startswith("REMOVED_KEYS"))
    assert isinstance(node, ast.Assign)
    return ast.literal_eval(node.value)


def _comments(lines: list[str], line: int) -> tuple[str, str]:
    """Return the heading (or "") and the comment above the 1-based ``line``."""
    blocks = [""]
    for text in reversed(lines[: line - 1]):
        text = text.strip()
        if text.startswith("#"):
            blocks[-1] = f"{text[1:].strip()} {blocks[-1]}".strip()
        elif not text and len(blocks) == 1:
            blocks.append("")
        elif not text.endswith("= CN()"):
            break
    return blocks[1] if len(blocks) > 1 else "", blocks[0]


if __name__ == "__main__":
    main()
