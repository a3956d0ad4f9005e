"""Channels that are taken out: which, that nothing else changes, and what cannot be pruned."""
import copy, sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from distill_nb import pruning
from distill_nb.contract import Teacher
from distill_nb.embeddings import headless
from distill_nb.files import fingerprint, save_weights
from distill_nb.logits import Distill
from distill_nb.models import CifarResNet, digit_student, resnet8, resnet14, wrn_16_1
from distill_nb.pruning import channel_groups, load_pruned, prune_channels, widths
from distill_nb.training import evaluate, fit
from distill_nb.vit import ViT
from distill_nb.zoo import load_weights, open_model

from networks import bits, same
from small import RECIPE, images, net, trained

IMAGE = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
BATCH = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Branches(nn.Module):
    "What is joined, grouped, depthwise, transposed, and flattened."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(3, 4, 3, 4, 1, bias=False)
        self.bn, self.act, self.mix = nn.BatchNorm2d(12), nn.PReLU(12), nn.Conv2d(12, 12, 1)
        self.grouped, self.depth = nn.Conv2d(12, 8, 1, groups=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.norm = nn.ConvTranspose2d(8, 6, 2, 2), nn.InstanceNorm2d(6, affine=True)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(24, 5)

    def forward(self, x):
        x = self.mix(self.act(self.bn(torch.cat([self.a(x), self.b(x)], 1)))).relu()
        x = F.hardswish(self.depth(self.grouped(x)))
        return self.fc(self.pool(self.norm(self.up(x)).sigmoid()).flatten(1))


def vision(name): return torchvision.models.get_model(name, num_classes=7)


NETS = {'digit_student': lambda: digit_student(10, 3), 'resnet14': lambda: CifarResNet(14, widths=(6, 6, 8, 10)),
        'wrn': lambda: wrn_16_1(), 'branches': Branches, 'resnet18': lambda: vision('resnet18'),
        'mobilenet': lambda: vision('mobilenet_v3_small'), 'regnet': lambda: vision('regnet_y_400mf')}


def lively(model, seed=0):
    "Every number of a network drawn anew, so that a mistake in a normalisation shows."
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            for t, low in ((m.weight, 0.5), (m.bias, -0.5), (m.running_mean, -0.3), (m.running_var, 0.5)):
                if t is not None: t.data.uniform_(low, low + 1, generator=g)
    return model.eval()


@pytest.fixture(scope='module')
def nets(): return {name: lively(make()) for name, make in NETS.items()}


def gap(a, b): return ((a - b).abs().max() / b.abs().max()).item()


# --- which channels go

def test_the_smallest_channels_go_and_all_others_stay_as_they_are():
    "A chain, computed in NumPy: the mean over writer, normalisation and reader of the squares, not of the sizes."
    torch.manual_seed(0)
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
                                 nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)))
    with torch.no_grad():
        model[0].weight[:4], model[0].weight[4:] = 0, 0.25
        model[0].weight[:4, 0, 0, 0], model[1].weight[:] = 1.6, 1
    w0, b0, g1, w3, w7 = (model.state_dict()[k].double().numpy() for k in
                          ('0.weight', '0.bias', '1.weight', '3.weight', '7.weight'))
    first = np.square(w0).sum((1, 2, 3)) + g1**2 + np.square(w3).sum((0, 2, 3))
    second = np.square(w3).sum((1, 2, 3)) + np.square(w7).reshape(4, 6, 4).sum((0, 2))
    sizes = np.abs(w0).sum((1, 2, 3)) + g1 + np.abs(w3).sum((0, 2, 3))
    assert set(np.argsort(first)[4:]) == {0, 1, 2, 3} and set(np.argsort(sizes)[4:]) == {4, 5, 6, 7}
    one, two = np.sort(np.argsort(first)[4:]), np.sort(np.argsort(second)[3:])
    small = prune_channels(model, IMAGE, 0.5)
    found = {k: v.double().numpy() for k, v in small.state_dict().items()}
    assert np.array_equal(found['0.weight'], w0[one]) and np.array_equal(found['0.bias'], b0[one])
    assert np.array_equal(found['1.weight'], g1[one])
    assert np.array_equal(found['3.weight'], w3[two][:, one])
    assert np.array_equal(found['7.weight'], w7.reshape(4, 6, 4)[:, two].reshape(4, 12))
    across = prune_channels(model, IMAGE, 0.5, across=True)
    scores = np.concatenate([first / first.mean(), second / second.mean()])
    least = np.sort(scores)[-7]
    assert [*widths(across).values()] == [(scores[:8] >= least).sum(), (scores[8:] >= least).sum(), 4]


