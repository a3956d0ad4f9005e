"""The command that makes a small language model of a large one."""
import itertools, json, math, os, random, signal, subprocess, sys, time

import pytest
import torch
from torch import nn

from distill_nb import compare, language_run, methods
from distill_nb.files import fingerprint, locked, read_weights
from distill_nb.text import TextData
from distill_nb.gpt import GPTS, Size
from distill_nb.training import Setup
from distill_nb.causal import HFTokenizer, open_language_model, save_language_model
from distill_nb.language import DistillLM, LanguageModelling
from distill_nb.language_run import LanguageOptions, by_measure, read_language, settings_to_try
from distill_nb.run import Watch
from distill_nb.cli import distill_nb_language, run_command

from pretended_gpu import pretended
from processes import python

TINY = Size(16, 1, 2)
QUICK = ['--student', 'gpt_tiny', '--teacher', 'gpt_tiny', '--length', '16', '--vocabulary', '300', '--steps', '6',
         '--teacher_steps', '60', '--teacher_lr', '0.02', '--lr', '0.02', '--batch_size', '8', '--tries', '2',
         '--seeds', '2', '--device', 'cpu']
FILES = {'recipe.json', 'result.json', 'student.safetensors', 'teacher.safetensors', 'curves.png', 'comparison.png',
         'report.html', 'work', 'progress.json'}
WORDS = 'the cat sat on a mat while dogs ran over green hills and nobody saw where it went'.split()


def command(*argv): return run_command(distill_nb_language, [str(a) for a in argv])


def prose(seed, n=30):
    "Sentences in which each word depends on the one before it."
    draw, word, out = random.Random(seed), 'the', []
    for i in range(n * 8):
        word = WORDS[(WORDS.index(word) * 3 + draw.randrange(3)) % len(WORDS)]
        out.append(word + '.' * (i % 8 == 7))
    return ' '.join(out)


def written(folder, n=12):
    folder.mkdir(parents=True)
    for i in range(n): (folder/f'{i:02}.txt').write_text(prose(i))
    return folder


