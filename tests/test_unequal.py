"""Classes of unequal size: what is measured, what weighs in the losses, and what a run says of each class."""
import html, json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from distill_nb import methods, run
from distill_nb.views import CropFlip
from distill_nb.protocol import Measure, class_weights
from distill_nb.data import ImageData, Splits, few_labels, judged_alike
from distill_nb.folders import image_folder
from distill_nb.sets import dataset_splits
from distill_nb.contract import Teacher, describe
from distill_nb.training import Supervised, evaluate, fit
from distill_nb.compare import Contender, compare, share_interval, table
from distill_nb.exam import by_luck, check_teacher
from distill_nb.self_distillation import SelfTeacher
from distill_nb.zoo import build_model
from distill_nb.methods import METHODS, Task, contender, rehearse
from networks import learner, student_of
from distill_nb.report import class_table, make_report, result_table, verdicts
from distill_nb.run import Options, _settings, prepare
from distill_nb.cli import distill_nb, run_command
from small import RECIPE, Texts, bigram

BALANCED = Measure('balanced_accuracy', share=True)
WITH_LABELS = [m for m in METHODS if m != 'data_free']


def dataset(counts, seed=0, side=8, classes=None, order=None):
    "Noise in the shade of its class, counts[c] images of class c."
    g, y = torch.Generator().manual_seed(seed), torch.tensor([c for c, n in enumerate(counts) for _ in range(n)])
    y = y[torch.randperm(len(y), generator=g)]
    x = torch.randint(0, 60, (len(y), 1, side, side), generator=g) + (190 * y // (len(counts) - 1)).view(-1, 1, 1, 1)
    return ImageData(x.to(torch.uint8), y, classes or [f'k{c}' for c in range(len(counts))], augment=CropFlip(1))


def student(): return build_model('digit_student', 3, 1, 8)
def alone(weights): return lambda s: Supervised(s, class_weights=weights)


# --- what is measured

@pytest.mark.filterwarnings('ignore:y_pred contains classes')
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=5), st.integers(1, 20), st.integers(0, 10**6))
def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_occur(counts, size, seed):
    counts = [n + (i < 2) for i, n in enumerate(counts)]  # two classes at least
    d, g = dataset(counts, seed), torch.Generator().manual_seed(seed)
    logits, there = torch.randn(len(d), len(counts), generator=g), torch.rand(len(d), generator=g) < 0.8
    there[d.y == 0], there[d.y == 1] = True, True
    def parts(d):
        for b in d.batches(size): yield logits[b.index], b._replace(weight=there[b.index].float())
    said, y = logits.argmax(1), d.y
    assert d.measure(parts(d))['balanced_accuracy'] == pytest.approx(balanced_accuracy_score(y[there], said[there]))
    recalls = d.recalls(said.masked_fill(~there, -1))
    for c, share in enumerate(recalls):
        own = there & (y == c)
        if own.any(): assert share == pytest.approx((said[own] == c).double().mean().item())
        else: assert share is None


def test_where_classes_are_equal_both_accuracies_are_the_same():
    d = dataset([7, 7, 7])
    found = d.measure([(torch.randn(21, 3, generator=torch.Generator().manual_seed(0)), d.get(torch.arange(21)))])
    assert found['balanced_accuracy'] == pytest.approx(found['accuracy'], abs=1e-12) and 0 < found['accuracy'] < 1
    assert d.sample_size(BALANCED) == 21


@pytest.mark.parametrize('counts,unequal', [
    ([10, 10], False), ([20, 10], False), ([21, 10], True), ([20, 10, 0], False), ([1, 2], False), ([1, 3], True)])
def test_balanced_accuracy_comes_first_where_a_class_has_more_than_twice_as_many_images(counts, unequal):
    d = dataset(counts)
    first = 'balanced_accuracy' if unequal else 'accuracy'
    assert d.unequal == unequal and d.measures[0].name == first and len(d.measures) == 4
    assert list(d.measure([(F.one_hot(d.y, len(counts)).float(), d.get(torch.arange(len(d))))]))[0] == first
    assert d.unlabelled([]).measures[0].name == 'accuracy'  # nothing is known of them


