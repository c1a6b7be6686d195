"""What the suite makes of figures: rows put together, the best peer and ratios to it, tables, exponents, regressions."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import job, rate, regress, results, scaling
from benchmarks.results import with_row


def row(peer: str, number: int = 1, rate: float = 10.0, name: str = "qv", **more: Any) -> dict[str, Any]:
    found = {
        "peer": peer,
        "job": name,
        "variant": None,
        "checkpointing": False,
        "round": number,
        "rc": 0,
        "version": "1",
        "dtype": "float32",
    }
    found |= {"threads": 1, "asked_steps": 4, "computed_tokens": 30, "real_tokens": 20, "supervised_tokens": 10}
    return found | {"real_per_cpu_second": rate, "supervised_per_cpu_second": rate / 2} | more


def test_a_first_round_replaces_all_rounds_of_its_tool_and_a_later_one_its_own():
    rows = [row("a"), row("a", 2), row("b"), row("a", name="all-linear"), row("a", variant="bf16")]
    again = with_row(rows, row("a", rate=99.0), job.KEYS)
    assert [(one["peer"], one["round"], one["job"], one["variant"]) for one in again] == [
        ("b", 1, "qv", None),
        ("a", 1, "all-linear", None),
        ("a", 1, "qv", "bf16"),
        ("a", 1, "qv", None),
    ]
    assert again[-1]["real_per_cpu_second"] == 99.0
    assert len(with_row(rows, row("a", 2), job.KEYS)) == len(rows)
    assert len(with_row(rows, row("a", 3), job.KEYS)) == len(rows) + 1


def test_the_best_peer_is_of_round_one_and_a_ratio_of_rounds_that_both_have():
    rows = [row("lora-recipes", rate=60), row("axolotl", rate=20), row("trl", rate=30), row("swift", rate=99, rc=1)]
    rows += [row("lora-recipes", 2, 80), row("trl", 2, 20), row("lora-recipes", 3, 70)]
    best = job.best_peer(rows, "qv", job.REAL)
    assert best is not None and best["peer"] == "trl"
    assert job.ratios(rows, "qv", job.REAL, "lora-recipes") == [2.0, 4.0]
    assert job.ratios(rows, "all-linear", job.REAL, "lora-recipes") == []


def test_later_rounds_measure_ours_and_the_best_peers_in_turned_order():
    options = job.Options(Path(), ["lora-recipes", "lora-recipes-float32", "axolotl", "llamafactory", "trl"])
    rows = [row("axolotl", rate=30, first_step=20), row("trl", rate=20, first_step=10), row("llamafactory", rate=1)]
    assert job.order(options, rows, "qv", 1)[-2:] == [("trl", None), ("llamafactory", "checkpointing")]
    second = [name for name, _ in job.order(options, rows, "qv", 2)]
    assert second == ["trl", "axolotl", "lora-recipes-float32", "lora-recipes"]
    assert [name for name, _ in job.order(options, rows, "qv", 3)] == second[::-1]


def test_chosen_pairs_are_measured_in_every_round_in_turned_order_and_kept_apart(capsys: pytest.CaptureFixture):
    from benchmarks import suite

    asked = suite._parser().parse_args(["job", "--pairs", "lora-recipes", "llamafactory:bf16"])
    options = suite._options(asked)
    ways = [("lora-recipes", None), ("llamafactory", "bf16")]
    assert (options.section, list(options.names)) == ("job-pairs", ["lora-recipes", "llamafactory"])
    assert [job.order(options, [], "qv", number) for number in (1, 2, 3)] == [ways, ways[::-1], ways]
    with pytest.raises(SystemExit):
        suite._parser().parse_args(["job", "--pairs", "trl:fp8"])
    assert "no variant 'fp8'" in capsys.readouterr().err


def test_where_the_cpu_is_fast_at_bf16_the_other_tools_are_asked_for_it_too_and_the_best_way_is_measured_again():
    options = job.Options(Path(), ["lora-recipes", "axolotl", "trl"])
    assert job.order(options, [], "qv", 1, bf16=True)[-2:] == [("axolotl", "bf16"), ("trl", "bf16")]
    rows = [row("lora-recipes", rate=60), row("axolotl", rate=20), row("axolotl", variant="bf16", rate=30)]
    assert job.order(options, rows, "qv", 3) == [("lora-recipes", None), ("axolotl", None), ("axolotl", "bf16")]
    alone = job.Options(Path(), ["lora-recipes"])
    assert job.order(alone, rows, "qv", 3) == [("lora-recipes", None)]
    assert job.ratios(rows, "qv", job.REAL, "lora-recipes") == [2.0]
    assert "| real tokens / CPU s | axolotl, bf16 | 2.00 |" in job._comparison(rows, "qv", "cpu")


def test_our_float32_is_held_against_the_best_that_computes_in_it():
    rows = [row("axolotl", rate=20), row("axolotl", variant="bf16", rate=30), row("lora-recipes-float32", rate=40)]
    assert job.ratios(rows, "qv", job.REAL, "lora-recipes-float32") == [2.0]


def test_a_variant_leaves_what_the_tool_has_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained = tmp_path / "out" / "trl-qv"
    trained.mkdir(parents=True)
    (trained / "adapter").touch()
    lab = job.peers.Lab(tmp_path)

    def measure(*_: Any, dtype: str, **__: Any) -> dict[str, Any]:
        trained.mkdir()
        return row("trl", dtype="float32")

    monkeypatch.setattr(job.peers, "opened", lambda _: lab)
    monkeypatch.setattr(job.peers, "measure", measure)
    found = job.one(job.Options(tmp_path, ["trl"]), ("trl", "bf16"), "qv", False)
    assert found["variant"] == "bf16" and found["error"] == "it computed in float32"
    assert [file.name for file in trained.iterdir()] == ["adapter"]


def test_a_merge_is_compared_where_it_writes_a_model_that_loads():
    column = next(column for column in job.WAITING if column.head == "merge s")
    rows = [
        row("lora-recipes", merge={"rc": 0, "wall": 4.0, "loadable": True}),
        row("litgpt", merge={"rc": 0, "wall": 1.0, "loadable": False}),
        row("axolotl", merge={"rc": 0, "wall": 8.0, "loadable": True}),
        row("trl", merge={"rc": None, "reason": "no command that merges"}),
    ]
    assert job.ratios(rows, "qv", column, "lora-recipes") == [0.5]


def test_a_part_of_the_rows_is_measured_again_and_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, read, keep = tmp_path / "results.json", results.read, results.keep
    monkeypatch.setattr(results, "read", lambda file=file: read(file))
    monkeypatch.setattr(results, "keep", lambda section, found: keep(section, found, file))
    monkeypatch.setattr(results, "kept_here", lambda section, facts: read(file).get(section, {}))
    monkeypatch.setattr(job.peers, "measure_merge", lambda *_: {"rc": 0, "wall": 1.0, "loadable": True})
    rows = [row(peer, merge={"rc": 0, "wall": 4.0, "loadable": True}) for peer in ("lora-recipes", "axolotl")]
    results.keep("job", {"rows": [*rows, row("trl")], "machine": {}})
    job.measure_again(job.Options(tmp_path, ["lora-recipes", "axolotl", "trl"], ["qv"], rounds=1), "merge", "it")
    found = results.read()["job"]
    assert [one.get("merge", {}).get("wall") for one in found["rows"]] == [1.0, 1.0, None]
    assert found["again"]["merge"]["command"] == "it" and found["machine"] == {}


@pytest.fixture
def found() -> dict[str, Any]:
    machine = results.machine() | {"date": "now", "commit": "abc", "command": "bench", "load_before": 0.0}
    weights = {"body": 100, "head": 50, "adapter": {"qv": 10, "all-linear": 30}}
    rows = [row("lora-recipes", rate=30), row("lora-recipes", 2, 50), row("trl", checkpointing=True, differs="slow")]
    rows.append(
        {
            "peer": "litgpt",
            "job": "qv",
            "variant": None,
            "checkpointing": False,
            "round": 1,
            "rc": 1,
            "error": "no | luck",
            "version": None,
        }
    )
    return {
        "machine": machine,
        "rows": rows,
        "asked": {"steps": 4, "rounds": 2, "cores": 1},
        "rates": {"float32": 56_000.0, "bfloat16": 560_000.0},
        "weights": weights,
        "base_held_out": {"loss": 1.5},
    }


def test_the_tables_have_medians_ratios_and_why_a_figure_is_missing(found: dict[str, Any]):
    lines = job.markdown(found)
    ours = next(line for line in lines if line.startswith("| **lora-recipes**"))
    assert ours.startswith("| **lora-recipes** | float32 | 40.0 | 20.0 | 1.50 |")
    assert ours.endswith("| 40 % | 4 % |")  # 40 x (400 + 200 x 0.5 + 60) / 56,000
    assert any(line.startswith("| trl, checkpointing |") for line in lines)
    assert "| real tokens / CPU s | trl, checkpointing | 3.00 |" in lines  # rounds that both have: the first
    assert lines[-2:] == ["- trl: slow.", "- litgpt, qv, training: failed (1): no | luck."]
    for start in (place for place, line in enumerate(lines) if line.startswith("|---")):
        assert lines[start - 1].count("|") == lines[start].count("|")


def test_on_a_card_the_table_has_its_memory_and_wall_seconds(found: dict[str, Any]):
    for one in found["rows"][:3]:
        one |= {"real_per_second": 5000.0, "supervised_per_second": 900.0, "gpu_mb": 812.0, "dtype": "bfloat16"}
    lines = job.markdown(found | {"machine": found["machine"] | {"gpu": "a card"}}, "gpu")
    assert any(line.startswith("| **lora-recipes** | bf16 | 5,000 | 900 | 1.50 | 812 |") for line in lines)
    assert not any("CPU s |" in line and line.startswith("| real") for line in lines)


def test_a_token_needs_the_head_only_where_it_is_supervised():
    assert rate.flops_per_token(100, 50, 10, 0.5) == 400 + 100 + 60


def test_the_weights_of_the_demo_model_are_counted(tmp_path: Path):
    config = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config |= {"num_hidden_layers": 30, "vocab_size": 49152}
    (tmp_path / "config.json").write_text(json.dumps(config))
    counted = job.weights_of(tmp_path)
    assert counted == {"body": 106_168_320, "head": 28_311_552, "adapter": {"qv": 921_600, "all-linear": 4_884_480}}


def test_sections_are_replaced_one_by_one(tmp_path: Path):
    file = tmp_path / "results.json"
    results.keep("job", {"rows": [1]}, file)
    results.keep("data", {"figures": 2}, file)
    results.keep("job", {"rows": [3]}, file)
    assert results.read(file) == {"job": {"rows": [3]}, "data": {"figures": 2}}


def test_rows_of_another_machine_stand_in_no_table_of_this_one(tmp_path: Path):
    file, here = tmp_path / "results.json", results.machine()
    results.keep("job", {"machine": here | {"load_before": 9.0}, "rows": [1]}, file)
    assert results.kept_here("job", here, file)["rows"] == [1]
    for key in ("cpu", "generation", "gpu"):
        assert results.kept_here("job", here | {key: "another"}, file) == {}
    assert results.kept_here("data", here, file) == {}


def test_a_table_is_written_between_its_marks(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- data -->\nold\n<!-- /data -->\nafter\n")
    results.publish("data", results.table(["way", "s"], [["ours", "1.0"]]), page)
    text = page.read_text()
    assert "old" not in text and "| way | s |\n|---|--:|\n| ours | 1.0 |" in text and text.endswith("after\n")


@pytest.mark.parametrize(("power", "factor"), [(1.0, 3.0), (2.0, 0.5), (0.0, 7.0)])
def test_the_exponent_of_a_power_is_its_power(power: float, factor: float):
    sizes = [1, 10, 100, 200]
    assert scaling.slope(sizes, [factor * size**power for size in sizes]) == pytest.approx(power)


def test_only_what_is_slower_by_more_than_the_tolerance_is_said():
    stored = {"training step": 4.0, "tokenisation": 2.0}
    assert regress.slower({"training step": 5.0, "tokenisation": 1.0, "new": 9.0}, stored, 0.25) == []
    said = regress.slower({"training step": 5.2, "tokenisation": 2.0}, stored, 0.25)
    assert said == ["training step: 5.20, stored 4.00: +30 %"]


def test_every_section_has_its_marks_on_the_page():
    from benchmarks.suite import SECTIONS

    lines = results.PAGE.read_text(encoding="utf-8").splitlines()
    for name in (*SECTIONS, "job-gpu", "job-pairs"):
        assert lines.index(f"<!-- {name} -->") < lines.index(f"<!-- /{name} -->")
