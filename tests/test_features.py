"""Feature distillation: each loss against its paper's equation in loops of float64, taps without a trace."""
import copy, itertools, math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from distill_nb.files import fingerprint
from distill_nb.rows import rows_there
from distill_nb.losses import hard_loss
from distill_nb.views import CropFlip
from distill_nb.protocol import Batch
from distill_nb.data import ImageData
from distill_nb.models import digit_student, digit_teacher, resnet18, resnet20, resnet8, wrn_16_1
from distill_nb.contract import Teacher
from distill_nb.history import Checkpoint
from distill_nb.training import Recipe, Supervised, evaluate, fit
from distill_nb.compare import Contender, compare
from distill_nb.logits import Distill
from distill_nb.taps import feature_shapes, head_input, listening, stage_names, tap
from distill_nb.features import (Adapter, AttentionTransfer, FeatureDistill, Hint, Relational, Term, _as_map,
                                 _resize_map, attention_loss, attention_map, hint_loss, rkd_angle_loss,
                                 rkd_distance_loss, stage_pairs)
from distill_nb.tokens import FEATURE_WEIGHTS, feature_method
from distill_nb.similarity import cka, layer_similarity, plot_attention, plot_similarity

from networks import bits, same as same_bits
from processes import alone_and_together
from tokens import speaker, text, trained_speaker

quick = settings(deadline=None, max_examples=12)
RECIPE = Recipe(steps=12, batch_size=16, optimizer='adamw', lr=0.01, precision='float32')
CLASSES = 3


def images(n=120, seed=0):
    "Bright, middle and dark noise: easy to tell apart."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    x = torch.randint(0, 60, (n, 1, 8, 8), generator=g) + 80 * y.view(-1, 1, 1, 1)
    return ImageData(x.to(torch.uint8), y, ['dark', 'middle', 'bright'], augment=CropFlip(1, True))


def student(seed=0):
    torch.manual_seed(seed)
    return digit_student(CLASSES)


@pytest.fixture(scope='module')
def teacher():
    torch.manual_seed(0)
    model = digit_teacher(CLASSES)
    fit(Supervised(model), images(), Recipe(steps=30, batch_size=32, lr=0.05, precision='float32'))
    return model


def terms():
    return {'hint': (Hint('layer2', 'layer2'), 100.),
            'attention': (AttentionTransfer(['layer1', 'layer2'], ['layer2', 'layer4']), 1000.),
            'relational': (Relational('fc:input', 'fc:input'), 1.)}


def weights(m): return fingerprint(m.state_dict())
def some(x): return Batch(x, *[torch.arange(len(x)) % CLASSES] * 3)
def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
def refused(said): return pytest.raises(ValueError, match=said)


# --- the equations, one number at a time

def draw(seed, *shape, scale=1.):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

def value_and_grad(loss, x):
    x = x.detach().clone().requires_grad_()
    out = loss(x)
    return out.detach(), torch.autograd.grad(out, x)[0]

def same(loss, reference, x, rtol=1e-7, atol=1e-10):
    "Same value and same gradient in float64; float32 within its own error."
    (a, ga), (b, gb) = value_and_grad(loss, x), value_and_grad(reference, x)
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    torch.testing.assert_close(ga, gb, rtol=rtol, atol=atol)
    assert a.dtype == torch.float64 and a.shape == ()
    torch.testing.assert_close(loss(x.float()).double(), b, rtol=1e-3, atol=1e-4)

def ref_hint(v, u):
    "Romero et al. 2015, eq. 3, as a mean over the batch."
    return sum(0.5 * sum((a - b)**2 for a, b in zip(x.flatten(), y.flatten())) for x, y in zip(v, u)) / len(v)

def ref_map(A, h, w):
    "Zagoruyko and Komodakis 2017: squares summed over the channels, averaged to h x w, over the norm; one image."
    C, H, W = A.shape
    Q = [[sum(A[c, i, j]**2 for c in range(C)) for j in range(W)] for i in range(H)]
    a, b = H // h, W // w
    Q = [sum(Q[i * a + k][j * b + l] for k in range(a) for l in range(b)) / (a * b) for i in range(h) for j in range(w)]
    norm = torch.sqrt(sum(q**2 for q in Q))
    return [q / norm for q in Q]

def ref_attention(s, t, squared):
    h, w = min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])
    total = 0.
    for a, b in zip(s, t):
        square = sum((x - y)**2 for x, y in zip(ref_map(a, h, w), ref_map(b, h, w)))
        total = total + (square / (h * w) if squared else torch.sqrt(square) / 2)
    return total / len(s)

def huber(a, b):
    d = abs(a - b)
    return 0.5 * d**2 if d <= 1 else d - 0.5

def length(a): return torch.sqrt(sum(v**2 for v in a))

def ref_distance(s, t):
    "Park et al. 2019, eq. 4 to 6, as a mean over pairs."
    def psi(x):
        d = {(i, j): length(x[i] - x[j]) for i in range(len(x)) for j in range(len(x)) if i != j}
        mu = sum(d.values()) / len(d)
        return {k: v / mu for k, v in d.items()}
    a, b = psi(s.flatten(1)), psi(t.flatten(1))
    return sum(huber(a[k], b[k]) for k in a) / len(a)

