"""A model that somebody else erased, by path or hub id, as an ordinary run folder: what attacks, metrics and reports work on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from . import imports, patch, tasks
from .base import Run, Task
from .errors import RefusedError, UnlearnError, UsageError
from .files import sentence
from .methods.plug import Plug, whole
from .run import erase
from .session import Progress
from .targets import absolute, is_run, read_run
from .targets.base import hub_config

PARTS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
"""the files of a hub repository that a model of transformers is made of"""


def adopt(
    spec: str | Path,
    task: Task | str,
    *,
    base: str = "",
    runs: str | Path = "runs",
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """The run folder of the erased model ``spec``: its method is ``plug``, its target ``base``. See ``plan`` for what is refused.

    The same request finds the same folder. One that cannot be met leaves none behind.
    """
    task = tasks.load(task) if isinstance(task, str) else task
    run = plan(spec, task, base=base, dtype=dtype)
    folder = Path(runs) / run.folder
    fresh = not folder.exists()
    try:
        return erase(run.method, run.target, task, runs=runs, dtype=dtype, device=device, progress=progress)
    except UnlearnError:
        if fresh and is_run(folder) and read_run(folder)["status"] == "failed":
            shutil.rmtree(folder)
        raise


def plan(spec: str | Path, task: Task, *, base: str = "", dtype: str = "float32") -> Run:
    """The run that ``adopt`` makes of ``spec``: a whole model's folder, a component's folder, a file of weights, or a hub id.

    ``base`` is the model as it was before the erasure; a whole model can do without, and then stands for itself. Raises ``UsageError``
    where nothing is found at ``spec`` or a base is missing, and ``RefusedError`` for a file that is damaged or would run code.
    """
    path = local(str(spec))
    if path.is_dir() and base and absolute(base) == str(path):
        raise UsageError(f"--base is {spec} itself; name the model as it was before the erasure, or leave --base out")
    ours = not whole(path) and patch.is_patch(imports.held(path)[0])
    if not base and not whole(path):
        raise UsageError(f"{spec} holds weights alone; say with --base which model they were made from, for example --base sd14")
    method = Plug(patch=str(path), unshared=not ours, digest=imports.digest(path))
    return Run(target=absolute(base) if base else str(path), task=task, method=method, dtype=dtype)


def local(spec: str) -> Path:
    """Where ``spec`` lies on this machine; a hub repository is fetched first, as diffusers or transformers would."""
    path = Path(spec)
    if path.exists():
        return path.resolve()
    try:
        if hub_config(spec, "model_index.json"):
            from diffusers import DiffusionPipeline

            loader: Any = DiffusionPipeline
            return Path(loader.download(spec, use_safetensors=True, safety_checker=None)).resolve()
        if hub_config(spec):
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(spec, allow_patterns=PARTS)).resolve()
    except Exception as error:  # the network and the hub fail in many ways
        raise RefusedError(f"{spec} could not be fetched from the hub ({sentence(error).rstrip('.')}); try again") from error
    raise UsageError(
        f"nothing that can be read is at {spec}; give a run folder ('unlearn erase' makes them, also with sld and negative_prompt), "
        "a model folder, a file of weights, or a hub id"
    )
