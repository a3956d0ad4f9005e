"""Distill, the teacher's exam, and comparisons that can be trusted."""
import copy, math, subprocess, sys, warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from distill_nb.files import fingerprint
from distill_nb.losses import UNLABELLED, DistillationLoss, dist_loss, dkd_loss, jsd_loss, kd_loss, reverse_kl_loss
from distill_nb.data import CropFlip, ImageData, digits
from distill_nb.models import digit_teacher
from distill_nb.training import DivergedError, Frozen, Recipe, Supervised, describe, fit, predict
from distill_nb.compare import Comparison, agreement, compare, interval, paired, share_interval
from distill_nb.logits import Distill, by_luck, check_teacher, probability_kind
from distill_nb.zoo import build_model
from distill_nb.report import stored_result

RECIPE = Recipe(steps=12, batch_size=16, lr=0.05, precision='float32')
CLASSES = 3


def images(n=120, seed=0):
    "Bright, middle and dark noise: easy to tell apart."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    x = torch.randint(0, 60, (n, 1, 4, 4), generator=g) + 80 * y.view(-1, 1, 1, 1)
    return ImageData(x.to(torch.uint8), y, ['dark', 'middle', 'bright'], augment=CropFlip(0, True))


def net(outputs=CLASSES):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))


@pytest.fixture(scope='module')
def teacher():
    torch.manual_seed(0)
    model = net()
    fit(Supervised(model), images(), Recipe(steps=150, batch_size=32, lr=0.1, precision='float32'))
    return model


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
    (lambda s, t: Distill(s, t, divergence=reverse_kl_loss), 'teacher', r'The teacher masks class 2 .* KL\(student ‖ teacher\) is infinite')])
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


@pytest.mark.parametrize('settings', [dict(standardize=True), dict(divergence=dist_loss), dict(divergence=partial(dist_loss, inter=2.))])
def test_a_student_that_begins_near_0_is_warned_of_and_stopped(teacher, settings):
    "The gradient of a loss that is blind to scale is as large as 1 / scale."
    def small(factor):
        torch.manual_seed(0)
        student = net()
        with torch.no_grad():
            for p in student[-1].parameters(): p.mul_(factor)
        return student
    with warnings.catch_warnings(), pytest.raises(DivergedError, match="the loss 'hard' became .*e[+].* A smaller learning rate"):
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
    assert check_teacher(Frozen(teacher), images(seed=1)) > 0.9
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0., 5., 0.]))
        def forward(self, x): return self.w.expand(len(x), 3)
    with pytest.raises(ValueError, match=r'33.3% of 120 validation images.*no better than chance.*never trained'): check_teacher(Constant(), images())


def test_a_majority_class_is_no_knowledge():
    y = torch.tensor([0] * 90 + [1] * 30)
    data = ImageData(torch.randint(0, 256, (120, 1, 4, 4), dtype=torch.uint8), y, ['common', 'rare'])
    class Common(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1., 0.]))
        def forward(self, x): return self.w.expand(len(x), 2)
    with pytest.raises(ValueError, match='75.0%'): check_teacher(Common(), data)


def answers(accuracy, loss, labels):
    "Logits that are right on the first images up to this accuracy, and whose cross-entropy is this; a wrong answer is the next class."
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
def test_luck_and_knowledge_are_told_apart(accuracy, loss, labels, lucky): assert by_luck(*answers(accuracy, loss, labels)) == lucky


class Answers(nn.Module):
    "Gives the logits that belong to an image, which holds its own number."
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.float())
    def forward(self, x): return self.logits[(x[:, 0, 0, 0] + 256 * x[:, 0, 0, 1]).round().long()]


