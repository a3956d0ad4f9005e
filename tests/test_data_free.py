"""Distilling without data: the equations, who gets which gradient, and runs that survive a kill."""
import copy, math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from distill_nb.files import fingerprint
from distill_nb.rows import UNLABELLED
from distill_nb.losses import kd_loss
from distill_nb.views import CropFlip
from distill_nb.protocol import Data
from distill_nb.data import ImageData
from distill_nb.models import resnet20, resnet8
from distill_nb.contract import Teacher
from distill_nb.history import Checkpoint
from distill_nb.training import Objective, Recipe, Setup, Supervised, evaluate, fit, predict
from distill_nb.inversion import (DeepInversion, GlassTeacher, InversionWeights, Noise, PixelRange, _as_constant,
                                  _channels, bn_layers, competition, invert, statistics_distance, total_variation)
from distill_nb.data_free import (DataFree, Distilled, Generator, GeneratorWeights, Pictures, _joined, dafl_losses,
                                  distill_without_data)

CLASSES, SIDE = 3, 4
RECIPE = Recipe(steps=12, batch_size=8, optimizer='adamw', lr=0.01, weight_decay=0.01, precision='float32')
PIXELS = Recipe(steps=8, optimizer='adam', lr=0.1, weight_decay=0.)
QUICK = dict(progress=False, device='cpu')
SETUP = Setup(**QUICK)


def images(n=60, seed=0, classes=CLASSES):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.randint(0, 60, (n, 1, SIDE, SIDE), generator=g) + 60 * y.view(-1, 1, 1, 1)
    return ImageData(x.to(torch.uint8), y, list('abc')[:classes], augment=CropFlip())


def net(outputs=CLASSES, width=6, seed=0, norm=True, channels=1):
    torch.manual_seed(seed)
    bn = [nn.BatchNorm2d(width)] if norm else []
    conv, head = nn.Conv2d(channels, width, 3, padding=1), nn.Linear(width * 4, outputs)
    return nn.Sequential(conv, *bn, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), head)


class Twice(nn.Module):
    def forward(self, x): return x, x


class Nothing(nn.Module):
    def forward(self, x): return {1, 2}


@pytest.fixture
def teacher():
    "A teacher whose running statistics are not those of a new layer."
    model = net(width=8)
    with torch.no_grad():
        for b in range(5): model(images(seed=b).get(torch.arange(60)).x)
    return model.eval()


def made(teacher, seed=0, **settings):
    student = net(seed=seed + 1)
    torch.manual_seed(seed)
    return DataFree(student, teacher, Generator(SIDE, noise=5, width=4), **{'memory': 64, 'replay': 16} | settings)


def sized(model, **clauses): return Teacher(model, **{'size': SIDE} | clauses)


def noise(n=96, seed=0): return Noise(n, 5, CLASSES, seed)


# --- the equations, against loops in float64

def softmax(row):
    top = max(row)
    e = [math.exp(v - top) for v in row]
    return [v / sum(e) for v in e]


@pytest.mark.parametrize('shape', [(7, 3, 4, 4), (5, 6), (1, 2, 3, 3), (1, 4)])
def test_the_statistics_distance_is_the_sum_of_two_norms_per_layer(shape):
    g = torch.Generator().manual_seed(0)
    total, inputs, layers = 0., [], []
    for _ in range(2):
        x = torch.randn(shape, generator=g)
        layer = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1])
        layer.running_mean.normal_(generator=g)
        layer.running_var.uniform_(0.5, 2, generator=g)
        means, variances = [], []
        for c in range(shape[1]):
            values = x[:, c].flatten().double().tolist()
            m = sum(values) / len(values)
            means.append(m - layer.running_mean[c].item())
            variances.append(sum((v - m)**2 for v in values) / len(values) - layer.running_var[c].item())
        total += math.sqrt(sum(d * d for d in means)) + math.sqrt(sum(d * d for d in variances))
        inputs.append(x)
        layers.append(layer)
    assert statistics_distance(inputs, layers).item() == pytest.approx(total, rel=1e-5)


def test_matching_statistics_have_no_distance_and_a_finite_gradient():
    x = torch.randn(6, 2, 3, 3, requires_grad=True)
    layer = nn.BatchNorm2d(2)
    layer.running_mean, layer.running_var = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), unbiased=False)
    distance = statistics_distance([x], [layer])
    distance.backward()
    assert distance.item() < 1e-5 and x.grad.isfinite().all()
    for same in (torch.zeros(4, 2, 3, 3), torch.ones(1, 2)):  # constant features, a batch of one
        same.requires_grad_()
        statistics_distance([same], [nn.BatchNorm2d(2)]).backward()
        assert same.grad.isfinite().all()


def test_total_variation_is_the_mean_of_norms_of_differences():
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    total = 0.
    for image in x:
        for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
            square = 0.
            for c in range(2):
                for i in range(4):
                    for j in range(5):
                        if not (0 <= i + down < 4 and 0 <= j + right < 5): continue
                        square += (image[c, i + down, j + right] - image[c, i, j]).item()**2
            total += math.sqrt(square) / 3
    assert total_variation(x).item() == pytest.approx(total)
    flat = torch.zeros(2, 1, 3, 3, requires_grad=True)
    total_variation(flat).backward()
    assert flat.grad.isfinite().all()


def test_the_competition_is_one_minus_jensen_shannon():
    z, v = torch.randn(5, 4, dtype=torch.float64) * 2, torch.randn(5, 4, dtype=torch.float64) * 2
    total = 0.
    for a, b in zip(z.tolist(), v.tolist()):
        p, q = softmax(b), softmax(a)
        m = [(s + t) / 2 for s, t in zip(p, q)]
        kl = [sum(s * math.log(s / n) for s, n in zip(row, m)) for row in (p, q)]
        total += sum(kl) / 2 / 5
    assert competition(z, v).item() == pytest.approx(1 - total)
    assert competition(z, v).item() == pytest.approx(competition(v, z).item())
    assert competition(z, z).item() == pytest.approx(1)


