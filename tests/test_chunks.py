"""The loss in chunks: against equations in float64, in every combination, and what it must never hold in memory.

The reference below shares nothing with the library: probabilities as the papers write them, in float64, with the logits
of all places at once, and gradients from autograd over these equations.
"""
import copy, math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import distill_nb.chunks as chunks
from distill_nb.chunks import HiddenLogits, chunked_loss, hidden_logits
from distill_nb.gpt import GPT
from distill_nb.losses import DistillationLoss, TopK, kd_loss, top_k
from distill_nb.rows import UNLABELLED
from distill_nb.successors import dist_loss, dkd_loss, jsd_loss, reverse_kl_loss
from distill_nb.training import Objective, fit
from processes import alone_and_together
from small import RECIPE, Texts


# ---- the reference: float64, all logits at once ----

def softmax(z, T=1.):
    e = torch.exp((z - z.amax(-1, keepdim=True).detach()) / T)
    return e / e.sum(-1, keepdim=True)

def kl(p, q): return (p * (torch.log(p) - torch.log(q))).sum(-1)

def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)

def dkd(p, q, y, beta=8.):
    "Equation 7 of Zhao et al. 2022 with α = 1; for a place without label the teacher's first choice."
    y = torch.where(y == UNLABELLED, p.argmax(-1), y)[..., None]
    pt, qt = p.gather(-1, y), q.gather(-1, y)
    def others(x): return x.scatter(-1, y, 0.)
    binary = kl(torch.cat([pt, others(p).sum(-1, keepdim=True)], -1),
                torch.cat([qt, others(q).sum(-1, keepdim=True)], -1))
    a, b = others(p) / (1 - pt), others(q) / (1 - qt)
    return binary + beta * torch.where(a > 0, a * (torch.log(a.clamp(min=1e-300)) - torch.log(b.clamp(min=1e-300))),
                                       0.).sum(-1)

EQUATIONS = {kd_loss: lambda p, q, y: kl(p, q), reverse_kl_loss: lambda p, q, y: kl(q, p),
             jsd_loss: lambda p, q, y: jsd(p, q, 0.5), dkd_loss: dkd}
SKEWED = partial(jsd_loss, beta=0.1)
EQUATIONS[SKEWED] = lambda p, q, y: jsd(p, q, 0.1)

def named(p, places):
    "Probabilities of the named classes, and of all others together."
    rest = p.scatter(-1, places, 0.).sum(-1, keepdim=True)
    return torch.cat([p.gather(-1, places), rest], -1)

def mean(each, weight):
    "Over a row's places, each with its weight, then over the rows that have any."
    if weight is None: weight = torch.ones_like(each)
    each, weight = each.flatten(1), weight.double().flatten(1)
    rows = [(w * l).sum() / w.sum() for l, w in zip(each, weight) if w.sum() > 0]
    return sum(rows) / len(rows) if rows else 0 * each.sum()

def reference(loss, given, v, y, weight=None, places=None):
    "{'hard', 'soft'} of a `DistillationLoss`, from its settings; `places` are the classes that a TopK names."
    h, W, b = given
    z, T, zero = torch.einsum('...d,vd->...v', h, W) + b, loss.temperature, h.sum() * 0
    hard = soft = zero
    if loss.alpha < 1:
        q, V, there = softmax(z), W.shape[0], y != UNLABELLED
        smooth, omega = loss.label_smoothing, torch.ones(V).double()
        if loss.class_weights is not None: omega = loss.class_weights.double()
        target = (1 - smooth) * F.one_hot(y * there, V).double() + smooth / V
        hard = mean(-(omega * target * torch.log(q)).sum(-1) * there, weight)
    if loss.alpha > 0:
        p, q = softmax(v, T), softmax(z, T)
        if places is not None: p, q = named(p, places), named(q, places)
        soft = T**2 * mean(EQUATIONS[loss.divergence](p, q, y), weight)
    return {'hard': (1 - loss.alpha) * hard, 'soft': loss.alpha * soft}

def slopes(parts, given):
    found = torch.autograd.grad(sum(parts.values()), given, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(given, found)]


# ---- what is compared ----

B, L, D, V, K = 3, 5, 4, 11, 3

def drawn(dtype=torch.float64, seed=0, spread=1., shape=(B, L), V=V, D=D):
    "A student's hidden vectors and head, and a teacher's."
    g = torch.Generator().manual_seed(seed)
    def made(*s): return torch.randn(s, generator=g, dtype=torch.float64).to(dtype)
    student = HiddenLogits(*(t.requires_grad_() for t in (spread * made(*shape, D), made(V, D), made(V))))
    return student, HiddenLogits(spread * made(*shape, D + 2), made(V, D + 2))

def asked(seed=0, shape=(B, L), V=V):
    "Labels, of which some are missing, and weights: ragged rows, one with nothing at all."
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(V, shape, generator=g)
    weight = torch.rand(shape, generator=g, dtype=torch.float64)
    y[0, 1] = y[-1, 0] = UNLABELLED
    weight[0, 2:], weight[1] = 0., 0.
    return y, weight

def doubled(given): return [t.detach().double().requires_grad_() for t in given]

