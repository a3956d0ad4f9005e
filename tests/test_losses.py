"""Every loss against a float64 reference that is written from its paper's equation, one number at a time.

The references below share nothing with the library: plain loops over float64 scalars, probabilities computed
the way the papers write them. Their gradients come from autograd over these loops or from finite differences.
"""
import copy, decimal, math, re
from decimal import Decimal
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

import distill_nb.successors as successors
from distill_nb.rows import UNLABELLED, rows_there, standardize, upcast
from distill_nb.losses import DistillationLoss, collapse, hard_loss, kd_loss, log_soften, top_k
from distill_nb.successors import dist_loss, dkd_loss, jsd_loss, reverse_kl_loss
from distill_nb.theory import entropy, soften

quick = settings(deadline=None, max_examples=20)


# ---- references: float64, one scalar at a time ----

def probabilities(row, T):
    "exp(z_i / T) / sum_j exp(z_j / T), with the largest taken out as a constant."
    top = max(v.item() for v in row)
    e = [torch.exp((v - top) / T) for v in row]
    total = sum(e)
    return [x / total for x in e]

def ref_kl(p, q): return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q))

def rows(x): return [[x[b, c] for c in range(x.shape[1])] for b in range(x.shape[0])]

def pairs(z, v, T): return [(probabilities(a, T), probabilities(b, T)) for a, b in zip(rows(z), rows(v))]  # (q, p)

def ref_kd(z, v, T): return T**2 * sum(ref_kl(p, q) for q, p in pairs(z, v, T)) / len(z)

def ref_reverse(z, v, T): return T**2 * sum(ref_kl(q, p) for q, p in pairs(z, v, T)) / len(z)

def ref_jsd(z, v, T, beta):
    total = 0.
    for q, p in pairs(z, v, T):
        m = [beta * a + (1 - beta) * b for a, b in zip(p, q)]
        total = total + beta * ref_kl(p, m) + (1 - beta) * ref_kl(q, m)
    return T**2 * total / len(z)

def ref_ce(z, y):
    return sum(-torch.log(probabilities(row, 1.)[t]) for row, t in zip(rows(z), y) if t != UNLABELLED) / len(z)

def ref_dkd(z, v, y, T, alpha, beta):
    total = 0.
    for (q, p), t in zip(pairs(z, v, T), y):
        rest_p, rest_q = (sum(x for i, x in enumerate(d) if i != t) for d in (p, q))
        tckd = p[t] * torch.log(p[t] / q[t]) + rest_p * torch.log(rest_p / rest_q)
        others = [(a / rest_p, b / rest_q) for i, (a, b) in enumerate(zip(p, q)) if i != t]
        nckd = sum(a * torch.log(a / b) for a, b in others)
        total = total + alpha * tckd + beta * nckd
    return T**2 * total / len(z)

def ref_pearson(a, b):
    n = len(a)
    ma, mb = sum(a) / n, sum(b) / n
    cov = sum((x - ma) * (y - mb) for x, y in zip(a, b))
    return cov / torch.sqrt(sum((x - ma)**2 for x in a) * sum((y - mb)**2 for y in b))

def ref_dist(z, v, T, inter, intra):
    both = pairs(z, v, T)
    by_row = sum(1 - ref_pearson(q, p) for q, p in both) / len(both)
    columns = [([q[c] for q, _ in both], [p[c] for _, p in both]) for c in range(z.shape[1])]
    by_column = sum(1 - ref_pearson(q, p) for q, p in columns) / len(columns)
    return T**2 * (inter * by_row + intra * by_column)

def ref_standardize(z):
    out = []
    for row in rows(z):
        mean = sum(row) / len(row)
        sigma = torch.sqrt(sum((x - mean)**2 for x in row) / len(row))
        out.append(torch.stack([(x - mean) / sigma for x in row]))
    return torch.stack(out)


# ---- references: 60 digits, where float64 is not enough; a masked class has no entry ----

def exact_soften(row, T):
    "Probabilities of the classes that are not masked, as {class: number}."
    logits = {c: Decimal(x) / Decimal(T) for c, x in enumerate(row) if x != -math.inf}
    top = max(logits.values())
    e = {c: (x - top).exp() for c, x in logits.items()}
    return {c: x / sum(e.values()) for c, x in e.items()}

def exact_kl(p, q): return sum(a * (a / q[c]).ln() for c, a in p.items())

def exact_jsd(q, p, beta):
    beta = Decimal(beta)
    m = {c: beta * p.get(c, 0) + (1 - beta) * q.get(c, 0) for c in {*p, *q}}
    return beta * exact_kl(p, m) + (1 - beta) * exact_kl(q, m)

def exact_target(q, p, t):
    "KL of (target, all others)."
    return exact_kl(*({0: d[t], 1: sum(x for c, x in d.items() if c != t)} for d in (p, q)))

def exact_others(q, p, t):
    "KL among the classes other than the target."
    def rest(d):
        others = {c: x for c, x in d.items() if c != t}
        return {c: x / sum(others.values()) for c, x in others.items()}
    return exact_kl(rest(p), rest(q))

def exact(equation, z, v, T, labels=None):
    "T² times the mean of a divergence over the rows, with its gradient in z by central differences of 60 digits."
    z, v, T = z.double().tolist(), v.double().tolist(), Decimal(T)
    more = [()] * len(z) if labels is None else [(t,) for t in labels.tolist()]
    def row(student, teacher, extra):
        return T**2 * equation(exact_soften(student, T), exact_soften(teacher, T), *extra) / len(z)
    def slope(student, teacher, extra, c):
        if student[c] == -math.inf: return 0.
        h = T * Decimal('1e-25')
        up, down = ([Decimal(x) + (step if i == c else 0) for i, x in enumerate(student)] for step in (h, -h))
        return float((row(up, teacher, extra) - row(down, teacher, extra)) / (2 * h))
    with decimal.localcontext(decimal.Context(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)):
        value = float(sum(row(*r) for r in zip(z, v, more)))
        grad = [[slope(*r, c) for c in range(len(r[0]))] for r in zip(z, v, more)]
        return value, torch.tensor(grad, dtype=torch.float64)


# ---- what every comparison uses ----

def draw(seed, B, C, scale):
    "Student, teacher and labels that depend on `seed` alone, in float64."
    g = torch.Generator().manual_seed(seed)
    z, v = (scale * torch.randn(B, C, generator=g, dtype=torch.float64) for _ in range(2))
    return z, v, torch.randint(C, (B,), generator=g)

cases = dict(seed=st.integers(0, 2**31), B=st.integers(2, 4), C=st.integers(3, 5), scale=st.sampled_from([0.1, 1., 4.]),
             T=st.sampled_from([0.7, 1., 3., 4., 20.]))

def value_and_grad(loss, z):
    z = z.detach().clone().requires_grad_()
    out = loss(z)
    return out.detach(), torch.autograd.grad(out, z)[0]

def compare(loss, reference, z, rtol=1e-8, atol=1e-11):
    "Same value and same gradient in float64; the float32 run within float32's error."
    (a, ga), (b, gb) = value_and_grad(loss, z), value_and_grad(reference, z)
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    torch.testing.assert_close(ga, gb, rtol=rtol, atol=atol)
    assert a.dtype == torch.float64 and a.shape == ()

def losses(y):
    "Every loss as a function of (student, teacher), by name."
    return {'kd': kd_loss, 'reverse': reverse_kl_loss, 'jsd': jsd_loss, 'jsd_0.1': partial(jsd_loss, beta=0.1),
            'dist': dist_loss, 'dkd': lambda z, v: dkd_loss(z, v, y),
            'combined': lambda z, v: DistillationLoss()(z, v, y),
            'standardised': lambda z, v: DistillationLoss(standardize=True)(z, v, y),
            'standardised_dist': lambda z, v: DistillationLoss(divergence=dist_loss, standardize=True)(z, v, y)}

every_loss = pytest.mark.parametrize('name', losses(None))


# ---- values and gradients ----

@quick
@given(**cases)
def test_kd(seed, B, C, scale, T):
    z, v, _ = draw(seed, B, C, scale)
    compare(lambda z: kd_loss(z, v, T), lambda z: ref_kd(z, v, T), z)

@quick
@given(**cases)
def test_reverse_kl(seed, B, C, scale, T):
    z, v, _ = draw(seed, B, C, scale)
    compare(lambda z: reverse_kl_loss(z, v, T), lambda z: ref_reverse(z, v, T), z)

@quick
@given(beta=st.sampled_from([0.05, 0.3, 0.5, 0.9]), **cases)
def test_jsd(seed, B, C, scale, T, beta):
    z, v, _ = draw(seed, B, C, scale)
    compare(lambda z: jsd_loss(z, v, T, beta), lambda z: ref_jsd(z, v, T, beta), z, rtol=1e-7)

@quick
@given(alpha=st.sampled_from([0., 1., 0.5]), beta=st.sampled_from([0., 1., 8.]), **cases)
def test_dkd(seed, B, C, scale, T, alpha, beta):
    z, v, y = draw(seed, B, C, scale)
    compare(lambda z: dkd_loss(z, v, y, T, alpha, beta), lambda z: ref_dkd(z, v, y, T, alpha, beta), z, rtol=1e-7)

@quick
@given(inter=st.sampled_from([0., 1., 2.]), intra=st.sampled_from([0., 1., 3.]), **cases)
def test_dist(seed, B, C, scale, T, inter, intra):
    z, v, _ = draw(seed, B, C, scale)
    compare(lambda z: dist_loss(z, v, T, inter, intra), lambda z: ref_dist(z, v, T, inter, intra), z,
            rtol=1e-5, atol=1e-7)

@quick
@given(**cases)
def test_standardize(seed, B, C, scale, T):
    z, v, _ = draw(seed, B, C, scale)
    torch.testing.assert_close(standardize(z), ref_standardize(z))
    compare(lambda z: DistillationLoss(T, 1., standardize=True)(z, v),
            lambda z: ref_kd(ref_standardize(z), ref_standardize(v), T), z, rtol=1e-6, atol=1e-9)

