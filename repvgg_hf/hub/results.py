"""The figures that a model card shows: what was measured, checked field by field when it is read."""

import difflib
import json
import math
import os
import re
import types
import unicodedata
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Union, get_args, get_origin, get_type_hints

from ..runtime.quantization_methods import METHODS

FLOAT = "float"  # the method of a row whose weights are not quantized
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")  # of the Hub
GRANULARITIES = {"per_tensor": "per tensor", "per_channel": "per channel", "per_group": "per group"}


@dataclass
class DatasetInfo:
    """The data that accuracy was measured on.

    Args:
        name (`str`): what people call it.
        split (`str`): the part that was evaluated.
        hub_id (`str`, *optional*): its id on the Hub, if it is there; `.eval_results` is written only with it.
        revision (`str`, *optional*): its commit on the Hub.
        task_id (`str`, defaults to `"default"`): the evaluation, as the dataset's own `eval.yaml` calls it.
    """

    name: str
    split: str
    hub_id: str | None = None
    revision: str | None = None
    task_id: str = "default"


@dataclass
class ModelResult:
    """The measurement of one checkpoint.

    A quantized weight is a *code* of a few bits, which selects an entry of a *codebook*: a short table of values. A
    *channel scale* is one more factor for each output channel.

    Args:
        model (`str`): the name in tables; measurements of the same name with other seeds are averaged.
        method (`str`): `"float"`, or a method of quantization, `"cluster"` or `"uniform"`.
        bits (`float`): bits of a weight's code, their mean if layers differ; 32 for float.
        top1 (`float`): top-1 accuracy in percent.
        bytes (`int`): size of the weight files.
        bits_per_weight (`float`): stored bits per weight, with codes, codebooks and scales together.
        images (`int`): number of images that were evaluated.
        seed (`int`): seed of the training.
        granularity (`str`, *optional*): which weights share a codebook: `"per_tensor"`, `"per_channel"` or
            `"per_group"`; `None` for float.
        channel_scale (`bool`, defaults to `False`): whether each output channel has a scale beside its codebook.
        training (`str`, *optional*): how the quantized weights were found, such as `"QAT"`; `None` means without
            training.
        top5 (`float`, *optional*): top-5 accuracy in percent.
        loss (`float`, *optional*): mean cross-entropy in nats.
        activation_bits (`int`, *optional*): bits of the layers' inputs; `None` if they are float.
    """

    model: str
    method: str
    bits: float
    top1: float
    bytes: int
    bits_per_weight: float
    images: int
    seed: int
    granularity: str | None = None
    channel_scale: bool = False
    training: str | None = None
    top5: float | None = None
    loss: float | None = None
    activation_bits: int | None = None

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantized."""
        return self.method != FLOAT

    def validate(self, where: str) -> None:
        """Raise `ValueError` for a field, called `where` and its name, whose value is impossible."""
        if self.method not in (FLOAT, *METHODS):
            raise ValueError(f"{where}.method must be one of {', '.join((FLOAT, *METHODS))}, got {self.method!r}.")
        if self.bits != 32 and not 1 <= self.bits <= 8 or (self.bits != 32) != self.quantized:
            raise ValueError(f"{where}.bits must be 32 for float and 1 to 8 otherwise, got {self.bits}.")
        if self.granularity is not None and self.granularity not in GRANULARITIES:
            raise ValueError(
                f"{where}.granularity must be one of {', '.join(GRANULARITIES)}, or left out, got {self.granularity!r}."
            )
        if not self.quantized and (self.granularity is not None or self.channel_scale):
            raise ValueError(f"{where} is float and has no codebooks: leave out granularity and channel_scale.")
        for name in ("top1", "top5"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 100:
                raise ValueError(f"{where}.{name} must be a percentage from 0 to 100, got {value}.")
        if self.top5 is not None and self.top5 < self.top1:
            raise ValueError(f"{where}.top5 is {self.top5}, below top1 ({self.top1}): one is of another model.")
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 8:
            raise ValueError(f"{where}.activation_bits must be 2 to 8, or left out, got {self.activation_bits}.")
        for name in ("bytes", "bits_per_weight", "images"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{where}.{name} must be positive, got {getattr(self, name)}.")


@dataclass
class KernelResult:
    """The tails of one kernel: an entry of what [`~repvgg_hf.analysis.kernel_report`] returns."""

    name: str
    shape: list[int]
    std: float
    max_over_std: float
    kurtosis: float


@dataclass
class HistogramResult:
    """The distribution of the entries of a network's kernels: what [`~repvgg_hf.analysis.kernel_histogram`] returns.

    Args:
        name (`str`): the network and its form, such as `"OABN, fused"`.
        first (`int`): number of the first bin, which begins at `first * bin_width` standard deviations.
        bin_width (`float`): width of a bin in standard deviations.
        counts (`list[int]`): number of entries in each bin.
        largest (`float`): largest magnitude in standard deviations.
    """

    name: str
    first: int
    bin_width: float
    counts: list[int]
    largest: float

    def validate(self, where: str) -> None:
        """Raise `ValueError` for a field, called `where` and its name, whose value is impossible."""
        if self.bin_width <= 0:
            raise ValueError(f"{where}.bin_width must be positive, got {self.bin_width}.")
        if not any(self.counts) or min(self.counts) < 0:
            raise ValueError(f"{where}.counts must be numbers of entries, and not all 0, got {self.counts!r:.80}.")


@dataclass
class LatencyResult:
    """The time that one model takes: the median of several runs, in milliseconds."""

    model: str
    engine: str
    device: str
    setting: str
    median_ms: float

    def validate(self, where: str) -> None:
        """Raise `ValueError` for a time that is not positive."""
        if self.median_ms <= 0:
            raise ValueError(f"{where}.median_ms must be positive, got {self.median_ms}.")


@dataclass
class EngineResult:
    """The measurement of a model that an engine runs, against its simulation in PyTorch on the same images.

    Args:
        model (`str`): name of the model in `results.models`.
        engine (`str`): what ran it.
        top1 (`float`): top-1 accuracy in percent.
        agreement (`float`): share of the images in percent that have the same first class as in PyTorch.
        near (`float`): share in percent whose logits are within 1e-5 standard deviations of PyTorch's.
        images (`int`): number of images that were evaluated.
        file (`str`, *optional*): its file's path in the repository; `None` for an engine that takes the checkpoint.
        bytes (`int`, *optional*): size of the file.
        milliseconds (`float`, *optional*): median time of one image, without preparing it.
        device (`str`, *optional*): what it ran on.
    """

    model: str
    engine: str
    top1: float
    agreement: float
    near: float
    images: int
    file: str | None = None
    bytes: int | None = None
    milliseconds: float | None = None
    device: str | None = None

    def validate(self, where: str) -> None:
        """Raise `ValueError` for a field, called `where` and its name, whose value is impossible."""
        for name in ("top1", "agreement", "near"):
            if not 0 <= getattr(self, name) <= 100:
                raise ValueError(f"{where}.{name} must be a percentage from 0 to 100, got {getattr(self, name)}.")
        for name in ("images", "bytes", "milliseconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{where}.{name} must be positive, got {value}.")


@dataclass
class Results:
    """All that a card tells and that is not computed from the model itself.

    A *branch* is one of the linear maps that a block sums while it trains; fusing adds their kernels. The *dense*
    branch is the one as large as the fused kernel.

    Args:
        dataset ([`DatasetInfo`]): the data that accuracy was measured on.
        models (`list[ModelResult]`): the measurements, one for each model and seed.
        description (`str`): how the model was trained and calibrated, in a sentence or more.
        commands (`list[str]`): the commands that made the figures.
        kernels_before (`list[KernelResult]`): the tails of each block's dense kernel with its batch norm, before the
            other branches are added.
        kernels_after (`list[KernelResult]`): the tails of each fused kernel.
        histograms (`list[HistogramResult]`): how the entries of kernels are distributed, such as before and after
            fusing; for a figure.
        latency (`list[LatencyResult]`): times, if any were measured.
        engines (`list[EngineResult]`): what engines make of the models, if it was measured.

    Raises `ValueError` naming the field for a value of a wrong type or out of range.
    """

    dataset: DatasetInfo
    models: list[ModelResult]
    description: str = ""
    commands: list[str] = field(default_factory=list)
    kernels_before: list[KernelResult] = field(default_factory=list)
    kernels_after: list[KernelResult] = field(default_factory=list)
    histograms: list[HistogramResult] = field(default_factory=list)
    latency: list[LatencyResult] = field(default_factory=list)
    engines: list[EngineResult] = field(default_factory=list)

    def validate(self, where: str) -> None:
        """Raise `ValueError` for measurements that don't fit together."""
        if not self.models:
            raise ValueError(f"{where}.models is empty: give at least the measurement of the published model.")
        best = max(result.top1 for result in self.models)
        if 0 < best <= 1:
            raise ValueError(f"{where}: no top1 is above {best}: it looks like a fraction, give percent (0 to 100).")
        seen = set()
        for result in self.models:
            key = (result.model, result.seed)
            if key in seen:
                raise ValueError(f"{where}.models has {key[0]!r} with seed {key[1]} twice: keep one of them.")
            seen.add(key)
        known = list(dict.fromkeys(result.model for result in self.models))
        for index, row in enumerate(self.engines):
            if row.model not in known:
                raise ValueError(
                    f"{where}.engines[{index}].model is {row.model!r}, but {where}.models has only {', '.join(known)}."
                )
        names, widths = [{getattr(entry, key) for entry in self.histograms} for key in ("name", "bin_width")]
        if len(names) < len(self.histograms) or len(widths) > 1:
            raise ValueError(f"{where}.histograms must have different names and the same bin_width: count them anew.")

    def __post_init__(self):
        check(self, "results")

    @classmethod
    def from_dict(cls, values: dict) -> "Results":
        """Make results from JSON values.

        Raises `ValueError` naming the field for one that is missing, unknown, of a wrong type or out of range.
        """
        return build(cls, values, "results")

    @classmethod
    def from_json(cls, path: str | Path) -> "Results":
        """Read results from a file that `to_json` or an editor wrote; raises what `from_dict` raises."""
        return cls.from_dict(read_json(path))

    def to_json(self, path: str | Path) -> None:
        """Write the results into a file that `from_json` reads."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def select(self, model: str) -> list[ModelResult]:
        """Return the measurements of one model, one for each seed."""
        return [result for result in self.models if result.model == model]


def read_json(path: str | Path) -> dict:
    """Return the object in a JSON file. Raises `ValueError` if there is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no readable JSON file ({error}): give one that a recipe wrote.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not an object: give a file that a recipe wrote.")
    return values


