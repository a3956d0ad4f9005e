"""A network that learns from its own average over crops: views, losses, collapse, resuming, several processes."""
import itertools, math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from distill_nb import dino
from distill_nb.files import fingerprint
from distill_nb.views import CropFlip, ResizedCrop, mix
from distill_nb.data import ImageData
from distill_nb.models import digit_student
from distill_nb.vit import ViT
from distill_nb.history import Checkpoint
from distill_nb.training import DivergedError, Recipe, Supervised, evaluate, fit
from distill_nb.self_distillation import view_loss
from distill_nb.dino import CollapsedError, Dino, ProjectionHead, Projected, for_crops, local_crops, views_loss
from distill_nb.zoo import build_model
from processes import alone_and_together

RECIPE = Recipe(steps=8, batch_size=16, optimizer='adamw', lr=1e-3, precision='float32')
CLASSES = 3


def images(n=48, seed=0, side=8, channels=1, augment=ResizedCrop(8, (0.5, 1.), flip=False)):
    "Bright, middle and dark noise."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    x = torch.randint(0, 60, (n, channels, side, side), generator=g) + 80 * y.view(-1, 1, 1, 1)
    return ImageData(x.to(torch.uint8), y, ['dark', 'middle', 'bright'], augment=augment)


def vit(seed=0, **kw):
    torch.manual_seed(seed)
    return ViT(8, 2, 16, 2, 2, CLASSES, 1, **kw)


def small(data, student=None, **kw):
    "With a projection head of 8 outputs and two local crops."
    return Dino(student or vit(), data, **dict(outputs=8, local=2) | kw)


def weights(module): return fingerprint(module.state_dict())
def refused(said): return pytest.raises(ValueError, match=said)


# --- the loss, from the paper

def paper(student, teacher, centre, tps, tpt):
    "Algorithm 1 and eq. 3 in float64: the sum over pairs of different views, divided by their number."
    student, teacher = ([v.detach().double().numpy() for v in side] for side in (student, teacher))
    c, total, pairs = centre.double().numpy(), 0., 0
    def softmax(z):
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)
    for j, i in itertools.product(range(len(teacher)), range(len(student))):
        if i == j: continue
        t, s = softmax((teacher[j] - c) / tpt), softmax(student[i] / tps)
        total, pairs = total - (t * np.log(s)).sum(1).mean(), pairs + 1
    return total / pairs


@pytest.mark.parametrize('views', [(2, 2), (6, 2), (3, 1)])
def test_the_loss_is_that_of_the_paper_over_all_pairs_of_different_views(views):
    g = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(5, 7, generator=g) / 3 for _ in range(n)] for n in views)
    centre = torch.randn(7, generator=g) / 5
    for taus in ((0.1, 0.04), (1., 0.5)):
        found = views_loss(student, teacher, centre, *taus)
        assert found.item() == pytest.approx(paper(student, teacher, centre, *taus), rel=1e-5)


def test_a_view_is_never_compared_with_itself_and_its_teacher_gets_no_gradient():
    student, teacher = ([torch.randn(4, 3, requires_grad=True) for _ in range(2)] for _ in range(2))
    loss = views_loss(student, teacher, torch.zeros(3))
    loss.backward()
    assert all(v.grad is None for v in teacher) and all(z.grad.abs().sum() > 0 for z in student)
    changed = [student[0], student[1].detach() + 9 * torch.randn(4, 3)]
    one = views_loss(changed, [teacher[0]], torch.zeros(3))            # only the second against the first
    assert one.item() == pytest.approx(view_loss(changed[1], teacher[0], torch.zeros(3), 0.1, 0.04).item(), rel=1e-6)
    for wrong in (([student[0]], [teacher[0]]), (student, []), (student[:1] * 2, teacher + teacher)):
        with refused('number of views in student_outputs and teacher_outputs'): views_loss(*wrong, torch.zeros(3))


def test_outputs_of_minus_infinity_are_masked_and_rows_without_weight_do_not_count():
    z, v = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    v[:, :, 2] = -math.inf
    assert views_loss(list(z), list(v), torch.zeros(3)).isfinite()
    weight = torch.tensor([1., 0., 1., 0.])
    found = views_loss(list(z), list(v), torch.zeros(3), weight=weight)
    kept = views_loss([t[::2] for t in z], [t[::2] for t in v], torch.zeros(3))
    assert found.item() == pytest.approx(kept.item(), rel=1e-6)


