"Vocabularies: a slow reference, any Unicode, states and fingerprints, and texts that would take for ever."
import json, random, subprocess, sys, time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pydoc_data.topics import topics

from distill_nb import vocabulary
from distill_nb.vocabulary import (BPETokenizer, ByteTokenizer, Tokenizer, _counted, _words, check_vocabularies,
                                   tokenizer_of, train_bpe)

ENGLISH = [topics[k] for k in sorted(topics)[:12]]
CHINESE = '话说天下大势，分久必合，合久必分。' * 3 + '周末七国分争，并入于秦。及秦灭之后，楚、汉分争，又并入于汉。'
TEXTS = {'english': ENGLISH, 'chinese': [CHINESE], 'runs': ['aaaaaaa aaa aaaa baaab', 'abababab ababa'],
         'one letter': ['a'], 'empty': [''], 'none': [], 'code': ['if x:\r\n\treturn  y[0]  # ' * 5],
         'emoji': ['👩‍👩‍👧 🏳️‍🌈 é é ﷽ ' * 4]}


# A slow reference: words are rows of bytes, every round counts every pair of every word anew

def slow_merges(texts, size):
    words = Counter(w for t in texts for w in _words(t))
    rows, pieces, merges = {w: [bytes([b]) for b in w.encode()] for w in words}, {bytes([b]): b for b in range(256)}, []
    while len(merges) < size - 257:
        pairs = Counter()
        for w, n in words.items():
            for pair in zip(rows[w], rows[w][1:]): pairs[pair] += n
        best = min(pairs, key=lambda p: (-pairs[p], pieces[p[0]], pieces[p[1]]), default=None)
        if best is None or pairs[best] < 2: break
        pieces[best[0] + best[1]] = 257 + len(merges)
        merges.append(best)
        for row in rows.values():
            i = 0
            while i < len(row) - 1:
                if tuple(row[i:i + 2]) == best: row[i:i + 2] = [best[0] + best[1]]
                i += 1
    return [[pieces[a], pieces[b]] for a, b in merges]


def slow_encode(merges, text):
    "Each merge of the vocabulary in its turn, from the left."
    out = []
    for word in _words(text):
        row = [*word.encode()]
        for new, pair in enumerate(merges, 257):
            i = 0
            while i < len(row) - 1:
                if row[i:i + 2] == list(pair): row[i:i + 2] = [new]
                i += 1
        out += row
    return out


@pytest.mark.parametrize('name', TEXTS)
@pytest.mark.parametrize('size', [257, 300, 420])
def test_training_and_encoding_are_those_of_the_slow_reference(name, size):
    own = train_bpe(TEXTS[name], size)
    merges = slow_merges(TEXTS[name], size)
    assert own.state()['merges'] == merges and len(own) == 257 + len(merges)
    for text in (*TEXTS[name][:2], 'unseen wörds, 12345!', CHINESE[:40]):
        assert own.encode(text[:3000]).tolist() == slow_encode(merges, text[:3000])


@given(st.lists(st.text('ab ', max_size=30), max_size=5), st.integers(257, 275))
@settings(max_examples=60, deadline=None)
def test_texts_of_two_letters_merge_as_in_the_slow_reference(texts, size):
    "Pairs that overlap themselves, and merges that could make the same piece in two ways."
    assert train_bpe(texts, size).state()['merges'] == slow_merges(texts, size)


def test_a_smaller_vocabulary_is_the_beginning_of_a_larger_one():
    large, small = train_bpe(ENGLISH, 600), train_bpe(ENGLISH, 400)
    assert small.pieces == large.pieces[:400]


# Round trips

VOCABULARIES = [ByteTokenizer(), train_bpe(ENGLISH, 500), train_bpe([CHINESE], 300), train_bpe(TEXTS['emoji'], 300)]


@pytest.mark.parametrize('own', VOCABULARIES, ids=['bytes', 'english', 'chinese', 'emoji'])
@given(st.text())
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back(own, text):
    ids = own.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1 and own.decode(ids) == text
    assert b''.join(own.pieces[i] for i in ids) == text.encode() and own.end not in ids


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_words_are_the_text_and_none_is_long(text):
    words = _words(text)
    assert ''.join(words) == text and all(0 < len(w) <= 33 for w in words)


