"""Metrics give the values of the original programs on all golden rows (tests/golden/README.md)."""

import shutil

import numpy as np
import pytest
from golden_evaluation import read_json, read_rows

from minigpt4.common.boxes import box_iou
from minigpt4.evaluation import boxes, captions, chair, exact, vqa, yes_no
from minigpt4.evaluation.metric import mean_metric

SUBSETS, SETS = ("random", "popular", "adversarial"), ("short", "sentence", "odd", "all_yes", "all_no")


def pope(subset, answers):
    labels = [row["label"] == "yes" for row in read_rows(f"pope/coco_pope_{subset}.json")]
    return [row["answer"] for row in read_rows(f"pope/answers_{subset}_{answers}.jsonl")], labels


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("answers", SETS)
def test_pope_has_the_counts_and_ratios_of_three_programs(subset, answers):
    golden, (texts, labels) = read_json("pope/golden.json")[f"{subset}/{answers}"], pope(subset, answers)
    metrics = {(metric.variant, metric.name): metric for metric in yes_no.pope_metrics(texts, labels)}
    for variant in yes_no.PARSERS:
        expected = golden[variant]
        if "TP" in expected:
            counts = metrics[variant, "f1"].sums.sum(0)[:4].tolist()
            assert counts == [expected[name] for name in ("TP", "FP", "TN", "FN")]
        if "error" in expected:  # the original ends there; what is defined is reported
            assert metrics[variant, "precision"].value is metrics[variant, "f1"].value is None
            assert metrics[variant, "accuracy"].value == 0.5 and metrics[variant, "recall"].value == 0
        for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
            if name in expected:
                assert metrics[variant, name].value == pytest.approx(expected[name], abs=1e-9), (variant, name)
    for variant, says in (("official", yes_no.says_official), ("opera", yes_no.says_opera)):
        assert "".join("01"[says(text)] for text in texts) == golden[f"{variant}_pred"]


def test_pope_verdict_of_every_form_of_an_answer():
    for row in read_json("pope/single_answers.json"):
        for variant, says in yes_no.PARSERS.items():
            assert says(row["answer"]) == {"yes": True, "no": False, None: None}[row[variant]], (variant, row)


def test_answers_without_yes_and_no_are_known():
    assert [yes_no.is_parsed(text) for text in ("Yes.", "It isn't", "a car", "", "Nothing", "know")] == [True] * 2 + [
        False
    ] * 4


@pytest.mark.parametrize("name", ["minigpt4_greedy", "instructblip_greedy"])
@pytest.mark.parametrize("variant", ["opera_nltk", "standalone_pattern"])
def test_chair_of_recorded_lemmas(name, variant):
    truths, objects = read_json("chair/ground_truth.json"), chair.coco_objects()
    changes = {"opera_nltk": "nltk_lemmas", "standalone_pattern": "pattern_singulars"}[variant]
    sums = []
    for row, golden in zip(
        read_rows(f"chair/{name}.tokens.jsonl"), read_rows(f"chair/{name}.{variant}.jsonl"), strict=True
    ):
        lemmas, truth = row["tokens"].split(" "), truths[str(row["image_id"])]
        for position, lemma in row[changes].items():
            lemmas[int(position)] = lemma
        found = chair.find_objects(lemmas, objects)
        wrong = [
            mention
            for mention in zip(found.words, found.nodes, found.positions, strict=True)
            if mention[1] not in truth
        ]
        assert (found.words, found.nodes, found.num_tokens) == (golden["words"], golden["node_words"], golden["len"])
        assert [list(mention[:2]) for mention in wrong] == golden["hallucinated"]
        assert [mention[2] for mention in wrong] == golden["hallucination_idxs"]
        assert sorted(set(found.nodes) & set(truth)) == golden["recalled"] and len(truth) == golden["n_gt"]
        sums.append(chair.row_sums(found, truth))
        _, is_wrong, num_wrong, num_mentions, num_found, num_true, _ = sums[-1]
        assert is_wrong == golden["CHAIRs"] and num_wrong / max(num_mentions, 1) == golden["CHAIRi"]
        assert num_found / max(num_true, 1) == golden["Recall"]
    golden, totals = read_json("chair/totals.json")[f"{name}/{variant}"], np.array(sums).sum(0)
    assert totals.tolist() == list(golden["counts"].values())
    overall = {metric.name: metric.value for metric in chair.metrics_of_sums(np.array(sums), variant)}
    names = {"CHAIRs": "CHAIRs", "CHAIRi": "CHAIRi", "Recall": "recall", "Len": "length"}
    assert {name: overall[own] for name, own in names.items()} == pytest.approx(golden["overall"], abs=1e-9)