def ref_angle(s, t):
    "Park et al. 2019, eq. 7 and 8, as a mean over triples."
    def psi(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        return sum(p * q for p, q in zip(a / length(a), b / length(b)))
    triples = list(itertools.permutations(range(len(s)), 3))
    return sum(huber(psi(s.flatten(1), *n), psi(t.flatten(1), *n)) for n in triples) / len(triples)

shape = dict(seed=st.integers(0, 2**31), B=st.integers(3, 4), C=st.integers(1, 3),
             scale=st.sampled_from([0.1, 1., 30.]))


@quick
@given(**shape)
def test_the_hint_loss_is_the_papers(seed, B, C, scale):
    v, u = draw(seed, B, C, 2, 2, scale=scale), draw(seed + 1, B, C, 2, 2)
    same(lambda v: hint_loss(v, u), lambda v: ref_hint(v, u), v)
    torch.testing.assert_close(hint_loss(v, u, 'mean') * 4 * C / 2, hint_loss(v, u))
    torch.testing.assert_close(hint_loss(v, u, 'mean'), F.mse_loss(v, u))


@quick
@given(student=st.sampled_from([(2, 4), (4, 4), (4, 2)]), squared=st.booleans(), **shape)
def test_the_attention_loss_is_the_papers(student, squared, seed, B, C, scale):
    s, t = draw(seed, B, C, *student, scale=scale), draw(seed + 1, B, C + 2, 2, 4)
    reduction = 'mean' if squared else 'batchmean'
    same(lambda s: attention_loss(s, t, reduction), lambda s: ref_attention(s, t, squared), s, atol=1e-9)


@quick
@given(**shape)
def test_the_relations_are_the_papers(seed, B, C, scale):
    s, t = draw(seed, B, C, 2, scale=scale), draw(seed + 1, B, 5)
    same(lambda s: rkd_distance_loss(s, t), lambda s: ref_distance(s, t), s)
    same(lambda s: rkd_angle_loss(s, t), lambda s: ref_angle(s, t), s, rtol=1e-6)


def test_the_huber_loss_is_linear_far_away():
    s, t = (torch.tensor([[0.], [1.], [far]], dtype=torch.float64) for far in (1e4, 1.5))
    s = torch.cat([s, s[:1] + 2], 0)
    t = torch.cat([t, t[:1] - 40], 0)
    relative = lambda x: (x - x.T).abs() / ((x - x.T).abs().sum() / 12)
    assert ((relative(s) - relative(t)).abs() > 1).any()
    torch.testing.assert_close(rkd_distance_loss(s, t), ref_distance(s, t))


def ref_cka(x, y):
    "Kornblith et al. 2019, section 3, as written, by loops."
    def centred(a):
        n, p = a.shape
        return [[a[i, j] - sum(a[k, j] for k in range(n)) / n for j in range(p)] for i in range(n)]
    def column(a, p): return [row[p] for row in a]
    def dot(a, b): return sum(x * y for x, y in zip(a, b))
    def frobenius(a, b):
        places = itertools.product(range(len(a[0])), range(len(b[0])))
        return sum(dot(column(a, p), column(b, q))**2 for p, q in places)
    x, y = centred(x.tolist() and x), centred(y)
    return frobenius(y, x) / (frobenius(x, x)**0.5 * frobenius(y, y)**0.5)


@quick
@given(seed=st.integers(0, 1000), n=st.integers(3, 6))
def test_cka_is_the_papers_and_ignores_rotation_scale_and_shift(seed, n):
    x, y = draw(seed, n, 3), draw(seed + 1, n, 4)
    assert cka(x, y) == pytest.approx(ref_cka(x, y).item(), rel=1e-8)
    rotation = torch.linalg.qr(draw(seed + 2, 4, 4))[0]
    assert cka(x, -7 * y @ rotation + 5) == pytest.approx(cka(x, y)) == pytest.approx(cka(y, x))
    assert cka(x, x) == pytest.approx(1) and 0 <= cka(x, y) <= 1 and cka(x, torch.ones(n, 2)) == 0


# --- their laws

@quick
@given(seed=st.integers(0, 1000), factor=st.floats(1e-3, 1e3))
def test_invariances(seed, factor):
    s, t = draw(seed, 5, 4, 4, 4), draw(seed + 1, 5, 6, 4, 4)
    for reduction in ('batchmean', 'mean'):
        other = factor * s[:, torch.randperm(4)]
        torch.testing.assert_close(attention_loss(other, -t, reduction), attention_loss(s, t, reduction))
    rotation = torch.linalg.qr(draw(seed + 2, 64, 64))[0]
    moved = factor * s.flatten(1) @ rotation - 3
    for loss in (rkd_distance_loss, rkd_angle_loss):
        torch.testing.assert_close(loss(moved, t), loss(s, t))
        torch.testing.assert_close(loss(s, moved), torch.zeros_like(loss(s, t)), atol=1e-9, rtol=0)
        order = torch.randperm(5)
        torch.testing.assert_close(loss(s[order], t[order]), loss(s, t))


PAIR_LOSSES = {'hint': hint_loss, 'hint mean': lambda s, t: hint_loss(s, t, 'mean'),
               'attention': attention_loss, 'attention mean': lambda s, t: attention_loss(s, t, 'mean'),
               'distance': rkd_distance_loss, 'angle': rkd_angle_loss}
every_loss = pytest.mark.parametrize('loss', PAIR_LOSSES.values(), ids=PAIR_LOSSES)


@every_loss
def test_a_student_like_the_teacher_has_no_loss_and_no_gradient(loss):
    x = draw(0, 6, 3, 4, 4).float()
    value, grad = value_and_grad(lambda s: loss(s, x), x)
    assert abs(value) < 1e-6 and grad.abs().max() < 1e-6
    assert loss(draw(1, 6, 3, 4, 4), x) > 0


@every_loss
@pytest.mark.parametrize('case', ['one image', 'two images', 'duplicates', 'all alike', 'zeros', 'teacher constant',
                                  'huge', 'tiny', 'far from 0', 'half', 'bfloat16', 'nearly alike'])
def test_losses_and_gradients_are_finite(loss, case):
    s, t = draw(0, 8, 3, 2, 2).float(), draw(1, 8, 3, 2, 2).float()
    if case == 'one image': s, t = s[:1], t[:1]
    if case == 'two images': s, t = s[:2], t[:2]
    if case == 'duplicates': s[1], s[2], t[5], t[2] = s[0], s[0], t[4], t[0]
    if case == 'all alike': s, t = s[:1].expand(8, -1, -1, -1), t[:1].expand(8, -1, -1, -1)
    if case == 'zeros': s = torch.zeros_like(s)
    if case == 'teacher constant': t = torch.ones_like(t)
    if case == 'huge': s, t = 1e15 * s, 1e15 * t
    if case == 'tiny': s, t = 1e-25 * s, 1e-38 * t
    if case == 'far from 0': s = s + 1e6
    if case == 'half': s, t = (3e4 * torch.tanh(x) for x in (s, t)); s, t = s.half(), t.half()
    if case == 'bfloat16': s, t = s.bfloat16(), t.bfloat16()
    if case == 'nearly alike': s = 1 + 1e-7 * s
    value, grad = value_and_grad(lambda s: loss(s, t), s)
    assert value.isfinite() and grad.isfinite().all() and value.dtype == torch.float32
    if case in ('duplicates', 'all alike', 'zeros'): assert grad.abs().max() < 1e3  # finite alone would allow 1e12


@pytest.mark.parametrize('loss', [rkd_distance_loss, rkd_angle_loss])
def test_relations_stay_in_float32_under_autocast(loss):
    s, t = draw(0, 8, 3, 2, 2).float(), draw(1, 8, 20).float()
    with torch.autocast('cpu', torch.bfloat16): under = loss(s, t)
    torch.testing.assert_close(under, loss(s, t), rtol=1e-6, atol=1e-7)


def test_losses_refuse_what_would_be_broadcast():
    with refused(r'same shape .*\(4, 3\) and \(4, 1\)'): hint_loss(torch.zeros(4, 3), torch.zeros(4, 1))
    unknown = "reduction must be 'batchmean' or 'mean', but is 'sum'"
    with refused(unknown): hint_loss(torch.zeros(4, 3), torch.zeros(4, 3), 'sum')
    with refused('height and width'): attention_loss(torch.zeros(4, 3), torch.zeros(4, 3))
    with refused('same shape'): attention_loss(torch.zeros(4, 3, 2, 2), torch.zeros(1, 3, 2, 2))
    for loss in (rkd_distance_loss, rkd_angle_loss):
        with refused('as many images'): loss(torch.zeros(4, 3), torch.zeros(5, 3))


@pytest.mark.parametrize('loss', [hint_loss, attention_loss, rkd_distance_loss, rkd_angle_loss, cka])
def test_losses_refuse_a_batch_without_images(loss):
    with refused('at least 1'): loss(torch.zeros(0, 3, 2, 2), torch.zeros(0, 3, 2, 2))


# --- tap

class Odd(nn.Module):
    "In-place activations, a layer that is called twice, one that is never called, and one that gives a tuple."
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.unused = nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Linear(2, 2)
        self.lstm, self.fc = nn.LSTM(36, 5, batch_first=True), nn.Linear(20, CLASSES)

    def forward(self, x):
        out = self.relu(self.conv(x))
        out, _ = self.lstm(self.relu(out - 1).flatten(2))
        return self.fc(input=out.flatten(1))


def test_an_activation_in_place_changes_neither_features_nor_gradients():
    torch.manual_seed(0)
    x, model = draw(0, 5, 1, 8, 8).float(), Odd()
    with tap(model, ['conv', 'relu:input', 'relu']) as features: logits = model(x)
    assert torch.equal(features['conv'], model.conv(x)) and (features['conv'] < 0).any()
    (features['conv'].square().sum() + logits.sum()).backward()
    got = model.conv.weight.grad.clone()
    model.zero_grad()
    (model.conv(x).square().sum() + model(x).sum()).backward()
    torch.testing.assert_close(got, model.conv.weight.grad)
    assert torch.equal(logits, model(x))


def test_inputs_tuples_and_second_calls():
    x, model = draw(0, 5, 1, 8, 8).float(), Odd()
    with tap(model, ['relu', 'relu:input', 'lstm', 'fc:input', 'fc']) as features: logits = model(x)
    torch.testing.assert_close(features['relu'], (model.conv(x).relu() - 1).relu())  # the last of two calls
    torch.testing.assert_close(features['relu:input'], model.conv(x).relu() - 1)
    assert isinstance(features['lstm'], tuple) and isinstance(features['lstm'][1], tuple)
    assert features['lstm'][0].shape == (5, 4, 5)
    assert torch.equal(features['fc:input'], features['lstm'][0].flatten(1))  # called by keyword
    assert torch.equal(features['fc'], logits)
    with tap(model, 'conv') as features: model(x), model(x[:2])
    assert features['conv'].shape[0] == 2  # of several forwards the last


def test_a_tap_leaves_no_hook_behind():
    model, x = Odd(), torch.zeros(2, 1, 8, 8)
    mine = model.conv.register_forward_hook(lambda *a: None)
    class Stop(Exception): pass
    with pytest.raises(Stop):
        with tap(model, ['conv', 'relu', 'fc:input']): raise Stop
    with pytest.raises(RuntimeError):
        with tap(model, ['conv', 'relu']): model(torch.zeros(2, 7, 8, 8))
    with pytest.raises(ValueError):
        with tap(model, ['conv', 'no']): pass
    assert hooks(model) == 1
    with tap(model, 'conv') as a, tap(model, 'conv') as b: model(x)  # taps can be nested
    assert torch.equal(a['conv'], b['conv']) and a['conv'] is not b['conv']
    mine.remove()
    assert hooks(model) == 0
    assert weights(copy.deepcopy(model)) == weights(model)


def test_listening_hears_every_call_uncopied_and_leaves_no_hook_behind():
    model, x, heard = Odd(), torch.zeros(2, 1, 8, 8), []
    class Stop(Exception): pass
    def stop(name, value):
        heard.append((name, value))
        if name == 'fc:input': raise Stop
    model.conv.register_forward_hook(lambda module, args, output: heard.append(('mine', output)))
    with pytest.raises(Stop), listening(model, ['conv', 'relu', 'fc:input'], stop): model(x)
    (_, mine), (_, conv), *relus, (_, last) = heard
    assert [name for name, _ in heard] == ['mine', 'conv', 'relu', 'relu', 'fc:input']
    assert conv is mine and relus[0][1].data_ptr() == conv.data_ptr() and last.shape == (2, 20)
    assert hooks(model) == 1
    with refused("no layer 'no'"), listening(model, ['conv', 'no'], stop): pass
    with listening(model, 'unused', stop): model(x)
    assert hooks(model) == 1 and len(heard) == 6


def test_names_that_give_nothing_say_why():
    model = Odd()
    with refused("Odd has no layer 'cnov'; the nearest names are conv"):
        with tap(model, ['cnov']): pass
    with refused("Linear has no layer 'a'; the nearest names are none"):
        with tap(nn.Linear(2, 2), 'a'): pass
    with tap(model, ['conv', 'unused']) as features: model(torch.zeros(2, 1, 8, 8))
    with refused("layer 'unused' gave nothing: .*did not reach it"): features['unused']
    with refused("layer 'fc' is not tapped; tapped are conv, unused"): features['fc']


def test_data_parallel_is_refused():
    model = nn.ReLU()
    with tap(nn.Sequential(model), '0'), refused('DataParallel'):
        model._replicate_for_data_parallel()(torch.zeros(1, 2))


def test_shapes_of_all_layers():
    model = Odd().train()
    found = feature_shapes(model, torch.zeros(2, 1, 8, 8))
    assert found == {'conv': (4, 6, 6), 'relu': (4, 6, 6), 'fc': (CLASSES,)} and model.training and hooks(model) == 0


def test_a_compiled_objective_gives_the_same_losses(teacher):
    objective, data = FeatureDistill(student(), teacher, terms()), images()
    objective.check(data)
    fast = torch.compile(objective, backend='eager')
    for start in (0, 16):  # later calls must not see the features of the first
        batch = data.get(torch.arange(start, start + 16))
        for name, loss in objective(batch).items():
            torch.testing.assert_close(fast(batch)[name], loss, rtol=1e-4, atol=1e-5)
    model = student().eval()
    compiled = torch.compile(model, backend='eager')
    compiled(batch.x)
    with tap(model, 'layer1') as features: compiled(batch.x)
    with refused('compiled'): features['layer1']
    torch._dynamo.reset()


# --- adapters

MAPS = [((4, 8, 8), (6, 8, 8)), ((4, 8, 8), (6, 4, 4)), ((4, 4, 4), (6, 8, 8)), ((4, 8, 4), (6, 4, 8)),
        ((4, 7, 7), (6, 3, 5))]
VECTORS = [((4, 8, 8), (6,)), ((4,), (6, 8, 8)), ((4,), (6,))]
TOKENS = [((9, 4), (9, 6)), ((9, 4), (5, 6)), ((9, 4), (6,))]

@pytest.mark.parametrize('s,t', MAPS + VECTORS + TOKENS)
def test_adapters_fit_any_pair_of_shapes(s, t):
    a, b = draw(0, 3, *s).float(), draw(1, 3, *t).float()
    hint = Hint('a', 'b')
    hint.prepare([a], [b])
    loss = hint([a], [b])
    loss.backward()
    assert loss > 0 and all(p.grad.norm() > 0 for p in hint.parameters())


def test_a_map_keeps_its_values_where_sizes_agree_and_its_mean_where_not():
    x = draw(0, 2, 3, 4, 4)
    assert _resize_map(x, (4, 4)) is x
    torch.testing.assert_close(_resize_map(x, (2, 2)).mean((2, 3)), x.mean((2, 3)))
    torch.testing.assert_close(_resize_map(x, (2, 2))[0, 0, 0, 0], x[0, 0, :2, :2].mean())
    assert _as_map(torch.arange(6.).view(1, 2, 3))[0, :, 1, 0].tolist() == [3., 4., 5.]  # the second token
    with refused(r'\(2, 3, 4, 5, 6\)'): _as_map(torch.zeros(2, 3, 4, 5, 6))
    with refused('a square of patches'): Adapter(torch.zeros(2, 3, 4, 4), torch.zeros(2, 7, 5))


def test_a_perfect_translation_has_no_loss():
    "A teacher whose features are a linear map of the student's: the hint learns it."
    torch.manual_seed(0)
    a, hint = draw(0, 32, 4).float(), Hint('a', 'b')
    b = a @ draw(1, 4, 6).float() + 1
    hint.prepare([a], [b])
    optimizer = torch.optim.Adam(hint.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        hint([a], [b]).backward()
        optimizer.step()
    assert hint([a], [b]) < 1e-4


def test_an_adapter_is_made_once_and_from_the_seed_of_its_construction():
    a, b, c = torch.zeros(2, 4, 8, 8), torch.zeros(2, 6, 4, 4), torch.zeros(2, 7, 4, 4)
    def made(between=0):
        torch.manual_seed(3)
        hint = Hint('a', 'b')
        torch.rand(between)
        before = torch.get_rng_state()
        hint.prepare([a], [b])
        assert torch.equal(before, torch.get_rng_state())
        return hint
    hint = made()
    assert weights(made(5)) == weights(hint)
    adapter = hint.adapter
    hint.prepare([a], [b])
    assert hint.adapter is adapter
    for wrong in (c, b[:, :, :2]):
        with refused('made for other features'): hint.prepare([a], [wrong])


# --- the objective

def test_the_parts_are_the_weighted_losses(teacher):
    model, batch = student(), images().get(torch.arange(5))
    objective = FeatureDistill(model, teacher, terms(), temperature=3., alpha=0.25)
    objective.prepare(batch)
    parts = objective(batch)
    with tap(model, ['layer1', 'layer2', 'flatten']) as s: z = model(batch.x).double()
    with tap(teacher, ['layer2', 'layer4', 'flatten']) as t: v = teacher(batch.x).double()
    s, t = ({k: f.double() for k, f in features.items()} for features in (s, t))
    adapter = objective.terms['hint'].adapter.conv
    pooled = F.avg_pool2d(s['layer2'], 2)  # (B, 8, 8, 8) -> (B, 8, 4, 4)
    translated = torch.einsum('bchw,dc->bdhw', pooled, adapter.weight[:, :, 0, 0].double())
    translated = translated + adapter.bias.double().view(-1, 1, 1)
    log_p, log_q = (v / 3).log_softmax(1), (z / 3).log_softmax(1)
    attention = [ref_attention(s[a], t[b], True) for a, b in (('layer1', 'layer2'), ('layer2', 'layer4'))]
    flat = s['flatten'], t['flatten']
    expected = {'hard': -0.75 * z.log_softmax(1)[torch.arange(5), batch.y].mean(),
                'soft': 0.25 * 9 * (log_p.exp() * (log_p - log_q)).sum(1).mean(),
                'hint': 100 * (translated - t['layer2']).square().mean(),
                'attention': 1000 * sum(attention),
                'relational': 25 * ref_distance(*flat) + 50 * ref_angle(*flat)}
    assert list(parts) == list(expected)
    for name, value in expected.items(): assert parts[name].item() == pytest.approx(value.item(), rel=1e-4), name


def test_without_terms_it_is_logit_matching_and_with_alpha_0_no_logit_of_the_teacher_counts(teacher):
    data, model = images(), student()
    fit(Distill(model, teacher), data, RECIPE)
    other = student()
    fit(FeatureDistill(other, teacher, {}), data, RECIPE)
    assert weights(model) == weights(other)
    deceived = copy.deepcopy(teacher)
    deceived.fc.weight.data.mul_(-3)
    batch = data.get(torch.arange(8))
    parts = []
    for t in (teacher, deceived):
        torch.manual_seed(1)
        objective = FeatureDistill(student(), t, {'hint': (Hint('layer2', 'layer2'), 1.)}, alpha=0.)
        objective.prepare(batch)
        parts.append(objective(batch))
    assert parts[0]['soft'] == 0 and all(torch.equal(parts[0][k], parts[1][k]) for k in parts[0])


def test_student_and_teacher_run_once_per_batch(teacher):
    calls = []
    model, objective = student(), None
    objective = FeatureDistill(model, teacher, terms())
    objective.check(images())
    sides = (('student', model), ('teacher', teacher))
    counters = [m.register_forward_hook(lambda *a, side=side: calls.append(side)) for side, m in sides]
    objective(images().get(torch.arange(8)))
    for c in counters: c.remove()
    assert sorted(calls) == ['student', 'teacher']


def test_training_leaves_the_teacher_alone_and_trains_the_adapter(teacher):
    torch.manual_seed(0)
    objective = FeatureDistill(student(), teacher, terms())
    before, modes, seen = weights(teacher), [], []
    class Watch(FeatureDistill):
        def forward(self, batch):
            modes.append((self.model.training, any(m.training for m in teacher.modules())))
            seen.append(weights(self.terms['hint']))
            return super().forward(batch)
    objective.__class__ = Watch
    history = fit(objective, images(), RECIPE, images(seed=1))
    assert weights(teacher) == before
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert set(modes) == {(True, False)}
    assert len(set(seen)) == len(seen) == 12  # the adapter moves in every step, the first included
    assert set(history.losses) == {'hard', 'soft', 'hint', 'attention', 'relational'}
    assert all(math.isfinite(v) for values in history.losses.values() for v in values)
    own = {id(p) for p in objective.parameters()}
    assert {id(p) for p in objective.terms['hint'].adapter.parameters()} <= own
    assert not any(id(p) in own for p in teacher.parameters())
    assert hooks(objective.model) == hooks(teacher) == 0 and not any('teacher' in k for k in objective.state_dict())


def test_evaluation_sees_the_student_alone(teacher):
    objective = FeatureDistill(student(), teacher, terms())
    history = fit(objective, images(), RECIPE, images(seed=1))
    valid = images(seed=1)
    e = evaluate(objective.model, valid)
    x = valid.get(torch.arange(len(valid)), torch.zeros(len(valid), dtype=torch.long)).x
    with torch.no_grad(): loss = F.cross_entropy(objective.model(x), valid.y).item()
    assert e.loss == pytest.approx(loss, rel=1e-5) == pytest.approx(history.last['valid_loss'], rel=1e-5)
    assert set(objective.model.state_dict()) == set(digit_student(CLASSES).state_dict())


@pytest.mark.parametrize('alpha', [0., 0.5, 1.])
def test_images_without_labels_are_learned_from(teacher, alpha):
    objective = FeatureDistill(student(), teacher, terms(), alpha=alpha)
    history = fit(objective, images().unlabelled([0, 1, 2]), RECIPE, images(seed=1))
    assert all(math.isfinite(v) for values in history.losses.values() for v in values)
    if alpha == 1: assert set(history.losses['hard']) == {0.}
    if alpha == 0: assert set(history.losses['soft']) == {0.}


def test_terms_are_copied_so_that_runs_do_not_share_adapters(teacher):
    shared = terms()
    make = lambda s: FeatureDistill(s, teacher, shared)
    ways = {'a': Contender(make, images()), 'b': Contender(make, images())}
    both = compare(lambda: digit_student(CLASSES), ways, RECIPE, images(seed=1), seeds=1)
    assert both.histories['a'].losses == both.histories['b'].losses and shared['hint'][0].adapter is None


def test_an_interrupted_run_resumes_to_the_weights_of_the_whole_one(teacher, tmp_path):
    class Stop(Exception): pass
    def make(stop_at=None):
        torch.manual_seed(7)
        objective = FeatureDistill(digit_student(CLASSES), teacher, terms())
        if stop_at is None: return objective
        class Stops(FeatureDistill):
            def forward(self, batch):
                self.__dict__['calls'] = self.__dict__.get('calls', 0) + 1
                if self.calls > stop_at: raise Stop
                return super().forward(batch)
        Stops.__name__ = Stops.__qualname__ = 'FeatureDistill'
        objective.__class__, objective.__dict__['calls'] = Stops, 0
        return objective
    recipe = Recipe(steps=60, batch_size=8, optimizer='adamw', lr=0.01, precision='float32')
    data, whole = images(), make()
    history = fit(whole, data, recipe)
    with pytest.raises(Stop): fit(make(45), data, recipe, folder=tmp_path, save_every=0)
    tensors, meta = Checkpoint(tmp_path).read()
    assert 0 < meta['step'] <= 45 and 'objective.terms.hint.adapter.conv.weight' in tensors
    resumed = make(10**6)
    again = fit(resumed, data, recipe, folder=tmp_path, resume=True)
    assert 0 < resumed.calls < 60 and weights(resumed) == weights(whole) and again.losses == history.losses
    assert 'terms.hint.adapter.conv.weight' in whole.state_dict()


def test_a_checkpoint_knows_terms_weights_and_the_adapters_first_weights(teacher, tmp_path):
    def start(seed=0, weight=100., reduction='mean', **more):
        torch.manual_seed(0)
        model = digit_student(CLASSES)
        torch.manual_seed(seed)
        def run():
            hint = {'hint': (Hint('layer2', 'layer2', reduction), weight)}
            fit(FeatureDistill(model, teacher, hint | more), images(), RECIPE, folder=tmp_path, resume=True)
        return run
    start()()
    start()()
    with refused('other initial weights.*Seed'): start(seed=1)()
    for other in (dict(weight=10.), dict(reduction='batchmean'), dict(relational=(Relational('fc', 'fc'), 1.))):
        with refused('another objective'): start(**other)()


# --- bad input

def test_everything_that_can_not_be_is_refused_before_the_first_step(teacher):
    data = images()
    def attempt(term, weight=1., model=None, guide=teacher):
        fit(FeatureDistill(model or student(), guide, {'term': (term, weight)}), data, RECIPE, data)
    blank = digit_teacher(CLASSES)
    nn.init.zeros_(blank.fc.weight)
    missing = "the {}: Sequential has no layer '{}'; the nearest names are layer"
    with refused(missing.format('student', 'layer3')): attempt(Hint('layer3', 'layer3'))
    with refused(missing.format('teacher', 'layer5')): attempt(Hint('layer1', 'layer5'))
    with refused("layer 'unused' gave nothing"): attempt(Hint('unused', 'layer1'), model=Odd())
    with refused('never trained'): attempt(Hint('layer1', 'layer1'), guide=blank)
    with refused('the student gives outputs'): attempt(Hint('layer1', 'layer1'), model=digit_student(5))
    misfit = "the term 'term' does not fit its layers: .*height and width"
    with refused(misfit): attempt(AttentionTransfer('fc', 'layer1'))
    with refused('another module'): attempt(Hint('layer1', 'layer1'), model=teacher)
    negative = "the weight of 'term' must be a finite number of at least 0, but is -1"
    with refused(negative): attempt(Hint('layer1', 'layer1'), -1.)
    with refused('angle must be a finite number'): Relational('fc', 'fc', angle=math.nan)
    with refused("but is 'sum'"): Hint('a', 'b', 'sum')
    with refused('as many layers'): AttentionTransfer(['a', 'b'], ['a'])
    with refused('at least one'): AttentionTransfer([], [])
    for name in ('hard', 'soft', 'a.b', '', 'keys', 'training'):
        with refused('name of a term'): FeatureDistill(student(), teacher, {name: (Hint('layer1', 'layer1'), 1.)})
    for wrong in (Hint('layer1', 'layer1'), (1., Hint('layer1', 'layer1')), None):
        with refused(r'must be a pair \(term, weight\)'): FeatureDistill(student(), teacher, {'hint': wrong})
    with refused('terms must be a dict'): FeatureDistill(student(), teacher, [Hint('layer1', 'layer1')])
    with refused('no adapter yet'): FeatureDistill(student(), teacher, terms())(data.get(torch.arange(4)))


NOWHERE = [dict(terms={'hint': (Hint(*layers), 1.)}) for layers in (('layer9', 'layer1'), ('layer1', 'layer9'))]

@pytest.mark.parametrize('bad', [dict(terms=None), *NOWHERE, dict(temperature=0.), dict(alpha=2.)])
def test_a_teacher_is_as_it_was_after_an_objective_that_could_not_be_made(bad):
    guide = digit_teacher(CLASSES)
    with pytest.raises(ValueError): FeatureDistill(student(), guide, **dict(terms={}) | bad)
    assert guide.training and all(p.requires_grad for p in guide.parameters())


def test_nothing_that_is_given_is_changed(teacher):
    given, network, model = terms(), copy.deepcopy(teacher).train(), student()
    guide = Teacher(network)
    names, before = set(vars(guide)), [bits(m) for m in (network, model, *(t for t, _ in given.values()))]
    objective = FeatureDistill(model, guide, given)
    objective.check(images())
    assert same_bits([bits(m) for m in (network, model, *(t for t, _ in given.values()))], before)
    fit(objective, images(), RECIPE)
    after = [bits(m) for m in (network, *(t for t, _ in given.values()))]
    assert same_bits(after, [before[0], *before[2:]]) and set(vars(guide)) == names and hooks(network) == 0


# --- a teacher with a form of its own

def test_a_teacher_with_a_form_of_its_own_is_tapped_on_its_own_picture(teacher):
    data, model = images(), student()
    guide = Teacher(teacher, mean=[0.1], std=[0.7], size=12)
    objective = FeatureDistill(model, guide, terms(), examine=False)
    objective.check(data)
    batch = data.get(torch.arange(6), torch.arange(6) + 3)
    parts = objective.eval()(batch)
    own = data.seen(mean=[0.1], std=[0.7], size=12).get(torch.arange(6), torch.arange(6) + 3).x
    with torch.no_grad(), tap(model, 'layer2') as s, tap(teacher.eval(), 'layer2') as t: model(batch.x), teacher(own)
    adapter = objective.terms['hint'].adapter
    assert adapter.size == t['layer2'].shape[2:] == (6, 6)
    assert parts['hint'].item() == pytest.approx(100 * F.mse_loss(adapter(s['layer2']), t['layer2']).item(), rel=1e-4)


def test_a_teacher_with_a_form_of_its_own_asks_for_the_data_before_it_prepares(teacher):
    objective = FeatureDistill(student(), Teacher(teacher, size=12), terms())
    with refused('must see the data before'): objective.prepare(images().get(torch.arange(2)))


# --- places and rows that are not there

@pytest.mark.parametrize('weight,expected', [([1., 0., 0.5], [True, False, True]),
                                             ([[0., 2.], [0., 0.]], [True, False]), ([[[0.]], [[1.]]], [False, True])])
def test_a_row_is_there_if_any_of_its_places_has_weight(weight, expected):
    assert rows_there(torch.tensor(weight)).tolist() == expected


def test_a_row_without_weight_has_no_loss_whatever_it_holds(teacher):
    data, model = images(), student()
    objective = FeatureDistill(model, teacher, terms())
    objective.check(data)
    objective.eval()
    kept = torch.tensor([0, 2, 3, 6])
    batch = data.get(torch.arange(7))
    fewer = Batch(*(part[kept] for part in batch[:4]))
    weight = torch.zeros(7).index_fill(0, kept, 1.)
    x = batch.x.index_fill(0, torch.tensor([1, 4, 5]), 50.)
    def parts_and_grads(batch):
        objective.zero_grad()
        parts = objective(batch)
        sum(parts.values()).backward()
        return parts, [p.grad.clone() for p in objective.parameters()]
    (few, few_grads), (many, grads) = parts_and_grads(fewer), parts_and_grads(batch._replace(x=x, weight=weight))
    for name in few: assert many[name].item() == pytest.approx(few[name].item(), rel=1e-4), name
    torch.testing.assert_close(grads, few_grads, rtol=1e-3, atol=1e-4)


def test_a_row_with_some_weight_counts_once(teacher):
    data = images()
    objective = FeatureDistill(student(), teacher, terms())
    objective.check(data)
    batch = data.get(torch.arange(6))
    plain = objective.eval()(batch)
    scaled = objective(batch._replace(weight=torch.tensor([0.1, 1., 1., 3., 0.5, 1.])))
    assert len(plain) == 5
    for name in plain: assert scaled[name].item() == pytest.approx(plain[name].item(), rel=1e-6)


def test_a_batch_without_any_row_has_no_loss_but_reaches_the_adapter(teacher):
    objective = FeatureDistill(student(), teacher, terms())
    objective.check(images())
    parts = objective(images().get(torch.arange(6))._replace(weight=torch.zeros(6)))
    assert [part.item() for part in parts.values()] == [0.] * 5
    adapter = list(objective.terms['hint'].parameters())
    assert [g.abs().max().item() for g in torch.autograd.grad(parts['hint'], adapter)] == [0., 0.]


def test_layers_of_a_language_model_are_compared_token_by_token():
    data, guide = text(), trained_speaker()
    torch.manual_seed(0)
    objective = FeatureDistill(speaker(4), guide, {'hint': (Hint('0', '0'), 1.)}, temperature=1.)
    batch = data.get(torch.arange(30))._replace(weight=torch.zeros(30, 8).index_fill(0, torch.arange(10), 1.))
    objective.check(data, text(seed=1))
    with torch.no_grad():
        own, given = objective.model[0](batch.x), guide[0](batch.x)
        adapter = objective.terms['hint'].adapter.conv
        translated = own @ adapter.weight[:, :, 0, 0].T + adapter.bias
    expected = (translated - given)[:10].square().mean()
    assert objective(batch)['hint'].item() == pytest.approx(expected.item(), rel=1e-5)
    history = fit(objective, data, RECIPE, text(seed=1), device='cpu', progress=False)
    assert set(history.losses) == {'hard', 'soft', 'hint'} and history.last['bits_per_byte'] > 0


def test_a_layer_whose_rows_are_not_those_of_the_batch_can_not_be_weighted(teacher):
    class Mean(Term):
        def forward(self, student_features, teacher_features): return student_features[0].mean()
    model = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten(0, 1), nn.Unflatten(0, (-1, 4)), nn.Flatten(),
                          nn.Linear(4, CLASSES))
    objective, batch = FeatureDistill(model, teacher, {'mean': (Mean('1', 'fc'), 1.)}), images().get(torch.arange(2))
    objective.prepare(batch)
    with refused("the term 'mean' does not fit its layers: .*mask"):
        objective.prepare(batch._replace(weight=torch.ones(2)))


def test_settings_of_the_hard_loss_go_to_the_labels_alone(teacher):
    counts, batch, parts = torch.tensor([1., 2., 3.]), images().get(torch.arange(6)), []
    for more in ({}, dict(label_smoothing=0.2, class_weights=counts)):
        model = student()
        parts.append(FeatureDistill(model, teacher, {'on': (Relational('fc', 'fc'), 1.)}, **more)(batch))
    hard = 0.1 * hard_loss(student()(batch.x), batch.y, 0.2, counts)
    assert parts[1]['hard'].item() == pytest.approx(hard.item(), rel=1e-6) != parts[0]['hard'].item()
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in ('soft', 'on'))


