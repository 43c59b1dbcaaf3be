"""Prepares the models of torchvision, timm and transformers, and writes what worked to `docs/coverage.md`.

For each model: the way taken; the share of MACs that is quantized; whether the float graph equals the model bit for
bit, outputs and gradients in both modes, on the example inputs and on inputs of another shape where the model takes
them; whether a W4A4 forward and backward is finite; whether a deep copy, and a second model that loads the state dict,
compute the same; seconds of the whole check; what is left in float.

`python tools/zoo_coverage.py [--only NAME ...] [--largest PARAMETERS]`

Rows are kept in `benchmarks/coverage.json` as soon as they end. Models named by `--only` are checked again, of the
others those that have no row yet; the page is made of all rows that are there.
"""

import argparse
import copy
import gc
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from saq_fx import precision_report, prepare_saq
from saq_fx.errors import TracingError
from saq_fx.inputs import split_inputs
from saq_fx.precision import write_whole

Maker = Callable[[], tuple[nn.Module, Any]]
Row = dict[str, Any]
COLUMNS = (
    "way", "MACs quantized, %", "float graph", "other shape", "W4A4", "deepcopy", "state dict", "seconds",
    "left in float, or why not", "checked",
)  # fmt: skip
NAMES = 6  # in a list of what is left in float


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a nested output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [each for item in value for each in tensors(item)]
    return []


def run(module: nn.Module, inputs: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients of the sum of their squares, from a fixed random state."""
    module.zero_grad()
    args, kwargs = split_inputs(inputs)
    torch.manual_seed(1)
    outputs = [each for each in tensors(module(*args, **kwargs)) if each.is_floating_point()]
    losses = [each.square().sum() / max(1, each.numel()) for each in outputs if each.requires_grad]
    torch.stack(losses).sum().backward()
    return outputs, {name: each.grad for name, each in module.named_parameters() if each.grad is not None}


def equality(model: nn.Module, gm: nn.Module, inputs: Any) -> str:
    """'exact', or the largest relative difference of an output or gradient in either mode."""
    worst = max(difference(model.train(training), gm.train(training), inputs) for training in (False, True))
    return "exact" if worst == 0 else f"{worst:.1e}"


def difference(model: nn.Module, gm: nn.Module, inputs: Any) -> float:
    """The largest relative difference of an output or gradient."""
    expected, gradients = run(model, inputs)
    outputs, others = run(gm, inputs)
    pairs = [*zip(outputs, expected, strict=True), *((others[name], each) for name, each in gradients.items())]
    worst = 0.0
    for actual, wanted in pairs:
        if not torch.equal(actual, wanted):
            worst = max(worst, float((actual - wanted).norm() / wanted.norm().clamp_min(1e-30)))
    for each in (model, gm):
        each.zero_grad()  # the gradients of the largest models fit into memory for one mode only
    return worst


def resized(value: Any) -> Any:
    """Inputs of another shape: images 32 pixels higher, videos of twice the frames, sequences two tokens shorter."""
    if isinstance(value, Tensor):
        if value.dim() == 5:
            return torch.cat([value, value], 2)
        axis = -2 if value.dim() >= 3 else -1
        more = value.narrow(axis, 0, min(32, value.shape[axis]))
        return torch.cat([value, more], axis) if value.dim() >= 3 else value[:, :-2]
    if isinstance(value, dict):
        return {
            key: resized(each) if key not in ("boxes", "labels", "masks", "keypoints") else each
            for key, each in value.items()
        }
    return type(value)(resized(each) for each in value)


def other_shape(model: nn.Module, gm: nn.Module, inputs: Any) -> str:
    """As `equality`, on other shapes; "not taken" by the model itself, or "refused" by the graph's guards."""
    inputs = resized(inputs)
    before = copy.deepcopy(model.state_dict())
    try:
        for training in (False, True):
            run(model.train(training), inputs)
    except Exception:  # whatever a model does with inputs that are not for it
        return "not taken"
    model.load_state_dict(before)
    try:
        return equality(model, gm, inputs)
    except TracingError:
        return "refused"


def check(make: Maker) -> Row:
    """One row of the table."""
    start = time.perf_counter()
    try:
        row = {**check_float(make), **check_quantized(make)}
    except Exception as error:  # a row that says so, whatever it is
        reason = str(error).replace("\n", " ").replace("|", "/")
        row = {"way": "failed", "left in float, or why not": reason[:200]}
    return {**row, "seconds": round(time.perf_counter() - start, 1), "checked": str(date.today())}


def check_float(make: Maker) -> Row:
    """Whether the float graph is the model."""
    torch.manual_seed(0)
    model, inputs = make()
    gm = prepare_saq(model, example_inputs=inputs, precision=None)
    return {"float graph": equality(model, gm, inputs), "other shape": other_shape(model, gm, inputs)}


def check_quantized(make: Maker) -> Row:
    """How much of the model is quantized, and what can be done with it then."""
    torch.manual_seed(0)
    model, inputs = make()
    gm = prepare_saq(model, example_inputs=inputs)
    del model  # the largest ones do not fit into memory as often as would be needed
    report = precision_report(gm)
    outputs, gradients = run(gm.train(), inputs)
    finite = all(bool(torch.isfinite(each).all()) for each in (*outputs, *gradients.values()))
    expected = run(gm.eval(), inputs)[0]
    gm.zero_grad()
    del gradients
    copied = copy.deepcopy(gm)
    copies = same_outputs(run(copied, inputs)[0], expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1)
    copied.load_state_dict(gm.state_dict())
    return {
        "way": report.tracing,
        "MACs quantized, %": f"{100 * report.quantized_share:.1f}",
        "W4A4": "finite" if finite else "not finite",
        "deepcopy": copies,
        "state dict": same_outputs(run(copied, inputs)[0], expected),
        "left in float, or why not": by_reason(report.uncounted),
    }


def by_reason(operations: Iterable[tuple[str, str]]) -> str:
    """Names and reasons; of many for the same reason, the first names."""
    names: dict[str, list[str]] = {}
    for name, reason in operations:
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{listed(found)}: {reason}" for reason, found in names.items())


def listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more


def same_outputs(outputs: list[Tensor], expected: list[Tensor]) -> str:
    equal = all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
    return "equal" if equal else "differs"


def image_model(make: Callable[[], nn.Module], *shape: int) -> Maker:
    return lambda: (make(), torch.randn(shape))


def torchvision_models() -> Iterator[tuple[str, Maker]]:
    sizes = {"maxvit_t": 224, "inception_v3": 299}
    for module in (torchvision.models, torchvision.models.segmentation, torchvision.models.video):
        for name in torchvision.models.list_models(module=module):
            options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            if module is torchvision.models.segmentation:
                options["weights_backbone"] = None
            size = sizes.get(name, 224 if name.startswith(("vit", "mvit", "s3d")) else 64)
            shape = (1, 3, 16, size, size) if module is torchvision.models.video else (2, 3, size, size)
            yield (
                name,
                image_model(lambda n=name, o=options: torchvision.models.get_model(n, weights=None, **o), *shape),
            )
    for name in torchvision.models.list_models(module=torchvision.models.detection):
        yield name, lambda name=name: detector(name)


def detector(name: str) -> tuple[nn.Module, Any]:
    """A detection model, and two images of different sizes with what is to be found in them."""
    sizes = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 160}
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **sizes)
    images = [torch.rand(3, 96, 128), torch.rand(3, 112, 96)]
    targets = []
    for image in images:
        target = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]), "labels": torch.tensor([1])}
        if name.startswith("mask"):
            target["masks"] = torch.ones(1, *image.shape[1:], dtype=torch.uint8)
        if name.startswith("keypoint"):
            target["keypoints"] = torch.rand(1, 17, 3) * 50 + 8
        targets.append(target)
    return model, (images, targets)