@quick
@given(alpha=st.floats(0, 1), unlabelled=st.integers(0, 4), **cases)
def test_combined(seed, B, C, scale, T, alpha, unlabelled):
    z, v, y = draw(seed, B, C, scale)
    y[:unlabelled] = UNLABELLED
    def by_hand(z): return (1 - alpha) * ref_ce(z, y) + alpha * ref_kd(z, v, T) + 0 * z.sum()
    compare(lambda z: DistillationLoss(T, alpha)(z, v, y), by_hand, z)

@quick
@given(**{k: cases[k] for k in ('seed', 'B', 'C', 'scale')})
def test_hard_loss_with_smoothing(seed, B, C, scale):
    z, _, y = draw(seed, B, C, scale)
    y[0] = UNLABELLED
    def reference(z, s=0.1):
        total = 0. * z.sum()
        for row, t in zip(rows(z), y):
            if t == UNLABELLED: continue
            logs = [torch.log(x) for x in probabilities(row, 1.)]
            total = total - (1 - s) * logs[t] - s * sum(logs) / C
        return total / B
    compare(lambda z: hard_loss(z, y, 0.1), reference, z)

@pytest.mark.parametrize('name', ['kd', 'reverse', 'jsd_0.1', 'dist', 'dkd', 'combined', 'standardised'])
def test_gradients_by_finite_differences(name):
    z, v, y = draw(3, 4, 5, 1.)
    assert torch.autograd.gradcheck(lambda z: losses(y)[name](z, v), z.requires_grad_())


# ---- laws ----

@quick
@given(**cases)
def test_kd_gradient_is_T_times_the_difference(seed, B, C, scale, T):
    z, v, _ = draw(seed, B, C, scale)
    _, grad = value_and_grad(lambda z: kd_loss(z, v, T), z)
    torch.testing.assert_close(grad, T * ((z / T).softmax(1) - (v / T).softmax(1)) / B)

def test_kd_at_high_temperature_is_logit_matching():
    z, v, _ = draw(0, 6, 10, 2.)
    z, v = (x - x.mean(1, keepdim=True) for x in (z, v))
    _, grad = value_and_grad(lambda z: kd_loss(z, v, 1e5), z)
    torch.testing.assert_close(6 * grad, (z - v) / 10, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(kd_loss(z, v, 1e5), (z - v).square().sum(1).mean() / 20, rtol=1e-3, atol=1e-5)

def test_temperature_squared_keeps_the_size_of_the_gradient():
    z, v, y = draw(1, 32, 10, 2.)
    for divergence in (kd_loss, reverse_kl_loss, jsd_loss, lambda z, v, temperature: dkd_loss(z, v, y, temperature)):
        size = [value_and_grad(lambda z: divergence(z, v, temperature=T), z)[1].norm() for T in (8, 64)]
        assert 0.5 < size[1] / size[0] < 2
        without = [s / T**2 for s, T in zip(size, (8, 64))]
        assert without[0] / without[1] > 30

def test_dist_pulls_with_the_square_of_the_temperature():
    "A correlation has no scale that a temperature could shrink, so T² stays."
    z, v, _ = draw(1, 32, 10, 2.)
    size = [value_and_grad(lambda z: dist_loss(z, v, T), z)[1].norm() / T**2 for T in (8, 64)]
    assert 0.8 < size[1] / size[0] < 1.25

@every_loss
def test_student_equal_to_teacher(name):
    z, _, y = draw(5, 8, 6, 3.)
    if name.startswith('combined') or name.startswith('standardised'): y = torch.full_like(y, UNLABELLED)
    for x in (z, z.float()):
        value, grad = value_and_grad(lambda s: losses(y)[name](s, x), x)
        assert abs(value) < 1e-6 and grad.abs().max() < 1e-6

@every_loss
def test_never_negative(name):
    for seed in range(20):
        z, v, y = draw(seed, 4, 6, 3.)
        assert losses(y)[name](z, v) > 0

@every_loss
def test_a_shift_of_a_row_changes_nothing(name):
    z, v, y = draw(2, 4, 6, 3.)
    shift = torch.tensor([[5.], [-3.], [100.], [0.]], dtype=torch.float64)
    torch.testing.assert_close(losses(y)[name](z + shift, v - 2 * shift), losses(y)[name](z, v))

@every_loss
def test_order_of_rows_and_classes_does_not_matter(name):
    z, v, y = draw(2, 5, 6, 3.)
    r, c = torch.randperm(5), torch.randperm(6)
    where = c.argsort()
    torch.testing.assert_close(losses(where[y][r])[name](z[r][:, c], v[r][:, c]), losses(y)[name](z, v))

def test_alpha_zero_is_cross_entropy_exactly():
    for dtype in (torch.float32, torch.float64):
        z, v, y = draw(7, 16, 10, 3.)
        z = z.to(dtype)
        for teacher in (v, None, torch.full_like(v, math.nan)):
            value, grad = value_and_grad(lambda z: DistillationLoss(alpha=0)(z, teacher, y), z)
            want, want_grad = value_and_grad(lambda z: F.cross_entropy(z, y), z)
            assert torch.equal(value, want)
            torch.testing.assert_close(grad, want_grad)

def test_alpha_one_ignores_labels():
    z, v, y = draw(7, 16, 10, 3.)
    loss = DistillationLoss(temperature=3, alpha=1)
    want = kd_loss(z, v, 3)
    for labels in (y, None, y.flip(0), torch.full_like(y, UNLABELLED), torch.full_like(y, 999)):
        assert torch.equal(loss(z, v, labels), want)

def test_at_temperature_one_the_loss_is_a_mixed_target():
    z, v, y = draw(8, 8, 5, 2.)
    target = 0.4 * F.one_hot(y, 5) + 0.6 * v.softmax(1)
    _, grad = value_and_grad(lambda z: DistillationLoss(1., 0.6)(z, v, y), z)
    torch.testing.assert_close(grad, (z.softmax(1) - target) / 8)

@quick
@given(**cases)
def test_dkd_identity(seed, B, C, scale, T):
    z, v, y = draw(seed, B, C, scale)
    p_t = (v / T).softmax(1)[range(B), y]
    compare(lambda z: dkd_loss(z, v, y, T, alpha=1., beta=1 - p_t), lambda z: kd_loss(z, v, T), z, rtol=1e-6)
    tckd, nckd = (dkd_loss(z, v, y, T, a, b, reduction='none') for a, b in ((1., 0.), (0., 1.)))
    torch.testing.assert_close(tckd + (1 - p_t) * nckd, kd_loss(z, v, T, reduction='none'))

def test_dkd_takes_the_first_choice_of_the_teacher_for_unlabelled_rows():
    z, v, y = draw(9, 6, 5, 2.)
    y[::2] = UNLABELLED
    assert torch.equal(dkd_loss(z, v, y), dkd_loss(z, v, torch.where(y < 0, v.argmax(1), y)))

def test_dkd_keeps_teaching_when_the_teacher_is_certain():
    "With 1 - p_t far below float32's resolution, the non-target part is still right."
    z, v, y = draw(10, 4, 5, 1.)
    v[range(4), y] += 200
    nckd = dkd_loss(z.float(), v.float(), y, 1., 0., 1.)
    rest = lambda x: torch.stack([torch.cat([r[:t], r[t + 1:]]) for r, t in zip(x, y)])
    torch.testing.assert_close(nckd.double(), ref_kd(rest(z), rest(v), 1.), rtol=1e-4, atol=1e-6)

@quick
@given(scale=st.floats(0.01, 100), shift=st.floats(-50, 50), seed=st.integers(0, 1000))
def test_standardised_loss_ignores_scale_and_shift(scale, shift, seed):
    z, v, _ = draw(seed, 4, 6, 2.)
    loss = DistillationLoss(2., 1., standardize=True)
    torch.testing.assert_close(loss(scale * z + shift, v), loss(z, v), rtol=1e-6, atol=1e-9)
    s = standardize(scale * z + shift)
    torch.testing.assert_close(s.mean(1), torch.zeros(4, dtype=s.dtype), atol=1e-9, rtol=0)
    torch.testing.assert_close(s.std(1, correction=0), torch.ones(4, dtype=s.dtype))

@quick
@given(shift=st.floats(0.0, 0.15), share=st.floats(0.05, 1), seed=st.integers(0, 1000))
def test_dist_ignores_positive_affine_maps_of_the_probabilities(shift, share, seed):
    z, v, _ = draw(seed, 6, 5, 2.)
    q = z.softmax(1)
    blurred = ((1 - share) / 5 + share * q).log()
    torch.testing.assert_close(dist_loss(blurred, v), dist_loss(z, v), rtol=1e-6, atol=1e-8)
    assert dist_loss(((1 - share) / 5 + share * v.softmax(1)).log(), v) < 1e-8

def test_dist_lies_between_zero_and_twice_its_weights():
    z, v, _ = draw(4, 6, 5, 3.)
    assert 0 <= dist_loss(z, v, 1., 1., 0.) <= 2 and 0 <= dist_loss(z, v, 1., 0., 1.) <= 2
    two = lambda *first: torch.tensor([[f, 1 - f] for f in first], dtype=torch.float64).log()
    torch.testing.assert_close(dist_loss(two(0.6, 0.7), two(0.9, 0.6), 1., 0., 1.).item(), 2.)

@quick
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 2., 50., 1e4]))
def test_jsd_is_symmetric_and_bounded(seed, scale):
    z, v, _ = draw(seed, 4, 6, scale)
    torch.testing.assert_close(jsd_loss(z, v, 1.), jsd_loss(v, z, 1.))
    torch.testing.assert_close(jsd_loss(z, v, 1., 0.2), jsd_loss(v, z, 1., 0.8))
    assert -1e-12 <= jsd_loss(z, v, 1.) <= math.log(2) + 1e-12