def test_the_first_tensor_of_a_tuple_is_taken(teacher):
    torch.manual_seed(0)
    objective = FeatureDistill(Odd(), teacher, {'relational': (Relational('lstm', 'fc:input'), 1.)})
    objective.prepare(images().get(torch.arange(2)))
    batch = images().get(torch.arange(6))
    with tap(objective.model, 'lstm') as s, tap(teacher, 'flatten') as t: objective.model(batch.x), teacher(batch.x)
    expected = 25 * rkd_distance_loss(s['lstm'][0], t['flatten']) + 50 * rkd_angle_loss(s['lstm'][0], t['flatten'])
    torch.testing.assert_close(objective(batch)['relational'], expected)


# --- layers without names, similarity, pictures

@pytest.mark.parametrize('name', FEATURE_WEIGHTS)
@pytest.mark.parametrize('s,t', [(resnet8, resnet20), (wrn_16_1, resnet8), (resnet18, resnet8), (resnet8, resnet18)])
def test_staged_networks_need_no_names(name, s, t):
    torch.manual_seed(0)
    objective = feature_method(name, s(), t())
    objective.prepare(some(torch.randn(2, 3, 32, 32)))
    assert list(objective(some(torch.randn(4, 3, 32, 32)))) == ['hard', 'soft', name]


