"""Trains the small frozen backbones from scratch: a tokenizer and a language model on text, a vision side on pictures.

The two never meet here. The language model learns to read four words an object between <Img> and </Img>, as text;
the vision side learns to name the same words with heads of its own, which are thrown away. What joins them is left to
the projection, exactly as in MiniGPT-4.

    python -m quickstart.pretrain text --steps 2000
    python -m quickstart.pretrain vision --steps 1700
    python -m quickstart.pretrain vision --steps 1900 --again    # then 1400 and 2600: as long as the ceiling rises
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4.conversation.conversation import CONV_VISION
from minigpt4.conversation.generation import GenerationOptions, generate
from minigpt4.datasets.datasets.sample import decode_image
from minigpt4.models.eva_vit import build_eva_vit
from minigpt4.models.llama_tokenizer import LlamaTokenizer
from minigpt4.models.Qformer import QFormer, QFormerConfig
from minigpt4.processors.blip_processors import MEAN, STD
from quickstart import scenes

WEIGHTS = Path(__file__).parent / "weights"
SEED = 20230705
VIT = {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 4.0}
Q_FORMER = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "cross_attention_freq": 1,
}
NUM_QUERIES = 4 * scenes.MAX_OBJECTS
INSTRUCTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
VOCABULARY = scenes.all_attribute_words()


def record(result: dict[str, dict[str, float]]) -> None:
    """Adds a result to weights/pretraining.json."""
    file = WEIGHTS / "pretraining.json"
    known = json.loads(file.read_text()) if file.exists() else {"seed": SEED}
    file.write_text(json.dumps(known | result, indent=2) + "\n")
    print(result, flush=True)


def optimise(parameters: list[nn.Parameter], losses: Iterator[Tensor], steps: int, lr: float, name: str) -> None:
    """AdamW with warm-up and a cosine to zero over ``steps`` losses."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    start, mean = time.time(), 0.0
    for step in range(steps):
        rate = lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = next(losses)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        mean += (loss.item() - mean) * max(0.02, 1 / (step + 1))
        if step % 100 == 0 or step + 1 == steps:
            seconds = time.time() - start
            print(f"{name} step {step} of {steps}, loss {mean:.4f}, {seconds:.0f} s", flush=True)


# ---- text -----------------------------------------------------------------------------------------------------------