def test_only_labelled_images_say_whether_classes_are_unequal():
    d = dataset([20, 10])
    few = d.unlabelled(torch.cat([(d.y == 0).nonzero()[:, 0], (d.y == 1).nonzero()[:9, 0]]))
    assert few.counts.tolist() == [20, 9] and few.unequal and not d.unequal


def primary(splits): return [d.measures[0].name for d in splits]


@pytest.mark.parametrize('counts', [([900, 100], [50, 50], [450, 50]), ([300, 300, 30], [40, 40, 0], [60, 60, 6]),
                                    ([40, 40], [10, 10], [10, 3]), ([40, 9], [10, 10], [10, 10])])
def test_where_the_classes_of_one_split_are_unequal_all_are_judged_alike(counts):
    splits = Splits(*map(dataset, counts))
    assert set(primary(splits)) == {'accuracy', 'balanced_accuracy'}
    assert primary(judged_alike(splits)) == ['balanced_accuracy'] * 3
    assert [d.fingerprint() for d in judged_alike(splits)] == [d.fingerprint() for d in splits]


@pytest.mark.parametrize('counts, first', [(([40, 40], [10, 10], [9, 10]), 'accuracy'),
                                           (([40, 9], [10, 3], [10, 3]), 'balanced_accuracy')])
def test_splits_that_are_alike_already_stay_as_they_are(counts, first):
    splits = Splits(*map(dataset, counts))
    assert primary(judged_alike(splits)) == [first] * 3 and all(a is b for a, b in zip(splits, judged_alike(splits)))


def test_data_that_are_no_images_judge_by_their_own_measures():
    splits = judged_alike(Splits(dataset([9, 3]), Texts(), dataset([9, 9])))
    assert primary(splits) == ['balanced_accuracy', 'bits_per_letter', 'balanced_accuracy']


def test_how_a_data_set_is_judged_stays_with_it():
    d, own = dataset([20, 20]), dataset([20, 9])
    judged = d.replace(by_class=True)
    for made in (judged.subset([0, 1, 2]), judged.replace(name='x'), judged.to('cpu'), judged.to('meta'),
                 judged.unlabelled([0]), judged.seen(size=4)):
        assert made.by_class is True and primary([made]) == ['balanced_accuracy']
    assert primary([d, own, own.replace(by_class=False), judged.replace(by_class=None)]) == [
        'accuracy', 'balanced_accuracy', 'accuracy', 'accuracy']
    with pytest.raises(ValueError, match="by_class must be True, False or None, but is"): d.replace(by_class='yes')


def test_every_door_judges_its_splits_alike(tmp_path, monkeypatch):
    counts = dict(train=[60, 12], valid=[8, 8], test=[12, 3])
    made = {k: dataset(n, seed=i) for i, (k, n) in enumerate(counts.items())}
    for k, d in made.items():
        for i, (x, y) in enumerate(zip(d.x, d.y)):
            (tmp_path/k/f'k{y}').mkdir(parents=True, exist_ok=True)
            Image.fromarray(x[0].numpy()).save(tmp_path/k/f'k{y}'/f'{i}.png')
    assert primary(image_folder(tmp_path)) == ['balanced_accuracy'] * 3
    pairs = {k: torch.utils.data.TensorDataset(d.x, d.y) for k, d in made.items()}
    assert primary(dataset_splits(**pairs, classes=['k0', 'k1'])) == ['balanced_accuracy'] * 3
    monkeypatch.setattr(run, 'load_data', lambda *_: Splits(**made))
    job = prepare(Options(temperature=4., alpha=0.9, batch_size=16), Path('nowhere'))
    assert primary(job.data) == ['balanced_accuracy'] * 3 and job.measure == BALANCED


