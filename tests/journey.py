"""README's story, told on photographs of your own: python tests/journey.py PHOTOS FOLDER

PHOTOS has one folder of pictures per class, or such folders in train/ and val/. Every block of the section is run in
FOLDER, a new one, in its order and as it stands; what it prints is shown, with the seconds that it took.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
STORY, PYTHON, TRAINED = "From your photographs to a small classifier", "In Python", "A trained model"


def blocks(heading: str) -> list[tuple[str, str]]:
    """Return (language, text) of each block of code in a section of README."""
    section = re.search(rf"^## {heading}\n(.*?)^## ", README.read_text(encoding="utf-8"), re.M | re.S)[1]
    return re.findall(r"^```(\w+)\n(.*?)^```", section, re.M | re.S)


def tell(place: Path, language: str, text: str, **environment: str) -> str:
    """Run a block in the folder `place`, with the commands of this environment; returns what it printed.

    Raises `RuntimeError` with what it said if it ends with an error.
    """
    command = [sys.executable, "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    variables = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | environment
    done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def prepare(photos: Path, place: Path) -> None:
    """Put the photographs where the story has them, and one of them as photo.jpg."""
    place.mkdir(parents=True)
    (place / "photos").symlink_to(photos.resolve())
    pictures = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    shutil.copyfile(pictures[-1], place / "photo.jpg")


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    photos, place = map(Path, sys.argv[1:])
    prepare(photos, place)
    for language, text in blocks(STORY):
        started = time.perf_counter()
        print(f"--- {language}\n{text}", flush=True)
        print(f"{tell(place, language, text)}--- {time.perf_counter() - started:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
