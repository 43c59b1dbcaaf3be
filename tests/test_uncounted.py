"""Arithmetic is never dropped silently: it is a layer, or it is listed, and its MACs count in the quantized share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from saq_fx.checkpoint import load, save
from saq_fx.graph import layers
from saq_fx.prepare import prepare_saq
from saq_fx.report import PrecisionReport, precision_report
from tests.test_prepare import assert_same_function as assert_same

V = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
LINEAR_MACS = 5 * 8 * 8
Body = Callable[["Around", Tensor], Tensor]


class Around(nn.Module):
    """A function of an activation between two linear layers."""

    def __init__(self, body: Body, **modules: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(8, 8))
        self.body = body
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.body(self, self.a(x)))


@torch.library.custom_op("saq_tests::scaled_product", mutates_args=())
def scaled_product(x: Tensor, weight: Tensor) -> Tensor:
    """An operation that torch knows nothing about."""
    return 2 * (x @ weight)


@pytest.mark.parametrize(
    ("norm", "macs"),
    [
        # u' W v: a product of a matrix and a vector, and one of two vectors
        (nn.utils.parametrizations.spectral_norm, 8 * 8 + 8),
        (nn.utils.parametrizations.weight_norm, 0),
    ],
)
def test_products_of_parametrizations_are_listed(norm: Any, macs: int) -> None:
    found = report(nn.Sequential(norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 8)))
    assert [row.macs for row in found.rows] == [LINEAR_MACS] * 2
    assert [name for name, _ in found.uncounted] == ["0.parametrizations.weight.0"] * (macs > 0)
    assert found.uncounted_macs == macs


def report(model: nn.Module, inputs: Any = V) -> PrecisionReport:
    gm = prepare_saq(model, example_inputs=inputs)
    gm(*inputs) if isinstance(inputs, tuple) else gm(inputs)
    return precision_report(gm)


# With the MACs for one sample, 0 where they are not known.
LISTED: dict[str, tuple[Body, int]] = {
    "mv": (lambda m, h: h + h.flatten(0, 1).mv(m.w[0]).sum(), 5 * 8),
    "dot": (lambda m, h: h + h[0, 0].dot(m.w[0]), 8),
    "vdot": (lambda m, h: h + torch.vdot(h[0, 0], m.w[0]), 8),
    "outer": (lambda m, h: h + h[0, 0].outer(m.w[0])[0], 0),
    "addbmm": (lambda m, h: h + torch.addbmm(h[0], h, m.w.expand(h.shape[0], 8, 8)), LINEAR_MACS),
    "addmv": (lambda m, h: h + torch.addmv(h[0, 0], m.w, m.w[1]), 64),
    "addmm_": (lambda m, h: h.flatten(0, 1).clone().addmm_(h.flatten(0, 1), m.w).view_as(h), LINEAR_MACS),
    "convolution": (
        lambda m, h: torch.convolution(h, m.w[:5, :5, None], None, [1], [0], [1], False, [0], 1),
        5 * 5 * 8,
    ),
    "aten_convolution": (
        lambda m, h: torch.ops.aten.convolution(h, m.w[:5, :5, None], None, [1], [0], [1], False, [0], 1),
        5 * 5 * 8,
    ),
    "conv_tbc": (lambda m, h: torch.conv_tbc(h, m.w[None], torch.zeros(8)), LINEAR_MACS),
    "matrix_power": (lambda m, h: h + torch.linalg.matrix_power(m.w * h[0, 0], 2)[0], 8 * 8 * 8),
    "matrix_exp": (lambda m, h: h + torch.matrix_exp(m.w * h[0, 0])[0], 0),
    "solve": (lambda m, h: h + torch.linalg.solve(torch.eye(8) + 0 * h[0, :1], m.w)[0], 0),
    "inv": (lambda m, h: h + torch.linalg.inv(torch.eye(8) + 0 * h[0, :1])[0], 0),
    "vecdot": (lambda m, h: h + torch.linalg.vecdot(h, m.w[0])[..., None], 0),
    "rfftn": (lambda m, h: torch.fft.irfftn(torch.fft.rfftn(h)), 0),
    "stft": (lambda m, h: h + torch.stft(h[0, 0], 8, window=torch.ones(8), return_complex=True).abs().sum(), 0),
    "cov": (lambda m, h: h + torch.cov(h[0]).sum(), 5 * 8 * 5),
    "deform_conv2d": (
        # Every weight of the kernel meets 3 x 6 places.
        lambda m, h: (
            h
            + deform_conv2d(
                h[:, None], torch.zeros(h.shape[0], 18, 3, 6), m.w[None, :1, :3, None].expand(2, 1, 3, 3)
            ).mean()
        ),
        2 * 3 * 6 * 9,
    ),
    "other_library": (lambda m, h: scaled_product(h, m.w), 0),
    "tensordot_of_sizes": (lambda m, h: torch.tensordot(h, m.w, ([h.dim() - 1], [1])), LINEAR_MACS),
    "tensordot_of_tensors": (lambda m, h: torch.tensordot(h, m.w, torch.tensor([[2], [1]])), LINEAR_MACS),
}


@pytest.mark.parametrize("name", LISTED)
def test_what_has_no_entry_is_listed_with_its_macs(name: str) -> None:
    body, macs = LISTED[name]
    found = report(Around(body))
    assert [row.name for row in found.rows] == ["a", "b"]
    assert found.uncounted
    assert found.uncounted_macs == macs
    assert found.quantized_share == pytest.approx(2 * LINEAR_MACS / (2 * LINEAR_MACS + macs))


ALONG_AXES: dict[str, Body] = {
    "inner": lambda m, h: h.inner(m.w),
    "tensordot": lambda m, h: torch.tensordot(h, m.w, 1),
    "tensordot_axes": lambda m, h: torch.tensordot(m.w, h, dims=([-1], [2])).permute(1, 2, 0),
    "tensordot_named": lambda m, h: torch.tensordot(a=h, b=m.w, dims=((2,), (1,)), out=None),
}


@pytest.mark.parametrize("name", ALONG_AXES)
@pytest.mark.parametrize("asks", [False, True])
def test_products_along_axes_are_layers(name: str, asks: bool) -> None:
    body = ALONG_AXES[name]
    model = Around(lambda m, h: body(m, h * 2 if asks and h.sum() < -1e9 else h))
    assert_same(model, prepare_saq(model, example_inputs=V, precision=None), V)
    found = report(model)
    assert [row.macs for row in found.rows] == 3 * [LINEAR_MACS]
    assert found.uncounted == ()


def test_overload_packets_are_layers() -> None:
    found = report(Around(lambda m, h: torch.ops.aten.mm(torch.ops.aten.linear(h, m.w).flatten(0, 1), m.w)))
    assert [(row.op, row.macs) for row in found.rows] == [
        ("linear", 320),
        ("linear", 320),
        ("mm", 320),
        ("linear", 320),
    ]
    assert found.uncounted == ()


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.1, self.training) @ v


class Calling(nn.Module):
    def products(self, q: Tensor) -> Tensor:
        return torch.bmm(q, q.mT)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(self.products(q), 0.1, self.training)[..., :1] * v


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(()) > 0.5) if self.training else x


def test_modules_without_parameters_that_multiply_are_followed() -> None:
    model = Around(lambda m, h: m.dropping(m.calling(*[m.attention(h, h, h)] * 3)))
    model.attention, model.calling, model.dropping = Attention(), Calling(), Dropping()
    gm = prepare_saq(model, example_inputs=V)
    names = ["a", "attention.matmul", "attention.matmul_1", "calling.bmm", "b"]
    assert [row.name for row in precision_report(gm).rows] == names
    assert any(node.target == "dropping" for node in gm.graph.nodes)
    gm.train()
    torch.manual_seed(0)
    first = gm(V)
    assert not torch.equal(first, gm(V))
    assert torch.equal(gm.eval()(V), gm(V))


class Pooling(nn.Module):
    """CLIP's pooling by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.c_proj = nn.Linear(8, 6)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        x = self.conv(x).flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x])
        pooled, _ = F.multi_head_attention_forward(
            query=x[:1], key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=2,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
            in_proj_weight=None, in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None, bias_v=None, add_zero_attn=self.zero, dropout_p=0.0, out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias, use_separate_proj_weight=True, training=self.training, need_weights=False,
        )  # fmt: skip
        return pooled.squeeze(0)

    zero = False


