"""Print constraints with the lowest versions that pyproject.toml allows, for `make test-lowest`.

Packages without a bound there, and torch, whose old builds bring several GB of CUDA, are as in constraints.txt.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("hyperspy", "cloud", "hpc")


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for name in EXTRAS for line in project["optional-dependencies"][name]]
    text = "\n".join((*project["dependencies"], *extras))
    lowest = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\w.]+)", text, re.MULTILINE))
    for name, version in lowest.items():
        print(f"{name}=={version}")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        found = re.match(r"[\w-]+", line)
        if found is not None and found[0] not in lowest:
            print(line)


if __name__ == "__main__":
    main()