@pytest.mark.parametrize('text', ['\x00', '\x1c\x1d\x85\u2028', 'a\r\nb\rc', ' ' * 100 + 'x', '²½Ⅷ٣३', '_' * 40 + 'a_b',
                                  'e\u0301\u0327', 'الكتاب', '👍🏽', '\ufeffx', '\U0010ffff\ue000', "'s'll''re'x"])
def test_odd_texts_come_back(text):
    for own in VOCABULARIES: assert own.decode(own.encode(text)) == text


def test_what_is_no_utf8_is_shown_as_such_and_the_end_says_nothing():
    own = VOCABULARIES[1]
    assert own.decode([195]) == '\ufffd' and own.decode([256, 97, 256]) == 'a' and own.decode([]) == ''
    ids = own.encode('The class')
    for form in (ids, ids.tolist(), torch.from_numpy(ids)[None], ids.astype(np.int64)):
        assert own.decode(form) == 'The class'


# What is refused

@pytest.mark.parametrize('ids', [[257], [-1], [True], [1.0], [None], ['a'], [[1, 2]], torch.ones(2), np.ones(2)])
def test_numbers_that_are_no_tokens_are_refused(ids):
    with pytest.raises(ValueError, match='ids must be whole numbers from 0 to 256'): ByteTokenizer().decode(ids)


@pytest.mark.parametrize('merges,said', [
    ([(97, 256)], 'not the end'), ([(97, 257)], 'from 0 to 256'), ([(-1, 97)], 'merge 0'), ([(97,)], 'merge 0'),
    ([(97, 98), (97, 98)], 'merge 1 of merges must be a new piece'), ([(97., 98)], 'merge 0'), ([None], 'merge 0'),
    ([(97, 98), (257, 99), (98, 99), (97, 259)], 'merge 3 of merges must be a new piece'),
    ([(97, 97)] + [(i, i) for i in range(257, 300)], 'merge 7 of merges must be a new piece of at most 128 bytes')])
def test_merges_that_make_no_vocabulary_are_refused(merges, said):
    with pytest.raises(ValueError, match=said): BPETokenizer(merges)


def test_texts_and_sizes_that_make_no_vocabulary_are_refused(tmp_path):
    for size in (256, 2**16 + 1, 300.5, True):
        with pytest.raises(ValueError, match='size must be'): train_bpe(['text'], size)
    for texts in ('text', [b'text'], [tmp_path], ['a', None], ['a\ud800']):
        with pytest.raises(ValueError, match='texts'): train_bpe(texts, 300)
    for own in VOCABULARIES[:2]:
        with pytest.raises(ValueError, match=r"has '\\ud800' at 1,000"): own.encode('x' * 1000 + '\ud800')
        for text in (tmp_path, b'text', None):
            with pytest.raises(ValueError, match='text must be'): own.encode(text)


@pytest.mark.parametrize('state,said', [
    ({}, 'kind'), ({'kind': 'wordpiece'}, "'wordpiece'"), ({'kind': 'bpe'}, 'words in state'),
    ({'kind': 'bpe', 'words': 'x', 'merges': []}, 'words in state'),
    (VOCABULARIES[1].state() | {'merges': None}, 'merges in state'),
    (VOCABULARIES[1].state() | {'merges': [[1, 2, 3]]}, 'merge 0')])
def test_states_of_no_vocabulary_are_refused(state, said):
    with pytest.raises(ValueError, match=said): tokenizer_of(state)


# States and fingerprints

@pytest.mark.parametrize('own', VOCABULARIES, ids=['bytes', 'english', 'chinese', 'emoji'])
def test_a_vocabulary_comes_back_from_its_state(own):
    again = tokenizer_of(json.loads(json.dumps(own.state())))
    assert type(again) is type(own) and again.pieces == own.pieces and again.fingerprint() == own.fingerprint()
    assert again.encode(ENGLISH[0]).tolist() == own.encode(ENGLISH[0]).tolist()
    assert len({*own.names}) == len(own) == len(own.pieces) and own.names[own.end] == r'\end'


