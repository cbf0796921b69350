"""The benchmarks by the names of their sections in ``evaluation_datasets``: how they ask and how answers are scored."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from minigpt4.common.errors import UserError, nearest
from minigpt4.evaluation import boxes, chair, exact, vqa, yes_no
from minigpt4.evaluation import items as readers
from minigpt4.evaluation.caption_files import read_caption_loss, read_captions
from minigpt4.evaluation.captions import caption_metrics, tokenize_ptb
from minigpt4.evaluation.chair_files import chair_objects, read_chair
from minigpt4.evaluation.items import BenchmarkConfig, Item, Reader
from minigpt4.evaluation.metric import Metric, mean_metric, ratio

VQA_PROMPT = "[vqa] Based on the image, respond to this question with a short answer: {question}"
_VIZWIZ_PROMPT = (
    "[vqa] The question is '{question}' Based on the image, answer the question with a single word or phrase. "
    "and reply 'unanswerable' when the provided information is insufficient"
)
_HM_PROMPT = "This is an image writting '{question}'. Is this image hateful? Answer yes or no. Answer:"


# Variants that need further programs are tried on a word before anything is answered.
_PROBES = {"ptb": lambda: tokenize_ptb(["word"]), "opera_nltk": lambda: chair.lemmas_by_nltk("word")}


@dataclass(frozen=True)
class Given:
    """What was answered to a question: a text for each round of asking; with candidates, a loss and tokens for each."""

    texts: tuple[str, ...] = ("",)
    losses: tuple[float, ...] = ()  # sums over the candidate's tokens
    num_tokens: tuple[int, ...] = ()
    target_lengths: tuple[int, ...] = ()  # tokens of each candidate, and of the reference's filler "none"
    prompt_length: int = 0
    is_error: bool = False  # there was no answer: it counts as wrong

    @property
    def text(self) -> str:
        """The answer to the first round."""
        return self.texts[0]


Score = Callable[[Sequence[Item], Sequence[Given], BenchmarkConfig], list[Metric]]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark reads its questions, asks them, scores the answers and writes them for its own program."""

    read: Reader
    prompt: str
    score: Score
    variants: tuple[str, ...]
    num_default: int  # so many of the first variants are computed where the section names none
    is_parsed: Callable[[str], bool] = lambda text: bool(text.strip())
    submit: Callable[[Sequence[Item], Sequence[Given]], Any] | None = None
    submission_form: str = "json"
    ask_again: Callable[[str, str], str | None] | None = None  # of --resample: the next question after an answer

    def with_variants(self, section: BenchmarkConfig, where: str) -> BenchmarkConfig:
        """The section with the variants to compute; UserError for one that is unknown, or whose program is missing."""
        for name in section.variants:
            if name not in self.variants:
                hint = nearest(name, self.variants)
                raise UserError(f"{where}.variants has '{name}'.{hint} Known: {', '.join(self.variants)}.")
            _PROBES.get(name, bool)()
        return replace(section, variants=section.variants or list(self.variants[: self.num_default]))


def _id(item: Item) -> int | str:
    """The id as most published files have it: a number where it is one."""
    return int(item.id) if item.id.isdecimal() else item.id


def _list(name: str, key: str = "question_id") -> Callable[[Sequence[Item], Sequence[Given]], Any]:
    """Writes a list of rows with an id and the answer under a name."""
    return lambda items, given: [{key: _id(i), name: g.text} for i, g in zip(items, given, strict=True)]


def _texts(given: Sequence[Given]) -> list[str]:
    return [own.text for own in given]


def _score_pope(items: Sequence[Item], given: Sequence[Given], section: BenchmarkConfig) -> list[Metric]:
    labels = [item.row["label"] == "yes" for item in items]
    wrong = ["no" if label else "yes" for label in labels]  # an empty answer would mean yes
    texts = [text if own.is_error else own.text for own, text in zip(given, wrong, strict=True)]
    return [metric for metric in yes_no.pope_metrics(texts, labels) if metric.variant in section.variants]


def _score_vqa(items: Sequence[Item], given: Sequence[Given], section: BenchmarkConfig) -> list[Metric]:
    """Where the file has no ids of people's answers, by which one is left out, they are numbered."""
    metrics, people = (
        [],
        [[{"answer_id": number, **answer} for number, answer in enumerate(item.row["answers"], 1)] for item in items],
    )
    for variant in section.variants:
        score, pairs = vqa.VARIANTS[variant], zip(given, people, strict=True)
        values = [0.0 if own.is_error else score(own.text, answers) for own, answers in pairs]
        metrics += _by_kind("accuracy", variant, values, [item.row.get("answer_type") for item in items])
    return metrics


