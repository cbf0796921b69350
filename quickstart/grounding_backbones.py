"""Trains the small frozen backbones of ``quickstart.grounding``, which never meet here.

The vision transformer continues from the quickstart's at a larger image size: linear heads name, for each group of four
patches, the object whose centre lies in it, and the digits of its box. The language model learns the task prompts from
facts: one vector for each group, the sum of the words and digits of the object in it. Heads and tables are discarded,
so that the projection and LoRA have to connect the two, as in MiniGPT-v2.

    python -m quickstart.grounding_backbones text --steps 2000
    python -m quickstart.grounding_backbones vision --steps 1500
"""

import argparse
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, one_hot

from minigpt4.common.boxes import box_to_text, text_boxes
from minigpt4.datasets.datasets.instructions import FORMATS
from minigpt4.datasets.datasets.sample import decode_image
from minigpt4.models.eva_vit import build_eva_vit, interpolate_pos_embed
from quickstart import pretrain, scenes, text_side
from quickstart.scenes import Scene, Thing
from quickstart.vision_side import VIT, normalise

WEIGHTS = pretrain.WEIGHTS / "grounding"
IMAGE_SIZE = 96
COLUMNS = IMAGE_SIZE // VIT["patch_size"] // 4  # groups of four patches in a row of patches
NUM_GROUPS = COLUMNS * IMAGE_SIZE // VIT["patch_size"]
FACTS = (len(scenes.SIZES), len(scenes.COLOURS), len(scenes.SHAPES), *(10,) * 8)  # classes of each fact of an object
LLAMA = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4}
REFER, IDENTIFY, GROUND = (FORMATS[name].templates for name in ("refcoco", "invrefcoco", "flickr_grounded_caption"))


def phrase(thing: Thing) -> str:
    """What an object is called."""
    return f"{thing.size} {thing.colour} {thing.shape}"


def box_text(box: scenes.Box) -> str:
    """A pixel box as text."""
    left, top, right, bottom = box
    return box_to_text((left, top, right - left, bottom - top), IMAGE_SIZE, IMAGE_SIZE)


def grounded_caption(scene: Scene, boxes: Sequence[scenes.Box]) -> str:
    """A description whose phrases have boxes."""
    parts = (f"<p>a {phrase(thing)}</p> {box_text(box)}" for thing, box in zip(scene.things, boxes, strict=True))
    return " and ".join(parts)


