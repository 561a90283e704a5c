"""What a config says of the detector is compared with the file before anything is read."""

import pytest

from stem_dask.cli import main as cli


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("downsample.factor=37", "downsample factor is 37; expected 1 to 36, the shorter detector"),
        ("downsample.factor=1000", "downsample factor is 1000; expected 1 to 36"),
        ("crop.window=[0,41,0,4]", "window [0, 41, 0, 4] does not fit the detector of 40 x 36"),
        ("analyze.manual_center=[5,36]", "manual_center (5, 36) lies outside the detector of 40"),
    ],
)
def test_refused_before_the_first_read(
    tmp_path, monkeypatch, capsys, beam_file, command, override, message
):
    """A window beyond the detector was told after the whole analysis; a factor beyond it ended in a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stem_dask.readers.flat.FlatFile.read_into", None)  # nothing may be read
    (tmp_path / "crop.yaml").write_text(f"input: {{path: {beam_file.name}}}\noutput: {{path: out.zarr}}\n")  # fmt: skip
    method = ["analyze.center_method=manual"] if "center" in override else []
    assert cli.main([command, "crop.yaml", override, *method]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert len(told.err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beam.npy", "crop.yaml"]


def test_the_largest_that_fit_are_taken(tmp_path, monkeypatch, beam_file):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "crop.yaml").write_text(f"input: {{path: {beam_file.name}}}\noutput: {{path: out.zarr}}\n")  # fmt: skip
    assert cli.main(["check", "crop.yaml", "downsample.factor=36"]) == 0
    assert cli.main(["check", "crop.yaml", "crop.window=[0,40,0,36]"]) == 0