def numbered(labels):
    y, i = torch.tensor(labels), torch.arange(len(labels))
    x = torch.stack([i % 256, i // 256], 1).view(-1, 1, 1, 2).expand(-1, 1, 2, 2)
    return ImageData(x.to(torch.uint8), y, [str(c) for c in range(max(labels) + 1)], (0.,), (1 / 255,))


RARE = [0] * 95 + [1] * 5


@pytest.mark.parametrize('gap', [2., 5., 20., 100.])  # unsure, and much too sure of its mistake
@pytest.mark.parametrize('labels', [RARE, [1 - y for y in RARE], [0] * 380 + [1] * 20])
def test_a_teacher_that_finds_every_image_of_a_rare_class_passes(labels, gap):
    y = torch.tensor(labels)
    said = y.clone()
    common = (y == y.mode().values).nonzero()[: len(y) // 100, 0]
    said[common] = 1 - said[common]
    assert check_teacher(Answers(gap * F.one_hot(said, 2)), numbered(labels)) == pytest.approx(0.99)


def test_the_error_of_the_exam_states_what_was_reached_and_what_was_needed():
    with pytest.raises(ValueError) as error: check_teacher(Answers(torch.tensor([[3., 0.]] * 100)), numbered(RARE))
    for said in ('95.0% of 100', 'balanced accuracy of 50.0%', 'cross-entropy of 0.1986 nats', 'at most 0.1687', 'balanced one of at most 0.1733', 'one in a thousand shuffles'): assert said in str(error.value), said
    assert 'accuracy above' not in str(error.value)  # with two classes no accuracy is enough
    with pytest.raises(ValueError, match='a balanced accuracy above 50.0%, a cross-entropy of at most 1.957'): check_teacher(Answers(torch.zeros(100, 10)), numbered(list(range(10)) * 10))


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
    "Features that tell the classes apart, of a size for which the logits of a new head are as small as on those of a real teacher."
    g, y = torch.Generator().manual_seed(seed), torch.tensor(labels)
    centres = torch.randn(max(labels) + 1, width, generator=g)
    return (centres[y] + 0.2 * torch.randn(len(y), width, generator=g)).relu(), y


@pytest.mark.parametrize('labels', [list(range(10)) * 30, RARE, [1 - y for y in RARE], list(range(100)) * 3], ids=['ten', '95:5', '5:95', 'hundred'])
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
    for model in (bad, Frozen(bad)):
        with pytest.raises(ValueError, match=f'probabilities, as {kind} makes them.*last layer.*{"log" if kind == "softmax" else "logit"}'): check_teacher(model, data)
    with pytest.raises(ValueError, match='probabilities'): fit(Distill(net(), bad), images(), RECIPE, data)
    fit(Distill(net(), bad, examine=False), images(), RECIPE, data)
    assert check_teacher(Then(bad, remedy), data) > 0.9


def test_log_probabilities_are_logits(teacher):
    data, z = images(seed=1), torch.randn(120, CLASSES)
    logs = Then(teacher, lambda v: v.log_softmax(1))
    check_teacher(logs, data)
    for T in (1., 4., 20.): assert kd_loss(z, predict(logs, data), T).item() == pytest.approx(kd_loss(z, predict(teacher, data), T).item(), rel=1e-4)


@pytest.mark.parametrize('C', [2, 3, 10])
def test_logits_of_real_teachers_are_never_taken_for_probabilities(C):
    train, valid, _ = digits()
    some = lambda d: ImageData(d.x[d.y < C], d.y[d.y < C], d.classes[:C], d.mean, d.std)
    train, valid = some(train), some(valid)
    for seed in range(3):
        for steps in (4, 16, 60):  # from hardly better than chance to good
            torch.manual_seed(seed)
            model = build_model('digit_student', C, 1, 8)
            fit(Supervised(model), train, Recipe(steps=steps, batch_size=64, optimizer='adamw', lr=0.01, warmup=0., precision='float32', seed=seed), device='cpu', progress=False)
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
        for logits in (v, 1e-4*v, 100*v, v.bfloat16(), v.relu(), torch.zeros(16, 10), v.log_softmax(1)): assert probability_kind(logits) is None


def test_the_exam_asks_only_about_labelled_images_and_changes_nothing(teacher):
    data = images().unlabelled(torch.arange(30))
    teacher.train()
    before = fingerprint(teacher.state_dict())
    check_teacher(teacher, data)
    assert teacher.training and fingerprint(teacher.state_dict()) == before


def test_distill_checks_before_the_first_step(teacher):
    blank = net()
    nn.init.zeros_(blank[-1].weight)
    with pytest.raises(ValueError, match='never trained'): fit(Distill(net(), blank), images(), RECIPE, images(seed=1))
    with pytest.raises(ValueError, match='never trained'): fit(Distill(net(), blank), images(), RECIPE)
    with pytest.raises(ValueError, match=r'the student gives outputs of shape \(5,\).*3 classes'): fit(Distill(net(5), teacher), images(), RECIPE)
    with pytest.raises(ValueError, match=r'the teacher gives outputs of shape \(5,\).*3 classes'): fit(Distill(net(), net(5)), images(), RECIPE)
    for bad in (dict(temperature=0), dict(temperature=-1), dict(temperature=math.nan), dict(alpha=-0.1), dict(alpha=1.1)):
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
    one, two = (DistillationLoss(divergence=d) for d in (lambda s, t, temperature: 1 * (s - t).sum(), lambda s, t, temperature: 2 * (s - t).sum()))
    assert repr(one) != repr(two)


def test_a_checkpoint_knows_temperature_alpha_and_divergence(teacher, tmp_path):
    torch.manual_seed(0)
    fit(Distill(net(), teacher, 4., 0.9), images(), RECIPE, folder=tmp_path)
    for other in (dict(temperature=3.), dict(alpha=0.8), dict(divergence=reverse_kl_loss), dict(standardize=True)):
        with pytest.raises(ValueError, match='another objective'):
            torch.manual_seed(0)
            fit(Distill(net(), teacher, **({'temperature': 4., 'alpha': 0.9} | other)), images(), RECIPE, folder=tmp_path, resume=True)


# --- comparing

@pytest.mark.parametrize('values', [[1., 2., 3.], [0.9, 0.91, 0.87, 0.93, 0.9]])
def test_the_interval_is_students(values):
    mean, ends = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values))
    assert ends == pytest.approx([low, high]) and mean == pytest.approx(sum(values) / len(values))
    assert interval([0.5]) == (0.5, None)


@pytest.mark.parametrize('shapes', [((4, 3), (1, 3)), ((4, 3), (4, 2)), ((0, 3), (0, 3)), ((4, 1), (4, 1)), ((4,), (4,))])
def test_agreement_refuses_what_would_be_broadcast(shapes):
    with pytest.raises(ValueError, match='student_logits and teacher_logits must have the'): agreement(*map(torch.zeros, shapes))


def test_agreement_counts_equal_choices():
    assert agreement(torch.tensor([[1., 0], [0, 1], [1, 0], [0, 1]]), torch.tensor([[2., 0], [3, 1], [9, 0], [1, 0]])) == 0.5


@pytest.mark.parametrize('right,n', [(0, 1), (1, 1), (0, 359), (359, 359), (357, 359), (4235, 5000), (1, 3)])
def test_the_interval_of_a_share_is_wilsons(right, n):
    p, z = right / n, stats.norm.ppf(0.975)
    centre, half = (p + z**2 / 2 / n) / (1 + z**2 / n), z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)
    assert share_interval(right, n) == pytest.approx([centre - half, centre + half], abs=1e-12)
    assert 0 <= share_interval(right, n)[0] <= p <= share_interval(right, n)[1] <= 1


