"""A folder for the Hugging Face Hub, with a model card."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..errors import UnlearnError, UsageError
from ..files import sentence
from . import Export
from ._shared import erased, save_pipeline

LICENCES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}


@dataclass(frozen=True, kw_only=True)
class Hub(Export):
    """A folder for the Hugging Face Hub: the erased pipeline or its patch, with a model card that says what was measured and what not."""

    reads: ClassVar[str] = "Hugging Face Hub, diffusers"
    layout: Literal["diffusers", "patch"] = "diffusers"
    """the whole pipeline, or only what changed"""
    dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    """precision of the pipeline's weights on disk"""
    licence: str = ""
    """licence of the result; the base model's where it is known"""
    push: str = ""
    """upload to this repository, as NAME/MODEL; needs the network and a token of yours"""
    private: bool = True
    """make the repository private if it has to be made"""

    def run(self, folder: Path, out: Path) -> Path:
        from ..flags import read

        record = read(folder)
        out.mkdir(parents=True, exist_ok=True)
        if self.layout == "diffusers":
            save_pipeline(erased(folder), out, self.dtype)
        elif not (folder / "weights.safetensors").is_file():
            raise UsageError(f"the run in {folder} changed no weight, so there is no patch to share; use the layout diffusers")
        else:
            shutil.copyfile(folder / "weights.safetensors", out / "weights.safetensors")
        (out / "README.md").write_text(self.card(record, out), encoding="utf-8")
        if self.push:
            self.upload(out)
        return out

    def card(self, record: Any, out: Path) -> str:
        """The run's model card with licence, use and the hash of each weight file."""
        import yaml

        from ..report import card, table
        from ..targets.stable_diffusion import ALIASES

        _, front, body = card(record).split("---\n", 2)
        name = record.run["run"]["target"]
        base = ALIASES.get(name, name) if name != "canvas" else name
        licence = self.licence or LICENCES.get(base, "")
        top = yaml.safe_load(front) | {"base_model": base, "license": licence or "other"}
        if self.layout == "diffusers":
            top |= {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
        inherits = f"The weights derive from {base} and keep its licence" + (f", {licence}." if licence else "; read it there.")
        use = (
            "Load this folder with `DiffusionPipeline.from_pretrained`. It has no safety checker; add one where others use it."
            if self.layout == "diffusers"
            else f"`unlearn patch apply weights.safetensors --target {base} --out FOLDER` writes the erased pipeline."
        )
        files = [{"file": p.relative_to(out).as_posix(), "SHA-256": _sha(p)} for p in sorted(out.rglob("*.safetensors"))]
        parts = [f"## Use\n\n{use}", f"## Licence\n\n{inherits}", f"## Files\n\n{table(files, 'markdown')}"]
        return f"---\n{yaml.safe_dump(top, sort_keys=False, allow_unicode=True)}---\n{body.rstrip()}\n\n" + "\n\n".join(parts)

    def upload(self, out: Path) -> None:
        """Send the folder; ``UnlearnError`` unless all of it arrived."""
        try:
            api = _api()
            api.create_repo(self.push, private=self.private, exist_ok=True)
            api.upload_folder(repo_id=self.push, folder_path=str(out), commit_message="Upload by unlearners")
        except Exception as error:  # no network, no token, no right, a full quota: all that matters is that it is not there
            raise UnlearnError(f"{out} is written but not on the hub ({sentence(error)}); check network, token and name") from error

    def about(self, path: Path) -> dict[str, Any]:
        return {"layout": self.layout, "pushed": self.push or None}


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _sha(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