@pytest.mark.parametrize(
    ("name", "table", "pattern"),
    [("minigpt4_greedy", (32.0, 9.89), (29.0, 9.24)), ("instructblip_greedy", (59.0, 23.79), (57.2, 22.71))],
)
def test_chair_without_downloads(name, table, pattern):
    truths = read_json("chair/ground_truth.json")
    rows = read_rows(f"chair/{name}.tokens.jsonl")
    for lemmas, expected in ((chair.lemmas_by_table, table), (chair.lemmas_by_pattern_table, pattern)):
        sums = [
            chair.row_sums(
                chair.find_objects(lemmas(row["tokens"].split(" ")), chair.coco_objects()),
                truths[str(row["image_id"])],
            )
            for row in rows
        ]
        values = {metric.name: metric.value for metric in chair.metrics_of_sums(np.array(sums), "table")}
        assert (round(100 * values["CHAIRs"], 2), round(100 * values["CHAIRi"], 2)) == expected


@pytest.mark.parametrize("name", ["minigpt4_greedy", "instructblip_greedy"])
def test_chair_by_the_calls_of_nltk(name, monkeypatch):
    """nltk's data are not at hand: recorded tokens, tags and lemmas stand for its functions."""
    nltk = pytest.importorskip("nltk", reason="the optional package nltk is missing")
    rows = read_rows(f"chair/{name}.tokens.jsonl")
    captions, truths = read_rows(f"chair/{name}.captions.jsonl"), read_json("chair/ground_truth.json")
    texts, own = [row["caption"] for row in captions], [truths[str(row["image_id"])] for row in captions]
    recorded, current = {text.lower(): row for text, row in zip(texts, rows, strict=True)}, []

    class Lemmatizer:
        def lemmatize(self, word, part):
            position = len(current[-1][1])
            current[-1][1].append(part)
            return current[-1][0]["nltk_lemmas"].get(str(position), word)

    def tokenize(text):
        current.append((recorded[text], []))
        return recorded[text]["tokens"].split(" ")

    monkeypatch.setattr(nltk, "word_tokenize", tokenize)
    monkeypatch.setattr(nltk, "pos_tag", lambda words: list(zip(words, current[-1][0]["tags"].split(" "), strict=True)))
    monkeypatch.setattr(nltk.stem, "WordNetLemmatizer", Lemmatizer)
    values = {metric.name: metric.value for metric in chair.chair_metrics(texts, own, "opera_nltk")}
    golden = read_json("chair/totals.json")[f"{name}/opera_nltk"]["overall"]
    assert list(values.values()) == pytest.approx(list(golden.values()), abs=1e-9)
    assert {part for _, parts in current for part in parts} == set("navr")


def test_chair_with_our_own_tokens_on_released_captions():
    captions, truths = read_rows("chair/minigpt4_greedy.captions.jsonl"), read_json("chair/ground_truth.json")
    texts, own = [row["caption"] for row in captions], [truths[str(row["image_id"])] for row in captions]
    values = {metric.name: metric.value for metric in chair.chair_metrics(texts, own, "pattern_table")}
    golden = read_json("chair/totals.json")["minigpt4_greedy/standalone_pattern"]["overall"]
    assert [values[name] for name in ("CHAIRs", "CHAIRi", "recall")] == pytest.approx(
        list(golden.values())[:3], abs=1e-9
    )