def test_in_a_residual_network_all_that_meet_in_a_sum_lose_the_same():
    model = lively(CifarResNet(8, widths=(6, 6, 8, 10)))
    rows = {r['written by']: r for r in channel_groups(model, IMAGE)}
    assert rows['conv1, layer1.0.conv2']['channels'] == 6
    sums = set(rows['conv1, layer1.0.conv2']['read by'].split(', '))
    assert sums == {'layer1.0.conv1', 'layer2.0.downsample.0', 'layer2.0.conv1'}
    small = prune_channels(model, IMAGE, 0.5, fixed=[n for n in widths(model) if n not in ('conv1', 'layer1.0.conv2')])
    own, left = model.state_dict(), small.state_dict()
    rows = [next(j for j in range(6) if torch.equal(own['conv1.weight'][j], w)) for w in left['conv1.weight']]
    assert len(rows) == 3 and torch.equal(left['layer1.0.conv2.weight'], own['layer1.0.conv2.weight'][rows])
    for reader in sums: assert torch.equal(left[f'{reader}.weight'], own[f'{reader}.weight'][:, rows])


@pytest.mark.parametrize('name', NETS)
def test_channels_that_are_zero_go_first_and_change_nothing(nets, name):
    "Independent of the module's own proof: half of what is written in some layers is zero."
    written = {'digit_student': ['layer1.0', 'layer1.1'], 'resnet14': ['layer2.0.conv1', 'layer2.0.bn1'],
               'wrn': ['layer2.0.conv1', 'layer2.0.bn2'], 'branches': ['grouped', 'depth'],
               'resnet18': ['layer3.1.conv1', 'layer3.1.bn1'], 'mobilenet': [
                   'features.4.block.0.0', 'features.4.block.0.1', 'features.4.block.1.0', 'features.4.block.1.1',
                   'features.4.block.2.fc2'],
               'regnet': ['trunk_output.block2.block2-0.f.se.fc1']}[name]
    model = copy.deepcopy(nets[name])
    with torch.no_grad():
        for layer in map(model.get_submodule, written):
            for p in layer.parameters():
                p[::2] = 0
                p[1::2] *= 3  # worth more than what the readers of the others add
    small = prune_channels(model, IMAGE, 0.5, fixed=[n for n in widths(model) if n not in written])
    kept = {n: w for n, w in widths(small).items() if n in written}
    assert kept == {n: w // 2 for n, w in widths(model).items() if n in written}
    assert {n: w for n, w in widths(small).items() if n not in kept} == {
        n: w for n, w in widths(model).items() if n not in kept}
    assert gap(small.double()(BATCH.double()), model.double()(BATCH.double())) < 1e-12


@pytest.mark.parametrize('name', NETS)
def test_a_share_of_every_network_goes_and_its_file_opens_again(nets, name, tmp_path):
    model, before = nets[name], bits(nets[name])
    small = prune_channels(model, IMAGE, 0.5, across=name in ('wrn', 'mobilenet'))
    assert same(bits(model), before)
    now, was = widths(small), widths(model)
    head = list(was)[-1]
    assert now[head] == was[head] and sum(now.values()) < 0.75*sum(was.values()) and min(now.values()) > 0
    save_weights(small, tmp_path/'small.safetensors', architecture=name)
    again = load_pruned(NETS[name](), tmp_path/'small.safetensors').eval()
    assert repr(again) == repr(small) and same(again.state_dict(), small.state_dict())
    assert torch.equal(again(BATCH), small(BATCH)) and same(bits(model), before)
    small.train()(BATCH).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


@pytest.mark.parametrize('across', [False, True])
def test_counts(nets, across):
    model = nets['resnet14']
    tiny = prune_channels(model, IMAGE, 1e-6, across)
    assert set(list(widths(tiny).values())[:-1]) == {1}
    assert widths(prune_channels(model, IMAGE, 1., across)) == widths(model)
    fours = prune_channels(model, IMAGE, 0.6, across, multiple=4)
    assert all(w % 4 == 0 or w == was for w, was in zip(widths(fours).values(), widths(model).values()))
    shares = [sum(widths(prune_channels(model, IMAGE, k, across)).values()) for k in (0.2, 0.4, 0.6, 0.8)]
    assert shares == sorted(set(shares))


def test_random_channels_are_those_of_their_seed(nets):
    model, before = nets['resnet14'], torch.get_rng_state()
    marks = [fingerprint(prune_channels(model, IMAGE, 0.5, random=s).state_dict()) for s in (0, 0, 1)]
    assert marks[0] == marks[1] != marks[2] and torch.equal(torch.get_rng_state(), before)
    assert fingerprint(prune_channels(model, IMAGE, 0.5).state_dict()) not in marks


# --- what comes and goes with it

def test_mode_type_and_what_trains_stay_and_no_gradient_is_needed(nets):
    model = copy.deepcopy(nets['digit_student']).double().train()
    model.layer1.eval()
    model.fc.bias.requires_grad_(False)
    with torch.no_grad(): small = prune_channels(model, IMAGE)
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert {p.dtype for p in small.parameters()} == {torch.float64} and all(p.grad is None for p in small.parameters())


def test_of_a_teacher_the_network_is_pruned_as_it_sees_images_and_learns_again():
    data, valid = images(), images(seed=1)
    teacher = Teacher(trained(), ['dark', 'middle', 'bright'], data.mean, data.std, 4)
    small = prune_channels(teacher, data, 0.5)
    assert widths(small) == {'1': 4, '4': 3}
    fit(Distill(small, teacher), data, RECIPE, progress=False, device='cpu')
    assert evaluate(small, valid).accuracy > 0.9


# --- what is refused

class Softmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
    def forward(self, x): return self.fc(self.b(self.a(x).softmax(1)).mean((2, 3)))


class Joined(nn.Module):
    "Parts of a grouped convolution that come from layers of different width: torch-pruning cuts them wrongly."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(12, 6, 3, groups=2)
        self.fc = nn.Linear(6, 4)
    def forward(self, x): return self.fc(self.c(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3)))


