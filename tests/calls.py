"""Wrong calls of everything public, drawn from the signatures, and how each of them ends.

    python tests/calls.py [MODULE ...]      # how many by outcome, and every call that did not end as it should
    python tests/calls.py losses --all      # every call

A good call of each function is changed in one argument at a time: values of another kind than its annotation says,
and values of that kind that are empty, negative, huge, NaN, of another shape, or no plain text. Outcomes:

    clear     a ValueError or TypeError that names a parameter of the function, or an OSError that names the file
    accepted  a value of the right kind that is extreme, and was taken
    silent    a value of the wrong kind that was taken
    unclear   another error, or one that does not name the parameter
    endless   it took more than a second of the processor, or five of the clock
    leaves    it was refused, but there are files that were not there before
    uncalled  there is no good call to change: add what is missing to GOOD
"""
import argparse, contextlib, importlib.util, inspect, io, os, random, re, resource, signal, sys, tempfile, time, types
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from small import Texts, images, net, write_folder, write_image
from distill_nb import language, losses
from distill_nb.compare import Comparison, Contender
from distill_nb.protocol import Batch, Data, Measure
from distill_nb.data import ImageData, Splits
from distill_nb.doors import _Kind
from distill_nb.distillation_token import DistillToken
from distill_nb.features import FeatureDistill, Hint, Term
from distill_nb.files import save_weights
from distill_nb.folders import read_folder
from distill_nb.images import Form, header
from distill_nb.methods import Task
from distill_nb.models import CifarResNet
from distill_nb.report import stored_result
from distill_nb.scans import looks, scan
from distill_nb.sets import Items
from distill_nb.teachers import Tried
from distill_nb.tracking import Tracker
from distill_nb.contract import Teacher
from distill_nb.students import Heads
from distill_nb.history import Checkpoint, History
from distill_nb.training import Objective, Recipe, Setup, Supervised
from distill_nb.vit import ViT
from distill_nb.weights import read_checkpoint

SECONDS = 1  # of the processor, that a call may take


# Good arguments. They are made anew for each call.

def logits(seed=0): return torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))


def knowing():
    "A network that tells `images` apart by their brightness: a teacher that passes the exam."
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.], [0.], [1.]]).expand(3, 16))
        model[1].bias.copy_(torch.tensor([0., 8., 0.]))
    return model


def batch(data=None):
    data = data or images(24)
    return data.get(torch.arange(6), torch.zeros(6, dtype=torch.long))


def floats(): return batch().x


BY_KIND = {int: lambda: 2, float: lambda: 0.5, bool: lambda: False, str: lambda: 'name', Path: lambda: 'folder',
           list: lambda: [0.5, 0.25], tuple: lambda: (0.5, 0.25), dict: dict, Tensor: logits, nn.Module: net,
           Data: lambda: images(24), ImageData: lambda: images(24), Batch: batch, Teacher: lambda: Teacher(net()),
           Recipe: lambda: Recipe(steps=2, batch_size=4, precision='float32'), Setup: lambda: Setup(progress=False),
           Objective: lambda: Supervised(net()), Callable: lambda: net, torch.device: lambda: torch.device('cpu')}

# By the name of the parameter, or by function (or Class, or Class.method) and parameter; ** are further keywords.
GOOD = {
    'student_logits': logits, 'teacher_logits': partial(logits, 1), 'x': logits, 'logits': logits,
    'y': lambda: torch.arange(6) % 3, 'labels': lambda: torch.arange(6) % 3, 'index': lambda: torch.arange(6),
    'indices': lambda: torch.arange(6), 'view': lambda: torch.zeros(6, dtype=torch.long),
    'weight': lambda: torch.ones(6), 'classes': lambda: ['a', 'b', 'c'], 'temperature': lambda: 4.,
    'alpha': lambda: 0.5, 'seed': lambda: 0, 'seeds': lambda: 2, 'progress': lambda: False,
    'batch_size': lambda: 8, 'device': lambda: 'cpu', 'precision': lambda: 'float32', 'data': lambda: images(24),
    'train': lambda: images(24), 'valid': lambda: images(24, 1), 'test': lambda: images(24, 2),
    'make_student': lambda: net,
}

# Functions of which no good call is made (they download, or train for long): wrong calls are drawn all the same.
WITHOUT = set()

# What was taken although it is of another kind, or that names no parameter, rightly: {(function, parameter): why}.
LEGITIMATE = {}

# Other words by which a sentence may name a parameter.
WORDS = {'model': 'networks?|teacher|student', 'objective': 'model', 'teacher': 'network|model',
         'student': 'network|model',
         'data': 'training set|images', 'x': 'inputs|images', 'y': 'labels', 'index': 'positions',
         'weights': 'path', 'kind': 'log', 'name': 'There is no model'}

# Instances whose methods are called.
INSTANCES = {'ImageData': lambda: images(24), 'Teacher': BY_KIND[Teacher], 'Recipe': BY_KIND[Recipe],
             'Setup': BY_KIND[Setup], 'Objective': BY_KIND[Objective]}

# Module by module, in their order: GOOD, INSTANCES, WITHOUT and LEGITIMATE of its functions.

# files
GOOD |= {'naming.path': lambda: 'w.json', 'write_atomic.path': lambda: 'w.bin', 'write_atomic.data': lambda: b'data',
         'from_json.text': lambda: '{}', 'from_json.source': lambda: 'recipe.json',
         'function_name.f': lambda: net, 'save_weights.path': lambda: 'w.safetensors',
         'read_weights.path': lambda: save(net()), 'locked.place': lambda: 'place'}
WORDS |= {'place': 'folder', 'text': 'JSON'}


def save(model):
    from distill_nb.files import save_weights
    save_weights(model, 'good.safetensors')
    return 'good.safetensors'



# ranks
GOOD |= {'from_first.make': lambda: dict, 'from_each.value': lambda: 1}
INSTANCES |= {}


# weights
def saved():
    save_weights(net(), 'net.safetensors', classes=list('abc'))
    return 'net.safetensors'


GOOD |= {'read_checkpoint.path': saved, 'fitting.stored': lambda: read_checkpoint(saved()), 'fitting.model': net}


# rows
GOOD |= {'check_weight.weight': lambda: 1., 'check_temperature.temperature': lambda: 4.}


# losses
def _top(): return losses.top_k(logits(1), 2)


GOOD |= {'DistillationLoss.parts.labels': GOOD['labels'],
         'DistillationLoss.class_weights': lambda: torch.ones(3), 'collapse.teacher': _top}
GOOD |= {f'{f}.weight': GOOD['weight'] for f in ('kd_loss', 'hard_loss', 'DistillationLoss')}
INSTANCES |= {'DistillationLoss': lambda: losses.DistillationLoss()}


# successors
GOOD |= {f'{f}.weight': GOOD['weight'] for f in ('reverse_kl_loss', 'jsd_loss', 'dkd_loss', 'dist_loss')}


# pictures
GOOD |= {'draw_kind.kind': lambda: 'logits', 'plot_bars.panels': lambda: {'a': [1., 2.]},
         'plot_bars.ticks': lambda: ['x', 'y'],
         'plot_bars.figsize': lambda: (3., 2.), 'plot_lines.x': lambda: [1., 2.],
         'plot_lines.lines': lambda: {'a': [1., 2.]}, 'plot_lines.styles': lambda: ['o-']}


# theory
GOOD |= {'entropy.probs': lambda: logits().softmax(-1)}


# data
def pixels(n=6): return torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8)


