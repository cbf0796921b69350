"""Stage 1 on 8, 64 and 1,024 cards as arithmetic from formulas and assumed rates; nothing is measured.

python -m benchmarks.scaling
python -m benchmarks.scaling --utilisation 0.25 --net-gbs 25
"""

import argparse
from dataclasses import dataclass

CARDS = (8, 64, 1024)
PAIRS = 256 * 20_000  # stage 1 of the paper
IMAGE_TOKENS, QUERIES, MOST_TEXT = 257, 32, 32
VISION_FILES_GB = 2.4  # files of the vision transformer and the Q-Former
ASSUMED = {
    "peak-tflops": (400, "matrix rate of a card, TFLOP/s"),
    "utilisation": (0.5, "share of it that a step reaches"),
    "batch": (64, "rows a card"),
    "text": (13, "mean text tokens a row"),
    "node-cards": (8, "cards a node"),
    "node-gbs": (150, "GB/s a card inside a node"),
    "node-us": (5, "microseconds a hop inside a node"),
    "net-gbs": (12.5, "GB/s a card between nodes"),
    "net-us": (15, "microseconds a hop between nodes"),
    "host-gbs": (1, "GB/s a rank over gloo"),
    "host-us": (50, "microseconds a hop over gloo"),
    "jpeg-kb": (20, "KB of a JPEG of 256 pixels"),
    "decode": (300, "images/s that a CPU core decodes and crops"),
    "storage-gbs": (20, "GB/s of the shared storage"),
    "read-gbs": (2, "GB/s that one node reads from it"),
    "rank-kb": (13, "KB of a rank's state in a checkpoint"),
}


@dataclass(frozen=True)
class LanguageModel:
    """Sizes of a Llama."""

    name: str
    width: int
    layers: int
    inner: int
    vocabulary: int = 32_000

    @property
    def decoder(self) -> int:
        """Weights of all layers."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.inner)

    @property
    def file_gb(self) -> float:
        """GB of all weights in a half precision."""
        return 2 * (self.decoder + 2 * self.vocabulary * self.width) / 1e9

    @property
    def gradient_bytes(self) -> int:
        """Of the projection in float32, all that is trained."""
        return 4 * (768 * self.width + self.width)

    def flops(self, text: int) -> float:
        """Of a row: forward, and backward to the inputs, which has no products for weight gradients."""
        tokens = 1 + QUERIES + text
        linear = 2 * tokens * self.decoder + 2 * text * self.vocabulary * self.width  # output layer: targets only
        return 2 * linear + 3 * self.layers * 4 * tokens**2 * self.width  # attention: twice forward in backward


MODELS = (LanguageModel("Vicuna 7B", 4096, 32, 11_008), LanguageModel("Vicuna 13B", 5120, 40, 13_824))


def vision_flops() -> float:
    """Of an image: ViT-g/14 and Q-Former, forward only."""
    n, w, q, h = IMAGE_TOKENS, 1408, QUERIES, 768
    vit = 39 * (2 * n * (4 * w**2 + 2 * w * 6144) + 4 * n**2 * w) + 2 * (n - 1) * 3 * 14**2 * w
    layer = 2 * q * (4 * h**2 + 2 * h * 3072) + 4 * q**2 * h
    cross = 2 * q * 2 * h**2 + 2 * n * 2 * w * h + 4 * q * n * h
    return vit + 12 * layer + 6 * cross


class Estimates:
    """Times and rates of each case (model, number of cards) under the assumptions ``a``, in seconds unless named."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.rate = a.peak_tflops * 1e12 * a.utilisation

        def ring(num_bytes: float, cards: int, passes: int = 2, pieces: int = 1) -> float:
            """A flat ring at its slowest hop: two passes are an all-reduce, one is an all-gather."""
            gbs, us = (a.node_gbs, a.node_us) if cards <= a.node_cards else (a.net_gbs, a.net_us)
            return passes * (cards - 1) * (num_bytes / cards / gbs / 1e9 + pieces * us / 1e6)

        self.cases = {(m, n): f"{m.name}, {n:,} cards" for m in MODELS for n in CARDS}
        self.flops = {m: vision_flops() + m.flops(a.text) for m in MODELS}  # of a row
        self.step = {m: a.batch * self.flops[m] / self.rate for m in MODELS}
        # The 4 bytes: are all losses finite?
        self.reduce = {(m, n): ring(m.gradient_bytes, n) + ring(4, n) for m, n in self.cases}
        self.efficiency = {(m, n): self.step[m] / (self.step[m] + self.reduce[m, n]) for m, n in self.cases}
        self.images = {(m, n): n * a.batch / self.step[m] * self.efficiency[m, n] for m, n in self.cases}  # per second
        self.files_gb = {m: m.file_gb + VISION_FILES_GB for m in MODELS}
        self.start = {
            (m, n): self.files_gb[m] * max(1 / a.read_gbs, n / a.node_cards / a.storage_gbs) for m, n in self.cases
        }
        self.gather = {(m, n): 2 * ring(2 * m.decoder, n, 1, m.layers) for m, n in self.cases}  # forward and backward
        self.vote = {n: 2 * (n - 1) * a.host_us / 1e6 for n in CARDS}
        self.states = {n: (n - 1) * (a.rank_kb / a.host_gbs / 1e6 + a.host_us / 1e6) for n in CARDS}


def print_table(head: str, rows: list[str]) -> None:
    """Prints a Markdown table of lines whose columns are separated by bars."""
    rule = "|".join(["---"] * (head.count("|") + 1))
    print("", *(f"| {row.replace('|', ' | ')} |" for row in [head, rule, *rows]), sep="\n")