@pytest.fixture(scope='module', autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as m:
        m.setitem(GPTS, 'gpt_tiny', TINY)
        yield


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('language')
    written(home/'texts')
    return home


@pytest.fixture
def undrawn(monkeypatch):
    "Runs draw nothing, which takes most of their time."
    monkeypatch.setattr(language_run, '_drawn', lambda *_: {})
    monkeypatch.setattr(language_run, 'draw_topics', lambda *_: None)
    monkeypatch.setattr(language_run, 'as_png', lambda _: b'')


@pytest.fixture(scope='module')
def base(home): return ['--data', f"text:{home/'texts'}", *QUICK]


@pytest.fixture(scope='module')
def run(home, base):
    "A run, and what was measured in it, in order."
    seen, measure, choose = [], TextData.measure, methods.choose
    def noted(data, answers):
        seen.append(data.name.rsplit(' ', 1)[1])
        return measure(data, answers)
    def chosen(*args, **kw):
        found = choose(*args, **kw)
        seen.append('chosen')
        return found
    with pytest.MonkeyPatch.context() as m:
        m.setattr(TextData, 'measure', noted)
        m.setattr(methods, 'choose', chosen)
        assert command(*base, '--out', home/'run') == 0
    return home/'run', seen


@pytest.fixture(scope='module')
def taught(run, base):
    "Options with the teacher of that run, so that none is trained."
    return [*without(base, '--vocabulary', '--teacher', '--teacher_steps', '--teacher_lr'),
            '--teacher', run[0]/'teacher.safetensors']


def without(argv, *names):
    "Options without some of them."
    pairs = zip(argv[::2], argv[1::2])
    return [w for pair in pairs if pair[0] not in names for w in pair]


def result_of(folder): return json.loads((folder/'result.json').read_text())


def without_times(value):
    "A result without what is measured anew."
    times = {'latency_ms', 'seconds', 'seconds_per_epoch', 'resumed', 'command', 'name'}
    if isinstance(value, list): return [without_times(v) for v in value]
    if not isinstance(value, dict): return value
    return {k: without_times(v) for k, v in value.items() if k not in times}


# --- a run

def test_a_run_leaves_what_it_promises(run):
    folder, _ = run
    assert {p.name for p in folder.iterdir()} == FILES
    result = result_of(folder)
    assert [r['model'] for r in result['rows']] == ['teacher', 'alone', 'distilled']
    assert result['measure'] == ['bits_per_byte', False, False] and result['seeds'] == 2
    assert {'name', 'command', 'data', 'hardware', 'software', 'date', 'seconds'} <= set(result)
    teacher, alone, distilled = result['rows']
    for row in result['rows']:
        assert {'perplexity', 'accuracy', 'agreement', 'parameters', 'macs', 'bytes', 'latency_ms', 'teacher_bits',
                'own_bits'} <= set(row)
    assert teacher['agreement'] == 1 and teacher['teacher_bits'] == teacher['own_bits']
    assert distilled['difference'] == pytest.approx(distilled['bits_per_byte'] - alone['bits_per_byte'])
    assert (distilled['method'], distilled['top'], distilled['cache']) == ('forward_kl', 32, 'all')
    assert [len(row['runs']) for row in (alone, distilled)] == [2, 2]
    assert set(distilled['chosen']) == {'alpha', 'dropout'} and set(alone['chosen']) == {'dropout'}
    page = (folder/'report.html').read_text()
    assert page.count('data:image/png;base64,') == 3 and f"{distilled['bits_per_byte']:.3f}" in page
    assert 'calibration' not in page and all(cell in page for cell in by_measure(result['rows']).rows[0])
    assert '--data text:' in result['command'] and str(folder) in result['command']


def test_the_text_stands_with_the_numbers(run, home):
    result = result_of(run[0])
    splits, _ = read_language(LanguageOptions(data=f"text:{home/'texts'}", length=16), 300)
    for kind, data in splits._asdict().items():
        said = result['text'][kind]
        assert said['fingerprint'] == data.fingerprint() and said['tokens'] == len(data.tokens) - 1
        assert said['documents'] == len(data.row.names) and said['bytes'] == int(data.row.sizes.sum())
    assert result['text']['vocabulary']['fingerprint'] == splits.train.tokenizer.fingerprint()
    assert splits.test.fingerprint() in result['data'] and result['text']['length'] == 16
    assert result['rows'][0]['bits_per_byte'] < result['text']['unigram_bits_per_byte']
    names = [r['document'] for r in result['topics']]
    assert names == list(splits.test.row.names) and [s['document'] for s in result['samples']] == names[:4]


def bits_of(model, data):
    "Bits per byte in float64, token by token: an independent reference."
    t, total, model = data.tokens.long(), 0., model.double().eval()
    for start in range(0, len(t) - 1, data.length):
        x, y = t[start:start + data.length][:len(t) - 1 - start], t[start + 1:start + data.length + 1]
        with torch.no_grad(): z = model(x[None])[0]
        for row, label in zip(z.tolist(), y.tolist()):
            most = max(row)
            total += most + math.log(sum(math.exp(v - most) for v in row)) - row[label]
    return total / math.log(2) / int(data.row.sizes.sum())


def test_the_student_in_the_file_reaches_what_the_table_says(run, home):
    folder, result = run[0], result_of(run[0])
    found = open_language_model(str(folder/'student.safetensors'))
    splits, _ = read_language(LanguageOptions(data=f"text:{home/'texts'}", length=16), found.tokenizer)
    assert splits.test.fingerprint() == result['text']['test']['fingerprint'] and found.trained
    best = min(result['rows'][2]['runs'], key=lambda r: r['valid_bits_per_byte'])
    assert bits_of(found.model, splits.test) == pytest.approx(best['bits_per_byte'], rel=1e-6)
    assert float(found.facts['valid_bits_per_byte']) == pytest.approx(best['valid_bits_per_byte'])
    topics, name = result['topics'], result['shown']['models'][2]
    mean = sum(t[name] * t['bytes'] for t in topics) / sum(t['bytes'] for t in topics)
    assert mean == pytest.approx(best['bits_per_byte'], rel=1e-6)
    teacher = open_language_model(str(folder/'teacher.safetensors'))
    assert bits_of(teacher.model, splits.test) == pytest.approx(result['rows'][0]['bits_per_byte'], rel=1e-6)


def test_the_test_split_is_read_after_all_choices(run):
    seen = run[1]
    assert seen.count('chosen') == 2 and 'test' in seen and 'valid' in seen
    assert seen.index('test') > len(seen) - 1 - seen[::-1].index('chosen')


def test_both_students_have_as_many_tries_and_start_alike(taught, home, undrawn):
    seen, fit = [], compare.fit
    def noted(objective, data, recipe, valid=None, **kw):
        seen.append((type(objective), fingerprint(objective.model.state_dict()), recipe.seed, recipe.steps,
                     recipe.keep, len(data)))
        return fit(objective, data, recipe, valid, **kw)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(compare, 'fit', noted)
        assert command(*taught, '--tries', 4, '--parts', '1,0.5', '--out', home/'parts') == 0
    for part, n in (('all_text', 1.), ('part_0.5', 0.5)):
        tries = result_of(home/'parts')['tries'][part]
        assert sum(t['method'] == 'alone' for t in tries) == sum(t['method'] == 'distilled' for t in tries) == 4
    full = max(s[5] for s in seen)
    for n in (full, round(full/2)):
        mine = [s for s in seen if s[5] == n]
        tried = [s for s in mine if s[2] == 1000]
        assert len(tried) == 8 and len({s[1] for s in tried}) == 1
        for seed in (0, 1):
            alone, distilled = (s for s in mine if s[2] == seed)
            assert (alone[0], distilled[0]) == (LanguageModelling, DistillLM) and alone[1:] == distilled[1:]
    assert {s[3:5] for s in seen} == {(6, 'best')}
    rows = result_of(home/'parts')['rows']
    assert [r['setting'] for r in rows] == ['all_text']*3 + ['part_0.5']*3
    assert rows[0]['bits_per_byte'] == rows[3]['bits_per_byte']  # one teacher, which has learned from all


def test_arms_are_compared_and_each_says_what_it_is(taught, home, undrawn):
    out = home/'arms'
    assert command(*taught, '--divergence', 'forward_kl,reverse_kl', '--top', '8,0', '--alpha', 0.9, '--dropout', 0,
                   '--out', out) == 0
    result = result_of(out)
    names = [f'{w}_{k}' for w in ('forward_kl', 'reverse_kl') for k in ('top_8', 'all')]
    assert [r['model'] for r in result['rows']] == ['teacher', 'alone', *names]
    assert [r['top'] for r in result['rows'][2:]] == [8, 0, 8, 0] and result['tries'] == {'all_text': []}
    assert len(by_measure(result['rows']).rows) == 4
    values = [r['bits_per_byte'] for r in result['rows'][2:]]
    assert len(set(values)) == 4 and max(values) - min(values) < 1


def test_kept_answers_are_those_of_the_live_teacher(taught, home, undrawn):
    given = [*taught, '--alpha', 1, '--dropout', 0, '--seeds', 1]
    assert command(*given, '--cache', 'live', '--out', home/'live') == 0
    assert command(*given, '--cache', 'all', '--top', 0, '--out', home/'kept') == 0
    live, kept = (result_of(home/name)['rows'][2] for name in ('live', 'kept'))
    assert (live['cache'], kept['cache']) == ('live', 'all')
    assert live['bits_per_byte'] == pytest.approx(kept['bits_per_byte'], abs=2e-3)  # they are kept in 16 bits


def test_the_command_on_a_card(taught, home, capsys, undrawn):
    with pretended():
        assert command(*taught, '--device', 'cuda', '--seeds', 1, '--out', home/'card') == 0
    assert 'on cuda' in capsys.readouterr().out


def test_the_difference_of_bits_is_the_reverse_divergence():
    draw = random.Random(0)
    runs = lambda: [dict(seed=i, bits_per_byte=draw.random(), teacher_bits=draw.random(), own_bits=draw.random())
                    for i in range(3)]
    alone, other = (dict(setting='all_text', model=name, runs=runs()) for name in ('alone', 'jsd'))
    shown = by_measure([alone, other | {'difference': 0.}]).rows[0][-1]
    gaps = [a['teacher_bits'] - a['own_bits'] - b['teacher_bits'] + b['own_bits']
            for a, b in zip(other['runs'], alone['runs'])]
    assert float(shown.split()[0]) == pytest.approx(sum(gaps)/3, abs=6e-4)
    for change, word in ((-9, 'better'), (9, 'worse')):
        moved = [run | {'own_bits': run['own_bits'] - change} for run in other['runs']]
        assert by_measure([alone, other | {'difference': 0., 'runs': moved}]).rows[0][-1].endswith(word)


def test_the_tries_are_of_equal_number_and_differ():
    for n in range(1, 9):
        for distilled in (False, True):
            found = settings_to_try(n, distilled)
            assert len(found) == n and found == settings_to_try(8, distilled)[:n]


# --- where it goes on

SLOW = [pytest.param(moment, marks=pytest.mark.slow) for moment in ('teaching', 'learning', 'judging')]


@pytest.mark.parametrize('moment', ['writing', *SLOW])
def test_an_interrupted_run_ends_as_one_that_was_not(moment, run, home, base, undrawn, monkeypatch, capsys):
    out, count = home/moment, itertools.count()
    def stop(*_, **__): raise KeyboardInterrupt
    def after(n, function): return lambda *a, **kw: function(*a, **kw) if next(count) < n else stop()
    with monkeypatch.context() as m:
        m.setattr(LanguageOptions, 'setup', lambda o, folder: Setup(
            folder/'work', True, torch.device('cpu'), save_every=0, log=Watch(folder)))
        if moment == 'teaching': m.setattr(LanguageModelling, 'forward', after(30, LanguageModelling.forward))
        if moment == 'learning': m.setattr(DistillLM, 'forward', after(16, DistillLM.forward))
        if moment == 'judging': m.setattr(language_run, 'samples_cost', after(2, language_run.samples_cost))
        if moment == 'writing': m.setattr(language_run, 'save_language_model', stop)
        assert command(*base, '--out', out) == 130
    assert f'--out {out} --resume' in capsys.readouterr().err and not (out/'result.json').exists()
    assert command(*base, '--out', out, '--resume') == 0
    for who in ('student', 'teacher'):
        own, other = (read_weights(f/f'{who}.safetensors')[0] for f in (out, run[0]))
        assert own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)
    assert without_times(result_of(out)) == without_times(result_of(run[0]))


