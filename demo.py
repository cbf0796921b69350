"""Answers questions about images with a trained MiniGPT-4.

python demo.py --cfg-path eval_configs/minigpt4_eval.yaml               # a web page
python demo.py --cfg-path … --terminal                                  # a chat in the terminal
python demo.py --cfg-path … --image image.jpg --ask "What is in it?"    # one answer
python demo.py --cfg-path … --batch FOLDER --out captions.jsonl         # many images
python demo.py --cfg-path … --api                                       # an OpenAI-compatible server
"""

import argparse
import logging
import os
import re
import socket
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from minigpt4.conversation.conversation import Chat
    from minigpt4.conversation.generation import GenerationOptions

QUESTION = "Describe this image in detail."
MODES = {"page": "the web page", "terminal": "--terminal", "question": "--ask", "batch": "--batch", "api": "--api"}
_SAMPLING = ("greedy", "temperature", "top_p", "num_beams", "max_new_tokens")
USED_BY = {  # flags that not every mode uses
    "image": ("terminal", "question"),
    "ask": ("question", "batch"),
    "out": ("batch",),
    **dict.fromkeys(("share", "feedback"), ("page",)),
    "batch_size": ("page", "batch", "api"),
    **dict.fromkeys(("max_batch_tokens", "max_queue", "host", "port", "allow_origin"), ("page", "api")),
    **dict.fromkeys(("api_key", "api_keys", "rate_limit", "allow_host", "allow_folder", "lm_url"), ("api",)),
    "shutdown_seconds": ("api",),
}


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message.removeprefix('argument ')}\n")


def _number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """A parser of numbers from ``low`` to ``high``."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low} to {high}.")
        return value

    return parse


def _text(pattern: str, complaint: str) -> Callable[[str], str]:
    """A parser of texts that match a pattern; the complaint about others is a format for their representation."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(complaint.format(repr(text)))
        return text

    return parse


def _folder(text: str) -> str:
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}.")
    return text