def test_jsd_tends_to_both_divergences():
    z, v, _ = draw(11, 4, 6, 2.)
    torch.testing.assert_close(jsd_loss(z, v, 2., 1e-6) / 1e-6, kd_loss(z, v, 2.), rtol=1e-4, atol=0)
    torch.testing.assert_close(jsd_loss(z, v, 2., 1 - 1e-6) / 1e-6, reverse_kl_loss(z, v, 2.), rtol=1e-4, atol=0)

def test_reverse_is_forward_with_the_sides_exchanged():
    z, v, _ = draw(12, 4, 6, 2.)
    assert torch.equal(reverse_kl_loss(z, v), kd_loss(v, z))
    assert (reverse_kl_loss(z, v) - kd_loss(z, v)).abs() > 1e-3


# ---- right near the teacher, and at every temperature ----

def of_labels(loss, **weights): return lambda z, v, T, y, **kw: loss(z, v, y, T, **weights, **kw)

DIVERGENCES = {  # name: (loss of (student, teacher, T, labels), equation of (q, p) or (q, p, target))
    'kd': (lambda z, v, T, y, **kw: kd_loss(z, v, T, **kw), lambda q, p: exact_kl(p, q)),
    'reverse': (lambda z, v, T, y, **kw: reverse_kl_loss(z, v, T, **kw), exact_kl),
    **{f'jsd_{b}': (lambda z, v, T, y, b=b, **kw: jsd_loss(z, v, T, b, **kw), partial(exact_jsd, beta=b))
       for b in (0.5, 0.1, 0.999, 1e-6)},
    'tckd': (of_labels(dkd_loss, alpha=1., beta=0.), exact_target),
    'nckd': (of_labels(dkd_loss, alpha=0., beta=1.), exact_others)}

every_divergence = pytest.mark.parametrize('name', DIVERGENCES)

def exact_of(name, z, v, T, y):
    "Value and gradient as the equation has them."
    value, grad = exact(DIVERGENCES[name][1], z, v, T, y if name in ('tckd', 'nckd') else None)
    return torch.tensor(value, dtype=torch.float64), grad

def near(found, want, tolerance, scale):
    "Within `tolerance` of the size of `want`; what float32 can't hold counts as 0."
    return (found.double() - want).norm() <= tolerance * want.norm() + 1e-36 * scale

@every_divergence
@pytest.mark.parametrize('T', [1e-6, 1e-3, 0.1, 1., 4., 1e3, 1e6])
@pytest.mark.parametrize('noise', [10., 1., 1e-3, 1e-6])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_right_at_every_distance_and_temperature(name, T, noise, dtype):
    "Value and gradient within 1e-4 (float64: 1e-8), also where the student's logits are shifted as a whole."
    g = torch.Generator().manual_seed(31)
    v = 3 * torch.randn(3, 5, generator=g)
    z = v + noise * torch.randn(3, 5, generator=g) + torch.tensor([[0.], [10.], [-100.]])
    z, v, y = z.to(dtype), v.to(dtype), torch.tensor([0, 3, 4])
    value, grad = value_and_grad(lambda z: DIVERGENCES[name][0](z, v, T, y), z)
    want, want_grad = exact_of(name, z, v, T, y)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4
    assert value >= 0 and near(value, want, tolerance, max(T, 1.)**2)
    if dtype == torch.bfloat16: tolerance = 4e-3  # in which the gradient is returned
    assert near(grad, want_grad, tolerance, max(T, 1.))

def draw_anywhere(seed, C, scale, noise, shift, masked):
    "Logits of any size, at any distance, with or without masked classes; never all of them."
    g = torch.Generator().manual_seed(seed)
    v = 10**scale * torch.randn(4, C, generator=g)
    z = v + 10**(scale + noise) * torch.randn(4, C, generator=g) + shift
    hidden = (torch.rand(4, C, generator=g) < 0.3) & (torch.arange(C) > 0)
    for name, x in (('student', z), ('teacher', v)):
        if masked in (name, 'both'): x[hidden] = -math.inf
    return z, v, torch.randint(C, (4,), generator=g)

@every_divergence
@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**31), C=st.integers(2, 6), scale=st.floats(-8, 6), noise=st.floats(-12, 3),
       shift=st.floats(-1e4, 1e4), T=st.floats(-6, 6),
       masked=st.sampled_from(['nothing', 'student', 'teacher', 'both']))
def test_never_negative_and_no_nan(name, seed, C, scale, noise, shift, T, masked):
    "A divergence is never negative, and its gradient is a number, for all logits, masks and temperatures."
    z, v, y = draw_anywhere(seed, C, scale, noise, shift, masked)
    rows = lambda z, v: DIVERGENCES[name][0](z, v, 10**T, y, reduction='none')
    _, grad = value_and_grad(lambda z: rows(z, v).sum(), z)
    assert (rows(z, v) >= 0).all() and grad.isfinite().all()
    assert (rows(v.clone(), v) == 0).all()

def test_second_derivatives():
    z, v, y = draw(33, 3, 5, 1.)
    z, v = z.requires_grad_(), v.requires_grad_()
    for name, (loss, _) in DIVERGENCES.items():
        f = lambda z, v: loss(z, v, 2., y)
        assert torch.autograd.gradcheck(f, (z, v)) and torch.autograd.gradgradcheck(f, (z, v)), name

def test_functional_transforms_see_the_same_gradient():
    z, v, _ = draw(34, 3, 5, 1.)
    for loss in (kd_loss, jsd_loss):
        torch.testing.assert_close(torch.func.grad(loss)(z, v), value_and_grad(lambda z: loss(z, v), z)[1])
        torch.testing.assert_close(torch.vmap(lambda a, b: loss(a[None], b[None]))(z, v), loss(z, v, reduction='none'))

@pytest.mark.parametrize('name', ['kd', 'jsd_0.1', 'nckd'])
def test_compiled_divergences_are_as_precise(name):
    g = torch.Generator().manual_seed(35)
    v = 3 * torch.randn(3, 5, generator=g)
    z, y = v + 1e-3 * torch.randn(3, 5, generator=g), torch.tensor([0, 3, 4])
    compiled = torch.compile(DIVERGENCES[name][0], backend='aot_eager', fullgraph=True)
    value, grad = value_and_grad(lambda z: compiled(z, v, 1e6, y), z)
    want, want_grad = exact_of(name, z, v, 1e6, y)
    assert near(value, want, 1e-4, 1e12) and near(grad, want_grad, 1e-4, 1e6)


@pytest.mark.parametrize('T', [0.1, 1., 4., 100., 1e4, 1e6])
def test_dist_is_right_at_every_temperature(T):
    "In float32; at a high temperature it is T² times the distance of the logits' own correlations."
    z, v, _ = draw(32, 6, 5, 2.)
    value, grad = value_and_grad(lambda z: dist_loss(z, v.float(), T, 1., 2.), z.float())
    want, want_grad = value_and_grad(lambda z: ref_dist(z, v.float().double(), T, 1., 2.), z.float().double())
    assert near(value, want, 1e-4, 1) and near(grad, want_grad, 1e-4, 1)
    if T == 1e6:
        of_logits = T**2 * sum(1 - ref_pearson(a, b) for a, b in zip(z, v)) / 6
        assert near(dist_loss(z, v, T, 1., 0.), of_logits, 1e-4, 1)


# ---- masked classes ----

def hide(x, *classes): return x.clone().index_fill_(1, torch.tensor(classes), -math.inf)

@every_divergence
def test_a_class_masked_on_both_sides_is_not_there(name):
    z, v, _ = draw(36, 6, 5, 2.)
    y, loss = torch.tensor([0, 1, 2, 0, 1, 2]), DIVERGENCES[name][0]
    value, grad = value_and_grad(lambda z: loss(z, hide(v, 3, 4), 2., y), hide(z, 3, 4))
    want, want_grad = value_and_grad(lambda z: loss(z, v[:, :3], 2., y), z[:, :3])
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad, F.pad(want_grad, (0, 2)))

@every_divergence
def test_a_class_that_the_teacher_masks_has_probability_0(name):
    "What the student gives it is lost for KL(p ‖ q), and infinite for the reverse."
    z, v, _ = draw(37, 4, 5, 2.)
    z, v, y = z.float(), hide(v, 4).float(), torch.tensor([0, 1, 2, 3])
    value, grad = value_and_grad(lambda z: DIVERGENCES[name][0](z, v, 2., y), z)
    assert grad.isfinite().all()
    if name == 'reverse': assert value == math.inf
    else:
        want, want_grad = exact_of(name, z, v, 2., y)
        assert near(value, want, 1e-5, 1) and near(grad, want_grad, 1e-5, 1)

@every_divergence
def test_a_class_that_only_the_student_masks_is_infinitely_far(name):
    "KL(p ‖ q) is infinite where q is 0 and p is not; the others are finite, and no gradient is NaN."
    z, v, _ = draw(38, 4, 5, 2.)
    value, grad = value_and_grad(lambda z: DIVERGENCES[name][0](z, v, 2., torch.tensor([0, 1, 2, 3])), hide(z, 4))
    assert grad.isfinite().all() and (value == math.inf) == (name in ('kd', 'nckd'))

@every_loss
def test_every_loss_leaves_out_a_class_that_is_masked_on_both_sides(name):
    "Whichever rows mask it, and the same with label smoothing."
    z, v, _ = draw(40, 6, 5, 2.)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    value, grad = value_and_grad(lambda z: losses(y)[name](z, hide(v, 3, 4)), hide(z, 3, 4))
    want, want_grad = value_and_grad(lambda z: losses(y)[name](z, v[:, :3]), z[:, :3])
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad, F.pad(want_grad, (0, 2)))
    z, v = z.clone(), v.clone()
    for x in (z, v): x[:3, 4] = x[3:, 3] = -math.inf
    value, grad = value_and_grad(lambda z: losses(y)[name](z, v), z)
    assert value.isfinite() and grad.isfinite().all()

