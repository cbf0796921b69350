"""BLEU, ROUGE-L, CIDEr-D and METEOR of captions, with the definitions of pycocoevalcap.

The tokenizer decides about the values: ``ptb`` is pycocoevalcap's, which published numbers use and which needs Java;
``simple`` needs nothing; ``raw`` splits at blanks. METEOR is pycocoevalcap's own program and needs Java, too.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from minigpt4.common.errors import UserError
from minigpt4.evaluation.metric import Metric, mean_metric

MAX_N = 4
_ROUGE_BETA, _CIDER_SIGMA = 1.2, 6.0
_METEOR_ALPHA, _METEOR_BETA, _METEOR_GAMMA, _METEOR_DELTA = 0.85, 0.2, 0.6, 0.75
_METEOR_WEIGHTS = np.array([1, 0.6, 0.8, 0.6])  # of matches that are exact, of stems, synonyms and paraphrases
_SMALL, _TINY = 1e-9, 1e-15  # keep BLEU of an empty caption finite
_NEEDS = "needs pycocoevalcap and Java: pip install pycocoevalcap, and install a Java runtime (such as OpenJDK 17)"

Texts = Sequence[str]
References = Sequence[Sequence[str]]
NGrams = Counter[tuple[str, ...]]


def _ngrams(words: Sequence[str]) -> NGrams:
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def bleu_sums(candidate: str, references: Sequence[str]) -> list[float]:
    """Of a caption: n-grams found for n from 1 to 4, n-grams for n from 1 to 4, its length, the closest reference's."""
    words, others = candidate.split(), [reference.split() for reference in references]
    allowed: NGrams = Counter()
    for other in others:
        allowed |= _ngrams(other)
    found, sums = _ngrams(words) & allowed, [0.0] * MAX_N
    for ngram, count in found.items():
        sums[len(ngram) - 1] += count
    closest = min((abs(len(other) - len(words)), len(other)) for other in others)[1]
    return [*sums, *(max(0, len(words) - n) for n in range(MAX_N)), len(words), closest]


def bleu(totals: np.ndarray, n: int) -> np.ndarray:
    """BLEU-n of summed counts [..., 10]."""
    precisions = (totals[..., :n] + _TINY) / (totals[..., MAX_N : MAX_N + n] + _SMALL)
    length = (totals[..., 2 * MAX_N] + _TINY) / (totals[..., 2 * MAX_N + 1] + _SMALL)
    return precisions.prod(-1) ** (1 / n) * np.exp(np.minimum(0, 1 - 1 / length))


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """ROUGE-L with the best precision and the best recall over the references."""
    words = candidate.split(" ")
    pairs = [(_common(words, other), len(other)) for other in (reference.split(" ") for reference in references)]
    precision = max(common for common, _ in pairs) / len(words)
    recall = max(common / length for common, length in pairs)
    if not precision or not recall:
        return 0.0
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for i, other in enumerate(second, 1):
            before, row[i] = row[i], before + 1 if word == other else max(row[i], row[i - 1])
    return row[-1]


def cider_d(candidates: Texts, references: References) -> list[float]:
    """CIDEr-D of each caption; the weights of n-grams are those of the references of these images."""
    counts = [[_ngrams(reference.split()) for reference in own] for own in references]
    frequency = Counter(ngram for own in counts for ngram in {key for count in own for key in count})
    log_images = math.log(len(references))

    def vectorise(ngrams: NGrams) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        vector = {k: count * (log_images - math.log(max(1.0, frequency[k]))) for k, count in ngrams.items()}
        squares = [0.0] * MAX_N
        for ngram, weight in vector.items():
            squares[len(ngram) - 1] += weight**2
        length = sum(count for ngram, count in ngrams.items() if len(ngram) == 2)
        return vector, [math.sqrt(square) for square in squares], length

    def similarity(first: tuple, second: tuple) -> float:
        (vector, norms, length), (other, other_norms, other_length) = first, second
        products = [0.0] * MAX_N
        for ngram, weight in vector.items():
            if ngram in other:
                products[len(ngram) - 1] += min(weight, other[ngram]) * other[ngram]
        scaled = [p / (a * b) if a and b else p for p, a, b in zip(products, norms, other_norms, strict=True)]
        return sum(scaled) / MAX_N * math.exp(-((length - other_length) ** 2) / (2 * _CIDER_SIGMA**2))

    scores = []
    for candidate, own in zip(candidates, counts, strict=True):
        vector = vectorise(_ngrams(candidate.split()))
        scores.append(10 * sum(similarity(vector, vectorise(reference)) for reference in own) / len(own))
    return scores


