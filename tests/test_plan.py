"""The front of a family of students, and the pick from it."""
import math, random

import pytest

from distill_nb.models import profile_model
from distill_nb.plan import check_limits, draw_front, family, front, front_table, int8_speed, pick
from distill_nb.protocol import Measure
from distill_nb.zoo import build_model, open_model

ACCURACY, BITS = Measure('valid_accuracy', share=True), Measure('valid_bits_per_byte', higher=False)


def row(model, ms, accuracy, size=1000, macs=1, torch_ms=1., **more):
    return dict(model=model, training='alone', numbers='float', latency_ms=ms, low_ms=0.9 * ms, high_ms=1.1 * ms,
                valid_accuracy=accuracy, ci95=None, bytes=size, macs=macs, torch_ms=torch_ms) | more


# What the file takes, what torch takes and what is multiplied: three orders.
FOUR = [row('wide', 1., .90, macs=400, torch_ms=2.0), row('deep', 3., .92, macs=100, torch_ms=4.0),
        row('light', 4., .91, macs=50, torch_ms=1.0), row('tiny', .5, .80, macs=10, torch_ms=3.0)]


def test_every_member_of_a_family_opens_by_its_name(tmp_path):
    from distill_nb.files import save_weights
    for name in family('resnet8,digit_student,digit_teacher_w0.125', [0.25, 0.5, 1, 2]):
        made = build_model(name, 10, 1, 8)
        save_weights(made, tmp_path/'a.safetensors', [str(i) for i in range(10)], architecture=name, channels=1, size=8)
        found = open_model(tmp_path/'a.safetensors').model
        assert all(a.equal(b) for a, b in zip(made.state_dict().values(), found.state_dict().values()))