@pytest.mark.parametrize('p', [0.5, 0.9, 0.95, 0.98, 0.99, 0.998])
def test_the_interval_of_a_share_holds_it_nearly_as_often_as_it_says(p):
    held = sum(stats.binom.pmf(k, 359, p) for k in range(360) if share_interval(k, 359)[0] <= p <= share_interval(k, 359)[1])
    assert 0.92 < held < 0.99


def test_rows_pair_by_seed():
    runs = [{'model': m, 'seed': s, 'valid_accuracy': v, 'seconds': 1.} for s, (a, b) in enumerate([(0.1, 0.2), (0.5, 0.6), (0.9, 1.0)]) for m, v in (('alone', a), ('distilled', b))]
    alone, distilled = Comparison(runs, 'alone').rows()
    low, high = alone['ci95']
    assert 'difference' not in alone and high - low > 1 and alone['valid_accuracy'] == pytest.approx(0.5) == (low + high) / 2
    assert distilled['difference'] == pytest.approx(0.1) and distilled['difference_ci95'] == pytest.approx([0.1, 0.1])


def runs_of(**values): return [{'model': m, 'seed': s, 'valid_accuracy': v} for m, found in values.items() for s, v in found.items()]


def test_runs_are_paired_by_their_seeds_in_whatever_order_they_stand():
    found = Comparison(runs_of(a={0: 0.1, 1: 0.5, 2: 0.9}, b={2: 1.0, 0: 0.2, 1: 0.6}), 'a')
    assert found.values('b', 'valid_accuracy') == [0.2, 0.6, 1.0] and found.seeds == [0, 1, 2]
    assert found.rows()[1]['difference_ci95'] == pytest.approx([0.1, 0.1])
    lines = [line.get_ydata().tolist() for line in found.plot().axes[0].lines]
    assert lines == [[0.1, 0.2], [0.5, 0.6], [0.9, 1.0]]


