"""Networks that give more than a tensor, as teachers and as students of every objective."""
import copy, warnings
from collections import OrderedDict, namedtuple
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import googlenet
from torchvision.models.googlenet import GoogLeNetOutputs
from torchvision.models.inception import InceptionOutputs

from distill_nb.losses import DistillationLoss, kd_loss
from distill_nb.data import ImageData
from distill_nb.contract import Teacher, logits_in
from distill_nb.students import Heads, check_student, heads
from distill_nb.training import Setup, Supervised, evaluate, fit, predict
from distill_nb.logits import Distill
from distill_nb.features import FeatureDistill, Hint
from distill_nb.self_distillation import Ensemble, MovingAverage, SelfTeacher
from distill_nb.exits import BeYourOwnTeacher, EarlyExits
from distill_nb.data_free import distill_without_data

from networks import bits, same
from small import CLASSES, RECIPE, images, net, trained

HOW = dict(progress=False, device='cpu')
Pair = namedtuple('Pair', 'logits more')


class Gives(nn.Module):
    "A network with several heads, and what it makes of their logits in training; `always`: not in training only."
    def __init__(self, make, n=1, always=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.make, self.always = net(), make, always
        self.others = nn.ModuleList(net() for _ in range(n - 1))

    def forward(self, x):
        z = [self.net(x), *(m(x) for m in self.others)]
        return self.make(*z) if self.training or self.always else z[0]


class TwoHeads(Gives):
    "As a distilled DeiT: both heads in training, their mean otherwise."
    def __init__(self, seed=0):
        super().__init__(lambda *z: z, 2, seed=seed)
        self.head_dist = nn.Identity()

    def forward(self, x): return super().forward(x) if self.training else (self.net(x) + self.others[0](x)) / 2


def google(): return Gives(lambda z, a, b: GoogLeNetOutputs(z, a, b), 3)
def inception(): return Gives(lambda z, a: InceptionOutputs(z, a), 2)


@pytest.fixture(scope='module')
def teacher(): return trained()


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


FORMS = {'tuple': lambda z: (z, 2*z), 'list': lambda z: [z], 'dict': lambda z: {'more': 2*z, 'logits': z},
         'named': lambda z: Pair(z, 2*z), 'object': lambda z: SimpleNamespace(logits=z, more=2*z),
         'nested': lambda z: ((z, 1), 2)}


@pytest.mark.parametrize('form', FORMS)
def test_logits_are_found_in_whatever_a_network_gives(teacher, form):
    model, data = Gives(FORMS[form], always=True), images()
    plain = model.net
    assert evaluate(model, data) == evaluate(plain, data) and torch.equal(predict(model, data), predict(plain, data))
    batch = data.get(torch.arange(8))
    assert torch.equal(Teacher(model)(batch), Teacher(plain)(batch))
    for wrapped in (Ensemble([model, model]), MovingAverage(model)):
        assert torch.allclose(wrapped.eval()(batch.x).softmax(1), plain.eval()(batch.x).softmax(1), atol=1e-6)


@pytest.mark.parametrize('odd', [{'boxes': torch.zeros(2, 3)}, (), ('a',), {1}, None, 3., SimpleNamespace(logits=None)])
def test_an_output_without_logits_is_refused_by_name(odd):
    said = f'the student gives a {type(odd).__name__}, in which no logits were found: it must give a tensor, a tuple'
    with pytest.raises(ValueError, match=said): logits_in(odd, 'the student')


def students():
    "Every objective, as a function of its student and a teacher."
    yield 'supervised', lambda s, t: Supervised(s)
    yield 'distil', Distill
    yield 'features', lambda s, t: FeatureDistill(s, t, {'hint': (Hint('net.3', '3'), 1.)})
    yield 'self', lambda s, t: SelfTeacher(s, images())


@pytest.mark.parametrize('objective', [pytest.param(make, id=name) for name, make in students()])
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('always', [False, True])
def test_every_objective_trains_a_student_by_its_logits_alone(teacher, objective, form, always):
    def run(make):
        model = Gives(make, always=always)
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            history = fit(objective(model, teacher), images(), RECIPE, images(seed=1), **HOW)
        return history.losses, model.net
    (losses, model), (plain, expected) = run(FORMS[form]), run(lambda z: z)
    assert losses == plain and same(bits(model), bits(expected))


@pytest.mark.parametrize('make, said', [
    (lambda z: (z, 2*z), r'gives a tuple, .*\(part 2\)'),
    (lambda z: {'logits': z, 'boxes': z + 1}, r'a dict, .*\(boxes\)'),
    (lambda z: Pair(z, (1, 2)), r'a Pair, .*\(more\)'), (lambda z: SimpleNamespace(logits=z, a=1, b=2), r'\(a, b\)')])
def test_what_is_left_out_is_named_in_one_line_before_the_run(teacher, make, said):
    for objective, name in ((Supervised, 'model'), (lambda s: Distill(s, teacher), 'student')):
        with pytest.warns(UserWarning, match=f'in training the {name} .*{said} is left out') as all_of:
            fit(objective(Gives(make)), images(), RECIPE, **HOW)
        assert len(all_of) == 1


class ModelOutput(OrderedDict): "As that of transformers: inner states lie beside the logits."


@pytest.mark.parametrize('make', [lambda z: {'logits': z}, lambda z: (z,), lambda z: Pair(z, None), lambda z: (z, z),
                                  lambda z: ModelOutput(logits=z, states=(1, 2))])
def test_where_nothing_is_left_out_nothing_is_said(make, quiet):
    fit(Supervised(Gives(make)), images(), RECIPE, **HOW)


@pytest.mark.parametrize('make, share, n', [(google, 0.3, 2), (inception, 0.4, 1)])
def test_auxiliary_heads_learn_with_their_authors_share(teacher, make, share, n, quiet):
    "Against cross-entropy and divergence in float64."
    model, batch = make().train(), images().get(torch.arange(16))
    z, *aux = (t.detach().double() for t in copy.deepcopy(model)(batch.x))
    assert len(aux) == n
    found = Supervised(copy.deepcopy(model))(batch)
    assert list(found) == ['hard', 'aux']
    assert found['hard'].item() == pytest.approx(F.cross_entropy(z, batch.y).item(), rel=1e-5)
    assert found['aux'].item() == pytest.approx(share * sum(F.cross_entropy(a, batch.y).item() for a in aux), rel=1e-5)

    T, alpha, v = 3., 0.6, teacher.eval()(batch.x).detach().double()
    def parts(z):
        logs, p = (z / T).log_softmax(1), (v / T).softmax(1)
        soft = (p * (p.log() - logs)).sum(1).mean().item()
        return (1 - alpha) * F.cross_entropy(z, batch.y).item(), alpha * T**2 * soft
    found = Distill(copy.deepcopy(model), teacher, T, alpha)(batch)
    assert list(found) == ['hard', 'soft', 'aux']
    assert [found['hard'].item(), found['soft'].item()] == pytest.approx(parts(z), rel=1e-4)
    assert found['aux'].item() == pytest.approx(share * sum(map(sum, map(parts, aux))), rel=1e-4)
    assert list(Distill(copy.deepcopy(model), teacher, T, alpha).eval()(batch)) == ['hard', 'soft']  # one head is used


def test_the_history_holds_the_auxiliary_losses_and_they_train_the_auxiliary_heads(teacher, quiet):
    for objective in (Supervised, lambda s: Distill(s, teacher), lambda s: SelfTeacher(s, images()),
                      lambda s: FeatureDistill(s, teacher, {'hint': (Hint('net.3', '3'), 1.)})):
        model = google()
        before = copy.deepcopy(model.others)
        history = fit(objective(model), images(), RECIPE, images(seed=1), **HOW)
        assert len(history.losses['aux']) == RECIPE.steps and 'aux' in history.last
        assert not any(torch.equal(p, q) for p, q in zip(before.parameters(), model.others.parameters()) if p.ndim > 1)


def test_torchvisions_googlenet_trains_with_and_without_its_auxiliary_heads(quiet):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (12, 3, 32, 32), generator=g).to(torch.uint8)
    data = ImageData(x, torch.arange(12) % 3, list('abc'))
    for aux in (True, False):
        torch.manual_seed(0)
        model = googlenet(num_classes=3, init_weights=False, aux_logits=aux)
        history = fit(Supervised(model), data, replace(RECIPE, steps=2, batch_size=4), data, **HOW)
        assert list(history.losses) == (['hard', 'aux'] if aux else ['hard'])