def test_stages_are_paired_by_depth(teacher):
    from torchvision.models import vgg11
    assert stage_pairs(resnet8(), resnet20()) == [(f'layer{i}', f'layer{i}') for i in (1, 2, 3)]
    assert stage_pairs(resnet18(), resnet8()) == [('layer2', 'layer1'), ('layer3', 'layer2'), ('layer4', 'layer3')]
    assert stage_names(resnet20()) == ['layer1', 'layer2', 'layer3']
    assert stage_names(nn.ModuleDict({f'layer{i}': nn.ReLU() for i in (10, 9, 1)})) == ['layer1', 'layer9', 'layer10']
    assert stage_pairs(student(), teacher) == [('layer1', 'layer2'), ('layer2', 'layer4')]
    hint = feature_method('hint', resnet8(), resnet20()).terms['hint']
    assert (hint.student_layers, hint.teacher_layers) == (('layer2',), ('layer2',))  # as in CRD's benchmark
    with torch.device('meta'): vgg = vgg11()
    assert head_input(vgg) == 'classifier.6:input'
    parts = 'the student, a VGG, has no stages .*its parts are features, avgpool, classifier'
    with refused(parts): feature_method('hint', vgg, teacher)
    with refused('the model, a VGG, has no stages'): stage_names(vgg)
    with refused('no linear layer'): feature_method('relational', student(), nn.Sequential(nn.Flatten()))
    unknown = "name must be one of hint, attention, relational, relations, but is 'magic'"
    with refused(unknown): feature_method('magic', student(), teacher)
    assert feature_method('hint', student(), teacher, weight=0.5).weights == (0.5,)


