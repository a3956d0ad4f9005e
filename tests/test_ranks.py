"""What the ranks of a run say to each other: the same in all of them, and no rank waits for one that is gone."""
import os, subprocess, threading

import pytest
import torch

from distill_nb.ranks import agreed, from_each, from_first, gathered, meet, same_tensors, watched, world
from processes import ENV, alone_and_together, ended, machines, python


def test_a_process_alone_has_nobody_to_ask():
    t = {'w': torch.ones(2)}
    assert world() == meet() == (0, 1) and from_first(lambda: 7) == 7 and from_each('x') == ['x']
    assert same_tensors(t) is t and gathered(t['w'])[0] is t['w'] and agreed({'a': 1}) is None
    with pytest.raises(KeyError): from_first(lambda: {}['lost'])
    before = threading.active_count()
    with watched(): assert threading.active_count() == before
    with pytest.raises(ZeroDivisionError), watched(): 1 / 0


@pytest.mark.parametrize('call, said', [
    (lambda: from_first(7), 'make must be a function, but is 7'),
    (lambda: same_tensors([torch.ones(1)]), 'tensors must be a dict of tensors by name'),
    (lambda: gathered([1]), r't must be a tensor, but is \[1\]'),
    (lambda: agreed('x'), "marks must be a dict, but is 'x'")])
def test_what_cannot_be_said_is_refused(call, said):
    with pytest.raises(ValueError, match=said): call()


WORDS = """
from distill_nb.ranks import *
class Odd(ValueError):  # cannot be unpickled: its maker takes two arguments
    def __init__(self, a, b): super().__init__(f'{a} and {b}')
def said(call):
    try: return str(call())
    except Exception as error: return f'{type(error).__name__}: {error}'
def fail(error): raise error
def run():
    rank, size = meet()
    own = {'half': torch.full((2, 3), rank + 1, dtype=torch.bfloat16), 'n': torch.tensor(rank + 5),
           'b': torch.tensor([rank == 0]), 'none': torch.ones(0, 4), 'turned': torch.arange(6).reshape(2, 3).T + rank}
    one = {k: (str(t.dtype), t.tolist()) for k, t in same_tensors(own if rank == 0 else {}).items()}
    parts = torch.full((2 - 2 * rank, 2), rank, dtype=torch.int16), torch.ones(rank, dtype=torch.bool), torch.ones(0, 2)
    rows = [torch.cat(gathered(t)).tolist() for t in parts]
    texts = [said(lambda: from_first(lambda: f'of {rank}'))]
    for error in (KeyError('key'), Odd(1, 2), ValueError('no')):
        texts.append(said(lambda: from_first(lambda: fail(error))))
    if size == 1: return one, rows, texts
    for marks in ({'a': 1, 'b': [rank]}, {'a': 1} if rank else {'a': 1, 'c': 2}, {'a': 1}):
        texts.append(said(lambda: agreed(marks)))
    texts.append(said(lambda: gathered(torch.ones(2, 2 + rank))))
    return [one, rows, *zip(*from_each(texts))]
"""


def test_all_ranks_are_told_the_same(tmp_path):
    (one, *alone), (two, tensors, rows, *texts) = alone_and_together(WORDS, tmp_path)
    assert (one, two) == (1, 2) and tensors == alone[0] and rows == [[[0, 0], [0, 0]], [True], []]
    assert all(a == b for a, b in texts)
    said = [a for a, _ in texts]
    assert said[:2] == ['of 0', "KeyError: 'key'"] and said[3] == 'ValueError: no'
    assert said[2] == 'ValueError: Odd: 1 and 2'
    assert said[4] == 'ValueError: b must be the same in every rank, but is [0] in rank 0 and [1] in rank 1.'
    assert said[5] == 'ValueError: c must be the same in every rank, but is 2 in rank 0 and None in rank 1.'
    assert said[6] == 'None' and 'of one shape but for the first axis' in said[7]


# --- the watch

QUIET = """
import threading
from distill_nb import ranks
from distill_nb.ranks import *
meet()
for last in (0, 1):  # rank 0 is the last to end, then the first
    with watched(): time.sleep(0.5 * (rank == last))
assert threading.active_count() == 1
try:
    with watched():
        time.sleep(0.2 * rank)
        raise ValueError('both alike')
except ValueError as error: print(error)
if rank: ranks._called = lambda *_: []
with watched(): pass
from_each(0)
print('done')
"""