def parse_args() -> argparse.Namespace:
    """Parses and checks the command line, before anything heavy is imported; ``mode`` is one of ``MODES``."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, modes = parser.add_argument, parser.add_mutually_exclusive_group()
    seed, count = _number(int, 0, 2**63 - 1), _number(int, 1, 10_000)
    host = _text(r"[\w.-]+|[\da-fA-F.:]+", "{} is not a host name or an address.")
    source = r"([\w.-]+|\[[\da-fA-F.:]+\])(:\d{1,5})?|[\da-fA-F.:]+"
    allowed = _text(source, "{} is not a host name or an address, with or without a port.")
    question = _text(r"(?s).*\S.*", "the question is empty; write what you want to know.")
    add("--cfg-path", required=True, nargs="+", help="YAML file of the model; two for a page that compares them")
    add("--gpu-id", type=_number(int, 0, 1023), help="index of the accelerator; default: 0")
    add("--options", nargs="+", help="settings that override the file: model.ckpt=FILE …")
    add("--image", help="an image to start with, for --terminal and --ask")
    add("--ask", type=question, help="a question; its answer ends the program")
    modes.add_argument("--terminal", dest="mode", action="store_const", const="terminal", help="chat in the terminal")
    modes.add_argument(
        "--batch", help="folder, glob or table (.jsonl, .csv, .parquet) of images; the question is --ask"
    )
    add("--out", default="captions.jsonl", help=".jsonl, .csv or .parquet that --batch writes, or continues")
    add("--batch-size", type=count, help="questions answered together; default: 16 for --batch, at most 64 for --api")
    tokens = "tokens of the requests that the API answers together; default: what the free memory holds"
    add("--max-batch-tokens", type=_number(int, 1, 10**9), help=tokens)
    modes.add_argument("--api", dest="mode", action="store_const", const="api", help="serve /v1/chat/completions")
    text = "server of the language model (vLLM), which then is not loaded; its key: MINIGPT4_LM_API_KEY"
    add("--lm-url", type=_text(r"https?://\S+", "{} is no address such as http://127.0.0.1:8001/v1."), help=text)
    add("--host", type=host, default="127.0.0.1", help="address of page or API; 0.0.0.0 opens it to the network")
    add("--port", type=_number(int, 0, 65535), help="default: 7860 for the page, 8000 for the API; 0: any free port")
    add("--feedback", help="JSONL file to which the page's users can add ratings of answers, with their chats")
    add("--share", action="store_true", help="also open a public tunnel to the page")
    key = os.environ.get("MINIGPT4_API_KEY")
    add("--api-key", default=key, help="key that clients of the API must send; better set MINIGPT4_API_KEY")
    add("--api-keys", help="file of such keys, one per line, each with a name after it; read again when it changes")
    add("--rate-limit", type=count, help="requests per minute of each key, or of each address where there are no keys")
    add("--allow-origin", action="append", default=[], help="website whose pages may use page or API")
    add("--allow-host", type=allowed, action="append", default=[], help="HOST or HOST:PORT that the API may fetch from")
    add("--allow-folder", type=_folder, help="folder whose images the API's clients may name as file:///NAME")
    waiting = "requests of one client that may wait; of all clients four times as many"
    add("--max-queue", type=count, default=64, help=waiting)
    seconds = _number(int, 0, 86_400)
    add("--shutdown-seconds", type=seconds, default=5, help="time of running requests to the API after SIGTERM")
    # With --api, these are what requests get that do not say otherwise.
    add("--greedy", action="store_true", help="take the most likely token instead of sampling")
    add("--seed", type=seed, help="seed of sampling; default: 42, or another one for each request to the API")
    add("--temperature", type=_number(float, 0, 2), default=1.0)
    add("--top-p", type=_number(float, 0.01, 1), default=0.9)
    add("--num-beams", type=_number(int, 1, 32), default=1)
    add("--max-new-tokens", type=_number(int, 1, 1900), default=300)
    args = parser.parse_args()
    if args.batch is not None:
        args.mode = "batch"
    elif args.mode is None:
        args.mode = "page" if args.ask is None else "question"
    _check_combination(parser, args)
    if args.seed is None and args.mode != "api":
        args.seed = 42
    args.cfg_paths, args.cfg_path = args.cfg_path, args.cfg_path[0]
    return args


def _check_combination(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses flags that would have no effect."""
    if len(args.cfg_path) > (2 if args.mode == "page" else 1):
        parser.error("--cfg-path takes one file, or two for the web page, which then compares their answers.")
    for name in (name for name, value in vars(args).items() if name != "mode" and value != parser.get_default(name)):
        flag, modes = "--" + name.replace("_", "-"), USED_BY.get(name, MODES)
        if args.mode not in modes:
            others = " or ".join(MODES[mode] for mode in modes)
            parser.error(f"{flag} has no effect with {MODES[args.mode]}; it is for {others}.")
        if args.greedy and args.mode != "page" and name in ("temperature", "top_p"):
            parser.error(f"{flag} has no effect with --greedy, which does not sample; leave one of them out.")
        if args.lm_url and name in ("max_batch_tokens", "num_beams"):
            parser.error(f"{flag} is not for a language model on a server; leave it out with --lm-url.")


def open_socket(args: argparse.Namespace, default_port: int) -> socket.socket:
    """Checks who may use the server and opens its socket, before the model is loaded, which takes minutes."""
    from minigpt4.serve.access import parse_origin
    from minigpt4.serve.clients import ApiKeys
    from minigpt4.serve.server import listen

    for origin in args.allow_origin:
        parse_origin(origin)
    if args.mode == "api":
        ApiKeys(args.api_key, args.api_keys)
    return listen(args.host, default_port if args.port is None else args.port)


