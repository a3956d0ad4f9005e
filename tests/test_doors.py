"""Any teacher through any door: networks from everywhere, checkpoints of training scripts, classes in any order."""
import argparse, json

import numpy as np
import pytest, torch
from distill_nb.data import ImageData, Splits
from distill_nb.files import save_weights
from distill_nb.models import evaluating
from distill_nb.protocol import Batch
from distill_nb.teachers import make_teacher
from distill_nb.contract import logits_in
from distill_nb.zoo import build_model

OURS = ['ant', 'bee', 'cat', 'dog']  # the classes of the data
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.2]


def splits(n=24):
    "Noise: what matters here is whose answers come, and in which order."
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8)
    return Splits(*(ImageData(x, torch.arange(n) % 4, OURS, mean=[0.5]*3, std=[0.25]*3) for _ in range(3)))


# Teachers: a name, as the command line takes it

def hf(config):
    "The name of a folder as transformers writes it, without weights."
    def name(folder):
        (folder/'hub').mkdir()
        (folder/'hub'/'config.json').write_text(json.dumps(config))
        return f"hf:{folder/'hub'}"
    return name


VIT = dict(architectures=['ViTForImageClassification'], model_type='vit', hidden_size=32, num_hidden_layers=1,
           num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
RESNET = dict(architectures=['ResNetForImageClassification'], model_type='resnet', embedding_size=8,
              hidden_sizes=[8, 16], depths=[1, 1], layer_type='basic')
SCRIPTED = """
import torch
from torch import nn
def scripted(classes, channels):
    return torch.jit.script(nn.Sequential(nn.Conv2d(channels, 8, 3, 2), nn.BatchNorm2d(8), nn.Flatten(),
                                          nn.Linear(1800, classes)))
def half(classes): return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Flatten(), nn.Linear(1800, classes)).half()
"""


def own(function):
    def name(folder):
        (folder/'my.py').write_text(SCRIPTED)
        return f"{folder/'my.py'}:{function}"
    return name


def named(name): return lambda folder: name


TEACHERS = {'ours': named('resnet8'), 'torchvision': named('torchvision:mobilenet_v3_small'),
            'timm': named('timm:resnet10t'), 'vit': hf(VIT), 'hf resnet': hf(RESNET),
            'scripted': own('scripted'), 'half': own('half')}


# Checkpoints: what training scripts leave behind

def ours(model, names, path):
    save_weights(model, path.with_suffix('.safetensors'), classes=names)
    return path.with_suffix('.safetensors')


def prefixed(model, prefix): return {prefix + k: v for k, v in model.state_dict().items()}


def pickled(make, suffix, **how):
    def form(model, names, path):
        beside = {} if names is None else {'classes': names}
        path = path.with_suffix(suffix)
        torch.save(make(model, beside), path, **how)
        return path
    return form


def flat(model, beside): return {**model.state_dict(), **beside}
def nested(model, beside): return {'epoch': 3, 'state_dict': model.state_dict(), **beside}
def parallel(model, beside): return {'model': prefixed(model, 'module.'), 'args': argparse.Namespace(lr=0.1), **beside}


def compiled(model, beside):
    return {'model_state_dict': prefixed(model, '_orig_mod.'), 'best': np.float64(0.9), **beside}


def lightning(model, beside):
    return {'state_dict': prefixed(model, 'model.') | {'criterion.weight': torch.ones(4)},
            'optimizer_states': [{'state': {0: {'exp_avg': torch.zeros(3)}}, 'param_groups': []}],
            'hyper_parameters': beside, **beside}


def averaged(model, beside):
    worse = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    return {'model': worse, 'model_ema': model.state_dict(), **beside}


FORMS = {'safetensors': ours, 'flat .bin': pickled(flat, '.bin'), 'state_dict .pth': pickled(nested, '.pth'),
         'module. .pt': pickled(parallel, '.pt'), '_orig_mod. .model': pickled(compiled, '.model'),
         'lightning .ckpt': pickled(lightning, '.ckpt'), 'ema .pth': pickled(averaged, '.pth'),
         'old .tar': pickled(nested, '.tar', _use_new_zipfile_serialization=False)}

# Names of the teacher's classes, or None; and where the data's classes stand among its outputs, or None: refused.
CLASSES = {'same': (OURS, [0, 1, 2, 3]), 'reordered': (['dog', 'ant', 'cat', 'bee'], [1, 3, 2, 0]),
           'more': (['eel', 'bee', 'ant', 'fox', 'dog', 'cat'], [2, 1, 5, 4]), 'fewer': (OURS[:3], None),
           'unknown': (None, [0, 1, 2, 3])}


def case(teacher, form, classes):
    marks = [] if (teacher, form, classes) in QUICK else [pytest.mark.slow]
    return pytest.param(teacher, form, classes, marks=marks, id=f'{teacher}-{form}-{classes}')


QUICK = [('ours', 'safetensors', 'reordered'), ('timm', 'module. .pt', 'more'), ('vit', 'lightning .ckpt', 'unknown'),
         ('torchvision', 'ema .pth', 'fewer'), ('scripted', '_orig_mod. .model', 'reordered'),
         ('half', 'old .tar', 'same')]
MATRIX = [case(t, f, c) for t in TEACHERS for f in FORMS for c in CLASSES if f != 'flat .bin' or c == 'unknown']


@pytest.mark.parametrize('teacher,form,classes', MATRIX)
def test_a_checkpoint_teaches_in_the_order_of_the_data(teacher, form, classes, tmp_path):
    data, (names, order) = splits(), CLASSES[classes]
    name = TEACHERS[teacher](tmp_path)
    torch.manual_seed(1)
    model = build_model(name, len(names or OURS), 3, 32)
    path = FORMS[form](model, names, tmp_path/'best')
    if order is None:
        with pytest.raises(ValueError, match="'dog'"): make_teacher(name, str(path), data, MEAN, STD)
        return
    found, trained = make_teacher(name, str(path), data, MEAN, STD)
    assert trained
    found.check(data.train)
    batch = data.train.get(torch.arange(6))
    x = data.train.replace(mean=MEAN, std=STD).get(torch.arange(6)).x
    with evaluating(model): wanted = logits_in(model(x.to(next(model.parameters()).dtype)))
    assert torch.allclose(found(batch).float(), wanted[:, order].float(), rtol=1e-3, atol=1e-4)


def test_what_stands_for_a_tensor_while_code_is_compiled_passes():
    "torch 2.11 makes a Batch of its own variables while it looks at code, outside of compiling."
    class Variable: pass
    Variable.__module__ = 'torch._dynamo.variables.lazy'
    assert isinstance(Batch(*[Variable()]*4).x, Variable)
    with pytest.raises(ValueError, match='x must be a tensor'): Batch(*[object()]*4)