def test_the_competition_pulls_on_both_networks_images():
    "Swapped arguments behind a clamp would leave no gradient."
    z, v = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    competition(z, v).backward()
    assert z.grad.abs().sum() > 0.01 and v.grad.abs().sum() > 0.01


def test_the_dafl_losses_are_the_papers():
    v, f = torch.randn(6, 4, dtype=torch.float64) * 3, torch.randn(6, 5, dtype=torch.float64)
    probabilities = [softmax(r) for r in v.tolist()]
    mean = [sum(p[c] for p in probabilities) / 6 for c in range(4)]
    found = dafl_losses(v, f)
    assert found['onehot'].item() == pytest.approx(sum(-math.log(max(p)) for p in probabilities) / 6)
    assert found['balance'].item() == pytest.approx(sum(m * math.log(m) for m in mean))
    assert found['activation'].item() == pytest.approx(-sum(abs(x) for r in f.tolist() for x in r) / 6)
    assert 'activation' not in dafl_losses(v)


@pytest.mark.parametrize('logits', [[[0., 0, 0]], [[1e4, 0, -1e4]] * 3, [[3e38, -3e38, 0]] * 2, [[0., 0, 0]] * 4,
                                    [[-1e30, 1e30, 0]]])
def test_the_losses_are_finite_at_the_extremes(logits):
    v = torch.tensor(logits, requires_grad=True)
    loss = sum(dafl_losses(v, v).values()) if max(map(max, logits)) < 1e38 else sum(dafl_losses(v).values())
    loss.backward()
    assert loss.isfinite() and v.grad.isfinite().all()


def test_the_balance_is_best_where_classes_are_used_alike():
    even, uneven = torch.eye(4) * 50, torch.eye(4)[[0, 0, 0, 1]] * 50
    assert dafl_losses(even)['balance'].item() == pytest.approx(-math.log(4), abs=1e-5)
    assert dafl_losses(uneven)['balance'] > -math.log(4) + 0.5


# --- the glass teacher

@pytest.mark.parametrize('training', [False, True])
def test_gradients_pass_through_glass_and_leave_nothing(teacher, training):
    teacher[0].weight.grad = torch.ones_like(teacher[0].weight)  # of a training that was interrupted
    before = fingerprint(teacher.state_dict())
    glass = GlassTeacher(teacher)
    glass.train()
    teacher.train(training)
    teacher[1].eval()
    modes = [m.training for m in teacher.modules()]
    x = torch.randn(5, 1, SIDE, SIDE, requires_grad=True)
    look = glass.look(x)
    (look.distance + look.logits.square().sum() + look.features.sum()).backward()
    assert x.grad.abs().sum() > 0 and all(p.requires_grad for p in teacher.parameters())
    assert (teacher[0].weight.grad == 1).all() and all(p.grad is None for p in list(teacher.parameters())[1:])
    assert fingerprint(teacher.state_dict()) == before and [m.training for m in teacher.modules()] == modes
    assert not any(m._forward_pre_hooks for m in teacher.modules())
    assert not list(glass.parameters()) and not glass.state_dict()
    assert torch.equal(look.logits, teacher.eval()(x)) and look.features.shape == (5, 32)


def test_glass_is_as_the_teacher_behind_it(teacher):
    x, clauses = torch.randn(5, 1, SIDE, SIDE), dict(classes=['x', 'y', 'z'], mean=[0.5], std=[0.2], size=SIDE)
    plain = Teacher(teacher, **clauses)
    assert GlassTeacher(plain).fingerprint() == plain.fingerprint() != GlassTeacher(teacher).fingerprint()
    for t in (Teacher(nn.Sequential(teacher, nn.Softmax(1)), outputs='probabilities'),
              Teacher(nn.Sequential(teacher, Twice()), read=lambda out: -out[1]), plain):
        assert torch.allclose(GlassTeacher(t).look(x).logits, t.answers(x)) and GlassTeacher(t).look(x).distance > 0
    half = copy.deepcopy(teacher).bfloat16()
    assert torch.equal(GlassTeacher(half).look(x).logits, Teacher(half).answers(x).float())


def test_hooks_of_the_teachers_owner_fire_behind_glass(teacher):
    heard = []
    teacher[2].register_forward_hook(lambda module, args, out: heard.append(out))
    GlassTeacher(teacher).look(torch.randn(2, 1, SIDE, SIDE))
    assert len(heard) == 1 and heard[0].shape == (2, 8, SIDE, SIDE)


def test_nothing_is_changed_in_what_an_objective_is_given(teacher):
    student, labels = net(seed=3).train(), torch.arange(6) % CLASSES
    teacher.train()
    teacher[0].weight.requires_grad_(False)
    state = lambda: [(fingerprint(m.state_dict()), [part.training for part in m.modules()],
                      [(p.requires_grad, p.grad) for p in m.parameters()]) for m in (teacher, student)]
    before = state()
    o = DeepInversion(sized(teacher), labels, student, compete=1.)
    sum(o(Noise(6, 1, CLASSES).get(torch.arange(6))).values()).backward()
    torch.manual_seed(0)
    DataFree(student, teacher, Generator(SIDE, noise=5, width=4), memory=64, replay=16)
    assert state() == before


@pytest.mark.parametrize('method', ['generator', 'inversion'])
def test_a_network_that_taught_can_be_trained_afterwards(teacher, method):
    teacher.train()
    run(method, teacher, None)
    assert all(m.training for m in teacher.modules()) and all(p.requires_grad for p in teacher.parameters())
    before = [p.clone() for p in teacher.parameters()]
    fit(Supervised(teacher), images(), RECIPE, **QUICK)
    assert all((p != q).any() for p, q in zip(teacher.parameters(), before))


