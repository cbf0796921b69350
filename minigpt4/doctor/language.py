"""Is the language model alive, and is it the one that the configuration speaks to?"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4.common.errors import see
from minigpt4.common.schema import ModelConfig
from minigpt4.common.weights import VOCABULARIES
from minigpt4.conversation.templates import TEMPLATES, choose_template
from minigpt4.doctor.findings import MISTAKE, OK, WARNING, Finding

KEY = "model.llama_model"
_USUAL_TEMPLATES = {32001: "vicuna_v0", 32000: "vicuna_v1"}  # of Vicuna, by the size of its vocabulary
SENTENCES = (
    "The sky is blue and the grass is green.",
    "She went to the shop to buy some bread and milk.",
    "Paris is the capital of France.",
)
MAX_CAPTIONS = 8
_FP16_MAX = 65504.0


@torch.no_grad()
def next_token_loss(llama: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[float, float]:
    """Means over all tokens of texts, in nats: of the loss of the next token, and of the prediction's own entropy."""
    losses, entropies = [], []
    begin = [] if tokenizer.bos_token is None else [tokenizer.bos_token_id]
    for text in texts:
        ids = begin + list(tokenizer(text, add_special_tokens=False).input_ids)
        ids = torch.tensor([ids], device=llama.get_input_embeddings().weight.device)
        log_probs = llama(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        losses.append(-log_probs.gather(1, ids[0, 1:, None]).squeeze(1))
        entropies.append(-(log_probs.exp() * log_probs).sum(-1))
    return torch.cat(losses).mean().item(), torch.cat(entropies).mean().item()


def vitality(llama: Any, tokenizer: Any, captions: Sequence[str] = ()) -> Finding:
    """The true loss on plain sentences and on the run's own captions, against ln(vocabulary), which guessing has."""
    guess = math.log(llama.config.vocab_size)
    texts = {"plain sentences": SENTENCES, "captions of this run": captions[:MAX_CAPTIONS]}
    losses = {name: next_token_loss(llama, tokenizer, part) for name, part in texts.items() if part}
    seen = ", ".join(f"{loss:.2f} on {name}" for name, (loss, _) in losses.items())
    evidence = f"mean next-token loss {seen}; guessing has ln({llama.config.vocab_size}) = {guess:.2f}"
    numbers = {name: loss for name, (loss, _) in losses.items()} | {"ln vocabulary": guess}
    if not all(map(math.isfinite, numbers.values())):
        numbers = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return Finding("LM vitality", MISTAKE, *_nonfinite(llama, tokenizer, evidence), numbers)
    best, entropy = min(losses.values())
    if best < 0.9 * guess:
        return Finding("LM vitality", OK, evidence, numbers=numbers)
    if entropy <= 0.9 * guess and not captions:
        told = f"{evidence}: it is sure and wrong, but may know other texts than these; no captions could be drawn"
        return Finding("LM vitality", WARNING, told, "First mend the data sets.", numbers)
    if entropy > 0.9 * guess:
        cause = "it predicts nothing at all: a dead LM, untrained weights or a raw delta"
    else:
        cause = "it is sure and wrong: random or mixed-up weights, or the tokenizer of another model"
    remedy = "Take the LM's folder anew, weights and tokenizer from one source (PrepareVicuna.md)."
    return Finding("LM vitality", MISTAKE, f"{evidence}: {cause}", remedy + see("a-dead-language-model"), numbers)


def _nonfinite(llama: Any, tokenizer: Any, evidence: str) -> tuple[str, str]:
    dtype = str(llama.dtype).removeprefix("torch.")
    loss, _ = next_token_loss(llama.cpu().float(), tokenizer, SENTENCES)
    if math.isfinite(loss):
        told = f"{evidence}. In {dtype} it overflows: in float32 the loss is {loss:.2f}"
        return told, "Set model.llm_dtype: bf16 (or fp32), and run.amp_dtype: bf16." + see("nan")
    return f"{evidence}, in float32 as well: the weights are damaged", "Copy the LM's files again." + see("nan")


def sampled_vitality(tensors: Mapping[str, Tensor], dtype: torch.dtype, num_rows: int = 16) -> Finding:
    """What all norms, and a few rows of embeddings, output and three layers, tell of files whose bulk stays unread."""
    norms = {name: value.float() for name, value in tensors.items() if value.ndim == 1 and "norm" in name}
    few = _few_layers(tensors)
    rows = {
        name: value[:: max(1, len(value) // num_rows)].float()
        for name, value in tensors.items()
        if value.ndim == 2 and _layer(name) in few
    }
    largest = max(value.abs().max().item() for value in (*norms.values(), *rows.values()))
    mean = norms[_final_norm(norms)].abs().mean().item()
    evidence = f"mean of the final norm {mean:.3g}, largest of the sampled weights {largest:.3g}"
    end = f" (some {num_rows} rows of {len(rows)} weights were read; --deep reads all and computes the loss)"
    remedy = "Take the LM's folder anew (PrepareVicuna.md)."
    if not math.isfinite(largest):
        return Finding("LM vitality", MISTAKE, f"weights are NaN or infinite{end}", remedy + see("nan"))
    if all((norm == 1).all() for norm in norms.values()):
        told = f"every norm is exactly 1: these weights were never trained{end}"
        return Finding("LM vitality", MISTAKE, told, remedy + see("a-dead-language-model"))
    if dead := [name for name, value in rows.items() if not value.any()]:
        told = f"{len(dead)} of {len(rows)} weights are zero wherever they were sampled, as {dead[0]}{end}"
        return Finding("LM vitality", MISTAKE, told, remedy + see("a-dead-language-model"))
    if dtype == torch.float16 and largest > _FP16_MAX:
        told = f"{evidence}: more than the {_FP16_MAX:.0f} that fp16 holds{end}"
        return Finding("LM vitality", MISTAKE, told, "Set model.llm_dtype: bf16." + see("nan"))
    return Finding("LM vitality", OK, evidence + end)


def _final_norm(names: Iterable[str]) -> str:
    """The norm that belongs to no layer; of several the last one."""
    return [name for name in names if _layer(name) is None][-1]


def _layer(name: str) -> int | None:
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def _few_layers(names: Iterable[str]) -> set[int | None]:
    """The first, a middle and the last layer, and None for what is in no layer."""
    numbers = sorted({_layer(name) for name in names} - {None})
    return {None, *numbers[:1], *numbers[-1:], *numbers[len(numbers) // 2 :][:1]}


def tokens(folder: Path, tokenizer: Any, config: Any) -> Finding:
    """Sizes and special ids: of the tokenizer, whose count, beside config.json and generation_config.json."""
    rows, own = config.vocab_size, {r: getattr(tokenizer, f"{r}_token_id") for r in ("bos", "eos")}
    evidence = f"{len(tokenizer)} tokens for {rows} embeddings, begin {own['bos']}, end {own['eos']}"
    file = folder / "generation_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if different := {r: said.get(f"{r}_token_id") for r in own if said.get(f"{r}_token_id") not in (None, own[r])}:
        other = ", ".join(f"{role} {value}" for role, value in different.items())
        evidence += f"; generation_config.json says {other}, as published: the tokenizer's count"
    if max(value or 0 for value in own.values()) >= rows:
        return Finding("tokenizer", MISTAKE, evidence + ": an id without embedding", "Take both from one version.")
    if len(tokenizer) < 0.9 * rows:  # a little less is usual: vocabularies are filled up to round numbers
        told, remedy = f"{evidence}: it knows far fewer than the LM has", "Is it the tokenizer of the same model?"
        return Finding("tokenizer", WARNING, told, remedy + see("the-wrong-vicuna-version"))
    return Finding("tokenizer", OK, evidence)


def version(model_cfg: ModelConfig, vocab_size: int) -> Finding:
    """The Vicuna that the LM is, by its vocabulary, against the template that the configuration writes."""
    name, template = model_cfg.conversation, model_cfg.prompt_template
    usual, kind = _USUAL_TEMPLATES.get(vocab_size), VOCABULARIES.get(vocab_size, "no Vicuna")
    evidence = f"{vocab_size} tokens ({kind})"
    if name is not None and name not in TEMPLATES:
        choose_template(model_cfg, None)  # refuses it
    written = name or ("vicuna_v0" if "###" in template else None)
    if usual is None or written is None or (written == "vicuna_v0") == (usual == "vicuna_v0"):
        return Finding("Vicuna version", OK, f"{evidence}, template {written or usual or 'vicuna_v0'}")
    if name is not None:
        told = f"{evidence}, but model.conversation is {name}: it usually speaks {usual}"
        return Finding("Vicuna version", WARNING, told, "Right if meant." + see("the-wrong-vicuna-version"))
    told = f"{evidence}, but the prompt '{template.strip()}' is that of Vicuna v0 (32001): answers would be garbage"
    remedy = "Take Vicuna v0 (PrepareVicuna.md), or say what is meant: model.conversation and model.prompt_template."
    return Finding("Vicuna version", MISTAKE, told, remedy + see("the-wrong-vicuna-version"))
