"""Makes the helpers beside the tests of engines importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
