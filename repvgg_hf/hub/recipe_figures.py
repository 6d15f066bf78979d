"""From the JSON files that the recipes write to the rows of a card."""

_FIGURES = ("top1", "top5", "loss", "bytes", "bits_per_weight", "images")  # of a row, that a card shows
_QUANTIZATION = ("method", "bits", "granularity", "channel_scale", "activation_bits")


def quantize_models(record: dict, where: str = "quantize_results") -> list[dict]:
    """The rows of `quantize_results.json`, which `recipes/quantize.py` writes, as fields of [`ModelResult`].

    Bits that differ between layers are given by their mean.
    """
    rows = []
    for place, row in _rows(record, where):
        kind = {"model": row.get("model")} | _quantization(row, place)
        if row["stage"] not in ("float", "quantized"):
            kind["training"] = row["stage"].replace("_", " ")
        rows.append(kind | {"images": record.get("images"), "seed": record.get("seed")} | _figures(row))
    return rows


def qat_models(record: dict, where: str = "qat_results") -> list[dict]:
    """The rows of `qat_results.json`, which `recipes/qat.py` writes, as fields of [`ModelResult`].

    Only the fused float model and the packed one are taken; the others are the same models in another form.
    """
    rows = []
    for place, row in _rows(record, where):
        kind = _quantization(row, place)
        if row["stage"] == "fused":
            kind |= {"model": "float"}
        elif row["stage"] == "packed":
            kind |= {"model": f"{kind['method']}-qat-w{kind['bits']}", "training": "QAT"}
        else:
            continue
        rows.append(kind | {"seed": record.get("seed")} | _figures(row))
    return rows


def benchmark_latency(record: dict, where: str = "benchmark") -> list[dict]:
    """The medians in a file that `recipes/benchmarks inference` wrote, as fields of [`LatencyResult`]."""
    if record.get("benchmark") != "inference" or not isinstance(record.get("runs"), list):
        raise ValueError(
            f"{where}.benchmark is {record.get('benchmark')!r}: give a file that `python -m "
            "repvgg_hf.recipes.benchmarks inference` wrote."
        )
    _require(record, {"versions": dict, "cpu": str, "threads": int, "device": str}, where)
    for index, run in enumerate(record["runs"]):
        _require(run, {"setting": str, "medians": dict}, f"{where}.runs[{index}]")
    engine = "PyTorch " + str(record["versions"].get("torch")).split("+")[0]
    cpu = f"CPU ({record['cpu']}), {record['threads']} threads"
    device = cpu if record["device"] == "cpu" else record["device"]
    return [
        {"model": name, "engine": engine, "device": device, "setting": run["setting"], "median_ms": 1000 * seconds}
        for run in record["runs"]
        for name, seconds in run["medians"].items()
    ]


def engine_results(record: dict, models: list[dict], where: str = "evaluation") -> list[dict]:
    """The engines in a file that `recipes/evaluate.py --engines` wrote, as fields of [`EngineResult`].

    The model is the one in `models`, fields of [`ModelResult`], that has as many bytes.
    """
    _require(record, {"engines": list, "bytes": int, "images": int, "cpu": str}, where)
    names = {row["model"] for row in models if row.get("bytes") == record["bytes"]}
    if len(names) != 1:
        known = ", ".join(f"{row['model']} ({row.get('bytes')} bytes)" for row in models)
        raise ValueError(
            f"{where} is of a checkpoint of {record['bytes']} bytes, and the models have {known}: give the "
            "evaluation of one of these."
        )
    threads = record.get("threads")
    device = record["cpu"] + ("" if threads is None else f", {threads} thread{'s' * (threads > 1)}")
    shared = {"model": names.pop(), "images": record["images"], "device": device}
    wanted = {"engine": str, "top1": float, "agreement": float, "near": float}
    for index, row in enumerate(record["engines"]):
        _require(row, wanted, f"{where}.engines[{index}]")
    return [
        shared | {name: row[name] for name in (*wanted, "file", "bytes", "milliseconds") if row.get(name) is not None}
        for row in record["engines"]
    ]


def command_of(record: dict, where: str) -> list[str]:
    """Return the command line that wrote a recipe's file."""
    _require(record, {"command": list}, where)
    return list(map(str, record["command"]))


def _require(record, kinds: dict[str, type], where: str) -> None:
    """Raise `ValueError` unless a `record`, which is called `where`, has fields of these `kinds`."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {record!r:.80}, not an object: give a file that this version's recipe wrote.")
    for name, kind in kinds.items():
        if name not in record:
            raise ValueError(f"{where} lacks {name!r}: give a file that this version's recipe wrote.")
        if not isinstance(record[name], kind):
            raise ValueError(
                f"{where}.{name} must be a {kind.__name__}, got {record[name]!r:.80}: give a file that this version's "
                "recipe wrote."
            )


def _quantization(row: dict, where: str) -> dict:
    """The fields of [`ModelResult`] that say how the model of a row is quantized."""
    _require(row, dict.fromkeys(_QUANTIZATION, object) | {"stage": str}, where)
    return {name: row[name] for name in _QUANTIZATION if row[name] is not None}


def _figures(row: dict) -> dict:
    return {name: row[name] for name in _FIGURES if name in row}


def _rows(record: dict, where: str) -> list[tuple[str, dict]]:
    """(where it is, row) of all results."""
    if not isinstance(record.get("results"), list):
        raise ValueError(f"{where} lacks the list 'results': give the JSON file that the recipe wrote.")
    rows = [(f"{where}.results[{index}]", row) for index, row in enumerate(record["results"])]
    for place, row in rows:
        _require(row, {}, place)
    return rows


def merge_models(rows: list[dict]) -> list[dict]:
    """One row for a model that several files measured alike, as the float one is; other repetitions stay."""
    merged = {}
    for row in rows:
        key = (row.get("model"), row.get("seed"), row.get("top1"), row.get("bytes"))
        merged[key] = row | merged.get(key, {})
    return list(merged.values())