def test_an_interval_counts_the_images_that_tell_something():
    assert dataset([95, 5]).sample_size(BALANCED) == 19 and dataset([95, 5]).sample_size(Measure('accuracy')) == 100
    assert dataset([900, 1]).sample_size(BALANCED) == 4 and dataset([1, 1]).sample_size(BALANCED) == 2


# --- what weighs in the losses

@pytest.mark.parametrize('counts', [[10, 10], [95, 5], [3, 1, 40]])
def test_balanced_weights_are_those_of_scikit_learn(counts):
    d = dataset(counts)
    wanted = compute_class_weight('balanced', classes=np.arange(len(counts)), y=d.y.numpy())
    assert class_weights(d).tolist() == pytest.approx(wanted.tolist()) and class_weights(d).dtype == torch.float32
    half = d.unlabelled((torch.arange(len(d)) % 2 == 0) | (d.y == d.counts.argmin()))
    wanted = compute_class_weight('balanced', classes=np.arange(len(counts)), y=half.y[half.labelled].numpy())
    assert class_weights(half).tolist() == pytest.approx(wanted.tolist())


def test_a_class_without_a_label_has_no_weight():
    with pytest.raises(ValueError, match="without a labelled image of 'k1', 'k3'"): class_weights(dataset([4, 0, 3, 0]))
    with pytest.raises(ValueError, match='a Texts has no chance'): class_weights(Texts())


@pytest.fixture(scope='module')
def task():
    train = dataset([60, 20, 8])
    torch.manual_seed(0)
    teacher = build_model('digit_teacher', 3, 1, 8)
    fit(Supervised(teacher), train, replace(RECIPE, steps=30))
    labelled, transfer = few_labels(train, 30)
    return Task(student, teacher, labelled, transfer, RECIPE)


def losses_of(name, task, weights):
    "The losses of a method for the first images of its data, by students that are alike."
    torch.manual_seed(1)
    way = contender(name, task._replace(class_weights=weights), **METHODS[name].grid[0])
    objective = learner(way, student_of(name, 3)())[0].eval()
    batch = way.data.get(torch.arange(len(way.data)))
    objective.check(way.data)
    if hasattr(objective, 'prepare'): objective.prepare(batch)
    torch.manual_seed(2)
    return {k: v.item() for k, v in objective(batch).items()}, batch.y


@pytest.mark.parametrize('name', WITH_LABELS)
def test_class_weights_count_in_the_hard_loss_of_every_method_and_in_nothing_else(name, task, monkeypatch):
    monkeypatch.setattr(methods, 'fit', lambda *_, **__: None)  # the earlier student of born_again may be a new one
    plain, y = losses_of(name, task, None)
    same, twice = (losses_of(name, task, k * torch.ones(3))[0] for k in (1, 2))
    assert same == pytest.approx(plain) and plain['hard'] > 0
    assert twice == pytest.approx({k: v * (2 if k == 'hard' else 1) for k, v in plain.items()})
    parts = [losses_of(name, task, F.one_hot(torch.tensor(c), 3).float())[0]['hard'] for c in range(3)]
    assert sum(parts) == pytest.approx(plain['hard'], rel=1e-4) and min(parts) > 0  # each class has its own share


def test_the_earlier_student_learns_with_the_class_weights(task, monkeypatch):
    seen = []
    monkeypatch.setattr(methods, 'fit', lambda objective, *_, **__: seen.append(objective.loss.class_weights))
    weights = torch.tensor([1., 2, 3])
    contender('born_again', task._replace(class_weights=weights), temperature=4., alpha=0.5).objective(student())
    assert torch.equal(seen[0], weights)


def test_a_method_without_labels_refuses_class_weights(task):
    task = task._replace(class_weights=torch.ones(3))
    with pytest.raises(ValueError, match='class_weights must be left out for data_free'): rehearse('data_free', task)
    for name in WITH_LABELS: rehearse(name, task._replace(make_student=student_of(name, 3)))


