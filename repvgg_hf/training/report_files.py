"""Writing a training's report beside its model."""

import os
from pathlib import Path

import numpy as np

from repvgg_hf.analysis.uncertainty import wilson_interval
from repvgg_hf.training.report_page import page_of
from repvgg_hf.training.report_picture import draw_report
from repvgg_hf.training.run_report import make_report
from repvgg_hf.training.splits import ImageSplit

PAGE, PICTURE = "report.html", "report.png"


def write_report(trainer, split: ImageSplit, logits: np.ndarray, top1: float) -> str:
    """Write the report of a training into its output folder; returns a line that says where it is.

    The folder's name and times are not in it, so that the same training gives the same files.

    Args:
        trainer: the `Trainer`, after the training.
        split: the evaluated images.
        logits: floating `[images, classes]`, what the model says of them.
        top1: its accuracy in percent.
    """
    folder, images = Path(trainer.args.output_dir), len(split)
    low, high = wilson_interval(top1 / 100 * images, images)
    sentence = f"Right on {top1:.1f} % of {images:,} validation images"
    facts = [f"The 95 % interval of so many images is {low:.1f} to {high:.1f} %."]
    facts.append(f"{trainer.model.num_parameters():,} parameters, {trainer.state.global_step:,} steps of training.")
    report = make_report(sentence, facts, trainer.state.log_history, split, logits)
    temporary = folder / f"{PAGE}.tmp"
    temporary.write_text(page_of(report), encoding="utf-8")
    os.replace(temporary, folder / PAGE)
    try:
        draw_report(report, folder / PICTURE)
    except ImportError:
        return f"Report: {folder / PAGE}; {PICTURE} needs matplotlib (pip install 'repvgg-hf[plot]')."
    return f"Report: {folder / PAGE} and {PICTURE}."
