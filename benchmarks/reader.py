"""A network that reads the causes off a slice, and unseen heads to test it with: a ruler for benchmarks.

A ResNet-18 at 128×128 (He et al. 2016, arXiv 1512.03385) learns the six truths of the grammar
(``prompts.SLOTS``) from the training slices of the large phantom set. Half of what it sees has gone through
the autoencoder, because what it will be asked about comes out of its decoder. It is told nothing of what a
sample was asked for. How well it reads, and so the best that any generator could reach, is measured on
``unseen`` heads, which no network learned from.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from judge import machine
from runs import DEVICE
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import resnet18

from oasis_helpers.autoencoder import Autoencoder
from oasis_helpers.data import DataLocation, find_data, load_factors, read_slices, to_unit_range
from oasis_helpers.phantoms import make_phantoms, phantom_cache
from oasis_helpers.prompts import SLOTS, truths
from oasis_helpers.seeds import generator

SIZE, BATCH, EPOCHS, RATE = 128, 64, 8, 1e-3
UNSEEN, UNSEEN_SEED = 150, 1
PART = 128


def unseen_heads() -> DataLocation:
    """150 whole heads of another seed than all sets that networks learn from, made once."""
    return make_phantoms(
        phantom_cache().with_name(f"{phantom_cache().name}-unseen"), (1, 1, UNSEEN), seed=UNSEEN_SEED
    )


def reconstructed(images: Tensor, between: Autoencoder) -> Tensor:
    """Images (N, 1, 256, 256) in [−1, 1] after encoder and decoder, on the CPU."""
    parts = (part.to(between.shift.device) for part in images.split(PART))
    return torch.cat([between.decode(between.encode(part)).cpu() for part in parts])


def _small(images: Tensor) -> Tensor:
    return F.interpolate(images, (SIZE, SIZE), mode="area")


class Reader(nn.Module):
    """Images (N, 1, H, W) in [−1, 1], H and W at least 128 → what is true of them, (N, 6), as ``truths``."""

    def __init__(self):
        super().__init__()
        self.network = resnet18(num_classes=len(SLOTS))
        self.network.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
        self.register_buffer("mean", torch.zeros(len(SLOTS)))
        self.register_buffer("deviation", torch.ones(len(SLOTS)))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The mean of what it reads off each image and off its mirror image."""
        parts = (_small(part.to(self.mean.device)) for part in images.split(PART))
        found = torch.cat([(self.network(part) + self.network(part.flip(-2))) / 2 for part in parts])
        return (found * self.deviation + self.mean).cpu()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What its last layer reads, (N, 512), on the CPU: features that see 128×128 pixels."""
        last, self.network.fc = self.network.fc, nn.Identity()
        parts = (_small(part.to(self.mean.device)) for part in images.split(PART))
        found = torch.cat([self.network(part) for part in parts]).cpu()
        self.network.fc = last
        return found


def _varied(images: Tensor, drawn: torch.Generator) -> Tensor:
    """Images mirrored, moved by up to four pixels, brightened and with grain: nothing that is asked for."""
    flip, gain, *move = torch.rand(4, generator=drawn).tolist()
    images = images.flip(-2) if flip < 0.5 else images
    images = images.roll([round(8 * m - 4) for m in move], (-2, -1))
    grain = 0.03 * torch.rand(1, generator=drawn).item() * torch.randn(images.shape, generator=drawn)
    return (images + 1) * (0.95 + 0.1 * gain) - 1 + grain.to(images.device)


def train_reader(location: DataLocation, between: Autoencoder) -> Reader:
    """A reader that has learned from the training slices of ``location`` and from their reconstructions."""
    slices = read_slices(location.train, 256)
    known = truths(load_factors(location), slices.case, slices.plane).float()
    images = to_unit_range(slices.images)
    pair = torch.stack([_small(images), _small(reconstructed(images, between))]).to(DEVICE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = Reader().to(DEVICE).train()
    reader.mean.copy_(known.mean(0)), reader.deviation.copy_(known.std(0))
    wanted = ((known.to(DEVICE) - reader.mean) / reader.deviation).float()
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=RATE, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    drawn = generator(0)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=drawn).split(BATCH)[: steps // EPOCHS]:
            which = torch.randint(2, (len(rows),), generator=drawn)
            batch = _varied(pair[which.to(DEVICE), rows.to(DEVICE)], drawn)
            loss = F.mse_loss(reader.network(batch), wanted[rows.to(DEVICE)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rate.step()
    print(f"reader: {steps} steps, last loss {loss.item():.4f}, {machine()}", flush=True)
    return reader.eval()


def load_reader(root: str, out: Path, between: Autoencoder) -> Reader:
    """The reader in the folder ``out``, trained on the large set in ``root`` the first time."""
    path = out / "reader.safetensors"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        save_file(train_reader(find_data(root), between).state_dict(), path)
    reader = Reader()
    reader.load_state_dict(load_file(path))
    return reader.to(DEVICE).eval()