def build(cls, values, where: str):
    """Make an instance of the dataclass `cls` from JSON values, with nothing left over and nothing missing.

    Raises `ValueError` naming the field; `where` is what the values are called in its message.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object with the fields of {cls.__name__}, got {values!r:.80}.")
    hints = get_type_hints(cls)
    unknown = [name for name in values if name not in hints]
    if unknown:
        similar = difflib.get_close_matches(unknown[0], hints, n=1)
        hint = f"did you mean {similar[0]!r}?" if similar else f"{cls.__name__} has {', '.join(hints)}."
        raise ValueError(f"{where} has an unknown field {unknown[0]!r}: {hint}")
    arguments = {}
    for name, value in values.items():
        hint = without_none(hints[name])
        item = (get_args(hint) or [None])[0]
        if is_dataclass(hint) and (value is not None or hint is hints[name]):
            value = build(hint, value, f"{where}.{name}")
        elif is_dataclass(item) and isinstance(value, list):
            value = [build(item, entry, f"{where}.{name}[{index}]") for index, entry in enumerate(value)]
        arguments[name] = value
    required = [entry.name for entry in fields(cls) if _is_required(entry)]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"{where} lacks {missing[0]!r}: {cls.__name__} needs {', '.join(required)}.")
    return cls(**arguments)


def without_none(hint):
    """Return `X` for `X | None`, and any other type as it is."""
    return get_args(hint)[0] if get_origin(hint) in (Union, types.UnionType) else hint


def _is_required(entry) -> bool:
    return repr(entry.default) == repr(entry.default_factory)  # both are the marker for "missing"


def check(instance, where: str) -> None:
    """Check types, finiteness and characters of all fields of a dataclass, and of those inside, then its own rules.

    Raises `ValueError` naming the field.
    """
    for name, hint in get_type_hints(type(instance)).items():
        value = getattr(instance, name)
        check_value(value, hint, f"{where}.{name}")
        for index, entry in enumerate(value if isinstance(value, list) else []):
            if is_dataclass(entry):
                check(entry, f"{where}.{name}[{index}]")
        if is_dataclass(value):
            check(value, f"{where}.{name}")
    if hasattr(instance, "validate"):
        instance.validate(where)


def check_value(value, hint, where: str) -> None:
    """Raise `ValueError` if `value`, the field called `where`, is not of the type `hint`, or not one of a card."""
    if value is None and without_none(hint) is not hint:
        return
    hint = without_none(hint)
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r:.80}.")
        for index, entry in enumerate(value):
            check_value(entry, get_args(hint)[0], f"{where}[{index}]")
        return
    accepted = (int, float) if hint is float else (hint,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):  # a bool is an int to Python
        raise ValueError(f"{where} must be {hint.__name__}, got {value!r:.80}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: a figure that could not be measured is left out, with its field.")
    if isinstance(value, str):
        check_text(value, where)


def check_text(text: str, where: str) -> None:
    """Raise `ValueError` for characters that neither YAML nor UTF-8 can hold, and for an access token."""
    if (secret := _TOKEN.search(text)) is not None:
        raise ValueError(
            f"{where} has what looks like an access token, {secret[0][:6]}..., and would be published: remove it, and "
            "revoke the token if others may have seen it."
        )
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t":
            raise ValueError(
                f"{where} has the character {character!r}, which a card can't hold: remove it from {text!r:.80}."
            )
