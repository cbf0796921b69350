"""Answers to whole prompts, and ranks of given answers, as evaluation scripts of the reference ask for them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, MinLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from minigpt4.common.errors import UserError
from minigpt4.common.schema import LATER
from minigpt4.common.utils import IMAGE_PLACEHOLDER
from minigpt4.models.candidates import candidate_losses
from minigpt4.models.text_rows import TextRows


class PromptAnswers(TextRows):
    """The part of ``MiniGPT4`` that answers prompts without a conversation."""

    @torch.inference_mode()
    def generate(self, images: Tensor, texts: Sequence[str], **settings: Any) -> list[str]:
        """Answers B prompts with one ``<ImageHere>`` each about images [B, 3, S, S], in one batch.

        Of images [B, n, 3, S, S] the first B in their order are used, as in the reference.

        Args:
            images, texts: B of each.
            settings: those of transformers' ``generate``. The begin token counts for ``min_length`` and
                ``repetition_penalty``; ``stop_words_ids`` has no effect, as in the reference.
        """
        return [self.clean_answer(ids) for ids in self.generate_ids(images, texts, **settings)]

    @torch.inference_mode()
    def generate_ids(
        self,
        images: Tensor,
        texts: Sequence[str],
        min_length: int = 1,
        repetition_penalty: float = 1.0,
        stop_words_ids: Any = None,
        **settings: Any,
    ) -> list[list[int]]:
        """The token ids of ``generate``, begin token included; rows that end early are filled up."""
        if not texts:
            return []
        embeds = [] if images is None else self.encode_img(images)[0]
        if len(embeds) < len(texts):
            raise UserError(f"generate got {len(embeds)} images for {len(texts)} texts; each text needs one.")
        rows = [self.get_context_emb(text, [embed[None]])[0] for text, embed in zip(texts, embeds, strict=False)]
        inputs = pad_sequence(rows, batch_first=True, padding_side="left")
        mask = pad_sequence([row.new_ones(len(row), dtype=torch.long) for row in rows], True, padding_side="left")
        # transformers' own take the padding for what has been said.
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(float(repetition_penalty))])
        if min_length > len(self.bos_ids):
            eos = settings.get("eos_token_id", self.eos_ids)
            processors.append(MinLengthLogitsProcessor(min_length, eos, device=inputs.device))
        settings = {"max_new_tokens": 20, "do_sample": False, "logits_processor": processors} | settings
        begin = torch.tensor([self.bos_ids] * len(rows), dtype=torch.long, device=inputs.device)
        return self.llama_model.generate(begin, inputs_embeds=inputs, attention_mask=mask, **settings).tolist()

    @torch.inference_mode()
    def multi_select(
        self,
        images: Tensor,
        texts: Sequence[str],
        answers: Sequence[Sequence[str]],
        num_cand: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """For each of B prompts the numbers of the candidates, most probable first.

        Args:
            images: [B, 3, S, S].
            texts: prompts, as ``instruction_input`` of training samples.
            answers: answers[i][b] is candidate i of prompt b.
            num_cand: how many candidates of each prompt count; the rest come last.
        """
        losses = self.candidate_losses(images, texts, answers)
        for row, number in enumerate(num_cand or ()):
            losses[row, number:] = 9999
        return losses.argsort(dim=-1, stable=True).tolist()

    @torch.inference_mode()
    def candidate_losses(self, images: Tensor, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> Tensor:
        """The losses [B, C] by which ``multi_select`` ranks.

        As in the reference it is the summed loss of a candidate, divided by the padded length of its batch less one, so
        that ranks depend on the lengths of texts and other prompts' candidates.
        """
        prompts, embeds = self.choose_prompts({"instruction_input": texts}), self.encode_img(images)[0]
        numbers = [len(embeds), *map(len, answers)]
        if not answers or set(numbers) != {len(texts)}:
            given = f"{len(texts)} texts, {numbers[0]} images and candidates for {numbers[1:]} texts"
            raise UserError(
                f"multi_select got {given}; each text needs one image and as many candidates as the others."
            )
        if other := [prompt for prompt in prompts if prompt.count(IMAGE_PLACEHOLDER) != 1]:
            raise UserError(f"multi_select got '{other[0]:.80}'; each text needs {IMAGE_PLACEHOLDER} once.")
        rows = [self.tokenize_rows(own, [prompt] * len(own)) for prompt, *own in zip(prompts, *answers, strict=True)]
        sums = [candidate_losses(self, own, embed[None]) for own, embed in zip(rows, embeds, strict=True)]
        starts = [len(self.bos_ids) + len(self.tokenize_prompt(prompt)[: self.max_context_len]) for prompt in prompts]
        # Prompts and answers are padded apart.
        targets = [max(len(row.ids) - start for row, start in zip(batch, starts, strict=True)) for batch in zip(*rows)]  # noqa: B905
        return torch.tensor(sums) / (max(starts) + torch.tensor(targets) - 1)

    def decode_plain(self, ids: Sequence[int]) -> str:
        """Text without special tokens and without the pad token, which the reference drops with them."""
        return self.llama_tokenizer.decode([i for i in ids if i != self.pad_id], skip_special_tokens=True)

    def clean_answer(self, ids: Sequence[int]) -> str:
        """Generated ids as text, up to the end symbol; in the later family what follows a ``[/INST]``."""
        answer = self.decode_plain(ids)
        end = "</s>" if self.arch in LATER else self.end_sym
        answer = answer.split(end)[0] if end.strip() else answer
        return (answer.split("[/INST]")[-1] if self.arch in LATER else answer).strip()