def test_hooks_are_gone_after_an_error(teacher):
    with pytest.raises(ValueError, match=r'does not take inputs of shape \(3, 4, 4\): .*1 channels'):
        GlassTeacher(teacher).look(torch.zeros(1, 3, SIDE, SIDE))
    assert not any(m._forward_pre_hooks for m in teacher.modules())


def test_layers_without_running_statistics_do_not_count(teacher):
    assert len(bn_layers(teacher)) == 1
    assert bn_layers(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3))) == []
    assert GlassTeacher(net(norm=False)).look(torch.randn(2, 1, 4, 4)).distance is None


def test_a_constant_student_gets_no_gradient_and_keeps_its_buffers():
    student = net().train()
    before = fingerprint(student.state_dict())
    x = torch.randn(5, 1, 4, 4, requires_grad=True)
    _as_constant(student, x).square().sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in student.parameters())
    assert fingerprint(student.state_dict()) == before
    assert torch.allclose(_as_constant(student, x), student(x), atol=1e-6)


# --- noise

def test_noise_is_a_function_of_seed_index_and_view():
    a, i, v = noise(), torch.tensor([3, 90, 3]), torch.tensor([7, 1, 8])
    assert a.get(i, v).x.shape == (3, 5) and (a.get(i, v).y == UNLABELLED).all()
    x = a.get(i, v).x
    assert torch.equal(x, noise().get(i, v).x) and torch.equal(a.get(i.flip(0), v.flip(0)).x, x.flip(0))
    assert not torch.equal(x[0], x[2]) and not torch.equal(noise(seed=1).get(i, v).x, x)
    others = noise(seed=1), noise(97), Noise(96, 6, CLASSES), Noise(96, 5, ['x', 'y', 'z'])
    assert len({n.fingerprint() for n in (noise(), *others)}) == 5
    assert others[-1].fingerprint(labels=False) == noise().fingerprint(labels=False) != others[0].fingerprint(False)
    assert torch.equal(torch.cat([b.x for b in a.batches(10)]), a.get(torch.arange(96)).x)


def test_noise_is_normal():
    from scipy.stats import kstest
    x = Noise(4000, 5, CLASSES).get(torch.arange(4000)).x
    assert kstest(x.flatten().numpy(), 'norm').pvalue > 0.01 and x.isfinite().all()
    assert (torch.corrcoef(x.T) - torch.eye(5)).abs().max() < 0.06


def test_what_has_no_labels_is_a_data_set(teacher):
    pictures = Pictures(torch.zeros(4, 1, SIDE, SIDE), list('xyz'))
    for data, names in ((noise(), ['0', '1', '2']), (pictures, list('xyz'))):
        assert isinstance(data, Data) and not isinstance(data, ImageData) and data.measures == ()
        assert data.labelled.shape == (len(data),) and not data.labelled.any() and data.classes == names
        with pytest.raises(ValueError, match='must have a label for every item'): evaluate(teacher, data)


def test_every_epoch_has_new_noise():
    a = noise()
    v = [a.view_of(0, e, torch.arange(96)) for e in (0, 1)]
    assert (v[0] != v[1]).all() and min(t.min() for t in v) >= 0


# --- DeepInversion

def test_inversion_brings_the_statistics_nearer_and_leaves_the_teacher(teacher):
    before = fingerprint(teacher.state_dict())
    recipe = Recipe(steps=60, optimizer='adam', lr=0.2, weight_decay=0., precision='float32')
    x, history = invert(sized(teacher), torch.arange(24) % CLASSES, recipe, setup=SETUP)
    falls = history.losses['statistics']
    assert falls[-1] < 0.5 * falls[0] and x.shape == (24, 1, SIDE, SIDE) and not x.requires_grad
    assert fingerprint(teacher.state_dict()) == before


def test_the_parts_of_inversion_are_the_equation(teacher):
    student, labels = net(seed=3), torch.arange(6) % CLASSES
    weights = dict(onehot=2., statistics=3., variation=5., norm=7., compete=11.)
    o = DeepInversion(sized(teacher), labels, student, **weights)
    index = torch.tensor([4, 1, 0, 2])
    parts = o(Noise(6, 1, CLASSES).get(index))
    x = o.images()[index]
    logits = teacher(x)
    sure = [-math.log(softmax(r)[l]) for r, l in zip(logits.tolist(), labels[index].tolist())]
    lengths = [math.sqrt(sum(v * v for v in r)) for r in x.flatten(1).tolist()]
    distance = statistics_distance([teacher[0](x)], [teacher[1]])
    expected = {'onehot': sum(sure) / 4, 'norm': sum(lengths) / 4, 'variation': total_variation(x).item(),
                'statistics': distance.item(), 'compete': competition(student.eval()(x), logits).item()}
    for name, w in weights.items(): assert parts[name].item() == pytest.approx(w * expected[name], rel=1e-4), name
    plain = DeepInversion(sized(teacher), labels)(Noise(6, 1, CLASSES).get(index))
    assert list(plain) == ['onehot', 'statistics', 'variation', 'norm']


def test_the_rival_is_a_copy(teacher):
    student = net(seed=3).train()
    o = DeepInversion(sized(teacher), torch.arange(6) % CLASSES, student, compete=1.)
    o(Noise(6, 1, CLASSES).get(torch.arange(6)))['compete'].backward()
    assert student.training and all(p.requires_grad and p.grad is None for p in student.parameters())
    assert o.model.raw.grad.abs().sum() > 0
    assert [n for n, _ in o.named_parameters()] == ['model.raw']
    competes = lambda: o(Noise(6, 1, CLASSES).get(torch.arange(6)))['compete']
    before = competes()
    with torch.no_grad(): student[-1].bias.add_(torch.tensor([3., 0., 0.]))
    assert torch.equal(competes(), before)  # the student learns on; its rival stays


