"""Answers questions about images with a trained MiniGPT-4.

python demo.py --cfg-path eval_configs/minigpt4_eval.yaml               # a web page
python demo.py --cfg-path … --terminal                                  # a chat in the terminal
python demo.py --cfg-path … --image image.jpg --ask "What is in it?"    # one answer
python demo.py --cfg-path … --batch FOLDER --out captions.jsonl         # many images
python demo.py --cfg-path … --api                                       # an OpenAI-compatible server
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minigpt4.conversation.conversation import Chat
    from minigpt4.conversation.generation import GenerationOptions

QUESTION = "Describe this image in detail."


def parse_args() -> argparse.Namespace:
    """Parses the command line, before anything heavy is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="YAML file of the model")
    parser.add_argument("--gpu-id", type=int, default=0, help="index of the accelerator")
    parser.add_argument("--options", nargs="+", help="settings that override the file: model.ckpt=FILE …")
    parser.add_argument("--image", help="an image to start with")
    parser.add_argument("--ask", help="one question; the answer is printed and the program ends")
    parser.add_argument("--terminal", action="store_true", help="chat in the terminal")
    parser.add_argument("--batch", help="folder, glob or JSONL file of images to describe; the question is --ask")
    parser.add_argument("--out", default="captions.jsonl", help="output of --batch; an incomplete file is continued")
    parser.add_argument("--batch-size", type=int, default=16, help="images or requests that are answered together")
    parser.add_argument("--api", action="store_true", help="serve /v1/chat/completions")
    parser.add_argument("--host", default="127.0.0.1", help="address of page or API; 0.0.0.0 opens it to the network")
    parser.add_argument("--port", type=int, help="default: 7860 for the page, 8000 for the API")
    parser.add_argument("--share", action="store_true", help="also open a public tunnel to the page")
    key = os.environ.get("MINIGPT4_API_KEY")
    parser.add_argument(
        "--api-key", default=key, help="key that clients of the API must send; better set MINIGPT4_API_KEY"
    )
    parser.add_argument("--allow-origin", action="append", default=[], help="website whose pages may use page or API")
    parser.add_argument("--allow-host", action="append", default=[], help="host that the API may fetch images from")
    parser.add_argument("--allow-folder", help="folder whose images the API's clients may name as file:///NAME")
    parser.add_argument("--max-queue", type=int, default=64, help="requests that may wait for the API")
    parser.add_argument("--greedy", action="store_true", help="take the most likely token instead of sampling")
    parser.add_argument("--seed", type=int, default=42, help="seed of sampling")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=300)
    return parser.parse_args()


def check_server(args: argparse.Namespace) -> None:
    """Raises UserError for settings of a server that would otherwise be refused after the model is loaded."""
    from minigpt4.serve.access import check_api_key, parse_origin

    for origin in args.allow_origin:
        parse_origin(origin)
    if args.api:
        check_api_key(args.api_key)


def build_chat(args: argparse.Namespace) -> "Chat":
    """Reads the configuration, loads the model and returns the chat."""
    from minigpt4.common import device as devices
    from minigpt4.common.config import Config
    from minigpt4.common.registry import registry
    from minigpt4.common.schema import ModelConfig, RunConfig, read_section
    from minigpt4.conversation.conversation import Chat
    from minigpt4.conversation.templates import choose_template
    from minigpt4.processors import eval_image_processor

    cfg = Config(args).check()
    run_cfg = read_section(RunConfig, cfg.config.get("run"), "run")
    device = devices.pick(run_cfg.device, args.gpu_id, run_cfg.strict_device)
    devices.seed_everything(args.seed)
    model = registry.get_model_class(cfg.model_cfg.arch).from_config(cfg.model_cfg, device=device)
    template = choose_template(read_section(ModelConfig, cfg.model_cfg, "model"), model.llama_tokenizer)
    return Chat(model, eval_image_processor(cfg), device, template=template)


