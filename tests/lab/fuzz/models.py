"""Models of somebody's, as the source of a module."""

from random import Random

# A line each: what may stand there. {error} becomes one of ERRORS.
LAYERS = """
nn.Flatten(), nn.Linear(192, num_classes)
nn.Linear(192, 7)
nn.Conv2d(3, 4, 3)
nn.Conv2d(4, 3, 3, padding=1)
nn.LazyConv2d(3, 3)
nn.Conv1d(3, 3, 1)
nn.Conv3d(3, 3, 1)
nn.BatchNorm2d(3)
nn.BatchNorm2d(4)
nn.LazyBatchNorm2d()
nn.SyncBatchNorm(3)
nn.GroupNorm(2, 4)
nn.LayerNorm(8)
nn.Dropout(0.5)
nn.ReLU(inplace=True)
nn.AdaptiveAvgPool2d(1)
nn.MaxPool2d(2)
nn.MaxPool2d(99)
nn.Softmax(1)
nn.LSTM(8, 8)
nn.Embedding(4, 4)
nn.Unflatten(1, (3, 1))
nn.utils.spectral_norm(nn.Conv2d(3, 3, 1))
nn.Linear(192, 0)
nn.Conv2d(3, 3, 0)
nn.Conv2d(3, 4, 3).double()
nn.Conv2d(3, 3, 1).half()
nn.Conv2d(3, 3, 1, dtype=torch.cfloat)
nn.Conv2d(3, 3, 1).requires_grad_(False)
nn.Sequential()
torch.quantization.QuantStub()
nn.Linear(3, 3, device='meta')
nn.ParameterList()
1
None
"""
LAST = ["nn.Flatten(), nn.LazyLinear(num_classes)"] * 3
LAST += ["nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(num_classes)", "nn.Identity()"]
ERRORS = """
ValueError('a\\nb')
Exception()
SystemExit(0)
SystemExit('x')
StopIteration
RuntimeError('Timed out')
RuntimeError('Connection closed by peer')
KeyError('x')
RecursionError
AssertionError
NotImplementedError
UnicodeError('\\udcff')
OSError(28, 'No space left on device')
OSError(2, 'No such file', 'weights.pth')
TypeError(1, 2)
Odd()
"""
FORWARDS = (
    "return self.net(x)\n" * 6
    + """
return self.net(x), None
return {'y': self.net(x)}
return self.net(x).detach()
return self.net(x) * 0
return self.net(x).view(-1)
return self.net(x)[0]
return self.net(x).half()
return self.net(x).tolist()
return None
return x
return self.net(x.view(x.size(0), -1))
return self.net(x.contiguous().view(-1))
return self.net(x.numpy())
return self.net(x) + float('nan')
return self.net(x).to(torch.int64)
return self.forward(x)
return self.net(x).mean(0)
return self.net(x)[:, :1]
return self.net(x, x)
self.calls += 1; return self.net(x)
self.w = nn.Parameter(x); return self.net(x)
x += 1; return self.net(x)
return self.net(x.double())
return self.net(x) if self.training else None
return self.net(x).cfloat()
return self.net(x) if not self.training else None
return self.net(x[:1]).expand(len(x), -1)
return self.net(x.new_tensor(x.tolist()))
del self.net; return x
return self.net(x).sum() * x
raise {error}
return self.net(x) if not self.training else (_ for _ in ()).throw({error})
yield self.net(x)
"""
)
HEADS = """
import no_such_module
from __future__ import x
raise {error}
def f(:
\0
\xe9 = 1
# -*- coding: x -*-
"""
PARAMETERS = """
self
self, classes
self, num_classes, width
self, num_classes=10
self, *a, **b
self, num_classes, /
self, *, num_classes
"""
INITS = """
raise {error}
return 1
self.w = nn.Parameter(torch.ones(3))
self.w = nn.Parameter(torch.ones(0))
self.calls = 0
self.double()
self.half()
self.register_buffer('b', torch.ones(1))
self.register_buffer('b', torch.tensor(2))
self.train = None
self.state_dict = dict
self.requires_grad_(False)
del self._modules
"""
TAILS = """
Net = 1
Net = Net(2)
Net = lambda num_classes: None
def Net(num_classes): return Net
Net = torch.compile
"""
SOURCE = """{head}
import sys, torch
from torch import nn
class Odd(Exception):
    def __str__(self): raise ValueError("no text")
class Net(nn.Module):
    def __init__({parameters}):
        super().__init__()
        {init}
        self.net = nn.Sequential({layers})
    def forward(self, x):
        {forward}
{tail}
"""


def draw_model(rng: Random) -> str:
    """The source of a module with a class Net, most of which are wrong in something."""

    def odd(lines: str, usual: str = "") -> str:
        return usual if rng.random() < 0.85 else rng.choice(lines.strip("\n").split("\n"))

    def error() -> str:
        return rng.choice(ERRORS.split("\n")[1:-1])

    layers = [*rng.choices(LAYERS.split("\n")[1:-1], k=rng.choice([0, 0, 1, 2, 3])), rng.choice(LAST)]
    parts = {
        "head": odd(HEADS),
        "parameters": odd(PARAMETERS, "self, num_classes"),
        "init": odd(INITS, "pass"),
        "layers": ", ".join(layers),
        "forward": rng.choice([*filter(None, FORWARDS.split("\n"))]),
        "tail": odd(TAILS),
    }
    return SOURCE.format(**{name: text.replace("{error}", error()) for name, text in parts.items()})
