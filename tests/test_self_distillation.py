"""Self-distillation: generations, exits that the deepest teaches, and a network taught by its own moving average."""
import copy, math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill_nb import self_distillation
from distill_nb.files import fingerprint
from distill_nb.rows import UNLABELLED
from distill_nb.views import CropFlip, mix
from distill_nb.protocol import Batch, Measured
from distill_nb.data import ImageData, digits
from distill_nb.models import count_macs, digit_student, digit_teacher, resnet18, wrn_16_1
from distill_nb.history import Checkpoint
from distill_nb.training import Recipe, Setup, Supervised, evaluate, fit, predict
from distill_nb.logits import Distill
from distill_nb.self_distillation import (Ensemble, MovingAverage, SelfTeacher, _other_view, born_again,
                                          generation_seed, repeat_labelled, view_loss)
from distill_nb.exits import (BeYourOwnTeacher, EarlyExits, ExitHead, exit_costs, exit_logits, feature_distance,
                              measure_exits, plot_exits, run_until, sure_curve, sure_exit)
from distill_nb.zoo import build_model
from processes import alone_and_together
from tokens import BYTES, speaker, text

RECIPE = Recipe(steps=20, batch_size=16, lr=0.05, precision='float32')
CLASSES = 3


def images(n=60, seed=0, augment=CropFlip(1, True)):
    "Bright, middle and dark noise: easy to tell apart."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    x = torch.randint(0, 60, (n, 1, 8, 8), generator=g) + 80 * y.view(-1, 1, 1, 1)
    return ImageData(x.to(torch.uint8), y, ['dark', 'middle', 'bright'], augment=augment)


def net(seed=None):
    if seed is not None: torch.manual_seed(seed)
    return digit_student(CLASSES)


def staged(seed=0, dropout=0.):
    "Three small stages."
    from collections import OrderedDict
    torch.manual_seed(seed)
    block = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
    stages = OrderedDict(layer1=block(1, 4), layer2=block(4, 6), drop=nn.Dropout(dropout), layer3=block(6, 8))
    head = OrderedDict(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(8, CLASSES))
    return nn.Sequential(stages | head)


def weights(module): return fingerprint(module.state_dict())
def refused(said): return pytest.raises(ValueError, match=said)


class Killed(Exception): pass

def dies_at(objective, call):
    "The objective, which raises at that call of forward."
    forward, n = objective.forward, [0]
    def dying(batch):
        n[0] += 1
        if n[0] == call: raise Killed
        return forward(batch)
    objective.forward = dying
    return objective


def resumes(make, data, folder, recipe=RECIPE):
    "A run that was killed ends with all the weights and buffers of the uninterrupted one; gives both objectives."
    whole, killed, resumed = make(), make(), make()
    given = data, recipe, images(seed=1)
    fit(whole, *given, folder=folder/'whole', save_every=0)
    with pytest.raises(Killed):
        fit(dies_at(killed, 11 * recipe.accumulate), *given, folder=folder/'killed', save_every=0)
    assert 0 < Checkpoint(folder/'killed').read()[1]['step'] < 11
    fit(resumed, *given, folder=folder/'killed', resume=True, save_every=0)
    assert weights(whole) == weights(resumed)
    return whole, resumed


# --- generations

def test_generation_0_is_plain_training_and_generation_1_is_distillation_from_it():
    data, found = images(), born_again(net, images(), RECIPE, images(seed=1), 2, 2., 0.7, device='cpu')
    plain = net(RECIPE.seed)
    history = fit(Supervised(plain), data, RECIPE, images(seed=1))
    assert weights(plain) == weights(found.models[0]) and history.losses == found.histories[0].losses
    seed = generation_seed(RECIPE.seed, 1)
    student = net(seed)
    fit(Distill(student, plain, 2., 0.7), data, replace(RECIPE, seed=seed), images(seed=1))
    assert weights(student) == weights(found.models[1]) != weights(plain)
    assert list(found.histories[0].losses) == ['hard'] and list(found.histories[1].losses) == ['hard', 'soft']
    assert found.measured == [evaluate(m, images(seed=1)) for m in found.models]
    assert all(isinstance(m, Measured) and m.accuracy >= 0 for m in found.measured)


def test_generations_have_different_initial_weights_and_come_back_trainable():
    made = []
    def make():
        made.append(net())
        made[-1].start = weights(made[-1])
        return made[-1]
    state = torch.get_rng_state()
    found = born_again(make, images(), RECIPE, images(seed=1), 3)
    assert len({m.start for m in made}) == 3 and torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad for m in found.models for p in m.parameters())
    again = born_again(net, images(), RECIPE, images(seed=1), 3)
    assert [weights(m) for m in found.models] == [weights(m) for m in again.models]
    other = born_again(net, images(), replace(RECIPE, seed=1), images(seed=1), 3)
    assert not {weights(m) for m in found.models} & {weights(m) for m in other.models}


def test_a_teacher_generation_is_not_changed_by_its_student():
    one, three = (born_again(net, images(), RECIPE, images(seed=1), n).models for n in (1, 3))
    assert weights(one[0]) == weights(three[0])


