"""Comparing: intervals, paired runs, contenders, choices, tables."""
import copy, math, subprocess, warnings, weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from distill_nb.files import fingerprint
from distill_nb.protocol import Measure
from distill_nb.data import ImageData, digits
from distill_nb.models import digit_student
from distill_nb.history import Checkpoint
from distill_nb.training import DivergedError, Recipe, Supervised, evaluate
from distill_nb.compare import (Comparison, Contender, agreement, choose, compare, interval, paired, share_interval,
                                table)
from distill_nb.logits import Distill
from distill_nb.report import make_report, result_table, stored_result

from processes import python
from small import RECIPE, Texts, bigram, images, net, trained


@pytest.fixture(scope='module')
def teacher(): return trained()


# --- comparing

@pytest.mark.parametrize('values', [[1., 2., 3.], [0.9, 0.91, 0.87, 0.93, 0.9]])
def test_the_interval_is_students(values):
    mean, ends = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values))
    assert ends == pytest.approx([low, high]) and mean == pytest.approx(sum(values) / len(values))
    assert interval([0.5]) == (0.5, None)


@pytest.mark.parametrize('value', [0., 0.3, 0.94, 1., 1 / 3])
@pytest.mark.parametrize('n', [2, 3, 5, 7])
def test_equal_values_have_an_interval_without_width(value, n):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert interval([value] * n) == (value, [value, value])


@pytest.mark.parametrize('shapes', [((4, 3), (1, 3)), ((4, 3), (4, 2)), ((0, 3), (0, 3)), ((4, 1), (4, 1)),
                                    ((4,), (4,))])
def test_agreement_refuses_what_would_be_broadcast(shapes):
    with pytest.raises(ValueError, match='student_logits and teacher_logits must have the'):
        agreement(*map(torch.zeros, shapes))


@pytest.mark.parametrize('name', ['student_logits', 'teacher_logits'])
def test_agreement_refuses_answers_that_are_none_where_they_count(name):
    logits = dict.fromkeys(('student_logits', 'teacher_logits'), torch.eye(3))
    lost = logits | {name: torch.eye(3) + torch.tensor([[0.], [0], [math.nan]])}
    with pytest.raises(ValueError, match=f'{name} must be numbers, but some are NaN'): agreement(**lost)
    assert agreement(**lost, weight=torch.tensor([1., 1, 0])) == 1


def test_agreement_counts_equal_choices():
    student, teacher = [[1., 0], [0, 1], [1, 0], [0, 1]], [[2., 0], [3, 1], [9, 0], [1, 0]]
    assert agreement(torch.tensor(student), torch.tensor(teacher)) == 0.5


def test_agreement_counts_the_places_that_are_there():
    student, teacher = torch.randn(5, 7, 3), torch.randn(5, 7, 3)
    weight = (torch.arange(7) < torch.tensor([7, 1, 3, 2, 5])[:, None]) * 0.5
    places = [(i, j) for i in range(5) for j in range(7)]
    same = {at: student[at].argmax() == teacher[at].argmax() for at in places}
    there = [at for at in places if weight[at] > 0]
    assert len(there) == 18 and agreement(student, student, weight) == 1
    assert agreement(student, teacher) == pytest.approx(sum(same.values()).item() / 35)
    assert agreement(student, teacher, weight) == pytest.approx(sum(same[at] for at in there).item() / 18)


@pytest.mark.parametrize('right,n', [(0, 1), (1, 1), (0, 359), (359, 359), (357, 359), (4235, 5000), (1, 3)])
def test_the_interval_of_a_share_is_wilsons(right, n):
    p, z = right / n, stats.norm.ppf(0.975)
    centre = (p + z**2 / 2 / n) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)
    assert share_interval(right, n) == pytest.approx([centre - half, centre + half], abs=1e-12)
    assert 0 <= share_interval(right, n)[0] <= p <= share_interval(right, n)[1] <= 1


