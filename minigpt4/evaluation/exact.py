"""Exact matches as the reference's evaluation of GQA, VSR, Hateful Memes, IconQA and others decides on them."""

from collections.abc import Sequence


def matches_gqa(answer: str, label: str) -> bool:
    """The answer in lower case is the label, which keeps its case: "TV" as a label is never matched."""
    return answer.lower() == label


def matches_vsr(answer: str, label: int) -> bool:
    """ "true" for label 1, "false" for all others, and nothing else."""
    return answer.lower() == ("true" if label == 1 else "false")


def matches_hm(answer: str, label: int) -> bool:
    """Hateful Memes: "yes" for 1, "no" for 0, apart from case and blanks around it."""
    return {"yes": 1, "no": 0}.get(answer.lower().strip()) == label


def matches_text(answer: str, label: str) -> bool:
    """The label apart from case, blanks around it and full stops at the end."""
    return answer.strip().rstrip(".").strip().lower() == label.strip().lower()


def split_choices(choices: Sequence[str]) -> list[str]:
    """The candidates that the reference ranks: it joins choices by "_", so that one with this sign becomes several."""
    return "_".join(choices).split("_")


def rank(losses: Sequence[float]) -> list[int]:
    """Indices of candidates, the least loss first; of equal ones, the first."""
    return sorted(range(len(losses)), key=lambda index: losses[index])