# --- the projection head

def test_the_head_gives_cosines_and_stays_finite_in_16_bits():
    torch.manual_seed(0)
    head = ProjectionHead(6, 5, 16, 4)
    x = torch.randn(9, 6)
    h = head.mlp(x)
    cosines = torch.cosine_similarity(h[:, None], head.directions[None], dim=2)
    torch.testing.assert_close(head(x), cosines, atol=1e-5, rtol=0)
    for scale in (0., 1e-30, 1e4):
        z = head(scale * x)
        assert z.isfinite().all() and z.abs().max() <= 1 + 1e-5 and z.dtype == torch.float32
        head.zero_grad()
        z.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in head.parameters())
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast('cpu', dtype): z = head(x)
        assert z.dtype == torch.float32 and (z - head(x)).abs().max() < 0.05
        with torch.no_grad(): assert head.to(dtype)(1e3 * x.to(dtype)).isfinite().all()
        head.float()


def test_a_head_begins_as_that_of_the_paper():
    torch.manual_seed(0)
    linear = [layer for layer in ProjectionHead(64, 8).mlp if isinstance(layer, nn.Linear)]
    assert len(linear) == 3 and not any(layer.bias.any() for layer in linear)
    for layer in linear: assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_sizes_of_a_head():
    for wrong in (dict(outputs=1), dict(outputs=2.5), dict(hidden=0), dict(bottleneck=0), dict(inputs=0)):
        with refused(f'{next(iter(wrong))} must be'): ProjectionHead(**dict(inputs=4) | wrong)


def test_the_network_and_its_projection_come_of_one_pass():
    x = images().get(torch.arange(4)).x
    for model in (vit(), digit_student(CLASSES), vit(token=True)):
        width = model.head.in_features if hasattr(model, 'head') else model.fc.in_features
        both = Projected(model.eval(), ProjectionHead(width, 8))
        before = list(model.state_dict())
        output, projected = both._both(x)
        assert torch.equal(output, model(x)) and torch.equal(projected, both(x)) and projected.shape == (4, 8)
        assert list(model.state_dict()) == before and not any(m._forward_pre_hooks for m in model.modules())


# --- the objective