@every_loss
def test_no_gradient_is_nan_where_one_side_masks_a_class(name):
    z, v, _ = draw(41, 6, 5, 2.)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    for student, teacher in ((z, hide(v, 4)), (hide(z, 4), v)):
        value, grad = value_and_grad(lambda z: losses(y)[name](z, teacher), student)
        assert not value.isnan() and grad.isfinite().all()

def test_a_masked_class_gets_no_share_of_a_smoothed_label():
    z, _, _ = draw(42, 4, 5, 2.)
    y = torch.tensor([0, 1, UNLABELLED, 1])
    torch.testing.assert_close(hard_loss(z, y, 0.1), F.cross_entropy(z, y, label_smoothing=0.1, reduction='sum') / 4)
    value, grad = value_and_grad(lambda z: hard_loss(z, y, 0.1), hide(z, 2, 4))
    want, want_grad = value_and_grad(lambda z: hard_loss(z, y, 0.1), z[:, [0, 1, 3]])
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad[:, [0, 1, 3]], want_grad)
    assert grad[:, [2, 4]].abs().max() == 0
    value, grad = value_and_grad(lambda z: hard_loss(z, y, 0.1), hide(z, 1))  # a label that the student masks
    assert value == math.inf and grad.isfinite().all()

def test_dkd_of_rows_with_a_single_class_left():
    "Where all classes but the target are masked there is nothing to rank."
    z, v, _ = draw(39, 2, 3, 2.)
    z, v, y = hide(z, 1, 2), hide(v, 1, 2), torch.tensor([0, 0])
    value, grad = value_and_grad(lambda z: dkd_loss(z, v, y), z)
    assert value == 0 and torch.equal(grad, torch.zeros_like(z))


# ---- reductions, rows, unlabelled images ----

@pytest.mark.parametrize('loss', [kd_loss, reverse_kl_loss, jsd_loss, dkd_loss])
def test_reductions(loss):
    z, v, y = draw(13, 6, 20, 2.)
    extra = dict(labels=y) if loss is dkd_loss else {}
    each = loss(z, v, **extra, reduction='none')
    assert each.shape == (6,)
    torch.testing.assert_close(loss(z, v, **extra, reduction='sum'), each.sum())
    torch.testing.assert_close(loss(z, v, **extra), each.mean())            # divided by B = 6, not by B·C = 120
    torch.testing.assert_close(each[2:3].mean(), loss(z[2:3], v[2:3], **{k: l[2:3] for k, l in extra.items()}))
    with pytest.raises(ValueError, match="reduction must be 'batchmean', 'sum' or 'none', but is 'mean'"):
        loss(z, v, **extra, reduction='mean')

def test_unlabelled_rows_have_no_hard_part():
    z, v, y = draw(14, 8, 5, 2.)
    none = torch.full_like(y, UNLABELLED)
    value, grad = value_and_grad(lambda z: hard_loss(z, none), z)
    assert value == 0 and grad.abs().max() == 0
    parts = DistillationLoss(3., 0.5).parts(z, v, none)
    assert parts['hard'] == 0 and torch.equal(parts['soft'], 0.5 * kd_loss(z, v, 3.))
    some = torch.where(torch.arange(8) < 2, y, none)
    _, grad = value_and_grad(lambda z: hard_loss(z, some), z)
    assert grad[2:].abs().max() == 0
    torch.testing.assert_close(grad[:2], (z.softmax(1) - F.one_hot(y, 5))[:2] / 8)
    assert UNLABELLED == -100

def test_parts_sum_to_the_loss():
    z, v, y = draw(15, 8, 5, 2.)
    for loss in (DistillationLoss(2., 0.3), DistillationLoss(2., 0.3, dist_loss),
                 DistillationLoss(2., 0.3, partial(dkd_loss, beta=2.)),
                 DistillationLoss(2., 0.3, partial(jsd_loss, beta=0.1), standardize=True)):
        parts = loss.parts(z, v, y)
        assert list(parts) == ['hard', 'soft']
        assert torch.equal(sum(parts.values()), loss(z, v, y))
        torch.testing.assert_close(parts['hard'], 0.7 * F.cross_entropy(z, y))

def test_divergences_get_labels_if_they_want_them():
    z, v, y = draw(16, 8, 5, 2.)
    loss = DistillationLoss(2., 1., partial(dkd_loss, beta=2.))
    torch.testing.assert_close(loss(z, v, y), dkd_loss(z, v, y, 2., 1., 2.))
    with pytest.raises(ValueError, match='labels must be integers'): loss(z, v)

def test_gradient_reaches_a_teacher_only_if_it_asks():
    z, v, y = draw(17, 4, 5, 2.)
    z.requires_grad_()
    kd_loss(z, v).backward()
    assert v.grad is None
    v.requires_grad_()
    kd_loss(z.detach(), v).backward()
    assert v.grad.abs().max() > 0


# ---- numerics ----

@every_loss
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('scale', [0., 1., 20., 300., 1e4])
def test_finite_for_any_logits(name, dtype, scale):
    z, v, y = draw(18, 6, 8, 1.)
    z, v = ((scale * x / x.abs().max()).to(dtype) for x in (z, v))
    for student, teacher in ((z, v), (z, -z), (z, torch.zeros_like(z)), (torch.zeros_like(z), z), (z, z.flip(1))):
        value, grad = value_and_grad(lambda s: losses(y)[name](s, teacher), student)
        assert value.isfinite() and grad.isfinite().all()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert grad.dtype == dtype

@every_loss
@pytest.mark.parametrize('scale', [1e8, 1e20, 1e30])
def test_finite_far_beyond(name, scale):
    z, v, y = draw(19, 6, 8, 1.)
    value, grad = value_and_grad(lambda s: losses(y)[name](s, scale * v.float()), scale * z.float())
    assert value.isfinite() and grad.isfinite().all()

@every_loss
def test_half_precision_logits_are_computed_in_float32(name):
    z, v, y = draw(20, 16, 50, 3.)
    for dtype in (torch.float16, torch.bfloat16):
        low, teacher = z.to(dtype), v.to(dtype)
        value, grad = value_and_grad(lambda s: losses(y)[name](s, teacher), low)
        want, want_grad = value_and_grad(lambda s: losses(y)[name](s, teacher.double()), low.double())
        torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), want_grad, rtol=1e-2, atol=1e-5)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast_does_not_lower_the_precision(dtype):
    z, v, y = draw(20, 16, 50, 3.)
    z, v = z.to(dtype), v.to(dtype)
    for name, loss in losses(y).items():
        with torch.autocast('cpu', dtype=torch.bfloat16): inside = loss(z, v)
        torch.testing.assert_close(inside, loss(z, v), rtol=1e-5, atol=1e-6, msg=lambda m: f'{name}: {m}')

def test_a_vocabulary_in_bfloat16():
    "In bfloat16 arithmetic this KL is negative for many rows and wrong by more than its size."
    g = torch.Generator().manual_seed(0)
    v = 3 * torch.randn(8, 32_000, generator=g)
    z, v = (v + 0.01 * torch.randn(8, 32_000, generator=g)).bfloat16(), v.bfloat16()
    got, want = kd_loss(z, v, 1., reduction='none'), kd_loss(z.double(), v.double(), 1., reduction='none')
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-6)
    assert (got > 0).all()

@pytest.mark.parametrize('gap', [18, 21, 90, 104, 110, 800])
def test_gaps_where_probabilities_underflow(gap):
    "The value is known: p is certain, q is even, so KL(p ‖ q) = ln 2; and with p even, ln cosh(gap / 2)."
    sure, even = torch.tensor([[gap, 0.]]), torch.zeros(1, 2)
    torch.testing.assert_close(kd_loss(even, sure, 1.).item(), math.log(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kd_loss(sure, even, 1.).item(), gap / 2 - math.log(2), rtol=1e-5, atol=1e-5)
    for loss in (kd_loss, reverse_kl_loss, jsd_loss, dist_loss):
        for z, v in ((sure, even), (even, sure), (sure, sure.flip(1))):
            value, grad = value_and_grad(lambda z: loss(z, v, temperature=1.), z)
            assert value.isfinite() and grad.isfinite().all()

def test_constant_rows_have_no_direction():
    z = torch.tensor([[2., 2., 2.], [1., 2., 3.]], requires_grad=True)
    out = standardize(z)
    out.square().sum().backward()
    assert torch.equal(out[0], torch.zeros(3)) and torch.equal(z.grad[0], torch.zeros(3))
    for x in (0.1, 1e4, -7.3): assert torch.equal(standardize(torch.full((2, 7), x)), torch.zeros(2, 7))
    y = torch.zeros(4, 3, requires_grad=True)
    dist_loss(y, torch.randn(4, 3)).backward()
    assert torch.equal(y.grad, torch.zeros(4, 3))

def test_dist_hears_classes_that_no_image_resembles():
    "A column of probabilities near 1e-30 counts as the equation says."
    z, v, _ = draw(21, 6, 5, 1.)
    z[:, 2] -= 70; v[:, 2] -= 70
    want = ref_dist(z, v, 1., 0., 1.)
    torch.testing.assert_close(dist_loss(z.float(), v.float(), 1., 0., 1.).double(), want, rtol=1e-4, atol=1e-5)

def test_log_soften_and_upcast():
    x = torch.tensor([[1., 2., 4.]])
    torch.testing.assert_close(log_soften(x, 2.).exp(), (x / 2).exp() / (x / 2).exp().sum())
    kinds = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32,
             torch.float64: torch.float64, torch.int64: torch.float32}
    for given_, want in kinds.items(): assert upcast(x.to(given_)).dtype == want

def test_the_module_compiles_whole_and_copies():
    z, v, y = draw(23, 4, 5, 2.)
    y[0] = UNLABELLED
    for divergence in (kd_loss, partial(dkd_loss, beta=2.), dist_loss):
        loss = DistillationLoss(3., 0.5, divergence, standardize=True)
        compiled = torch.compile(copy.deepcopy(loss), backend='eager', fullgraph=True)
        torch.testing.assert_close(compiled(z, v, y), loss(z, v, y))
    assert list(loss.parameters()) == [] and 'temperature=3.0, alpha=0.5' in repr(loss)

