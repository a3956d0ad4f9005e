"Embed: the loss against float64, what gets a gradient, what is kept, and runs that are killed."
import copy, math

import pytest
import torch
from torch import nn

from distill_nb.cache import CachedTeacher
from distill_nb.contract import Teacher
from distill_nb.data import digits
from distill_nb.embed import Embed, embedding_loss
from distill_nb.embeddings import Embedder, embed, embedding_teacher, headless
from distill_nb.files import save_weights
from distill_nb.models import digit_student
from distill_nb.training import Recipe, fit
from distill_nb.vit import ViT
from distill_nb.weights import read_checkpoint
from networks import bits, same
from small import RECIPE, images, net, write_folder

QUIET = dict(device='cpu', progress=False)


def pair(seed=0):
    torch.manual_seed(seed)
    return net(), embedding_teacher(nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)))


def batch(data, n=24): return data.get(torch.arange(n), torch.arange(n) % data.n_views)


def loss64(a, b, there=None):
    "1 - cos, written from the definition, in float64."
    rows = []
    for u, v in zip(a.double(), b.double()):
        rows.append(1 - (u * v).sum() / (u.square().sum().sqrt() * v.square().sum().sqrt()))
    rows = torch.stack(rows)
    return rows.mean() if there is None else rows[there].mean()


def test_the_loss_and_its_gradient_are_those_of_the_definition():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(9, 5, generator=g) for _ in range(2))
    there = torch.arange(9) % 3 > 0
    for kw, rows in ({}, None), ({'weight': there.float() / 2}, there):
        x, y = a.clone().requires_grad_(), a.double().requires_grad_()
        found, expected = embedding_loss(x, b, **kw), loss64(y, b, rows)
        found.backward(), expected.backward()
        assert found.item() == pytest.approx(expected.item(), abs=1e-6)
        assert torch.allclose(x.grad.double(), y.grad, atol=1e-6)
    assert embedding_loss(a, a).item() == pytest.approx(0, abs=1e-6)
    assert embedding_loss(a, -a).item() == pytest.approx(2, abs=1e-6)
    assert embedding_loss(a.double(), b).dtype == torch.float64
    assert embedding_loss(a.half(), b.half()).dtype == torch.float32


@pytest.mark.parametrize('factor', [1e-30, 1e-3, 7., 1e30])
def test_lengths_do_not_count(factor):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(9, 5, generator=g) for _ in range(2))
    expected = embedding_loss(a, b)
    assert torch.allclose(embedding_loss(a * factor, b), expected, atol=1e-6)
    assert torch.allclose(embedding_loss(a, b * factor), expected, atol=1e-6)


def test_extremes_are_finite():
    zero, a = torch.zeros(3, 4), torch.randn(3, 4)
    for x, y in (zero, a), (a, zero), (zero, zero), (a * 1e38, a), (torch.ones(1, 4), torch.ones(1, 4)):
        x = x.clone().requires_grad_()
        loss = embedding_loss(x, y)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all() and 0 <= loss <= 2 + 1e-6
    assert embedding_loss(zero, a).item() == 1
    assert embedding_loss(a, a, torch.zeros(3)).item() == 0
    with pytest.raises(ValueError, match='the same, .B, D.'): embedding_loss(a, a[:, :2])
    with pytest.raises(ValueError, match='at least one row'): embedding_loss(a[:0], a[:0])


@pytest.mark.parametrize('make', [net, lambda: ViT(4, 2, 8, 1, 2, 3, 1, token=True)])
def test_the_head_gets_no_gradient_and_the_teacher_none(make):
    (_, teacher), data = pair(), images(24)
    torch.manual_seed(0)
    student = make()
    objective = Embed(student, teacher)
    objective.check(data)
    before, names = bits(teacher.model), objective.heads
    objective.train()(batch(data))['embedding'].backward()
    for name, p in student.named_parameters():
        assert (p.grad is None) == any(name.startswith(f'{head}.') for head in names), name
    assert names and same(bits(teacher.model), before)
    assert not any('teacher' in k for k, _ in objective.named_parameters())
    assert objective.projection.weight.grad.any()
    unused = {f'model.{k}' for k, p in student.named_parameters() if p.grad is None}
    assert unused == {*objective._ddp_params_and_buffers_to_ignore}


