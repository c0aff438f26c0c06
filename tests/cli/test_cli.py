"""The command line: exit codes, what it says, what it writes, and that one request has one hash however it is made.

What needs torch runs in this process through ``main``; only what is about processes starts one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unlearners.cli import main
from unlearners.verbs import VERBS

Cli = Callable[..., tuple[int, str, str]]
ESD = ("erase", "esd", "tiny", "--concept", "cup", "--sampler-steps", "4")


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """``cli("list", "methods")`` in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        return (code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the tiny model."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["erase", "uce", "tiny", "canvas/neon", "--out", str(out), "--device", "cpu"]) == 0
    return out


def python(*words: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, check=False, **kwargs)


# --- processes ----------------------------------------------------------------------------------------------------
def test_help_is_fast() -> None:
    seconds = []
    for _ in range(5):  # the best of a few: a loaded machine is no slow program
        start = time.perf_counter()
        done = python("-m", "unlearners.cli", "--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert all(verb in done.stdout for verb in VERBS)
    assert min(seconds) < 0.5


def test_help_and_import_need_no_torch() -> None:
    calls = "".join(f"main(['{verb}', '--help'])\n" for verb in VERBS)
    code = f"""
import sys, unlearners
from unlearners.cli import main
main(['--help'])
{calls}
unlearners.names('methods')
import unlearners.report
assert callable(unlearners.report) and 'report' in dir(unlearners)
heavy = {{'torch', 'diffusers', 'transformers', 'matplotlib', 'numpy'}} & set(sys.modules)
assert not heavy, heavy
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "Unified Concept Editing" in done.stdout  # erase --help lists the methods with their summaries


def test_a_process_says_one_line_and_exits(tmp_path: Path) -> None:
    bad = python("-m", "unlearners.cli", "erase", "esdd", "tiny", cwd=tmp_path)
    assert (bad.returncode, bad.stdout, bad.stderr) == (2, "", "unlearn: unknown method 'esdd'; did you mean esd or ssd or sld\n")


def test_an_interrupted_erasure_resumes(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "unlearners.cli", *ESD, "--steps", "100", "--out", "run"]
    # A shell's background job ignores Ctrl-C and hands that down; here it must arrive.
    child = subprocess.Popen(
        words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )
    log, end = tmp_path / "run" / "log.jsonl", time.monotonic() + 100
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert child.poll() is None, child.stderr and child.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert said.rstrip().endswith("unlearn: stopped; the same command resumes")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"

    again = python(*words[1:], "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["status"] == "done"  # one object and nothing else
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "done"
    assert (tmp_path / "run" / "weights.safetensors").is_file()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 101))


# --- bad input ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("lst", "did you mean list"),
        ("list method", "did you mean methods"),
        ("show unlearndiffatkk", "did you mean unlearndiffatk"),
        ("erase esdd tiny canvas/neon", "did you mean esd"),
        ("erase esd tiny canvas/neonn", "did you mean neon"),
        ("erase esd tiny canvas/neon --preset relese", "did you mean release"),
        ("erase esd tiny canvas/neon --lrr 3", "--lr FLOAT"),
        ("erase esd tiny canvas/neon --steps 2.5", "--steps"),
        ("erase esd tiny canvas/neon --lr nan", "finite"),
        ("erase esd tiny canvas/neon --x-from nowhere", "frozen"),
        ("erase --seed 3 esd tiny", "straight after 'unlearn erase'"),
        ("erase esd tiny", "--concept"),
        ("erase esd tiny canvas/neon --concept cup", "in one way"),
        ("erase esd tiny canvas/neon --kind style", "leave them out"),
        ("erase esd tiny --concept cup --preserve cup", "both to be forgotten and to be preserved"),
        ("erase esd tiny --concept cup --kind stile", "style"),
        ("attack random-token runs", "did you mean random_tokens"),
        ("attack random-tokens nowhere", "unlearn erase"),
        ("evaluate nowhere", "unlearn erase"),
        ("evaluate nowhere --metrics uaa", "did you mean ua"),
        ("report nowhere", "unlearn erase"),
        ("report . --show-images --no-images", "contradict"),
        ("export diffuser nowhere", "did you mean diffusers"),
        ("export diffusers nowhere", "unlearn erase"),
        ("bench nowhere.yaml", "nowhere.yaml"),
        ("zoo verifyy", "verify"),
    ],
)
def test_a_wrong_request_says_what_to_do_and_exits_2(cli: Cli, words: str, hint: str) -> None:
    code, out, err = cli(*words.split())
    assert (code, out) == (2, "")
    assert hint in err
    assert "Traceback" not in err
    assert not Path("runs").exists()
    code, out, err = cli(*words.split(), "--json")
    error = json.loads(out)
    assert code == error["exit_code"] == 2
    assert hint in error["error"]
    assert "\n" not in error["error"]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("lrr: 1", "unknown key of esd 'lrr'; did you mean lr"),
        ("steps: true", "esd.steps is true but must be a whole number or auto"),
        ("lr: fast", "esd.lr"),
        ("preset: relese", "did you mean release"),
        ("- lr", "key: value"),
        ("lr: [", "line"),
    ],
)
def test_a_bad_yaml_file_is_refused(cli: Cli, text: str, hint: str) -> None:
    Path("x.yaml").write_text(text)
    code, out, err = cli(*ESD, "--config", "x.yaml")
    assert (code, out) == (2, "")
    assert hint in err
    assert len(err.splitlines()) == 1


# --- one request, one hash ----------------------------------------------------------------------------------------
def test_flags_yaml_and_python_make_the_same_run(cli: Cli) -> None:
    from unlearners import registry, run, tasks
    from unlearners.base import Run

    def plan(*words: str) -> dict[str, Any]:
        code, out, err = cli("erase", "esd", "tiny", *words, "--dry-run", "--json")
        assert code == 0, err
        return dict(json.loads(out))

    Path("x.yaml").write_text("lr: 1e-5\nsteps: 3\nsampler_steps: 4\nx_from: frozen\n")
    flags = plan("canvas/neon", "--lr", "1e-5", "--steps=3", "--sampler-steps", "4", "--x-from", "frozen")
    yaml = plan("canvas/neon", "--config", "x.yaml")
    mixed = plan("canvas/neon", "--config=x.yaml", "--steps", "3")
    method = registry.make("methods", "esd", lr=1e-5, steps=3, sampler_steps=4, x_from="frozen")
    code = Run(target="tiny", task=tasks.load("canvas/neon"), method=method)
    assert flags["run"] == yaml["run"] == mixed["run"] == json.loads(json.dumps(code.plain))
    assert flags["folder"] == yaml["folder"] == f"runs/{code.folder}"
    assert isinstance(yaml["run"]["method"]["lr"], float)
    assert not Path("runs").exists()  # a dry run leaves nothing behind

    # and the folder that is foretold is the one that is written
    assert run.erase(method, "tiny", "canvas/neon") == Path(flags["folder"])

    # a preset, then the file, then flags
    late = plan("canvas/neon", "--preset", "release", "--config", "x.yaml", "--eta", "2")["run"]["method"]
    assert (late["sampler"], late["lr"], late["eta"]) == ("pipeline", 1e-5, 2.0)
    assert plan("canvas/neon", "--seed", "1")["folder"] != flags["folder"]
    assert plan("--concept", "Van Gogh", "--kind", "style")["run"]["task"]["concepts"] == ["Van Gogh"]


# --- verbs --------------------------------------------------------------------------------------------------------
def test_list_and_show(cli: Cli) -> None:
    code, out, _ = cli("list", "--json")
    kinds = json.loads(out)
    assert code == 0
    assert {"esd", "uce"} <= {row["name"] for row in kinds["methods"]}
    assert all(row["summary"] for rows in kinds.values() for row in rows)
    assert "canvas/neon" in cli("list", "tasks")[1]
    (esd,) = json.loads(cli("show", "esd", "--json")[1])["found"]
    assert (esd["paper"], esd["needs"]) == ("arXiv:2303.07345", "Denoiser")
    (lr,) = (f for f in esd["fields"] if f["name"] == "lr")
    assert (lr["type"], lr["default"]) == ("float | auto", "auto") and lr["help"].startswith("learning rate of Adam; auto: 1e-5")
    assert "release" in esd["presets"]
    for kind, rows in kinds.items():
        code, out, err = cli("show", rows[0]["name"].replace("_", "-") if kind != "tasks" else rows[0]["name"])
        assert code == 0, err
        assert f"{rows[0]['name']} ({kind.removesuffix('s')})" in out


def test_erase_report_and_export(cli: Cli, folder: Path) -> None:
    code, out, _ = cli("erase", "uce", "tiny", "canvas/neon", "--out", str(folder), "--device", "cpu")
    assert code == 0
    assert out.splitlines()[-1] == f"→ {folder}"
    code, out, err = cli("report", str(folder), "--no-images", "--json")
    assert code == 0, err
    assert Path(json.loads(out)["file"]).is_file()
    code, out, err = cli("export", "diffusers", str(folder), "--out", "model", "--dtype", "float32", "--json")
    assert code == 0, err
    assert json.loads(out) == {"out": "model"}
    assert Path("model/model_index.json").is_file()


@pytest.mark.parametrize(
    "words",
    [
        "erase esd tiny canvas/neon --preset fast",
        "erase uce {folder} canvas/cup",
        "attack random-tokens {folder}",
        "attack unlearndiffatk {folder} --k 2",
        "evaluate {folder} --metrics ua ira",
        "report {folder}",
        "export diffusers {folder}",
        "bench grid.yaml",
        "demo",
        "zoo verify",
        "list methods",
    ],
)
def test_a_dry_run_changes_nothing(cli: Cli, folder: Path, words: str) -> None:
    Path("grid.yaml").write_text("target: tiny\ntasks: [canvas/neon]\nmethods: [{name: uce}]\n")
    before = {p: p.stat().st_mtime_ns for place in (folder, Path()) for p in place.rglob("*")}
    for json_flag in ([], ["--json"]):
        code, out, err = cli(*words.format(folder=folder).split(), "--dry-run", *json_flag)
        assert code == 0, err
        assert out
    assert json.loads(out)
    assert {p: p.stat().st_mtime_ns for place in (folder, Path()) for p in place.rglob("*")} == before


def test_attack_and_evaluate_write_into_the_folder(cli: Cli, folder: Path) -> None:
    code, out, err = cli("attack", "random-tokens", str(folder), "--tries", "1", "--prompts", "2", "--device", "cpu", "--json")
    assert code == 0, err
    assert json.loads(out)["prompts"] == 2
    assert (folder / "attacks" / "random_tokens.json").is_file()
    code, out, err = cli("evaluate", str(folder), "--metrics", "ua", "cost", "--seeds", "1", "--steps", "2", "--device", "cpu")
    assert code == 0, err
    assert "cost/seconds" in out
    assert out.splitlines()[-1] == f"→ {folder / 'results.json'}"
    assert "ua" in {r["metric"] for r in json.loads((folder / "results.json").read_text())}


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "unlearners", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("unlearn ")
