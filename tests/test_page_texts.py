"""The page's texts: both languages are complete, and no English message reaches a Chinese user."""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from minigpt4.common import images
from minigpt4.common.errors import UserError
from minigpt4.conversation.sampling import GenerationOptions
from minigpt4.serve import image_decoder, image_worker, page_texts

CHINESE = SimpleNamespace(headers={"accept-language": "zh-CN,zh;q=0.9"})
ENGLISH = SimpleNamespace(headers={"accept-language": "de"})


def test_both_languages_have_the_same_values():
    for english, chinese in page_texts.TEXTS.values():
        assert re.findall(r"{(\w+)", english) == sorted(re.findall(r"{(\w+)", chinese), key=english.index), english
        assert re.search("[\u4e00-\u9fff]", chinese) and not re.search("[\u4e00-\u9fff]", english)


def message_of(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    return error.value


def library_errors(chat, monkeypatch):
    """All UserErrors that a user of the page can cause."""
    data = io.BytesIO()
    Image.new("RGB", (40, 30)).save(data, "PNG")
    yield message_of(images.read_image, b"no image", "'a.png'")
    yield message_of(images.read_image, data.getvalue()[:60], "'a.png'")
    conv = chat.template.copy()
    yield message_of(chat.ask, "<ImageHere>", conv)
    with monkeypatch.context() as patch:
        patch.setattr(chat.model, "arch", "minigpt_v2")
        yield message_of(chat.ask, "[identify] {<120><0><130><9>}", conv)
    chat.ask(3000 * "why ", conv)
    yield message_of(chat.check_length, conv, [], GenerationOptions(max_new_tokens=1))
    decoder = image_decoder.ImageDecoder()
    monkeypatch.setattr(decoder._slow, "seconds", 0.0)
    monkeypatch.setattr(decoder._quick, "seconds", 0.0)
    yield message_of(decoder.decode, data.getvalue(), "'a.png'")
    decoder.close()
    yield message_of(decoder.decode, data.getvalue())
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    yield message_of(images.read_image, data.getvalue(), "'a.png'")
    for module in (image_decoder, image_worker):  # messages of a decoder that ends
        for text in re.findall(r'f"({(?:job.name|request..name..)} [^"]+)"', Path(module.__file__).read_text()):
            yield UserError(re.sub(r"{[^}]*}", "15", text))


def test_messages_of_the_library_have_a_chinese_form(chat, monkeypatch):
    errors = list(library_errors(chat, monkeypatch))
    assert len(errors) >= 9
    for error in errors:
        assert page_texts.describe_error(ENGLISH, error) == re.sub(", or ask for a shorter .*?(?=\\.$)", "", str(error))
        chinese = page_texts.describe_error(CHINESE, error)
        left = re.sub(r"'a\.png'|<ImageHere>|JPEG|\dx\d", "", chinese)
        assert not re.search("[A-Za-z]{2}", left) and "无法完成" not in chinese, (error, chinese)
    assert page_texts.describe_error(CHINESE, UserError("unknown")) == "无法完成：unknown"
    assert page_texts.describe_error(CHINESE, RuntimeError("/secret")) == "模型出错，原因见服务器日志。"