def close(found, expected, given, doubles, value, slope):
    "Values and gradients, of `found` by `given`, of `expected` by `doubles`."
    for name in ('hard', 'soft'):
        assert abs(found[name].item() - expected[name].item()) <= value * (1 + abs(expected[name].item())), name
    for a, b in zip(slopes(found, given), slopes(expected, doubles)):
        assert (a.double() - b).norm() <= slope * b.norm() + 1e-300

KINDS = ('tensor', 'hidden', 'top')
SETTINGS = {'plain': {}, 'smooth': dict(label_smoothing=0.2), 'classes': dict(class_weights=torch.arange(V) / 5.),
            'both': dict(label_smoothing=0.2, class_weights=torch.arange(V) / 5.)}


def teacher_of(kind, hidden, T):
    v = hidden.logits()
    if kind == 'top':
        kept = top_k(v, K, T)
        return kept, v.double(), kept.places
    return (v if kind == 'tensor' else hidden), v.double(), None


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('divergence', EQUATIONS, ids=lambda f: getattr(f, '__name__', 'skewed'))
def test_values_and_gradients_are_those_of_the_equations(divergence, kind):
    "Every setting, temperature, share and chunk size, with and without weights."
    if kind == 'top' and divergence is dkd_loss: return
    y, weights = asked()
    for T, alpha, setting, weight in product((1., 2.5), (0., 0.3, 1.), SETTINGS, (None, weights)):
        if alpha == 1 and setting != 'plain' or alpha == 0 and (divergence, kind) != (kd_loss, 'tensor'): continue
        loss = DistillationLoss(T, alpha, divergence, **SETTINGS[setting])
        student, hidden = drawn()
        teacher, v, places = teacher_of(kind, hidden, T)
        doubles = doubled(student)
        expected = reference(loss, doubles, v, y, weight, places)
        for chunk in (1, 4, 100):
            found = chunked_loss(loss, student, teacher, y, weight, chunk)
            close(found, expected, student, doubles, 1e-10, 1e-10)


@pytest.mark.parametrize('divergence', EQUATIONS, ids=lambda f: getattr(f, '__name__', 'skewed'))
def test_float32_is_within_1e_5_of_float64(divergence):
    "A vocabulary of some size; the worst of a value and of a gradient's relative error."
    y, weight = asked(V=3000)
    for kind, T, seed in product(KINDS, (1., 2.), range(3)):
        if kind == 'top' and divergence is dkd_loss: continue
        loss = DistillationLoss(T, 0.5, divergence)
        student, hidden = drawn(torch.float32, seed, V=3000, D=16)
        teacher, v, places = teacher_of(kind, hidden, T)
        if kind == 'hidden': v = F.linear(*(t.double() for t in hidden[:2]))
        doubles = doubled(student)
        close(chunked_loss(loss, student, teacher, y, weight, 4), reference(loss, doubles, v, y, weight, places),
              student, doubles, 1e-5, 1e-5)


def test_the_parts_are_those_of_the_plain_loss_whatever_it_is():
    "Standardised logits, a divergence of somebody else's, places of more dimensions, and no weights."
    def somebodys(z, v, temperature, reduction='mean'):
        each = (z / temperature - v / temperature).square().mean(-1)
        return each if reduction == 'none' else each.mean()
    y = torch.arange(12).view(2, 3, 2) % V
    student, hidden = drawn(shape=(2, 3, 2))
    for loss in (DistillationLoss(2., 0.5, standardize=True), DistillationLoss(2., 0.5, somebodys),
                 DistillationLoss(2., 0.5, partial(dkd_loss, beta=2.)), DistillationLoss(2., 0.5, partial(kd_loss))):
        plain, found = loss.parts(student.logits(), hidden.logits(), y), chunked_loss(loss, student, hidden, y, None, 5)
        close(found, plain, student, student, 1e-12, 1e-12)


def test_the_three_divergences_of_language_models_are_done_by_hand():
    for divergence in (kd_loss, reverse_kl_loss, jsd_loss, SKEWED, partial(kd_loss)):
        assert chunks._way(DistillationLoss(1., 0.5, divergence), drawn()[0], drawn()[1]) is chunks._by_hand
    assert chunks._way(DistillationLoss(1., 0.5, dkd_loss), *drawn()) is chunks._by_autograd
    assert chunks._way(DistillationLoss(standardize=True), *drawn()) is chunks._by_autograd
    assert chunks._way(DistillationLoss(), drawn()[0], top_k(torch.randn(2, 3), 1)) is chunks._by_top


# ---- places that are not there ----

@pytest.mark.parametrize('kind', KINDS)
def test_rows_without_any_weight_give_zero(kind):
    student, hidden = drawn(torch.float32)
    teacher, *_ = teacher_of(kind, hidden, 2.)
    y, _ = asked()
    found = chunked_loss(DistillationLoss(2., 0.5), student, teacher, y, torch.zeros(B, L))
    assert sum(found.values()) == 0
    assert all(g.eq(0).all() for g in slopes(found, student))