def test_the_similarity_of_what_is_no_number_is_no_number():
    x, y = torch.randn(9, 4), torch.randn(9, 3)
    for wrong in (math.nan, math.inf):
        bad = x.index_fill(0, torch.tensor(2), wrong)
        assert math.isnan(cka(bad, y)) and math.isnan(cka(y, bad))
    assert cka(torch.ones(9, 4), y) == 0


def test_a_term_with_weight_0_is_left_out(teacher):
    class Breaks(Relational):
        def forward(self, student_features, teacher_features): return torch.tensor(math.inf)
    off = {'off': (Breaks('fc', 'fc'), 0.), 'hint': (Hint('layer1', 'layer1'), 0.)}
    objective = FeatureDistill(student(), teacher, off | {'on': (Relational('fc', 'fc'), 1.)})
    parts = objective(images().get(torch.arange(4)))
    assert list(parts) == ['hard', 'soft', 'on'] and sum(parts.values()).isfinite()


def test_similarity_and_pictures(teacher):
    model, data = student(), images()
    x = data.get(torch.arange(20), torch.zeros(20, dtype=torch.long)).x
    modes = [m.training for m in model.modules()]
    matrix = layer_similarity(model, teacher, x, ['layer1', 'fc'], ['layer1', 'layer4', 'fc'])
    model.eval()
    with torch.no_grad(): assert matrix[1, 2].item() == pytest.approx(cka(model(x), teacher(x)), rel=1e-5)
    assert matrix.shape == (2, 3) and layer_similarity(teacher, teacher, x, ['fc'], ['fc']).item() == pytest.approx(1)
    model.train()
    assert plot_similarity(matrix, ['layer1', 'fc'], ['layer1', 'layer4', 'fc']) is not None
    fig = plot_attention({'teacher': (teacher, 'layer2'), 'student': (model, 'layer1')}, data, torch.arange(4))
    shown = [ax.images[0].get_array() for ax in fig.axes]
    assert [a.shape for a in shown] == 4 * [(8, 8)] + 8 * [(4, 4)]  # pixels as they are, maps on the coarsest grid
    with refused('height and width'): plot_attention({'teacher': (teacher, 'fc')}, data, torch.arange(4))
    with torch.no_grad(), tap(model.eval(), 'layer1') as features: model(x[:4])
    torch.testing.assert_close(torch.tensor(shown[8]), attention_map(features['layer1'], (4, 4))[0])
    model.train()
    assert [m.training for m in model.modules()] == modes and hooks(model) == 0