def test_kept_images_do_not_change_with_the_next_step(teacher):
    o = DeepInversion(sized(teacher), torch.arange(6) % CLASSES)
    kept = o.images()
    before = kept.clone()
    with torch.no_grad(): o.model.raw.add_(1)
    assert torch.equal(kept, before) and not torch.equal(o.images(), before)


def test_pixels_stay_in_the_range_of_the_normalisation():
    r = PixelRange([0.25, 0.5], [0.5, 0.25])
    x = r(torch.tensor([-1e4, 1e4]).view(2, 1, 1, 1).expand(2, 2, 1, 1)).flatten(1)
    assert torch.allclose(x, torch.tensor([[-0.5, -2.], [1.5, 2.]]))
    assert PixelRange()(x) is x
    g = Generator(8, mean=[0.3], std=[0.4])
    y = g(torch.randn(50, 64) * 10)
    assert -0.75 <= y.min() and y.max() <= 1.75


# --- generator and student

def test_each_loss_reaches_its_own_weights(teacher):
    o = made(teacher, activation=0.1)
    batch = noise().get(torch.arange(8))
    for name in o(batch):
        o.zero_grad()
        before = fingerprint(o.model.state_dict())
        o(batch)[name].backward()
        moved = lambda m: sum(p.grad.abs().sum() for p in m.parameters() if p.grad is not None) > 0
        got = [bool(moved(m)) for m in (o.model, o.generator)]
        assert got == [name == 'student', name != 'student'], name
        assert all(p.grad is None for p in teacher.parameters())
        assert before != fingerprint(o.model.state_dict())  # the student's pass counts in its batch norm


def test_the_students_batch_norm_counts_one_pass_per_step(teacher):
    o = made(teacher)
    bn = bn_layers(o.model)[0]
    for n in (1, 2):
        o(noise().get(torch.arange(8)))
        assert bn.num_batches_tracked.item() == n


def test_the_sum_has_the_gradients_that_separate_training_would_have(teacher):
    o, batch = made(teacher), noise().get(torch.arange(8))
    twin = copy.deepcopy(o)
    twin.teacher = o.teacher
    torch.manual_seed(0)
    sum(o(batch).values()).backward()
    torch.manual_seed(0)
    losses = twin(batch)
    of_generator = sum(l for k, l in losses.items() if k != 'student')
    for loss, part in ((losses['student'], twin.model), (of_generator, twin.generator)):
        loss.backward(inputs=list(part.parameters()), retain_graph=True)
    for (name, p), q in zip(o.named_parameters(), twin.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-7), name


def test_the_teacher_is_bitwise_unchanged_and_generator_and_student_train(teacher):
    o = made(teacher)
    before = [fingerprint(m.state_dict()) for m in (teacher, o.model, o.generator)]
    teacher.train()
    fit(o, noise(), RECIPE, images(), **QUICK)
    after = [fingerprint(m.state_dict()) for m in (teacher, o.model, o.generator)]
    assert [a == b for a, b in zip(before, after)] == [True, False, False]
    assert all(m.training for m in teacher.modules())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad for p in o.model.parameters())


def test_the_memory_is_a_ring(teacher):
    o = made(teacher, memory=10)
    for k in range(3): o.remember(torch.full((4, 1, SIDE, SIDE), float(k)), torch.full((4, CLASSES), float(k)))
    first = o.images[:, 0, 0, 0]
    assert o.count == 12 and first.tolist() == [2, 2, 0, 0, 1, 1, 1, 1, 2, 2] and torch.equal(first, o.answers[:, 0])
    o.remember(torch.full((25, 1, SIDE, SIDE), 9.), torch.full((25, CLASSES), 9.))
    assert (o.images == 9).all()
    fresh = made(teacher, memory=10)
    fresh.remember(torch.ones(2, 1, SIDE, SIDE), torch.ones(2, CLASSES))
    images, _ = fresh.recall()
    assert (images == 1).all() and images.shape == (16, 1, SIDE, SIDE)  # never an empty place


def test_nothing_is_remembered_in_eval_mode(teacher):
    o = made(teacher).eval()
    before = fingerprint(o.state_dict())
    o(noise().get(torch.arange(8)))
    assert fingerprint(o.state_dict()) == before


def test_evaluation_knows_nothing_of_the_losses(teacher):
    o = made(teacher)
    row = fit(o, noise(), RECIPE, images(), **QUICK).last
    e = evaluate(o.model, images())
    assert (row['accuracy'], row['valid_loss']) == (e.accuracy, e.loss)


def test_a_batch_of_one_and_of_equal_noise_is_finite(teacher):
    o = made(teacher, activation=0.1).train()
    same = noise().get(torch.zeros(4, dtype=torch.long))
    losses = o(same)
    sum(losses.values()).backward()
    assert all(l.isfinite() for l in losses.values()) and all(p.grad.isfinite().all() for p in o.parameters())
    one = made(teacher).eval()
    losses = one(noise().get(torch.tensor([0])))
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in one.parameters() if p.grad is not None)


# --- kill and resume

def run(method, teacher, folder, resume=False, steps=30, seed=0, **more):
    student = net(seed=5)
    settings = {'generator': dict(noise=5, width=4, memory=64, replay=16),
                'inversion': dict(rounds=2, images=12, inversion=PIXELS)}[method]
    recipe, setup = replace(RECIPE, steps=steps, seed=seed), replace(SETUP, folder=folder, resume=resume)
    result = distill_without_data(sized(teacher), student, method, recipe, setup=setup, **settings, **more)
    return fingerprint(student.state_dict()), result


