"""VQA accuracy (Antol et al., 2015), for which programs in use disagree: three of them, by name."""

import re
from collections.abc import Callable, Mapping, Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}  # noqa: SIM905
_NUMBERS["none"] = "0"
_ARTICLES = {"a", "an", "the"}
# Words that are written with an apostrophe; without one, they are replaced by these.
_APOSTROPHE_WORDS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'd've I'm
I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd
there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""".split()  # noqa: SIM905
# Forms with a second apostrophe that is missing, and what is listed in another way.
_OTHER_CONTRACTIONS = """
couldn'tve:couldn't've couldnt've:couldn't've hadnt've:hadn't've hadn'tve:hadn't've hed've:he'd've he'dve:he'd've
Id've:I'd've I'dve:I'd've itd've:it'd've it'dve:it'd've mightnt've:mightn't've mightn'tve:mightn't've
'ow'sat:'ow's'at ows'at:'ow's'at shed've:she'd've she'dve:she'd've she's:she's shouldnt've:shouldn't've
shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've somebody'dve:somebody'd've
someoned've:someone'd've someone'dve:someone'd've somethingd've:something'd've something'dve:something'd've
thered've:there'd've there'dve:there'd've theyd've:they'd've they'dve:they'd've wed've:we'd've we'dve:we'd've
whod've:who'd've who'dve:who'd've wouldnt've:wouldn't've wouldn'tve:wouldn't've yall'll:y'all'll y'allll:y'all'll
yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd've:you'd've you'dve:you'd've
""".split()  # noqa: SIM905
_CONTRACTIONS = {word.replace("'", ""): word for word in _APOSTROPHE_WORDS}
_CONTRACTIONS |= dict(pair.split(":") for pair in _OTHER_CONTRACTIONS)

Answers = Sequence[Mapping[str, object]]  # of people: records with "answer" and, as published, an "answer_id"


def remove_punctuation(text: str) -> str:
    """Deletes a sign that touches a blank anywhere, or all signs beside "1,000"; others become blanks.

    Full stops are deleted unless a digit follows, but at most 32 (the official program passes a flag as the count).
    """
    has_number = re.search(r"\d,\d", text) is not None
    result = text
    for sign in _PUNCTUATION:
        is_deleted = has_number or f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if is_deleted else " ")
    return re.sub(r"\.(?!\d)", "", result, count=32)


def normalise_words(text: str) -> str:
    """Lower-cases, writes numbers to ten as digits, drops articles and restores apostrophes."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise(text: str) -> str:
    """Punctuation, then words, as the official program does with both sides."""
    return normalise_words(remove_punctuation(text))


def normalise_evalai(text: str) -> str:
    """The same after a step of its own, as EvalAI's, lmms-eval's and LLaVA's programs do."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise(_strip(text))


def _strip(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _accuracy(prediction: str, answers: Answers, texts: Sequence[str]) -> float:
    """Mean over all answers of min(1, matches among the others / 3); "the others" are the records that differ."""
    records = [{**answer, "answer": text} for answer, text in zip(answers, texts, strict=True)]
    values = []
    for record in records:
        num_matches = sum(other["answer"] == prediction for other in records if other != record)
        values.append(min(1.0, num_matches / 3))
    return sum(values) / len(values)


def accuracy_official(prediction: str, answers: Answers) -> float:
    """The official accuracy, from 0 to 1; where all people agree, nothing is normalised on either side."""
    prediction, texts = _strip(prediction), [_strip(str(answer["answer"])) for answer in answers]
    if len(set(texts)) > 1:
        prediction, texts = normalise(prediction), [normalise(text) for text in texts]
    return _accuracy(prediction.lower(), answers, [text.lower() for text in texts])


def accuracy_lavis(prediction: str, answers: Answers) -> float:
    """LAVIS' accuracy: people's answers keep their case, numbers and articles, so that many cannot be matched."""
    texts = [str(answer["answer"]) for answer in answers]
    if len(set(texts)) > 1:
        texts = [remove_punctuation(text) for text in texts]
    return _accuracy(normalise(_strip(prediction)), answers, texts)


def accuracy_lmms_vqav2(prediction: str, answers: Answers) -> float:
    """lmms-eval's accuracy for VQAv2: both sides are always normalised."""
    return _accuracy(normalise(prediction), answers, [normalise(_strip(str(answer["answer"]))) for answer in answers])


def accuracy_lmms_ok_vqa(prediction: str, answers: Answers) -> float:
    """lmms-eval's accuracy for OK-VQA, which is LLaVA's for TextVQA: EvalAI's normalisation, any answer left out."""
    numbered = [{"answer_id": number} for number in range(len(answers))]
    texts = [normalise_evalai(str(answer["answer"])) for answer in answers]
    return _accuracy(normalise_evalai(prediction), numbered, texts)


ACCURACIES: dict[str, Callable[[str, Answers], float]] = {
    "official": accuracy_official,
    "lavis": accuracy_lavis,
    "lmms_vqav2": accuracy_lmms_vqav2,
    "lmms_ok_vqa": accuracy_lmms_ok_vqa,
}


def accuracy_vizwiz(prediction: str, answers: Sequence[str]) -> float:
    """The reference's accuracy for VizWiz: min(1, matches / 3) among all answers, none left out, without normalisation.

    The reference joins answers by "_", so that one with this sign counts as several.
    """
    parts = "_".join(answers).lower().split("_")
    return min(parts.count(prediction.lower()) / 3, 1.0)


def accuracy_aokvqa(prediction: str, answers: Answers) -> float:
    """The accuracy of A-OKVQA's own program: min(1, matches / 3) among all answers, none left out or normalised."""
    return min(sum(answer["answer"] == prediction for answer in answers) / 3, 1.0)


def _accuracy_reference(prediction: str, answers: Answers) -> float:
    return accuracy_vizwiz(prediction, [str(answer["answer"]) for answer in answers])


# By the names of variants: of VQA's data sets, and of two others, which score in their own ways.
VARIANTS = {**ACCURACIES, "allenai": accuracy_aokvqa, "reference": _accuracy_reference}
