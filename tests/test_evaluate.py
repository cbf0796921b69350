"""evaluate.py from annotation files to table and JSON: answering, resuming, scoring, and refusals."""

import json
from argparse import Namespace
from contextlib import nullcontext
from random import Random

import family
import pytest
import serving
from golden_evaluation import read_json, read_text

import demo
import evaluate
from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Chat
from minigpt4.evaluation.answering import LocalModel, Server, prompt_of
from minigpt4.evaluation.benchmarks import BENCHMARKS, Given, ranks
from minigpt4.evaluation.items import BenchmarkConfig, Item
from minigpt4.evaluation.tasks import answer, find_work, score_all
from minigpt4.processors import Blip2ImageEvalProcessor
from quickstart import easy_vqa, scenes
from quickstart.benchmarks import write_benchmarks

CONFIG = "eval_configs/quickstart_benchmarks.yaml"
GOLDEN_FILES = {
    "gqa": "exact/gqa_testdev_balanced_questions.json",
    "vsr": "exact/vsr_zeroshot_test.jsonl",
    "vizwiz": "exact/vizwiz_val.json",
    "hm": "exact/hatefulmemes_dev.jsonl",
    "iconvqa": "exact/iconqa_choose_text_val.json",
}


class Configuration:
    """Sections of benchmarks as ``find_work`` reads them."""

    def __init__(self, **sections):
        self.config = {"evaluation_datasets": sections}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three scenes with their benchmarks."""
    folder = tmp_path_factory.mktemp("world")
    held_out = scenes.write_alignment(folder / "held_out", 3, seed=3, held_out=True)
    write_benchmarks(folder / "benchmarks", held_out)
    return folder


@pytest.fixture
def run(world, chat, tmp_path, monkeypatch):
    """Runs evaluate.py in this process with the shared model; ``builds`` counts how often it was loaded."""
    builds = []

    def build_chat(args):
        builds.append(args)
        return chat

    monkeypatch.setattr(demo, "build_chat", build_chat)

    def evaluation(dataset=None, *options, **flags):
        places = [f"pope.{key}={world}/{value}" for key, value in PLACES.items()]
        places += [f"{name}.img_path={world}/held_out/image" for name in ("chair", "coco_caption")]
        places += [f"chair.eval_file_path={world}/benchmarks", f"chair.objects={world}/benchmarks/objects.json"]
        places += [f"coco_caption.eval_file_path={world}/benchmarks/captions_scenes.json"]
        places += [f"caption_loss.eval_file_path={world}/held_out", "chair.max_new_tokens=5", "pope.max_new_tokens=3"]
        places = [f"evaluation_datasets.{text}" for text in [*places, "coco_caption.max_new_tokens=5"]]
        defaults = {"cfg_path": CONFIG, "out": str(tmp_path / "out"), "resample": False, "score_only": None}
        defaults |= {"api_url": None, "api_model": None, "api_stop": None, "gpu_id": None, "dataset": dataset}
        options = ["run.device=cpu", "model.ckpt=null", *places, *options]
        return evaluate.evaluate(Namespace(**defaults | {"options": options} | flags))

    evaluation.builds, evaluation.out = builds, tmp_path / "out"
    return evaluation


ONE_SPLIT = "evaluation_datasets.pope.splits=[scenes_random]"
PLACES = {"eval_file_path": "benchmarks", "img_path": "held_out/image"}


def test_all_benchmarks_of_the_small_world(run):
    rows = run()
    content = json.loads((run.out / "results.json").read_text())
    assert {row["benchmark"] for row in rows} == {"pope", "chair", "coco_caption", "caption_loss"}
    assert {row["split"] for row in rows if row["benchmark"] == "pope"} == {
        "scenes_random", "scenes_popular", "scenes_adversarial",
    }  # fmt: skip
    for row in content["results"]:
        assert {"rows", "metric", "variant", "value", "interval", "chance", "unparsed", "errors"} <= row.keys()
    settings = content["settings"]["pope_scenes_random"]
    assert settings["prompt"] == "{question}" and settings["precision"] and settings["max_new_tokens"] == 3
    assert settings["template"].endswith("{question}###Assistant:") and "torch" in content["packages"]
    table = (run.out / "results.md").read_text().splitlines()
    assert (
        len(table) == len(rows) + 2
        and "| pope | scenes_random |"
        in table[-len(rows) + rows.index(next(row for row in rows if row["split"] == "scenes_random"))]
    )
    losses = {row["variant"]: row["value"] for row in rows if row["benchmark"] == "caption_loss"}
    assert losses["per_token"] > 1 and losses["per_word"] > losses["per_token"]


def test_an_interrupted_evaluation_continues_and_a_finished_one_loads_nothing(run, world, tmp_path):
    rows = run("pope", ONE_SPLIT)
    file = run.out / "answers" / "pope_scenes_random.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert run("pope", ONE_SPLIT) == rows and len(run.builds) == 1
    file.write_bytes(b"".join(lines[:-2]) + lines[-2][:5])  # killed in the middle of a row
    assert run("pope", ONE_SPLIT) == rows and len(run.builds) == 2
    assert sorted(file.read_bytes().splitlines(keepends=True)) == sorted(lines)
    with pytest.raises(UserError, match=r"other settings .*max_new_tokens was 3 and is 4.*--out"):
        run("pope", ONE_SPLIT, "evaluation_datasets.pope.max_new_tokens=4")
    section = "evaluation_datasets.pope.eval_file_path"
    folder, source = tmp_path / "other", world / "benchmarks" / "scenes_pope_random.json"
    folder.mkdir()
    (folder / source.name).write_text(source.read_text().replace("Is there a", "Do you see a"))
    with pytest.raises(UserError, match=r"other questions \(question 1 was 'Is there a .*not 'Do you see a .*--out"):
        run("pope", ONE_SPLIT, f"{section}={folder}")


def test_each_image_is_encoded_once(run, chat, monkeypatch):
    encoded, encode = [], chat.model.encode_img

    def count(image):
        encoded.append(len(image))
        return encode(image)

    monkeypatch.setattr(chat.model, "encode_img", count)
    run("pope", ONE_SPLIT)
    assert sum(encoded) == 3
    run("caption_loss")
    assert sum(encoded) == 6


def test_processes_share_the_images_and_the_first_one_scores_all(run, monkeypatch):
    expected = run("pope", ONE_SPLIT, out=str(run.out / "alone"))
    for rank in (0, 1):
        monkeypatch.setattr(dist_utils, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(dist_utils, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist_utils, "gather_objects", lambda value: [value])
        monkeypatch.setattr(dist_utils, "run_on_main", lambda score, rank=rank: score() if rank else [])
        rows = run("pope", ONE_SPLIT, out=str(run.out / "two"))
    assert rows == expected
    parts = [(run.out / "two/answers" / f"pope_scenes_random.rank{rank}.jsonl").read_text() for rank in (0, 1)]
    assert all(parts) and not set(parts[0].splitlines()) & set(parts[1].splitlines())


def test_a_server_gives_the_answers_of_the_model(run, chat, tmp_path):
    section = "evaluation_datasets.pope"
    options = ("pope", ONE_SPLIT, f"{section}.system=Answer in one word.")  # behind the template's, here and there
    expected = run(*options)
    settings = json.loads((run.out / "results.json").read_text())["settings"]["pope_scenes_random"]
    assert settings["system"] == "Answer in one word."
    server = serving.Server(chat, max_queue=64)
    try:
        again = {"api_url": server.url, "out": str(tmp_path / "api")}
        assert run(*options, **again) == expected
        file = tmp_path / "api" / "answers" / "pope_scenes_random.jsonl"
        file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))  # interrupted
        assert run(*options, **again) == expected
        results = json.loads((tmp_path / "api" / "results.json").read_text())
        assert results["settings"]["pope_scenes_random"]["api_model"] == serving.NAME
        for wrong, message in (
            (f"{section}.num_beams=2", "num_beams: 2 cannot"),
            (f"{section}.system=''", "system: ''"),
        ):
            with pytest.raises(UserError, match=message):
                run("pope", ONE_SPLIT, wrong, api_url=server.url, out=str(tmp_path / "other"))
        with pytest.raises(UserError, match=r"cannot rank .* evaluation_datasets\.caption_loss"):
            run("pope,caption_loss", ONE_SPLIT, api_url=server.url, out=str(tmp_path / "none"))
        assert not (tmp_path / "none").exists()  # found before anything is asked
        with pytest.raises(UserError, match=r"--api-url.*404"):
            Server(f"{server.url}/nothing")
    finally:
        server.close()
    assert run(*options, **again) == expected  # all is answered: nobody is asked
    with pytest.raises(UserError, match="does not answer"):
        Server("http://127.0.0.1:9")


def golden_section(name, tmp_path):
    """A section for a golden file, without images."""
    file = tmp_path / GOLDEN_FILES[name].split("/")[1]
    file.write_text(read_text(GOLDEN_FILES[name]), encoding="utf-8")
    return {"eval_file_path": str(file), "img_path": "IMG", "max_new_tokens": 20, "batch_size": 10}


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_prompts_images_and_score_of_the_reference(name, tmp_path):
    golden, answers = read_json("exact/golden.json")[name], read_json("exact/answers.json")
    work = find_work(Configuration(**{name: golden_section(name, tmp_path)}), None, needs_images=False)
    items, section = work[0].items, work[0].section
    prompts = [f"<s>[INST] <Img><ImageHere></Img> {prompt_of(item, section)} [/INST]" for item in items[:3]]
    assert prompts == golden["first_prompts"] and [item.image for item in items[:3]] == golden["first_images"]
    file = tmp_path / "answers.jsonl"
    if name == "iconvqa":
        losses = answers["iconqa_candidate_losses"]
        rows = [{"losses": own[: len(item.candidates)]} for own, item in zip(losses, items, strict=True)]
    else:
        rows = [{"answer": text} for text in answers[name]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = score_all(work, tmp_path, str(file))
    assert 100 * table[0]["value"] == pytest.approx(golden["score"], abs=1e-9) and table[0]["rows"] == golden["n"]


def test_okvqa_with_the_files_of_the_reference(tmp_path):
    names = {"questions": "OpenEnded_mscoco_val2014_questions_clean", "annotations": "mscoco_val2014_annotations_clean"}
    for kind, name in names.items():
        (tmp_path / f"{name}.json").write_text(read_text(f"vqa/{kind}.json"), encoding="utf-8")
    section = {"eval_file_path": str(tmp_path), "img_path": "IMG"}
    work = find_work(Configuration(okvqa=section), None, needs_images=False)
    golden = read_json("exact/golden.json")["okvqa"]
    assert [item.image for item in work[0].items[:3]] == golden["first_images"]
    (tmp_path / "results").write_text(read_text("vqa/results.json"), encoding="utf-8")
    table = score_all(work, tmp_path / "out", str(tmp_path / "results"))
    values = {(row["metric"], row["variant"]): round(100 * row["value"], 2) for row in table}
    assert values["accuracy", "official"] == golden["score"] and values["accuracy", "lavis"] == 42.68
    assert values["accuracy (yes/no)", "lmms_vqav2"] == 86.43


class ScriptedAnswers:
    """Answers a row's n-th question with its n-th golden answer."""

    def __init__(self, answers):
        self.answers, self.calls, self.questions = answers, [0] * len(answers), []

    def __call__(self, items, section):
        for item in items:
            number = int(item.id)
            yield [{"question_id": item.id, "answer": self.answers[number][self.calls[number]]}]
            self.calls[number] += 1
            self.questions.append((number, prompt_of(item, section)))