def test_functional_attention_is_opened() -> None:
    model, x = Pooling().eval(), torch.randn(2, 3, 6, 6)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert torch.allclose(gm(x), model(x), rtol=1e-6, atol=1e-6)
    found = report(model, x)
    assert [(row.name, row.macs) for row in found.rows] == [
        ("conv", 8 * 16 * 27),
        ("q_proj", 64),
        ("k_proj", 17 * 64),
        ("v_proj", 17 * 64),
        ("matmul", 17 * 8),
        ("matmul_1", 17 * 8),
        ("c_proj", 48),
    ]
    assert found.quantized_share == 1


def test_functional_attention_that_has_no_open_form_is_listed() -> None:
    model = Pooling()
    model.zero = True
    found = report(model, torch.randn(2, 3, 6, 6))
    ((name, _),) = found.uncounted
    assert name == "multi_head_attention_forward"
    assert found.uncounted_macs == 64 + 2 * 17 * 64 + 2 * 18 * 8 + 48


def test_layers_that_stay_float_lower_the_share() -> None:
    model = Around(lambda m, h: m.lstm(h)[0])
    model.lstm = nn.LSTM(8, 8, batch_first=True)
    found = report(model)
    assert found.uncounted_macs == 4 * 2 * LINEAR_MACS
    assert found.quantized_share == 2 / 10
    assert "20.0% of the MACs" in str(found)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_to_added_keys_is_quantized(options: dict[str, Any]) -> None:
    model = Around(lambda m, h: m.attention(h, h, h)[0])
    model.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    gm = prepare_saq(model, example_inputs=V, precision=None)
    assert_same(model, gm, V)
    found = report(model)
    assert found.uncounted == ()
    assert found.total_macs == 6 * LINEAR_MACS + 2 * 5 * 6 * 8


