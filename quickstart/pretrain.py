"""Trains the small frozen backbones from scratch: a tokenizer and a language model on text, a vision side on images.

The two never meet here. The language model learns to read four words per object between <Img> and </Img>, as text; the
vision side learns to name the same words with classification heads, which are discarded. Connecting the two is left to
the projection, exactly as in MiniGPT-4.

    python -m quickstart.pretrain text --steps 2000
    python -m quickstart.pretrain text --steps 1500 --again      # twice: with questions whether an object is there
    python -m quickstart.pretrain vision --steps 1700
    python -m quickstart.pretrain vision --steps 1900 --again    # then 1400 and 2600: as long as the ceiling rises
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from minigpt4.models.llama_tokenizer import load_tokenizer
from quickstart import text_side, vision_side

WEIGHTS = Path(__file__).parent / "weights"
SEED = 20230705


def optimise(parameters: list[nn.Parameter], losses: Iterator[Tensor], steps: int, lr: float, name: str) -> None:
    """Runs AdamW for ``steps`` losses, with 100 steps of warm-up and a cosine decay to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    start, mean_loss = time.time(), 0.0
    for step in range(steps):
        current_lr = lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = current_lr
        loss = next(losses)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        mean_loss += (loss.item() - mean_loss) * max(0.02, 1 / (step + 1))
        if step % 100 == 0 or step + 1 == steps:
            seconds = time.time() - start
            print(f"{name} step {step} of {steps}, loss {mean_loss:.4f}, {seconds:.0f} s", flush=True)


def record(folder: Path, side: str, steps: int, **ceilings: float) -> None:
    """Updates one side's entry in pretraining.json with the shares of what it does right, such as of ``objects``."""
    file = folder / "pretraining.json"
    known = json.loads(file.read_text()) if file.exists() else {"seed": SEED}
    result = {side: {"steps": steps} | {f"ceiling on held-out {name}": round(c, 4) for name, c in ceilings.items()}}
    file.write_text(json.dumps(known | result, indent=2) + "\n")
    print(result, flush=True)


def train_text(folder: Path, steps: int, again: bool) -> None:
    """Trains tokenizer and language model and writes them to ``folder``/llama in float16.

    With ``again`` it continues from those files, with questions to which the answer is yes or no.
    """
    (folder / "llama").mkdir(parents=True, exist_ok=True)
    if again:
        tokenizer = load_tokenizer(folder / "llama")
        model = LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    else:
        tokenizer = text_side.train_tokenizer(folder / "llama", text_side.caption_words(Random(SEED)))
        model = text_side.build_model(len(tokenizer))
    rows = text_side.TrainingRows(tokenizer, Random(SEED + (5 if again else 1)), has_yes_no=again)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"Language model: {num_parameters:,} parameters, {len(tokenizer)} tokens", flush=True)
    optimise(list(model.parameters()), text_side.losses(model, rows), steps, 1e-3 if again else 2e-3, "text")
    model.half()
    model.config.dtype = "float16"
    model.save_pretrained(folder / "llama")
    model.float().eval()
    objects = text_side.measure_ceiling(model, rows, Random(SEED + 4))
    questions = text_side.measure_yes_no(model, rows, Random(SEED + 6))
    record(folder, "text", _total(folder, "text", steps, again), objects=objects, questions=questions)


def _total(folder: Path, side: str, steps: int, again: bool) -> int:
    """All steps of a side, those before ``again`` included."""
    return steps + json.loads((folder / "pretraining.json").read_text())[side]["steps"] if again else steps


def train_vision(folder: Path, steps: int, again: bool) -> None:
    """Trains the vision side and writes eva_vit.safetensors and qformer.safetensors to ``folder`` in float16.

    With ``again`` it continues from those files, with new heads and other images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = vision_side.VisionSide()
    if again:
        state = {f"vit.{name}": value for name, value in load_file(folder / "eva_vit.safetensors").items()}
        others = load_file(folder / "qformer.safetensors")
        state |= {name.replace("Qformer.", "q_former."): value for name, value in others.items()}
        model.load_state_dict({**model.state_dict(), **state})
    print(f"Vision side: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    rng = Random(SEED + (5 if again else 2))
    optimise(list(model.parameters()), vision_side.losses(model, rng), steps, 1e-3, "vision")
    for parameter in model.parameters():  # measures what is written
        parameter.data = parameter.data.half().float()
    objects = vision_side.measure_ceiling(model, Random(SEED + 3))
    record(folder, "vision", _total(folder, "vision", steps, again), objects=objects)
    half = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    vit = {name.removeprefix("vit."): value for name, value in half.items() if name.startswith("vit.")}
    others = {name: value for name, value in half.items() if name == "query_tokens" or name.startswith("ln_vision.")}
    others |= {name.replace("q_former.", "Qformer."): v for name, v in half.items() if name.startswith("q_former.")}
    save_file(vit, folder / "eva_vit.safetensors")
    save_file(others, folder / "qformer.safetensors")


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains one side, by default on one thread, so that both can run at once on two cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["text", "vision"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--again", action="store_true", help="continue from the weights in the folder")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the weights")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    (train_text if args.side == "text" else train_vision)(args.weights, args.steps, args.again)


if __name__ == "__main__":
    main()
