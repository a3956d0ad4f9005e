"""The command from end to end, and what it says when something is wrong."""
import inspect, json, os, re, signal, subprocess, sys, time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from PIL import Image

from distill_nb import cli, run
from distill_nb.files import locked, read_weights, save_weights
from distill_nb.inference import open_student, predictions
from distill_nb.protocol import Measure
from distill_nb.data import ImageData, digits
from distill_nb.sets import load_data
from distill_nb.models import resnet18
from distill_nb.training import evaluate, predict
from distill_nb.compare import interval, paired, share_interval
from distill_nb.zoo import build_model, load_weights, open_model
from distill_nb.methods import METHODS
from distill_nb.report import result_table, stored_result, verdicts
from distill_nb.run import PRESETS, command_line, free_folder
from distill_nb.export_run import ExportOptions
from distill_nb.plan_run import PlanOptions
from distill_nb.embed_run import EmbedOptions
from distill_nb.language_run import LanguageOptions
from distill_nb.bench import distill_nb_bench
from distill_nb.cli import (command_parser, distill_nb, distill_nb_data_free, distill_nb_embed, distill_nb_export,
                            distill_nb_language, distill_nb_plan, distill_nb_predict, run_command)
from processes import python

QUICK = ['--epochs', '2', '--teacher_epochs', '3', '--seeds', '2', '--temperature', '4', '--alpha', '0.9']
SHORT = ['--epochs', '1', '--teacher_epochs', '1', '--seeds', '1', '--labels', '0', *QUICK[6:]]
COLUMNS = {'setting', 'model', 'accuracy', 'ci95', 'agreement', 'ece', 'parameters', 'macs', 'bytes', 'latency_ms',
           'seconds'}
ACCURACY = Measure('accuracy', share=True)
DIGIT_PAIR = ['--teacher', 'digit_teacher', '--student', 'digit_student']


def command(*argv): return run_command(distill_nb, [str(a) for a in argv])


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cli')/'run'
    assert command(*QUICK, '--out', folder) == 0
    return folder


