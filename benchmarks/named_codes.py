"""Do codes say more about what an image shows if the image tokenizer learnt names too?

    python benchmarks/named_codes.py --data DIR/emoji --steps 400 --naming 0 0.05 --seeds 0 1

Takes the things of the emoji data that come in most styles and holds out two images of each. For
each weight of the head and each seed, trains a small image tokenizer (32 x 32 pixels, 8 x 8 codes
of 512) for `--steps` steps, as the recipe `mini_named_image_tokenizer` does; then a reader, which
sees codes alone, each as a vector that it learns, and is trained on three changed cuts of every
training image. Prints how often the reader names the held-out images, and the PSNR of their
reconstructions.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion.bench.harness import heading, line
from earlyfusion.config import VQConfig
from earlyfusion.mini.emoji.tensors import load_emoji, load_split
from earlyfusion.mini.named_image_tokenizer import config as recipe
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.train.augment import changed, resized
from earlyfusion.train.image_tokenizer import ImageTokenizerTask
from earlyfusion.train.likeness import psnr
from earlyfusion.train.monitor import read_metrics
from earlyfusion.train.semantic import SemanticHead
from earlyfusion.train.trainer import RunConfig, train

SHAPE = VQConfig(
    embed_dim=16,
    num_embeddings=512,
    latent_channels=64,
    resolution=32,
    base_channels=32,
    channel_multiplier=(1, 1, 2),
    num_res_blocks=1,
)
BATCH, CUTS, READER_STEPS = 32, 3, 600


def task_data(folder: Path, things: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels and labels to learn from, then those held out: two images of each thing."""
    data = load_emoji(folder)
    ids = data.split("train")
    names = [data.row(i)["codepoints"] for i in ids]
    chosen = {name: n for n, (name, _) in enumerate(Counter(names).most_common(things))}
    pixels = resized(load_split(folder, "train", SHAPE.resolution, "cpu"), SHAPE.resolution)
    seen: Counter[str] = Counter()
    known: list[int] = []
    held: list[int] = []
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    for index in (i for i in order if names[i] in chosen):
        seen[names[index]] += 1
        (held if seen[names[index]] <= 2 else known).append(index)
    labels = torch.tensor([chosen.get(n, -1) for n in names])
    return pixels[known], labels[known], pixels[held], labels[held]


def tokenizer(pixels: Tensor, labels: Tensor, naming: float, seed: int, steps: int) -> VQGAN:
    torch.manual_seed(seed)
    model = VQGAN(SHAPE).to(memory_format=torch.channels_last)
    head = SemanticHead(SHAPE.embed_dim, SHAPE.grid, [int(labels.max()) + 1]) if naming else None

    def batches(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        where = torch.randint(len(pixels), (BATCH,), generator=generator)
        return changed(pixels[where], recipe.change, generator), labels[where][:, None]

    loss = replace(recipe.loss, naming=naming, ramp_steps=steps // 4)
    task = ImageTokenizerTask(model, loss, batches, steps, head=head)
    with tempfile.TemporaryDirectory() as out:
        run = RunConfig(Path(out), steps, seed=seed, save_every=steps)
        train(task, run, recipe.optim)
        last = read_metrics(Path(out))[-1]
    print(f"  {last['step']} steps of {BATCH}; last loss {last['loss']:.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def coded(model: VQGAN, pixels: Tensor) -> Tensor:
    return torch.cat([model.encode(part) for part in pixels.split(64)])


class Reader(nn.Module):
    """Names what rows of codes show."""

    def __init__(self, answers: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(SHAPE.num_embeddings, 32)
        self.head = SemanticHead(32, SHAPE.grid, [answers], width=64)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.vectors(codes).permute(0, 3, 1, 2))[0]


def reading(model: VQGAN, data: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> list[float]:
    """Shares of held-out images that a fresh reader names rightly, and within its first ten."""
    pixels, labels, held, wanted = data
    generator = torch.Generator().manual_seed(seed)
    cuts = [coded(model, changed(pixels, recipe.change, generator)) for _ in range(CUTS)]
    codes, answers = torch.cat([coded(model, pixels), *cuts]), labels.repeat(CUTS + 1)
    torch.manual_seed(seed)
    reader = Reader(int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, READER_STEPS)
    for _ in range(READER_STEPS):
        where = torch.randint(len(codes), (64,))
        loss = F.cross_entropy(reader(codes[where]), answers[where], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        best = reader.eval()(coded(model, held)).topk(10).indices == wanted[:, None]
    return [float(best[:, :top].any(1).float().mean()) for top in (1, 10)]


@torch.no_grad()
def quality(model: VQGAN, held: Tensor) -> float:
    """Mean PSNR of held-out images through the codes."""
    return float(psnr(model.decode(coded(model, held)).clamp(-1, 1), held).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="What codes say, with and without a naming head.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400, help="of each image tokenizer")
    parser.add_argument("--naming", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--things", type=int, default=300)
    args = parser.parse_args()
    data = task_data(args.data, args.things)
    print(f"{len(data[0])} images to train on, {len(data[2])} held out", flush=True)
    print(heading("naming", "seed", "named", "within ten", "PSNR"))
    for seed in args.seeds:
        for naming in args.naming:
            model = tokenizer(data[0], data[1], naming, seed, args.steps)
            first, ten = reading(model, data, seed)
            psnr_dB = f"{quality(model, data[2]):.2f} dB"
            print(line(f"{naming:g}", seed, f"{first:.1%}", f"{ten:.1%}", psnr_dB), flush=True)


if __name__ == "__main__":
    main()
