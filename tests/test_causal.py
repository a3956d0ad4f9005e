"Language models of transformers: their vectors, heads and vocabularies, and what is wrong with a folder."
import copy, json, os, random, shutil, subprocess, sys

import numpy as np
import pytest, torch
import torch.nn.functional as F
from distill_nb import causal
from distill_nb.causal import CausalLM, HFTokenizer, open_language_model, save_language_model
from distill_nb.chunks import hidden_logits
from distill_nb.files import save_weights
from distill_nb.gpt import generate, with_dropout
from distill_nb.language import DistillLM
from distill_nb.models import digit_student
from distill_nb.protocol import Batch
from distill_nb.vocabulary import ByteTokenizer, train_bpe
from safetensors.torch import load_file, save_file
from tools import warm

SIZES = dict(vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=32)
FEW = SIZES | dict(num_key_value_heads=1)
OPT = {k: v for k, v in SIZES.items() if k != 'intermediate_size'} | dict(ffn_dim=32, word_embed_proj_dim=8)
KINDS = {'GPT2': dict(vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=32), 'Llama': FEW, 'Qwen2': FEW,
         'Llama, tied': FEW | dict(tie_word_embeddings=True), 'Mistral': FEW, 'OPT': OPT, 'GPTNeoX': SIZES,
         'Phi': SIZES}
RARE = {'Qwen3': FEW, 'Gemma3Text': FEW | dict(head_dim=8), 'Mixtral': FEW,
        'Mpt': dict(vocab_size=320, d_model=16, n_heads=2, n_layers=2, max_seq_len=32),
        'Bloom': dict(vocab_size=320, hidden_size=16, n_head=2, n_layer=2),
        'Falcon': dict(vocab_size=320, hidden_size=16, num_attention_heads=2, num_hidden_layers=2)}
BENT = {'Gemma2': (FEW | dict(head_dim=8), 'final_logit_softcapping=30.0'), 'Cohere': (FEW, 'logit_scale=0.0625'),
        'Granite': (FEW | dict(logits_scaling=4.), 'logits_scaling=4.0'),
        'Bert': (SIZES | dict(is_decoder=True), 'BertLMHeadModel')}
PRECISIONS = [torch.float32, torch.bfloat16]
NO_TOKENS = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)


def config(kind, sizes):
    import transformers
    return getattr(transformers, f'{kind.partition(",")[0]}Config')(**sizes, **NO_TOKENS)


def theirs(kind, sizes=None, seed=0):
    "A model of transformers with random weights, large enough that its tokens differ."
    from transformers import AutoModelForCausalLM
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(kind, sizes or KINDS[kind])).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim == 2: p.mul_(5)
    return made


def tokens(n=281, rows=2, length=9, seed=1):
    return torch.randint(n, (rows, length), generator=torch.Generator().manual_seed(seed))


def is_tied(model): return model.model.get_input_embeddings().weight is model.model.get_output_embeddings().weight


def core(merges=30, text='to be or not to be, that is the question ' * 3):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=257 + merges, special_tokens=['<|end|>'], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return made


def fast(made=None, **more):
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_object=made or core(), **dict(eos_token='<|end|>') | more)


@pytest.fixture(scope='module')
def vocabulary(): return HFTokenizer(fast())


@pytest.fixture
def folder(tmp_path, vocabulary):
    "A small Llama with weights and a vocabulary, as it comes from the hub."
    theirs('Llama').save_pretrained(tmp_path/'model')
    vocabulary.save(tmp_path/'model')
    return tmp_path/'model'


# Models

