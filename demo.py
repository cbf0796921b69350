"""Talks about pictures with a trained MiniGPT-4.

python demo.py --cfg-path eval_configs/minigpt4_eval.yaml --image picture.jpg --ask "What is in it?"
python demo.py --cfg-path eval_configs/minigpt4_eval.yaml                 # a chat in the terminal
"""

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt4.conversation.conversation import Chat

HELP = "/image PATH shows a picture, /reset starts anew, /help tells this, an empty line or end of input leaves."


def parse_args() -> argparse.Namespace:
    """The command line; parsed before anything heavy is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="YAML file of the model")
    parser.add_argument("--gpu-id", type=int, default=0, help="which accelerator, where there are several")
    parser.add_argument("--options", nargs="+", help="settings that override the file: model.ckpt=FILE …")
    parser.add_argument("--image", help="a picture to start with")
    parser.add_argument("--ask", help="one question; the answer is printed and the program ends")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token, instead of drawing")
    parser.add_argument("--seed", type=int, default=42, help="of drawing")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=300)
    return parser.parse_args()


def build_chat(args: argparse.Namespace) -> "Chat":
    """Configuration, device, model, image processor, chat."""
    from minigpt4.common import device as devices
    from minigpt4.common.config import Config
    from minigpt4.common.registry import registry
    from minigpt4.conversation.conversation import Chat

    cfg = Config(args).check()
    run_cfg = cfg.config.get("run") or {}
    device = devices.pick(run_cfg.get("device", "auto"), args.gpu_id)
    devices.seed_everything(args.seed)
    model = registry.get_model_class(cfg.model_cfg.arch).from_config(cfg.model_cfg, device=device)
    return Chat(model, image_processor(cfg), device)


def image_processor(cfg: Any) -> Any:
    """The image processor of the first data set: its ``eval`` one, else a deterministic one of the same size."""
    from minigpt4.datasets.builders import BaseDatasetBuilder

    sections = list((cfg.config.get("datasets") or {}).values())
    default = {"vis_processor": {"train": {"name": "blip2_image_eval", "image_size": cfg.model_cfg.image_size}}}
    return BaseDatasetBuilder(sections[0] if sections else default).vis_processor("eval")


def answer_options(args: argparse.Namespace) -> dict[str, Any]:
    """How to answer, as ``Chat.answer`` takes it."""
    return {
        "do_sample": not args.greedy,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "num_beams": args.num_beams,
        "max_new_tokens": args.max_new_tokens,
    }


def terminal_chat(chat: "Chat", args: argparse.Namespace) -> None:
    """Reads questions and commands from standard input until it ends."""
    from minigpt4.common.errors import UserError
    from minigpt4.conversation.conversation import CONV_VISION

    is_person = sys.stdin.isatty()
    conv, images = CONV_VISION.copy(), []
    if args.image:
        chat.upload_img(args.image, conv, images)
    if is_person:
        print(HELP)
    while True:
        try:
            line = input("> " if is_person else "").strip()
        except EOFError:
            return
        if not line:
            return
        command, _, rest = line.partition(" ")
        before = conv.copy(), list(images)
        try:
            if command == "/image":
                print(chat.upload_img(rest.strip(), conv, images))
            elif command == "/reset":
                conv, images = CONV_VISION.copy(), []
            elif command == "/help":
                print(HELP)
            else:
                chat.ask(line, conv)
                print(chat.answer(conv, images, **answer_options(args))[0], flush=True)
        except UserError as error:
            conv, images = before  # a refused question leaves no trace in the chat
            print(f"error: {error}", file=sys.stderr, flush=True)


def main() -> None:
    """One answer, or a chat."""
    args = parse_args()
    from minigpt4.common.errors import UserError
    from minigpt4.common.logger import setup_logger
    from minigpt4.conversation.conversation import CONV_VISION

    setup_logger()
    try:
        chat = build_chat(args)
        if args.ask is None:
            terminal_chat(chat, args)
            return
        conv, images = CONV_VISION.copy(), []
        if args.image:
            chat.upload_img(args.image, conv, images)
        chat.ask(args.ask, conv)
        print(chat.answer(conv, images, **answer_options(args))[0])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
