"""The chat template of a model as a Jinja template, with which transformers writes the prompts of our ``Chat``."""

import json
from typing import Any

from minigpt4.common.templates import IMAGE_MESSAGE, Conversation
from minigpt4.common.utils import IMAGE_PLACEHOLDER

IMAGE_TOKEN = "<image>"  # becomes one token per query
# By the loop over ``content``, vLLM knows that images may be anywhere in a message.
# Contents as lists of texts: one that follows an image belongs to it, as in ``Conversation.ask_with_images``.
_PRELUDE = """\
{%- set ns = namespace(system=SYSTEM, turns=[], texts=[]) -%}
{%- for message in messages -%}
{%- set ns.texts = [] -%}
{%- set content = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
{%- for part in content -%}
{%- if part.type in ('image', 'image_url') -%}
{%- set ns.texts = ns.texts + [IMAGE] -%}
{%- elif part.text | trim and ns.texts and ns.texts[-1].endswith('</Img>') -%}
{%- set ns.texts = ns.texts[:-1] + [ns.texts[-1] ~ ' ' ~ part.text | trim] -%}
{%- elif part.text | trim -%}
{%- set ns.texts = ns.texts + [part.text | trim] -%}
{%- endif -%}
{%- endfor -%}
{%- if message.role == 'system' -%}
{%- set ns.system = (ns.system ~ ' ' ~ ns.texts | join(' ')) | trim -%}
{%- else -%}
{%- set ns.turns = ns.turns + [{'role': message.role, 'texts': ns.texts}] -%}
{%- endif -%}
{%- endfor -%}
"""
_ROLES = """\
{{- BEGIN ~ ns.system ~ SEP -}}
{%- for turn in ns.turns -%}
{%- if turn.role == 'assistant' -%}
{{- ANSWERER ~ turn.texts | join(' ') ~ ANSWER_END -}}
{%- else -%}
{%- for text in turn.texts -%}
{{- ASKER ~ text ~ SEP -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- OPEN -}}
{%- endif -%}
"""
_FORM = """\
{{- BEGIN ~ (ns.system ~ ' ' if ns.system else '') -}}
{%- for turn in ns.turns -%}
{{- turn.texts | join(' ') ~ ANSWER_END if turn.role == 'assistant' else BEFORE ~ turn.texts | join(' ') ~ AFTER -}}
{%- endfor -%}
"""
_OWN = """\
{%- set ns.texts = [{'role': 'system', 'content': ns.system}] if ns.system else [] -%}
{%- for turn in ns.turns -%}
{%- set ns.texts = ns.texts + [{'role': turn.role, 'content': turn.texts | join(' ')}] -%}
{%- endfor -%}
{%- set messages = ns.texts -%}
"""


def chat_template(conv: Conversation, form: str, end_sym: str, tokenizer: Any) -> str:
    """The Jinja template for a template that ``choose_template`` chose by ``form`` and ``end_sym``.

    It writes the begin token: transformers adds none to such a text, and vLLM adds none to any.
    """
    texts = {"SYSTEM": conv.system, "IMAGE": IMAGE_MESSAGE.replace(IMAGE_PLACEHOLDER, IMAGE_TOKEN)}
    texts["BEGIN"] = bos = tokenizer.bos_token or ""
    if conv.render is None:
        user, assistant = (role + conv.role_delimiter for role in conv.roles)
        texts |= {"SEP": conv.sep, "ANSWER_END": conv.stop_string, "ASKER": user, "ANSWERER": assistant}
        texts["OPEN"] = conv.roles[1] + conv.role_delimiter.rstrip()
        body = _ROLES
    elif form:
        before, after = form.format("\0").split("\0")
        texts |= {"BEFORE": before, "AFTER": after, "ANSWER_END": end_sym}
        body = _FORM
    else:
        body = _OWN
    template = _PRELUDE + body
    for name in sorted(texts, key=len, reverse=True):
        template = template.replace(name, json.dumps(texts[name], ensure_ascii=False))
    if conv.render is None or form:
        return template
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    return template + ("" if text.startswith(bos) else "{{- bos_token -}}") + tokenizer.chat_template
