"""Distill, and the teacher's exam."""
import copy, math, re, warnings
from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from distill_nb import exam
from distill_nb.files import fingerprint
from distill_nb.rows import UNLABELLED
from distill_nb.losses import DistillationLoss, kd_loss
from distill_nb.successors import dist_loss, dkd_loss, jsd_loss, reverse_kl_loss
from distill_nb.data import ImageData, digits
from distill_nb.models import digit_teacher
from distill_nb.contract import Teacher, describe
from distill_nb.training import DivergedError, Recipe, Supervised, evaluate, fit, predict
from distill_nb.exam import _other_order, by_luck, check_teacher, fell_below, probability_kind
from distill_nb.logits import Distill
from distill_nb.zoo import build_model

from small import CLASSES, RECIPE, images, net, trained
from tokens import BYTES, Bytes, speaker, text, trained_speaker


@pytest.fixture(scope='module')
def teacher(): return trained()


@pytest.fixture(scope='module')
def model(): return trained_speaker()


# --- masked classes

@pytest.mark.parametrize('make', [
    Distill, lambda s, t: Distill(s, t, standardize=True), lambda s, t: Distill(s, t, divergence=jsd_loss),
    lambda s, t: Distill(s, t, divergence=dist_loss), lambda s, t: Distill(s, t, divergence=dkd_loss),
    lambda s, t: Supervised(s, 0.1)])
@pytest.mark.parametrize('who', ['teacher', 'both'])
def test_models_that_mask_a_class_train_and_pass_the_exam(teacher, make, who, masked):
    "The third class has no images; the student that masks it learns as if there were two."
    data = images().subset(torch.arange(120)[torch.arange(120) % 3 < 2])
    torch.manual_seed(1)
    student = masked(net(), 2) if who == 'both' else net()
    history = fit(make(student, masked(teacher, 2)), data, RECIPE, data)
    assert all(math.isfinite(l) for values in history.losses.values() for l in values)
    assert all(p.isfinite().all() for p in student.parameters()) and check_teacher(masked(teacher, 2), data) > 0.9


@pytest.mark.parametrize('make, hidden, said', [
    (Distill, 'student', r'The student masks class 2 with -inf, but the teacher gives it a probability, '
                         r'so that KL\(teacher ‖ student\) is infinite'),
    (lambda s, t: Distill(s, t, divergence=reverse_kl_loss), 'teacher',
     r'The teacher masks class 2 .* KL\(student ‖ teacher\) is infinite')])
def test_a_mask_that_makes_the_loss_infinite_is_named(teacher, masked, make, hidden, said):
    data = images().subset(torch.arange(120)[torch.arange(120) % 3 < 2])
    student, teach = (masked(net(), 2), teacher) if hidden == 'student' else (net(), masked(teacher, 2))
    broke = "the loss 'soft' became inf at step 0 of 12; no checkpoint was written. "
    with pytest.raises(ValueError, match=broke + said) as e: fit(make(student, teach), data, RECIPE)
    assert not isinstance(e.value, DivergedError) and 'learning rate' not in str(e.value)


def test_a_teacher_without_answers_is_named(teacher, masked):
    objective = Distill(net(), masked(teacher, 0, value=math.nan), examine=False)
    said = "'soft' became nan at step 0.*The teacher gives logits that are not finite"
    with pytest.raises(ValueError, match=said): fit(objective, images(), RECIPE)


@pytest.mark.parametrize('settings', [dict(standardize=True), dict(divergence=dist_loss),
                                      dict(divergence=partial(dist_loss, inter=2.))])
def test_a_student_that_begins_near_0_is_warned_of_and_stopped(teacher, settings):
    "The gradient of a loss that is blind to scale is as large as 1 / scale."
    def small(factor):
        torch.manual_seed(0)
        student = net()
        with torch.no_grad():
            for p in student[-1].parameters(): p.mul_(factor)
        return student
    said = "the loss 'hard' became .*e[+].* A smaller learning rate"
    with warnings.catch_warnings(), pytest.raises(DivergedError, match=said):
        warnings.simplefilter('error')
        fit(Distill(small(1.), teacher, **settings), images(), RECIPE)  # no warning
        warnings.simplefilter('ignore')
        fit(Distill(small(1e-10), teacher, **settings), images(), RECIPE)
    with pytest.warns(UserWarning, match="the student's logits differ by only .*1 / that"):
        Distill(small(1e-10), teacher, **settings).check(images())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Distill(small(1e-10), teacher).check(images())  # plain logits need no warning


# --- the exam

def test_a_good_teacher_passes_and_a_guessing_one_does_not(teacher):
    assert check_teacher(teacher, images(seed=1)) > 0.9
    assert check_teacher(Teacher(teacher), images(seed=1)) > 0.9
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0., 5., 0.]))
        def forward(self, x): return self.w.expand(len(x), 3)
    said = r'accuracy 33.3% on 120 validation items.*no better than chance.*never trained'
    with pytest.raises(ValueError, match=said): check_teacher(Constant(), images())