@pytest.mark.parametrize("variant", vqa.ACCURACIES)
def test_vqa_accuracy(variant):
    golden = read_json("vqa/golden.json")[variant]
    results = {row["question_id"]: row["answer"] for row in read_json("vqa/results.json")}
    rows = read_json("vqa/annotations.json")["annotations"]
    own = {row["question_id"]: vqa.ACCURACIES[variant](results[row["question_id"]], row["answers"]) for row in rows}
    assert {str(name): round(100 * value, 2) for name, value in own.items()} == golden["perQuestion"]

    def percent(kept):
        values = [own[row["question_id"]] for row in kept]
        return round(100 * mean_metric("accuracy", variant, values).value, 2)

    assert percent(rows) == golden["overall"]
    for key, name in (("perAnswerType", "answer_type"), ("perQuestionType", "question_type")):
        for kind, expected in (golden.get(key) or {}).items():
            assert percent([row for row in rows if row[name] == kind]) == expected, kind


def test_vqa_normalisation_and_records_without_ids():
    for row in read_json("vqa/normalise.json"):
        text = row["in"].replace("\n", " ").replace("\t", " ").strip()
        assert vqa.remove_punctuation(text) == row["punctuation"]
        assert vqa.normalise(text) == row["punctuation_digit_article"]
        assert vqa.normalise_evalai(row["in"]) == row["evalai_call"] == row["m4c_call"]
    for row in read_json("vqa/no_answer_id.json"):
        for variant in ("official", "lavis"):
            value = vqa.ACCURACIES[variant](row["prediction"], row["answers"])
            assert round(100 * value, 2) == row[variant]


def test_exact_matches_of_the_reference():
    golden, answers = read_json("exact/golden.json"), read_json("exact/answers.json")
    rows = {
        "gqa": read_json("exact/gqa_testdev_balanced_questions.json"),
        "vsr": read_rows("exact/vsr_zeroshot_test.jsonl"),
        "hm": read_rows("exact/hatefulmemes_dev.jsonl"),
    }
    labels = {"gqa": "answer", "vsr": "label", "hm": "label"}
    matches = {"gqa": exact.matches_gqa, "vsr": exact.matches_vsr, "hm": exact.matches_hm}
    for name, own in rows.items():
        pairs = zip(answers[name], own, strict=True)
        correct = [int(matches[name](answer, row[labels[name]])) for answer, row in pairs]
        assert correct == golden[name]["correct"]
        assert 100 * sum(correct) / len(correct) == pytest.approx(golden[name]["score"], abs=1e-9)
    people = [[answer["answer"] for answer in row["answers"]] for row in read_json("exact/vizwiz_val.json")]
    values = [vqa.accuracy_vizwiz(*pair) for pair in zip(answers["vizwiz"], people, strict=True)]
    assert values == pytest.approx(golden["vizwiz"]["per_row"], abs=1e-9)
    assert 100 * mean_metric("accuracy", "reference", values).value == pytest.approx(
        golden["vizwiz"]["score"], abs=1e-9
    )


def test_ranks_of_candidates():
    golden, rows = read_json("exact/golden.json")["iconvqa"], read_json("exact/iconqa_choose_text_val.json")
    losses = read_json("exact/answers.json")["iconqa_candidate_losses"]
    ranks = [exact.rank(own[: len(exact.split_choices(row["choices"]))]) for own, row in zip(losses, rows, strict=True)]
    assert ranks == golden["ranks"]
    assert [int(rank[0] == row["answer"]) for rank, row in zip(ranks, rows, strict=True)] == golden["correct"]


@pytest.mark.parametrize("split", ["val", "testA", "testB"])
@pytest.mark.parametrize("mode", ["plain", "resample"])
def test_refcoco(split, mode):
    rows, golden = read_json(f"refcoco/refcoco_{split}.json"), read_json("refcoco/golden.json")[split]
    answers = [row["answers"] for row in read_json("refcoco/answers.json")[split]]
    taken = [boxes.taken_answer(own if mode == "resample" else own[:1]) for own in answers]
    assert boxes.predictions(rows, taken) == golden[mode]["predictions"]
    hits = boxes.hits(rows, taken)
    assert (sum(hits), 100 * sum(hits) / len(hits)) == (
        golden[mode]["n_correct"],
        pytest.approx(golden[mode]["accuracy"]),
    )
    if mode == "plain":
        assert hits == [row["correct_without_resample"] for row in golden["per_row"]]
        assert [found is not None for found in taken] == [row["accepted"] for row in golden["per_row"]]
    else:
        assert [1 + found[0] for found in taken] == golden[mode]["calls_per_row"]
        longest = golden[mode].get("prompts_of_one_row")
        text, prompt = rows[longest["row"]]["sents"], longest["prompts"][0]
        for expected in longest["prompts"]:
            assert expected == prompt.replace(rows[longest["row"]]["sents"], text)
            text = boxes.ask_again(text, "nowhere")