GOOD |= {
    'show_images.x': pixels, 'resize.x': pixels, 'count_values.x': pixels, 'ImageData.x': pixels,
    'channel_stats.counts': lambda: torch.ones(1, 256), 'ImageData.recast.x': lambda: batch().x,
    'number': lambda: torch.arange(6), 'epoch': lambda: 0, 'splits': lambda: Splits(*(images(24, k) for k in range(3))),
    'plan': lambda: [(torch.arange(6), torch.zeros(6, dtype=torch.long))], 'measure': lambda: images(24).measures[0],
    'chosen': lambda: torch.arange(24) % 3, 'answers': lambda: [(logits(), batch())], 'keep': lambda: torch.arange(6),
    'check_splits.data': lambda: Splits(*(images(24, k) for k in range(3))), 'stratified.n': lambda: 3,
    'few_labels.n': lambda: 6, 'ResizedCrop.boxes.side': lambda: 8}
INSTANCES |= {'Data': Texts}


# images
def picture(): return Image.new('RGB', (12, 12))


def picture_file(): return str(write_image(Path('picture.png')))


GOOD |= {f'{f}.file': picture_file for f in ('header', 'seen_and_pixels', 'read_image', 'picture_hash')}
GOOD |= {f'{f}.form': lambda: Form(8) for f in ('pixels_of', 'seen_and_pixels', 'read_image', 'read_images')}
GOOD |= {
    'list_images.folder': lambda: '.', 'image_files.folder': lambda: '.', 'seen_of.image': picture,
    'pixels_of.image': picture, 'picture_hash.mode': lambda: 'RGB', 'Form.mode': lambda: 'RGB',
    'read_images.files': lambda: [picture_file()], 'reading_threads.files': lambda: [picture_file()],
    'check_paths.files': lambda: ['a.png'], 'is_path.value': lambda: 'a.png', 'each.work': lambda: str,
    'each.items': lambda: [1, 2], 'damage.error': lambda: ValueError('torn')}


# scans
def seen(): return looks([header(picture_file())])


def scanned(): return scan([picture_file()], 8, keep='scans')


GOOD |= {
    'noted.seen': seen, 'shown_size.seen': seen, 'form_of.seen': seen, 'Scan.seen': seen,
    'looks.seen': lambda: [header(picture_file())], 'noted.note': lambda: 'deep', 'Scan.rows': lambda: np.arange(1),
    'Scan.form': lambda: Form(8), 'Scan.hashes': lambda: np.zeros((1, 32), np.uint8), 'Scan.x': pixels,
    'Scan.tallies': lambda: None, 'scan.files': lambda: [picture_file()], 'scan.keep': lambda: 'scans'}
INSTANCES |= {'Scan': scanned}


# folders
def folder(): return str(write_folder(Path('pictures'), n=3))


def read_files():
    "Images that are not kept in memory."
    return read_folder(folder(), max_bytes=0, keep='scans').splits.train


def report(): return read_folder(folder(), keep='scans').report


SEEN = {'mean': [0.5]*3, 'std': [0.5]*3}
GOOD |= {f'{f}.path': folder for f in ('read_folder', 'image_folder')}
GOOD |= {f'{f}.**': lambda: {'keep': 'scans'} for f in ('read_folder', 'image_folder')}
GOOD |= {
    'hold_out.y': lambda: torch.arange(6) % 3, 'ImageFiles.files': lambda: [picture_file()]*6,
    'ImageFiles.form': lambda: Form(8), 'ImageFiles.hashes': lambda: np.zeros((6, 32), np.uint8),
    'ImageFiles.**': SEEN.copy, 'training_views.form': lambda: Form(8), 'Files.part': lambda: np.zeros(1),
    'Read.report': report, 'Layout.splits': dict, 'ImageFiles.pixels.index': lambda: torch.arange(4)}
INSTANCES |= {'ImageFiles': read_files, 'FolderReport': report}


# sets
def items(): return [(Image.new('RGB', (8, 8), (10*i, 0, 0)), i % 3) for i in range(24)]


GOOD |= {f'{f}.dataset': items for f in ('Items', 'image_data')}
GOOD |= {f'{f}.download': lambda: False for f in ('cifar10', 'cifar100', 'mnist', 'fashion_mnist')}
GOOD |= {
    'Items.pixels.form': lambda: Form(8), 'ImageItems.parts': lambda: [Items(items())],
    'ImageItems.form': lambda: Form(8), 'ImageItems.places': lambda: [(0, i) for i in range(6)],
    'dataset_splits.train': items,
    'ImageItems.**': lambda: SEEN | {'hashes': np.zeros((6, 32), np.uint8)}, 'load_data.name': lambda: 'digits'}
INSTANCES |= {'Items': lambda: Items(items())}
WITHOUT |= {'cifar10', 'cifar100', 'mnist', 'fashion_mnist'}
LEGITIMATE |= {('load_data', 'name'): 'it is the data of the command'}


# vocabulary
def words(): return __import__('distill_nb.vocabulary').vocabulary.train_bpe(['low lower lowest'], 260)


GOOD |= {'BPETokenizer.merges': lambda: [(97, 98), (257, 99)], 'train_bpe.texts': lambda: ['low lower lowest'],
         'train_bpe.size': lambda: 260, 'Tokenizer.decode.ids': lambda: [97, 98], 'check_vocabularies.own': words,
         'check_vocabularies.other': words,
         'tokenizer_of.state': lambda: words().state()}
INSTANCES |= {'Tokenizer': words, 'BPETokenizer': words}
WORDS |= {'ids': 'whole numbers'}


# text
def documents(): return [text().Document(f'{i}', f'Text {i} of a dozen, with words.') for i in range(12)]


def text(): return __import__('distill_nb.text').text


def windows(): return text().TextData(text().row_of(documents(), words()), words(), 8, 2)


def asked_windows(): return [(torch.zeros(2, 8, len(words())), windows().get([0, 1]))]


def text_files():
    Path('texts').mkdir(exist_ok=True)
    for d in documents(): Path('texts', f'{d.name}.txt').write_text(d.text)
    return 'texts'


GOOD |= {'documents': documents, 'tokenizer': words, 'row': lambda: text().row_of(documents(), words()),
         'TextData.length': lambda: 8, 'TextData.views': lambda: 2, 'TextData.offset.view': lambda: 1,
         'TextData.get.index': lambda: [0, 1], 'TextData.get.view': lambda: [0, 1], 'by_document.data': windows,
         'TextData.places.batch': lambda: windows().get([0, 1]), 'TextData.part.share': lambda: 0.5,
         'TextData.subset.index': lambda: [0, 1], 'nats_of.logits': lambda: torch.zeros(2, 8, 5),
         'nats_of.labels': lambda: torch.zeros(2, 8, dtype=torch.long), 'text_splits.length': lambda: 8,
         'english.tokenizer': lambda: 260, 'read_texts.path': text_files, 'text_folder.path': text_files,
         'text_folder.tokenizer': lambda: 260, 'text_folder.length': lambda: 8, 'text_splits.tokenizer': lambda: 260,
         'Document.text': lambda: 'A text.', 'TokenRow.tokens': lambda: torch.zeros(3, dtype=torch.int32),
         'TextFiles.documents': documents}
GOOD |= {f'{f}.answers': asked_windows for f in ('TextData.measure', 'by_document')}
INSTANCES |= {'TextData': windows}


# models
def resnet(): return CifarResNet(8, 3)