@pytest.mark.parametrize('runs,baseline,said', [
    (runs_of(a={0: 0.1, 1: 0.5}, b={0: 0.2}), 'a', r"'b' has none for \[1\]"),
    (runs_of(a={0: 0.1}, b={0: 0.2, 7: 0.3}), 'a', r"'a' has none for \[7\]"),
    (runs_of(a={0: 0.1}, b={0: 0.2}) + runs_of(b={0: 0.2}), 'a', r"each seed of a contender once, but 'b' has the seeds \[0, 0\]"),
    (runs_of(a={0: 0.1}), 'c', "name must be one of a, but is 'c'"),
    (runs_of(a={0: 0.1, 1: 0.1}) + [{'model': 'b', 'seed': 0, 'valid_accuracy': 0.1}, {'model': 'b', 'seed': 1}], 'a', r"'b' has no 'valid_accuracy' for the seeds \[1\]")])
def test_runs_that_can_not_be_paired_are_refused(runs, baseline, said):
    for summary in (Comparison.rows, Comparison.plot):
        with pytest.raises(ValueError, match=said): summary(Comparison(runs, baseline))


def test_a_column_has_the_name_of_its_measure():
    runs = [r | {'accuracy': r['valid_accuracy'] + 0.05, 'deepest': 0.7} for r in runs_of(a={0: 0.1, 1: 0.3})]
    found = Comparison(runs, 'a')
    for measure, mean in (('valid_accuracy', 0.2), ('accuracy', 0.25), ('deepest', 0.7)):
        row, = found.rows(measure)
        assert row[measure] == pytest.approx(mean) and set(row) == {'model', measure, 'ci95'}
    assert 'accuracy' in found.rows()[0] and 'accuracy' not in Comparison(runs_of(a={0: 0.1}), 'a').rows()[0]
    assert found.plot(measure='deepest').axes[0].get_ylabel() == 'deepest'
    with pytest.raises(ValueError, match="'a' has no 'top5'"): found.rows('top5')


def test_a_seed_that_occurs_twice_is_refused_before_anything_is_trained():
    def never(): raise AssertionError('a student was made')
    for seeds, said in (([0, 0], '0 occurs again'), ([3, 1, 2, 1], '1 occurs again'), ([], 'at least 1'), ((5, 5), '5 occurs again')):
        with pytest.raises(ValueError, match=f'seeds must be .*{said}'): compare(never, {'a': (Supervised, images())}, RECIPE, images(seed=1), seeds=seeds)