def smallest_of_each_timm_family() -> Iterator[tuple[str, Maker]]:
    for family in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=family):
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    sizes[name] = sum(each.numel() for each in timm.create_model(name).parameters())
                except (RuntimeError, NotImplementedError, AssertionError, TypeError):
                    continue
        if sizes:
            yield f"timm {min(sizes, key=sizes.__getitem__)}", timm_model(min(sizes, key=sizes.__getitem__))


def timm_model(name: str) -> Maker:
    def make() -> tuple[nn.Module, Any]:
        model = timm.create_model(name, pretrained=False)
        return model, torch.randn(2, *model.default_cfg["input_size"])

    return make


def transformers_models() -> Iterator[tuple[str, Maker]]:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    words, images = {**small, "vocab_size": 100}, {**small, "image_size": 32, "patch_size": 8}
    tokens = {"input_ids": torch.randint(5, 100, (2, 9))}
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    t5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 100}
    opt = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    }
    swin = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    switch = {"num_decoder_layers": 2, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    moe = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4}
    grouped = {**words, "num_key_value_heads": 2, "use_cache": False}
    bart = {
        **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 100, "use_cache": False},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    }
    sounds = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": tokens["input_ids"]}
    spectrogram = {"input_values": torch.randn(2, 32, 16)}
    series = {"num_input_channels": 2, "context_length": 16, "prediction_length": 4, "patch_length": 4, "d_model": 32}
    hiera = {"embed_dim": 16, "image_size": [64, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    clip = {"text_config": {**words, "eos_token_id": 2}, "vision_config": images, "projection_dim": 16}
    segformer = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
    distil = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 100}
    both = {**tokens, "decoder_input_ids": tokens["input_ids"]}
    table: list[tuple[str, str, dict[str, Any], dict[str, Tensor]]] = [
        ("Bert", "ForSequenceClassification", words, tokens),
        ("DistilBert", "ForSequenceClassification", distil, tokens),
        ("Roberta", "ForSequenceClassification", words, tokens),
        ("Electra", "ForSequenceClassification", {**words, "embedding_size": 32}, tokens),
        ("GPT2", "LMHeadModel", gpt2, tokens),
        ("Llama", "ForCausalLM", words, tokens),
        ("Qwen2", "ForCausalLM", {**words, "num_key_value_heads": 2}, tokens),
        ("OPT", "ForCausalLM", {**opt, "vocab_size": 100}, tokens),
        ("T5", "ForConditionalGeneration", t5, both),
        ("SwitchTransformers", "ForConditionalGeneration", {**t5, **switch}, both),
        ("Mixtral", "ForCausalLM", {**grouped, "num_local_experts": 4}, tokens),
        ("Qwen2Moe", "ForCausalLM", {**grouped, **moe}, tokens),
        (
            "Deberta",
            "ForSequenceClassification",
            {**words, "relative_attention": True, "pos_att_type": ["c2p"]},
            tokens,
        ),
        ("ViT", "ForImageClassification", images, pixels),
        ("DeiT", "ForImageClassification", images, pixels),
        ("Swin", "ForImageClassification", swin, pixels),
        ("Segformer", "ForSemanticSegmentation", segformer, {"pixel_values": torch.randn(2, 3, 64, 64)}),
        ("Albert", "ForSequenceClassification", {**words, "embedding_size": 32}, tokens),
        ("MPNet", "ForSequenceClassification", words, tokens),
        ("GPTNeoX", "ForCausalLM", {**words, "use_cache": False}, tokens),
        ("Gemma2", "ForCausalLM", {**grouped, "head_dim": 16}, tokens),
        ("Phi", "ForCausalLM", {**words, "use_cache": False}, tokens),
        ("Bloom", "ForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100}, tokens),
        ("Mamba", "ForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100}, tokens),
        ("Bart", "Model", bart, both),
        ("Whisper", "Model", {**bart, "num_mel_bins": 8, "max_source_positions": 20}, sounds),
        ("AST", "Model", {**small, "patch_size": 8, "num_mel_bins": 16, "max_length": 32}, spectrogram),
        ("PatchTST", "ForPrediction", series, {"past_values": torch.randn(2, 16, 2)}),
        ("Beit", "ForImageClassification", {**images, "use_relative_position_bias": True}, pixels),
        ("Dinov2", "Model", {**small, "image_size": 32, "patch_size": 8}, pixels),
        ("Hiera", "Model", hiera, {"pixel_values": torch.randn(2, 3, 64, 64)}),
        ("VideoMAE", "Model", {**images, "num_frames": 4}, {"pixel_values": torch.randn(2, 4, 3, 32, 32)}),
        ("CLIP", "Model", clip, {**tokens, **pixels}),
    ]
    for family, head, options, inputs in table:
        config = getattr(transformers, f"{family}Config")
        model = getattr(transformers, f"{family}{head}")
        yield f"hf {family}", lambda m=model, c=config, o=options, i=inputs: (m(c(**o)), i)


def parameters(name: str, make: Maker) -> int:
    """How many a model has, without building it."""
    if name in torchvision.models.list_models():
        return int(torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])
    with torch.device("meta"):
        return sum(each.numel() for each in make()[0].parameters())


def page(rows: dict[str, Row], missing: list[str]) -> str:
    """The rows as a markdown page."""
    prepared = [row for row in rows.values() if row["way"] != "failed"]
    exact = sum(row["float graph"] == "exact" for row in prepared)
    lines = [("model", *COLUMNS), ["---"] * (len(COLUMNS) + 1)]
    lines += [[name, *(row.get(column, "") for column in COLUMNS)] for name, row in rows.items()]
    # Not padded to equal widths: the longest cell is a hundred times as long as most.
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    return f"""# Which models are covered

Written by `tools/zoo_coverage.py` on a CPU, in several runs, besides other work (torch {torch.__version__}, torchvision
{torchvision.__version__}, timm {timm.__version__}, transformers {transformers.__version__}).

{len(prepared)} of {len(rows)} models are prepared; the float graph of {exact} equals the model bit for bit, outputs in
both modes and gradients. On inputs of another shape, some models do not run (not taken), others take another path
through their code, which a guard of the graph turns into an error (refused). Seconds are of the whole check. A row
is of the code as it was when it was checked; not all were checked again after later changes.

{table}

Not tried: {", ".join(missing) or "none"}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/coverage.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/coverage.md"))
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--largest", type=float, default=1e9, help="parameters of the largest model that is tried")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found: dict[str, Row] = json.loads(options.rows.read_text()) if options.rows.exists() else {}
    rows, missing = {}, []
    for source in (torchvision_models, smallest_of_each_timm_family, transformers_models):
        for name, make in source():
            wanted = name in options.only if options.only else name not in found
            if wanted and parameters(name, make) <= options.largest:
                found[name] = check(make)
                print(name, *found[name].values(), flush=True)
                write_whole(options.rows, f"{json.dumps(found, indent=1)}\n".encode())
                gc.collect()
            if name in found:
                rows[name] = found[name]
            else:
                missing.append(name)
    write_whole(options.page, page(rows, missing).encode())


if __name__ == "__main__":
    main()