GOOD |= {'CifarResNet.depth': lambda: 8, 'WideResNet.depth': lambda: 10, 'digit_student.classes': lambda: 3,
         'digit_teacher.classes': lambda: 3, 'imagenet_weights.name': lambda: 'resnet50', 'stem_name.model': resnet,
         'checked_state.tensors': lambda: net().state_dict(), 'transfer_weights.model': resnet,
         'transfer_weights.tensors': lambda: resnet().state_dict(), 'torchvision_resnet.name': lambda: 'resnet18',
         'torchvision_resnet.classes': lambda: 3, 'count_macs.x': lambda: torch.zeros(2, 1, 4, 4),
         'measure_latency.x': lambda: torch.zeros(2, 1, 4, 4), 'profile_model.shape': lambda: (1, 4, 4)}
WITHOUT |= {'imagenet_weights'}
INSTANCES |= {}


# vit
def little_vit(): return ViT(4, 2, 8, 1, 2, 3, 1)


GOOD |= {'Attention.forward.x': lambda: torch.zeros(2, 5, 8), 'Patches.forward.x': lambda: torch.zeros(2, 1, 4, 4),
         'ViT.size': lambda: 4, 'ViT.patch': lambda: 2, 'ViT.width': lambda: 8,
         'ViT.tokens.x': lambda: torch.zeros(2, 1, 4, 4), 'ViT.forward.x': lambda: torch.zeros(2, 1, 4, 4),
         'ViT.positions.grid': lambda: (2, 3), 'with_token.model': little_vit}
INSTANCES |= {'ViT': little_vit}


# gpt
def little_gpt(): return __import__('distill_nb.gpt').gpt.GPT(8, 4, 8, 1, 2)


GOOD |= {'CausalAttention.width': lambda: 8, 'MLP.width': lambda: 8, 'GPTBlock.width': lambda: 8,
         'GPT.classes': lambda: 8, 'GPT.hidden.x': lambda: torch.zeros(2, 3, dtype=torch.long),
         'build_gpt.name': lambda: 'gpt_micro',
         'generate.ids': lambda: torch.zeros(2, 3, dtype=torch.long), 'with_dropout.share': lambda: 0.1,
         'generate.model': little_gpt, 'generate.n': lambda: 2, 'with_dropout.model': little_gpt,
         'build_gpt.classes': lambda: 8, 'build_gpt.length': lambda: 8}
INSTANCES |= {'GPT': little_gpt}


# devices, contract, students, history, training
GOOD |= {'Teacher.answers.x': lambda: batch().x, 'logits_of.x': lambda: batch().x, 'check_heads.x': lambda: batch().x,
         'Teacher.check_outputs.x': lambda: batch().x, 'logits_in.output': logits, 'heads.output': logits,
         'Heads.losses.of': lambda: lambda z: {'hard': z.mean()}, 'write_curve.history': History,
         'plot_curves.axes': lambda: plt.subplots(1, 2)[1],
         'Recipe.make_optimizer.parameters': lambda: net().parameters(),
         'Checkpoint.kept.made_from': lambda: {'recipe': {}}, 'fit.objective': lambda: Supervised(net()),
         'Run.objective': lambda: Supervised(net()), 'scheduled.schedule': lambda: 'cosine',
         'Recipe.lr_at.step': lambda: 0}
INSTANCES |= {'Checkpoint': lambda: Checkpoint(tempfile.mkdtemp())}
WITHOUT |= {'Checkpoint.read'}  # there is none yet


# tracking
def tracked(): return Tracker(lambda path, step: types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None))


GOOD |= {'Tracker.__call__.row': lambda: {'step': 1, 'x': 0.5}, 'tracker.kind': lambda: 'tensorboard'}
INSTANCES |= {'Tracker': tracked}


# compare
def compared():
    runs = [{'model': name, 'seed': s, 'accuracy': 0.5 + s/9} for name in 'ab' for s in (0, 1)]
    return Comparison(runs, 'a', Measure('accuracy', share=True))


def stored_row(): return {'runs': [{'seed': s, 'accuracy': 0.5 + s/9} for s in (0, 1)]}


def contenders(): return {'a': Contender(Supervised, images(24))}


GOOD |= {'share_interval.right': lambda: 1, 'Contender.make': lambda: Supervised, 'Contender.data': lambda: images(24),
         'Comparison.runs': lambda: compared().runs, 'Comparison.baseline': lambda: 'a',
         'Comparison.primary': lambda: Measure('accuracy'), 'Comparison.values.name': lambda: 'a',
         'Comparison.label.measure': lambda: 'accuracy', 'Comparison.values.measure': lambda: 'accuracy',
         'compare.contenders': contenders, 'compare.seeds': lambda: 1,
         'choose.settings': contenders, 'choose.seeds': lambda: 1, 'Table.head': lambda: ['a', 'b'],
         'Table.rows': lambda: [['1', 'x'], ['2', 'y']], 'table.rows': lambda: [{'a': 1, 'b': 2.}],
         'paired.row': stored_row, 'paired.other': stored_row, 'paired.measure': lambda: 'accuracy'}
INSTANCES |= {'Comparison': compared, 'Contender': lambda: Contender(Supervised, images(24))}


# exam
GOOD |= {'by_luck.chance': lambda: torch.full((3,), 1/3), 'fell_below.now': lambda: 0.5, 'fell_below.then': lambda: 0.5,
         'check_teacher.teacher': knowing}
WORDS |= {'v': 'teacher_logits', 'valid': 'validation', 'data': WORDS['data'] + '|validation items'}


# logits
GOOD |= {'Distill.learned.own': lambda: Heads(logits()), 'Distill.learned.v': logits, 'Distill.teacher': knowing}


# cache
GOOD |= {}
INSTANCES |= {}


# distillation_token
def _two_headed(): return ViT(4, 2, 8, 1, 2, 3, 1, True)


GOOD |= {'DistillToken.student': _two_headed, 'DistillToken.teacher': knowing, 'token_attention.model': _two_headed,
         'DistillToken.learned.own': lambda: Heads(logits(), logits(1)), 'DistillToken.learned.v': logits,
         'token_attention.x': lambda: images(6).get(torch.arange(6)).x}
INSTANCES |= {'DistillToken': lambda: DistillToken(_two_headed(), knowing(), examine=False)}


# taps, features, similarity
def _maps(n=2): return torch.rand(6, n, 4, 4)


def _pairs(): return FeatureDistill(net(), knowing(), {'hint': (Hint('1', '1'), 1.)}, examine=False)


def _staged(): return nn.Sequential(OrderedDict(layer1=nn.Conv2d(1, 2, 1), layer2=nn.Conv2d(2, 2, 1), flat=nn.Flatten(),
                                                 fc=nn.Linear(32, 3)))


def _looked(): return {'student': (_staged(), 'layer1')}


GOOD |= {f'{f}.{side}_features': _maps for f in ('Adapter', 'attention_loss') for side in ('student', 'teacher')}
GOOD |= {f'{f}.prepare.{side}_features': lambda: [_maps()] for f in ('Term', 'Hint') for side in ('student', 'teacher')}
GOOD |= {f'{side}_layer': lambda: '1' for side in ('student', 'teacher')}
GOOD |= {f'{side}_layers': lambda: ['1', '0'] for side in ('student', 'teacher')}
GOOD |= {'names': lambda: ['1'], 'hear': lambda: print, 'attention_map.features': _maps,
         'attention_map.size': lambda: (2, 2),
         'FeatureDistill.terms': lambda: {'hint': (Hint('1', '1'), 1.)}, 'cka.y': partial(logits, 1),
         'plot_similarity.similarity': lambda: torch.rand(2, 2), 'plot_attention.models': _looked}
GOOD |= {f'{f}.x': lambda: images(6).get(torch.arange(6)).x for f in ('feature_shapes', 'layer_similarity')}
GOOD |= {f'{f}.{side}': _staged for f in ('stage_names', 'stage_pairs', 'feature_method')
         for side in ('model', 'student', 'teacher')}