def test_killed_generations_continue(tmp_path, monkeypatch):
    given = lambda folder: born_again(net, images(), RECIPE, images(seed=1), 3, folder=folder)
    whole, real, calls = given(None), self_distillation.fit, []
    def dying(objective, *args, setup):
        calls.append(1)
        return real(dies_at(objective, 11) if len(calls) == 2 else objective, *args, setup=setup, save_every=0)
    monkeypatch.setattr(self_distillation, 'fit', dying)
    with pytest.raises(Killed): given(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['generation-0', 'generation-1']
    steps = [Checkpoint(tmp_path/f'generation-{k}').read()[1]['step'] for k in (0, 1)]
    assert steps[0] == 20 and 0 < steps[1] < 20
    monkeypatch.undo()
    assert [weights(m) for m in given(tmp_path).models] == [weights(m) for m in whole.models]
    other = replace(RECIPE, lr=0.1)
    with refused('another recipe'): born_again(net, images(), other, images(seed=1), 3, folder=tmp_path)
    with refused('resume=True'): born_again(net, images(), RECIPE, images(seed=1), 3, folder=tmp_path, resume=False)


def test_a_single_generation_is_the_plain_run_of_a_network_that_is_there(tmp_path, monkeypatch):
    data, how = images(), dict(device='cpu', progress=False)
    recipe, plain, earlier = replace(RECIPE, seed=7), net(3), net(3)
    def born(model, name): return born_again(lambda: model, data, recipe, generations=1, folder=tmp_path/name, **how)
    history = fit(Supervised(plain), data, recipe, folder=tmp_path/'plain', resume=True, **how)
    state, made = torch.get_rng_state(), born(earlier, 'born')
    assert made.models[0] is earlier and made.measured == [] and torch.equal(state, torch.get_rng_state())
    assert weights(earlier) == weights(plain) != weights(net(3)) and made.histories[0].losses == history.losses

    real, at = self_distillation.fit, 11
    def dying(objective, *args, setup): return real(dies_at(objective, at), *args, setup=setup, save_every=0)
    monkeypatch.setattr(self_distillation, 'fit', dying)
    with pytest.raises(Killed): born(net(3), 'killed')
    at = 1  # a run that is done takes no step
    assert weights(born(net(3), 'born').models[0]) == weights(plain)
    monkeypatch.undo()
    assert weights(born(net(3), 'killed').models[0]) == weights(plain)


BAD = [('generations', (0, -1, 2.5)), ('temperature', (0, math.nan)), ('alpha', (1.5,))]

@pytest.mark.parametrize('bad', [{name: value} for name, values in BAD for value in values])
def test_born_again_refuses_before_it_trains(bad):
    def make(): raise AssertionError('nothing may be built')
    (name, _), = bad.items()
    with refused(name): born_again(make, images(), RECIPE, images(), **bad)


def test_a_weak_generation_teaches_as_well_as_it_can():
    assert len(born_again(net, images(), replace(RECIPE, steps=1, lr=1e-9), images(seed=1), generations=2).models) == 2


def test_the_ensemble_is_the_mean_of_the_probabilities():
    models, x = [staged(s).eval() for s in range(3)], images().get(torch.arange(9)).x
    mean = sum(m(x).double().softmax(1) for m in models) / 3
    assert torch.allclose(Ensemble(models)(x).double().softmax(1), mean, atol=1e-6)
    assert torch.allclose(Ensemble(models)(x), mean.log().float(), atol=1e-5)
    assert torch.allclose(Ensemble(models[:1])(x), models[0](x).log_softmax(1), atol=1e-6)
    with refused('at least 1'): Ensemble([])


def test_the_ensemble_is_finite_for_extreme_logits_and_differs_from_the_mean_of_logits():
    class Says(nn.Module):
        def __init__(self, *z):
            super().__init__()
            self.z = nn.Parameter(torch.tensor([z]))
        def forward(self, x): return self.z.expand(len(x), -1)
    one, two = Says(3e4, 0., -3e4), Says(-1., 0., 2.)
    z = Ensemble([one, two])(torch.zeros(1, 1))
    z.sum().backward()
    assert z.isfinite().all() and one.z.grad.isfinite().all()
    p = torch.tensor([[1., 0., 0.]]) / 2 + two.z.softmax(1) / 2
    assert torch.allclose(z.softmax(1), p, atol=1e-6)
    assert not torch.allclose(((one.z + two.z) / 2).softmax(1), p, atol=0.1)


def test_the_ensemble_can_be_evaluated_and_can_teach():
    found = born_again(net, images(), replace(RECIPE, steps=60), images(seed=1), 2)
    together, student = found.ensemble(), net(5)
    before = weights(together)
    evaluate(together, images())
    fit(Distill(student, together), images(), RECIPE, images(seed=1))
    assert weights(together) == before and {k.split('.')[0] for k in together.state_dict()} == {'models'}


# --- exits

NETS = {'resnet20': lambda: build_model('resnet20', CLASSES, 1, 8), 'wrn': lambda: wrn_16_1(CLASSES, 1),
        'resnet18': lambda: resnet18(CLASSES, channels=1, stem='cifar'),
        'digit_student': lambda: build_model('digit_student', CLASSES, 1, 8),
        'digit_teacher': lambda: digit_teacher(CLASSES), 'staged': staged}


@pytest.mark.parametrize('name', NETS)
def test_exits_of_every_staged_network(name):
    torch.manual_seed(0)
    model, x = NETS[name]().eval(), images().get(torch.arange(3)).x
    plain, hooks = model(x), lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    exits = EarlyExits(model).eval()
    stages = [n for n, _ in model.named_children() if n.startswith('layer')]
    assert exits.names == [*stages[:-1], 'deepest'] and len(exits) == len(stages) >= 2
    assert torch.equal(exits(x), plain) and torch.equal(exits.exits(x)[-1], plain) and exits.backbone is model
    for k, z in enumerate(exits.exits(x)):
        assert torch.equal(exits(x, k), z) and torch.equal(exits.at(k)(x), z)
        assert torch.equal(exits(x, k - len(exits)), z) and z.shape == plain.shape
    features, _ = exits.every(x)
    assert len({f.shape for f in features}) == 1
    assert torch.equal(model.get_submodule(exits.deepest.removesuffix(':input'))(features[-1]), plain)
    assert hooks() == 0


def test_stopping_really_stops_and_leaves_no_hook_behind():
    model, ran = staged(), []
    for n, m in model.named_children(): m.register_forward_hook(lambda m, i, o, n=n: ran.append(n))
    exits = EarlyExits(model).eval()
    for k, expected in enumerate((['layer1'], ['layer1', 'layer2'], [n for n, _ in model.named_children()])):
        ran.clear()
        exits(torch.zeros(2, 1, 8, 8), k)
        assert ran[:len(expected) - (k < 2)] == expected[:len(expected) - (k < 2)] and not set(ran) - set(expected)
    with refused(r'the network does not take inputs of shape \(5, 8, 8\)'):  # a failing network leaves no hook either
        exits(torch.zeros(2, 5, 8, 8), 1)
    assert [len(m._forward_hooks) for m in model.children()] == [1] * 7


def conv_macs(c, side): return c.in_channels * c.out_channels * c.kernel_size[0]**2 * side**2


def test_costs_are_those_of_stopping_and_add_up():
    model = staged()
    exits = EarlyExits(model)
    exits.train()
    costs, x = exit_costs(exits, (1, 8, 8)), torch.zeros(1, 1, 8, 8)
    sides, trunk = (4, 2, 1), 0
    for k, (cost, side) in enumerate(zip(costs, sides)):  # counted by hand, from the shapes
        trunk += conv_macs(model.get_submodule(f'layer{k + 1}')[0], side)
        head = 0 if k == 2 else 4 * (4, 6)[k] * 8 + 8 * CLASSES  # each weight once: averaged before the adapter
        assert (cost['trunk'], cost['head']) == (trunk + (8 * CLASSES if k == 2 else 0), head)
        assert cost['macs'] == cost['trunk'] + cost['head'] == count_macs(exits.at(k).eval(), x)
        assert cost['path'] == cost['trunk'] + sum(c['head'] for c in costs[:k + 1])
    assert costs[-1]['macs'] == count_macs(model.eval(), x)


def test_the_price_of_a_head_does_not_depend_on_the_size_of_the_map():
    shapes = [(1, side, side) for side in (8, 32)]
    costs = [exit_costs(EarlyExits(digit_teacher(CLASSES), shape=shape), shape) for shape in shapes]
    heads = [[c['head'] for c in cs] for cs in costs]
    assert heads[0] == heads[1] == [4 * c * 128 + 128 * CLASSES for c in (32, 64, 128)] + [0]
    assert costs[1][0]['trunk'] == 16 * costs[0][0]['trunk']


@pytest.mark.parametrize('shape', [(5, 2, 4, 6), (5, 2, 3, 2), (5, 2, 1, 1), (5, 2)])
def test_a_head_averages_to_2x2_adapts_normalises_and_classifies(shape):
    torch.manual_seed(0)
    head, x = ExitHead(shape, 6, CLASSES), torch.randn(shape)
    (W, b), (V, c) = ([t.tolist() for t in l.parameters()] for l in (head.adapter[-3], head.fc))
    def seen(image):
        if len(shape) == 2: return image.tolist()
        part = lambda i, n: slice(i * n // 2, -(-(i + 1) * n // 2))  # for odd sizes the halves share the middle
        quarters = [(m, i, j) for m in image for i in (0, 1) for j in (0, 1)]
        return [m[part(i, len(m)), part(j, len(m[0]))].double().mean().item() for m, i, j in quarters]
    for row in range(5):
        s = seen(x[row])
        h = [sum(w * v for w, v in zip(ws, s)) + bias for ws, bias in zip(W, b)]
        mean = sum(h) / 6
        std = math.sqrt(sum((v - mean)**2 for v in h) / 6 + 1e-5)
        f = [max((v - mean) / std, 0) for v in h]
        z = [sum(w * v for w, v in zip(ws, f)) + bias for ws, bias in zip(V, c)]
        for found, expected in zip(head(x), (f, z)): assert found[row].tolist() == pytest.approx(expected, abs=1e-4)
        for alone, together in zip(head.train()(x[row:row + 1]), head(x)):  # no statistics of the batch
            assert torch.allclose(alone[0], together[row], atol=1e-6)


@pytest.mark.parametrize('name', ['resnet20', 'resnet18', 'digit_teacher'])
def test_deeper_exits_cost_more_and_none_more_than_the_network(name):
    costs = exit_costs(EarlyExits(NETS[name]()), (1, 8, 8))
    macs = [c['macs'] for c in costs]
    assert macs == sorted(set(macs)) and [c['trunk'] for c in costs] == sorted(c['trunk'] for c in costs)


class UntilSure(nn.Module):
    def __init__(self, exits, threshold):
        super().__init__()
        self.exits, self.threshold = exits, threshold
    def forward(self, x): return self.exits.until_sure(x, self.threshold)


def test_stopping_when_sure_is_what_the_curve_replays():
    torch.manual_seed(0)
    objective, data = BeYourOwnTeacher(staged(), shape=(1, 8, 8)), images()
    fit(objective, data, replace(RECIPE, steps=60))
    exits = objective.model
    logits, costs = exit_logits(exits, data), exit_costs(exits, (1, 8, 8))
    for t in (0., 0.6, 0.8, 1.):
        stop, row = sure_exit(logits, t), sure_curve(exits, data, [t])[0]
        paid, right = [], []
        for i in range(len(data)):
            x = data.get(torch.tensor([i])).x
            z, k = exits.until_sure(x, t)
            assert k == stop[i] and torch.allclose(z[0], logits[k][i], atol=1e-5)
            paid.append(count_macs(UntilSure(exits, t), x) if i < 5 else costs[k]['path'])
            assert paid[-1] == costs[k]['path']
            right.append(z.argmax().item() == data.y[i].item())
        assert row['macs'] == pytest.approx(sum(paid) / len(paid))
        assert row['accuracy'] == pytest.approx(sum(right) / len(right))
        assert sum(row['stopped']) == pytest.approx(1, abs=0.01)
        if t == 0.: assert stop.unique().tolist() == [0]
        if t == 1.: assert stop.unique().tolist() == [len(exits) - 1]
    assert plot_exits(measure_exits(exits, data), sure_curve(exits, data)) is not None
    with refused('one image'): exits.until_sure(torch.zeros(2, 1, 8, 8))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.act = nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True)
        self.twice, self.unused = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.fc, self.late, self.pair = nn.Linear(4, 3), nn.Identity(), nn.LSTM(4, 4, batch_first=True)
    def forward(self, x):
        x = self.twice(self.twice(self.act(self.a(x))))
        self.pair(x.flatten(2).mT)
        return self.late(self.fc(x.mean((2, 3))))


WRONG = [(['layer_2'], r"no layer 'layer_2'; the nearest names are .*layer2"), (['fc'], 'before the classifier'),
         ([], 'at least 1 layer, so that with the deepest there are 2 exits'), ('layer1', 'list of names'),
         (['layer1', 'layer1'], 'without repetition'), (['flatten', 'nothing'], "no layer 'nothing'"),
         (['layer1:input'], 'names of parts')]

@pytest.mark.parametrize('layers,said', WRONG)
def test_layers_that_cannot_have_an_exit_are_refused(layers, said):
    with refused(said): EarlyExits(staged(), layers)
    with refused(said): BeYourOwnTeacher(staged(), layers=layers)


@pytest.mark.parametrize('layer,said', [('twice', 'ran 2 times'), ('unused', 'ran 0 times'),
                                        ('late', 'before the classifier'), ('pair', "'pair' gives tuple")])
def test_layers_that_would_fail_silently_are_refused(layer, said):
    with refused(said): EarlyExits(Odd(), [layer])


def test_a_layer_that_is_overwritten_in_place_gives_the_same_in_training_and_when_it_stops():
    exits, x = EarlyExits(Odd(), ['a']).eval(), torch.randn(3, 1, 8, 8)
    stopped = exits(x, 0)
    assert torch.equal(exits.exits(x)[0], stopped) and torch.equal(stopped, exits.heads[0](exits.backbone.a(x))[1])
    assert not torch.allclose(stopped, exits.heads[0](exits.backbone.a(x).relu())[1])
    assert torch.equal(exits.until_sure(x[:1], 0.)[0], exits(x[:1], 0))


def test_stopping_when_sure_leaves_a_network_that_trains_as_it_was():
    exits = EarlyExits(staged(), shape=(1, 8, 8)).train()
    before, x = fingerprint(exits.state_dict()), torch.randn(1, 1, 8, 8)
    logits, k = exits.until_sure(x, 1.)
    assert exits.training and exits.backbone.training and not logits.requires_grad
    assert fingerprint(exits.state_dict()) == before
    assert torch.equal(logits, exits.eval()(x)) and k == len(exits) - 1


def test_generations_without_a_validation_split_are_not_measured():
    made = born_again(net, images(), replace(RECIPE, steps=2), generations=2)
    assert len(made.models) == 2 and made.measured == []


def test_generations_of_a_language_model_are_measured_by_what_their_data_measure(tmp_path):
    recipe = Recipe(steps=30, batch_size=20, optimizer='adam', lr=0.03, weight_decay=0., precision='float32')
    setup, rows = Setup(device='cpu', progress=False, folder=tmp_path), []
    made = born_again(speaker, text(), recipe, text(seed=1), 2, setup=setup, log=rows.append)
    assert list(made.measured[1]) == ['bits_per_byte'] and made.measured[1].bits_per_byte < math.log2(BYTES)
    assert made.measured[1] == evaluate(made.models[1], text(seed=1)) and any('soft' in row for row in rows)
    together, batch = made.ensemble(), text().get(torch.arange(5))
    mean = sum(m(batch.x).double().softmax(-1) for m in made.models) / 2
    assert torch.allclose(together(batch.x).double().softmax(-1), mean, atol=1e-6)


def test_other_refusals_of_exits():
    ready = EarlyExits(staged(), shape=(1, 8, 8))
    with refused('layers and shape must be left out'): BeYourOwnTeacher(ready, layers=['layer1'])
    with refused('models must be a list of models'): Ensemble(staged())
    assert len(Ensemble(nn.ModuleList([net(), net()])).models) == 2
    with refused(r'layers must be given.*its parts are a, act'): EarlyExits(Odd())
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with refused('shape must be given'): EarlyExits(flat, ['1'])
    fixed = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))
    with refused(r'the model does not take inputs of shape \(1, 32, 32\)'): EarlyExits(fixed, ['0'])
    with refused('linear layer'): EarlyExits(nn.Sequential(nn.Conv2d(1, 2, 3)), ['0'])
    with refused('exit must be a whole number from -3 to 2, but is 3'): EarlyExits(staged())(torch.zeros(1, 1, 8, 8), 3)
    with refused("'unused' did not run"): run_until(Odd(), 'unused', torch.zeros(1, 1, 8, 8))
    mlp = EarlyExits(nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3)), ['1'], shape=(1, 8, 8))
    assert [z.shape for z in mlp.exits(torch.zeros(2, 1, 8, 8))] == [(2, 3), (2, 3)]


