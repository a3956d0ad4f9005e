"""The promises of `fit`: repeatable, resumable, shareable between processes, and loud about bad input."""
import csv, json, math, os, random, signal, subprocess, time, warnings
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from distill_nb import training
from distill_nb.doors import plain
from distill_nb.files import fingerprint
from distill_nb.rows import UNLABELLED
from distill_nb.losses import DistillationLoss
from distill_nb.views import CropFlip, ResizedCrop
from distill_nb.protocol import Data, Measure, Measured
from distill_nb.data import ImageData, digits
from distill_nb.models import digit_student, digit_teacher, evaluating, resnet8
from distill_nb.devices import fit_device
from distill_nb.contract import Teacher, describe
from distill_nb.students import check_classes, logits_of
from distill_nb.history import Checkpoint, History, plot_curves
from distill_nb.training import (DivergedError, Objective, Recipe, Run, Setup, Supervised, evaluate, fit, predict,
                                 scheduled)
from processes import alone_and_together, ended, machines, python

RECIPE = Recipe(steps=20, batch_size=32, lr=0.05, precision='float32')


def images(n=60, classes=3, size=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 1, size, size), generator=g, dtype=torch.uint8)
    return ImageData(x, torch.arange(n) % classes, [str(c) for c in range(classes)], augment=CropFlip(1, True))


def net(classes=3, seed=0, dropout=0.):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, classes))


def weights(module): return fingerprint(module.state_dict())


class Distilling(Objective):
    def __init__(self, student, teacher):
        super().__init__(student)
        self.teacher, self.adapter, self.loss = Teacher(teacher), nn.Linear(3, 3), DistillationLoss(4., 0.5)

    def forward(self, batch):
        z = self.adapter(self.model(batch.x))
        return self.loss.parts(z, self.teacher(batch), batch.y, batch.weight)


# --- evaluation

def test_a_masked_class_is_evaluated_as_if_it_were_not_there(masked):
    data = images(classes=3)
    four = replace_classes(data, 4)
    model = net(classes=4)
    class First3(nn.Module):
        def forward(self, x): return model(x)[:, :3]
    assert evaluate(masked(model, 3), four) == pytest.approx(evaluate(First3(), data), rel=1e-6)


@pytest.mark.parametrize('classes, value, said', [
    ((3,), math.nan, 'logits that are not finite'), ((3,), math.inf, 'logits that are not finite'),
    ((1, 3), -math.inf, r'masks the right class of 20 of 60 labels with -inf, class 1 among them'),
    ((0, 1, 2, 3), -math.inf, 'masks every class of a row')])
def test_logits_that_are_no_answer_are_refused(classes, value, said, masked):
    model = masked(net(classes=4), *classes, value=value)
    with pytest.raises(ValueError, match=said): evaluate(model, replace_classes(images(), 4))


def replace_classes(data, n):
    "The same images and labels among `n` classes."
    return ImageData(data.x, data.y, [str(c) for c in range(n)], augment=data.augment)


def test_evaluation_leaves_the_model_as_it_was():
    model = digit_student()
    model.train()
    model.layer1.eval()
    modes, before = [m.training for m in model.modules()], weights(model)
    data = digits().valid
    e = evaluate(model, data, batch_size=100)
    assert [m.training for m in model.modules()] == modes and weights(model) == before
    assert all(p.grad is None for p in model.parameters())
    logits = predict(model, data)
    assert e.accuracy == pytest.approx((logits.argmax(1) == data.y).float().mean().item())
    assert e.loss == pytest.approx(F.cross_entropy(logits, data.y).item())
    with pytest.raises(ZeroDivisionError), evaluating(model): 1 / 0
    assert [m.training for m in model.modules()] == modes


def test_the_validation_loss_holds_no_distillation_term():
    data, objective = images(), Distilling(net(), net(seed=1))
    row = fit(objective, data, RECIPE, valid=data).last
    assert row['valid_loss'] == pytest.approx(evaluate(objective.model, data).loss, rel=1e-5)


# --- the teacher

def test_a_teacher_answers_in_eval_mode_without_gradients_whatever_is_called_and_is_left_as_it_was():
    teacher, data = digit_teacher(), digits().train
    objective = Distilling(digit_student(), teacher)
    assert all(m.training for m in teacher.modules()) and all(p.requires_grad for p in teacher.parameters())
    batch, before = data.get(torch.arange(16)), weights(teacher)
    expected = evaluating_answers(teacher, batch.x)
    for call in (objective.train, objective.teacher.train, teacher.train, teacher.layer1.eval, teacher[1].train):
        call()
        modes = [m.training for m in teacher.modules()]
        answer = objective.teacher(batch)
        assert torch.equal(answer, expected) and not answer.requires_grad
        assert weights(teacher) == before and [m.training for m in teacher.modules()] == modes
    mine = {id(p) for p in objective.parameters()}
    assert not any(id(p) in mine for p in teacher.parameters())
    assert not any('teacher' in k for k in objective.state_dict())


def evaluating_answers(model, x):
    with evaluating(model): return model(x)


def test_a_teacher_moves_with_its_objective():
    objective = Distilling(net(), net(seed=1)).to(torch.float64)
    assert next(objective.teacher.model.parameters()).dtype == torch.float64


def test_a_network_that_taught_is_as_it_was_and_can_be_trained():
    teacher = net(seed=1, dropout=0.5).train()
    teacher[1].eval()
    teacher[1].bias.requires_grad_(False)
    modes, before = [m.training for m in teacher.modules()], weights(teacher)
    wanted = [p.requires_grad for p in teacher.parameters()]
    fit(Distilling(net(), teacher), images(), RECIPE, images())
    assert [m.training for m in teacher.modules()] == modes and weights(teacher) == before
    assert [p.requires_grad for p in teacher.parameters()] == wanted
    assert all(p.grad is None for p in teacher.parameters())
    fit(Supervised(teacher), images(), RECIPE)
    assert weights(teacher) != before


def test_a_teacher_gets_its_order_of_memory_back():
    student, teacher = (nn.Sequential(resnet8(3, 1), nn.Flatten()) for _ in range(2))
    objective = Supervised(student)
    objective.teacher = Teacher(teacher)
    fit(objective, images(), replace(RECIPE, steps=1, precision='bfloat16'))
    assert all(p.is_contiguous() for p in teacher.parameters())


# --- a teacher's contract

class Gives(nn.Module):
    "A network whose output is what a function makes of its logits."
    def __init__(self, model, form):
        super().__init__()
        self.model, self.form = model, form
    def forward(self, x): return self.form(self.model(x))


class Output:
    def __init__(self, logits): self.logits = logits


@pytest.mark.parametrize('form, clauses', [
    (lambda z: z, {}), (lambda z: (z, z + 1), {}), (lambda z: [z], {}), (lambda z: {'loss': 0, 'logits': z}, {}),
    (Output, {}), (lambda z: {'answer': z}, dict(read=lambda out: out['answer'])),
    (lambda z: z.log_softmax(1), {}), (lambda z: z.softmax(1), dict(outputs='probabilities')),
    (lambda z: z.sigmoid(), dict(outputs='sigmoid'))])
def test_what_a_network_gives_becomes_logits(form, clauses):
    model, data = net(), images()
    batch = data.get(torch.arange(8))
    answer, z = Teacher(Gives(model, form), **clauses)(batch), model(batch.x)
    torch.testing.assert_close(answer.softmax(1), z.softmax(1), rtol=1e-4, atol=1e-5)
    assert answer.shape == z.shape and evaluate(Teacher(Gives(model, form), **clauses), data).accuracy >= 0


def test_an_output_without_logits_is_refused_by_name():
    with pytest.raises(ValueError, match='gives a dict, in which no logits were found.*read=function'):
        Teacher(Gives(net(), lambda z: {'scores': z}))(images().get(torch.arange(2)))


def test_a_teacher_is_shown_the_stored_pixels_in_its_own_form_and_never_the_students_picture():
    "32 pixels, of which the student sees 8 and the teacher 16, in another normalisation, and the same views."
    stored = images(size=32)
    students = stored.replace(size=8, mean=[0.9], std=[3.])
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
    teacher = Teacher(model, mean=[0.2], std=[0.7], size=16)
    theirs = stored.replace(size=16, mean=[0.2], std=[0.7])
    teacher.check(students)
    index, view = torch.arange(18), torch.arange(18)
    assert torch.equal(teacher(students.get(index, view)), model(theirs.get(index, view).x))
    assert torch.equal(predict(teacher, students), predict(model, theirs))
    assert evaluate(teacher, students) == evaluate(model, theirs)
    cropped = stored.replace(augment=ResizedCrop(8))  # a crop of 8 pixels is made anew with 16
    teacher.leave()
    teacher.check(cropped)
    assert torch.equal(teacher(cropped.get(index, view + 5)),
                       model(theirs.replace(augment=ResizedCrop(16)).get(index, view + 5).x))


def test_a_teacher_may_have_seen_the_centre_of_its_images():
    data, index = images(size=16), torch.arange(6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    teacher = Teacher(model, mean=[0.2], std=[0.7], size=(12, 0.75))
    teacher.check(data)
    expected = model(data.replace(mean=[0.2], std=[0.7]).get(index, index + 3).x[..., 2:14, 2:14].contiguous())
    torch.testing.assert_close(teacher(data.get(index, index + 3)), expected)
    assert torch.equal(predict(teacher, data), predict(model, teacher.own(data)))
    assert (teacher.size, teacher.crop, Teacher(model, size=12).crop) == (12, 0.75, 1.)
    class OldForm(ImageData):  # data that know of no crop are not asked for one
        def seen(self, mean=None, std=None, size=None): return self
    plain = OldForm(data.x, data.y, data.classes)
    assert Teacher(model, size=16).own(plain) is plain


def test_every_clause_is_part_of_the_contract_and_of_the_fingerprint():
    model, record = net(), {'accuracy': 0.93, 'items': 180}
    made = [Teacher(model), Teacher(model, size=8), Teacher(model, size=(8, 0.5)), Teacher(model, reached=record),
            Teacher(model, reached={'accuracy': 0.93}), Teacher(model, list('abc'), [0.5], [0.5], read=len)]
    assert len({t.fingerprint() for t in made}) == len(made)
    for t in made: assert Teacher(model, **t.contract).fingerprint() == t.fingerprint()
    again = Teacher(model, **made[2].contract)
    assert (again.size, again.crop, Teacher(model, **made[3].contract).reached) == (8, 0.5, record)
    assert Teacher(model, size=(8, 1)).fingerprint() == Teacher(model, size=8).fingerprint()
    assert Teacher(model, size=(8, 1)).contract == Teacher(model, size=8).contract


def test_fingerprints_are_those_of_before_crops_and_records():
    "They name kept answers and checkpoints, which must be found again."
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1., 2.], [3., 4.]]))
        model.bias.zero_()
    assert Teacher(model).fingerprint() == '4b1b09a3bd2b8b1e'
    assert Teacher(model, list('ab'), [0.5], [0.25], 8).fingerprint() == '39d1efdd78596dc0'


