"""No wrong call of anything public ends unclearly, silently, or never: some of those that tests/calls.py draws."""
import functools, importlib, inspect, pickle, statistics
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest, torch
from torch import nn

from calls import drawn, modules
from small import net
from distill_nb.views import CropFlip
from distill_nb.doors import guard, plain
from distill_nb.losses import DistillationLoss, kd_loss
from distill_nb.training import Supervised


@pytest.mark.parametrize('share', [0.05, pytest.param(1., marks=pytest.mark.slow)])
@pytest.mark.parametrize('module', modules())
def test_wrong_calls_end_with_a_sentence(module, share):
    found = drawn(module, share)
    assert found
    assert [call for call in found if call[3] not in ('clear', 'accepted')] == []


def guarded(**functions):
    "A module of these functions, with doors."
    space = {'__name__': __name__, **functions}
    guard(space)
    return space


def test_an_argument_of_another_kind_is_refused_before_the_call():
    seen = []
    def train(model:nn.Module, resume:bool=False, steps:int|None=None): seen.append(steps)
    f = guarded(train=train)['train']
    for wrong, said in [(dict(model=None), 'model must be a network (nn.Module), but is None.'),
                        (dict(model='best.pth'), "but is 'best.pth'. Open a name or a file with open_model."),
                        (dict(model=nn.Linear), 'but is the class Linear. Call it to make one.'),
                        (dict(model=Supervised(net()).eval), 'but is a method.'),
                        (dict(resume='no'), "resume must be True or False, but is 'no'."),
                        (dict(resume=1), 'resume must be True or False, but is 1.')]:
        with pytest.raises(ValueError) as e: f(**dict(model=net()) | wrong)
        assert said in str(e.value)
    assert seen == []
    f(net(), np.bool_(True), np.int64(3))
    assert seen == [3]


def test_a_value_of_another_kind_is_refused_by_the_function_or_else_by_the_door():
    def ranged(steps:int):
        if steps == 'many': raise ValueError('steps must be from 1 to 9.')
        return steps + 1
    def careless(n:float, name:str='n'): return name
    f = guarded(ranged=ranged, careless=careless)
    with pytest.raises(ValueError, match='^steps must be from 1 to 9.$'): f['ranged']('many')
    with pytest.raises(ValueError, match="^steps must be a whole number, but is 'few'.$") as e: f['ranged']('few')
    assert isinstance(e.value.__cause__, TypeError)
    with pytest.raises(ValueError, match="^n must be a number, but is True.$"): f['careless'](True)
    # The letter n is in this error, but the argument is not named.
    def foreign(n:int): raise TypeError('something else went wrong')
    with pytest.raises(ValueError, match='^n must be a whole number'): guarded(foreign=foreign)['foreign']('a')


def test_what_has_doors_pickles_compiles_and_is_called_by_its_own_name():
    loss = DistillationLoss()
    assert loss.divergence is kd_loss and pickle.loads(pickle.dumps(loss)).divergence is kd_loss
    assert pickle.loads(pickle.dumps(functools.partial(kd_loss, temperature=2.))).func is kd_loss
    assert str(inspect.signature(kd_loss)) == str(inspect.signature(kd_loss.__wrapped__))
    f = torch.compile(lambda a, b: kd_loss(a, b, 2.), backend='eager', fullgraph=True)
    a, b = torch.randn(2, 6, 3)
    assert torch.equal(f(a, b), kd_loss(a, b, 2.))


def test_what_is_only_imported_gets_no_door():
    "Every module imports Path, which has class methods, and classes of torch."
    foreign = [Path, Path.home.__func__, OrderedDict, OrderedDict.fromkeys, torch.Tensor, nn.Linear]
    before = [dict(vars(c)) for c in foreign if inspect.isclass(c)]
    guard({'__name__': __name__, **{str(i): f for i, f in enumerate(foreign)}, 'mean': statistics.mean})
    assert [dict(vars(c)) for c in foreign if inspect.isclass(c)] == before
    assert not hasattr(Path.home.__func__, '__wrapped__') and not hasattr(statistics.mean, '__wrapped__')


def test_numbers_of_numpy_become_plain():
    for value in (np.int64(3), np.float32(0.5), np.bool_(True)): assert type(plain(value)) in (int, float, bool)
    assert CropFlip(1, np.bool_(True)).flip


@pytest.mark.parametrize('module', modules())
def test_every_module_hangs_its_doors(module):
    m = importlib.import_module(f'distill_nb.{module}')
    found = [n for n in m.__all__ if inspect.isfunction(f := getattr(m, n)) and not hasattr(f, '__wrapped__')]
    assert found == []