@pytest.mark.parametrize('p', [0.5, 0.9, 0.95, 0.98, 0.99, 0.998])
def test_the_interval_of_a_share_holds_it_nearly_as_often_as_it_says(p):
    intervals = [share_interval(k, 359) for k in range(360)]
    held = sum(stats.binom.pmf(k, 359, p) for k, (low, high) in enumerate(intervals) if low <= p <= high)
    assert 0.92 < held < 0.99


ACCURACY = Measure('accuracy', share=True)


def runs_of(**values):
    return [{'model': m, 'seed': s, 'valid_accuracy': v} for m, found in values.items() for s, v in found.items()]


def test_rows_pair_by_seed():
    runs = runs_of(alone={0: 0.1, 1: 0.5, 2: 0.9}, distilled={0: 0.2, 1: 0.6, 2: 1.0})
    runs = sorted((r | {'seconds': 1.} for r in runs), key=lambda r: r['seed'])
    alone, distilled = Comparison(runs, 'alone', ACCURACY).rows()
    low, high = alone['ci95']
    assert 'difference' not in alone and high - low > 1
    assert alone['valid_accuracy'] == pytest.approx(0.5) == (low + high) / 2
    assert distilled['difference'] == pytest.approx(0.1) and distilled['difference_ci95'] == pytest.approx([0.1, 0.1])


def test_runs_are_paired_by_their_seeds_in_whatever_order_they_stand():
    found = Comparison(runs_of(a={0: 0.1, 1: 0.5, 2: 0.9}, b={2: 1.0, 0: 0.2, 1: 0.6}), 'a', ACCURACY)
    assert found.values('b', 'valid_accuracy') == [0.2, 0.6, 1.0] and found.seeds == [0, 1, 2]
    assert found.rows()[1]['difference_ci95'] == pytest.approx([0.1, 0.1])
    lines = [line.get_ydata().tolist() for line in found.plot().axes[0].lines]
    assert lines == [[0.1, 0.2], [0.5, 0.6], [0.9, 1.0]]


@pytest.mark.parametrize('runs,baseline,said', [
    (runs_of(a={0: 0.1, 1: 0.5}, b={0: 0.2}), 'a', r"'b' has none for \[1\]"),
    (runs_of(a={0: 0.1}, b={0: 0.2, 7: 0.3}), 'a', r"'a' has none for \[7\]"),
    (runs_of(a={0: 0.1}, b={0: 0.2}) + runs_of(b={0: 0.2}), 'a',
     r"each seed of a contender once, but 'b' has the seeds \[0, 0\]"),
    (runs_of(a={0: 0.1}), 'c', "name must be one of a, but is 'c'"),
    (runs_of(a={0: 0.1, 1: 0.1}, b={0: 0.1}) + [{'model': 'b', 'seed': 1}], 'a',
     r"'b' has no 'valid_accuracy' for the seeds \[1\]")])
def test_runs_that_can_not_be_paired_are_refused(runs, baseline, said):
    for summary in (Comparison.rows, Comparison.plot):
        with pytest.raises(ValueError, match=said): summary(Comparison(runs, baseline, ACCURACY))


def test_a_column_has_the_name_of_its_measure():
    runs = [r | {'accuracy': r['valid_accuracy'] + 0.05, 'deepest': 0.7} for r in runs_of(a={0: 0.1, 1: 0.3})]
    found = Comparison(runs, 'a', ACCURACY)
    for measure, mean in (('valid_accuracy', 0.2), ('accuracy', 0.25), ('deepest', 0.7)):
        row, = found.rows(measure)
        assert row[measure] == pytest.approx(mean) and set(row) == {'model', measure, 'ci95'}
    assert 'accuracy' in found.rows()[0] and 'accuracy' not in Comparison(runs_of(a={0: 0.1}), 'a', ACCURACY).rows()[0]
    assert found.plot(measure='deepest').axes[0].get_ylabel() == 'deepest'
    with pytest.raises(ValueError, match="'a' has no 'top5'"): found.rows('top5')