@pytest.mark.parametrize('kind', KINDS)
def test_places_of_weight_0_may_hold_anything(kind):
    (h, W, b), hidden = drawn()
    y, weight = asked()
    loss, gone = DistillationLoss(2., 0.5), (weight == 0)[..., None]
    teacher, *_ = teacher_of(kind, hidden, 2.)
    expected = chunked_loss(loss, HiddenLogits(h, W, b), teacher, y, weight)
    wrong, dirty = h.detach().masked_fill(gone, math.nan).requires_grad_(), hidden.hidden.masked_fill(gone, math.inf)
    if kind == 'hidden': teacher = HiddenLogits(dirty, hidden.weight)
    elif kind == 'tensor': teacher = teacher.masked_fill(gone, math.nan)
    else: teacher = TopK(teacher.values.masked_fill(gone, math.nan), *teacher[1:])
    found = chunked_loss(loss, HiddenLogits(wrong, W, b), teacher, torch.where(weight == 0, 0, y), weight)
    assert {k: t.item() for k, t in found.items()} == {k: t.item() for k, t in expected.items()}
    for a, e in zip(slopes(found, (wrong, W, b)), slopes(expected, (h, W, b))): assert a.equal(e)


def test_padding_changes_nothing():
    student, hidden = drawn()
    y, weight = asked()
    loss = DistillationLoss(1., 0.5)
    def padded(t, value=0): return F.pad(t, (0, 0)*(t.ndim - 2) + (0, 4), value=value)
    longer = HiddenLogits(padded(student.hidden), *student[1:]), HiddenLogits(padded(hidden.hidden), hidden.weight)
    a = chunked_loss(loss, student, hidden, y, weight)
    b = chunked_loss(loss, *longer, padded(y, 1), padded(weight))
    assert sum(a.values()).item() == pytest.approx(sum(b.values()).item(), abs=1e-14)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('divergence', [kd_loss, dkd_loss])
def test_nan_is_loud(kind, divergence):
    if kind == 'top' and divergence is dkd_loss: return
    (h, W, b), hidden = drawn(torch.float32)
    y, weight = asked()
    with torch.no_grad(): h[2, 3, 0] = math.nan
    teacher, *_ = teacher_of(kind, hidden, 2.)
    found = chunked_loss(DistillationLoss(2., 0.5, divergence), HiddenLogits(h, W, b), teacher, y, weight)
    assert all(t.isnan() for t in found.values())


# ---- numbers that are hard to tell apart, and types of few bits ----

@pytest.mark.parametrize('divergence', [kd_loss, reverse_kl_loss, jsd_loss, SKEWED],
                         ids=['kd', 'reverse', 'jsd', 'skewed'])
def test_equal_logits_have_no_loss_and_no_gradient(divergence):
    "Also where the teacher gives its largest logits, and where both are hidden."
    (h, W, b), _ = drawn(torch.float32, V=500)
    own = HiddenLogits(h, W, b)
    for T in (1., 3.):
        loss = DistillationLoss(T, 1., divergence)
        for teacher, most in ((own.logits().detach(), 1e-12), (HiddenLogits(*(t.detach() for t in own)), 1e-12),
                              (top_k(own.logits().detach(), 20, T), 2e-7)):
            found = chunked_loss(loss, own, teacher)
            assert 0 <= found['soft'].item() <= most
            assert all(g.abs().max() <= 1e-6 for g in slopes(found, own)), (T, type(teacher))


@pytest.mark.parametrize('dtype, value', [(torch.float32, 3e-7), (torch.float64, 1e-14)])
@pytest.mark.parametrize('divergence', [kd_loss, reverse_kl_loss, jsd_loss], ids=['kd', 'reverse', 'jsd'])
def test_small_divergences_are_honest(divergence, dtype, value):
    "Never negative, and within the rounding of a float of the truth, which is far below that of the logarithms."
    g = torch.Generator().manual_seed(0)
    for apart in (1e-1, 1e-2, 1e-3, 1e-4):
        z = 5 * torch.randn(2, 3, 2000, generator=g, dtype=torch.float64)
        v = z + apart * torch.randn(z.shape, generator=g, dtype=torch.float64)
        own = HiddenLogits(torch.eye(6, dtype=dtype).view(2, 3, 6), z.flatten(0, 1).T.to(dtype).contiguous())
        loss = DistillationLoss(1., 1., divergence)
        found = chunked_loss(loss, own, v.to(dtype))['soft'].item()
        p, q = softmax(v.to(dtype).double()), softmax(own.logits().double())
        expected = EQUATIONS[divergence](p, q, None).mean().item()
        assert 0 <= found and abs(found - expected) <= value


@pytest.mark.parametrize('divergence', [kd_loss, reverse_kl_loss], ids=['kd', 'reverse'])
def test_a_large_vocabulary_does_not_blur_small_divergences(divergence):
    "The errors of a place's two normalisations do not add to its loss."
    g = torch.Generator().manual_seed(0)
    for _ in range(8):
        z = torch.randn(50_000, 1, generator=g) + 20
        v = z + torch.randn(z.shape, generator=g) / 1000
        expected = EQUATIONS[divergence](softmax(v[:, 0].double()), softmax(z[:, 0].double()), None).item()
        found = chunked_loss(DistillationLoss(1., 1., divergence), HiddenLogits(torch.ones(1, 1), z), v.T)
        assert abs(found['soft'].item() - expected) <= 6e-7