def test_labels_are_not_looked_at():
    (student, teacher), data = pair(), images(40)
    found = []
    for some in data, data.unlabelled([]), data.replace():
        own = copy.deepcopy(student)
        torch.manual_seed(1)
        history = fit(Embed(own, teacher), some, RECIPE, some, **QUIET)
        assert history.measure.name == 'similarity' and 'similarity' in history.last
        assert set(history.losses) == {'embedding'}
        found.append(own.state_dict())
    assert same(dict(found[0]), dict(found[1])) and same(dict(found[0]), dict(found[2]))


def test_the_best_weights_are_kept_without_labels():
    (student, teacher), data = pair(), images(40).unlabelled([])
    recipe = Recipe(steps=12, batch_size=16, lr=2., warmup=0., precision='float32', keep='best', rows=6)
    objective = Embed(student, teacher)
    history = fit(objective, data, recipe, data, **QUIET)
    similar = [row['similarity'] for row in history.rows]
    assert objective.measure(data).similarity == pytest.approx(max(similar)) and len(similar) == 6


def test_the_similarity_is_the_mean_cosine_and_the_teacher_is_asked_once_in_a_run():
    (student, teacher), data, valid = pair(), images(40), images(30, 1)
    asked = []
    teacher.model.register_forward_hook(lambda module, args, out: asked.append(len(out)))
    kept = CachedTeacher(teacher, data)
    kept.fill(precision='float32', **QUIET)
    objective = Embed(student, kept)
    asked.clear()
    fit(objective, data, Recipe(steps=12, batch_size=16, lr=0.1, precision='float32', rows=6), valid, **QUIET)
    assert sum(asked) <= 30 + 2*2 + 6*16  # valid once, the checks, and no batch of the run beyond its first ones
    with torch.no_grad():
        own = objective.projection(headless(student).eval()(valid.get(torch.arange(30)).x))
        expected = 1 - loss64(own, embed(teacher, valid)).item()
        assert objective.measure(valid).similarity == pytest.approx(expected, abs=1e-5)


def test_embeddings_do_not_depend_on_the_projection_afterwards(tmp_path):
    (student, teacher), data = pair(), images(40)
    objective = Embed(student, teacher)
    fit(objective, data, RECIPE, **QUIET)
    e = embed(student, data)
    with torch.no_grad(): objective.projection.weight.normal_()
    assert torch.equal(embed(student, data), e)
    objective.projection = None
    assert torch.equal(embed(student, data), e) and torch.equal(embed(objective.model, data), e)
    save_weights(headless(student).model, tmp_path/'w.safetensors', outputs='embedding')
    stored = read_checkpoint(tmp_path/'w.safetensors').tables['']
    assert {*stored} == {k for k in student.state_dict() if not k.startswith('4.')}
    assert not any('projection' in k for k in student.state_dict())


def test_an_embedder_is_a_student_too_and_learns_the_same():
    (student, teacher), data = pair(), images(40)
    bare, found = headless(student), []
    for own in student, bare:
        torch.manual_seed(2)
        fit(Embed(own, teacher), data, RECIPE, **QUIET)
        found.append(embed(own, data))
    assert torch.allclose(*found, atol=1e-5) and not torch.allclose(found[0], embed(pair()[0], data), atol=1e-2)


def test_a_student_comes_close_to_its_teacher():
    (student, teacher), data = pair(), images(60)
    objective = Embed(student, teacher)
    objective.check(data)
    before = objective.measure(data).similarity
    fit(objective, data, Recipe(steps=60, batch_size=32, lr=0.1, precision='float32'), **QUIET)
    assert objective.measure(data).similarity > max(0.9, before + 0.1)


@pytest.mark.parametrize('cached', [False, True])
@pytest.mark.parametrize('stop', [1, 6, 11])
def test_a_killed_run_goes_on_to_the_same_weights(cached, stop, tmp_path, interrupt):
    def objective():
        student, teacher = pair()
        return Embed(student, CachedTeacher(teacher, images(40)) if cached else teacher)
    whole, data = objective(), images(40).unlabelled([])
    fit(whole, data, RECIPE, data, **QUIET)
    killed, how = objective(), QUIET | dict(folder=tmp_path, resume=True, save_every=0.)
    interrupt(killed, stop)
    with pytest.raises(KeyboardInterrupt): fit(killed, data, RECIPE, data, **how)
    again = objective()
    fit(again, data, RECIPE, data, **how)
    assert same(dict(again.state_dict()), dict(whole.state_dict())) and again.projection is not None