class Maps(nn.Module):
    "Gives a map beside no head."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.c = nn.Conv2d(8, 6, 3)
    def forward(self, x): return self.c(self.b(self.a(x)))


@pytest.mark.parametrize('make, said', [
    (Softmax, 'cannot be pruned: without the channels it answers otherwise'),
    (lambda: ViT(32, 8, 16, 1, 2, 3, 3), "treats each channel by itself between its layers, but '"),
    (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(7200, 2)), 'a GroupNorm'),
    (lambda: vision('shufflenet_v2_x0_5'), 'the network cannot be pruned: '),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), 'with channels between its layers'),
    (lambda: nn.Flatten(), 'has no linear layer and no 1x1 convolution'),
    (Joined, 'the network cannot be pruned: '),
    (Maps, "name the layers that give it as fixed"),
    (lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(9, 2)),
     'the network cannot be pruned: '),
    (lambda: nn.Sequential(weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(),
                           nn.Linear(3600, 2)), 'the network cannot be pruned')])
def test_what_cannot_be_pruned_is_a_sentence_and_stays_as_it_was(make, said):
    model = make()
    before = bits(model)
    with pytest.raises(ValueError, match=said) as error: prune_channels(model, IMAGE, 0.5)
    assert len(str(error.value)) < 500 and same(bits(model), before)


def test_a_network_without_a_head_is_pruned_with_its_output_fixed():
    small = prune_channels(Maps(), IMAGE, 0.5, fixed=['c'])
    assert widths(small) == {'a': 4, 'b': 8, 'c': 6}