GOOD |= {'feature_method.name': lambda: 'hint', 'plot_attention.data': lambda: images(24)}
INSTANCES |= {'FeatureDistill': _pairs, 'Term': lambda: Term('1', '1'), 'Hint': lambda: Hint('1', '1')}
WORDS |= {k: 'layers?' for k in ('names', 'student_layers', 'teacher_layers')}
WORDS |= {f'{side}_layer': f'{side}_layers' for side in ('student', 'teacher')} | {'terms': 'term'}


# taps (of transformers), tokens
def _blocks():
    from distill_nb.vit import ViT
    return ViT(4, 2, 4, 1, 2, 3, 1)


def _compared(): return torch.rand(6, 2, 5, 4)  # images, heads, tokens, numbers
def _qkv(): return torch.rand(6, 3, 2, 5, 4)


GOOD |= {'attention_names.model': _blocks, 'patch_map.features': lambda: torch.rand(6, 5, 4),
         'layer_map.student': _blocks,
         'layer_map.teacher': _blocks, 'log_relations.queries': _compared, 'log_relations.keys': _compared,
         'attention_scores.qkv': _qkv, 'Relations.heads': lambda: 2, 'Relations.compared': lambda: ('qq',),
         'relation_loss.heads': lambda: 2, 'log_relations.heads': lambda: 2}
GOOD |= {f'relation_loss.{n}': _compared for n in ('student', 'teacher', 'student_keys', 'teacher_keys')}
GOOD |= {f'attention_map_loss.{side}_maps': lambda: torch.rand(6, 2, 5, 5) for side in ('student', 'teacher')}
GOOD |= {f'Relations.forward.{side}_features': lambda: [_qkv()] for side in ('student', 'teacher')}
GOOD |= {f'AttentionMaps.forward.{side}_features': lambda: [_qkv()] for side in ('student', 'teacher')}
WORDS |= {'queries': 'queries', 'qkv': 'qkv', 'heads': 'heads'}
# embeddings, embed
def _placed(n=6): return torch.randn(n, 5, generator=torch.Generator().manual_seed(n))


def _embedding():
    from distill_nb.embeddings import embedding_teacher
    return embedding_teacher(net())


def _embedded():
    from distill_nb.embed import Embed
    objective = Embed(net(), _embedding())
    objective.check(images(24))
    return objective


GOOD |= {f'{f}.{name}': _placed for f in ('knn_accuracy', 'linear_accuracy') for name in ('train', 'test')}
GOOD |= {f'{f}.{name}': GOOD['labels'] for f in ('knn_accuracy', 'linear_accuracy') for name in ('train_y', 'test_y')}
GOOD |= {'embeddings': _placed, 'neighbour_agreement.a': _placed, 'neighbour_agreement.b': _placed,
         'neighbour_agreement.k': lambda: 2, 'nearest.k': lambda: 2, 'knn_accuracy.k': lambda: 2,
         'Embed.teacher': _embedding,
         'check_embedding.model': _embedding, 'embedding_loss.student_embeddings': _placed,
         'embedding_loss.teacher_embeddings': _placed, 'embedding_loss.weight': lambda: torch.ones(6),
         'Embed.weight': lambda: 1., 'Embed.prepare.d': lambda: 8, 'Embed.prepare.D': lambda: 8}
INSTANCES |= {'Embed': _embedded}
WORDS |= {'a': 'embeddings|rows in a and b', 'b': 'embeddings|rows in a and b', 'd': 'projection', 'D': 'projection'}


# chunks
def _hidden(seed=0):
    "Logits of six places and three classes that were not computed yet."
    from distill_nb.chunks import HiddenLogits
    return HiddenLogits(_placed(6 + seed), torch.randn(3, 5))


GOOD |= {'chunked_loss.loss': INSTANCES['DistillationLoss'], 'chunked_loss.student': _hidden,
         'chunked_loss.labels': GOOD['labels'], 'chunked_loss.weight': GOOD['weight'],
         'chunked_loss.teacher': partial(logits, 1), 'HiddenLogits.hidden': _placed,
         'HiddenLogits.weight': lambda: torch.randn(3, 5), 'HiddenLogits.bias': lambda: torch.zeros(3)}
INSTANCES |= {'HiddenLogits': _hidden}


# self_distillation, exits
def exits():
    from distill_nb.exits import EarlyExits
    return EarlyExits(net(), ['1', '3'], (1, 4, 4))


def generations():
    from distill_nb.self_distillation import Generations
    return Generations([net()])


GOOD |= {'born_again.recipe': BY_KIND[Recipe], 'born_again.generations': lambda: 2,
         'born_again.valid': lambda: images(24, 1),
         'Ensemble.models': lambda: [net(), net()], 'run_until.layer': lambda: '1', 'run_until.x': floats,
         'ExitHead.shape': lambda: (2, 4, 2, 2), 'ExitHead.classes': lambda: 3, 'EarlyExits.layers': lambda: ['1'],
         'EarlyExits.shape': lambda: (1, 4, 4), 'EarlyExits.x': floats, 'EarlyExits.exit': lambda: 1,
         'EarlyExits.until_sure.x': lambda: floats()[:1], 'exits': exits, 'exit_costs.shape': lambda: (1, 4, 4),
         'BeYourOwnTeacher.layers': lambda: ['1'], 'BeYourOwnTeacher.shape': lambda: (1, 4, 4),
         'feature_distance.weight': lambda: torch.ones(6), 'sure_exit.logits': lambda: [logits(), logits(1)],
         'repeat_labelled.data': lambda: images(24).unlabelled(range(6)), 'view_loss.centre': lambda: torch.zeros(3),
         'plot_exits.dial': lambda: [{'exit': 'deepest', 'macs': 9, 'accuracy': 0.5}],
         'plot_exits.curve': lambda: [{'macs': 9, 'accuracy': 0.5}], 'view_loss.weight': lambda: torch.ones(6)}
INSTANCES |= {'Generations': generations, 'EarlyExits': exits}
WORDS |= {'layers': 'layer', 'x': 'inputs?|images'}


# dino
def crops():
    from distill_nb.dino import for_crops
    return for_crops(images(24))


def self_taught():
    from distill_nb.dino import Dino
    return Dino(net(), crops(), 4, local=0)


GOOD |= {'for_crops.scale': lambda: (0.4, 1.), 'local_crops.data': crops, 'local_crops.size': lambda: 2,
         'local_crops.scale': lambda: (0.2, 0.4), 'ProjectionHead.inputs': lambda: 3,
         'ProjectionHead.x': lambda: torch.randn(6, 3), 'Projected.projection': lambda: nn.Identity(),
         'Projected.x': floats, 'views_loss.student_outputs': lambda: [logits(), logits(2)],
         'views_loss.teacher_outputs': lambda: [logits(1)], 'views_loss.centre': lambda: torch.zeros(3),
         'Dino.data': crops, 'Dino.local_scale': lambda: (0.2, 0.4), 'Dino.valid': lambda: images(24, 1),
         'answer_entropies.answers': lambda: logits().softmax(1)}
INSTANCES |= {'Dino': self_taught}


# inversion
def _inversion(name):
    from distill_nb import inversion
    return getattr(inversion, name)


def sized(): return Teacher(net(), size=4)
def inversion(): return _inversion('DeepInversion')(sized(), torch.arange(6) % 3, channels=1)
def noise(): return _inversion('Noise')(24, 5, 3)