# --- the deepest teaches the rest

def paper_loss(features, logits, y, T, alpha, weight):
    "Zhang et al. 2019 in loops of float64, with the seed formula's α and T²; unlabelled rows have no hard part."
    B, hard, soft, far = len(y), 0., 0., 0.
    for i, (f, z) in enumerate(zip(features, logits)):
        last = i == len(logits) - 1
        for b in range(B):
            ce = math.log(sum(math.exp(v) for v in z[b])) - (z[b][y[b]] if y[b] != UNLABELLED else 0.)
            if y[b] != UNLABELLED: hard += (1. if last else 1 - alpha) * ce / B
            if last: continue
            p, q = ([math.exp(v / T) for v in row] for row in (logits[-1][b], z[b]))
            p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
            soft += alpha * T * T * sum(a * math.log(a / c) for a, c in zip(p, q)) / B
            far += weight * sum((a - c)**2 for a, c in zip(f[b], features[-1][b])) / B
    return {'hard': hard, 'soft': soft, 'feature': far}


@pytest.mark.parametrize('T,alpha,weight', [(3., 0.3, 1e-3), (1., 0., 0.), (4., 1., 0.5)])
def test_the_losses_are_the_papers(T, alpha, weight):
    torch.manual_seed(0)
    objective, batch = BeYourOwnTeacher(digit_teacher(CLASSES), T, alpha, weight), images().get(torch.arange(8))
    batch = batch._replace(y=batch.y.clone().index_fill_(0, torch.tensor([2, 5]), UNLABELLED))
    losses = objective(batch)
    with torch.no_grad(): features, logits = copy.deepcopy(objective).model.every(batch.x)
    features, logits = ([t.double().tolist() for t in ts] for ts in (features, logits))
    expected = paper_loss(features, logits, batch.y.tolist(), T, alpha, weight)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_row_without_weight_has_no_loss_at_any_exit():
    torch.manual_seed(0)
    objective, batch = BeYourOwnTeacher(digit_teacher(CLASSES), feature_weight=0.5), images().get(torch.arange(8))
    objective.eval()
    kept = torch.tensor([0, 2, 3, 6])
    weight = torch.zeros(8).index_fill(0, kept, 0.5)
    few, many = objective(Batch(*(part[kept] for part in batch[:4]))), objective(batch._replace(weight=weight))
    assert {k: v.item() for k, v in many.items()} == pytest.approx({k: v.item() for k, v in few.items()}, rel=1e-5)
    assert min(few.values()) > 0
    nothing = objective(batch._replace(weight=torch.zeros(8)))
    sum(nothing.values()).backward()
    assert {part.item() for part in nothing.values()} == {0.} and not any(p.grad.any() for p in objective.parameters())


