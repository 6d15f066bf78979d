"""Write model cards again from the JSON they were made from.

python -m repvgg_hf.hub model_cards/repvgg-*.json      # writes a .md beside each .json
"""

import sys
from pathlib import Path

from .card import ModelCard, write_text

if len(sys.argv) == 1:
    raise SystemExit(__doc__)
for path in map(Path, sys.argv[1:]):
    write_text(path.with_suffix(".md"), str(ModelCard.from_json(path)))