def test_a_teacher_may_want_other_images_than_the_student():
    train = digits().train.subset(range(40)).unlabelled([])
    torch.manual_seed(0)
    teacher = Teacher(Embedder(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())), mean=[0.5], std=[0.5], size=16,
                      outputs='embedding')
    objective = Embed(digit_student(), CachedTeacher(teacher, train))
    history = fit(objective, train, RECIPE, train, **QUIET)
    assert 0 < history.last['similarity'] <= 1 and objective.projection.weight.shape == (4, 32)


def test_images_on_disk_without_class_folders(tmp_path):
    from distill_nb.folders import read_folder
    data = read_folder(str(write_folder(tmp_path/'pictures', n=6))).splits.train.unlabelled([])
    torch.manual_seed(0)
    student, teacher = digit_student(2, 3), embedding_teacher(digit_student(2, 3))
    assert fit(Embed(student, teacher), data, RECIPE, data, **QUIET).last['similarity'] > 0


def test_what_can_not_teach_is_refused_before_the_first_step():
    (student, teacher), data = pair(), images(24)
    with pytest.raises(ValueError, match='weight must be'): Embed(student, teacher, -1.)
    with pytest.raises(ValueError, match=r'embedding_teacher\(teacher\)'): Embed(student, net())
    with pytest.raises(ValueError, match='student must be another network than the teacher'):
        Embed(student, Teacher(student, outputs='embedding')).check(data)
    spoilt = Embedder(nn.Flatten())
    spoilt.register_forward_hook(lambda module, args, out: out * math.nan)
    with pytest.raises(ValueError, match='embeddings that are not finite'):
        fit(Embed(student, Teacher(spoilt, outputs='embedding')), data, RECIPE, **QUIET)
    objective = Embed(student, teacher)
    objective.check(data)
    objective.teacher = Teacher(Embedder(nn.Flatten()), outputs='embedding')
    with pytest.raises(ValueError, match='the projection must be .*make a new Embed'): objective.check(data)
    with pytest.raises(ValueError, match='keep must be'):
        fit(Embed(student, teacher), data, Recipe(steps=2, batch_size=8, keep='best'), **QUIET)


def test_one_image_and_a_constant_teacher_are_defined():
    (student, teacher), one = pair(), images(12).subset([0])
    student = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3))
    assert math.isfinite(fit(Embed(student, teacher), one, Recipe(steps=2, batch_size=1, precision='float32'), one,
                             **QUIET).last['similarity'])
    zero = Embedder(nn.Flatten())
    zero.register_forward_hook(lambda module, args, out: 0 * out)
    constant, recipe = Teacher(zero, outputs='embedding'), Recipe(steps=2, batch_size=1, precision='float32')
    history = fit(Embed(student, constant), one, recipe, one, **QUIET)
    assert history.losses['embedding'] == [1, 1] and history.last['similarity'] == 0


def test_a_row_of_zeros_has_no_gradient_that_drowns_the_others():
    x = torch.zeros(2, 3, requires_grad=True)
    embedding_loss(x, torch.ones(2, 3)).backward()
    assert 0 < x.grad.abs().max() < 10


def test_a_compiled_student_learns_as_the_same_student_does():
    student, teacher = pair()
    plain, compiled = copy.deepcopy(student), torch.compile(copy.deepcopy(student), backend='eager')
    found = []
    for model in plain, compiled:
        torch.manual_seed(1)
        objective = Embed(model, teacher)
        fit(objective, images(40), RECIPE, **QUIET)
        found.append([p.detach() for p in objective.parameters()])
        ignored = objective._ddp_params_and_buffers_to_ignore
        assert len(ignored) == 2 and set(ignored) <= {n for n, _ in objective.named_parameters()}
    assert all(map(torch.equal, *found))
