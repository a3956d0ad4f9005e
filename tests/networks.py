"What tests of networks share."
import torch


def count(model): return sum(p.numel() for p in model.parameters())


def bits(model):
    "All that a model is: values, modes, gradients and what wants one."
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return ({k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()], grads,
            [p.requires_grad for p in model.parameters()])


def same(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
