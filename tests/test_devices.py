"""The rule of devices, held on a pretended card: what takes a model and data computes where the model is, and what
trains gives everything back."""
import copy, importlib, json, re
from functools import partial

import pytest
import torch
from torch import nn

from distill_nb import sets as data_module, models as models_module
from distill_nb.files import save_weights
from distill_nb.data import ImageData, Splits, digits, few_labels
from distill_nb.models import digit_student, digit_teacher, profile_model
from distill_nb.devices import best_precision, device_of, fit_device
from distill_nb.contract import Teacher, placed
from distill_nb.training import Recipe, Setup, Supervised, evaluate, fit, predict
from distill_nb.compare import Contender, compare
from distill_nb.exam import check_teacher
from distill_nb.logits import Distill
from distill_nb.cache import _LOOK, CachedTeacher
from distill_nb.taps import feature_shapes
from distill_nb.tokens import FEATURE_WEIGHTS, feature_method
from distill_nb.similarity import layer_similarity, plot_attention
from distill_nb.self_distillation import SelfTeacher, born_again
from distill_nb.exits import BeYourOwnTeacher, exit_logits, measure_exits, sure_curve
from distill_nb.data_free import Pictures, distill_without_data
from distill_nb.methods import METHODS, Task, choose_setting, contender, rehearse
from networks import learner, student_of
from distill_nb.cli import distill_nb, distill_nb_data_free
from tools.notebooks import NBS, directives

from pretended_gpu import pretended

CPU, CARD = torch.device('cpu'), torch.device('cuda', 0)
RECIPE = Recipe(steps=2, batch_size=32, lr=0.01)


@pytest.fixture
def card():
    with pretended(): yield


@pytest.fixture(scope='module')
def taught():
    "Digits and a teacher that knows something, made before there is a card."
    torch.manual_seed(0)
    splits, teacher = digits(), digit_teacher()
    recipe = Recipe(steps=60, batch_size=64, lr=0.05, precision='float32')
    fit(Supervised(teacher), splits.train, recipe, device='cpu', progress=False)
    return splits, teacher


def on(device, model): return copy.deepcopy(model).to(device)


def test_the_pretended_card_behaves_like_one(card):
    there = torch.zeros(3, device='cuda')
    assert there.device == CARD and (there + 1).device == CARD
    assert there.cpu().device == CPU and there.to('cpu').device == CPU
    here = torch.ones(3)
    for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: nn.Linear(3, 2)(there)):
        with pytest.raises(RuntimeError, match='same device'): mixed()
    with pytest.raises(RuntimeError, match='indices'): torch.ones(3)[torch.zeros(1, dtype=torch.long, device='cuda')]
    with pytest.raises(TypeError, match='numpy'): there.numpy()
    assert (there + 1.5).sum().item() == 4.5 and fit_device().type == 'cuda'


def test_nothing_of_the_card_is_left_behind():
    with pretended(): assert torch.cuda.is_available()
    assert torch.cuda.is_available() is torch.accelerator.is_available()
    assert fit_device().type == ('cuda' if torch.cuda.is_available() else 'cpu')


@pytest.mark.parametrize('model_on', [CPU, CARD])
@pytest.mark.parametrize('data_on', [CPU, CARD])
def test_measuring_happens_where_the_model_is_and_answers_where_the_data_are(card, taught, model_on, data_on):
    (train, valid, test), teacher = taught
    model, valid, train = on(model_on, teacher), valid.to(data_on), train.to(data_on)
    expected = evaluate(teacher, taught[0].valid)
    assert predict(model, valid).device == data_on and evaluate(model, valid) == expected
    assert check_teacher(model, valid) == pytest.approx(expected.accuracy, abs=0.02)
    own = Teacher(model, mean=valid.mean, std=valid.std, size=8, classes=valid.classes[::-1])
    assert predict(own, valid.replace(size=16)).device == data_on and check_teacher(Teacher(model), valid)
    x, layers = valid.get(torch.arange(8, device=data_on)).x, ['layer1', 'layer2']
    assert feature_shapes(model, x, layers) == {'layer1': (32, 8, 8), 'layer2': (64, 4, 4)}
    for other_on in (CPU, CARD):
        similarity = layer_similarity(on(other_on, teacher), model, x, layers, layers)
        assert similarity.diag().min() > 0.999
    plot_attention({'one': (model, 'layer1'), 'two': (on(CPU, teacher), 'layer2')}, valid, torch.arange(3))
    exits = BeYourOwnTeacher(on(model_on, teacher), shape=(1, 8, 8)).model
    assert {z.device for z in exit_logits(exits, valid)} == {data_on}
    assert len(measure_exits(exits, valid)) == len(exits) and sure_curve(exits, valid, (0.5,))
    assert exits.until_sure(x[:1])[0].device == data_on
    assert profile_model(model, (1, 8, 8)).parameters == sum(p.numel() for p in teacher.parameters())
    assert device_of(model) == model_on and device_of(exits) == model_on