def test_a_factory_that_does_not_make_new_students_is_refused():
    def compared(make, seeds=2): return compare(make, {'a': (Supervised, images()), 'b': (Supervised, images())}, RECIPE, images(seed=1), seeds=seeds, progress=False)
    one, body, norm = net(), nn.Linear(16, 8), nn.BatchNorm1d(8)
    two = [net(), net()]
    def alternating(): return two[0] if two.reverse() else two[1]
    def shared_body(): return nn.Sequential(nn.Flatten(), body, nn.Linear(8, 3))
    def same_memory():
        model = net()
        model[1].weight.data = one[1].weight.data
        return model
    def shared_buffers():
        model = net()
        model[2].running_mean = norm.running_mean
        return model
    for make in (lambda: one, shared_body, same_memory, shared_buffers):
        with pytest.raises(ValueError, match='make_student must make a new network each time'): compared(make)
    with pytest.raises(ValueError, match='make_student must'): compared(alternating)
    trained = []
    def copies_of_the_last():
        trained.append(copy.deepcopy(trained[-1]) if trained else net())
        return trained[-1]
    with pytest.raises(ValueError, match='same initial weights for the same seed, but for seed 0'): compared(copies_of_the_last)
    with pytest.warns(UserWarning, match='the same initial weights for every seed'): compared(lambda: copy.deepcopy(one))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        compared(net)
        compared(lambda: copy.deepcopy(one), seeds=1)


def contenders(teacher, alone, transfer): return {'alone': (Supervised, alone), 'distilled': (lambda s: Distill(s, teacher), transfer)}


def test_contenders_start_alike_take_the_same_steps_and_read_the_test_split_once(teacher):
    started, steps = {}, {}
    def watch(name):
        def make(student):
            started.setdefault(name, []).append(fingerprint(student.state_dict()))
            return Supervised(student) if name == 'alone' else Distill(student, teacher)
        return make
    class Once(ImageData):
        reads = 0
        def batches(self, *args):
            Once.reads += 1
            return super().batches(*args)
    d = images(seed=2)
    test = Once(d.x, d.y, d.classes, d.mean, d.std)
    found = compare(net, {'alone': (watch('alone'), images().subset(range(30))), 'distilled': (watch('distilled'), images())},
                    Recipe(epochs=1, batch_size=16, precision='float32'), images(seed=1), test, teacher, seeds=3)
    assert started['alone'] == started['distilled'] and len(set(started['alone'])) == 3
    assert {len(h.losses['hard']) for h in found.histories.values()} == {8}  # ceil(120 / 16): the larger data set decides
    assert Once.reads == 3 * 2 + 1  # each trained student once, and the teacher
    rows = found.rows()
    assert {'accuracy', 'ci95', 'agreement', 'ece', 'seconds'} <= set(rows[0]) and found.plot() is not None
    assert all({'seed', 'valid_accuracy', 'accuracy', 'agreement', 'ece', 'seconds'} <= set(r) for r in found.runs)


def test_an_interrupted_comparison_continues(teacher, tmp_path):
    given = lambda: (net, contenders(teacher, images(), images()), RECIPE, images(seed=1))
    whole = compare(*given(), seeds=2)
    class Stop(Exception): pass
    def stops(student): raise Stop
    with pytest.raises(Stop): compare(net, {'alone': (Supervised, images()), 'distilled': (stops, images())}, RECIPE, images(seed=1), seeds=2, folder=tmp_path)
    resumed = compare(*given(), seeds=2, folder=tmp_path)
    strip = lambda c: [{k: v for k, v in r.items() if k != 'seconds'} for r in c.runs]
    assert strip(resumed) == strip(whole)


def test_a_comparison_of_nothing_is_refused(teacher):
    with pytest.raises(ValueError, match='contenders'): compare(net, {}, RECIPE, images())
    with pytest.raises(ValueError, match='seeds'): compare(net, contenders(teacher, images(), images()), RECIPE, images(), seeds=0)
    with pytest.raises(ValueError, match='grid'): tune(net, teacher, images(), images(), RECIPE, grid=())
    with pytest.raises(ValueError, match='no image has a label'): check_teacher(teacher, images().unlabelled([]))
    with pytest.raises(ValueError, match='another module'): fit(Distill(teacher, teacher), images(), RECIPE)


def test_a_comparison_does_not_take_over_another_ones_runs(teacher, tmp_path):
    compare(net, {'a': (Supervised, images())}, RECIPE, images(seed=1), seeds=1, folder=tmp_path)
    def changed():
        model = net()
        nn.init.ones_(model[-1].bias)
        return model
    with pytest.raises(ValueError, match='other initial weights'): compare(changed, {'a': (Supervised, images())}, RECIPE, images(seed=1), seeds=1, folder=tmp_path)


