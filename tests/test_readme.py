"""The README's code runs as it stands, and what it names is there."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stem_dask.synthetic import Synthetic, write_dataset

    monkeypatch.chdir(tmp_path)
    write_dataset("scan.dm4", Synthetic(scan_shape=(8, 6)))
    exec(compile(code, "README.md", "exec"), {})  # the README is ours


def test_there_is_code_to_run() -> None:
    assert len(BLOCKS) == 2


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_keys_and_commands_are_real() -> None:
    from stem_dask.cli import _parser
    from stem_dask.options import SECTIONS

    commands = set(re.findall(r"^stem-dask (\w+)", README, re.MULTILINE))
    known = next(a for a in _parser()._actions if a.choices).choices
    assert commands
    assert commands <= set(known)
    for section, key in re.findall(
        r"\b(input|analyze|crop|validate|downsample|output|cluster)\.(\w+)=", README
    ):
        fields = SECTIONS[section].model_fields.items()
        assert key in {field.alias or name for name, field in fields}


def command_lines() -> list[list[str]]:
    """The words of every command line of ours that stands in a block."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    found = re.findall(r"^stem-dask ([^#>\n]+)", text, re.MULTILINE)
    return [shlex.split(words) for words in found]


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_command_lines_are_understood(words: list[str]) -> None:
    from stem_dask.cli import _parser

    assert _parser().parse_args(words).command


def test_there_are_command_lines() -> None:
    assert len(command_lines()) > 12


def test_make_targets_are_real() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
