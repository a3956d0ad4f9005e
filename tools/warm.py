"""Interpreters that begin where most begin: with the libraries loaded that distill_nb imports.

`command(python)` stands in place of `python` in `python -m MODULE ...`, `python -c CODE ...` and `python FILE ...`: a
client hands folder, environment, pipes and what to run to a server in the environment of `python`, which forks it, and
the client lives until that has ended. Only libraries of others are imported and nothing is computed before the fork,
so none sees another's work. What is forked has a `sys.executable` that is such a client again: what a notebook starts
begins warm too. All else, such as other options or a PYTHONHASHSEED, is left to `python` itself.
"""
import atexit, functools, gc, importlib, json, os, runpy, select, shlex, signal, socket, subprocess, sys, tempfile
import threading, time, types
from array import array
from contextlib import suppress
from pathlib import Path

# All are installed with the package. They take about five seconds, which every interpreter would pay on its own.
LIBRARIES = ('torch', 'torchvision', 'matplotlib.pyplot', 'sklearn.datasets', 'sklearn.linear_model', 'scipy.stats',
             'accelerate', 'safetensors.torch', 'fastcore.test', 'fastcore.docments', 'fastcore.script', 'tqdm.auto',
             'PIL.Image', 'ipykernel.kernelapp', 'multiprocessing.spawn')  # which keeps the true sys.executable
SERVERS, FOLDER = [], tempfile.TemporaryDirectory()  # of this process
SHARED, SECONDS = 'WARM_INTERPRETERS', 300  # the variable that holds the places of all servers; until one must be there


def begin(*pythons):
    "Start a server for each of these interpreters, which ends with this process, for it and for all that it starts."
    places = json.loads(os.environ.get(SHARED, '{}'))
    for python in set(pythons) - set(places) if sys.platform == 'linux' else ():
        places[python] = f'{FOLDER.name}/{len(SERVERS)}'
        SERVERS.append(subprocess.Popen([python, __file__, 'serve', places[python], *client(python, places[python])],
                                        stdin=subprocess.PIPE))
    os.environ[SHARED] = json.dumps(places)


def client(python, place): return [sys.executable, '-S', __file__, 'ask', place, python]


@functools.cache
def command(python=sys.executable):
    "What to start in place of `python`, once its server is there."
    if sys.platform != 'linux': return [python]
    begin(python)
    place, end = json.loads(os.environ[SHARED])[python], time.monotonic() + SECONDS
    while not executable(place).exists():
        if time.monotonic() > end or any(s.poll() is not None for s in SERVERS):
            raise RuntimeError(f'{python} could not import what distill_nb needs')
        time.sleep(0.02)
    return client(python, place)


def executable(place):
    "The file of the client that asks the server at `place`, for whoever starts a `sys.executable`."
    return Path(f'{place}-python')


def is_known(kind='', *rest):
    "Whether `become` knows what to do with these options of Python."
    if kind == '-u': return is_known(*rest)
    return bool(rest) if kind in ('-c', '-m') else kind.endswith('.py')


def of_python(env):
    "What Python reads in an environment when it starts."
    return {name: value for name, value in env.items() if name.startswith('PYTHON')}


