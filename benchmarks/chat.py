"""What the prefix cache and batches gain in chats, and whether memory grows, as a table and a line of JSON.

python -m benchmarks.chat                                                         # random weights of preset small
python -m benchmarks.chat --cfg-path eval_configs/minigpt4_eval.yaml              # another model
"""

import argparse
import gc
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import hardware
from benchmarks.models import PRESETS, ROOT, build_minigpt4
from minigpt4.common import device as devices
from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Chat
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.models.llama_tokenizer import load_tokenizer
from minigpt4.processors import Blip2ImageEvalProcessor

QUESTION = "Describe this image in detail."
NUM_TOKENS = 40
ANSWER = (
    "The picture shows three objects. A large purple circle is at the top. A small black diamond is at the left. "
    "A large green triangle is at the right."
)


def random_chat(device: torch.device, name: str = "small") -> Chat:
    """Random weights in the sizes of a preset, with the quickstart's tokenizer: nothing has to be downloaded."""
    torch.manual_seed(0)
    vocabulary = len(load_tokenizer(ROOT / "quickstart" / "weights" / "llama"))
    preset = replace(PRESETS[name], vocabulary=vocabulary)
    model = build_minigpt4(preset, device, devices.default_dtype(device))
    return Chat(model, Blip2ImageEvalProcessor(preset.image), device)


def fifth_turn(chat: Chat, image: torch.Tensor, options: GenerationOptions, num_cached_chats: int) -> float:
    """Seconds to the first token of turn 5, with a prefix cache of so many chats.

    Answers of random weights are not tokenized again as they were generated. A sentence replaces them, which the next
    turn has to prefill: the most that a real chat ever needs.
    """
    chat.prefixes.num_chats = num_cached_chats
    chat.prefixes.clear()
    conv, images = chat.template.copy(), []
    chat.upload_img(image, conv, images)
    for _ in range(4):
        chat.ask(QUESTION, conv)
        for _ in chat.stream(conv, images, options):
            pass
        conv.messages[-1][1] = ANSWER
    chat.ask(QUESTION, conv)
    answers = chat.stream(conv, images, options)
    first = next(answers).seconds_to_first_token
    answers.close()
    return first


def captions(chat: Chat, images: list[torch.Tensor], options: GenerationOptions, batch_size: int) -> None:
    """Describes images in batches."""
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        convs, img_lists = [chat.template.copy() for _ in batch], [[] for _ in batch]
        chat.upload_batch(batch, convs, img_lists)
        for conv in convs:
            chat.ask(QUESTION, conv)
        chat.answer_batch(convs, img_lists, options)


def hundred_chats(chat: Chat, image: torch.Tensor, device: torch.device) -> list[float]:
    """Memory in MiB after each of 100 chats of 5 turns: of the device, or on a CPU of the process."""
    options, used = GenerationOptions(do_sample=False, max_new_tokens=8), []
    for _ in range(100):
        conv, images = chat.template.copy(), []
        chat.upload_img(image, conv, images)
        for _ in range(5):
            chat.ask("Why?", conv)
            chat.answer_batch([conv], [images], options)
        gc.collect()
        used.append(hardware.memory_mib(device))
    return used


def main() -> None:
    """Prints the table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the line of JSON to this file")
    args = parser.parse_args()
    try:
        chat = given_chat(args)
    except UserError as error:
        sys.exit(f"error: {error}")
    device, size = chat.device, chat.vis_processor.image_size
    images = list(torch.randn(16, 3, size, size))
    options = GenerationOptions(do_sample=False, max_new_tokens=NUM_TOKENS)
    first = {f"{n} chats": partial(fifth_turn, chat, images[0], options, n) for n in (4, 0)}
    cached, full = hardware.interleaved(first, device, args.repeats, measure=lambda turn, _: turn()).values()
    each = {f"batch of {n}": partial(captions, chat, images, options, n) for n in (16, 1)}
    batched, single = hardware.interleaved(each, device, args.repeats).values()
    chat.prefixes.num_chats = 4
    memory = hundred_chats(chat, images[0], device)
    result = {
        "first token of turn 5, cached prefix, ms": round(1000 * cached, 2),
        "first token of turn 5, full prefill, ms": round(1000 * full, 2),
        "first token, cached / full": round(cached / full, 3),
        "images/s in a batch of 16": round(len(images) / batched, 2),
        "images/s one at a time": round(len(images) / single, 2),
        "batch / one at a time": round(single / batched, 2),
        "memory after chat 10, MiB": round(memory[9], 1),
        "memory after chat 100, MiB": round(memory[99], 1),
        "memory, chat 100 / chat 10": round(memory[99] / memory[9], 3),
    }
    rows = [{"measurement": name, "value": value} for name, value in result.items()]
    hardware.report(rows, hardware.describe(device) | {"tokens": NUM_TOKENS, "repeats": args.repeats}, args.json)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose the model of ``given_chat``."""
    parser.add_argument("--preset", choices=PRESETS, default="small", help="sizes of random weights")
    parser.add_argument("--cfg-path", help="a model to measure instead of random weights")
    parser.add_argument("--options", nargs="+")


def given_chat(args: argparse.Namespace) -> Chat:
    """A chat with random weights, or the one that demo.py builds from a configuration file."""
    if args.cfg_path is None:
        return random_chat(devices.pick(), args.preset)
    import demo

    return demo.build_chat(argparse.Namespace(cfg_path=args.cfg_path, options=args.options, gpu_id=0, seed=0))


if __name__ == "__main__":
    main()
