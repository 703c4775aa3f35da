"""What is fastest is measured, kept, and used by the engines that come after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvbm.cli.main import app
from kvbm.errors import ConfigError
from kvbm.testing.simulated_gpu import SimulatedGpu
from kvbm.transfer import GpuTransferEngine
from kvbm.transfer.choose import DIRECTIONS, PATHS, Cell
from kvbm.transfer.tuning import Measured, load_table, measure, save_table, shapes, table_path

MOST = 64 << 10


def test_every_shape_is_measured_on_every_path_that_it_can_take(simulated: SimulatedGpu) -> None:
    told: list[Measured] = []
    rows = measure(simulated.gpu, num_repeats=1, most_nbytes=MOST, on_cell=told.append)
    assert told == rows
    assert [(row.direction, row.run_nbytes, row.num_runs) for row in rows] == shapes(most_nbytes=MOST)
    assert {row.direction for row in rows} == set(DIRECTIONS)
    for row in rows:
        expected = set(PATHS)
        if row.direction == "across" or row.num_runs == 1:
            expected.discard("staged")
        assert set(row.seconds) == expected
        assert set(row.cell().paths) == expected


def test_cell_names_the_fastest_first() -> None:
    row = Measured("up", 4096, 8, {"memcpy": 3.0, "batch": 1.0, "kernel": 2.0})
    assert row.cell() == Cell("up", 4096, 8, ("batch", "kernel", "memcpy"))
    assert row.nbytes == 4096 * 8


def test_table_is_kept_and_taken_by_engines(
    simulated: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_table(simulated.gpu).origin == "built in"
    cells = (Cell("up", 0, 1, ("kernel", "memcpy")),)
    path = save_table(simulated.gpu, cells)
    assert path.parent == tmp_path / "kvbm"
    assert list(path.parent.iterdir()) == [path]
    with GpuTransferEngine(simulated.gpu) as engine:
        assert engine.means.table.cells == cells
        assert engine.means.table.origin == str(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"version": 2}', {"version": 2}, {"device": "another"}, {"driver": 1}, {"cells": [["up"]]}],
)
def test_file_that_does_not_fit_is_ignored_with_a_warning(
    simulated: SimulatedGpu, tmp_path: Path, content: object, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_table(simulated.gpu, (Cell("up", 0, 1, ("kernel",)),), folder=tmp_path)
    if isinstance(content, dict):
        path.write_text(json.dumps({**json.loads(path.read_bytes()), **content}))
    else:
        assert isinstance(content, bytes)
        path.write_bytes(content)
    assert load_table(simulated.gpu, folder=tmp_path).origin == "built in"
    assert "run kvbm tune again" in caplog.text


def test_no_measurement_is_refused(simulated: SimulatedGpu) -> None:
    with pytest.raises(ConfigError, match="num_repeats is 0, give 1 or more"):
        measure(simulated.gpu, num_repeats=0)


def test_command_measures_prints_and_keeps(
    simulated: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("KVBM_DEVICE", "simulated")
    monkeypatch.setattr("kvbm.transfer.tuning._RUNS_NBYTES", (4096,))
    monkeypatch.setattr("kvbm.transfer.tuning._NUM_RUNS", (1, 8))
    file = tmp_path / "figures.json"
    for extra, is_kept in ((["--dry-run"], False), (["--json", str(file)], True)):
        with pytest.raises(SystemExit) as end:
            app(["tune", "--repeats", "1", "--most-mib", "1", *extra])
        assert end.value.code in (0, None)
        out = capsys.readouterr().out
        assert "GiB/s" in out
        assert "across" in out
        assert table_path(simulated.gpu).exists() is is_kept
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 6
    assert {"direction", "run_nbytes", "num_runs", "seconds"} == set(rows[0])


def test_command_says_why_there_is_nothing_to_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBM_DEVICE", "cpu")
    with pytest.raises(ConfigError, match=r"there is nothing to tune: .* the CPU was asked for"):
        app(["tune"], standalone_mode=False)


def test_info_names_device_and_table(
    simulated: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVBM_DEVICE", "simulated")
    with pytest.raises(SystemExit):
        app(["info", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["device"] == simulated.gpu.describe()
    assert facts["copies"].startswith("paths chosen by the table ")
    monkeypatch.setenv("KVBM_DEVICE", "cpu")
    with pytest.raises(SystemExit):
        app(["info", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["device"] == "host memory stands in for the GPU: the CPU was asked for"
    assert "copies" not in facts