def test_a_killed_run_resumes_to_the_same_result(run, home, base, undrawn):
    out = home/'killed'
    code = ('from distill_nb.gpt import GPTS, Size; GPTS["gpt_tiny"] = Size(16, 1, 2)\n'
            'from distill_nb.cli import *; main_language()')
    p = subprocess.Popen([*python(), '-c', code, *map(str, base), '--out', str(out)],
                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    there = lambda: list(out.glob('work/all_text/tries/distilled/*/checkpoint.safetensors'))
    while p.poll() is None and not there(): time.sleep(0.005)
    assert p.poll() is None
    if os.name == 'posix':  # a second process is refused
        assert command(*base, '--out', out, '--resume') == 2
    p.send_signal(signal.SIGKILL)
    p.communicate()
    assert not (out/'result.json').exists()
    assert command(*base, '--out', out, '--resume') == 0
    assert without_times(result_of(out)) == without_times(result_of(run[0]))


def test_a_folder_is_for_one_process(base, home, capsys):
    (home/'taken').mkdir()
    with locked(home/'taken', 'out'): assert command(*base, '--out', home/'taken') == 2
    assert 'taken' in capsys.readouterr().err


def test_a_finished_run_is_only_read_again_when_asked(run, base, capsys, undrawn):
    folder, before = run[0], without_times(result_of(run[0]))
    assert command(*base, '--out', folder) == 2 and '--resume' in capsys.readouterr().err
    assert command(*base, '--steps', 7, '--out', folder, '--resume') == 2
    assert 'another run (steps was 6' in capsys.readouterr().err
    assert command(*base, '--out', folder, '--resume') == 0 and without_times(result_of(folder)) == before


def test_a_teacher_of_an_earlier_run_is_examined_and_not_trained(run, home, base, capsys, undrawn):
    given = [*base, '--teacher', run[0]/'teacher.safetensors', '--tries', 1, '--seeds', 1]
    plain = without(given, '--vocabulary')
    assert command(*given, '--out', home/'again') == 2 and 'brings its own of 300' in capsys.readouterr().err
    assert command(*plain, '--out', home/'again') == 0
    assert 'teacher_steps is not used' in capsys.readouterr().out
    row, before = (result_of(f)['rows'][0] for f in (home/'again', run[0]))
    assert row['bits_per_byte'] == pytest.approx(before['bits_per_byte']) and row['seconds'] == 0
    assert not (home/'again'/'teacher.safetensors').exists()


# --- wrong input

def faults(place):
    "Folders that can't be right."
    for name in ('empty', 'blank', 'short', 'binary', 'latin', 'images', 'few'): (place/name).mkdir()
    for i in range(12):
        (place/'blank'/f'{i}.txt').write_text(' \n')
        (place/'binary'/f'{i}.txt').write_bytes(bytes(range(256)))
        (place/'latin'/f'{i}.txt').write_bytes('süß und schön'.encode('latin-1'))
        (place/'images'/f'{i}.png').write_bytes(b'no text')
    (place/'short'/'a.txt').write_text('three words only')
    written(place/'giant')
    with open(place/'giant'/'log.txt', 'wb') as f: f.truncate(2**30)


@pytest.mark.parametrize('argv, said', [
    (['--data', 'text:nowhere'], 'nowhere'), (['--data', 'text:'], 'text:PATH'), (['--data', 'digits'], 'text:PATH'),
    (['--data', 'folder:texts'], 'text:PATH'), (['--data', 'text:empty'], 'empty'),
    (['--data', 'text:blank'], 'blank'), (['--data', 'text:short'], 'short'), (['--data', 'text:binary'], 'binary'),
    (['--data', 'text:latin'], 'iconv'), (['--data', 'text:images'], 'images'), (['--data', 'text:giant'], 'log.txt'),
    (['--length', '100000'], 'length'), (['--length', '1'], 'length'), (['--views', '0'], 'views'),
    (['--views', '17'], 'views'), (['--vocabulary', '256'], 'vocabulary'), (['--vocabulary', '70000'], 'vocabulary'),
    (['--parts', '0'], 'parts'), (['--parts', '1,1'], 'parts'), (['--parts', '2'], 'parts'),
    (['--parts', 'half'], 'parts'), (['--parts', '1e-9'], 'parts'),
    (['--divergence', 'backward_kl'], 'forward_kl, reverse_kl, jsd'), (['--divergence', 'jsd,jsd'], 'divergence'),
    (['--top', '-1'], 'top'), (['--top', '300'], 'less than'), (['--top', 'most'], 'top'),
    (['--cache', '8'], 'auto, live or all'), (['--cache', 'live', '--top', '8'], 'top'),
    (['--temperature', '0'], 'temperature'), (['--alpha', '1.5'], 'alpha'), (['--dropout', '1'], 'dropout'),
    (['--tries', '9'], 'tries'), (['--tries', '0'], 'tries'), (['--seeds', '0'], 'seeds'), (['--steps', '0'], 'steps'),
    (['--teacher_steps', '0'], 'teacher_steps'), (['--teacher_lr', '-1'], 'teacher_lr'), (['--lr', 'nan'], 'lr'),
    (['--batch_size', '99999'], 'training windows'), (['--teacher', 'gpt_huge'], 'gpt_mini'),
    (['--student', 'resnet20'], 'gpt_micro'), (['--teacher', 'none.safetensors'], 'none.safetensors'),
    (['--out', 'texts/run'], 'not within that of the texts'), (['--resume'], 'holds no run'),
    (['--device', 'abacus'], 'device'), (['--precision', 'int1'], 'precision'), (['--log', 'diary'], 'log'),
    (['--data', 'english', '--skip_damaged'], 'skip_damaged')])
def test_bad_input_is_one_line_and_leaves_nothing(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path/'texts')
    faults(tmp_path)
    before = sorted(map(str, tmp_path.rglob('*')))
    options = dict(zip(QUICK[::2], QUICK[1::2])) | {'--data': 'text:texts', '--out': 'run'}
    given = [w for k, v in options.items() if k not in argv for w in (k, v)]
    assert command(*given, *argv) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and err.startswith('distill_nb_language: ') and said in err, err
    assert sorted(map(str, tmp_path.rglob('*'))) == before


def test_texts_in_other_scripts_and_damaged_files(tmp_path, capsys, undrawn):
    folder = written(tmp_path/'texts', 4)
    for i, text in enumerate(('Съешь же ещё этих мягких французских булок. ', 'いろはにほへと ちりぬるを。', '👩‍🚀 über Straße\r\n')):
        (folder/f'other{i}.md').write_text(text * 60, encoding='utf-8', newline='')
    (folder/'bad.txt').write_bytes('süß'.encode('latin-1'))
    argv = ['--data', f'text:{folder}', *QUICK, '--out', tmp_path/'run', '--tries', 1, '--seeds', 1]
    assert command(*argv) == 2 and 'bad.txt' in capsys.readouterr().err
    assert command(*argv, '--skip_damaged') == 0
    assert 'Left out: 1' in capsys.readouterr().out


def test_a_teacher_that_knows_nothing_is_refused(run, home, base, capsys):
    found = open_language_model(str(run[0]/'teacher.safetensors'))
    plain = without(base, '--vocabulary')
    for name, change in (('fresh', lambda p: nn.init.normal_(p, std=0.02)), ('nan', lambda p: p.data.fill_(math.nan))):
        for p in found.model.parameters(): change(p)
        save_language_model(found.model, found.tokenizer, home/f'{name}.safetensors')
    for name, said in (('fresh', 'no better than what a guesser'), ('nan', 'finite')):
        assert command(*plain, '--teacher', home/f'{name}.safetensors', '--out', home/name) == 2
        err = capsys.readouterr().err
        assert said in err and err.count('\n') == 1 and not (home/name).exists(), err


# --- models of transformers

def tokens_of(folder, texts, size):
    "A vocabulary of transformers, made of texts."
    import tokenizers, transformers
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=['<|end|>'], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token='<|end|>').save_pretrained(str(folder))