def test_a_seed_that_occurs_twice_is_refused_before_anything_is_trained():
    def never(): raise AssertionError('a student was made')
    for seeds, said in (([0, 0], '0 occurs again'), ([3, 1, 2, 1], '1 occurs again'), ([], 'at least 1'),
                        ((5, 5), '5 occurs again')):
        with pytest.raises(ValueError, match=f'seeds must be .*{said}'):
            compare(never, {'a': Contender(Supervised, images())}, RECIPE, images(seed=1), seeds=seeds)


def test_a_factory_that_does_not_make_new_students_is_refused():
    def compared(make, seeds=2):
        ways = {name: Contender(Supervised, images()) for name in 'ab'}
        return compare(make, ways, RECIPE, images(seed=1), seeds=seeds, progress=False)
    one, body, norm = net(), nn.Linear(16, 8), nn.BatchNorm1d(8)
    two = [net(), net()]
    def alternating(): return two[0] if two.reverse() else two[1]
    def shared_body(): return nn.Sequential(nn.Flatten(), body, nn.Linear(8, 3))
    def same_memory():
        model = net()
        model[1].weight.data = one[1].weight.data
        return model
    def shared_buffers():
        model = net()
        model[2].running_mean = norm.running_mean
        return model
    for make in (lambda: one, shared_body, same_memory, shared_buffers):
        with pytest.raises(ValueError, match='make_student must make a new network each time'): compared(make)
    with pytest.raises(ValueError, match='make_student must'): compared(alternating)
    trained = []
    def copies_of_the_last():
        trained.append(copy.deepcopy(trained[-1]) if trained else net())
        return trained[-1]
    said = 'same initial weights for the same seed, but for seed 0'
    with pytest.raises(ValueError, match=said): compared(copies_of_the_last)
    said = 'the same initial weights for every seed'
    with pytest.warns(UserWarning, match=said): compared(lambda: copy.deepcopy(one))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        compared(net)
        compared(lambda: copy.deepcopy(one), seeds=1)


def contenders(teacher, alone, transfer):
    return {'alone': Contender(Supervised, alone), 'distilled': Contender(partial(Distill, teacher=teacher), transfer)}


def test_contenders_start_alike_take_the_same_steps_and_read_the_test_split_once(teacher):
    started, steps = {}, {}
    def watch(name):
        def make(student):
            started.setdefault(name, []).append(fingerprint(student.state_dict()))
            return Supervised(student) if name == 'alone' else Distill(student, teacher)
        return make
    class Once(ImageData):
        reads = 0
        def batches(self, *args):
            Once.reads += 1
            return super().batches(*args)
    d = images(seed=2)
    test = Once(d.x, d.y, d.classes, mean=d.mean, std=d.std)
    few, all_images = images().subset(range(30)), images()
    ways = {'alone': Contender(watch('alone'), few), 'distilled': Contender(watch('distilled'), all_images)}
    recipe = Recipe(epochs=1, batch_size=16, precision='float32')
    found = compare(net, ways, recipe, images(seed=1), test, teacher, seeds=3)
    assert started['alone'] == started['distilled'] and len(set(started['alone'])) == 3
    # ceil(120 / 16) steps: the larger data set decides
    assert {len(h.losses['hard']) for h in found.histories.values()} == {8}
    assert Once.reads == 3 * 2 + 1  # each trained student once, and the teacher
    rows = found.rows()
    assert {'accuracy', 'ci95', 'agreement', 'ece', 'seconds'} <= set(rows[0]) and found.plot() is not None
    assert all({'seed', 'valid_accuracy', 'accuracy', 'agreement', 'ece', 'seconds'} <= set(r) for r in found.runs)


def test_the_random_numbers_of_the_caller_are_as_they_were():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    way = {'a': Contender(Supervised, images())}
    compare(net, way, RECIPE, images(seed=1), seeds=2)
    choose(net, way, RECIPE, images(seed=1), seeds=1)
    assert torch.equal(torch.get_rng_state(), before)


