"""From the JSON files that the recipes write to the rows of a card."""

import re

_PTQ_NAME = re.compile(r"(cluster|uniform)-(per_[a-z]+)(\+scale)?-w([1-8])(?:-(.+))?")


def ptq_models(record: dict, where: str = "ptq_results") -> list[dict]:
    """Rows of `ptq_results.json`, which `recipes/ptq.py` writes, as fields of [`ModelResult`]."""
    rows = []
    for index, row in enumerate(_rows(record, where)):
        name = str(row.get("model"))
        match = _PTQ_NAME.fullmatch(name)
        if match is None and name != "float":
            raise ValueError(f"{where}.results[{index}].model is {name!r}: expected 'float' or '<method>-...-w<bits>'.")
        kind = {"method": "float", "bits": 32}
        if match:
            scale = " with channel scale" if match[3] else ""
            kind = {"method": match[1], "bits": int(match[4]), "granularity": match[2].replace("_", " ") + scale}
            kind |= {"training": match[5]} if match[5] else {}
        rows.append(kind | {"images": record.get("images"), "seed": record.get("seed")} | row)
    return rows


_QAT_NAME = re.compile(r"([1-8]) bit, packed")


def qat_models(record: dict, where: str = "qat_results") -> list[dict]:
    """Rows of `qat_results.json`, which `recipes/qat.py` writes, as fields of [`ModelResult`].

    The fused float model and the packed one; the others are the same models in another form.
    """
    rows = []
    for row in _rows(record, where):
        name = str(row.get("model"))
        match = _QAT_NAME.fullmatch(name)
        if match is None and name != "float, fused":
            continue
        kind = {"model": "float", "method": "float", "bits": 32}
        if match:
            kind = {"model": f"cluster-qat-w{match[1]}", "method": "cluster", "bits": int(match[1]), "training": "QAT"}
        figures = {name: row[name] for name in ("images", "bytes", "bits_per_weight") if name in row}
        rows.append(kind | figures | {"top1": row.get("accuracy"), "seed": record.get("seed")})
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