# --- several processes

RUN = """
from test_features import AttentionTransfer, FeatureDistill, Hint, Supervised, fit, images, RECIPE

def net(width, seed):  # without batch statistics, which each process takes from its own part
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36 * width, 3))

def run():
    teacher = net(6, 1)
    fit(Supervised(teacher), images(), RECIPE, device='cpu', progress=False)
    terms = dict(hint=(Hint('0', '0'), 100.), attention=(AttentionTransfer('0', '1'), 1000.))
    objective = FeatureDistill(net(2, 0), teacher, terms)
    return [fit(objective, images(), replace(RECIPE, steps=6), images(), device='cpu', progress=False).losses]
"""


def test_two_processes_reach_the_loss_curve_of_one(tmp_path):
    one, two = alone_and_together(RUN, tmp_path)
    assert (one[0], two[0]) == (1, 2) and set(one[1]) == {'hard', 'soft', 'hint', 'attention'}
    for name in one[1]: assert two[1][name] == pytest.approx(one[1][name], rel=1e-3, abs=1e-5)


def test_of_a_cached_teacher_the_model_itself_is_asked():
    from distill_nb.cache import CachedTeacher
    from distill_nb.data import digits
    train = digits().train
    teacher = digit_teacher()
    cached = CachedTeacher(teacher, train)
    objective = feature_method('hint', digit_student(), cached)
    batch = train.get(torch.arange(8))
    objective.prepare(batch)
    for _ in range(2): assert set(objective(batch)) == {'hard', 'soft', 'hint'}
    assert objective.teacher.model is teacher and cached.asked == 0