def draw_facts(rng: Random, held_out: bool = False) -> tuple[Scene, list[scenes.Box], Any, Tensor]:
    """A scene, its boxes and image, and the facts [G, 11] of the object in each group; -1 where there is none."""
    scene = scenes.draw_scene(rng, held_out)
    image, boxes = scenes.render_with_boxes(scene, rng, IMAGE_SIZE)
    facts = torch.full((NUM_GROUPS, len(FACTS)), -1)
    for thing, box in zip(scene.things, boxes, strict=True):
        column, row = (int((box[i] + box[i + 2]) / 2 / VIT["patch_size"]) for i in (0, 1))
        digits = [digit for value in text_boxes(box_text(box))[0] for digit in divmod(value, 10)]
        words = [scenes.SIZES.index(thing.size), list(scenes.COLOURS).index(thing.colour)]
        facts[row * COLUMNS + column // 4] = torch.tensor([*words, scenes.SHAPES.index(thing.shape), *digits])
    return scene, boxes, image, facts


class VisionHeads(nn.Module):
    """The vision transformer with linear heads on its groups of four patches."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build_eva_vit(IMAGE_SIZE, vit_config=VIT)
        state = load_file(pretrain.WEIGHTS / "eva_vit.safetensors")
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"].float(), self.vit.pos_embed.shape[1])
        self.vit.load_state_dict(state)
        self.classes = nn.Linear(4 * VIT["embed_dim"], 2 + sum(FACTS))
        self.values = nn.Linear(4 * VIT["embed_dim"], sum(FACTS))

    def groups(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to what MiniGPT-v2's projection reads, [B, G, 4 * D]; its ln_vision is untrained."""
        tokens = self.vit(images)
        return layer_norm(tokens, tokens.shape[-1:], eps=1e-5)[:, 1:].unflatten(1, (-1, 4)).flatten(2)


def draw_batch(rng: Random, size: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """Images [B, 3, S, S] after a round trip through JPEG, and their facts [B, G, 11]."""
    drawn = [draw_facts(rng, held_out) for _ in range(size)]
    images = normalise([decode_image(scenes.jpeg(image)) for _, _, image, _ in drawn])
    return images, torch.stack([facts for *_, facts in drawn])


def class_losses(model: VisionHeads, rng: Random) -> Iterator[Tensor]:
    """The loss of naming where objects are and their facts, of one batch after another."""
    while True:
        images, facts = draw_batch(rng, 32)
        with torch.autocast("cpu", torch.bfloat16):
            has_object, *logits = model.classes(model.groups(images)).float().split((2, *FACTS), dim=-1)
        is_there = facts[..., 0] >= 0
        loss = cross_entropy(has_object.flatten(0, 1), is_there.flatten().long())
        yield loss * 5 + sum(cross_entropy(own[is_there], facts[..., i][is_there]) for i, own in enumerate(logits))


def value_losses(model: VisionHeads, rng: Random) -> Iterator[Tensor]:
    """The squared error of values that are 1 for a fact of an object in the group, else 0.

    They are linear in the patches, as is all that a projection can pass on: it has no threshold of its own.
    """
    while True:
        images, facts = draw_batch(rng, 32)
        with torch.autocast("cpu", torch.bfloat16):
            values = model.values(model.groups(images)).float()
        is_there = (facts[..., :1] >= 0).float()
        wanted = torch.cat([one_hot(facts[..., i].clamp(min=0), n) for i, n in enumerate(FACTS)], -1) * is_there
        yield ((values - wanted).square().sum(-1) * (1 + 5 * is_there[..., 0])).mean()


@torch.no_grad()
def vision_ceiling(model: VisionHeads, rng: Random) -> float:
    """Share of held-out objects whose three words and four tens digits the linear values name right."""
    images, facts = draw_batch(rng, 300, held_out=True)
    is_there, values = facts[..., 0] >= 0, model.values(model.groups(images)).split(FACTS, dim=-1)
    checked = [i for i in range(len(FACTS)) if i < 3 or i % 2]
    right = torch.stack([values[i][is_there].argmax(-1) == facts[..., i][is_there] for i in checked])
    return right.all(0).float().mean().item()


def train_vision(steps: int) -> None:
    """Trains the vision transformer, two thirds of the steps by class and then by value, and writes it in float16."""
    model = VisionHeads()
    num_by_value = steps // 3
    pretrain.optimise(
        [*model.parameters()], class_losses(model, Random(pretrain.SEED + 2)), steps - num_by_value, 1e-3, "vision"
    )
    pretrain.optimise(
        [*model.parameters()], value_losses(model, Random(pretrain.SEED + 5)), num_by_value, 1e-3, "values"
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    pretrain.record(WEIGHTS, "vision", steps, objects=vision_ceiling(model, Random(pretrain.SEED + 3)))
    state = {name: value.half().contiguous() for name, value in model.vit.state_dict().items()}
    save_file(state, WEIGHTS / "eva_vit.safetensors")


def words(rng: Random) -> Iterator[str]:
    """The words of the tasks, of which the tokenizer is made."""
    for _ in range(2000):
        scene, boxes, _, _ = draw_facts(rng)
        texts = [rng.choice(templates) for templates in (REFER, IDENTIFY, GROUND)]
        texts += ["[INST] <Img> </Img> [/INST] {<", ">}", grounded_caption(scene, boxes), "[vqa] [caption] [detection]"]
        yield from " ".join(texts).replace("{}", "").replace("<p>", "<p> ").replace("</p>", " </p>").split()
        yield from text_side.VOCABULARY


Row = tuple[list[int], int, list[int], Tensor]


class TextRows:
    """Draws rows of the tasks, with vectors of the facts in place of the image."""

    def __init__(self, tokenizer: Any, rng: Random) -> None:
        self.tokenizer, self.rng = tokenizer, rng

    def ids(self, text: str) -> list[int]:
        """Token ids of one segment."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def batch(self, size: int) -> list[Row]:
        """Rows of one task."""
        task = self.rng.choices(("refer", "identify", "grounding"), (0.5, 0.25, 0.25))[0]
        return [self.row(task) for _ in range(size)]

    def row(self, task: str, held_out: bool = False) -> Row:
        """Ids up to the answer, position of the image in them, ids of the answer, and facts [G, 11]."""
        rng = self.rng
        scene, boxes, _, facts = draw_facts(rng, held_out)
        unique = [i for i, thing in enumerate(scene.things) if [*map(phrase, scene.things)].count(phrase(thing)) == 1]
        number = rng.choice(unique or [0])
        name, box = phrase(scene.things[number]), box_text(boxes[number])
        question, answer = {
            "refer": (rng.choice(REFER).format(name), box),
            "identify": (rng.choice(IDENTIFY).format(box), name),
            "grounding": (rng.choice(GROUND), grounded_caption(scene, boxes)),
        }[task]
        is_chat = rng.random() < 0.3  # begins with two <s> and has one space less
        before = [1, *([1] if is_chat else []), *self.ids("[INST] <Img>")]
        after = self.ids(f"</Img> {question}{'' if is_chat else ' '} [/INST]{'' if is_chat else ' '}".rstrip())
        return [*before, *[0] * NUM_GROUPS, *after], len(before), self.ids(f"{answer}</s>"), facts


class FactTables(nn.Module):
    """Facts [B, G, 11] to vectors [B, G, L]: the sum of a learned vector for each fact."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.randn(width) * 0.05)
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in FACTS)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, facts: Tensor) -> Tensor:
        """The vectors of a batch."""
        total = sum(table(facts[..., i].clamp(min=0)) for i, table in enumerate(self.tables))
        return torch.where(facts[..., :1] >= 0, total, self.nothing)


def text_losses(model: nn.Module, tables: FactTables, rows: TextRows) -> Iterator[Tensor]:
    """The next-token loss of one batch after another."""
    while True:
        drawn = rows.batch(32)
        width = max(len(ids) + len(answer) for ids, _, answer, _ in drawn)
        ids, labels = torch.full((len(drawn), width), 2), torch.full((len(drawn), width), -100)
        for i, (before, _, answer, _) in enumerate(drawn):
            ids[i, : len(before) + len(answer)] = torch.tensor(before + answer)
            labels[i, len(before) : len(before) + len(answer)] = torch.tensor(answer)
        embeds, vectors = model.get_input_embeddings()(ids).clone(), tables(torch.stack([row[3] for row in drawn]))
        noise = vectors.detach().std() * torch.rand(len(drawn), 1, 1) * 0.3
        vectors = vectors + noise * torch.randn_like(vectors)  # teaches the LM to read what a projection will give it
        embeds = torch.stack([
            torch.cat([row[:start], vector, row[start + NUM_GROUPS :]])
            for row, vector, (_, start, *_) in zip(embeds, vectors, drawn, strict=True)
        ])  # fmt: skip
        is_target = labels[:, 1:] != -100
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[is_target])
        yield cross_entropy(logits.float(), labels[:, 1:][is_target])