def test_an_end_is_no_death_and_what_fails_alike_fails_as_it_would_alone(tmp_path):
    both = ended(machines(QUIET.replace('meet()', 'ranks._SILENT = 5; meet()'), tmp_path/'a', tmp_path/'b'))
    assert [(code, out) for code, out, _ in both] == [(0, 'both alike\ndone\n')] * 2, both
    warned = [err.count('UserWarning: not every rank can reach the first one') for _, _, err in both]
    assert warned == [1, 0] and not any('was lost' in err for _, _, err in both)


COUNTED = """
from distill_nb import ranks
from distill_nb.ranks import *
meet()
sent, send = [], ranks._Watch._send
ranks._Watch._send = lambda self, line='': (sent.append(line), send(self, line))
with watched(): time.sleep(2.5)
print(len(sent), sent[-1])
"""


def test_the_watch_speaks_once_a_second_and_answers_nothing(tmp_path):
    for code, out, err in ended(machines(COUNTED, tmp_path/'a', tmp_path/'b')):
        n, last = out.split()
        assert code == 0 and 2 <= int(n) <= 30 and last == 'bye', (out, err)


LOST = """
from distill_nb import ranks
from distill_nb.ranks import *
ranks._SILENT, ranks._GRACE = 4., 1.
meet()
with watched() as watch:
    watch.say = ' in the middle: {}.'.format
    from_each(0)
    time.sleep(0.5)
    if rank == WHO: END
    time.sleep(60)
"""


def slow(*values): return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize('who, end, said', [
    (1, 'os.kill(os.getpid(), signal.SIGKILL)', 'rank 1 of 3 was lost in the middle: its connection closed.'),
    slow(0, 'os.kill(os.getpid(), signal.SIGKILL)', 'rank 0 of 3 was lost in the middle: its connection closed.'),
    slow(1, 'os.kill(os.getpid(), signal.SIGSTOP)', 'rank 1 of 3 was lost in the middle: it was silent for 4 seconds.'),
    slow(2, "raise OSError('disk\\nfull')", 'rank 2 of 3 failed in the middle: OSError: disk.')])
def test_a_rank_that_is_lost_ends_the_others_and_is_named(tmp_path, who, end, said):
    three = machines(LOST.replace('WHO', str(who)).replace('END', end), *(tmp_path/name for name in 'abc'))
    try: others = ended([p for i, p in enumerate(three) if i != who])
    finally:
        for p in three: p.kill()
    for code, _, err in others: assert code == 1 and err.splitlines()[-1] == f'distill_nb: {said}', err


LAUNCHED = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from small import images, net
from distill_nb.ranks import world
from distill_nb.training import Recipe, Supervised, fit

class Dies(Supervised):
    batches = 0
    def forward(self, batch):
        self.batches += 1
        if self.batches == 60 and world()[0] == 1: os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch)

torch.manual_seed(0)
recipe = Recipe(steps=100_000, batch_size=16, precision='float32')
fit(Dies(net()), images(), recipe, images(), folder={folder!r}, save_every=0, progress=False)
"""


@pytest.mark.parametrize('launcher', [
    ['torch.distributed.run', '--nproc-per-node', '2'],
    pytest.param(['accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
                  '--mixed_precision', 'no', '--dynamo_backend', 'no'], marks=pytest.mark.slow)])
def test_under_a_launcher_a_rank_that_dies_ends_the_training_of_the_others(tmp_path, launcher):
    (tmp_path/'two.py').write_text(LAUNCHED.format(tests=os.path.dirname(__file__), folder=str(tmp_path/'run')))
    p = subprocess.run([*python(), '-m', *launcher, str(tmp_path/'two.py')], capture_output=True, text=True,
                       env=os.environ | ENV, timeout=100)
    again = f"with resume=True the run goes on from the checkpoint in '{tmp_path/'run'}'."
    said = 'distill_nb: rank 1 of 2 was lost at step 59 of 100000: its connection closed. Start all ranks again;'
    assert p.returncode and f'{said} {again}' in p.stderr, p.stderr