GOOD |= {'statistics_distance.inputs': lambda: [logits()], 'statistics_distance.layers': lambda: [nn.BatchNorm1d(3)],
         'GlassTeacher.look.x': floats, 'Noise.n': lambda: 24, 'Noise.dim': lambda: 5, 'total_variation.x': floats,
         'Pixels.start': floats, 'DeepInversion.teacher': sized, 'DeepInversion.channels': lambda: 1,
         'invert.teacher': sized, 'invert.channels': lambda: 1,
         'DeepInversion.check.data': lambda: _inversion('Noise')(6, 1, 3),
         'DeepInversion.check.valid': lambda: None, 'invert.recipe': BY_KIND[Recipe], 'invert.setup': BY_KIND[Setup]}
INSTANCES |= {'DeepInversion': inversion, 'Noise': noise, 'GlassTeacher': lambda: _inversion('GlassTeacher')(net())}


# data_free
def _data_free(name):
    from distill_nb import data_free
    return getattr(data_free, name)


def pictures(): return _data_free('Pictures')(floats(), 3)
def generator(): return _data_free('Generator')(4, noise=5, width=4)
def data_free(): return _data_free('DataFree')(net(), net(), generator(), memory=64, replay=16)


GOOD |= {'dafl_losses.features': logits, 'Generator.size': lambda: 4, 'DataFree.generator': generator,
         'DataFree.remember.images': floats, 'DataFree.remember.answers': logits, 'DataFree.imagine.images': floats,
         'DataFree.imagine.look': lambda: data_free().teacher.look(floats()), 'DataFree.check.data': noise,
         'Pictures.x': floats, 'Distilled.history': lambda: _data_free('History')(), 'Distilled.images': floats,
         'distill_without_data.teacher': sized, 'distill_without_data.channels': lambda: 1,
         'distill_without_data.method': lambda: 'generator', 'distill_without_data.recipe': BY_KIND[Recipe],
         'distill_without_data.setup': BY_KIND[Setup]}
INSTANCES |= {'Pictures': pictures, 'DataFree': data_free}


# causal
def hf_source():
    "A tokenizer of transformers, as far as it is looked at."
    import tokenizers
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0, 'b': 1, 'end': 2}, unk_token='a'))
    return types.SimpleNamespace(backend_tokenizer=core, eos_token_id=2, save_pretrained=lambda folder: None)


def hf_words(): return __import__('distill_nb.causal').causal.HFTokenizer(hf_source())


def hf_network():
    "A network in the form of a causal model of transformers."
    class Network(nn.Module):
        config = types.SimpleNamespace(max_position_embeddings=8)

        def __init__(self):
            super().__init__()
            self.embed, self.inner, self.lm_head = nn.Embedding(9, 4), nn.Module(), nn.Linear(4, 9)
            self.inner.forward = lambda input_ids, **_: types.SimpleNamespace(last_hidden_state=self.embed(input_ids))

        def forward(self, input_ids, **_):
            return types.SimpleNamespace(logits=self.lm_head(self.inner(input_ids).last_hidden_state))

        def get_decoder(self): return self.inner
        def get_input_embeddings(self): return self.embed
        def get_output_embeddings(self): return self.lm_head
    return Network()


def small_gpt():
    from distill_nb.gpt import build_gpt
    return build_gpt('gpt_micro', 257, 8)


def plain_bytes(): return __import__('distill_nb.vocabulary').vocabulary.ByteTokenizer()


def causal_model(): return __import__('distill_nb.causal').causal.CausalLM(hf_network())


GOOD |= {'HFTokenizer.source': hf_source, 'HFTokenizer.encode.text': lambda: 'a b',
         'HFTokenizer.decode.ids': lambda: [0, 1], 'CausalLM.model': hf_network, 'CausalLM.classes': lambda: 9,
         'CausalLM.hidden.x': lambda: torch.zeros(1, 3).long(),
         'open_language_model.name': lambda: 'gpt_micro', 'open_language_model.tokenizer': plain_bytes,
         'open_language_model.length': lambda: 8, 'open_language_model.dtype': lambda: 'float32',
         'save_language_model.model': small_gpt, 'save_language_model.tokenizer': plain_bytes,
         'save_language_model.path': lambda: 'student.safetensors', 'OpenedLM.model': small_gpt,
         'OpenedLM.tokenizer': plain_bytes, 'OpenedLM.trained': lambda: True, 'OpenedLM.said': list,
         'OpenedLM.facts': dict}
INSTANCES |= {'HFTokenizer': hf_words, 'CausalLM': causal_model}
WITHOUT |= {'HFTokenizer.save'}  # it takes seconds to load transformers


# language
GOOD |= {'Data.more_of.model': net, 'folder_in.data': lambda: 'text:texts',
         'samples_cost.student': small_gpt, 'samples_cost.teacher': small_gpt, 'samples_cost.end': lambda: 256,
         'samples_cost.texts': lambda: 2, 'samples_cost.length': lambda: 3}
INSTANCES |= {'DistillLM': lambda: language.DistillLM(net(), knowing(), examine=False)}


# deploy
def _linear(): return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def _file(name='m.onnx'):
    from distill_nb.deploy import export_onnx
    if not Path(name).exists(): export_onnx(_linear(), name, images(24))
    return name


def _onnx():
    from distill_nb.deploy import OnnxModel
    return OnnxModel(_file())


GOOD |= {'export_onnx.path': lambda: 'new.onnx', 'export_onnx.model': _linear, 'export_onnx.data': lambda: images(24),
         'export_onnx.within': lambda: 1e-3,
         'OnnxModel.path': _file, 'ExportedModel.run.array': lambda: images(24).x[:2].numpy(), 'file_cost.model': _onnx,
         'file_cost.item': lambda: images(24).x[0]}
INSTANCES |= {'ExportedModel': _onnx, 'OnnxModel': _onnx}


def _traced(network, item, form, output):
    "What the exporter gives for `net()`, without its seconds."
    from onnx import TensorProto, helper, numpy_helper
    if 'network.1.bias' not in network.state_dict(): raise ValueError('model cannot be exported: it is another one.')
    made = {k: v.detach().numpy() for k, v in network.state_dict().items()}
    given = {k.split('.')[-1]: numpy_helper.from_array(np.ascontiguousarray(v), k.split('.')[-1]) for k,
             v in made.items()}
    nodes = [helper.make_node('Cast', [form], ['f'], to=TensorProto.FLOAT),
             helper.make_node('Mul', ['f', 'scale'], ['g']),
             helper.make_node('Add', ['g', 'shift'], ['h']), helper.make_node('Flatten', ['h'], ['k']),
             helper.make_node('Gemm', ['k', 'weight', 'bias'], [output], transB=1)]
    ends = [helper.make_tensor_value_info(form, TensorProto.UINT8, ['n', *item.shape]),
            helper.make_tensor_value_info(output, TensorProto.FLOAT, ['n', len(made['network.1.bias'])])]
    graph = helper.make_graph(nodes, 'g', ends[:1], ends[1:], list(given.values()))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)


# pte
KNOWING = Path(__file__).parent/'knowing.pte'  # what export_pte gives for `knowing()`, which takes seconds


def _pte():
    from distill_nb.pte import PteModel
    return PteModel(KNOWING)


def _lowered(network, item, batch, facts):
    from distill_nb.pte import _END
    made, own = network.network.state_dict(), knowing().state_dict()
    same = made.keys() == own.keys() and all(torch.equal(v, own[k]) for k, v in made.items())
    if not same or item.shape != (1, 4, 4): raise ValueError('model cannot be exported: it is another one.')
    data = KNOWING.read_bytes()
    return data[:_END.search(data).start()]


