"""The head as region proposal network of Detectron2's own meta architectures."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from fcos_d2.modeling import CenterSamplingMatcher, FCOSDecoder, FCOSHead, FCOSProposalGenerator

ROI_LOSSES = {"loss_cls", "loss_box_reg"}
FCOS_LOSSES = {"loss_fcos_cls", "loss_fcos_box", "loss_fcos_ctr"}


def make_input(height, width, boxes=(), classes=None):
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes or [0] * len(boxes), dtype=torch.int64)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    # Something to see where the boxes are.
    for x0, y0, x1, y1 in instances.gt_boxes.tensor.int().tolist():
        image[:, y0:y1, x0:x1] //= 8
    return {"image": image, "instances": instances, "height": 2 * height, "width": 2 * width}


def batch_of_two():
    return [
        make_input(96, 128, [[10, 20, 60, 70], [64, 8, 120, 90]], [0, 2]),
        make_input(80, 96, [[5, 5, 40, 60]], [1]),
    ]


@pytest.fixture
def rcnn_cfg(tiny_cfg):
    """Faster R-CNN with proposals of the FCOS head, as narrow as can be."""
    cfg = tiny_cfg
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.FCOS.CLASS_AGNOSTIC = True
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 100
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    return cfg


@pytest.mark.parametrize("class_agnostic", [True, False])
def test_a_training_step_reaches_every_parameter(rcnn_cfg, class_agnostic):
    rcnn_cfg.MODEL.FCOS.CLASS_AGNOSTIC = class_agnostic
    model = build_model(rcnn_cfg)
    assert model.proposal_generator.head.cls_score.out_channels == (1 if class_agnostic else 3)
    with EventStorage():
        losses = model(batch_of_two())
    assert set(losses) == ROI_LOSSES | FCOS_LOSSES
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for part in (model.roi_heads, model.proposal_generator.head, model.backbone.top_block):
        assert all(p.grad.any() for name, p in part.named_parameters() if "weight" in name)


def test_training_learns_in_both_stages(rcnn_cfg):
    model, batch = build_model(rcnn_cfg), batch_of_two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    history = []
    with EventStorage():
        for _ in range(12):
            losses = model(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            history.append({name: loss.item() for name, loss in losses.items()})
    for names in (ROI_LOSSES, FCOS_LOSSES):
        first, last = (sum(losses[name] for name in names) for losses in (history[0], history[-1]))
        assert last < 0.8 * first


def test_images_without_objects(rcnn_cfg):
    model = build_model(rcnn_cfg)
    with EventStorage():
        losses = model([make_input(64, 96), make_input(96, 64)])
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_fcos_box"] == losses["loss_box_reg"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_inference_gives_detections(rcnn_cfg):
    rcnn_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model = build_model(rcnn_cfg).eval()
    batch = batch_of_two()
    with torch.no_grad():
        outputs = model(batch)
    for inputs, output in zip(batch, outputs, strict=True):
        found = output["instances"]
        assert 0 < len(found) <= rcnn_cfg.TEST.DETECTIONS_PER_IMAGE
        assert found.image_size == (inputs["height"], inputs["width"])
        assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
        assert found.pred_boxes.tensor.isfinite().all()
        assert set(found.pred_classes.tolist()) <= {0, 1, 2}


def test_proposal_network(rcnn_cfg):
    rcnn_cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    model, batch = build_model(rcnn_cfg), batch_of_two()
    with EventStorage():
        losses = model(batch)
    assert set(losses) == FCOS_LOSSES
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    with torch.no_grad():
        outputs = model.eval()(batch)
    for inputs, output in zip(batch, outputs, strict=True):
        proposals = output["proposals"]
        assert 0 < len(proposals) <= rcnn_cfg.MODEL.RPN.POST_NMS_TOPK_TEST
        assert proposals.image_size == (inputs["height"], inputs["width"])


def test_weight_of_the_losses(rcnn_cfg):
    rcnn_cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    plain = build_model(rcnn_cfg)
    rcnn_cfg.MODEL.RPN.LOSS_WEIGHT = 0.25
    weighted = build_model(rcnn_cfg)
    weighted.load_state_dict(plain.state_dict())
    batch = batch_of_two()
    with EventStorage():
        losses, weighted_losses = plain(batch), weighted(batch)
    for name, loss in losses.items():
        assert weighted_losses[name].item() == pytest.approx(0.25 * loss.item())


def make_generator(cfg, seed=0):
    """A proposal generator whose random head proposes boxes of all sizes and scores."""
    torch.manual_seed(seed)
    model = build_model(cfg)
    head = model.proposal_generator.head
    for conv, std in ((head.cls_score, 0.3), (head.box_pred, 0.2), (head.centerness, 0.3)):
        if conv is not None:
            torch.nn.init.normal_(conv.weight, std=std)
    torch.nn.init.constant_(head.box_pred.bias, 1.0)
    images = [torch.rand(3, 64, 96) * 255, torch.rand(3, 90, 60) * 255]
    images = ImageList.from_tensors(images, model.backbone.size_divisibility)
    return model.proposal_generator, images, model.backbone(images.tensor)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def logit(p):
    p = min(max(p, 1e-6), 1 - 1e-6)  # so that 0 and 1 stay finite
    return math.log(p / (1 - p))


def reference_proposals(cfg, generator, images, features, stage):
    """Proposals by plain loops: [(score, box), ...] for each image, best first."""
    rpn, strides = cfg.MODEL.RPN, [8, 16, 32, 64, 128]
    maps = [features[name] for name in cfg.MODEL.FCOS.IN_FEATURES]
    logits, ltrb, quality = generator.head(maps)
    results = []
    for n, (height, width) in enumerate(images.image_sizes):
        candidates, place = [], 0
        for feature, stride in zip(maps, strides, strict=True):
            level = []
            for i in range(feature.shape[2]):
                for j in range(feature.shape[3]):
                    score = sigmoid(max(logits[n, place].tolist()))
                    if quality is not None:
                        score = math.sqrt(score * sigmoid(quality[n, place].item()))
                    x, y = (j + 0.5) * stride, (i + 0.5) * stride
                    left, top, right, bottom = (stride * d for d in ltrb[n, place].tolist())
                    box = (
                        *(max(0.0, x - left), max(0.0, y - top)),
                        *(min(width, x + right), min(height, y + bottom)),
                    )
                    level.append((score, box))
                    place += 1
            candidates += sorted(level, reverse=True)[: rpn[f"PRE_NMS_TOPK_{stage}"]]
        kept = []
        for score, box in sorted(candidates, reverse=True):
            least = cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE
            if min(box[2] - box[0], box[3] - box[1]) > least and all(
                iou(box, other) <= rpn.NMS_THRESH for _, other in kept
            ):
                kept.append((score, box))
        results.append(kept[: rpn[f"POST_NMS_TOPK_{stage}"]])
    return results


def iou(one, other):
    sides = [min(one[k + 2], other[k + 2]) - max(one[k], other[k]) for k in (0, 1)]
    common = max(0.0, sides[0]) * max(0.0, sides[1])
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return common / (sum(areas) - common)


OPTIONS = {
    "class-agnostic": [],
    "a class each": ["MODEL.FCOS.CLASS_AGNOSTIC", False],
    "no quality": ["MODEL.FCOS.QUALITY", "none"],
    "few before NMS": ["MODEL.RPN.PRE_NMS_TOPK_TRAIN", 5, "MODEL.RPN.PRE_NMS_TOPK_TEST", 3],
    "few after NMS": ["MODEL.RPN.POST_NMS_TOPK_TRAIN", 6, "MODEL.RPN.POST_NMS_TOPK_TEST", 4],
    "no small box": ["MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 24],
    "hard NMS": ["MODEL.RPN.NMS_THRESH", 0.2],
    # Rules of detections, which proposals don't have.
    "other detections": [
        *("MODEL.FCOS.SCORE_THRESH_TEST", 0.9, "MODEL.FCOS.NMS_THRESH_TEST", 0.1),
        *("TEST.DETECTIONS_PER_IMAGE", 2, "MODEL.FCOS.TOPK_CANDIDATES_TEST", 2),
    ],
}


@pytest.mark.parametrize("stage", ["TRAIN", "TEST"])
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_proposals_against_plain_loops(rcnn_cfg, name, stage):
    rcnn_cfg.merge_from_list(OPTIONS[name])
    generator, images, features = make_generator(rcnn_cfg, seed=len(name))
    generator.train(stage == "TRAIN")
    proposals = generator.propose(generator.predict(images, features), images.image_sizes)
    expected = reference_proposals(rcnn_cfg, generator, images, features, stage)
    for found, wanted, size in zip(proposals, expected, images.image_sizes, strict=True):
        assert found.image_size == size
        assert set(found.get_fields()) == {"proposal_boxes", "objectness_logits"}
        assert len(found) == len(wanted) > 0
        assert not found.proposal_boxes.tensor.requires_grad
        torch.testing.assert_close(
            found.proposal_boxes.tensor, torch.tensor([box for _, box in wanted]), rtol=0, atol=1e-3
        )
        torch.testing.assert_close(
            found.objectness_logits,
            torch.tensor([logit(score) for score, _ in wanted]),
            rtol=1e-4,
            atol=1e-4,
        )


@torch.no_grad()
def test_the_limits_are_reached(rcnn_cfg):
    """NMS that suppresses nothing: what is left is what the limits leave.

    On the padded 96 x 96 batch the levels have 144, 36, 9, 4 and 1 locations: of at most 7 a level
    7 + 7 + 7 + 4 + 1 = 26 are left before NMS, in testing 5 + 5 + 5 + 4 + 1 = 20.
    """
    rcnn_cfg.MODEL.RPN.NMS_THRESH = 1.0
    rcnn_cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE = -1
    rcnn_cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, rcnn_cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 7, 5
    for limit, expected in ((1000, {True: 26, False: 20}), (9, {True: 9, False: 9})):
        rcnn_cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = rcnn_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = limit
        generator, images, features = make_generator(rcnn_cfg)
        assert images.tensor.shape[-2:] == (96, 96)
        predictions = generator.predict(images, features)
        for training, count in expected.items():
            proposals = generator.train(training).propose(predictions, images.image_sizes)
            assert [len(x) for x in proposals] == [count, count]


@pytest.mark.parametrize(
    "quality, cls, ctr, expected",
    [
        # sqrt(1/2 * 1/2) = 1/2, whose logit is 0.
        ("centerness", 0.0, 0.0, pytest.approx(0.0, abs=1e-6)),
        # sqrt(0.9 * 0.4) = 0.6: log(0.6 / 0.4).
        ("centerness", math.log(9), math.log(2 / 3), pytest.approx(math.log(1.5))),
        ("none", 1.25, None, pytest.approx(1.25)),  # the class logit itself
        ("none", 40.0, None, pytest.approx(13.8, abs=0.1)),  # a probability of 1 stays finite
    ],
)
def test_objectness_is_the_logit_of_the_score(quality, cls, ctr, expected):
    """One location at (4, 4) with the distances 1, 1/2, 2, 3 strides of 8."""
    generator = FCOSProposalGenerator(
        in_features=["p3"],
        strides=[8],
        head=FixedHead(cls, ctr),
        matcher=CenterSamplingMatcher(num_classes=1, radius=1.5, sizes_of_interest=[]),
        decoder=FCOSDecoder(),
        proposal_decoders=(FCOSDecoder(score_thresh=0.0), FCOSDecoder(score_thresh=0.0)),
        quality=quality,
    ).eval()
    images = ImageList(torch.zeros(1, 3, 8, 8), [(30, 18)])
    (proposals,), losses = generator(images, {"p3": torch.zeros(1, 1, 1, 1)})
    assert losses == {}
    assert proposals.objectness_logits.item() == expected
    assert proposals.proposal_boxes.tensor.tolist() == [[0.0, 0.0, 18.0, 28.0]]


class FixedHead(torch.nn.Module):
    def __init__(self, cls, ctr):
        super().__init__()
        self.output = (
            torch.tensor([[[cls]]]),
            torch.tensor([[[1.0, 0.5, 2.0, 3.0]]]),
            None if ctr is None else torch.tensor([[ctr]]),
        )

    def forward(self, maps):
        return self.output


def test_what_is_needed_for_proposals(rcnn_cfg):
    rcnn_cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    model = build_model(rcnn_cfg)
    with pytest.raises(ValueError, match="'instances' in each input"):
        model([{"image": torch.zeros(3, 64, 64)}])
    model.proposal_generator.proposal_decoders = None
    with pytest.raises(ValueError, match="has no proposal_decoders"):
        model.eval()([{"image": torch.zeros(3, 64, 64)}])


def test_the_generator_is_found_by_its_name(rcnn_cfg):
    shapes = build_model(rcnn_cfg).backbone.output_shape()
    generator = build_proposal_generator(rcnn_cfg, shapes)
    assert isinstance(generator, FCOSProposalGenerator) and isinstance(generator.head, FCOSHead)
