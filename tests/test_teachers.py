"A network becomes the teacher of these images: its normalisation is found, and its head is never silently new."
import math

import pytest, torch
import torch.nn.functional as F
from distill_nb.data import ImageData, Splits, digits
from distill_nb.files import save_weights
from distill_nb.exam import check_teacher
from distill_nb.models import digit_student
from distill_nb.teachers import (_shift, clearly_best, make_teacher, normalisation_table, plausible, try_normalisations,
                                 Tried)
from distill_nb.contract import Teacher
from distill_nb.training import Recipe, Supervised, evaluate, fit, predict
from distill_nb.zoo import build_model
from networks import bits, same
from torch import nn

RECIPE = Recipe(epochs=6, batch_size=64, optimizer='adamw', lr=0.03, weight_decay=0.01, precision='float32')
HALF = dict(mean=[0.5], std=[0.5])


@pytest.fixture(scope='module')
def data(): return digits()


@pytest.fixture(scope='module')
def trained(data):
    "A network that saw the digits from -1 to 1."
    torch.manual_seed(0)
    model = digit_student()
    fit(Supervised(model), data.train.replace(**HALF), RECIPE)
    return model


def tried(name, losses, shift=None): return Tried(name, [0.], [1.], 0.5, torch.as_tensor(losses).double(), shift)


# What is measured

def test_plausible_normalisations_fit_the_channels(data):
    colour = data.train.__class__(data.train.x.expand(-1, 3, -1, -1), data.train.y, data.train.classes)
    found = plausible(colour)
    assert list(found) == ['these data', 'ImageNet', '[0, 1]', '[-1, 1]']
    assert found['ImageNet'] == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert all(len(v) == 3 for pair in found.values() for v in pair)
    grey = plausible(data.train)['ImageNet']
    assert grey == ([pytest.approx(0.449, abs=1e-3)], [pytest.approx(0.226, abs=1e-3)])
    assert list(plausible(data.train.replace(**HALF))) == ['these data', 'ImageNet', '[0, 1]']


def test_the_distance_is_that_of_two_normal_distributions():
    "Against the integral of p log(p/q), in float64."
    norm = nn.BatchNorm2d(2, eps=0.)
    norm.running_mean.copy_(torch.tensor([0.3, -1.]))
    norm.running_var.copy_(torch.tensor([2., 0.5]))
    x = torch.randn(50, 2, 8, 8, generator=torch.Generator().manual_seed(0))*torch.tensor([1.5, 2.]).view(1, 2, 1, 1)
    expected, at = 0., torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    for c in range(2):
        values = x[:, c].double().flatten()
        p = torch.distributions.Normal(values.mean(), values.std())
        q = torch.distributions.Normal(norm.running_mean[c].double(), norm.running_var[c].double().sqrt())
        expected += torch.trapezoid(p.log_prob(at).exp()*(p.log_prob(at) - q.log_prob(at)), at).item()/2
    assert _shift(norm, x) == pytest.approx(expected, rel=1e-6)


def test_each_normalisation_is_measured_as_a_teacher_that_has_it(data, trained):
    before = bits(trained)
    found = {t.name: t for t in try_normalisations(Teacher(trained), data.valid)}
    assert same(bits(trained), before) and not any(m._forward_pre_hooks for m in trained.modules())
    for t in found.values():
        there = data.valid.replace(mean=t.mean, std=t.std)
        assert t.value == evaluate(trained, there).accuracy
        z = predict(trained, there).double()
        assert t.loss == pytest.approx(min(F.cross_entropy(z/T, there.y).item() for T in 2**torch.arange(-2, 7.5, 0.5)))
    own = found['[-1, 1]']
    assert own.shift < 0.03 < min(t.shift for t in found.values() if t is not own)
    assert clearly_best(list(found.values())) is own
    shown = str(normalisation_table(list(found.values()), data.valid.measures[0]))
    assert all(n in shown for n in found) and 'first batch norm' in shown


