"""The figures that a model card shows: what was measured, checked field by field when it is read."""

import json
import math
import os
import types
import unicodedata
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Union, get_args, get_origin, get_type_hints

METHODS = ("float", "uniform", "cluster")


@dataclass
class DatasetInfo:
    """What accuracy was measured on.

    Args:
        name: as people call it.
        split: the part that was evaluated.
        hub_id: of the dataset on the Hub, if it is there; `.eval_results` is written only with it.
        revision: the dataset's commit on the Hub.
        task_id: of the evaluation, as the dataset's own `eval.yaml` calls it.
    """

    name: str
    split: str
    hub_id: str | None = None
    revision: str | None = None
    task_id: str = "default"


@dataclass
class ModelResult:
    """One evaluated checkpoint.

    Args:
        model: its name in tables; measurements of the same name with other seeds are averaged.
        method: `"float"`, `"uniform"` or `"cluster"`.
        bits: of a weight's code, their mean if layers differ; 32 for float.
        top1: accuracy in percent.
        bytes: of its weight files.
        bits_per_weight: codes, codebooks and scales together.
        images: how many were evaluated.
        seed: of its training.
        granularity: which weights share a codebook.
        training: how the quantized weights were found, such as `"QAT"`; nothing means without training.
        top5: accuracy in percent.
        loss: mean cross-entropy in nats.
        activation_bits: of the layers' inputs; nothing if they are float.
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
    training: str | None = None
    top5: float | None = None
    loss: float | None = None
    activation_bits: int | None = None

    def validate(self, where: str) -> None:
        if self.method not in METHODS:
            raise ValueError(f"{where}.method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        if self.bits != 32 and not 1 <= self.bits <= 8 or (self.bits == 32) != (self.method == "float"):
            raise ValueError(f"{where}.bits must be 32 for float and 1 to 8 otherwise, got {self.bits}.")
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
    """How heavy the tails of one kernel are, as [`~repvgg_hf.analysis.kernel_report`] gives them."""

    name: str
    shape: list[int]
    std: float
    max_over_std: float
    kurtosis: float


@dataclass
class HistogramResult:
    """How the entries of a network's kernels are distributed, as [`~repvgg_hf.analysis.kernel_histogram`] counts them.

    Args:
        name: of the network, and of its form, such as `"OABN, fused"`.
        first: number of the first bin; it begins at `first * bin_width` standard deviations.
        bin_width: in standard deviations.
        counts: entries in each bin.
        largest: magnitude, in standard deviations.
    """

    name: str
    first: int
    bin_width: float
    counts: list[int]
    largest: float

    def validate(self, where: str) -> None:
        if self.bin_width <= 0:
            raise ValueError(f"{where}.bin_width must be positive, got {self.bin_width}.")
        if not any(self.counts) or min(self.counts) < 0:
            raise ValueError(f"{where}.counts must be numbers of entries, and not all 0, got {self.counts!r:.80}.")


@dataclass
class LatencyResult:
    """One timed model: the median of its times, in milliseconds."""

    model: str
    engine: str
    device: str
    setting: str
    median_ms: float

    def validate(self, where: str) -> None:
        if self.median_ms <= 0:
            raise ValueError(f"{where}.median_ms must be positive, got {self.median_ms}.")


@dataclass
class Results:
    """All that a card tells and that was not computed from the model itself.

    Args:
        dataset: what accuracy was measured on.
        models: measurements, a line each.
        description: how it was trained and calibrated, in a sentence or more.
        commands: that made the figures.
        kernels_before: figures of each block's dense kernel with its batch norm, before the other branches are added.
        kernels_after: figures of each fused kernel.
        histograms: how the entries of kernels are distributed, such as before and after fusing; for a figure.
        latency: times, if any were measured.
    """

    dataset: DatasetInfo
    models: list[ModelResult]
    description: str = ""
    commands: list[str] = field(default_factory=list)
    kernels_before: list[KernelResult] = field(default_factory=list)
    kernels_after: list[KernelResult] = field(default_factory=list)
    histograms: list[HistogramResult] = field(default_factory=list)
    latency: list[LatencyResult] = field(default_factory=list)

    def validate(self, where: str) -> None:
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
        names, widths = [{getattr(entry, key) for entry in self.histograms} for key in ("name", "bin_width")]
        if len(names) < len(self.histograms) or len(widths) > 1:
            raise ValueError(f"{where}.histograms must have different names and the same bin_width: count them anew.")

    def __post_init__(self):
        check(self, "results")

    @classmethod
    def from_dict(cls, values: dict) -> "Results":
        """Raises `ValueError` naming the field for one that is missing, unknown, of a wrong type or out of range."""
        return build(cls, values, "results")

    @classmethod
    def from_json(cls, path: str | Path) -> "Results":
        """As `from_dict`, from a file that `to_json` or an editor wrote."""
        return cls.from_dict(read_json(path))

    def to_json(self, path: str | Path) -> None:
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def select(self, model: str) -> list[ModelResult]:
        """The measurements of one model, a seed each."""
        return [result for result in self.models if result.model == model]


def read_json(path: str | Path) -> dict:
    """The object in a JSON file. Raises `ValueError` if there is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no readable JSON file ({error}): give one that a recipe wrote.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not an object: give a file that a recipe wrote.")
    return values


def build(cls, values, where: str):
    """An instance of a dataclass from JSON values, with nothing left over and nothing missing."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object with the fields of {cls.__name__}, got {values!r:.80}.")
    hints = get_type_hints(cls)
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise ValueError(f"{where} has an unknown field {unknown[0]!r}: {cls.__name__} has {', '.join(hints)}.")
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
    """`X` of `X | None`, and any other type as it is."""
    return get_args(hint)[0] if get_origin(hint) in (Union, types.UnionType) else hint


def _is_required(entry) -> bool:
    return repr(entry.default) == repr(entry.default_factory)  # both are the marker for "missing"


def check(instance, where: str) -> None:
    """Types, finiteness and characters of all fields of a dataclass, and of those inside, then its own rules."""
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
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise ValueError(f"{where} must be {hint.__name__}, got {value!r:.80}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: a figure that could not be measured is left out, with its field.")
    if isinstance(value, str):
        check_text(value, where)


def check_text(text: str, where: str) -> None:
    """Raise `ValueError` for characters that neither YAML nor UTF-8 can hold."""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t":
            raise ValueError(
                f"{where} has the character {character!r}, which a card can't hold: remove it from {text!r:.80}."
            )