class Streamed(Texts):
    "Texts whose measure looks whether early logits are gone when later ones come."
    def measure(self, answers):
        seen = []
        def watched():
            for logits, batch in answers:
                seen.append(weakref.ref(logits))
                yield logits, batch
                assert all(logits() is None for logits in seen[:-2]), 'the logits of all batches are in memory'
        found = super().measure(watched())
        assert len(seen) > 2
        return found


def test_texts_are_compared_by_their_own_measure():
    torch.manual_seed(0)
    teacher, valid, test = bigram(), Texts(40, 1), Streamed(1200, 2)
    nn.init.eye_(teacher.weight)
    made = {rate: Contender(Supervised, Texts(), replace(RECIPE, lr=rate)) for rate in (1e-6, 0.3, 0.1)}
    found = compare(bigram, made, RECIPE, valid, test, teacher, seeds=2)
    names = {'valid_bits_per_letter', 'bits_per_letter', 'accuracy', 'agreement'}
    assert all(set(r) == {'model', 'seed', 'steps', 'planned', 'seconds'} | names for r in found.runs)
    assert found.primary == valid.measures[0] and found.measure == 'bits_per_letter'
    for name, (value, student) in found.students.items():
        assert value == min(found.values(name, 'valid_bits_per_letter')) == evaluate(student, valid).bits_per_letter
    _, student = found.students[0.3]
    whole = [model(test.get(torch.arange(1200)).x) for model in (student, teacher)]
    assert agreement(*whole, test.weight) in found.values(0.3, 'agreement')
    assert set(found.rows()[0]) == {'model', 'bits_per_letter', 'ci95', 'accuracy', 'agreement', 'seconds'}
    best, rows = choose(bigram, made, RECIPE, valid, seeds=1)
    assert best == min(rows, key=lambda rate: rows[rate]['valid_bits_per_letter']) == 0.3
    axes = [found.plot(measure=m).axes[0].get_ylabel() for m in (None, 'valid_bits_per_letter')]
    assert axes == ['test bits per letter', 'validation bits per letter']


def test_data_without_a_measure_are_refused():
    class Silent(Texts): measures = ()
    with pytest.raises(ValueError, match='measures of valid must be at least one Measure'):
        compare(bigram, {'a': Contender(Supervised, Texts())}, RECIPE, Silent())


def test_an_interrupted_comparison_continues(teacher, tmp_path):
    given = lambda: (net, contenders(teacher, images(), images()), RECIPE, images(seed=1))
    whole = compare(*given(), seeds=2)
    class Stop(Exception): pass
    def stops(student): raise Stop
    stopped = {'alone': Contender(Supervised, images()), 'distilled': Contender(stops, images())}
    with pytest.raises(Stop): compare(net, stopped, RECIPE, images(seed=1), seeds=2, folder=tmp_path)
    resumed = compare(*given(), seeds=2, folder=tmp_path)
    strip = lambda c: [{k: v for k, v in r.items() if k != 'seconds'} for r in c.runs]
    assert strip(resumed) == strip(whole)


def test_a_comparison_of_nothing_is_refused(teacher):
    with pytest.raises(ValueError, match='contenders'): compare(net, {}, RECIPE, images())
    pair = contenders(teacher, images(), images())
    with pytest.raises(ValueError, match='seeds'): compare(net, pair, RECIPE, images(), seeds=0)
    with pytest.raises(ValueError, match="contenders must be values of Contender, but 'a' is a tuple"):
        compare(net, {'a': (Supervised, images())}, RECIPE, images())


@pytest.mark.parametrize('make,said', [
    (lambda: Contender(3, images()), 'make must be a function, but is 3'),
    (lambda: Contender(Supervised, images(), 'long'), "recipe must be a Recipe or None, but is 'long'"),
    (lambda: Contender(Supervised, images(), None, 3), 'before must be a function or None, but is 3'),
    (lambda: Contender(Supervised, None), "data of 'bad' must be a data set"),
    (lambda: 3, "must be values of Contender, but 'bad' is a int")])