@pytest.mark.parametrize('T', [0.05, 1., 20.])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('divergence', [kd_loss, reverse_kl_loss, jsd_loss], ids=['kd', 'reverse', 'jsd'])
def test_large_logits_keep_their_digits(divergence, kind, T):
    "Differences of some hundred, where a softmax in float32 is 0."
    y, weight = asked()
    loss = DistillationLoss(T, 0.5, divergence)
    student, hidden = drawn(torch.float32, spread=3.)
    teacher, v, places = teacher_of(kind, hidden, T)
    found = chunked_loss(loss, student, teacher, y, weight, 4)
    v = teacher if kind == 'top' else v.float()
    plain = loss.parts(student.logits(), v, y, weight)
    close(found, plain, student, student, 2e-5, 2e-5)


@pytest.mark.parametrize('divergence', [kd_loss, jsd_loss, reverse_kl_loss], ids=['kd', 'jsd', 'reverse'])
def test_classes_that_the_teacher_rules_out(divergence):
    "A logit of -inf; the reverse divergence is infinite then."
    student, hidden = drawn()
    v = hidden.logits()
    v[..., 2:4] = -math.inf
    loss = DistillationLoss(1., 1., divergence)
    found, plain = chunked_loss(loss, student, v), loss.parts(student.logits(), v)
    if divergence is reverse_kl_loss: assert found['soft'] == plain['soft'] == math.inf
    else: close(found, plain, student, student, 1e-12, 1e-12)


@pytest.mark.parametrize('kind', ['tensor', 'top'])
def test_classes_that_both_rule_out(kind):
    "A bias of -inf, as for rows of a vocabulary that are no tokens."
    (h, W, b), hidden = drawn()
    with torch.no_grad(): b[-2:] = -math.inf
    v = hidden.logits()
    v[..., -2:] = -math.inf
    y = asked()[0] % (V - 2)
    loss, own = DistillationLoss(2., 0.5, label_smoothing=0.1), HiddenLogits(h, W, b)
    teacher = v if kind == 'tensor' else top_k(v, K, 2.)
    found, plain = chunked_loss(loss, own, teacher, y), loss.parts(own.logits(), teacher, y)
    close(found, plain, (h, W), (h, W), 1e-12, 1e-12)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('divergence', [kd_loss, reverse_kl_loss, jsd_loss], ids=['kd', 'reverse', 'jsd'])
def test_sixteen_bits_cost_no_more_than_their_own_rounding(divergence, kind):
    """Never negative, and gradients of 16 bits that are float64's for the same inputs, rounded once, where logits of 16
    bits would be far off: 4 to 23 % at https://github.com/linkedin/Liger-Kernel/issues/1432."""
    y, weight = asked(V=3000)
    for seed, dtype in product(range(2), (torch.bfloat16, torch.float16)):
        student, hidden = drawn(dtype, seed, V=3000, D=32)
        h, *head = (t.detach() for t in student)
        near = HiddenLogits(h + hidden.hidden[..., 2:] / 20, *head)
        teacher, v, places = teacher_of(kind, near, 1.)
        if kind == 'hidden': v = F.linear(*(t.double() for t in near))
        loss, doubles = DistillationLoss(1., 1., divergence), doubled(student)
        found = chunked_loss(loss, student, teacher, None, weight, 4)
        expected = reference(loss, doubles, v, y, weight, places)
        assert found['soft'].dtype == torch.float32 and all(g.dtype == dtype for g in slopes(found, student))
        assert found['soft'] >= 0
        close(found, expected, student, doubles, 1e-6, 3e-3)
        plain = loss.parts(student.logits(), teacher if kind == 'top' else v.to(dtype), y, weight)
        error = [(a.double() - b).norm() / b.norm() for a, b in zip(slopes(plain, student), slopes(expected, doubles))]
        if dtype == torch.bfloat16: assert min(error) > 0.02
        same = chunked_loss(loss, student, HiddenLogits(*(t.detach() for t in student)), None, weight)
        assert 0 <= same['soft'].item() <= 1e-12


