"""One row of one library in a separate process: prints its seconds, or why there is no such row, as JSON.

    python -m benchmarks.peers '{"library": "numpy", "row": "crop", "input": "scan.dm4", ...}'

Seconds are those of the work, after imports and the start of workers.
"""

import json
import sys
from importlib import import_module

from benchmarks.peers import CannotError, Task


def main(argv: list[str] | None = None) -> None:
    """Run one row and print its seconds, or the reason why it is missing."""
    (words,) = sys.argv[1:] if argv is None else argv
    task = Task(**json.loads(words))
    try:
        module = import_module(f"benchmarks.peers.{task.library}")
        seconds = module.run(task)
    except CannotError as error:
        print(json.dumps({"cannot": str(error)}))
    else:
        print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