def train_tokenizer(folder: Path) -> LlamaTokenizer:
    """A sentencepiece BPE with Llama's settings, whose pieces are whole words of this world, and its config files."""
    rng = Random(SEED)
    words: list[str] = []
    for _ in range(3000):
        scene = scenes.draw_scene(rng)
        texts = [scenes.caption(scene), scenes.description(scene), rng.choice(INSTRUCTIONS), CONV_VISION.system]
        texts += [text for pair in scenes.questions(scene, rng) for text in pair]
        words += " ".join(texts).replace(".", " . ").replace("?", " ? ").replace(":", " : ").split()
        words += ["###", "Human", "Assistant", ":", "<Img>", "</Img>", scenes.FILLER]
    model = folder / "tokenizer"
    with contextlib.chdir(folder):  # the file keeps the prefix that it was trained under: its bare name
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words),
            model_prefix=model.name,
            model_type="bpe",
            vocab_size=768,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            split_by_unicode_script=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    model.with_suffix(".vocab").unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    records = {
        role: {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for role, token in special.items()
    }
    settings = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"}
    (folder / "special_tokens_map.json").write_text(json.dumps(records, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | records, indent=2) + "\n")
    tokenizer = LlamaTokenizer(folder)
    split = [word for word in VOCABULARY if len(tokenizer.encode(word, add_special_tokens=False)) != 1]
    if split:
        raise SystemExit(f"The tokenizer splits {', '.join(split)}; give it a larger vocabulary.")
    return tokenizer


class Texts:
    """Rows as MiniGPT-4 will pack them, with words in the place of the image: ids, where the image is, labels."""

    def __init__(self, tokenizer: LlamaTokenizer, rng: Random) -> None:
        self.tokenizer = tokenizer
        self.rng = rng
        self.word_ids = {word: tokenizer.encode(word, add_special_tokens=False)[0] for word in VOCABULARY}
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Ids of one segment, without the begin token."""
        if text not in self._known:
            if len(self._known) > 50_000:
                self._known.clear()
            self._known[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]

    def row(self, kind: str) -> tuple[list[int], int, list[int]]:
        """One training row of a kind: ids, the position where its 12 image words start, labels."""
        scene = scenes.draw_scene(self.rng)
        things = list(scene.things)
        self.rng.shuffle(things)  # the LM names objects in the order in which it reads them
        groups = [self._shuffled(list(thing.words)) for thing in things]
        groups += [[scenes.FILLER] * 4] * (scenes.MAX_OBJECTS - len(groups))
        image = [self.word_ids[word] for group in groups for word in group]
        told = scenes.Scene(tuple(things))
        if kind == "stage 1":
            return self._join([], image, [(self.ids(scenes.caption(told) + "\n"), True)])
        if kind == "stage 2":
            before = self.ids("###Human: <Img>")
            after = self.ids(f"</Img> {self.rng.choice(INSTRUCTIONS)} ###Assistant: ")
            return self._join(before, image, [(after, False), (self.ids(scenes.description(told) + "###"), True)])
        return self._chat(told, scene, image)

    def _chat(self, told: scenes.Scene, scene: scenes.Scene, image: list[int]) -> tuple[list[int], int, list[int]]:
        turns = [(self.rng.choice(INSTRUCTIONS), scenes.description(told))] if self.rng.random() < 0.6 else []
        turns += scenes.questions(scene, self.rng)[: self.rng.randint(0 if turns else 1, 2)]
        text, answers = "</Img>", []
        for i, (question, answer) in enumerate(turns):
            text += f"{' ' if i == 0 else 'Human: '}{question}###Assistant:"
            start = len(self.ids(text))
            text += f" {answer}###"
            answers.append(range(start, len(self.ids(text))))
        ids = self.ids(text)
        targets = {position for answer in answers for position in answer}
        parts = [([token_id], position in targets) for position, token_id in enumerate(ids)]
        system = CONV_VISION.system + CONV_VISION.sep if self.rng.random() < 0.8 else "###"
        return self._join(self.ids(f"{system}Human: <Img>"), image, parts)

    def _join(
        self, before: list[int], image: list[int], parts: list[tuple[list[int], bool]]
    ) -> tuple[list[int], int, list[int]]:
        ids = [self.tokenizer.bos_token_id, *before, *image]
        labels = [-100] * len(ids)
        for part, is_target in parts:
            ids += part
            labels += part if is_target else [-100] * len(part)
        return ids, 1 + len(before), labels

    def _shuffled(self, words: list[str]) -> list[str]:
        if self.rng.random() < 0.25:
            self.rng.shuffle(words)
        return words

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Padded ids [B, T], a mask of image positions [B, T], labels [B, T], all rows of one kind (like in length)."""
        kind = self.rng.choices(("stage 1", "stage 2", "chat"), (0.35, 0.3, 0.35))[0]
        rows = [self.row(kind) for _ in range(size)]
        width = max(len(ids) for ids, _, _ in rows)
        ids, labels = torch.full((size, width), 2), torch.full((size, width), -100)
        is_image = torch.zeros(size, width, dtype=torch.bool)
        for i, (row_ids, start, row_labels) in enumerate(rows):
            ids[i, : len(row_ids)] = torch.tensor(row_ids)
            labels[i, : len(row_ids)] = torch.tensor(row_labels)
            is_image[i, start : start + NUM_QUERIES] = True
        return ids, is_image, labels


def train_text(steps: int, again: bool) -> None:
    """Trains tokenizer and LM and writes weights/llama."""
    if again:
        raise SystemExit("--again is for the vision side; the language model is at its ceiling after one run.")
    folder = WEIGHTS / "llama"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.05,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    texts = Texts(tokenizer, Random(SEED + 1))
    print(f"LM: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)

    def losses() -> Iterator[Tensor]:
        while True:
            ids, is_image, labels = texts.batch(48)
            embeds = model.model.embed_tokens(ids)
            # Image words are blurred, so that the LM also reads the inexact ones that a projection will bring.
            scale = embeds.detach().std() * torch.rand(len(ids), 1, 1) * 0.6
            embeds = embeds + is_image.unsqueeze(-1) * scale * torch.randn_like(embeds)
            hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
            where = labels[:, 1:] != -100
            yield cross_entropy(model.lm_head(hidden[where]), labels[:, 1:][where])

    optimise(list(model.parameters()), losses(), steps, 2e-3, "text")
    model.half()
    model.config.dtype = "float16"
    model.save_pretrained(folder)
    ceiling = text_ceiling(model.float().eval(), texts)
    record({"text": {"steps": steps, "ceiling on held-out objects": round(ceiling, 4)}})


@torch.inference_mode()
def text_ceiling(model: nn.Module, texts: Texts, num_scenes: int = 200) -> float:
    """Share of held-out objects that the LM describes fully right when it is given their true words to read."""
    rng, ids = Random(SEED + 4), texts.ids
    drawn = [scenes.draw_scene(rng, held_out=True) for _ in range(num_scenes)]
    after = ids(f"</Img> {INSTRUCTIONS[0]} ###Assistant: ")
    rows = [[1, *ids("###Human: <Img>"), *(texts.word_ids[w] for w in scene.words), *after] for scene in drawn]
    embeds = model.get_input_embeddings()(torch.tensor(rows))
    options = GenerationOptions(
        max_new_tokens=80, do_sample=False, stop=lambda row: "###" in texts.tokenizer.decode(row)
    )
    results = generate(model, embeds, torch.ones(embeds.shape[:2], dtype=torch.long), options, bos=1, eos=2)
    return scenes.share_fully_right(drawn, [texts.tokenizer.decode(result.ids) for result in results])


# ---- vision ---------------------------------------------------------------------------------------------------------


class VisionSide(nn.Module):
    """Tower, ln_vision, queries and Q-Former, with the heads that only pretraining needs."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build_eva_vit(scenes.IMAGE_SIZE, vit_config=VIT)
        width = VIT["embed_dim"]
        self.ln_vision = nn.LayerNorm(width, eps=1e-5)
        self.query_tokens = nn.Parameter(torch.randn(1, NUM_QUERIES, Q_FORMER["hidden_size"]) * 0.5)
        self.q_former = QFormer(QFormerConfig(**Q_FORMER, encoder_width=width, dropout=0.0))
        self.word_head = nn.Linear(Q_FORMER["hidden_size"], len(VOCABULARY))
        self.cell_head = nn.Linear(width, len(VOCABULARY) * 4)
        side = scenes.IMAGE_SIZE // VIT["patch_size"]
        patches, cells = torch.arange(side + 1) / side, torch.arange(4) / 3
        overlap = torch.minimum(patches[1:], cells[1:, None]) - torch.maximum(patches[:-1], cells[:-1, None])
        overlap = overlap.clamp(min=0)  # [3, side]: how much of each patch row lies in each cell row
        pool = torch.einsum("ap,bq->abpq", overlap, overlap).reshape(9, -1)
        self.register_buffer("pool", pool / pool.sum(1, keepdim=True))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S] to word logits [B, 12, V] and, from the tower alone, cell logits [B, 9, 4, V]."""
        tokens = self.ln_vision(self.vit.forward_features(images))
        words = self.word_head(self.q_former(self.query_tokens.expand(len(images), -1, -1), tokens))
        cells = self.cell_head(torch.einsum("cp,bpw->bcw", self.pool.to(tokens.dtype), tokens[:, 1:]))
        return words, cells.unflatten(-1, (4, -1))


def targets_of(scene: scenes.Scene) -> tuple[list[int], list[list[int]]]:
    """Word classes of the 12 queries, and (size, colour, shape, number of the object) classes of the nine cells.

    That a cell knows which object it holds, the first, second or third, is what lets the queries find theirs.
    """
    filler = VOCABULARY.index(scenes.FILLER)
    cells = [[filler] * 3 + [0] for _ in scenes.PLACES]
    for number, thing in enumerate(scene.things, 1):
        cells[scenes.PLACES.index(thing.place)] = [VOCABULARY.index(word) for word in thing.words[:3]] + [number]
    return [VOCABULARY.index(word) for word in scene.words], cells


def pixels(images: list[Image.Image]) -> Tensor:
    """RGB images of the right size to float32 [B, 3, S, S], normalised as the eval processor does."""
    array = torch.from_numpy(numpy.stack([numpy.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255
    return (array - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def vision_batch(rng: Random, size: int, held_out: bool = False) -> tuple[Tensor, Tensor, Tensor, list[scenes.Scene]]:
    """Freshly drawn pictures, after a round trip through JPEG, with word and cell targets."""
    drawn = [scenes.draw_scene(rng, held_out) for _ in range(size)]
    images = pixels([decode_image(scenes.jpeg(scenes.render(scene, rng))) for scene in drawn])
    words, cells = zip(*map(targets_of, drawn), strict=True)
    return images, torch.tensor(words), torch.tensor(cells), drawn


def vision_ceiling(model: VisionSide, num_scenes: int = 1000) -> float:
    """Share of held-out objects whose four words the vision side's own head names right."""
    rng, right, total = Random(SEED + 3), 0, 0
    with torch.no_grad():
        for _ in range(num_scenes // 100):
            images, words, _, drawn = vision_batch(rng, 100, held_out=True)
            hits = (model(images)[0].argmax(-1) == words).unflatten(1, (-1, 4)).all(-1)  # [B, objects]
            for row, scene in zip(hits.tolist(), drawn, strict=True):
                right += sum(row[: len(scene.things)])
                total += len(scene.things)
    return right / total


def train_vision(steps: int, again: bool) -> None:
    """Trains the vision side and writes weights/eva_vit.safetensors and weights/qformer.safetensors.

    With ``again`` it goes on from those files, with new heads and other pictures.
    """
    model, rng = VisionSide(), Random(SEED + (5 if again else 2))
    total_steps = steps
    if again:
        total_steps += json.loads((WEIGHTS / "pretraining.json").read_text())["vision"]["steps"]
        state = {f"vit.{name}": value for name, value in load_file(WEIGHTS / "eva_vit.safetensors").items()}
        rest = load_file(WEIGHTS / "qformer.safetensors")
        state |= {name.replace("Qformer.", "q_former."): value for name, value in rest.items()}
        model.load_state_dict({**model.state_dict(), **state})
    print(f"Vision: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    def losses() -> Iterator[Tensor]:
        while True:
            images, words, cells, _ = vision_batch(rng, 64)
            word_logits, cell_logits = model(images)
            word_loss = cross_entropy(word_logits.flatten(0, 1), words.flatten())
            cell_loss = cross_entropy(cell_logits.flatten(0, 2), cells.flatten())
            yield word_loss + cell_loss

    optimise(list(model.parameters()), losses(), steps, 1e-3, "vision")
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    record({"vision": {"steps": total_steps, "ceiling on held-out objects": round(vision_ceiling(model), 4)}})
    half = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    vit = {name.removeprefix("vit."): value for name, value in half.items() if name.startswith("vit.")}
    rest = {name: value for name, value in half.items() if name == "query_tokens" or name.startswith("ln_vision.")}
    rest |= {name.replace("q_former.", "Qformer."): v for name, v in half.items() if name.startswith("q_former.")}
    WEIGHTS.mkdir(exist_ok=True)
    save_file(vit, WEIGHTS / "eva_vit.safetensors")
    save_file(rest, WEIGHTS / "qformer.safetensors")


def main() -> None:
    """Trains one side, on one thread, so that both can run at once on two cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["text", "vision"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--again", action="store_true", help="go on from the vision weights that are there")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    {"text": train_text, "vision": train_vision}[args.side](args.steps, args.again)


if __name__ == "__main__":
    main()