def test_a_cached_teacher_is_tapped_in_the_form_that_its_contract_wants(teacher):
    from distill_nb.cache import CachedTeacher
    data = images()
    clauses = dict(classes=['bright', 'dark', 'middle'], mean=[0.1], std=[0.7], size=12, outputs='probabilities',
                   read=lambda output: output.softmax(1))
    cached, parts = CachedTeacher(Teacher(teacher, **clauses), data), []
    for guide in (Teacher(teacher, **clauses), cached):
        torch.manual_seed(0)
        objective = FeatureDistill(student(), guide, terms(), examine=False)
        objective.check(data)
        parts.append(objective.eval()(data.get(torch.arange(6))))
    assert {name: getattr(objective.teacher, name) for name in clauses} == clauses
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0]) and cached.asked == 0


@pytest.mark.parametrize('term', [Hint, Relational])
def test_a_term_for_one_pair_refuses_several(term):
    with refused('one layer each'): term(['layer1', 'layer2'], ['layer1', 'layer2'])


def test_more_triples_than_fit_a_machine_are_refused_at_once():
    many = torch.zeros(1, 1).expand(20_000, 16)
    with pytest.raises(ValueError, match='number of images in student_features must be smaller'):
        rkd_angle_loss(many, many)
    with pytest.raises(ValueError, match='number of images in x must be at most'):
        cka(torch.zeros(1, 1).expand(100_000, 2), torch.zeros(1, 1).expand(100_000, 2))