def test_the_distance_of_rows_that_are_there():
    torch.manual_seed(0)
    f, g, weight = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([[0., 1.], [0., 0.], [2., 0.1], [0.1, 0.]])
    f[1] = math.nan
    f.requires_grad_()
    found = feature_distance(f, g, weight)
    found.backward()
    kept = [0, 2, 3]
    assert found.item() == pytest.approx((f[kept] - g[kept]).square().sum(1).mean().item())
    assert f.grad.isfinite().all() and feature_distance(f, g, torch.zeros(4)) == 0


def test_only_the_labels_move_the_deepest_head():
    student = staged()
    objective, batch = BeYourOwnTeacher(student, alpha=0.5, feature_weight=1.), images().get(torch.arange(16))
    losses = objective(batch)
    deep = [*student.layer3.parameters(), *student.fc.parameters()]
    def grad(name, of): return torch.autograd.grad(losses[name], of, retain_graph=True, allow_unused=True)
    def grads(*names): return [g for name in names for g in grad(name, deep)]
    assert all(g is None for g in grads('soft', 'feature'))
    hard = grads('hard')
    plain = torch.autograd.grad(F.cross_entropy(student(batch.x), batch.y), deep)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(hard, plain))
    for p in (*student.layer1.parameters(), *objective.model.heads[0].parameters()):
        assert any(grad(name, p)[0] is not None for name in losses)


def test_heads_train_and_evaluation_sees_the_deepest_exit_alone():
    objective, data = BeYourOwnTeacher(staged()), images()
    assert {id(p) for p in objective.parameters()} >= {id(p) for p in objective.model.heads.parameters()}
    before = weights(objective.model.heads)
    row = fit(objective, data, RECIPE, valid=data).last
    assert weights(objective.model.heads) != before
    plain = evaluate(objective.model.backbone, data)
    assert (row['accuracy'], row['valid_loss']) == pytest.approx((plain.accuracy, plain.loss), rel=1e-5)
    assert row['valid_loss'] < row['hard']