def test_intersection_over_union():
    for row in read_json("refcoco/iou_pairs.json"):
        expected = 0 if row["iou"] == "ZeroDivisionError" else row["iou"]  # there, the original counts it as wrong
        assert box_iou(row["box1"], row["box2"]) == pytest.approx(expected, abs=1e-9)


def caption_rows():
    references = {}
    for row in read_json("captions/references.json")["annotations"]:
        references.setdefault(row["image_id"], []).append(row["caption"])
    results = read_json("captions/results.json")
    return [row["caption"] for row in results], [references[row["image_id"]] for row in results]


def assert_captions(metrics, golden, tolerance=1e-6):
    names = {"ROUGE_L": "ROUGE-L", **{f"Bleu_{n}": f"BLEU-{n}" for n in range(1, 5)}}
    own = {metric.name: metric.value for metric in metrics}
    expected = {names.get(name, name): value for name, value in golden["overall"].items()}
    assert own == pytest.approx({name: expected[name] for name in own}, abs=tolerance)


def test_caption_metrics_of_recorded_tokens():
    golden, tokens = read_json("captions/golden.json"), read_json("captions/golden.json")["tokens_ptb"]
    results = [text if isinstance(text, str) else text[0] for text in tokens["results"]]
    assert_captions(captions.token_metrics(results, tokens["references"], "ptb"), golden["ptb"])
    half = captions.token_metrics(results[:50], tokens["references"][:50], "ptb")
    assert_captions(half, golden["ptb_first_50_images"])
    per_image = golden["ptb"]["per_image"]
    assert captions.cider_d(results, tokens["references"]) == pytest.approx(per_image["CIDEr"], abs=1e-6)
    pairs = list(zip(results, tokens["references"], strict=True))
    assert [captions.rouge_l(*pair) for pair in pairs] == pytest.approx(per_image["ROUGE_L"], abs=1e-6)
    for n in range(1, 5):
        values = [float(captions.bleu(np.array(captions.bleu_sums(*pair)), n)) for pair in pairs]
        assert values == pytest.approx(per_image[f"Bleu_{n}"], abs=1e-6)


def test_caption_metrics_of_plain_texts():
    golden, (results, references) = read_json("captions/golden.json"), caption_rows()
    assert_captions(captions.caption_metrics(results, references, "raw"), golden["raw"])
    lower = [text.lower() for text in results], [[text.lower() for text in own] for own in references]
    assert_captions(captions.caption_metrics(*lower, "raw"), golden["raw_lower"])
    simple = {metric.name: metric.value for metric in captions.caption_metrics(results, references, "simple")}
    assert simple["CIDEr"] == pytest.approx(1.2911708, abs=0.05) and "METEOR" not in simple  # close to ptb, not equal


def test_caption_metrics_with_java():
    pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="the optional package pycocoevalcap is missing")
    if shutil.which("java") is None:
        pytest.skip("there is no Java")
    golden, (results, references) = read_json("captions/golden.json"), caption_rows()
    tokens = captions.tokenize_ptb(results)
    assert tokens == [text if isinstance(text, str) else text[0] for text in golden["tokens_ptb"]["results"]]
    metrics = captions.caption_metrics(results[:50], references[:50], "ptb")  # METEOR with its 5 s for one half only
    assert_captions(metrics, golden["ptb_first_50_images"])
    assert metrics[-1].name == "METEOR"
    per_image = golden["ptb"]["per_image"]["METEOR"][:50]
    assert captions.meteor(metrics[-1].sums) == pytest.approx(per_image, abs=1e-12)
    low, high = metrics[-1].interval(range(50))
    assert 0.2 < low < metrics[-1].value < high < 0.4
