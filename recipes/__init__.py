"""Command lines, one story each: train, quantize, qat, evaluate, publish; installed as `repvgg_hf.recipes`.

`studies/`, `benchmarks/` and `peers/` are what the authors measured, with the JSON and tables in their `results/`.
Everything here may import the whole package; nothing in the package imports a recipe.
"""
