"""Does the language model predict text, and is it the one that the configuration's prompts were written for?"""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.errors import see
from minigpt4.common.schema import ModelConfig
from minigpt4.common.weights import VOCABULARIES
from minigpt4.conversation.templates import choose_template
from minigpt4.doctor.findings import ERROR, OK, WARNING, Finding
from minigpt4.models import language_model as lm
from minigpt4.models.packed_attention import PackedBatch

CHECK = "LM loss"
SENTENCES = (
    "The sky is blue and the grass is green.",
    "She went to the shop to buy some bread and milk.",
    "Paris is the capital of France.",
)
MAX_CAPTIONS = 8
FP16_MAX = 65504.0
_ANCHOR = "a-dead-language-model"


@torch.no_grad()
def next_token_loss(llm: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[float, float]:
    """Means over all tokens of texts, in nats: of the next-token loss, and of the prediction's entropy."""
    losses, entropies = [], []
    begin = [] if tokenizer.bos_token is None else [tokenizer.bos_token_id]
    for text in texts:
        ids = begin + list(tokenizer(text, add_special_tokens=False).input_ids)
        ids = torch.tensor([ids], device=llm.get_input_embeddings().weight.device)
        log_probs = llm(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        losses.append(-log_probs.gather(1, ids[0, 1:, None]).squeeze(1))
        entropies.append(-(log_probs.exp() * log_probs).sum(-1))
    return torch.cat(losses).mean().item(), torch.cat(entropies).mean().item()


def check_language_model(model: nn.Module) -> None:
    """Checks a loaded model's LM by two short forwards, which every rank runs.

    Logs a warning where it predicts nothing, or NaN. Where its attention cannot compute packed rows as transformers
    computes each row alone, ``model.packs_rows`` becomes False.
    """
    if not hasattr(model, "llama_model"):  # a model of another arch
        return
    loss, entropy = next_token_loss(model.llama_model, model.llama_tokenizer, SENTENCES[:1])
    chance = math.log(model.llama_model.config.vocab_size)
    if not math.isfinite(loss):
        message = "its loss on a plain sentence is not finite: it overflows in this precision, or is damaged."
        logging.warning("%s: %s", lm.KEY, message + see("nan"))
    elif min(loss, entropy) > 0.9 * chance:
        message = "it predicts nothing (loss %.2f on a plain sentence, chance is %.2f): it is untrained, a raw delta, "
        message += "or damaged. Training would stay at that loss." + see(_ANCHOR)
        logging.warning("%s: " + message, lm.KEY, loss, chance)
    elif not _packs_rows(model.llama_model):
        model.packs_rows = False
        message = "the attention of %s cannot compute packed rows; padded rows are used, which is slower."
        logging.warning("%s: " + message, lm.KEY, model.llama_model.config.model_type)


@torch.no_grad()
def _packs_rows(llm: Any) -> bool:
    """Whether packed rows behind a prefix give the hidden states of whole rows."""
    prefix, rows = [1], [[5, 7, 6], [6, 9, 8, 5, 7]]
    embedding = llm.get_input_embeddings()
    try:
        batch = PackedBatch([len(row) for row in rows], lm.compute_prefix_kv(llm, prefix), embedding.weight.device)
        embeds = embedding(torch.tensor([token for row in rows for token in row], device=embedding.weight.device))
        packed = lm.last_hidden_states(llm, embeds, batch)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    whole = [llm.base_model(input_ids=torch.tensor([prefix + row], device=embeds.device))[0][0, 1:] for row in rows]
    difference = (packed - torch.cat(whole)).float().norm() / torch.cat(whole).float().norm()
    return difference.item() < (1e-3 if embeds.dtype == torch.float32 else 0.1)


def lm_loss_check(
    llm: Any, tokenizer: Any, captions: Sequence[str] = (), tensors: Mapping[str, Tensor] | None = None
) -> Finding:
    """The loss on plain sentences and on the run's own captions, compared with chance, ln(vocabulary).

    ``tensors`` are the weights as stored, which explain a loss that is not finite.
    """
    chance = math.log(llm.config.vocab_size)
    texts = {"plain sentences": SENTENCES, "captions of this run": captions[:MAX_CAPTIONS]}
    losses = {name: next_token_loss(llm, tokenizer, part) for name, part in texts.items() if part}
    listed = ", ".join(f"{loss:.2f} on {name}" for name, (loss, _) in losses.items())
    evidence = f"mean next-token loss {listed}; chance is ln({llm.config.vocab_size}) = {chance:.2f}"
    numbers = {name: loss for name, (loss, _) in losses.items()} | {"ln vocabulary": chance}
    if not all(map(math.isfinite, numbers.values())):
        numbers = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return Finding(CHECK, ERROR, *_explain_nonfinite(llm, tokenizer, evidence, tensors or {}), numbers)
    best, entropy = min(losses.values())
    if best < 0.9 * chance:
        return Finding(CHECK, OK, evidence, numbers=numbers)
    if entropy <= 0.9 * chance and not captions:
        message = f"{evidence}: it is confident and wrong, but may know other texts; no captions could be drawn"
        return Finding(CHECK, WARNING, message, "First correct the data sets.", numbers)
    if entropy > 0.9 * chance:
        cause = "it predicts nothing at all: a dead LM, untrained weights or a raw delta"
    else:
        cause = "it is confident and wrong: random or mixed-up weights, or the tokenizer of another model"
    remedy = "Get the LM's folder anew, weights and tokenizer from one source (PrepareVicuna.md)."
    return Finding(CHECK, ERROR, f"{evidence}: {cause}", remedy + see(_ANCHOR), numbers)


def _explain_nonfinite(llm: Any, tokenizer: Any, evidence: str, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    if llm.dtype == torch.float16:
        for name, value in tensors.items():
            if value.is_floating_point() and FP16_MAX < value.abs().max().item() < math.inf:
                message = f"{evidence}. '{name}' has weights above the {FP16_MAX:.0f} that fp16 holds"
                return message, "Set model.llm_dtype: bf16 (or fp32)." + see("nan")
    dtype = str(llm.dtype).removeprefix("torch.")
    loss, _ = next_token_loss(llm.cpu().float(), tokenizer, SENTENCES)
    if math.isfinite(loss):
        message = f"{evidence}. In {dtype} it overflows: in float32 the loss is {loss:.2f}"
        return message, "Set model.llm_dtype: bf16 (or fp32), and run.amp_dtype: bf16." + see("nan")
    return f"{evidence}, in float32 as well: the weights are damaged", "Copy the LM's files again." + see("nan")


def sampled_weights_check(tensors: Mapping[str, Tensor], dtype: torch.dtype, num_rows: int = 16) -> Finding:
    """Norms, and a few rows of embeddings, output and three layers, of files too large to be read."""
    layers = sorted({number for name in tensors if (number := _layer(name)) is not None})
    few = {None, *layers[:1], *layers[-1:], *layers[len(layers) // 2 :][:1]}
    norms = {name: value.float() for name, value in tensors.items() if value.ndim == 1 and "norm" in name}
    rows = {
        name: value[:: max(1, len(value) // num_rows)].float()
        for name, value in tensors.items()
        if value.ndim == 2 and _layer(name) in few
    }
    largest = max(value.abs().max().item() for value in (*norms.values(), *rows.values()))
    evidence = f"{len(norms)} norms, largest of the sampled weights {largest:.3g}"
    end = f" (some {num_rows} rows of {len(rows)} weights were read; --deep reads all and computes the loss)"
    remedy = "Get the LM's folder anew (PrepareVicuna.md)."
    if not math.isfinite(largest):
        return Finding(CHECK, ERROR, f"weights are NaN or infinite{end}", remedy + see("nan"))
    if norms and all((norm == 1).all() for norm in norms.values()):
        return Finding(CHECK, ERROR, f"every norm is exactly 1: the weights are untrained{end}", remedy + see(_ANCHOR))
    if dead := [name for name, value in rows.items() if not value.any()]:
        message = f"{len(dead)} of {len(rows)} weights are zero wherever they were sampled, as {dead[0]}{end}"
        return Finding(CHECK, ERROR, message, remedy + see(_ANCHOR))
    if dtype == torch.float16 and largest > FP16_MAX:
        message = f"{evidence}: more than the {FP16_MAX:.0f} that fp16 holds{end}"
        return Finding(CHECK, ERROR, message, "Set model.llm_dtype: bf16." + see("nan"))
    return Finding(CHECK, OK, evidence + end)


def _layer(name: str) -> int | None:
    found = re.search(r"(?:layers|h)\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def tokenizer_check(folder: Path, tokenizer: Any, vocab_size: int) -> Finding:
    """Sizes and special ids of the tokenizer, beside the LM's and those of generation_config.json."""
    own = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos")}
    evidence = f"{len(tokenizer)} tokens for {vocab_size} embeddings, begin {own['bos']}, end {own['eos']}"
    file = folder / "generation_config.json"
    given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if different := {r: given.get(f"{r}_token_id") for r in own if given.get(f"{r}_token_id") not in (None, own[r])}:
        other = ", ".join(f"{role} {value}" for role, value in different.items())
        evidence += f"; generation_config.json has {other}, as published: the tokenizer's are used"
    if len(tokenizer) < 0.9 * vocab_size:  # a little less is usual: vocabularies are padded to round numbers
        message, remedy = f"{evidence}: far fewer than the LM has", "Is it the tokenizer of the same model?"
        return Finding("tokenizer", WARNING, message, remedy + see("the-wrong-vicuna-version"))
    return Finding("tokenizer", OK, evidence)


def version_check(cfg: ModelConfig, model_type: str, vocab_size: int) -> Finding:
    """The Vicuna version that a Llama's vocabulary indicates, compared with the prompts of the configuration."""
    choose_template(cfg, None)  # raises where model.conversation has no such name
    is_v0_prompt = "###" in cfg.prompt_template or cfg.conversation == "vicuna_v0"
    kind = VOCABULARIES.get(vocab_size, "no Vicuna") if model_type == "llama" else model_type
    evidence = f"{vocab_size} tokens ({kind})"
    is_later_vicuna = model_type == "llama" and vocab_size == 32000
    if not (is_later_vicuna and is_v0_prompt):
        prompts = cfg.prompt_template.strip() or cfg.conversation or "of the tokenizer"
        return Finding("Vicuna version", OK, f"{evidence}, prompts {prompts}")
    if cfg.conversation is not None:
        message = f"{evidence}, but model.conversation is {cfg.conversation}, which Vicuna v0 (32001) was trained with"
        return Finding("Vicuna version", WARNING, message, "Right if intended." + see("the-wrong-vicuna-version"))
    message = f"{evidence}, but the prompt '{cfg.prompt_template.strip()}' is that of Vicuna v0 (32001): "
    message += "answers would be garbage"
    remedy = "Use Vicuna v0 (PrepareVicuna.md), or set model.conversation and model.prompt_template as intended."
    return Finding("Vicuna version", ERROR, message, remedy + see("the-wrong-vicuna-version"))
