"""What the web page has for MiniGPT-v2: its tasks, and texts with boxes beside the image on which they are drawn."""

import hashlib
import html
from pathlib import Path
from urllib.parse import quote

from PIL import Image, ImageDraw, ImageFont

from minigpt4.common import boxes
from minigpt4.serve.page_texts import is_chinese, localized

TASKS = ("vqa", "grounding", "refer", "detection", "identify", "caption")
FONT_SIZE, LINE_WIDTH = 22, 4  # in an image that is shown smaller than it is drawn


def figure(question: str, answer: str, picture: str, request: object) -> str | None:
    """An answer as HTML with its phrases in colours, and the image with its boxes, or else with those of the question.

    The drawn image is a file beside ``picture``, and written once. None where neither text has a box.
    """
    drawn = answer if boxes.answer_boxes(answer) else question
    if not (found := boxes.answer_boxes(drawn)) or not answer:
        return None
    file = Path(picture)
    file = file.with_name(f"{file.stem}-{hashlib.sha256(drawn.encode(errors='replace')).hexdigest()[:16]}.webp")
    if not file.exists():
        draw(drawn, Image.open(picture)).save(file)
    names = ("、" if is_chinese(request) else ", ").join(dict.fromkeys(box.phrase for box in found if box.phrase))
    alt = html.escape(localized(request, "drawn", names=names) if names else localized(request, "drawn_one"))
    text = boxes.coloured_html(answer, as_drawn=True) or html.escape(answer, quote=False)
    image = f'<img src="gradio_api/file={quote(str(file))}" alt="{alt}">'
    return f'<div class="grounded"><p>{text}</p>{image}</div>'


def draw(text: str, image: Image.Image) -> Image.Image:
    """The image in its drawn size, with the boxes of a text and their phrases, in a colour for each phrase."""
    image = image.convert("RGB").resize(boxes.drawn_size(*image.size))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE)
    found = zip(boxes.drawn_boxes(text, *image.size), boxes.phrase_boxes(text), strict=True)
    for (box, colour), (phrase, parts) in found:
        if boxes.is_outside(parts):
            continue
        left, top = (max(value, 0) for value in box[:2])
        right, bottom = (min(value, side - 1) for value, side in zip(box[2:], image.size, strict=True))
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=LINE_WIDTH)
        if phrase and phrase.isascii():  # Pillow's own font has no other letters: their colour has to do
            width, height = pen.textlength(phrase, font) + 6, FONT_SIZE + 6
            x, y = max(0, min(left, image.width - width)), top - height if top >= height else top
            pen.rectangle((x, y, x + width, y + height), fill=colour)
            pen.text((x + 3, y + 1), phrase, _readable_on(colour), font)
    return image


def _readable_on(colour: tuple[int, int, int]) -> str:
    red, green, blue = colour
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 110 else "white"
