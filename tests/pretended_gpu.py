"""A pretended CUDA card, for machines without one: `begin()` first, then run anything.

Its tensors lie in the CPU's memory and carry a mark; an operation on marked and unmarked ones raises, as CUDA does. It
finds what was left on the wrong device. Of speed, memory and rounding it says nothing. It behaves as a T4: no bfloat16,
but tensor cores.
"""
import warnings
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CARD = torch.device('cuda', 0)
GETTERS = {Tensor.device.__get__: lambda t: CARD, Tensor.is_cuda.__get__: lambda t: True}
ACROSS = {'copy_', '__set__', '__setitem__', '__getitem__', 'set_', 'index_put_', 'type_as', 'module_load', 'backward',
          'grad'}


def marked(t): return isinstance(t, Tensor) and t.__dict__.get('on_card', False)


def tensors_in(value):
    "All tensors in lists, tuples and dicts."
    if isinstance(value, Tensor): return [value]
    if isinstance(value, dict): value = value.values()
    elif not isinstance(value, (list, tuple)): return []
    return [t for v in value for t in tensors_in(v)]


def mark(value, on):
    "Mark all tensors in a value, or take their mark away."
    for t in tensors_in(value): t.__dict__['on_card'] = on
    return value


def is_card(device): return isinstance(device, int) and not isinstance(device, bool) or str(device).startswith('cuda')


def on_cpu(args, kwargs):
    "Arguments with every device replaced by the CPU; and whether the card was asked for (None: no device was named)."
    asked = None
    def real(a):
        nonlocal asked
        if not isinstance(a, torch.device) and not (isinstance(a, str) and a.startswith(('cuda', 'cpu'))): return a
        asked = is_card(a)
        return torch.device('cpu')
    args = [real(a) for a in args]
    if kwargs.get('device') is not None:
        asked = is_card(kwargs['device'])
        kwargs = kwargs | {'device': 'cpu'}
    return args, kwargs, asked


class Card(TorchFunctionMode):
    "Keeps the marks, and refuses to mix."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, '__name__', '')
        if name == '__get__':
            on = marked(args[0])
            return GETTERS[func](args[0]) if on and func in GETTERS else mark(func(*args), on)
        if name in ('to', 'cuda', 'cpu'): return self.move(func, name, args, kwargs)
        if name in ('numpy', '__array__') and marked(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. "
                            'Use Tensor.cpu() to copy the tensor to host memory first.')
        asked = None
        if 'device' in kwargs or name in ('empty_like', 'type'): args, kwargs, asked = on_cpu(args, kwargs)
        tensors = tensors_in(args) + tensors_in(kwargs)
        here = any(map(marked, tensors))
        if here and asked is None: self.refuse_mixture(name, args, tensors)
        result = func(*args, **kwargs)
        if name == '__set__': return mark(args[0], marked(args[1])) if func == Tensor.data.__set__ else result
        if result is None or isinstance(result, (bool, int, float, str)): return result
        into_first = name in ('copy_', '__getitem__', '__setitem__', '__deepcopy__')
        return mark(result, asked if asked is not None else marked(args[0]) if into_first else here)

    def move(self, func, name, args, kwargs):
        tensor, rest = args[0], list(args[1:])
        other = next((a for a in [*rest, kwargs.get('other')] if isinstance(a, Tensor)), None)
        if name == 'cuda': rest, kwargs, asked = [], {}, True
        elif name == 'cpu': rest, kwargs, asked = [], {}, False
        else: rest, kwargs, asked = on_cpu(rest, kwargs)
        if other is not None: asked = marked(other)
        result = tensor if name in ('cuda', 'cpu') else func(tensor, *rest, **kwargs)
        if asked is None or asked == marked(tensor): return mark(result, marked(tensor))
        return mark(result.clone() if result is tensor else result, asked)

    def refuse_mixture(self, name, args, tensors):
        if name.startswith(('_fused', '_foreach', '_amp', '_has_compatible')): return
        if name in ('__getitem__', '__setitem__'):
            if not marked(args[0]) and any(map(marked, tensors_in(args[1]))):
                raise RuntimeError('indices should be either on cpu or on the same device as the indexed tensor (cpu)')
        if name not in ACROSS and any(not marked(t) and t.ndim for t in tensors):
            raise RuntimeError('Expected all tensors to be on the same device, but found at least two devices, '
                               f'cuda:0 and cpu! (when checking arguments in {name})')


CUDA = dict(is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, synchronize=lambda *a: None,
            get_device_name=lambda d=None: 'pretended card', get_device_capability=lambda d=None: (7, 5),
            is_bf16_supported=lambda including_emulation=True: including_emulation, manual_seed=lambda s: None,
            manual_seed_all=lambda s: None, max_memory_allocated=lambda d=None: 0,
            mem_get_info=lambda d=None: (2**40, 2**40))


def _without_card(function, *args, **kwargs):
    "What traces a network of the CPU with tensors that hold no numbers: of these the mode knows nothing."
    with (mock.patch.object(torch.cuda, 'is_available', lambda: False),
          mock.patch.object(torch.accelerator, 'is_available', lambda: False), torch._C.DisableTorchFunction()):
        return function(*args, **kwargs)


@contextmanager
def pretended():
    "Inside the `with` block this process has a card."
    from accelerate.state import AcceleratorState
    fork, copied = torch.random.fork_rng, torch.nn.Parameter.__deepcopy__
    patches = [(torch.cuda, name, value) for name, value in CUDA.items()]
    patches += [(torch.accelerator, 'is_available', lambda: True),
                (torch.accelerator, 'current_accelerator', lambda check_available=False: torch.device('cuda')),
                (torch.optim.Optimizer, '_accelerator_graph_capture_health_check', lambda self: None),
                (torch.random, 'fork_rng', lambda devices=None, *args, **kwargs: fork([], *args, **kwargs)),
                (torch.nn.Parameter, '__deepcopy__', lambda self, memo: mark(copied(self, memo), marked(self)))]
    patches.append((torch.onnx, 'export', partial(_without_card, torch.onnx.export)))
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings('ignore', message='.*CUDA is not available.*')
        for owner, name, value in patches: stack.enter_context(mock.patch.object(owner, name, value, create=True))
        reset = partial(AcceleratorState._reset_state, reset_partial_state=True)
        reset()  # what was there knows no card yet
        stack.callback(reset)
        yield stack.enter_context(Card())


def begin():
    "From here on this process has a card."
    begin.card = pretended()  # kept, or it would end with its last reference
    begin.card.__enter__()