@pytest.mark.parametrize('method', ['generator', 'inversion'])
def test_a_run_is_a_function_of_its_seed_and_disturbs_no_random_numbers(teacher, method):
    torch.manual_seed(9)
    a = run(method, teacher, None)
    torch.manual_seed(9)
    drawn = torch.rand(1)
    torch.manual_seed(9)
    run(method, teacher, None)
    b = run(method, teacher, None)
    assert a[0] == b[0] != run(method, teacher, None, seed=1)[0] and torch.equal(a[1].images, b[1].images)
    assert isinstance(a[1], Distilled) and a[1].images.shape[1:] == (1, SIDE, SIDE)


class Imitate(Objective):
    "The soft loss alone, and nothing around it."
    def __init__(self, student, teacher, temperature):
        super().__init__(student)
        self.teacher, self.temperature = teacher, temperature

    def forward(self, batch): return {'student': kd_loss(self.model(batch.x), self.teacher(batch), self.temperature)}


def test_inversion_trains_by_the_soft_loss_alone_bit_for_bit(teacher, monkeypatch):
    "`Distill` without labels and without an exam is plain imitation, and what is always 0 is not told."
    from distill_nb import data_free
    asked = []
    def imitate(student, teacher, temperature, alpha, examine):
        asked.append((temperature, alpha, examine))
        return Imitate(student, teacher, temperature)
    def part(history, seconds): return history
    settings = dict(temperature=3., valid=images())
    fast = run('inversion', teacher, None, **settings)
    monkeypatch.setattr(data_free, 'Distill', imitate)
    monkeypatch.setattr(data_free, '_part', part)
    plain = run('inversion', teacher, None, **settings)
    assert asked == [(3., 1, False)] * 2 and fast[0] == plain[0] and torch.equal(fast[1].images, plain[1].images)
    new, old = fast[1].history, plain[1].history
    assert new.losses == {'soft': old.losses['student']}
    assert [r['accuracy'] for r in new.rows] == [r['accuracy'] for r in old.rows]
    assert [r['soft'] for r in new.rows] == [r['student'] for r in old.rows] and not any('hard' in r for r in new.rows)


class Stop(Exception): pass


@pytest.mark.parametrize('method,name,at', [('generator', 'DataFree', 210), ('inversion', 'Distill', 110),
                                            ('inversion', 'DeepInversion', 10)])
def test_a_stopped_run_resumes_to_the_same_weights(teacher, tmp_path, monkeypatch, method, name, at):
    from distill_nb import data_free, inversion
    steps = 300
    whole = run(method, teacher, tmp_path/'whole', steps=steps)
    cls, seen = getattr(inversion if name == 'DeepInversion' else data_free, name), [0]
    forward = cls.forward
    def stops(self, batch):
        seen[0] += 1
        if seen[0] > at: raise Stop
        return forward(self, batch)
    monkeypatch.setattr(cls, 'forward', stops)
    for module in (data_free, inversion):  # a checkpoint at every reading of the losses
        monkeypatch.setattr(module, 'fit', partial(fit, save_every=0.))
    with pytest.raises(Stop): run(method, teacher, tmp_path/'stopped', steps=steps)
    monkeypatch.setattr(cls, 'forward', forward)
    assert list((tmp_path/'stopped').rglob('checkpoint.safetensors'))
    resumed = run(method, teacher, tmp_path/'stopped', resume=True, steps=steps)
    assert resumed[0] == whole[0] and torch.equal(resumed[1].images, whole[1].images)
    assert resumed[1].history.losses == whole[1].history.losses


def test_a_checkpoint_holds_generator_and_memory_and_knows_the_settings(teacher, tmp_path):
    fit(made(teacher), noise(), RECIPE, folder=tmp_path, **QUICK)
    tensors, _ = Checkpoint(tmp_path).read()
    assert tensors['objective.count'] == 96 and 'objective.images' in tensors
    assert any(k.startswith('objective.generator.') for k in tensors)
    again = dict(recipe=RECIPE, folder=tmp_path, resume=True, **QUICK)
    for other in (dict(temperature=3.), dict(balance=4.), dict(adversarial=0.), dict(replay=8)):
        with pytest.raises(ValueError, match='another objective'): fit(made(teacher, **other), noise(), **again)
    with pytest.raises(ValueError, match='another data'): fit(made(teacher), noise(seed=1), **again)


# --- no data

@pytest.mark.parametrize('method', ['generator', 'inversion'])
def test_no_data_set_is_read(teacher, monkeypatch, method):
    def read(*args): raise AssertionError('a data set was read')
    for name in ('get', 'batches', 'stream', 'pixels', 'view_of', 'fingerprint'):
        monkeypatch.setattr(ImageData, name, read)
    run(method, teacher, None)


@pytest.mark.parametrize('method', ['generator', 'inversion'])
def test_the_validation_split_measures_and_teaches_nothing(teacher, method):
    a, b = run(method, teacher, None), run(method, teacher, None, valid=images())
    assert a[0] == b[0] and 'accuracy' in b[1].history.last and 'accuracy' not in a[1].history.last


def test_a_student_learns_without_data(teacher):
    student = net(seed=5)
    small = dict(noise=5, width=4, memory=256, replay=32)
    made = distill_without_data(sized(teacher), student, recipe=replace(RECIPE, steps=80), setup=SETUP, **small)
    assert made.history.losses['student'][-1] < made.history.losses['student'][0]


# --- other shapes and precisions

