"""The command, the report and docs/scaling.md."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from effnet_ops.cli import app
from effnet_ops.cli.console import console
from effnet_ops.models import spec_from_dict
from effnet_ops.scaling import CompoundScaling, LatencyTable, Timing, count, latency, report

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["scale", *map(str, arguments)])


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(console, "width", 160)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that cost nothing: every layer 0.5 ms, every network 10."""

    def rounds(self, specs, resolution, networks):
        found = {u.key for spec in specs for u in latency.units(spec, resolution)} - self.entries.keys()
        timings = {key: Timing(4e-4, 5e-4, 6e-4, 3, 3) for key in found}
        self.entries.update(timings)
        return timings | {f"network {i}": Timing(9e-3, 1e-2, 2e-2, 3, 2) for i in range(len(list(specs)) * networks)}

    monkeypatch.setattr(LatencyTable, "_rounds", rounds)


def test_importing_scaling_imports_no_plotting_and_no_training() -> None:
    program = (
        "import sys, effnet_ops.scaling, effnet_ops.cli.scale_laws\n"
        "heavy = {'matplotlib', 'sklearn', 'jinja2', 'scipy', 'timm'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_family_shows_the_published_figures() -> None:
    output = run("family").output
    for figure in ("5.29", "37.746", "84.3", "3.53", "lite4", "v2_b3", "14.36", "v2_xl", "93.353", "87.2"):
        assert figure in output


def test_plan_gives_a_network_within_the_budget_and_writes_it(tmp_path: Path) -> None:
    result = run("plan", "--budget", "2GMACs", "--output", tmp_path / "spec.json")
    assert result.exit_code == 0, result.output
    assert "2.524" not in result.output and "phi = 2.2239" in result.output
    for way in ("compound", "depth only", "width only", "resolution only"):
        assert way in result.output
    spec = spec_from_dict(json.loads((tmp_path / "spec.json").read_text()))
    assert 1.9e9 < count(spec).macs <= 2e9
    assert "resolution only" not in run("plan", "--budget", "20Mparams").output


def test_plan_within_milliseconds(instant: None) -> None:
    result = run("plan", "--budget", "13ms")
    assert result.exit_code == 0, result.output
    assert "within 13 ms" in result.output and "12.5 ms" in result.output  # 23 blocks, stem and head
    assert result.stderr == "effnet-ops: measuring layers; the times are kept for the next call\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--budget", "3parsecs"), "unknown unit of a budget 'parsecs'; did you mean 'params'"),
        (("plan", "--budget", "1MMACs"), "infeasible"),
        (("plan", "--budget", "2GMACs", "--alpha", "0.9"), "alpha must be a number of at least 1"),
        (("plan", "--budget", "2GMACs", "--base", "eficientnet_b0"), "did you mean 'efficientnet_b0'"),
        (("search", "--budget", "1MMACs"), "no point of the grid"),
        (("search", "--objective", "digit"), "did you mean 'digits'"),
        (("search", "--objective", "os:nothing"), "cannot be loaded"),
        (("search", "--objective", "os:sep"), "is not a function"),
        (("search", "--budget", "5ms", "--base", "eficientnet_b0"), "did you mean 'efficientnet_b0'"),
        (("search", "--budget", "5ms", "--tolerance", "2"), "tolerance must lie in"),
        (("compare", "--budget", "10GMACss"), "did you mean"),
        (("compare", "--budget", "1ms"), "give --budget in MACs, FLOPs, params or B"),
        (("report", "--no-measure", "--variant", "optimised"), "did you mean 'optimized'"),
        (("report", "--gamma", "0"), "gamma must be a number of at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "float23"), "did you mean 'float32'"),
        (("--variant", "optimised"), "did you mean 'optimized'"),
        (("--device", "cudax"), "device 'cudax' cannot be used"),
        (("--device", "meta"), "device 'meta' cannot be timed, only cpu and cuda can"),
        (("--device", "mps"), "device 'mps' cannot be timed"),
    ],
)
@pytest.mark.parametrize("budget", ["5ms", "2GMACs"])
def test_bad_measuring_is_named_before_anything_is_kept(
    options: tuple[str, ...], message: str, budget: str, tmp_path: Path
) -> None:
    result = run("plan", "--budget", budget, *options)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_cache_that_is_none_is_one_line(tmp_path: Path) -> None:
    result = run("plan", "--budget", "5ms", "--cache", tmp_path)
    assert result.exit_code == 2 and "Is a directory" in result.stderr and len(result.stderr.splitlines()) == 1