@pytest.mark.parametrize('clause, said', [
    (dict(size=(8, 0.5, 1)), r'size must be a whole number, or a pair \(side, crop\)'),
    (dict(size=(8, 0)), 'crop of size must be'),
    (dict(size=(8, 1.2)), 'crop of size must be greater than 0'), (dict(size=(8.5, 0.9)), 'size must be a whole'),
    (dict(reached=0.93), 'reached must be numbers by the name of their measure'), (dict(reached={}), 'reached must be'),
    (dict(reached={'items': 180}), 'reached must be'), (dict(reached={'accuracy': 'high'}), 'reached must be'),
    (dict(reached={'accuracy': 0.9, 'items': 0}), 'items of reached must be a whole number of at least 1')])
def test_a_clause_that_makes_no_sense_is_refused(clause, said):
    with pytest.raises(ValueError, match=said): Teacher(net(), **clause)


def test_only_a_picture_that_no_data_set_holds_is_converted():
    data = images()
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
    teacher = Teacher(model, mean=[0.2], std=[0.7], size=16)
    teacher.check(data)
    batch, index = data.get(torch.arange(6)), torch.tensor([0, -1, 2, -1, -1, 5])
    inside = index >= 0
    x = torch.where(inside[:, None, None, None], batch.x, (batch.x + batch.x.flip(0)) / 2)
    mixed = batch._replace(x=x, index=index)
    own = data.seen(mean=[0.2], std=[0.7], size=16)
    made, converted = model(own.get(torch.arange(6)).x), model(data.recast(mixed.x, own))
    assert torch.equal(teacher(mixed)[inside], made[inside])
    torch.testing.assert_close(teacher(mixed)[~inside], converted[~inside])


def test_a_batch_of_other_data_is_no_question_for_a_teacher_with_a_form_of_its_own():
    data = images()
    teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), size=16)
    teacher.check(data)
    batch = data.get(torch.arange(6))
    strangers = (images(seed=1).get(torch.arange(6)), data.replace(size=9).get(torch.arange(6)),
                 batch._replace(x=batch.x.flip(0)), batch._replace(x=batch.x + 0.1))
    for other in strangers:
        with pytest.raises(ValueError, match='other inputs than the data set gives.*in 6 of 6 rows.*index -1'):
            teacher(other)
    assert teacher(batch).shape == (6, 3)
    colours = ImageData(torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), torch.arange(6) % 3, list('012'))
    wide = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), size=16)
    wide.check(colours)
    assert wide(colours.arranged(colours.get(torch.arange(6)), half=True)).shape == (6, 3)


def test_soft_labels_train_and_have_the_shape_of_the_logits():
    class Soft(ImageData):
        def get(self, index, view=None):
            b = super().get(index, view)
            return b._replace(y=F.one_hot(b.y, 3).float())
    plain = images()
    soft = Soft(plain.x, plain.y, plain.classes, augment=plain.augment)
    def once(data):
        objective = Distilling(net(), net(seed=1))
        return fit(objective, data, RECIPE).losses
    for name, values in once(soft).items(): assert values == pytest.approx(once(plain)[name], rel=1e-4)
    with pytest.raises(ValueError, match='there are 3 classes'): fit(Supervised(net(classes=4)), soft, RECIPE)


def test_a_run_names_a_teachers_function_and_the_class_weights(tmp_path):
    def run(k, weights, folder=tmp_path):
        class Taught(Supervised):
            def __init__(self):
                super().__init__(net(), class_weights=weights)
                self.teacher = Teacher(net(seed=1), read=lambda out: k * out)
        fit(Taught(), images(), RECIPE, folder=folder, resume=True)
    one = torch.ones(3)
    run(1, one)
    run(1, one)
    for other in ((2, one), (1, 2 * one)):
        with pytest.raises(ValueError, match='another objective'): run(*other)


def test_a_teacher_with_wishes_sees_the_data_of_one_run_at_a_time():
    data = images()
    other, teacher = ImageData(data.x, data.y, ['2', '1', '0']), Teacher(net(), classes=['2', '1', '0'])
    run = Run(Distilling(net(), teacher.model), data, RECIPE)
    objective = Distilling(net(), net())
    objective.teacher = teacher
    first = Run(objective, data, RECIPE)
    steps = first.steps()
    next(steps)
    with pytest.raises(ValueError, match='those that the teacher sees already, in another run: give each run'):
        teacher.check(other)
    next(steps)
    for _ in zip(range(2), run.steps()): pass
    teacher.check(images())  # the same content
    with pytest.raises(DivergedError):  # a run that fails lets go of it
        fit(objective, data, replace(RECIPE, lr=1e30))
    teacher.check(other)


def test_what_a_contract_declares_is_looked_at():
    data = images()
    for form, outputs, said in ((lambda z: 9 * z, 'probabilities', "must be 'logits'"),
                                (lambda z: 9 * z, 'sigmoid', "must be 'logits'"),
                                (lambda z: z.sigmoid(), 'probabilities', "must be 'logits'"),
                                (lambda z: z.softmax(1), 'sigmoid', "must be 'probabilities'")):
        with pytest.raises(ValueError, match=f'outputs {said}'):
            check_classes(Teacher(Gives(net(), form), outputs=outputs), data, 'it')
    check_classes(Teacher(Gives(net(), lambda z: z.softmax(1)), outputs='probabilities'), data, 'it')
    check_classes(Teacher(Gives(net(), lambda z: z.sigmoid()), outputs='sigmoid'), data, 'it')


def test_every_tensor_of_a_network_is_in_its_name():
    class Hidden(nn.Module):
        def __init__(self, a=0., b=0.):
            super().__init__()
            self.register_buffer('a', torch.tensor(a), persistent=False)
            self.model, self.b = net(), torch.tensor(b)
        def forward(self, x): return self.model(x) + self.a + self.b
    names = [Teacher(m).fingerprint() for m in (Hidden(), Hidden(1.), Hidden(0., 1.), Hidden())]
    assert names[0] == names[3] and len(set(names)) == 3
    x = torch.zeros(1, 1, 8, 8)
    traced = [torch.jit.trace(nn.Sequential(net(), end).eval(), x) for end in (nn.ReLU(), nn.Tanh())]
    assert len({Teacher(m).fingerprint() for m in traced}) == 2


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_teaches_in_every_precision(dtype):
    data = images()
    teacher = net(seed=1).to(dtype)
    for precision in ('float32', 'bfloat16'):
        h = fit(Distilling(net(), teacher), data, replace(RECIPE, precision=precision), data)
        assert all(map(math.isfinite, h.losses['soft']))


@pytest.mark.parametrize('given, said', [
    (dict(data=[1, 2]), 'data must be a data set, .* but is a list'),
    (dict(data=digits()), 'data must be a data set, .*of Splits, one of the three.*, but is a Splits'),
    (dict(recipe=3), 'recipe must be a Recipe, but is 3'),
    (dict(valid=[1]), 'valid must be a data set'), (dict(objective=3), 'objective must be a network'),
    (dict(save_every='often'), "save_every must be a number of at least 0, but is 'often'"),
    (dict(log='x'), 'log must be a function'), (dict(resume='yes'), 'resume must be True or False'),
    (dict(folder=3), 'folder must be a path'), (dict(folder=''), "folder must be a path, or None, but is ''"),
    (dict(setup=3), 'setup must be a Setup')])
def test_what_is_of_another_kind_is_refused_at_the_door(given, said):
    whole = dict(objective=Supervised(net()), data=images(), recipe=RECIPE) | given
    with pytest.raises(ValueError, match=said): fit(**whole)


def test_what_is_measured_is_a_number_with_every_name_that_was_promised(tmp_path):
    class Tensors(ImageData):
        def measure(self, answers): return {k: torch.tensor(v) for k, v in super().measure(answers).items()}
    class Less(ImageData):
        def measure(self, answers): return {'loss': super().measure(answers)['loss']}
    data = images()
    valid = Tensors(data.x, data.y, data.classes)
    fit(Supervised(net()), data, RECIPE, valid, folder=tmp_path)
    assert type(evaluate(net(), valid).accuracy) is float
    with pytest.raises(ValueError, match='what data.measure gives must be with accuracy, balanced_accuracy, ece'):
        evaluate(net(), Less(data.x, data.y, data.classes))


def test_a_teacher_with_a_form_of_its_own_must_see_the_data_first():
    batch = images().get(torch.arange(2))
    for clauses in (dict(mean=[0.], std=[1.]), dict(size=8), dict(classes=['2', '1', '0'])):
        with pytest.raises(ValueError, match='must see the data'): Teacher(net(), **clauses)(batch)
    teacher = Teacher(net(), size=8)
    teacher.check(images())
    teacher(batch)
    teacher.leave()
    with pytest.raises(ValueError, match='must see the data'): teacher(batch)


def test_classes_are_matched_by_name():
    data, five = images(), net(classes=5)
    z = five(data.get(torch.arange(9)).x)
    teacher = Teacher(five, classes=['2', 'cow', '0', 'dog', '1'])
    teacher.check(data)
    assert torch.equal(teacher(data.get(torch.arange(9))), z[:, [2, 4, 0]])
    assert torch.equal(predict(teacher, data)[:9], predict(five, data)[:9, [2, 4, 0]])
    with pytest.raises(ValueError, match="must know every class of the data, but lacks '1' and 0 more"):
        Teacher(five, classes=['2', 'cow', '0', 'dog', 'cat']).check(data)
    with pytest.raises(ValueError, match='different names'): Teacher(five, classes=['0', '0'])


def test_fit_shows_a_teacher_the_data_in_its_form():
    stored, model = images(size=16), nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
    students = stored.replace(size=8)
    def learned(teacher, data):
        objective = Distilling(net(), teacher)
        objective.teacher = teacher
        return fit(objective, data, RECIPE).losses['soft'], weights(objective)
    class Own(nn.Module):  # the same by hand: the picture is looked up by its place
        def forward(self, batch):
            with torch.no_grad(): return model(stored.get(batch.index, batch.view).x)
    by_hand = Own()
    assert learned(Teacher(model, size=16), students) == learned(by_hand, students)