def _by_kind(name: str, variant: str, values: Sequence[float], kinds: Sequence[str | None]) -> list[Metric]:
    """The mean of all rows and, where rows have kinds, of each kind."""
    metrics = [mean_metric(name, variant, values)]
    for kind in dict.fromkeys(filter(None, kinds)):
        is_own = np.array([own == kind for own in kinds], dtype=np.float64)
        metrics.append(Metric(f"{name} ({kind})", variant, np.stack([np.asarray(values) * is_own, is_own], -1)))
    return metrics


def _score_exact(
    matches: Callable[[str, Any], bool],
    label: str,
    variant: str,
    kind: Callable[[Item], str | None],
    items: Sequence[Item],
    given: Sequence[Given],
    section: BenchmarkConfig,
) -> list[Metric]:
    """Exact matches; guessing is the most frequent label."""
    pairs = zip(given, items, strict=True)
    values = [not own.is_error and matches(own.text, item.row[label]) for own, item in pairs]
    chance = Counter(item.row[label] for item in items).most_common(1)[0][1] / len(items)
    first, *others = _by_kind("accuracy", variant, values, [kind(item) for item in items])
    return [Metric(first.name, variant, first.sums, ratio, chance), *others]


def exact_score(
    matches: Callable[[str, Any], bool],
    label: str,
    variant: str = "reference",
    kind: Callable[[Item], str | None] = lambda item: None,
) -> Score:
    """The scoring of a benchmark with one right answer for each question."""
    return partial(_score_exact, matches, label, variant, kind)


def _easy_vqa_kind(item: Item) -> str:
    answer = item.row["answer"]
    return "yes/no" if answer in ("yes", "no") else "colour" if "color" in item.question else "shape"


def ranks(given: Sequence[Given], variant: str, batch_size: int) -> list[list[int]]:
    """The candidates of each row, the best first.

    ``reference`` divides a candidate's loss by the padded length of its batch, which are the candidates of all rows at
    the same place, less one: the longest prompt and the longest candidate. Rows with fewer have "none" there.
    ``per_token`` divides by the candidate's own tokens, ``sum`` by nothing.
    """
    found = []
    for start in range(0, len(given), batch_size):
        batch = given[start : start + batch_size]
        for own in batch:
            if not own.losses:  # the question could not be answered
                found.append([])
            elif variant == "sum" or not own.num_tokens:
                found.append(exact.rank(own.losses))
            elif variant == "per_token":
                found.append(exact.rank([a / b for a, b in zip(own.losses, own.num_tokens, strict=True)]))
            else:
                rows = [row for row in batch if row.losses]
                prompt = max(row.prompt_length for row in rows)
                targets = [max(r.target_lengths[min(i, len(r.losses))] for r in rows) for i in range(len(own.losses))]
                found.append(exact.rank([a / (prompt + b - 1) for a, b in zip(own.losses, targets, strict=True)]))
    return found


def _score_candidates(items: Sequence[Item], given: Sequence[Given], section: BenchmarkConfig) -> list[Metric]:
    chance = sum(1 / len(item.candidates) for item in items) / len(items)
    metrics = []
    for variant in section.variants:
        best = [own[:1] for own in ranks(given, variant, section.batch_size)]
        values = [own == [item.row["answer"]] for own, item in zip(best, items, strict=True)]
        metrics.append(mean_metric("accuracy", variant, values, chance))
    return metrics


def _score_refcoco(items: Sequence[Item], given: Sequence[Given], section: BenchmarkConfig) -> list[Metric]:
    """With and without the answers of further rounds, if there are any."""
    rows, metrics = [item.row for item in items], []
    modes = {"reference": 1, "reference_resample": boxes.NUM_FREE_ROUNDS + 1}
    for variant, num_rounds in modes.items():
        if num_rounds == 1 or any(len(own.texts) > 1 for own in given):
            taken = [boxes.taken_answer(own.texts[:num_rounds]) for own in given]
            metrics.append(mean_metric("accuracy (IoU > 0.5)", variant, boxes.hits(rows, taken)))
    return metrics


def _submit_refcoco(items: Sequence[Item], given: Sequence[Given]) -> Any:
    return boxes.predictions([item.row for item in items], [boxes.taken_answer(own.texts) for own in given])


def _submit_hm(items: Sequence[Item], given: Sequence[Given]) -> Any:
    """The challenge's columns; an answer has no probability other than 0 and 1."""
    labels = [int(exact.matches_hm(own.text, 1)) for own in given]
    return [{"id": item.id, "proba": label, "label": label} for item, label in zip(items, labels, strict=True)]


def _submit_iconqa(items: Sequence[Item], given: Sequence[Given]) -> Any:
    best = [own[:1] for own in ranks(given, "per_token", 1)]
    return {"results": {str(item.row["image_id"]): own[0] for item, own in zip(items, best, strict=True) if own}}


def _score_chair(items: Sequence[Item], given: Sequence[Given], section: BenchmarkConfig) -> list[Metric]:
    objects, truths = chair_objects(section, "objects"), [item.row["objects"] for item in items]
    return [m for variant in section.variants for m in chair.chair_metrics(_texts(given), truths, variant, objects)]