def test_a_contender_that_cannot_be_made_is_refused_before_any_is_trained(make, said):
    def never(): raise AssertionError('a student was made')
    def both(): return {'good': Contender(Supervised, images()), 'bad': make()}
    with pytest.raises(ValueError, match=said): compare(never, both(), RECIPE, images())
    with pytest.raises(ValueError, match=said): choose(never, both(), RECIPE, images())


@pytest.mark.parametrize('name', ['../up', 'a/b', 'x' * 300])
def test_a_name_that_leaves_the_folder_is_refused_before_any_is_trained(name, tmp_path):
    def never(): raise AssertionError('a student was made')
    both = {'good': Contender(Supervised, images()), name: Contender(Supervised, images())}
    with pytest.raises(ValueError, match='name must be one that a folder can have'):
        compare(never, both, RECIPE, images(), folder=tmp_path/'run')
    assert not (tmp_path/'run').exists()


def test_what_make_student_gives_must_be_a_network():
    with pytest.raises(ValueError, match='what make_student gives must be a network'):
        compare(lambda: 'net', {'a': Contender(Supervised, images())}, RECIPE, images())


def test_settings_to_choose_from_must_be_some():
    with pytest.raises(ValueError, match='settings must name at least one'): choose(net, {}, RECIPE, images())


def test_a_contender_with_its_own_recipe_does_not_lengthen_the_others():
    own = Contender(Supervised, images(600), replace(RECIPE, steps=2))
    found = compare(net, {'a': Contender(Supervised, images()), 'own': own}, replace(RECIPE, steps=None, epochs=1),
                    images(seed=1), seeds=1)
    assert [len(h.losses['hard']) for h in found.histories.values()] == [8, 2]  # ceil(120 / 16), and its own


def test_one_rule_says_which_weights_are_kept_and_when_a_run_stops(tmp_path):
    "Also for a contender with a recipe of its own; the steps taken are in the runs, and in the rows if they are fewer."
    train, valid, _ = digits()
    train = train.subset(torch.arange(64))
    rule = Recipe(steps=48, batch_size=16, lr=0.5, schedule='constant', precision='float32', keep='best', patience=1)
    own = replace(rule, steps=40, keep='last', patience=None)
    made = {'alone': Contender(Supervised, train), 'own': Contender(Supervised, train, own)}
    found = compare(digit_student, made, rule, valid, seeds=2, folder=tmp_path)
    kept = [Checkpoint(tmp_path/f'{name}-0').read()[1]['recipe'] for name in made]
    assert [(r['keep'], r['patience'], r['steps']) for r in kept] == [('best', 1, 48), ('best', 1, 40)]
    for name, h in found.histories.items(): assert found.values(name, 'steps')[0] == h.steps == h.last['step']
    assert found.values('alone', 'planned') == [48, 48] and found.values('own', 'planned') == [40, 40]
    assert found.stopped_early and found.values('alone', 'steps')[0] < 40 and found.values('own', 'steps')[0] < 40
    for row in found.rows(): assert row['steps'] == sum(found.values(row['model'], 'steps')) / 2
    assert found.values('alone', 'valid_accuracy')[0] == found.histories['alone'].best['accuracy']
    assert 'steps' not in found.rows('valid_accuracy')[0]
    whole = compare(digit_student, made, replace(rule, keep='last', patience=None), valid, seeds=1)
    assert not whole.stopped_early and not {'steps', 'planned'} & set(whole.rows()[0])