@pytest.mark.parametrize('student_on', [CPU, CARD])
@pytest.mark.parametrize('teacher_on', [CPU, CARD])
@pytest.mark.parametrize('data_on', [CPU, CARD])
def test_fit_borrows(card, taught, student_on, teacher_on, data_on):
    (train, valid, _), teacher = taught
    teacher, student, train = on(teacher_on, teacher), digit_student().to(student_on), train.to(data_on)
    history = fit(Distill(student, teacher), train, RECIPE, valid)
    assert 'pretended card' in history.environment['hardware'] and device_of(student) == student_on
    assert device_of(teacher) == teacher_on and train.device == data_on and valid.device == CPU
    for name in FEATURE_WEIGHTS:
        objective = feature_method(name, digit_student().to(student_on), teacher)
        fit(objective, train, RECIPE, valid)
        assert {p.device for p in objective.parameters()} == {student_on} and device_of(teacher) == teacher_on
    early = BeYourOwnTeacher(digit_student().to(student_on), shape=(1, 8, 8))
    for objective in (early, SelfTeacher(digit_student().to(student_on), train)):
        fit(objective, train, RECIPE, valid)
        assert device_of(objective) == student_on
    cached = CachedTeacher(teacher, train.replace(views=2)).fill()
    assert device_of(teacher) == teacher_on
    fit(Distill(student, cached), cached.data, RECIPE, valid)
    assert device_of(student) == student_on and device_of(teacher) == teacher_on
    batch = train.get(torch.arange(4, device=data_on))
    assert cached(batch).device == data_on


@pytest.mark.parametrize('data_on', [CPU, CARD])
def test_kept_answers_are_compared_on_the_card_and_no_row_is_taken_for_another(card, taught, data_on):
    train, teacher = taught[0].train.to(data_on), taught[1]
    cached = CachedTeacher(teacher, train.replace(views=1), dtype='float32').fill(precision='float32')
    index = torch.arange(32, device=CARD)
    batch = cached.data.to(CARD).get(index, cached.data.view_at(index, torch.zeros_like(index)))
    cached.check(cached.data.to(CARD))
    stranger = batch._replace(index=torch.full_like(batch.index, -1))
    with pytest.raises(ValueError, match='gives index -1'): cached(batch._replace(x=batch.x.flip(0)))
    expected = Teacher(teacher)
    for b in (stranger, *[batch]*_LOOK, stranger):  # the first was seen
        assert torch.allclose(cached(b), expected(b), atol=1e-4)
    cached.check(cached.data.to(CARD))
    for _ in range(_LOOK): cached(batch)
    assert cached(stranger).isnan().all() and cached(batch).isfinite().all()  # too late to be seen without waiting
    short = CachedTeacher(teacher, train.replace(views=1), top=3).fill(precision='float32')
    short.check(cached.data.to(CARD))
    for _ in range(_LOOK): short(batch)
    assert short(stranger).values.isnan().all() and {t.device for t in short(batch)} == {CARD}


def test_a_run_that_fails_gives_everything_back_too(card, taught):
    (train, valid, _), teacher = taught
    teacher, student = on(CPU, teacher), digit_student()
    too_fast = Recipe(steps=9, lr=1e30, warmup=0., precision='float32')
    with pytest.raises(ValueError, match='became'): fit(Distill(student, teacher), train, too_fast, valid)
    wants = Teacher(teacher, mean=train.mean, std=train.std, size=8)  # it is shown the pixels on the card
    fit(Distill(digit_student(), wants), train.replace(size=16), RECIPE, valid.replace(size=16))
    with pytest.raises(ValueError, match='never trained'): fit(Distill(student, digit_teacher()), train, RECIPE, valid)
    assert {device_of(student), device_of(teacher)} == {CPU}


