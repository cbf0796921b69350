"""The vision side of the small backbones: ViT, ln_vision, queries and Q-Former under classification heads."""

from collections.abc import Iterator
from random import Random

import numpy
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from minigpt4.datasets.datasets.sample import decode_image
from minigpt4.models.eva_vit import build_eva_vit
from minigpt4.models.Qformer import QFormer, QFormerConfig
from minigpt4.processors.blip_processors import MEAN, STD
from quickstart import scenes

VIT = {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 4.0}
Q_FORMER = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "cross_attention_freq": 1,
}
NUM_QUERIES = 4 * scenes.MAX_OBJECTS
VOCABULARY = scenes.all_attribute_words()


class VisionSide(nn.Module):
    """ViT, ln_vision, queries and Q-Former, with the heads that only pretraining needs."""

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
        overlap = overlap.clamp(min=0)  # [3, side]: overlap of each patch row with each cell row
        pool = torch.einsum("ap,bq->abpq", overlap, overlap).reshape(9, -1)
        self.register_buffer("pool", pool / pool.sum(1, keepdim=True))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S] to word logits [B, 12, V] and, from the ViT alone, cell logits [B, 9, 4, V]."""
        tokens = self.ln_vision(self.vit.forward_features(images))
        words = self.word_head(self.q_former(self.query_tokens.expand(len(images), -1, -1), tokens))
        cells = self.cell_head(torch.einsum("cp,bpw->bcw", self.pool.to(tokens.dtype), tokens[:, 1:]))
        return words, cells.unflatten(-1, (4, -1))


def targets_of(scene: scenes.Scene) -> tuple[list[int], list[list[int]]]:
    """Word classes of the 12 queries, and (size, colour, shape, object number) classes of the nine cells.

    The number (first, second or third object) of a cell is what lets the queries find their object.
    """
    filler = VOCABULARY.index(scenes.FILLER)
    cells = [[filler] * 3 + [0] for _ in scenes.PLACES]
    for number, thing in enumerate(scene.things, 1):
        cells[scenes.PLACES.index(thing.place)] = [VOCABULARY.index(word) for word in thing.words[:3]] + [number]
    return [VOCABULARY.index(word) for word in scene.words], cells


def normalise(images: list[Image.Image]) -> Tensor:
    """RGB images of the right size to float32 [B, 3, S, S], normalised as the eval processor does."""
    array = torch.from_numpy(numpy.stack([numpy.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255
    return (array - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def draw_batch(rng: Random, size: int, held_out: bool = False) -> tuple[Tensor, Tensor, Tensor, list[scenes.Scene]]:
    """Newly drawn images after a round trip through JPEG, with word and cell targets and their scenes."""
    drawn = [scenes.draw_scene(rng, held_out) for _ in range(size)]
    images = normalise([decode_image(scenes.jpeg(scenes.render(scene, rng))) for scene in drawn])
    words, cells = zip(*map(targets_of, drawn), strict=True)
    return images, torch.tensor(words), torch.tensor(cells), drawn


def losses(model: VisionSide, rng: Random) -> Iterator[Tensor]:
    """Word loss plus cell loss of one batch after another."""
    while True:
        images, words, cells, _ = draw_batch(rng, 64)
        word_logits, cell_logits = model(images)
        word_loss = cross_entropy(word_logits.flatten(0, 1), words.flatten())
        cell_loss = cross_entropy(cell_logits.flatten(0, 2), cells.flatten())
        yield word_loss + cell_loss


@torch.no_grad()
def measure_ceiling(model: VisionSide, rng: Random, num_scenes: int = 1000) -> float:
    """Share of held-out objects whose four words the vision side's own head names right."""
    num_right, total = 0, 0
    for _ in range(num_scenes // 100):
        images, words, _, drawn = draw_batch(rng, 100, held_out=True)
        is_right = (model(images)[0].argmax(-1) == words).unflatten(1, (-1, 4)).all(-1)  # [B, objects]
        for row, scene in zip(is_right.tolist(), drawn, strict=True):
            num_right += sum(row[: len(scene.things)])
            total += len(scene.things)
    return num_right / total
