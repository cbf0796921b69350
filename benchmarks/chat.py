"""What kept keys and values, batches and streaming bring, side by side in one process, as a table and as JSON.

python -m benchmarks.chat                                                         # random weights of a middling size
python -m benchmarks.chat --cfg-path eval_configs/minigpt4_eval.yaml              # a model of one's own
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import demo
from minigpt4.common import device as devices
from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Chat
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.models import MiniGPT4
from minigpt4.processors import Blip2ImageEvalProcessor

QUESTION = "Describe this image in detail."
NUM_TOKENS = 40
ANSWER = (
    "The picture shows three objects. A large purple circle is at the top. A small black diamond is at the left. "
    "A large green triangle is at the right."
)


def middling_chat(device: torch.device) -> Chat:
    """Random weights, 384 to 512 wide, over the small world's tokenizer: enough work to measure, nothing to load."""
    from minigpt4.models.eva_vit import build_eva_vit
    from minigpt4.models.llama import Llama, LlamaConfig
    from minigpt4.models.llama_tokenizer import load_tokenizer
    from minigpt4.models.Qformer import QFormer, QFormerConfig

    torch.manual_seed(0)
    tokenizer = load_tokenizer(Path("quickstart/weights/llama"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8
    )
    vit = build_eva_vit(224, vit_config={"patch_size": 14, "embed_dim": 384, "depth": 8, "num_heads": 6})
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    q_former = QFormer(QFormerConfig(**sizes, encoder_width=384))
    llama = Llama(config).to(devices.default_dtype(device))
    model = MiniGPT4(vit, q_former, llama, tokenizer)
    return Chat(model, Blip2ImageEvalProcessor(224), device)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes, the device's own work included."""
    begin = time.perf_counter()
    function()
    devices.synchronize(device)
    return time.perf_counter() - begin


def fifth_turn(chat: Chat, picture: torch.Tensor, options: GenerationOptions, keep: int) -> float:
    """Time to the first token of turn 5, with as many kept chats.

    Random weights answer no words that a tokenizer would read back as it wrote them. So a sentence takes the answers'
    place, which the next turn has to read: what a real chat has to do at worst.
    """
    chat.prefixes.num_chats = keep
    chat.prefixes._kept.clear()
    conv, images = chat.template.copy(), []
    chat.upload_img(picture, conv, images)
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


def captions(chat: Chat, pictures: list[torch.Tensor], options: GenerationOptions, size: int) -> None:
    """Describes pictures, so many at a time."""
    for start in range(0, len(pictures), size):
        part = pictures[start : start + size]
        convs, img_lists = [chat.template.copy() for _ in part], [[] for _ in part]
        chat.upload_batch(part, convs, img_lists)
        for conv in convs:
            chat.ask(QUESTION, conv)
        chat.answer_batch(convs, img_lists, options)


def hundred_chats(chat: Chat, picture: torch.Tensor, device: torch.device) -> list[float]:
    """Memory in MiB after each of 100 chats of 5 turns: of the device, or on a CPU of the process."""
    options, used = GenerationOptions(do_sample=False, max_new_tokens=8), []
    for _ in range(100):
        conv, images = chat.template.copy(), []
        chat.upload_img(picture, conv, images)
        for _ in range(5):
            chat.ask("Why?", conv)
            chat.answer_batch([conv], [images], options)
        gc.collect()
        used.append(devices.memory_mib(device))
    return used


def main() -> None:
    """Prints the table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", help="a model to measure in place of random weights")
    parser.add_argument("--options", nargs="+")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.cfg_path:
        try:
            chat = demo.build_chat(argparse.Namespace(**vars(args), gpu_id=0, seed=0))
        except UserError as error:
            sys.exit(f"error: {error}")
        size = chat.vis_processor.image_size
    else:
        chat, size = middling_chat(devices.pick()), 224
    device = chat.device
    pictures = list(torch.randn(16, 3, size, size))
    options = GenerationOptions(do_sample=False, max_new_tokens=NUM_TOKENS)
    fifth_turn(chat, pictures[0], options, keep=4)  # warm-up
    kept, anew, batched, single = [], [], [], []
    for _ in range(args.repeats):  # interleaved, so that whatever else the machine does falls on both
        kept.append(fifth_turn(chat, pictures[0], options, keep=4))
        anew.append(fifth_turn(chat, pictures[0], options, keep=0))
        batched.append(len(pictures) / seconds(lambda: captions(chat, pictures, options, 16), device))
        single.append(len(pictures) / seconds(lambda: captions(chat, pictures, options, 1), device))
    chat.prefixes.num_chats = 4
    memory = hundred_chats(chat, pictures[0], device)
    middle = statistics.median
    result = {
        "first token of turn 5, kept, ms": round(1000 * middle(kept), 2),
        "first token of turn 5, anew, ms": round(1000 * middle(anew), 2),
        "first token, kept / anew": round(middle(kept) / middle(anew), 3),
        "pictures/s in a batch of 16": round(middle(batched), 2),
        "pictures/s one at a time": round(middle(single), 2),
        "batch / one at a time": round(middle(batched) / middle(single), 2),
        "memory after chat 10, MiB": round(memory[9], 1),
        "memory after chat 100, MiB": round(memory[99], 1),
        "memory, chat 100 / chat 10": round(memory[99] / memory[9], 3),
    }
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}"
    print(f"{machine}; {NUM_TOKENS} tokens an answer, medians of {args.repeats}\n\n| | |\n|---|---|")
    for name, value in result.items():
        print(f"| {name} | {value} |")
    print(json.dumps({"machine": machine} | result))


if __name__ == "__main__":
    main()