@pytest.mark.parametrize('precision', PRECISIONS, ids=str)
@pytest.mark.parametrize('kind', [*KINDS, *(pytest.param(k, marks=pytest.mark.slow) for k in RARE)])
def test_the_laws_of_a_causal_model(kind, precision):
    own = theirs(kind, (KINDS | RARE)[kind]).to(precision)
    model, x = CausalLM(own, 281).eval(), tokens()
    assert model.said == [] and model.head.weight.shape == (281, model.hidden(x).shape[-1])
    assert torch.equal(hidden_logits(model, x).logits(), model.head(model.hidden(x)))
    near = dict(rtol=1e-4, atol=1e-5) if precision is torch.float32 else dict(rtol=0.1, atol=0.05)
    for mode in (False,) if kind == 'OPT' else (False, True):  # with_dropout does not know OPT's
        with_dropout(model, 0.).train(mode)
        z = model(x)
        assert z.shape == (2, 9, 281) and z.dtype == precision
        whole = own(input_ids=x, attention_mask=torch.ones_like(x)).logits[..., :281]
        torch.testing.assert_close(z, whole, **near)
        torch.testing.assert_close(model.head(model.hidden(x)), z, **near)
        for t in (1, 5, 8):  # causality, of which padding on the right is a case
            other = x.clone()
            other[:, t:] = (other[:, t:] + 17) % 281
            torch.testing.assert_close(model(other)[:, :t], z[:, :t], rtol=1e-5, atol=1e-5)
            assert not torch.equal(model(other)[:, t:], z[:, t:])
            torch.testing.assert_close(model(x[:, :t]), z[:, :t], **near)


@pytest.mark.parametrize('kind', ['GPT2', 'Llama', 'Phi'])
def test_rows_beyond_the_vocabulary_change_nothing(kind):
    padded = theirs(kind)
    exact = copy.deepcopy(padded)
    exact.resize_token_embeddings(281)
    x, y = tokens(), tokens(seed=2)
    losses, grads = [], []
    for own in (padded, exact):
        model = CausalLM(own, 281).eval()
        ways = [model(x), model.head(model.hidden(x))]
        for z in ways:
            model.zero_grad()
            loss = F.cross_entropy(z.mT, y)
            loss.backward(retain_graph=True)
            losses.append(loss.item())
            grads.append({k: p.grad[:281].clone() if len(p) == 320 else p.grad.clone()
                          for k, p in own.named_parameters()})
            rows = own.get_output_embeddings().weight.grad
            assert (rows[281:] == 0).all() and (rows[:281].abs().sum(1) > 0).all()
    assert max(losses) - min(losses) < 1e-6
    for other in grads[1:]: torch.testing.assert_close(other, grads[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('precision', PRECISIONS, ids=str)
@pytest.mark.parametrize('kind', BENT)
def test_what_stands_behind_a_head_is_kept_and_vectors_are_refused(kind, precision):
    sizes, said = BENT[kind]
    own = theirs(kind, sizes).to(precision)
    model, x = CausalLM(own, 281).eval(), tokens()
    assert model.head is None and hidden_logits(model, x) is None
    assert len(model.said) == 1 and said in model.said[0]
    assert torch.equal(model(x), own(input_ids=x).logits[..., :281])
    with pytest.raises(ValueError, match=r'model has no hidden\(x\), .* use its logits'): model.hidden(x)


def test_a_bend_that_small_logits_do_not_show_is_found():
    "Of a new Gemma 2 the product is right to the last digits, until it has learned something."
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    own = AutoModelForCausalLM.from_config(config('Gemma2', BENT['Gemma2'][0])).eval()
    model, x = CausalLM(own), tokens()
    product = model._cut()(model._vectors('model', x))
    torch.testing.assert_close(product, model(x), rtol=1e-4, atol=1e-4)
    assert model.head is None


@pytest.mark.parametrize('precision', PRECISIONS, ids=str)
@pytest.mark.parametrize('kind', ['Bert', 'Roberta'])
def test_an_encoder_is_refused_however_faint_its_look_ahead(kind, precision):
    from transformers import AutoModelForCausalLM
    own = AutoModelForCausalLM.from_config(config(kind, SIZES)).to(precision)
    with pytest.raises(ValueError, match=f'must be a causal language model, .* but is .{kind}'): CausalLM(own)


@pytest.mark.parametrize('kind', ['GPT2', 'Llama'])
def test_dropout_of_transformers_is_set(kind):
    model, x = CausalLM(theirs(kind), 281), tokens()
    still = model.eval()(x)
    for share in (0.5, 0.):
        torch.manual_seed(0)
        with_dropout(model, share).train()
        assert torch.equal(model(x), still) == (share == 0)
        torch.testing.assert_close(model.head(model.hidden(x)), still) if share == 0 else None
        assert torch.equal(model.eval()(x), still)


def test_a_window_that_is_too_long_is_refused_before_any_work():
    model = CausalLM(theirs('Llama'), 281)
    model.model.forward = None
    for ask in (model, model.hidden):
        with pytest.raises(ValueError, match='the length of x must be at most 32, .* but is 33'): ask(tokens(length=33))


def test_copies_states_and_greedy_texts():
    own = theirs('GPT2')
    model, x = CausalLM(own, 281).eval(), tokens(rows=1)
    other = copy.deepcopy(model)
    assert is_tied(other) and other.head.weight.data_ptr() != model.head.weight.data_ptr()
    again = CausalLM(theirs('GPT2', seed=1), 281).eval()
    assert not torch.equal(again(x), model(x))
    again.load_state_dict(model.state_dict())
    for m in (other, again): assert torch.equal(m(x), model(x))
    z = own(input_ids=x).logits.detach()
    own.get_output_embeddings().weight.data[281:] = -own.get_output_embeddings().weight.data[281:]
    first = generate(model, x, 5, temperature=0)
    longer = x
    for _ in range(5): longer = torch.cat([longer, own(input_ids=longer).logits[:, -1:, :281].argmax(-1)], 1)
    assert torch.equal(first, longer) and z.shape == (1, 9, 320)


def test_more_tokens_than_rows_and_what_is_no_language_model():
    with pytest.raises(ValueError, match='classes must be at most 320, .* but is 321'): CausalLM(theirs('Llama'), 321)
    with pytest.raises(ValueError, match='classes must be a whole number of at least 2'): CausalLM(theirs('Llama'), 1)
    with pytest.raises(ValueError, match='model, a Linear, fails for tokens|model must be'):
        CausalLM(torch.nn.Linear(2, 2))


@pytest.mark.parametrize('kind', ['Llama', 'Gemma2'])
def test_a_student_learns_the_same_by_chunks_or_by_whole_logits(kind):
    x, y = tokens(length=16), tokens(length=16, seed=2)
    batch = Batch(x, y, torch.arange(2), torch.zeros(2).long(), None)
    student = CausalLM(theirs(kind, KINDS.get(kind) or BENT[kind][0]), 281).eval()
    teacher, found = CausalLM(theirs('GPT2'), 281).eval(), []
    for whole in (False, True):
        if whole: student._inner = teacher._inner = None
        student.zero_grad()
        loss = sum(DistillLM(student, teacher)(batch).values())
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in student.parameters())])
        assert all(p.grad is None for p in teacher.parameters())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


