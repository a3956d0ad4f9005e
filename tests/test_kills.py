"""Runs that are killed with `kill -9` at random moments, and resumed until they are done, end as the run that nobody
killed: the same weights, losses and rows, bit for bit.

    python tests/test_kills.py --kills 50 --seed 0     # a line for each run, and a table of all methods at the end
"""
import argparse, contextlib, json, os, random, signal, subprocess, sys, time, traceback
from dataclasses import replace
from pathlib import Path

if __name__ == '__main__': os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch

from distill_nb.files import fingerprint, read_weights, save_weights, write_atomic
from distill_nb.data import digits
from distill_nb.models import digit_student, digit_teacher
from distill_nb.contract import Teacher
from distill_nb.history import Checkpoint
from distill_nb.training import Recipe, Setup, Supervised, fit
from distill_nb.logits import Distill
from distill_nb.cache import CachedTeacher
from distill_nb.tokens import feature_method
from distill_nb.self_distillation import SelfTeacher, born_again
from distill_nb.exits import BeYourOwnTeacher
from distill_nb.data_free import DATA_FREE, distill_without_data
from distill_nb.zoo import load_weights
from distill_nb.cli import distill_nb, run_command

RECIPE = Recipe(steps=160, batch_size=64, optimizer='adamw', lr=0.02, precision='float32')


# --- what is run: a function of a folder, which gives what must be the same

def setup(folder): return Setup(folder/'run', resume=True, device='cpu', progress=False, save_every=0.05)


def marks(models, histories):
    "Of weights and buffers, of the losses of every step, and what was measured."
    timeless = [{k: v for k, v in row.items() if k != 'seconds'} for h in histories for row in h.rows]
    return [*(fingerprint(m.state_dict()) for m in models), *(h.losses for h in histories), timeless]


def trained(folder, make, recipe=RECIPE):
    "Fit what `make` gives for a new student and a teacher that knows digits."
    train, valid, _ = digits()
    teacher = load_weights(digit_teacher(), folder.parent/'teacher.safetensors')
    torch.manual_seed(1)
    objective = make(digit_student(), teacher, train)
    return marks([objective], [fit(objective, train, recipe, valid, setup=setup(folder))])


def kept(folder):
    "Logit matching with kept answers, some of which are there when it goes on."
    def make(student, teacher, train): return Distill(student, CachedTeacher(teacher, train, folder/'answers'))
    return trained(folder, make, replace(RECIPE, keep='best'))


def hint(folder): return trained(folder, lambda student, teacher, train: feature_method('hint', student, teacher))


def byot(folder):
    def make(student, teacher, train): return BeYourOwnTeacher(student, shape=(1, 8, 8))
    return trained(folder, make, replace(RECIPE, optimizer='sgd', steps=100))


def itself(folder): return trained(folder, lambda student, teacher, train: SelfTeacher(student, train))


def generations(folder):
    train, valid, _ = digits()
    made = born_again(digit_student, train, replace(RECIPE, steps=60), valid, setup=setup(folder))
    return marks(made.models, made.histories)


def data_free(folder):
    teacher = load_weights(digit_teacher(), folder.parent/'teacher.safetensors')
    torch.manual_seed(1)
    student, train = digit_student(), digits().train
    known = Teacher(teacher, mean=train.mean, std=train.std, size=8)
    recipe = replace(DATA_FREE, steps=40, precision='float32')
    found = distill_without_data(known, student, recipe=recipe, valid=digits().valid, setup=setup(folder))
    return [*marks([student], [found.history]), fingerprint({'images': found.images})]


def command(folder):
    "The whole command; `--resume` once there is something to resume."
    out = folder/'run'
    argv = ['--teacher_weights', folder.parent/'teacher.safetensors', '--epochs', 2, '--seeds', 2, '--labels', 0,
            '--temperature', 4, '--alpha', 0.9, '--device', 'cpu', '--out', out]
    if (out/'recipe.json').exists(): argv.append('--resume')
    if code := run_command(distill_nb, [str(a) for a in argv]): raise SystemExit(f'the command ended with {code}')
    rows = json.loads((out/'result.json').read_text())['rows']
    timed = 'seconds', 'latency_ms', 'seconds_per_epoch'
    def timeless(row): return {k: v for k, v in row.items() if k not in timed}
    rows = [timeless(row) | {'runs': [*map(timeless, row.get('runs', []))]} for row in rows]
    return [rows, *(fingerprint(read_weights(p)[0]) for p in sorted(out.glob('*.safetensors')))]


RUNS = dict(kept=kept, hint=hint, byot=byot, itself=itself, generations=generations, data_free=data_free,
            command=command)


