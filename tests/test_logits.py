"""Distill, the teacher's exam, and comparisons that can be trusted."""
import math, warnings
from functools import partial

import pytest
import torch
from scipy import stats
from torch import nn

from distill_nb.data import CropFlip, ImageData
from distill_nb.logits import Comparison, Distill, agreement, by_luck, check_teacher, compare, interval, tune
from distill_nb.losses import UNLABELLED, DistillationLoss, dist_loss, dkd_loss, jsd_loss, reverse_kl_loss
from distill_nb.models import fingerprint
from distill_nb.training import DivergedError, Frozen, Recipe, Supervised, describe, fit

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


@pytest.mark.parametrize('accuracy,loss,labels,lucky', [
    (0.33, 0.9, [0, 1, 2] * 40, True),      # a guesser
    (1.00, 0.1, [0, 1, 2], False),          # all right, of very few images
    (0.67, 0.9, [0, 1, 2], True),           # two of three is nothing
    (0.25, 2.35, list(range(10)) * 40, True),   # two or three classes of ten by luck: the loss is that of ignorance
    (0.25, 1.95, list(range(10)) * 40, False),  # weak, but it knows something
    (0.60, 9.00, list(range(10)) * 40, False),  # good, and much too sure
    (0.75, 0.3, [0] * 300 + [1] * 100, True),   # always the common class
    (0.90, 0.3, [0] * 300 + [1] * 100, False),
    (1.00, 0.1, [0] * 385 + [1] * 5, False), (1.00, 0.1, [0] * 12 + [1], False)])  # all right, though one class is rare
def test_luck_and_knowledge_are_told_apart(accuracy, loss, labels, lucky): assert by_luck(accuracy, loss, torch.tensor(labels)) == lucky


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
    mean, half = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert interval([0.5]) == (0.5, None)


@pytest.mark.parametrize('shapes', [((4, 3), (1, 3)), ((4, 3), (4, 2)), ((0, 3), (0, 3)), ((4, 1), (4, 1)), ((4,), (4,))])
def test_agreement_refuses_what_would_be_broadcast(shapes):
    with pytest.raises(ValueError, match='student_logits and teacher_logits must have the'): agreement(*map(torch.zeros, shapes))


def test_agreement_counts_equal_choices():
    assert agreement(torch.tensor([[1., 0], [0, 1], [1, 0], [0, 1]]), torch.tensor([[2., 0], [3, 1], [9, 0], [1, 0]])) == 0.5


def test_rows_pair_by_seed():
    runs = [{'model': m, 'seed': s, 'valid_accuracy': v, 'seconds': 1.} for s, (a, b) in enumerate([(0.1, 0.2), (0.5, 0.6), (0.9, 1.0)]) for m, v in (('alone', a), ('distilled', b))]
    alone, distilled = Comparison(runs, 'alone').rows()
    assert 'difference' not in alone and alone['ci95'] > 0.5
    assert distilled['difference'] == pytest.approx(0.1) and distilled['difference_ci95'] == pytest.approx([0.1, 0.1])


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
