"""Answers the questions of benchmarks and scores them; see docs/EVALUATION.md.

python evaluate.py --cfg-path eval_configs/benchmarks.yaml --dataset pope,gqa
torchrun --nproc-per-node 8 evaluate.py --cfg-path …     # the questions are split over processes
python evaluate.py --cfg-path … --api-url http://127.0.0.1:8000/v1
python evaluate.py --cfg-path … --dataset pope --score-only answers.jsonl
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from minigpt4.common.config import Config
    from minigpt4.evaluation.answering import Answerer


def parse_args() -> argparse.Namespace:
    """Parses the command line, before anything slow is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cfg-path", required=True, help="YAML file with the sections model and evaluation_datasets")
    add("--options", nargs="+", help="settings that override the file: model.ckpt=FILE …")
    add("--dataset", help="names of evaluation_datasets, with commas between them; default: all")
    add("--out", help="folder of answers and results; default: run.save_path, or output/evaluation/NAME_OF_THE_FILE")
    add("--resample", action="store_true", help="RefCOCO: ask again where an answer has no box, as the reference can")
    add("--score-only", help="answers of another program to one benchmark's split, which are scored")
    add("--api-url", help="address of an OpenAI-compatible server that answers in place of the model")
    add("--api-model", help="name of the model on that server; default: its only one")
    add("--api-stop", help="text at which that server's answers end, and are cut if it leaves it there: '###'")
    add("--gpu-id", type=int, help="index of the accelerator; default: 0, or that of the process")
    args = parser.parse_args()
    if args.score_only and args.api_url:
        parser.error("--score-only asks nobody; leave --api-url out.")
    for name in ("api_model", "api_stop"):
        if getattr(args, name) and not args.api_url:
            parser.error(f"--{name.replace('_', '-')} has no effect without --api-url.")
    return args


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Reads the questions, has them answered, and scores them; returns the rows of the table."""
    from minigpt4.common import dist_utils
    from minigpt4.common.config import Config
    from minigpt4.common.errors import UserError
    from minigpt4.common.files import refuse_placeholder
    from minigpt4.common.logger import setup_logger
    from minigpt4.common.schema import RunConfig, read_section
    from minigpt4.evaluation.answering import Server
    from minigpt4.evaluation.tasks import answer, find_work, score_all

    setup_logger()
    cfg = Config(args).check()
    run_cfg = read_section(RunConfig, cfg.run_cfg, "run")
    if not args.out:
        refuse_placeholder(run_cfg.save_path or "", "run.save_path", "the folder for answers and results")
    out = Path(args.out or run_cfg.save_path or Path("output/evaluation") / Path(args.cfg_path).stem)
    work = find_work(cfg, args.dataset, needs_images=not args.score_only)
    for part in work if args.api_url else ():
        Server.check(part.name, part.items, part.section)
    if args.resample and not any(part.benchmark.ask_again for part in work):
        raise UserError("--resample asks again about boxes, of which no benchmark here asks; leave it out.")
    if not args.score_only:
        device = dist_utils.init_distributed_mode(run_cfg)
        setup_logger()  # again, as the rank is known now
        settings, build = answerer(args, cfg, device)
        answer(work, out, settings, build, args.resample)
        dist_utils.gather_objects(None)  # waits until all questions have answers
    rows = dist_utils.run_on_main(lambda: score_all(work, out, args.score_only))
    dist_utils.shutdown()
    return rows


def answerer(
    args: argparse.Namespace, cfg: "Config", device: "torch.device"
) -> tuple[dict[str, Any], Callable[[], tuple["Answerer", dict[str, Any]]]]:
    """What answers depend on as far as it is known before the model is loaded, and a function that loads it."""
    from minigpt4.serve.batch import describe_settings

    if args.api_url:
        settings = {"api_url": args.api_url, "api_stop": args.api_stop}
        settings |= {"api_model": args.api_model} if args.api_model else {}  # else known once the server is asked
        return settings, lambda: _server(args, cfg.to_dict()["model"].get("end_sym", ""))
    args.gpu_id, args.seed = device.index if args.gpu_id is None else args.gpu_id, 0
    return describe_settings(cfg.to_dict()["model"], {}), lambda: _local_model(args)


def _server(args: argparse.Namespace, end_sym: str) -> tuple["Answerer", dict[str, Any]]:
    """The server, and the name of the model that answers there."""
    from minigpt4.evaluation.answering import Server

    key = os.environ.get("MINIGPT4_API_KEY")
    server = Server(args.api_url, args.api_model, key, args.api_stop, end_sym)
    return server, {"api_model": server.model}


def _local_model(args: argparse.Namespace) -> tuple["Answerer", dict[str, Any]]:
    """The model of this process with its precision and the form of its prompts."""
    if __package__:  # as pip installs it
        from .demo import build_chat, describe_model
    else:
        from demo import build_chat, describe_model
    from minigpt4.evaluation.answering import LocalModel

    chat = build_chat(args)
    conv = chat.template.copy()
    conv.ask_with_images("<ImageHere>{question}")
    conv.append_message(conv.roles[1], None)
    precision = describe_model(args, chat).rpartition("LM ")[2]
    return LocalModel(chat), {"device": chat.device.type, "precision": precision, "template": conv.get_prompt()}


def main() -> None:
    """Evaluates as the command line says; an error that the user can correct is one line."""
    args = parse_args()
    try:
        from minigpt4.common import device as devices
        from minigpt4.common import dist_utils
        from minigpt4.common.errors import UserError
    except ImportError as error:
        sys.exit(f"error: {error}")
    try:
        rows = evaluate(args)
        if int(os.environ.get("RANK", 0)) == 0:
            from minigpt4.evaluation.report import table

            print(table(rows))
            if all(row["errors"] == row["rows"] for row in rows):
                sys.exit(1)  # as of --batch
    except UserError as error:
        dist_utils.abort(str(error))
    except RuntimeError as error:
        known = dist_utils.explain_lost_peer(error) or devices.explain_out_of_memory(error, "batch_size")
        if known is None:
            raise
        dist_utils.abort(known)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