def test_inputs_are_left_alone():
    z, v, y = draw(22, 4, 5, 2.)
    y[0] = UNLABELLED
    before = [x.clone() for x in (z, v, y)]
    for loss in losses(y).values(): loss(z, v)
    assert all(torch.equal(a, b) for a, b in zip(before, (z, v, y)))


# ---- arguments ----

z, v, y = draw(0, 4, 5, 1.)

@pytest.mark.parametrize('T', [0, -1., math.nan, math.inf, 1e7, 1e-7, None, '4', True, torch.tensor(4.)])
def test_temperature_must_be_positive(T):
    refused = (r'temperature must be a finite number greater than 0 \(from 1e-6 to 1e6\), '
               rf'but is {re.escape(repr(T))}\.')
    for call in (lambda: kd_loss(z, v, T), lambda: reverse_kl_loss(z, v, T), lambda: jsd_loss(z, v, T),
                 lambda: dkd_loss(z, v, y, T), lambda: dist_loss(z, v, T), lambda: DistillationLoss(temperature=T)):
        with pytest.raises(ValueError, match=refused): call()

@pytest.mark.parametrize('T', [1e-6, 1e6])
def test_the_ends_of_the_range_of_temperatures_give_numbers(T):
    student = draw(0, 4, 5, 1.)[0].float().requires_grad_()
    loss = kd_loss(student, v.float(), T)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()

@pytest.mark.parametrize('alpha', [-0.1, 1.1, math.nan])
def test_alpha_must_be_a_share(alpha):
    with pytest.raises(ValueError, match=rf'alpha must be from 0 to 1, but is {alpha}\.'): DistillationLoss(alpha=alpha)

@pytest.mark.parametrize('beta', [0, 1, -0.5, 2., math.nan])
def test_beta_must_lie_inside(beta):
    with pytest.raises(ValueError, match=rf'beta must be strictly between 0 and 1 \(.*\), but is {beta}\.'):
        jsd_loss(z, v, beta=beta)

@pytest.mark.parametrize('shapes', [((4, 5), (4, 6)), ((4, 5), (3, 5)), ((4, 5), (1, 5)), ((5,), (5,)),
                                    ((2, 4, 5), (2, 3, 5)), ((2, 4, 5), (8, 5))])
def test_shapes_must_agree(shapes):
    a, b = map(torch.zeros, shapes)
    for loss in (kd_loss, reverse_kl_loss, jsd_loss, dist_loss, partial(dkd_loss, labels=y), DistillationLoss(alpha=1)):
        with pytest.raises(ValueError) as e: loss(a, b)
        assert 'student_logits and teacher_logits must have the same shape (..., C)' in str(e.value)
        assert str(shapes[0]) in str(e.value) and str(shapes[1]) in str(e.value)

@pytest.mark.parametrize('label', [5, -1, -101, 1000])
def test_labels_must_be_classes(label):
    bad = torch.tensor([0, 1, label, 2])
    refused = rf'labels must lie in 0\.\.4 or be -100 \(unlabelled\), but one is {label}'
    for call in (lambda: hard_loss(z, bad), lambda: dkd_loss(z, v, bad), lambda: DistillationLoss()(z, v, bad)):
        with pytest.raises(ValueError, match=refused): call()

@pytest.mark.parametrize('bad', [None, y[:3], y.float(), y > 1, F.one_hot(y, 5)])
def test_labels_must_be_integers_one_for_each_row(bad):
    for call in (lambda: hard_loss(z, bad), lambda: dkd_loss(z, v, bad), lambda: DistillationLoss()(z, v, bad)):
        with pytest.raises(ValueError, match=r'labels must be integers of shape \(4,\)'): call()

def test_labels_may_be_of_any_integer_type():
    for dtype in (torch.int32, torch.uint8): assert torch.equal(hard_loss(z, y.to(dtype)), hard_loss(z, y))

def test_numbers_of_other_libraries_are_numbers():
    for two in (np.float32(2), np.int64(2)): assert torch.equal(kd_loss(z, v, two), kd_loss(z, v, 2))

@pytest.mark.parametrize('shape', [(4, 1), (4, 0), (0, 5), (0, 0)])
@every_loss
def test_rows_and_classes_must_be_there(name, shape):
    "One output means two classes: a softmax over it is 1 whatever the network says."
    x, labels = torch.zeros(shape, requires_grad=True), torch.zeros(shape[0], dtype=torch.long)
    with pytest.raises(ValueError, match='at least 1 row and one logit for each of at least 2 classes') as e:
        losses(labels)[name](x, x)
    assert ('give the logits 0 and z' in str(e.value)) == (shape == (4, 1)) and str(shape) in str(e.value)

@pytest.mark.parametrize('shape', [(4, 1), (4, 0), (0, 5), (5,), (), (2, 0, 5), (2, 4, 1)])
def test_functions_of_one_row_of_logits_ask_the_same(shape):
    for call in (lambda: hard_loss(torch.zeros(shape), y), lambda: standardize(torch.zeros(shape))):
        with pytest.raises(ValueError, match=r'logits must have the shape \(\.\.\., C\), with at least 1 row'): call()

def test_two_classes_are_enough():
    a, b, t = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0, 1, 1])
    assert all(loss(a, b).isfinite() for loss in losses(t).values())

@pytest.mark.parametrize('value', [-0.5, math.nan, math.inf, None, 'much', True])
def test_weights_must_be_finite_and_at_least_0(value):
    refused = rf'must be a finite number of at least 0, but is {re.escape(repr(value))}\.'
    for name, call in (('alpha', partial(dkd_loss, z, v, y)), ('beta', partial(dkd_loss, z, v, y)),
                       ('inter', partial(dist_loss, z, v)), ('intra', partial(dist_loss, z, v))):
        with pytest.raises(ValueError, match=f'{name} {refused}'): call(**{name: value})

def test_weights_of_rows_must_fit_the_rows():
    for beta in (torch.ones(3), torch.ones(4, 1), torch.ones(4, 5)):
        with pytest.raises(ValueError, match=r'beta must be a number, or a tensor of the shape \(4,\), one'):
            dkd_loss(z, v, y, beta=beta)
    for bad in (-1., math.nan, math.inf):
        with pytest.raises(ValueError, match='beta must be finite and at least 0'):
            dkd_loss(z, v, y, beta=torch.tensor([1., 1., bad, 1.]))
    assert torch.equal(dkd_loss(z, v, y, beta=torch.tensor(8.)), dkd_loss(z, v, y))

@pytest.mark.parametrize('value', [-0.5, 1., math.nan, None, True])
def test_label_smoothing_must_be_a_share(value):
    with pytest.raises(ValueError, match=rf'label_smoothing must be at least 0 and less than 1, but is {value}\.'):
        hard_loss(z, y, value)


# ---- the k largest logits and a bucket ----

def ref_bucket(z, v, k, T):
    "The KL of both with all but the teacher's k largest classes added up, in float64, one number at a time."
    total = 0.
    for (q, p), row in zip(pairs(z, v, T), v):
        best = sorted(range(len(p)), key=lambda c: -row[c].item())[:k]
        merged = [[d[c] for c in best] + [sum(d[c] for c in range(len(d)) if c not in best)] for d in (p, q)]
        total = total + ref_kl(*merged)
    return T**2 * total / len(z)


@pytest.mark.parametrize('k', [1, 3, 6])
@pytest.mark.parametrize('T', [0.5, 1., 4.])
def test_a_bucket_is_the_divergence_of_merged_classes_with_its_gradient(k, T):
    torch.manual_seed(0)
    z, v = 3*torch.randn(5, 7), 3*torch.randn(5, 7)
    z32, z64 = z.clone().requires_grad_(), z.double().requires_grad_()
    loss = DistillationLoss(T, 1.)(z32, top_k(v, k, T))
    expected = ref_bucket(z64, v.double(), k, T)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    grad, expected_grad = (torch.autograd.grad(f, x)[0].double() for f, x in ((loss, z32), (expected, z64)))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-5)


@quick
@given(st.integers(1, 11), st.floats(0.5, 20), st.integers(0, 10**6))
def test_a_bucket_never_says_more_than_all_classes_and_all_but_one_say_the_same(k, T, seed):
    g = torch.Generator().manual_seed(seed)
    z, v = (4*torch.randn(3, 12, generator=g, dtype=torch.float64) for _ in range(2))
    full, merged = kd_loss(z, v, T, 'none'), kd_loss(*collapse(z, top_k(v, k, T), T), T, 'none')
    assert (merged <= full + 1e-9).all() and (merged >= -1e-9).all()
    if k == 11: torch.testing.assert_close(merged, full)


@pytest.mark.parametrize('f', [kd_loss, reverse_kl_loss, jsd_loss])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_bucket_does_not_move_a_student_that_is_its_teacher(f, dtype):
    v = (5*torch.randn(8, 1000)).to(dtype)
    same = v.clone().requires_grad_()
    loss = DistillationLoss(2., 1., f)(same, top_k(v, 20, 2.))
    loss.backward()
    assert abs(loss.item()) < 1e-5 and same.grad.abs().max() < 1e-5


def test_a_bucket_is_finite_for_extreme_logits_and_leaves_the_hard_part_alone():
    z = torch.tensor([[1e4, -1e4, 0., 3.]], requires_grad=True)
    v, y = torch.tensor([[-1e4, 1e4, 5., 0.]]), torch.tensor([2])
    parts = DistillationLoss(1., 0.5).parts(z, top_k(v, 2, 1.), y)
    assert parts['hard'] == DistillationLoss(1., 0.5).parts(z, v, y)['hard'] and parts['soft'].isfinite()
    parts['soft'].backward()
    assert z.grad.isfinite().all()


