"""The texts of the web page, in English and Chinese, and the Chinese form of the library's messages."""

import re
from typing import Any

from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Answer

TEXTS = {
    "welcome": (
        "## Ask about an image\n\nThis model looks at your images and answers questions about them. Add an image with "
        "the button at the lower left, drop or paste it anywhere, or try an example. Answers may be wrong.",
        "## 就图片提问\n\n本模型会查看您的图片，并回答相关问题。点击左下角的按钮添加图片，或将图片拖放、粘贴到页面任意"
        "位置，也可以先试试示例。模型用英文数据训练，建议用英文提问。回答可能有误。",
    ),
    "placeholder": ("Ask about an image", "就图片提问"),
    "new_chat": ("New chat", "新对话"),
    "settings": ("### Settings", "### 设置"),
    "chat": ("### This chat", "### 本次对话"),
    "save": ("Save as a file", "保存为文件"),
    "open": ("Open a saved chat", "打开已保存的对话"),
    "camera": ("Take a photo", "拍照"),
    "no_task": ("no task", "无任务"),
    "draw": ("Draw a box", "画框"),
    "privacy": (
        "A chat is stored in this browser, until “New chat”. The server forgets it within an hour after the page is "
        "closed.",
        "对话保存在本浏览器中，点击“新对话”即删除；关闭页面一小时后，服务器不再保留。",
    ),
    "feedback": (
        "Rating an answer with the thumbs stores this chat with its images on the server.",
        "点赞或点踩时，服务器会保存本次对话及其图片。",
    ),
    "sample": ("Sample (otherwise greedy)", "随机采样（关闭则为贪心解码）"),
    "temperature": ("Temperature", "温度"),
    "beams": ("Beams", "束搜索宽度（beam）"),
    "max_new_tokens": ("Maximum length (tokens)", "最大长度（词元）"),
    "seed": ("Seed", "随机种子"),
    "busy": ("The last question is being answered: wait, or press Stop.", "正在回答上一个问题：请等待，或按“停止”。"),
    "nothing": ("There is no question: write one, or add an image.", "没有问题：请输入问题，或添加图片。"),
    "too_many": (
        "A chat can have {count} images: send fewer, or start a new chat.",
        "一次对话最多 {count} 张图片：请减少图片，或开始新对话。",
    ),
    "gone": ("{name} is no longer on the server: add it again.", "服务器上已没有 {name}：请重新添加。"),
    "failed": ("The model failed; the server's log has the reason.", "模型出错，原因见服务器日志。"),
    "server_busy": (
        "Too many questions are waiting on this server; try again in a minute.",
        "服务器上等待的问题过多，请一分钟后再试。",
    ),
    "timeout": ("The answer took longer than {seconds:.0f} s and was ended.", "回答超过 {seconds:.0f} 秒，已中止。"),
    "too_large": (
        "{size} MiB is too much; at most {limit} MiB can be sent together.",
        "共 {size} MiB，一次最多发送 {limit} MiB。",
    ),
    "full": ("The server holds too many uploads; try again later.", "服务器上的上传文件过多，请稍后再试。"),
    "forgotten": (
        "The server no longer has this chat: reload the page to restore it.",
        "服务器上已没有本次对话：请刷新页面以恢复。",
    ),
    "no_chat": ("There is no chat to save yet.", "还没有可以保存的对话。"),
    "bad_chat": (
        "This file is not a saved chat; open one that “Save as a file” has written.",
        "该文件不是已保存的对话：请打开由“保存为文件”生成的文件。",
    ),
    "bad_image": ("Image {number} of the file cannot be read.", "无法读取文件中的第 {number} 张图片。"),
    "chat_images": (
        "The file has {count} images; a chat can have {limit}.",
        "该文件有 {count} 张图片，一次对话最多 {limit} 张。",
    ),
    "bad_seed": ("The seed has to be a whole number from 0 to {limit}.", "随机种子须为 0 到 {limit} 的整数。"),
    "box_full": ("Send or clear what is in the box first.", "请先发送或清空输入框中的内容。"),
    "lost": (
        "The server no longer has the earlier messages, and they were too large for this browser to store: press “New "
        "chat” to ask without them.",
        "服务器上已没有之前的消息，且其过大、未能保存在本浏览器中：如需继续提问，请点击“新对话”。",
    ),
    "interrupted": ("The answer was interrupted: answer again.", "回答中断，可重新生成。"),
    "no_answer": ("(no answer)", "（没有回答）"),
    "next": ("The server is answering other questions; yours is next.", "正在回答其他问题，下一个就是您的。"),
    "not_kept": (
        "This chat is too large to survive a reload of the page: save it as a file.",
        "本次对话过大，刷新页面后无法恢复：请保存为文件。",
    ),
    "feedback_full": ("The server stores no more ratings.", "服务器不再保存评价。"),
    "rated": ("Thank you: the rating is stored.", "谢谢，评价已保存。"),
    "stopped": ("Stopped.", "已停止。"),
    "reading": ("Reading the images …", "正在读取图片……"),
    "one_before": ("1 question is ahead of yours.", "前面还有 1 个问题。"),
    "many_before": ("{count} questions are ahead of yours.", "前面还有 {count} 个问题。"),
    "hint": (
        "This chat has no image yet, so the answer does not refer to one. Add an image to ask about it.",
        "本次对话还没有图片，回答不基于任何图片。添加图片后即可就图片提问。",
    ),
    "dropped": (
        "The chat is longer than the model can read: its {count} oldest questions and answers were left out.",
        "对话超出模型的上下文长度，最早的 {count} 轮问答未被使用。",
    ),
    "dropped_one": (
        "The chat is longer than the model can read: its oldest question and answer were left out.",
        "对话超出模型的上下文长度，最早的一轮问答未被使用。",
    ),
    "drawn": ("The image with boxes around: {names}", "图片，其中框出了：{names}"),
    "drawn_one": ("The image with a box", "图片，其中有一个框"),
    "no_box": (
        "[identify] needs a box: press “Draw a box”, or write its four numbers.",
        "[identify] 需要一个框：请点击“画框”，或写出框的四个数字。",
    ),
    "cut": ("The answer was cut at the maximum length (see the settings).", "回答达到最大长度而被截断（见设置）。"),
    "numbers": (
        "{count} tokens, {speed:.1f} tokens/s, first after {first:.2f} s.",
        "{count} 个词元，{speed:.1f} 词元/秒，首词元延迟 {first:.2f} 秒。",
    ),
}
ENGLISH, CHINESE = ({key: texts[i] for key, texts in TEXTS.items()} for i in range(2))