def test_refcoco_with_and_without_asking_again(tmp_path):
    golden = read_json("refcoco/golden.json")
    (tmp_path / "refcoco").mkdir()
    for split in golden:
        (tmp_path / "refcoco" / f"refcoco_{split}.json").write_text(read_text(f"refcoco/refcoco_{split}.json"))
    section = {"eval_file_path": str(tmp_path), "img_path": "IMG"}
    for part in find_work(Configuration(refcoco=section), None, needs_images=False):
        own, answers = golden[part.split], [row["answers"] for row in read_json("refcoco/answers.json")[part.split]]
        scripted, out = ScriptedAnswers(answers), tmp_path / part.split
        answer([part], out, {}, lambda scripted=scripted: (scripted, {}), asks_again=True)
        assert scripted.calls == own["resample"]["calls_per_row"]
        plain, again = score_all([part], out)
        assert (100 * plain["value"], 100 * again["value"]) == pytest.approx(
            (own["plain"]["accuracy"], own["resample"]["accuracy"])
        )
        saved = json.loads((out / "submissions" / f"refcoco_{part.split}.json").read_text())
        assert saved == own["resample"]["predictions"]


def test_candidates_are_ranked_by_the_losses_of_training(chat, world):
    local, image = LocalModel(chat), str(world / "held_out/image/0.jpg")
    candidates = ("yes", "no", "a large purple circle is at the top")
    item, section = Item("0", image, "What is it?", {"answer": 0}, candidates), BenchmarkConfig(prompt="{question}")
    ((row,),) = local([item], section)
    pixels = chat.preprocess_image(image)[None]
    for candidate, loss, count in zip(candidates, row["losses"], row["num_tokens"], strict=True):
        samples = {"image": pixels, "text_input": [candidate], "instruction_input": [local.example(item, section)]}
        expected = chat.model(samples)
        assert count == expected["num_targets"]
        assert loss == pytest.approx((expected["loss"] * count).item(), rel=1e-2)  # bf16 of other batch shapes


