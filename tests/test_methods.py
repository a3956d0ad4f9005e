"""Every method with the same budget, on the images that it may use, and with a teacher that stays as it was."""
import copy
from dataclasses import replace

import pytest
import torch

from distill_nb import methods, training
from distill_nb.files import fingerprint
from distill_nb.rows import UNLABELLED
from distill_nb.views import ResizedCrop
from distill_nb.data import digits, few_labels
from distill_nb.models import digit_student, digit_teacher
from distill_nb.contract import Teacher
from distill_nb.training import DivergedError, Recipe, Setup, Supervised, fit
from distill_nb.compare import compare
from distill_nb.cache import CachedTeacher
from distill_nb.zoo import build_model
from distill_nb.methods import METHODS, Task, choose_setting, contender, rehearse
from networks import learner, student_of

RECIPE = Recipe(steps=6, batch_size=32, optimizer='adamw', lr=0.02, precision='float32')


@pytest.fixture(scope='module')
def task():
    train, _, _ = digits()
    torch.manual_seed(0)
    teacher = digit_teacher()
    fit(Supervised(teacher), train, Recipe(epochs=2, batch_size=64, optimizer='adamw', lr=0.01, precision='float32'))
    labelled, transfer = few_labels(train, 100)
    return Task(digit_student, CachedTeacher(teacher, transfer), labelled, transfer, RECIPE)


def test_each_method_has_as_many_tries_as_every_other():
    assert {len(m.grid) for m in METHODS.values()} == {4}
    for m in METHODS.values(): assert len({tuple(sorted(s.items())) for s in m.grid}) == 4


@pytest.mark.parametrize('name', METHODS)
def test_every_method_trains_the_student_and_leaves_the_teacher(name, task):
    before, valid = fingerprint(task.teacher.model.state_dict()), digits().valid
    torch.manual_seed(1)
    task = task._replace(recipe=replace(RECIPE, steps=80))  # by which the teacher of the born-again student is trained
    way = contender(name, task, **METHODS[name].grid[0])
    objective, student = learner(way, student_of(name)())
    fresh = fingerprint(student.state_dict())
    history = fit(objective, way.data, replace(way.recipe or RECIPE, steps=6), valid)
    assert fingerprint(student.state_dict()) != fresh and fingerprint(task.teacher.model.state_dict()) == before
    assert all(torch.tensor(v).isfinite().all() for v in history.losses.values())


@pytest.mark.parametrize('name', METHODS)
def test_every_method_resumes_to_the_weights_of_the_whole_run(name, task, tmp_path, interrupt):
    labelled, transfer = few_labels(digits().train.subset(range(160)), 32)  # short epochs, since each is saved
    teacher = CachedTeacher(task.teacher.model, transfer)
    task = Task(digit_student, teacher, labelled, transfer, replace(RECIPE, steps=80))
    many, last = (110, 105) if name == 'data_free' else (24, 22)
    def run(folder, resume=False, stop=None):
        torch.manual_seed(1)
        way = contender(name, task, **METHODS[name].grid[0])
        objective, student = learner(way, student_of(name)())
        calls = interrupt(objective, stop)
        recipe = replace(way.recipe or RECIPE, steps=many, batch_size=16, precision='bfloat16',
                         rows=None if name == 'data_free' else 5)
        fit(objective, way.data, recipe, folder=folder, resume=resume, save_every=0)
        return fingerprint(student.state_dict()), len(calls)
    whole, steps = run(tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): run(tmp_path/'cut', stop=last)
    resumed, rest = run(tmp_path/'cut', resume=True)
    assert resumed == whole and 0 < rest <= 10 and steps == many


def test_methods_see_the_images_that_they_may(task):
    for name in METHODS:
        data = contender(name, task, **METHODS[name].grid[0]).data
        labels = (data.y != UNLABELLED).sum()
        if name in ('alone', 'byot'): assert len(data) == labels == 100
        elif name == 'data_free': assert labels == 0
        elif name in ('self', 'dino'): assert len(data) > len(task.transfer)
        else: assert len(data) == len(task.transfer) and labels == 100


def test_without_data_no_image_is_read(task):
    class Closed:
        size, channels, mean, std, classes = 8, 1, [0.5], [0.25], list('0123456789')
        measures = ()
        def __getattr__(self, name): raise AssertionError(f'{name} was read')
    closed = task._replace(labelled=Closed(), transfer=Closed())
    way = contender('data_free', closed, balance=5.)
    fit(way.objective(digit_student()), way.data, replace(way.recipe, steps=2))