def test_what_calls_fit_gives_everything_back(card, taught):
    (train, valid, test), teacher = taught
    teacher, (labelled, transfer) = on(CPU, teacher), few_labels(train, 100)
    kd = Contender(partial(Distill, teacher=teacher), transfer)
    methods = {'alone': Contender(Supervised, labelled), 'kd': kd}
    found = compare(digit_student, methods, RECIPE, valid, test, teacher, seeds=2)
    assert {device_of(s) for _, s in found.students.values()} == {CPU}
    assert device_of(teacher) == CPU and 'agreement' in found.runs[0]
    born = born_again(digit_student, train, RECIPE, valid, generations=2)
    assert {device_of(m) for m in born.models} == {CPU} and evaluate(born.ensemble(), valid).accuracy >= 0
    inversion = dict(rounds=2, images=20, inversion=Recipe(steps=2, lr=0.1))
    for way, settings in (('generator', {}), ('inversion', inversion)):
        student = digit_student()
        made = distill_without_data(Teacher(teacher, size=8), student, way, Recipe(steps=2, batch_size=16), **settings)
        assert device_of(student) == CPU and predict(student, Pictures(made.images, 10)).shape == (len(made.images), 10)
    task = Task(digit_student, teacher, labelled, transfer, RECIPE)
    for name in METHODS:
        choose_setting(name, task._replace(make_student=student_of(name)), valid, [METHODS[name].grid[0]])


def test_the_commands_on_a_card(card, taught, tmp_path, capsys):
    result = distill_nb(seeds=2, epochs=1, teacher_epochs=2, labels=0, out=str(tmp_path/'run'))
    assert 'on cuda' in capsys.readouterr().out and 'pretended card' in result['hardware']
    weights = str(tmp_path/'t.safetensors')
    save_weights(taught[1], weights)
    distill_nb_data_free(teacher='digit_teacher', student='digit_student', teacher_weights=weights, data='digits',
                         steps=2, out=str(tmp_path/'free'))


def test_an_accelerator_on_the_cpu_does_not_bind_what_comes_after(card, taught):
    from accelerate import Accelerator
    mine = Accelerator(cpu=True)
    assert fit_device().type == 'cuda' and mine.device == CPU
    history = fit(Supervised(digit_student()), taught[0].train, RECIPE)
    assert 'pretended card' in history.environment['hardware'] and mine.device == CPU


def test_a_run_on_the_cpu_does_not_bind_what_comes_after(card, taught):
    from accelerate import Accelerator
    fit_device('cpu')
    assert Accelerator().device.type == 'cuda'
    fit(Supervised(digit_student()), taught[0].train, RECIPE, device='cpu')
    assert Accelerator().device.type == 'cuda' and fit_device().type == 'cuda'


@pytest.mark.parametrize('lr', [0.01, 1e30])
def test_nothing_of_a_run_in_half_precision_stays_on_the_objective(taught, lr):
    objective = Supervised(digit_student())
    try: fit(objective, taught[0].train, Recipe(steps=9, lr=lr, warmup=0., precision='bfloat16'), device='cpu')
    except ValueError: assert lr > 1
    assert not hasattr(objective, '_original_forward') and not objective.training
    seen = []
    objective.model.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    objective(taught[0].train.get(torch.arange(4)))
    assert seen == [torch.float32]


def test_a_method_that_trains_an_earlier_student_is_rehearsed_in_float32(card, taught):
    train = taught[0].train
    task = Task(digit_student, taught[1], train, train, Recipe(steps=2, batch_size=32, precision='float16'))
    rehearse('born_again', task)


def test_a_device_that_accelerate_was_told_to_use_is_named(card, monkeypatch):
    monkeypatch.setenv('ACCELERATE_TORCH_DEVICE', 'cpu')
    said = "has the device 'cuda', but `accelerate` was told to use 'cpu'"
    with pytest.warns(UserWarning, match=said): assert fit_device() == CPU


def test_auto_takes_float16_on_a_card_without_bfloat16(card, monkeypatch):
    assert best_precision(CARD) == 'float16'
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d=None: (6, 1))
    assert best_precision(CARD) == 'float32'
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: True)
    assert best_precision(CARD) == 'bfloat16'


