"""A data set and networks that train in a moment, for several test files."""
import torch
from torch import nn

from distill_nb.data import CropFlip, ImageData
from distill_nb.training import Recipe, Supervised, fit

RECIPE = Recipe(steps=12, batch_size=16, lr=0.05, precision='float32')
CLASSES = 3


def images(n=120, seed=0):
    "Bright, middle and dark noise: easy to tell apart."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    x = torch.randint(0, 60, (n, 1, 4, 4), generator=g) + 80 * y.view(-1, 1, 1, 1)
    return ImageData(x.to(torch.uint8), y, ['dark', 'middle', 'bright'], augment=CropFlip(0, True))


def net(outputs=CLASSES):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))


def trained():
    "A network that has learned these images."
    torch.manual_seed(0)
    model = net()
    fit(Supervised(model), images(), Recipe(steps=150, batch_size=32, lr=0.1, precision='float32'))
    return model