def test_only_labelled_images_count(data, trained):
    few = data.valid.unlabelled(torch.arange(50))
    assert all(len(t.losses) == 50 for t in try_normalisations(Teacher(trained), few))
    with pytest.raises(ValueError, match='some with labels'):
        try_normalisations(Teacher(trained), data.valid.unlabelled(torch.arange(0)))


def test_at_most_so_many_images_are_asked_about(data, trained):
    assert {len(t.losses) for t in try_normalisations(Teacher(trained), data.valid, items=40)} == {40}


def test_a_network_without_batch_norm_has_no_distance(data):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    found = try_normalisations(Teacher(flat), data.valid)
    assert all(t.shift is None for t in found)
    assert 'batch norm' not in str(normalisation_table(found, data.valid.measures[0]))


# The rule

def test_the_rule():
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(40, generator=g)
    better, worse = noise, noise + 0.2 + 0.1*torch.rand(40, generator=g)
    a, b = tried('a', better), tried('b', worse)
    assert clearly_best([b, a]) is a
    assert clearly_best([a, tried('c', noise)]) is None, 'equal'
    assert clearly_best([a, tried('c', noise.flip(0))]) is None, 'only chance differs'
    assert clearly_best([tried('a', better[:5]), tried('b', worse[:5])]) is None, 'too few'
    outlier = worse.clone()
    outlier[0] = 1e6
    assert clearly_best([a, tried('b', outlier)]) is a, 'one image with an enormous loss hides nothing'
    known = tried('known', worse, 0.02)
    assert clearly_best([tried('a', better, 0.5), known]) is known, 'what it remembers goes first'
    assert clearly_best([known, tried('a', better, 0.01)]).name == 'a', 'both are near: the labels decide'
    assert clearly_best([tried('a', better, 0.5), tried('b', worse, 0.4)]).name == 'a', 'none is near'


# make_teacher

def saved(model, path, **facts):
    torch.save({'state_dict': model.state_dict()}, path)
    return str(path)


def test_a_file_without_a_normalisation_gets_the_one_that_was_measured(data, trained, tmp_path, capsys):
    path = saved(trained, tmp_path/'best.pth')
    teacher, known = make_teacher('digit_student', path, data)
    said = capsys.readouterr().out
    assert known and (teacher.mean, teacher.std) == ([0.5], [0.5])
    assert 'nobody wrote down' in said and 'clearly the best' in said and 'first batch norm' in said
    assert 'names no classes' in said
    assert evaluate(teacher, data.valid) == evaluate(trained, data.valid.replace(**HALF))


def test_what_is_given_or_written_is_not_measured(data, trained, tmp_path, capsys):
    path = saved(trained, tmp_path/'best.pth')
    teacher, _ = make_teacher('digit_student', path, data, [0.1], [0.2])
    assert (teacher.mean, teacher.std) == ([0.1], [0.2])
    save_weights(trained, tmp_path/'w.safetensors', mean=[0.3], std=[0.4])
    teacher, _ = make_teacher('digit_student', str(tmp_path/'w.safetensors'), data)
    assert (teacher.mean, teacher.std) == ([0.3], [0.4])
    teacher, _ = make_teacher('digit_student', str(tmp_path/'w.safetensors'), data, [0.1], [0.2])
    assert (teacher.mean, teacher.std) == ([0.1], [0.2]), 'what is given goes first'
    said = capsys.readouterr().out
    assert 'mean 0.1, std 0.2, as you say' in said and 'nobody wrote down' not in said


def flat(tmp_path):
    "A network without batch norm, in a file of its own."
    (tmp_path/'my.py').write_text('from torch import nn\n'
                                  'def flat(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n')
    return f"{tmp_path/'my.py'}:flat"


def test_where_nothing_is_clear_it_is_asked_for(data, tmp_path, capsys):
    "Nine images can show nothing at p < 0.001."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    fit(Supervised(model), data.train, RECIPE)
    few, path = data._replace(valid=data.valid.unlabelled(torch.arange(9))), saved(model, tmp_path/'best.pth')
    with pytest.raises(ValueError, match='not clear from the table above.*--mean and --std'):
        make_teacher(flat(tmp_path), path, few)
    assert '[-1, 1]' in capsys.readouterr().out
    assert make_teacher(flat(tmp_path), path, data)[0].mean == data.train.mean