def test_tune_takes_the_first_of_the_best_on_the_validation_split(teacher):
    grid = ((1., 0.), (2., 0.), (4., 0.9))  # with alpha = 0 the temperature does nothing: the first two tie
    best, rows = tune(net, teacher, images(), images(seed=1), RECIPE, grid)
    assert [(r['temperature'], r['alpha']) for r in rows] == list(grid) and rows[0]['valid_accuracy'] == rows[1]['valid_accuracy']
    assert best == next((r['temperature'], r['alpha']) for r in rows if r['valid_accuracy'] == max(x['valid_accuracy'] for x in rows))


def test_tune_goes_on_where_a_pair_diverges(teacher, monkeypatch):
    def explodes_at_2(student, teacher, temperature, alpha):
        objective = Distill(student, teacher, temperature, alpha)
        forward = objective.forward
        if temperature == 2: objective.forward = lambda batch: {k: loss*math.inf for k, loss in forward(batch).items()}
        return objective
    monkeypatch.setattr('distill_nb.logits.Distill', explodes_at_2)
    best, rows = tune(net, teacher, images(), images(seed=1), RECIPE, ((2., 0.9), (4., 0.9)), seeds=1)
    assert best == (4., 0.9) and rows[0] == {'temperature': 2., 'alpha': 0.9, 'valid_accuracy': None, 'ci95': None} and rows[1]['valid_accuracy'] > 0
    with pytest.raises(DivergedError, match='every setting of distillation'): tune(net, teacher, images(), images(seed=1), RECIPE, ((2., 0.9),))
    with pytest.raises(ValueError, match='different'): tune(net, teacher, images(), images(seed=1), RECIPE, ((4., 0.9), (4., 0.9)))
    with pytest.raises(ValueError, match='test must be left out'): tune(net, teacher, images(), images(seed=1), RECIPE, test=images(seed=2))
    with pytest.raises(DivergedError, match='^distilled, seed 3: the loss'): compare(net, {'distilled': (lambda s: explodes_at_2(s, teacher, 2., 0.9), images())}, RECIPE, images(seed=1), seeds=[3])


def test_a_teacher_that_need_not_pass_the_exam(teacher):
    weak = net()
    for p in weak.parameters(): torch.nn.init.zeros_(p)
    with pytest.raises(ValueError, match='no better than chance'): fit(Distill(net(), weak), images(), RECIPE)
    fit(Distill(net(), weak, examine=False), images(), RECIPE)
    assert describe(Distill(net(), weak, examine=False)) == describe(Distill(net(), weak))
    with pytest.raises(ValueError, match='the teacher'): fit(Distill(net(), net(CLASSES + 4), examine=False), images(), RECIPE)


# --- tables

ROWS = [{'model': 'alone', 'images': 1234, 'accuracy': 0.5}, {'model': 'distilled', 'accuracy': None, 'ci95': [0.25, 1.]}]
TABLE = """| model | images | accuracy | ci95 |
| --- | --- | --- | --- |
| alone | 1,234 | 0.50 |  |
| distilled |  |  | [0.25, 1.00] |"""


def test_a_notebook_shows_a_table_and_everything_else_its_text():
    from IPython.core.formatters import DisplayFormatter
    table = markdown_table(ROWS, digits=2)
    assert table == TABLE
    assert DisplayFormatter().format(table)[0] == {'text/markdown': TABLE, 'text/plain': TABLE}


def test_a_table_needs_no_ipython():
    code = f"import sys; sys.modules['IPython'] = None; from distill_nb.compare import markdown_table; print(markdown_table({ROWS}, digits=2))"
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert p.stdout == TABLE + '\n', p.stderr


def test_rows_of_results_of_different_age_are_paired():
    old, new = ([r for r in stored_result(name)['rows'] if r['model'] == 'kd'][0] for name in ('methods_digits', 'dist_digits'))
    assert paired(new, old)[0] == pytest.approx(-paired(old, new)[0])
