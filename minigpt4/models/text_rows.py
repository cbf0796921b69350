"""Texts as rows of token ids: prompts with image positions, and training rows with their labels."""

import bisect
import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from minigpt4.common.errors import UserError
from minigpt4.common.schema import LATER
from minigpt4.common.templates import IMAGE_MESSAGE, Conversation, choose_template
from minigpt4.common.utils import IMAGE_PLACEHOLDER

IMAGE_TOKEN_INDEX = -1  # in a list of token ids: one image embedding goes here
IGNORE_INDEX = -100  # label of a position that is no target


class TextRow(NamedTuple):
    """Token ids of a training row, image positions included, and the label of each.

    ``num_images`` counts the images of the whole row, of which a part may be cut off; ``hidden`` are positions that
    nothing attends to.
    """

    ids: list[int]
    labels: list[int]
    num_images: int
    is_truncated: bool = False
    hidden: tuple[int, ...] = ()


class TextRows:
    """The part of ``MiniGPT4`` that tokenizes; its attributes are described there."""

    llama_tokenizer: Any
    num_query_token: int
    prompt_list: list[str]
    prompt_template: str
    max_txt_len: int
    max_context_len: int
    end_sym: str
    conversation: str | None
    arch: str
    chat_template: bool

    @cached_property
    def pad_id(self) -> int:
        """The token with which the reference pads: the end token, in the later family "$$" or else the unknown one."""
        tokenizer = self.llama_tokenizer
        if self.arch not in LATER:
            return tokenizer.eos_token_id
        number = tokenizer.get_vocab().get("$$", tokenizer.unk_token_id)
        return tokenizer.eos_token_id if number is None else number

    @property
    def bos_ids(self) -> list[int]:
        """What every sequence begins with: the begin token, or nothing where the tokenizer has none."""
        return [] if self.llama_tokenizer.bos_token is None else [self.llama_tokenizer.bos_token_id]

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text without begin token; lone surrogates, which JSON may hold, are replaced by "?"."""
        text = text.encode(errors="replace").decode()
        return list(self.llama_tokenizer(text, add_special_tokens=False).input_ids)

    def tokenize_prompt(self, text: str) -> list[int]:
        """Ids of a prompt: each ``<ImageHere>`` is Q times IMAGE_TOKEN_INDEX, the text around it is encoded apart."""
        ids: list[int] = []
        for i, segment in enumerate(text.split(IMAGE_PLACEHOLDER)):
            ids += [IMAGE_TOKEN_INDEX] * self.num_query_token * (i > 0)
            ids += self.tokenize(segment) if segment else []
        return ids

    def tokenize_rows(self, captions: Sequence[str], prompts: Sequence[str]) -> list[TextRow]:
        """Training rows: begin token, prompt with image positions, caption with end symbol.

        Labels are the ids where they are caption or end symbol and not the pad id, which a caption may contain as text.
        A prompt beyond ``max_context_len`` loses its end.
        """
        rows, limit = [], self.max_context_len
        for caption, prompt in zip(captions, prompts, strict=True):
            before = self.tokenize_prompt(prompt)
            is_truncated, before = len(before) > limit, self.bos_ids + before[:limit]
            target = self.tokenize(caption + self.end_sym)[: self.max_txt_len]
            labels = [IGNORE_INDEX] * len(before) + [IGNORE_INDEX if t == self.pad_id else t for t in target]
            rows.append(TextRow(before + target, labels, prompt.count(IMAGE_PLACEHOLDER), is_truncated))
        return rows

    @cached_property
    def template(self) -> Conversation:
        """The template in which conversations are trained, which is that of a chat with the trained model."""
        return choose_template(self, self.llama_tokenizer)

    def tokenize_conversation(self, turns: Sequence[tuple[str, str]], system: str = "") -> TextRow:
        """The training row of (question, answer)s: the ids of ``Chat``'s prompt, answers with their ends as targets.

        Turns that do not fit into ``max_context_len`` are left out from the last one on; of a single turn, the end is
        cut off, but no part of an image. Templates that only the end token ends have a rule of their own.

        Args:
            turns: ``<ImageHere>`` in a question marks the position of an image, ``<Img>`` around it may be left out.
            system: added to the template's system text, as in the API.
        """
        num_images = sum(question.count(IMAGE_PLACEHOLDER) for question, _ in turns)
        if not self.template.stop_string:
            return self._tokenize_turns(turns, system, num_images)
        turns = [(question.replace(IMAGE_MESSAGE, IMAGE_PLACEHOLDER), answer) for question, answer in turns]

        def tokenize(number: int, is_open: bool = False) -> list[int]:
            conv = self.template.copy()
            conv.add_system(system)
            for i, (question, answer) in enumerate(turns[: number + is_open]):
                conv.ask_with_images(question)
                conv.append_message(conv.roles[1], answer if i < number else None)
            text, stop = conv.get_prompt(), conv.stop_string
            if not is_open and stop and stop in text:  # a template may write more than what ends a generated answer
                text = text[: text.rindex(stop) + len(stop)]
            return self.bos_ids + self.tokenize_prompt(text)

        ids, limit, number = tokenize(len(turns)), self.max_context_len, len(turns)
        is_truncated = len(ids) > limit
        if is_truncated:
            fitting = bisect.bisect_right(range(1, number), limit, key=lambda n: len(tokenize(n)))
            number = max(1, fitting)
            ids = self._cut(tokenize(number), limit)
        labels = [IGNORE_INDEX] * len(ids)
        for i in range(number):  # a tokenizer may join the ends of two texts, so the common ids decide
            begin, end = (_num_common(ids, tokenize(i + 1 - is_open, is_open)) for is_open in (True, False))
            labels[begin:end] = ids[begin:end]
        return TextRow(ids, labels, num_images, is_truncated)

    def _cut(self, ids: list[int], limit: int) -> list[int]:
        """The first ids, without those of an image that would be split."""
        ids = ids[:limit]
        return ids[: len(ids) - ids.count(IMAGE_TOKEN_INDEX) % self.num_query_token]

    def _tokenize_turns(self, turns: Sequence[tuple[str, str]], system: str, num_images: int) -> TextRow:
        """The training row of a conversation in Llama-2's form, as the reference has it.

        Every text is encoded apart. The first question is cut to ``max_context_len``, what follows to ``max_txt_len``,
        and nothing attends to the pad id in it.
        """
        begin, end = self.template.roles
        bos, end_sym = self.llama_tokenizer.bos_token or "", self.end_sym.strip() or self.llama_tokenizer.eos_token
        texts, answers = [], []
        for question, answer in turns:
            if IMAGE_MESSAGE not in question and IMAGE_PLACEHOLDER in question:
                conv = self.template.copy()
                conv.ask_with_images(question)
                question = " ".join(text for _, text in conv.messages)
            texts.append(begin + question + end)
            answers.append(self.tokenize(answer + end_sym))
        first = self.tokenize_prompt(system + texts[0] if system else texts[0].removeprefix(bos))
        ids, labels = list(answers[0]), list(answers[0])
        for text, answer in zip(texts[1:], answers[1:], strict=True):
            question = self.tokenize_prompt(text)
            ids += question + answer
            labels += [IGNORE_INDEX] * len(question) + answer
        is_truncated = len(first) > self.max_context_len or len(ids) > self.max_txt_len
        before, ids = self.bos_ids + self._cut(first, self.max_context_len), self._cut(ids, self.max_txt_len)
        hidden = tuple(len(before) + i for i, token in enumerate(ids) if token == self.pad_id)
        labels = [IGNORE_INDEX] * len(before) + labels[: len(ids)]
        return TextRow(before + ids, labels, num_images, is_truncated, hidden)

    def training_rows(self, samples: Mapping[str, Any]) -> list[TextRow]:
        """The rows of a batch: conversations where ``conversation`` has one, else captions with their prompts."""
        if "conv_q" in samples:
            return [self.tokenize_conversation(turns) for turns in _split_turns(samples)]
        conversations = samples.get("conversation") or [None] * len(captions_of(samples))
        if all(conversations):
            return [self.tokenize_conversation(**conversation) for conversation in conversations]
        rows = self.tokenize_rows(captions_of(samples), self.choose_prompts(samples))
        pairs = zip(conversations, rows, strict=True)
        return [self.tokenize_conversation(**conversation) if conversation else row for conversation, row in pairs]

    def choose_prompts(self, samples: Mapping[str, Any]) -> list[str]:
        """A prompt for each row: the sample's own, else one that is drawn for the whole batch, else the image alone.

        With ``chat_template`` the samples' ``instruction_input`` is put into ``prompt_template``.
        """
        if "instruction_input" in samples:
            form = self.prompt_template if self.chat_template else "{}"
            return [form.format(text) for text in samples["instruction_input"]]
        if self.chat_template and not self.prompt_list and not all(samples.get("instruction") or [None]):
            problem = "model.chat_template is True, but the samples have no instruction to put into it"
            raise UserError(f"{problem}; set model.prompt_path, or model.chat_template: False.")
        drawn = random.choice(self.prompt_list) if self.prompt_list else IMAGE_PLACEHOLDER
        instructions = samples.get("instruction") or [None] * len(captions_of(samples))
        if any(instructions) and "{}" not in self.prompt_template:
            raise UserError("Samples have instructions, but model.prompt_template is not set; see the stage-2 YAML.")
        wrapped = f"<Img>{IMAGE_PLACEHOLDER}</Img> "
        return [self.prompt_template.format(wrapped + text) if text else drawn for text in instructions]


def captions_of(samples: Mapping[str, Any]) -> Sequence[str]:
    """The texts that are to be learned, one for each row of a batch."""
    return next(samples[name] for name in ("text_input", "answer", "conv_a") if name in samples)


def _split_turns(samples: Mapping[str, Any]) -> list[list[tuple[str, str]]]:
    """The (question, answer)s of ``conv_q`` and ``conv_a``, which join the texts of a row by ``connect_sym``.

    As in the reference, the last question gets the last answer, whatever their number.
    """
    symbol, rows = samples["connect_sym"][0], []
    for joined_questions, joined_answers in zip(samples["conv_q"], samples["conv_a"], strict=True):
        questions, answers = joined_questions.split(symbol), joined_answers.split(symbol)
        if len(answers) < len(questions) - 1:
            numbers = f"{len(questions)} questions and {len(answers)} answers"
            raise UserError(f"A conversation has {numbers}; each question needs an answer.")
        rows.append(list(zip(questions, answers[: len(questions) - 1] + answers[-1:], strict=True)))
    return rows


def shared_length(rows: Sequence[TextRow], has_same_images: bool = False) -> int:
    """How many tokens several rows begin with in common, before any prediction of a target; 0 for one row.

    Images are part of it where they are the same ones in all rows.
    """
    longest = min(len(row.ids) for row in rows) - 1 if len(rows) > 1 else 0
    for i in range(longest):
        token = rows[0].ids[i]
        is_image = token == IMAGE_TOKEN_INDEX and not has_same_images
        ends = (row.ids[i] != token or row.labels[i + 1] != IGNORE_INDEX or i in row.hidden for row in rows)
        if is_image or any(ends):
            return i
    return longest


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