def test_the_later_family_is_asked_and_ranked_as_the_reference_does():
    item = Item("0", str(family.picture(0)), "What is item 0 in the picture?", {}, ("yes", "no", "a cake"))
    section = BenchmarkConfig(prompt=BENCHMARKS["gqa"].prompt)
    local = {}
    for member in ("v2", "llama2"):
        model = family.shared(member)
        processor = Blip2ImageEvalProcessor(family.DIMS["image_size"][member])
        local[member] = LocalModel(Chat(model, processor, model.device, template=model.template))
    assert local["v2"].example(item, section) == read_json("exact/golden.json")["gqa"]["first_prompts"][0]
    chat, prompt = local["llama2"].chat, local["llama2"].example(item, section)
    ((row,),) = local["llama2"]([item], section)
    lengths = [row["prompt_length"] + length - 1 for length in row["target_lengths"][:-1]]
    own = [loss / length for loss, length in zip(row["losses"], lengths, strict=True)]
    answers = [[candidate] for candidate in item.candidates]
    expected = chat.model.candidate_losses(chat.preprocess_image(item.image)[None], [prompt], answers)
    assert own == pytest.approx(expected[0].tolist(), rel=1e-5)


def test_ranks_by_the_reference_and_per_token():
    batch = [Given(losses=(4.0, 6.0), num_tokens=(2, 6), target_lengths=(2, 12, 3), prompt_length=9)]
    assert ranks(batch, "sum", 10) == [[0, 1]] and ranks(batch, "per_token", 10) == [[1, 0]]
    assert ranks(batch, "reference", 10) == [[1, 0]]  # 4 / 10 and 6 / 20
    longer = Given(losses=(1.0,), num_tokens=(2,), target_lengths=(32, 3), prompt_length=9)
    assert ranks([*batch, longer], "reference", 10)[0] == [0, 1]  # 4 / 40 and 6 / 20: the longest of the batch counts
    assert ranks([*batch, longer], "reference", 1)[0] == [1, 0]