def photos(folder, size=16, n=40, classes=('cat', 'dog', 'owl')):
    for split in ('train', 'test'):
        for c, name in enumerate(classes):
            (folder/split/name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                x = torch.randint(0, 60, (size, size, 3)) + torch.tensor([90 * (c == k) for k in range(3)])
                Image.fromarray(x.to(torch.uint8).numpy()).save(folder/split/name/f'{i}.png')
    return folder


# --- a whole run

def test_a_run_leaves_all_that_it_promises(finished):
    files = {'result.json', 'curves.png', 'comparison.png', 'teacher.safetensors', 'student.safetensors', 'recipe.json',
             'report.html', 'work', 'progress.json'}
    assert {p.name for p in finished.iterdir()} == files
    result = json.loads((finished/'result.json').read_text())
    about = {'name', 'command', 'data', 'hardware', 'software', 'date', 'seeds', 'seconds', 'rows', 'measure'}
    assert about <= set(result) and Measure(*result['measure']) == ACCURACY
    rows = {(r['setting'], r['model']): r for r in result['rows']}
    assert set(rows) == {(s, m) for s in ('all_labels', 'few_labels') for m in ('teacher', 'alone', 'distilled')}
    for (_, model), r in rows.items():
        assert COLUMNS <= set(r) and 0 <= r['accuracy'] <= 1 and r['latency_ms'] > 0
        assert r['ci95'][0] <= r['accuracy'] <= r['ci95'][1]
        assert ('difference' in r) == (model == 'distilled')
        if model == 'distilled':
            low, high = r['difference_ci95']
            assert low <= r['difference'] <= high
    assert rows['all_labels', 'alone']['parameters'] == 678 and rows['all_labels', 'teacher']['agreement'] == 1
    assert result['command'].startswith('distill_nb --temperature 4.0 --alpha 0.9 --epochs 2.0')
    for name in ('curves.png', 'comparison.png'): assert Image.open(finished/name).size[0] > 500


def test_a_result_holds_every_measure_of_every_seed_and_wilsons_interval_for_one_model(finished):
    rows = json.loads((finished/'result.json').read_text())['rows']
    for r in rows:
        if r['model'] == 'teacher':
            assert r['ci95'] == share_interval(round(359 * r['accuracy']), 359)
            assert r['interval_over'] == 'test images' and 'runs' not in r
            continue
        assert [run['seed'] for run in r['runs']] == [0, 1] and r['interval_over'] == 'seeds'
        measures = {'accuracy', 'balanced_accuracy', 'loss', 'agreement', 'ece', 'seconds'}
        more = {'seed', 'valid_accuracy', 'class_accuracy', 'steps', 'planned'}
        assert all(set(run) == measures | more for run in r['runs'])
        assert r['ci95'] == interval(run['accuracy'] for run in r['runs'])[1]
        for k in measures: assert r[k] == pytest.approx(sum(run[k] for run in r['runs']) / 2)
    few = {r['model']: r for r in rows if r['setting'] == 'few_labels'}
    distilled = few['distilled']
    assert paired(distilled, few['alone'], 'accuracy') == (distilled['difference'], distilled['difference_ci95'])


def test_rows_are_paired_by_seed_wherever_they_come_from():
    def row(**found): return {'runs': [{'seed': int(s[1:]), 'accuracy': a} for s, a in found.items()]}
    assert paired(row(s0=0.5, s1=0.9), row(s1=0.8, s0=0.4), 'accuracy')[1] == pytest.approx([0.1, 0.1])
    with pytest.raises(ValueError, match=r'same seeds for every contender.*\[1\]'):
        paired(row(s0=0.5, s1=0.9), row(s0=0.4), 'accuracy')


def test_intervals_are_printed_by_their_ends(finished):
    rows = json.loads((finished/'result.json').read_text())['rows']
    shown, page = result_table(rows, ACCURACY), (finished/'report.html').read_text()
    for r, cells in zip(rows, shown.rows):
        cell = f"{100 * r['accuracy']:.2f} [{100 * r['ci95'][0]:.2f}, {100 * r['ci95'][1]:.2f}]"
        assert cells[shown.head.index('accuracy % [95 %]')] == cell and cell in page
    assert '±' not in page and "Wilson&#x27;s" not in page and "Wilson's over the test images" in page


def test_a_stored_result_is_read_in_todays_form_and_says_what_it_said():
    import importlib.resources
    found = set()
    for file in (importlib.resources.files('distill_nb')/'results').iterdir():
        if not file.name.endswith('.json'): continue
        old = json.loads(file.read_text())
        new = stored_result(old['name'])
        measure = Measure(*old['measure']) if old.get('measure') else ACCURACY
        assert new == old | {'measure': measure, 'rows': new['rows']}
        for was, row in zip(old['rows'], new['rows'], strict=True):
            if 'accuracies' in was:
                assert [r['accuracy'] for r in row['runs']] == was['accuracies']
                assert [r['seconds'] for r in row['runs']] == was['run_seconds']
                assert [r['seed'] for r in row['runs']] == list(range(old['seeds']))
                assert not {'accuracies', 'run_seconds'} & set(row)
            if 'ci95' not in was: continue
            found.add(was['interval_over'])
            if was['interval_over'] == 'seeds' and isinstance(was['ci95'], float):
                assert row['ci95'] == [was['accuracy'] - was['ci95'], was['accuracy'] + was['ci95']]
            elif was['interval_over'] == 'test images':
                n = int(re.search(r'([0-9,]+) test images', old['data'])[1].replace(',', ''))
                right = was[measure.name] * n
                assert right == pytest.approx(round(right), abs=1e-6) and row['ci95'] == share_interval(round(right), n)
    assert found == {'seeds', 'test images', 'test windows'}


def test_a_share_near_one_is_not_said_to_be_known_better_than_it_is():
    shown = result_table(stored_result('digits')['rows'], ACCURACY)
    assert shown.rows[0][shown.head.index('accuracy % [95 %]')] == '99.44 [97.99, 99.85]'  # Wald: 98.67 to 100.21


def test_the_weights_are_those_that_were_reported(finished):
    data, result = digits(), json.loads((finished/'result.json').read_text())
    teacher = load_weights(build_model('digit_teacher', 10, 1, 8), finished/'teacher.safetensors')
    row = next(r for r in result['rows'] if r['model'] == 'teacher')
    assert evaluate(teacher, data.test).accuracy == pytest.approx(row['accuracy'])
    student = load_weights(build_model('digit_student', 10, 1, 8), finished/'student.safetensors')
    about = read_weights(finished/'student.safetensors')[1]
    assert evaluate(student, data.valid).accuracy == pytest.approx(float(about['valid_accuracy']))
    assert about['trained'] == 'distilled'
    row = next(r for r in result['rows'] if r['model'] == 'alone')
    assert (finished/'student.safetensors').stat().st_size == pytest.approx(row['bytes'], abs=400)


@pytest.mark.parametrize('who', ['student', 'teacher'])
def test_both_files_say_all_that_is_needed_to_use_them(who, finished):
    data, path = digits(), finished/f'{who}.safetensors'
    about = read_weights(path)[1]
    facts = {k: json.loads(about[k]) for k in ('classes', 'channels', 'side', 'size', 'mean', 'std', 'valid_items')}
    assert facts == {'classes': data.train.classes, 'channels': 1, 'side': 8, 'size': 8, 'mean': data.train.mean,
                     'std': data.train.std, 'valid_items': len(data.valid)}
    assert about['architecture'] == f'digit_{who}' and 'whole' not in about
    network = open_model(path)
    assert evaluate(network, data.valid).accuracy == pytest.approx(float(about['valid_accuracy']))
    assert network.reached == {'accuracy': float(about['valid_accuracy']), 'items': len(data.valid)}


def test_the_student_of_a_run_names_the_classes_of_files_as_in_the_run(finished, tmp_path):
    test = digits().test
    for i in range(40): Image.fromarray(test.x[i, 0].numpy()).save(tmp_path/f'{i:02}.png')
    network, form = open_student(finished/'student.safetensors')
    model = load_weights(build_model('digit_student', 10, 1, 8), finished/'student.safetensors')
    expected = predict(model, test.subset(torch.arange(40)), 40).double().softmax(1)
    found = list(predictions(network, tmp_path, form))
    assert [p.classes for p in found] == [[test.classes[c]] for c in expected.argmax(1)]
    assert [p.probabilities for p in found] == expected.amax(1, keepdim=True).tolist()


def test_every_command_has_an_entry_point():
    import importlib
    scripts = (Path(__file__).parent.parent/'pyproject.toml').read_text().split('[project.scripts]')[1].split('[')[0]
    found = dict(re.findall(r'^(\w+) = "(.+)"$', scripts, re.M))
    assert set(found) == {'distill_nb', 'distill_nb_bench', 'distill_nb_data_free', 'distill_nb_embed',
                          'distill_nb_export', 'distill_nb_language', 'distill_nb_plan', 'distill_nb_predict'}
    for place in found.values():
        module, function = place.split(':')
        assert callable(getattr(importlib.import_module(module), function))


def test_the_report_needs_nothing_beside_it(finished):
    page = (finished/'report.html').read_text()
    assert page.count('data:image/png;base64,') == 2 and not re.search(r'(?:src|href)=.(?!data:)', page)
    for r in json.loads((finished/'result.json').read_text())['rows']: assert f"{100 * r['accuracy']:.2f}" in page


def test_a_finished_run_is_only_read_again_when_asked(finished, capsys):
    before = json.loads((finished/'result.json').read_text())
    assert command(*QUICK, '--out', finished) == 2
    assert '--resume' in capsys.readouterr().err
    assert command(*QUICK, '--out', finished, '--resume') == 0
    after = json.loads((finished/'result.json').read_text())
    def strip(result):
        "The rows without what is measured anew: seconds and latencies."
        new = ('latency_ms', 'seconds', 'runs', 'seconds_per_epoch')
        rows = [{k: v for k, v in row.items() if k not in new} for row in result['rows']]
        return rows, [[run | {'seconds': 0} for run in row.get('runs', [])] for row in result['rows']]
    assert strip(after) == strip(before)


def test_a_killed_run_resumes_to_the_same_result(finished, tmp_path):
    folder = tmp_path/'run'
    p = subprocess.Popen([*python(), '-m', 'distill_nb', *QUICK, '--out', str(folder)], stdout=subprocess.PIPE)
    while p.poll() is None and not list(folder.glob('work/all_labels/*/checkpoint.safetensors')): time.sleep(0.01)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    assert not (folder/'result.json').exists()
    assert command(*QUICK, '--out', folder, '--resume') == 0
    accuracies = lambda f: [r['accuracy'] for r in json.loads((f/'result.json').read_text())['rows']]
    assert accuracies(folder) == accuracies(finished)


def test_a_folder_of_photos_and_the_choice_of_temperature_and_alpha(tmp_path, capsys):
    data = photos(tmp_path/'photos')
    argv = ['--data', f'folder:{data}', *DIGIT_PAIR, '--epochs', 2, '--seeds', 2, '--labels', 6, '--alpha', 0.5]
    assert command(*argv, '--lr', 0.02, '--batch_size', 8, '--precision', 'float32', '--out', tmp_path/'run') == 0
    result = json.loads((tmp_path/'run'/'result.json').read_text())
    assert {len(t) for t in result['tries'].values()} == {3}
    assert all(t['alpha'] == 0.5 for tries in result['tries'].values() for t in tries)
    assert result['labelled_images']['few_labels'] == 6
    assert 'chosen on the validation split' in capsys.readouterr().out


def test_a_student_that_gets_a_token_is_saved_under_a_name_that_opens_it(tmp_path, capsys):
    pair = ['--teacher', 'digit_teacher', '--method', 'token', '--labels', 0, '--epochs', 1, '--teacher_epochs', 12,
            '--seeds', 1, '--size', 8]
    argv = ['--data', f"folder:{photos(tmp_path/'photos')}", *pair, '--batch_size', 8, '--precision', 'float32']
    assert command(*argv, '--student', 'vit_tiny_8', '--temperature', 1, '--alpha', 0.5, '--out', tmp_path/'run') == 0
    rows = {r['model']: r for r in json.loads((tmp_path/'run'/'result.json').read_text())['rows']}
    assert rows['token']['parameters'] > rows['alone']['parameters'] and rows['token']['method'] == 'token'
    assert hasattr(open_model(tmp_path/'run'/'student.safetensors').model, 'dist_token')
    (tmp_path/'my.py').write_text("""from distill_nb.vit import ViT
def net(classes, channels, size): return ViT(size, 4, 16, 1, 2, classes, channels)""")
    capsys.readouterr()
    assert command(*argv, '--student', f"{tmp_path/'my.py'}:net", '--out', tmp_path/'own') == 2
    assert 'a ViT that has its token already' in capsys.readouterr().err and not (tmp_path/'own').exists()


def test_trained_weights_bring_their_normalisation_and_are_not_trained_again(finished, tmp_path):
    train, found = digits().train, open_model(finished/'teacher.safetensors')
    assert (found.mean, found.std) == (train.mean, train.std)
    weights = finished/'teacher.safetensors'
    assert command(*QUICK, '--teacher_weights', weights, '--labels', 0, '--out', tmp_path/'run') == 0
    rows = json.loads((tmp_path/'run'/'result.json').read_text())['rows']
    assert {r['setting'] for r in rows} == {'all_labels'} and rows[0]['seconds'] == 0


def test_both_settings_and_all_seeds_share_the_kept_answers(finished):
    file, = (finished/'work'/'answers').iterdir()
    assert file.stat().st_size == 4096 + 1079*9*2*(10 + 2)
    row = next(r for r in json.loads((finished/'result.json').read_text())['rows'] if r['model'] == 'distilled')
    assert row['answers'] == 9


def test_ways_to_answer_can_be_compared(tmp_path, capsys):
    assert command(*QUICK, '--labels', 0, '--cache', 'live,3,all', '--out', tmp_path/'run') == 0
    said = capsys.readouterr().out
    assert '1,079 images in 3 views' in said
    for way in ('live teacher', '3 views', 'all views'): assert f'With all labels, {way}' in said
    rows = {r['model']: r for r in json.loads((tmp_path/'run'/'result.json').read_text())['rows']}
    assert list(rows) == ['teacher', 'alone', 'distilled_live', 'distilled_3', 'distilled_all']
    assert [rows[m]['answers'] for m in list(rows)[2:]] == ['live', 3, 9]
    live, kept = rows['distilled_live'], rows['distilled_all']  # the same answers, rounded to two bytes
    assert live['accuracy'] == pytest.approx(kept['accuracy'], abs=0.05)


@pytest.mark.parametrize('methods,settings', [
    (['alone', 'dkd'], ['all_labels']),
    pytest.param(['alone', 'dkd', 'self'], ['all_labels', 'few_labels'], marks=pytest.mark.slow)])
def test_methods_can_be_compared_with_the_same_number_of_tries(methods, settings, tmp_path, capsys):
    labels = 100 if 'few_labels' in settings else 0
    argv = ['--epochs', 1, '--teacher_epochs', 4, '--seeds', 2, '--method', ','.join(methods), '--labels', labels]
    assert command(*argv, '--out', tmp_path/'run') == 0
    result = json.loads((tmp_path/'run'/'result.json').read_text())
    assert {r['setting'] for r in result['rows']} == set(settings)
    for setting in settings:
        rows = {r['model']: r for r in result['rows'] if r['setting'] == setting}
        assert list(rows) == ['teacher', *methods]
        for row in list(rows.values())[1:]:
            mean = lambda k: sum(run[k] for run in row['runs'])/len(row['runs'])
            assert row['seconds_per_epoch'] > 0 and len(row['runs']) == 2
            assert row['accuracy'] == pytest.approx(mean('accuracy'))
            assert row['seconds'] == pytest.approx(mean('seconds'))
        assert set(rows['dkd']['chosen']) == {'temperature', 'alpha', 'beta'} and 'difference' in rows['dkd']
        tries = [t['method'] for t in result['tries'][setting]]
        assert {m: tries.count(m) for m in methods} == dict.fromkeys(methods, 4)
    said = capsys.readouterr().out
    for setting in settings: assert f"With {setting.replace('_', ' ')}, dkd (T=" in said


@pytest.mark.slow
def test_a_setting_that_diverged_is_said(tmp_path, monkeypatch, capsys):
    relational = METHODS['relational']._replace(grid=({'weight': 1e38}, {'weight': 0.01}))
    monkeypatch.setitem(METHODS, 'relational', relational)
    assert command(*QUICK[:-4], '--labels', 0, '--method', 'relational', '--out', tmp_path/'run') == 0
    said = capsys.readouterr().out
    assert 'relational: weight=1e+38 diverged' in said and 'relational: weight=0.01 (chosen' in said
    tries = json.loads((tmp_path/'run'/'result.json').read_text())['tries']['all_labels']
    assert [t['valid_accuracy'] is None for t in tries] == [True, False]


@pytest.mark.slow
def test_what_was_given_is_not_said_to_be_chosen(tmp_path, capsys):
    assert command(*QUICK, '--labels', 0, '--method', 'kd,hint', '--out', tmp_path/'run') == 0
    said = capsys.readouterr().out
    assert 'all labels, kd: T=4, alpha=0.9 (given)' in said
    assert 'T=4, alpha=0.9 (chosen on the validation split)' in said.split('all labels, hint: weight=')[1]
    assert 'Settings of hint were chosen on the validation split.' in (tmp_path/'run'/'report.html').read_text()


@pytest.mark.slow
def test_a_single_other_method(tmp_path):
    assert command(*QUICK, '--labels', 0, '--method', 'kd_std', '--out', tmp_path/'run') == 0
    result = json.loads((tmp_path/'run'/'result.json').read_text())
    assert [r['model'] for r in result['rows']] == ['teacher', 'alone', 'kd_std']
    assert result['rows'][2]['chosen'] == {'temperature': 4.0, 'alpha': 0.9} and not any(result['tries'].values())


@pytest.mark.slow
def test_answers_that_cannot_be_kept_are_said_in_a_line(tmp_path, monkeypatch, capsys):
    from distill_nb import answers
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(answers, '_reserve', full)
    assert command(*QUICK, '--labels', 0, '--out', tmp_path/'run') == 0
    err = [line for line in capsys.readouterr().err.splitlines() if 'answers' in line]
    assert err and err[0].startswith('distill_nb: ') and 'memory only' in err[0]


# --- bad input: one line, exit code 2, nothing written

@pytest.fixture(scope='module')
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bad')
    (folder/'damaged.safetensors').write_bytes(b'no weights')
    save_weights(build_model('digit_student', 10, 1, 8), folder/'student.safetensors')
    save_weights(build_model('digit_teacher', 10, 1, 8), folder/'guessing.safetensors')
    broken = build_model('digit_teacher', 10, 1, 8)
    torch.nn.init.constant_(broken.fc.bias, float('nan'))
    save_weights(broken, folder/'nan.safetensors')
    save_weights(build_model('digit_teacher', 10, 1, 8), folder/'foreign.safetensors', mean=0.5, std='imagenet')
    (folder/'other').mkdir()
    (folder/'other'/'notes.txt').write_text('mine')
    photos(folder/'damaged_photos')
    (folder/'damaged_photos'/'train'/'cat'/'0.png').write_bytes(b'\x89PNG but not really')
    photos(folder/'one_class', classes=('cat',))
    (folder/'empty').mkdir()
    return folder


@pytest.mark.parametrize('argv,said', [
    (['--temperature', '0'], 'temperature'), (['--temperature', '-3'], 'temperature'),
    (['--temperature', 'warm'], 'temperature'), (['--alpha', '1.5'], 'alpha'), (['--alpha', '-1'], 'alpha'),
    (['--epochs', '0'], 'epochs'), (['--teacher_epochs', '-1'], 'teacher_epochs'),
    (['--teacher_epochs', 'nan'], 'teacher_epochs'), (['--seeds', '0'], 'seeds'),
    (['--batch_size', '0'], 'batch_size'), (['--lr', 'nan'], 'lr'), (['--size', '0'], 'size'),
    (['--labels', '-1'], 'labels'), (['--labels', '5000'], 'labels'), (['--labels', '3'], '10 classes'),
    (['--data', 'digit'], 'digits'), (['--data', 'folder:/nowhere'], '/nowhere'), (['--data', 'folder:EMPTY'], 'empty'),
    (['--data', 'folder:ONE'], 'class'), (['--data', 'folder:DAMAGED'], '0.png'),
    (['--teacher', 'resnet57'], 'resnet56'), (['--student', 'torchvision:resnet19'], 'resnet18'),
    (['--student', ''], "no model ''"), (['--teacher', ''], "no model ''"),
    (['--teacher_weights', '/nowhere.safetensors'], '/nowhere.safetensors'),
    (['--teacher_weights', 'BAD/damaged.safetensors'], 'damaged'),
    (['--teacher_weights', 'BAD/student.safetensors'], 'student.safetensors'),
    (['--teacher_weights', 'BAD/guessing.safetensors'], 'never trained'),
    (['--device', 'abacus'], 'device'), (['--precision', 'int1'], 'precision'), (['--nonsense'], 'nonsense'),
    (['--skip_damaged'], 'skip_damaged'),
    (['--temperature', '1e300'], 'temperature'), (['--batch_size', '1000000000000'], 'batch_size'),
    (['--precision', 'float16', '--device', 'cpu'], 'float16'),
    (['--method', 'magic'], 'born_again'), (['--method', 'alone'], 'method'),
    (['--method', 'self', '--temperature', '2'], 'temperature must be left out for self'),
    (['--method', 'kd,kd'], 'method'), (['--method', 'kd,self', '--cache', '1'], 'method self'),
    (['--method', 'dkd,dist', '--cache', 'live,2'], 'cache'), (['--cache', '0'], 'cache'),
    (['--cache', '10'], '1 to 9'), (['--cache', 'some'], 'cache'), (['--cache', '2,2'], 'cache'),
    (['--cache', ''], 'cache'),
    (['--teacher_weights', 'BAD/nan.safetensors'], 'not finite'),
    (['--teacher_weights', 'BAD/foreign.safetensors'], 'foreign.safetensors'),
    (['--out', 'BAD/other'], 'holds no run')])
def test_bad_input_is_one_line_and_leaves_nothing(argv, said, bad_files, tmp_path, capsys):
    places = {'BAD': str(bad_files), 'DAMAGED': str(bad_files/'damaged_photos'), 'ONE': str(bad_files/'one_class'),
              'EMPTY': str(bad_files/'empty')}
    argv = [next((a.replace(k, v) for k, v in places.items() if k in a), a) for a in argv]
    out = tmp_path/'run'
    before = sorted(p.name for p in (bad_files/'other').iterdir())
    try: code = command(*argv, *([] if '--out' in argv else ['--out', out]))
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err
    assert code == 2 and err.count('\n') == 1 and err.startswith('distill_nb: ') and said in err, err
    assert not out.exists() and sorted(p.name for p in (bad_files/'other').iterdir()) == before


@pytest.mark.parametrize('bad', [
    dict(data=3), dict(data=None), dict(teacher=torch.nn.Linear(2, 2)), dict(labels='100'), dict(labels=True),
    dict(labels=10.), dict(alpha='0.5'), dict(temperature='4'), dict(epochs=[1]), dict(lr='0.1'), dict(seeds=None),
    dict(method=['kd', 'dist']), dict(cache=8), dict(skip_damaged='no'), dict(resume=None), dict(out=3)])
def test_from_python_an_option_of_another_type_is_refused(bad, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (name, value), = bad.items()
    said = f'^{name} must be (text|a whole number|a number|True or False), but is '
    with pytest.raises(ValueError, match=said): distill_nb(**bad)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('method', ['hint', 'attention', 'byot', 'data_free'])
def test_a_method_that_the_networks_cannot_have_is_refused_early(method, tmp_path, capsys):
    "Before the teacher is trained."
    (tmp_path/'my.py').write_text('from torch import nn\n'
        'def plain(classes, size): return nn.Sequential(nn.Flatten(), nn.Linear(size**2, classes))')
    plain = f"{tmp_path/'my.py'}:plain"
    argv = [*QUICK[:-4], '--teacher', plain, '--student', plain, '--method', f'kd,{method}']
    assert command(*argv, '--out', tmp_path/'run') == 2
    err = capsys.readouterr().err
    assert err.startswith(f'distill_nb: method {method} does not work here: ') and err.count('\n') == 1
    assert not (tmp_path/'run').exists()


@pytest.mark.slow
def test_a_list_with_other_spaces_is_the_same_run(tmp_path, capsys):
    argv = ['--epochs', 1, '--teacher_epochs', 4, '--seeds', 1, '--temperature', 4, '--alpha', 0.9, '--labels', 0]
    def run(methods, *more): return command(*argv, '--method', methods, '--out', tmp_path/'run', *more)
    assert run('kd,kd_std') == 0 and run('kd, kd_std', '--resume') == 0
    assert run('kd_std,kd', '--resume') == 2 and "method was 'kd,kd_std' and is 'kd_std,kd'" in capsys.readouterr().err


def test_damaged_images_can_be_skipped(bad_files, tmp_path, capsys):
    argv = ['--data', f"folder:{bad_files/'damaged_photos'}", '--skip_damaged', *QUICK, *DIGIT_PAIR, '--labels', 0]
    assert command(*argv, '--out', tmp_path/'run') == 0
    assert '0.png' in capsys.readouterr().out


def test_a_run_within_the_folder_of_its_images_is_refused(bad_files, monkeypatch, capsys):
    "The next run would take it for a class of images."
    photos = bad_files/'damaged_photos'
    argv = ['--data', f'folder:{photos}', '--skip_damaged', *QUICK, *DIGIT_PAIR, '--labels', 0]
    monkeypatch.chdir(photos)
    for more in (['--out', photos/'run'], ['--data', 'folder:.']):
        assert command(*argv, *more) == 2
        assert 'out must be a folder that is not within that of the images' in capsys.readouterr().err
    assert not (photos/'runs').exists() and not (photos/'run').exists()


def test_a_folder_of_another_run_is_refused_and_kept(finished, capsys):
    before = (finished/'result.json').read_bytes()
    assert command(*QUICK[:-2], '--alpha', 0.5, '--out', finished, '--resume') == 2
    err = capsys.readouterr().err
    assert 'holds another run (alpha was 0.9 and is 0.5)' in err and err.count('\n') == 1
    assert (finished/'result.json').read_bytes() == before


def test_a_recipe_that_was_edited_is_refused(finished, capsys):
    path = finished/'recipe.json'
    before = path.read_text()
    recipe = json.loads(before)
    recipe['student']['lr'] = 5.
    path.write_text(json.dumps(recipe))
    assert command(*QUICK, '--out', finished, '--resume') == 2
    err, edited = capsys.readouterr().err, path.read_text()
    path.write_text(before)
    assert 'holds another run (student.lr was 5.0 and is 0.03)' in err and err.count('\n') == 1
    assert json.loads(edited) == recipe


@pytest.mark.parametrize('content', ['{"options": []}', '{"options": null}', '[]', 'no json'])
def test_a_damaged_recipe_is_refused(tmp_path, content, capsys):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'recipe.json').write_text(content)
    assert command(*QUICK, '--out', tmp_path/'run', '--resume') == 2
    err = capsys.readouterr().err
    assert 'recipe' in err and err.count('\n') == 1


def test_resume_needs_to_know_what(capsys):
    assert command(*QUICK, '--resume') == 2
    assert '--out FOLDER' in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_no_half_written_run(tmp_path, monkeypatch, capsys):
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    assert command(*QUICK, '--out', tmp_path/'run') == 2
    err = capsys.readouterr().err
    assert 'No space left on device' in err and err.count('\n') == 1 and not (tmp_path/'run').exists()


def test_a_disk_that_fills_later_keeps_what_was_finished(tmp_path, monkeypatch, capsys):
    sync, calls = os.fsync, []
    def fills(fd):
        calls.append(fd)
        if len(calls) > 9: raise OSError(28, 'No space left on device')
        sync(fd)
    monkeypatch.setattr(os, 'fsync', fills)
    assert command(*QUICK, '--labels', 0, '--out', tmp_path/'run') == 2
    assert 'No space left' in capsys.readouterr().err
    assert list((tmp_path/'run').rglob('checkpoint.safetensors')) and not list((tmp_path/'run').rglob('*.tmp'))
    monkeypatch.setattr(os, 'fsync', sync)
    assert command(*QUICK, '--labels', 0, '--out', tmp_path/'run', '--resume') == 0


def test_missing_weights_and_data_without_a_network_are_explained(tmp_path, monkeypatch, capsys):
    import urllib.request
    def refuse(*a, **k): raise OSError('network is unreachable')
    monkeypatch.setattr(urllib.request, 'urlopen', refuse)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    assert command('--data', 'cifar10', '--root', tmp_path/'data', '--out', tmp_path/'run') == 2
    err = capsys.readouterr().err
    assert 'https://' in err and str(tmp_path/'data') in err and err.count('\n') == 1
    pretrained = ['--teacher', 'torchvision:resnet18', '--teacher_weights', 'imagenet']
    folder = photos(tmp_path/'photos')
    assert command(*pretrained, '--data', f'folder:{folder}', '--out', tmp_path/'run') == 2
    err = capsys.readouterr().err.splitlines()
    [line] = [l for l in err if not l.startswith('Downloading: ')]  # old versions of torch say that here
    assert 'https://download.pytorch.org' in line and 'checkpoints' in line
    assert not (tmp_path/'run').exists()


@pytest.fixture
def heard():
    "Signals as a terminal gives them: a job in the background, or behind nohup, ignores some."
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items(): signal.signal(number, handler)


SIGNALS = {'SIGINT': 'interrupted', 'SIGTERM': 'ended by SIGTERM', 'SIGHUP': 'ended by SIGHUP'}


@pytest.mark.parametrize('name', SIGNALS)
def test_a_signal_ends_a_run_with_a_line_that_says_how_to_continue_it(name, heard, tmp_path, monkeypatch, capsys):
    number, out, stop = signal.Signals[name], tmp_path/'my run', run.run_setting
    before = [signal.getsignal(n) for n in signal.Signals]
    monkeypatch.setattr(run, 'run_setting', lambda *_: signal.raise_signal(number))
    assert command(*SHORT, '--out', out) == 128 + number
    more = f"with --out '{out}' --resume it continues from its last checkpoint, and they are at least 30 s apart"
    assert capsys.readouterr().err.endswith(f'distill_nb: {SIGNALS[name]}; {more}\n')
    assert [signal.getsignal(n) for n in signal.Signals] == before and not (out/'.lock').exists()
    monkeypatch.setattr(run, 'run_setting', stop)
    assert command(*SHORT, '--out', out, '--resume') == 0


@pytest.mark.parametrize('place', ['prepare', '_train_teacher'])
def test_nothing_is_promised_where_nothing_can_be_continued(place, tmp_path, monkeypatch, capsys):
    "While options are checked, or before a checkpoint is written; and then nothing is left."
    module = cli if place == 'prepare' else run
    monkeypatch.setattr(module, place, lambda *_: signal.raise_signal(signal.SIGTERM))
    assert command(*QUICK, '--out', tmp_path/'a'/'run') == 143
    assert capsys.readouterr().err.endswith('distill_nb: ended by SIGTERM\n') and not list(tmp_path.iterdir())


def test_a_signal_that_was_ignored_stays_ignored(monkeypatch):
    "As behind nohup."
    def job(): signal.raise_signal(signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try: assert run_command(job, []) == 0
    finally: signal.signal(signal.SIGHUP, before)


def test_an_interruption_that_was_lost_comes_again():
    "Python drops an exception where nobody can catch it, as in the middle of a fork."
    def job():
        try: signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt: pass
        for _ in range(1000): time.sleep(0.02)
    assert run_command(job, []) == 143


def test_a_second_signal_does_not_disturb_the_cleaning_up(heard):
    cleaned = []
    def job():
        try: signal.raise_signal(signal.SIGINT)
        finally:
            for again in ('SIGINT', 'SIGTERM', 'SIGALRM'): signal.raise_signal(signal.Signals[again])
            try: raise OSError
            except OSError: signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)
    assert run_command(job, []) == 130 and cleaned


def test_what_breaks_in_the_cleaning_up_does_not_hide_the_signal(capsys):
    def job():
        try: signal.raise_signal(signal.SIGTERM)
        finally: raise OSError('the terminal is gone')
    assert run_command(job, []) == 143 and capsys.readouterr().err == 'job: ended by SIGTERM\n'


def test_a_second_run_in_a_folder_is_refused_and_the_first_ends_whole(tmp_path, capsys):
    folder = tmp_path/'run'
    argv = [*QUICK[2:], '--epochs', '500', '--out', str(folder)]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    p = subprocess.Popen([*python(), '-m', 'distill_nb', *argv], **pipes)
    while p.poll() is None and not list(folder.glob('work/all_labels/*/curve.csv')): time.sleep(0.02)
    for more in ([], ['--resume']):
        assert command(*argv, *more) == 2
        said = capsys.readouterr().err
        used = rf"'{folder}' is in use by process \d+\.\n"
        assert 'holds this run already' in said if not more else re.search(used, said)
    p.send_signal(signal.SIGTERM)
    said = p.communicate()[1]
    assert p.returncode == 143 and 'distill_nb: ended by SIGTERM; with --out ' in said.splitlines()[-1], said
    assert 'Traceback' not in said and not (folder/'.lock').exists() and not list(folder.rglob('*.tmp'))
    read_weights(folder/'work'/'teacher'/'checkpoint.safetensors')


@pytest.mark.parametrize('there', [None, 'mine.txt'])
@pytest.mark.parametrize('whole', [False, True])
def test_a_download_that_broke_off_is_taken_away_and_a_whole_one_is_not(there, whole, tmp_path, monkeypatch, capsys):
    root = tmp_path/'a'/'data'
    if there:
        root.mkdir(parents=True)
        (root/there).touch()
    def broken(*_):
        (root/'cifar-10-python.tar.gz').parent.mkdir(parents=True, exist_ok=True)
        (root/'cifar-10-python.tar.gz').write_bytes(b'half')
        raise ValueError('the network is gone')
    monkeypatch.setattr(run, 'load_data', broken)
    if whole: monkeypatch.setattr('torchvision.datasets.utils.check_integrity', lambda *_: True)
    assert command('--data', 'cifar10', '--root', root, '--out', tmp_path/'run') == 2
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*') if p.is_file()}
    archive = {'a/data/cifar-10-python.tar.gz'} if whole or there else set()
    assert left == archive | ({f'a/data/{there}'} if there else set())
    assert (tmp_path/'a').exists() == bool(left)


@pytest.mark.parametrize('job', [distill_nb, distill_nb_data_free, distill_nb_embed, distill_nb_export,
                                 distill_nb_language, distill_nb_predict, distill_nb_plan, distill_nb_bench])
def test_a_launcher_of_several_processes_is_refused(job, monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '1')
    assert run_command(job, ['x'] if job is distill_nb_predict else []) == 2
    said = capsys.readouterr().err
    assert said.startswith(f'{job.__name__}: {job.__name__} must be started as one process') and said.count('\n') == 1


@pytest.mark.parametrize('there', [False, True])
def test_a_folder_without_a_run_has_nothing_to_continue(there, tmp_path, capsys):
    if there: (tmp_path/'typo').mkdir()
    assert command(*QUICK, '--out', tmp_path/'typo', '--resume') == 2
    assert f"resume must be left out, since out '{tmp_path/'typo'}' holds no run to continue" in capsys.readouterr().err
    assert (tmp_path/'typo').exists() == there


def test_every_line_that_the_page_says_to_type_is_one_that_the_commands_take():
    page = json.loads((Path(__file__).parent.parent/'nbs'/'cli.ipynb').read_text())['cells']
    text = '\n'.join(''.join(c['source']) for c in page if c['cell_type'] == 'markdown')
    lines = {line.strip('`') for line in re.findall(r'`distill_nb\w*(?: [^`\n]+)?`|^ *distill_nb.*$', text, re.M)}
    lines = {line for line in lines if '--help' not in line}
    jobs = {f.__name__: f for f in (distill_nb, distill_nb_data_free, distill_nb_embed, distill_nb_export,
                                    distill_nb_language, distill_nb_predict, distill_nb_plan, distill_nb_bench)}
    kinds = {'distill_nb': run.Options, 'distill_nb_data_free': run.FreeOptions, 'distill_nb_embed': EmbedOptions,
             'distill_nb_language': LanguageOptions, 'distill_nb_plan': PlanOptions, 'distill_nb_export': ExportOptions}
    for line in lines:
        name, *argv = line.split()
        if name == 'distill_nb_predict' and not argv: continue  # its name in a sentence
        if name in ('distill_nb_data_free', 'distill_nb_embed', 'distill_nb_export') and not argv: continue
        given = vars(command_parser(jobs[name]).parse_args(argv))
        if name in kinds: kinds[name](**given)
    assert len(lines) > 15 and {line.split()[0] for line in lines} == set(jobs)


def test_python_m_is_the_command():
    p = subprocess.run([*python(), '-m', 'distill_nb', '--help'], capture_output=True, text=True)
    assert p.returncode == 0
    for option in ('data', 'teacher', 'student', 'teacher_weights', 'size', 'labels', 'temperature', 'alpha', 'epochs',
                   'seeds', 'out', 'resume', 'device', 'precision'):
        assert f'--{option}' in p.stdout


@pytest.mark.parametrize('job', [distill_nb, distill_nb_data_free, distill_nb_embed, distill_nb_export,
                                 distill_nb_language, distill_nb_predict, distill_nb_plan, distill_nb_bench])
def test_help_fits_a_page(job, monkeypatch, capsys):
    "Also where the terminal is wider: the page of the commands shows it."
    monkeypatch.setenv('COLUMNS', '200')
    with pytest.raises(SystemExit) as end: run_command(job, ['--help'])
    said = capsys.readouterr().out
    assert end.value.code == 0 and '--out' in said and [line for line in said.splitlines() if len(line) > 85] == []


# --- small parts

def test_presets_build():
    for name, (channels, size) in {'digits': (1, 8), 'mnist': (1, 28), 'cifar10': (3, 32), 'cifar100': (3, 32)}.items():
        for model in (PRESETS[name].teacher, PRESETS[name].student): build_model(model, 10, channels, size)


def test_imagenet_weights_are_loaded_as_in_python(tmp_path, monkeypatch, capsys):
    "Grey images sum the colours of the stem, and a stem that does not fit is refused, not left random."
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    (tmp_path/'checkpoints').mkdir()
    old = build_model('resnet18', 1000, 3, 224).state_dict()
    torch.save(old, tmp_path/'checkpoints'/'resnet18-f37072fd.pth')
    for name in ('resnet18', 'torchvision:resnet18'):
        torch.manual_seed(0)
        grey = open_model(name, 'imagenet', 10, 1, 96).model.state_dict()
        assert torch.equal(grey['conv1.weight'], old['conv1.weight'].sum(1, keepdim=True))
        assert all(torch.equal(grey[k], t) for k, t in old.items() if k.split('.')[0] not in ('conv1', 'fc'))
        said = f'pretrained weights of {name}; the head (fc) is new; the stem (conv1) sums its three colours\n'
        assert said in capsys.readouterr().out
    ours = resnet18(classes=10, channels=1, weights='IMAGENET1K_V1').state_dict()
    assert all(torch.equal(grey[k], ours[k]) for k in ours if not k.startswith('fc.'))
    for shape, said in (((3, 32), 'conv1.weight is 64x3x7x7 but must be .* give that as size'),
                        ((4, 96), 'channels must be 3 or 1')):
        with pytest.raises(ValueError, match=said): open_model('resnet18', 'imagenet', 10, *shape)


def test_weights_name_their_classes_and_another_order_is_no_matter(tmp_path, capsys):
    first, renamed = photos(tmp_path/'first'), photos(tmp_path/'second', classes=('cat', 'dog', 'owl'))
    argv = [*DIGIT_PAIR, '--epochs', 4, '--seeds', 1, '--labels', 0, '--temperature', 4, '--alpha', 0.9, '--lr', 0.02,
            '--batch_size', 8]
    assert command('--data', f'folder:{first}', *argv, '--out', tmp_path/'run') == 0
    files = [tmp_path/'run'/f'{who}.safetensors' for who in ('teacher', 'student')]
    assert all(json.loads(read_weights(f)[1]['classes']) == ['cat', 'dog', 'owl'] for f in files)
    train = load_data(f'folder:{first}').train
    turned = ImageData(train.x, train.y, ['owl', 'cat', 'dog'])
    right = [predict(open_model(files[0], classes=data.classes), data) for data in (train, turned)]
    assert 'names the classes in another order than the data' in capsys.readouterr().out
    assert torch.equal(right[1], right[0][:, [2, 0, 1]])
    for split in ('train', 'test'): (renamed/split/'dog').rename(renamed/split/'hound')
    assert command('--data', f'folder:{renamed}', *argv, '--teacher_weights', files[0], '--out', tmp_path/'other') == 2
    err = capsys.readouterr().err
    assert "only the file has 'dog'; only the data have 'hound'" in err and err.count('\n') == 1
    assert not (tmp_path/'other').exists()


def test_a_run_without_a_place_takes_a_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert free_folder('digits') == Path('runs/digits')
    Path('runs/digits').mkdir(parents=True)
    Path('runs/digits-2').mkdir()
    assert free_folder('digits') == Path('runs/digits-3') and free_folder('folder:/a/photos/') == Path('runs/photos')


def test_of_two_runs_that_start_together_the_second_takes_the_next_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, 'prepare', lambda options, folder: folder)
    monkeypatch.setattr(cli, 'run_job', lambda job, command, start: (job, command))
    with ExitStack() as stack:
        def late(name):
            place = free_folder(name)
            if not place.parent.exists(): stack.enter_context(locked(place))  # by the other run
            return place
        monkeypatch.setattr(cli, 'free_folder', late)
        assert distill_nb() == (Path('runs/digits-2'), 'distill_nb --out runs/digits-2')
    assert not Path('runs').exists()


