"""Train or evaluate FCOS: python train_net.py --config-file configs/FCOS_R50_VOC.yaml [...]."""

from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm

from fcos_d2.engine import Trainer, evaluate, setup
from fcos_d2.visualization import plot_run


def main(args):
    """Run on one rank, with Detectron2's own arguments."""
    cfg = setup(args)
    if args.eval_only:
        results = evaluate(cfg, resume=args.resume)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
    if comm.is_main_process():
        for path in plot_run(cfg.OUTPUT_DIR):
            print(f"Wrote {path}")
    return results


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