def test_a_network_that_guesses_is_left_to_the_exam(data, tmp_path, capsys):
    "The table is shown, and the exam says what is wrong."
    torch.manual_seed(0)
    path = saved(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), tmp_path/'best.pth')
    teacher, _ = make_teacher(flat(tmp_path), path, data)
    assert teacher.mean is None and '[-1, 1]' in capsys.readouterr().out
    with pytest.raises(ValueError, match='no better than chance'): check_teacher(teacher, data.valid)


def test_a_damaged_network_is_named(data, tmp_path):
    model = digit_student()
    nn.init.constant_(model.fc.weight, math.nan)
    with pytest.raises(ValueError, match='the teacher gives logits that are not finite'):
        make_teacher('digit_student', saved(model, tmp_path/'best.pth'), data)


def test_a_network_that_knows_nothing_is_trained_if_asked(data, trained, tmp_path, capsys):
    torch.manual_seed(1)
    new = digit_student()
    teacher, known = make_teacher('digit_student', saved(new, tmp_path/'new.pth'), data, fine_tune=True)
    assert not known and 'trained on the labels first' in capsys.readouterr().out
    assert same(bits(teacher.model)[0], bits(new)[0])
    teacher, known = make_teacher('digit_student', saved(trained, tmp_path/'best.pth'), data, fine_tune=True)
    assert known and teacher.mean == [0.5]


def test_a_network_that_remembers_other_images_is_taken_with_a_warning(data, trained, tmp_path, capsys):
    torch.manual_seed(0)
    model = digit_student()
    fit(Supervised(model), data.train.replace(mean=[0.1307], std=[0.3081]), RECIPE)
    make_teacher('digit_student', saved(model, tmp_path/'best.pth'), data)
    assert 'saw images of another mean and deviation' in capsys.readouterr().out
    make_teacher('digit_student', saved(trained, tmp_path/'own.pth'), data)
    assert 'saw images of another mean and deviation' not in capsys.readouterr().out


def test_random_weights_are_trained_and_nothing_is_said(data, capsys):
    torch.manual_seed(0)
    teacher, known = make_teacher('digit_student', 'none', data)
    torch.manual_seed(0)
    assert not known and teacher.mean is None
    assert same(bits(teacher.model), bits(build_model('digit_student', 10, 1, 8)))
    assert capsys.readouterr().out == ''


def test_a_checkpoint_for_other_classes_gets_a_new_head_only_if_asked(data, trained, tmp_path, capsys):
    torch.manual_seed(1)
    seven, path = digit_student(7), tmp_path/'w.safetensors'
    save_weights(seven, path, classes=[f'kind {i}' for i in range(7)], mean=[0.5], std=[0.5])
    with pytest.raises(ValueError, match="'kind 0'.*only the data have '0'.*fine_tune=True .--teacher_epochs"):
        make_teacher('digit_student', str(path), data)
    capsys.readouterr()
    teacher, known = make_teacher('digit_student', str(path), data, fine_tune=True)
    assert not known and 'head (fc) is new' in capsys.readouterr().out
    assert torch.equal(teacher.model.layer1[0].weight, seven.layer1[0].weight)
    assert len(teacher.model.fc.bias) == 10 and teacher.mean == [0.5] and teacher.classes is None
    plain = saved(seven, tmp_path/'best.pth')
    with pytest.raises(ValueError, match='fc.weight is 7x32 but must be 10x32.*fine_tune=True .--teacher_epochs'):
        make_teacher('digit_student', plain, data)
    assert make_teacher('digit_student', plain, data, fine_tune=True)[1] is False