def test_fingerprints_differ_by_every_merge_their_order_and_the_words(monkeypatch):
    merges = VOCABULARIES[1].state()['merges']
    other = [merges[1], merges[0], *merges[2:5]]
    some = [BPETokenizer(m) for m in ([], merges[:4], merges[:5], other)] + [ByteTokenizer()]
    prints = {t.fingerprint() for t in some}
    assert len(prints) == 5 and all(len(p) == 16 for p in prints)
    monkeypatch.setattr(vocabulary, '_WORDS', vocabulary.re.compile('.'))
    assert BPETokenizer([]).fingerprint() not in prints


def test_a_vocabulary_does_not_depend_on_the_order_of_texts_or_on_the_process():
    shuffled = random.Random(0).sample(ENGLISH, len(ENGLISH))
    assert train_bpe(shuffled, 500).fingerprint() == VOCABULARIES[1].fingerprint()
    code = ('from pydoc_data.topics import topics; from distill_nb.vocabulary import train_bpe; '
            'print(train_bpe([topics[k] for k in sorted(topics)[:12]], 500).fingerprint())')
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={'PYTHONHASHSEED': '7'} | {
        k: v for k, v in __import__('os').environ.items() if k != 'PYTHONHASHSEED'})
    assert ran.stdout.strip() == VOCABULARIES[1].fingerprint(), ran.stderr


def test_two_vocabularies_are_refused_by_name_and_told_the_other_way():
    a, b = VOCABULARIES[:2]
    check_vocabularies(a, ByteTokenizer())
    with pytest.raises(ValueError) as e: check_vocabularies(a, b, 'the text and the teacher')
    said = str(e.value)
    assert said.startswith('the text and the teacher must have') and 'Sequence-level' in said
    assert a.fingerprint() in said and b.fingerprint() in said and 'of 500 tokens' in said


def test_a_vocabulary_of_ones_own_needs_pieces_encode_and_state():
    class Letters(Tokenizer):
        pieces, end = (b'a', b'b', b''), 2
        def encode(self, text): return np.array([self.pieces.index(c.encode()) for c in text], np.int32)
        def state(self): return {'kind': 'letters'}
    own = Letters()
    assert own.decode(own.encode('abba')) == 'abba' and own.names == ['a', 'b', r'\end'] and len(own) == 3
    with pytest.raises(ValueError, match='Letters'): check_vocabularies(own, ByteTokenizer())


# Time and memory

def test_a_text_without_spaces_does_not_take_for_ever(monkeypatch):
    "Its words are all different: only so many are counted, the most frequent first, and long ones are cut."
    draw = random.Random(0)
    text, start = ''.join(draw.choices('abcdefghijklmnop', k=200_000)), time.process_time()
    own = train_bpe([text], 512)
    assert own.decode(own.encode(text)) == text and time.process_time() - start < 8
    monkeypatch.setattr(vocabulary, '_LETTERS', 1000)
    counted = [*_counted([text[:100_000], ' the' * 9])]
    assert sum(len(w) for w, _ in counted) <= 1000 and counted[0] == ([*b' the'], 9)
    firsts = Counter(w[0] for w, _ in counted[1:])
    assert len(firsts) > 5  # not those that come first by the alphabet


def test_a_long_text_is_encoded_in_seconds_and_what_is_remembered_is_bounded():
    own, text = BPETokenizer(VOCABULARIES[1].state()['merges']), ' '.join(ENGLISH)
    long, start = text * (2_000_000 // len(text)), time.process_time()
    assert own.decode(own.encode(long)) == long and time.process_time() - start < 4  # 2 MB
    many = ' '.join(f'{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676 % 26)}{chr(0x4e00 + i // 17576)}'
                    for i in range(70_000))
    assert own.decode(own.encode(many)) == many and len(own._known) <= 2**16