@pytest.mark.parametrize('wrap', [
    lambda m: m.half(), lambda m: m.double(), lambda m: torch.jit.script(m.eval()), nn.DataParallel,
    lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, torch.qint8),
    pytest.param(torch.compile, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings('ignore:.torch.jit.script', 'ignore:torch.ao.quantization', 'ignore::UserWarning')
def test_a_teacher_may_be_half_quantised_scripted_or_wrapped(wrap):
    data = images()
    expected = net(seed=1)(data.get(torch.arange(8)).x)
    teacher = Teacher(wrap(net(seed=1)))
    torch.testing.assert_close(teacher(data.get(torch.arange(8))).float(), expected, rtol=2e-2, atol=2e-2)
    objective = Distilling(net(), teacher.model)
    assert all(map(math.isfinite, fit(objective, data, RECIPE, data).losses['soft']))
    assert teacher.fingerprint() != Teacher(wrap(net(seed=2))).fingerprint()


def test_a_teachers_fingerprint_covers_weights_structure_and_clauses():
    class Doubled(nn.Sequential):
        def forward(self, x): return 2 * super().forward(x)
    model = net()
    def read(out): return out
    different = [Teacher(model), Teacher(net(seed=1)), Teacher(Doubled(*model)), Teacher(model, size=8),
                 Teacher(model, mean=[0.], std=[1.]), Teacher(model, mean=[0.], std=[2.]), Teacher(model, read=read),
                 Teacher(model, outputs='probabilities'), Teacher(model, classes=['0', '1', '2'])]
    assert len({t.fingerprint() for t in different}) == len(different)
    assert Teacher(nn.DataParallel(model)).fingerprint() == Teacher(model).fingerprint()


@pytest.mark.parametrize('clauses, said', [
    (dict(outputs='odds'), 'outputs must be one of'), (dict(mean=[0.]), 'mean and std must be given together'),
    (dict(read='logits'), 'read must be a function'), (dict(size=0), 'size must be a whole number'),
    (dict(mean=0.5, std=1.), 'mean must be a list'),
    (dict(mean=['a'], std=[1.]), 'mean must be a list with one number'),
    (dict(mean=[None], std=[1.]), 'mean must'), (dict(mean=[[0.5]], std=[1.]), 'mean must'),
    (dict(mean=[1j], std=[1.]), 'mean must'), (dict(mean=[math.nan], std=[1.]), 'mean must'),
    (dict(mean=[0.], std=[0.]), r'std must be a list with one number greater than 0 per channel, but is \[0.0\]'),
    (dict(mean=[], std=[]), 'mean must'), (dict(mean=[0., 0.], std=[1.]), 'mean and std must be of one length'),
    (dict(classes=10), 'classes must be a list of names')])
def test_a_contract_that_cannot_be_kept_is_refused(clauses, said):
    with pytest.raises(ValueError, match=said): Teacher(net(), **clauses)


def test_what_is_no_network_is_told_so():
    said = "model must be a network.*but is 'teacher.pth'. Open a name or a file with open_model"
    with pytest.raises(ValueError, match=said): Teacher('teacher.pth')
    with pytest.raises(ValueError, match='model must be a network.*is a dict'): Teacher({'a': 1})
    with pytest.raises(ValueError, match='^model must be a network, but is a Teacher. Give its .model.$'):
        Supervised(Teacher(net()))
    objective = Supervised(net())
    for call in (Supervised, Teacher, lambda m: evaluate(m, images()), lambda m: predict(m, images())):
        with pytest.raises(ValueError, match='^model must be a network, but is the objective Supervised. Give its '):
            call(objective)
    class Objective(nn.Sequential): pass  # a network by that name is one
    Supervised(Objective(*net()))


def test_data_of_another_form_are_refused_where_they_have_only_one():
    class Three(Data):
        device = torch.device('cpu')
    with pytest.raises(ValueError, match='a Three gives its items in one form, but a network wants its own mean, std'):
        Teacher(net(), mean=[0.], std=[1.]).check(Three())


def test_fit_leaves_the_precision_of_other_accelerators_alone():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state()
    fit(Supervised(net()), images(), replace(RECIPE, precision='bfloat16'))
    mine = Accelerator(cpu=True)
    assert mine.mixed_precision == 'no'
    fit(Supervised(net()), images(), replace(RECIPE, precision='bfloat16'))
    with mine.autocast(): assert mine.mixed_precision == 'no' and not torch.is_autocast_enabled('cpu')
    uneven = replace(RECIPE, precision='bfloat16', batch_size=16, accumulate=3)
    with pytest.raises(ValueError, match='batch_size'): fit(Supervised(net()), images(), uneven)
    assert mine.mixed_precision == 'no'
    x = nn.Parameter(torch.tensor(1.))
    fit(Supervised(net()), images(), replace(RECIPE, batch_size=16, accumulate=4))
    mine.backward(2 * x)
    assert mine.gradient_accumulation_steps == 1 and x.grad == 2 and mine.sync_gradients


def test_a_fit_within_a_fit_changes_nothing_outside():
    class Nested(Supervised):
        def check(self, data, valid=None):
            super().check(data, valid)
            fit(Supervised(net(seed=1)), images(), RECIPE)
    def weights_of(objective):
        fit(objective, images(), replace(RECIPE, batch_size=16, accumulate=2))
        return fingerprint(objective.model.state_dict())
    assert weights_of(Nested(net())) == weights_of(Supervised(net()))


def test_fit_leaves_the_teacher_alone_and_trains_adapters():
    teacher = digit_teacher()
    objective = Distilling(digit_student(classes=3), nn.Sequential(teacher, nn.Linear(10, 3)))
    before, adapter = weights(objective.teacher.model), weights(objective.adapter)
    fit(objective, images(), RECIPE)
    assert weights(objective.teacher.model) == before and weights(objective.adapter) != adapter


# --- the recipe

@pytest.mark.parametrize('bad', [
    dict(epochs=0), dict(epochs=math.inf), dict(epochs=math.nan), dict(epochs='2'),
    dict(steps=0), dict(steps=2.5), dict(batch_size=0), dict(batch_size=True), dict(accumulate=0),
    dict(steps=True), dict(lr=np.float32('nan')), dict(batch_size=np.int64(0)), dict(seed=np.bool_(True)),
    dict(lr=0), dict(lr=-1), dict(lr=math.nan), dict(lr='0.1'), dict(lr=True), dict(lr=None),
    dict(momentum=1), dict(weight_decay=-1), dict(weight_decay='0'), dict(warmup=1), dict(clip=0), dict(clip='1'),
    dict(augment='no'), dict(augment=1), dict(seed=True), dict(seed=1.5), dict(keep='first'), dict(keep=None),
    dict(patience=0), dict(patience=True), dict(patience=2.5), dict(patience='3'), dict(rows=0), dict(rows=2.5),
    dict(epochs=1e300), dict(epochs=2e9), dict(steps=99999999999), dict(steps='5'), dict(steps=[5]),
    dict(batch_size=10**9), dict(batch_size=None), dict(accumulate=10**12), dict(epochs=None), dict(epochs=[1]),
    dict(optimizer='lion'), dict(schedule='x'), dict(precision='fp8')])
def test_a_recipe_names_what_is_wrong_with_it(bad):
    (name, value), = bad.items()
    with pytest.raises(ValueError, match=rf'{name} must be .*, but is ') as e: Recipe(**bad)
    assert repr(plain(value)) in str(e.value)


def test_numbers_of_numpy_are_kept_as_pythons_own(tmp_path):
    given = dict(epochs=np.int64(2), steps=np.int32(4), batch_size=np.int64(8), lr=np.float32(0.5), clip=np.float64(1),
                 augment=np.bool_(True), seed=np.int64(3), patience=np.int64(4), rows=np.int16(2),
                 accumulate=np.uint8(1))
    same = Recipe(**{k: v.item() for k, v in given.items()})
    assert repr(Recipe(**given)) == repr(same)
    fit(Supervised(net()), images(), Recipe(**given), images(), folder=tmp_path, resume=np.bool_(True))
    h = fit(Supervised(net()), images(), same, images(), folder=tmp_path, resume=True)
    assert h.steps == 4
    own = dict(classes=np.array(['a', 'b', 'c']), mean=np.array([0.5], np.float32), std=np.array([0.25]))
    known = dict(reached={'accuracy': np.float32(0.5), 'items': np.int64(180)}, size=(np.int64(8), np.float64(0.5)))
    teacher = Teacher(model := net(), **own, **known)
    by_hand = Teacher(model, list('abc'), [0.5], [0.25], (8, 0.5), reached={'accuracy': 0.5, 'items': 180})
    assert json.dumps(teacher.contract) == json.dumps(by_hand.contract)
    assert teacher.fingerprint() == by_hand.fingerprint()
    assert evaluate(model, images(), np.int64(8)) == evaluate(model, images(), 8)
    objective = Supervised(model)
    def marks(share):
        objective.share = share
        return describe(objective)
    assert marks(0.5) == marks(np.float64(0.5)) == marks(np.float32(0.5)) != marks(np.float32(0.25))
    assert torch.equal(predict(model, images(), batch_size=np.int64(8)), predict(model, images(), 8))


def test_a_run_without_end_and_a_batch_without_room_are_refused_before_the_first_step(monkeypatch):
    assert Recipe(epochs=1e9, batch_size=100).total_steps(100) == 10**9
    with pytest.raises(ValueError, match='epochs must be so few that 101 items make .* but is 1000000000.0'):
        Recipe(epochs=1e9, batch_size=100).total_steps(101)
    with pytest.raises(ValueError, match='epochs must be so few that 60 items'):
        fit(Supervised(net()), images(), Recipe(epochs=1e9, batch_size=2))
    monkeypatch.setattr(training, 'free_bytes', lambda: 32 * 64 * 4)  # as many as the inputs of a batch take
    with pytest.raises(ValueError, match='^batch_size must be small enough .* 8,192 bytes .*, but is 32.'):
        fit(Supervised(net()), images(), RECIPE)
    fit(Supervised(net()), images(), replace(RECIPE, accumulate=2, steps=2))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.sampled_from(training._SCHEDULES), st.floats(0, 0.9))
def test_learning_rates_lie_between_nothing_and_the_highest(total, schedule, warmup):
    r = Recipe(lr=0.3, schedule=schedule, warmup=warmup)
    rates = [r.lr_at(s, total) for s in range(total)]
    assert all(0 < x <= 0.3 * (1 + 1e-12) for x in rates)
    rising = [x for s, x in enumerate(rates) if (s + 0.5) / total < warmup]
    assert rising == sorted(rising)
    assert rates[len(rising):] == sorted(rates[len(rising):], reverse=True)


def test_the_step_schedule_divides_by_ten_at_the_papers_epochs():
    values = [scheduled('step', e / 240) for e in (0, 149, 150, 179, 180, 209, 210, 239)]
    assert values == pytest.approx([1, 1, .1, .1, .01, .01, .001, .001])


# --- the plan of batches

@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 30),
       st.integers(1, 7), st.data())
