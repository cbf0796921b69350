"""The texts of the web page, in English and Chinese."""

from typing import Any

from minigpt4.conversation.conversation import Answer

TEXTS = {
    "subtitle": ("Upload an image and ask about it.", "上传一张图片，然后就它提问。"),
    "placeholder": ("Your question. Images: click, drag or paste.", "输入问题；点击、拖放或粘贴图片。"),
    "examples": ("Example images (click to use one)", "示例图片（点击选用）"),
    "stop": ("Stop", "停止"),
    "retry": ("Retry", "重试"),
    "clear": ("Clear", "清空"),
    "settings": ("Settings", "设置"),
    "sample": ("Sample (otherwise greedy)", "随机采样（否则贪心解码）"),
    "temperature": ("Temperature", "温度"),
    "beams": ("Beams", "束宽"),
    "max_new_tokens": ("Maximum length (tokens)", "最大长度（词元）"),
    "seed": ("Seed", "随机种子"),
    "busy": ("The last question is being answered: wait, or press Stop.", "正在回答上一个问题：请等待，或按“停止”。"),
    "nothing": ("There is no question: write one, or add an image.", "没有问题：请输入问题，或添加图片。"),
    "too_many": (
        "A chat can have {count} images: send fewer, or press Clear to start a new one.",
        "一次对话最多 {count} 张图片：请减少图片，或按“清空”重新开始。",
    ),
    "gone": ("{name} is no longer on the server: add it again.", "服务器上已没有 {name}：请重新添加。"),
    "failed": ("The model failed; the server's log has the reason.", "模型出错，原因见服务器日志。"),
    "too_large": (
        "{size} MiB are too much; at most {limit} MiB can be sent together.",
        "共 {size} MiB，一次最多发送 {limit} MiB。",
    ),
    "full": ("The server holds too many uploads; try again later.", "服务器上的上传文件过多，请稍后再试。"),
    "no_answer": ("There is no answer to retry yet.", "还没有可以重试的回答。"),
    "stopped": ("stopped", "已停止"),
    "received": ("image received", "已收到图片"),
    "numbers": (
        "{count} tokens, {speed:.1f} tokens/s, first after {first:.2f} s, {cached} of {prompt} prompt tokens cached",
        "{count} 个词元，{speed:.1f} 词元/秒，首个用时 {first:.2f} 秒，提示词元 {prompt} 个，其中 {cached} 个已缓存",
    ),
}
ENGLISH, CHINESE = ({key: texts[i] for key, texts in TEXTS.items()} for i in range(2))


def localized(request: Any, key: str) -> str:
    """A text in the language of the browser that sent a request of gradio or Starlette."""
    return (CHINESE if (request.headers.get("accept-language") or "").lower().startswith("zh") else ENGLISH)[key]


def describe_numbers(request: Any, answer: Answer) -> str:
    """Length and speed of an answer."""
    count, first = len(answer.ids), answer.seconds_to_first_token
    speed = (count - 1) / (answer.seconds - first) if answer.seconds > first else count / answer.seconds
    numbers = {"count": count, "speed": speed, "first": first}
    return localized(request, "numbers").format(**numbers, cached=answer.cached_tokens, prompt=answer.prompt_tokens)