@pytest.mark.parametrize('given', [dict(keep=0), dict(keep=1.01), dict(keep=float('nan')), dict(multiple=0),
                                   dict(fixed=['nothing']), dict(fixed='fc'), dict(random=-1), dict(random=0.5),
                                   dict(data=torch.zeros(3, 32, 32, dtype=torch.uint8)), dict(data=BATCH)])
def test_arguments_are_refused_by_name(given):
    good = dict(model=resnet8(), data=IMAGE)
    with pytest.raises(ValueError, match=rf'^{next(iter(given))} must be'): prune_channels(**good | given)


def test_a_mistake_in_the_cut_is_found(monkeypatch):
    "The proof is one: with a reader that is left out, or another channel that goes, no network comes back."
    model = lively(CifarResNet(8, widths=(6, 6, 8, 10)))
    reads = pruning._reads
    monkeypatch.setattr(pruning, '_silence', lambda layer, gone: None)
    with pytest.raises(ValueError, match='answers otherwise'): prune_channels(model, IMAGE)
    monkeypatch.undo()
    monkeypatch.setattr(pruning, '_reads', lambda graph, group: list(reads(graph, group))[1:])
    with pytest.raises(ValueError, match='answers otherwise'): prune_channels(model, IMAGE)


def test_a_missing_extra_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    with pytest.raises(ValueError, match=r"torch_pruning could not be imported .*pip install 'distill_nb\[deploy\]'"):
        prune_channels(net(), images())


def test_a_pruned_file_that_says_so_opens_by_its_name(tmp_path):
    path, facts = tmp_path/'w.safetensors', dict(architecture='resnet8', channels=3, size=32, mean=[0.4]*3, std=[0.2]*3)
    small = prune_channels(lively(resnet8()), IMAGE, 0.5).eval()
    save_weights(small, path, list('0123456789'), **facts, pruned=True)
    for found in (open_model(path), open_model('resnet8', path), open_model(f'{path}::')):
        assert repr(found.model) == repr(small) and same(found.model.state_dict(), small.state_dict())
        assert torch.equal(found.model.eval()(BATCH), small(BATCH))
        assert found.classes == list('0123456789') and found.size == 32
    with pytest.raises(ValueError, match='fc.weight'): open_model(path, classes=2)
    for wrong, said in ((dict(pruned='half'), "pruned that '.*' names must be True, but is 'half'"),
                        (dict(pruned=False), 'bn1.bias is 8 but must be 16'),
                        (dict(pruned=True, architecture='resnet8_w0.25'), 'of a layer with fewer channels')):
        save_weights(small, path, **facts | wrong)
        with pytest.raises(ValueError, match=said): open_model(path)


def test_a_pruned_network_without_classes_opens_by_its_name(tmp_path):
    small = headless(prune_channels(lively(resnet8()), IMAGE, 0.5)).eval()
    save_weights(small, tmp_path/'e.safetensors', architecture='resnet8', channels=3, size=32, outputs='embedding',
                 pruned=True)
    found = open_model(tmp_path/'e.safetensors')
    assert found.outputs == 'embedding' and torch.equal(found.model.eval()(BATCH), small(BATCH))


def test_only_a_pruned_file_of_the_same_network_opens(tmp_path):
    path, model = tmp_path/'w.safetensors', resnet8()
    small = prune_channels(model, IMAGE, 0.5)
    save_weights(small, path, list('0123456789'), architecture='resnet8', channels=3, size=32)
    for way in (lambda: load_weights(resnet8(), path), lambda: open_model(path)):
        with pytest.raises(ValueError, match='bn1.bias is 8 but must be 16'): way()
    with pytest.raises(ValueError, match='is missing'): load_pruned(resnet14(), path)
    with pytest.raises(ValueError, match='of a layer with fewer channels'): load_pruned(prune_channels(small, IMAGE),
                                                                                        path)
    assert widths(load_pruned(Teacher(model), path)) == widths(small)
    save_weights(nn.Conv2d(3, 8, 5), path)
    with pytest.raises(ValueError, match='conv1.weight is missing'): load_pruned(model, path)
    small.conv1 = nn.Conv2d(3, 8, 5, bias=False)
    save_weights(small, path)
    with pytest.raises(ValueError, match="conv1.weight in '.*of a layer with fewer channels"): load_pruned(model, path)