def test_a_damaged_image_is_a_counted_row(run, world, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("0.jpg", "1.jpg", "2.jpg"):
        (folder / name).write_bytes((world / "held_out/image" / name).read_bytes()[: None if name == "0.jpg" else 50])
    rows = run("pope", f"evaluation_datasets.pope.img_path={folder}", ONE_SPLIT)
    assert all(0 < row["errors"] < row["rows"] for row in rows)
    answers = (run.out / "answers" / "pope_scenes_random.jsonl").read_text()
    assert answers.count('"error"') == rows[0]["errors"] and answers.count("\n") == rows[0]["rows"]
    assert f"{rows[0]['errors']} of {rows[0]['rows']} questions have errors" in capsys.readouterr().err


@pytest.mark.parametrize(("errors", "status"), [((2, 2), 1), ((2, 0), None)])
def test_the_exit_status_is_1_where_all_rows_have_errors(errors, status, monkeypatch, capsys):
    empty = dict.fromkeys(("value", "interval", "chance"))
    names = {"benchmark": "pope", "split": "x", "metric": "accuracy", "variant": "official", "unparsed": 1.0}
    rows = [{**names, **empty, "rows": 2, "errors": number} for number in errors]
    monkeypatch.setattr(evaluate, "evaluate", lambda args: rows)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--cfg-path", CONFIG])
    with pytest.raises(SystemExit) if status else nullcontext() as stopped:
        evaluate.main()
    assert "| accuracy |" in capsys.readouterr().out and (stopped is None or stopped.value.code == status)


def test_resample_without_a_benchmark_of_boxes_is_refused(run):
    with pytest.raises(UserError, match=r"--resample .* leave it out"):
        run("pope", ONE_SPLIT, resample=True)


def test_every_benchmark_has_a_prompt_and_default_variants():
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.prompt and 0 < benchmark.num_default <= len(benchmark.variants), name


def test_easy_vqa_by_kind_of_question_and_its_training_rows(tmp_path):
    questions = [
        ["what color is the shape?", "red", 0],
        ["is there a circle?", "yes", 0],
        ["what shape is in it?", "circle", 1],
    ]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps({"answer": text}) + "\n" for text in ("Red.", "no", "Circle"))
    )
    work = find_work(Configuration(easy_vqa={"eval_file_path": str(tmp_path)}), None, needs_images=False)
    values = {row["metric"]: row["value"] for row in score_all(work, tmp_path / "out", str(tmp_path / "answers.jsonl"))}
    kinds = {"accuracy (colour)": 1, "accuracy (yes/no)": 0, "accuracy (shape)": 1}
    assert values == {"accuracy": pytest.approx(2 / 3)} | kinds
    rows = easy_vqa.conversations(questions, tmp_path, Random(1))
    assert [len(row["conversations"]) for row in rows] == [4, 2]
    assert rows[1]["conversations"][1] == {"from": "gpt", "value": "Circle."}
    assert rows[1]["conversations"][0]["value"] == "<image>\nwhat shape is in it?"
