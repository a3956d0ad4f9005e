"""One run alone, and the same in two processes that meet."""
import json, os, random, subprocess, sys

CODE = """
import json, os, sys, torch
sys.path.insert(0, {tests!r})
from torch import nn
from dataclasses import replace
from accelerate import PartialState
{body}
for rank in (None, 0, 1):  # a run alone, and two processes that meet
    if not os.fork():
        if rank is not None:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
            os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='{port}')
        torch.set_num_threads(1)
        found = run()
        state = PartialState()
        out = {out!r} + ('1' if rank is None else '2')
        if state.is_main_process: json.dump([state.num_processes, *found], open(out, 'w'))
        os._exit(0)
if any(os.wait()[1] for _ in range(3)): raise SystemExit('a process failed')
"""


def alone_and_together(body, folder):
    "What `run()`, defined by the code `body`, gives alone and in two processes; first how many there were."
    places = dict(tests=os.path.dirname(__file__), out=str(folder/'run'), port=random.randint(20000, 60000))
    env = os.environ | {'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'}
    code = CODE.format(body=body, **places)
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert p.returncode == 0, p.stderr
    return [json.loads((folder/f'run{n}').read_text()) for n in (1, 2)]