def test_the_command_line_makes_the_run_again():
    import inspect
    options = {k: p.default for k, p in inspect.signature(distill_nb).parameters.items()}
    assert command_line(distill_nb, options, out='r') == 'distill_nb --out r'
    given = options | {'data': 'folder:my photos', 'skip_damaged': True, 'resume': True}
    assert command_line(distill_nb, given, out='r') == "distill_nb --data 'folder:my photos' --skip_damaged --out r"


@pytest.mark.parametrize('ci,said', [([0.01, 0.02], 'helped'), ([-0.01, 0.02], 'no effect'),
                                     ([-0.02, -0.01], 'hurt'), (None, 'one seed')])
def test_verdicts_read_the_interval(ci, said):
    row = {'setting': 'few_labels', 'model': 'distilled', 'method': 'kd', 'difference': 0.01, 'difference_ci95': ci,
           'chosen': {'temperature': 4., 'alpha': 0.9}}
    assert said in verdicts([row], ACCURACY)[0]
    other = {'helped': 'hurt', 'hurt': 'helped'}.get(said, said)
    assert other in verdicts([row], Measure('bits_per_byte', higher=False))[0]


def test_a_measure_that_is_no_share_is_shown_as_it_is():
    bits = Measure('bits_per_byte', higher=False)
    row = {'setting': 'all', 'model': 'student', 'parameters': 1, 'macs': 1, 'bytes': 1, 'latency_ms': 1.,
           'bits_per_byte': 1.9, 'ci95': [1.8, 2.], 'agreement': 0.5}
    other = row | {'model': 'distilled', 'difference': -0.05, 'difference_ci95': [-0.0612, -0.0388]}
    shown = result_table([row | {'ci95': None}, other], bits)
    cells = dict(zip(shown.head, zip(*shown.rows)))
    assert cells['bits per byte [95 %]'] == ('1.900', '1.900 [1.800, 2.000]') and 'ECE %' not in cells
    assert cells['difference [95 %]'] == ('', '-0.050 [-0.061, -0.039]') and 'gain [95 %]' not in cells