def test_all_are_measured_equally_often_however_many_images_they_learn_from():
    "Or else the same patience would be shorter, and the best of more measurements luckier, where images are few."
    train, valid = images(160), images(seed=1)
    rule, own = replace(RECIPE, steps=None, epochs=4), replace(RECIPE, steps=20)
    made = {'few': Contender(Supervised, train.subset(torch.arange(16))), 'all': Contender(Supervised, train),
            'own': Contender(Supervised, train.subset(torch.arange(16)), own)}
    def found(rule): return compare(net, made, rule, valid, seeds=1)
    rows = {name: [r['step'] for r in h.rows] for name, h in found(rule).histories.items()}
    assert rows == {'few': [10, 20, 30, 40], 'all': [10, 20, 30, 40], 'own': [5, 10, 15, 20]}
    same, fixed = found(replace(rule, rows=2)), found(replace(rule, steps=40))
    assert [len(h.rows) for h in same.histories.values()] == [2, 2, 2]
    assert fixed.values('few', 'valid_accuracy') == same.values('few', 'valid_accuracy')  # nothing else has changed


def test_the_table_of_a_result_shows_steps_where_runs_stopped_early():
    row = dict(setting='few_labels', model='alone', parameters=1, macs=1, bytes=1, latency_ms=1., accuracy=0.5,
               ci95=None, agreement=None)
    def head(*rows): return result_table(rows, Measure('accuracy', share=True)).head
    assert 'steps' not in head(row, row | {'steps': 10})
    shown = result_table([row, row | {'steps': 1234.5, 'planned': 2000.0}], Measure('accuracy', share=True))
    assert [r[shown.head.index('steps')] for r in shown.rows] == ['', '1,234 of 2,000']
    result = stored_result('digits') | {'resumed': False}
    early = [r | {'steps': 9.0, 'planned': 10.0} for r in result['rows']]
    assert 'initial weights, steps and schedule' in make_report(result, {}, {})
    assert 'initial weights, planned steps and schedule' in make_report(result | {'rows': early}, {}, {})


def test_a_table_refuses_digits_and_keeps_its_columns_apart():
    with pytest.raises(ValueError, match='digits must be a whole number from 0 to 20, but is -1'): table(ROWS, -1)
    assert table([{'a': 'x|y'}])._repr_markdown_().endswith('| x\\|y |')


def test_a_comparison_does_not_take_over_another_ones_runs(teacher, tmp_path):
    compare(net, {'a': Contender(Supervised, images())}, RECIPE, images(seed=1), seeds=1, folder=tmp_path)
    def changed():
        model = net()
        nn.init.ones_(model[-1].bias)
        return model
    with pytest.raises(ValueError, match='other initial weights'):
        compare(changed, {'a': Contender(Supervised, images())}, RECIPE, images(seed=1), seeds=1, folder=tmp_path)


def pairs(teacher, *grid, make=Distill):
    "Contenders with these pairs of temperature and alpha."
    def contender(T, a): return Contender(partial(make, teacher=teacher, temperature=T, alpha=a), images())
    return {f'T={T} a={a}': contender(T, a) for T, a in grid}


def test_the_first_of_the_best_on_the_validation_split_is_chosen(teacher):
    grid = pairs(teacher, (1., 0.), (2., 0.), (4., 0.9))  # alpha = 0: the temperature does nothing, the first two tie
    best, rows = choose(net, grid, RECIPE, images(seed=1))
    accuracies = [r['valid_accuracy'] for r in rows.values()]
    assert list(rows) == list(grid) and accuracies[0] == accuracies[1]
    assert best == list(grid)[accuracies.index(max(accuracies))]


def test_a_choice_goes_on_where_a_setting_diverges(teacher):
    def explodes_at_2(student, teacher, temperature, alpha):
        objective = Distill(student, teacher, temperature, alpha)
        forward = objective.forward
        if temperature == 2: objective.forward = lambda batch: {k: loss*math.inf for k, loss in forward(batch).items()}
        return objective
    wild, tame = pairs(teacher, (2., 0.9), make=explodes_at_2), pairs(teacher, (4., 0.9), make=explodes_at_2)
    best, rows = choose(net, wild | tame, RECIPE, images(seed=1), seeds=1)
    assert best == 'T=4.0 a=0.9' and rows[best]['valid_accuracy'] > 0 and rows['T=2.0 a=0.9'] is None
    with pytest.raises(DivergedError, match='every setting of kd diverged'):
        choose(net, wild, RECIPE, images(seed=1), 'kd')
    with pytest.raises(ValueError, match='test must be left out'):
        choose(net, tame, RECIPE, images(seed=1), test=images(seed=2))
    with pytest.raises(DivergedError, match='^distilled, seed 3: the loss'):
        compare(net, {'distilled': wild['T=2.0 a=0.9']}, RECIPE, images(seed=1), seeds=[3])


