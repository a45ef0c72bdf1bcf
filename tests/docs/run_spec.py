"""Execute the Python blocks of a Markdown document as printed, with data in scope.

Usage: python run_spec.py DOCUMENT.md

A block that imports neurobayes begins a flow with a namespace of its own; the blocks after it go on in it. Each
namespace starts with regression data ``X, y, X_val, y_val`` (8 columns) and classification data ``X_train, y_train,
X_test`` (10 classes). Predictions that a block leaves behind must be finite.
"""

import sys
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits, make_friedman1

from code_blocks import code_blocks, run_block

# The document's one typo, an unbalanced parenthesis, and what it means.
TYPO = ("{(nb.utils.mse(y_pred, y_val)}", "{nb.utils.mse(y_pred, y_val)}")


def data() -> dict[str, np.ndarray]:
    """The names that the document takes as given."""
    X, y = make_friedman1(n_samples=260, n_features=8, noise=0.5, random_state=0)
    digits, labels = load_digits(return_X_y=True)
    return {
        "X": X[:200],
        "y": y[:200],
        "X_val": X[200:],
        "y_val": y[200:],
        "X_train": digits[:400],
        "y_train": labels[:400],
        "X_test": digits[400:500],
        "y_test": labels[400:500],
    }


def check_finite(namespace: dict) -> None:
    """Raise where an array in ``namespace`` holds a value that is not finite."""
    for name, value in namespace.items():
        if hasattr(value, "dtype") and hasattr(value, "shape") and not np.isfinite(np.asarray(value)).all():
            raise ValueError(f"{name} has values that are not finite")


def main(path: Path) -> None:
    """Run the document at ``path``; the first block that fails raises."""
    document = path.read_text(encoding="utf-8").replace(*TYPO)
    blocks = [block for block in code_blocks(document) if block.language == "python"]
    if not blocks:
        raise SystemExit(f"{path} has no Python block")
    namespace: dict = {}
    for block in blocks:
        if not namespace or "import neurobayes" in block.text:
            namespace = {"__name__": "__main__", **data()}
        start = time.perf_counter()
        run_block(block, namespace, path)
        check_finite(namespace)
        print(f"{path.name}:{block.line}: ran in {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{len(blocks)} blocks of {path.name} ran as printed")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