@pytest.mark.parametrize('method', ['generator', 'inversion'])
def test_residual_networks_for_colour_images_in_bf16(method):
    torch.manual_seed(0)
    teacher, student = resnet20(), resnet8()
    settings = {'generator': dict(noise=8, width=8, memory=32, replay=4),
                'inversion': dict(rounds=1, images=4, inversion=replace(PIXELS, steps=2))}[method]
    judge = Teacher(teacher, size=32, mean=[0.5] * 3, std=[0.25] * 3)
    before = fingerprint(teacher.state_dict())
    recipe = Recipe(steps=2, batch_size=4, optimizer='adamw', lr=1e-3, precision='bfloat16')
    r = distill_without_data(judge, student, method, recipe, setup=SETUP, **settings)
    assert r.images.shape[1:] == (3, 32, 32) and r.images.dtype == torch.float32
    assert all(math.isfinite(v) for l in r.history.losses.values() for v in l)
    assert fingerprint(teacher.state_dict()) == before


@pytest.mark.parametrize('size,channels', [(1, 1), (5, 3), (8, 1), (28, 1)])
def test_a_generator_makes_images_of_any_size(size, channels):
    assert Generator(size, channels, noise=3, width=4)(torch.randn(2, 3)).shape == (2, channels, size, size)


def test_the_objective_runs_under_the_compiler(teacher):
    o = made(teacher)
    batch = noise().get(torch.arange(8))
    torch.manual_seed(0)
    compiled = torch.compile(copy.deepcopy(o), backend='eager')
    compiled.teacher = o.teacher
    torch.manual_seed(0)
    a = compiled(batch)
    torch.manual_seed(0)
    b = o(batch)
    assert list(a) == list(b) and all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_pieces_of_a_batch_work(teacher):
    history = fit(made(teacher), noise(), replace(RECIPE, accumulate=2), **QUICK)
    assert len(history.losses['student']) == 12


# --- errors

def test_a_teacher_without_batch_norm_is_refused_or_taught_without(teacher):
    plain = net(norm=False)
    said = 'no batch-norm statistics.*statistics=0'
    with pytest.raises(ValueError, match=said): DeepInversion(sized(plain), torch.arange(3))
    for method in ('generator', 'inversion'):
        with pytest.raises(ValueError, match=said): run(method, plain, None)
        assert 'statistics' not in run(method, plain, None, statistics=0.)[1].history.losses


@pytest.mark.parametrize('bad,message', [
    (dict(method='magic'), "method must be one of generator, inversion, but is 'magic'"),
    (dict(channels=3), 'does not take inputs of shape'), (dict(channels=0), 'channels must be'),
    (dict(temperature=0.), 'temperature'), (dict(method='inversion', temperature=0.), 'temperature'),
    (dict(balance=-1.), 'balance must be'), (dict(memory=0), 'memory must be'), (dict(replay=2.5), 'replay must be'),
    (dict(adversarial=math.nan), 'adversarial must be'), (dict(folder='x'), 'the weights onehot.*were given folder'),
    (dict(method='inversion', balance=1.), 'the weights onehot.*were given balance'),
    (dict(onehot=0., balance=0., statistics=0., adversarial=0.), 'at least one of'),
    (dict(method='inversion', rounds=0), 'rounds must be'), (dict(method='inversion', images=2.5), 'images must be')])
def test_errors_come_before_training(teacher, bad, message, monkeypatch):
    from distill_nb import data_free, inversion
    def trains(*_, **__): raise AssertionError('training began')
    for module in (data_free, inversion): monkeypatch.setattr(module, 'fit', trains)
    student = net(seed=5)
    before = fingerprint(student.state_dict())
    given = dict(teacher=sized(teacher), student=student, recipe=RECIPE, setup=SETUP)
    with pytest.raises(ValueError, match=message): distill_without_data(**given | bad)
    assert fingerprint(student.state_dict()) == before


def test_wrong_models_and_data_are_refused(teacher):
    def distil(teacher, student, **more):
        return distill_without_data(sized(teacher), student, recipe=RECIPE, setup=SETUP, **more)
    differ = 'the student tells 5 classes apart, but the teacher 3'
    for way in (distil, run_inversion):
        with pytest.raises(ValueError, match=differ): way(teacher, net(5))
        with pytest.raises(ValueError, match='another module'): way(teacher, teacher)
    for data in (images(), Noise(9, 6, CLASSES)):
        with pytest.raises(ValueError, match='data must be Noise with dim=5'): fit(made(teacher), data, RECIPE, **QUICK)
    with pytest.raises(ValueError, match='channels must be given'): _channels(Teacher(nn.Linear(3, 3)))
    assert _channels(Teacher(nn.Linear(3, 3), mean=[0.1, 0.2, 0.3], std=[1.] * 3)) == 3
    assert _channels(Teacher(teacher)) == 1 and _channels(Teacher(teacher), 2) == 2
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    headless = nn.Sequential(nn.Conv2d(1, CLASSES, 3), nn.BatchNorm2d(CLASSES), pool)
    with pytest.raises(ValueError, match='activation must be 0'): distil(headless, net(), activation=0.1)
    with pytest.raises(ValueError, match="side of the generator's images must be 8, as the teacher says, but is 4"):
        fit(made(sized(teacher, size=8)), noise(), RECIPE, **QUICK)