def test_the_second_head_learns_from_the_teacher_and_the_first_from_the_labels(teacher, quiet):
    model, batch = TwoHeads().train(), images().get(torch.arange(16))
    first, second = (t.detach() for t in copy.deepcopy(model)(batch.x))
    v, loss = teacher.eval()(batch.x).detach(), DistillationLoss(4., 0.9)
    def found(*how): return Distill(copy.deepcopy(model), teacher, *how)(batch)
    both = found(4., 0.9)
    assert both['hard'].item() == pytest.approx(loss.parts(first, v, batch.y)['hard'].item())
    assert both['soft'].item() == pytest.approx(loss.parts(second, v, batch.y)['soft'].item())
    mean = (first + second) / 2  # nobody tells the heads apart where there is one thing to learn
    assert found(4., 0.)['hard'].item() == pytest.approx(F.cross_entropy(mean, batch.y).item())
    assert found(4., 1.)['soft'].item() == pytest.approx(kd_loss(mean, v, 4.).item())
    alone = Supervised(copy.deepcopy(model))(batch)
    assert list(alone) == ['hard'] and alone['hard'].item() == pytest.approx(F.cross_entropy(mean, batch.y).item())
    grads = Distill(model, teacher)
    grads(batch)['soft'].backward()
    assert all(p.grad is None for p in model.net.parameters()) and model.others[0][-1].weight.grad.any()


