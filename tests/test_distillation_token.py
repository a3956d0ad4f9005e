"""Two heads of a ViT: the losses of Touvron et al. 2021, and who learns from whom."""
import copy, math

import pytest
import torch
from torch import nn

from distill_nb.rows import UNLABELLED
from distill_nb.losses import top_k
from distill_nb.vit import ViT, with_token
from distill_nb.cache import CachedTeacher
from distill_nb.contract import Teacher
from distill_nb.training import Recipe, fit, predict
from distill_nb.logits import Distill
from distill_nb.distillation_token import DistillToken, hard_teacher_loss, token_attention

from networks import bits, same
from small import CLASSES, RECIPE, images, trained

BATCH = images().get(torch.arange(8))
RESULT = dict(progress=False, device='cpu')
FORMS = {'soft': dict(temperature=3., alpha=0.3), 'hard': dict(hard=True)}


def vit(seed=0, token=True, classes=CLASSES):
    torch.manual_seed(seed)
    return ViT(4, 2, 16, 2, 2, classes, 1, token)


def deit(seed=0):
    "The same in timm."
    deit = pytest.importorskip('timm.models.deit')
    torch.manual_seed(seed)
    return deit.VisionTransformerDistilled(img_size=4, patch_size=2, in_chans=1, num_classes=CLASSES, embed_dim=16,
                                           depth=2, num_heads=2)


@pytest.fixture(scope='module')
def teacher(): return trained()


@pytest.fixture(params=['ours', 'timm'])
def student(request): return vit() if request.param == 'ours' else deit()