def test_a_plan_is_one_stream_however_it_is_cut(n, piece, accumulate, world, steps, chunk, data):
    d = images(max(n, 3))
    b = piece * accumulate * world
    r = Recipe(batch_size=b, accumulate=accumulate, seed=5)
    one = [torch.stack(p) for p in d.plan(replace(r, accumulate=1), 0, steps)]
    pieces = [[torch.stack(p) for p in d.plan(r, 0, steps, rank, world, chunk)] for rank in range(world)]
    order = [(k % world, k // world) for k in range(accumulate * world)]
    joined = [torch.cat([pieces[rank][s * accumulate + i] for rank, i in order], 1) for s in range(steps)]
    assert torch.equal(torch.stack(joined), torch.stack(one))
    stream = torch.cat([p[0] for p in one])
    for start in range(0, len(stream) - len(d) + 1, len(d)):
        assert sorted(stream[start:start + len(d)].tolist()) == list(range(len(d)))
    cut = data.draw(st.integers(0, steps))
    again = [torch.stack(p) for p in d.plan(replace(r, accumulate=1), cut, steps)]
    assert all(torch.equal(x, y) for x, y in zip(again, one[cut:], strict=True))


def test_without_augmentation_every_view_is_the_image_itself():
    assert all((v == 0).all() for _, v in images().plan(replace(RECIPE, augment=False), 0, 5))
    assert any((v != 0).any() for _, v in images().plan(RECIPE, 0, 5))


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch):
    drawn, order = [], training.epoch_order
    monkeypatch.setattr(training, 'epoch_order', lambda n, seed, epoch: drawn.append(epoch) or order(n, seed, epoch))
    data, recipe = images(100), Recipe(batch_size=8)
    parts = [i for i, _ in data.plan(recipe, 0, 40, chunk=2)]
    assert drawn == [0, 1, 2, 3]
    assert torch.equal(torch.stack(parts), torch.stack([i for i, _ in data.plan(recipe, 0, 40)]))


def test_a_large_batch_is_planned_a_step_at_a_time(monkeypatch):
    asked, stream = [], training._stream
    def counted(data, recipe, first, last, orders):
        asked.append(last - first)
        return stream(data, recipe, first, last, orders)
    monkeypatch.setattr(training, '_stream', counted)
    [*images().plan(Recipe(batch_size=2**19), 0, 3)]
    assert asked == [2, 1]


# --- the run

@pytest.mark.parametrize('optimizer', ['sgd', 'adam', 'adamw'])
def test_the_same_recipe_gives_the_same_weights(optimizer):
    def once(seed=0):
        objective = Supervised(net(dropout=0.3))
        torch.rand(draws.pop())  # what else the program draws must not matter
        fit(objective, images(), replace(RECIPE, optimizer=optimizer, seed=seed))
        return weights(objective)
    draws = [3, 7, 1]
    first = once()
    assert once() == first and once(seed=1) != first


def test_fit_takes_the_naive_loops_steps_on_schedule():
    data, teacher, by_hand = digits().train, digit_teacher(), digit_student()
    start = {k: v.clone() for k, v in by_hand.state_dict().items()}
    teacher.eval()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loss = DistillationLoss(4., 0.5)
    recipe = replace(RECIPE, schedule='cosine', warmup=0.2)
    for step, (index, view) in enumerate(data.plan(recipe, 0, 20)):
        optimizer.param_groups[0]['lr'] = recipe.lr_at(step, 20)
        b = data.get(index, view)
        with torch.no_grad(): teacher_logits = teacher(b.x)
        optimizer.zero_grad()
        loss(by_hand(b.x), teacher_logits, b.y).backward()
        optimizer.step()
    class Plain(Objective):
        def __init__(self, student):
            super().__init__(student)
            self.teacher, self.loss = Teacher(teacher), loss
        def forward(self, b): return self.loss.parts(self.model(b.x), self.teacher(b), b.y)
    student = digit_student()
    student.load_state_dict(start)
    fit(Plain(student), data, recipe)
    for p, q in zip(by_hand.parameters(), student.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_pieces_of_a_batch_make_the_step_of_the_batch():
    def once(**changes):
        objective = Supervised(net())
        fit(objective, images(), replace(RECIPE, **changes))
        return torch.cat([p.detach().flatten() for p in objective.parameters()])
    torch.testing.assert_close(once(accumulate=4), once(), rtol=1e-5, atol=1e-6)


class Weighted(ImageData):
    "Images of which some are not there: the first half always, the second half every third."
    def get(self, index, view=None):
        batch = super().get(index, view)
        return batch._replace(weight=((batch.index < len(self) // 2) | (batch.index % 3 == 0)).float())


def weighted(data):
    return Weighted(data.x, data.y, data.classes, mean=data.mean, std=data.std, augment=data.augment)


@pytest.mark.parametrize('accumulate', [2, 8])
def test_pieces_in_which_fewer_rows_count_make_the_step_of_the_batch(accumulate):
    plain, data = images(), weighted(images())
    def once(data, **changes):
        objective = Distilling(net(), net(seed=1))
        h = fit(objective, data, replace(RECIPE, **changes))
        return torch.cat([p.detach().flatten() for p in objective.parameters()]), h.losses['soft']
    (whole, losses), (pieces, in_pieces) = once(data), once(data, accumulate=accumulate)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)
    assert in_pieces == pytest.approx(losses, rel=1e-4)
    assert (once(plain)[0] - whole).abs().max() > 1e-3


def test_a_piece_in_which_nothing_counts_changes_nothing():
    class Nothing(Weighted):
        def get(self, index, view=None):
            batch = super().get(index, view)
            return batch._replace(weight=torch.zeros_like(batch.weight))
    plain = images()
    objective, before = Supervised(net()), weights(net())
    h = fit(objective, Nothing(plain.x, plain.y, plain.classes), replace(RECIPE, weight_decay=0., accumulate=2))
    assert weights(objective.model) == before and set(h.losses['hard']) == {0.}


def test_a_weight_in_some_pieces_only_is_refused():
    class Sometimes(Weighted):
        at = 0
        def get(self, index, view=None):
            self.at += 1
            batch = super().get(index, view)
            return batch if self.at % 2 == first else batch._replace(weight=None)
    data = images()
    for first in (0, 1):
        with pytest.raises(ValueError, match='weight must be given with every piece of a batch or with none'):
            fit(Supervised(net()), Sometimes(data.x, data.y, data.classes), replace(RECIPE, accumulate=4))


def test_a_split_that_measures_nothing_is_refused():
    class Mute(ImageData): measures = ()
    data = images()
    with pytest.raises(ValueError, match='measures of valid must be at least one Measure'):
        fit(Supervised(net()), data, RECIPE, Mute(data.x, data.y, data.classes))


def test_every_row_goes_to_the_log_of_the_setup():
    rows = []
    h = fit(Supervised(net()), images(), RECIPE, images(), setup=Setup(progress=False, log=rows.append))
    assert rows == h.rows and len(rows) > 1
    with pytest.raises(ValueError, match='the setup of a run has folder, .*log, but was given fold'):
        fit(Supervised(net()), images(), RECIPE, fold='run')


# --- which weights are kept, and when a run stops

RESTLESS = replace(RECIPE, lr=0.1, schedule='constant', keep='best')  # ten rows, of two steps each


class Told(Distilling):
    "Has batch normalisation and an adapter, and is measured by a list; how often is a part of its state."
    def __init__(self, values=()):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        super().__init__(model, net(seed=1))
        self.values = tuple(values)
        self.register_buffer('n', torch.tensor(0))

    def measure(self, valid):
        self.n += 1
        return Measured(accuracy=self.values[self.n - 1], spare=0.)


def told(values, recipe=RESTLESS, **setup):
    torch.manual_seed(0)
    objective, states = Told(values), {}
    def log(row): states[row['step']] = weights(objective)
    h = fit(objective, images(), recipe, images(), log=log, progress=False, **setup)
    return objective, h, states


def as_measured(h): return [{k: v for k, v in r.items() if k != 'seconds'} for r in h.rows]


VALUES = (.1, .5, .2, .7, .7, .3, .6, .7, .1, .2)


def test_the_best_row_is_the_first_of_the_best_in_the_direction_of_the_measure():
    def best(values, **measure):
        rows = [{'step': i, 'x': v} if v is not None else {'step': i} for i, v in enumerate(values)]
        return History(rows, measure=Measure('x', **measure)).best
    assert best([1, 3, 3, 2])['step'] == 1 and best([2, 1, 1, 3], higher=False)['step'] == 1
    assert best([math.nan, 1, math.nan])['step'] == 1 and best([]) is None
    assert History([{'step': 3}]).best is None and History([{'step': 3}]).steps == 3 and History().steps == 0


def test_the_state_of_the_best_row_is_kept_whole():
    "Weights, adapter, running averages and counts are those of the row, and the steps are the same as without."
    objective, h, states = told(VALUES)
    assert len(set(states.values())) == len(h.rows) == 10 and h.best['step'] == 8 and h.steps == h.planned == 20
    assert weights(objective) == states[8] and not objective.training
    last, without, same = told(VALUES, replace(RESTLESS, keep='last'))
    assert as_measured(without) == as_measured(h) and same == states and weights(last) == states[20]


@pytest.mark.parametrize('patience, steps', [(1, 6), (2, 12), (3, 14), (4, 16), (6, 20), (7, 20)])
def test_patience_stops_a_run_whose_schedule_stays_as_planned(patience, steps):
    recipe = replace(RESTLESS, schedule='cosine', patience=patience)
    objective, h, states = told(VALUES, recipe)
    _, whole, _ = told(VALUES, replace(recipe, patience=None))
    assert (h.steps, h.planned, len(h.losses['hard'])) == (steps, 20, steps)
    assert as_measured(h) == as_measured(whole)[:steps // 2] and weights(objective) == states[h.best['step']]
    last, h, states = told(VALUES, replace(recipe, keep='last'))
    assert h.steps == steps and weights(last) == states[steps]


@pytest.mark.parametrize('patience, keep', [(None, 'best'), (3, 'best'), (3, 'last')])
def test_a_run_that_is_killed_at_any_step_keeps_the_same_weights(tmp_path, interrupt, patience, keep):
    recipe = replace(RESTLESS, patience=patience, keep=keep)
    whole, h, _ = told(VALUES, recipe)
    for stop in range(0, h.steps):
        torch.manual_seed(0)
        objective, folder = Told(VALUES), tmp_path/str(stop)
        interrupt(objective, stop)
        with pytest.raises(KeyboardInterrupt):
            fit(objective, images(), recipe, images(), folder=folder, save_every=0, progress=False)
        resumed, again, _ = told(VALUES, recipe, folder=folder, resume=True)
        assert weights(resumed) == weights(whole) and as_measured(again) == as_measured(h)
        assert (again.steps, again.planned, again.best['step']) == (h.steps, h.planned, h.best['step'])


def test_a_run_that_stopped_early_is_done(tmp_path, interrupt):
    recipe = replace(RESTLESS, patience=3)
    first, h, _ = told(VALUES, recipe, folder=tmp_path)
    assert not [k for k in Checkpoint(tmp_path).read()[0] if k.startswith('best.')]
    torch.manual_seed(0)
    again = Told(VALUES)
    calls = interrupt(again, 0)
    found = fit(again, images(), recipe, images(), folder=tmp_path, resume=True)
    assert not calls and weights(again) == weights(first) and as_measured(found) == as_measured(h)


def test_a_run_that_diverges_leaves_its_best_in_the_checkpoint(tmp_path):
    with pytest.raises(DivergedError):
        fit(Poisoned(net()), images(), RESTLESS, images(), folder=tmp_path, save_every=0)
    tensors, meta = Checkpoint(tmp_path).read()
    best = {k: t for k, t in tensors.items() if k.startswith('best.')}
    assert len(best) == len(net().state_dict()) and all(t.isfinite().all() for t in best.values())
    assert History(**meta['history']).best and not meta['done']


def test_without_a_validation_split_nothing_is_best():
    for bad, said in ((dict(keep='best'), "keep must be 'last' without a validation split.*but is 'best'"),
                      (dict(patience=3), 'patience must be None without a validation split.*but is 3')):
        with pytest.raises(ValueError, match=said): fit(Supervised(net()), images(), replace(RECIPE, **bad))


def test_a_checkpoint_that_is_older_than_a_field_of_the_recipe_is_continued(tmp_path):
    fit(a := Supervised(net()), images(), RECIPE, images(), folder=tmp_path)
    tensors, meta = Checkpoint(tmp_path).read()
    for name in ('keep', 'patience'): del meta['recipe'][name]
    del meta['history']['planned']
    Checkpoint(tmp_path).write(tensors, meta)
    h = fit(b := Supervised(net()), images(), RECIPE, images(), folder=tmp_path, resume=True)
    assert weights(a) == weights(b) and h.planned == 20
    with pytest.raises(ValueError, match="another recipe: keep was 'last' and is 'best'"):
        fit(Supervised(net()), images(), replace(RECIPE, keep='best'), images(), folder=tmp_path, resume=True)


TOGETHER = """
from distill_nb.ranks import from_each
from test_training import *
def run():
    recipe = replace(RESTLESS, patience=3, lr=1.)
    h = fit(a := Supervised(net()), images(), recipe, images(seed=1), device='cpu', progress=False)
    said = ''
    class Spoilt(Supervised):
        def measure(self, valid): raise DivergedError('it broke')
    try: fit(Spoilt(net()), images(), RECIPE, images(), device='cpu', progress=False)
    except DivergedError as e: said = str(e)
    return from_each([weights(a), h.steps, h.best['step'], h.best['accuracy'], said])
"""


def test_processes_stop_at_the_same_row_and_keep_the_same_weights(tmp_path):
    (one, alone), (two, *both) = alone_and_together(TOGETHER, tmp_path)
    assert (one, two) == (1, 2) and both[0] == both[1]
    assert both[0][1:] == alone[1:] and alone[2] < alone[1] < 20 and alone[4] == 'it broke'


SHARED = """
from distill_nb.ranks import from_each
from distill_nb.contract import _together
from test_training import *
class Counts(nn.Sequential):
    asked = 0
    def forward(self, x):
        if not self.training: self.asked += len(x)
        return super().forward(x)
class Worse(ImageData):  # the first row is the best
    rows = 0
    def measure(self, answers):
        self.rows += 1
        return super().measure(answers) | {'accuracy': -self.rows}
class Looks(ImageData):  # a measure that looks at the inputs
    measures = Measure('brightness'), Measure('accuracy')
    def measure(self, answers):
        pairs = [(z, b.x.double().sum().item(), b.y) for z, b in answers]
        hits = sum((z.argmax(1) == y).sum().item() for z, _, y in pairs)
        return {'brightness': sum(x for _, x, _ in pairs), 'accuracy': hits}
def run():
    out, data, valid = [], images(), images(1300, seed=1)  # three batches of 512
    splits = weighted(valid), images(5, seed=2), Looks(valid.x, valid.y, valid.classes)
    for keep in ('last', 'best'):
        torch.manual_seed(int(os.environ.get('RANK', 0)))  # rank 1 begins with other weights
        model = Counts(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        recipe = replace(RECIPE, keep=keep, rows=4, lr=0.3, schedule='constant')
        falling = Worse(valid.x, valid.y, valid.classes)
        h = fit(Supervised(model), data, recipe, falling, device='cpu', progress=False)
        asked, model.asked = model.asked, 0
        after = evaluate(model, valid).loss
        out.append([weights(model), as_measured(h), asked, model.asked, after])
    for split in splits:
        own = evaluate(model, split)
        with _together(): shared, logits = evaluate(model, split), predict(model, split)
        out.append([own, shared, torch.equal(logits, predict(model, split))])
    bad = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad(): bad[1].weight[:, 1].fill_(math.nan if int(os.environ.get('RANK', 0)) else 0.)
    try:
        with _together(): said = evaluate(bad, valid)
    except ValueError as e: said = str(e)
    return from_each([*out, said])
"""


def test_processes_share_the_questions_of_a_measurement_and_leave_the_same_tensors(tmp_path):
    (one, alone), (two, *both) = alone_and_together(SHARED, tmp_path)
    assert (one, two) == (1, 2)
    for own, other in zip(both[0][:2], both[1][:2]):
        assert own[:2] == other[:2] and own[4:] == other[4:]  # weights, rows, what is measured afterwards
        assert own[3] == other[3] == 1300 and max(own[2], other[2]) < 0.7 * 4 * 1300  # alone all, together a share
    (*_, rows, _, _, last), (*_, _, _, best) = both[0][:2]
    assert last == rows[-1]['valid_loss'] != rows[0]['valid_loss'] == best
    for found in (alone, *both):
        for own, shared, equal in found[2:5]: assert own == shared and equal
    assert both[0][5] == both[1][5] and 'logits that are not finite' in both[0][5] and isinstance(alone[5], dict)


OWN = """
from test_training import *
class Asks(Supervised):
    def measure(self, valid):
        if rank == 0: return evaluate(self.model, valid)
        return {'accuracy': 0., 'loss': 9.}
class Fails(Asks):
    def measure(self, valid):
        if rank: raise OSError('no room')
        return evaluate(self.model, valid)
def run(kind):
    return fit(kind(net()), images(), RECIPE, images(1300), device='cpu', progress=False).rows
print([r['accuracy'] for r in run(Asks)])
run(Fails)
"""


def test_a_measure_of_ones_own_may_ask_or_fail_in_one_process_alone(tmp_path):
    "What the first one measured counts, and none waits for an answer that does not come."
    code = 'from distill_nb import ranks\nranks._SILENT, ranks._GRACE = 5., 1.\n' + OWN
    (first, a, err), (other, b, why) = ended(machines(code, tmp_path/'a', tmp_path/'b'))
    assert a == b and len(json.loads(a)) == 10 and max(json.loads(a)) > 0
    assert (first, other) == (1, 1) and why.splitlines()[-1].endswith('OSError: no room'), (err, why)
    assert 'rank 1 of 2 failed at step 2 of 20: OSError: no room' in err


MACHINE = """
from small import *
from distill_nb.files import fingerprint
torch.manual_seed(rank)  # other weights, of which those of rank 0 count
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
recipe = Recipe(steps=120, batch_size=16, lr=0.05, precision='float32', rows=12, keep='best')
class Dies(Supervised):
    def measure(self, valid):
        kept = os.path.exists('../a/run/checkpoint.safetensors')
        if DIES and rank == 1 and kept: os.kill(os.getpid(), signal.SIGKILL)
        return super().measure(valid)
how = dict(folder='run', resume=True, device='cpu', progress=False, save_every=0)
h = fit(Dies(model), images(), recipe, images(seed=1), **how)
print(fingerprint(model.state_dict()), h.steps, sum(h.losses['hard']), h.best['accuracy'])
"""


def test_two_machines_of_which_one_dies_end_where_they_would_have_ended(tmp_path):
    "Two processes with working directories of their own, so that the first one alone has a checkpoint."
    def run(*places, dies=False):
        return ended(machines(MACHINE.replace('DIES', str(dies)), *(tmp_path/place for place in places)))
    (code, _, first), (died, *_) = run('a', 'b', dies=True)
    assert (code, died) == (1, -signal.SIGKILL) and not (tmp_path/'b'/'run').exists()
    told = [line for line in first.splitlines() if line.startswith('distill_nb: rank 1 of 2 was lost at step ')]
    assert told and told[0].endswith("with resume=True the run goes on from the checkpoint in 'run'.")
    both, whole = run('a', 'b'), run('c', 'd')
    assert {code for code, *_ in both + whole} == {0}, both + whole
    (a, b), (c, d) = ([out for _, out, _ in pair] for pair in (both, whole))
    assert a == b == c == d and a.split()[1] == '120'


OTHERWISE = """
from test_training import *
from distill_nb.ranks import from_each
def refused(*args, **kw):
    try: fit(*args, **kw, device='cpu', progress=False)
    except Exception as error: print(f'{type(error).__name__}: {error}')
def objective(): return Supervised(net())
fit(objective(), images(), RECIPE, images(), folder='run', device='cpu', progress=False)
refused(objective(), images(), RECIPE, folder='run')
refused(objective(), images(), replace(RECIPE, lr=0.1), folder='run', resume=True)
refused(objective(), images(), replace(RECIPE, seed=rank, lr=0.1 + rank))
refused(objective(), images(seed=rank), RECIPE)
refused(objective(), images(), RECIPE, images() if rank else None)
class Fails(Supervised):
    def forward(self, batch): return {'hard': super().forward(batch)['hard'] * (math.inf if rank else 1)}
    def explain(self, batch): return f'a label of rank {rank} is masked' if rank else None
refused(Fails(net()), images(), replace(RECIPE, steps=100), folder='other')
class Full(Checkpoint):
    def write(self, tensors, meta): raise OSError(28, 'No space left on device')
training.Checkpoint = Full
refused(objective(), images(), RECIPE, folder='full')
"""


def test_what_one_rank_refuses_all_refuse_and_in_the_same_words(tmp_path):
    (code, a, err), (other, b, _) = ended(machines(OTHERWISE, tmp_path/'a', tmp_path/'b'))
    assert (code, other) == (0, 0) and a == b, err
    said = a.splitlines()
    assert len(said) == 7 and "'run' holds a run already: continue it with resume=True" in said[0]
    assert 'was made by another recipe: lr was 0.05 and is 0.1' in said[1]
    assert said[2].endswith('lr of the recipe must be the same in every rank, but is 0.1 in rank 0 and 1.1 in rank 1.')
    assert 'data must be the same in every rank' in said[3] and 'valid must be the same in every rank' in said[4]
    assert said[5].endswith('became inf at step 0 of 100; no checkpoint was written. A label of rank 1 is masked')
    assert said[6] == 'OSError: [Errno 28] No space left on device'


# --- what is told while a run goes on

def test_a_log_that_fails_is_said_once_and_the_run_goes_on():
    calls = []
    def log(row):
        calls.append(row['step'])
        row.clear()
        raise OSError(28, 'No space left on device')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        h = fit(a := Supervised(net()), images(), RECIPE, images(), log=log)
    told, = [str(w.message) for w in said]
    assert told.startswith('the log failed at step 2 of 20, and the run goes on: OSError') and 'No space left' in told
    assert calls == [r['step'] for r in h.rows] and len(calls) == 10
    fit(b := Supervised(net()), images(), RECIPE, images())
    assert weights(a) == weights(b)
    def stop(row): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(Supervised(net()), images(), RECIPE, log=stop)


def test_a_log_that_fails_ends_no_run_where_warnings_are_errors(capsys):
    def log(row): 1 / 0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        h = fit(Supervised(net()), images(), RECIPE, images(), log=log)
    assert h.steps == 20 and capsys.readouterr().err.count('the log failed at step 2 of 20, and the run goes on') == 1


@pytest.mark.parametrize('rows, steps', [
    (None, [*range(2, 21, 2)]), (1, [20]), (3, [7, 14, 20]), (99, [*range(1, 21)])])
def test_a_recipe_may_say_how_often_is_measured_and_the_weights_are_the_same(rows, steps):
    h = fit(a := Supervised(net()), images(), replace(RECIPE, rows=rows), images())
    assert [r['step'] for r in h.rows] == steps
    fit(b := Supervised(net()), images(), RECIPE, images())
    assert weights(a) == weights(b)


@pytest.mark.parametrize('n, steps, rows', [(1000, 120, 12), (10, 2, 20), (8000, 960, 12)])
def test_steps_and_rows_as_for_other_data(n, steps, rows):
    r = Recipe(epochs=12, batch_size=100)
    same = r.as_for(n)
    assert (r.total_steps(n), r.total_rows(n)) == (steps, rows)
    assert all((same.total_steps(m), same.total_rows(m)) == (steps, rows) for m in (1, 50, 10**6))
    assert replace(r, epochs=200).total_rows(n) == 50 and replace(r, epochs=200, rows=70).total_rows(n) == 70


def curve(folder):
    with open(folder/'curve.csv', newline='') as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def test_the_curve_is_on_disk_with_every_row_and_whole_after_a_resume(tmp_path, interrupt):
    rows = []
    def log(row):
        rows.append(row)
        assert curve(tmp_path) == rows
    objective = Supervised(net())
    interrupt(objective, 13)
    with pytest.raises(KeyboardInterrupt):
        fit(objective, images(), RECIPE, images(), folder=tmp_path, log=log, save_every=0)
    assert len(curve(tmp_path)) == len(rows) == 6
    h = fit(Supervised(net()), images(), RECIPE, images(), folder=tmp_path, resume=True)
    assert curve(tmp_path) == h.rows and len(h.rows) == 10


def test_a_curve_that_can_not_be_written_is_said_once_and_the_run_goes_on(tmp_path):
    (tmp_path/'curve.csv').mkdir()
    with pytest.warns(UserWarning, match='the curve failed at step 2 of 20') as said:
        h = fit(Supervised(net()), images(), RECIPE, images(), folder=tmp_path)
    assert len(said) == 1 and len(h.rows) == 10 and Checkpoint(tmp_path).read()[1]['done']


def test_runs_can_be_stepped_side_by_side_in_different_precisions():
    def stepped(precisions):
        runs = [Run(Supervised(net()), images(), replace(RECIPE, precision=p)) for p in precisions]
        for _ in zip(*(run.steps() for run in runs)): pass
        return [weights(run.objective.model) for run in runs]
    both = stepped(['float32', 'bfloat16'])
    assert both == stepped(['float32']) + stepped(['bfloat16']) and both[0] != both[1]


def test_clipping_bounds_the_step():
    objective = Supervised(net())
    def vector(): return torch.cat([p.detach().flatten().clone() for p in objective.parameters()])
    before = vector()
    one = replace(RECIPE, steps=1, schedule='constant', warmup=0, lr=1., momentum=0, weight_decay=0)
    fit(objective, images(), replace(one, clip=1e-3))
    assert (vector() - before).norm() == pytest.approx(1e-3, rel=1e-3)


def test_bfloat16_keeps_weights_and_losses_in_float32():
    objective = Supervised(digit_student())
    h = fit(objective, digits().train, replace(RECIPE, precision='bfloat16'), digits().valid)
    assert {p.dtype for p in objective.parameters()} == {torch.float32}
    assert all(math.isfinite(l) for l in h.losses['hard'])
    assert objective(digits().train.get(torch.arange(4)))['hard'].dtype == torch.float32
    assert objective.model(digits().train.get(torch.arange(4)).x).dtype == torch.float32  # no wrapper is left behind


def test_the_student_trains_in_train_mode_after_an_evaluation():
    seen = []
    class Watch(Supervised):
        def forward(self, b):
            seen.append(self.model.training)
            return super().forward(b)
    objective = Watch(net())
    fit(objective, images(), RECIPE, valid=images())
    assert len(seen) == 20 and all(seen) and not objective.model.training


def test_the_history_tells_every_step_and_survives_json():
    h = fit(Supervised(net()), images(), replace(RECIPE, steps=None, epochs=3), images())
    assert len(h.losses['hard']) == 6 and [r['step'] for r in h.rows] == [2, 4, 6]
    assert {'accuracy', 'valid_loss', 'lr', 'seconds', 'hard'} <= set(h.last)
    assert h.last['epoch'] == pytest.approx(6 * 32 / 60)
    assert History(**json.loads(json.dumps(asdict(h)))) == h
    long = fit(Supervised(net()), images(), replace(RECIPE, steps=1000), images())
    assert len(long.rows) <= 51 and len(long.losses['hard']) == 1000


def test_curves_hold_every_loss_of_every_run_and_leave_out_what_was_not_measured():
    from matplotlib.figure import Figure
    def axes(): return Figure().subplots(1, 2)
    with_valid = History([{'step': 3, 'epoch': 0.5, 'accuracy': 0.4}], {'hard': [3., 2., 1.], 'soft': [1., 1., 1.]},
                         measure=Measure('accuracy'))
    without = History([{'step': 3, 'epoch': 0.5}], {'hard': [3., 2., 1.]})
    left, right = axes()
    plot_curves({'a': with_valid, 'b': without}, (left, right))
    assert [line.get_label() for line in left.lines] == ['a: hard', 'a: soft', 'b: hard']
    assert [(line.get_label(), list(line.get_xdata())) for line in right.lines] == [('a', [3])]
    assert right.get_visible() and right.get_ylabel() == 'validation accuracy'
    left, right = axes()
    plot_curves({'b': without}, (left, right), 'epoch')
    assert len(left.lines) == 2 and not right.get_visible()
    figure = with_valid.plot(axes())
    left, right = figure.axes
    assert len(left.lines) == 4 and list(right.lines[0].get_xdata()) == [0.5] and right.get_xlabel() == 'epoch'
    long = History([], {'hard': [float(k) for k in range(100)]})
    plot_curves({'long': long}, both := axes())
    assert both[0].lines[1].get_ydata()[:2].tolist() == [0.5, 1.5]  # the mean of two steps, a fortieth of the run


# --- bad input

def test_one_sentence_says_why_a_model_gives_no_logits():
    model, x = net().train(), images().get(torch.arange(2)).x
    assert logits_of(model, x, 'it').shape == (2, 3) and model.training
    with pytest.raises(ValueError, match=r'the student does not take inputs of shape \(1, 8, 4\): .') as e:
        logits_of(model, x[..., :4], 'the student')
    assert '\n' not in str(e.value) and model.training
    class Then(nn.Module):
        def __init__(self, f): super().__init__(); self.f = f
        def forward(self, x): return self.f(model(x))
    for f in (lambda z: (z, 2*z), lambda z: {'logits': z, 'more': 0}, lambda z: SimpleNamespace(logits=z),
              lambda z: [[z]]):
        assert torch.equal(logits_of(Then(f), x, 'it'), logits_of(model, x, 'it'))
        assert torch.equal(predict(Then(f), images()), predict(model, images()))
        assert evaluate(Then(f), images()) == evaluate(model, images())
    for f, kind in ((lambda z: {'boxes': z}, 'dict'), (lambda z: {z.sum()}, 'set'), (lambda z: (), 'tuple'),
                    (lambda z: ('a',), 'tuple')):
        said = f'it gives a {kind}, in which no logits were found: it must give a tensor, a tuple that begins with one'
        with pytest.raises(ValueError, match=said): logits_of(Then(f), x, 'it')


def test_what_does_not_fit_is_refused_before_the_first_step():
    class Untouchable(Supervised):
        def forward(self, b): raise AssertionError('training began')
    with pytest.raises(ValueError, match='3 classes'): fit(Untouchable(net(classes=4)), images(), RECIPE)
    def refused(said, data=images(), recipe=RECIPE, device=None):
        with pytest.raises(ValueError, match=said): fit(Untouchable(net()), data, recipe, device=device)
    refused(r'does not take inputs of shape \(1, 6, 6\)', images(size=6))
    refused('batch_size must be a multiple', recipe=replace(RECIPE, accumulate=5))
    refused('float16', recipe=replace(RECIPE, precision='float16'), device='cpu')
    refused('device must', device='abacus')
    if not torch.cuda.is_available(): refused('cuda', device='cuda')
    assert fit_device('cpu').type == 'cpu'


class Poisoned(Supervised):
    "Gives a NaN from its `at`-th batch on."
    at, n = 12, 0
    def forward(self, b):
        self.n += 1
        return {'hard': super().forward(b)['hard'] * (math.nan if self.n > self.at else 1)}


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    said = "the loss 'hard' became nan at step 12 of 20; the checkpoint .* holds the last good state"
    with pytest.raises(DivergedError, match=said) as e:
        fit(Poisoned(net()), images(), RECIPE, folder=tmp_path, save_every=0)
    assert isinstance(e.value, ValueError)
    tensors, meta = Checkpoint(tmp_path).read()
    assert meta['step'] <= 12 and not meta['done']
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    with pytest.raises(DivergedError, match='no checkpoint was written'): fit(Poisoned(net()), images(), RECIPE)


def test_a_folder_with_a_run_is_continued_only_when_asked(tmp_path):
    a = Supervised(net())
    fit(a, images(), RECIPE, folder=tmp_path)
    with pytest.raises(ValueError, match='holds a run already'):
        fit(Supervised(net()), images(), RECIPE, folder=tmp_path)
    b = Supervised(net())
    h = fit(b, images(), RECIPE, folder=tmp_path, resume=True)
    assert weights(a) == weights(b) and len(h.losses['hard']) == 20
    with pytest.raises(ValueError, match='other initial weights.*Seed'):
        fit(Supervised(net(seed=5)), images(), RECIPE, folder=tmp_path, resume=True)


def test_a_setting_that_repr_does_not_show_makes_another_objective(tmp_path):
    class Weighted(Supervised):
        def __init__(self, model, weight):
            super().__init__(model)
            self.weight = weight
        def forward(self, b): return {'hard': self.weight * super().forward(b)['hard']}
    fit(Weighted(net(), 1.), images(), RECIPE, folder=tmp_path)
    with pytest.raises(ValueError, match='another objective'):
        fit(Weighted(net(), 9.), images(), RECIPE, folder=tmp_path, resume=True)


class Returns(Supervised):
    "Gives what a function makes of the right loss and the number of the call."
    def __init__(self, model, function):
        super().__init__(model)
        self.__dict__['function'], self.n = function, 0
    def forward(self, b):
        self.n += 1
        return self.function(super().forward(b)['hard'], self.n)


NO_DICT = 'dict of named losses'

@pytest.mark.parametrize('function,said', [
    (lambda l, n: {}, NO_DICT), (lambda l, n: None, NO_DICT), (lambda l, n: l, NO_DICT),
    (lambda l, n: {'a': 1.}, NO_DICT), (lambda l, n: {'a': l.expand(3)}, NO_DICT),
    (lambda l, n: {'a': l.detach()}, 'depends on a weight'),
    (lambda l, n: {f'a{n}': l}, 'must keep their names')])
def test_an_objective_that_returns_something_else_is_told_so(function, said):
    with pytest.raises(ValueError, match=said): fit(Returns(net(), function), images(), RECIPE)


def test_what_cannot_train_is_refused(tmp_path):
    fixed = net().requires_grad_(False)
    with pytest.raises(ValueError, match='no weight that trains'): fit(Supervised(fixed), images(), RECIPE)
    with pytest.raises(ValueError, match='nn.Module'): fit(lambda b: {}, images(), RECIPE)
    with pytest.raises(ValueError, match='none has a label'):
        fit(Supervised(net()), images().unlabelled([]), RECIPE)
    with pytest.raises(ValueError, match='4 classes'): fit(Supervised(net()), images(), RECIPE, valid=images(classes=4))
    with pytest.raises(ValueError, match='some have none'): evaluate(net(), images().unlabelled([0, 1, 2]))
    (tmp_path/'file').write_text('')
    with pytest.raises(ValueError, match='folder must be a folder'):
        fit(Supervised(net()), images(), RECIPE, folder=tmp_path/'file')


def test_a_last_step_that_destroys_the_weights_is_noticed(tmp_path):
    once = replace(RECIPE, steps=1, lr=1e38, warmup=0, schedule='constant')
    with pytest.raises(DivergedError, match='not finite'): fit(Supervised(net()), images(), once, images())
    with pytest.raises(DivergedError, match='no longer finite'):
        fit(Supervised(net()), images(), replace(once, lr=1e39), folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['curve.csv']


@pytest.mark.parametrize('first, factor, stops', [(1., 1.1e5, True), (1., 0.9e5, False), (1e4, 1.1e5, True),
                                                  (1e4, 0.9e5, False), (0., 1e4, False)])
def test_a_loss_that_becomes_absurd_has_diverged(tmp_path, first, factor, stops):
    "100,000 times the losses of the first step, or 1 if they were smaller; also if it comes down again."
    at = lambda l, n: {'a': l / l.detach() * (max(first, 1.) * factor if n == 7 else first), 'b': 0 * l}
    train = lambda: fit(Returns(net(), at), images(), RECIPE, folder=tmp_path, save_every=0)
    if not stops: assert len(train().losses['a']) == 20
    else:
        said = r"'a' became [\d.e+]+ at step 6 of 20; .* A smaller learning rate than 0.05"
        with pytest.raises(DivergedError, match=said): train()


def test_a_network_whose_extra_state_is_no_tensor_is_trained_and_its_run_resumed(tmp_path):
    class Extra(nn.Flatten):
        def get_extra_state(self): return {'scale': 3}
        def set_extra_state(self, state): assert state == {'scale': 3}
    make = lambda: Supervised(nn.Sequential(Extra(), *net()[1:]))
    fit(first := make(), images(), recipe=RECIPE, folder=tmp_path)
    fit(again := make(), images(), recipe=RECIPE, folder=tmp_path, resume=True)
    assert weights(again) == weights(first)


def test_a_run_that_resumes_remembers_its_first_losses(tmp_path, interrupt):
    at = lambda l, n: {'a': l / l.detach() * (3e4 if n == 15 else 1. if n == 1 else 0.1)}
    broken = lambda: Returns(net(), at)
    fit(broken(), images(), RECIPE, folder=tmp_path/'whole')
    objective = broken()
    interrupt(objective, 12)
    with pytest.raises(KeyboardInterrupt): fit(objective, images(), RECIPE, folder=tmp_path/'cut', save_every=0)
    fit(broken(), images(), RECIPE, folder=tmp_path/'cut', resume=True)


def test_a_label_that_the_model_masks_is_named(masked):
    "It is no matter of the learning rate, in the losses as little as on the validation split."
    said = r"masks the right class of \d+ of \d+ labels with -inf, class 1 among them"
    for valid in (None, images()):
        with pytest.raises(ValueError, match=said) as e: fit(Supervised(masked(net(), 1)), images(), RECIPE, valid)
        assert not isinstance(e.value, DivergedError) and 'learning rate' not in str(e.value)


def test_an_explanation_that_fails_does_not_hide_the_divergence():
    class Explains(Returns):
        def explain(self, batch): raise KeyError('no')
    with pytest.raises(DivergedError, match='became nan at step 2'):
        fit(Explains(net(), lambda l, n: {'a': l * (math.nan if n == 3 else 1)}), images(), RECIPE)


def test_fit_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    torch.manual_seed(3)
    fit(Supervised(model), images(), RECIPE)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize('first,then,named', [
    (lambda: Supervised(net()), dict(recipe=replace(RECIPE, lr=0.06)), 'lr was 0.05 and is 0.06'),
    (lambda: Supervised(net()), dict(data=images(seed=1)), 'another data'),
    (lambda: Supervised(net()), dict(objective=lambda: Supervised(net(), 0.1)), 'another objective'),
    (lambda: Distilling(net(), net(seed=1)), dict(objective=lambda: Distilling(net(), net(seed=2))),
     'another objective')])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, first, then, named):
    given = dict(objective=first, data=images(), recipe=RECIPE)
    call = lambda g: fit(g['objective'](), g['data'], g['recipe'], folder=tmp_path, resume=True)
    call(given)
    kept = (tmp_path/'checkpoint.safetensors').read_bytes()
    with pytest.raises(ValueError, match=named): call(given | then)
    assert (tmp_path/'checkpoint.safetensors').read_bytes() == kept


def test_a_damaged_or_foreign_checkpoint_is_refused_by_name_and_kept(tmp_path):
    from safetensors.torch import load, save
    path = tmp_path/'checkpoint.safetensors'
    fit(Supervised(net()), images(), RECIPE, folder=tmp_path)
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:]
    nameless = save(load(good))  # the same tensors without their fingerprint
    for bad in (good[:-7], good[:100], b'', b'not a checkpoint', flipped, nameless, save({'a': torch.ones(3)})):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match='checkpoint.safetensors'):
            fit(Supervised(net()), images(), RECIPE, folder=tmp_path, resume=True)
        assert path.read_bytes() == bad
    path.write_bytes(good)
    fit(Supervised(net()), images(), RECIPE, folder=tmp_path, resume=True)


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path)
    checkpoint.write({'x': torch.ones(2)}, {'step': 1})
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'): checkpoint.write({'x': torch.zeros(2)}, {'step': 2})
    assert checkpoint.read()[1] == {'step': 1} and list(tmp_path.iterdir()) == [checkpoint.path]


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
def test_a_resume_in_channels_last_puts_the_optimisers_memory_beside_its_weights(tmp_path, optimizer, interrupt):
    data, recipe = images(64), replace(RECIPE, steps=8, batch_size=16, optimizer=optimizer, precision='bfloat16')
    def run(folder, stop=None):
        torch.manual_seed(0)
        objective = Supervised(resnet8(len(data.classes), data.channels))
        calls = interrupt(objective, stop)
        fit(objective, data, recipe, folder=folder, resume=True, save_every=0)
        return objective.model.state_dict(), len(calls)
    whole, _ = run(tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): run(tmp_path/'cut', 6)
    resumed, steps = run(tmp_path/'cut')
    assert steps < 8 and all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_gradients_of_before_do_not_count():
    def run(before):
        model = net()
        if before: model(images().get(torch.arange(8)).x).sum().backward()
        fit(Supervised(model), images(), replace(RECIPE, steps=3))
        return fingerprint(model.state_dict())
    assert run(False) == run(True)


def test_a_frozen_student_and_a_valid_split_without_labels_are_refused():
    class WithHelper(Supervised):
        def __init__(self, model):
            super().__init__(model)
            self.helper = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match='no weight that trains'):
        fit(WithHelper(net().requires_grad_(False)), images(), RECIPE)
    valid = images()
    valid.y[3] = UNLABELLED
    with pytest.raises(ValueError, match='valid must have a label.*1 have none'):
        fit(Supervised(net()), images(), RECIPE, valid)


def test_a_valid_split_of_other_classes_is_refused():
    class Plain(nn.Module):  # asks nothing by itself
        def __init__(self):
            super().__init__()
            self.model = net()
        def forward(self, batch): return {'hard': F.cross_entropy(self.model(batch.x), batch.y)}
    data = images()
    for names, said in ((['0', '2', '1'], "class 1 of valid must be '1', as in data, but is '2'"),
                        (['0', '1', 'x'], "class 2 of valid must be '2', as in data, but is 'x'")):
        for objective in (Supervised(net()), Plain()):
            with pytest.raises(ValueError, match=said):
                fit(objective, data, RECIPE, ImageData(data.x, data.y, names))


def edited(folder, change):
    "A checkpoint of step 20 of 40 that somebody has changed, and given the marks that fit."
    tensors, meta = Checkpoint(folder).read()
    change(tensors, meta)
    Checkpoint(folder).write(tensors, meta)


def go_on(folder, objective=None):
    objective = objective or Distilling(net(seed=3), net(seed=1))
    return fit(objective, images(), replace(RECIPE, steps=40), images(), folder=folder, resume=True)


FIELDS = {
    'step': [20.5, '20', None, -1, 41, True], 'done': [None, 'yes', 1], 'scaler': [3, [], {'scale': 'large'}],
    'history': [None, [], {}, {'rows': {}}, {'rows': [3]}, {'rows': [{}]}, {'rows': [{'step': 41}]}, {'more': 1},
                {'rows': [{'step': 2, 'lr': 'x'}]}, {'seconds': 'long'}, {'measure': 5}, {'measure': [1, 2, 3]},
                {'environment': 3}, {'losses': {'soft': [1.]}}, {'losses': ['soft']}],
    'losses': [None, 'soft', [3], ['lost'], [['soft']]]}


@pytest.mark.parametrize('name, value', [(name, value) for name, values in FIELDS.items() for value in values])
def test_a_field_of_a_checkpoint_that_was_edited_is_refused_by_name(half, name, value):
    def edit(tensors, meta):  # of a history some fields, unless they are left out altogether
        whole = name == 'history' and isinstance(value, dict) and value
        meta[name] = meta[name] | value if whole else value
    edited(half, edit)
    objective = Distilling(net(seed=3), net(seed=1))
    before = weights(objective)
    with pytest.raises(ValueError, match=f'^{name} in .*checkpoint.safetensors.* must be .*, but is'):
        go_on(half, objective)
    assert weights(objective) == before


@pytest.mark.parametrize('name, said', [
    ('objective.model.1.weight', 'objective in'), ('best.model.1.weight', 'best in'), ('losses.soft', 'losses in'),
    ('optimizer.99.momentum_buffer', 'the tensors in'), ('optimizer.x', 'the tensors in'),
    ('optimizer.0.momentum_buffer', 'the tensors in')])
def test_a_tensor_of_a_checkpoint_that_does_not_fit_is_refused_by_name(half, name, said):
    edited(half, lambda tensors, meta: tensors.update({name: torch.ones(2, 3)}))
    with pytest.raises(ValueError, match=f'^{said} .*checkpoint.safetensors.* must be .*, but is'):
        go_on(half)


@pytest.fixture
def half(tmp_path, interrupt):
    objective = Distilling(net(seed=3), net(seed=1))
    interrupt(objective, 25)
    with pytest.raises(KeyboardInterrupt):
        fit(objective, images(), replace(RECIPE, steps=40), images(), folder=tmp_path, save_every=0)
    assert Checkpoint(tmp_path).read()[1]['step'] == 24
    return tmp_path


def test_json_that_goes_too_deep_is_refused_by_name(half):
    tensors, meta = Checkpoint(half).read()
    deep = b'{"step": ' + b'[' * 100_000 + b']' * 100_000 + b'}'
    from safetensors.torch import save
    tensors['meta'] = torch.frombuffer(bytearray(deep), dtype=torch.uint8)
    (half/'checkpoint.safetensors').write_bytes(save(tensors, {'fingerprint': fingerprint(tensors)}))
    with pytest.raises(ValueError, match='checkpoint.safetensors.*levels'):
        go_on(half)


def test_the_losses_of_a_checkpoint_are_tensors_and_older_ones_that_are_text_are_continued(half):
    tensors, meta = Checkpoint(half).read()
    assert meta['history']['losses'] == {} and meta['losses'] == ['hard', 'soft']
    assert {k: tensors[f'losses.{k}'].shape for k in meta['losses']} == {'hard': (24,), 'soft': (24,)}
    def as_text(tensors, meta):
        meta['history']['losses'] = {k: tensors.pop(f'losses.{k}').tolist() for k in meta.pop('losses')}
    kept = (half/'checkpoint.safetensors').read_bytes()
    h = go_on(half)
    (half/'checkpoint.safetensors').write_bytes(kept)
    edited(half, as_text)
    again = go_on(half)
    whole = go_on(None)
    assert h.losses == again.losses == whole.losses and list(h.losses) == ['hard', 'soft']


def test_a_second_run_in_a_folder_is_refused_while_the_first_goes_on(tmp_path):
    refused = []
    def log(row):
        try: fit(Supervised(net()), images(), RECIPE, folder=tmp_path, resume=True)
        except ValueError as error: refused.append(str(error))
    fit(Supervised(net()), images(), RECIPE, images(), folder=tmp_path, log=log)
    assert len(refused) == 10 and 'folder must be a folder that no other process uses' in refused[0]
    fit(Supervised(net()), images(), RECIPE, images(), folder=tmp_path, resume=True)
    assert sorted(os.listdir(tmp_path)) == ['checkpoint.safetensors', 'curve.csv']


NO_NAMES = ['', '.', '..', '../up', 'a/b', '/abs', 'a\\b', 'nul\0', 'x' * 256, 'ä' * 128, 3, None]


@pytest.mark.parametrize('name', NO_NAMES)
def test_a_name_that_is_no_folder_below_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match='^name must be '): Setup(folder=tmp_path).inside(name)


