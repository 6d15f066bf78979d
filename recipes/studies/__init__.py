"""What the authors measured about quantization: each study runs recipes or quantizes, and writes JSON and tables.

Studies import the package, other recipes and `peers/`. What they found is in `results/`.
"""
