"""Learn the merges of the retrieval demo's tokenizer from the captions of the train part.

    python scripts/learn_demo_merges.py

Token ids follow from the merges: after a change the demo model must be trained anew.
"""

import sys
from pathlib import Path

# Run as a script, only this file's folder is on the path; the packages are one level up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.retrieval.demo.scenes import DigitScenes
from tasks.retrieval.demo.tokens import MERGES_PATH, learn_merges, pack_merges

if __name__ == "__main__":
    merges = learn_merges(DigitScenes("train").captions)
    MERGES_PATH.write_bytes(pack_merges(merges))
    print(f"{len(merges)} merges in {MERGES_PATH}")
