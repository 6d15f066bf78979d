"""What a sweep of quantized models comes to: a table, which of them is recommended and why, and what to do next."""

import math
import shlex

from repvgg_hf.analysis.uncertainty import MOST, PairedDrop, recommend, wilson_interval

WASTEFUL = 1.25  # stored bits per weight, as a multiple of the code's bits, from which codebooks weigh too much


def accuracy_fields(right: list[bool], of_float: list[bool]) -> dict:
    """Return the fields of a row of results that tell how sure its top-1 is, and the images lost and won to float.

    Args:
        right: whether the model is right, for each image.
        of_float: the same of the float model.
    """
    drop = PairedDrop.of(of_float, right)
    interval = wilson_interval(sum(right), len(right))
    return {"top1_interval": interval, "images_lost": drop.lost, "images_won": drop.won}


def drop_of(row: dict, images: int) -> PairedDrop:
    """Return how a row of results compares with float on the same images."""
    return PairedDrop(images, row["images_lost"], row["images_won"])


def is_wasteful(row: dict) -> bool:
    """Tell whether the codebooks of a quantized model take far more than the codes."""
    return row["stage"] not in ("float", "mixed") and row["bits_per_weight"] > WASTEFUL * row["bits"]


def choose(rows: list[dict], images: int, tolerance: float) -> tuple[dict, bool]:
    """Return (the row of the model to recommend, whether its drop is small).

    It is the smallest whose drop is small, see [`recommend`], or else the most accurate.
    """
    place = recommend([drop_of(row, images) for row in rows], [row["bytes"] for row in rows], tolerance)
    if place is not None:
        return rows[place], True
    return max(rows, key=lambda row: (row["top1"], -row["bytes"])), False


def sweep_table(rows: list[dict], float_row: dict, images: int, chosen: dict | None) -> str:
    """Return the table of a sweep, which a terminal of 110 characters shows without folding.

    The drop against float is given with what chance explains of it.
    """
    lines = [("model", "bits", "stored", "bytes", "smaller", "top-1 %", "95 % interval", "drop", "")]
    for row in rows:
        drop, (low, high) = drop_of(row, images), row["top1_interval"]
        notes = ["recommended"] * (row is chosen) + ["wasteful"] * is_wasteful(row)
        lines.append(
            (
                row["model"],
                f"{row['bits']:g}",
                f"{row['bits_per_weight']:.2f}",
                f"{row['bytes']:,}",
                f"{float_row['bytes'] / row['bytes']:.1f} x",
                f"{row['top1']:.1f}",
                f"{low:.1f} to {high:.1f}",
                "" if row is float_row else f"{drop.points:.1f} ± {drop.chance:.1f}",
                ", ".join(notes),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    shown = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        shown.append("  ".join([line[0].ljust(widths[0]), *cells[1:-1], line[-1]]).rstrip())
    return "\n".join(shown)


def why(row: dict, small: bool, images: int, tolerance: float, float_row: dict) -> str:
    """Return the sentence that recommends the model of a `row`."""
    drop, smaller = drop_of(row, images), float_row["bytes"] / row["bytes"]
    what = f"Recommended: {row['model']} ({row['bytes']:,} bytes, {smaller:.1f} times smaller than float)"
    few = "; of more images one would know" if drop.chance > MOST else ""
    if not small:
        return (
            f"{what}, the most accurate one, but it drops {drop.points:.1f} points on {images:,} images, more than "
            f"--tolerance allows ({tolerance:g}) and chance may excuse ({min(drop.chance, MOST):.1f}){few}."
        )
    if drop.points <= 0:
        return f"{what}, the smallest one that is not worse than float on {images:,} images."
    if drop.points <= tolerance:
        return (
            f"{what}, the smallest one whose drop is within --tolerance: {drop.points:.1f} of {tolerance:g} points on "
            f"{images:,} images."
        )
    return (
        f"{what}, the smallest one whose drop, {drop.points:.1f} points, may be chance: of {images:,} images so few "
        f"changed that chance explains up to {drop.chance:.1f} points."
    )


def waste(row: dict) -> str | None:
    """Return the sentence that names a better choice than the wasteful model of a `row`; `None` of another model."""
    if not is_wasteful(row):
        return None
    what = f"Wasteful: {row['model']} stores {row['bits_per_weight']:.1f} bits per weight for codes of {row['bits']:g}"
    alternative = row["bits_per_weight_with_one_codebook"]
    if row["granularity"] != "per_tensor" and alternative < row["bits_per_weight"]:
        which = "channel" if row["granularity"] == "per_channel" else "group of channels"
        return (
            f"{what}, as each {which} has a codebook of its own: --granularity per_tensor stores {alternative:.1f} at "
            "the same bits, with a scale for each channel."
        )
    entries, instead = 2 ** round(row["bits"]), ": take fewer bits" if row["bits"] > 1 else ""
    return f"{what}, as its layers have few weights for a codebook of {entries} entries{instead}."


def tuning_helps(rows: list[dict], chosen: dict, small: bool, images: int, command: list[str]) -> str | None:
    """Return the sentence about tuning, bits shared out, and equalization for activations that are rounded.

    It is `None` if some of `rows` are tuned, or it needs none.

    `command` are the options that name the float checkpoint and the images. Each layer having its own bits, the model
    that it names is as large as the one with the fewest.
    """
    found = _fewest_missed(rows, chosen, small)
    if found is None or any((row.get("calibration_config") or {}).get("tuning_steps") for row in rows):
        return None
    stored = math.ceil(10 * found["bits_per_weight"]) / 10
    more = ["--method", found["method"], "--granularity", found["granularity"], "--bits", f"{found['bits']:g}"]
    scaled = ""
    if found["activation_bits"] is not None:
        more += ["--activation_bits", str(found["activation_bits"])]
        if not any((row.get("calibration_config") or {}).get("equalization") is not None for row in rows):
            more += ["--equalization", "0.3"]
            scaled = ", and channels scaled to one range"
    more += ["--target_bits_per_weight", f"{stored:.1f}", "--tuning_steps", "300"]
    return (
        f"Fewer bits without labels: of the {drop_of(found, images).points:.1f} points that {found['model']} drops, "
        f"tuning wins some back, and so do bits for each layer by its need{scaled}: "
        f"repvgg-hf quantize {shlex.join([*command, *more])}"
    )


def training_helps(rows: list[dict], chosen: dict, small: bool, images: int, command: list[str]) -> str | None:
    """Return the sentence about training with quantized weights; `None` if the fewest bits of `rows` need none.

    `command` are the options that name the float checkpoint and the images.
    """
    fewest = _fewest_missed(rows, chosen, small)
    if fewest is None:
        return None
    drop = drop_of(fewest, images)
    bits = f"{fewest['bits']:g}"
    return (
        f"Fewer bits by training: {fewest['model']} drops {drop.points:.1f} points without any, of which "
        f"quantization-aware training may win some back: repvgg-hf qat {shlex.join([*command, '--bits', bits])}"
    )


def _fewest_missed(rows: list[dict], chosen: dict, small: bool) -> dict | None:
    """Return the row with the fewest bits, the same for all layers; `None` if it is as good as wanted."""
    rows = [row for row in rows if row["stage"] != "mixed"]
    if not rows:
        return None
    fewest = min(rows, key=lambda row: (row["bits"], row["bytes"], -row["top1"]))
    return None if small and chosen["bits"] <= fewest["bits"] else fewest