def meteor_sums(candidates: Texts, references: References) -> np.ndarray:
    """METEOR 1.5's statistics of each caption beside its best reference, float64 [n, 23].

    They are the lengths of both texts, their numbers of function words, for each of four kinds of matches the matched
    content words of both and the matched function words of both, then chunks and the matched words of both.

    Raises:
        UserError: pycocoevalcap or Java is missing, or the program fails.
    """
    try:
        from pycocoevalcap.meteor import meteor

        size = max(map(len, references))  # the program wants as many for each caption; the best one counts
        lines = [text for own in references for text in [*own, *[own[-1]] * (size - len(own))]]
        with tempfile.TemporaryDirectory() as folder:
            for name, texts in (("captions", candidates), ("references", lines)):
                Path(folder, name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
            jar = str(Path(meteor.__file__).with_name(meteor.METEOR_JAR))
            options = ["-l", "en", "-norm", "-r", str(size), "-ssOut"]  # pycocoevalcap's, and statistics for scores
            command = ["java", "-Xmx2G", "-jar", jar, "captions", "references", *options]
            output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        raise UserError(f"METEOR {_NEEDS}.") from error
    sums = np.array([line.split() for line in output.splitlines()], dtype=np.float64)
    is_equal = (sums[:, -3] == 1) & (sums[:, -2:] == sums[:, :2]).all(-1)  # its one chunk is not a fragment
    sums[is_equal, -3] = 0
    return sums


def meteor(totals: np.ndarray) -> np.ndarray:
    """METEOR 1.5 (English, task "rank") of summed statistics [..., 23]; that of several captions is not their mean."""
    lengths, function_words, chunks = totals[..., :2], totals[..., 2:4], totals[..., 20]
    content, function = np.moveaxis(totals[..., 4:20].reshape(*totals.shape[:-1], 4, 2, 2), -2, 0)
    matched = _content_share(_METEOR_WEIGHTS @ content, _METEOR_WEIGHTS @ function)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = np.moveaxis(matched / _content_share(lengths - function_words, function_words), -1, 0)
        mean = 1 / ((1 - _METEOR_ALPHA) / precision + _METEOR_ALPHA / recall)
        fragments = chunks / totals[..., 21:].mean(-1)
        return np.nan_to_num(mean * (1 - _METEOR_GAMMA * fragments**_METEOR_BETA))


def _content_share(content: np.ndarray, function: np.ndarray) -> np.ndarray:
    return _METEOR_DELTA * content + (1 - _METEOR_DELTA) * function


def tokenize_simply(texts: Texts) -> list[str]:
    """Lower-case words, digits and parts of contractions; punctuation is dropped."""
    return [" ".join(re.findall(r"n't\b|'\w+|\w+?(?=n't\b)|\w+", text.lower())) for text in texts]


def tokenize_ptb(texts: Texts) -> list[str]:
    """Stanford's PTB tokenizer as pycocoevalcap runs it; UserError without it or without Java."""
    try:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        tokens = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        raise UserError(f"The tokenizer ptb {_NEEDS}; or choose the variant simple.") from error
    return [tokens[i][0] for i in range(len(texts))]


TOKENIZERS: dict[str, Callable[[Texts], Sequence[str]]] = {
    "ptb": tokenize_ptb,
    "simple": tokenize_simply,
    "raw": lambda texts: texts,
}


def caption_metrics(candidates: Texts, references: References, variant: str) -> list[Metric]:
    """BLEU-1 to 4, ROUGE-L and CIDEr-D of one caption for each image; with the variant ``ptb`` METEOR as well."""
    lengths = np.cumsum([0, *map(len, references)])
    tokens = TOKENIZERS[variant]([*candidates, *(text for own in references for text in own)])
    candidates, rest = tokens[: len(candidates)], tokens[len(candidates) :]
    references = [rest[start:end] for start, end in pairwise(lengths)]
    metrics = token_metrics(candidates, references, variant)
    if variant == "ptb":
        metrics.append(Metric("METEOR", variant, meteor_sums(candidates, references), meteor))
    return metrics


def token_metrics(candidates: Texts, references: References, variant: str) -> list[Metric]:
    """What ``caption_metrics`` computes without Java, of texts that have been tokenized."""
    pairs = list(zip(candidates, references, strict=True))
    sums = np.array([bleu_sums(*pair) for pair in pairs])
    return [
        *(Metric(f"BLEU-{n}", variant, sums, lambda totals, n=n: bleu(totals, n)) for n in range(1, MAX_N + 1)),
        mean_metric("ROUGE-L", variant, [rouge_l(*pair) for pair in pairs]),
        mean_metric("CIDEr", variant, cider_d(candidates, references)),
    ]
