"""What the tests of the page in a browser share: the browser, and what a person does on the page and sees there."""

import re
import time
from contextlib import contextmanager

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]  # fmt: skip


@contextmanager
def browser():
    """Chromium, as playwright drives it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Page:
    """A browser of its own with the page."""

    def __init__(self, browser, address, locale="en-US", width=1100, height=900, **options):
        self.context = browser.new_context(locale=locale, viewport={"width": width, "height": height}, **options)
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.page.goto(address)
        self.loaded()

    def loaded(self):
        self.page.wait_for_selector("#box textarea[aria-label]")

    def reload(self):
        self.page.reload()
        self.loaded()

    def upload(self, path):
        before = self.num_added
        self.page.set_input_files("#box input[type=file]", str(path))
        self.wait(lambda: self.num_added > before)

    def send(self, text=""):
        self.page.fill("#box textarea", text)
        self.page.press("#box textarea", "Enter")

    def press(self, name):
        """A button of a message or of the box, by its label, or one with an id."""
        self.page.click(
            f"#{name}" if self.page.locator(f"#{name}").count() else f'button[aria-label="{name}"] >> nth=-1'
        )

    def touch(self, name, *places):
        """A quick stroke of a finger through places, in shares of an element's sides."""
        box, device = self.page.locator(name).bounding_box(), self.context.new_cdp_session(self.page)
        points = [{"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]} for x, y in places]
        for number, point in enumerate(points):
            kind = "touchMove" if number else "touchStart"
            device.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
        device.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    def has_button(self, label):
        return self.page.locator(f'button[aria-label="{label}"]').count() > 0

    @property
    def questions(self):
        texts = self.page.locator("#chat0 [data-testid=user]").all_inner_texts()
        return [text.strip() for text in texts if text.strip()]

    @property
    def answers(self):
        return self.page.locator("#chat0 [data-testid=bot]").all_inner_texts()

    @property
    def answer(self):
        """The last one, without the sign of one that has not begun."""
        return self.answers[-1].replace("…", "") if self.answers else ""

    @property
    def status(self):
        return self.page.inner_text("#status")

    @property
    def typed(self):
        return self.page.input_value("#box textarea")

    @property
    def toasts(self):
        return " ".join(self.page.locator(".toast-wrap").all_inner_texts())

    @property
    def num_images(self):
        return self.page.locator("#chat0 .message-row img").count()

    @property
    def num_added(self):
        return self.page.locator("#box button.delete-button").count()

    @property
    def num_tokens(self):
        found = re.search(r"(\d+) tokens,", self.status)
        return int(found.group(1)) if found else 0

    def wait(self, condition, seconds=15):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (
                f"{self.status!r} {self.typed!r} {self.num_added} {self.page.inner_text('#page')!r}"
            )
            self.page.wait_for_timeout(30)
