"""A student of language learns what it is told at each token, whichever way its teacher answers."""
import copy, math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill_nb.cache import CachedTeacher
from distill_nb.contract import Teacher
from distill_nb.gpt import GPT
from distill_nb.language import DIVERGENCES, DistillLM, LanguageModelling, samples_cost
from distill_nb.logits import Distill
from distill_nb.successors import jsd_loss, reverse_kl_loss
from distill_nb.text import Document, TextData, row_of
from distill_nb.training import Recipe, Supervised, fit
from distill_nb.vocabulary import ByteTokenizer, train_bpe

BYTES, LENGTH = ByteTokenizer(), 12
WORDS = 'the cat sat on the mat and the dog sat on the log. ' * 12


def text(views=1, words=WORDS): return TextData(row_of([Document('a', words)], BYTES), BYTES, LENGTH, views)
def gpt(seed=0, width=16, layers=1):
    torch.manual_seed(seed)
    return GPT(len(BYTES), LENGTH, width, layers, 2)


@pytest.fixture(scope='module')
def teacher():
    "One that knows the text by heart."
    model = gpt(1, 32)
    fit(LanguageModelling(model), text(4), Recipe(steps=60, batch_size=16, optimizer='adamw', lr=0.02,
                                                  precision='float32'), progress=False)
    return model


class Whole(nn.Module):
    "The same model without the parts that the loss in chunks asks for."
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x): return self.inner(x)


def gradients(objective, batch):
    losses = objective(batch)
    sum(losses.values()).backward()
    return losses, {k.removeprefix('inner.'): p.grad.clone() for k, p in objective.model.named_parameters()}


@pytest.mark.parametrize('divergence', DIVERGENCES)
@pytest.mark.parametrize('asked', ['live', 'whole teacher', 'kept', 'top'])
def test_the_loss_is_that_of_whole_logits(teacher, divergence, asked):
    "In chunks or not, and however the teacher answers, but for what is not kept of its answers."
    data, f = text(), DIVERGENCES[divergence]
    batch = data.get([0, 3, len(data) - 1])  # the last window has places that are not there
    assert (batch.weight == 0).any()
    one = {'live': teacher, 'whole teacher': Whole(teacher), 'kept': CachedTeacher(teacher, data, dtype='float32'),
           'top': CachedTeacher(teacher, data, dtype='float32', top=256, temperature=1.)}[asked]
    found, own = gradients(DistillLM(gpt(), one, alpha=0.7, divergence=f), batch)
    plain, whole = gradients(Distill(Whole(gpt()), teacher, 1., 0.7, f), batch)
    for name in plain: torch.testing.assert_close(found[name], plain[name], rtol=2e-5, atol=1e-7)
    for name in whole: torch.testing.assert_close(own[name], whole[name], rtol=1e-4, atol=2e-6)


def test_the_hard_loss_is_the_cross_entropy_of_the_next_token():
    data, model = text(), gpt()
    batch = data.get(list(range(len(data))))
    z = model.double()(batch.x)
    nats = F.cross_entropy(z.flatten(0, 1), batch.y.flatten(), reduction='none').view_as(batch.y)
    rows = (nats * batch.weight).sum(1) / batch.weight.sum(1)  # a window's places, then the windows
    assert LanguageModelling(model)(batch)['hard'].item() == pytest.approx(rows.mean().item(), rel=1e-6)
    without = LanguageModelling(Whole(model))(batch)['hard'].item()
    assert without == pytest.approx(rows.mean().item(), rel=1e-6)


@pytest.mark.parametrize('make', [LanguageModelling, 'taught'])
def test_pieces_of_unequal_lengths_are_one_batch(teacher, make):
    data = text(words=WORDS[:LENGTH*7 + 5])  # eight windows, of which one has five tokens
    ends = []
    for pieces in (1, 4):
        model = gpt()
        objective = DistillLM(model, teacher, examine=False) if make == 'taught' else make(model)
        recipe = Recipe(steps=3, batch_size=8, accumulate=pieces, precision='float32', lr=0.1)
        fit(objective, data, recipe, progress=False)
        ends.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


def test_a_run_with_kept_answers_is_the_run_with_a_live_teacher(teacher):
    data, ends = text(3), []
    for one in (teacher, CachedTeacher(teacher, data, dtype='float32')):
        model = gpt()
        fit(DistillLM(model, one, examine=False), data, Recipe(steps=8, batch_size=8, precision='float32', lr=0.1),
            progress=False)
        ends.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_near_and_never_negative(teacher):
    batch = text().get([0, 1, 2])
    for f in DIVERGENCES.values():
        objective = DistillLM(gpt(1, 32), teacher, alpha=1., divergence=f)
        right = objective(batch)['soft'].item()
        with torch.autocast('cpu', torch.bfloat16): half = objective(batch)['soft'].item()
        assert half == pytest.approx(right, rel=0.02)
        objective = DistillLM(copy.deepcopy(teacher), teacher, alpha=1., divergence=f)
        with torch.autocast('cpu', torch.bfloat16): assert 0 <= objective(batch)['soft'].item() < 1e-3