@pytest.mark.parametrize('name', WITH_LABELS)
def test_weights_for_other_classes_are_refused_before_the_first_step(name, task, monkeypatch):
    monkeypatch.setattr(methods, 'fit', lambda *_, **__: None)
    way = contender(name, task._replace(class_weights=torch.ones(4)), **METHODS[name].grid[0])
    with pytest.raises(ValueError, match='class_weights must hold one number for each of the 3 classes, but hold 4'):
        learner(way, student_of(name, 3)())[0].check(way.data)


@pytest.mark.parametrize('name', ['alone', 'kd', 'byot', 'self'])
def test_a_run_with_other_class_weights_is_another_run(name, task):
    def mark(weights):
        torch.manual_seed(1)
        way = contender(name, task._replace(class_weights=weights), **METHODS[name].grid[0])
        return describe(way.objective(student()))
    marks = [mark(w) for w in (None, torch.ones(3), torch.tensor([1., 1, 2]))]
    assert len(set(marks)) == 3 and mark(torch.ones(3)) == marks[1]


def test_a_self_teacher_refuses_weights_that_are_none(task):
    for bad in (torch.tensor([1., -1, 1]), torch.ones(3, 1), [1., 1, 1]):
        with pytest.raises((ValueError, TypeError)): SelfTeacher(student(), task.transfer, class_weights=bad)


def test_weights_make_a_rare_class_heard():
    def blurred(counts, seed):
        d, g = dataset(counts, seed, side=4), torch.Generator().manual_seed(seed)
        x = 80 + 12 * d.y.view(-1, 1, 1, 1) + torch.randint(0, 90, d.x.shape, generator=g)
        return ImageData(x.to(torch.uint8), d.y, d.classes, mean=[0.5], std=[0.1])
    train, valid = blurred([300, 10], 0), blurred([200, 200], 1)
    def recall(weights):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        fit(Supervised(model, class_weights=weights), train, replace(RECIPE, steps=60), progress=False)
        with torch.no_grad(): chosen = model(valid.get(torch.arange(400)).x).argmax(1)
        return valid.recalls(chosen)[1]
    assert recall(class_weights(train)) > recall(None) + 0.2


# --- the exam

def test_a_good_teacher_may_miss_the_only_image_of_a_class():
    labels = torch.tensor([0] * 40 + [1] * 40 + [2])
    said = labels.clamp(max=1)
    assert not by_luck(4. * F.one_hot(said, 3), labels)
    said[:3], said[40:43], said[3] = 1, 0, 2  # and be wrong on a few others, one of which it takes for the third class
    assert not by_luck(4. * F.one_hot(said, 3), labels)
    assert by_luck(4. * F.one_hot(0 * labels, 3), labels)


@pytest.mark.parametrize('rare', [1, 2, 4])
def test_a_teacher_that_is_less_sure_of_the_common_class_where_it_sees_the_rare_one_knows_it(rare):
    labels, g = torch.tensor([0] * 120 + [1] * rare), torch.Generator().manual_seed(0)
    gap = torch.where(labels == 0, 8., 1.) + torch.rand(len(labels), generator=g)
    knows = torch.stack([gap, 0 * gap], 1)  # it names the common class always
    assert (knows.argmax(1) == 0).all() and not by_luck(knows, labels)
    for seed in range(20):  # the same answers in another order are those of one that knows nothing
        mixed = knows[torch.randperm(len(labels), generator=g)]
        assert by_luck(mixed, labels) or torch.equal(mixed[labels == 1] < 3, knows[labels == 1] < 3)
    assert by_luck(torch.tensor([[4., 0.]]).expand(len(labels), 2), labels)


@pytest.mark.parametrize('rare', [1, 2, 4])
def test_no_head_that_was_never_trained_passes_for_a_few_rare_images(rare):
    g, labels = torch.Generator().manual_seed(0), torch.tensor([0] * 100 + [1] * rare)
    x = (torch.randn(2, 64, generator=g)[labels] + 0.2 * torch.randn(len(labels), 64, generator=g)).relu()
    torch.manual_seed(0)
    with torch.no_grad(): assert all(by_luck(nn.Linear(64, 2)(x), labels) for _ in range(100))


