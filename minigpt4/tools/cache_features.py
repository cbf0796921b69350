"""Computes the features of a run's pictures ahead, with a progress bar; what is there already is kept.

torchrun --nproc-per-node 4 -m minigpt4.tools.cache_features --cfg-path FILE.yaml --options run.feature_cache=DIR
"""

import argparse


def main() -> None:
    """Configuration, process group, data sets; train.py with the same options then trains from the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="YAML file of the run")
    parser.add_argument("--options", nargs="+", help="settings that override the file: run.feature_cache=DIR …")
    args = parser.parse_args()
    from minigpt4.common import dist_utils
    from minigpt4.common.config import Config
    from minigpt4.common.errors import UserError
    from minigpt4.common.logger import setup_logger
    from minigpt4.tasks import setup_task

    try:
        setup_logger()
        cfg = Config(args).check()
        if not cfg.run_cfg.get("feature_cache"):
            raise UserError("run.feature_cache is not set; give it the folder of the cache.")
        dist_utils.init_distributed_mode(cfg.run_cfg)
        setup_logger()
        setup_task(cfg).build_datasets(cfg)
    except UserError as error:
        dist_utils.abort(str(error))
    else:
        dist_utils.shutdown()


if __name__ == "__main__":
    main()