@pytest.mark.parametrize('case', ['one', 'duplicates', 'one class', 'constant', 'unlabelled', 'huge'])
def test_losses_and_gradients_are_finite_at_the_edges(case):
    data = images()
    some = {'one': torch.tensor([0]), 'duplicates': torch.zeros(6).long(), 'one class': torch.arange(0, 18, 3)}
    batch = data.get(some.get(case, torch.arange(6)))
    if case == 'constant': batch = batch._replace(x=torch.zeros_like(batch.x))
    if case == 'huge': batch = batch._replace(x=batch.x * 1e4)
    if case == 'unlabelled': batch = batch._replace(y=torch.full_like(batch.y, UNLABELLED))
    for make in (lambda s: BeYourOwnTeacher(s), lambda s: SelfTeacher(s, data)):
        torch.manual_seed(0)
        objective = make(digit_teacher(CLASSES)).train()
        losses = objective(batch)
        sum(losses.values()).backward()
        assert all(l.isfinite() for l in losses.values()), losses
        assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)
    extreme = torch.tensor([[3e4, -3e4, 0.]]).requires_grad_()
    loss = view_loss(extreme, -extreme, torch.zeros(3), 0.1, 0.04)
    assert loss.isfinite()


def test_features_in_bfloat16_are_compared_in_float32():
    f, g = torch.full((2, 512), 100., dtype=torch.bfloat16), torch.full((2, 512), 101., dtype=torch.bfloat16)
    found = feature_distance(f, g)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(512 * (f[0, 0].item() - g[0, 0].item())**2)


@pytest.mark.parametrize('shapes', [((4, 3), (4, 1)), ((4, 3), (1, 3)), ((4, 3), (3,)), ((0, 3), (0, 3)), ((3,), (3,))])
def test_feature_distance_refuses_what_would_be_broadcast(shapes):
    said = r'features and deepest must have the same shape \(B, D\), with at least 1 row'
    with refused(said) as e: feature_distance(*map(torch.zeros, shapes))
    assert all(str(s) in str(e.value) for s in shapes)


@pytest.mark.parametrize('bad', [dict(temperature=0), dict(temperature=-2), dict(alpha=1.1), dict(alpha=-0.1),
                                 dict(feature_weight=-1), dict(feature_weight=math.nan)])
def test_be_your_own_teacher_refuses(bad):
    with refused(next(iter(bad))): BeYourOwnTeacher(staged(), **bad)


def test_be_your_own_teacher_resumes(tmp_path):
    whole, resumed = resumes(lambda: BeYourOwnTeacher(staged(dropout=0.3)), images(), tmp_path)
    assert weights(whole.model.backbone) == weights(resumed.model.backbone)


# --- the moving average

def test_the_average_follows_the_formula_and_nothing_of_it_trains():
    torch.manual_seed(0)
    model, m = digit_student(), 0.8
    average = MovingAverage(model, m)
    expected = {k: v.double() for k, v in model.state_dict().items()}
    assert not any(p.requires_grad for p in average.parameters())
    assert set(average.state_dict()) == {f'model.{k}' for k in expected}
    assert all(p.requires_grad for p in model.parameters()) and model.training
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters(): p.add_(torch.randn_like(p))
        model(torch.randn(4, 1, 8, 8))  # moves the statistics
        average.update(model)
        for k, v in model.state_dict().items():
            expected[k] = m * expected[k] + (1 - m) * v.double() if v.is_floating_point() else v
        found = average.model.state_dict()
        assert all(torch.allclose(found[k].double(), e.double(), atol=1e-5) for k, e in expected.items())
    assert average.model.layer1[1].num_batches_tracked == 3


def test_whole_numbers_are_copied_and_a_tied_weight_moves_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer('mask', torch.tensor([True, False]))
            self.register_buffer('count', torch.tensor(100))
    model = Tied()
    average, before = MovingAverage(model, 0.75), model.embed.weight.detach().clone()
    with torch.no_grad(): model.embed.weight.add_(1)
    model.mask.copy_(torch.tensor([False, True]))
    model.count.add_(1)
    average.update(model)
    torch.testing.assert_close(average.model.embed.weight, before + 0.25)
    assert average.model.head.weight is average.model.embed.weight
    assert average.model.mask.tolist() == [False, True] and average.model.count == 101


def test_a_network_may_ask_its_parameters_where_it_is():
    class Asks(nn.Linear):
        def forward(self, x): return super().forward(x.to(next(self.parameters()).dtype))
    assert MovingAverage(Asks(2, 3))(torch.zeros(1, 2)).shape == (1, 3)


def test_the_average_can_be_copied_and_comes_back_from_its_state():
    average, x = MovingAverage(net(0), 0.5), images().get(torch.arange(3)).x
    average.update(net(1))
    other, copied = MovingAverage(net(2), 0.5), copy.deepcopy(average)
    other.load_state_dict(average.state_dict())
    assert weights(other) == weights(copied) == weights(average) and torch.equal(other(x), average(x))
    for each in (average, copied, other): each.update(net(3))
    assert weights(other) == weights(copied) == weights(average)


def test_equal_weights_stay_equal_bit_for_bit():
    model = digit_teacher()
    average = MovingAverage(model, 0.3)
    average.update(model)
    assert weights(average.model) == weights(model)


def test_the_average_stays_in_eval_mode_without_gradients_whatever_is_called():
    average = MovingAverage(digit_student(), 0.9)
    before = weights(average)
    nn.Sequential(average).train()
    assert not any(m.training for m in average.modules())
    for call in (average.train, average.model.train, average.model.layer1.train, nn.Sequential(average).train):
        call()
        assert not average(torch.randn(4, 1, 8, 8)).requires_grad
        assert not any(m.training for m in average.modules()) and weights(average) == before


def test_the_view_loss_is_the_papers():
    g = torch.Generator().manual_seed(0)
    gs, gt, c = (torch.randn(*s, generator=g) * 3 for s in ((5, 4), (5, 4), (4,)))
    for ts, tt in ((1., 0.5), (0.1, 0.04)):
        total = 0.
        for b in range(5):
            p = [math.exp((gt[b, k].item() - c[k].item()) / tt) for k in range(4)]
            q = [math.exp(gs[b, k].item() / ts) for k in range(4)]
            total -= sum(a / sum(p) * math.log(e / sum(q)) for a, e in zip(p, q)) / 5
        assert view_loss(gs, gt, c, ts, tt).item() == pytest.approx(total, rel=1e-4)
    assert view_loss(gs.bfloat16(), gt.bfloat16(), c).dtype == torch.float32
    gt.requires_grad_()
    assert not view_loss(gs, gt, c).requires_grad


