"""Hashes of what the package computes, to prove that a change which moves code changes no result.

    python tests/fingerprints.py before.json                 # with the old code
    python tests/fingerprints.py after.json                  # with the new code, on the same machine
    python tests/fingerprints.py --compare before.json after.json

Every case is a model and a way to quantize or train it. Its hashes are of the codes, codebooks, scales, biases and
input ranges that come out, and of the logits. The last digits of sums depend on the machine, so no hash is committed.
"""

import copy
import hashlib
import itertools
import json
import sys
from pathlib import Path

import torch

from repvgg_hf import (
    CalibrationConfig,
    QATConfig,
    RepVGGBackbone,
    RepVGGConfig,
    RepVGGForImageClassification,
    update_codebooks,
)

SIZES = {"stem_hidden_size": 8, "hidden_sizes": [16, 24], "depths": [2, 2], "strides": [2, 2], "num_labels": 8}
CLASSIFIER = RepVGGForImageClassification
MODELS = {
    "oabn": (CLASSIFIER, {}),
    "bn": (CLASSIFIER, {"oabn": False}),
    "grouped": (
        CLASSIFIER,
        {"groups": 2, "use_squeeze_excitation": True, "squeeze_ratio": 2, "block_branches": ["3x3", "1x3", "1x1"]},
    ),
    "fused": (CLASSIFIER, {"deploy": True}),
    "backbone": (RepVGGBackbone, {"out_features": ["stage1", "stage2"]}),
}


def make_model(name: str):
    """A model with trained-looking weights: batch norms that scale, shift and have statistics."""
    model_class, options = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = model_class(RepVGGConfig(**SIZES | options))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            count = module.num_features
            module.weight.data = 1 + 0.5 * torch.randn(count, generator=generator)
            module.bias.data = 0.1 * torch.randn(count, generator=generator)
            module.running_mean = 0.1 * torch.randn(count, generator=generator)
            module.running_var = 0.2 + torch.rand(count, generator=generator)
    return model.eval()


