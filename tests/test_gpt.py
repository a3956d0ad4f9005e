"GPT-2 for the same weights, no look ahead, tied weights, dropout, and how text is drawn."
import copy, math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill_nb.files import fingerprint, read_weights, save_weights
from distill_nb.gpt import (GPT, GPTS, CausalAttention, GPTBlock, MLP, Size, _drawn, build_gpt, generate,
                            with_dropout)
from distill_nb.students import check_classes
from distill_nb.training import Supervised
from distill_nb.text import Document, TextData, row_of
from distill_nb.vocabulary import ByteTokenizer

from pretended_gpu import pretended

V, L = 50, 12


def small(seed=0, dropout=0., heads=2, layers=2):
    "A model whose every tensor is far from its initial value."
    torch.manual_seed(seed)
    model = GPT(V, L, 16, layers, heads, dropout)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def tokens(B=3, n=L, seed=1): return torch.randint(V, (B, n), generator=torch.Generator().manual_seed(seed))


# Equal to GPT-2

def as_theirs(state):
    "Our weights under the names of transformers, whose linear layers hold inputs first."
    turned = {k: v.T if k.endswith('weight') and '.c_' in k else v for k, v in state.items()}
    return {'lm_head.weight' if k == 'head.weight' else f'transformer.{k}': v for k, v in turned.items()}


