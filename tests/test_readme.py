"""The code of the README and of docs/ runs as it stands; links, commands and keys on all pages exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in (
        *sorted(ROOT.glob("*.md")),
        *sorted(ROOT.glob("docs/*.md")),
        ROOT / "benchmarks" / "README.md",
    )
}
TEXT = "\n".join(PAGES.values())
#: `tests/test_contributing.py` runs those of CONTRIBUTING.md
BLOCKS = [
    code
    for path, text in PAGES.items()
    if path.name != "CONTRIBUTING.md"
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
]


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stem_dask.writers.synthetic import Synthetic, write_dataset

    monkeypatch.chdir(tmp_path)
    write_dataset("scan.dm4", Synthetic(scan_shape=(8, 6)))
    exec(compile(code, "README.md", "exec"), {})


def test_there_is_code_to_run() -> None:
    assert len(BLOCKS) == 13


@pytest.mark.parametrize("page", ["look", "window", "hyperspy", "resume"])
def test_commands_of_the_how_to_pages_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order, in one folder."""
    from stem_dask.cli.main import main
    from stem_dask.writers.synthetic import Synthetic, write_dataset

    monkeypatch.chdir(tmp_path)
    write_dataset("scan.dm4", Synthetic(scan_shape=(8, 6)))
    text = "\n".join(
        re.findall(r"```bash\n(.*?)```", PAGES[ROOT / "docs" / f"{page}.md"], re.DOTALL)
    )
    lines = re.findall(r"^stem-dask (.+)", text, re.MULTILINE)
    assert lines
    for line in lines:
        assert main(shlex.split(line, comments=True)) == 0, line


def test_every_page_is_in_the_index() -> None:
    index = PAGES[ROOT / "docs" / "README.md"]
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in ("README.md", "index.md") or f"({page.name})" in index


def test_the_reference_has_every_public_name() -> None:
    import stem_dask as sd

    text = PAGES[ROOT / "docs" / "api.md"]
    assert set(
        re.findall(r"^\.\. (?:auto|py:data)\w*:: (?:stem_dask\.)?(\w+)$", text, re.MULTILINE)
    ) == set(sd.__all__)
    site = re.findall(r"(?:^|<)(\w+)>?$", (ROOT / "docs" / "index.md").read_text("utf-8"), re.M)
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or page.stem in site


def test_names_in_the_tables_are_public() -> None:
    import stem_dask as sd

    assert set(re.findall(r"`sd\.(\w+)", TEXT)) <= set(sd.__all__)


def anchor(heading: str) -> str:
    """The fragment of a link to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        name, _, part = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        if part:
            assert part in map(anchor, re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    text = PAGES[page]
    if page.name == "architecture.md":
        text += re.sub(r'"(\w+/\w+\.py)', r"`\1`", page.with_suffix(".py").read_text())
    for name in set(re.findall(r"`((?:[\w.]+/)+\w+\.(?:py|md|yaml|sh))\b", text)):
        folders = (ROOT, ROOT / "stem_dask", page.parent)
        assert any((folder / name).exists() for folder in folders), name


def test_the_picture_of_the_architecture_is_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "architecture.svg"
    subprocess.run([sys.executable, ROOT / "docs" / "architecture.py", picture], check=True)
    assert "job/plan.py" in picture.read_text()


def test_the_citation_is_of_this_version() -> None:
    import stem_dask as sd

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == sd.__version__
    assert {"message", "title", "authors"} <= citation.keys()


def test_keys_and_commands_are_real() -> None:
    from stem_dask.cli.main import _parser
    from stem_dask.config.options import SECTIONS

    commands = set(re.findall(r"^stem-dask (\w+)", TEXT, re.MULTILINE))
    known = next(a for a in _parser()._actions if a.choices).choices
    assert commands
    assert commands <= set(known)
    for section, key in re.findall(
        r"\b(input|analyze|descan|crop|validate|downsample|output|cluster)\.(\w+)=", TEXT
    ):
        fields = SECTIONS[section].model_fields.items()
        assert key in {field.alias or name for name, field in fields}


def command_lines() -> list[list[str]]:
    """The words of every stem-dask command in a bash block."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL))
    found = re.findall(r"^stem-dask ([^#>\n]+)", text, re.MULTILINE)
    return [shlex.split(words) for words in found]


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_command_lines_are_understood(words: list[str]) -> None:
    from stem_dask.cli.main import _parser
    from stem_dask.cli.train import _parsed

    assert _parsed(words[1:]).data if words[0] == "train" else _parser().parse_args(words).command


def test_there_are_command_lines() -> None:
    assert len(command_lines()) > 12


def test_make_targets_are_real() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([\w-]+)", TEXT, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