def generation_options(args: argparse.Namespace) -> "GenerationOptions":
    """The options that the command line selects."""
    from minigpt4.conversation.generation import GenerationOptions

    return GenerationOptions(
        do_sample=not args.greedy,
        temperature=args.temperature,
        top_p=args.top_p,
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )


def describe_model(args: argparse.Namespace, chat: "Chat") -> str:
    """Name, device and precision of the model in one line."""
    lm = next(chat.model.llama_model.parameters())
    layers = {type(module).__name__ for module in chat.model.llama_model.modules()}
    precision = "8 bit" if "Int8Linear" in layers else str(lm.dtype).removeprefix("torch.")
    return f"{Path(args.cfg_path).stem} · {chat.device} · LM {precision}"


def run_batch(args: argparse.Namespace, chat: "Chat") -> None:
    """Describes many images."""
    from minigpt4.serve.batch import answer_questions, find_questions

    questions = find_questions(args.batch, args.ask or QUESTION)
    num_errors = answer_questions(chat, questions, Path(args.out), generation_options(args), args.batch_size)
    print(f"{len(questions)} rows in {args.out}, {num_errors} of them with an error.")


def run_api(args: argparse.Namespace, chat: "Chat") -> None:
    """Serves the API until it is interrupted."""
    from minigpt4.serve.api import build_app, serve
    from minigpt4.serve.api_requests import Limits
    from minigpt4.serve.engine import Engine

    folder = Path(args.allow_folder) if args.allow_folder else None
    limits = Limits(allowed_hosts=args.allow_host, allowed_folder=folder)
    name, port = Path(args.cfg_path).stem, args.port or 8000
    engine = Engine(chat, args.batch_size, args.max_queue)
    app = build_app(engine, name, limits, args.api_key, args.host, args.allow_origin)
    print(f"Model '{name}' at http://{args.host}:{port}/v1", flush=True)
    serve(app, args.host, port)


def run_terminal(args: argparse.Namespace, chat: "Chat") -> None:
    """Chats in the terminal."""
    from minigpt4.serve.terminal import terminal_chat

    terminal_chat(chat, generation_options(args), args.image, is_interactive=sys.stdin.isatty())


def run_question(args: argparse.Namespace, chat: "Chat") -> None:
    """Prints the answer to one question."""
    from minigpt4.common.errors import UserError
    from minigpt4.serve.terminal import write_answer

    if not args.ask.strip():
        raise UserError("--ask: the question is empty; write what you want to know.")
    conv, images = chat.template.copy(), []
    if args.image:
        chat.upload_img(args.image, conv, images)
    chat.ask(args.ask, conv)
    write_answer(chat, conv, images, generation_options(args))


def run_page(args: argparse.Namespace, chat: "Chat") -> None:
    """Serves the web page until it is interrupted."""
    from minigpt4.serve.web import serve

    examples = sorted(Path("output/quickstart/held_out/image").glob("[0-5].jpg"))
    options, description = generation_options(args), describe_model(args, chat)
    serve(chat, description, options, args.host, args.port or 7860, args.share, examples)


def main() -> None:
    """Builds the chat and runs the mode that the command line selects."""
    args = parse_args()
    try:
        from minigpt4.common.errors import UserError
    except ImportError as error:  # a package is missing; the message names it
        sys.exit(f"error: {error}")
    from minigpt4.common.device import explain_out_of_memory
    from minigpt4.common.logger import setup_logger

    setup_logger()
    modes = [(args.batch, run_batch), (args.api, run_api), (args.terminal, run_terminal), (args.ask, run_question)]
    run = next((run for selected, run in modes if selected not in (None, False)), run_page)
    try:
        if run in (run_api, run_page):
            check_server(args)
        run(args, build_chat(args))
    except UserError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if message := explain_out_of_memory(error, "--batch-size"):
            sys.exit(f"error: {message}")
        raise
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
