"""Data sets and networks that train in a moment, for several test files."""
import copy, hashlib, math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from distill_nb.views import CropFlip
from distill_nb.protocol import Batch, Data, Measure
from distill_nb.data import ImageData
from distill_nb.models import digit_student
from distill_nb.training import Recipe, Supervised, fit

RECIPE = Recipe(steps=12, batch_size=16, lr=0.05, precision='float32')
CLASSES = 3


def images(n=120, seed=0):
    "Bright, middle and dark noise: easy to tell apart."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    x = torch.randint(0, 60, (n, 1, 4, 4), generator=g) + 80 * y.view(-1, 1, 1, 1)
    return ImageData(x.to(torch.uint8), y, ['dark', 'middle', 'bright'], augment=CropFlip(0, True))


class Texts(Data):
    "Texts of different lengths: a letter is mostly followed by the next one. What lies behind an end has no weight."
    device, classes = torch.device('cpu'), list('abc')
    measures = (Measure('bits_per_letter', higher=False), Measure('accuracy', share=True))

    def __init__(self, n=60, seed=0, places=6):
        g = torch.Generator().manual_seed(seed)
        steps = torch.rand(n, places + 1, generator=g) < 0.9
        self.letters = (torch.randint(3, (n, 1), generator=g) + steps.cumsum(1)) % 3
        self.weight = (torch.arange(places) < torch.randint(1, places + 1, (n, 1), generator=g)).float()

    def __len__(self): return len(self.letters)

    def get(self, index, view=None):
        view = torch.zeros_like(index) if view is None else view
        return Batch(self.letters[index, :-1], self.letters[index, 1:], index, view, self.weight[index])

    def to(self, device): return self

    def fingerprint(self, labels=True):
        return hashlib.sha256(self.letters.numpy().tobytes() + self.weight.numpy().tobytes()).hexdigest()

    def measure(self, answers):
        "Bits for each letter that is there, and the share of those that were guessed."
        loss = right = n = 0
        for logits, b in answers:
            loss = loss + (b.weight * F.cross_entropy(logits.mT, b.y, reduction='none')).sum().item()
            right = right + (b.weight * (logits.argmax(-1) == b.y)).sum().item()
            n = n + b.weight.sum().item()
        return {'bits_per_letter': loss / n / math.log(2), 'accuracy': right / n}


def bigram():
    "The next letter from the present one, for `Texts`."
    return nn.Embedding(3, 3)


def net(outputs=CLASSES):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))


def trained():
    "A network that has learned these images."
    torch.manual_seed(0)
    model = net()
    fit(Supervised(model), images(), Recipe(steps=150, batch_size=32, lr=0.1, precision='float32'))
    return model


def write_image(path, w=12, h=12, mode='RGB', seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    g = np.random.default_rng(seed)
    Image.fromarray(g.integers(0, 256, (h, w) if mode == 'L' else (h, w, 3), dtype=np.uint8)).save(path)
    return path


def write_folder(root, parts=('train', 'test'), classes=('cat', 'dog'), n=10, **kwargs):
    "A folder of PNG files, so that pixels can be compared exactly."
    for p, part in enumerate(parts):
        for c, name in enumerate(classes):
            for k in range(n): write_image(root/part/name/f'{k:02}.png', seed=100*c + k + 10_000*p, **kwargs)
    return root


def digits_student(splits):
    "A student of the digits that trained for a moment."
    torch.manual_seed(0)
    model = digit_student()
    fit(Supervised(model), splits.train, Recipe(epochs=4, batch_size=64, lr=0.05), device='cpu', progress=False)
    return model


def by_hand(model, pixels, mean, std):
    "The answers for pixels, in float64 from the first operation on: normalised as the data set's page says."
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad(): return model((pixels.double() / 255 - mean) / std)


def _onnx_file(path, steps, weights, given, rows, facts):
    "Write an ONNX graph: steps are (kind, inputs, output, attributes); rows are the forms of input and output."
    from onnx import helper as h, numpy_helper
    from distill_nb.deploy import OnnxModel, _save
    weights = [numpy_helper.from_array(v if v.dtype == np.int64 else v.astype(np.float32), k) for k,
               v in weights.items()]
    nodes = [h.make_node(kind, ins, [out], name=out, **more) for kind, ins, out, more in steps]
    ends = [h.make_tensor_value_info(*end) for end in zip((given, steps[-1][2]), *rows)]
    graph = h.make_graph(nodes, 'small', ends[:1], ends[1:], weights)
    _save(h.make_model(graph, opset_imports=[h.make_opsetid('', 20)], ir_version=10), path, facts)
    return OnnxModel(path)


def small_file(path, data, output='logits', hidden=8, seed=0):
    "An ONNX file for images as `export_onnx` writes them, in a moment: normalisation, convolution, ReLU, linear layer."
    g, c, side, n = np.random.default_rng(seed), data.channels, data.size, len(data.classes)
    std, mean = (np.float32(v).reshape(-1, 1, 1) for v in (data.std, data.mean))
    weights = dict(scale=1/(255*std), shift=-mean/std, shape=np.int64([-1, hidden*side**2]),
                   w1=g.normal(size=(hidden, c, 3, 3))*np.exp(g.normal(size=(hidden, 1, 1, 1))),
                   b1=g.normal(size=hidden),
                   w2=g.normal(size=(n, hidden*side**2))/side, b2=g.normal(size=n))
    steps = [('Cast', ['pixels'], 'floats', {'to': 1}), ('Mul', ['floats', 'scale'], 'scaled', {}),
             ('Add', ['scaled', 'shift'], 'x', {}), ('Conv', ['x', 'w1', 'b1'], 'conv', {'pads': [1]*4}),
             ('Relu', ['conv'], 'relu', {}), ('Reshape', ['relu', 'shape'], 'flat', {}),
             ('Gemm', ['flat', 'w2', 'b2'], output, {'transB': 1})]
    names = {'classes': data.classes} if output == 'logits' else {}
    facts = dict(channels=c, size=side, mean=data.mean, std=data.std, **names)
    return _onnx_file(path, steps, weights, 'pixels', ((2, 1), (('batch', c, side, side), ('batch', n))), facts)


def small_text_file(path, data, width=16, seed=0):
    "An ONNX file of tokens whose last layer is the table of its embeddings, turned over."
    g, v = np.random.default_rng(seed), len(data.classes)
    weights = dict(table=g.normal(size=(v, width)), w=g.normal(size=(width, width))/width**.5)
    steps = [('Gather', ['table', 'tokens'], 'x', {}), ('MatMul', ['x', 'w'], 'h', {}), ('Relu', ['h'], 'r', {}),
             ('Transpose', ['table'], 'turned', {'perm': [1, 0]}), ('MatMul', ['r', 'turned'], 'logits', {})]
    rows = (7, 1), (('batch', 'length'), ('batch', 'length', v))
    return _onnx_file(path, steps, weights, 'tokens', rows, dict(length=data.length))
