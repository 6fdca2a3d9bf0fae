"""`sdrt table`: what it prints, and that it is the table that pictures are made with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sdrt.cli import main
from sdrt.commands.table import FORMULAS
from sdrt.engines import demo
from sdrt.engines.bundle import Bundle
from sdrt.runtime.request import make_request
from sdrt.runtime.samplers import SAMPLERS, sampler_table
from sdrt.runtime.schedule import Schedule

from .test_cli import failure

if TYPE_CHECKING:
    from collections.abc import Callable

README = (Path(__file__).parents[1] / "engines" / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        assert main(["table", *arguments]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


def rows_of(facts: dict[str, Any]) -> dict[str, Any]:
    """What of the JSON is the table itself."""
    return {name: facts[name] for name in sampler_table("plms", Schedule(), 1).to_dict()}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 7])
def test_json_is_the_table_to_the_last_bit(printed: Callable[..., str], sampler: str, steps: int) -> None:
    facts = json.loads(printed("--sampler", sampler, "--steps", str(steps), "--json"))
    table = sampler_table(sampler, Schedule(), steps)
    assert rows_of(facts) == table.to_dict()
    assert (facts["schema_version"], facts["bundle"], facts["input_scale"]) == (1, None, 1.0)
    assert facts["evaluations"] == len(table) == len(facts["sigmas"])
    assert facts["timestep_spacing"] == SAMPLERS[sampler].default_spacing
    assert facts["formulas"] == FORMULAS


def test_a_bundle_gives_its_schedule_and_its_sampler(printed: Callable[..., str], tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    facts = json.loads(printed("--bundle", str(tiny_bundle), "--steps", "5", "--json"))
    assert rows_of(facts) == make_request(bundle.manifest, "", num_inference_steps=5).table.to_dict()
    scheduler = facts["scheduler"]
    assert scheduler == {name: bundle.manifest.scheduler.get(name, scheduler[name]) for name in scheduler}


@pytest.mark.parametrize("arguments", [["--sampler", "DDIM", "--eta", "0.5"], ["--spacing", "trailing"]])
def test_options_are_those_of_run(printed: Callable[..., str], own_home: Path, arguments: list[str]) -> None:
    facts = json.loads(printed("--bundle", "demo", "--steps", "9", "--json", *arguments))
    keywords: dict[str, Any] = (
        {"sampler": "ddim", "eta": 0.5} if "--eta" in arguments else {"timestep_spacing": "trailing"}
    )
    manifest = Bundle.open(demo.bundle_folder(own_home)).manifest
    expected = make_request(manifest, "", num_inference_steps=9, **keywords).table
    assert rows_of(facts) == expected.to_dict()
    assert facts["timestep_spacing"] == keywords.get("timestep_spacing", "leading")
    assert facts["eta"] == keywords.get("eta", 0.0)


def test_people_get_the_columns_that_matter(printed: Callable[..., str]) -> None:
    head, rows, notes = printed("--sampler", "euler_a", "--steps", "3").split("\n\n")
    assert head == "Euler a for Stable Diffusion v1, which predicts epsilon: 3 steps, 3 evaluations, linspace spacing"
    title, *lines = (line.split() for line in rows.splitlines())
    assert title == ["i", "timestep", "sigma", "q", "a", "b0", "c", "noise"]
    table = sampler_table("euler_a", Schedule(), 3)
    assert [float(line[1]) for line in lines] == pytest.approx(table.timesteps.tolist())
    assert [float(line[5]) for line in lines] == pytest.approx(table.b[:, 0].tolist(), rel=1e-5)
    assert {line[7] for line in lines} == {"drawn"}
    assert f"initial_scale = {table.initial_scale:.6g}" in notes
    assert FORMULAS["step"] in notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "heun"], "sampler is 'heun': expected one of ddpm, ddim"),
        (["--steps", "0"], "num_inference_steps is 0: expected a whole number from 1 to 1000"),
        (["--steps", "1.5"], "'1.5' is not a valid integer"),
        (["--sampler", "euler", "--eta", "1"], "eta is 1 and the sampler is euler"),
        (["--eta", "nan"], "eta is nan: expected a number from 0 to 1"),
        (["--spacing", "even"], "timestep spacing is 'even'"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in failure(capsys, "table", *arguments, "--json", code=2)


def test_a_bundle_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no bundle 'absent'" in failure(capsys, "table", "--bundle", "absent", code=1)


def test_every_field_is_documented(printed: Callable[..., str]) -> None:
    section = README.partition("\n## Making a picture\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert documented == set(json.loads(printed("--steps", "1", "--json")))