def test_with_ten_images_of_the_rare_class_an_answer_must_show_that_it_is_known():
    labels = torch.tensor([0] * 90 + [1] * 10)
    gap = torch.where(labels == 0, 8., 1.)
    assert by_luck(torch.stack([gap, 0 * gap], 1), labels)


class Says(nn.Module):
    "Answers by the brightness of the image, wrong on those that are listed."
    def __init__(self, data, wrong):
        super().__init__()
        self.w, said = nn.Parameter(torch.zeros(1)), data.y.clone()
        said[wrong] = (said[wrong] + 1) % len(data.classes)
        self.known = {image.numpy().tobytes(): int(k) for image, k in zip(data.x, said)}
        self.data = data
    def forward(self, x):
        pixels = ((x - self.data._shift) / self.data._scale).round().to(torch.uint8)
        said = [self.known.get(p.numpy().tobytes(), 0) for p in pixels]
        return 4. * F.one_hot(torch.tensor(said), len(self.data.classes)) + 0 * self.w


def test_a_teacher_that_fell_is_measured_by_what_its_file_says():
    d = dataset([95, 40])
    rare = (d.y == 1).nonzero()[:20, 0]  # half of the rare class: accuracy 85 %, balanced accuracy 75 %
    model = Says(d, rare)
    assert check_teacher(model, d) == pytest.approx(0.75)
    with pytest.raises(ValueError, match='reaches balanced accuracy 75.0% on 135 .* reached 99.0% on 400 items'):
        check_teacher(Teacher(model, reached={'balanced_accuracy': 0.99, 'items': 400}), d)
    with pytest.raises(ValueError, match='reaches accuracy 85.2% on 135 .*, but it reached 99.0% on 400 items'):
        check_teacher(Teacher(model, reached={'accuracy': 0.99, 'items': 400}), d)
    assert check_teacher(Teacher(model, reached={'balanced_accuracy': 0.8, 'items': 400}), d) == pytest.approx(0.75)


def test_the_exam_reports_the_measure_of_all_data_and_not_of_those_it_asked_about():
    d = dataset([300, 150], classes=['a', 'b'])  # not unequal, but some hundred of them may be
    d = d.subset(d.y.sort().indices)
    model, asked = Says(d, torch.arange(40)), d.subset(torch.linspace(0, 449, 100).long())
    assert asked.unequal and not d.unequal
    found = evaluate(model, asked)
    assert check_teacher(model, d, 100) == found.accuracy != found.balanced_accuracy


# --- comparisons and reports

def test_a_comparison_keeps_the_share_of_each_class_that_was_recognised():
    train, valid = dataset([60, 20, 8]), dataset([20, 8, 3], seed=1)
    test = dataset([20, 6, 0], seed=2)
    torch.manual_seed(0)
    teacher = build_model('digit_teacher', 3, 1, 8)
    fit(Supervised(teacher), train, replace(RECIPE, steps=20))
    made = {'plain': Contender(alone(None), train), 'weighed': Contender(alone(class_weights(train)), train)}
    found = compare(student, made, RECIPE, valid, test, teacher, seeds=2)
    assert found.primary == BALANCED == valid.measures[0]
    for r in found.runs:
        own = r['class_accuracy']
        assert own[2] is None and sum(own[:2]) / 2 == pytest.approx(r['balanced_accuracy'])
        assert (20 * own[0] + 6 * own[1]) / 26 == pytest.approx(r['accuracy'])
    for row in found.rows():
        both = [r['class_accuracy'] for r in found.runs if r['model'] == row['model']]
        assert row['class_accuracy'] == [pytest.approx(sum(own) / 2) for own in list(zip(*both))[:2]] + [None]
    with torch.no_grad(): chosen = teacher.eval()(test.get(torch.arange(26)).x).argmax(1)
    assert found.teacher == {'class_accuracy': test.recalls(chosen)}
    assert 'class_accuracy' not in table(found.rows()).head and 'balanced_accuracy' in table(found.rows()).head