def ask(place, python, *options):
    "Let the server at `place` fork an interpreter; its exit code, once it has ended. Or become `python` itself."
    more = [n for n in os.listdir('/proc/self/fd') if int(n) > 2 and os.path.exists(f'/proc/self/fd/{n}')]
    if more or not is_known(*options): os.execv(python, [python, *options])
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until it is known whom to tell
    with socket.socket(socket.AF_UNIX) as server, server.makefile() as said:
        server.connect(place)
        server.sendmsg([b' '], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array('i', [0, 1, 2]))])
        server.sendall(json.dumps([options, os.getcwd(), dict(os.environ)]).encode() + b'\n')
        pid = int(said.readline() or 0)
        for number in signals if pid else (): signal.signal(number, lambda number, _: os.kill(pid, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        if not pid: os.execv(python, [python, *options])
        code = int(said.readline() or 1)
    if code < 0:
        if -code in signals: signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def look_once():
    "Let accelerate look for a package of optimizers once: it does so twice in each step, a millisecond each."
    from accelerate import optimizer
    if ask := getattr(optimizer, 'is_lomo_available', None): optimizer.is_lomo_available = functools.cache(ask)


def serve(place, *words):
    "Fork what each client asks for, who is started by these words, until the pipe to who started this closes."
    sys.path.pop(0)  # of this file
    for name in LIBRARIES: importlib.import_module(name)
    look_once()
    gc.collect()
    gc.freeze()  # or a collection of what is forked would copy every page that it looks at
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        written = Path(f'{place}-new')
        written.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        written.chmod(0o700)
        written.rename(executable(place))  # there it is whole, and whoever waits for it may ask
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            with listener.accept()[0] as client:
                if os.fork(): continue
                listener.close()
                return answer(client, place)


def answer(client, place):
    "Fork the interpreter that a client asks for, tell it the exit code, and end it if the client is gone before."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pipes = array('i', client.recvmsg(1, socket.CMSG_SPACE(12))[1][0][2])
    asked = json.loads(client.makefile().readline())
    if of_python(asked[-1]) != of_python(os.environ): return client.sendall(b'0\n')
    if not (pid := os.fork()):
        client.close()
        sys.executable = str(executable(place))
        become(pipes, *asked)
    client.sendall(f'{pid}\n'.encode())
    for pipe in pipes: os.close(pipe)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if select.select([client, sys.stdin], [], [], 0.02)[0]: os.kill(pid, signal.SIGKILL)
    with suppress(OSError): client.sendall(f'{os.waitstatus_to_exitcode(ended[1])}\n'.encode())


def streams():
    "New ones for the pipes: those that were there remember whether theirs was a file, in which one can seek."
    how = dict(closefd=False, encoding='utf-8')
    return open(0, **how), open(1, 'w', **how), open(2, 'w', 1, errors='backslashreplace', **how)


def become(pipes, options, folder, env):
    "Turn a forked process into the interpreter that was asked for, and run what it is to run."
    import matplotlib, numpy, torch
    os.setsid()
    for number, pipe in enumerate(pipes): os.dup2(pipe, number)
    for pipe in pipes: os.close(pipe)
    sys.stdin, sys.stdout, sys.stderr = streams()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    numpy.random.seed()
    if env.get('OMP_NUM_THREADS', '').isdigit(): torch.set_num_threads(int(env['OMP_NUM_THREADS']))
    if options[0] == '-u':
        options = options[1:]
        for stream in (sys.stdout, sys.stderr): stream.reconfigure(write_through=True)
    if options[:2] == ['-m', 'ipykernel_launcher']:
        matplotlib.rcParams['backend'] = 'module://matplotlib_inline.backend_inline'
        options.append(f'--IPKernelApp.parent_handle={os.getppid()}')  # the kernel ends with its parent
    last(lambda: start(*options))


def last(run):
    """End as an interpreter that has run this, with all farewells but one: the libraries are not taken to pieces.

    That takes a second or two of what is forked, as it copies all pages that it touches."""
    code = 0
    try: run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if not isinstance(error.code, int | None): print(error.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try: stream.flush()
        except (OSError, ValueError): code = code or 120
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xff)


def start(what, *rest):
    "Run a module, code or file as `python what ...` does."
    sys.path.insert(0, {'-c': '', '-m': os.getcwd()}.get(what, os.path.dirname(os.path.realpath(what))))
    sys.argv = [what, *rest] if what != '-m' else list(rest)
    if what == '-m':
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
        return
    if what == '-c': sys.argv, code = [what, *rest[1:]], compile(rest[0], '<string>', 'exec')
    else: code = compile(Path(what).read_bytes(), what, 'exec')
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    if what != '-c': main.__file__ = what
    exec(code, main.__dict__)


if __name__ == '__main__':
    if sys.argv[1] == 'ask': sys.exit(ask(*sys.argv[2:]))
    serve(*sys.argv[2:])
    os._exit(0)  # nothing here needs the farewells of the libraries