def test_two_heads_are_taken_for_no_more_than_a_tuple_without_a_head_for_the_teacher():
    z = torch.zeros(2, 3), torch.ones(2, 3)
    assert heads(z, TwoHeads()).soft is z[1] and heads(z, net()).soft is None
    assert heads((*z, z[0]), TwoHeads()).soft is None
    assert heads(GoogLeNetOutputs(z[0], None, None), net()) == Heads(z[0], share=0.3)


def test_models_of_timm_and_transformers_teach_and_learn(quiet):
    import timm
    from transformers import ViTConfig, ViTForImageClassification
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (16, 3, 32, 32), generator=g).to(torch.uint8)
    data = ImageData(x, torch.arange(16) % 3, list('abc'))
    small = dict(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2, num_classes=3)
    deit = timm.create_model('deit_tiny_distilled_patch16_224', **small)
    deit.set_distilled_training(True)
    vit = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                              intermediate_size=16, image_size=32, patch_size=16, num_labels=3))
    before = deit.head.weight.clone(), deit.head_dist.weight.clone()
    recipe = replace(RECIPE, steps=3, batch_size=8)
    history = fit(Distill(deit, vit, examine=False), data, recipe, data, **HOW)
    assert all(v > 0 for name in ('hard', 'soft') for v in history.losses[name])
    assert not any(map(torch.equal, before, (deit.head.weight, deit.head_dist.weight)))
    fit(Distill(vit, timm.create_model('resnet10t', num_classes=3), examine=False), data, recipe, data, **HOW)
    fit(Supervised(deit), data, recipe, data, **HOW)


class Noisy(nn.Module):
    "Draws numbers, keeps averages, replaces a buffer, and has a part in eval mode."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5),
                                 nn.Linear(8, CLASSES))
        self.register_buffer('seen', torch.zeros(()))
        self.net[3].eval()

    def forward(self, x):
        if self.training: self.seen = self.seen + 1
        return self.net(x)