@pytest.mark.parametrize('dtype, tol', [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_factors_of_16_bits_as_on_a_gpu(dtype, tol, monkeypatch):
    """A probability over thousands of tokens is 0 in float16, and the factor of a GradScaler comes only afterwards.
    Here it is all there is: without labels, from a teacher that is unsure of everything."""
    monkeypatch.setattr(chunks, '_precision', lambda hidden: dtype)
    N, V, D = 2048, 600, 8
    g = torch.Generator().manual_seed(0)
    h, W = torch.randn(2, N//2, D, generator=g), torch.randn(V, D, generator=g) / 30
    given = [t.to(dtype).float().requires_grad_() for t in (h, W)]
    doubles = doubled([*given, torch.zeros(V)])
    loss, v = DistillationLoss(1., 1.), torch.randn(2, N//2, V, generator=g)
    assert h.new_tensor(1 / V / N / 100).half() == 0  # what 1 % of a probability would have become
    expected = reference(loss, doubles, v.double(), None)
    for scale in (1., 2.**16):
        found = chunked_loss(loss, HiddenLogits(*given), v)
        ours = torch.autograd.grad(scale * sum(found.values()), given)
        for a, b in zip(ours, slopes(expected, doubles)): assert (a.double()/scale - b).norm() < tol * b.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kind', KINDS)
def test_on_a_gpu_products_of_16_bits_have_32(kind, dtype):
    student, hidden = drawn(dtype, V=3000, D=32)
    h, *head = (t.detach() for t in student)
    near = HiddenLogits(h + hidden.hidden[..., 2:] / 20, *head)
    teacher, v, places = teacher_of(kind, near, 1.)
    if kind == 'hidden': v = F.linear(*(t.double() for t in near))
    loss, doubles = DistillationLoss(1., 1.), doubled(student)
    def there(x): return x.cuda() if isinstance(x, torch.Tensor) else type(x)(*(t.cuda() for t in x))
    own = HiddenLogits(*(t.detach().cuda().requires_grad_() for t in student))
    found = chunked_loss(loss, own, there(teacher), chunk=4)
    expected = reference(loss, doubles, v, None, None, places)
    assert abs(found['soft'].item() - expected['soft'].item()) < 1e-6
    for a, b in zip(slopes(found, own), slopes(expected, doubles)):
        assert (a.cpu().double() - b).norm() < 4e-3 * b.norm()


def test_a_product_that_the_device_does_not_have_is_made_another_way():
    class Pretended(torch.Tensor):
        is_cuda = True
    a = torch.randn(3, 4).half()
    assert chunks._product(a.as_subclass(Pretended), a.T).dtype == torch.float32


@pytest.mark.parametrize('kind', ['hidden', 'tensor'])
def test_under_autocast_nothing_is_lost(kind):
    "The CPU multiplies in float32 all the same, and numbers of 64 bits keep them."
    for dtype in (torch.float32, torch.float64):
        student, hidden = drawn(dtype, V=50, D=8)
        y, weight = asked(V=50)
        loss, v = DistillationLoss(2., 0.5), hidden if kind == 'hidden' else hidden.logits()
        expected = chunked_loss(loss, student, v, y, weight, 4)
        with torch.autocast('cpu', torch.bfloat16): found = chunked_loss(loss, student, v, y, weight, 4)
        for a, b in zip(found.values(), expected.values()): assert a.equal(b)
        for a, b in zip(slopes(found, student), slopes(expected, student)): assert a.equal(b) and a.dtype == dtype
    mixed = HiddenLogits(student.hidden.bfloat16(), *(t.float() for t in student[1:]))
    with torch.autocast('cpu', torch.bfloat16): assert chunked_loss(loss, mixed, v, y)['soft'].isfinite()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('divergence', [kd_loss, jsd_loss, dkd_loss], ids=['kd', 'jsd', 'dkd'])
def test_student_and_teacher_may_be_of_different_types(divergence, kind):
    if kind == 'top' and divergence is dkd_loss: return
    types = torch.float64, torch.float32, torch.bfloat16
    for a, b in ((a, b) for a, b in product(types, types) if a != b):
        student, hidden = drawn(a)[0], drawn(b)[1]
        y, weight = asked()
        for T in (1., 2.):
            loss, doubles = DistillationLoss(T, 0.5, divergence), doubled(student)
            teacher, v, places = teacher_of(kind, hidden, T)
            if kind == 'hidden': v = F.linear(*(t.double() for t in hidden[:2]))
            found = chunked_loss(loss, student, teacher, y, weight)
            close(found, reference(loss, doubles, v, y, weight, places), student, doubles, 1e-5, 5e-3)


# ---- a bucket for the tail ----

def test_all_classes_but_one_and_a_bucket_are_all_classes():
    student, hidden = drawn()
    y, weight = asked()
    for T, alpha, divergence in product((1., 2.), (0.5, 1.), (kd_loss, reverse_kl_loss, jsd_loss)):
        loss = DistillationLoss(T, alpha, divergence)
        full = chunked_loss(loss, student, hidden, y, weight)
        kept = chunked_loss(loss, student, top_k(hidden.logits(), V - 1, T), y, weight)
        close(kept, full, student, student, 1e-12, 1e-12)


def test_a_bucket_never_adds_to_the_divergence():
    for seed in range(3):
        student, hidden = drawn(seed=seed)
        for T, divergence in ((1., kd_loss), (2., kd_loss), (1., reverse_kl_loss), (2., jsd_loss)):
            loss = DistillationLoss(T, 1., divergence)
            kept = [chunked_loss(loss, student, top_k(hidden.logits(), k, T))['soft'].item() for k in range(1, V)]
            full = chunked_loss(loss, student, hidden)['soft'].item()
            assert kept == sorted(kept) and kept[-1] == pytest.approx(full)


# ---- memory ----

class Made(TorchDispatchMode):
    "The sizes of the storages that operations give, by address, but those that were there."
    def __init__(self, *there): super().__init__(); self.there, self.sizes = {t.data_ptr() for t in there}, {}
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.there:
                self.sizes[f'{f}'] = max(self.sizes.get(f'{f}', 0), t.untyped_storage().nbytes())
        return out
    @property
    def most(self): return max(self.sizes.values())


@pytest.mark.parametrize('kind', ['hidden', 'top'])
@pytest.mark.parametrize('divergence', [kd_loss, jsd_loss, dkd_loss], ids=['kd', 'jsd', 'dkd'])
def test_nothing_has_the_size_of_all_logits(divergence, kind):
    "Not on the way forward and not on the way back; the largest is a chunk's logits."
    if kind == 'top' and divergence is dkd_loss: return
    shape, V, D, chunk = (4, 32), 300, 8, 10
    student, hidden = drawn(torch.float32, shape=shape, V=V, D=D)
    teacher, *_ = teacher_of(kind, hidden, 2.)
    y, weight = torch.randint(V, shape), torch.ones(shape)
    loss = DistillationLoss(2., 0.5, divergence, label_smoothing=0.1)
    for w in (None, weight):
        with Made(*student, *(t for t in hidden if t is not None)) as made:
            sum(chunked_loss(loss, student, teacher, y, w, chunk).values()).backward()
        assert made.most <= (8 if divergence is dkd_loss else 4) * chunk * V, made.sizes  # dkd lists classes in int64
    with Made() as made: loss(student.logits(), hidden.logits(), y).backward()
    assert made.most >= 4 * 4 * 32 * V


def test_no_gradient_is_made_that_nobody_wants():
    "Under no_grad, and for a frozen head, whose gradient would be the largest tensor."
    student, hidden = drawn(torch.float32, shape=(2, 6), V=400, D=64)
    y, loss = torch.randint(400, (2, 6)), DistillationLoss(1., 0.5)
    h, W, b = student
    def most(given):
        with Made(h, W, b, *hidden[:2]) as made: total = sum(chunked_loss(loss, given, hidden, y, chunk=2).values())
        return total, made.most
    total, size = most(student)
    assert size == 4 * W.numel()
    with torch.no_grad(): without, size = most(student)
    assert size < 4 * W.numel() and not without.requires_grad and without == total
    frozen, size = most(HiddenLogits(h, W.detach(), b.detach()))
    assert size < 4 * W.numel() and frozen.equal(total)
    assert torch.autograd.grad(frozen, h)[0].equal(torch.autograd.grad(total, h)[0])


# ---- beside autograd ----

def test_the_two_parts_have_one_gradient():
    student, hidden = drawn()
    y, _ = asked()
    def parts(alpha=0.5): return chunked_loss(DistillationLoss(1., alpha), student, hidden, y)
    once, thrice = slopes(parts(), student), torch.autograd.grad(3 * sum(parts().values()), student)
    for a, b in zip(once, thrice): torch.testing.assert_close(3 * a, b)
    total = sum(parts().values())
    kept = [torch.autograd.grad(total, student, retain_graph=True) for _ in range(2)]
    assert all(a.equal(b) for a, b in zip(*kept))
    for wrong in (lambda p: p['hard'], lambda p: p['soft'], lambda p: p['hard'] + 2*p['soft']):
        with pytest.raises(RuntimeError, match='call backward on their sum'): wrong(parts()).backward()
    for alpha in (0., 1.):  # a part that is left out is 0, and its sum with the other is as good as the other
        found = parts(alpha)
        only = found['hard' if alpha == 0 else 'soft']
        assert found['soft' if alpha == 0 else 'hard'] == 0 and only.requires_grad
        a, b = torch.autograd.grad(only, student, retain_graph=True), slopes(found, student)
        assert all(x.equal(y) for x, y in zip(a, b))


def test_the_teacher_gets_no_gradient():
    student, hidden = drawn()
    v, t = hidden.logits().requires_grad_(), hidden.hidden.requires_grad_()
    for teacher in (v, hidden, top_k(v, 2)):
        sum(chunked_loss(DistillationLoss(1., 1.), student, teacher).values()).backward()
    assert v.grad is None and t.grad is None


def small_gpt(seed=0, V=37):
    torch.manual_seed(seed)
    return GPT(V, 8, 8, 1, 2)


def test_tied_weights_get_the_gradient_of_both_ends():
    model, x, y = small_gpt(), *torch.randint(37, (2, 3, 8))
    v, loss = torch.randn(3, 8, 37), DistillationLoss(2., 0.5)
    found = []
    for parts in (loss.parts(model(x), v, y), chunked_loss(loss, hidden_logits(model, x), v, y, chunk=5)):
        model.zero_grad()
        sum(parts.values()).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert model.head.weight is model.wte.weight
    for a, b in zip(*found): torch.testing.assert_close(a, b)


class Next(Objective):
    "Word-level distillation from a fixed teacher, in chunks or plain."
    def __init__(self, model, teacher, chunk=None, plain=False):
        super().__init__(model)
        self.teacher, self.chunk, self.plain = [teacher], chunk, plain
        self.loss = DistillationLoss(1., 0.5)

    def forward(self, batch):
        with torch.no_grad(): v = self.teacher[0](batch.x)
        if self.plain: return self.loss.parts(self.model(batch.x), v, batch.y, weight=batch.weight)
        return chunked_loss(self.loss, hidden_logits(self.model, batch.x), v, batch.y, batch.weight, self.chunk)


def weights_after(**kwargs):
    recipe = kwargs.pop('recipe', {})
    objective = Next(small_gpt(1, 3), small_gpt(2, 3), **kwargs)
    history = fit(objective, Texts(), RECIPE.__class__(**vars(RECIPE) | recipe), device='cpu')
    losses = torch.tensor(list(history.losses.values())).sum(0).tolist()
    return losses, list(objective.model.parameters())


@pytest.mark.parametrize('recipe', [{}, {'accumulate': 4}, {'precision': 'bfloat16'}], ids=['whole', 'pieces', 'bf16'])
def test_a_run_is_that_of_the_plain_loss(recipe):
    "Texts of unequal lengths; in four pieces it is the run in one."
    plain, a = weights_after(plain=True)
    found, b = weights_after(chunk=7, recipe=recipe)
    tol = 2e-2 if 'precision' in recipe else 1e-5
    assert plain == pytest.approx(found, rel=tol)
    for x, y in zip(a, b): torch.testing.assert_close(x, y, rtol=tol, atol=tol)


TOGETHER = """
from test_chunks import weights_after
def run():
    losses, weights = weights_after(chunk=7)
    return losses, [w.flatten().tolist() for w in weights]
"""

def test_two_processes_reach_the_weights_of_one(tmp_path):
    (one, losses, weights), (two, others, theirs) = alone_and_together(TOGETHER, tmp_path)
    assert (one, two) == (1, 2) and losses == pytest.approx(others, rel=1e-5)
    for a, b in zip(weights, theirs): assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_a_gradient_scaler_finds_the_gradient_it_expects():
    student, hidden = drawn(torch.float32)
    y, _ = asked()
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)
    optimizer = torch.optim.SGD(list(student), lr=1.)
    before = [t.detach().clone() for t in student]
    total = sum(chunked_loss(DistillationLoss(1., 0.5), student, hidden, y).values())
    expected = torch.autograd.grad(total, student, retain_graph=True)
    scaler.scale(total).backward()
    scaler.step(optimizer)
    for t, b, g in zip(student, before, expected): torch.testing.assert_close(t.detach(), b - g)


def test_compiled_code_steps_around_the_walk():
    model, x, y = small_gpt(), *torch.randint(37, (2, 3, 8))
    loss = DistillationLoss(1., 0.5)
    v = torch.randn(3, 8, 37)
    def step(x, v, y): return sum(chunked_loss(loss, hidden_logits(model, x), v, y).values())
    torch._dynamo.reset()
    graphs = []
    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph
    found, expected = torch.compile(step, backend=backend)(x, v, y), step(x, v, y)
    assert graphs and not any('softmax' in g for g in graphs)
    for a, b in zip(*(torch.autograd.grad(t, model.parameters()) for t in (found, expected))):
        torch.testing.assert_close(a, b)


# ---- models ----

def test_only_a_linear_head_that_nobody_hears_is_passed_over():
    x, model = torch.randint(37, (3, 8)), small_gpt()
    torch.testing.assert_close(hidden_logits(model, x).logits(), model(x))
    def without(change):
        other = copy.deepcopy(model)
        change(other)
        return hidden_logits(other, x) is None
    class Capped(nn.Linear):
        def forward(self, x): return 30 * torch.tanh(super().forward(x) / 30)
    assert without(lambda m: setattr(m, 'head', Capped(8, 37)))
    assert without(lambda m: setattr(m, 'head', nn.Sequential(nn.Linear(8, 37))))
    assert without(lambda m: setattr(m, 'head', nn.Conv1d(8, 37, 1)))
    assert without(lambda m: m.head.register_forward_hook(lambda *_: None))
    assert without(lambda m: m.head.register_forward_pre_hook(lambda *_: None))
    assert without(lambda m: setattr(m, 'hidden', None))
    assert without(lambda m: delattr(m, 'head'))
    model.head = nn.Linear(8, 37)
    assert hidden_logits(model, x).bias is model.head.bias


# ---- refusals ----

def test_what_does_not_fit_is_refused_before_any_work(monkeypatch):
    (h, W, b), hidden = drawn(torch.float32)
    own, v, (y, weight), loss = HiddenLogits(h, W, b), hidden.logits(), asked(), DistillationLoss(2., 0.5)
    monkeypatch.setattr(chunks, '_shares', lambda *_: pytest.fail('work has begun'))
    def no(words, *args, **kwargs):
        with pytest.raises(ValueError, match=words): chunked_loss(*args, **kwargs)
    no('the weight of student must be of shape', loss, HiddenLogits(h, W.T, b), v, y)
    no('the weight of student must be of shape', loss, HiddenLogits(h, W[0], b), v, y)
    no('the bias of student must be of shape', loss, HiddenLogits(h, W, b[:2]), v, y)
    no('the weight of student must be torch.float32', loss, HiddenLogits(h, W.half(), b), v, y)
    no('the weight of teacher must be of shape', loss, own, HiddenLogits(h, W.T), y)
    no('student must have the shape', loss, HiddenLogits(h[:0], W, b), v[:0], y[:0])
    no('the shape of teacher must be', loss, own, v[..., :-1], y)
    no('the shape of teacher must be', loss, own, HiddenLogits(hidden.hidden, hidden.weight[1:]), y)
    no('the shape of teacher must be', loss, own, v[:2], y)
    no('the shape of teacher must be', loss, own, top_k(v[:2], 2, 2.), y)
    no('one that names classes', loss, own, TopK(v[..., :1], torch.full((B, L, 1), V), v[..., :1]), y)
    no('teacher must be given', loss, own, None, y)
    no('labels must be integers', loss, own, v)
    no('labels must be integers', loss, own, v, v.softmax(-1))
    no('labels must lie in', loss, own, v, y + V)
    no('weight must be', loss, own, v, y, weight[0])
    no('weight must be', loss, own, v, y, -weight)
    for chunk in (0, -1, 1.5): no('chunk must be a whole number', loss, own, v, y, None, chunk)
    no('the divergence of loss must be one that gives a loss for each place',
       DistillationLoss(1., 0.5, dist_loss), own, v, y)
    no('the divergence of loss must be', DistillationLoss(1., 0.5, partial(kd_loss, reduction='sum')), own, v, y)
    no('all classes for dkd_loss', DistillationLoss(1., 0.5, dkd_loss), own, top_k(v, 2), y)
    no('class_weights must be', DistillationLoss(1., 0.5, class_weights=torch.ones(3)), own, v, y)
    no('student must be', loss, v, v, y)


def test_what_has_no_part_is_not_looked_at():
    student, hidden = drawn()
    y, _ = asked()
    assert chunked_loss(DistillationLoss(1., 0., dist_loss), student, None, y)['soft'] == 0
    assert chunked_loss(DistillationLoss(1., 1.), student, hidden, y + 1000)['hard'] == 0
    assert chunked_loss(DistillationLoss(1., 1.), student, hidden)['hard'] == 0


# ---- beside TRL ----

def test_beside_the_losses_of_trl():
    """TRL (1.16) and this library, same logits: `GKDTrainer.generalized_jsd_loss` and Agarwal et al. 2024, eq. 1.

    They agree, values and gradients, where all places count alike and T = 1. They differ in three things.

    - TRL's 'batchmean' divides by the tokens that have a label, over the whole batch; ours takes the mean of each row
      first. The paper writes the mean over a sequence's tokens and then the expectation over sequences: ours.
    - At a temperature the paper defines no factor (it uses T = 1 in training), so TRL's loss is 1/T² of ours, whose T²
      is that of Hinton et al. 2015, section 2; gradients shrink with it.
    - beta = 0 and 1 are the two KL divergences in TRL, although JSD_β of eq. 1 is 0 there; they are the limits of
      JSD_β / β and JSD_β / (1 - β), and here have names of their own.
    """
    trl = pytest.importorskip('trl.experimental.gkd.gkd_trainer')
    theirs = trl.GKDTrainer.generalized_jsd_loss
    student, hidden = drawn(V=200, D=8)
    z, v = student.logits(), hidden.logits()
    y = torch.randint(200, (B, L))
    def same(loss, labels=None, factor=1., weight=None, **kwargs):
        a, b = chunked_loss(loss, student, hidden, y, weight, 4), factor * theirs(z, v, labels, **kwargs)
        torch.testing.assert_close(sum(a.values()), b)
        for p, q in zip(slopes(a, student), torch.autograd.grad(b, student, retain_graph=True)):
            torch.testing.assert_close(p, q)
    for T in (1., 2.):
        for beta in (0.1, 0.5, 0.9):
            same(DistillationLoss(T, 1., partial(jsd_loss, beta=beta)), y, T**2, beta=beta, temperature=T)
        same(DistillationLoss(T, 1., kd_loss), y, T**2, beta=0, temperature=T)
        same(DistillationLoss(T, 1., reverse_kl_loss), y, T**2, beta=1, temperature=T)
    # Without labels TRL divides by the rows alone.
    ours = chunked_loss(DistillationLoss(1., 1., jsd_loss), student, hidden)['soft']
    torch.testing.assert_close(theirs(z, v), L * ours)
    # The ends: eq. 1 goes to 0 there, and only divided by beta to a KL.
    calm = [HiddenLogits(t.hidden / 5, *t[1:]) for t in (student, hidden)]
    def jsd_at(beta): return chunked_loss(DistillationLoss(1., 1., partial(jsd_loss, beta=beta)), *calm)['soft'] * B * L
    logits = [t.logits() for t in calm]
    for beta, end in ((1e-6, 0), (1 - 1e-6, 1)):
        near = jsd_at(beta)
        assert 0 < near < 1e-3
        torch.testing.assert_close(near / 1e-6, theirs(*logits, beta=end, reduction='sum'), rtol=1e-3, atol=0)
    # Rows of unequal length: the mean over tokens of the batch is not the mean over rows of their means.
    weight = (torch.arange(L) < torch.tensor([1, 3, 5])[:, None]).double()
    labels = torch.where(weight > 0, y, UNLABELLED)
    with pytest.raises(AssertionError): same(DistillationLoss(1., 1., jsd_loss), labels, weight=weight)
    p, q = softmax(v), softmax(z)
    ours = chunked_loss(DistillationLoss(1., 1., jsd_loss), student, hidden, y, weight)['soft']
    torch.testing.assert_close(ours, mean(jsd(p, q, 0.5), weight))
    # Equal lengths leave both means the same.
    same(DistillationLoss(1., 1., jsd_loss), torch.where(torch.arange(L) < 3, y, UNLABELLED),
         weight=(torch.arange(L) < 3).double().expand(B, L))