def teach(folder):
    "The teacher of all."
    torch.manual_seed(0)
    teacher, train = digit_teacher(), digits().train
    fit(Supervised(teacher), train, Recipe(epochs=3, batch_size=64, lr=0.05, precision='float32'), progress=False)
    save_weights(teacher, folder.parent/'teacher.safetensors', mean=train.mean, std=train.std)
    return []


# --- how it is killed

def start(run, folder):
    "A process of its own that writes what `run` gives into the folder; all that it needs is imported already."
    folder.mkdir(parents=True, exist_ok=True)
    if pid := os.fork(): return pid
    try:
        with open(folder/'log', 'w') as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try: write_atomic(folder/'marks.json', json.dumps(run(folder)).encode())
            except BaseException:
                traceback.print_exc()
                log.flush()
                os._exit(1)
        os._exit(0)
    finally: os._exit(1)


def ended(pid, seconds):
    "Did it end by itself within this time?"
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        if os.waitpid(pid, os.WNOHANG)[0]: return True
        time.sleep(0.001)
    return False


def finished(run, folder):
    "What it gives, or the end of what it said."
    try: return json.loads((folder/'marks.json').read_text())
    except FileNotFoundError: return (folder/'log').read_text()[-2000:]


def whole(run, folder):
    "What a run gives that nobody kills, and its seconds."
    began = time.monotonic()
    os.waitpid(start(run, folder), 0)
    return finished(run, folder), time.monotonic() - began


def killed(run, folder, seconds, most, rng):
    """What a run gives that is killed up to `most` times and resumed; and for each kill the moment, in seconds after
    its start, and the steps that its checkpoints hold."""
    kills = []
    while True:
        pid, moment = start(run, folder), rng.uniform(0, seconds)
        if len(kills) == most: moment = 10*seconds + 60
        if ended(pid, moment): return finished(run, folder), kills
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if len(kills) == most: return f'it did not end within {moment:.0f} s', kills
        steps = [Checkpoint(path.parent).read()[1]['step'] for path in folder.rglob('checkpoint.safetensors')]
        kills.append((round(moment, 2), sum(steps)))


def trial(names, kills, folder, seed=0, most=3):
    "Kill runs of these methods in turn until so many kills were made; gives a row for each run that was killed."
    rng, rows, taught = random.Random(seed), [], whole(teach, folder/'teach')[0]
    assert taught == [], taught
    expected = {name: whole(RUNS[name], folder/name) for name in names}
    for name, (told, _) in expected.items(): assert isinstance(told, list), f'{name}: {told}'
    while (left := kills - sum(len(row['kills']) for row in rows)) > 0:
        name = names[len(rows) % len(names)]
        told, seconds = expected[name]
        place = folder/f'{name}-{len(rows)}'
        found, made = killed(RUNS[name], place, seconds, min(most, left), rng)
        rows.append(dict(name=name, kills=made, seconds=round(seconds, 2), equal=found == told))
        rows[-1]['temporary files left'] = len([*place.rglob('.*.tmp')])
        if found != told:
            other = found if isinstance(found, str) else [i for i, a in enumerate(found) if a != told[i]]
            rows[-1]['found'] = other
        print(json.dumps(rows[-1]), flush=True)
    return rows


@pytest.mark.parametrize('runs,kills', [(['kept', 'generations'], 4),
                                        pytest.param([*RUNS], 50, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_nobody_killed(runs, kills):
    argv = [sys.executable, __file__, '--kills', str(kills), '--runs', *runs]
    p = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert p.returncode == 0, p.stdout + p.stderr


def main():
    import tempfile
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--runs', nargs='+', choices=RUNS, default=[*RUNS])
    given = parser.parse_args()
    import accelerate.state, matplotlib.pyplot, torch._dynamo  # now, and not in every run
    torch.set_num_threads(1)
    digits()
    with tempfile.TemporaryDirectory() as folder: rows = trial(given.runs, given.kills, Path(folder), given.seed)
    print(f"{'run':12} {'runs':>5} {'kills':>6} {'in training':>12} {'equal':>6} {'seconds':>8}")
    for name in given.runs:
        own = [row for row in rows if row['name'] == name]
        steps, equal = [step for row in own for _, step in row['kills']], sum(row['equal'] for row in own)
        seconds = own[0]['seconds'] if own else ''
        print(f'{name:12} {len(own):5} {len(steps):6} {sum(step > 0 for step in steps):12} {equal:6} {seconds:8}')
    sys.exit(not all(row['equal'] for row in rows))


if __name__ == '__main__': main()
