"""From the JSON files that the recipes write to the rows of a card."""

import re

_PTQ_NAME = re.compile(r"(cluster|uniform)-(per_[a-z]+)(\+scale)?-w([0-9.]+)(?:-a([2-8]))?(?:-(.+))?")
_FIGURES = ("model", "top1", "top5", "loss", "bytes", "bits_per_weight")  # of a row that a card shows


def ptq_models(record: dict, where: str = "ptq_results") -> list[dict]:
    """Rows of `ptq_results.json`, which `recipes/ptq.py` writes, as fields of [`ModelResult`].

    Bits that differ between layers are given by their mean.
    """
    rows = []
    for index, row in enumerate(_rows(record, where)):
        name = str(row.get("model"))
        match = _PTQ_NAME.fullmatch(name)
        if match is None and name != "float":
            raise ValueError(f"{where}.results[{index}].model is {name!r}: expected 'float' or '<method>-...-w<bits>'.")
        kind = {"method": "float", "bits": 32}
        if match:
            bits = float(match[4])
            kind = {"method": match[1], "granularity": granularity_in_words(match[2], bool(match[3]))}
            kind |= {"bits": int(bits) if bits.is_integer() else bits}
            kind |= {"activation_bits": int(match[5])} if match[5] else {}
            kind |= {"training": match[6].replace("_", " ")} if match[6] else {}
        figures = {key: row[key] for key in _FIGURES if key in row}
        rows.append(kind | {"images": record.get("images"), "seed": record.get("seed")} | figures)
    return rows


def granularity_in_words(granularity: str, channel_scale: bool) -> str:
    return granularity.replace("_", " ") + (" with channel scale" if channel_scale else "")


_QAT_NAME = re.compile(r"([1-8]) bit, packed")


def qat_models(record: dict, where: str = "qat_results") -> list[dict]:
    """Rows of `qat_results.json`, which `recipes/qat.py` writes, as fields of [`ModelResult`].

    The fused float model and the packed one; the others are the same models in another form.
    """
    config = record.get("quantization_config") or {}
    kind = {"method": config.get("method", "cluster"), "training": "QAT"}
    if config:
        kind["granularity"] = granularity_in_words(config["granularity"], config["channel_scale"])
        kind["activation_bits"] = config["activation_bits"]
    rows = []
    for row in _rows(record, where):
        name = str(row.get("model"))
        match = _QAT_NAME.fullmatch(name)
        if match is None and name != "float, fused":
            continue
        made = {"model": "float", "method": "float", "bits": 32}
        if match:
            made = {"model": f"{kind['method']}-qat-w{match[1]}", "bits": int(match[1])} | kind
        figures = {key: row[key] for key in ("images", *_FIGURES[2:]) if key in row}
        rows.append(made | figures | {"top1": row.get("accuracy"), "seed": record.get("seed")})
    return rows


def benchmark_latency(record: dict, where: str = "benchmark") -> list[dict]:
    """The medians in a file of `recipes/benchmark.py inference`, as fields of [`LatencyResult`]."""
    if record.get("benchmark") != "inference":
        raise ValueError(f"{where}.benchmark is {record.get('benchmark')!r}: give a file of `benchmark.py inference`.")
    engine = "PyTorch " + record["versions"]["torch"].split("+")[0]
    cpu = f"CPU ({record['cpu']}), {record['threads']} threads"
    device = cpu if record["device"] == "cpu" else record["device"]
    return [
        {"model": name, "engine": engine, "device": device, "setting": run["setting"], "median_ms": 1000 * seconds}
        for run in record["runs"]
        for name, seconds in run["medians"].items()
    ]


def _rows(record: dict, where: str) -> list[dict]:
    if not isinstance(record.get("results"), list):
        raise ValueError(f"{where} lacks the list 'results': give the JSON file that the recipe wrote.")
    return record["results"]


def merge_models(rows: list[dict]) -> list[dict]:
    """One row for a model that several files measured alike, as the float one is; other repetitions stay."""
    merged = {}
    for row in rows:
        key = (row.get("model"), row.get("seed"), row.get("top1"), row.get("bytes"))
        merged[key] = row | merged.get(key, {})
    return list(merged.values())