def test_a_majority_class_is_no_knowledge():
    y = torch.tensor([0] * 90 + [1] * 30)
    data = ImageData(torch.randint(0, 256, (120, 1, 4, 4), dtype=torch.uint8), y, ['common', 'rare'])
    class Common(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1., 0.]))
        def forward(self, x): return self.w.expand(len(x), 2)
    with pytest.raises(ValueError, match='balanced accuracy 50.0% on 120'): check_teacher(Common(), data)


def answers(accuracy, loss, labels):
    "Logits that are right on the first images up to this accuracy, with this cross-entropy; wrong: the next class."
    y = torch.tensor(labels)
    right, own = torch.arange(len(y)) < round(accuracy * len(y)), min(0.5, loss / 2) if accuracy < 1 else loss
    share, C = right.double().mean().item(), max(labels) + 1
    losses = torch.where(right, own, (loss - share * own) / max(1 - share, 1e-9)).double()
    p = ((1 - (-losses).exp()) / (C - 1 + 0.5))[:, None].repeat(1, C)
    p[torch.arange(len(y)), (y + 1) % C] *= 1.5
    p[torch.arange(len(y)), y] = (-losses).exp()
    assert F.cross_entropy(p.log(), y).item() == pytest.approx(loss) and torch.equal(p.argmax(1) == y, right)
    return p.log(), y


@pytest.mark.parametrize('accuracy,loss,labels,lucky', [
    (0.33, 0.9, [0, 1, 2] * 40, True),      # a guesser
    (1.00, 0.1, [0, 1, 2], False),          # all right, of very few images
    (0.67, 0.9, [0, 1, 2], True),           # two of three is nothing
    (0.25, 2.35, list(range(10)) * 40, True),   # two or three classes of ten by luck: the loss is that of ignorance
    (0.25, 1.95, list(range(10)) * 40, False),  # weak, but it knows something
    (0.10, 1.95, list(range(10)) * 40, True),   # the labels are likely, but no more of the answers are right
    (0.38, 2.09, list(range(10)) * 40, True),   # the luckiest of many heads
    (0.60, 9.00, list(range(10)) * 40, False),  # good, and much too sure
    (0.75, 0.3, [0] * 300 + [1] * 100, True),   # always the common class
    (0.90, 0.3, [0] * 300 + [1] * 100, False),
    (1.00, 0.1, [0] * 385 + [1] * 5, False), (1.00, 0.1, [0] * 12 + [1], False)])  # all right, though one class is rare
def test_luck_and_knowledge_are_told_apart(accuracy, loss, labels, lucky):
    assert by_luck(*answers(accuracy, loss, labels)) == lucky


class Answers(nn.Module):
    "Gives the logits that belong to an image, which holds its own number."
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.float())
    def forward(self, x): return self.logits[(x[:, 0, 0, 0] + 256 * x[:, 0, 0, 1]).round().long()]


