"""The text side of the small backbones: a tokenizer, a Llama, and the rows of text it is trained on."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import sentencepiece
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4.conversation.conversation import CONV_VISION
from minigpt4.models.llama_tokenizer import load_tokenizer
from quickstart import scenes

NUM_IMAGE_WORDS = 4 * scenes.MAX_OBJECTS
IGNORE_INDEX = -100
INSTRUCTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
VOCABULARY = scenes.all_attribute_words()
_FORMATS = {"stage 1": 0.35, "stage 2": 0.3, "chat": 0.35}
_YES_NO_FORMATS = {"stage 1": 0.2, "stage 2": 0.15, "chat": 0.15, "yes or no": 0.5}
Row = tuple[list[int], int, list[int]]  # ids, position of the first image word, labels


def train_tokenizer(folder: Path, words: Iterator[str]) -> Any:
    """Trains a sentencepiece BPE with Llama's settings whose pieces are whole words, and writes its files."""
    model = folder / "tokenizer"
    with contextlib.chdir(folder):  # the file stores the prefix it was trained under: a bare name
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=words,
            model_prefix=model.name,
            model_type="bpe",
            vocab_size=768,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            split_by_unicode_script=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    model.with_suffix(".vocab").unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    records = {
        role: {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for role, token in special.items()
    }
    settings = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"}
    (folder / "special_tokens_map.json").write_text(json.dumps(records, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | records, indent=2) + "\n")
    tokenizer = load_tokenizer(folder)
    split = [word for word in VOCABULARY if len(tokenizer.encode(word, add_special_tokens=False)) != 1]
    if split:
        raise SystemExit(f"The tokenizer splits {', '.join(split)}; give it a larger vocabulary.")
    return tokenizer


def caption_words(rng: Random) -> Iterator[str]:
    """The words of 3,000 scenes, punctuation separated."""
    for _ in range(3000):
        scene = scenes.draw_scene(rng)
        texts = [scenes.caption(scene), scenes.description(scene), rng.choice(INSTRUCTIONS), CONV_VISION.system]
        texts += [text for pair in scenes.questions(scene, rng) for text in pair]
        yield from " ".join(texts).replace(".", " . ").replace("?", " ? ").replace(":", " : ").split()
        yield from ["###", "Human", "Assistant", ":", "<Img>", "</Img>", scenes.FILLER]


def build_model(vocab_size: int, **sizes: int) -> LlamaForCausalLM:
    """A Llama of 1.5 million parameters with random weights, or with other sizes."""
    sizes = {"hidden_size": 160, "intermediate_size": 432, "num_hidden_layers": 4, "num_attention_heads": 5} | sizes
    config = LlamaConfig(
        vocab_size=vocab_size,
        **sizes,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.05,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


class TrainingRows:
    """Draws rows in MiniGPT-4's training and chat formats, with words in place of the image embeddings.

    Args:
        tokenizer: encodes the text; every attribute word is a single token.
        rng: draws scenes and formats.
        has_yes_no: half of the batches ask whether objects are there; asked less often, it is not learned.
    """

    def __init__(self, tokenizer: Any, rng: Random, has_yes_no: bool = False) -> None:
        self.tokenizer = tokenizer
        self.rng = rng
        self.formats = _YES_NO_FORMATS if has_yes_no else _FORMATS
        self.word_ids = {word: tokenizer.encode(word, add_special_tokens=False)[0] for word in VOCABULARY}
        self._cached_ids: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids of one segment, without BOS."""
        if text not in self._cached_ids:
            if len(self._cached_ids) > 50_000:
                self._cached_ids.clear()
            self._cached_ids[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._cached_ids[text]

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Padded ids [B, T], mask of image positions [B, T] and labels [B, T]; all rows in one format."""
        row_format = self.rng.choices(*zip(*self.formats.items(), strict=True))[0]
        rows = [self._row(row_format) for _ in range(size)]
        width = max(len(ids) for ids, _, _ in rows)
        ids, labels = torch.full((size, width), 2), torch.full((size, width), IGNORE_INDEX)
        is_image = torch.zeros(size, width, dtype=torch.bool)
        for i, (row_ids, start, row_labels) in enumerate(rows):
            ids[i, : len(row_ids)] = torch.tensor(row_ids)
            labels[i, : len(row_ids)] = torch.tensor(row_labels)
            is_image[i, start : start + NUM_IMAGE_WORDS] = True
        return ids, is_image, labels

    def _row(self, row_format: str) -> Row:
        scene = scenes.draw_scene(self.rng)
        things = list(scene.things)
        self.rng.shuffle(things)  # the LM names objects in the order in which it reads them
        groups = [self._shuffled(list(thing.words)) for thing in things]
        groups += [[scenes.FILLER] * 4] * (scenes.MAX_OBJECTS - len(groups))
        image = [self.word_ids[word] for group in groups for word in group]
        as_read = scenes.Scene(tuple(things))
        if row_format == "stage 1":
            return self._join([], image, [(self.ids(scenes.caption(as_read) + "\n"), True)])
        if row_format == "stage 2":
            before = self.ids("###Human: <Img>")
            after = self.ids(f"</Img> {self.rng.choice(INSTRUCTIONS)} ###Assistant: ")
            return self._join(before, image, [(after, False), (self.ids(scenes.description(as_read) + "###"), True)])
        if row_format == "yes or no":
            turns = [scenes.yes_no_question(scene, self.rng) for _ in range(4)]
            return self.chat_row(turns, image, num_targets=1)
        turns = [(self.rng.choice(INSTRUCTIONS), scenes.description(as_read))] if self.rng.random() < 0.6 else []
        turns += scenes.questions(scene, self.rng)[: self.rng.randint(0 if turns else 1, 2)]
        return self.chat_row(turns, image)

    def chat_row(self, turns: list[tuple[str, str]], image: list[int], num_targets: int | None = None) -> Row:
        """Questions and answers behind an image; the answers are targets, or so many of their first tokens."""
        text, answers = "</Img>", []
        for i, (question, answer) in enumerate(turns):
            text += f"{' ' if i == 0 else 'Human: '}{question}###Assistant:"
            start = len(self.ids(text))
            text += f" {answer}###"
            answers.append(range(start, len(self.ids(text)))[:num_targets])
        ids = self.ids(text)
        targets = {position for answer in answers for position in answer}
        parts = [([token_id], position in targets) for position, token_id in enumerate(ids)]
        system = CONV_VISION.system + CONV_VISION.sep if self.rng.random() < 0.8 else "###"
        return self._join(self.ids(f"{system}Human: <Img>"), image, parts)

    def _join(self, before: list[int], image: list[int], parts: list[tuple[list[int], bool]]) -> Row:
        ids = [self.tokenizer.bos_token_id, *before, *image]
        labels = [IGNORE_INDEX] * len(ids)
        for part, is_target in parts:
            ids += part
            labels += part if is_target else [IGNORE_INDEX] * len(part)
        return ids, 1 + len(before), labels

    def _shuffled(self, words: list[str]) -> list[str]:
        if self.rng.random() < 0.25:
            self.rng.shuffle(words)
        return words


def losses(model: LlamaForCausalLM, rows: TrainingRows) -> Iterator[Tensor]:
    """The next-token loss of one batch after another."""
    while True:
        ids, is_image, labels = rows.batch(48)
        embeds = model.get_input_embeddings()(ids)
        # Noise on the image words teaches the LM to read the inexact embeddings that a projection will give it.
        scale = embeds.detach().std() * torch.rand(len(ids), 1, 1) * 0.6
        embeds = embeds + is_image.unsqueeze(-1) * scale * torch.randn_like(embeds)
        hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
        is_target = labels[:, 1:] != IGNORE_INDEX
        yield cross_entropy(model.lm_head(hidden[is_target]), labels[:, 1:][is_target])


@torch.inference_mode()
def measure_ceiling(model: LlamaForCausalLM, rows: TrainingRows, rng: Random, num_scenes: int = 200) -> float:
    """Share of held-out objects that the LM describes fully right when it is given their true words."""
    drawn = [scenes.draw_scene(rng, held_out=True) for _ in range(num_scenes)]
    before, after = rows.ids("###Human: <Img>"), rows.ids(f"</Img> {INSTRUCTIONS[0]} ###Assistant: ")
    prompts = torch.tensor([
        [rows.tokenizer.bos_token_id, *before, *(rows.word_ids[word] for word in scene.words), *after]
        for scene in drawn
    ])  # fmt: skip
    ids = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=80, pad_token_id=2
    )
    answers = [rows.tokenizer.decode(row[prompts.shape[1] :]).split("###")[0] for row in ids]
    return scenes.share_fully_right(drawn, answers)


@torch.inference_mode()
def measure_yes_no(model: LlamaForCausalLM, rows: TrainingRows, rng: Random, num_scenes: int = 400) -> float:
    """Share of yes-or-no questions about held-out scenes that the LM answers right, given their true words."""
    num_right = 0
    for _ in range(num_scenes):
        scene = scenes.draw_scene(rng, held_out=True)
        image = [rows.word_ids[word] for word in scene.words]
        ids, _, labels = rows.chat_row([scenes.yes_no_question(scene, rng)], image)
        start = next(position for position, label in enumerate(labels) if label != IGNORE_INDEX)
        num_right += model(torch.tensor([ids[:start]])).logits[0, -1].argmax().item() == ids[start]
    return num_right / num_scenes
