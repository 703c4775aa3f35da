"""``kvbm bench gpu`` over the simulated device: rows, what is compared, what is shown, and what is refused."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvbm.bench import gpu as bench
from kvbm.bench import gpu_permutes, gpu_show, gpu_torch
from kvbm.bench.gpu_site import DIRECTIONS, LAYOUTS, Site, make_layout, take_turns
from kvbm.cli.main import app
from kvbm.errors import ConfigError, KvbmError, PluginError, TransferError
from kvbm.gpu import Gpu
from kvbm.testing.simulated_gpu import SimulatedGpu
from kvbm.transfer import GpuTransferEngine

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    if importlib.util.find_spec("kvbm._native.simulated_device") is None:
        pytest.skip("this build has no simulated device")
    monkeypatch.setenv("KVBM_DEVICE", "simulated")
    with SimulatedGpu() as simulated:
        yield simulated.gpu


@pytest.fixture
def engine(gpu: Gpu) -> Iterator[GpuTransferEngine]:
    with GpuTransferEngine(gpu) as engine:
        yield engine


def nothing() -> dict[str, Any]:
    return {}


# -- rows ------------------------------------------------------------------------------------------------------


def test_every_bar_belongs_to_a_row_that_is_measured(gpu: Gpu) -> None:
    sizes = (16 * KIB, 64 * KIB, MIB)
    small = bench.extent_for(gpu, pieces_nbytes=(16 * KIB,), counts=(1,), most_nbytes=MIB, num_calls=1)
    wide = replace(small, pieces_nbytes=sizes, counts=(64,), most_nbytes=64 * MIB, rows=("h2d",))
    names = {row["name"] for extent in (small, wide) for row in bench.run(extent, gpu=gpu).rows}
    names |= {name.replace("h2d", "d2h") for name in names}
    assert {name for name in bench.BARS if not name.endswith(("_256", "_1024")) or name.startswith("permute")} <= names
    full = bench.Extent()
    assert {16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB} == set(full.pieces_nbytes)
    assert (min(full.counts), max(full.counts)) == (1, 1024)


def test_rows_say_what_was_copied_and_by_which_path(gpu: Gpu) -> None:
    figures = bench.run(gpu=gpu)
    assert figures.is_simulated
    assert all(row["median"] > 0 and row["ratio"] > 0 for row in figures.rows)
    copies = [row for row in figures.rows if "layout" in row]
    assert {(row["direction"], row["layout"]) for row in copies} == {(d, kind) for d in DIRECTIONS for kind in LAYOUTS}
    assert {row["path"] for row in copies} <= {"memcpy", "batch", "kernel", "staged"}
    assert len({row["path"] for row in copies}) == 4
    assert {row["torch"] for row in copies} == {None}
    assert any("torch's index copy, the effect on a matrix product" in note for note in figures.notes)
    assert any("built in" in note for note in figures.notes)


def test_only_the_rows_that_were_named_are_measured(gpu: Gpu) -> None:
    extent = bench.extent_for(gpu, rows=("d2h_block_first_16k_4", "one_block"))
    names = [row["name"] for row in bench.run(extent, gpu=gpu).rows]
    assert names[0] == "d2h_block_first_16k_4"
    assert {name[:9] for name in names[1:]} == {"one_block"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ("x", "d2h", "y")}, "there is no row x, y: names begin with h2d, d2h, permute"),
        ({"rows": ("h2d_contiguous_4m",)}, "no row begins with h2d_contiguous_4m at this size"),
        ({"most_nbytes": MIB - 1}, "--size is 1048575 bytes, give at least 1048576"),
    ],
)
def test_impossible_extents_are_refused(gpu: Gpu, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.run(bench.extent_for(gpu, **changes), gpu=gpu)


def test_turns_alternate_and_each_is_first_once() -> None:
    calls: list[str] = []
    turns = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = take_turns(turns, rounds=3, least_s=0.0)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab"


# -- what is compared ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_blocks_that_were_not_moved_are_noticed(engine: GpuTransferEngine, kind: str, direction: str) -> None:
    site = Site(engine, make_layout(kind, 16 * KIB, 4))
    site.moved(direction, 4, lambda: site.copy(direction, 4) or {})
    with pytest.raises(TransferError, match=rf"4 of 4 blocks that were compared came with other bytes \({direction}\)"):
        site.moved(direction, 4, nothing)
    with pytest.raises(TransferError, match="1 of 4 blocks"):
        site.moved(direction, 4, lambda: site.copy(direction, 3) or {})
    site.close()


def test_no_two_pages_of_the_blocks_look_alike(engine: GpuTransferEngine) -> None:
    site = Site(engine, make_layout("block_first", 16 * KIB, 4))
    pages = site.host.open_buffer(0).reshape(-1, 4096)
    assert len(np.unique(pages, axis=0)) == len(pages)
    site.close()


def test_checksums_of_the_device_are_compared_with_the_processors(engine: GpuTransferEngine) -> None:
    site = Site(engine, make_layout("contiguous", 16 * KIB, 4))
    site.copy("d2h", 4, is_checked=True)
    bench._compare_checksums(site, 4)
    site.host.checksums[site.host_order[2]] ^= np.uint64(1)
    with pytest.raises(TransferError, match="1 of 4 checksums of the device"):
        bench._compare_checksums(site, 4)
    with pytest.raises(TransferError, match="1 of 4 blocks did not match"):
        site.copy("h2d", 4, is_checked=True)
    site.close()


def test_heads_in_the_wrong_place_are_noticed(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def permute(engine: GpuTransferEngine, source: Any, target: Any, ids: Any) -> None:
        engine.copy(source, target, ids, ids).result()

    monkeypatch.setattr(gpu_permutes, "_permute", permute)
    with pytest.raises(TransferError, match="heads lie in the wrong place after a permute from nhd to hnd"):
        bench.run(bench.extent_for(gpu, rows=("permute",)), gpu=gpu)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_torch_moves_the_same_blocks(kind: str) -> None:
    torch = pytest.importorskip("torch")
    order = np.array([3, 0, 2, 1], dtype=np.int32)
    copies = gpu_torch.IndexCopies(torch, kind, 64, order, device="cpu")
    for pool in copies.pools:
        pool.copy_(torch.randint(0, 256, pool.shape, dtype=torch.uint8))
    pools = [pool.numpy().copy() for pool in copies.pools]
    axis = 1 if kind == "outer_first" else 0
    turn, hosts = copies.turn("d2h", 3)
    turn()
    assert sum(host.numel() for host in hosts) == 3 * make_layout(kind, 64, 4).block_nbytes
    for pool, host in zip(pools, hosts, strict=True):
        assert np.array_equal(host.numpy(), np.take(pool, order[:3], axis=axis))
    turn, hosts = copies.turn("h2d", 3)
    for host in hosts:
        host.fill_(7)
    turn()
    for before, pool in zip(pools, copies.pools, strict=True):
        expected = np.moveaxis(before, axis, 0).copy()
        expected[order[:3]] = 7
        assert np.array_equal(np.moveaxis(pool.numpy(), axis, 0), expected)


# -- what is shown ---------------------------------------------------------------------------------------------


def shown(figures: bench.Figures) -> str:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system="standard")
    for table in gpu_show.tables_of(figures):
        console.print(table)
    return out.getvalue()


def figures_of(*, is_simulated: bool) -> bench.Figures:
    rows = []
    for name, ratio, torch in (("h2d_contiguous_1m_64", 0.96, 10.0), ("d2h_block_first_16k_64", 0.6, None)):
        direction, layout = name[:3], name[4:].rpartition("_")[0].rpartition("_")[0]
        rows.append(
            {"name": name, "unit": "GB/s", "median": 50.0, "spread": [49.0, 51.0], "reference": 52.0, "ratio": ratio}
            | {"direction": direction, "layout": layout, "piece_nbytes": MIB, "num_blocks": 64, "path": "batch"}
            | {"torch": torch}
        )
    rows.append(
        {"name": "one_block_h2d", "unit": "us", "median": 61, "spread": [60, 62], "reference": 20.0, "ratio": 0.3}
    )
    return bench.Figures("a [device]", is_simulated, rows)


def test_bars_of_a_gpu_are_shown_in_their_color() -> None:
    text = shown(figures_of(is_simulated=False))
    lines = {name: next(line for line in text.splitlines() if name in line) for name in ("h2d c", "d2h b", "one_block")}
    assert "\x1b[32m>= 0.95x" in lines["h2d c"]
    assert "5.00" in lines["h2d c"]
    assert "\x1b[31m>= 0.7x" in lines["d2h b"]
    assert "\x1b[31m<= 60" in lines["one_block"]
    assert "a [device]" in text


def test_line_of_bars_counts_and_names_those_that_were_missed() -> None:
    rows = figures_of(is_simulated=False).rows
    assert bench.bars_line(rows) == "bars reached: 1 of 3; not d2h_block_first_16k_64, one_block_h2d"
    assert bench.bars_line(rows[:1]) == "bars reached: 1 of 1"


def test_simulated_figures_have_no_bars_and_say_that_they_mean_nothing() -> None:
    text = shown(figures_of(is_simulated=True))
    assert "SIMULATED ON THE CPU" in text
    assert ">=" not in text
    assert "<=" not in text


def test_command_writes_tables_json_and_plot(gpu: Gpu, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, plot = tmp_path / "gpu.json", tmp_path / "gpu.png"
    arguments = ["bench", "gpu", "--rows", "h2d,one_block", "--size", "1MiB", "--json", str(file), "--plot", str(plot)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    assert "these figures say nothing about any GPU" in result.stderr
    assert "not measured: torch" in result.stdout
    answer = json.loads(file.read_text())
    assert answer["is_simulated"] is True
    assert answer["command"] == f"kvbm bench gpu --size 1MiB --rows h2d,one_block --plot {plot}"
    assert {row["name"].partition("_")[0] for row in answer["rows"]} == {"h2d", "one"}
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("is_simulated", "option", "status"), [(False, ["--bars"], 1), (False, [], 0), (True, ["--bars"], 0)]
)
def test_missed_bars_fail_the_command_where_they_are_asked_for(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_simulated: bool, option: list[str], status: int
) -> None:
    assert gpu.is_usable
    monkeypatch.setattr(bench, "run", lambda extent, gpu: figures_of(is_simulated=is_simulated))
    file = tmp_path / "gpu.json"
    result = CliRunner().invoke(app, ["bench", "gpu", *option, "--json", str(file)])
    assert result.exit_code == status, result.output
    assert json.loads(file.read_text())["command"] == " ".join(["kvbm bench gpu", *option])


def test_command_without_a_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBM_DEVICE", "cpu")
    result = CliRunner().invoke(app, ["bench", "gpu"])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("there is no GPU to measure: host memory stands in for the GPU")
    assert "KVBM_DEVICE=simulated" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["copy", "--plot", "x.png"], ConfigError, "--plot is for kvbm bench gpu alone: leave it out"),
        (["disk", "--bars"], ConfigError, "--bars is for kvbm bench gpu alone: leave it out"),
        (["gpu", "--path", "."], ConfigError, "--path is for kvbm bench disk alone: leave it out"),
        (["gpu", "--plot", "/absent/x.png"], ConfigError, "--plot /absent/x.png cannot be written"),
        (["gpu", "--size", "2G"], ConfigError, "'2G' is no size"),
        (["gpu", "--rows", " , "], ConfigError, "--rows names no row: their names begin with h2d, d2h"),
    ],
)
def test_impossible_options_are_refused(gpu: Gpu, arguments: list[str], kind: type[KvbmError], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(result.exception, kind)
    assert message in str(result.exception)


def test_plot_without_matplotlib_is_refused_before_the_work(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_show, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["bench", "gpu", "--plot", "x.png"])
    assert isinstance(result.exception, PluginError)
    assert "pip install 'kvbm-native[report]'" in str(result.exception)
