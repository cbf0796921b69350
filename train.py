"""Trains MiniGPT-4.

python train.py --cfg-path train_configs/minigpt4_stage1_pretrain.yaml
torchrun --nproc-per-node 4 train.py --cfg-path FILE.yaml --options run.max_epoch=2
"""

import argparse
import sys


def parse_args() -> argparse.Namespace:
    """Parses the command line, before anything slow is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="YAML file of the run")
    parser.add_argument("--options", nargs="+", help="settings that override the file: run.max_epoch=2 …")
    return parser.parse_args()


def train(args: argparse.Namespace) -> None:
    """Configuration → device and process group → task → data sets and model → runner."""
    from minigpt4.common import device as devices
    from minigpt4.common import dist_utils
    from minigpt4.common.config import Config
    from minigpt4.common.logger import setup_logger
    from minigpt4.common.registry import registry
    from minigpt4.common.schema import RunConfig, read_section
    from minigpt4.common.utils import now
    from minigpt4.doctor.language import check_language_model
    from minigpt4.runners.run_folder import check_output_dir
    from minigpt4.tasks import setup_task

    setup_logger()
    cfg = Config(args).check()
    run_cfg = read_section(RunConfig, cfg.run_cfg, "run")
    device = dist_utils.init_distributed_mode(run_cfg)
    setup_logger()  # again, as the rank is known now
    dist_utils.assert_same_config(cfg.to_dict())
    check_output_dir(run_cfg)
    devices.seed_everything(run_cfg.seed + dist_utils.get_rank())
    cfg.pretty_print()

    task = setup_task(cfg, device)
    datasets = task.build_datasets(cfg)
    model = task.build_model(cfg)
    check_language_model(model)

    runner_class = registry.get_runner_class(run_cfg.runner)
    job_id = dist_utils.broadcast_object(now())
    runner_class(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets).train()
    dist_utils.shutdown()


def main() -> None:
    """Trains as the command line says; an error that the user can correct is one line."""
    args = parse_args()
    try:
        from minigpt4.common import device as devices
        from minigpt4.common import dist_utils
        from minigpt4.common.errors import UserError
    except ImportError as error:
        sys.exit(f"error: {error}")
    try:
        train(args)
    except UserError as error:
        dist_utils.abort(str(error))
    except RuntimeError as error:
        keys = "run.batch_size_train or run.batch_size_eval"
        known = dist_utils.explain_lost_peer(error) or devices.explain_out_of_memory(error, keys)
        if known is None:
            raise
        dist_utils.abort(known)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