def test_the_view_loss_is_a_mean_over_the_places_of_each_row_that_is_there():
    g = torch.Generator().manual_seed(0)
    gs, gt, c = (torch.randn(*s, generator=g).double() * 3 for s in ((3, 4, 5), (3, 4, 5), (5,)))
    weight = torch.tensor([[1., 0.5, 0., 2.], [0., 0., 0., 0.], [0., 0., 0.1, 0.]]).double()
    gone = weight == 0
    gs[gone], gt[gone] = math.nan, math.inf
    expected = 0.
    for b in range(3):
        for l in range(4):
            if not weight[b, l]: continue
            p = [math.exp((gt[b, l, k] - c[k]) / 0.5) for k in range(5)]
            q = [math.exp(gs[b, l, k] / 0.7) for k in range(5)]
            each = -sum(a / sum(p) * math.log(e / sum(q)) for a, e in zip(p, q))
            expected += each * weight[b, l].item() / weight[b].sum().item() / 2  # two rows are there
    gs.requires_grad_()
    loss = view_loss(gs, gt, c, 0.7, 0.5, weight)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert gs.grad.isfinite().all() and not gs.grad[gone].any() and gs.grad[~gone].any(1).all()
    assert view_loss(gs, gt, c, weight=torch.zeros(3, 4)) == 0
    with refused('weight must be a tensor of the shape'): view_loss(gs, gt, c, weight=torch.ones(3))


SHAPES = [(((4, 3), (1, 3), (3,)), 'same shape'), (((4, 3), (4, 2), (3,)), 'same shape'),
          (((4, 3), (4, 3), (1,)), 'centre'), (((4, 3), (4, 3), (4, 3)), 'centre'),
          (((0, 3), (0, 3), (3,)), 'at least 1 row'), (((4, 1), (4, 1), (1,)), 'at least 2 classes')]

@pytest.mark.parametrize('shapes, named', SHAPES)
def test_the_view_loss_refuses_what_would_be_broadcast(shapes, named):
    with refused(named): view_loss(*map(torch.zeros, shapes))


def test_a_teacher_that_says_nothing_is_refused_as_a_teacher():
    said, z, c = 'teacher_logits and centre must be finite', torch.zeros(4, 3), torch.zeros(3)
    for wrong in (math.nan, math.inf):
        gt = z.clone()
        gt[1, 2] = wrong
        with refused(said): view_loss(z, gt, c)
        assert view_loss(z, gt, c, weight=torch.tensor([1., 0., 1., 1.])) == pytest.approx(math.log(3))
    with refused(said): view_loss(z, z, c * math.nan)
    masked = torch.tensor([[0., 0., -math.inf]]*4)
    assert view_loss(z, masked, c) == pytest.approx(math.log(3))


def test_a_masked_class_has_no_part_in_the_view_loss():
    g = torch.Generator().manual_seed(0)
    gs, gt, c = (torch.randn(shape, generator=g) for shape in ((4, 5), (4, 5), (5,)))
    hide = lambda x: x.index_fill(-1, torch.tensor([1, 4]), -math.inf)
    for student in (hide(gs), gs):
        student.requires_grad_()
        loss = view_loss(student, hide(gt), c)
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()
    kept = [0, 2, 3]
    torch.testing.assert_close(view_loss(hide(gs), hide(gt), c), view_loss(gs[:, kept], gt[:, kept], c[kept]))


def test_a_self_teacher_learns_with_a_masked_class(masked):
    data = images().subset(torch.arange(60)[torch.arange(60) % 3 < 2])
    objective = SelfTeacher(masked(net(0), 2), data)
    history = fit(objective, data, RECIPE, data)
    assert all(math.isfinite(l) for values in history.losses.values() for l in values)
    assert objective.centre.isfinite().all() and objective.centre[2] == 0


def test_the_view_loss_checks_its_temperatures():
    for name in ('student_temperature', 'teacher_temperature'):
        for T in (0, math.nan, math.inf):
            with refused(f'{name} must be a finite number greater than 0'):
                view_loss(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(3), **{name: T})


def test_other_views_are_other_views():
    for n in (2, 3, 18, 2**31 - 1):
        index, view = torch.arange(500), torch.arange(500) * 7919 % n
        other = _other_view(index, view, n)
        assert (other != view).all() and other.min() >= 0 and other.max() < n
        assert torch.equal(other, _other_view(index, view, n))
        assert torch.equal(other[[7, 3]], _other_view(index[[7, 3]], view[[7, 3]], n))


def test_student_and_teacher_see_different_views_of_the_same_images():
    data, seen = images(), {}
    objective = SelfTeacher(net(0), data).train()
    objective.model.register_forward_pre_hook(lambda m, x: seen.update(student=x[0]))
    objective.teacher.model.register_forward_pre_hook(lambda m, x: seen.update(teacher=x[0]))
    index, view = torch.arange(10), torch.arange(10) % data.n_views
    objective(data.get(index, view))
    assert torch.equal(seen['student'], data.get(index, view).x)
    assert torch.equal(seen['teacher'], data.get(index, _other_view(index, view, data.n_views)).x)
    assert not torch.equal(seen['student'], seen['teacher'])