def test_what_a_contender_needs_is_trained_before_its_student(teacher):
    calls = []
    def before(): calls.append('before'); return teacher
    def make(student, taught): calls.append('make'); return Distill(student, taught)
    own = Recipe(steps=3, batch_size=8, precision='float32')
    found = compare(net, {'a': Contender(make, images(), own, before)}, RECIPE, images(seed=1), seeds=2)
    assert calls == ['before', 'make'] * 2 and len(found.histories['a'].losses['soft']) == 3


# --- tables

ROWS = [{'model': 'alone', 'images': 1234, 'accuracy': 0.5},
        {'model': 'distilled', 'accuracy': None, 'ci95': [0.25, 1.]}]
TABLE = """| model | images | accuracy | ci95 |
| :-- | --: | --: | --: |
| alone | 1,234 | 0.50 |  |
| distilled |  |  | [0.25, 1.00] |"""
TEXT = """model      images  accuracy          ci95
---------  ------  --------  ------------
alone       1,234      0.50
distilled                    [0.25, 1.00]"""


def test_a_notebook_shows_a_table_and_everything_else_its_text():
    from IPython.core.formatters import DisplayFormatter
    made = table(ROWS, digits=2)
    assert str(made) == TEXT
    assert DisplayFormatter().format(made)[0] == {'text/markdown': TABLE, 'text/plain': TEXT}


def test_a_column_without_a_value_is_left_out():
    made = table(ROWS, columns={'model': lambda r: r['model'], 'nothing': lambda r: ''})
    assert made.head == ['model'] and made.rows == [['alone'], ['distilled']]


def test_a_table_needs_no_ipython():
    code = f"from distill_nb.compare import table; print(table({ROWS}, digits=2))"
    code = f"import sys; sys.modules['IPython'] = None; {code}"
    p = subprocess.run([*python(), '-c', code], capture_output=True, text=True)
    assert p.stdout == TEXT + '\n', p.stderr


def test_rows_of_results_of_different_age_are_paired():
    stored = lambda name: next(r for r in stored_result(name)['rows'] if r['model'] == 'kd')
    old, new = stored('methods_digits'), stored('dist_digits')
    assert paired(new, old, 'accuracy')[0] == pytest.approx(-paired(old, new, 'accuracy')[0])


@pytest.mark.parametrize('make', [lambda student: Supervised(net()), lambda student: net(), lambda student: None])
def test_a_contender_that_does_not_train_its_student_is_refused_by_name(make):
    data, contenders = images(), {'own': Contender(make, images())}
    with pytest.raises(ValueError, match="what make of 'own' gives must be an objective that trains the student"):
        compare(net, contenders, RECIPE, data, seeds=1, progress=False)


@pytest.mark.parametrize('call', [compare, choose])
def test_a_network_in_place_of_what_makes_one_is_refused(call):
    data = images()
    with pytest.raises(ValueError, match="make_student must be a function .*copy.deepcopy.*'Sequential'"):
        call(net(), {'plain': Contender(Supervised, data)}, RECIPE, data, seeds=1, progress=False)


def test_a_number_of_seeds_may_come_from_numpy():
    data = images()
    found = compare(net, {'plain': Contender(Supervised, data)}, RECIPE, data, seeds=np.int64(2), progress=False)
    assert found.seeds == [0, 1] and {type(s) for s in found.seeds} == {int}
