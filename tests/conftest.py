"""What several test files share."""
import os
import pytest
import torch
from torch import nn

from tools import warm

warm.look_once()


class Masked(nn.Module):
    "A model that masks some of its classes with -inf."
    def __init__(self, model, *classes, value=-torch.inf):
        super().__init__()
        self.model, self.classes, self.value = model, classes, value

    def forward(self, x): return self.model(x).index_fill(1, torch.tensor(self.classes), self.value)


@pytest.fixture
def masked(): return Masked


@pytest.fixture
def interrupt():
    "A function that interrupts an objective before forward number `stop`, and returns the list that counts forwards."
    def at(objective, stop):
        calls, forward = [], objective.forward
        def counted(batch):
            if len(calls) == stop: raise KeyboardInterrupt
            calls.append(1)
            return forward(batch)
        objective.forward = counted
        return calls
    return at


@pytest.fixture(scope='session', autouse=True)
def place_of_scans(tmp_path_factory):
    "Scans of images are kept among the files of the tests, and not in the cache of whoever runs them."
    os.environ['DISTILL_NB_CACHE'] = str(tmp_path_factory.mktemp('cache'))
