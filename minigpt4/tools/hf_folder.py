"""Processor, tokenizer and model card of an exported folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AddedToken, AutoProcessor, AutoTokenizer

from minigpt4.common import weights
from minigpt4.common.errors import UserError
from minigpt4.common.schema import LATER, ModelConfig
from minigpt4.common.templates import Conversation
from minigpt4.models import MiniGPT4
from minigpt4.models.loading import CKPT
from minigpt4.models.lora import is_lora
from minigpt4.models.text_rows import IMAGE_TOKEN_INDEX
from minigpt4.tools.chat_jinja import IMAGE_TOKEN, chat_template
from minigpt4.tools.model_folder import copy_settings, write_json

ORIGIN, ORIGINAL_LM = "minigpt4/origin.json", "minigpt4/llama_model"  # what import_hf needs, beside the weights
SETTINGS = (  # of the section model, which describe the model and not a run or a machine
    *("arch", "model_type", "image_size", "vit_precision", "vit_config", "num_query_token", "qformer_config"),
    *("llm_dtype", "conversation", "prompt_template", "max_txt_len", "end_sym", "chat_template", "max_context_len"),
)
_BICUBIC = 3  # of Pillow
_DROPPED = ("extra_special_tokens", "chat_template", "is_local", "local_files_only")  # of tokenizer_config.json
# ``Blip2ForConditionalGeneration.generate`` ignores that of generation_config.json, which counts the prompt's tokens.
_PENALTY = """\
from transformers import RepetitionPenaltyLogitsProcessor

penalty = RepetitionPenaltyLogitsProcessor(1.05, prompt_ignore_length=inputs["input_ids"].shape[1])
"""
_PENALTY_LIMIT = """\
- The repetition penalty above counts the answer's tokens. That of `generation_config.json`, which pipelines and servers
  use, counts those of the prompt, too: answers may differ.
"""
_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
---
# MiniGPT-4

EVA-ViT and Q-Former, one linear projection and the language model in one folder, as transformers'
`Blip2ForConditionalGeneration` (Zhu et al., 2023, https://arxiv.org/abs/2304.10592). The licences of the parts apply.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(FOLDER, backend="pil")  # the pixels of training
model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype="auto")
content = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "Describe this image in detail."}]
messages = [{"role": "user", "content": content}]
settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template(messages, **settings).to(model.device, model.dtype)
PENALTYids = model.generate(**inputs, max_new_tokens=300GENERATION)
answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)REMOVED
print(answer)
```

## Limits

- STOPS
LIMIT- Engines that know BLIP-2 by its architecture, such as vLLM, put the image before the begin token and would answer
  wrongly; therefore `architectures` has a name that they refuse. For vLLM there is a plugin, `minigpt4-vllm`.
- The norm behind the vision transformer has eps 1e-6 in place of 1e-5, which changes features by about 1e-5.
- The chat template writes the begin token; to encode its text, pass `add_special_tokens=False`.
- `<image>` in a user's text is taken for an image. The order of images is that of the messages.

## Training

TRAINING
"""


def write_processor(folder: Path, source: Path, model: MiniGPT4, image_processor: Any) -> tuple[Any, list[int]]:
    """Writes tokenizer, chat template and image processor; returns them as loaded, and the ids that end an answer."""
    tokenizer = AutoTokenizer.from_pretrained(str(source), legacy=True, local_files_only=True, trust_remote_code=False)
    token = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [token], "pad_token": tokenizer.eos_token})
    tokenizer.save_pretrained(str(folder))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name not in _DROPPED}
    if (source / "tokenizer.model").is_file():  # without it, texts behind a special token get other ids
        config["legacy"] = True
    config |= {"padding_side": "left", "processor_class": "LlavaProcessor"}
    write_json(folder / "tokenizer_config.json", config)
    template = chat_template(model.template, model.prompt_template, model.end_sym, model.llama_tokenizer)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    image_size = image_processor.image_size
    size = {"height": image_size, "width": image_size}
    steps = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    images = dict.fromkeys(steps, True) | {"size": size, "resample": _BICUBIC, "rescale_factor": 1 / 255}
    images |= {
        "image_mean": image_processor.mean,
        "image_std": image_processor.std,
        "processor_class": "LlavaProcessor",
    }
    write_json(folder / "preprocessor_config.json", images | {"image_processor_type": "BlipImageProcessor"})
    # One patch of the image's size, and the rest of the queries beside it.
    numbers = {"patch_size": image_size, "num_additional_image_tokens": model.num_query_token - 1}
    content = numbers | {"vision_feature_select_strategy": "full", "image_token": IMAGE_TOKEN}
    content |= {"processor_class": "LlavaProcessor"}
    write_json(folder / "processor_config.json", content)
    processor = AutoProcessor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return processor, _end_ids(model)