GOOD |= {'export_pte.path': lambda: 'new.pte', 'export_pte.model': knowing, 'export_pte.data': lambda: images(24),
         'export_pte.within': lambda: 1e-3, 'export_pte.batch': lambda: 32, 'PteModel.path': lambda: str(KNOWING),
         'PteModel.cost.item': lambda: images(24).x[0]}
INSTANCES |= {'PteModel': _pte}


# zoo
GOOD |= {'build_model.name': lambda: 'digit_student', 'build_model.classes': lambda: 3, 'load_weights.path': saved,
         'opened.name': lambda: 'digit_student', 'opened.classes': lambda: 3, 'open_model.classes': lambda: 3,
         'open_model.name': lambda: 'digit_student', 'package_says.name': lambda: 'resnet18',
         'brings_weights.name': lambda: 'resnet18'}


# teachers
def tried(): return [Tried(n, [0.5], [0.5], 0.5, torch.rand(6), None) for n in 'ab']


GOOD |= {'normalisation_table.measure': lambda: Measure('accuracy'), 'normalisation_table.tried': tried,
         'clearly_best.tried': tried, 'Tried.losses': lambda: torch.rand(6), 'Tried.shift': lambda: 0.5,
         'make_teacher.name': lambda: 'digit_student', 'make_teacher.weights': lambda: 'none',
         'make_teacher.data': lambda: Splits(*(images(24, s) for s in range(3)))}


# clock
GOOD |= {'in_turns.calls': lambda: {'a': dict}, 'in_turns.seconds': lambda: 0.01,
         'in_turns.clock': lambda: time.perf_counter,
         'peak_growth.work': lambda: dict, 'peak_growth.seconds': lambda: 5.,
         'measure.models': lambda: {'net': net()}, 'measure.item': lambda: floats()[0],
         'measure.batch_sizes': lambda: (1, 2), 'measure.seconds': lambda: 0.01}


# few_bits
def _bits(**changed):
    from distill_nb.few_bits import few_bits
    return few_bits(net(), images(24), **changed)


def _channels(): return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


GOOD |= {'fake_quantize.scale': lambda: torch.full((6, 1), 0.5), 'fake_quantize.low': lambda: -3,
         'fake_quantize.high': lambda: 3, 'best_share.weight': _channels, 'RoundedWeights.weight': _channels,
         'RoundedInputs.low': lambda: -1., 'RoundedInputs.high': lambda: 2., 'best_share.bits': lambda: 3,
         'RoundedWeights.bits': lambda: 3, 'RoundedInputs.bits': lambda: 8, 'written_back.model': _bits,
         'bits_of.model': _bits}
# pruning
GOOD |= {'load_pruned.path': saved, 'prune_channels.fixed': lambda: ['3'], 'prune_channels.random': lambda: 0}


# export_run
def _export_options(**given):
    from distill_nb.export_run import ExportOptions
    return ExportOptions(**dict(student='net.safetensors') | given)


GOOD |= {'kinds_of.export': lambda: 'onnx', 'ExportOptions.student': lambda: 'net.safetensors',
         'export_table.rows': lambda: [dict(kind='onnx', file='m.onnx', bytes=9, latency_ms=1., low_ms=1., high_ms=2.,
                                            batch_ms=3., batch_size=32)]}
INSTANCES |= {'ExportOptions': _export_options}
WITHOUT |= {'write_files', 'prepare_export', 'run_export', 'ExportJob'}  # they take seconds
# quantize
def float_file():
    from small import small_file
    return small_file('float.onnx', images(24))


GOOD |= {'Quantised.model': float_file, 'quantize_onnx.model': float_file, 'quantize_onnx.out': lambda: 'int8.onnx',
         'quantize_onnx.splits': lambda: Splits(*(images(24, k) for k in range(3)))}


# inference
def student_file():
    from distill_nb.models import digit_student
    from distill_nb.files import save_weights
    save_weights(digit_student(), 'student.safetensors', list('0123456789'), architecture='digit_student', channels=1,
                 size=8, side=8, mean=[0.5], std=[0.5])
    return 'student.safetensors'


def asked(): return __import__('distill_nb.inference').inference.open_student(student_file())[0]


def picture():
    from PIL import Image
    Image.new('L', (8, 8)).save('picture.png')
    return 'picture.png'


GOOD |= {'open_student.path': student_file, 'image_paths.images': picture, 'predictions.images': picture,
         'predictions.teacher': asked, 'write_predictions.images': picture, 'write_predictions.teacher': asked}
WORDS |= {'path': 'student'}


# methods
def task(): return Task(net, net(), images(24), images(24), BY_KIND[Recipe](), Setup(progress=False))


GOOD |= {'Task.labelled': lambda: images(24), 'Task.transfer': lambda: images(24), 'Method.make': lambda: len,
         'contender.name': lambda: 'alone', 'contender.task': task, 'rehearse.name': lambda: 'alone',
         'rehearse.task': task, 'choose_setting.name': lambda: 'alone', 'choose_setting.task': task,
         'choose_setting.settings': lambda: [{'label_smoothing': 0.}]}
WITHOUT |= {'contender'}  # for it wants a setting as keywords


# report
def result(): return stored_result('digits_unlabelled')


def free_rows(): return stored_result('data_free_cifar10_seed_0')['rows']


GOOD |= {'measure': lambda: Measure('accuracy'), 'about_data.d': lambda: Splits(*(images(24, s) for s in range(3))),
         'head_of.data': lambda: 'digits', 'as_json.value': dict, 'as_png.fig': Figure,
         'stored_result.name': lambda: 'digits', 'result_table.rows': lambda: result()['rows'],
         'verdicts.rows': lambda: result()['rows'], 'class_table.result': result, 'class_table.setting':
         lambda: result()['rows'][0]['setting'], 'free_text.rows': free_rows, 'draw_curves.comparisons':
         lambda: {'unlabelled': compared()}, 'draw_comparison.comparisons': lambda: {'unlabelled': compared()},
         'draw_comparison.rows': lambda: result()['rows'], 'draw_learning.history': lambda: History([], {'loss': [1.]}),
         'draw_images.images': lambda: torch.rand(4, 3, 8, 8), 'draw_images.mean': lambda: [0.5]*3,
         'draw_images.std': lambda: [0.5]*3, 'make_report.result': result, 'make_report.pictures': dict}


# run
def asked_of_a_run(): return __import__('distill_nb.run').run.Options(labels=0, temperature=4, alpha=0.5)


def asked_of_a_free_run():
    both = dict(teacher='digit_student', student='digit_student', channels=1, size=8)
    return __import__('distill_nb.run').run.FreeOptions(teacher_weights=student_file(), **both)


def asked_of_nothing(): return __import__('distill_nb.run').run.Options(data='folder:nowhere')


GOOD |= {'in_folder.options': asked_of_a_run, 'prepare.options': asked_of_nothing,
         'FreeOptions.teacher_weights': student_file,
         'prepare_free.options': asked_of_a_free_run, 'command_line.function': lambda: student_file,
         'free_folder.data': lambda: 'digits',
         'Watch.inside.name': lambda: 'teacher', 'preset.data': lambda: 'digits'}
INSTANCES |= {'FreeOptions': asked_of_a_free_run, 'Watch': lambda: __import__('distill_nb.run').run.Watch(Path('run'))}
WITHOUT |= {'prepare', 'prepare_free', 'run_setting', 'run_job', 'run_free', 'Job', 'FreeJob'}  # they train


# bench
class Still:
    "A contender that does nothing."
    ahead = 0
    def start(self): pass
    def step(self): pass
    def stop(self): pass


def work(): return __import__('distill_nb.bench').bench._make_work('digits', 4, torch.device('cpu'))[0]


