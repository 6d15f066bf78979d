"""Make model cards and their figures again from the JSON that they were made from.

python -m repvgg_hf.hub model_cards/repvgg-*.json      # writes a .md beside each .json, and its figures into plots/

Figures need matplotlib; with --text_only they stay as they are. `python -m repvgg_hf.hub space --help` tells of pages
that show models in the browser.
"""

import argparse
import sys
from pathlib import Path

from .card import write_text
from .drawing import draw_figures
from .network_card import read_card

if sys.argv[1:2] == ["space"]:
    from .space_command import main

    main(sys.argv[2:])
    sys.exit()

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("cards", nargs="+", type=Path, help="JSON files, as write_folder writes card.json")
parser.add_argument("--text_only", action="store_true", help="don't draw the figures")
args = parser.parse_args()
for path in args.cards:
    card = read_card(path)
    if not args.text_only:
        draw_figures(card.results, card.repo_id, path.parent, only=card.plots or {}, published=card.published)
    write_text(path.with_suffix(".md"), str(card))