def random(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def total(objective, batch=BATCH): return sum(objective(batch).values())


# --- the equations

def log_softmax64(z): return z.double() - z.double().exp().sum(-1, keepdim=True).log()


def deit_soft(z, z_dist, v, y, tau, lam):
    "(1 - λ) CE(ψ(Z_s), y) + λ τ² KL(ψ(Z_s/τ), ψ(Z_t/τ)), eq. 2, with the KL on the distillation head."
    ce = -sum(log_softmax64(z)[i, c] for i, c in enumerate(y)) / len(y)
    q, p = log_softmax64(z_dist / tau), log_softmax64(v / tau)
    return (1 - lam) * ce, lam * tau**2 * (p.exp() * (p - q)).sum() / len(y)


def deit_hard(z, z_dist, v, y):
    "½ CE(ψ(Z_s), y) + ½ CE(ψ(Z_s), y_t) with y_t = argmax Z_t, eq. 3, each with its own head."
    def ce(z, labels): return -sum(log_softmax64(z)[i, c] for i, c in enumerate(labels)) / len(labels)
    return ce(z, y) / 2, ce(z_dist, v.argmax(-1)) / 2


@pytest.mark.parametrize('form', FORMS)
def test_the_losses_are_those_of_the_paper(teacher, form):
    objective = DistillToken(vit(), teacher, **FORMS[form])
    z, z_dist = objective.model.train()(BATCH.x)
    v = teacher.eval()(BATCH.x)
    wanted = deit_hard(z, z_dist, v, BATCH.y) if form == 'hard' else deit_soft(z, z_dist, v, BATCH.y, 3., 0.3)
    found = objective(BATCH)
    assert list(found) == ['hard', 'soft']
    for value, reference in zip(found.values(), wanted): torch.testing.assert_close(value.double(), reference)


def test_alpha_weighs_the_hard_form_too(teacher):
    at = {a: DistillToken(vit(), teacher, hard=True, alpha=a)(BATCH) for a in (0.25, 0.5)}
    torch.testing.assert_close(at[0.25]['soft'] * 2, at[0.5]['soft'])
    torch.testing.assert_close(at[0.25]['hard'] / 1.5, at[0.5]['hard'])


@pytest.mark.parametrize('k', [1, 2, 5])
@pytest.mark.parametrize('kept_at', [1., 4.])
def test_a_decision_is_cross_entropy_with_the_argmax_also_of_kept_answers(k, kept_at):
    z, v = random(64, 6), random(64, 6, seed=1) / 10  # so flat that the bucket of the others holds most
    wanted = -log_softmax64(z)[range(64), v.argmax(-1)].mean()
    torch.testing.assert_close(hard_teacher_loss(z, v).double(), wanted)
    torch.testing.assert_close(hard_teacher_loss(z, top_k(v, k, kept_at)).double(), wanted)


def test_a_decision_counts_only_places_that_are_there():
    z, v, weight = random(6, 4), random(6, 4, seed=1), torch.tensor([1., 1, 0, 1, 0, 0])
    v[weight == 0] = math.nan
    torch.testing.assert_close(hard_teacher_loss(z, v, weight=weight), hard_teacher_loss(z[[0, 1, 3]], v[[0, 1, 3]]))


def test_a_decision_is_computed_in_float32_and_finite():
    z = torch.tensor([[3e38, -3e38, 0.]], requires_grad=True)
    loss = hard_teacher_loss(z, torch.tensor([[0., 1e30, -1e30]]))
    assert hard_teacher_loss(random(4, 3).bfloat16(), random(4, 3)).dtype == torch.float32
    loss.backward()
    assert loss.isfinite() or z.grad.isfinite().all()


# --- who learns from whom

@pytest.mark.parametrize('form', FORMS)
def test_in_the_last_layer_no_head_gets_gradient_from_the_others_loss(teacher, student, form):
    objective = DistillToken(student, teacher, **FORMS[form])
    own, other = {'hard': student.head, 'soft': student.head_dist}, {'hard': student.head_dist, 'soft': student.head}
    for name in ('hard', 'soft'):
        objective.zero_grad()
        objective(BATCH)[name].backward()
        assert own[name].weight.grad.abs().sum() > 0
        assert all(p.grad is None or not p.grad.any() for p in other[name].parameters())


@pytest.mark.parametrize('form', FORMS)
def test_images_without_a_label_teach_the_distillation_head_alone(teacher, form):
    objective = DistillToken(vit(), teacher, **FORMS[form])
    found = objective(BATCH._replace(y=torch.full_like(BATCH.y, UNLABELLED)))
    assert found['hard'] == 0 and found['soft'] == objective(BATCH)['soft'] > 0


def test_the_heads_answer_with_their_mean_when_the_network_is_used(teacher, student):
    fit(DistillToken(student, teacher), images(), RECIPE, **RESULT)
    found = {}
    for name in ('head', 'head_dist'):
        getattr(student, name).register_forward_hook(lambda m, i, out, name=name: found.update({name: out}))
    answer = predict(student, images().subset(torch.arange(8)))
    torch.testing.assert_close(answer, (found['head'] + found['head_dist']) / 2)


def test_of_two_heads_distill_makes_the_same_losses(teacher):
    "The soft form is what Distill makes of a network with two heads."
    a, b = DistillToken(vit(), teacher, 2., 0.4), Distill(vit(), teacher, 2., 0.4)
    assert a(BATCH) == b(BATCH)


# --- timm's networks

@pytest.mark.parametrize('form', FORMS)
def test_losses_and_gradients_are_ours_for_the_weights_of_timm(teacher, form):
    theirs, ours = deit(), vit(1)
    ours.load_state_dict(theirs.state_dict())
    a, b = (DistillToken(m, teacher, **FORMS[form]) for m in (ours, theirs))
    x, y = a(BATCH), b(BATCH)
    for name in x: torch.testing.assert_close(x[name], y[name])
    sum(x.values()).backward()
    sum(y.values()).backward()
    for (name, p), q in zip(sorted(ours.named_parameters()), (q for _, q in sorted(theirs.named_parameters()))):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize('before', [False, True])
def test_what_was_given_is_left_as_it_was(teacher, before):
    student = deit()
    student.set_distilled_training(before)
    state, known = bits(student), bits(teacher)
    objective = DistillToken(student, teacher)
    objective.check(images())
    objective(BATCH)
    assert student.distilled_training is before and same(bits(student), state) and same(bits(teacher), known)
    fit(objective, images(), RECIPE, **RESULT)
    assert student.distilled_training is before and same(bits(teacher), known)


def test_the_flag_is_restored_when_the_network_fails(teacher):
    student, seen = deit(), []
    def fail(module, given):
        seen.append(student.distilled_training)
        raise RuntimeError('broken')
    student.norm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match='broken'): DistillToken(student, teacher)(BATCH)
    assert seen == [True] and student.distilled_training is False


# --- kept answers, and runs that stop

@pytest.mark.parametrize('form, top', [('soft', None), ('hard', None), ('hard', 1), ('hard', 2), ('soft', 2)])
def test_kept_answers_teach_what_the_teacher_does(teacher, form, top):
    live, kept = vit(), vit()
    cached = CachedTeacher(teacher, images(), dtype='float32', top=top, temperature=3.)
    for model, asked in ((live, teacher), (kept, cached)):
        fit(DistillToken(model, asked, **FORMS[form]), images(), RECIPE, **RESULT)
    if top is None: assert same(live.state_dict(), kept.state_dict())
    pairs = zip(live.parameters(), kept.parameters())
    assert all(torch.allclose(p, q, atol=1e-5 if form == 'hard' else 0.05) for p, q in pairs)