def measured():
    from distill_nb.report import stored_result
    return stored_result('bench_digits')


GOOD |= {'take_turn.contender': Still, 'time_steps.contenders': lambda: {'still': Still()}, 'work': work,
         'bench_text.result': measured, 'distill_nb_bench.pair': lambda: 'digits', 'distill_nb_bench.steps': lambda: 1,
         'distill_nb_bench.data': lambda: None, 'distill_nb_bench.method': lambda: None, 'Taught.name': lambda: 'alone',
         'Naive.loss.x': lambda: torch.zeros(4, 1, 8, 8), 'PytorchTutorial.loss.x': lambda: torch.zeros(4, 1, 8, 8),
         'Naive.loss.y': lambda: torch.arange(4), 'PytorchTutorial.loss.y': lambda: torch.arange(4),
         'NaiveBf16.loss.x': lambda: torch.zeros(4, 1, 8, 8), 'NaiveBf16.loss.y': lambda: torch.arange(4)}
WITHOUT |= {'Naive.step', 'NaiveBf16.step', 'PytorchTutorial.step'}  # they want a start
WITHOUT |= {f'Torchdistill{part}' for part in ('', '.start', '.loss', '.step')}  # it may be absent
STUBS = {'deploy': {'_traced': _traced}, 'pte': {'_lowered': _lowered},
         'bench': {f'_measure_{what}': lambda *_: dict(measured()) for what in ('steps', 'methods')}}  # a minute


# embed_run
def asked_of_an_embedding():
    embed_run = __import__('distill_nb.embed_run').embed_run
    return embed_run.EmbedOptions(data='digits', teacher=student_file(), student='digit_student', device='cpu')


def embedded_rows():
    cost = dict(parameters=3, bytes=12, width=2)
    return [dict(model='student', agreement=0.5, agreement_ci95=[0.4, 0.6], **cost)]


GOOD |= {'draw_parts.hashes': lambda: torch.randint(256, (20, 32)).to(torch.uint8).numpy(),
         'EmbedOptions.data': lambda: 'digits', 'EmbedOptions.teacher': lambda: 'resnet8',
         'read_album.options': asked_of_an_embedding, 'prepare_embed.options': asked_of_an_embedding,
         'common_share.student': lambda: torch.randn(6, 3), 'common_share.teacher': lambda: torch.randn(6, 4),
         'common_share.k': lambda: 2, 'embed_table.rows': embedded_rows,
         'places_of.embeddings': lambda: torch.randn(6, 3),
         'neighbours.n': lambda: 20}
INSTANCES |= {'EmbedOptions': asked_of_an_embedding}
WITHOUT |= {'prepare_embed', 'run_embed', 'EmbedJob', 'EmbedJob.transfer', 'EmbedJob.asked',
            'Album'}  # they train


# language_run
TEXT = dict(data='text:texts', student='gpt_micro', teacher='gpt_micro', length=8, vocabulary=257, steps=1,
            teacher_steps=1, tries=1, batch_size=2, device='cpu')


def asked_of_a_text():
    Path('texts').mkdir(exist_ok=True)
    for i in range(12): Path(f'texts/{i}.txt').write_text(f'{i} green bottles are hanging on the wall. ' * 4)
    return __import__('distill_nb.language_run').language_run.LanguageOptions(**TEXT)


def text_rows():
    run = dict(seed=0, bits_per_byte=2., teacher_bits=3., own_bits=1.)
    return [dict(setting='all_text', model='alone', runs=[run]),
            dict(setting='all_text', model='distilled', runs=[run], difference=0.)]


GOOD |= {'settings_to_try.tries': lambda: 4, 'settings_to_try.given': dict, 'LanguageOptions.data': lambda: 'english',
         'read_language.options': asked_of_a_text, 'read_language.tokenizer': lambda: 257,
         'prepare_language.options': asked_of_a_text, 'by_measure.rows': text_rows,
         'draw_topics.topics': lambda: [dict(document='a', teacher=2., alone=3.)],
         'draw_topics.models': lambda: ['teacher', 'alone']}
INSTANCES |= {'LanguageOptions': asked_of_a_text}
WITHOUT |= {'prepare_language', 'run_language', 'run_part', 'LanguageJob', 'LanguageJob.answering',
            'LanguageJob.contender', 'LanguageArm'}  # they train


# plan
def files_of_a_plan():
    row = dict(training='alone', valid_accuracy=0.9, ci95=[0.8, 1.], bytes=1000, macs=10, torch_ms=1.)
    times = dict(latency_ms=2., low_ms=1., high_ms=3.)
    return [row | times | dict(model='resnet8', numbers=n) for n in ('float', 'int8')]


GOOD |= {'family.names': lambda: 'resnet8', 'family.widths': lambda: [0.5, 1],
         'disagreements.rows': files_of_a_plan, 'disagreements.key': lambda: 'macs',
         'int8_speed.rows': files_of_a_plan}
for name in ('front', 'pick', 'draw_front', 'front_table'):
    GOOD |= {f'{name}.rows': files_of_a_plan, f'{name}.measure': lambda: Measure('valid_accuracy', share=True)}


# plan_run
def asked_of_a_plan():
    plan_run = __import__('distill_nb.plan_run').plan_run
    return plan_run.PlanOptions(family='digit_student', widths='1', epochs=1, teacher_epochs=1, device='cpu')


GOOD |= {'prepare_plan.options': asked_of_a_plan, 'PlanOptions.members.size': lambda: 8}
INSTANCES |= {'PlanOptions': asked_of_a_plan}
WITHOUT |= {'prepare_plan', 'run_plan', 'train_member', 'PlanJob', 'Member'}  # they train


# cli
GOOD |= {}
INSTANCES |= {}


class Learner:
    "What other libraries wrap a network in."
    def __init__(self): self.model = net()


def _wrong():
    "Values of many kinds, of which most are wrong for any parameter."
    splits = Splits(*(images(24, seed) for seed in range(3)))
    return [None, 'text', 'ünïcode \ud800', 3, 3.5, float('nan'), True, [], {}, object(), nn.ReLU, b'bytes', 1j, {'a'},
            len, splits, DataLoader(images(24)), (logits(), torch.arange(6)), Learner(), Path('nowhere'), net(),
            logits(), images(24)]


def _extremes(kind, good):
    "Values of the right kind that are extreme."
    nan, inf = float('nan'), float('inf')
    found = []
    if kind is int: found = [0, -1, 10**18, -10**18]
    if kind is float: found = [nan, inf, -inf, 0., -1., 1e300, 10**18, 1 + 1e-6]
    if kind in (str, Path): found = ['', 'ünïcode \ud800', '../nowhere', 'a'*5000, '\0', '{}', 'text']
    if kind in (list, tuple): found = [[], [None], ['a', 'a'], [nan], [-1], [10**18], [0.5]*7, ['ünïcode \ud800'], [[]]]
    if kind is dict: found = [{}, {1: 2}, {'text': None}, {'ünïcode \ud800': nan}]
    if kind is Callable: found = [lambda: None, lambda *_, **__: 'text']
    if kind is nn.Module: found = [nn.Identity(), nn.Linear(2, 2), _spoilt()]
    if kind is Tensor and isinstance(good, Tensor):
        t = good
        found = [t[:0], t[:1] if len(t) > 1 else t, t.flatten()[None], t[None], t.flatten()[:-1], t.float()*nan,
                 t.float() + inf, t.bool(), t.long() - 7, t.long() + 10**12, t.to(torch.complex64),
                 torch.tensor(0.), t.float()*1e38]
    if kind in (Data, ImageData):
        bare = images(24)
        found = [bare.subset([0]), ImageData(bare.x, torch.full((24,), -100), list('abc'))]
    return found