def numbered(labels):
    y, i = torch.tensor(labels), torch.arange(len(labels))
    x = torch.stack([i % 256, i // 256], 1).view(-1, 1, 1, 2).expand(-1, 1, 2, 2)
    return ImageData(x.to(torch.uint8), y, [str(c) for c in range(max(labels) + 1)], mean=(0.,), std=(1 / 255,))


RARE = [0] * 95 + [1] * 5


@pytest.mark.parametrize('gap', [2., 5., 20., 100.])  # unsure, and much too sure of its mistake
@pytest.mark.parametrize('labels', [RARE, [1 - y for y in RARE], [0] * 380 + [1] * 20])
def test_a_teacher_that_finds_every_image_of_a_rare_class_passes(labels, gap):
    y = torch.tensor(labels)
    said = y.clone()
    common = (y == y.mode().values).nonzero()[: len(y) // 100, 0]
    said[common] = 1 - said[common]
    reached = check_teacher(Answers(gap * F.one_hot(said, 2)), numbered(labels))
    assert reached == pytest.approx(1 - len(common) / (y == y.mode().values).sum().item() / 2)


def test_the_error_of_the_exam_states_what_was_reached_and_what_was_needed():
    with pytest.raises(ValueError) as error: check_teacher(Answers(torch.tensor([[3., 0.]] * 100)), numbered(RARE))
    for said in ('balanced accuracy 50.0% on 100', 'Found: balanced accuracy 50.0%', 'cross-entropy 0.1986 nats',
                 'at most 0.1687', 'balanced one of at most 0.1733', 'one in a thousand shuffles'):
        assert said in str(error.value), said
    assert 'accuracy above' not in str(error.value)  # with two classes no accuracy is enough
    said = 'a balanced accuracy above 50.0%, a cross-entropy of at most 1.957'
    with pytest.raises(ValueError, match=said):
        check_teacher(Answers(torch.zeros(100, 10)), numbered(list(range(10)) * 10))


@pytest.mark.parametrize('labels', [[0, 1], [0, 1, 2] * 2, RARE[-10:], list(range(10)), [0] * 30 + [1]], ids=len)
def test_of_few_images_a_perfect_score_is_enough_and_a_guess_is_not(labels):
    y = torch.tensor(labels)
    sure = 6. * F.one_hot(y, max(labels) + 1)
    assert not by_luck(sure, y) and by_luck(sure[:1].expand_as(sure), y) and by_luck(torch.zeros_like(sure), y)
    if len(labels) < 10: assert by_luck(torch.cat([sure[:1].flip(1), sure[1:]]), y)  # one mistake


def test_a_guesser_that_knows_how_frequent_the_classes_are_does_not_pass():
    g, y = torch.Generator().manual_seed(0), torch.tensor([0] * 190 + [1] * 10)
    for _ in range(100):
        said = (torch.rand(200, generator=g) < 0.05).long()
        assert by_luck(3 * F.one_hot(said, 2), y)


def clusters(labels, width=64, seed=0):
    "Features that tell the classes apart; on them the logits of a new head are as small as on those of a real teacher."
    g, y = torch.Generator().manual_seed(seed), torch.tensor(labels)
    centres = torch.randn(max(labels) + 1, width, generator=g)
    return (centres[y] + 0.2 * torch.randn(len(y), width, generator=g)).relu(), y


@pytest.mark.parametrize('labels', [list(range(10)) * 30, RARE, [1 - y for y in RARE], list(range(100)) * 3],
                         ids=['ten', '95:5', '5:95', 'hundred'])
def test_no_head_of_three_hundred_that_were_never_trained_passes(labels):
    torch.manual_seed(0)
    (x, y), found = clusters(labels), []
    for _ in range(300):
        with torch.no_grad(): found.append(nn.Linear(64, max(labels) + 1)(x))
    assert all(by_luck(logits, y) for logits in found)
    assert not by_luck(4. * F.one_hot(y, max(labels) + 1), y)


@pytest.mark.parametrize('seed', [0, 1])
def test_no_untrained_head_on_a_real_teacher_passes(seed):
    train, valid, test = digits()
    torch.manual_seed(seed)
    model = digit_teacher()
    fit(Supervised(model), train, Recipe(epochs=5, batch_size=64, lr=0.05, precision='float32'))
    features, y = predict(nn.Sequential(*list(model.children())[:-1]), train), train.y
    some = torch.cat([(y == 3).nonzero()[:95, 0], (y == 8).nonzero()[:5, 0]])
    for x, labels, C in ((features[:400], y[:400], 10), (features[some], (y[some] == 8).long(), 2)):
        with torch.no_grad(): assert all(by_luck(nn.Linear(128, C)(x), labels) for _ in range(300))
    assert check_teacher(model, valid) > 0.9


def test_an_exam_leaves_the_random_numbers_of_a_training_alone(teacher):
    torch.manual_seed(0)
    check_teacher(teacher, images(seed=1))
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))


class Then(nn.Module):
    "A model, and a function of its outputs."
    def __init__(self, model, f):
        super().__init__()
        self.model, self.f = model, f
    def forward(self, x): return self.f(self.model(x))


@pytest.mark.parametrize('kind,f,remedy', [
    ('softmax', lambda v: v.softmax(1), lambda p: p.clamp(min=1e-12).log()),
    ('softmax', lambda v: (v/4).softmax(1), lambda p: p.clamp(min=1e-12).log()),
    ('softmax', lambda v: v.softmax(1).bfloat16(), lambda p: p.float().clamp(min=1e-12).log()),
    ('softmax', lambda v: v.softmax(1).half(), lambda p: p.float().clamp(min=1e-12).log()),
    ('sigmoid', lambda v: v.sigmoid(), lambda p: torch.logit(p, eps=1e-6)),
    ('sigmoid', lambda v: v.sigmoid().bfloat16(), lambda p: torch.logit(p.float(), eps=1e-6))])
def test_the_exam_refuses_probabilities_and_its_remedy_passes(teacher, kind, f, remedy):
    data, bad = images(seed=1), Then(teacher, f)
    declared = Teacher(bad, outputs='probabilities' if kind == 'softmax' else 'sigmoid')
    said = f"probabilities, as {kind} makes them.*last layer.*Teacher.model, outputs='{declared.outputs}'"
    for model in (bad, Teacher(bad)):
        with pytest.raises(ValueError, match=said): check_teacher(model, data)
    with pytest.raises(ValueError, match='probabilities'): fit(Distill(net(), bad), images(), RECIPE, data)
    fit(Distill(net(), bad, examine=False), images(), RECIPE, data)
    for good in (Then(bad, remedy), declared):
        assert check_teacher(good, data) > 0.9
        fit(Distill(net(), good), images(), RECIPE, data)


def test_log_probabilities_are_logits(teacher):
    data, z = images(seed=1), torch.randn(120, CLASSES)
    logs = Then(teacher, lambda v: v.log_softmax(1))
    check_teacher(logs, data)
    ours, theirs = predict(logs, data), predict(teacher, data)
    for T in (1., 4., 20.):
        assert kd_loss(z, ours, T).item() == pytest.approx(kd_loss(z, theirs, T).item(), rel=1e-4)


@pytest.mark.parametrize('C', [2, 3, 10])
def test_logits_of_real_teachers_are_never_taken_for_probabilities(C):
    train, valid, _ = digits()
    some = lambda d: ImageData(d.x[d.y < C], d.y[d.y < C], d.classes[:C], mean=d.mean, std=d.std)
    train, valid = some(train), some(valid)
    recipe = Recipe(batch_size=64, optimizer='adamw', lr=0.01, warmup=0., precision='float32')
    for seed in range(3):
        for steps in (4, 16, 60):  # from hardly better than chance to good
            torch.manual_seed(seed)
            model = build_model('digit_student', C, 1, 8)
            fit(Supervised(model), train, replace(recipe, steps=steps, seed=seed), device='cpu', progress=False)
            assert probability_kind(predict(model, valid.subset(range(64)))) is None
            scaled = Then(model, lambda v: 1e-3*v)  # logits near 0
            assert probability_kind(predict(scaled, valid.subset(range(64)))) is None


@pytest.mark.parametrize('name', ['resnet8', 'resnet20', 'digit_teacher', 'digit_student'])
def test_logits_of_networks_that_were_never_trained_are_never_taken_for_probabilities(name):
    side, channels = (8, 1) if 'digit' in name else (32, 3)
    for seed in range(3):
        torch.manual_seed(seed)
        model, x = build_model(name, 10, channels, side).eval(), torch.randn(16, channels, side, side)
        with torch.no_grad(): v = model(x)
        for logits in (v, 1e-4*v, 100*v, v.bfloat16(), v.relu(), torch.zeros(16, 10), v.log_softmax(1)):
            assert probability_kind(logits) is None


def test_the_exam_asks_only_about_labelled_images_and_changes_nothing(teacher):
    data = images().unlabelled(torch.arange(30))
    teacher.train()
    before = fingerprint(teacher.state_dict())
    check_teacher(teacher, data)
    assert teacher.training and fingerprint(teacher.state_dict()) == before


def test_the_exam_sees_the_teachers_own_form_and_classes(teacher):
    "Small dark pictures for the student; what the teacher needs is made from the stored pixels, by its contract."
    sight = images()
    other = Then(teacher, lambda v: v[:, [2, 0, 1]])
    contract = Teacher(other, ['bright', 'dark', 'middle'], sight.mean, sight.std, sight.size)
    students, valid = (images(seed=s).replace(size=2, mean=[0.9], std=[9.]) for s in (0, 1))
    small = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))
    fit(Distill(small, contract), students, RECIPE, valid)
    assert check_teacher(contract, valid) > 0.9
    with pytest.raises(ValueError, match='does not take inputs'): check_teacher(contract.model, valid)
    said = re.escape("in another order") + '.*' + re.escape("classes=['bright', 'dark', 'middle']")
    with pytest.raises(ValueError, match=said): check_teacher(contract.model, images(seed=1))