def test_crops_are_a_pure_function_of_image_and_view():
    data = images()
    objective, index = small(data), torch.arange(12)
    view = data.view_of(0, 3, index)
    def made(rows):
        batch = data.get(index[rows], view[rows])
        local = objective._local(batch).unflatten(0, (objective.local, -1))  # (local, B, 1, 4, 4)
        return objective._second(batch).x, local.transpose(0, 1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    whole, mixed = made(torch.arange(12)), made(order)
    pieces = [torch.cat(p) for p in zip(*(made(rows) for rows in torch.arange(12).split(5)))]
    for a, b, c in zip(whole, mixed, pieces): assert torch.equal(a, c) and torch.equal(a[order], b)
    second, local = whole
    assert local.shape == (12, 2, 1, 4, 4) and not torch.equal(local[:, 0], local[:, 1])
    assert (second != data.get(index, view).x).flatten(1).any(1).sum() > 8  # of 8×8 pixels two crops may be equal
    other = data.get(index, data.view_of(0, 4, index))
    assert not torch.equal(objective._local(other).unflatten(0, (2, -1)).transpose(0, 1), local)


@pytest.mark.parametrize('local', [0, 3])
def test_the_objective_is_the_loss_over_its_views(local):
    data = images().unlabelled(torch.arange(20))
    objective = small(data, local=local, weight=0.5, local_size=6, local_scale=(0.3, 0.5))
    batch = data.get(torch.arange(10, 26), torch.arange(16) + 7)
    with torch.no_grad(): objective.centre += torch.randn(8, generator=torch.Generator().manual_seed(0)) / 9
    losses = objective.eval()(batch)
    second = objective._second(batch).x
    crops = [batch.x, second]
    pieces = data.replace(augment=ResizedCrop(6, (0.3, 0.5), flip=False))
    for k in range(1, local + 1):
        crops.append(pieces.get(batch.index, mix(batch.index, batch.view, k) % data.n_views).x)
    project = lambda x: objective.projection(objective.model.tokens(x)[:, 0])
    expected = paper([project(x) for x in crops], [project(x) for x in crops[:2]], objective.centre, 0.1, 0.04)
    assert losses['self'].item() == pytest.approx(0.5 * expected, rel=1e-5)
    z, known = objective.model(batch.x), batch.y >= 0
    hard = nn.functional.cross_entropy(z[known], batch.y[known], reduction='sum') / len(z)
    assert list(losses) == ['hard', 'self'] and losses['hard'].item() == pytest.approx(hard.item(), rel=1e-5)


def test_the_teacher_moves_by_its_average_alone_network_and_head():
    data, student = images(), vit()
    objective = small(data, student, momentum=0.9).train()
    own = {id(p) for p in (*student.parameters(), *objective.projection.parameters())}
    assert {id(p) for p in objective.parameters() if p.requires_grad} == own
    names = {n for n, _ in objective.teacher.named_parameters()}
    assert {'model.model.head.weight', 'model.projection.directions', 'model.projection.mlp.0.weight'} <= names
    optimizer = RECIPE.make_optimizer(objective.parameters())
    expected = [p.clone() for p in objective.teacher.parameters()]
    for step in range(3):
        followed = [*objective.model.parameters(), *objective.projection.parameters()]
        expected = [torch.lerp(e, p.detach(), 1 - 0.9) for e, p in zip(expected, followed)]
        sum(objective(data.get(torch.arange(16), torch.arange(16) + step)).values()).backward()
        assert all(p.grad is None for p in objective.teacher.parameters())
        assert any(p.grad.abs().sum() > 0 for p in objective.projection.parameters())
        torch.testing.assert_close(list(objective.teacher.parameters()), expected)
        optimizer.step()
        optimizer.zero_grad()
    assert objective.centre.any() and {'centre', 'projection.directions'} <= set(objective.state_dict())
    assert sum('directions' in name for name in objective.state_dict()) == 2  # the student's and the teacher's
    before = weights(objective)
    objective.eval()(data.get(torch.arange(8)))
    evaluate(objective.model, data)
    assert weights(objective) == before


def test_the_centre_is_the_mean_of_what_the_teacher_said_of_both_global_crops():
    data = images()
    objective, batch = small(data, centre_momentum=0.75).train(), data.get(torch.arange(16), torch.arange(16) + 1)
    answers = torch.cat([objective.teacher(x) for x in (batch.x, objective._second(batch).x)])
    objective(batch)
    torch.testing.assert_close(objective.centre, answers.mean(0) / 4)


def test_the_centre_moves_after_it_is_subtracted_as_in_algorithm_1():
    data = images()
    batch = data.get(torch.arange(16), torch.arange(16) + 1)
    found = []
    for centre_momentum in (0., 1.):  # the loss of a step does not know what its own answers make of the centre
        torch.manual_seed(0)
        objective = small(data, local=0, centre_momentum=centre_momentum).train()
        found.append(objective(batch)['self'].item())
        assert objective.centre.any() == (centre_momentum == 0)
    assert found[0] == found[1]


def test_labels_are_learned_from_and_none_are_needed():
    data, none = images(), images().unlabelled([])
    histories = [fit(small(d), d, RECIPE, progress=False) for d in (data, none)]
    assert min(histories[0].losses['hard']) > 0 and set(histories[1].losses['hard']) == {0.}
    assert all(min(h.losses['self']) > 0 for h in histories)
    plain, taught = vit(), vit()
    fit(Supervised(plain), data, RECIPE, progress=False)
    fit(small(data, taught, weight=0.), data, RECIPE, progress=False)
    assert weights(plain) == weights(taught)  # weight 0 is plain training
    class_weights = torch.tensor([1., 2., 3.])
    batch = data.get(torch.arange(8))
    assert small(data, class_weights=class_weights)(batch)['hard'] != small(data)(batch)['hard']


class Killed(Exception): pass


@pytest.mark.parametrize('make', [vit, lambda: build_model('resnet8', CLASSES, 1, 8)])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, make):
    data = images().unlabelled(torch.arange(12))
    def objective():
        torch.manual_seed(0)
        return small(data, make(), momentum=0.9)
    whole, killed, resumed = (objective() for _ in range(3))
    kw = dict(save_every=0, progress=False)
    fit(whole, data, RECIPE, folder=tmp_path/'whole', **kw)
    forward, calls = killed.forward, itertools.count(1)
    def dying(batch):
        if next(calls) == 6: raise Killed
        return forward(batch)
    killed.forward = dying
    with pytest.raises(Killed): fit(killed, data, RECIPE, folder=tmp_path/'killed', **kw)
    assert 0 < Checkpoint(tmp_path/'killed').read()[1]['step'] < 6
    fit(resumed, data, RECIPE, folder=tmp_path/'killed', resume=True, **kw)
    assert weights(whole) == weights(resumed) and weights(whole.teacher.model.model) != weights(whole.model)
    for other in (dict(local=3), dict(local_size=2), dict(local_scale=(0.2, 0.4))):
        with refused('made from another objective'):
            torch.manual_seed(0)
            fit(small(data, make(), momentum=0.9, **other), data, RECIPE, folder=tmp_path/'whole', resume=True)


