"""`LazyModel`: the model of a Detectron2 lazy config, built wherever a yaml config is built."""

from detectron2.config import CfgNode, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from omegaconf import OmegaConf

from .meta_arch import FCOS


@META_ARCH_REGISTRY.register()
def LazyModel(cfg: CfgNode) -> FCOS:
    """Build the FCOS that ``cfg.MODEL.LAZY`` describes.

    The text can name any function to be called, so it is to be trusted like a program.

    Args:
        cfg: with MODEL.LAZY, the YAML text of a lazy config whose ``model`` is built, as
            :func:`fcos_d2.engine.load_cfg` puts it there. Of the other keys of MODEL none is
            read but FCOS.NUM_CLASSES, which has to agree.

    Raises:
        ValueError: no text, another model than an FCOS, or another number of classes.
    """
    if not cfg.MODEL.LAZY:
        raise ValueError(
            "MODEL.META_ARCHITECTURE is LazyModel, but MODEL.LAZY is empty: name a --config-file "
            "that ends in .py, or the config.yaml of a run that was started with one."
        )
    model = instantiate(OmegaConf.create(cfg.MODEL.LAZY).model)
    if not isinstance(model, FCOS):
        raise ValueError(
            f"The `model` of a lazy config has to be an FCOS, not a {type(model).__name__}: other "
            "meta architectures are built from yaml, as configs/FasterRCNN_FCOS_R50_VOC.yaml is."
        )
    num_classes = model.proposal_generator.matcher.num_classes
    wanted = cfg.MODEL.FCOS.NUM_CLASSES
    if wanted not in (-1, num_classes):
        raise ValueError(
            f"The `model` of the lazy config has {num_classes} classes, but {wanted} are needed: "
            f"set model.proposal_generator.head.num_classes={wanted}."
        )
    return model
