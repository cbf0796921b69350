"""POPE (Li et al., 2023): answers as yes or no by the rules of three programs, and what follows from the counts."""

import re
from collections.abc import Sequence
from functools import partial

import numpy as np

from minigpt4.evaluation.metric import Metric, ratio

_SAYS_YES_OR_NO = re.compile(r"\b(?:yes|no|not|cannot)\b|n't\b", re.IGNORECASE)


def says_official(answer: str) -> bool:
    """Whether an answer means yes: anything without "No", "not" or "no" among the words of its first sentence."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def says_opera(answer: str) -> bool:
    """OPERA's rule: all sentences, and also "NO" and words that end in "n't"."""
    words = answer.replace(".", "").replace(",", "").split(" ")
    return not any(word in ("No", "not", "no", "NO") or word.endswith("n't") for word in words)


def says_lmms_eval(answer: str) -> bool | None:
    """lmms-eval's rule: the whole answer is "yes" or "no"; None for all others, which are wrong."""
    return {"yes": True, "no": False}.get(answer.strip().lower())


def is_parsed(answer: str) -> bool:
    """Whether an answer says yes or no at all; by the official rule, every other one means yes."""
    return _SAYS_YES_OR_NO.search(answer) is not None


PARSERS = {"official": says_official, "opera": says_opera, "lmms_eval": says_lmms_eval}


def count(answers: Sequence[str], labels: Sequence[bool], variant: str) -> np.ndarray:
    """TP, FP, TN, FN and what could not be parsed for labels yes and no, float64 [n, 6]; each row has one 1."""
    counts = np.zeros((len(answers), 6))
    for row, answer, label in zip(counts, answers, labels, strict=True):
        says = PARSERS[variant](answer)
        places = (4, 5) if says is None else (0, 1) if says else (3, 2)
        row[places[0 if label else 1]] = 1
    return counts


def _share(name: str, variant: str, totals: np.ndarray) -> np.ndarray:
    """A ratio of totals [..., 6]; precision, and with it F1, is not defined without a "yes"."""
    tp, fp, tn, fn, other_yes, other_no = np.moveaxis(totals, -1, 0)
    total = tp + fp + tn + fn + other_yes + other_no
    is_lmms_eval = variant == "lmms_eval"
    parts = {
        "accuracy": (tp + tn, total),
        "precision": (tp, tp + fp),
        "recall": (tp, tp + fn),
        "f1": (2 * tp, np.where(tp + fp, 2 * tp + fp + fn, 0)),
        "yes_ratio": (tp + fn + other_yes if is_lmms_eval else tp + fp, total),
    }
    value = ratio(np.stack(parts[name], -1))
    return np.nan_to_num(value) if is_lmms_eval else value


def pope_metrics(answers: Sequence[str], labels: Sequence[bool]) -> list[Metric]:
    """Accuracy, precision, recall, F1 and share of yes by each rule.

    Without a "yes", precision and F1 have no value (the official program ends with an error). lmms-eval prints 0 for
    what has no value, leaves answers that it cannot parse out of recall and F1, and its share of yes is the labels'.
    """
    share = sum(labels) / len(labels)
    chances = {"accuracy": 0.5, "precision": share, "recall": 0.5, "f1": 2 * share * 0.5 / (share + 0.5)}
    metrics = []
    for variant in PARSERS:
        counts = count(answers, labels, variant)
        num_unparsed = int(counts[:, 4:].sum()) if variant == "lmms_eval" else None
        for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
            finish = partial(_share, name, variant)
            metrics.append(Metric(name, variant, counts, finish, chances.get(name), num_unparsed=num_unparsed))
    return metrics
