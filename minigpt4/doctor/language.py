"""Does the language model predict text, and is it the one that the configuration's prompts were written for?"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.errors import see
from minigpt4.common.schema import ModelConfig
from minigpt4.common.templates import choose_template
from minigpt4.common.weights import VOCABULARIES
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
_DEAD, _VERSION = see("a-dead-language-model"), see("the-wrong-vicuna-version")


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
    llm = model.llama_model
    in_training = [module for module in llm.modules() if module.training]  # LoRA's dropout, which is random
    llm.eval()
    loss, entropy = next_token_loss(llm, model.llama_tokenizer, SENTENCES[:1])
    packs_rows = _packs_rows(llm)
    for module in in_training:
        module.training = True
    chance = math.log(llm.config.vocab_size)
    if not math.isfinite(loss):
        message = "its loss on a plain sentence is not finite: it overflows in this precision, or is damaged."
        logging.warning("%s: %s", lm.KEY, message + see("nan"))
    elif min(loss, entropy) > 0.9 * chance:
        message = f"it predicts nothing (loss {loss:.2f} on a plain sentence, chance is {chance:.2f}): it is "
        message += "untrained, a raw delta, or damaged. Training would stay at that loss."
        logging.warning("%s: %s", lm.KEY, message + _DEAD)
    elif not packs_rows:
        model.packs_rows = False
        message = "%s: the attention of %s cannot compute packed rows; padded rows are used, which is slower."
        logging.warning(message, lm.KEY, llm.config.model_type)


@torch.no_grad()
def _packs_rows(llm: Any) -> bool:
    """Whether packed rows behind a prefix give the hidden states of whole rows."""
    prefix, rows = [1], [[5, 7, 6], [6, 9, 8, 5, 7]]
    embedding = llm.get_input_embeddings()
    try:
        batch = PackedBatch([len(row) for row in rows], len(prefix), embedding.weight.device)
        embeds = embedding(torch.tensor(sum(rows, prefix), device=embedding.weight.device))
        packed = lm.last_hidden_states(llm, embeds, batch)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    whole = [llm.base_model(input_ids=torch.tensor([prefix + row], device=embeds.device))[0][0] for row in rows]
    whole = [whole[0][: len(prefix)], *(row[len(prefix) :] for row in whole)]
    difference = (packed - torch.cat(whole)).float().norm() / torch.cat(whole).float().norm()
    return difference.item() < (1e-3 if embeds.dtype == torch.float32 else 0.1)


def lm_loss_check(llm: Any, tokenizer: Any, captions: Sequence[str], tensors: Mapping[str, Tensor]) -> Finding:
    """The loss on plain sentences and on the run's own captions, compared with chance, ln(vocabulary).

    ``tensors`` are the weights as stored, which explain a loss that is not finite.
    """
    chance = math.log(llm.config.vocab_size)
    texts = {"plain sentences": SENTENCES, "captions of this run": captions[:MAX_CAPTIONS]}
    losses = {name: next_token_loss(llm, tokenizer, part) for name, part in texts.items() if part}
    listed = ", ".join(f"{loss:.2f} on {name}" for name, (loss, _) in losses.items())
    evidence = f"mean next-token loss {listed}; chance is ln({llm.config.vocab_size}) = {chance:.2f}"
    numbers = {name: loss if math.isfinite(loss) else None for name, (loss, _) in losses.items()}
    numbers["ln vocabulary"] = chance
    best, entropy = min(losses.values())
    remedy = "Get the LM's folder anew, weights and tokenizer from one source (PrepareVicuna.md)." + _DEAD
    if None in numbers.values():
        verdict, (cause, remedy) = ERROR, _explain_nonfinite(llm, tokenizer, tensors)
    elif best < 0.9 * chance:
        return Finding(CHECK, OK, evidence, numbers=numbers)
    elif entropy > 0.9 * chance:
        verdict, cause = ERROR, "it predicts nothing at all: a dead LM, untrained weights or a raw delta"
    elif captions:
        verdict, cause = ERROR, "it is confident and wrong: random or mixed-up weights, or another model's tokenizer"
    else:
        verdict, remedy = WARNING, "First correct the data sets."
        cause = "it is confident and wrong, but may know other texts; no captions could be drawn"
    return Finding(CHECK, verdict, f"{evidence}. {cause[0].upper()}{cause[1:]}", remedy, numbers)


def _explain_nonfinite(llm: Any, tokenizer: Any, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """The cause of a loss that is not finite, and the remedy."""
    for name, value in tensors.items() if llm.dtype == torch.float16 else ():
        if FP16_MAX < value.abs().max().item() < math.inf:
            cause = f"'{name}' has weights above the {FP16_MAX:.0f} that fp16 holds"
            return cause, "Set model.llm_dtype: bf16 (or fp32)." + see("nan")
    dtype = str(llm.dtype).removeprefix("torch.")
    loss, _ = next_token_loss(llm.cpu().float(), tokenizer, SENTENCES)
    if math.isfinite(loss):
        cause = f"in {dtype} it overflows: in float32 the loss is {loss:.2f}"
        return cause, "Set model.llm_dtype: bf16 (or fp32), and run.amp_dtype: bf16." + see("nan")
    return "in float32 it is not finite either: the weights are damaged", "Copy the LM's files again." + see("nan")


def sampled_weights_check(tensors: Mapping[str, Tensor], dtype: torch.dtype, num_rows: int = 4) -> Finding:
    """The norms, and a few rows of each matrix, of files too large to be read."""
    norms = [value.float() for name, value in tensors.items() if value.ndim == 1 and "norm" in name]
    matrices = {name: value for name, value in tensors.items() if value.ndim == 2}
    rows = {name: value[:: max(1, len(value) // num_rows)].float() for name, value in matrices.items()}
    largest = max(value.abs().max().item() for value in (*norms, *rows.values()))
    dead = [name for name, value in rows.items() if not value.any()]
    verdict, remedy = ERROR, "Get the LM's folder anew (PrepareVicuna.md)." + _DEAD
    if not math.isfinite(largest):
        evidence, remedy = "weights are NaN or infinite", "Copy the LM's files again." + see("nan")
    elif norms and all((norm == 1).all() for norm in norms):
        evidence = "every norm is exactly 1: the weights are untrained"
    elif dead:
        evidence = f"{len(dead)} of {len(rows)} weights are zero wherever they were sampled, as {dead[0]}"
    elif dtype == torch.float16 and largest > FP16_MAX:
        evidence = f"a weight is {largest:.3g}, above the {FP16_MAX:.0f} that fp16 holds"
        remedy = "Set model.llm_dtype: bf16." + see("nan")
    else:
        verdict, remedy, evidence = OK, "", f"{len(norms)} norms, largest of the sampled weights {largest:.3g}"
    end = f" (some {num_rows} rows of {len(rows)} weights were read; --deep reads all and computes the loss)"
    return Finding(CHECK, verdict, evidence + end, remedy)


def tokenizer_check(folder: Path, tokenizer: Any, vocab_size: int) -> Finding:
    """Sizes and special ids of the tokenizer, beside the LM's and those of generation_config.json."""
    own = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos")}
    evidence = f"{len(tokenizer)} tokens for {vocab_size} embeddings, begin {own['bos']}, end {own['eos']}"
    file = folder / "generation_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    given = {role: config.get(f"{role}_token_id") for role in own}
    if other := ", ".join(f"{role} {value}" for role, value in given.items() if value not in (None, own[role])):
        evidence += f"; generation_config.json has {other}, as published: the tokenizer's are used"
    if len(tokenizer) < 0.9 * vocab_size:  # a little less is usual: vocabularies are padded to round numbers
        remedy = "Is it the tokenizer of the same model?" + _VERSION
        return Finding("tokenizer", WARNING, f"{evidence}: far fewer than the LM has", remedy)
    return Finding("tokenizer", OK, evidence)


