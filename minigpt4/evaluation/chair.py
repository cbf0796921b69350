"""CHAIR (Rohrbach et al., 2018): objects that captions name although the image does not show them."""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minigpt4.common.errors import UserError
from minigpt4.evaluation.metric import Metric, ratio

_WORDS = Path(__file__).with_name("chair_words.json")
_TOKEN = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*|\d+|\S")


@dataclass(frozen=True)
class Objects:
    """Which words name which objects.

    Args:
        classes: the words of each object (node).
        double_words: pairs of words that are joined, and what replaces them.
    """

    classes: Mapping[str, Collection[str]]
    double_words: Mapping[str, str]

    @property
    def nodes(self) -> dict[str, str]:
        """The object of each word."""
        return {word: node for node, words in self.classes.items() for word in words}


class Mentions(NamedTuple):
    """Object words of a caption and their objects, positions among the tokens, and the number of tokens."""

    words: list[str]
    nodes: list[str]
    positions: list[int]
    num_tokens: int


def find_objects(lemmas: Sequence[str], objects: Objects) -> Mentions:
    """The objects that the lemmas of a caption name.

    As in the original programs, tokens are counted after double words have been joined, and a ``seat`` beside a
    ``toilet`` is dropped, which shifts the positions that follow.
    """
    joined, positions, i = [], [], 0
    while i < len(lemmas):
        positions.append(i)
        pair = objects.double_words.get(" ".join(lemmas[i : i + 2]))
        joined.append(pair or lemmas[i])
        i += 2 if pair else 1
    words = [word for word in joined if word != "seat"] if {"toilet", "seat"} <= set(joined) else joined
    nodes = objects.nodes
    found = [(word, nodes[word], positions[i]) for i, word in enumerate(words) if word in nodes]
    return Mentions(*(list(column) for column in zip(*found, strict=True)) if found else ([], [], []), len(joined))


@cache
def _word_file() -> dict[str, dict]:
    return json.loads(_WORDS.read_text(encoding="utf-8"))


def coco_objects() -> Objects:
    """The 80 objects of COCO with the words of CHAIR's authors."""
    return Objects(_word_file()["classes"], _word_file()["double_words"])


def split_tokens(caption: str) -> list[str]:
    """Tokens of a lower-case text by one rule: letters with hyphens, digits, and each other sign alone."""
    return _TOKEN.findall(caption)


def lemmas_by_table(tokens: Sequence[str]) -> list[str]:
    """Lemmas without a tagger: the noun's if that names an object of COCO, else the verb's (WordNet 3.0 as a table)."""
    nouns, verbs, words = _word_file()["noun"], _word_file()["verb"], _object_words()
    return [noun if (noun := nouns.get(token, token)) in words else verbs.get(token, token) for token in tokens]


def lemmas_by_pattern_table(tokens: Sequence[str]) -> list[str]:
    """The singular forms of pattern.en as a table."""
    return [_word_file()["pattern"].get(token, token) for token in tokens]


@cache
def _object_words() -> frozenset[str]:
    objects = coco_objects()
    return frozenset(objects.nodes) | {part for pair in objects.double_words for part in pair.split()}


def wordnet_tag(tag: str) -> str:
    """WordNet's part of speech of a Penn Treebank tag; nouns are the default."""
    return {"J": "a", "V": "v", "R": "r"}.get(tag[:1], "n")


def lemmas_by_nltk(caption: str) -> list[str]:
    """Lemmas by nltk's tokenizer, tagger and WordNet, as OPERA computes them; UserError where one is missing."""
    try:
        import nltk

        lemmatizer = nltk.stem.WordNetLemmatizer()
        tagged = nltk.pos_tag(nltk.word_tokenize(caption))
        return [lemmatizer.lemmatize(word, wordnet_tag(tag)) for word, tag in tagged]
    except (ImportError, LookupError) as error:
        raise UserError(
            "CHAIR's variant opera_nltk needs nltk and its data: pip install nltk, then python -m nltk.downloader "
            "punkt punkt_tab averaged_perceptron_tagger averaged_perceptron_tagger_eng wordnet."
        ) from error


VARIANTS: dict[str, Callable[[str], list[str]]] = {  # lower-case captions to lemmas
    "lemma_table": lambda caption: lemmas_by_table(split_tokens(caption)),
    "pattern_table": lambda caption: lemmas_by_pattern_table(split_tokens(caption)),
    "opera_nltk": lemmas_by_nltk,
}


def row_sums(mentions: Mentions, truth: Collection[str]) -> list[float]:
    """Of a caption: 1, is it wrong, wrong mentions, mentions, objects found, objects of the image, tokens."""
    num_wrong = sum(node not in truth for node in mentions.nodes)
    num_found = len(set(mentions.nodes) & set(truth))
    return [1, num_wrong > 0, num_wrong, len(mentions.nodes), num_found, len(truth), mentions.num_tokens]


_METRICS = {"CHAIRs": (1, 0, 1.0), "CHAIRi": (2, 3, 1.0), "recall": (4, 5, 1.0), "length": (6, 0, 0.01)}


def metrics_of_sums(sums: np.ndarray, variant: str) -> list[Metric]:
    """CHAIRs, CHAIRi, recall and length (hundreds of tokens) of rows [n, 7], fractions as in the original programs."""

    def metric(name: str, above: int, below: int, factor: float) -> Metric:
        return Metric(name, variant, sums, lambda totals: factor * ratio(totals[..., [above, below]]))

    return [metric(name, *places) for name, places in _METRICS.items()]


def chair_metrics(
    captions: Sequence[str], truths: Sequence[Collection[str]], variant: str, objects: Objects | None = None
) -> list[Metric]:
    """The metrics of captions of images whose objects are known.

    A caption without an object has no wrong one; where no caption names any, CHAIRi has no value.
    """
    objects, lemmas = objects or coco_objects(), VARIANTS[variant]
    pairs = zip(captions, truths, strict=True)
    rows = [row_sums(find_objects(lemmas(caption.lower()), objects), truth) for caption, truth in pairs]
    return metrics_of_sums(np.array(rows, dtype=np.float64), variant)