# UserErrors of the library that a user of the page can cause: a pattern of the English text, and the Chinese one.
ERRORS = {
    r"(?P<name>.+) has (?P<size>[\dx]+|too many) pixels; at most (?P<limit>[\d,]+) are read, make it smaller\.": (
        "{name} 的像素过多（{size}），最多 {limit} 像素：请缩小图片。"
    ),
    r"(?P<name>.+) cannot be read as an image \(.*\)\.": "无法读取图片 {name}：文件已损坏，或格式不受支持。",
    r"(?P<name>.+) cannot be decoded: it makes the decoder fail, or takes too much memory\.": (
        "无法解码 {name}：解码失败，或占用内存过多。"
    ),
    r"(?P<name>.+) takes too much memory to decode; make it smaller\.": "解码 {name} 占用内存过多：请缩小图片。",
    r"(?P<name>.+) takes longer than (?P<seconds>\S+) s to decode; save it in a simpler form, such as a plain JPEG\.": (
        "解码 {name} 超过 {seconds} 秒：请另存为更简单的格式，例如普通 JPEG。"
    ),
    r"The server is ending\.": "服务器正在关闭。",
    r"The box (?P<box>.+) lies outside the image\..*": (
        "框 {box} 在图片之外：四个数字依次为左、上、右、下，单位为边长的百分之一。"
    ),
    r"A question cannot contain (?P<mark>\S+); upload the image instead\.": "问题中不能包含 {mark}：请直接添加图片。",
    r"The question is too long: the prompt has (?:at least )?(?P<length>\d+) tokens "
    r"\((?P<images>\d+) of them images\), and (?P<fit>-?\d+) fit beside the answer; "
    r"shorten it, or ask for a shorter answer \(max_new_tokens\)\.": (
        "问题过长：提示共 {length} 个词元（其中图片 {images} 个），除去回答只能容纳 {fit} 个。"
        "请缩短问题。"
    ),
}  # fmt: skip


class Refusal(Exception):
    """A request that the page refuses; its text is that of a key of ``TEXTS``."""

    def __init__(self, key: str, **values: Any) -> None:
        super().__init__(key)
        self.key, self.values = key, values


def is_chinese(request: Any) -> bool:
    """Whether the browser that sent a request of gradio or Starlette asks for Chinese."""
    return (request.headers.get("accept-language") or "").lower().startswith("zh")


def localized(request: Any, key: str, **values: Any) -> str:
    """A text in the language of a request."""
    return (CHINESE if is_chinese(request) else ENGLISH)[key].format(**values)


def describe_error(request: Any, error: Exception) -> str:
    """What went wrong, in the language of a request; only the log has the text of unexpected errors."""
    if isinstance(error, Refusal):
        return localized(request, error.key, **error.values)
    if not isinstance(error, UserError):
        return localized(request, "failed")
    if not is_chinese(request):
        return str(error).replace(", or ask for a shorter answer (max_new_tokens)", "")  # no answer is that short
    matches = ((re.fullmatch(pattern, str(error)), text) for pattern, text in ERRORS.items())
    return next((text.format(**match.groupdict()) for match, text in matches if match), f"无法完成：{error}")


def describe_position(request: Any, count: int) -> str:
    """How many questions are answered before one that waits."""
    return localized(request, "one_before" if count == 1 else "many_before", count=count)


def describe_answer(request: Any, answer: Answer) -> str:
    """Length and speed of an answer."""
    count, first = len(answer.ids), answer.seconds_to_first_token
    speed = (count - 1) / (answer.seconds - first) if answer.seconds > first else count / max(answer.seconds, 1e-9)
    return localized(request, "numbers", count=count, speed=speed, first=first)