def test_images_are_one_or_several(capsys):
    "In every version of fastcore: the name of what has no name is all that a command line needs."
    from distill_nb.cli import command_parser
    parser = command_parser(distill_nb_predict)
    assert parser.parse_args(['a', 'b', '--top', '2']).images == ['a', 'b']
    assert parser.parse_args(['a']).images == ['a']


@pytest.mark.parametrize('job', [distill_nb, distill_nb_predict, distill_nb_data_free, distill_nb_embed,
                                 distill_nb_language, distill_nb_bench])
def test_options_are_spelled_as_parameters_in_every_version_of_fastcore(job, monkeypatch):
    "fastcore 2 writes --teacher-epochs, and (float) behind it."
    make = cli.anno_parser
    def newer(*args, **kwargs):
        parser = make(*args, **kwargs)
        for action in parser._actions:
            for option in list(action.option_strings): del parser._option_string_actions[option]
            action.option_strings = [option.replace('_', '-') for option in action.option_strings]
            parser._option_string_actions |= {option: action for option in action.option_strings}
            if action.nargs != 0: action.metavar = '(kind)'
        return parser
    usual = cli.command_parser(job).format_help()
    monkeypatch.setattr(cli, 'anno_parser', newer)
    parser = cli.command_parser(job)
    assert parser.format_help().replace('(kind)', 'images') == usual
    own = {option for action in parser._actions for option in action.option_strings}
    assert own == {f'--{name}' for name in inspect.signature(job).parameters if name != 'images'} | {'-h', '--help'}


