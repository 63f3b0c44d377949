"""Lazy configs: a model written in Python, and a yaml recipe for all that is not the model."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode, LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

# Where the model of a lazy config has its number of classes.
NUM_CLASSES = "model.proposal_generator.head.num_classes"
# Keys that the model of a yaml recipe is built from, and a lazy one is not.
_MODEL_KEYS = ("MODEL.", "TEST.DETECTIONS_PER_IMAGE", "VIS_PERIOD")
_OTHER_KEYS = ("MODEL.WEIGHTS", "MODEL.DEVICE", "MODEL.CHANNELS_LAST")


def merge_config(cfg: CfgNode, config_file: str, opts: Sequence[str]) -> None:
    """Read a recipe into ``cfg``, in place, and override it.

    A file that ends in .py is a lazy config: its ``model`` goes into MODEL.LAZY as YAML text,
    which :func:`fcos_d2.modeling.lazy.LazyModel` builds, and its ``recipe`` names the yaml file of
    all else. A config.yaml that was dumped with such a model is read as any other.

    Args:
        cfg: with the keys of ``add_fcos_config``.
        config_file: path of a yaml or Python file; "" leaves the defaults.
        opts: what the command line overrides, see :func:`split_overrides`.

    Raises:
        FileNotFoundError: the file or its recipe is not there.
        ValueError: a lazy config without ``model`` or ``recipe``, or with a model that is no FCOS
            or that YAML can't hold; an override that can't be applied, or of a key that the model
            is not built from; an INPUT.FORMAT that is not the model's.
    """
    pairs, overrides = split_overrides(opts)
    if config_file.endswith(".py"):
        recipe, model = _read_lazy_file(config_file)
        cfg.merge_from_file(recipe)
        cfg.MODEL.META_ARCHITECTURE = "LazyModel"
        cfg.MODEL.LAZY = OmegaConf.to_yaml(model)
    elif config_file:
        cfg.merge_from_file(config_file)
    cfg.merge_from_list(pairs)
    if cfg.MODEL.LAZY:
        _check_keys(config_file, pairs[0::2])
        _override_model(cfg, config_file, overrides)
    elif overrides:
        raise ValueError(
            f"{overrides[0]} is for a --config-file that ends in .py: override a yaml file by KEY "
            "VALUE pairs."
        )


def split_overrides(opts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part a command line into KEY VALUE pairs and overrides of a lazy config's model.

    An override, as in ``model.backbone.out_channels=128``, stands where a KEY can stand: a VALUE
    may look like one.

    Returns:
        The keys and values in turn, and the overrides.
    """
    pairs: list[str] = []
    overrides: list[str] = []
    items = list(opts)
    while items:
        if items[0].startswith("model.") and "=" in items[0]:
            overrides.append(items.pop(0))
        else:
            # A key without a value stays alone, for yacs to complain.
            pairs += items[:2]
            del items[:2]
    return pairs, overrides


def _read_lazy_file(config_file: str) -> tuple[str, DictConfig]:
    """Return the path of the recipe, and ``{"model": ...}`` as plain data."""
    if not Path(config_file).is_file():
        raise FileNotFoundError(f"--config-file {config_file}: no such file.")
    try:
        recipe, model = LazyConfig.load(config_file, ("recipe", "model"))
    except KeyError as error:
        raise ValueError(
            f"{config_file} has no {error}: a lazy config needs `model`, a LazyCall of "
            "fcos_d2.modeling.FCOS, and `recipe`, the path from its folder to the yaml file of all "
            "that is not the model."
        ) from error
    path = Path(config_file).parent / recipe
    if not path.is_file():
        raise FileNotFoundError(f"{config_file}: its `recipe` {path} is not there.")
    return str(path), _as_data(model, config_file)


def _as_data(model: DictConfig, config_file: str) -> DictConfig:
    """Detectron2's own way of saving a lazy config: what is called becomes its import path."""
    lazy = DictConfig({"model": model}, flags={"allow_objects": True})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.yaml"
        LazyConfig.save(lazy, str(path))
        try:
            # Not by LazyConfig.load, which would read any Python object too.
            data = OmegaConf.load(path)
        except (OSError, yaml.YAMLError):
            data = OmegaConf.create()
    if "model" not in data:
        raise ValueError(
            f"{config_file}: its `model` can't be written as YAML. It may hold numbers, texts, "
            "lists, dicts and LazyCalls."
        )
    return data


def _check_keys(config_file: str, keys: Sequence[str]) -> None:
    for key in keys:
        if key.startswith(_MODEL_KEYS) and key not in _OTHER_KEYS:
            raise ValueError(
                f"{key} has no effect: the model is built as {config_file} describes it. Override "
                "that by model.x.y=value."
            )


def _override_model(cfg: CfgNode, config_file: str, overrides: list[str]) -> None:
    """Apply ``model.x.y=value`` to MODEL.LAZY; let ``cfg`` say what the model has."""
    lazy = OmegaConf.create(cfg.MODEL.LAZY)
    try:
        LazyConfig.apply_overrides(lazy, overrides)
    except Exception as error:  # of Hydra, OmegaConf and Detectron2
        raise ValueError(
            f"{' '.join(overrides)} can't be applied to {config_file}: {error}"
        ) from error
    _check_targets(config_file, OmegaConf.to_container(lazy))
    num_classes = OmegaConf.select(lazy, NUM_CLASSES)
    if num_classes is None:
        raise ValueError(f"{config_file} has no {NUM_CLASSES}: its `model` is no FCOS.")
    image_format = OmegaConf.select(lazy, "model.input_format", default="BGR")
    if image_format != cfg.INPUT.FORMAT:
        raise ValueError(
            f"{config_file}: model.input_format is {image_format!r}, but INPUT.FORMAT of its "
            f"recipe is {cfg.INPUT.FORMAT!r}: images would be read in another order of channels "
            "than the model takes."
        )
    cfg.MODEL.FCOS.NUM_CLASSES = num_classes
    cfg.MODEL.LAZY = OmegaConf.to_yaml(lazy)


def _check_targets(config_file: str, data: object) -> None:
    """Find everything that a model, as plain data, calls."""
    if isinstance(data, dict) and "_target_" in data:
        try:
            locate(data["_target_"])
        except ImportError as error:
            raise ValueError(
                f"{config_file} calls {data['_target_'].rpartition('.')[2]}, which can't be "
                "imported. What a lazy config calls is defined in a module, not in the file itself."
            ) from error
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    for part in parts:
        _check_targets(config_file, part)
