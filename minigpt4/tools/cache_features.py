"""Computes the feature cache of a run in advance; it can be interrupted and resumed.

torchrun --nproc-per-node 4 -m minigpt4.tools.cache_features --cfg-path FILE.yaml --options run.feature_cache=DIR
"""

import argparse


def main() -> None:
    """Computes the missing features of all data sets; train.py with the same options then trains from the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="YAML file of the run")
    parser.add_argument("--options", nargs="+", help="settings that override the file: run.feature_cache=DIR …")
    args = parser.parse_args()
    from minigpt4.common import dist_utils
    from minigpt4.common.config import Config
    from minigpt4.common.errors import UserError
    from minigpt4.common.logger import setup_logger
    from minigpt4.common.schema import RunConfig, read_section
    from minigpt4.tasks import setup_task

    try:
        setup_logger()
        cfg = Config(args).check()
        run_cfg = read_section(RunConfig, cfg.run_cfg, "run")
        if not run_cfg.feature_cache:
            raise UserError("run.feature_cache is not set; set it to the folder of the cache.")
        device = dist_utils.init_distributed_mode(run_cfg)
        setup_logger()
        setup_task(cfg, device).build_datasets(cfg)
        dist_utils.shutdown()
    except UserError as error:
        dist_utils.abort(str(error))


if __name__ == "__main__":
    main()
