"""Train or evaluate FCOS: python train_net.py --config-file configs/FCOS_R50_VOC.yaml [...].

In several processes: --num-gpus N, or torchrun --nproc-per-node N train_net.py ...
Evaluate faster: --eval-only ... MODEL.WEIGHTS FILE TEST.OPTIMIZE bfloat16+compile
With test-time augmentation: --eval-only ... TEST.AUG.ENABLED True
"""

from fcos_d2.engine import Trainer, default_argument_parser, evaluate, launch, setup


def main(args):
    """Train or evaluate on one rank."""
    cfg = setup(args)
    if args.eval_only:
        return evaluate(cfg, resume=args.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    launch(main, default_argument_parser().parse_args())
