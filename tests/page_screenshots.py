"""Screenshots of the web page for docs/WEB.md, with the models of ``python -m quickstart`` and ``.grounding``.

python -m tests.page_screenshots                    # those of docs/screenshots
python -m tests.page_screenshots --all FOLDER       # each view in both languages, on both screens, light and dark
"""

import argparse
import sys
import time
from itertools import product
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

import page_browser
from serving import served

import demo
from minigpt4.conversation.sampling import GenerationOptions
from minigpt4.serve.engine import Engine
from minigpt4.serve.page_answers import PageModel
from minigpt4.serve.web import build_app

SCREENS = {"desktop": (1280, 800), "phone": (390, 844)}
STORED = [  # view, language, screen, colours
    ("first", "en", "desktop", "light"), ("chat", "en", "desktop", "light"), ("compare", "en", "desktop", "light"),
    ("settings", "zh", "desktop", "dark"), ("error", "zh", "desktop", "light"), ("first", "zh", "phone", "light"),
    ("chat", "en", "phone", "dark"), ("compare", "zh", "phone", "light"), ("boxes", "en", "desktop", "light"),
]  # fmt: skip
GROUNDING = "output/quickstart/grounding"
SECONDS_PER_STEP = 0.06  # so that an answer can be seen to grow


def load(stage, config="quickstart_eval"):
    options = [f"model.ckpt=output/quickstart/{stage}/checkpoint.pth", "run.device=cpu"]
    args = {"cfg_path": f"eval_configs/{config}.yaml", "gpu_id": 0, "options": options, "seed": 1}
    chat = demo.build_chat(argparse.Namespace(**args))
    llm, plain = chat.model.llama_model, chat.model.llama_model.forward
    llm.forward = lambda *values, **named: (time.sleep(SECONDS_PER_STEP), plain(*values, **named))[1]
    return PageModel(Engine(chat), stage, f"quickstart {stage} · cpu · LM bfloat16")


def ask_example(page, number=0):
    """Asks the question of an example, to its end."""
    page.page.click(f".example >> nth={number}")
    page.wait(lambda: page.answer and page.page.locator("#box .submit-button").count(), 60)


def view_first(page):
    page.page.wait_for_timeout(500)


def view_chat(page):
    ask_example(page)
    page.send("What is at the left?")
    page.wait(lambda: len(page.questions) == 2 and len(page.answer) > 12)


def view_settings(page):
    ask_example(page, 1)
    page.page.click(".toggle-button")
    page.page.wait_for_timeout(600)


def view_error(page):
    ask_example(page)
    broken = Path("README.md")
    page.page.set_input_files(
        "#box input[type=file]", [{"name": "holiday.jpg", "mimeType": "image/jpeg", "buffer": broken.read_bytes()}]
    )
    page.wait(lambda: page.num_added)
    page.send("Who is in this picture?")
    page.wait(lambda: "holiday.jpg" in page.status)
    page.page.wait_for_timeout(600)


def view_compare(page):
    ask_example(page)


def view_boxes(page):
    page.page.set_input_files("#box input[type=file]", f"{GROUNDING}/held_out/COCO_train2014_000000000004.jpg")
    page.wait(lambda: page.num_added)
    page.send("[grounding] please describe this image in details")
    page.wait(lambda: page.page.locator(".grounded img").count(), 60)
    page.page.wait_for_timeout(600)


def take(browser, urls, view, language, screen, colours, file):
    width, height = SCREENS[screen]
    url = urls.get(view, urls["one"])
    locale = {"en": "en-US", "zh": "zh-CN"}[language]
    options = {"color_scheme": colours, "has_touch": screen == "phone", "is_mobile": screen == "phone"}
    page = page_browser.Page(browser, url, locale, width, height, **options)
    globals()[f"view_{view}"](page)
    page.page.mouse.move(0, 0)
    page.page.screenshot(path=file.with_suffix(".png"))
    page.context.close()
    Image.open(file.with_suffix(".png")).save(file.with_suffix(".webp"), quality=82, method=6)
    file.with_suffix(".png").unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", type=Path, help="folder for all views")
    folder = parser.parse_args().all
    names = sorted({name for name, *_ in STORED})
    views = list(product(names, ("en", "zh"), SCREENS, ("light", "dark")))
    out = folder or Path("docs/screenshots")
    out.mkdir(parents=True, exist_ok=True)
    images = [Path(f"output/quickstart/held_out/image/{i}.jpg") for i in range(3)]
    models, options = [load("stage2"), load("stage1")], GenerationOptions(seed=42)
    ratings = Path("output/quickstart/ratings.jsonl")
    with (
        served(build_app(models[:1], options, images, feedback=ratings)) as one,
        served(build_app(models, options, images)) as compare,
        served(build_app([load("grounding", "quickstart_grounding_eval")], options, [])) as boxes,
        page_browser.browser() as browser,
    ):
        for view in views if folder else STORED:
            take(browser, {"one": one, "compare": compare, "boxes": boxes}, *view, out / "-".join(view))


if __name__ == "__main__":
    main()
