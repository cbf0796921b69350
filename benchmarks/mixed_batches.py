"""Tokens and time of training steps with MiniGPT-v2's mixed batches: packed rows beside padded ones.

python -m benchmarks.mixed_batches
python -m benchmarks.mixed_batches --preset small --steps 8 --batch 12

Batches are mixed by row: a caption, an instruction, a conversation, and a text without image, of random lengths.
Computed tokens are those that pass a linear layer of the language model's last block, as a hook counts. Weights are
random; images are features of the vision side, so that the language model's share is measured.
"""

import argparse
import random
import time
from typing import Any

import torch
from torch import nn

from benchmarks.models import PRESETS, ROOT, build_language_model
from minigpt4.common import device as devices
from minigpt4.common.schema import ModelConfig
from minigpt4.models.language_model import decoder_layers
from minigpt4.models.llama_tokenizer import load_tokenizer
from minigpt4.models.lora import add_lora, lora_settings
from minigpt4.models.mini_gpt4 import MiniGPT4

FORM, IMAGE = "[INST] {} [/INST]", "<ImageHere>"
WORDS = (
    "a",
    "red",
    "dog",
    "sits",
    "near",
    "the",
    "old",
    "wooden",
    "boat",
    "and",
    "two",
    "birds",
    "over",
    "quiet",
    "trees",
)


def build(preset_name: str, device: torch.device, num_image_tokens: int) -> MiniGPT4:
    """MiniGPT-v2 with LoRA of rank 16 and without vision side, in the device's best precision."""
    preset = PRESETS[preset_name]
    llm = build_language_model(preset, device, devices.default_dtype(device), False)
    lora = lora_settings(ModelConfig(lora_r=16), llm)
    sizes = {"num_query_token": num_image_tokens, "feature_width": 4 * preset.vit[0], "has_qformer": False}
    texts = {"arch": "minigpt_v2", "prompt_template": FORM, "end_sym": "</s>", "max_txt_len": 1024}
    tokenizer = load_tokenizer(ROOT / "quickstart" / "weights" / "llama")
    model = MiniGPT4(None, None, llm, tokenizer, lora=lora, **texts, **sizes).to(device)
    add_lora(model.llama_model, lora)
    return model.to(device).train()


def mixed_batch(model: MiniGPT4, size: int, rng: random.Random) -> dict[str, Any]:
    """A batch whose rows are of all kinds in turn."""

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    turns = []
    for i in range(size):
        num_turns = rng.randint(2, 4) if i % 4 == 2 else 1
        longest = (60, 8, 40, 120)[i % 4]  # of an answer: a caption, a box or a word, a conversation, a text
        own = [(text(3, 12), text(1, longest)) for _ in range(num_turns)]
        if i % 4 != 3:
            own[0] = f"{IMAGE} {own[0][0]}", own[0][1]
        turns.append(own)
    counts = [sum(IMAGE in question for question, _ in own) for own in turns]
    features = torch.randn(sum(counts), model.num_query_token, model.feature_width, device=model.device)
    conversations = [{"turns": own} for own in turns]
    return {"features": features, "num_images": counts, "text_input": [""] * size, "conversation": conversations}


def measure(model: MiniGPT4, batches: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Real tokens, computed tokens and seconds of a step, means over the batches."""
    computed: list[int] = []
    layer = next(m for m in decoder_layers(model.llama_model)[-1].modules() if isinstance(m, nn.Linear))
    hook = layer.register_forward_hook(lambda _, inputs, __: computed.append(inputs[0].shape[:-1].numel()))
    model(batches[0])["loss"].backward()
    computed.clear()
    real, start = 0, time.perf_counter()
    for batch in batches:
        output = model(batch)
        output["loss"].backward()
        real += output["num_tokens"]
    devices.synchronize(model.device)
    seconds = time.perf_counter() - start
    hook.remove()
    return real / len(batches), sum(computed) / len(batches), seconds / len(batches)


def main() -> None:
    """Prints a line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--image-tokens", type=int, default=64, help="embeddings of an image; MiniGPT-v2 has 256")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build(args.preset, devices.pick(), args.image_tokens)
    rng = random.Random(0)
    batches = [mixed_batch(model, args.batch, rng) for _ in range(args.steps)]
    print(f"| {args.preset}, batch {args.batch} | real tokens | computed tokens | ratio | seconds per step |")
    print("|---|---|---|---|---|")
    for name, is_packed in (("packed", True), ("padded", False)):
        model.packs_rows = is_packed
        real, computed, seconds = measure(model, batches)
        print(f"| {name} | {real:.0f} | {computed:.0f} | {computed / real:.3f} | {seconds:.3f} |")


if __name__ == "__main__":
    main()