@pytest.fixture(scope='module')
def hubs(home):
    "Folders as transformers has them: configurations alone, with a vocabulary or none."
    transformers = pytest.importorskip('transformers')
    texts = [p.read_text() for p in (home/'texts').iterdir()]
    small = dict(vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                 max_position_embeddings=32)
    llama = transformers.LlamaConfig(**small)
    gpt2 = transformers.GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    for name, config, size in (('teacher', llama, 290), ('student', gpt2, 290), ('bare', gpt2, None),
                               ('other', gpt2, 280),
                               ('bert', transformers.T5Config(), 290)):
        config.save_pretrained(str(home/'hf'/name))
        if size: tokens_of(home/'hf'/name, texts, size)
    return home/'hf'


def test_folders_of_transformers_are_teacher_and_student(base, hubs, home, capsys, undrawn):
    own, n = without(base, '--vocabulary'), len(HFTokenizer(hubs/'teacher'))
    argv = [*own, '--teacher', f"hf:{hubs/'teacher'}", '--student', f"hf:{hubs/'student'}", '--out', home/'hf run']
    assert command(*argv) == 0
    said = capsys.readouterr().out
    assert 'teacher: ' in said and 'random' in said and f'vocabulary of {n}' in said
    folder, result = home/'hf run', result_of(home/'hf run')
    drawn, ours = {'curves.png', 'comparison.png'}, {'student', 'teacher'}
    assert {p.name for p in folder.iterdir()} == FILES - drawn - {f'{who}.safetensors' for who in ours} | ours
    student, teacher = (open_language_model(f'hf:{folder/who}') for who in ('student', 'teacher'))
    assert student.trained and len(student.tokenizer) == n
    splits, _ = read_language(LanguageOptions(data=f"text:{home/'texts'}", length=16), student.tokenizer)
    best = min(result['rows'][2]['runs'], key=lambda r: r['valid_bits_per_byte'])
    assert bits_of(student.model, splits.test) == pytest.approx(best['bits_per_byte'], rel=1e-6)
    assert bits_of(teacher.model, splits.test) == pytest.approx(result['rows'][0]['bits_per_byte'], rel=1e-6)
    row = result_of(home/'hf run')['rows'][0]
    again = [*own, '--teacher', f"hf:{folder/'teacher'}", '--student', 'gpt_tiny', '--tries', 1, '--seeds', 1]
    assert command(*again, '--out', home/'mixed') == 0  # its vocabulary goes to a student of ours
    found = result_of(home/'mixed')['rows'][0]
    assert found['bits_per_byte'] == pytest.approx(row['bits_per_byte'], rel=1e-5) and found['seconds'] == 0
    mixed = open_language_model(str(home/'mixed'/'student.safetensors'))
    assert mixed.tokenizer.fingerprint() == student.tokenizer.fingerprint()