def test_a_width_is_a_factor_on_every_layer():
    from torch import nn
    for name in ('resnet8', 'resnet8x4', 'digit_student', 'digit_teacher'):
        outs = [[m.out_channels for m in build_model(f'{name}{w}', 10, 1, 8).modules() if isinstance(m, nn.Conv2d)]
                for w in ('', '_w0.5', '_w2')]
        assert [n // 2 for n in outs[0]] == outs[1] and [2 * n for n in outs[0]] == outs[2]
    macs = [profile_model(build_model(n, 10), repeats=1).macs for n in family('resnet8')]
    assert macs == sorted(macs) and 3 < macs[2] / macs[1] < 5


@pytest.mark.parametrize('names', ['', ' , ', 'resnet8,resnet8', 'resnet8_w0', 'resnet18_w0.5', 'wrn_16_2_w0.5',
                                   'resnet8_wide', 'vit_tiny_8_w2'])
def test_names_that_are_no_family_are_refused(names):
    with pytest.raises(ValueError):
        for name in family(names): build_model(name, 10, 1, 8)
    for widths in ([], [0], [math.nan], ['2'], [-1.]):
        with pytest.raises((ValueError, TypeError), match='widths'): family('resnet8', widths)


def test_the_front_is_what_nothing_beats():
    draw = random.Random(1)
    for n in range(200):
        measure = (ACCURACY, BITS)[n % 2]
        rows = [dict(latency_ms=draw.randrange(1, 5), **{measure.name: draw.randrange(5)}) for _ in range(8)]
        sign = 1 if measure.higher else -1
        def beaten(r):
            return any(s['latency_ms'] <= r['latency_ms'] and sign*s[measure.name] >= sign*r[measure.name] and s != r
                       for s in rows)
        expected = [r for r in rows if not beaten(r)]
        found = front(rows, measure)
        assert sorted(map(id, found)) == sorted(map(id, expected))
        assert [r['latency_ms'] for r in found] == sorted(r['latency_ms'] for r in found)


def test_the_pick_follows_the_clock_of_the_files_and_no_other():
    "Each limit separates the pick by the file's latency from those by multiplications and by torch's latency."
    by_macs = [r | dict(latency_ms=r['macs']/100) for r in FOUR]
    by_torch = [r | dict(latency_ms=r['torch_ms']) for r in FOUR]
    found = [pick(rows, ACCURACY, latency_ms=1)['model'] for rows in (FOUR, by_macs, by_torch)]
    assert found == ['wide', 'deep', 'light']
    assert [r['model'] for r in front(FOUR, ACCURACY)] == ['tiny', 'wide', 'deep']
    assert [r['model'] for r in front(FOUR, ACCURACY, 'macs')] == ['tiny', 'light', 'deep']
    assert [r['model'] for r in front(FOUR, ACCURACY, 'torch_ms')] == ['light', 'deep']


def test_limits_are_kept_and_ties_go_to_the_cheaper():
    rows = [row('a', 1., .9, 100), row('b', 2., .95, 50), row('c', 2., .95, 40), row('d', 1., .9, 90)]
    assert pick(rows, ACCURACY)['model'] == 'c' and pick(rows, ACCURACY, latency_ms=1)['model'] == 'd'
    assert pick(rows, ACCURACY, bytes=95)['model'] == 'c' and pick(rows, ACCURACY, bytes=95,
                                                                   latency_ms=1.5)['model'] == 'd'
    assert pick(rows, ACCURACY, accuracy=.9)['model'] == 'd' and pick(rows, ACCURACY, accuracy=.91)['model'] == 'c'
    bits = [dict(model='x', latency_ms=1., bytes=1, valid_bits_per_byte=2.), dict(
        model='y', latency_ms=2., bytes=1, valid_bits_per_byte=1.)]
    assert pick(bits, BITS)['model'] == 'y' and pick(bits, BITS, accuracy=2.5)['model'] == 'x'
    assert pick(bits, BITS, accuracy=1.5)['model'] == 'y'


def test_where_nothing_fits_the_nearest_is_named():
    with pytest.raises(ValueError, match=r'nothing fits latency_ms 0.1; the nearest is tiny, alone, float: 0.5 ms'):
        pick(FOUR, ACCURACY, latency_ms=.1)
    with pytest.raises(ValueError, match='nothing fits latency_ms 1, accuracy 0.91; the nearest is wide'):
        pick(FOUR, ACCURACY, latency_ms=1, accuracy=.91)
    for limit in (0, -1, math.nan, math.inf, 'a', True):
        for name in ('latency_ms', 'bytes', 'accuracy'):
            with pytest.raises((ValueError, TypeError), match=name): check_limits(**{name: limit})
    with pytest.raises(ValueError, match='valid_accuracy of a row'): pick([row('a', 1., math.nan)], ACCURACY)
    with pytest.raises(ValueError, match='rows'): pick([], ACCURACY)


def test_the_table_and_the_picture_show_what_is_there():
    shown = front_table(FOUR, ACCURACY)
    place = shown.head.index('front')
    assert [r[0] for r in shown.rows] == ['tiny', 'wide', 'deep', 'light']
    assert [r[place] for r in shown.rows] == ['*', '*', '*', '']
    [ax] = draw_front(FOUR, ACCURACY, FOUR[0], 1.).axes
    lines = {line.get_label(): line for line in ax.lines}
    assert lines['picked'].get_xydata().tolist() == [[1., 90.]] and list(lines['limit'].get_xdata()) == [1., 1.]
    steps = next(line for line in ax.lines if line.get_drawstyle() == 'steps-post')
    assert steps.get_xdata().tolist() == [.5, 1., 3.]


def test_int8_is_faster_or_slower_only_beyond_the_spread():
    def both(name, ms): return [row(name, 1., .9), row(name, ms, .9, numbers='int8')]
    found = int8_speed(both('a', .5) + both('b', 1.05) + both('c', 2.) + [row('alone', 1., .9)])
    assert [(f['model'], f['verdict']) for f in found] == [
        ('a', 'faster'), ('b', 'no difference shown'), ('c', 'slower')]
    assert found[0]['times'] == 2


def test_the_memory_order_of_a_training_leaves_no_trace_in_the_file(tmp_path):
    "Convolutions are trained with channels last, and such weights once brought ten more operators into the file."
    import torch
    from torch import nn
    from distill_nb.contract import Teacher
    from distill_nb.deploy import _load, export_onnx
    model, graphs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), []
    for form in (torch.contiguous_format, torch.channels_last):
        teacher = Teacher(model.to(memory_format=form), mean=[.5]*3, std=[.25]*3, size=8)
        export_onnx(teacher, tmp_path/'a.onnx')
        graphs.append([n.op_type for n in _load(tmp_path/'a.onnx')[0].graph.node])
        assert model[0].weight.is_contiguous(memory_format=form)
    assert graphs[0] == graphs[1]