@torch.inference_mode()
def text_ceiling(model: nn.Module, tables: FactTables, rows: TextRows, num_rows: int = 200) -> float:
    """Share of answers about held-out facts that are right to the digit."""
    num_right = 0
    for number in range(num_rows):
        ids, start, answer, facts = rows.row(("refer", "identify")[number % 2], held_out=True)
        embeds = model.get_input_embeddings()(torch.tensor([ids]))
        embeds[0, start : start + NUM_GROUPS] = tables(facts)
        mask = torch.ones(1, len(ids), dtype=torch.long)
        found = model.generate(inputs_embeds=embeds, attention_mask=mask, do_sample=False, max_new_tokens=80)
        num_right += found[0].tolist() == answer
    return num_right / num_rows


def train_text(steps: int) -> None:
    """Trains tokenizer and language model and writes them in float16."""
    folder = WEIGHTS / "llama"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = text_side.train_tokenizer(folder, words(Random(pretrain.SEED)))
    model = text_side.build_model(len(tokenizer), **LLAMA)
    tables, rows = FactTables(model.config.hidden_size), TextRows(tokenizer, Random(pretrain.SEED + 1))
    losses = text_losses(model, tables, rows)
    pretrain.optimise([*model.parameters(), *tables.parameters()], losses, steps, 2e-3, "text")
    model.half()
    model.config.dtype = "float16"
    model.save_pretrained(folder)
    rows.rng = Random(pretrain.SEED + 4)
    pretrain.record(WEIGHTS, "text", steps, objects=text_ceiling(model.float().eval(), tables, rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains one side, by default on one thread, so that both can run at once on two cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["text", "vision"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(pretrain.SEED)
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    (train_text if args.side == "text" else train_vision)(args.steps)


if __name__ == "__main__":
    main()