def test_search_ranks_and_resumes(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    first = run("search", "--top", 2, "--results", results)
    assert first.exit_code == 0, first.output
    assert "87 runs made now" in first.output and "nothing was trained" in first.output
    assert "0 runs made now" in run("search", "--results", results).output
    results.write_text("nonsense\n")
    assert "line 1 is no JSON object" in run("search", "--results", results).stderr


def test_search_takes_an_objective_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_objective.py").write_text("def wide(spec, seed):\n    return spec.width + seed\n")
    monkeypatch.chdir(tmp_path)
    result = run("search", "--objective", "my_objective:wide", "--top", 1, "--seeds", 2)
    assert result.exit_code == 0, result.output
    assert re.search(r"1 │ +1\.4 │ +1 │ +1\.9 │", result.output)


def test_compare_shows_every_way() -> None:
    result = run("compare", "--base", "efficientnet_b0", "--objective", "published", "--budget", "1.5GMACs")
    assert result.exit_code == 0, result.output
    for way in ("unscaled", "depth only", "width only", "resolution only", "compound"):
        assert way in result.output


class Page(HTMLParser):
    """What the report's page refers to, its ids, and whether its tags fit into each other."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "use", "path", "rect", "stop", "image"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.labels = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [tag] * (tag not in self.VOID)
        for name, value in attrs:
            self.links += [value or ""] * (name in ("src", "href", "xlink:href", "action", "srcset"))
            self.ids += [value or ""] * (name == "id")
            self.labels += name == "aria-label" and bool(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_report_is_one_page_that_needs_no_network(instant: None, tmp_path: Path) -> None:
    result = run("report", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"url\((?!#)|@import|<script", text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"family.svg", "laws.png", "roofline.svg", "pareto.png", "digits_curves.svg"} <= figures
    assert len(figures) == 2 * page.labels == 2 * text.count("<figcaption>")
    assert not re.findall(r"#[0-9a-f]{6}\b", text.partition("</style>")[2])
    for phrase in ("2.57x, not 1.92x", "Gain for a millisecond", "measure again when it is quiet"):
        assert phrase in text
    for figure in (tmp_path / "out" / "figures").glob("*.png"):
        with Image.open(figure) as image:
            assert image.width >= 700 and len(image.getcolors(1 << 20) or range(9)) > 8


def test_a_report_without_measuring_measures_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict = {}
    monkeypatch.setattr(report, "build_report", lambda folder, **keywords: asked.update(keywords) or folder)
    assert run("report", "--output", tmp_path, "--no-measure", "--beta", 1.3).exit_code == 0
    assert asked["table"] is None and asked["law"] == CompoundScaling(beta=1.3) and asked["axes"].new == 0


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_scaling", ROOT / "docs" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_number_of_the_documentation_is_computed_again(builder: ModuleType) -> None:
    committed = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert builder.page() == committed
    template = (ROOT / "docs" / "scaling.md.jinja").read_text(encoding="utf-8")
    written = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|```.*?```|`[^`]*`|arXiv [\d.]+", "", template, flags=re.DOTALL)
    assert not re.findall(r"\d+\.\d+", written)
    for figure in re.findall(r"\]\((figures/.*?)\)", committed):
        assert (ROOT / "docs" / figure).stat().st_size > 1000


def test_the_code_of_the_documentation_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(compile(block, "scaling.md", "exec"), names)
    assert 0.9e9 < count(names["spec"]).macs <= 1e9 and len(names["front"]) > 1
    assert names["spec"].resolution == CompoundScaling().spec(CompoundScaling().phi_for("1GMACs")).resolution
