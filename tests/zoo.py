"""The one table of models that every pass is tested on. Nothing in the package knows them by name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


@dataclass(frozen=True)
class Entry:
    """A model, its inputs, and what its graph must show.

    `layers`: how many quantizable calls it makes; `opens_attention`: whether fused attention has to be opened.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    layers: int
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = field(default=())


def image(channels: int = 3, size: int = 16, batch: int = 2) -> Callable[[], Tensor]:
    """A batch of random images."""
    return lambda: torch.randn(batch, channels, size, size)


class Residual(nn.Module):
    """Convolutions, BatchNorm and a shortcut; the block is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.block(x) + x)
        x = torch.relu(self.block(x) + x)
        return self.head(x.mean((2, 3)))


class Convolutions(nn.Module):
    """Every kind of convolution: grouped, dilated, strided, transposed, non-square, other padding, 1-D and 3-D."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.dilated = nn.Conv2d(8, 8, (3, 5), padding=(2, 4), dilation=2, stride=(1, 2))
        self.reflecting = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(8, 8, 5, padding="same", dilation=1)
        self.transposed = nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1, groups=2)
        self.line = nn.Conv1d(4, 6, 3)
        self.line_back = nn.ConvTranspose1d(6, 4, 3)
        self.volume = nn.Conv3d(1, 2, 3, padding=1)
        self.volume_back = nn.ConvTranspose3d(2, 1, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.dilated(torch.relu(self.grouped(x))))
        x = self.transposed(F.gelu(self.same(F.gelu(self.reflecting(x)))))
        x = self.line_back(torch.relu(self.line(x.flatten(2))))
        return self.volume_back(self.volume(x[:, None, :, :16].unflatten(-1, (4, 4))))


class Attention(nn.Module):
    """Self and cross attention by `nn.MultiheadAttention`, with a mask, and fused attention by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.self_attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(16, 2, kdim=6, vdim=6, batch_first=True)
        self.packed = nn.Linear(16, 48)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.embed(x))
        y = y + self.self_attention(y, y, y, need_weights=False)[0]
        y = y + self.cross_attention(y, x, x)[0]
        query, key, value = self.packed(y).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        y = y + F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(y.mean(1))


class Products(nn.Module):
    """Every way to write a product: `@`, methods, `bmm`, `addmm`, `baddbmm`, `einsum`, a parameter on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(5, 4) / 2)
        self.right = nn.Parameter(torch.randn(6, 7) / 2)
        self.bias = nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(self.left, x).matmul(self.right)
        gram = y @ y.transpose(-2, -1)
        y = torch.bmm(gram, y) + torch.einsum("bij,bjk->bik", gram, y)
        y = torch.baddbmm(y, gram, y, beta=0.5)
        return torch.addmm(self.bias, y[:, 0], self.right.t() @ self.right)


class Tied(nn.Module):
    """An embedding whose table is the classifier's weight; a linear layer used under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.inner.weight
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.again(torch.relu(self.inner(self.embedding(tokens))))))


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose weight is standardised in forward."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Reparametrized(nn.Module):
    """Weights that are computed: standardised, weight-normalised, orthogonal."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.standardized = StandardizedConv2d(4, 4, 3)
        self.normalized = parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.normalized(torch.relu(self.standardized(torch.relu(self.stem(x))))))
        return self.head(x.amax((2, 3)))


class Branching(nn.Module):
    """Auxiliary head and dropouts in training only; several inputs, one optional, in and out as dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(6, 8)
        self.text = nn.Linear(4, 8)
        self.auxiliary = nn.Linear(8, 2)
        self.head = nn.Linear(8, 2)

    def forward(self, image: Tensor, text: dict[str, Tensor], scale: float | None = None) -> dict[str, Tensor]:
        x = torch.relu(self.image(image)) + torch.relu(self.text(text["tokens"]))
        x = F.dropout(x, 0.3, self.training)
        if scale is not None:
            x = x * scale
        result = {"logits": self.head(x)}
        if self.training:
            result["auxiliary"] = self.auxiliary(x)
        return result


class Recurrent(nn.Module):
    """A recurrent cell stays in float and is listed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.cell = nn.GRU(6, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.embed(x))[0][:, -1])


class ControlFlow(nn.Module):
    """Python control flow over sizes and values, and in-place operations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)])
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2 == 0:
            x = F.pad(x, (0, 1))
        for index in range(len(x)):
            if index < len(self.layers):
                x = F.relu_(self.layers[index](x))
        x = x.clone()
        x += 1.0
        if x.max() > 0:
            x = x * 2
        return self.head(x.mean((2, 3)))


ZOO: dict[str, Entry] = {
    "residual": Entry(Residual, image(), 4, ("stem",), ("head",)),
    "convolutions": Entry(Convolutions, lambda: torch.randn(2, 4, 9, 9), 9, ("grouped",), ("volume_back",)),
    "attention": Entry(Attention, lambda: torch.randn(2, 5, 6), 15, (), ("head",)),
    "products": Entry(Products, lambda: torch.randn(2, 4, 6), 8),
    "tied": Entry(Tied, lambda: torch.randint(11, (3, 4)), 3, ("inner",), ("head",)),
    "reparametrized": Entry(Reparametrized, image(), 4, ("stem",), ("head",)),
    "branching": Entry(
        Branching,
        lambda: {"image": torch.randn(3, 6), "text": {"tokens": torch.randn(3, 4)}},
        3,
        ("image", "text"),
        ("head",),
        ("auxiliary.linear_3",),
    ),
    "recurrent": Entry(Recurrent, lambda: torch.randn(2, 3, 4), 2, ("embed",), ("head",), ("cell",)),
    "control_flow": Entry(ControlFlow, image(), 3, ("layers.0",), ("head",)),
}