# --- what a teacher reached

def chance_of_so_few(right, n, before, items):
    "Fisher's exact test in fractions: the right answers of both measurements in one urn."
    ways = lambda k: math.comb(n, k) * math.comb(items, right + before - k)
    every = range(max(0, right + before - items), min(n, right + before) + 1)
    return Fraction(sum(ways(k) for k in every if k <= right), sum(map(ways, every)))


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 400), st.integers(1, 400), st.floats(0, 1), st.floats(0, 1))
def test_a_fall_is_judged_by_fishers_exact_test(n, items, now, then):
    right, before = round(now * n), round(then * items)
    expected = chance_of_so_few(right, n, before, items)
    if abs(float(expected) - 0.0005) > 1e-9:
        assert fell_below(right / n, n, before / items, items) == (expected < 0.0005)


def test_an_honest_teacher_is_rarely_refused_and_a_worse_one_mostly():
    g = torch.Generator().manual_seed(0)
    def refused(now, then, n=200, items=180, times=4000):
        draws = [torch.binomial(torch.full((times,), float(m)), torch.full((times,), p), generator=g) / m
                 for m, p in ((n, now), (items, then))]
        return sum(fell_below(a, n, b, items) for a, b in zip(*(d.tolist() for d in draws))) / times
    assert refused(0.93, 0.93) < 0.002 and refused(0.4, 0.4) < 0.002 and refused(0.96, 0.93) == 0
    assert refused(0.7, 0.93) > 0.98


