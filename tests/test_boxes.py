"""Boxes as text in both directions: every recorded row of the reference's last commit."""

import html

import numpy
import pytest
from golden_data import GOLDEN, read_json
from PIL import Image

from minigpt4.common import boxes
from minigpt4.serve import page_boxes

RECORDED = read_json("box_text.json", GOLDEN / "family")
DEMO = RECORDED["demo"]


def test_box_to_text():
    for row in RECORDED["box_to_text"]:
        assert boxes.box_to_text(row["xywh"], row["width"], row["height"]) == row["text"], row
        assert boxes.text_boxes(f"a {row['text']}.") == [tuple(map(int, row["text"][2:-2].split("><")))]


@pytest.mark.parametrize("row", RECORDED["text_to_box_evaluation"], ids=lambda row: row["answer"])
def test_an_answer_as_the_evaluation_reads_it(row):
    size, xywh = (row["width"], row["height"]), row["ground_truth_xywh"]
    found = boxes.answer_box(row["answer"], *size)
    assert (found and list(found)) == row.get("box")
    assert boxes.is_hit(found, xywh) == row.get("hit", False)
    assert boxes.clean_answer(row["answer"]) == row["normalised"]
    assert boxes.begins_with_box(row["normalised"]) == row["accepted"]
    if found:
        truth = xywh[0], xywh[1], xywh[0] + xywh[2], xywh[1] + xywh[3]
        assert boxes.box_iou(found, truth) == row["iou"]


def test_iou():
    for row in RECORDED["iou"]:
        assert boxes.box_iou(row["a"], row["b"]) == row["iou"], row
    assert boxes.box_iou((0, 0, 1, 1), (3, 0, 0, 1)) == 0  # areas of 4 and -4 pixels


@pytest.mark.parametrize("row", DEMO["rows"], ids=lambda row: row["generation"])
def test_drawn_boxes_and_coloured_text(row):
    text, size = row["generation"], boxes.drawn_size(*row["image_size"])
    drawn = boxes.drawn_boxes(text, *size)
    assert [[list(box[:2]), list(box[2:]), list(colour)] for box, colour in drawn] == row["boxes"]
    assert bool(drawn) == row["drawn"] and (not drawn or list(size) == row["drawn_size"])
    assert boxes.phrase_texts(text) == row["substrings"]
    assert html.unescape(boxes.coloured_html(text)) == row["coloured_text"]  # ours escapes what the model wrote


@pytest.mark.parametrize("size", [(1, 1024), (1024, 1), (300, 1000)])
def test_boxes_are_drawn_on_narrow_images(size):
    """Without gigabytes of pixels, or none."""
    drawn = page_boxes.draw("<p>a</p> {<0><0><100><100>}", Image.new("RGB", size))
    assert drawn.size == {(1, 1024): (1, 2000), (1024, 1): (500, 1), (300, 1000): (500, 1666)}[size]


def test_phrases_have_the_colours_of_their_boxes():
    """In the page; in the reference a second mention, or one without a box, moves the colours on."""
    text = "<p>same</p> {<1><1><2><2>} <p>same</p> {<4><4><6><6>} <p>b & c</p> {<1><1><3><3>} <p>none</p>"
    red, green = (f'<span style="color:rgb{colour}">' for colour in boxes.COLOURS[:2])
    expected = f"{red}same</span>  {red}same</span>  {green}b &amp; c</span>  none"
    assert boxes.coloured_html(text, as_drawn=True) == expected
    assert [colour for _, colour in boxes.drawn_boxes(text, 100, 100)] == [boxes.COLOURS[i] for i in (0, 0, 1)]


def test_phrases_that_the_font_cannot_write_are_left_out():
    """Instead of a row of crossed boxes; the text beside the image has them in the colours of their boxes."""
    drawn = [page_boxes.draw(f"<p>{phrase}</p> {{<20><40><60><80>}}", Image.new("RGB", (500, 500))) for phrase in "狗é"]
    ascii_phrase, without = (
        page_boxes.draw(text, Image.new("RGB", (500, 500)))
        for text in ("<p>a</p> {<20><40><60><80>}", "{<20><40><60><80>}")
    )
    assert drawn[0].tobytes() == drawn[1].tobytes() == without.tobytes() != ascii_phrase.tobytes()


def test_constants():
    assert [list(colour) for colour in boxes.COLOURS] == DEMO["colours"]
    assert (DEMO["drawn_width"], DEMO["box_scale"]) == (boxes.DRAWN_WIDTH, boxes.SCALE)


def test_markup_in_an_answer_stays_text():
    text = "<p><b onclick=x></p> {<1><2><3><4>} &lt;script&gt;"
    assert boxes.coloured_html(text) == (
        '<span style="color:rgb(255, 0, 0)">&lt;b onclick=x&gt;</span>  &lt;script&gt;'
    )


def test_phrase_boxes_hold_numbers_for_programs():
    found = boxes.phrase_boxes("<p>two cakes</p> {<5><6><7><8>}<delim>{<9><9><20><21>}")
    assert found == [("two cakes", (5, 6, 7, 8)), ("two cakes", (9, 9, 20, 21))]
    assert boxes.phrase_boxes("{<5><6><7><8>}") == [(None, (5, 6, 7, 8))]


@pytest.mark.parametrize("row", DEMO["mask_to_text"], ids=lambda row: row["text"] or "none")
def test_mask_to_text(row):
    if "width" not in row:
        assert boxes.mask_to_text(None) == row["text"]
        return
    pixels = numpy.zeros((row["height"], row["width"], 3), numpy.uint8)
    if filled := row["filled_pixels_inclusive"]:
        left, top, right, bottom = filled
        pixels[top : bottom + 1, left : right + 1] = 255
    assert boxes.mask_to_text(Image.fromarray(pixels)) == row["text"]


def test_escaping():
    for row in DEMO["escape"]:
        assert boxes.escape_tags(row["text"]) == row["escaped"]
        assert boxes.unescape_tags(row["escaped"]) == row["back"]


@pytest.mark.parametrize(
    ("box", "outside"),
    [
        ((0, 0, 100, 100), False),
        ((-5, -1, 120, 3), False),
        ((0, 0, 0, 0), False),
        ((100, 0, 110, 5), True),
        ((0, -9, 5, -2), True),
        ((50, 0, 20, 5), True),
    ],
)
def test_outside(box, outside):
    assert boxes.is_outside(box) == outside


def test_boxes_of_answers():
    found = boxes.answer_boxes("<p>a</p> {<5><30><40><60>}<delim>{<120><0><130><9>} and <p>b</p> {<9><9><1><1>}")
    assert found == [("a", (5, 30, 40, 60))]
    for text in ("1, 2, 3 and 4 of them", "{<" + 5000 * "9" + "><1><2><3>}", "", "{<1><2><3>}"):
        assert boxes.answer_boxes(text) == boxes.box_fields(text) == []
