"""Questions per second of an evaluation in batches and one by one, as a table and a line of JSON.

The questions are POPE's in shape: six for each image, answered in so many tokens.

python -m benchmarks.evaluate                                                         # random weights of preset small
python -m benchmarks.evaluate --cfg-path eval_configs/minigpt4_eval.yaml              # another model
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from benchmarks import hardware
from benchmarks.chat import add_model_arguments, given_chat
from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Chat
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.evaluation.answering import LocalModel
from minigpt4.evaluation.items import BenchmarkConfig, Item

NUM_QUESTIONS = 6  # for each image
OBJECTS = ("snowboard", "car", "person", "dining table", "traffic light", "dog")
CANDIDATES = ("yes", "no", "a red bus in the street", "none of these")


def write_items(folder: Path, num_images: int, size: int) -> list[Item]:
    """Images of noise with six questions each."""
    items = []
    for number in range(num_images):
        file = folder / f"{number}.png"
        pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(file)
        texts = [f"Is there a {name} in the image?" for name in OBJECTS]
        items += [Item(f"{number}.{i}", str(file), text, {}) for i, text in enumerate(texts)]
    return items


def one_by_one(chat: Chat, items: list[Item], num_tokens: int) -> None:
    """Each question by itself, as a loop over questions asks it: the image is read and encoded each time."""
    options = GenerationOptions(do_sample=False, max_new_tokens=num_tokens)
    for item in items:
        conv, images = chat.template.copy(), []
        chat.upload_img(item.image, conv, images)
        chat.ask(item.question, conv)
        chat.answer_batch([conv], [images], options)


def in_batches(chat: Chat, items: list[Item], num_tokens: int, batch_size: int) -> None:
    """All questions as evaluate.py asks them."""
    for _ in LocalModel(chat)(items, BenchmarkConfig(max_new_tokens=num_tokens, batch_size=batch_size)):
        pass


def count_encodings(chat: Chat, items: list[Item], num_tokens: int, batch_size: int) -> int:
    """How many images are encoded for all questions."""
    encode, counts = chat.model.encode_img, []

    def counted(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counts.append(len(image))
        return encode(image)

    chat.model.encode_img = counted
    in_batches(chat, items, num_tokens, batch_size)
    chat.model.encode_img = encode
    return sum(counts)


def main() -> None:
    """Prints the table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the line of JSON to this file")
    args = parser.parse_args()
    try:
        chat = given_chat(args)
    except UserError as error:
        sys.exit(f"error: {error}")
    chat.prefixes.num_chats = 0  # of one by one; batches have the engine's
    with tempfile.TemporaryDirectory() as folder:
        items = write_items(Path(folder), args.images, chat.vis_processor.image_size)
        candidates = [Item(i.id, i.image, i.question, {}, CANDIDATES) for i in items[::NUM_QUESTIONS]]
        works = {
            "batches": lambda: in_batches(chat, items, args.tokens, args.batch_size),
            "one by one": lambda: one_by_one(chat, items, args.tokens),
            "candidates": lambda: in_batches(chat, candidates, args.tokens, args.batch_size),
        }
        seconds = hardware.interleaved(works, chat.device, args.repeats)
        num_encodings = count_encodings(chat, items, args.tokens, args.batch_size)
    batched, single = (len(items) / seconds[name] for name in ("batches", "one by one"))
    ranked = len(candidates) / seconds["candidates"]
    result = {
        "questions/s in batches": round(batched, 2),
        "questions/s one by one": round(single, 2),
        "batches / one by one": round(batched / single, 2),
        "encodings per image": round(num_encodings / args.images, 3),
        "questions/s with 4 ranked candidates": round(ranked, 2),
        "4 candidates / one generated answer, one by one": round(single / ranked, 2),
    }
    rows = [{"measurement": name, "value": value} for name, value in result.items()]
    sizes = {"images": args.images, "tokens": args.tokens, "batch_size": args.batch_size, "repeats": args.repeats}
    hardware.report(rows, hardware.describe(chat.device) | sizes, args.json)


if __name__ == "__main__":
    main()
