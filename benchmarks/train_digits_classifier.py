"""Trains the classifier whose features the digits' figures are of: about a minute on two cores.

It sees the training images of the default split only, shifted by parts of a pixel and with a little noise, since
samples are not on the 17 grey levels of the data. Prints the accuracy on the held-out images.

    python benchmarks/train_digits_classifier.py lit_diffusion/metrics/extractors/digits_classifier.safetensors
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lit_diffusion.data import Digits
from lit_diffusion.metrics.extractors.digits import DigitsClassifier
from lit_diffusion.training.datamodule import DataModule

EPOCHS = 120


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images in [-1, 1] and labels, for training and held out."""
    source = Digits()
    data = DataModule(source, value_range=(-1.0, 1.0))
    train, held_out = (torch.arange(len(i)) for i in (data.train_indices, data.held_out_indices))
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    return (
        data.training_values(train),
        labels[data.train_indices],
        data.held_out_values(held_out),
        labels[data.held_out_indices],
    )


def augmented(x: Tensor) -> Tensor:
    """Shifted by up to three quarters of a pixel, turned by up to six degrees, with noise of a grey level."""
    angle = 0.1 * (2.0 * torch.rand(len(x)) - 1.0)
    shift = 0.75 / 4.0 * (2.0 * torch.rand(len(x), 2) - 1.0)
    rotation = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), dim=1).view(-1, 2, 2)
    grid = F.affine_grid(torch.cat((rotation, shift[:, :, None]), dim=2), list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1.0, grid, align_corners=False) - 1.0
    return (moved + 0.06 * torch.randn_like(x)).clamp(-1.0, 1.0)


def main(path: str) -> None:
    """Train and save."""
    torch.manual_seed(0)
    x, y, x_held_out, y_held_out = load()
    classifier = DigitsClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    steps = EPOCHS * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(64)[: len(x) // 64]:
            _, logits = classifier(augmented(x[rows]))
            loss = F.cross_entropy(logits, y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier.eval()
    with torch.no_grad():
        for name, images, labels in (("training", x, y), ("held-out", x_held_out, y_held_out)):
            accuracy = (classifier(images)[1].argmax(1) == labels).double().mean()
            print(f"{name} accuracy {accuracy:.4f} of {len(labels)}")
    save_file(classifier.state_dict(), path)


if __name__ == "__main__":
    main(sys.argv[1])