def falls(right, n=100, C=4, gap=6.):
    "Answers of which so many are right, the wrong ones spread over all classes, and their data."
    y = torch.arange(n) % C
    said = torch.where(torch.arange(n) * 37 % n < right, y, (y + 1 + torch.arange(n) // C % (C - 1)) % C)
    return Answers(gap * F.one_hot(said, C)), numbered(y.tolist())


def test_a_teacher_that_is_worse_than_it_was_is_refused_with_both_numbers():
    record = {'accuracy': 0.93, 'items': 180}
    def exam(right, **reached):
        model, data = falls(right)
        return check_teacher(Teacher(model, **reached), data)
    least = next(k for k in range(101) if chance_of_so_few(k, 100, round(0.93 * 180), 180) >= 0.0005)
    assert exam(least, reached=record) == least / 100 and exam(100, reached=record) == 1
    said = (f'the teacher reaches accuracy {least - 1}.0% on 100 validation items, but it reached 93.0% on 180 items '
            r'before, which luck does not explain: .*normalisation, size, crop.*reached=None\) takes it')
    with pytest.raises(ValueError, match=said): exam(least - 1, reached=record)
    assert exam(least - 1) == exam(least - 1, reached=None) == (least - 1) / 100
    alike = next(k for k in range(101) if chance_of_so_few(k, 100, 93, 100) >= 0.0005)  # as many items then as now
    assert exam(alike, reached={'accuracy': 0.93}) == alike / 100
    with pytest.raises(ValueError, match='it reached 93.0% before'): exam(alike - 1, reached={'accuracy': 0.93})
    other = "reached must be numbers by the names of the data's measures .accuracy, balanced_accuracy, .*, but is "
    for bad in ({'bits_per_byte': 0.1, 'items': 180}, {'acc': .999, 'items': 10000}, {'Accuracy': 99.9}):
        with pytest.raises(ValueError, match=other): exam(60, reached=bad)
    with pytest.raises(ValueError, match='accuracy of reached must be from 0 to 1, but is 93'):
        exam(60, reached={'accuracy': 93., 'items': 180})


def test_a_run_asks_what_a_teacher_reached_and_a_mean_is_not_compared(teacher, model):
    dim = images(seed=1).replace(mean=[0.59])
    worse = evaluate(teacher, dim).accuracy
    assert 0.5 < worse < 0.9
    record = Teacher(teacher, reached={'accuracy': 0.99, 'items': 400})
    fit(Distill(net(), teacher), images(), RECIPE, dim)
    with pytest.raises(ValueError, match='it reached 99.0% on 400 items before'):
        fit(Distill(net(), record), images(), RECIPE, dim)
    fit(Distill(net(), record), images(), RECIPE, images(seed=1))
    check_teacher(Teacher(model, reached={'bits_per_byte': 5., 'items': 60}), text(seed=1))


# --- classes in another order

def permuted(model, order): return Then(model, lambda v: v[:, order])


@pytest.mark.parametrize('order', [[1, 2, 0], [2, 0, 1]])
def test_the_exam_finds_the_order_of_the_outputs_and_its_remedy_passes(teacher, order):
    data, other = images(600, seed=1), permuted(teacher, order)
    names = [data.classes[i] for i in order]
    said = 'its outputs seem to be in another order, in which it is right on .* say it with ' + \
        re.escape(f'Teacher(..., classes={names})')
    with pytest.raises(ValueError, match=said) as e: check_teacher(other, data)
    assert 'never trained' not in str(e.value)
    named = Teacher(other, classes=names)
    assert check_teacher(named, data) == check_teacher(teacher, data)
    assert torch.equal(predict(named, data), predict(teacher, data))
    with pytest.raises(ValueError, match=said): check_teacher(Teacher(other, classes=data.classes), data)


def test_the_order_is_said_of_a_teacher_that_knows_more_classes(teacher):
    data = images(600, seed=1)
    wide = Then(teacher, lambda v: torch.stack([v[:, 1], v[:, 0] - 50, v[:, 2], v[:, 0]], 1))
    told = Teacher(wide, ['dark', 'night', 'middle', 'bright'])  # it is middle, night, bright, dark
    with pytest.raises(ValueError, match=re.escape("classes=['middle', 'night', 'bright', 'dark']")):
        check_teacher(told, data)
    assert check_teacher(Teacher(wide, ['middle', 'night', 'bright', 'dark']), data) > 0.9


def test_two_classes_that_changed_places_are_warned_of_and_refused_where_more_was_reached():
    labels = list(range(10)) * 40
    swapped = 6. * F.one_hot(torch.tensor([{2: 5, 5: 2}.get(y, y) for y in labels]), 10)
    data = numbered(labels)
    names = [{'2': '5', '5': '2'}.get(c, c) for c in map(str, range(10))]
    said = 'another order, in which it is right on 100.0% .*' + re.escape(f'classes={names}')
    with pytest.warns(UserWarning, match='reaches accuracy 80.0%, but its outputs seem to be in ' + said +
                      '.*It is taken as it is'):
        assert check_teacher(Answers(swapped), data) == pytest.approx(0.8)
    with pytest.raises(ValueError, match='reached 99.0% on 400 items before, .*' + said):
        check_teacher(Teacher(Answers(swapped), reached={'accuracy': 0.99, 'items': 400}), data)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        check_teacher(Teacher(Answers(swapped), classes=names), data)


@pytest.mark.parametrize('labels', [pytest.param(list(range(10)) * 60, id='ten'),
                                    pytest.param(list(range(100)) * 6, id='hundred', marks=pytest.mark.slow)])
def test_heads_that_were_never_trained_are_in_no_order(labels):
    torch.manual_seed(0)
    x, y = clusters(labels)
    for _ in range(100):
        with torch.no_grad(): v = nn.Linear(64, max(labels) + 1)(x)
        assert _other_order(v, y, None) is None


@pytest.mark.parametrize('right', [30, 45, 60, 90, 100])
def test_a_teacher_that_is_only_weak_is_in_no_other_order(right):
    "Whether its mistakes are spread or always the same."
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        y = torch.randint(10, (1000,), generator=g)
        wrong = torch.rand(1000, generator=g) * 100 > right
        for other in (torch.randint(10, (1000,), generator=g), (y + 1) % 10 if right > 50 else y):
            v = 5. * F.one_hot(torch.where(wrong, other, y), 10) + torch.randn(1000, 10, generator=g)
            assert _other_order(v, y, None) is None


def test_an_order_is_looked_for_only_where_it_can_be_found():
    y = torch.arange(12) % 3
    assert _other_order(9. * F.one_hot((y + 1) % 3, 3), y, None) is None        # too few answers
    assert _other_order(torch.zeros(2, 10**6), torch.zeros(2).long(), None) is None
    assert _other_order(torch.zeros(1, 3), torch.zeros(1).long(), None) is None


# --- the exam where an item has many places

def test_a_language_model_is_examined_at_its_places_and_measured_by_its_data(model):
    valid = text(seed=1)
    assert check_teacher(model, valid) == pytest.approx(evaluate(model, valid).bits_per_byte, rel=1e-6)
    torch.manual_seed(3)
    said = r'reaches bits per byte \d\.\d+ on 60 validation items, which is no better than chance'
    with pytest.raises(ValueError, match=said): check_teacher(speaker(), valid)
    for kind, outputs in (('softmax', 'probabilities'), ('sigmoid', 'sigmoid')):
        bad = Then(model, (lambda v: v.softmax(-1)) if kind == 'softmax' else (lambda v: v.sigmoid()))
        with pytest.raises(ValueError, match=f"as {kind} makes them.*outputs='{outputs}'"): check_teacher(bad, valid)
        assert check_teacher(Teacher(bad, outputs=outputs), valid) < 4


def test_places_that_are_not_there_or_have_no_label_are_not_judged(model):
    class Damaged(nn.Module):
        "Says nothing where the text has ended, and masks the byte that is the label of what is unlabelled."
        def forward(self, x): return model(x).masked_fill((x == 0)[..., None], math.nan)
    class Unlabelled(Bytes):
        def subset(self, indices): return Unlabelled(self.lines[indices])
        def get(self, index, view=None):
            batch = super().get(index, view)
            return batch._replace(y=batch.y.where(batch.index[:, None] % 2 == 0, UNLABELLED),
                                  weight=batch.weight * (batch.x > 0))
        def measure(self, answers): return {'bits_per_byte': float(len(list(answers)))}
    assert check_teacher(Damaged(), Unlabelled(text().lines)) == 1
    kept = []
    list(exam._answers(Teacher(Damaged()), Unlabelled(text().lines), kept))
    batch = text().get(torch.arange(0, 60, 2))
    there = (batch.weight > 0) & (batch.x > 0)
    assert torch.equal(kept[0][1], batch.y[there]) and torch.equal(kept[0][0], model(batch.x)[there])


def test_what_a_guesser_knows_is_asked_of_the_data(model):
    class Sure(Bytes):
        "Data that say that one byte is nearly all there is, so that hardly anything is better than a guess."
        chance = torch.tensor([1e-6] * (BYTES - 1) + [1 - 1e-6 * (BYTES - 1)])
        def subset(self, indices): return Sure(self.lines[indices])
    check_teacher(model, text())
    with pytest.raises(ValueError, match='cross-entropy of at most 0.00'): check_teacher(speaker(), Sure(text().lines))
    y = text().lines.flatten().long()
    y = y[y > 0]
    assert exam._pass_marks(y).loss > 1 > 0.01 > exam._pass_marks(y, Sure.chance).loss
    assert exam._pass_marks(y, Sure.chance)[::2] == exam._pass_marks(y)[::2]  # those of the balanced measures stay
    data = images(seed=1)
    assert exam._pass_marks(data.y, data.chance) == exam._pass_marks(data.y)


@pytest.mark.parametrize('places, classes', [(1, 2), (1, 1000), (8, 16), (1024, 50_257), (224**2, 21), (10**7, 10**6)])
def test_a_thousand_to_ten_thousand_places_are_judged_and_they_fit_into_memory(places, classes):
    ask, judge = exam._enough(places, classes, 1000)
    assert 1 <= ask <= 1000 <= judge <= 10_000 and (ask == 1000 or ask * places >= 1000)
    assert ask == 1 or 4 * ask * places * classes <= 2**29 and 8 * judge * classes <= 2**29


def test_fewer_items_are_asked_about_where_each_has_many_places(monkeypatch, model):
    asked = []
    counted = Then(model, lambda v: asked.append(len(v)) or v)
    check_teacher(counted, text(1000), items=100)
    assert sum(asked[1:]) == 100  # of 1000; before it, two for the shape
    monkeypatch.setattr(exam, '_enough', lambda places, classes, items: (places, 7))
    asked.clear()
    value, z, y = exam._sit(Teacher(counted), *exam._some(text(1000), 100))
    assert asked == [8] and z.shape == (7, BYTES) and y.shape == (7,)


def test_distill_checks_before_the_first_step(teacher):
    blank = net()
    nn.init.zeros_(blank[-1].weight)
    with pytest.raises(ValueError, match='never trained'): fit(Distill(net(), blank), images(), RECIPE, images(seed=1))
    with pytest.raises(ValueError, match='never trained'): fit(Distill(net(), blank), images(), RECIPE)
    said = r'gives outputs of shape \(5,\).*3 classes'
    with pytest.raises(ValueError, match='the student ' + said): fit(Distill(net(5), teacher), images(), RECIPE)
    with pytest.raises(ValueError, match='the teacher ' + said): fit(Distill(net(), net(5)), images(), RECIPE)
    temperatures, alphas = [{'temperature': T} for T in (0, -1, math.nan)], [{'alpha': a} for a in (-0.1, 1.1)]
    for bad in temperatures + alphas:
        with pytest.raises(ValueError, match=next(iter(bad))): Distill(net(), teacher, **bad)


# --- the objective

def test_the_parts_are_the_formulas(teacher):
    student, batch = net(), images().get(torch.arange(16))
    parts = Distill(student, teacher, 3., 0.25)(batch)
    z, v, T = student(batch.x).double(), teacher.eval()(batch.x).double(), 3.
    p, q = (v / T).softmax(1), (z / T).softmax(1)
    soft = 0.25 * T**2 * (p * (p.log() - q.log())).sum(1).mean()
    hard = -0.75 * z.log_softmax(1)[torch.arange(16), batch.y].mean()
    assert parts['soft'].item() == pytest.approx(soft.item(), rel=1e-4)
    assert parts['hard'].item() == pytest.approx(hard.item(), rel=1e-4)


def test_the_teacher_answers_before_the_student_keeps_tensors_for_the_backward_pass(teacher):
    objective, order = Distill(net(), teacher), []
    objective.model.register_forward_pre_hook(lambda *_: order.append('student'))
    hook = teacher.register_forward_pre_hook(lambda *_: order.append('teacher'))
    objective(images().get(torch.arange(4)))
    hook.remove()
    assert order == ['teacher', 'student']


def test_the_weight_of_a_place_and_the_settings_of_the_hard_part_reach_the_loss(model):
    batch, student = text().get(torch.arange(12), torch.arange(12) % 3), speaker()
    w = torch.linspace(0.5, 2, BYTES)
    objective = Distill(student, model, 2., 0.3, label_smoothing=0.1, class_weights=w)
    parts, z, v = objective(batch), student(batch.x).double(), model(batch.x).double()
    y, log_q = F.one_hot(batch.y, BYTES).double(), z.log_softmax(-1)
    hard = -(w * (0.9 * y + 0.1 / BYTES) * log_q).sum(-1)                     # (B, L)
    log_p, log_r = (v / 2).log_softmax(-1), (z / 2).log_softmax(-1)
    soft = 4 * (log_p.exp() * (log_p - log_r)).sum(-1)
    share = batch.weight.double() / batch.weight.sum(1, keepdim=True)
    for name, alpha, part in (('hard', 0.7, hard), ('soft', 0.3, soft)):
        assert parts[name].item() == pytest.approx(alpha * (share * part).sum(1).mean().item(), rel=1e-5)
    assert 0 < batch.weight.mean() < 1


def test_a_student_of_text_learns_from_its_teacher(model):
    torch.manual_seed(1)
    student = speaker(4)
    before = evaluate(student, text(seed=1)).bits_per_byte
    recipe = replace(RECIPE, steps=60, optimizer='adam', lr=0.03)
    history = fit(Distill(student, model), text(), recipe, text(seed=1))
    assert history.last['bits_per_byte'] < min(before, 3.5)


def test_a_network_that_taught_can_be_trained_afterwards(teacher):
    taught, before = copy.deepcopy(teacher).train(), fingerprint(teacher.state_dict())
    fit(Distill(net(), taught), images(), RECIPE, images(seed=1))
    assert taught.training and all(p.requires_grad and p.grad is None for p in taught.parameters())
    assert fingerprint(taught.state_dict()) == before
    fit(Supervised(taught), images(), RECIPE)
    assert fingerprint(taught.state_dict()) != before


@pytest.mark.parametrize('hidden', ['student', 'teacher'])
def test_a_mask_is_named_for_places_and_only_where_they_count(model, hidden):
    def masks(wherever):
        return Then(model, lambda v: v.index_fill(-1, torch.tensor([3]), -math.inf) if wherever else v)
    class Ends(nn.Module):
        "Masks a byte behind the end of a line, where nothing counts."
        def forward(self, x):
            return model(x).masked_fill((x == 0)[..., None] & (torch.arange(BYTES) == 3), -math.inf)
    data = Bytes(text().lines * (text().lines != 3))  # no label is 3
    batch = data.get(torch.arange(12))
    batch = batch._replace(weight=batch.weight * (batch.x > 0))
    both = {'student': masks(False), 'teacher': masks(False)}
    assert f'the {hidden} masks class 3' in Distill(*(both | {hidden: masks(True)}).values()).explain(batch)
    assert Distill(*(both | {hidden: Ends()}).values()).explain(batch) is None


@pytest.mark.parametrize('scale, warns', [(1e-4, True), (1., False)])
def test_small_logits_are_noticed_at_all_places(model, scale, warns):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        Distill(Then(speaker(), lambda v: scale * v), model, standardize=True).check(text())
    assert any('logits differ by only' in str(w.message) for w in said) == warns


def test_alpha_0_is_supervised_training(teacher):
    def weights(objective):
        torch.manual_seed(0)
        student = net()
        fit(objective(student), images(), RECIPE)
        return fingerprint(student.state_dict())
    assert weights(Supervised) == weights(lambda s: Distill(s, teacher, alpha=0.))


def test_images_without_labels_are_learned_from_the_teacher_alone(teacher):
    data = images()
    hidden = data.unlabelled(torch.arange(30))
    assert (hidden.y == UNLABELLED).sum() == 90
    batch = hidden.get(torch.arange(60, 76))
    parts = Distill(net(), teacher)(batch)
    assert parts['hard'].item() == 0 and parts['soft'].item() > 0
    def weights(labels):
        torch.manual_seed(0)
        student = net()
        fit(Distill(student, teacher, alpha=1.), labels, RECIPE)
        return fingerprint(student.state_dict())
    assert weights(hidden) == weights(data)  # alpha = 1 never looks at a label


def test_two_lambdas_are_two_divergences():
    both = lambda s, t, temperature: 1 * (s - t).sum(), lambda s, t, temperature: 2 * (s - t).sum()
    one, two = (DistillationLoss(divergence=d) for d in both)  # also where they stand in one line
    assert repr(one) != repr(two)


def test_a_checkpoint_knows_temperature_alpha_and_divergence(teacher, tmp_path):
    torch.manual_seed(0)
    fit(Distill(net(), teacher, 4., 0.9), images(), RECIPE, folder=tmp_path)
    for other in (dict(temperature=3.), dict(alpha=0.8), dict(divergence=reverse_kl_loss), dict(standardize=True)):
        with pytest.raises(ValueError, match='another objective'):
            torch.manual_seed(0)
            settings = {'temperature': 4., 'alpha': 0.9} | other
            fit(Distill(net(), teacher, **settings), images(), RECIPE, folder=tmp_path, resume=True)


def test_a_teacher_that_need_not_pass_the_exam(teacher):
    weak = net()
    for p in weak.parameters(): torch.nn.init.zeros_(p)
    with pytest.raises(ValueError, match='no better than chance'): fit(Distill(net(), weak), images(), RECIPE)
    fit(Distill(net(), weak, examine=False), images(), RECIPE)
    assert describe(Distill(net(), weak, examine=False)) == describe(Distill(net(), weak))
    with pytest.raises(ValueError, match='the teacher'):
        fit(Distill(net(), net(CLASSES + 4), examine=False), images(), RECIPE)


def test_what_cannot_be_examined_or_distilled_is_refused(teacher):
    with pytest.raises(ValueError, match='no item has a label'): check_teacher(teacher, images().unlabelled([]))
    with pytest.raises(ValueError, match='another module'): fit(Distill(teacher, teacher), images(), RECIPE)


def test_a_student_that_shares_weights_with_its_teacher_is_refused():
    data, net = numbered([0, 1, 2] * 20), nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    for student in (nn.DataParallel(net), nn.Sequential(net)):
        objective = Distill(student, net, examine=False)
        with pytest.raises(ValueError, match='share no weight with it'): objective.check(data)
    other = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    Distill(other, net, examine=False).check(data)


@pytest.mark.parametrize('said, wrong', [('now', {'now': 1.5}), ('then', {'then': math.nan}), ('n', {'n': 0}),
                                         ('items', {'items': 10**18})])
def test_a_fall_is_one_of_shares(said, wrong):
    with pytest.raises(ValueError, match=f'^{said} must be'):
        fell_below(**({'now': 0.5, 'n': 10, 'then': 1., 'items': 10} | wrong))


@pytest.mark.parametrize('said, wrong', [
    ('labels must be 3 whole numbers', {'labels': torch.tensor([0, 1])}),
    ('labels must be from 0 to 2', {'labels': torch.tensor([0, 1, 3])}),
    ('labels must be from 0 to 2', {'labels': torch.tensor([0, 1, -100])}), ('labels', {'labels': torch.ones(3)}),
    ('chance must be', {'chance': torch.ones(3)}), ('chance must be', {'chance': torch.ones(2)/2}),
    ('logits', {'logits': torch.full((3, 3), math.nan)}), ('logits', {'logits': torch.zeros(0, 3)})])
def test_an_exam_needs_answers_and_labels_that_belong_together(said, wrong):
    with pytest.raises(ValueError, match=said): by_luck(**({'logits': torch.eye(3), 'labels': torch.arange(3)} | wrong))


def test_no_answers_are_no_probabilities():
    with pytest.raises(ValueError, match='the shape of outputs'): probability_kind(torch.zeros(0, 3))