def test_inputs_that_a_network_does_not_take_are_named():
    with pytest.raises(ValueError, match=r'x must be inputs that Sequential takes, .*shape \(2, 7\)'):
        feature_shapes(nn.Sequential(nn.Linear(3, 3)), torch.zeros(2, 7))


def test_one_name_is_a_layer_and_not_its_letters():
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(5, 3)
    assert layer_similarity(model, model, x, '0', ['0']).shape == (1, 1)


@pytest.mark.parametrize('size', [(0, 1), (3, 1), (1,), (10**18, 1), (1.5, 1)])
def test_an_attention_map_is_not_larger_than_the_features(size):
    with pytest.raises(ValueError, match='size must be'): attention_map(torch.randn(2, 3, 2, 2), size)


@pytest.mark.parametrize('index', [[], [[0]], [24], [-1], [0.5], list(range(24))*10])
def test_pictures_are_of_images_that_there_are(index):
    with pytest.raises(ValueError, match='index must be from 1 to 100 positions in 0..23'):
        plot_attention({'a': (nn.Flatten(), 'fc')}, images(24), torch.tensor(index))


def test_the_name_of_a_term_is_text():
    with pytest.raises(ValueError, match='the name of a term must be a word'):
        FeatureDistill(student(), student(), {1: 2})