def _score_captions(items: Sequence[Item], given: Sequence[Given], section: BenchmarkConfig) -> list[Metric]:
    references = [item.row["captions"] for item in items]
    return [m for variant in section.variants for m in caption_metrics(_texts(given), references, variant)]


def _score_loss(items: Sequence[Item], given: Sequence[Given], section: BenchmarkConfig) -> list[Metric]:
    """Nats per token, which depends on the tokenizer, and per word; without a value where a row has an error."""
    losses = [own.losses[0] if own.losses else math.nan for own in given]
    tokens = [own.num_tokens[0] if own.num_tokens else 0 for own in given]
    words = [len(item.candidates[0].split()) for item in items]
    per = {"per_token": tokens, "per_word": words}
    return [Metric("loss (nats)", v, np.stack([losses, np.asarray(per[v], float)], -1)) for v in section.variants]


def _says(*words: str) -> Callable[[str], bool]:
    return lambda text: text.strip().strip(".").lower() in words


_VQA = Benchmark(
    readers.read_vqa, VQA_PROMPT, _score_vqa, tuple(vqa.ACCURACIES), 3, submit=_list("answer")
)  # fmt: skip
_CAPTIONS = Benchmark(
    read_captions, "[caption] please describe this image?", _score_captions, ("simple", "ptb", "raw"), 1,
    submit=_list("caption", "image_id"),
)  # fmt: skip
_REFERENCE = (("reference",), 1)


def _refcoco(name: str, *splits: str) -> Benchmark:
    return Benchmark(
        readers.read_refcoco(name, splits), "[refer] give me the location of {question}", _score_refcoco, *_REFERENCE,
        is_parsed=lambda text: boxes.taken_answer([text]) is not None, submit=_submit_refcoco,
        ask_again=boxes.ask_again,
    )  # fmt: skip


BENCHMARKS = {
    "pope": Benchmark(
        readers.read_pope, "{question}", _score_pope, ("official", "opera", "lmms_eval"), 2, yes_no.is_parsed,
        lambda items, given: [
            {"question_id": _id(i), "question": i.question, "answer": g.text} for i, g in zip(items, given, strict=True)
        ],
        "jsonl",
    ),
    "chair": Benchmark(
        read_chair, "Please describe this image in detail.", _score_chair, tuple(chair.VARIANTS), 2,
        submit=_list("caption", "image_id"),
    ),
    "vqav2": _VQA,
    "okvqa": _VQA,
    "aokvqa": replace(
        _VQA, read=readers.read_aokvqa, variants=("allenai", *vqa.ACCURACIES), num_default=4,
        submit=lambda items, given: {item.id: own.text for item, own in zip(items, given, strict=True)},
    ),
    "vizwiz": Benchmark(
        readers.read_vizwiz, _VIZWIZ_PROMPT, _score_vqa, ("reference", *vqa.ACCURACIES), 1,
        submit=_list("answer", "image"),
    ),
    "gqa": Benchmark(
        readers.read_gqa, VQA_PROMPT, exact_score(exact.matches_gqa, "answer"), *_REFERENCE,
        submit=lambda items, given: [
            {"questionId": item.id, "prediction": own.text.lower()} for item, own in zip(items, given, strict=True)
        ],
    ),
    "vsr": Benchmark(
        readers.read_vsr, "[vqa] Based on the image, is this statement true or false? {question}",
        exact_score(exact.matches_vsr, "label"), *_REFERENCE, _says("true", "false"), _list("answer", "id"),
    ),
    "hm": Benchmark(
        readers.read_hm, _HM_PROMPT, exact_score(exact.matches_hm, "label"), *_REFERENCE, _says("yes", "no"),
        _submit_hm, "csv",
    ),
    "iconvqa": Benchmark(
        readers.read_iconvqa, VQA_PROMPT, _score_candidates, ("reference", "per_token", "sum"), 2,
        submit=_submit_iconqa,
    ),
    "refcoco": _refcoco("refcoco", "val", "testA", "testB"),
    "refcoco+": _refcoco("refcoco+", "val", "testA", "testB"),
    "refcocog": _refcoco("refcocog", "val", "test"),
    "coco_caption": _CAPTIONS,
    "nocaps": _CAPTIONS,
    "easy_vqa": Benchmark(
        readers.read_easy_vqa, "{question}", exact_score(exact.matches_text, "answer", "exact", _easy_vqa_kind),
        ("exact",), 1, submit=_list("answer"),
    ),
    "caption_loss": Benchmark(
        read_caption_loss, "{question}", _score_loss, ("per_token", "per_word"), 2,
    ),
}  # fmt: skip


def find_benchmark(name: str, section: str) -> Benchmark:
    """A benchmark by name; UserError, which names the section, for others."""
    if name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise UserError(f"{section}: '{name}' is no benchmark.{nearest(name, BENCHMARKS)} Known: {known}.")
    return BENCHMARKS[name]