@pytest.mark.parametrize('heads,layers', [(1, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize('dtype,near', [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_gpt2_of_transformers_gives_the_same_logits_and_gradients(heads, layers, dtype, near):
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(vocab_size=V, n_positions=L, n_embd=16, n_layer=layers, n_head=heads,
                                     bos_token_id=0, eos_token_id=0)
    ours, theirs = small(heads=heads, layers=layers).to(dtype), transformers.GPT2LMHeadModel(config).eval().to(dtype)
    missing = theirs.load_state_dict(as_theirs(ours.state_dict()), strict=False)
    assert not missing.unexpected_keys and all('bias' in k for k in missing.missing_keys)  # masks of old versions
    for x in (tokens(), tokens(1, 1), tokens(2, 5)):
        assert torch.allclose(ours(x), theirs(x).logits, near, near)
    x = tokens(3, L)
    for model, z in ((ours, ours(x)), (theirs, theirs(x).logits)): F.cross_entropy(z[:, :-1].mT, x[:, 1:]).backward()
    found = dict(theirs.named_parameters())
    grads = as_theirs({k: p.grad for k, p in ours.named_parameters()})
    for k, g in grads.items(): assert torch.allclose(g, found[k].grad, 100*near, 10*near), k
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_the_whole_network_is_its_equations_in_float64():
    "Written out with masks, means and variances, without a module of torch."
    model = small().double()
    w, x = model.state_dict(), tokens()
    def norm(h, name):
        h = (h - h.mean(-1, keepdim=True))/(h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return h*w[f'{name}.weight'] + w[f'{name}.bias']
    def linear(h, name): return h @ w[f'{name}.weight'].T + w[f'{name}.bias']
    h = w['wte.weight'][x] + w['wpe.weight'][:L]
    for i in range(2):
        q, k, v = linear(norm(h, f'h.{i}.ln_1'), f'h.{i}.attn.c_attn').split(16, -1)
        parts = []
        for s in (slice(0, 8), slice(8, 16)):
            future = torch.full((L, L), -math.inf, dtype=torch.float64).triu(1)
            e = (q[..., s] @ k[..., s].mT/math.sqrt(8) + future).exp()
            parts.append(e/e.sum(-1, keepdim=True) @ v[..., s])
        h = h + linear(torch.cat(parts, -1), f'h.{i}.attn.c_proj')
        a = linear(norm(h, f'h.{i}.ln_2'), f'h.{i}.mlp.c_fc')
        gelu = 0.5*a*(1 + torch.tanh(math.sqrt(2/math.pi)*(a + 0.044715*a**3)))
        h = h + linear(gelu, f'h.{i}.mlp.c_proj')
    h = norm(h, 'ln_f')
    assert torch.allclose(model.hidden(x), h, atol=1e-10)
    assert torch.allclose(model(x), h @ w['wte.weight'].T, atol=1e-10)


# No look ahead

@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('place', [0, 1, 5, L - 1])
def test_a_token_moves_nothing_before_it(place, train):
    model, x = small().train(train), tokens()
    other = x.clone()
    other[:, place] = (other[:, place] + 1) % V
    a, b = model(x), model(other)
    assert torch.equal(a[:, :place], b[:, :place]) and ((a - b).abs().amax(-1)[:, place:] > 0).all()
    shorter = model(x[:, :place + 1])
    assert torch.allclose(shorter, a[:, :place + 1], atol=1e-5)


def test_gradients_of_a_place_reach_no_later_token():
    model, x = small(), tokens(1)
    h = model.wte(x).detach().requires_grad_()
    z = h + model.wpe.weight
    for block in model.h: z = block(z)
    z[0, 4].sum().backward()
    reached = h.grad[0].abs().amax(-1) > 0
    assert reached.tolist() == [True]*5 + [False]*(L - 5)


def test_rows_of_a_batch_do_not_see_each_other():
    model, x = small(), tokens(4)
    assert torch.allclose(model(x)[2], model(x[2:3])[0], atol=1e-6)


# Weights

def test_the_head_is_the_embedding_and_stays_it(tmp_path):
    model = small()
    assert model.head.weight is model.wte.weight and 'head.weight' not in dict(model.named_parameters())
    copied = copy.deepcopy(model)
    assert copied.head.weight is copied.wte.weight is not model.wte.weight
    assert copied.double().head.weight is copied.wte.weight
    with torch.no_grad(): model.wte.weight[3] += 1
    assert torch.equal(model.head.weight[3], model.wte.weight[3])
    save_weights(model, tmp_path/'gpt.safetensors')
    again = small(seed=1)
    again.load_state_dict(read_weights(tmp_path/'gpt.safetensors')[0])
    assert torch.equal(again(tokens()), model(tokens())) and again.head.weight is again.wte.weight
    assert fingerprint(again.state_dict()) == fingerprint(model.state_dict())


def test_a_step_of_training_moves_the_tied_weights_once():
    model, x = small(), tokens()
    F.cross_entropy(model(x[:, :-1]).mT, x[:, 1:]).backward()
    tied = model.wte.weight.grad
    apart = copy.deepcopy(model)
    apart.head.weight = nn.Parameter(apart.wte.weight.detach().clone())
    apart.zero_grad()
    F.cross_entropy(apart(x[:, :-1]).mT, x[:, 1:]).backward()
    assert torch.allclose(tied, apart.wte.weight.grad + apart.head.weight.grad, atol=1e-6)


@pytest.mark.parametrize('classes,length,width,layers,heads', [
    (7, 3, 4, 1, 1), (50, 12, 16, 2, 4), (257, 64, 24, 3, 2)])
def test_parameters_are_those_of_the_formula(classes, length, width, layers, heads):
    model = GPT(classes, length, width, layers, heads)
    block = 12*width**2 + 13*width  # 3d² + d², 4d² + 4d²; biases 3d + d + 4d + d, norms 4d
    assert sum(p.numel() for p in model.parameters()) == (classes + length)*width + layers*block + 2*width


@pytest.mark.parametrize('name', [n for n in GPTS if n != 'gpt2'])
def test_a_new_model_knows_nothing_and_its_layers_do_not_grow(name):
    torch.manual_seed(0)
    model, x = build_gpt(name, 1024, 64), torch.randint(1024, (4, 64))
    loss = F.cross_entropy(model(x[:, :-1]).mT, x[:, 1:]).item()
    assert math.log(1024) - 0.1 < loss < math.log(1024) + 0.3
    width, layers, _ = GPTS[name]
    std = 0.4/math.sqrt(width)
    for k, p in model.named_parameters():
        if p.ndim < 2: assert torch.equal(p, torch.full_like(p, float(k.endswith('weight')))), k
        else: assert p.std().item() == pytest.approx(std/math.sqrt(2*layers) if 'c_proj' in k else std, rel=0.05), k


def test_sizes_have_names():
    assert GPTS['gpt2'] == Size(width=768, layers=12, heads=12)
    with torch.device('meta'): model = build_gpt('gpt2', 50257, 1024)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    with pytest.raises(ValueError, match='name must be one of gpt_micro, gpt_mini, gpt2'): build_gpt('gpt_huge')


@pytest.mark.parametrize('change,said', [
    (dict(classes=0), 'classes'), (dict(length=0), 'length'), (dict(width=15), 'width must be a multiple of heads, 2'),
    (dict(layers=0), 'layers'), (dict(layers=10**6), 'layers'), (dict(heads=17), 'width'),
    (dict(dropout=1.), 'dropout'), (dict(dropout=math.nan), 'dropout'), (dict(dropout=-0.1), 'dropout'),
    (dict(classes=10**9), 'classes'),
    (dict(width=16.), 'width'), (dict(heads=True), 'heads')])
def test_sizes_of_no_model_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        GPT(**(dict(classes=V, length=L, width=16, layers=1, heads=2) | change))


def test_parts_are_checked_as_the_whole():
    for part, size in ((CausalAttention, (15, 2)), (GPTBlock, (15, 2)), (MLP, (0,))):
        with pytest.raises(ValueError, match='width'): part(*size)


@pytest.mark.parametrize('x,said', [
    (torch.zeros(1, L + 1, dtype=torch.long), rf'the shape of x must be \(B, L\) with L from 1 to {L}'),
    (torch.zeros(L, dtype=torch.long), 'the shape of x'), (torch.zeros(1, 0, dtype=torch.long), 'the shape of x'),
    (torch.full((1, 2), V), f'x must be from 0 to {V - 1}'), (torch.tensor([[-1]]), 'x must be from 0'),
    (torch.zeros(1, 2), 'x must be whole numbers')])
def test_tokens_that_no_embedding_has_are_refused(x, said):
    for ask in (small(), small().hidden):
        with pytest.raises(ValueError, match=said): ask(x)


# Precision, dropout, objectives

def test_bfloat16_gives_nearly_the_same_and_finite_gradients():
    model, x = small(), tokens()
    exact = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        z = model(x)
        loss = F.cross_entropy(z.float()[:, :-1].mT, x[:, 1:])
    assert z.dtype == torch.bfloat16 and (z.float() - exact).abs().max() < 0.05*exact.abs().max()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(x).dtype == torch.bfloat16 and half.hidden(x).isfinite().all()


def test_dropout_is_of_training_alone_and_is_set_everywhere():
    model, x = small(dropout=0.3), tokens()
    assert torch.equal(model(x), model(x)) and torch.allclose(model(x), small()(x))
    assert not torch.equal(model.train()(x), model(x))
    assert with_dropout(model, 0.) is model and torch.equal(model(x), model(x))
    with_dropout(model, 0.9)
    assert len([m for m in model.modules() if isinstance(m, nn.Dropout) and m.p == 0.9]) == 1 + 3*2
    for share in (1., -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match='share'): with_dropout(model, share)


@pytest.mark.parametrize('part', ['attn_dropout', 'resid_dropout', 'drop', 'mlp.dropout'])
def test_each_dropout_has_an_effect(part):
    model, x = small().train(), tokens()
    for name, m in model.named_modules():
        if name.endswith(part): m.p = 0.5
    torch.manual_seed(0)
    assert not torch.equal(model(x), model(x))


def test_dropout_of_models_of_transformers():
    transformers = pytest.importorskip('transformers')
    size = dict(vocab_size=V, max_position_embeddings=L, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, num_attention_heads=2)).train()
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_positions=L, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)).train()
    for model in (llama, gpt2):
        torch.manual_seed(0)
        with_dropout(model, 0.)
        assert torch.equal(model(tokens()).logits, model(tokens()).logits)
        with_dropout(model, 0.5)
        assert not torch.equal(model(tokens()).logits, model(tokens()).logits)


def test_it_is_a_student_like_any_other():
    data = TextData(row_of([Document('a', 'once upon a time ' * 9)], ByteTokenizer()), ByteTokenizer(), 8)
    model = GPT(257, 8, 16, 1, 2)
    check_classes(model, data, 'the student')
    with pytest.raises(ValueError): check_classes(GPT(256, 8, 16, 1, 2), data, 'the student')
    batch = data.get([0, len(data) - 1])
    z, w = model(batch.x).double(), batch.weight.double()
    costs = z.logsumexp(-1) - z.gather(-1, batch.y[..., None])[..., 0]
    by_hand = ((costs*w).sum(1)/w.sum(1)).mean()
    assert Supervised(model)(batch)['hard'].item() == pytest.approx(by_hand.item(), rel=1e-5)


# Writing

def test_the_likeliest_tokens_are_those_of_a_loop():
    model, ids = small(), tokens(2, 3)
    expected = ids
    for _ in range(30): expected = torch.cat([expected, model(expected[:, -L:])[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, ids, 30, temperature=0), expected)  # longer than the window
    assert torch.equal(generate(model, ids, 30, temperature=1e-6, seed=5), expected)
    assert torch.equal(generate(model, ids, 30, temperature=5e-324, seed=5), expected)


@pytest.mark.parametrize('temperature', [0.5, 1., 3.])
def test_tokens_are_drawn_with_their_probabilities(temperature):
    z = torch.tensor([2., 1., 0., -1., -math.inf])
    table = nn.Embedding.from_pretrained(z.repeat(5, 1))
    drawn = generate(table, torch.zeros(400, 1, dtype=torch.long), 25, temperature, seed=3)[:, 1:].flatten()
    share, n = (z/temperature).softmax(0), len(drawn)
    found = drawn.bincount(minlength=5)/n
    assert found[4] == 0 and ((found - share).abs() < 4*(share*(1 - share)/n).sqrt() + 1e-9).all()
    pairs = Counter(zip(drawn[:-1].tolist(), drawn[1:].tolist()))
    assert pairs[0, 1]/n == pytest.approx((share[0]*share[1]).item(), abs=0.015)  # one draw says nothing of the next


def test_the_smallest_and_the_largest_draw_are_tokens_that_can_be():
    "A draw is at least 0 and at most 1 - 2⁻²⁴; sums of float32 may end below that."
    low, high = torch.zeros(1, 1), torch.full((1, 1), 1 - 2**-24)
    for n in range(2, 3000, 37):
        z = F.pad(torch.randn(1, n), (1, 1), value=-math.inf)
        assert _drawn(z, 1., low).item() == 1 and _drawn(z, 1., high).item() == n
    assert [_drawn(torch.zeros(1, 4), 1., torch.tensor([[u]])).item() for u in (0.2, 0.25, 0.74, 0.75)] == [0, 1, 2, 3]


def test_a_seed_gives_the_same_text_and_a_longer_one_begins_like_it():
    model, ids = small(), tokens(3, 2)
    one = generate(model, ids, 10, seed=1)
    assert torch.equal(one, generate(model, ids, 10, seed=1)) and torch.equal(one[:, :2], ids)
    assert not torch.equal(one, generate(model, ids, 10, seed=2))
    assert torch.equal(one, generate(model, ids, 20, seed=1)[:, :12])
    before = torch.get_rng_state()
    generate(model, ids, 3)
    assert torch.equal(before, torch.get_rng_state())  # the draws of a training go on as if nothing had been written


def test_the_mode_is_left_as_it_was_and_there_are_no_gradients():
    model = small(dropout=0.5).train()
    model.h[0].eval()
    modes = [m.training for m in model.modules()]
    out = generate(model, tokens(1, 2), 4, temperature=0)
    assert torch.equal(out, generate(small(), tokens(1, 2), 4, temperature=0)) and not out.requires_grad
    assert [m.training for m in model.modules()] == modes


def test_the_head_is_asked_about_the_last_token_alone():
    model, seen = small(), []
    model.head.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    generate(model, tokens(2, 5), 3)
    assert seen == [(2, 1, V)]*3
    whole = generate(lambda_model(lambda x: small()(x)), tokens(2, 5), 3)
    assert torch.equal(whole, generate(small(), tokens(2, 5), 3))


def lambda_model(f):
    "A network that is a function."
    model = nn.Module()
    model.forward = f
    return model


def test_writing_takes_place_where_the_model_is():
    model, ids = small(), tokens(2, 3)
    expected = generate(model, ids, 15, seed=4)
    with pretended():
        there = copy.deepcopy(model).to('cuda')
        for given in (ids, ids.to('cuda')):
            found = generate(there, given, 15, seed=4)
            assert found.device == given.device and torch.equal(found.cpu(), expected)
        assert torch.equal(generate(model, ids.to('cuda'), 15, seed=4).cpu(), expected)


@pytest.mark.parametrize('change,said', [
    (dict(n=0), 'n must be'), (dict(n=2**21), 'n must be'), (dict(temperature=-1.), 'temperature'),
    (dict(temperature=math.nan), 'temperature'), (dict(temperature=math.inf), 'temperature'),
    (dict(ids=torch.zeros(3, dtype=torch.long)), 'ids must be int64 of shape'), (dict(ids=torch.zeros(1, 2)), 'ids'),
    (dict(ids=torch.zeros(1, 0, dtype=torch.long)), 'ids'), (dict(ids=torch.full((1, 2), V)), 'ids'),
    (dict(ids=torch.zeros(1, 2, dtype=torch.int32)), 'ids'), (dict(model=nn.Linear(3, 3)), 'model does not take'),
    (dict(model=nn.Identity()), 'model gives'), (dict(model=lambda_model(lambda x: x.float())), 'model gives'),
    (dict(model=lambda_model(lambda x: (x, x))), 'model gives'), (dict(model='gpt2'), 'model')])
def test_what_cannot_be_continued_is_refused(change, said):
    with pytest.raises(ValueError, match=said): generate(**(dict(model=small(), ids=tokens(1, 2), n=2) | change))


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('temperature', [0, 1.])
def test_a_model_whose_scores_are_not_finite_is_refused(value, temperature):
    z = torch.zeros(V, V)
    z[:, 7] = value
    with pytest.raises(ValueError, match='what model gives must be finite'):
        generate(nn.Embedding.from_pretrained(z), tokens(1, 2), 3, temperature)
    nothing = nn.Embedding.from_pretrained(torch.full((V, V), -math.inf))
    with pytest.raises(ValueError, match='finite'): generate(nothing, tokens(1, 2), 3, temperature)