def build_chat(args: argparse.Namespace) -> "Chat":
    """Reads the configuration, loads the model and returns the chat."""
    from minigpt4.common import device as devices
    from minigpt4.common.config import Config
    from minigpt4.common.errors import UserError
    from minigpt4.common.registry import registry
    from minigpt4.common.schema import ModelConfig, RunConfig, read_section
    from minigpt4.common.templates import choose_template
    from minigpt4.conversation.conversation import Chat
    from minigpt4.models.lora import merge_lora
    from minigpt4.processors import eval_image_processor

    cfg = Config(args).check()
    run_cfg = read_section(RunConfig, cfg.config.get("run"), "run")
    device = devices.pick(run_cfg.device, args.gpu_id or 0, run_cfg.strict_device)
    if args.gpu_id not in (None, device.index or 0):
        text = f"--gpu-id is {args.gpu_id}, but run.device is {run_cfg.device} and the model would run on {device}"
        raise UserError(f"{text}; leave --gpu-id out, or give another run.device.")
    devices.seed_everything(42 if args.seed is None else args.seed)
    more = {"has_language_model": False} if getattr(args, "lm_url", None) else {}
    model = registry.get_model_class(cfg.model_cfg.arch).from_config(cfg.model_cfg, device=device, **more)
    if getattr(model, "lora", None):  # models of another arch have none
        merge_lora(model.llama_model, model.lora)
    if not cfg.model_cfg.get("ckpt"):
        logging.warning("model.ckpt is not set: answers come from an untrained projection, so they ignore the image.")
    template = choose_template(read_section(ModelConfig, cfg.model_cfg, "model"), model.llama_tokenizer)
    return Chat(model, eval_image_processor(cfg), device, template=template)


def generation_options(args: argparse.Namespace) -> "GenerationOptions":
    """The options that the command line selects."""
    from minigpt4.conversation.generation import GenerationOptions

    names = ("temperature", "top_p", "num_beams", "max_new_tokens", "seed")
    return GenerationOptions(do_sample=not args.greedy, **{name: getattr(args, name) for name in names})


def describe_model(args: argparse.Namespace, chat: "Chat") -> str:
    """Name, device and precision of the model in one line."""
    from minigpt4.models.quantization import precision_name

    return f"{Path(args.cfg_path).stem} · {chat.device} · LM {precision_name(chat.model.llama_model)}"


def run_batch(args: argparse.Namespace) -> None:
    """Answers questions about many images; exit status 1 if all rows have an error."""
    from minigpt4.common.config import Config
    from minigpt4.serve.batch import answer_questions, describe_settings, find_questions
    from minigpt4.serve.batch_output import BatchOutput

    questions = find_questions(args.batch, args.ask or QUESTION)
    names = ("greedy", "temperature", "top_p", "num_beams", "max_new_tokens", "seed")
    flags = {name: getattr(args, name) for name in names}
    settings = describe_settings(Config(args).check().to_dict()["model"], flags)
    # An error of the output is reported before the model is loaded.
    with closing(BatchOutput(Path(args.out), [question.row for question in questions], settings)) as output:
        if len(output) < len(questions):
            answer_questions(build_chat(args), questions, output, generation_options(args), args.batch_size or 16)
        num_errors = output.num_errors
    print(f"{len(questions)} rows in {args.out}, {num_errors} of them with an error.")
    if num_errors == len(questions) > 0:
        sys.exit(1)


def run_api(args: argparse.Namespace) -> None:
    """Serves the API until it is interrupted."""
    from minigpt4.serve.api import build_app
    from minigpt4.serve.api_requests import Limits
    from minigpt4.serve.engine import Engine
    from minigpt4.serve.remote_lm import LanguageModelServer, RemoteBatch
    from minigpt4.serve.server import address, serve

    listener = open_socket(args, 8000)
    folder = Path(args.allow_folder) if args.allow_folder else None
    limits, name = Limits(allowed_hosts=args.allow_host, allowed_folder=folder), Path(args.cfg_path).stem
    limits.max_tokens = max(limits.max_tokens, args.max_new_tokens)
    server = LanguageModelServer(args.lm_url, os.environ.get("MINIGPT4_LM_API_KEY")) if args.lm_url else None
    chat, settings = build_chat(args), (args.batch_size or 64, args.max_queue)
    batch = RemoteBatch(chat, server) if server else None
    engine = Engine(chat, *settings, max_batch_tokens=args.max_batch_tokens, batch=batch)
    access = (args.api_key, args.host, args.allow_origin, args.api_keys, args.rate_limit)
    app = build_app(engine, name, limits, *access, generation_options(args))
    print(f"Model '{name}' at {address(listener)}/v1", flush=True)
    try:
        serve(app, listener, args.shutdown_seconds)
    finally:
        engine.close(timeout_seconds=2)