# Vocabularies

def kinds_of_tokenizers():
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, trainers
    from pydoc_data.topics import topics
    text, special = '\n\n'.join(topics.values())[:20_000], ['<|end|>', '<unk>']
    more = dict(vocab_size=400, special_tokens=special, show_progress=False)
    made = {'bpe': core(100, text)}
    t = made['unigram'] = tokenizers.Tokenizer(models.Unigram())
    t.normalizer, t.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    t.train_from_iterator([text], trainers.UnigramTrainer(unk_token='<unk>', **more))
    t = made['words'] = tokenizers.Tokenizer(models.WordPiece(unk_token='<unk>'))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    t.train_from_iterator([text], trainers.WordPieceTrainer(**more))
    t = made['one word'] = tokenizers.Tokenizer(models.BPE(unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.train_from_iterator([text], trainers.BpeTrainer(**more))
    t.pre_tokenizer = None  # as in Llama 2: merges may cross any boundary
    t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    return made


def test_long_texts_in_pieces_are_what_they_are_at_once(monkeypatch):
    from pydoc_data.topics import topics
    monkeypatch.setattr(causal, '_PIECE', 2000)
    text = '\n\n'.join(topics.values())[20_000:70_000] + ' naïve 日本語 😀🎉  \n' * 300 + 'x' + ' ' * 2000 + 'end<|end|>' * 9
    for name, made in kinds_of_tokenizers().items():
        t = HFTokenizer(fast(made))
        whole = t._core.encode(text, add_special_tokens=False).ids  # made itself has other last digits in its scores
        pieces = [*t._pieces(text)]
        assert len(pieces) > 20 and t.encode(text).tolist() == whole, name
        joined = sum(causal._meeting(a, b, at) is not None for (_, a), (at, b) in zip(pieces, pieces[1:]))
        assert joined > 20, f'{name}: {joined} of {len(pieces) - 1} were joined'


def test_where_tokens_are_equally_likely_a_word_is_in_the_same_ones_in_pieces(monkeypatch):
    "Of five stars, two and three are as likely as three and two: rounding decides, by what stands before in the word."
    import tokenizers
    from tokenizers import models, pre_tokenizers
    monkeypatch.setattr(causal, '_PIECE', 2000)
    names = {'<unk>': -20., '<|end|>': -20., '▁': -3.1, 'a': -7.3, 'b': -6.9, '*': -5.5312345,
             '**': -6.10987, '***': -7.9761234}
    t = tokenizers.Tokenizer(models.Unigram([*names.items()], 0))
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    draw, own = random.Random(0), HFTokenizer(fast(t))
    for words in (1, 3, 60):
        text = ' '.join(''.join('ab'*draw.randrange(20) + '*'*5 for _ in range(1600//words)) for _ in range(words))
        assert own.encode(text).tolist() == own._core.encode(text, add_special_tokens=False).ids


def test_a_text_in_which_pieces_never_meet_is_encoded_whole(monkeypatch):
    monkeypatch.setattr(causal, '_PIECE', 2000)
    t, text = HFTokenizer(fast(core(50, 'aaa aaaa aaaaaaa ' * 9))), 'a' * 9001
    assert t.encode(text).tolist() == t._core.encode(text).ids


def test_a_vocabulary_says_what_transformers_says(vocabulary):
    theirs, text = fast(), 'To be?\n\n  not 日本語 <|end|> é'
    assert vocabulary.encode(text).tolist() == theirs(text).input_ids and vocabulary.encode(text).dtype == np.int32
    assert vocabulary.encode('').shape == (0,) and vocabulary.encode('').dtype == np.int32
    assert len(vocabulary) == len(theirs) == len(set(vocabulary.names)) and vocabulary.end == theirs.eos_token_id
    assert vocabulary.names == theirs.convert_ids_to_tokens(range(len(theirs)))
    ids = vocabulary.encode('to be é')
    assert vocabulary.decode([vocabulary.end, *ids, vocabulary.end]) == 'to be é'
    for bad in ([len(vocabulary)], [-1], [0.5], 'a'):
        with pytest.raises(ValueError, match='ids'): vocabulary.decode(bad)
    with pytest.raises(ValueError, match='text must be Unicode'): vocabulary.encode('a\ud800')


def test_special_tokens_around_a_text_and_its_greatest_length_are_ignored():
    from tokenizers.processors import TemplateProcessing
    made = core()
    made.post_processor = TemplateProcessing(single='<|end|> $A', special_tokens=[('<|end|>', 0)])
    made.enable_truncation(4)
    made.enable_padding(length=40, pad_token='<|end|>')
    t = HFTokenizer(fast(made, model_max_length=4))
    assert t.encode('to be or not to be').tolist() == core().encode('to be or not to be').ids
    assert t.fingerprint() == HFTokenizer(fast()).fingerprint()


def test_equal_vocabularies_have_equal_fingerprints_and_others_have_not(tmp_path, vocabulary):
    from tokenizers import AddedToken, normalizers, pre_tokenizers
    for name in ('a', 'b'): vocabulary.save(tmp_path/name)
    changed = json.loads((tmp_path/'b/tokenizer.json').read_text())
    changed['model']['vocab'] = dict(reversed(changed['model']['vocab'].items()))
    changed['model']['merges'] = [' '.join(pair) for pair in changed['model']['merges']]  # as it was written before
    (tmp_path/'b/tokenizer.json').write_text(json.dumps(changed))
    a, b = HFTokenizer(tmp_path/'a'), HFTokenizer(f"{tmp_path/'b'}")
    said = vocabulary.fingerprint()
    assert a.fingerprint() == b.fingerprint() == said and len(said) == 16
    others = {said}
    for change in (dict(merges=9), dict(text='that is the question ' * 9)):
        others.add(HFTokenizer(fast(core(**change))).fingerprint())
    for change in (lambda t: setattr(t, 'normalizer', normalizers.Lowercase()),
                   lambda t: setattr(t, 'pre_tokenizer', pre_tokenizers.Whitespace()),
                   lambda t: t.add_tokens([AddedToken('question', single_word=True)])):
        change(made := core())
        others.add(HFTokenizer(fast(made)).fingerprint())
    assert len(others) == 6


@pytest.mark.parametrize('kind', ['qwen2', 'llama', 'gpt2'])
def test_a_vocabulary_does_not_depend_on_the_configuration_beside_it(kind, tmp_path, vocabulary):
    vocabulary.save(tmp_path)
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type=kind)))
    assert HFTokenizer(tmp_path).fingerprint() == vocabulary.fingerprint()


def test_numbers_without_a_token_have_names(vocabulary):
    said = json.loads(vocabulary._core.to_str())
    last = max(said['model']['vocab'].values())
    said['model']['vocab']['late'] = last + 4
    made = causal._tokenizer_of(dict(kind='hf', end=0, tokenizer=json.dumps(said)), 'w')
    assert len(made) == last + 5 == len(set(made.names)) and made.names[last + 1] == f'<no token {last + 1}>'


def without_end(folder):
    (folder/'tokenizer_config.json').write_text('{}')
    (folder/'special_tokens_map.json').unlink(missing_ok=True)


@pytest.mark.parametrize('change,said', [
    (lambda f: (f/'tokenizer.json').write_text('{'), "the tokenizer in 'hf:FOLDER' cannot be read: "),
    (lambda f: (f/'tokenizer.json').unlink(), "source must be a folder with a tokenizer.json, but is 'FOLDER'"),
    (without_end, 'the eos_token of the tokenizer must be one of its')])
def test_what_is_wrong_with_a_tokenizer_is_said(change, said, tmp_path, vocabulary):
    vocabulary.save(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError) as e: HFTokenizer(tmp_path)
    assert said.replace('FOLDER', str(tmp_path)) in str(e.value), str(e.value)


@pytest.mark.parametrize('bad', [3, None, ByteTokenizer(), 'ünïcode \ud800'])
def test_what_is_no_tokenizer(bad):
    with pytest.raises(ValueError): HFTokenizer(bad)


# Folders and files

@pytest.mark.parametrize('kind', ['GPT2', 'Llama', 'Llama, tied', 'Qwen2', 'Gemma2'])
def test_a_student_is_saved_and_opened(kind, tmp_path, vocabulary):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    sizes, x = KINDS.get(kind) or BENT[kind][0], tokens()
    config(kind, sizes).save_pretrained(tmp_path/'new')
    torch.manual_seed(3)
    new = open_language_model(f"hf:{tmp_path/'new'}", vocabulary, length=32)
    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_config(config(kind, sizes)).eval()
    assert torch.equal(new.model(x), plain(input_ids=x).logits[..., :281]), 'same seed, same weights'
    assert not new.trained and 'those of this model are random' in new.said[0] and not new.model.training
    with torch.no_grad():
        for p in new.model.parameters(): p.add_(0.1 * torch.randn_like(p))
    tied = is_tied(new.model)
    for n in (1, 2): save_language_model(new.model.train(), vocabulary, tmp_path/'out', n=n, names=['a', 'b'])
    again = open_language_model(f"hf:{tmp_path/'out'}", vocabulary)
    assert torch.equal(again.model(x), new.model.eval()(x)) and again.trained and again.tokenizer is vocabulary
    assert is_tied(again.model) == tied == (kind in ('GPT2', 'Llama, tied', 'Gemma2'))
    assert again.facts == {'n': '2', 'names': '["a", "b"]'} and again.said == new.said[1:]
    assert open_language_model(f"hf:{tmp_path/'out'}").tokenizer.fingerprint() == vocabulary.fingerprint()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path/'out').eval()
    assert torch.equal(theirs(input_ids=x).logits[..., :281], again.model(x))
    assert AutoTokenizer.from_pretrained(tmp_path/'out')('to be').input_ids == vocabulary.encode('to be').tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['new', 'out']


def test_half_precision_is_kept_or_not(folder, vocabulary):
    theirs('Llama').to(torch.bfloat16).save_pretrained(folder)
    for dtype, found in dict(float32=torch.float32, auto=torch.bfloat16, float16=torch.float16).items():
        model = open_language_model(f'hf:{folder}', dtype=dtype).model
        assert {p.dtype for p in model.parameters()} == {found} and model(tokens()).dtype == found
    with pytest.raises(ValueError, match="dtype must be one of float32, .* but is 'half'"):
        open_language_model(f'hf:{folder}', dtype='half')


def test_a_folder_with_a_vocabulary_of_ours(tmp_path):
    config('Llama', FEW).save_pretrained(tmp_path/'new')
    for t in (ByteTokenizer(), train_bpe(['to be or not to be ' * 3], 265)):
        made = open_language_model(f"hf:{tmp_path/'new'}", t)
        save_language_model(made.model, t, tmp_path/'out')
        again, x = open_language_model(f"hf:{tmp_path/'out'}"), tokens(len(t))
        assert again.tokenizer.fingerprint() == t.fingerprint() and torch.equal(again.model(x), made.model(x))
        assert made.model(x).shape[-1] == len(t)


@pytest.mark.parametrize('theirs', [False, True])
def test_a_file_of_ours_needs_nothing_beside_it(theirs, tmp_path, vocabulary):
    for t in [vocabulary] if theirs else [ByteTokenizer(), train_bpe(['to be or not to be ' * 3], 265)]:
        made, path = open_language_model('gpt_micro', t, length=16), tmp_path/'w.safetensors'
        assert not made.trained and made.tokenizer is t and made.model.length == 16
        save_language_model(made.model, t, path, seed=3, architecture='none', heads=9)
        again, x = open_language_model(str(path)), tokens(len(t))
        assert torch.equal(again.model(x), made.model(x)) and again.model.head.weight is again.model.wte.weight
        assert again.trained and again.facts == dict(architecture='gpt', heads='2', seed='3')
        assert again.tokenizer.fingerprint() == t.fingerprint()
        assert again.tokenizer.encode('to be').tolist() == t.encode('to be').tolist()
        if theirs: again.tokenizer.save(tmp_path/'tokens')
    if theirs: assert HFTokenizer(tmp_path/'tokens').fingerprint() == t.fingerprint()


def test_files_that_are_none_of_ours(tmp_path):
    path, t = tmp_path/'w.safetensors', ByteTokenizer()
    gpt = open_language_model('gpt_micro', t, length=16).model
    state = json.dumps(t.state())
    def refused(said, **more):
        with pytest.raises(ValueError, match=said): open_language_model(str(path), **more)
    refused('there is none at')
    save_weights(digit_student(), path, architecture='digit_student')
    refused("for must be a 'gpt', as save_language_model writes it .*, but is 'digit_student'")
    save_weights(digit_student(), path, architecture='gpt', heads=2, tokenizer=state)
    refused('does not hold weights of a GPT')
    for heads in (3, 'x', 0):
        save_weights(gpt, path, architecture='gpt', heads=heads, tokenizer=state)
        refused('does not hold weights of a GPT')
    for bad in ('', '{', '[]', '{"kind": "hf", "tokenizer": "{", "end": 0}', '{"kind": "words"}', '{"kind": "bpe"}'):
        save_weights(gpt, path, architecture='gpt', heads=2, tokenizer=bad)
        refused("w.safetensors' (is damaged|cannot be used|must be as it was saved)")
    save_weights(gpt, path, architecture='gpt', heads=2, tokenizer=json.dumps(train_bpe(['a a a'], 260).state()))
    refused('must be one of 257 tokens')
    save_language_model(gpt, t, path)
    refused('length must be at most 16', length=17)
    refused('must have the same vocabulary', tokenizer=train_bpe(['to be to be'], 260))
    path.write_bytes(path.read_bytes()[:-9])
    refused('is damaged or is not a file of weights')


def cut(folder):
    file = folder/'model.safetensors'
    file.write_bytes(file.read_bytes()[:300])


def evil(folder):
    (folder/'model.safetensors').unlink()
    torch.save({'x': Run()}, folder/'pytorch_model.bin')


class Run:
    def __reduce__(self): return print, ('ran',)


def weights(change):
    def of(folder):
        tensors = load_file(folder/'model.safetensors')
        save_file(change(tensors), folder/'model.safetensors', {'format': 'pt'})
    return of


def said_so(**more):
    def of(folder):
        file = folder/'config.json'
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return of


@pytest.mark.parametrize('damage,said', [
    (cut, "model.safetensors of 'hf:FOLDER' cannot be read: SafetensorError"),
    (evil, "pytorch_model.bin of 'hf:FOLDER' is damaged or holds more than tensors; nothing in it was run."),
    (weights(lambda t: {k: v for k, v in t.items() if 'norm' not in k}),
     "'hf:FOLDER' does not hold weights of its network: model.layers.0.input_layernorm.weight is missing, and 4 more"),
    (weights(lambda t: t | {'lm_head.weight': torch.zeros(300, 16)}),
     "'hf:FOLDER' does not hold weights of its network: lm_head.weight is 300x16 but must be 320x16, and 0 more"),
    (weights(lambda t: t | {'model.norm.weight': torch.full((16,), float('nan'))}),
     "'hf:FOLDER' cannot be used: the logits of the model, a LlamaForCausalLM, must be finite numbers"),
    (lambda f: (f/'config.json').unlink(), "the folder 'hf:FOLDER' has no config.json."),
    (lambda f: (f/'config.json').write_text('{'), "config.json of 'hf:FOLDER' cannot be read"),
    (said_so(model_type='mine', auto_map={'AutoConfig': 'x.C'}), 'wants code of its own, which is not run: only'),
    (said_so(num_hidden_layers=10**9), "num_hidden_layers in 'FOLDER/config.json' must be numbers from 1 to"),
    (said_so(vocab_size=10**12), "vocab_size in 'FOLDER/config.json' must be numbers from 1 to"),
    (said_so(hidden_size='x'), "config.json of 'hf:FOLDER'"),
    (said_so(vocab_size=100), "tokenizer must be one of at most 100 tokens, the vocab_size of 'hf:FOLDER', but is"),
    (said_so(model_type='vit'), "'hf:FOLDER' is a ViT, which is no causal language model."),
    (said_so(model_type='t5'), "'hf:FOLDER' is a T5, which reads one text and writes another (sequence to sequence)"),
    (said_so(model_type='bart', is_encoder_decoder=True), "'hf:FOLDER' is a Bart, which reads one text and writes"),
    (lambda f: (f/'tokenizer.json').unlink(), "'hf:FOLDER' has weights but no tokenizer.json, so that nobody can say"),
    (lambda f: (f/'tokenizer.json').write_text('{'), "the tokenizer in 'hf:FOLDER' cannot be read: "),
    (lambda f: (f/'distill_nb.json').write_text('[]'), "what 'FOLDER/distill_nb.json' holds must be as")])
def test_what_is_wrong_with_a_folder_is_said_with_its_file(damage, said, folder, vocabulary, capsys):
    damage(folder)
    with pytest.raises(ValueError) as e: open_language_model(f'hf:{folder}', vocabulary)
    assert said.replace('FOLDER', str(folder)) in str(e.value) and 'https' not in str(e.value), str(e.value)
    assert '\n' not in str(e.value) and 'ran' not in capsys.readouterr().out.split()


def test_an_encoder_in_a_folder_is_named(tmp_path, vocabulary):
    from transformers import BertForMaskedLM
    BertForMaskedLM(config('Bert', SIZES)).save_pretrained(tmp_path)
    vocabulary.save(tmp_path)
    with pytest.raises(ValueError, match="hf:.* cannot be used: model must be a causal .* but is 'BertLMHeadModel'"):
        open_language_model(f'hf:{tmp_path}', vocabulary)


def test_tensors_of_others_are_said_and_a_trained_folder_without_a_vocabulary_keeps_its_rows(folder, vocabulary):
    weights(lambda t: t | {'value_head.weight': torch.zeros(3)})(folder)
    [line] = open_language_model(f'hf:{folder}').said
    assert 'holds 1 tensors that its network does not have: value_head.weight' in line
    (folder/'tokenizer.json').unlink()
    found = open_language_model(f'hf:{folder}')
    assert found.tokenizer is None and found.model(tokens()).shape[-1] == 320


def test_another_vocabulary_and_too_long_windows_are_refused_before_weights_are_read(folder, vocabulary):
    cut(folder)
    with pytest.raises(ValueError) as e: open_language_model(f'hf:{folder}', ByteTokenizer())
    said = f'hf:{folder}', 'ByteTokenizer', 'HFTokenizer', 'Sequence-level distillation'
    assert all(word in str(e.value) for word in said)
    with pytest.raises(ValueError, match='length must be at most 32, the positions of'):
        open_language_model(f'hf:{folder}', vocabulary, length=33)


def test_a_model_that_does_not_fit_into_the_memory(folder, vocabulary, monkeypatch):
    cut(folder)
    monkeypatch.setattr(causal, 'free_bytes', lambda: 4 * 10_000)
    with pytest.raises(ValueError, match='that fits into the free memory, but is .one of 14,928 parameters'):
        open_language_model(f'hf:{folder}', vocabulary)


@pytest.mark.parametrize('name,said', [
    ('gpt3', "name must be one of gpt_micro, .*, hf:FOLDER, hf:NAME or FILE.safetensors, but is 'gpt3'"),
    ('.', r'.for the folder, hf:\..'), ('gpt_mini', "tokenizer must be the vocabulary of the data, since 'gpt_mini'")])
def test_names_that_open_nothing(name, said):
    with pytest.raises(ValueError, match=said): open_language_model(name)


def test_a_download_that_fails_says_what_to_fetch(monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    for call in (open_language_model, lambda name: HFTokenizer(name[3:])):
        with pytest.raises(ValueError) as e: call('hf:nobody/nothing')
        assert 'tokenizer.json and tokenizer_config.json from https://huggingface.co/nobody/nothing' in str(e.value)


def test_without_transformers_one_sentence_says_how_to_get_it(folder, vocabulary, tmp_path, monkeypatch):
    path = tmp_path/'w.safetensors'
    save_language_model(open_language_model('gpt_micro', vocabulary).model, vocabulary, path)
    for package, name in (('transformers', f'hf:{folder}'), ('tokenizers', str(path))):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=f"{package} could not be .* pip install 'distill_nb.language.'"):
            open_language_model(name)


def test_the_module_loads_without_transformers():
    code = "import sys, distill_nb.causal; print({'transformers', 'tokenizers'} & set(sys.modules))"
    assert subprocess.run([*warm.command(), '-c', code], capture_output=True, text=True).stdout == 'set()\n'


# Saving

def test_nothing_else_is_ever_replaced(folder, vocabulary, tmp_path):
    made = open_language_model(f'hf:{folder}')
    (tmp_path/'notes').mkdir()
    (tmp_path/'notes/letter.txt').write_text('Dear')
    (folder/'runs').mkdir()
    (tmp_path/'file').write_text('Dear')
    for place in ('notes', 'model', 'file', '.'):
        with pytest.raises(ValueError, match='path must be a new folder, or one that holds a saved model and nothing'):
            save_language_model(made.model, vocabulary, tmp_path/place)
    assert (tmp_path/'notes/letter.txt').read_text() == 'Dear' and (folder/'runs').is_dir()
    with pytest.raises(ValueError, match='tokenizer must be one of 281, as the model has, but is .ByteTokenizer'):
        save_language_model(made.model, ByteTokenizer(), tmp_path/'x')
    with pytest.raises(ValueError, match='model must be a GPT or a CausalLM'):
        save_language_model(made.model.model, vocabulary, tmp_path/'x')
    gpt = open_language_model('gpt_micro', ByteTokenizer()).model
    with pytest.raises(ValueError, match='path must end in .safetensors'):
        save_language_model(gpt, ByteTokenizer(), tmp_path)
    assert not (tmp_path/'x').exists()


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='a process ends while it writes')
@pytest.mark.parametrize('call,nth', [('fsync', 1), ('fsync', 4), ('replace', 1), ('replace', 2)])
def test_a_run_that_is_killed_leaves_no_half_of_a_folder(call, nth, folder, vocabulary, tmp_path, monkeypatch):
    made, x = open_language_model(f'hf:{folder}'), tokens()
    before = made.model(x)
    with torch.no_grad(): made.model.model.get_input_embeddings().weight.mul_(2)
    if not (child := os.fork()):
        calls, real = [], getattr(os, call)
        def ends(*args):
            calls.append(args)
            if len(calls) == nth: os._exit(9)
            return real(*args)
        setattr(os, call, ends)
        save_language_model(made.model, vocabulary, folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    if (call, nth) == ('replace', 2): assert not folder.exists()  # the old one and the new one lie beside, whole
    else: assert torch.equal(open_language_model(f'hf:{folder}').model(x), before)
    save_language_model(made.model, vocabulary, folder)
    assert torch.equal(open_language_model(f'hf:{folder}').model(x), made.model(x))
    assert [p.name for p in tmp_path.iterdir()] == ['model']


def test_a_disk_that_fails_leaves_the_old_folder(folder, vocabulary, tmp_path, monkeypatch):
    made, before = open_language_model(f'hf:{folder}'), (folder/'model.safetensors').read_bytes()
    monkeypatch.setattr(made.model.model, 'save_pretrained', lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): save_language_model(made.model, vocabulary, folder)
    assert [p.name for p in tmp_path.iterdir()] == ['model'] and (folder/'model.safetensors').read_bytes() == before
    shutil.rmtree(folder)
