"""What recipes share and users may import: pictures, models, optimizer, training loop, metrics, reports.

May import every other room of the package, but no recipe. Needs the extra `train` (`pip install "repvgg-hf[train]"`).
"""
