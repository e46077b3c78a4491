"""Judge Pocket LLaVA; ``--help`` tells the options. The code is in models/pocket."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from models.pocket.evaluation import main

if __name__ == "__main__":
    main()
