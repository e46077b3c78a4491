"""Write the model in LLaVA's original format; the code is in models/pocket."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from models.pocket.export import main

if __name__ == "__main__":
    main()