def images(count: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def outputs(model, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(pixel_values)
    return found.logits if "logits" in found else found.feature_maps[-1]


def digest(*tensors: torch.Tensor) -> str:
    """A short hash of dtypes, shapes and values."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().numpy().tobytes())  # in row-major order, however it lies in memory
    return state.hexdigest()[:16]


def fingerprint(model) -> dict[str, str]:
    """Hashes of a model's tensors by kind, and of its outputs."""
    kinds = {}
    for name, tensor in model.state_dict().items():
        kinds.setdefault(name.rpartition(".")[2], []).append(tensor)
    return {kind: digest(*tensors) for kind, tensors in kinds.items()} | {"outputs": digest(outputs(model, images(4)))}


# options of quantize() without data, by name
PLAIN = {
    f"{method} {granularity} w{bits}": {"method": method, "bits": bits, "granularity": granularity}
    for method, granularity, bits in itertools.product(
        ("cluster", "uniform"), ("per_tensor", "per_channel"), (8, 6, 4, 3, 2, 1)
    )
}
PLAIN |= {
    f"{method} w{bits} {', '.join(f'{key}={value}' for key, value in options.items())}": options
    | {"method": method, "bits": bits}
    for method, bits, options in [
        *(("cluster", bits, {"granularity": "per_group", "group_size": 8}) for bits in (4, 2)),
        *(("cluster", bits, {"granularity": "per_group", "group_size": 8, "channel_scale": True}) for bits in (4, 1)),
        *(("cluster", bits, {"codebook_dtype": "float32"}) for bits in (4, 2)),
        *(("cluster", bits, {"codebook_dtype": "int8"}) for bits in (8, 6, 4, 2, 1)),
        *(("cluster", bits, {"codebook_dtype": "int8", "granularity": "per_channel"}) for bits in (8, 4, 2)),
        *(("cluster", bits, {"channel_scale": False}) for bits in (4, 2)),
        *(("cluster", bits, {"symmetric": True}) for bits in (4, 2)),
        *(("cluster", bits, {"preserve_zero": True}) for bits in (4, 2)),
        *(("uniform", bits, {"channel_scale": True}) for bits in (8, 4, 2, 1)),
        *(("uniform", bits, {"channel_scale": True, "codebook_dtype": "int8"}) for bits in (8, 4)),
        *(("uniform", bits, {"symmetric": False}) for bits in (8, 4, 1)),
        *(("uniform", bits, {"symmetric": False, "granularity": "per_channel"}) for bits in (4, 2)),
        *(("uniform", bits, {"range_method": "minmax"}) for bits in (8, 4)),
        ("uniform", 4, {"range_method": "minmax", "granularity": "per_channel"}),
        ("uniform", 4, {"granularity": "per_group", "group_size": 8}),
        ("cluster", 4, {"bits_overrides": {"classifier": 8, "encoder.stages.0": 2}}),
        ("cluster", 4, {"modules_to_not_convert": ["classifier", "embeddings"]}),
    ]
}
# (options of quantize(), how it calibrates)
CALIBRATED = {
    "w4": ({"bits": 4}, {}),
    "w2": ({"bits": 2}, {}),
    "w2 per channel": ({"bits": 2, "granularity": "per_channel"}, {}),
    "w3 int8": ({"bits": 3, "codebook_dtype": "int8"}, {}),
    "w4 uniform per channel": ({"bits": 4, "method": "uniform", "granularity": "per_channel"}, {}),
    "w4 uniform": ({"bits": 4, "method": "uniform"}, {}),
    "w3 fisher": ({"bits": 3}, {"sensitivity": "fisher", "error_compensation": False}),
    "w3 second moment": ({"bits": 3}, {"sensitivity": "second_moment", "error_compensation": False}),
    "w3 no compensation": ({"bits": 3}, {"error_compensation": False}),
    "w3 no bias correction": ({"bits": 3}, {"bias_correction": False}),
    "w3 on disk": ({"bits": 3}, {"activation_memory": 0.0}),
    "w2 tuned": ({"bits": 2, "granularity": "per_channel"}, {"tuning_steps": 5}),
    "w1 tuned by default": ({"bits": 1}, {}),
    "mixed": ({"granularity": "per_tensor"}, {"target_bits_per_weight": 4.5}),
    "w4a8": ({"bits": 4, "activation_bits": 8}, {}),
    "w4a8 int8": ({"bits": 4, "activation_bits": 8, "codebook_dtype": "int8"}, {}),
    "w4a8 minmax": ({"bits": 4, "activation_bits": 8}, {"activation_range": "minmax"}),
    "w4a8 percentile": ({"bits": 4, "activation_bits": 8}, {"activation_range": "percentile"}),
    "w4a8 entropy": ({"bits": 4, "activation_bits": 8}, {"activation_range": "entropy"}),
    "w4a4, not tuned": ({"bits": 4, "activation_bits": 4}, {}),
}
# (options of prepare_qat(), how it trains)
TRAINED = {
    "w4": ({"bits": 4}, {}),
    "w2 per channel": ({"bits": 2, "granularity": "per_channel"}, {}),
    "w1 blended": ({"bits": 1}, {"blend_steps": 4}),
    "w3 every 2 steps": ({"bits": 3}, {"codebook_update_every": 2, "codebook_momentum": 0.5}),
    "w3 int8": ({"bits": 3, "codebook_dtype": "int8"}, {"codebook_update_every": 1}),
    "w4 gradient": ({"bits": 4}, {"codebook_update": "gradient"}),
    "w4 both": ({"bits": 4, "granularity": "per_channel"}, {"codebook_update": "both", "codebook_update_every": 1}),
    "w4 uniform": ({"bits": 4, "method": "uniform"}, {}),
    "w3 uniform per channel": ({"bits": 3, "method": "uniform", "granularity": "per_channel"}, {}),
    "w4 uniform affine": ({"bits": 4, "method": "uniform", "symmetric": False}, {}),
    "w1 uniform scale": ({"bits": 1, "method": "uniform", "channel_scale": True}, {}),
    "w4a8": ({"bits": 4, "activation_bits": 8}, {}),
    "w4a8 moving average": ({"bits": 4, "activation_bits": 8}, {"activation_update": "moving_average"}),
    "w2 frozen": ({"bits": 2}, {"freeze_threshold": 0.02}),
    "w4 statistics": ({"bits": 4}, {"batch_norm_every": 2}),
}


def quantize(model, options: dict, calibration: dict | None = None):
    if calibration is None:
        return model.quantize(**options)
    return model.quantize(**options, calibration=images(), calibration_config=CalibrationConfig(**calibration))


def prepare_qat(model, options: dict, training: dict):
    data = {"calibration": images()} if "activation_bits" in options else {}
    return model.prepare_qat(**options, qat_config=QATConfig(**training), **data)


def train(model, steps: int = 6) -> None:
    """Some steps of SGD on noise with labels."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    labels = torch.arange(8) % SIZES["num_labels"]
    model.train()
    for step in range(steps):
        loss = model(images(8, seed=step), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_codebooks(model)


def trained(name: str, options: dict, training: dict) -> dict[str, str]:
    model = prepare_qat(make_model(name), options, training)
    train(model)
    before = {f"trained {kind}": value for kind, value in fingerprint(model).items()}
    return before | fingerprint(model.quantize())


def float_training(name: str) -> dict[str, str]:
    model = make_model(name)
    train(model, steps=20)
    return fingerprint(model)


def cases() -> dict:
    """A function that computes the hashes of each case, by its name."""
    found = {f"float, {name}": lambda name=name: fingerprint(make_model(name)) for name in MODELS}
    found |= {f"float training, {name}": lambda name=name: float_training(name) for name in ("oabn", "bn", "grouped")}
    found |= {f"fused, {name}": lambda name=name: fingerprint(make_model(name).reparameterize()) for name in MODELS}
    for name in MODELS:
        chosen = PLAIN if name == "oabn" else dict(itertools.islice(PLAIN.items(), 2, None, 5))
        for case, options in chosen.items():
            found[f"{name}, {case}"] = lambda name=name, options=options: fingerprint(
                quantize(make_model(name), copy.deepcopy(options))
            )
    for name, chosen in {"oabn": CALIBRATED, "grouped": dict(itertools.islice(CALIBRATED.items(), 3))}.items():
        for case, (options, how) in chosen.items():
            found[f"{name}, calibrated {case}"] = lambda name=name, options=options, how=how: fingerprint(
                quantize(make_model(name), options, how)
            )
    found["backbone, calibrated w4"] = lambda: fingerprint(quantize(make_model("backbone"), {"bits": 4}, {}))
    for name in ("oabn", "fused", "grouped"):
        chosen = TRAINED if name == "oabn" else dict(itertools.islice(TRAINED.items(), 0, None, 4))
        for case, (options, how) in chosen.items():
            found[f"{name}, trained {case}"] = lambda name=name, options=options, how=how: trained(name, options, how)
    return found


def compare(before: dict, after: dict) -> list[str]:
    """A line for every case that differs."""
    lines = []
    for case in sorted(before.keys() | after.keys()):
        if case not in after or case not in before:
            lines.append(f"{case}: only {'before' if case in before else 'after'}")
            continue
        old, new = before[case], after[case]
        differing = [kind for kind in sorted(old.keys() | new.keys()) if old.get(kind) != new.get(kind)]
        if differing:
            lines.append(f"{case}: {', '.join(differing)}")
    return lines


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--compare"]:
        before, after = (json.loads(Path(path).read_text()) for path in arguments[1:])
        lines = compare(before, after)
        print("\n".join([*lines, f"{len(lines)} of {len(before.keys() | after.keys())} cases differ"]))
        return
    torch.set_num_threads(1)
    results = {}
    for case, run in cases().items():
        try:
            results[case] = run()
        except (TypeError, ValueError) as error:  # an option that there is no more
            results[case] = {"error": f"{type(error).__name__}: {error}"}
    Path(arguments[0]).write_text(json.dumps(results, indent=1) + "\n")
    print(f"{len(results)} cases, {sum('error' in hashes for hashes in results.values())} with errors")


if __name__ == "__main__":
    main(sys.argv[1:])