def test_the_trial_before_a_run_changes_nothing():
    model = Noisy()
    seen, before, random = model.seen, bits(model), torch.get_rng_state()
    check_student(model, images(), 'it')
    assert same(bits(model), before) and model.seen is seen and torch.equal(torch.get_rng_state(), random)
    tried, plain = Noisy(), Noisy()
    untried = Supervised(plain)
    untried.check = lambda data, valid: None
    torch.manual_seed(5)
    one = fit(Supervised(tried), images(), RECIPE, **HOW).losses
    torch.manual_seed(5)
    assert one == fit(untried, images(), RECIPE, **HOW).losses and same(bits(tried), bits(plain))


def test_what_cannot_learn_is_refused_before_the_first_step(teacher):
    def refused(make, said, n=1):
        for objective in (Supervised, lambda s: Distill(s, teacher), lambda s: SelfTeacher(s, images())):
            with pytest.raises(ValueError, match=said): fit(objective(Gives(make, n)), images(), RECIPE, **HOW)
    refused(lambda z: {'boxes': z}, 'gives a dict, in which no logits were found')
    refused(lambda z: (z[:, :2], z), r'the shape of what the \w+ gives in training must be \(2, 3\), as otherwise, but')
    refused(lambda z, a: InceptionOutputs(z, a[:, :2]), 'the shape of what', 2)
    refused(lambda z: z.view(-1, 7), r'in training the \w+ does not take inputs of shape \(1, 4, 4\): ')
    with pytest.raises(ValueError, match="a word other than 'hard', 'soft' and 'aux'"):
        FeatureDistill(net(), teacher, {'aux': (Hint('3', '3'), 1.)})


class Staged(nn.Module):
    "Two stages and a head, with an output of its own kind."
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.layer1, self.layer2, self.make = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), make
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x): return self.make(self.fc(self.layer2(self.layer1(x).relu()).mean((2, 3))))


def test_a_network_with_exits_may_have_an_output_of_its_own_kind():
    def run(make):
        torch.manual_seed(0)
        exits = EarlyExits(Staged(make), shape=(1, 4, 4))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            losses = fit(BeYourOwnTeacher(exits), images(), RECIPE, images(), **HOW).losses
        x = images().get(torch.arange(1)).x
        return losses, evaluate(exits, images()), evaluate(exits.at(1), images()), exits.until_sure(x, 1.)[0].tolist()
    assert run(lambda z: ModelOutput(logits=z)) == run(lambda z: z) == run(lambda z: (z, 0))
    with pytest.warns(UserWarning, match='in training the model gives a Pair'):
        fit(BeYourOwnTeacher(Staged(lambda z: Pair(z, 0)), shape=(1, 4, 4)), images(), RECIPE, **HOW)


@pytest.mark.parametrize('method, small', [
    ('generator', dict(noise=5, width=4, memory=64, replay=16)),
    ('inversion', dict(rounds=2, images=12, inversion=replace(RECIPE, steps=4)))])
def test_without_data_a_student_learns_by_its_logits_and_its_auxiliary_heads(teacher, method, small):
    judge = Teacher(teacher, size=4, mean=[0.4], std=[0.3])
    def run(model):
        torch.manual_seed(0)
        return distill_without_data(judge, model, method, RECIPE, channels=1, setup=Setup(**HOW),
                                    **small).history.losses
    plain = run(Gives(lambda z: z))
    with pytest.warns(UserWarning, match='in training the student gives a Pair'):
        assert run(Gives(lambda z: Pair(z, 2*z))) == plain
    assert run(Gives(lambda z: ModelOutput(logits=z), always=True)) == plain
    assert set(run(google())) == {*plain, 'aux'}
    with pytest.raises(ValueError, match='in which no logits were found'): run(Gives(lambda z: {'boxes': z}))