def test_names_of_contenders_are_folders(tmp_path):
    for name in ('kd, T=4', 'ä: 1', 'x' * 255, '.hidden', '...'):
        assert Setup(folder=tmp_path).inside(name).folder == tmp_path/name


# --- kill and resume, several processes

SCRIPT = '''
import sys, torch
from torch import nn
sys.path.insert(0, {tests!r})
from test_training import images, net, weights, Distilling, RECIPE
from dataclasses import replace
from distill_nb.training import fit
torch.set_num_threads(1)
class Slow(Distilling):
    pass
objective = Slow(net(dropout=0.2), net(seed=1))
recipe = replace(RECIPE, steps=500, optimizer={optimizer!r}, precision='float32')
h = fit(objective, images(600), recipe, images(), folder={folder!r}, resume=True, save_every=0, progress=False)
print(weights(objective), len(h.losses['soft']), sum(h.losses['soft']))
'''


@pytest.mark.parametrize('optimizer,kills', [('adamw', 1), pytest.param('adamw', 2, marks=pytest.mark.slow),
                                             pytest.param('sgd', 2, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_weights_of_the_uninterrupted_one(tmp_path, optimizer, kills):
    def start(folder):
        script = SCRIPT.format(tests=os.path.dirname(__file__), folder=str(folder), optimizer=optimizer)
        return subprocess.Popen([*python(), '-c', script], stdout=subprocess.PIPE, text=True)
    whole = start(tmp_path/'whole')
    killed_at = []
    for _ in range(kills):
        p, path = start(tmp_path/'killed'), tmp_path/'killed'/'checkpoint.safetensors'
        before = path.stat().st_mtime_ns if path.exists() else 0
        while p.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before): time.sleep(0.005)
        time.sleep(random.uniform(0, 0.1))
        p.send_signal(signal.SIGKILL)
        p.communicate()
        killed_at.append(Checkpoint(path.parent).read()[1]['step'])
    resumed = start(tmp_path/'killed')
    assert resumed.communicate()[0] == whole.communicate()[0] != ''
    assert whole.returncode == resumed.returncode == 0 and min(killed_at) < 500


LAUNCHED = '''
import json, sys, torch
sys.path.insert(0, {tests!r})
from test_training import images, net, weighted, Distilling, RECIPE
from distill_nb.training import fit
from accelerate import PartialState
objective = Distilling(net(), net(seed=1))
h = fit(objective, {data}, RECIPE, images(), folder={folder!r}, device='cpu', progress=False)
state = PartialState()
if state.is_main_process: json.dump([state.num_processes, h.losses, h.last['accuracy']], open({out!r}, 'w'))
'''


@pytest.mark.parametrize('data', ['weighted(images())', pytest.param('images()', marks=pytest.mark.slow)])
def test_two_processes_reach_the_loss_curve_of_one(tmp_path, data):
    def curve(n):
        script, out = tmp_path/f'{n}.py', tmp_path/f'{n}.json'
        places = dict(tests=os.path.dirname(__file__), folder=str(tmp_path/f'run{n}'), out=str(out), data=data)
        script.write_text(LAUNCHED.format(**places))
        alone = [*python(), '-c', script.read_text()]
        launch = [*python(), '-m', 'accelerate.commands.accelerate_cli', 'launch', '--cpu', '--num_processes', '1',
                  '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', str(script)]
        # on a CPU `accelerate launch` starts one process, as on one of several machines;
        # these variables make n of them meet
        meet = {'OMP_NUM_THREADS': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(random.randint(20000, 60000)),
                'WORLD_SIZE': str(n)}
        def start(i):
            env = os.environ | (meet | {'RANK': str(i), 'LOCAL_RANK': str(i)} if n > 1 else {})
            pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            return subprocess.Popen(launch if n > 1 else alone, env=env, **pipes)
        started = [start(i) for i in range(n)]
        errors = [p.communicate()[1] for p in started]
        assert all(p.returncode == 0 for p in started), errors
        return json.loads(out.read_text())
    one, two = curve(1), curve(2)
    assert (one[0], two[0]) == (1, 2)
    for name in one[1]: assert two[1][name] == pytest.approx(one[1][name], rel=1e-4, abs=1e-6)
    assert two[2] == one[2]