def test_a_bucket_in_which_every_class_is_masked_has_no_pull():
    z = torch.tensor([[1., 2., -torch.inf, -torch.inf]], requires_grad=True)
    v = torch.tensor([[2., 1., -torch.inf, -torch.inf]])
    some, full = (torch.autograd.grad(DistillationLoss(4., 1.)(z, t), z)[0] for t in (top_k(v, 2, 4.), v))
    assert some.isfinite().all()
    torch.testing.assert_close(some, full)


# ---- many places and their weights ----

def draw_places(seed, B, L, C):
    "Logits (B, L, C), labels of which some are missing, weights of which some are 0, soft labels and DKD's beta."
    g = torch.Generator().manual_seed(seed)
    z, v, soft = (2 * torch.randn(B, L, C, generator=g, dtype=torch.float64) for _ in range(3))
    y = torch.randint(C, (B, L), generator=g).masked_fill(torch.rand(B, L, generator=g) < 0.2, UNLABELLED)
    w = torch.tensor([0., 0., 0.5, 1., 3.], dtype=torch.float64)[torch.randint(5, (B, L), generator=g)]
    return z, v, y, w, soft.softmax(-1), 4 * torch.rand(B, L, generator=g, dtype=torch.float64)

def rare(C): return torch.linspace(0.5, 2., C, dtype=torch.float64)  # class weights

def combined(C): return DistillationLoss(3., 0.3, label_smoothing=0.1, class_weights=rare(C))

PLACES = {  # every loss of (student, teacher, labels, weight, soft labels, beta)
    'kd': lambda z, v, y, w, s, b: kd_loss(z, v, 3., weight=w),
    'reverse': lambda z, v, y, w, s, b: reverse_kl_loss(z, v, 3., weight=w),
    'jsd': lambda z, v, y, w, s, b: jsd_loss(z, v, 3., 0.3, weight=w),
    'dkd': lambda z, v, y, w, s, b: dkd_loss(z, v, y, 3., weight=w),
    'dkd_beta': lambda z, v, y, w, s, b: dkd_loss(z, v, y, 3., 0.5, b.to(upcast(z).dtype), weight=w),
    'inter': lambda z, v, y, w, s, b: dist_loss(z, v, 3., 1., 0., w),
    'intra': lambda z, v, y, w, s, b: dist_loss(z, v, 3., 0., 1., w),
    'hard': lambda z, v, y, w, s, b: hard_loss(z, y, weight=w),
    'hard_settings': lambda z, v, y, w, s, b: hard_loss(z, y, 0.1, rare(z.shape[-1]), w),
    'hard_soft': lambda z, v, y, w, s, b: hard_loss(z, s, 0.1, rare(z.shape[-1]), w),
    'combined': lambda z, v, y, w, s, b: combined(z.shape[-1])(z, v, y, w),
    'combined_soft': lambda z, v, y, w, s, b: combined(z.shape[-1])(z, v, s, w),
    'standardised': lambda z, v, y, w, s, b: DistillationLoss(3., 1., standardize=True)(z, v, None, w),
    'bucket': lambda z, v, y, w, s, b: DistillationLoss(3., 1.)(z, top_k(v.detach(), 2, 3.), None, w)}

every_place = pytest.mark.parametrize('name', PLACES)

def by_rows(of_place):
    "The weighted mean of each row's places, then the mean of the rows that have any weight; 0 without any."
    def reference(*tensors):
        means = []
        for b, row in enumerate(tensors[3].tolist()):
            if sum(row) == 0: continue
            here = {i: [t[b, i:i + 1] for t in tensors] for i, x in enumerate(row) if x > 0}
            means.append(sum(row[i] * of_place(*ts) for i, ts in here.items()) / sum(row))
        return sum(means) / max(len(means), 1) + 0 * tensors[0].sum()
    return reference

def ref_terms(z, target, weights, smoothing):
    "-Σ ω·y·log q of one place with a smoothed target."
    C, logs = z.shape[1], [torch.log(q) for q in probabilities(z[0], 1.)]
    return -sum(weights[c] * ((1 - smoothing) * target[c] + smoothing / C) * logs[c] for c in range(C))

def ref_hard(z, label, weights, smoothing):
    return 0. if label == UNLABELLED else ref_terms(z, F.one_hot(label, z.shape[1])[0], weights, smoothing)

def ref_target(v, y): return [v[0].argmax().item() if y == UNLABELLED else y.item()]

def ref_intra(z, v, y, w, s, b):
    there = w > 0
    if there.sum() < 2: return 0 * z.sum()
    both = pairs(z[there], v[there], 3.)
    return 9 * sum(1 - ref_pearson(*([d[side][c] for d in both] for side in (0, 1)))
                   for c in range(z.shape[-1])) / z.shape[-1] + 0 * z.sum()

REFERENCES = {
    'kd': by_rows(lambda z, v, *_: ref_kd(z, v, 3.)), 'reverse': by_rows(lambda z, v, *_: ref_reverse(z, v, 3.)),
    'jsd': by_rows(lambda z, v, *_: ref_jsd(z, v, 3., 0.3)),
    'dkd': by_rows(lambda z, v, y, *_: ref_dkd(z, v, ref_target(v, y), 3., 1., 8.)),
    'dkd_beta': by_rows(lambda z, v, y, w, s, b: ref_dkd(z, v, ref_target(v, y), 3., 0.5, b.item())),
    'inter': by_rows(lambda z, v, *_: 9 * (1 - ref_pearson(*pairs(z, v, 3.)[0]))), 'intra': ref_intra,
    'hard': by_rows(lambda z, v, y, *_: ref_hard(z, y, [1.] * z.shape[1], 0.)),
    'hard_settings': by_rows(lambda z, v, y, *_: ref_hard(z, y, rare(z.shape[1]), 0.1)),
    'hard_soft': by_rows(lambda z, v, y, w, s, b: ref_terms(z, s[0], rare(z.shape[1]), 0.1)),
    'standardised': by_rows(lambda z, v, *_: ref_kd(ref_standardize(z), ref_standardize(v), 3.)),
    'bucket': by_rows(lambda z, v, *_: ref_bucket(z, v.detach(), 2, 3.))}
for hard, name in (('hard_settings', 'combined'), ('hard_soft', 'combined_soft')):
    REFERENCES[name] = lambda *t, hard=hard: 0.7 * REFERENCES[hard](*t) + 0.3 * REFERENCES['kd'](*t)

def spoiled(z, v, y, w, s, b):
    "The same with NaN, infinities and impossible labels where the weight is 0."
    gone, g = w == 0, torch.Generator().manual_seed(0)
    wild = torch.tensor([math.nan, math.inf, -math.inf]).double()[torch.randint(3, z.shape, generator=g)]
    z, v, s = (torch.where(gone[..., None], wild.to(x.dtype), x) for x in (z, v, s))
    return z, v, y.masked_fill(gone, 777), w, s, b

def place_grads(loss, tensors):
    "The value, and the gradient for both logits."
    z, v = (t.detach().clone().requires_grad_() for t in tensors[:2])
    out = loss(z, v, *tensors[2:])
    return out.detach(), *torch.autograd.grad(out, (z, v), materialize_grads=True)

def close(found, want, **tolerance):
    for a, b in zip(found, want, strict=True): torch.testing.assert_close(a, b, **tolerance)

@every_place
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**31), B=st.integers(1, 4), L=st.integers(1, 4), C=st.integers(3, 5))
def test_places_with_weights(name, seed, B, L, C):
    "Values and gradients, for the teacher as well, with anything at all in places that are not there."
    tensors = draw_places(seed, B, L, C)
    found, want = (place_grads(f[name], t) for f, t in ((PLACES, spoiled(*tensors)), (REFERENCES, tensors)))
    close(found, want, rtol=1e-5, atol=1e-8)
    assert found[0].shape == () and all((g[tensors[3] == 0] == 0).all() for g in found[1:])

@every_place
def test_a_batch_without_any_weight_has_the_loss_0(name):
    z, v, y, w, s, b = draw_places(1, 3, 4, 5)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        value, *grads = place_grads(PLACES[name], spoiled(z.to(dtype), v.to(dtype), y, 0 * w, s, b))
        assert value == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in grads)

@every_place
def test_padding_changes_nothing(name):
    "Two more places in each row and one more row, none of them there."
    tensors = draw_places(2, 3, 4, 5)
    longer = [F.pad(t, (0,) * 2 * (t.ndim - 2) + (0, 2, 0, 1)) for t in tensors]
    value, *grads = place_grads(PLACES[name], tensors)
    padded, *padded_grads = place_grads(PLACES[name], spoiled(*longer))
    close([padded, *(g[:3, :4] for g in padded_grads)], [value, *grads])
    assert all(g[3:].abs().sum() == 0 and g[:, 4:].abs().sum() == 0 for g in padded_grads)

@pytest.mark.parametrize('name', [n for n in PLACES if n != 'intra'])
def test_pieces_make_the_whole(name):
    "Pieces weigh what they have of rows that count: 2, 0 and 1. Only what compares images has no such law."
    tensors = draw_places(3, 6, 3, 5)
    w = tensors[3]
    w[[1, 3, 4]], w[[0, 2, 5], 1] = 0., torch.tensor([0.5, 1., 3.], dtype=torch.float64)
    pieces = [slice(0, 3), slice(3, 5), slice(5, 6)]
    counts = [rows_there(w[p]).sum() for p in pieces]
    assert [(c.item(), c.shape) for c in counts] == [(2, ()), (0, ()), (1, ())] and rows_there(w).sum() == 3
    def joined(*ts): return sum(PLACES[name](*(t[p] for t in ts)) * c for p, c in zip(pieces, counts)) / sum(counts)
    close(place_grads(joined, tensors), place_grads(PLACES[name], tensors))

@every_place
def test_pixels_are_tokens_and_single_places_are_rows(name):
    tensors = draw_places(4, 3, 6, 5)
    want = PLACES[name](*tensors)
    assert torch.equal(PLACES[name](*(t.unflatten(1, (2, 3)) for t in tensors)), want)
    column = [t[:, :1] for t in tensors]
    assert torch.equal(PLACES[name](*column), PLACES[name](*(t[:, 0] for t in column)))