def run_terminal(args: argparse.Namespace) -> None:
    """Chats in the terminal."""
    from minigpt4.common.images import read_image
    from minigpt4.serve.terminal import terminal_chat

    if args.image:  # before the model is loaded
        read_image(args.image)
    read, is_interactive = input, sys.stdin.isatty()
    if is_interactive and sys.stdout.isatty():
        from minigpt4.serve.line_editor import line_editor

        read = line_editor()
    chat = build_chat(args)
    sys.stdin.reconfigure(errors="replace")  # what is not UTF-8 is a question like any other
    terminal_chat(chat, generation_options(args), args.image, read, is_interactive)


def run_question(args: argparse.Namespace) -> None:
    """Prints the answer to one question."""
    from minigpt4.common.images import read_image
    from minigpt4.serve.terminal import write_answer

    image = read_image(args.image) if args.image else None  # before the model is loaded, which takes minutes
    chat = build_chat(args)
    conv, images = chat.template.copy(), []
    if image:
        chat.upload_img(image, conv, images)
    chat.ask(args.ask, conv)
    write_answer(chat, conv, images, generation_options(args))


def run_page(args: argparse.Namespace) -> None:
    """Serves the web page until it is interrupted."""
    from minigpt4.common.config import Config
    from minigpt4.serve.engine import Engine
    from minigpt4.serve.page_answers import PageModel
    from minigpt4.serve.page_chat import check_writable
    from minigpt4.serve.page_examples import find_examples
    from minigpt4.serve.server import address, serve
    from minigpt4.serve.web import build_app, open_tunnel

    listener = open_socket(args, 7860)
    feedback = check_writable(Path(args.feedback)) if args.feedback else None
    tunnels, models = [open_tunnel(listener)] if args.share else [], []
    for path in reversed(args.cfg_paths):  # the first one's images are the examples
        args.cfg_path = path
        chat, is_unique = build_chat(args), len({Path(other).stem for other in args.cfg_paths}) == len(args.cfg_paths)
        engine = Engine(chat, args.batch_size or 64, args.max_queue, max_batch_tokens=args.max_batch_tokens)
        models.insert(0, PageModel(engine, Path(path).stem if is_unique else path, describe_model(args, chat)))
    origins = args.allow_origin + tunnels
    app = build_app(models, generation_options(args), find_examples(Config(args).config), args.host, origins, feedback)
    names = " and ".join(f"'{model.name}'" for model in models)
    print(f"Model {names} at {' and '.join([address(listener), *tunnels])}", flush=True)
    try:
        serve(app, listener, grace_seconds=1, max_connections=1000)  # each open page holds one
    finally:
        for model in models:
            model.engine.close(timeout_seconds=2)


def main() -> None:
    """Runs the mode that the command line selects."""
    args = parse_args()
    try:
        from minigpt4.common.errors import UserError
    except ImportError as error:  # a package is missing; the message names it
        sys.exit(f"error: {error}")
    from minigpt4.common.device import explain_out_of_memory
    from minigpt4.common.logger import setup_logger

    setup_logger()
    runs = {"page": run_page, "terminal": run_terminal, "question": run_question, "batch": run_batch, "api": run_api}
    try:
        runs[args.mode](args)
    except UserError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:  # without the extra "serve", which page, API and terminal need
        if str(error.name).startswith("minigpt4"):
            raise
        sys.exit(f"error: {error}; in a checkout: pip install '.[serve]', or -r requirements.txt.")
    except RuntimeError as error:
        keys = {"batch": "--batch-size", "api": "--max-batch-tokens", "page": "--max-batch-tokens"}
        key = keys.get(args.mode, "--num-beams or --max-new-tokens")
        if message := explain_out_of_memory(error, key):
            sys.exit(f"error: {message}")
        raise
    except BrokenPipeError:  # "| head" has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
