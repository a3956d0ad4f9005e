"""One run alone, the same in two processes that meet, and in two that are started as on two machines."""
import json, os, random, socket, subprocess

ENV = {'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'}
CODE = """
import json, os, sys, torch
sys.path.insert(0, {tests!r})
from torch import nn
from dataclasses import replace
from distill_nb.ranks import world
{body}
for rank in (None, 0, 1):  # a run alone, and two processes that meet
    if not os.fork():
        if rank is not None:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
            os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='{port}')
        torch.set_num_threads(1)
        found = run()
        first, size = world()[0] == 0, world()[1]
        if first: json.dump([size, *found], open({out!r} + ('1' if rank is None else '2'), 'w'))
        os._exit(0)
if any(os.wait()[1] for _ in range(3)): raise SystemExit('a process failed')
"""
MACHINE = """
import os, signal, sys, time, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
rank = int(os.environ['RANK'])
"""
TESTS = os.path.dirname(__file__)


def python():
    """What to start in place of `sys.executable`, with the libraries loaded, where the start is not what is tested.

    What Python reads from the environment when it starts, such as PYTHONHASHSEED, has no effect. Whoever
    kills it reads a pipe to its end: by then what was forked has ended too."""
    from tools import warm
    return warm.command()


def alone_and_together(body, folder):
    "What `run()`, defined by the code `body`, gives alone and in two processes; first how many there were."
    code = CODE.format(body=body, tests=TESTS, out=str(folder/'run'), port=random.randint(20000, 60000))
    p = subprocess.run([*python(), '-c', code], capture_output=True, text=True, env=os.environ | ENV)
    assert p.returncode == 0, p.stderr
    return [json.loads((folder/f'run{n}').read_text()) for n in (1, 2)]


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as server: return server.getsockname()[1]


def machines(code, *places):
    "Start a rank in each of these folders, as on machines of their own that share nothing but the network."
    meeting = dict(WORLD_SIZE=str(len(places)), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), LOCAL_RANK='0')
    for place in places: place.mkdir(parents=True, exist_ok=True)
    return [subprocess.Popen([*python(), '-c', MACHINE.format(tests=TESTS) + code], cwd=place, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env=os.environ | ENV | meeting | {'RANK': str(rank)})
            for rank, place in enumerate(places)]


def ended(processes, seconds=100):
    "What processes of text have printed, and their exit codes, once all have ended: a list of (code, out, err)."
    try: said = [p.communicate(timeout=seconds) for p in processes]
    finally:
        for p in processes: p.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, said)]
