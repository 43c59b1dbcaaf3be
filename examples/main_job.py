"""The main job of README.md, with a model and data around it."""

import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

import saq_fx
from saq_fx.data import digits
from saq_fx.networks import SmallResNet

torch.manual_seed(0)
training, test = digits(300)
batches = list(training.batches(50, torch.Generator().manual_seed(0)))
model = SmallResNet()
x = training.x[:100]

gm = saq_fx.prepare_saq(model, example_inputs=x)
result = saq_fx.search_precision(gm, batches, F.cross_entropy, budget="0.14xW8A8", steps=20)
saq_fx.apply_policy(gm, result.policy)
opt = saq_fx.SAQ(gm, torch.optim.SGD(saq_fx.parameter_groups(gm, 1e-4), 0.02, momentum=0.9), rho=0.3)
for x, y in batches:
    loss = opt.step(lambda: F.cross_entropy(gm(x), y))
print(saq_fx.precision_report(gm))
with tempfile.TemporaryDirectory() as folder:
    saq_fx.save(gm, Path(folder) / "model.safetensors")
    again = saq_fx.load(model, Path(folder) / "model.safetensors", example_inputs=x)
gm.eval()
assert torch.equal(again.eval()(test.x), gm(test.x))