@pytest.mark.parametrize('make', [digit_student, lambda C: build_model('resnet8', C, 1, 8)])
def test_networks_of_convolutions_take_smaller_crops_too(make):
    data = images()
    row = fit(small(data, make(CLASSES)), data, replace(RECIPE, steps=2), images(12, 1), progress=False).last
    assert {'accuracy', 'valid_entropy', 'valid_told', 'valid_rank'} <= set(row)


# --- what is measured, and collapse

def test_entropies_and_rank_lie_between_their_bounds():
    data = images()
    objective = small(data)
    fit(objective, data, RECIPE, progress=False)
    found = objective.watch(images(20, 1))
    assert list(found) == ['entropy', 'told', 'rank']
    assert 0 <= found['told'] <= found['entropy'] + 1e-9 <= math.log(8) + 2e-9 and 1 <= found['rank'] <= 16
    before = weights(objective)
    assert objective.watch(images(20, 1)) == found and weights(objective) == before


def test_what_is_measured_first_depends_on_the_labels():
    data, none = images(), images().unlabelled([])
    for train, valid, name in ((data, images(12, 1), 'accuracy'), (none, images(12, 1), 'knn'),
                               (none, images(12, 1).unlabelled([]), 'rank')):
        history = fit(small(train), train, replace(RECIPE, steps=2, keep='best'), valid, progress=False)
        assert history.measure.name == name and history.best[name] == max(r[name] for r in history.rows)
    with refused('valid must have a label'): fit(small(data), data, RECIPE, images(12, 1).unlabelled([]))


@pytest.mark.parametrize('settings, kind', [
    (dict(centre_momentum=1., weight=1.), 'all images get one answer.*smaller centre_momentum .now 1.'),
    (dict(teacher_temperature=100.), 'no image gets an answer of its own.*smaller teacher_temperature .now 100')])
def test_a_collapse_is_stopped_with_a_sentence(settings, kind):
    data, valid = images().unlabelled([]), images(12, 1)
    objective = small(data, **settings)
    if 'centre_momentum' in settings:  # one direction is the answer to everything
        with torch.no_grad(): objective.teacher.model.projection.directions.copy_(torch.eye(8, 64))
        objective.teacher.forward = lambda x: torch.eye(8)[0].expand(len(x), 8)
    for _ in range(9): objective.measure(valid)
    with pytest.raises(CollapsedError, match=f'10 measurements in a row.*{kind}'): objective.measure(valid)


def test_a_collapse_is_a_divergence_and_does_not_stop_a_run_that_has_labels():
    assert issubclass(CollapsedError, DivergedError)  # a search of settings goes on with the next one
    objective, valid = small(images(), teacher_temperature=100.), images(12, 1)
    assert objective.watch(valid)['told'] < 0.01 * math.log(8)
    for _ in range(12): assert 'accuracy' in objective.measure(valid)


def test_answers_that_tell_something_again_are_forgiven():
    objective, quiet = small(images()), dict(entropy=2., told=0., rank=1.)
    for told in (0., 0., 1.): objective._refuse_collapse(quiet | {'told': told})
    assert objective.silent == 0
    for _ in range(9): objective._refuse_collapse(quiet)
    assert objective.silent == 9 and 'silent' in objective.state_dict()
    with pytest.raises(CollapsedError): objective._refuse_collapse(quiet)


