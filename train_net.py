"""Train or evaluate FCOS: python train_net.py --config-file configs/FCOS_R50_VOC.yaml [...].

In several processes: --num-gpus N, or torchrun --nproc-per-node N train_net.py ...
Evaluate faster: --eval-only ... MODEL.WEIGHTS FILE TEST.OPTIMIZE bfloat16[+compile]
More views of each image: --eval-only ... TEST.AUG.ENABLED True
"""

import logging

from detectron2.engine import default_argument_parser
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm

from fcos_d2.engine import Trainer, evaluate, launch, setup
from fcos_d2.visualization.report import write_report


def main(args):
    """Run on one rank, with Detectron2's own arguments."""
    cfg = setup(args)
    if not args.eval_only:
        return train(cfg, args.resume)
    results = evaluate(cfg, resume=args.resume)
    draw(cfg.OUTPUT_DIR)
    return results


def train(cfg, resume):
    """Train and draw: after each evaluation, and where something else ends the training."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.register_hooks([EvalHook(cfg.TEST.EVAL_PERIOD, lambda: draw(cfg.OUTPUT_DIR))])
    try:
        results = trainer.train()
    except (Exception, KeyboardInterrupt) as error:
        draw(cfg.OUTPUT_DIR)
        if isinstance(error, FloatingPointError):  # every rank has it; the first to end ends all
            comm.synchronize()
        raise
    if results is None:  # nothing was left to train, so there was no evaluation
        draw(cfg.OUTPUT_DIR)
    return results


def draw(output_dir):
    """Draw the run's pictures and report; a failure takes no result away."""
    if not comm.is_main_process():
        return
    try:
        for path in write_report(output_dir):
            print(f"Wrote {path}")
    except Exception:
        logging.getLogger("fcos_d2").exception("The report of %s can't be made:", output_dir)


if __name__ == "__main__":
    launch(main, default_argument_parser().parse_args())