@pytest.mark.parametrize('name', METHODS)
def test_a_rehearsal_changes_nothing_that_comes_later(name, task):
    teacher = digit_teacher()  # never trained, as before a run
    before, grads = fingerprint(teacher.state_dict()), [p.requires_grad for p in teacher.parameters()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    task = task._replace(make_student=student_of(name))
    rehearse(name, task._replace(teacher=teacher))
    assert torch.equal(torch.get_rng_state(), state) and fingerprint(teacher.state_dict()) == before
    assert [p.requires_grad for p in teacher.parameters()] == grads and teacher.training
    kept = CachedTeacher(teacher, task.transfer)
    rehearse(name, task._replace(teacher=kept))
    assert kept.asked == kept.answered == 0


@pytest.mark.parametrize('name', METHODS)
def test_a_teacher_with_a_form_of_its_own_is_asked_in_it_or_refused(name, task):
    network, data = task.teacher.model, task.transfer
    seen = []
    hook = network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    task = task._replace(make_student=student_of(name))
    mine = task._replace(teacher=Teacher(network, mean=[0.], std=[2.]))
    if name == 'data_free':
        with pytest.raises(ValueError, match=r"data_free .* the teacher's mean must be that of the data"):
            rehearse(name, mine)
        turned = task._replace(teacher=Teacher(network, classes=data.classes[::-1]))
        with pytest.raises(ValueError, match="the teacher's classes must be those of the data"): rehearse(name, turned)
        same = Teacher(network, mean=tuple(data.mean), std=data.std, size=8, classes=data.classes)
        rehearse(name, task._replace(teacher=same))
    else:
        rehearse(name, mine)
        wanted = data.replace(mean=[0.], std=[2.]).get(torch.arange(2)).x
        assert all(torch.equal(x, wanted) for x in seen) and mine.teacher._data is None
    hook.remove()


def test_the_choice_is_the_best_on_the_validation_split(task):
    valid = digits().valid
    settings = [dict(temperature=4., alpha=0.), dict(temperature=4., alpha=0.9)]
    best, tries = choose_setting('kd', task, valid, settings)
    assert [t['method'] for t in tries] == ['kd', 'kd']
    assert [{k: t[k] for k in s} for t, s in zip(tries, settings)] == settings
    assert best == settings[max(range(2), key=lambda i: tries[i]['valid_accuracy'])]
    assert choose_setting('kd', task, valid, settings[:1]) == (settings[0], [])


def test_a_setting_that_diverges_is_a_try_that_failed(task, tmp_path):
    valid, settings = digits().valid, [dict(weight=1e38), dict(weight=0.01)]
    best, tries = choose_setting('relational', task, valid, settings, folder=tmp_path)
    assert best == {'weight': 0.01} and tries[1]['valid_accuracy'] > 0
    assert tries[0] == {'method': 'relational', 'weight': 1e38, 'valid_accuracy': None}
    assert choose_setting('relational', task, valid, settings, folder=tmp_path) == (best, tries)
    with pytest.raises(DivergedError, match='every setting of relational diverged'):
        choose_setting('relational', task, valid, [dict(weight=1e38), dict(weight=2e38)])


def test_an_earlier_student_is_trained_once(task, tmp_path, monkeypatch):
    trained = []
    def counted(self):
        if type(self.objective) is Supervised: trained.append(self.step)
        return run(self)
    run = training.Run.run
    monkeypatch.setattr(training.Run, 'run', counted)
    stored = task._replace(setup=Setup(tmp_path), recipe=replace(RECIPE, steps=80))
    def again():
        torch.manual_seed(1)
        student = digit_student()
        way = contender('born_again', stored, temperature=4., alpha=0.5)
        fit(way.objective(student), way.data, RECIPE)
        return fingerprint(student.state_dict())
    first = again()
    assert again() == first and trained == [0, 80]
    rehearse('born_again', task._replace(setup=Setup(tmp_path/'none')))
    assert not (tmp_path/'none').exists()


def test_the_earlier_student_has_initial_weights_and_a_seed_of_its_own(task, monkeypatch):
    seeds = []
    monkeypatch.setattr(methods, 'fit', lambda objective, data, recipe, **_: seeds.append(recipe.seed))
    def start(seed):
        torch.manual_seed(seed)
        student = digit_student()
        state = torch.get_rng_state()
        objective = contender('born_again', task, temperature=4., alpha=0.5).objective(student)
        assert torch.equal(torch.get_rng_state(), state)
        return fingerprint(student.state_dict()), fingerprint(objective.teacher.model.state_dict())
    (a, earlier_a), (b, earlier_b) = start(1), start(2)
    assert len({a, b, earlier_a, earlier_b}) == 4 and start(1) == (a, earlier_a)
    assert seeds[0] == seeds[2] != seeds[1] != RECIPE.seed


def test_a_student_that_always_begins_with_the_same_weights_has_an_earlier_one_for_each_seed(task, tmp_path):
    first = digit_student()
    recipe = replace(RECIPE, steps=40)
    again = task._replace(make_student=lambda: copy.deepcopy(first), setup=Setup(tmp_path), recipe=recipe)
    way = {'born_again': contender('born_again', again, temperature=4., alpha=0.5)}
    for _ in range(2):
        compare(again.make_student, way, again.recipe, digits().valid, seeds=2, folder=tmp_path)
    assert len(list(tmp_path.glob('earlier-*'))) == 2


def test_an_earlier_student_that_diverges_is_named(task):
    fast = task._replace(recipe=replace(RECIPE, optimizer='sgd', lr=1e30))
    wild = {'again': contender('born_again', fast, temperature=4., alpha=0.5)}
    with pytest.raises(DivergedError, match='^again, seed 7: '):
        compare(digit_student, wild, RECIPE, digits().valid, seeds=[7])


def test_an_earlier_student_may_be_no_better_than_chance(task):
    weak = task._replace(recipe=replace(RECIPE, steps=1, lr=1e-9))
    way = {'born_again': contender('born_again', weak, temperature=4., alpha=0.5)}
    found = compare(digit_student, way, RECIPE, digits().valid, seeds=1)
    assert found.runs[0]['valid_accuracy'] > 0


def test_the_earlier_student_is_trained_on_the_device_of_the_task_and_rehearsed_on_the_cpu(task, monkeypatch):
    devices = []
    monkeypatch.setattr(methods, 'fit', lambda *_, setup: devices.append(setup.device))
    way = contender('born_again', task._replace(setup=Setup(device='cuda:1')), temperature=4., alpha=0.5)
    way.objective(digit_student())
    rehearse('born_again', task._replace(setup=Setup(device='cuda:1')))
    assert devices == ['cuda:1', 'cpu']


@pytest.mark.parametrize('bad', [dict(temperature=-2., alpha=0.5), dict(temperature='4', alpha=0.5),
                                 dict(temperature=4.), dict(temperature=4., alpha=0.5, weight=1.)])
def test_a_setting_that_makes_no_sense_is_refused_before_the_others_are_tried(task, bad, monkeypatch):
    monkeypatch.setattr(methods, 'choose', lambda *_, **__: pytest.fail('something was trained'))
    for settings in ([dict(temperature=4., alpha=0.5), bad], [bad]):
        with pytest.raises(ValueError, match='kd'): choose_setting('kd', task, digits().valid, settings)
    for refused in (lambda: contender('kd', task), lambda: choose_setting('kd', task, digits().valid, [{}])):
        with pytest.raises(ValueError, match='setting of kd must name temperature, alpha, but names nothing'): refused()


def test_no_choice_is_made_on_the_test_split(task):
    with pytest.raises(ValueError, match='test must be left out'):
        choose_setting('kd', task, digits().valid, test=digits().test)


@pytest.mark.parametrize('name', ['alone', 'kd', 'hint', 'self'])
def test_a_student_for_other_images_is_refused_in_rehearsal(name, task):
    colours = task._replace(make_student=lambda: build_model('digit_student', 10, 3, 8))
    with pytest.raises(ValueError, match=f'method {name} does not work here'): rehearse(name, colours)


def test_feature_methods_take_another_temperature_and_alpha(task):
    objective = contender('hint', task, weight=1., temperature=2., alpha=0.5).objective(digit_student())
    usual = contender('hint', task, weight=1.).objective(digit_student())
    assert (objective.loss.temperature, objective.loss.alpha) == (2., 0.5)
    assert (usual.loss.temperature, usual.loss.alpha) == (4., 0.9)


def test_a_teacher_that_wraps_a_model_is_asked_as_a_whole(task):
    class Wrapped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
        def forward(self, x): return self.model(2*x)
    wrapped = Wrapped(task.teacher.model)
    objective = contender('data_free', task._replace(teacher=wrapped), balance=5.).objective(digit_student())
    assert objective.teacher.model is wrapped


def test_settings_that_cannot_be_told_apart_and_unknown_methods_are_refused(task):
    twice = [dict(temperature=1., alpha=0.5)]*2
    same = [dict(temperature=4, alpha=0.5), dict(alpha=0.5, temperature=4.)]
    for settings in (twice, same, [], [(2., 0.5)], dict(temperature=2., alpha=0.5)):
        with pytest.raises(ValueError, match='different'): choose_setting('kd', task, digits().valid, settings)
    with pytest.raises(ValueError, match='born_again'): choose_setting('magic', task, digits().valid)


def test_a_token_is_given_to_the_students_that_can_have_one_and_stays_with_them(task):
    with pytest.raises(ValueError, match='token does not work here: .*with_token'): rehearse('token', task)
    make = student_of('token')
    ways = {'alone': contender('alone', task, label_smoothing=0.), 'token': contender('token', task, alpha=0.5)}
    found = compare(make, ways, RECIPE, digits().valid, seeds=1)
    tokens = {name: hasattr(student, 'dist_token') for name, (_, student) in found.students.items()}
    assert tokens == {'alone': False, 'token': True}
    mine = make(token=True)
    assert ways['token'].network(mine) is not mine and hasattr(ways['token'].network(mine), 'dist_token')
    rehearse('token', task._replace(make_student=lambda: make(token=True)), temperature=1., alpha=0.5, hard=True)


def test_the_views_of_the_images_are_crops_for_dino_alone(task):
    for name in METHODS:
        data = contender(name, task, **METHODS[name].grid[0]).data
        assert isinstance(getattr(data, 'augment', None), ResizedCrop) == (name == 'dino')
    assert not isinstance(task.transfer.augment, ResizedCrop)


def test_an_unknown_method_is_named(task):
    with pytest.raises(ValueError, match='magic.*|born_again'): contender('magic', task)
