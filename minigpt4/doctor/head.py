"""The cheap part of the doctor, at the head of train.py and demo.py: what would fail later is told at once."""

import logging
import math
from typing import Any

from torch import nn

from minigpt4.common.errors import UserError, see
from minigpt4.common.schema import ModelConfig, read_section
from minigpt4.doctor import language
from minigpt4.doctor.findings import OK


def look_ahead(cfg: Any, device: Any) -> None:
    """Holds every file of the model section against the model by names and shapes, some milliseconds a file.

    A run would meet the same refusals itself, some of them only after it has read a whole language model. What is no
    refusal but looks wrong is logged. Models of one's own, which have their own files, are not looked at.

    Raises:
        UserError: the first refusal; the others are counted.
    """
    if cfg.model_cfg.get("arch") not in ("mini_gpt4", "minigpt4"):
        return
    from minigpt4.doctor.model import ModelFiles

    files = ModelFiles(read_section(ModelConfig, cfg.model_cfg, "model"), device)
    findings = files.examine()
    refusals = [finding.refusal for finding in findings if finding.refusal]
    if refusals:
        more = f" ({len(refusals) - 1} more: python -m minigpt4.doctor --cfg-path …)" if refusals[1:] else ""
        raise UserError(refusals[0] + more)
    if files.tensors:
        findings.append(language.sampled_vitality(files.tensors, files.llm_dtype))
    for finding in findings:
        if finding.verdict != OK:
            logging.warning("%s: %s. %s", finding.check, finding.evidence, finding.remedy)


def warn_if_dead(model: nn.Module) -> None:
    """Logs a warning where a loaded model's LM predicts nothing, or NaN; one short forward, which every rank makes."""
    loss, entropy = language.next_token_loss(model.llama_model, model.llama_tokenizer, language.SENTENCES[:1])
    guess = math.log(model.llama_model.config.vocab_size)
    if not math.isfinite(loss):
        told = "its loss on a plain sentence is not finite: it overflows in this precision, or is damaged." + see("nan")
    elif min(loss, entropy) > 0.9 * guess:
        told = f"it predicts nothing (loss {loss:.2f} on a plain sentence, guessing has {guess:.2f}): it is untrained, "
        told += "a raw delta, or damaged. Training would stay at that loss." + see("a-dead-language-model")
    else:
        return
    logging.warning("%s: %s", language.KEY, told)
