"""Interpreters that begin where most begin: with the libraries loaded that distill_nb imports.

`command(python)` stands in place of `python` in `python -m MODULE ...` or `python -c CODE ...`: a client hands
folder, environment, pipes and what to run to a server in the environment of `python`, which forks it, and the client
lives until that has ended. Only libraries of others are imported and nothing is computed before the fork, so none sees
another's work.
"""
import functools, importlib, json, os, runpy, select, signal, socket, subprocess, sys, tempfile, types
from array import array
from contextlib import suppress

# All are installed with the package. They take about five seconds, which every interpreter would pay on its own.
LIBRARIES = ('torch', 'torchvision', 'matplotlib.pyplot', 'sklearn.datasets', 'sklearn.linear_model', 'scipy.stats',
             'accelerate', 'safetensors.torch', 'fastcore.test', 'tqdm.auto', 'PIL.Image', 'ipykernel.kernelapp')
SERVERS, FOLDER = [], tempfile.TemporaryDirectory()  # of this process


@functools.cache
def command(python=sys.executable):
    "What to start in place of `python`; the server that it asks ends with this process."
    if sys.platform != 'linux': return [python]
    place = f'{FOLDER.name}/{len(SERVERS)}'
    SERVERS.append(subprocess.Popen([python, __file__, 'serve', place], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    if not SERVERS[-1].stdout.readline(): raise RuntimeError(f'{python} could not import what distill_nb needs')
    return [sys.executable, '-S', __file__, 'ask', place]


def ask(place, *options):
    "Let the server at `place` fork an interpreter; its exit code, once it has ended."
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        server.sendmsg([b' '], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array('i', [0, 1, 2]))])
        server.sendall(json.dumps([options, os.getcwd(), dict(os.environ)]).encode() + b'\n')
        code = int(server.makefile().readline() or 1)
    if code < 0: os.kill(os.getpid(), -code)
    return code


def serve(place):
    "Fork what each client asks for, until the pipe to the process that started this closes."
    sys.path.pop(0)  # of this file
    for name in LIBRARIES: importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        print('ready', flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            with listener.accept()[0] as client:
                if os.fork(): continue
                listener.close()
                return answer(client)


def answer(client):
    "Fork the interpreter that a client asks for, tell it the exit code, and end it if the client is gone before."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pipes = array('i', client.recvmsg(1, socket.CMSG_SPACE(12))[1][0][2])
    asked = json.loads(client.makefile().readline())
    if not (pid := os.fork()):
        client.close()
        sys.exit(become(pipes, *asked))  # as any interpreter, with all farewells
    for pipe in pipes: os.close(pipe)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if select.select([client, sys.stdin], [], [], 0.02)[0]: os.kill(pid, signal.SIGKILL)
    with suppress(OSError): client.sendall(f'{os.waitstatus_to_exitcode(ended[1])}\n'.encode())


def become(pipes, options, folder, env):
    "Turn a forked process into the interpreter that was asked for, and run what it is to run."
    import matplotlib, numpy
    os.setsid()
    for number, pipe in enumerate(pipes): os.dup2(pipe, number)
    for pipe in pipes: os.close(pipe)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    numpy.random.seed()
    kind, what, *rest = options
    sys.path.insert(0, '' if kind == '-c' else folder)
    sys.argv = [kind if kind == '-c' else what, *rest]
    if what == 'ipykernel_launcher':
        matplotlib.rcParams['backend'] = 'module://matplotlib_inline.backend_inline'
        sys.argv.append(f'--IPKernelApp.parent_handle={os.getppid()}')  # the kernel ends with its parent
    if kind == '-m': return runpy.run_module(what, run_name='__main__', alter_sys=True) and None
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    exec(compile(what, '<string>', 'exec'), main.__dict__)


if __name__ == '__main__':
    if sys.argv[1] == 'ask': sys.exit(ask(*sys.argv[2:]))
    serve(*sys.argv[2:])
    os._exit(0)  # nothing here needs the farewells of the libraries
