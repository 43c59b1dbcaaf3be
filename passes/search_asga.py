"""Searches bit-widths by adaptive sharpness-aware gradient aligning (ASGA)."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saq_fx.allocation import Constraint
from saq_fx.errors import TrainingError
from saq_fx.graph import SaqGraphModule
from saq_fx.mixtures import MixtureQuantizer
from saq_fx.pass_base import Pass, PassResult
from saq_fx.passes.relax_precision import Choice, choices
from saq_fx.sharpness import (
    RandomState,
    ascent_scale,
    curvature,
    global_norm,
    inner_product,
    perturbed,
    preserve_buffers,
)


@dataclass(frozen=True)
class SearchStep:
    loss: float
    perturbed_loss: float
    gap: float
    rho: float
    sigma: float
    cosine: float
    cost: tuple[float, ...]
    beta: tuple[float, ...]
    temperature: float


@dataclass(frozen=True)
class SearchAsga(Pass):
    batches: Iterable[Any]
    loss_of: Callable[[nn.Module, Any], Tensor]
    constraints: tuple[Constraint, ...]
    references: tuple[float, ...] 
    steps: int
    rho: float = 0.1
    rho_bounds: tuple[float, float] = (0.01, 0.5)
    alignment: float = 1e-3
    lr: float = 0.02
    logits_lr: float = 0.02
    dual_lr: float = 0.1
    damping: float = 5.0
    smoothing: float = 0.9
    final_temperature: float = 0.3
    sam: bool = True
    perturb_logits: bool = True

    def run(self, gm: SaqGraphModule):
        search = Search(gm, self)
        hist = []
        gm.train()
        def forever():
            while True: yield from self.batches
        for batch in islice(forever(), self.steps):
            hist.append(search.step(lambda: self.loss_of(gm, batch)))
        return search, hist


class Search:
    def __init__(self, gm, options):
        self.gm, self.o = gm, options
        self.choices = choices(gm)
        self.mixtures = [m for c in self.choices for m in c.mixtures]
        self.all_mixtures = [m for m in gm.modules() if isinstance(m, MixtureQuantizer)]
        self.logits = [m.logits for m in self.mixtures]
        ids = {id(z) for z in self.logits}
        self.weights = [p for p in gm.parameters() if id(p) not in ids and p.requires_grad]
        self.weight_opt = torch.optim.SGD(self.weights, options.lr, momentum=0.9)
        self.logit_opt = torch.optim.Adam(self.logits, options.logits_lr)
        clip = {id(p) for n, p in gm.named_parameters() if 'quantizer' in n and 'logits' not in n}
        self.perturb = [p for p in self.weights if id(p) not in clip]
        if options.perturb_logits: self.perturb += self.logits
        self.rho = options.rho
        self.gap = None
        self.beta = [0.0] * len(options.constraints)
        self.count = 0
        self.temperature = 1.0
        self.scores = [torch.zeros_like(z) for z in self.logits]
        self.scores2 = [torch.zeros_like(z) for z in self.logits]
        self.costs = [[torch.tensor(c) for c in con.costs] for con in options.constraints]
        self.start()

    def expected(self):
        return [sum(c.probabilities() @ t.to(c.probabilities()) for c, t in zip(self.choices, cs)) + (0.) for cs in self.costs]

    def start(self):
        lo, hi = -30., 30.
        with torch.no_grad():
            for _ in range(40):
                t = (lo + hi) / 2
                for m in self.mixtures: m.logits.copy_(-t * torch.tensor(m.candidates, dtype=m.logits.dtype))
                over = any(float(e) > con.limit for e, con in zip(self.expected(), self.o.constraints))
                lo, hi = (t, hi) if over else (lo, t)

    def step(self, closure):
        o = self.o
        T = o.final_temperature ** (self.count / max(1, o.steps - 1))
        for m in self.all_mixtures: m.temperature = T
        params = self.weights + self.logits
        def backward():
            for p in params: p.grad = None
            loss = closure(); loss.backward()
            return float(loss.detach()), [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        rs = RandomState(params)
        loss, g = backward()
        nw = len(self.weights)
        index = {id(p): i for i, p in enumerate(params)}
        gp = [g[index[id(p)]] for p in self.perturb]
        norm = float(global_norm(gp))
        if o.sam:
            with perturbed(self.perturb, gp, ascent_scale(norm, self.rho) - o.alignment), preserve_buffers(self.gm), rs.replay():
                loss_p, ga = backward()
        else: loss_p, ga = loss, g
        cos = float(inner_product(g, ga) / (global_norm(g) * global_norm(ga)))
        grad = [(a + b) / 2 for a, b in zip(g, ga)]
        gap = max(0., loss_p - loss)
        sigma = curvature(gap, self.rho)
        rho_used = self.rho
        self.gap = gap if self.gap is None else o.smoothing * self.gap + (1 - o.smoothing) * gap
        self.rho = min(max(math.log1p(self.gap), o.rho_bounds[0]), o.rho_bounds[1])
        for k, m in enumerate(self.mixtures):
            p = m.probabilities().detach()
            s = -grad[nw + k] * T / p
            self.scores[k] += s; self.scores2[k] += s * s
        # complexity
        E = self.expected()
        viol = [(float(e) - con.limit) / ref for e, con, ref in zip(E, o.constraints, o.references)]
        price = sum(max(0., b + o.damping * v) * e / ref for b, v, e, ref in zip(self.beta, viol, E, o.references))
        gc = torch.autograd.grad(price, self.logits) if isinstance(price, Tensor) and price.requires_grad else [torch.zeros_like(z) for z in self.logits]
        for p, q in zip(params, grad): p.grad = q
        for z, q in zip(self.logits, gc): z.grad = z.grad + q
        self.weight_opt.step(); self.logit_opt.step()
        self.beta = [max(0., b + o.dual_lr * v) for b, v in zip(self.beta, viol)]
        self.count += 1
        return SearchStep(loss, loss_p, gap, rho_used, sigma, cos, tuple(float(e) / con.limit for e, con in zip(E, o.constraints)), tuple(self.beta), T)
