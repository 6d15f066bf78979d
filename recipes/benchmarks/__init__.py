"""Time, memory and size against named peers; `python -m repvgg_hf.recipes.benchmarks` runs one.

Benchmarks import the package, `peers/` and timm. What they measured is in `results/`.
"""