def write_origin(
    folder: Path, cfg: ModelConfig, llama_model: Path, image_processor: Any, states: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Writes what ``import_hf`` needs beside the weights: settings, dtypes, names, and the files of the LM's folder."""
    dtypes = {key: sorted({str(v.dtype) for n, v in state.items() if not is_lora(n)}) for key, state in states.items()}
    trained, default = states[CKPT], type(image_processor)()
    images = {name: getattr(image_processor, name) for name in ("mean", "std", "draft")}
    content = {
        "model": {name: value for name, value in asdict(cfg).items() if name in SETTINGS},
        "vis_processor": {name: value for name, value in images.items() if value != getattr(default, name)},
        "dtypes": dtypes,
        "ckpt": [name for name in trained if not is_lora(name)],
        "has_merged_lora": any(map(is_lora, trained)),
    }
    (folder / ORIGIN).parent.mkdir()
    write_json(folder / ORIGIN, content)
    copy_settings(llama_model, folder / ORIGINAL_LM)


def _end_ids(model: MiniGPT4) -> list[int]:
    """The end token, and every token whose text contains the template's stop string."""
    tokenizer, stop = model.llama_tokenizer, model.template.stop_string
    numbers = range(len(tokenizer)) if stop else ()
    return [*model.eos_ids, *(i for i in numbers if i not in model.eos_ids and stop in tokenizer.decode([i]))]


def check_prompts(processor: Any, model: MiniGPT4, image_id: int) -> None:
    """Raises UserError unless transformers writes and encodes a conversation of two turns as ``Chat`` does."""
    conv = model.template.copy()
    messages: list[dict[str, Any]] = []
    for question, answer in (("What is it?", "A cat, (black)."), ("Is it 2 years old?", None)):
        texts = [{"type": "text", "text": question}]
        conv.ask_with_images("" if messages else f"<ImageHere>{question}")
        if messages:
            conv.ask(question)
        conv.append_message(conv.roles[1], answer)
        messages.append({"role": "user", "content": texts if messages else [{"type": "image"}, *texts]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * model.num_query_token)
    adds_begin = not (processor.tokenizer.bos_token and text.startswith(processor.tokenizer.bos_token))
    found = processor.tokenizer(text, add_special_tokens=adds_begin).input_ids
    ids = model.bos_ids + model.tokenize_prompt(conv.get_prompt())
    if [IMAGE_TOKEN_INDEX if i == image_id else i for i in found] != ids:
        problem = "transformers' tokenizer encodes prompts of this template with other ids than were trained"
        raise UserError(f"model.llama_model: {problem}; this model cannot be exported.")


def write_card(folder: Path, model: MiniGPT4, conv: Conversation, checkpoint: Path, ends: Sequence[int]) -> None:
    """Writes README.md: how to load the folder, its limits, the data and the results of the run."""
    stop = conv.stop_string
    last = {model.tokenize(text + stop)[-1] for text in ("word", "word.", "word ")}
    needs_stop = bool(stop) and not last <= set(ends)
    settings = f", stop_strings=[{json.dumps(stop)}], tokenizer=processor.tokenizer" if needs_stop else ""
    is_later = model.arch in LATER
    settings += ", logits_processor=[penalty]" if is_later else ""
    stops = "Answers end by themselves (`text_config.eos_token_id`)."
    if needs_stop:
        stops = (
            f"Answers end with {json.dumps(stop)}, which may be several tokens: pass `stop_strings` and `tokenizer`."
        )
    removed = ""
    if stop and stop not in model.llama_tokenizer.all_special_tokens:  # which decoding leaves out
        removed = f".removesuffix({json.dumps(stop)})"
        stops += f" transformers leaves {json.dumps(stop)} at the end of the text."
    content = weights.read_file(checkpoint, "model.ckpt")
    names = content.get("config", {}).get("datasets") or {} if isinstance(content.get("config"), dict) else {}
    state = content.get("state") if isinstance(content.get("state"), dict) else {}
    lines = [f"- Data sets of the last stage: {', '.join(names) or 'not recorded'}."]
    lines += [f"- Steps of the last stage: {state['step']:,}."] if "step" in state else []
    log = checkpoint.resolve().parent / "log.txt"
    results = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()] if log.is_file() else []
    lines.append(f"- Measured at the end: `{results[-1]}`." if results else "- Measured results: not recorded.")
    card = _CARD.replace("PENALTY", _PENALTY * is_later).replace("LIMIT", _PENALTY_LIMIT * is_later)
    card = card.replace("GENERATION", settings).replace("REMOVED", removed).replace("STOPS", stops)
    (folder / "README.md").write_text(card.replace("TRAINING", "\n".join(lines)), encoding="utf-8")
