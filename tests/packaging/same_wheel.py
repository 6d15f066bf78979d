"""Compare two wheels: `python same_wheel.py ONE.whl OTHER.whl` fails with the names of the files that differ."""

import sys
import zipfile


def contents(path: str) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def main() -> None:
    first, second = (contents(path) for path in sys.argv[1:])
    different = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    if different:
        sys.exit(f"{sys.argv[1]} and {sys.argv[2]} differ in {', '.join(different)}.")


if __name__ == "__main__":
    main()