def test_the_largest_logits_kept_for_another_temperature_serve_decisions_only(teacher):
    cached = CachedTeacher(teacher, images(), top=2, temperature=3.)
    with pytest.raises(ValueError, match='temperature must be 3'):
        DistillToken(vit(), cached, temperature=1.).check(images())
    DistillToken(vit(), cached, hard=True).check(images())


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('make', [vit, deit])
def test_a_run_that_was_killed_ends_with_the_same_weights(teacher, tmp_path, interrupt, make, form):
    cached = CachedTeacher(teacher, images(), tmp_path/'kept')
    whole, killed, resumed = (DistillToken(make(), cached, **FORMS[form]) for _ in range(3))
    fit(whole, images(), RECIPE, **RESULT)
    calls = interrupt(killed, 7)
    where = dict(folder=tmp_path/'run', save_every=0., **RESULT)
    with pytest.raises(KeyboardInterrupt): fit(killed, images(), RECIPE, **where)
    assert len(calls) == 7
    calls = interrupt(resumed, 10**6)
    fit(resumed, images(), RECIPE, resume=True, **where)
    assert len(calls) < RECIPE.steps and same(whole.model.state_dict(), resumed.model.state_dict())


# --- at the door

def test_a_student_without_a_token_is_told_how_to_get_one(teacher):
    needs = r'student must be a ViT with a distillation token: with_token\(vit\) adds one'
    with pytest.raises(ValueError, match=needs):
        DistillToken(vit(token=False), teacher)
    DistillToken(with_token(vit(token=False)), teacher).check(images())


class OneAnswer(nn.Module):
    "Has a second head that it does not use."
    def __init__(self):
        super().__init__()
        self.net, self.head_dist = trained(), nn.Identity()

    def forward(self, x): return self.net(x)


def test_a_second_head_that_gives_no_answer_is_named(teacher):
    with pytest.raises(ValueError, match='student must be a network that gives two answers'):
        DistillToken(OneAnswer(), teacher).check(images())


@pytest.mark.parametrize('alpha', [0, 1, 1.5, -0.1, 'half', math.nan])
def test_a_head_that_would_learn_nothing_is_refused(teacher, alpha):
    with pytest.raises(ValueError, match='alpha must be'): DistillToken(vit(), teacher, alpha=alpha)


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(ValueError, match='the teacher gives outputs of shape .* but there are 3 classes'):
        DistillToken(vit(), vit(token=False, classes=5), examine=False).check(images())
    with pytest.raises(ValueError, match='the student gives outputs of shape .* but there are 3 classes'):
        DistillToken(vit(classes=4), trained()).check(images())


def test_a_teacher_of_embeddings_is_refused():
    with pytest.raises(ValueError, match='outputs|embedding'):
        DistillToken(vit(), Teacher(trained(), outputs='embedding')).check(images())


def test_a_teacher_that_knows_nothing_is_refused():
    with pytest.raises(ValueError, match='never trained'):
        DistillToken(vit(), vit(3, token=False)).check(images())


def test_one_image_is_no_obstacle(teacher):
    one = images().subset(torch.tensor([0]))
    objective = DistillToken(vit(), teacher, examine=False)
    fit(objective, one, Recipe(steps=2, batch_size=1, precision='float32'), **RESULT)
    assert all(p.isfinite().all() for p in objective.parameters())
    assert token_attention(objective.model, one.get(torch.tensor([0])).x).shape == (1, 2, 2, 2)


# --- attention

def attention64(model, x):
    "Softmax(QKᵀ/√d) of the last block, step by step in float64, the mean over the heads: (B, N, N)."
    model = copy.deepcopy(model).double().eval()
    found = []
    model.blocks[-1].norm1.register_forward_hook(lambda m, i, out: found.append(out))
    with torch.no_grad(): model(x.double())
    attn, h = model.blocks[-1].attn, model.blocks[-1].attn.num_heads
    q, k, _ = attn.qkv(found[0]).chunk(3, -1)
    d, maps = q.shape[-1] // h, []
    for i in range(h):
        part = slice(i*d, (i + 1)*d)
        maps.append(torch.softmax(q[..., part] @ k[..., part].mT / d**0.5, -1))
    return sum(maps) / h


def test_attention_is_that_of_the_last_block(student):
    x, state = BATCH.x, bits(student)
    found, wanted = token_attention(student, x), attention64(student, x)
    assert found.shape == (8, 2, 2, 2) and same(bits(student), state)
    torch.testing.assert_close(found.double(), wanted[:, :2, 2:].unflatten(-1, (2, 2)), rtol=1e-4, atol=1e-6)
    assert not student.blocks[-1].attn.qkv._forward_hooks


def test_attention_of_a_vit_without_token_and_of_images_that_are_not_square():
    assert token_attention(vit(token=False), BATCH.x).shape == (8, 1, 2, 2)
    assert token_attention(vit(), random(3, 1, 4, 6)).shape == (3, 2, 2, 3)


def test_attention_of_what_has_none_is_a_sentence(teacher):
    with pytest.raises(ValueError, match='model must be a ViT'): token_attention(teacher, BATCH.x)
    with pytest.raises(ValueError, match='x must be images|shape of x'): token_attention(vit(), BATCH.x[0])
