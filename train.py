"""Trains MiniGPT-4.

python train.py --cfg-path train_configs/minigpt4_stage1_pretrain.yaml
torchrun --nproc-per-node 4 train.py --cfg-path FILE.yaml --options run.max_epoch=2
"""

import argparse
import sys


def parse_args() -> argparse.Namespace:
    """The command line; parsed before anything heavy is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="YAML file of the run")
    parser.add_argument("--options", nargs="+", help="settings that override the file: run.max_epoch=2 …")
    return parser.parse_args()


def main() -> None:
    """Configuration, process group, task, data, model, runner; one of several processes ends here."""
    args = parse_args()
    try:
        from minigpt4.common.errors import UserError
    except ImportError as error:  # an installation that lacks something says what
        sys.exit(f"error: {error}")
    from minigpt4.common import device as devices
    from minigpt4.common import dist_utils
    from minigpt4.common.config import Config
    from minigpt4.common.logger import setup_logger
    from minigpt4.common.registry import registry
    from minigpt4.common.utils import now
    from minigpt4.doctor import check_language_model
    from minigpt4.tasks import setup_task

    try:
        setup_logger()
        cfg = Config(args).check()
        dist_utils.init_distributed_mode(cfg.run_cfg)
        dist_utils.assert_same_config(cfg.to_dict())
        setup_logger()  # again: now the ranks are known
        devices.seed_everything(int(cfg.run_cfg.get("seed", 42)) + dist_utils.get_rank())
        cfg.pretty_print()
        task = setup_task(cfg)
        datasets = task.build_datasets(cfg)
        model = task.build_model(cfg)
        check_language_model(model)
        runner_class = registry.get_runner_class(cfg.run_cfg.get("runner", "runner_base"))
        runner_class(
            cfg=cfg, job_id=dist_utils.broadcast_object(now()), task=task, model=model, datasets=datasets
        ).train()
    except UserError as error:
        dist_utils.abort(str(error))
    except RuntimeError as error:
        if lost := dist_utils.explain_lost_peer(error):
            dist_utils.abort(lost)
        if lacking := devices.explain_out_of_memory(error, "run.batch_size_train"):
            dist_utils.abort(lacking)
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        dist_utils.shutdown()


if __name__ == "__main__":
    main()