def test_entropies_by_hand():
    for p, expected in (([[1., 0.], [0., 1.]], (0, math.log(2))), ([[1., 0.], [1., 0.]], (0, 0)),
                        ([[.5, .5], [.5, .5]], (math.log(2), math.log(2)))):
        assert dino.answer_entropies(torch.tensor(p)) == pytest.approx(expected)


# --- the door

def test_data_become_crops_and_are_mirrored_only_where_they_were():
    for augment, flip in ((CropFlip(1), False), (CropFlip(1, True), True)):
        data = for_crops(images(augment=augment), (0.3, 1.))
        assert data.augment == ResizedCrop(8, (0.3, 1.), flip=flip) and data.size == 8 and data.n_views > 10**9
        assert torch.equal(data.get([3]).x, images().get([3]).x)
    data = images()
    assert for_crops(data) is data
    few = images(augment=CropFlip(1)).replace(views=2)
    assert for_crops(few).n_views > 10**9
    framed = for_crops(images(side=10, augment=CropFlip()).replace(size=8, crop=0.8))
    assert framed.augment.size == 10 and framed.get([0], [5]).x.shape[-1] == 8
    pieces = local_crops(framed, 4, (0.1, 0.3))
    assert pieces.get([0], [5]).x.shape[-1] == 4 and pieces.augment.scale == (0.1, 0.3) and not pieces.augment.flip
    with refused('data must be'): for_crops([1, 2])


@pytest.mark.parametrize('bad, said', [
    (dict(outputs=1), 'outputs must be'), (dict(outputs=2.5), 'outputs must be'), (dict(local=-1), 'local must be'),
    (dict(local_size=9), 'local_size must be'), (dict(local_size=0), 'local_size must be'),
    (dict(momentum=1.), 'momentum must be'), (dict(momentum=-0.1), 'momentum must be'),
    (dict(centre_momentum=1.1), 'centre_momentum must be'),
    (dict(teacher_temperature=0.), 'teacher_temperature must be'),
    (dict(student_temperature=-1.), 'student_temperature must be'), (dict(weight=-1.), 'weight must be'),
    (dict(local_scale=(0.5, 0.2)), 'local_scale must be')])
def test_settings_that_cannot_work(bad, said):
    with refused(said): small(images(), **bad)


def test_data_and_networks_that_cannot_work():
    with refused(r'augment of data must be a ResizedCrop.*for_crops\(data\)'): small(images(augment=CropFlip(1)))
    with refused('number of images must be at least 2'): small(images().subset([0]).unlabelled([]))
    with refused('at least 2 views'): small(images().replace(views=1))
    with refused('no linear layer'): small(images(), nn.Sequential(nn.Flatten(), nn.ReLU()))
    for local_size in (3, 5, 1):
        objective = small(images(), local_size=local_size)
        with refused(f'local_size must be a side of images that the student takes .*is {local_size}'):
            fit(objective, images(), RECIPE)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))  # takes one size only
    with refused('local_size must be a side of images that the student takes'):
        fit(small(images(), flat), images(), RECIPE)
    fit(small(images(), flat, local=0), images(), replace(RECIPE, steps=1), progress=False)
    with refused('given to Dino.*another one'): fit(small(images(seed=1)), images(), RECIPE)


# --- several processes

RUN = """
from test_dino import RECIPE, fit, images, small

def run():
    data = images().unlabelled(torch.arange(20))
    torch.manual_seed(0)
    objective = small(data, momentum=0.8)
    valid = images(12, 1)
    history = fit(objective, data, replace(RECIPE, steps=4), valid, device='cpu', progress=False)
    average = torch.cat([p.flatten() for p in objective.teacher.parameters()])[::100].tolist()
    return history.losses, objective.centre.tolist(), average, history.last['valid_rank']
"""


def test_two_processes_follow_the_same_average_and_centre_as_one(tmp_path):
    one, two = alone_and_together(RUN, tmp_path)
    assert (one[0], two[0]) == (1, 2) and max(map(abs, one[2])) > 0
    for name in one[1]: assert two[1][name] == pytest.approx(one[1][name], rel=1e-3, abs=1e-5)
    for mine, other in zip(one[2:], two[2:]): assert other == pytest.approx(mine, rel=1e-3, abs=1e-5)