def test_texts_have_no_classes_to_recognise():
    made, valid, test = {'a': Contender(Supervised, Texts())}, Texts(40, 1), Texts(40, 2)
    found = compare(bigram, made, RECIPE, valid, test, bigram(), seeds=1, device='cpu')
    assert found.teacher == {} and 'class_accuracy' not in found.runs[0]


def result(counts, names=None, measure=BALANCED):
    names = names or [f'k{i}' for i in range(len(counts))]
    row = dict(setting='all_labels', parameters=1, macs=1, bytes=1, latency_ms=1., ci95=[0.4, 0.6], agreement=1.,
               accuracy=0.9, balanced_accuracy=0.5, interval_over='seeds',
               class_accuracy=[0.5] * (len(counts) - 1) + [None])
    gain = dict(method='kd', difference=0.1, difference_ci95=[0.05, 0.15], chosen={'temperature': 4.})
    rows = [row | {'model': m} for m in ('teacher', 'alone')] + [row | {'model': 'distilled'} | gain]
    classes = [dict(label=i, name=name, train=n, test=n // 10) for i, (name, n) in enumerate(zip(names, counts))]
    facts = dict.fromkeys(('name', 'data', 'command', 'hardware', 'software', 'date'), '?')
    return facts | dict(rows=rows, classes=classes, measure=measure, seeds=2, seconds=1., resumed=False, tries={},
                        labelled_images={'all_labels': 1})


def test_a_table_of_classes_has_a_column_for_each_model():
    shown = class_table(result([1200, 30]), 'all_labels')
    assert shown.head == ['class', 'training images', 'test images', 'teacher', 'alone', 'distilled']
    assert shown.rows == [['k0', '1,200', '120', '50.0', '50.0', '50.0'], ['k1', '30', '3', '', '', '']]


def test_a_table_of_classes_says_how_many_have_a_label_where_those_are_fewer():
    made = result([1200, 30])
    for c, n in zip(made['classes'], (45, 5)): c['labelled'] = {'all_labels': c['train'], 'few_labels': n}
    made['rows'] += [r | {'setting': 'few_labels'} for r in made['rows']]
    assert 'with a label' not in class_table(made, 'all_labels').head
    few = class_table(made, 'few_labels')
    assert few.head[:4] == ['class', 'training images', 'with a label', 'test images']
    assert [row[:4] for row in few.rows] == [['k0', '1,200', '45', '120'], ['k1', '30', '5', '3']]


TAUGHT = 'sees all images and the teacher answers for the rest'


@pytest.mark.parametrize('names, said', [
    (['kd'], f'those, the distilled one {TAUGHT}.'), (['kd', 'hint'], f'those, the distilled one {TAUGHT}.'),
    (['kd', 'byot', 'dkd'], f'those; with kd or dkd it {TAUGHT}; with byot it sees those, too.'),
    (['data_free'], 'those; with data_free it sees no image.'),
    (['self', 'born_again'], 'those; with self it sees all images and its own average answers for the rest; with '
     'born_again it sees all images and an earlier student answers for the rest.')])
def test_the_report_says_of_each_method_what_it_sees_where_labels_are_few(names, said):
    made = result([1200, 30])
    made['labelled_images']['few_labels'] = 50
    teacher, alone, row = made['rows']
    made['rows'] = [teacher, alone, *(row | {'method': m, 'model': m} for m in names)]
    text = f'With few labels, 50 training images have a label; the student alone sees {said}'
    assert text in make_report(made, {}, {})


def test_the_report_folds_the_classes_away_and_leaves_out_many_that_are_alike():
    plain = Measure('accuracy', share=True)
    pages = {(n, m.name): make_report(result([10] * n, measure=m), {}, {})
             for n in (20, 21) for m in (plain, BALANCED)}
    assert {k for k, page in pages.items() if '<summary>Accuracy of each class' not in page} == {(21, 'accuracy')}
    page = make_report(result([10, 10], ['<b>bad</b>', 'b']), {}, {})
    assert html.escape('<b>bad</b>') in page and '<b>bad' not in page
    old = {k: v for k, v in result([10, 10]).items() if k != 'classes'}
    for row in old['rows']: del row['class_accuracy']
    assert '<summary>Accuracy' not in make_report(old, {}, {})


def test_table_and_verdict_are_by_balanced_accuracy_and_say_so():
    made = result([1200, 30])
    assert verdicts(made['rows'], BALANCED) == [
        'With all labels (T=4), distillation helped: the 95 % interval of the paired difference in balanced accuracy '
        'lies above zero.']
    head = result_table(made['rows'], BALANCED).head
    assert 'balanced accuracy % [95 %]' in head and 'accuracy %' in head
    assert 'mean of the shares of each class' in make_report(made, {}, {})
    equal = make_report(result([10, 10], measure=Measure('accuracy', share=True)), {}, {})
    assert 'mean of the shares of each class' not in equal and 'balanced' not in equal


# --- the command

def test_the_setting_with_few_labels_steps_aside_unless_it_was_asked_for(capsys):
    train = dataset([900, 3])
    assert list(_settings(train, None)) == ['all_labels']
    assert "the few-label setting is left out: n must be large enough for a label of every class, but with 20 labels " \
           "'k1' gets none. --labels" in capsys.readouterr().out
    assert list(_settings(dataset([40, 1]), None)) == ['all_labels'] and 'single image' in capsys.readouterr().out
    with pytest.raises(ValueError, match="'k1' gets none"): _settings(train, 20)
    with pytest.raises(ValueError, match='single image'): _settings(dataset([40, 1]), 20)
    assert list(_settings(dataset([900, 300]), None)) == ['all_labels', 'few_labels'] and not capsys.readouterr().out


def test_the_command_runs_where_a_class_has_a_single_image_in_a_split(tmp_path, capsys):
    g, data = torch.Generator().manual_seed(0), tmp_path/'data'
    for c, n in enumerate((120, 40, 10)):
        (data/f'k{c}').mkdir(parents=True)
        for i in range(n):
            x = torch.randint(0, 60, (8, 8, 3), generator=g) + 180 * torch.eye(3)[c].long()
            Image.fromarray(x.to(torch.uint8).numpy()).save(data/f'k{c}'/f'{i}.png')
    argv = ['--data', f'folder:{data}', '--teacher', 'digit_teacher', '--student', 'digit_student', '--epochs', '3',
            '--teacher_epochs', '9', '--batch_size', '32', '--seeds', '2', '--temperature', '2', '--alpha', '.5',
            '--labels', '0', '--out', str(tmp_path/'run')]
    assert run_command(distill_nb, argv) == 0, capsys.readouterr().err
    made = json.loads((tmp_path/'run'/'result.json').read_text())
    assert Measure(*made['measure']) == BALANCED and [c['name'] for c in made['classes']] == ['k0', 'k1', 'k2']
    assert [c['test'] for c in made['classes']] == [12, 4, 1]
    assert all(len(r['class_accuracy']) == 3 for r in made['rows'])
    teacher = made['rows'][0]
    assert teacher['balanced_accuracy'] == pytest.approx(sum(teacher['class_accuracy']) / 3)
    n = round(9 / (1/12 + 1/4 + 1))  # of the images, as many alike would tell as much
    assert teacher['ci95'] == share_interval(round(n * teacher['balanced_accuracy']), n)
    assert '<summary>Accuracy of each class' in (tmp_path/'run'/'report.html').read_text()
    assert 'balanced accuracy % [95 %]' in capsys.readouterr().out