def slow_self_training(student, data, recipe, m, ts, tt, mc, weight):
    "The whole method again as a plain loop, with a teacher that is a model of its own: SGD without the training loop."
    teacher, c = copy.deepcopy(student).eval(), torch.zeros(CLASSES, dtype=torch.float64)
    total = recipe.total_steps(len(data))
    optimizer = recipe.make_optimizer(student.parameters())
    student.train()
    for step, (index, view) in enumerate(data.plan(recipe, 0, total)):
        for group in optimizer.param_groups: group['lr'] = recipe.lr_at(step, total)
        batch = data.get(index, view)
        gs = student(batch.x)
        other = (view + 1 + mix(index, view) % (data.n_views - 1)) % data.n_views
        with torch.no_grad(): gt = teacher(data.get(index, other).x)
        p = ((gt.double() - c) / tt).softmax(1).float()
        hard = F.cross_entropy(gs, batch.y, reduction='sum', ignore_index=UNLABELLED) / len(index)
        (hard - weight * (p * (gs / ts).log_softmax(1)).sum(1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        c = mc * c + (1 - mc) * gt.double().mean(0)
        if step + 1 < total:  # the average moves where the next step begins
            with torch.no_grad():
                for t, s in zip(teacher.state_dict().values(), student.state_dict().values()):
                    t.copy_(m * t + (1 - m) * s if t.is_floating_point() else s)
    return teacher, c


def test_the_other_view_is_one_of_those_that_an_image_shows(monkeypatch):
    data = digits().train.subset(range(50)).replace(views=3)
    objective, asked = SelfTeacher(digit_student(), data), []
    get = type(data).get
    def watched(self, index, view=None):
        asked.append((index, view))
        return get(self, index, view)
    monkeypatch.setattr(type(data), 'get', watched)
    index = torch.arange(50)
    batch = data.get(index, data.view_of(0, 0, index))
    objective(batch)
    (_, first), (index, second) = asked
    assert (data.view_number(index, second) < 3).all() and (second != first).all()


def test_fit_runs_the_method_that_a_plain_loop_runs():
    data, a, b = images().unlabelled(torch.arange(20)), net(0), net(0)
    settings = dict(weight=0.5, momentum=0.8, student_temperature=0.7, teacher_temperature=0.3, centre_momentum=0.6)
    objective = SelfTeacher(a, data, **settings)
    fit(objective, data, RECIPE)
    teacher, c = slow_self_training(b, data, RECIPE, 0.8, 0.7, 0.3, 0.6, 0.5)
    for one, two in ((a, b), (objective.teacher.model, teacher)):
        found = one.state_dict()
        assert all(torch.allclose(found[k].double(), v.double(), atol=1e-5) for k, v in two.state_dict().items())
    assert torch.allclose(objective.centre.double(), c, atol=1e-5)


def test_the_teacher_moves_once_per_optimiser_step_even_in_pieces(monkeypatch):
    moves = []
    real = MovingAverage.update
    def update(self, model):
        moves.append(weights(model.fc))
        real(self, model)
    monkeypatch.setattr(MovingAverage, 'update', update)
    objective = SelfTeacher(net(0), images())
    fit(objective, images(), replace(RECIPE, steps=6, accumulate=4))
    assert len(moves) == len(set(moves)) == 6
    moves.clear()
    with torch.no_grad(): objective.eval()(images().get(torch.arange(8)))
    before = weights(objective)
    evaluate(objective.model, images())
    assert moves == [] and weights(objective) == before


def test_only_the_student_trains_and_state_is_complete():
    data, student = images(), net(0)
    objective = SelfTeacher(student, data)
    own = {id(p) for p in student.parameters()}
    assert {id(p) for p in objective.parameters() if p.requires_grad} == own
    optimizer = RECIPE.make_optimizer(objective.parameters())
    assert {id(p) for group in optimizer.param_groups for p in group['params']} == own
    assert 'centre' in objective.state_dict() and not any(p.requires_grad for p in objective.buffers())
    before = weights(objective.teacher)
    row = fit(objective, data, RECIPE, valid=data).last
    assert weights(objective.teacher) != before and objective.centre.abs().sum() > 0
    assert row['valid_loss'] == pytest.approx(evaluate(student, data).loss, rel=1e-5)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_self_teacher_resumes_with_teacher_and_centre(tmp_path, accumulate):
    data = images().unlabelled(torch.arange(20))
    def make():
        student = staged(dropout=0.3)
        return SelfTeacher(student, data, momentum=0.9)
    whole, resumed = resumes(make, data, tmp_path, replace(RECIPE, accumulate=accumulate))
    assert weights(whole.teacher) == weights(resumed.teacher) and torch.equal(whole.centre, resumed.centre)
    assert weights(whole.teacher.model) != weights(whole.model)


def test_images_without_labels_teach():
    data = images().unlabelled([])
    objective = SelfTeacher(net(0), data)
    history = fit(objective, data, RECIPE)
    assert set(history.losses['hard']) == {0.} and min(history.losses['self']) > 0
    def after(labels):
        student = net(0)
        fit(SelfTeacher(student, labels, weight=0.), labels, RECIPE)
        return weights(student)
    plain = net(0)
    fit(Supervised(plain), images(), RECIPE)
    assert after(images()) == weights(plain)  # weight 0 is plain training


def test_without_labels_the_answers_do_not_collapse():
    "Entropy of the answers strictly between 0 and ln K: not one class for all, not all classes for each."
    data, K = images(120).unlabelled([]), CLASSES
    recipe, found = Recipe(steps=80, batch_size=32, optimizer='adamw', lr=0.003, precision='float32'), {}
    for name, kw in dict(both={}, no_centre=dict(centre_momentum=1.), no_sharp=dict(teacher_temperature=0.1)).items():
        settings = {'student_temperature': 0.1, 'teacher_temperature': 0.04} | kw
        objective = SelfTeacher(net(0), data, weight=1., momentum=0.9, **settings)
        fit(objective, data, recipe)
        p = ((predict(objective.teacher, data) - objective.centre) / objective.teacher_temperature).softmax(1)
        found[name] = torch.special.entr(p).sum(1).mean().item(), torch.special.entr(p.mean(0)).sum().item()
    each, mean = found['both']
    assert 0.01 < each < mean - 0.1 and mean < math.log(K), found
    assert found['no_centre'][1] < mean, found
    assert found['no_sharp'][0] > each, found


def test_an_average_follows_one_network():
    average = MovingAverage(net())
    before = weights(average)
    for other in (nn.Identity(), digit_student(5), nn.Sequential(net(), nn.Linear(3, 3))):
        with refused('model must be the network that is followed'): average.update(other)
    assert weights(average) == before


def test_exits_are_measured_on_images_with_labels():
    exits = EarlyExits(staged(), shape=(1, 8, 8))
    for data in (images().unlabelled(range(59)), text()):
        with refused('data must be images that all have a label'): measure_exits(exits, data)
        with refused('data must be images that all have a label'): sure_curve(exits, data)
    for wrong in (1.01, -0.1, math.nan, '0.5'):
        with refused('each of thresholds must be a probability'): sure_curve(exits, images(), [0.5, wrong])


def test_labelled_images_are_repeated_until_they_are_the_share():
    data = images(60).unlabelled(torch.arange(10))
    for share, times in ((0.5, 5), (0.75, 15), (0.01, 1)):
        more = repeat_labelled(data, share)
        assert len(more) == 10 * times + 50 and (more.y != UNLABELLED).sum() == 10 * times and more.mean == data.mean
        assert {h.tobytes() for h in more.x.numpy()} == {h.tobytes() for h in data.x.numpy()}
        assert more.y[more.y != UNLABELLED].bincount(minlength=3).tolist() == [times * c for c in (4, 3, 3)]
    with refused('share must be greater than 0 and at most 0.99, but is 1'): repeat_labelled(data, 1)
    with refused('none has a label'): repeat_labelled(images().unlabelled([]))


@pytest.mark.parametrize('bad', [dict(momentum=1.), dict(momentum=-0.1), dict(momentum=math.nan), dict(weight=-1.),
                                 dict(weight=math.inf), dict(student_temperature=0.), dict(teacher_temperature=-1.),
                                 dict(centre_momentum=1.1)])
def test_self_teacher_refuses(bad):
    with refused(f'{next(iter(bad))} must be'): SelfTeacher(net(), images(), **bad)


def test_self_teacher_needs_two_views_and_its_own_data():
    remedy = r'at least 2 views.*has 1.*data\.replace\(augment=CropFlip\(pad=1\)\)'
    with refused(remedy): SelfTeacher(net(), images(augment=CropFlip()))
    with refused('given to SelfTeacher.*another one'): fit(SelfTeacher(net(), images(seed=1)), images(), RECIPE)
    with refused(r'shape \(5,\).*3 classes'): fit(SelfTeacher(digit_student(5), images()), images(), RECIPE)


def test_the_centre_is_that_of_all_processes(monkeypatch):
    "Two processes: the other one has three places, with logits of 4, 4 and 1."
    objective = SelfTeacher(net(0), images(), centre_momentum=0.5)
    dist = self_distillation.dist
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'all_reduce', lambda t: t.add_(torch.tensor([[9.], [3.]])))
    objective._move_centre(torch.ones(1, CLASSES))
    assert torch.allclose(objective.centre, torch.full((CLASSES,), 1.25))  # half of the mean of 1, 4, 4 and 1


def test_a_class_for_which_nobody_answers_keeps_its_centre():
    objective = SelfTeacher(net(0), images(), centre_momentum=0.5)
    objective.centre.copy_(torch.tensor([1., 2., 3.]))
    objective._move_centre(torch.tensor([[2., -math.inf, 4.], [4., -math.inf, -math.inf]]))
    assert objective.centre.tolist() == [2., 2., 3.5]
    objective._move_centre(torch.empty(0, CLASSES))
    assert objective.centre.tolist() == [2., 2., 3.5]


# --- places that are not there, and data that are no images

def test_a_row_without_weight_is_neither_learned_from_nor_in_the_centre():
    data = images()
    kept, batch = torch.tensor([0, 2, 3, 6]), data.get(torch.arange(8), torch.arange(8))
    weight = torch.zeros(8).index_fill(0, kept, 0.5)
    found = []
    for b in (Batch(*(part[kept] for part in batch[:4])), batch._replace(weight=weight)):
        objective = SelfTeacher(net(0), data).train()
        objective.model.eval()  # batch statistics are of all rows
        losses = objective(b)
        sum(losses.values()).backward()
        grads = [p.grad for p in objective.model.parameters()]
        found.append(([loss.item() for loss in losses.values()], grads, objective.centre))
    (few, few_grads, few_centre), (many, grads, centre) = found
    assert many == pytest.approx(few, rel=1e-5) and few_centre.any()
    torch.testing.assert_close((grads, centre), (few_grads, few_centre), rtol=1e-4, atol=1e-6)


def test_a_language_model_teaches_itself_where_both_windows_hold_a_byte():
    data, seen = text(), []
    torch.manual_seed(0)
    objective = SelfTeacher(speaker(), data, centre_momentum=0.5).train()
    objective.teacher.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    index, view = torch.arange(20), torch.arange(20) % 3
    first = data.get(index, view)
    losses = objective(first)
    second = data.get(index, _other_view(index, view, 3))
    (x, v), = seen
    assert torch.equal(x, second.x) and not torch.equal(x, first.x)
    weight = first.weight * second.weight
    assert 0 < (weight != first.weight).sum()
    expected = view_loss(objective.model(first.x), v, torch.zeros(BYTES), weight=weight)
    assert losses['self'].item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(objective.centre, v[weight > 0].mean(0) / 2)
    history = fit(SelfTeacher(speaker(), data), data, RECIPE, text(seed=1), device='cpu', progress=False)
    assert set(history.losses) == {'hard', 'self'} and history.last['bits_per_byte'] > 0


def test_a_batch_of_a_data_set_without_weights_may_bring_its_own():
    data = images()
    batch = data.get(torch.arange(6))._replace(weight=torch.zeros(6))
    losses = SelfTeacher(net(0), data)(batch)
    assert {loss.item() for loss in losses.values()} == {0.}


@pytest.mark.parametrize('name', ['digit_student', 'resnet20'])
def test_both_objectives_are_made_from_a_model_by_name(name):
    data = images()
    for make in (BeYourOwnTeacher, lambda s: SelfTeacher(s, data)):
        objective = make(build_model(name, CLASSES, 1, 8))
        fit(objective, data, replace(RECIPE, steps=2, batch_size=8), data)
        assert evaluate(objective.model, data).accuracy >= 0


@pytest.mark.parametrize('pieces', [1, 2])
@pytest.mark.parametrize('to_none', [True, False])
def test_the_teacher_moves_once_per_step_however_a_loop_clears_the_gradients(to_none, pieces):
    torch.manual_seed(0)
    train = digits().train
    data = train.replace(augment=CropFlip(pad=1))
    objective = SelfTeacher(digit_student(), data, momentum=0.5).train()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    names = [name for name, _ in objective.model.named_parameters()]
    def average(): return [objective.teacher.model.state_dict()[name] for name in names]
    expected = [t.clone() for t in average()]
    for step in range(4):
        students = [p.detach().clone() for p in objective.model.parameters()]
        expected = [0.5 * e + 0.5 * p for e, p in zip(expected, students)]
        for piece in range(pieces): sum(objective(data.get(torch.arange(16) + 16 * piece)).values()).backward()
        torch.testing.assert_close(average(), expected)
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        assert any(not torch.equal(p, q) for p, q in zip(students, objective.model.parameters()))


# --- several processes

RUN = """
from test_self_distillation import RECIPE, SelfTeacher, fit, images

def run():
    torch.manual_seed(0)  # a network without batch statistics, which each process takes from its own part
    student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    data = images().unlabelled(torch.arange(20))
    objective = SelfTeacher(student, data, momentum=0.8)
    losses = fit(objective, data, replace(RECIPE, steps=6), device='cpu', progress=False).losses
    average = torch.cat([p.flatten() for p in objective.teacher.parameters()])[::100].tolist()
    return losses, objective.centre.tolist(), average
"""


def test_two_processes_follow_the_same_average_and_centre_as_one(tmp_path):
    one, two = alone_and_together(RUN, tmp_path)
    assert (one[0], two[0]) == (1, 2) and max(map(abs, one[2])) > 0
    for name in one[1]: assert two[1][name] == pytest.approx(one[1][name], rel=1e-3, abs=1e-5)
    assert [two[2], two[3]] == [pytest.approx(values, rel=1e-3, abs=1e-5) for values in one[2:]]


class Auxiliary(nn.Module):
    "A second head, declared last, that answers in training only."
    def __init__(self):
        super().__init__()
        self.layer1, self.layer2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.fc, self.rot = nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x):
        features = self.layer2(self.layer1(x)).mean((2, 3))
        return (self.fc(features), self.rot(features)) if self.training else self.fc(features)


def test_a_last_linear_layer_that_does_not_run_is_named():
    with pytest.raises(ValueError, match="the last linear layer of the model must be its head and run .* but is 'rot'"):
        BeYourOwnTeacher(Auxiliary(), shape=(1, 8, 8))


def test_born_again_refuses_a_network_in_place_of_what_makes_one():
    with pytest.raises(ValueError, match="make_student must be a function .*copy.deepcopy.*'WideResNet'"):
        born_again(wrn_16_1(10), digits().train, Recipe(steps=1))