def test_labels_that_are_none_of_the_teachers_are_refused(teacher):
    no_labels = [0, 1], torch.tensor([0., 1.]), torch.zeros(2, 2, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    others = torch.tensor([0, 3]), torch.tensor([-1, 2])
    for wrong, said in ((no_labels, 'a tensor of integers'), (others, 'integers from 0 to 2')):
        for labels in wrong:
            with pytest.raises(ValueError, match=f'labels must be {said}'): invert(sized(teacher), labels, setup=SETUP)


@pytest.mark.parametrize('n,bad,valid,said', [(3, dict(compete=1.), None, 'student must be given'),
                                              (3, dict(channels=2), None, 'does not take inputs of shape'),
                                              (3, {}, images(), 'valid must be None'),
                                              (2, {}, None, 'one index for each of the 2 images')])
def test_what_cannot_be_inverted_is_refused(teacher, n, bad, valid, said):
    with pytest.raises(ValueError, match=said):
        fit(DeepInversion(sized(teacher), torch.arange(n), **bad), Noise(3, 1, CLASSES), RECIPE, valid, **QUICK)


@pytest.mark.parametrize('last,said', [(nn.Identity(), 'what the teacher gives must be logits of shape'),
                                       (Nothing(), 'the teacher gives a set, in which no logits were found')])
def test_an_answer_that_is_no_logits_is_refused(last, said):
    odd = nn.Sequential(nn.Conv2d(1, CLASSES, SIDE), nn.BatchNorm2d(CLASSES), last)
    with pytest.raises(ValueError, match=said):
        distill_without_data(sized(odd), net(), recipe=RECIPE, setup=SETUP)
    with pytest.raises(ValueError, match='the student gives a set, in which no logits were found'):
        distill_without_data(sized(net()), nn.Sequential(net(), Nothing()), recipe=RECIPE, setup=SETUP)


def test_a_teacher_that_does_not_say_how_large_its_images_are_is_refused(teacher):
    said = r'teacher must say how large its images are.*Teacher\(model, size=32, mean=..., std=...\)'
    for no_size in (teacher, Teacher(teacher), Teacher(teacher, mean=[0.5], std=[0.2])):
        for ask in (lambda: distill_without_data(no_size, net()), lambda: invert(no_size, torch.arange(3)),
                    lambda: DeepInversion(no_size, torch.arange(3))):
            with pytest.raises(ValueError, match=said): ask()


@pytest.mark.parametrize('method', ['generator', 'inversion'])
def test_a_student_learns_what_its_teacher_means_and_is_measured_so(teacher, method):
    "Images in the teacher's form, its classes by their names, and what it gives is turned into logits."
    form = dict(mean=[0.4], std=[0.3], size=SIDE)
    wants = Teacher(nn.Sequential(teacher, nn.Softmax(1)), list('abc'), outputs='probabilities', **form)
    small = {'generator': dict(noise=5, width=4, memory=64, replay=16),
             'inversion': dict(rounds=1, images=12, inversion=PIXELS)}[method]
    other, student = images().replace(mean=[0.], std=[1.], size=2 * SIDE), net(seed=5)
    made = distill_without_data(wants, student, method, RECIPE, other, setup=SETUP, **small)
    low, high = (0 - 0.4) / 0.3, (1 - 0.4) / 0.3
    assert low <= made.images.min() and made.images.max() <= high
    assert made.history.last['valid_loss'] == evaluate(student, images().replace(**form)).loss
    own = Pictures(made.images, list('abc'), [0.4], [0.3])
    logits = teacher(made.images)
    assert torch.allclose(predict(wants, own), logits.log_softmax(1).clamp(min=math.log(1e-12)), atol=1e-5)
    with pytest.raises(ValueError, match='gives its items in one form, but a network wants its own mean, std'):
        predict(wants, Pictures(made.images, list('abc')))
    turned = Teacher(teacher, list('cba'), size=SIDE)
    with pytest.raises(ValueError, match='the classes of valid must be those of the teacher in their order'):
        distill_without_data(turned, net(), method, RECIPE, images(), setup=SETUP, **small)
    with pytest.raises(ValueError, match="the teacher's classes must be 3 names"):
        distill_without_data(sized(teacher, classes=list('ab')), net(), method, RECIPE, setup=SETUP, **small)


def test_a_teacher_that_answers_nan_is_refused_before_training(teacher):
    with torch.no_grad(): teacher[-1].bias[1] = math.nan
    said = 'the teacher gives logits that are not finite'
    for method in ('generator', 'inversion'):
        with pytest.raises(ValueError, match=said): run(method, teacher, None)
    with pytest.raises(ValueError, match=said): DeepInversion(sized(teacher), torch.arange(3))
    with pytest.raises(ValueError, match=said): made(teacher)


@pytest.mark.parametrize('index', [[24], [-1], [0.5], torch.ones(24).bool(), [[0, 1]], ['a'], 3, None])
def test_positions_that_are_none_are_refused(index):
    for data in (noise(24), Pictures(torch.randn(24, 1, SIDE, SIDE), CLASSES)):
        with pytest.raises(ValueError, match='index'): data.get(index)
        assert torch.equal(data.get([3, 0]).x, data.get(torch.tensor([3, 0])).x)
    with pytest.raises(ValueError, match='index and view must be of one shape'): noise().get([3, 0], [1])


def test_data_without_labels_are_made_of_what_can_be(teacher):
    x = torch.randn(6, 1, SIDE, SIDE)
    for make in (partial(Noise, 6, 5), partial(Pictures, x)):
        for classes in (0, -1, 2.5, True, 10**12, ['a', 'a'], 'abc'):
            with pytest.raises(ValueError, match='classes must be'): make(classes)
    for wrong in (x[0], x.long(), x[:0], [x]):
        with pytest.raises(ValueError, match='x must be'): Pictures(wrong, CLASSES)
    with pytest.raises(ValueError, match='given together'): Pictures(x, CLASSES, [0.5])
    with pytest.raises(ValueError, match="device must be one like 'cpu'"): noise().to('gpu')
    for bad, said in ((dict(mean=[0.5]*3, std=[0.5]*3), 'mean must be one number for each of the 1 channels'),
                      (dict(mean=[0.5], std=[0.5]*3), 'mean and std must be one number each'),
                      (dict(width=1), 'width')):
        with pytest.raises(ValueError, match=said): Generator(SIDE, **bad)


def test_what_measures_and_what_makes_pixels_is_what_it_should_be(teacher):
    distil = partial(distill_without_data, sized(teacher), net(), recipe=RECIPE, setup=SETUP)
    for wrong in ((images().x, images().y), 'valid', [images()]):
        with pytest.raises(ValueError, match='valid must be a data set'): distil(valid=wrong)
    with pytest.raises(ValueError, match='inversion must be a Recipe'): distil('inversion', inversion={'steps': 2})
    for wrong in (net(), nn.Identity()):
        with pytest.raises(ValueError, match='noise of generator must be a whole'): DataFree(net(), teacher, wrong)


@pytest.mark.parametrize('kind', [InversionWeights, GeneratorWeights])
def test_weights_are_values_that_are_checked_when_they_are_made(kind):
    names = list(vars(kind()))
    for name in names:
        for bad in (-1., math.nan, math.inf, '1'):
            with pytest.raises(ValueError, match=f'{name} must be'): kind(**{name: bad})
    with pytest.raises(ValueError, match='at least one of'): kind(**dict.fromkeys(names, 0.))
    with pytest.raises(AttributeError): kind().onehot = 2.


def test_an_objective_that_could_not_be_made_changes_nothing_either():
    fresh = net()
    for bad in (dict(compete=1.), dict(norm=-1.)):
        with pytest.raises(ValueError): DeepInversion(sized(fresh), torch.arange(3), **bad)
    for bad in (dict(temperature=0.), dict(balance=-1.)):
        with pytest.raises(ValueError): made(fresh, **bad)
    assert all(p.requires_grad for p in fresh.parameters()) and fresh.training


def run_inversion(teacher, student):
    settings = dict(rounds=1, images=6, inversion=Recipe(steps=2))
    return distill_without_data(sized(teacher), student, 'inversion', RECIPE, setup=SETUP, **settings)


def test_seconds_count_the_making_of_images(teacher, monkeypatch):
    def slow(*args, **kw):
        images, history = invert(*args, **kw)
        history.seconds += 1000
        return images, history
    monkeypatch.setattr('distill_nb.data_free.invert', slow)
    h = run('inversion', teacher, None)[1].history  # two rounds
    assert 1000 < h.rows[0]['seconds'] < 2000 < h.rows[-1]['seconds'] <= h.seconds < 3000


def test_joined_histories_go_on():
    from distill_nb.history import History
    def part():
        rows = [{'step': step, 'epoch': step / 2, 'seconds': step + 1., 'accuracy': 0.5} for step in (2, 4)]
        return History(rows, {'soft': [1., 2., 3., 4.]}, 6., measure=images().measures[0])
    whole = _joined([part(), part()])
    assert [r['step'] for r in whole.rows] == [2, 4, 6, 8] and [r['seconds'] for r in whole.rows] == [3, 5, 8, 10]
    assert [r['epoch'] for r in whole.rows] == [1, 2, 3, 4]
    assert whole.seconds == 12 and len(whole.losses['soft']) == 8 and whole.measure.name == 'accuracy'


def test_pictures_are_a_data_set_without_labels():
    x = torch.randn(5, 1, 4, 4)
    p = Pictures(x, CLASSES)
    batch = p.get(torch.tensor([3, 0]), torch.tensor([0, 0]))
    assert torch.equal(batch.x, x[[3, 0]]) and (p.y == UNLABELLED).all() and len(p) == 5
    assert p.to('cpu').fingerprint() == p.fingerprint() != Pictures(x + 1, CLASSES).fingerprint()
    named = Pictures(x, list('xyz'))
    assert named.fingerprint() != p.fingerprint() and named.fingerprint(labels=False) == p.fingerprint(labels=False)
    colour = Pictures(torch.randn(5, 3, 4, 4), CLASSES)
    for half, order in ((True, torch.channels_last), (False, torch.contiguous_format)):
        assert colour.arranged(colour.get(torch.arange(2)), half).x.is_contiguous(memory_format=order)


class HasUnused(nn.Module):
    "A network with layers that its forward pass does not reach."
    def __init__(self, layer):
        super().__init__()
        self.conv, self.unused = nn.Conv2d(1, 3, SIDE), layer

    def forward(self, x): return self.conv(x).flatten(1)


def test_layers_that_the_forward_pass_does_not_reach_are_no_guides():
    def distil(layer, **more):
        unused = HasUnused(nn.Identity())
        return distill_without_data(sized(HasUnused(layer)), unused, recipe=RECIPE, setup=SETUP, **more)
    with pytest.raises(ValueError, match='no batch-norm statistics'): distil(nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match='no batch-norm statistics'):
        invert(sized(HasUnused(nn.BatchNorm2d(4))), torch.arange(3), Recipe(steps=2))
    with pytest.raises(ValueError, match='activation must be 0'): distil(nn.Linear(4, 3), statistics=0., activation=0.1)


@pytest.mark.parametrize('bad,message', [
    (dict(method='inversion', compete=-1.), 'compete must be'),
    (dict(method='inversion', compete=math.nan), 'compete must be'),
    (dict(method='inversion', compete='1'), 'compete must be'), (dict(std=[0.]), 'std'),
    (dict(mean=[math.nan]), 'mean'), (dict(std=[-1.]), 'std'), (dict(noise=0), 'noise'), (dict(spread=0.), 'spread')])
def test_settings_that_could_never_work_are_refused(teacher, bad, message):
    clauses, student = {k: bad.get(k, [0.5]) for k in ('mean', 'std')}, net()
    settings, before = {k: v for k, v in bad.items() if k not in clauses}, fingerprint(student.state_dict())
    with pytest.raises(ValueError, match=message):
        distill_without_data(sized(teacher, **clauses), student, recipe=RECIPE, **settings)
    assert fingerprint(student.state_dict()) == before