@every_place
def test_a_mask_over_rows_selects_rows(name):
    tensors = [t[:, 0] for t in draw_places(5, 7, 1, 5)]
    there = tensors[3] > 0
    selected = [None if i == 3 else t[there] for i, t in enumerate(tensors)]
    close([PLACES[name](*spoiled(*tensors))], [PLACES[name](*selected)])

@every_place
def test_weights_of_one_are_no_weights_and_only_their_ratio_in_a_row_counts(name):
    z, v, y, w, *more = draw_places(6, 3, 4, 5)
    def of(weight): return place_grads(PLACES[name], (z, v, y, weight, *more))
    def times(*factors, dtype): return w.to(dtype) * torch.tensor(factors, dtype=dtype)[:, None]
    close(of(None), of(torch.ones_like(w)))
    for other in (2 * w, times(1e-300, 1., 1e300, dtype=torch.float64), times(1e-38, 1., 1e37, dtype=torch.float32)):
        close(of(other), of(w))
    for kind in (torch.bool, torch.int64, torch.bfloat16): close(of((w > 0).to(kind)), of((w > 0).double()))

def test_for_relations_between_images_all_places_that_are_there_count_alike():
    z, v, _, w, *_ = draw_places(7, 3, 4, 5)
    assert torch.equal(dist_loss(z, v, inter=0., weight=w), dist_loss(z, v, inter=0., weight=(w > 0).double()))

@pytest.mark.parametrize('name', ['kd', 'reverse', 'jsd', 'dkd'])
def test_reductions_of_places(name):
    z, v, y, w, *_ = draw_places(8, 3, 4, 5)
    z, v, y, w, *_ = spoiled(z, v, y, w.index_fill(0, torch.tensor([1]), 0.), z, z)
    loss = {'kd': kd_loss, 'reverse': reverse_kl_loss, 'jsd': jsd_loss, 'dkd': partial(dkd_loss, labels=y)}[name]
    each, there = loss(z, v, reduction='none', weight=w), w > 0
    assert each.shape == (3, 4) and torch.equal(each == 0, ~there)
    clean = {'labels': y[there]} if name == 'dkd' else {}
    torch.testing.assert_close(each[there], loss(z[there], v[there], reduction='none', **clean))
    means = [(w[b] * each[b]).sum() / w[b].sum() for b in (0, 2)]
    torch.testing.assert_close(loss(z, v, weight=w), sum(means) / 2)
    torch.testing.assert_close(loss(z, v, reduction='sum', weight=w), sum(means))
    z, v = z.nan_to_num(0., 0., 0.), v.nan_to_num(0., 0., 0.)
    more = {'labels': y.masked_fill(y == 777, 0)} if name == 'dkd' else {}
    each = loss(z, v, reduction='none', **more)
    torch.testing.assert_close(loss(z, v, reduction='sum', **more), each.mean(1).sum())
    torch.testing.assert_close(loss(z, v, **more), each.mean())

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_without_weights_are_reduced_as_ever_to_the_bit(dtype):
    "The arithmetic of (B, C) logits before there were places, written out; values and gradients."
    for seed, B, C in ((0, 7, 5), (1, 64, 100), (2, 33, 10)):
        z, v, y = draw(seed, B, C, 3.)
        z, v, y[0], beta = z.to(dtype), v.to(dtype), UNLABELLED, torch.rand(B)
        def mean(loss, **kw): return lambda z: loss(z, v, reduction='none', temperature=1., **kw).mean()
        def hard(z, s=0.):
            log_q = log_soften(z)
            total = F.nll_loss(log_q, y, ignore_index=UNLABELLED, reduction='sum')
            if s: total = (1 - s) * total + s * (-log_q.sum(1) / C).masked_fill(y == UNLABELLED, 0.).sum()
            return total / len(y)
        def dist(z):
            q, p = (successors._log_share(l, 1.) for l in (z, v))
            inter, intra = (successors._pearson_distance(q, p, d)[0] for d in (1, 0))
            return inter.sum() / B + 2. * (intra.sum() / C)
        same = {'kd': (partial(kd_loss, teacher_logits=v, temperature=1.), mean(kd_loss)),
                'reverse': (partial(reverse_kl_loss, teacher_logits=v, temperature=1.), mean(reverse_kl_loss)),
                'jsd': (partial(jsd_loss, teacher_logits=v, temperature=1.), mean(jsd_loss)),
                'dkd': (lambda z: dkd_loss(z, v, y, 1., beta=beta), mean(dkd_loss, labels=y, beta=beta)),
                'sum': (lambda z: kd_loss(z, v, 1., 'sum'), lambda z: kd_loss(z, v, 1., 'none').sum()),
                'dist': (lambda z: dist_loss(z, v, 1., 1., 2.), dist), 'hard': (lambda z: hard_loss(z, y), hard),
                'smooth': (lambda z: hard_loss(z, y, 0.1), partial(hard, s=0.1))}
        for name, (loss, as_ever) in same.items():
            for a, b in zip(value_and_grad(loss, z), value_and_grad(as_ever, z)): assert torch.equal(a, b), name

def test_places_compile_and_transform():
    z, v, y, w, *_ = spoiled(*draw_places(9, 3, 4, 5))
    for divergence in (partial(dkd_loss, beta=2.), dist_loss):
        loss = DistillationLoss(3., 0.5, divergence, True, 0.1, rare(5))
        compiled = torch.compile(copy.deepcopy(loss), backend='aot_eager', fullgraph=True)
        close(value_and_grad(lambda z: compiled(z, v, y, w), z), value_and_grad(lambda z: loss(z, v, y, w), z))
    found = torch.func.grad(partial(kd_loss, weight=w))(z, v)
    torch.testing.assert_close(found, value_and_grad(lambda z: kd_loss(z, v, weight=w), z)[1])
    a, b = z.nan_to_num(0., 0., 0.), v.nan_to_num(0., 0., 0.)
    by_row = torch.vmap(lambda a, b: kd_loss(a[None], b[None]))(a, b)
    torch.testing.assert_close(by_row, kd_loss(a, b, reduction='none').mean(1))

@every_place
def test_places_in_half_precision_are_computed_in_float32_and_left_alone(name):
    z, v, *more = draw_places(10, 3, 4, 5)
    low = spoiled(z.bfloat16(), v.bfloat16(), *more)
    before = [t.clone() for t in low]
    value, grad, _ = place_grads(PLACES[name], low)
    assert value.dtype == torch.float32 and grad.dtype == torch.bfloat16
    want = place_grads(PLACES[name], (low[0].double(), low[1].double(), *low[2:]))[0]
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)
    for a, b in zip(low, before): assert torch.equal(a.nan_to_num(7.), b.nan_to_num(7.))

def test_top_k_of_places():
    z, v, *_ = draw_places(11, 3, 4, 6)
    top = top_k(v, 2, 3.)
    assert [t.shape for t in top] == [(3, 4, 2), (3, 4, 2), (3, 4, 1)]
    flat = top_k(v.flatten(0, 1), 2, 3.)
    assert all(torch.equal(a.flatten(0, 1), b) for a, b in zip(top, flat))
    for a, b in zip(collapse(z, top, 3.), collapse(z.flatten(0, 1), flat, 3.)): assert torch.equal(a.flatten(0, 1), b)


# ---- soft labels and class weights ----

@quick
@given(seed=st.integers(0, 1000), s=st.sampled_from([0., 0.1, 0.5]), weighted=st.booleans(), soft=st.booleans())
def test_hard_loss_has_the_terms_of_torch(seed, s, weighted, soft):
    "Its sum, divided by the number of places, labelled or not."
    z, _, y, _, target, _ = draw_places(seed, 4, 3, 5)
    target, ω = target if soft else y, rare(5) if weighted else None
    rows = lambda x: x.flatten(0, 1)
    def torchs(z): return F.cross_entropy(rows(z), rows(target), ω, label_smoothing=s, reduction='sum') / 12
    close(value_and_grad(lambda z: hard_loss(z, target, s, ω), z), value_and_grad(torchs, z))
    close(value_and_grad(lambda z: hard_loss(rows(z), rows(target), s, ω), z), value_and_grad(torchs, z))

@pytest.mark.parametrize('s', [0., 0.1])
def test_one_hot_labels_are_class_numbers(s):
    z, _, y = draw(50, 6, 5, 2.)
    for kind in (torch.float16, torch.float32, torch.float64):
        close(value_and_grad(lambda z: hard_loss(z, F.one_hot(y, 5).to(kind), s, rare(5)), z),
              value_and_grad(lambda z: hard_loss(z, y, s, rare(5)), z))
        assert hard_loss(z.float(), F.one_hot(y, 5).to(kind)).dtype == torch.float32

def test_what_has_no_share_or_no_class_weight_may_be_masked():
    z, _, _ = draw(51, 4, 5, 2.)
    soft = torch.tensor([[0.25, 0.5, 0.25, 0., 0.]]).expand(4, 5)
    close([hard_loss(hide(z, 3, 4), soft, 0.1)], [hard_loss(z[:, :3], soft[:, :3], 0.1)])
    y, ω = torch.tensor([0, 1, 2, 4]), torch.tensor([1., 1., 1., 1., 0.])
    value, grad = value_and_grad(lambda z: hard_loss(z, y, class_weights=ω), hide(z, 4))
    close([value], [F.cross_entropy(z[:3, :4], y[:3], reduction='sum') / 4])
    assert grad.isfinite().all() and (grad[3] == 0).all()
    value, grad = value_and_grad(lambda z: hard_loss(z, soft.flip(1)), hide(z, 4))  # a share of it does cost
    assert value == math.inf and grad.isfinite().all()