class Resized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, stride=2), nn.ConvTranspose2d(4, 3, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x)), output_size=x.shape[-2:])


def test_a_transposed_convolution_to_a_size_is_a_layer() -> None:
    model = Resized().eval()
    gm = prepare_saq(model, example_inputs=torch.randn(2, 3, 8, 8), precision=None)
    for size in (8, 9):
        x = torch.randn(1, 3, size, size)
        assert torch.equal(gm(x), model(x))
        assert gm(x).shape == x.shape
    assert [layer.macs for _, layer in layers(gm)] == [4 * 9 * 27, 4 * 9 * 27]


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.out = nn.Linear(8, 8), nn.Linear(8, 2)
        self.w = nn.Parameter(torch.randn(8, 8, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.fft.fft(self.lift(x))
        return self.out(torch.fft.ifft(torch.einsum("bij,jk->bik", h @ self.w, self.w)).real)


class Codes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(64, 8), nn.Linear(8, 2)
        self.register_buffer("strides", torch.tensor([1, 4, 16]))

    def forward(self, digits: Tensor) -> Tensor:
        return self.out(self.table(digits @ self.strides))


class Sparse(nn.Module):
    def __init__(self, explicit: bool) -> None:
        super().__init__()
        self.a, self.out, self.explicit = nn.Linear(8, 8), nn.Linear(8, 2), explicit
        self.register_buffer("adjacency", torch.eye(5).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out(torch.sparse.mm(self.adjacency, h) if self.explicit else self.adjacency @ h)


@pytest.mark.parametrize(
    ("model", "x", "rows", "kinds"),
    [
        (Fourier(), V, ["lift", "out"], {"complex64"}),
        (Codes(), torch.randint(0, 4, (2, 5, 3)), ["out"], {"int64"}),
        (Sparse(False), V[0], ["a", "out"], {"sparse_coo"}),
        (Sparse(True), V[0], ["a", "out"], set()),
    ],
    ids=["complex", "integer", "sparse", "sparse function"],
)
def test_operands_that_are_not_dense_real_numbers_stay_as_they_are(
    model: nn.Module, x: Tensor, rows: list[str], kinds: set[str], tmp_path: Any
) -> None:
    gm = prepare_saq(model, example_inputs=x)
    found = precision_report(gm)
    assert [row.name for row in found.rows] == rows
    assert found.uncounted
    reasons = {reason.removesuffix(" operands are not quantized") for _, reason in found.uncounted}
    assert {reason for reason in reasons if " " not in reason} == kinds
    gm(x).square().sum().backward()
    without = prepare_saq(model)
    assert torch.isfinite(without(x)).all()
    expected = gm.eval()(x)
    save(gm, tmp_path / "model.safetensors")
    assert torch.equal(load(model, tmp_path / "model.safetensors", example_inputs=x).eval()(x), expected)


class Branching(nn.Module):
    """Python code with layers, products of its own, and modules that no graph replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = h + 1 if h.sum() > 0 else h
        packed = nn.utils.rnn.pack_padded_sequence(h, [5] * len(h), batch_first=True)
        h = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]
        return self.b(torch.fft.fft(h).real + torch.addbmm(h[0], h, self.b.weight.expand(len(h), 8, 8)))


class Remembering(nn.Module):
    """A recurrent cell that Python code calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.cell = nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.cell(x if x.sum() > -1e9 else x.relu())[0]


def test_recurrent_cells_of_python_code_are_listed_as_elsewhere() -> None:
    gm = prepare_saq(Remembering(), example_inputs=torch.randn(2, 3, 4))
    assert precision_report(gm).uncounted == (("cell", "LSTM is not in the operator table; it stays in float"),)


def test_python_code_is_listed_with_what_it_multiplies_itself() -> None:
    model = Branching().eval()
    found = report(model)
    assert [(row.name, row.macs) for row in found.rows] == [("a", LINEAR_MACS), ("b", LINEAR_MACS)]
    assert {name for name, _ in found.uncounted} == {"fft_fft", "addbmm", "lstm"}
    # The example is taken whole: it has two samples.
    assert found.uncounted_macs in (LINEAR_MACS * 9, 2 * LINEAR_MACS * 9)


class Rotary(nn.Module):
    """The angles of its positions are the same whatever it is given."""

    def __init__(self, in_python: bool) -> None:
        super().__init__()
        self.layer, self.in_python = nn.Linear(8, 8), in_python
        self.register_buffer("frequencies", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        angles = (torch.arange(x.shape[1]).float()[:, None] @ self.frequencies[None]).repeat(1, 2)
        x = -x if self.in_python and x.sum() > 1e9 else x
        return self.layer(x * angles.cos() + x.roll(4, -1) * angles.sin())


@pytest.mark.parametrize(("in_python", "reason"), [(False, "operands are constants"), (True, "runs in Python")])
def test_products_of_constants_stay_in_float(in_python: bool, reason: str) -> None:
    found = report(Rotary(in_python))
    assert [row.name for row in found.rows] == ["layer"]
    ((name, why),) = found.uncounted
    assert name == "matmul"
    assert reason in why
    assert found.uncounted_macs == 5 * 4