def _spoilt():
    model = net()
    with torch.no_grad(): model[1].weight.fill_(float('nan'))
    return model


def _value(owner, name, parameter):
    "A good value for a parameter: by function and name, by name, by default, by kind."
    for key in (f'{owner}.{name}', f'{owner.split(".")[0]}.{name}'):
        if key in GOOD: return GOOD[key]()
    if parameter.default is not inspect._empty: return parameter.default
    if name in GOOD: return GOOD[name]()
    for kind in _Kind(parameter).kinds:
        for known, make in BY_KIND.items():
            if kind is known: return make()
    raise LookupError(name)


class _Late(BaseException): pass


def _late(*_): raise _Late


def _outcome(call, names, fits):
    "How a call ended, and what was said."
    signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, 5*SECONDS)
    start, said = time.process_time(), ''
    try:
        out, err = (redirect(io.StringIO()) for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr))
        with warnings.catch_warnings(), out, err:
            warnings.simplefilter('ignore')
            found = call()
            if inspect.isgenerator(found): next(found, None)
            if isinstance(found, contextlib._GeneratorContextManager):
                with found: pass
        outcome = 'accepted' if fits else 'silent'
    except _Late: outcome = 'endless'
    except (ValueError, TypeError, OSError) as e:
        said = f'{type(e).__name__}: {str(e):.300}'
        named = re.search(names, str(e)) or isinstance(e, OSError) and e.filename is not None
        outcome = 'clear' if named else 'unclear'
    except Exception as e: outcome, said = 'unclear', f'{type(e).__name__}: {str(e):.300}'
    finally: signal.setitimer(signal.ITIMER_REAL, 0)
    if time.process_time() - start > SECONDS: outcome = 'endless'
    return outcome, said


def _callables(module):
    "Pairs of name and function for everything public: functions, constructors, public methods."
    m = importlib.import_module(f'distill_nb.{module}')
    for name in m.__all__:
        found = getattr(m, name)
        if inspect.isfunction(found): yield name, found
        if not inspect.isclass(found): continue
        if {'__init__', '__new__'} & set(vars(found)): yield name, found
        for key, f in list(vars(found).items()):
            if key[0] == '_' or key == 'forward' or not inspect.isfunction(f): continue
            yield f'{name}.{key}', f


def _bound(name, f):
    "What is to be called, or None where no instance is known."
    if '.' not in name: return f
    owner, method = name.split('.')
    if owner in INSTANCES: return getattr(INSTANCES[owner](), method)
    return getattr(_instance(owner, f), method)


def _instance(owner, f):
    cls = getattr(importlib.import_module(f.__module__), owner)
    return cls(**_good(owner, cls))


def _good(name, f):
    "Good arguments: of all that must be given, and of those that GOOD names for this function."
    kinds, found = inspect.signature(f).parameters, {}
    for key, p in kinds.items():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or key == 'self': continue
        if p.default is inspect._empty or f'{name}.{key}' in GOOD: found[key] = _value(name, key, p)
    return found | GOOD.get(f'{name}.**', dict)()


def _called(target, given):
    "Call it with arguments by name, of which some may only be given by position."
    parameters = inspect.signature(target).parameters
    first = [given.pop(k) for k, p in list(parameters.items()) if p.kind is p.POSITIONAL_ONLY and k in given]
    return target(*first, **given)


def _changes(name, f):
    "Each parameter with each value that is wrong or extreme; does it fit its kind?"
    for key, p in inspect.signature(f).parameters.items():
        if key in ('self', 'cls') or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD): continue
        kind = _Kind(p)
        if kind.kinds:
            for k, value in enumerate(_wrong()):
                if not kind.fits(value): yield key, f'wrong {k}', value, False
        try: good = _value(name, key, p)
        except LookupError: good = None
        for own in kind.kinds:
            for k, value in enumerate(_extremes(own, good)):
                if kind.fits(value): yield key, f'extreme {own.__name__} {k}', value, True


def draw(module, share=1., seed=0):
    "Yield (function, parameter, value in words, outcome, what was said) of the wrong calls of a module."
    chosen = random.Random(seed)
    for name, f in _callables(module):
        if name not in WITHOUT:
            try: _called(_bound(name, f), _good(name, f))
            except LookupError as e: yield name, str(e), '', 'uncalled', 'no good value'
            except Exception as e: yield name, '', 'a good call', 'uncalled', f'{type(e).__name__}: {str(e):.200}'
        for key, what, value, fits in _changes(name, f):
            if chosen.random() >= share: continue
            try: given, target = _good(name, f) | {key: value}, _bound(name, f)
            except LookupError: continue
            before = _files()
            outcome, said = _outcome(lambda: _called(target, given), _names(f, value), fits)
            left = sorted(_files() - before)
            if outcome == 'clear' and left: outcome, said = 'leaves', f'{left[:3]} {said}'
            if outcome in ('silent', 'unclear') and (name, key) in LEGITIMATE: outcome = 'accepted'
            yield name, key, f'{what}: {_shown(value)}', outcome, said


def _files(): return {str(p) for p in Path().rglob('*')}


def _names(f, value):
    "A pattern of the words by which a sentence may name a parameter."
    own = [k for k in inspect.signature(f).parameters if k != 'self']
    said = [re.escape(k) for k in own] + [WORDS[k] for k in own if k in WORDS]
    return rf"\b({'|'.join(said)})\b" + (f'|{re.escape(value)}' if isinstance(value, str) and value else '')


def _shown(value):
    if isinstance(value, Tensor): return f'{value.dtype} {tuple(value.shape)}'
    return f'{value!r:.60}'.replace('\n', ' ')


def modules():
    """Those with something public; not doors, whose functions are the checks, and cli, of which tests/test_commands.py
    tries the lines."""
    found = [p for p in sorted((Path(__file__).parent.parent/'distill_nb').glob('*.py')) if p.stem[0] != '_']
    if not importlib.util.find_spec('executorch'): found = [p for p in found if p.stem != 'pte']
    return [p.stem for p in found if '__all__ = []' not in p.read_text() and p.stem not in ('doors', 'cli')]


def drawn(module, share=1., seed=0):
    "The same in an empty folder, with bounds on memory and one thread."
    home, threads, limits = os.getcwd(), torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_AS)
    torch.set_num_threads(1)
    if os.path.exists('/proc/self/statm'):
        held = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + 6*2**30, limits[1]))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with contextlib.ExitStack() as stack:
                for name, stub in STUBS.get(module, {}).items():
                    stack.enter_context(mock.patch(f'distill_nb.{module}.{name}', stub))
                return list(draw(module, share, seed))
        finally:
            os.chdir(home)
            resource.setrlimit(resource.RLIMIT_AS, limits)
            torch.set_num_threads(threads)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('modules', nargs='*')
    parser.add_argument('--all', action='store_true', help='print every call')
    parser.add_argument('--share', type=float, default=1., help='of the calls that are made')
    given, total = parser.parse_args(), Counter()
    for module in given.modules or modules():
        found = drawn(module, given.share)
        counts = Counter(outcome for *_, outcome, _ in found)
        total += counts
        for name, key, what, outcome, said in found:
            if given.all or outcome not in ('clear', 'accepted'):
                print(f'  {outcome:8} {name}({key}) {what}  {said}'.encode(errors='backslashreplace').decode())
        print(f'{module}: {dict(counts)}', flush=True)
    print(f'all: {sum(total.values())} calls, {dict(total)}')


if __name__ == '__main__': main()