def test_unlabelled_places_stay_in_the_denominator():
    z, _, y = draw(52, 6, 5, 2.)
    some = torch.where(torch.arange(6) < 2, y, UNLABELLED)
    for ω in (None, rare(5)):
        want = F.cross_entropy(z[:2], y[:2], ω, reduction='sum')
        close([hard_loss(z, some, class_weights=ω)], [want / 6])
        close([hard_loss(z[None], some[None], 0., ω, torch.tensor([[1., 1., 1., 1., 0., 0.]]))], [want / 4])

def test_a_soft_label_names_no_class_for_dkd():
    z, v, _, _, soft, _ = draw_places(12, 3, 4, 5)
    for call in (lambda: dkd_loss(z, v, soft), lambda: DistillationLoss(divergence=dkd_loss)(z, v, soft)):
        with pytest.raises(ValueError, match=r'labels must be integers of shape \(3, 4\).*: this loss needs class num'):
            call()

@pytest.mark.parametrize('bad', [[0.9, 0., 0.], [1.5, -0.5, 0.], [math.nan, 0.5, 0.5], [math.inf, 0., 0.], [1.] * 3])
def test_soft_labels_must_be_probabilities(bad):
    soft = torch.tensor([[0.5, 0.5, 0.], bad])
    with pytest.raises(ValueError, match='labels must be probabilities: at least 0, with sums within 0.01 of 1'):
        hard_loss(torch.zeros(2, 3), soft)
    assert hard_loss(torch.zeros(2, 3), soft, weight=torch.tensor([1., 0.])).isfinite()

def test_soft_labels_must_fit():
    for bad in (torch.ones(2, 4) / 4, torch.ones(3), torch.ones(3, 2), torch.ones(2, 3).long()):
        with pytest.raises(ValueError, match=r'integers of shape \(2,\), .*floating probabilities of shape \(2, 3\)'):
            hard_loss(torch.zeros(2, 3), bad)

@pytest.mark.parametrize('bad', [torch.ones(4), torch.ones(1, 5), torch.ones(()), [1.] * 5, 2.])
def test_class_weights_must_fit(bad):
    with pytest.raises(ValueError, match=r'class_weights must be a tensor of the shape \(5,\), one number for'):
        hard_loss(z, y, class_weights=bad)
    if isinstance(bad, torch.Tensor) and bad.ndim == 1: return  # how many classes there are is not known yet
    with pytest.raises(ValueError, match=r'class_weights must be a tensor of the shape \(C,\)'):
        DistillationLoss(class_weights=bad)

@pytest.mark.parametrize('bad', [-1., math.nan, math.inf])
def test_weights_of_classes_and_places_must_be_finite_and_at_least_0(bad):
    ω, w = torch.ones(5), torch.ones(4)
    ω[2] = w[2] = bad
    calls = [lambda: hard_loss(z, y, class_weights=ω), lambda: DistillationLoss(class_weights=ω)]
    for call in calls:
        with pytest.raises(ValueError, match='class_weights must be finite and at least 0'): call()
    for loss in (kd_loss, reverse_kl_loss, jsd_loss, dist_loss, partial(dkd_loss, labels=y), DistillationLoss(alpha=1.),
                 lambda z, v, weight: hard_loss(z, y, weight=weight)):
        with pytest.raises(ValueError, match='weight must be finite and at least 0'): loss(z, v, weight=w)

@pytest.mark.parametrize('bad', [torch.ones(3), torch.ones(4, 5), torch.ones(4, 1), torch.ones(()), 1., [1.] * 4])
def test_weights_of_places_must_fit(bad):
    for loss in (kd_loss, reverse_kl_loss, jsd_loss, dist_loss, partial(dkd_loss, labels=y), DistillationLoss(alpha=1.),
                 DistillationLoss(alpha=1., standardize=True), lambda z, v, weight: hard_loss(z, y, weight=weight)):
        with pytest.raises(ValueError, match=r'weight must be a tensor of the shape \(4,\), one number for each row'):
            loss(z, v, weight=bad)

def test_labels_of_places_must_fit():
    z, v, y, *_ = draw_places(13, 3, 4, 5)
    for bad in (y[0], y[:, 0], y.flatten(), y[..., None]):
        for call in (lambda: hard_loss(z, bad), lambda: dkd_loss(z, v, bad)):
            with pytest.raises(ValueError, match=r'labels must be integers of shape \(3, 4\)'): call()
    with pytest.raises(ValueError, match=r'labels must lie in 0\.\.4'): hard_loss(z, y.masked_fill(y < 9, 5))

def test_a_divergence_that_knows_no_weight_is_refused_by_name_where_there_is_one():
    def mine(z, v, temperature): return (z - v).square().mean()
    for divergence in (mine, partial(mine)):
        loss = DistillationLoss(1., 1., divergence)
        assert loss(z, v) == mine(z, v, 1.)
        with pytest.raises(ValueError, match="divergence must be a function with a parameter weight.* 'mine'"):
            loss(z, v, weight=torch.ones(4))
    assert DistillationLoss(1., 0., mine)(z, None, y, torch.ones(4)) == hard_loss(z, y, weight=torch.ones(4))

def test_settings_of_the_hard_part():
    loss = DistillationLoss(3., 0.5, label_smoothing=0.1, class_weights=rare(5))
    torch.testing.assert_close(loss.parts(z, v, y)['hard'], 0.5 * hard_loss(z, y, 0.1, rare(5)))
    torch.testing.assert_close(loss.parts(z, v, y)['soft'], 0.5 * kd_loss(z, v, 3.))
    assert loss.state_dict() == {} and copy.deepcopy(loss).float().class_weights.dtype == torch.float32
    with pytest.raises(ValueError, match='label_smoothing must be at least 0'): DistillationLoss(label_smoothing=1.)
    others = [DistillationLoss(3., 0.5), DistillationLoss(3., 0.5, label_smoothing=0.1), loss,
              DistillationLoss(3., 0.5, label_smoothing=0.1, class_weights=2 * rare(5))]
    assert len({repr(l) for l in others}) == 4 and repr(loss) == repr(copy.deepcopy(loss))


@pytest.mark.parametrize('temperature', [0., -1., math.nan, math.inf, '4'])
def test_softening_needs_a_temperature_above_0(temperature):
    for f in soften, log_soften:
        with pytest.raises(ValueError, match=f'temperature must be greater than 0, but is {temperature!r}'):
            f(torch.randn(2, 3), temperature)


@pytest.mark.parametrize('kind', [torch.bool, torch.complex64])
@pytest.mark.parametrize('side', [0, 1])
@pytest.mark.parametrize('loss', [kd_loss, reverse_kl_loss, jsd_loss, dist_loss])
def test_logits_are_real_numbers(loss, side, kind):
    pair = [torch.randn(2, 3), torch.randn(2, 3)]
    pair[side] = pair[side].to(kind)
    with pytest.raises(ValueError, match=f'student_logits and teacher_logits must be .*real.*{kind}'): loss(*pair)


def test_only_some_of_the_classes_are_kept_and_only_of_the_same_places():
    wide, narrow = torch.randn(4, 5), torch.randn(4, 3)
    for k in (0, -1, 5, 10**18):
        with pytest.raises(ValueError, match=r'k must be a whole number from 1 to 4'): top_k(wide, k)
    kept = top_k(torch.tensor([[0., 1., 2., 4., 3.]]*4), 2)
    with pytest.raises(ValueError, match=r'teacher must be .*classes in 0\.\.2'): collapse(narrow, kept)
    with pytest.raises(ValueError, match=r'the shape of teacher must be \(3,\) and k, but is \(4, 2\)'):
        collapse(wide[:3], kept)


def test_a_weight_that_float32_can_not_hold_is_refused():
    for loss, name in ((dkd_loss, 'alpha'), (dkd_loss, 'beta'), (dist_loss, 'inter')):
        labels = {'labels': torch.tensor([0, 1])} if loss is dkd_loss else {}
        with pytest.raises(ValueError, match=f'{name} must be at most 3e38.*1e[+]300'):
            loss(torch.randn(2, 3), torch.randn(2, 3), **labels, **{name: 1e300})


def test_entropy_is_that_of_probabilities():
    for wrong in (torch.tensor([-0.5, 1.5]), torch.tensor([math.nan, 1.]), torch.tensor([0.3, 0.3])):
        with pytest.raises(ValueError, match='probs must be at least 0, with sums of 1'): entropy(wrong)


@pytest.mark.parametrize('divergence', [F.mse_loss, F.kl_div, torch.nn.MSELoss(), lambda z, v: (z - v).sum()])
def test_a_divergence_without_a_temperature_is_refused_when_the_loss_is_made(divergence):
    with pytest.raises(ValueError, match='divergence must be a function with a parameter temperature, such as'):
        DistillationLoss(divergence=divergence)


class Labelled(torch.nn.Module):
    "A divergence that is a module."
    def forward(self, z, v, temperature, labels): return z.sum() + temperature + labels.sum()


@pytest.mark.parametrize('divergence, labels', [(Labelled(), True), (lambda z, v, **more: z.sum(), False),
                                                (max, False)])
def test_what_a_divergence_says_of_itself_is_asked_of_functions_and_modules(divergence, labels):
    loss = DistillationLoss(divergence=divergence)
    assert (loss.wants_labels, loss.wants_weight) == (labels, False)


def test_settings_from_numpy_are_those_of_python():
    given = dict(temperature=3., alpha=0.5, standardize=True, label_smoothing=0.25)
    same = DistillationLoss(np.float64(3), np.float32(0.5), kd_loss, np.bool_(True), np.float64(0.25))
    assert repr(same) == repr(DistillationLoss(**given))


def test_a_divergence_says_itself_that_it_is_free_of_scale():
    def mine(z, v, temperature): return (z - v).sum()
    assert not DistillationLoss(divergence=mine).scale_free
    mine.scale_free = True
    assert DistillationLoss(divergence=mine).scale_free and DistillationLoss(divergence=partial(mine)).scale_free
    assert DistillationLoss(divergence=partial(dist_loss, inter=2.)).scale_free
    assert not DistillationLoss(divergence=dkd_loss).scale_free
