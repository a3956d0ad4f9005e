"What tests of networks share."
from functools import partial

import torch

from distill_nb.models import digit_student
from distill_nb.vit import ViT


def count(model): return sum(p.numel() for p in model.parameters())


def bits(model):
    "All that a model is: values, modes, gradients and what wants one."
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return ({k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()], grads,
            [p.requires_grad for p in model.parameters()])


def student_of(method, classes=10):
    "What makes a small student of digits that this method can teach."
    if method == 'token': return partial(ViT, 8, 4, 16, 1, 2, classes, 1)
    return partial(digit_student, classes)


def learner(way, student):
    "The objective of a contender around the network that its student becomes, and that network."
    network = way.network(student)
    return way.objective(network), network


def same(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