def version_check(cfg: ModelConfig, model_type: str, vocab_size: int) -> Finding:
    """The Vicuna version that a Llama's vocabulary indicates, compared with the prompts of the configuration."""
    choose_template(cfg, None)  # raises where model.conversation has no such name
    is_v0_prompt = "###" in cfg.prompt_template or cfg.conversation == "vicuna_v0"
    kind = VOCABULARIES.get(vocab_size, "no Vicuna") if model_type == "llama" else model_type
    prompts = cfg.conversation or cfg.prompt_template.strip() or "of the tokenizer"
    evidence = f"{vocab_size} tokens ({kind}), prompts {prompts}"
    if model_type == "llama" and vocab_size == 32001 and "[INST]" in cfg.prompt_template:
        remedy = "Use Llama 2 chat, whose vocabulary has 32000, or the YAML file of a checkpoint for Vicuna v0."
        return Finding("Vicuna version", ERROR, f"{evidence}, which are those of Llama 2", remedy + _VERSION)
    if not (model_type == "llama" and vocab_size == 32000 and is_v0_prompt):
        return Finding("Vicuna version", OK, evidence)
    evidence += ", which are those of Vicuna v0 (32001)"
    if cfg.conversation is not None:
        return Finding("Vicuna version", WARNING, evidence, "Right if intended." + _VERSION)
    remedy = "Use Vicuna v0 (PrepareVicuna.md), or set model.conversation and model.prompt_template as intended."
    return Finding("Vicuna version", ERROR, f"{evidence}: answers would be garbage", remedy + _VERSION)