def print_tables(a: argparse.Namespace, e: Estimates) -> None:
    """The estimates of each card and of each case."""
    print_table(
        "a card|TFLOP a row: vision, LM|step|images/s|gradients|checkpoint",
        [
            f"{m.name}|{vision_flops() / 1e12:.2f}, {m.flops(a.text) / 1e12:.2f}|{e.step[m]:.2f} s|"
            f"{a.batch / e.step[m]:.0f}|{m.gradient_bytes / 1e6:.1f} MB|{3 * m.gradient_bytes / 1e6:.1f} MB"
            for m in MODELS
        ],
    )
    print_table(
        "|global batch|all-reduces a step|efficiency|images/s|a node: images/s, read, decode",
        [
            f"{case}|{a.batch * n:,.0f}|{1e3 * e.reduce[m, n]:.1f} ms|{e.efficiency[m, n]:.1%}|{e.images[m, n]:,.0f}|"
            f"{(here := e.images[m, n] * a.node_cards / n):,.0f}, {here * a.jpeg_kb / 1e3:.0f} MB/s, "
            f"{here / a.decode:.1f} cores"
            for (m, n), case in e.cases.items()
        ],
    )
    print_table(
        "|steps for 5.12 M pairs|training|weights read first|fsdp: gathered a card and step|fsdp: step",
        [
            f"{case}|{PAIRS / a.batch / n:,.0f}|{PAIRS / e.images[m, n]:,.0f} s|"
            f"{n / a.node_cards * e.files_gb[m]:,.0f} GB, {e.start[m, n]:.0f} s|"
            f"{4 * m.decoder * (n - 1) / n / 1e9:.0f} GB, {e.gather[m, n]:.2f} s|{max(e.step[m], e.gather[m, n]):.2f} s"
            for (m, n), case in e.cases.items()
        ],
    )
    print_table(
        "cards|stop vote a step|rank states for a checkpoint, to each rank|gloo connections a rank|images read (7B)",
        [
            f"{n:,}|{1e3 * e.vote[n]:.1f} ms|{n * a.rank_kb / 1e3:.1f} MB, {1e3 * e.states[n]:.0f} ms|{n - 1:,}|"
            f"{e.images[MODELS[0], n] * a.jpeg_kb / 1e6:.2f} GB/s"
            for n in CARDS
        ],
    )


def conclusions(a: argparse.Namespace, e: Estimates) -> list[str]:
    """What follows from the estimates, a sentence each."""
    seven, (few, some, most) = MODELS[0], CARDS
    worst = min(e.cases, key=e.efficiency.get)
    share = {n: e.gather[seven, n] / e.step[seven] for n in CARDS}
    long = vision_flops() + seven.flops(MOST_TEXT)
    written = (3 * seven.gradient_bytes / 1e3 + most * a.rank_kb) / 1e3
    single = 1 / (1 + a.batch * e.reduce[seven, most] / e.step[seven])
    return [
        f"Gradients: the lowest efficiency is {e.efficiency[worst]:.1%} ({e.cases[worst]}).",
        f"Optimisation ends the scaling: {most:,} cards take {a.batch * most:,.0f} pairs a step, so 5.12 M pairs are "
        f"{PAIRS / a.batch / most:.0f} updates; the paper makes 20,000 with 256 pairs each.",
        f"A global batch of {most:,}, one row for each of {most:,} cards: {single:.0%} efficient (7B).",
        f"Start: {most:,} cards read weights for {e.start[seven, most]:.0f} s and train for "
        f"{PAIRS / e.images[seven, most]:.0f} s (7B).",
        f"fsdp (7B): the gathers take {share[few]:.2f} of the computation's time over {few} cards and "
        f"{share[some]:.2f} of it over {some}; below 1 they can hide behind it.",
        f"Stop vote: {e.vote[most] / e.step[seven]:.0%} of a step at {most:,} cards (7B), in the background.",
        f"Checkpoint: {written:.0f} MB at {most:,} cards (7B) at most; written every 100 steps by rank 0 alone, "
        f"{written / 100 / e.step[seven]:.1f} MB/s.",
        f"Padding: where a batch's longest text has {MOST_TEXT} tokens, a step takes {long / e.flops[seven]:.2f} times "
        "as long (7B).",
        f"Check: 136 images/s on four cards, published for the reference, are {136 / 4 * long / 1e12:.0f} TFLOP/s a "
        f"card by these formulas; {e.rate / 1e12:.0f} are assumed here.",
    ]


def main() -> None:
    """Assumptions, tables, conclusions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (value, meaning) in ASSUMED.items():
        parser.add_argument(f"--{name}", type=float, default=value, metavar="N", help=f"{meaning} ({value})")
    a = parser.parse_args()
    estimates = Estimates(a)
    print("# Stage 1 on many cards: arithmetic from formulas and assumptions, not a measurement")
    assumed = [f"{meaning}|{getattr(a, key.replace('-', '_')):g}" for key, (_, meaning) in ASSUMED.items()]
    print_table("assumed|value", assumed)
    print("\nSizes, bytes and FLOPs follow from the models. Collectives are flat rings, the slowest kind, after the")
    print("backward pass. Uneven ranks, kernel launches and padding are left out.")
    print_tables(a, estimates)
    print("", *(f"- {line}" for line in conclusions(a, estimates)), sep="\n")


if __name__ == "__main__":
    main()