def test_the_teacher_does_not_change_and_gets_no_gradient(teacher):
    before = copy.deepcopy(teacher.state_dict())
    teacher.train()
    try:
        fit(DistillLM(gpt(), teacher, examine=False), text(4), Recipe(steps=3, batch_size=8), progress=False)
        assert teacher.training
    finally: teacher.eval()
    assert all(p.grad is None or not p.grad.any() for p in teacher.parameters())
    for k, t in before.items(): assert torch.equal(t, teacher.state_dict()[k])


def test_a_teacher_with_clauses_is_asked_by_them(teacher):
    "One whose outputs must be read, or are probabilities, does not stop before its head."
    batch = text().get([0, 1])
    plain = DistillLM(gpt(), teacher)(batch)['soft'].item()
    probabilities = Teacher(nn.Sequential(teacher, nn.Softmax(-1)), outputs='probabilities')
    read = Teacher(teacher, read=lambda z: 2*z)
    assert DistillLM(gpt(), probabilities)(batch)['soft'].item() == pytest.approx(plain, rel=1e-3)
    doubled = Distill(gpt(), read, 1., 0.9)(batch)['soft'].item()
    assert DistillLM(gpt(), read)(batch)['soft'].item() == pytest.approx(doubled, rel=1e-5) != pytest.approx(plain)


RECIPE = Recipe(steps=1, batch_size=4, precision='float32')


@pytest.mark.parametrize('make,said', [
    (lambda: DistillLM(gpt(), gpt(5)), 'no better than what a guesser reaches'),
    (lambda: DistillLM(gpt(), spoilt()), 'not finite'),
    (lambda: DistillLM(gpt(), GPT(300, LENGTH, 16, 1, 2)), 'there are 257 classes'),
    (lambda: DistillLM(GPT(300, LENGTH, 16, 1, 2), gpt(1)), 'there are 257 classes'),
    (lambda: DistillLM(gpt(), of_another_vocabulary()), 'Sequence-level'),
    (lambda: DistillLM(GPT(257, LENGTH - 1, 16, 1, 2), gpt(1)), 'L from 1 to 11')])
def test_what_cannot_teach_is_refused_before_any_step(make, said):
    student = (objective := make()).model
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=said): fit(objective, text(4), RECIPE, text(), progress=False)
    for k, t in before.items(): assert torch.equal(t, student.state_dict()[k])


def spoilt():
    model = gpt(1)
    with torch.no_grad(): model.ln_f.weight[0] = math.nan
    return model


def of_another_vocabulary():
    model = gpt(1)
    model.tokenizer = train_bpe([WORDS], 257 + 5)
    return model


def test_samples_cost_what_an_independent_sum_says(teacher):
    "A bigram model whose next token does not depend on anything: its entropy, and the cross-entropy of another."
    p, q = torch.tensor([0.5, 0.25, 0.125, 0.125]), torch.tensor([0.25, 0.25, 0.25, 0.25])
    def constant(p):
        model = nn.Embedding(4, 4)
        with torch.no_grad(): model.weight.copy_(p.log())
        return model
    found = samples_cost(constant(p), constant(q), 0, texts=400, length=20)
    assert found['teacher_bits'] == pytest.approx(2, abs=1e-5)
    assert found['own_bits'] == pytest.approx(1.75, abs=0.05)
    same = samples_cost(teacher, teacher, BYTES.end, texts=8, length=8)
    assert same['teacher_bits'] == same['own_bits']
    assert same == samples_cost(teacher, teacher, BYTES.end, texts=8, length=8)
    assert same != samples_cost(teacher, teacher, BYTES.end, texts=8, length=8, seed=1)


def test_the_divergences_are_named_as_in_the_field():
    z, v = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)[:, None]
    p, q = v.exp(), z.exp()
    right = {'forward_kl': (p*(v - z)).sum(), 'reverse_kl': (q*(z - v)).sum(),
             'jsd': 0.5*(p*(v - ((p + q)/2).log())).sum() + 0.5*(q*(z - ((p + q)/2).log())).sum()}
    assert list(right) == list(DIVERGENCES)
    for name, f in DIVERGENCES.items(): torch.testing.assert_close(f(z, v, temperature=1.), right[name])
    assert DIVERGENCES['reverse_kl'] is reverse_kl_loss and DIVERGENCES['jsd'] is jsd_loss


def test_plain_objectives_take_text_as_well(teacher):
    batch = text().get([0, 1])
    torch.testing.assert_close(Supervised(gpt())(batch)['hard'], LanguageModelling(gpt())(batch)['hard'])
