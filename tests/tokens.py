"A text as data, and language models for it that train in a moment."
import hashlib, math

import torch
import torch.nn.functional as F
from torch import nn

from distill_nb.protocol import Batch, Data, Measure
from distill_nb.training import Recipe, Supervised, fit

BYTES, LENGTH = 16, 8


class Bytes(Data):
    "Lines of bytes, 0 behind their ends. A view is a window that begins one byte later; labels are the bytes behind."
    classes, measures = [f'byte {b}' for b in range(BYTES)], (Measure('bits_per_byte', higher=False),)
    device, n_views = torch.device('cpu'), 3
    def __init__(self, lines): self.lines = lines  # uint8, (N, LENGTH + n_views)
    def __len__(self): return len(self.lines)
    def subset(self, indices): return Bytes(self.lines[indices])
    def to(self, device): return self
    def fingerprint(self, labels=True): return hashlib.sha256(self.lines.numpy().tobytes()).hexdigest()[:16]
    def get(self, index, view=None):
        view = torch.zeros_like(index) if view is None else view
        window = self.lines[index[:, None], view[:, None] + torch.arange(LENGTH + 1)].long()  # (B, LENGTH + 1)
        return Batch(window[:, :-1], window[:, 1:], index, view, (window[:, 1:] > 0).float())
    def measure(self, answers):
        losses = [F.cross_entropy(z[b.weight > 0].double(), b.y[b.weight > 0], reduction='none') for z, b in answers]
        return {'bits_per_byte': torch.cat(losses).mean().item() / math.log(2)}


def text(n=60, seed=0):
    "Lines in which one byte decides the next three times out of four; a third of them ends early."
    g, follows = torch.Generator().manual_seed(seed), 1 + 7 * torch.arange(BYTES) % (BYTES - 1)
    lines = torch.randint(1, BYTES, (n, LENGTH + Bytes.n_views), generator=g)
    for i in range(1, lines.shape[1]):
        lines[:, i] = follows[lines[:, i - 1]].where(torch.rand(n, generator=g) < 0.75, lines[:, i])
    lines[::3, 5:] = 0
    return Bytes(lines.to(torch.uint8))


def speaker(width=8): return nn.Sequential(nn.Embedding(BYTES, width), nn.Linear(width, BYTES))


def trained_speaker():
    torch.manual_seed(0)
    model = speaker()
    recipe = Recipe(steps=150, batch_size=20, optimizer='adam', lr=0.03, weight_decay=0., precision='float32')
    fit(Supervised(model), text(), recipe, device='cpu', progress=False)
    return model