def test_a_folder_without_a_vocabulary_takes_that_of_the_text(base, hubs, home, undrawn):
    argv = [*base, '--teacher', 'gpt_tiny', '--student', f"hf:{hubs/'bare'}", '--tries', 1, '--seeds', 1]
    assert command(*argv, '--out', home/'bare run') == 0
    assert len(open_language_model(f"hf:{home/'bare run'/'student'}").tokenizer) == 300


@pytest.mark.parametrize('given, said', [
    (dict(student='other'), ['student', 'other', 'the same vocabulary', 'Sequence-level']),
    (dict(student='bert'), ['sequence to sequence']), (dict(teacher='nowhere'), ['nowhere']),
    (dict(length='33'), ['length', '32'])])
def test_folders_that_do_not_fit_are_one_line(given, said, base, hubs, home, capsys):
    names = dict(teacher='teacher', student='student') | given
    argv = [*without(base, '--vocabulary', '--length'), '--length', names.pop('length', 16)]
    for who, name in names.items(): argv += [f'--{who}', f'hf:{hubs/name}']
    assert command(*argv, '--out', home/'never') == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and all(word in err for word in said) and not (home/'never').exists(), err


def test_without_transformers_a_folder_says_what_to_install(base, hubs, home, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    assert command(*without(base, '--vocabulary'), '--teacher', f"hf:{hubs/'teacher'}", '--out', home/'lacks') == 2
    assert "pip install 'distill_nb[language]" in capsys.readouterr().err
