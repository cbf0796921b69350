"""What an evaluation does: it finds the questions of all benchmarks, has them answered, and scores the answers."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.errors import UserError, nearest
from minigpt4.common.files import refuse_placeholder
from minigpt4.common.schema import read_section
from minigpt4.evaluation.answering import Answerer, answer_all, by_image
from minigpt4.evaluation.answers import AnswerFile, collect, read_answers, read_rows, read_settings
from minigpt4.evaluation.benchmarks import Benchmark, find_benchmark
from minigpt4.evaluation.items import BenchmarkConfig, Item, Row, check_images, read_easy_vqa, select
from minigpt4.evaluation.report import score, write_results, write_submission

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """A split of a benchmark."""

    name: str  # of the section
    split: str
    benchmark: Benchmark
    section: BenchmarkConfig
    items: Sequence[Item]

    @property
    def file_name(self) -> str:
        """The name of its files."""
        return f"{self.name}_{self.split}".replace("/", "_")

    def settings(self, shared: Settings) -> dict[str, Any]:
        """What its answers depend on."""
        names = ("prompt", "system", "max_new_tokens", "num_beams")
        return {**shared, **{name: getattr(self.section, name) for name in names}}


def find_work(cfg: Config, names: str | None, needs_images: bool = True) -> list[Work]:
    """All splits of the benchmarks of a configuration, or of those named; UserError where a file is wrong."""
    sections = cfg.config.get("evaluation_datasets") or {}
    chosen = list(dict.fromkeys(name.strip() for name in names.split(","))) if names is not None else list(sections)
    if unknown := [name for name in chosen if name not in sections]:
        hint = f"{nearest(unknown[0], sections)} It has: {', '.join(sections) or 'none'}."
        raise UserError(f"--dataset: evaluation_datasets has no '{unknown[0]}'.{hint}")
    if not chosen:
        raise UserError("The file has no section evaluation_datasets; docs/EVALUATION.md shows one.")
    work = []
    for name in chosen:
        where = f"evaluation_datasets.{name}"
        section = read_section(BenchmarkConfig, sections[name], where)
        benchmark = find_benchmark(section.benchmark or name, where)
        section = replace(section, prompt=benchmark.prompt if section.prompt is None else section.prompt)
        section = benchmark.with_variants(section, where)
        if not section.eval_file_path and benchmark.read is not read_easy_vqa:
            raise UserError(f"{where}.eval_file_path is not set; docs/EVALUATION.md names the files of each benchmark.")
        refuse_placeholder(section.eval_file_path or "", f"{where}.eval_file_path", "the benchmark's file or folder")
        try:
            found = benchmark.read(section, where)
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{where}: {section.eval_file_path} has another layout ({reason}); give the published annotation file."
            ) from error
        if unknown := [split for split in section.splits if split not in found]:
            raise UserError(f"{where}.splits has '{unknown[0]}'; the files have: {', '.join(found) or 'none'}.")
        for split in section.splits or found:
            items = select(found[split], section, where)
            if "{question}" not in section.prompt and len({item.question for item in items}) > 1:
                raise UserError(f"{where}.prompt has no {{question}}, so that all questions would be the same; add it.")
            if not (section.prompt.strip() or items[0].candidates or any(item.question for item in items)):
                raise UserError(f"{where}.prompt is empty; remove it, or write what is asked.")
            if needs_images:
                check_images(items, where)
            work.append(Work(name, split, benchmark, section, items))
    if not work:
        raise UserError("There is nothing to evaluate: the annotation folders hold no files.")
    return work


def answer(
    work: Sequence[Work],
    out: Path,
    settings: Settings,
    build: Callable[[], tuple[Answerer, Settings]],
    asks_again: bool = False,
) -> None:
    """Has all questions answered that ``out`` has no answers to; processes of one run take parts of the images.

    ``build`` loads the model, which happens only where an answer is missing, and returns who answers and what further
    settings answers depend on.
    """
    rank, world_size, built = dist_utils.get_rank(), dist_utils.get_world_size(), None
    for part in work:
        ask_again = part.benchmark.ask_again if asks_again else None
        images = {image: i for i, image in enumerate(dict.fromkeys(item.image for item in part.items))}
        own = [item for item in part.items if images[item.image] * world_size // len(images) == rank]
        file = AnswerFile(out / "answers", part.file_name, rank, world_size)
        try:
            file.check_settings(part.settings(settings))
            file.check_questions(part.items)
            if ask_again or any((item.id, 0) not in file.rows for item in own):
                built = built or build()
                file.check_settings(part.settings({**settings, **built[1]}))
                answer_all(built[0], by_image(own), part.section, file, ask_again)
        finally:
            file.close()


def score_all(work: Sequence[Work], out: Path, answers: str | None = None) -> list[Row]:
    """Scores all answers in ``out``, or those of another program, and writes table, JSON and submissions."""
    if answers and len(work) > 1:
        names = ", ".join(f"{part.name} ({part.split})" for part in work)
        raise UserError(f"--score-only has the answers to one split, and there are {names}; use --dataset and splits.")
    table, settings = [], {}
    for part in work:
        if answers:
            rows, own = read_answers(Path(answers), part.items), {"answers": answers}
        else:
            place = out / "answers", part.file_name
            rows, own = read_rows(*place), read_settings(*place)
        given = collect(part.items, rows)
        errors = [(item.id, rows[item.id, 0]["error"]) for item in part.items if "error" in rows[item.id, 0]]
        if errors:
            text = "%s: %d of %d questions have errors and count as wrong, such as question %s: %s"
            logging.warning(text, part.file_name, len(errors), len(part.items), *errors[0])
        table += score(part.name, part.split, part.benchmark, part.section, part.items, given, len(errors))
        settings[part.file_name] = own
        if part.benchmark.submit is not None and not answers:
            content = part.benchmark.submit(part.items, given)
            write_submission(out / "submissions", part.file_name, content, part.benchmark.submission_form)
    write_results(out, table, settings)
    return table