def test_a_function_of_the_user_is_judged_by_its_answers(data, trained, tmp_path, capsys):
    torch.save(trained.state_dict(), tmp_path/'inside.pth')
    (tmp_path/'my.py').write_text(f'''
import torch
from distill_nb.exam import check_teacher
from distill_nb.models import digit_student
from distill_nb.contract import Teacher
def known():
    model = digit_student()
    model.load_state_dict(torch.load({str(tmp_path/'inside.pth')!r}))
    return model
def new(classes, channels): return digit_student(classes, channels)
def contract(): return Teacher(known(), mean=[0.5], std=[0.5], size=8)
''')
    file = tmp_path/'my.py'
    teacher, is_known = make_teacher(f'{file}:known', None, data)
    assert is_known and teacher.mean == [0.5] and 'nobody wrote down' in capsys.readouterr().out
    torch.manual_seed(0)
    teacher, is_known = make_teacher(f'{file}:new', None, data)
    assert not is_known and 'trained on the labels first' in capsys.readouterr().out
    teacher, is_known = make_teacher(f'{file}:contract', None, data)
    assert is_known and (teacher.mean, teacher.size) == ([0.5], 8) and 'nobody' not in capsys.readouterr().out


# The weights of a package: torchvision's, with those of the test in their place

@pytest.fixture
def hub(monkeypatch):
    "ImageNet weights of torchvision, without the network."
    def weights(name, which):
        torch.manual_seed(5)
        return build_model(f'torchvision:{name}', 1000, 3, 96).state_dict()
    monkeypatch.setattr('distill_nb.zoo.imagenet_weights', weights)


def photos(classes, size=96):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (12, 3, size, size), generator=g, dtype=torch.uint8)
    one = ImageData(x, torch.arange(12) % len(classes), classes, mean=[0.5]*3, std=[0.2]*3)
    return Splits(one, one, one)


def test_classes_that_a_package_knows_are_picked_by_name(hub, capsys):
    data = photos(['tench', 'ostrich', 'goldfish'])
    teacher, known = make_teacher('torchvision:squeezenet1_1', None, data)
    assert known and teacher.class_order(data.train) == [0, 9, 1] and teacher.crop == 224/256
    assert (teacher.mean, teacher.size) == ([0.485, 0.456, 0.406], 224)
    assert teacher.own(data.train).size == 224 and data.train.size == 96, 'for that network alone'
    assert 'used as it is' in capsys.readouterr().out


def test_for_other_classes_the_head_is_new_and_that_is_said(hub, capsys):
    data = photos(['mine', 'yours'])
    teacher, known = make_teacher('torchvision:squeezenet1_1', None, data)
    said = capsys.readouterr().out
    assert not known and 'the head (classifier.1) is new' in said and 'trained on the labels first' in said
    assert teacher.mean == [0.485, 0.456, 0.406] and teacher.crop == 1. and teacher.class_order(data.train) is None
    assert teacher(data.train.get(torch.arange(2)) if not teacher.check(data.train) else None).shape == (2, 2)


def test_small_images_start_from_nothing_unless_asked(hub, capsys):
    data = photos(['mine', 'yours'], 32)
    assert make_teacher('torchvision:squeezenet1_1', None, data)[0].mean is None
    assert make_teacher('torchvision:squeezenet1_1', 'imagenet', data)[0].mean == [0.485, 0.456, 0.406]


# What must not pass in silence

def test_half_a_normalisation_is_refused(data):
    for given in (dict(mean=[0.5]), dict(std=[3.])):
        with pytest.raises(ValueError, match='mean and std must be given together'):
            make_teacher('digit_student', 'none', data, **given)


def test_both_heads_of_a_distilled_network_are_new_and_other_misfits_are_named(tmp_path, capsys):
    name, path = 'timm:deit_tiny_distilled_patch16_224', tmp_path/'w.pth'
    torch.save(build_model(name, 7, 3, 224).state_dict(), path)
    teacher, known = make_teacher(name, str(path), photos(['mine', 'yours'], 32), fine_tune=True)
    said = capsys.readouterr().out
    assert not known and 'head (head) is new' in said and 'head (head_dist) is new' in said
    assert torch.equal(teacher.model.pos_embed, torch.load(path)['pos_embed'])
    torch.save(build_model(name, 7, 3, 48).state_dict(), path)
    with pytest.raises(ValueError, match='pos_embed.*images of 48 x 48') as e:
        make_teacher(name, str(path), photos(['mine', 'yours'], 32), fine_tune=True)
    assert 'head.weight' not in str(e.value)
