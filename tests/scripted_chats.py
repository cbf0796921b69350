"""The scripted chats of the original, and chats like theirs."""

from golden_data import read_json, read_tensors

from minigpt4.conversation.conversation import CONV_VISION

CHAT = read_json("chat.json")
# Scripts with a note ran under other stop ids, another end token or a forced cut: only generate() is asked those.
PLAIN = [script for script in CHAT["scripts"] if script["note"] is None]
PATCHED = [script for script in CHAT["scripts"] if isinstance(script["note"], dict)]


def upload(chat, number, conv, images):
    chat.upload_img(read_tensors("vision")["image"][number], conv, images)


def asked(chat, question, image=0):
    conv, images = CONV_VISION.copy(), []
    if image is not None:
        upload(chat, image, conv, images)
    chat.ask(question, conv)
    return conv, images