@pytest.mark.parametrize('name', METHODS)
def test_losses_are_right_in_float16(taught, name):
    "As on a card without bfloat16: the losses are those of float32, within what rounded features allow."
    (train, valid, _), teacher = taught
    labelled, transfer = few_labels(train, 100)
    task = Task(digit_student, teacher, labelled, transfer, RECIPE, Setup(device='cpu'))
    torch.manual_seed(0)
    way = contender(name, task, **METHODS[name].grid[0])
    (objective, _), data = learner(way, student_of(name)()), way.data
    objective.check(data, None if name == 'data_free' else valid)
    batch, found = data.get(torch.arange(64)), []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast('cpu', torch.float16, enabled=enabled): losses = copy.deepcopy(objective).train()(batch)
        assert {l.dtype for l in losses.values()} == {torch.float32}
        found.append(losses)
    for k, exact in found[0].items(): assert found[1][k].item() == pytest.approx(exact.item(), rel=0.02, abs=0.002), k


def test_a_step_that_overflows_in_float16_is_skipped_and_the_run_goes_on(card, taught):
    "The scale begins at 2**16; a loss so large that its scaled gradients are infinite must halve it and spoil nothing."
    class Large(Supervised):
        def forward(self, batch): return {'hard': 1e36 * super().forward(batch)['hard']}
    torch.manual_seed(0)
    student = digit_student()
    before = [p.clone() for p in student.parameters()]
    recipe = Recipe(steps=30, batch_size=32, lr=1e-37, momentum=0., warmup=0., weight_decay=0.)
    history = fit(Large(student), taught[0].train, recipe)
    assert all(p.isfinite().all() for p in student.parameters()) and len(history.losses['hard']) == 30
    assert any(not torch.equal(p, q) for p, q in zip(before, student.parameters()))


def test_placed_gives_parts_and_hidden_teachers_back_to_their_own_places(card):
    teacher = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).to('cuda'))
    both = nn.ModuleList([nn.Linear(2, 2), Teacher(teacher)])
    with placed(both, CARD):
        assert {device_of(both), device_of(teacher), device_of(teacher[1])} == {CARD}
        both.append(nn.Linear(2, 2).to('cuda'))
    assert [device_of(m) for m in (both[0], teacher[0], teacher[1], both[2])] == [CPU, CPU, CARD, CPU]


def colours(n=1600, size=32):
    "Images that a few steps learn: each class has a colour."
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 10
    x = torch.randint(0, 256, (10, 3, 1, 1), generator=g)[y] + torch.randint(0, 9, (n, 3, size, size), generator=g)
    parts = [ImageData(x[i::3].clamp(0, 255).byte(), y[i::3], list('0123456789'), name=name)
             for i, name in enumerate(('train', 'valid', 'test'))]
    return Splits(*parts)


def code_cells(path):
    "The sources of the code cells of the notebook at `path`."
    return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']


def gpu_code(name):
    "Imports of a notebook, and its cells that are marked gpu."
    cells = code_cells(NBS/name)
    imports = [c for c in cells if re.search(r'^(from|import) ', c, re.M) and not re.search(r'^(def|class|@)', c, re.M)]
    return [c for c in imports if 'export' not in directives(c)] + [c for c in cells if 'gpu' in directives(c)]


@pytest.mark.parametrize('device', ['cuda', pytest.param('cpu', marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', ['03_models.ipynb', '04_training.ipynb', '05_logits.ipynb'])
def test_gpu_cells_run_in_small(name, device, monkeypatch, request):
    if device == 'cuda': request.getfixturevalue('card')
    small = lambda classes=10, weights=None, **kw: models_module.WideResNet(10, 1, classes)
    monkeypatch.setattr(data_module, 'cifar10', lambda root, size=None: colours())
    for net in ('resnet18', 'resnet20', 'resnet50'): monkeypatch.setattr(models_module, net, small)
    module = importlib.import_module(f'distill_nb.{name[3:-6]}')
    space = dict(vars(module))
    for code in gpu_code(name): exec(code, space)
    assert 'history' in space or name == '03_models.ipynb'


def test_every_notebook_with_gpu_cells_is_tried_in_small():
    found = {p.name for p in NBS.glob('*.ipynb') if any('gpu' in directives(code) for code in code_cells(p))}
    assert found == {'03_models.ipynb', '04_training.ipynb', '05_logits.ipynb'}