def test_the_command_runs_where_the_notebooks_run():
    "In .ci/run that is an environment with the newest versions of all that the package needs, and nothing else."
    python = os.environ.get('NOTEBOOK_PYTHON', sys.executable)
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} if 'NOTEBOOK_PYTHON' in os.environ else None
    p = subprocess.run([python, '-m', 'distill_nb', '--teacher_epochs', 'nan'], capture_output=True, text=True, env=env)
    assert p.returncode == 2 and p.stderr.startswith('distill_nb: teacher_epochs must be a number'), p.stderr


@pytest.mark.parametrize('job', [distill_nb, distill_nb_data_free, distill_nb_embed, distill_nb_export,
                                 distill_nb_language, distill_nb_predict, distill_nb_plan, distill_nb_bench])
@pytest.mark.parametrize('option', ['--pdb', '--xtra=1', '--devic=cpu'])
def test_only_the_options_in_the_help_are_taken(job, option, capsys):
    with pytest.raises(SystemExit) as e: run_command(job, [*(['x'] if job is distill_nb_predict else []), option])
    assert e.value.code == 2 and f'unrecognized arguments: {option}' in capsys.readouterr().err


def test_a_signal_while_the_arguments_are_read_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, 'anno_parser', lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert command() == 143 and capsys.readouterr().err == 'distill_nb: ended by SIGTERM\n'
